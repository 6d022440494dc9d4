"""Matrix powers against 50-digit arithmetic, their iterations against the scalar recursions, and hard inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mpmath
import numpy as np
import pytest
from conftest import EAGER, Backend, make_backend
from hypothesis import given
from hypothesis import strategies as st
from mutation import mutated

import precond_ref as pr
from precond_ref.numerics import grafting, lapack, roots

U = {"float64": 2.0**-53, "float32": 2.0**-24}
KAPPAS = (1.0, 1e2, 1e4, 1e6, 1e8)


def spectrum_matrix(kappa: float, n: int = 6, seed: int = 0) -> np.ndarray:
    """A symmetric matrix with eigenvalues spaced geometrically from 1 to 1 / kappa."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    a = (q * np.geomspace(1.0, 1.0 / kappa, n)) @ q.T
    return 0.5 * (a + a.T)


def to_mp(a: np.ndarray) -> mpmath.matrix:
    return mpmath.matrix(a.tolist())


def from_mp(a: mpmath.matrix) -> np.ndarray:
    return np.array(a.tolist(), dtype=float)


def gap(a: np.ndarray, truth: np.ndarray) -> float:
    """Normwise relative error."""
    return float(np.linalg.norm(a - truth) / np.linalg.norm(truth))


def mp_sqrt(a: mpmath.matrix) -> tuple[mpmath.matrix, mpmath.matrix]:
    """A^{1/2} and A^{-1/2} by the Denman-Beavers iteration: no eigenvalue is computed."""
    y, z = a, mpmath.eye(a.rows)
    for _ in range(60):
        y, z = (y + mpmath.inverse(z)) / 2, (z + mpmath.inverse(y)) / 2
        if mpmath.mnorm(y * z - mpmath.eye(a.rows), 1) < mpmath.mpf(10) ** (8 - mpmath.mp.dps):
            return y, z
    raise AssertionError("no convergence")


# ---- the definition, in 50 digits -----------------------------------------------------------------------------------

POWERS: dict[float, Callable[[mpmath.matrix], mpmath.matrix]] = {
    -1.0: mpmath.inverse,
    -0.5: lambda a: mp_sqrt(a)[1],
    -0.25: lambda a: mp_sqrt(mp_sqrt(a)[0])[1],
    0.5: lambda a: mp_sqrt(a)[0],
}


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("exponent", POWERS)
@pytest.mark.parametrize("ridge", [0.0, 0.25])
def test_power_in_fifty_digits(kappa: float, exponent: float, ridge: float) -> None:
    a = spectrum_matrix(kappa)
    with mpmath.workdps(50):
        truth = from_mp(POWERS[exponent](to_mp(a) + ridge * mpmath.eye(6)))
    # eigh moves each eigenvalue by at most O(u) max w, that is the smallest one by O(u kappa) of itself; it dominates
    # a negative power's norm, while in w^{1/2} its change u max w / sqrt(min w) is measured against sqrt(max w)
    worst = (1 + ridge) / (1 / kappa + ridge)
    bound = 16 * U["float64"] * (worst if exponent < 0 else math.sqrt(worst))
    assert gap(roots.power(a, exponent, ridge), truth) <= bound


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_inverse_shifted_sqrt_in_fifty_digits(kappa: float, shift: float) -> None:
    a = spectrum_matrix(kappa)
    with mpmath.workdps(50):
        truth = from_mp(mpmath.inverse(mp_sqrt(to_mp(a))[0] + shift * mpmath.eye(6)))
    assert gap(roots.inverse_shifted_sqrt(a, shift), truth) <= 16 * U["float64"] * kappa


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("shape", [(6, 6), (4, 6), (6, 4)], ids=str)
def test_polar_in_fifty_digits(kappa: float, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    k = min(shape)
    q, r = (np.linalg.qr(rng.standard_normal((d, k)))[0] for d in shape)
    a = (q * np.geomspace(1.0, 1.0 / kappa, k)) @ r.T
    with mpmath.workdps(50):
        b = to_mp(a if shape[0] >= shape[1] else a.T)
        truth = from_mp(b * mp_sqrt(b.T * b)[1])
    # here kappa is that of the matrix itself, not of its square: the polar factor's own condition number
    assert gap(roots.polar(a), truth if shape[0] >= shape[1] else truth.T) <= 16 * U["float64"] * kappa


def rank_three() -> tuple[np.ndarray, np.ndarray]:
    """B (6, 3) of small integers and B B^T, exact in float32."""
    b = np.array([[1, 2, 0], [-1, 3, 1], [2, 0, -2], [0, 1, 1], [3, -1, 2], [-2, 2, 1]], dtype=float)
    return b, b @ b.T


@pytest.mark.eager
@pytest.mark.parametrize("dtype", U)
@pytest.mark.parametrize("exponent", [-1.0, -0.5, -0.25])
def test_no_ridge_is_the_pseudo_inverse(backend: Backend, dtype: str, exponent: float) -> None:
    b, a = rank_three()
    with mpmath.workdps(50):
        c = to_mp(b).T * to_mp(b)  # (B B^T)^p = B (B^T B)^{p-1} B^T on the range of B
        truth = from_mp(to_mp(b) * POWERS[exponent](c) * mpmath.inverse(c) * to_mp(b).T)
    bound = 16 * U[dtype] * np.linalg.cond(b) ** 2
    array = backend.asarray(a, dtype)
    assert gap(backend.numpy(roots.power(array, exponent)), truth) <= bound
    if exponent == -0.5:
        assert gap(backend.numpy(roots.inverse_shifted_sqrt(array)), truth) <= bound
    # what a ridge would give on the null space is nowhere near
    assert gap(backend.numpy(roots.power(array, exponent, 1e-4)), truth) > 1


@pytest.mark.eager
def test_polar_of_low_rank_is_the_partial_isometry(backend: Backend) -> None:
    b, a = rank_three()
    projector = b @ np.linalg.inv(b.T @ b) @ b.T  # the polar factor of a symmetric A >= 0
    for dtype, u in U.items():
        got = backend.numpy(roots.polar(backend.asarray(a, dtype)))
        assert gap(got, projector) <= 16 * u * np.linalg.cond(b) ** 2


def test_negative_eigenvalues_are_clipped_before_the_ridge_is_added() -> None:
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))
    a = (q * np.array([-0.5, 0.5, 1.0])) @ q.T
    expected = (q * np.array([0.25, 0.75, 1.25]) ** -0.5) @ q.T
    assert gap(roots.power(a, -0.5, 0.25), expected) <= 16 * U["float64"] * 5
    assert np.array_equal(roots.eigh(a)[0] < 0, [False] * 3)


def test_only_the_symmetric_part_counts() -> None:
    a, skew = spectrum_matrix(1e2), np.triu(np.ones((6, 6)), 1)
    lopsided = a + skew - skew.T
    assert gap(roots.power(lopsided, -0.5), roots.power(a, -0.5)) <= 16 * U["float64"] * 1e2 * 6


# ---- the iterations: each acts on every eigenvalue by a scalar recursion --------------------------------------------


def scalar_newton_schulz(w: np.ndarray, norm: float, steps: int) -> np.ndarray:
    s = np.sqrt(w / norm)
    for _ in range(steps):
        s = 2 * s - 1.5 * s**3 + 0.5 * s**5
    return s


def scalar_polar_express(w: np.ndarray, norm: float, steps: int) -> np.ndarray:
    s = np.sqrt(w / (1.01 * norm))
    for k in range(steps):
        a, b, c = roots.POLAR_EXPRESS[min(k, 7)]
        t = s / 1.01 if k < 7 else s
        s = a * t + b * t**3 + c * t**5
    return s


def scalar_coupled_newton(w: np.ndarray, norm: float, steps: int) -> np.ndarray:
    m, x = 1.5 * w / norm, np.full_like(w, math.sqrt(1.5 / norm))
    for _ in range(steps):
        t = (3 - m) / 2
        x, m = x * t, t * t * m
    return x * np.sqrt(w)


ITERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "newton_schulz": scalar_newton_schulz,
    "polar_express": scalar_polar_express,
    "coupled_newton": scalar_coupled_newton,
}


def whitening_error(backend: Backend, dtype: str, name: str, kappa: float, steps: int) -> tuple[float, float]:
    """``||P A^{1/2} - I||`` of the iteration, and what the scalar recursion says it is."""
    n = 64
    q, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((n, n)))
    w = np.geomspace(1.0, 1.0 / kappa, n)
    a = (q * w) @ q.T
    p = backend.numpy(roots.inverse_sqrt(backend.asarray(0.5 * (a + a.T), dtype), 0.0, name, steps)).astype(float)
    error = np.linalg.norm(p @ ((q * np.sqrt(w)) @ q.T) - np.eye(n), 2)
    return float(error), float(np.max(np.abs(ITERATIONS[name](w, float(np.linalg.norm(w)), steps) - 1)))


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("dtype", "kappas"), [("float64", (1.0, 1e2, 1e4, 1e6, 1e8)), ("float32", (1.0, 1e2, 1e4))], ids=U
)
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("newton_schulz", 10),
        ("newton_schulz", 30),
        ("polar_express", 10),
        ("coupled_newton", 20),
        ("coupled_newton", 35),
    ],
)
def test_iterations_are_as_far_from_the_definition_as_their_recursion_says(
    library: str, dtype: str, kappas: tuple[float, ...], name: str, steps: int
) -> None:
    for kappa in kappas:
        error, predicted = whitening_error(make_backend(library), dtype, name, kappa, steps)
        # the coupled factors drift apart by the condition number times rounding; and the first Polar Express quintic
        # cancels: its coefficients' sizes add up to 49
        assert abs(error - predicted) <= (49 + 16 * kappa) * U[dtype]


@pytest.mark.parametrize("kappa", [1e2, 1e4, 1e6, 1e8, 1e10])
def test_newton_schulz_doubles_until_it_converges(kappa: float) -> None:
    w = np.geomspace(1.0, 1.0 / kappa, 64)
    steps = 4 + math.ceil(0.5 * math.log2(kappa))
    norm = float(np.linalg.norm(w))
    assert np.max(np.abs(scalar_newton_schulz(w, norm, steps) - 1)) <= 1e-12
    assert np.max(np.abs(scalar_newton_schulz(w, norm, steps - 5) - 1)) >= 0.3


@pytest.mark.parametrize(
    ("name", "steps", "kappa", "floor"),
    [
        ("newton_schulz", 10, 1e6, 0.3),
        ("newton_schulz", 15, 1e10, 0.5),
        ("polar_express", 10, 1e10, 0.7),
        ("coupled_newton", 20, 1e8, 0.6),
    ],
)
def test_too_few_steps_are_silently_far_off(name: str, steps: int, kappa: float, floor: float) -> None:
    error, _ = whitening_error(make_backend("numpy"), "float64", name, kappa, steps)
    assert floor < error < 1


def check_iterations(steps: int, module: Any = roots) -> None:
    q, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((6, 6)))
    w, ridge = np.geomspace(1.0, 1e-2, 6), 0.25
    norm, shifted = float(np.linalg.norm(w)), float(np.linalg.norm(w + ridge))
    for name, live, scale in (
        ("newton_schulz", w + ridge, norm + ridge),
        ("coupled_newton", w + ridge, shifted),
        ("polar_express", w, shifted),  # in the norm only
    ):
        expected = (q * (ITERATIONS[name](live, scale, steps) / np.sqrt(live))) @ q.T
        got = module.inverse_sqrt((q * w) @ q.T, ridge, name, steps)
        assert gap(got, expected) <= (49 + 16 * 1e2) * U["float64"]


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_where_the_ridge_enters_the_iterations(steps: int) -> None:
    assert set(ITERATIONS) == set(roots.ITERATIONS)
    check_iterations(steps)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("newton(matrix, 2, ridge,", "newton(matrix, 4, ridge,"),
        ("newton(matrix, 2, ridge,", "newton(matrix, 2, 0.0,"),
        ("return inverse_sqrt_newton_schulz(matrix, ridge,", "return inverse_sqrt_newton_schulz(matrix, 0.0,"),
        ("return inverse_sqrt_polar_express(matrix, ridge,", "return inverse_sqrt_polar_express(matrix, 0.0,"),
        ("express(matrix, ridge,", "express(matrix + ridge * identity(array_namespace(matrix), matrix), ridge,"),
        ('if solver == "polar_express"', 'if solver == "newton_schulz"'),
    ],
    ids=["order", "coupled Newton", "Newton-Schulz", "Polar Express", "Polar Express in V", "another"],
)
def test_planted_bugs_of_the_iterations(old: str, new: str) -> None:
    planted = SimpleNamespace(inverse_sqrt=mutated(roots.inverse_sqrt, (old, new)))
    with pytest.raises(AssertionError):
        check_iterations(3, planted)


def test_coupled_newton_of_order_four() -> None:
    a = spectrum_matrix(1e2)
    assert gap(roots.inverse_root_coupled_newton(a, 4, 0.25, 40), roots.power(a, -0.25, 0.25)) <= 16 * U["float64"] * 5


def test_polar_express_table_is_that_of_minimax_quintics() -> None:
    # each odd quintic equioscillates on the interval the one before leaves: its interior maximum is its value at the
    # right end, which is the next interval's; the last one is the Pade step, flat to second order at 1
    end = 1.0
    for a, b, c in roots.POLAR_EXPRESS[:-1]:
        p = np.polynomial.Polynomial([0, a, 0, b, 0, c])
        peak = math.sqrt(min(np.roots([5 * c, 3 * b, a])))
        assert abs(p(peak) - p(end)) <= 1e-10  # the coefficients' own precision: ten digits are printed correctly
        end = p(end)
    assert 0 < end - 1 < 1e-8
    p = np.polynomial.Polynomial([0, 1.875, 0, -1.25, 0, 0.375])
    assert (p(1), p.deriv(1)(1), p.deriv(2)(1)) == (1, 0, 0)
    assert roots.POLAR_EXPRESS[-1] == (1.875, -1.25, 0.375)


def test_ten_polar_express_steps_amplify_a_zero_eigenvalue_by_22371() -> None:
    a = np.diag([1.0, 0.0])
    z = roots.inverse_sqrt_polar_express(a, 0.0, 10)
    assert math.isclose(z[1, 1] * math.sqrt(1.01), 22371.306118589935, rel_tol=1e-12)


# ---- scales ---------------------------------------------------------------------------------------------------------

# 2^100 = 1.3e30 and 2^498 = 8e149: squares over- and underflow, the root does not
scales = pytest.mark.parametrize(
    ("dtype", "exponent"), [("float32", 100), ("float32", -100), ("float64", 498), ("float64", -498)]
)
INVERSE_ROOTS: dict[str, Callable[..., Any]] = {
    "power": lambda a, **kw: roots.power(a, -0.5, 0.0, **kw),
    "inverse_shifted_sqrt": lambda a, **kw: roots.inverse_shifted_sqrt(a, 0.0, **kw),
    "newton_schulz": lambda a, **kw: roots.inverse_sqrt(a, 0.0, "newton_schulz", 25, **kw),
    "polar_express": lambda a, **kw: roots.inverse_sqrt(a, 0.0, "polar_express", 10, **kw),
    "coupled_newton": lambda a, **kw: roots.inverse_sqrt(a, 0.0, "coupled_newton", 25, **kw),
}


@pytest.mark.eager
@pytest.mark.parametrize("name", INVERSE_ROOTS)
@scales
def test_inverse_roots_are_homogeneous_at_extreme_scales(
    backend: Backend, name: str, dtype: str, exponent: int
) -> None:
    a = spectrum_matrix(1e2).astype(dtype).astype(float)
    truth = roots.power(a, -0.5) * 2.0 ** (-exponent / 2)
    got = backend.numpy(INVERSE_ROOTS[name](backend.asarray(a * 2.0**exponent, dtype)))
    assert gap(got.astype(float), truth) <= 16 * U[dtype] * 1e2


@pytest.mark.eager
@scales
def test_polar_ignores_the_scale(backend: Backend, dtype: str, exponent: int) -> None:
    a = np.random.default_rng(3).standard_normal((3, 5)).astype(dtype).astype(float)
    got = backend.numpy(roots.polar(backend.asarray(a * 2.0**exponent, dtype)))
    assert gap(got.astype(float), roots.polar(a)) <= 16 * U[dtype] * np.linalg.cond(a)


@pytest.mark.eager
@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1.0, 1e25, 1e37])
def test_scale_to_rms_at_any_scale(backend: Backend, scale: float) -> None:
    update = np.random.default_rng(4).uniform(0.5, 2.0, (2, 3, 4)) * scale
    got = backend.numpy(grafting.scale_to_rms(backend.asarray(update, "float32"), 0.25, (-2, -1), backend.xp))
    rms = np.sqrt(np.mean(got.astype(float) ** 2, axis=(-2, -1)))
    assert np.all(np.abs(rms - 0.25) <= 16 * U["float32"] * 0.25)
    assert got.dtype == np.float32
    cosine = np.sum(got * (update / scale)) / np.linalg.norm(got) / np.linalg.norm(update / scale)
    assert cosine > 0.9  # each member has its own factor


# ---- zero, empty, non-finite ----------------------------------------------------------------------------------------


@pytest.mark.eager
def test_zero_matrix(backend: Backend) -> None:
    zero = backend.asarray(np.zeros((3, 3)))
    identity = np.eye(3)
    for got, expected in (
        (roots.power(zero, -0.5), 0 * identity),
        (roots.power(zero, -0.5, 0.25), 2 * identity),
        (roots.inverse_shifted_sqrt(zero), 0 * identity),
        (roots.inverse_shifted_sqrt(zero, 0.5), 2 * identity),
        (roots.polar(zero), 0 * identity),
        (roots.inverse_sqrt_newton_schulz(zero, 0.25, 20), 2 * identity),
        (roots.inverse_root_coupled_newton(zero, 2, 0.25, 20), 2 * identity),
    ):
        assert np.allclose(backend.numpy(got), expected, rtol=16 * U["float64"], atol=0)
    for solver in ITERATIONS:
        assert np.all(np.isfinite(backend.numpy(roots.inverse_sqrt(zero, 0.0, solver, 20))))


@pytest.mark.eager
@pytest.mark.parametrize("shape", [(0, 0), (2, 0, 0), (0, 3, 3)], ids=str)
def test_empty_matrices(backend: Backend, shape: tuple[int, ...]) -> None:
    empty = backend.asarray(np.zeros(shape))
    for function in (*INVERSE_ROOTS.values(), roots.polar):
        assert tuple(function(empty).shape) == shape
    assert tuple(roots.live(roots.eigh(empty)[0], backend.xp).shape) == shape[:-1]


class Watched:
    """A namespace whose factorisations refuse non-finite input."""

    def __init__(self, backend: Backend) -> None:
        xp = self._xp = backend.xp
        self.calls = 0

        def watch(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arrays: Any, **kwargs: Any) -> Any:
                self.calls += 1
                for a in arrays:
                    assert np.all(np.isfinite(backend.numpy(a))), "a non-finite matrix reached LAPACK"
                return function(*arrays, **kwargs)

            return call

        self.linalg = SimpleNamespace(
            eigh=watch(xp.linalg.eigh),
            svd=watch(xp.linalg.svd),
            solve=watch(xp.linalg.solve),
            matrix_norm=xp.linalg.matrix_norm,
            matrix_power=xp.linalg.matrix_power,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._xp, name)


@pytest.mark.eager
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("name", [*INVERSE_ROOTS, "polar"])
def test_a_bad_member_is_nan_and_spoils_no_other(backend: Backend, name: str, bad: float) -> None:
    function = INVERSE_ROOTS.get(name, roots.polar)
    batch = np.stack([spectrum_matrix(1e2, seed=s) for s in range(3)])
    alone = [backend.numpy(function(backend.asarray(m))) for m in batch]
    batch[1, 2, 3] = bad  # an infinity in an SVD is known to hang; a NaN off the diagonal to go unnoticed
    watched = Watched(backend)
    with np.errstate(invalid="ignore"):
        got = backend.numpy(function(backend.asarray(batch), xp=watched))
    assert np.all(np.isnan(got[1]))
    assert gap(got[0], alone[0]) <= 16 * U["float64"] * 1e2
    assert gap(got[2], alone[2]) <= 16 * U["float64"] * 1e2
    assert watched.calls == (1 if name in ("power", "inverse_shifted_sqrt", "polar") else 0)


@pytest.mark.eager
@pytest.mark.parametrize("name", [*INVERSE_ROOTS, "polar"])
def test_members_of_a_batch_have_their_own_scale(backend: Backend, name: str) -> None:
    function = INVERSE_ROOTS.get(name, roots.polar)
    batch = np.stack([spectrum_matrix(1e2, seed=s) * 4.0**e for s, e in ((0, 0), (1, -40), (2, 40))])
    got = backend.numpy(function(backend.asarray(batch)))
    for single, result in zip(batch, got, strict=True):
        assert gap(result, backend.numpy(function(backend.asarray(single)))) <= 16 * U["float64"] * 1e2


# ---- factorisations that fail ----------------------------------------------------------------------------------------


class LinAlgError(Exception):
    """As the libraries call it."""


def failing(backend: Backend, *dtypes: str) -> Any:
    """An eigendecomposition that fails on a batch with a negative corner, in these dtypes."""

    def eigh(a: Any) -> Any:
        host = backend.numpy(a)
        if host.dtype in dtypes and np.any(host[..., 0, 0] < 0):
            raise LinAlgError
        return backend.xp.linalg.eigh(a)

    return eigh


def check_attempt(backend: Backend, attempt: Any = lapack.attempt) -> None:
    """Of three members the second fails: in float32 alone, in both, and with another error."""
    batch = np.stack([spectrum_matrix(1e2, seed=s) * (-1) ** s for s in range(3)])
    for dtype, fails, saved in (
        ("float32", ("float32",), True),
        ("float32", ("float32", "float64"), False),
        ("float64", ("float64",), False),
    ):
        a = backend.asarray(batch, dtype)
        want = [backend.numpy(x) for x in backend.xp.linalg.eigh(a)]
        got = attempt(failing(backend, *fails), a, wider=True, xp=backend.xp)
        assert [(x.dtype, tuple(x.shape)) for x in got] == [(a.dtype, x.shape) for x in want]
        w, q = (backend.numpy(x) for x in got)
        assert all(np.array_equal(x[[0, 2]], y[[0, 2]]) for x, y in zip((w, q), want, strict=True))
        if saved:
            assert gap(q[1] * w[1] @ q[1].T, batch[1]) <= 16 * U["float32"] * 1e2
        else:
            assert np.all(np.isnan(w[1]))
            assert np.all(np.isnan(q[1]))

    def refuses_batches(a: Any) -> Any:
        if a.shape[0] > 1:
            raise OverflowError
        return backend.xp.linalg.eigh(a)

    try:
        attempt(refuses_batches, a, xp=backend.xp)
    except OverflowError:
        return
    raise AssertionError("an error of another kind was hidden")


@pytest.mark.eager
def test_a_factorisation_that_fails_is_nan_for_its_member(backend: Backend) -> None:
    check_attempt(backend)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("in_float64(array, xp) if wider else None", "None"),
        ('float("nan")', "0.0"),
        ("[xp.astype(result, arrays[0].dtype, copy=False) for result in function(*trial)]", "function(*trial)"),
        ('endswith("LinAlgError")', 'endswith("Error")'),
    ],
    ids=["not wider", "zero", "wider results", "any error"],
)
def test_planted_bugs_of_failed_factorisations(old: str, new: str) -> None:
    with pytest.raises((AssertionError, TypeError)):
        check_attempt(make_backend("numpy"), mutated(lapack, (old, new)).attempt)


@pytest.mark.parametrize("seed", [686, 1133, 1201, 1409])
def test_thirty_orders_of_magnitude_in_float32(seed: int) -> None:
    """Finite gradients of which PyTorch's eigh (MKL) does not converge in float32."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    d = int(rng.integers(2, 30))
    grads = [rng.standard_normal(d) * 10.0 ** rng.uniform(-15, 15, d) for _ in range(3)]
    for array in (np.asarray, torch.asarray):
        param = array(np.zeros(d, "float32"))
        method = pr.FullAdaGrad()
        state = method.init(param)
        for g in grads:
            direction, state = method.update(array(g.astype("float32")), state, param)
        assert np.all(np.isfinite(np.asarray(direction)))
        assert bool(method.diagnose(state).finite)


# ---- solving with a ridge -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("name", ["power", "inverse_shifted_sqrt", "polar"])
def test_what_overflows_in_the_decomposition_is_nan(backend: Backend, name: str) -> None:
    function = INVERSE_ROOTS.get(name, roots.polar)
    stack = np.stack([np.full((4, 4), 1.5e308), np.eye(4)])  # one eigenvalue, 6e308, which float64 does not have
    got = backend.numpy(backend.jit(function)(backend.asarray(stack)))
    assert np.all(np.isnan(got[0]))
    assert gap(got[1], np.eye(4)) <= 16 * U["float64"]


def check_overflow_is_nan(module: Any) -> None:
    huge = np.full((1, 4, 4), 1.5e308)
    assert np.all(np.isnan(module.power(huge, -0.5)))
    assert np.all(np.isnan(module.polar(huge)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_overflow_is_nan() -> None:
    check_overflow_is_nan(roots)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("check", "changes"),
    [
        (check_overflow_is_nan, [("finite & xp.all(w < math.inf, axis=-1)[..., None, None]", "finite")]),
        (check_overflow_is_nan, [("finite & (s[..., :1, None] < math.inf)", "finite")]),
    ],
    ids=["eigenvalues", "singular values"],
)
def test_planted_overflow_is_caught(check: Any, changes: list[tuple[str, str]]) -> None:
    with pytest.raises(AssertionError):
        check(mutated(roots, *changes))


def check_solve_in_fifty_digits(module: Any = roots, library: str = "numpy") -> None:
    """Gram matrices of full and of low rank: relative error of at most 16 u kappa, kappa that of A + ridge I."""
    backend = make_backend(library)
    rng = np.random.default_rng(5)
    sizes = (1, 3, 9) if library == "numpy" else (9,)  # JAX compiles for each
    for (dtype, u), n, rank, scale in itertools.product(U.items(), sizes, (1, 9), (1e-6, 1.0, 1e2)):
        g = (rng.standard_normal((2, rank, n)) * math.sqrt(scale)).astype(dtype).astype(float)
        right = rng.standard_normal((2, n, 2)).astype(dtype).astype(float)
        matrix = (np.swapaxes(g, -1, -2) @ g).astype(dtype).astype(float)
        ridge = 2.0**-9
        got = backend.numpy(module.solve(backend.asarray(matrix, dtype), backend.asarray(right, dtype), ridge))
        assert got.dtype == dtype
        for a, b, x in zip(matrix, right, got.astype(float), strict=True):
            with mpmath.workdps(50):
                truth = from_mp(mpmath.inverse(to_mp(a) + ridge * mpmath.eye(n)) * to_mp(b))
            assert gap(x, truth) <= 16 * u * np.linalg.cond(a + ridge * np.eye(n))


def check_hidden_ridge(module: Any = roots) -> None:
    """A ridge below rounding, or none, and matrices that are not positive semidefinite: what `power` says."""
    rng = np.random.default_rng(6)
    g, right = rng.standard_normal((5, 1, 4)), rng.standard_normal((5, 4, 2))
    matrix = np.swapaxes(g, -1, -2) @ g
    for a, ridge in (
        (1e14 * matrix, 0.25),
        (matrix, 0.0),
        (0 * matrix, 0.0),
        (spectrum_matrix(1e2, 4) - 0.5 * np.eye(4), 0.5001),  # almost singular once the ridge is added
        (spectrum_matrix(1e2, 4) - 0.5 * np.eye(4), 0.3),
    ):
        a = np.broadcast_to(a, matrix.shape)
        law = roots.Law(-1.0, ridge)
        assert np.array_equal(module.solve(a, right, ridge), roots.apply(right, {0: roots.decompose(a, law)}, law))


def check_solve_has_no_scale(module: Any = roots) -> None:
    """Right sides at both ends of the range, of size zero, and lopsided matrices."""
    a = spectrum_matrix(1e2, 3).astype("float32")
    right = np.random.default_rng(7).standard_normal((3, 2)).astype("float32")
    expected = module.solve(a, right, 0.25)
    for exponent in (-120, 120):
        got = module.solve(a, np.ldexp(right, exponent), 0.25)
        assert np.array_equal(got, np.ldexp(expected, exponent))
    assert not np.any(module.solve(a, 0 * right, 0.25))
    got = module.solve(np.ldexp(a, 100), np.ldexp(right, 100), 2.0**98)
    assert gap(got, expected) <= 32 * U["float32"] * 5
    skew = np.triu(np.ones((3, 3), "float32"), 1)
    assert gap(module.solve(a + skew - skew.T, right, 0.25), expected) <= 32 * U["float32"] * 5


def check_solve_keeps_members_apart(module: Any = roots, library: str = "numpy") -> None:
    """Nothing non-finite reaches LAPACK; a bad member is NaN, a bad right side not finite, the others as they were."""
    backend = make_backend(library)
    rng = np.random.default_rng(8)
    matrix = np.stack([spectrum_matrix(1e2, seed=s) for s in range(5)])
    right = rng.standard_normal((5, 6, 2))
    expected = backend.numpy(module.solve(backend.asarray(matrix), backend.asarray(right), 0.25))
    for bad in (math.inf, -math.inf, math.nan):
        a, b = matrix.copy(), right.copy()
        a[1, 2, 3] = b[3, 4, 0] = bad
        a[4] *= 1e20  # a hidden ridge
        watched = Watched(backend)
        with np.errstate(invalid="ignore"):
            got = backend.numpy(module.solve(backend.asarray(a), backend.asarray(b), 0.25, xp=watched))
        assert watched.calls == 2
        assert np.all(np.isnan(got[1]))
        assert not np.any(np.isfinite(got[3, :, 0]))
        assert np.array_equal(got[::2][:2], expected[::2][:2])
        assert gap(got[3, :, 1], expected[3, :, 1]) <= 16 * U["float64"] * 1e2
        assert gap(got[4], roots.power(a[4], -1.0, 0.25) @ b[4]) <= 1e-6
    alone = Watched(backend)
    module.solve(backend.asarray(matrix), backend.asarray(right), 0.25, xp=alone)
    assert alone.calls == 1  # no eigendecomposition


SOLVE_CHECKS = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_solve_in_fifty_digits,
        check_hidden_ridge,
        check_solve_has_no_scale,
        check_solve_keeps_members_apart,
    )
}
SOLVE_BUGS = {
    "ridge forgotten": ("shift = ridge * one", "shift = 0.0 * one", "solve_in_fifty_digits"),
    "not symmetrised": ("0.5 * matrix + 0.5 * xp.matrix_transpose(matrix) +", "matrix +", "solve_has_no_scale"),
    "LU whatever the ridge": ("0.5 * largest < ridge", "0.5 * largest < math.inf", "hidden_ridge"),
    "ridge doubled where hidden": ("law = Law(-1.0, ridge)", "law = Law(-1.0, 2 * ridge)", "hidden_ridge"),
    "solutions of any length": ("sure = sure & xp.all(", "sure = sure | xp.all(", "hidden_ridge"),
    "squares overflow": ("y = ridge * x / size", "y = ridge * x", "solve_has_no_scale"),
    "bad right sides to LAPACK": (" & (size < math.inf)", "", "solve_keeps_members_apart"),
    "bad matrices to LAPACK": ("xp.where(sure, damped, one)", "damped", "solve_keeps_members_apart"),
    "one sure, all believed": ("surely(sure)", "sure.any()", "solve_keeps_members_apart"),
    "all or nothing": ("xp.where(sure, x, definition(*given))", "definition(*given)", "solve_keeps_members_apart"),
}  # fmt: skip


@pytest.mark.parametrize("name", SOLVE_CHECKS)
def test_solve(name: str) -> None:
    SOLVE_CHECKS[name]()


@pytest.mark.parametrize("name", SOLVE_BUGS)
def test_planted_bug_in_solve_is_caught(name: str) -> None:
    old, new, check = SOLVE_BUGS[name]
    with pytest.raises((AssertionError, ArithmeticError, RuntimeWarning, np.linalg.LinAlgError)):
        SOLVE_CHECKS[check](mutated(roots, (old, new)))


@pytest.mark.parametrize("library", [name for name in EAGER if name != "numpy"])
def test_solve_on_other_libraries(library: str) -> None:
    check_solve_in_fifty_digits(library=library)
    check_solve_keeps_members_apart(library=library)


@pytest.mark.parametrize("right", [(6, 1), (6, 3)], ids=str)
@pytest.mark.full
def test_solve_in_compiled_graphs(right: tuple[int, int]) -> None:
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    rng = np.random.default_rng(9)
    b = rng.standard_normal((4, *right))
    good = np.stack([spectrum_matrix(1e2, seed=s) for s in range(4)])
    mixed = good * np.array([1.0, 1e20, math.nan, 1.0])[:, None, None]
    namespace = make_backend("torch").xp
    compiled = torch.compile(lambda a, b: roots.solve(a, b, 0.25, xp=namespace), fullgraph=True, backend="aot_eager")
    jitted = jax.jit(lambda a, b: roots.solve(a, b, 0.25, xp=jax.numpy))
    for a in (good, mixed):
        expected = roots.solve(a, b, 0.25)
        with jax.enable_x64(True):
            results = [np.asarray(jitted(a, b)), compiled(torch.tensor(a), torch.tensor(b)).numpy()]
        for got in results:
            assert np.array_equal(np.isnan(got), np.isnan(expected))
            keep = [0, 3] if a is mixed else slice(None)
            assert gap(got[keep], expected[keep]) <= 16 * U["float64"] * 1e2
            assert gap(got[1], expected[1]) <= 1e-6


@pytest.mark.parametrize("shapes", [((0, 0), (0, 2)), ((3, 3), (3, 0)), ((0, 3, 3), (0, 3, 1))], ids=str)
def test_solve_of_nothing(shapes: Any) -> None:
    matrix, right = map(np.zeros, shapes)
    assert roots.solve(matrix, right, 0.25).shape == right.shape


# ---- properties -----------------------------------------------------------------------------------------------------


@st.composite
def gram_matrices(draw: st.DrawFn) -> np.ndarray:
    """B B^T + I for a small integer B: exact, of condition number at most 1 + ||B||_F^2."""
    n, k = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    entries = draw(st.lists(st.integers(-4, 4), min_size=n * k, max_size=n * k))
    b = np.array(entries, dtype=float).reshape(n, k)
    return b @ b.T + np.eye(n)


@given(a=gram_matrices())
def test_p_a_p_is_the_identity(a: np.ndarray) -> None:
    kappa = np.linalg.cond(a)
    identity = np.eye(len(a))
    for function in INVERSE_ROOTS.values():
        p = function(a)
        # an error u kappa ||P|| of P, times ||A^{1/2}|| on the other side, twice
        assert np.linalg.norm(p @ a @ p - identity, 2) <= 32 * U["float64"] * kappa**1.5
        assert np.linalg.norm(p - p.T) <= 16 * U["float64"] * kappa * np.linalg.norm(p)


@given(a=gram_matrices(), seed=st.integers(0, 2**32 - 1), exponent=st.sampled_from([-1.0, -0.5, -0.25, 0.5]))
def test_powers_commute_with_orthogonal_similarity(a: np.ndarray, seed: int, exponent: float) -> None:
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal(a.shape))
    bound = 32 * U["float64"] * np.linalg.cond(a)  # twice that of one power
    turned = q @ a @ q.T
    assert gap(roots.power(turned, exponent, 0.25), q @ roots.power(a, exponent, 0.25) @ q.T) <= bound
    assert gap(roots.inverse_shifted_sqrt(turned, 0.5), q @ roots.inverse_shifted_sqrt(a, 0.5) @ q.T) <= bound


@given(a=gram_matrices())
def test_powers_add_up(a: np.ndarray) -> None:
    kappa = np.linalg.cond(a)
    quarter = roots.power(a, -0.25)
    assert gap(quarter @ quarter, roots.power(a, -0.5)) <= 64 * U["float64"] * kappa
    assert gap(roots.power(a, -0.5) @ roots.power(a, 0.5), np.eye(len(a))) <= 64 * U["float64"] * kappa**1.5


def check_newton_of_large(module: Any) -> None:
    """A matrix whose norm overflows has the root of a smaller one."""
    a = np.array([[3.0, 1.0, 0.5], [1.0, 3.0, 1.0], [0.5, 1.0, 3.0]])
    for order, steps in ((2, 12), (4, 20)):
        small, large = (module.inverse_root_coupled_newton(a * 2.0**k, order, 0.0, steps) for k in (0, 1022))
        assert np.allclose(large * 2.0 ** (1022 / order), small, rtol=1e-13, atol=0)


def test_newton_of_large_matrices() -> None:
    check_newton_of_large(roots)


def test_planted_bug_in_newton_of_large_matrices() -> None:
    m = "matrix + ridge * identity"
    whole = (f"normed({m}, (-2, -1), xp)", f"(xp.ones_like(matrix), {m}, frobenius({m}, (-2, -1), xp))")
    with pytest.raises((AssertionError, RuntimeWarning)):
        check_newton_of_large(mutated(roots, whole))
