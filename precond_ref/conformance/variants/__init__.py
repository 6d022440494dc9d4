"""The methods once more, in plain NumPy, each with its plausible mistakes as named flags.

A family module exports ``VARIANTS``, a `Variants` per class name. Its ``walk(config, shape, flags)`` is a generator
that runs ONE parameter: it is sent ``(gradient, parameter)`` and yields ``(direction, state)``::

    def sgd(config, shape, flags):
        buffer, out = np.zeros(shape), None
        while True:
            g, x = yield out
            buffer = config["momentum"] * buffer + g
            out = buffer.copy(), {"buffer": buffer}

``config`` holds every field of the method; ``state`` the arrays by the names of our state's fields (``grams.0`` for the
parts of a tuple; a sketch as its product). Every deviation is one ``if "name" in flags``. A flag's text continues
"it is ASGO ...", so that ``with eps outside the root`` makes a sentence. `run` adds the flags of `COMMON`, which any
method can have.

The same text computes in float64 and, given mpmath numbers, with 50 digits (`arithmetic`): without flags it is what the
conformance vectors are built from. It shares nothing with `precond_ref.methods` and `precond_ref.numerics`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import combinations, product
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from precond_ref.conformance import arithmetic
from precond_ref.conformance.arithmetic import Array, all_finite, array, eigh, spacing
from precond_ref.conformance.vectors import Case, load
from precond_ref.protocol import Method

Walk = Generator[Any, tuple[np.ndarray, np.ndarray], None]

FAMILIES = ("agd", "asgo", "elementwise", "shampoo", "sketchy", "root_free", "inverse_free", "mbf")
"""Modules of this folder that export ``VARIANTS``."""

COMMON: Mapping[str, str] = MappingProxyType(
    {
        "sign": "with the step's sign flipped (it ascends)",
        "direction-late": "with the direction of the update before (none at the first)",
        "decay-coupled": "with weight decay added to the gradient instead of shrinking the parameter",
        "decay-without-lr": "with weight decay not multiplied by the learning rate",
        "decay-after": "with weight decay applied after the step instead of before it",
        "decay-ignored": "without weight decay",
    }
)
"""Flags that `run` itself knows."""


@dataclass(frozen=True)
class Variants:
    """A method's generator, its flags, and the groups of flags of which at most one can be on."""

    walk: Callable[[Mapping[str, Any], tuple[int, ...], frozenset[str]], Walk]
    flags: Mapping[str, str]
    exclusive: tuple[frozenset[str], ...] = ()


class Trace(NamedTuple):
    """What a run leaves: arrays (T, *shape), stack axes included, and after each update the state and, where asked for,
    the condition number and the decompositions whose errors are in a statistic."""

    directions: Array
    params: Array
    states: list[dict[str, Array]]
    kappas: list[Any]
    decompositions: list[int]


@cache
def registry() -> dict[str, Variants]:
    """Variants by class name."""
    found: dict[str, Variants] = {}
    for family in FAMILIES:
        found |= importlib.import_module(f"{__name__}.{family}").VARIANTS
    return found


def of(method: Method) -> Variants:
    """Variants of a method; KeyError where there are none."""
    return registry()[type(method).__name__]


def compatible(variants: Variants, flags: frozenset[str]) -> bool:
    """Whether the flags can be on together."""
    exclusive = (*variants.exclusive, frozenset(f for f in COMMON if f.startswith("decay")))
    return all(len(flags & group) < 2 for group in exclusive)


def choices(variants: Variants, size: int) -> list[frozenset[str]]:
    """Sets of ``size`` flags, the common ones included, that can be on together."""
    sets = map(frozenset, combinations([*variants.flags, *COMMON], size))
    return [flags for flags in sets if compatible(variants, flags)]


def rivals(these: Iterable[str], those: Iterable[str]) -> tuple[frozenset[str], ...]:
    """Groups for `Variants.exclusive`: none of ``these`` with any of ``those``."""
    return tuple(frozenset(pair) for pair in product(these, those))


def effective(cases: Iterable[Case]) -> frozenset[str]:
    """Flags that change a parameter of one of the (trace) cases, which are of one constructor, by more than 1e-9."""
    seen: set[str] = set()
    for case in cases:
        method, tensors = case.make(), load(case)
        arrays = tensors["param"], tensors["grads"]
        given: dict[str, Any] = {"lr": case.lr, "decay": case.decay, "stack_ndim": case.stack_ndim}
        right = run(method, *arrays, **given).params
        for flag in {*of(method).flags, *COMMON} - seen:
            wrong = run(method, *arrays, **given, flags=frozenset({flag})).params
            if not np.allclose(wrong, right, rtol=1e-9, atol=0):
                seen.add(flag)
    return frozenset(seen)


def describe(variants: Variants, flags: frozenset[str]) -> str:
    """The flags' texts, joined."""
    texts = {**variants.flags, **COMMON}
    return ", and ".join(texts[flag] for flag in texts if flag in flags)


def run(
    method: Method,
    param: np.ndarray,
    grads: np.ndarray,
    *,
    lr: float,
    decay: float = 0.0,
    stack_ndim: int = 0,
    flags: frozenset[str] = frozenset(),
) -> Trace:
    """Run ``method`` with ``flags`` on given gradients (T, *shape); the first ``stack_ndim`` axes are looped over.

    Raises KeyError for a flag that is not the method's.
    """
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    arrays = np.asarray(param, np.float64), np.asarray(grads, np.float64)
    return walk(type(method).__name__, fields, *arrays, lr=lr, decay=decay, stack_ndim=stack_ndim, flags=flags)


def walk(
    name: str,
    fields: Mapping[str, Any],
    param: Array,
    grads: Array,
    *,
    lr: float,
    decay: float = 0.0,
    stack_ndim: int = 0,
    flags: frozenset[str] = frozenset(),
    conditioned: bool = False,
) -> Trace:
    """`run` for the class ``name`` with these fields, in the arithmetic of what is given.

    ``conditioned``: with the trace's condition numbers and counts of decompositions.
    """
    variants = registry()[name]
    if unknown := flags - {*variants.flags, *COMMON}:
        raise KeyError(f"{name} has no variant {', '.join(sorted(unknown))}")
    stack, shape = param.shape[:stack_ndim], param.shape[stack_ndim:]
    members = [
        _run_one(variants, fields, param[i], grads[:, *i], lr, decay, flags, conditioned) for i in np.ndindex(*stack)
    ]
    steps = len(grads)
    directions = np.stack([m.directions for m in members], axis=1).reshape((steps, *stack, *shape))
    params = np.stack([m.params for m in members], axis=1).reshape((steps, *stack, *shape))
    states = [
        {
            key: np.stack([m.states[t][key] for m in members]).reshape((*stack, *np.shape(members[0].states[t][key])))
            for key in members[0].states[t]
        }
        for t in range(steps)
    ]
    kappas = [max(m.kappas[t] for m in members) for t in range(steps)]
    return Trace(directions, params, states, kappas, members[0].decompositions)


def _run_one(
    variants: Variants,
    fields: Mapping[str, Any],
    x: Array,
    grads: Array,
    lr: float,
    decay: float,
    flags: frozenset[str],
    conditioned: bool,
) -> Trace:
    steps = variants.walk(fields, np.shape(x), flags)
    next(steps)
    out = Trace([], [], [], [], [])
    previous = np.zeros(np.shape(x))
    with np.errstate(all="ignore"), conditioning(conditioned) as noted:  # a deviation may divide by zero
        for g in grads:
            direction, state = steps.send((g + decay * x if "decay-coupled" in flags else g, x))
            if "direction-late" in flags:
                direction, previous = previous, direction
            step = lr * direction * (-1 if "sign" in flags else 1)
            shrink = 1 - decay * (1 if "decay-without-lr" in flags else lr)
            if flags & {"decay-coupled", "decay-ignored"}:
                shrink = 1.0
            x = shrink * (x - step) if "decay-after" in flags else shrink * x - step
            kept = {key: array(value) for key, value in state.items()}
            kappa, decompositions = noted.after_update()
            for record, value in zip(out, (direction, x, kept, kappa, decompositions), strict=True):
                record.append(value)
    return out._replace(directions=np.stack(out.directions), params=np.stack(out.params))


class Conditioning:
    """Condition numbers that a walk notes for the manifest."""

    def __init__(self) -> None:
        self.of_update: list[Any] = []
        self.last: Any = 1
        self.largest: Any = 1
        self.sketches, self.sketched = 0, False

    def after_update(self) -> tuple[Any, int]:
        """Of the update just made: the condition number, and how many decompositions' errors are in a statistic.

        The first is the last one noted, if a root was kept, and nothing below that of any sketch update so far.
        """
        self.last = max(self.of_update, default=self.last)
        self.sketches += self.sketched
        self.of_update, self.sketched = [], False
        return max(self.last, self.largest), max(self.sketches, 1)


_CONDITIONING: ContextVar[Conditioning | None] = ContextVar("conditioning", default=None)


@contextmanager
def conditioning(wanted: bool = True) -> Iterator[Conditioning]:
    """Collect what is noted inside, if it is ``wanted``."""
    noted = Conditioning()
    token = _CONDITIONING.set(noted if wanted else None)
    try:
        yield noted
    finally:
        _CONDITIONING.reset(token)


def note(compute: Callable[..., Any], *arguments: Any, stays: bool = False) -> None:
    """Record the condition number ``compute(*arguments)`` if anyone wants it; ``stays``: of a sketch."""
    if (noted := _CONDITIONING.get()) is None:
        return
    if stays:
        noted.largest, noted.sketched = max(noted.largest, compute(*arguments)), True
    else:
        noted.of_update.append(compute(*arguments))


# ---- what the families share ----------------------------------------------------------------------------------------


def ema(old: Any, new: Any, decay: float) -> Any:
    """``decay * old + (1 - decay) * new``."""
    return decay * old + (1 - decay) * new


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a / b`` elementwise with 0/0 = 0."""
    return np.where((a == 0) & (b == 0), 0.0, a / np.where((a == 0) & (b == 0), 1.0, b))


def spectral(matrix: Array, function: Callable[[Array], Array], keep_zeros: bool, exponent: float | Fraction) -> Array:
    """``Q f(w) Q^T``; without ``keep_zeros`` eigenvalues that are rounding (at most n u max) give zero.

    f is a power of about this ``exponent``, which says how its values tell the condition number.
    """
    if not all_finite(matrix):
        return np.full(matrix.shape, np.nan)
    w, q = eigh((matrix + matrix.T) / 2)
    w = np.maximum(w, 0)
    live = np.full(w.shape, True) if keep_zeros else w > len(w) * spacing(w) * w.max(initial=0)
    values = function(np.where(live, w, 1.0))
    note(lambda: arithmetic.power(spread(values[live]), abs(1 / Fraction(exponent))))
    return (q * np.where(live, values, 0.0)) @ q.T


def power(matrix: Array, exponent: float | Fraction, ridge: float = 0.0) -> Array:
    """``(A + ridge I)^exponent``; ``ridge = 0``: of the pseudo-inverse."""
    return spectral(matrix, lambda w: arithmetic.power(w + ridge, exponent), ridge > 0, exponent)


def outside(matrix: Array, exponent: float | Fraction, shift: float = 0.0) -> Array:
    """``(A^{-exponent} + shift I)^{-1}``; ``shift = 0``: of the pseudo-inverse."""
    return spectral(matrix, lambda w: 1 / (arithmetic.power(w, -exponent) + shift), shift > 0, exponent)


def spread(values: Array) -> Any:
    """Largest over smallest; 1 of nothing."""
    return max(values) / min(values) if len(values) else 1.0


def unfold(tensor: np.ndarray, axis: int) -> np.ndarray:
    """(d_1, ..., d_k) -> (d_axis, product of the others)."""
    return np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)


def multiply(tensor: np.ndarray, matrix: np.ndarray, axis: int) -> np.ndarray:
    """``matrix`` multiplied onto one axis of ``tensor``."""
    return np.moveaxis(np.tensordot(matrix, tensor, axes=(1, axis)), 0, axis)


def due(t: int, every: int, flags: frozenset[str]) -> bool:
    """Whether update ``t`` = 1, 2, ... renews roots; flags of `EVERY`."""
    if "every-ignored" in flags:
        return True
    if "every-late" in flags:
        return t % every == 0
    if "every-multiples" in flags:
        return t == 1 or t % every == 0
    return (t - 1) % every == 0


EVERY = {
    "every-ignored": "with roots renewed at every update",
    "every-late": "with roots renewed at updates every, 2 every, ... instead of 1, 1 + every, ... (identity before)",
    "every-multiples": "with roots renewed at updates 1, every, 2 every, ... instead of 1, 1 + every, 1 + 2 every",
}
