"""SGD, AdaGrad, RMSProp, Adam, and full-matrix AdaGrad, with their plausible mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from operator import truediv
from typing import Any

import numpy as np

from precond_ref.conformance import arithmetic
from precond_ref.conformance.arithmetic import real, sqrt
from precond_ref.conformance.variants import (
    PRECONDITIONED,
    Variants,
    Walk,
    decayed,
    ema,
    note,
    outside,
    power,
    quotient,
    rivals,
    times,
)

RATE_INSIDE = "with the learning rate inside the momentum: what is older keeps its old rate"
LAZY = "with entries of zero gradient left alone: neither they nor their averages change, as in lazy updates"

SGD_FLAGS = {
    "momentum-ema": "with an average, momentum b + (1 - momentum) g, instead of the heavy ball",
    "momentum-ema-first": "with an average instead of the heavy ball after a first buffer equal to the gradient",
    "momentum-ignored": "without momentum",
    "nesterov-ignored": "without Nesterov's form",
    "nesterov-always": "with Nesterov's form, asked for or not",
    "rate-inside": RATE_INSIDE,
    "lazy": LAZY,
}


def sgd(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """SGD with the heavy ball, or with Nesterov's form of it."""
    mu = 0.0 if "momentum-ignored" in flags else config["momentum"]
    nesterov = (config["nesterov"] or "nesterov-always" in flags) and "nesterov-ignored" not in flags
    buffer, out = np.zeros(shape), None
    for t in times(flags):
        g, _ = yield out
        weight = 1.0
        if "momentum-ema" in flags or ("momentum-ema-first" in flags and t > 1):
            weight = 1 - mu
        rate = config["rate"] if "rate-inside" in flags else 1
        old, buffer = buffer, mu * buffer + rate * weight * g
        buffer = _lazy(flags, g, buffer, old)
        direction = _lazy(flags, g, rate * g + mu * buffer if nesterov else buffer) / rate
        out = direction, {"buffer": buffer} if config["momentum"] else {}


ADAGRAD_FLAGS = {
    "eps-inside": "with eps under the root",
    "eps-outside": "with eps outside of the root, asked for or not",
    "eps-ignored": "without eps",
    "initial-ignored": "with the sum of squares started at 0 instead of at initial",
    "initial-squared": "with the sum of squares started at initial^2",
    "initial-again": "with initial added to the sum of squares at every update",
    "statistic-after": "with the sum before this gradient in the denominator",
    "no-root": "with the sum instead of its square root in the denominator",
    "mean": "with the mean of the squared gradients instead of their sum",
    "zero-nan": "with 0/0 = NaN for a zero gradient history at eps = 0",
    **PRECONDITIONED,
}


def adagrad(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """Diagonal AdaGrad."""
    eps = 0.0 if "eps-ignored" in flags else config["eps"]
    initial = config["initial"] ** (2 if "initial-squared" in flags else 1)
    total = np.zeros(shape) + (0.0 if "initial-ignored" in flags else initial)
    out = None
    for t in times(flags):
        g, x = yield out
        old, total = total, total + g * g + (initial if "initial-again" in flags and t > 1 else 0.0)
        square = old if "statistic-after" in flags else total
        denominator = _denominator(square / (t if "mean" in flags else 1), eps, _form(config, flags))
        out = _divided(decayed(config, flags, g, x), denominator, flags), {"total": total}


RMSPROP_FLAGS = {
    "eps-inside": "with eps under the root",
    "eps-outside": "with eps outside of the root, asked for or not",
    "eps-ignored": "without eps",
    "initial-ignored": "with the average started at 0 instead of at initial",
    "centered-ignored": "without the square of the averaged gradient",
    "mean-uncorrected": "with the averaged gradient not bias-corrected",
    "correction-ignored": "without the bias correction",
    "nesterov-ignored": "without Nesterov's form",
    "nesterov-always": "with Nesterov's form, asked for or not",
    "statistic-after": "with the average before this gradient in the denominator",
    "no-root": "with the average instead of its square root in the denominator",
    "weight-missing": "with v_t = beta2 v_{t-1} + g^2, without the weight 1 - beta2",
    "weights-swapped": "with beta2 the weight of the new term",
    "corrected": "with the average divided by 1 - beta2^t",
    "started-whole": "with the average started at the first squared gradient, not weighted by 1 - beta2",
    "lazy": LAZY,
    "centered": "with the square of the averaged gradient subtracted from the average of squares",
    "momentum-ignored": "without momentum",
    "momentum-on-gradient": "with momentum on the gradient, before the division",
    "rate-inside": RATE_INSIDE,
    "momentum-ema": "with an average, momentum b + (1 - momentum) u, instead of the heavy ball",
    "zero-nan": "with 0/0 = NaN for a zero gradient history at eps = 0",
    **PRECONDITIONED,
}


def rmsprop(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """RMSProp with momentum on the preconditioned gradient."""
    eps = 0.0 if "eps-ignored" in flags else config["eps"]
    beta2, mu = config["beta2"], 0.0 if "momentum-ignored" in flags else config["momentum"]
    if "weights-swapped" in flags:
        beta2 = 1 - beta2
    centered = (config.get("centered", False) or "centered" in flags) and "centered-ignored" not in flags
    corrected = (config.get("bias_correction", False) or "corrected" in flags) and "correction-ignored" not in flags
    nesterov = (config.get("nesterov", False) or "nesterov-always" in flags) and "nesterov-ignored" not in flags
    start = 0.0 if "initial-ignored" in flags else config.get("initial", 0.0)
    v, mean, buffer, out = np.zeros(shape) + start, np.zeros(shape), np.zeros(shape), None
    weight = 1 - mu if "momentum-ema" in flags else 1.0
    for t in times(flags):
        g, x = yield out
        old, v = v, beta2 * v + g * g if "weight-missing" in flags else ema(v, g * g, beta2)
        if t == 1 and "started-whole" in flags:
            v = g * g
        v, mean = _lazy(flags, g, v, old), _lazy(flags, g, ema(mean, g, beta2), mean)
        square = old if "statistic-after" in flags else v
        average = mean
        if corrected:
            square = square / (1 - beta2**t)
            average = mean if "mean-uncorrected" in flags else mean / (1 - beta2**t)
        if centered:
            rest = square - average * average
            square = np.where(rest > arithmetic.TINY * square, rest, 0 * rest)  # else it is rounding of 50 digits
        denominator = _denominator(square, eps, _form(config, flags))
        if "momentum-on-gradient" in flags:
            buffer = mu * buffer + weight * g
            direction = _divided(decayed(config, flags, buffer, x), denominator, flags)
        else:
            rate = config["rate"] if "rate-inside" in flags else 1
            new = rate * _divided(decayed(config, flags, g, x), denominator, flags)
            buffer = _lazy(flags, g, mu * buffer + weight * new, buffer)
            direction = _lazy(flags, g, new + mu * buffer if nesterov else buffer) / rate
        state = {"v": v} | ({"buffer": buffer} if config["momentum"] else {})
        out = direction, state | ({"mean": mean} if config.get("centered") else {})


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
    "amsgrad-ignored": "without AMSGrad's maximum",
    "amsgrad-late": "with AMSGrad's maximum of the updates before, which this update's square enters after its use",
    "lazy": LAZY,
    "amsgrad-exchanged": "with AMSGrad's maximum of the other squares, corrected or not",
    "eps-root-ignored": "without eps_root",
    "eps-root-before-correction": "with eps_root added to the square before its bias correction",
    "eps-form-ignored": "with eps beside the corrected root, asked for or not",
    "nadam-ignored": "without NAdam's look-ahead",
    "nadam-constant": "with beta1 in the place of the scheduled momentum",
    "nadam-next": "with 1 - P_t in the place of 1 - P_t mu_{t+1} (of 1 - beta1^(t+1) where it is constant)",
    "nadam-product": "with mu_t in the place of the product P_t of all momenta so far",
    "nadam-late": "with the scheduled momentum of the update before",
    "rectify-ignored": "without RAdam's factor",
    "rectify-four": "with RAdam's factor for rho > 4",
    "rectify-divided": "with the division also where RAdam's factor does not apply",
    "correction-always": "with both bias corrections, asked for or not",
    "no-root": "with v instead of its square root in the denominator",
    "zero-nan": "with 0/0 = NaN for a zero gradient history at eps = 0",
    **PRECONDITIONED,
}


def adam(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """Adam's Algorithm 1."""
    beta1, beta2, eps = config["beta1"], config["beta2"], config["eps"]
    if "betas-swapped" in flags:
        beta1, beta2 = beta2, beta1
    if "eps-ignored" in flags:
        eps = 0.0
    m, v, v_max, out = np.zeros(shape), np.zeros(shape), np.zeros(shape), None
    form, kind, psi, eps_root, rectify, correction = (
        config.get(name, default)
        for name, default in (
            ("amsgrad", None), ("nesterov", None), ("momentum_decay", None), ("eps_root", 0.0), ("rectify", False),
            ("bias_correction", "both"),
        )
    )  # fmt: skip
    if "amsgrad-exchanged" in flags and form:
        form = {"corrected": "uncorrected", "uncorrected": "corrected"}[form]
    form, ever = (None if "amsgrad-ignored" in flags else form or ("amsgrad" in flags and "uncorrected")), form
    kind = None if "nadam-ignored" in flags else kind
    psi = 4e-3 if psi is None else psi
    hat = config.get("eps_form") == "uncorrected" and "eps-form-ignored" not in flags
    correction = "both" if "correction-always" in flags else correction
    product: Any = 1
    for t in times(flags):
        g, x = yield out
        k = t + ("correction-ahead" in flags)
        c1, c2 = 1 - beta1**k, 1 - beta2**k
        note(truediv, 1, c2)
        known = c2
        c1, c2 = 1 if correction != "both" else c1, 1 if correction == "none" else c2
        if "float32-correction" in flags:
            c1, c2 = (float(np.float32(1) - np.float32(beta) ** np.float32(k)) for beta in (beta1, beta2))
        m = _lazy(flags, g, beta1 * m + g if "heavy-ball" in flags else ema(m, g, beta1), m)
        new = m if "square-of-average" in flags else g - m if "square-of-residual" in flags else g
        old, v = v, beta2 * v + new * new if "weight-missing" in flags else ema(v, new * new, beta2)
        v = _lazy(flags, g, v, old)
        square = old if "statistic-after" in flags else v
        if "no-correction-2" in flags:
            c2 = 1.0
        before, v_max = v_max, np.maximum(v_max, square / c2 if form == "corrected" else square)
        if form:
            largest = before if "amsgrad-late" in flags and t > 1 else v_max
            square = largest * c2 if form == "corrected" else largest
        root_eps = 0.0 if "eps-root-ignored" in flags else eps_root
        if "eps-root-before-correction" in flags:
            square, root_eps = square + root_eps, 0.0
        if "eps-before-correction" in flags or hat:
            if hat and root_eps:
                denominator = sqrt(square / c2 + root_eps) + eps / sqrt(c2)
            else:
                denominator = _denominator(square, eps, flags) / sqrt(c2)
        else:
            denominator = _denominator(square / c2 + root_eps, eps, flags)
        m_step = ema(g, m, 1 - beta1) if "nesterov" in flags else m
        m_step = m_step / (1.0 if "no-correction-1" in flags else c1)
        if kind:
            early = t - ("nadam-late" in flags)
            fixed = kind == "constant" or "nadam-constant" in flags
            mu, after = ((beta1 if fixed else _momentum(beta1, psi, s, g)) for s in (early, early + 1))
            product = mu * (1 if flags & {"counter-stuck", "nadam-product"} else product)
            d, e = (1 - product, 1 - product * after) if correction == "both" else (1, 1)
            m_step = after * m / (d if "nadam-next" in flags else e) + (1 - mu) * g / d
        factor: Any = 1
        if rectify and "rectify-ignored" not in flags:
            limit = 2 / (1 - beta2) - 1
            rho = limit - 2 * t * (1 - known) / known
            factor = None
            if rho > (4 if "rectify-four" in flags else 5):
                factor = sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
            elif "rectify-divided" in flags:
                factor = 1
        direction = (
            m_step if factor is None else factor * _divided(decayed(config, flags, m_step, x), denominator, flags)
        )
        state = {"m": m, "v": v} | ({"v_max": v_max} if ever else {})
        out = _lazy(flags, g, direction), state


FULL_FLAGS = {
    "eps-inside": "with eps under the root",
    "eps-ignored": "without eps",
    "exponent-one": "with exponent -1 instead of -1/2",
    "exponent-quarter": "with exponent -1/4 instead of -1/2",
    "statistic-after": "with the sum before this gradient",
    "diagonal": "with the diagonal of the sum only",
    "left-only": "with G G^T of the matrix, one-sided, instead of the flattened gradient's outer product",
    "average": "with the mean of the outer products instead of their sum",
    **PRECONDITIONED,
}


def full_adagrad(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """Full-matrix AdaGrad on the flattened parameter."""
    eps = 0.0 if "eps-ignored" in flags else config["eps"]
    exponent = -1.0 if "exponent-one" in flags else -0.25 if "exponent-quarter" in flags else -0.5
    rows = shape[0] if "left-only" in flags else int(np.prod(shape))
    gram, out = np.zeros((rows, rows)), None
    for t in times(flags):
        g, x = yield out
        matrix = g.reshape(rows, -1)
        old, gram = gram, gram + matrix @ matrix.T
        used = (old if "statistic-after" in flags else gram) / (t if "average" in flags else 1)
        if "diagonal" in flags:
            used = np.diag(np.diag(used))
        root = power(used, exponent, eps) if "eps-inside" in flags else outside(used, exponent, eps)
        moved = decayed(config, flags, g, x).reshape(rows, -1)
        out = (root @ moved).reshape(shape), {"gram": gram}


def _momentum(beta1: Any, psi: Any, t: int, like: Any) -> Any:
    """Return mu_t of NAdam."""
    return beta1 * (1 - arithmetic.power(real(0.96, like), t * real(psi, like)) / 2)


def _form(config: Mapping[str, Any], flags: frozenset[str]) -> frozenset[str]:
    """Return the flags, with the flag of eps under the root if the form has it there."""
    inside = config.get("eps_form") == "inside" and not flags & {"eps-outside", "no-root"}
    return flags | {"eps-inside"} if inside else flags


def _lazy(flags: frozenset[str], g: np.ndarray, new: np.ndarray, old: Any = 0) -> np.ndarray:
    """``new``, under "lazy" but where the gradient is zero: there ``old``."""
    return np.where(g != 0, new, old) if "lazy" in flags else new


def _denominator(square: np.ndarray, eps: float, flags: frozenset[str]) -> np.ndarray:
    if "no-root" in flags:
        return square + eps
    return sqrt(square + eps) if "eps-inside" in flags else sqrt(square) + eps


def _divided(a: np.ndarray, b: np.ndarray, flags: frozenset[str]) -> np.ndarray:
    return a / b if "zero-nan" in flags else quotient(a, b)


EPS = frozenset({"eps-inside", "eps-ignored"})
VARIANTS = {
    "SGD": Variants(sgd, SGD_FLAGS, (frozenset({"momentum-ema", "momentum-ema-first", "momentum-ignored"}),
        frozenset({"nesterov-ignored", "nesterov-always"}),
        *rivals({"momentum-ignored"}, {"nesterov-ignored", "nesterov-always", "decay-coupled", "rate-inside"}))),
    "AdaGrad": Variants(adagrad, ADAGRAD_FLAGS, (EPS | {"eps-outside"},
        frozenset({"initial-ignored", "initial-squared", "initial-again"}), frozenset({"no-root", "eps-inside"}),
        frozenset({"no-root", "eps-outside"}))),
    "RMSProp": Variants(rmsprop, RMSPROP_FLAGS, (EPS | {"eps-outside"}, frozenset({"started-whole", "weight-missing"}),
        *rivals({"momentum-ignored"}, {"momentum-on-gradient", "momentum-ema", "rate-inside"}),
        *rivals({"momentum-on-gradient"}, {"rate-inside"}),
        *rivals({"momentum-ignored", "momentum-on-gradient"}, {"nesterov-ignored", "nesterov-always"}),
        frozenset({"no-root", "eps-inside"}), frozenset({"no-root", "eps-outside"}),
        frozenset({"corrected", "correction-ignored", "mean-uncorrected"}), frozenset({"centered", "centered-ignored"}),
        frozenset({"centered-ignored", "mean-uncorrected"}), frozenset({"nesterov-ignored", "nesterov-always"}))),
    "Adam": Variants(adam, ADAM_FLAGS, (EPS | {"eps-before-correction", "eps-form-ignored"},
        frozenset({"amsgrad", "amsgrad-ignored", "amsgrad-exchanged", "amsgrad-late"}),
        frozenset({"eps-root-ignored", "eps-root-before-correction"}),
        frozenset({"nadam-ignored", "nadam-constant", "nadam-late"}), frozenset({"nadam-ignored", "nadam-next"}),
        frozenset({"nadam-ignored", "nesterov"}), frozenset({"nadam-ignored", "nadam-product"}),
        frozenset({"rectify-ignored", "rectify-four", "rectify-divided"}),
        frozenset({"square-of-average", "square-of-residual"}), frozenset({"no-root", "eps-inside"}))),
    "FullAdaGrad": Variants(full_adagrad, FULL_FLAGS,
        (EPS, frozenset({"exponent-one", "exponent-quarter"}), frozenset({"exponent-one", "eps-inside"}))),
}  # fmt: skip
