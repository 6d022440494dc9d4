"""Powers of symmetric positive semidefinite matrices, batched over leading axes.

The definition is the symmetric eigendecomposition: symmetrise, clip eigenvalues at zero, add the ridge. Without a
ridge, powers are those of the pseudo-inverse: eigenvalues of at most ``n u max(w)`` (``u`` the spacing of the dtype
at 1, as in matrix-rank decisions) count as zero and give zero. The iterations are named alternatives that use
matrix products only. `solve` multiplies by the inverse, with LU if LU is accurate.

`apply` makes ``f(A) G`` from the coordinates ``Q^T G``. A formed matrix ``f(A)`` would have rounding of the size
``u f(0)``, which hides its other part if the ridge is small; it is formed where all eigenvalues are known and it saves
a large product. An eigenvalue of at most ``t = 16 u max(w)`` is unknown
within [0, t], and its computed eigenvector has a part of up to t / w_j in the eigenvector of each other w_j (measured:
10 u instead of 16 u). Therefore there are two decisions:

* The part of G along such eigenvectors is rounding if none of its entries is more than t times the largest entry of
  ``A^+ G``, because G is then in the range of a matrix within t of ``A``. The rounding comes from the known
  eigenvectors. So its factor is the mean of their ``f(w_j)``, weighted with ``|q_j^T g| / w_j``, by which they
  contribute to it. A larger part is real.
* A real part has the factor ``f(0)``. If ``A >= weight G G^T`` is known, the eigenvalue is not 0 but the amount that G
  itself has added, ``weight ||Q_0^T G||_F^2``. (An amount above 2 t would be visible in A; it counts as 0.)

The result is that of a matrix within a few t of ``A`` for a gradient within its rounding, whatever the ridge.

A matrix with a non-finite entry never reaches LAPACK (an infinity can hang it, a NaN can give finite wrong
eigenvalues): its result is NaN, and the other members of the batch do not change. The result is also NaN for a member
on which LAPACK fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from precond_ref.fields import is_python_number, is_zero
from precond_ref.numerics.arrays import (
    clamp,
    eye_like,
    finite_members,
    frobenius,
    identity,
    largest_entry,
    normed,
    own,
    square,
)
from precond_ref.numerics.axes import multiply
from precond_ref.numerics.lapack import attempt
from precond_ref.numerics.refresh import renew, surely
from precond_ref.numerics.template import eye, full
from precond_ref.typing import Array, Namespace, Scalar

CERTAIN = 16
"""Spacings of the largest eigenvalue, t = CERTAIN u max(w), by which rounding may change another eigenvalue."""

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
ITERATIONS = ("polar_express", "newton_schulz", "coupled_newton")
"""Names of the solvers of `inverse_sqrt`."""
SAFETY = 1.01  # the first seven triples are divided by (1.01, 1.01^3, 1.01^5), and the start by 1.01


def eigh(matrix: Array, *, xp: Namespace = None) -> tuple[Array, Array, Array]:
    """Return eigenvalues (..., n), ascending and clipped at zero, eigenvectors (..., n, n), and a mark (..., 1, 1).

    The mark is true for members with finite entries and finite eigenvalues. The results of other members mean nothing:
    a member with an entry that is not finite is replaced by zero before the decomposition.
    """
    xp = array_namespace(matrix) if xp is None else xp
    finite = xp.isfinite(largest_entry(matrix, (-2, -1), xp))
    half = 0.5 * xp.where(finite, matrix, 0.0)
    w, q = attempt(xp.linalg.eigh, half + xp.matrix_transpose(half), wider=True, xp=xp)
    return clamp(w, 0.0, xp=xp), q, finite & xp.all(w < math.inf, axis=-1)[..., None, None]


def eigenvalues(matrix: Array, *, xp: Namespace = None) -> Array:
    """Return the eigenvalues (..., n), ascending and clipped at zero; NaN for a non-finite member."""
    xp = array_namespace(matrix) if xp is None else xp
    w, _, finite = eigh(matrix, xp=xp)
    return xp.where(finite[..., 0], w, math.nan)


def live(w: Array, xp: Namespace) -> Array:
    """Return which of the eigenvalues ``w`` (..., n) >= 0 are not rounding: those above ``n u max(w)``."""
    if w.shape[-1] == 0:
        return w > 0
    return w > w.shape[-1] * xp.finfo(w.dtype).eps * xp.max(w, axis=-1, keepdims=True)


class Law(NamedTuple):
    """A function of eigenvalues: f(w) = (w + ridge)^exponent, or with ``root`` (w^{1/2} + ridge)^exponent."""

    exponent: float
    ridge: Scalar
    root: bool = False

    def within(self, dtype: Any, xp: Namespace) -> Law:
        """Return the same law for ``dtype``: a ridge that is a number below its smallest normal number becomes 0."""
        if is_python_number(self.ridge) and self.ridge < float(xp.finfo(dtype).smallest_normal):
            return self._replace(ridge=0.0)
        return self

    def __call__(self, w: Array, xp: Namespace) -> Array:
        return ((xp.sqrt(w) if self.root else w) + self.ridge) ** self.exponent

    def inverse(self, f: Array, xp: Namespace) -> Array:
        """Return w >= 0 with f(w) = ``f``; 0 for f = 0, NaN for NaN."""
        w = clamp(xp.where(f == 0, math.inf, f) ** (1 / self.exponent) - self.ridge, 0.0, xp=xp)
        return w * w if self.root else w


class Root(NamedTuple):
    """A matrix function ``P = Q diag(f) Q^T``, not formed."""

    basis: Array
    """Q, orthonormal columns, (..., n, n)."""
    eigenvalues: Array
    """f >= 0, (..., n); NaN for a member without a Q."""


def identity_root(*shape: int, scale: Scalar = 1.0) -> Root:
    """Return the template of ``scale I`` of ``shape`` (..., n, n)."""
    return Root(eye(*shape), full(scale, *shape[:-1]))


def decompose(matrix: Array, law: Law, *, xp: Namespace = None) -> tuple[Root, Array]:
    """Return ``law`` of a symmetric matrix (..., n, n) and its eigenvalues (..., n), ascending; NaN if not finite."""
    xp = array_namespace(matrix) if xp is None else xp
    if 0 in matrix.shape:
        nothing = xp.sum(matrix, axis=-1)
        return Root(matrix, nothing), nothing
    w, q, finite = eigh(matrix, xp=xp)
    law = law.within(w.dtype, xp)
    known, _ = _known(w, law, xp)
    if surely(known):  # and finite
        return Root(q, law(w, xp)), w
    keep = known | (law.ridge > 0)
    f = xp.where(keep, law(xp.where(keep, xp.where(known, w, 0.0), 1.0), xp), 0.0)
    return Root(q, xp.where(finite[..., 0], f, math.nan)), xp.where(finite[..., 0], w, math.nan)


def _known(w: Array, law: Law, xp: Namespace) -> tuple[Array, Array]:
    """Return which eigenvalues (..., n) are known, and the largest: above t, or without a ridge as in `live`."""
    largest, u = xp.max(w, axis=-1, keepdims=True), xp.finfo(w.dtype).eps
    if is_python_number(law.ridge):
        return w > (CERTAIN if law.ridge > 0 else w.shape[-1]) * u * largest, largest
    return w > xp.where(law.ridge > 0, CERTAIN * u * largest, w.shape[-1] * u * largest), largest


def renewed(due: Any, matrix: Array, law: Law, kept: Root | None, *, xp: Namespace = None) -> tuple[Root, Array | None]:
    """Return `decompose` if ``due`` or without a ``kept`` root; else ``kept``, and None for the eigenvalues."""
    if kept is None:
        return decompose(matrix, law, xp=xp)
    xp = array_namespace(matrix) if xp is None else xp

    def root() -> Root:
        basis, eigenvalues = decompose(matrix, law, xp=xp)[0]
        return Root(own(basis, xp), eigenvalues)  # LAPACK's memory is by columns; a new layout would compile again

    return renew(due, root, kept), None


def accuracy(w: Array, law: Law, *, xp: Namespace = None) -> Array:
    """Return the relative error (...) of a direction that the conditioning allows, for a gradient in the range.

    It is ``16 u (max(w) + ridge) / (min(w) + ridge)`` with the unit roundoff u and the smallest of the known
    eigenvalues ``w`` (..., n) (for ``root``: the ridge squared), whatever the ridge; NaN for a member with NaN in w.
    """
    xp = array_namespace(w) if xp is None else xp
    unit = 8 * xp.finfo(w.dtype).eps
    if w.shape[-1] == 0:
        return xp.sum(w, axis=-1) + unit
    ridge = law.ridge * law.ridge if law.root else law.ridge
    known, largest = _known(w, law, xp)
    least = xp.min(xp.where(known, w, largest), axis=-1)
    largest = largest[..., 0]
    nothing = largest == 0
    return unit * xp.where(nothing, 1.0, (largest + ridge) / xp.where(nothing, 1.0, least + ridge))


class GramReport(NamedTuple):
    """The value of ``diagnose`` of methods with several statistics: one entry per statistic."""

    eigenvalues: tuple[Array, ...]
    """Eigenvalues of each statistic, ascending, clipped at zero, (..., d); NaN if the statistic is not finite."""
    finite: Array
    """True if the member's state is finite and its statistics could be decomposed, (...)."""
    accuracy: tuple[Array, ...]
    """Relative error of a direction that each statistic allows, see `accuracy`, (...)."""


def report(matrices: Sequence[Array], finite: Array, laws: Sequence[Law], xp: Namespace) -> GramReport:
    """Return the spectra of ``matrices`` (..., d, d), each with its law; ``finite`` marks the finite members."""
    w = tuple(eigenvalues(matrix, xp=xp) for matrix in matrices)
    if w:
        finite = finite & finite_members(xp, *w, core_ndims=tuple(each.ndim - finite.ndim for each in w))
    return GramReport(w, finite, tuple(accuracy(each, law, xp=xp) for each, law in zip(w, laws, strict=True)))


def form(root: Root, *, xp: Namespace = None) -> Array:
    """Return the matrix P (..., n, n)."""
    xp = array_namespace(root.basis) if xp is None else xp
    return (root.basis * root.eigenvalues[..., None, :]) @ xp.matrix_transpose(root.basis)


def apply(
    tensor: Array,
    known: Mapping[int, tuple[Root, Array | None]],
    law: Law,
    weight: Scalar = 0.0,
    *,
    xp: Namespace = None,
) -> Array:
    """Return ``tensor`` (..., d_1, ..., d_k) times a `Root` by ``law`` along each axis in ``known``, counted from 0.

    ``known`` has with each root the eigenvalues of its matrix, or None: then they follow from the root.
    Each of these matrices must be at least ``weight`` times the Gram matrix of ``tensor`` along its axis.
    """
    xp = array_namespace(tensor) if xp is None else xp
    if 0 in tensor.shape:
        return 1.0 * tensor
    law = law.within(tensor.dtype, xp)
    if _by_matrix(tensor, known, law, xp):
        for axis, (root, _) in known.items():
            tensor = multiply(tensor, form(root, xp=xp), axis, xp)
        return tensor
    for axis, (root, _) in known.items():
        tensor = multiply(tensor, xp.matrix_transpose(root.basis), axis, xp)
    gains = [_gain(tensor, axis, root.eigenvalues, w, law, weight, xp) for axis, (root, w) in known.items()]
    for gain in gains:
        tensor = tensor * gain
    for axis, (root, _) in known.items():
        tensor = multiply(tensor, root.basis, axis, xp)
    return tensor


def _by_matrix(tensor: Array, known: Mapping[int, tuple[Root, Array | None]], law: Law, xp: Namespace) -> bool:
    """Return True if the matrices may be formed, all eigenvalues being known, and one product less is worth it."""
    if is_zero(law.ridge):
        return False
    stack = next(iter(known.values()))[0].eigenvalues.ndim - 1
    entries = math.prod(tensor.shape[stack:])
    if any(2 * tensor.shape[stack + axis] ** 2 > entries for axis in known):
        return False
    return all(
        surely(_known(law.inverse(root.eigenvalues, xp) if w is None else w, law, xp)[0]) for root, w in known.values()
    )


def _gain(a: Array, axis: int, f: Array, w: Array | None, law: Law, weight: Scalar, xp: Namespace) -> Array:
    """Return the factors of the coordinates ``a`` along ``axis``; NaN for each NaN in ``f``."""
    stack = f.ndim - 1
    core, axis = tuple(range(stack, a.ndim)), stack + axis

    def along(v: Array) -> Array:
        return xp.reshape(v, (*v.shape[:-1], *(v.shape[-1] if i == axis else 1 for i in core)))

    if is_zero(law.ridge):  # unknown eigenvalues have the factor 0
        return along(f)
    w = law.inverse(f, xp) if w is None else w
    known, largest = _known(w, law, xp)
    if surely(known):
        return along(f)
    unit, finite = CERTAIN * xp.finfo(w.dtype).eps, along(xp.where(known, f, 0.0))
    ratio, known, f, size = along(largest / xp.where(known, w, math.inf)), along(known), along(f), xp.abs(a)
    most = float(xp.finfo(a.dtype).max) * xp.finfo(a.dtype).eps  # so that no share, nor their sum, overflows
    share, outside = clamp(size, 0.0, most, xp=xp) * ratio, xp.where(known, 0.0, size)  # of A^+ G, times max(w)
    top, total = xp.max(share, axis=core, keepdims=True), xp.sum(share, axis=axis, keepdims=True)
    real = xp.max(outside, axis=axis, keepdims=True) > unit * top
    mean = xp.sum(finite * share, axis=axis, keepdims=True) / xp.where(total > 0, total, 1.0)
    beyond = f
    if not is_zero(weight):
        put = weight * xp.sum(xp.where(real, square(outside, xp), 0.0), axis=core, keepdims=True)
        fresh = (put > 0) & (put <= 2 * unit * along(largest))
        beyond = xp.where(fresh, law(xp.where(fresh, put, 1.0), xp), f)
    if not is_python_number(law.ridge):
        known = known | (f == 0)  # there is no ridge
    return xp.where(known, f, xp.where(real, beyond, mean))


def power(matrix: Array, exponent: float, ridge: Scalar = 0.0, *, xp: Namespace = None) -> Array:
    """Return ``(max(A, 0) + ridge I)^exponent`` for symmetric ``A`` (..., n, n); ``ridge = 0``: the pseudo-inverse."""
    return form(decompose(matrix, Law(exponent, ridge), xp=xp)[0], xp=xp)


def solve(matrix: Array, right: Array, ridge: Scalar, weight: Scalar = 0.0, *, xp: Namespace = None) -> Array:
    """Return ``(A + ridge I)^{-1} B`` for positive semidefinite ``A`` (..., n, n) and ``B`` (..., n, k), by LU.

    The error of LU is about ``u max(A + ridge I) / ridge``, also for B in the range of A. A member has the result of
    `apply` instead if LU may cost more than half of the digits (ridge at most ``u^{1/2}`` times the largest entry of
    ``A + ridge I``), if a solution is longer than any such ``A`` allows (``x^T b < ridge x^T x / 2``), or if the member
    is not finite.
    """
    xp = array_namespace(matrix, right) if xp is None else xp
    if 0 in matrix.shape or 0 in right.shape:
        return right

    def definition(ridge: Scalar, weight: Scalar) -> Array:
        law = Law(-1.0, ridge)
        return apply(right, {0: decompose(matrix, law, xp=xp)}, law, weight, xp=xp)

    sure = by_lu(matrix, ridge, xp)
    if surely(~sure):
        return definition(ridge, weight)
    one = identity(xp, matrix)
    shift = ridge * one
    damped = 0.5 * matrix + 0.5 * xp.matrix_transpose(matrix) + shift
    size = largest_entry(right, (-2, -1), xp)
    sure = sure & (size < math.inf)
    b = right
    if not surely(sure):
        damped, b = xp.where(sure, damped, one), xp.where(sure, right, 0.0)
    (x,) = attempt(lambda a, b: (xp.linalg.solve(a, b),), damped, b, xp=xp)
    size = xp.where(sure & (size > 0), size, 1.0)
    y = ridge * x / size  # its squares do not overflow
    least = 0.5 * size * xp.sum(y * y, axis=-2, keepdims=True)
    sure = sure & xp.all(xp.sum(y * b, axis=-2, keepdims=True) >= least, axis=-1, keepdims=True)
    given = shift[0, 0], weight * one[0, 0]  # arrays: the branch of a compiler takes no symbolic float
    return renew(~xp.all(sure), lambda: xp.where(sure, x, definition(*given)), x)


def by_lu(matrix: Array, ridge: Scalar, xp: Namespace) -> Array:
    """Return whether `solve` may use LU for ``A + ridge I``, of ``A`` (..., n, n): (..., 1, 1); false for NaN.

    The largest entry of ``A`` is on the diagonal.
    """
    largest = largest_entry(matrix, (-2, -1), xp) + ridge
    return float(xp.finfo(matrix.dtype).eps) ** 0.5 * largest < ridge


def inverse_shifted_sqrt(matrix: Array, shift: Scalar = 0.0, *, xp: Namespace = None) -> Array:
    """Return ``(A^{1/2} + shift I)^{-1}`` for symmetric ``A`` (..., n, n); ``shift = 0``: the pseudo-inverse."""
    return form(decompose(matrix, Law(-1.0, shift, root=True), xp=xp)[0], xp=xp)


def inverse_sqrt_newton_schulz(matrix: Array, ridge: Scalar, steps: int, *, xp: Namespace = None) -> Array:
    """Return ``(A + ridge I)^{-1/2}`` by ``steps`` Newton-Schulz iterations (ASGO's Algorithm 3), of second order.

    The smallest root doubles at each step until it is near 1. This takes about ``4 + log2(kappa) / 2`` steps for the
    condition number kappa (8, 11, 18 for 1e2, 1e4, 1e8); with fewer steps the result is far off, without a warning.
    """
    xp = array_namespace(matrix) if xp is None else xp
    if 0 in matrix.shape:
        return matrix
    norm = frobenius(matrix, (-2, -1), xp) + ridge
    norm = xp.where(norm == 0, 1.0, norm)
    start = (matrix + ridge * eye_like(xp, matrix)) / norm
    return _coupled_quintic(start, [(2.0, -1.5, 0.5)] * steps, xp) / xp.sqrt(norm)


def inverse_sqrt_polar_express(matrix: Array, ridge: Scalar, steps: int, *, xp: Namespace = None) -> Array:
    """Return ``A^{-1/2}`` by ``steps`` Polar Express iterations; ``ridge`` enters only the norm, as in ASGO's code.

    Ten steps amplify a zero eigenvalue by 2.2e4: eigenvalues below 2e-9 ||A||_F are damped, not resolved.
    """
    xp = array_namespace(matrix) if xp is None else xp
    if 0 in matrix.shape:
        return matrix
    norm = SAFETY * frobenius(matrix + ridge * eye_like(xp, matrix), (-2, -1), xp)
    norm = xp.where(norm == 0, 1.0, norm)
    last = len(POLAR_EXPRESS) - 1
    triples = []
    for step in range(steps):
        a, b, c = POLAR_EXPRESS[min(step, last)]
        triples.append((a / SAFETY, b / SAFETY**3, c / SAFETY**5) if step < last else (a, b, c))
    return _coupled_quintic(matrix / norm, triples, xp) / xp.sqrt(norm)


def inverse_root_coupled_newton(matrix: Array, order: int, ridge: Scalar, steps: int, *, xp: Namespace = None) -> Array:
    """Return ``(A + ridge I)^{-1/order}`` by ``steps`` coupled Newton iterations (Guo and Higham, 2006)."""
    xp = array_namespace(matrix) if xp is None else xp
    if 0 in matrix.shape:
        return matrix
    identity = eye_like(xp, matrix)
    size, unit, norm = normed(matrix + ridge * identity, (-2, -1), xp)  # size * norm may overflow
    scale = (1 + order) / (2 * xp.where(norm == 0, 1.0, norm))
    m, x = unit * scale, identity * (scale / size) ** (1 / order)
    for _ in range(steps):
        t = ((order + 1) * identity - m) / order
        x, m = x @ t, xp.linalg.matrix_power(t, order) @ m
    return x


def inverse_root_higher_order(
    matrix: Array, exponent: Fraction, ridge: Scalar, steps: int, *, xp: Namespace = None
) -> Array:
    """Return ``(A + ridge I)^{-q/a}`` for ``exponent = q/a``: a Newton round, then ``steps`` rounds of third order.

    The rounds are those of Lakic (1998).
    """
    xp = array_namespace(matrix) if xp is None else xp
    if 0 in matrix.shape:
        return matrix
    a, power = exponent.denominator, xp.linalg.matrix_power
    identity = eye_like(xp, matrix)
    m = matrix + ridge * identity
    trace = xp.linalg.trace(m)[..., None, None]
    scale = 1.0 / xp.where(trace == 0, 1.0, trace)
    m, x = m * scale, identity * scale ** (1 / a)
    t = ((a + 1) * identity - m) / a
    x, m = x @ t, power(t, a) @ m
    for _ in range(steps):
        rest = identity - m
        t = identity + (1 / a) * rest + ((1 + a) / (2 * a * a)) * (rest @ rest)
        x, m = x @ t, power(t, a) @ m
    return power(x, exponent.numerator)


def inverse_sqrt(matrix: Array, ridge: Scalar, solver: str, steps: int, *, xp: Namespace = None) -> Array:
    """Return an approximation of ``(A + ridge I)^{-1/2}`` by ``steps`` iterations of ``solver``, of `ITERATIONS`."""
    if solver == "polar_express":
        return inverse_sqrt_polar_express(matrix, ridge, steps, xp=xp)
    if solver == "newton_schulz":
        return inverse_sqrt_newton_schulz(matrix, ridge, steps, xp=xp)
    return inverse_root_coupled_newton(matrix, 2, ridge, steps, xp=xp)


def _coupled_quintic(y: Array, triples: list[tuple[float, float, float]], xp: Namespace) -> Array:
    """Return ``Z`` with ``Z -> Y_0^{-1/2}``; both factors go through the same odd quintics."""
    z = eye_like(xp, y)
    for a, b, c in triples:
        zy = z @ y
        polynomial = b * zy + c * (zy @ zy)
        y, z = a * y + y @ polynomial, a * z + polynomial @ z
    return z


def polar(matrix: Array, *, xp: Namespace = None) -> Array:
    """Return ``U V^T`` for ``matrix = U diag(s) V^T`` (..., m, n); ``s <= max(m, n) u max(s)`` counts as zero.

    The result is zero for a zero matrix, and NaN for a non-finite member.
    """
    xp = array_namespace(matrix) if xp is None else xp
    if 0 in matrix.shape:
        return matrix
    finite = xp.isfinite(largest_entry(matrix, (-2, -1), xp))
    u, s, vh = attempt(partial(xp.linalg.svd, full_matrices=False), xp.where(finite, matrix, 0.0), wider=True, xp=xp)
    keep = s > max(matrix.shape[-2:]) * xp.finfo(s.dtype).eps * xp.max(s, axis=-1, keepdims=True)
    finite = finite & (s[..., :1, None] < math.inf)
    return xp.where(finite, (u * xp.astype(keep, s.dtype)[..., None, :]) @ vh, math.nan)
