"""Inequalities of the papers and of this library, which can be checked on a recorded run.

    run = theory.record(precond_ref.ASGO.theory(), online.adversary("polar", (4, 3), rounds=50), lr=0.5)
    check = theory.asgo.regret(run, comparator)
    check.left, check.right, check.ratio, check.holds, check.symbols, check.assumptions

Each statement has its source (`Source`); the proofs are in the documentation. Everything is float64 on NumPy.
"""

from precond_ref.theory import agd, asgo, gradient_descent, mbf, root_free, sketchy
from precond_ref.theory.base import Check, Run, Source, Statement, list_statements, record

__all__ = [
    "Check",
    "Run",
    "Source",
    "Statement",
    "agd",
    "asgo",
    "gradient_descent",
    "list_statements",
    "mbf",
    "record",
    "root_free",
    "sketchy",
]
