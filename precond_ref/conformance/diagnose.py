"""Find the known mistake that explains a wrong subject: compare its steps with each variant's, then each pair's."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from precond_ref.conformance import tolerance, variants

if TYPE_CHECKING:
    from precond_ref.conformance.results import Replay, Report, Result

SLACK = 30.0
"""A variant agrees with the subject up to this many tolerances, because it may be worse conditioned than the method."""
RIDGES = ("eps", "eps1", "delta", "damping", "graft_eps")
"""Fields that keep a singular statistic away from 0/0."""


@dataclass(frozen=True)
class Match:
    """A variant, and how well it explains the runs. A variant that gives NaN explains no case."""

    flags: tuple[str, ...]
    """Names of the deviations; empty for the method itself."""
    text: str
    """The deviations as a sentence."""
    error: float
    """Largest normwise error over all steps of all cases that agree; NaN if it was not computed."""
    explained: int
    """Number of failed cases that it explains, to `SLACK` tolerances."""
    unexplained: tuple[str, ...] = ()
    """Ids of the failed cases that it does not explain."""
    contradicted: tuple[str, ...] = ()
    """Ids of cases that passed, and would fail with this variant."""


@dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`."""

    method: str
    cases: int
    """Number of cases that ran."""
    matches: tuple[Match, ...]
    """Variants that explain every case, with the fewest flags, the smallest error first."""
    nearest: Match | None = None
    """Without such a variant: the one that explains most cases, if it explains at least half of the failed cases."""
    hints: tuple[str, ...] = ()
    """Hints without a match: the first quantity that departs, a constant factor."""
    single: bool = False
    """True if the matches agree only as far as single precision allows."""
    edges: str = ""
    """The edge, such as ``eps = 0``, if the subject is wrong only there; else ""."""

    def lines(self) -> list[str]:
        """Sentences for a person."""
        first = [f"Right, except at {self.edges}."] if self.edges else []
        return first + self._found()

    def _found(self) -> list[str]:
        if self.matches:
            match, others = self.matches[0], self.matches[1:]
            texts = [match.text] if match.text else [] if self.single else ["as it should be"]
            name = ", ".join(
                [" ".join([self.method, *texts]), *["in single precision"] * (self.single and bool(texts))]
            )
            name += " in single precision" * (self.single and not texts)
            agree = "" if math.isnan(match.error) else f": {_all(self.cases)} agree, to {match.error:.1g}"
            out = [f"It is {name}{agree}."]
            out += [f"  or {m.text}, to {m.error:.1g}: no case that ran tells them apart." for m in others[:4]]
            if len(others) > 4:
                out.append(f"  or one of {len(others) - 4} more.")
            return out + list(self.hints)
        if self.nearest is None:
            return [f"No known mistake in {self.method} explains it.", *self.hints]
        near = self.nearest
        failing = near.explained + len(near.unexplained)
        agree = f"{near.explained} of the {failing} cases that fail agree, to {near.error:.1g}"
        out = [f"Nearest: {self.method} {near.text}: {agree}."]
        if near.unexplained:
            out.append(f"Not explained: {_few(near.unexplained)}.")
        if near.contradicted:
            out.append(f"It does not explain why these pass: {_few(near.contradicted)}.")
        return out + list(self.hints)


def _all(cases: int) -> str:
    return "the case that ran" if cases == 1 else f"all {cases} cases that ran"


def _few(ids: tuple[str, ...]) -> str:
    return ", ".join(ids[:4]) + (", ..." if len(ids) > 4 else "")


def diagnose(report: Report, *, pairs: bool = True) -> Diagnosis:
    """Explain the runs of a report (`precond_ref.conformance.check`)."""
    dtype, failing = report.dtype, frozenset(r.id for r in report.results if r.status == "failed" and r.gap)
    runs = sorted(report.runs, key=lambda r: (r.case.id not in failing, r.params[0].size))
    hints, edges = tuple(_hints(report)), report.edges

    def found(*matches: Match, **more: Any) -> Diagnosis:
        return Diagnosis(report.method, len(runs), matches, edges=edges, **more)

    try:
        known = variants.of(runs[0].case.make())
    except KeyError:
        return found(hints=hints)
    plain = _explain(runs, frozenset(), dtype)
    if all(ratio <= 1 for _, ratio in plain):  # only a state, the contract, or a rounding is wrong
        over = [r.gap.ratio for r in report.results if r.id in failing and r.gap and r.gap.quantity == "update"]
        if over:
            hints += (f"What fails is rounding, {max(over):.2g} times the tolerance: float64 alone comes to as much.",)
        return found(Match((), "", max(error for error, _ in plain), 0), hints=hints)
    seen = [run for run in runs if _finite(run)]
    if 2 * len(seen) < len(runs):
        return found(hints=hints)  # there is nothing that could agree
    largest = max(error for error, _ in plain)
    if matches := _search(runs, failing, known, dtype, 1):
        return found(*matches)
    if derived := _derived(runs, failing, edges, dtype):
        return found(derived)
    at = {run.case.id: run for run in runs}
    aside = {r.id: edge for r in report.results if r.id in failing and (edge := _edge(r, at.get(r.id)))}

    def without(aside: Mapping[str, list[str]]) -> tuple[list[Replay], tuple[str, ...]]:
        rest = runs if len(aside) == len(failing) else [run for run in runs if run.case.id not in aside]
        where = " and ".join(dict.fromkeys(chain(*aside.values())))
        return rest, (f"Left out of these: {_few(tuple(aside))}, where it departs at {where}.",) * (
            len(rest) < len(runs)
        )

    def in_single() -> Diagnosis | None:
        for flags in variants.choices(known, 1) if dtype == "float64" else ():
            if _replayed(runs[0], flags, "float32", 1)[1] <= 1 and _single(runs, flags) >= MOST:
                error = max(error for error, _ in _explain(runs, flags, "float32"))
                if error <= 0.1 * largest:
                    match = Match(tuple(flags), variants.describe(known, flags), error, len(failing))
                    return found(match, hints=(SINGLE,), single=True)
        return None

    firm = {id: edge for id, edge in aside.items() if edge != [OTHERS]}
    rest, left_out = without(firm)
    share = _single(rest, frozenset()) if dtype == "float64" else 0.0
    if share >= MOST and left_out and (single := in_single()):
        return single
    if share >= MOST:
        sizes = {run.case.id: error for run, (error, _) in zip(runs, plain, strict=True)}
        match = Match((), "", max(sizes[run.case.id] for run in rest), len(failing))
        return Diagnosis(report.method, len(rest), (match,), hints=(SINGLE, *left_out), edges=edges, single=True)
    if matches := _search(runs, failing, known, dtype, 2) if pairs else ():
        return found(*matches)
    for ids in [firm, aside][: 1 + (firm != aside)]:
        rest, left_out = without(ids)
        if left_out and (matches := _search(rest, failing - ids.keys(), known, dtype, 1)):
            return Diagnosis(report.method, len(rest), matches, hints=left_out)
    nearest = _greedy(runs, failing, known, dtype, pairs)
    if nearest.flags and not nearest.unexplained and not nearest.contradicted:
        return found(nearest)
    if nearest.flags and nearest.explained >= len(nearest.unexplained):
        return found(nearest=nearest, hints=hints)
    if single := in_single():
        return single
    if share and largest < 2**-12:
        hints += (f"No case is further than {largest:.1g} from right: that something is computed in single precision "
                  "would explain as much.",)  # fmt: skip
    errors = [error for error, _ in plain]
    if min(errors) >= 2**-12 and max(errors) <= 16 * 2**-8:
        hints += (
            f"No case is further than {max(errors):.1g} from right: computing in bfloat16 would explain as much.",
        )
    return found(hints=hints)


MOST_SECONDS = 10.0
"""Limit of processor time for pairs of mistakes, and again for the nearest; a single mistake takes less."""
MOST = 0.75
"""Least share of the cases with errors for a verdict of single precision, in which few results are exact."""
SINGLE = "What is left is of the size of single precision's rounding, in every case: something is computed in it."


def _finite(run: Replay) -> bool:
    """Return whether some update of the run can be compared."""
    return bool((np.isfinite(run.params[1:]) & np.isfinite(run.params[:-1])).any())


def _derived(runs: Sequence[Replay], failing: frozenset[str], edges: str, dtype: str) -> Match | None:
    """Return a mistake that no variant has: other treatment of later parameters, powers of eigenvalues below zero."""
    wrong = [run for run in runs if run.case.id in failing]
    method = {run.case.id: _members(run, dtype) for run in wrong}
    if wrong and all(len(ratios) > 1 and ratios[0] <= 1 for ratios in method.values()):
        text = "with the second or a later parameter treated differently from the first"
        return Match(("later-parameters",), text, math.nan, len(wrong))
    ridge = edges and all("= 0" in edge for edge in edges.split(" and "))
    if wrong and all(_nan_of_zeros(run) and _right_before_nan(run, dtype) for run in wrong):
        return Match(("zero-nan",), "with NaN where all gradients so far are zero: 0/0 is not 0", math.nan, len(wrong))
    if ridge and not any(map(_all_finite, wrong)) and all(map(_leaves_out_zeros, wrong)):
        text = f"with powers of eigenvalues that rounding makes zero or negative not left out at {edges}"
        return Match(("unclipped",), text, math.nan, len(wrong))
    return None


def _nan_of_zeros(run: Replay) -> bool:
    """Return whether, at the first step that is not finite, this is so only where all gradients so far were zero."""
    bad = next((t for t, params in enumerate(run.params[1:]) if not np.isfinite(params).all()), None)
    if bad is None:
        return False
    seen = np.abs(run.tensors["grads"][: bad + 1]).max(axis=0).reshape(run.params[0].shape)
    return not seen[~np.isfinite(run.params[bad + 1])].any()


def _right_before_nan(run: Replay, dtype: str) -> bool:
    """Return whether the finite entries agree with the method up to the first step that is not finite."""
    steps = next(t for t, params in enumerate(run.params) if not np.isfinite(params).all())
    want, got = _trace(run, frozenset(), steps), run.params[1 : steps + 1]
    filled = np.concatenate([run.params[:1], np.where(np.isfinite(got), got, want)])
    return _distance(replace(run, params=filled), want, dtype)[1] <= SLACK


def _leaves_out_zeros(run: Replay) -> bool:
    """Return whether the method leaves out zeros of a statistic in some step of the run."""
    case, given = run.case, (run.tensors["param"], run.tensors["grads"])
    options: dict[str, Any] = {"lr": case.rates, "decay": case.decay, "stack_ndim": case.stack_ndim}
    return any(variants.run(run.method, *given, **options, conditioned=True).singular)


def _all_finite(run: Replay) -> bool:
    return bool(np.isfinite(run.params).all())


def _members(run: Replay, dtype: str) -> list[float]:
    """Return for each parameter of a stack its largest error over the tolerance, against the method itself."""
    want = _trace(run, frozenset(), run.case.steps)
    members = [slice(i, i + 1) for i in range(want.shape[1])]
    return [_distance(replace(run, params=run.params[:, one]), want[:, one], dtype)[1] for one in members]


def edges(report: Report) -> str:
    """Return the edges at which alone a subject fails; "" if it fails elsewhere too."""
    failures, runs = report.failures, {run.case.id: run for run in report.runs}
    others = sum(r.status == "passed" and r.id in runs for r in report.results)
    if not failures or report.ended or report.unexpected_passes or report.unknown_xfails:
        return ""
    if others < max(3, len(failures)):
        return ""
    found = []
    for result in failures:
        if not (edge := _edge(result, runs.get(result.id))):
            return ""
        found += edge
    return " and ".join(dict.fromkeys(found))


OTHERS = "vectors and scalars (they may go to another method)"
"""The edge of a matrix method whose optimizers give other parameters to Adam."""


def _edge(result: Result, run: Replay | None) -> list[str]:
    """Return the edge at which a case departs first; [] if it is none."""
    gap = result.gap
    if run is None or gap is None or gap.quantity != "update":
        return []
    if len(run.case.shape) < 2 and not run.case.make().takes(run.case.shape):
        return [OTHERS]
    if not at_edge(run, gap.step):
        return []
    still = not run.tensors["grads"][gap.step - 1].any()
    return [f"{name} = 0" for name in RIDGES if run.case.config.get(name) == 0] or [
        "a gradient of zeros" if still else "a singular statistic, or a nearly singular one"
    ]


def at_edge(run: Replay, step: int) -> bool:
    """Return whether a step is at an edge: the zeros of a singular statistic are left out, or the right step jumps.

    With positive `RIDGES` no zero is left out that a step could show. A step jumps if a gradient changed by a millionth
    changes the step by more than a hundredth of the longest step. For an elementwise method each entry is changed.
    """
    case, given = run.case, run.tensors["grads"][:step]

    def played(grads: np.ndarray) -> tuple[np.ndarray, bool]:
        param = run.tensors["param"]
        options: dict[str, Any] = {"lr": case.rates[:step], "decay": case.decay, "stack_ndim": case.stack_ndim}
        trace = variants.run(case.make(), param, grads, **options, conditioned=True)
        return np.diff(trace.params, axis=0, prepend=param[None]), trace.singular[-1]

    (right, singular), draws = played(given), np.random.default_rng(0)
    ridges = [case.config[name] for name in RIDGES if name in case.config]
    if singular and (0 in ridges or not ridges):
        return True
    longest = np.max(np.linalg.norm(right.reshape(step, -1), axis=1)) or case.rates[step - 1]
    for _ in range(4):
        changed = given.copy()
        size, largest = np.abs(given[-1]), np.max(np.abs(run.tensors["grads"]), initial=0.0)
        size = np.where(size > 0, size, largest) if case.make().elementwise else largest
        changed[-1] += 1e-6 * size * draws.normal(size=given[-1].shape)
        if not np.linalg.norm(played(changed)[0][-1] - right[-1]) <= 0.01 * longest:
            return True
    return False


def _search(
    runs: Sequence[Replay], failing: frozenset[str], known: variants.Variants, dtype: str, size: int
) -> tuple[Match, ...]:
    """Return the variants of ``size`` flags that explain all runs to the tolerance of ``dtype``."""
    plain, found = max(error for error, _ in _explain(runs, frozenset(), dtype)), []
    end = time.process_time() + MOST_SECONDS
    enough = (0.5 if any(run.case.narrow for run in runs) else 0.1) * plain
    for flags in variants.choices(known, size):
        if time.process_time() > end:
            break
        errors = _explain(runs, flags, dtype, stop=True)
        worst = max(error for error, _ in errors)
        if errors[-1][1] <= SLACK and worst < enough:
            found.append(Match(tuple(sorted(flags)), variants.describe(known, flags), worst, len(failing)))
    # a generic one that says the same as another says nothing more
    found = [m for m in found if not set(m.flags) <= known.generic.keys()] or found[:1]
    found.sort(key=lambda m: m.error)
    return tuple(m for m in found if m.error <= max(10 * found[0].error, 1e-14))


def _greedy(
    runs: Sequence[Replay], failing: frozenset[str], known: variants.Variants, dtype: str, pairs: bool
) -> Match:
    """Return the flag or pair that agrees with most cases, extended by the flag that adds most cases, and so on.

    The result has no flag if the method itself agrees with as many cases.
    """
    best = _explained(runs, failing, known, frozenset(), dtype)
    assert best is not None
    trials = [flags for size in ((1, 2) if pairs else (1,)) for flags in variants.choices(known, size)]
    end = time.process_time() + MOST_SECONDS
    while trials and time.process_time() < end:
        last = best
        for flags in trials:
            if time.process_time() > end:
                break
            best = _explained(runs, failing, known, flags, dtype, len(runs) - _against(best)) or best
        if best is last:
            break
        more = [frozenset({*best.flags, flag}) for flag in (*known.flags, *variants.COMMON) if flag not in best.flags]
        trials = [flags for flags in more if variants.compatible(known, flags)]
    return best


def _against(match: Match) -> int:
    return len(match.unexplained) + len(match.contradicted)


def _explained(
    runs: Sequence[Replay],
    failing: frozenset[str],
    known: variants.Variants,
    flags: frozenset[str],
    dtype: str,
    beat: int = -1,
) -> Match | None:
    """Return the match of these flags with the cases; None if they agree with at most ``beat`` cases."""
    good, rest = [0.0], []
    for run in runs:
        error, ratio = _replayed(run, flags, dtype, 1)  # most variants end here
        if ratio <= SLACK:
            error, ratio = _replayed(run, flags, dtype, run.case.steps)
        if ratio <= SLACK and (_finite(run) or run.case.id not in failing):
            good.append(error)
        else:
            rest.append(run.case.id)
        if len(runs) - len(rest) <= beat:
            return None
    unexplained = tuple(id for id in rest if id in failing)
    contradicted = tuple(id for id in rest if id not in failing)
    wrong = sum(run.case.id in failing for run in runs)
    text = variants.describe(known, flags)
    return Match(tuple(sorted(flags)), text, max(good), wrong - len(unexplained), unexplained, contradicted)


def _single(runs: Sequence[Replay], flags: frozenset[str]) -> float:
    """Return the share of the cases with errors if these are the rounding of single precision, else 0.

    Then no error is above the tolerance of single precision, or smaller than its rounding. And some steps are too long
    and some too short, because a constant, however small, would change all of them in one direction.
    """
    wrong, signs = 0, list[bool]()
    for run in runs:
        want = _trace(run, flags, run.case.steps)
        if not _distance(run, want, "float32")[1] <= 1:
            return 0.0
        error, ratio = _distance(run, want, "float64")
        if ratio <= SLACK:
            continue
        if error < 2**-28:
            return 0.0
        wrong += 1
        true, got = -np.diff(np.concatenate([run.params[:1], want]), axis=0), -np.diff(run.params, axis=0)
        for a, b in zip(true, got, strict=True):
            along, size = float(np.vdot(a, b - a)), float(np.vdot(a, a))
            if abs(along) > 2**-28 * size:
                signs.append(along > 0)
    count, fewer = len(signs), min(sum(signs), len(signs) - sum(signs))
    by_chance = sum(math.comb(count, i) for i in range(fewer + 1)) > 2.0 ** (count - 6)  # 1/32 at least
    return wrong / len(runs) if by_chance or 5 * fewer >= count else 0.0  # steps of one run are not independent


def _explain(
    runs: Sequence[Replay], flags: frozenset[str], dtype: str, stop: bool = False
) -> list[tuple[float, float]]:
    """Return for each run the variant's largest error and its ratio to the tolerance; ``stop``: up to a failure."""
    out = []
    if stop and not (first := _replayed(runs[0], flags, dtype, 1))[1] <= SLACK:  # most variants end here
        return [first]
    for run in runs:
        out.append(_replayed(run, flags, dtype, run.case.steps))
        if stop and not out[-1][1] <= SLACK:
            break
    return out


def _trace(run: Replay, flags: frozenset[str], steps: int) -> np.ndarray:
    """Return the parameters (steps, members, *shape) of a variant on the first ``steps`` gradients of a run."""
    case, grads = run.case, run.tensors["grads"][:steps]
    trace = variants.run(
        run.method,
        run.tensors["param"],
        grads,
        lr=case.rates[:steps],
        decay=case.decay,
        stack_ndim=case.stack_ndim,
        flags=flags,
    )
    return trace.params.reshape(len(grads), *run.params.shape[1:])


def _replayed(run: Replay, flags: frozenset[str], dtype: str, steps: int) -> tuple[float, float]:
    """Return `_distance` of a run from a variant on the first ``steps`` gradients."""
    return _distance(run, _trace(run, flags, steps), dtype)


@np.errstate(over="ignore")  # a mistake may grow without bound
def _distance(run: Replay, params: np.ndarray, dtype: str) -> tuple[float, float]:
    """Return the largest normwise error of the updates and its largest ratio to the tolerance; NaN agrees with NaN."""
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
    return worst, worst_ratio * SLACK if run.case.narrow and worst_ratio > 1 else worst_ratio


def _hints(report: Report) -> list[str]:
    """Return the first departure, and a hint if only the lengths of the steps are wrong."""
    failed = [r for r in report.results if r.status == "failed" and r.gap]
    if not failed:
        return []
    first = min(failed, key=lambda r: (r.gap.step, r.gap.quantity == "update", r.tier != "must"))  # type: ignore[union-attr]
    assert first.gap is not None
    out = [f"First to depart: {first.gap.quantity} at step {first.gap.step} of {first.id} ({first.why})."]
    if bad := [run for run in report.runs if not _all_finite(run)]:
        out.append(f"Not finite in {len(bad)} of {len(report.runs)} cases; NaN agrees with nothing.")
    gaps = [r.gap for r in failed if r.gap and r.gap.quantity == "update"]
    if gaps and all(g.cosine > 1 - 1e-6 for g in gaps):
        factors = [g.norm_ratio for g in gaps]
        if max(factors) - min(factors) < 1e-6 * max(factors) and abs(factors[0] - 1) > 1e-6:
            out.append(f"Every step has the right direction and {factors[0]:.7g} times the right length.")
        elif min(abs(f - 1) for f in factors) > 1e-3:
            out.append(
                f"The first wrong steps have the right direction, and {min(factors):.4g} to {max(factors):.4g} times "
                "the right length: a scalar is wrong (a bias correction, a learning rate, a norm)."
            )
    return out
