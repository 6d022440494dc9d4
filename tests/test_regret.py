"""``precond-ref regret``: what it prints and writes, the comparators, refusals, and online problems."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutation import mutated
from typer.testing import CliRunner

import precond_ref as pr
from precond_ref import cli, regret, theory
from precond_ref.problems import online
from precond_ref.regret import report

DATA = "+1 1:1 3:0.5\n-1 2:1\n-1 1:0.25 2:0.5\n+1 3:1\n-1 2:1 3:0.25\n+1 1:0.5 2:0.25\n+1 2:2\n-1 1:1\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    return lambda *arguments: CliRunner().invoke(cli.application(), ["regret", *(str(a) for a in arguments)])


def total_loss(features: np.ndarray, signs: np.ndarray, x: np.ndarray) -> float:
    return float(np.sum(np.log1p(np.exp(-signs * (features @ x)))))


def test_table_figure_and_json_on_an_adversary(run: Callable[..., Any], tmp_path: Path) -> None:
    result = run("--dimension", 5, "--size", 3, "--rounds", 40, "--lr", 0.7, "--json", "all.json", "--output", "a.svg")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "figure: a.svg\nJSON: all.json\n" in result.output
    assert "<svg" in (tmp_path / "a.svg").read_text()
    data = json.loads((tmp_path / "all.json").read_text(), parse_constant=lambda c: pytest.fail(c))

    # the game again, by hand
    stream = online.adversary("random", (5,), rounds=40)
    grads = np.stack([stream.gradient(t, stream.start, None) for t in range(40)])
    method, x, paid = pr.SAdaGrad(size=3), np.zeros(5), []
    state = method.init(x)
    for g in grads:
        paid.append(g @ x)
        direction, state = method.update(g, state, x)
        x = x - 0.7 * direction
    best = -grads.sum(axis=0) / np.linalg.norm(grads.sum(axis=0))
    assert data["rounds"][-1] == 40
    assert data["comparator"]["point"] == pytest.approx(best, rel=1e-12)
    assert data["regret"][-1] == pytest.approx(np.sum(paid) - np.sum(grads @ best), rel=1e-10)
    assert data["bound"]["statement"] == "sadagrad.regret"
    assert all(value >= allowed for value, allowed in zip(data["bound"]["values"], data["regret"], strict=True))
    (sketch,) = data["sketches"]
    assert sketch["escaped"][-1] == pytest.approx(float(state.sketch.escaped), rel=1e-12)
    assert sketch["spectrum"] == pytest.approx(np.linalg.eigvalsh(grads.T @ grads)[::-1], rel=1e-10)
    assert np.all(np.array(sketch["escaped"]) <= np.array(sketch["escaped_bound"]) * (1 + 1e-12))
    last = [line.split() for line in result.output.splitlines() if line.strip().startswith("40 ")]
    assert last[0][3] == f"{data['regret'][-1]:.5g}"


def test_on_data_the_comparator_is_the_minimizer(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text(DATA)
    for options, free in (((), True), (("--radius", 0.5), False)):
        result = run("--data", "./few.txt", "--method", "AdaGrad", "--lr", 0.5, *options, "--json", "all.json")
        assert result.exit_code == 0, result.output
        data = json.loads((tmp_path / "all.json").read_text())
        features, signs = online.libsvm("./few.txt")
        assert features.shape == (8, 4)
        best, rng = np.array(data["comparator"]["point"]), np.random.default_rng(0)
        least = total_loss(features, signs, best)
        for _ in range(200):
            other = best + 0.1 * rng.standard_normal(4)
            if not free:
                other = other * min(1, 0.5 / np.linalg.norm(other))
            assert total_loss(features, signs, other) >= least - 1e-5
        assert free or np.linalg.norm(best) == pytest.approx(0.5, rel=1e-6)
        assert data["mean_loss"][-1] * 8 - least == pytest.approx(data["regret"][-1], rel=1e-9)
        assert data["bound"]["statement"] == "asgo.row-regret"


@pytest.mark.full
def test_a_name_is_found_in_the_current_folder(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "mine.libsvm").write_text(DATA)
    for folder in (None, elsewhere):
        monkeypatch.delenv("PRECOND_REF_DATA", raising=False)
        if folder is not None:
            monkeypatch.setenv("PRECOND_REF_DATA", str(folder))
        assert "8 rounds" in run("--data", "mine.libsvm", "--size", 2).output
    (elsewhere / "mine.libsvm").write_text("1 1:1\n2 1:1\n")  # the folder of the data is first
    assert "2 rounds" in run("--data", "mine.libsvm", "--size", 2).output


def test_labels_are_of_two_classes(tmp_path: Path) -> None:
    path = tmp_path / "few.txt"
    for low, high in ((-1, 1), (0, 1), (1, 2), (2, 4), (-3, -2)):
        path.write_text(DATA.replace("+1 ", f"{high} ").replace("-1 ", f"{low} "))
        assert online.libsvm(path)[1].tolist() == [1, -1, -1, 1, -1, 1, 1, -1]
    for labels, message in ((("1", "1"), "got 1: 1$"), (("1", "2", "3"), "got 3: 1, 2, 3$"), (range(7), "3, 4, ...$")):
        path.write_text("".join(f"{label} 1:1\n" for label in labels))
        with pytest.raises(ValueError, match=f"logistic regression wants labels of two classes, .*{message}"):
            online.libsvm(path)


@pytest.mark.parametrize(
    "change", [("labels == classes[1]", "labels > 0"), ("len(classes) != 2", "len(classes) > 2"), ("!= 2", "< 2")]
)
def test_planted_bug_in_labels_is_caught(
    change: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online, "signs", mutated(online.signs, change))
    with pytest.raises((AssertionError, IndexError, pytest.fail.Exception)):
        test_labels_are_of_two_classes(tmp_path)


def test_the_comparator_in_a_ball_is_the_same_to_six_digits_from_any_start() -> None:
    rng = np.random.default_rng(0)
    features = np.concatenate([(rng.random((300, 12)) < 0.3) * 1.0, np.ones((300, 1))], axis=1)
    signs = np.where(features @ rng.standard_normal(13) > 0, 1.0, -1.0)
    found = regret.comparator_of_logistic(features, signs, 2.0).point
    slope = (-signs / (1 + np.exp(signs * (features @ found)))) @ features / 300
    along = slope - (slope @ found) / (found @ found) * found
    assert np.linalg.norm(found) == pytest.approx(2, rel=1e-9)
    assert np.linalg.norm(along) < 1e-5 * np.linalg.norm(slope)


def test_without_a_ball_the_comparator_is_said_to_hang_on_the_solver(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text(DATA)
    arguments = ("--data", "./few.txt", "--size", 2)
    assert "no --radius: if some feature comes with one label only" in run(*arguments).output
    assert "no --radius" not in run(*arguments, "--radius", 1).output


def drawn(game: regret.Game) -> tuple[Any, dict[str, np.ndarray]]:
    """Axes of the regret, and its curves by colour."""
    axes = report.figure(game, "").axes[0]
    return axes, {line.get_color(): np.asarray(line.get_ydata()) for line in axes.lines if len(line.get_xdata()) > 2}


def test_the_figure_breaks_the_curve_where_the_regret_is_negative_or_shows_it_there() -> None:
    game = regret.play(pr.SAdaGrad(size=10), online.adversary("random", (20,), rounds=1000), 0.5)
    axes, curves = drawn(game)
    assert axes.get_yscale() == "log"
    assert "negative where its curve is missing" in axes.get_xlabel()
    assert np.array_equal(np.isnan(curves[report.BLUE]), game.regret <= 0)
    assert np.isnan(curves[report.BLUE]).any()
    game = regret.play(pr.SAdaGrad(size=2), online.adversary("against", (5,), rounds=300), 0.5)
    axes, curves = drawn(game)
    assert axes.get_yscale() == "symlog"
    assert np.array_equal(curves[report.BLUE], game.regret)
    assert axes.get_ylim()[0] < game.regret[-1] < 0
    assert f"regret {game.regret[-1]:,.0f}" in {text.get_text() for text in axes.texts}


def test_the_figure_of_one_round_has_no_warning(tmp_path: Path) -> None:
    game = regret.play(pr.SAdaGrad(size=3), online.adversary("random", (4,), rounds=1), 0.5)
    report.figure(game, "one").savefig(tmp_path / "one.png")  # a warning is an error
    assert [axes.get_yscale() for axes in report.figure(game, "one").axes] == ["log", "linear", "log"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--method", "ASGO.theory", "--shape", "4x3", "--adversary", "polar"), "asgo.regret"),
        (("--method", "DASGO.theory", "--shape", "4x3"), "asgo.row-regret"),
        (("--method", "SShampoo", "--shape", "3x4", "--size", 2), "sshampoo.regret"),
        (("--method", "SGD", "--power", 0.5, "--dimension", 4), "sgd.regret"),
        (("--method", "AGD", "--dimension", 3), "agd.regret-measured"),
        (("--method", "FDSON", "--set", "delta=1", "--dimension", 4), None),
        (("--method", "SShampoo", "--dimension", 4, "--size", 2), None),
        (("--method", "SAdaGrad", "--set", "beta2=0.5", "--dimension", 4), None),
        (("--method", "SAdaGrad(beta2=0.5, size=2)", "--dimension", 4), None),
        (("--method", "sadagrad(size=2)", "--dimension", 4), "sadagrad.regret"),
        (("--method", "SShampoo", "--shape", "3x4", "--size", 2, "--set", "tail_decay=0.5"), None),
        (("--method", "AdaGrad", "--shape", "3x4"), "asgo.row-regret"),
    ],
)
@pytest.mark.full
def test_each_method_has_its_bound(run: Callable[..., Any], options: tuple[Any, ...], expected: str | None) -> None:
    result = run(*options, "--rounds", 30, "--json", "all.json", "--output", "a.png")
    assert result.exit_code == 0, result.output
    data = json.loads(Path("all.json").read_text())
    if expected is None:
        assert data["bound"] is None
        assert "none is known" in result.output
    else:
        assert data["bound"]["statement"] == expected
        assert "EXCEEDED" not in result.output
        assert len(data["sketches"]) == (2 if "SShampoo" in options else "sadagrad(size=2)" in options)


@pytest.mark.parametrize(("fields", "shown"), [({}, True), ({"every": 2}, False), ({"tail_decay": 0.5}, False)])
def test_what_escaped_is_shown_where_the_sketch_is_of_all_rounds(fields: dict[str, Any], shown: bool) -> None:
    for shape in ((4,), (4, 3)):
        game = regret.play(pr.SShampoo(size=2, **fields), online.adversary("random", shape, rounds=9), 0.5)
        assert len(game.lost) == shown * len(shape)
        assert any(line.startswith("escaped: ") for line in report.notes(game)) == shown


def test_an_exceeded_bound_is_said() -> None:
    stream = online.adversary("constant", (3,), rounds=30)
    game = regret.play(pr.SAdaGrad(size=2), stream, 1e-3)
    slow = game.run.first(30)
    parts = {name: getattr(slow, name) for name in slow.__dataclass_fields__ if name != "forms"}
    wrong = theory.Run(**{**parts, "rates": np.full(30, 1.0)})  # which was 1e-3
    check = theory.sketchy.regret(wrong, game.comparator.point)
    assert not check.holds
    broken = regret.Game(**{**{n: getattr(game, n) for n in game.__dataclass_fields__}, "checks": [check]})
    assert any("THE BOUND IS EXCEEDED" in line for line in report.notes(broken))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "Nothing"), "no method is called Nothing"),
        (("--method", "Adam,SGD"), "--method takes one method"),
        (("--method", "FDSON"), "FDSON needs delta: 'FDSON(delta=...)'"),
        (("--set", "nonsense"), "--set takes FIELD=VALUE with one of size, beta2"),
        (("--set", "beta2=2"), "beta2 must be finite and >= 0 and <= 1, got 2"),
        (("--method", "ASGO.theory"), "ASGO.theory does not take a parameter of shape (20,); give --shape"),
        (("--shape", "4x3"), "SAdaGrad does not take a parameter of shape (4, 3); leave out --shape"),
        (("--shape", "4,3"), "--shape takes MxN, such as 4x3, got 4,3"),
        (("--adversary", "kind"), "--adversary must be one of random, low rank"),
        (("--rounds", 0), "--rounds must be >= 1, got 0"),
        (("--lr", 0), "--lr must be finite and > 0, got 0.0"),
        (("--lr", "inf"), "--lr must be finite and > 0, got inf"),
        (("--radius", -1), "--radius must be finite and > 0, got -1.0"),
        (("--power", -1), "--power must be finite and >= 0, got -1.0"),
        (("--dimension", 0), "--dimension must be >= 1, got 0"),
        (("--seed", -1), "--seed must be >= 0, got -1"),
        (("--method", "SAdaGrad(3)"), "must be like"),
        (("--method", "SAdaGrad(k=3)"), "SAdaGrad has no field k; it has size, beta2"),
        (("--json", "."), ". is a folder, no file can be written there"),
        (("--data", "./few.txt", "--shape", "4x3", "--seed", 0), "--shape, --seed would be of an adversary"),
        (("--data", "./few.txt", "--rounds", 9), "--rounds must be at most 8, the lines of ./few.txt, got 9"),
        (("--output", "a.txt"), "--output must end in one of"),
        (("--output", "nowhere/a.png"), "there is no folder nowhere"),
        (("--data", "./none"), "no such file: none"),
        (("--adversary", "quadratic", "--method", "SGD", "--lr", 1e6), "the run diverged in round"),
    ],
)
def test_refusals_are_one_line(run: Callable[..., Any], options: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text(DATA)
    result = run(*options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_interrupt(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(regret, "play", interrupted)
    result = run()
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


# ---- online problems ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", online.ADVERSARIES)
@pytest.mark.parametrize("shape", [(4,), (3, 2)])
def test_adversary_depends_on_its_arguments_alone(kind: str, shape: tuple[int, ...]) -> None:
    method = pr.FullAdaGrad() if len(shape) == 1 else pr.ASGO.theory()
    first, second = (
        theory.record(method, online.adversary(kind, shape, rounds=12, seed=3, scale=2.0), 0.5) for _ in range(2)
    )
    assert np.array_equal(first.gradients, second.gradients)
    other = theory.record(method, online.adversary(kind, shape, rounds=12, seed=4, scale=2.0), 0.5)
    assert kind == "cyclic basis" or not np.array_equal(first.gradients, other.gradients)
    assert np.all(np.isfinite(first.gradients))
    assert first.gradients.any()


def check_gradient(value: Any, gradient: Any, x: np.ndarray) -> None:
    """Central differences."""
    step = 1e-6
    g, flat = gradient(x), np.zeros(x.size)
    for i in range(x.size):
        e = np.zeros(x.size)
        e[i] = step
        flat[i] = (value(x + e.reshape(x.shape)) - value(x - e.reshape(x.shape))) / (2 * step)
    assert np.linalg.norm(g.reshape(-1) - flat) <= 1e-6 * max(1.0, float(np.linalg.norm(flat)))


@pytest.mark.parametrize("kind", [*online.SMOOTH, *online.NONSMOOTH])
def test_convex_functions(kind: str) -> None:
    smooth = kind in online.SMOOTH
    objective = (online.smooth if smooth else online.nonsmooth)(kind, (3, 2), 1)
    rng = np.random.default_rng(0)
    assert objective.value(objective.minimizer) == pytest.approx(0, abs=1e-14)
    check_gradient(objective.value, objective.gradient, rng.standard_normal((3, 2)))
    for _ in range(200):
        x, y = objective.minimizer + rng.standard_normal((2, 3, 2)) * 10 ** rng.uniform(-2, 1)
        lower = objective.value(x) + np.sum(objective.gradient(x) * (y - x))
        slack = 1e-9 * (1 + abs(lower))
        assert objective.value(y) >= lower - slack  # convex
        if smooth:
            assert objective.value(y) <= lower + 0.5 * np.sum((y - x) * (objective.curvature @ (y - x))) + slack


@pytest.mark.parametrize("kind", online.NONCONVEX)
def test_nonconvex_functions(kind: str) -> None:
    objective = online.nonconvex(kind, 3, 1)
    rng = np.random.default_rng(0)
    check_gradient(objective.value, objective.gradient, rng.standard_normal(3))
    for _ in range(200):
        x, y = rng.standard_normal((2, 3)) * 10 ** rng.uniform(-2, 1)
        assert objective.value(x) >= 0
        gap = np.linalg.norm(objective.gradient(x) - objective.gradient(y))
        assert gap <= objective.curvature * np.linalg.norm(x - y) * (1 + 1e-9)


@pytest.mark.parametrize("link", online.LINKS)
def test_linear_models(link: str) -> None:
    stream = online.random_linear_model(link, 3, 4, seed=1)
    for t in range(4):
        check_gradient(lambda x, t=t: stream.loss(t, x), lambda x, t=t: stream.gradient(t, x, None), stream.start)


def test_regularised_logistic() -> None:
    objective, per_sample = online.regularised_logistic(12, 3, 1)
    rng = np.random.default_rng(0)
    x = rng.standard_normal(3)
    check_gradient(objective.value, objective.gradient, x)
    assert np.allclose(per_sample(x).mean(axis=0), objective.gradient(x), rtol=1e-14)
    assert np.linalg.norm(objective.gradient(objective.minimizer)) <= 1e-14
    assert min(objective.value(objective.minimizer + rng.standard_normal(3)) for _ in range(100)) > 0


def test_two_layers() -> None:
    net = online.two_layer(20, 3, 4, seed=1, residual=0.25)
    assert np.linalg.norm(net.residual(net.start)) == pytest.approx(0.25, rel=1e-12)
    for i in range(3):
        check_gradient(lambda w, i=i: net.residual(w)[i], lambda w, i=i: net.jacobian(w)[i], net.start)
    z = np.linspace(-3, 3, 20001)
    assert np.max(np.abs(2 * np.tanh(z) * (1 - np.tanh(z) ** 2))) == pytest.approx(net.second_derivative, rel=1e-6)


def test_libsvm_in_file_order(tmp_path: Path) -> None:
    path = tmp_path / "few.txt"
    path.write_text(DATA)
    features, signs = online.libsvm(path)
    assert features[:3].tolist() == [[1, 0, 0.5, 1], [0, 1, 0, 1], [0.25, 0.5, 0, 1]]
    assert signs.tolist() == [1, -1, -1, 1, -1, 1, 1, -1]
    stream = online.logistic(path, rows=2)
    assert stream.rounds == 2
    assert stream.loss(1, np.array([0, 2.0, 0, 1.0])) == pytest.approx(math.log1p(math.exp(3)))
    with pytest.raises(ValueError, match="rows must be at most 8"):
        online.libsvm(path, rows=9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: online.adversary("random", (2, 2, 2), rounds=3), "shape must have one or two axes"),
        (lambda: online.smooth("L1", (2, 2)), "kind must be one of 'least squares'"),
        (lambda: online.linear_model("logistic", np.zeros((2, 2)), np.zeros(3)), "features must be (rounds, d)"),
        (lambda: regret.play(pr.SGD(), online.random_linear_model("squared", 2, 3), 0.1), "needs a comparator"),
    ],
)
def test_wrong_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", "[(]").replace(")", "[)]")):
        call()
