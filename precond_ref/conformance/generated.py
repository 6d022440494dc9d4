"""Inputs that are generated instead of stored: dyadic numbers of splitmix64 (Steele, Lea, Flood, 2014).

*Vector format* in the documentation has the formulas, for other languages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from precond_ref.conformance.arithmetic import norm

GAMMA = 0x9E3779B97F4A7C15
LOW = 11
"""Number of bits for the exponent, beside at most 53 bits of the number."""


def splitmix64(seed: int, count: int) -> np.ndarray:
    """Return the first ``count`` outputs of the generator, uint64."""
    z = np.uint64(seed) + np.uint64(GAMMA) * np.arange(1, count + 1, dtype=np.uint64)  # all modulo 2^64
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def tensor(
    shape: tuple[int, ...],
    *,
    seed: int,
    bits: int = 24,
    exponents: Sequence[int] = (0, 0),
    factors: Mapping[str, Sequence[float]] | None = None,
) -> np.ndarray:
    """Return numbers of ``bits`` significant bits, none of them zero, in (-1, 1) times 2^e times factors of the axes.

    e is drawn from ``exponents[0]`` to ``exponents[1]``. ``factors`` has for an axis, by its number, one factor for
    each index along the axis.
    """
    z = splitmix64(seed, math.prod(shape))
    odd = 2 * (z >> np.uint64(64 - bits)).astype(np.int64) + 1 - 2**bits
    low, high = exponents
    e = low + (z % np.uint64(2**LOW)).astype(np.int64) % (high - low + 1)
    out = np.ldexp(odd.astype(np.float64), e - bits).reshape(shape)
    for axis, values in (factors or {}).items():
        out *= np.reshape(values, [-1 if i == int(axis) else 1 for i in range(len(shape))])
    return out


def folded(array: np.ndarray, fold: int) -> np.ndarray:
    """Return ``fold`` sums and the norm of the array, (fold + 1).

    Each sum is over the entries whose row-major place is the same modulo ``fold``. An array of at most ``fold``
    entries, and any array with ``fold=0``, is returned as it is. An error of norm r has at most the norm
    ``spread(...) * r`` in the result.
    """
    if not folds(array.shape, fold):
        return array
    flat = array.reshape(-1)
    sums = [flat[j::fold].sum() for j in range(fold)]
    return np.array([*sums, norm(flat)], dtype=array.dtype)


def folds(shape: tuple[int, ...], fold: int) -> bool:
    """Return whether a result of this shape is folded."""
    return 0 < fold < math.prod(shape)


def spread(shape: tuple[int, ...], fold: int) -> float:
    """Return the largest factor by which `folded` makes an error longer."""
    return math.sqrt(math.ceil(math.prod(shape) / fold) + 1) if folds(shape, fold) else 1.0
