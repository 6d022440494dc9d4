r"""Classes of square matrices for Kronecker factors, through one rule: the least-squares projection.

Each class is closed under products and under adding multiples of the identity, so a factor that starts in it and is
only multiplied by members stays in it. A symmetric matrix X enters the class as the matrix m that minimises

    || m + m^T - X ||_F  over the class,                                            (P)

the m of smallest norm if several do. If the mirror image of an entry is in the class too (dense blocks, the diagonal),
the entry of m is half of that of X; otherwise (triangular and rectangular parts) it is that of X; tied entries have
their mean. So 2 m copies the dense parts and doubles the one-sided parts.

========================  =========================================================================================
``structure``             free entries of a (d, d) matrix
========================  =========================================================================================
``dense``                 all, d^2
``diagonal``              the diagonal, d
``block-diagonal(b)``     blocks of b rows and columns along the diagonal, the last one smaller if b does not divide d
``tril``, ``triu``        a triangle with the diagonal, d (d + 1) / 2
``tril-toeplitz``,        a triangle whose diagonals are constant, d
``triu-toeplitz``
``hierarchical(a,b)``     [[A, B1, B2], [0, C, 0], [0, D, E]]: A (a, a) and E (b, b) dense, C diagonal, B1, B2, D full;
                          E shrinks, then A, when d is too small for both; d <= a is dense
========================  =========================================================================================

`precond_ref.numerics.structured.project` makes m; matrices are stored as full (d, d) arrays in every class.
"""

from __future__ import annotations

from precond_ref.typing import Array, Namespace

STRUCTURES = (
    "dense",
    "diagonal",
    "block-diagonal(b)",
    "tril",
    "triu",
    "tril-toeplitz",
    "triu-toeplitz",
    "hierarchical(a,b)",
)


def parse(structure: str) -> tuple[str, tuple[int, ...]]:
    """Return name and sizes: ``"hierarchical(15,15)"`` -> ``("hierarchical", (15, 15))``; ValueError if unknown."""
    text = structure.replace(" ", "")
    name, _, rest = text.partition("(")
    sizes = tuple(int(t) for t in rest[:-1].split(",") if t.isdecimal())
    count = {"block-diagonal": 1, "hierarchical": 2}.get(name, 0)
    canonical = f"{name}({','.join(str(size) for size in sizes)})" if count else name
    if text != canonical or len(sizes) != count or 0 in sizes or not (count or name in STRUCTURES):
        raise ValueError(
            f"structure must be one of {', '.join(STRUCTURES)} with positive integers for a and b, got {structure!r}"
        )
    return name, sizes


def mask(structure: str, like: Array, xp: Namespace) -> Array:
    """Return which entries of a (d, d) matrix are free, bool (d, d), with the d and device of ``like`` (..., d, d)."""
    name, sizes = parse(structure)
    d = like.shape[-1]
    index = _indices(like, xp)
    row, column = index[:, None], index[None, :]
    if name == "diagonal":
        return row == column
    if name == "block-diagonal":
        return row // sizes[0] == column // sizes[0]
    if name in ("tril", "tril-toeplitz"):
        return row >= column
    if name in ("triu", "triu-toeplitz"):
        return row <= column
    if name == "hierarchical":
        a, b = sizes
        return (row < a) | ((row >= d - b) & (column >= a)) | (row == column)
    return row + column >= 0


def project(x: Array, structure: str, xp: Namespace) -> Array:
    """Return the m of the class nearest to the symmetric ``x`` (..., d, d) in the sense of (P)."""
    if structure == "dense":
        return 0.5 * x
    free = xp.astype(mask(structure, x, xp), x.dtype)
    m = x * (free / (1 + xp.matrix_transpose(free)))
    if structure == "tril-toeplitz":
        return _mean_diagonals(m, xp)
    if structure == "triu-toeplitz":
        return xp.matrix_transpose(_mean_diagonals(xp.matrix_transpose(m), xp))
    return m


def _indices(like: Array, xp: Namespace) -> Array:
    """Return 0, ..., d - 1 on the device of ``like`` (..., d, d). Compilers cannot trace the name of a device."""
    zeros = xp.sum(xp.zeros_like(like, dtype=xp.int32), axis=tuple(range(like.ndim - 1)), dtype=xp.int32)
    return xp.sum(xp.tril(zeros[:, None] + zeros[None, :] + 1, k=-1), axis=-1, dtype=xp.int32)


def _mean_diagonals(lower: Array, xp: Namespace) -> Array:
    """Return a lower triangular (..., d, d) with each diagonal replaced by its mean."""
    d = lower.shape[-1]
    flat = (*lower.shape[:-2], d * d)
    index = _indices(lower, xp)
    row, column = index[:, None], index[None, :]
    places = (row + column) % d * d + column  # (k, j): the place of entry (j + k, j); beyond the edge a zero
    diagonals = xp.take(xp.reshape(lower, flat), xp.reshape(places, (-1,)), axis=-1)
    means = xp.sum(xp.reshape(diagonals, lower.shape), axis=-1) / xp.astype(d - index, lower.dtype)
    return xp.tril(xp.reshape(xp.take(means, xp.reshape((row - column) % d, (-1,)), axis=-1), lower.shape))
