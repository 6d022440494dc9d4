"""Results of a check: gaps, results of cases, and the report; and the cases of a method."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import precond_ref
from precond_ref import registry
from precond_ref.conformance import vectors
from precond_ref.conformance.subjects import Config
from precond_ref.conformance.vectors import Case
from precond_ref.fields import Choice
from precond_ref.files import MOST_TEXT, read
from precond_ref.protocol import Method

TIERS = ("must", "should")
FAILED, PASSED, SKIPPED, ERROR = "failed", "passed", "skipped", "error"
LIMITS = ("max_dim",)
"""Fields that are limits of a size: a case that is below takes the default, which larger inputs need."""
LEAST = 1e-3
"""Least size of a case's largest gradient, if its hyperparameters are to be tried with gradients of about 1."""


@dataclass(frozen=True)
class Gap:
    """The distance of one quantity from the truth at one step."""

    step: int
    quantity: str
    """``update`` (the change of the parameter), or ``state.<field>``."""
    error: float
    """Norm of the difference over the norm of the truth."""
    tolerance: float
    """Largest ``error`` that rounding can explain."""
    ratio: float
    """``error / tolerance``: above 1 it fails."""
    cosine: float
    """Cosine of the angle between the two; NaN if one is zero."""
    norm_ratio: float
    """Norm of the subject's quantity over the norm of the truth."""

    def __str__(self) -> str:
        return (
            f"{self.quantity} at step {self.step}: error {self.error:.1e}, tolerance {self.tolerance:.1e}, ratio "
            f"{self.ratio:.1e}, cosine {self.cosine:.6f}, norm ratio {self.norm_ratio:.6f}"
        )


@dataclass(frozen=True)
class Result:
    """The result of one case or contract check."""

    id: str
    tier: str
    status: str
    """``passed``, ``failed``, ``skipped`` (the subject does not have the configuration) or ``error`` (it raised)."""
    why: str = ""
    """Purpose of the case."""
    gap: Gap | None = None
    """The first step that fails, or the worst if none does."""
    message: str = ""
    astray: float | None = None
    """If a run departed: distance of the parameter from the truth at its end, over the length of its way."""
    late: bool = False
    """True if a check of the contract was skipped because not all of its inputs were tried within the time."""

    @property
    def bad(self) -> bool:
        """Return True if the result is a failure that counts; one of tier "may" does not count."""
        return self.status in (FAILED, ERROR) and self.tier != "may"


@dataclass(frozen=True)
class Replay:
    """The run of a subject on one trace: parameters (T + 1, members, *shape), from the first ones on, and states."""

    case: Case
    tensors: Mapping[str, np.ndarray]
    params: np.ndarray
    states: list[list[dict[str, np.ndarray]]] = field(default_factory=list)

    @cached_property
    def method(self) -> Method:
        """The method with the fields that the subject got, in which `LIMITS` may be above those of the case."""
        return config_of(self.case).method


@dataclass
class Report:
    """The report of `check`; ``ok`` is the verdict."""

    method: str
    target: str
    dtype: str
    level: int
    results: list[Result] = field(default_factory=list)
    runs: list[Replay] = field(default_factory=list)
    xfails: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    require: str = ""
    """"must": a skipped case of this tier is a failure; "should": a skipped case of either of the two tiers.

    So is a check of the contract that was not tried, or not with all inputs, within the time.
    """
    ended: str = ""
    """The reason if the check could not go on: the subject's process ended, hung or took too much memory."""
    diagnosis: Any = None
    """The result of `diagnose.diagnose`, or None."""

    @property
    def failures(self) -> list[Result]:
        """Failures that count and were not expected."""
        return [r for r in self.results if r.bad and r.id not in self.xfails]

    @property
    def unexpected_passes(self) -> list[str]:
        """Expected failures that passed."""
        return [r.id for r in self.results if r.id in self.xfails and r.status == PASSED]

    @property
    def unknown_xfails(self) -> list[str]:
        """Expected failures that match no case or check; empty if not all were tried."""
        return [] if self.ended else sorted(set(self.xfails) - {r.id for r in self.results})

    @property
    def ran(self) -> int:
        """Number of traces that ran to their end."""
        return len(self.runs)

    def left_out(self, *tiers: str) -> list[str]:
        """Return the ids of cases of these tiers that were skipped and not expected to fail."""
        found = [
            r for r in self.results if r.status == SKIPPED and r.tier in tiers and not r.id.startswith("contract/")
        ]
        return [r.id for r in found if r.id not in self.xfails]

    @property
    def untried(self) -> list[str]:
        """Ids of checks of the contract of which not all inputs were tried within the time."""
        return [r.id for r in self.results if r.late and r.id not in self.xfails]

    @property
    def missing(self) -> list[str]:
        """Ids of cases that were required and skipped, and of required checks for which the time was too short."""
        tiers = TIERS[: TIERS.index(self.require) + 1] if self.require else ()
        return self.left_out(*tiers) + [r.id for r in self.results if r.tier in tiers and r.id in self.untried]

    @property
    def scarce(self) -> bool:
        """True if more than half of the cases of tier must were skipped."""
        must = [r for r in self.results if r.tier == "must" and not r.id.startswith(("contract/", "invariance/"))]
        return 2 * len(self.left_out("must")) > len(must)

    @property
    def ok(self) -> bool:
        """True if a case ran, no result is unexpected, expected failures exist, and no required case was skipped."""
        wrong = self.ended or self.failures or self.unexpected_passes or self.unknown_xfails or self.missing
        return bool(self.ran) and not wrong

    @cached_property
    def edges(self) -> str:
        """The edge, such as ``eps = 0``, if the subject is wrong only there; else ""."""
        from precond_ref.conformance.diagnose import edges

        return edges(self)

    def as_json(self) -> dict[str, Any]:
        """Return the report without its arrays, with None for numbers that are not finite."""
        keys = ("method", "target", "dtype", "level", "ok", "scarce", "edges", "failures", "unexpected_passes",
                "unknown_xfails", "missing", "untried", "notes", "ended")  # fmt: skip
        out = {key: getattr(self, key) for key in keys} | {"results": [asdict(r) for r in self.results]}
        out["failures"] = [r.id for r in self.failures]
        out["diagnosis"] = None if self.diagnosis is None else asdict(self.diagnosis)
        return _finite(out)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_finite(v) for v in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cases(method: str, deep: bool = False) -> list[Case]:
    """Return the traces of a method for `run_case`; with ``deep`` also the long ones.

    ``method`` is a name such as ``"ASGO"`` or ``"asgo.theory"``, in upper or lower case; ValueError for other names.
    """
    return [case for case in listed(method, deep) if case.kind == "trace"]


def listed(method: str, deep: bool = False) -> list[Case]:
    """Return traces and rejects of a method, by its constructor; ValueError for a method that can have none."""
    named = registry.parse(method)
    if named.text not in registry.constructors():
        raise ValueError(
            f"there are no test vectors for {named.text}: --method takes a name that `precond-ref list` prints"
        )
    found = [c for c in vectors.cases() if c.constructor == named.name and c.kind != "primitive"]
    return [c for c in found if deep or not c.deep]


def of_about_one(case: Case) -> bool:
    """Return whether the gradients of a case are not far below 1, so that gradients of about 1 suit its fields."""
    return float(np.abs(vectors.load(case)["grads"]).max(initial=0.0)) > LEAST


def config_of(case: Case) -> Config:
    """Return the config that a subject gets for a case."""
    make = operator.attrgetter(case.constructor)(precond_ref)
    signature = inspect.signature(make).parameters
    config = Config(vectors.tuples(case.config))
    config |= {k: p.default for k, p in signature.items() if k not in config}  # fields that came after the vectors
    config |= (raised := _unreached(case, {k: signature[k].default for k in LIMITS if k in signature}))
    at_default = {k for k, v in config.items() if k in signature and signature[k].default == v}
    config["lr"] = case.rates[0] if case.rates else case.lr
    if "weight_decay" not in config:
        config["weight_decay"] = case.decay
        at_default |= {"weight_decay"} if case.decay == 0 else set()
    at_default |= config.keys() & case.make().idle if case.kind == "trace" else set()
    config.at_default = frozenset(at_default - {case.argument})  # of a reject, such as 1 where the default is True
    made: Any = registry.made_by(make)
    rules = {f.name: f.metadata.get("rule") for f in (dataclasses.fields(made) if made else ())}
    config.forms = {
        name: rule.of
        for name, rule in rules.items()
        if isinstance(rule, Choice) and (rule.optional or "none" in rule.of)
    }
    config.make = functools.partial(_with_fields, case, raised) if raised else case.make
    return config


def _with_fields(case: Case, fields: Mapping[str, Any]) -> Method:
    return replace(case, config={**case.config, **fields}).make()


def _unreached(case: Case, limits: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of ``limits``, values of fields, with which the case has the same state as with its own."""
    if case.kind != "trace":
        return {}
    shape, found = case.shape[case.stack_ndim :], dict[str, Any]()
    for name, value in limits.items():
        if case.config.get(name, value) != value:
            same = _with_fields(case, {name: value}).state_of(shape) == case.make().state_of(shape)
            found |= {name: value} if same else {}
    return found


def defaults(method: str) -> dict[str, Any]:
    """Return the defaults of a method's fields that have one."""
    signature = inspect.signature(operator.attrgetter(registry.parse(method).name)(precond_ref)).parameters
    return {name: p.default for name, p in signature.items() if p.default is not inspect.Parameter.empty}


def gap(step: int, quantity: str, got: np.ndarray, want: np.ndarray, limit: float) -> Gap:
    """Return the gap of ``got`` from ``want``, whose difference may have the norm ``limit``."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise ValueError(f"{quantity} must have shape {want.shape}, got {got.shape}")
    difference, size, own = (float(np.linalg.norm(a)) for a in (got - want, want, got))

    def over(a: float, b: float) -> float:
        return a / b if b else 0.0 if a == 0 else math.inf

    if difference == 0:  # squares of tiny numbers are zero
        difference = float(np.max(np.abs(got - want), initial=0.0))
    if not math.isfinite(difference):
        difference = math.inf
    cosine = float(np.vdot(got, want)) / (size * own) if size and own else math.nan
    return Gap(step, quantity, over(difference, size), over(limit, size), over(difference, limit), cosine,
               over(own, size))  # fmt: skip


def read_xfails(file: Path) -> tuple[str, ...]:
    """Return the ids in a file of expected failures; the text after # on a line is a comment."""
    lines = (line.partition("#")[0].strip() for line in read(file, MOST_TEXT).decode().splitlines())
    return tuple(line for line in lines if line)
