"""Powers of symmetric matrices by themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

from precond_ref.conformance.declarations.base import Case, integers


def gram(seed: int, d: int, columns: int) -> np.ndarray:
    """An integer statistic of rank at most ``columns``."""
    factor = integers(seed, (d, columns), -2, 2)
    return factor @ factor.T


def case(name: str, why: str, matrix: np.ndarray, denominator: int, ridge: float, **fields: Any) -> Case:
    """(matrix + ridge I)^(-1/denominator)."""
    return Case(
        method="roots.power",
        kind="primitive",
        name=name,
        why=why,
        config={"exponent": [-1, denominator], "ridge": ridge},
        shape=matrix.shape,
        inputs={"matrix": matrix},
        **fields,
    )


CASES = [
    *(case(f"ridge-{n}", f"Exponent -1/{n} with a ridge under the root.", gram(300 + n, 3, 4), n, 0.5) for n in (2, 4,
        6)),
    *(case(f"no-ridge-{n}", f"Exponent -1/{n} of a regular matrix.", gram(310 + n, 3, 5), n, 0.0) for n in (2, 4, 6)),
    *(case(f"pseudo-inverse-{n}", f"Exponent -1/{n} of a singular matrix without ridge: zero stays zero.",
        gram(320 + n, 4, 2), n, 0.0, tier="should") for n in (2, 4, 6)),
    case("singular-ridge", "A singular matrix with a ridge.", gram(330, 4, 2), 4, 0.25),
    case("diagonal", "Distinct eigenvalues in no order.", np.diag(integers(331, (4,), 1, 9)), 4, 0.25),
    case("size-1", "One by one.", gram(332, 1, 2), 2, 0.25),
    case("zero", "The zero matrix without ridge gives zero.", gram(333, 3, 1) * 0, 2, 0.0, tier="should"),
    case("repeated", "Equal eigenvalues.", 2 * gram(334, 1, 1) * np.eye(3, dtype=int) + 4 * np.eye(3, dtype=int), 2,
        0.0),
    case("stack", "Two matrices at once.", np.stack([gram(335, 3, 4), gram(336, 3, 4)]), 4, 0.5, tier="may"),
]  # fmt: skip
