"""Reports of a comparison: a table and notes, a figure, and JSON."""

from __future__ import annotations

import importlib
import math
import os
import platform
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import precond_ref
from precond_ref import problems
from precond_ref.compare import Comparison, UsageError
from precond_ref.compare.rates import FALLBACK, record
from precond_ref.compare.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

# Okabe and Ito's colours without the yellow, which is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BEST = 5
"""Number of runs with a colour in the figure; the others are grey."""
GREY, GREY_TEXT = "#B0B0B0", "#666666"


# ---- text -----------------------------------------------------------------------------------------------------------


def heading(comparison: Comparison) -> str:
    """Return a description of the comparison in two lines."""
    problem = comparison.problem
    batch = "no batches" if problem.batch_size is None else f"batches of {problem.batch_size}"
    entries = sum(math.prod(value.shape) for value in problem.initial.values())
    return (
        f"{problem.name}: {problems.list_problems()[problem.name]}\n"
        f"{comparison.steps} steps, {batch}, seed {problem.seed}, {entries:,} parameters, "
        f"{comparison.backend} {_version(comparison.backend)}, {problem.space.dtype}"
    )


def table(comparison: Comparison) -> Table:
    """Return a table with a row for each run, the winner first."""
    from rich.table import Table

    result = Table(box=None, pad_edge=False, header_style="bold")
    result.add_column("#", justify="right")
    result.add_column("method", no_wrap=True)
    metric = comparison.problem.metric_name
    for title in ("lr", "train loss", metric, "ms/step", "B/param", "own"):
        result.add_column(title, justify="right")
    for rank, run in enumerate(comparison.ranked, start=1):
        entrant = run.entrant
        cells = [
            entrant.name,
            f"{run.lr:.4g}",
            f"diverged at {len(run.batch_losses)}" if run.diverged else f"{run.final_loss:.4g}",
            "-" if run.diverged else f"{run.final_metric:.4g}",
            f"{run.median_ms:.3g}",
            f"{entrant.state_bytes_per_parameter:.1f}",
            f"{entrant.share:.1%}".replace("100.0%", "100%"),
        ]
        result.add_row("-" if run.diverged else str(rank), *cells, style="bold green" if rank == 1 else None)
    return result


def notes(comparison: Comparison) -> list[str]:
    """Return the winner, and notes on the columns of the table."""
    lines = [_verdict(comparison), ""]
    problem = comparison.problem
    source: dict[str, list[str]] = {"recorded": [], "default fields": [], "given": [], "fallback": []}
    for run in comparison.finished:
        source[run.lr_source].append(run.entrant.name)
    rates = []
    if source["recorded"]:
        search = record()[problem.name]
        seeds = " and ".join(map(str, search["seeds"]))
        rates.append(
            f"best of the recorded grid search, the same for every method ({search['steps']} steps"
            f"{'' if search['steps'] == comparison.steps else f', not {comparison.steps}'}, seeds {seeds}; "
            "repeat it with --tune)"
        )
    if source["default fields"]:
        rates.append(f"recorded for other fields, not tuned for these: {', '.join(source['default fields'])}")
    if source["given"]:
        rates.append(f"given for {', '.join(source['given'])}")
    if source["fallback"]:
        rates.append(f"{FALLBACK}, not tuned, for {', '.join(source['fallback'])}")
    lines.append(f"lr: {'; '.join(rates)}.")
    lines.append("train loss: on the whole training set after the last step.")
    lines.append("ms/step: median time of the optimizer's step alone, without loss and gradient.")
    lines.append("B/param: bytes of the optimizer's state per parameter entry.")
    lines.append("own: entries in parameters that the method takes. The others go to Adam() at the same lr.")
    chosen: dict[str, list[str]] = {}
    for run in comparison.finished:
        for field, value in run.entrant.chosen.items():
            chosen.setdefault(f"{field}={value:g}", []).append(run.entrant.name)
    if chosen:
        values = "; ".join(f"{setting} for {', '.join(names)}" for setting, names in chosen.items())
        lines.append(f"fields have their defaults, except {values}.")
    joined = ", ".join(run.entrant.name for run in comparison.finished if run.entrant.join)
    if joined:
        lines.append(f"the bias of a weight with two axes is the weight's last column for {joined}.")
    for reason in dict.fromkeys(comparison.left_out.values()):
        names = ", ".join(name for name, its in comparison.left_out.items() if its == reason)
        lines.append(f"left out: {names} ({reason}).")
    return lines


def _verdict(comparison: Comparison) -> str:
    problem, runs = comparison.problem, [run for run in comparison.ranked if not run.diverged]
    if not runs:
        return "Every run diverged."
    first, *others = runs
    verdict = f"{first.entrant.name} wins: final train loss {first.final_loss:.4g}"
    if others:
        verdict += f" against {others[0].final_loss:.4g} of {others[0].entrant.name}"
    best = (max if problem.higher_is_better else min)(run.final_metric for run in runs)
    holders = ", ".join(run.entrant.name for run in runs if run.final_metric == best)
    return f"{verdict}. Best {problem.metric_name}: {best:.4g} ({holders})."


# ---- JSON -----------------------------------------------------------------------------------------------------------


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return settings, versions, results (the winner first) and curves; numbers that are not finite are null."""
    problem = comparison.problem
    return {
        "problem": problem.name,
        "steps": comparison.steps,
        "seed": problem.seed,
        "backend": comparison.backend,
        "dtype": problem.space.dtype,
        "batch_size": problem.batch_size,
        "parameters": {name: list(value.shape) for name, value in problem.initial.items()},
        "metric": {"name": problem.metric_name, "higher_is_better": problem.higher_is_better},
        "versions": {
            "precond_ref": precond_ref.__version__,
            "python": platform.python_version(),
            comparison.backend: _version(comparison.backend),
        },
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "finished": len(comparison.finished) == len(comparison.planned),
        "left_out": dict(comparison.left_out),
        "results": [_result(run) for run in comparison.ranked],
    }


def _result(run: Run) -> dict[str, Any]:
    entrant = run.entrant
    return {
        "method": entrant.name,
        "fields": repr(entrant.method),
        "lr": run.lr,
        "lr_source": run.lr_source,
        "diverged": run.diverged,
        "train_loss": _number(run.final_loss),
        "metric": _number(run.final_metric),
        "ms_per_step": run.median_ms,
        "state_bytes_per_parameter": entrant.state_bytes_per_parameter,
        "own_share": entrant.share,
        "to_adam": list(entrant.to_adam),
        "batch_losses": [_number(x) for x in run.batch_losses],
        "curve": {
            "step": run.steps,
            "train_loss": [_number(x) for x in run.train_losses],
            "metric": [_number(x) for x in run.metrics],
        },
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _version(backend: str) -> str:
    return str(importlib.import_module(backend).__version__)


# ---- figure ---------------------------------------------------------------------------------------------------------


def check_output(path: Path) -> None:
    """Raise UsageError unless a figure can be written to ``path``."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError('the figure needs matplotlib: pip install "precond-ref[cli]"') from error
    suffixes = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.lower().lstrip(".") not in suffixes:
        raise UsageError(f"--output must end in one of .{', .'.join(suffixes)}, got {path}")


def figure(comparison: Comparison) -> Figure:
    """Draw training loss and test metric against the steps, the best in colours, all labelled by rank."""
    from matplotlib.figure import Figure

    problem, runs = comparison.problem, comparison.ranked
    result = Figure(figsize=(11, 4.2 + 0.12 * max(0, len(runs) - 12)), layout="constrained")
    loss, metric = result.subplots(1, 2, width_ratios=(1.15, 1))
    for axes in (loss, metric):
        axes.autoscale(False)  # it fails on losses near the largest float
    for rank, run in enumerate(runs):
        best = rank < BEST
        style = {
            "color": COLOURS[rank] if best else GREY,
            "linewidth": 2.6 if rank == 0 else 1.7 if best else 0.8,
            "zorder": 3 - rank / len(runs),
        }
        loss.plot(run.steps, run.train_losses, **style)
        metric.plot(run.steps, run.metrics, **style)
    loss.set_title("train loss", loc="left")
    metric.set_title(problem.metric_name, loc="left")
    _limit(loss, [run.train_losses for run in runs], log=True)
    _limit(metric, [run.metrics for run in runs], log=not problem.higher_is_better)
    _label(loss, comparison)
    for axes in (loss, metric):
        axes.set_xlabel("steps")
        axes.set_xlim(0, comparison.steps)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    result.suptitle(heading(comparison), x=0.01, ha="left", fontsize=10)
    return result


def _limit(axes: Axes, curves: list[list[float]], *, log: bool) -> None:
    """Set the limits of an axis: curves that rise far above the start are cut, and so are the very first steps."""
    finite = [x for curve in curves for x in curve if math.isfinite(x) and (x > 0 or not log)]
    if log:
        low, high = min(finite), max(curve[0] for curve in curves)
        pad = max((high / low) ** 0.04, 1.05)
        axes.set_yscale("log")
        axes.set_ylim(low / pad, high * pad)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
    else:
        early = statistics.median(curve[min(len(curve) - 1, len(curve) // 10)] for curve in curves)
        high = max(finite)
        axes.set_ylim(early, high + max(0.05 * (high - early), 0.01))


def _label(axes: Axes, comparison: Comparison) -> None:
    """Write the names at the right edge by final loss, the winner lowest, each with a line to the end of its curve."""
    runs = comparison.ranked
    low, high = axes.get_ylim()
    for rank, (run, line) in enumerate(zip(runs, axes.lines, strict=True)):
        tie = {"arrowstyle": "-", "linewidth": 0.7, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 0}
        axes.annotate(
            f"-  {run.entrant.name}  diverged"
            if run.diverged
            else f"{rank + 1}  {run.entrant.name}  {run.final_loss:.3g}",
            xy=(1, 1) if run.diverged else (run.steps[-1], min(max(run.final_loss, low), high)),
            xytext=(1.08, (rank + 0.5) / len(runs)),
            textcoords="axes fraction",
            va="center",
            fontsize=9.5,
            color=line.get_color() if rank < BEST else GREY_TEXT,
            fontweight="bold" if rank == 0 else "normal",
            annotation_clip=False,
            arrowprops=None if run.diverged else {**tie, "color": line.get_color()},
        )
