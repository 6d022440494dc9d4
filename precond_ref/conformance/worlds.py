"""Check that an optimizer makes the same steps on the ranks of a mesh as in one process, and name its mistake.

The truth is the subject itself in one process, on whole matrices. `ranks` runs the subject on a mesh. This module
compares the part of each parameter that a rank has with the same part of the truth. If a part departs, the module
looks for a known mistake with the same result: it runs the subject in one process on the part alone, with wrong
gradients, or with a spoiled state.
"""

from __future__ import annotations

import base64
import math
import pickle
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from precond_ref import registry
from precond_ref.conformance.processes import Ended, Limits, Program
from precond_ref.conformance.ranks import MESHES, Job, Named, Outcome, Trace, shares
from precond_ref.conformance.results import ERROR, FAILED, PASSED, SKIPPED, Gap, Result, _finite

SHAPES = {
    "torch": {"wide.weight": (12, 8), "wide.bias": (12,), "uneven.weight": (7, 5), "small.weight": (3, 9),
              "square.weight": (8, 8), "odd.weight": (5, 6), "twin.weight": (8, 8)},
    "jax": {"wide.weight": (12, 8), "wide.bias": (12,), "uneven.weight": (6, 4), "small.weight": (4, 10),
            "square.weight": (8, 8), "twin.weight": (8, 8)},
}  # fmt: skip
"""Shapes of the parameters by framework. Four ranks have 2, 2, 1 and 0 of five rows; JAX has no uneven parts."""
STEPS, FEW, HALF, MICROS = 12, 6, 3, 3
"""Steps of the longest run, of the others, and before a checkpoint; micro-batches of a step."""
LATE = "uneven.weight"
"""The parameter without a gradient in one step."""
UNITS = {"float64": 36, "float32": 12}
"""By dtype, k: entries of parameters and gradients are multiples of 2^-k."""
MOST_NOISE = 0.25
"""Largest tolerance: a subject with more noise cannot be judged."""
NARROW = {"float32": (2.0**-40, 2.0**-22), "bfloat16": (2.0**-20, 2.0**-9)}
"""By dtype: a relative change of gradients below its rounding, and one of the size of its rounding."""
NEAR = 0.03
"""A mistake explains a departure if its result is this close, as a share of the departure."""


@dataclass
class Report:
    """The results of `check`."""

    target: str
    dtype: str
    mesh: str
    worlds: tuple[int, ...]
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    noise: float = 0.0
    """Largest change of the parameters of one process, over their movement, if its gradients change by rounding."""
    narrow: dict[str, str] = field(default_factory=dict)
    """By parameter: the dtype of its arithmetic, if this is narrower than its own."""
    ended: str = ""
    """The reason why no run could be compared."""
    xfails: tuple[str, ...] = ()

    @property
    def failures(self) -> list[Result]:
        """Return the runs that depart, hang or die."""
        return [r for r in self.results if r.status == FAILED]

    @property
    def refused(self) -> list[Result]:
        """Return the runs in which the subject raised."""
        return [r for r in self.results if r.status == ERROR]

    @property
    def ran(self) -> int:
        """Return the number of runs that came to their end."""
        return sum(r.gap is not None for r in self.results)

    @property
    def ok(self) -> bool:
        """Return True if a run came to its end, and none departs or is refused."""
        return bool(self.ran) and not (self.ended or self.failures or self.refused)

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain data, with None for a number that is not finite."""
        keys = ("target", "dtype", "mesh", "worlds", "ok", "noise", "narrow", "notes", "ended")
        out = {key: getattr(self, key) for key in keys} | {"results": [asdict(r) for r in self.results]}
        out |= {key: [r.id for r in getattr(self, key)] for key in ("failures", "refused")}
        return _finite(out)


class Saved(NamedTuple):
    """A checkpoint."""

    world: int
    folder: str
    names: tuple[str, ...]
    types: dict[str, str]
    """Dtypes of the tensors of the state, by ``parameter: key``."""


class Departure(NamedTuple):
    """A part of one rank that differs from the truth."""

    step: int
    name: str
    rank: int
    error: float
    """Norm of the difference over the norm of the movement of the whole parameter."""
    limit: float


@dataclass
class Truth:
    """One process on whole parameters."""

    values: list[Named]
    limits: list[dict[str, float]]
    """By step and parameter: the largest `Departure.error` allowed."""
    keys: list[str]

    def departures(self, traces: Sequence[Trace], start: int = 0) -> tuple[list[Departure], Departure]:
        """Return the departures of the first step that has any, and the comparison nearest to its limit, or worst.

        ``start``: the step of the first values of the traces.
        """
        worst = Departure(start, next(iter(traces[0].index)), 0, 0.0, 0.0)
        for t in range(len(traces[0].values)):
            found = []
            for rank, trace in enumerate(traces):
                for name, index in trace.index.items():
                    error = self.error(start + t, name, trace.values[t].get(name), index)
                    one = Departure(start + t, name, rank, error, self.limits[start + t][name])
                    if not error <= one.limit:
                        found.append(one)
                    if error * worst.limit >= worst.error * one.limit:
                        worst = one
            if found:
                return found, worst
        return [], worst

    def steps(self, t: int) -> Named:
        """Return the change of each parameter in step t."""
        return {name: value - self.values[t - 1][name] for name, value in self.values[t].items()}

    def error(self, t: int, name: str, part: np.ndarray | None, index: np.ndarray) -> float:
        """Return the error of a part of a parameter after step t."""
        if part is None or part.shape != index.shape:
            return math.inf
        difference = float(np.linalg.norm(part - self.values[t][name].ravel()[index]))
        if not math.isfinite(difference):
            return math.inf
        moved = float(np.linalg.norm(self.values[t][name] - self.values[0][name]))
        return difference / moved if moved else math.inf if difference else 0.0


Fit = tuple[float, float]
Mistakes = dict[str, list[list[Named] | None]]
"""By name of the mistake and rank: the values of the rank's parts, from the start on; None if there are none."""


def check(
    target: str,
    worlds: Sequence[int] = (2, 4),
    *,
    mesh: str = "fsdp",
    dtype: str = "float64",
    limits: Limits | None = None,
    on_run: Callable[[str], None] = lambda name: None,
) -> Report:
    """Run ``module:attribute`` (fields in brackets) on these numbers of ranks, and compare with one process.

    Raises ValueError for an object that is no target, or has no such mesh. ``on_run`` is called with
    a text for each number of ranks.
    """
    worlds = tuple(worlds)
    if not worlds or any(not isinstance(n, int) or not 2 <= n <= 16 for n in worlds) or len({*worlds}) < len(worlds):
        raise ValueError(f"worlds must be different numbers of ranks from 2 to 16, got {', '.join(map(str, worlds))}")
    if mesh not in MESHES["torch"]:
        raise ValueError(f"mesh must be one of {', '.join(MESHES['torch'])}, got {mesh}")
    least = {"hsdp": 2, "fsdp-tp": 4}.get(mesh, 1)
    if wrong := [n for n in worlds if n < least or (least > 1 and n % 2)]:
        raise ValueError(f"the mesh {mesh} needs an even number of at least {least} ranks, got {wrong[0]}")
    report = Report(target, dtype, mesh, worlds)
    fleet = Fleet(target, max(worlds), limits or Limits())
    try:
        if mesh not in MESHES[fleet.kind]:
            raise ValueError(f"with {fleet.kind} mesh must be one of {', '.join(MESHES[fleet.kind])}, got {mesh}")
        with tempfile.TemporaryDirectory(prefix="precond-ref-") as folder:
            Checking(fleet, report, Path(folder)).all(on_run)
    except Ended as end:
        report.ended = str(end)
    finally:
        fleet.close()
    return report


class Fleet:
    """The process of `ranks.serve`; ValueError if there is no such target, `Ended` if importing it fails."""

    def __init__(self, target: str, devices: int, limits: Limits):
        self.target, self.seconds = target, limits.seconds
        registry.split(target)
        path = [entry for entry in sys.path if entry]
        start = f"import sys; sys.path[:] = {path!r}; from precond_ref.conformance import ranks; ranks.serve()"
        self.program = Program(
            [sys.executable, "-P", "-c", start], target, limits._replace(seconds=60 + limits.seconds)
        )
        try:
            self.kind, text = self._ask("kind", target, devices)
            if self.kind == "error":
                raise ValueError(text)
        except BaseException:
            self.close()
            raise
        self.program.limits = limits._replace(seconds=math.inf)  # each run has its own

    def session(self, world: int, mesh: str, jobs: Sequence[Job]) -> list[Outcome]:
        """Return the outcomes of the jobs on this mesh, up to the first that does not come to its end."""
        return self._ask("session", self.kind, self.target, world, mesh, jobs, self.seconds)

    def close(self) -> None:
        """End the process and its ranks."""
        self.program.close()

    def _ask(self, what: str, *arguments: Any) -> Any:
        line = base64.b64encode(pickle.dumps((what, arguments)))
        return pickle.loads(base64.b64decode(self.program.ask(line, "'import'" if what == "kind" else repr(what))))


class Checking:
    """One check."""

    def __init__(self, fleet: Fleet, report: Report, folder: Path):
        self.fleet, self.report, self.folder = fleet, report, folder
        self.shapes: dict[str, tuple[int, ...]] = dict(SHAPES[fleet.kind])
        self.plain = "one" if fleet.kind == "torch" else "fsdp"
        self.truths: dict[Any, Truth] = {}
        self.explained: dict[Any, str] = {}
        self.hardly: set[str] = set()
        self.eps = float(np.finfo(report.dtype).eps)

    def all(self, on_run: Callable[[str], None]) -> None:
        """Try all numbers of ranks. A checkpoint goes from one process to the first, to the next, ..., and back."""
        on_run("one process")
        if not self._begin():
            return
        names = tuple(self.shapes)
        saved = self._control(names)
        resumes = saved is not None
        for world in self.report.worlds:
            on_run(f"{world} ranks")
            saved = self._world(world, names, saved) or saved
        if resumes and saved is not None and saved.world > 1:
            on_run("one process")
            job = self._rest(saved.names, saved)
            (outcome,) = self.fleet.session(1, self.plain, [job])
            self._judge(f"one/resume-from-{saved.world}", 1, outcome, job, saved=saved)
        if self.hardly:
            self.note(
                f"only departures of more than {MOST_NOISE:g} are seen of {', '.join(names)}: so noisy are the steps"
            )

    def job(self, names: Sequence[str], steps: int, *, absent: bool = False, micros: int = 1, **more: Any) -> Job:
        """Return a job of so many steps on these parameters; ``absent``: `LATE` has no gradient in the second one."""
        random, unit = np.random.default_rng(7), 2.0 ** -UNITS[self.report.dtype]

        def drawn(shape: tuple[int, ...]) -> np.ndarray:  # few bits: sums of some are exact; too many for float32
            return np.rint(random.uniform(-2, 2, shape) / unit) * unit

        params = {n: drawn(s) for n, s in self.shapes.items()}
        grads: list[list[Named]] = []
        for t in range(steps):
            whole = {n: drawn(s) for n, s in self.shapes.items()}
            whole = {n: g + 4 * np.eye(len(g)) if g.shape == (8, 8) else g for n, g in whole.items()}
            parts = [{n: drawn(g.shape) for n, g in whole.items()} for _ in range(MICROS - 1)]
            rest = {n: g - np.sum([part[n] for part in parts], 0) for n, g in whole.items()}
            row = [*parts, rest] if micros > 1 else [whole]
            grads.append([{n: g for n, g in part.items() if not (absent and t == 1 and n == LATE)} for part in row])
        kept = [[{n: g[n] for n in names if n in g} for g in row] for row in grads]
        return Job({n: params[n] for n in names}, kept, self.report.dtype, **more)

    def _begin(self) -> bool:
        """Find the parameters that the subject takes in one process; return False if it takes none."""
        without = [n for n in self.shapes if not n.endswith("bias")]
        for mesh in dict.fromkeys((self.plain, "fsdp")):
            said = []
            for names in ([*self.shapes], without):
                (outcome,) = self.fleet.session(1, mesh, [self.job(names, 2)])
                if outcome.traces:
                    break
                said.append(outcome.said())
            if outcome.traces:
                if said:
                    self.report.notes.append(f"it is given no bias: with one {said[0]}")
                if mesh != self.plain:
                    self.report.notes.append("one process has parameters that are DTensors: it does not take others")
                self.plain, self.shapes = mesh, {n: self.shapes[n] for n in names}
                return True
        self.report.ended = f"it does not run in one process: {said[-1]}"
        return False

    def truth(self, names: Sequence[str], absent: bool = False) -> Truth:
        """Return the parameters of one process after each step, with limits from its answer to changed gradients."""
        key = (*names, absent)
        if key in self.truths:
            return self.truths[key]
        steps = FEW if absent else STEPS
        job = self.job(names, steps, absent=absent)
        first = replace(job, grads=job.grads[:HALF])
        levels = {k: v for k, v in NARROW.items() if np.dtype(self.report.dtype).itemsize == 8 or k == "bfloat16"}
        jobs = [job, *(_shaken(job, 4 * self.eps, seed) for seed in (1, 2))]
        for swallowed, rounding in levels.values():
            jobs += [_shaken(first, swallowed, 3), *(_shaken(job, rounding, seed) for seed in (4, 5))]
        found = self._traces(1, self.plain, jobs)
        if found is None:
            raise Ended(f"{self.report.target} does not make the same steps twice in one process")
        values = found[0].values
        if not all(np.isfinite(v).all() for row in values for v in row.values()):
            raise Ended(f"{self.report.target} gives parameters that are not finite in one process")
        limits: list[dict[str, float]] = [dict.fromkeys(names, 0.0)]
        made = Truth(values, [], found[0].keys)
        for name in names:
            index = np.arange(values[0][name].size).reshape(values[0][name].shape)
            shaken = found[1:3]
            for k, type_ in enumerate(levels):
                probe, *rough = found[3 + 3 * k : 6 + 3 * k]
                moved = not np.array_equal(values[1][name], values[0][name])
                if moved and np.array_equal(probe.values[1][name], values[1][name]):
                    small, large = (made.error(HALF, name, r.values[HALF][name], index) for r in (probe, rough[0]))
                    share = levels[type_][0] / levels[type_][1]
                    if (
                        large and not 0.1 * share * large < small < 10 * share * large
                    ):  # else the step depends on signs alone
                        shaken, self.report.narrow[name] = rough, type_
            noise = 0.0
            for t in range(1, steps + 1):
                noise = max(noise, *(made.error(t, name, s.values[t][name], index) for s in shaken))
                size = float(np.linalg.norm(values[t][name]))
                moved_by = float(np.linalg.norm(values[t][name] - values[0][name]))
                rounding = 4 * self.eps * t * size / moved_by if moved_by else 0.0
                if t == len(limits):
                    limits.append({})
                limits[t][name] = min(max(64 * self.eps, 8 * noise), MOST_NOISE) + rounding
            if 8 * noise > MOST_NOISE:
                self.hardly.add(name)
            if np.array_equal(values[-1][name], values[0][name]):
                self.note(f"{name} does not move")
            self.report.noise = max(self.report.noise, noise)
        made.limits = limits
        self.truths[key] = made
        return made

    def note(self, text: str) -> None:
        """Add ``text`` to the notes once."""
        if text not in self.report.notes:
            self.report.notes.append(text)

    def _traces(self, world: int, mesh: str, jobs: Sequence[Job]) -> list[Trace] | None:
        """Return the traces of jobs in one process; None if one did not come to its end."""
        outcomes = self.fleet.session(world, mesh, jobs)
        return (
            [o.traces[0] for o in outcomes] if len(outcomes) == len(jobs) and all(o.traces for o in outcomes) else None
        )

    def _control(self, names: tuple[str, ...]) -> Saved | None:
        """Return a checkpoint of one process; None if a process that loads it does not go on as without."""
        saving = self.job(names, HALF, save=str(self.folder / "from-1"))
        saved = Saved(1, saving.save, names, {})
        loading = self._rest(names, saved)
        outcomes = self._each(1, self.plain, [saving, loading])
        if failed := next((o for o in outcomes if not o.traces), None):
            text = f"no checkpoint by torch.distributed.checkpoint, in one process either: {failed.said()}"
            self.report.results.append(Result("resume", "must", SKIPPED, message=text))
            return None
        saved = saved._replace(types=_types(outcomes[0]))
        before = len(self.report.results)
        self._judge("one/resume", 1, outcomes[1], loading, saved=saved)
        if self.report.results[-1].status == FAILED:
            return None
        del self.report.results[before:]  # the last run of all sees the same
        return saved

    def _rest(self, names: Sequence[str], saved: Saved) -> Job:
        job = self.job([n for n in names if n in saved.names], FEW, load=saved.folder)
        return replace(job, grads=job.grads[HALF:])

    def _world(self, world: int, names: tuple[str, ...], origin: Saved | None) -> Saved | None:
        """Do all jobs on one number of ranks. Return its checkpoint; None if its steps are wrong."""
        label = f"{self.report.mesh}-{world}"
        plan = {"steps": self.job(names, STEPS)}
        if self.fleet.kind == "torch":  # optax sees whole gradients only
            plan["accumulation"] = self.job(names, FEW, micros=MICROS)
        if self.report.mesh != "ddp" and self.fleet.kind == "torch":
            plan["no-gradient"] = self.job(names, FEW, absent=True)
        if origin is not None:
            plan["save"] = self.job(names, HALF, save=str(self.folder / f"from-{world}"))
            plan[f"resume-from-{origin.world}"] = self._rest(names, origin)
        outcomes = self.fleet.session(world, self.report.mesh, [*plan.values()])
        kept = tuple(n for n in names if self._filled(n, world))
        if not outcomes[0].traces:
            self._judge(f"{label}/steps", world, outcomes[0], plan["steps"])
            if kept == names:
                self.note(f"{label}: nothing else is tried")
                return None
            first = len(self.report.results) - 1
            saved = self._world(world, kept, origin)
            if self.report.results[first + 1].message == self.report.results[first].message:
                del self.report.results[first + 1]
            else:  # it says something else where each rank has rows
                left = ", ".join(n for n in names if n not in kept)
                self.report.results[first] = replace(self.report.results[first], id=f"{label}/few-rows")
                self.note(f"{label}: all but few-rows is without {left}, of which some ranks have nothing")
            return saved
        outcomes += self._each(world, self.report.mesh, [*plan.values()][len(outcomes) :])
        saved, before = None, len(self.report.results)
        for (what, job), outcome in zip(plan.items(), outcomes, strict=True):
            if what == "save" and outcome.traces:
                saved = Saved(world, job.save, names, _types(outcome))
            else:
                self._judge(f"{label}/{what}", world, outcome, job, saved=origin if job.load else None)
        return saved if self.report.results[before].status == PASSED else None

    def _filled(self, name: str, world: int) -> bool:
        """Return True if each rank has rows of a parameter: of n rows, all ranks but the last have ceil(n / world)."""
        sides = self.shapes[name] if self.report.mesh in ("tp", "fsdp-tp") else self.shapes[name][:1]
        return all(-(-n // world) * (world - 1) < n for n in sides)

    def _each(self, world: int, mesh: str, jobs: Sequence[Job]) -> list[Outcome]:
        """Return the outcomes of all jobs; new processes go on after a job that did not come to its end."""
        outcomes: list[Outcome] = []
        while len(outcomes) < len(jobs):
            outcomes += self.fleet.session(world, mesh, jobs[len(outcomes) :])
        return outcomes

    def _judge(self, id: str, world: int, outcome: Outcome, job: Job, saved: Saved | None = None) -> None:
        """Add one result to the report."""
        if not outcome.traces:
            status = ERROR if outcome.raised else FAILED
            self.report.results.append(Result(id, "must", status, message=outcome.said()))
            return
        truth = self.truth(tuple(job.params), absent=any(len(g) < len(job.params) for r in job.grads for g in r))
        start = HALF if saved else 0
        found, worst = truth.departures(outcome.traces, start)
        message = ""
        if found:
            worst = max(found, key=lambda d: d.error)
            message = self._named(found, outcome.traces, truth, job, world, start)
        elif saved:
            message = _changed(saved.types, _types(outcome, loaded=True))
        status = FAILED if message else PASSED
        gap = _gap(worst, outcome.traces, truth, start)
        self.report.results.append(Result(id, "must", status, gap=gap, message=message))

    # ---- what departs -----------------------------------------------------------------------------------------------

    def _named(
        self, found: list[Departure], traces: list[Trace], truth: Truth, job: Job, world: int, start: int
    ) -> str:
        """Return in words the ranks and parameters that depart, and their mistake."""
        t, before = found[0].step - start, self.job(tuple(job.params), HALF) if start else None
        seen = (world, t, start, *((d, traces[d.rank].values[t].get(d.name, np.empty(0)).tobytes()) for d in found))
        if seen in self.explained:  # jobs that begin with the same steps share it
            return self.explained[seen]
        cut = replace(job, grads=job.grads[:t], load="", save="")
        mistakes: Mistakes = {}
        whole = [(text, r) for text, r in self._wrong_jobs(cut, world, before, truth)]
        parts = [self._part(cut, trace, before) for trace in traces] if world > 1 else []
        jobs = [*(r for _, r in whole), *(p for p in parts if p is not None)]
        outcomes = self._each(1, self.plain, jobs) if jobs else []
        rest = iter(outcomes[len(whole) :])
        alone = [next(rest) if p is not None else Outcome() for p in parts]
        for (text, _), outcome in zip(whole, outcomes, strict=False):
            if outcome.traces:
                rows = outcome.traces[0].values
                rows = [*[{}] * (t + 1 - len(rows)), *rows]
                mistakes[text] = [
                    [{n: row[n].ravel()[i] for n, i in tr.index.items() if n in row} for row in rows] for tr in traces
                ]
        mistakes[SHARD] = [outcome.traces[0].values if outcome.traces else None for outcome in alone]
        joint = {name: _joint([d for d in found if d.name == name], traces, truth, t) for name in truth.values[0]}
        labels = {one: self._mistake(one, traces, truth, t, mistakes, joint[one.name]) for one in found}
        lengths = sorted({label for label in labels.values() if re.match(r"x[0-9.]+", label)})
        by: dict[str, list[Departure]] = {}
        for one, label in labels.items():
            if len(lengths) > 1 and label in lengths:
                ends = f"{lengths[0].partition(':')[0]} to {lengths[-1].partition(':')[0]}"
                label = f"another length on each rank, {ends}: a norm is taken of the shard"
            by.setdefault(label, []).append(one)
        texts = []
        for label, ones in by.items():
            label += self._blocks(ones, cut, traces, truth, start) if label == SHARD else ""
            texts.append(f"{label or 'no known mistake'}: {_places(ones, traces)}")
        self.explained[seen] = "; ".join(texts) + _agreeing(found, traces)
        return self.explained[seen]

    def _mistake(
        self, one: Departure, traces: list[Trace], truth: Truth, t: int, mistakes: Mistakes, together: Fit | None
    ) -> str:
        """Return the name of the mistake that explains one departure; "" if none does."""
        trace, name = traces[one.rank], one.name
        now, index = trace.values[t].get(name), trace.index[name]
        if now is None or now.shape != index.shape:
            return f"its part has another shape after the step ({None if now is None else now.shape} for {index.shape})"
        twins = [r for r, other in enumerate(traces) if np.array_equal(other.index[name], index)]
        differ = any(not np.array_equal(traces[r].values[t][name], now) for r in twins)
        suffix = ", so replicas differ" if differ else ""
        if not np.isfinite(now).all():
            return "its part is not finite" + suffix
        last = trace.values[t - 1][name] if t else None
        if last is not None and np.array_equal(now, last):
            return STILL + suffix
        moved = float(np.linalg.norm(truth.values[one.step][name] - truth.values[0][name])) or 1.0
        distances = []
        for text, ranks in mistakes.items():
            values = ranks[one.rank] if one.rank < len(ranks) else None
            part = values[t].get(name) if values is not None and t < len(values) else None
            if part is not None and part.shape == now.shape:
                distances.append((float(np.linalg.norm(now - part)) / moved, text))
        distance, text = min(distances, default=(math.inf, ""))
        fit = together
        if last is not None and one.step and fit is None:
            fit = _fit(now - last, truth.steps(one.step)[name].ravel()[index], last)
        if fit is not None and abs(fit[0]) < 1e-3:
            return f"{STILL}, but for weight decay{suffix}"
        if distance <= max(one.limit if one.limit < MOST_NOISE else 0.0, NEAR * one.error):
            return text + suffix
        if last is not None and one.step:
            if fit is not None:
                return _times(*fit, one.error) + suffix
            lone = mistakes[SHARD][one.rank] if mistakes[SHARD] else None
            if lone and name in lone[t]:  # after loading, the parameters differ: two decays
                alone = _fit(now - last, lone[t][name] - lone[t - 1][name], last, lone[t - 1][name])
                if alone is not None:
                    return (SHARD if abs(alone[0] - 1) < 1e-3 else LENGTH) + suffix
            if one.step > 1 and _once(now - last, truth.steps(one.step - 1)[name].ravel()[index], last):
                return "the step before, once more: it is one step late" + suffix
            for other, step in truth.steps(one.step).items():
                for rank, trace in enumerate(traces):
                    theirs = trace.index.get(other)
                    if theirs is None or (other == name and np.array_equal(theirs, index)):
                        continue
                    if _once(now - last, step.ravel()[theirs], last, truth.values[one.step - 1][other].ravel()[theirs]):
                        return f"the step of the part of {other} that rank {rank} has" + suffix
        rough = distance <= 3 * NEAR * one.error and name in self.report.narrow
        return text + suffix if rough else suffix.removeprefix(", so ")

    def _part(self, job: Job, trace: Trace, before: Job | None) -> Job | None:
        """Return the job in which one rank's parts are whole parameters; None if it has no entries."""
        index = {n: i for n, i in trace.index.items() if i.size}
        index = {n: i for n, i in index.items() if n.endswith("weight") or n.replace("bias", "weight") in index}
        index = {n: i for n, i in index.items() if i.ndim == 2 or len(i) == len(index[n.replace("bias", "weight")])}

        def of(rows: Iterable[Sequence[Named]]) -> list[list[Named]]:
            return [[{n: g[n].ravel()[i] for n, i in index.items() if n in g} for g in row] for row in rows]

        if not index:
            return None
        params = {n: job.params[n].ravel()[i] for n, i in index.items()}
        more: dict[str, Any] = {"before": of(before.grads), "spoil": ("nothing", "")} if before is not None else {}
        return replace(job, params=params, grads=of(job.grads), **more)

    def _wrong_jobs(self, job: Job, world: int, before: Job | None, truth: Truth) -> list[tuple[str, Job]]:
        """Return the known mistakes that one process can make on whole parameters, each with its name."""
        found: list[tuple[str, Job]] = []
        right, (row, *_) = job.grads[:-1], job.grads[-1:] or [[]]
        if before is not None:
            spoiled = [
                ("its state is lost on loading (an owner without state), as if begun anew", ("new", "")),
                ("the tensors of its state are lost on loading (an owner without state)", ("tensors", "")),
                ("the numbers of its state, such as the count of steps, are lost on loading", ("numbers", "")),
                *((f"{key!r} of its state is lost on loading", ("key", key)) for key in truth.keys),
                ("its state is cast to float32 on loading", ("cast", "float32")),
                ("its state is cast to bfloat16 on loading", ("cast", "bfloat16")),
            ]
            job = replace(job, before=before.grads, spoil=("nothing", ""))
            found = [(text, replace(job, spoil=spoil)) for text, spoil in spoiled] if self.fleet.kind == "torch" else []

        def summed(*weights: float) -> Job:  # in the last step, of its micro-batches
            last = {n: np.sum([w * g[n] for w, g in zip(weights, row, strict=True)], 0) for n in row[0]}
            return replace(job, grads=[*right, [last]])

        if not row:
            return found
        if right and before is None and self.fleet.kind == "torch":
            anew = replace(job, before=right, grads=[row], spoil=("new", ""))
            found.append(("its state is lost at this step, as if begun anew", anew))
        micros = len(row)
        ones = [1.0] * micros
        if micros > 1:
            found += [
                ("a step after each micro-batch", replace(job, each="partial")),
                ("a step after each micro-batch, with its gradient alone", replace(job, each="alone")),
                ("the gradient of the last micro-batch alone", summed(*[0.0] * (micros - 1), 1.0)),
                ("the gradient of the first micro-batch alone", summed(1.0, *[0.0] * (micros - 1))),
                ("double accumulation: running sums of the micro-batches are added",
                 summed(*(float(micros - k) for k in range(micros)))),
                ("double accumulation: the last micro-batch counts twice", summed(*ones[:-1], 2.0)),
                ("the mean of the micro-batches for their sum", summed(*[1 / micros] * micros)),
            ]  # fmt: skip
        twice = f"counted twice{', or summed over the 2 ranks, not averaged' if world == 2 else ''}"
        twice = f"double accumulation: {twice}" if micros > 1 else twice
        factors = {2.0: f"x2: {twice}"}
        if world > 1:
            factors |= {float(world): f"x{world}: summed over the ranks, not averaged"} if world > 2 else {}
            factors |= {1.0 / world: f"x1/{world}: averaged twice"}
        found += [(f"as if the gradient were {text}", summed(*[c * x for x in ones])) for c, text in factors.items()]
        found += [
            ("without weight decay", replace(job, fields={"weight_decay": 0.0})),
            ("with weight decay twice", replace(job, fields={"weight_decay": 2.0**-2})),
        ]
        if self.report.mesh == "ddp" and world > 1 and micros == 1:
            for rank in range(world):
                own = shares(row[0], world, 97 * len(right))[rank]
                text = f"the gradient of the data of rank {rank} alone"
                found.append((text, replace(job, grads=[*right, [own]])))
        return found

    def _blocks(self, ones: list[Departure], job: Job, traces: list[Trace], truth: Truth, start: int) -> str:
        """Return a remark if one process updates blocks of rows by themselves, so that ranks may have cut others."""
        name = ones[0].name
        rows = self.shapes[name][0]
        if start or not job.grads or len(self.shapes[name]) < 2:
            return ""
        changed = {**job.grads[0][0], name: job.grads[0][0][name].copy()}
        changed[name][0] *= 0.5
        pair = self._traces(1, self.plain, [replace(job, grads=[[g]]) for g in (job.grads[0][0], changed)])
        if pair is None:
            return ""
        steps = [trace.values[1][name] for trace in pair]
        reached = int((np.linalg.norm(steps[0] - steps[1], axis=1) > 64 * self.eps).sum())
        if not 1 < reached < rows:
            return ""
        return f" (split by local rows: one process has blocks of {reached} rows, the ranks cut their own)"


SHARD = "each shard is updated by itself"
LENGTH = "a local Gram: each shard goes in the direction that it has by itself, with another length"
STILL = "did not step"


def _shaken(job: Job, size: float, seed: int) -> Job:
    """Return the job with every entry of the gradients changed by the share ``size`` of itself, up or down."""
    random = np.random.default_rng(seed)
    grads = [[{n: g * (1 + size * random.choice([-1.0, 1.0], g.shape)) for n, g in row.items()} for row in r]
             for r in job.grads]  # fmt: skip
    return replace(job, grads=grads)


def _fit(step: np.ndarray, right: np.ndarray, *params: np.ndarray) -> Fit | None:
    """Return the first two factors of a step that is ``a right + b param + ...``; None if it is no such sum.

    Fewer than five entries give None: too few to tell.
    """
    if any(step.shape != a.shape for a in (right, *params)) or step.size < 5 or not np.linalg.norm(right):
        return None
    columns = np.stack([a.ravel() for a in (right, *params)], 1)
    found = np.linalg.lstsq(columns, step.ravel(), rcond=None)[0]
    rest = float(np.linalg.norm(step.ravel() - columns @ found))
    return (float(found[0]), float(found[1])) if rest <= 1e-3 * float(np.linalg.norm(step)) else None


def _joint(ones: list[Departure], traces: list[Trace], truth: Truth, t: int) -> Fit | None:
    """Return `_fit` of the parts of all ranks that depart in a parameter: one part may have too few entries."""
    if not t or not ones or not ones[0].step:
        return None
    step, name = ones[0].step, ones[0].name
    right = (truth.values[step][name] - truth.values[step - 1][name]).ravel()
    parts = [traces[d.rank] for d in ones]
    if any(trace.values[t].get(name, np.empty(0)).shape != trace.index[name].shape for trace in parts):
        return None
    now, last, index = (
        np.concatenate([np.ravel(a[name]) for a in arrays])
        for arrays in ([p.values[t] for p in parts], [p.values[t - 1] for p in parts], [p.index for p in parts])
    )
    return _fit(now - last, right[index], last)


def _once(step: np.ndarray, right: np.ndarray, *params: np.ndarray) -> bool:
    fit = _fit(step, right, *params)
    return fit is not None and abs(fit[0] - 1) < 1e-3


def _times(a: float, b: float, error: float) -> str:
    """Return in words the factors ``a, b`` of a step ``a right + b param``."""
    words = {2.0: ": twice", 0.5: ": half", -1.0: ": the wrong sign", 4.0: ": four times", 0.25: ": a quarter"}
    if abs(a - 1) < 1e-4 and abs(b) > 1e-4:
        return f"the right step with another weight decay ({-b:+.2g} of the parameter)"
    sizes = {"float32": (2.0**-34, 2.0**-20), "bfloat16": (2.0**-12, 2.0**-6)}
    for type_, (least, most) in sizes.items():
        if abs(a - 1) < 0.1 * most and least < error < most:
            return f"the right step, rounded as in {type_}"
    known = next((text for value, text in words.items() if abs(a - value) < 0.01 * abs(value)), "")
    return f"x{a:.2f}{known}" if abs(a - 1) > 0.01 else f"x{a:.6g}"


def _gap(worst: Departure, traces: list[Trace], truth: Truth, start: int) -> Gap:
    """Return the departure as a row of the table, over the movement since the first step."""
    part = traces[worst.rank].values[worst.step - start].get(worst.name)
    index = traces[worst.rank].index[worst.name]
    cosine = norms = math.nan
    if part is not None and part.shape == index.shape:
        begin = truth.values[0][worst.name].ravel()[index]
        own, right = part - begin, truth.values[worst.step][worst.name].ravel()[index] - begin
        a, b = float(np.linalg.norm(own)), float(np.linalg.norm(right))
        if a and b:
            cosine, norms = float(np.vdot(own, right)) / (a * b), a / b
    ratio = worst.error / worst.limit if worst.limit else 0.0 if not worst.error else math.inf
    return Gap(worst.step, f"{worst.name}, rank {worst.rank}", worst.error, worst.limit, ratio, cosine, norms)


def _types(outcome: Outcome, loaded: bool = False) -> dict[str, str]:
    """Return the dtypes of the tensors of the state on all ranks, before saving or after loading."""
    return {k: v for trace in outcome.traces for k, v in (trace.loaded if loaded else trace.saved).items()}


def _changed(before: dict[str, str], after: dict[str, str]) -> str:
    """Return in words the dtypes of states that saving and loading changed."""
    lost = [f"{k} was {v} and is {after[k]}" for k, v in sorted(before.items()) if after.get(k, v) != v]
    return f"loading changes the precision of its state: {'; '.join(lost[:3])}" if lost else ""


def _places(ones: list[Departure], traces: list[Trace]) -> str:
    """Return parameters and ranks in words."""
    ranks = sorted({d.rank for d in ones})
    names = list(dict.fromkeys(d.name for d in ones))
    owned = {(n, r) for r in ranks for n, i in traces[r].index.items() if i.size}
    here = {(d.name, d.rank) for d in ones}
    everywhere = ranks == [r for r, t in enumerate(traces) if any(t.index[n].size for n in names)]
    on = "" if everywhere and len(traces) > 1 else f" on ranks {ranks}" if len(traces) > 1 else ""
    if here == owned and len(names) > 1:
        return "every parameter" + (on or (" on every rank" if len(traces) > 1 else ""))
    return ", ".join(names) + (on or (" on every rank" if len(traces) > 1 else ""))


def _agreeing(found: list[Departure], traces: list[Trace]) -> str:
    names = [n for n in traces[0].index if n not in {d.name for d in found}]
    return f" (right: {', '.join(names)})" if names else ""
