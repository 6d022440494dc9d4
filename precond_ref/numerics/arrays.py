"""New arrays beside a given one, and what all diagnoses ask of one."""

from __future__ import annotations

from typing import Any

from array_api_compat import device as device_of
from array_api_compat import is_jax_array

from precond_ref.protocol import Array, Namespace


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


def eye_like(xp: Namespace, matrix: Array) -> Array:
    """Identity matrices with the shape (..., n, n), dtype and device of ``matrix``."""
    return xp.tril(xp.triu(xp.ones_like(matrix)))


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
