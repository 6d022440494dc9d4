"""The second implementation of the methods, in plain NumPy, each with its plausible mistakes as named flags.

A family module exports ``VARIANTS``, a `Variants` per `Method.name`. Its ``walk(config, shape, flags)`` is a generator
that runs ONE parameter: it gets ``(gradient, parameter)`` by ``send`` and yields ``(direction, state)``::

    def sgd(config, shape, flags):
        buffer, out = np.zeros(shape), None
        while True:
            g, x = yield out
            buffer = config["momentum"] * buffer + g
            out = buffer.copy(), {"buffer": buffer}

``config`` has every field of the method, and as ``rate`` the learning rate of the update; ``state`` has the arrays by
the names of our state's fields (``grams.0`` for the parts of a tuple; a sketch as its product). Every deviation is one
``if "name" in flags``. The text of a flag continues "it is ASGO ...", so that ``with eps outside the root`` makes a
sentence. `run` adds the flags of `COMMON` and `GENERIC`, which any method can have.

The same text computes in float64 and, for mpmath numbers, with 50 digits (`arithmetic`). Without flags it makes the
conformance vectors. It shares no code with `precond_ref.methods` and `precond_ref.numerics`.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import chain, combinations, count, pairwise, permutations, product, repeat
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from precond_ref.conformance import arithmetic
from precond_ref.conformance.arithmetic import Array, all_finite, array, eigh, spacing
from precond_ref.conformance.vectors import Case, load
from precond_ref.protocol import Method

Walk = Generator[Any, tuple[np.ndarray, np.ndarray], None]

FAMILIES = tuple(module.name for module in pkgutil.iter_modules(__path__))
"""Modules of this folder, which export ``VARIANTS``."""

COMMON: Mapping[str, str] = MappingProxyType(
    {
        "sign": "with the step's sign flipped (it ascends)",
        "direction-late": "with the direction of the update before (none at the first)",
        "decay-coupled": "with weight decay added to the gradient instead of shrinking the parameter",
        "decay-without-lr": "with weight decay not multiplied by the learning rate",
        "decay-after": "with weight decay applied after the step instead of before it",
        "decay-ignored": "without weight decay",
        "decay-first-rate": "with weight decay times the first learning rate, whatever the rate is now",
    }
)
"""Flags that `run` itself treats."""
OPEN = frozenset({"other-completion"})
"""Flags that are no mistakes, for what a method leaves open: the columns of a basis in the place of dependent ones."""
GENERIC: Mapping[str, str] = MappingProxyType(
    {
        "unmoved": "without any step: the parameter does not move",
        "zero-direction": "with a direction of zero: weight decay alone moves the parameter",
        "unpreconditioned": "without preconditioning or momentum: the step is the plain gradient",
        "unpreconditioned-ball": "without preconditioning: the step is the gradient with heavy-ball momentum",
        "unpreconditioned-average": "without preconditioning: the step is the averaged gradient",
        "restarted": "with every update like the first: nothing is accumulated, and no update is counted",
        "memoryless": "with nothing accumulated: every update starts from an empty state, though updates are counted",
        "counter-stuck": "with a counter that stays at the first update",
        "zero-skipped": "with a gradient of zeros skipped: neither the parameter nor the state changes",
        "zero-forgotten": "with a state that a gradient of zeros does not change, though the parameter makes its step",
        "zero-skipped-counted": "with a gradient of zeros that is counted, but changes no parameter and no average",
        "zero-forgotten-counted": "with averages that a gradient of zeros does not change, though it is counted and "
        "the parameter makes its step",
    }
)
"""Flags that `run` itself treats, of mistakes that replace the method; such a flag is on alone."""
RATES = ("beta1", "beta2", "momentum", "riemannian_momentum", "graft_beta2", "decay")
"""Fields that a mistake may exchange: ``beta1-for-beta2`` is a flag like those of `GENERIC`."""


@dataclass(frozen=True)
class Variants:
    """A method's generator, its flags, and the groups of flags of which at most one can be on."""

    walk: Callable[[Mapping[str, Any], tuple[int, ...], frozenset[str]], Walk]
    flags: Mapping[str, str]
    exclusive: tuple[frozenset[str], ...] = ()
    rates: tuple[str, ...] = ()
    """The fields of `RATES` that the method has; `of` sets them."""

    @property
    def generic(self) -> dict[str, str]:
        """The flags of `GENERIC`, and those of one rate in the place of another."""
        exchanged = {f"{a}-for-{b}": f"with {a} in the place of {b}" for a, b in permutations(self.rates, 2)}
        return {**GENERIC, **exchanged}

    @property
    def texts(self) -> dict[str, str]:
        """All flags that the method can have, with their texts."""
        return {**self.flags, **COMMON, **self.generic}


class Trace(NamedTuple):
    """The results of a run: arrays (T, *shape), stack axes included, and after each update the state.

    If asked for, also the condition number, the number of decompositions with errors in a statistic, and whether zeros
    of a statistic were left out.
    """

    directions: Array
    params: Array
    states: list[dict[str, Array]]
    kappas: list[Any]
    decompositions: list[int]
    singular: list[bool]


@cache
def registry() -> dict[str, Variants]:
    """Return the variants by `Method.name`."""
    found: dict[str, Variants] = {}
    for family in FAMILIES:
        found |= importlib.import_module(f"{__name__}.{family}").VARIANTS
    return found


def of(method: Method) -> Variants:
    """Return the variants of a method; KeyError if there are none."""
    fields = {f.name for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    rates = tuple(rate for rate in RATES if rate in fields)
    return dataclasses.replace(registry()[method.name], rates=rates)


def compatible(variants: Variants, flags: frozenset[str]) -> bool:
    """Return whether the flags can be on together."""
    if len(flags) > 1 and flags & variants.generic.keys():
        return False
    exclusive = (*variants.exclusive, frozenset(f for f in {*COMMON, *variants.flags} if f.startswith("decay-")))
    return all(len(flags & group) < 2 for group in exclusive)


def choices(variants: Variants, size: int) -> list[frozenset[str]]:
    """Return sets of ``size`` flags that can be on together: own and common flags; a generic flag is on alone."""
    known = variants.texts if size == 1 else {**variants.flags, **COMMON}
    sets = map(frozenset, combinations(known, size))
    return [flags for flags in sets if compatible(variants, flags)]


def rivals(these: Iterable[str], those: Iterable[str]) -> tuple[frozenset[str], ...]:
    """Return groups for `Variants.exclusive`: no flag of ``these`` with any flag of ``those``."""
    return tuple(frozenset(pair) for pair in product(these, those))


def effective(cases: Iterable[Case]) -> frozenset[str]:
    """Return the flags that change a parameter of a trace among ``cases``, of one constructor, by more than 1e-9."""
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
    """Return the texts of the flags, joined."""
    return ", and ".join(text for flag, text in variants.texts.items() if flag in flags)


def run(
    method: Method,
    param: np.ndarray,
    grads: np.ndarray,
    *,
    lr: float | Sequence[float],
    decay: float = 0.0,
    stack_ndim: int = 0,
    flags: frozenset[str] = frozenset(),
    conditioned: bool = False,
) -> Trace:
    """Run ``method`` with ``flags`` on given gradients (T, *shape); the first ``stack_ndim`` axes are looped over.

    ``lr`` may be a sequence with a rate for each step or more. KeyError for a flag that the method does not have.
    """
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    arrays = np.asarray(param, np.float64), np.asarray(grads, np.float64)
    given: dict[str, Any] = {"lr": lr, "decay": decay, "stack_ndim": stack_ndim, "flags": flags}
    return walk(method.name, fields, *arrays, **given, conditioned=conditioned)


def walk(
    name: str,
    fields: Mapping[str, Any],
    param: Array,
    grads: Array,
    *,
    lr: float | Sequence[float],
    decay: float = 0.0,
    stack_ndim: int = 0,
    flags: frozenset[str] = frozenset(),
    conditioned: bool = False,
) -> Trace:
    """Do `run` for the method ``name`` with these fields, in the arithmetic of the arguments.

    ``conditioned``: with the trace's condition numbers and counts of decompositions.
    """
    variants = dataclasses.replace(registry()[name], rates=tuple(rate for rate in RATES if rate in fields))
    if unknown := flags - variants.texts.keys() - OPEN:
        raise KeyError(f"{name} has no variant {', '.join(sorted(unknown))}")
    stack, shape = param.shape[:stack_ndim], param.shape[stack_ndim:]
    members = [
        _run_one(Member(variants, fields, param[i], decay, flags), grads[:, *i], lr, conditioned)
        for i in np.ndindex(*stack)
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
    singular = [any(m.singular[t] for m in members) for t in range(steps)]
    return Trace(directions, params, states, kappas, members[0].decompositions, singular)


class Member:
    """A parameter that the method with ``flags`` updates step by step; ``fields`` are those of the method."""

    def __init__(self, variants: Variants, fields: Mapping[str, Any], x: Array, decay: float, flags: frozenset[str]):
        for flag in flags & variants.generic.keys() - GENERIC.keys():
            taken, _, replaced = flag.partition("-for-")
            fields = {**fields, replaced: fields[taken]}
        self.variants, self.fields, self.x = variants, {**fields, "outer_decay": decay, "rate": None}, x
        self.decay, self.flags, self.generic = decay, flags, flags & GENERIC.keys()
        self.count, self.first, self.seen = 0, 0.0, list[tuple[int, tuple[Array, Array]]]()
        self.counted = any(flag.endswith("-counted") for flag in flags)
        self.previous = self.buffer = np.zeros(np.shape(x))
        self.steps = self._started()

    def _started(self, number: int = 0) -> Walk:
        """Return the method's generator after what is remembered, before the update of this number (from 0)."""
        token = _NUMBERS.set((*(n for n, _ in self.seen), number))
        try:
            steps = self.variants.walk(self.fields, np.shape(self.x), self.flags)
            next(steps)
        finally:
            _NUMBERS.reset(token)
        for _, earlier in self.seen:
            steps.send(earlier)
        return steps

    def step(self, g: Array, rate: float) -> tuple[Array, Array, Mapping[str, Any]]:
        """Return the direction, the parameter after the step, and the state."""
        x, flags, decay, zero = self.x, self.flags, self.decay, not np.any(g)
        self.first, self.fields["rate"] = self.first if self.count else rate, rate
        shrink = 1 - decay * (1 if "decay-without-lr" in flags else self.first if "decay-first-rate" in flags else rate)
        given = g + decay * x if "decay-coupled" in flags else g, x
        state: Mapping[str, Any] = {}
        number = self.count if self.counted or "memoryless" in flags else len(self.seen)
        if "unmoved" in flags or (flags & {"zero-skipped", "zero-skipped-counted"} and zero):
            direction, shrink = np.zeros(np.shape(x)), 1.0
        elif "zero-direction" in flags:
            direction = np.zeros(np.shape(x))
        elif self.generic and next(iter(self.generic)).startswith("unpreconditioned"):
            direction, self.buffer = _plain(self.fields, g, x, self.buffer, flags)
        elif flags & {"memoryless", "restarted"} or (flags & {"zero-forgotten", "zero-forgotten-counted"} and zero):
            direction, _ = self._started(number).send(given)
        else:
            if self.counted and number != (self.seen[-1][0] + 1 if self.seen else 0):
                self.steps = self._started(number)
            direction, state = self.steps.send(given)
            self.seen.append((number, given))
        if "direction-late" in flags:
            direction, self.previous = self.previous, direction
        step = rate * direction * (-1 if "sign" in flags else 1)
        if flags & {"decay-coupled", "decay-ignored", "decay-preconditioned"}:
            shrink = 1.0
        if "decay-after-moving" in flags and not np.any(direction != 0):
            shrink = 1.0
        after = flags & {"decay-after", "decay-after-moving"}
        self.x = shrink * (x - step) if after else shrink * x - step
        self.count += 1
        return direction, self.x, {} if self.generic else {key: array(value) for key, value in state.items()}


def _run_one(member: Member, grads: Array, lr: float | Sequence[float], conditioned: bool) -> Trace:
    out = Trace([], [], [], [], [], [])
    with np.errstate(all="ignore"), conditioning(conditioned) as noted:  # a deviation may divide by zero
        for g, rate in zip(grads, lr if isinstance(lr, Sequence) else [lr] * len(grads), strict=False):
            made = member.step(g, rate)
            singular, (kappa, decompositions) = noted.singular, noted.after_update()
            for record, value in zip(out, (*made, kappa, decompositions, singular), strict=True):
                record.append(value)
    return out._replace(directions=np.stack(out.directions), params=np.stack(out.params))


_NUMBERS: ContextVar[tuple[int, ...]] = ContextVar("numbers", default=(0,))


def times(flags: frozenset[str], first: int = 1) -> Iterator[int]:
    """Yield the numbers of the updates: 1, 2, ..."""
    *seen, last = (first + n for n in _NUMBERS.get())
    return repeat(last) if "counter-stuck" in flags else chain(seen, count(last))


def _plain(fields: Mapping[str, Any], g: Array, x: Array, buffer: Array, flags: frozenset[str]) -> tuple[Array, Array]:
    """Return the gradient (with a decay inside the method) or an average of it, and the new buffer."""
    entering = g + fields.get("weight_decay", 0.0) * x
    if "unpreconditioned" in flags:
        return entering, buffer
    rate = fields.get("momentum", fields.get("beta1", 0.0))
    buffer = rate * buffer + (1 if "unpreconditioned-ball" in flags else 1 - rate) * entering
    return buffer, buffer


def decayed(config: Mapping[str, Any], flags: frozenset[str], u: Array, x: Array) -> Array:
    """Return the preconditioned array: under the flag of `PRECONDITIONED` with weight decay, but not in a statistic."""
    return u + config["outer_decay"] * x if "decay-preconditioned" in flags else u


PRECONDITIONED = {
    "decay-preconditioned": "with weight decay preconditioned: added to what the preconditioner is applied to",
}


class Conditioning:
    """The condition numbers that a walk notes for the manifest."""

    def __init__(self) -> None:
        self.of_update: list[Any] = []
        self.last: Any = 1
        self.largest: Any = 1
        self.sketches, self.sketched, self.singular = 0, False, False

    def after_update(self) -> tuple[Any, int]:
        """Return the condition number of the last update, and the number of decompositions with errors in a statistic.

        If a root was kept, the condition number is the last one noted. It is at least that of every update of a sketch.
        """
        self.last = max(self.of_update, default=self.last)
        self.sketches += self.sketched
        self.of_update, self.sketched, self.singular = [], False, False
        return max(self.last, self.largest), max(self.sketches, 1)


_CONDITIONING: ContextVar[Conditioning | None] = ContextVar("conditioning", default=None)


@contextmanager
def conditioning(wanted: bool = True) -> Iterator[Conditioning]:
    """Collect the notes made inside, if they are ``wanted``."""
    noted = Conditioning()
    token = _CONDITIONING.set(noted if wanted else None)
    try:
        yield noted
    finally:
        _CONDITIONING.reset(token)


def note(compute: Callable[..., Any], *arguments: Any, stays: bool = False) -> None:
    """Record the condition number ``compute(*arguments)`` if notes are collected; ``stays`` is for a sketch."""
    if (noted := _CONDITIONING.get()) is None:
        return
    if stays:
        noted.largest, noted.sketched = max(noted.largest, compute(*arguments)), True
    else:
        noted.of_update.append(compute(*arguments))


def note_singular(live: Array) -> None:
    """Record that a power left out zeros, if there are any."""
    if (noted := _CONDITIONING.get()) is not None:
        noted.singular |= not np.all(live)


# ---- what the families share ----------------------------------------------------------------------------------------


def ema(old: Any, new: Any, decay: float) -> Any:
    """Return ``decay * old + (1 - decay) * new``."""
    return decay * old + (1 - decay) * new


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return ``a / b`` elementwise with 0/0 = 0."""
    return np.where((a == 0) & (b == 0), 0.0, a / np.where((a == 0) & (b == 0), 1.0, b))


def spectral(matrix: Array, function: Callable[[Array], Array], keep_zeros: bool, exponent: float | Fraction) -> Array:
    """Return ``Q f(w) Q^T``; without ``keep_zeros`` eigenvalues that are rounding (at most n u max) give zero.

    f is a power of about ``exponent``, from which its values give the condition number.
    """
    if not all_finite(matrix):
        return np.full(matrix.shape, np.nan)
    w, q = eigh((matrix + matrix.T) / 2)
    above = w > len(w) * spacing(w) * w.max(initial=0)  # else it is rounding
    w = np.where(above, w, 0 * w)
    live = np.full(w.shape, True) if keep_zeros else above
    note_singular(live)
    values = function(np.where(live, w, 1.0))
    note(lambda: arithmetic.power(spread(values[live]), abs(1 / Fraction(exponent))))
    return (q * np.where(live, values, 0.0)) @ q.T


def power(matrix: Array, exponent: float | Fraction, ridge: float = 0.0) -> Array:
    """Return ``(A + ridge I)^exponent``; ``ridge = 0``: the power of the pseudo-inverse."""
    return spectral(matrix, lambda w: arithmetic.power(w + ridge, exponent), ridge > 0, exponent)


def outside(matrix: Array, exponent: float | Fraction, shift: float = 0.0) -> Array:
    """Return ``(A^{-exponent} + shift I)^{-1}``; ``shift = 0``: the pseudo-inverse."""
    return spectral(matrix, lambda w: 1 / (arithmetic.power(w, -exponent) + shift), shift > 0, exponent)


def spread(values: Array) -> Any:
    """Return the largest value over the smallest; 1 without values."""
    return max(values) / min(values) if len(values) else 1.0


def isolation(w: Array) -> Any:
    """Return the largest eigenvalue over the smallest distance of two: a basis is off by this times a unit roundoff."""
    least = spacing(w) * max(w)
    gaps = [b - a for a, b in pairwise(w) if b > least]  # zeros have no part in the steps of a determined case
    return max(w) / min(gaps) if gaps and min(gaps) > least else 1


def unfold(tensor: np.ndarray, axis: int) -> np.ndarray:
    """Return the unfolding (d_1, ..., d_k) -> (d_axis, product of the others)."""
    return np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)


def multiply(tensor: np.ndarray, matrix: np.ndarray, axis: int) -> np.ndarray:
    """Return ``tensor`` with ``matrix`` multiplied onto one axis."""
    return np.moveaxis(np.tensordot(matrix, tensor, axes=(1, axis)), 0, axis)


def due(t: int, every: int, flags: frozenset[str]) -> bool:
    """Return whether update ``t`` = 1, 2, ... renews roots, with the flags of `EVERY`."""
    if "every-ignored" in flags:
        return True
    if "every-late" in flags:
        return t % every == 0
    if "every-once" in flags:
        return t == 1
    if "every-multiples" in flags:
        return t == 1 or t % every == 0
    return (t - 1) % every == 0


EVERY = {
    "every-ignored": "with roots renewed at every update",
    "every-late": "with roots renewed at updates every, 2 every, ... instead of 1, 1 + every, ... (identity before)",
    "every-multiples": "with roots renewed at updates 1, every, 2 every, ... instead of 1, 1 + every, 1 + 2 every",
    "every-once": "with the roots of the first update kept for ever",
}


def stale(t: int, flags: frozenset[str]) -> bool:
    """Return whether update ``t`` uses the statistic without its gradient: always, or from update 2 on (`LATE`)."""
    return "statistic-after" in flags or ("statistic-late" in flags and t > 1)


LATE = {"statistic-late": "with the statistic before this gradient from the second update on"}
