"""Adafactor."""

from __future__ import annotations

from typing import Any

import numpy as np

from precond_ref.conformance.declarations.base import Case, integers, maker, with_zeros

FIELDS: dict[str, Any] = {
    "eps1": 0.0625,
    "eps2": 0.25,
    "clip": 1.125,
    "decay_schedule": "power",
    "decay_rate": 0.875,
    "decay_offset": 0,
    "beta2_cap": 1.0,
    "beta1": 0.0,
    "momentum_of": "step",
    "parameter_scale": True,
    "factored_axes": "last",
    "min_size": 0,
    "eps_form": "square",
    "weight_decay": 0.0,
}
LR = {"lr": 0.34375, "version": 2}
FLOOR = {"eps_form": "floor"}
CLIP = "clip-ignored clip-inverted clip-of-step clip-by-norm"


def growing(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return five gradients, each about twice as large as the one before, so that the clip is active."""
    grads: np.ndarray = integers(seed, (5, *shape), 1, 3) * 2.0 ** np.arange(-2, 3).reshape(5, *(1,) * len(shape))
    return grads


_case, _reject = maker("Adafactor", FIELDS, (3, 2))


def case(*args: Any, **kwargs: Any) -> Case:
    """A trace."""
    return _case(*args, **LR, **kwargs)


def reject(*args: Any, **kwargs: Any) -> Case:
    """Return a config that must be refused."""
    return _reject(*args, version=2, **kwargs)


CASES = [
    case("matrix", "Two vectors instead of the average of the squares, clip and scale.",
        "mean-missing columns-summed unfactored statistic-after decay-constant decay-ahead "
        "clip-of-step clip-by-norm scale-ignored scale-by-norm scale-added eps-outside eps-ignored "
        "eps-in-rows form-exchanged no-root", seed=400),
    case("wide", "More columns than rows.", "mean-missing", shape=(2, 4), seed=401),
    case("clip", "Gradients that grow, so that every update is clipped.", CLIP, seed=438, grads=growing(438, (3, 2))),
    case("small", "An update below the clip stays as it is.", "clip-inverted", seed=402, scale=2.0**-3,
        change={"clip": 1.125}),
    case("unclipped", "No clip.", "", seed=403, change={"clip": None}),
    case("eps2", "A parameter smaller than eps2: that is the scale.", "scale-ignored scale-added", seed=404,
        change={"eps2": 16.0}),
    case("unscaled", "Steps that are not relative.", "scale-always", seed=405, change={"parameter_scale": False}),
    case("vector", "A vector is not factored.", "eps-ignored", shape=(4,), seed=406),
    case("scalar", "A parameter without axes.", shape=(), seed=407, tier="should"),
    case("no-factors", "Factors switched off.", "", seed=408, change={"factored_axes": None}),
    case("row", "One row: as the form without factors, but for epsilon.", shape=(1, 4), seed=409),
    case("column", "One column.", shape=(4, 1), seed=410),
    case("order-3", "The last two axes; each matrix has its own mean, the clip and the scale are of the whole.",
        "one-mean clip-per-matrix", shape=(2, 3, 2), seed=411),
    case("largest", "The two largest axes.", "axes-last one-mean", shape=(4, 2, 3), seed=412,
        change={"factored_axes": "largest", "min_size": 3}),
    case("largest-tie", "Of axes of equal sizes the later count as larger.", "axes-last", shape=(4, 3, 3), seed=441,
        change={"factored_axes": "largest"}),
    case("largest-too-small", "An axis below the least size: nothing is factored.", "axes-last", shape=(4, 2), seed=413,
        change={"factored_axes": "largest", "min_size": 3}),
    case("leading", "The first two axes of a kernel.", "axes-last", shape=(3, 4, 2), seed=414,
        change={"factored_axes": "leading", "min_size": 3}),
    case("leading-both", "The first two and the last two axes are large enough: the first two.", "axes-last",
        shape=(3, 2, 4), seed=433, change={"factored_axes": "leading", "min_size": 2}),
    case("leading-last", "The first two are too small, the last two are not.", "one-mean", shape=(2, 3, 4), seed=415,
        change={"factored_axes": "leading", "min_size": 3}),
    case("adam-decay", "The corrected average of Adam.", "decay-uncorrected decay-ahead", seed=416,
        change={"decay_schedule": "adam", "decay_rate": 0.8125, "clip": None}),
    case("slow-decay",
        "Small gradients after a large one: what the old average keeps is a small difference of two numbers.",
        "float32-decay", seed=429, grads=integers(429, (5, 3, 2)) * 2.0 ** np.array([1, -7, -7, -7, -7])[:, None, None],
        change={"decay_rate": 2.0**-10, "eps1": 2.0**-16, "clip": None}, tier="should"),
    case("offset", "Updates are counted from decay_offset.", "offset-ignored decay-ahead", seed=417,
        change={"decay_offset": 2}),
    case("cap", "The old average has at most this weight.", "cap-ignored", seed=418, change={"beta2_cap": 0.375}),
    case("momentum-of-step", "The step is averaged.",
        "heavy-ball momentum-ignored momentum-of-gradient momentum-of-other", seed=419, change={"beta1": 0.625}),
    case("momentum-of-update", "The update is averaged, and scaled after it.",
        "heavy-ball momentum-ignored momentum-of-gradient momentum-of-other", seed=420,
        change={"beta1": 0.625, "momentum_of": "update"}),
    _case("rates", "The step is averaged, at a learning rate that changes.", "rate-inside", seed=442, version=2,
        lr=(0.34375, 0.171875, 0.6875, 0.0859375, 0.34375), change={"beta1": 0.625}),
    case("weight-decay", "Decay times the parameter's scale, outside the average.",
        "kappa-ignored kappa-inside kappa-unscaled scale-after-decay", seed=421,
        change={"beta1": 0.625, "weight_decay": 0.1875}),
    case("floor", "torch's form: the mean is at least eps1, the estimate at least its square.",
        "form-exchanged floor-squared eps-ignored", seed=422, scale=2.0**-4, change=FLOOR),
    case("floor-vector", "The same without factors.", "form-exchanged", shape=(4,), seed=423, scale=2.0**-5,
        change=FLOOR),
    case("floor-dtype", "The floor is the spacing of the dtype.", seed=424, change={**FLOOR, "eps1": None}, tier="may"),
    case("floor-clip", "The clip of this form.", CLIP, seed=433, grads=growing(433, (3, 2)), change=FLOOR),
    case("floor-eps2", "The scale of this form.", "scale-added", seed=434, change={**FLOOR, "eps2": 16.0}),
    case("floor-order-3", "Three axes.", "one-mean", shape=(2, 3, 2), seed=435, change=FLOOR),
    case("floor-zero", "Zero gradients.", seed=436, grads=with_zeros(436, (3, 2), 0, 3), change=FLOOR),
    case("floor-scalar", "A parameter without axes.", shape=(), seed=437, tier="should", change=FLOOR),
    case("zero-first", "A zero gradient at the first step.", seed=425, grads=with_zeros(425, (3, 2), 0)),
    case("zero-later", "Zero gradients in between.", seed=426, grads=with_zeros(426, (3, 2), 2, 3)),
    case("zero-row", "No epsilon and a row without gradients: 0/0 is 0.", "zero-nan", seed=427,
        grads=integers(427, (5, 3, 2), 1, 3) * np.array([[1], [0], [-1]]), change={"eps1": 0.0}, tier="should"),
    case("stack", "Two parameters at once, each with its own clip and scale.", shape=(2, 3, 2), stack_ndim=1, seed=428,
        tier="may"),
    reject("eps1", "A negative epsilon.", "eps1", eps1=-0.25),
    reject("clip", "A clip of zero.", "clip", clip=0.0),
    reject("decay-rate", "An average that never sees a gradient.", "decay_rate", decay_schedule="adam", decay_rate=1.0),
    reject("beta1", "A decay of 1 never leaves zero.", "beta1", beta1=1.0),
    reject("factored-axes", "An unknown rule.", "factored_axes", factored_axes="smallest"),
    reject("weight-decay", "A negative decay.", "weight_decay", weight_decay=-0.25),
]  # fmt: skip
