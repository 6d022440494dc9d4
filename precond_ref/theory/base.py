"""Recorded runs, statements about them, and the results of statements."""

from __future__ import annotations

import enum
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from precond_ref.numerics import sketch as fd
from precond_ref.numerics.sketch import Sketch
from precond_ref.problems.base import import_numpy
from precond_ref.problems.online import Stream

np = import_numpy()
Array = Any

ROUNDING = 1e-9
"""Largest error by rounding of summed steps, as a share of the right side; a statement may set its own."""

_STATEMENTS: dict[str, Statement] = {}


class Source(enum.Enum):
    """The source of a statement."""

    PAPER = "the paper states it, in words; constants proved here"
    FORM = "hypotheses and name are the paper's, its display was not read; constants proved here"
    PROVED = "proved here"


@dataclass(frozen=True, kw_only=True)
class Check:
    """A statement, checked on one run."""

    statement: str
    """Name, as in `list_statements`."""
    left: float
    right: float
    assumptions: Mapping[str, bool]
    """Assumptions of the statement and whether the run meets them; the check counts only if all are true."""
    symbols: Mapping[str, float]
    """Values of the statement's symbols."""
    rounding: float
    """Largest excess of the computed left side over the right, or difference (identities), by rounding."""
    identity: bool

    def __str__(self) -> str:
        relation = "=" if self.identity else "<="
        unmet = ", ".join(what for what, met in self.assumptions.items() if not met)
        verdict = f"says nothing of this run, not met: {unmet}" if unmet else "holds" if self.holds else "VIOLATED"
        return f"{self.statement}: {self.left:.6g} {relation} {self.right:.6g}, ratio {self.ratio:.3g}: {verdict}"

    @property
    def applies(self) -> bool:
        """Return True if all assumptions are met."""
        return all(self.assumptions.values())

    @property
    def ratio(self) -> float:
        """Inequality: left / right. Identity: ``|left - right| / rounding``. Above 1 is a violation."""
        if self.identity:
            over, under = abs(self.left - self.right), self.rounding
        else:
            over, under = self.left, self.right
        if not math.isfinite(over) or math.isnan(under):
            return math.inf
        if under > 0:
            return over / under
        return math.inf if over > (0.0 if self.identity else self.rounding) else 0.0

    @property
    def holds(self) -> bool:
        """False if the run contradicts the statement."""
        gap = self.left - self.right  # NaN, where a side is infinite or NaN, is a violation
        return not self.applies or (abs(gap) if self.identity else gap) <= self.rounding


@dataclass(frozen=True, kw_only=True)
class Sides:
    """The values that the function of a statement computes."""

    left: Any
    right: Any
    assumptions: Mapping[str, Any] = field(default_factory=dict)
    symbols: Mapping[str, Any] = field(default_factory=dict)
    rounding: Any = None


@dataclass(frozen=True, kw_only=True)
class Statement:
    """An inequality or identity. Call it with a recorded run and its other arguments, which `call` shows."""

    name: str
    about: str
    formula: str
    source: Source
    proof: str
    """Page and heading in the documentation."""
    identity: bool
    methods: tuple[str, ...]
    """Names of the methods of the run, whose subclasses count too; empty for statements about sketches."""
    function: Callable[..., Sides]

    @property
    def call(self) -> str:
        """The call in words, such as ``asgo.regret(run, comparator)``."""
        given = ", ".join(str(p.replace(annotation=p.empty)) for p in _parameters(self.function))
        return f"theory.{self.function.__module__.rpartition('.')[2]}.{self.function.__name__}({given})"

    def __call__(self, *args: Any, **kwargs: Any) -> Check:
        """Return the check; TypeError for a run of another method, ValueError for a point of another shape."""
        try:
            given = inspect.signature(self.function).bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name} is called {self.call}: {error}") from None
        run = next(iter(given.arguments.values()))
        if self.methods:
            names = {getattr(cls, "name", "") for cls in type(getattr(run, "method", None)).__mro__}
            if not isinstance(run, Run) or names.isdisjoint(self.methods):
                what = f"a run of {run.method!r}" if isinstance(run, Run) else repr(run)
                raise TypeError(f"{self.name} is about a run of {' or '.join(self.methods)}, got {what}")
            for name in {"comparator", "star"} & given.arguments.keys():
                point = np.asarray(given.arguments[name], dtype=float)
                if point.shape != run.stream.shape:
                    raise ValueError(f"{name} must have the parameter's shape {run.stream.shape}, got {point.shape}")
                given.arguments[name] = point
            objective = given.arguments.get("objective")
            if objective is not None and not hasattr(objective, "minimizer"):
                raise TypeError(
                    f"objective must be an Objective of precond_ref.problems.online, got {type(objective).__name__}"
                )
        elif isinstance(run, Run):
            raise TypeError(f"{self.name} is about what theory.sketchy.record_sketch(rows, size) returns, got a run")
        sides = self.function(*given.args, **given.kwargs)
        left, right = float(sides.left), float(sides.right)
        return Check(
            statement=self.name,
            left=left,
            right=right,
            assumptions=MappingProxyType({k: bool(v) for k, v in sides.assumptions.items()}),
            symbols=MappingProxyType({k: float(v) for k, v in sides.symbols.items()}),
            rounding=ROUNDING * abs(right) if sides.rounding is None else float(sides.rounding),
            identity=self.identity,
        )


@functools.cache
def _parameters(function: Callable[..., Sides]) -> tuple[inspect.Parameter, ...]:
    return tuple(inspect.signature(function).parameters.values())


def list_statements() -> Mapping[str, Statement]:
    """Return all statements by name, in the order of definition (read-only)."""
    return MappingProxyType(_STATEMENTS)


def statement(
    name: str, formula: str, source: Source, proof: str, *, identity: bool = False, methods: tuple[str, ...] = ()
) -> Callable[[Callable[..., Sides]], Statement]:
    """Register a function that returns `Sides` as the statement ``name``."""

    def register(function: Callable[..., Sides]) -> Statement:
        made = Statement(
            name=name,
            about=inspect.getdoc(function) or "",
            formula=formula,
            source=source,
            proof=proof,
            identity=identity,
            methods=methods,
            function=function,
        )
        if name in _STATEMENTS:
            raise ValueError(f"there are two statements called {name!r}")
        _STATEMENTS[name] = made
        return made

    return register


def about(*methods: str) -> Callable[..., Callable[[Callable[..., Sides]], Statement]]:
    """Return `statement` for runs of these classes."""
    return functools.partial(statement, methods=methods)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Run:
    """T updates of one parameter: x_{t+1} = x_t - rate_t direction_t, projected if a projection was given."""

    method: Any
    stream: Stream
    points: Array
    """x_0, ..., x_T, (T + 1, *shape)."""
    gradients: Array
    """(T, *shape)."""
    directions: Array
    """(T, *shape)."""
    rates: Array
    """(T,)."""
    states: tuple[Any, ...]
    """The first state and the state after each update, T + 1; a long run may have only some, with the last one."""

    forms: dict[Any, Any] = field(default_factory=dict)
    """Values that statements have computed for this run and share, see `form`."""

    def __repr__(self) -> str:
        rates = f"rate {self.rate:g}" if self.constant_rate else f"rates {self.rate:g} to {self.rates[-1]:g}"
        return f"<Run of {self.method!r} on {self.stream.name!r}, {len(self.gradients)} rounds, {rates}>"

    def form(self, kind: Callable[..., Any], *args: Any) -> Any:
        """Return ``kind(self, *args)``, computed once for these arguments (the same objects)."""
        key = (kind, *map(id, args))
        if key not in self.forms:
            self.forms[key] = kind(self, *args), args  # the arguments stay alive: their ids are theirs
        return self.forms[key][0]

    @property
    def rate(self) -> float:
        """The constant rate."""
        return float(self.rates[0])

    @property
    def constant_rate(self) -> bool:
        """Return True if all rates are equal."""
        return bool(np.all(self.rates == self.rates[0]))

    @functools.cached_property
    def paid(self) -> Array:
        """f_t(x_t), (T,)."""
        if self.stream.loss is None:
            return np.sum((self.gradients * self.points[:-1]).reshape(len(self.gradients), -1), axis=1)
        return np.array([self.stream.loss(t, x) for t, x in enumerate(self.points[:-1])])

    def losses(self, comparator: Array) -> Array:
        """Return f_t at a fixed point, (T,)."""
        if self.stream.loss is None:
            return np.sum((self.gradients * comparator).reshape(len(self.gradients), -1), axis=1)
        return np.array([self.stream.loss(t, comparator) for t in range(len(self.gradients))])

    def regret(self, comparator: Array) -> float:
        """Return sum_t f_t(x_t) - f_t(comparator)."""
        return float(np.sum(self.paid - self.losses(comparator)))

    def linear_regret(self, comparator: Array) -> float:
        """Return sum_t <g_t, x_t - comparator>, which is at least the regret of convex losses."""
        return float(np.sum(self.gradients * (self.points[:-1] - comparator)))

    def first(self, rounds: int, state: Any = None) -> Run:
        """Return the first rounds of the run; ``state`` is the state after them, if the run does not have all."""
        return Run(
            method=self.method,
            stream=self.stream,
            points=self.points[: rounds + 1],
            gradients=self.gradients[:rounds],
            directions=self.directions[:rounds],
            rates=self.rates[:rounds],
            states=self.states[: rounds + 1] if state is None else (self.states[0], state),
        )

    def all_states(self) -> tuple[Any, ...]:
        """Return ``states``; ValueError if the run does not have all."""
        if len(self.states) != len(self.gradients) + 1:
            raise ValueError(
                f"the statement needs all {len(self.gradients) + 1} states, the run kept {len(self.states)}"
            )
        return self.states


def statistic(state: Any) -> Array | None:
    """Return the matrix whose power is the divisor of a method, for adversaries that read it; None without one."""
    if isinstance(getattr(state, "sketch", None), Sketch) or hasattr(getattr(state, "sketch", None), "escaped"):
        return fd.dense(Sketch(*state.sketch))
    for name in ("gram", "grams"):
        gram = getattr(state, name, None)
        if gram is not None:
            return gram[0] if isinstance(gram, tuple) else gram
    for name in ("total", "d"):
        scale = getattr(state, name, None)
        if scale is not None:
            return np.diag(np.ravel(scale))
    return None


def record(
    method: Any,
    stream: Stream,
    lr: float | Array,
    *,
    project: Callable[[Array, Any], Array] | None = None,
    update: Callable[..., Any] | None = None,
    stack_ndim: int = 0,
    keep_states: bool = True,
    on_round: Callable[[int, Any], Any] | None = None,
) -> Run:
    """Run ``method`` on ``stream`` at the rate ``lr``, a number or (rounds,).

    ``project(y, state)`` maps the point after a step into the domain. ``update(t, grad, state, x)`` replaces
    ``method.update``. ``stack_ndim`` axes of the start are replicas. ``keep_states=False`` keeps only the first and the
    last state (for long runs). ``on_round(t, state)`` is called after each update.
    Errors: TypeError for a class in place of a method, ValueError for a rate that is negative or not finite.
    """
    if isinstance(method, type) or not hasattr(method, "update"):
        raise TypeError(f"method must be an instance of a method, such as precond_ref.SAdaGrad(size=3), got {method!r}")
    rates = np.asarray(lr, dtype=float)
    if rates.shape not in ((), (stream.rounds,)):
        raise ValueError(f"lr must be a number or have one for each of the {stream.rounds} rounds, got {rates.shape}")
    if not (np.all(np.isfinite(rates)) and np.all(rates >= 0)):
        raise ValueError(f"lr must be finite and >= 0, got {lr!r}")
    rates = np.broadcast_to(rates, (stream.rounds,))
    x = np.asarray(stream.start, dtype=float)
    state = method.init(x, stack_ndim=stack_ndim)
    looks = stream.name.endswith("preconditioned")
    points, gradients, directions, states = [x], [], [], [state]
    for t in range(stream.rounds):
        g = stream.gradient(t, x, statistic(state) if looks else None)
        direction, state = method.update(g, state, x) if update is None else update(t, g, state, x)
        x = x - rates[t] * direction
        if project is not None:
            x = project(x, state)
        points.append(x)
        gradients.append(g)
        directions.append(direction)
        states[1 if not keep_states else t + 1 :] = [state]
        if on_round is not None:
            on_round(t, state)
    return Run(
        method=method,
        stream=stream,
        points=np.stack(points),
        gradients=np.stack(gradients),
        directions=np.stack(directions),
        rates=rates,
        states=tuple(states),
    )


def pseudo_power(matrix: Array, exponent: float, floor: float = 1e-13) -> Array:
    """Return a power of positive semidefinite matrices (..., d, d); eigenvalues up to ``floor`` max(w) give 0."""
    w, v = np.linalg.eigh(matrix)
    live = w > floor * w[..., -1:]
    scale = np.where(live, np.where(live, w, 1.0) ** exponent, 0.0)
    return (v * scale[..., None, :]) @ np.swapaxes(v, -1, -2)


def trace_power(matrix: Array, exponent: float) -> Array:
    """Return tr A^exponent, A positive semidefinite (..., d, d)."""
    return np.sum(np.maximum(np.linalg.eigvalsh(matrix), 0.0) ** exponent, axis=-1)
