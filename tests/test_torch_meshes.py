"""The same numbers on every mesh, saved on one and loaded on another: gloo processes on the CPU.

Each test looks at what one run of four processes saw; `python -m pytest -m deep tests/test_torch_meshes.py` runs all
methods on all meshes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from mesh_cases import CHAIN, KINDS, MESHES, OTHER, SHAPED, WAYS, Jobs, run
from typer.testing import CliRunner

import precond_ref as pr
from precond_ref import cost
from precond_ref.cli import application

pytestmark = pytest.mark.full

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("PyTorch was built without gloo", allow_module_level=True)

ROUNDING = 2.0**-53 * 64
"""Of sums of at most ten terms, where one process takes two matrices by one call and their owners do not; and of a
joined pair: one process moves it by strided parts of its direction, in two roundings, an owner's parts are packed."""
FEW = ["Adam", "ASGO", "MBF, joined"]

FAULTS = {
    "": "",
    "lr": "ValueError: parameter first0 has lr 0.25 on rank 0, 0.125 on rank 1",
    "no gradient": "ValueError: parameter first2 has no gradient on rank 3, and one on the others",
    "refused": "ValueError: the step was refused on rank 0: TypeError",
    "update": "RuntimeError: the update of parameter second{} failed on rank 3: ArithmeticError('no decomposition')",
}
"""By fault: the error of the ranks that do not have it themselves."""

LINKED = [*(("chain", fault) for fault in FAULTS), ("ring", ""), ("ring", "update")]

COMPACT: Jobs = [
    ("exact", ("FSDP2", 4, list(KINDS))),
    ("exact", ("HSDP", 4, FEW)),
    ("exact", ("TP, sequence", 3, FEW)),
    ("exact", ("FSDP2 x TP", 4, FEW)),
    ("exact", ("stages", 4, FEW)),
    ("resharded", ("ASGO", "dcp")),
    ("resharded", ("MBF, joined", "full, offloaded, from rank 0")),
    ("agreement", ()),
    ("lacking", ("ASGO",)),
    ("lacking", ("Adam",)),
    ("crossed", (True,)),
    ("crossed", (False,)),
    ("uneven", ()),
    ("failing", ()),
    *(("chained", given) for given in LINKED),
    ("overflow", (True, "stages")),
    *(("overflow", (False, mesh)) for mesh in ("FSDP2", "HSDP", "FSDP2 x TP", "TP")),
    ("accumulated", ()),
    ("placed", ()),
    ("moved", ("FSDP2", 4, "mesh")),
    ("moved", ("HSDP", 4, "mesh")),
    ("moved", ("HSDP", 4, "replica")),
    ("shaped", ()),
    ("overlapped", ()),
    ("interrupted", ()),
    ("full_states", ()),
    ("averaged", ()),
    # planted
    ("resharded", ("ASGO", "dcp", CHAIN[:2], True)),
    ("agreement", (True,)),
    ("lacking", ("Adam", "silent")),
    ("lacking", ("ASGO", "entries stay")),
    ("lacking", ("ASGO", "unheard")),
    ("crossed", (True, True)),
    ("crossed", (False, True)),
    ("uneven", (True,)),
    ("failing", (True,)),
    ("chained", ("chain", "no gradient", True)),
    ("overflow", (False, "stages")),
    ("accumulated", ("doubled gradient",)),
    ("accumulated", ("step per micro-batch",)),
    ("placed", (True,)),
    ("shaped", (True,)),
    ("per_shard", ("matrix",)),
    ("per_shard", ("heads",)),
    ("full_states", ("rank 0's matrices only",)),
    ("full_states", ("a view with an offset",)),
    ("full_states", ("no keys where another rank keeps the state",)),
]
DEEP: Jobs = [
    *(("exact", (mesh, size, list(KINDS))) for mesh, sizes in MESHES.items() for size in sizes),
    *(("resharded", (kind, way)) for kind in ("Adam", "ASGO, heads", "Shampoo", "MBF, joined") for way in WAYS),
    *(("resharded", (kind, "dcp", OTHER)) for kind in KINDS),
]


@lru_cache
def ran(deep: bool) -> dict[str, list[Any]] | AssertionError:
    """Return the results of each rank by job; the error if a rank failed."""
    jobs = DEEP if deep else COMPACT
    with TemporaryDirectory() as folder:
        try:
            return {repr(job): values for job, values in zip(jobs, run(4, jobs, Path(folder)), strict=True)}
        except AssertionError as error:
            return error


def seen(deep: bool) -> dict[str, list[Any]]:
    found = ran(deep)
    if isinstance(found, AssertionError):
        pytest.fail(str(found))
    return found


def both(name: str) -> Any:
    """The jobs of a name, those of the deep run marked."""
    cases = [pytest.param(job, False, id=str(job[1])) for job in COMPACT if job[0] == name and True not in job[1]]
    return cases + [
        pytest.param(job, True, id=f"{job[1]} deep", marks=pytest.mark.deep) for job in DEEP if job[0] == name
    ]


def limit(kind: str) -> float:
    return ROUNDING if "joined" in kind else 0.0


@pytest.mark.parametrize(("job", "deep"), both("exact"))
def test_updates_are_those_of_one_process(job: Any, deep: bool) -> None:
    mesh, size, kinds = job[1]
    for rank, found in enumerate(seen(deep)[repr(job)][:size]):
        assert list(found) == kinds
        for kind, (most, stacked) in found.items():
            assert most <= limit(kind), f"{kind} on {mesh}, rank {rank}: {most}"
            assert stacked <= ROUNDING, f"{kind} on {mesh}, rank {rank}: {stacked}"


def check_shaped(*planted: bool) -> None:
    """Stacks, convolutions, rows and columns, cut along any axis."""
    assert all(departure == 0.0 for found in compact("shaped", *planted)[:3] for departure in found)


def test_parameters_of_other_shapes() -> None:
    check_shaped()
    assert [len(found) for found in compact("shaped")] == [len(SHAPED)] * 3 + [0]


def test_the_check_catches_columns_read_as_rows() -> None:
    with pytest.raises(AssertionError):
        check_shaped(True)


@pytest.mark.parametrize(("job", "deep"), both("resharded"))
def test_training_goes_on_elsewhere(job: Any, deep: bool) -> None:
    legs = job[1][2] if len(job[1]) > 2 else CHAIN
    for found in seen(deep)[repr(job)][: legs[-1][1]]:
        assert found[0] <= limit(job[1][0])
        assert found[1] <= ROUNDING


# ---- what the ranks agree on ----------------------------------------------------------------------------------------


def compact(name: str, *given: Any) -> list[Any]:
    return seen(False)[repr((name, given))]


def check_agreement(*planted: Any) -> None:
    """All ranks raise alike, which names rank and parameter; all is as before, and training goes on."""
    for rank, (bias, *others) in enumerate(compact("agreement", *planted)):
        assert bias[0].startswith("ValueError: parameter norm.bias has no gradient on rank 1, and one on the others")
        matrix, rate, *refused = others
        assert matrix[0].startswith("ValueError: parameter up.weight has no gradient on rank 2, and one on the others")
        assert rate[0] == "ValueError: parameter up.weight has lr 0.125 on rank 0, 0.25 on rank 3"
        own = ("TypeError: Invalid maximize value", "ValueError: Invalid learning rate: None",
               "TypeError: the gradient of a sharded parameter of size [")  # fmt: skip
        for (told, _), text in zip(refused, own, strict=True):
            assert told.startswith(text if rank == 0 else f"ValueError: the step was refused on rank 0: {text[:9]}")
        assert {rest for _, rest in (bias, *others)} == {"kept True, then (0.0, 0.0)"}


def test_ranks_agree_before_anything_moves() -> None:
    check_agreement()


def test_the_check_catches_a_gradient_missing_on_one_rank() -> None:
    with pytest.raises(AssertionError):
        check_agreement(True)


def check_lacking(*given: str) -> None:
    """Both ranks refuse alike, naming parameter and rank; all is as before, and training goes on."""
    for rank, found in enumerate(compact("lacking", *given)[:2]):
        told, kept = found["fallback"]
        refused = "no method is called None" if rank else "the state dict was refused on rank 1: ValueError"
        if given[0] == "ASGO":  # Adam takes every parameter and needs no fallback
            assert told.startswith(f"ValueError: {refused}")
        assert kept
        names = {"first step": "down.weight has no gradient", "save": "up.weight has no state",
                 "load": "up.weight has no state"}  # fmt: skip
        for call, text in names.items():
            told, kept = found[call]
            assert told.startswith(f"ValueError: parameter {text} on rank 1, and one on the others")
            assert kept
        assert found["then"] == (0.0, 0.0)


@pytest.mark.parametrize("kind", ["ASGO", "Adam"])
def test_what_one_rank_lacks_is_refused_by_all(kind: str) -> None:
    check_lacking(kind)


@pytest.mark.parametrize(("kind", "planted"), [("Adam", "silent"), ("ASGO", "entries stay"), ("ASGO", "unheard")])
def test_the_check_catches_what_one_rank_lacks(kind: str, planted: str) -> None:
    with pytest.raises(AssertionError):
        check_lacking(kind, planted)


def check_crossed(*given: bool) -> None:
    """Gradients missing on two ranks, of parameters of one shape, are told apart."""
    for told in compact("crossed", *given)[:2]:
        assert told.startswith("ValueError: parameter b has no gradient on rank 0, and one on the others")


@pytest.mark.parametrize("matrices", [True, False])
def test_gradients_of_one_shape_missing_on_two_ranks_are_refused(matrices: bool) -> None:
    check_crossed(matrices)


@pytest.mark.parametrize("matrices", [True, False])
def test_the_check_catches_parameters_compared_by_shape_alone(matrices: bool) -> None:
    with pytest.raises(AssertionError):
        check_crossed(matrices, True)


def test_ranks_may_cut_their_buffers_differently() -> None:
    assert compact("uneven") == [0.0] * 4


def test_the_check_catches_buffers_that_ranks_compare() -> None:
    assert compact("uneven", True)[:2] == ["the ranks of a mesh differ"] * 2


def check_failing(*planted: Any) -> None:
    """The owner raises its error, the others name it and the parameter; nothing has changed, and training goes on."""
    found = compact("failing", *planted)
    [(owner, told)] = [(rank, told) for rank, (told, *_) in enumerate(found) if told.startswith("ArithmeticError")]
    text = f"the update of parameter down.weight failed on rank {owner}"
    assert told == f"ArithmeticError: no decomposition ({text})"
    for rank, (told, kept, departure) in enumerate(found):
        assert rank == owner or told.startswith(f"RuntimeError: {text}: ArithmeticError('no decomposition')")
        assert kept
        assert departure == (0.0, 0.0)


def test_an_update_that_fails_on_its_owner_fails_on_all_ranks() -> None:
    check_failing()


def test_the_check_catches_an_owner_that_fails_alone() -> None:
    with pytest.raises(AssertionError):
        check_failing(True)


def check_chained(kind: str, fault: str, *planted: Any) -> None:
    """Ranks that no mesh joins to the one with the fault raise too, and change nothing; then all goes on."""
    for rank, (told, kept, departure) in enumerate(compact("chained", kind, fault, *planted)):
        own = rank == {"refused": 0, "update": 3}.get(fault)
        text = FAULTS[fault].format(2 if kind == "chain" else 3)
        assert told.startswith({"refused": "TypeError", "update": "ArithmeticError"}[fault] if own else text)
        assert bool(told) is bool(fault)
        assert kept
        assert departure <= ROUNDING


@pytest.mark.parametrize(("kind", "fault"), LINKED)
def test_ranks_agree_over_meshes_that_overlap(kind: str, fault: str) -> None:
    check_chained(kind, fault)


def test_the_check_catches_a_refusal_that_only_neighbours_hear_of() -> None:
    with pytest.raises(AssertionError):
        check_chained("chain", "no gradient", True)


def check_overflow(agreed: bool, mesh: str) -> None:
    """Every rank skips the step; scales agree."""
    assert compact("overflow", agreed, mesh) == [(2.0, 0.0, 2)] * 4


@pytest.mark.parametrize(
    ("agreed", "mesh"), [(True, "stages"), (False, "FSDP2"), (False, "HSDP"), (False, "FSDP2 x TP")]
)
def test_all_ranks_skip_an_overflow(agreed: bool, mesh: str) -> None:
    check_overflow(agreed, mesh)


def test_the_check_catches_a_stage_that_steps() -> None:
    with pytest.raises(AssertionError):
        check_overflow(False, "stages")


def test_no_scaler_takes_sharded_and_plain_parameters_together() -> None:
    assert all("got mixed torch.Tensor and DTensor" in told for told in compact("overflow", False, "TP"))


def test_gradient_accumulation() -> None:
    """The samples of one process are summed in another order: rounding of 40 samples, three steps."""
    assert max(compact("accumulated")) <= 40 * 3 * 2.0**-53


@pytest.mark.parametrize("planted", ["doubled gradient", "step per micro-batch"])
def test_the_check_catches_a_wrong_accumulation(planted: str) -> None:
    assert min(compact("accumulated", planted)) > 1e-3


def test_data_parallel_ranks_have_the_same_bits() -> None:
    assert [len(same) for same in compact("averaged")] == [len(KINDS)] * 3 + [0]
    assert all(map(all, compact("averaged")))


# ---- movement -------------------------------------------------------------------------------------------------------


def test_parts_are_where_the_plan_says() -> None:
    assert compact("placed") == [[]] * 4


def test_the_check_catches_strided_shards_read_as_contiguous_ones() -> None:
    assert [name for found in compact("placed", True) for name in found] == [
        "up.weight on FSDP2 x TP 4",
        "up.bias on FSDP2 x TP 4",
    ] * 2


@pytest.mark.parametrize(
    ("mesh", "owner", "by_hand"), [("FSDP2", "mesh", 1792), ("HSDP", "mesh", 2496), ("HSDP", "replica", 2496)]
)
def test_bytes_sent_are_those_of_the_formula(mesh: str, owner: str, by_hand: int) -> None:
    """156 numbers of 8 bytes in four matrices. FSDP2: the owners have 44 of them and the others go each way. HSDP:
    half goes out and comes back within a replica, and all comes back to the other one; or half each way in both."""
    found = compact("moved", mesh, 4, owner)
    (_, shapes, _), *_ = found
    splits = cost.estimate("", pr.ASGO(), shapes, dtype="float64", mesh=4 if mesh == "FSDP2" else (2, 2)).mesh
    [split] = [split for split in splits if split.name == ("replica" if owner == "replica" else "owner")]
    assert sum(sent for sent, _, _ in found) == split.sent == by_hand
    assert max(sent for sent, _, _ in found) == split.most_sent
    assert {departure for _, _, departure in found} == {0.0}


def test_exchanges_overlap_the_updates_before() -> None:
    for done in compact("overlapped")[:2]:
        assert done[:2] == ["out", "out"]
        assert [done.count(name) for name in ("out", "back")] == [3, 3]
        assert done.index("back") < len(done) - 1 - done[::-1].index("out")


def test_an_error_before_the_way_back_leaves_all_as_it_was() -> None:
    for told, kept in compact("interrupted")[:2]:
        assert told.endswith("as before the step: 0-9 of group 0")
        assert kept


@pytest.mark.parametrize("kind", ["matrix", "heads"])
def test_the_check_catches_updates_of_local_rows(kind: str) -> None:
    assert min(compact("per_shard", kind)) > 1e-3


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_full_states_and_copies_are_those_of_one_process() -> None:
    assert compact("full_states") == [""] * 4


@pytest.mark.parametrize(
    "planted", ["rank 0's matrices only", "a view with an offset", "no keys where another rank keeps the state"]
)
def test_the_check_catches_states_that_are_not_handed_round(planted: str) -> None:
    assert all(compact("full_states", planted))


def test_the_check_catches_states_forgotten_while_loading() -> None:
    found = compact("resharded", "ASGO", "dcp", CHAIN[:2], True)
    assert min(most for most, _ in found[:2]) > 1e-3


ROOT = Path(__file__).resolve().parents[1]
SESSION = re.compile(r"```shell\n((?:torchrun .*\n)+)```\n\n```text\n(.*?)```", re.DOTALL)


def check_example(folder: Path, *changes: tuple[str, str]) -> None:
    """The commands of the page print what it says; ``changes`` are made in the program."""
    [(commands, expected)] = SESSION.findall((ROOT / "docs" / "distributed.md").read_text(encoding="utf-8"))
    program, text = folder / "many_devices.py", (ROOT / "examples" / "many_devices.py").read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    program.write_text(text, encoding="utf-8")
    printed = ""
    for command in commands.splitlines():
        _, *words = command.replace("examples/many_devices.py", str(program)).split()
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *words],
            cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    assert printed == expected


def test_the_example_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    check_example(tmp_path)


@pytest.mark.deep
def test_the_check_catches_an_example_that_forgets_the_state(tmp_path: Path) -> None:
    begin = "    if begin:\n"
    changes = ("=optimizer_state)", "=fresh)"), (begin, f"{begin}        fresh = get_state_dict(model, optimizer)[1]\n")
    with pytest.raises(AssertionError, match="step 5, 4 ra"):  # it runs, and prints other losses
        check_example(tmp_path, *changes)


def check_llama(page: str) -> None:
    """The rows of the table are those that the command prints."""
    rows = [
        line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| [0-9x]+ \| (Muon|ASGO) \|", line)
    ]
    for mesh in dict.fromkeys(row[0] for row in rows):
        options = ["--preset", "llama-70b", "--mesh", mesh, "--method", "Muon", "--method", "ASGO"]
        printed = CliRunner().invoke(application(), ["cost", *options]).stdout
        found, method = [], ""
        for line in re.findall(
            r"^(?:Muon|ASGO| {4}).*\b(?:owner|replica|cut).*", printed[printed.index("\nOn ") :], re.M
        ):
            first, *cells = re.split(r" {2,}", line)
            method = first or method
            found.append([mesh, method, *cells[:-1]])
        assert found == [row for row in rows if row[0] == mesh]
    assert rows


@pytest.mark.deep
def test_the_page_counts_llama_as_the_command_does() -> None:
    check_llama((ROOT / "docs" / "distributed.md").read_text(encoding="utf-8"))


@pytest.mark.deep
def test_the_check_catches_another_number_on_the_page() -> None:
    rows = [
        "| 8 | Muon | owner | 35.1 GB | 481 GB | 60.5 GB | 0 | 1.0{} |",
        "| 8 | ASGO | owner | 48.5 GB | 481 GB | 60.6 GB | 0 | 1.01 |",
    ]
    check_llama("\n".join(rows).format(0))
    with pytest.raises(AssertionError):
        check_llama("\n".join(rows).format(2))


def check_cut_short(folder: Path, same_folder: bool) -> None:
    """With a rank killed while it saves, the complete save before it loads, and the other is refused."""
    run(2, [("killed", (same_folder,))], folder, killed=(1,))
    [[first], [second]] = run(1, [("reloaded", ("first",)), ("reloaded", ("second",))], folder)
    assert first == (0.0, 1)
    assert ".metadata'" in second


def test_a_save_cut_short_is_refused(tmp_path: Path) -> None:
    check_cut_short(tmp_path, same_folder=False)


def test_the_check_catches_a_save_over_the_last_one(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_cut_short(tmp_path, same_folder=True)
