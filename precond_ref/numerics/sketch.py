r"""Frequent Directions with escaped mass: a d x d statistic in d k numbers, batched over leading axes.

Feinberg et al., arXiv 2302.03764, Algorithm 1 and its exponential version. For new rows Y (q, d) and size l::

    A = beta2 S + Y^T Y = U diag(lambda) U^T,  lambda descending       (A)
    rho = lambda_l(A), or 0 if l > d                                   (cut)
    S <- U_k diag(lambda_k - rho) U_k^T,  k = min(d, l)                (S)
    escaped <- tail_decay escaped + rho                                (rho)

S + escaped I then bounds the statistic G = sum_s beta2^(t-s) Y_s^T Y_s: 0 <= G - S <= escaped I. The oracle without any
choice of eigenvectors is S <- [beta2 S + Y^T Y - rho I]_+.

The definition is the thin singular value decomposition of the concatenated factor [sqrt(beta2) S^{1/2}, Y^T], deflated
as (s - c)(s + c); singular values of at most max(d, k + q) u s_1 (u the spacing of the dtype at 1) count as zero, for
without this decision rounding becomes an escaped mass whose inverse root is arbitrary. ``solver="gram64"`` is the named
alternative: eigenvalues of the smaller Gram matrix in float64, whatever the dtype; faster, but its errors are
absolute, about (d + k + q) u s_1^2, so that rho is lost where s_l < 1e-7 s_1.

A member with a non-finite entry never reaches LAPACK (an infinity can hang it): its eigenvalues and escaped mass are
NaN, hence all that is made from them, and the other members of the batch are not touched. So are those of a member
whose singular values overflow, and the powers of one whose largest eigenvalue with its escaped mass does.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from precond_ref.fields import is_python_number, is_zero
from precond_ref.numerics import roots
from precond_ref.numerics.arrays import clamp, eye_like, in_float64, own, square
from precond_ref.numerics.lapack import attempt
from precond_ref.numerics.refresh import surely
from precond_ref.numerics.template import full, zeros
from precond_ref.typing import Array, Namespace, Scalar

SOLVERS = ("svd", "gram64")


class Sketch(NamedTuple):
    """U diag(e) U^T and the mass that was cut off."""

    basis: Array
    """U, orthonormal columns, (..., d, k). Columns of eigenvalue 0 mean nothing."""
    eigenvalues: Array
    """e >= 0, descending, (..., k); the last is 0 unless the size exceeds d."""
    escaped: Array
    """Decayed sum of the cut eigenvalues rho, (...)."""


class SketchReport(NamedTuple):
    """The report of ``diagnose`` for the sketched methods, with one entry per sketch."""

    eigenvalues: tuple[Array, ...]
    """Eigenvalues of each sketch, descending, (..., k)."""
    escaped: tuple[Array, ...]
    """Escaped mass, (...): the largest possible error of the sketch in spectral norm."""
    rank: tuple[Array, ...]
    """Number of eigenvalues above 0, (...)."""
    finite: Array
    """True if the member's state is finite, (...); 0-D and of the whole state without a sketch."""
    accuracy: tuple[Array, ...]
    """Relative error that each sketch allows one update: 16 roundings times the largest eigenvalue with its mass over
    the smallest one above 0 with it, (...)."""
    certificate: tuple[Array, ...] = ()
    """With ``solver="nystrom"``: escaped mass over what the same statistics had to lose at least, (...); 1 at best."""
    kappa: tuple[Array, ...] = ()
    """With ``solver="nystrom"``: tr(G - S) / (l escaped), (...); from 1 on the mass has the bound of an exact cut."""


def empty(d: int, size: int, escaped: Scalar = 0.0) -> Sketch:
    """Return the template of an empty sketch, with a given ``escaped``."""
    k = min(d, size)
    return Sketch(basis=zeros(d, k), eigenvalues=zeros(k), escaped=full(escaped))


def update(
    sketch: Sketch,
    rows: Array,
    beta2: Scalar = 1.0,
    tail_decay: Scalar | None = None,
    *,
    size: int | None = None,
    solver: str = "svd",
    xp: Namespace = None,
) -> Sketch:
    """Return the sketch after new ``rows`` (..., q, d); the old one decays by ``beta2``, its mass by ``tail_decay``.

    ``tail_decay=None`` means ``beta2``. ``size`` is l; None means k, which differs only for l > d (no cut).
    Errors: ValueError for a size or solver that does not fit, and for rows of another shape.
    """
    xp = array_namespace(sketch.basis, rows) if xp is None else xp
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(map(repr, SOLVERS))}, got {solver!r}")
    size, factor = concatenated(sketch, rows, beta2, size, xp)
    if 0 in factor.shape:
        return sketch
    k = sketch.basis.shape[-1]
    u, s, cut = decomposed(factor, size, k, solver, xp)
    s = s[..., :k]
    return Sketch(
        basis=u,
        eigenvalues=(s - cut) * (s + cut),  # (S)
        escaped=(beta2 if tail_decay is None else tail_decay) * sketch.escaped + (cut * cut)[..., 0],  # (rho)
    )


def concatenated(sketch: Any, rows: Array, beta2: Scalar, size: int | None, xp: Namespace) -> tuple[int, Array]:
    """Return l and the factor (..., d, k + q) of A; ValueError for a size or rows that do not fit."""
    *stack, d, k = sketch.basis.shape
    size = k if size is None else size
    if min(d, size) != k:
        raise ValueError(f"size must be {k}{' or more' if k == d else ''} for basis {(d, k)}, got {size}")
    if rows.ndim < 2 or [*rows.shape[:-2], rows.shape[-1]] != [*stack, d]:
        raise ValueError(f"rows must have shape {(*stack, 'q', d)}, got {tuple(rows.shape)}")
    old = sketch.basis * xp.sqrt(beta2 * sketch.eigenvalues)[..., None, :]
    return size, xp.concat([old, xp.matrix_transpose(rows)], axis=-1)  # factor factor^T = A


def decomposed(factor: Array, size: int, k: int, solver: str, xp: Namespace) -> tuple[Array, Array, Array]:
    """Return U_k (..., d, k) of A, the factor's singular values (..., min(d, n)), 0 for rounding, and s_l (..., 1)."""
    d = factor.shape[-2]
    peak = xp.max(xp.abs(factor), axis=(-2, -1), keepdims=True)  # `largest_entry` takes twice as long on small ones
    finite = xp.isfinite(peak)
    factor = xp.where(finite, factor, 0.0)
    if solver == "svd":
        u, s, kept = _svd(factor, k, xp)  # (A)
    else:
        u, s, kept = _gram64(factor, xp.where(finite & (peak > 0), peak, 1.0), k, xp)  # (A)
    finite = finite[..., 0] & (s[..., :1] < math.inf)
    s = xp.where(kept, s, 0.0)
    return u, s, xp.where(finite, s[..., size - 1 : size] if size <= d else 0.0 * s[..., :1], math.nan)  # (cut)


def _svd(factor: Array, k: int, xp: Namespace) -> tuple[Array, Array, Array]:
    """Return k left singular vectors, all singular values, and a mask of those that are more than rounding."""
    svd = partial(xp.linalg.svd, full_matrices=False)
    if 2 * factor.shape[-2] < factor.shape[-1]:  # LAPACK takes half the time for so tall a matrix
        _, s, vh = attempt(svd, xp.matrix_transpose(factor), wider=True, xp=xp)
        u = xp.matrix_transpose(vh)
    else:
        u, s, _ = attempt(svd, factor, wider=True, xp=xp)
    kept = s > max(factor.shape[-2:]) * xp.finfo(s.dtype).eps * s[..., :1]
    return own(u[..., :k], xp), s, kept  # a view would keep all singular vectors alive


def _gram64(factor: Array, unit: Array, k: int, xp: Namespace) -> tuple[Array, Array, Array]:
    """Return the same from the smaller Gram matrix in float64; vectors of singular values below rounding are zero."""
    wide = in_float64(factor, xp)
    if wide is None:
        raise ValueError("solver='gram64' needs float64, which this array library has switched off or its device lacks")
    wide = wide / unit  # so that no square over- or underflows
    tall = factor.shape[-2] > factor.shape[-1]
    transposed = xp.matrix_transpose(wide)
    gram = transposed @ wide if tall else wide @ transposed
    w, u = attempt(xp.linalg.eigh, -gram, xp=xp)  # ascending, so that -w is descending
    s = xp.sqrt(clamp(-w, 0.0, xp=xp))
    kept = s > (max(factor.shape[-2:]) * xp.finfo(xp.float64).eps) ** 0.5 * s[..., :1]
    if tall:
        u = wide @ (u[..., :k] / xp.where(kept, s, math.inf)[..., None, :k])
    else:
        u = own(u[..., :k], xp)
    return xp.astype(u, factor.dtype, copy=False), xp.astype(s * unit[..., 0], factor.dtype, copy=False), kept


def apply_power(
    basis: Array,
    eigenvalues: Array,
    shift: Array,
    exponent: float,
    matrix: Array,
    *,
    ridge: Scalar = 0.0,
    relative: bool = False,
    root: bool = False,
    weight: Scalar = 0.0,
    xp: Namespace = None,
) -> Array:
    """``(U diag(e) U^T + shift I + ridge I)^exponent @ matrix`` for ``matrix`` (..., d, n), ``exponent < 0``.

    Costs O(d k n). ``relative``: the ridge in units of the largest e + shift. ``root``: e^{1/2} in the place of e.
    Where e + shift is 0 the result is 0 for any ridge: this is the complement of a sketch that has lost nothing.
    Without a ridge (``ridge=0``), e + shift <= (d u)^2 max(e + shift) counts as 0 too: a shift decayed for long, whose
    inverse root would multiply nothing but rounding.

    The part of ``matrix`` outside U is judged as in `precond_ref.numerics.roots`: it is rounding, with the error of a
    singular vector in the place of that of an eigenvector, if it is at most 16 u max(s) times the largest entry of
    ``diag(s)^{-1} U^T matrix``, s^2 = e. So is a coordinate in ``U^T matrix`` of at most 16 u times the largest entry
    outside. ``weight``: the sketched statistic is at least ``weight`` times
    ``matrix matrix^T``.
    """
    xp = array_namespace(basis, matrix) if xp is None else xp
    if 0 in matrix.shape:
        return 1.0 * matrix
    singular = xp.sqrt(eigenvalues)
    size, u = singular if root else eigenvalues, xp.finfo(eigenvalues.dtype).eps
    total = xp.concat([size + shift[..., None], shift[..., None]], axis=-1)
    largest = total[..., :1]
    total = xp.where(largest < math.inf, total, math.nan)  # else its power would be a finite 0
    faded = (basis.shape[-2] * u) ** 2 * largest
    if is_python_number(ridge):
        dead = total <= (faded if ridge == 0 else 0.0)
    else:
        dead = total <= xp.where(ridge == 0, faded, 0.0)
    damped = total + (ridge * largest if relative else ridge)
    scale = (xp.where(dead, math.inf, damped) ** exponent)[..., None]
    inside, beyond = scale[..., :-1, :], scale[..., -1:, :]
    live = (eigenvalues > 0)[..., None]
    known = xp.where(live, xp.matrix_transpose(basis) @ matrix, 0.0)
    outside = matrix - basis @ known
    beside = xp.max(xp.abs(outside), axis=-2, keepdims=True)
    known = xp.where(xp.abs(known) > roots.CERTAIN * u * beside, known, 0.0)
    most = float(xp.finfo(known.dtype).max) * u  # so that no share, nor their sum, overflows
    share = xp.abs(clamp(known, -most, most, xp=xp)) * (
        singular[..., :1, None] / xp.where(live, singular[..., None], math.inf)
    )
    top = xp.max(share, axis=(-2, -1), keepdims=True)
    real = beside > roots.CERTAIN * u * top
    all_real = surely(real)
    if not is_zero(weight):
        put = square(outside, xp) if all_real else xp.where(real, square(outside, xp), 0.0)
        put = weight * xp.sum(put, axis=(-2, -1), keepdims=True)
        least = (sum(basis.shape[-2:]) * u * singular[..., :1, None]) ** 2
        fresh = (put > 0) & (put <= 2 * least) & (beyond > 0)
        if not surely(~fresh):
            floor = damped[..., -1:, None]
            beyond = xp.where(fresh, xp.where(fresh, (xp.sqrt(put) if root else put) + floor, 1.0) ** exponent, beyond)
    if not all_real:
        sums = xp.sum(share, axis=-2, keepdims=True)
        mean = xp.sum(share * xp.where(live, inside, 0.0), axis=-2, keepdims=True) / xp.where(sums > 0, sums, 1.0)
        beyond = xp.where(real | (beyond == 0), beyond, mean)
    return beyond * outside + basis @ (inside * known)


def dense(sketch: Sketch, *, xp: Namespace = None) -> Array:
    """Return ``U diag(e) U^T + escaped I`` (..., d, d), for inspection."""
    xp = array_namespace(sketch.basis) if xp is None else xp
    gram = (sketch.basis * sketch.eigenvalues[..., None, :]) @ xp.matrix_transpose(sketch.basis)
    return gram + sketch.escaped[..., None, None] * eye_like(xp, gram)


def report(*sketches: Sketch, finite: Array, xp: Namespace) -> SketchReport:
    """Return the report of the sketches; ``finite`` is that of the whole state."""
    return SketchReport(
        eigenvalues=tuple(s.eigenvalues for s in sketches),
        escaped=tuple(s.escaped for s in sketches),
        rank=tuple(xp.sum(xp.astype(s.eigenvalues > 0, xp.int32), axis=-1, dtype=xp.int32) for s in sketches),
        finite=finite,
        accuracy=tuple(_accuracy(s, xp) for s in sketches),
    )


def _accuracy(sketch: Sketch, xp: Namespace) -> Array:
    e, unit = sketch.eigenvalues, 8 * xp.finfo(sketch.eigenvalues.dtype).eps
    if e.shape[-1] == 0:
        return 0.0 * sketch.escaped + unit
    least = xp.min(xp.where(e > 0, e, e[..., :1]), axis=-1) + sketch.escaped
    return unit * xp.where(least == 0, 1.0, (e[..., 0] + sketch.escaped) / xp.where(least == 0, 1.0, least))
