"""Hyperparameters, declared once: default, meaning, and the rule that every value must keep.

::

    class Mine(Method):
        beta: float = real("beta, decay of the average", default=0.9, ge=0, lt=1)
        every: int = integer("updates between two roots", default=1, ge=1)

A field without ``default`` must be given. `Method` makes the dataclass, the checks and ``symbols`` from these fields.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable
from typing import Any, Protocol


class Rule(Protocol):
    """A rule for the values of a field."""

    def check(self, name: str, value: Any) -> None:
        """Raise TypeError or ValueError for a value that breaks the rule; it names field, rule and value."""

    @property
    def text(self) -> str:
        """The rule in words, such as ``"in [0, 1)"``; "" if the meaning of the field already has it."""


def is_python_number(value: Any) -> bool:
    """Return True for a Python int or float, whose value is checked; False for arrays and tracers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_zero(value: Any) -> bool:
    """Return True only for a Python number equal to zero. No code may branch on the value of an array."""
    return is_python_number(value) and value == 0


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return the names in ``known`` of which ``name`` may be a misspelling, sorted.

    Such names differ by one slip, or by two if both have 8 letters or more. A slip is a wrong, missing or additional
    letter, or two exchanged letters. A name of 2 letters is no misspelling of any other.
    """

    def alike(other: str) -> bool:
        most = (min(len(name), len(other)) >= 3) + (min(len(name), len(other)) >= 8)
        return abs(len(name) - len(other)) <= most and 0 < _slips(name, other) <= most

    return sorted(filter(alike, known))


def _slips(a: str, b: str) -> int:
    rows = [[*range(len(b) + 1)]]
    for i, x in enumerate(a):
        row = [i + 1]
        for j, y in enumerate(b):
            row.append(min(row[j] + 1, rows[i][j + 1] + 1, rows[i][j] + (x != y)))
            if i and j and (x, a[i - 1]) == (b[j - 1], y):
                row[-1] = min(row[-1], rows[i - 1][j - 1] + 1)
        rows.append(row)
    return rows[-1][-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Real:
    """Rule: a finite real number within the bounds, or an array or tracer without axes, whose value is not read."""

    ge: float = -math.inf
    gt: float = -math.inf
    le: float = math.inf
    lt: float = math.inf
    optional: bool = False

    def check(self, name: str, value: Any) -> None:
        if value is None and self.optional:
            return
        if isinstance(value, bool) or not isinstance(value, numbers.Real):  # NumPy's scalars are numbers.Real
            shape = getattr(value, "shape", None)
            if shape is None or isinstance(value, str):
                raise TypeError(f"{name} must be a real number or a 0-D array, got {value!r}")
            if tuple(shape) != ():
                raise ValueError(f"{name} must be a real number or a 0-D array, got an array of shape {tuple(shape)}")
            return
        number: Any = value
        if not (math.isfinite(number) and self.ge <= number <= self.le and (number > self.gt or self.gt == -math.inf)
                and (number < self.lt or self.lt == math.inf)):  # fmt: skip
            rule = " and ".join(["finite", *self._bounds()])
            raise ValueError(f"{name} must be {rule}{' or None' if self.optional else ''}, got {value!r}")

    def _bounds(self) -> list[str]:
        bounds = [f">= {self.ge:g}"] * math.isfinite(self.ge) + [f"> {self.gt:g}"] * math.isfinite(self.gt)
        return bounds + [f"<= {self.le:g}"] * math.isfinite(self.le) + [f"< {self.lt:g}"] * math.isfinite(self.lt)

    @property
    def text(self) -> str:
        bounds = self._bounds()
        low, high = max(self.ge, self.gt), min(self.le, self.lt)
        if len(bounds) == 2:
            bounds = [f"in {'[' if self.ge == low else '('}{low:g}, {high:g}{']' if self.le == high else ')'}"]
        return ", or ".join(bounds + ["None"] * self.optional)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Integer:
    """Rule: a Python int of at least ``ge``."""

    ge: int
    optional: bool = False

    def check(self, name: str, value: Any) -> None:
        if value is None and self.optional:
            return
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be a Python int{' or None' if self.optional else ''}, got {value!r}")
        if int(value) < self.ge:
            raise ValueError(f"{name} must be >= {self.ge}{' or None' if self.optional else ''}, got {value!r}")

    @property
    def text(self) -> str:
        return f">= {self.ge}{', or None' if self.optional else ''}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """Rule: True or False."""

    text: str = ""

    def check(self, name: str, value: Any) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Rule: one of the strings ``of``."""

    of: tuple[str, ...]
    optional: bool = False
    text: str = ""

    def check(self, name: str, value: Any) -> None:
        if value is None and self.optional:
            return
        if not isinstance(value, str):
            raise TypeError(f"{name} must be one of {', '.join(map(repr, self.of))}, got {value!r}")
        if value not in self.of:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, self.of))}, got {value!r}")


def declared(meaning: str, rule: Rule | None = None, *, default: Any = dataclasses.MISSING) -> Any:
    """Return a field with any ``rule``. A field without a rule must be checked in `Method.rules`."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "rule": rule})


def real(
    meaning: str,
    *,
    default: Any = dataclasses.MISSING,
    ge: float = -math.inf,
    gt: float = -math.inf,
    le: float = math.inf,
    lt: float = math.inf,
    optional: bool = False,
) -> Any:
    """Return a field for a finite real number within the bounds, or an array without axes; ``optional``: or None."""
    return declared(meaning, Real(ge=ge, gt=gt, le=le, lt=lt, optional=optional), default=default)


def integer(meaning: str, *, default: Any = dataclasses.MISSING, ge: int, optional: bool = False) -> Any:
    """Return a field for a Python int of at least ``ge``; ``optional``: or None."""
    return declared(meaning, Integer(ge=ge, optional=optional), default=default)


def flag(meaning: str, *, default: Any = dataclasses.MISSING) -> Any:
    """Return a field that is True or False."""
    return declared(meaning, Flag(), default=default)


def choice(meaning: str, *, default: Any = dataclasses.MISSING, of: tuple[str, ...], optional: bool = False) -> Any:
    """Return a field for one of the strings ``of``, which ``meaning`` explains; ``optional``: or None."""
    return declared(meaning, Choice(of=of, optional=optional), default=default)
