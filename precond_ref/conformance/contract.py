"""The contract: rules for every step of any method, and errors that a few small cases cannot show.

A check is a function of a `Trial` that returns the error in words, or "". It goes into `CHECKS`, with
its requirements on a subject; the report, the ids and the pytest door follow. The checks here need no truth, only
other runs of the same subject; those of `beside` run the reference on the same inputs.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from precond_ref.conformance import beside, results, tolerance
from precond_ref.conformance.beside import Late, Nothing
from precond_ref.conformance.subjects import RAISED, Options, Subject, Unsupported, named, said, surroundings, words

if TYPE_CHECKING:
    from precond_ref.conformance.results import Report, Result
    from precond_ref.conformance.vectors import Case

FEW = 4
"""Number of steps that show what parameters share by mistake, or lack."""
RESUMED, SAVED = 26, 14
"""Steps of a run that is interrupted, and those before: more than counts of one digit, and when a root that is renewed
every 3 to 5 updates is older than its statistic and is used again."""
SAME = {"float64": 1e-11, "float32": 1e-4}
"""Largest relative difference between the steps of two runs of one program."""
ENGINES = {"foreach": "_foreach_", "fused": "_fused_"}
"""Options of torch optimizers, and the first letters of the names of their kernels."""
SILENT = frozenset(
    {"foreach", "fused", "capturable", "differentiable", "maximize", "compile", "compiled", "jit", "verbose"}
)
"""Options that change no step, or whose effect another check sees."""
STEPS, ENTRIES = 12, 128
"""Limits for the cases that are repeated in other circumstances: steps, and entries of a parameter. Without such a case
the one with the fewest steps is repeated."""
SECONDS = {False: 120.0, True: 600.0}
"""Time limit for made-up inputs, without and with ``deep``; most subjects need a few seconds."""
PATIENCE = 5
"""The time is over after so many times the limit of the clock, however little of it was processor time."""
ABSENT = "parameter groups and parameters without a gradient, which only torch optimizers have"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the parameters given together, and its steps alone."""

    case: Case
    """The case; the tolerance is derived from its conditioning."""
    param: np.ndarray
    grads: np.ndarray | None
    """(steps, *shape); the last gradient is repeated in later steps. None: it never has a gradient."""
    alone: np.ndarray | None = None
    """(steps + 1, *shape); None for a parameter that only disturbs the others."""

    def gap(self, seen: np.ndarray, dtype: str) -> float:
        """Return the largest gap between the updates seen and the updates alone, over the tolerance."""
        assert self.alone is not None
        ratios = [0.0]
        for t in range(1, len(self.alone)):
            before, after = self.alone[t - 1], self.alone[t]
            limit = tolerance.of_update(tolerance.of_case(self.case, dtype, t), dtype, before, after)
            mine = seen[t - 1] - seen[t]
            if not np.array_equal(mine, before - after, equal_nan=True):
                ratios.append(results.gap(t, "update", mine, before - after, limit).ratio)
        return max(ratios)


@dataclass
class Trial:
    """A subject with the longest trace that it ran."""

    subject: Subject
    report: Report
    touched: list[str]
    """Observations on the way: changed gradients, other dtypes."""
    before: Mapping[str, str] | None
    """`surroundings` before the first case."""
    deep: bool = False
    """True to try more inputs: minutes instead of seconds."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Options of the subject with which it makes the same steps in less time."""
    changed: bool = False
    """True if the last step changed a gradient."""
    narrow: bool = False
    """True if all cases declare products in bfloat16, which are too coarse for inputs without vectors."""
    astray: float | None = None
    """`Result.astray` of the last run that departed from the reference."""

    def __post_init__(self) -> None:
        self.dtype, self.began, self.worked = self.report.dtype, time.monotonic(), self._worked()
        passed = {r.id for r in self.report.results if r.status == results.PASSED}
        runs = [run for run in self.report.runs if not run.case.stack_ndim and not isinstance(run.case.lr, tuple)]
        small = [run for run in runs if run.case.steps <= STEPS and math.prod(run.case.shape) <= ENTRIES]
        runs = small or sorted(runs, key=lambda run: run.case.steps)[:1]
        exact = [run.case for run in runs if not run.case.narrow]
        self.right = [case for case in exact if case.id in passed]
        self.narrow = bool(runs) and not exact
        self.parts = [
            Part(
                case=run.case,
                param=np.asarray(run.tensors["param"]),
                grads=np.asarray(run.tensors["grads"]),
                alone=run.params[:, 0],
            )
            for run in runs
        ]

    def _worked(self) -> float:
        """Return the seconds of processor time of this process and of the subject's."""
        return time.process_time() + getattr(self.subject, "worked", float)()

    @property
    def late(self) -> bool:
        """Return True if the time for made-up inputs is over, which other programs on the processor do not use up."""
        limit, clock = SECONDS[self.deep], time.monotonic() - self.began
        return clock > limit and (clock > PATIENCE * limit or self._worked() - self.worked > limit)

    @property
    def longest(self) -> Part:
        """Return the trace with the most steps."""
        return max(self.parts, key=lambda part: part.case.steps)

    @property
    def different(self) -> list[Part]:
        """Return one trace of each configuration."""
        return [*{repr((part.case.config, part.case.decay)): part for part in self.parts}.values()]

    @property
    def seeds(self) -> int:
        """Return the number of inputs of a kind."""
        return 10 if self.deep else 1

    @property
    def slow(self) -> bool:
        """Return True if each operation and each shape is compiled anew, so that fewer inputs must do."""
        return not self.deep and "compiled" in getattr(self.subject, "features", ())

    @cached_property
    def options(self) -> Options | None:
        """Return the arguments of the subject, if it tells them; of our fields those that the method has."""
        ask = getattr(self.subject, "options", None)
        return None if ask is None else Options(*ask([*results.config_of(self.parts[0].case)]))

    @property
    def fields(self) -> set[str]:
        """Return our fields that the subject has an argument for; an empty set if it does not tell."""
        return set(self.options.defaults) if self.options else set()

    @cached_property
    def together(self) -> list[Part]:
        """Return traces of one configuration, the longest first: of most shapes, among these the shortest of `FEW`."""
        alike: dict[str, list[Part]] = {}
        for part in sorted(self.parts, key=lambda part: -part.case.steps):
            alike.setdefault(repr((part.case.config, part.case.lr, part.case.decay)), []).append(part)

        def rank(parts: list[Part]) -> tuple[bool, int, int, int]:
            steps = parts[0].case.steps
            return steps > 1, len({part.param.shape for part in parts}), min(steps, FEW), -steps

        return max(alike.values(), key=rank)

    @cached_property
    def mirrored(self) -> Part:
        """Return the first of `together` with the other sign: other numbers, the same conditioning."""
        part = self.together[0]
        assert part.grads is not None
        other = replace(part, param=-part.param, grads=-part.grads)
        return replace(other, alone=self.played([other])[0])

    def begin(self, parts: Sequence[Part], **options: Any) -> None:
        """Call the subject's `init` with these parameters."""
        self.subject.init(
            results.config_of(parts[0].case),
            [np.array(part.param, self.dtype) for part in parts],
            **{**self.engine, **options},
        )

    def step(self, grads: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Return the parameters after one step."""
        given: list[Any] = [None if g is None else np.array(g, self.dtype) for g in grads]
        kept = [g if g is None else g.copy() for g in given]
        params = [np.asarray(p, np.float64) for p in self.subject.step(given)]
        self.changed = any(
            a is not None and b is not None and not np.array_equal(a, b, equal_nan=True)
            for a, b in zip(given, kept, strict=True)
        )
        return params

    def played(self, parts: Sequence[Part], **options: Any) -> list[np.ndarray]:
        """Return the trajectories (steps + 1, *shape) of parameters that one subject is given together."""
        self.begin(parts, **options)
        seen = [[np.array(part.param, self.dtype).astype(np.float64) for part in parts]]
        for t in range(max(part.case.steps for part in parts)):
            seen.append(self.step([None if p.grads is None else p.grads[min(t, len(p.grads) - 1)] for p in parts]))
        return [np.stack([now[i] for now in seen]) for i in range(len(parts))]

    def departs(self, parts: Sequence[Part], **options: Any) -> str:
        """Return the error text for a parameter that makes other steps than alone, or ""."""
        played = self.played(parts, **options)
        for i, (part, seen) in enumerate(zip(parts, played, strict=True), start=1):
            if part.alone is None or not (gap := part.gap(seen, self.dtype)) > 1:
                continue
            which = f"of {len(parts)} parameters, number {i}"
            if (seen == seen[0]).all():
                return f"{which} does not move"
            return f"{which} makes other steps than alone, by {gap:.2g} times the tolerance"
        return ""


# ---- checks ---------------------------------------------------------------------------------------------------------


def purity(trial: Trial) -> str:
    """The gradient stays as it was: a change was seen in the cases."""
    return "; ".join([m for m in trial.touched if not m.startswith("dtype")][:1])


def _single(trial: Trial, part: Part) -> str:
    """Return the error text for a float32 parameter that comes back in another precision, or ""."""
    if "single" not in getattr(trial.subject, "features", ()):
        return ""
    assert part.grads is not None
    try:
        trial.begin([part], single=True)
        dtypes = {str(trial.subject.step([np.array(g, "float32")])[0].dtype) for g in part.grads[:2]}
    except RAISED:  # loud
        return ""
    return f"a parameter of float32 comes back as {', '.join(sorted(dtypes))}" * (dtypes != {"float32"})


def precision(trial: Trial) -> str:
    """Parameters keep their dtype, seen in the cases. A small change of a gradient shows if it is read with less."""
    found, part = sorted({m for m in trial.touched if m.startswith("dtype")}), trial.longest
    if found or trial.dtype != "float64" or part.case.narrow:
        return "; ".join(found)
    if message := _single(trial, part):
        trial.report.notes.append(message)
    for part in sorted(trial.parts, key=lambda part: -part.case.steps):
        grads = np.array(part.grads)
        t = next((t for t, g in enumerate(grads[:-1]) if g.any()), None)
        if t is None:  # later steps show what one step may hide: some directions do not depend on the length
            continue
        largest = np.unravel_index(np.argmax(np.abs(grads[t])), grads[t].shape)
        grads[t, ...][largest] *= 1 + 2.0**-30  # which float32 rounds away; gradients of cases are exact in float32
        if np.array_equal(_directions(part, grads), _directions(part, np.array(part.grads))):  # as those of a sign
            continue
        alike = np.array_equal(trial.played([replace(part, grads=grads)])[0][1:], part.alone[1:])  # type: ignore[index]
        return "reads float64 gradients with less precision: a change of 1e-9 of an entry changes no step" * alike
    return ""


def _directions(part: Part, grads: np.ndarray) -> np.ndarray:
    """Return the directions of the method itself."""
    method, out = part.case.make(), []
    state = method.init(part.param)
    for g in grads:
        direction, state = method.update(g, state, part.param)
        out.append(direction)
    return np.stack(out)


def repeatable(trial: Trial) -> str:
    """The longest trace gives the same steps again, operation by operation."""
    part = trial.longest
    gap = part.gap(trial.played([part], **dict.fromkeys(trial.engine, False))[0], trial.dtype)
    return f"a second run from the start differs: {gap:.2g} times the tolerance" * (gap > 1)


def _disturbing(part: Part) -> Part:
    """Return a parameter of the same shape with other gradients."""
    assert part.grads is not None
    return replace(part, grads=2 * part.grads[::-1], alone=None)


def _every(case: Case) -> int:
    """Return the number of updates between two renewals of a kept array, which parameters may share by mistake."""
    return max(case.config.get(name) or 1 for name in ("every", "statistics_every", "inverse_every"))


def independent(trial: Trial) -> str:
    """Each of several parameters makes its steps alone. Every place is tried, also with several shapes."""
    (first, *others), mirror = trial.together, trial.mirrored
    noise = _disturbing(first)
    stale = [part for part in trial.parts if _every(part.case) > 1 and part.case.steps > 1][:1]
    try:
        return (
            trial.departs([first, noise, mirror, noise, *others])
            or trial.departs([noise, first, noise, mirror, *reversed(others)])
            or next(filter(None, (trial.departs([p, _disturbing(p)]) for p in stale)), "")
        )
    except NotImplementedError as error:
        if not others:
            raise
        found = trial.departs([first, noise, mirror, noise]) or trial.departs([noise, first, noise, mirror])
        trial.report.notes.append(f"parameters of several shapes were not tried together: {words(error)}")
        return found


def groups(trial: Trial) -> str:
    """Each of several parameters in three groups makes its steps alone; the first group has two parameters."""
    part, mirror = trial.together[0], trial.mirrored
    found = trial.departs([part, mirror, mirror, part], groups=(2, 1, 1))
    return found and f"in three groups (of 2, 1, 1): {found}"


def absent(trial: Trial) -> str:
    """The first of three parameters never has a gradient."""
    part = trial.together[0]
    parts = [replace(part, grads=None, alone=None), part, trial.mirrored]
    try:
        seen = trial.played(parts)
    except RAISED as error:  # no silent mistake
        trial.report.notes.append(f"a parameter without a gradient raises {named(error)}")
        return ""
    if not (seen[0] == seen[0][0]).all():
        return "a parameter without a gradient moves"
    if all(p.gap(s, trial.dtype) <= 1 for p, s in zip(parts[1:], seen[1:], strict=True)):
        return ""
    return "a parameter without a gradient changes the steps of those after it"


def nonfinite(trial: Trial) -> str:
    """A NaN in the third step, which is the second that moves, of the second of three parameters."""
    part = trial.together[0]
    grads = np.ones_like(part.grads)
    at = min(2, len(grads) - 1)
    grads[at] = np.nan
    parts = [part, replace(part, grads=grads, alone=None), trial.mirrored]
    try:
        seen = trial.played(parts)
    except RAISED as error:  # refusing is a policy too
        trial.report.notes.append(f"a NaN in the gradient raises {named(error)}")
        return ""
    if any(not p.gap(s, trial.dtype) <= 1 for p, s in zip(parts[::2], seen[::2], strict=True)):
        return "a NaN in one parameter's gradient changes another parameter"
    (before, after), last = seen[1][at : at + 2], seen[1][-1]
    policy = (
        "comes out as NaN" if np.isnan(after).all()
        else "skips the step of its parameter" + ", which is NaN in a later step" * bool(np.isnan(last).any())
        if np.array_equal(before, after)
        else "makes part of its parameter NaN" if np.isnan(after).any()
        else ""
    )  # fmt: skip
    if not policy:
        return "a NaN in the gradient is replaced: the parameter makes a finite step, and nobody hears of it"
    if at + 1 < len(grads) and (seen[1][at:] == after).all():
        return "a NaN in the gradient stops its parameter for ever, and nobody hears of it"
    trial.report.notes.append(f"a NaN in the gradient {policy}")
    return ""


def _repeated(part: Part) -> Part:
    """Return the trace repeated for `RESUMED` steps."""
    assert part.grads is not None
    return replace(part, grads=np.resize(part.grads, (RESUMED, *part.grads.shape[1:])), alone=None)


def _interrupted(trial: Trial, parts: Sequence[Part], changed: bool = False) -> str:
    """Compare all steps with two halves, before saving and after loading; return the error text or ""."""
    subject: Any = trial.subject

    def run(until: int, interrupt: bool) -> list[list[np.ndarray]]:
        trial.begin(parts)
        seen = [[np.array(part.param, trial.dtype).astype(np.float64) for part in parts]]
        for t in range(until):
            if changed and t == 1:
                subject.change(lr=0.5, weight_decay=0.25)
            if interrupt and t == SAVED:
                saved = subject.save()
                trial.begin(parts)
                subject.load(saved)
            seen.append(trial.step([part.grads[t] for part in parts]))  # type: ignore[index]
        return seen

    for t, (want, got) in enumerate(zip(run(RESUMED, False), run(RESUMED, True), strict=True)):
        for i, (a, b) in enumerate(zip(want, got, strict=True)):
            with np.errstate(all="ignore"):
                near = np.linalg.norm(a - b) <= SAME[trial.dtype] * np.linalg.norm(a)
            if not near and not np.array_equal(a, b, equal_nan=True):
                which = f", parameter {i + 1} of {len(parts)}" * (len(parts) > 1)
                return f"goes on differently after save and load at step {SAVED}: first at step {t}{which}"
    return ""


def resume(trial: Trial) -> str:
    """A fresh subject loads the state saved after half of a run, and makes the steps of the other half."""
    subject: Any = trial.subject
    if not (hasattr(subject, "save") and hasattr(subject, "load")):
        raise Unsupported("the subject has no save and load")
    try:
        found = _interrupted(trial, [_repeated(trial.together[0]), _repeated(trial.mirrored)])
    except NotImplementedError:
        found = _interrupted(trial, [_repeated(trial.longest)])
    for part in trial.different[: 0 if trial.slow else None]:
        found = found or _interrupted(trial, [_repeated(part)])
    if not found and hasattr(subject, "lost"):
        lost = subject.lost()
        found = bool(lost) * f"the state comes back in another precision: {', '.join(lost)}"
    return found


def resume_values(trial: Trial) -> str:
    """A fresh subject resumes a run whose groups changed learning rate and weight decay before saving."""
    case = next((c for c in trial.right if c.decay or c.config.get("weight_decay")), trial.longest.case)
    part = next(part for part in trial.parts if part.case.id == case.id)
    found = _interrupted(trial, [_repeated(part)], changed=True)
    return (
        found and f"with lr and weight decay changed before saving: {found}; the values of groups are in state_dict()"
    )


def resume_narrow(trial: Trial) -> str:
    """A state with more precision than its bfloat16 parameter keeps this precision."""
    subject, part = trial.subject, trial.together[0]
    assert part.grads is not None
    try:
        trial.begin([part], narrow=True)
        for g in part.grads[:2]:
            trial.step([g])
        saved = subject.save()  # type: ignore[attr-defined]
        trial.begin([part], narrow=True)
    except RAISED:  # factorisations do not take it
        raise Nothing from None
    subject.load(saved)  # type: ignore[attr-defined]
    lost = subject.lost()  # type: ignore[attr-defined]
    return bool(lost) * (
        f"of a bfloat16 parameter the state comes back in another precision: {', '.join(lost)}; "
        "Optimizer.load_state_dict casts to the parameter's dtype"
    )


def maximize(trial: Trial) -> str:
    """Steps with ``maximize=True`` are the steps for gradients of the other sign."""
    if trial.options is None or "maximize" not in trial.options.own:
        raise Nothing
    decaying = [part for part in trial.parts if part.case.decay or part.case.config.get("weight_decay")]
    for part in [trial.longest, *decaying[:1]]:
        assert part.grads is not None
        seen = trial.played([replace(part, grads=-part.grads)], maximize=True)[0]
        if part.gap(seen, trial.dtype) > 1:
            return "maximize=True does not make the steps for -grad" + " under weight decay" * (part in decaying)
    return "maximize=True changes the gradient" * trial.changed


def engines(trial: Trial) -> str:
    """``foreach`` and ``fused`` run kernels of these names, and make the same steps; so does an update under jit."""
    offered = [] if trial.options is None else [name for name in ENGINES if name in trial.options.own]
    if "compiled" in getattr(trial.subject, "features", ()):
        return beside.compiled(trial)
    if not offered:
        raise Nothing
    parts = [trial.together[0], trial.mirrored]
    for name in offered:
        others = {other: False for other in offered if other != name}
        for value in (True, False):
            try:
                found = trial.departs(parts, watched=True, **others, **{name: value})
            except RAISED as error:
                trial.report.notes.append(f"{name}={value} raises {named(error)}")
                continue
            kernels = trial.subject.ran()  # type: ignore[attr-defined]
            ran = [k for k in kernels if k.startswith(ENGINES[name])]
            for part in trial.different if value and not found else ():
                found = found or trial.departs([part], **others, **{name: value})
            if found:
                return f"with {name}={value}: {found}"
            if value and not ran:
                return f"{name}=True is ignored: no kernel ran whose name begins with {ENGINES[name]}"
            if not value and ran:
                return f"{name}=False is ignored: {ran[0]} ran"
    return ""


def unfreezing(trial: Trial) -> str:
    """Steps without a gradient do not count, with each engine that the subject offers."""
    offered = [] if trial.options is None else [name for name in ENGINES if name in trial.options.own]
    found = beside.sometimes(trial)
    for name in offered:
        message = found or beside.sometimes(trial, **{other: other == name for other in offered})
        found = found or (message and f"with {name}=True: {message}")
    return found


def options(trial: Trial) -> str:
    """Write notes: options that change nothing, and defaults other than the method's."""
    if trial.options is None:
        raise Nothing
    part = trial.longest
    ignored = []
    for name, default in trial.options.own.items():
        if name in SILENT or not isinstance(default, bool):
            continue
        try:
            seen = trial.played([part], **{name: not default})[0]
        except RAISED:
            continue
        if np.array_equal(seen, part.alone, equal_nan=True):  # type: ignore[arg-type]
            ignored.append(f"{name}={not default}")
    if ignored:
        trial.report.notes.append(f"changes no step: {', '.join(ignored)}")
    ours = results.defaults(trial.report.method)
    other = [
        f"{name} {value!r} (here {ours[name]!r})"
        for name, value in trial.options.defaults.items()
        if value is not None and name in ours and ours[name] != value
    ]
    if other:
        trial.report.notes.append(f"defaults that differ: {', '.join(other)}")
    raise Nothing


def considerate(trial: Trial) -> str:
    """The settings of the process are as before all cases."""
    before, now = trial.before, look(trial.subject)
    if before is None or now is None:
        raise Unsupported("what a program changes is its own")
    changed = [name for name, value in before.items() if name in now and now[name] != value]
    gone = [name for name in before if name.startswith("os.environ") and name not in now]
    return bool(changed + gone) * f"changes {', '.join(changed + gone)}"


def look(subject: Any) -> Mapping[str, str] | None:
    """Return `surroundings` of the subject's process; None for a program, whose settings are its own."""
    return getattr(subject, "surroundings", surroundings)()


def _habit(*names: str, likely: str) -> Callable[[Trial], str]:
    return functools.partial(beside.habit, names=names, likely=likely)


class Check(NamedTuple):
    """An entry of `CHECKS`."""

    why: str
    tier: str
    test: Callable[[Trial], str]
    steps: int = 1
    """Least number of steps of the longest trace."""
    after: str | tuple[str, ...] = ()
    """The checks that must have passed: after their failure this one would only repeat it."""
    needs: str = ""
    """The feature that the subject must have among its ``features``; `subjects.Torch` has all but "compiled"."""
    right: bool = False
    """True to try it only if no case of tier "must" failed, except at an edge."""


CHECKS: Mapping[str, Check] = {
    "gradient-untouched": Check("a step leaves the gradient as it was", "must", purity),
    "dtype": Check("parameters of {dtype} stay {dtype}, gradients are read as {dtype}", "must", precision),
    "repeatable": Check("the same inputs give the same steps", "must", repeatable),
    "independent": Check("each of several parameters makes the steps that it makes alone", "must", independent,
        after="repeatable"),
    "groups": Check("so does each in several parameter groups", "must", groups, 1, "independent", "groups"),
    "no-gradient": Check("a parameter without a gradient stays, and the others make their steps", "must", absent, 1,
        "independent", "absent"),
    "nonfinite": Check("a NaN stays with its parameter and is seen", "should", nonfinite, 2, "independent"),
    "resume": Check("saved and loaded half way, it goes on as if nothing had been", "must", resume, 2, "independent"),
    "resume-values": Check("so it does with values that were changed in its groups", "must", resume_values, 2, "resume",
        "groups", True),
    "resume-dtypes": Check("a state comes back in the precision that it had", "should", resume_narrow, 2, "resume",
        "groups", True),
    "maximize": Check("maximize=True makes the steps for -grad", "must", maximize, 1, "repeatable", "groups", True),
    "engines": Check("each engine that it offers is used and makes the same steps", "must", engines, 1, "independent",
        right=True),
    "options": Check("(notes)", "may", options, right=True),
    "inputs": Check("random gradients are right", "must", beside.inputs, 1, "repeatable", right=True),
    "long-run": Check("hundreds of steps are right", "must", beside.long_run, 2, ("inputs", "engines"), right=True),
    "axes": Check("every option holds for every number of axes", "must", beside.axes, 1, ("independent", "inputs"),
        right=True),
    "shapes": Check("large and long parameters are right", "must", beside.shapes, 1, ("inputs", "axes"), right=True),
    "sizes": Check("gradients of any size are right", "must", beside.sizes, 1, "inputs", right=True),
    "values": Check("hyperparameters of other values are right", "must", beside.values, 1, "inputs", right=True),
    "bursts": Check(
        "so are gradients that grow at once", "must", beside.bursts, 2, ("sizes", "long-run", "values"), right=True
    ),
    "many": Check("many parameters are right", "must", beside.many, 1, ("independent", "inputs"), right=True),
    "schedule": Check("values that change during the run are used", "must", beside.schedule, 2, "inputs", right=True),
    "group-values": Check("each group has its own values", "must", beside.group_values, 1, ("groups", "schedule"),
        "groups", True),
    "unfreezing": Check("steps without a gradient do not count", "must", unfreezing, 1, ("no-gradient", "engines"),
        "absent", True),
    "gradient-buffer": Check("gradients may be kept in one tensor", "must",
        _habit("one gradient buffer, zero_grad(set_to_none=False)", likely="look for a state that *is* p.grad"), 1,
        "independent", "groups", True),
    "accumulation": Check("two micro-batches make one step", "must",
        _habit("two micro-batches a step", likely="look for a hook that takes each backward pass for a step"), 1,
        "independent", "groups", True),
    "closure": Check("step(closure) computes and returns the loss", "must", _habit("step(closure)",
        "step(closure) under torch.no_grad()",
        likely="torch's own: `with torch.enable_grad(): loss = closure()`, and `return loss`"), 1, "independent",
        "groups", True),
    "skipped-step": Check("a step that GradScaler skips leaves the state", "must",
        _habit("a GradScaler that skips steps", likely="look for hooks, and for found_inf if it scales by itself"), 1,
        "independent", "groups", True),
    "layout": Check("tensors need not be contiguous", "must", _habit("gradients that are not contiguous",
        "parameters that are not contiguous", likely="look for storage or strides where `reshape` is meant"), 1,
        "independent", "groups", True),
    "process-untouched": Check("settings of the process stay as they were", "should", considerate),
}  # fmt: skip


def keep(
    subject: Subject,
    report: Report,
    touched: list[str],
    before: Mapping[str, str] | None,
    at: Callable[[str], None],
    deep: bool = False,
    engine: Mapping[str, Any] | None = None,
) -> Iterator[Result]:
    """Yield one result per check that can be tried; ``before`` is a result of `look`, ``at`` is told each id before."""
    from precond_ref.conformance.diagnose import edges

    trial, broken = Trial(subject, report, touched, before, deep, engine or {}), set()
    wrong = any(r.tier == "must" and r.bad for r in report.results) and not edges(report)
    wrong = wrong or not trial.right
    for name, check in CHECKS.items():
        if not trial.parts or trial.longest.case.steps < check.steps:
            continue
        if check.right and check.needs and check.needs not in getattr(trial.subject, "features", ()):
            continue
        at(f"contract/{name}")
        lacking = [a for a in ((check.after,) if isinstance(check.after, str) else check.after) if a in broken]
        reason = f"not tried, for contract/{lacking[0]} fails" if lacking else ""
        if check.right and wrong:
            reason = "not tried, for a case of tier must fails"
            reason = "not tried, for products in bfloat16 are too coarse" if trial.narrow else reason
        try:
            result = _tried(name, check, trial, reason)
        except Nothing:
            continue
        if lacking or result.bad:
            broken.add(name)
        yield result


def _tried(name: str, check: Check, trial: Trial, reason: str) -> Result:
    result = results.Result(f"contract/{name}", check.tier, results.PASSED, check.why.format(dtype=trial.dtype))
    try:
        if check.needs and check.needs not in getattr(trial.subject, "features", ()):
            raise Unsupported(ABSENT)
        if reason:
            raise Unsupported(reason)
        trial.astray = None
        message = check.test(trial)
    except Nothing:
        raise
    except Late as late:
        return replace(result, status=results.SKIPPED, message=str(late), late=True)
    except NotImplementedError as error:
        return replace(result, status=results.SKIPPED, message=words(error))
    except RAISED as error:
        return replace(result, status=results.ERROR, message=said(error))
    return replace(result, status=results.FAILED, message=message, astray=trial.astray) if message else result
