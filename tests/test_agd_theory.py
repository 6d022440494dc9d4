"""AGD's regret identity, regret bounds and gradient bounds, on random problems and against planted mistakes.

In all of them H_t = D_t / alphahat_t, with D_t = max(sqrt(b_t), delta sqrt(1 - beta2^t)) (b_t the running maximum with
``amsgrad``) and alphahat_t = alpha_t sqrt(1 - beta2^t) / (1 - beta1^t), so that x_{t+1} = x_t - m_t / H_t;
P_t = sum_i m_{t,i}^2 / H_{t,i}, kappa = beta1 / (1 - beta1), and d_t = x_t - x* for any fixed x*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from test_agd import DeltaAdded, DeltaWithoutCorrection, NoFirstCorrection, NoSecondCorrection, Planted

from precond_ref import AGD
from precond_ref.methods.agd import AGDScalars


class Run(NamedTuple):
    """T updates of n coordinates."""

    x: np.ndarray
    """x_1, ..., x_{T+1}, (T + 1, n)."""
    g: np.ndarray
    """(T, n)."""
    m: np.ndarray
    """(T, n)."""
    h: np.ndarray
    """H_t, (T, n)."""
    root: np.ndarray
    """max(sqrt(bhat_t), delta), (T, n)."""
    rates: np.ndarray
    """alpha_t, (T, 1)."""
    beta1: np.ndarray
    """beta_{1,t}, (T, 1)."""


def run(
    method: Any, gradient: Callable[[int, np.ndarray], np.ndarray], x: np.ndarray, rates: np.ndarray, beta1: Any = None
) -> Run:
    """Steps of the given rates; ``beta1`` (T,) lets beta_1 change with t, the last corrected average being kept."""
    steps = len(rates)
    varies = beta1 is not None
    beta1 = beta1 if varies else np.full(steps, method.beta1)
    t = np.arange(1, steps + 1)
    c1, c2 = 1 - beta1**t, 1 - method.beta2**t
    state, xs, gs, ms, tops = method.init(x), [x], [], [], []
    for i in range(steps):
        g, scalars = gradient(i, x), None
        if varies:
            method = method.replace(beta1=float(beta1[i]))
            scalars = AGDScalars(1 / c1[i], 1 / c1[i - 1] if i else 0.0, math.sqrt(c2[i]))
        direction, state = method.update(g, state, x, scalars=scalars, xp=np)
        x = x - rates[i] * direction
        xs.append(x)
        gs.append(g)
        ms.append(state.m)
        tops.append(state.b_max if method.amsgrad else state.b)
    root = np.maximum(np.sqrt(np.stack(tops) / c2.reshape(-1, *[1] * x.ndim)), method.delta)
    col = [a.reshape(-1, *[1] * x.ndim) for a in (c1, rates, beta1)]
    return Run(np.stack(xs), np.stack(gs), np.stack(ms), root * col[0] / col[1], root, col[1], col[2])


class Problem(NamedTuple):
    """Losses f_t, their (sub)gradients, the first point, the one to compare with, T, and a rate of fitting size."""

    loss: Callable[[int, np.ndarray], float]
    gradient: Callable[[int, np.ndarray], np.ndarray]
    x: np.ndarray
    star: np.ndarray
    steps: int
    alpha: float


def convex_problem(rng: np.random.Generator) -> Problem:
    """Online linear, absolute, squared or logistic losses of a_t . x, of which all but the first fit x*; T <= 39."""
    n, steps = int(rng.integers(1, 4)), int(40 ** rng.uniform())
    a = rng.standard_normal((steps, n)) * 10.0 ** rng.uniform(-1, 1, n)
    star = rng.standard_normal(n)
    x = star + rng.standard_normal(n) * 10.0 ** rng.uniform(-1, 1)
    alpha = float(np.linalg.norm(x - star)) * 10.0 ** rng.uniform(-1, 0.5)
    y, sign = a @ star, np.sign(a @ star)
    losses, slopes = {
        "linear": (lambda t, z: z, lambda t, z: 1.0),
        "absolute": (lambda t, z: abs(z - y[t]), lambda t, z: np.sign(z - y[t])),
        "squared": (lambda t, z: (z - y[t]) ** 2 / 2, lambda t, z: z - y[t]),
        "logistic": (
            lambda t, z: np.logaddexp(0, -sign[t] * z),
            lambda t, z: -sign[t] * np.exp(-np.logaddexp(0, sign[t] * z)),
        ),
    }[rng.choice(["linear", "absolute", "squared", "logistic"])]
    return Problem(lambda t, x: losses(t, a[t] @ x), lambda t, x: slopes(t, a[t] @ x) * a[t], x, star, steps, alpha)


def draw_method(rng: np.random.Generator, agd: Any = AGD, **fields: Any) -> Any:
    drawn = {
        "beta1": float(rng.choice([0, 0.5, 0.75, 0.9])),
        "beta2": float(rng.choice([0, 0.5, 0.9, 0.999])),
        "delta": 10.0 ** rng.uniform(-2, 1),
        "amsgrad": bool(rng.integers(2)),
    }
    return agd(**drawn | fields)


def seeds(count: int) -> Iterator[np.random.Generator]:
    return map(np.random.default_rng, range(count))


def many(default: int, deep: int) -> Any:
    """A few problems by default, many in the deep run."""
    return pytest.mark.parametrize("count", [default, pytest.param(deep, marks=pytest.mark.deep)])


def regret(problem: Problem, r: Run) -> float:
    return sum(problem.loss(t, r.x[t]) - problem.loss(t, problem.star) for t in range(problem.steps))


def rounding(problem: Problem, r: Run) -> float:
    """Of the losses, T sums of numbers of their size."""
    size = sum(abs(problem.loss(t, x)) for t in range(problem.steps) for x in (r.x[t], problem.star))
    return (problem.steps + 16) * 2.0**-53 * size


def report(name: str, ratios: list[float]) -> None:
    print(f"{name}: largest ratio {max(ratios):.4g} of {len(ratios)}, median {np.median(ratios):.3g}")


# ---- the identity ----------------------------------------------------------------------------------------------------


def identity_terms(r: Run, star: np.ndarray, kappa: float) -> list[np.ndarray]:
    d, p = r.x - star, np.sum(r.m**2 / r.h, axis=1)
    return [
        r.h * (d[:-1] - d[1:]) * (d[:-1] + d[1:]) / 2,
        p / 2,
        kappa * r.m[-1] * d[-2],
        kappa * p[:-1],
    ]


def identity_gaps(agd: Any, count: int, without: int | None = None) -> list[float]:
    """|left - right| of the identity, relative to the sum of all summands' absolute values.

    sum_t <g_t, d_t> = 1/2 sum_t sum_i H_{t,i} (d_{t,i}^2 - d_{t+1,i}^2) + 1/2 sum_{t<=T} P_t + kappa <m_T, d_T>
    + kappa sum_{t<T} P_t, for any gradients and rates; ``without`` leaves out one of the four terms.
    """
    gaps = []
    for rng in seeds(count):
        n, steps = int(rng.integers(1, 5)), int(rng.integers(2, 41))
        grads = rng.standard_normal((steps, n)) * 10.0 ** rng.uniform(-1, 1, n)
        x, star = rng.standard_normal((2, n))
        method = draw_method(rng, agd, delta=10.0 ** rng.uniform(-2, 0))
        r = run(method, lambda t, x, grads=grads: grads[t], x, 10.0 ** rng.uniform(-1, 1, steps))
        left = r.g * (r.x[:-1] - star)
        terms = identity_terms(r, star, method.beta1 / (1 - method.beta1))
        size = np.sum(abs(left)) + sum(np.sum(abs(term)) for term in terms)
        right = sum(np.sum(term) for i, term in enumerate(terms) if i != without)
        gaps.append(float(abs(np.sum(left) - right) / size))
    return gaps


@many(200, 5000)
def test_identity(count: int) -> None:
    """To 1e-13 = 900 u: steps are mostly above 1/100, so that rounding x, of size 1 and more, moves one by 100 u."""
    for agd in (AGD, Planted):
        gaps = identity_gaps(agd, count)
        report("identity", gaps)
        assert max(gaps) <= 1e-13


@pytest.mark.parametrize("agd", [DeltaAdded, DeltaWithoutCorrection, NoFirstCorrection, NoSecondCorrection])
def test_identity_sees_a_planted_bug(agd: Any) -> None:
    assert max(identity_gaps(agd, 20)) > 1e-3


@pytest.mark.parametrize("without", range(4))
def test_identity_needs_each_term(without: int) -> None:
    assert max(identity_gaps(AGD, 20, without)) > 1e-3


# ---- online convex ---------------------------------------------------------------------------------------------------


def without_one(regret: float, terms: list[float]) -> set[int]:
    """Terms without which the bound would be false here."""
    return {i for i in range(len(terms)) if regret > sum(terms) - terms[i]}


@many(300, 10000)
def test_data_dependent_regret(count: int) -> None:
    """Plain or amsgrad, any rates, with Delta_i = max_{t<=T} |d_{t,i}|:

    R_T <= 1/2 sum_i Delta_i^2 [H_{1,i} + sum_{t=2}^T (H_{t,i} - H_{t-1,i})_+] + 1/2 sum_t P_t + kappa <m_T, d_T>
    + kappa sum_{t<T} P_t.
    """
    ratios, needed, monotone = [], set(), 0
    for rng in seeds(count):
        problem, method = convex_problem(rng), draw_method(rng)
        rates = problem.alpha * 10.0 ** rng.uniform(-0.25, 0.25, problem.steps)
        r = run(method, problem.gradient, problem.x, rates)
        spread = np.max(abs(r.x[:-1] - problem.star), axis=0)
        rises = r.h[0] + np.sum(np.maximum(np.diff(r.h, axis=0), 0), axis=0)
        _, *rest = identity_terms(r, problem.star, method.beta1 / (1 - method.beta1))
        terms = [float(np.sum(spread**2 * rises) / 2), *(float(np.sum(term)) for term in rest)]
        value = regret(problem, r)
        assert value <= sum(terms) + rounding(problem, r) + 1e-13 * sum(map(abs, terms))
        if sum(terms) > 0:
            ratios.append(value / sum(terms))
        needed |= without_one(value, terms)
        monotone += value > np.sum(spread**2 * r.h[-1]) / 2 + sum(terms[1:])
    report("data-dependent regret", ratios)
    assert max(ratios) > 0.5
    assert needed == {0, 1, 2, 3}
    assert monotone  # H_T in place of the sum of rises is not enough: H_t falls at times


def amsgrad_run(rng: np.random.Generator, varies: bool) -> tuple[Problem, Any, Run]:
    """alpha_t = alpha / sqrt(t), amsgrad, and beta_1 constant, beta_1 / sqrt(t) or beta_1 / t."""
    problem, method = convex_problem(rng), draw_method(rng, amsgrad=True)
    t = np.arange(1, problem.steps + 1)
    beta1 = method.beta1 / t ** rng.choice([0, 0.5, 1]) if varies else None
    r = run(method, problem.gradient, problem.x, problem.alpha / np.sqrt(t), beta1)
    assert np.all(np.diff(r.h, axis=0) >= -8 * 2.0**-53 * r.h[1:])
    return problem, method, r


@many(500, 10000)
def test_closed_form_regret(count: int) -> None:
    """amsgrad, alpha_t = alpha / sqrt(t), with G_i = max_t |g_{t,i}|:

    R_T <= sqrt(T) sum_i [Delta_i^2 max(2 G_i / (1 + beta1), delta) / (2 alpha)
    + (1 + beta1) / (1 - beta1) alpha G_i^2 / delta] + kappa sum_i G_i Delta_i.
    """
    ratios, needed = [], set()
    for rng in seeds(count):
        problem, method, r = amsgrad_run(rng, varies=False)
        alpha, beta1, delta = problem.alpha, method.beta1, method.delta
        spread, peak = np.max(abs(r.x[:-1] - problem.star), axis=0), np.max(abs(r.g), axis=0)
        assert np.all(r.root <= np.maximum(2 * peak / (1 + beta1), delta) * (1 + 1e-14))
        terms = [
            math.sqrt(problem.steps) * np.sum(spread**2 * np.maximum(2 * peak / (1 + beta1), delta)) / (2 * alpha),
            math.sqrt(problem.steps) * (1 + beta1) / (1 - beta1) * alpha * np.sum(peak**2) / delta,
            beta1 / (1 - beta1) * np.sum(peak * spread),
        ]
        value = regret(problem, r)
        assert value <= sum(terms) + rounding(problem, r)
        ratios.append(value / sum(terms))
        needed |= without_one(value, terms)
    report("closed-form regret", ratios)
    assert max(ratios) > 0.2
    assert needed >= {0, 1}


@many(500, 10000)
def test_paper_shaped_regret(count: int) -> None:
    """As above with non-increasing beta_{1,t} <= beta1, G = max_i G_i and D = max_i Delta_i:

    R_T <= [sqrt(T) n D^2 max(2 G, delta) / (2 alpha) + sum_t beta_{1,t} n D^2 / (2 alphahat_t)
    + sqrt(T) n alpha G^2 (beta1 + 1 / delta)] / (1 - beta1).
    """
    ratios, needed = [], set()
    for rng in seeds(count):
        problem, method, r = amsgrad_run(rng, varies=True)
        alpha, beta1, delta = problem.alpha, method.beta1, method.delta
        n, root = problem.x.size, math.sqrt(problem.steps)
        spread, peak = np.max(abs(r.x[:-1] - problem.star)), np.max(abs(r.g))
        t = np.arange(1, problem.steps + 1)
        effective = r.rates[:, 0] * np.sqrt(1 - method.beta2**t) / (1 - r.beta1[:, 0] ** t)
        terms = [
            root * n * spread**2 * max(2 * peak, delta) / (2 * alpha) / (1 - beta1),
            np.sum(r.beta1[:, 0] / effective) * n * spread**2 / 2 / (1 - beta1),
            root * n * alpha * peak**2 * (beta1 + 1 / delta) / (1 - beta1),
        ]
        value = regret(problem, r)
        assert value <= sum(terms) + rounding(problem, r)
        ratios.append(value / sum(terms))
        needed |= without_one(value, terms)
    report("paper-shaped regret", ratios)
    assert max(ratios) > 0.2
    assert needed >= {0, 2}


# ---- smooth, not convex ----------------------------------------------------------------------------------------------


class Smooth(NamedTuple):
    """F with minimum 0 and an L-Lipschitz gradient, on (..., n)."""

    value: Callable[[np.ndarray], np.ndarray]
    gradient: Callable[[np.ndarray], np.ndarray]
    lipschitz: float


def smooth_problem(rng: np.random.Generator, n: int) -> Smooth:
    """sum_i w_i phi((Q x)_i), Q orthogonal, phi a parabola, 1 - cos or z^2 / (1 + z^2) / 2: |phi''| <= 1, L = max w."""
    w = 10.0 ** rng.uniform(-1, 1, n)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    phi, slope = {
        "parabola": (lambda z: z**2 / 2, lambda z: z),
        "cosine": (lambda z: 1 - np.cos(z), np.sin),
        "rational": (lambda z: z**2 / (1 + z**2) / 2, lambda z: z / (1 + z**2) ** 2),
    }[rng.choice(["parabola", "cosine", "rational"])]
    return Smooth(lambda x: phi(x @ q.T) @ w, lambda x: (slope(x @ q.T) * w) @ q, float(w.max()))


def largest_u(beta1: float) -> float:
    """Largest u with u + (beta1 u / (1 - beta1))^2 <= 1."""
    kappa = beta1 / (1 - beta1)
    return (math.sqrt(1 + 4 * kappa**2) - 1) / (2 * kappa**2) if kappa else 1.0


def smooth_run(
    rng: np.random.Generator, stretch: float, sigma: float = 0.0, replicas: int = 1
) -> tuple[Smooth, Any, float, Run]:
    """A run with u = L alpha / delta = ``stretch`` times at most `largest_u`; x is (replicas, n)."""
    n, steps = int(rng.integers(1, 5)), int(rng.integers(1, 61))
    problem = smooth_problem(rng, n)
    alpha = 10.0 ** rng.uniform(-2, 1)
    method = draw_method(rng)
    u = stretch * largest_u(method.beta1) * rng.choice([1.0, 0.5, 0.25])
    method = method.replace(delta=problem.lipschitz * alpha / u)
    rates = alpha * rng.choice([np.ones(steps), 1 / np.sqrt(np.arange(1, steps + 1)), rng.uniform(0.1, 1, steps)])
    noise = sigma / math.sqrt(n) * rng.choice([-1.0, 1.0], (steps, replicas, n))
    x = np.tile(rng.standard_normal(n) * 10.0 ** rng.uniform(-1, 1), (replicas, 1))
    return problem, method, alpha, run(method, lambda t, x: problem.gradient(x) + noise[t], x, rates)


def weighted_gradients(problem: Smooth, r: Run) -> np.ndarray:
    """sum_t sum_i eta_{t,i} (dF/dx_i)^2 with eta_t = alpha_t / max(sqrt(bhat_t), delta); (replicas,)"""
    return np.sum(r.rates / r.root * problem.gradient(r.x[:-1]) ** 2, axis=(0, 2))


@many(400, 10000)
def test_gradients_of_a_smooth_function(count: int) -> None:
    """Exact gradients, u + (beta1 u / (1 - beta1))^2 <= 1: sum_t sum_i eta_{t,i} (dF/dx_i)^2 <= 2 (F(x_1) - F*),

    hence min_t ||grad F||^2 <= 2 (F(x_1) - F*) max(2 G / (1 + beta1), delta) / sum_t alpha_t, G the largest |dF/dx_i|.
    """
    ratios, least = [], []
    for rng in seeds(count):
        problem, method, _, r = smooth_run(rng, 1.0)
        right = 2 * float(problem.value(r.x[0])[0])
        ratios.append(float(weighted_gradients(problem, r)[0]) / right)
        norms = np.sum(r.g**2, axis=(1, 2))
        least.append(
            float(norms.min() * r.rates.sum() / max(2 * abs(r.g).max() / (1 + method.beta1), method.delta)) / right
        )
    report("weighted gradients", ratios)
    report("least gradient", least)
    assert max(ratios) <= 1 + 1e-12
    assert max(least) <= 1 + 1e-12
    assert max(ratios) > 0.95  # so 2 cannot be 1.9


def test_gradients_need_the_condition_on_u() -> None:
    ratios = []
    for rng in seeds(40):
        problem, _, _, r = smooth_run(rng, 3.0)
        ratios.append(float(weighted_gradients(problem, r)[0]) / (2 * float(problem.value(r.x[0])[0])))
    assert max(ratios) > 2


@many(40, 1000)
def test_gradients_with_noise(count: int) -> None:
    """Independent noise of zero mean and E ||xi_t||^2 <= sigma^2, the same u, rho_t = (1 - beta1) / (1 - beta1^t):

    E sum_t sum_i eta_{t,i} (dF/dx_i)^2 <= 2 (F(x_1) - F*) + (alpha / delta) sigma^2 / (1 - beta1) sum_t rho_t^2.
    """
    ratios, needed = [], 0
    for rng in seeds(count):
        sigma = 10.0 ** rng.uniform(-1, 1)
        problem, method, alpha, r = smooth_run(rng, 1.0, sigma, replicas=200)
        left = weighted_gradients(problem, r)
        rho = (1 - method.beta1) / (1 - method.beta1 ** np.arange(1, len(r.g) + 1))
        start = 2 * float(problem.value(r.x[0])[0])
        floor = alpha / method.delta * sigma**2 / (1 - method.beta1) * np.sum(rho**2)
        ratios.append(float(left.mean() + 4 * left.std() / math.sqrt(left.size)) / (start + floor))
        needed += left.mean() > start
    report("weighted gradients with noise", ratios)
    assert max(ratios) <= 1
    assert max(ratios) > 0.25
    assert needed
