"""The reference beside a subject on generated inputs, for mistakes that a few small cases cannot show.

The truth is the method itself in float64. The effect of rounding is measured in two ways. The error of the method in
float32 is in proportion to the unit roundoff. So this error times the quotient of the unit roundoffs is about the
effect of another order of the same operations in the precision of the run. And the error of a decomposition is like the
effect of gradients that are shaken by a unit roundoff of their size. This also shows results that are not determined
(the basis of an eigenvalue that occurs twice). An eigensolver may choose the same basis in spite of this, so a method
whose `Method.free_basis` is "first" also runs with all axes in reverse, where it chooses another. `FACTOR` times the
largest of these is allowed, beside ``u ** DIGITS`` of the step. Steps for which this is more than `WORST` cannot be
judged, and are left out.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from precond_ref.conformance import results, tolerance
from precond_ref.conformance.subjects import RAISED, Config, Unsupported, said, words
from precond_ref.numerics.template import leaves
from precond_ref.protocol import Method

if TYPE_CHECKING:
    from precond_ref.conformance.contract import Trial
    from precond_ref.conformance.vectors import Case

FACTOR = 256.0
"""The tolerance is this factor times the scaled error of another precision."""
DIGITS = 0.7
"""Share of the digits that are compared, for steps that are well-conditioned by construction."""
FEW_DIGITS = 0.43
"""Share of the digits that are compared, for other steps."""
WORST = 1e-2
"""Largest tolerance of any input, as a share of the length of the step."""
STEEP = 1e4
"""Largest condition number of a case whose hyperparameters are tried."""
LARGEST = 1e6
"""Largest entry of a parameter: a run that diverges further is not followed."""
STEPS = {False: 150, True: 2000}
"""Number of steps of a long run, for a plain and a deep check."""
CONFIGS = {False: 5, True: 20}
"""Number of configurations that are tried, for a plain and a deep check."""
MOST_STATE, LONGEST = 1_000_000, 600
"""Largest size of the state of a shape that is tried, and its longest side, which a subject may decompose whole."""
SHAPES: tuple[tuple[int, ...], ...] = (
    (), (40,), (4500,), (40, 5), (5, 40), (24, 24), (70, 64), (9, 10, 3), (3, 2, 5, 2), (17, 2, 3, 2), (20, 3), (3, 20),
    (66, 65),
)  # fmt: skip
LARGER: tuple[tuple[int, ...], ...] = ((300, 20), (20, 300), (130, 140), (35, 4, 40), (2, 1, 2, 3, 2))
"""Shapes that only a deep check tries."""
BASE: Mapping[int, tuple[tuple[int, ...], ...]] = {0: ((),), 1: ((6,),), 2: ((6, 4), (4, 6)), 3: ((3, 4, 2),)}
"""Shapes for gradients of special sizes, by their number of axes."""
READINGS = {"SShampoo": "eps-everywhere", "SShampoo.practical": "eps-everywhere", "SOAP": "other-completion"}
"""By `Method.name` a deviation that the source allows, or its equation to the letter; the page makes a choice there."""
RIDGES, LARGE = ("eps", "damping", "delta"), 2.75
"""Fields without an upper bound, and a value of them above that of any case."""
FORGETS, KEEPS = 2.0**-5, 1 - 2.0**-9
"""Small and large weights of the old in an average: with both, a step may be many times as long as usual."""
RIDGE = 2.0**-40
"""A ridge that hides no limit of an eigenvalue or of a root."""
OWN_LIMITS = ("clip", "clamp", "rms")
"""Fields that limit or fix the length of a step, or an eigenvalue, and may be None."""
WAITS, LOUD, ASLEEP = {False: 40, True: 256}, 2.0**10, 2.0**-30
"""Number of small gradients before the first large one, for a plain and a deep check; the factors of both."""
VALUES = (0.8125, 0.90625, 0.6875, 0.59375, 0.78125, 0.71875)
"""Values of fields from 0.5 to 1: all different, none of them 1/2, exact in every precision."""


class Nothing(Exception):
    """Raised if there is nothing to try; the check then has no result."""


class Late(Exception):
    """Raised if the time for made-up inputs is over before all were tried; the check then counts as skipped."""


@dataclass
class Plan:
    """One run of the subject that the reference can follow."""

    what: str
    """The input, in words."""
    config: Config
    params: list[np.ndarray]
    grads: list[list[np.ndarray | None]]
    """One list per parameter, with None where it has no gradient."""
    likely: str = ""
    """The mistake to look for, in words."""
    changes: Mapping[int, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Arguments of ``change`` before a step, counted from 0: factors of lr and weight_decay, and a group."""
    group: Sequence[int] = ()
    """The group of each parameter."""
    other: Config | None = None
    """Config of the second group, if it is not ``config``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the subject's ``init``."""
    digits: float = DIGITS
    """Share of the digits that are compared."""
    faint: int = 0
    """Number of steps of which no more than `FEW_DIGITS` are compared."""


def config_with(case: Case, **changed: Any) -> Config:
    """Return the config of a case with some fields changed; ValueError or TypeError if the method refuses it."""
    config = results.config_of(case)
    config.update(changed)
    limits = {name: config[name] for name in results.LIMITS if name in config}
    fields = {name: value for name, value in {**limits, **changed}.items() if name in case.make().symbols}
    config.make = functools.partial(_changed, case, fields)
    with warnings.catch_warnings(action="ignore"):
        config.make()
    config.at_default -= changed.keys()
    return config


def _changed(case: Case, fields: Mapping[str, Any]) -> Method:
    with warnings.catch_warnings(action="ignore"):  # of values that are unusual
        own = {name: value for name, value in fields.items() if name in case.config}  # a preset's may be of its own
        others = {name: value for name, value in fields.items() if name not in own}
        return replace(case, config={**case.config, **own}).make().replace(**others)


def random(seed: int, *shape: int) -> np.ndarray:
    """Return normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape)


# ---- the reference --------------------------------------------------------------------------------------------------


class Path(NamedTuple):
    """Everything that determines the path of one parameter under the reference: equal paths are followed once."""

    method: Method
    rates: tuple[tuple[float, float], ...]
    """Learning rate and weight decay of each step."""
    dtype: str
    """Dtype of the method's arithmetic; the parameter is kept in float64."""
    shaken: tuple[float, ...]
    """Shares of their size by which gradients are shaken: one stack member for each."""
    shape: tuple[int, ...]
    start: bytes
    grads: tuple[bytes | None, ...]


def path(plan: Plan, i: int, dtype: str, applied: Sequence[str], *shaken: float) -> Path:
    """Return the path of parameter ``i`` of the plan, in which changes of the values ``applied`` have an effect."""
    config = plan.other if plan.other and plan.group[i] else plan.config
    method, lr = config.method, config["lr"]
    decay, rates = method.weight_decay if method.decays else config.get("weight_decay", 0.0), []
    for t in range(len(plan.grads[i])):
        for change in plan.changes.get(t, ()):
            if change.get("group") in (None, plan.group[i] if plan.group else None):
                lr *= change.get("lr", 1.0) if "lr" in applied else 1.0
                decay *= change.get("weight_decay", 1.0) if "weight_decay" in applied else 1.0
        rates.append((lr, decay))
    grads = tuple(None if g is None else g.tobytes() for g in plan.grads[i])
    param = plan.params[i]
    return Path(method, tuple(rates), dtype, shaken, param.shape, param.tobytes(), grads)


@functools.lru_cache(maxsize=4096)
def followed(path: Path) -> np.ndarray:
    """Return the changes of the parameter at each step, (members, steps, *shape)."""
    method, shape = path.method, path.shape
    exact = np.stack([np.frombuffer(path.start).reshape(shape)] * len(path.shaken))
    state, out = method.init(exact.astype(path.dtype), stack_ndim=1), np.zeros((len(path.grads), *exact.shape))
    with np.errstate(all="ignore"):
        for t, (given, (lr, decay)) in enumerate(zip(path.grads, path.rates, strict=True)):
            if given is None:
                continue
            grad = np.frombuffer(given).reshape(shape)
            size = np.abs(grad) if method.elementwise else np.sqrt(np.mean(grad**2))
            grads = np.stack([grad + share * size * random(t, *shape) if share else grad for share in path.shaken])
            if method.decays and method.weight_decay != decay:
                method = method.replace(weight_decay=decay)
            direction, state = method.update(grads.astype(path.dtype), state, exact.astype(path.dtype))
            out[t] = lr * direction.astype(np.float64) + (0.0 if method.decays else lr * decay) * exact
            exact = exact - out[t]
    return np.moveaxis(out, 1, 0)


def _unchosen(path: Path) -> int:
    """Return the number of steps before the method may keep a basis of a null space, which the eigensolver chose."""
    method, shape = path.method, path.shape
    given = [t for t, g in enumerate(path.grads) if g is not None and np.frombuffer(g).any()]
    if not (method.free_basis == "kept" and given and len(shape) > 1):
        return len(path.grads)
    first = np.frombuffer(path.grads[given[0]] or b"").reshape(shape)
    ranks = [np.linalg.matrix_rank(np.moveaxis(first, n, 0).reshape(d, -1)) for n, d in enumerate(shape)]
    return given[0] + 1 if any(d - rank > 1 for d, rank in zip(shape, ranks, strict=True)) else len(path.grads)


def reversed_axes(path: Path) -> np.ndarray:
    """Return the changes of the parameter, (steps, *shape), computed with the entries of all axes in reverse order."""

    def back(array: bytes) -> bytes:
        return np.flip(np.frombuffer(array).reshape(path.shape)).tobytes()

    grads = tuple(None if g is None else back(g) for g in path.grads)
    (other,) = followed(path._replace(start=back(path.start), grads=grads, shaken=(0.0,)))
    return np.flip(other, axis=tuple(range(1, other.ndim)))


@functools.lru_cache(maxsize=1024)
def agreed(path: Path) -> int:
    """Return the number of steps before the first one for which the page of the method may be read otherwise."""
    reading, every = READINGS.get(path.method.name), getattr(path.method, "every", 1)
    given = [t for t, g in enumerate(path.grads) if g is not None]
    if reading is None or not given or (reading == "eps-everywhere" and every == 1):  # what is seen is not outside
        return len(path.grads)
    decays = [getattr(path.method, name, None) or 1.0 for name in ("beta2", "shampoo_beta")]
    if (
        reading == "other-completion"
        and min(decays) > 0.5
        and all(np.frombuffer(path.grads[t] or b"").all() for t in given)
    ):
        return len(path.grads)  # without zeros, and with a long memory, no column depends on others
    from precond_ref.conformance import variants

    param, grads = (np.frombuffer(x).reshape(-1, *path.shape) for x in (path.start, b"".join(filter(None, path.grads))))
    rates = [path.rates[t][0] for t in given]
    ours, theirs = (
        variants.run(path.method, param[0], grads, lr=rates, flags=frozenset(flags)).directions
        for flags in ((), (reading,))
    )
    apart = (t for t, a, b in zip(given, ours, theirs, strict=True) if not np.allclose(a, b, rtol=1e-9, atol=0))
    return next(apart, len(path.grads))


def compare(trial: Trial, plan: Plan) -> str:
    """Return in words where the subject departs from the reference, or ""; `Nothing` if the input cannot be judged."""
    dtype, u, subject = trial.dtype, tolerance.UNIT_ROUNDOFF, trial.subject
    plan.params = [np.array(p, dtype).astype(np.float64) for p in plan.params]
    plan.grads = [[None if g is None else np.array(g, dtype).astype(np.float64) for g in gs] for gs in plan.grads]

    def begin() -> None:
        subject.init(plan.config, [p.astype(dtype) for p in plan.params], **trial.engine, **plan.options)

    begin()
    names = {name for changes in plan.changes.values() for change in changes for name in change if name != "group"}
    applied = subject.change(**dict.fromkeys(sorted(names), 1.0)) if names else []  # type: ignore[attr-defined]
    if names and not applied:
        raise Nothing
    truths, limits, steps = [], [], len(plan.grads[0])
    for i, first in enumerate(plan.params):
        exact = path(plan, i, "float64", applied, 0.0, u[dtype])
        want, shaken = followed(exact)
        (narrow,) = followed(path(plan, i, "float32", applied, 0.0))
        axes = tuple(range(1, want.ndim))
        with np.errstate(all="ignore"):
            lengths = np.sqrt(np.sum(want**2, axis=axes))
            rounded, moved = (np.sqrt(np.sum((other - want) ** 2, axis=axes)) for other in (narrow, shaken))
            if exact.method.free_basis == "first":
                moved = np.maximum(moved, np.sqrt(np.sum((reversed_axes(exact) - want) ** 2, axis=axes)))
            errors = np.maximum(rounded * u[dtype] / u["float32"], moved) / np.where(lengths == 0, 1.0, lengths)
            allowed = FACTOR * np.maximum.accumulate(errors)
            places = np.abs(first - np.cumsum(want, axis=0)).max(axis=axes, initial=0.0)
            usable = np.isfinite(lengths) & (allowed <= WORST) & (places <= LARGEST)
        steps = min(steps, len(usable) if usable.all() else int(np.argmin(usable)), agreed(exact), _unchosen(exact))
        truths.append(want)
        digits = np.where(np.arange(len(lengths)) < plan.faint, min(FEW_DIGITS, plan.digits), plan.digits)
        limits.append((allowed + u[dtype] ** digits) * lengths)
    if not steps:
        raise Nothing
    before, fault, where = plan.params, "", 0
    for t in range(steps):
        try:
            for change in plan.changes.get(t, ()):
                subject.change(**change)  # type: ignore[attr-defined]
            after = trial.step([gs[t] for gs in plan.grads])
        except RAISED:
            if fault:
                return fault
            raise
        for i, (old, new) in enumerate([] if fault else zip(before, after, strict=True)):
            limit = limits[i][t] + 2 * u[dtype] * float(np.linalg.norm(old) + np.linalg.norm(new))
            off, length = (float(np.linalg.norm(a)) for a in (old - new - truths[i][t], truths[i][t]))
            if not off <= limit:
                number = f"parameter {i + 1} of {len(after)}, " * (len(after) > 1)
                share = f"{off / length:.1e} of its length" if length else "all that it moves"
                fault, where = f"{plan.what}: {number}step {t + 1} is off by {share}; {plan.likely}", i
                break
        before = after
    if fault:
        way, gone = truths[where][:steps].sum(axis=0), plan.params[where] - before[where]
        trial.astray = results.gap(steps, "params", gone, way, 1.0).error
    return fault


def first_fault(trial: Trial, plans: Iterator[Plan]) -> str:
    """Return the first departure, or ""; `Nothing` if no plan could be tried, `Late` if there was no time for all.

    Refused plans become notes.
    """
    tried, refused = False, ""
    for plan in plans:
        if trial.late:
            raise Late(f"not {'all inputs were ' * tried}tried within the time")
        try:
            if fault := compare(trial, plan):
                return fault
            tried = True
        except Nothing:
            continue
        except NotImplementedError as error:
            refused = refused or words(error)
        except RAISED as error:  # a loud refusal; the cases already ask for all that the method needs
            trial.report.notes.append(f"{plan.what}: {said(error)}")
            tried = True
    if not tried:
        if refused:
            raise Unsupported(refused)
        raise Nothing
    return ""


# ---- what is tried --------------------------------------------------------------------------------------------------


def chosen(trial: Trial) -> list[Case]:
    """Return cases that the subject has right, first those with the most values of hyperparameters not seen before."""
    firm = [c for c in trial.right if c.tier != "may"] or trial.right  # "may" has iterations that need not converge
    different = {repr((c.config, c.lr, c.decay)): c for c in reversed(firm)}
    left = [*reversed(different.values())]
    if solid := [c for c in left if _regular(c)]:
        left = solid
    picked: list[Case] = []
    seen: set[str] = set()

    def values(case: Case) -> set[str]:
        return {f"{k}={v}" for k, v in {**case.config, "decay": case.decay, "axes": len(case.shape)}.items()}

    while left and len(picked) < (2 if trial.slow else CONFIGS[trial.deep]):
        best = max(left, key=lambda case: len(values(case) - seen))
        left.remove(best)
        picked.append(best)
        seen |= values(best)
    return picked


def _regular(case: Case) -> bool:
    """Return whether the case has every ridge, of a size for the gradients that are generated here.

    False if a centred average is corrected: its variance is zero at the first step, up to rounding.
    """
    method = case.make()
    ridges = [getattr(method, name, 1) for name in ("eps", "damping", "delta", "graft_eps")]
    hollow = getattr(method, "centered", False) and getattr(method, "bias_correction", False)
    return min(ridges) > 0 and not hollow and results.of_about_one(case) and case.kappa <= STEEP


def _faint(method: Method, shape: tuple[int, ...]) -> int:
    """Return the number of steps with a singular statistic whose ridge makes half of the digits of its rounding.

    The reference leaves this rounding out. A plain (V + eps I)^-p does not.
    """
    ridge = min(getattr(method, name, 1.0) for name in RIDGES)
    return math.prod(shape) if method.factorizes and 0 < ridge < 2.0**-32 else 0


def _takes(method: Method, shape: tuple[int, ...]) -> bool:
    """Return whether the method takes the shape with a state that is not too large."""
    low, high = method.ndims
    if not low <= len(shape) <= high or (not method.elementwise and max(shape, default=0) > LONGEST):
        return False
    try:
        state = method.state_of(shape)
    except (ValueError, TypeError):
        return False
    return sum(math.prod(spec.shape) for _, spec in leaves(state[1:])) <= MOST_STATE


def _shapes(trial: Trial, case: Case, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the shapes with as many axes as some right case that is routed alike; all for an elementwise method."""
    method, known = results.config_of(case).method, {(len(c.shape), c.make().takes(c.shape)) for c in trial.right}
    axes = {len(case.shape)} if type(method).name.startswith("MBF") else {n for n, _ in known}
    alike = [s for s in shapes if len(s) in axes and (len(s), method.takes(s)) in known]
    return [s for s in (shapes if method.elementwise else alike) if _takes(method, s)]


def _plan(what: str, config: Config, shape: tuple[int, ...], grads: np.ndarray, likely: str, **more: Any) -> Plan:
    return Plan(what, config, [random(7, *shape)], [[*grads]], likely, **more)


def inputs(trial: Trial) -> str:
    """Try ordinary gradients, which are not exact in single precision, unlike those of the cases."""

    def plans() -> Iterator[Plan]:
        for k, case in enumerate(chosen(trial) * trial.seeds):
            yield _plan(f"random gradients, with the hyperparameters of {case.id}", results.config_of(case), case.shape,
                        random(k, 4, *case.shape),
                        "look for a part that is computed in single precision if it is off by 1e-8")  # fmt: skip

    return first_fault(trial, plans())


def _at_defaults(trial: Trial) -> Iterator[tuple[Case, Config]]:
    """Yield a right case with the method's defaults instead of its hyperparameters, except those of its shape."""
    for case in trial.right:
        given = results.config_of(case)
        own = {k: v for k, v in results.defaults(case.constructor).items() if k in given and k not in given.at_default}
        try:
            config = config_with(case, **own, lr=0.01)  # no value that single precision has
            if _takes(config.method, case.shape) and getattr(config.method, "compute_dtype", None) is None:
                yield case, config
                return
        except (ValueError, TypeError):
            continue


def long_run(trial: Trial) -> str:
    """Try hundreds of small steps."""

    def plans() -> Iterator[Plan]:
        for case, config in _at_defaults(trial):
            yield _plan(
                f"{STEPS[trial.deep]} steps with the default hyperparameters", config, case.shape,
                random(99, STEPS[trial.deep], *case.shape), "look for a value that is not the one given",
                faint=_faint(config.method, case.shape),
            )  # fmt: skip
        for k, case in enumerate(chosen(trial)):
            steps = STEPS[trial.deep and k < 4]
            yield _plan(
                f"{steps} steps with the hyperparameters of {case.id}", results.config_of(case), case.shape,
                random(k, steps, *case.shape),
                "look for what depends on the number of the step: a correction that stops, a state that starts again",
            )  # fmt: skip

    return first_fault(trial, plans())


def shapes(trial: Trial) -> str:
    """Try parameters that are larger than those of the cases, long, flat, or of more axes."""

    def plans() -> Iterator[Plan]:
        for k, case in enumerate(chosen(trial)[: 1 if trial.slow else None if trial.deep else 3]):
            for shape in _shapes(trial, case, (SHAPES + LARGER * trial.deep)[: 10 if trial.slow else None]):
                yield _plan(
                    f"shape {shape} with the hyperparameters of {case.id}", results.config_of(case), shape,
                    random(k, 3, *shape),
                    "look for what depends on the shape: blocks, a number of eigenvalues, a side, a triangle",
                )  # fmt: skip
            if hasattr(case.make(), "size"):
                for shape in _shapes(trial, case, ((40,), (24, 24))):
                    yield _plan(
                        f"a sketch of 21 rows for shape {shape}, with the hyperparameters of {case.id}",
                        config_with(case, size=21), shape, random(k, 30, *shape),
                        "look for what depends on the size of the sketch",
                    )  # fmt: skip

    return first_fault(trial, plans())


AXES: tuple[tuple[int, ...], ...] = ((), (5,), (4, 3), (3, 4), (3, 2, 2), (2, 1, 3, 2))
"""Shapes for every configuration."""


def axes(trial: Trial) -> str:
    """Try every configuration on parameters of several shapes at once, with weight decay if it has weight decay."""
    decays = "weight_decay" in trial.fields or any(case.decay for case in trial.right)
    different = {repr((c.config, c.lr, c.decay)): c for c in reversed(trial.right) if c.tier != "may" and _regular(c)}

    def plans() -> Iterator[Plan]:
        for k, case in enumerate([*different.values()][: 4 if trial.slow else None]):
            shapes = _shapes(trial, case, AXES)
            if not shapes:
                continue
            given = {} if case.decay or case.config.get("weight_decay") or not decays else {"weight_decay": 0.1875}
            yield Plan(
                f"parameters of shapes {', '.join(map(str, shapes))} with the hyperparameters of {case.id}"
                + ", weight_decay=0.1875" * bool(given), config_with(case, **given),
                [random(i, *s) for i, s in enumerate(shapes)],
                [[*random(k + i, 3, *s)] for i, s in enumerate(shapes)],
                "look for an option that one number of axes does without: weight decay of vectors, a form, a place",
            )  # fmt: skip

    try:
        return first_fault(trial, plans())
    except NotImplementedError:
        raise Nothing from None  # `independent` says it


def _spread(g: np.ndarray) -> np.ndarray:
    """Return the gradient with singular values from 1 to 1e-5 in its first unfolding; a vector has such entries."""
    if g.ndim < 2:
        return g * 10.0 ** -np.linspace(0, 5, g.size).reshape(g.shape)
    u, s, vt = np.linalg.svd(g.reshape(g.shape[0], -1), full_matrices=False)
    return ((u * 10.0 ** -np.linspace(0, 5, len(s))) @ vt).reshape(g.shape)


def _mixed(g: np.ndarray) -> np.ndarray:
    return g * 10.0 ** np.resize([-7.0, 1.0, -3.0, 2.0, -5.0, 0.0, -1.0], g.size).reshape(g.shape)


def _sparse(g: np.ndarray) -> np.ndarray:
    out = np.where(np.abs(g) > 1, g, 0.0)
    if g.ndim:
        out[0] = 0
    return out


def _asleep(g: np.ndarray) -> np.ndarray:
    out = g.copy()
    out[:1] = 0
    return out


KINDS: Mapping[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "tiny gradients (1e-8)": (lambda g: 1e-8 * g, "a threshold below which entries are zero, or an eps of its own"),
    "minute gradients (1e-14)": (lambda g: 1e-14 * g, "a threshold below which gradients or norms count as zero"),
    "large gradients": (lambda g: 1e3 * g, "a clamp, or a norm above which gradients are scaled"),
    "huge gradients (3e5)": (lambda g: 3e5 * g, "a clamp, or half precision, whose numbers end at 65504"),
    "gradients of entries from 1e-7 to 1e2": (_mixed, "a threshold below which entries count as zero"),
    "gradients of singular values from 1 to 1e-5": (_spread, "eigenvalues that are dropped where they are small"),
    "sparse gradients": (_sparse, "entries or rows of zeros that are treated apart"),
}  # fmt: skip


def _ridged(method: Method) -> bool:
    """Return whether rounding of huge statistics, above the ridge, meets gradients outside of their range."""
    return getattr(method, "every", 1) > 1 or hasattr(method, "damping")


def sizes(trial: Trial) -> str:
    """Try gradients that are tiny, large, sparse, or have entries or singular values of many sizes."""

    def plans() -> Iterator[Plan]:
        for k, case in enumerate(chosen(trial) * trial.seeds):
            for shape in _shapes(trial, case, [*BASE.get(len(case.shape), (case.shape,)), case.shape])[
                : 2 - trial.slow
            ]:
                for what, (make, likely) in KINDS.items():
                    own = case.make()
                    if what.startswith("huge") and (own.elementwise or trial.dtype != "float64" or _ridged(own)):
                        continue  # `large` has 1e7 for elementwise methods
                    if what.startswith("sparse") and own.free_basis in ("renewed", "kept"):
                        make = _asleep  # the basis of a larger null space is the eigensolver's choice
                    grads = np.stack([make(g) for g in random(k, 4, *shape)])
                    if what.startswith("large"):
                        grads *= 1e4 if case.make().elementwise else 1.0 if trial.dtype == "float64" else 0.03125
                    yield _plan(f"{what}, with the hyperparameters of {case.id}", results.config_of(case), shape,
                                grads, f"look for {likely}", digits=FEW_DIGITS)  # fmt: skip

    return first_fault(trial, plans())


def _varied(trial: Trial) -> set[str]:
    """Return the hyperparameters that the subject takes, as far as this is known."""
    varied: dict[str, set[str]] = {}
    for case in trial.right:
        for name, value in {**case.config, "lr": case.lr, "weight_decay": case.decay}.items():
            varied.setdefault(name, set()).add(repr(value))
    return trial.fields or {name for name, seen in varied.items() if len(seen) > 1} | {"lr"}


def _forgetting(case: Case, names: set[str]) -> Iterator[tuple[str, dict[str, float | None]]]:
    """Yield values for the weights of the old in averages: one of them small and the others near 1, and the reverse.

    With them the method's own limits are off, and once more with a small ridge if entries or their roots have it.
    """
    method = case.make()
    given = {name: case.config.get(name, getattr(method, name)) for name in method.symbols if name in names}
    off: dict[str, float | None] = {name: None for name in OWN_LIMITS if isinstance(given.get(name), (int, float))}
    weights = [name for name in given if re.search("beta|momentum", name)]
    weights = [name for name in weights if isinstance(given[name], float) and 0 <= given[name] < 1]
    ridges = RIDGES if method.free_basis else ("eps",) if method.elementwise else ()
    small: dict[str, float | None] = {name: RIDGE for name in ridges if given.get(name, 0) > RIDGE}
    for one, others, more in ((FORGETS, KEEPS, {}), (KEEPS, FORGETS, {}), (FORGETS, KEEPS, small))[: 2 + bool(small)]:
        for name in weights[: None if len(weights) > 1 else 1]:
            fields = off | more | {other: one if other == name else others for other in weights}
            yield ", ".join(f"{k}={v}" for k, v in fields.items()), fields


def bursts(trial: Trial) -> str:
    """Try gradients that are small for long and then large, and rows that are, also with extreme averages."""
    names = _varied(trial)

    def plans() -> Iterator[Plan]:
        for k, case in enumerate(chosen(trial)[: 1 if trial.slow else 8 if trial.deep else 3]):
            waits = WAITS[trial.deep and k < 2]
            extreme = _forgetting(case, names) if trial.deep or (k == 0 and not trial.slow) else ()
            for what, fields in (("", {}), *extreme):
                try:
                    config = config_with(case, **fields)
                except (ValueError, TypeError):
                    continue
                grads = random(k, waits + 6, *case.shape)
                awake = np.isin(np.arange(waits + 6), (waits, waits + 2, waits + 3))
                scale = np.where(awake, LOUD, 1.0).reshape(-1, *(1,) * len(case.shape))
                kinds = {"gradients": grads * scale}
                if case.shape and case.shape[0] > 1:
                    kinds["rows"] = grads.copy()
                    kinds["rows"][:, 0] *= np.where(awake, 1.0, ASLEEP).reshape(-1, *(1,) * (len(case.shape) - 1))
                for kind, made in kinds.items():
                    yield _plan(
                        f"{kind} that are small for {waits} steps and then large, with the hyperparameters of {case.id}"
                        + f" and {what}" * bool(what), config, case.shape, made,
                        "look for a limit of the step, of an entry, an eigenvalue or a norm", digits=FEW_DIGITS,
                        faint=_faint(config.method, case.shape),
                    )  # fmt: skip

    return first_fault(trial, plans())


def _others(case: Case, names: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield other values of fields, one at a time, and of all real fields at once."""
    method = case.make()
    given = {name: case.config.get(name, getattr(method, name)) for name in method.symbols}
    real: dict[str, Any] = {}
    fresh = itertools.cycle(VALUES)
    for name, value in {**given, "lr": case.lr}.items():
        if isinstance(value, float) and name in names:
            real[name] = next(fresh) if 0.5 <= value < 1 else 0.75 * value
    if "weight_decay" in names and "weight_decay" not in real and case.decay:
        real["weight_decay"] = 0.1875
    yield ", ".join(f"{k}={v:g}" for k, v in real.items()), real
    for name, value in real.items():
        old = case.rates[0] if name == "lr" else given.get(name, 0.0)
        other = value if 0.5 <= old < 1 else 1.625 * old or 0.34375
        yield f"{name}={other:g}", {name: other}
        if name in RIDGES:
            yield f"{name}={LARGE:g}", {name: LARGE}
    for name, value in given.items():
        if isinstance(value, bool) and name in names:
            yield f"{name}={not value}", {name: not value}
        elif isinstance(value, int) and name in names:
            yield f"{name}={value + 1}", {name: value + 1}


def values(trial: Trial) -> str:
    """Try values of the subject's hyperparameters that the cases do not have."""
    names = _varied(trial)

    def plans() -> Iterator[Plan]:
        for k, case in enumerate(chosen(trial)[: 1 if trial.slow else None if trial.deep else 3]):
            for what, fields in itertools.islice(_others(case, names), 3 if trial.slow else None):
                try:
                    config = config_with(case, **fields)
                    if not _takes(config.method, case.shape):
                        continue
                except (ValueError, TypeError):
                    continue
                yield _plan(f"{case.id} with {what}", config, case.shape, random(k, 7, *case.shape),
                            "look for an argument that is ignored, or taken for another")  # fmt: skip

    return first_fault(trial, plans())


def many(trial: Trial) -> str:
    """Try fourteen parameters, of several shapes if the method takes them."""

    def plans() -> Iterator[Plan]:
        case = chosen(trial)[0]
        found, steps = _shapes(trial, case, [case.shape, *BASE.get(len(case.shape), ())]), 64 if trial.deep else 4
        take = [found[i % len(found)] for i in range(14)] if found else [case.shape] * 14
        yield Plan(f"fourteen parameters, with the hyperparameters of {case.id}", results.config_of(case),
                   [random(i, *s) for i, s in enumerate(take)],
                   [[*random(i + 14, steps, *s)] for i, s in enumerate(take)], "look for what they share")  # fmt: skip

    try:
        return first_fault(trial, plans())
    except NotImplementedError:
        raise Nothing from None  # `independent` says it


def _decaying(trial: Trial) -> list[Case]:
    """Return right cases, one with weight decay first."""
    picked = chosen(trial)
    wanted = [c for c in trial.right if c.decay or c.config.get("weight_decay")]
    if not wanted and "weight_decay" in trial.fields:
        wanted = [replace(picked[0], decay=0.1875)]
    return [*wanted[:1], *(c for c in picked if c not in wanted)][: None if trial.deep else 3]


def _stale(trial: Trial) -> list[Case]:
    """Return a right case that does not renew its roots at every update, if there is one."""
    found = (c for c in trial.right if c.tier != "may" and _regular(c) and (c.config.get("every") or 1) > 1)
    return [*itertools.islice(found, 1)]


def schedule(trial: Trial) -> str:
    """Try a learning rate and a weight decay that change during the run."""
    if not hasattr(trial.subject, "change"):
        raise Nothing

    def plans() -> Iterator[Plan]:
        for k, case in enumerate(_decaying(trial)):
            for name in ("lr", "weight_decay"):
                changes = {t: [{name: factor}] for t, factor in ((1, 0.5), (2, 0.25), (4, 8.0))}
                yield _plan(f"{name} changed at steps 2, 3 and 5, with the hyperparameters of {case.id}",
                            results.config_of(case), case.shape, random(k, 7, *case.shape),
                            f"look for {name} read in the constructor or at the first step, or kept in a state",
                            changes=changes)  # fmt: skip

    return first_fault(trial, plans())


def group_values(trial: Trial) -> str:
    """Try two groups, the second with another learning rate, weight decay or other value."""

    def plans() -> Iterator[Plan]:
        for k, case in enumerate(_decaying(trial)[:2]):
            for group in (0, 1):
                for name in ("lr", "weight_decay"):
                    yield Plan(
                        f"another {name} in group {group + 1} of 2, with the hyperparameters of {case.id}",
                        results.config_of(case), [random(i, *case.shape) for i in range(2)],
                        [[*random(k + i, 5, *case.shape)] for i in range(2)],
                        "look for param_groups[0] or the constructor's value in the place of the group's own",
                        changes={0: [{name: 0.25, "group": group}]}, group=(0, 1), options={"groups": (1, 1)},
                    )  # fmt: skip
        for case in [*_decaying(trial)[:1], *chosen(trial)]:
            for what, fields in _others(case, trial.fields - {"lr", "weight_decay"}):
                try:
                    other = config_with(case, **fields)
                    if not fields or not _takes(other.method, case.shape):
                        continue
                except (ValueError, TypeError):
                    continue
                yield Plan(
                    f"{case.id}, with {what} in group 2 of 2", results.config_of(case),
                    [random(i, *case.shape) for i in range(2)], [[*random(50 + i, 5, *case.shape)] for i in range(2)],
                    "look for a value of the first group, or of the constructor, in the place of the group's own",
                    group=(0, 1), other=other, options={"groups": (1, 1), "other": other},
                )  # fmt: skip

    return first_fault(trial, plans())


def sometimes(trial: Trial, **options: Any) -> str:
    """Try three parameters: one is frozen for some steps, one has no gradient at every other step."""

    def plans() -> Iterator[Plan]:
        for k, case in enumerate([*_decaying(trial)[:2], *_stale(trial)]):
            grads: list[list[Any]] = [[*random(k + i, 8, *case.shape)] for i in range(3)]
            late = 4 if (case.config.get("every") or 1) == 3 else 3  # another phase
            grads[0][:late] = [None] * late
            grads[1][1::2] = [None] * 4
            yield Plan(
                f"parameter 1 frozen for {late} steps, 2 without a gradient every other step, hyperparameters of "
                f"{case.id}", results.config_of(case), [random(i, *case.shape) for i in range(3)], grads,
                "look for a state or a count of steps that parameters share, `break` for `continue`, decay without "
                "a gradient, or a list of parameters that is made once",
                options={"frozen": bool(k % 2), **options},
            )  # fmt: skip

    try:
        return first_fault(trial, plans())
    except NotImplementedError:
        raise Nothing from None


def habit(trial: Trial, names: Sequence[str], likely: str) -> str:
    """Try the same steps in other ways of using a torch optimizer, ``names`` of `habits.HABITS`."""
    case, messages = _decaying(trial)[0], []
    shapes = [case.shape, case.shape, *_shapes(trial, case, [(3, 2, 4)])]
    for name in names:
        plan = Plan(
            name,
            results.config_of(case),
            [random(i, *s) for i, s in enumerate(shapes)],
            [[*random(i + 9, 6, *s)] for i, s in enumerate(shapes)],
            likely,
            options={"habit": name},
        )
        try:
            messages.append(compare(trial, plan))
        except RAISED as error:
            if isinstance(error, NotImplementedError):
                raise
            if "contiguous" in name:  # loud
                trial.report.notes.append(f"{name}: {said(error)}")
            else:
                messages.append(f"{name}: {said(error)}; {likely}")
    return next(filter(None, messages), "")


def compiled(trial: Trial) -> str:
    """Try the same steps under ``jax.jit``; that it cannot be compiled is a note."""
    case = _decaying(trial)[0]
    plan = Plan(
        "under jax.jit", results.config_of(case), [random(1, *case.shape)], [[*random(3, 5, *case.shape)]],
        "look for a count that is a Python number and not in the state",
        options={} if trial.engine else {"compiled": True},
    )  # fmt: skip
    return first_fault(trial, iter([plan]))
