"""Averages over time, their corrections by the step's number, and the quotient of elementwise methods."""

from __future__ import annotations

import math
from typing import Any

from array_api_compat import array_namespace

from precond_ref.fields import is_python_number
from precond_ref.typing import Array, Namespace, Scalar


def ema(old: Array, new: Array, decay: Scalar) -> Array:
    """Return ``decay * old + (1 - decay) * new``; on PyTorch an infinite value may come out as NaN."""
    if hasattr(new, "lerp") and is_python_number(decay):  # PyTorch: one pass; its weight is at most 1/2 for all digits
        return old.lerp(new, 1 - decay) if decay >= 0.5 else new.lerp(old, decay)
    return decay * old + (1 - decay) * new


def accumulate(old: Array, new: Array, decay: Scalar) -> Array:
    """Return ``decay * old + w new``: a sum, w = 1, for ``decay = 1``, else the average with w = 1 - decay."""
    if is_python_number(decay):
        return old + new if decay == 1 else ema(old, new, decay)
    xp = array_namespace(decay)
    return decay * old + xp.where(decay == 1, 1.0, 1 - decay) * new


def heavy_ball(
    buffer: Array | None, new: Array, momentum: Scalar, nesterov: bool = False
) -> tuple[Array | None, Array]:
    """Return the average ``b = momentum b + new`` and the direction, b or with ``nesterov`` ``new + momentum b``.

    Without a ``buffer`` there is no average, and the direction is ``new`` itself.
    """
    if buffer is None:
        return None, new
    buffer = momentum * buffer + new
    return buffer, new + momentum * buffer if nesterov else 1.0 * buffer


def one_minus_power(beta: Scalar, step: Any, *, like: Array = None) -> Scalar:
    """Return ``1 - beta**step`` for ``0 <= beta < 1``, without cancellation.

    The result is a Python float for Python numbers. If ``beta`` or ``step`` is an array or a tracer, it is a 0-D array
    in the dtype of ``like`` (computed in float32 at least). ``step = 0`` gives 0, also for ``beta = 0``.
    """
    if is_python_number(beta) and isinstance(step, int):
        if step == 0 or beta == 0:
            return float(step != 0)
        if step == 1:
            return 1 - beta  # rounded once
        return -math.expm1(step * math.log(beta))
    arrays = [a for a in (beta, step) if not is_python_number(a)]
    xp = array_namespace(*arrays)
    dtype = like.dtype if xp.finfo(like.dtype).bits >= 32 else xp.float32
    t = xp.astype(step, dtype) if not isinstance(step, int) else xp.full_like(beta, step, dtype=dtype)
    if is_python_number(beta):
        log_beta = math.log(beta) if beta > 0 else -math.inf
    else:
        beta = xp.astype(beta, dtype)
        log_beta = xp.where(beta == 0, -math.inf, xp.log(xp.where(beta == 0, 1.0, beta)))  # no warning for log(0)
    value = xp.where(t == 0, 0.0, -xp.expm1(xp.where(t == 0, 1.0, t) * log_beta))
    value = xp.where(t == 1, 1 - beta, value)
    return xp.astype(value, like.dtype)


def reciprocal(value: Scalar) -> Scalar:
    """Return ``1 / value``, and 0 for ``value`` 0 (the average of no terms)."""
    if is_python_number(value):
        return 1.0 / value if value else 0.0
    xp = array_namespace(value)
    return xp.where(value == 0, 0.0, 1.0 / xp.where(value == 0, 1.0, value))


def number(step: Any, like: Array) -> Scalar:
    """Return a Python ``step`` or bool as a float, else a 0-D array in the dtype of ``like``, float32 at least."""
    if isinstance(step, int):
        return float(step)
    xp = array_namespace(step)
    return xp.astype(step, like.dtype if xp.finfo(like.dtype).bits >= 32 else xp.float32)


def _by_name(name: str, value: Scalar) -> Scalar:
    return getattr(math if is_python_number(value) else array_namespace(value), name)(value)


def sqrt(value: Scalar) -> Scalar:
    """Return the square root of a Python number or a 0-D array."""
    return _by_name("sqrt", value)


def exp(value: Scalar) -> Scalar:
    """Return e to the power of a Python number or a 0-D array."""
    return _by_name("exp", value)


def expm1(value: Scalar) -> Scalar:
    """Return ``exp(value) - 1`` without cancellation."""
    return _by_name("expm1", value)


def quotient(numerator: Array, denominator: Array, xp: Namespace, *, bound: Scalar = 0.0) -> Array:
    """Return ``numerator / denominator`` elementwise with 0/0 = 0; any other number over zero is infinite, NaN stays.

    ``bound`` is a lower bound of the denominators. If it is above 0, the division needs no test for 0/0.
    """
    if is_python_number(bound) and bound >= float(xp.finfo(denominator.dtype).smallest_normal):
        return numerator / denominator
    return numerator / xp.where((numerator == 0) & (denominator == 0), 1.0, denominator)
