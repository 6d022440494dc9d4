"""Averages, corrections, quotients, scaling and the refresh rule, against 50-digit arithmetic and by hand."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial
from types import SimpleNamespace
from typing import Any

import array_api_strict
import mpmath
import numpy as np
import pytest
import torch
from conftest import Backend, make_backend
from helpers import distance
from hypothesis import given
from hypothesis import strategies as st
from mutation import mutated

import precond_ref
from precond_ref.numerics import arrays, refresh
from precond_ref.numerics.arrays import frobenius, largest_entry, normed
from precond_ref.numerics.ema import accumulate, ema, one_minus_power, quotient, reciprocal, sqrt
from precond_ref.numerics.grafting import scale_to_rms
from precond_ref.numerics.refresh import renew

betas = st.floats(0, 1, exclude_max=True, allow_subnormal=False)
U64, U32 = 2.0**-53, 2.0**-24


def exact(beta: float, step: int) -> float:
    with mpmath.workdps(50):
        return float(1 - mpmath.mpf(beta) ** step)


@given(beta=betas, step=st.integers(0, 10**6))
def test_one_minus_power_of_python_numbers(beta: float, step: int) -> None:
    """log(beta) is off by u, which beta^t multiplies by |t log beta|; that times beta^t / (1 - beta^t) is below 1."""
    assert abs(one_minus_power(beta, step) - exact(beta, step)) <= 4 * U64 * exact(beta, step)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.999999])
@pytest.mark.parametrize("step", [0, 1, 2, 10, 1000])
@pytest.mark.full
def test_one_minus_power_traced_in_the_dtype(dtype: str, beta: float, step: int) -> None:
    jax = pytest.importorskip("jax")
    backend = make_backend("jax")
    like = backend.asarray(np.ones(2), dtype)
    u = U64 if dtype == "float64" else U32
    for by_field in (False, True):  # the hyperparameter is traced too, as optax's inject_hyperparams does
        f = jax.jit(lambda t, b: one_minus_power(b, t, like=like)) if by_field else None
        value = f(step, beta) if f else jax.jit(lambda t: one_minus_power(beta, t, like=like))(step)
        assert value.dtype == like.dtype
        assert value.shape == ()
        # a traced beta is rounded to the dtype first: the truth is that of the rounded one
        used = float(np.asarray(beta, dtype=dtype)) if by_field else beta
        assert abs(float(value) - exact(used, step)) <= 8 * u * exact(used, step)


def test_the_naive_power_would_fail() -> None:
    naive = float(np.float32(1) - np.float32(0.999) ** np.int32(1))
    assert abs(naive - 0.001) > 100 * U32 * 0.001


def test_one_minus_power_with_an_array_hyperparameter_and_a_python_step() -> None:
    like = np.ones(2, "float32")
    value = one_minus_power(np.asarray(0.75), 3, like=like)
    assert value.dtype == np.float32
    assert abs(float(value) - exact(0.75, 3)) <= 4 * U32
    half = np.ones(2, "float16")
    assert one_minus_power(np.asarray(0.999, "float32"), 1, like=half).dtype == np.float16
    assert abs(float(one_minus_power(np.asarray(0.999, "float32"), 1, like=half)) - 0.001) <= 2**-10 * 0.001


def test_reciprocal_and_sqrt_of_numbers_and_arrays() -> None:
    assert reciprocal(0.0) == 0.0
    assert reciprocal(4.0) == 0.25
    assert reciprocal(np.asarray(0.0)) == 0.0
    assert reciprocal(np.asarray(4.0)) == 0.25
    assert sqrt(4.0) == sqrt(np.asarray(4.0)) == 2.0


def test_ema() -> None:
    assert ema(2.0, 10.0, 0.75) == 4.0
    assert ema(2.0, 10.0, 0.0) == 10.0


def check_surely(surely: Any, xp: Any, knows: bool) -> None:
    """All or nothing, and nothing where a device would be waited for."""
    for values in ([True, True], [True, False], [False, False], []):
        assert surely(xp.asarray(values, dtype=xp.bool)) is (knows and all(values))


class Elsewhere(torch.Tensor):
    """On a GPU, as far as can be seen without reading."""

    @staticmethod
    def __new__(cls) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, (2,), dtype=torch.bool, device="cuda")

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise AssertionError("a value was read")


def check_surely_reads_no_tensor_without_a_value(surely: Any) -> None:
    assert not surely(Elsewhere())
    assert not surely(torch.ones(2, dtype=torch.bool, device="meta"))
    seen = []
    torch.func.vmap(lambda x: (seen.append(surely(x > 0)), x)[1])(torch.ones(2, 3))
    assert seen == [False]


@pytest.mark.eager
def test_surely(backend: Backend) -> None:
    on_device = SimpleNamespace(bool=backend.xp.bool, asarray=partial(backend.xp.asarray, device=backend.device))
    check_surely(refresh.surely, on_device, backend.name in ("numpy", "torch"))
    check_surely_reads_no_tensor_without_a_value(refresh.surely)


@pytest.mark.parametrize(
    ("check", "change"),
    [
        (partial(check_surely, xp=np, knows=True), ("condition.all()", "condition.any()")),
        (partial(check_surely, xp=np, knows=True), ("and bool(", "and not bool(")),
        (
            partial(check_surely, xp=array_api_strict, knows=False),
            ("return bool(is_numpy_array(array))", "return True"),
        ),
        (check_surely_reads_no_tensor_without_a_value, (' or array.device.type != "cpu" or', " or")),
        (check_surely_reads_no_tensor_without_a_value, (" or _has_no_value(array)", "")),
    ],
)
def test_planted_bugs_in_surely(check: Any, change: tuple[str, str]) -> None:
    with pytest.raises((AssertionError, AttributeError, RuntimeError)):
        check(mutated(refresh, change).surely)


@pytest.mark.eager
def test_quotient(backend: Backend) -> None:
    numerator = backend.asarray([0.0, 1.0, -1.0, 0.0, math.nan, 6.0, 0.0])
    denominator = backend.asarray([0.0, 0.0, 0.0, 2.0, 2.0, 3.0, math.nan])
    with np.errstate(divide="ignore"):
        got = backend.numpy(quotient(numerator, denominator, backend.xp))
    assert np.array_equal(got, [0.0, math.inf, -math.inf, 0.0, math.nan, 2.0, math.nan], equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.eager
def test_quotient_with_a_bound(backend: Backend, dtype: str) -> None:
    """A bound that the dtype rounds to zero, or to a subnormal number, proves nothing."""
    numerator, denominator = backend.asarray([0.0, 0.0, math.nan], dtype), backend.asarray([0.0, 2.0, 2.0], dtype)
    least = float(np.finfo(dtype).smallest_normal)
    for bound in (0.0, least / 2, least / 2**60, np.asarray(1.0)):
        got = backend.numpy(quotient(numerator, denominator, backend.xp, bound=bound))
        assert np.array_equal(got, [0.0, 0.0, math.nan], equal_nan=True)
    got = backend.numpy(quotient(numerator[1:], denominator[1:], backend.xp, bound=least))
    assert np.array_equal(got, [0.0, math.nan], equal_nan=True)
    with np.errstate(invalid="ignore"):  # where the bound is believed, nothing is looked at
        assert np.isnan(backend.numpy(quotient(numerator, denominator, backend.xp, bound=least))[0])


def check_ema(average: Any, backend: Backend, decay: float) -> None:
    for old, new in ((3.0, 0.0), (0.0, 5.0), (3.0, 5.0), (-3.0, 5.0)):
        got = float(backend.numpy(average(*(backend.asarray([x], "float32") for x in (old, new)), decay))[0])
        exact_value = Fraction(decay) * Fraction(old) + (1 - Fraction(decay)) * Fraction(new)
        assert abs(Fraction(got) - exact_value) <= 4 * Fraction(U32) * (
            Fraction(decay) * abs(Fraction(old)) + (1 - Fraction(decay)) * abs(Fraction(new))
        )


@pytest.mark.parametrize("decay", [0.0, 2.0**-30, 0.25, 0.5, 0.999, 1 - 2.0**-20])
@pytest.mark.eager
def test_ema_keeps_the_digits_of_its_decay(backend: Backend, decay: float) -> None:
    """Also of 1 - decay, near 1: float32 numbers against exact arithmetic."""
    check_ema(ema, backend, decay)


def test_the_check_catches_a_decay_rounded_before_it_is_taken_from_one() -> None:
    backend = make_backend("torch")
    with pytest.raises(AssertionError):
        check_ema(lambda old, new, decay: new.lerp(old, decay), backend, 0.999)
    with pytest.raises(AssertionError):
        check_ema(lambda old, new, decay: old.lerp(new, 1 - decay), backend, 2.0**-30)


def check_accumulate(function: Any, backend: Backend) -> None:
    old, new = backend.asarray([3.0], "float32"), backend.asarray([5.0], "float32")
    for decay, expected in ((1.0, 8.0), (0.75, 3.5), (0.0, 5.0)):
        for value in (decay, backend.asarray(decay, "float32")):
            assert backend.numpy(function(old, new, value)).tolist() == [expected]


@pytest.mark.eager
def test_accumulate_sums_or_averages(backend: Backend) -> None:
    check_accumulate(accumulate, backend)
    with pytest.raises(AssertionError):
        check_accumulate(ema, backend)


def check_largest_entry(function: Any, backend: Backend) -> None:
    rows = [[1.0, -3.0], [0.0, -0.0], [-1.0, -math.inf], [math.nan, 2.0], [math.inf, -math.inf]]
    got = backend.numpy(function(backend.asarray(np.array(rows)[:, None], "float32"), (-2, -1), backend.xp))
    assert got.shape == (5, 1, 1)
    assert np.array_equal(got.ravel(), [3.0, 0.0, math.inf, math.nan, math.inf], equal_nan=True)
    empty = backend.numpy(function(backend.asarray(np.zeros((2, 0, 3)), "float32"), (-2, -1), backend.xp))
    assert np.array_equal(empty, np.zeros((2, 1, 1)))


@pytest.mark.eager
def test_largest_entry(backend: Backend) -> None:
    check_largest_entry(largest_entry, backend)
    for mistake in (
        lambda a, axes, xp: xp.max(a, axis=axes, keepdims=True) if 0 not in a.shape else largest_entry(a, axes, xp),
        lambda a, axes, xp: xp.max(xp.abs(a), axis=axes, keepdims=True),
        lambda a, axes, xp: largest_entry(xp.where(xp.isnan(a), 0.0, a), axes, xp),
    ):
        with pytest.raises((AssertionError, ValueError, IndexError, RuntimeError)):
            check_largest_entry(mistake, backend)


def check_norm_of_many(function: Any, backend: Backend) -> None:
    """Of 2^20 entries 0.1: sums by halves or in float64 lose a few u, one after the other in float32 2^-9."""
    array = backend.asarray(np.full((1024, 1024), 0.1), "float32")
    size, _, norm = function(array, (-2, -1), backend.xp)
    assert abs(float(backend.numpy(size * norm)[0, 0]) - 102.4) <= 102.4 * 2.0**-16


def test_norms_of_large_matrices_keep_their_digits() -> None:
    backend = make_backend("torch")
    check_norm_of_many(normed, backend)
    with pytest.raises(AssertionError):
        check_norm_of_many(lambda a, axes, xp: (1.0, a, xp.linalg.vector_norm(a, axis=axes, keepdims=True)), backend)


def check_frobenius(function: Any, backend: Backend) -> None:
    """The norm in 100 digits at any scale; a member's bits do not depend on the others; NaN for what is not finite."""
    rng = np.random.default_rng(0)
    for dtype, bits in (("float32", 128), ("float64", 1024)):
        u, tiny = np.finfo(dtype).eps, float(np.finfo(dtype).smallest_subnormal)
        sizes = [2.0 ** round(share * bits) for share in (-0.9, -0.58, -0.34, -0.3, 0, 0.33, 0.36, 0.52, 0.96)]
        rows = np.array(sizes)[:, None] * rng.uniform(0.5, 1, 50).astype(dtype) * rng.choice([-1, 1], 50)
        rows = np.concatenate([rows, [np.zeros(50), np.full(50, tiny)]]).astype(dtype)
        got = backend.numpy(function(backend.asarray(rows, dtype), (-1,), backend.xp))
        assert got.shape == (11, 1)
        assert got.dtype == dtype
        for row, norm in zip(rows, got[:, 0], strict=True):
            want = mpmath.sqrt(mpmath.fsum(mpmath.mpf(float(x)) ** 2 for x in row))
            assert abs(mpmath.mpf(float(norm)) - want) <= 8 * u * want + mpmath.mpf(tiny) / 2
        assert np.array_equal(got[:9, 0] / sizes, np.full(9, got[4, 0]))  # powers of two round nothing
        alone = [backend.numpy(function(backend.asarray(row[None], dtype), (-1,), backend.xp)) for row in rows]
        assert np.array_equal(np.concatenate(alone), got)
        bad = np.stack([rows[4], rows[4], rows[4], rows[0]])
        bad[:3, 7] = np.inf, -np.inf, np.nan
        found = backend.numpy(function(backend.asarray(bad, dtype), (-1,), backend.xp))
        assert np.array_equal(found[:, 0], [np.nan, np.nan, np.nan, got[0, 0]], equal_nan=True)


def check_frobenius_in_both(function: Any) -> None:
    with np.errstate(all="ignore"):
        for name in ("numpy", "torch"):
            check_frobenius(function, make_backend(name))


def test_frobenius_norms() -> None:
    check_frobenius_in_both(frobenius)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(-0.35, 0.34, -0.69, 0.67)", "(-0.65, 0.34, -0.69, 0.67)"),
        ("(-0.35, 0.34, -0.69, 0.67)", "(-0.35, 0.54, -0.69, 0.67)"),
        ("(-0.35, 0.34, -0.69, 0.67)", "(-0.35, 0.34, -0.4, 0.67)"),
        ("2.0 ** round(share * bits)", "2.0 ** (share * bits) / 3"),
        ("keepdims=True)) + 0.0 * peak", "keepdims=True))"),
        ("-xp.min(array, axis=axes, keepdims=True)", "0.0"),
        ("surely(size == 1)", "surely(size < 2)"),
        ("(total > low * low)", "(total >= 0)"),
        ("& (total < high * high)", "& (total >= 0)"),
    ],
)
def test_a_planted_bug_in_a_norm_is_found(old: str, new: str) -> None:
    copy = mutated(arrays, (old, new))
    with pytest.raises(AssertionError):
        check_frobenius_in_both(copy.frobenius)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1.0, 1e30])
@pytest.mark.eager
def test_scale_to_rms_is_exact_at_any_scale(backend: Backend, scale: float) -> None:
    u = np.random.default_rng(0).standard_normal((2, 3, 4))
    u[1] = 0
    got = backend.numpy(scale_to_rms(backend.asarray(u * scale, "float32"), 0.25, (-2, -1), backend.xp))
    assert got.dtype == np.float32
    assert abs(np.sqrt(np.mean(got[0].astype(float) ** 2)) - 0.25) <= 8 * U32
    assert np.allclose(got[0] / got[0, 0, 0], u[0] / u[0, 0, 0], rtol=8 * U32)
    assert np.array_equal(got[1], np.zeros((3, 4)))


def test_refresh_rule() -> None:
    method = precond_ref.ASGO(every=3)
    assert [t for t in range(8) if method.due(t)] == [0, 3, 6]
    assert method.overruled(True) is True
    assert method.overruled(False) is False
    with pytest.raises(ValueError, match="refresh=False needs every > 1"):
        precond_ref.ASGO().overruled(False)
    with pytest.raises(TypeError, match="refresh must be True, False or None, got 1"):
        method.overruled(1)
    calls: list[int] = []

    def compute() -> Any:
        calls.append(1)
        return "new"

    assert renew(False, compute, "old") == "old"
    assert not calls
    assert renew(True, compute, "old") == "new"
    assert renew(False, compute, None) == "new"  # nothing to keep
    assert renew(np.asarray(True), compute, "old") == "new"
    assert renew(np.asarray(False), compute, "old") == "old"


@pytest.mark.parametrize("at", [0, 1, 2])
def test_distances_of_the_tests_see_nan_at_any_step(at: int) -> None:
    right, wrong = np.ones((3, 2)), np.ones((3, 2))
    wrong[at, 1] = np.nan
    assert distance(right, right) == 0.0
    assert np.isnan(distance(wrong, right))
    cases = pytest.importorskip("torch_adapter_cases")
    assert np.isnan(cases.distance(*(list(map(cases.torch.from_numpy, x)) for x in (wrong, right))))
