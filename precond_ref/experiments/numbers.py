"""Numbers of several seeds: medians, paired differences, correlations, and tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from precond_ref.problems.base import import_numpy

np = import_numpy()
Array = Any
Numbers = dict[str, Any]


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
    """Return the median of the seeds with the least and the largest, and how many diverged (None)."""
    each = list(values)
    found = sorted(value for value in each if value is not None)
    lost = f"{len(each) - len(found)} of {len(each)} diverged" if len(found) < len(each) else ""
    if not found:
        return lost
    low, mid, high = (f"{x:.{digits}{form}}" for x in (found[0], statistics.median(found), found[-1]))
    text = f"{mid} ({low} to {high})" if low != high else mid
    return f"{text}, {lost}" if lost else text


class Difference(NamedTuple):
    """Mean of the paired differences a - b over the seeds, with two standard errors."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{round(self.mean, 9):+.3g} ± {self.error:.2g}"  # 0 where it is rounding

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


def paired(a: Sequence[float | None], b: Sequence[float | None], smaller: bool = True) -> Difference:
    """Return the difference of two methods that ran on the same seeds.

    A run that ended early (None) is the worst: infinite where ``smaller`` numbers are better, else minus infinite.
    """
    if None in a or None in b:
        worst = float("inf") if smaller else float("-inf")
        return Difference(worst if None in a else -worst, 0.0)
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
