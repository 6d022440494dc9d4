"""How far two correct implementations may differ: derived from the precision and the problem, never chosen.

A correct step computes ``A^{-p} G`` from a statistic ``A`` that carries relative errors of some unit roundoffs ``u``.
To first order an eigenvalue ``w`` of ``A`` is off by ``u ||A||``, which changes ``w^{-p}`` by the relative amount
``p u ||A|| / w``: at the smallest eigenvalue ``p u kappa``, for the condition number ``kappa`` of ``A``. What that
does to the result depends on ``G``:

* fresh, when ``G`` is part of ``A`` (``||A^{-1/2} G|| <= 1``): normwise ``C u kappa^(p + 1/2)``;
* stale or bare, when it is not: ``C u kappa`` relative to ``||A^{-p}|| ||G||``;
* elementwise methods have ``kappa = 1``: ``C u``.

Muon's iteration in bfloat16 (``compute_dtype``) rounds at each step what it adds up, and the steps after it multiply
that at most by the largest divided difference of their polynomial at the singular values: ``kappa`` is the sum of
these, relative to the result, and the limit ``C u kappa`` with a C of its own.

A sketch is made of the one before by a decomposition, so that the errors of all decompositions so far are in it: their
number is one more factor. So are those of all bases in a second moment that is kept in their coordinates.

``benchmarks/tolerance.py`` measures ``C``; *Tolerance* in the documentation has its result. Comparisons are normwise,
without an absolute part: the one addition is the rounding of the parameter that the step is subtracted from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from precond_ref.conformance.vectors import Case

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24}
CONSTANT = 16.0
"""C above."""
BFLOAT16, PRODUCTS = 2.0**-8, 0.25
"""Unit roundoff, and C for products in it: roundings of many signs, of which ``kappa`` adds the sizes."""


def relative(
    dtype: str, kappa: float = 1.0, exponent: float = 0.0, stale: bool = False, decompositions: int = 1
) -> float:
    """Largest relative normwise error of a direction: condition number, total exponent p, and whether it is stale.

    ``decompositions``: how many of them the statistic went through, one after the other.
    """
    if dtype not in UNIT_ROUNDOFF:
        raise ValueError(f"dtype must be one of {', '.join(UNIT_ROUNDOFF)}, got {dtype!r}")
    return CONSTANT * UNIT_ROUNDOFF[dtype] * decompositions * max(kappa, 1.0) ** (1.0 if stale else exponent + 0.5)


def of_case(case: Case, dtype: str, step: int) -> float:
    """`relative` for a step of a trace, counted from 1, or for a primitive, which has one."""
    about = case.conditioning
    if case.narrow:
        return PRODUCTS * BFLOAT16 * float(about["kappa"][step - 1])
    stale = about["stale"] or case.kind == "primitive"
    return relative(dtype, about["kappa"][step - 1], about["exponent"], stale, about["decompositions"][step - 1])


def of_update(relative_tolerance: float, dtype: str, before: np.ndarray, after: np.ndarray) -> float:
    """Largest norm of the error of ``before - after``: the direction's, and the rounding of both parameters."""
    return of_lengths(relative_tolerance, dtype, *(float(np.linalg.norm(x)) for x in (before - after, before, after)))


def of_lengths(relative_tolerance: float, dtype: str, step: float, before: float, after: float) -> float:
    """The same from the norms of the step and of both parameters."""
    return relative_tolerance * step + 2 * UNIT_ROUNDOFF[dtype] * (before + after)
