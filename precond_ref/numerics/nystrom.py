r"""Frequent Directions by products and QR alone, with a certificate in the place of convergence.

For the factor B (d, n) = [sqrt(beta2) S^{1/2}, Y^T] of A = B B^T, size l, p = l + 8, and Omega (n, p) sparse::

    X = B Omega: to column i of the old sketch rows i, i + p, ... of Y are added                        (1)
    passes times: X <- B qr(B^T qr(X))                                                                  (2)
    W = qr(B^T qr(X)),  F = B W,  qr(.) being the orthonormal factor                                    (3)
    F = U diag(s) V^T, s descending;  s_i <= max(d, n) u s_1 counts as 0                                (4)
    h_i = s_i - s_l,  S <- U_l diag(h_i (s_i + s_l)) U_l^T                                              (5)
    R = B - U_l diag(h) V_l^T W^T                                                                       (6)
    rho >= ||R||_2^2, certified;  escaped <- tail_decay escaped + rho                                   (7)

Whatever W, A - S = R R^T: multiply (6) out with B W V = U diag(s), h (2 s - h) = s^2 - s_l^2 and W^T W = I. So (7) says
0 <= A - S <= rho I, and with the discounted sum 0 <= G_t - S_t <= escaped_t I, as for the exact decomposition.
Convergence is used nowhere; it decides how large rho is. No rho could be below lambda_l(A), by Weyl, and
s_l^2 <= lambda_l(A): the second is summed as ``least``. And tr(A - S) = ||R||_F^2, summed as ``lost``.

The certificate, for E = R R^T (m, m), or R^T R if that is smaller: c is what is believed to be just above its largest
eigenvalue, and c I - E is factorized block by block, its pivots raised where they are too small::

    theta = the largest Ritz value of 12 Lanczos steps,  c = (1 + 1/32) max(theta, s_l^2, ||E||_F^2 / tr E)        (8)
    of each diagonal block H = V diag(pi) V^T and the rows M_21 below it:
    pi'_i = max(pi_i, c / 50, ||M_21 v_i||^2 / c),  delta = max_i(delta, pi'_i - pi_i)                             (9)
    M_22 <- M_22 - (M_21 V) diag(1 / pi') (M_21 V)^T                                                               (10)
    rho = min(c + delta, ||E||_F)                                                                                  (11)

With the pivots pi' this is the factorization of c I - E + D, D block diagonal and 0 <= D <= delta I, which is positive:
E <= (c + delta) I, whatever c. Where c I - E is positive the third term of (9) changes nothing; elsewhere it bounds
what (10) subtracts. No value decides what is done, nothing is read by the host, and nothing fails.

The exact decomposition is made instead where this would save nothing: if l > d or 2 p > min(d, n).

A member with a non-finite entry, or whose singular values overflow, is NaN in eigenvalues and sums. Where s_l counts as
0 and ||R||_F <= 4 max(d, n) u s_1, R is rounding and rho = 0. All this holds up to O(u) s_1^2, as for the exact one.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

from array_api_compat import array_namespace

from precond_ref.numerics import sketch as fd
from precond_ref.numerics.arrays import largest_entry, own
from precond_ref.numerics.lapack import attempt
from precond_ref.numerics.template import full, zeros
from precond_ref.typing import Array, Namespace, Scalar

SPARE = 8
"""p - l: number of columns beyond the kept ones."""
STEPS = 12
"""Number of steps of Lanczos' method."""
BLOCK = 64
"""Order of the diagonal blocks, or a sixteenth of the whole order."""
SLACK = 1 / 32
"""Relative distance of c above the Ritz value."""


class CertifiedSketch(NamedTuple):
    """U diag(e) U^T, a bound of the mass that was cut off, and numbers that show how tight the bound is."""

    basis: Array
    """U, orthonormal columns, (..., d, k). Columns of eigenvalue 0 mean nothing."""
    eigenvalues: Array
    """e >= 0, descending, (..., k); the last is 0 unless the size exceeds d."""
    escaped: Array
    """Sum of the certified masses rho, decayed, (...)."""
    least: Array
    """Sum of the s_l^2, decayed like ``escaped``, (...): no certificate of the same statistics could be below it."""
    lost: Array
    """tr(G_t - S_t), (...)."""


def empty(d: int, size: int) -> CertifiedSketch:
    """Return the template of an empty sketch."""
    k = min(d, size)
    return CertifiedSketch(zeros(d, k), zeros(k), full(0.0), full(0.0), full(0.0))


def is_exact(size: int, d: int, n: int, spare: int = SPARE) -> bool:
    """Return True if the exact decomposition of a factor (d, n) is used: it costs no more."""
    return size > d or 2 * (size + spare) > min(d, n)


def update(
    sketch: CertifiedSketch,
    rows: Array,
    beta2: Scalar = 1.0,
    tail_decay: Scalar | None = None,
    *,
    size: int | None = None,
    spare: int = SPARE,
    passes: int = 1,
    xp: Namespace = None,
) -> CertifiedSketch:
    """Return the sketch after new ``rows`` (..., q, d); arguments and errors: `precond_ref.numerics.sketch.update`.

    ``spare`` is p - l. With ``passes=0``, new rows that cancel in (1) are not seen: sound, but the mass may be large.
    """
    xp = array_namespace(sketch.basis, rows) if xp is None else xp
    size, factor = fd.concatenated(sketch, rows, beta2, size, xp)
    if 0 in factor.shape:
        return sketch
    k = sketch.basis.shape[-1]
    d, n = factor.shape[-2:]
    if is_exact(size, d, n, spare):
        u, s, cut = fd.decomposed(factor, size, k, "svd", xp)
        e, least, mass = (s - cut)[..., :k] * (s + cut)[..., :k], cut[..., 0], cut[..., 0]
        lost = xp.sqrt(xp.sum(xp.minimum(s, cut) ** 2, axis=-1))
    else:
        u, e, least, mass, lost = _certified(factor, k, k + spare, passes, xp)
    tail_decay = beta2 if tail_decay is None else tail_decay
    return CertifiedSketch(
        basis=u,
        eigenvalues=e,
        escaped=tail_decay * sketch.escaped + mass * mass,  # (7)
        least=tail_decay * sketch.least + least * least,
        lost=beta2 * sketch.lost + lost * lost,
    )


def _certified(
    factor: Array, size: int, p: int, passes: int, xp: Namespace
) -> tuple[Array, Array, Array, Array, Array]:
    """Return U_l, the eigenvalues, and the roots of s_l^2, rho and ||R||_F^2, (...)."""
    d, n = factor.shape[-2:]
    t, qr = xp.matrix_transpose, partial(_orthonormal, xp=xp)
    peak = largest_entry(factor, (-2, -1), xp)
    finite = xp.isfinite(peak)
    unit = xp.where(finite & (peak > 0), peak, 1.0)  # so that no square over- or underflows
    b = xp.where(finite, factor, 0.0) / unit
    bt = t(b)
    x = _mixed(b, size, p, xp)  # (1)
    for _ in range(passes):
        x = b @ qr(bt @ qr(x))  # (2)
    w = qr(bt @ qr(x))
    f, triangle = _qr(b @ w, xp)  # (3)
    left, s, vt = attempt(partial(xp.linalg.svd, full_matrices=False), triangle, wider=True, xp=xp)
    rounding = max(d, n) * xp.finfo(s.dtype).eps * s[..., :1]
    s = xp.where(s > rounding, s, 0.0)  # (4)
    u, cut = own(f @ left[..., :size], xp), s[..., size - 1 : size]
    h, total = (s - cut)[..., :size], (s + cut)[..., :size]  # (5)
    residual = b - u @ ((h[..., None] * vt[..., :size, :]) @ t(w))  # (6)
    bound, lost = certificate(residual, (cut * cut)[..., 0], xp)
    lost = xp.sqrt(lost)[..., None]
    mass = xp.where((cut > 0) | (lost > 4 * rounding), xp.sqrt(bound)[..., None], 0.0)
    unit = unit[..., 0]
    unit = xp.where(finite[..., 0] & (s[..., :1] * unit < math.inf), unit, math.nan)
    return u, (h * unit) * (total * unit), *((part * unit)[..., 0] for part in (cut, mass, lost))


def _qr(matrix: Array, xp: Namespace) -> tuple[Array, Array]:
    q, r = xp.linalg.qr(matrix)
    return q, r


def _orthonormal(matrix: Array, xp: Namespace) -> Array:
    """Return orthonormal columns (..., m, p) whose span holds the span of ``matrix``."""
    return _qr(matrix, xp)[0]


def _mixed(b: Array, k: int, p: int, xp: Namespace) -> Array:
    """Return B Omega (1): each column after the k-th joins one of p, with an aperiodic weight between -1 and 1."""
    *stack, d, n = b.shape
    folds = -(-(n - k) // p)

    def padded(columns: Array, count: int) -> Array:
        return xp.concat([columns, xp.zeros_like(b[..., :count])], axis=-1)

    old, new = padded(b[..., :k], p - k), padded(b[..., k:] * _weights(n - k, b, xp), folds * p - (n - k))
    new = xp.sum(xp.reshape(new, (*stack, d, folds, p)), axis=-2)
    return old + xp.where(xp.sum(old * new, axis=-2, keepdims=True) < 0, -new, new)  # no matter what sign U_i has


def _weights(count: int, like: Array, xp: Namespace) -> Array:
    """Return cos(i^2), (..., 1, count)."""
    i = xp.zeros_like(like[..., :1, :1])
    while i.shape[-1] < count:
        i = xp.concat([i, i + i.shape[-1]], axis=-1)
    i = i[..., :count]
    return xp.cos(i * i)


def certificate(residual: Array, least: Array, xp: Namespace) -> tuple[Array, Array]:
    """Return a bound of ||R||_2^2, which is at least ``least``, and ||R||_F^2, (...), for R (..., d, n)."""
    t, (d, n) = xp.matrix_transpose, residual.shape[-2:]
    gram = t(residual) @ residual if d > n else residual @ t(residual)
    square, trace = xp.sum(gram * gram, axis=(-2, -1)), xp.sum(xp.linalg.diagonal(gram), axis=-1)
    c = xp.maximum(xp.maximum(_ritz(gram, square, xp), least), square / xp.where(trace > 0, trace, 1.0))
    c = xp.where(trace > 0, (1 + SLACK) * c, 1.0)[..., None]  # (8)
    return xp.minimum(c[..., 0] + _raised(gram, c, xp), xp.sqrt(square)), trace  # (11)


def _ritz(gram: Array, square: Array, xp: Namespace) -> Array:
    """Return the largest Ritz value (...) of E, ||E||_F^2 = ``square``: `STEPS` steps, orthogonal to all before."""
    t, m = xp.matrix_transpose, gram.shape[-1]
    rounding = xp.sqrt(xp.finfo(gram.dtype).eps * square)[..., None, None]

    def unit(x: Array, least: Array) -> Array:
        length = xp.sqrt(xp.sum(x * x, axis=(-2, -1), keepdims=True))
        return xp.where(length > least, x / xp.where(length > 0, length, 1.0), 0.0)

    x = found = unit(_weights(m, gram, xp) @ gram, 0.0 * rounding)  # a row: in PyTorch 12 times as fast
    images = []
    for _ in range(min(STEPS, m) - 1):
        images.append(x @ gram)
        x = unit(images[-1] - (images[-1] @ t(found)) @ found, rounding)  # 0 where all is found
        found = xp.concat([found, x], axis=-2)
    w, _ = attempt(xp.linalg.eigh, xp.concat([*images, x @ gram], axis=-2) @ t(found), xp=xp)
    return w[..., -1]


def _raised(gram: Array, c: Array, xp: Namespace) -> Array:
    """Return delta (...): c I - E + delta I is positive, by a factorization with raised pivots."""
    t, m = xp.matrix_transpose, gram.shape[-1]
    block = max(BLOCK, -(-m // 16))
    delta = 0.0 * c[..., 0]
    while m:  # of c I - E, whose off-diagonal signs do not matter
        size = min(block, m)
        w, v = attempt(xp.linalg.eigh, gram[..., :size, :size], xp=xp)
        pivots, below = c - w, gram[..., size:, :size] @ v
        raised = xp.maximum(xp.maximum(pivots, c / 50), xp.sum(below * below, axis=-2) / c)  # (9)
        delta = xp.maximum(delta, xp.max(raised - pivots, axis=-1))
        below = below / xp.sqrt(raised)[..., None, :]
        gram, m = gram[..., size:, size:] + below @ t(below), m - size  # (10)
    return delta


def explained(report: fd.SketchReport, sketches: tuple[CertifiedSketch, ...], xp: Namespace) -> fd.SketchReport:
    """Return ``report`` with the numbers of the certificates."""

    def ratio(over: Array, under: Array) -> Array:
        return xp.where(under == 0, xp.where(over > 0, math.inf, 1.0 + over), over / xp.where(under == 0, 1.0, under))

    return report._replace(
        certificate=tuple(ratio(s.escaped, s.least) for s in sketches),
        kappa=tuple(ratio(s.lost, s.eigenvalues.shape[-1] * s.escaped) for s in sketches),
    )
