"""New arrays beside a given one, largest entries and norms, and tests for finite entries."""

from __future__ import annotations

import math
from typing import Any

from array_api_compat import device as device_of
from array_api_compat import is_jax_array, is_numpy_array

from precond_ref.numerics.refresh import readable, surely
from precond_ref.typing import Array, Namespace, Scalar


def placement(array: Array) -> dict[str, Any]:
    """Return the keywords that create an array with the dtype and device of ``array``.

    On JAX no device is named: this would commit the new array, and ``jit`` would compile twice.
    """
    return {"dtype": array.dtype} if is_jax_array(array) else {"dtype": array.dtype, "device": device_of(array)}


def zeros(xp: Namespace, shape: tuple[int, ...], like: Array) -> Array:
    """Return zeros of ``shape`` with the dtype and device of ``like``."""
    return xp.zeros(shape, **placement(like))


def state_dtype(xp: Namespace, param: Array, narrow: bool) -> Any:
    """Return the dtype of a method's averages: that of ``param``, but float32 at least unless ``narrow``."""
    return param.dtype if narrow or xp.finfo(param.dtype).bits >= 32 else xp.float32


def in_float64(array: Array, xp: Namespace) -> Array | None:
    """Return ``array`` in float64; None if float64 is switched off in the library or missing on the device."""
    try:
        wide = xp.astype(array, xp.float64, copy=False)
    except (TypeError, ValueError, RuntimeError):  # libraries refuse it each in its own way
        return None
    return wide if wide.dtype == xp.float64 else None


def t(matrix: Array, xp: Namespace) -> Array:
    """A^T, of the last two axes."""
    return xp.matrix_transpose(matrix)


def own(array: Array, xp: Namespace) -> Array:
    """Return a copy of ``array`` with its rows one after the other in memory."""
    return xp.reshape(xp.concat([xp.reshape(array, (-1,))]), array.shape)


def eye_like(xp: Namespace, matrix: Array) -> Array:
    """Return identity matrices with the shape (..., n, n), dtype and device of ``matrix``."""
    return xp.tril(xp.triu(xp.ones_like(matrix)))


def identity(xp: Namespace, matrix: Array) -> Array:
    """Return one identity matrix (n, n) for all members of ``matrix`` (..., n, n), or an array as empty as that."""
    return eye_like(xp, matrix if 0 in matrix.shape else matrix[(0,) * (matrix.ndim - 2) + (...,)])


def largest_entry(array: Array, axes: tuple[int, ...], xp: Namespace) -> Array:
    """Return the exact largest magnitude over ``axes``, which stay with size 1; 0 of no entries, NaN with any NaN."""
    if 0 in array.shape:
        return xp.sum(array, axis=axes, keepdims=True)
    return xp.max(xp.abs(array), axis=axes, keepdims=True)


def by_largest(array: Array, axes: tuple[int, ...], xp: Namespace) -> tuple[Array, Array, Array]:
    """Return `normed` with the largest magnitude as ``size``, and 1 for zero."""
    peak = largest_entry(array, axes, xp)
    size = xp.where(peak == 0, 1.0, peak)
    unit = array / size
    return size, unit, xp.sqrt(xp.sum(unit * unit, axis=axes, keepdims=True))


def normed(array: Array, axes: tuple[int, ...], xp: Namespace) -> tuple[Array, Array, Array]:
    """Return ``size``, ``unit`` and ``norm`` with ``array = size unit`` and ``norm = ||unit||_F`` over ``axes``.

    The axes stay with size 1. No square over- or underflows. The norm is NaN if an entry is not finite. Where values
    can be read, ``size`` is a power of two, 1 unless the largest entry is far from 1. This rounds nothing: a norm does
    not depend on whether another member needs it. Elsewhere ``size`` is the largest entry, which takes fewer calls.
    """
    if 0 in array.shape or not readable(array):
        return by_largest(array, axes, xp)
    bits = math.log2(float(xp.finfo(array.dtype).max))
    low, high, small, large = (2.0 ** round(share * bits) for share in (-0.35, 0.34, -0.69, 0.67))
    if not is_numpy_array(array):  # NumPy would warn of squares that overflow
        total = xp.sum(array * array, axis=axes, keepdims=True)
        if surely((total > low * low) & (total < high * high)):  # then size = 1 gives the same bits
            return xp.ones_like(total), array, xp.sqrt(total)
    peak = xp.maximum(xp.max(array, axis=axes, keepdims=True), -xp.min(array, axis=axes, keepdims=True))
    one = xp.ones_like(peak)
    size = xp.where(peak > high, large * one, xp.where(peak < low, small * one, one))
    unit = array if surely(size == 1) else array * (1 / size)
    return size, unit, xp.sqrt(xp.sum(unit * unit, axis=axes, keepdims=True)) + 0.0 * peak


def frobenius(array: Array, axes: tuple[int, ...], xp: Namespace) -> Array:
    """Return the norms ``||X||_F`` over ``axes``, which stay with size 1; NaN for what is not finite."""
    size, _, norm = normed(array, axes, xp)
    return size * norm


def clamp(array: Array, low: Scalar, high: Scalar | None = None, *, xp: Namespace) -> Array:
    """Limit the entries to ``low`` and ``high``; NaN stays. CuPy's ``clip`` would wait for the device."""
    if hasattr(array, "clamp"):  # PyTorch: compilers cannot trace its `maximum` of a Python number
        return array.clamp(low, high)
    array = xp.maximum(array, low)
    return array if high is None else xp.minimum(array, high)


def square(array: Array, xp: Namespace) -> Array:
    """Return ``array * array``, with large entries limited so that a sum of the squares cannot overflow."""
    most = (float(xp.finfo(array.dtype).max) / max(math.prod(array.shape), 1)) ** 0.5
    bounded = clamp(array, -most, most, xp=xp)
    return bounded * bounded


def all_finite(xp: Namespace, *arrays: Array) -> Array:
    """Return whether every entry of all arrays is finite: a 0-D bool array."""
    flags = [xp.all(xp.isfinite(a)) for a in arrays]
    result = flags[0]
    for flag in flags[1:]:
        result = xp.logical_and(result, flag)
    return result


def finite_members(xp: Namespace, *arrays: Array, core_ndims: tuple[int, ...]) -> Array:
    """Return whether each stack member is finite in all arrays; the last ``core_ndims`` axes belong to one member."""
    result = None
    for array, ndim in zip(arrays, core_ndims, strict=True):
        flag = xp.all(xp.isfinite(array), axis=tuple(range(-ndim, 0))) if ndim else xp.isfinite(array)
        result = flag if result is None else xp.logical_and(result, flag)
    return result


def bad_as_nan(array: Array, core_ndim: int, xp: Namespace) -> Array:
    """Return NaN for each member (...) with an entry that is not finite, else 0; added to its state, this is a mark."""
    return xp.sum(0.0 * array, axis=tuple(range(-core_ndim, 0)))


def whole(array: Array, core_ndim: int, xp: Namespace) -> Array:
    """Return ``array`` with NaN in every entry of each member that has an entry which is not finite."""
    return array + bad_as_nan(array, core_ndim, xp)[(..., *[None] * core_ndim)]
