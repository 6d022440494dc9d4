"""The same numbers on every mesh, saved on one and loaded on another: gloo processes on the CPU.

Each test looks at what one run of four processes saw; `python -m pytest -m deep tests/test_torch_meshes.py` runs all
methods on all meshes.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from mesh_cases import CHAIN, KINDS, MESHES, OTHER, WAYS, Jobs, run

pytestmark = pytest.mark.full

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("PyTorch was built without gloo", allow_module_level=True)

ROUNDING = 2.0**-53 * 64
"""Of sums of at most ten terms, where one process takes two matrices by one call and their owners do not; and of a
joined pair: one process moves it by strided parts of its direction, in two roundings, an owner's parts are packed."""
FEW = ["Adam", "ASGO", "MBF, joined"]

COMPACT: Jobs = [
    ("exact", ("FSDP2", 4, list(KINDS))),
    ("exact", ("HSDP", 4, FEW)),
    ("exact", ("TP, sequence", 3, FEW)),
    ("exact", ("FSDP2 x TP", 4, FEW)),
    ("exact", ("stages", 4, FEW)),
    ("resharded", ("ASGO", "dcp")),
    ("resharded", ("MBF, joined", "full, offloaded, from rank 0")),
    ("resharded", ("ASGO", "dcp", CHAIN, True)),
]
DEEP: Jobs = [
    *(("exact", (mesh, size, list(KINDS))) for mesh, sizes in MESHES.items() for size in sizes),
    *(("resharded", (kind, way)) for kind in ("Adam", "ASGO, heads", "Shampoo", "MBF, joined") for way in WAYS),
    *(("resharded", (kind, "dcp", OTHER)) for kind in KINDS),
]


@lru_cache
def seen(deep: bool) -> dict[Any, list[Any]]:
    """What each rank returned of each job."""
    jobs = DEEP if deep else COMPACT
    with TemporaryDirectory() as folder:
        return {repr(job): values for job, values in zip(jobs, run(4, jobs, Path(folder)), strict=True)}


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


@pytest.mark.parametrize(("job", "deep"), both("resharded"))
def test_training_goes_on_elsewhere(job: Any, deep: bool) -> None:
    legs = job[1][2] if len(job[1]) > 2 else CHAIN
    for found in seen(deep)[repr(job)][: legs[-1][1]]:
        assert found[0] <= limit(job[1][0])
        assert found[1] <= ROUNDING


def test_the_check_catches_states_forgotten_while_loading() -> None:
    found = seen(False)[repr(("resharded", ("ASGO", "dcp", CHAIN, True)))][0]
    assert found[0] > 1e-3


def cut_short(folder: Path, same_folder: bool) -> None:
    """With a rank killed while it saves, the complete save before it loads, and the other is refused."""
    run(2, [("killed", (same_folder,))], folder, killed=(1,))
    [[first], [second]] = run(1, [("reloaded", ("first",)), ("reloaded", ("second",))], folder)
    assert first == (0.0, 1)
    assert ".metadata'" in second


def test_a_save_cut_short_is_refused(tmp_path: Path) -> None:
    cut_short(tmp_path, same_folder=False)


def test_the_check_catches_a_save_over_the_last_one(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        cut_short(tmp_path, same_folder=True)
