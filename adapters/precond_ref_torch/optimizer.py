"""`Optimizer`, a `torch.optim.Optimizer` that runs a method of `precond_ref`, and a subclass of it per method."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import lru_cache
from itertools import groupby, zip_longest
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from precond_ref import Adam, Method
from precond_ref.cost.movement import Parcel, work
from precond_ref.fields import nearest
from precond_ref.protocol import class_hint
from precond_ref.registry import class_of
from precond_ref_torch import distributed as sharding
from precond_ref_torch import states
from precond_ref_torch.buckets import (
    WHOLE,
    Bucket,
    Pairs,
    Piece,
    Unit,
    check_engine,
    in_tensor,
    in_tensors,
    joined,
    partition,
    shape_of,
    write,
)
from precond_ref_torch.interrupts import interrupts_deferred
from precond_ref_torch.passes import Marks, Task

LARGEST_BUFFER = {"cpu": 2**19, "other": 2**22}
"""Entries in one flat buffer of several parameters, by device."""
LARGEST_MEMBER = {"cpu": 2**16, "other": 2**19}
"""Entries of the largest parameter in a flat buffer. A larger one stays in place: a copy costs more than a call."""
OPTIONS = (
    "lr", "weight_decay", "maximize", "fallback", "compile", "engine", "join", "method", "params", "param_names",
)  # fmt: skip
FLAGS = {
    "foreach": "parameters are always updated together, there is nothing to switch on",
    "fused": "give compile=True instead",
    "capturable": "the counters stay on the CPU; give compile=True for speed",
    "differentiable": "differentiate through the pure functions of precond_ref.Optimizer instead",
}
"""Arguments of PyTorch's optimizers that may be False or None, each with the advice for True."""
ENTRIES = itemgetter("lr", "weight_decay", "maximize", "compile", "engine", "join", "fallback", "method")
LAYOUT = attrgetter("shape", "dtype", "device")
GRAD_LAYOUT = attrgetter("grad.layout")
COUNTER = (torch.Size(), torch.int64, torch.device("cpu"))


Seen = list[tuple[str, bool, dict[str, str]]]
"""What the ranks of a mesh compare: name of a parameter, True if it has the thing in question, and more in words."""


class Plan(NamedTuple):
    """The buckets of a group, and the entries that they were made for."""

    key: Any
    entries: tuple[Any, ...]
    active: list[Any]
    layout: list[Any]
    buckets: list[Bucket]
    words: dict[Any, str]
    """What the ranks of each mesh must agree on."""


class Optimizer(torch.optim.Optimizer):
    """Run ``method`` (any `precond_ref.Method`) on parameters: ``x <- (1 - lr weight_decay) x - lr direction``.

    The classes ``precond_ref_torch.ASGO``, ``AGD``, ... take the method's fields as arguments instead.

    Arguments:
        params: tensors, named tensors, or parameter groups. A group may override every argument below except
            ``params``, every field of its method, and the method itself by an entry ``"method"``.
        method: for all parameters that it takes. As an entry of a group also a name that ``precond-ref list`` prints:
            that method with its own defaults, so far as the group does not give its fields.
        lr: learning rate, a number or a tensor with one element (read as a number at every step).
        weight_decay: decoupled decay; for a method with a field of this name, that field.
        maximize: climb instead of descend.
        fallback: method for the parameters of a group that its own does not take; None refuses them.
        compile: run the updates through `torch.compile`; a string names its backend. One graph per method and shape
            (two if the method renews something only every few updates).
        engine: "torch", or "cupy" to compute on CuPy, sharing memory through DLPack (CUDA only).
        join: pairs of names (weight, bias): each weight (O, I) and bias (O,) is one parameter (O, I + 1) for a method
            that is not elementwise, called like the weight, whose entry of ``state`` holds the state of both. The
            parameters must be named, and both in one group.
        owner: "mesh" for one rank of a mesh that updates a matrix, "replica" for one in each replica (HSDP), which
            repeats the work and sends nothing from replica to replica.
        flags: ``foreach``, ``fused``, ``capturable`` and ``differentiable`` as False or None, for code that gives them.

    Parameters below float32 have their statistics and arithmetic in float32, and are rounded once per step.
    Raises ValueError or TypeError for arguments, and RuntimeError for sparse gradients, before anything changes.
    """

    def __init__(
        self,
        params: Any,
        method: Method,
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float | None = None,
        maximize: bool = False,
        fallback: Method | None = Adam(),  # noqa: B008 (immutable)
        compile: bool | str = False,
        engine: str = "torch",
        join: Any = (),
        owner: str = "mesh",
        **flags: Any,
    ) -> None:
        if owner not in ("mesh", "replica"):
            raise ValueError(f"Invalid owner: {owner!r} (it must be 'mesh' or 'replica')")
        if unknown := flags.keys() - FLAGS.keys():
            raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {min(unknown)!r}")
        _check_flags(flags)
        if not isinstance(method, Method):
            raise TypeError(f"method must be a precond_ref.Method, got {method!r}{class_hint(method)}")
        encoded = states.encode(method)
        _check_names(encoded["method"])
        if weight_decay is None:
            weight_decay = encoded.get("weight_decay", 0.0)
        elif encoded.get("weight_decay", weight_decay) != weight_decay:
            raise ValueError(
                f"weight_decay must be the method's, {encoded['weight_decay']}, or not be given, got {weight_decay}"
            )
        self._reset()
        self._begin(owner == "replica")
        _check_rates({"lr": lr, "weight_decay": weight_decay})
        defaults = {
            **encoded,
            "lr": lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "fallback": fallback,
            "compile": compile,
            "engine": engine,
            "join": _pairs(join),
        }
        super().__init__(params, defaults)
        self.defaults["fallback"] = _plain(fallback)
        missing = set(defaults["join"]) - {pair for group in self.param_groups for pair in group["join"]}
        if missing:
            raise ValueError(f"join names {_listed(missing)}, which are no named parameters")

    def _reset(self) -> None:
        self._plans: dict[int, Plan] = {}
        self._meshes: list[Any] | None = None
        """The meshes of the parameters; None until they are asked for."""
        self._kernels: dict[Any, Any] = {}
        self._warned = False
        self._runs: list[BucketStep] = []
        self._lent: set[Any] = set()
        self._names: dict[Any, set[str]] = {}
        """Names of the tensors that the last buckets keep in the entry of each parameter."""
        self._made: list[tuple[Any, set[str], dict[str, Any]]] = []
        """What this step has done to entries before it began: parameter, names that are new, tensors removed."""

    def _begin(self, apart: bool) -> None:
        self._apart = apart
        """True if each replica has owners of its own."""
        self._owners: dict[Any, int] = {}
        self._teams: dict[Any, sharding.Team] = {}
        self._circle: sharding.Circle | None = None

    def __getstate__(self) -> dict[str, Any]:
        self._release()
        owners = [[self._owners.get(param) for param in group["params"]] for group in self.param_groups]
        return {**super().__getstate__(), "owners": owners, "apart": self._apart}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        apart, owners = state.pop("apart", False), state.pop("owners", None)
        super().__setstate__(state)
        self._reset()
        if not hasattr(self, "_owners"):  # a copy; while loading, the owners stay
            self._begin(apart)
            for group, ranks in zip(self.param_groups, owners or (), strict=False):
                pairs = zip(group["params"], ranks, strict=True)
                self._owners.update({param: rank for param, rank in pairs if rank is not None})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may name its own method and any hyperparameter; a refused one changes nothing."""
        if not isinstance(param_group, dict):
            super().add_param_group(param_group)
            return
        self._meshes = None
        group = _with_method(param_group, self.defaults["method"])
        own = states.field_names(group.get("method", self.defaults["method"]))
        super().add_param_group(group)
        try:
            for name in states.field_names(self.defaults["method"]):
                if name not in own and name != "weight_decay":
                    del group[name]
            group["fallback"] = _plain(group["fallback"])
            group["join"] = _own_pairs(group, strict="join" in param_group)
            self._check(group)
            for _ in self._routed(group):
                pass
            self._check_meshes(group)
        except BaseException:
            self.param_groups.pop()
            raise

    def _check(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError or TypeError for hyperparameters or parameters that do not fit."""
        _check_rates(group)
        _check_flags(group)
        if not isinstance(group["maximize"], bool):
            raise TypeError(f"Invalid maximize value: {group['maximize']} (it must be True or False)")
        backend = group["compile"]
        if not isinstance(backend, (bool, str)):
            raise TypeError(f"Invalid compile value: {backend} (it must be True, False or a backend's name)")
        if isinstance(backend, str) and backend not in torch.compiler.list_backends(exclude_tags=()):
            raise ValueError(f"Invalid compile value: {backend} (torch.compiler.list_backends names the backends)")
        states.decode(group)
        if group["fallback"] is not None:
            states.decode(group["fallback"])
        name = type(self).__name__
        for param in group["params"]:
            if param.is_complex():
                raise TypeError(f"{name} does not support complex parameters (optimize torch.view_as_real of it)")
            if not param.is_floating_point():
                raise TypeError(f"{name} only supports floating-point parameters, got one of dtype {param.dtype}")
            check_engine(group["engine"], group["compile"], param.device)

    def _check_meshes(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError for a parameter on ranks that would have to hear of refusals from now on."""
        if self._circle is None:
            return
        for label, param in _labelled(len(self.param_groups) - 1, group):
            ranks = sharding.place_of(param.device_mesh)[0] if sharding.is_sharded(param) else ()
            if beyond := sorted(set(ranks).difference(self._circle.ranks)):
                raise ValueError(
                    f"parameter {label} lies on ranks {', '.join(map(str, beyond))} too, which no other parameter has "
                    "linked to this rank: make a new optimizer for all parameters"
                )

    def _routed(self, group: Mapping[str, Any]) -> Iterator[tuple[str, Unit, Method]]:
        """Yield the group's units, each with its name and method; ValueError for a unit that no method takes."""
        pairs, params = dict(group["join"]), {}
        if pairs:
            params = dict(_named(group))
        biases = set(pairs.values())
        for name, param in _named(group):
            if name in pairs:
                unit = (param, params[pairs[name]])
                method = self._route(group, name, shape_of(unit), param.dtype)
                if method.elementwise:  # the same numbers
                    yield name, unit[:1], method
                    yield pairs[name], unit[1:], method
                else:
                    yield name, unit, method
            elif name not in biases or not name:
                yield name, (param,), self._route(group, name, tuple(param.shape), param.dtype)

    def _route(self, group: Mapping[str, Any], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Method:
        """Return the method of one unit; ValueError if no method takes it."""
        method = _method(group)
        chosen = method.for_shape(shape, name)
        if chosen is None:
            if group["fallback"] is None:
                raise ValueError(
                    f"{group['method']} does not take a parameter of size {list(shape)}"
                    f"{f' ({name})' if name else ''}: give `fallback` a method for it, or its group a `method`"
                )
            chosen = _method(group["fallback"])
        states.template(chosen, shape, states.work_dtype(chosen, dtype))
        return chosen

    # ---- several processes ------------------------------------------------------------------------------------------

    def _owner(self, param: Any) -> int:
        """Return the rank of the mesh that updates a sharded matrix; all that have none get theirs together."""
        if param not in self._owners:
            units = [
                (unit, name or f"{index}.{position:06d}", work(method, shape_of(unit)))
                for index, group in enumerate(self.param_groups)
                for position, (name, unit, method) in enumerate(self._routed(group))
                if sharding.is_sharded(unit[0]) and not method.elementwise
            ]
            self._owners.update(sharding.owners(units, self._owners, self._apart))
        return self._owners[param]

    def _owns(self, unit: Unit) -> bool:
        return sharding.owns(unit, self._owner(unit[0]), self._apart)

    def _team(self, mesh: Any) -> sharding.Team:
        if mesh not in self._teams:
            self._teams[mesh] = sharding.Team(mesh)
        return self._teams[mesh]

    def _all_teams(self) -> list[sharding.Team]:
        """Return a team for every mesh that has a parameter, in the order of their collectives."""
        if self._meshes is None:
            params = [param for group in self.param_groups for param in group["params"] if sharding.is_sharded(param)]
            self._meshes = sorted(dict.fromkeys(param.device_mesh for param in params), key=sharding.order_of)
        return [self._team(mesh) for mesh in self._meshes]

    def _everyone(self) -> sharding.Circle:
        if self._circle is None:
            self._circle = sharding.Circle(self._all_teams())
        return self._circle

    def _agree(
        self,
        refusal: Exception | None,
        seen: Callable[[Any], Seen],
        what: tuple[str, str] = ("step", "gradient"),
        words: Callable[[Any], str] | None = None,
        travels: bool = False,
    ) -> bool:
        """Raise what this rank refuses, or ValueError for what another refuses, or in what ranks of a mesh differ.

        ``seen`` gives what a mesh's ranks compare, ``words`` a shorter text of it; ``what`` names the call and what a
        parameter may lack. Return True if matrices travel (``travels``) on one of the ranks. It is a collective.
        """
        if teams := self._all_teams():
            texts, rows = {}, {}
            for team in teams:
                try:
                    texts[team.mesh] = words(team.mesh) if words else repr(seen(team.mesh))
                except Exception as error:  # the others wait for this rank's part
                    refusal, texts[team.mesh] = refusal or error, ""
            wrong, travels = self._everyone().ask(teams, refusal is not None, travels, texts.__getitem__)
            if wrong:
                if refusal is None:
                    rows = {sharding.place_of(team.mesh): seen(team.mesh) for team in teams}
                told = self._everyone().told(teams, (repr(refusal) if refusal else "", rows))
                refusal = refusal or ValueError(_difference(told, *what))
        if refusal is not None:
            raise refusal
        return travels

    def _hear(self, failure: tuple[Exception, Bucket] | None) -> None:
        """Raise the error of this rank's update, or RuntimeError for one of another rank (a collective)."""
        everyone, teams = self._everyone(), self._all_teams()
        if not everyone.ask(teams, failure is not None)[0]:
            return
        if failure is None:
            raise RuntimeError(next(filter(None, everyone.told(teams, "").values())))
        error, bucket = failure
        labels = {p: label for index, group in enumerate(self.param_groups) for label, p in _labelled(index, group)}
        names = ", ".join(labels[param] for param in bucket.params)
        text = f"the update of parameter {names} failed on rank {everyone.me}"
        everyone.told(teams, f"{text}: {error!r}")
        error.add_note(text)
        raise error

    def _words(self, mesh: Any) -> str:
        """Return in words all that the ranks of a mesh must agree on before anything moves.

        Buckets are no part of it: they are cut by the sizes of shards, which differ.
        """
        return repr(
            [
                (plan.words[mesh], float(group["lr"]), float(group["weight_decay"]), group["maximize"], steps)
                for group, plan in zip(
                    self.param_groups, map(self._plans.get, range(len(self.param_groups))), strict=True
                )
                if plan is not None and mesh in plan.words
                for mine in [[b for b in plan.buckets if b.sharded and b.params[0].device_mesh == mesh]]
                for steps in [sorted((place, b.now) for b in mine for place in b.places)]
            ]
        )

    def _seen(self, mesh: Any) -> Seen:
        """Return name, True for a gradient, step and the group's entries of each parameter of a mesh."""
        found = []
        for index, group in enumerate(self.param_groups):
            entries = {key: repr(value) for key, value in group.items() if key not in ("params", "param_names")}
            for label, param in _labelled(index, group):
                if sharding.is_sharded(param) and param.device_mesh == mesh:
                    step = _count(self.state.get(param, {}).get("step", 0))
                    found.append((label, param.grad is not None, {"step": repr(step), **entries}))
        return found

    def _kept(self, state: Mapping[Any, Any], groups: list[dict[str, Any]], mesh: Any) -> Seen:
        """Return name, True for a state, its step and the layout of each tensor, of each parameter of a mesh."""
        found = []
        for index, group in enumerate(groups):
            keys = {unit[0]: _expected(unit, method) for _, unit, method in self._routed(group)}
            for label, param in _labelled(index, group):
                if sharding.is_sharded(param) and param.device_mesh == mesh:
                    entry = state.get(param, {})
                    layouts = {k: sharding.words_of(entry[k]) for k in keys.get(param, ()) if k in entry}
                    found.append((label, "step" in entry, {"step": repr(_count(entry.get("step", 0))), **layouts}))
        return found

    # ---- the step ---------------------------------------------------------------------------------------------------

    def step(
        self, closure: Callable[[], Any] | None = None, *, statistics: Any = None, batch_size: float | None = None
    ) -> Any:
        """Update every parameter with a gradient once. Return the closure's loss, evaluated before the update.

        Arguments:
            closure: evaluates the loss and its gradients.
            statistics: the argument ``statistic`` of the method's ``update``, by parameter (by the weight for a joined
                pair), or a function that returns it, called after the closure.
            batch_size: from now on the value of this field of every method that has it.

        It is a collective if parameters are sharded among ranks. ValueError if the ranks differ in gradients, steps or
        hyperparameters, or another rank refuses the step; RuntimeError if the update of a matrix fails on another
        rank. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if callable(statistics):
            statistics = statistics()
        given = {} if statistics is None else statistics
        if torch.compiler.is_compiling():
            self._step_uncompiled(given, batch_size)
        else:
            with torch.no_grad():
                self._update(given, batch_size)
        return loss

    @_disable_dynamo
    def _step_uncompiled(self, statistics: Any, batch_size: float | None) -> None:
        """Update outside the caller's `torch.compile`, which would cut the update into dozens of graphs."""
        if not self._warned and not all(group["compile"] for group in self.param_groups):
            warnings.warn(
                f"torch.compile leaves {type(self).__name__}.step() as it is: give the optimizer compile=True for "
                "one graph per method and shape, or compile the model alone",
                stacklevel=3,
            )
            self._warned = True
        with torch.no_grad():
            self._update(statistics, batch_size)

    def _set_batch_size(self, batch_size: float | None) -> list[tuple[Any, Any]]:
        """Set ``batch_size`` in every group and fallback with this field. Return these, each with its old value."""
        if batch_size is None:
            return []
        found = [
            fields
            for group in self.param_groups
            for fields in (group, group["fallback"])
            if fields is not None and "batch_size" in states.field_names(fields["method"])
        ]
        if not found:
            raise ValueError(f"batch_size is no field of the methods of this optimizer, got {batch_size!r}")
        states.decode({**found[0], "batch_size": batch_size})
        before = [(fields, fields["batch_size"]) for fields in found]
        for fields in found:
            fields["batch_size"] = batch_size
        return before

    def _checked(self, statistics: Mapping[Any, Any]) -> tuple[list[tuple[Any, Bucket]], list[Any]]:
        """Check gradients and statistics. Return the buckets of each group, and their statistics."""
        if not isinstance(statistics, Mapping):
            raise TypeError(
                f"statistics must be a mapping from parameters, or a function that returns one, got "
                f"{type(statistics).__name__}"
            )
        active: list[list[Any]] = []
        layouts: set[torch.layout] = set()
        for group in self.param_groups:
            try:
                layouts.update(map(GRAD_LAYOUT, group["params"]))
                active.append(group["params"])
            except AttributeError:  # one has no gradient
                active.append([p for p in group["params"] if p.grad is not None])
                layouts.update(map(GRAD_LAYOUT, active[-1]))
        if layouts - {torch.strided}:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        self._check_entries()
        found = [
            (group, bucket)
            for index, group in enumerate(self.param_groups)
            for bucket in self._buckets(index, group, active[index])
        ]
        for param in [p for _, bucket in found if bucket.sharded for p in bucket.all_params]:
            if not sharding.is_sharded(param.grad):
                raise TypeError(
                    f"the gradient of a sharded parameter of size {list(param.shape)} must be a DTensor, got "
                    f"{type(param.grad).__name__}"
                )
        if not statistics:
            return found, [None] * len(found)
        given = [bucket.statistic(statistics) for _, bucket in found]
        unknown = statistics.keys() - {param for _, bucket in found for param in bucket.params}
        if unknown:
            raise ValueError(
                f"statistics has {len(unknown)} keys that are no parameter with a gradient, nor the weight of a joined "
                f"pair; one {_shown(next(iter(unknown)))}"
            )
        return found, given

    def _update(self, statistics: Mapping[Any, Any], batch_size: float | None) -> None:
        self._settle()  # what a second interruption left
        self._all_teams()  # their groups are made in one order on all ranks
        before: list[tuple[Any, Any]] = []
        found: list[tuple[Any, Bucket]] = []
        given: list[Any] = []
        refusal: Exception | None = None
        try:
            try:
                before = self._set_batch_size(batch_size)
                found, given = self._checked(statistics)
            except Exception as error:
                refusal = error
            moves = any(bucket.move is not None for _, bucket in found)
            travels = self._agree(refusal, self._seen, words=self._words, travels=moves)
            self._runs = [BucketStep(group, bucket, s) for (group, bucket), s in zip(found, given, strict=True)]
            numbers: dict[Any, Any] = {}
            flights = self._fly(numbers) if travels else []
            at_home = [run for run in self._runs if run.bucket.move is None]
            for in_place, some in groupby(at_home, attrgetter("in_place")):
                runs = list(some)
                with interrupts_deferred() if in_place else nullcontext():
                    for run in runs:
                        run.prepare(numbers, self._kernels)
                    for run in runs:  # nothing but this: what a large parameter drives out of the cache is slow
                        run.advance()
                    for run in runs:
                        run.count()
            for flight in flights:
                flight.finish()
            self._made.clear()  # first: while there are runs, they tell that all have stepped
            self._runs = []
        except BaseException as error:
            begun = bool(self._runs)
            stepped = self._settle()
            self._unmake(stepped)
            if begun:
                error.add_note(self._told(stepped))
            if not stepped:
                for fields, size in before:
                    fields["batch_size"] = size
            raise

    def _fly(self, numbers: dict[Any, Any]) -> list[Flight]:
        """Compute the directions of the matrices that travel, and return their flights back.

        Nothing is written yet: if an update fails on one rank, all raise, with all parameters as before the step.
        """
        moves = {run.bucket.move: run.bucket.params[0].device_mesh for run in self._runs if run.bucket.move is not None}
        ordered = sorted(moves, key=lambda move: sharding.order_of(moves[move]))
        flights = [Flight(move, [run for run in self._runs if run.bucket.move is move]) for move in ordered]
        failure: tuple[Exception, Bucket] | None = None
        for flight in flights[:1]:
            flight.send()
        for flight, *following in zip_longest(flights, flights[1:]):
            if following[0] is not None:  # on its way while this one is computed
                following[0].send()
            flight.receive()
            for run in flight.runs if failure is None else ():
                try:
                    run.prepare(numbers, self._kernels)
                    run.advance()
                except Exception as error:  # the others wait for this rank's part
                    failure = error, run.bucket
                    break
            flight.send_back()
        self._hear(failure)
        return flights

    def _settle(self) -> dict[Any, str]:
        """Complete each half-written piece after an exception. Return the outcome of every changed parameter."""
        result: dict[Any, str] = {}
        if self._runs:
            with interrupts_deferred():
                for run in self._runs:
                    result.update(run.settle())
                self._runs = []
        return result

    def _unmake(self, stepped: Mapping[Any, str]) -> None:
        """Give the entries of parameters that have not stepped the names that they had before the step."""
        if self._made:
            self._release()
        for param, new, removed in self._made:
            if param not in stepped:
                entry = self.state[param]
                for name in new:
                    entry.pop(name, None)
                entry.update(removed)
                self._names[param] = (self._names.get(param, set()) | removed.keys()) - new
                if not entry:
                    del self.state[param]
        self._made.clear()

    def _told(self, came_out: Mapping[Any, str]) -> str:
        """Return the message about the parameters of a step that an exception ended."""
        found: dict[str, list[str]] = {}
        for index, group in enumerate(self.param_groups):
            outcomes = [came_out.get(param, "as before the step") for param in group["params"]]
            for outcome in dict.fromkeys(outcomes):
                members = [position for position, o in enumerate(outcomes) if o == outcome]
                found.setdefault(outcome, []).append(f"{_ranges(members)} of group {index}")
        parts = [f"{outcome}: {', '.join(where)}" for outcome, where in found.items()]
        return (
            f"{type(self).__name__}.step() ended early. Its parameters, each with state and counter: {'; '.join(parts)}"
        )

    def _check_entries(self) -> None:
        """Raise ValueError or TypeError for entries of a group that were set since the last step and do not fit."""
        for index, group in enumerate(self.param_groups):
            try:
                entries = ENTRIES(group)
            except KeyError as error:
                raise ValueError(f"parameter group {index} has lost its entry {error}") from None
            old = self._plans.get(index)
            if old is not None and all(map(is_, entries[2:], old.entries[2:])):
                if isinstance(entries[0], Tensor) or not all(map(is_, entries[:2], old.entries[:2])):
                    _check_rates(group)
            else:
                group["fallback"] = _plain(group["fallback"])
                group["join"] = _own_pairs(group, strict=True)
                self._check(group)

    def _buckets(self, index: int, group: Mapping[str, Any], active: list[Any]) -> list[Bucket]:
        """Return the buckets of the group's parameters with a gradient; they are made anew after a change."""
        key = (_method(group), group["fallback"], group["join"])
        layout = list(map(LAYOUT, active))
        old = self._plans.get(index)
        if (
            old is not None
            and old.key == key
            and old.layout == layout
            and all(map(is_, old.active, active))
            and all(b.in_step() and b.holds(self.state) for b in old.buckets)
        ):
            if not all(map(is_, ENTRIES(group), old.entries)):
                self._plans[index] = old._replace(entries=ENTRIES(group))
            return old.buckets
        for bucket in old.buckets if old else ():
            bucket.release()
        device = active[0].device.type if active else "other"
        limits = (sizes.get(device, sizes["other"]) for sizes in (LARGEST_BUFFER, LARGEST_MEMBER))
        cut = partition(self._labels(group), *limits)
        buckets = []
        for members in cut:
            (method, flat, owner, mine), units = members[0][0], [unit for _, unit in members]
            for unit in units:  # what a method with other fields kept would be out of date if they came back
                entry, names = self.state[unit[0]], {*_expected(unit, method)}
                outdated = (self._names.get(unit[0], names) - names) & entry.keys()
                if removed := {name: entry.pop(name) for name in outdated}:
                    self._made.append((unit[0], set(), removed))
                self._names[unit[0]] = names
            params = [unit[0] for unit in units]
            lent = not self._lent.isdisjoint(params)
            buckets.append(Bucket(method, units, [self.state[param] for param in params], flat, owner, mine, lent))
            self._lent.difference_update(params)
        self._meshes = None
        words = self._movement(repr(key), buckets)
        self._plans[index] = Plan(key, ENTRIES(group), list(active), layout, buckets, words)
        return buckets

    def _movement(self, key: str, buckets: list[Bucket]) -> dict[Any, str]:
        """Give each bucket of sharded matrices its `Move`. Return what the ranks of each mesh must agree on."""
        together: dict[Any, list[Bucket]] = {}
        words: dict[Any, list[Any]] = {}
        places = self._places() if any(bucket.sharded for bucket in buckets) else {}
        for bucket in buckets:
            if bucket.sharded:
                mesh = bucket.params[0].device_mesh
                common = str(bucket.params[0].grad.dtype), bucket.owner
                bucket.places = [places[param][0] for param in bucket.all_params]
                found = [(*places[param], tuple(param.shape), *common) for param in bucket.all_params]
                words.setdefault(mesh, []).extend(found)
            if bucket.owner is not None:
                kind = (*bucket.kernel_key, mesh, bucket.params[0].grad.dtype, bucket.now)
                together.setdefault(kind, []).append(bucket)
        for some in together.values():
            parcels = [
                Parcel(tuple(param.shape), sharding.layout_of(param), *self._place(unit))
                for bucket in some
                for unit in bucket.units
                for param in unit
            ]
            move = sharding.Move(parcels, self._team(some[0].params[0].device_mesh))
            for bucket in some:
                bucket.move = move
        return {mesh: repr((key, sorted(found, key=itemgetter(0)))) for mesh, found in words.items()}

    def _places(self) -> dict[Any, tuple[int, str]]:
        """Return of each sharded parameter its number among those of its mesh in all groups, and its name."""
        counts: dict[Any, int] = {}
        result = {}
        for group in self.param_groups:
            for name, param in _named(group):
                if sharding.is_sharded(param):
                    number = counts.get(param.device_mesh, 0)
                    result[param], counts[param.device_mesh] = (number, name), number + 1
        return result

    def _labels(self, group: Mapping[str, Any]) -> Iterator[tuple[Any, int, Any]]:
        """Yield for each parameter with a gradient: the label that its bucket shares, its size, and itself."""
        for name, unit, method in self._routed(group):
            param = unit[0]
            if len({p.grad is None for p in unit}) > 1:
                raise RuntimeError(f"{name} is joined with its bias: both need a gradient, or none, one has None")
            if param.grad is None:
                continue
            flat = method.elementwise
            owner = None if flat or not sharding.is_sharded(param) else self._owner(param)
            for p in unit:
                if p.grad.shape != p.shape or p.grad.device != p.device:
                    raise ValueError(
                        f"{_called(name, p)} has a gradient of shape {list(p.grad.shape)} on {p.grad.device}: "
                        f"it must be like the parameter, on {p.device}"
                    )
            entry = self.state[param]
            mine = owner is None or self._owns(unit)
            if "step" not in entry:
                tensors = _fresh(method, unit, flat) if mine else _elsewhere(method, unit)
                arrays = {"step": torch.zeros((), dtype=torch.int64, device="cpu"), **tensors}
                self._made.append((param, {*arrays}, {name: entry[name] for name in arrays.keys() & entry.keys()}))
                entry.update(arrays)
            elif not isinstance(entry["step"], Tensor) or LAYOUT(entry["step"]) != COUNTER:
                step = _count(entry["step"])
                if step is None:
                    raise ValueError(f"the state of {_called(name, param)} has no valid step, got {entry['step']!r}")
                entry["step"] = torch.tensor(step, dtype=torch.int64, device="cpu")
            if mine:
                _check_entry(entry, unit, method, name)
            shape = None if flat else shape_of(unit)
            layout = (owner, mine, param.device_mesh, param.grad.dtype) if sharding.is_sharded(param) else None
            label = (method, param.dtype, param.device, shape, layout, states.count(entry["step"]))
            yield label, sharding.local(param).numel() if flat else 0, ((method, flat, owner, mine), unit)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`: tensors with memory of their own, which later steps do not change.

        It is a collective if parameters are sharded among ranks: the states of matrices are then sharded along the
        first axis. ValueError if one rank has a state that another of its mesh has not.
        """
        with torch.no_grad():
            self._settle()
            self._release()
            self._agree(None, lambda mesh: self._kept(self.state, self.param_groups, mesh), ("state dict", "state"))
            held, self.state = self.state, self._handed()
        try:
            return super().state_dict()
        finally:
            self.state = held

    def _release(self) -> None:
        """Give every parameter a state in memory of its own."""
        for plan in self._plans.values():
            for bucket in plan.buckets:
                bucket.release()
        self._plans.clear()

    def _handed(self) -> Any:
        """Return the state for code outside. The next step copies the tensors that are given out."""
        self._lent.update(self.state)
        state = copy.copy(self.state)
        state.update({key: copy.copy(entry) for key, entry in self.state.items()})
        owned: dict[Any, list[tuple[Any, str, Any, Unit]]] = {}
        for group in self.param_groups:
            for _, unit, method in self._routed(group):
                entry = state.get(unit[0], {})
                if "step" not in entry:
                    continue
                if sharding.is_sharded(unit[0]) and not method.elementwise:
                    for name, like in _expected(unit, method).items():
                        owned.setdefault(unit[0].device_mesh, []).append((entry, name, like, unit))
                for bias in unit[1:]:
                    state.setdefault(bias, {})  # tools look for one of each parameter
        for team in self._all_teams():
            items = owned.get(team.mesh, [])
            values = [(entry[name], like, *self._place(unit)) for entry, name, like, unit in items]
            for (entry, name, _, _), value in zip(items, sharding.dealt(values, team), strict=True):
                entry[name] = value
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a result of `state_dict`. Dtypes are kept, and tensors are copied to the parameters' devices.

        Raises ValueError for a state of another method, of other shapes, dtypes or groups, or a damaged one, and
        loads nothing then.
        Entries of wrappers in ``state`` stay. UserWarning for values that are not finite, and for
        parameters that have no state while others have one: they start afresh.
        It is a collective if parameters are sharded among ranks: a state that one rank refuses or lacks, all refuse.
        """
        groups: list[dict[str, Any]] = []
        loaded: dict[Any, Any] = {}
        others: dict[Any, Any] = {}
        refusal: Exception | None = None
        try:
            groups, loaded, others = self._read(state_dict)
        except Exception as error:
            refusal = error
        self._agree(refusal, lambda mesh: self._kept(loaded, groups, mesh), ("state dict", "state"))
        for team in self._all_teams():
            self._gather(loaded, groups, team)
        state = copy.copy(self.state)
        state.clear()
        state.update(loaded)
        state.update(others)
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _read(self, state_dict: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[Any, Any], dict[Any, Any]]:
        """Check a state dict. Return its groups, its states, and the entries of wrappers under other keys."""
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        keys = _checked_keys(state_dict)
        loaded: dict[Any, Any] = {}
        absent, infinite = [], []
        try:
            groups = self._merged_groups(copy.deepcopy(list(state_dict["param_groups"])))
            routes = [{unit[0]: (unit, method) for _, unit, method in self._routed(group)} for group in groups]
        except (TypeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"loaded state dict does not fit: {error}") from error
        flat = [key for own in keys for key in own]
        if len(set(flat)) < len(flat):
            raise ValueError(f"loaded state dict has a parameter twice in its groups, got {keys!r}")
        for group, routed, own in zip(groups, routes, keys, strict=True):
            for param, key in zip(group["params"], own, strict=True):
                entry = state_dict["state"].get(key)
                if entry and param not in routed:
                    raise ValueError(f"loaded state dict has a state of parameter {key}, which is joined to its weight")
                if entry:
                    loaded[param] = self._restored(entry, *routed[param], f"parameter {key}")
                    infinite += [f"{name} of {key}" for name, value in loaded[param].items() if not _finite(value)]
                if param in routed and param.requires_grad and "step" not in loaded.get(param, {}):
                    absent.append(str(key))
        others = {key: value for key, value in state_dict["state"].items() if key not in flat}
        named = any(isinstance(key, str) for key in flat)
        homeless = [key for key in others if named or not isinstance(key, str)]
        if homeless:
            raise ValueError(f"loaded state dict has a state of {', '.join(map(str, homeless))}, which is in no group")
        if infinite:
            warnings.warn(f"loaded state dict has values that are not finite: {', '.join(infinite)}", stacklevel=3)
        if absent and any("step" in entry for entry in loaded.values()):
            warnings.warn(
                f"loaded state dict has no state of parameters {', '.join(absent)}, which start afresh", stacklevel=3
            )
        return groups, loaded, copy.deepcopy(others)

    def _merged_groups(self, saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Check the saved groups. Return them with this optimizer's parameters."""
        if len(saved_groups) != len(self.param_groups):
            raise ValueError("loaded state dict has a different number of parameter groups")
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            if len(group["params"]) != len(saved["params"]):
                raise ValueError(
                    "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
                )
            other = saved.get("method", "another optimizer")
            if states.current(other) != group["method"]:
                raise ValueError(f"loaded state dict is of {other}, this group runs {group['method']}")
            saved["method"] = group["method"]
            fields = states.field_names(group["method"])
            for name in ("join", *states.empty_fields(group["method"])):
                saved.setdefault(name, ())  # tools that flatten a state dict lose what is empty, make lists of tuples
            saved.update({name: _tuples(saved[name]) for name in ("fallback", "join", *fields) if name in saved})
            missing = [name for name in (*OPTIONS[:-3], *fields) if name not in saved]
            if missing:
                raise ValueError(
                    f"loaded state dict is of another version of {group['method']}: it lacks {', '.join(missing)}"
                )
            saved["params"] = group["params"]
            if "param_names" in group:
                saved.setdefault("param_names", group["param_names"])
            names = saved.get("param_names", [""] * len(group["params"]))
            if not isinstance(names, (list, tuple)) or [type(name) for name in names] != [str] * len(group["params"]):
                raise ValueError(f"loaded state dict must have a name for each parameter, got param_names={names!r}")
            saved["join"], saved["fallback"] = _pairs(saved["join"]), _plain(saved["fallback"])
            if _positions(saved) != _positions(group):
                raise ValueError(
                    f"loaded state dict joins {_listed(saved['join']) or 'nothing'}, this group joins "
                    f"{_listed(group['join']) or 'nothing'}"
                )
            self._check(saved)
        return saved_groups

    def _restored(self, entry: Mapping[str, Any], unit: Unit, method: Method, label: str) -> dict[str, Any]:
        param, flat = unit[0], method.elementwise
        part = sharding.local(param)
        expected = _expected(unit, method)
        result = {key: _copied(v, part.device) for key, v in entry.items() if key not in ("step", *expected)}
        if "step" not in entry and len(result) == len(entry):  # only what a wrapper keeps
            return result
        saved = entry.get("step")
        unknown = isinstance(saved, Tensor) and not states.has_value(saved) and not states.has_value(part)
        step = 0 if unknown else _count(saved)
        if step is None:
            raise ValueError(f"loaded state dict has no valid step for {label}, got {saved!r}")
        result = {"step": torch.tensor(step, dtype=torch.int64, device="cpu"), **result}
        sharded = sharding.is_sharded(param)
        mine = flat or not sharded or self._owns(unit)
        if not mine and not any(map(sharding.is_sharded, entry.values())):
            return {**result, **_elsewhere(method, unit)}  # whatever the rank that saved this kept
        if not expected.keys() <= entry.keys():
            raise ValueError(
                f"loaded state dict has {', '.join(map(str, entry))} for {label}, "
                f"{method.name} keeps {', '.join(('step', *expected))}"
            )
        for key, like in expected.items():
            value = entry[key]
            dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested
            if not dense or states.has_value(part) > states.has_value(value):
                kind = f"{value.layout} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"loaded state dict has {key} for {label} as {kind}, it must be a dense tensor")
            moves = sharded and sharding.is_sharded(value)  # once all ranks are known to load it
            value = sharding.restored(value, param, like.shape) if flat and not moves else value
            shape = param.shape if flat and moves else like.shape
            if value.shape != shape or value.dtype != like.dtype:
                raise ValueError(
                    f"loaded state dict has {key} of shape {list(value.shape)} and dtype {value.dtype} for {label}, "
                    f"it must have shape {list(shape)} and dtype {like.dtype}"
                )
            result[key] = value.detach() if moves else _placed(sharding.whole(value.detach()), param, flat)
        return result

    def _gather(self, loaded: Mapping[Any, Any], groups: list[dict[str, Any]], team: sharding.Team) -> None:
        """Give each rank its parts of the states of a mesh, and owners the whole ones of matrices (a collective)."""
        items = []
        for unit, method in (found[1:] for group in groups for found in self._routed(group)):
            entry, flat = loaded.get(unit[0], {}), method.elementwise
            if not sharding.is_sharded(unit[0]) or unit[0].device_mesh != team.mesh:
                continue
            for name in _expected(unit, method):
                value = entry.get(name)
                if not sharding.is_sharded(value):
                    continue
                if flat:
                    entry[name] = _placed(sharding.restored(value, unit[0], value.shape), unit[0], flat)
                elif value.device_mesh == team.mesh:
                    items.append((entry, name, value, *self._place(unit)))
                else:
                    full = sharding.whole(value)
                    entry[name] = full.to(unit[0].device, copy=True) if self._owns(unit) else full.new_empty(0)
        wholes = sharding.gathered([item[2:] for item in items], team)
        for (entry, name, value, *_), gathered in zip(items, wholes, strict=True):
            entry[name] = sharding.local(value).new_empty(0) if gathered is None else gathered

    def _place(self, unit: Unit) -> tuple[int, tuple[int, ...]]:
        """Return the (first) owner of a sharded matrix, and the axes of its mesh along which there are several."""
        return self._owner(unit[0]), sharding.free_axes(unit, self._apart)

    # ---- inspection -------------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """Return a table of the parameters: group, role (from `param_groups_for`), name, shape, method, rates.

        Below the table stand the methods with their fields, each with the groups that run it.
        """
        used: dict[str, dict[int, None]] = {}
        rows = [("group", "role", "parameter", "shape", "dtype", "method", "lr", "weight_decay")]
        for index, group in enumerate(self.param_groups):
            for position, (name, unit, method) in enumerate(self._routed(group)):
                shape = " x ".join(map(str, shape_of(unit))) or "scalar"
                dtype = str(unit[0].dtype).removeprefix("torch.")
                label = name if len(unit) == 1 else f"{name} + {dict(group['join'])[name].rpartition('.')[2]}"
                rates = f"{float(group['lr']):g}", f"{group['weight_decay']:g}"
                cells = (str(index), group.get("role", ""), label or str(position), shape, dtype)
                rows.append((*cells, method.name, *rates))
                used.setdefault(repr(method), {})[index] = None
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        fields = [f"group{'s'[: len(on) - 1]} {', '.join(map(str, on))}: {method}" for method, on in used.items()]
        return "\n".join([*lines, "", *fields])


class BucketStep:
    """One step of one bucket: the states and parameters of a piece change together, once all of it is computed.

    After an exception at any place, `settle` leaves each unit stepped and counted, or as before the step.
    """

    def __init__(self, group: Mapping[str, Any], bucket: Bucket, statistic: Any) -> None:
        self.group, self.bucket, self.statistic = group, bucket, statistic
        self.grads, self.params = bucket.gather() if bucket.owner is None else ([], [])
        self.step = bucket.now
        self.pieces = bucket.cut(group, statistic)
        self.computed: tuple[list[Tensor], Pairs] = [], []
        """Directions and states of an owner, until the directions are exchanged."""
        self.done: tuple[int, tuple[Pairs, list[Tensor], list[Tensor]] | None] = 0, None
        """Number of pieces written, and the part of the next one that is being written."""
        self.marks = Marks()
        self.in_place = bool(group["compile"]) and bucket.method.elementwise
        """True if a compiled update writes by itself."""
        self.in_graph = False
        """True while the compiled update writes."""
        self.lone: Any = None
        """The graph that moves the only parameter, with its arguments."""

    def _numbers(self, found: dict[Any, Any]) -> Any:
        """Return the values of the step alone: the method's numbers, and parts of a `Task`; ``found`` keeps them."""
        group, bucket = self.group, self.bucket
        key = id(group), id(bucket.method), self.step, bucket.dtype, bucket.device
        if key not in found:
            like = torch.empty((), dtype=bucket.dtype, device=bucket.device)  # for fields that are tensors
            scalars, rates = bucket.method.scalars(self.step + 1, like=like), []
            if self.in_place:
                scalars = in_tensors(scalars, bucket.dtype)
                decay = 0.0 if bucket.method.decays else float(group["weight_decay"])
                wide = torch.promote_types(bucket.dtype, torch.float32)
                given = (float(group["lr"]), decay) if decay else (float(group["lr"]),)
                rates = [in_tensor(rate, wide) for rate in given]
            found[key] = scalars, (scalars, tuple(rates), group["maximize"], bucket.method.due(self.step))
        return found[key]

    def prepare(self, found: dict[Any, Any], kernels: dict[Any, Any]) -> None:
        """Prepare the arguments of the update. ``found`` keeps the values that the buckets of a step share."""
        scalars, common = self._numbers(found)
        self.given = self.grads, self.params, self.step, scalars, self.group, kernels, self.statistic, self.marks
        if self.in_place:
            graph = self.bucket.graph(self.group["compile"], kernels)
            self.common: Any = graph, *common, {} if self.statistic is None else {"statistic": self.statistic}
            self.lone = self.bucket.lone(self.grads, self.common)

    def advance(self) -> None:
        """Compute and write piece after piece; compute all, if the directions are to be exchanged."""
        if self.in_place:
            self._compute()
        elif self.bucket.owner is None:
            self._write(self.pieces)
        else:
            if self.bucket.mine:
                for _, some, pairs in self.bucket.directions(*self.given, self.pieces):
                    self.computed[0].extend(some)
                    self.computed[1].extend(pairs)
            self.pieces = [WHOLE]

    def _compute(self) -> None:
        """Run the compiled update. It moves a lone parameter; for several it gives directions."""
        self.in_graph = True
        if self.lone is not None:
            graph, arguments = self.lone
            graph(*arguments)
            self.done = 1, None
        else:
            grad, param, directions = self.bucket.gathered(self.grads, self.params, self.given[5])
            graph, *common = self.common
            graph, arguments = graph.ready(Task(grad, self.bucket.arrays, param, False, *common))
            graph(*arguments)
            self._commit(WHOLE, directions, [])
        self.in_graph = False

    def count(self) -> None:
        """Count the step, unless directions are still to be exchanged."""
        if self.bucket.owner is None:
            self.bucket.count(len(self.bucket), self.step + 1)

    def finish(self, parts: list[Tensor]) -> None:
        """Write what the owner computed, of which this rank has these parts."""
        self._commit(WHOLE, parts, self.computed[1])
        self.bucket.count(len(self.bucket), self.step + 1)

    def settle(self) -> dict[Any, str]:
        """Complete a half-written piece, and the unit that it is part of. Return the outcome of each parameter."""
        bucket, (done, change) = self.bucket, self.done
        if change is not None:
            pairs, params, directions = change
            write(pairs)
            if states.has_value(params[-1]) and params[-1]:  # moved, as all before it
                torch.autograd.graph.increment_version(params[:-1])
            else:
                _apply(self.group, bucket, params, directions)
            done += 1
            self.done = done, None
        begun = done + any(map(self.marks.begun, self.pieces[done : done + 1]))
        if begun == 0:
            unknown = "of unknown state and value (those of a compiled graph; load a checkpoint)"
            return dict.fromkeys(bucket.all_params, unknown) if self.in_graph else {}
        last = self.pieces[begun - 1].members
        units = bucket.units[: last.stop]
        result = {param: "stepped" for unit in units for param in unit}
        try:
            self._write([piece for piece in self.pieces[done:] if piece.members == last])
        except Exception as error:
            half = f"half stepped, as {type(error).__name__} came again (load a checkpoint)"
            result |= {param: half for unit in units[last] for param in unit}
            del units[last]
        bucket.count(len(units), self.step + 1)
        return result

    def _write(self, pieces: list[Piece]) -> None:
        for piece, directions, pairs in self.bucket.directions(*self.given, pieces):
            self._commit(piece, self.bucket.parts(directions, piece.members), pairs)

    def _commit(self, piece: Piece, directions: list[Tensor], pairs: Pairs) -> None:
        bucket, done = self.bucket, self.done[0]
        params = bucket.values(piece)
        # the kernel that moves the parameters moves this too
        change = pairs, [*params, bucket.zero()], [*directions, bucket.one]
        self.done = done, change  # from here on it is completed, whatever is raised
        write(pairs)
        _apply(self.group, bucket, *change[1:])
        self.done = done + 1, None
        pairs.clear()


class Flight:
    """Matrices that travel together: their gradients to the owners, and the directions back."""

    def __init__(self, move: sharding.Move, runs: list[BucketStep]) -> None:
        self.move, self.runs = move, runs

    def send(self) -> None:
        """Send this rank's parts of gradients, and of parameters if the method reads them."""
        params = [param for run in self.runs for param in run.bucket.all_params]
        parts = [[sharding.local(sharding.aligned_grad(param)) for param in params]]
        if self.runs[0].bucket.method.reads_param:
            parts.append([sharding.local(param).detach() for param in params])
        self.waits: list[Callable[[], Any]] = [self.move.out(some) for some in parts]

    def receive(self) -> None:
        """Give the runs of this rank's matrices what they need."""
        grads, *params = [iter(wait()) for wait in self.waits]
        for run in self.runs:
            for run_values, arrived in zip((run.grads, run.params), (grads, *params), strict=False):
                units = [[next(arrived) for _ in unit] for unit in run.bucket.units]
                run_values.extend(joined(unit) for unit in units if run.bucket.mine)

    def send_back(self) -> None:
        """Send each rank its parts of the directions that are computed here."""
        wholes: list[Tensor | None] = []
        bucket = self.runs[0].bucket
        like = torch.empty(0, dtype=bucket.dtype, device=bucket.device)
        for run in self.runs:
            bucket = run.bucket
            if not bucket.mine:
                wholes += [None] * len(bucket.all_params)
            elif len(run.computed[0]) == len(bucket):
                wholes += bucket.parts(run.computed[0])
            else:  # an update has failed, and nobody will write this
                wholes += [like.new_zeros(1).expand(param.shape) for param in bucket.all_params]
        self.arriving = self.move.back(wholes, like)

    def finish(self) -> None:
        """Write states and parameters."""
        parts = iter(self.arriving())
        for run in self.runs:
            run.finish([next(parts) for _ in run.bucket.all_params])


def _apply(group: Mapping[str, Any], bucket: Bucket, params: list[Tensor], directions: list[Tensor]) -> None:
    """Do ``x <- (1 - lr weight_decay) x - lr direction``, rounded once below float32; one call moves all or none."""
    lr = float(group["lr"])
    decay = 0.0 if bucket.method.decays else float(group["weight_decay"])
    wide = params if params[0].dtype == bucket.dtype else [p.to(bucket.dtype) for p in params]
    if bucket.device.type in ("cpu", "cuda") and all(map(Tensor.is_contiguous, [*wide, *directions])):
        # SGD's coupled decay of a direction is the decoupled one
        torch._fused_sgd_(
            wide, directions, [], weight_decay=decay, lr=lr, momentum=0.0, dampening=0.0, nesterov=False,
            maximize=False, is_first_step=False,
        )  # fmt: skip
        torch.autograd.graph.increment_version(wide)  # which the fused kernel leaves to its caller
    else:
        wide = list(torch._foreach_mul(wide, 1 - lr * decay))
        torch._foreach_add_(wide, directions, alpha=-lr)
    if wide is not params:
        torch._foreach_copy_(params, wide)


def _check_rates(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a learning rate or weight decay out of range."""
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    for key, label in (("lr", "learning rate"), ("weight_decay", "weight_decay value")):
        try:
            number = math.nan if isinstance(group[key], str) else float(group[key])
        except (TypeError, ValueError, RuntimeError, OverflowError):
            number = math.nan
        if not 0.0 <= number < math.inf:
            raise ValueError(f"Invalid {label}: {group[key]}")


def _check_flags(given: Mapping[str, Any]) -> None:
    """Raise ValueError for a flag of PyTorch's optimizers that is set."""
    for flag, instead in FLAGS.items():
        value = given.get(flag)
        if value is not None and value is not False:
            raise ValueError(f"{flag} must be False or None, got {value!r}: {instead}")


def _check_names(name: str) -> None:
    """Raise ValueError for a method with a field that is also an argument of this adapter."""
    clash = set(OPTIONS) & set(states.field_names(name)) - {"weight_decay"}
    if clash:
        raise ValueError(f"{name} has fields that this adapter names itself: {', '.join(sorted(clash))}")


def _with_method(group: Mapping[str, Any], default: str) -> dict[str, Any]:
    """Return the group with the name and fields of its own method, if any; ValueError for another method's fields."""
    group, method = dict(group), group.get("method", default)
    arguments: set[str] = set()
    if isinstance(method, Method):
        encoded = states.encode(method)
    elif "method" in group:
        encoded, arguments = states.named(method, group)
        if "weight_decay" not in group:
            encoded.pop("weight_decay", None)  # the optimizer's, as for every method
    else:
        encoded = {"method": default}
    name = encoded["method"]
    own = set(states.field_names(name))
    foreign = group.keys() & states.all_field_names() - own - arguments - set(OPTIONS)
    if foreign:
        raise ValueError(f"{name} has no field {', '.join(sorted(foreign))}; it has {', '.join(sorted(own))}")
    for key in group.keys() - own - arguments - {*OPTIONS, *FLAGS}:
        if meant := nearest(
            key, {*own, *arguments, *OPTIONS} - {"params", "param_names"}
        ):  # others are a scheduler's, such as initial_lr
            raise ValueError(f"{name} has no field {key}, which a group has: is it {' or '.join(meant)}?")
    if "method" in group:
        _check_names(name)
        group = {**encoded, **{key: v for key, v in group.items() if key in own or key not in arguments}}
        group["method"] = name
    return group


def _count(step: Any) -> int | None:
    """Return a saved counter (a number, or a tensor with one element) as an int; None if it is no count."""
    try:
        count = int(step) if isinstance(step, (int, float, Tensor)) and not isinstance(step, bool) else -1
        return count if 0 <= count < 2**63 and count == step else None
    except (ValueError, TypeError, RuntimeError, OverflowError):
        return None


def _finite(value: Any) -> bool:
    """Return True if no entry is known to be NaN or infinite."""
    if not isinstance(value, Tensor) or not states.has_value(value) or value.layout is not torch.strided:
        return True
    return bool(sharding.local(value).isfinite().all())


def _copied(value: Any, device: torch.device) -> Any:
    """Return a copy of a wrapper's entry of a state; a tensor is copied to the parameter's device."""
    if not isinstance(value, Tensor) or value.is_meta:
        return copy.deepcopy(value)
    return value.detach().to(device, copy=True)


def _checked_keys(state_dict: Any) -> list[list[Any]]:
    """Return the keys of each group's parameters; ValueError for an object that is not built like a state dict."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        has = ", ".join(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(f"loaded state dict must have state and param_groups, it has {has}")
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping):
        raise ValueError(f"loaded state dict must have state as a mapping, got {type(state).__name__}")
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, Mapping) for group in groups):
        raise ValueError(f"loaded state dict must have param_groups as a list of mappings, got {groups!r}")
    keys = [list(group["params"]) if isinstance(group.get("params"), (list, tuple)) else [None] for group in groups]
    flat = [key for own in keys for key in own]
    if not all(isinstance(key, (int, str)) for key in flat):
        raise ValueError(f"loaded state dict must number or name the params of its groups, got {keys!r}")
    for key in flat:
        if not isinstance(state.get(key, {}), Mapping):
            raise ValueError(
                f"loaded state dict must have a mapping for parameter {key}, got {type(state[key]).__name__}"
            )
    return keys


def _placed(value: Tensor, param: Any, flat: bool) -> Tensor:
    """Return a copy of a loaded tensor on the parameter's device; laid out as the parameter if ``flat``."""
    value = value.to(sharding.local(param).device, copy=True, memory_format=torch.contiguous_format)
    return sharding.wrap(value, param) if flat else value


def _difference(told: Mapping[int, tuple[str, Mapping[Any, Seen]]], call: str, has: str) -> str:
    """Return in what the ranks of a mesh differ, or what one has refused, from what each rank tells.

    ``call``: what is refused. ``has``: what a parameter may lack.
    """
    for rank, (refusal, _) in told.items():
        if refusal:
            return f"the {call} was refused on rank {rank}: {refusal}"
    for place in dict.fromkeys(place for _, seen in told.values() for place in seen):
        found = {rank: seen[place] for rank, (_, seen) in told.items() if place in seen}
        if len({tuple(label for label, *_ in rows) for rows in found.values()}) > 1:
            return f"ranks {', '.join(map(str, found))} have different parameters"
        for rows in zip(*found.values(), strict=True):
            label, _, first = rows[0]
            without = [str(rank) for rank, (_, there, _) in zip(found, rows, strict=True) if not there]
            if 0 < len(without) < len(found):
                return (
                    f"parameter {label} has no {has} on rank {', '.join(without)}, and one on the others: a sharded "
                    "parameter needs one on every rank of its mesh, or on none"
                )
            for rank, (_, _, other) in zip(found, rows, strict=True):
                for key in {**first, **other}:
                    here, there = first.get(key, "none"), other.get(key, "none")
                    if here != there:
                        return f"parameter {label} has {key} {here} on rank {next(iter(found))}, {there} on rank {rank}"
    return "the ranks of a mesh differ"


def _called(name: str, param: Any) -> str:
    return f"parameter {name}" if name else f"a parameter of size {list(param.shape)}"


def _expected(unit: Unit, method: Method) -> dict[str, Tensor]:
    """Return the tensors of a unit's state (of an elementwise method: of this rank's part), without their values."""
    shape = tuple(sharding.local(unit[0]).shape) if method.elementwise else shape_of(unit)
    return states.to_dict(states.template(method, shape, states.work_dtype(method, unit[0].dtype)))


def _check_entry(entry: Mapping[str, Any], unit: Unit, method: Method, name: str) -> None:
    """Raise ValueError for a state that was made for another parameter or with other fields."""
    device = sharding.local(unit[0]).device
    for key, like in _expected(unit, method).items():
        value = sharding.local(entry[key]) if isinstance(entry.get(key), Tensor) else None
        if value is None or (value.shape, value.dtype, value.device) != (like.shape, like.dtype, device):
            found = "none" if value is None else f"one of shape {list(value.shape)}, {value.dtype} on {value.device}"
            raise ValueError(
                f"{method.name} needs {key!r} of shape {list(like.shape)}, {like.dtype} on {device} for "
                f"{_called(name, unit[0])}, its state has {found}: a field, or the parameter's shape, dtype or device, "
                "was changed; delete the parameter's entry of `state` to begin afresh"
            )


def _elsewhere(method: Method, unit: Unit) -> dict[str, Tensor]:
    """Return empty tensors in the place of a state that another rank keeps: tools ask for the names."""
    device = sharding.local(unit[0]).device
    return {name: torch.empty(0, dtype=a.dtype, device=device) for name, a in _expected(unit, method).items()}


def _tuples(value: Any) -> Any:
    """Return ``value`` with tuples for lists, at any depth."""
    if isinstance(value, dict):
        return {key: _tuples(part) for key, part in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _fresh(method: Method, unit: Unit, flat: bool) -> dict[str, Tensor]:
    """Return the state of a unit before its first update, each tensor with memory of its own."""
    param = unit[0]
    part = sharding.local(param) if flat else param
    shape = part.shape if flat else shape_of(unit)
    like = torch.zeros(shape, dtype=states.work_dtype(method, param.dtype), device=part.device)
    arrays = states.to_dict(method.init(like))
    return {name: sharding.wrap(a.clone(), param) if flat else a.clone() for name, a in arrays.items()}


def _pairs(join: Any) -> tuple[tuple[str, str], ...]:
    """Return ``join`` as tuples; ValueError if it is not pairs of names, or has a name twice."""
    try:
        pairs = tuple((weight, bias) for weight, bias in join)
        names = [name for pair in pairs for name in pair if isinstance(name, str)]
    except (TypeError, ValueError):
        names, pairs = [], ((),)  # type: ignore[assignment]
    if len(names) != 2 * len(pairs) or len(set(names)) != len(names) or any(isinstance(p, str) for p in join):
        raise ValueError(f"join must be pairs of names (weight, bias), no name twice, got {join!r}")
    return pairs


def _own_pairs(group: Mapping[str, Any], strict: bool) -> tuple[tuple[str, str], ...]:
    """Check the pairs of ``join``. Return those in this group; with ``strict`` all must be in it."""
    params, own = dict(_named(group)), []
    for pair in _pairs(group["join"]):
        missing = [name for name in pair if name not in params]
        if missing and (strict or len(missing) == 1):
            raise ValueError(f"join names {' and '.join(missing)}, which this group has no parameter of")
        if missing:
            continue
        twice = [name for name in pair if group["param_names"].count(name) > 1]
        if twice:
            raise ValueError(f"join names {' and '.join(twice)}, which more than one parameter of this group is called")
        weight, bias = (params[name] for name in pair)
        if weight.ndim != 2 or tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"join needs a weight (O, I) and a bias (O,), got {pair[0]} {list(weight.shape)} and {pair[1]} "
                f"{list(bias.shape)}"
            )
        places = [(p.dtype, p.device, p.device_mesh if sharding.is_sharded(p) else "unsharded") for p in (weight, bias)]
        if places[0] != places[1]:
            raise TypeError(
                f"join needs one dtype, device and mesh, got {pair[0]} {places[0]} and {pair[1]} {places[1]}"
            )
        own.append(pair)
    return tuple(own)


def _positions(group: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the positions of the joined parameters in a group."""
    names = list(group.get("param_names", ()))
    missing = {name for pair in group["join"] for name in pair} - set(names)
    if missing:
        raise ValueError(f"join names {' and '.join(sorted(missing))}, which this group has no parameter of")
    return sorted((names.index(weight), names.index(bias)) for weight, bias in group["join"])


def _ranges(numbers: list[int]) -> str:
    """Return ``[0, 1, 2, 5]`` as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _shown(key: Any) -> str:
    return f"has size {list(key.shape)}" if isinstance(key, Tensor) else f"is {key!r}"


def _listed(pairs: Any) -> str:
    return ", ".join(f"({weight}, {bias})" for weight, bias in sorted(pairs))


def _named(group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield name ("" without names) and tensor of each parameter of a group."""
    names = group.get("param_names", [""] * len(group["params"]))
    return zip(names, group["params"], strict=True)


def _labelled(index: int, group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each parameter of a group, with its name or place."""
    for position, (name, param) in enumerate(_named(group)):
        yield name or f"{position} of group {index}", param


def _plain(method: Any) -> dict[str, Any] | None:
    """Return a fallback as plain data."""
    if method is None or isinstance(method, Mapping):
        return method if method is None else {"method": "", **method}
    if not isinstance(method, Method):
        raise TypeError(f"fallback must be a precond_ref.Method or None, got {method!r}{class_hint(method)}")
    return states.encode(method)


def _method(group: Mapping[str, Any]) -> Method:
    """Return the method of a group, from its name and fields."""
    try:
        cls = class_of(group["method"])  # a name may be defined again, in a notebook
        values = tuple(group[name] for name in _names_of(cls))  # type: ignore[arg-type]
        return _cached(cls, values, tuple(map(type, values)))  # type: ignore[arg-type]  # True is no 1.0
    except (KeyError, TypeError):
        return states.decode(group)  # raises an error with the missing field, or the one that is no number


@lru_cache
def _names_of(cls: type[Method]) -> tuple[str, ...]:
    return tuple(states.field_names(cls.name))


@lru_cache(maxsize=4096)
def _cached(cls: type[Method], values: tuple[Any, ...], types: tuple[type, ...]) -> Method:
    return states.make(cls, dict(zip(_names_of(cls), values, strict=True)))  # type: ignore[arg-type]


# ---- a class per method ---------------------------------------------------------------------------------------------


_CLASSES: dict[type[Method], type[Optimizer]] = {}


def optimizer_of(method_type: type[Method]) -> type[Optimizer]:
    """Return the optimizer class for a method: its fields are arguments, its presets class methods."""
    if method_type in _CLASSES:
        return _CLASSES[method_type]
    own = _signature(method_type)

    def __init__(self: Optimizer, params: Any, lr: float | Tensor = 1e-3, **arguments: Any) -> None:
        fields, options = _split(own, arguments)
        Optimizer.__init__(self, params, states.make(method_type, fields), lr, **options)

    namespace = {
        "__init__": __init__,
        "__module__": __name__.partition(".")[0],
        "__doc__": f"{method_type.__doc__}\n\nArguments beside the method's: see `precond_ref_torch.Optimizer`.",
        **{name: _preset(method_type, name) for name in method_type.presets},
    }
    cls: type[Optimizer] = type(method_type.__name__, (Optimizer,), namespace)
    __init__.__signature__ = _with_options(own, "self")  # type: ignore[attr-defined]
    return _CLASSES.setdefault(method_type, cls)


def _preset(method_type: type[Method], name: str) -> Any:
    function = getattr(method_type, name)
    own = _signature(function)

    def preset(cls: Any, /, params: Any, lr: float | Tensor = 1e-3, **arguments: Any) -> Optimizer:
        fields, options = _split(own, arguments)
        self: Optimizer = cls.__new__(cls)
        Optimizer.__init__(self, params, states.make(function, fields), lr, **options)
        return self

    preset.__name__, preset.__doc__ = name, function.__doc__
    preset.__signature__ = _with_options(own, "cls")  # type: ignore[attr-defined]
    return classmethod(preset)


def _signature(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def _split(own: Mapping[str, Any], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of the method (or preset), and those of the adapter."""
    options = {k: v for k, v in arguments.items() if k in (*OPTIONS, "owner", *FLAGS) and k not in own}
    return {k: v for k, v in arguments.items() if k not in options}, options


def _with_options(own: Mapping[str, inspect.Parameter], first: str) -> inspect.Signature:
    """Return the signature ``(first, params, lr, *, method's arguments, adapter's arguments)``."""
    adapter = _signature(Optimizer.__init__)
    positional = [inspect.Parameter(first, inspect.Parameter.POSITIONAL_OR_KEYWORD), adapter["params"], adapter["lr"]]
    keywords = {**{k: v for k, v in adapter.items() if v.kind is inspect.Parameter.KEYWORD_ONLY}, **own}
    return inspect.Signature(positional + [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in keywords.values()])
