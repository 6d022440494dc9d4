"""Approximations of the polar factor by odd polynomials, batched over leading axes: matrix products only.

A step is ``X <- a X + (b A + c A A) X`` with ``A = X X^T``, from ``X = N / nu``. It keeps the singular vectors and
sends each singular value s through ``p(s) = a s + b s^3 + c s^5``. So for ``N = U diag(s) V^T``::

    O = U diag(q(s / nu)) V^T,   q = p_k o ... o p_1

(not with ``normalization="aol"``, which has no one nu). The definition is `precond_ref.numerics.roots.polar`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from array_api_compat import array_namespace

from precond_ref.fields import is_python_number, is_zero
from precond_ref.numerics.arrays import by_largest, frobenius, normed
from precond_ref.numerics.axes import gram_of
from precond_ref.numerics.ema import sqrt
from precond_ref.numerics.roots import POLAR_EXPRESS, SAFETY, eigenvalues
from precond_ref.typing import Array, Namespace, Scalar

Triple = tuple[float, float, float]
"""a, b, c."""


def _table(text: str) -> tuple[Triple, ...]:
    rows = [line.split() for line in text.split("/")]
    return tuple((float(a), float(b), float(c)) for a, b, c in rows)


SETS: dict[str, tuple[Triple, ...]] = {
    "jordan": _table("3.4445 -4.7750 2.0315"),
    "quintic5": _table(
        "4.0848 -6.8946 2.9270 / 3.9505 -6.3029 2.6377 / 3.7418 -5.5913 2.3037 / 2.8769 -3.1427 1.2046 / "
        "2.8366 -3.0525 1.2012"
    ),
    "polar_express": (
        *((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]),
        POLAR_EXPRESS[-1],
    ),
    "dion": _table(
        "8.156554524902461 -22.483292925577953 15.878769915207466 / "
        "4.042929935166728 -2.808917465908707 0.5000178451051303 / "
        "3.891667802292663 -2.772484153217686 0.5060648178503394 / "
        "3.285753657755655 -2.368129493342538 0.4644902423300309 / "
        "2.346541325859639 -1.7097828382687088 0.42323551169305323"
    ),
    "cans": _table(
        "8.4703 -25.1081 18.6293 / 4.1828 -3.1087 .5806 / 3.9619 -2.9541 .5630 / 3.2866 -2.4647 .5074 / "
        "2.2737 -1.6447 .4162"
    ),
    "classical": _table("2 -1.5 .5"),
    "deepseekv4": _table(" / ".join(8 * ["3.4445 -4.7750 2.0315"] + 2 * ["2 -1.5 .5"])),
    "cubic5": _table(
        "3.3656576 -3.3420992 0 / 2.5744352 -1.4957376 0 / 2.5368962 -1.4312570 0 / 2.4418906 -1.2764040 0 / "
        "2.2230472 -.9630650 0"
    ),
    "aol4": _table("4.0098 -7.0585 2.4635 / 3.4585 -5.5479 2.5959 / 2.7573 -3.2939 1.4254 / 2.7215 -3.0494 1.3169"),
}
"""Sets by name, with the digits of their authors' codes; "dion" is ``remez(1e-3, 5, 0.02, 0.02)``."""

NORMALIZATIONS = ("frobenius", "spectral", "schatten4", "aol")


def triples(coefficients: Any, steps: int, after_last: str = "repeat") -> tuple[Triple, ...]:
    """Return ``steps`` triples. ``coefficients`` is the name of a set, one triple, or a sequence of triples.

    After the last triple of a sequence, "repeat" goes on with the last one and "cycle" with the first one.
    """
    table = SETS[coefficients] if isinstance(coefficients, str) else tuple(coefficients)
    if not isinstance(table[0], Sequence):
        table = (table,)
    last = len(table) - 1
    return tuple(table[k % len(table) if after_last == "cycle" else min(k, last)] for k in range(steps))


def image(s: Any, polynomials: Sequence[Triple]) -> Any:
    """Return q(s), the composition of ``polynomials``, for numbers or arrays ``s``."""
    for a, b, c in polynomials:
        s = a * s + b * s**3 + c * s**5
    return s


def remez(lower: float, steps: int, safety: float = 0.0, cushion: float = 0.0) -> tuple[Triple, ...]:
    """Return the triples of Polar Express (Amsel et al., arXiv 2505.16932) for singular values in [``lower``, 1].

    Each polynomial is the best uniform approximation of 1 on the image of the interval under the polynomials before it,
    or on the part of this image above ``cushion`` times its upper end. All triples but the last are divided by
    (f, f^3, f^5), f = 1 + ``safety``. With ``safety = cushion = 0`` the triples are those of CANS (Grishina et al.,
    arXiv 2506.10935).
    """
    low, high, found = lower, 1.0, []
    for step in range(steps):
        a, b, c = _best(max(low, cushion * high), high)
        if cushion * high > low:
            scale = 2 / (image(low, [(a, b, c)]) + image(high, [(a, b, c)]))
            a, b, c = scale * a, scale * b, scale * c
        if step < steps - 1:
            f = 1 + safety
            a, b, c = a / f, b / f**3, c / f**5
        found.append((a, b, c))
        low = image(low, [(a, b, c)])
        low, high = min(low, 2 - low), 2 - low
    return tuple(found)


def _best(low: float, high: float) -> Triple:
    """Return the odd quintic p with least max |1 - p| on [low, high]: 1 - p = E, -E, E, -E at low, q, r, high."""
    if low / high >= 1 - 5e-6:
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    q, r, error = (3 * low + high) / 4, (low + 3 * high) / 4, math.inf
    for _ in range(50):  # a few are enough
        points, signs = (low, q, r, high), (1, -1, 1, -1)
        y = [x * x for x in points]
        weights = [1 / math.prod([y[i] - y[j] for j in range(4) if j != i]) for i in range(4)]
        # p(x) / x is a quadratic in x^2: its third divided difference is zero.
        old, error = (
            error,
            (
                sum(w / x for w, x in zip(weights, points, strict=True))
                / sum(w * s / x for w, x, s in zip(weights, points, signs, strict=True))
            ),
        )
        f = [(1 - s * error) / x for s, x in zip(signs, points, strict=True)]
        first, second = (f[1] - f[0]) / (y[1] - y[0]), (f[2] - f[1]) / (y[2] - y[1])
        c = (second - first) / (y[2] - y[0])
        b = first - c * (y[0] + y[1])
        a = f[0] - b * y[0] - c * y[0] ** 2
        root = math.sqrt(9 * b * b - 20 * a * c)
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
        if abs(error - old) <= 1e-15:
            break
    return a, b, c


def normalized(
    matrix: Array, normalization: str, factor: Scalar, eps: Scalar, eps_rule: str, flipped: bool, rounded: bool,
    xp: Namespace,
) -> Array:  # fmt: skip
    """Return ``N / nu`` of (..., m, n); zero stays zero. See `orthogonalized`.

    The matrix is first divided by its largest magnitude, so that no norm over- or underflows; if the result is
    ``rounded`` to fewer digits, only where one would, which takes fewer passes.
    """
    size, unit, norm = (normed if rounded else by_largest)(matrix, (-2, -1), xp)
    if normalization in ("schatten4", "aol"):
        wide = unit if not flipped else xp.matrix_transpose(unit)
        gram = wide @ xp.matrix_transpose(wide)
        if normalization == "schatten4":
            square = frobenius(gram, (-2, -1), xp)
        else:
            square = xp.sum(xp.abs(gram), axis=-1, keepdims=True)
        nu = xp.sqrt(square) if is_zero(eps) else xp.maximum(xp.sqrt(square), sqrt(eps) / size)
        nu = xp.matrix_transpose(nu) if flipped else nu
    else:
        if normalization == "spectral":
            small = unit if unit.shape[-2] <= unit.shape[-1] else xp.matrix_transpose(unit)
            norm = xp.sqrt(eigenvalues(small @ xp.matrix_transpose(small), xp=xp)[..., -1:, None])
        nu = norm
        if not (is_python_number(factor) and factor == 1):
            nu = factor * norm
        if not is_zero(eps):
            nu = nu + eps / size if eps_rule == "add" else xp.maximum(nu, eps / size)
    return unit / xp.where(nu == 0, 1.0, nu)


def orthogonalized(
    matrix: Array,
    polynomials: Sequence[Triple],
    normalization: str = "frobenius",
    factor: Scalar = 1.0,
    eps: Scalar = 0.0,
    eps_rule: str = "add",
    *,
    flipped: bool | None = None,
    compute_dtype: str | None = None,
    xp: Namespace = None,
) -> Array:
    """Return O of a matrix (..., m, n) by ``polynomials``, one triple for each step; zero stays zero.

    ``normalization`` chooses nu, with f = ``factor`` and e = ``eps``. "frobenius" and "spectral" are ``f norm + e``
    with ``eps_rule="add"``, ``max(f norm, e)`` with "max". "schatten4" is ``sqrt(max(||N N^T||_F, e))``. "aol" divides
    row i of the wide matrix by ``sqrt(max(sum_j |N N^T|_ij, e))``. With ``flipped`` (default: if m > n) the steps work
    on the transpose. ``compute_dtype="bfloat16"`` rounds ``N / nu`` and the results of the steps to bfloat16.
    """
    xp = array_namespace(matrix) if xp is None else xp
    if 0 in matrix.shape:
        return matrix
    flipped = matrix.shape[-2] > matrix.shape[-1] if flipped is None else flipped
    low = _rounding(matrix, compute_dtype, xp)
    x = low(normalized(matrix, normalization, factor, eps, eps_rule, flipped, compute_dtype is not None, xp))
    if math.prod(x.shape[:-2]) == 1:
        x = xp.reshape(x, x.shape[-2:])  # PyTorch copies what it multiplies in a stack
    for a, b, c in polynomials:
        gram = low(gram_of(xp.matrix_transpose(x) if flipped else x, xp))
        poly = low(b * gram) if c == 0 else _sum(b, gram, c, gram, gram, low, xp)
        x = _sum(a, x, 1.0, *((x, poly) if flipped else (poly, x)), low, xp)
    x = xp.reshape(x, matrix.shape)
    return x if compute_dtype is None else xp.astype(x, matrix.dtype)


def _sum(
    beta: float, c: Array, alpha: float, a: Array, b: Array, low: Callable[[Array], Array], xp: Namespace
) -> Array:
    """``beta C + alpha A B``; rounded once where the library has it as one call, else each part too."""
    fused = getattr(xp, {2: "addmm", 3: "baddbmm"}.get(c.ndim, ""), None)
    if fused is not None:
        return fused(c, a, b, beta=beta, alpha=alpha)
    product = low(a @ b)
    return low(beta * c + (product if alpha == 1 else alpha * product))


def _rounding(like: Array, compute_dtype: str | None, xp: Namespace) -> Callable[[Array], Array]:
    """Return a function that rounds to ``compute_dtype``; without bfloat16, Dekker's splitting keeps its digits."""
    if compute_dtype is None or xp.finfo(like.dtype).bits < 32:
        return lambda x: x
    if hasattr(xp, "bfloat16"):
        return lambda x: xp.astype(x, xp.bfloat16, copy=False)
    digits = round(-math.log2(float(xp.finfo(like.dtype).eps))) + 1
    split, least = 2.0 ** (digits - 8) + 1.0, 1.5 * 2.0 ** (digits - 134)

    def rounded(x: Array) -> Array:
        t = split * x
        return xp.where(xp.abs(x) < 2.0**-126, (x + least) - least, t - (t - x))  # subnormal: multiples of 2^-133

    return rounded
