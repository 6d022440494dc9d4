"""Reports of a game for ``precond-ref regret``: text, figure, JSON."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

from precond_ref.regret import Game
from precond_ref.theory import Statement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"


def table(game: Game) -> Table:
    """Return a table of some of the rounds."""
    from rich.table import Table

    result = Table(box=None, pad_edge=False, header_style="bold")
    titles = ["rounds", "mean loss", "of the best", "regret"] + ["bound", "ratio"] * bool(game.checks)
    for lost in game.lost:
        titles += [f"escaped {lost.name}".strip(), "Omega"]
    for title in titles:
        result.add_column(title, justify="right")
    count = len(game.rounds)
    for i in sorted({round(k * (count - 1) / 9) for k in range(10)}):
        cells = [str(game.rounds[i]), f"{game.loss[i]:.5g}", f"{game.best_loss[i]:.5g}", _five(game.regret[i])]
        if game.checks:
            check = game.checks[i]
            cells += [_five(check.right), f"{check.ratio:.3f}"] if check.applies else ["-", "-"]
        for lost in game.lost:
            cells += [f"{lost.escaped[i]:.4g}", f"{lost.limit[i]:.4g}"]
        result.add_row(*cells)
    return result


def _five(value: float) -> str:
    return f"{value:,.0f}" if 1e5 <= abs(value) < 1e10 else f"{value:.5g}"


def notes(game: Game) -> list[str]:
    """Return notes on the numbers."""
    norm = float(abs(game.comparator.point**2).sum() ** 0.5)
    lines = [f"comparator: {game.comparator.how}, norm {norm:.4g}."]
    if game.comparator.remark:
        lines.append(f"  {game.comparator.remark}")
    if game.statement is None:
        lines.append("bound: none is known here for this method with these fields and this shape.")
    else:
        lines += _of_bound(game, game.statement)
    if game.lost:
        lines.append(
            "escaped: the sketch's error in spectral norm is at most this; Omega, the least over k < l of "
            "(eigenvalues after the k-th) / (l - k) of the exact statistic, bounds it."
        )
    return lines


def _of_bound(game: Game, statement: Statement) -> list[str]:
    lines = [f"bound: {statement.name}, {statement.formula} ({statement.source.value})."]
    last = game.checks[-1]
    unmet = [what for what, met in last.assumptions.items() if not met]
    if unmet:
        lines.append(f"assumptions not met: {', '.join(unmet)}.")
    lines.append("  " + ", ".join(f"{name} = {value:.4g}" for name, value in last.symbols.items()))
    worst = [check.ratio for check in game.checks if check.applies]
    if worst:
        lines.append(f"largest regret/bound at the rounds looked at: {max(worst):.4f}.")
    broken = sum(not check.holds for check in game.checks)
    if broken:
        lines.append(
            f"THE BOUND IS EXCEEDED at {broken} of the rounds looked at: a mistake in the method or in the statement."
        )
    return lines


def as_json(game: Game, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the whole game; numbers that are not finite are null."""
    return {
        **settings,
        "comparator": {"how": game.comparator.how, "point": _list(game.comparator.point.reshape(-1))},
        "rounds": [int(k) for k in game.rounds],
        "mean_loss": _list(game.loss),
        "comparator_mean_loss": _list(game.best_loss),
        "regret": _list(game.regret),
        "bound": None
        if game.statement is None
        else {
            "statement": game.statement.name,
            "formula": game.statement.formula,
            "source": game.statement.source.value,
            "values": _list(game.bound),
            "assumptions": dict(game.checks[-1].assumptions),
            "symbols": {name: _number(value) for name, value in game.checks[-1].symbols.items()},
        },
        "sketches": [
            {
                "axis": lost.name,
                "escaped": _list(lost.escaped),
                "escaped_bound": _list(lost.limit),
                "spectrum": _list(lost.spectrum),
                "sketched": _list(lost.sketched),
            }
            for lost in game.lost
        ],
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _list(values: Any) -> list[float | None]:
    return [_number(value) for value in values]


def figure(game: Game, title: str) -> Figure:
    """Draw the regret beside its bound; for Sketchy also the escaped mass beside its bound, and the spectrum."""
    from matplotlib.figure import Figure

    panels = 1 + 2 * bool(game.lost)
    result = Figure(figsize=(6.4 if panels == 1 else 13, 4.2), layout="constrained")
    axes = result.subplots(1, panels, squeeze=False)[0]
    _regret(axes[0], game)
    if game.lost:
        _mass(axes[1], game)
        _spectrum(axes[2], game)
    for each in axes:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    result.suptitle("\n".join(textwrap.wrap(title, 165 if panels > 1 else 80)), x=0.01, ha="left", fontsize=10)
    return result


def _short(value: float) -> str:
    return f"{value:,.0f}" if 100 <= abs(value) < 1e7 else f"{value:.3g}"


def _regret(axes: Axes, game: Game) -> None:
    """Draw on a logarithmic scale with gaps where a curve is not positive, or on a symmetric one if it seldom is."""
    curves = [("regret", game.regret, BLUE)] + [("bound", game.bound, ORANGE)] * bool(game.checks)
    largest = max((abs(x) for _, values, _ in curves for x in values if math.isfinite(x)), default=0.0)
    positive = [float(x) for x in game.regret if x > 0]
    both = bool(game.regret[-1] <= 0) or 2 * len(positive) < len(game.regret)
    if largest > 0 and both:
        axes.set_yscale("symlog", linthresh=10.0 ** (math.floor(math.log10(largest)) - 2))
        axes.axhline(0, color=GREY, linewidth=1)
        axes.margins(y=0.12)
    elif largest > 0:
        axes.set_yscale("log")
        axes.set_ylim(max(min(positive), 1e-4 * max(positive)) / 3, 3 * largest)
    for name, values, colour in curves:
        shown = [x if x > 0 or both else math.nan for x in values]
        axes.plot(game.rounds, shown, ".-", color=colour, linewidth=2, markersize=4)
        if math.isfinite(values[-1]):
            axes.annotate(
                f"{name} {_short(values[-1])}", (1, values[-1]), xycoords=("axes fraction", "data"),
                xytext=(-4, 6 if values[-1] > 0 else -12), textcoords="offset points", ha="right", color=colour,
                fontweight="bold",
            )  # fmt: skip
    axes.set_title("cumulative regret" + ("" if game.checks else " (no bound known)"), loc="left")
    missing = "; the regret is negative where its curve is missing" * (not both and len(positive) < len(game.regret))
    axes.set(xscale="log", xlim=(0.8, 1.25 * game.rounds[-1]), xlabel=f"rounds{missing}")


def _mass(axes: Axes, game: Game) -> None:
    styles = ("-", "--", ":", "-.")
    for style, lost in zip(styles, game.lost, strict=False):
        of = f" of {lost.name}" if lost.name else ""
        for values, name, colour in ((lost.limit, "Omega", ORANGE), (lost.escaped, "escaped", BLUE)):
            label = f"{name}{of}: {_short(values[-1])}"
            axes.plot(game.rounds, values, style, marker=".", color=colour, linewidth=2, markersize=4, label=label)
    axes.legend(frameon=False, labelcolor="linecolor")
    axes.set_title("escaped mass and its bound, Omega", loc="left")
    axes.set(xscale="log", xlabel="rounds")
    largest = max(float(lost.limit[-1]) for lost in game.lost)
    if largest > 0:
        axes.set_yscale("log")
        axes.set_ylim(1e-4 * largest, 3 * largest)


def _spectrum(axes: Axes, game: Game) -> None:
    from matplotlib.ticker import MaxNLocator

    markers, shown = ("o", "s", "^", "D"), []
    for marker, lost in zip(markers, game.lost, strict=False):
        of = f", {lost.name}" if lost.name else ""
        seen = lost.spectrum[lost.spectrum > 1e-14 * (float(lost.spectrum[0]) or 1.0)]
        shifted = lost.sketched + lost.escaped[-1]
        shown += [*seen, *shifted[shifted > 0]]
        axes.plot(range(1, len(seen) + 1), seen, marker, color=GREY, markersize=4, label=f"exact{of}")
        axes.plot(
            range(1, len(shifted) + 1), shifted, marker, color=BLUE, markersize=6, fillstyle="none",
            label=f"sketch, with what escaped{of}",
        )  # fmt: skip
        axes.axhline(lost.escaped[-1], color=BLUE, linewidth=1, linestyle=":")
    axes.plot([], [], ":", color=BLUE, linewidth=1, label="outside the sketch: what escaped")
    axes.set_title("eigenvalues of the statistic at the end", loc="left")
    axes.set_xlabel("index")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if shown:
        axes.set_yscale("log")
        axes.set_ylim(min(shown) / 2, 2 * max(shown))
    axes.legend(frameon=False)
