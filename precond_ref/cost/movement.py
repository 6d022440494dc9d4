"""Owners of matrices among the devices of a mesh, and the entries that travel for them: plain numbers, no device.

A mesh is a grid of devices, such as 2 x 4; a device's rank counts them row by row. A tensor is laid out on it by one
entry for each axis of the mesh: `Cut` along an axis of the tensor, or None, which means a copy on each. The PyTorch
adapter moves what `Parcel` says, and ``precond-ref cost --mesh`` sums it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, product
from operator import add
from typing import NamedTuple

from precond_ref.cost.counting import Shape, count
from precond_ref.protocol import Method

Interval = tuple[int, int]
"""First index, and the one after the last."""
Region = tuple[tuple[Interval, ...], ...]
"""Indices along each axis of a tensor; a device has the entries of their product, in this order."""


class Cut(NamedTuple):
    """One axis of a mesh cuts an axis of a tensor into chunks, of which the last may be shorter or empty."""

    axis: int
    factor: int = 1
    """Each of ``factor`` chunks is cut, and each device has a piece of each (PyTorch's ``_StridedShard``)."""


class Layout(NamedTuple):
    """How a tensor lies on a mesh."""

    mesh: tuple[int, ...]
    cuts: tuple[Cut | None, ...]

    def copied(self) -> tuple[int, ...]:
        """Return the axes of the mesh along which every device has the same."""
        return tuple(axis for axis, cut in enumerate(self.cuts) if cut is None)


@lru_cache(maxsize=4096)
def coordinates(mesh: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the coordinates of each device, by rank."""
    return tuple(product(*map(range, mesh)))


def _chunks(intervals: Sequence[Interval], number: int) -> list[list[Interval]]:
    """Cut n indices into ``number`` chunks of ceil(n / number); the last ones are shorter or empty."""
    total = sum(stop - start for start, stop in intervals)
    size = -(-total // number)
    result = []
    for first in range(0, number * size, size) if size else [0] * number:
        chunk, at = [], 0
        for start, stop in intervals:
            low, high = max(start, start + first - at), min(stop, start + first + size - at)
            if low < high:
                chunk.append((low, high))
            at += stop - start
        result.append(chunk)
    return result


@lru_cache(maxsize=4096)
def regions(shape: Shape, layout: Layout) -> tuple[Region, ...]:
    """Return the indices that each device has of a tensor, by rank."""
    found = []
    for place in coordinates(layout.mesh):
        region: list[list[Interval]] = [[(0, size)] if size else [] for size in shape]
        for cut, devices, at in zip(layout.cuts, layout.mesh, place, strict=True):
            if cut is not None:
                parts = _chunks(region[cut.axis], cut.factor)
                region[cut.axis] = [piece for part in parts for piece in _chunks(part, devices)[at]]
        found.append(tuple(map(tuple, region)))
    return tuple(found)


def sizes(region: Region) -> Shape:
    """Return the shape of the part with these indices."""
    return tuple(sum(stop - start for start, stop in intervals) for intervals in region)


@lru_cache(maxsize=4096)
def amounts(shape: Shape, layout: Layout) -> tuple[int, ...]:
    """Return the number of entries of each device, by rank."""
    return tuple(math.prod(sizes(region)) for region in regions(shape, layout))


def blocks(region: Region) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Yield slices of the whole tensor, each with the slices of a device's part that have the same entries."""
    along = []
    for intervals in region:
        ends = list(accumulate(stop - start for start, stop in intervals))
        own = [(end - (stop - start), end) for end, (start, stop) in zip(ends, intervals, strict=True)]
        along.append(list(zip(intervals, own, strict=True)))
    for pairs in product(*along):
        yield tuple(slice(*whole) for whole, _ in pairs), tuple(slice(*part) for _, part in pairs)


class Parcel:
    """A tensor that comes together on the device that updates its matrix, and whose directions go back.

    Arguments:
        shape: of the whole.
        layout: how it lies.
        owner: rank of the device that updates it.
        apart: axes of the mesh along which each has an owner of its own, at ``owner``'s other coordinates.
    """

    def __init__(self, shape: Shape, layout: Layout, owner: int, apart: tuple[int, ...] = ()) -> None:
        self.shape, self.layout, self.owner, self.apart = shape, layout, owner, apart
        self.places = coordinates(layout.mesh)
        self.copied = layout.copied()

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        """The indices of each device, by rank."""
        return regions(self.shape, self.layout)

    @property
    def amounts(self) -> tuple[int, ...]:
        """The number of entries of each device, by rank."""
        return amounts(self.shape, self.layout)

    def owner_of(self, rank: int) -> int:
        """Return the rank of the device that updates the matrix for this one."""
        if not self.apart:
            return self.owner
        own, theirs = self.places[self.owner], self.places[rank]
        at = [theirs[axis] if axis in self.apart else own[axis] for axis in range(len(own))]
        result = 0
        for size, coordinate in zip(self.layout.mesh, at, strict=True):
            result = result * size + coordinate
        return result

    @cached_property
    def owners(self) -> list[int]:
        """The ranks of all devices that update it."""
        return sorted({self.owner_of(rank) for rank in range(len(self.places))})

    def sends(self, rank: int, owner: int) -> bool:
        """Return True if a device sends its part to an owner: of equal parts the owner takes the one of its replica."""
        own, theirs = self.places[owner], self.places[rank]
        return all(own[axis] == theirs[axis] for axis in self.copied)


class Traffic(NamedTuple):
    """Numbers that leave each device, by rank; what it keeps for itself is not counted."""

    out: list[int]
    back: list[int]


def traffic(parcels: Sequence[Parcel]) -> Traffic:
    """Return the entries that each device sends for the parcels of one mesh: parts out, and directions back."""
    devices = len(parcels[0].places) if parcels else 0
    out, back = [0] * devices, [0] * devices
    for parcel in parcels:
        held = parcel.amounts
        if not parcel.copied:  # what follows for one owner, without asking each
            out = list(map(add, out, held))
            out[parcel.owner] -= held[parcel.owner]
            back[parcel.owner] += sum(held) - held[parcel.owner]
            continue
        for owner in parcel.owners:
            for rank, entries in enumerate(held):
                if rank != owner and parcel.sends(rank, owner):
                    out[rank] += entries
                if rank != owner and parcel.owner_of(rank) == owner:
                    back[owner] += entries
    return Traffic(out, back)


@lru_cache(maxsize=4096)
def work(method: Method, shape: Shape) -> float:
    """Return the cost of one update: its flops, and one for each entry.

    A method outside this library, whose flops cannot be counted, costs entries times the sum of sizes, which grows like
    a matrix product.
    """
    entries = math.prod(shape)
    try:
        return float(sum(times * each.flops for each, times in count(method, shape).done.items())) + entries
    except (ValueError, TypeError, AttributeError, NotImplementedError):
        return float(entries * sum(shape))


def assign(costs: Sequence[float], names: Sequence[str], loads: Sequence[float]) -> list[int]:
    """Return the device that gets each piece of work.

    The costliest piece that is left, of equal ones the first by name, goes to the device with the least to do. The
    largest load is at most 4/3 - 1/(3 devices) times the best possible if ``loads`` are 0 (Graham 1969).

    ``loads``: what each device has to do already.
    """
    heap = [(load, device) for device, load in enumerate(loads)]
    heapq.heapify(heap)
    result = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], names[i], i)):
        load, result[i] = heap[0]
        heapq.heapreplace(heap, (load + costs[i], result[i]))
    return result
