"""Version 2: every method over many steps, shapes and magnitudes, and the options that version 1 leaves open.

A generator makes the inputs (`precond_ref.conformance.generated`). Hyperparameters of one configuration are all
different, none is 1/2, and none is 1 minus another, so that an exchange of two of them changes the results.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from precond_ref.conformance import generated
from precond_ref.conformance.beside import LONGEST  # a side that an implementation may decompose whole
from precond_ref.conformance.declarations import adafactor, klshampoo, muon, production, soap
from precond_ref.conformance.declarations.base import DECAY, Case
from precond_ref.conformance.declarations.sketchy import NARROW

LR, KAPPA = 11 / 32, 13 / 32
RATES = tuple(LR * factor for factor in (1, 1 / 2, 2, 1 / 4, 1, 1 / 8))
BETA1, BETA2, EPS, MOMENTUM = 25 / 32, 29 / 32, 5 / 32, 23 / 32
TINY, HUGE = 2.0**-27, 2.0**13
FEW, LONG = (1, 2, 3, 6, 11, 12, 13, 21, 30, 40), (1, 2, 3, 10, 30, 100, 101, 200, 300)
FOLD = 64

ROOT_FREE = {"beta2": 7 / 32, "damping": EPS, "momentum": MOMENTUM, "weight_decay": KAPPA, "batch_size": 3.0}
SKETCHED = {"size": 3, "beta2": BETA2, "eps": EPS, "relative_eps": False, "every": 1, "tail_decay": 26 / 32}
DEFAULTS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": MOMENTUM, "nesterov": False},
    "AdaGrad": {"eps": EPS, "initial": 37 / 32, "eps_form": "outside"},
    "RMSProp": {"beta2": BETA2, "eps": EPS, "momentum": MOMENTUM, "centered": False, "eps_form": "outside",
                "bias_correction": False, "initial": 0.0, "nesterov": False},
    "Adam": {"beta1": BETA1, "beta2": BETA2, "eps": EPS, "eps_root": 0.0, "eps_form": "corrected", "amsgrad": None,
             "nesterov": None, "momentum_decay": None, "rectify": False, "bias_correction": "both"},
    "AGD": {"beta1": BETA1, "beta2": BETA2, "delta": EPS, "amsgrad": False, "clip": None},
    "RFRMSProp": {**ROOT_FREE, "initial": 37 / 32, "narrow_state": False},
    "RFAdamW": {"beta1": BETA1, "beta2": BETA2, "damping": EPS, "batch_size": 3.0, "initial": 37 / 32,
                "bias_correction": True, "narrow_state": False},
    "ASGO": {"beta1": BETA1, "beta2": BETA2, "eps": EPS, "side": "smaller", "rms": None, "root": "eigh",
             "root_steps": 7, "every": 1, "heads": None},
    "ASGO.theory": {"eps": EPS, "side": "left"},
    "DASGO": {"beta1": BETA1, "beta2": BETA2, "eps": EPS, "rms": 15 / 32},
    "DASGO.theory": {"eps": EPS},
    "FullAdaGrad": {"eps": EPS},
    "Shampoo": {"beta2": BETA2, "eps": EPS, "every": 1, "bias_correction": True},
    "Muon": {"momentum": MOMENTUM, "nesterov": True, "rms": 15 / 32, "root": "svd", "root_steps": 4},
    "RFShampoo": {**ROOT_FREE, "every": 1},
    "IFShampoo": {**ROOT_FREE, "riemannian_momentum": 18 / 32, "every": 1, "structure": "dense", "clip": True,
                  "narrow_state": False},
    "MBF": {"kind": "fc", "layout": "per_output", "average": True, "damping": EPS, "decay": BETA1,
            "momentum": MOMENTUM, "statistics_every": 1, "inverse_every": 1},
    "SAdaGrad": {"size": 3, "beta2": BETA2, "delta": EPS, "solver": "svd"},
    "SShampoo": {**SKETCHED, "solver": "svd"},
    "SShampoo.practical": {
        **SKETCHED, "relative_eps": True, "graft": "rmsprop", "graft_beta2": 22 / 32, "graft_eps": 3 / 64, "start": 0,
        "momentum": MOMENTUM, "nesterov": True, "momentum_ema": False, "weight_decay": KAPPA,
        "decay_after_momentum": True, "merge": 1, "solver": "svd",
    },
    "AdaFD": {"size": 3, "delta": EPS},
    "FDSON": {"size": 3, "delta": EPS, "learning_rate": LR},
    "RFDSON": {"size": 3, "delta": EPS, "learning_rate": LR},
    "Shampoo.production": production.PRODUCTION,
    "EShampoo": production.CORRECTED,
    "SOAP": soap.FIELDS,
    "KLShampoo": {**klshampoo.FIELDS, "initial": 15 / 32},
    "KLShampoo.exact": klshampoo.EXACT,
    "Adafactor": adafactor.FIELDS,
    "NorMuon": muon.NORMUON,
    "AdaMuon": muon.ADAMUON,
}  # fmt: skip
NETWORK = {"kind": "fc", "layout": "contiguous", "average": True, "damping": 3e-3, "decay": 0.9, "momentum": 0.9,
           "statistics_every": 10, "inverse_every": 100}  # fmt: skip
"""The fields of `MBF.authors_code(network="cnn")`."""


STEEP: dict[str, Any] = {"shape": (2, 4), "axes": {0: [HUGE, 1], 1: [1, 1, 2**-13, TINY]}}
SIMPLE: dict[str, Any] = {"shape": (3, 2), "axes": {0: [HUGE, 1, TINY]}, "eps": 2.0**-10}
"""Of which no nonzero eigenvalue of a statistic is multiple."""


def _case(
    constructor: str,
    name: str,
    shape: tuple[int, ...],
    why: str,
    catches: str = "",
    *,
    steps: int = 5,
    bits: int = 20,
    exponents: tuple[int, int] = (0, 0),
    scale: float = 1.0,
    zero: Iterable[int] = (),
    axes: Mapping[int, Iterable[float]] | None = None,
    grads: Any = None,
    salt: int = 0,
    **rest: Any,
) -> Case:
    """A trace.

    Of 20 bits squares and sums of many are exact in float64: the truth is not to be told from the order of a sum.
    ``axes``: factors along the axes of the parameter, counted from 0; ``zero``: steps without a gradient, from 0;
    ``grads``: given instead of generated. Other arguments are fields of the configuration or of `Case`.
    """
    method, _, preset = constructor.partition(".")
    base = DEFAULTS.get(constructor, {"network": "cnn"})
    config = {**base, **{k: v for k, v in rest.items() if k in base}}
    name = f"{preset.replace('_', '-')}-{name}" if preset else name
    seed = zlib.crc32(f"{method}/{name}/{salt}".encode())
    given: dict[str, Any] = {"param": {"seed": seed + 2**32, "bits": 24}}
    made: dict[str, Any] = {"param": generated.tensor(shape, **given["param"])}
    if grads is None:
        factors = {str(axis + 1): list(values) for axis, values in (axes or {}).items()}
        zero = {*zero}
        if scale != 1 or zero:
            factors["0"] = [0.0 if t in zero else scale for t in range(steps)]
        given["grads"] = {"seed": seed, "bits": bits}
        given["grads"] |= {"exponents": list(exponents)} if exponents != (0, 0) else {}
        given["grads"] |= {"factors": factors} if factors else {}
        made["grads"] = generated.tensor((steps, *shape), **given["grads"])
    else:
        made["grads"] = np.array(grads, float)
    return Case(
        version=2,
        method=method,
        constructor=constructor,
        name=name,
        why=why,
        config=config,
        fields=NETWORK if preset == "authors_code" else {},
        shape=shape,
        catches=tuple(catches.split()),
        generated=given,
        **made,
        **{"lr": config.get("learning_rate", LR)} | {k: v for k, v in rest.items() if k not in base},
    )


def _common(constructor: str, shape: tuple[int, ...], many: tuple[int, ...], tiny: Any = None, huge: Any = None,
            much: float = 1.0, **changes: Any) -> list[Case]:  # fmt: skip
    """Return the cases of every method; ``tiny`` and ``huge`` are the configurations for gradients of such a size.

    ``much``: factor of the gradients of many entries; ``changes`` of the configuration of many steps.
    """
    decay: dict[str, Any] = {} if "weight_decay" in DEFAULTS[constructor] else {"decay": KAPPA}
    cases = [
        _case(constructor, "forty-steps", shape, "Forty steps", steps=40, checkpoints=FEW, **changes),
        _case(constructor, "three-hundred-steps", shape, "Three hundred steps", steps=300, checkpoints=LONG, deep=True,
              **changes),
        _case(constructor, "many-entries", many, "More than 4096 entries", steps=2, fold=FOLD, scale=much,
              deep=max(many) > LONGEST),
        _case(constructor, "all-bits", shape, "Gradients of 53 bits, for float64 alone", bits=53, steps=4),
        _case(constructor, "small-gradients", shape, "Gradients of 1e-8", scale=TINY, **(tiny or {})),
        _case(constructor, "large-gradients", shape, "Gradients of 1e4", scale=HUGE, **(huge or {})),
    ]  # fmt: skip
    if "learning_rate" not in DEFAULTS[constructor]:
        cases.append(_case(constructor, "changing-rate", shape, "A learning rate that changes at every step",
                           steps=len(RATES), lr=RATES, **decay))  # fmt: skip
    return cases


def _elementwise(constructor: str, tiny: Any = None, huge: Any = None, **changes: Any) -> list[Case]:
    """Return the cases of every method, and one with entries from 1e-8 to 1e4 in one gradient."""
    return [
        *_common(constructor, (3, 2), (41, 101), tiny, huge, **changes),
        _case(constructor, "mixed-entries", (3, 2, 1, 2), "Four axes; entries from 1e-8 to 1e4 beside each other",
              exponents=(-27, 13), **(tiny or {})),
    ]  # fmt: skip


def _matrix(constructor: str, many: tuple[int, ...], tiny: Any = None, huge: Any = None, ill: Any = None,
            small: tuple[int, int] = (4, 3), singular: Any = None, **changes: Any) -> list[Case]:  # fmt: skip
    """Return the cases of every method for matrices, two for long ones, and one that is close to singular.

    ``singular``: the configuration for forty rows, whose statistic on the left is singular.
    """
    folded: dict[str, Any] = {"fold": FOLD}
    steep: dict[str, Any] = {
        "why": "A condition number near 1e8, and entries from 1e-8 to 1e4",
        "steps": 4,
        "tier": "should",
    }
    return [
        *_common(constructor, small, many, tiny, huge, **changes),
        _case(constructor, "forty-by-five", (40, 5), "Forty rows, five columns", steps=3, **folded, **(singular or {})),
        _case(constructor, "sixteen-columns", (24, 16), "Sides above 8 and 16", steps=2, **folded, **(singular or {})),
        _case(constructor, "five-by-forty", (5, 40), "Five rows, forty columns", steps=3, **folded),
        _case(constructor, "ill-conditioned", **steep | STEEP | (ill or {})),
    ]  # fmt: skip


def _vector(constructor: str, tiny: Any, huge: Any, ill: Any = None, **changes: Any) -> list[Case]:
    """Return the cases of every method for vectors with a sketch."""
    return [
        *_common(constructor, (5,), (4100,), tiny, huge, 2.0**-6, **changes),
        _case(constructor, "forty-entries", (40,), "Forty entries", steps=8, size=5, fold=FOLD),
        _case(constructor, "ill-conditioned", (4,), "A condition number near 1e8", steps=4, tier="should", size=9,
              axes={0: [HUGE, 1, 1, 1]}, **(ill or {})),
        _case(constructor, "size-is-dimension", (4,), "size = d: the smallest eigenvalue is cut", steps=6, size=4),
        _case(constructor, "size-exceeds-dimension", (3,), "size > d: nothing is cut", steps=6, size=5),
    ]  # fmt: skip


def _long(constructor: str, steep: Mapping[str, Any], *, ranged: bool = False, **fields: Any) -> list[Case]:
    """Return two cases of long matrices, and ``steep``, which is close to singular.

    ``ranged``: all gradients have the five columns (or rows) of the first as a range. A basis is the eigensolver's
    choice outside of it, where nothing moves.
    """
    out = []
    for name, shape, why in (
        ("forty-by-five", (40, 5), "Forty rows, five columns"),
        ("five-by-forty", (5, 40), "Five rows, forty columns"),
    ):
        given: dict[str, Any] = {"steps": 3}
        if ranged:
            seed = zlib.crc32(f"{constructor}/{name}".encode())
            inner = generated.tensor((4, 5, 5), seed=seed, bits=12)
            span = generated.tensor((40, 5), seed=seed + 1, bits=8)
            given = {"grads": span @ inner if shape[0] == 40 else inner @ span.T}  # exact
            why += "; all gradients have the range of the first"
        out.append(_case(constructor, name, shape, why, fold=FOLD, **given, **fields))
    given = {"why": "A condition number near 1e8, and entries from 1e-8 to 1e4", "steps": 4, "tier": "should"}
    return [*out, _case(constructor, "ill-conditioned", **given | STEEP | dict(steep))]


def squared(name: str, *others: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return fields in the ratios 1, 3, ... that scale like the squares of gradients of `TINY` and of `HUGE`."""
    return linear(name, *others, power=2)


def linear(name: str, *others: str, power: int = 1) -> tuple[dict[str, float], dict[str, float]]:
    """Return fields in the ratios 1, 3, ... that scale like gradients of `TINY` and of `HUGE`."""
    sizes = {name: EPS} | {other: (2 * i + 1) / 64 for i, other in enumerate(others, 1)}
    small, large = ({field: size * scale**power for field, size in sizes.items()} for scale in (TINY, HUGE))
    return small, large


# Rank two, later also outside this plane: a kept root has no statistic of the later part.
OUTSIDE = np.array(
    [
        [[1, 2, 0], [2, 1, 0], [0, 0, 0]],
        [[1, 1, 3], [2, -1, 1], [3, 1, 2]],
        [[0, 3, 1], [1, 2, -1], [2, 1, 1]],
        [[3, 1, 0], [1, -2, 0], [0, 0, 0]],
        [[2, 0, 1], [1, 1, 3], [-1, 2, 1]],
    ]
)
BATCHES = {"batch_size": 3 * TINY**-2}, {"batch_size": 3 * HUGE**-2}
STALE = "kept from before under gradients outside of what it has seen"

CASES = [
    *_elementwise("SGD"),
    *_elementwise("AdaGrad", {"eps": EPS * TINY, "initial": 37 / 32 * TINY**2}, {"eps": EPS * HUGE}),
    *_elementwise("RMSProp", *linear("eps")),
    *_elementwise("Adam", *linear("eps")),
    *_elementwise("AGD", *linear("delta")),
    *_elementwise("RFRMSProp", *squared("damping", "initial")),
    *_elementwise("RFAdamW", *squared("damping", "initial")),
    *_matrix("ASGO", (2, 2100), *squared("eps"), {"eps": 2.0**-10}, every=3, rms=15 / 32),
    *_matrix("ASGO.theory", (2, 2100), *linear("eps"), {"eps": 2.0**-10}, singular={"eps": 27 / 32}),
    *_matrix("DASGO", (2, 2100), *squared("eps")),
    *_matrix("DASGO.theory", (2, 2100), *linear("eps")),
    *_matrix("Shampoo", (8, 8, 8, 9), *squared("eps"), {"eps": 27 / 32}, every=3),
    *_matrix("Muon", (2, 2100), small=(6, 2)),
    *_matrix("RFShampoo", (8, 8, 8, 9), *BATCHES, ill={"shape": (4,), "axes": {0: [HUGE, 1, 1, 1]}}),
    *_matrix("IFShampoo", (8, 8, 8, 9), *BATCHES, much=0.5,
             ill={"shape": (4,), "axes": {0: [HUGE, 1, 1, 1]}, "steps": 44, "checkpoints": (1, 2, 6, 12, 21, 30, 44)}),
    *_matrix("MBF", (2100, 2), *squared("damping"), {"axes": {1: [HUGE, 1, 1, TINY]}}),
    *_matrix("SShampoo", (2, 2100), *squared("eps"), {"size": 9, "eps": 27 / 32}),
    *_matrix("SShampoo.practical", (2, 2100), {"graft_eps": 3 / 64 * TINY**2}, {"graft_eps": 3 / 64 * HUGE**2},
             {"size": 9, "eps": 27 / 32, "relative_eps": False}),
    *_vector("SAdaGrad", *squared("delta"), {"delta": 27 / 32}),
    *_vector("AdaFD", *linear("delta"), {"delta": 27 / 32 / HUGE}),
    *_vector("FDSON", *squared("delta"), {"delta": 27 / 32}),
    *_vector("RFDSON", *squared("delta"), {"delta": 27 / 32}),
    *_common("Shampoo.production", (4, 3), (8, 8, 8, 9), *squared("eps")),
    *_common("EShampoo", (4, 3), (8, 8, 8, 9), squared("eps")[0], linear("eps")[1]),
    *_common("SOAP", (4, 3), (8, 8, 8, 9), *linear("eps")),
    *_common("KLShampoo", (4, 3), (8, 8, 8, 9), {**linear("initial", "eps")[0], "clamp": None},
             {**linear("initial", "eps")[1], "tier": "should"}),
    *_common("KLShampoo.exact", (4, 3), (8, 8, 8, 9), linear("initial", "eps")[0], squared("initial", "eps")[1]),
    *_elementwise("Adafactor", *squared("eps1"), parameter_scale=False),
    *_common("NorMuon", (6, 2), (2, 2100), *linear("eps"), root_steps=3),
    *_common("AdaMuon", (6, 2), (2, 2100), *linear("eps"), root_steps=3),
    *_common("FullAdaGrad", (3,), (5, 8), *linear("eps"))[:2],
    *_common("FullAdaGrad", (3, 2), (5, 8), *linear("eps"))[3:],
    _case("FullAdaGrad", "forty-entries", (5, 8), "A matrix of forty entries is one vector", "left-only diagonal",
          steps=2, fold=FOLD),
    _case("FullAdaGrad", "order-three", (2, 3, 2), "A tensor is one vector", "left-only", steps=3),
    _case("FullAdaGrad", "ill-conditioned", (4,), "A condition number near 1e8", steps=4, tier="should", eps=27 / 32,
          axes={0: [HUGE, 1, 1, 1]}),
    *_long("Shampoo.production", {"eps": 27 / 32}),
    *_long("KLShampoo.exact", {"eps": 2.0**-10}),
    *_long("SOAP", {**SIMPLE, "salt": 2}, ranged=True),
    *_long("EShampoo", {**SIMPLE, "salt": 1}, ranged=True),
    *_long("KLShampoo", {"shape": (3, 2), "axes": None, "exponents": (-27, 13), "eps": 2.0**-10, "salt": 10},
           ranged=True),
    *_long("NorMuon", {"root": "svd", "salt": 2}, root_steps=3),
    *_long("AdaMuon", {"why": "A condition number near 1e8", "axes": {0: [HUGE, 1]}, "root": "svd", "sign": False},
           root_steps=3),
    _case("AdaMuon", "mixed-entries", (3, 4), "The signs of entries from 1e-8 to 1e4", steps=4, exponents=(-27, 13),
          root="svd"),
    # ASGO and DASGO
    _case("ASGO", "three-heads", (6, 4), "Three heads of two rows", "heads-ignored", heads=3),
    _case("ASGO", "two-heads", (6, 4), "Two heads of three rows", "heads-ignored", heads=2, every=2),
    _case("ASGO", "heads-rms", (6, 4), "The root mean square is that of all heads together", "rms-per-head", heads=3,
          rms=15 / 32),
    _case("ASGO", "forty-by-five-left", (40, 5), "Forty rows, with their statistic", "other-side", side="left", steps=3,
          fold=FOLD),
    _case("ASGO", "outside-left", (4, 2), f"A root {STALE}", side="left", every=3, steps=7),
    _case("ASGO", "outside-pseudo-inverse", (3, 3), f"A root {STALE}, without eps", eps=0.0, every=3, grads=OUTSIDE,
          tier="should"),
    _case("ASGO", "row-rms", (1, 4), "One row under rms", rms=15 / 32),
    _case("ASGO", "column-rms", (4, 1), "One column under rms", "rms-max rms-frobenius", rms=15 / 32),
    _case("ASGO", "single-entry-rms", (1, 1), "One entry under rms: its sign", rms=15 / 32),
    _case("ASGO", "polar-express-ten", (3, 4), "Polar Express as the authors run it, ten iterations", "",
          root="polar_express", root_steps=10, rms=15 / 32),
    _case("ASGO", "decay-rms", (3, 2), "Decoupled weight decay is not rescaled", DECAY, rms=15 / 32, decay=KAPPA),
    _case("DASGO", "row-rms", (1, 4), "One row under rms", rms=15 / 32),
    _case("DASGO", "column-rms", (4, 1), "One column under rms", "rms-max rms-frobenius", rms=15 / 32),
    _case("DASGO", "single-entry-rms", (1, 1), "One entry under rms: its sign", rms=15 / 32),
    # Shampoo and Muon
    _case("Shampoo", "order-four", (2, 3, 2, 2), "Four axes: exponent -1/8 for each", "exponent-quarter "
          "exponent-inverse-order last-axis-only", steps=3),
    _case("Shampoo", "outside-pseudo-inverse", (3, 3), f"A root {STALE}, without eps", eps=0.0, every=3, grads=OUTSIDE,
          tier="should"),
    _case("Shampoo", "sum-every-2", (3, 2), "A sum with roots of updates 1, 3, 5", "every-late every-multiples",
          beta2=1.0, bias_correction=False, every=2),
    _case("Muon", "row-rms", (1, 4), "One row under rms", "rms-min rms-jordan rms-rows"),
    _case("Muon", "column-rms", (4, 1), "One column under rms", "rms-min rms-columns"),
    _case("Muon", "single-entry-rms", (1, 1), "One entry under rms: its sign"),
    _case("Muon", "quintic-four", (4, 3), "Jordan's quintic four times", "exact one-step-fewer", root="newton_schulz"),
    # root-free and inverse-free
    *(_case(name, "many-entries-matrix", (66, 65), "A matrix of more than 4096 entries", steps=1, fold=FOLD, scale=0.5)
      for name in ("Shampoo", "RFShampoo", "IFShampoo")),
    _case("RFAdamW", "no-averaging", (3, 2), "beta1 = beta2 = 0 under bias correction: g / (B g^2 + damping)",
          "batch-ignored", beta1=0.0, beta2=0.0),
    _case("RFAdamW", "no-momentum", (3, 2), "beta1 = 0 under bias correction", "correction-2-ignored", beta1=0.0),
    _case("RFAdamW", "uncorrected", (3, 2), "No bias correction", "corrected-1 corrected-2", bias_correction=False),
    _case("RFAdamW", "small-uncorrected", (3, 2), "Gradients of 1e-8, no bias correction", "batch-ignored", scale=TINY,
          bias_correction=False, **squared("damping", "initial")[0]),
    _case("KLShampoo", "clamp-turned", (3, 2), "Small gradients: the eigenvalues reach their bound", "clamp-ignored",
          initial=2.0**-6, eps=2.0**-9, scale=2.0**-11),
    _case("SOAP", "zero-between", (3, 2), "A zero gradient between renewals makes older gradients weigh less",
          steps=8, zero=(3,), every=3),
    _case("RFAdamW", "decay-uncorrected", (3, 2), "Decoupled weight decay of a matrix, no bias correction", DECAY,
          decay=KAPPA, bias_correction=False),
    _case("Adafactor", "decay", (3, 2), "Weight decay times the scale of the parameter", "kappa-ignored kappa-unscaled",
          weight_decay=KAPPA),
    _case("RFAdamW", "much-damping", (3, 2), "A damping above and below the squares", "damping-ignored damping-inside",
          bias_correction=False, initial=0.0, damping=27 / 32),
    _case("RFShampoo", "every-3", (3, 2), "Factors renewed at updates 1, 4, 7 under momentum",
          "every-ignored every-late every-multiples", every=3, steps=8),
    _case("RFShampoo", "order-four", (2, 3, 2, 2), "Four axes, four factors", steps=3, salt=1),
    _case("IFShampoo", "every-3", (3, 2), "Factors renewed at updates 1, 4, 7 under both momenta",
          "every-ignored every-late every-multiples", every=3, steps=8),
    _case("IFShampoo", "momenta", (3, 2), "Two momenta that differ", "names-swapped riemannian-ignored "
          "momentum-ignored heavy-ball-riemannian", steps=6),
    # MBF
    _case("MBF", "stale-inverse", (3, 4), "T1 = 1, T2 = 3: inverses at 0, 1, 2, 3, 6, 9",
          "early-inverses-missing early-inverses-always", inverse_every=3, steps=10),
    _case("MBF", "stale-no-damping", (2, 12), f"An inverse {STALE}, without damping", damping=0.0,
          inverse_every=3, steps=7, tier="should"),
    _case("MBF", "per-input-schedule", (4, 3), "T1 = 2, T2 = 3 by columns", layout="per_input", average=False,
          statistics_every=2, inverse_every=3, steps=10),
    _case("MBF", "conv-layout", (2, 3, 2, 2), "A convolution has the blocks of its taps, whatever layout",
          "conv-averaged conv-per-output", kind="conv", layout="contiguous", steps=4),
    _case("MBF", "diagonal-forty-steps", (3, 2), "Forty steps of the Adam-like rule", kind="diagonal", steps=40,
          checkpoints=FEW),
    _case("MBF", "diagonal-many-entries", (41, 101), "More than 4096 entries", kind="diagonal", steps=2, fold=FOLD),
    _case("MBF", "diagonal-mixed-entries", (3, 4), "Entries from 1e-8 to 1e4 beside each other", kind="diagonal",
          exponents=(-27, 13)),
    _case("MBF.authors_code", "three-hundred-steps", (3, 2), "The schedule T1 = 10, T2 = 100 over three hundred steps",
          steps=300, checkpoints=LONG, deep=True, lr=2.0**-10, scale=2.0**-3),
    # sketches
    _case("AdaFD", "decay", (4,), "Decoupled weight decay", DECAY, decay=KAPPA, steps=4),
    _case("FDSON", "no-delta", (4,), "delta = 0: zero on the complement of the sketch", delta=0.0, steps=6,
          tier="should"),
    _case("SShampoo", "size-is-dimension", (4, 3), "size = d on one axis, above on the other; the tail's own decay",
          "tail-decay-ignored", size=4),
    _case("SShampoo", "size-exceeds-dimension", (3, 2), "Nothing is cut, whatever the tail's decay", size=5),
    _case("SShampoo", "no-eps-every", (4, 3), "A stale sketch without eps", "every-ignored", eps=0.0, every=2, size=2,
          tier="should"),
    _case("SShampoo.practical", "no-eps", (4, 3), "eps = 0", eps=0.0, size=2, tier="should"),
    _case("SShampoo.practical", "outside-no-eps", (4, 3),
          "A gradient outside a stale sketch that has lost nothing: eps = 0", "identity-outside",
          eps=0.0, size=6, every=2, graft="sgd", grads=NARROW, tier="should"),
    _case("SShampoo.practical", "ema-nesterov", (4, 3), "The update enters the momentum times 1 - momentum",
          "ema-ignored ema-inside", momentum_ema=True),
    _case("SShampoo.practical", "ema-heavy-ball", (4, 3), "The same without Nesterov", "nesterov-always",
          momentum_ema=True, nesterov=False),
    _case("SShampoo.practical", "start-rmsprop", (4, 3), "RMSProp alone for two updates; the sketches see them",
          "start-late start-early start-ignored graft-sgd", start=2),
    _case("SShampoo.practical", "every-3", (4, 3), "Stale sketches under the graft", "every-ignored every-late",
          every=3, steps=7),
]  # fmt: skip
