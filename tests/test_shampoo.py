"""Shampoo as run in production and EShampoo: a plain model of one matrix, limits and invariances, and planted bugs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from helpers import directions, distance, gradients
from mutation import mutated

import precond_ref as pr
from precond_ref.conformance import variants
from precond_ref.conformance.declarations.production import CASES
from precond_ref.methods import shampoo
from precond_ref.numerics import bases, roots

PLAIN = {"beta1": 0.0, "target": None, "bias_correction": False}
LOUD = {"beta1": 0.75, "beta3": 0.625, "beta2": 0.875, "eps": 0.1875, "every": 2, "target": None}
GRAFT = {"graft": "adam", "graft_beta2": 0.6875, "graft_eps": 0.078125, "start": 3}
LAST = {"momentum": 0.5625, "dampening": 0.21875, "weight_decay": 0.40625}


def turned(a: np.ndarray, f: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    w, q = np.linalg.eigh(a)
    return (q * f(w)) @ q.T


def model(grads: np.ndarray, *, beta1: float, beta3: float | None = None, beta2: float, eps: float, every: int,
          start: int | None = None, correct: bool = True, drop: bool = False, powers: Any = (0.25, 0.25),
          tau: float = 0.0, graft: str | None = None, graft_beta2: float = 0.0, graft_eps: float = 0.0,
          mu: float = 0.0, damp: float = 0.0, nesterov: bool = False, alpha: float = 0.0, l2: bool = False,
          corrected: bool = False, p: float = 0.5) -> np.ndarray:  # fmt: skip
    """Directions for matrices at the parameter 1, in a style of its own: averages are weighted sums."""
    W, found, seen, buffer = np.ones(grads.shape[1:]), [], [], np.zeros(grads.shape[1:])
    beta3 = beta1 if beta3 is None else beta3
    first = every if start is None else start
    P: Any = [np.eye(d) for d in W.shape]
    D_parts: list[np.ndarray] = []

    def weighted(parts: list[np.ndarray], decay: float, last: float) -> Any:
        """sum of decay^(age) last part."""
        return sum(last * decay ** (len(parts) - 1 - i) * x for i, x in enumerate(parts))

    for t, g in enumerate(grads, start=1):
        g = g + alpha * W if l2 else g
        seen.append(g)
        last = 1.0 if beta2 == 1 or drop else 1 - beta2
        c2 = 1 - beta2**t if correct and beta2 < 1 and not drop else 1.0
        stats = [
            weighted([x @ x.T for x in seen], beta2, last) / c2,
            weighted([x.T @ x for x in seen], beta2, last) / c2,
        ]
        if t == first or (t > first and t % every == 0):
            for i, a in enumerate(stats):
                a = a * max(np.trace(a), eps) ** -tau if tau else a
                if corrected:
                    P[i] = np.linalg.eigh(a)[1]
                else:
                    P[i] = turned(a + eps * np.eye(len(a)), lambda w, i=i: w ** -powers[i])
        past = weighted(seen[:-1], beta1, 1 - beta1) if t > 1 else 0 * g
        F = beta3 * past + (1 - beta3) * g if beta1 else g
        F = F / (1 - beta3 * beta1 ** (t - 1)) if correct and beta1 else F
        squares = [x * x for x in seen]
        N = F
        if graft == "adagrad":
            N = F / (np.sqrt(sum(squares)) + graft_eps)
        elif graft in ("rmsprop", "adam"):
            v = weighted(squares, graft_beta2, 1 - graft_beta2)
            N = F / (np.sqrt(v / (1 - graft_beta2**t) if graft == "adam" else v) + graft_eps)
        if corrected:
            D_parts.append((P[0].T @ g @ P[1]) ** 2)
            D = weighted(D_parts, beta2, last) / c2
            step = P[0] @ ((P[0].T @ F @ P[1]) / (D**p + eps)) @ P[1].T
        else:
            step = P[0] @ F @ P[1]
        if graft is not None:
            step = N if t < first else step * np.linalg.norm(N) / np.linalg.norm(step)
        step = step if l2 else step + alpha * W
        if mu:
            buffer = mu * buffer + (1 - damp) * step
            step = (1 - damp) * step + mu * buffer if nesterov else buffer
        found.append(step)
    return np.stack(found)


def run(method: Any, grads: np.ndarray, **refresh: Any) -> np.ndarray:
    """Directions at the parameter 1."""
    param, found = np.ones(grads.shape[1:]), []
    state = method.init(param)
    for g in grads:
        direction, state = method.update(g, state, param, **refresh)
        found.append(direction)
    return np.stack(found)


# ---- checks, each of which takes the module -------------------------------------------------------------------------


def check_model(lib: Any) -> None:
    """Each field against the model; shapes with a null space at the first refreshes."""
    common = {"beta1": 0.75, "beta3": 0.625, "beta2": 0.875, "eps": 0.1875, "every": 2}
    last = {"mu": 0.5625, "damp": 0.21875, "alpha": 0.40625}
    graft = {"graft": "adam", "graft_beta2": 0.6875, "graft_eps": 0.078125, "start": 3}
    for shape in ((4, 3), (2, 5)):
        grads = gradients(shape, 8)
        for ours, theirs in (
            ({}, {}),
            ({"beta3": None}, {"beta3": None}),
            ({"beta1": 0.0}, {"beta1": 0.0}),
            ({"beta2": 1.0, "every": 1}, {"beta2": 1.0, "every": 1}),
            ({"start": 3}, {"start": 3}),
            ({"bias_correction": False}, {"correct": False}),
            ({"drop_weight": True}, {"drop": True}),
            ({"exponents": (0.5,)}, {"powers": (0.5, 0.25)}),
            ({"exponents": (None, 0.0)}, {"powers": (0.25, 0.0)}),
            ({"trace_scaling": 0.375}, {"tau": 0.375}),
            (GRAFT, graft),
            ({**GRAFT, "bias_correction": False}, {**graft, "correct": False}),
            ({**GRAFT, "graft": "rmsprop"}, {**graft, "graft": "rmsprop"}),
            ({**GRAFT, "graft": "adagrad"}, {**graft, "graft": "adagrad"}),
            ({**GRAFT, "graft": "sgd"}, {**graft, "graft": "sgd"}),
            ({**LAST, **GRAFT}, {**last, **graft}),
            ({**LAST, "nesterov": True}, {**last, "nesterov": True}),
            ({**LAST, "decay_form": "l2"}, {**last, "l2": True}),
        ):
            got = run(lib.ShampooProduction(**{**LOUD, **ours}), grads)
            assert distance(got, model(grads, **{**common, **theirs})) <= 1e-12, ours
    zero = np.zeros((2, 3, 2))
    assert not np.any(run(lib.ShampooProduction(trace_scaling=0.375, eps=0.0), zero)), "a statistic without a trace"


def check_eshampoo(lib: Any) -> None:
    common = {"beta1": 0.75, "beta3": 0.625, "beta2": 0.875, "eps": 0.1875, "every": 2, "corrected": True}
    grads = gradients((4, 3), 8)
    for ours, theirs in (
        ({}, {}),
        ({"every": 1, "beta2": 1.0}, {"every": 1, "beta2": 1.0}),
        ({"every": 1, "drop_weight": True}, {"every": 1, "drop": True}),
        ({"start": 3}, {"start": 3}),
        ({"bias_correction": False}, {"correct": False}),
        ({"exponent": 0.40625}, {"p": 0.40625}),
        ({**GRAFT, **LAST}, {"graft": "adam", "graft_beta2": 0.6875, "graft_eps": 0.078125, "start": 3, "mu": 0.5625,
                             "damp": 0.21875, "alpha": 0.40625}),
    ):  # fmt: skip
        assert distance(run(lib.EShampoo(**{**LOUD, **ours}), grads), model(grads, **{**common, **theirs})) <= 1e-12, (
            ours
        )


def check_limits(lib: Any) -> None:
    grads = gradients((4, 3), 6)
    for fields in ({"eps": 0.1875}, {"eps": 0.0}, {"eps": 0.1875, "beta2": 0.875}):
        for shape in ((4, 3), (2, 3, 4), (5,)):
            other = gradients(shape, 6)
            assert np.array_equal(
                run(lib.ShampooProduction(**PLAIN, **fields), other), run(pr.Shampoo(**fields), other)
            )
    first = run(lib.ShampooProduction(**PLAIN, eps=0.0), grads)[0]
    u, s, vh = np.linalg.svd(grads[0], full_matrices=False)
    assert np.allclose(first, u @ vh, atol=1e-13)
    half = run(lib.ShampooProduction(**PLAIN, eps=0.0, exponents=(0.5, 0.5)), grads)[0]
    assert np.allclose(half, (u / s) @ vh, atol=1e-12)
    eps = 0.1875
    assert np.allclose(
        run(lib.EShampoo(beta1=0.0, target=None, eps=eps), grads)[0], (u * (s / (s + eps))) @ vh, atol=1e-12
    )
    adam = run(pr.Adam(beta1=0.75, beta2=0.875, eps=eps), grads)
    ignored = {"beta1": 0.75, "beta2": 0.875, "eps": eps, "target": None}
    assert distance(run(lib.EShampoo(**ignored, ignored_axes=(0, 1)), grads), adam) <= 1e-14
    assert distance(run(lib.EShampoo(**ignored, every=9), grads), adam) <= 1e-14  # before its first refresh
    assert distance(run(lib.EShampoo(**ignored), grads, refresh=False), adam) <= 1e-14
    for plain in ({"exponents": (0.0, 0.0)}, {"every": 9}):
        got = run(lib.ShampooProduction(beta1=0.75, target=None, **plain), grads)
        assert distance(got, run(pr.Adam(beta1=0.75, beta2=0.0, eps=0.0), grads) * np.abs(grads)) <= 1e-14
    one = run(lib.ShampooProduction(**PLAIN, eps=eps, exponents=(0.5, 0.0)), grads)
    sided = run(pr.ASGO(beta1=0.0, beta2=0.0, eps=eps, side="left", rms=None), grads[:1])
    assert distance(one[:1], sided) <= 1e-13
    graft = run(lib.ShampooProduction(beta1=0.75, target=None, graft="sgd", eps=eps), grads)
    filtered = run(lib.ShampooProduction(beta1=0.75, target=None, exponents=(0.0, 0.0)), grads)
    assert np.allclose(np.linalg.norm(graft, axis=(1, 2)), np.linalg.norm(filtered, axis=(1, 2)), rtol=1e-14)


def check_invariances(lib: Any) -> None:
    grads = gradients((4, 3), 6)
    q, r = (np.linalg.qr(np.random.default_rng(d).standard_normal((d, d)))[0] for d in (4, 3))
    for method in (
        lib.ShampooProduction(**{**LOUD, "graft": "sgd"}),
        lib.ShampooProduction(**LOUD),
        lib.EShampoo(**{**LOUD, "every": 1}),
        lib.EShampoo(**{**LOUD, "every": 1}, basis="eigh"),
    ):
        assert distance(run(method, q @ grads @ r.T), q @ run(method, grads) @ r.T) <= 1e-11
        assert distance(run(method, np.swapaxes(grads, 1, 2)), np.swapaxes(run(method, grads), 1, 2)) <= 1e-12
    late = lib.EShampoo(**LOUD)  # D was filled in other coordinates before
    assert distance(run(late, q @ grads @ r.T), q @ run(late, grads) @ r.T) > 0.05
    for exponents, degree in (((), 0), ((0.5, 0.5), -1), ((0.5, 0.0), 0)):
        method = lib.ShampooProduction(**{**LOUD, "every": 1, "exponents": exponents})
        scaled = run(method.replace(eps=0.1875 * 64), 8 * grads)
        assert distance(scaled, 8.0**degree * run(method, grads)) <= 1e-14
    scaled = run(lib.EShampoo(**{**LOUD, "eps": 0.1875 * 8, "every": 1}), 8 * grads)
    assert distance(scaled, run(lib.EShampoo(**{**LOUD, "every": 1}), grads)) <= 1e-13


def check_grafted_laws(lib: Any) -> None:
    """With a graft: its scale, its symmetries, its norm, each block's own; without: exponents and traces."""
    grads = gradients((4, 3), 6)
    order, signs = [2, 0, 3, 1], np.array([1, -1, -1, 1])[:, None]
    q = np.linalg.qr(np.random.default_rng(4).standard_normal((4, 4)))[0]
    for graft in ("sgd", "adagrad", "rmsprop", "adam"):
        fields = {**LOUD, **GRAFT, "graft": graft}
        method, base = lib.ShampooProduction(**fields), lib.ShampooProduction(**{**fields, "start": 99})
        want = run(method, grads)
        scaled = method.replace(eps=0.1875 * 64, graft_eps=8 * 0.078125)
        assert distance(run(scaled, 8 * grads), (8 if graft == "sgd" else 1) * want) <= 1e-13, graft
        assert distance(run(method, signs * grads[:, order]), signs * want[:, order]) <= 1e-13, graft
        turned = distance(run(method, q @ grads), q @ want)
        assert turned <= 1e-12 if graft == "sgd" else turned > 1e-3, graft
        sizes = [np.linalg.norm(found, axis=(1, 2)) for found in (want, run(base, grads))]  # before t0 there is N alone
        assert np.allclose(*sizes, rtol=1e-13), graft
        cut, whole = (run(m.replace(max_dim=3), gradients((5, 3), 6)) for m in (method, base))
        for rows in (slice(0, 3), slice(3, 5)):
            assert np.allclose(*(np.linalg.norm(x[:, rows], axis=(1, 2)) for x in (cut, whole)), rtol=1e-13), graft
    uneven = lib.ShampooProduction(**LOUD, exponents=(0.375, 0.125))
    other = uneven.replace(exponents=(0.125, 0.375))
    assert distance(run(other, np.swapaxes(grads, 1, 2)), np.swapaxes(run(uneven, grads), 1, 2)) <= 1e-12
    traced = run(lib.ShampooProduction(**PLAIN, eps=0.0, trace_scaling=0.5), grads[:1])[0]
    size = np.sum(grads[0] ** 2) ** (0.5 * 0.25)  # of each root
    assert np.allclose(traced, size**2 * run(lib.ShampooProduction(**PLAIN, eps=0.0), grads[:1])[0], rtol=1e-12)
    fixed = lib.EShampoo(**{**LOUD, "every": 1})
    state = fixed.init(grads[0])
    kept = state = state._replace(bases=((q, np.eye(3)),))
    for g in grads:
        _, state = fixed.update(g, state, g, refresh=False)
    for axis, (gram, basis) in enumerate(zip(state.grams[0], kept.bases[0], strict=True)):
        assert np.allclose(np.sum(state.d[0], axis=1 - axis), np.diag(basis.T @ gram @ basis), rtol=1e-13)


def check_layout(lib: Any) -> None:
    """Merged axes are those of a reshaped parameter; blocks are parameters of their own."""
    axes = lambda shape, bound, target: lib.ShampooProduction(max_dim=bound, target=target).axes(shape)  # noqa: E731
    assert axes((4, 3, 2, 2), 12, 1) == (4, 12)
    assert axes((4, 3, 2, 2), 1024, 2) == (4, 12)
    assert axes((32, 3, 64, 64), 8192, 1) == (96, 4096)
    assert axes((5, 8), 1024, 1) == (40,)
    assert axes((1, 5, 1, 8), 8, 3) == (5, 8)
    assert axes((1, 1), 8, 1) == (1,)
    assert axes((1, 5, 8), 1024, None) == (1, 5, 8)
    grads = gradients((4, 3, 2, 2), 6)
    for cls in (lib.ShampooProduction, lib.EShampoo):
        merged = run(cls(**{**LOUD, "target": 2, "max_dim": 12}), grads)
        assert distance(merged, run(cls(**LOUD), grads.reshape(6, 4, 12)).reshape(grads.shape)) <= 1e-14
        matrix = gradients((5, 3), 6)
        for graft in ({}, GRAFT):
            cut = run(cls(**{**LOUD, **graft, "max_dim": 3}), matrix)
            for rows in (slice(0, 3), slice(3, 5)):
                assert distance(cut[:, rows], run(cls(**{**LOUD, **graft}), matrix[:, rows])) <= 1e-14
    matrix = gradients((3, 2), 6)
    vector = run(lib.ShampooProduction(**{**LOUD, "target": 1}), matrix).reshape(6, 6)
    assert distance(vector, run(lib.ShampooProduction(**LOUD, exponents=(0.5,)), matrix.reshape(6, 6))) <= 1e-14


def check_solvers(lib: Any) -> None:
    """The iterations, run long, are the eigendecomposition."""
    grads = gradients((4, 3), 5)
    fields = {**LOUD, "exponents": (0.25, 0.5)}
    truth = run(lib.ShampooProduction(**fields), grads)
    for root in ("coupled_newton", "higher_order"):
        assert distance(run(lib.ShampooProduction(**fields, root=root, root_steps=40), grads), truth) <= 1e-11, root
    third = {**LOUD, "exponents": (2 / 3, 0.375)}
    high = run(lib.ShampooProduction(**third, root="higher_order", root_steps=40), grads)
    assert distance(high, run(lib.ShampooProduction(**third), grads)) <= 1e-11


def check_third_order(lib: Any) -> None:
    """The error of a step is at most some third power of that before."""
    a = np.diag([1.0, 0.25, 0.5])
    errors = [np.abs(lib.roots.inverse_root_higher_order(a, Fraction(1, 4), 0.0, n) - np.diag(np.diag(a) ** -0.25 + 0.0)
                     ) [[0, 1, 2], [0, 1, 2]].max() for n in range(8)]  # fmt: skip
    some = [(e, after) for e, after in pairwise(errors) if 1e-4 < e < 0.1]
    assert some
    assert all(after <= 10 * e**3 for e, after in some)


def check_bases(lib: Any) -> None:
    """QR rounds: descending with D permuted converges on a fixed statistic; the code's order does not."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    g = (q * np.logspace(0, 1, 6)) @ np.linalg.qr(rng.standard_normal((6, 6)))[0]  # condition 100 of G G^T
    found = {}
    for basis in ("qr", "qr_meta"):
        method = lib.EShampoo(basis=basis, target=None, eps=1e-3, every=1)
        state = method.init(g)
        for _ in range(30):
            _, state = method.update(g, state, g)
        found[basis] = max(method.diagnose(state).off_diagonal)
    assert found["qr"] <= 1e-6
    assert found["qr_meta"] >= 1e-2
    grads = gradients((3, 3), 8)
    exact = run(lib.EShampoo(**{**LOUD, "every": 1}), grads)
    many = run(lib.EShampoo(**{**LOUD, "every": 1}, basis="qr_meta", iterations=400), grads)
    assert distance(many, exact) <= 1e-6
    kept = lib.EShampoo(**{**LOUD, "every": 1}, basis="eigh", tolerance=1.0)
    assert distance(run(kept, grads), run(lib.EShampoo(**{**LOUD, "every": 1}, ignored_axes=(0, 1)), grads)) <= 1e-14
    some = lib.EShampoo(**{**LOUD, "every": 1}, tolerance=0.25)
    state = some.init(grads[0])
    moves = []
    for g in grads:
        _, new = some.update(g, state, g)
        for i in range(2):
            a = new.grams[0][i] * some.scalars(new.step).correction + 0.1875 * np.eye(3)
            inner = state.bases[0][i].T @ a @ state.bases[0][i]
            near = np.linalg.norm(inner - np.diag(np.diag(inner))) <= 0.25 * np.linalg.norm(inner)
            moves.append(near)
            assert np.array_equal(new.bases[0][i], state.bases[0][i]) == near
        state = new
    assert True in moves
    assert False in moves


def check_bad_gradients(lib: Any) -> None:
    """A bad gradient between refreshes is heard of although no kept root knows of it."""
    grads = gradients((5, 2, 4, 3), 1)[0]
    grads[1, 1, 0, 0] = np.inf
    for fields in ({"every": 3}, {"every": 3, "graft": "sgd"}, {"every": 1, "start": 4}):
        for cls in (lib.ShampooProduction, lib.EShampoo):
            method = cls(beta1=0.0, eps=0.1875, target=None, **fields)
            state = method.init(grads[0], stack_ndim=1)
            with np.errstate(invalid="ignore"):
                for t, g in enumerate(grads):
                    direction, state = method.update(g, state, g)
                    assert np.all(np.isfinite(direction[0]))
                    assert np.all(np.isnan(direction[1])) == (t >= 1)
            assert method.diagnose(state).finite.tolist() == [True, False]


def check_rmsprop_at_scale(lib: Any) -> None:
    """The graft of RMSProp is not corrected: its first step has the norm of G / (sqrt(1 - gb) |G| + ge)."""
    g = gradients((4, 3), 1)
    got = run(lib.ShampooProduction(**{**LOUD, **GRAFT, "graft": "rmsprop", "start": 2}), g)[0]
    assert np.allclose(got, g[0] / (np.sqrt(0.3125) * np.abs(g[0]) + 0.078125), rtol=1e-13)


def check_slots(lib: Any) -> None:
    """D goes with the columns when the strong direction changes."""
    grads = np.concatenate([np.diag([4.0, 1.0, 0.25])[None], np.diag([0.25, 1.0, 16.0])[None]]) + 0.01 * gradients(
        (3, 3), 2
    )
    method = lib.EShampoo(**{**LOUD, "every": 1}, basis="qr")
    state = method.init(grads[0])
    for g in grads:
        before, (_, state) = state, method.update(g, state, g)
    q, old = state.bases[0][0], before.bases[0][0]
    assert np.argmax(np.abs(q[:, 0])) == 2
    fresh = (q.T @ grads[1] @ state.bases[0][1]) ** 2
    moved = (state.d[0] - 0.125 * fresh) / 0.875  # D of before, in the new slots
    assert np.argmax(np.abs(old[:, 0])) == 0
    assert np.unravel_index(np.argmax(moved), (3, 3)) != (0, 0)


def check_refresh(lib: Any) -> None:
    g = gradients((4, 3), 1)[0]
    assert lib.ShampooProduction().init(g).roots is None
    with pytest.raises(ValueError, match="refresh=False needs every > 1: with every=1 no root is kept"):
        lib.ShampooProduction().update(g, lib.ShampooProduction().init(g), g, refresh=False)
    for method in (lib.ShampooProduction(start=2), lib.ShampooProduction(every=2), lib.EShampoo()):
        method.update(g, method.init(g), g, refresh=False)
    method = lib.ShampooProduction(start=5, every=2, target=None, eps=0.1875)
    assert [method.due(step) for step in range(9)] == [t in (5, 6, 8) for t in range(1, 10)]


CHECKS: dict[str, Callable[[Any], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str) -> None:
    CHECKS[name](shampoo)


BUGS = {
    "statistics of F": ("self._statistic(gram, g, i, now)\n                a =",
        "self._statistic(gram, f, i, now)\n                a =", "model"),
    "eps before the correction": ("a = self._scaled(gram * k.correction, xp)\n                if",
        "a = self._scaled(gram * k.correction + self.eps * (k.correction - 1) * identity(xp, "
        "gram), xp)\n                if", "model"),
    "refresh at 1, 1 + f": ("return (t == self._first) | ((t > self._first) & (t % self.every == 0))",
        "return step % self.every == 0", "model"),
    "no graft before t0": ("p = _mixed(now.k.preconditioned, p, parts[2])",
        "p = _mixed(now.k.preconditioned, p, parts[1])", "model"),
    "graft of G": ("n, v = self._grafts(grad, f, state.v", "n, v = self._grafts(grad, grad, state.v", "model"),
    "Adam's graft uncorrected": ("* k.inverse_root_graft", "* 1.0", "model"),
    "Adam's graft tied to bias_correction": ('if self.graft == "adam":',
        'if self.graft == "adam" and self.bias_correction:', "model"),
    "RMSProp's graft corrected": ('if self.graft == "adam":', "if self.graft is not None:", "rmsprop_at_scale"),
    "1 - beta1^t": ("(1.0 - before) * (1.0 - self._ahead)", "(1.0 - before) * (1.0 - self.beta1)", "model"),
    "m before F": ("ema(state.m, grad, self._ahead)", "ema(ema(state.m, grad, self.beta1), grad, self._ahead)",
        "model"),
    "exponent of the unmerged order": ("Fraction(1, 2 * order) if p is None", "Fraction(1, 4) if p is None", "layout"),
    "exponent 1/k": ("Fraction(1, 2 * order) if p is None", "Fraction(1, order) if p is None", "model"),
    "exponent 0 applied": ("given = (*self.exponents[:order]", "given = (*(p or None for p in self.exponents[:order])",
        "model"),
    "merged from the left": ("for d in reversed(left):", "for d in left:", "layout"),
    "target ignored": ("if count > target and product", "if product", "layout"),
    "alpha after the momentum": ('        if self.reads_param and self.decay_form == "decoupled":\n',
        "        if False:\n", "model"),
    "l2 beside the statistics": ("            grad = grad + self.weight_decay * param  # (l2)\n", "            pass\n",
        "model"),
    "dampening ignored": ("and not is_zero(self.dampening)", "and False", "model"),
    "Nesterov ignored": ("p, self.momentum, self.nesterov)", "p, self.momentum)", "model"),
    "sum with weight 1 - beta2": (
        "return self.beta2 * old + new if self.drop_weight else accumulate(old, new, self.beta2)",
        "return ema(old, new, self.beta2)",
        "model",
    ),
    "drop_weight corrected": ("if self.bias_correction and not self.drop_weight and", "if self.bias_correction and",
        "model"),
    "trace scaling ignored": ("if is_zero(self.trace_scaling):\n            return a", "if True:\n            return a",
        "model"),
    "division by no trace": ("xp.where(trace == 0, 1.0, trace)", "trace", "model"),
    "roots kept from the start": ("        return self._first > 1\n", "        return True\n", "refresh"),
    "D in the old basis": ("rotated, average = orthogonal.onto(g, bases, xp)",
        'rotated, average = orthogonal.onto(g, kept["bases"], xp)', "eshampoo"),
    "D after its use": ("p = quotient(average, self._denominator(d, now.k)",
        'p = quotient(average, self._denominator(kept["d"], now.k)', "eshampoo"),
    "D uncorrected": ("(d * k.correction) ** self.exponent", "d ** self.exponent", "eshampoo"),
    "eps in the power": ("(d * k.correction) ** self.exponent + self.eps",
        "(d * k.correction + self.eps) ** self.exponent", "eshampoo"),
    "descending, D kept": ("ascending=True, xp=xp)), d", "ascending=False, xp=xp)), d", "eshampoo"),
    "D not permuted": ("return q, xp.where(kept, d, orthogonal.taken(d, order, axis, xp))", "return q, d", "slots"),
    "qr in the code's order": ("followed(a, start, self.iterations, product=product, xp",
        "followed(a, start[..., ::-1], self.iterations, xp", "bases"),
    "tolerance of the new basis": ("near = (orthogonal.outside(a, old, xp)",
        "near = (orthogonal.outside(a, orthogonal.eigenbasis(a, xp=xp), xp)", "bases"),
    "tolerance ignored": ("<= self.tolerance)[..., None, None]", "< 0.0)[..., None, None]", "bases"),
    "statistic frozen": ("grams.append(None if gram is None else self._statistic(gram, g, i, now))",
        "grams.append(None if gram is None else self._statistic(gram, g, i, now) if now.due else gram)", "eshampoo"),
    "one norm for all blocks": ("p, norm = grafted(p, parts[2], axes, xp)", "p, norm = grafted(p, shaped[2], axes, xp)",
        "layout"),
    "blocks in another order": ("p = _joined(made, [", "p = _joined(made[::-1], [", "layout"),
    "graft_eps squared": ("quotient(f, root + self.graft_eps, xp,", "quotient(f, root + self.graft_eps**2, xp,",
        "grafted_laws"),
    "trace's exponent halved": ("1.0, trace) ** self.trace_scaling", "1.0, trace) ** (self.trace_scaling / 2)",
        "grafted_laws"),
    "exponents in the other order": ("given = (*self.exponents[:order], *", "given = (*self.exponents[:order][::-1], *",
        "model"),
    "graft without a root": ("root = xp.sqrt(v) * k.", "root = v * k.", "grafted_laws"),
    "bad gradients forgotten": ("grad = self._marked(whole(grad, grad.ndim - stack, xp), state, xp)",
        "grad = whole(grad, grad.ndim - stack, xp)", "bad_gradients"),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs(name: str) -> None:
    old, new, check = BUGS[name]
    copy = mutated(shampoo, (old, new))
    with pytest.raises((AssertionError, ValueError)), np.errstate(all="ignore"):
        CHECKS[check](copy)


@pytest.mark.parametrize("check", [check_solvers, check_third_order, check_bases])
def test_iterations_and_bases(check: Callable[[Any], None]) -> None:
    check(shampoo)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("((1 + a) / (2 * a * a))", "(1.0 / (2 * a * a))"),
        ("return power(x, exponent.numerator)", "return x"),
        ("scale ** (1 / a)\n    t = ((a", "scale\n    t = ((a"),
        ("(scale / size) ** (1 / order)", "(scale / size)"),
    ],
)
def test_planted_bugs_of_the_iterations(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shampoo, "roots", mutated(roots, (old, new)))
    check = check_third_order if "2 * a * a" in old else check_solvers
    with pytest.raises(AssertionError), np.errstate(all="ignore"):
        check(shampoo)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rest = unit - unit * identity(xp, unit)", "rest = unit"),
        ("descending(-a if ascending else a, xp)", "descending(a, xp)"),
    ],
)
def test_planted_bugs_of_bases(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shampoo, "orthogonal", mutated(bases, (old, new)))
    with pytest.raises(AssertionError):
        check_bases(shampoo)


# ---- the rest -------------------------------------------------------------------------------------------------------


def test_soap_with_updates_first_is_eshampoo() -> None:
    """Up to the order of the slots, with V kept, and the same decay of all averages."""
    grads = gradients((4, 3), 8)
    ours = directions(pr.EShampoo(beta1=0.75, beta2=0.875, eps=0.1875, target=None), grads)
    soap = pr.SOAP(beta1=0.75, beta2=0.875, eps=0.1875, every=1, order="update_first", second_moment="keep",
                   eps_position="corrected", basis="eigh")  # fmt: skip
    assert distance(directions(soap, grads), ours) <= 1e-12


def test_fields_that_need_each_other() -> None:
    for fields, message in (
        ({"every": 3, "start": 2}, "start must be at least every, got start=2 and every=3"),
        ({"nesterov": True}, "nesterov=True needs momentum > 0"),
        ({"exponents": (-0.25,)}, r"exponents must be >= 0 and finite, got \(-0.25,\)"),
        ({"exponents": (0.375,), "root": "coupled_newton"}, "needs 1 over a whole number as exponents, got 0.375"),
        ({"eps": 0.0, "root": "higher_order"}, "root='higher_order' needs eps > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            pr.Shampoo.production(**fields)
    for bad in ([0.25], ("0.25",), 0.25):
        with pytest.raises(TypeError, match="exponents must be a tuple of numbers and None"):
            pr.Shampoo.production(exponents=bad)
    with pytest.raises(ValueError, match="ignored_axes must be >= 0"):
        pr.EShampoo(ignored_axes=(-1,))
    with pytest.raises(TypeError, match="ignored_axes must be a tuple of ints"):
        pr.EShampoo(ignored_axes=(True,))


def test_reports() -> None:
    grads = gradients((4, 3), 3)
    method = pr.Shampoo.production(**LOUD, graft="sgd")
    state = method.init(grads[0])
    for g in grads:
        _, state = method.update(g, state, g)
    report = method.diagnose(state)
    a = state.grams[0][1] / (1 - 0.875**3)
    assert np.allclose(report.eigenvalues[1], np.linalg.eigvalsh(a))
    filtered = run(pr.Shampoo.production(**{**LOUD, "exponents": (0.0, 0.0)}), grads)[-1]
    assert np.allclose(report.norms[0], np.linalg.norm(filtered))
    corrected = pr.EShampoo(**LOUD)
    state = corrected.init(grads[0])
    for g in grads:
        _, state = corrected.update(g, state, g)
    report = corrected.diagnose(state)
    assert np.allclose(report.denominators[0], np.sqrt(state.d[0] / (1 - 0.875**3)) + 0.1875)
    assert 0 < report.off_diagonal[0] < 1


@pytest.mark.parametrize("case", [c for c in CASES if c.kind == "trace"], ids=lambda c: f"{c.constructor}-{c.name}")
def test_cases_are_the_library_and_catch_what_they_say(case: Any) -> None:
    method = operator.attrgetter(case.constructor or case.method)(pr)(**case.config)
    given = {"lr": case.lr, "decay": case.decay, "stack_ndim": case.stack_ndim}
    right = variants.run(method, case.param, case.grads, **given)
    state, param = method.init(case.param, stack_ndim=case.stack_ndim), case.param
    for g, want in zip(case.grads, right.directions, strict=True):
        direction, state = method.update(g, state, param)
        param = (1 - case.lr * case.decay) * param - case.lr * direction
        assert np.linalg.norm(direction - want) <= 1e-11 * np.linalg.norm(want)
    for flag in case.catches:
        wrong = variants.run(method, case.param, case.grads, **given, flags=frozenset({flag}))
        assert distance(wrong.params, right.params) > 1e-4, flag
