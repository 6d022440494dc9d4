"""Experiments and claims: a claim has a criterion that stands before the result, an experiment decides one or several.

An experiment computes the numbers of one seed, as JSON. Verdict, table and figure are functions of the numbers of all
seeds alone, so that they can be made again from the file that a run has written.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from precond_ref.problems.base import import_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

np = import_numpy()
Array = Any
Numbers = dict[str, Any]
Tick = Callable[[float], None]
"""Told the share of its work that a function has done."""

HOLDS, PART, NOT, UNTESTED = "holds", "holds in part", "does not hold here", "cannot be tested here"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A5195", "#8C6D31", "#B0B0B0")
"""The colours of Okabe and Ito without the yellow, and three more."""


class Verdict(NamedTuple):
    """The outcome of a criterion."""

    word: str
    """`HOLDS`, `PART`, `NOT` or `UNTESTED`."""
    measured: str
    """The numbers on which it rests, with their spread; for `PART` where it holds, for `UNTESTED` the reason."""


def decided(parts: Mapping[str, bool], measured: str) -> Verdict:
    """Return that a claim holds if all its parts do, and in part, with their names, if some do."""
    yes, no = ([name for name, good in parts.items() if good == wanted] for wanted in (True, False))
    if yes and no:
        return Verdict(PART, f"Holds for {', '.join(yes)}; not for {', '.join(no)}. {measured}")
    return Verdict(NOT if no else HOLDS, measured)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of a paper."""

    name: str
    """Letter and number, such as "A1"."""
    paper: str
    text: str
    """The claim in our words."""
    criterion: str
    """The claim holds here if ..."""
    judge: Callable[[list[Numbers]], Verdict]
    """The verdict from the numbers of all seeds."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment that decides claims."""

    name: str
    title: str
    """The setting, in one sentence."""
    minutes: float
    """Processor time with five seeds, measured."""
    claims: tuple[Claim, ...]
    one: Callable[..., Numbers]
    """``one(seed, tick, **options)``, and ``found=`` if there is a search: the numbers of one seed."""
    draw: Callable[[list[Numbers]], Figure]
    table: Callable[[list[Numbers]], str] | None = None
    """A Markdown table; None: that of all numbers."""
    search: Callable[..., Numbers] | None = None
    """``search(tick, **options)``: learning rates, searched before from other seeds."""
    needs: tuple[str, ...] = ()
    """Data files and libraries beyond NumPy."""
    small: Mapping[str, Any] = field(default_factory=dict)
    """Options of a run of seconds, which shows that the experiment runs and not what it finds."""

    def run(self, seeds: Sequence[int], tick: Tick = lambda share: None, **options: Any) -> Numbers:
        """Return the record of a run: its numbers for each seed, with settings and processor time."""
        start, parts = time.process_time(), len(seeds) + 2 * (self.search is not None)
        record: Numbers = {"experiment": self.name, "seeds": list(seeds), "options": options}
        if self.search is not None:
            record["search"] = self.search(lambda share: tick(2 * share / parts), **options)
            options = {**options, "found": record["search"]}
        done = parts - len(seeds)
        record["runs"] = []
        for i, seed in enumerate(seeds):

            def inside(share: float, before: int = done + i) -> None:
                tick((before + share) / parts)

            record["runs"].append(self.one(seed, inside, **options))
        record["seconds"] = round(time.process_time() - start, 1)
        record["versions"] = {"python": platform.python_version(), "numpy": np.__version__}
        record["threads"] = os.environ.get("OMP_NUM_THREADS")
        return plain(record)


# ---- numbers --------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Return nested numbers as JSON has them, with five significant digits; null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(each) for each in value]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    number = float(value)
    return float(f"{number:.5g}") if np.isfinite(number) else None


def spread(values: Iterable[float | None], digits: int = 3, form: str = "g") -> str:
    """Return the median of the seeds with the least and the largest."""
    found = sorted(float("inf") if value is None else value for value in values)
    low, mid, high = (f"{x:.{digits}{form}}" for x in (found[0], statistics.median(found), found[-1]))
    return f"{mid} ({low} to {high})" if low != high else mid


class Difference(NamedTuple):
    """Mean of the paired differences a - b over the seeds, with two standard errors."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:+.3g} ± {self.error:.2g}"

    @property
    def below(self) -> bool:
        """a is smaller, beyond the error."""
        return self.mean < -self.error

    @property
    def above(self) -> bool:
        """a is larger, beyond the error."""
        return self.mean > self.error

    def within(self, margin: float) -> bool:
        """The interval lies within the margin."""
        return abs(self.mean) + self.error <= margin


def paired(a: Sequence[float | None], b: Sequence[float | None]) -> Difference:
    """Return the difference of two methods that ran on the same seeds; infinite if a run of ``a`` ended early."""
    if None in a or None in b:
        return Difference(float("inf") if None in a else float("-inf"), 0.0)
    gaps = [x - y for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    error = 2 * statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("inf")
    return Difference(statistics.mean(gaps), error)


def column(runs: list[Numbers], *keys: Any) -> list[Any]:
    """Return ``run[key][key]...`` of each run."""
    for key in keys:
        runs = [run[key] for run in runs]
    return runs


def ranks(values: Array) -> Array:
    """Return the ranks of distinct or tied values, (n,), ties in the mean."""
    order = np.unique(values, return_inverse=True)[1]
    count = np.bincount(order)
    return (np.cumsum(count) - 0.5 * (count - 1))[order]


def spearman(a: Array, b: Array) -> float:
    """Return Spearman's correlation; NaN for constants."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(ranks(np.ravel(a)), ranks(np.ravel(b)))[0, 1])


# ---- tables and figures ---------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def table(runs: list[Numbers]) -> str:
    """Return a Markdown table of all numbers, their medians with the least and the largest; a list is one cell."""
    rows: list[tuple[str, str]] = []

    def walk(path: str, values: list[Any]) -> None:
        first = values[0]
        if isinstance(first, dict):
            for key in first:
                walk(f"{path}, {key}" if path else key, column(values, key))
        elif isinstance(first, list) and any(isinstance(each, (dict, list)) for each in first):
            for i in range(len(first)):
                walk(f"{path} {i + 1}", column(values, i))
        elif isinstance(first, list):
            rows.append((path, "; ".join(spread(column(values, i)) for i in range(len(first)))))
        else:
            rows.append((path, spread(values)))

    walk("", runs)
    return markdown(("quantity", "median (least to largest)"), rows)


def panels(count: int, width: float = 5.0, height: float = 3.7) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels side by side."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"svg.hashsalt": "precond-ref", "svg.fonttype": "path"})
    figure = Figure(figsize=(width * count, height), layout="constrained")
    found = list(np.ravel(figure.subplots(1, count)))
    for axes in found:
        axes.set_prop_cycle(color=COLOURS)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found


def line(axes: Axes, x: Sequence[float], curves: Sequence[Sequence[Any]], label: str, rank: int, **style: Any) -> None:
    """Draw the median of the seeds' curves and a band from the least to the largest."""
    values = np.array(curves, dtype=float)
    colour = COLOURS[rank % len(COLOURS)]
    axes.plot(x, np.median(values, axis=0), color=colour, label=label, **{"linewidth": 1.8, **style})
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.16, linewidth=0)


def dots(axes: Axes, names: Sequence[str], values: Sequence[Sequence[float | None]], best: int | None = None) -> None:
    """Draw a row for each name: a dot for each seed and a bar at their median, the first on top."""
    for row, each in enumerate(values):
        finite = [x for x in each if x is not None]
        colour = COLOURS[0] if row == best else "#555555"
        axes.plot(finite, [row] * len(finite), "o", color=colour, alpha=0.45, markersize=5)
        if finite:
            axes.plot([statistics.median(finite)] * 2, [row - 0.32, row + 0.32], color=colour, linewidth=2.2)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def title(axes: Axes, text: str, **labels: Any) -> None:
    """Set the title at the left, labels and limits, and plain numbers on the axes."""
    from matplotlib.ticker import LogLocator

    axes.set_title(text, loc="left", fontsize=10)
    axes.set(**labels)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            low, high = axis.get_view_interval()
            if 0 < high < 200 * low:
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
    if axes.get_xscale() == "linear" and axes.get_legend_handles_labels()[1] == []:
        axes.locator_params(axis="x", nbins=5)


# ---- files ----------------------------------------------------------------------------------------------------------


def write(experiment: Experiment, record: Numbers, folder: Path) -> None:
    """Write ``NAME.json``, and from it ``NAME.svg`` and ``NAME.txt``, the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{experiment.name}.json").write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")
    (folder / f"{experiment.name}.txt").write_text((experiment.table or table)(record["runs"]), encoding="utf-8")
    experiment.draw(record["runs"]).savefig(folder / f"{experiment.name}.svg", metadata={"Date": None})


def read(experiment: Experiment, folder: Path) -> Numbers | None:
    """Return the record that a run has written; None without one."""
    file = folder / f"{experiment.name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def verdicts(experiments: Iterable[Experiment], folder: Path, untested: Iterable[Claim] = ()) -> str:
    """Return Markdown tables of all claims, a row each, and the times, from the records in ``folder``."""
    papers: dict[str, list[tuple[Claim, Verdict, str]]] = {}
    times: dict[str, float] = {}
    for experiment in experiments:
        record = read(experiment, folder)
        if record:
            times[experiment.name] = record["seconds"]
        for claim in experiment.claims:
            verdict = claim.judge(record["runs"]) if record else Verdict("not run", "")
            seeds = f", {len(record['seeds'])} seeds" if record else ""
            papers.setdefault(claim.paper, []).append(
                (claim, verdict, f"`precond-ref experiments {experiment.name}`{seeds}")
            )
    for claim in untested:
        papers.setdefault(claim.paper, []).append((claim, claim.judge([]), ""))
    parts = []
    for paper, found in papers.items():
        rows = [
            (
                f"**{claim.name}** {claim.text} *Holds here if:* {claim.criterion}.",
                verdict.measured,
                f"**{verdict.word}** {command}",
            )
            for claim, verdict, command in sorted(found, key=lambda each: int(each[0].name[1:]))
        ]
        cells = [[cell.replace("|", "\\|").replace("~", "\\~") for cell in row] for row in rows]
        parts.append(f"## {paper}\n\n" + markdown(("claim", "measured", "verdict, command"), cells))
    each = ", ".join(f"{name} {seconds:.0f}" for name, seconds in times.items())
    parts.append(f"## Time\n\nSeconds of processor time: {each}; together {sum(times.values()) / 60:.1f} minutes.\n")
    return "\n".join(parts)
