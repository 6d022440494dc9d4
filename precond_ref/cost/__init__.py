"""The cost of training with a method: bytes of state, flops and bytes moved per step, communication, a time floor.

`estimate` needs only the shapes of the parameters, and allocates no array.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

from precond_ref.cost.counting import Shape, count
from precond_ref.cost.shapes import Shapes
from precond_ref.methods.baselines import Adam
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
    """A step on several devices, per device."""

    name: str
    """"owner": one device updates each matrix, "stack": the matrices of each shape are dealt out evenly."""
    devices: int
    state_bytes: int
    """Bytes of state on the device with the most; the state of elementwise methods is cut evenly."""
    received: float
    """Bytes received per step: gradients and directions. "owner": all devices gather each gradient, as in DTensor."""
    least: float
    """Bytes received per step if each device gathers only the gradients that it needs, and its part of directions."""
    balance: float
    """Flops of the busiest device over the mean: 1 is even, ``devices`` means that one device does all."""
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
    """One owner per matrix, and stacks dealt out; empty on one device."""

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
    name: str, method: Method, shapes: Shapes, *, dtype: str = "float32", mesh: int = 1, device: Device | None = None
) -> Estimate:
    """Return the cost of ``method`` on parameters of ``shapes``, routed as in `precond_ref.Optimizer`.

    ``dtype`` is that of the parameters; state and arithmetic have float32 at least, except for ``narrow_state``.
    Errors: ValueError for a dtype or mesh out of range, a shape that the method refuses, a step that cannot be counted.
    """
    if dtype not in ITEMSIZE:
        raise ValueError(f"dtype must be one of {', '.join(ITEMSIZE)}, got {dtype!r}")
    if mesh < 1:
        raise ValueError(f"mesh must be >= 1, got {mesh!r}")
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
    return result if mesh == 1 else replace(result, mesh=_splits(result, mesh))


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
    return isinstance(load.method, Adam) and not isinstance(method, Adam)


def _group(load: Load) -> tuple[Method, Shape | None]:
    """Return a label; parameters of the same label are updated by one call."""
    return load.method, None if load.method.elementwise else load.shape


# ---- several devices ------------------------------------------------------------------------------------------------


def owners(shapes: list[Shape], devices: int) -> list[int]:
    """Return the device of each matrix: the next-largest goes to the least loaded, by entries times sum of sizes.

    This is the rule of ``precond_ref_torch`` for one group of parameters.
    """
    costs = [math.prod(shape) * sum(shape) for shape in shapes]
    loads, result = [0] * devices, [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=costs.__getitem__, reverse=True):
        result[i] = loads.index(min(loads))
        loads[result[i]] += costs[i]
    return result


def _splits(total: Estimate, devices: int) -> tuple[Split, Split]:
    cut = [load for load in total.loads if load.method.elementwise]
    whole = [load for load in total.loads if not load.method.elementwise]
    cut_moved = sum(load.moved for load in cut) / devices
    cut_state = -(-sum(load.state_bytes for load in cut) // devices)
    matrices = ITEMSIZE[total.dtype] * sum(math.prod(load.shape) for load in whole)
    gathered = 2 * matrices * (devices - 1) / devices

    flops, moved, state = [0.0] * devices, [cut_moved] * devices, [cut_state] * devices
    for load, owner in zip(whole, owners([load.shape for load in whole], devices), strict=True):
        flops[owner] += load.flops
        moved[owner] += load.moved
        state[owner] += load.state_bytes
    owner_seconds = max(_floor(b, f, total.device) for b, f in zip(moved, flops, strict=True))

    stacks = Counter((load.method, load.shape) for load in whole)
    one = {(load.method, load.shape): load for load in whole}
    most = {key: -(-count // devices) for key, count in stacks.items()}
    stack_flops = sum(one[key].flops * count for key, count in most.items())
    stack_moved = cut_moved + sum(one[key].moved * count for key, count in most.items())
    stack_state = cut_state + sum(one[key].state_bytes * count for key, count in most.items())
    stack_seconds = _floor(stack_moved, stack_flops, total.device)

    least = gathered / devices
    balance = [_balance(largest, total.flops, devices) for largest in (max(flops), stack_flops)]
    return (
        Split("owner", devices, max(state), gathered, least, balance[0], owner_seconds),
        Split("stack", devices, stack_state, least, least, balance[1], stack_seconds),
    )


def _balance(largest: float, total: float, devices: int) -> float:
    return largest * devices / total if total else 1.0
