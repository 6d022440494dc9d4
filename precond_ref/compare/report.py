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
from precond_ref.compare.runs import CURVE_POINTS, Result, Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

# Okabe and Ito's colours without the yellow, which is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BEST = 5
"""Number of methods with a colour and a label in the figure; the others are grey."""
GREY, GREY_TEXT = "#B0B0B0", "#666666"
GAP = 0.065
"""Least distance of two labels, as a share of the height of the axes."""


# ---- text -----------------------------------------------------------------------------------------------------------


def heading(comparison: Comparison) -> str:
    """Return a description of the comparison in two lines."""
    problem = comparison.problem
    batch = "no batches" if problem.batch_size is None else f"batches of {problem.batch_size}"
    entries = sum(math.prod(value.shape) for value in problem.initial.values())
    return (
        f"{problem.name}: {problems.list_problems()[problem.name]}\n"
        f"{comparison.steps} steps, {batch}, {_seeds(comparison)}, {entries:,} parameters, "
        f"{comparison.backend} {_version(comparison.backend)}, {problem.space.dtype}"
    )


def _seeds(comparison: Comparison) -> str:
    seeds = comparison.seeds
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"median of {len(seeds)} seeds ({seeds[0]} to {seeds[-1]})"


def table(comparison: Comparison) -> Table:
    """Return a table with a row for each method, the winner first."""
    from rich.table import Table

    result = Table(box=None, pad_edge=False, header_style="bold")
    result.add_column("#", justify="right")
    result.add_column("method", no_wrap=True)
    metric = comparison.problem.metric_name
    several, target = len(comparison.seeds) > 1, comparison.target
    spread = ("least to largest",) if several else ()
    for title in ("lr", "train loss", *spread, metric, *spread, "to target", "s", "ms/step", "B/param", "own"):
        result.add_column(title, justify="right", no_wrap=title in spread)
    for rank, run in enumerate(comparison.ranked, start=1):
        entrant = run.entrant
        cells = [entrant.name, f"{run.lr:.4g}", _ended(run)]
        if several:
            cells.append("-" if run.diverged else _band(run, "train_losses"))
        cells.append("-" if run.diverged else f"{run.final_metric:.4g}")
        if several:
            cells.append("-" if run.diverged else _band(run, "metrics"))
        steps = math.inf if target is None else run.steps_to(target[0])
        cells += [
            f"{steps}" if math.isfinite(steps) else "-",
            f"{run.seconds_to(target[0]):.3g}" if target and math.isfinite(steps) else "-",
            f"{run.median_ms:.3g}",
            f"{entrant.state_bytes_per_parameter:.1f}",
            f"{entrant.share:.1%}".replace("100.0%", "100%"),
        ]
        result.add_row("-" if run.diverged else str(rank), *cells, style="bold green" if rank == 1 else None)
    return result


def _ended(result: Result) -> str:
    """Return the final loss, or where or in how many runs the method diverged."""
    if not result.diverged:
        return f"{result.final_loss:.4g}"
    if len(result.runs) == 1:
        return f"diverged at {len(result.runs[0].batch_losses)}"
    return f"diverged, {sum(run.diverged for run in result.runs)} of {len(result.runs)}"


def _band(result: Result, name: str) -> str:
    least, _, largest = result.curve(name)[-1]
    return f"{least:.4g} to {largest:.4g}"


def notes(comparison: Comparison) -> list[str]:
    """Return the winner, and notes on the columns of the table."""
    lines = [_verdict(comparison), ""]
    problem = comparison.problem
    source: dict[str, list[str]] = {"recorded": [], "default fields": [], "given": [], "fallback": []}
    for run in comparison.results:
        source[run.lr_source].append(run.entrant.name)
    rates = []
    if source["recorded"]:
        search = record()[problem.name]
        seeds = " and ".join(map(str, search["seeds"]))
        rates.append(
            f"best of the recorded grid search, the same for every method ({search['steps']} steps"
            f"{'' if search['steps'] == comparison.steps else f', not {comparison.steps}'}, seeds {seeds}"
            f"{_budget(search, source['recorded'])}; repeat it with --tune)"
        )
    if source["default fields"]:
        rates.append(f"recorded for other fields, not tuned for these: {', '.join(source['default fields'])}")
    if source["given"]:
        rates.append(f"given for {', '.join(source['given'])}")
    if source["fallback"]:
        rates.append(f"{FALLBACK}, not tuned, for {', '.join(source['fallback'])}")
    lines.append(f"lr: {'; '.join(rates)}.")
    lines.append("train loss: on the whole training set after the last step.")
    if len(comparison.seeds) > 1:
        lines.append("numbers are medians over the seeds, with the least and the largest beside them.")
    if comparison.target is not None:
        target, origin = comparison.target
        lines.append(
            f"to target: steps to a train loss of {target:.4g} ({origin}), looked for every "
            f"{max(1, comparison.steps // CURVE_POINTS)} steps; s: their time with gradients; -: half of the runs or "
            "more do not reach it."
        )
    lines.append("ms/step: median time of the optimizer's step alone, without loss and gradient.")
    lines.append("B/param: bytes of the optimizer's state per parameter entry.")
    lines.append("own: entries in parameters that the method takes. The others go to Adam() at the same lr.")
    chosen: dict[str, list[str]] = {}
    for run in comparison.results:
        for field, value in run.entrant.chosen.items():
            chosen.setdefault(f"{field}={value:g}", []).append(run.entrant.name)
    if chosen:
        values = "; ".join(f"{setting} for {', '.join(names)}" for setting, names in chosen.items())
        lines.append(f"fields have their defaults, except {values}.")
    joined = ", ".join(run.entrant.name for run in comparison.results if run.entrant.join)
    if joined:
        lines.append(f"the bias of a weight with two axes is the weight's last column for {joined}.")
    for reason in dict.fromkeys(comparison.left_out.values()):
        names = ", ".join(name for name, its in comparison.left_out.items() if its == reason)
        lines.append(f"left out: {names} ({reason}).")
    return lines


def _budget(search: dict[str, Any], names: list[str]) -> str:
    """Return how many rates the search tried for these methods."""
    tried = sorted({len(entry["rates"]) for name in names if "rates" in (entry := search["methods"].get(name, {}))})
    return f", {' to '.join(map(str, dict.fromkeys((tried[0], tried[-1]))))} rates each" if tried else ""


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
        "seeds": comparison.seeds,
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
        "target": None if comparison.target is None else dict(zip(("loss", "origin"), comparison.target, strict=True)),
        "results": [_result(each, comparison.target) for each in comparison.ranked],
    }


def _result(result: Result, target: tuple[float, str] | None) -> dict[str, Any]:
    entrant = result.entrant
    return {
        "method": entrant.name,
        "fields": repr(entrant.method),
        "lr": result.lr,
        "lr_source": result.lr_source,
        "diverged": result.diverged,
        "train_loss": _number(result.final_loss),
        "metric": _number(result.final_metric),
        "steps_to_target": None if target is None else _number(result.steps_to(target[0])),
        "seconds_to_target": None if target is None else _number(result.seconds_to(target[0])),
        "ms_per_step": result.median_ms,
        "state_bytes_per_parameter": entrant.state_bytes_per_parameter,
        "own_share": entrant.share,
        "to_adam": list(entrant.to_adam),
        "runs": [_run(run) for run in result.runs],
    }


def _run(run: Training) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "diverged": run.diverged,
        "train_loss": _number(run.final_loss),
        "metric": _number(run.final_metric),
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
    """Draw training loss and test metric against the steps, the best in colours and with their names.

    A curve is the median over the seeds; a band from the least to the largest is drawn for the best.
    """
    from matplotlib.figure import Figure

    problem, results = comparison.problem, comparison.ranked
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    loss, metric = figure.subplots(1, 2, width_ratios=(1.15, 1))
    for axes in (loss, metric):
        axes.autoscale(False)  # it fails on losses near the largest float
    for rank, each in enumerate(results):
        best = rank < BEST
        style: dict[str, Any] = {
            "color": COLOURS[rank] if best else GREY,
            "linewidth": 2.6 if rank == 0 else 1.7 if best else 0.8,
            "zorder": 3 - rank / len(results),
        }
        for axes, name in ((loss, "train_losses"), (metric, "metrics")):
            least, median, largest = zip(*each.curve(name), strict=True)
            axes.plot(each.steps, median, **style)
            if best and len(each.runs) > 1 and not each.diverged:
                shade = {"color": style["color"], "zorder": style["zorder"] - 1, "alpha": 0.18, "linewidth": 0}
                axes.fill_between(each.steps, least, largest, **shade)
    loss.set_title("train loss", loc="left")
    metric.set_title(problem.metric_name, loc="left")
    _limit(loss, [each.train_losses for each in results], log=True)
    _limit(metric, [each.metrics for each in results], log=not problem.higher_is_better)
    _label(loss, comparison)
    for axes in (loss, metric):
        axes.set_xlabel("steps")
        axes.set_xlim(0, comparison.steps)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(heading(comparison), x=0.01, ha="left", fontsize=10)
    return figure


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
    """Write the names of the best beside the ends of their curves, the winner lowest, and the number of the others."""
    results = comparison.ranked
    best = [each for each in results[:BEST] if not each.diverged]
    low, high = axes.get_ylim()
    heights: list[float] = []
    for each in best:
        end = math.log(min(max(each.final_loss, low), high) / low) / math.log(high / low)
        heights.append(max(end, heights[-1] + GAP) if heights else max(end, GAP))
    heights = [height - max(0.0, heights[-1] - 1.0) for height in heights]
    tie = {"arrowstyle": "-", "linewidth": 0.7, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 0}
    for rank, (each, height) in enumerate(zip(best, heights, strict=True)):
        axes.annotate(
            f"{rank + 1}  {each.entrant.name}  {each.final_loss:.3g}",
            xy=(each.steps[-1], min(max(each.final_loss, low), high)),
            xytext=(1.06, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9.5,
            color=COLOURS[rank],
            fontweight="bold" if rank == 0 else "normal",
            annotation_clip=False,
            arrowprops={**tie, "color": COLOURS[rank]},
        )
    diverged = [each.entrant.name for each in results if each.diverged]
    others = len(results) - len(best) - len(diverged)
    text = ["bands: least to largest"] * any(len(each.runs) > 1 for each in best)
    text += [f"{others} others in grey"] * (others > 0) + [f"diverged: {', '.join(diverged)}"] * bool(diverged)
    if text:
        axes.annotate("; ".join(text), xy=(0.02, 0.02), xycoords="axes fraction", fontsize=8.5, color=GREY_TEXT)
