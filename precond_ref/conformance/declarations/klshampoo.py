"""KL-Shampoo, KL-SOAP and their idealised form. A first gradient leaves the eigensolver no choice in any case."""

from __future__ import annotations

from typing import Any

import numpy as np

from precond_ref.conformance.declarations.base import DECAY, Case, integers, maker, with_zeros

FIELDS: dict[str, Any] = {
    "beta1": 0.75,
    "beta2": 0.875,
    "shampoo_beta": 0.625,
    "eps": 0.1875,
    "every": 2,
    "initial": 0.40625,
    "clamp": 4000,
    "damping": 0.0,
    "inner": "shampoo",
    "normalize": False,
    "start": "eigh",
}
EXACT: dict[str, Any] = {
    "beta1": 0.75,
    "beta2": 0.625,
    "eps": 0.1875,
    "every": 1,
    "initial": 0.875,
    "exponent": 0.5,
    "divide": True,
    "bias_correction": False,
}
SOAP = {"inner": "adam"}
IDENTITY = {"start": "identity"}
ONE = {"shampoo_beta": None, "beta1": 0.8125, "beta2": 0.9375, "eps": 0.15625}
GIVEN: dict[str, Any] = {"lr": 0.34375, "version": 2}
_case, _reject = maker("KLShampoo", FIELDS, (3, 2))
_exact, _exact_reject = maker("KLShampoo", EXACT, (3, 2), "KLShampoo.exact")


def case(*args: Any, **kwargs: Any) -> Case:
    """A trace of the authors' algorithm."""
    return _case(*args, **GIVEN, **{"steps": 6} | kwargs)


def exact(*args: Any, **kwargs: Any) -> Case:
    """A trace of the idealised form."""
    return _exact(*args, **GIVEN, **kwargs)


def reject(*args: Any, **kwargs: Any) -> Case:
    """Return a config that must be refused."""
    return _reject(*args, version=2, **kwargs)


CASES = [
    case("matrix", "The first update does not move; bases renewed at updates 1, 3, 5.",
        "share-missing-in-eigenvalues share-missing-in-statistics inverse-root other-factors-unused exponent-quarter "
        "eps-per-axis eps-ignored eigenvalues-of-statistics qr-of-statistic eigh-at-renewal second-axis-new "
        "initial-one momentum-in-basis momentum-corrected momentum-from-first first-moves start-identity "
        "decays-swapped every-ignored every-late", seed=500,
        grads=np.concatenate([[[[1, 2], [2, -1], [0, 3]]], integers(500, (5, 3, 2))])),
    case("wide", "More columns than rows.", "second-axis-new", shape=(2, 3), seed=501,
        grads=np.concatenate([[[[1, 2, 0], [2, -1, 3]]], integers(501, (5, 2, 3))])),
    case("every-3", "Bases renewed at updates 1, 4, 7.", "every-ignored every-late every-multiples", seed=502, steps=8,
        grads=np.concatenate([[[[1, 2], [2, -1], [0, 3]]], integers(502, (7, 3, 2))]), change={"every": 3}),
    case("zero-first", "A zero gradient at the first step: the bases are the identity's columns in the other order.",
        seed=503, grads=with_zeros(503, (3, 2), 0)),
    case("zero-later", "Zero gradients in between decay the averages.", seed=504, grads=with_zeros(504, (3, 3), 2, 3),
        shape=(3, 3), change={**IDENTITY, "every": 1}),
    case("identity", "Identity bases at first, so that four rows and one column do.", "start-eigh", shape=(4, 2),
        seed=505, change=IDENTITY),
    case("vector", "One axis: full-matrix RMSProp with tracked eigenvalues.", shape=(3,), seed=506, change=IDENTITY),
    case("scalar", "A parameter without axes has one factor, 1 x 1.", shape=(), seed=507, tier="should"),
    case("row", "Axes of size 1 have no factor.", shape=(1, 3), seed=508, change=IDENTITY),
    case("column", "The same for columns.", shape=(3, 1), seed=509, change=IDENTITY),
    case("order-3", "Three axes, all from the old factors.", "second-axis-new exponent-quarter other-factors-unused",
        shape=(2, 2, 2), seed=510, change=IDENTITY),
    case("order-3-turned", "Three axes in bases of eigenvectors, all from the old factors.",
        "third-axis-first own-factor-too second-axis-new exponent-quarter other-factors-unused", shape=(2, 2, 2),
        seed=531, grads=np.concatenate([[[[[1, 2], [0, -1]], [[3, 1], [1, 2]]]], integers(531, (5, 2, 2, 2))])),
    case("damping", "The other factors' inverses, averaged, are added to the squares.", "damping-ignored", seed=511,
        change={**IDENTITY, "damping": 0.0625}),
    case("clamp", "Small gradients: the eigenvalues reach their bound.", "clamp-ignored", shape=(3,), seed=512,
        scale=2.0**-5, change={**IDENTITY, "clamp": 11, "initial": 0.03125, "every": 1}),
    case("clamp-large", "A bound that follows the size of the axis.", "clamp-ignored", shape=(12,), seed=513,
        scale=2.0**-5, change={**IDENTITY, "clamp": 11, "initial": 0.03125, "every": 9}),
    case("unclamped", "The same without a bound.", shape=(3,), seed=512, scale=2.0**-5,
        change={**IDENTITY, "clamp": None, "initial": 0.03125, "every": 1}),
    case("normalize", "The direction has root mean square 1.", "normalize-ignored", seed=514,
        change={**IDENTITY, "normalize": True}),
    case("one-beta-eigh", "The same with bases of eigenvectors from the first update on.", seed=551, change=ONE),
    case("one-beta-decay", "The same with decoupled weight decay.", DECAY, seed=562, decay=0.28125, change=ONE),
    case("one-beta-order-3", "The same for three axes.", shape=(2, 2, 2), seed=553, change={**ONE, **IDENTITY}),
    case("one-beta-column", "The same for a column.", shape=(3, 1), seed=554, change={**ONE, **IDENTITY}),
    case("one-beta", "The statistics take the decay of V.", "initial-one", seed=515, change={**IDENTITY, **ONE}),
    case("soap", "KL-SOAP.",
        "square-of-gradient momentum-in-basis decays-swapped eps-ignored first-moves momentum-from-first", seed=516,
        grads=np.concatenate([[[[1, 2], [2, -1], [0, 3]]], integers(516, (5, 3, 2))]), change=SOAP),
    case("soap-identity", "KL-SOAP from identity bases.", "every-late square-of-gradient", shape=(2, 4), seed=517,
        change={**SOAP, **IDENTITY}),
    case("stack", "Two parameters at once.", shape=(2, 3, 2), stack_ndim=1, seed=518, change=IDENTITY, tier="may"),
    case("decay", "Decoupled weight decay, before the step and times lr.", f"{DECAY} decay-after-moving", seed=519,
        change=IDENTITY, decay=0.28125),
    reject("beta1", "A decay of 1 never leaves zero.", "beta1", beta1=1.0),
    reject("shampoo-beta", "The statistics would never move.", "shampoo_beta", shampoo_beta=1.0),
    reject("every", "Bases every zero updates.", "every", every=0),
    reject("inner", "An unknown form.", "inner", inner="lion"),
    reject("clamp", "A bound of zero.", "clamp", clamp=0),
    exact("exact-matrix", "Each statistic from the gradient whitened by the old root of the other axis.",
        "share-missing other-factors-unused other-factors-new own-factor-too exponent-shampoo eps-ignored "
        "initial-zero initial-one correction-always momentum-ignored heavy-ball statistic-of-average decays-swapped "
        "statistic-after", seed=520),
    exact("exact-wide", "More columns than rows.", "other-factors-new", shape=(2, 4), seed=521),
    exact("exact-order-3", "Three axes.", "share-missing other-factors-new", shape=(2, 3, 2), seed=522),
    exact("exact-row", "Axes of size 1 have no factor.", shape=(1, 4), seed=523),
    exact("exact-every-3", "Roots of updates 1, 4, 7; the statistics see every update.",
        "every-ignored every-late every-multiples", seed=524, steps=8, change={"every": 3}),
    exact("exact-corrected", "Both averages divided by 1 - beta^t.", "correction-ignored", seed=525,
        change={"bias_correction": True, "initial": 0.0}),
    exact("exact-undivided", "Statistics without d_n/D.", "share-always", seed=526, change={"divide": False}),
    exact("exact-meta", "Exponent 1/(2N), no division, bias corrections: Meta's default.",
        "exponent-half share-always correction-ignored", seed=527,
        change={"divide": False, "exponent": None, "bias_correction": True, "initial": 0.0}),
    exact("exact-exponent", "Another exponent.", seed=528,
        change={"exponent": 0.375, "beta1": 0.8125, "beta2": 0.9375, "eps": 0.15625}),
    exact("exact-zero-first", "A zero gradient at the first step.", seed=529, grads=with_zeros(529, (3, 2), 0)),
    exact("exact-decay", "Decoupled weight decay.", DECAY, seed=530, decay=0.28125),
    _exact_reject("exact-exponent", "An exponent of zero.", "exponent", exponent=0.0, version=2),
    _exact_reject("exact-beta2", "The statistics would never move.", "beta2", beta2=1.0, version=2),
]  # fmt: skip
