"""MBF: the vectors, exactness relations, convergence theorems, limits, refusals, planted bugs.

Relations and theorems carry the labels (E1 to E11, T0 to T2) of the method's page. ``pytest -s`` prints worst errors
over tolerances and the sides of each inequality.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from configs import LOUD as LOUD_CONFIGS
from conftest import make_backend
from mutation import Bug, check_vectors, mutated

import precond_ref as pr
from precond_ref import problems, theory
from precond_ref.methods import mbf
from precond_ref.problems import online

U = 2.0**-53
"""Unit roundoff of float64."""
LAYOUTS = ("per_output", "per_input", "contiguous")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def relative(a: Any, b: Any) -> float:
    """Normwise relative difference."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def orthogonal(n: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(rng(seed).standard_normal((n, n)))[0]


def run(method: Any, grads: Any, statistics: Any = None, state: Any = None) -> tuple[np.ndarray, Any]:
    """Directions of all updates and the last state."""
    param = np.zeros(grads.shape[1:])
    state = method.init(param) if state is None else state
    directions = []
    for i, grad in enumerate(grads):
        more = {} if statistics is None else {"statistic": statistics[i]}
        direction, state = method.update(grad, state, param, **more)
        directions.append(direction)
    return np.stack(directions), state


def one_step(method: Any, grad: np.ndarray, statistic: Any = None) -> tuple[np.ndarray, Any]:
    """Direction and state of the first update."""
    directions, state = run(method, grad[None], None if statistic is None else [statistic])
    return directions[0], state


LOUD = {"damping": 0.25, "decay": 0.75, "momentum": 0.5}


# ---- schedule and warm start ----------------------------------------------------------------------------------------


def check_schedule(module: Any) -> None:
    """E11: constant g, F_0 = 0, blocks of their own: M is a geometric sum, F = h g g^T with the stale weight h."""
    g = rng(3).standard_normal((2, 3))
    mu, rho, damping, t1, t2 = 0.5, 0.75, 0.25, 2, 5
    method = module.MBF(average=False, damping=damping, decay=rho, momentum=mu, statistics_every=t1, inverse_every=t2)
    got, _ = run(method, np.stack([g] * 17))
    updates, h = 0, 0.0
    renewals = {0, 2, 4, 5, 10, 15}  # every T1 up to T2, then multiples of T2
    for i in range(17):
        updates += i in range(0, 17, 2)
        if i in renewals:
            h = 1 - rho**updates
        scale = (1 - mu ** (i + 1)) / (1 - mu) / (damping + h * np.sum(g * g, axis=1, keepdims=True))
        assert relative(got[i], scale * g) <= 1e-12


def check_warm_start(module: Any) -> None:
    """F is the plain mean over the batches, for stacks too, then decays like any other; F alone is set."""
    conv, blocks = {**LOUD, "kind": "conv"}, {**LOUD, "average": False}
    for fields, shape in ((LOUD, (2, 3)), (conv, (2, 1, 2, 2)), (blocks, (2, 3))):
        method = module.MBF(**fields)
        grads = rng(4).standard_normal((5, 3, *shape))  # 5 batches of a stack of 3
        state = method.warm_start(method.init(grads[0], stack_ndim=1), grads)
        assert state.step == 0
        assert not np.any(state.m)
        for k in range(3):
            views = grads[:, k].reshape(5, -1, 4) if len(shape) == 4 else grads[:, k]  # per_output: the rows
            outer = np.einsum("nbi,nbj->bij", views, views) / 5
            expected = outer.reshape(2, 1, 4, 4) if len(shape) == 4 else outer if "average" in fields else outer.mean(0)
            assert relative(state.statistic[k], expected) <= 16 * U
        after = method.update(grads[0], state, grads[0])[1].statistic
        cold = method.update(grads[0], method.init(grads[0], stack_ndim=1), grads[0])[1].statistic
        assert relative(after - cold, LOUD["decay"] * state.statistic) <= 16 * U * 8
    diagonal = module.MBF(kind="diagonal")
    state = diagonal.init(np.zeros(3))
    assert diagonal.warm_start(state, np.ones((4, 3))) is state


def check_refresh(module: Any) -> None:
    """``refresh`` overrules the schedule, statistics and inverse apart; before the first renewal P = I / lambda."""
    grads = rng(5).standard_normal((2, 2, 3))
    method = module.MBF(**LOUD, statistics_every=2, inverse_every=4)
    state = method.init(grads[0])
    direction, same = method.update(grads[0], state, grads[0], refresh=(False, False))
    assert np.array_equal(same.statistic, state.statistic)
    assert relative(direction, grads[0] / LOUD["damping"]) <= 4 * U
    _, first = method.update(grads[0], state, grads[0])
    _, both = method.update(grads[1], first, grads[0], refresh=(True, True))
    _, statistic = method.update(grads[1], first, grads[0], refresh=(True, False))
    _, inverse = method.update(grads[1], first, grads[0], refresh=(False, True))
    _, neither = method.update(grads[1], first, grads[0])
    assert np.array_equal(both.statistic, statistic.statistic)
    assert not np.array_equal(both.statistic, first.statistic)
    assert np.array_equal(inverse.statistic, first.statistic)
    assert np.array_equal(statistic.inverse.basis, first.inverse.basis)
    assert np.array_equal(neither.statistic, first.statistic)
    assert np.array_equal(neither.inverse.basis, first.inverse.basis)
    assert not np.array_equal(both.inverse.basis, first.inverse.basis)
    as_one = method.update(grads[1], first, grads[0], refresh=True)[1]
    assert np.array_equal(as_one.inverse.basis, both.inverse.basis)


# ---- E1 to E10 ------------------------------------------------------------------------------------------------------


def exactly(module: Any, **fields: Any) -> Any:
    """One update of the statistic is the statistic."""
    return module.MBF(**{"damping": 0.0, "decay": 0.0, "momentum": 0.0, **fields})


def check_e1(module: Any) -> None:
    """E1: under unit-variance Gaussian noise the rows' blocks are all of the Fisher, and one step is least squares."""
    n, o, j = 12, 3, 4
    x = np.concatenate([rng(6).standard_normal((n, j - 1)), np.ones((n, 1))], axis=1)
    y, w = rng(7).standard_normal((n, o)), rng(8).standard_normal((o, j))
    grad = (x @ w.T - y).T @ x / n
    # back-signals sqrt(O) e_k have the second moment of z - y ~ N(0, I)
    inputs, signals = np.repeat(x, o, axis=0), np.tile(math.sqrt(o) * np.eye(o), (n, 1))
    fisher = np.zeros((o * j, o * j))
    for a, d in zip(inputs, signals, strict=True):
        fisher += np.outer(np.kron(d, a), np.kron(d, a)) / (n * o)
    minimiser = np.linalg.lstsq(x, y, rcond=None)[0].T
    for average in (True, False):
        direction, state = one_step(exactly(module, average=average), grad, module.MBFFactors(inputs, signals))
        blocks = np.kron(np.eye(o), state.statistic) if average else np.zeros_like(fisher)
        for k in range(0 if average else o):
            blocks[k * j : (k + 1) * j, k * j : (k + 1) * j] = state.statistic[k]
        assert relative(blocks, fisher) <= 1e-12
        assert relative(w - direction, minimiser) <= 1e-10
    _, state = one_step(exactly(module, layout="per_input", average=False), grad, module.MBFFactors(inputs, signals))
    assert relative(state.statistic, np.mean(x**2, axis=0)[:, None, None] * np.eye(o)) <= 1e-12


def check_e2(module: Any) -> None:
    """E2: the rows' blocks of softmax regression's Fisher, its labels enumerated, are mean p_j (1 - p_j) x x^T."""
    n, o, j = 6, 3, 4
    x, w = rng(9).standard_normal((n, j)), rng(10).standard_normal((o, j))
    p = np.exp(x @ w.T) / np.sum(np.exp(x @ w.T), axis=1, keepdims=True)
    weights = np.sqrt(o * p)[..., None]  # of label c of sample n: the mean over labels becomes the expectation
    signals = (weights * (p[:, None, :] - np.eye(o))).reshape(n * o, o)
    samples = signals[:, :, None] * np.repeat(x, o, axis=0)[:, None, :]
    flat = samples.reshape(n * o, -1)
    fisher = flat.T @ flat / (n * o)
    for statistic in (module.MBFSamples(samples), module.MBFFactors(np.repeat(x, o, axis=0), signals)):
        _, state = one_step(exactly(module, average=False), samples[0], statistic)
        for k in range(o):
            block = (x * (p[:, k] * (1 - p[:, k]))[:, None]).T @ x / n
            assert relative(state.statistic[k], block) <= 1e-12
            assert relative(fisher[k * j : (k + 1) * j, k * j : (k + 1) * j], block) <= 1e-12


def check_e3_e4(module: Any) -> None:
    """E3, E4: what the batch gradient's outer product estimates, over all labels and over all batches."""
    j, m, total = 3, 3, 5
    x, w = rng(11).standard_normal((total, j)), rng(12).standard_normal(j)
    p = 1 / (1 + np.exp(-x @ w))
    method = exactly(module, average=False)

    def mean_outer(gradients: list[np.ndarray]) -> np.ndarray:
        return method.warm_start(method.init(np.zeros((1, j))), np.stack(gradients)[:, None, :]).statistic[0]

    gradients = []
    for labels in itertools.product((0.0, 1.0), repeat=m):
        chance = np.prod(np.where(labels, p[:m], 1 - p[:m]))
        gradients.append(math.sqrt(2**m * chance) * (p[:m] - labels) @ x[:m] / m)
    fisher = (x[:m] * (p[:m] * (1 - p[:m]))[:, None]).T @ x[:m] / m
    assert relative(m * mean_outer(gradients), fisher) <= 1e-12  # E3

    per_sample = (p - rng(13).integers(0, 2, total))[:, None] * x
    empirical, grad = per_sample.T @ per_sample / total, per_sample.mean(axis=0)
    independent = [per_sample[list(c)].mean(axis=0) for c in itertools.product(range(total), repeat=m)]
    expected = empirical / m + (1 - 1 / m) * np.outer(grad, grad)
    assert relative(mean_outer(independent), expected) <= 1e-12  # E4, with replacement
    distinct = [per_sample[list(c)].mean(axis=0) for c in itertools.combinations(range(total), m)]
    scale = m * (total - 1)
    expected = empirical * (total - m) / scale + np.outer(grad, grad) * total * (m - 1) / scale
    assert relative(mean_outer(distinct), expected) <= 1e-12  # E4, without


def check_e5(module: Any) -> None:
    """E5: one block is the natural gradient, one entry its scalar form, and what lambda and scaling do."""
    grads = rng(14).standard_normal((4, 1, 5))
    method = module.MBF(**LOUD, average=False)
    f, m = np.zeros((5, 5)), np.zeros(5)
    for grad, direction in zip(grads[:, 0], run(method, grads)[0][:, 0], strict=True):
        f, m = 0.75 * f + 0.25 * np.outer(grad, grad), 0.5 * m + grad
        assert relative(direction, np.linalg.solve(f + 0.25 * np.eye(5), m)) <= 1e-12  # a
    samples = rng(15).standard_normal((6, 2, 3, 1, 1))
    grad = samples.mean(axis=0)
    direction, _ = one_step(exactly(module, kind="conv", damping=0.25), grad, module.MBFSamples(samples))
    assert relative(direction, grad / ((samples**2).mean(axis=0) + 0.25)) <= 1e-12  # b

    grads = rng(16).standard_normal((5, 3, 4))
    for layout, average in itertools.product(LAYOUTS, (True, False)):
        fields = {**LOUD, "layout": layout, "average": average}
        large = 2.0**20
        got, _ = run(module.MBF(**{**fields, "damping": large}), grads)
        heavy_ball, _ = run(pr.SGD(momentum=0.5), grads)
        bound = np.max(np.sum(grads**2, axis=(1, 2))) / large  # |F| / lambda
        error = relative(large * got, heavy_ball)
        assert 1e-9 < error <= bound  # c, and lambda does not hide F altogether
        got, _ = run(module.MBF(**fields), grads)
        statistics = [module.MBFBlocks(4 * s) for s in outer_products(module, fields, grads)]
        scaled, _ = run(module.MBF(**{**fields, "damping": 4 * 0.25}), grads, statistics)
        assert relative(4 * scaled, got) <= 1e-11  # d
        once = {**fields, "average": False, "momentum": 0.0}
        view = module.MBF(**once).to_blocks(grads[0], xp=np)
        for rho in (0.0, 0.75):  # e
            direction, _ = one_step(module.MBF(**{**once, "decay": rho}), grads[0])
            expected = view / (0.25 + (1 - rho) * np.sum(view**2, axis=1, keepdims=True))
            expected = module.MBF(**once).from_blocks(expected, (3, 4), xp=np)
            assert relative(direction, expected) <= 1e-11


def outer_products(module: Any, fields: dict[str, Any], grads: np.ndarray) -> list[np.ndarray]:
    """What each gradient alone contributes to F."""
    method = exactly(module, **{k: v for k, v in fields.items() if k in ("layout", "average", "kind")})
    return [one_step(method, grad)[1].statistic for grad in grads]


def check_e6(module: Any) -> None:
    """E6: a transformed problem has the transformed directions, where the blocks allow it, and not elsewhere."""
    grads = rng(17).standard_normal((6, 3, 4))
    swap, turn = np.eye(3)[[2, 0, 1]], orthogonal(4)
    left, right = orthogonal(3, 1), np.eye(4)[[1, 3, 0, 2]]

    def gap(left: np.ndarray, right: np.ndarray, **fields: Any) -> float:
        method = module.MBF(**LOUD, **fields)
        return relative(run(method, left @ grads @ right)[0], left @ run(method, grads)[0] @ right)

    assert gap(swap, turn, average=False) <= 1e-10
    assert gap(left, right, layout="per_input", average=False) <= 1e-10
    assert gap(left, turn) <= 1e-10
    assert gap(left, turn, layout="per_input") <= 1e-10
    assert gap(left, np.eye(4), average=False) > 1e-2
    assert gap(np.eye(3), turn, layout="per_input", average=False) > 1e-2
    for average in (True, False):
        assert gap(swap, np.eye(4), layout="contiguous", average=average) > 1e-2
        assert gap(np.eye(3), right, layout="contiguous", average=average) > 1e-2

    affine = rng(18).standard_normal((4, 4)) + 3 * np.eye(4)
    samples = rng(19).standard_normal((9, 3, 4))
    for average in (True, False):
        method = exactly(module, average=average)
        expected = one_step(method, samples.mean(axis=0), module.MBFSamples(samples))[0] @ np.linalg.inv(affine).T
        got, _ = one_step(method, samples.mean(axis=0) @ affine, module.MBFSamples(samples @ affine))
        assert relative(got, expected) <= 1e-10

    grads = rng(20).standard_normal((5, 2, 3, 2, 2))
    maps = np.stack([orthogonal(4, seed) for seed in range(6)]).reshape(2, 3, 4, 4)

    def turned(kernels: np.ndarray) -> np.ndarray:
        return (maps @ kernels.reshape(*kernels.shape[:-2], 4, 1)).reshape(kernels.shape)

    method = module.MBF(**LOUD, kind="conv")
    directions, _ = run(method, grads)
    assert relative(run(method, turned(grads))[0], turned(directions)) <= 1e-10
    flipped = np.flip(grads, axis=(3, 4))
    assert relative(run(method, flipped)[0], np.flip(directions, axis=(3, 4))) <= 1e-10
    channels = grads[:, ::-1][:, :, [2, 0, 1]]
    assert relative(run(method, channels)[0], directions[:, ::-1][:, :, [2, 0, 1]]) <= 1e-10
    apart = [run(method, grads[:, o : o + 1, i : i + 1])[0] for o in range(2) for i in range(3)]
    assert relative(np.concatenate(apart, axis=2).reshape(5, 2, 3, 2, 2), directions) <= 1e-12


def check_e7(module: Any) -> None:
    """E7: averaged layouts are one-sided Shampoo's statistics over O and J; square ``contiguous`` is ``per_output``."""
    grads = rng(21).standard_normal((4, 3, 5))
    shampoo = pr.Shampoo(beta2=0.75)
    _, grams = run(shampoo, grads)
    left, right = grams.grams
    assert relative(run(module.MBF(**LOUD), grads)[1].statistic, right / 3) <= 1e-12
    assert relative(run(module.MBF(**LOUD, layout="per_input"), grads)[1].statistic, left / 5) <= 1e-12
    square = rng(22).standard_normal((4, 3, 3))
    for average in (True, False):
        expected, _ = run(module.MBF(**LOUD, average=average), square)
        got, _ = run(module.MBF(**LOUD, layout="contiguous", average=average), square)
        assert relative(got, expected) <= 1e-12


def check_e8(module: Any) -> None:
    """E8: F[o, i] of a convolution is a diagonal block of the full Fisher, made with PyTorch's autograd."""
    torch = pytest.importorskip("torch")
    problem = problems.load("digits-cnn", dtype="float64", channels=(2, 3), activation="tanh", batch_size=6)
    params = {name: value + 0.125 * rng(23).standard_normal(value.shape) for name, value in problem.init().items()}
    batch = problem.batch(0)
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in params}
    for image, label in zip(*map(torch.tensor, batch), strict=True):
        a = image.reshape(1, 1, 8, 8)
        for layer in ("conv1", "conv2"):
            a = torch.tanh(torch.nn.functional.conv2d(a, leaves[f"{layer}/weight"], leaves[f"{layer}/bias"], 2, 1))
        logits = a.flatten(1) @ leaves["fc1/weight"].T + leaves["fc1/bias"]
        loss = torch.nn.functional.cross_entropy(logits, label.long()[None])
        for name, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            rows[name].append(grad.numpy())
    given = problem.statistics(params, batch)
    for name in ("conv1/weight", "conv2/weight"):
        samples = np.stack(rows[name])
        flat = samples.reshape(6, -1)
        fisher = flat.T @ flat / 6
        grad = samples.mean(axis=0)
        _, state = one_step(exactly(module, kind="conv"), grad, module.MBFSamples(given[name].grads))
        o, i, *_ = grad.shape
        for a, b in np.ndindex(o, i):
            block = slice((a * i + b) * 9, (a * i + b + 1) * 9)
            assert relative(state.statistic[a, b], fisher[block, block]) <= 1e-12
    samples = np.concatenate([np.stack(rows["fc1/weight"]), np.stack(rows["fc1/bias"])[..., None]], axis=2)
    for layout, average in itertools.product(LAYOUTS, (True, False)):
        method = exactly(module, layout=layout, average=average)
        _, expected = one_step(method, samples[0], module.MBFSamples(samples))
        _, got = one_step(method, samples[0], module.MBFFactors(*given["fc1/weight"]))
        assert relative(got.statistic, expected.statistic) <= 1e-12


def check_e9(module: Any) -> None:
    """E9: statistics from inputs and back-signals, by their closed forms and from per-sample gradients, stacks too."""
    x, d = rng(24).standard_normal((2, 7, 4)), rng(25).standard_normal((2, 7, 3))
    closed = {
        ("per_output", False): lambda x, d: np.einsum("no,ni,nj->oij", d**2, x, x) / 7,
        ("per_output", True): lambda x, d: x.T @ np.diag(np.sum(d**2, axis=1)) @ x / (7 * 3),
        ("per_input", False): lambda x, d: np.einsum("ni,no,np->iop", x**2, d, d) / 7,
        ("per_input", True): lambda x, d: d.T @ np.diag(np.sum(x**2, axis=1)) @ d / (7 * 4),
    }
    grad = np.zeros((2, 3, 4))
    for layout, average in itertools.product(LAYOUTS, (True, False)):
        method = exactly(module, layout=layout, average=average)
        state = method.init(grad, stack_ndim=1)
        samples = module.MBFSamples(d[..., :, None] * x[..., None, :])
        _, factors = method.update(grad, state, grad, statistic=module.MBFFactors(x, d))
        _, direct = method.update(grad, state, grad, statistic=samples)
        assert relative(factors.statistic, direct.statistic) <= 1e-12
        for k in range(2):
            if (layout, average) in closed:
                assert relative(direct.statistic[k], closed[layout, average](x[k], d[k])) <= 1e-12


def check_e10(module: Any) -> None:
    """E10: with one output, averaged columns or runs only rescale; rows are the whole matrix."""
    grads = rng(26).standard_normal((1, 1, 6))
    for layout in ("per_input", "contiguous"):
        direction, _ = one_step(module.MBF(**{**LOUD, "decay": 0.0, "layout": layout}), grads[0])
        assert relative(direction, grads[0] / (np.mean(grads[0] ** 2) + 0.25)) <= 1e-12
    for average in (True, False):
        samples = rng(27).standard_normal((9, 1, 6))
        direction, _ = one_step(exactly(module, damping=0.25, average=average), grads[0], module.MBFSamples(samples))
        matrix = samples[:, 0].T @ samples[:, 0] / 9 + 0.25 * np.eye(6)
        assert relative(direction[0], np.linalg.solve(matrix, grads[0, 0])) <= 1e-12


# ---- T0, T1, T2 -----------------------------------------------------------------------------------------------------


def check_t0(module: Any) -> None:
    """T0: on a linear model the residual is multiplied by I - eta M, and so contracts as its spectrum says."""
    net = online.linear_blocks(4, 5, 3, seed=30)
    run = theory.mbf.record_network(net, 0.5, 1 / 4, 20, lib=module)
    checks = [statement(run, net) for statement in (theory.mbf.residual, theory.mbf.contraction, theory.mbf.floor)]
    print("T0: " + ", ".join(f"{check.statement} {check.ratio:.4f}" for check in checks))
    assert all(check.applies and check.holds for check in checks)
    assert checks[1].ratio > 0.9  # the slowest mode is left: the bound is reached


def two_layer(module: Any, m: int, n: int, d: int, steps: int) -> None:
    """T1 with lambda = 1 / (4 m) and eta = 1 / m."""
    net = online.two_layer(m, n, d, seed=m)
    run = theory.mbf.record_network(net, 0.25 / m, 1 / m, steps, lib=module)
    checks = [statement(run, net) for statement in (theory.mbf.two_layer, theory.mbf.radius)]
    drift, allowed = checks[0].symbols["drift"], checks[0].symbols["allowed"]
    print(f"T1 {m, n, d}: hypothesis {drift / allowed:.3f}, bound {checks[0].right:.4f}, worst {checks[0].left:.4f}")
    assert all(check.applies and check.holds for check in checks)
    assert checks[0].symbols["lmin(M)"] >= 2  # then the bound implies the form |r_k|^2 <= (1 - eta)^k |r_0|^2


def check_t1(module: Any) -> None:
    """T1: a wide network contracts at half the initial rate at least."""
    two_layer(module, 400, 4, 8, 30)


@pytest.mark.deep
@pytest.mark.parametrize(("m", "n", "d"), [(1600, 4, 8), (6400, 6, 10)])
def test_t1_wider(m: int, n: int, d: int) -> None:
    two_layer(mbf, m, n, d, 60)


def check_t2(module: Any, steps: int = 300) -> None:
    """T2 on regularised logistic regression: the three inequalities at every step, with stale inverses."""
    ridge, damping = 0.05, 0.125
    objective, per_sample = online.regularised_logistic(30, 5, seed=40, ridge=ridge)
    method = module.MBF(damping=damping, decay=0.75, momentum=0.0, statistics_every=2, inverse_every=4)
    stream = online.Stream(
        name="logistic", rounds=steps, start=3 * rng(42).standard_normal((1, 5)),
        gradient=lambda t, w, s: objective.gradient(w[0])[None],
    )  # fmt: skip

    def update(t: int, g: np.ndarray, state: Any, w: np.ndarray) -> Any:
        return method.update(g, state, w, statistic=module.MBFSamples(per_sample(w[0])[:, None]))

    run = theory.record(method, stream, damping / objective.curvature, update=update)
    t = theory.mbf
    checks = [s(run, objective, per_sample, ridge) for s in (t.descent, t.descent_by_gradient, t.linear_rate)]
    print("T2: " + ", ".join(f"{check.statement} {check.ratio:.4f}" for check in checks))
    assert all(check.applies and check.holds for check in checks)


@pytest.mark.deep
def test_t2_longer() -> None:
    check_t2(mbf, 3000)


CHECKS = {"vectors": check_vectors} | {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_schedule,
        check_warm_start,
        check_refresh,
        check_e1,
        check_e2,
        check_e3_e4,
        check_e5,
        check_e6,
        check_e7,
        check_e8,
        check_e9,
        check_e10,
        check_t0,
        check_t1,
        check_t2,
    )
}


@pytest.mark.parametrize("name", CHECKS)
def test_relation(name: str) -> None:
    CHECKS[name](mbf)


# ---- invariants, limits, knobs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in LOUD_CONFIGS["MBF"] if n not in ("schedule", "conv schedule", "diagonal")])
def test_inverse_is_between_zero_and_one_over_lambda(name: str) -> None:
    method, shape = LOUD_CONFIGS["MBF"][name]
    grads = 100 * rng(50).standard_normal((6, *shape))
    method = method.replace(momentum=0.0, inverse_every=2)
    directions, state = run(method, grads)
    w = state.inverse.eigenvalues
    assert np.min(w) > 0
    assert np.max(w) <= (1 + 8 * U) / method.damping
    assert all(np.sum(g * p) > 0 for g, p in zip(grads, directions, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_numerically_singular_matrix_does_not_stop_it(dtype: str) -> None:
    grad = np.full((2, 2), 1e8, dtype=dtype)  # rank one, and F + lambda I rounds to F
    with np.errstate(all="raise"):
        method = pr.MBF(damping=1e-8)
        direction, state = method.update(grad, method.init(grad), grad)
        report = method.diagnose(state)
    assert direction.dtype == dtype
    assert np.all(np.isfinite(direction))
    assert report.condition > 1e15


def test_the_report_says_which_block_had_a_bad_entry() -> None:
    method = pr.MBF(**LOUD, kind="conv")
    grad = rng(51).standard_normal((2, 3, 2, 2))
    grad[1, 2, 0, 1] = np.inf
    with np.errstate(invalid="ignore"):
        direction, state = one_step(method, grad)
        report = method.diagnose(state)
    assert np.all(np.isnan(direction))
    assert np.argwhere(np.isnan(report.condition)).tolist() == [[1, 2]]
    assert not report.finite


def test_report() -> None:
    grads = rng(52).standard_normal((3, 2, 3))
    method = pr.MBF(**LOUD, average=False)
    _, state = run(method, grads)
    report = method.diagnose(state)
    assert relative(report.eigenvalues, np.clip(np.linalg.eigvalsh(state.statistic), 0, None)) <= 1e-14
    assert relative(report.condition, np.linalg.cond(state.statistic + 0.25 * np.eye(3))) <= 1e-12
    diagonal = pr.MBF(kind="diagonal")
    directions, state = run(diagonal, grads)
    report = diagonal.diagnose(state)
    assert relative(state.m / report.denominator, directions[-1]) <= 1e-15
    assert report.eigenvalues is report.condition is None


def test_preset() -> None:
    assert pr.MBF.authors_code() == pr.MBF(layout="contiguous", damping=3e-4, statistics_every=2, inverse_every=25)
    assert pr.MBF.authors_code("cnn") == pr.MBF(
        layout="contiguous", damping=3e-3, statistics_every=10, inverse_every=100
    )
    literal = {i for i in range(120) if (i <= 25 and i % 2 == 0) or i % 25 == 0}
    method = pr.MBF.authors_code()
    assert {i for i in range(120) if method.due(i)[1]} == literal
    assert {i for i in range(120) if method.due(i)[0]} == set(range(0, 120, 2))


def test_conv_and_diagonal_have_no_use_for_the_layout() -> None:
    for kind, shape in (("conv", (2, 3, 2, 2)), ("diagonal", (5,))):
        grads = rng(54).standard_normal((3, *shape))
        method = pr.MBF(**LOUD, kind=kind)
        for fields in ({"layout": "contiguous"}, {"layout": "per_input"}, {"average": False}):
            assert np.array_equal(run(method.replace(**fields), grads)[0], run(method, grads)[0])


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 0, 3, 3), (2, 2, 0, 3)])
def test_empty_parameters(shape: tuple[int, ...]) -> None:
    for layout, average in itertools.product(LAYOUTS, (True, False)):
        method = pr.MBF(**LOUD, layout=layout, average=average, kind="conv" if len(shape) == 4 else "fc")
        empty = np.zeros(shape)
        state = method.warm_start(method.init(empty), np.zeros((2, *shape)))
        direction, _ = method.update(empty, state, empty)
        assert direction.shape == shape


@pytest.mark.parametrize("library", ["strict-device1", "torch", "jax-jit"])
@pytest.mark.parametrize("average", [True, False])
def test_statistics_on_other_libraries(library: str, average: bool) -> None:
    backend = make_backend(library)
    grads = rng(55).standard_normal((4, 2, 3, 5))
    x, d = rng(56).standard_normal((2, 6, 5)), rng(57).standard_normal((2, 6, 3))
    for layout in LAYOUTS:
        method = pr.MBF(**LOUD, layout=layout, average=average, inverse_every=2)
        cases: tuple[tuple[Any, ...], ...] = (
            (pr.MBF.Samples, d[..., :, None] * x[..., None, :]),
            (pr.MBF.Factors, x, d),
            (pr.MBF.Blocks, one_state(method, grads[0])),
        )
        for make, *arrays in cases if layout == "per_output" else cases[1:2]:
            got = []
            for b in (make_backend("numpy"), backend):

                def update(grad: Any, state: Any, param: Any, statistic: Any, method: Any = method) -> Any:
                    return method.update(grad, state, param, statistic=statistic)

                if b.name == "jax-jit":
                    import jax

                    update = jax.jit(update)
                param = b.asarray(grads[0])
                state = method.warm_start(method.init(param, stack_ndim=1), b.asarray(grads))
                for grad in grads:
                    given = make(*(b.asarray(a) for a in arrays))
                    direction, state = update(b.asarray(grad), state, param, given)
                got.append(b.numpy(direction))
            assert relative(got[1], got[0]) <= 1e-12


def one_state(method: Any, grads: np.ndarray) -> np.ndarray:
    return method.update(grads, method.init(grads, stack_ndim=1), grads)[1].statistic


# ---- refusals -------------------------------------------------------------------------------------------------------

G = np.ones((2, 3))
FC = pr.MBF()


def updated(statistic: Any = None, method: Any = FC, **more: Any) -> Any:
    param = np.ones((2, 3, 2, 2)) if method.kind == "conv" else G
    return method.update(param, method.init(param), param, statistic=statistic, **more)


REFUSED: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "kind as an array": (lambda: pr.MBF(kind=np.asarray("fc")), TypeError, "kind must be one of .* got array"),
    "network": (lambda: pr.MBF.authors_code("gcn"), ValueError, "network must be 'autoencoder' or 'cnn', got 'gcn'"),
    "another layout's state": (lambda: FC.update(G, pr.MBF(layout="per_input").init(G), G), ValueError,
        r"state.statistic must have shape \(3, 3\)"),
    "refresh": (lambda: updated(refresh=1), TypeError,
        r"refresh must be a pair of bools \(statistics, inverse\).* got 1"),
    "refresh length": (lambda: updated(refresh=(True,)), TypeError, "refresh must be a pair"),
    "refresh kinds": (lambda: updated(refresh=(True, 0)), TypeError, "refresh must be a pair"),
    "no inverse kept": (lambda: updated(refresh=(True, False)), ValueError, "needs inverse_every > 1"),
    "statistic": (lambda: updated(G), TypeError, "statistic must be an MBF.Samples, MBF.Factors or MBF.Blocks"),
    "statistic of diagonal": (lambda: updated(pr.MBF.Samples(G[None]), pr.MBF(kind="diagonal")), ValueError,
        "must be None for kind='diagonal'"),
    "samples": (lambda: updated(pr.MBF.Samples(G)), ValueError,
        r"statistic.grads must have shape \(n >= 1, 2, 3\), got \(2, 3\)"),
    "no samples": (lambda: updated(pr.MBF.Samples(np.ones((0, 2, 3)))), ValueError, r"got \(0, 2, 3\)"),
    "samples' dtype": (lambda: updated(pr.MBF.Samples(G[None].astype("float32"))), TypeError,
        "grads must have dtype float64, got float32"),
    "inputs": (lambda: updated(pr.MBF.Factors(np.ones((4, 2)), np.ones((4, 2)))), ValueError,
        r"inputs must have shape \(n >= 1, 3\)"),
    "signals": (lambda: updated(pr.MBF.Factors(np.ones((4, 3)), np.ones((5, 2)))), ValueError,
        r"signals must have shape \(4, 2\)"),
    "factors of conv": (lambda: updated(pr.MBF.Factors(G, G), pr.MBF(kind="conv")), ValueError,
        "needs kind='fc', got kind='conv'"),
    "blocks": (lambda: updated(pr.MBF.Blocks(np.ones((2, 2)))), ValueError,
        r"statistic must have shape \(3, 3\), got \(2, 2\)"),
    "warm start late": (lambda: FC.warm_start(updated()[1], G[None]), ValueError,
        "before the first update, got a state after 1"),
    "warm start": (lambda: FC.warm_start(FC.init(G), G), ValueError,
        r"grads must have shape \(n >= 1, 2, 3\), got \(2, 3\)"),
    "warm start's dtype": (lambda: FC.warm_start(FC.init(G), G[None].astype("float32")), TypeError,
        "grads must have dtype float64"),
    "warm start's axes": (lambda: FC.warm_start(FC.init(G), G[0]), ValueError, "grads must have shape"),
    "warm start of a list": (lambda: FC.warm_start(FC.init(G), [1.0]), TypeError, "grads must be an array, got list"),
    "warm start of no state": (lambda: FC.warm_start(None, G[None]), TypeError, "state must be a MBFState"),
    "warm start of nothing": (lambda: FC.warm_start(FC.init(G), G[:0][None]), ValueError, "grads must have shape"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    call, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        call()


# ---- planted bugs ---------------------------------------------------------------------------------------------------


SOLVE = "roots.solve(f, columns, self.damping, own, xp=xp)"
KEPT = "law = roots.Law(-1.0, self.damping)"
BUGS = {
    "square root of F": Bug(SOLVE, "roots.power(f, -0.5, self.damping, xp=xp) @ columns",
        ("vectors", "e5", "e10", "t0", "t1")),
    "square root of F kept": Bug(KEPT, KEPT.replace("-1.0", "-0.5"), ("vectors", "schedule")),
    "damping left out": Bug(SOLVE, "roots.solve(f, columns, 0.0, own, xp=xp)", ("vectors", "e5", "t0")),
    "damping left out of the inverse kept": Bug(KEPT, KEPT.replace("self.damping", "0.0"), ("vectors", "t2")),
    "statistic of the momentum": Bug("xp.expand_dims(grad,", "xp.expand_dims(m,", ("vectors", "e7")),
    "averaged momentum": Bug("self.momentum * state.m + grad", "self.momentum * state.m + (1 - self.momentum) * grad",
        ("vectors", "e5")),
    "momentum left out": Bug("self.to_blocks(m, xp=xp)", "self.to_blocks(grad, xp=xp)", ("vectors", "schedule")),
    "decay the weight of the new": Bug("new_statistic(), self.decay)", "new_statistic(), 1 - self.decay)",
        ("vectors", "schedule", "warm_start")),
    "sum over the blocks": Bug("/ max(rows.shape[-2], 1)", "/ 1", ("vectors", "warm_start", "e7", "e9")),
    "columns by default": Bug('default="per_output"', 'default="per_input"', ("e1", "e7")),
    "contiguous as it was meant": Bug("return xp.reshape(array, (*lead, d2, d1))", "return xp.matrix_transpose(array)",
        ("vectors", "e7")),
    "columns not put back": Bug("return xp.matrix_transpose(blocks)", "return xp.reshape(blocks, shape)",
        ("vectors", "e6")),
    "samples and blocks mixed": Bug("xp.moveaxis(blocks, -2 - self.ndims[0] // 2, -2)",
        "xp.reshape(blocks, xp.moveaxis(blocks, -2 - self.ndims[0] // 2, -2).shape)", ("e2", "e8", "e9")),
    "inverse of the previous statistic": Bug(SOLVE, SOLVE.replace("f,", "state.statistic,"), ("vectors", "e5")),
    "inverse of the previous statistic kept": Bug("roots.renewed(inverse_due, f,",
        "roots.renewed(inverse_due, state.statistic,", ("vectors", "schedule")),
    "no fresh inverses at first": Bug("((step <= t2) & statistics) | ", "", ("vectors", "schedule")),
    "fresh inverses once more": Bug("step <= t2", "step <= t2 + 1", ("schedule",)),
    "updates counted from one": Bug("step % self.statistics_every == 0, self",
        "(step + 1) % self.statistics_every == 0, self", ("vectors", "schedule")),
    "inverse with every statistic": Bug("return statistics, ((step <= t2) & statistics) | (step % t2 == 0)",
        "return statistics, statistics", ("vectors", "schedule")),
    "inverse starts at the identity": Bug(", scale=reciprocal(self.damping)", "", ("refresh",)),
    "refresh pair exchanged": Bug("return pair\n", "return pair[::-1]\n", ("refresh",)),
    "warm start of the last batch": Bug("self._mean_outer(xp.moveaxis(grads, 0,",
        "self._mean_outer(xp.moveaxis(grads[-1:, ...], 0,", ("warm_start", "e3_e4")),
    "warm start over the stack": Bug("xp.moveaxis(grads, 0, -1 - self.ndims[0])",
        "xp.reshape(grads, (*state.m.shape[:-self.ndims[0]], grads.shape[0], *state.m.shape[-self.ndims[0]:]))",
        ("warm_start",)),
    "back-signals not squared": Bug("xp.sum(other * other,", "xp.sum(other,", ("e1", "e8", "e9")),
    "mean over the samples only": Bug("other.shape[-2] * other.shape[-1]", "other.shape[-2]", ("e1", "e8", "e9")),
    "samples summed": Bug("rows / max(rows.shape[-2], 1)", "rows / max(rows.shape[-2] if self._averaged else 1, 1)",
        ("e2", "e3_e4", "e5", "e8", "t0")),
    "squares of the gradient": Bug("ema(state.statistic, n * n,", "ema(state.statistic, grad * grad,", ("vectors",)),
    "eps under the root": Bug("n / (xp.sqrt(v) * k.inverse_sqrt_c + DIAGONAL_EPS)",
        "n / (xp.sqrt(v + DIAGONAL_EPS) * k.inverse_sqrt_c)", ("vectors",)),
    "no correction of v": Bug("xp.sqrt(v) * k.inverse_sqrt_c", "xp.sqrt(v)", ("vectors",)),
    "NaN from the second update": Bug("return direction, MBFState(step=now.step, m=m",
        "return direction * (xp.nan if state.step else 1), MBFState(step=now.step, m=m", ("vectors",)),
    "Adam's first decay corrected": Bug("direction = n / (xp", "direction = n / (1 - 0.9 ** (state.step + 1)) / (xp",
        ("vectors",)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "check"), [(name, check) for name, bug in BUGS.items() for check in bug.checks])
def test_planted_bug_is_caught(name: str, check: str) -> None:
    with pytest.raises(AssertionError):
        CHECKS[check](mutated(mbf, BUGS[name][:2]))


@pytest.mark.parametrize("method", [pr.MBF(), pr.MBF(average=False, layout="per_input")])
def test_blocks_without_entries_are_diagnosed(method: pr.MBF) -> None:
    report = method.diagnose(method.init(np.zeros((3, 0) if method.average else (0, 3))))
    assert report.eigenvalues.shape[-1] == 0
    assert np.all(report.condition == 1.0)
    assert np.all(report.finite)


def test_blocks_are_the_statistics_of_samples_and_factors() -> None:
    method = pr.MBF(average=False)
    inputs, signals = rng(1).standard_normal((5, 3)), rng(2).standard_normal((5, 4))
    expected = np.einsum("no,ni,nj->oij", signals**2, inputs, inputs) / 5
    samples = method.blocks(method.Samples(signals[:, :, None] * inputs[:, None, :]))
    assert relative(samples.statistic, expected) <= 64 * U
    assert relative(method.blocks(method.Factors(inputs, signals)).statistic, expected) <= 64 * U
    assert method.blocks(samples) is samples
