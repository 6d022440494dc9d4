"""Random updates of all methods, each of them checked: ``python tools/fuzz.py`` makes a million, in minutes.

A case is a method or preset with drawn fields, a shape, a stack of parameters, a dtype, a library, and up to two dozen
gradients: of all scales, sparse, of rank one, ill-conditioned, repeated, constant, zero, and sometimes with NaN or an
infinity in one member. In one case of twenty a PyTorch optimizer runs instead.

The checks, by the names that violations have:

  raises     no exception and no warning comes out of an update, whatever the gradient; NumPy's own warnings about
             floating point come out only if a value is not finite
  purity     no argument is changed; results share no memory with the arguments, except a state with the one before
  kind       library, dtype and shape are kept, the step is counted
  stack      two members of a stack, run alone and with `scalars` and `xp` given, have the directions of the stack
  library    NumPy and PyTorch agree in float64
  refusal    a bad call raises ValueError or TypeError with a message, and changes nothing
  nonfinite  a member with NaN or an infinity has a direction of NaN (elementwise methods: not finite in these entries),
             `diagnose` reports it, and the other members have the same bits as without it; moderate gradients give
             finite directions with the default fields
  eps        a first or repeated gradient, which is in the range of its statistic, has no longer a direction with eps
             (delta, damping) than with 0, the pseudo-inverse
  names      a group that names its method by a string runs that method with its own defaults
  refused    a bad hyperparameter, or a parameter that became another, is refused by `step` before anything moves
  torn       an exception at any call inside of `step` leaves each parameter stepped with its state, or untouched
  resume     a loaded state_dict goes on with the same bits
  mutated    a mutated state_dict is refused with ValueError, which changes nothing, or goes on
  bytes      what `torch.save` writes of one parameter's state is its size

`stack` and `library` allow 256 u, and beyond it the error that conditioning explains: the member runs again with noise
in its gradients and its arithmetic (`Noisy`), and may differ by eight times the effect of the noise. Arithmetic in
bfloat16 has noise of its unit roundoff, 2^-8, at each rounding, so that twice the effect is enough. `library` leaves
out the entries that a NaN or an infinity has reached.

An update is one member of a stack through one call, or one parameter through one step of an optimizer; the calls for
comparison are not counted. The exit code is 1 if a check was violated. A violation is printed as lines of Python that
repeat it in the folder ``tools``; steps, fields and axes that it does not need are left out:

  from fuzz import *
  violations(Case('Adam', {'beta1': 0.5}, shape=(3,), steps=(Step('sparse'),)))
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import dataclasses
import faulthandler
import inspect
import itertools
import math
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from array_api_compat import array_namespace

from precond_ref import SGD, Adam, Method
from precond_ref.numerics import orthogonal
from precond_ref.registry import constructors

Array = Any
Rng = np.random.Generator
MAKERS: dict[str, Callable[..., Method]] = constructors()
MODERATE = ("normal", "rank one", "constant", "sparse", "zero")
KINDS = ("normal", *MODERATE, "ill-conditioned", "mixed", "rows", "extreme", "repeat", "repeat")
OTHER = {"numpy": "torch", "torch": "numpy"}
XP = {"numpy": array_namespace(np.empty(0)), "torch": array_namespace(torch.empty(0))}
BETA2 = "beta2 of .* is the weight of the new term|these coefficients send the singular value of a gradient"
"""Warnings that belong to drawn fields."""
RIDGES = ("eps", "delta", "damping")
"""Fields that shorten a direction."""


@dataclass(frozen=True, repr=False)
class Record:
    """A record that is printed as Python, without the fields that have their defaults."""

    def __repr__(self) -> str:
        told: list[str] = []
        for place, f in enumerate(dataclasses.fields(self)):
            value, default = getattr(self, f.name), {} if f.default is dataclasses.MISSING else f.default
            if value != default:
                told.append(repr(value) if place == len(told) else f"{f.name}={value!r}")
        return f"{type(self).__name__}({', '.join(told)})"

    def but(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, repr=False)
class Step(Record):
    """One gradient of a case; ``bad`` is a member and the value that replaces one of its entries."""

    kind: str = "normal"
    scale: float = 1.0
    seed: int = 0
    bad: tuple[int, str] | None = None
    refresh: Any = None


@dataclass(frozen=True, repr=False)
class Case(Record):
    """A method or preset by name with its fields, shape, library and dtype, and the gradients."""

    make: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = (3, 2)
    stack: tuple[int, ...] = ()
    dtype: str = "float64"
    library: str = "numpy"
    steps: tuple[Step, ...] = (Step(),)


class Found(NamedTuple):
    """A violation: the name of the check, and the fault in words."""

    check: str
    text: str


# ---- what is drawn --------------------------------------------------------------------------------------------------


def pick(rng: Rng, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def real(rng: Rng) -> float:
    """Return a number >= 0: bounds, all scales, near 1 from below."""
    near = 1 - float(f"{10 ** rng.uniform(-12, 0):.2g}")
    scales = (10 ** rng.uniform(-50, -3), 10 ** rng.uniform(-12, 4), rng.uniform())
    return pick(rng, (pick(rng, (0.0, 0.5, 1.0)), near, *(float(f"{x:.3g}") for x in scales)))


def choices(make: Callable[..., Method], name: str) -> list[str]:
    """Return the strings that an argument may be, from the constructor's error about another string."""
    required = {p.name: 1 for p in inspect.signature(make).parameters.values() if p.default is p.empty}
    try:
        make(**{**required, name: "?"})
    except ValueError as error:
        rule = str(error).rpartition(", got")[0]
        return re.findall(r"'([^']+)'", rule) or rule.partition(" one of ")[2].partition(" with ")[0].split(", ")
    raise LookupError(f"{name} takes any string")


TUPLES: Mapping[str, Callable[[Rng], Any]] = {
    "exponents": lambda rng: tuple(pick(rng, (None, 0.0, 0.25, 0.5, real(rng))) for _ in range(rng.integers(4))),
    "ignored_axes": lambda rng: tuple(int(i) for i in rng.integers(4, size=rng.integers(3))),
    "blocks": lambda rng: pick(rng, (None, 1, 2, 3, (1, 2), (2, 2))),
}
"""Fields whose values no error message lists."""


def value_of(rng: Rng, make: Callable[..., Method], parameter: inspect.Parameter) -> Any:
    """Return a value for an argument of ``make``, which may refuse it."""
    kind = str(parameter.annotation)
    if parameter.name in TUPLES:
        return TUPLES[parameter.name](rng)
    if "None" in kind and rng.random() < 0.3:
        return None
    if kind.startswith("bool"):
        return bool(rng.integers(2))
    if kind.startswith("int"):
        return pick(rng, (0, 1, 2, 3, 4, 8, 40))
    if kind.startswith("float"):  # a learning rate has its square in float32
        return float(np.clip(real(rng), 1e-15, 1e15)) if parameter.name == "learning_rate" else real(rng)
    texts = [re.sub(r"\b[ab]\b", lambda _: str(rng.integers(1, 4)), t) for t in choices(make, parameter.name)]
    several = "tuple" in kind and rng.random() < 0.3
    return tuple(pick(rng, texts) for _ in range(rng.integers(1, 4))) if several else pick(rng, texts)


def built(name: str, fields: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", BETA2, UserWarning)
        return MAKERS[name](**fields)


def draw_fields(rng: Rng, name: str) -> dict[str, Any]:
    """Return fields that the constructor takes; a refused field is drawn again."""
    make = MAKERS[name]
    parameters = inspect.signature(make).parameters
    share = pick(rng, (0.0, 0.3, 1.0))
    drawn = [n for n, p in parameters.items() if p.default is p.empty or rng.random() < share]
    fields = {n: value_of(rng, make, parameters[n]) for n in drawn}
    while True:
        try:
            built(name, fields)
            return fields
        except (ValueError, TypeError) as error:
            blamed = re.split("[ =]", str(error))[0]
            again = blamed if blamed in fields else pick(rng, list(fields))
            fields[again] = value_of(rng, make, parameters[again])


def draw(rng: Rng, names: list[str], libraries: list[str]) -> Any:
    """Return a `Case`, or one time of twenty an ``OptimizerCase``."""
    if "torch" in libraries and rng.random() < 0.05:
        from fuzz_torch import draw as draw_optimizer

        return draw_optimizer(rng, names)
    while True:
        name = pick(rng, names)
        fields = draw_fields(rng, name)
        method = built(name, fields)
        ndim = pick(rng, [n for n in (0, 1, 1, 2, 2, 2, 2, 3, 4) if method.ndims[0] <= n <= method.ndims[1]])
        shape = [int(d) for d in rng.integers(1, (1, 9, 9, 5, 4)[ndim], ndim)]
        if shape and rng.random() < 0.02:
            shape[rng.integers(ndim)] = 0
        stack = tuple(int(d) for d in rng.integers(1, 5, pick(rng, (0, 1, 1, 1, 2))))
        with contextlib.suppress(ValueError):  # heads that do not divide the rows, a structure too many
            method.init(np.zeros((*stack, *shape)), stack_ndim=len(stack))
            break
    every = max(method.every, getattr(method, "inverse_every", 1))
    calm, steps = rng.random() < 0.5, []
    for _ in range(pick(rng, (1, 2, 3, 4, 6, 10, 24))):
        kind = pick(rng, KINDS)
        moves = not calm and kind not in ("mixed", "extreme", "repeat")
        scale = float(f"{10 ** rng.uniform(-30, 30):.1g}") if moves else 1.0
        bad = (int(rng.integers(math.prod(stack))), pick(rng, ("nan", "inf", "-inf"))) if rng.random() < 0.05 else None
        refresh = pick(rng, (None, None, True, False if every > 1 else None))
        if refresh is not None and every > 1 and "MBF" in name and rng.random() < 0.5:
            refresh = (bool(rng.integers(2)), refresh)
        steps.append(Step(kind, scale, int(rng.integers(10**6)), bad, refresh))
    dtype, library = pick(rng, ("float32", "float64")), pick(rng, libraries)
    return Case(name, fields, tuple(shape), stack, dtype, library, tuple(steps))


def gradient(case: Case, step: Step, previous: Array) -> Array:
    """Return the gradient of a step, all finite."""
    rng, info, ndim = np.random.default_rng(step.seed), np.finfo(case.dtype), len(case.shape)
    full = (*case.stack, *case.shape)
    g: Array = rng.standard_normal(full)
    if step.kind == "repeat" and previous is not None:
        g = previous * pick(rng, (1.0, -1.0, 0.5, 3.0))
    elif step.kind in ("zero", "constant"):
        g = np.full(full, float(step.kind == "constant"))
    elif step.kind == "sparse":
        g = g * (rng.random(full) < 0.2)
    elif step.kind == "rank one":
        axes = [[d if i == axis else 1 for i, d in enumerate(case.shape)] for axis in range(ndim)]
        g = math.prod((rng.standard_normal((*case.stack, *axis)) for axis in axes), start=np.ones(full))
    elif step.kind == "ill-conditioned" and ndim:
        g = g * 10.0 ** -np.linspace(0, pick(rng, (3, 6, 12)), case.shape[-1])
        if ndim > 1:
            g = g @ np.linalg.qr(rng.standard_normal((case.shape[-1],) * 2))[0]
    elif step.kind == "mixed":
        g = g * 10 ** rng.uniform(-30, 30, full)
    elif step.kind == "rows" and ndim:
        g = g * 10 ** rng.uniform(-15, 15, (case.shape[0], *(1,) * (ndim - 1)))
    elif step.kind == "extreme":
        tiny, largest = float(info.tiny), float(info.max)
        values = (0.0, 1.0, largest, largest / 2, largest**0.5, tiny, tiny**0.5, float(info.smallest_subnormal))
        g = rng.choice(values, full) * rng.choice((-1, 1), full)
    with np.errstate(over="ignore", under="ignore"):
        g = np.clip(np.asarray(g, "float64") * step.scale, -info.max, info.max).astype(case.dtype)
    return np.asfortranarray(g) if step.seed % 2 and ndim else np.ascontiguousarray(g).reshape(full)


# ---- arrays and states of both libraries ----------------------------------------------------------------------------


def array(library: str, values: Array) -> Array:
    """Return a copy as an array of the library."""
    return np.array(values) if library == "numpy" else torch.from_numpy(np.array(values))


def host(value: Array) -> Array:
    """Return a NumPy array that shares memory with ``value``."""
    return value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def leaves(state: Any) -> list[Array]:
    if isinstance(state, tuple):
        return [leaf for part in state for leaf in leaves(part)]
    return [state] if hasattr(state, "dtype") else []


def exchanged(state: Any, old: Array, new: Array) -> Any:
    """Return ``state`` with ``new`` in the place of the array ``old``."""
    if isinstance(state, tuple):
        parts = [exchanged(part, old, new) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return new if state is old else state


def bits(*values: Array) -> list[bytes]:
    return [host(value).tobytes() for value in values]


def kind(value: Array) -> tuple[Any, ...]:
    return "torch" if isinstance(value, torch.Tensor) else "numpy", str(value.dtype), tuple(value.shape)


def apart(a: Array, b: Array) -> float:
    """Return the largest difference over the largest entry; infinite if only one of the two is finite."""
    a, b = (np.asarray(host(x), "float64") for x in (a, b))
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return math.inf
    a, b = (np.where(np.isfinite(x), x, 0.0) for x in (a, b))
    size = max(np.max(np.abs(b), initial=0.0), np.max(np.abs(a), initial=0.0), 1e-290)
    return float(np.max(np.abs(a / size - b / size), initial=0.0))


class Noisy:
    """A namespace whose results are off by ``level`` units in the last place; arguments of LAPACK are off in norm.

    Values that are rounded to bfloat16, also with NumPy, are off by its unit roundoff instead, whatever the level.
    """

    FACTORIZATIONS = ("eigh", "svd", "svdvals", "solve", "cholesky", "inv", "qr")

    def __init__(self, xp: Any, rng: Rng, level: float) -> None:
        self.xp, self.rng, self.level = xp, rng, level

    def __getattr__(self, name: str) -> Any:
        if name == "bfloat16":
            return getattr(self.xp, name, name)
        value = getattr(self.xp, name)
        if name == "linalg":
            return Noisy(value, self.rng, self.level)
        if not callable(value) or isinstance(value, type):
            return value
        if name in self.FACTORIZATIONS:
            return lambda first, *rest, **options: value(self.noisy(first, True), *rest, **options)
        return lambda *given, **options: self.noisy(value(*given, **options))

    def astype(self, x: Any, dtype: Any, **options: Any) -> Any:
        if dtype != self.bfloat16:
            return self.noisy(self.xp.astype(x, dtype, **options))
        rounded = orthogonal._rounding(x, "bfloat16", self.xp)
        return rounded(self.off(rounded(x), 2.0**-8 * (self.level > 0)))

    def noisy(self, x: Any, in_norm: bool = False) -> Any:
        if not (hasattr(x, "shape") and str(x.dtype).endswith(("float32", "float64"))):
            return x
        return self.off(x, self.level * array_namespace(x).finfo(x.dtype).eps, in_norm)

    def off(self, x: Any, by: float, in_norm: bool = False) -> Any:
        xp = array_namespace(x)
        unit = by * xp.asarray(self.rng.choice((-1.0, 0.0, 1.0), tuple(x.shape)), dtype=x.dtype)
        if in_norm and 0 not in x.shape:
            return x + unit * xp.max(xp.abs(x), axis=(-2, -1), keepdims=True)
        return xp.where(xp.isfinite(x), x + unit * x, x)  # an infinity without noise is not NaN


# ---- the checks of the core -----------------------------------------------------------------------------------------


class Runner:
    """One case, step by step; ``found`` has the first violation of each check."""

    def __init__(self, case: Case) -> None:
        self.case, self.method, self.xp = case, built(case.make, case.fields), XP[case.library]
        self.members = list(np.ndindex(case.stack))
        self.found: dict[str, Found] = {}
        self.grads: list[Array] = []
        self.tainted: Array = np.zeros((*case.stack, *case.shape), bool)
        """Entries that a bad gradient has reached: PyTorch's averages may have NaN where NumPy's are infinite."""
        self.floats: list[str] = []
        """Warnings that NumPy would give."""
        rng = np.random.default_rng(case.steps[0].seed)
        self.param = rng.standard_normal((*case.stack, *case.shape)).astype(case.dtype)
        self.alone = [pick(rng, self.members), pick(rng, self.members)] if case.stack else []

    def report(self, check: str, text: str) -> None:
        self.found.setdefault(check, Found(check, f"step {len(self.grads)}: {text}"))

    def call(self, function: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """Return the result of the function; None, and a violation, if it raises."""
        try:
            return function(*given, **options)
        except Exception as error:
            self.report("raises", f"{function.__name__}: {type(error).__name__}: {str(error)[:200]}")
            return None

    def run(self) -> list[Found]:
        quiet = np.errstate(all="call", under="ignore", call=lambda what, _: self.floats.append(what))
        with warnings.catch_warnings(), quiet:
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", BETA2, UserWarning)
            self.steps()
        return list(self.found.values())

    def steps(self) -> None:
        case, method, other = self.case, self.method, OTHER[self.case.library]
        param = array(case.library, self.param)
        state = self.call(method.init, param, stack_ndim=len(case.stack))
        alone = {i: method.init(array(case.library, self.param[i])) for i in self.alone}
        strange = case.dtype == "float32" or any(s.kind in ("extreme", "mixed") for s in case.steps)
        strange |= getattr(method, "centered", False)  # a difference that `Noisy` does not make noisy
        twin = None if strange else method.init(array(other, self.param), stack_ndim=len(case.stack))
        base = self.without_ridge(state)
        clean: Array = None
        for step in case.steps:
            clean = gradient(case, step, clean)
            g, where = self.spoiled(clean, step)
            self.tainted = self.tainted if where is None else self.tainted | where
            self.grads.append(g)
            grad = array(case.library, g)
            if step.seed % 4 == 0:  # often enough for what it costs
                self.refusal(step, grad, state, param)
            before, self.floats = bits(grad, param, *leaves(state)), []
            result = self.call(method.update, grad, state, param, refresh=step.refresh)
            if result is None:
                return
            if bits(grad, param, *leaves(state)) != before:
                self.report("purity", "update changed what it was given")
            direction, new = result
            self.outputs(grad, state, param, direction, new)
            if where is not None:
                self.nonfinite(step, clean, state, param, direction, new, where)
            alone = self.one_by_one(step, grad, alone, param, direction)
            twin = self.other_library(step, g, twin, direction)
            base = self.ridge(step, grad, base, param, direction, clean)
            state = new
        self.call(method.diagnose, state)

    def spoiled(self, clean: Array, step: Step) -> tuple[Array, Array]:
        """Return the gradient with its bad entry, and a mask of the entry."""
        if step.bad is None or clean.size == 0:
            return clean, None
        where = np.zeros(clean.shape, bool)
        member = self.members[step.bad[0] % len(self.members)]
        entry = np.random.default_rng(step.seed).integers(self.case.shape) if self.case.shape else ()
        where[(*member, *entry)] = True
        spoiled = np.array(clean)  # with the axes in the same order in memory, which gives the other members' bits
        spoiled[where] = float(step.bad[1])
        return spoiled, where

    def outputs(self, grad: Array, state: Any, param: Array, direction: Array, new: Any) -> None:
        old, made = leaves(state), leaves(new)
        if kind(direction) != kind(grad):
            self.report("kind", f"the direction is {kind(direction)} for {kind(grad)}")
        kept = type(new) is type(state) and [kind(a) for a in made] == [kind(a) for a in old]
        if not kept or new.step != len(self.grads):
            self.report("kind", f"the state is {new!r} after {state!r}")
        finite = [bool(np.isfinite(host(a)).all()) for a in (direction, *made, grad)]
        floats = set(self.floats) - ({"overflow"} if any(s.kind == "extreme" for s in self.case.steps) else set())
        if floats and all(finite):
            self.report("raises", f"all is finite, and NumPy warns: {', '.join(sorted(floats))}")
        moderate = all(s.kind in MODERATE and s.scale == 1 and s.bad is None for s in self.case.steps)
        if moderate and set(self.case.fields) <= {"size"} and not finite[0]:
            self.report("nonfinite", "moderate gradients give a direction that is not finite")
        given, made, old = ([host(a) for a in arrays] for arrays in ((grad, param), made, old))
        pairs = [*((host(direction), a) for a in (*given, *made, *old)), *itertools.product(made, given)]
        pairs += itertools.combinations(made, 2)
        if any(np.may_share_memory(a, b) and np.shares_memory(a, b) for a, b in pairs if a.size):
            self.report("purity", "what update returns shares memory with what it was given, or with itself")

    # ---- refusals

    def refusal(self, step: Step, grad: Array, state: Any, param: Array) -> None:
        rng = np.random.default_rng(step.seed)
        what, bad = pick(rng, (self.bad_array, self.bad_state, self.bad_field))(rng, grad, state, param)
        before = bits(grad, param, *leaves(state))
        try:
            bad()
            self.report("refusal", f"{what} is accepted")
        except (ValueError, TypeError) as error:
            if not str(error).strip():
                self.report("refusal", f"{what}: no message")
        except Exception as error:
            self.report("refusal", f"{what}: {type(error).__name__}: {str(error)[:200]}")
        if bits(grad, param, *leaves(state)) != before:
            self.report("refusal", f"{what} changed what was given")

    def bad_array(self, rng: Rng, grad: Array, state: Any, param: Array) -> tuple[str, Any]:
        xp, name = self.xp, pick(rng, ("grad", "param", "init"))
        bads = [xp.zeros(grad.shape, dtype=d) for d in (xp.int32, xp.complex64, xp.bool)] + [None, 1.0, "x", [1.0]]
        if name != "init":
            other = xp.zeros(grad.shape, dtype=self.other_dtype())
            bads += [other, grad[..., None], array(OTHER[self.case.library], host(grad))]
        value = pick(rng, bads)
        what = f"{name} {kind(value) if hasattr(value, 'dtype') else repr(value)}"
        if name == "init":
            return what, lambda: self.method.init(value)
        return what, lambda: self.method.update(**{"grad": grad, "state": state, "param": param, name: value})

    def bad_state(self, rng: Rng, grad: Array, state: Any, param: Array) -> tuple[str, Any]:
        foreign = (Adam() if isinstance(self.method, SGD) else SGD(momentum=0.5)).init(param)
        whole = pick(rng, (None, (), tuple(state), foreign))
        if rng.random() < 0.2:
            return f"diagnose of {type(whole).__name__}", lambda: self.method.diagnose(whole)
        bads = [(f"state {type(whole).__name__}", whole)]
        name, some = pick(rng, state._fields), leaves(state)
        if name != "step" and getattr(state, name) is not None:
            bads += [(f"state.{name} {bad}", state._replace(**{name: bad})) for bad in (None, [1.0])]
        a = pick(rng, some) if some else grad
        if some and a.ndim and 0 not in (*grad.shape, *a.shape):
            bads.append((f"array {kind(a)} twice as long", exchanged(state, a, self.xp.concat([a, a], axis=-1))))
            bads.append(
                (f"array {kind(a)} of another dtype", exchanged(state, a, self.xp.astype(a, self.other_dtype())))
            )
        what, bad = pick(rng, bads)
        return what, lambda: self.method.update(grad, bad, param)

    def bad_field(self, rng: Rng, grad: Array, state: Any, param: Array) -> tuple[str, Any]:
        fields = dataclasses.fields(self.method)
        if not fields or rng.random() < 0.3:
            ndim = pick(rng, (-1, param.ndim + 1, 0.5, "1"))
            return f"stack_ndim={ndim!r}", lambda: self.method.init(param, stack_ndim=ndim)
        one = pick(rng, fields)
        bad = pick(rng, bad_values(str(one.type)))
        return f"{one.name}={bad!r}", lambda: self.method.replace(**{one.name: bad})

    def other_dtype(self) -> Any:
        return self.xp.float64 if self.case.dtype == "float32" else self.xp.float32

    # ---- stacks and libraries

    def one_by_one(self, step: Step, grad: Array, alone: Any, param: Array, direction: Array) -> Any:
        scalars, kept = self.method.scalars(len(self.grads)), {}
        for i, state in alone.items():
            options = {"scalars": scalars, "refresh": step.refresh, "xp": self.xp}
            result = self.call(self.method.update, grad[i], state, param[i], **options)
            if result is not None:
                self.compare("stack", f"member {i}", direction[i], result[0], i, self.case.library)
                kept[i] = result[1]
        return kept

    def other_library(self, step: Step, g: Array, state: Any, direction: Array) -> Any:
        if state is None:
            return None
        other = OTHER[self.case.library]
        result = self.call(self.method.update, array(other, g), state, array(other, self.param), refresh=step.refresh)
        if result is None:
            return None
        ours, theirs = (np.where(self.tainted, 0.0, host(d)) for d in (direction, result[0]))
        for i in self.members:
            self.compare("library", f"on {other}, member {i}", ours[i], theirs[i], i, "numpy", "torch")
        return result[1]

    def compare(self, check: str, what: str, got: Array, expected: Array, member: Any, *libraries: str) -> None:
        gap, explained = apart(got, expected), 0.0
        allowed = 2 if self.rounds_to_bfloat16 else 8
        if gap <= 256 * np.finfo(self.case.dtype).eps or check in self.found:
            return
        # a factor at the edge of what is definite may give NaN in all runs of one library, or alone
        for library, whole in itertools.product(libraries, (False, True)):
            runs = self.with_noise(member, library, whole)
            base = next(runs)
            for noisy in runs:
                explained = max(explained, apart(noisy, base))
                if gap <= allowed * explained:
                    return
        self.report(check, f"{what} differs by {gap:.1e} of its largest entry, rounding explains {explained:.1e}")

    @property
    def rounds_to_bfloat16(self) -> bool:
        return getattr(self.method, "compute_dtype", None) is not None and self.method.root == "newton_schulz"

    def with_noise(self, member: Any, library: str, whole: bool) -> Iterator[Array]:
        """Yield the last direction of a member, alone or in its stack, without noise and then with more and more."""
        part, stack = ((), len(self.case.stack)) if whole else (member, 0)
        for seed, level in enumerate((0.0, 2.0, 2.0, 8.0, 8.0, 32.0, 32.0, 128.0, 128.0)):
            xp: Any = Noisy(XP[library], np.random.default_rng(seed), level)
            direction = param = array(library, self.param[part])
            state = self.method.init(param, stack_ndim=stack)
            with np.errstate(all="ignore"):
                for g, step in zip(self.grads, self.case.steps, strict=False):
                    grad = xp.noisy(array(library, g[part]))
                    try:
                        direction, state = self.method.update(grad, state, param, refresh=step.refresh, xp=xp)
                    except (np.linalg.LinAlgError, RuntimeError):  # which `raises` reports where there is no noise
                        direction = param * math.nan
                        break
            yield direction[member] if whole else direction

    # ---- what is not finite

    def nonfinite(
        self, step: Step, clean: Array, state: Any, param: Array, direction: Array, new: Any, where: Array
    ) -> None:
        method, axes = self.method, tuple(range(len(self.case.stack), where.ndim))
        flat = method.stack_ndim(state) is None  # each entry stands for itself
        bad = where if flat else np.any(where, axis=axes, keepdims=True) & np.ones(where.shape, bool)
        got = host(direction)[bad]
        if not (~np.isfinite(got) if flat else np.isnan(got)).all():
            share = f"{np.isnan(got).sum()} of {got.size} entries"
            self.report("nonfinite", f"a gradient with {step.bad and step.bad[1]} gives NaN in {share} of its member")
        report = self.call(method.diagnose, new)
        if report is not None and leaves(new):
            finite = None if report.finite is None else host(report.finite)
            if finite is None or np.any(finite if flat else finite[np.any(where, axis=axes)]):
                self.report("nonfinite", f"diagnose says finite={finite} of bad={step.bad}")
        result = self.call(method.update, array(self.case.library, clean), state, param, refresh=step.refresh)
        others = [np.where(np.isnan(d), math.nan, d) for d in (host(x)[~bad] for x in (direction, *(result or ())[:1]))]
        if len(set(bits(*others))) > 1:
            self.report("nonfinite", "the other members have other bits than without it")

    # ---- eps

    def without_ridge(self, state: Any) -> Any:
        """Return the method with and without its ridge, and a state, if the second has longer directions; else None."""
        m, case = self.method, self.case
        name = next((n for n in RIDGES if getattr(m, n, 0) != 0), None)
        if (
            name is None or m.elementwise or 0 in case.shape or "IFShampoo" in case.make
            or m.weight_decay or getattr(m, "root", "eigh") != "eigh"
            or getattr(m, "trace_scaling", 0)  # eps floors the trace, too
            or (case.make in ("AdaFD", "FDSON") and m.size == 1)  # such a sketch has no range
            or getattr(m, "heads", None) or getattr(m, "layout", "") == "contiguous"  # `in_range` does not cut
        ):  # fmt: skip
            return None
        raw = {} if getattr(m, "rms", None) is None else {"rms": None}  # which would hide the length
        try:
            return m.replace(**raw), m.replace(**raw, **{name: 0.0}), state, name
        except ValueError:  # RFShampoo needs it for beta2=1
            return None

    def ridge(self, step: Step, grad: Array, base: Any, param: Array, direction: Array, clean: Array) -> Any:
        """Compare with the direction without the ridge, while gradients are multiples of the first."""
        mutual = any(name in self.case.make for name in ("RFShampoo", "KLShampoo"))  # factors depend on each other
        repeated = step.kind == "repeat" and not mutual
        if base is None or step.bad or step.refresh is not None or (len(self.grads) > 1 and not repeated):
            return None
        raw, zero, state, name = base
        with_ridge = (direction, None) if raw == self.method else self.call(raw.update, grad, state, param)
        without = self.call(zero.update, grad, state, param)
        if with_ridge is None or without is None:
            return None
        for i in self.members:
            long, longest = (float(np.max(np.abs(host(d)[i]))) for d in (with_ridge[0], without[0]))
            if math.isfinite(longest) and in_range(clean[i]) and not long <= 1.01 * clean[i].size ** 0.5 * longest:
                value = f"{name}={getattr(self.method, name):g}"
                self.report("eps", f"{value} gives member {i} an entry of {long:.2g}, 0 gives {longest:.2g} at most")
        return raw, zero, without[1], name


def in_range(g: Array) -> bool:
    """Return whether each direction of ``g`` is clearly in the numerical range of its statistic, or is rounding."""
    u = float(np.finfo(g.dtype).eps)
    if not 1e-8 < np.max(np.abs(g)) < 1e8:
        return False
    for axis in range(g.ndim):
        unfolded = np.moveaxis(g, axis, 0).reshape(g.shape[axis], -1).astype("float64")
        s, n = np.linalg.svd(unfolded, compute_uv=False) / np.linalg.norm(unfolded), max(unfolded.shape)
        if np.any((s > n * u) & (s < 30 * math.sqrt(n * u))):
            return False
    return True


def bad_values(annotation: str) -> tuple[Any, ...]:
    """Return values that no field of this type may have."""
    if annotation.startswith("float"):
        return math.nan, math.inf, -math.inf, -0.5, "0.5", True, [0.5], np.full(2, 0.5)
    if annotation.startswith("int"):
        return -1, 1.5, "3", True
    return (3, 0.5, "nonsense") if "None" in annotation else (3, 0.5, "nonsense", None)


# ---- running, shrinking, reporting ----------------------------------------------------------------------------------


def examined(case: Any) -> tuple[list[Found], int]:
    """Return the violations of a case, and its number of updates."""
    if isinstance(case, Case):
        runner = Runner(case)
        return runner.run(), len(runner.grads) * len(runner.members)
    from fuzz_torch import examined as examined_optimizer

    return examined_optimizer(case)


def violations(case: Any) -> list[Found]:
    """Return the violations of a case."""
    return examined(case)[0]


def smaller(case: Any) -> Iterator[Any]:
    """Yield the case with one part left out or simplified."""
    if not isinstance(case, Case):
        from fuzz_torch import smaller as smaller_optimizer

        yield from smaller_optimizer(case)
        return
    steps, changes = case.steps, list[dict[str, Any]]()
    changes += [{"steps": steps[:cut]} for cut in (1, 2, len(steps) // 2) if 0 < cut < len(steps)]
    changes += [{"steps": steps[:i] + steps[i + 1 :]} for i in range(len(steps)) if len(steps) > 1]
    changes += [{"stack": stack} for stack in ((), (2,), case.stack[1:]) if len(stack) < len(case.stack)]
    for name, value in case.fields.items():
        others = {k: v for k, v in case.fields.items() if k != name}
        plain = () if value in (0.5, 1, 2) else (0.5, 1, 2)
        changes += [{"fields": others}, *({"fields": {**others, name: v}} for v in plain)]
    for axis, d in enumerate(case.shape):
        less = [n for n in (1, 2, d - 1) if 0 < n < d]
        changes += [{"shape": (*case.shape[:axis], n, *case.shape[axis + 1 :])} for n in less]
    changes += [{"dtype": "float64"}, {"library": "numpy"}]
    for i, step in enumerate(steps):
        for name, value in (("bad", None), ("refresh", None), ("scale", 1.0), ("kind", "normal"), ("seed", 0)):
            changes.append({"steps": (*steps[:i], step.but(**{name: value}), *steps[i + 1 :])})
    yield from (other for other in (case.but(**change) for change in changes) if other != case)


def label(case: Any, found: Found) -> tuple[str, str]:
    """Return the label by which violations are counted: check and method; for an optimizer its action."""
    if isinstance(case, Case):
        return found.check, case.make
    return found.check, re.sub(r"\d+", "*", re.split(r" = |: | is | at ", found.text)[0])


def message(found: Found) -> list[str]:
    """Return the first words of a violation, without numbers; two violations with other first words differ."""
    text = re.sub(r"^step \d+: ", "", found.text)
    return re.sub(r"\d+|-?inf\b|nan\b", "*", text).split()[:4]


def shrunk(case: Any, wanted: tuple[str, str], tries: int = 400) -> tuple[Any, Found]:
    """Return a smaller case that violates the same check with the same message, and the violation."""
    best = next((f for f in violations(case) if label(case, f) == wanted), None)
    if best is None:
        return case, Found(wanted[0], "not violated alone: what ran before it in the process matters")
    first = message(best)

    def violated(candidate: Any) -> Found | None:
        alike = (f for f in violations(candidate) if label(candidate, f) == wanted and message(f) == first)
        return next(alike, None)

    going = True
    while going:
        going = False
        for candidate in itertools.islice(smaller(case), max(tries, 0)):
            tries -= 1
            with contextlib.suppress(ValueError, TypeError):  # the constructor's, or those of init
                found = violated(candidate)
                if found is not None:
                    case, best, going = candidate, found, True
                    break
    return case, best


class Work(NamedTuple):
    """The results of some cases: updates, cases, and by `label` the number of violations and of the first case."""

    updates: int = 0
    cases: int = 0
    found: Mapping[tuple[str, str], tuple[int, int]] = MappingProxyType({})

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        found = dict(self.found)
        for key, (times, first) in other.found.items():
            before, earlier = found.get(key, (0, first))
            found[key] = before + times, min(earlier, first)
        return Work(self.updates + other.updates, self.cases + other.cases, found)


def drawn(seed: int, number: int, names: list[str], libraries: list[str]) -> Any:
    """Return case ``number`` of a seed."""
    return draw(np.random.default_rng((seed, number)), names, libraries)


def work(seed: int, numbers: range, names: list[str], libraries: list[str]) -> Work:
    """Run some cases. A case that hangs ends the process, which prints its place."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(600, exit=True, file=sys.__stderr__ or sys.stderr)
    done = Work()
    for number in numbers:
        case = drawn(seed, number, names, libraries)
        found, updates = examined(case)
        done += Work(updates, 1, {label(case, f): (1, number) for f in found})
    faulthandler.cancel_dump_traceback_later()
    return done


def campaign(
    seed: int, updates: int, seconds: float, names: list[str], libraries: list[str], jobs: int,
    progress: Callable[[Work], None] = lambda _: None,
) -> Work:  # fmt: skip
    """Run the first cases of a seed, until they have made ``updates`` updates."""
    done, begin = Work(), time.monotonic()
    chunks = (range(start, start + 25) for start in itertools.count(0, 25))
    with contextlib.ExitStack() as stack:
        pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) if jobs > 1 else None
        if pool is not None:
            stack.callback(pool.shutdown, cancel_futures=True)
        pending: set[Future[Work]] = set()
        while done.updates < updates and time.monotonic() - begin < seconds:
            if pool is None:
                done += work(seed, next(chunks), names, libraries)
            else:
                while len(pending) < 2 * jobs:
                    pending.add(pool.submit(work, seed, next(chunks), names, libraries))
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    done += future.result()
            progress(done)
    return done


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 1 if a check was violated, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=1_000_000, metavar="N", help="at least (default: a million)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end then, whatever was done")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other cases (default: 0)")
    parser.add_argument("--method", action="append", metavar="NAME", help="only this method or preset (repeatable)")
    parser.add_argument("--namespace", choices=("numpy", "torch"), help="only arrays of it; numpy: no optimizers")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    options = parser.parse_args(arguments)
    names = options.method or list(MAKERS)
    if unknown := sorted(set(names) - set(MAKERS)):
        parser.error(f"no method is called {', '.join(unknown)}; there are {', '.join(MAKERS)}")
    libraries = [options.namespace] if options.namespace else ["numpy", "torch"]
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console, begin = Console(stderr=True), time.monotonic()
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=options.updates)

        def progress(done: Work) -> None:
            bar.update(task, completed=done.updates, description=f"{done.cases} cases, {len(done.found)} violations")

        done = campaign(options.seed, options.updates, options.seconds, names, libraries, options.jobs, progress)
    wall = time.monotonic() - begin
    print(f"seed {options.seed}: {done.updates:,} updates in {done.cases:,} cases, {wall:.0f} s", end="; ")
    print(f"{len(done.found)} violations", flush=True)
    for (check, what), (times, first) in sorted(done.found.items()):
        case, found = shrunk(drawn(options.seed, first, names, libraries), (check, what))
        print(f"\n{check}, {what}: in {times} cases, the first is number {first}; made smaller:")
        print(f"  from {'fuzz' if isinstance(case, Case) else 'fuzz_torch'} import *")
        print(f"  violations({case})\n  # {found.text}", flush=True)
    return int(bool(done.found))


if __name__ == "__main__":
    sys.exit(main())
