"""MBF in 50 digits (Bahamou, Goldfarb, Ren, arXiv 2202.04124), with every mini-block written out.

Per block b: F_b <- rho F_b + (1 - rho) g_b g_b^T, P_b <- (F_b + lambda I)^-1, direction P_b M_b, M heavy-ball.
A block is the list of the places of its entries in the parameter.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mpmath as mp
import numpy as np

from .base import Array, Case, Trace, condition, drive, exact, eye, integers, power, sqrt, zeros

Place = tuple[int, ...]


def blocks(shape: tuple[int, ...], c: SimpleNamespace) -> list[list[Place]]:
    """The places of each mini-block's entries, in the order in which they are counted."""
    if c.kind == "conv":
        o, i, height, width = shape
        return [[(a, b, y, x) for y in range(height) for x in range(width)] for a in range(o) for b in range(i)]
    o, j = shape
    if c.layout == "per_output":
        return [[(row, column) for column in range(j)] for row in range(o)]
    if c.layout == "per_input":
        return [[(row, column) for row in range(o)] for column in range(j)]
    in_order = [(row, column) for row in range(o) for column in range(j)]
    return [in_order[start : start + o] for start in range(0, o * j, o)]


def _gather(array: Array, places: list[Place]) -> Array:
    return exact([array[place] for place in places])


def _start(param: Array, c: SimpleNamespace) -> dict[str, Any]:
    if c.kind == "diagonal":
        return {"m": zeros(*param.shape), "statistic": zeros(*param.shape)}
    count, s = len(blocks(param.shape, c)), len(blocks(param.shape, c)[0])
    lead = () if _averaged(c) else param.shape[:2] if c.kind == "conv" else (count,)
    statistic = zeros(*lead, s, s)
    state = {"m": zeros(*param.shape), "statistic": statistic, "_kappa": mp.mpf(1)}
    return state if c.inverse_every == 1 else state | {"inverse": statistic + eye(s) / c.damping}


def _averaged(c: SimpleNamespace) -> bool:
    return c.kind == "fc" and c.average


def _step(t: int, g: Array, param: Array, state: dict[str, Any], c: SimpleNamespace) -> tuple:
    if c.kind == "diagonal":
        return _diagonal(t, g, state)
    places, i = blocks(param.shape, c), t - 1
    m = c.momentum * state["m"] + g
    s = len(places[0])
    old = state["statistic"].reshape(-1, s, s)
    outer = [np.outer(*(_gather(g, p),) * 2) for p in places]
    outer = [sum(outer[1:], outer[0]) / len(outer)] if _averaged(c) else outer
    f = old
    if i % c.statistics_every == 0:
        f = np.stack([c.decay * a + (1 - c.decay) * b for a, b in zip(old, outer, strict=True)])
    due = (i <= c.inverse_every and i % c.statistics_every == 0) or i % c.inverse_every == 0
    inverse = np.stack([power(a, -1, c.damping) for a in f]) if due else state["inverse"].reshape(-1, s, s)
    direction = zeros(*param.shape)
    for b, block in enumerate(places):
        moved = inverse[0 if _averaged(c) else b] @ _gather(m, block)
        for place, value in zip(block, moved, strict=True):
            direction[place] = value
    shape = state["statistic"].shape
    kappa = max(condition(a, c.damping) for a in f) if due else state["_kappa"]
    new = {"m": m, "statistic": f.reshape(shape), "_kappa": kappa}
    if c.inverse_every > 1:
        new["inverse"] = inverse.reshape(shape)
    return direction, new, kappa


def _diagonal(t: int, g: Array, state: dict[str, Any]) -> tuple:
    """The authors' rule for what has no blocks, with their constants as the nearest float64."""
    decay, square_decay, eps = mp.mpf(0.9), mp.mpf(0.999), mp.mpf(1e-8)
    n = exact(decay * state["m"] + (1 - decay) * g)
    v = exact(square_decay * state["statistic"] + (1 - square_decay) * n * n)
    return n / (eps + sqrt(v / (1 - square_decay**t))), {"m": n, "statistic": v}, 1 / (1 - square_decay**t)


PRESETS = {
    "autoencoder": {"layout": "contiguous", "damping": 3e-4, "statistics_every": 2, "inverse_every": 25},
    "cnn": {"layout": "contiguous", "damping": 3e-3, "statistics_every": 10, "inverse_every": 100},
}
"""What the authors ran, by kind of network."""

DEFAULTS: dict[str, Any] = {
    "kind": "fc",
    "layout": "per_output",
    "average": True,
    "damping": 0.5,
    "decay": 0.75,
    "momentum": 0.5,
    "statistics_every": 1,
    "inverse_every": 1,
}


def run(case: Case) -> Trace:
    """The trace of a case."""
    if case.constructor == "MBF.authors_code":
        config = {**DEFAULTS, "decay": 0.9, "momentum": 0.9, **PRESETS[case.config["network"]]}
        case = replace(case, config=config)
    diagonal = case.config["kind"] == "diagonal"
    stale = case.config["inverse_every"] > 1
    return drive(case, _start, _step, exponent=0.0 if diagonal else 1.0, stale=stale and not diagonal)


# ---- cases ----------------------------------------------------------------------------------------------------------


def _case(name: str, shape: tuple[int, ...], why: str, *, seed: int, steps: int = 5, catches: str = "", zero: Any = (),
          scale: float = 1.0, network: str = "", weight_decay: float = 0.0, **rest: Any) -> Case:  # fmt: skip
    """A trace; gradients are integers times ``scale``, zero at the updates ``zero`` (counted from 0)."""
    grads = integers(100 + seed, (steps, *shape)) * mp.mpf(scale)
    for t in zero:
        grads[t] = zeros(*shape)
    config = {**DEFAULTS, **{k: v for k, v in rest.items() if k in DEFAULTS}}
    return Case(
        method="MBF",
        constructor="MBF.authors_code" if network else "MBF",
        name=name,
        why=why,
        config={"network": network} if network else config,
        shape=shape,
        param=integers(seed, shape),
        grads=grads,
        catches=tuple(catches.split()),
        decay=weight_decay,
        **{"lr": 0.5} | {k: v for k, v in rest.items() if k not in DEFAULTS},
    )


CASES = [
    _case("per-output", (4, 3), "One (3, 3) matrix, the mean over the rows", seed=1,
          catches="average-ignored average-sum layout-per-input layout-contiguous layout-mixed "
          "statistic-of-momentum weight-missing weights-swapped corrected root damping-relative momentum-ema "
          "momentum-ignored momentum-of-preconditioned identity-start"),
    _case("per-input", (4, 3), "One (4, 4) matrix, the mean over the columns", seed=2, layout="per_input",
          catches="layout-per-output layout-contiguous average-sum"),
    _case("contiguous", (4, 3), "One (4, 4) matrix, the mean over runs of 4 entries of the row-major matrix", seed=3,
          layout="contiguous", catches="layout-per-output layout-per-input"),
    _case("per-output-blocks", (3, 4), "A matrix for each row", seed=4, average=False,
          catches="average-always layout-per-input layout-contiguous"),
    _case("per-input-blocks", (3, 4), "A matrix for each column", seed=5, average=False, layout="per_input",
          catches="average-always layout-per-output layout-contiguous"),
    _case("contiguous-blocks", (3, 4), "A matrix for each run of 3 entries", seed=6, average=False,
          layout="contiguous", catches="average-always layout-per-output layout-per-input"),
    _case("square", (3, 3), "O = J: contiguous is per_output", seed=7, layout="contiguous", tier="should",
          catches="layout-per-input"),
    _case("one-output", (1, 4), "One output averaged per input: g over mean of g^2 plus damping", seed=8,
          layout="per_input"),
    _case("one-input", (4, 1), "One input: no averaging to do per_input, scalars per_output", seed=9,
          average=False, catches="average-always"),
    _case("schedule", (3, 2), "T1 = 2, T2 = 5: inverses at 0, 2, 4, 5, 10, 15, that of 5 and 15 of an older F",
          seed=10, steps=17, statistics_every=2, inverse_every=5,
          catches="early-inverses-missing inverse-with-statistic counter-from-one"),
    _case("schedule-statistics", (3, 2), "T1 = 3, T2 = 2", seed=11, steps=9, statistics_every=3, inverse_every=2,
          catches="statistics-every-update"),
    _case("momentum-zero", (3, 2), "No momentum", seed=12, momentum=0.0, decay=0.5),
    _case("zero-gradients", (3, 2), "Zero gradients first and later", seed=13, zero=(0, 2)),
    _case("no-damping", (2, 3), "damping = 0: the pseudo-inverse of a statistic of rank two in three dimensions",
          seed=14, damping=0.0, steps=1, tier="should"),
    _case("weight-decay", (3, 2), "Decoupled weight decay, times the learning rate", seed=15, weight_decay=0.25,
          catches="decay-coupled decay-without-lr decay-after"),
    _case("conv", (2, 3, 2, 2), "A (4, 4) matrix for each pair of channels, its taps row-major",
          seed=16, kind="conv", steps=4,
          catches="conv-averaged conv-per-output"),
    _case("conv-wide", (2, 1, 1, 3), "Kernels that are not square", seed=17, kind="conv", catches="conv-averaged"),
    _case("conv-pointwise", (3, 2, 1, 1), "1 x 1 kernels: scalars",
          seed=18, kind="conv", tier="should", catches="conv-averaged"),
    _case("conv-schedule", (2, 2, 2, 1), "The schedule of a convolution",
          seed=19, kind="conv", steps=9, statistics_every=2,
          inverse_every=4, catches="early-inverses-missing"),
    _case("diagonal", (5,), "The Adam-like rule: v averages squares of the averaged gradient", seed=20, kind="diagonal",
          scale=2**-8,
          catches="square-of-gradient first-corrected second-uncorrected eps-inside "
          "eps-before-correction weights-first second-decay"),
    _case("diagonal-any-shape", (2, 3), "Any shape, entry by entry", seed=21, kind="diagonal", steps=3, tier="should"),
    _case("diagonal-zero-gradients", (4,), "Zero gradients first and later give zero", seed=22, kind="diagonal",
          zero=(0, 2)),
    _case("stack", (2, 3, 2), "Stacked layers do not see each other", seed=23, stack_ndim=1, tier="should"),
    _case("conv-stack", (2, 2, 1, 1, 2), "Stacked convolutions", seed=24, kind="conv", stack_ndim=1, tier="should"),
    _case("authors-code", (3, 4), "contiguous, averaged, T1 = 2, T2 = 25, their damping and decays", seed=25, steps=29,
          scale=2**-4, lr=2**-10, network="autoencoder", catches="early-inverses-missing layout-per-input"),
    _case("authors-code-cnn", (2, 2), "The same with T1 = 10, T2 = 100", seed=26, steps=103, scale=2**-3, lr=2**-10,
          network="cnn", tier="should", catches="early-inverses-missing"),
]  # fmt: skip


def _reject(argument: str, value: Any, why: str, shape: tuple[int, ...] = (4, 3), **changes: Any) -> Case:
    """A config with one field, or a parameter (a shape), that must be refused."""
    field = argument in DEFAULTS
    text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return Case(
        method="MBF",
        name="-".join(
            [
                "reject",
                *changes.values(),
                argument.replace("_", "-"),
                text.strip("-").replace(".", "-").replace("_", "-"),
            ]
        ),
        kind="reject",
        argument=argument,
        why=why,
        config={**DEFAULTS, **changes, **({argument: value} if field else {})},
        shape=shape if field else value,
    )


CASES += [
    _reject("kind", "dense", "The kinds are fc, conv and diagonal"),
    _reject("layout", "per_row", "An unknown layout"),
    _reject("damping", -0.5, "Damping is not negative"),
    _reject("decay", 1.0, "The statistic would never move"),
    _reject("momentum", 1.0, "A momentum is below 1"),
    _reject("statistics_every", 0, "At least one update between statistics"),
    _reject("inverse_every", 0, "At least one update between inverses"),
    _reject("param", (4,), "fc takes a matrix"),
    _reject("param", (2, 3, 2), "conv takes four axes", kind="conv"),
]
