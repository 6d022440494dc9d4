"""The yardsticks against torch.optim, pytorch_optimizer, SciPy and 50-digit arithmetic, and planted bugs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import directions, distance, gradients

import precond_ref as pr

SHAPE, STEPS, LR = (5, 4), 50, 0.125
EPS64 = float(np.finfo(np.float64).eps)


def trajectory(method: Any, grads: np.ndarray, lr: float = LR, weight_decay: float = 0.0) -> np.ndarray:
    """Iterates of a recorded gradient sequence through `Optimizer`, (steps, *shape)."""
    optimizer = pr.Optimizer(method, lr=lr, weight_decay=weight_decay, route=lambda path, array: method)
    params = {"w": start(grads.shape[1:])}
    state = optimizer.init(params)
    iterates = []
    for g in grads:
        params, state = optimizer.step(params, {"w": g}, state)
        iterates.append(params["w"])
    return np.stack(iterates)


def start(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(99).standard_normal(shape)


def torch_trajectory(make: Any, grads: np.ndarray) -> np.ndarray:
    """The same with a torch optimizer class."""
    p = torch.nn.Parameter(torch.tensor(start(grads.shape[1:])))
    optimizer = make([p])
    iterates = []
    for g in grads:
        p.grad = torch.tensor(g)
        optimizer.step()
        iterates.append(p.detach().numpy().copy())
    return np.stack(iterates)


PAIRS = {
    "SGD": (pr.SGD(), lambda p: torch.optim.SGD(p, lr=LR)),
    "SGD-momentum": (pr.SGD(momentum=0.75), lambda p: torch.optim.SGD(p, lr=LR, momentum=0.75)),
    "SGD-nesterov": (
        pr.SGD(momentum=0.75, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=LR, momentum=0.75, nesterov=True),
    ),
    "AdaGrad": (
        pr.AdaGrad(eps=0.25, initial=0.5),
        lambda p: torch.optim.Adagrad(p, lr=LR, eps=0.25, initial_accumulator_value=0.5),
    ),
    "AdaGrad-defaults": (pr.AdaGrad(), lambda p: torch.optim.Adagrad(p, lr=LR)),
    "RMSProp": (
        pr.RMSProp(beta2=0.75, eps=0.25, momentum=0.5),
        lambda p: torch.optim.RMSprop(p, lr=LR, alpha=0.75, eps=0.25, momentum=0.5),
    ),
    "RMSProp-defaults": (pr.RMSProp(), lambda p: torch.optim.RMSprop(p, lr=LR)),
    "Adam": (
        pr.Adam(beta1=0.75, beta2=0.875, eps=0.25),
        lambda p: torch.optim.Adam(p, lr=LR, betas=(0.75, 0.875), eps=0.25),
    ),
    "Adam-defaults": (pr.Adam(), lambda p: torch.optim.Adam(p, lr=LR)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_equals_torch_optim(name: str) -> None:
    method, make = PAIRS[name]
    grads = gradients(SHAPE, STEPS)
    assert distance(trajectory(method, grads), torch_trajectory(make, grads)) <= 1e-13


def test_decoupled_decay_equals_adamw() -> None:
    grads = gradients(SHAPE, STEPS)
    ours = trajectory(pr.Adam(beta1=0.75, beta2=0.875, eps=0.25), grads, weight_decay=0.25)
    theirs = torch_trajectory(
        lambda p: torch.optim.AdamW(p, lr=LR, betas=(0.75, 0.875), eps=0.25, weight_decay=0.25), grads
    )
    assert distance(ours, theirs) <= 1e-13


class WrongEps(pr.Adam):
    """eps under the root."""

    def update(self, grad: Any, state: Any, param: Any, **kwargs: Any) -> Any:
        _, new = super().update(grad, state, param, **kwargs)
        k = self.scalars(new.step)
        return new.m * k.inverse_c1 / np.sqrt(new.v * k.inverse_sqrt_c2**2 + self.eps), new


class NoCorrection(pr.Adam):
    """No bias correction."""

    def update(self, grad: Any, state: Any, param: Any, **kwargs: Any) -> Any:
        _, new = super().update(grad, state, param, **kwargs)
        return new.m / (np.sqrt(new.v) + self.eps), new


class DampedMomentum(pr.SGD):
    """(1 - momentum) on the new term."""

    def update(self, grad: Any, state: Any, param: Any, **kwargs: Any) -> Any:
        return super().update((1 - self.momentum) * grad, state, param, **kwargs)


class LrInMomentum(pr.RMSProp):
    """Momentum on the gradient instead of the preconditioned gradient."""

    def update(self, grad: Any, state: Any, param: Any, **kwargs: Any) -> Any:
        _, new = super().update(grad, state, param, **kwargs)
        buffer = self.momentum * state.buffer + grad
        return buffer / (np.sqrt(new.v) + self.eps), new._replace(buffer=buffer)


class StaleSum(pr.AdaGrad):
    """The sum before the current gradient."""

    def update(self, grad: Any, state: Any, param: Any, **kwargs: Any) -> Any:
        _, new = super().update(grad, state, param, **kwargs)
        return grad / (np.sqrt(state.total) + self.eps), new


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("Adam", WrongEps(beta1=0.75, beta2=0.875, eps=0.25)),
        ("Adam", NoCorrection(beta1=0.75, beta2=0.875, eps=0.25)),
        ("SGD-momentum", DampedMomentum(momentum=0.75)),
        ("RMSProp", LrInMomentum(beta2=0.75, eps=0.25, momentum=0.5)),
        ("AdaGrad", StaleSum(eps=0.25, initial=0.5)),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_torch_parity_catches(name: str, mutant: Any) -> None:
    grads = gradients(SHAPE, STEPS)
    assert distance(trajectory(mutant, grads), torch_trajectory(PAIRS[name][1], grads)) > 1e-3


# ---- Shampoo --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (4, 4), (3, 4, 2), (6,)], ids=str)
def test_shampoo_equals_pytorch_optimizer(shape: tuple[int, ...]) -> None:
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    grads = gradients(shape, 12)
    theirs = torch_trajectory(lambda p: pytorch_optimizer.Shampoo(p, lr=LR, matrix_eps=0.25), grads)
    assert distance(trajectory(pr.Shampoo(eps=0.25), grads), theirs) <= 1e-12


def mp_power(matrix: mpmath.matrix, exponent: float) -> mpmath.matrix:
    values, vectors = mpmath.eigsy(matrix)
    return vectors * mpmath.diag([v ** mpmath.mpf(exponent) for v in values]) * vectors.T


def mp_shampoo(grads: np.ndarray, eps: float, beta2: float, correct: bool, exponent: float = -0.25) -> np.ndarray:
    """Directions of matrix Shampoo in 50 digits: L^{-1/4} G R^{-1/4} by two eigendecompositions."""
    with mpmath.workdps(50):
        m, n = grads.shape[1:]
        left, right = mpmath.zeros(m), mpmath.zeros(n)
        out = []
        for t, g in enumerate(grads, start=1):
            G = mpmath.matrix(g.tolist())
            weight = 1 if beta2 == 1 else 1 - mpmath.mpf(beta2)
            left, right = beta2 * left + weight * G * G.T, beta2 * right + weight * G.T * G
            scale = 1 / (1 - mpmath.mpf(beta2) ** t) if correct else 1
            direction = (
                mp_power(left * scale + eps * mpmath.eye(m), exponent)
                * G
                * mp_power(right * scale + eps * mpmath.eye(n), exponent)
            )
            out.append(np.array(direction.tolist(), dtype=float))
    return np.stack(out)


@pytest.mark.parametrize(("beta2", "correct"), [(1.0, False), (0.75, False), (0.75, True)])
def test_shampoo_in_fifty_digits(beta2: float, correct: bool) -> None:
    grads = gradients((4, 3), 5)
    method = pr.Shampoo(beta2=beta2, eps=0.25, bias_correction=correct)
    truth = mp_shampoo(grads, 0.25, beta2, correct)
    kappa = 200  # of L + eps I over these five gradients: lambda_max < 50, eps = 1/4
    assert distance(directions(method, grads), truth) <= 16 * EPS64 * kappa
    assert distance(directions(method, grads), mp_shampoo(grads, 0.25, beta2, correct, exponent=-0.5)) > 0.1
    assert distance(directions(method, grads), mp_shampoo(grads, 0.125, beta2, correct)) > 1e-3
    assert distance(directions(method, grads), mp_shampoo(grads, 0.25, 0.5, False)) > 1e-2


def test_shampoo_renews_its_roots_when_due() -> None:
    grads = gradients((4, 3), 7)
    method = pr.Shampoo(beta2=0.75, eps=0.25, every=3)
    state = method.init(np.zeros((4, 3)))
    seen = []
    for g in grads:
        _, state = method.update(g, state, np.zeros((4, 3)))
        seen.append(state.roots[0].basis)
    changed = [not np.array_equal(a, b) for a, b in pairwise(seen)]
    assert changed == [False, False, True, False, False, True]  # renewed at updates 1, 4, 7


def test_full_adagrad_equals_sqrtm() -> None:
    grads = gradients((5,), 9)
    V = np.zeros((5, 5))
    got = directions(pr.FullAdaGrad(eps=0.25), grads)
    for g, d in zip(grads, got, strict=True):
        V = V + np.outer(g, g)
        expected = np.linalg.solve(np.real(scipy.linalg.sqrtm(V + 1e-30 * np.eye(5))) + 0.25 * np.eye(5), g)
        # sqrtm of the singular V of the first steps is good to sqrt(u)
        assert np.linalg.norm(d - expected) <= 16 * np.sqrt(EPS64) * np.linalg.norm(expected)


def test_full_adagrad_first_step_is_the_unit_gradient() -> None:
    g = gradients((6,), 1)
    assert np.allclose(directions(pr.FullAdaGrad(), g)[0], g[0] / np.linalg.norm(g[0]), rtol=0, atol=16 * EPS64)


def test_shampoo_of_a_vector_is_full_adagrad_with_eps_under_the_root() -> None:
    grads = gradients((5,), 6)
    V = np.zeros((5, 5))
    for g, d in zip(grads, directions(pr.Shampoo(eps=0.25), grads), strict=True):
        V = V + np.outer(g, g)
        w, q = np.linalg.eigh(V + 0.25 * np.eye(5))
        assert np.linalg.norm(d - q @ ((q.T @ g) * w**-0.5)) <= 1e-13 * np.linalg.norm(d)


# ---- Muon -----------------------------------------------------------------------------------------------------------


def test_muon_svd_is_the_polar_factor_of_the_averaged_gradient() -> None:
    grads = gradients((3, 5), 4)
    method = pr.Muon(momentum=0.75, nesterov=True, rms=0.5, root="svd")
    m = np.zeros((3, 5))
    for g, d in zip(grads, directions(method, grads), strict=True):
        m = 0.75 * m + 0.25 * g
        polar = scipy.linalg.polar(0.75 * m + 0.25 * g)[0]
        assert np.linalg.norm(d - 0.5 * np.sqrt(5) * polar) <= 1e-13 * np.linalg.norm(d)


def test_muon_newton_schulz_applies_jordans_quintic_to_the_singular_values() -> None:
    g = gradients((4, 6), 1)
    u, s, vh = np.linalg.svd(g[0], full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = (u * s) @ vh
    for transpose in (False, True):
        grads = np.swapaxes(g, 1, 2) if transpose else g
        got = directions(pr.Muon(momentum=0.0, nesterov=False, rms=None), grads)[0]
        assert np.linalg.norm((got.T if transpose else got) - expected) <= 1e-12
    assert np.all((s > 0.6) & (s < 1.3))


def test_muon_equals_torch_muon_within_its_bfloat16() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    grads = gradients((6, 8), 6)
    theirs = torch_trajectory(
        lambda p: torch.optim.Muon(
            p, lr=LR, weight_decay=0.0, momentum=0.75, nesterov=True, adjust_lr_fn="match_rms_adamw"
        ),
        grads,
    )
    ours = trajectory(pr.Muon(momentum=0.75, nesterov=True), grads)
    # torch iterates in bfloat16 (u = 2^-8); each of the 5 steps multiplies an error by at most 3.4445
    assert distance(ours, theirs) <= 5 * 2**-8


def test_reports_of_the_yardsticks() -> None:
    grads = gradients((4, 3), 3)
    average = np.sqrt(grads[0] ** 2 / 8 + grads[1] ** 2 / 4 + grads[2] ** 2 / 2)
    for method, denominator in (
        (pr.AdaGrad(eps=0.25), np.sqrt(np.sum(grads**2, axis=0)) + 0.25),
        (pr.RMSProp(beta2=0.5, eps=0.25, momentum=0.5), average + 0.25),
        (pr.Adam(beta2=0.5, eps=0.25), average / np.sqrt(0.875) + 0.25),
    ):
        state = method.init(grads[0])
        for g in grads:
            _, state = method.update(g, state, grads[0])
        report = method.diagnose(state)
        assert np.allclose(report.denominator, denominator, rtol=1e-14, atol=0)
        assert bool(report.finite)
    momentum = pr.SGD(momentum=0.5)
    assert bool(momentum.diagnose(momentum.init(grads[0])).finite)
    assert pr.SGD().diagnose(pr.SGD().init(grads[0])).finite is None
    shampoo = pr.Shampoo(eps=0.25)
    _, state = shampoo.update(grads[0], shampoo.init(grads[0]), grads[0])
    s2 = np.linalg.svd(grads[0], compute_uv=False)[::-1] ** 2
    assert np.allclose(shampoo.diagnose(state).eigenvalues[1], s2, rtol=1e-12)
    full = pr.FullAdaGrad()
    _, state = full.update(grads[0], full.init(grads[0]), grads[0])
    assert np.isclose(full.diagnose(state).eigenvalues[0][-1], np.sum(grads[0] ** 2), rtol=1e-13)
    muon = pr.Muon(momentum=0.5)
    _, state = muon.update(grads[0], muon.init(grads[0]), grads[0])
    assert np.allclose(muon.diagnose(state).singular_values, np.sqrt(s2[::-1]) / 2, rtol=1e-13)


@pytest.mark.parametrize("method", [pr.FullAdaGrad(), pr.Shampoo(eps=0.25), pr.Muon(root="svd")], ids=repr)
def test_a_spectrum_that_is_not_finite_is_reported_as_nan(method: Any) -> None:
    grads = gradients((2, 3, 2), 1)[0]
    grads[1, 0, 0] = np.inf
    with np.errstate(invalid="ignore"):
        _, state = method.update(grads, method.init(grads, stack_ndim=1), grads)
    report = method.diagnose(state)
    spectra = report[0] if isinstance(report[0], tuple) else (report[0],)
    assert report.finite.tolist() == [True, False]
    for spectrum in spectra:
        assert np.all(np.isfinite(spectrum[0]))
        assert np.all(np.isnan(spectrum[1]))
