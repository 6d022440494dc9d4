"""What no step may do, whatever it computes: checks that need no truth, only what the subject does otherwise.

A check is a function of a `Trial` that returns what is wrong in words, or nothing. It goes into `CHECKS`, with
what a subject must have for it; the report, the ids and the pytest door follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from precond_ref.conformance import results, tolerance
from precond_ref.conformance.subjects import RAISED, Subject, Unsupported, named, said, surroundings, words

if TYPE_CHECKING:
    from precond_ref.conformance.results import Report, Result
    from precond_ref.conformance.vectors import Case

FEW = 4
"""Steps after which what parameters share, or lack, is seen."""
ABSENT = "parameter groups and parameters without a gradient, which only torch optimizers have"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the parameters given together, and what it does alone."""

    case: Case
    """Whose conditioning the tolerance is derived from."""
    param: np.ndarray
    grads: np.ndarray | None
    """(steps, *shape); after the last it is repeated. None: it never has a gradient."""
    alone: np.ndarray | None = None
    """(steps + 1, *shape); None if it is there only to disturb the others."""

    def gap(self, seen: np.ndarray, dtype: str) -> float:
        """Largest gap between the updates seen and those alone, over the tolerance."""
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
    """What was seen on the way: gradients changed, other dtypes."""
    before: Mapping[str, str] | None
    """`surroundings` before the first case."""

    def __post_init__(self) -> None:
        self.dtype = self.report.dtype
        self.parts = [
            Part(
                case=run.case,
                param=np.asarray(run.tensors["param"]),
                grads=np.asarray(run.tensors["grads"]),
                alone=run.params[:, 0],
            )
            for run in self.report.runs
            if not run.case.stack_ndim
        ]

    @property
    def longest(self) -> Part:
        """The trace of most steps."""
        return max(self.parts, key=lambda part: part.case.steps)

    @cached_property
    def together(self) -> list[Part]:
        """Traces of one configuration, the longest first: those of most shapes, and of these the shortest of `FEW`."""
        alike: dict[str, list[Part]] = {}
        for part in sorted(self.parts, key=lambda part: -part.case.steps):
            alike.setdefault(repr((part.case.config, part.case.lr, part.case.decay)), []).append(part)

        def rank(parts: list[Part]) -> tuple[bool, int, int, int]:
            steps = parts[0].case.steps
            return steps > 1, len({part.param.shape for part in parts}), min(steps, FEW), -steps

        return max(alike.values(), key=rank)

    @cached_property
    def mirrored(self) -> Part:
        """The first of `together`, parameter and gradients of the other sign: other numbers, the same conditioning."""
        part = self.together[0]
        assert part.grads is not None
        other = replace(part, param=-part.param, grads=-part.grads)
        return replace(other, alone=self.played([other])[0])

    def begin(self, parts: Sequence[Part], **options: Any) -> None:
        """The subject's `init` with these parameters."""
        self.subject.init(
            results.config_of(parts[0].case), [np.array(part.param, self.dtype) for part in parts], **options
        )

    def step(self, grads: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Parameters after one step."""
        given: list[Any] = [None if g is None else np.array(g, self.dtype) for g in grads]
        return [np.asarray(p, np.float64) for p in self.subject.step(given)]

    def played(self, parts: Sequence[Part], **options: Any) -> list[np.ndarray]:
        """Trajectories (steps + 1, *shape) of parameters that one subject is given together."""
        self.begin(parts, **options)
        seen = [[np.array(part.param, self.dtype).astype(np.float64) for part in parts]]
        for t in range(max(part.case.steps for part in parts)):
            seen.append(self.step([None if p.grads is None else p.grads[min(t, len(p.grads) - 1)] for p in parts]))
        return [np.stack([now[i] for now in seen]) for i in range(len(parts))]

    def departs(self, parts: Sequence[Part], **options: Any) -> str:
        """Which parameter makes other steps than alone."""
        for i, (part, seen) in enumerate(zip(parts, self.played(parts, **options), strict=True), start=1):
            if part.alone is None or not (gap := part.gap(seen, self.dtype)) > 1:
                continue
            which = f"of {len(parts)} parameters, number {i}"
            if (seen == seen[0]).all():
                return f"{which} does not move"
            return f"{which} makes other steps than alone, by {gap:.2g} times the tolerance"
        return ""


# ---- checks ---------------------------------------------------------------------------------------------------------


def purity(trial: Trial) -> str:
    """Seen in the cases."""
    return "; ".join([m for m in trial.touched if not m.startswith("dtype")][:1])


def precision(trial: Trial) -> str:
    """Results of another dtype were seen in the cases; gradients read with less are seen by a small change."""
    found, part = sorted({m for m in trial.touched if m.startswith("dtype")}), trial.longest
    if found or trial.dtype != "float64":
        return "; ".join(found)
    grads = np.array(part.grads)
    t = next((t for t, g in enumerate(grads[:-1]) if g.any()), None)
    if t is None:  # later steps show what one step may hide: some directions do not depend on the length
        return ""
    largest = np.unravel_index(np.argmax(np.abs(grads[t])), grads[t].shape)
    grads[t][largest] *= 1 + 2.0**-30  # which float32 rounds away; the cases' own gradients are exact in float32
    alike = np.array_equal(trial.played([replace(part, grads=grads)])[0][1:], part.alone[1:])  # type: ignore[index]
    return "reads float64 gradients with less precision: a change of 1e-9 of an entry changes no step" * alike


def repeatable(trial: Trial) -> str:
    """The longest trace again."""
    part = trial.longest
    gap = part.gap(trial.played([part])[0], trial.dtype)
    return f"a second run from the start differs: {gap:.2g} times the tolerance" * (gap > 1)


def independent(trial: Trial) -> str:
    """Every place among several parameters, of several shapes where there are cases, holds one that is known."""
    (first, *others), mirror = trial.together, trial.mirrored
    noise = replace(first, grads=2 * first.grads[::-1], alone=None)  # type: ignore[index]
    try:
        return trial.departs([first, noise, mirror, noise, *others]) or trial.departs(
            [noise, first, noise, mirror, *reversed(others)]
        )
    except NotImplementedError as error:
        if not others:
            raise
        found = trial.departs([first, noise, mirror, noise]) or trial.departs([noise, first, noise, mirror])
        trial.report.notes.append(f"parameters of several shapes were not tried together: {words(error)}")
        return found


def groups(trial: Trial) -> str:
    """Three groups, the first of two parameters."""
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
    """A NaN in the second step of the second of three parameters."""
    part = trial.together[0]
    grads = np.ones_like(part.grads)
    grads[1:2] = np.nan
    parts = [part, replace(part, grads=grads, alone=None), trial.mirrored]
    try:
        seen = trial.played(parts)
    except RAISED as error:  # refusing is a policy too
        trial.report.notes.append(f"a NaN in the gradient raises {named(error)}")
        return ""
    if any(not p.gap(s, trial.dtype) <= 1 for p, s in zip(parts[::2], seen[::2], strict=True)):
        return "a NaN in one parameter's gradient changes another parameter"
    before, after = seen[1][1:3]
    policy = (
        "comes out as NaN" if np.isnan(after).all()
        else "skips the step of its parameter" if np.array_equal(before, after)
        else "makes part of its parameter NaN" if np.isnan(after).any()
        else "is replaced: the parameter makes a finite step"
    )  # fmt: skip
    trial.report.notes.append(f"a NaN in the gradient {policy}")
    return ""


def resume(trial: Trial) -> str:
    """Half of the trace, the other half by a fresh subject that loads what was saved."""
    subject: Any = trial.subject
    if not (hasattr(subject, "save") and hasattr(subject, "load")):
        raise Unsupported("the subject has no save and load")
    part = trial.longest
    assert part.grads is not None
    half, seen = part.case.steps // 2, [part.alone[0]]  # type: ignore[index]
    trial.begin([part])
    seen += [trial.step([g])[0] for g in part.grads[:half]]
    saved = subject.save()
    trial.begin([part])
    subject.load(saved)
    seen += [trial.step([g])[0] for g in part.grads[half:]]
    gap = part.gap(np.stack(seen), trial.dtype)
    return f"goes on differently after save and load: {gap:.2g} times the tolerance" * (gap > 1)


def considerate(trial: Trial) -> str:
    """What was there before all cases is as it was."""
    before, now = trial.before, look(trial.subject)
    if before is None or now is None:
        raise Unsupported("what a program changes is its own")
    changed = [name for name, value in before.items() if name in now and now[name] != value]
    gone = [name for name in before if name.startswith("os.environ") and name not in now]
    return bool(changed + gone) * f"changes {', '.join(changed + gone)}"


def look(subject: Any) -> Mapping[str, str] | None:
    """`surroundings` of the subject's process; None of a program's, which are its own."""
    return getattr(subject, "surroundings", surroundings)()


class Check(NamedTuple):
    """An entry of `CHECKS`."""

    why: str
    tier: str
    test: Callable[[Trial], str]
    steps: int = 1
    """Of the longest trace, at least."""
    after: str = ""
    """The check without which this one would tell the same again."""
    needs: str = ""
    """What the subject must have among its ``features``; `subjects.Torch` has all there are."""


CHECKS: Mapping[str, Check] = {
    "gradient-untouched": Check("a step leaves the gradient as it was", "must", purity),
    "dtype": Check("parameters of {dtype} stay {dtype}, gradients are read as {dtype}", "must", precision),
    "repeatable": Check("the same inputs give the same steps", "must", repeatable),
    "independent": Check(
        "each of several parameters makes the steps that it makes alone", "must", independent, after="repeatable"
    ),
    "groups": Check("so does each in several parameter groups", "must", groups, 1, "independent", "groups"),
    "no-gradient": Check(
        "a parameter without a gradient stays, and the others make their steps",
        "must",
        absent,
        1,
        "independent",
        "absent",
    ),
    "nonfinite": Check("a NaN stays with its parameter", "should", nonfinite, 2, "independent"),
    "resume": Check("saved and loaded half way, it goes on as if nothing had been", "must", resume, 2),
    "process-untouched": Check("settings of the process stay as they were", "should", considerate),
}


def keep(
    subject: Subject,
    report: Report,
    touched: list[str],
    before: Mapping[str, str] | None,
    at: Callable[[str], None],
) -> Iterator[Result]:
    """One result per check that can be tried; ``before`` is what `look` gave, ``at`` is told each id before."""
    trial, broken = Trial(subject, report, touched, before), set()
    for name, check in CHECKS.items():
        if not trial.parts or trial.longest.case.steps < check.steps:
            continue
        at(f"contract/{name}")
        result = _tried(name, check, trial, f"not tried, for contract/{check.after} fails" * (check.after in broken))
        if check.after in broken or result.bad:
            broken.add(name)
        yield result


def _tried(name: str, check: Check, trial: Trial, reason: str) -> Result:
    result = results.Result(f"contract/{name}", check.tier, results.PASSED, check.why.format(dtype=trial.dtype))
    try:
        if check.needs and check.needs not in getattr(trial.subject, "features", ()):
            raise Unsupported(ABSENT)
        if reason:
            raise Unsupported(reason)
        message = check.test(trial)
    except NotImplementedError as error:
        return replace(result, status=results.SKIPPED, message=words(error))
    except RAISED as error:
        return replace(result, status=results.ERROR, message=said(error))
    return replace(result, status=results.FAILED if message else results.PASSED, message=message)
