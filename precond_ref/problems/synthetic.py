"""Problems with a known spectrum and a known optimum: two quadratics and a matrix regression.

Quadratic, A = Q diag(a) Q^T, c = Q^T (x - x*):

    f(x) = 1/2 (x - x*)^T A (x - x*) = 1/2 sum_i a_i c_i^2                                 (1)
    grad f = A (x - x*) = Q (a * c)                                         (n,)           (2)

Matrix quadratic, A = P diag(a) P^T (m, m), B = R diag(b) R^T (n, n), C = P^T (W - W*) R:

    f(W) = 1/2 <W - W*, A (W - W*) B> = 1/2 sum_ij a_i b_j C_ij^2                          (3)
    grad f = A (W - W*) B = P ((a b^T) * C) R^T                             (m, n)         (4)

Matrix regression, X (n, I), Y (n, O), residual E = X W^T - Y:

    f(W) = 1/(2n) ||E||_F^2                                                                (5)
    grad f = 1/n E^T X                                                      (O, I)         (6)
    f(W) - min f = 1/(2n) ||X (W - W_min)^T||_F^2                                          (7)

In this factored form (1) and (3) are never negative, and float32 keeps the small eigenvalues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from precond_ref.problems.base import (
    Array,
    Batch,
    Params,
    Problem,
    Space,
    check_int,
    check_real,
    generator,
    import_numpy,
)

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class Quadratic(Problem):
    """Equations (1) and (2); the parameter is ``x`` (n,)."""

    eigenvalues: Array = field(repr=False)
    """a, (n,), in the order given."""
    basis: Array = field(repr=False)
    """Q, (n, n), eigenvectors as columns."""
    optimum: Array = field(repr=False)
    """x*, (n,)."""

    metric_name: ClassVar[str] = "loss gap"
    higher_is_better: ClassVar[bool] = False

    def _loss(self, params: Params, batch: Batch) -> Array:
        c = self.basis.T @ (params["x"] - self.optimum)
        return 0.5 * self.space.xp.sum(self.eigenvalues * c * c)  # (1)

    def _loss_and_grad(self, params: Params, batch: Batch) -> tuple[Array, Params]:
        c = self.basis.T @ (params["x"] - self.optimum)
        loss = 0.5 * self.space.xp.sum(self.eigenvalues * c * c)  # (1)
        return loss, {"x": self.basis @ (self.eigenvalues * c)}  # (2)

    def _metric(self, params: Params) -> Array:
        return self._loss(params, ())  # the least value is 0


@dataclass(frozen=True, kw_only=True, eq=False)
class MatrixQuadratic(Problem):
    """Equations (3) and (4); the parameter is ``weight`` (m, n)."""

    left_eigenvalues: Array = field(repr=False)
    """a, (m,)."""
    right_eigenvalues: Array = field(repr=False)
    """b, (n,)."""
    left_basis: Array = field(repr=False)
    """P, (m, m), eigenvectors as columns."""
    right_basis: Array = field(repr=False)
    """R, (n, n), eigenvectors as columns."""
    optimum: Array = field(repr=False)
    """W*, (m, n)."""

    metric_name: ClassVar[str] = "loss gap"
    higher_is_better: ClassVar[bool] = False

    def _scaled(self, params: Params) -> tuple[Array, Array]:
        """Return C and (a b^T) * C, (m, n) each."""
        c = self.left_basis.T @ (params["weight"] - self.optimum) @ self.right_basis
        return c, self.left_eigenvalues[:, None] * c * self.right_eigenvalues[None, :]

    def _loss(self, params: Params, batch: Batch) -> Array:
        c, scaled = self._scaled(params)
        return 0.5 * self.space.xp.sum(c * scaled)  # (3)

    def _loss_and_grad(self, params: Params, batch: Batch) -> tuple[Array, Params]:
        c, scaled = self._scaled(params)
        loss = 0.5 * self.space.xp.sum(c * scaled)  # (3)
        return loss, {"weight": self.left_basis @ scaled @ self.right_basis.T}  # (4)

    def _metric(self, params: Params) -> Array:
        return self._loss(params, ())  # the least value is 0


@dataclass(frozen=True, kw_only=True, eq=False)
class MatrixRegression(Problem):
    """Equations (5) to (7); the parameter is ``weight`` (O, I), a batch is (X (n, I), Y (n, O))."""

    optimum: Array = field(repr=False)
    """W_min, (O, I), the minimizer over the whole training set."""

    metric_name: ClassVar[str] = "loss gap"
    higher_is_better: ClassVar[bool] = False

    def _loss(self, params: Params, batch: Batch) -> Array:
        inputs, targets = batch
        residual = inputs @ params["weight"].T - targets
        return self.space.xp.sum(residual * residual) / (2 * inputs.shape[0])  # (5)

    def _loss_and_grad(self, params: Params, batch: Batch) -> tuple[Array, Params]:
        inputs, targets = batch
        residual = inputs @ params["weight"].T - targets
        loss = self.space.xp.sum(residual * residual) / (2 * inputs.shape[0])  # (5)
        return loss, {"weight": residual.T @ inputs / inputs.shape[0]}  # (6)

    def _metric(self, params: Params) -> Array:
        inputs, _ = self.train
        distance = inputs @ (params["weight"] - self.optimum).T
        return self.space.xp.sum(distance * distance) / (2 * inputs.shape[0])  # (7)


def check_spectrum(
    name: str, spectrum: Sequence[float] | None, size: int, condition_name: str, condition: float
) -> np.ndarray:
    """Return eigenvalues (size,): those given, or geometrically spaced from 1 down to 1 / condition."""
    np = import_numpy()
    if spectrum is None:
        return np.geomspace(1.0, 1.0 / check_real(condition_name, condition, ge=1.0), size)
    try:
        values = np.asarray(spectrum, dtype="float64")
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a sequence of eigenvalues, got {spectrum!r}") from error
    if values.ndim != 1 or values.size == 0 or not np.all(np.isfinite(values)) or np.any(values < 0.0):
        raise ValueError(f"{name} must hold finite eigenvalues >= 0, at least one, got {spectrum!r}")
    return values


def random_orthogonal(size: int, rng: np.random.Generator) -> np.ndarray:
    """Return an orthogonal matrix (size, size), uniform in Haar measure."""
    np = import_numpy()
    basis, triangle = np.linalg.qr(rng.standard_normal((size, size)))
    return basis * np.copysign(1.0, np.diag(triangle))


def quadratic(
    name: str,
    space: Space,
    seed: int,
    *,
    size: int = 20,
    condition: float = 1e3,
    spectrum: Sequence[float] | None = None,
) -> Quadratic:
    """Return a `Quadratic`; a given spectrum replaces ``size`` and ``condition``; x* and the first x are normal."""
    eigenvalues = check_spectrum("spectrum", spectrum, check_int("size", size, ge=1), "condition", condition)
    n, rng = eigenvalues.size, generator(seed, "data")
    return Quadratic(
        name=name,
        space=space,
        seed=seed,
        batch_size=None,
        default_steps=200,
        initial={"x": generator(seed, "init").standard_normal(n)},
        train=(),
        eigenvalues=space.real(eigenvalues),
        basis=space.real(random_orthogonal(n, rng)),
        optimum=space.real(rng.standard_normal(n)),
    )


def matrix_quadratic(
    name: str,
    space: Space,
    seed: int,
    *,
    shape: tuple[int, int] = (16, 8),
    left_condition: float = 100.0,
    right_condition: float = 10.0,
    left_spectrum: Sequence[float] | None = None,
    right_spectrum: Sequence[float] | None = None,
) -> MatrixQuadratic:
    """Return a `MatrixQuadratic`; a given spectrum replaces the length and the condition of its side."""
    m, n = check_shape(shape)
    left = check_spectrum("left_spectrum", left_spectrum, m, "left_condition", left_condition)
    right = check_spectrum("right_spectrum", right_spectrum, n, "right_condition", right_condition)
    m, n, rng = left.size, right.size, generator(seed, "data")
    return MatrixQuadratic(
        name=name,
        space=space,
        seed=seed,
        batch_size=None,
        default_steps=200,
        initial={"weight": generator(seed, "init").standard_normal((m, n))},
        train=(),
        left_eigenvalues=space.real(left),
        right_eigenvalues=space.real(right),
        left_basis=space.real(random_orthogonal(m, rng)),
        right_basis=space.real(random_orthogonal(n, rng)),
        optimum=space.real(rng.standard_normal((m, n))),
    )


def matrix_regression(
    name: str,
    space: Space,
    seed: int,
    *,
    samples: int = 512,
    shape: tuple[int, int] = (16, 32),
    condition: float = 1e4,
    noise: float = 0.125,
    batch_size: int | None = None,
) -> MatrixRegression:
    """Return a `MatrixRegression` of ``shape`` (O, I); normal inputs have a covariance of this condition number.

    Targets are X W_true^T plus normal noise of the deviation ``noise``; W_true and the first weight are normal too.
    """
    np = import_numpy()
    outputs, inputs = check_shape(shape)
    if check_int("samples", samples, ge=1) < inputs:
        raise ValueError(f"samples must be at least shape[1] = {inputs} for one minimizer, got {samples}")
    rng = generator(seed, "data")
    scales = np.sqrt(check_spectrum("spectrum", None, inputs, "condition", condition))
    x = (rng.standard_normal((samples, inputs)) * scales) @ random_orthogonal(inputs, rng).T
    y = x @ rng.standard_normal((outputs, inputs)).T
    y = y + check_real("noise", noise, ge=0.0) * rng.standard_normal((samples, outputs))
    return MatrixRegression(
        name=name,
        space=space,
        seed=seed,
        batch_size=batch_size,
        default_steps=300,
        initial={"weight": generator(seed, "init").standard_normal((outputs, inputs))},
        train=(space.real(x), space.real(y)),
        optimum=space.real(np.linalg.lstsq(x, y, rcond=None)[0].T),
    )


def check_shape(shape: Any) -> tuple[int, int]:
    """Return ``shape`` as a pair of lengths, each at least 1; TypeError or ValueError for others."""
    if isinstance(shape, str) or not isinstance(shape, Sequence) or len(shape) != 2:
        raise TypeError(f"shape must be a pair of ints, got {shape!r}")
    return check_int("shape[0]", shape[0], ge=1), check_int("shape[1]", shape[1], ge=1)
