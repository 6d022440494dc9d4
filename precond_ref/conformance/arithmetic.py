"""Functions that NumPy has for float64 but not for object arrays of mpmath numbers, so that one text computes in both.

Each function looks at its argument. mpmath computes object arrays and mpmath numbers, with the digits that are set
(`DIGITS` for the vectors). NumPy computes anything else in float64. NumPy's other functions (``+ - * / @``, `where`,
`stack`, `tensordot`, `maximum`, ...) work on both. Numbers that float64 does not have exactly are written with `real`.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

Array = Any  # float64, or objects that are mpmath numbers

DIGITS = 50
TINY = 1e-40
"""A number below this in 50 digits, relative to the largest of its kind, is a zero with rounding errors."""
BITS = 130
"""Numbers that are equal to so many bits count as equal: 50 digits have more bits, float64 has far fewer."""


def is_exact(value: Any) -> bool:
    """Return whether a value is computed by mpmath."""
    return getattr(getattr(value, "dtype", None), "kind", "") == "O" or hasattr(value, "_mpf_")


def number(value: Any) -> Any:
    """Return the mpmath number with exactly this value; a `Fraction` has the digits that are set."""
    import mpmath as mp

    if isinstance(value, Fraction):
        return mp.mpf(value.numerator) / value.denominator
    return value if isinstance(value, mp.mpf) else mp.mpf(float(value))


def exact(values: Any) -> Array:
    """Return an object array of mpmath numbers with exactly these values."""
    values = np.asarray(values)
    out = np.empty(values.shape, dtype=object)
    out.reshape(-1)[:] = [number(v) for v in values.reshape(-1)]
    return out


def array(value: Any) -> Array:
    """Return a copy of ``value``: float64, or exact if ``value`` is exact."""
    value = np.asarray(value)
    return exact(value) if value.dtype == object else np.array(value, np.float64)


def rounded(values: Array) -> np.ndarray:
    """Return float64, each entry rounded once; a zero or a tie up to the rounding of the 50 digits becomes exact."""
    import mpmath as mp

    flat = exact(values).reshape(-1)
    largest = max(map(abs, flat), default=0)
    with mp.workprec(BITS):
        return np.array([0.0 if abs(x) <= TINY * largest else float(+x) for x in flat]).reshape(np.shape(values))


def real(value: float | Fraction, like: Any) -> Any:
    """Return a number in the arithmetic of ``like``: a float with its exact value, a `Fraction` with all digits."""
    return number(value) if is_exact(like) else float(value)


def sqrt(x: Any) -> Any:
    """Return the square root of each entry."""
    if not is_exact(x):
        return np.sqrt(x)
    import mpmath as mp

    return np.frompyfunc(mp.sqrt, 1, 1)(x)


def power(x: Any, exponent: float | Fraction) -> Any:
    """Return ``x ** exponent`` for each entry."""
    return x ** real(exponent, x)


def norm(x: Array, order: Any = None) -> Any:
    """Return the Frobenius norm; ``order=2``: the largest singular value."""
    if not is_exact(x):
        return np.linalg.norm(x, order)
    return svd(x)[1][0] if order == 2 else sqrt(np.sum(x * x))


def all_finite(x: Array) -> bool:
    """Return whether all entries are finite. Those of mpmath always are, because it refuses to divide by zero."""
    return is_exact(x) or bool(np.all(np.isfinite(x)))


def spacing(x: Array) -> float:
    """Return the spacing of the arithmetic at 1, the unit of decisions on rank."""
    return TINY if is_exact(x) else float(np.finfo(float).eps)


def eigh(matrix: Array) -> tuple[Array, Array]:
    """Return eigenvalues (d,), ascending, and eigenvectors (d, d), as columns, of a symmetric matrix."""
    if not is_exact(matrix):
        w, q = np.linalg.eigh(matrix)
        return w, q
    import mpmath as mp

    w, q = mp.eigsy(mp.matrix(matrix.tolist()))
    order = sorted(range(len(matrix)), key=lambda i: w[i])
    return exact([w[i] for i in order]), _objects(q)[:, order]


def svd(matrix: Array) -> tuple[Array, Array, Array]:
    """Return the thin singular value decomposition: U (m, k), s (k,) descending, V^T (k, n), with k = min(m, n)."""
    if not is_exact(matrix):
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        return u, s, vt
    import mpmath as mp

    wide = matrix.shape[0] < matrix.shape[1]  # mpmath wants rows >= columns
    u, s, vt = map(_objects, mp.svd_r(mp.matrix((matrix.T if wide else matrix).tolist())))
    return (vt.T, s[:, 0], u.T) if wide else (u, s[:, 0], vt)


def _objects(matrix: Any) -> Array:
    return np.array(matrix.tolist(), dtype=object)
