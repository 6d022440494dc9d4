"""RF-RMSProp, RF-AdamW and RF-Shampoo, with their plausible mistakes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np

from precond_ref.conformance.arithmetic import sqrt
from precond_ref.conformance.variants import (
    EVERY,
    Variants,
    Walk,
    due,
    ema,
    multiply,
    power,
    quotient,
    rivals,
    times,
    unfold,
)

T = TypeVar("T")
BALL_FLAGS = {
    "momentum-ignored": "without momentum",
    "momentum-ema": "with an average, momentum b + (1 - momentum) u, instead of the heavy ball",
    "momentum-on-gradient": "with momentum on the gradient, before it is preconditioned",
    "nesterov": "with Nesterov's form, u + momentum b",
    "kappa-ignored": "without weight decay",
    "kappa-coupled": "with weight decay added to the gradient, so that it is preconditioned",
    "kappa-outside": "with weight decay outside the momentum",
}
BALL_EXCLUSIVE = (
    frozenset({"momentum-ignored", "momentum-ema", "momentum-on-gradient"}),
    frozenset({"momentum-ignored", "nesterov"}),
    frozenset({"nesterov", "momentum-on-gradient"}),
    frozenset(f for f in BALL_FLAGS if f.startswith("kappa")),
)


class HeavyBall:
    """Weight decay kappa and momentum alpha_1 around a preconditioner."""

    def __init__(self, config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> None:
        self.mu = 0.0 if "momentum-ignored" in flags else config["momentum"]
        self.kappa = 0.0 if "kappa-ignored" in flags else config["weight_decay"]
        self.kept = config["momentum"] != 0
        self.flags, self.buffer = flags, np.zeros(shape)
        self.weight = 1 - self.mu if "momentum-ema" in flags else 1.0

    def gradient(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return the gradient, with coupled weight decay; the statistics have it too."""
        return g + self.kappa * x if "kappa-coupled" in self.flags else g

    def averaged(self, g: np.ndarray) -> np.ndarray:
        """Return the gradient to precondition: with momentum, if the momentum is on the gradient."""
        if "momentum-on-gradient" not in self.flags:
            return g
        self.buffer = self.mu * self.buffer + g
        return self.buffer

    def direction(self, u: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return the direction for the preconditioned gradient."""
        flags = self.flags
        decay = 0.0 if "kappa-coupled" in flags else self.kappa * x
        if "momentum-on-gradient" in flags:
            return u + decay
        if "kappa-outside" not in flags:
            u, decay = u + decay, 0.0
        self.buffer = self.mu * self.buffer + self.weight * u
        return (u + self.mu * self.buffer if "nesterov" in flags else self.buffer) + decay

    def state(self) -> dict[str, Any]:
        """Return the buffer by name, if there is one."""
        return {"buffer": self.buffer} if self.kept else {}


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


SQUARE_FLAGS = {
    "root": "with the square root of s in the denominator, as in RMSProp",
    "initial-zero": "with s started at 0",
    "initial-one": "with s started at 1, whatever initial",
    "initial-times-batch": "with s started at B initial: the average is of g^2 and B is multiplied on at use",
    "batch-ignored": "without the batch size B",
    "batch-squared": "with B^2 in the place of B: the gradient was of the sum of the losses",
    "batch-divided": "with the batch size dividing",
    "statistic-after": "with s before this gradient in the denominator",
    "damping-ignored": "without damping",
    "damping-inside": "with damping inside the average, added to B g^2",
    "bfloat16-state": "with s kept in bfloat16, as in the authors' released networks",
    "zero-nan": "with 0/0 = NaN",
}
SQUARE_EXCLUSIVE = (
    frozenset({"initial-zero", "initial-one", "initial-times-batch"}),
    frozenset({"batch-ignored", "batch-squared", "batch-divided"}),
    frozenset({"damping-ignored", "damping-inside"}),
)


class Square:
    """The averaged curvature s with weight ``new`` on the new term, and division by it."""

    def __init__(self, config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str], new: float) -> None:
        b = config["batch_size"]
        self.batch = 1.0 if "batch-ignored" in flags else b**2 if "batch-squared" in flags else b
        if "batch-divided" in flags:
            self.batch = 1 / b
        initial = 0.0 if "initial-zero" in flags else 1.0 if "initial-one" in flags else config["initial"]
        self.initial = initial * (b if "initial-times-batch" in flags else 1.0)
        self.damping, self.flags, self.new = config["damping"], flags, new
        self.s = self.old = np.zeros(shape) + self.initial

    def update(self, g: np.ndarray) -> None:
        """Return s after a gradient."""
        square = self.batch * g * g + (self.damping if "damping-inside" in self.flags else 0.0)
        self.old, self.s = self.s, (1 - self.new) * self.s + self.new * square
        if "bfloat16-state" in self.flags:
            self.s = bfloat16(self.s)

    def divide(self, x: np.ndarray, correction: float = 1.0) -> np.ndarray:
        """Return ``x / (s / correction + lambda)``."""
        s = (self.old if "statistic-after" in self.flags else self.s) / correction
        damping = 0.0 if self.flags & {"damping-ignored", "damping-inside"} else self.damping
        denominator = (sqrt(s) if "root" in self.flags else s) + damping
        return x / denominator if "zero-nan" in self.flags else quotient(x, denominator)


RMSPROP_FLAGS = {
    **SQUARE_FLAGS,
    **BALL_FLAGS,
    "weights-swapped": "with beta2 a decay, the weight of the old term",
    "corrected": "with s divided by 1 - (1 - beta2)^t",
}


def rf_rmsprop(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """RF-RMSProp."""
    new = 1 - config["beta2"] if "weights-swapped" in flags else config["beta2"]
    square, ball, out = Square(config, shape, flags, new), HeavyBall(config, shape, flags), None
    for t in times(flags):
        g, x = yield out
        g = ball.gradient(g, x)
        square.update(g)
        correction = 1 - (1 - new) ** t if "corrected" in flags else 1.0
        out = ball.direction(square.divide(ball.averaged(g), correction), x), {"s": square.s, **ball.state()}


ADAMW_FLAGS = {
    **SQUARE_FLAGS,
    "betas-swapped": "with beta1 and beta2 interchanged",
    "weights-swapped": "with beta2 the weight of the new term, as in RF-RMSProp",
    "heavy-ball": "with m = beta1 m + g, without the weight 1 - beta1",
    "momentum-ignored": "without momentum",
    "momentum-of-preconditioned": "with momentum on the preconditioned gradient",
    "nesterov": "with beta1 m + (1 - beta1) g in the place of m",
    "corrected-1": "with m divided by 1 - beta1^t though bias_correction is off",
    "corrected-2": "with s divided by 1 - beta2^t though bias_correction is off",
    "correction-1-ignored": "without the bias correction of m",
    "correction-2-ignored": "without the bias correction of s, started at 0",
    "correction-ignored": "without bias corrections, whatever bias_correction",
    "correction-inflates": "with all of s divided by 1 - beta2^t, s_0 too, as in the authors' code",
    "correction-ahead": "with bias corrections of update t + 1 at update t (the counter starts at 1)",
}


def rf_adamw(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """RF-AdamW."""
    beta1, beta2 = config["beta1"], config["beta2"]
    if "betas-swapped" in flags:
        beta1, beta2 = beta2, beta1
    if "weights-swapped" in flags:
        beta2 = 1 - beta2
    if "momentum-ignored" in flags:
        beta1 = 0.0
    corrects = config["bias_correction"] and "correction-ignored" not in flags
    empty = corrects and "correction-inflates" not in flags
    square = Square({**config, "initial": 0.0} if empty else config, shape, flags, 1 - beta2)
    first = (corrects or "corrected-1" in flags) and "correction-1-ignored" not in flags
    second = (corrects or "corrected-2" in flags) and "correction-2-ignored" not in flags
    m, out = np.zeros(shape), None

    def correction(beta: float, t: int) -> float:
        return 1 - beta ** (t + ("correction-ahead" in flags))

    for t in times(flags):
        g, _ = yield out
        square.update(g)
        c1, c2 = (correction(beta1, t) if first else 1.0), (correction(beta2, t) if second else 1.0)
        if "momentum-of-preconditioned" in flags:
            m = ema(m, square.divide(g, c2), beta1)
            out = m / c1, {"m": m, "s": square.s}
            continue
        m = beta1 * m + g if "heavy-ball" in flags else ema(m, g, beta1)
        averaged = ema(g, m, 1 - beta1) if "nesterov" in flags else m
        out = square.divide(averaged / c1, c2), {"m": m, "s": square.s}


GAUSS_SEIDEL = frozenset({"gauss-seidel", "gauss-seidel-back"})
FACTOR_FLAGS = {
    **BALL_FLAGS,
    **EVERY,
    "weights-swapped": "with beta2 a decay, the weight of the old term",
    "accumulated": "with S_n + beta2 H_n, a sum that forgets nothing",
    "batch-ignored": "without the batch size B",
    "batch-squared": "with B^2 in the place of B: the gradient was of the sum of the losses",
    "factors-after": "with the factors before this gradient, as in KL-Shampoo",
    "gauss-seidel": "with each axis's factor renewed from the factors renewed before it",
    "gauss-seidel-back": "with each axis's factor renewed from the factors renewed before it, the last axis first",
    "share-missing": "without the factor d_n / D of the statistic",
    "trace-missing": "with damping times I, without the traces of the other factors",
    "damping-ignored": "without damping",
    "unit-axes-kept": "with a factor for axes of size 1 too",
    "matrix": "with a tensor read as a matrix, its first axis by all others",
}
SHAMPOO_FLAGS = {
    **FACTOR_FLAGS,
    "trace-mean": "with mean traces of the other factors' inverses instead of traces",
    "damping-outside": "with damping added to S_n where it is inverted, not inside the average",
    "unwhitened": "with B G G^T, not multiplied by the other factors' inverses, as in Shampoo",
    "exponent-half": "with S_n^{-1/2} instead of S_n^{-1}, as in KL-Shampoo",
    "exponent-shampoo": "with S_n^{-1/(2 N)} instead of S_n^{-1}",
}
FACTOR_EXCLUSIVE = (
    *BALL_EXCLUSIVE,
    frozenset({*EVERY, "factors-after"}),
    GAUSS_SEIDEL,
    frozenset({"weights-swapped", "accumulated"}),
    frozenset({"batch-ignored", "batch-squared"}),
    frozenset({"damping-ignored", "damping-outside", "damping-identity", "trace-missing", "trace-mean"}),
    frozenset({"unit-axes-kept", "matrix"}),
)


def in_order(axes: Iterable[T], flags: frozenset[str]) -> list[T]:
    """Return the axes in their order, or with the last one first."""
    return list(axes)[:: -1 if "gauss-seidel-back" in flags else 1]


def factor_dims(shape: tuple[int, ...], flags: frozenset[str]) -> tuple[int, ...]:
    """Return the axes that have a factor."""
    if "matrix" in flags and len(shape) > 2:
        return shape[0], math.prod(shape[1:])
    return (shape if "unit-axes-kept" in flags else tuple(d for d in shape if d > 1)) or (1,)


def rf_shampoo(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """RF-Shampoo."""
    dims, beta2 = factor_dims(shape, flags), config["beta2"]
    total, damping = math.prod(dims), 0.0 if "damping-ignored" in flags else config["damping"]
    b = config["batch_size"]
    b = 1.0 if "batch-ignored" in flags else b**2 if "batch-squared" in flags else b
    old_weight, new_weight = 1 - beta2, beta2
    if "weights-swapped" in flags:
        old_weight, new_weight = beta2, 1 - beta2
    elif "accumulated" in flags:
        old_weight = 1.0
    exponent = Fraction(-1, 2 if "exponent-half" in flags else 2 * len(dims) if "exponent-shampoo" in flags else 1)
    outside = damping if "damping-outside" in flags else 0.0
    factors = [np.eye(d) for d in dims]
    inverses, roots = [np.eye(d) for d in dims], [np.eye(d) for d in dims]
    ball, out = HeavyBall(config, shape, flags), None
    for t in times(flags):
        g, x = yield out
        g = ball.gradient(g, x)
        tensor, before = np.reshape(g, dims), list(roots)
        if due(t, config["every"], flags):
            given = inverses if flags & GAUSS_SEIDEL else list(inverses)
            for n, d in in_order(enumerate(dims), flags):
                weighted, trace = tensor, 1.0
                for j, inverse in enumerate(given):
                    if j != n and "unwhitened" not in flags:
                        weighted = multiply(weighted, inverse, j)
                    if j != n and "trace-missing" not in flags:
                        trace *= np.trace(inverse) / (dims[j] if "trace-mean" in flags else 1)
                h = b * unfold(weighted, n) @ unfold(tensor, n).T
                h = h + (0.0 if outside else damping) * trace * np.eye(d)
                h = h if "share-missing" in flags else h * d / total
                factors[n] = old_weight * factors[n] + new_weight * h
                inverses[n] = power(factors[n], -1, outside)
                roots[n] = inverses[n] if exponent == -1 else power(factors[n], exponent, outside)
        u = np.reshape(ball.averaged(g), dims)
        for n, root in enumerate(before if "factors-after" in flags else roots):
            u = multiply(u, root, n)
        kept = {f"factors.{n}": f for n, f in enumerate(factors)} | {f"inverses.{n}": f for n, f in enumerate(inverses)}
        out = ball.direction(u.reshape(shape), x), {**kept, **ball.state()}


VARIANTS = {
    "RFRMSProp": Variants(rf_rmsprop, RMSPROP_FLAGS, (*SQUARE_EXCLUSIVE, *BALL_EXCLUSIVE)),
    "RFAdamW": Variants(rf_adamw, ADAMW_FLAGS, (*SQUARE_EXCLUSIVE,
        frozenset({"heavy-ball", "momentum-ignored", "momentum-of-preconditioned"}),
        frozenset({"momentum-ignored", "nesterov"}), frozenset({"momentum-of-preconditioned", "nesterov"}),
        frozenset({"betas-swapped", "weights-swapped", "momentum-ignored"}),
        frozenset({"correction-ignored", "correction-1-ignored"}),
        frozenset({"correction-ignored", "correction-2-ignored"}),
        frozenset({"correction-inflates", "correction-2-ignored"}),
        frozenset({"correction-ahead", "correction-ignored"}))),
    "RFShampoo": Variants(rf_shampoo, SHAMPOO_FLAGS,
        (*FACTOR_EXCLUSIVE, frozenset({"exponent-half", "exponent-shampoo"}), *rivals(GAUSS_SEIDEL, {"unwhitened"}))),
}  # fmt: skip
