"""IF-Shampoo."""

from __future__ import annotations

from typing import Any

from precond_ref.conformance.declarations.base import Case, integers

DEFAULTS: dict[str, Any] = {
    "beta2": 0.25,
    "damping": 0.25,
    "momentum": 0.5,
    "riemannian_momentum": 0.5,
    "weight_decay": 0.0,
    "batch_size": 2.0,
    "every": 1,
    "structure": "dense",
    "clip": True,
    "narrow_state": False,
}


def _case(name: str, shape: tuple[int, ...], why: str, *, seed: int, steps: int = 5, catches: str = "", zero: Any = (),
          scale: float = 1.0, **rest: Any) -> Case:  # fmt: skip
    """A trace; gradients are integers times ``scale``, zero at the updates ``zero`` (counted from 0)."""
    grads = integers(100 + seed, (steps, *shape), -2, 2) * scale
    for t in zero:
        grads[t] = 0
    return Case(
        method="IFShampoo",
        name=name,
        why=why,
        config={**DEFAULTS, **{k: v for k, v in rest.items() if k in DEFAULTS}},
        shape=shape,
        param=integers(seed, shape),
        grads=grads,
        catches=tuple(catches.split()),
        **{"lr": 0.5} | {k: v for k, v in rest.items() if k not in DEFAULTS},
    )


PLAIN: dict[str, Any] = {"momentum": 0.0, "riemannian_momentum": 0.0}
CASES = [
    _case("dense", (4, 3), "All of the method: both momenta, clip, dense factors", seed=1, steps=6,
          catches="no-transpose factor-dropped factor-right no-half heavy-ball-riemannian clip-ignored clip-max "
          "clip-factor damping-identity trace-missing trace-mean share-missing batch-ignored gauss-seidel "
          "factors-after momentum-ema momentum-ignored"),
    _case("unclipped", (3, 2), "No clip where one would act, no momenta", seed=2, clip=False, scale=0.5, **PLAIN,
          catches="clip-always exponential gamma-ignored no-half"),
    _case("clip-inactive", (2, 3), "||m|| stays below 1, so the clip does nothing", seed=3, scale=0.25, **PLAIN,
          catches="clip-normalises"),
    _case("no-damping", (3, 2), "damping = 0", seed=4, damping=0.0, beta2=0.5, batch_size=1.0),
    _case("weight-decay", (3, 2), "kappa w joins the preconditioned gradient, inside the momentum", seed=5,
          weight_decay=0.25, catches="kappa-outside kappa-coupled kappa-ignored"),
    _case("every", (3, 2), "Factors renewed at updates 1, 4, 7", seed=7, steps=7, every=3,
          catches="every-ignored every-late every-multiples"),
    _case("zero-gradients", (3, 2), "Zero gradients first and later still shrink the curvature", seed=8, zero=(0, 2)),
    _case("vector", (4,), "One axis: H = B (K^T g)(K^T g)^T + lambda K^T K", seed=9, catches="no-transpose"),
    _case("scalar", (), "A scalar has one factor, 1 x 1", seed=10, tier="should"),
    _case("row", (1, 4), "Axes of size 1 have no factor", seed=11, catches="unit-axes-kept"),
    _case("column", (4, 1), "The same for columns", seed=12, catches="unit-axes-kept"),
    _case("order-three", (2, 3, 2), "Three axes, three factors", seed=13, steps=4,
          catches="share-missing trace-mean"),
    _case("order-four", (2, 1, 3, 2), "Three factors for four axes, one of size 1", seed=14, steps=3, tier="should",
          catches="unit-axes-kept"),
    _case("diagonal", (4, 3), "Diagonal factors", seed=15, structure="diagonal", catches="structure-dense"),
    _case("block-diagonal", (5, 4), "Blocks of 2, the last one smaller", seed=16, structure="block-diagonal(2)",
          catches="blocks-transposed structure-dense"),
    _case("tril", (4, 3), "Lower triangular: strict parts count fully, the diagonal half", seed=17, structure="tril",
          catches="structure-half structure-mirrored"),
    _case("triu", (4, 3), "Upper triangular", seed=18, structure="triu", catches="structure-half structure-mirrored"),
    _case("tril-toeplitz", (4, 3), "Lower triangular with constant diagonals: means", seed=19,
          structure="tril-toeplitz", catches="structure-half toeplitz-sum toeplitz-norm structure-mirrored"),
    _case("triu-toeplitz", (4, 3), "Upper triangular with constant diagonals", seed=20, structure="triu-toeplitz",
          catches="structure-half toeplitz-sum toeplitz-norm structure-mirrored"),
    _case("hierarchical", (6, 4), "[[A, B1, B2], [0, C, 0], [0, D, E]] with A of 2 and E of 1", seed=21,
          structure="hierarchical(2,1)", catches="structure-half structure-mirrored"),
    _case("hierarchical-small", (4, 2), "E shrinks, then A, when an axis is too small for both", seed=22,
          structure="hierarchical(3,2)"),
    _case("per-axis", (4, 3), "One structure for each axis", seed=23, structure=("diagonal", "tril"),
          catches="structure-first"),
    _case("narrow-state", (3, 2), "The dtype of the state of a narrow parameter is no matter in float64", seed=25,
          narrow_state=True, tier="may"),
    _case("stack", (2, 3, 2), "Stacked matrices do not see each other", seed=24, stack_ndim=1, tier="should"),
]  # fmt: skip


def _reject(argument: str, value: Any, why: str, shape: tuple[int, ...] = (4, 3)) -> Case:
    """A config with one field that must be refused."""
    text = str(value).strip("-").replace(".", "-").replace("(", "-").rstrip(")")
    return Case(
        method="IFShampoo",
        name=f"reject-{argument.replace('_', '-')}-{text}",
        kind="reject",
        argument=argument,
        why=why,
        config={**DEFAULTS, argument: value},
        shape=shape,
    )


CASES += [
    _reject("beta2", 1.0, "A step of 1 can make a factor singular"),
    _reject("beta2", 0.0, "The factors would never move"),
    _reject("damping", -0.25, "Damping is not negative"),
    _reject("momentum", 1.0, "A momentum is below 1"),
    _reject("riemannian_momentum", 1.0, "A momentum is below 1"),
    _reject("weight_decay", -0.5, "A decay is not negative"),
    _reject("batch_size", 0.0, "A batch is not empty"),
    _reject("every", 0, "At least one update between renewals"),
    _reject("structure", "banded", "An unknown structure"),
    _reject("structure", "block-diagonal(0)", "Blocks have at least one row"),
]
