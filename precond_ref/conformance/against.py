"""Comparison of two implementations on generated inputs, without vectors.

Parameters and gradients are small whole numbers times a power of two. The changes of the parameter over all steps must
agree to the relative error sqrt(u), 1e-8 in float64, beside the rounding of the parameter. An error of u in a statistic
of condition number 1 / sqrt(u) has this effect. A method that decides which eigenvalues are zero (eps = 0) may need a
larger error.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from precond_ref import registry
from precond_ref.conformance import subjects, tolerance
from precond_ref.conformance.invariance import Broken
from precond_ref.conformance.subjects import RAISED, Changed, Config, Subject, named, said

SHAPES: tuple[tuple[int, ...], ...] = ((2, 2), (3, 2), (2, 4), (1, 3), (3,), (1,), (), (2, 3, 2))
"""Shapes of the parameter; those that both implementations take are tried."""
SCALES = (1.0, 2.0**-6, 2.0**6)
"""Scales of the gradients."""
MOST_STEPS = 6
LR = 0.5

Start = Callable[[str], Subject]


class Difference(NamedTuple):
    """The smallest inputs found on which the two differ, with their results."""

    param: np.ndarray
    grads: np.ndarray
    ratio: float
    """Norm of the difference over the tolerance."""
    got: Any
    """Changes of the parameter by the first, (steps, *shape); the text of the error if it raised one."""
    want: Any


class Pair:
    """Two implementations, each a place such as ``mine:Fast(beta2=0.9)``; the second one counts as right.

    Both get the fields of the second, and the first also the fields in its own brackets. ``starts`` are two functions
    that make a subject of a place, by default in this process. ValueError or ImportError for a place without a target.
    """

    def __init__(
        self,
        first: str,
        second: str,
        *,
        dtype: str = "float64",
        backend: str | None = None,
        names: Mapping[str, str] | None = None,
        starts: tuple[Start, Start] | None = None,
    ):
        tolerance.relative(dtype)  # refuses an unknown dtype
        self.first, self.second, self.dtype, self.names, self.backend = first, second, dtype, dict(names or {}), backend
        (place, own), (truth, fields) = registry.split(first), registry.split(second)
        self.configs = configured(truth, fields, own, same=place == truth)
        here = tuple(partial(_here, dtype=dtype, backend=backend, names=n) for n in (self.names, {}))
        made = starts or here
        self.subjects = made[0](place), made[1](truth)

    def updates(self, which: int, param: np.ndarray, grads: np.ndarray) -> np.ndarray:
        """Return the changes of the parameter by one of the two, (steps, *shape)."""
        subject, x = self.subjects[which], np.array(param, self.dtype)
        subject.init(self.configs[which], [x.copy()])
        seen = [x.astype(np.float64)]
        for g in grads:
            given = np.array(g, self.dtype)
            seen.append(np.asarray(subject.step([given])[0], np.float64))
            if not np.array_equal(given, np.array(g, self.dtype), equal_nan=True):
                raise Changed("the gradient that was given was changed in place")
        return np.stack([a - b for a, b in itertools.pairwise(seen)])

    def distance(self, param: Any, grads: Any) -> tuple[float, Any, np.ndarray]:
        """Return the norm of the difference over the tolerance, and the updates of both."""
        param, grads = np.asarray(param, np.float64), np.asarray(grads, np.float64)
        with np.errstate(all="ignore"):
            want = self.updates(1, param, grads)
            try:
                got = self.updates(0, param, grads)
            except RAISED as error:
                return math.inf, said(error), want
            u = tolerance.UNIT_ROUNDOFF[self.dtype]
            same = (got == want) | (np.isnan(got) & np.isnan(want))
            off = float(np.linalg.norm(np.where(same, 0.0, got - want)))
            size = float(np.linalg.norm(np.where(np.isfinite(want), want, 0.0)))
            ratio = off / (math.sqrt(u) * size + 16 * u * (float(np.linalg.norm(param)) + 1))
        return (ratio if math.isfinite(ratio) else math.inf), got, want

    def shapes(self) -> tuple[list[tuple[int, ...]], dict[tuple[int, ...], str]]:
        """Return the shapes of `SHAPES` that both take, and the error of the first for each that only the second takes.

        ValueError if there is no shape of either kind.
        """
        usable, refused, reason = [], {}, ""
        for shape in SHAPES:
            try:
                self.updates(1, np.zeros(shape), np.ones((1, *shape)))
            except RAISED as error:
                reason = said(error)
                continue
            try:
                self.updates(0, np.zeros(shape), np.ones((1, *shape)))
                usable.append(shape)
            except RAISED as error:
                if named(error) == Changed.__name__:  # it takes the shape, and `difference` shows what it does
                    usable.append(shape)
                    continue
                refused[shape] = reason = said(error)
        if not usable:
            raise ValueError(f"there is no shape that both {self.first} and {self.second} take: {reason}")
        return usable, refused

    def difference(
        self, shapes: list[tuple[int, ...]], *, seed: int = 0, examples: int = 100, on_input: Callable[[], Any] = int
    ) -> Difference | None:
        """Return the smallest inputs found on which the two differ, or None; needs Hypothesis."""
        import hypothesis
        from hypothesis import Phase
        from hypothesis import strategies as st

        found: list[Difference] = []

        @hypothesis.seed(seed)
        @hypothesis.settings(max_examples=examples, deadline=None, database=None, report_multiple_bugs=False,
                             phases=(Phase.generate, Phase.shrink),
                             suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
        @hypothesis.given(st.data())
        def attempt(data: Any) -> None:
            shape = data.draw(st.sampled_from(shapes))
            size, steps = math.prod(shape), data.draw(st.integers(1, MOST_STEPS))
            scale = data.draw(st.sampled_from(SCALES))
            entries = data.draw(st.lists(st.integers(-3, 3), min_size=(steps + 1) * size, max_size=(steps + 1) * size))
            param, *grads = np.reshape(np.array(entries, np.float64), (steps + 1, *shape))
            on_input()
            ratio, got, want = self.distance(param, scale * np.array(grads))
            if not ratio <= 1:
                found.append(Difference(param, scale * np.array(grads), ratio, got, want))
                raise Broken

        with contextlib.suppress(Broken):
            attempt()
        return found[-1] if found else None

    def script(self, found: Difference) -> str:
        """Return a program that shows the difference."""
        options = f', dtype="{self.dtype}"' + (f', backend="{self.backend}"' if self.backend else "")
        options += f", names={self.names!r}" if self.names else ""
        return f"""from precond_ref.conformance.against import Pair

pair = Pair({self.first!r}, {self.second!r}{options})
param = {found.param.tolist()}
grads = {found.grads.tolist()}
ratio, got, want = pair.distance(param, grads)
print({self.first!r}, got, {self.second!r}, want, f"{{ratio:.3g}} times the tolerance apart", sep="\\n")
"""


def configured(
    place: str, fields: Mapping[str, Any], own: Mapping[str, Any], *, same: bool = False
) -> tuple[Config, Config]:
    """Return the configs of the first and the second: all ``fields`` of the second, and for the first also ``own``.

    If both are the ``same`` preset, both get the same arguments, which need not be fields.
    """
    truth = registry.load(place, said)
    known: dict[str, Any] = dict(fields)
    if registry.made_by(truth) and not same:
        made = registry.Named(place, truth, fields).made()
        known = {name: getattr(made, name) for name in made.symbols}
    first, second = Config({**known, "lr": LR, **own}), Config({**fields, "lr": LR})
    first.at_default = frozenset(known.keys() - fields.keys() - own.keys())  # the fields that it may lack
    return first, second


def _here(place: str, dtype: str, backend: str | None, names: Mapping[str, str]) -> Subject:
    return subjects.wrap(subjects.load_target(place), backend=backend, dtype=dtype, names=names)
