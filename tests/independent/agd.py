"""AGD (arXiv 2312.01658v2, Algorithm 1), and amsgrad and clip as in the authors' code."""

from __future__ import annotations

import mpmath as mp
import numpy as np

from .base import Case, Trace, drive, each, exact, integers, maker, quotient, zeros


def start(param, c):
    """m_0, b_0."""
    state = {"m": zeros(*param.shape), "b": zeros(*param.shape)}
    return state | {"b_max": zeros(*param.shape)} if c.amsgrad else state


def step(t, grad, param, state, c):
    """Algorithm 1: a difference of bias-corrected averages makes the denominator."""
    m = c.beta1 * state["m"] + (1 - c.beta1) * grad
    corrected = m / (1 - c.beta1**t)
    s = corrected if t == 1 else corrected - state["m"] / (1 - c.beta1 ** (t - 1))
    b = c.beta2 * state["b"] + (1 - c.beta2) * s * s
    new, used = {"m": m, "b": b}, b
    if c.amsgrad:
        used = new["b_max"] = each(max, state["b_max"], b)
    c2 = 1 - c.beta2**t
    u = quotient(m, each(lambda v: max(mp.sqrt(v), c.delta * mp.sqrt(c2)), used))
    if c.clip is not None:
        u = each(lambda v: max(-c.clip, min(c.clip, v)), u)
    return u * mp.sqrt(c2) / (1 - c.beta1**t), new, 1


def run(case: Case) -> Trace:
    """The truth of a case."""
    return drive(case, start, step)


CONFIG = {"beta1": 0.75, "beta2": 0.5, "delta": 0.125, "amsgrad": False, "clip": None}
case, reject = maker("AGD", CONFIG, (2, 3))

SWITCH = np.array([[4, 1, -2], [4, 1, 2], [3.5, 1, -2], [4, 1.25, 2], [4, 1, -1], [3.75, 1, 3]])

CASES = [
    case("plain", "All equations at once, with different decays.", ("difference-of-gradients", "belief", "adam")),
    case("first-step", "One step: s_1 is the first gradient, so the direction is g / max(|g|, delta).", ("s1-zero",), steps=1),
    case("switch", "Coordinates above, at and below the threshold.", ("delta-added", "delta-uncorrected"),
         shape=(3,), grads=SWITCH, change={"delta": 1.0}),
    case("sgd", "delta so large that every step is that of averaged SGD.", ("delta-uncorrected", "m-uncorrected"),
         change={"delta": 16.0}),
    case("constant-gradient", "No differences after the first step: b only decays and the steps grow.",
         ("belief", "difference-uncorrected"), grads=np.ones((6, 1)) * [[0.5, -2.0, 3.0]], shape=(3,),
         change={"beta1": 0.5, "delta": 0.0625}),
    case("amsgrad", "The running maximum of b, without bias correction, under gradients that shrink.",
         ("amsgrad-off", "amsgrad-corrected"), seed=3,
         grads=integers(3, (6, 2, 3)) * exact([4, 2, 1, 1, 0.5, 0.25]).reshape(6, 1, 1) / 2,
         change={"amsgrad": True, "delta": 0.0625}),
    case("clip", "The bound applies before the bias corrections.", ("clip-after", "clip-off"), seed=4,
         change={"clip": 0.5}),
    case("no-averaging", "beta1 = beta2 = 0: the quotient of the gradient and its last change.", ("belief",),
         seed=5, change={"beta1": 0.0, "beta2": 0.0}),
    case("zero-first", "A zero gradient at the first step, so that b_1 = 0.", seed=6,
         grads=np.array([[[0, 0, 0], [0, 0, 0]], [[1, -2, 3], [2, 0, -1]], [[2, 1, 0], [-3, 0, 1]], [[-1, 1, 2], [1, 0, 2]]])),
    case("zero-later", "A zero gradient in between still changes m and b.", ("skips-zero-gradients",), seed=7,
         grads=np.array([[[1, -2, 3], [2, 1, -1]], [[0, 0, 0], [0, 0, 0]], [[2, 1, 1], [-3, 2, 1]], [[0, 0, 0], [0, 0, 0]]])),
    case("zero-delta", "delta = 0: no lower bound, and 0/0 gives 0 where the gradient is always zero.",
         shape=(3,), grads=np.array([[1, 0, -2], [3, 0, 1], [-1, 0, 2], [2, 0, -3]]), change={"delta": 0.0},
         tier="should"),
    case("slow-decay", "Decays near 1, as in use: bias corrections in float32 are visible in float64.",
         ("float32-corrections",), seed=8, steps=12, scale=0.25, change={"beta1": 0.9375, "beta2": 1 - 2.0**-10},
         tier="should"),
    case("decay", "Decoupled weight decay, before the step and times lr.",
         ("decay-coupled", "decay-without-lr"), seed=9, decay=0.25),
    case("scalar", "A parameter without axes.", shape=(), seed=10, tier="should"),
    case("vector", "A parameter with one axis.", shape=(5,), seed=11),
    case("stack", "Two parameters at once; elementwise, so the stack changes nothing.", shape=(2, 3), stack_ndim=1,
         seed=12, tier="may"),
    reject("beta1", "A decay of 1 never forgets the zero start.", "beta1", beta1=1.0),
    reject("beta2", "A decay of 1 never forgets the zero start.", "beta2", beta2=1.0),
    reject("delta", "A negative threshold.", "delta", delta=-0.5),
    reject("clip", "A bound of zero stops everything.", "clip", clip=0.0),
]  # fmt: skip
