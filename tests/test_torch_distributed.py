"""DDP and FSDP2 with three gloo processes (deep: with two as well), started once for each number."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch_adapter_cases import FSDP, FSDP_EACH, ONE_EACH
from torch_worker import KINDS, ways

pytestmark = pytest.mark.deep  # test_torch_meshes has one of each in the full tier

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("PyTorch was built without gloo", allow_module_level=True)

worlds = pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.deep), 3])  # 3: uneven shards too


@lru_cache
def outcome(world: int) -> list[Any] | str:
    """What each rank saw, or what they printed if one failed."""
    worker = Path(__file__).with_name("torch_worker.py")
    with TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [sys.executable, str(worker), str(rank), str(world), folder],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        try:
            printed = [process.communicate(timeout=300)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        if any(process.returncode for process in started):
            return "\n".join(printed)
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(world)]


def run(world: int) -> list[Any]:
    seen = outcome(world)
    assert not isinstance(seen, str), seen
    return seen


@worlds
@pytest.mark.parametrize("name", ONE_EACH)
def test_ddp_parameters_are_equal_to_the_bit(world: int, name: str) -> None:
    first, *others = [seen["ddp"][name] for seen in run(world)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("world", "name"),
    [*(pytest.param(2, name, marks=pytest.mark.deep) for name in FSDP), *((3, name) for name in FSDP_EACH)],
)
def test_fsdp_updates_whole_matrices(world: int, name: str) -> None:
    assert all(seen["fsdp"][name] <= 1e-12 for seen in run(world))


@worlds
def test_other_layouts_and_missing_gradients(world: int) -> None:
    assert all(seen["replicated"] <= 1e-12 for seen in run(world))
    assert all(seen["mixed"] <= 1e-12 for seen in run(world))
    assert all(seen["joined"] <= 1e-12 for seen in run(world))
    assert all(seen["columns"] <= 1e-12 for seen in run(world))
    assert all(seen["skipping"] <= 1e-12 for seen in run(world))


@worlds
def test_ddp_statistics_of_all_samples(world: int) -> None:
    exchanged, alone = zip(*(seen["per sample"] for seen in run(world)), strict=True)
    assert all(d <= 1e-12 for d in exchanged)
    assert min(alone) > 1e-3  # the planted mistake


@worlds
def test_the_check_catches_updates_per_shard(world: int) -> None:
    assert min(seen["per shard"] for seen in run(world)) > 1e-3


@worlds
def test_each_matrix_is_updated_once(world: int) -> None:
    seen = [s["work"] for s in run(world)]
    assert sorted(size for s in seen for size in s["updated"]) == [3, 3, 6, 6, 6, 6]
    assert sum(s["kept"] for s in seen) == 6
    loads = [sum(size**3 for size in s["updated"]) for s in seen]
    assert max(loads) <= min(loads) + 6**3


@worlds
@pytest.mark.parametrize("name", ["AGD", "ASGO", "Shampoo"])
def test_fsdp_resumes_with_the_same_bits(world: int, name: str) -> None:
    assert all(seen["resumed"][name][0] for seen in run(world))
    if name == "AGD":
        assert all(seen["resumed"][name][1] for seen in run(world))


@worlds
@pytest.mark.parametrize("kind", KINDS)
def test_fsdp_states_are_carried_over(world: int, kind: str) -> None:
    for seen in run(world):
        assert [way for way in ways(world) if not seen["carried"][f"{kind}, {way}"]] == []


@worlds
@pytest.mark.parametrize("kind", KINDS)
def test_full_states_are_those_of_one_process(world: int, kind: str) -> None:
    assert all(seen["full states"][kind] <= 1e-10 for seen in run(world))


@worlds
def test_a_checkpoint_of_another_rank_is_refused(world: int) -> None:
    messages = [seen["foreign"] for seen in run(world)]
    assert "has step for parameter 0, ASGO keeps step, m, gram" in messages[0]
    assert all(text.startswith("the state dict was refused on rank 0: ValueError(") for text in messages[1:])
