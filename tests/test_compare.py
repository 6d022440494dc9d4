"""Comparison of methods: numbers against loops written here, ranking, learning rates and their search, the record."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib import colors
from mutation import mutated

import precond_ref as pr
from precond_ref import compare, problems, registry
from precond_ref.compare import rates, report, runs

U64 = 2.0**-53


def entrant(method: pr.Method, name: str = "SGD") -> runs.Entrant:
    return runs.Entrant(name=name, method=method, chosen={}, to_adam=(), share=1.0, state_bytes_per_parameter=0.0)


def done(name: str, loss: float, metric: float = 0.5, batch_loss: float = 1.0, seed: int = 0) -> runs.Training:
    """A finished run with these results."""
    return runs.Training(
        entrant=entrant(pr.SGD(), name),
        lr=0.1,
        lr_source="given",
        seed=seed,
        batch_losses=[batch_loss],
        steps=[0, 1],
        train_losses=[1.0, loss],
        metrics=[0.1, metric],
        step_ms=[1.0],
    )


def comparison(*finished: runs.Training) -> compare.Comparison:
    """A comparison on digits-softmax that has these results."""
    return compare.Comparison(
        problems=[problems.load("digits-softmax", seed=seed) for seed in sorted({run.seed for run in finished})],
        backend="numpy",
        steps=1,
        planned=list(finished),
        left_out={},
        finished=list(finished),
    )


# ---- numbers against loops written here -----------------------------------------------------------------------------


def sgd_loop(problem: problems.Problem, lr: float, steps: int) -> tuple[list[float], dict[str, np.ndarray]]:
    """Batch losses and last parameters of gradient descent."""
    params, losses = problem.init(), []
    for step in range(steps):
        loss, grads = problem.loss_and_grad(params, problem.batch(step))
        losses.append(float(loss))
        params = {key: value - lr * grads[key] for key, value in params.items()}
    return losses, params


def core_loop(problem: problems.Problem, optimizer: pr.Optimizer, steps: int) -> tuple[list[float], dict[str, Any]]:
    """The same with an optimizer."""
    params, losses = problem.init(), []
    state = optimizer.init(params)
    for step in range(steps):
        loss, grads = problem.loss_and_grad(params, problem.batch(step))
        losses.append(float(loss))
        params, state = optimizer.step(params, grads, state)
    return losses, params


BIASES = tuple((f"fc{i}/weight", f"fc{i}/bias") for i in (1, 2, 3))
LOOPS: dict[str, Any] = {
    "SGD": (0.25, sgd_loop),
    "DASGO": (0.25, lambda problem, lr, steps: core_loop(problem, pr.Optimizer(pr.DASGO(), lr=lr), steps)),
    "MBF": (1e-4, lambda problem, lr, steps: core_loop(problem, pr.Optimizer(pr.MBF(), lr=lr, join=BIASES), steps)),
}


def check_numbers(name: str) -> None:
    """The same operations, the same bits."""
    steps, (lr, loop) = 6, LOOPS[name]
    made = compare.prepare("digits-mlp", methods=name, steps=steps, dtype="float64", seed=3, lr=[f"{name}={lr}"])
    made.train()
    (run,) = made.finished
    problem = problems.load("digits-mlp", dtype="float64", seed=3)
    losses, params = loop(problem, lr, steps)
    assert run.batch_losses == losses
    assert run.final_loss == float(problem.loss(params))
    assert run.final_metric == float(problem.metric(params))
    assert run.steps == [0, 1, 2, 3, 4, 5, 6]
    assert run.train_losses[0] == float(problem.loss(problem.init()))


@pytest.mark.parametrize("name", LOOPS)
def test_numbers_are_those_of_a_loop_written_here(name: str) -> None:
    check_numbers(name)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("train", "self.problem.batch(step)", "self.problem.batch(0)"),
        ("train", "self.problem.batch(step)", "None"),
        ("train", "lr=run.lr", "lr=0.2"),
        ("train", "join=run.entrant.join", "join=()"),
        ("train", "(step + 1) % every", "step % every"),
        ("train", "params, state = update", "params, _ = update"),
        ("_look", "self.problem.train or None", "self.problem.batch(0)"),
        ("_look", "len(run.step_ms)", "len(run.step_ms) + 1"),
    ],
)
def test_numbers_notice(name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs.Trainer, name, mutated(getattr(runs.Trainer, name), (old, new)))
    with pytest.raises(AssertionError):
        check_training()


def check_training() -> None:
    check_numbers("DASGO")
    check_numbers("MBF")
    made = compare.prepare("quadratic", methods="SGD", steps=103)
    made.train()
    (run,) = made.finished
    assert run.steps == [*range(0, 103, 2), 103]
    assert len(run.train_losses) == len(run.metrics) == len(run.steps)
    assert len(run.batch_losses) == 103


def test_curve_points() -> None:
    check_training()


STATE = {  # digits-mlp: weights (32, 64), (32, 32), (10, 32), biases 32, 32, 10; 3392 + 74 entries
    "SGD": 0,
    "Adam": 2 * 3466,
    "RMSProp": 3466,
    "AdaGrad": 3466,
    "AGD": 2 * 3466,
    "ASGO": 3392 + 32**2 + 32**2 + 10**2 + 2 * 74,
    "ASGO.theory": 32**2 + 32**2 + 10**2 + 2 * 74,
    "DASGO": 3392 + 64 + 32 + 32 + 2 * 74,
    "Muon": 3392 + 2 * 74,
    "Shampoo": (32**2 + 64**2) + (32**2 + 32**2) + (10**2 + 32**2) + 2 * 74,
}


def check_state_bytes() -> None:
    for dtype, size in (("float32", 4), ("float64", 8)):
        chosen, _ = runs.choose(runs.load_problem("digits-mlp", "numpy", dtype, 0), list(STATE))
        found = {e.name: e.state_bytes_per_parameter for e in chosen}
        assert found == {name: numbers * size / 3466 for name, numbers in STATE.items()}


def test_state_bytes() -> None:
    check_state_bytes()


def _flat_only(tree: Any) -> int:
    return sum(int(getattr(x, "nbytes", 0)) for x in tree)


def _entries(tree: Any) -> int:
    return sum(map(_entries, tree)) if isinstance(tree, tuple) else int(getattr(tree, "size", 0)) * 4


def _with_counters(tree: Any) -> int:
    return sum(map(_with_counters, tree)) if isinstance(tree, tuple) else int(getattr(tree, "nbytes", 4))


@pytest.mark.parametrize("mutant", [_flat_only, _entries, _with_counters])
def test_state_bytes_notices(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "array_bytes", mutant)
    with pytest.raises(AssertionError):
        check_state_bytes()


def test_share_and_what_goes_to_adam() -> None:
    chosen, left_out = runs.choose(runs.load_problem("digits-mlp", "numpy", "float32", 0))
    by_name = {e.name: e for e in chosen}
    assert by_name["ASGO"].to_adam == ("fc1/bias", "fc2/bias", "fc3/bias")
    assert by_name["ASGO"].share == pytest.approx(3392 / 3466, rel=U64 * 4, abs=0)
    assert by_name["Adam"].to_adam == ()
    assert by_name["Adam"].share == 1.0
    # 1024, 320, 32, 32 and 10 entries, squared, and two averages of the 2048 that Adam gets, over 3466
    assert left_out["FullAdaGrad"] == "keeps 334 numbers per entry, runs only if --methods names it"
    assert left_out["SAdaGrad"] == "takes 2.1% of the entries, runs only if --methods names it"
    named, _ = runs.choose(runs.load_problem("digits-mlp", "numpy", "float32", 0), ["FullAdaGrad", "SAdaGrad"])
    assert [e.to_adam for e in named] == [("fc1/weight",), ("fc1/weight", "fc2/weight", "fc3/weight")]


def check_time() -> None:
    class Slow(pr.SGD):
        def update(self, *args: Any, **kwargs: Any) -> Any:
            time.sleep(0.002)
            return super().update(*args, **kwargs)

    def loss_and_grad(params: Any, batch: Any) -> Any:
        time.sleep(0.2)
        return np.asarray(1.0), params

    slow = SimpleNamespace(
        init=lambda: {"x": np.ones(2)}, batch=lambda step: None, loss_and_grad=loss_and_grad, loss=None, metric=None
    )
    run = runs.Training(entrant=entrant(Slow()), lr=0.1, lr_source="given")
    runs.Trainer(slow, "numpy").train(run, 4, curves=False)  # type: ignore[arg-type]
    assert len(run.step_ms) == 3
    assert 2.0 <= run.median_ms < 200.0  # one that counted the gradient would take 202 or more


def test_time_is_the_optimizers_step_alone() -> None:
    check_time()


@pytest.mark.parametrize(
    "changes",
    [
        {
            "            start = time.perf_counter()\n": "",
            "for step in range(steps):": "for step in range(steps):\n            start = time.perf_counter()",
        },
        {"run.step_ms.append(1e3 * (": "run.step_ms.append(1e0 * ("},
        {"del run.step_ms[: len(run.step_ms) > 1]": "pass"},
    ],
    ids=["gradient counted", "seconds", "first step counted"],
)
def test_time_notices(changes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs.Trainer, "train", mutated(runs.Trainer.train, *changes.items()))
    with pytest.raises(AssertionError):
        check_time()


@pytest.mark.parametrize(("times", "median"), [([3.0, 1.0, 2.0], 2.0), ([4.0, 1.0, 2.0, 30.0], 3.0), ([5.0], 5.0)])
def test_median(times: list[float], median: float) -> None:
    run = done("SGD", 1.0)
    run.step_ms = times
    assert run.median_ms == median


# ---- fairness and determinism ---------------------------------------------------------------------------------------


def curves(**settings: Any) -> dict[str, list[float]]:
    made = compare.prepare(**settings)
    made.train()
    return {run.entrant.name: run.batch_losses for run in made.finished}


def test_same_seed_same_losses_and_another_seed_others() -> None:
    settings: dict[str, Any] = {"problem": "digits-softmax", "methods": "ASGO,Adam", "steps": 4}
    first = curves(**settings, seed=5)
    assert curves(**settings, seed=5) == first
    other = curves(**settings, seed=6)
    assert all(a != b for name in first for a, b in zip(first[name], other[name], strict=True))


def test_all_start_alike_and_see_the_same_batches() -> None:
    names = [e.name for e in runs.choose(problems.load("digits-mlp"))[0]]
    still = curves(problem="digits-mlp", steps=3, lr=[f"{name}=0" for name in names])
    assert list(still) == names
    assert len({tuple(losses) for losses in still.values()}) == 1
    assert len(set(still["SGD"])) == 3


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_backends_agree_in_float64(library: str) -> None:
    pytest.importorskip(library)
    steps = 4
    settings: dict[str, Any] = {"problem": "digits-softmax", "methods": "DASGO", "steps": steps}
    settings.update(dtype="float64", lr=["DASGO=0.125"])
    here, there = curves(**settings), curves(**settings, backend=library)
    assert here.keys() == there.keys()
    for name in here:  # as in the test of the loops: sums of 100 terms, amplified by less than 10 in each step
        np.testing.assert_allclose(there[name], here[name], rtol=100 * U64 * 10**steps, atol=0)
    single = curves(**{**settings, "dtype": "float32"}, backend=library)
    for name in here:
        gap = np.abs(np.asarray(single[name]) / here[name] - 1.0)
        assert 0 < gap.max() < 100 * 2.0**-24 * 10**steps


def test_jax_compiles_in_the_first_step_only() -> None:
    jax = pytest.importorskip("jax")
    traced = []

    class Counted(pr.SGD):
        def update(self, grad: Any, *args: Any, **kwargs: Any) -> Any:
            traced.append(isinstance(grad, jax.core.Tracer))
            return super().update(grad, *args, **kwargs)

    trainer = runs.Trainer(runs.load_problem("quadratic", "jax", "float32", 0), "jax")
    run = runs.Training(entrant=entrant(Counted()), lr=0.1, lr_source="given")
    seen: list[int] = []
    trainer.train(run, 5, on_step=lambda loss: seen.append(len(traced)))
    assert all(traced)
    assert seen[1:] == [len(traced)] * 4
    assert len(run.step_ms) == 4


def test_cupy_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(is_available=lambda: False))
    with pytest.raises(compare.UsageError, match="finds no GPU"):
        compare.prepare("quadratic", backend="cupy")


def test_cupy_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    stream = SimpleNamespace(synchronize=lambda: waits.append(1))
    fake = SimpleNamespace(cuda=SimpleNamespace(get_current_stream=lambda: stream))
    monkeypatch.setitem(sys.modules, "cupy", fake)
    run = runs.Training(entrant=entrant(pr.SGD()), lr=0.1, lr_source="given")
    runs.Trainer(problems.load("quadratic"), "cupy").train(run, 3)
    assert len(waits) == 2 * 3


# ---- ranking --------------------------------------------------------------------------------------------------------


def check_ranking() -> None:
    made = comparison(
        done("b", 0.2, metric=0.9),
        done("nan", math.nan),
        done("a", 0.1, metric=0.8),
        done("early", 0.01, batch_loss=math.inf),
        done("c", 0.3, metric=0.95),
    )
    assert [run.entrant.name for run in made.ranked] == ["a", "b", "c", "nan", "early"]
    assert report.notes(made)[0] == "a wins: final train loss 0.1 against 0.2 of b. Best test accuracy: 0.95 (c)."


def test_ranking() -> None:
    check_ranking()


RANKINGS = {
    "largest first": lambda made: sorted(made.finished, key=lambda run: (run.diverged, -run.final_loss)),
    "by the metric": lambda made: sorted(made.finished, key=lambda run: (run.diverged, -run.final_metric)),
    "diverged runs by their loss": lambda made: sorted(made.finished, key=lambda run: run.final_loss),
    "diverged runs hidden": lambda made: [run for run in RANK(made) if not run.diverged],
    "order of training": lambda made: made.finished,
}
RANK = compare.Comparison.ranked.fget


@pytest.mark.parametrize("mutant", RANKINGS.values(), ids=RANKINGS)
def test_ranking_notices(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare.Comparison, "ranked", property(mutant))
    with pytest.raises(AssertionError):
        check_ranking()


def test_smaller_metric_can_be_better() -> None:
    made = comparison(done("a", 0.1, metric=3.0), done("b", 0.2, metric=2.0))
    made.problems = [problems.load("digits-autoencoder")]
    assert report.notes(made)[0].endswith("Best test squared error per image: 2 (b).")


def test_divergence_ends_a_run_and_is_shown() -> None:
    made = compare.prepare("quadratic", methods="SGD,Adam", steps=40, lr=["SGD=1e30", "Adam=0.125"])
    made.train()
    assert [each.entrant.name for each in made.ranked] == ["Adam", "SGD"]
    assert made.ranked[1].diverged
    (sgd,) = made.ranked[1].runs
    assert not math.isfinite(sgd.batch_losses[-1])
    assert len(sgd.batch_losses) == sgd.steps[-1] + 1 < 40
    cells = list(report.table(made).columns[3].cells)
    assert cells[1] == f"diverged at {len(sgd.batch_losses)}"
    drawn = [text.get_text() for text in report.figure(made).axes[0].texts]
    assert drawn[1] == "diverged: SGD"
    made.finished = [sgd]
    assert report.notes(made)[0] == "Every run diverged."


# ---- learning rates -------------------------------------------------------------------------------------------------


def test_rates_are_given_else_recorded_else_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = {"SGD": {"lr": 0.5}, "Adam": {"lr": 0.25}, "AGD": {"lr": None}}
    monkeypatch.setattr(rates, "record", lambda: {"quadratic": {"methods": methods}})
    chosen = "SGD,Adam,AGD,RMSProp,Adam(beta2=0.5),SGD(momentum=0.25),SGD(momentum=0.5)"
    made = compare.prepare("quadratic", methods=chosen, lr=["sgd=0.125", "SGD( momentum=0.5)=0.75"])
    assert {run.entrant.name: (run.lr, run.lr_source) for run in made.planned} == {
        "Adam(beta2=0.5)": (0.25, "default fields"),
        "SGD(momentum=0.25)": (0.125, "given"),
        "SGD(momentum=0.5)": (0.75, "given"),
        "SGD": (0.125, "given"),
        "Adam": (0.25, "recorded"),
        "AGD": (0.01, "fallback"),
        "RMSProp": (0.01, "fallback"),
    }


def test_notes_say_where_rates_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = {"steps": 7, "seeds": [101, 102], "methods": {"Adam": {"lr": 0.25}}}
    for module in (rates, report):
        monkeypatch.setattr(module, "record", lambda: {"quadratic": searched})
    made = compare.prepare("quadratic", methods="SGD,Adam,AGD,Adam(beta2=0.5)", steps=2, lr=["SGD=0.125"])
    made.train()
    (line,) = [line for line in report.notes(made) if line.startswith("lr:")]
    assert line == (
        "lr: best of the recorded grid search, the same for every method (7 steps, not 2, seeds 101 and 102; repeat it "
        "with --tune); recorded for other fields, not tuned for these: Adam(beta2=0.5); given for SGD; 0.01, not "
        "tuned, for AGD."
    )
    searched["steps"] = 2
    assert "(2 steps, seeds 101 and 102;" in " ".join(report.notes(made))
    searched["methods"]["Adam"]["rates"] = [0.1] * 12
    assert "(2 steps, seeds 101 and 102, 12 rates each;" in " ".join(report.notes(made))


def valley(best: float, floor: float = 1.0) -> Any:
    """End losses of two seeds with the least mean at the half decade ``best``; infinite far above it."""

    def measure(lr: float) -> list[float]:
        distance = 2 * math.log10(lr) - best
        return [math.inf] * 2 if distance > 6 else [floor + distance**2, floor + 0.5 * distance**2]

    return measure


def check_search(search: Any) -> None:
    for best, rate in ((-4, 0.01), (-8, 1e-4), (-13, 3.162e-7), (1, 3.162), (5, 316.2)):
        found = search(valley(best))
        assert found["lr"] == rate
        tried = found["rates"]
        assert tried == sorted(tried)
        assert {rates.rate(k) for k in rates.GRID} <= set(tried)
        assert tried[0] < rate < tried[-1]
        assert len(tried) == len(found["losses"])
        at = tried.index(rate)
        assert found["losses"][at] == [1.0, 1.0]
        assert found["losses"][at + 1] != found["losses"][at]
    below = search(lambda lr: [lr, lr])
    assert below["lr"] == below["rates"][0] == 1e-8
    above = search(lambda lr: [1 / lr, 1 / lr])
    assert above["lr"] == above["rates"][-1] == 1e5
    none = search(lambda lr: [math.nan, math.inf])
    assert none["lr"] is None
    assert none["losses"] == [[None, None]] * len(rates.GRID)
    one_seed = search(lambda lr: [0.0, 9.0] if lr == 0.1 else [1.0, 1.0])
    assert one_seed["lr"] != 0.1


def test_search() -> None:
    check_search(rates.search)


@pytest.mark.parametrize(
    "mutation",
    [
        ("seen[following] = measure(rate(following))", "break"),  # never widens
        ("best - 1 if best == min(seen) else best + 1", "best + 1"),  # widens upwards only
        ("key=lambda k: sum(seen[k])", "key=lambda k: -sum(seen[k])"),
        ("key=lambda k: sum(seen[k])", "key=lambda k: min(seen[k])"),  # the luckier seed
        ("rate(best) if", "rate(best + 1) if"),
        ("sorted(seen.items())", "list(seen.items())"),
        ("or not LIMITS[0] <= following <= LIMITS[1]", "or following > 2"),
    ],
    ids=["never widens", "upwards only", "worst", "luckier seed", "off by one", "unsorted", "stops early"],
)
def test_search_notices(mutation: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_search(mutated(rates.search, mutation))


def test_end_loss() -> None:
    assert rates.end_loss([9.0] * 18 + [1.0, 2.0]) == 1.5
    assert rates.end_loss([3.0, 2.0]) == 2.0
    assert rates.end_loss([1.0, math.nan]) == math.inf


def test_tune_records_what_a_loop_written_here_finds(recorded: Any) -> None:
    part = compare.tune("digits-softmax", ["SGD"], 12)
    assert json.loads(recorded.read_text()) == {"digits-softmax": part}
    assert {key: part[key] for key in ("steps", "seeds", "batch_size", "dtype")} == {
        "steps": 12,
        "seeds": [101, 102],
        "batch_size": 100,
        "dtype": "float32",
    }
    entry = part["methods"]["SGD"]
    assert entry["fields"] == "SGD(momentum=0.0, nesterov=False)"
    ends = []
    for lr in entry["rates"]:
        ends.append([sgd_loop(problems.load("digits-softmax", seed=seed), lr, 12)[0][-1] for seed in (101, 102)])
    assert entry["losses"] == [[float(f"{x:.5g}") for x in pair] for pair in ends]
    assert entry["lr"] == entry["rates"][int(np.argmin(np.sum(ends, axis=1)))]


def test_tune_changes_only_what_it_is_told(recorded: Any) -> None:
    compare.tune("quadratic", ["SGD", "Adam"], 6)
    before = json.loads(recorded.read_text())
    seen: list[tuple[str, int, int]] = []
    lrs: list[float] = []
    part = compare.tune(
        "quadratic", ["AGD"], on_method=lambda *what: seen.append(what), on_rate=lambda lr, loss: lrs.append(lr)
    )
    assert part["steps"] == 6
    assert seen == [("AGD", 1, 1)]
    assert sorted(lrs) == part["methods"]["AGD"]["rates"]
    after = json.loads(recorded.read_text())
    assert after["quadratic"]["methods"].keys() == {"SGD", "Adam", "AGD"}
    del after["quadratic"]["methods"]["AGD"]
    assert after == before
    compare.tune("matrix-quadratic", ["SGD"], 3)
    assert json.loads(recorded.read_text())["quadratic"] == {**part}
    with pytest.raises(compare.UsageError, match="was searched with steps 6, seeds"):
        compare.tune("quadratic", ["SGD"], 7)
    with pytest.raises(compare.UsageError, match="nothing to tune on quadratic: ASGO takes none of the parameters"):
        compare.tune("quadratic", ["ASGO"])


def test_tuning_all_methods_at_other_steps_starts_anew(recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compare.tune("quadratic", ["SGD", "Adam"], 6)
    monkeypatch.setattr(runs, "constructors", lambda: {"SGD": pr.SGD})
    part = compare.tune("quadratic", None, 3)
    assert part["steps"] == 3
    assert part["methods"].keys() == {"SGD"}


def test_tune_takes_by_default_the_problems_steps(recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "MOST_STEPS", 5)
    assert compare.tune("digits-softmax", ["SGD"])["steps"] == 5


# ---- the record that is shipped -------------------------------------------------------------------------------------


def audit(problem: str, part: dict[str, Any]) -> None:
    """What must be true of a part of the record."""
    assert set(part) == {"steps", "seeds", "batch_size", "dtype", "methods"}
    assert part["seeds"] == [101, 102]
    assert 0 not in part["seeds"]
    samples = part["batch_size"] or {"matrix-regression": 512}.get(problem)
    makers = registry.constructors()
    for name, entry in part["methods"].items():
        repeat = f"repeat `precond-ref compare --tune --problem {problem} --methods {name}`"
        assert entry["fields"] == repr(makers[name](**runs.fields_for(makers[name], samples))), repeat
        tried = entry["rates"]
        assert tried == sorted(tried), name
        assert {rates.rate(k) for k in rates.GRID} <= set(tried), name
        assert all(len(losses) == 2 for losses in entry["losses"]), name
        means = [math.inf if None in losses else sum(losses) / 2 for losses in entry["losses"]]
        best = tried.index(entry["lr"])
        assert means[best] <= min(means) * (1 + 1e-4), name  # losses have five digits
        limits = (rates.rate(rates.LIMITS[0]), rates.rate(rates.LIMITS[1]))
        assert tried[0] < entry["lr"] < tried[-1] or entry["lr"] in limits, name


def test_the_record_is_sound() -> None:
    shipped = rates.record()
    assert {"digits-softmax", "digits-mlp", "digits-autoencoder"} <= shipped.keys() <= problems.list_problems().keys()
    for problem, part in shipped.items():
        audit(problem, part)


def test_the_audit_notices() -> None:
    def changed(change: Any) -> dict[str, Any]:
        part = json.loads(json.dumps(rates.record()["digits-mlp"]))
        change(part, part["methods"]["ASGO"])
        return part

    changes = [
        lambda part, entry: part.update(seeds=[0, 1]),
        lambda part, entry: part.pop("steps"),
        lambda part, entry: entry.update(fields=entry["fields"].replace("0.8", "0.9")),
        lambda part, entry: entry.update(lr=entry["rates"][1]),
        lambda part, entry: entry.update(rates=entry["rates"][::-1]),
        lambda part, entry: entry["losses"].__setitem__(2, [1.0]),
        lambda part, entry: entry["losses"].__setitem__(0, [0.0, 0.0]),
        lambda part, entry: (entry["rates"].pop(0), entry["losses"].pop(0)),
    ]
    for change in changes:
        with pytest.raises((AssertionError, KeyError)):
            audit("digits-mlp", changed(change))


def test_the_record_repeats() -> None:
    entry = rates.record()["quadratic"]["methods"]["SGD"]
    at = entry["rates"].index(0.1)
    steps = rates.record()["quadratic"]["steps"]
    ends = [rates.end_loss(sgd_loop(problems.load("quadratic", seed=s), 0.1, steps)[0]) for s in (101, 102)]
    # Five digits are recorded (relative error 5e-5); gradient descent contracts, so that float32 adds at most its
    # unit roundoff times the condition number 1e3, twice.
    np.testing.assert_allclose(entry["losses"][at], ends, rtol=5e-5 + 2 * 1e3 * 2.0**-24, atol=0)


# ---- who takes part -------------------------------------------------------------------------------------------------


def test_presets_take_part() -> None:
    names = list(registry.constructors())
    assert names[names.index("ASGO") + 1] == "ASGO.theory"
    assert repr(registry.constructors()["ASGO.theory"]()) == repr(pr.ASGO.theory())


def test_fields_that_a_comparison_sets() -> None:
    def sized(size: int, batch_size: float = 1.0, depth: int = 2) -> pr.Method:
        raise AssertionError

    assert runs.fields_for(sized, 100) == {"size": 16, "batch_size": 100.0}
    assert runs.fields_for(sized, None) == {"size": 16}
    assert runs.fields_for(pr.SGD, 100) == {}
    assert runs.fields_for(lambda size=4: None, 100) == {}  # type: ignore[misc]
    for name, batch_size in (("digits-mlp", 100.0), ("matrix-regression", 512.0), ("matrix-quadratic", 1.0)):
        made = compare.prepare(name, methods="RFAdamW,SShampoo,SGD", steps=1)
        fields = {run.entrant.name: run.entrant.method for run in made.planned}
        assert fields["RFAdamW"].batch_size == batch_size
        assert fields["SShampoo"].size == 16
        made.train()
        settings = "size=16 for SShampoo"
        if batch_size != 1:
            settings = " and ".join([f"batch_size={batch_size:g} for RFAdamW", settings])
        (line,) = [line for line in report.notes(made) if line.startswith("fields")]
        assert sorted(re.findall(r"\S+=\d+ for \w+", line)) == sorted(settings.split(" and "))


def test_a_method_without_defaults_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def sized(depth: int, beta: float = 0.5) -> pr.Method:
        raise AssertionError

    for module in (registry, runs):
        monkeypatch.setattr(module, "constructors", lambda: {"SGD": pr.SGD, "Sized": sized})
    made = compare.prepare("quadratic")
    assert made.left_out == {"Sized": "has no default for depth"}
    with pytest.raises(compare.UsageError, match="on quadratic, Sized has no default for depth; without --methods"):
        compare.prepare("quadratic", methods="Sized")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"problem": "nothing"}, "no problem is called 'nothing'; there are quadratic, "),
        ({"methods": "ASGO,Nothing, Nix"}, "no method is called Nothing; there are Adafactor, "),
        ({"methods": " ,"}, "no method is named; there are Adafactor"),
        ({"problem": "quadratic", "methods": "Muon"}, "on quadratic, Muon takes none of the parameters; without"),
        ({"backend": "tensorflow"}, "no backend is called tensorflow; there are numpy, cupy, torch, jax"),
        ({"dtype": "float16"}, "dtype must be one of 'float32', 'float64', got 'float16'"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"target": math.nan}, "--target must be finite, got nan"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"lr": ["Adam"]}, "--lr wants METHOD=VALUE with a finite value >= 0, such as Adam=0.01, got Adam"),
        ({"lr": ["Adam=fast"]}, "--lr wants METHOD=VALUE"),
        ({"lr": ["Adam=nan"]}, "--lr wants METHOD=VALUE"),
        ({"lr": ["Adam=inf"]}, "--lr wants METHOD=VALUE"),
        ({"lr": ["Adam=-1"]}, "--lr wants METHOD=VALUE"),
        ({"lr": ["Nix=1"]}, "--lr Nix=1: Nix does not take part; there are Adafactor, "),
        ({"methods": "SGD", "lr": ["Adam=1"]}, "--lr Adam=1: Adam does not take part; there are SGD"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(compare.UsageError, match=re.escape(message)) as caught:
        compare.prepare(**settings)
    assert "\n" not in str(caught.value)


def test_data_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRECOND_REF_DATA", raising=False)
    with pytest.raises(compare.UsageError, match="PRECOND_REF_DATA"):
        compare.prepare("mnist-mlp")


@pytest.mark.parametrize(("library", "extra"), [("torch", "torch"), ("jax", "jax"), ("cupy", "cuda12")])
def test_a_backend_that_is_not_installed(library: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(compare.UsageError, match=re.escape(f'not installed: pip install "precond-ref[{extra}]"')):
        compare.prepare("quadratic", backend=library)


# ---- figure ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight() -> compare.Comparison:
    """More runs than have a colour."""
    made = compare.prepare("digits-softmax", steps=4, methods="SGD,Adam,AdaGrad,Muon,DASGO,AGD,RMSProp,DASGO.theory")
    made.train()
    return made


def check_figure(module: Any, made: compare.Comparison) -> None:
    """Every run, in the order of the ranking, the best in colours of their own and in front."""
    drawn = module.figure(made)
    loss, metric = drawn.axes
    assert loss.get_yscale() == "log"
    assert metric.get_yscale() == "linear"
    assert loss.texts[-1].get_text() == f"{len(made.ranked) - report.BEST} others in grey"
    for rank, run in enumerate(made.ranked):
        np.testing.assert_array_equal(loss.lines[rank].get_xydata(), np.transpose([run.steps, run.train_losses]))
        np.testing.assert_array_equal(metric.lines[rank].get_xydata(), np.transpose([run.steps, run.metrics]))
        assert loss.lines[rank].get_color() == metric.lines[rank].get_color()
        if rank >= report.BEST:
            continue
        assert loss.texts[rank].get_text() == f"{rank + 1}  {run.entrant.name}  {run.final_loss:.3g}"
        tie = loss.texts[rank].arrow_patch.get_edgecolor()
        assert tie == colors.to_rgba(loss.lines[rank].get_color())
    *labels, _ = loss.texts
    heights = [text.xyann[1] for text in labels]
    assert np.all(np.diff(heights) >= report.GAP * (1 - 1e-9))
    assert heights[-1] <= 1
    drawn_colours = [line.get_color() for line in loss.lines]
    texts = [text.get_color() for text in labels]
    assert len(set(drawn_colours[: report.BEST])) == report.BEST  # no colour for two of the best
    assert texts == drawn_colours[: report.BEST]
    assert {*drawn_colours[report.BEST :]} == {report.GREY}
    front = [line.get_zorder() for line in loss.lines]
    assert front == sorted(front, reverse=True)  # a better run is drawn over a worse one
    assert metric.get_title(loc="left") == "test accuracy"


def test_figure_shows_every_run_in_the_order_of_the_ranking(eight: compare.Comparison) -> None:
    check_figure(report, eight)


@pytest.mark.parametrize(
    "change",
    [
        ("COLOURS[rank] if best else GREY", "COLOURS[rank % len(COLOURS)]"),
        ("COLOURS[rank] if best else GREY", "COLOURS[rank // 2] if best else GREY"),
        ("3 - rank / len(results)", "2 + rank / len(results)"),
        ("color=COLOURS[rank],", "color=GREY_TEXT,"),
        ('{**tie, "color": COLOURS[rank]}', "tie"),
        ("axes.plot(each.steps, median, **style)", "axes.plot(each.steps, median)"),
        ("heights[-1] + GAP", "heights[-1]"),
        (" - max(0.0, heights[-1] - 1.0)", " + 0.5"),
    ],
)
def test_planted_bug_in_the_figure_is_caught(change: tuple[str, str], eight: compare.Comparison) -> None:
    with pytest.raises(AssertionError):
        check_figure(mutated(report, change), eight)


# ---- several seeds --------------------------------------------------------------------------------------------------


def check_seeds(module: Any = report) -> None:
    """Each seed is the run of this seed alone; numbers are medians, bands least and largest, whatever the order."""
    settings: dict[str, Any] = {"problem": "digits-softmax", "methods": "SGD,Adam", "steps": 6}
    made = compare.prepare(**settings, seed=3, seeds=3)
    made.train()
    alone = []
    for seed in (3, 4, 5):
        one = compare.prepare(**settings, seed=seed)
        one.train()
        alone.append({run.entrant.name: run for run in one.finished})
    assert [(run.entrant.name, run.seed) for run in made.finished] == [
        (name, seed) for name in ("SGD", "Adam") for seed in (3, 4, 5)
    ]
    shades = iter(module.figure(made).axes[0].collections)
    for each in made.ranked:
        theirs = [runs_[each.entrant.name] for runs_ in alone]
        assert [run.batch_losses for run in each.runs] == [run.batch_losses for run in theirs]
        assert each.final_loss == np.median([run.final_loss for run in theirs])
        assert each.final_metric == np.median([run.final_metric for run in theirs])
        curves = np.array([run.train_losses for run in theirs])
        assert each.train_losses == list(np.median(curves, axis=0))
        outline = next(shades).get_paths()[0].vertices
        for step, column in zip(each.steps, curves.T, strict=True):
            heights = outline[outline[:, 0] == step][:, 1]
            assert (heights.min(), heights.max()) == (column.min(), column.max())
    text = list(report.table(made).columns[4].cells)
    finals = [run.final_loss for run in made.ranked[0].runs]
    assert text[0] == f"{min(finals):.4g} to {max(finals):.4g}"
    data = report.as_json(made)
    assert data["seeds"] == [3, 4, 5]
    assert [run["seed"] for run in data["results"][0]["runs"]] == [3, 4, 5]
    assert "median of 3 seeds (3 to 5)" in report.heading(made)
    assert module.figure(made).axes[0].texts[-1].get_text() == "bands: least to largest"


def test_several_seeds() -> None:
    check_seeds()


@pytest.mark.parametrize(
    ("subject", "name", "change"),
    [
        (compare, "prepare", ("dtype, each) for each", "dtype, seed) for each")),
        (compare, "prepare", ("range(seed, seed + seeds))", "range(seeds))")),
        (rates, "planned", ("lr_source=source, seed=seed", "lr_source=source, seed=seeds[0]")),
        (runs.Result, "curve", ("statistics.median(each)", "statistics.mean(each)")),
        (runs.Result, "curve", ("max(each)", "statistics.median(each)")),
        (report, "_label", ("any(len(each.runs) > 1 for each in best)", "False")),
    ],
)
def test_planted_bug_of_the_seeds_is_caught(
    subject: Any, name: str, change: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = mutated(getattr(subject, name), change)
    for module in (subject, compare):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, changed)
    with pytest.raises((AssertionError, KeyError, ValueError)):
        check_seeds()


def check_target() -> None:
    """Steps to the target are the first recorded ones at or below it; half of the seeds must reach it."""

    def result(*curves: list[float], ms: float = 1.0) -> runs.Result:
        finished = [done("a", curve[-1], seed=seed) for seed, curve in enumerate(curves)]
        for run, curve in zip(finished, curves, strict=True):
            run.steps, run.train_losses, run.metrics = list(range(0, 10 * len(curve), 10)), curve, [0.5] * len(curve)
            run.step_ms, run.gradient_ms = [ms], [3.0 * ms]
        return runs.Result(runs=finished)

    assert result([4.0, 2.0, 3.0, 1.0]).steps_to(2.0) == 10
    assert result([4.0, 2.0, 3.0, 1.0]).steps_to(1.5) == 30
    assert result([4.0, 2.0], [4.0, 3.0], [4.0, 1.0]).steps_to(2.0) == 10
    assert result([4.0, 2.0], [4.0, 3.0]).steps_to(2.0) == math.inf
    assert result([4.0, 1.0], ms=2.0).seconds_to(1.0) == pytest.approx(10 * 8e-3, rel=1e-12)
    made = comparison(done("SGD", 0.1), done("Adam", 0.2), done("b", 0.3), done("c", math.nan))
    assert made.target == (0.2, "final loss of Adam")
    made.given_target = 0.25
    assert made.target == (0.25, "given")
    assert [next(iter(column.cells)) for column in report.table(made).columns][5:7] == ["1", "0.001"]
    assert list(report.table(made).columns[5].cells)[2:] == ["-", "-"]
    made = comparison(done("a", 0.1), done("b", 0.2), done("c", 0.3), done("d", math.nan))
    assert made.target == (0.2, "final loss of b")
    assert comparison(done("a", math.nan)).target is None


def test_steps_and_time_to_a_target() -> None:
    check_target()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("steps_to", ("loss <= target", "loss < target")),
        ("steps_to", ("next(reached, math.inf)", "max(reached, default=math.inf)")),
        ("seconds_to", (" + statistics.median(self.gradient_ms or [0.0])", "")),
    ],
)
def test_planted_bug_of_the_target_is_caught(
    name: str, change: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs.Training, name, mutated(getattr(runs.Training, name), change))
    with pytest.raises(AssertionError):
        check_target()


def test_one_diverged_seed_is_told() -> None:
    made = comparison(done("a", 0.1, seed=0), done("a", math.inf, seed=1), done("b", 0.5), done("b", 0.5, seed=1))
    assert [each.entrant.name for each in made.ranked] == ["b", "a"]
    assert list(report.table(made).columns[3].cells)[1] == "diverged, 1 of 2"


def test_figure_of_curves_that_stay_where_they_are() -> None:
    made = compare.prepare("digits-softmax", steps=1, methods="SGD", lr=["SGD=0"])
    made.train()
    for axes in report.figure(made).axes:
        low, high = axes.get_ylim()
        assert low < high


def test_figure_of_a_metric_that_should_be_small_is_logarithmic() -> None:
    made = compare.prepare("quadratic", steps=3, methods="SGD")
    made.train()
    assert report.figure(made).axes[1].get_yscale() == "log"
