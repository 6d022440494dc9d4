"""Jobs that each process of `test_torch_meshes` runs: models on meshes, optimizers, ways from one mesh to another."""

from __future__ import annotations

import contextlib
import copy
import datetime
import faulthandler
import gc
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from mutation import mutated
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import precond_ref as pr
import precond_ref_torch as pt
from precond_ref.cost import movement
from precond_ref_torch import buckets, optimizer
from precond_ref_torch import distributed as sharding

torch.set_num_threads(1)


# ---- processes ------------------------------------------------------------------------------------------------------


Jobs = list[tuple[str, tuple[Any, ...]]]


def run(count: int, jobs: Jobs, folder: Path, killed: tuple[int, ...] = ()) -> list[list[Any]]:
    """Return the results of ``count`` processes for each job ``(name of a function here, arguments)``, or raise.

    A function is called with a `Place` first, on all processes, one job after the other. Those ``killed`` return None.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    started = [context.Process(target=_work, args=(rank, jobs, folder), daemon=True) for rank in range(count)]
    for process in started:
        process.start()
    while any(process.exitcode is None for process in started):
        multiprocessing.connection.wait([process.sentinel for process in started if process.exitcode is None])
        if any(process.exitcode not in (None, 0) for process in started) and not killed:
            for process in started:  # the others would wait for it
                process.kill()
    found, seconds = [], []
    failed = [rank for rank in range(count) if (folder / f"{rank}.error").exists() and rank not in killed]
    for rank, process in sorted(enumerate(started), key=lambda item: item[0] not in failed):
        file = folder / f"{rank}.pickle"
        failure = folder / f"{rank}.error"
        if failure.exists():
            raise AssertionError(f"rank {rank}: {failure.read_text(encoding='utf-8')}")
        if rank in killed and process.exitcode == -signal.SIGKILL:
            found.append([None] * len(jobs))
            continue
        if process.exitcode != 0:
            where = (folder / f"{rank}.stuck").read_text(encoding="utf-8")
            raise AssertionError(f"rank {rank} ended with {process.exitcode}: {where}")
        values, used = pickle.loads(file.read_bytes())
        seconds.append(used)
        found.append(values)
    print(f"{count} processes, {sum(seconds):.1f} s of processor time")
    return [[values[i] for values in found] for i in range(len(jobs))]


def _work(rank: int, jobs: Jobs, folder: Path) -> None:
    torch.set_num_threads(1)
    with (folder / f"{rank}.stuck").open("w", encoding="utf-8") as stuck:
        _run(rank, jobs, folder, stuck)
        faulthandler.cancel_dump_traceback_later()


LONGEST = 300
"""Seconds of one job after which a process says where it is, and ends."""


def _run(rank: int, jobs: Jobs, folder: Path, stuck: TextIO) -> None:
    values = []
    try:
        for i, (name, given) in enumerate(jobs):
            faulthandler.dump_traceback_later(LONGEST, exit=True, file=stuck)
            values.append(globals()[name](Place(rank, folder, f"{i}"), *given))
        used = os.times()
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps((values, used.user + used.system)))
    except BaseException:
        _fail(rank, folder)


def _fail(rank: int, folder: Path) -> None:
    """End this process with the exception in a file: the others would wait for it, and it for the others."""
    (folder / f"{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
    os._exit(1)


class Place(NamedTuple):
    """Where a job runs."""

    rank: int
    folder: Path
    tag: str

    @contextlib.contextmanager
    def world(self, size: int, name: str = "") -> Iterator[bool]:
        """Make a process group of the first ``size`` processes; yield True if this is one of them."""
        if self.rank >= size:
            yield False
            return
        file = self.folder / f"rendezvous-{self.tag}-{name}"
        dist.init_process_group(
            "gloo", init_method=f"file://{file}", rank=self.rank, world_size=size, timeout=datetime.timedelta(minutes=4)
        )
        try:
            yield True
            dist.barrier()
        except BaseException:
            _fail(self.rank, self.folder)
        gc.collect()  # freeing a DistributedDataParallel later would end gloo's threads, and keep the GIL from them
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
    """Departure of a saved run from one process after one step, and its step; the error if loading is refused."""
    with place.world(1):
        model = spread("plain", 1)
        opt = KINDS["ASGO"](model)
        try:
            WAYS["dcp"][1](model, opt, place.folder / name)
        except CheckpointException as error:
            return str(error)
        steps = {int(entry["step"]) for entry in opt.state.values()}
        return distance(model, alone("ASGO", 1))[0], max(steps)


# ---- what the ranks agree on ----------------------------------------------------------------------------------------


def agreement(place: Place, silent: bool = False) -> list[tuple[str, str]]:
    """For each mistake of one rank among four: the error of the step here, and if all is as before and goes on.

    ``silent``: the planted mistake, that nobody asks.
    """
    found = []
    with place.world(4):
        if silent:
            optimizer.Optimizer._agree = _alone  # type: ignore[method-assign]
        mistakes = ("norm.bias", 1), ("up.weight", 2), ("rate", 3), ("sparse", 0), ("no rate", 0), ("plain", 0)
        for name, rank in mistakes:
            if silent and name != "norm.bias":  # without agreement these wait for ever, or end the process
                continue
            model = spread("FSDP2", 4)
            opt = KINDS["ASGO"](model)
            rows = gradients(3)
            feed(model, opt, rows[:1])
            named = dict(model.named_parameters())
            before = [whole(p).clone() for p in named.values()]
            for key, p in named.items():
                p.grad = laid(rows[1][key], p)
            if place.rank == rank and name in named:
                named[name].grad = None
            if place.rank == rank and name == "rate":
                opt.param_groups[0]["lr"] = 0.25
            if place.rank == rank and name == "sparse":
                opt.param_groups[0]["maximize"] = "yes"
            if place.rank == rank and name == "no rate":
                opt.param_groups[0]["lr"] = None
            if place.rank == rank and name == "plain":
                named["up.weight"].grad = rows[1]["up.weight"]
            try:
                opt.step()
                message = ""
            except (ValueError, TypeError) as error:
                message = f"{type(error).__name__}: {error}"
            opt.param_groups[0].update(lr=0.125, maximize=False)
            kept = all(torch.equal(whole(p), b) for p, b in zip(named.values(), before, strict=True))
            feed(model, opt, rows[1:])
            goes_on = distance(model, alone("ASGO", 3))
            found.append((message, f"kept {kept}, then {goes_on}"))
        if silent:
            optimizer.Optimizer._agree = AGREE  # type: ignore[method-assign]
    return found


def lacking(place: Place, kind: str, planted: str = "") -> dict[str, Any]:
    """What two ranks see if one lacks something. By mistake: the error, and True if all is as before.

    "first step": the first step, gradients missing. "load": a state missing in what is loaded. "save": one missing in
    the optimizer. "fallback": the state dict, this entry naming no method. "then": the departure after the right steps.
    ``planted``: "silent", "entries stay", or "unheard", that a rank does not hear of another's refusal.
    """
    found: dict[str, Any] = {}
    agree, unmake = optimizer.Optimizer._agree, optimizer.Optimizer._unmake
    with place.world(2) as active:
        if not active:
            return found
        if planted == "silent":
            optimizer.Optimizer._agree = _alone  # type: ignore[method-assign]
        if planted == "entries stay":
            optimizer.Optimizer._unmake = lambda self, stepped: self._made.clear()  # type: ignore[method-assign]
        if planted == "unheard":
            optimizer.Optimizer._agree = mutated(agree, ("if wrong:", "if False:"))  # type: ignore[method-assign]
        model = spread("FSDP2", 2)
        opt, rows, named = KINDS[kind](model), gradients(3), dict(model.named_parameters())

        def attempted(call: Callable[[], Any]) -> tuple[str, bool]:
            def everything() -> list[Any]:
                states = [(named_of[p], key, v) for p, entry in opt.state.items() for key, v in entry.items()]
                return [(*at, sharding.local(v).detach().clone()) for *at, v in (*states, *named.items())]

            named_of = {p: name for name, p in named.items()}
            before, told = everything(), ""
            try:
                call()
            except (ValueError, KeyError) as error:
                told = f"{type(error).__name__}: {error}"
            pairs = list(itertools.zip_longest(before, everything(), fillvalue=("",)))
            return told, all(a[:-1] == b[:-1] and torch.equal(a[-1], b[-1]) for a, b in pairs)

        try:
            right = opt.param_groups[0]["fallback"]
            if place.rank == 1:
                opt.param_groups[0]["fallback"] = {"method": "None"}
            found["fallback"] = attempted(opt.state_dict)
            opt.param_groups[0]["fallback"] = right
            if planted == "unheard":  # the others would wait for rank 1
                return found
            for name, p in named.items():
                p.grad = laid(rows[0][name], p)
            if place.rank == 1:
                named["down.weight"].grad = named["twin.weight"].grad = None
            found["first step"] = attempted(opt.step)
            if planted:
                return found
            assert not opt.state_dict()["state"]
            feed(model, opt, rows[:2])
            saved = copy.deepcopy(opt.state_dict())
            lost = opt.state[named["up.weight"]]
            if place.rank == 1:
                del saved["state"][0], opt.state[named["up.weight"]]
            found["save"] = attempted(opt.state_dict)
            opt.state[named["up.weight"]] = lost
            found["load"] = attempted(lambda: opt.load_state_dict(saved))
            feed(model, opt, rows[2:])
            found["then"] = distance(model, alone(kind, 3))
        finally:
            optimizer.Optimizer._agree, optimizer.Optimizer._unmake = agree, unmake  # type: ignore[method-assign]
    return found


def crossed(place: Place, matrices: bool, planted: bool = False) -> str:
    """The error if rank 0 has no gradient of one parameter, and rank 1 none of another of its shape and owner.

    ``planted``: parameters are compared by shape and owner alone.
    """
    movement = optimizer.Optimizer._movement
    with place.world(2) as active:
        if not active:
            return ""
        mesh, shape = init_device_mesh("cpu", (2,)), (6, 4) if matrices else (6,)
        value = torch.ones(shape, dtype=torch.float64)
        params = [nn.Parameter(distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)) for _ in range(4)]
        opt = pt.Optimizer(list(zip("abcd", params, strict=True)), pr.ASGO(eps=0.25), lr=0.125)
        for p in params:
            p.grad = laid(value, p)
        params[3 if place.rank else 1].grad = None  # of four equal matrices, rank 1 owns the second and the fourth
        if planted:
            optimizer.Optimizer._movement = mutated(  # type: ignore[method-assign]
                movement, ("(*places[param], ", "(0, "), ("places[param][0]", "0")
            )
        try:
            return attempt(nn.ParameterList(params), opt)[0]
        finally:
            optimizer.Optimizer._movement = movement  # type: ignore[method-assign]


def uneven(place: Place, planted: bool = False) -> str | float:
    """Departure from one process if only one rank's part of a parameter is too large for a common buffer; the error.

    ``planted``: the ranks compare their buckets in order.
    """
    movement = optimizer.Optimizer._movement
    with place.world(2) as active:
        if not active:
            return 0.0
        mesh, departures = init_device_mesh("cpu", (2,)), []
        values = [torch.ones(2 * optimizer.LARGEST_MEMBER["cpu"] + 1), torch.ones(7)]
        params = [nn.Parameter(distribute_tensor(v, mesh, [Shard(0)], src_data_rank=None)) for v in values]
        single = [nn.Parameter(v.clone()) for v in values]
        if planted:
            optimizer.Optimizer._movement = mutated(  # type: ignore[method-assign]
                movement, ("sorted(found, key=itemgetter(0))", "found")
            )
        try:
            for some in (params, single):
                for p in some:
                    p.grad = laid(torch.full(p.shape, 0.5), p)
                pt.Optimizer(some, pr.Adam(), lr=0.125).step()
            departures = [float((whole(a) - b.detach()).abs().max()) for a, b in zip(params, single, strict=True)]
        except ValueError as error:
            return str(error)
        finally:
            optimizer.Optimizer._movement = movement  # type: ignore[method-assign]
        return max(departures)


AGREE = optimizer.Optimizer._agree


def _alone(self: Any, refusal: Exception | None, *given: Any, travels: bool = False, **more: Any) -> bool:
    if refusal is not None:
        raise refusal
    return travels


def attempt(model: nn.Module, opt: Any) -> tuple[str, bool]:
    """The error of a step, with its first note; True if all parameters and states are as before."""

    def everything() -> list[Tensor]:
        states = [value for entry in opt.state.values() for value in entry.values()]
        return [sharding.local(value).detach().clone() for value in (*model.parameters(), *states)]

    before, told = everything(), ""
    try:
        opt.step()
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        if notes := getattr(error, "__notes__", []):
            told += f" ({notes[0]})"
    return told, all(map(torch.equal, before, everything()))


def failing(place: Place, silent: bool = False) -> tuple[str, bool, Any]:
    """The error of a step on four ranks if the update of one matrix fails on its owner, True if all is as before, and
    the departure after two more steps. ``silent``: the planted mistake, that the owner raises and tells nobody."""
    directions, hear = buckets.Bucket.directions, optimizer.Optimizer._hear

    def fails(self: Any, *given: Any) -> Any:
        if self.owner is not None and self.shapes[0] == (6, 10):
            raise ArithmeticError("no decomposition")
        return directions(self, *given)

    with place.world(4):
        model = spread("FSDP2", 4)
        opt = KINDS["ASGO"](model)
        rows = gradients(3)
        feed(model, opt, rows[:1])
        for name, p in model.named_parameters():
            p.grad = laid(rows[1][name], p)
        buckets.Bucket.directions = fails  # type: ignore[method-assign]
        if silent:
            optimizer.Optimizer._hear = _loud  # type: ignore[method-assign]
        try:
            told, kept = attempt(model, opt)
        finally:
            buckets.Bucket.directions = directions  # type: ignore[method-assign]
            optimizer.Optimizer._hear = hear  # type: ignore[method-assign]
        if silent:
            return told, kept, None
        feed(model, opt, rows[1:])
        return told, kept, distance(model, alone("ASGO", 3))


def _loud(self: Any, failure: Any) -> None:
    if failure is not None:
        raise failure[0]


CHAINED = {"chain": ((0, 1), (1, 2), (2, 3)), "ring": ((0, 1), (1, 2), (2, 3), (0, 3))}
"""Meshes that overlap, each with parameters of its own."""


class Linked(nn.Module):
    """Two matrices and a vector on each mesh that this rank is in; ranks name the meshes in different orders."""

    def __init__(self, kind: str, rank: int) -> None:
        super().__init__()
        meshes = [DeviceMesh("cpu", list(ranks)) for ranks in CHAINED[kind]]
        numbered = [(number, mesh) for number, mesh in enumerate(meshes) if mesh.get_coordinate() is not None]
        for number, mesh in numbered if rank % 2 else reversed(numbered):
            for name, value in linked(number, 0).items():
                param = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None))
                self.register_parameter(name, param)


def linked(number: int, step: int) -> dict[str, Tensor]:
    """Parameters of one mesh (step 0), or their gradients."""
    generator = torch.Generator().manual_seed(10 * step + number)
    shapes = {"first": (5, 3), "second": (3, 4), "bias": (3,)}
    return {
        f"{name}{number}": torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def chained(place: Place, kind: str, fault: str, planted: bool = False) -> tuple[str, bool, float]:
    """The error of the second of three steps with a fault at one end of the meshes, True if all is as before, and the
    departure from one process after the step is repeated. ``planted``: that only neighbours ask each other."""
    ask, told_by, directions = sharding.Circle.ask, sharding.Circle.told, buckets.Bucket.directions
    ends = {"lr": 0, "no gradient": 3, "refused": 0, "update": 3}
    method: Any = pr.Adam() if planted else pr.ASGO(beta1=0.75, beta2=0.875, eps=0.25)  # which waits for nobody

    def grads(step: int) -> dict[str, Tensor]:
        return {name: value for number in range(4) for name, value in linked(number, step).items()}

    def fails(self: Any, *given: Any) -> Any:
        if self.owner is not None and place.rank == ends[fault]:
            raise ArithmeticError("no decomposition")
        return directions(self, *given)

    with place.world(4):
        if planted:
            sharding.Circle.ask = mutated(ask, ("range(self.rounds)", "range(1)"))  # type: ignore[method-assign]
            sharding.Circle.told = lambda self, teams, value: {self.me: value}  # type: ignore[method-assign]
        try:
            model = Linked(kind, place.rank)
            opt = pt.Optimizer(model.named_parameters(), method, lr=0.125)
            feed(model, opt, [grads(1)])
            for name, p in model.named_parameters():
                p.grad = laid(grads(2)[name], p)
            if place.rank == ends.get(fault):
                if fault == "no gradient":
                    next(p for name, p in model.named_parameters() if name.startswith("first")).grad = None
                opt.param_groups[0]["lr"] = 0.25 if fault == "lr" else 0.125
                opt.param_groups[0]["maximize"] = "yes" if fault == "refused" else False
            if fault == "update":
                buckets.Bucket.directions = fails  # type: ignore[method-assign]
            told, kept = attempt(model, opt) if fault else ("", True)
        finally:
            sharding.Circle.ask, sharding.Circle.told = ask, told_by  # type: ignore[method-assign]
            buckets.Bucket.directions = directions  # type: ignore[method-assign]
        if planted:
            return told, kept, 0.0
        opt.param_groups[0].update(lr=0.125, maximize=False)
        feed(model, opt, [grads(2), grads(3)])
        single = nn.Module()
        for number in range(4):
            for name, value in linked(number, 0).items():
                single.register_parameter(name, nn.Parameter(value))
        feed(single, pt.Optimizer(single.named_parameters(), method, lr=0.125), [grads(step) for step in (1, 2, 3)])
        # no collective of DTensors: torch keeps the sizes of groups by their names, which the worlds before used too
        expected = dict(single.named_parameters())
        parts = [
            (sharding.local(p).detach(), laid(expected[name].detach(), p).to_local())
            for name, p in model.named_parameters()
        ]
        return told, kept, max(float((a - b).abs().max() / b.abs().max()) for a, b in parts if b.numel())


def overflow(place: Place, agreed: bool, mesh: str = "stages", size: int = 4) -> Any:
    """An infinite entry in one gradient at the second step, on one rank alone. Scale, departure from a run without
    that step, steps of the first parameter; the error if the scaler raises. ``agreed``: PyTorch's scaler that asks
    all ranks."""
    rows = gradients(3)
    with place.world(size) as active:
        if not active:
            return None
        model = spread(mesh, size)
        opt = KINDS["ASGO"](model)
        scaler: Any = torch.amp.GradScaler("cpu", init_scale=4.0)
        if agreed:
            scaler = ShardedGradScaler("cpu", init_scale=4.0, process_group=dist.group.WORLD)
        for number, row in enumerate(rows):
            scaler.scale(torch.zeros(()))
            for name, p in model.named_parameters():
                grad = scaler.get_scale() * row[name]
                if number == 1 and name == "up.weight":
                    grad[0, 0] = torch.inf
                p.grad = laid(grad, p)
            try:
                scaler.step(opt)
            except RuntimeError as error:
                return str(error)
            scaler.update()
        single = net()
        feed(single, KINDS["ASGO"](single), [rows[0], rows[2]])
        expected = {name: p.detach() for name, p in single.named_parameters()}
        return scaler.get_scale(), distance(model, expected)[0], int(next(iter(opt.state.values()))["step"])


def accumulated(place: Place, planted: str = "") -> float:
    """Two micro-batches a step on each of four ranks under FSDP2, from one process with all samples."""
    generator = torch.Generator().manual_seed(2)
    samples = torch.randn(3, 2, 4, 5, 6, generator=generator, dtype=torch.float64)  # steps, micro-batches, ranks, batch
    with place.world(4):
        model: Any = spread("FSDP2", 4)
        single = net()
        for run in (model, single):
            run.twin.weight.requires_grad_(False)  # a frozen one
        opt, other = KINDS["ASGO"](model), KINDS["ASGO"](single)
        for step in samples:
            opt.zero_grad()
            for number, batch in enumerate(step):
                model.set_requires_gradient_sync(number == len(step) - 1 or planted == "step per micro-batch")
                (model(batch[place.rank]).square().mean() / len(step)).backward()
                if planted == "step per micro-batch":
                    opt.step()
                    opt.zero_grad()
            if planted == "doubled gradient":
                for p in model.parameters():
                    if p.grad is not None:
                        p.grad *= 2
            if planted != "step per micro-batch":
                opt.step()
            other.zero_grad()
            single(step.flatten(0, 2)).square().mean().backward()
            other.step()
        return max(distance(model, {name: p.detach() for name, p in single.named_parameters()}))


# ---- movement -------------------------------------------------------------------------------------------------------


def placed(place: Place, planted: bool = False) -> list[str]:
    """Parameters of which this rank has other entries than the plan says."""
    wrong = []
    kinds = [(mesh, size) for mesh, sizes in MESHES.items() for size in sizes if mesh != "plain"]
    for mesh, size in kinds:
        with place.world(size, f"{mesh}-{size}") as active:
            for name, p in spread(mesh, size).named_parameters() if active else ():
                if not isinstance(p, DTensor):
                    continue
                numbers = torch.arange(p.numel()).reshape(p.shape)
                layout = sharding.layout_of(p)
                if planted:
                    layout = layout._replace(cuts=tuple(c and c._replace(factor=1) for c in layout.cuts))
                ranks = p.device_mesh.mesh.flatten().tolist()
                region = movement.regions(tuple(p.shape), layout)[ranks.index(place.rank)]
                expected = laid(numbers, p).to_local()
                found = torch.full(movement.sizes(region), -1)
                for there, here in movement.blocks(region):
                    found[here] = numbers[there]
                if not torch.equal(found, expected):
                    wrong.append(f"{name} on {mesh} {size}")
    return wrong


def moved(place: Place, mesh: str, size: int, owner: str = "mesh") -> tuple[int, dict[str, Any], float]:
    """Bytes that this rank sends to others in one step, the shapes, and the departure after three steps."""
    sent = 0

    def counting(output: Tensor, given: Tensor, received: Any, splits: Any, group: Any = None, **rest: Any) -> Any:
        nonlocal sent
        sent += given.element_size() * sum(n for rank, n in enumerate(splits) if rank != dist.get_rank(group))
        return exchange(output, given, received, splits, group=group, **rest)

    with place.world(size):
        model = spread(mesh, size)
        named = [(name, p) for name, p in model.named_parameters() if p.ndim == 2]
        method = pr.ASGO(beta1=0.75, beta2=0.875, eps=0.25)
        opt = pt.Optimizer(model.named_parameters(), method, lr=0.125, weight_decay=0.25, owner=owner)
        rows = gradients(3)
        exchange, dist.all_to_all_single = dist.all_to_all_single, counting
        try:
            feed(model, opt, rows[:1])
        finally:
            dist.all_to_all_single = exchange
        saved = copy.deepcopy(opt.state_dict())
        other = pt.Optimizer(model.named_parameters(), method, lr=0.125, owner="replica" if owner == "mesh" else "mesh")
        other.load_state_dict(saved)  # checkpoints do not know the owners
        feed(model, other, rows[1:2])
        again = copy.deepcopy(other)
        for optim in (again, other):
            for name, p in zip(dict(model.named_parameters()), optim.param_groups[0]["params"], strict=True):
                p.grad = laid(rows[2][name], p)
            optim.step()
        pairs = zip(again.param_groups[0]["params"], model.parameters(), strict=True)
        assert all(torch.equal(whole(a), whole(b)) for a, b in pairs)
        return sent, {name: tuple(p.shape) for name, p in named}, max(distance(model, alone("ASGO", 3)))


def overlapped(place: Place) -> list[str]:
    """The calls of one step, in order: the second exchange begins before the first matrices are computed."""
    done: list[str] = []
    out, back, directions = sharding.Move.out, sharding.Move.back, buckets.Bucket.directions
    with place.world(2) as active:
        if active:
            model = spread("FSDP2", 2)
            opt = KINDS["ASGO"](model)
            sharding.Move.out = lambda self, parts: done.append("out") or out(self, parts)  # type: ignore
            sharding.Move.back = lambda self, *given: done.append("back") or back(self, *given)  # type: ignore
            buckets.Bucket.directions = (  # type: ignore
                lambda self, *given: (
                    (done.append("computed") if self.owner is not None else None) or directions(self, *given)
                )
            )
            try:
                feed(model, opt, gradients(1))
            finally:
                sharding.Move.out, sharding.Move.back = out, back  # type: ignore[method-assign]
                buckets.Bucket.directions = directions  # type: ignore[method-assign]
    return done


def interrupted(place: Place) -> tuple[str, bool]:
    """The note of an error at the way back of the second of four shapes; True if all matrices are as before."""
    back = sharding.Move.back
    with place.world(2) as active:
        if not active:
            return "", True
        model = spread("FSDP2", 2)
        opt = KINDS["ASGO"](model)
        feed(model, opt, gradients(1))
        matrices = [p for p in model.parameters() if p.ndim == 2]
        before = [[whole(p).clone(), *(v.clone() for v in opt.state[p].values())] for p in matrices]
        count = 0

        def failing(self: Any, *given: Any) -> Any:
            nonlocal count
            count += 1
            return 1 / 0 if count == 2 else back(self, *given)

        sharding.Move.back = failing  # type: ignore[method-assign]
        try:
            feed(model, opt, gradients(1))
        except ZeroDivisionError as error:
            told = error.__notes__[0]
        finally:
            sharding.Move.back = back  # type: ignore[method-assign]
        after = [[whole(p), *opt.state[p].values()] for p in matrices]
        return told, all(
            torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True)
        )


SHAPED: list[tuple[tuple[int, ...], int, Any]] = [
    ((6, 6), 1, pr.ASGO(eps=0.25)),
    ((4, 5, 3), 0, pr.ASGO(eps=0.25)),
    ((4, 5, 3), 2, pr.Muon()),
    ((5, 3, 2, 2), 0, pr.SOAP(eps=0.25)),
    ((5, 3, 2, 2), 1, pr.ASGO(eps=0.25)),
    ((1, 9), 0, pr.ASGO(eps=0.25)),
    ((9, 1), 1, pr.Muon()),
    ((5, 7), 1, pr.Adam()),
]
"""A matrix, stacks, a convolution, a row and a column, a part of each on a rank: shape, axis that is cut, method."""


def shaped(place: Place, planted: bool = False) -> list[float]:
    """Departure of each of `SHAPED` on three ranks from one process, saved and loaded after two of three steps.

    ``planted``: the first one alone, read as if its rows were cut.
    """
    found = []
    layout_of = sharding.layout_of
    with place.world(3) as active:
        if active and planted:
            sharding.layout_of = lambda tensor: movement.Layout((3,), (movement.Cut(0),))
        try:
            for shape, axis, method in SHAPED[: 1 if planted else None] if active else ():
                generator = torch.Generator().manual_seed(0)
                value, *grads = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
                mesh = init_device_mesh("cpu", (3,))
                param = nn.Parameter(distribute_tensor(value, mesh, [Shard(axis)], src_data_rank=None))
                single = nn.Parameter(value.clone())
                opts = [pt.Optimizer([("x", p)], method, lr=0.125, weight_decay=0.25) for p in (param, single)]
                for number, grad in enumerate(grads):
                    for p, opt in zip((param, single), opts, strict=True):
                        p.grad = laid(grad, p)
                        opt.step()
                        if number == 1:
                            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
                found.append(float((whole(param) - single.detach()).abs().max()))
        finally:
            sharding.layout_of = layout_of
    return found


# ---- planted mistakes of checkpoints, and of updates per shard ------------------------------------------------------


def per_shard(place: Place, kind: str) -> float:
    """The departure of an optimizer that is given each rank's rows as if they were the matrices."""
    with place.world(2) as active:
        if not active:
            return 1.0
        method = pr.ASGO(beta1=0.75, beta2=0.875, eps=0.25, heads=5 if kind == "heads" else None)
        mesh = init_device_mesh("cpu", (2,))
        value = net().up.weight.detach()
        params = [nn.Parameter(distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)) for _ in range(2)]
        local = nn.Parameter(params[1].to_local().detach().clone())
        single = nn.Parameter(value.clone())
        opts = [pt.Optimizer([p], method, lr=0.125) for p in (params[0], local, single)]
        for row in gradients(3):
            grad = row["up.weight"]
            params[0].grad, single.grad = laid(grad, params[0]), grad
            local.grad = laid(grad, params[0]).to_local()
            for opt in opts:
                opt.step()
        right, wrong, single = (
            whole(params[0]),
            DTensor.from_local(local.detach(), mesh, [Shard(0)]).full_tensor(),
            single.detach(),
        )
        assert torch.equal(right, single)
        return float((wrong - single).abs().max() / single.abs().max())


def full_states(place: Place, planted: str = "") -> str:
    """The fault of the full state dict of two ranks, or of a copy of the sharded one; "" if there is none."""
    dealt, elsewhere = sharding.dealt, optimizer._elsewhere
    with place.world(2) as active:
        if not active:
            return planted
        if planted == "rank 0's matrices only":
            sharding.dealt = lambda values, team: [value for value, *_ in values]
        if planted == "a view with an offset":
            sharding.dealt = mutated(dealt, ("own = part.clone()", "own = part"))
        if planted == "no keys where another rank keeps the state":
            optimizer._elsewhere = lambda method, unit: {}
        try:
            model, single = spread("FSDP2", 2), net()
            opt, other = KINDS["ASGO"](model), KINDS["ASGO"](single)
            feed(model, opt, gradients(2))
            feed(single, other, gradients(2))
            copy.deepcopy(opt.state_dict())
            if any(list(opt.state[p]) != ["step", "m", "gram"] for p in model.parameters() if p.ndim == 2):
                return "keys"
            full = StateDictOptions(full_state_dict=True)
            found, expected = (get_optimizer_state_dict(m, o, options=full) for m, o in ((model, opt), (single, other)))
            for name, entry in expected["state"].items():
                for key, value in entry.items():
                    other_value = found["state"][name][key]
                    if other_value.shape != value.shape or (other_value - value).abs().max() > 1e-12:
                        return f"{key} of {name}"
        except (RuntimeError, KeyError, ValueError) as error:
            return type(error).__name__
        finally:
            sharding.dealt, optimizer._elsewhere = dealt, elsewhere
    return ""


def averaged(place: Place) -> list[bool]:
    """For each kind: True if all ranks have the same bits under DistributedDataParallel, each with other data."""
    with place.world(3) as active:
        return [_same_bits(kind, place.rank) for kind in KINDS] if active else []


def _same_bits(kind: str, rank: int) -> bool:
    model = net()
    wrapped = nn.parallel.DistributedDataParallel(model)
    opt = KINDS[kind](model)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        opt.zero_grad()
        wrapped(torch.randn(4, 6, generator=generator, dtype=torch.float64)).square().mean().backward()
        opt.step()
    first = [p.detach().clone() for p in model.parameters()]
    for p in first:
        dist.broadcast(p, 0)
    return all(map(torch.equal, first, model.parameters()))
