"""Support for parameters that are DTensors (FSDP2, tensor parallelism): local shards, owners of whole matrices."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


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


def owners(groups: Iterable[list[Any]]) -> dict[Any, int]:
    """Return for each DTensor the rank of its mesh that updates it, with even work.

    The ranks depend only on the shapes and the order of the groups. A later group does not change earlier ranks.
    """
    result: dict[Any, int] = {}
    loads: dict[Any, list[int]] = {}
    for params in groups:
        sharded = [p for p in params if is_sharded(p)]
        for p in sorted(sharded, key=_cost, reverse=True):
            load = loads.setdefault(p.device_mesh, [0] * p.device_mesh.size())
            result[p] = load.index(min(load))
            load[result[p]] += _cost(p)
    return result


def _cost(param: Any) -> int:
    return int(param.numel() * sum(param.shape))


def owns(param: Any, owner: int) -> bool:
    """Return True if this process is rank ``owner`` of the mesh of ``param``."""
    return tuple(param.device_mesh.get_coordinate()) == _coordinate(param.device_mesh, owner)


def _coordinate(mesh: Any, rank: int) -> tuple[int, ...]:
    return tuple(rank // math.prod(mesh.shape[d + 1 :]) % mesh.shape[d] for d in range(mesh.ndim))


def broadcast(tensor: Tensor, mesh: Any, owner: int) -> None:
    """Write ``tensor`` of rank ``owner`` of the mesh into ``tensor`` of all its ranks."""
    import torch.distributed as dist

    here, source = tuple(mesh.get_coordinate()), _coordinate(mesh, owner)
    for dim in range(mesh.ndim):
        if here[dim + 1 :] == source[dim + 1 :]:
            group = mesh.get_group(dim)
            dist.broadcast(tensor, src=dist.get_global_rank(group, source[dim]), group=group)


def refused_by_any(mesh: Any, refused: bool) -> bool:
    """Return True if ``refused`` is true on any rank (a collective)."""
    import torch.distributed as dist

    flag = torch.tensor(float(refused), device=mesh.device_type)
    for dim in range(mesh.ndim):
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=mesh.get_group(dim))
    return bool(flag)


def spread(value: Tensor, like: Tensor, param: Any, owner: int) -> Tensor:
    """Return ``value`` of rank ``owner``, shaped as ``like``, sharded along axis 0 (a collective); 0-D: whole."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = param.device_mesh
    full = value if owns(param, owner) else value.new_empty(like.shape)
    full = full.contiguous()
    broadcast(full, mesh, owner)
    if full.ndim == 0:
        return full
    shards = [Shard(0)] * mesh.ndim
    part = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(mesh, shards)
    return DTensor.from_local(
        part.to_local().clone(), mesh, shards, run_check=False, shape=full.shape, stride=full.stride()
    )


def restored(value: Tensor, like: Any, shape: torch.Size) -> Tensor:
    """Return this rank's part of a saved elementwise state: a DTensor of any layout, the whole, or the part."""
    if is_sharded(value):
        if is_sharded(like):
            return value.redistribute(like.device_mesh, like.placements).to_local()  # type: ignore[attr-defined]
        return whole(value)
    if is_sharded(like) and value.shape == like.shape and value.shape != shape:
        return shard_of(value.to(like.device), like)
    return value
