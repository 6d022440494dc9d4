"""The cost of training with a method: bytes of state, flops and bytes moved per step, communication, a time floor.

`estimate` needs only the shapes of the parameters, and allocates no array.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from precond_ref.cost.counting import Shape, count
from precond_ref.cost.movement import Cut, Layout, Parcel, assign, traffic, work
from precond_ref.cost.shapes import Shapes
from precond_ref.protocol import Method

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number, by dtype."""


class Device(NamedTuple):
    """The device of the time floor."""

    bandwidth: float = 2039e9
    """Bytes per second between memory and processor; the default is from NVIDIA's data sheet for A100 80GB SXM."""
    matmul_rate: float = 19.5e12
    """Flops per second of matrix products in the dtype of the arithmetic; the default is for float32, same sheet."""


class Load(NamedTuple):
    """One parameter: its method, and the cost of the method per step."""

    name: str
    shape: Shape
    method: Method
    state_bytes: int
    flops: float
    moved: float
    """Bytes moved."""


class Split(NamedTuple):
    """A step on several devices, of which the last axis of the mesh cuts every parameter along its first axis."""

    name: str
    """"owner": one device updates each matrix, "replica": one in each replica, "cut k": k devices share each matrix."""
    devices: int
    state_bytes: int
    """On the device with the most; what elementwise methods keep is cut evenly within a replica."""
    sent: int
    """Bytes per step that leave a device, of all: gradients, parameters if they are read, directions, cut products."""
    most_sent: int
    """Of the device that sends most (of "cut k": the mean)."""
    idle: int
    """Devices without a matrix."""
    balance: float
    """Flops of the busiest device over the flops of one device and the number of devices: 1 is ideal."""
    seconds: float
    """Time floor of the slowest device, communication not counted."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of a method on a model per step; work done every k steps counts 1/k."""

    name: str
    method: Method
    dtype: str
    device: Device
    loads: tuple[Load, ...]
    mesh: tuple[Split, ...] = ()
    """One owner per matrix; one per replica; cut ones, if one is more than a device's share. Empty on one device."""

    @property
    def entries(self) -> int:
        """Number of entries of all parameters."""
        return sum(math.prod(load.shape) for load in self.loads)

    @property
    def own(self) -> float:
        """Share of the entries that the method takes; the others go to Adam."""
        own = sum(math.prod(load.shape) for load in self.loads if not _is_fallback(load, self.method))
        return own / max(self.entries, 1)

    @property
    def state_bytes(self) -> int:
        """Bytes of state, exact."""
        return sum(load.state_bytes for load in self.loads)

    @property
    def flops(self) -> float:
        """Flops of matrix products (exact) and factorizations (leading terms), without elementwise arithmetic."""
        return sum(load.flops for load in self.loads)

    @property
    def moved(self) -> float:
        """Bytes that must be read or written at least once: gradient, parameter, state."""
        return sum(load.moved for load in self.loads)

    @property
    def seconds(self) -> float:
        """Shortest possible mean time of a step on the device: the larger of moving and computing."""
        return _floor(self.moved, self.flops, self.device)

    @property
    def calls(self) -> tuple[int, int]:
        """Updates per step: one by one, and with equal shapes stacked and elementwise methods on one buffer."""
        return len(self.loads), len({_group(load) for load in self.loads})


def estimate(
    name: str,
    method: Method,
    shapes: Shapes,
    *,
    dtype: str = "float32",
    mesh: int | tuple[int, ...] = 1,
    device: Device | None = None,
) -> Estimate:
    """Return the cost of ``method`` on parameters of ``shapes``, routed as in `precond_ref.Optimizer`.

    ``dtype`` is the parameters'; state and arithmetic have float32 at least (but for ``narrow_state``). ``mesh``: the
    number of devices, or (replicas, devices of each).
    Errors: ValueError for a dtype or mesh out of range, a shape that the method refuses, a step that cannot be counted.
    """
    from precond_ref.methods.baselines import Adam  # late: the command's help lists the shapes

    if dtype not in ITEMSIZE:
        raise ValueError(f"dtype must be one of {', '.join(ITEMSIZE)}, got {dtype!r}")
    sides = (mesh,) if isinstance(mesh, int) else tuple(mesh)
    if not 1 <= len(sides) <= 2 or min(sides) < 1:
        raise ValueError(f"mesh must be >= 1, or two such numbers, got {mesh!r}")
    device = device or Device()
    cache: dict[tuple[Method, Shape], Load] = {}
    loads = []
    for path, shape in shapes.items():
        chosen = method.for_shape(shape, path) or Adam()
        key = chosen, shape
        if key not in cache:
            cache[key] = _load(chosen, shape, ITEMSIZE[dtype])
        loads.append(cache[key]._replace(name=path))
    result = Estimate(name=name, method=method, dtype=dtype, device=device, loads=tuple(loads))
    return result if math.prod(sides) == 1 else replace(result, mesh=_splits(result, sides))


def _load(method: Method, shape: Shape, itemsize: int) -> Load:
    needs = count(method, shape)
    size = itemsize if method.narrow_state else max(itemsize, 4)
    touched = size * sum(math.prod(array.shape) * (array.read + array.written) for array in needs.stored)
    return Load(
        name="",
        shape=shape,
        method=method,
        state_bytes=size * sum(math.prod(array.shape) for array in needs.stored),
        flops=float(sum(times * each.flops for each, times in needs.done.items())),
        moved=float(touched) + 3 * itemsize * math.prod(shape),  # the gradient is read, the parameter read and written
    )


def _floor(moved: float, flops: float, device: Device) -> float:
    return max(moved / device.bandwidth, flops / device.matmul_rate)


def _is_fallback(load: Load, method: Method) -> bool:
    return load.method.name == "Adam" != method.name


def _group(load: Load) -> tuple[Method, Shape | None]:
    """Return a label; parameters of the same label are updated by one call."""
    return load.method, None if load.method.elementwise else load.shape


# ---- several devices ------------------------------------------------------------------------------------------------


def _splits(total: Estimate, mesh: tuple[int, ...]) -> tuple[Split, ...]:
    result = [_owned(total, mesh, "owner")]
    if len(mesh) == 2 and mesh[0] > 1:
        result.append(_owned(total, mesh, "replica"))
    devices = math.prod(mesh)
    largest = max((load.flops for load in total.loads), default=0.0)
    share = total.flops / devices
    pieces = next((k for k in range(1, devices + 1) if devices % k == 0 and largest <= k * share), devices)
    return (*result, _shared(total, devices, pieces)) if share and pieces > 1 else tuple(result)


def _owned(total: Estimate, mesh: tuple[int, ...], name: str) -> Split:
    """Each matrix updated by one device, or by one in each replica, which the replicas then do alike."""
    whole = [load for load in total.loads if not load.method.elementwise]
    layout = Layout(mesh, (None,) * (len(mesh) - 1) + (Cut(0),))
    apart = layout.copied() if name == "replica" else ()
    ranks = mesh[-1] if apart else math.prod(mesh)
    assigned = assign([work(load.method, load.shape) for load in whole], [load.name for load in whole], [0.0] * ranks)
    flops, moved, state = [0.0] * ranks, [_cut(total, "moved", mesh[-1])] * ranks, [0] * ranks
    for load, owner in zip(whole, assigned, strict=True):
        flops[owner] += load.flops
        moved[owner] += load.moved
        state[owner] += load.state_bytes
    sent = [0] * math.prod(mesh)
    for load, owner in zip(whole, assigned, strict=True):
        out, back = traffic([Parcel(load.shape, layout, owner, apart)])
        each = _itemsizes(load, total.dtype)
        sent = [s + each[0] * o + each[1] * b for s, o, b in zip(sent, out, back, strict=True)]
    return Split(
        name,
        math.prod(mesh),
        max(state) + math.ceil(_cut(total, "state_bytes", mesh[-1])),
        sum(sent),
        max(sent),
        (ranks - len(set(assigned))) * (math.prod(mesh) // ranks),
        _balance(max(flops), total.flops, math.prod(mesh)),
        max(_floor(b, f, total.device) for b, f in zip(moved, flops, strict=True)),
    )


def _shared(total: Estimate, devices: int, pieces: int) -> Split:
    """Each matrix cut along its longer side among ``pieces`` devices, the mathematics that of the whole.

    A product along the cut makes ``pieces`` partial sums, of which each device receives all in 2 (pieces - 1) / pieces
    of its size; the other products are cut; factorizations, and products of small matrices, are repeated by each.
    """
    whole = [load for load in total.loads if not load.method.elementwise]
    parts = {(load.method, load.shape): _piece(load, pieces) for load in whole}
    costs = [parts[load.method, load.shape][0] for load in whole]
    teams = devices // pieces
    assigned = assign([c + 1 for c in costs], [load.name for load in whole], [0.0] * teams)
    flops, moved, state, sent = [0.0] * teams, [_cut(total, "moved", devices)] * teams, [0] * teams, 0.0
    for load, cost, team in zip(whole, costs, assigned, strict=True):
        out, back = _itemsizes(load, total.dtype)
        flops[team] += cost
        moved[team] += load.moved / pieces
        state[team] += load.state_bytes  # a matrix of the short side is whole on each
        sent += (out + back) * math.prod(load.shape) * (devices - 1) / devices
        sent += back * parts[load.method, load.shape][1]
    return Split(
        f"cut {pieces}",
        devices,
        max(state) + math.ceil(_cut(total, "state_bytes", devices)),
        round(sent),
        round(sent / devices),
        (teams - len(set(assigned))) * pieces,
        _balance(max(flops), total.flops, devices),
        max(_floor(b, f, total.device) for b, f in zip(moved, flops, strict=True)),
    )


def _piece(load: Load, pieces: int) -> tuple[float, float]:
    """Flops of each device, and numbers sent in all, of one update that ``pieces`` devices share."""
    flops = sent = 0.0
    longest = max(load.shape)
    for each, times in count(load.method, load.shape).done.items():
        cut = each.kind == "product" and longest in (each.m, each.n, each.k)
        flops += float(times * each.flops) / (pieces if cut else 1)
        if cut and each.k == longest and longest not in (each.m, each.n):
            sent += float(times) * each.batch * 2 * (pieces - 1) * each.m * each.n
    return flops, sent


def _cut(total: Estimate, what: str, devices: int) -> float:
    """What elementwise methods keep or move, on one of the devices that it is cut among."""
    return sum(getattr(load, what) for load in total.loads if load.method.elementwise) / devices


def _itemsizes(load: Load, dtype: str) -> tuple[int, int]:
    """Bytes that each entry of a matrix sends to its owner, and back: directions have the dtype of the arithmetic."""
    size = ITEMSIZE[dtype]
    return size * (2 if load.method.reads_param else 1), size if load.method.narrow_state else max(size, 4)


def _balance(largest: float, total: float, devices: int) -> float:
    return largest * devices / total if total else 1.0
