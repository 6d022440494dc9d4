"""Multiplication of tensors by one matrix per axis, and the statistics of one axis.

Tensors are (..., d_1, ..., d_N) with ``stack`` leading axes; matrices (..., k, d_n) have the same leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from array_api_compat import is_numpy_array

from precond_ref.numerics.refresh import readable
from precond_ref.typing import Array, Namespace


def squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """Return ``shape`` without its axes of size 1; ``(1,)`` if no axis is left."""
    return tuple(d for d in shape if d != 1) or (1,)


def unfold(tensor: Array, stack: int, axis: int, xp: Namespace) -> Array:
    """Return X_(n): (..., d_1, ..., d_N) -> (..., d_n, product of the others), n = ``axis`` counted from 0."""
    moved = (
        xp.moveaxis(tensor, stack + axis, stack) if axis else tensor
    )  # PyTorch cannot move an axis to itself under vmap
    return xp.reshape(moved, (*moved.shape[: stack + 1], math.prod(moved.shape[stack + 1 :])))


def multiply(tensor: Array, matrix: Array, axis: int, xp: Namespace) -> Array:
    """Return X x_n A: ``matrix`` (..., k, d_n) multiplied onto axis n = ``axis`` of ``tensor``."""
    stack = matrix.ndim - 2
    if stack + axis == tensor.ndim - 1:  # the same without a transposition of the result
        rows = xp.reshape(tensor, (*matrix.shape[:-2], math.prod(tensor.shape[stack:-1]), tensor.shape[-1]))
        return xp.reshape(rows @ xp.matrix_transpose(matrix), (*tensor.shape[:-1], matrix.shape[-2]))
    product = matrix @ unfold(tensor, stack, axis, xp)
    others = [*tensor.shape[stack : stack + axis], *tensor.shape[stack + axis + 1 :]]
    moved = xp.reshape(product, (*product.shape[:-1], *others))
    return xp.moveaxis(moved, stack, stack + axis) if axis else moved


def gram_of(x: Array, xp: Namespace) -> Array:
    """Return X X^T of X (..., n, k).

    PyTorch on a CPU has no product that knows that it is symmetric: of one large matrix, three eighths are copied.
    """
    n, k = x.shape[-2:]
    if n < 256 or n * k < 2**17 or is_numpy_array(x) or math.prod(x.shape[:-2]) != 1 or not readable(x):
        return x @ xp.matrix_transpose(x)
    rows = xp.reshape(x, (n, k))  # PyTorch copies what it multiplies in a stack
    cuts = [i * n // 4 for i in range(5)]
    upper = [rows[a:b, :] @ xp.matrix_transpose(rows[a:, :]) for a, b in pairwise(cuts)]
    full = [
        xp.concat(
            [*(xp.matrix_transpose(u[:, a - c : b - c]) for u, c in zip(upper[:i], cuts, strict=False)), upper[i]],
            axis=1,
        )
        for i, (a, b) in enumerate(pairwise(cuts))
    ]
    return xp.reshape(xp.concat(full, axis=0), (*x.shape[:-2], n, n))


def check_samples(statistic: Array, grad: Array) -> None:
    """Raise ValueError or TypeError for pseudo-gradients that are not (q, ...), in the dtype of a gradient (...)."""
    if not hasattr(statistic, "shape"):
        raise TypeError(f"statistic must be an array of shape (q, *param.shape), got {type(statistic).__name__}")
    if tuple(statistic.shape[1:]) != tuple(grad.shape) or statistic.ndim == grad.ndim or statistic.shape[0] == 0:
        raise ValueError(
            f"statistic must have shape (q, *param.shape) with q >= 1, got {tuple(statistic.shape)} "
            f"for param of shape {tuple(grad.shape)}"
        )
    if statistic.dtype != grad.dtype:
        raise TypeError(f"statistic must have grad's dtype {grad.dtype}, got {statistic.dtype}")


def samples(grad: Array, statistic: Array | None, stack: int, dims: tuple[int, ...], xp: Namespace) -> Array:
    """Return the gradients of the curvature, (..., d_1, ..., d_N, q): ``grad`` (q = 1), or the q in ``statistic``."""
    if statistic is None:
        return xp.reshape(grad, (*grad.shape[:stack], *dims, 1))
    q = statistic.shape[0]
    return xp.moveaxis(xp.reshape(statistic, (q, *grad.shape[:stack], *dims)), 0, -1)
