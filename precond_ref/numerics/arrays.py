"""New arrays beside a given one, and what all diagnoses ask of one."""

from __future__ import annotations

import math
from typing import Any

from array_api_compat import device as device_of
from array_api_compat import is_jax_array

from precond_ref.typing import Array, Namespace, Scalar


def placement(array: Array) -> dict[str, Any]:
    """Keywords that create an array with the dtype and device of ``array``.

    On JAX no device is named: naming it commits the new array, and ``jit`` then compiles twice.
    """
    return {"dtype": array.dtype} if is_jax_array(array) else {"dtype": array.dtype, "device": device_of(array)}


def zeros(xp: Namespace, shape: tuple[int, ...], like: Array) -> Array:
    """Zeros of ``shape`` with the dtype and device of ``like``."""
    return xp.zeros(shape, **placement(like))


def state_dtype(xp: Namespace, param: Array, narrow: bool) -> Any:
    """Dtype of a method's averages: that of ``param``, but float32 at least unless ``narrow``."""
    return param.dtype if narrow or xp.finfo(param.dtype).bits >= 32 else xp.float32


def in_float64(array: Array, xp: Namespace) -> Array | None:
    """``array`` in float64; None where the library has that switched off, or the device lacks it."""
    try:
        wide = xp.astype(array, xp.float64, copy=False)
    except (TypeError, ValueError, RuntimeError):  # libraries refuse it each in its own way
        return None
    return wide if wide.dtype == xp.float64 else None


def t(matrix: Array, xp: Namespace) -> Array:
    """A^T, of the last two axes."""
    return xp.matrix_transpose(matrix)


def own(array: Array, xp: Namespace) -> Array:
    """``array`` row by row in memory of its own."""
    return xp.reshape(xp.concat([xp.reshape(array, (-1,))]), array.shape)


def eye_like(xp: Namespace, matrix: Array) -> Array:
    """Identity matrices with the shape (..., n, n), dtype and device of ``matrix``."""
    return xp.tril(xp.triu(xp.ones_like(matrix)))


def identity(xp: Namespace, matrix: Array) -> Array:
    """One identity matrix for all of ``matrix`` (..., n, n): (n, n), or empty like it."""
    return eye_like(xp, matrix if 0 in matrix.shape else matrix[(0,) * (matrix.ndim - 2) + (...,)])


def largest_entry(array: Array, axes: tuple[int, ...], xp: Namespace) -> Array:
    """Largest magnitude over ``axes``, which stay with size 1: 0 of nothing, NaN if there is one, else exact."""
    if 0 in array.shape:
        return xp.sum(array, axis=axes, keepdims=True)
    return xp.maximum(xp.max(array, axis=axes, keepdims=True), -xp.min(array, axis=axes, keepdims=True))


def normed(array: Array, axes: tuple[int, ...], xp: Namespace) -> tuple[Array, Array, Array]:
    """``peak``, ``unit`` and ``norm`` with ``array = peak unit`` and ``norm = ||unit||_F`` over ``axes``, which stay.

    The largest magnitude in ``unit`` is 1, so that no square over- or underflows; zero stays zero.
    """
    peak = largest_entry(array, axes, xp)
    unit = array / xp.where(peak == 0, 1.0, peak)
    return peak, unit, xp.sqrt(xp.sum(unit * unit, axis=axes, keepdims=True))


def clamp(array: Array, low: Scalar, high: Scalar | None = None, *, xp: Namespace) -> Array:
    """Limit the entries to ``low`` and ``high``; NaN stays. CuPy's ``clip`` would wait for the device."""
    if hasattr(array, "clamp"):  # PyTorch, whose `maximum` of a Python number no compiler traces
        return array.clamp(low, high)
    array = xp.maximum(array, low)
    return array if high is None else xp.minimum(array, high)


def square(array: Array, xp: Namespace) -> Array:
    """``array * array``, but of entries so large that a sum of squares could overflow a large number less."""
    most = (float(xp.finfo(array.dtype).max) / max(math.prod(array.shape), 1)) ** 0.5
    bounded = clamp(array, -most, most, xp=xp)
    return bounded * bounded


def all_finite(xp: Namespace, *arrays: Array) -> Array:
    """Whether every entry of all arrays is finite: a 0-D bool array."""
    flags = [xp.all(xp.isfinite(a)) for a in arrays]
    result = flags[0]
    for flag in flags[1:]:
        result = xp.logical_and(result, flag)
    return result


def finite_members(xp: Namespace, *arrays: Array, core_ndims: tuple[int, ...]) -> Array:
    """Whether each stack member is finite in all arrays, whose last ``core_ndims`` axes belong to one member."""
    result = None
    for array, ndim in zip(arrays, core_ndims, strict=True):
        flag = xp.all(xp.isfinite(array), axis=tuple(range(-ndim, 0))) if ndim else xp.isfinite(array)
        result = flag if result is None else xp.logical_and(result, flag)
    return result


def bad_as_nan(array: Array, core_ndim: int, xp: Namespace) -> Array:
    """NaN for each member (...) that has an entry which is not finite, else 0: added to what is kept of it, a mark."""
    return xp.sum(0.0 * array, axis=tuple(range(-core_ndim, 0)))


def whole(array: Array, core_ndim: int, xp: Namespace) -> Array:
    """``array``, NaN throughout each member that has an entry which is not finite."""
    return array + bad_as_nan(array, core_ndim, xp)[(..., *[None] * core_ndim)]
