"""Run a subject over the vectors of a method, check the contract, and report the results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from precond_ref import registry
from precond_ref.conformance import contract, generated, results, tolerance, vectors
from precond_ref.conformance.processes import Ended
from precond_ref.conformance.results import (
    ERROR,
    FAILED,
    PASSED,
    SKIPPED,
    Gap,
    Replay,
    Report,
    Result,
    cases,
    config_of,
    gap,
    listed,
)
from precond_ref.conformance.subjects import RAISED, Subject, Unsupported, said, words
from precond_ref.conformance.vectors import Case


def check(
    subject: Subject,
    method: str,
    *,
    level: int = 0,
    dtype: str = "float64",
    xfails: Iterable[str] = (),
    target: str = "",
    diagnose: bool = True,
    invariances: bool = False,
    deep: bool = False,
    require: str = "",
    on_case: Callable[[str], None] | None = None,
) -> Report:
    """Run ``subject`` on the vectors of ``method`` (``"ASGO"``, ``"asgo.theory"``, any case).

    ``level`` 0 compares parameters, 1 also the states that the subject shows, 2 also primitives. ``xfails`` are ids
    of cases or checks that are expected to fail. ``invariances`` tries the method's laws on made-up gradients too; it
    needs Hypothesis. ``deep`` runs the long cases and more made-up inputs, minutes instead of seconds. ``require`` is
    "must" or "should": no case of this tier may be skipped. ``on_case`` is told each id before it runs.
    """
    constructor = registry.parse(method).text
    if level not in (0, 1, 2):
        raise ValueError(f"level must be 0, 1 or 2, got {level!r}")
    if require not in ("", *results.TIERS):
        raise ValueError(f"require must be one of {', '.join(results.TIERS)}, got {require!r}")
    if not listed(constructor, deep):
        raise ValueError(
            f"there are no test vectors for {constructor} by itself: take --against precond_ref:{constructor}, or "
            f"--method {constructor.partition('.')[0]}, whose fields it sets"
        )
    tolerance.relative(dtype)  # refuses an unknown dtype
    label = target or type(subject).__name__
    report = Report(constructor, label, dtype, level, xfails=tuple(xfails), require=require)
    place = "the beginning"

    def at(id: str) -> None:
        nonlocal place
        place = id
        if on_case:
            on_case(id)

    try:
        judge(subject, report, at, invariances, deep)
    except Ended as end:
        report.ended = f"{end} in {place}"
        report.results.append(Result(place, "must", ERROR, message=str(end)))
    if diagnose and any(r.bad and r.gap for r in report.results):
        from precond_ref.conformance.diagnose import diagnose as explain

        report.diagnosis = explain(report)
    return report


def judge(subject: Subject, report: Report, at: Callable[[str], None], invariances: bool, deep: bool) -> None:
    """Fill the report; ``at`` is called with each id before its case."""
    constructor, dtype, level = report.method, report.dtype, report.level
    touched: list[str] = []
    engine: dict[str, Any] = {"compiled": True} if "compiled" in getattr(subject, "features", ()) else {}
    before = contract.look(subject)
    for case in listed(constructor, deep):
        at(case.id)
        if case.kind == "reject":
            report.results.append(_reject(subject, case, dtype))
        elif case.kind == "trace":
            seen = len(touched)
            result, run = _trace(subject, case, dtype, level, touched, **engine)
            if engine and result.status != PASSED:  # what is accused was seen operation by operation
                del touched[seen:]
                compiled, (result, run) = result, _trace(subject, case, dtype, level, touched)
                engine = engine if result.status == compiled.status else {}
            report.results.append(result)
            if run is not None:
                report.runs.append(run)
    if level == 2:
        for case in vectors.cases(kind="primitive"):
            at(case.id)
            report.results.append(_primitive(subject, case, dtype))
    if level and report.runs:
        shown = {key for run in report.runs for members in run.states for s in members for key in s}
        wanted = {k.removeprefix("state.") for run in report.runs for k in run.tensors if k.startswith("state.")}
        if missing := sorted(wanted - shown):
            report.notes.append(
                f"states not compared, for the subject shows none of this name: {', '.join(missing)} "
                f"(it shows {', '.join(sorted(shown)) or 'nothing'}; --map state.OURS=THEIRS)"
            )
    report.results += contract.keep(subject, report, touched, before, at, deep, engine)
    if invariances:
        from precond_ref.conformance.invariance import try_laws

        report.results += try_laws(subject, constructor, dtype=dtype, target=report.target, on_case=at)


def ids(method: str, level: int = 0, deep: bool = False) -> list[str]:
    """Return the ids of all results that `check` can give."""
    primitives = vectors.cases(kind="primitive") if level == 2 else []
    return [*(c.id for c in [*listed(method, deep), *primitives]), *(f"contract/{name}" for name in contract.CHECKS)]


def run_case(subject: Subject, case: Case, *, dtype: str = "float64", level: int = 0) -> Result:
    """Run one trace of `cases`, for a test of one's own: ``assert not run_case(wrap(MyASGO), case).bad``."""
    try:
        return _trace(subject, case, dtype, level, [])[0]
    except Ended as end:
        return Result(case.id, case.tier, ERROR, case.why, message=str(end))


def refuse_unknown(names: Mapping[str, str], method: str) -> None:
    """Raise ValueError for a name of ours in a mapping that no case of the method has."""
    own = cases(method, deep=True)
    known = {"lr", "weight_decay"}.union(*(case.config for case in own))
    if any(name.startswith("state.") for name in names):
        known.update(key for case in own for key in vectors.load(case) if key.startswith("state."))
    for name in names:
        if name not in known:
            kind = sorted(k for k in known if k.startswith("state.") == name.startswith("state."))
            raise ValueError(
                f"--map {name}={names[name]}: {registry.parse(method).name} has no {name!r}; it has {', '.join(kind)}"
            )


def members(array: np.ndarray, case: Case, lead: int = 0) -> np.ndarray:
    """Return ``array`` (lead axes, stack axes, rest) with one axis for all of the stack."""
    first, stack = array.shape[:lead], array.shape[lead : lead + case.stack_ndim]
    return array.reshape((*first, math.prod(stack), *array.shape[lead + case.stack_ndim :]))


def _start(subject: Subject, case: Case, param: np.ndarray, dtype: str, **options: Any) -> list[np.ndarray]:
    first = [np.array(p, dtype=dtype) for p in members(param, case)]
    subject.init(config_of(case), [p.copy() for p in first], **options)
    return first


def _step(subject: Subject, grads: np.ndarray, case: Case, dtype: str, touched: list[str], what: str) -> np.ndarray:
    given = [np.array(g, dtype=dtype) for g in members(grads, case)]
    kept = [g.copy() for g in given]
    params = subject.step(given)
    if not (isinstance(params, (list, tuple, np.ndarray)) and all(hasattr(p, "dtype") for p in params)):
        raise TypeError(f"step must return a list of arrays, got {_kinds(params)}")
    if any(not np.array_equal(a, b, equal_nan=True) for a, b in zip(given, kept, strict=True)):
        touched.append(f"{what}: the gradient was changed")
    shapes = [k.shape for k in kept]
    if [np.shape(p) for p in params] != shapes:
        raise ValueError(f"step must return parameters of shapes {shapes}, got {[np.shape(p) for p in params]}")
    wrong = {str(p.dtype) for p in params} - {dtype}
    if wrong:
        touched.append(f"dtype: parameters of {dtype} came back as {', '.join(sorted(wrong))}")
    return np.stack([np.asarray(p, np.float64) for p in params])


def _kinds(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {', '.join(sorted({type(v).__name__ for v in value})) or 'nothing'}"
    return type(value).__name__


def _trace(
    subject: Subject, case: Case, dtype: str, level: int, touched: list[str], **options: Any
) -> tuple[Result, Replay | None]:
    tensors = vectors.load(case)
    show = getattr(subject, "state", None) if level else None
    states: list[list[dict[str, np.ndarray]]] = []
    try:
        if max(tolerance.of_case(case, dtype, t) for t in case.stored) >= 1:
            raise Unsupported(f"its condition numbers are beyond {dtype}")
        if any((tensors[name].astype(dtype) != tensors[name]).any() for name in case.inputs):
            raise Unsupported(f"its inputs are not exact in {dtype}")
        first = _start(subject, case, tensors["param"], dtype, **options)
        if isinstance(case.lr, tuple):
            _set_rate(subject, 1.0)
        params = [np.stack(first).astype(np.float64)]
        for t, grads in enumerate(tensors["grads"], start=1):
            if t > 1 and case.rates[t - 1] != case.rates[t - 2]:
                _set_rate(subject, case.rates[t - 1] / case.rates[t - 2])
            params.append(_step(subject, grads, case, dtype, touched, f"{case.id}, step {t}"))
            if show is not None:
                states.append(show())
    except NotImplementedError as error:
        return Result(case.id, case.tier, SKIPPED, case.why, message=words(error)), None
    except RAISED as error:
        return Result(case.id, case.tier, ERROR, case.why, message=said(error)), None
    run = Replay(case, tensors, np.stack(params), states)
    with np.errstate(all="ignore"):
        found = list(gaps(run, dtype))
    failing = [g for g in found if not g.ratio <= 1]
    if failing:
        message = "" if np.isfinite(run.params).all() else "the parameters are not finite"
        wrong = Result(case.id, case.tier, FAILED, case.why, gap=failing[0], message=message, astray=_astray(run))
        return wrong, run
    return Result(case.id, case.tier, PASSED, case.why, gap=max(found, key=lambda g: g.ratio, default=None)), run


def _set_rate(subject: Any, factor: float) -> None:
    """Multiply the subject's learning rate."""
    change = getattr(subject, "change", None)
    if change is None or change(lr=factor) != ["lr"]:
        raise Unsupported("the subject's learning rate cannot be changed during a run: it has no change(lr=factor)")


def gaps(run: Replay, dtype: str) -> Iterator[Gap]:
    """Yield the gap of every compared quantity at every step with results; for a stack, the worst member's."""
    case = run.case
    wanted = {name: members(tensor, case, 1) for name, tensor in run.tensors.items() if name not in case.inputs}
    for place, t in enumerate(case.stored):
        allowed = tolerance.of_case(case, dtype, t)
        shown = run.states[t - 1] if run.states else []
        for name, tensor in wanted.items():
            key = name.removeprefix("state.")
            if key != name and shown and all(key in s for s in shown):
                for s, true in zip(shown, tensor[place], strict=True):
                    got = np.asarray(s[key])
                    limit = allowed * _length(true, got.shape, case.fold)
                    yield _gap(t, name, got, true, limit, case.fold)
        pairs = [*zip(wanted["directions"][place], wanted["params"][place], strict=True)]
        for quantity in (_update, _path) if case.checkpoints else (_update,):
            found = [quantity(run, t, i, dtype, *pair) for i, pair in enumerate(pairs)]
            yield max(found, key=lambda g: math.inf if math.isnan(g.ratio) else g.ratio)


def _update(run: Replay, t: int, i: int, dtype: str, direction: np.ndarray, after: np.ndarray) -> Gap:
    """Return the gap of the change that step ``t`` makes to member ``i``."""
    case, rate = run.case, run.case.rates[t - 1]
    before = (after + rate * direction) / (1 - rate * case.decay)
    step, got = rate * (direction + case.decay * before), run.params[t - 1, i] - run.params[t, i]
    lengths = [_length(x, got.shape, case.fold) for x in (step, before, after)]
    limit = tolerance.of_lengths(tolerance.of_case(case, dtype, t), dtype, *lengths)
    return _gap(t, "update", got, step, limit, case.fold)


def _path(run: Replay, t: int, i: int, dtype: str, direction: np.ndarray, after: np.ndarray) -> Gap:
    """Return the gap of member ``i`` after step ``t``, with the errors of all steps so far; not all have results."""
    seen = run.params[: t + 1, i].reshape(t + 1, -1)
    sizes, lengths = np.linalg.norm(seen, axis=1), np.linalg.norm(seen[1:] - seen[:-1], axis=1)
    limit = sum(
        tolerance.of_lengths(tolerance.of_case(run.case, dtype, s), dtype, lengths[s - 1], sizes[s - 1], sizes[s])
        for s in range(1, t + 1)
    )
    return _gap(t, "params", run.params[t, i], after, limit, run.case.fold)


@np.errstate(all="ignore")
def _astray(run: Replay) -> float:
    """Return the distance from the truth at the end of the run over the length of the true way; the worst member's."""
    case, errors = run.case, list[float]()
    for start, end, true in zip(
        run.params[0], run.params[-1], members(run.tensors["params"], case, 1)[-1], strict=True
    ):
        want = true[:-1] if generated.folds(end.shape, case.fold) else true  # the last entry is a norm
        first, got = (generated.folded(x, case.fold).reshape(-1)[: want.size].reshape(want.shape) for x in (start, end))
        errors.append(gap(case.steps, "params", got - first, want - first, 1.0).error)
    return max(errors)


def _length(true: np.ndarray, shape: tuple[int, ...], fold: int) -> float:
    """Return the norm of a result of this shape, from its stored part."""
    return float(true[-1] if generated.folds(shape, fold) else np.linalg.norm(true))


def _gap(step: int, quantity: str, got: np.ndarray, true: np.ndarray, limit: float, fold: int) -> Gap:
    """Return the gap of the stored part of a result, where the whole result may differ by ``limit``."""
    return gap(step, quantity, generated.folded(got, fold), true, limit * generated.spread(got.shape, fold))


def _reject(subject: Subject, case: Case, dtype: str) -> Result:
    """Try if an invalid configuration is refused. A foreign implementation need not refuse it: hence tier "may"."""
    if case.argument == "stack_ndim":
        return Result(case.id, "may", SKIPPED, case.why, message="stacks are given as several parameters")
    try:
        subject.init(config_of(case), [np.ones(case.shape, dtype)])
    except NotImplementedError as error:
        return Result(case.id, "may", SKIPPED, case.why, message=words(error))
    except (ValueError, TypeError) as error:
        return Result(case.id, "may", PASSED, case.why, message=said(error))
    except RAISED as error:
        return Result(case.id, "may", ERROR, case.why, message=said(error))
    return Result(case.id, "may", FAILED, case.why, message=f"was accepted: {case.argument}")


def _primitive(subject: Subject, case: Case, dtype: str) -> Result:
    tensors = vectors.load(case)
    given = {name: tensors[name].astype(dtype) for name in case.inputs}
    try:
        run = getattr(subject, "primitive", None)
        if run is None:
            raise Unsupported("the subject has no primitive(name, config, tensors)")
        got = run(case.method, dict(case.config), given)
        allowed = tolerance.of_case(case, dtype, 1)
        found = [
            gap(1, name, got[name], want, allowed * float(np.linalg.norm(want)))
            for name, want in tensors.items()
            if name not in case.inputs
        ]
    except NotImplementedError as error:
        return Result(case.id, case.tier, SKIPPED, case.why, message=words(error))
    except RAISED as error:
        return Result(case.id, case.tier, ERROR, case.why, message=said(error))
    worst = max(found, key=lambda g: g.ratio)
    return Result(case.id, case.tier, PASSED if worst.ratio <= 1 else FAILED, case.why, gap=worst)
