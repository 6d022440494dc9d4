"""Adafactor against torch.optim, optax, its limits and laws, and planted bugs."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import directions, distance, gradients
from mutation import mutated

import precond_ref as pr
from precond_ref.methods import adafactor

STEPS = 12
SHAPES = [(5, 3), (7,), (2, 3, 4), ()]
PLAIN = {"clip": None, "parameter_scale": False}


def start(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(99).standard_normal(shape)


def iterates(method: Any, grads: np.ndarray, rate: Callable[[int], float], decay: float = 0.0) -> np.ndarray:
    """x <- (1 - decay) x - rate(t) direction."""
    x = start(grads.shape[1:])
    state, out = method.init(x), []
    for t, g in enumerate(grads, start=1):
        direction, state = method.update(g, state, x)
        x = (1 - decay) * x - rate(t) * direction
        out.append(x)
    return np.stack(out)


def by_torch(grads: np.ndarray, **options: Any) -> np.ndarray:
    p = torch.nn.Parameter(torch.tensor(start(grads.shape[1:])))
    optimizer, out = torch.optim.Adafactor([p], **options), []
    for g in grads:
        p.grad = torch.tensor(g)
        optimizer.step()
        out.append(p.detach().numpy().copy())
    return np.stack(out)


def check_torch(module: ModuleType) -> None:
    """With its learning rate, which is a cap, and its decay, which is before the step and not capped."""
    for shape in SHAPES:
        for scale in (1.0, 1e-3):  # below sqrt(eps1) the floors are what counts
            grads = gradients(shape, STEPS) * scale
            theirs = by_torch(grads, lr=0.3, weight_decay=0.125, d=1.0, beta2_decay=-0.875, eps=(2.0**-10, 2.0**-4))
            ours = module.Adafactor.torch(eps1=2.0**-10, decay_rate=0.875).replace(eps2=2.0**-4)
            rate = lambda t: module.Adafactor.relative_step(t - 1, most=0.3)  # noqa: E731
            assert distance(iterates(ours, grads, rate, 0.3 * 0.125), theirs) <= 1e-13
    grads = gradients((5, 3), STEPS)
    theirs = by_torch(grads, lr=0.3)
    assert distance(iterates(module.Adafactor.torch(), grads, lambda t: min(0.3, t**-0.5)), theirs) <= 1e-13


def check_optax(module: ModuleType) -> None:
    """It averages the steps, decays without the rate, and computes w_t in float32."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    optax = pytest.importorskip("optax", reason="optax is not installed")
    for shape in [(5, 3), (2, 3, 4), (7,)]:
        grads = gradients(shape, STEPS)
        opt = optax.adafactor(
            0.25, min_dim_size_to_factor=3, decay_rate=0.875, momentum=0.625, weight_decay_rate=0.03125, eps=2.0**-10,
            dtype_momentum=np.float64, clipping_threshold=0.75,
        )  # fmt: skip
        with jax.enable_x64(True):
            x = jax.numpy.asarray(start(shape))
            state, theirs = opt.init(x), []
            for g in grads:
                updates, state = opt.update(jax.numpy.asarray(g), state, x)
                x = x + updates
                theirs.append(np.asarray(x))
        ours = module.Adafactor.optax(eps1=2.0**-10, decay_rate=0.875, min_size=3).replace(beta1=0.625, clip=0.75)
        assert distance(iterates(ours, grads, lambda t: 0.25, 0.03125), np.stack(theirs)) <= 1e-6


def check_rank_one(module: ModuleType) -> None:
    """Squares a b^T tau_t: V is exact, so it is RMSProp with decay 1 - w_t."""
    a, b = np.random.default_rng(1).uniform(0.5, 2, (2, 5))
    signs = np.sign(gradients((5, 3), STEPS))
    grads = signs * np.sqrt(a[:, None] * b[:3]) * np.arange(1, STEPS + 1)[:, None, None] ** 0.5
    v, want = np.zeros((5, 3)), []
    for t, g in enumerate(grads, start=1):
        v = v + t**-0.75 * (g * g - v)
        want.append(g / np.sqrt(v))
    got = directions(module.Adafactor(decay_rate=0.75, eps1=0.0, **PLAIN), grads)
    assert distance(got, np.stack(want)) <= 1e-13


def check_adam(module: ModuleType) -> None:
    """Adam's schedule is Adam with beta1 = eps = 0: without factors, or where the squares are of rank one."""
    grads, adam = gradients((5, 3), STEPS), pr.Adam(beta1=0.0, beta2=0.75, eps=0.0)
    method = module.Adafactor(decay_schedule="adam", decay_rate=0.75, eps1=0.0, factored_axes=None, **PLAIN)
    assert distance(directions(method, grads), directions(adam, grads)) <= 1e-14
    rows, columns = np.random.default_rng(1).uniform(0.5, 2, (2, 5))
    scale = np.arange(1, STEPS + 1)[:, None, None]
    rank_one = np.sign(grads) * np.sqrt(scale * np.outer(rows, columns[:3]))
    factored = method.replace(factored_axes="last")
    assert distance(directions(factored, rank_one), directions(adam, rank_one)) <= 1e-14
    assert distance(directions(factored, grads), directions(adam, grads)) > 0.1


def check_laws(module: ModuleType) -> None:
    """Sums of V, size of the step, scale of gradients and parameter, transposition, signed permutations."""
    grads = gradients((5, 3), STEPS)
    method = module.Adafactor(eps1=0.0625, eps2=0.25, clip=0.75, decay_rate=0.875)
    x = 4 * start((5, 3))

    def run(method: Any, x: np.ndarray, grads: np.ndarray) -> np.ndarray:
        state, out = method.init(x), []
        for g in grads:
            d, state = method.update(g, state, x)
            out.append(d)
        return np.stack(out)

    want = run(method, x, grads)
    sizes = np.sqrt(np.mean(want**2, axis=(1, 2)))
    assert np.all(sizes <= 0.75 * np.sqrt(np.mean(x**2)) * (1 + 1e-14))
    assert np.any(sizes > 0.7 * np.sqrt(np.mean(x**2)))
    assert distance(run(method, 3 * x, grads), 3 * want) <= 1e-14
    assert distance(run(method.replace(eps1=0.0625 * 9), x, 3 * grads), want) <= 1e-14
    assert distance(run(method, x.T, np.swapaxes(grads, 1, 2)), np.swapaxes(want, 1, 2)) <= 1e-14
    order, signs = [2, 0, 4, 1, 3], np.array([1, -1, 1, 1, -1])[:, None]
    assert distance(run(method, x, signs * grads[:, order]), signs * want[:, order]) <= 1e-14
    first = module.Adafactor(eps1=0.0, factored_axes=None, parameter_scale=False)
    assert np.allclose(directions(first, grads[:1]), np.sign(grads[:1]), rtol=0, atol=1e-15)
    row, alone = grads[:, :1], first.replace(factored_axes="last", clip=None)
    assert distance(directions(alone, row), directions(alone.replace(factored_axes=None), row)) <= 1e-14


def check_sums(module: ModuleType) -> None:
    """V has the row and column sums of the average of the squares, for each matrix of a tensor."""
    grads = gradients((2, 3, 4), STEPS)
    method = module.Adafactor(decay_rate=0.875, eps1=0.0, **PLAIN)
    state, average = method.init(grads[0]), np.zeros((2, 3, 4))
    for t, g in enumerate(grads, start=1):
        _, state = method.update(g, state, g)
        average = average + t**-0.875 * (g * g - average)
    v = method.diagnose(state).denominator ** 2
    for axis in (1, 2):
        assert np.allclose(v.sum(axis=axis), average.sum(axis=axis), rtol=1e-13, atol=0)


def check_small(module: ModuleType) -> None:
    """Gradients whose products of squares float32 does not have; a bad gradient is never forgotten."""
    grads = (gradients((5, 3), 4) * 1e-14).astype(np.float32)
    method = module.Adafactor(**PLAIN)
    want = directions(method, grads.astype(np.float64))
    state = method.init(grads[0])
    for g, d in zip(grads, want, strict=True):
        got, state = method.update(g, state, g)
        assert np.linalg.norm(got - d) <= 1e-5 * np.linalg.norm(d)
    for shape in ((2, 3, 4), (7,)):
        for clip in (1.0, None):
            method, grads = module.Adafactor(clip=clip), gradients(shape, 3)
            grads[0].flat[1] = np.inf
            with np.errstate(invalid="ignore"):
                assert np.all(np.isnan(directions(method, grads)))


def check_choice(module: ModuleType) -> None:
    """Which axes are factored."""
    wanted = [
        ("last", 0, (4, 2, 3), (1, 2)), ("last", 3, (4, 2, 3), None), ("last", 0, (7,), None), ("last", 0, (), None),
        ("largest", 0, (4, 2, 3), (0, 2)), ("largest", 3, (3, 2, 4), (0, 2)), ("largest", 4, (4, 2, 3), None),
        ("largest", 0, (4, 4, 4), (1, 2)), ("leading", 0, (4, 2, 3), (0, 1)), ("leading", 3, (4, 2, 3), None),
        ("leading", 3, (2, 4, 3), (1, 2)), ("leading", 3, (4, 3), (0, 1)), ("leading", 3, (4,), None),
        (None, 0, (4, 3), None),
    ]  # fmt: skip
    for rule, least, shape, axes in wanted:
        method = module.Adafactor(factored_axes=rule, min_size=least)
        assert method.factored(shape) == axes, (rule, least, shape)
        state = method.init(np.zeros((2, *shape)), stack_ndim=1)
        assert (state.v is None) == (axes is not None)
        if axes is not None:
            assert state.row.shape == (2, *(1 if i == axes[1] else d for i, d in enumerate(shape)))
            assert state.col.shape == (2, *(1 if i == axes[0] else d for i, d in enumerate(shape)))


CHECKS = {
    "torch": check_torch,
    "optax": check_optax,
    "rank one": check_rank_one,
    "adam": check_adam,
    "laws": check_laws,
    "sums": check_sums,
    "small": check_small,
    "choice": check_choice,
}


@pytest.mark.parametrize("name", CHECKS)
def test_adafactor(name: str) -> None:
    CHECKS[name](adafactor)


BUGS = {
    "columns summed": ("xp.mean(square, axis=a, keepdims=True)", "xp.sum(square, axis=a, keepdims=True)", "rank one"),
    "mean missing": ("keepdims=True))\n            row, col", "keepdims=True)) * 0 + 1\n            row, col",
                     "rank one"),
    "one mean": (
        "mean = xp.mean(state.row, axis=self._axes(state, stack)[0], keepdims=True)", "mean = xp.mean(state.row)",
        "sums",
    ),
    "decay from t + 1": ("float(max(step - offset, 1))", "float(max(step + 1 - offset, 1))", "torch"),
    "old weight by the exponent's sign": ("power = -rate * log", "power = rate * log", "rank one"),
    "adam not corrected": ("(1 - rate) * over", "(1 - rate)", "adam"),
    "clip inverted": (
        "self.clip / clamp(rms, self.clip, xp=xp)", "self.clip / clamp(rms, 0.0, self.clip, xp=xp)", "laws",
    ),
    "clip missing": ("else self.clip / clamp(rms, self.clip, xp=xp)", "else 1.0", "torch"),
    "eps2 added": ("clamp(_rms(x, now.stack, xp), self.eps2, xp=xp)", "(_rms(x, now.stack, xp) + self.eps2)", "torch"),
    "norm instead of RMS": (" / math.sqrt(flat.shape[-1])", "", "torch"),
    "floor of the mean squared": (
        "mean = clamp(mean, self._eps1(mean.dtype, xp), xp=xp)", "mean = clamp(mean, self._eps1(mean.dtype, xp) ** 2, "
        "xp=xp)", "torch",
    ),
    "no floor of the estimate": (
        "return clamp(root, eps1, xp=xp) if floor and", "return root if floor and",
        "torch",
    ),
    "eps1 twice": ("else g * g + eps1  # (1)", "else g * g + 2 * eps1  # (1)", "optax"),
    "decay without the scale": ("self.weight_decay * scale * x", "self.weight_decay * x", "decay"),
    "heavy ball": ("m = ema(state.m, u, self.beta1)", "m = self.beta1 * state.m + u", "optax"),
    "product underflows": (
        "quotient(over, xp.where(row == 0, math.inf, row), xp) * (1 / xp.where(col == 0, math.inf, col))",
        "(1 / xp.sqrt(xp.where(row * col == 0, math.inf, (row * col) ** 2))) * over", "small",
    ),
    "bad gradient forgotten without factors": ("square + bad  # (4)", "square  # (4)", "small"),
    "bad entry alone": ("clipped = 1.0 + 0.0 * rms if", "clipped = 1.0 if", "small"),
    "no floor of V": ("floor and not surely(least >= eps1)", "floor and not surely(least >= 0)", "torch"),
    "smallest axes": ("(shape[i], i))[-2:]", "(shape[i], i))[:2]", "choice"),
    "above the least size": (">= self.min_size", "> self.min_size", "choice"),
    "leading only": ("pairs = [(0, 1), *pairs]", "pairs = [(0, 1)]", "choice"),
}  # fmt: skip


def check_decay(module: ModuleType) -> None:
    """(10): outside the average, times the scale."""
    grads, x = gradients((5, 3), 3), 4 * start((5, 3))
    for momentum_of in ("step", "update"):
        for scaled in (True, False):
            plain = module.Adafactor(beta1=0.625, momentum_of=momentum_of, parameter_scale=scaled)
            decayed = plain.replace(weight_decay=0.125)
            scale = np.sqrt(np.mean(x**2)) if scaled else 1.0
            states = [plain.init(x)] * 2
            for g in grads:
                (a, states[0]), (b, states[1]) = (
                    m.update(g, s, x) for m, s in zip((plain, decayed), states, strict=True)
                )
                assert np.allclose(b - a, 0.125 * scale * x, rtol=1e-13, atol=1e-14)


CHECKS["decay"] = check_decay


def test_decay() -> None:
    check_decay(adafactor)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name: str) -> None:
    old, new, checks = BUGS[name]
    module = mutated(adafactor, (old, new))
    (check,) = (CHECKS[check] for check in CHECKS if check == checks)
    with np.errstate(all="ignore"), pytest.raises(AssertionError):
        check(module)


def test_relative_step() -> None:
    rate = pr.Adafactor.relative_step
    assert [rate(t) for t in (0, 9999, 39999)] == [1e-2, 1e-2, 1 / 200]
    assert np.allclose([rate(t, warmup=True) for t in (0, 9, 10**8 - 1)], [1e-6, 1e-5, 1e-4], rtol=1e-14, atol=0)
    for t in (0, 9, 39999):
        for warmup in (False, True):
            traced = float(rate(torch.tensor(t), warmup=warmup))
            assert math.isclose(traced, rate(t, warmup=warmup), rel_tol=1e-6)


def test_presets_and_report() -> None:
    assert pr.Adafactor.torch().eps1 is None
    assert pr.Adafactor.timm().factored((17, 17, 3, 3)) == (0, 1)
    assert pr.Adafactor.big_vision().factored((16, 4, 16)) == (0, 2)
    assert pr.Adafactor.optax().factored((128, 3, 128)) == (0, 2)
    with pytest.raises(ValueError, match="decay_rate must be below 1"):
        pr.Adafactor(decay_schedule="adam", decay_rate=1.0)
    method, g = pr.Adafactor(decay_rate=0.75), gradients((5, 3), 1)[0]
    _, state = method.update(g, method.init(g), g)
    report = method.diagnose(state)
    square = g * g
    v = square.mean(axis=1, keepdims=True) * square.mean(axis=0) / square.mean()
    assert np.allclose(report.denominator, np.sqrt(v), rtol=1e-14)
    assert np.isclose(report.rms, np.sqrt(np.mean(square / v)), rtol=1e-14)
    assert report.decay == 0
    assert bool(report.finite)
