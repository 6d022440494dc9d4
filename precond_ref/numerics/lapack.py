"""Factorisations that may fail: the member becomes NaN, and the whole batch raises no exception."""

from __future__ import annotations

from collections.abc import Callable

from array_api_compat import array_namespace

from precond_ref.numerics.arrays import eye_like, in_float64
from precond_ref.typing import Array, Namespace

Factorisation = Callable[..., tuple[Array, ...]]


def attempt(function: Factorisation, *arrays: Array, wider: bool = False, xp: Namespace = None) -> tuple[Array, ...]:
    """Return ``function(*arrays)`` of arrays (..., m, n); NaN for each member that raises a linear-algebra error.

    With ``wider`` such a member is first tried again in float64, if there is float64; this helps an eigendecomposition
    or SVD that does not converge. JAX raises no error; a member that it cannot factorise is NaN there too.
    """
    try:
        return function(*arrays)
    except Exception as error:
        if not _is_failure(error):
            raise
    xp = array_namespace(*arrays) if xp is None else xp
    members = [xp.reshape(array, (-1, *array.shape[-2:])) for array in arrays]
    results = [_one(function, [m[i : i + 1, ...] for m in members], wider, xp) for i in range(members[0].shape[0])]
    stack = arrays[0].shape[:-2]
    return tuple(xp.reshape(xp.concat(rows), (*stack, *rows[0].shape[1:])) for rows in zip(*results, strict=True))


def _one(function: Factorisation, arrays: list[Array], wider: bool, xp: Namespace) -> list[Array]:
    wide = [in_float64(array, xp) if wider else None for array in arrays]
    for trial in [arrays] if any(array is None for array in wide) else [arrays, wide]:
        try:
            return [xp.astype(result, arrays[0].dtype, copy=False) for result in function(*trial)]
        except Exception as error:
            if not _is_failure(error):
                raise
    return [xp.full_like(result, float("nan")) for result in function(eye_like(xp, arrays[0]), *arrays[1:])]


def _is_failure(error: Exception) -> bool:
    """Return whether ``error`` is the LinAlgError of NumPy, CuPy or PyTorch, which have no common base."""
    return type(error).__name__.endswith("LinAlgError")
