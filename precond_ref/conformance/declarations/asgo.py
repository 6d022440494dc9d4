"""ASGO and DASGO, practical and theory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from precond_ref.conformance.declarations.base import DECAY, Case, integers, maker, with_zeros

DEPENDENT = np.array([[1, 0], [0, 1], [1, 1]])  # three rows out of two


def practical(case: Callable[..., Case], seed: int) -> list[Case]:
    """Return the cases of both practical methods."""
    return [
        case(
            "zero-first",
            "A zero gradient at the first step: the direction is zero, not 0/0.",
            "zero-nan",
            seed=seed,
            grads=with_zeros(seed, (3, 2), 0),
            change={"rms": 0.25},
        ),
        case(
            "zero-later",
            "Zero gradients in between still decay both averages.",
            "",
            seed=seed + 1,
            grads=with_zeros(seed + 1, (3, 2), 2, 3),
        ),
        case("decay", "Decoupled weight decay, before the step and times lr.", DECAY, seed=seed + 2, decay=0.25),
        case(
            "stack",
            "Two parameters at once, each rescaled by itself.",
            shape=(2, 3, 2),
            stack_ndim=1,
            seed=seed + 3,
            change={"rms": 0.25},
            tier="may",
        ),
    ]


case, reject = maker(
    "ASGO",
    {
        "beta1": 0.75,
        "beta2": 0.5,
        "eps": 0.25,
        "side": "smaller",
        "rms": None,
        "root": "eigh",
        "root_steps": 10,
        "every": 1,
        "heads": None,
    },
    (3, 2),
)
ASGO = [
    case("heads-every-2", "Blocks of rows with roots of updates 1, 3, 5.",
        "heads-ignored every-late every-ignored every-multiples", shape=(4, 2), seed=221,
        change={"heads": 2, "every": 2}),
    case("stack-2", "Two stack axes.", shape=(2, 1, 2, 3), stack_ndim=2, seed=222, tier="may"),
    case("left", "Fewer rows than columns: the statistic is G G^T.",
        "eps-outside exponent-quarter other-side always-right statistic-after statistic-of-momentum", shape=(2, 4),
        seed=200),
    case("right", "More rows than columns: the statistic is G^T G.",
        "eps-outside exponent-quarter other-side always-left weight-missing heavy-ball", seed=201),
    case("tie", "A square matrix is preconditioned on the right.", "tie-left", shape=(3, 3), seed=202),
    case("forced-left", "The larger side, on request.", "other-side", seed=203, change={"side": "left"}),
    case("forced-right", "The larger side, on request.", "other-side", shape=(2, 3), seed=204,
        change={"side": "right"}),
    case("rms", "The direction has the root mean square asked for.", "rms-ignored rms-max rms-frobenius", seed=205,
        change={"rms": 0.25}),
    case("no-bias-correction", "Averages that start at zero are used as they are.",
        "corrected momentum-corrected sum betas-swapped", seed=206, steps=3, change={"beta1": 0.5, "beta2": 0.875}),
    case("every-3", "Roots of updates 1, 4, 7; the averages see every update.",
        "every-late every-ignored every-multiples", seed=207, steps=8, change={"every": 3}),
    case("heads", "Two blocks of rows with a left statistic each.", "heads-ignored", shape=(4, 3), seed=208,
        change={"heads": 2}),
    case("polar", "beta1 = beta2 = eps = 0: the polar factor of the gradient.", "exponent-quarter", shape=(2, 3),
        seed=209, change={"beta1": 0.0, "beta2": 0.0, "eps": 0.0}, tier="should"),
    case("row", "One row: a scalar statistic on the left.", shape=(1, 4), seed=210),
    case("column", "One column: a scalar statistic on the right.", shape=(4, 1), seed=211),
    case("rank-two", "Gradients whose rows are dependent: epsilon carries the null space.", "eps-outside", shape=(3, 4),
        seed=212, grads=DEPENDENT @ integers(212, (5, 2, 4))),
    case("pseudo-inverse", "Dependent rows and no epsilon: the pseudo-inverse.", shape=(3, 4), seed=213,
        grads=DEPENDENT @ integers(213, (5, 2, 4)), change={"eps": 0.0}, tier="should"),
    *practical(case, 214),
    case("newton-schulz", "The Newton-Schulz root, converged; the truth is the exact root.", seed=218,
        change={"root": "newton_schulz", "root_steps": 24}, tier="may"),
    case("coupled-newton", "The coupled Newton root, converged; the truth is the exact root.", seed=219,
        change={"root": "coupled_newton", "root_steps": 24}, tier="may"),
    case("polar-express", "Polar Express, converged; the truth is the exact root without epsilon.", shape=(2, 4),
        seed=220, change={"root": "polar_express", "root_steps": 16}, tier="may"),
    reject("beta1", "A decay of 1 never leaves zero.", "beta1", beta1=1.0),
    reject("beta2", "A decay of 1 never leaves zero.", "beta2", beta2=1.0),
    reject("eps", "A negative epsilon.", "eps", eps=-0.25),
    reject("side", "An unknown side.", "side", side="both"),
    reject("rms", "A scale of zero.", "rms", rms=0.0),
    reject("every", "Roots every zero updates.", "every", every=0),
    reject("heads", "Heads that do not divide the rows.", "heads", heads=2),
    reject("heads-right", "Heads on the right.", "heads", heads=2, side="right", shape=(4, 3)),
    reject("vector", "A parameter with one axis.", "param", shape=(3,)),
    reject("order-3", "A parameter with three axes.", "param", shape=(3, 2, 2)),
]  # fmt: skip

case, reject = maker("ASGO", {"eps": 0.25, "side": "left"}, (2, 3), "ASGO.theory")
ASGO_THEORY = [
    case("theory-row", "One row on the left: a scalar statistic.", "other-side", shape=(1, 4), seed=237),
    case("theory-column", "One column on the left: full-matrix AdaGrad.", "other-side", shape=(3, 1), seed=238),
    case("theory", "A plain sum with the current gradient in it, epsilon outside the root, no momentum.",
        "eps-inside exponent-quarter average statistic-after other-side no-accumulation", seed=230),
    case("theory-tall", "Left whatever the shape.", "other-side smaller-side", shape=(3, 2), seed=231),
    case("theory-right", "All on the right, on request.", "other-side", shape=(3, 2), seed=232,
        change={"side": "right"}),
    case("theory-pseudo-inverse", "No epsilon and dependent rows: the pseudo-inverse.", shape=(3, 4), seed=233,
        grads=DEPENDENT @ integers(233, (5, 2, 4)), change={"eps": 0.0}, tier="should"),
    case("theory-zero-first", "A zero gradient at the first step.", seed=234, grads=with_zeros(234, (2, 3), 0)),
    case("theory-stack", "Two parameters at once.", shape=(2, 2, 3), stack_ndim=1, seed=235, tier="may"),
    case("theory-decay", "Decoupled weight decay, before the step and times lr.", DECAY, seed=236, decay=0.25),
    reject("theory-side", "The theory names its side.", "side", side="smaller"),
    reject("theory-eps", "A negative epsilon.", "eps", eps=-0.25),
]  # fmt: skip

case, reject = maker("DASGO", {"beta1": 0.75, "beta2": 0.5, "eps": 0.25, "rms": None}, (3, 2))
DASGO = [
    case("row", "One row: a scale for each entry.", "rows", shape=(1, 4), seed=248),
    case("column", "One column: one scale.", "rows elementwise", shape=(4, 1), seed=249),
    case("columns", "One scale per column, epsilon under the root.", "eps-outside rows mean elementwise", seed=240),
    case("wide", "Columns whatever the shape.", "rows", shape=(2, 4), seed=241),
    case("rms", "The direction has the root mean square asked for.", "rms-ignored rms-max", seed=242,
        change={"beta1": 0.5, "beta2": 0.875, "rms": 0.25}),
    case("no-eps", "No epsilon: 0/0 gives 0 in a column that is always zero.", shape=(2, 3), seed=243,
        grads=integers(243, (5, 2, 3)) * np.array([1, 0, 1]), change={"eps": 0.0}, tier="should"),
    *practical(case, 244),
    reject("beta2", "A decay of 1 never leaves zero.", "beta2", beta2=1.0),
    reject("eps", "A negative epsilon.", "eps", eps=-0.25),
    reject("vector", "A parameter with one axis.", "param", shape=(3,)),
]  # fmt: skip

case, reject = maker("DASGO", {"eps": 0.25}, (3, 2), "DASGO.theory")
DASGO_THEORY = [
    case("theory-zero-first", "A zero gradient at the first step.", seed=254, grads=with_zeros(254, (3, 2), 0)),
    case("theory-column", "One column: diagonal AdaGrad.", "columns", shape=(4, 1), seed=255),
    case("theory", "One scale per row, a plain sum, epsilon outside the root.", "eps-inside columns average mean",
        seed=250),
    case("theory-no-eps", "No epsilon: 0/0 gives 0 in a row that is always zero.", seed=251,
        grads=integers(251, (5, 3, 2)) * np.array([[1], [0], [1]]), change={"eps": 0.0}, tier="should"),
    case("theory-stack", "Two parameters at once.", shape=(2, 3, 2), stack_ndim=1, seed=252, tier="may"),
    case("theory-decay", "Decoupled weight decay, before the step and times lr.", DECAY, seed=253, decay=0.25),
    reject("theory-eps", "A negative epsilon.", "eps", eps=-0.25),
]  # fmt: skip

CASES = [*ASGO, *ASGO_THEORY, *DASGO, *DASGO_THEORY]
