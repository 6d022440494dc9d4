"""`precond-ref check --world`: right optimizers pass, and each planted mistake is caught and called by its name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from precond_ref.cli import application
from precond_ref.conformance import worlds
from precond_ref.conformance.processes import Limits
from precond_ref.conformance.ranks import Trace, _raised, shares

PLANTED = {
    "PerShard": ("fsdp", "steps", "each shard is updated by itself: wide.weight, uneven.weight, small.weight"),
    "PerShardLoaded": ("fsdp", "resume-from-1", "each shard is updated by itself: wide.weight"),
    "LocalGram": ("fsdp", "steps", "a local Gram"),
    "LocalHeads": ("fsdp", "steps", "split by local rows: one process has blocks of 4 rows, the ranks cut their own"),
    "LocalNorm": ("fsdp", "steps", "another length on each rank"),
    "Forgetful": ("fsdp", "resume-from-1", "lost on loading (an owner without state)"),
    "Cast": ("one", "resume", "its state is cast to float32 on loading"),
    "CastType": ("one", "resume", "last was float64 and is float32"),
    "DoubleAccumulation": ("fsdp", "accumulation", "double accumulation: running sums of the micro-batches"),
    "PerMicroBatch": ("fsdp", "accumulation", "a step after each micro-batch"),
    "SkippingRank": ("fsdp", "steps", "did not step: every parameter on ranks [1]"),
    "SkippedParameter": ("fsdp", "steps", "did not step: odd.weight on ranks [1]"),
    "AveragedTwice": ("fsdp", "steps", "as if the gradient were x1/2: averaged twice"),
    "Summed": ("fsdp", "steps", "summed over the 2 ranks"),
    "DifferingReplicas": ("hsdp", "steps", "replicas differ: every parameter on ranks [1]"),
    "OwnersByActive": ("fsdp", "no-gradient", "its state is lost at this step, as if begun anew: small.weight"),
    "SwappedTwins": (
        "fsdp",
        "steps",
        "the step of the part of twin.weight that rank 0 has: square.weight on ranks [0]",
    ),
    "Hanging": ("fsdp", "steps", "ranks [0, 1] wait for more than 8 s in step 1"),
    "Aborting": ("fsdp", "steps", "was ended by SIGABRT"),
    "Dying": ("fsdp", "steps", "rank 1 ended with exit code 3"),
    "RefusingRank": ("fsdp", "steps", "it raises ValueError: not on this rank"),
}
"""By optimizer of `wrong_ranks`: a mesh, the run that fails, and what is said of it."""
RIGHT = (
    "torch.optim:AdamW", "precond_ref_torch:ASGO", "precond_ref_torch:AGD", "precond_ref:Muon", "precond_ref:Shampoo",
)  # fmt: skip
WAITING = ("Hanging", "Aborting", "Dying", "RefusingRank")
"""Those that take seconds, not processor time."""
MORE = ("Summed", "LocalNorm", "CastType", "OwnersByActive", "SwappedTwins")
"""Those like another one."""


@pytest.fixture(scope="module")
def fleet() -> Iterator[worlds.Fleet]:
    pytest.importorskip("torch")
    fleet = worlds.Fleet("wrong_ranks:Right", 4, Limits(120.0))
    yield fleet
    fleet.close()


def checked(
    fleet: worlds.Fleet, target: str, folder: Path, numbers: tuple[int, ...] = (2,), mesh: str = "fsdp",
    dtype: str = "float64",
) -> worlds.Report:  # fmt: skip
    """`worlds.check` in the process that is there."""
    fleet.target, report = target, worlds.Report(target, dtype, mesh, numbers)
    worlds.Checking(fleet, report, folder).all(lambda name: None)
    return report


def said(report: worlds.Report) -> dict[str, str]:
    """Messages by mesh and run."""
    return {r.id.replace("-2/", "/"): r.message for r in [*report.failures, *report.refused]}


# ---- without a process ----------------------------------------------------------------------------------------------


def halves() -> tuple[worlds.Truth, list[Trace]]:
    """Two steps of a parameter, and two ranks that have half of its rows each."""
    values = [{"w": t * np.arange(8.0).reshape(4, 2) + 1} for t in range(3)]
    index = np.arange(8).reshape(4, 2)
    traces = [Trace({"w": half}, [{"w": v["w"].ravel()[half]} for v in values]) for half in (index[:2], index[2:])]
    return worlds.Truth(values, [{"w": 1e-12}] * 3, []), traces


def check_parts(truth: worlds.Truth, traces: list[Trace]) -> None:
    found, _ = truth.departures(traces)
    assert not found, found


def test_right_parts_agree() -> None:
    check_parts(*halves())


@pytest.mark.parametrize("fault", ["other value", "not finite", "other shape", "no part"])
def test_planted_wrong_part_is_found(fault: str) -> None:
    truth, traces = halves()
    part = traces[1].values[2]
    if fault == "no part":
        del part["w"]
    else:
        part["w"] = {
            "other value": part["w"] * (1 + 1e-9),
            "not finite": part["w"] * np.nan,
            "other shape": part["w"][:1],
        }[fault]
    found, _ = truth.departures(traces)
    assert [(d.step, d.name, d.rank) for d in found] == [(2, "w", 1)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_shares_have_the_mean_exactly(ranks: int) -> None:
    whole = {"w": np.rint(np.random.default_rng(1).uniform(-2, 2, (5, 3)) * 2.0**36) / 2.0**36}
    parts = [part["w"] for part in shares(whole, ranks, 3)]
    assert np.array_equal(sum(parts) / ranks, whole["w"])
    assert all(not np.array_equal(part, whole["w"]) for part in parts)


def test_multiples_are_seen_whatever_the_decay() -> None:
    random = np.random.default_rng(0)
    right, param = random.normal(size=(2, 4, 3))

    def seen(step: np.ndarray, error: float = 0.5) -> str:
        fit = worlds._fit(step, right, param)
        return "" if fit is None else worlds._times(*fit, error)

    assert seen(2 * right - 0.01 * param) == "x2.00: twice"
    assert seen(1.001 * right) == "x1.001"
    assert worlds._fit(-0.01 * param, right, param) == pytest.approx((0, -0.01))
    assert seen(right - 0.01 * param) == "the right step with another weight decay (+0.01 of the parameter)"
    assert seen(right, 3e-8) == "the right step, rounded as in float32"
    assert seen(random.normal(size=(4, 3))) == ""
    assert worlds._fit(right[:1], right[:1], param[:1]) is None  # three entries tell nothing


def test_messages_of_ranks_are_merged() -> None:
    same = {0: "RuntimeError: at 0x7f01 of rank 0\nmore", 1: "RuntimeError: at 0x7f02 of rank 1"}
    assert _raised(same, 2) == "RuntimeError: at ... of rank ..."
    assert _raised({1: "ValueError: no"}, 2) == "ValueError: no (ranks [1])"


def test_lost_precision_is_said() -> None:
    assert worlds._changed({"w: m": "float64"}, {"w: m": "float64"}) == ""
    assert "w: m was float64 and is float32" in worlds._changed({"w: m": "float64"}, {"w: m": "float32"})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--world", "two"], "numbers of ranks, such as 2,4"),
        (["--world", "1"], "from 2 to 16"),
        (["--world", "2,2"], "different numbers"),
        (["--world", "2", "--mesh", "ring"], "mesh must be one of fsdp, hsdp, tp, fsdp-tp, ddp"),
        (["--world", "3", "--mesh", "hsdp"], "an even number of at least 2 ranks"),
        (["--world", "2", "--method", "ASGO"], "--world goes with TARGET"),
        (["--mesh", "tp", "--method", "ASGO"], "--mesh goes with --world"),
    ],
)
def test_refused_options(options: list[str], text: str) -> None:
    result = CliRunner().invoke(application(), ["check", "torch.optim:SGD", *options])
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.split())


# ---- on ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_right_ones_pass(fleet: worlds.Fleet, tmp_path: Path) -> None:
    for target in ("wrong_ranks:Right", "torch.optim:SGD(momentum=0.5)"):
        report = checked(fleet, target, tmp_path)
        assert report.ok, report
        assert {r.id for r in report.results} >= {"fsdp-2/resume-from-1", "one/resume-from-2", "fsdp-2/accumulation"}


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.deep] * (name in MORE)) for name in PLANTED if name not in WAITING],
)
def test_planted_mistake_has_its_name(fleet: worlds.Fleet, tmp_path: Path, name: str) -> None:
    mesh, run, text = PLANTED[name]
    report = checked(fleet, f"wrong_ranks:{name}", tmp_path, mesh="fsdp" if mesh == "one" else mesh)
    assert not report.ok
    assert text in said(report)[f"{mesh}/{run}"]


@pytest.mark.deep
@pytest.mark.parametrize("name", WAITING)
def test_planted_hang_or_death_is_a_verdict(fleet: worlds.Fleet, tmp_path: Path, name: str) -> None:
    fleet.seconds, usual = 8.0, fleet.seconds
    report = checked(fleet, f"wrong_ranks:{name}", tmp_path)
    fleet.seconds = usual
    assert not report.ok
    assert PLANTED[name][2] in said(report)["fsdp/steps"]


@pytest.mark.deep
@pytest.mark.parametrize("mesh", ["fsdp", "hsdp", "tp", "fsdp-tp", "ddp"])
@pytest.mark.parametrize("target", RIGHT)
def test_right_ones_pass_on_every_mesh(fleet: worlds.Fleet, tmp_path: Path, target: str, mesh: str) -> None:
    report = checked(fleet, target, tmp_path, (4,) if mesh == "fsdp-tp" else (2, 4), mesh)
    if (target, mesh) == ("torch.optim:AdamW", "tp"):  # PyTorch has the gradient of (3, 9) whole on each of four ranks
        assert [r.id for r in report.refused] == ["tp-4/few-rows"]
        assert not report.failures
        return
    assert report.ok, report


@pytest.mark.deep
def test_planted_cut_of_rows_shows_on_four_ranks(fleet: worlds.Fleet, tmp_path: Path) -> None:
    report = checked(fleet, "wrong_ranks:ArraySplit", tmp_path, (4,))  # five rows are 2, 2, 1, 0, and not 2, 1, 1, 1
    assert "odd.weight on ranks [1, 2] (right: wide.weight" in report.failures[0].message


@pytest.mark.deep
def test_muon_of_torch_is_judged_by_its_own_noise(fleet: worlds.Fleet, tmp_path: Path) -> None:
    report = checked(fleet, "torch.optim:Muon", tmp_path, (2, 4))
    assert set(report.narrow.values()) == {"bfloat16"}
    assert not report.failures
    assert [r.id for r in report.refused] == ["fsdp-4/few-rows"]  # (3, 9) on four ranks
    assert "in-place operations that require placement changes" in report.refused[0].message


@pytest.mark.deep
def test_command_and_its_report(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    options = ["--world", "2", "--json", str(file)]
    result = CliRunner().invoke(application(), ["check", "wrong_ranks:SkippingRank", *options])
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith("WRONG: 4 of 4 runs")
    assert json.loads(file.read_text())["failures"][0] == "fsdp-2/steps"
    result = CliRunner().invoke(application(), ["check", "torch.optim:SGD", *options])
    assert result.exit_code == 0
    assert json.loads(file.read_text())["ok"]


@pytest.mark.deep
def test_devices_of_jax() -> None:
    pytest.importorskip("optax")
    report = worlds.check("optax:adam(learning_rate=0.1)", (2,), limits=Limits(300.0))
    assert report.ok, report
    report = worlds.check("wrong_ranks:device_norm", (2,), limits=Limits(300.0))
    assert said(report)["fsdp/steps"].startswith("each shard is updated by itself")
