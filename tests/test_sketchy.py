"""S-AdaGrad, S-Shampoo and the online yardsticks: the vectors, golden values, limits, bugs."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from array_api_compat import array_namespace
from helpers import distance as gap
from mutation import check_vectors, mutated

import precond_ref as pr
from precond_ref.methods import online_sketches, sketchy
from precond_ref.numerics import sketch
from precond_ref.problems import load_libsvm

U = 2.0**-53


def grads_of(shape: tuple[int, ...], steps: int, seed: int = 0) -> np.ndarray:
    """Small integers, never all zero in a step."""
    return np.random.default_rng([seed, *shape]).integers(-4, 5, (steps, *shape)) + 0.125


def run(method: Any, grads: np.ndarray, param: Any = None, lr: float | None = None) -> np.ndarray:
    """Directions, (steps, ...); with ``lr`` the parameters after each step, from zero, instead."""
    x = np.zeros(grads.shape[1:]) if param is None else param
    state = method.init(x)
    out = []
    for g in grads:
        direction, state = method.update(g, state, x)
        if lr is not None:
            x = x - lr * direction
        out.append(direction if lr is None else x)
    return np.stack(out)


# ---- golden values --------------------------------------------------------------------------------------------------

GOLDEN_VECTORS = np.array([[2.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
GOLDEN_MATRICES = np.array([[[1.0, 2], [0, 1], [3, 0]], [[0, 1], [1, -1], [2, 1]]])
DIGITS = 6e-9  # the values are given to eight or nine decimals


def check_golden(lib: Any) -> None:
    """Four steps of S-AdaGrad, two of S-Shampoo, lr = 1 from zero."""
    for size, beta2, rho, top, x in (
        (1, 1.0, 9.0, 0.0, (-1.33333333, -0.78054693, -0.74158162)),
        (2, 1.0, 3.0, 3.0, (-1.35188096, -1.46461562, -1.1717224)),
        (3, 1.0, 1.0, None, (-1.3275138, -1.54085229, -1.54085229)),
        (1, 0.5, 4.25, 0.0, None),
        (2, 0.5, 0.6619125112, 2.926174978, (-1.54902933, -1.54902933, -1.30561708)),
        (3, 0.5, 0.3288353904, None, (-1.50997155, -1.60724535, -1.50997155)),
    ):
        method = lib.SAdaGrad(size=size, beta2=beta2)
        x_t, state = np.zeros(3), method.init(np.zeros(3))
        for g in GOLDEN_VECTORS:
            direction, state = method.update(g, state, x_t)
            x_t = x_t - direction
        assert abs(state.sketch.escaped - rho) <= DIGITS
        assert top is None or abs(state.sketch.eigenvalues[0] - top) <= DIGITS
        assert x is None or np.max(np.abs(x_t - x)) <= DIGITS
    for size, left, right, x in (
        (2, 7.0580108302, 6.8902277714,
         [[-0.15096235, -1.2145704], [-0.26984683, -0.06064329], [-1.48215804, -0.0925835]]),
        (3, 2.6910517021, 0.0,
         [[-0.10379198, -1.26233657], [-0.35617109, 0.05964505], [-1.49443799, -0.08332931]]),
    ):  # fmt: skip
        method = lib.SShampoo(size=size)
        x_t, state = np.zeros((3, 2)), method.init(np.zeros((3, 2)))
        for g in GOLDEN_MATRICES:
            direction, state = method.update(g, state, x_t)
            x_t = x_t - direction
        assert abs(state.sketches[0].escaped - left) <= DIGITS
        assert abs(state.sketches[1].escaped - right) <= DIGITS
        assert np.max(np.abs(x_t - x)) <= DIGITS


# ---- limits ---------------------------------------------------------------------------------------------------------


def check_limits(lib: Any) -> None:
    """The known optimizers each method becomes."""
    vectors, matrices = grads_of((5,), 12, 1), grads_of((4, 3), 12, 1)
    for size in (5, 6, 9):
        assert gap(run(lib.SAdaGrad(size=size), vectors), run(pr.FullAdaGrad(), vectors)) <= 1e-12
    for size in (4, 5):
        for eps in (0.0, 0.25):
            expected = run(pr.Shampoo(eps=eps), matrices)
            assert gap(run(lib.SShampoo(size=size, eps=eps), matrices), expected) <= 1e-12
        average = run(pr.Shampoo(beta2=0.75, eps=0.0), matrices)  # weights the new term by 1 - beta2
        assert gap(run(lib.SShampoo(size=size, beta2=0.75), matrices), 0.25**0.5 * average) <= 1e-12
    square, tensors = grads_of((3, 3), 12, 1), grads_of((2, 3, 2), 12, 1)
    assert gap(run(lib.SShampoo(size=4, eps=0.25), square), run(pr.Shampoo(eps=0.25), square)) <= 1e-12
    assert gap(run(lib.SShampoo(size=4, eps=0.25), tensors), run(pr.Shampoo(eps=0.25), tensors)) <= 1e-12

    norms = np.cumsum(np.sum(vectors**2, axis=1))
    assert gap(run(lib.SAdaGrad(size=1), vectors), vectors / np.sqrt(norms)[:, None]) <= 1e-14
    norms = np.cumsum(np.linalg.norm(matrices, 2, axis=(1, 2)) ** 2)
    assert gap(run(lib.SShampoo(size=1), matrices), matrices / np.sqrt(norms)[:, None, None]) <= 1e-14

    first = run(lib.SAdaGrad(size=3), vectors[:1])
    assert gap(first, vectors[:1] / np.linalg.norm(vectors[0])) <= 1e-14
    for beta2 in (1.0, 0.75):
        one_axis = run(lib.SShampoo(size=3, beta2=beta2), vectors)
        assert gap(run(lib.SAdaGrad(size=3, beta2=beta2), vectors), one_axis) <= 1e-14


def check_low_rank_steps(lib: Any) -> None:
    """Gradients in a span of rank l - 1 and l: the steps of full-matrix AdaGrad in the coordinates of the span."""
    rng = np.random.default_rng(3)
    for rank, size in ((3, 4), (3, 3), (2, 6)):
        frame = np.linalg.qr(rng.standard_normal((6, 6)))[0][:rank]
        coordinates = rng.standard_normal((60, rank))
        small = run(pr.FullAdaGrad(), coordinates)
        got = run(lib.SAdaGrad(size=size), coordinates @ frame)
        for t in range(60):
            w = np.linalg.eigvalsh(coordinates[: t + 1].T @ coordinates[: t + 1])
            kappa = w[-1] / w[max(0, rank - t - 1)]
            assert gap(got[t : t + 1], small[t : t + 1] @ frame) <= 16 * U * (kappa + t)  # each update rounds


CHECKS = {
    "vectors": check_vectors,
    "golden": check_golden,
    "limits": check_limits,
    "low_rank_steps": check_low_rank_steps,
}


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str) -> None:
    CHECKS[name](sketchy)


SKETCHY_MUTANTS: dict[str, tuple[str, tuple[str, str]]] = {
    "S-AdaGrad without the square root": ("vectors", ("*sketch, -0.5, grad", "*sketch, -1.0, grad")),
    "S-AdaGrad statistic after use": ("golden", ("apply_power(*sketch, -0.5", "apply_power(*state.sketch, -0.5")),
    "S-AdaGrad gives NaN from the second update": ("vectors",
        ("return direction, SAdaGradState", "return direction * (xp.nan if state.step else 1), SAdaGradState")),
    "delta ignored": ("vectors", ("self.size, self.delta)", "self.size)")),
    "size taken as rank": ("golden", ("beta2, size=self.size, solver", "beta2, size=self.size + 1, solver")),
    "S-AdaGrad beta2 ignored": ("golden", ("rows, self.beta2, size", "rows, 1.0, size")),
    "exponent -1/ndim": ("golden", ("exponent = -0.5 / len(dims)", "exponent = -1.0 / len(dims)")),
    "exponent -1/4 for every order": ("limits", ("exponent = -0.5 / len(dims)", "exponent = -0.25")),
    "exponent counts axes before merging": ("vectors", ("-0.5 / len(dims)", "-0.5 / (grad.ndim - now.stack)")),
    "S-Shampoo statistic after use": ("golden", ("rho = sketch[:3]\n        p =", "rho = old[:3]\n        p =")),
    "both sides swapped": ("limits",
        ("old, rows, xp)", "old, rows if d != rows.shape[-2] else xp.matrix_transpose(rows), xp)")),
    "unfolding without transposition": ("limits",
        ("xp.matrix_transpose(xp.reshape(g, shape))  #", "xp.reshape(g, (*stack, shape[-1], d))  #")),
    "second axis sees the preconditioned gradient": ("golden",
        ("g, p = rows, xp.matrix_transpose(p)", "g = p = xp.matrix_transpose(p)")),
    "every=k ignored": ("vectors", ("rows, xp), None if method.every == 1 else old", "rows, xp), None")),
    "tail_decay ignored": ("vectors", ("self.tail_decay, size", "None, size")),
    "tail not decayed by default": ("vectors", ("self.tail_decay, size", "self.tail_decay or 1.0, size")),
    "eps ignored": ("vectors", ("ridge=method.eps", "ridge=0.0")),
    "relative eps ignored": ("vectors", ("relative=method.relative_eps", "relative=False")),
    "graft per row": ("vectors", ("tuple(range(now.stack, grad.ndim))", "(-1,)")),
    "graft eps outside the root": ("vectors", ("xp.sqrt(v + self.graft_eps)", "xp.sqrt(v) + self.graft_eps")),
    "graft sum weighted by 1 - beta2": ("vectors", ("accumulate(state.v, grad * grad, self.graft_beta2)",
        "state.v + (1 - self.graft_beta2) * (grad * grad - state.v)")),
    "start off by one": ("vectors", ("step > self.start", "step >= self.start")),
    "no Nesterov": ("vectors", ("self.momentum, self.nesterov)", "self.momentum)")),
    "momentum as an average": ("vectors", ("heavy_ball(state.m, u,", "heavy_ball(state.m, (1 - self.momentum) * u,")),
    "weight decay always after the momentum": ("vectors",
        ("if self.reads_param and not self.decay_after_momentum", "if False")),
    "merged from the right": ("vectors", ("for d in shape:", "for d in reversed(shape):")),
    "unit axes kept": ("vectors", ("if d > 1)", "if d > 0)")),
    "merged only below the limit": ("vectors", ("product * d > self.merge", "product * d >= self.merge")),
    "vectors preconditioned": ("vectors", ("len(shape) <= 1", "len(shape) < 1")),
    "exclusions without a graft": ("vectors",
        ("(self.graft is not None and (len(shape) <= 1 or", "((len(shape) <= 1 or")),
}  # fmt: skip

ONLINE_MUTANTS = {
    "Ada-FD delta squared under the root": ("self._apply(grad, sketch, shift, weight, xp, root=True)",
        "self._apply(grad, sketch._replace(eigenvalues=sketch[1] + self.delta**2), shift, weight, xp, root=True)"),
    "Ada-FD without the root": ("weight, xp, root=True)", "weight, xp)"),
    "FD-SON decays like RFD-SON": ("self.learning_rate * number(step, like) ** 0.5)",
        "self.learning_rate * number(step, like))"),
    "RFD-SON adds the whole mass": ("0.5 * sketch.escaped", "1.0 * sketch.escaped"),
    "RFD-SON without delta": ("sketch.escaped + self.delta", "sketch.escaped"),
    "sketch of unscaled gradients": ("grad[..., None, :] * weight", "grad[..., None, :]"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", SKETCHY_MUTANTS)
def test_planted_bug_is_caught(name: str) -> None:
    check, change = SKETCHY_MUTANTS[name]
    with pytest.raises((AssertionError, ValueError)):
        CHECKS[check](mutated(sketchy, change))


@pytest.mark.parametrize("name", ONLINE_MUTANTS)
def test_planted_bug_in_a_yardstick_is_caught(name: str) -> None:
    with pytest.raises(AssertionError):
        check_vectors(mutated(online_sketches, ONLINE_MUTANTS[name]))


def test_planted_bugs_start_from_a_sound_copy() -> None:
    copy: ModuleType = mutated(sketchy)
    for check in CHECKS.values():
        check(copy)
    check_vectors(mutated(online_sketches))


# ---- fields and arguments -------------------------------------------------------------------------------------------


def test_practical_excludes_long_axes() -> None:
    method = pr.SShampoo.practical(size=2, momentum=0.0, graft_eps=0.25)
    for shape, axes in (((4097, 1), ()), ((4096, 2), (4096, 2)), ((3, 3, 64, 128), (576, 128)), ((0, 4), ())):
        assert method.axes(shape) == axes
    assert method.replace(graft=None).axes((4097, 1)) == (4097,)
    long = np.ones((4097, 1))
    direction, state = method.update(long, method.init(long), long)
    assert state.sketches == ()
    assert np.allclose(direction, 1 / np.sqrt(0.001 + 0.25), rtol=1e-14)
    assert bool(method.diagnose(state).finite)
    assert method.replace(graft="sgd").diagnose(state._replace(v=None)).finite is None


def test_report() -> None:
    method = pr.SShampoo(size=2)
    grads = grads_of((4, 3), 5)
    state = method.init(grads[0])
    for g in grads:
        _, state = method.update(g, state, g)
    report = method.diagnose(state)
    assert [e.shape for e in report.eigenvalues] == [(2,), (2,)]
    assert [int(r) for r in report.rank] == [1, 1]
    assert all(rho > 0 for rho in report.escaped)
    assert bool(report.finite)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="start > 0 needs a graft"):
        pr.SShampoo.practical(graft=None, start=1)
    method, grad = pr.SShampoo(size=3), np.ones((4, 5))
    with pytest.raises(ValueError, match=r"state.sketches\[1\].basis must have shape"):
        method.update(grad, method.init(np.ones((4, 2))), grad)


def test_refresh_overrules_the_counter() -> None:
    grads = grads_of((4, 3), 6, 5)
    method = pr.SShampoo(size=2, eps=0.25, every=3)
    state, by_hand = method.init(grads[0]), method.init(grads[0])
    for t, g in enumerate(grads):
        expected, state = method.update(g, state, g)
        got, by_hand = method.update(g, by_hand, g, refresh=t % 3 == 0)
        assert np.array_equal(got, expected)


def test_routing() -> None:
    assert [pr.SAdaGrad(size=2).takes(s) for s in ((), (3,), (3, 2))] == [False, True, False]
    assert [pr.AdaFD(size=2, delta=1.0).takes(s) for s in ((), (3,), (3, 2))] == [False, True, False]
    assert [pr.SShampoo(size=2).takes(s) for s in ((3,), (3, 2), (3, 2, 2))] == [False, True, True]
    assert [pr.SShampoo.practical().takes(s) for s in ((), (3,), (3, 2))] == [True, True, True]


def check_diagnosed(lib: Any) -> None:
    """The report of a vector by S-Shampoo, |g|^2 once; that of a Nystrom sketch, of rank one, has its certificate."""
    g = np.array([2.0, -1.0, 0.5, 3.0])
    method = lib.SShampoo(size=2)
    found = method.diagnose(method.update(g, method.init(g), g)[1])
    assert np.allclose(found.eigenvalues[0], [g @ g, 0.0])
    method = lib.SShampoo(size=2, solver="nystrom")
    found = method.diagnose(method.update(g, method.init(g), g)[1])
    assert [len(found.certificate), len(found.kappa)] == [1, 1]
    assert np.isfinite(found.certificate[0])


def check_nothing_yet(lib: Any) -> None:
    """Gradients of zeros, before any other, leave a sketch of zeros by each solver, and make no step."""
    for solver in lib.SOLVERS:
        nothing = lib.Sketch(np.zeros((4, 2)), np.zeros(2), np.zeros(()))
        zero = lib.update(nothing, np.zeros((1, 4)), solver=solver, xp=array_namespace(np.zeros(1)))
        assert not any(np.any(x != 0) for x in (zero.eigenvalues, zero.escaped))
        method = pr.SAdaGrad(size=2, solver=solver)
        assert np.array_equal(run(method, np.zeros((2, 4))), np.zeros((2, 4)))


def test_nothing_yet() -> None:
    check_nothing_yet(sketch)


def test_a_planted_bug_of_zeros_is_caught() -> None:
    with pytest.raises(AssertionError), np.errstate(all="ignore"):
        check_nothing_yet(mutated(sketch, ("xp.where(finite & (peak > 0), peak, 1.0)", "xp.where(finite, peak, 1.0)")))


def test_diagnosed() -> None:
    check_diagnosed(pr)


@pytest.mark.parametrize(
    ("old", "new"),
    [("SShampooState) -> int:\n        return state.sketches[0].escaped.ndim",
      "SShampooState) -> int:\n        return state.sketches[1].escaped.ndim"),
     ('if self.solver == "nystrom" else found', 'if self.solver != "nystrom" else found')],
)  # fmt: skip
def test_a_planted_bug_of_the_report_is_caught(old: str, new: str) -> None:
    with pytest.raises((AssertionError, IndexError, ValueError)):
        check_diagnosed(mutated(sketchy, (old, new)))


# ---- real data ------------------------------------------------------------------------------------------------------


def online_loss(method: Any, features: np.ndarray, signs: np.ndarray, lr: float) -> float:
    """Mean logistic loss of one pass in file order, from zero."""
    x, total = np.zeros(features.shape[1]), 0.0
    state = method.init(x)
    for a, y in zip(features, signs, strict=True):
        margin = y * (a @ x)
        total += np.logaddexp(0.0, -margin)
        direction, state = method.update(-y * a / (1 + np.exp(min(margin, 700.0))), state, x)
        x = x - lr * direction
    return float(total / len(signs))


@pytest.mark.deep
@pytest.mark.skipif("PRECOND_REF_DATA" not in os.environ, reason="needs a9a in the folder PRECOND_REF_DATA")
def test_logistic_regression_on_a9a() -> None:
    """The numbers of an independent implementation: whole file, and first 4000 rows at lr 0.1 by size."""
    features, labels = load_libsvm("a9a", 123)
    features = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    signs = np.where(labels > 0, 1.0, -1.0)
    for method, lr, expected in (
        (pr.SAdaGrad(size=10), 10**-0.375, 0.33255),
        (pr.SAdaGrad(size=10, solver="gram64"), 10**-0.375, 0.33255),
        (pr.RFDSON(size=10, delta=0.0, learning_rate=10**-1.75), 10**-1.75, 0.33450),
        (pr.AdaFD(size=10, delta=1.0), 1e-2, 0.35410),
        (pr.FDSON(size=10, delta=1.0, learning_rate=0.1), 0.1, 0.53912),
    ):
        got = online_loss(method, features, signs, lr)
        print(f"\n{method}: {got:.5f}", end="")
        assert abs(got - expected) <= 5.1e-6
    sizes = (1, 2, 3, 5, 10, 20, 40, 125)
    got = [online_loss(pr.SAdaGrad(size=size), features[:4000], signs[:4000], 0.1) for size in sizes]
    print("\nfirst 4000 rows, by size:", dict(zip(sizes, np.round(got, 5).tolist(), strict=True)))
    assert np.all(np.diff(got) < 0)
    assert np.max(np.abs(np.array(got) - [0.4477, 0.4261, 0.4090, 0.3942, 0.3793, 0.3684, 0.3627, 0.3612])) < 1e-4
