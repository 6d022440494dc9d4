"""SGD, AdaGrad, RMSProp, Adam, and full-matrix AdaGrad, with their plausible mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from operator import truediv
from typing import Any

import numpy as np

from precond_ref.conformance.arithmetic import sqrt
from precond_ref.conformance.variants import Variants, Walk, ema, note, outside, power, quotient, rivals

SGD_FLAGS = {
    "momentum-ema": "with an average, momentum b + (1 - momentum) g, instead of the heavy ball",
    "momentum-ema-first": "with an average instead of the heavy ball after a first buffer equal to the gradient",
    "momentum-ignored": "without momentum",
    "nesterov-ignored": "without Nesterov's form",
    "nesterov-always": "with Nesterov's form, asked for or not",
}


def sgd(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """Heavy ball, or Nesterov's form of it."""
    mu = 0.0 if "momentum-ignored" in flags else config["momentum"]
    nesterov = (config["nesterov"] or "nesterov-always" in flags) and "nesterov-ignored" not in flags
    buffer, out = np.zeros(shape), None
    for t in count(1):
        g, _ = yield out
        weight = 1.0
        if "momentum-ema" in flags or ("momentum-ema-first" in flags and t > 1):
            weight = 1 - mu
        buffer = mu * buffer + weight * g
        direction = g + mu * buffer if nesterov else buffer
        out = direction, {"buffer": buffer} if config["momentum"] else {}


ADAGRAD_FLAGS = {
    "eps-inside": "with eps under the root",
    "eps-ignored": "without eps",
    "initial-ignored": "with the sum of squares started at 0 instead of at initial",
    "initial-squared": "with the sum of squares started at initial^2",
    "statistic-after": "with the sum before this gradient in the denominator",
    "no-root": "with the sum instead of its square root in the denominator",
    "mean": "with the mean of the squared gradients instead of their sum",
    "zero-nan": "with 0/0 = NaN for a zero gradient history at eps = 0",
}


def adagrad(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """Diagonal AdaGrad."""
    eps = 0.0 if "eps-ignored" in flags else config["eps"]
    initial = config["initial"] ** (2 if "initial-squared" in flags else 1)
    total = np.zeros(shape) + (0.0 if "initial-ignored" in flags else initial)
    out = None
    for t in count(1):
        g, _ = yield out
        old, total = total, total + g * g
        square = old if "statistic-after" in flags else total
        denominator = _denominator(square / (t if "mean" in flags else 1), eps, flags)
        out = _divided(g, denominator, flags), {"total": total}


RMSPROP_FLAGS = {
    "eps-inside": "with eps under the root",
    "eps-ignored": "without eps",
    "statistic-after": "with the average before this gradient in the denominator",
    "no-root": "with the average instead of its square root in the denominator",
    "weight-missing": "with v_t = beta2 v_{t-1} + g^2, without the weight 1 - beta2",
    "weights-swapped": "with beta2 the weight of the new term",
    "corrected": "with the average divided by 1 - beta2^t",
    "centered": "with the square of the averaged gradient subtracted from the average of squares",
    "momentum-ignored": "without momentum",
    "momentum-on-gradient": "with momentum on the gradient, before the division",
    "momentum-ema": "with an average, momentum b + (1 - momentum) u, instead of the heavy ball",
    "zero-nan": "with 0/0 = NaN for a zero gradient history at eps = 0",
}


def rmsprop(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """RMSProp with momentum on the preconditioned gradient."""
    eps = 0.0 if "eps-ignored" in flags else config["eps"]
    beta2, mu = config["beta2"], 0.0 if "momentum-ignored" in flags else config["momentum"]
    if "weights-swapped" in flags:
        beta2 = 1 - beta2
    v, mean, buffer, out = np.zeros(shape), np.zeros(shape), np.zeros(shape), None
    weight = 1 - mu if "momentum-ema" in flags else 1.0
    for t in count(1):
        g, _ = yield out
        old, v = v, beta2 * v + g * g if "weight-missing" in flags else ema(v, g * g, beta2)
        mean = ema(mean, g, beta2)
        square = old if "statistic-after" in flags else v
        if "corrected" in flags:
            square = square / (1 - beta2**t)
        if "centered" in flags:
            square = np.maximum(square - mean * mean, 0)
        denominator = _denominator(square, eps, flags)
        if "momentum-on-gradient" in flags:
            buffer = mu * buffer + weight * g
            direction = _divided(buffer, denominator, flags)
        else:
            buffer = mu * buffer + weight * _divided(g, denominator, flags)
            direction = buffer
        out = direction, {"v": v} | ({"buffer": buffer} if config["momentum"] else {})


ADAM_FLAGS = {
    "eps-inside": "with eps under the root",
    "eps-before-correction": "with eps added before the bias correction, sqrt(v) + eps (the paper's epsilon hat)",
    "eps-ignored": "without eps",
    "no-correction-1": "without the bias correction of m",
    "no-correction-2": "without the bias correction of v",
    "float32-correction": "with bias corrections computed in float32",
    "correction-ahead": "with bias corrections of update t + 1 at update t (the counter starts at 1)",
    "statistic-after": "with v_{t-1} in the denominator: the gradient enters v after its use",
    "weight-missing": "with v_t = beta2 v_{t-1} + g^2, without the weight 1 - beta2",
    "heavy-ball": "with m_t = beta1 m_{t-1} + g, without the weight 1 - beta1",
    "nesterov": "with beta1 m_t + (1 - beta1) g_t in the place of m_t",
    "betas-swapped": "with beta1 and beta2 interchanged",
    "square-of-average": "with v the average of m_t^2 instead of g_t^2",
    "square-of-residual": "with v the average of (g_t - m_t)^2, as in AdaBelief",
    "amsgrad": "with the running maximum of v, as in AMSGrad",
    "no-root": "with v instead of its square root in the denominator",
    "zero-nan": "with 0/0 = NaN for a zero gradient history at eps = 0",
}


def adam(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """Adam's Algorithm 1."""
    beta1, beta2, eps = config["beta1"], config["beta2"], config["eps"]
    if "betas-swapped" in flags:
        beta1, beta2 = beta2, beta1
    if "eps-ignored" in flags:
        eps = 0.0
    m, v, v_max, out = np.zeros(shape), np.zeros(shape), np.zeros(shape), None
    for t in count(1):
        g, _ = yield out
        k = t + ("correction-ahead" in flags)
        c1, c2 = 1 - beta1**k, 1 - beta2**k
        note(truediv, 1, c2)
        if "float32-correction" in flags:
            c1, c2 = (float(np.float32(1) - np.float32(beta) ** np.float32(k)) for beta in (beta1, beta2))
        m = beta1 * m + g if "heavy-ball" in flags else ema(m, g, beta1)
        new = m if "square-of-average" in flags else g - m if "square-of-residual" in flags else g
        old, v = v, beta2 * v + new * new if "weight-missing" in flags else ema(v, new * new, beta2)
        square = old if "statistic-after" in flags else v
        v_max = np.maximum(v_max, square)
        if "amsgrad" in flags:
            square = v_max
        if "no-correction-2" in flags:
            c2 = 1.0
        if "eps-before-correction" in flags:
            denominator = _denominator(square, eps, flags) / sqrt(c2)
        else:
            denominator = _denominator(square / c2, eps, flags)
        m_step = ema(g, m, 1 - beta1) if "nesterov" in flags else m
        m_step = m_step / (1.0 if "no-correction-1" in flags else c1)
        out = _divided(m_step, denominator, flags), {"m": m, "v": v}


FULL_FLAGS = {
    "eps-inside": "with eps under the root",
    "eps-ignored": "without eps",
    "exponent-one": "with exponent -1 instead of -1/2",
    "exponent-quarter": "with exponent -1/4 instead of -1/2",
    "statistic-after": "with the sum before this gradient",
    "diagonal": "with the diagonal of the sum only",
    "left-only": "with G G^T of the matrix, one-sided, instead of the flattened gradient's outer product",
    "average": "with the mean of the outer products instead of their sum",
}


def full_adagrad(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """Full-matrix AdaGrad on the flattened parameter."""
    eps = 0.0 if "eps-ignored" in flags else config["eps"]
    exponent = -1.0 if "exponent-one" in flags else -0.25 if "exponent-quarter" in flags else -0.5
    rows = shape[0] if "left-only" in flags else int(np.prod(shape))
    gram, out = np.zeros((rows, rows)), None
    for t in count(1):
        g, _ = yield out
        matrix = g.reshape(rows, -1)
        old, gram = gram, gram + matrix @ matrix.T
        used = (old if "statistic-after" in flags else gram) / (t if "average" in flags else 1)
        if "diagonal" in flags:
            used = np.diag(np.diag(used))
        root = power(used, exponent, eps) if "eps-inside" in flags else outside(used, exponent, eps)
        out = (root @ matrix).reshape(shape), {"gram": gram}


def _denominator(square: np.ndarray, eps: float, flags: frozenset[str]) -> np.ndarray:
    if "no-root" in flags:
        return square + eps
    return sqrt(square + eps) if "eps-inside" in flags else sqrt(square) + eps


def _divided(a: np.ndarray, b: np.ndarray, flags: frozenset[str]) -> np.ndarray:
    return a / b if "zero-nan" in flags else quotient(a, b)


EPS = frozenset({"eps-inside", "eps-ignored"})
VARIANTS = {
    "SGD": Variants(
        sgd,
        SGD_FLAGS,
        (
            frozenset({"momentum-ema", "momentum-ema-first", "momentum-ignored"}),
            frozenset({"nesterov-ignored", "nesterov-always"}),
            *rivals({"momentum-ignored"}, {"nesterov-ignored", "nesterov-always", "decay-coupled"}),
        ),
    ),
    "AdaGrad": Variants(
        adagrad,
        ADAGRAD_FLAGS,
        (EPS, frozenset({"initial-ignored", "initial-squared"}), frozenset({"no-root", "eps-inside"})),
    ),
    "RMSProp": Variants(
        rmsprop,
        RMSPROP_FLAGS,
        (
            EPS,
            *rivals({"momentum-ignored"}, {"momentum-on-gradient", "momentum-ema"}),
            frozenset({"no-root", "eps-inside"}),
        ),
    ),
    "Adam": Variants(
        adam,
        ADAM_FLAGS,
        (
            EPS | {"eps-before-correction"},
            frozenset({"square-of-average", "square-of-residual"}),
            frozenset({"no-root", "eps-inside"}),
        ),
    ),
    "FullAdaGrad": Variants(
        full_adagrad,
        FULL_FLAGS,
        (EPS, frozenset({"exponent-one", "exponent-quarter"}), frozenset({"exponent-one", "eps-inside"})),
    ),
}
