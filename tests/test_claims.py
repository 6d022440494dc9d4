"""Experiments: each runs in small, its verdict follows from its numbers, and the page says what the records say."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutation import mutated
from scipy import stats
from typer.testing import CliRunner

import precond_ref as pr
from precond_ref import cli, experiments, problems, regret, theory
from precond_ref.compare import rates
from precond_ref.experiments import (
    agd,
    asgo,
    base,
    curvature,
    figures,
    language,
    mbf,
    numbers,
    rootfree,
    sketchy,
    training,
    vision,
)
from precond_ref.problems import online

FOLDER = Path(__file__).parents[1] / "docs" / "claims"
ALL = experiments.list_experiments()
WORDS = {base.HOLDS, base.PART, base.NOT, base.UNTESTED}


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_says_what_the_records_say() -> None:
    assert (FOLDER / "verdicts.txt").read_text(encoding="utf-8") == base.verdicts(ALL.values(), FOLDER)
    page = (FOLDER.parent / "claims.md").read_text(encoding="utf-8")
    assert "{include} claims/verdicts.txt" in page
    for name, experiment in ALL.items():
        record = base.read(experiment, FOLDER)
        if record is None:
            continue
        assert f"](claims/{name}.svg)" in page, name
        assert (FOLDER / f"{name}.txt").read_text(encoding="utf-8") == (experiment.table or numbers.table)(
            record["runs"]
        )
        assert record["options"] == {}, name
        assert record["seeds"] == list(range(experiment.seeds))
        assert len(record["runs"]) == experiment.seeds >= 5
        assert not {*rates.SEEDS} & {*record["seeds"]}
        assert all(claim.judge(record["runs"]).word in WORDS for claim in experiment.claims)
        assert experiment.minutes == pytest.approx(record["seconds"] / 60, rel=0.2, abs=0.1), name  # what the list says


def says(page: str) -> None:
    """The numbers of the sentences below the figures are those of the records."""
    names = ("language", "autoencoder", "images", "memory", "half-precision", "switch", "hessian-blocks")
    runs = {name: json.loads((FOLDER / f"{name}.json").read_text())["runs"] for name in names}

    def middle(name: str, *keys: Any) -> float:
        return float(np.median(numbers.column(runs[name], *keys)))

    def change(run: Any) -> float:
        return max(run["digits-cnn"]["0.001"]) - min(run["digits-cnn"]["0.001"])

    gap = numbers.paired(*(numbers.column(runs["images"], name, "test") for name in ("MBF", "SGD, momentum")))
    least, blocks = [middle("memory", "least preconditioned", "regret", size) for size in ("40", "full")], []
    for net in ("digits-mlp", "mnist-mlp", "transformer"):
        ours, random = (
            [run[net][f"output neurons{word}"][-1] for run in runs["hessian-blocks"]] for word in ("", ", random")
        )
        blocks.append(np.median(ours) / np.median(random))
        assert np.median(ours) < 0.5
    first, second = (
        [np.median([run["digits-mlp, layers"][f"fc{i}/weight"][t] for run in runs["switch"]]) for t in (0, -1)]
        for i in (1, 2)
    )
    until = {
        name: [training.reached(run, name, "SGD, momentum") for run in runs["images"]] for name in runs["images"][0]
    }
    steps, seconds = ({name: np.median(np.array(each)[:, i]) for name, each in until.items()} for i in (0, 1))
    of_sgd = {name: (steps[name] / steps["SGD, momentum"], seconds[name] / seconds["SGD, momentum"]) for name in until}
    half = [middle("half-precision", f"Shampoo, eps 1e-06, {word}") for word in ("statistics in bfloat16", "float32")]
    asgo, adam = (middle("language", name, "seconds") for name in ("ASGO", "AdamW"))
    kfac, blockwise = (middle("autoencoder", name, "seconds") for name in ("KFAC", "MBF"))
    for sentence in (
        f"A run of ASGO takes {asgo / adam:.1f} times",
        f"a step of it takes {kfac / blockwise:.1f} times",
        f"about {['no', 'one', 'two', 'three'][round(20 * (gap.error / (gap.mean + 0.3)) ** 2 / 1000)]} thousand seeds",
        f"is least ({least[0]:.2f} and {least[1]:.2f})",
        f"is {half[0] / half[1]:.1f} times that of float32",
        f"just so: {np.median([change(run) for run in runs['switch']]):.4f}, and below 0.2 for two of the five",
        f"{first[0]:.2f} and the second at {second[0]:.2f}, and they end at {first[1]:.2f} and {second[1]:.2f}",
        f"{min(blocks):.0f} to {max(blocks):.0f} times as much, and less than half",
        f"MBF {of_sgd['MBF'][0]:.2f} times its steps and {of_sgd['MBF'][1]:.1f} times",
        f"KFAC {of_sgd['KFAC'][1]:.1f} times its time",
    ):
        assert sentence in " ".join(page.split()), sentence
    assert [round(share, 1) for share in of_sgd["RMSProp"]] == [0.5, 0.5]
    assert sum(change(run) < 0.2 for run in runs["switch"]) == 2


def test_the_prose_says_what_the_records_say() -> None:
    page = (FOLDER.parent / "claims.md").read_text(encoding="utf-8")
    says(page)
    for right, wrong in (
        ("takes 1.5 times", "takes 1.3 times"),
        ("two thousand", "one thousand"),
        ("0.2002", "0.2100"),
    ):
        assert right in page
        with pytest.raises(AssertionError):
            says(page.replace(right, wrong))


def test_every_claim_has_one_row() -> None:
    names = [claim.name for experiment in ALL.values() for claim in experiment.claims]
    assert len(names) == len(set(names))
    wanted = {"A": 7, "S": 7, "R": 6, "M": 6, "G": 6}
    assert set(names) >= {f"{letter}{i + 1}" for letter, count in wanted.items() for i in range(count)}


# ---- each experiment runs -------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("name", ALL)
def test_smoke(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds and few steps: JSON, table, figure and a verdict for each claim; nothing about the results."""
    experiment, shares = ALL[name], []
    if {"a9a", "mnist", "tinyshakespeare"} & set(experiment.needs):
        pytest.importorskip("torch")
        small_data(tmp_path, monkeypatch)
    record = experiment.run([0, 1], shares.append, **experiment.small)
    assert shares == sorted(shares)
    assert 0 < shares[-1] <= 1 + 1e-9
    base.write(experiment, record, tmp_path)
    assert base.read(experiment, tmp_path) == record
    assert record["runs"][0] != record["runs"][1]
    assert "<svg" in (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
    for claim in experiment.claims:
        word, measured = claim.judge(record["runs"])
        assert word in WORDS
        assert measured


def small_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise in the places of the data."""
    rng = np.random.default_rng(0)
    for kind, array in {"images-idx3": rng.integers(0, 256, (250, 28, 28)), "labels-idx1": np.arange(250) % 10}.items():
        header = np.array([0x0800 + array.ndim, *array.shape], ">u4").tobytes()
        (folder / f"t10k-{kind}-ubyte").write_bytes(header + array.astype("uint8").tobytes())
    lines = [f"{y:+d} {1 + i % 7}:1 {9 + i % 3}:1 {12 + i % 5}:1" for i, y in enumerate(rng.choice([-1, 1], 12100))]
    (folder / "a9a").write_text("\n".join(lines))
    (folder / "tinyshakespeare.txt").write_text("".join(rng.choice(list("abcd \n"), 3000)))
    monkeypatch.setenv("PRECOND_REF_DATA", str(folder))


# ---- pieces against other routes, each with planted bugs ------------------------------------------------------------


def check_statistics(module: Any) -> None:
    """Paired differences and ranks against SciPy, spreads against numbers written here."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal(6), rng.standard_normal(6)
    found = module.paired(list(a), list(b))
    assert found.mean == pytest.approx(np.mean(a - b), rel=1e-12)
    assert found.error == pytest.approx(2 * stats.sem(a - b), rel=1e-12)
    assert module.paired([1.0, None], [0.0, 0.0]).mean == np.inf
    assert module.paired([1.0, 1.0], [0.0, None]).mean == -np.inf
    assert module.paired([1.0, None], [0.0, 0.0], smaller=False).mean == -np.inf
    x, y = rng.integers(0, 5, 40), rng.standard_normal(40)
    assert module.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)
    assert module.spread([4.0, 1.0, 2.0]) == "2 (1 to 4)"
    assert module.spread([3.0, None, 2.0]) == "2.5 (2 to 3), 1 of 3 diverged"
    assert module.spread([None, None]) == "2 of 2 diverged"
    low = module.Difference(-0.2, 0.1)
    assert (low.below, low.above, low.within(0.35), low.within(0.25)) == (True, False, True, False)
    assert not module.Difference(-0.1, 0.2).below


def check_curvature(module: Any) -> None:
    """The Hessian of a quadratic is its matrix, of a network that of autograd; shares of a matrix of ones."""
    torch = pytest.importorskip("torch")
    problem = problems.load("quadratic", dtype="float64", size=5)
    A = problem.basis * problem.eigenvalues @ problem.basis.T  # type: ignore[attr-defined]
    np.testing.assert_allclose(module.hessian(problem, problem.init()), A, rtol=0, atol=1e-9)
    net = problems.load("digits-mlp", dtype="float64", hidden=(2,))
    net = dataclasses.replace(net, train=tuple(array[:20] for array in net.train), batch_size=None)
    params = net.init()
    inputs, labels = (torch.tensor(array) for array in net.train)

    def loss(x: Any) -> Any:
        p = list(torch.split(x, [v.size for v in params.values()]))
        w1, b1, w2, b2 = (each.reshape(v.shape) for each, v in zip(p, params.values(), strict=True))
        return torch.nn.functional.cross_entropy(torch.tanh(inputs @ w1.T + b1) @ w2.T + b2, labels.long())

    H = torch.autograd.functional.hessian(loss, torch.tensor(module.flat(params)))
    np.testing.assert_allclose(module.hessian(net, params), H, rtol=0, atol=1e-8 * float(H.abs().max()))
    groups = module.groups(params)
    ones = np.ones((len(groups["layers"]),) * 2)
    first, second = 2 * 64 + 2, 10 * 2 + 10
    neurons = (2 * 65**2 + 10 * 3**2) / ones.size
    assert module.share(ones, groups["layers"]) == pytest.approx((first**2 + second**2) / ones.size, rel=1e-12)
    assert module.share(ones, groups["output neurons"]) == pytest.approx(neurons, rel=1e-12)
    blocks = (64 * 2**2 + 2 + 2 * 10**2 + 10) / ones.size
    assert module.share(ones, groups["inputs"]) == pytest.approx(blocks, rel=1e-12)
    rng, layers = np.random.default_rng(4), groups["layers"]
    H = module.hessian(net, params)
    for part in groups:
        draws = [module.drawn(layers, 15, rng) for _ in range(300)]
        assert all(len(which) == len(set(which)) == 30 for which, _ in draws)
        near = [module.share(H[:, which], groups[part], which, weights) for which, weights in draws]
        error = np.std(near) / len(near) ** 0.5
        assert abs(np.mean(near) - module.share(H, groups[part])) <= 4 * error, part
    which = module.drawn(layers, 50, rng)[0]
    np.testing.assert_allclose(module.hessian(net, params, columns=which), H[:, which], rtol=0, atol=1e-12)
    assert sorted(which[layers[which] == 1]) == list(np.flatnonzero(layers == 1)[:30])
    kernel = {"conv1/weight": np.zeros((2, 3, 3, 3)), "conv1/bias": np.zeros(2), "norm": np.zeros(4)}
    groups = module.groups(kernel)
    assert [len(np.unique(groups[part])) for part in groups] == [2, 2 + 4, 3 + 1]


def check_bounds(module: Any) -> None:
    """Each right side is the least over the rates of that of `theory`, for a run of the method."""
    stream = online.adversary("random", (4, 3), rounds=30, seed=2)
    U = np.random.default_rng(3).standard_normal((4, 3))
    makers = {
        "ASGO": (pr.ASGO.theory(eps=0.0), lambda run: theory.asgo.regret(run, U)),
        "Shampoo": (pr.SShampoo(size=5, eps=0.0), lambda run: theory.sketchy.sshampoo_regret(run, U, 3)),
        "AdaGrad by rows": (pr.DASGO.theory(eps=0.0), lambda run: theory.asgo.row_regret(run, U)),
        "AdaGrad": (pr.AdaGrad(eps=0.0), lambda run: theory.asgo.row_regret(run, U)),
        "SGD": (pr.SGD(), lambda run: theory.gradient_descent.regret(run, U)),
    }
    for name, (method, statement) in makers.items():
        run = theory.record(method, stream, 0.01)
        one, two = (
            statement(theory.base.Run(**{**vars(run), "rates": np.full(30, rate), "forms": {}})).right
            for rate in (1.0, 2.0)
        )
        rising = (2 * two - one) / 3  # of a / eta + b eta
        least = 2 * ((one - rising) * rising) ** 0.5
        assert module.right_sides(run.gradients, run.points[:-1] - U)[name] == pytest.approx(least, rel=1e-5), name


def check_fisher(module: Any) -> None:
    """Errors of the approximations against loops; KFAC is exact where inputs do not vary with the signals."""
    rng = np.random.default_rng(4)
    a, d = rng.standard_normal((7, 3)), rng.standard_normal((7, 2))
    F = sum(np.outer(np.outer(y, x).ravel(), np.outer(y, x).ravel()) for x, y in zip(a, d, strict=True)) / 7
    blocks = [F[3 * o : 3 * o + 3, 3 * o : 3 * o + 3] for o in range(2)]
    zero = np.zeros((3, 3))
    expected = {
        "diagonal": np.diag(np.diag(F)),
        "MBF, a block per neuron": np.block([[blocks[0], zero], [zero, blocks[1]]]),
        "MBF, one block (averaged)": np.kron(np.eye(2), (blocks[0] + blocks[1]) / 2),
        "KFAC": np.kron(d.T @ d / 7, a.T @ a / 7),
    }
    for name, error in module.errors(a, d).items():
        assert error == pytest.approx(np.linalg.norm(F - expected[name]) / np.linalg.norm(F), rel=1e-12), name
    product = module.errors(np.repeat(a, 7, axis=0), np.tile(d, (7, 1)))
    assert product["KFAC"] < 1e-14


def check_half(module: Any) -> None:
    """bfloat16 against PyTorch's, and the Newton root against eigenvectors."""
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(5).standard_normal(1000).astype("float32") * 10.0 ** np.arange(
        -20, 20, 0.04, dtype="float32"
    )
    x[:2] = 1 + 2.0**-8, 1 + 3 * 2.0**-8  # halfway: to even
    expected = torch.tensor(x).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(module.bfloat16(x), expected)
    assert np.isnan(module.bfloat16(np.float32([np.nan])))[0]
    G = np.random.default_rng(6).standard_normal((4, 6)).astype("float32")
    A = G @ G.T
    w, v = np.linalg.eigh(A.astype(float))
    np.testing.assert_allclose(module.newton_root(A, module.exact), v * w**-0.25 @ v.T, rtol=0, atol=1e-4)


def check_tasks(module: Any) -> None:
    """The factorization machine's gradient by differences; a search finds the bottom of a valley beyond its grid."""
    task = module.Recommender.__new__(module.Recommender)
    rng = np.random.default_rng(7)
    task.x, task.y = rng.random((9, 4)), rng.choice([-1.0, 1.0], 9)
    params, batch = {"w": rng.standard_normal(4), "v": rng.standard_normal((2, 4))}, np.arange(9)
    _, grads = task.loss_and_grad(params, batch)
    for name, value in params.items():
        for index in np.ndindex(value.shape):
            shift = np.zeros_like(value)
            shift[index] = 1e-6
            up, down = (task.loss_and_grad({**params, name: value + s}, batch)[0] for s in (shift, -shift))
            assert grads[name][index] == pytest.approx((up - down) / 2e-6, abs=1e-6)
    inner = params["v"].T @ params["v"]
    full = [x @ params["w"] + sum(inner[i, j] * x[i] * x[j] for i in range(4) for j in range(i)) for x in task.x]
    np.testing.assert_allclose(task._logits(params, task.x)[0], full, rtol=1e-9)

    class Valley:
        """x^2 / 2 from 1: one step of gradient descent ends at 0 for the rate 1."""

        points, curves = 2, True

        def scores(self, params: Any) -> Any:
            return {}

        def test(self, params: Any) -> float:
            return 100.0 * float(params["x"][0])

        def init(self) -> Any:
            return {"x": np.ones(1)}

        def batch(self, step: int) -> None:
            return None

        def loss_and_grad(self, params: Any, batch: Any) -> Any:
            return float(params["x"][0] ** 2) / 2, dict(params)

        def validation(self, params: Any) -> float:
            return float(params["x"][0] ** 2) / 2

    found = module.search([Valley()], {"SGD": module.Entry(pr.SGD())}, 1, lambda share: None, grid=(-12, -4))["SGD"]
    assert found["lr"] == 1.0
    tried = [rate for rate, _ in found["tried"]]
    assert 10**-0.25 in tried
    assert 10**0.25 in tried
    assert len(set(tried)) == len(tried)
    run = module.finish(Valley(), module.Entry(pr.SGD()), 0.5, 4)  # x = 1, 1/2, 1/4, 1/8, 1/16
    assert run["curve"] == [(0, 1 / 2), (2, 1 / 32), (4, 1 / 512)]
    assert run["training"] == [(0, 1 / 2), (2, (1 / 8 + 1 / 32) / 2), (4, (1 / 128 + 1 / 512) / 2)]
    assert run["testing"] == [(0, 100.0), (2, 25.0), (4, 6.25)]
    assert module.finish(Valley(), module.Entry(pr.SGD()), 4.0, 4)["testing"] == [(0, 100.0)]


def check_memory(module: Any) -> None:
    """The regret of each size against a loop with the method, and what the last round has of mass and bound."""
    rng = np.random.default_rng(8)
    features, signs = rng.standard_normal((60, 4)), rng.choice([-1.0, 1.0], 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online, "libsvm", lambda name: (features, signs))
        found = module.memory(3, lambda share: None, rounds=40, sizes=(2, 5), rates=3, peers=(2,), d=4)
    order = np.random.default_rng([3, 7]).permutation(60)[:40]
    a, y = features[order], signs[order]
    best = regret.comparator_of_logistic(a, y, 5.0).point
    for size in (2, 5):
        regrets = []
        for lr in 10.0 ** np.linspace(-1.5, 0.5, 3):
            x, paid = np.zeros(4), 0.0
            method = pr.SAdaGrad(size=size)
            state = method.init(x)
            for row, sign in zip(a, y, strict=True):
                paid += np.logaddexp(0.0, -sign * (row @ x)) - np.logaddexp(0.0, -sign * (row @ best))
                g = -sign * row / (1 + np.exp(sign * (row @ x)))
                direction, state = method.update(g, state, x)
                x = x - lr * direction
            regrets.append((paid, float(state.sketch.escaped)))
        ours = found["a9a"]
        assert (ours["regret"][str(size)], ours["lost"][str(size)][0]) == pytest.approx(min(regrets), rel=1e-8)
        assert ours["regret"][str(size)] <= ours["bound"][str(size)]
    assert ours["lost"]["5"] == [0.0, 0.0]
    theirs = found["alternating"]
    assert list(theirs["bound"]) == ["2", "full"]
    games = [
        regret.play(pr.SAdaGrad(size=2), online.adversary("alternating", (4,), rounds=4, seed=3), float(lr))
        for lr in 10.0 ** np.linspace(-2, 1, 3)
    ]
    least = min(games, key=lambda game: game.bound[-1])
    total = np.sum(least.run.gradients, axis=0)
    paid = sum(g @ x for g, x in zip(least.run.gradients, least.run.points, strict=False)) + np.linalg.norm(total)
    assert theirs["regret"]["2"] == pytest.approx(float(paid), rel=1e-10)
    full = [
        regret.play(pr.FullAdaGrad(eps=0.0), online.adversary("alternating", (4,), rounds=4, seed=3), float(lr))
        for lr in 10.0 ** np.linspace(-2, 1, 3)
    ]
    assert min(abs(theirs["regret"]["full"] - float(game.regret[-1])) for game in full) < 1e-9


def check_spectra(module: Any) -> None:
    """Ranks of matrices of rank one and with equal singular values; leading spaces of diagonal matrices."""
    rng = np.random.default_rng(9)
    q = np.linalg.qr(rng.standard_normal((6, 4)))[0]
    assert module.concentration(q) == pytest.approx((1, 1), rel=1e-12)
    assert module.concentration(np.outer(q[:, 0], np.arange(1, 5))) == pytest.approx((1 / 4, 1 / 4), rel=1e-12)
    assert module.concentration(3 * np.diag([2.0, 1.0, 1.0])) == pytest.approx((6 / 4 / 3, 16 / 6 / 3), rel=1e-12)
    values = np.array([8.0, 4.0, 2.0, 2.0, *[0.0] * 12])
    assert module.shares(np.diag(values)) == pytest.approx([1, 12 / 16, 8 / 16], rel=1e-12)
    turn, c = np.eye(16), np.cos(0.6)
    turn[np.ix_([1, 5], [1, 5])] = [[c, -np.sin(0.6)], [np.sin(0.6), c]]
    found = module.rotation({"a": np.diag(values)}, {"a": turn @ np.diag(values) @ turn.T})
    assert found == pytest.approx([(1 + c**2) / 2, (8 + 4 * c**2) / 12], rel=1e-9)
    averages: dict[str, Any] = {}
    G = rng.standard_normal((16, 3))
    for _ in range(2):
        module.averaged(averages, {"w": G, "b": np.ones(3)})
    assert averages.keys() == {"w left"}
    np.testing.assert_allclose(averages["w left"], (1 - 0.99**2) * G @ G.T, rtol=1e-12)


def check_difference(module: Any) -> None:
    """The average of s^2 is AGD's b, from its own formulas."""
    rng, method = np.random.default_rng(10), pr.AGD()
    x = np.zeros(5)
    state, mean, b = method.init(x), np.zeros(5), np.zeros(5)
    for t in range(6):
        g = rng.standard_normal(5)
        s, mean = module.difference(g, mean, t)
        b = 0.999 * b + 0.001 * s**2
        _, state = method.update(g, state, x)
        np.testing.assert_allclose(b, state.b, rtol=1e-10)


def of_losses(**means: float) -> list[numbers.Numbers]:
    """Five seeds of a comparison with these mean losses; seeds differ, methods by their means alone."""
    names = dict.fromkeys(language.ENTRIES, 3.0) | {k.replace("_", " "): v for k, v in means.items()}
    rows = [
        {
            n: {"validation": m + 0.1 * s, "test": m + 0.1 * s, "bytes": [50, 90], "seconds": 2.0,
                "curve": [[0, 5.0], [10, m + 0.1 * s]]}
            for n, m in names.items()
        }
        for s in range(5)
    ]  # fmt: skip
    for row in rows:
        for name in row:
            if name == "AdamW":
                row[name]["bytes"] = [100, 200]
    return rows


def check_fixed_time(module: Any) -> None:
    """The loss at a time lies on the curve; the time is that of the fastest, so that a slow ASGO holds in part."""
    result = {"validation": 1.0, "seconds": 2.0, "curve": [[0, 4.0], [10, 3.0], [20, 1.0]]}
    assert module.at(result, 1.5) == 2.0
    assert module.at({**result, "validation": None}, 1.5) is None
    runs = of_losses(ASGO=2.0, Muon=2.005, AdamW=2.1)
    assert module.asgo(runs).word == base.HOLDS
    for run in runs:
        run["ASGO"]["seconds"] = 4.0
    assert module.asgo(runs).word == base.PART


def check_reached(module: Any) -> None:
    """SGD's last loss is met at the first point of the curve that is not above it, at that share of the seconds."""
    curve = [[0, 5.0], [10, 3.0], [20, 2.0], [30, 2.5], [40, 1.0]]
    fast = {"validation": 1.0, "seconds": 8.0, "curve": curve}
    run = {"SGD": {"validation": 2.0, "seconds": 1.0, "curve": [[0, 5.0], [40, 2.0]]}, "fast": fast}
    run |= {"slow": {**fast, "curve": [[0, 5.0], [40, 2.1]]}, "diverged": {**fast, "validation": None}}
    assert module.reached(run, "SGD", "SGD") == (40, 1.0)
    assert module.reached(run, "fast", "SGD") == (20, 4.0)
    assert module.reached(run, "slow", "SGD") == module.reached(run, "diverged", "SGD") == (np.inf, np.inf)
    columns = module.until([run], "SGD")
    assert [text("fast") for text in columns.values()] == ["20", "4"]
    assert [text("slow") for text in columns.values()] == ["not reached"] * 2


def check_ends(module: Any) -> None:
    """S3: the median of the largest size within 2 % of the full matrix, on each stream, however the seeds differ."""
    streams = ("a9a", *module.ADVERSARIES)
    runs = [
        {name: {"regret": {"1": 9.0, "5": 1.0 + s, "full": 1.0 + s, "diagonal": 1.0}, "bound": {"1": 9.0, "5": 9.0}}
         for name in streams} for s in range(5)
    ]  # fmt: skip
    assert module.monotone(runs).word == base.HOLDS
    for s, run in enumerate(runs):
        run["random"]["regret"]["5"] = 1.0 + s + (0.25 if s == 2 else 0.0)
    assert module.monotone(runs).word == base.PART
    assert "Not for: the end on random. Regret" in module.monotone(runs).measured


def check_descents(module: Any) -> None:
    """A curve that ended early is infinite after its end; a method that nowhere has two points is left out."""
    runs: list[Any] = [{"a": {"curve": [[0, 3.0], [1, 2.0], [2, 1.0]], "seconds": 4.0},
                        "b": {"curve": [[0, 3.0]], "seconds": 1.0}} for _ in range(2)]  # fmt: skip
    runs.insert(0, {"a": {"curve": [[0, 3.0], [1, 4.0]], "seconds": 4.0}, "b": {"curve": [[0, 3.0]], "seconds": 1.0}})
    axes = figures.panels(2)[1]
    module.descents(*axes, runs, ["a", "b"])
    assert [len(each.lines) for each in axes] == [1, 1]
    assert list(axes[0].lines[0].get_ydata()) == [3.0, 2.0, 1.0]
    assert list(axes[1].lines[0].get_xdata()) == [0.0, 2.0, 4.0]
    runs.pop()
    module.descents(axes[0], None, runs, ["a"])
    assert list(axes[0].lines[1].get_ydata()) == [3.0, 3.0, np.inf]
    scores = [{"a": {"test": 1.0}, "b": {"test": None}}, {"a": {"test": 2.0}, "b": {"test": 1.0}}]
    module.scored(axes[0], scores, ["a", "b"], "test")
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["a", "b (1 diverged)"]


def check_records(module: Any) -> None:
    """Parts with commas stay apart; what no run has written is refused; an interrupt leaves the old record."""
    assert module.decided({"a, b": True, "c": True, "d": False}, "x").measured == "Holds for: a, b; c. Not for: d. x"
    laws = ALL["laws"]
    record = laws.run([0], **laws.small)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "laws.json"
        assert module.read(laws, file.parent) is None
        module.write(laws, record, file.parent)
        assert module.read(laws, file.parent) == record
        assert "**holds** `precond-ref experiments laws`, 1 seeds (--quick" in module.verdicts([laws], file.parent)
        old = file.read_text()
        with pytest.MonkeyPatch.context() as patch:
            whole = Path.write_text

            def half(path: Path, text: str, **how: Any) -> int:
                whole(path, text[: len(text) // 2], **how)
                raise KeyboardInterrupt

            patch.setattr(Path, "write_text", half)
            with pytest.raises(KeyboardInterrupt):
                module.write(laws, record, file.parent)
        assert file.read_text() == old
        for text in (old[:50], "[]", "{}", old.replace('"laws"', '"dials"'), old.replace('"Shampoo"', '"x"'),
                     json.dumps(record | {"runs": []}), json.dumps(record | {"seconds": None})):  # fmt: skip
            file.write_text(text)
            try:
                module.read(laws, file.parent)
                raise AssertionError(text)
            except ValueError as error:
                assert str(file) in str(error)  # noqa: PT017


CHECKS: dict[str, tuple[Callable[[Any], None], Any]] = {
    "statistics": (check_statistics, numbers),
    "curvature": (check_curvature, curvature),
    "bounds": (check_bounds, asgo),
    "fisher": (check_fisher, mbf),
    "half": (check_half, rootfree),
    "tasks": (check_tasks, training),
    "memory": (check_memory, sketchy),
    "spectra": (check_spectra, sketchy),
    "difference": (check_difference, agd),
    "fixed time": (check_fixed_time, language),
    "reached": (check_reached, training),
    "ends": (check_ends, sketchy),
    "descents": (check_descents, training),
    "records": (check_records, base),
}


@pytest.mark.parametrize("name", CHECKS)
def test_pieces(name: str) -> None:
    check, module = CHECKS[name]
    check(module)


BUGS = {
    "one standard error": ("statistics", "2 * statistics.stdev(gaps)", "statistics.stdev(gaps)"),
    "mean of the seeds as the middle": (
        "statistics", "statistics.median(found), found[-1]", "statistics.mean(found), found[-1]",
    ),
    "an early end is the best": ("statistics", 'float("inf") if smaller else float("-inf")', 'float("inf")'),
    "ties at the top": ("statistics", "- 0.5 * (count - 1)", ""),
    "equal without the error": ("statistics", "abs(self.mean) + self.error <= margin", "abs(self.mean) <= margin"),
    "below without the error": ("statistics", "self.mean < -self.error", "self.mean < 0"),
    "forward differences": ("curvature", "gradient(i, -1.0)) / (2 * step)", "gradient(i, 0.0)) / step"),
    "biases in one block of inputs": ("curvature", "(group >= 0)[:, None]", "True"),
    "columns without weights": ("curvature", "same * weights)", "same)"),
    "columns drawn twice": ("curvature", "rng.permutation(entries)[:count]", "rng.choice(entries, count)"),
    "rows in reverse": ("curvature", "group[:, None] == group[which]", "group[::-1][:, None] == group[which]"),
    "the rate of the largest bound": (
        "memory", 'min(games, key=lambda game: game.bound[-1])', 'max(games, key=lambda game: game.bound[-1])'),
    "a sketch for the full matrix": ("memory", "SAdaGrad(size=size), make()", "SAdaGrad(size=min(size, 3)), make()"),
    "neurons of all layers together": (
        "curvature", "outputs[name] = 10**6 * number + rows[0]", "outputs[name] = rows[0]",
    ),
    "Frobenius for the operator norm": (
        "bounds", "np.linalg.svd(X, compute_uv=False)[:, 0]", "np.linalg.norm(X, axis=(1, 2))",
    ),
    "fourth root of the left factor alone": (
        "bounds", "trace(L, 0.25) * trace(R, 0.25)", "trace(L, 0.25) * trace(R, 0.5)",
    ),
    "rank left out": ("bounds", "math.sqrt(2 * r)", "math.sqrt(2)"),
    "columns for rows": ("bounds", "np.sum(G**2, axis=(0, 2))", "np.sum(G**2, axis=(0, 1))"),
    "factors exchanged": (
        "fisher", "np.kron(signals.T @ signals / n, inputs.T @ inputs / n)",
        "np.kron(inputs.T @ inputs / n, signals.T @ signals / n)",
    ),
    "sum of the blocks": ("fisher", "np.mean(blocks, axis=0)", "np.sum(blocks, axis=0)"),
    "truncation": ("half", "bits + 0x7FFF + ((bits >> 16) & 1)", "bits"),
    "ties away from zero": ("half", "0x7FFF + ((bits >> 16) & 1)", "0x8000"),
    "square root": ("half", "fl(fl(square @ square) @ M)", "fl(square @ M)"),
    "diagonal terms kept": ("tasks", " - x**2 @ np.sum(params[\"v\"] ** 2, axis=0)", ""),
    "gradient of the diagonal kept": ("tasks", ' - params["v"] * (slope @ x**2)', ""),
    "regret of the first round": ("memory", "best, count=2) for", "best, count=1) for"),
    "regret against zero": (
        "memory", "lambda run: best)[0]", "lambda run: regret.Comparator(point=0 * best.point, how=''))[0]"
    ),
    "Frobenius for the nuclear norm": ("spectra", "np.sum(s) ** 2 / np.sum(s**2)", "np.sum(s**2)"),
    "smallest eigenvalues": ("spectra", "w[-max(1, len(w) // part) :]", "w[: max(1, len(w) // part)]"),
    "half of the leading space": ("spectra", "[:, -max(1, len(matrix) // 8) :]", "[:, -max(1, len(matrix) // 16) :]"),
    "cosines not squared": ("spectra", "compute_uv=False) ** 2)))", "compute_uv=False))))"),
    "sum for the average": ("spectra", "0.99 * averages.get", "1.0 * averages.get"),
    "averages not corrected": ("difference", "(mean / (1 - 0.9**t) if t else 0.0)", "mean"),
    "correction of the next step": ("difference", "1 - 0.9 ** (t + 1)", "1 - 0.9 ** (t + 2)"),
    "mean of all batches so far": ("tasks", "batches.clear()", "pass"),
    "test after the last step": ("tasks", "task.test(step.params)))", "0.0))"),
    "no quarter decades": ("tasks", "for k in (best - 1, best + 1):", "for k in (best,):"),
    "steps for seconds": ("fixed time", ' / result["seconds"], steps', ", steps"),
    "the time of the slowest": ("fixed time", "seconds = [min(", "seconds = [max("),
    "fixed steps twice": ("fixed time", '"time": sooner', '"time": gaps'),
    "below the loss, not at it": ("reached", "if loss <= target", "if loss < target"),
    "seconds of the whole run": ("reached", "step / curve[-1][0] * run", "1.0 * run"),
    "a diverged run arrives": ("reached", 'if run[name]["validation"] is None:', "if False:"),
    "steps in both columns": ("reached", '"seconds to it": column(1)', '"seconds to it": column(0)'),
    "an end within the error": ("ends", "abs(medians[-1] - target) <=", "ends.mean - ends.error <="),
    "one stream for all": ("ends", 'good[f"the end on {stream}"]', 'good["the end on a9a"]'),
    "zero after a run has diverged": ("descents", "[math.inf] *", "[0.0] *"),
    "steps for seconds of a figure": ("descents", "line(axes, unit * x", "line(axes, x"),
    "diverged runs without a word": ("descents", "if None in each else", "if False else"),
    "commas between parts": ("records", "{'; '.join(yes)}", "{', '.join(yes)}"),
    "a record in pieces": ("records", ".json.part", ".json"),
    "the record of another experiment": ("records", 'record["experiment"] != experiment.name', "False"),
    "numbers of runs not looked at": ("records", "claim.judge(record[\"runs\"])\n    except", "pass\n    except"),
    "a quick verdict that counts": ("records", 'if record and record["options"] else', "if False else"),
    "a grid that stays": ("tasks", "loss(best + (2 if best == max(tried) else -2))", "pass"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug: str) -> None:
    name, old, new = BUGS[bug]
    check, module = CHECKS[name]
    with pytest.raises(AssertionError):
        check(mutated(module, (old, new)))


# ---- verdicts follow from the numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("judge", "runs", "word"),
    [
        (language.asgo, of_losses(ASGO=2.0, Muon=2.005, AdamW=2.1), base.HOLDS),
        (language.asgo, of_losses(ASGO=2.0, Muon=1.9, AdamW=2.1), base.PART),
        (language.asgo, of_losses(ASGO=2.2, Muon=2.3, AdamW=2.1), base.NOT),
        (language.sketched, of_losses(**{"S-Shampoo 8": 2.005}, Shampoo=2.0, AdamW=2.0), base.HOLDS),
        (language.sketched, of_losses(**{"S-Shampoo 8": 2.02}, Shampoo=2.0, AdamW=2.1), base.PART),
        (language.sketched, of_losses(**{"S-Shampoo 8": 2.2}, Shampoo=2.0, AdamW=2.1), base.NOT),
        (language.sublinear, of_losses(**{f"S-Shampoo {s}": 2.0 for s in language.SIZES}, AdamW=2.0), base.HOLDS),
        (language.sublinear, of_losses(AdamW=2.0), base.NOT),
        (language.agd, of_losses(AGD=2.0, AdamW=2.1, RMSProp=2.0), base.PART),
        (language.agd, of_losses(AGD=2.0, AdamW=2.1, RMSProp=2.1), base.HOLDS),
        (language.rootless, of_losses(**{"RF-RMSProp": 2.01, "RF-AdamW": 2.01}, RMSProp=2.0, AdamW=2.0), base.HOLDS),
        (language.rootless, of_losses(**{"RF-RMSProp": 2.05, "RF-AdamW": 2.01}, RMSProp=2.0, AdamW=2.0), base.PART),
    ],
)
def test_verdicts_of_the_language_model(judge: Any, runs: list[numbers.Numbers], word: str) -> None:
    assert judge(runs).word == word


def test_other_verdicts() -> None:
    def accuracies(**means: float) -> list[numbers.Numbers]:
        names = ("Adam", "AdamW", "RMSProp", "AGD", "AGD, delta 1e-3", "RF-RMSProp", "RF-AdamW", "MBF", "KFAC")
        found = dict.fromkeys(names, 90.0) | {"SGD, momentum": 90.0} | means
        return [{n: {"test": a + 0.1 * s, "validation": -a} for n, a in found.items()} for s in range(5)]

    assert vision.premise(accuracies()).word == base.NOT
    assert vision.closes(accuracies()).word == base.UNTESTED
    gap = accuracies(**{"SGD, momentum": 91.0, "RF-RMSProp": 91.0, "RF-AdamW": 90.9})
    assert (vision.premise(gap).word, vision.closes(gap).word) == (base.HOLDS, base.HOLDS)
    assert vision.mini_block(accuracies(MBF=89.0)).word == base.NOT
    assert vision.mini_block(accuracies(MBF=89.9)).word == base.HOLDS
    ended = accuracies(MBF=91.0)
    ended[0]["MBF"]["test"] = None
    assert vision.mini_block(ended).word == base.NOT
    assert vision.better(accuracies(AGD=91.0)).word == base.HOLDS
    assert vision.better(accuracies(AGD=89.0)).word == base.NOT

    def memory(*regrets: float, full: float) -> list[numbers.Numbers]:
        sizes = {str(s): r for s, r in zip((1, 5, 20), regrets, strict=True)}
        bound = {s: 100.0 - 10 * i for i, s in enumerate(sizes)}
        lost = {size: [1.0, 2.0] for size in sizes}
        good = {"regret": dict.fromkeys((*sizes, "full", "diagonal"), 1.0), "bound": bound, "lost": lost}
        first = {**good, "regret": {**sizes, "full": full, "diagonal": 1.0}}
        return [dict.fromkeys(sketchy.ADVERSARIES, good) | {"a9a": first}] * 5

    assert sketchy.monotone(memory(3.0, 2.0, 1.0, full=1.0)).word == base.HOLDS
    assert sketchy.monotone(memory(3.0, 2.0, 2.5, full=1.0)).word == base.PART
    assert sketchy.up_to_tail(memory(3.0, 2.0, 1.0, full=1.0)).word == base.HOLDS
    assert sketchy.up_to_tail(memory(300.0, 2.0, 1.0, full=1.0)).word == base.NOT
    rising = [{t: {f"{d:g}": [0.1, 0.4 if d == 1e-3 else 0.1] for d in agd.DELTAS} for t in agd.TASKS}] * 5
    assert agd.switches(rising).word == base.HOLDS
    still = [{t: {f"{d:g}": [0.1, 0.2] for d in agd.DELTAS} for t in agd.TASKS}] * 5
    assert agd.switches(still).word == base.NOT


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_the_command_lists_runs_and_draws_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*arguments: str) -> Any:
        return CliRunner().invoke(cli.application(), ["experiments", *arguments])

    listed = call().output
    for name, experiment in ALL.items():
        assert f"{name}  (decides {', '.join(claim.name for claim in experiment.claims)}; " in listed
    done = call("laws", "--quick", "--seeds", "2", "--output", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "R6 The root is a fundamental difference" in done.output
    record = json.loads((tmp_path / "laws.json").read_text())
    assert record["seeds"] == [0, 1]
    assert record["options"] == dict(ALL["laws"].small)
    assert "-> holds (--quick: the verdict says nothing)" in done.output
    assert "2 seeds (--quick: the verdict says nothing)" in (tmp_path / "verdicts.txt").read_text()
    (tmp_path / "laws.svg").unlink()
    assert call("laws", "--draw", "--output", str(tmp_path)).exit_code == 0
    assert (tmp_path / "laws.svg").exists()
    for arguments, message in {
        ("nothing",): "error: no experiment is called nothing; there are hessian-blocks, ",
        ("laws", "--seeds", "0"): "error: --seeds must be at least 1, got 0\n",
        ("dials", "--draw", "--output", str(tmp_path)): f"error: dials: {tmp_path / 'dials'}.json is not there: run ",
        ("laws", "--output", str(tmp_path / "laws.json")): "error: --output must be a folder that can be written to, ",
        (
            "laws",
            "--output",
            str(tmp_path / "laws.json/x"),
        ): "error: --output must be a folder that can be written to, ",
        ("--draw",): "error: --draw, --quick and --seeds need names of experiments, or --all, got neither\n",
    }.items():
        refused = call(*arguments)
        assert refused.exit_code == 2
        assert refused.stderr.startswith(message)
    with monkeypatch.context() as patch:
        patch.setattr("precond_ref.cli.experiments.find_spec", lambda name: None)
        assert call().stderr.startswith("error: matplotlib is not installed: pip install")
    whole = json.dumps(record | {"options": {}})
    (tmp_path / "laws.json").write_text(whole)
    refused = call("laws", "--quick", "--output", str(tmp_path))
    assert refused.exit_code == 2
    assert (
        refused.stderr == f"error: --quick must not replace the record of a whole run, got one of laws in {tmp_path}\n"
    )
    assert (tmp_path / "laws.json").read_text() == whole
    (tmp_path / "laws.json").write_text(whole[:40])
    for arguments in (("laws", "--draw"), ("dials", "--quick")):
        refused = call(*arguments, "--output", str(tmp_path))
        assert refused.exit_code == 2
        assert refused.stderr.startswith(f"error: {tmp_path / 'laws.json'} is no JSON: ")
    (tmp_path / "laws.json").unlink()
    monkeypatch.setenv("PRECOND_REF_DATA", str(tmp_path))
    refused = call("recommendation", "--quick", "--output", str(tmp_path))
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: recommendation: looked for a9a")
    (tmp_path / "a9a").write_text("hello world")
    refused = call("recommendation", "--quick", "--output", str(tmp_path))
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"error: recommendation: {tmp_path / 'a9a'}, line 1: not 'label index:value")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused = call("language", "--quick", "--output", str(tmp_path))
    assert refused.exit_code == 2
    assert refused.stderr == "error: language: torch is not installed: pip install torch\n"
