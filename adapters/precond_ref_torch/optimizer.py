"""`Optimizer`, a `torch.optim.Optimizer` that runs a method of `precond_ref`, and a subclass of it per method."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from precond_ref import Adam, Method
from precond_ref_torch import distributed as sharding
from precond_ref_torch import states
from precond_ref_torch.buckets import Bucket, Unit, check_engine, joined, partition, shape_of

LARGEST_BUFFER = {"cpu": 2**19, "other": 2**22}
"""Entries in one flat buffer of several parameters, by device; a larger parameter is updated where it is."""
OPTIONS = (
    "lr", "weight_decay", "maximize", "fallback", "compile", "engine", "join", "method", "params", "param_names",
)  # fmt: skip


class Plan(NamedTuple):
    """How a group was cut into buckets, and what for."""

    key: Any
    active: list[Any]
    buckets: list[Bucket]


class Optimizer(torch.optim.Optimizer):
    """Runs ``method`` (any `precond_ref.Method`) on parameters: ``x <- (1 - lr weight_decay) x - lr direction``.

    The classes ``precond_ref_torch.ASGO``, ``AGD``, ... take the method's fields as arguments instead.

    Arguments:
        params: tensors, named tensors, or parameter groups. A group may override every argument below except
            ``params``, every field of its method, and the method itself by an entry ``"method"`` (a
            `precond_ref.Method`).
        method: for all parameters that it takes.
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
    ) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"method must be a precond_ref.Method, got {method!r}")
        encoded = states.encode(method)
        clash = set(OPTIONS[:-3]) & encoded.keys() - {"weight_decay"}
        if clash:
            raise ValueError(f"{encoded['method']} has fields that this adapter names itself: {', '.join(clash)}")
        if weight_decay is None:
            weight_decay = encoded.get("weight_decay", 0.0)
        elif encoded.get("weight_decay", weight_decay) != weight_decay:
            raise ValueError(
                f"weight_decay must be the method's, {encoded['weight_decay']}, or not be given, got {weight_decay}"
            )
        self._reset()
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
        self._kernels: dict[Any, Any] = {}
        self._owners: dict[Any, int] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()
        self._owners = sharding.owners(group["params"] for group in self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may name its own method and any hyperparameter; a refused one changes nothing."""
        if isinstance(param_group, dict):
            group = dict(param_group)
            if isinstance(group.get("method"), Method):
                group = {**states.encode(group["method"]), **group, "method": type(group["method"]).__name__}
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
            except BaseException:
                self.param_groups.pop()
                raise
            self._owners = sharding.owners(group["params"] for group in self.param_groups)
        else:
            super().add_param_group(param_group)

    def _check(self, group: Mapping[str, Any]) -> None:
        """ValueError or TypeError for hyperparameters or parameters that do not fit."""
        lr, decay = group["lr"], group["weight_decay"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not (lr >= 0.0 and math.isfinite(lr)):
            raise ValueError(f"Invalid learning rate: {lr}")
        if not (decay >= 0.0 and math.isfinite(decay)):
            raise ValueError(f"Invalid weight_decay value: {decay}")
        if not isinstance(group["maximize"], bool):
            raise TypeError(f"Invalid maximize value: {group['maximize']} (it must be True or False)")
        if not isinstance(group["compile"], (bool, str)):
            raise TypeError(f"Invalid compile value: {group['compile']} (it must be True, False or a backend's name)")
        states.decode(group)
        name = type(self).__name__
        for param in group["params"]:
            if param.is_complex():
                raise TypeError(f"{name} does not support complex parameters (optimize torch.view_as_real of it)")
            if not param.is_floating_point():
                raise TypeError(f"{name} only supports floating-point parameters, got one of dtype {param.dtype}")
            check_engine(group["engine"], group["compile"], param.device)

    def _routed(self, group: Mapping[str, Any]) -> Iterator[tuple[str, Unit, Method]]:
        """The group's units, each with its name and method; ValueError for one that no method takes."""
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
        """The method of one unit; ValueError if none takes it."""
        method = _method(group)
        chosen: Method | None = method if method.takes(shape, name) else None
        if hasattr(method, "for_shape"):
            chosen = method.for_shape(shape, name)
        if chosen is None:
            if group["fallback"] is None:
                raise ValueError(
                    f"{group['method']} does not take a parameter of size {list(shape)}"
                    f"{f' ({name})' if name else ''}: give `fallback` a method for it, or its group a `method`"
                )
            chosen = _cached(tuple(group["fallback"].items()))
        states.template(chosen, shape, states.work_dtype(chosen, dtype))
        return chosen

    # ---- the step ---------------------------------------------------------------------------------------------------

    def step(
        self, closure: Callable[[], Any] | None = None, *, statistics: Any = None, batch_size: float | None = None
    ) -> Any:
        """One update of every parameter with a gradient; returns the closure's loss, evaluated before the update.

        Arguments:
            closure: evaluates the loss and its gradients.
            statistics: what the method's ``update(..., statistic=)`` takes, by parameter (by the weight for a joined
                pair), or a function that returns it, called after the closure.
            batch_size: from now on the value of this field of every method that has it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if callable(statistics):
            statistics = statistics()
        with torch.no_grad():
            self._update({} if statistics is None else statistics, batch_size)
        return loss

    def _set_batch_size(self, batch_size: float | None) -> list[tuple[Any, Any]]:
        """Set it in every group and fallback that has the field; returns these, each with the value before."""
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
        """Each group's buckets and their statistics, once gradients and statistics are known to fit."""
        if not isinstance(statistics, Mapping):
            raise TypeError(
                f"statistics must be a mapping from parameters, or a function that returns one, got "
                f"{type(statistics).__name__}"
            )
        for group in self.param_groups:
            grads = [param.grad for param in group["params"]]
            if any(grad is not None and grad.layout is not torch.strided for grad in grads):
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        found = [
            (group, bucket) for index, group in enumerate(self.param_groups) for bucket in self._buckets(index, group)
        ]
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
        before = self._set_batch_size(batch_size)
        try:
            found, given = self._checked(statistics)
        except BaseException:
            for fields, size in before:
                fields["batch_size"] = size
            raise
        work = [(group, bucket, s, *bucket.gather()) for (group, bucket), s in zip(found, given, strict=True)]
        scalars: dict[Any, Any] = {}
        pending = []
        for group, bucket, statistic, grads, params in work:
            directions: Iterator[tuple[slice, list[Tensor]]] = iter(())
            if bucket.mine:
                step = int(bucket.steps[0])
                key = (bucket.method, step)
                if key not in scalars:
                    scalars[key] = bucket.method.scalars(step + 1)
                directions = bucket.directions(grads, params, step, scalars[key], group, self._kernels, statistic)
            if bucket.owner is None:
                for members, some in directions:
                    _apply(group, bucket, bucket.values(members), bucket.parts(some, members))
            else:
                pending.append((group, bucket, [direction for _, some in directions for direction in some]))
        for group, bucket, whole in pending:
            _apply(group, bucket, bucket.values(), bucket.exchange(whole))

    def _buckets(self, index: int, group: Mapping[str, Any]) -> list[Bucket]:
        """The group's parameters with a gradient, cut into buckets; made anew when something has changed."""
        active = [p for p in group["params"] if p.grad is not None]
        key = (_method(group), group["fallback"])
        old = self._plans.get(index)
        if (
            old is not None
            and old.key == key
            and len(old.active) == len(active)
            and all(map(is_, old.active, active))
            and all(b.in_step() and b.holds(self.state) for b in old.buckets)
        ):
            return old.buckets
        for bucket in old.buckets if old else ():
            bucket.release()
        device = active[0].device.type if active else "other"
        cut = partition(self._labels(group), LARGEST_BUFFER.get(device, LARGEST_BUFFER["other"]))
        buckets = []
        for members in cut:
            (method, flat, owner), units = members[0][0], [unit for _, unit in members]
            buckets.append(Bucket(method, units, [self.state[unit[0]] for unit in units], flat, owner))
        self._plans[index] = Plan(key, active, buckets)
        return buckets

    def _labels(self, group: Mapping[str, Any]) -> Iterator[tuple[Any, int, Any]]:
        """Of each parameter with a gradient: what must agree within a bucket, how much of one it fills, and itself."""
        for name, unit, method in self._routed(group):
            param = unit[0]
            if len({p.grad is None for p in unit}) > 1:
                raise RuntimeError(f"{name} is joined with its bias: both need a gradient, or none, one has None")
            if param.grad is None:
                continue
            flat = method.elementwise
            owner = None if flat or not sharding.is_sharded(param) else self._owners[param]
            entry = self.state[param]
            if not entry:
                entry["step"] = torch.zeros((), dtype=torch.int64)
                if owner is None or sharding.owns(param, owner):
                    entry.update(_fresh(method, unit, flat))
            shape = None if flat else shape_of(unit)
            layout = (owner, param.device_mesh) if sharding.is_sharded(param) else None
            label = (method, param.dtype, param.device, shape, layout, int(entry["step"]))
            yield label, sharding.local(param).numel() if flat else 0, ((method, flat, owner), unit)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, dtypes kept, tensors copied to the parameters' devices.

        ValueError for a state of another method, of other shapes, dtypes or groups; nothing is loaded then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        if not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(f"loaded state dict must have state and param_groups, it has {', '.join(state_dict)}")
        groups = self._merged_groups(copy.deepcopy(state_dict["param_groups"]))
        loaded: dict[Any, Any] = {}
        for group, saved in zip(groups, state_dict["param_groups"], strict=True):
            routed = {unit[0]: (unit, method) for _, unit, method in self._routed(group)}
            for param, key in zip(group["params"], saved["params"], strict=True):
                entry = state_dict["state"].get(key)
                if entry and param not in routed:
                    raise ValueError(f"loaded state dict has a state of parameter {key}, which is joined to its weight")
                if entry:
                    loaded[param] = self._restored(entry, *routed[param], f"parameter {key}")
        extra = state_dict["state"].keys() - {k for g in state_dict["param_groups"] for k in g["params"]}
        if extra:
            raise ValueError(f"loaded state dict has a state of {', '.join(map(str, extra))}, which is in no group")
        state = copy.copy(self.state)
        state.clear()
        state.update(loaded)
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _merged_groups(self, saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The saved groups with this optimizer's parameters, once they are known to fit."""
        if len(saved_groups) != len(self.param_groups):
            raise ValueError("loaded state dict has a different number of parameter groups")
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            if len(group["params"]) != len(saved["params"]):
                raise ValueError(
                    "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
                )
            if saved.get("method") != group["method"]:
                other = saved.get("method", "another optimizer")
                raise ValueError(f"loaded state dict is of {other}, this group runs {group['method']}")
            fields = states.field_names(group["method"])
            missing = [name for name in (*OPTIONS[:-3], *fields) if name not in saved]
            if missing:
                raise ValueError(
                    f"loaded state dict is of another version of {group['method']}: it lacks {', '.join(missing)}"
                )
            saved["params"] = group["params"]
            if "param_names" in group:
                saved.setdefault("param_names", group["param_names"])
            if _positions(saved) != _positions(group):
                raise ValueError(
                    f"loaded state dict joins {_listed(saved['join']) or 'nothing'}, this group joins "
                    f"{_listed(group['join']) or 'nothing'}"
                )
            self._check(saved)
        return saved_groups

    def _restored(self, entry: Mapping[str, Any], unit: Unit, method: Method, label: str) -> dict[str, Tensor]:
        param, flat = unit[0], method.elementwise
        step = entry.get("step")
        if not isinstance(step, Tensor) or step.numel() != 1 or int(step) != float(step) or int(step) < 0:
            raise ValueError(f"loaded state dict has no valid step for {label}, got {step!r}")
        result = {"step": torch.tensor(int(step), dtype=torch.int64)}
        if not flat and sharding.is_sharded(param) and not sharding.owns(param, self._owners[param]):
            return result  # whatever the rank that saved this kept
        part = sharding.local(param)
        shape = part.shape if flat else torch.Size(shape_of(unit))
        expected = states.to_dict(states.template(method, tuple(shape), states.work_dtype(method, param.dtype)))
        if entry.keys() - {"step"} != expected.keys():
            raise ValueError(
                f"loaded state dict has {', '.join(entry)} for {label}, "
                f"{type(method).__name__} keeps {', '.join(('step', *expected))}"
            )
        for key, like in expected.items():
            value = sharding.restored(entry[key], param, shape) if flat else entry[key]
            if value.shape != like.shape or value.dtype != like.dtype:
                raise ValueError(
                    f"loaded state dict has {key} of shape {list(value.shape)} and dtype {value.dtype} for {label}, "
                    f"it must have shape {list(like.shape)} and dtype {like.dtype}"
                )
            value = value.detach().to(part.device, copy=True, memory_format=torch.contiguous_format)
            result[key] = sharding.wrap(value, param) if flat else value
        return result

    # ---- inspection -------------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """A table of the parameters: group, role (from `param_groups_for`), name, shape, method, rates."""
        rows = [("group", "role", "parameter", "shape", "dtype", "method", "lr", "weight_decay")]
        for index, group in enumerate(self.param_groups):
            for position, (name, unit, method) in enumerate(self._routed(group)):
                shape = " x ".join(map(str, shape_of(unit))) or "scalar"
                dtype = str(unit[0].dtype).removeprefix("torch.")
                label = name if len(unit) == 1 else f"{name} + {dict(group['join'])[name].rpartition('.')[2]}"
                rates = f"{float(group['lr']):g}", f"{group['weight_decay']:g}"
                cells = (str(index), group.get("role", ""), label or str(position), shape, dtype)
                rows.append((*cells, type(method).__name__, *rates))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines)


def _apply(group: Mapping[str, Any], bucket: Bucket, params: list[Tensor], directions: list[Tensor]) -> None:
    """``x <- (1 - lr weight_decay) x - lr direction``, rounded once below float32."""
    lr = float(group["lr"])
    decay = 0.0 if hasattr(bucket.method, "weight_decay") else group["weight_decay"]
    wide = params if params[0].dtype == bucket.dtype else [p.to(bucket.dtype) for p in params]
    if bucket.device.type in ("cpu", "cuda") and all(map(Tensor.is_contiguous, [*wide, *directions])):
        # SGD's coupled decay of a direction is the decoupled one
        torch._fused_sgd_(
            wide, directions, [], weight_decay=decay, lr=lr, momentum=0.0, dampening=0.0, nesterov=False,
            maximize=False, is_first_step=False,
        )  # fmt: skip
        for param in wide:
            torch.autograd.graph.increment_version(param)  # which the fused kernel leaves to its caller
    else:
        if decay:
            torch._foreach_mul_(wide, 1 - lr * decay)
        torch._foreach_add_(wide, directions, alpha=-lr)
    if wide is not params:
        torch._foreach_copy_(params, wide)


def _fresh(method: Method, unit: Unit, flat: bool) -> dict[str, Tensor]:
    """The state of a unit before its first update, each tensor with memory of its own."""
    param = unit[0]
    part = sharding.local(param) if flat else param
    shape = part.shape if flat else shape_of(unit)
    like = torch.zeros(shape, dtype=states.work_dtype(method, param.dtype), device=part.device)
    if states.reads_param(method) and not sharding.is_sharded(part):
        like.copy_(joined([sharding.local(p) if flat else p for p in unit]))
    arrays = states.to_dict(method.init(like))
    return {name: sharding.wrap(a.clone(), param) if flat else a.clone() for name, a in arrays.items()}


def _pairs(join: Any) -> tuple[tuple[str, str], ...]:
    """``join`` as tuples; ValueError if it is not pairs of names, none of them twice."""
    try:
        pairs = tuple((weight, bias) for weight, bias in join)
        names = [name for pair in pairs for name in pair if isinstance(name, str)]
    except (TypeError, ValueError):
        names, pairs = [], ((),)  # type: ignore[assignment]
    if len(names) != 2 * len(pairs) or len(set(names)) != len(names) or any(isinstance(p, str) for p in join):
        raise ValueError(f"join must be pairs of names (weight, bias), no name twice, got {join!r}")
    return pairs


def _own_pairs(group: Mapping[str, Any], strict: bool) -> tuple[tuple[str, str], ...]:
    """The pairs of ``join`` that are in this group (``strict``: all must be), once they are known to fit."""
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
    """Where the joined parameters are in a group."""
    names = list(group.get("param_names", ()))
    return sorted((names.index(weight), names.index(bias)) for weight, bias in group["join"])


def _shown(key: Any) -> str:
    return f"has size {list(key.shape)}" if isinstance(key, Tensor) else f"is {key!r}"


def _listed(pairs: Any) -> str:
    return ", ".join(f"({weight}, {bias})" for weight, bias in sorted(pairs))


def _named(group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name ("" without names) and tensor of each parameter of a group."""
    names = group.get("param_names", [""] * len(group["params"]))
    return zip(names, group["params"], strict=True)


def _plain(method: Any) -> dict[str, Any] | None:
    """A fallback as plain data."""
    if method is None or isinstance(method, Mapping):
        return method if method is None else dict(method)
    if not isinstance(method, Method):
        raise TypeError(f"fallback must be a precond_ref.Method or None, got {method!r}")
    return states.encode(method)


def _method(group: Mapping[str, Any]) -> Method:
    """The method of a group, from its name and fields."""
    name = group["method"]
    fields = _field_names(name)
    return _cached((("method", name), *((f, group[f]) for f in fields)))


_field_names = lru_cache(states.field_names)


@lru_cache(maxsize=4096)
def _cached(items: tuple[tuple[str, Any], ...]) -> Method:
    return states.decode(dict(items))


# ---- a class per method ---------------------------------------------------------------------------------------------


_CLASSES: dict[type[Method], type[Optimizer]] = {}


def class_of(method_type: type[Method]) -> type[Optimizer]:
    """The optimizer class for a method: its fields are arguments, its presets class methods."""
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
    """Arguments for the method (or preset), and the adapter's."""
    options = {k: v for k, v in arguments.items() if k in OPTIONS and k not in own}
    return {k: v for k, v in arguments.items() if k not in options}, options


def _with_options(own: Mapping[str, inspect.Parameter], first: str) -> inspect.Signature:
    """``(first, params, lr, *, method's arguments, adapter's arguments)``."""
    adapter = _signature(Optimizer.__init__)
    positional = [inspect.Parameter(first, inspect.Parameter.POSITIONAL_OR_KEYWORD), adapter["params"], adapter["lr"]]
    keywords = {**{k: v for k, v in adapter.items() if v.kind is inspect.Parameter.KEYWORD_ONLY}, **own}
    return inspect.Signature(positional + [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in keywords.values()])
