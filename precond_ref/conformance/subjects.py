"""What is under test: anything with ``init(config, params)`` and ``step(grads) -> params``, and wrappers that make one.

The interface is `Subject`, a job of ten lines. `wrap` makes one of

* a class or object that has ``init`` and ``step``: itself;
* a ``torch.optim.Optimizer`` class, or a function whose first argument is named ``params`` that returns one;
* a function that returns an optax transformation;
* a function ``step(param, grad, state, *, lr, ...) -> (new param, new state)``, ``state`` being None at first;
* a `precond_ref.Method`, on any of the array libraries;

and `Command` is a program in any language that speaks JSON lines.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import json
import math
import os
import pickle
import shlex
import shutil
import signal
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from array_api_compat import array_namespace

from precond_ref import registry
from precond_ref.conformance.processes import GRACE, Exited, Limits, Program
from precond_ref.protocol import Method

BACKENDS = ("numpy", "strict", "torch", "jax", "cupy")
Arrays = list[np.ndarray]


class Unsupported(NotImplementedError):
    """Raised by a subject for a configuration (or primitive) that it does not have: the case is skipped and counted."""


RAISED = (Exception, SystemExit)
"""What a subject may raise instead of doing something; nobody else ends the program by an exception."""
MOST = 500
"""Characters of a message that are shown, and a little."""


class Raised(Exception):
    """What a subject raised in a process of its own."""

    def __init__(self, *, name: str, message: str, text: str, usage: bool):
        super().__init__(text)
        self.name, self.message, self.usage = name, message, usage


class Refused(Raised, ValueError):
    """The same, of a ValueError or TypeError."""


def named(error: BaseException) -> str:
    """The name of an exception."""
    return error.name if isinstance(error, Raised) else type(error).__name__


def words(error: BaseException) -> str:
    """The message of an exception, also of one that cannot be printed; cut where it is long."""
    try:
        text = str(error).encode("utf-8", "backslashreplace").decode()
    except BaseException:
        return "(its message cannot be printed)"
    return text if len(text) <= MOST + 40 else f"{text[:MOST]}... ({len(text)} characters)"  # not cut twice


def said(error: BaseException) -> str:
    """The exception, and the line of the subject's code it came from; without one if this package raised it."""
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

    ``method`` is the reference method they make; ``at_default`` names those that have the reference's default.
    """

    make: Callable[[], Method]
    at_default: frozenset[str] = frozenset()

    @property
    def method(self) -> Method:
        """The reference method; ValueError or TypeError for a configuration that it refuses."""
        return self.make()


@runtime_checkable
class Subject(Protocol):
    """An implementation under test. Arrays are NumPy's, in the dtype of the run; lists have one entry per parameter.

    Beyond these two, a subject may have ``state() -> list of dicts of arrays`` (level 1), ``primitive(name, config,
    tensors) -> dict`` (level 2), and ``save() -> anything`` with ``load(saved)``, called on a fresh one after ``init``.
    """

    def init(self, config: Config, params: Arrays) -> None:
        """Start afresh; `Unsupported` or NotImplementedError for a configuration it does not have."""

    def step(self, grads: Arrays) -> Arrays:
        """Parameters after one more step."""


def load_target(target: str) -> Any:
    """``module:attribute``, the current folder first; ValueError saying what is missing."""
    return registry.load(target, said)


def wrap(
    target: Any, *, backend: str | None = None, dtype: str = "float64", names: Mapping[str, str] | None = None
) -> Subject:
    """A subject made of ``target``, one of the kinds above.

    ``names`` maps our names to the target's: of hyperparameters (``{"beta1": "betas.0"}`` for the first of a tuple
    ``betas``) and of states (``{"state.gram": "precond"}``). TypeError for what is none of the kinds.
    """
    names = dict(names or {})
    if isinstance(target, type) and issubclass(target, Method):
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
    """Keyword arguments for ``target``: the config under its names.

    A field that ``target`` does not have is left out where it has the reference's default, and `Unsupported` else.
    Without a mapping, ``beta1`` and ``beta2`` go to ``betas`` or ``b1`` and ``b2``, and ``lr`` to ``learning_rate``,
    where only those exist.
    """
    signature = _signature(target)
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.values())
    guesses = {"beta1": ("betas.0", "b1"), "beta2": ("betas.1", "b2"), "lr": ("learning_rate",)}
    given: dict[str, Any] = {}
    for field, value in config.items():
        name = names.get(field, field)
        if field not in names and field not in signature:
            name = next((n for n in guesses.get(field, ()) if n.partition(".")[0] in signature), field)
        head, dot, index = name.partition(".")
        if head not in signature and not open_ended:
            if field in names:
                raise ValueError(
                    f"{_called(target)} has no argument {head!r}, which {field} is mapped to; "
                    f"it has {', '.join(signature) or 'none'}"
                )
            if field in config.at_default:
                continue
            raise Unsupported(f"{_called(target)} has no argument for {field}={value!r}")
        if dot:
            default = signature[head].default if head in signature else ()
            parts = list(given.get(head, default if isinstance(default, (tuple, list)) else ()))
            parts += [None] * (int(index) + 1 - len(parts))
            parts[int(index)] = value
            given[head] = tuple(parts)
        else:
            given[head] = value
    return given


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

    def init(self, config: Config, params: Arrays, groups: Sequence[int] = ()) -> None:
        """New parameters and a new optimizer, with the parameters in groups of these sizes if there are any."""
        dtype = getattr(self.torch, self.dtype)
        self.params = [self.torch.nn.Parameter(self.torch.tensor(p, dtype=dtype)) for p in params]
        fields = {k: v for k, v in self.names.items() if not k.startswith("state.")}
        given = arguments(_without_first(self.make), config, fields)
        if not groups:
            self.optimizer = self.make(self.params, **given)
            return
        rest = iter(self.params)
        try:
            self.optimizer = self.make([{"params": [*itertools.islice(rest, size)]} for size in groups], **given)
        except RAISED as error:
            raise Unsupported(f"{_called(self.make)} takes no parameter groups: {said(error)}") from error

    def step(self, grads: Sequence[np.ndarray | None]) -> Arrays:
        """One ``optimizer.step()``; the gradients must come back as they were. None: no gradient."""
        for p, g in zip(self.params, grads, strict=True):
            p.grad = None if g is None else self.torch.tensor(g, dtype=p.dtype)
        self.optimizer.step()
        for p, g in zip(self.params, grads, strict=True):
            if g is None:
                continue
            if p.grad is None:
                g[...] = np.nan  # the caller sees that its gradient is gone
            else:
                g[...] = p.grad.detach().cpu().numpy()
        return [p.detach().cpu().numpy().copy() for p in self.params]

    def state(self) -> list[dict[str, np.ndarray]]:
        """``optimizer.state`` of each parameter, under our names."""
        return [_renamed(_flat(self.optimizer.state[p]), self.names) for p in self.params]

    def save(self) -> Any:
        """``state_dict()`` and the parameters, pickled."""
        return pickle.dumps((self.optimizer.state_dict(), [p.detach() for p in self.params]))

    def load(self, saved: Any) -> None:
        """Into a fresh optimizer."""
        state, params = pickle.loads(saved)
        with self.torch.no_grad():
            for mine, theirs in zip(self.params, params, strict=True):
                mine.copy_(theirs)
        self.optimizer.load_state_dict(state)


def _without_first(make: Callable[..., Any]) -> Callable[..., Any]:
    """``make`` without its first argument, the parameters, and, if a class, ``**kwargs``, which it may ignore."""
    parameters = [*_signature(make).values()][1:]
    if isinstance(make, type):
        parameters = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]

    def stub(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    stub.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    stub.__name__ = _called(make)
    return stub


class Optax:
    """A function of hyperparameters that returns an optax transformation (its updates are added)."""

    def __init__(self, make: Callable[..., Any], dtype: str = "float64", names: Mapping[str, str] | None = None):
        import jax

        if dtype == "float64":
            settings: Any = jax.config
            settings.update("jax_enable_x64", True)
        self.jax, self.make, self.dtype, self.names = jax, make, dtype, dict(names or {})

    def init(self, config: Config, params: Arrays) -> None:
        """A new transformation and its state."""
        fields = {k: v for k, v in self.names.items() if not k.startswith("state.")}
        self.transformation: Any = self.make(**arguments(self.make, config, fields))
        if not all(hasattr(self.transformation, name) for name in ("init", "update")):
            raise TypeError(
                f"{_called(self.make)} must return an optax transformation (with init and update), "
                f"got {type(self.transformation).__name__}; `precond-ref check --help` lists what a target can be"
            )
        self.params = [self.jax.numpy.asarray(p, dtype=self.dtype) for p in params]
        self.opt_state = self.transformation.init(self.params)

    def step(self, grads: Arrays) -> Arrays:
        """``update``, then the updates added."""
        given = [self.jax.numpy.asarray(g, dtype=self.dtype) for g in grads]
        updates, self.opt_state = self.transformation.update(given, self.opt_state, self.params)
        self.params = [p + u for p, u in zip(self.params, updates, strict=True)]
        return [np.array(p) for p in self.params]

    def state(self) -> list[dict[str, np.ndarray]]:
        """Leaves of the optax state by the names on the way to them; of several, the one at the parameter's index."""
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
        """State and parameters as NumPy arrays, pickled."""
        return pickle.dumps(self.jax.tree_util.tree_map(np.asarray, (self.opt_state, self.params)))

    def load(self, saved: Any) -> None:
        """Back as JAX arrays."""
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
        self.function, self.arrays, self.names = step, ArrayLibrary(backend, dtype), dict(names or {})

    def init(self, config: Config, params: Arrays) -> None:
        """No state yet."""
        fields = {k: v for k, v in self.names.items() if not k.startswith("state.")}
        self.given = arguments(self.function, config, fields)
        self.params = [self.arrays.of(p) for p in params]
        self.states: list[Any] = [None] * len(params)

    def step(self, grads: Arrays) -> Arrays:
        """One call per parameter; the gradients must come back as they were."""
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

    def state(self) -> list[dict[str, np.ndarray]]:
        """Entries of the states, if they are dicts or named tuples."""
        return [_renamed(_flat(s), self.names) for s in self.states]

    def save(self) -> Any:
        """Parameters and states, pickled."""
        return pickle.dumps((self.params, self.states))

    def load(self, saved: Any) -> None:
        """The same."""
        self.params, self.states = pickle.loads(saved)


class Reference:
    """A method on one of the array libraries; parameters of one shape are run as a stack.

    ``target`` is its class, the config's own method if None.
    """

    def __init__(
        self,
        backend: str = "numpy",
        dtype: str = "float64",
        target: type[Method] | None = None,
        names: Mapping[str, str] | None = None,
    ):
        self.arrays, self.target, self.names = ArrayLibrary(backend, dtype), target, dict(names or {})

    def _method(self, config: Config) -> Method:
        """What the config makes of the target."""
        method = config.method if hasattr(config, "make") else None
        if method is not None and self.target in (None, type(method)):
            return method
        if self.target is None:
            raise TypeError("the config names no method")
        own = Config({k: v for k, v in config.items() if k != "lr"})
        own.at_default = config.at_default
        if not self.target.decays:  # `step` does it
            own.pop("weight_decay", None)
        return self.target(**arguments(self.target, own, self.names))

    def init(self, config: Config, params: Arrays) -> None:
        """A method with these fields."""
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

    def _of(self, arrays: Arrays, stack: list[int]) -> Any:
        return self.arrays.of(np.stack([arrays[i] for i in stack]) if len(stack) > 1 else arrays[stack[0]])

    def step(self, grads: Arrays) -> Arrays:
        """``x <- (1 - lr decay) x - lr direction``."""
        out: dict[int, np.ndarray] = {}
        for k, stack in enumerate(self.stacks):
            direction, self.states[k] = self.method.update(self._of(grads, stack), self.states[k], self.params[k])
            self.params[k] = (1 - self.lr * self.decay) * self.params[k] - self.lr * direction
            host = self.arrays.host(self.params[k])
            out |= zip(stack, host if len(stack) > 1 else [host], strict=True)
        return [out[i] for i in sorted(out)]

    def state(self) -> list[dict[str, np.ndarray]]:
        """Fields of the state; a sketch as its product."""
        out = {}
        for stack, state in zip(self.stacks, self.states, strict=True):
            flat = {key: self.arrays.host(value) for key, value in _flat(state, keep=True).items()}
            for place, i in enumerate(stack):
                out[i] = {k: v[place] if len(stack) > 1 and v.ndim else v for k, v in flat.items()}
        return [out[i] for i in sorted(out)]

    def primitive(self, name: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """`precond_ref.numerics.roots.power`, and `precond_ref.numerics.sketch.update` on batches of rows."""
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
        """Parameters and states (they are never changed in place)."""
        return list(self.params), list(self.states)

    def load(self, saved: Any) -> None:
        """The same."""
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
        """Sends ``{"op": "init", ...}``."""
        fields = {self.names.get(k, k): v for k, v in config.items()}
        self._ask({"op": "init", "config": fields, "dtype": self.dtype, "params": [_encode(p) for p in params]})

    def step(self, grads: Arrays) -> Arrays:
        """Sends ``{"op": "step", "grads": ...}``."""
        self.reply = self._ask({"op": "step", "grads": [_encode(g) for g in grads]})
        return [_decode(p, self.dtype) for p in self.reply["params"]]

    def state(self) -> list[dict[str, np.ndarray]]:
        """What the last reply gave as ``"state"``."""
        states = self.reply.get("state", [])
        return [_renamed({k: _decode(v, "float64") for k, v in s.items()}, self.names) for s in states]

    def surroundings(self) -> None:
        """The program's are its own."""

    def close(self) -> None:
        """End the program by closing its input; by force if that does not do."""
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
    if any(x is None for x in entry["data"]):  # what JSON.stringify makes of NaN and of infinities
        raise ValueError('an entry of "data" is null: write what is not finite as "nan", "inf" or "-inf"')
    return np.array([float(x) for x in entry["data"]], dtype=dtype).reshape(entry["shape"])


class ArrayLibrary:
    """Arrays of one library in one dtype, to and from NumPy."""

    def __init__(self, backend: str, dtype: str):
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        self.backend, self.dtype = backend, dtype
        self.xp: Any = importlib.import_module({"strict": "array_api_strict", "jax": "jax.numpy"}.get(backend, backend))
        if backend == "jax":  # for float32 too: gram64 computes in float64
            importlib.import_module("jax").config.update("jax_enable_x64", True)
        if backend == "torch":
            self.xp.set_num_threads(1)

    def of(self, array: np.ndarray) -> Any:
        """An array of the library with these values; never a view."""
        return self.xp.asarray(np.array(array), dtype=getattr(self.xp, self.dtype))

    def host(self, array: Any) -> np.ndarray:
        """A NumPy array with these values."""
        if self.backend == "cupy":
            return array.get()
        if self.backend == "torch":
            return array.detach().cpu().numpy().copy()
        return np.array(array)


def _flat(state: Any, keep: bool = False, prefix: str = "") -> dict[str, Any]:
    """Arrays of nested dicts and tuples by dotted names; a sketch or root (basis, eigenvalues) as its product."""
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
    """``0.mu`` as ``mu`` where no other ends so."""
    short = [key.rpartition(".")[2] for key in entries]
    return {s if short.count(s) == 1 else key: v for (key, v), s in zip(entries.items(), short, strict=True)}


def _renamed(state: Mapping[str, np.ndarray], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The state with what ``names`` maps under our names too."""
    ours = {k.removeprefix("state."): v for k, v in names.items() if k.startswith("state.")}
    return {**state, **{mine: state[theirs] for mine, theirs in ours.items() if theirs in state}}


def surroundings() -> dict[str, str]:
    """What a subject shares with the rest of its process and has to leave alone, by name."""
    found = {f"os.environ[{key!r}]": value for key, value in os.environ.items()}
    found |= {f"the handler of {s.name}": str(signal.getsignal(s)) for s in signal.Signals}
    found |= {f"NumPy's errstate {key}": str(value) for key, value in np.geterr().items()}
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        found[f"sys.{name}"] = f"{stream!r} at {id(stream)}, closed: {getattr(stream, 'closed', None)}"
    with contextlib.suppress(OSError):
        found["the current folder"] = os.getcwd()
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    with contextlib.suppress(AttributeError):  # while it is imported
        if torch is not None:
            found["torch's default dtype"] = str(torch.get_default_dtype())
            found["torch's default device"] = str(torch.get_default_device())
            found["torch's grad mode"] = str(torch.is_grad_enabled())
        if jax is not None:
            found["jax_enable_x64"] = str(jax.config.jax_enable_x64)
    return found


def method_name(name: str) -> str:
    """The constructor that ``name`` means, in any case; ValueError naming those there are."""
    named = registry.parse(name)
    if named.fields or named.name not in registry.constructors():
        raise ValueError(
            f"there are no test vectors for {named.text}: --method takes a name that `precond-ref list` prints"
        )
    return named.name


def parse_map(entries: list[str]) -> dict[str, str]:
    """``OURS=THEIRS`` as a dict."""
    pairs = [entry.partition("=") for entry in entries]
    wrong = [entry for entry, (ours, _, theirs) in zip(entries, pairs, strict=True) if not (ours and theirs)]
    if wrong:
        raise ValueError(f"--map takes OURS=THEIRS, such as eps=epsilon, got {wrong[0]!r}")
    return {ours: theirs for ours, _, theirs in pairs}
