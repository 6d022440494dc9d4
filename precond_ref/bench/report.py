"""Reports of ``precond-ref bench``: tables, JSON, and a pyperf suite."""

from __future__ import annotations

import contextlib
import importlib.metadata
import statistics
from typing import TYPE_CHECKING, Any

import pyperf

from precond_ref.bench.harness import Race, Result, Sweep, ratios
from precond_ref.bench.memory import Memory, formula
from precond_ref.bench.suites import GROWTH, exponent
from precond_ref.cost.report import duration, quantity

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


def _table(*titles: str) -> Table:
    from rich.table import Table

    result = Table(box=None, pad_edge=False, header_style="bold")
    for i, title in enumerate(titles):
        result.add_column(title, no_wrap=i > 0, justify="right" if i else "left")
    return result


def spread(values: list[float]) -> tuple[float, float, float]:
    """Return lower quartile, median, upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def race_table(race: Race, results: list[Result]) -> Table:
    """Return a table with a row for each contender, the base first."""
    table = _table(f"{race.title}, {race.workload}", "median", "quartiles", "ratio", "its quartiles", "first step")
    for result in results:
        if result.error is not None or not result.seconds:
            table.add_row(result.name, result.error or "no value")
            continue
        low, median, high = spread(result.seconds)
        cells = [result.name, duration(median), f"{duration(low)} to {duration(high)}"]
        paired = ratios(result, results[0])
        if paired:
            first, middle, last = spread(paired)
            cells += [f"{middle:.2f}", f"{first:.2f} to {last:.2f}"]
        table.add_row(*cells, *([""] * (5 - len(cells))), duration(result.first or 0.0))
    return table


def sweep_table(sweep: Sweep, results: dict[int, Result]) -> Table:
    """Return a table with a column for each point, and the exponents."""
    shown = [("never" if x == sweep.base else f"{x}", result) for x, result in results.items()]
    table = _table(sweep.title, *(x for x, _ in shown), "exponent", "theory")
    bad = [result.error for _, result in shown if result.error]
    cells = [duration(statistics.median(result.seconds)) if result.seconds else "-" for _, result in shown]
    slope = None if bad else exponent(sweep, results)
    table.add_row(f"by {sweep.x}", *cells, "-" if slope is None else f"{slope:.2f}", f"{sweep.theory:g}")
    if not bad:
        equal = all(result.state_bytes == formula(*sweep.points[x]) for x, result in results.items())
        held = [quantity(result.state_bytes or 0, "B") for _, result in shown]
        table.add_row("state", *held, "", "equal" if equal else "other than the formulas")
    for error in bad:
        table.add_row(error or "")
    return table


MEMORY_NOTES = (
    "parameters, state: bytes in float32, the state after two steps of the PyTorch adapter. formula: precond-ref cost.",
    "torch, NumPy, JAX: the most that one step has allocated at a time beside parameters, gradients and state.",
)


def memory_table(rows: list[Memory]) -> Table:
    """Return a table with a row for each method and workload."""
    table = _table("state and peak of a step", "parameters", "state", "formula", "torch", "NumPy", "JAX")
    for row in rows:
        peaks = [
            "-" if peak is None else quantity(peak, "B") for peak in (row.torch_peak, row.numpy_peak, row.jax_peak)
        ]
        same = "equal" if row.measured == row.formula else f"{row.formula:,}"
        table.add_row(f"{row.workload}: {row.method}", quantity(row.parameters, "B"), f"{row.measured:,}", same, *peaks)
    return table


def race_json(race: Race, results: list[Result]) -> dict[str, Any]:
    """Return a race with all its times."""
    return {"title": race.title, "workload": race.workload, "contenders": [_json(r, results[0]) for r in results]}


def _json(result: Result, base: Result | None = None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": result.name,
        "error": result.error,
        "first_seconds": result.first,
        "seconds_per_step": result.seconds,
    }
    if result.state_bytes is not None:
        entry["state_bytes"] = result.state_bytes
    if result.seconds:
        entry["quartiles"] = spread(result.seconds)
        if base is not None and base.seconds:
            entry["ratio_quartiles"] = spread(ratios(result, base))
    return entry


def sweep_json(sweep: Sweep, results: dict[int, Result]) -> dict[str, Any]:
    """Return a sweep with all its times."""
    complete = all(result.seconds for result in results.values())
    return {
        "title": sweep.title,
        "x": sweep.x,
        "points": {str(x): _json(result) for x, result in results.items()},
        "exponent": exponent(sweep, results) if complete else None,
        "theory": sweep.theory,
    }


def growth_figure(swept: list[tuple[Sweep, dict[int, Result]]]) -> Figure:
    """Return a figure of time and state by parameters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    times, state = figure.subplots(1, 2)
    for (sweep, results), marker in zip(swept, "osD^v", strict=False):
        xs, found = list(results), list(results.values())
        name = sweep.title.partition(f", {GROWTH}")[0]
        slope = exponent(sweep, results)
        label = name if slope is None else f"{name}, exponent {slope:.2f}"
        times.loglog(xs, [statistics.median(r.seconds) for r in found], marker=marker, label=label)
        state.loglog(xs, [r.state_bytes for r in found], marker=marker, linestyle="none", label=name)
        state.loglog(xs, [formula(*sweep.points[x]) for x in xs], color="black", linewidth=0.8)
    times.set(xlabel="parameters", ylabel="seconds a step")
    state.set(xlabel="parameters", ylabel="bytes of state, lines: formula")
    for panel in (times, state):
        panel.grid(visible=True, alpha=0.3)
        panel.legend(fontsize=8)
    return figure


def suite(entries: list[tuple[str, Result]], threads: int, clock: str) -> pyperf.BenchmarkSuite | None:
    """Return all times as a pyperf suite, for `pyperf stats`, `hist` and `compare_to`; None if there are no times."""
    benchmarks = []
    for title, result in entries:
        if result.seconds:
            run = pyperf.Run(
                result.seconds,
                metadata={"name": f"{title}: {result.name}", "unit": "second", "threads": threads, "clock": clock},
                collect_metadata=True,
            )
            benchmarks.append(pyperf.Benchmark([run]))
    return pyperf.BenchmarkSuite(benchmarks) if benchmarks else None


def machine() -> dict[str, Any]:
    """Return the description of the machine by pyperf."""
    metadata = pyperf.Run([1.0], collect_metadata=True).get_metadata()
    wanted = ("cpu_model_name", "cpu_count", "load_avg_1min", "platform", "python_version", "date")
    return {name: metadata[name] for name in wanted if name in metadata} | versions()


def versions() -> dict[str, str]:
    """Return the versions of the installed array libraries."""
    found = {}
    for package in ("numpy", "torch", "jax", "optax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def heading(suite: str, threads: int, clock: str) -> str:
    """Return a line with the suite, its settings and the machine."""
    facts = ", ".join(f"{name} {value}" for name, value in machine().items() if name not in ("platform", "date"))
    return f"{suite}, {threads} thread{'s' * (threads > 1)}, float32, {clock} time; {facts}"
