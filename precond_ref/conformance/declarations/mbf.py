"""MBF."""

from __future__ import annotations

from typing import Any

from precond_ref.conformance.declarations.base import Case, integers

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
PRESETS = {
    "autoencoder": {"layout": "contiguous", "damping": 3e-4, "statistics_every": 2, "inverse_every": 25},
    "cnn": {"layout": "contiguous", "damping": 3e-3, "statistics_every": 10, "inverse_every": 100},
}
"""The authors' settings, by kind of network."""


def _case(name: str, shape: tuple[int, ...], why: str, *, seed: int, steps: int = 5, catches: str = "", zero: Any = (),
          scale: float = 1.0, network: str = "", weight_decay: float = 0.0, **rest: Any) -> Case:  # fmt: skip
    """A trace; gradients are integers times ``scale``, zero at the updates ``zero`` (counted from 0)."""
    grads = integers(100 + seed, (steps, *shape)) * scale
    for t in zero:
        grads[t] = 0
    config = {**DEFAULTS, **{k: v for k, v in rest.items() if k in DEFAULTS}}
    return Case(
        method="MBF",
        constructor="MBF.authors_code" if network else "MBF",
        name=name,
        why=why,
        config={"network": network} if network else config,
        fields={**DEFAULTS, "decay": 0.9, "momentum": 0.9, **PRESETS[network]} if network else {},
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
