"""AGD."""

from __future__ import annotations

import numpy as np

from precond_ref.conformance.declarations.base import DECAY, integers, maker, with_zeros

CONFIG = {"beta1": 0.75, "beta2": 0.5, "delta": 0.125, "amsgrad": False, "clip": None}
case, reject = maker("AGD", CONFIG, (2, 3))

SWITCH = np.array([[4, 1, -2], [4, 1, 2], [3.5, 1, -2], [4, 1.25, 2], [4, 1, -1], [3.75, 1, 3]])

CASES = [
    case("plain", "All equations at once, with different decays.",
        "gradient-difference square-of-gradient weight-missing statistic-after"),
    case("first-step", "One step: s_1 is the first gradient, so the direction is g / max(|g|, delta).",
        "first-difference-zero first-difference-raw no-correction-1 no-correction-2", steps=1),
    case("switch", "Coordinates above, at and below the threshold.", "delta-added delta-uncorrected delta-inside",
        shape=(3,), grads=SWITCH, change={"delta": 1.0}),
    case("sgd", "delta so large that every step is that of averaged SGD.",
        "delta-uncorrected no-correction-1 delta-ignored", change={"delta": 16.0}),
    case("constant-gradient", "No differences after the first step: b only decays and the steps grow.",
        "difference-uncorrected difference-one-correction", grads=np.ones((6, 1)) * [[0.5, -2.0, 3.0]], shape=(3,),
        change={"beta1": 0.5, "delta": 0.0625}),
    case("amsgrad", "The running maximum of b, without bias correction, under gradients that shrink and grow.",
        "amsgrad-ignored amsgrad-corrected amsgrad-kept",
        grads=integers(3, (6, 2, 3)) * np.reshape([0.5, 1, 0.25, 0.25, 2, 0.5], (6, 1, 1)),
        change={"amsgrad": True, "delta": 0.0625}),
    case("clip", "The bound applies before the bias corrections.", "clip-after clip-ignored", seed=4,
        change={"clip": 0.5}),
    case("no-averaging", "beta1 = beta2 = 0: the quotient of the gradient and its last change.", "statistic-after",
        seed=5, change={"beta1": 0.0, "beta2": 0.0}),
    case("zero-first", "A zero gradient at the first step, so that b_1 = 0.", grads=with_zeros(6, (2, 3), 0)),
    case("zero-later", "A zero gradient in between still changes m and b.", "", grads=with_zeros(7, (2, 3), 1, 3)),
    case("zero-delta", "delta = 0: no lower bound, and 0/0 gives 0 where the gradient is always zero.", shape=(3,),
        grads=np.array([[1, 0, -2], [3, 0, 1], [-1, 0, 2], [2, 0, -3]]), change={"delta": 0.0}, tier="should"),
    case("slow-decay", "Decays near 1, as in use: bias corrections in float32 are visible in float64.",
        "float32-correction correction-ahead", seed=8, steps=12, scale=0.25,
        change={"beta1": 0.9375, "beta2": 1 - 2.0**-10}, tier="should"),
    case("decay", "Decoupled weight decay, before the step and times lr.", DECAY, seed=9, decay=0.25),
    case("scalar", "A parameter without axes.", shape=(), seed=10, tier="should"),
    case("vector", "A parameter with one axis.", shape=(5,), seed=11),
    case("stack", "Two parameters at once; elementwise, so the stack changes nothing.", shape=(2, 3), stack_ndim=1,
        seed=12, tier="may"),
    reject("beta1", "A decay of 1 never forgets the zero start.", "beta1", beta1=1.0),
    reject("beta2", "A decay of 1 never forgets the zero start.", "beta2", beta2=1.0),
    reject("delta", "A negative threshold.", "delta", delta=-0.5),
    reject("clip", "A bound of zero stops everything.", "clip", clip=0.0),
]  # fmt: skip
