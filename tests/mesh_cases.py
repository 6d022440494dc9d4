"""What each process of `test_torch_meshes` runs: models on meshes, optimizers, ways from one mesh to another."""

from __future__ import annotations

import contextlib
import copy
import datetime
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import precond_ref as pr
import precond_ref_torch as pt

torch.set_num_threads(1)


# ---- processes ------------------------------------------------------------------------------------------------------


Jobs = list[tuple[str, tuple[Any, ...]]]


def run(count: int, jobs: Jobs, folder: Path, killed: tuple[int, ...] = ()) -> list[list[Any]]:
    """What ``count`` processes return of each job ``(name of a function here, arguments)``; an error if one failed.

    A function is called with a `Place` first, on all processes, one job after the other. Those ``killed`` return None.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    started = [context.Process(target=_work, args=(rank, jobs, folder), daemon=True) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(600)
    found = []
    for rank, process in enumerate(started):
        file = folder / f"{rank}.pickle"
        failure = folder / f"{rank}.error"
        if failure.exists():
            raise AssertionError(f"rank {rank}: {failure.read_text(encoding='utf-8')}")
        if rank in killed and process.exitcode == -signal.SIGKILL:
            found.append([None] * len(jobs))
            continue
        if process.exitcode != 0:
            raise AssertionError(f"rank {rank} ended with {process.exitcode}")
        found.append(pickle.loads(file.read_bytes()))
    return [[values[i] for values in found] for i in range(len(jobs))]


def _work(rank: int, jobs: Jobs, folder: Path) -> None:
    torch.set_num_threads(1)
    try:
        values = [globals()[name](Place(rank, folder, f"{i}"), *given) for i, (name, given) in enumerate(jobs)]
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(values))
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
        os._exit(1)  # the others would wait for this process


class Place(NamedTuple):
    """Where a job runs."""

    rank: int
    folder: Path
    tag: str

    @contextlib.contextmanager
    def world(self, size: int, name: str = "") -> Iterator[bool]:
        """A process group of the first ``size`` processes; whether this is one of them."""
        if self.rank >= size:
            yield False
            return
        file = self.folder / f"rendezvous-{self.tag}-{name}"
        dist.init_process_group(
            "gloo", init_method=f"file://{file}", rank=self.rank, world_size=size, timeout=datetime.timedelta(minutes=5)
        )
        try:
            yield True
        finally:
            dist.destroy_process_group()


# ---- models, meshes, optimizers -------------------------------------------------------------------------------------


class Net(nn.Module):
    """Matrices of 10 x 6, 6 x 10 and twice 3 x 6: on four ranks shards of 3 3 3 1, 2 2 2 0 and 1 1 1 0 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 10), nn.Linear(10, 6), nn.LayerNorm(6)
        self.twin, self.head = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.down(torch.tanh(self.up(x))))
        return self.head(x) + self.twin(x).square()


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


FIRST = ("up", "down")
"""Modules of the first pipeline stage."""


def _tensor_parallel(model: nn.Module, mesh: Any, sequence: bool) -> None:
    plan: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh, {**plan, "norm": SequenceParallel()} if sequence else plan)


def spread(kind: str, size: int) -> nn.Module:
    """The model on ``size`` ranks, as ``kind`` of `MESHES` says."""
    model: nn.Module = net()
    if kind == "plain":
        return model
    if kind == "FSDP2":
        return fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    if kind == "HSDP":
        replicas = 2 if size > 1 else 1
        return fully_shard(model, mesh=init_device_mesh("cpu", (replicas, size // replicas), mesh_dim_names=("r", "s")))
    if kind in ("TP", "TP, sequence"):
        _tensor_parallel(model, init_device_mesh("cpu", (size,)), kind == "TP, sequence")
        return model
    if kind == "FSDP2 x TP":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        _tensor_parallel(model, mesh["tp"], True)
        return fully_shard(model, mesh=mesh["dp"])
    assert kind == "stages"
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("pp", "dp"))
    for name, _ in list(model.named_children()):
        if (name in FIRST) != (mesh.get_local_rank("pp") == 0):
            delattr(model, name)
    return fully_shard(model, mesh=mesh["dp"])


MESHES = {
    "plain": (1,),
    "FSDP2": (1, 2, 3, 4),
    "HSDP": (2, 4),
    "TP": (2, 4),
    "TP, sequence": (3,),
    "FSDP2 x TP": (4,),
    "stages": (2, 4),
}
"""Kinds of meshes, each with the numbers of ranks."""


def _by_name(method: Any, **fields: Any) -> Callable[[nn.Module], Any]:
    """One method for all matrices, with other ``fields`` for the matrix up."""

    def make(model: nn.Module) -> Any:
        named = dict(model.named_parameters())
        own = {n: p for n, p in named.items() if n == "up.weight"} if fields else {}
        groups = [{"params": [(n, p) for n, p in named.items() if n not in own]}]
        if own:
            groups.append({"params": list(own.items()), "method": method.replace(**fields)})  # type: ignore[dict-item]
        return pt.Optimizer(groups, method, lr=0.125, weight_decay=0.25)

    return make


def _joined(model: nn.Module) -> Any:
    groups = pt.param_groups_for(model, method="MBF")
    return pt.Optimizer(groups, pr.MBF(damping=0.5, decay=0.5, momentum=0.25), lr=0.125, weight_decay=0.25)


KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "Adam": _by_name(pr.Adam(beta1=0.75, beta2=0.875, eps=0.25)),
    "AGD": _by_name(pr.AGD()),
    "ASGO": _by_name(pr.ASGO(beta1=0.75, beta2=0.875, eps=0.25)),
    "ASGO, heads": _by_name(pr.ASGO(beta1=0.75, beta2=0.875, eps=0.25, every=2), heads=2),
    "Shampoo": _by_name(pr.Shampoo(eps=0.25, every=2)),
    "Muon": _by_name(pr.Muon(), blocks=5),
    "SOAP": _by_name(pr.SOAP(eps=0.25)),
    "SShampoo": _by_name(pr.SShampoo(size=2)),
    "MBF, joined": _joined,
}
"""Elementwise, matrices, heads and fused outputs of ten rows, roots that are kept, sketches, joined pairs."""


def gradients(steps: int) -> list[dict[str, Tensor]]:
    """For each step a whole gradient by name."""
    generator = torch.Generator().manual_seed(1)
    shapes = {name: p.shape for name, p in net().named_parameters()}
    return [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        for _ in range(steps)
    ]


def laid(value: Tensor, like: Any) -> Tensor:
    """``value`` laid out as ``like``; without communication."""
    if not isinstance(like, DTensor):
        return value.clone()
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def whole(value: Any) -> Tensor:
    return value.detach().full_tensor() if isinstance(value, DTensor) else value.detach()


def feed(model: nn.Module, opt: Any, rows: list[dict[str, Tensor]]) -> None:
    for row in rows:
        for name, p in model.named_parameters():
            p.grad = laid(row[name], p)
        opt.step()


def alone(kind: str, steps: int) -> dict[str, Tensor]:
    """The parameters that one process comes to."""
    model = net()
    feed(model, KINDS[kind](model), gradients(steps))
    return {name: p.detach() for name, p in model.named_parameters()}


STACKED = ("twin", "head")
"""Modules of one shape: one process updates their matrices by one call, their owners by one each."""


def distance(model: nn.Module, expected: dict[str, Tensor]) -> tuple[float, float]:
    """Largest ``max |a - b| / max |b|`` over the parameters but `STACKED`, and over those; NaN where there is one."""
    found = {
        name: (whole(p) - expected[name]).abs().max() / expected[name].abs().max()
        for name, p in model.named_parameters()
    }
    halves = [[d for name, d in found.items() if name.startswith(STACKED) is stacked] for stacked in (False, True)]
    return tuple(float(torch.stack(half).max()) if half else 0.0 for half in halves)  # type: ignore[return-value]


# ---- jobs -----------------------------------------------------------------------------------------------------------


def exact(place: Place, mesh: str, size: int, kinds: list[str], steps: int = 3) -> dict[str, Any]:
    """By method: departure of the parameters on this mesh from one process."""
    result = {}
    with place.world(size) as active:
        for kind in kinds if active else ():
            model = spread(mesh, size)
            opt = KINDS[kind](model)
            feed(model, opt, gradients(steps))
            result[kind] = distance(model, alone(kind, steps))
    return result


Way = Callable[[nn.Module, Any, Path], None]


def _dcp(asynchronous: bool, **options: Any) -> tuple[Way, Way]:
    """Save in and load from a folder by PyTorch's distributed checkpoints, also on another mesh."""
    given = StateDictOptions(**options)

    def save(model: nn.Module, opt: Any, folder: Path) -> None:
        state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, opt, options=given)}
        if asynchronous:
            dcp.async_save(state, checkpoint_id=folder).result()
        else:
            dcp.save(state, checkpoint_id=folder)

    def load(model: nn.Module, opt: Any, folder: Path) -> None:
        state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, opt, options=given)}
        dcp.load(state, checkpoint_id=folder)
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(model, opt, state["optim"], options=given)

    return save, load


def _full(broadcast: bool, copied: bool = False, **options: Any) -> tuple[Way, Way]:
    """The full state dict in one file of `torch.save`, written by the first rank."""

    def save(model: nn.Module, opt: Any, folder: Path) -> None:
        state = get_optimizer_state_dict(model, opt, options=StateDictOptions(full_state_dict=True, **options))
        values = {name: whole(p) for name, p in model.named_parameters()}
        if dist.get_rank() == 0:
            folder.mkdir(parents=True)
            torch.save((values, copy.deepcopy(state) if copied else state), folder / "full.pt")
        dist.barrier()

    def load(model: nn.Module, opt: Any, folder: Path) -> None:
        values, state = torch.load(folder / "full.pt", weights_only=True)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(laid(values[name], p))
        given = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast, **options)
        set_optimizer_state_dict(model, opt, {} if broadcast and dist.get_rank() else state, options=given)

    return save, load


WAYS = {
    "dcp": _dcp(False),
    "dcp, asynchronous": _dcp(True),
    "dcp, flattened": _dcp(False, flatten_optimizer_state_dict=True),
    "dcp, offloaded": _dcp(False, cpu_offload=True),
    "full": _full(False, copied=True),
    "full, offloaded, from rank 0": _full(True, cpu_offload=True),
}

CHAIN = (("FSDP2", 4), ("FSDP2", 2), ("FSDP2", 3), ("plain", 1))
OTHER = (("FSDP2 x TP", 4), ("TP", 2), ("HSDP", 4), ("plain", 1), ("FSDP2", 2))


def resharded(place: Place, kind: str, way: str, legs: Any = CHAIN, forget: bool = False) -> Any:
    """Departure from an uninterrupted run, after two steps on each mesh, saved on one and loaded on the next."""
    save, load = WAYS[way]
    rows = gradients(2 * len(legs))
    result = None
    for number, (mesh, size) in enumerate(legs):
        with place.world(size, f"{number}") as active:
            if not active:
                continue
            model = spread(mesh, size)
            opt = KINDS[kind](model)
            folder = place.folder / f"{place.tag}-{number}"
            if number:
                load(model, opt, folder)
                if forget and number == 1:
                    opt.state.clear()
            feed(model, opt, rows[2 * number : 2 * number + 2])
            if number + 1 < len(legs):
                save(model, opt, folder.with_name(f"{place.tag}-{number + 1}"))
            else:
                result = distance(model, alone(kind, len(rows)))
    return result


def killed(place: Place, same_folder: bool) -> None:
    """Two ranks save after one step and after two; the second is killed with its part of the second save written."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    class Dying(FileSystemWriter):
        def write_data(self, *given: Any) -> Any:
            result = super().write_data(*given)
            result.wait()
            if place.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

    dist.init_process_group(
        "gloo",
        init_method=f"file://{place.folder}/rendezvous-{place.tag}",
        rank=place.rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=20),
    )
    model = spread("FSDP2", 2)
    opt = KINDS["ASGO"](model)
    rows = gradients(2)
    save, _ = WAYS["dcp"]
    feed(model, opt, rows[:1])
    save(model, opt, place.folder / "first")
    feed(model, opt, rows[1:])
    state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, opt)}
    try:
        dcp.save(state, storage_writer=Dying(place.folder / ("first" if same_folder else "second")))
    except (CheckpointException, RuntimeError):
        return  # the other rank is gone
    raise AssertionError("the save was not cut short")


def reloaded(place: Place, name: str) -> tuple[float, int] | str:
    """Departure of a saved run from one process after one step, and its step; what loading says if it refuses."""
    with place.world(1):
        model = spread("plain", 1)
        opt = KINDS["ASGO"](model)
        try:
            WAYS["dcp"][1](model, opt, place.folder / name)
        except CheckpointException as error:
            return str(error)
        steps = {int(entry["step"]) for entry in opt.state.values()}
        return distance(model, alone("ASGO", 1))[0], max(steps)
