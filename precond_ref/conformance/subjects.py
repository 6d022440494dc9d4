"""Subjects, the implementations under test: objects with ``init(config, params)`` and ``step(grads) -> params``.

The interface is `Subject`, a job of ten lines. `wrap` makes one of

* a class or object that has ``init`` and ``step``: itself;
* a ``torch.optim.Optimizer`` class, or a function whose first argument is named ``params`` that returns one;
* a function that returns an optax transformation;
* a function ``step(param, grad, state, *, lr, ...) -> (new param, new state)``, ``state`` being None at first;
* a class made from `precond_ref.Method`, or one of its presets, on any of the array libraries;

and `Command` is a program in any language that speaks JSON lines.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import importlib
import inspect
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from array_api_compat import array_namespace

from precond_ref import registry
from precond_ref.conformance.processes import GRACE, Exited, Limits, Program, unshared, worked
from precond_ref.numerics.template import leaves
from precond_ref.protocol import Method

BACKENDS = ("numpy", "strict", "torch", "jax", "cupy")
Arrays = list[np.ndarray]


class Unsupported(NotImplementedError):
    """Raised by a subject for a configuration (or primitive) that it does not have: the case is skipped and counted."""


class Changed(ValueError):
    """Raised for a subject that changed one of its arguments in place."""


RAISED = (Exception, SystemExit)
"""Exceptions of a subject that become results; any other exception ends the program."""
MOST = 500
"""Number of characters of a message that are shown, up to a few more."""


class Raised(Exception):
    """An error that a subject raised in a process of its own."""

    def __init__(self, *, name: str, message: str, text: str, usage: bool):
        super().__init__(text)
        self.name, self.message, self.usage = name, message, usage


class Refused(Raised, ValueError):
    """A ValueError or TypeError that a subject raised in a process of its own."""


def named(error: BaseException) -> str:
    """Return the name of an exception."""
    return error.name if isinstance(error, Raised) else type(error).__name__


def words(error: BaseException) -> str:
    """Return the message of an exception, cut if it is long; a note instead if it cannot be printed."""
    try:
        text = str(error).encode("utf-8", "backslashreplace").decode()
    except BaseException:
        return "(its message cannot be printed)"
    return text if len(text) <= MOST + 40 else f"{text[:MOST]}... ({len(text)} characters)"  # not cut twice


def said(error: BaseException) -> str:
    """Return the exception in words, with the line of the subject's code that raised it, if it was that code."""
    if isinstance(error, Raised):
        return str(error)
    text = f"{named(error)}: {words(error)}".removesuffix(": ")
    frames = traceback.extract_tb(error.__traceback__)
    own, standard = str(Path(__file__).parents[1]), sysconfig.get_path("stdlib")
    theirs = [
        f for f in frames if not f.filename.startswith((own, standard, "<")) and "site-packages" not in f.filename
    ]
    if not theirs or frames[-1].filename.startswith(own):
        return text
    return f"{text} ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})"


class Config(dict[str, Any]):
    """Hyperparameters of a case: all fields of the method, ``lr``, and ``weight_decay`` (decoupled, unless a field).

    ``method`` is the reference method that they make. ``at_default`` has the names of the fields with the reference's
    default. ``forms`` has, for each field that is one of several forms or none, the names of the forms.
    """

    make: Callable[[], Method]
    at_default: frozenset[str] = frozenset()
    forms: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    @property
    def method(self) -> Method:
        """The reference method; ValueError or TypeError for a configuration that it refuses."""
        return self.make()


@runtime_checkable
class Subject(Protocol):
    """An implementation under test. Arrays are NumPy's, in the dtype of the run; lists have one entry per parameter.

    A subject may also have ``state() -> list of dicts of arrays`` (level 1), ``primitive(name, config, tensors) ->
    dict`` (level 2), and ``save() -> anything`` with ``load(saved)``, which is called on a new subject after ``init``.
    """

    def init(self, config: Config, params: Arrays) -> None:
        """Begin a new run; `Unsupported` or NotImplementedError for a configuration that the subject does not have."""

    def step(self, grads: Arrays) -> Arrays:
        """Return the parameters after one more step."""


def load_target(target: str) -> Any:
    """Return the object at ``module:attribute``, searched in the current folder first; errors as `registry.load`."""
    return registry.load(target, said)


def wrap(
    target: Any, *, backend: str | None = None, dtype: str = "float64", names: Mapping[str, str] | None = None
) -> Subject:
    """Return a subject made of ``target``, which is of one of the kinds above; TypeError for others.

    ``names`` maps our names to the names of the target, for hyperparameters (``{"beta1": "betas.0"}`` for the first
    entry of a tuple ``betas``) and for states (``{"state.gram": "precond"}``).
    """
    names = dict(names or {})
    if registry.made_by(target):
        return Reference(backend or "numpy", dtype, target, names)
    if isinstance(target, type) and all(hasattr(target, name) for name in ("init", "step")):
        return target()
    if not isinstance(target, type) and all(hasattr(target, name) for name in ("init", "step")):
        return target
    if not callable(target):
        raise TypeError(f"a target must be a class, a function or an object with init and step, got {target!r}")
    if isinstance(target, type) and any(c.__module__.startswith("torch.optim") for c in target.__mro__):
        return Torch(target, dtype, names)
    positional = [p.name for p in _signature(target).values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    if positional[:1] == ["params"]:
        return Torch(target, dtype, names)
    if positional[:3] == ["param", "grad", "state"]:
        return Function(target, backend or "numpy", dtype, names)
    return Optax(target, dtype, names)


def arguments(target: Callable[..., Any], config: Config, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the keyword arguments of ``target``: the config under the names of the target.

    A field that ``target`` does not have is left out if it has the reference's default; otherwise it is `Unsupported`.
    Without a mapping, ``beta1`` and ``beta2`` go to ``betas`` or ``b1`` and ``b2``, and ``lr`` to ``learning_rate``, if
    the target has only these. If a field is one of several forms or none, and the argument of ``target`` is a bool,
    True is the first form and every other form is `Unsupported`: ``amsgrad=True`` of torch, ``nesterov=True`` of optax.
    """
    signature = _signature(target)
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.values())
    given: dict[str, Any] = {}
    for field, value in config.items():
        head, dot, index = _argument(field, signature, names)
        if head not in signature and not open_ended:
            if field in config.at_default:
                continue
            raise Unsupported(f"{_called(target)} has no argument for {field}={value!r}")
        if field in config.forms and head in signature and isinstance(signature[head].default, bool):
            first = next(form for form in config.forms[field] if form != "none")
            if value not in (None, "none", first):
                raise Unsupported(f"{_called(target)} has {head}=True for {field}={first!r}, and nothing for {value!r}")
            value = value == first
        if dot:
            default = signature[head].default if head in signature else ()
            parts = list(given.get(head, default if isinstance(default, (tuple, list)) else ()))
            parts += [None] * (int(index) + 1 - len(parts))
            parts[int(index)] = value
            given[head] = tuple(parts)
        else:
            given[head] = value
    return given


def _argument(field: str, signature: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, str, str]:
    """Return the argument for one of our fields: its name, and "." and an index if it is part of a tuple."""
    guesses = {"beta1": ("betas.0", "b1"), "beta2": ("betas.1", "b2"), "lr": ("learning_rate",)}
    name = names.get(field, field)
    if field not in names and field not in signature:
        name = next((n for n in guesses.get(field, ()) if n.partition(".")[0] in signature), field)
    return name.partition(".")


def taken(
    make: Callable[..., Any], given: Mapping[str, Any], signature: Mapping[str, Any], at_default: frozenset[str]
) -> dict[str, Any]:
    """Return the arguments ``given`` without those at their default that ``make``, with ``**kwargs``, refuses.

    It refuses an argument if it raises a TypeError that names it, and says something else, or nothing, without it.
    `Unsupported`, with the TypeError, if it refuses an argument with another value.
    """

    def refusal(kept: Mapping[str, Any]) -> str:
        try:
            make(**kept)
        except TypeError as error:
            return said(error)
        except RAISED:
            pass
        return ""

    kept = dict(given)
    while text := refusal(kept):
        named = [name for name in kept if name not in signature and re.search(rf"\b{name}\b", text)]
        refused = [n for n in named if refusal({k: v for k, v in kept.items() if k != n}) != text]
        if not refused:
            break
        if wanted := [name for name in refused if name not in at_default]:
            raise Unsupported(f"the target refuses {', '.join(wanted)}: {text}")
        del kept[refused[0]]
    return kept


class Options(NamedTuple):
    """The arguments of a target."""

    defaults: dict[str, Any]
    """Defaults of the arguments that are our fields, by our names; None unless the default is a number or text."""
    own: dict[str, Any]
    """Defaults of its other arguments, by its names."""


def options_of(target: Callable[..., Any], fields: Sequence[str], names: Mapping[str, str]) -> Options:
    """Return the arguments of ``target``: those of our ``fields``, and the others."""
    signature = _signature(target)
    defaults: dict[str, Any] = {}
    own = {n: p.default for n, p in signature.items() if p.default is not inspect.Parameter.empty}
    for field in fields:
        head, _, index = _argument(field, signature, names)
        if head in signature:
            value = signature[head].default
            if index and isinstance(value, (tuple, list)) and int(index) < len(value):
                value = value[int(index)]
            defaults[field] = value if isinstance(value, (bool, int, float, str)) else None
        elif any(p.kind is p.VAR_KEYWORD for p in signature.values()):
            defaults[field] = None
    taken = {_argument(field, signature, names)[0] for field in fields}
    return Options(defaults, {n: v for n, v in own.items() if n not in taken and isinstance(v, (bool, type(None)))})


def _known(target: Callable[..., Any], names: Mapping[str, str]) -> Mapping[str, str]:
    """Return the ``names`` of fields; ValueError for a field that is mapped to no argument of ``target``."""
    fields = {field: name for field, name in names.items() if not field.startswith("state.")}
    signature = _signature(target) if fields else {}
    for field, name in fields.items():
        head = name.partition(".")[0]
        if head not in signature and all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in signature.values()):
            raise ValueError(
                f"{_called(target)} has no argument {head!r}, which {field} is mapped to; "
                f"it has {', '.join(signature) or 'none'}"
            )
    return fields


def _signature(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError) as error:
        raise TypeError(f"cannot read the arguments of {target!r}: wrap it in a function of your own") from error


def _called(target: Any) -> str:
    return getattr(target, "__name__", type(target).__name__)


class Torch:
    """A ``torch.optim.Optimizer`` class, or a function of (params, lr, ...) that returns one."""

    def __init__(self, make: Callable[..., Any], dtype: str = "float64", names: Mapping[str, str] | None = None):
        import torch

        torch.set_num_threads(1)
        self.features = frozenset({"groups", "absent"})
        self.torch, self.make, self.dtype, self.names = torch, make, dtype, dict(names or {})
        self.fields, self.refused = _known(_without_first(make), self.names), set[str]()

    def init(
        self,
        config: Config,
        params: Arrays,
        groups: Sequence[int] = (),
        habit: str = "",
        narrow: bool = False,
        watched: bool = False,
        frozen: bool = False,
        other: Config | None = None,
        **own: Any,
    ) -> None:
        """Make new parameters and a new optimizer, with the parameters in groups of the sizes ``groups``, if given.

        The last group has the values of ``other``. In a ``frozen`` run a parameter without a gradient requires none.
        ``habit`` is one of `habits.HABITS`, ``narrow`` makes the parameters bfloat16, ``watched`` keeps the names
        of the kernels that run, and ``own`` are options that only the target has.
        """
        from precond_ref.conformance import habits

        self.habit, self.kernels = habits.HABITS[habit], habits.Kernels() if watched else contextlib.nullcontext()
        dtype = self.torch.bfloat16 if narrow else getattr(self.torch, self.dtype)
        tensors = [self.torch.tensor(p, dtype=dtype) for p in params]
        if habit.startswith("parameters"):
            tensors = [habits.transposed(t) for t in tensors]
        self.params = [self.torch.nn.Parameter(t) for t in tensors]
        self.frozen = frozen
        if frozen:
            self.params[0].requires_grad_(False)
        stub = _without_first(self.make)
        given = self._taken(stub, config) | own
        if not groups:
            self.optimizer = self.make(self.params, **given)
            if habit.startswith("step(closure)") and not _signature(self.optimizer.step):
                raise Unsupported("step takes no closure, as step(closure=None) of torch's own optimizers does")
            return
        rest = iter(self.params)
        parts: list[dict[str, Any]] = [{"params": [*itertools.islice(rest, size)]} for size in groups]
        values: dict[str, Any] = {}
        if other is not None:
            values = {k: v for k, v in self._taken(stub, other).items() if v != given.get(k)}
        try:
            self.optimizer = self.make([*parts[:-1], parts[-1] | values], **given)
            probe = self.make([p.detach().clone().requires_grad_() for p in self.params], **(given | values))
        except RAISED as error:
            raise Unsupported(f"{_called(self.make)} takes no parameter groups: {said(error)}") from error
        if own_to_all := sorted(values.keys() - self.optimizer.param_groups[0].keys()):
            raise Unsupported(f"{', '.join(own_to_all)}: no value of groups")
        if translated := sorted(k for k, v in values.items() if probe.param_groups[0][k] != v):
            raise Unsupported(f"{', '.join(translated)}: groups have another value than the argument")

    def _taken(self, stub: Callable[..., Any], config: Config) -> dict[str, Any]:
        """Return `arguments` without those that the target refuses by a TypeError: `taken`."""
        given, signature = arguments(stub, config, self.fields), _signature(stub)
        if not stub.open_ended:  # type: ignore[attr-defined]
            return given
        given = {k: v for k, v in given.items() if k not in self.refused & config.at_default}
        found = taken(lambda **kwargs: self.make(self.params, **kwargs), given, signature, config.at_default)
        self.refused |= given.keys() - found.keys()
        return found

    def options(self, fields: Sequence[str]) -> Options:
        """`options_of` the target, without arguments that it refuses."""
        found = options_of(_without_first(self.make), fields, self.fields)
        return found._replace(defaults={k: v for k, v in found.defaults.items() if k not in self.refused})

    def change(self, group: int | None = None, **factors: float) -> list[str]:
        """Multiply ``lr`` or ``weight_decay`` of a group, or of all; return the names that the groups have."""
        names = {ours: self.fields.get(ours, ours) for ours in factors}
        groups = self.optimizer.param_groups if group is None else [self.optimizer.param_groups[group]]
        found = [ours for ours in factors if all(names[ours] in g for g in groups)]
        for ours in found:
            for g in groups:
                g[names[ours]] = g[names[ours]] * factors[ours]
        return found

    def step(self, grads: Sequence[np.ndarray | None]) -> Arrays:
        """Make one ``optimizer.step()``; a gradient may be None. The gradients must not change."""
        given = [
            None if g is None else self.torch.tensor(g, dtype=p.dtype) for p, g in zip(self.params, grads, strict=True)
        ]
        for p, g in zip(self.params, grads, strict=True) if self.frozen else ():
            p.requires_grad_(g is not None)
        with self.kernels:
            self.habit(self.optimizer, self.params, given)
        for p, g in zip(self.params, grads, strict=True):
            if g is None:
                continue
            if p.grad is None:
                g[...] = np.nan  # shows the caller that its gradient is gone
            else:
                g[...] = p.grad.detach().double().cpu().numpy()
        host = [p.detach().cpu() for p in self.params]
        return [(p.float() if p.dtype == self.torch.bfloat16 else p).numpy().copy() for p in host]

    def ran(self) -> list[str]:
        """Return the names of the kernels that ran, if they were watched."""
        return sorted(getattr(self.kernels, "names", ()))

    def _dtypes(self) -> list[dict[str, str]]:
        """Return the dtypes of the tensors in the state of each parameter, by name."""
        state = self.optimizer.state
        return [
            {str(k): str(v.dtype) for k, v in state[p].items() if isinstance(v, self.torch.Tensor)}
            if p in state
            else {}
            for p in self.params
        ]

    def lost(self) -> list[str]:
        """Return the tensors of the state that have another precision after `load` than before `save`, in words."""
        pairs = zip(self.before, self._dtypes(), strict=True)
        return sorted(
            {f"{k} was {d} and is {now[k]}" for old, now in pairs for k, d in old.items() if now.get(k, d) != d}
        )

    def state(self) -> list[dict[str, np.ndarray]]:
        """Return ``optimizer.state`` of each parameter, under our names."""
        return [_renamed(_flat(self.optimizer.state[p]), self.names) for p in self.params]

    def save(self) -> Any:
        """Return ``state_dict()`` and the parameters, pickled."""
        return pickle.dumps((self.optimizer.state_dict(), [p.detach() for p in self.params], self._dtypes()))

    def load(self, saved: Any) -> None:
        """Load ``saved`` into a new optimizer."""
        state, params, self.before = pickle.loads(saved)
        with self.torch.no_grad():
            for mine, theirs in zip(self.params, params, strict=True):
                mine.copy_(theirs)
        self.optimizer.load_state_dict(state)


def _without_first(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function like ``make`` without its first argument, the parameters.

    A class with ``**kwargs`` also has the arguments of its bases, and may take others.
    """
    parameters = [*_signature(make).values()][1:]
    own = [p for p in parameters if p.kind is p.VAR_KEYWORD]
    if isinstance(make, type):
        for base in make.__mro__[1:]:
            open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
            if base is object or base.__module__ == "torch.optim.optimizer" or not open_ended:
                break
            if "__init__" in base.__dict__:
                known = {p.name for p in parameters}
                parameters = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
                parameters += [p for p in [*_signature(base).values()][1:] if p.name not in known]

    def stub(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    keywords = [p.replace(kind=p.KEYWORD_ONLY) if p.kind < p.VAR_POSITIONAL else p for p in parameters]
    keywords += own if not any(p.kind is p.VAR_KEYWORD for p in parameters) else []
    stub.__signature__ = inspect.Signature(sorted(keywords, key=lambda p: p.kind))  # type: ignore[attr-defined]
    stub.__name__ = _called(make)
    stub.open_ended = bool(own)  # type: ignore[attr-defined]
    return stub


class Programs:
    """What JAX compiles and keeps, a program for each operation and shape: gigabytes in a check of many shapes."""

    GROWTH = 5 * 2**29
    """Number of bytes by which the process may grow before JAX forgets them; all fits in the limit of memory."""
    least = math.inf
    """Size of the process since JAX last forgot them."""

    @classmethod
    def spare(cls) -> None:
        """Make JAX forget its programs if the process has grown by `GROWTH`; it compiles anew what it needs again."""
        size = unshared()
        cls.least = min(cls.least, size)
        if size > cls.least + cls.GROWTH:
            sys.modules["jax"].clear_caches()
            gc.collect()
            with contextlib.suppress(AttributeError):  # of glibc, which would keep the memory for later
                ctypes.CDLL(None).malloc_trim(0)
            cls.least = unshared()


QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}
"""Options of a compiler that does not optimize. With the last, stacks are decomposed one after another: jaxlib 0.10.2
waits for ever where each thread of its pool splits the work of a stack among the same threads."""


class Optax:
    """A function of hyperparameters that returns an optax transformation (its updates are added)."""

    def __init__(self, make: Callable[..., Any], dtype: str = "float64", names: Mapping[str, str] | None = None):
        import jax

        if dtype == "float64":
            settings: Any = jax.config
            settings.update("jax_enable_x64", True)
        self.features = frozenset({"compiled"})
        self.jax, self.make, self.dtype, self.names = jax, make, dtype, dict(names or {})
        self.fields = _known(make, self.names)
        self.compiled: dict[str, Any] = {}

    @cached_property
    def quick(self) -> dict[str, Any]:
        """Return those of `QUICK` that this XLA knows."""
        known = {}
        for name, value in QUICK.items():
            with contextlib.suppress(*RAISED):
                self.jax.jit(lambda x: x, compiler_options={name: value})(0.0)
                known[name] = value
        return known

    def init(self, config: Config, params: Arrays, compiled: bool = False) -> None:
        """Make a new transformation and its state; ``compiled``: both, or an equal one's, under ``jax.jit``."""
        given = arguments(self.make, config, self.fields)
        self.transformation: Any = self.make(**given)
        if not all(hasattr(self.transformation, name) for name in ("init", "update")):
            raise TypeError(
                f"{_called(self.make)} must return an optax transformation (with init and update), "
                f"got {type(self.transformation).__name__}; `precond-ref check --help` lists what a target can be"
            )
        self.params = [self.jax.numpy.asarray(p, dtype=self.dtype) for p in params]
        begin, self.update = self.transformation.init, self.transformation.update
        if compiled:
            begin, self.update = self.compiled.setdefault(repr(given), [*map(self._whole, (begin, self.update))])
        self.opt_state, self.steps, self.rates = begin(self.params), 0, [(0, config["lr"])]
        self.config, self.scheduled, self.whole = copy.copy(config), False, compiled

    def _whole(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self.jax.jit(function, compiler_options=self.quick)

    def options(self, fields: Sequence[str]) -> Options:
        """`options_of` the target."""
        return options_of(self.make, fields, self.fields)

    def step(self, grads: Arrays) -> Arrays:
        """Call ``update``, and add the updates to the parameters."""
        Programs.spare()
        given = [self.jax.numpy.asarray(g, dtype=self.dtype) for g in grads]
        updates, self.opt_state = self.update(given, self.opt_state, self.params)
        self.steps += 1
        kinds = [self.jax.numpy.result_type(p, u) for p, u in zip(self.params, updates, strict=True)]
        after = [np.add(p, u, dtype=kind) for p, u, kind in zip(self.params, updates, kinds, strict=True)]
        self.params = [self.jax.numpy.array(p) for p in after]
        return after

    def change(self, group: int | None = None, **factors: float) -> list[str]:
        """Multiply ``lr`` from the next step on, by a schedule, if the function takes a schedule."""
        if group is not None or "lr" not in factors or (self.steps and not self.scheduled):
            return []
        self.rates.append((self.steps, self.rates[-1][1] * factors["lr"]))
        if not (self.scheduled and self.whole):
            config = copy.copy(self.config)
            config["lr"], config.at_default = self._rate, self.config.at_default - {"lr"}
            try:
                made = self.make(**arguments(self.make, config, self.fields))

                def update(known: Any, *given: Any) -> Any:
                    self.known = known
                    return made.update(*given)

                run = self._whole(update) if self.whole else update
                if not self.scheduled:
                    state = made.init(self.params)
                    run(self._known(), [0 * p for p in self.params], state, self.params)
                    self.opt_state, self.scheduled = state, True
            except RAISED:
                return []
            self.transformation, self.update = made, lambda *given: run(self._known(), *given)
        return ["lr"]

    def _known(self) -> tuple[Any, Any, int]:
        """Return the steps from which a rate holds, these rates, and the number of steps made."""
        never = (2**30, 0.0)  # so that one program is compiled
        starts, rates = zip(*self.rates, *[never] * (-len(self.rates) % 512), strict=True)
        return np.array(starts), np.array(rates, self.dtype), self.steps

    def _rate(self, count: Any) -> Any:
        """Return the rate of the step after ``count`` others: a schedule."""
        (starts, rates, steps), np = self.known, self.jax.numpy
        rate = np.asarray(rates)[np.searchsorted(np.asarray(starts), count, side="right") - 1]
        return np.where(count > steps, np.nan, rate)  # a later rate must not be read

    def state(self) -> list[dict[str, np.ndarray]]:
        """Return the leaves of the optax state by their paths; of several leaves, the one at the parameter's index."""
        found: list[dict[str, np.ndarray]] = [{} for _ in self.params]
        for path, leaf in self.jax.tree_util.tree_flatten_with_path(self.opt_state)[0]:
            steps = [getattr(k, "name", getattr(k, "key", getattr(k, "idx", None))) for k in path]
            keys = ".".join(str(s) for s in steps)
            for i, entries in enumerate(found):
                trailing = steps[-1] if len(steps) and isinstance(steps[-1], int) else None
                if trailing in (None, i):
                    entries[keys if trailing is None else keys.rpartition(".")[0]] = np.asarray(leaf)
        return [_renamed(_by_last_name(entries), self.names) for entries in found]

    def save(self) -> Any:
        """Return state and parameters as NumPy arrays, pickled."""
        return pickle.dumps(self.jax.tree_util.tree_map(np.asarray, (self.opt_state, self.params)))

    def load(self, saved: Any) -> None:
        """Load ``saved`` as JAX arrays."""
        self.opt_state, self.params = self.jax.tree_util.tree_map(self.jax.numpy.asarray, pickle.loads(saved))


class Function:
    """``step(param, grad, state, *, lr, ...) -> (new param, new state)`` on NumPy (or ``backend``) arrays."""

    def __init__(
        self,
        step: Callable[..., Any],
        backend: str = "numpy",
        dtype: str = "float64",
        names: Mapping[str, str] | None = None,
    ):
        self.features = frozenset({"single"})
        self.function, self.dtype, self.names = step, dtype, dict(names or {})
        self.arrays = ArrayLibrary(backend, dtype)
        self.fields = _known(step, self.names)

    def init(self, config: Config, params: Arrays, single: bool = False) -> None:
        """Begin without a state; ``single``: in float32."""
        self.arrays = ArrayLibrary(self.arrays.backend, "float32" if single else self.dtype)
        self.config = copy.copy(config)
        self.given = arguments(self.function, config, self.fields)
        self.params = [self.arrays.of(p) for p in params]
        self.states: list[Any] = [None] * len(params)

    def step(self, grads: Arrays) -> Arrays:
        """Make one call per parameter. The gradients must not change."""
        for i, g in enumerate(grads):
            given = self.arrays.of(g)
            got = self.function(self.params[i], given, self.states[i], **self.given)
            if not (isinstance(got, (tuple, list)) and len(got) == 2):
                raise TypeError(
                    f"{_called(self.function)} must return (new_param, new_state), got "
                    + (f"{len(got)} values" if isinstance(got, (tuple, list)) else type(got).__name__)
                )
            self.params[i], self.states[i] = got
            g[...] = self.arrays.host(given)
        return [self.arrays.host(p) for p in self.params]

    def options(self, fields: Sequence[str]) -> Options:
        """Return `options_of` the target, without its first three arguments."""
        return options_of(self.function, fields, self.fields)

    def change(self, group: int | None = None, **factors: float) -> list[str]:
        """Multiply ``lr`` or ``weight_decay``; return the names that the function takes."""
        named = options_of(self.function, [*factors], self.fields).defaults
        for name in named:
            self.config[name] = self.config[name] * factors[name]
        self.given = arguments(self.function, self.config, self.fields)
        return [*named]

    def state(self) -> list[dict[str, np.ndarray]]:
        """Return the entries of the states, if these are dicts or named tuples."""
        return [_renamed(_flat(s), self.names) for s in self.states]

    def save(self) -> Any:
        """Return parameters and states, pickled."""
        return pickle.dumps((self.params, self.states))

    def load(self, saved: Any) -> None:
        """Load ``saved``, the value of `save`."""
        self.params, self.states = pickle.loads(saved)


class Reference:
    """A method on one of the array libraries; parameters of one shape run as a stack.

    ``target`` is its class or preset; None is the method of the config.
    """

    def __init__(
        self,
        backend: str = "numpy",
        dtype: str = "float64",
        target: Callable[..., Method] | None = None,
        names: Mapping[str, str] | None = None,
    ):
        self.arrays, self.target, self.names = ArrayLibrary(backend, dtype), target, dict(names or {})
        self.fields = {} if target is None else _known(target, self.names)

    def _method(self, config: Config) -> Method:
        """Return the method that the target makes of the config."""
        method = config.method if hasattr(config, "make") else None
        if method is not None and self.target in (None, type(method)):
            return method
        if self.target is None:
            raise TypeError("the config names no method")
        own = Config({k: v for k, v in config.items() if k != "lr"})
        own.at_default = config.at_default
        made = registry.made_by(self.target)
        if made is None or not made.decays:  # `step` does it
            own.pop("weight_decay", None)
        if made is None or isinstance(self.target, type):
            return self.target(**arguments(self.target, own, self.fields))
        return self._of_preset(self.target, made, own)

    def _of_preset(self, preset: Callable[..., Method], made: type[Method], own: Config) -> Method:
        """Return the method of ``preset``, a function, with the fields of its class that it does not take replaced."""
        taken = {*registry.arguments(preset), *self.fields}
        beside = {k: v for k, v in own.items() if k in made.symbols and not {k} & (taken | own.at_default)}
        rest = Config({k: v for k, v in own.items() if k not in beside})
        rest.at_default = own.at_default
        method = preset(**arguments(preset, rest, self.fields))
        try:
            return method.replace(**beside)
        except (TypeError, ValueError) as error:
            raise Unsupported(f"{_called(preset)} sets other fields: {error}") from error

    def init(self, config: Config, params: Arrays) -> None:
        """Make a method with these fields, and its states."""
        self.method, self.lr = self._method(config), config["lr"]
        self.decay = 0.0 if self.method.decays else config.get("weight_decay", 0.0)
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, p in enumerate(params):
            alike.setdefault(p.shape, []).append(i)
        self.stacks = [*alike.values()]
        self.params = [self._of(params, stack) for stack in self.stacks]
        self.states = [
            self.method.init(p, stack_ndim=int(len(stack) > 1))
            for p, stack in zip(self.params, self.stacks, strict=True)
        ]

    def change(self, group: int | None = None, **factors: float) -> list[str]:
        """Multiply ``lr`` or ``weight_decay``."""
        self.lr *= factors.get("lr", 1.0)
        self.decay *= factors.get("weight_decay", 1.0)
        if self.method.decays:
            self.method = self.method.replace(weight_decay=self.method.weight_decay * factors.get("weight_decay", 1.0))
        return [*factors]

    def _of(self, arrays: Arrays, stack: list[int]) -> Any:
        return self.arrays.of(np.stack([arrays[i] for i in stack]) if len(stack) > 1 else arrays[stack[0]])

    def step(self, grads: Arrays) -> Arrays:
        """Make ``x <- (1 - lr decay) x - lr direction``."""
        out: dict[int, np.ndarray] = {}
        for k, stack in enumerate(self.stacks):
            state = {f"state.{name}": a for name, a in leaves(self.states[k]) if hasattr(a, "shape")}
            given = {"grad": self._of(grads, stack), "param": self.params[k], **state}
            kept = {name: self.arrays.host(a) for name, a in given.items()}
            direction, self.states[k] = self.method.update(given["grad"], self.states[k], given["param"])
            for name, a in given.items():
                if not np.array_equal(self.arrays.host(a), kept[name], equal_nan=True):
                    raise Changed(f"update of {self.method.name} changed {name}, which it was given, in place")
            self.params[k] = (1 - self.lr * self.decay) * self.params[k] - self.lr * direction
            host = self.arrays.host(self.params[k])
            out |= zip(stack, host if len(stack) > 1 else [host], strict=True)
        return [out[i] for i in sorted(out)]

    def state(self) -> list[dict[str, np.ndarray]]:
        """Return the fields of the state; a sketch as its product."""
        out = {}
        for stack, state in zip(self.stacks, self.states, strict=True):
            flat = {key: self.arrays.host(value) for key, value in _flat(state, keep=True).items()}
            for place, i in enumerate(stack):
                out[i] = {k: v[place] if len(stack) > 1 and v.ndim else v for k, v in flat.items()}
        return [out[i] for i in sorted(out)]

    def primitive(self, name: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Run `precond_ref.numerics.roots.power`, or `precond_ref.numerics.sketch.update` on batches of rows."""
        from precond_ref.numerics import roots, sketch
        from precond_ref.numerics.template import arrays_of

        given = {key: self.arrays.of(value) for key, value in tensors.items()}
        if name == "roots.power":
            numerator, denominator = config["exponent"]
            result = roots.power(given["matrix"], numerator / denominator, config["ridge"])
            return {"result": self.arrays.host(result)}
        if name != "sketch.update":
            raise Unsupported(name)
        rows, size = given["rows"], config["size"]
        state = arrays_of(sketch.empty(rows.shape[-1], size), rows, array_namespace(rows))
        steps = []
        for i in range(rows.shape[0]):
            state = sketch.update(state, rows[i, ...], config["beta2"], config["tail_decay"], size=size)
            steps.append({key: self.arrays.host(value) for key, value in _flat({"": state}, keep=True).items()})
        names = {"product": "", "eigenvalues": ".eigenvalues", "escaped": ".escaped"}
        return {name: np.stack([step[key] for step in steps]) for name, key in names.items()}

    def save(self) -> Any:
        """Return parameters and states, which are never changed in place."""
        return list(self.params), list(self.states)

    def load(self, saved: Any) -> None:
        """Load ``saved``, the value of `save`."""
        self.params, self.states = map(list, saved)


class Command:
    """A program that reads requests and writes replies, one JSON object per line (docs/check.md has the protocol)."""

    def __init__(
        self,
        command: str | Sequence[str],
        dtype: str = "float64",
        names: Mapping[str, str] | None = None,
        limits: Limits | None = None,
    ):
        self.command = shlex.split(command) if isinstance(command, str) else list(command)
        if not self.command or shutil.which(self.command[0]) is None:
            raise ValueError(f"command must begin with a program that can be run, got {command!r}")
        self.dtype, self.names, self.limits = dtype, dict(names or {}), limits or Limits()
        self.program: Program | None = None
        self.reply: dict[str, Any] = {}

    def init(self, config: Config, params: Arrays) -> None:
        """Send ``{"op": "init", ...}``."""
        fields = {self.names.get(k, k): v for k, v in config.items()}
        self._ask({"op": "init", "config": fields, "dtype": self.dtype, "params": [_encode(p) for p in params]})

    def step(self, grads: Arrays) -> Arrays:
        """Send ``{"op": "step", "grads": ...}``."""
        self.reply = self._ask({"op": "step", "grads": [_encode(g) for g in grads]})
        return [_decode(p, self.dtype) for p in self.reply["params"]]

    def state(self) -> list[dict[str, np.ndarray]]:
        """Return ``"state"`` of the last reply."""
        states = self.reply.get("state", [])
        return [_renamed({k: _decode(v, "float64") for k, v in s.items()}, self.names) for s in states]

    def surroundings(self) -> None:
        """Return None: the settings of a program are not compared."""

    def worked(self) -> float:
        """Return the processor time of the program and its children, in seconds."""
        return worked(self.program.process.pid) if self.program else 0.0

    def close(self) -> None:
        """End the program by closing its input, or by force if it does not end."""
        if self.program is not None:
            self.program.close(patience=GRACE)
        self.program = None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        name = self.command[0]
        if self.program is None:
            self.program = Program(self.command, name, self.limits)
        try:
            line = self.program.ask(json.dumps(request).encode(), repr(request["op"]))
        except Exited as end:
            self.program = None
            raise RuntimeError(str(end)) from None
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            text = line[:80].decode(errors="backslashreplace")
            raise RuntimeError(f"{name} answered {text!r}, which is not JSON") from None
        if not isinstance(reply, dict):
            raise RuntimeError(f"{name} must answer with a JSON object, got {line[:80].decode(errors='replace')!r}")
        if "unsupported" in reply:
            raise Unsupported(str(reply["unsupported"]))
        if "error" in reply:
            raise ValueError(str(reply["error"]))
        return reply


def _encode(array: np.ndarray) -> dict[str, Any]:
    data = [x if math.isfinite(x) else str(x) for x in np.asarray(array, np.float64).ravel().tolist()]
    return {"shape": list(array.shape), "data": data}


def _decode(entry: Mapping[str, Any], dtype: str) -> np.ndarray:
    if any(x is None for x in entry["data"]):  # JSON.stringify writes null for NaN and infinities
        raise ValueError('an entry of "data" is null: write what is not finite as "nan", "inf" or "-inf"')
    return np.array([float(x) for x in entry["data"]], dtype=dtype).reshape(entry["shape"])


class ArrayLibrary:
    """Arrays of one library in one dtype, to and from NumPy."""

    def __init__(self, backend: str, dtype: str):
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        self.backend, self.dtype = backend, dtype
        self.xp: Any = importlib.import_module({"strict": "array_api_strict", "jax": "jax.numpy"}.get(backend, backend))
        if backend == "jax":  # also for float32, because gram64 computes in float64
            importlib.import_module("jax").config.update("jax_enable_x64", True)
        if backend == "torch":
            self.xp.set_num_threads(1)

    def of(self, array: np.ndarray) -> Any:
        """Return an array of the library with these values; never a view."""
        if self.backend == "jax":
            Programs.spare()
        return self.xp.asarray(np.array(array), dtype=getattr(self.xp, self.dtype))

    def host(self, array: Any) -> np.ndarray:
        """Return a NumPy array with these values."""
        if self.backend == "cupy":
            return array.get()
        if self.backend == "torch":
            return array.detach().cpu().numpy().copy()
        return np.array(array)


def _flat(state: Any, keep: bool = False, prefix: str = "") -> dict[str, Any]:
    """Return arrays of nested dicts and tuples by dotted names; a sketch or root as its product."""
    if hasattr(state, "_asdict"):
        state = state._asdict()
    if isinstance(state, Mapping) and {"basis", "eigenvalues"} <= state.keys():
        basis = state["basis"]
        product = (basis * state["eigenvalues"][..., None, :]) @ array_namespace(basis).matrix_transpose(basis)
        return {prefix: product} | {f"{prefix}.{name}": v for name, v in state.items() if name != "basis"}
    if isinstance(state, (list, tuple)):
        state = dict(enumerate(state))
    if isinstance(state, Mapping):
        found: dict[str, Any] = {}
        for key, value in state.items():
            found |= _flat(value, keep, f"{prefix}.{key}" if prefix else str(key))
        return found
    if hasattr(state, "shape"):
        if not keep and hasattr(state, "detach"):
            state = state.detach().cpu().numpy()
        return {prefix: state if keep else np.array(state)}
    return {}


def _by_last_name(entries: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the entries with short names: ``mu`` for ``0.mu``, if no other name ends in ``mu``."""
    short = [key.rpartition(".")[2] for key in entries]
    return {s if short.count(s) == 1 else key: v for (key, v), s in zip(entries.items(), short, strict=True)}


def _renamed(state: Mapping[str, np.ndarray], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Return the state; arrays that ``names`` maps also have our names."""
    ours = {k.removeprefix("state."): v for k, v in names.items() if k.startswith("state.")}
    return {**state, **{mine: state[theirs] for mine, theirs in ours.items() if theirs in state}}


def surroundings() -> dict[str, str]:
    """Return by name the settings of the process, which a subject must not change."""
    found = {f"os.environ[{key!r}]": value for key, value in os.environ.items()}
    found |= {f"the handler of {s.name}": str(signal.getsignal(s)) for s in signal.Signals}
    found |= {f"NumPy's errstate {key}": str(value) for key, value in np.geterr().items()}
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        found[f"sys.{name}"] = f"{stream!r} at {id(stream)}, closed: {getattr(stream, 'closed', None)}"
    with contextlib.suppress(OSError):
        found["the current folder"] = os.getcwd()
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    with contextlib.suppress(AttributeError):  # the module is still being imported
        if torch is not None:
            found["torch's default dtype"] = str(torch.get_default_dtype())
            found["torch's default device"] = str(torch.get_default_device())
            found["torch's grad mode"] = str(torch.is_grad_enabled())
        if jax is not None:
            found["jax_enable_x64"] = str(jax.config.jax_enable_x64)
    return found


def parse_map(entries: list[str]) -> dict[str, str]:
    """Return entries ``OURS=THEIRS`` as a dict; ValueError for other entries."""
    pairs = [entry.partition("=") for entry in entries]
    wrong = [entry for entry, (ours, _, theirs) in zip(entries, pairs, strict=True) if not (ours and theirs)]
    if wrong:
        raise ValueError(f"--map takes OURS=THEIRS, such as eps=epsilon, got {wrong[0]!r}")
    return {ours: theirs for ours, _, theirs in pairs}
