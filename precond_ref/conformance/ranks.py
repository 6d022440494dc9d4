"""Run an optimizer on the ranks of a mesh for `worlds`. Each rank is a process, which may hang or die.

`serve` runs in a process between `worlds` and the ranks. It imports PyTorch or JAX once and forks the ranks; it never
runs the subject. A rank imports the subject, spreads a small model over the mesh, and sends back its part of each
parameter. With JAX the ranks are devices of one process.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import importlib
import inspect
import os
import pickle
import re
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from precond_ref import registry
from precond_ref.conformance import isolation, subjects

Named = dict[str, np.ndarray]
LOUD = {"lr": 2.0**-4, "learning_rate": 2.0**-4, "weight_decay": 2.0**-3}
"""Arguments for every target that has them; their effect is large enough to be seen."""
MESHES = {
    "torch": ("fsdp", "hsdp", "tp", "fsdp-tp", "ddp"),
    "jax": ("fsdp", "hsdp", "tp"),
}
"""The meshes of `worlds.check`, by framework."""
PATIENCE = 5.0
"""Seconds that the other ranks have after one has raised or died."""
PRELOAD = {
    "torch": (
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.distributed.checkpoint.state_dict",
        "fsspec",
    ),
    "jax": ("jax", "optax"),
}


@dataclass(frozen=True)
class Job:
    """What the ranks do in one run: its inputs and options."""

    params: Named
    """Whole parameters at the start, ``<layer>.weight`` (O, I) and ``<layer>.bias`` (O,)."""
    grads: Sequence[Sequence[Named]]
    """By step, micro-batch and name: whole gradients (the mean over ranks). A name that is missing has no gradient."""
    dtype: str = "float64"
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the target, besides those in its brackets."""
    load: str = ""
    """Folder of the checkpoint that is loaded first; "" for none."""
    save: str = ""
    """Folder for a checkpoint at the end; "" for none."""
    each: str = ""
    """A mistake in the last step: a step after each micro-batch, of the sum so far ("partial") or of it ("alone")."""
    spoil: tuple[str, str] = ("", "")
    """A mistake in the state that the steps of `before` have made: see `_Torch._spoil`."""
    before: Sequence[Sequence[Named]] = ()
    """Gradients of steps that are made first and not recorded."""


@dataclass
class Trace:
    """What one rank sends back of a run."""

    index: Named
    """By parameter, in the shape of its part: the place of each entry in the whole parameter."""
    values: list[Named] = field(default_factory=list)
    """Its part of each parameter at the start and after each step."""
    saved: dict[str, str] = field(default_factory=dict)
    """Dtypes of the tensors of the state by ``parameter: key``, before saving."""
    loaded: dict[str, str] = field(default_factory=dict)
    """Dtypes of the tensors of the state by ``parameter: key``, after loading."""
    keys: list[str] = field(default_factory=list)
    """Names of the entries of the state."""


@dataclass
class Outcome:
    """The result of a run: traces by rank, or the reason why there are none."""

    traces: list[Trace] = field(default_factory=list)
    raised: str = ""
    """The subject's exception, and the ranks that raised it."""
    ended: str = ""
    """The way in which a rank died, or the places where the ranks hang."""

    def said(self) -> str:
        """Return ``raised`` and ``ended`` in words."""
        return "; ".join(([f"it raises {self.raised}"] if self.raised else []) + [self.ended] * bool(self.ended))


# ---- the process between --------------------------------------------------------------------------------------------


def serve() -> NoReturn:
    """Answer requests, a line each, until there are none."""
    isolation._end_with_parent()
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    for line in requests:
        what, arguments = pickle.loads(base64.b64decode(line))
        reply = base64.b64encode(pickle.dumps(_session(*arguments) if what == "session" else _kind(*arguments))) + b"\n"
        while reply:
            reply = reply[os.write(replies, reply) :]
    os._exit(0)


def _kind(target: str, devices: int) -> tuple[str, str]:
    """Import the framework of a target. Return its name, "torch" or "jax"; or "error" with a text.

    The target itself is imported in a process of its own.
    """
    here, there = os.pipe()
    if not (pid := os.fork()):
        os.close(here)
        try:
            reply = (_kind_of(subjects.load_target(registry.split(target)[0])), "")
        except subjects.RAISED as error:
            reply = ("error", subjects.words(error))
        except BaseException as error:
            reply = ("error", f"importing it raised {subjects.said(error)}")
        os.write(there, pickle.dumps(reply))
        os._exit(0)
    os.close(there)
    with os.fdopen(here, "rb") as stream:
        sent = stream.read()
    os.waitpid(pid, 0)
    kind, text = pickle.loads(sent) if sent else ("error", f"{target} ended the process that imported it")
    own, number = os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = f"{own} {number} --xla_backend_optimization_level=0"
    os.environ["JAX_PLATFORMS"] = "cpu"
    for module in PRELOAD.get(kind, ()):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            return "error", f"{error.name} is not installed"
    return kind, text


def _kind_of(found: Any) -> str:
    """Return the framework of a target, from its class or function."""
    if not callable(found):
        raise TypeError(f"a target of --world must be a class or a function, got {found!r}")
    if registry.made_by(found):
        return "torch"
    if isinstance(found, type) and any(c.__module__.startswith("torch.optim") for c in found.__mro__):
        return "torch"
    first = next((p.name for p in subjects._signature(found).values()), "")
    if first in ("param", "config"):
        raise TypeError("--world takes torch optimizers and functions that make one, or an optax transformation")
    return "torch" if first in ("params", "model") else "jax"


def _session(kind: str, target: str, world: int, mesh: str, jobs: Sequence[Job], seconds: float) -> list[Outcome]:
    """Return the outcomes of the jobs in order, up to the first that does not come to its end."""
    folder = Path(tempfile.mkdtemp(prefix="precond-ref-"))
    number = world if kind == "torch" else 1
    processes: dict[int, int] = {}  # pipe, pid
    for rank in range(number):
        here, there = os.pipe()
        if not (pid := os.fork()):
            for other in (here, *processes):
                os.close(other)
            _rank(kind, target, rank, world, mesh, jobs, folder, there)
        os.close(there)
        processes[here] = pid
    try:
        return _watch([*processes.items()], len(jobs), seconds, folder)
    finally:
        for pipe, pid in processes.items():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            os.close(pipe)
        for rank in range(number):
            with contextlib.suppress(OSError):
                os.write(2, b"".join(_said(folder, rank)))
        shutil.rmtree(folder, ignore_errors=True)


def _said(folder: Path, rank: int) -> list[bytes]:
    """Return the lines that a rank has printed, without gloo's greeting and PyTorch's log."""
    lines = (folder / f"said-{rank}").read_bytes().splitlines(keepends=True)
    return [line for line in lines if b"[Gloo] Rank" not in line and b"[rank" not in line[:6]]


def _watch(processes: list[tuple[int, int]], jobs: int, seconds: float, folder: Path) -> list[Outcome]:
    """Wait for the replies of the ranks (pipe and process of each), and return them as outcomes.

    ``seconds``: the time for one job.
    """
    number = len(processes)
    buffers, at = [b""] * number, [""] * number
    replies: list[list[Any]] = [[] for _ in processes]
    gone: dict[int, str] = {}
    trouble, done, deadline = 0.0, 0, time.monotonic() + seconds
    while True:
        open_pipes = {pipe: rank for rank, (pipe, _) in enumerate(processes) if rank not in gone}
        for pipe in select.select([*open_pipes], [], [], 0.1)[0] if open_pipes else []:
            rank = open_pipes[pipe]
            part = os.read(pipe, 2**16)
            *lines, buffers[rank] = (buffers[rank] + part).split(b"\n")
            for line in lines:
                what, value = pickle.loads(base64.b64decode(line))
                if what == "at":
                    at[rank] = value
                else:
                    replies[rank].append((what, value))
            if not part:
                gone[rank] = _how(os.waitpid(processes[rank][1], 0)[1], folder, rank)
        if all(len(r) > done for r in replies):
            done, deadline = done + 1, time.monotonic() + seconds
            if done == jobs or (number > 1 and any(r[done - 1][0] == "raised" for r in replies)):
                break
            continue
        stopped = [r for r in range(number) if len(replies[r]) > done and replies[r][done][0] == "raised"]
        dead = {r: how for r, how in gone.items() if len(replies[r]) <= done and r not in stopped}
        if stopped or dead:
            trouble = trouble or time.monotonic()
        late = time.monotonic() > deadline
        if late or len(gone) == number or (trouble and time.monotonic() > trouble + PATIENCE):
            ended = [f"rank {r} {how}{at[r] and ' in ' + at[r]}" for r, how in sorted(dead.items())]
            waits = [r for r in range(number) if len(replies[r]) <= done and r not in gone]
            if waits:
                places = sorted({at[r] for r in waits} - {""})
                over = f" for more than {seconds:g} s" * (late and not trouble)
                ended.append(f"ranks {waits} wait{over}{(places and ' in ' + ' and '.join(places)) or ''}")
            raised = {r: replies[r][done][1] for r in range(number) if r in stopped}
            outcomes = _outcomes(replies, done)  # other ranks only report the lost connection
            return [*outcomes, Outcome(raised="" if dead else _raised(raised, number), ended="; ".join(ended))]
    return _outcomes(replies, done)


def _outcomes(replies: list[list[Any]], done: int) -> list[Outcome]:
    found = []
    for k in range(done):
        raised = {rank: r[k][1] for rank, r in enumerate(replies) if r[k][0] == "raised"}
        traces = [t for r in replies for t in r[k][1]] if not raised else []
        found.append(Outcome(traces, _raised(raised, len(replies))))
    return found


def _raised(texts: Mapping[int, str], number: int) -> str:
    """Return the exceptions in words, each with its ranks unless all have it."""
    same: dict[str, list[int]] = {}
    for rank, text in texts.items():
        first = text.strip().partition("\n")[0]
        same.setdefault(re.sub(r"0x[0-9a-f]+|(?<=rank )\d+", "...", first), []).append(rank)
    return "; ".join(text + f" (ranks {ranks})" * (len(ranks) < number) for text, ranks in same.items())


def _how(status: int, folder: Path, rank: int) -> str:
    """Return the way in which a rank ended, with the reason that its C++ code has printed."""
    text = b"".join(_said(folder, rank)).decode(errors="backslashreplace")
    reason = re.search(r"what\(\): *(.*)", text)
    said = f" ({reason[1][:200]})" if reason else ""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"was ended by {signal.Signals(number).name}{said}"
    return f"ended with exit code {os.waitstatus_to_exitcode(status)}{said}"


# ---- a rank ---------------------------------------------------------------------------------------------------------


def _rank(
    kind: str, target: str, rank: int, world: int, mesh: str, jobs: Sequence[Job], folder: Path, pipe: int
) -> NoReturn:
    """Do all of a rank's work; replies go through ``pipe``."""
    isolation._end_with_parent()
    errors = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(errors, stream)

    def send(what: str, value: Any) -> None:
        line = base64.b64encode(pickle.dumps((what, value))) + b"\n"
        while line:
            line = line[os.write(pipe, line) :]

    try:
        place, fields = registry.split(target)
        found = subjects.load_target(place)
        host = (_Torch if kind == "torch" else _Jax)(found, fields, rank, world, mesh, folder)
        for job in jobs:
            try:
                send("ran", host.run(job, lambda place: send("at", place)))
            except BaseException as error:
                if world > 1 and kind == "torch":  # the other ranks are elsewhere now
                    raise
                send("raised", _words(error))
    except BaseException as error:  # BaseException: torch's CheckpointException
        send("raised", _words(error))
        if kind == "torch":  # they would raise because of its end
            time.sleep(2 * PATIENCE)
    os._exit(0)


def _words(error: BaseException) -> str:
    """Return the text of an error; for torch's CheckpointException, the text of the first rank."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, Mapping) and failures:
        error = next(iter(failures.values()))[0]
    return subjects.said(error)


def _given(make: Any, fields: Mapping[str, Any], first: bool) -> dict[str, Any]:
    """Return the keyword arguments for a target: those in its brackets, and those of `LOUD` that it has."""
    stub = subjects._without_first(make) if first else make
    named = {name for name, p in inspect.signature(stub).parameters.items() if p.kind is not p.VAR_KEYWORD}
    return {name: value for name, value in LOUD.items() if name in named} | dict(fields)


class _Torch:
    """A rank of PyTorch, with gloo."""

    def __init__(self, found: Any, fields: Mapping[str, Any], rank: int, world: int, mesh: str, folder: Path):
        import torch
        import torch.distributed as dist

        self.torch, self.found, self.fields, self.mesh, self.world = torch, found, fields, mesh, world
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
        self.rank = rank

    @cache  # noqa: B019 (one object per process)
    def device_mesh(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        names = {"hsdp": ("replicate", "shard"), "fsdp-tp": ("dp", "tp")}.get(self.mesh, ("all",))
        half = {"hsdp": (2, self.world // 2), "fsdp-tp": (self.world // 2, 2)}
        return init_device_mesh("cpu", half.get(self.mesh, (self.world,)), mesh_dim_names=names)

    def model(self, params: Named) -> Any:
        """Return a model on this mesh, the module to call, and a trace with the places of its parts.

        The module returns a loss with the gradients that it is given.
        """
        torch = self.torch
        dtype = getattr(torch, self.run_dtype)
        model: Any = torch.nn.Module()
        layers = [name.removesuffix(".weight") for name in params if name.endswith(".weight")]
        for name in layers:
            rows, columns = params[f"{name}.weight"].shape
            model.add_module(name, torch.nn.Linear(columns, rows, f"{name}.bias" in params, dtype=dtype))
        with torch.no_grad():
            for _, p in model.named_parameters():
                p.copy_(torch.arange(p.numel(), dtype=dtype).reshape(p.shape))

        def forward(wanted: Named) -> Any:
            total = torch.zeros((), dtype=dtype)
            for name in layers:
                if (w := wanted.get(f"{name}.weight")) is None:
                    continue
                rows, columns = w.shape
                bias = wanted.get(f"{name}.bias", np.zeros(rows)) - w.sum(1)
                seed = torch.tensor(np.concatenate([w.T, bias[None]]), dtype=dtype)
                ones = torch.cat([torch.eye(columns, dtype=dtype), torch.zeros(1, columns, dtype=dtype)])
                total = total + (getattr(model, name)(ones) * seed).sum()
            return total

        model.forward = forward
        outer = self._spread(model, layers)
        named = dict(model.named_parameters())
        trace = Trace({name: self._part(p).astype(int) for name, p in named.items()})
        with torch.no_grad():
            for name, p in named.items():
                local = p.to_local() if hasattr(p, "to_local") else p
                local.copy_(torch.tensor(params[name].ravel()[trace.index[name]], dtype=dtype))
        return model, outer, trace

    def _spread(self, model: Any, layers: list[str]) -> Any:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        if self.mesh in ("tp", "fsdp-tp"):
            mesh = self.device_mesh() if self.mesh == "tp" else self.device_mesh()["tp"]
            styles = (ColwiseParallel, RowwiseParallel)
            plan: Any = {
                name: styles[i % 2](input_layouts=Replicate(), output_layouts=Replicate())
                for i, name in enumerate(layers)
            }
            parallelize_module(model, mesh, plan)
        if self.mesh == "ddp":
            return self.torch.nn.parallel.DistributedDataParallel(model)
        if self.mesh in ("fsdp", "hsdp", "fsdp-tp"):
            fully_shard(model, mesh=self.device_mesh()["dp"] if self.mesh == "fsdp-tp" else self.device_mesh())
        return model

    def _part(self, p: Any) -> np.ndarray:
        local = p.detach().to_local() if hasattr(p, "to_local") else p.detach()
        return local.double().cpu().numpy().copy()

    def _parts(self, model: Any) -> Named:
        return {name: self._part(p) for name, p in model.named_parameters()}

    def optimizer(self, model: Any, fields: Mapping[str, Any]) -> Any:
        """Return the target's optimizer for the model."""
        if registry.made_by(self.found):
            from precond_ref_torch import Optimizer

            method = self.found(**{**self.fields, **fields})
            decay = {} if method.decays else {"weight_decay": LOUD["weight_decay"]}
            return Optimizer(model.named_parameters(), method, lr=LOUD["lr"], **decay)
        first = next(iter(subjects._signature(self.found)))
        given = _given(self.found, {**self.fields, **fields}, first=True)
        return self.found(model if first == "model" else list(model.parameters()), **given)

    def share(self, whole: Named, salt: int) -> Named:
        """Return this rank's gradients. Their mean over the ranks that have other data is exactly ``whole``."""
        ranks, mine = self.world, self.rank
        if self.mesh in ("tp", "one"):
            return whole
        if self.mesh == "fsdp-tp":
            ranks, mine = self.world // 2, self.rank // 2
        return shares(whole, ranks, salt)[mine]

    def run(self, job: Job, at: Any) -> list[Trace]:
        torch = self.torch
        torch.manual_seed(0)
        self.run_dtype = job.dtype
        model, outer, trace = self.model(job.params)
        optimizer = self.optimizer(model, job.fields)
        for t, micros in enumerate(job.before):
            self._step(model, outer, optimizer, micros, t, "")
        if job.before:
            optimizer = self._spoil(model, optimizer, job)
        if job.load:
            at("loading")
            self._checkpoint(model, outer, optimizer, job.load, load=True)
            trace.loaded = self._dtypes(model, optimizer)
        trace.values.append(self._parts(model))
        for t, micros in enumerate(job.grads):
            at(f"step {t + 1}")
            self._step(model, outer, optimizer, micros, t, job.each if t == len(job.grads) - 1 else "")
            trace.values.append(self._parts(model))
        state = getattr(optimizer, "state", {})
        trace.keys = sorted({str(k) for s in state.values() if isinstance(s, Mapping) for k in s})
        if job.save:
            at("saving")
            trace.saved = self._dtypes(model, optimizer)
            self._checkpoint(model, outer, optimizer, job.save, load=False)
        return [trace]

    def _step(self, model: Any, outer: Any, optimizer: Any, micros: Sequence[Named], t: int, each: str) -> None:
        """Step after some micro-batches. Every second step exchanges gradients only after the last of them."""
        for k, wanted in enumerate(micros):
            last = k == len(micros) - 1
            sync = last or t % 2 == 0
            waits: Any = contextlib.nullcontext()
            if self.mesh in ("fsdp", "hsdp", "fsdp-tp"):
                model.set_requires_gradient_sync(sync)
            elif self.mesh == "ddp" and not sync:
                waits = outer.no_sync()
            with waits:
                outer(self.share(wanted, 97 * t + k)).backward()
            if each and not last:
                optimizer.step()
                if each == "alone":
                    optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()

    def _spoil(self, model: Any, optimizer: Any, job: Job) -> Any:
        """Lose the whole state ("new"), a key of it ("key"), its tensors, its numbers, or its precision ("cast")."""
        what, which = job.spoil
        if what == "new":
            return self.optimizer(model, job.fields)
        for entry in (s for s in optimizer.state.values() if isinstance(s, dict)):
            for key, value in entry.items():
                number = not isinstance(value, self.torch.Tensor) or value.ndim == 0
                if what == "cast":
                    if not number and value.is_floating_point():
                        value.copy_(value.to(getattr(self.torch, which)))
                elif (what == "key" and key == which) or what == ("numbers" if number else "tensors"):
                    if isinstance(value, self.torch.Tensor):
                        value.zero_()
                    elif isinstance(value, (int, float)):
                        entry[key] = type(value)(0)
        return optimizer

    def _dtypes(self, model: Any, optimizer: Any) -> dict[str, str]:
        found = {}
        for name, p in model.named_parameters():
            entry = optimizer.state.get(p, {})
            for key, value in entry.items() if isinstance(entry, Mapping) else ():
                if isinstance(value, self.torch.Tensor) and value.numel() > 1:
                    found[f"{name}: {key}"] = str(value.dtype).removeprefix("torch.")
        return found

    def _checkpoint(self, model: Any, outer: Any, optimizer: Any, folder: str, *, load: bool) -> None:
        from torch.distributed.checkpoint import state_dict as api
        from torch.distributed.checkpoint.state_dict_loader import load as read
        from torch.distributed.checkpoint.state_dict_saver import save as write

        state: dict[str, Any] = {
            "model": api.get_model_state_dict(outer),
            "optimizer": api.get_optimizer_state_dict(outer, optimizer),
        }
        if not load:
            write(state, checkpoint_id=folder)
            return
        read(state, checkpoint_id=folder)
        api.set_model_state_dict(outer, state["model"])
        api.set_optimizer_state_dict(outer, optimizer, state["optimizer"])


def shares(whole: Named, ranks: int, salt: int) -> list[Named]:
    """Return gradients of each rank, with mean ``whole``; they differ from it by multiples of 1/64."""
    random = np.random.default_rng(salt)
    parts: list[Named] = [{} for _ in range(ranks)]
    for name, value in whole.items():
        own = random.integers(-64, 65, (ranks, *value.shape)) / 64.0
        own[-1] = -own[:-1].sum(0)
        for part, more in zip(parts, own, strict=True):
            part[name] = value + more
    return parts


class _Jax:
    """Devices of JAX, all in one process; a run gives a trace for each."""

    def __init__(self, found: Any, fields: Mapping[str, Any], rank: int, world: int, mesh: str, folder: Path):
        import jax

        self.jax, self.found, self.fields, self.world, self.mesh = jax, found, fields, world, mesh

    def run(self, job: Job, at: Any) -> list[Trace]:
        jax = self.jax
        jax.config.update("jax_enable_x64", job.dtype == "float64")
        devices = jax.devices()[: self.world]
        axes = (2, self.world // 2) if self.mesh == "hsdp" else (self.world,)
        mesh = jax.sharding.Mesh(np.array(devices).reshape(axes), ("replicate", "shard")[2 - len(axes) :])
        with jax.set_mesh(mesh):
            return self._run(job, at, devices, mesh)

    def _run(self, job: Job, at: Any, devices: list[Any], mesh: Any) -> list[Trace]:
        jax = self.jax
        init, update = self.compiled(repr(dict(job.fields)))
        place = {name: self._sharding(mesh, value, i) for i, (name, value) in enumerate(job.params.items())}

        def put(values: Named) -> Any:
            return {name: jax.device_put(np.asarray(value, job.dtype), place[name]) for name, value in values.items()}

        params = put(job.params)
        numbers = {name: np.arange(value.size).reshape(value.shape) for name, value in job.params.items()}
        traces = [Trace({}) for _ in devices]
        for name in params:
            for device, shard in self._shards(params[name], devices):
                traces[device].index[name] = numbers[name][shard.index]
        state = init(params)
        if job.load:
            saved = pickle.loads(Path(job.load, "state").read_bytes())
            params = put(saved["params"])
            everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

            def laid(new: Any, old: Any) -> Any:
                known = len(new.sharding.device_set) == self.world
                return jax.device_put(old, new.sharding if known else everywhere)

            state = jax.tree.map(laid, state, saved["state"])

        def record() -> None:
            for trace in traces:
                trace.values.append({})
            for name in params:
                for device, shard in self._shards(params[name], devices):
                    traces[device].values[-1][name] = np.array(shard.data, np.float64)

        record()
        for t, parts in enumerate(job.grads):
            at(f"step {t + 1}")
            for wanted in parts:
                params, state = update(put(wanted), state, params)
                params = {name: jax.device_put(p, place[name]) for name, p in params.items()}
            record()
        if job.save:
            Path(job.save).mkdir(parents=True, exist_ok=True)
            host = jax.device_get({"params": params, "state": state})
            Path(job.save, "state").write_bytes(pickle.dumps(host))
        return traces

    @cache  # noqa: B019 (one object per process)
    def compiled(self, key: str) -> tuple[Any, Any]:
        """Return ``init`` and a step with the update applied, compiled once for all jobs."""
        import optax

        transformation = self.found(**_given(self.found, {**self.fields, **ast.literal_eval(key)}, first=False))
        if not all(hasattr(transformation, name) for name in ("init", "update")):
            raise TypeError(f"a target of --world must return an optax transformation, got {transformation!r}")

        def step(grads: Any, state: Any, params: Any) -> Any:
            updates, state = transformation.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return self.jax.jit(transformation.init), self.jax.jit(step)

    def _sharding(self, mesh: Any, value: np.ndarray, i: int) -> Any:
        """Return the sharding along the first axis that can be cut evenly; along the last for "tp" and odd ``i``."""
        size = mesh.shape["shard"]
        axes = [*range(value.ndim)]
        if self.mesh == "tp" and i % 2:
            axes.reverse()
        axis = next((a for a in axes if value.shape[a] % size == 0), None)
        names = ["shard" if a == axis else None for a in range(value.ndim)]
        sharding: Any = self.jax.sharding
        return sharding.NamedSharding(mesh, sharding.PartitionSpec(*names))

    def _shards(self, array: Any, devices: list[Any]) -> Iterator[tuple[int, Any]]:
        for shard in array.addressable_shards:
            yield devices.index(shard.device), shard
