"""AGD: the authors' numbers, the vectors, invariants and edge cases; every check against planted bugs.

A check is a function of a class, `AGD` (or `Optimizer`), that raises AssertionError. A *law* also takes a case.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, NamedTuple

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from mutation import check_vectors, mutated

from precond_ref import AGD, SGD, Adam, Optimizer
from precond_ref import optimizer as optimizer_module
from precond_ref.methods import agd as agd_module

U = 2.0**-53


class Trace(NamedTuple):
    """A replay; arrays are (T, n)."""

    direction: np.ndarray
    m: np.ndarray
    b: np.ndarray
    top: np.ndarray
    """b_t, or its running maximum with ``amsgrad``."""
    states: list[Any]


def replay(method: Any, grads: Any, dtype: str = "float64", param: Any = None) -> Trace:
    """The updates that ``grads`` (T, n) make."""
    grads = np.asarray(grads, dtype)
    param = np.zeros_like(grads[0]) if param is None else param
    state = method.init(param)
    directions, states = [], []
    for g in grads:
        direction, state = method.update(g, state, param)
        directions.append(direction)
        states.append(state)
    top = [s.b_max if method.amsgrad else s.b for s in states]
    return Trace(*map(np.stack, (directions, [s.m for s in states], [s.b for s in states], top)), states)


def descend(method: Any, gradient: Callable[[np.ndarray], np.ndarray], x: np.ndarray, lr: float, steps: int) -> Any:
    """Iterates (steps + 1, n) and states of ``x - lr direction``."""
    xs, states = [x], []
    state = method.init(x)
    for _ in range(steps):
        direction, state = method.update(gradient(x), state, x, xp=np)
        x = x - lr * direction
        xs.append(x)
        states.append(state)
    return np.stack(xs), states


def one_minus_powers(beta: float, steps: int) -> np.ndarray:
    """1 - beta^t for t = 1, ..., ``steps`` as a column, exact and rounded once."""
    return np.array([[float(1 - Fraction(beta) ** t)] for t in range(1, steps + 1)])


# ---- the authors' code, commit da565de71, in float64 -----------------------------------------------------------------

X1 = [1.0, -2.0, 0.5]
GRADS = [[0.5, -1.0, 1e-7], [0.25, 2.0, -2e-7], [0.0, -0.5, 1e-6]]
LR = 0.1

# x after updates 1, 2 and 3
GOLDEN: dict[str, tuple[dict[str, Any], list[list[float]]]] = {
    "default": ({}, [[0.9, -1.9, 0.499], [0.7992038466184233, -1.9438029855990413, 0.49957894736842107],
        [0.7238543158641335, -1.9601936559706394, 0.4962542241211886]]),
    "clip": ({"clip": 1.0}, [[0.9683772233983162, -1.9683772233983161, 0.499],
        [0.944845550865571, -1.9919088959310614, 0.49957894736842107],
        [0.9246444911216742, -2.0082995663026595, 0.4962542241211886]]),
    "delta": ({"delta": 1.0}, [[0.95, -1.9, 0.49999999], [0.9131578947368421, -1.9438029855990413, 0.4999999957894737],
        [0.8899106622645173, -1.9601936559706394, 0.4999999625422412]]),
    "amsgrad": ({"beta1": 0.5, "beta2": 0.9, "amsgrad": True}, [[0.9, -1.9, 0.499],
        [0.8086126466536625, -1.9622699849077239, 0.5], [0.7628232730140996, -1.972638267756012, 0.4947142857142857]]),
}  # fmt: skip
GOLDEN_DECAY = {
    "decoupled": [[0.89, -1.88, 0.494], [0.7803038466184232, -1.9050029855990414, 0.48963894736842106],
        [0.6971512773979492, -1.9023436261146491, 0.4814178346475044]],
    "coupled": [[0.9, -1.9, 0.4], [0.7935416935462709, -1.9273383009280762, 0.2741300104855397],
        [0.7053144397058384, -1.9262112534749498, 0.14302262584950354]],
    "fixed": [[0.8, -1.7, 0.449], [0.6192038466184233, -1.5738029855990414, 0.4046789473684211],
        [0.4819339312022912, -1.4328133574107353, 0.3608863293843465]],
}  # fmt: skip
GOLDEN_M = [0.063, 0.049, 9.01e-8]
GOLDEN_B = [2.85278012991085e-4, 3.6470946418292877e-3, 1.872722699296831e-16]


def assert_printed(got: Any, expected: Any) -> None:
    """Equal to the 14 digits that both computations, some 20 roundings each, have in common."""
    np.testing.assert_allclose(got, expected, rtol=1e-14, atol=0)


def golden_table(agd: Any) -> None:
    for fields, rows in GOLDEN.values():
        directions = replay(agd(**fields), GRADS).direction
        assert_printed(X1 - LR * np.cumsum(directions, axis=0), rows)


def golden_state(agd: Any) -> None:
    trace = replay(agd(), GRADS)
    assert_printed(trace.m[-1], GOLDEN_M)
    assert_printed(trace.b[-1], GOLDEN_B)


def golden_decay(optimizer: Any) -> None:
    opt = optimizer(AGD(), lr=LR, weight_decay=0.1)
    x = np.asarray(X1)
    state = opt.init(x)
    for g, expected in zip(GRADS, GOLDEN_DECAY["decoupled"], strict=True):
        x, state = opt.step(x, np.asarray(g), state)
        assert_printed(x, expected)


# ---- laws ------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Fields of `AGD` and gradients (T, n): multiples of 1/64, so that nothing under- or overflows."""

    fields: dict[str, Any]
    grads: np.ndarray


def _loud(seed: int, **fields: Any) -> Case:
    return Case(fields, np.random.default_rng(seed).integers(-256, 256, (9, 4)) / 64.0)


LOUD = (
    _loud(1, beta1=0.75, beta2=0.875, delta=0.25),
    _loud(2, beta1=0.5, beta2=0.75, delta=0.5, amsgrad=True),
    _loud(3, beta1=0.0, beta2=0.5, delta=1.0),
    _loud(4, beta1=0.9, beta2=0.999, delta=2.0, amsgrad=True),
)
cases = st.builds(
    Case,
    st.fixed_dictionaries(
        {
            "beta1": st.sampled_from([0.0, 0.5, 0.75, 0.9]),
            "beta2": st.sampled_from([0.0, 0.5, 0.875, 0.999]),
            "delta": st.sampled_from([2.0**-6, 0.25, 1.0, 4.0]),
            "amsgrad": st.booleans(),
        }
    ),
    arrays(np.int16, array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.integers(-256, 256)).map(
        lambda k: k / 64.0
    ),
)


def corrected_momenta(method: AGD, trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """m_t / (1 - beta1^t) for t = 1, ..., T and for t = 0, ..., T - 1."""
    now = trace.m / one_minus_powers(method.beta1, len(trace.m))
    return now, np.concatenate([np.zeros_like(now[:1]), now[:-1]])


def s_rounding(grads: np.ndarray) -> np.ndarray:
    """Bound on the error of s_1, ..., s_t: some 16 roundings of numbers below max|g|. (T, n)"""
    return 16 * U * np.maximum.accumulate(abs(grads))


def law_sum_of_differences(agd: Any, case: Case) -> None:
    """With rho_t = (1 - beta1) / (1 - beta1^t): s_t = rho_t (g_t - mhat_{t-1}), (1 - rho_t) s_t = rho_t (g_t - mhat_t),

    and mhat_t = s_1 + ... + s_t.
    """
    method = agd(**case.fields)
    trace = replay(method, case.grads)
    now, before = corrected_momenta(method, trace)
    rho = (1 - method.beta1) / one_minus_powers(method.beta1, len(now))
    s, e = rho * (case.grads - before), s_rounding(case.grads)
    assert np.all(abs((1 - rho) * s - rho * (case.grads - now)) <= e)
    assert np.all(abs(np.cumsum(s, axis=0) - now) <= e * np.arange(1, len(s) + 1)[:, None])
    old = np.concatenate([np.zeros_like(s[:1]), trace.b[:-1]])
    squares = trace.b - method.beta2 * old
    tolerance = (1 - method.beta2) * (2 * abs(s) + e) * e + 4 * U * (trace.b + old)
    assert np.all(abs(squares - (1 - method.beta2) * s**2) <= tolerance)


def law_first_two_steps(agd: Any, case: Case) -> None:
    """-lr g_1 / max(|g_1|, delta), and the second from s_2 = (g_2 - g_1) / (1 + beta1)."""
    method = agd(**case.fields).replace(amsgrad=False)
    g = case.grads[0]
    got = replay(method, case.grads).direction
    first = g / np.maximum(abs(g), method.delta)
    assert np.all(abs(got[0] - first) <= 16 * U * abs(first))
    if len(case.grads) > 1:
        g, h = case.grads[:2]
        b1, b2 = method.beta1, method.beta2
        denominator = np.maximum(np.sqrt((b2 * g**2 + ((h - g) / (1 + b1)) ** 2) / (1 + b2)), method.delta)
        second = (b1 * g + h) / (1 + b1) / denominator
        e = s_rounding(case.grads)[1]
        assert np.all(abs(got[1] - second) <= 2 * e / denominator * (1 + abs(second)))


def step_bound(beta2: float, steps: int) -> np.ndarray:
    """K_t = (1 - beta2^t) beta2^{(1-t)/2} / (1 - beta2) as a column; infinite for beta2 = 0 and t > 1."""
    t = np.arange(1, steps + 1)[:, None]
    power = np.where(t == 1, 1.0, np.inf) if beta2 == 0 else beta2 ** ((1 - t) / 2)
    return one_minus_powers(beta2, steps) * power / (1 - beta2)


def law_step_bound(agd: Any, case: Case) -> None:
    """|direction_t| <= min(|mhat_t| / delta, K_t): Cauchy-Schwarz gives sqrt(bhat_t) >= |mhat_t| / K_t."""
    method = agd(**case.fields)
    trace = replay(method, case.grads)
    now, _ = corrected_momenta(method, trace)
    least = abs(now) / step_bound(method.beta2, len(now)) - s_rounding(case.grads)
    assert np.all(abs(trace.direction) <= abs(now) / np.maximum(least, method.delta) * (1 + 16 * U))


def law_sgd_limit(agd: Any, case: Case) -> None:
    """delta >= 2 max|g| / (1 + beta1) is SGD with averaged momentum at rate lr / delta, with share 1."""
    peak = abs(case.grads).max()
    delta = (1 + 2.0**-40) * 2 * peak / (1 + case.fields["beta1"]) or 1.0
    method = agd(**case.fields).replace(delta=delta)
    trace = replay(method, case.grads)
    weights = [
        [method.beta1 ** (t - j) if j <= t else 0.0 for j in range(len(case.grads))] for t in range(len(trace.m))
    ]
    averages = np.array([np.average(case.grads, axis=0, weights=w) for w in weights])
    assert np.all(abs(trace.direction - averages / delta) <= 1e-12 * peak / delta)
    assert all(method.diagnose(state).sgd_share == 1 for state in trace.states)


def law_adaptive_limit(agd: Any, case: Case) -> None:
    """delta below every sqrt(bhat) has no influence, to the bit; share 0."""
    method = agd(**case.fields)
    corrected = replay(method, case.grads).top / one_minus_powers(method.beta2, len(case.grads))
    least = np.sqrt(corrected.min(axis=0))
    grads = case.grads[:, least > 0]
    if grads.size:
        half, fifth = (method.replace(delta=least[least > 0].min() / k) for k in (2, 5))
        trace = replay(half, grads)
        assert np.array_equal(trace.direction, replay(fifth, grads).direction)
        assert all(half.diagnose(state).sgd_share == 0 for state in trace.states)


def law_constant_shift(agd: Any, case: Case) -> None:
    """g -> g + q leaves s_2, s_3, ... alone: b_t moves by (1 - beta2) beta2^{t-1} ((g_1 + q)^2 - g_1^2)."""
    method = agd(**case.fields)
    q = np.linspace(-3, 5, case.grads.shape[1])
    plain, shifted = replay(method, case.grads), replay(method, case.grads + q)
    t = np.arange(1, len(plain.b) + 1)[:, None]
    g = case.grads[0]
    moved = (1 - method.beta2) * method.beta2 ** (t - 1) * ((g + q) ** 2 - g**2)
    e = s_rounding(abs(case.grads) + abs(q))
    peak = np.maximum(plain.b, shifted.b)
    assert np.all(abs(shifted.b - plain.b - moved) <= 2 * (2 * np.sqrt(peak) + e) * e + 8 * (t + 1) * U * peak)


def law_states(agd: Any, case: Case) -> None:
    """b >= 0; with amsgrad the maximum only grows and is at least b; t counts; types stay."""
    method = agd(**case.fields)
    trace = replay(method, case.grads)
    assert np.all(trace.b >= 0)
    assert [state.step for state in trace.states] == list(range(1, len(case.grads) + 1))
    if method.amsgrad:
        assert np.array_equal(trace.top, np.maximum.accumulate(trace.b))
    else:
        assert all(state.b_max is None for state in trace.states)


def law_diagnose(agd: Any, case: Case) -> None:
    """The report by independent formulas; the share grows with delta while the gradients stay the same."""
    shares = []
    for delta in (0.0, case.fields["delta"], 8.0):
        method = agd(**case.fields | {"delta": delta})
        with np.errstate(divide="ignore"):
            trace = replay(method, case.grads)
        c2 = one_minus_powers(method.beta2, len(trace.b))
        now, _ = corrected_momenta(method, trace)
        for t, state in enumerate(trace.states):
            report = method.diagnose(state)
            assert np.all(abs(report.corrected_m - now[t]) <= 8 * U * abs(now[t]))
            corrected_b = trace.top[t] / c2[t]
            assert np.all(abs(report.corrected_b - corrected_b) <= 8 * U * corrected_b)
            root = np.sqrt(corrected_b)
            clear = abs(root - delta) > 8 * U * delta  # ties are in `ties_are_sgd`
            assert np.array_equal(report.is_sgd[clear], (root < delta)[clear])
            assert report.sgd_share == np.count_nonzero(report.is_sgd) / root.size
            assert bool(report.finite)
        shares.append([float(method.diagnose(state).sgd_share) for state in trace.states])
    assert np.all(np.diff(shares, axis=0) >= 0)


LAWS: tuple[Callable[[Any, Case], None], ...] = (
    law_sum_of_differences,
    law_first_two_steps,
    law_step_bound,
    law_sgd_limit,
    law_adaptive_limit,
    law_constant_shift,
    law_states,
    law_diagnose,
)


@pytest.mark.parametrize("law", LAWS)
@given(case=cases)
def test_law(law: Callable[[Any, Case], None], case: Case) -> None:
    law(AGD, case)


def on_loud_cases(law: Callable[[Any, Case], None]) -> Callable[[Any], None]:
    """The law on `LOUD`, as a check."""

    @functools.wraps(law)
    def check(agd: Any) -> None:
        for case in LOUD:
            law(agd, case)

    return check


# ---- laws with data of their own -------------------------------------------------------------------------------------


def step_bound_is_tight(agd: Any) -> None:
    """|direction_t| = K_t for every t when s_j is proportional to beta2^j."""
    beta2, steps = 0.75, 20
    grads = np.cumsum(beta2 ** np.arange(steps))[:, None]  # beta1 = 0: mhat = g
    got = replay(agd(beta1=0.0, beta2=beta2, delta=0.0), grads).direction
    expected = step_bound(beta2, steps)
    # s_t carries 16 u max|g|, and sqrt(bhat_t) = |mhat_t| / K_t
    assert np.all(abs(got / expected - 1) <= 16 * U * expected)


def sgd_threshold_is_sharp(agd: Any) -> None:
    """beta2 = 0 and the gradients G, -G: sqrt(bhat_2) = 2 G / (1 + beta1), so a smaller delta is not SGD's."""
    for factor, share in ((1 + 2.0**-40, 1.0), (1 - 2.0**-40, 0.0)):
        method = agd(beta1=0.5, beta2=0.0, delta=factor * 4.0)
        assert method.diagnose(replay(method, [[3.0], [-3.0]]).states[-1]).sgd_share == share


def ties_are_sgd(agd: Any) -> None:
    method = agd(beta1=0.0, beta2=0.0, delta=0.75)
    report = method.diagnose(replay(method, [[0.75, -0.75, 0.75 + 2.0**-40, 0.0]]).states[-1])
    assert report.is_sgd.tolist() == [True, True, False, True]
    assert report.sgd_share == 0.75


def deltas_part_at_the_switch(agd: Any) -> None:
    """In closed loop two thresholds give one trajectory, to the bit, until some sqrt(bhat) is below the larger."""
    a = np.array([[2.0, 1.0], [1.0, 0.75]])
    x1 = np.array([3.0, -1.0])
    small, large = (agd(beta1=0.75, beta2=0.875, delta=delta) for delta in (0.25, 0.5))
    first, _ = descend(small, lambda x: a @ x, x1, 0.125, 30)
    second, states = descend(large, lambda x: a @ x, x1, 0.125, 30)
    below = [bool(np.any(state.b / (1 - 0.875**t) < 0.5**2)) for t, state in enumerate(states, 1)]
    assert True in below
    switched = below.index(True)
    assert switched >= 3
    assert np.array_equal(first[: switched + 1], second[: switched + 1])
    assert np.any(first[switched + 1] != second[switched + 1])


RAMP = {1: 1.0, 2: 1.4146, 10: 3.169, 100: 10.25, 1000: 41.4, 5000: 384.0}


def constant_gradient(agd: Any) -> None:
    """A linear function: the step is |g| sqrt(1 - beta2^t) / sqrt((1 - beta2) beta2^{t-1}) / |g|, until delta."""
    g = np.array([0.7, -0.003])
    direction = replay(agd(delta=0.0), np.tile(g, (5000, 1))).direction
    for t, printed in RAMP.items():
        with mpmath.workdps(30):
            beta2 = mpmath.mpf(0.999)
            expected = float(mpmath.sqrt((1 - beta2**t) / (1 - beta2) / beta2 ** (t - 1)))
        assert abs(expected - printed) <= 0.5 * 10.0 ** (math.floor(math.log10(printed)) - 2)  # three digits
        # roundings of mhat, below 16 u |g|, stand where s_t is 0: relative to sqrt(bhat) that is 16 u times the step;
        # b_t passes t products, each off by u at most
        assert np.all(abs(direction[t - 1] / (np.sign(g) * expected) - 1) <= (16 * expected + 2 * t + 16) * U)
    delta = 2.0**-7
    capped = replay(agd(beta2=0.9, delta=delta), np.tile(g, (200, 1))).direction
    assert np.all(abs(capped[-1] * delta / g - 1) <= 400 * U)


def quadratic(agd: Any) -> None:
    """Exact gradients of a quadratic: s_t = A (y_t - y_{t-1}) for t >= 2, y the corrected average of the iterates."""
    rng = np.random.default_rng(7)
    root = rng.standard_normal((5, 5))
    a, target = root @ root.T / 5, rng.standard_normal(5)
    for beta1 in (0.0, 0.75):
        method = agd(beta1=beta1, beta2=0.875, delta=2.0**-6)
        x, states = descend(method, lambda x: a @ (x - target), rng.standard_normal(5), 0.0625, 25)
        weights = [[beta1 ** (t - j) if j <= t else 0.0 for j in range(25)] for t in range(25)]
        y = np.array([np.average(x[:-1], axis=0, weights=w) for w in weights])
        s = np.concatenate([a @ (x[0] - target)[:, None], a @ np.diff(y, axis=0).T], axis=1).T
        b = np.zeros(5)
        for state, difference in zip(states, s, strict=True):
            b = 0.875 * b + 0.125 * difference**2
            assert np.linalg.norm(np.sqrt(state.b) - np.sqrt(b)) <= 1e-12 * np.linalg.norm(np.sqrt(b))


def white_noise(agd: Any) -> None:
    """sqrt(bhat) -> (1 - beta1) sqrt(2 / (1 + beta1)) sigma; RMS of the step 1 / sqrt(2 (1 - beta1)).

    150 coordinates, 1500 steps of which some 20 are correlated: a standard error of 1 / sqrt(2 150 1500 / 20) = 0.7 %;
    what g_1 leaves in b is below 0.2 %, the spread of b_t adds (1 - beta2) / 2. Hence 2 %.
    """
    sigma, steps, kept = 3.0, 2000, 1500
    grads = sigma * np.random.default_rng(8).standard_normal((steps, 150))
    for beta1, rms in ((0.0, 0.70711), (0.5, 1.0), (0.9, 2.23607)):
        method = agd(beta1=beta1, beta2=0.99, delta=0.0)
        trace = replay(method, grads)
        assert math.isclose(rms, 1 / math.sqrt(2 * (1 - beta1)), rel_tol=1e-5)
        root = np.sqrt(np.mean(trace.b[-kept:]))
        assert math.isclose(root, (1 - beta1) * math.sqrt(2 / (1 + beta1)) * sigma, rel_tol=0.02)
        assert math.isclose(np.sqrt(np.mean(trace.direction[-kept:] ** 2)), rms, rel_tol=0.02)


def zero_history(agd: Any) -> None:
    """No gradient yet, no move, also at delta = 0; afterwards a first gradient is as good as any."""
    for fields in ({}, {"delta": 0.0}, {"delta": 0.0, "amsgrad": True, "clip": 0.5}, {"delta": 0.0, "beta2": 0.0}):
        method = agd(**fields)
        trace = replay(method, [[0.0], [0.0], [0.0], [2.0]])
        assert np.array_equal(trace.direction[:3], np.zeros((3, 1)))
        assert trace.direction[3] > 0
        assert np.array_equal(trace.b[:3], np.zeros((3, 1)))
        assert np.isfinite(trace.direction[3])


def zero_over_zero_only(agd: Any) -> None:
    """A momentum over zero is infinite, not repaired: delta = beta2 = 0 and a constant gradient, so that s_2 = 0."""
    with np.errstate(divide="ignore"):
        direction = replay(agd(beta1=0.0, beta2=0.0, delta=0.0), [[2.0, 0.0, -2.0]] * 2).direction
    assert direction.tolist() == [[1.0, 0.0, -1.0], [np.inf, 0.0, -np.inf]]


def before_the_first_update(agd: Any) -> None:
    method = agd(amsgrad=True)
    report = method.diagnose(method.init(np.ones(3)))
    assert np.array_equal(report.corrected_m, np.zeros(3))
    assert np.array_equal(report.corrected_b, np.zeros(3))
    assert bool(report.finite)


# ---- the trajectories on Beale's function ----------------------------------------------------------------------------

BEALE_START, BEALE_MINIMUM = np.array([-2.5, -2.5]), np.array([3.0, 0.5])
BEALE: dict[float, dict[int, tuple[float, float]]] = {  # lr 1e-3, iterates by number of steps
    1e-8: {
        1: (-2.499, -2.499),
        2: (-2.49758728765, -2.49758737161),
        10: (-2.47778522255, -2.47779800492),
        100: (-2.07901255758, -2.08925241841),
        1000: (-0.719799439485, -1.21906450145),
        9250: (2.77135681381, 0.435587647246),
    },
    1.0: {9250: (2.72442359597, 0.421841635231)},
    100.0: {1000: (-1.04541397184, -1.1575791652), 9250: (0.426712263435, -0.80873190827)},
}
BEALE_SHARES = {1.0: 0.07, 100.0: 0.93}
# Positions at frames 10, 50, 100, 150 and 199 of the authors' animation, a frame being about 46.5 steps.
FRAMES = {465: (-1.31, -1.47), 2325: (0.36, -1.15), 4650: (1.14, -0.83), 6975: (2.11, 0.10), 9254: (2.78, 0.43)}
PIXEL = 0.019 + 0.005  # one pixel, and the rounding to two decimals
FRAMES_LAST = {"Adam": (0.80, -1.05), "AdaBelief": (2.44, 0.29), "SGD": (-1.72, -0.77)}


def beale_gradient(p: np.ndarray) -> np.ndarray:
    x, y = float(p[0]), float(p[1])
    a, b, c = 1.5 - x + x * y, 2.25 - x + x * y**2, 2.625 - x + x * y**3
    return np.array(
        [2 * (a * (y - 1) + b * (y**2 - 1) + c * (y**3 - 1)), 2 * (a * x + 2 * b * x * y + 3 * c * x * y**2)]
    )


def beale(agd: Any) -> None:
    """Own float64 values, to the 1e-9 that its twelve digits leave; shares to their two digits."""
    for delta, points in BEALE.items():
        method = agd(delta=delta)
        x, states = descend(method, beale_gradient, BEALE_START, 1e-3, max(points))
        for step, expected in points.items():
            assert np.all(abs(x[step] - expected) <= 1e-9), (delta, step)
        if delta in BEALE_SHARES:
            share = np.mean([np.sqrt(s.b) <= delta * np.sqrt(1 - 0.999**s.step) for s in states])
            assert abs(share - BEALE_SHARES[delta]) <= 0.005


def beale_animation(agd: Any) -> None:
    x, _ = descend(agd(delta=1e-8), beale_gradient, BEALE_START, 1e-3, max(FRAMES))
    for step, expected in FRAMES.items():
        assert np.all(abs(x[step] - expected) <= PIXEL), step


def test_order_on_beale() -> None:
    """Distance to the minimum after as many steps as the animation has; there too AGD is the nearest."""

    def adabelief() -> np.ndarray:
        x, m, v = BEALE_START, np.zeros(2), np.zeros(2)
        for t in range(1, 9255):
            g = beale_gradient(x)
            m = 0.9 * m + 0.1 * g
            v = 0.999 * v + 0.001 * (g - m) ** 2
            x = x - 1e-3 * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        return x

    last = {
        "AGD": descend(AGD(delta=1e-8), beale_gradient, BEALE_START, 1e-3, 9254)[0][-1],
        "AdaBelief": adabelief(),
        "Adam": descend(Adam(), beale_gradient, BEALE_START, 1e-3, 9254)[0][-1],
        "SGD": descend(SGD(momentum=0.9), beale_gradient, BEALE_START, 1e-7, 9254)[0][-1],
    }
    distances = [np.linalg.norm(x - BEALE_MINIMUM) for x in last.values()]
    assert np.all(np.diff(distances) > 0.25)
    for name, expected in FRAMES_LAST.items():
        assert np.all(abs(last[name] - expected) <= PIXEL), name


# ---- planted bugs ----------------------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[[Any], None]] = {
    "vectors": lambda agd: check_vectors(SimpleNamespace(AGD=agd)),
    **{
        check.__name__: check
        for check in (
            golden_table,
            golden_state,
            golden_decay,
            *map(on_loud_cases, LAWS),
            step_bound_is_tight,
            sgd_threshold_is_sharp,
            ties_are_sgd,
            deltas_part_at_the_switch,
            constant_gradient,
            quadratic,
            white_noise,
            zero_history,
            zero_over_zero_only,
            before_the_first_update,
            beale,
            beale_animation,
        )
    },
}


# ---- the difference, from the old average or from the new one -------------------------------------------------------


def difference_within_bound(cls: Any, beta1: float, t: int, dtype: str) -> float:
    """Largest error of s_t over what the docstring of `AGD._weights` allows; gradients near the average too."""
    rng, u = np.random.default_rng(t), float(np.finfo(dtype).eps) / 2
    k = cls(beta1=beta1).scalars(t)
    c = one_minus_powers(beta1, t)[max(t - 2, 0), 0]
    average = rng.standard_normal(400).astype(dtype)
    grad = rng.standard_normal(400).astype(dtype)
    grad[:200] = average[:200] / c * (1 + 10.0 ** rng.uniform(-9, 0, 200))
    old = np.zeros_like(average) if t == 1 else average
    method = cls(beta1=beta1)
    new = (beta1 * old + (1 - beta1) * grad).astype(dtype)
    got = k.of_gradient * grad - k.of_average * (new if method.from_new else old)
    with mpmath.workdps(50):
        b = mpmath.mpf(beta1)
        w, before = (1 - b) / (1 - b**t), 1 - b ** (t - 1)
        worst = mpmath.mpf(0)
        for g, m, s in zip(grad.tolist(), old.tolist(), got.tolist(), strict=True):
            part = mpmath.mpf(m) / before if t > 1 else mpmath.mpf(0)
            bound = u * w * (abs(mpmath.mpf(g)) + abs(part)) * (6 + 16 / b if beta1 >= 0.5 else 11)
            worst = max(worst, abs(mpmath.mpf(s) - w * (mpmath.mpf(g) - part)) / bound)
    return float(worst)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("t", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("beta1", [0.01, 0.3, 0.5, 0.9, 0.999])
def test_difference(beta1: float, t: int, dtype: str) -> None:
    assert difference_within_bound(AGD, beta1, t, dtype) <= 1


def test_differences_from_a_small_beta1_would_not_do() -> None:
    """The form with the new average loses 1 / beta1: it is not taken below 1/2."""
    copy = mutated(agd_module, ("self.beta1 >= 0.5", "self.beta1 > 0")).AGD
    assert difference_within_bound(copy, 0.01, 2, "float64") > 1


@pytest.mark.parametrize(
    "wrong",
    [("(1 - self.beta1) * x), w * x", "x), w * x"), ("), w * x", "), x"), ("1 / self.beta1)\n", "1)\n")],
)
def test_difference_check_catches(wrong: tuple[str, str]) -> None:
    copy = mutated(agd_module, wrong).AGD
    assert difference_within_bound(copy, 0.9, 3, "float64") > 1


S = "k.of_gradient * grad - k.of_average * (m if self.from_new else state.m)"
ROOT, FLOOR = "xp.sqrt(b_max if self.amsgrad else b)", "clamp(root, k.floor, xp=xp)"
CLIP = "u = clamp(u, -self.clip, self.clip, xp=xp)\n        direction = k.factor * u"
QUOTIENT = "quotient(m, clamp(root, k.floor, xp=xp), xp, bound=least)"
M = "m = ema(state.m, grad, self.beta1)"
BUGS: dict[str, tuple[str, str, str]] = {  # old, new, checks
    "first difference zero": (S, f"(state.step > 0) * {S}", "golden_state law_constant_shift"),
    "difference of raw gradients": (S, "grad - state.m", "golden_table law_sum_of_differences quadratic"),
    "difference uncorrected": (S, "(m - state.m)", "vectors law_first_two_steps sgd_threshold_is_sharp"),
    "AdaBelief's residual": (S, "(grad - m)", "vectors law_sum_of_differences white_noise beale_animation"),
    "Adam's square": (S, "grad", "vectors step_bound_is_tight constant_gradient quadratic"),
    "delta added": (
        FLOOR,
        "root + k.floor",
        "golden_table law_adaptive_limit deltas_part_at_the_switch",
    ),
    "delta not corrected": (FLOOR, "clamp(root, self.delta, xp=xp)", "vectors law_first_two_steps law_sgd_limit"),
    "maximum under the root": (FLOOR, "xp.sqrt(clamp(root * root, k.floor, xp=xp))", "vectors"),
    "one switch for all": (
        f"root = {ROOT}",
        f"root = xp.sqrt(0 * b + xp.mean({ROOT} ** 2, axis=-1, keepdims=True))",
        "vectors",
    ),
    "no second correction": (
        "k.factor * u",
        "k.factor / sqrt(one_minus_power(self.beta2, now.step)) * u",
        "vectors law_step_bound beale",
    ),
    "no first correction": (
        "k.factor * u",
        "k.factor * one_minus_power(self.beta1, now.step) * u",
        "vectors constant_gradient",
    ),
    "maximum of corrected squares": (
        "xp.maximum(state.b_max, b)",
        "one_minus_power(self.beta2, now.step) * xp.maximum(state.b_max / one_minus_power(self.beta2, "
        "max(state.step, 1)), b / one_minus_power(self.beta2, now.step))",
        "golden_table vectors law_states",
    ),
    "maximum decays": ("xp.maximum(state.b_max, b)", "xp.maximum(self.beta2 * state.b_max, b)", "vectors law_states"),
    "clip after the factor": (
        f"            {CLIP}",
        "            pass\n        direction = k.factor * u\n"
        "        direction = direction if self.clip is None else clamp(direction, -self.clip, self.clip, xp=xp)",
        "golden_table vectors",
    ),
    "clip at one": ("clamp(u, -self.clip, self.clip, xp=xp)", "clamp(u, -1.0, 1.0, xp=xp)", "vectors"),
    "corrections in float32": (
        "sqrt(one_minus_power(self.beta2, step, like=like))",
        "float(__import__('numpy').float32(1 - self.beta2**step)) ** 0.5",
        "golden_table vectors",
    ),
    "counter one late": (
        "inverse_c1 = reciprocal(one_minus_power(self.beta1, step, like=like))",
        "inverse_c1 = reciprocal(one_minus_power(self.beta1, step + 1, like=like))",
        "golden_table vectors law_first_two_steps",
    ),
    "heavy ball": (M, "m = self.beta1 * state.m + grad", "golden_table vectors law_sgd_limit"),
    "momentum of before": ("quotient(m, ", "quotient(state.m, ", "golden_table vectors law_sgd_limit"),
    "0 / 0": (QUOTIENT, f"m / {FLOOR}", "vectors zero_history"),
    "0 for infinity": (QUOTIENT, f"xp.where(root == 0, 0.0, {QUOTIENT})", "zero_over_zero_only"),
    "decay of its own": (M, f"grad = grad + 0.125 * param; {M}", "vectors quadratic"),
    "ties are not SGD": ("xp.sqrt(b) <= self.delta", "xp.sqrt(b) < self.delta", "ties_are_sgd"),
    "share reversed": ("sgd_share=xp.sum(", "sgd_share=1 - xp.sum(", "law_diagnose law_adaptive_limit ties_are_sgd"),
    "report of raw averages": ("corrected_b=b * reciprocal(c2)", "corrected_b=b", "law_diagnose"),
    "report before the first update": (
        "corrected_m=state.m * inverse_c1",
        "corrected_m=state.m / (1 - self.beta1**state.step)",
        "before_the_first_update",
    ),
}
RATE = "decayed - rate * direction"
DECAYS = {
    "after": (RATE, "(param - rate * direction) * (1 - rate * decay)"),
    "with the effective rate": (RATE, "param - rate * direction - rate * 0.001**0.5 / 0.1 * decay * param"),
    "fixed": (RATE, "param - rate * direction - decay * param"),
    "coupled": (RATE, "param - rate * direction - rate * rate * decay * param"),
}


@pytest.mark.parametrize("check", CHECKS)
def test_check_passes(check: str) -> None:
    CHECKS[check](Optimizer if check == "golden_decay" else AGD)


@pytest.mark.parametrize(("name", "check"), [(name, check) for name, bug in BUGS.items() for check in bug[2].split()])
def test_planted_bug_is_caught(name: str, check: str) -> None:
    planted = mutated(agd_module, BUGS[name][:2]).AGD
    if name == "decay of its own":
        planted.reads_param = True
    with np.errstate(all="ignore"), pytest.raises(AssertionError):
        CHECKS[check](planted)


@pytest.mark.parametrize("name", DECAYS)
def test_planted_decay_is_caught(name: str) -> None:
    with pytest.raises(AssertionError):
        golden_decay(mutated(optimizer_module, DECAYS[name]).Optimizer)


def test_every_check_catches_something() -> None:
    assert {name for bug in BUGS.values() for name in bug[2].split()} | {"golden_decay"} == set(CHECKS)


@pytest.mark.filterwarnings("error")
def test_the_share_of_an_empty_parameter_is_zero() -> None:
    def check(agd: Any) -> None:
        for shape in ((0,), (0, 1), (2, 0)):
            assert agd.diagnose(agd.init(np.zeros(shape))).sgd_share == 0

    check(AGD())
    mean = ("xp.sum(xp.astype(is_sgd, state.m.dtype)) / max(math.prod(is_sgd.shape), 1)", "xp.mean(1.0 * is_sgd)")
    with pytest.raises(RuntimeWarning, match="empty slice"):
        check(mutated(agd_module, mean).AGD())
