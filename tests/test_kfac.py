"""KFAC, the yardstick: exact cases, laws, dense Fisher matrices, drawn labels; and a planted bug for each."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mutation import mutated

import precond_ref as pr
from precond_ref import problems
from precond_ref.experiments import kfac

N, J, O = 9, 4, 3  # noqa: E741


def case(seed: int, positions: int = 1) -> tuple[Any, Any, Any]:
    """Gradient (O, J), anisotropic inputs far from the centre (N, T, J), signals (N, T, O)."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((N, positions, J)) * [1.0, 2.0, 0.5, 3.0] + [0.0, 1.0, 2.0, -1.0]
    return rng.standard_normal((O, J)), inputs, rng.standard_normal((N, positions, O)) * [0.5, 1.0, 3.0]


def first(module: Any, G: Any, inputs: Any, signals: Any, **fields: Any) -> Any:
    """The direction of the first update."""
    method = module.KFAC(**fields)
    return method.update(G, method.init(G), G, statistic=method.Factors(inputs, signals))[0]


def check_exact(module: Any) -> None:
    """Least squares in one step; one sample in closed form."""
    rng = np.random.default_rng(1)
    _, x, _ = case(2)
    y, W = rng.standard_normal((N, O)), rng.standard_normal((O, J))
    G = (x[:, 0] @ W.T - y).T @ x[:, 0] / N
    every = np.repeat(x, O, axis=0), np.tile(np.sqrt(O) * np.eye(O), (N, 1))[:, None, :]
    wanted = np.linalg.lstsq(x[:, 0], y, rcond=None)[0].T
    for kind in ("factored", "exact", "equal"):
        np.testing.assert_allclose(W - first(module, G, *every, damping=0.0, kind=kind), wanted, rtol=1e-11, atol=1e-11)
    G, x, d = case(3)
    x, d, lam = x[:1], d[:1], 0.1
    G, a2, d2 = d[0].T @ x[0], np.sum(x[:1] ** 2), np.sum(d[:1] ** 2)
    pi = np.sqrt((a2 / J) / (d2 / O))
    forms = {
        "exact": a2 * d2 + lam,
        "factored": (a2 + pi * lam**0.5) * (d2 + lam**0.5 / pi),
        "equal": (a2 + lam**0.5) * (d2 + lam**0.5),
    }
    for kind, denominator in forms.items():
        got = first(module, G, x, d, damping=lam, kind=kind)
        np.testing.assert_allclose(got, G / denominator, rtol=1e-12, err_msg=kind)


def check_laws(module: Any) -> None:
    """Large damping; scales exchanged between the factors, and of gradient and signals; other coordinates."""
    G, x, d = case(4)
    for kind, error in {"exact": 1e-5, "factored": 1e-2}.items():
        got = 1e8 * first(module, G, x, d, damping=1e8, kind=kind)
        assert np.linalg.norm(got - G) < error * np.linalg.norm(G)
    rng = np.random.default_rng(5)
    Q, R = (np.linalg.qr(rng.standard_normal((k, k)))[0] for k in (J, O))
    for kind in ("factored", "exact"):
        plain = first(module, G, x, d, damping=0.1, kind=kind)
        assert np.allclose(first(module, G, 3 * x, d / 3, damping=0.1, kind=kind), plain, rtol=1e-11)
        assert np.allclose(first(module, 9 * G, x, 3 * d, damping=0.9, kind=kind), plain, rtol=1e-11)
        turned = first(module, R @ G @ Q.T, x @ Q.T, d @ R.T, damping=0.1, kind=kind)
        assert np.allclose(turned, R @ plain @ Q.T, rtol=1e-11)
    B = rng.standard_normal((J, J))
    plain, mapped = (first(module, g, z, d, damping=0.0) for g, z in ((G, x), (G @ B.T, x @ B.T)))
    assert np.allclose(mapped @ B, plain, rtol=1e-9)
    idle = first(module, G, x, 0 * d, damping=0.25, kind="factored")
    assert np.all(np.isfinite(idle))


def check_time(module: Any) -> None:
    """Averages, schedule and momentum against loops with dense matrices; constant factors change nothing."""
    for t1, t2 in ((1, 1), (2, 3), (2, 4), (3, 2)):
        method = module.KFAC(kind="exact", damping=0.5, decay=0.75, momentum=0.5, statistics_every=t1, inverse_every=t2)
        state, m, seen, P = method.init(case(0)[0]), np.zeros(O * J), [], None
        for i in range(13):
            G, x, d = case(10 + i)
            if i % t1 == 0:
                seen.append((x[:, 0].T @ x[:, 0] / N, d[:, 0].T @ d[:, 0] / N))
            if (i <= t2 and i % t1 == 0) or i % t2 == 0:
                weights = np.array([0.75 ** (len(seen) - 1 - j) for j in range(len(seen))])
                A, S = (sum(w * each[side] for w, each in zip(weights, seen, strict=True)) for side in (0, 1))
                P = np.linalg.inv(np.kron(S, A) / sum(weights) ** 2 + 0.5 * np.eye(O * J))
            m = 0.5 * m + G.ravel()
            direction, state = method.update(G, state, G, statistic=method.Factors(x, d) if i % t1 == 0 else None)
            np.testing.assert_allclose(direction.ravel(), P @ m, rtol=1e-9, err_msg=f"{t1}, {t2}, {i}")
    with pytest.raises(ValueError, match="statistic must be given in update 1: "):
        module.KFAC().update(G, module.KFAC().init(G), G)


def check_fisher(module: Any) -> None:
    """The dense Fisher matrix where the product is exact: independent positions, and softmax regression at 0."""
    rng, lam = np.random.default_rng(6), 0.2
    xs, ds = rng.standard_normal((3, J)) + 1.0, rng.standard_normal((2, O))
    ds = np.concatenate([ds, -ds])
    combinations = [*itertools.product(xs, xs, ds, ds)]
    inputs, signals = (np.array([each[k : k + 2] for each in combinations]) for k in (0, 2))
    g = np.einsum("nto,ntj->noj", signals, inputs).reshape(len(inputs), -1)
    G = rng.standard_normal((O, J))
    wanted = np.linalg.solve(g.T @ g / len(g) + lam * np.eye(O * J), G.ravel()).reshape(O, J)
    np.testing.assert_allclose(first(module, G, inputs, signals, damping=lam, kind="exact"), wanted, rtol=1e-10)
    x = case(7)[1]
    labels = np.tile(np.eye(O), (N, 1))
    inputs, signals = np.repeat(x, O, axis=0), (1 / O - labels)[:, None, :]
    g = np.einsum("no,nj->noj", signals[:, 0], inputs[:, 0]).reshape(N * O, -1)
    wanted = np.linalg.solve(g.T @ g / len(g) + lam * np.eye(O * J), G.ravel()).reshape(O, J)
    np.testing.assert_allclose(first(module, G, inputs, signals, damping=lam, kind="exact"), wanted, rtol=1e-9)


def check_factors(module: Any) -> None:
    """Drawn labels have the model's probabilities; mean of d a^T is the gradient of the loss on them, of all layers."""
    rng = np.random.default_rng(8)
    for name, options in {
        "digits-mlp": {"hidden": (5, 4)}, "digits-cnn": {"channels": (2, 3)}, "digits-autoencoder": {"hidden": (6, 3)},
    }.items():  # fmt: skip
        problem: Any = problems.load(name, dtype="float64", **options)
        params = {k: v + 0.3 * rng.standard_normal(v.shape) for k, v in problem.init().items()}
        inputs = np.tile(problem.train[0][:2], (400, 1))
        found = module.factors(problem, params, inputs, np.random.default_rng(9))
        logits = problem.activations(params, inputs)[-1]
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        p = 1 / (1 + np.exp(-logits)) if "autoencoder" in name else odds / odds.sum(axis=1, keepdims=True)
        last = [key for key in found if key.startswith("fc")][-1]
        drawn = p - found[last].signals[:, 0]
        np.testing.assert_allclose(drawn, np.round(drawn), atol=1e-12)
        for rows in (slice(0, None, 2), slice(1, None, 2)):
            q = p[rows][0]
            assert np.all(np.abs(drawn[rows].mean(axis=0) - q) <= 5 * np.sqrt(q * (1 - q) / 400) + 1e-12), name
        if "autoencoder" in name:
            values = problem.activations(params, inputs)
            grads = problem.backward(params, values, problem._head(logits, (drawn,))[1])
        else:
            _, grads = problem.loss_and_grad(params, (inputs, np.argmax(drawn, axis=1)))
        for key, (a, d) in found.items():
            G = np.einsum("nto,ntj->oj", d, a) / len(inputs)
            wanted = grads[key].reshape(len(G), -1)
            if key.startswith("fc"):
                wanted = np.concatenate([wanted, grads[key.replace("weight", "bias")][:, None]], axis=1)
            np.testing.assert_allclose(G, wanted, rtol=1e-9, atol=1e-12, err_msg=f"{name}, {key}")
        joined = {key.replace("weight", "bias") for key in found if key.startswith("fc")}
        assert found.keys() | joined == params.keys()


CHECKS: dict[str, Callable[[Any], None]] = {
    "exact": check_exact, "laws": check_laws, "time": check_time, "fisher": check_fisher, "factors": check_factors,
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_kfac(name: str) -> None:
    CHECKS[name](kfac)


BUGS = {
    "pi on the wrong sides": ("laws", "(s + root / pi) * (a + pi * root)", "(s + root * pi) * (a + root / pi)"),
    "pi = 1": ("laws", 'self.kind == "factored":', "False:"),
    "lambda without its root": ("exact", "self.damping**0.5", "self.damping"),
    "pi of traces": (
        "exact", "xp.mean(a, axis=-1, keepdims=True), xp.mean(s, axis=-2, keepdims=True)",
        "xp.sum(a, axis=-1, keepdims=True), xp.sum(s, axis=-2, keepdims=True)",
    ),
    "pi squared": ("exact", "pi = xp.sqrt(", "pi = ("),
    "exact for factored": ("exact", 'self.kind == "exact"', 'self.kind != "equal"'),
    "damping twice": ("exact", "s * a + self.damping", "s * a + 2 * self.damping"),
    "A summed": ("exact", "/ (n * positions) - inner", "- inner"),
    "A centred": ("exact", "inner = inner + now.k", "x = x - xp.mean(x, axis=0); inner = inner + now.k"),
    "inverse square roots": (
        "exact", "turned / self.denominator(a, s, xp)",
        "turned / self.denominator(a, s, xp)**0.5",
    ),
    "average not corrected": (
        "time", " / one_minus_power(self.decay, (step - 1) // self.statistics_every + 1, like=like)",
        "",
    ),
    "correction by updates": ("time", "(step - 1) // self.statistics_every + 1", "step"),
    "damping inside the average": ("time", "/ n - outer)", "/ n + 0.5 * xp.eye(outer.shape[-1]) - outer)"),
    "stale signals": (
        "time", "(s, v) = xp.linalg.eigh(inner), xp.linalg.eigh(outer)",
        "(s, v) = xp.linalg.eigh(inner), (xp.linalg.eigh(outer) if i == 0 else (s, v))",
    ),
    "no renewals at the start": ("time", "(i <= t2 and i % t1 == 0) or i % t2 == 0", "i % t2 == 0"),
    "renewed at every step": ("time", "(i <= t2 and i % t1 == 0) or i % t2 == 0", "True"),
    "momentum after the inverse": ("time", "m = self.momentum * state.m + grad", "m = grad"),
    "factors exchanged": ("laws", "turned = xp.matrix_transpose(v)", "turned = v"),
    "without T": ("fisher", "@ d / n - outer", "@ d / (n * positions) - outer"),
    "T twice": ("fisher", "@ x / (n * positions)", "@ x / n"),
    "signals of the mean loss": ("factors", "n * problem._head", "problem._head"),
    "constant 0 for the bias": ("factors", "np.ones_like(a[:, :1])", "np.zeros_like(a[:, :1])"),
    "bias of a convolution left out": ("factors", 'found[name.replace("weight", "bias")]', "_"),
    "most probable labels": ("factors", "logits + rng.gumbel(size=logits.shape)", "logits"),
    "pixels of the model, not drawn": (
        "factors", "(rng.random(logits.shape) < sigmoid(np, logits))",
        "sigmoid(np, logits)",
    ),
    "a zero factor": ("laws", "some = (mean_a > 0) & (mean_s > 0)", "some = mean_a > -1"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug: str) -> None:
    name, old, new = BUGS[bug]
    with np.errstate(all="ignore"), pytest.raises(AssertionError):
        CHECKS[name](mutated(kfac, (old, new)))


def test_kfac_is_no_method_of_the_registry_and_an_optimizer_takes_it() -> None:
    assert "KFAC" not in pr.list_methods()
    assert kfac.KFAC.name == "precond_ref.experiments.kfac:KFAC"
    problem: Any = problems.load("digits-cnn", dtype="float64", channels=(2, 3))
    problem = dataclasses.replace(problem, batch_size=20)
    optimizer = pr.Optimizer(kfac.KFAC(statistics_every=2), lr=0.1, join=(("fc1/weight", "fc1/bias"),))
    params = problem.init()
    state, rng = optimizer.init(params), np.random.default_rng(0)
    start = float(problem.loss(params))
    for step in range(20):
        batch = problem.batch(step)
        given = kfac.factors(problem, params, batch[0], rng) if step % 2 == 0 else None
        params, state = optimizer.step(params, problem.loss_and_grad(params, batch)[1], state, statistics=given)
    assert float(problem.loss(params)) < start
    G, x, d = case(0)
    with pytest.raises(TypeError, match=r"statistic must be a KFAC.Factors, got tuple"):
        kfac.KFAC().update(G, kfac.KFAC().init(G), G, statistic=(x, d))
    with pytest.raises(ValueError, match=r"inputs and signals must be "):
        kfac.KFAC().update(G, kfac.KFAC().init(G), G, statistic=kfac.KFAC.Factors(x[:, :, 1:], d))
