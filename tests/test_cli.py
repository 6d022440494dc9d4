"""The command line: every option, what is printed and written, errors in one line, and what is imported when."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import precond_ref
import precond_ref as pr
from precond_ref import cli, problems, registry
from precond_ref.cli import compare, listing
from precond_ref.compare import rates, runs

ROOT = Path(cli.__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command in an empty folder: ``run("compare", "--steps", "2")``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    return lambda *arguments: CliRunner().invoke(cli.application(), [str(a) for a in arguments])


def strict_json(text: str) -> Any:
    """``text`` as JSON, without the NaN and Infinity that Python would read."""

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def rows(output: str) -> list[list[str]]:
    """Cells of the table's rows."""
    return [line.split() for line in output.splitlines() if re.match(r" *(\d+|-) +[A-Z][\w.]+ +[\d.e+-]+ ", line)]


# ---- list ---------------------------------------------------------------------------------------------------------


def test_list_shows_every_method_with_its_fields(run: Callable[..., Any]) -> None:
    result = run("list")
    assert result.exit_code == 0
    blocks = {block.splitlines()[0]: block for block in result.output.strip().split("\n\n")}
    assert list(blocks) == list(registry.constructors())
    for name, method in pr.list_methods().items():
        assert method.paper in blocks[name]
        for field, meaning in method.symbols.items():
            assert re.search(rf"^    {field}( = .+)? +{re.escape(meaning)}$", blocks[name], re.M), (name, field)
    assert "    beta2 = 0.8            beta_2, decay of V, in [0, 1)\n" in blocks["ASGO"]
    assert "    side = 'left' " in blocks["ASGO.theory"]
    assert "Algorithm 1 of the paper" in blocks["ASGO.theory"]


def test_list_as_json(run: Callable[..., Any]) -> None:
    result = run("list", "--json")
    entries = {entry["name"]: entry for entry in strict_json(result.output)}
    assert list(entries) == list(registry.constructors())
    for name, entry in entries.items():
        assert entry.keys() == {"name", "about", "paper", "elementwise", "fields"}
        make = registry.constructors()[name]
        assert all(field["meaning"] for field in entry["fields"])
        assert [field["name"] for field in entry["fields"] if field["required"]] == registry.required(make)
        if not registry.required(make):
            made: Any = make()
            fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
            fields |= {p.name: p.default for p in inspect.signature(make).parameters.values()}
            assert {field["name"]: field["default"] for field in entry["fields"]} == json.loads(json.dumps(fields))
    assert entries["Adam"]["elementwise"] is True
    assert entries["ASGO"]["elementwise"] is False
    assert entries["Shampoo"]["about"].startswith("Shampoo (Gupta, Koren, Singer, arXiv 1802.09568) for tensors")


def test_list_shows_what_a_preset_takes_before_what_it_sets(run: Callable[..., Any]) -> None:
    block = run("list").output.partition("\nMuon.optax\n")[2].partition("\n\n")[0]
    taken, _, fixed = block.partition("    set by the preset:\n")
    assert "    rms = None " in taken
    assert re.findall(r"^    (\w+) ", taken, re.M) == registry.arguments(pr.Muon.optax)
    assert "    scale = 'jordan' " in fixed
    assert "    outputs = 'columns' " in fixed
    assert (
        "set by" not in run("list").output.partition("\nMuon.optax\n")[0].rpartition("\nMuon\n")[2].partition("\n\n")[0]
    )


def test_list_of_what_has_no_default(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def theory(size: int, eps: float = 0.5) -> pr.Method:
        """Needs a size."""
        raise AssertionError

    monkeypatch.setattr(listing, "constructors", lambda: {"ASGO.theory": theory})
    (entry,) = strict_json(run("list", "--json").output)
    assert entry["fields"] == [
        {"name": "size", "required": True, "default": None, "meaning": "option of this preset alone"},
        {"name": "eps", "required": False, "default": 0.5, "meaning": pr.ASGO.symbols["eps"]},
    ]
    assert "\n    size                   option of this preset alone\n    eps = 0.5 " in run("list").output


# ---- compare ------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_table_figure_and_json(run: Callable[..., Any], tmp_path: Path) -> None:
    result = run(
        "compare", "--steps", 4, "--seed", 2, "--json", "all.json", "--output", "curves.svg", "--lr", "SGD=0.5"
    )
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "figure: curves.svg\nJSON: all.json\n" in result.output
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    data = strict_json((tmp_path / "all.json").read_text())

    problem = problems.load("digits-mlp", seed=2)
    params, losses = problem.init(), []
    for step in range(4):
        loss, grads = problem.loss_and_grad(params, problem.batch(step))
        losses.append(float(loss))
        params = {key: value - np.float32(0.5) * grads[key] for key, value in params.items()}
    by_name = {entry["method"]: entry for entry in data["results"]}
    sgd = by_name["SGD"]
    assert sgd["runs"][0]["batch_losses"] == losses
    assert sgd["train_loss"] == float(problem.loss(params))
    assert sgd["metric"] == float(problem.metric(params))

    table = rows(result.output)
    assert [row[0] for row in table] == [str(k) for k in range(1, len(table) + 1)]
    assert [row[1] for row in table] == [entry["method"] for entry in data["results"]]
    for row, entry in zip(table, data["results"], strict=True):
        assert row[2:] == [
            f"{entry['lr']:.4g}",
            f"{entry['train_loss']:.4g}",
            f"{entry['metric']:.4g}",
            "-" if entry["steps_to_target"] is None else str(entry["steps_to_target"]),
            "-" if entry["steps_to_target"] is None else f"{entry['seconds_to_target']:.3g}",
            f"{entry['ms_per_step']:.3g}",
            f"{entry['state_bytes_per_parameter']:.1f}",
            "100%" if entry["own_share"] == 1 else f"{entry['own_share']:.1%}",
        ]
    finals = [entry["train_loss"] for entry in data["results"]]
    assert finals == sorted(finals)
    assert f"{table[0][1]} wins: final train loss {table[0][3]} against {table[1][3]}" in " ".join(
        result.output.split()
    )


def test_json_holds_settings_versions_and_curves(run: Callable[..., Any], tmp_path: Path) -> None:
    options = [
        "--problem",
        "quadratic",
        "--methods",
        "adam, sgd",
        "--lr",
        "SGD=1e30",
        "--steps",
        60,
        "--dtype",
        "float64",
    ]
    result = run("compare", *options, "--json", "all.json")
    assert result.exit_code == 0, result.output
    data = strict_json((tmp_path / "all.json").read_text())
    results = data.pop("results")
    assert data == {
        "problem": "quadratic",
        "steps": 60,
        "seeds": [0],
        "target": {"loss": results[0]["train_loss"], "origin": "final loss of Adam"},
        "backend": "numpy",
        "dtype": "float64",
        "batch_size": None,
        "parameters": {"x": [20]},
        "metric": {"name": "loss gap", "higher_is_better": False},
        "versions": {"precond_ref": pr.__version__, "python": sys.version.split()[0], "numpy": np.__version__},
        "threads": os.environ["OMP_NUM_THREADS"],
        "finished": True,
        "left_out": {},
    }
    adam, sgd = results
    assert adam["fields"] == repr(pr.Adam())
    assert (adam["lr"], adam["lr_source"]) == (rates.record()["quadratic"]["methods"]["Adam"]["lr"], "recorded")
    assert adam["diverged"] is False
    assert adam["to_adam"] == []
    assert adam["state_bytes_per_parameter"] == 16
    (only,) = adam["runs"]
    assert only["curve"]["step"] == list(range(61))
    assert only["curve"]["train_loss"][-1] == adam["train_loss"]
    assert only["curve"]["metric"][-1] == adam["metric"]
    assert len(only["batch_losses"]) == 60
    assert (sgd["lr"], sgd["lr_source"]) == (1e30, "given")
    assert sgd["diverged"] is True
    batch_losses = sgd["runs"][0]["batch_losses"]
    assert batch_losses[-1] is None
    last = rows(result.output)[-1]
    assert last[:2] == ["-", "SGD"]
    assert last[3:6] == ["diverged", "at", str(len(batch_losses))]
    assert (tmp_path / "precond-ref-compare-quadratic.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_backends(run: Callable[..., Any], library: str) -> None:
    version = pytest.importorskip(library).__version__
    result = run("compare", "--problem", "quadratic", "--methods", "SGD", "--steps", 2, "--backend", library)
    assert result.exit_code == 0, result.output
    assert f"{library} {version}, float32" in " ".join(result.output.split())


def test_live_progress_on_a_terminal(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    seen: list[str] = []
    from rich.progress import Progress

    update = Progress.update

    def spied(self: Any, task: Any, **what: Any) -> None:
        seen.extend(str(value) for value in what.values())
        update(self, task, **what)

    monkeypatch.setattr(Progress, "update", spied)
    result = run("compare", "--problem", "quadratic", "--methods", "SGD,Adam", "--steps", 2)
    assert result.exit_code == 0
    assert "SGD (1 of 2)" in seen
    assert "Adam (2 of 2)" in seen
    assert sum(text.startswith("loss ") for text in seen) == 4
    assert "Adam (2 of 2)" in result.stderr
    assert "of 2)" not in result.stdout


def test_interruption_leaves_what_is_done(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = runs.Trainer.train

    def interrupted(self: Any, run: Any, *args: Any, **kwargs: Any) -> Any:
        if run.entrant.name == stop:
            raise KeyboardInterrupt
        return train(self, run, *args, **kwargs)

    monkeypatch.setattr(runs.Trainer, "train", interrupted)
    options = ["--problem", "quadratic", "--methods", "AGD,SGD,Adam", "--steps", 2, "--json", "all.json"]
    stop = "AGD"
    result = run("compare", *options)
    assert result.exit_code == 130
    assert result.stderr == "interrupted: 0 of 3 runs done\n"
    assert list(tmp_path.iterdir()) == []
    stop = "Adam"
    result = run("compare", *options)
    assert result.exit_code == 130
    assert result.stderr == "interrupted: 2 of 3 runs done\n"
    assert {row[1] for row in rows(result.output)} == {"AGD", "SGD"}
    data = strict_json((tmp_path / "all.json").read_text())
    assert data["finished"] is False
    assert len(data["results"]) == 2
    assert (tmp_path / "precond-ref-compare-quadratic.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--problem", "nothing"], "error: no problem is called 'nothing'; there are quadratic, "),
        (["--methods", "Nix"], "error: no method is called Nix; there are Adafactor, "),
        (["--lr", "SGD"], "error: --lr wants METHOD=VALUE"),
        (["--backend", "nix"], "error: no backend is called nix; there are numpy, cupy, torch, jax\n"),
        (["--dtype", "int8"], "error: dtype must be one of 'float32', 'float64', got 'int8'\n"),
        (["--steps", 0], "error: --steps must be at least 1, got 0\n"),
        (["--output", "curves.xyz"], "error: --output must end in one of ."),
        (["--output", "curves"], "error: --output must end in one of ."),
        (["--output", "no/curves.png"], "error: there is no folder no to write curves.png to\n"),
        (["--json", "no/all.json"], "error: there is no folder no to write all.json to\n"),
        (["--json", "."], "error: "),
        (["--tune", "--seed", 1], "error: --tune takes only --problem, --methods and --steps\n"),
        (["--tune", "--json", "all.json"], "error: --tune takes only --problem, --methods and --steps\n"),
    ],
)
def test_errors_are_one_line(run: Callable[..., Any], options: list[Any], message: str, tmp_path: Path) -> None:
    result = run("compare", "--problem", "quadratic", "--methods", "SGD", "--steps", 2, *options)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    if options != ["--json", "."]:
        assert result.stdout == ""
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("module", "name"), [("rich.console", "rich"), ("matplotlib.figure", "matplotlib")])
def test_missing_extras(run: Callable[..., Any], module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    result = run("compare", "--problem", "quadratic", "--methods", "SGD", "--steps", 1)
    assert result.exit_code == 2
    assert name in result.stderr
    assert 'pip install "precond-ref[cli]"' in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_typer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    for name in [name for name in sys.modules if name.startswith("precond_ref.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(cli, "app", raising=False)
    with pytest.raises(SystemExit, match=re.escape('pip install "precond-ref[cli]"')):
        cli.main()


# ---- tune ---------------------------------------------------------------------------------------------------------


def test_tune_writes_what_compare_reads(run: Callable[..., Any], recorded: Path) -> None:
    result = run("compare", "--tune", "--problem", "quadratic", "--methods", "SGD,Adam", "--steps", 3)
    assert result.exit_code == 0, result.output
    found = strict_json(recorded.read_text())["quadratic"]["methods"]
    assert result.stdout == f"quadratic: SGD {found['SGD']['lr']}, Adam {found['Adam']['lr']}\n"
    result = run("compare", "--problem", "quadratic", "--methods", "SGD,AGD", "--steps", 2)
    lrs = {row[1]: row[2] for row in rows(result.output)}
    assert lrs == {"SGD": f"{found['SGD']['lr']:.4g}", "AGD": "0.01"}
    assert "0.01, not tuned, for AGD." in " ".join(result.output.split())


def test_tune_all_problems_skips_what_cannot_be_done(
    run: Callable[..., Any], recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "list_problems", lambda: ["quadratic", "digits-softmax", "mnist-softmax"])
    monkeypatch.delenv("PRECOND_REF_DATA", raising=False)
    result = run("compare", "--tune", "--methods", "DASGO", "--steps", 2)
    assert result.exit_code == 0, result.output
    first, second, third = result.stdout.splitlines()
    assert first == "quadratic: skipped, nothing to tune on quadratic: DASGO takes none of the parameters"
    assert second.startswith("digits-softmax: DASGO ")
    assert third.startswith("mnist-softmax: skipped, ")
    assert list(strict_json(recorded.read_text())) == ["digits-softmax"]
    assert run("compare", "--tune", "--problem", "quadratic", "--methods", "DASGO").exit_code == 2


def test_an_interrupted_search_keeps_what_it_found(
    run: Callable[..., Any], recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, done = rates.search, []

    def interrupted(measure: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return search(measure)

    monkeypatch.setattr(rates, "search", interrupted)
    result = run("compare", "--tune", "--problem", "quadratic", "--methods", "SGD,Adam", "--steps", 2)
    assert result.exit_code == 130
    assert result.stderr == "interrupted: the rates found so far are recorded\n"
    assert list(strict_json(recorded.read_text())["quadratic"]["methods"]) == ["SGD"]


# ---- as a program -------------------------------------------------------------------------------------------------


def program(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment)


def test_help_teaches_and_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from precond_ref import cli; sys.argv = ['precond-ref', 'compare', '--help']\n"
        "try: cli.main()\n"
        "finally: print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    result = program("-c", code, cwd=tmp_path)
    assert result.returncode == 0
    assert not {"numpy", "matplotlib", "rich", "torch", "jax", "cupy"} & set(result.stderr.split())
    assert "  precond-ref compare --methods ASGO,Shampoo,Adam --steps 500 --seeds 5\n" in result.stdout
    for option in (
        "problem",
        "methods",
        "steps",
        "seed",
        "seeds",
        "target",
        "backend",
        "dtype",
        "lr",
        "json",
        "output",
        "tune",
    ):
        assert f"  --{option} " in result.stdout
    for name, text in problems.list_problems().items():
        assert re.search(rf"^ +{name} +{re.escape(text)}$", result.stdout, re.M)


def test_quiet_without_a_terminal(tmp_path: Path) -> None:
    options = ["--problem", "quadratic", "--methods", "SGD", "--steps", "2", "--json", "all.json"]
    result = program("-m", "precond_ref.cli", "compare", *options, cwd=tmp_path)
    assert result.returncode == 0
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    assert rows(result.stdout)[0][:2] == ["1", "SGD"]
    assert strict_json((tmp_path / "all.json").read_text())["threads"] == "1"


def test_examples_of_the_help_are_understood(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(compare, "train", lambda comparison: calls.append(comparison) or True)
    monkeypatch.setattr(compare, "tune_rates", lambda *arguments: calls.append(arguments))
    examples = re.findall(r"^  precond-ref (compare.*)$", compare.EXAMPLES, re.M)
    for example in examples:
        result = run(*example.split())
        assert result.exit_code == 0, (example, result.output)
    assert len(calls) == len(examples) >= 5
    assert {run.entrant.name: run.lr for run in calls[2].planned}["ASGO"] == 0.02


def test_version(run: Any) -> None:
    assert run("--version").output == f"precond-ref {precond_ref.__version__}\n"
