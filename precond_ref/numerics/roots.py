"""Powers of symmetric positive semidefinite matrices, batched over leading axes.

The definition is the symmetric eigendecomposition: symmetrise, clip eigenvalues at zero, add the ridge. Without a
ridge, powers are those of the pseudo-inverse: eigenvalues of at most ``n u max(w)`` (``u`` the spacing of the dtype
at 1, as in matrix-rank decisions) count as zero and give zero. The iterations are named alternatives that use
matrix products only; `solve` is the inverse times something, by LU where that is safe.

A matrix with a non-finite entry never reaches LAPACK (an infinity can hang it, a NaN can give finite wrong
eigenvalues): its result is NaN, and the other members of the batch are not touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from array_api_compat import array_namespace

from precond_ref.numerics.arrays import clamp, eye_like, identity, largest_entry, normed
from precond_ref.numerics.refresh import renew
from precond_ref.protocol import Array, Namespace, Scalar

# Polar Express (Amsel et al., 2025): odd quintics a s + b s^3 + c s^5, one per step, the last one repeated.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
SAFETY = 1.01  # the first seven are divided by (1.01, 1.01^3, 1.01^5), and so is the start


def eigh(matrix: Array, *, xp: Namespace = None) -> tuple[Array, Array, Array]:
    """Eigenvalues (..., n), ascending and clipped at zero, eigenvectors (..., n, n), and which members are finite.

    The last, (..., 1, 1), marks the members to believe, which have finite entries (the others were replaced by zero
    before the decomposition) and eigenvalues.
    """
    xp = array_namespace(matrix) if xp is None else xp
    finite = xp.isfinite(largest_entry(matrix, (-2, -1), xp))
    half = 0.5 * xp.where(finite, matrix, 0.0)
    w, q = xp.linalg.eigh(half + xp.matrix_transpose(half))
    return clamp(w, 0.0, xp=xp), q, finite & xp.all(w < math.inf, axis=-1)[..., None, None]


def eigenvalues(matrix: Array, *, xp: Namespace = None) -> Array:
    """Eigenvalues (..., n), ascending and clipped at zero; NaN for a non-finite member."""
    xp = array_namespace(matrix) if xp is None else xp
    w, _, finite = eigh(matrix, xp=xp)
    return xp.where(finite[..., 0], w, math.nan)


def spectral(matrix: Array, function: Callable[[Array], Array], *, xp: Namespace = None) -> Array:
    """``Q diag(function(w)) Q^T`` for ``matrix = Q diag(w) Q^T`` (..., n, n); NaN for a non-finite member."""
    xp = array_namespace(matrix) if xp is None else xp
    if 0 in matrix.shape:
        return matrix
    w, q, finite = eigh(matrix, xp=xp)
    power = xp.where(finite[..., 0], function(w), math.nan)
    return (q * power[..., None, :]) @ xp.matrix_transpose(q)


def live(w: Array, xp: Namespace) -> Array:
    """Which of the eigenvalues ``w`` (..., n) >= 0 are not rounding: those above ``n u max(w)``."""
    if w.shape[-1] == 0:
        return w > 0
    return w > w.shape[-1] * xp.finfo(w.dtype).eps * xp.max(w, axis=-1, keepdims=True)


def power(matrix: Array, exponent: float, ridge: Scalar = 0.0, *, xp: Namespace = None) -> Array:
    """``(max(A, 0) + ridge I)^exponent`` for symmetric ``A`` (..., n, n); ``ridge = 0``: of the pseudo-inverse."""
    xp = array_namespace(matrix) if xp is None else xp

    def function(w: Array) -> Array:
        keep = live(w, xp) | (ridge > 0)
        return xp.where(keep, xp.where(keep, w + ridge, 1.0) ** exponent, 0.0)

    return spectral(matrix, function, xp=xp)


def solve(matrix: Array, right: Array, ridge: Scalar, *, xp: Namespace = None) -> Array:
    """``(A + ridge I)^{-1} B`` for positive semidefinite ``A`` (..., n, n) and ``B`` (..., n, k), by LU.

    If rounding may hide the ridge (at most ``4 n u`` times the largest entry of ``A + ridge I``), or a solution is
    longer than any such ``A`` allows (``x^T b < ridge x^T x / 2``), the member has ``power(A, -1, ridge) @ B`` instead,
    as have non-finite ones.
    """
    xp = array_namespace(matrix, right) if xp is None else xp
    if 0 in matrix.shape or 0 in right.shape:
        return right
    one = identity(xp, matrix)
    shift = ridge * one
    damped = 0.5 * matrix + 0.5 * xp.matrix_transpose(matrix) + shift
    n, size = matrix.shape[-1], xp.max(xp.abs(right), axis=(-2, -1), keepdims=True)
    hidden = 4 * n * xp.finfo(matrix.dtype).eps * xp.max(xp.abs(damped), axis=(-2, -1), keepdims=True)
    sure = (hidden < ridge) & (size < math.inf)  # NaN is not less than anything
    b = xp.where(sure, right, 0.0)
    x = xp.linalg.solve(xp.where(sure, damped, one), b)
    size = xp.where(sure & (size > 0), size, 1.0)
    y = ridge * x / size  # its squares do not overflow
    least = 0.5 * size * xp.sum(y * y, axis=-2, keepdims=True)
    sure = sure & xp.all(xp.sum(y * b, axis=-2, keepdims=True) >= least, axis=-1, keepdims=True)

    def definition() -> Array:
        return xp.where(sure, x, power(matrix, -1.0, shift[0, 0], xp=xp) @ right)

    return renew(~xp.all(sure), definition, x)


def inverse_shifted_sqrt(matrix: Array, shift: Scalar = 0.0, *, xp: Namespace = None) -> Array:
    """``(A^{1/2} + shift I)^{-1}`` for symmetric ``A`` (..., n, n); ``shift = 0``: the pseudo-inverse."""
    xp = array_namespace(matrix) if xp is None else xp

    def function(w: Array) -> Array:
        keep = live(w, xp) | (shift > 0)
        return xp.where(keep, 1.0 / xp.where(keep, xp.sqrt(w) + shift, 1.0), 0.0)

    return spectral(matrix, function, xp=xp)


def inverse_sqrt_newton_schulz(matrix: Array, ridge: Scalar, steps: int, *, xp: Namespace = None) -> Array:
    """``(A + ridge I)^{-1/2}`` by ``steps`` Newton-Schulz iterations (ASGO's Algorithm 3), quadratically convergent.

    The smallest root doubles at each step until it is near 1: about ``4 + log2(kappa) / 2`` steps for condition
    number kappa (8, 11, 18 for 1e2, 1e4, 1e8); with fewer it is silently far off.
    """
    xp = array_namespace(matrix) if xp is None else xp
    if 0 in matrix.shape:
        return matrix
    norm = _frobenius(matrix, xp) + ridge
    norm = xp.where(norm == 0, 1.0, norm)
    start = (matrix + ridge * eye_like(xp, matrix)) / norm
    return _coupled_quintic(start, [(2.0, -1.5, 0.5)] * steps, xp) / xp.sqrt(norm)


def inverse_sqrt_polar_express(matrix: Array, ridge: Scalar, steps: int, *, xp: Namespace = None) -> Array:
    """``A^{-1/2}`` by ``steps`` Polar Express iterations; ``ridge`` enters only the norm, as in ASGO's code.

    Ten steps amplify a zero eigenvalue by 2.2e4: eigenvalues below 2e-9 ||A||_F are damped, not resolved.
    """
    xp = array_namespace(matrix) if xp is None else xp
    if 0 in matrix.shape:
        return matrix
    norm = SAFETY * _frobenius(matrix + ridge * eye_like(xp, matrix), xp)
    norm = xp.where(norm == 0, 1.0, norm)
    last = len(POLAR_EXPRESS) - 1
    triples = []
    for step in range(steps):
        a, b, c = POLAR_EXPRESS[min(step, last)]
        triples.append((a / SAFETY, b / SAFETY**3, c / SAFETY**5) if step < last else (a, b, c))
    return _coupled_quintic(matrix / norm, triples, xp) / xp.sqrt(norm)


def inverse_root_coupled_newton(matrix: Array, order: int, ridge: Scalar, steps: int, *, xp: Namespace = None) -> Array:
    """``(A + ridge I)^{-1/order}`` by ``steps`` coupled Newton iterations (Guo and Higham, 2006)."""
    xp = array_namespace(matrix) if xp is None else xp
    if 0 in matrix.shape:
        return matrix
    identity = eye_like(xp, matrix)
    m = matrix + ridge * identity
    norm = _frobenius(m, xp)
    scale = (1 + order) / (2 * xp.where(norm == 0, 1.0, norm))
    m, x = m * scale, identity * scale ** (1 / order)
    for _ in range(steps):
        t = ((order + 1) * identity - m) / order
        x, m = x @ t, xp.linalg.matrix_power(t, order) @ m
    return x


def _frobenius(matrix: Array, xp: Namespace) -> Array:
    """Frobenius norm (..., 1, 1)."""
    peak, _, norm = normed(matrix, (-2, -1), xp)
    return peak * norm


def _coupled_quintic(y: Array, triples: list[tuple[float, float, float]], xp: Namespace) -> Array:
    """``Z`` with ``Z -> Y_0^{-1/2}``, both factors under the same odd quintics."""
    z = eye_like(xp, y)
    for a, b, c in triples:
        zy = z @ y
        polynomial = b * zy + c * (zy @ zy)
        y, z = a * y + y @ polynomial, a * z + polynomial @ z
    return z


def polar(matrix: Array, *, xp: Namespace = None) -> Array:
    """``U V^T`` for ``matrix = U diag(s) V^T`` (..., m, n); ``s <= max(m, n) u max(s)`` counts as zero.

    Zero for a zero matrix, NaN for a non-finite member.
    """
    xp = array_namespace(matrix) if xp is None else xp
    if 0 in matrix.shape:
        return matrix
    finite = xp.isfinite(largest_entry(matrix, (-2, -1), xp))
    u, s, vh = xp.linalg.svd(xp.where(finite, matrix, 0.0), full_matrices=False)
    keep = s > max(matrix.shape[-2:]) * xp.finfo(s.dtype).eps * xp.max(s, axis=-1, keepdims=True)
    finite = finite & (s[..., :1, None] < math.inf)
    return xp.where(finite, (u * xp.astype(keep, s.dtype)[..., None, :]) @ vh, math.nan)


def polar_muon(matrix: Array, steps: int, *, xp: Namespace = None) -> Array:
    """Muon's approximation of `polar` (..., m, n): singular values come into about [0.7, 1.2]; zero stays zero."""
    xp = array_namespace(matrix) if xp is None else xp
    if 0 in matrix.shape:
        return matrix
    wide = matrix.shape[-2] <= matrix.shape[-1]
    _, unit, norm = normed(matrix, (-2, -1), xp)
    x = (unit if wide else xp.matrix_transpose(unit)) / xp.where(norm == 0, 1.0, norm)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(steps):
        gram = x @ xp.matrix_transpose(x)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if wide else xp.matrix_transpose(x)
