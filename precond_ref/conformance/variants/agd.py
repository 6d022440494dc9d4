"""AGD (`precond_ref.AGD`) and its plausible mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from operator import truediv
from typing import Any

import numpy as np

from precond_ref.conformance.arithmetic import sqrt
from precond_ref.conformance.variants import PRECONDITIONED, Variants, Walk, decayed, ema, note, quotient, times

FLAGS = {
    "square-of-gradient": "with b the average of squared gradients, as in Adam, not of squared differences",
    "gradient-difference": "with s_t = g_t - g_{t-1}, a difference of raw gradients",
    "difference-uncorrected": "with s_t = m_t - m_{t-1}, a difference without bias corrections",
    "difference-one-correction": "with s_t = (m_t - m_{t-1}) / (1 - beta1^t), both with the same bias correction",
    "first-difference-zero": "with s_1 = 0 instead of m_1 / (1 - beta1)",
    "first-difference-raw": "with s_1 = m_1 instead of m_1 / (1 - beta1)",
    "delta-added": "with sqrt(b) + delta instead of the larger of the two",
    "delta-inside": "with delta under the root, sqrt(max(b, delta))",
    "delta-under-root": "with the threshold under the root of the corrected b, sqrt(max(b / (1 - beta2^t), delta))",
    "delta-added-inside": "with delta added under the root, sqrt(b + delta)",
    "delta-uncorrected": "with the threshold delta instead of delta sqrt(1 - beta2^t)",
    "delta-ignored": "without the threshold delta",
    "no-correction-1": "without the bias correction 1 / (1 - beta1^t) of the step",
    "no-correction-2": "without the bias correction sqrt(1 - beta2^t)",
    "float32-correction": "with bias corrections computed in float32",
    "correction-ahead": "with bias corrections of update t + 1 at update t (the counter starts at 1)",
    "statistic-after": "with b_{t-1} in the denominator: the difference enters b after its use",
    "weight-missing": "with b_t = beta2 b_{t-1} + s_t^2, without the weight 1 - beta2",
    "heavy-ball": "with m_t = beta1 m_{t-1} + g_t, without the weight 1 - beta1",
    "nesterov": "with beta1 m_t + (1 - beta1) g_t in the place of m_t in the step",
    "momentum-none": "with the gradient in the place of m_t in the step",
    "betas-swapped": "with beta1 and beta2 interchanged",
    "no-root": "with b instead of its square root in the denominator",
    "amsgrad-ignored": "without the running maximum of amsgrad",
    "amsgrad-corrected": "with amsgrad's maximum taken over the bias-corrected b",
    "amsgrad-kept": "with amsgrad's maximum stored as b itself",
    "clip-ignored": "without the clip",
    "clip-after": "with the clip after the factor sqrt(1 - beta2^t) / (1 - beta1^t) instead of before it",
    "zero-nan": "with 0/0 = NaN for a zero gradient history at delta = 0",
    **PRECONDITIONED,
}


def agd(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """Algorithm 1."""
    beta1, beta2, delta, clip = config["beta1"], config["beta2"], config["delta"], config["clip"]
    amsgrad = config["amsgrad"] and "amsgrad-ignored" not in flags
    if "betas-swapped" in flags:
        beta1, beta2 = beta2, beta1
    if "delta-ignored" in flags:
        delta = 0.0
    if "clip-ignored" in flags:
        clip = None

    def narrow(x: Any) -> Any:
        return np.float32(x) if "float32-correction" in flags else x

    def correction(beta: float, t: int) -> float:
        return wide(narrow(1) - narrow(beta) ** narrow(t)) if t else 0.0

    def over(a: float, b: float) -> float:
        return wide(narrow(a) / narrow(b))

    def wide(x: Any) -> Any:
        return float(x) if isinstance(x, np.float32) else x

    m, b, b_max, g_old = (np.zeros(shape) for _ in range(4))
    out = None
    for t in times(flags):
        g, x = yield out
        k = t + ("correction-ahead" in flags)
        c1, c2, c1_old = correction(beta1, k), correction(beta2, k), correction(beta1, k - 1)
        note(truediv, 1, c2)
        m_old, b_old = m, b_max if amsgrad else b
        m = beta1 * m + g if "heavy-ball" in flags else ema(m, g, beta1)
        s = m * over(1.0, c1) - (m_old * over(1.0, c1_old) if c1_old else 0.0)
        if "gradient-difference" in flags:
            s = g - g_old
        elif "difference-uncorrected" in flags:
            s = m - m_old
        elif "difference-one-correction" in flags:
            s = (m - m_old) / c1
        elif "square-of-gradient" in flags:
            s = g
        if t == 1 and "first-difference-zero" in flags:
            s = 0 * m
        if t == 1 and "first-difference-raw" in flags:
            s = m
        g_old = g
        b = beta2 * b + s * s if "weight-missing" in flags else ema(b, s * s, beta2)
        corrected = amsgrad and "amsgrad-corrected" in flags
        b_max = np.maximum(b_max, b / c2 if corrected else b)
        if amsgrad and "amsgrad-kept" in flags:
            b = b_max
        square = b_max * (c2 if corrected else 1) if amsgrad else b
        if "statistic-after" in flags:
            square = b_old
        sqrt_c2 = 1.0 if "no-correction-2" in flags else wide(sqrt(narrow(c2)))
        root = square if "no-root" in flags else sqrt(square)
        floor = delta if "delta-uncorrected" in flags else wide(narrow(delta) * narrow(sqrt_c2))
        if "delta-added" in flags:
            denominator = root + floor
        elif "delta-inside" in flags:
            denominator = sqrt(np.maximum(square, floor))
        elif "delta-under-root" in flags:
            denominator = sqrt(np.maximum(square, delta * c2))
        elif "delta-added-inside" in flags:
            denominator = sqrt(square + floor)
        else:
            denominator = np.maximum(root, floor)
        m_step = g if "momentum-none" in flags else ema(g, m, 1 - beta1) if "nesterov" in flags else m
        m_step = decayed(config, flags, m_step, x)
        u = m_step / denominator if "zero-nan" in flags else quotient(m_step, denominator)
        factor = over(sqrt_c2, 1.0 if "no-correction-1" in flags else c1)
        if clip is None:
            direction = factor * u
        elif "clip-after" in flags:
            direction = np.clip(factor * u, -clip, clip)
        else:
            direction = factor * np.clip(u, -clip, clip)
        out = direction, {"m": m, "b": b} | ({"b_max": b_max} if config["amsgrad"] else {})


VARIANTS = {
    "AGD": Variants(
        agd,
        FLAGS,
        (
            frozenset({"square-of-gradient", "gradient-difference", "difference-uncorrected",
                       "difference-one-correction"}),
            frozenset({"first-difference-zero", "first-difference-raw"}),
            frozenset({"first-difference-zero", "delta-ignored"}),  # the first step is infinite
            frozenset({"delta-added", "delta-inside", "delta-ignored", "delta-under-root", "delta-added-inside"}),
            frozenset({"delta-inside", "delta-under-root", "delta-added-inside", "no-root"}),
            frozenset({"nesterov", "momentum-none"}),
            frozenset({"amsgrad-ignored", "amsgrad-corrected", "amsgrad-kept"}),
            frozenset({"clip-ignored", "clip-after"}),
        ),
    )
}  # fmt: skip
