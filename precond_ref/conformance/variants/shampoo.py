"""Shampoo, with its plausible mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from precond_ref.conformance.variants import (
    EVERY,
    LATE,
    PRECONDITIONED,
    Variants,
    Walk,
    decayed,
    due,
    multiply,
    outside,
    power,
    rivals,
    stale,
    times,
    unfold,
)

SHAMPOO_FLAGS = {
    "eps-outside": "with eps outside the root, (L^p + eps I)^{-1} instead of (L + eps I)^{-p}",
    "eps-ignored": "without eps (pseudo-inverse)",
    "eps-at-start": "with eps I as the statistics' start instead of added under each root",
    "exponent-inverse-order": "with exponent -1/k for k axes instead of -1/(2k)",
    "exponent-quarter": "with exponent -1/4 for any number of axes",
    "exponent-half": "with exponent -1/2 for any number of axes",
    "exponent-without-ones": "with an exponent that does not count axes of size 1",
    "statistic-after": "with the statistics before this gradient",
    "statistic-of-preconditioned": "with each further axis' statistic taken from the already preconditioned gradient",
    "statistic-of-preconditioned-back": "with each earlier axis' statistic taken from the already preconditioned "
    "gradient, the last axis first",
    "first-axis-only": "with the first axis preconditioned only",
    "last-axis-only": "with the last axis preconditioned only",
    "diagonal": "with the diagonals of the statistics only",
    "sum": "with plain sums as statistics, whatever beta2",
    "weight-missing": "with L_t = beta2 L_{t-1} + new, without the weight 1 - beta2",
    "correction-ignored": "without the bias correction",
    "correction-always": "with bias correction, asked for or not",
    "started-whole": "with averages started at the first G G^T, not weighted by 1 - beta2",
    **LATE,
    **PRECONDITIONED,
    **EVERY,
}


def shampoo(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """Shampoo for tensors of any order."""
    beta2, order = config["beta2"], len(shape)
    if "sum" in flags:
        beta2 = 1.0
    weight = 1 - beta2 if beta2 < 1 and "weight-missing" not in flags else 1.0
    corrected = (config["bias_correction"] or "correction-always" in flags) and beta2 < 1
    counted = sum(d != 1 for d in shape) or 1
    exponent = Fraction(-1, 2 * (counted if "exponent-without-ones" in flags else order))
    for name, value in (("inverse-order", (-1, order)), ("quarter", (-1, 4)), ("half", (-1, 2))):
        if f"exponent-{name}" in flags:
            exponent = Fraction(*value)
    start = eps = 0.0 if "eps-ignored" in flags else config["eps"]
    if "eps-at-start" in flags:
        eps = 0.0
    else:
        start = 0.0
    axes = {*range(order)}
    if "first-axis-only" in flags:
        axes = {0}
    elif "last-axis-only" in flags:
        axes = {order - 1}
    grams = [start * np.eye(d) for d in shape]
    roots = [np.eye(d) for d in shape]
    out = None
    for t in times(flags):
        g, x = yield out
        direction, seen = decayed(config, flags, g, x), g
        in_turn = flags & {"statistic-of-preconditioned", "statistic-of-preconditioned-back"}
        for i in reversed(range(order)) if "statistic-of-preconditioned-back" in flags else range(order):
            matrix = unfold(seen if in_turn else g, i)
            first = t == 1 and "started-whole" in flags
            old, grams[i] = grams[i], beta2 * grams[i] + (1.0 if first else weight) * (matrix @ matrix.T)
            if i not in axes:
                continue
            if due(t, config["every"], flags):
                used = old if stale(t, flags) else grams[i]
                if corrected and "correction-ignored" not in flags:
                    used = used / (1 - beta2**t)
                if "diagonal" in flags:
                    used = used * np.eye(len(used))
                roots[i] = (outside if "eps-outside" in flags else power)(used, exponent, eps)
            direction = multiply(direction, roots[i], i)
            seen = multiply(seen, roots[i], i) if in_turn else seen
        state = {f"grams.{i}": gram for i, gram in enumerate(grams)}
        if config["every"] > 1:
            state |= {f"roots.{i}": root for i, root in enumerate(roots)}
        out = direction, state


VARIANTS = {
    "Shampoo": Variants(
        shampoo,
        SHAMPOO_FLAGS,
        (
            frozenset({"eps-outside", "eps-ignored", "eps-at-start"}),
            frozenset({"exponent-inverse-order", "exponent-quarter", "exponent-half", "exponent-without-ones"}),
            frozenset({"first-axis-only", "last-axis-only"}),
            frozenset({"sum", "weight-missing"}),
            frozenset({"sum", "correction-ignored", "correction-always"}),
            frozenset({"sum", "eps-at-start"}),
            *rivals(
                {"statistic-of-preconditioned", "statistic-of-preconditioned-back"},
                {"first-axis-only", "last-axis-only"},
            ),
            frozenset({"statistic-of-preconditioned", "statistic-of-preconditioned-back"}),
            frozenset({"statistic-after", "statistic-late"}),
            frozenset({"sum", "weight-missing", "started-whole"}),
            frozenset(EVERY),
        ),
    ),
}
