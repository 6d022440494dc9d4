"""MBF, with its plausible mistakes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import truediv
from typing import Any

import numpy as np

from precond_ref.conformance.arithmetic import real, sqrt
from precond_ref.conformance.variants import Variants, Walk, ema, note, power, times

LAYOUTS = {
    "layout-per-output": "with the mini-blocks of per_output, whatever the layout",
    "layout-per-input": "with the mini-blocks of per_input, whatever the layout",
    "layout-contiguous": "with the mini-blocks of contiguous, whatever the layout",
}
FLAGS = {
    **LAYOUTS,
    "layout-mixed": "with statistics of the columns applied to contiguous runs, as in the authors' one-to-all variant",
    "average-ignored": "with a matrix for each mini-block, though they are to be averaged",
    "average-always": "with the average of the mini-blocks' matrices, though each is to have its own",
    "average-sum": "with the sum over mini-blocks instead of their mean",
    "conv-averaged": "with the average of a convolution's matrices",
    "conv-per-output": "with one mini-block per output channel instead of one per pair of channels",
    "conv-per-input": "with one mini-block per input channel instead of one per pair of channels",
    "layer-block": "with the whole layer as one block",
    "weight-missing": "with F = decay F + g g^T, without the weight 1 - decay",
    "weights-swapped": "with decay the weight of the new term",
    "corrected": "with F divided by 1 - decay^k after k statistics",
    "identity-start": "with F started at the identity",
    "statistic-of-momentum": "with the statistic of M instead of the gradient",
    "root": "with (F + damping I)^{-1/2} instead of the inverse",
    "damping-ignored": "without damping (pseudo-inverse)",
    "damping-relative": "with damping in units of the mean of F's diagonal",
    "damping-outside": "with F^+ + damping I",
    "momentum-ignored": "without momentum",
    "momentum-ema": "with M = momentum M + (1 - momentum) g",
    "momentum-of-preconditioned": "with momentum on the preconditioned gradient",
    "nesterov": "with g + momentum M in the place of M",
    "early-inverses-missing": "with inverses at multiples of T2 only, none early on",
    "early-inverses-always": "with inverses with every statistic, also after update T2",
    "inverse-with-statistic": "with inverses only where a statistic is due too",
    "inverse-before-statistic": "with inverses of the F before the statistic of the same update",
    "statistics-every-update": "with a statistic at every update",
    "counter-from-one": "with updates counted from 1, so that statistics and inverses come one update early",
    "square-of-gradient": "with v the average of g^2 instead of n^2 (kind diagonal)",
    "first-corrected": "with n divided by 1 - 0.9^t (kind diagonal)",
    "second-uncorrected": "without the bias correction of v (kind diagonal)",
    "eps-inside": "with 1e-8 under the root (kind diagonal)",
    "eps-before-correction": "with 1e-8 added before the bias correction (kind diagonal)",
    "eps-ignored": "without 1e-8, 0/0 being NaN (kind diagonal)",
    "weights-first": "with n = 0.9 n + g, without the weight 0.1 (kind diagonal)",
    "second-decay": "with 0.99 in the place of 0.999 (kind diagonal)",
}


def _blocks(x: np.ndarray, layout: str) -> np.ndarray:
    """Return the mini-blocks as rows, (B, s)."""
    if layout == "per-pair":
        return x.reshape(x.shape[0] * x.shape[1], -1)
    if layout in ("per-output", "per_output"):
        return x.reshape(x.shape[0], -1)
    if layout in ("per-input", "per_input"):
        return x.swapaxes(0, 1).reshape(x.shape[1], -1)
    return x.reshape(1, -1) if layout == "layer" else x.reshape(x.shape[1], x.shape[0])


def _unblocked(blocks: np.ndarray, layout: str, shape: tuple[int, ...]) -> np.ndarray:
    if layout in ("per-input", "per_input"):
        return blocks.reshape(shape[1], shape[0], *shape[2:]).swapaxes(0, 1)
    return blocks.reshape(shape)


def _layout(config: Mapping[str, Any], flags: frozenset[str]) -> str:
    if "layer-block" in flags:
        return "layer"
    if config["kind"] == "conv":
        return "per-output" if "conv-per-output" in flags else "per-input" if "conv-per-input" in flags else "per-pair"
    if "layout-mixed" in flags:
        return "per-input"
    chosen = [flag.removeprefix("layout-") for flag in LAYOUTS if flag in flags]
    return chosen[0] if chosen else config["layout"]


def mbf(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """Mini-block Fisher for one layer."""
    return _diagonal(shape, flags) if config["kind"] == "diagonal" else _mini_blocks(config, shape, flags)


def _mini_blocks(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    layout, fc = _layout(config, flags), config["kind"] == "fc"
    view = "contiguous" if fc and "layout-mixed" in flags else layout
    average = fc and (config["average"] or "average-always" in flags) and "average-ignored" not in flags
    average = average or (not fc and "conv-averaged" in flags)
    t1, t2 = (1 if "statistics-every-update" in flags else config["statistics_every"]), config["inverse_every"]
    damping = 0.0 if "damping-ignored" in flags else config["damping"]
    rho = 1 - config["decay"] if "weights-swapped" in flags else config["decay"]
    mu = 0.0 if "momentum-ignored" in flags else config["momentum"]
    example = _blocks(np.zeros(shape), layout)
    count_f, s = 1 if average else len(example), example.shape[1]
    f = np.zeros((count_f, s, s)) + (np.eye(s) if "identity-start" in flags else 0.0)
    inverse = np.zeros(f.shape) + np.eye(s) / (damping or math.inf)
    m, buffer, statistics, out = np.zeros(shape), np.zeros(shape), 0, None
    for i in times(flags, 1 if "counter-from-one" in flags else 0):
        g, _ = yield out
        m = mu * m + (1 - mu if "momentum-ema" in flags else 1.0) * g
        old = f
        statistics_due = i % t1 == 0
        if statistics_due:
            statistics += 1
            rows = _blocks(m if "statistic-of-momentum" in flags else g, layout)
            new = rows[:, :, None] * rows[:, None, :]
            if average:
                new = (np.sum if "average-sum" in flags else np.mean)(new, axis=0, keepdims=True)
            f = rho * f + (1.0 if "weight-missing" in flags else 1 - rho) * new
        early = statistics_due and (i <= t2 or "early-inverses-always" in flags)
        due = ("early-inverses-missing" not in flags and early) or i % t2 == 0
        if "inverse-with-statistic" in flags:
            due = due and statistics_due
        if due:
            used = old if "inverse-before-statistic" in flags else f
            inverse = _inverse(used / (1 - rho**statistics if "corrected" in flags else 1.0), damping, flags)
        moved = g if "momentum-of-preconditioned" in flags else g + mu * m if "nesterov" in flags else m
        direction = _unblocked((inverse @ _blocks(moved, view)[:, :, None])[:, :, 0], view, shape)
        if "momentum-of-preconditioned" in flags:
            direction = buffer = mu * buffer + direction
        state = {"m": m} | _stored("statistic", f, config, shape, average)
        out = direction, state | (_stored("inverse", inverse, config, shape, average) if t2 > 1 else {})


def _inverse(f: np.ndarray, damping: float, flags: frozenset[str]) -> np.ndarray:
    result = []
    for block in f:
        ridge = damping * np.trace(block) / len(block) if "damping-relative" in flags else damping
        if "damping-outside" in flags:
            result.append(power(block, -1) + ridge * np.eye(len(block)))
        else:
            result.append(power(block, -0.5 if "root" in flags else -1, ridge))
    return np.stack(result)


def _stored(
    name: str, f: np.ndarray, config: Mapping[str, Any], shape: tuple[int, ...], average: bool
) -> dict[str, np.ndarray]:
    if config["kind"] == "conv" and len(f) == shape[0] * shape[1]:
        return {name: f.reshape(*shape[:2], *f.shape[1:])}
    return {name: f[0] if average else f}


def _diagonal(shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    n, v, out = np.zeros(shape), np.zeros(shape), None
    for t in times(flags):
        g, _ = yield out
        decay, decay2, eps = (real(c, g) for c in (0.9, 0.99 if "second-decay" in flags else 0.999, 1e-8))
        eps = 0 * eps if "eps-ignored" in flags else eps
        n = decay * n + g if "weights-first" in flags else ema(n, g, decay)
        new = g if "square-of-gradient" in flags else n
        v = ema(v, new * new, decay2)
        correction = 1.0 if "second-uncorrected" in flags else 1 - decay2**t
        note(truediv, 1, correction)
        first = n / (1 - decay**t) if "first-corrected" in flags else n
        if "eps-inside" in flags:
            denominator = sqrt(v / correction + eps)
        elif "eps-before-correction" in flags:
            denominator = (sqrt(v) + eps) / sqrt(correction)
        else:
            denominator = sqrt(v / correction) + eps
        out = first / denominator, {"m": n, "statistic": v}


_DIAGONAL = frozenset(f for f, text in FLAGS.items() if text.endswith("(kind diagonal)"))
VARIANTS = {
    "MBF": Variants(
        mbf,
        FLAGS,
        (
            frozenset({*LAYOUTS, "layout-mixed", "layer-block", "conv-per-output", "conv-per-input"}),
            frozenset({"average-ignored", "average-always", "conv-averaged"}),
            frozenset({"weight-missing", "weights-swapped"}),
            frozenset({"damping-ignored", "damping-relative"}),
            frozenset({"damping-outside", "root"}),
            frozenset({"momentum-ignored", "momentum-ema", "momentum-of-preconditioned"}),
            frozenset({"momentum-ignored", "nesterov"}),
            frozenset({"momentum-of-preconditioned", "nesterov"}),
            frozenset({"early-inverses-missing", "early-inverses-always"}),
            frozenset({"eps-inside", "eps-before-correction", "eps-ignored"}),
        ),
    )
}
