"""The parts of the figures: panels, curves with bands over the seeds, and rows of dots."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from precond_ref.experiments.numbers import np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A5195", "#8C6D31", "#B0B0B0")
"""The colours of Okabe and Ito without the yellow, and three more."""


def panels(count: int, width: float = 5.0, height: float = 3.7, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``count`` panels side by side in each of the rows."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"svg.hashsalt": "precond-ref", "svg.fonttype": "path"})
    figure = Figure(figsize=(width * count, height), layout="constrained")
    found = list(np.ravel(figure.subplots(rows, count)))
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


def lines(
    axes: Axes,
    x: Sequence[float],
    named: Mapping[str, Sequence[Sequence[Any]]],
    text: str,
    legend: int = 8,
    **labels: Any,
) -> None:
    """Draw `line` for each name, with a mark at each x, a legend of this font size (0: none) and the `title`."""
    for rank, (name, curves) in enumerate(named.items()):
        line(axes, x, curves, name, rank, marker="o", markersize=3)
    if legend:
        axes.legend(frameon=False, fontsize=legend)
    title(axes, text, **labels)


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
