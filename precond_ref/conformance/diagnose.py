"""Find the known mistake that explains a wrong subject: compare its steps with each variant's, then each pair's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from precond_ref.conformance import tolerance, variants

if TYPE_CHECKING:
    from precond_ref.conformance.results import Report, Run

SLACK = 30.0
"""A variant agrees with the subject up to this many tolerances, for it may be worse conditioned than the method."""


@dataclass(frozen=True)
class Match:
    """A variant, and how well it explains what was seen."""

    flags: tuple[str, ...]
    """Names of the deviations; empty for the method itself."""
    text: str
    """The same as a sentence."""
    error: float
    """Largest normwise error over all steps of all cases it explains."""
    explained: int
    """Cases it explains, to `SLACK` tolerances."""
    unexplained: tuple[str, ...] = ()
    """Ids of the others."""


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found."""

    method: str
    cases: int
    """Cases that ran."""
    matches: tuple[Match, ...]
    """Variants that explain every case, the smallest error first; those of fewest flags only."""
    nearest: Match | None = None
    """If none does: the one that explains most cases, more than the method itself does."""
    hints: tuple[str, ...] = ()
    """What can be said without a match: the first quantity that departs, a constant factor."""

    def lines(self) -> list[str]:
        """Sentences for a person."""
        if self.matches:
            first, others = self.matches[0], self.matches[1:]
            name = self.method if first.flags else f"{self.method} as it should be"
            out = [f"It is {name} {first.text}".rstrip() + f": {_all(self.cases)} agree, to {first.error:.1g}."]
            out += [f"  or {m.text}, to {m.error:.1g}: no case that ran tells them apart." for m in others[:4]]
            if len(others) > 4:
                out.append(f"  or one of {len(others) - 4} more.")
            return out + list(self.hints)
        if self.nearest is None:
            return [f"No known mistake in {self.method} explains it.", *self.hints]
        near = self.nearest
        agree = f"{near.explained} of {self.cases} cases agree, to {near.error:.1g}"
        rest = ", ".join(near.unexplained[:4]) + (", ..." if len(near.unexplained) > 4 else "")
        return [
            f"Nearest: {self.method} {near.text}: {agree}.",
            f"Not explained: {rest}.",
            *self.hints,
        ]


def _all(cases: int) -> str:
    return "the case that ran" if cases == 1 else f"all {cases} cases that ran"


def diagnose(report: Report, *, pairs: bool = True) -> Diagnosis:
    """Explain the runs of a report (`precond_ref.conformance.check`)."""
    runs, dtype = report.runs, report.dtype
    failing = {r.id for r in report.results if r.status == "failed"}
    runs = sorted(runs, key=lambda r: (r.case.id not in failing, r.params[0].size))
    hints = tuple(_hints(report))
    try:
        known = variants.of(runs[0].case.make())
    except KeyError:
        return Diagnosis(report.method, len(runs), (), hints=hints)
    plain = _explain(runs, frozenset(), dtype)
    if all(ratio <= 1 for _, ratio in plain):  # only a state, or the contract, is wrong
        match = Match((), "", max(error for error, _ in plain), len(plain))
        return Diagnosis(report.method, len(runs), (match,), hints=hints)
    found, nearest = _search(runs, known, dtype, pairs)
    if found:
        return Diagnosis(report.method, len(runs), found)
    # Where nothing is added to a singular statistic the result jumps: a small error is then no sign of low precision.
    jumps = {run.case.id for run in runs if any(run.case.config.get(k) == 0 for k in ("eps", "delta", "damping"))}
    if dtype == "float64" and (nearest is None or set(nearest.unexplained) - jumps):
        rough: tuple[Match, ...] = ()
        if all(ratio <= SLACK for _, ratio in _explain(runs, frozenset(), "float32")):
            rough = (Match((), "", max(error for error, _ in plain), len(plain)),)
        if rough := rough or _search(runs, known, "float32", pairs)[0]:
            hint = (
                "What is left is of the size of single precision's rounding: something is computed in it, or a number "
                "of that size is added."
            )
            return Diagnosis(report.method, len(runs), rough, hints=(hint,))
    if nearest is not None and not nearest.flags:
        nearest = None  # no mistake explains more than the method itself
    errors = [error for error, _ in plain]
    if min(errors) >= 2**-12 and max(errors) <= 16 * 2**-8:
        hints += (
            f"No case is further than {max(errors):.1g} from right: computing in bfloat16 would explain as much.",
        )
    return Diagnosis(report.method, len(runs), (), nearest, hints)


def _search(
    runs: Sequence[Run], known: variants.Variants, dtype: str, pairs: bool
) -> tuple[tuple[Match, ...], Match | None]:
    """Variants of fewest flags that explain all runs to ``dtype``'s tolerance; if none does, the one that does most."""
    plain = max(error for error, _ in _explain(runs, frozenset(), dtype))
    for size in (1, 2) if pairs else (1,):
        found = []
        for flags in variants.choices(known, size):
            errors = _explain(runs, flags, dtype, stop=True)
            worst = max(error for error, _ in errors)
            if errors[-1][1] <= SLACK and worst < 0.1 * plain:
                found.append(Match(tuple(sorted(flags)), variants.describe(known, flags), worst, len(errors)))
        if found:
            found.sort(key=lambda m: m.error)
            return tuple(m for m in found if m.error <= max(10 * found[0].error, 1e-14)), None
    nearest = _greedy(runs, known, dtype, pairs)
    if nearest is not None and nearest.explained == len(runs):
        return (nearest,), None
    return (), nearest


def _greedy(runs: Sequence[Run], known: variants.Variants, dtype: str, pairs: bool) -> Match | None:
    """The flag or pair that explains most cases, then the flag that does so together with it, and so on.

    No flag at all if the method itself explains as many; None if nothing explains any.
    """
    best = _explained(runs, known, frozenset(), dtype)
    assert best is not None
    trials = [flags for size in ((1, 2) if pairs else (1,)) for flags in variants.choices(known, size)]
    while trials:
        last = best
        for flags in trials:
            best = _explained(runs, known, flags, dtype, best.explained) or best
        if best is last:
            break
        more = [frozenset({*best.flags, flag}) for flag in (*known.flags, *variants.COMMON) if flag not in best.flags]
        trials = [flags for flags in more if variants.compatible(known, flags)]
    return best if best.explained else None


def _explained(
    runs: Sequence[Run], known: variants.Variants, flags: frozenset[str], dtype: str, beat: int = -1
) -> Match | None:
    """How many cases these flags explain; None if not more than ``beat``."""
    good, rest = [0.0], []
    for run in runs:
        error, ratio = _replayed(run, flags, dtype, 1)  # most variants end here
        if ratio <= SLACK:
            error, ratio = _replayed(run, flags, dtype, run.case.steps)
        if ratio <= SLACK:
            good.append(error)
        else:
            rest.append(run.case.id)
        if len(runs) - len(rest) <= beat:
            return None
    text = variants.describe(known, flags)
    return Match(tuple(sorted(flags)), text, max(good), len(good) - 1, tuple(rest))


def _explain(runs: Sequence[Run], flags: frozenset[str], dtype: str, stop: bool = False) -> list[tuple[float, float]]:
    """For each run, the largest error of the variant and its ratio to the tolerance; with ``stop``, up to a failure."""
    out = []
    if stop and not (first := _replayed(runs[0], flags, dtype, 1))[1] <= SLACK:  # most variants end here
        return [first]
    for run in runs:
        out.append(_replayed(run, flags, dtype, run.case.steps))
        if stop and not out[-1][1] <= SLACK:
            break
    return out


def _replayed(run: Run, flags: frozenset[str], dtype: str, steps: int) -> tuple[float, float]:
    """`_distance` of a run from a variant on the first ``steps`` gradients."""
    case = run.case
    grads = run.tensors["grads"][:steps]
    method = case.make()
    trace = variants.run(
        method, run.tensors["param"], grads, lr=case.lr, decay=case.decay, stack_ndim=case.stack_ndim, flags=flags
    )
    return _distance(run, trace.params.reshape(len(grads), *run.params.shape[1:]), dtype)


def _distance(run: Run, params: np.ndarray, dtype: str) -> tuple[float, float]:
    """Largest normwise error of the updates, and its largest ratio to the tolerance; NaN agrees with NaN."""
    worst, worst_ratio = 0.0, 0.0
    want = np.concatenate([run.params[:1], params])
    for t in range(1, len(want)):
        case = run.case
        allowed = tolerance.of_case(case, dtype, t)
        for i in range(want.shape[1]):
            got, true = run.params[t - 1 : t + 1, i], want[t - 1 : t + 1, i]
            if not np.array_equal(np.isfinite(got), np.isfinite(true)):
                return math.inf, math.inf
            keep = np.isfinite(got) & np.isfinite(true)
            got, true = np.where(keep, got, 0.0), np.where(keep, true, 0.0)
            difference = float(np.linalg.norm((got[0] - got[1]) - (true[0] - true[1])))
            size = float(np.linalg.norm(true[0] - true[1]))
            limit = tolerance.of_update(allowed, dtype, true[0], true[1])
            if difference:
                worst = max(worst, difference / size if size else math.inf)
                worst_ratio = max(worst_ratio, difference / limit if limit else math.inf)
    return worst, worst_ratio


def _hints(report: Report) -> list[str]:
    """The first departure, and what the lengths of the steps say."""
    failed = [r for r in report.results if r.status == "failed" and r.gap]
    if not failed:
        return []
    first = min(failed, key=lambda r: (r.gap.step, r.gap.quantity == "update", r.tier != "must"))  # type: ignore[union-attr]
    assert first.gap is not None
    out = [f"First to depart: {first.gap.quantity} at step {first.gap.step} of {first.id} ({first.why})."]
    gaps = [r.gap for r in failed if r.gap and r.gap.quantity == "update"]
    if gaps and all(g.cosine > 1 - 1e-6 for g in gaps):
        factors = [g.norm_ratio for g in gaps]
        if max(factors) - min(factors) < 1e-6 * max(factors) and abs(factors[0] - 1) > 1e-6:
            out.append(f"Every step has the right direction and {factors[0]:.7g} times the right length.")
        elif max(abs(f - 1) for f in factors) > 1e-6:
            out.append(
                f"The first wrong steps have the right direction, and {min(factors):.4g} to {max(factors):.4g} times "
                "the right length: a scalar is wrong (a bias correction, a learning rate, a norm)."
            )
    return out
