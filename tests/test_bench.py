"""`precond-ref bench` at smoke size: that every suite runs, and that what it reports is what was measured."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pyperf
import pytest
import torch
from typer.testing import CliRunner

import precond_ref_torch
from precond_ref.bench import by_hand, harness, memory, report, suites, worker
from precond_ref.bench.contenders import OURS
from precond_ref.bench.harness import Race, Result, Sweep
from precond_ref.bench.peers import PEERS
from precond_ref.bench.workloads import WORKLOADS
from precond_ref.cli import application

ROOT = Path(__file__).resolve().parents[1]


def run_bench(*arguments: str) -> Any:
    return CliRunner().invoke(application(), ["bench", *arguments], env={"COLUMNS": "40", "PRECOND_REF_PEERS": ""})


def test_every_contender_of_a_race_exists() -> None:
    races = [race for its in suites.RACES.values() for race in its]
    named = {name for race in races for name in race.contenders}
    assert named <= OURS.keys() | PEERS.keys()
    assert {race.workload for race in races} <= WORKLOADS.keys()
    assert all(race.contenders[0] in OURS for race in races)  # the base is there without peers
    assert all(race.periods.keys() <= set(race.contenders) for race in races)


def test_workloads_have_the_sizes_their_names_say() -> None:
    entries = {name: sum(_product(s) for s in make().values()) for name, make in WORKLOADS.items()}
    assert entries["matrices"] == 100 * 64 * 64
    assert 1.0e7 < entries["transformer"] < 1.1e7
    assert entries["convolutions"] == 269722  # ResNet-20 with padded shortcuts
    assert entries["large"] == 4096 * 1024


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for d in shape:
        result *= d
    return result


def check_any_method(run: Any) -> None:
    """A class of a file in this folder is timed beside AdamW, at steps that belong together."""
    result = run("--method", "timed_here:Mine(every=3)", "--smoke", "--rounds", "2", "--json", "--only", "matrices")
    assert result.exit_code == 0, result.output
    (race,) = json.loads(result.stdout)["results"]
    names = [row["name"] for row in race["contenders"]]
    assert names == ["torch AdamW foreach", "timed_here:Mine(every=3)"]
    assert all(len(row["seconds_per_step"]) == 2 for row in race["contenders"])


@pytest.mark.full
def test_any_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("timed_here.py").write_text("import precond_ref\n\nclass Mine(precond_ref.ASGO):\n    pass\n")
    check_any_method(run_bench)
    with pytest.raises(AssertionError):  # a command that leaves its method out
        check_any_method(lambda _, name, *others: run_bench("--method", "ASGO", *others))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "ASG"), "no method is called ASG"),
        (("--method", "ASGO", "--suite", "memory"), "--method goes with --suite steps"),
    ],
)
def test_methods_that_cannot_be_timed(arguments: tuple[str, ...], message: str) -> None:
    result = run_bench(*arguments)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")


@pytest.mark.full
def test_steps_of_one_race_and_its_pyperf_file(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    result = run_bench("--smoke", "--rounds", "3", "--only", "ASGO, torch, matrices", "--output", str(file), "--json")
    assert result.exit_code == 0, result.output
    (race,) = json.loads(result.stdout)["results"]
    assert [c["name"] for c in race["contenders"]] == ["ASGO", "ASGO, by hand", "ASGO, bare"]
    written = pyperf.BenchmarkSuite.load(str(file))
    for contender, benchmark in zip(race["contenders"], written.get_benchmarks(), strict=True):
        assert contender["error"] is None
        assert list(benchmark.get_values()) == contender["seconds_per_step"]
        assert len(contender["seconds_per_step"]) == 3
        assert contender["quartiles"][1] == statistics.median(contender["seconds_per_step"])
        assert min(contender["seconds_per_step"]) > 0
    assert race["contenders"][0]["ratio_quartiles"] == [1.0, 1.0, 1.0]


@pytest.mark.full
def test_the_table_shows_every_contender() -> None:
    result = run_bench("--smoke", "--rounds", "2", "--only", "roots, matrices", "--suite", "roots")
    assert result.exit_code == 0, result.output
    assert all(name in result.stdout for name in suites.ROOTS_OF)  # on one line each, however narrow the terminal
    assert "\u2026" not in result.stdout


def test_memory_measures_what_the_formulas_say() -> None:
    for method in ("SShampoo(size=5)", "ASGO"):
        row = memory.measure("large", method, smoke=True)
        assert row.measured == row.formula > 0
        assert row.torch_peak is not None
        assert row.torch_peak >= 4 * 16 * 8  # the direction at least
        assert row.numpy_peak is not None
        assert row.numpy_peak >= 4 * 16 * 8
        assert "equal" in str(list(report.memory_table([row]).columns[3].cells))
    wrong = row._replace(formula=row.formula + 4)
    assert "equal" not in str(list(report.memory_table([wrong]).columns[3].cells))


@pytest.mark.full
def test_scaling_runs() -> None:
    result = run_bench("--suite", "scaling", "--smoke", "--rounds", "2", "--only", "Shampoo on")
    assert result.exit_code == 0, result.output
    assert "never" in result.stdout
    assert "exponent" in result.stdout


@pytest.mark.full
def test_growth_is_drawn_and_its_memory_compared(tmp_path: Path) -> None:
    file = tmp_path / "growth.svg"
    options = ("--suite", "scaling", "--smoke", "--rounds", "2", "--figure", str(file))
    result = run_bench(*options, "--only", "AGD, matrices of")
    assert result.exit_code == 0, result.output
    assert "equal" in result.stdout
    assert "AGD, exponent" in file.read_text()
    assert run_bench(*options, "--only", "Shampoo on").exit_code == 2
    assert run_bench("--suite", "roots", "--figure", str(file)).exit_code == 2


def test_a_wrong_memory_is_shown() -> None:
    sweep = Sweep("AGD", "parameters", 1.0, {x: ("AGD", {"w": (x,)}) for x in (2, 4)})
    results = {x: Result("", [1e-3 * x] * 2, state_bytes=8 * x) for x in (2, 4)}
    assert "equal" in list(report.sweep_table(sweep, results).columns[-1].cells)
    results[4].state_bytes = 36
    assert "equal" not in list(report.sweep_table(sweep, results).columns[-1].cells)


def test_exponents_are_fitted() -> None:
    sweep = Sweep("", "", 3.0, {x: ("", {}) for x in (1, 2, 4)})
    cubic = {x: Result("", [2e-3 * x**3] * 3) for x in (1, 2, 4)}
    assert suites.exponent(sweep, cubic) == pytest.approx(3.0, abs=1e-12)
    above = {**{x: Result("", [1.0 + 0.5 / x] * 3) for x in (1, 2, 4)}, 9: Result("", [1.0] * 3)}
    assert suites.exponent(sweep._replace(base=9), above) == pytest.approx(-1.0, abs=1e-12)
    noisy = {**above, 1: Result("", [0.9] * 3), 2: Result("", [1.0] * 3)}  # on a busy machine
    assert suites.exponent(sweep._replace(base=9), noisy) is None
    assert "-" in list(report.sweep_table(sweep._replace(base=9, points={1: ("AGD", {})}), noisy).columns[-2].cells)
    assert report.sweep_json(sweep._replace(base=9), noisy)["exponent"] is None


def test_ratios_are_those_of_the_same_round() -> None:
    slow, fast = Result("a", [2.0, 20.0, 4.0]), Result("b", [1.0, 10.0, 2.0])
    assert harness.ratios(slow, fast) == [2.0, 2.0, 2.0]
    assert report.spread([2.0, 1.0, 4.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)


@pytest.mark.full
def test_an_error_and_a_missing_environment_are_shown_and_stop_nobody(tmp_path: Path) -> None:
    race = Race("", "matrices", ("AGD", "no such contender", "sirfshampoo"))
    ours, unknown, peer = harness.run(race, threads=1, rounds=2, smoke=True, peers=tmp_path)
    assert ours.error is None
    assert len(ours.seconds) == 2
    assert str(unknown.error).startswith("ValueError: no method is called no such contender")
    assert "bash benchmarks/peers.sh" in str(peer.error)
    assert "ValueError" in str(list(report.race_table(race, [ours, unknown, peer]).columns[1].cells))
    assert harness.run(Race("", "matrices", ("sirfshampoo",)), threads=1, rounds=2, smoke=True, peers=None) == []


@pytest.mark.full
def test_a_peer_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The interpreter of these tests stands in for the environment: both packages are in the test extra."""
    for package in ("sirfshampoo", "pytorch_optimizer"):
        pytest.importorskip(package)
    (tmp_path / "torch" / "bin").mkdir(parents=True)
    (tmp_path / "torch" / "bin" / "python").symlink_to(sys.executable)
    python = harness.Worker(Path(sys.executable), 1)
    try:
        for name in ("sirfshampoo", "pytorch_optimizer Shampoo", "pytorch_optimizer ScalableShampoo, one side"):
            made = python.ask(make=name, workload="transformer", smoke=True, warmup=0)
            assert "error" not in made, made
            assert python.ask(run=name, repeat=1, clock="cpu")["seconds"] > 0
    finally:
        python.close()
    assert harness.interpreter("torch", tmp_path) == tmp_path / "torch" / "bin" / "python"


def test_a_dead_process_is_an_error() -> None:
    process = harness.Worker(None, 1)
    process.process.kill()
    process.process.wait()
    assert "ended with code" in process.ask(run="x", repeat=1, clock="wall")["error"]
    process.close()


def test_the_worker_needs_nothing_but_the_peer() -> None:
    """Run as a script by an interpreter without site packages, it gets as far as the missing framework."""
    result = subprocess.run(
        [sys.executable, "-S", "-E", worker.__file__],
        input=json.dumps({"make": "atorch AGD", "workload": "matrices", "smoke": True, "warmup": 0}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout) == {"error": "ModuleNotFoundError: atorch"}


REFUSED = {
    "suite": (("--suite", "x"), "there is no suite 'x'; there are steps, roots"),
    "against": (("--against", "x"), "--against takes only `peers`, got 'x'"),
    "peers": (("--against", "peers"), "needs --peers FOLDER"),
    "rounds": (("--rounds", "1"), "--rounds >= 2"),
    "clock": (("--clock", "x"), "--clock must be wall or cpu, got 'x'"),
    "only": (
        ("--suite", "roots", "--only", "x y"),
        "nothing in suite roots has 'x y' in its title; there are roots, matrices; roots, transformer",
    ),
    "peers of others": (
        ("--suite", "roots", "--against", "peers", "--peers", "."),
        "goes with --suite steps, got roots",
    ),
    "folder": (("--output", "nowhere/a.json"), "there is no folder nowhere to write a.json to"),
    "a folder": (("--output", "."), ". is a folder"),
    "no times": (("--suite", "memory", "--output", "a.json"), "--suite memory has none"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(arguments: tuple[str, ...], message: str) -> None:
    result = run_bench(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


# ---- the GPU's script -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu() -> Any:
    spec: Any = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_a_machine_lacks_is_named(gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    present = types.SimpleNamespace(
        cuda=types.SimpleNamespace(is_available=lambda: True),
        is_available=lambda: True,
        devices=lambda: [types.SimpleNamespace(platform="gpu")],
    )

    def imported(name: str) -> Any:
        if name == "cupy":
            raise ImportError("No module named 'cupy'")
        return present

    monkeypatch.setattr(gpu.importlib, "import_module", imported)
    assert gpu.main([]) == 1
    error = capsys.readouterr().err
    assert "cupy cannot be imported: No module named 'cupy'" in error
    assert "torch" not in error
    present.cuda.is_available = lambda: False
    present.devices = list
    assert [line.split()[0] for line in gpu.missing()] == ["torch", "cupy", "jax"]


def test_out_of_time_it_still_writes_its_results(gpu: Any, tmp_path: Path) -> None:
    x64 = sys.modules["jax"].config.jax_enable_x64 if "jax" in sys.modules else False
    try:
        assert gpu.main(["--dry-run", "--minutes", "0", "--output", str(tmp_path)]) == 0
    finally:
        sys.modules["jax"].config.update("jax_enable_x64", x64)
        sys.modules["jax"].config.update("jax_default_matmul_precision", None)
    (file,) = tmp_path.glob("cpu-*.json")
    content = json.loads(file.read_text())
    lists = [content[name] for name in ("constants", "residuals", "launches", "steps")]
    assert {row["error"] for rows in lists for row in rows} == {"left out: no time"}
    assert [len(rows) for rows in lists] == [9, 12, 12, 87]
    assert content["rates"]["bandwidth"] > 0
    table = file.with_suffix(".md").read_text()
    assert "left out: no time" in table
    assert table.startswith("Dry run: ")


def test_a_failing_library_costs_only_its_rows(gpu: Any, capsys: Any, tmp_path: Path) -> None:
    library = types.SimpleNamespace(name="broken", array=lambda a: 1 / 0, host=None)
    rows = list(gpu.constants([library], True, lambda: False))
    assert [row["error"] for row in rows] == ["ZeroDivisionError: division by zero"] * 3
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--output", str(tmp_path / "file")])
    assert "--output must be a folder or a name for one" in capsys.readouterr().err


@pytest.mark.deep
def test_the_whole_script_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry-run", "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    (file,) = tmp_path.glob("cpu-*.json")
    content = json.loads(file.read_text())
    assert [
        row for name in ("steps", "launches", "residuals", "constants") for row in content[name] if "error" in row
    ] == []
    assert all(row["seconds"] > 0 for row in content["steps"])
    assert all(row["residual"] < 1e-5 for row in content["residuals"])
    assert all(0 < row["u kappa^(p + 1/2)"] < 16 for row in content["constants"])


def test_events_are_told_apart(gpu: Any) -> None:
    host = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy", "cudaMemcpyAsync", "cudaLaunchKernel")
    device = ("gemm", "cupy_where", "Memcpy DtoH (Device -> Pageable)", "Memcpy DtoD (Device -> Device)", "Memset")
    events = [types.SimpleNamespace(name=name, device_type="DeviceType.CPU") for name in host]
    events += [types.SimpleNamespace(name=name, device_type="DeviceType.CUDA") for name in device]
    events += [types.SimpleNamespace(name="Optimizer.step", device_type="DeviceType.CUDA", is_user_annotation=True)]
    assert gpu.census(events) == {"kernels": 2, "copies": 3, "waits": 3, "reads": 1}


def test_a_failure_is_noted_and_what_was_measured_is_kept(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        yield gpu.measured({"p": 1}, lambda: False, lambda: 1 / 0)
        yield {"p": 2, "u kappa": float("nan")}
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "Library", lambda name, dry: types.SimpleNamespace(module=json, name=name))
    monkeypatch.setattr(json, "__version__", "1", raising=False)
    monkeypatch.setattr(gpu, "device_rates", lambda torch: {"bandwidth": 1.0, "matmul_rate": math.inf})
    monkeypatch.setattr(gpu, "constants", broken)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--dry-run", "--output", str(tmp_path)])
    (file,) = tmp_path.glob("cpu-*.json")
    content = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert content["constants"] == [
        {"p": 1, "error": "ZeroDivisionError: division by zero"},
        {"p": 2, "u kappa": "nan"},
    ]
    assert content["rates"]["matmul_rate"] == "inf"
    assert "division by zero" in file.with_suffix(".md").read_text()


def test_a_long_step_is_timed_once_and_over_whole_periods(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library, now, counts = gpu.Library("cupy", True), [0.0], []

    def clock(step: Any, count: int) -> float:
        counts.append(count)
        now[0] += count * step()
        return float(step())

    monkeypatch.setattr(library, "_clock", clock)
    monkeypatch.setattr(gpu, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    assert library.seconds(lambda: 3.0, period=10) == 3.0
    assert counts == [1, 1, 10, 10]
    counts.clear()
    assert library.seconds(lambda: 0.001, period=10) == 0.001
    assert counts == [1, 1, 10, *[40] * 5]


@pytest.mark.parametrize(
    ("name", "update", "shape", "fields"),
    [
        ("AGD", by_hand.agd, (3, 40), {"weight_decay": 1e-2}),
        ("ASGO", by_hand.asgo, (5, 7), {}),
        ("ASGO", by_hand.asgo, (7, 5), {}),
        ("Shampoo", by_hand.shampoo, (5, 7), {}),
        ("IFShampoo", by_hand.if_shampoo, (5, 7), {}),
        ("SOAP", by_hand.soap(3), (5, 7), {"every": 3}),
    ],
)
def test_steps_by_hand_are_those_of_the_method(name: str, update: Any, shape: tuple[int, int], fields: Any) -> None:
    assert by_hand_differs(name, update, shape, fields) < 1e-3
    assert by_hand_differs(name, lambda g, x, s: update(g.flip(-1), x, s), shape, fields) > 1e-3


def by_hand_differs(name: str, update: Any, shape: tuple[int, int], fields: Any) -> float:
    """Return the distance of both after nine steps, as a share of the way."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *shape, generator=generator)
    start, param = x.clone(), torch.nn.Parameter(x[0].clone())
    optimizer = getattr(precond_ref_torch, name)([param], lr=1e-2, **fields)
    state: dict[str, Any] = {"lr": 1e-2, "t": 0}
    for step in range(9):
        g = torch.randn(1, *shape, generator=generator)
        param.grad = g[0].clone()
        optimizer.step()
        if step == 0 and name == "SOAP":  # the first update makes the bases
            names = {
                "m": "m",
                "rotated_m": "rotated_m",
                "v": "v",
                "p": "bases.0",
                "q": "bases.1",
                "left": "grams.0",
                "right": "grams.1",
            }
            state |= {mine: optimizer.state[param][theirs][None].clone() for mine, theirs in names.items()}
            x = param.detach()[None].clone()
        else:
            update(g, x, state)
    return float((param.detach() - x[0]).norm() / (param.detach() - start[0]).norm())
