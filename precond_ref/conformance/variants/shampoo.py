"""Shampoo and Muon, with their plausible mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from itertools import count
from typing import Any

import numpy as np

from precond_ref.conformance.arithmetic import norm, real, spacing, sqrt, svd
from precond_ref.conformance.variants import (
    EVERY,
    Variants,
    Walk,
    due,
    ema,
    multiply,
    note,
    outside,
    power,
    rivals,
    spread,
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
    "first-axis-only": "with the first axis preconditioned only",
    "last-axis-only": "with the last axis preconditioned only",
    "diagonal": "with the diagonals of the statistics only",
    "sum": "with plain sums as statistics, whatever beta2",
    "weight-missing": "with L_t = beta2 L_{t-1} + new, without the weight 1 - beta2",
    "correction-ignored": "without the bias correction",
    "correction-always": "with bias correction, asked for or not",
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
    for t in count(1):
        g, _ = yield out
        direction = g
        for i in range(order):
            matrix = unfold(direction if "statistic-of-preconditioned" in flags else g, i)
            old, grams[i] = grams[i], beta2 * grams[i] + weight * (matrix @ matrix.T)
            if i not in axes:
                continue
            if due(t, config["every"], flags):
                used = old if "statistic-after" in flags else grams[i]
                if corrected and "correction-ignored" not in flags:
                    used = used / (1 - beta2**t)
                if "diagonal" in flags:
                    used = used * np.eye(len(used))
                roots[i] = (outside if "eps-outside" in flags else power)(used, exponent, eps)
            direction = multiply(direction, roots[i], i)
        state = {f"grams.{i}": gram for i, gram in enumerate(grams)}
        if config["every"] > 1:
            state |= {f"roots.{i}": root for i, root in enumerate(roots)}
        out = direction, state


MUON_FLAGS = {
    "momentum-ignored": "without momentum",
    "nesterov-ignored": "without Nesterov's form",
    "nesterov-always": "with Nesterov's form, asked for or not",
    "nesterov-mixed": "with G + momentum M_t, M_t an average, as Nesterov's form (G not weighted by 1 - momentum)",
    "nesterov-corrected": "with M_t / (1 - momentum^(t+1)) and G / (1 - momentum^t) in Nesterov's form, as in optax",
    "rms-ignored": "without the factor rms sqrt(max(m, n))",
    "rms-jordan": "with the factor sqrt(max(1, m / n)) instead of rms sqrt(max(m, n))",
    "rms-exact": "with the root mean square scaled to rms exactly instead of the factor rms sqrt(max(m, n))",
    "rms-min": "with min(m, n) instead of max(m, n) in the factor",
    "exact": "with the exact polar factor instead of Newton-Schulz iterations",
    "newton-schulz": "with Newton-Schulz iterations instead of the exact polar factor",
    "one-step-fewer": "with one Newton-Schulz iteration fewer",
    "cubic": "with the cubic iteration 1.5 X - 0.5 X X^T X instead of Jordan's quintic",
    "spectral-start": "with Newton-Schulz started from X / ||X||_2 instead of X / ||X||_F",
    "momentum-of-orthogonal": "with momentum on the orthogonalised gradient instead of on the gradient",
}


def muon(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """Muon."""
    mu = 0.0 if "momentum-ignored" in flags else config["momentum"]
    nesterov = (config["nesterov"] or "nesterov-always" in flags) and "nesterov-ignored" not in flags
    iterate = (config["root"] == "newton_schulz" or "newton-schulz" in flags) and "exact" not in flags
    steps = config["root_steps"] - ("one-step-fewer" in flags)

    def live(s: np.ndarray) -> np.ndarray:
        return s > max(shape) * spacing(s) * s[0]

    def orthogonal(x: np.ndarray) -> np.ndarray:
        if not x.any():
            note(lambda: 1)
            return x
        note(lambda: spread((s := svd(x)[1])[live(s)]) ** 2)
        if not iterate:
            u, s, vt = svd(x)
            return (u * live(s)) @ vt
        x = x / norm(x, 2 if "spectral-start" in flags else "fro")
        a, b, c = (
            (1.5, -0.5, 0.0) if "cubic" in flags else (real(Fraction(k, 10000), x) for k in (34445, -47750, 20315))
        )
        for _ in range(steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x

    m, out = np.zeros(shape), None
    rms = None if "rms-ignored" in flags else config["rms"]
    for t in count(1):
        g, _ = yield out
        new = orthogonal(g) if "momentum-of-orthogonal" in flags else g
        m = ema(m, new, mu)
        n = m
        if nesterov and "nesterov-mixed" in flags:
            n = new + mu * m
        elif nesterov and "nesterov-corrected" in flags:
            n = ema(new / (1 - mu**t), m / (1 - mu ** (t + 1)), 1 - mu)
        elif nesterov:
            n = ema(new, m, 1 - mu)
        u = n if "momentum-of-orthogonal" in flags else orthogonal(n)
        if rms is not None and "rms-jordan" in flags:
            u = u * sqrt(real(Fraction(max(shape[0], shape[1]), shape[1]), u))
        elif rms is not None and "rms-exact" in flags:
            u = u * rms * sqrt(real(u.size, u)) / (norm(u) or 1.0)
        elif rms is not None:
            u = u * rms * sqrt(real(min(shape) if "rms-min" in flags else max(shape), u))
        out = u, {"m": m}


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
            *rivals({"statistic-of-preconditioned"}, {"first-axis-only", "last-axis-only"}),
            frozenset(EVERY),
        ),
    ),
    "Muon": Variants(
        muon,
        MUON_FLAGS,
        (
            frozenset({"momentum-ignored", "nesterov-ignored", "nesterov-mixed", "nesterov-corrected"}),
            *rivals({"momentum-ignored"}, {"nesterov-always", "momentum-of-orthogonal"}),
            frozenset({"nesterov-ignored", "nesterov-always"}),
            frozenset({"rms-ignored", "rms-jordan", "rms-exact", "rms-min"}),
            frozenset({"exact", "newton-schulz"}),
            frozenset({"exact", "one-step-fewer", "cubic"}),
            frozenset({"exact", "spectral-start"}),
        ),
    ),
}
