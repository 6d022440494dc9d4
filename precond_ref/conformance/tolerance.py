"""The largest difference of two correct implementations, derived from the precision and the problem.

A correct step computes ``A^{-p} G`` from a statistic ``A`` that carries relative errors of some unit roundoffs ``u``.
To first order an eigenvalue ``w`` of ``A`` is off by ``u ||A||``, which changes ``w^{-p}`` by the relative amount
``p u ||A|| / w``: at the smallest eigenvalue ``p u kappa``, for the condition number ``kappa`` of ``A``. The effect on
the result depends on ``G``:

* fresh, if ``G`` is part of ``A`` (``||A^{-1/2} G|| <= 1``): normwise ``C u kappa^(p + 1/2)``;
* stale or bare, if ``G`` is not part of ``A``: ``C u kappa`` relative to ``||A^{-p}|| ||G||``;
* elementwise methods have ``kappa = 1``: ``C u``.

Muon's iteration in bfloat16 (``compute_dtype``) rounds the terms that it adds at each step. The later steps multiply
this error at most by the largest divided difference of their polynomial at the singular values. ``kappa`` is the sum of
these errors, relative to the result, and the limit is ``C u kappa`` with a C of its own.

A sketch is made from the sketch before it by a decomposition, and has the errors of all decompositions so far: their
number is one more factor. A second moment in the coordinates of bases has the errors of all bases in the same way.

C is enough for sums of `LONG` terms, in whatever order they are added. The error of a longer sum grows as the square
root of their number; this ratio is a factor of its own.

``benchmarks/tolerance.py`` measures ``C``; *Tolerance* in the documentation has its result. Comparisons are normwise,
without an absolute part. The only addition is the rounding of the parameter, from which the step is subtracted.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from precond_ref.conformance.vectors import Case

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24}
CONSTANT = 16.0
"""The C of the module's docstring."""
LONG = 128
"""The largest number of terms of a sum for which C is enough: that of the matrices on which it was measured."""
BFLOAT16, PRODUCTS = 2.0**-8, 0.25
"""Unit roundoff, and C for products in bfloat16: their roundings have both signs, and ``kappa`` adds their sizes."""


def relative(
    dtype: str, kappa: float = 1.0, exponent: float = 0.0, stale: bool = False, decompositions: int = 1
) -> float:
    """Return the largest relative normwise error of a direction, for condition number, total exponent p and ``stale``.

    ``decompositions`` is the number of decompositions that the statistic went through, one after the other. ValueError
    for an unknown dtype.
    """
    if dtype not in UNIT_ROUNDOFF:
        raise ValueError(f"dtype must be one of {', '.join(UNIT_ROUNDOFF)}, got {dtype!r}")
    return CONSTANT * UNIT_ROUNDOFF[dtype] * decompositions * max(kappa, 1.0) ** (1.0 if stale else exponent + 0.5)


def of_case(case: Case, dtype: str, step: int) -> float:
    """Return `relative` for a step of a trace, counted from 1, or for a primitive, which has one step."""
    about = case.conditioning
    if case.narrow:
        return PRODUCTS * BFLOAT16 * float(about["kappa"][step - 1])
    stale = about["stale"] or case.kind == "primitive"
    limit = relative(dtype, about["kappa"][step - 1], about["exponent"], stale, about["decompositions"][step - 1])
    return limit * of_sums(case.shape[case.stack_ndim :])


def of_sums(shape: tuple[int, ...]) -> float:
    """Return the factor for the longest sum of a statistic: over all axes but the shortest."""
    return math.sqrt(max(1.0, math.prod(shape) / min(shape, default=1) / LONG))


def of_update(relative_tolerance: float, dtype: str, before: np.ndarray, after: np.ndarray) -> float:
    """Return the largest norm of the error of ``before - after``: that of the direction, and the rounding of both."""
    return of_lengths(relative_tolerance, dtype, *(float(np.linalg.norm(x)) for x in (before - after, before, after)))


def of_lengths(relative_tolerance: float, dtype: str, step: float, before: float, after: float) -> float:
    """Return `of_update` from the norms of the step and of both parameters."""
    return relative_tolerance * step + 2 * UNIT_ROUNDOFF[dtype] * (before + after)
