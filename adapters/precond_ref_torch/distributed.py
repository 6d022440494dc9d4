"""Parameters that are DTensors (FSDP2, tensor parallelism): local shards, owners of whole matrices, movement.

`precond_ref.cost.movement` plans owners and movement; this module does it with `torch.distributed`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from precond_ref.cost.movement import Cut, Layout, Parcel, assign, blocks, coordinates, sizes


def is_sharded(tensor: Any) -> bool:
    """Return True if ``tensor`` is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """Return this rank's part of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """Return the whole of a DTensor, on every rank (a collective)."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def words_of(tensor: Any) -> str:
    """Return mesh and placements in words; "whole" for a tensor that is no DTensor."""
    return f"{place_of(tensor.device_mesh)} {tensor.placements}" if is_sharded(tensor) else "whole"


def shard_of(full: Tensor, like: Any) -> Tensor:
    """Return the part of ``full`` that this rank has of the DTensor ``like``; no communication."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    replicated = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    part: Tensor = replicated.redistribute(mesh, like.placements).to_local()
    return part


def wrap(part: Tensor, like: Any) -> Tensor:
    """Return a DTensor with the local ``part`` and the layout of ``like``; ``part`` itself for a plain ``like``."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    wrapped: Tensor = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return wrapped


def aligned_grad(param: Any) -> Any:
    """Return ``param.grad``, laid out as ``param``."""
    grad = param.grad
    if is_sharded(param) and grad.placements != param.placements:
        return grad.redistribute(param.device_mesh, param.placements)
    return grad


def restored(value: Tensor, like: Any, shape: torch.Size) -> Tensor:
    """Return this rank's part of a saved elementwise state: a DTensor of any layout, the whole, or the part."""
    if is_sharded(value):
        if is_sharded(like):
            return value.redistribute(like.device_mesh, like.placements).to_local()  # type: ignore[attr-defined]
        return whole(value)
    if is_sharded(like) and value.shape == like.shape and value.shape != shape:
        return shard_of(value.to(like.device), like)
    return value


# ---- owners ---------------------------------------------------------------------------------------------------------


def layout_of(tensor: Any) -> Layout:
    """Return the layout of a DTensor; ValueError for a placement that is neither a copy nor a cut along one axis."""
    cuts: list[Cut | None] = []
    for placement in tensor.placements:
        if placement.is_replicate():
            cuts.append(None)
        elif hasattr(placement, "dim") and hasattr(placement, "split_factor"):
            cuts.append(Cut(placement.dim, placement.split_factor))
        elif placement.is_shard():
            cuts.append(Cut(placement.dim))
        else:
            raise ValueError(f"a parameter must be sharded or replicated, got one of placements {tensor.placements}")
    return Layout(tuple(tensor.device_mesh.shape), tuple(cuts))


def free_axes(unit: Sequence[Any], apart: bool) -> tuple[int, ...]:
    """Return the mesh axes along which a unit has several owners: if ``apart``, those that copy all its parameters."""
    if not apart:
        return ()
    layouts = [layout_of(param) for param in unit]
    return tuple(axis for axis in range(len(layouts[0].mesh)) if all(layout.cuts[axis] is None for layout in layouts))


def owners(
    units: Sequence[tuple[tuple[Any, ...], str, float]], known: Mapping[Any, int], apart: bool
) -> dict[Any, int]:
    """Return the rank of the mesh that updates each unit ``(parameters, name, cost)`` of DTensors not in ``known``.

    The keys are first parameters. ``apart``: each replica has an owner, and the rank is that of the first one.
    """
    result: dict[Any, int] = {}
    for mesh in dict.fromkeys(params[0].device_mesh for params, _, _ in units):
        places = coordinates(tuple(mesh.shape))
        loads = [0.0] * len(places)
        new: dict[tuple[int, ...], list[tuple[Any, str, float]]] = {}
        for params, name, cost in units:
            if params[0].device_mesh != mesh:
                continue
            free = free_axes(params, apart)
            if params[0] in known:
                _add(loads, places, known[params[0]], free, cost)
            else:
                new.setdefault(free, []).append((params[0], name, cost))
        for free, some in new.items():
            ranks = [rank for rank, place in enumerate(places) if not any(place[axis] for axis in free)]
            costs, names = [cost for _, _, cost in some], [name for _, name, _ in some]
            for (param, _, cost), i in zip(some, assign(costs, names, [loads[r] for r in ranks]), strict=True):
                result[param] = ranks[i]
                _add(loads, places, ranks[i], free, cost)
    return result


def _add(loads: list[float], places: Any, owner: int, free: tuple[int, ...], cost: float) -> None:
    for rank, place in enumerate(places):
        if all(axis in free or at == own for axis, (at, own) in enumerate(zip(place, places[owner], strict=True))):
            loads[rank] += cost


def owns(unit: Sequence[Any], owner: int, apart: bool) -> bool:
    """Return True if this process updates a unit; ``owner`` is the rank of its (first) owner in the mesh."""
    mesh = unit[0].device_mesh
    own, free = coordinates(tuple(mesh.shape))[owner], free_axes(unit, apart)
    return all(axis in free or at == own[axis] for axis, at in enumerate(mesh.get_coordinate()))


# ---- movement -------------------------------------------------------------------------------------------------------


class Team:
    """The ranks of one mesh, as one process group (making it is a collective, if the mesh has several axes)."""

    def __init__(self, mesh: Any) -> None:
        import torch.distributed as dist

        self.mesh, self.size = mesh, mesh.size()
        self.ranks, _ = place_of(mesh)
        self.rank = self.ranks.index(dist.get_rank())
        self.group = mesh.get_group() if mesh.ndim == 1 else dist.new_group(self.ranks, use_local_synchronization=True)

    def ask(self, words: str, wrong: bool, travels: bool) -> tuple[bool, bool]:
        """Return True if ranks have other ``words`` or one is ``wrong``; and if one ``travels`` (a collective)."""
        import torch.distributed as dist

        digest = int.from_bytes(hashlib.blake2b(words.encode(), digest_size=7).digest(), "big")
        flags = torch.tensor([digest, -digest, int(wrong), int(travels)], device=self.mesh.device_type)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        most, least, any_wrong, any_travels = flags.tolist()
        return bool(any_wrong or most != -least), bool(any_travels)

    def told(self, value: Any) -> list[Any]:
        """Return what each rank tells (a collective)."""
        import torch.distributed as dist

        result: list[Any] = [None] * self.size
        dist.all_gather_object(result, value, group=self.group)
        return result


def place_of(mesh: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return ranks and shape of a mesh."""
    return tuple(mesh.mesh.flatten().tolist()), tuple(mesh.shape)


def order_of(mesh: Any) -> Any:
    """Return the key by which all ranks sort meshes: in this order no rank waits for one that waits for it.

    A mesh whose ranks have smaller meshes too comes after these, so that all its ranks know what those have found.
    """
    ranks, shape = place_of(mesh)
    return len(ranks), ranks, shape


class Circle:
    """All ranks that the meshes of these teams link, also over meshes of other ranks: if one refuses, all do.

    Making it is a collective of all these ranks. In each round the ranks of each team tell each other all that they
    have heard. News passes from rank to rank through meshes, on a shortest way through no mesh twice, and meshes that
    lie in larger ones are not needed. So the number of the largest meshes is enough rounds.
    """

    def __init__(self, teams: Sequence[Team]) -> None:
        import torch.distributed as dist

        self.me = dist.get_rank()
        heard, known = {self.me}, {frozenset(team.ranks) for team in teams}
        self.rounds = 0
        while True:
            largest = [ranks for ranks in known if not any(ranks < other for other in known)]
            self.ranks = frozenset().union(*largest)
            if heard >= self.ranks and self.rounds >= len(largest):
                break
            for team in teams:
                for theirs, meshes in team.told((heard, known)):
                    heard, known = heard | theirs, known | meshes
            self.rounds += 1

    def ask(
        self, teams: Sequence[Team], wrong: bool, travels: bool = False, words: Callable[[Any], str] | None = None
    ) -> tuple[bool, bool]:
        """Return True if a rank says ``wrong``, or ranks of a mesh other words; and if one says ``travels``."""
        for number in range(self.rounds):
            for team in teams:
                differ, more = team.ask(words(team.mesh) if words and number == 0 else "", wrong, travels)
                wrong, travels = wrong or differ, travels or more
        return wrong, travels

    def told(self, teams: Sequence[Team], value: Any) -> dict[int, Any]:
        """Return what each rank tells, in the order of ranks."""
        known = {self.me: value}
        for _ in range(self.rounds):
            for team in teams:
                for theirs in team.told(known):
                    known.update(theirs)
        return dict(sorted(known.items()))


class Move:
    """Bring tensors of one dtype to the owners of their matrices, and directions back, in one exchange each way."""

    def __init__(self, parcels: Sequence[Parcel], team: Team) -> None:
        self.parcels, self.team = parcels, team
        rank, ranks = team.rank, range(team.size)
        self.mine = [rank in parcel.owners for parcel in parcels]
        """True for each parcel that this rank owns."""
        held = [i for i, mine in enumerate(self.mine) if mine]
        self.sent: list[list[int]] = [[] for _ in ranks]
        """Indices of the parcels whose parts go to each rank, in order."""
        self.returned: list[list[int]] = [[] for _ in ranks]
        """Indices of the parcels whose directions come from each rank, in order."""
        for i, parcel in enumerate(parcels):
            for owner in parcel.owners:
                if parcel.sends(rank, owner):
                    self.sent[owner].append(i)
            self.returned[parcel.owner_of(rank)].append(i)
        self.received = [[i for i in held if parcels[i].sends(source, rank)] for source in ranks]
        self.sent_back = [[i for i in held if parcels[i].owner_of(target) == rank] for target in ranks]

    def out(self, parts: Sequence[Tensor]) -> Callable[[], list[Tensor | None]]:
        """Send this rank's part of each parcel; the function returned waits, and gives an owner the whole ones."""
        packed = [[parts[i] for i in some] for some in self.sent]
        counts = [[self.parcels[i].amounts[source] for i in some] for source, some in enumerate(self.received)]
        wait = self._exchange(packed, counts, parts[0])

        def receive() -> list[Tensor | None]:
            result = [
                parts[i].new_empty(p.shape) if mine else None
                for i, (p, mine) in enumerate(zip(self.parcels, self.mine, strict=True))
            ]
            pieces = iter(wait())
            for source, some in enumerate(self.received):
                for i in some:
                    region = self.parcels[i].regions[source]
                    piece, full = next(pieces).view(sizes(region)), result[i]
                    assert full is not None
                    for there, here in blocks(region):
                        full[there] = piece[here]
            return result

        return receive

    def back(self, wholes: Sequence[Tensor | None], like: Tensor) -> Callable[[], list[Tensor]]:
        """Send each rank its part of what this one owns, of the dtype of ``like``; the function gives this one's."""
        packed = [[self._part(i, target, wholes[i]) for i in some] for target, some in enumerate(self.sent_back)]
        rank = self.team.rank
        counts = [[self.parcels[i].amounts[rank] for i in some] for some in self.returned]
        wait = self._exchange(packed, counts, like)

        def receive() -> list[Tensor]:
            pieces = wait()
            order = [i for some in self.returned for i in some]
            found = dict(zip(order, pieces, strict=True))
            return [found[i].view(sizes(p.regions[rank])) for i, p in enumerate(self.parcels)]

        return receive

    def _part(self, i: int, rank: int, full: Any) -> Tensor:
        region = self.parcels[i].regions[rank]
        cut = list(blocks(region))
        if len(cut) == 1:
            part: Tensor = full[cut[0][0]]
            return part
        part = full.new_empty(sizes(region))
        for there, here in cut:
            part[here] = full[there]
        return part

    def _exchange(
        self, packed: list[list[Tensor]], counts: list[list[int]], like: Tensor
    ) -> Callable[[], list[Tensor]]:
        """Send each rank the tensors packed for it; the function returned gives those that come, cut by ``counts``."""
        import torch.distributed as dist

        flat = [tensor.reshape(-1) for some in packed for tensor in some]
        given = torch.cat(flat) if flat else like.new_empty(0)
        splits = [sum(tensor.numel() for tensor in some) for some in packed]
        taken = [sum(some) for some in counts]
        result = like.new_empty(sum(taken))
        handle = dist.all_to_all_single(result, given, taken, splits, group=self.team.group, async_op=True)

        def wait() -> list[Tensor]:
            handle.wait()
            numbers = [number for some in counts for number in some]
            return list(torch.split(result, numbers)) if numbers else []

        return wait


def gathered(values: Iterable[tuple[Tensor, int, tuple[int, ...]]], team: Team) -> list[Tensor | None]:
    """Return the whole of each DTensor on its owner, and None on other ranks (a collective).

    ``values``: DTensor, owner, and the axes of the mesh along which each has an owner of its own.
    """
    items = list(values)
    result: list[Tensor | None] = [None] * len(items)
    for dtype in dict.fromkeys(value.dtype for value, _, _ in items):
        some = [i for i, (value, _, _) in enumerate(items) if value.dtype == dtype]
        parcels = [Parcel(tuple(v.shape), layout_of(v), owner, apart) for v, owner, apart in (items[i] for i in some)]
        wholes = Move(parcels, team).out([local(items[i][0]) for i in some])()
        for i, value in zip(some, wholes, strict=True):
            result[i] = value
    return result


def dealt(values: Iterable[tuple[Tensor, Any, int, tuple[int, ...]]], team: Team) -> list[Tensor]:
    """Return each tensor of an owner as a DTensor cut along its first axis among all ranks (a collective).

    A tensor without axes is copied. ``values``: the tensor (ranks that do not own it give any), one of its shape and
    dtype, its owner, and the axes of the mesh along which each has an owner of its own.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    items = list(values)
    result: list[Any] = [None] * len(items)
    mesh = team.mesh
    for dtype in dict.fromkeys(like.dtype for _, like, _, _ in items):
        some = [i for i, (_, like, _, _) in enumerate(items) if like.dtype == dtype]
        shapes = [tuple(items[i][1].shape) for i in some]
        layouts = [Layout(tuple(mesh.shape), (Cut(0) if shape else None,) * mesh.ndim) for shape in shapes]
        parcels = [Parcel(s, lay, *items[i][2:]) for i, s, lay in zip(some, shapes, layouts, strict=True)]
        move = Move(parcels, team)
        wholes = [items[i][0] if mine else None for i, mine in zip(some, move.mine, strict=True)]
        for i, shape, part in zip(some, shapes, move.back(wholes, items[some[0]][0])(), strict=True):
            placements = [Shard(0) if shape else Replicate()] * mesh.ndim
            stride = torch.empty(shape, device="meta").stride()
            own = part.clone()  # in memory of its own, which copies and files take whole
            result[i] = DTensor.from_local(
                own, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
            )
    return result
