"""Orthogonal bases that follow the eigenvectors of a slowly changing matrix, batched over leading axes.

A basis Q (..., n, n) has its vectors as columns. `eigenbasis` is the definition; `followed` makes one or more rounds of
orthogonal iteration from an earlier basis. The signs of the columns are those of LAPACK, so no result of a method may
depend on them. A matrix with a non-finite entry has a basis of NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

from array_api_compat import array_namespace

from precond_ref.numerics.arrays import frobenius, identity, largest_entry, normed, own
from precond_ref.numerics.axes import multiply
from precond_ref.numerics.lapack import attempt
from precond_ref.numerics.refresh import readable, renew, surely
from precond_ref.numerics.roots import CERTAIN, eigh
from precond_ref.typing import Array, Namespace


def eigenbasis(matrix: Array, *, ascending: bool = False, xp: Namespace = None) -> Array:
    """Return the eigenvectors of a symmetric matrix (..., n, n), by eigenvalues in descending order."""
    xp = array_namespace(matrix) if xp is None else xp
    _, q, finite = eigh(matrix, xp=xp)
    return own(xp.where(finite, q if ascending else xp.flip(q, axis=-1), float("nan")), xp)


def rayleigh(basis: Array, product: Array, xp: Namespace) -> Array:
    """Return ``q_j^T A q_j`` (..., n) of the columns of Q, from ``product = A Q``; 0 if it may be rounding."""
    a = xp.sum(basis * product, axis=-2)
    return xp.where(a > _rounding(a, xp), a, 0.0)


def _rounding(sizes: Array, xp: Namespace) -> Array:
    """Return the threshold (..., 1) below which a size in ``sizes`` (..., n) is rounding beside the largest."""
    return CERTAIN * xp.finfo(sizes.dtype).eps * xp.max(sizes, axis=-1, keepdims=True)


def descending(values: Array, xp: Namespace) -> Array:
    """Return the indices (..., n) of ``values`` (..., n) in descending order; equal values keep their order."""
    return xp.argsort(values, axis=-1, descending=True, stable=True)


def taken(tensor: Array, order: Array, axis: int, xp: Namespace) -> Array:
    """Return ``tensor`` (..., d_1, ..., d_k) with the entries of ``axis``, from 0 to k - 1, in ``order`` (..., d)."""
    stack = order.ndim - 1
    shape = [*order.shape[:stack], *(1 for _ in tensor.shape[stack:])]
    shape[stack + axis] = order.shape[-1]
    index = xp.broadcast_to(xp.reshape(order, tuple(shape)), tensor.shape)
    if hasattr(xp, "gather"):  # PyTorch: its `take_along_dim` takes six times as long
        return xp.gather(tensor, stack + axis, index)
    return xp.take_along_axis(tensor, index, axis=stack + axis)


def lengths(columns: Array, xp: Namespace) -> Array:
    """Return the Euclidean norms (..., n) of the columns of (..., m, n)."""
    return frobenius(columns, (-2,), xp)[..., 0, :]


def orthonormal(columns: Array, spare: Array, *, xp: Namespace = None) -> Array:
    """Return ``columns`` (..., n, n) after Gram-Schmidt from left to right.

    A column may depend on the columns before it, to `CERTAIN` spacings of the longest column. It is then replaced by
    the same column of the orthogonal matrix ``spare``, made orthogonal after all others.
    """
    xp = array_namespace(columns) if xp is None else xp
    q, r = attempt(lambda a: tuple(xp.linalg.qr(a)), columns, xp=xp)
    sure = xp.abs(xp.linalg.diagonal(r)) > _rounding(lengths(columns, xp), xp)

    def completed() -> Array:
        # Columns before the first that depends are right; the others are found in coordinates of q's other columns.
        n = sure.shape[-1]
        right = int(xp.argmin(xp.astype(xp.all(xp.reshape(sure, (-1, n)), axis=0), xp.int8))) if readable(sure) else 0
        free, known = q[..., right:], sure[..., right:]
        last = descending(xp.astype(known, columns.dtype), xp)
        start = taken(xp.where(known[..., None, :], columns[..., right:], spare[..., right:]), last, 1, xp)
        new, _ = attempt(lambda a: tuple(xp.linalg.qr(a)), xp.matrix_transpose(free) @ start if right else start, xp=xp)
        new = taken(new, xp.argsort(last, axis=-1), 1, xp)
        new = xp.concat([q[..., :right], free @ new], axis=-1) if right else new
        return own(xp.where(xp.all(sure, axis=-1)[..., None, None], q, new), xp)

    return renew(~xp.all(sure), completed, own(q, xp))


def in_order(matrix: Array, basis: Array, xp: Namespace, *, ascending: bool = False) -> tuple[Array, Array, Array]:
    """Return the order (..., n) of the columns that makes ``q_j^T A q_j`` descending or ascending, Q in it, and A Q."""
    matrix, finite, _ = _guarded(matrix, basis, xp)
    product = matrix @ finite
    a = rayleigh(finite, product, xp)
    order = descending(-a if ascending else a, xp)
    return order, taken(basis, order, 1, xp), taken(product, order, 1, xp)


def outside(matrix: Array, basis: Array, xp: Namespace) -> Array:
    """Return the Frobenius norm of ``Q^T A Q`` outside its diagonal over the whole norm, (...); 0 for A = 0."""
    inner = xp.matrix_transpose(basis) @ matrix @ basis
    _, unit, norm = normed(inner, (-2, -1), xp)
    rest = unit - unit * identity(xp, unit)
    size = xp.sqrt(xp.sum(rest * rest, axis=(-2, -1)))
    return size / xp.where(norm == 0, 1.0, norm)[..., 0, 0]


def onto(tensor: Array, bases: Sequence[Array | None], xp: Namespace) -> Array:
    """Return the coordinates of a tensor (..., d_1, ..., d_k) in a basis of each axis; None is the identity."""
    for axis, q in enumerate(bases):
        if q is not None:
            tensor = multiply(tensor, xp.matrix_transpose(q), axis, xp)
    return tensor


def back(tensor: Array, bases: Sequence[Array | None], xp: Namespace) -> Array:
    """Return the tensor whose coordinates are ``tensor``, the inverse of `onto`."""
    for axis, q in enumerate(bases):
        if q is not None:
            tensor = multiply(tensor, q, axis, xp)
    return tensor


def followed(matrix: Array, basis: Array, rounds: int, *, product: Array | None = None, xp: Namespace = None) -> Array:
    """Return the basis after ``rounds`` of orthogonal iteration, ``Q <- orthonormal(A Q)``.

    ``product`` is A Q of the first round, if it is known.
    """
    xp = array_namespace(matrix, basis) if xp is None else xp
    matrix, basis, finite = _guarded(matrix, basis, xp)
    for i in range(rounds):
        basis = orthonormal(matrix @ basis if i or product is None else product, basis, xp=xp)
    return own(basis if surely(finite) else xp.where(finite, basis, float("nan")), xp)


def _guarded(matrix: Array, basis: Array, xp: Namespace) -> tuple[Array, Array, Array]:
    """Return the symmetric part of ``matrix`` and ``basis``, and which members are finite; the others get 0 and I."""
    finite = xp.isfinite(largest_entry(matrix, (-2, -1), xp)) & xp.isfinite(largest_entry(basis, (-2, -1), xp))
    if not surely(finite):
        matrix, basis = xp.where(finite, matrix, 0.0), xp.where(finite, basis, identity(xp, matrix))
    half = 0.5 * matrix
    return half + xp.matrix_transpose(half), basis, finite
