"""What the PyTorch adapter sends to owners and back, all ranks of a mesh in one process."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from mutation import mutated

from precond_ref.cost import movement
from precond_ref_torch import distributed


class Fake:
    """Stands for the process group of a mesh: what each rank sends is put in a box that all have."""

    def __init__(self, rank: int, size: int, box: dict[Any, list[torch.Tensor]]) -> None:
        self.rank, self.size, self.box, self.calls = rank, size, box, 0

    def exchange(self, packed: Any, counts: Any, like: torch.Tensor) -> Any:
        call, self.calls = self.calls, self.calls + 1
        empty = like.new_empty(0)
        self.box[call, self.rank] = [torch.cat([empty, *(t.reshape(-1) for t in some)]) for some in packed]

        def wait() -> list[torch.Tensor]:
            found = []
            for source, numbers in enumerate(counts):
                sent = self.box[call, source][self.rank]
                assert len(sent) == sum(numbers), f"rank {self.rank} gets {len(sent)} numbers from {source}"
                found += list(sent.split(numbers)) if numbers else []
            return found

        return wait


Cut, Layout = movement.Cut, movement.Layout
CASES: dict[str, tuple[list[tuple[tuple[int, ...], Any]], tuple[int, ...], int, int]] = {
    # tensors and layouts, axes apart, numbers that go out in all, numbers that come back: counted by hand
    "rows, uneven and empty": ([((5, 2), Layout((4,), (Cut(0),)))], (), 10 - 4, 10 - 4),
    "columns": ([((3, 4), Layout((2,), (Cut(1),)))], (), 6, 6),
    "replicas": ([((4, 6), Layout((2, 2), (None, Cut(0))))], (), 12, 3 * 12),
    "replicas apart": ([((4, 6), Layout((2, 2), (None, Cut(0))))], (0,), 2 * 12, 2 * 12),
    "strided": ([((8, 3), Layout((2, 2), (Cut(0, 2), Cut(0))))], (), 18, 18),
    "strided, uneven": ([((6, 1), Layout((2, 2), (Cut(0, 2), Cut(0))))], (), 6 - 2, 6 - 2),
    "rows and columns": ([((4, 4), Layout((2, 2), (Cut(0), Cut(1))))], (), 12, 12),
    "a weight and its bias": (
        [((4, 4), Layout((2,), (Cut(1),))), ((4,), Layout((2,), (None,)))], (), 8, 8 + 4,
    ),
}  # fmt: skip


def check_moves(lib: Any, plan: Any = movement) -> None:
    """Owners get the whole, every rank its part of what they make of it; no number goes more often than it must."""
    for name, (tensors, apart, out, back) in CASES.items():
        size = len(movement.coordinates(tensors[0][1].mesh))
        values = [torch.arange(1.0, 1 + shape.numel()).reshape(shape) for shape in (torch.Size(s) for s, _ in tensors)]
        parcels = [plan.Parcel(shape, plan.Layout(*layout), 0, apart) for shape, layout in tensors]
        box: dict[Any, list[torch.Tensor]] = {}
        teams = [Fake(rank, size, box) for rank in range(size)]
        moves = [lib.Move(parcels, team) for team in teams]
        for move, team in zip(moves, teams, strict=True):
            move._exchange = team.exchange

        def part(rank: int, i: int, values: Any = values, parcels: Any = parcels) -> torch.Tensor:
            region = parcels[i].regions[rank]
            result = torch.empty(movement.sizes(region))
            for there, here in movement.blocks(region):
                result[here] = values[i][there]
            return result

        mine = [[part(rank, i) for i in range(len(parcels))] for rank in range(size)]
        arriving = [move.out(parts) for move, parts in zip(moves, mine, strict=True)]
        wholes = [wait() for wait in arriving]
        for rank, found in enumerate(wholes):
            assert all((w is not None) == (rank in p.owners) for w, p in zip(found, parcels, strict=True)), name
            assert all(w is None or torch.equal(w, v) for w, v in zip(found, values, strict=True)), name
        directions = [[None if w is None else 2 * w for w in found] for found in wholes]
        coming = [move.back(d, values[0]) for move, d in zip(moves, directions, strict=True)]
        for rank, wait in enumerate(coming):
            assert all(torch.equal(p, 2 * m) for p, m in zip(wait(), mine[rank], strict=True)), name
        sent = [sum(len(box[call, a][b]) for a, b in product(range(size), repeat=2) if a != b) for call in range(2)]
        assert sent == [out, back], f"{name}: {sent}"
        assert [sum(numbers) for numbers in movement.traffic(parcels)] == sent


def test_moves() -> None:
    check_moves(distributed)


MUTANTS = {
    "results to the first replica only": ("parcels[i].owner_of(target) == rank]",
        "parcels[i].owner_of(target) == rank and parcels[i].sends(target, rank)]"),
    "parts in another order": ("for there, here in blocks(region):\n                        full",
        "full = full.flip(0)\n                    for there, here in blocks(region):\n                        full"),
    "the part of the owner alone": ("self._part(i, target, wholes[i])", "self._part(i, self.team.rank, wholes[i])"),
}  # fmt: skip
PLAN_MUTANTS = {
    "replicas send, too": ("return all(own[axis] == theirs[axis] for axis in self.copied)", "return True"),
    "an owner in each replica, but one sends": ("if axis in self.apart else own[axis]", "if False else own[axis]"),
    "nobody sends to an owner elsewhere": ("for axis in self.copied)", "for axis in range(len(own)))"),
}


@pytest.mark.parametrize("old_new", MUTANTS.values(), ids=MUTANTS)
def test_planted_move_is_caught(old_new: Any) -> None:
    with pytest.raises((AssertionError, RuntimeError, KeyError, TypeError)):
        check_moves(mutated(distributed, old_new))


@pytest.mark.parametrize("old_new", PLAN_MUTANTS.values(), ids=PLAN_MUTANTS)
def test_planted_plan_is_caught(old_new: Any) -> None:
    with pytest.raises((AssertionError, RuntimeError, KeyError, TypeError)):
        check_moves(distributed, mutated(movement, old_new))
