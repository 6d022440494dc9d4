"""What each process of the distributed tests runs; writes what it saw to a file."""

from __future__ import annotations

import copy
import gc
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from configs import CONFIGS
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch_adapter_cases import FSDP, FSDP_EACH, ONE_EACH, distance, feed, forced, recorded

import precond_ref as pr
import precond_ref_torch as pt
from precond_ref_torch import buckets

STEPS = 6
KINDS = ["AGD-default", "ASGO-right", "Shampoo-every", "SShampoo-average", "joined"]
"""One configuration of each kind: elementwise, whole matrices (one that keeps roots), sketches, joined biases."""


def copies() -> tuple[nn.Module, nn.Module]:
    """The same model twice, with shapes that do not divide evenly among two or three ranks."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 1)).double())
    return models[0], models[1]


def ddp_parameters(rank: int, name: str) -> list[torch.Tensor]:
    """Parameters after steps in which every rank has other data."""
    model = nn.parallel.DistributedDataParallel(copies()[0])
    opt = pt.Optimizer(model.parameters(), ONE_EACH[name].method, lr=0.125)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        opt.zero_grad()
        model(torch.randn(4, 5, generator=generator, dtype=torch.float64)).square().mean().backward()
        opt.step()
    return [p.detach().clone() for p in model.parameters()]


def sharded_grads(params: list[Any], row: list[Any]) -> list[Any]:
    return [distribute_tensor(g, p.device_mesh, p.placements) for p, g in zip(params, row, strict=True)]


def single_updates(method: Any, grads: Any, start: Any, **options: Any) -> list[torch.Tensor]:
    params = [nn.Parameter(x.clone()) for x in start]
    feed(pt.Optimizer(params, method, lr=0.125, **options), params, grads)
    return [p.detach() for p in params]


def fsdp_distances(names: list[str]) -> dict[str, float]:
    """Of FSDP2 parameters from those of one process, on a recorded sequence of gradients."""
    result = {}
    for name in names:
        method = CONFIGS[name].method
        model, single = copies()
        fully_shard(model)
        params = list(model.parameters())
        start = [p.detach().clone() for p in single.parameters()]
        _, grads = recorded([tuple(p.shape) for p in start], STEPS)
        decay = {} if method.decays else {"weight_decay": 0.25}
        opt = pt.Optimizer(model.parameters(), method, lr=0.125, **decay)
        for row in grads:
            for p, g in zip(params, sharded_grads(params, row), strict=True):
                p.grad = g
            opt.step()
        expected = single_updates(method, grads, start, **decay)
        result[name] = distance([p.full_tensor() for p in params], expected)
    return result


def sharded_columns_distance(mesh: Any) -> float:
    """Parameters sharded along their second axis, as tensor parallelism has them."""
    method = ONE_EACH["ASGO"].method
    start, grads = recorded([(4, 5), (4, 5), (3, 4)], STEPS)
    params = [nn.Parameter(distribute_tensor(x, mesh, [Shard(1)])) for x in start]
    opt = pt.Optimizer(params, method, lr=0.125)
    for row in grads:
        for p, g in zip(params, sharded_grads(params, row), strict=True):
            p.grad = g
        opt.step()
    return distance([p.full_tensor() for p in params], single_updates(method, grads, start))


def replicated_distance(world: int) -> float:
    """Meshes with two axes, parameters replicated along the first (HSDP)."""
    method = ONE_EACH["ASGO"].method
    start, grads = recorded([(5, 4), (4, 3), (3, 4)], STEPS)
    worst = 0.0
    for shape in ((world, 1), (1, world)) if world != 4 else ((2, 2),):
        mesh = init_device_mesh("cpu", shape)
        params = [nn.Parameter(distribute_tensor(x, mesh, [Replicate(), Shard(0)])) for x in start]
        opt = pt.Optimizer(params, method, lr=0.125)
        for row in grads:
            for p, g in zip(params, sharded_grads(params, row), strict=True):
                p.grad = g
            opt.step()
        expected = single_updates(method, grads, start)
        worst = float(np.maximum(worst, distance([p.full_tensor() for p in params], expected)))
    return worst


def mixed_distance(mesh: Any) -> float:
    """Plain parameters beside sharded ones, elementwise."""
    method = ONE_EACH["AGD"].method
    start, grads = recorded([(5, 4), (4, 3), (3, 4)], STEPS)
    params = [
        nn.Parameter(start[0].clone()),
        *(nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in start[1:]),
    ]
    opt = pt.Optimizer(params, method, lr=0.125)
    for row in grads:
        params[0].grad = row[0].clone()
        for p, g in zip(params[1:], sharded_grads(params[1:], row[1:]), strict=True):
            p.grad = g
        opt.step()
    return distance([params[0], *(p.full_tensor() for p in params[1:])], single_updates(method, grads, start))


def joined_distance() -> float:
    """FSDP2 with the weight and bias of each Linear joined: whole matrices, from the single process."""
    method = ONE_EACH["MBF"].method
    model, single = copies()
    fully_shard(model)
    params = list(model.parameters())
    start = [p.detach().clone() for p in single.parameters()]
    _, grads = recorded([tuple(p.shape) for p in start], STEPS)
    opt = pt.Optimizer(pt.param_groups_for(model, method="MBF"), method, lr=0.125, weight_decay=0.25)
    for row in grads:
        for p, g in zip(params, sharded_grads(params, row), strict=True):
            p.grad = g
        opt.step()
    values = {name: p.detach() for name, p in single.named_parameters()}
    join = tuple((f"{i}.weight", f"{i}.bias") for i in (0, 2, 4))
    core = pr.Optimizer(method, lr=0.125, weight_decay=0.25, join=join)
    state = core.init(values)
    for row in grads:
        values, state = core.step(values, dict(zip(values, row, strict=True)), state)
    return distance([p.full_tensor() for p in params], list(values.values()))


def per_sample_distance(rank: int, world: int) -> tuple[float, float]:
    """MBF on every sample's gradient under DDP, from one process with all samples; the same without the exchange."""
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(STEPS, 2 * world, 5, generator=generator, dtype=torch.float64)
    distances = []
    for group in (dist.group.WORLD, None):
        model, single = copies()
        wrapped = nn.parallel.DistributedDataParallel(model)
        for net, run, samples in ((model, wrapped, batches[:, 2 * rank : 2 * rank + 2]), (single, single, batches)):
            method = ONE_EACH["MBF"].method
            opt = pt.Optimizer(pt.param_groups_for(net, method="MBF"), method, lr=0.125)
            with pt.PerSampleStatistics(net, opt, process_group=group if net is model else None) as statistics:
                for x in samples:
                    opt.zero_grad()
                    run(x).square().mean().backward()
                    opt.step(statistics=statistics.take())
        distances.append(distance(list(model.parameters()), list(single.parameters())))
    return distances[0], distances[1]


def work_done(mesh: Any) -> dict[str, Any]:
    """Sizes of the matrices this rank updated, and what it keeps of each parameter."""
    method = ONE_EACH["ASGO"].method
    start, grads = recorded([(6, 6)] * 4 + [(3, 3)] * 2, 2)
    params = [nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in start]
    opt = pt.Optimizer(params, method)
    seen: list[int] = []
    original = buckets.Bucket.directions

    def counting(self: Any, given: Any, *rest: Any) -> Any:
        seen.extend(g.shape[0] for g in given)
        return original(self, given, *rest)

    buckets.Bucket.directions = counting  # type: ignore[method-assign]
    for p, g in zip(params, sharded_grads(params, grads[0]), strict=True):
        p.grad = g
    opt.step()
    buckets.Bucket.directions = original  # type: ignore[method-assign]
    return {"updated": sorted(seen), "kept": sum(opt.state[p]["gram"].numel() > 0 for p in params)}


def resumed(name: str) -> tuple[bool, bool]:
    """Whether FSDP2 training saved at step 3 goes on with the same bits; whether elementwise states are DTensors."""
    method = ONE_EACH[name].method
    _, grads = recorded([(7, 5), (7,), (7, 7), (7,), (1, 7), (1,)], STEPS)
    model, _ = copies()
    fully_shard(model)
    params = list(model.parameters())
    opt = pt.Optimizer(model.parameters(), method, lr=0.125)
    for step, row in enumerate(grads):
        if step == 3:
            saved = opt.state_dict()
            saved = {**saved, "state": {k: {n: v.clone() for n, v in s.items()} for k, s in saved["state"].items()}}
            middle = [p.detach().clone() for p in params]
        for p, g in zip(params, sharded_grads(params, row), strict=True):
            p.grad = g
        opt.step()
    final = [p.full_tensor() for p in params]
    with torch.no_grad():
        for p, x in zip(params, middle, strict=True):
            p.copy_(x)
    other = pt.Optimizer(model.parameters(), method, lr=0.125)
    other.load_state_dict(saved)
    for row in grads[3:]:
        for p, g in zip(params, sharded_grads(params, row), strict=True):
            p.grad = g
        other.step()
    same = all(torch.equal(p.full_tensor(), x) for p, x in zip(params, final, strict=True))
    bias = other.state[params[1]]["m"]
    return same, isinstance(bias, DTensor) and bias.placements == params[1].placements


def _make(kind: str, model: nn.Module) -> Any:
    if kind == "joined":
        return pt.Optimizer(pt.param_groups_for(model, method="MBF"), ONE_EACH["MBF"].method, lr=0.125)
    return pt.Optimizer(model.parameters(), CONFIGS[kind].method, lr=0.125)


def _by_options(**options: Any) -> Any:
    """A way from one optimizer into another by PyTorch's functions for state dicts."""

    def way(model: Any, opt: Any, other_model: Any, other: Any, folder: Path) -> None:
        broadcast = options.pop("broadcast_from_rank0", False)
        saved = get_optimizer_state_dict(model, opt, options=StateDictOptions(**options))
        if broadcast and dist.get_rank():
            saved = {}
        given = StateDictOptions(**options, broadcast_from_rank0=broadcast)
        set_optimizer_state_dict(other_model, other, saved, options=given)

    return way


def _by_file(model: Any, opt: Any, other_model: Any, other: Any, folder: Path) -> None:
    path = folder / f"own-{dist.get_rank()}.pt"
    torch.save(opt.state_dict(), path)
    other.load_state_dict(torch.load(path, weights_only=False))


def _by_copy(model: Any, opt: Any, other_model: Any, other: Any, folder: Path) -> None:
    other.load_state_dict(copy.deepcopy(opt.state_dict()))


def _by_dcp(model: Any, opt: Any, other_model: Any, other: Any, folder: Path) -> None:
    place = folder / "dcp"
    dcp.save({"optim": get_optimizer_state_dict(model, opt)}, checkpoint_id=place)
    read = {"optim": get_optimizer_state_dict(other_model, other)}
    dcp.load(read, checkpoint_id=place)
    set_optimizer_state_dict(other_model, other, read["optim"])


WAYS = {
    "torch.save": lambda: _by_file,
    "deepcopy": lambda: _by_copy,
    "dcp": lambda: _by_dcp,
    "sharded": lambda: _by_options(),
    "full": lambda: _by_options(full_state_dict=True),
    "from rank 0": lambda: _by_options(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True),
    "offloaded": lambda: _by_options(cpu_offload=True),
    "flat": lambda: _by_options(flatten_optimizer_state_dict=True),
}
QUICK_WAYS = ("torch.save", "full")


def ways(world: int) -> list[str]:
    """Those that processes of this number try."""
    return list(WAYS) if world == 2 else list(QUICK_WAYS)


def carried(kind: str, way: str, folder: Path) -> bool:
    """Whether FSDP2 training goes on with the same bits in another optimizer that got the state this way."""
    one, two = copies()
    for model in (one, two):
        fully_shard(model)
    folder = folder / kind
    folder.mkdir(exist_ok=True)
    params, others = list(one.parameters()), list(two.parameters())
    _, grads = recorded([tuple(p.shape) for p in params], STEPS)
    first, second = _make(kind, one), _make(kind, two)
    for step, row in enumerate(grads):
        if step == 3:
            two.load_state_dict(one.state_dict())
            WAYS[way]()(one, first, two, second, folder)
        for p, q, g in zip(params, others, sharded_grads(params, row), strict=True):
            p.grad, q.grad = g, g if step >= 3 else None
        first.step()
        second.step()
    return all(torch.equal(p.full_tensor(), q.full_tensor()) for p, q in zip(params, others, strict=True))


def full_states(kind: str) -> float:
    """Of the full state dict under FSDP2 from that of a single process."""
    model, single = copies()
    fully_shard(model)
    params, others = list(model.parameters()), list(single.parameters())
    _, grads = recorded([tuple(p.shape) for p in params], STEPS)
    opt, other = _make(kind, model), _make(kind, single)
    for row in grads:
        for p, q, g, h in zip(params, others, sharded_grads(params, row), row, strict=True):
            p.grad, q.grad = g, h.clone()
        opt.step()
        other.step()
    full = StateDictOptions(full_state_dict=True)
    found, expected = (get_optimizer_state_dict(m, o, options=full) for m, o in ((model, opt), (single, other)))
    assert found["state"].keys() == expected["state"].keys()
    pairs = [
        (found["state"][name][key].double(), value.double())
        for name, entry in expected["state"].items()
        for key, value in entry.items()
        if "sketch" not in key and "basis" not in key
    ]
    return distance([a for a, _ in pairs], [b for _, b in pairs])


def foreign_load_message(rank: int, mesh: Any) -> str:
    """What loading the states that another rank keeps says, on the rank that owns the matrix."""
    start, grads = recorded([(4, 4)], 1)
    params = [nn.Parameter(distribute_tensor(start[0], mesh, [Shard(0)]))]
    opt = pt.Optimizer(params, pr.ASGO())
    params[0].grad = sharded_grads(params, grads[0])[0]
    opt.step()
    saved = opt.state_dict()
    if rank == 0:  # the owner is given what the others keep
        saved = {**saved, "state": {0: {"step": saved["state"][0]["step"]}}}
    try:
        opt.load_state_dict(saved)
    except ValueError as error:
        return str(error)
    return ""


def skipping_distance(mesh: Any) -> float:
    """A matrix without a gradient at one step; its updates and those of its neighbour stay the single process's."""
    method = ONE_EACH["Shampoo"].method
    start, grads = recorded([(4, 3), (4, 3)], 4)
    params = [nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in start]
    opt = pt.Optimizer(params, **forced(method, lr=0.125))
    grads[1][0] = None
    for row in grads:
        for p, g in zip(params, row, strict=True):
            p.grad = None if g is None else distribute_tensor(g, p.device_mesh, p.placements)
        opt.step()
    return distance([p.full_tensor() for p in params], single_updates(method, grads, start, fallback=method))


def per_shard_distance(mesh: Any) -> float:
    """The planted mistake: each rank preconditions its own shard."""
    method = ONE_EACH["ASGO"].method
    start, grads = recorded([(6, 4)], STEPS)
    params = [nn.Parameter(distribute_tensor(start[0], mesh, [Shard(0)]))]
    local = [nn.Parameter(params[0].to_local().detach().clone())]
    opt = pt.Optimizer(local, method, lr=0.125)
    for row in grads:
        local[0].grad = sharded_grads(params, row)[0].to_local()
        opt.step()
    whole = DTensor.from_local(local[0].detach(), mesh, [Shard(0)], shape=(6, 4), stride=(4, 1)).full_tensor()
    return distance([whole], single_updates(method, grads, start))


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    seen: dict[str, Any] = {
        "ddp": {name: ddp_parameters(rank, name) for name in ONE_EACH},
        "fsdp": fsdp_distances(FSDP if world == 2 else FSDP_EACH),
        "columns": sharded_columns_distance(mesh),
        "replicated": replicated_distance(world),
        "mixed": mixed_distance(mesh),
        "joined": joined_distance(),
        "per sample": per_sample_distance(rank, world),
        "work": work_done(mesh),
        "resumed": {name: resumed(name) for name in ("AGD", "ASGO", "Shampoo")},
        "foreign": foreign_load_message(rank, mesh),
        "carried": {f"{kind}, {way}": carried(kind, way, folder) for kind in KINDS for way in ways(world)},
        "full states": {kind: full_states(kind) for kind in KINDS},
        "skipping": skipping_distance(mesh),
        "per shard": per_shard_distance(mesh),
    }
    torch.save(seen, folder / f"{rank}.pt")
    dist.barrier()
    gc.collect()  # freeing a DistributedDataParallel later would end gloo's threads, and keep the GIL from them
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    except BaseException:
        traceback.print_exc()
        raise
