"""Adafactor, with its plausible mistakes and those of released codes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from precond_ref.conformance import arithmetic
from precond_ref.conformance.arithmetic import norm, number, real, spacing, sqrt
from precond_ref.conformance.variants import Variants, Walk, ema, note, quotient, rivals, times

FLAGS = {
    "mean-missing": "with V = R C^T, not divided by mean(R)",
    "columns-summed": "with sums of the squares instead of means in C",
    "one-mean": "with one mean of R over all matrices of a tensor",
    "axes-last": "with the last two axes factored, whatever their sizes",
    "unfactored": "with nothing factored",
    "statistic-after": "with V of the update before",
    "decay-constant": "with a constant weight 0.001 of the new square",
    "decay-ahead": "with the decay of update t + 1 at update t",
    "decay-uncorrected": "with the plain average of weight 1 - decay_rate for decay_schedule='adam'",
    "offset-ignored": "without decay_offset",
    "cap-ignored": "without beta2_cap",
    "float32-decay": "with the weight of the new square computed in float32",
    "clip-ignored": "without the clip",
    "clip-inverted": "with division by min(1, d RMS(U)) instead of max(1, RMS(U) / d)",
    "clip-of-step": "with the clip on s_t U instead of on U",
    "clip-per-matrix": "with the clip of each matrix of a tensor by itself",
    "clip-by-norm": "with the Frobenius norm instead of the root mean square in the clip",
    "scale-ignored": "without the parameter's scale",
    "scale-always": "with the parameter's scale, asked for or not",
    "scale-by-norm": "with the Frobenius norm instead of the root mean square in the scale",
    "scale-after-decay": "with the parameter's scale taken after weight decay",
    "scale-added": "with eps2 + RMS(X) as the scale instead of their maximum",
    "eps-outside": "with eps1 added to sqrt(V) instead of to the squares",
    "eps-adam": "with 1e-8 added to sqrt(V) instead of eps1 to the squares",
    "eps-ignored": "without eps1",
    "eps-in-rows": "with eps1 in R alone",
    "floor-squared": "with mean(R) at least eps1^2 instead of eps1 in the form 'floor'",
    "form-exchanged": "with the other form of eps1",
    "no-root": "with V instead of its square root",
    "heavy-ball": "with M = beta1 M + new, without the weight 1 - beta1",
    "momentum-ignored": "without the average of updates",
    "momentum-of-gradient": "with the gradient averaged instead of the update",
    "rate-inside": "with the learning rate inside the average of steps: older ones keep their old rates",
    "momentum-of-other": "with the update averaged where the step should be, and the other way round",
    "kappa-ignored": "without weight decay",
    "kappa-inside": "with weight decay inside the average",
    "kappa-unscaled": "with weight decay not times s_t",
    "zero-nan": "with 0/0 = NaN for a zero row at eps1 = 0",
}


def adafactor(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """Adafactor, one matrix of the tensor after another."""
    d, eps2, beta1 = config["clip"], config["eps2"], config["beta1"]
    floor = (config["eps_form"] == "floor") != ("form-exchanged" in flags)
    kappa = 0.0 if "kappa-ignored" in flags else config["weight_decay"]
    scaled = (config["parameter_scale"] or "scale-always" in flags) and "scale-ignored" not in flags
    of_update = (config["momentum_of"] == "update") != ("momentum-of-other" in flags)
    axes = None if "unfactored" in flags else _axes(config, shape, flags)
    row: Any = None
    col: Any = None
    v, m, out = np.zeros(shape), np.zeros(shape), None
    if axes is not None:
        row, col = np.zeros(_without(shape, axes[1])), np.zeros(_without(shape, axes[0]))
    entries = max(math.prod(shape), 1)
    divided = (lambda a, b: a / b) if "zero-nan" in flags else quotient
    for t in times(flags):
        g, x = yield out
        eps1 = 0.0 if "eps-ignored" in flags else spacing(g) if config["eps1"] is None else config["eps1"]
        w = _weight(config, t, flags)
        used = ema(m, g, beta1) if "momentum-of-gradient" in flags else g
        square = g * g
        inside = 0.0 if floor or flags & {"eps-outside", "eps-adam"} else eps1
        old = row, col, v
        if axes is None:
            v = (1 - w) * v + w * (square + inside)
        else:
            row = (1 - w) * row + w * (np.sum(square + inside, axis=axes[1], keepdims=True) / _size(shape, axes[1], g))
            inside = 0.0 if "eps-in-rows" in flags else inside
            columns = 1 if "columns-summed" in flags else _size(shape, axes[0], g)
            col = (1 - w) * col + w * (np.sum(square + inside, axis=axes[0], keepdims=True) / columns)
        r, c, estimate = old if "statistic-after" in flags else (row, col, v)
        if axes is not None:
            mean = np.sum(r, axis=axes[0], keepdims=True) / _size(shape, axes[0], g)
            if "one-mean" in flags:
                mean = np.sum(mean) / real(mean.size, g)
            if floor:
                mean = np.maximum(mean, eps1 * eps1 if "floor-squared" in flags else eps1)
            estimate = r * c if "mean-missing" in flags else divided(r, mean) * c
        if floor:
            estimate = np.maximum(estimate, eps1 * eps1)
        root = estimate if "no-root" in flags else sqrt(estimate)
        beside = eps1 if "eps-outside" in flags else real(1e-8, g) if "eps-adam" in flags else 0
        u = divided(used, root + beside)
        note(_shrunk, u, [(v, old[2])] if axes is None else [(row, old[0]), (col, old[1])])
        scale = real(1.0, g)
        if scaled:
            size = sqrt(np.sum(x * x) / (1 if "scale-by-norm" in flags else entries))
            scale = eps2 + size if "scale-added" in flags else np.maximum(eps2, size)
        shrinking = scale
        if scaled and "scale-after-decay" in flags:
            scale = np.maximum(eps2, size * (1 - config["rate"] * kappa * scale))
        u = u if d is None or "clip-ignored" in flags else _clipped(u, d, scale, axes, entries, flags)
        step = u if of_update else scale * u
        if "kappa-inside" in flags:
            step = step + kappa * (x if of_update else scale * x)
        if beta1 and "momentum-of-gradient" in flags:
            m = used
        elif beta1 and "momentum-ignored" not in flags:
            rate = config["rate"] if "rate-inside" in flags and not of_update else 1
            m = beta1 * m + rate * step if "heavy-ball" in flags else ema(m, rate * step, beta1)
            step = m / rate
        step = scale * step if of_update else step
        if "kappa-inside" not in flags:
            step = step + kappa * (x if "kappa-unscaled" in flags else shrinking * x)
        state = {"v": v} if axes is None else {"row": row, "col": col}
        out = step, state | ({"m": m} if beta1 else {}) | {"rms": sqrt(np.sum(divided(g, root) ** 2) / entries)}


def _shrunk(u: Any, averages: list[tuple[Any, Any]]) -> Any:
    """Return the square of the error of U for an error of u in the old average's weight, the difference 1 - w_t."""
    size = norm(u)
    errors = [norm(u * quotient(old, new)) / size for new, old in averages] if size else []
    return max([1, *errors]) ** 2


def _axes(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> tuple[int, int] | None:
    """Return the axes of the rows and of the columns."""
    rule, n = config["factored_axes"], len(shape)
    if n < 2 or rule is None:
        return None
    if "axes-last" in flags:
        return n - 2, n - 1
    trials = [(n - 2, n - 1)]
    if rule == "largest":
        trials = [max(itertools.combinations(range(n), 2), key=lambda p: sorted((shape[i], i) for i in p)[::-1])]
    elif rule == "leading" and n > 2:
        trials.insert(0, (0, 1))
    return next((p for p in trials if all(shape[i] >= config["min_size"] for i in p)), None)


def _weight(config: Mapping[str, Any], t: int, flags: frozenset[str]) -> Any:
    """Return w_t."""
    rate, offset = config["decay_rate"], 0 if "offset-ignored" in flags else config["decay_offset"]
    if "decay-constant" in flags:
        return 0.001
    t += "decay-ahead" in flags
    if config["decay_schedule"] == "adam":
        w = 1 - rate if "decay-uncorrected" in flags else (1 - rate) / (1 - rate**t)
    else:
        base = max(t - offset, 1)
        w = 1 / (number(base) ** rate if arithmetic.is_exact(rate) else float(base) ** rate)
    w = w if "cap-ignored" in flags else max(w, 1 - config["beta2_cap"])
    return float(np.float32(w)) if "float32-decay" in flags else w


def _clipped(u: Any, d: Any, scale: Any, axes: tuple[int, int] | None, entries: int, flags: frozenset[str]) -> Any:
    """Return U of (6)."""
    if "clip-per-matrix" in flags and axes is not None:
        count = real(u.shape[axes[0]] * u.shape[axes[1]], u)
        size = sqrt(np.sum(u * u, axis=axes, keepdims=True) / count)
    else:
        size = sqrt(np.sum(u * u) / (1 if "clip-by-norm" in flags else entries))
    if "clip-inverted" in flags:
        return u / np.minimum(1.0, size * d)
    return u / np.maximum(real(1.0, u), (size * scale if "clip-of-step" in flags else size) / d)


def _size(shape: tuple[int, ...], axis: int, like: Any) -> Any:
    return real(shape[axis], like)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], 1, *shape[axis + 1 :])


VARIANTS = {
    "Adafactor": Variants(
        adafactor,
        FLAGS,
        (
            frozenset({"clip-ignored", "clip-inverted", "clip-of-step", "clip-per-matrix"}),
            frozenset({"clip-ignored", "clip-inverted", "clip-by-norm", "clip-per-matrix"}),
            frozenset({"scale-ignored", "scale-always", "scale-by-norm", "scale-added", "scale-after-decay"}),
            *rivals({"scale-after-decay"}, {"kappa-ignored", "kappa-inside", "kappa-unscaled"}),
            frozenset({"scale-ignored", "clip-of-step"}),
            frozenset({"eps-outside", "eps-adam", "eps-ignored", "eps-in-rows", "form-exchanged"}),
            frozenset({"eps-ignored", "floor-squared"}),
            frozenset({"eps-in-rows", "unfactored"}),
            frozenset({"axes-last", "unfactored"}),
            frozenset({"decay-constant", "decay-ahead", "decay-uncorrected"}),
            frozenset({"decay-constant", "offset-ignored"}),
            frozenset({"decay-constant", "cap-ignored"}),
            frozenset({"decay-constant", "float32-decay"}),
            frozenset({"mean-missing", "one-mean", "unfactored"}),
            frozenset({"mean-missing", "floor-squared"}),
            frozenset({"heavy-ball", "momentum-ignored", "momentum-of-gradient"}),
            frozenset({"rate-inside", "momentum-ignored", "momentum-of-gradient"}),
            *rivals({"momentum-ignored", "momentum-of-gradient"}, {"kappa-inside", "momentum-of-other"}),
            frozenset({"kappa-ignored", "kappa-inside", "kappa-unscaled"}),
            *rivals({"unfactored"}, {"columns-summed", "clip-per-matrix"}),
            *rivals({"scale-ignored"}, {"kappa-unscaled", "momentum-of-other"}),
        ),
    )
}
