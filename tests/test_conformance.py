"""The conformance kit: right implementations pass, every planted mistake is caught and named, so are bad manners."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from conformance_subjects import Broken, Here, Variant, optax_target, torch_target
from typer.testing import CliRunner

from precond_ref.cli import application
from precond_ref.cli import check as check_command
from precond_ref.conformance import (
    against,
    check,
    contract,
    isolation,
    results,
    runner,
    subjects,
    tolerance,
    variants,
    vectors,
    worlds,
    wrap,
)
from precond_ref.conformance.subjects import Reference, Unsupported

TRACES = vectors.cases(kind="trace")
CONSTRUCTORS = list(dict.fromkeys(case.constructor for case in TRACES))
FIRST = {c: next(case for case in TRACES if case.constructor == c) for c in CONSTRUCTORS}
ROOT = Path(__file__).parents[1]


def failed(report: results.Report) -> list[str]:
    """Ids of what failed or raised."""
    return [f"{r.id}: {r.message or r.gap}" for r in report.results if r.status in ("failed", "error")]


# ---- no false alarms ------------------------------------------------------------------------------------------------


def mainly(constructor: str, *given: str, few: tuple[str, ...] = ()) -> Any:
    """A parameter set that the deep tests have for a preset, as its class is tried; with ``few`` for all but these."""
    deep = "." in constructor or (few and constructor not in few)
    return pytest.param(constructor, *given, marks=pytest.mark.deep if deep else ())


ON = [("numpy", "float64", ()), ("numpy", "float32", ("ASGO", "AGD", "Shampoo", "MBF")),
      ("strict", "float64", ("AGD",)), ("torch", "float32", ("AGD", "MBF"))]  # fmt: skip


@pytest.mark.parametrize(
    ("constructor", "name", "dtype"),
    [mainly(c, name, dtype, few=few) for c in CONSTRUCTORS for name, dtype, few in ON],
)
@pytest.mark.full
def test_the_reference_passes_everything(constructor: str, name: str, dtype: str) -> None:
    report = check(Reference(name, dtype), constructor, level=2, dtype=dtype)
    assert failed(report) == []
    assert report.ok
    narrow = {f"its inputs are not exact in {dtype}", f"its condition numbers are beyond {dtype}"}
    left_out = sum(r.message in narrow for r in report.results)
    assert report.ran + left_out == sum(c.constructor == constructor and not c.deep for c in TRACES)
    skipped = {r.message for r in report.results if r.status == "skipped"}
    allowed = {contract.ABSENT, "stacks are given as several parameters"} | (narrow if dtype == "float32" else set())
    assert skipped <= allowed


@pytest.mark.deep
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_the_reference_passes_everything_on_jax(constructor: str, dtype: str) -> None:
    assert failed(check(Reference("jax", dtype), constructor, level=2, dtype=dtype)) == []


@pytest.mark.deep
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_the_reference_passes_everything_in_depth(constructor: str) -> None:
    assert failed(check(Reference("numpy", "float64"), constructor, level=2, deep=True)) == []


@pytest.mark.parametrize(
    ("constructor", "dtype"),
    [
        mainly(c, dtype, few=few)
        for c in CONSTRUCTORS
        for dtype, few in (("float64", ("AGD", "Shampoo")), ("float32", ("ASGO", "MBF")))
    ],
)
@pytest.mark.full
def test_the_torch_adapter_passes(constructor: str, dtype: str) -> None:
    report = check(wrap(torch_target(constructor), dtype=dtype), constructor, dtype=dtype)
    assert failed(report) == []
    assert report.ok


def test_an_invalid_value_that_equals_the_default_is_not_left_out() -> None:
    """AdaMuon's sign=1 is no flag: a TypeError that names it does not mean that there is no such argument."""
    case = next(case for case in results.listed("AdaMuon") if case.id == "AdaMuon/reject-sign")
    assert case.config["sign"] == 1
    assert runner._reject(wrap(torch_target("AdaMuon")), case, "float64").status == "skipped"


@pytest.mark.parametrize(
    ("constructor", "dtype"),
    [pytest.param(c, d, marks=() if (c, d) == ("SGD", "float32") else pytest.mark.deep)
     for c in CONSTRUCTORS for d in ("float64", "float32")],
)  # fmt: skip
def test_the_optax_adapter_passes(constructor: str, dtype: str) -> None:
    report = check(wrap(optax_target(constructor), dtype=dtype), constructor, dtype=dtype)
    routed = "MBF/reject-" if constructor.startswith("MBF") else "-"  # by shape: a kind of MBF that takes it is found
    assert [f for f in failed(report) if not f.startswith(routed)] == []
    assert report.ok


# ---- planted mistakes -----------------------------------------------------------------------------------------------


DECAY = {"decay-coupled", "decay-without-lr", "decay-after", "decay-ignored"}
SHOULD = {  # mistakes that only a case of tier "should" shows
    "AdaGrad": {"zero-nan"},
    "Adafactor": {"zero-nan"},
    "Adam": {"float32-correction", "zero-nan"},
    "RMSProp": {"zero-nan"},
    "AGD": {"zero-nan"},
    "ASGO": {"newton-schulz"},
    "Shampoo.production": {"trace-late", "trace-ignored"},
    "EShampoo": {"graft-corrected"},
    "SOAP": {"sort-early", "nesterov-ignored", "nesterov-same", "vectors-ignored", "layout-ignored"},
    "NorMuon.emerging": {"eps2-ignored", "statistic-sum", "v-corrected", "v-weight-missing"},
    "NorMuon.dion": {"eps2-inside"},
    "SAdaGrad": DECAY,
    "SShampoo": DECAY,
    "SShampoo.practical": {"kappa-unscaled", "long-axes-preconditioned", "identity-outside"},
}
MAY = {  # and those that only a case of tier "may" shows: where nothing has been seen, the paper says something else
    "SShampoo": {"eps-everywhere"},
    "SShampoo.practical": {"eps-everywhere"},
}

NOT_FINITE = {"NorMuon.dion": {"first-triple"}}
"""Mistakes whose steps are NaN, which agrees with nothing."""


def plant(constructor: str, flags: list[str]) -> None:
    """Each of the mistakes is caught by a must-case (or is one of `SHOULD`), and named, alone."""
    uncaught, misnamed = [], []
    for flag in flags:
        report = check(Variant({flag}), constructor)
        if flag in MAY.get(constructor, ()):
            assert {r.tier for r in report.results if r.status == "failed"} == {"may"}
            continue
        tiers = {r.tier for r in report.failures if r.gap}
        if ("should" if flag in SHOULD.get(constructor, ()) else "must") not in tiers:
            uncaught.append(flag)
        diagnosis, named = report.diagnosis, [] if flag in NOT_FINITE.get(constructor, ()) else [(flag,)]
        if diagnosis is None or [m.flags for m in diagnosis.matches] != named:
            misnamed.append(flag)
    assert uncaught == []
    assert misnamed == []


@pytest.mark.parametrize("constructor", [mainly(c) for c in CONSTRUCTORS])
@pytest.mark.usefixtures("vectors_alone")
def test_a_mistake_is_caught_and_named(constructor: str) -> None:
    effective = sorted(variants.effective(results.cases(constructor)))
    plant(constructor, random.Random(0).sample(effective, 2))


@pytest.mark.deep
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
@pytest.mark.usefixtures("vectors_alone")
def test_every_single_mistake_is_caught_and_named(constructor: str) -> None:
    plant(constructor, sorted(variants.effective(results.cases(constructor))))


@pytest.mark.deep
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
@pytest.mark.usefixtures("vectors_alone")
def test_pairs_of_mistakes_are_named(constructor: str) -> None:
    """A sample; ``benchmarks/diagnose.py`` measures all of them."""
    effective = variants.effective(results.cases(constructor))
    pairs = [pair for pair in variants.choices(variants.of(FIRST[constructor].make()), 2) if pair <= effective]
    for flags in random.Random(1).sample(pairs, 2):
        diagnosis = check(Variant(flags), constructor).diagnosis
        assert diagnosis is not None
        assert set(flags) in [set(m.flags) for m in diagnosis.matches]  # beside one mistake two others may be one


@pytest.mark.usefixtures("vectors_alone")
def test_three_mistakes_are_found_one_after_the_other() -> None:
    flags = {"eps-outside", "always-right", "rms-max"}
    diagnosis = check(Variant(flags), "ASGO").diagnosis
    assert diagnosis is not None
    assert [set(m.flags) for m in diagnosis.matches] == [flags]


@pytest.mark.usefixtures("vectors_alone")
def test_the_shampoo_of_torch_optimizer_is_named() -> None:
    """Its two mistakes, from the outside: exponent -1/order, and statistics of what is already preconditioned."""

    def step(param, grad, state, *, lr, eps):
        state = [np.eye(d) * eps for d in param.shape] if state is None else state
        u = grad
        for axis, d in enumerate(param.shape):
            u = np.moveaxis(u, axis, 0)
            shape = u.shape
            u = u.reshape(d, -1)
            state[axis] = state[axis] + u @ u.T
            w, q = np.linalg.eigh(state[axis])
            u = np.moveaxis(((q * w ** (-1 / param.ndim)) @ q.T @ u).reshape(shape), 0, axis)
        return param - lr * u, state

    report = check(wrap(step), "Shampoo")
    assert not report.ok
    assert report.diagnosis is not None
    assert {"exponent-inverse-order", "statistic-of-preconditioned"} <= set(report.diagnosis.matches[0].flags)
    assert "exponent -1/k" in report.diagnosis.lines()[0]


@pytest.mark.usefixtures("vectors_alone")
def test_mistakes_are_named_behind_single_precision() -> None:
    """As in pytorch_optimizer 3.10.0: a wrong exponent, and roots in float32."""

    def step(param, grad, state, *, lr, eps):
        state = [np.zeros((d, d)) for d in param.shape] if state is None else state
        u = grad
        for axis, d in enumerate(param.shape):
            unfolded = np.moveaxis(grad, axis, 0).reshape(d, -1)
            state[axis] = state[axis] + unfolded @ unfolded.T
            w, q = np.linalg.eigh((state[axis] + eps * np.eye(d)).astype(np.float32))
            root = ((q * np.maximum(w, 1e-12) ** (-1 / param.ndim)) @ q.T).astype(np.float64)
            u = variants.multiply(u, root, axis)
        return param - lr * u, state

    report = check(wrap(step), "Shampoo")
    diagnosis = report.diagnosis
    assert diagnosis is not None
    said = diagnosis.matches or (diagnosis.nearest,)
    assert said[0] is not None
    assert "exponent-inverse-order" in said[0].flags
    assert 1e-9 < said[0].error < 1e-3


# ---- diagnosis without a match --------------------------------------------------------------------------------------


def adam(scale: Callable[[int], float] = lambda t: 1.0, cast: Any = np.float64) -> Callable[..., Any]:
    """Adam with its steps multiplied by ``scale(t)`` and its average cast."""

    def step(param, grad, state, *, lr, beta1, beta2, eps):
        t, m, v = (0, 0 * grad, 0 * grad) if state is None else (state["t"], state["mean"], state["v"])
        m, v, t = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2, t + 1
        v = np.asarray(v, cast).astype(v.dtype)
        root = np.sqrt(v / (1 - beta2**t)) + eps
        direction = m / (1 - beta1**t) / np.where(root == 0, 1, root)
        return param - lr * scale(t) * direction, {"t": t, "mean": m, "v": v}

    return step


def text(target: Any, method: str = "Adam", **options: Any) -> str:
    """The diagnosis in words."""
    diagnosis = check(wrap(target), method, **options).diagnosis
    assert diagnosis is not None
    return "\n".join(diagnosis.lines())


@pytest.mark.usefixtures("vectors_alone")
def test_without_a_match_the_hints_say_what_is_seen() -> None:
    assert check(wrap(adam()), "Adam").ok
    said = text(adam(lambda t: 1.375))
    assert "First to depart: update at step 1 of Adam/" in said
    assert "Every step has the right direction and 1.375 times the right length." in said
    assert "a scalar is wrong" in text(adam(lambda t: 1 + t / 8))
    said = text(adam(cast=np.float32))
    assert said.startswith("No known mistake in Adam explains it.")
    assert "that something is computed in single precision would explain as much" in said


@pytest.mark.full
@pytest.mark.usefixtures("vectors_alone")
def test_a_small_error_where_the_result_jumps_is_no_single_precision() -> None:
    """A ridge of 1e-10 where there should be none: the pseudo-inverse of a singular statistic becomes another root."""

    def step(param, grad, state, *, lr, eps):
        state = [np.zeros((d, d)) for d in param.shape] if state is None else state
        u = grad
        for axis, d in enumerate(param.shape):
            unfolded = np.moveaxis(grad, axis, 0).reshape(d, -1)
            state[axis] = state[axis] + unfolded @ unfolded.T
            u = variants.multiply(u, variants.power(state[axis], -0.5 / param.ndim, max(eps, 1e-10)), axis)
        return param - lr * u, state

    report = check(wrap(step), "Shampoo")
    assert [r.id for r in report.failures] == ["Shampoo/pseudo-inverse"]
    gap = report.failures[0].gap
    assert gap is not None
    assert 1e-12 < gap.error < 1e-7
    assert "computed in it" not in text(step, "Shampoo")


@pytest.mark.full
@pytest.mark.usefixtures("vectors_alone", "first_version")
def test_rounding_to_bfloat16_is_told_from_a_few_wrong_cases() -> None:
    def rounded(bits: int, when: Callable[[float], bool] = lambda beta2: True) -> Callable[..., Any]:
        right = adam()

        def step(param, grad, state, *, lr, beta1, beta2, eps):
            new, state = right(param, grad, state, lr=lr, beta1=beta1, beta2=beta2, eps=eps)
            mantissa, exponent = np.frexp(param - new)
            narrow = np.ldexp(np.round(mantissa * 2**bits) / 2**bits, exponent)
            return (param - narrow if when(beta2) else new), state

        return step

    assert "computing in bfloat16 would explain as much" in text(rounded(8))
    assert "bfloat16" not in text(rounded(3))
    assert "bfloat16" not in text(rounded(8, lambda beta2: beta2 == 0))


@pytest.mark.usefixtures("first_version")
def test_a_mistake_that_explains_no_more_than_the_method_is_not_the_nearest() -> None:
    class Late(Reference):  # wrong where `every` is not 1; without heads, whose mistakes no case then tells apart
        def init(self, config, params):
            if config["heads"] is not None or config["root"] != "eigh" or len(params) > 1:
                raise Unsupported("heads, roots, stacks")
            super().init(config, params)
            self.wrong, self.count = config["every"] > 1, 0

        def step(self, grads):
            self.count += 1
            return super().step([3 * g if self.wrong and self.count == 3 else g for g in grads])

    report = check(Late(), "ASGO")
    assert {r.id for r in report.failures if r.gap} == {"ASGO/every-3"}
    assert report.diagnosis is not None
    assert report.diagnosis.nearest is None
    assert report.diagnosis.lines()[0] == "No known mistake in ASGO explains it."


@pytest.mark.parametrize("constructor", ["ASGO", "Shampoo", "SShampoo", "RFShampoo", "IFShampoo"])
@pytest.mark.full
@pytest.mark.usefixtures("vectors_alone")
def test_roots_renewed_at_multiples_of_the_interval_are_named(constructor: str) -> None:
    plant(constructor, ["every-multiples"])


def test_a_state_that_departs_is_the_first_departure() -> None:
    subject = wrap(adam(lambda t: 1.375), names={"state.m": "mean"})
    assert check(wrap(adam(), names={"state.m": "mean"}), "Adam", level=1).notes == [
        "a NaN in the gradient comes out as NaN"
    ]

    class Wrong(type(subject)):  # type: ignore[misc]
        def state(self) -> list[dict[str, np.ndarray]]:
            return [{**s, "v": 2 * s["v"]} for s in super().state()]

    report = check(Wrong(adam(), names={"state.m": "mean"}), "Adam", level=1)
    assert {r.gap.quantity for r in report.failures if r.gap} == {"state.v"}
    assert check(Wrong(adam()), "Adam").ok  # level 0 does not look at states
    notes = check(wrap(adam()), "Adam", level=1).notes
    assert "the subject shows none of this name: m (it shows mean, v; --map state.OURS=THEIRS)" in notes[0]


# ---- contract -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "caught"),
    [
        ("changes the gradient", "gradient-untouched"),
        ("returns float32", "dtype"),
        ("not repeatable", "repeatable"),
        ("parameters share a norm", "independent"),
        ("NaN spreads", "nonfinite"),
        ("forgets on loading", "resume"),
    ],
)
def test_bad_manners_are_caught(fault: str, caught: str) -> None:
    results = check(Broken(fault), "Adam", diagnose=False).results
    assert {r.id: r.status for r in results}[f"contract/{caught}"] == "failed"


def test_good_manners_pass() -> None:
    assert check(Broken(""), "Adam").failures == []


SEVERAL = """
import torch

class Several(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=0.0, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for number, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                g = p.grad
                b = self.state[p].setdefault("b", torch.zeros_like(p))
                b.mul_(group["momentum"]).add_(g)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * b)
            pass
"""


def several(old: str = "pass", new: str = "pass") -> Any:
    """A right optimizer with a piece of its source exchanged."""
    assert SEVERAL.count(old) == 1
    found: dict[str, Any] = {}
    exec(SEVERAL.replace(old, new), found)
    return found["Several"]


@pytest.mark.parametrize(
    ("old", "new", "caught"),
    [
        ("            pass", "                return", "independent"),  # one indent too deep
        ("            pass", "                if i == 1: break", "independent"),
        ("g = p.grad", "g = p.grad * (1 if i < 2 else 0.999)", "independent"),  # the third and later ones
        ("g = p.grad", "g = p.grad * (1 if i != 1 else 0.999)", "independent"),
        ("if p.grad is None", "if p is not group['params'][-1]", "independent"),
        ("if p.grad is None", "if p.grad is None or p.shape != group['params'][0].shape", "independent"),
        ("self.state[p]", "self.state.setdefault(p.shape, {})", "independent"),
        ("self.state[p]", "self.state.setdefault(p.ndim and (number, i // 2, p.shape), {})", "independent"),
        ("g = p.grad", "g = p.grad / len(group['params'])", "independent"),
        ("            pass", "            return", "groups"),
        ("in enumerate(self.param_groups)", "in enumerate(self.param_groups[-1:])", "groups"),
        ("in enumerate(self.param_groups)", "in enumerate(self.param_groups[:2])", "groups"),
        ("self.state[p]", "self.state.setdefault(i, {})", "groups"),  # two groups with one counting of parameters
        ("continue", "break", "no-gradient"),
        ("continue", "return", "no-gradient"),
        ("continue", "p.grad = torch.zeros_like(p) + 1", "no-gradient"),
        ("g = p.grad", "gs = [q.grad for q in group['params'] if q.grad is not None]; g = gs[min(i, len(gs) - 1)]",
         "no-gradient"),
    ],
)  # fmt: skip
@pytest.mark.full
def test_every_parameter_is_checked(old: str, new: str, caught: str) -> None:
    report = check(wrap(several(old, new)), "SGD")
    found = [r.id for r in report.failures]  # alone it is right; one cause, one line
    assert found == [f"contract/{caught}"] or (caught == "groups" and found == ["contract/groups", "contract/resume"])


@pytest.mark.usefixtures("first_version")
def test_several_parameters_are_no_mistake() -> None:
    report = check(wrap(several()), "SGD")
    assert report.ok
    made = {r.id: r.status for r in report.results if r.id.startswith("contract/")}
    assert made.pop("contract/closure") == "skipped"  # its step takes none
    assert set(made.values()) == {"passed"}
    report = check(wrap(several("continue", "raise ValueError('no gradient')")), "SGD")  # loud
    assert report.ok
    assert "a parameter without a gradient raises ValueError" in report.notes

    def alone(params, lr, momentum, weight_decay):
        return several()([p.requires_grad_() for p in params], lr, momentum, weight_decay)

    def alike(params, lr, momentum, weight_decay):
        if len({p.shape for p in params}) > 1:
            raise NotImplementedError("one shape")
        return several("self.state[p]", "self.state.setdefault(i, {})")(params, lr, momentum, weight_decay)

    report = check(wrap(alike), "SGD")
    assert "parameters of several shapes were not tried together: one shape" in report.notes
    assert {r.id: r.status for r in report.results}["contract/independent"] == "passed"

    results = {r.id: r for r in check(wrap(alone), "SGD").results}
    assert results["contract/groups"].status == "skipped"
    assert "alone takes no parameter groups: AttributeError: 'dict'" in results["contract/groups"].message


@pytest.mark.full
def test_functions_that_mix_parameters_up() -> None:
    import optax

    shared: dict[tuple[int, ...], np.ndarray] = {}

    def step(param, grad, state, *, lr, momentum, weight_decay):
        if state is None:
            shared[param.shape] = 0 * grad
        b = shared[param.shape] = momentum * shared[param.shape] + grad
        return (1 - lr * weight_decay) * param - lr * b, b

    def first_only(learning_rate, momentum):
        right = optax.sgd(learning_rate, momentum)

        def update(updates, state, params=None):
            new, state = right.update(updates, state, params)
            return [new[0], *(0 * u for u in new[1:])], state

        return optax.GradientTransformation(right.init, update)

    class Last(Ten):
        def step(self, grads):
            before = self.params
            return [*before[:-1], super().step(grads)[-1]]

    for subject, said in ((step, "makes other steps than alone"), (first_only, "number 3 does not move"), (Last, "")):
        report = check(wrap(subject), "SGD")
        assert [r.id for r in report.failures] == ["contract/independent"]
        assert said in report.failures[0].message
        assert contract.ABSENT in [r.message for r in report.results if r.status == "skipped"]


def test_gradients_rounded_to_single_precision_are_seen() -> None:
    class Rounded(Ten):
        def step(self, grads):
            return super().step([g.astype(np.float32).astype(g.dtype) for g in grads])

    assert {r.id: r.status for r in check(wrap(Rounded), "SGD").results}["contract/dtype"] == "failed"
    assert check(wrap(Rounded), "SGD", dtype="float32").ok
    assert check(wrap(Ten), "SGD").ok


# ---- subjects -------------------------------------------------------------------------------------------------------


class Ten:
    """The protocol in ten lines: SGD."""

    def init(self, config, params):
        if config["momentum"]:
            raise NotImplementedError("no momentum")
        self.rate, self.decay, self.params = config["lr"], config["weight_decay"], params

    def step(self, grads):
        pairs = zip(self.params, grads, strict=True)
        self.params = [(1 - self.rate * self.decay) * p - self.rate * g for p, g in pairs]
        return self.params


def test_the_protocol_takes_ten_lines() -> None:
    report = check(wrap(Ten), "sgd")
    assert report.ok
    assert report.ran < len(results.cases("SGD"))
    assert {r.message for r in report.results if r.status == "skipped" and "/reject-" not in r.id} >= {"no momentum"}
    assert report.method == "SGD"


def test_torch_optimizers_and_factories() -> None:
    import torch

    report = check(wrap(torch.optim.Adam), "Adam")  # betas are found; its decay is coupled, and 0/0 is NaN
    assert {r.id for r in report.failures} == {"Adam/decay", "Adam/changing-rate", "Adam/no-eps"}
    diagnosis = report.diagnosis
    assert diagnosis is not None
    assert [match.flags for match in diagnosis.matches] == [("decay-coupled", "zero-nan")]

    def make(params, lr, beta1, beta2, eps, weight_decay):
        return torch.optim.AdamW(params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)

    report = check(wrap(make, names={"state.m": "exp_avg", "state.v": "exp_avg_sq"}), "Adam", level=1)
    assert {r.id for r in report.failures} == {"Adam/no-eps"}
    assert not any("states not compared" in note for note in report.notes)
    with pytest.raises(ValueError, match="has no argument 'epsilon', which eps is mapped to"):
        wrap(make, names={"eps": "epsilon"})


@pytest.mark.full
def test_optax_transformations() -> None:
    import optax

    report = check(wrap(optax.adam, names={"beta1": "b1", "beta2": "b2", "state.m": "mu"}), "Adam", level=1)
    assert {r.id for r in report.failures} == {"Adam/no-eps"}  # 0/0
    assert "the subject shows none of this name: v (it shows" in report.notes[0]
    message = check(wrap(lambda **config: 3), "SGD").results[0].message
    assert "must return an optax transformation (with init and update), got int" in message


def test_a_command_is_asked_in_json_lines() -> None:
    command = subjects.Command([sys.executable, str(ROOT / "examples" / "check_command.py")])
    try:
        report = check(command, "SGD", level=1)
    finally:
        command.close()
    assert report.ok
    assert not any("states not compared" in note for note in report.notes)
    assert [r.message for r in report.results if r.id == "SGD/decay"] == ["weight decay"]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("print('hello', flush=True); input()", "which is not JSON"),
        ("raise SystemExit(3)", "ended with exit code 3 instead of answering 'init'"),
        ("""input(); print('{"error": "lr"}', flush=True); input()""", "^lr$"),
    ],
)
def test_a_command_that_answers_badly(program: str, message: str) -> None:
    command = subjects.Command([sys.executable, "-c", program])
    with pytest.raises((RuntimeError, ValueError), match=message):
        command.init(results.config_of(FIRST["SGD"]), [np.ones(2)])
    command.close()


def test_a_command_that_ended_is_started_anew() -> None:
    program = """input(); print('{"unsupported": "no"}')"""
    command = subjects.Command([sys.executable, "-c", program])
    results = check(command, "SGD").results
    command.close()
    assert {r.status for r in results} == {"error", "skipped"}


def test_hyperparameters_reach_the_target_under_its_names() -> None:
    config = results.config_of(next(c for c in results.cases("ASGO") if c.id == "ASGO/forced-left"))

    def make(learning_rate, betas=(0.9, 0.99), epsilon=0.0, side="", rms=None):
        """Nothing."""

    given = subjects.arguments(make, config, {"eps": "epsilon"})
    assert given["betas"] == (config["beta1"], config["beta2"])
    assert given["learning_rate"] == config["lr"]
    assert given["epsilon"] == config["eps"]
    assert given["side"] == "left"
    assert "root" not in given  # at its default, and make does not have it

    class Swallows:
        def __init__(self, params, lr, eps, **kwargs):
            raise AssertionError

    assert subjects.arguments(subjects._without_first(Swallows), config, {}) == dict(config)
    with pytest.raises(Unsupported, match="has no argument for side='left'"):
        subjects.arguments(lambda lr, beta1, beta2, eps, rms: None, config, {})


def test_betas_are_found_under_the_names_of_optax() -> None:
    config = results.config_of(FIRST["Adam"])
    given = subjects.arguments(lambda learning_rate, b1, b2, eps, weight_decay: None, config, {})
    assert (given["b1"], given["b2"]) == (config["beta1"], config["beta2"])


def test_a_function_that_returns_no_state_is_told_so() -> None:
    def step(param, grad, state, *, lr, momentum, weight_decay):
        return param - lr * grad

    results = check(wrap(step), "SGD").results
    messages = {r.message for r in results if r.status == "error"}
    assert "TypeError: step must return (new_param, new_state), got ndarray" in messages


def test_a_null_of_json_is_told_how_to_be_written() -> None:
    with pytest.raises(ValueError, match='data" is null: write what is not finite as "nan"'):
        subjects._decode({"shape": [2], "data": [1.0, None]}, "float64")


def test_an_error_says_where_it_was_raised() -> None:
    def step(param, grad, state, *, lr, momentum, weight_decay):
        return [][0]

    message = next(r.message for r in check(wrap(step), "SGD").results if r.status == "error")
    line = step.__code__.co_firstlineno + 1
    assert message == f"IndexError: list index out of range (test_conformance.py, line {line})"


def test_targets_that_are_nothing_known() -> None:
    with pytest.raises(TypeError, match="a class, a function or an object with init and step, got 3"):
        wrap(3)
    with pytest.raises(ValueError, match="TARGET must be module:attribute"):
        subjects.load_target("module")
    with pytest.raises(ValueError, match="there is no module 'no_such_module'"):
        subjects.load_target("no_such_module:f")
    with pytest.raises(ValueError, match="json has no 'nothing'; it has .*dumps"):
        subjects.load_target("json:nothing")
    with pytest.raises(ValueError, match="backend must be one of numpy, .*, got 'mxnet'"):
        Reference("mxnet")
    with pytest.raises(ValueError, match="no method is called asgd; there are .*ASGO.theory"):
        check(Ten(), "asgd")
    with pytest.raises(ValueError, match="dtype must be one of float64, float32, got 'float16'"):
        check(Ten(), "sgd", dtype="float16")
    with pytest.raises(ValueError, match="level must be 0, 1 or 2, got 3"):
        check(Ten(), "sgd", level=3)


def test_a_step_of_another_shape_is_an_error() -> None:
    class Flat(Ten):
        def step(self, grads):
            return [p.ravel() for p in super().step(grads)]

    messages = [r.message for r in check(Flat(), "SGD").results if r.status == "error"]
    assert any("step must return parameters of shapes [(3, 2)], got [(6,)]" in m for m in messages) or messages


# ---- tolerance ------------------------------------------------------------------------------------------------------


def test_tolerances_follow_from_precision_and_conditioning() -> None:
    u = tolerance.UNIT_ROUNDOFF
    assert u == {name: float(np.finfo(name).eps / 2) for name in u}
    assert tolerance.relative("float64") == tolerance.CONSTANT * u["float64"]
    assert tolerance.relative("float32", 100.0, 0.5) == 100 * tolerance.relative("float32")
    assert tolerance.relative("float32", 16.0, 0.25) == 8 * tolerance.relative("float32")
    assert tolerance.relative("float32", 100.0, 0.25, stale=True) == 100 * tolerance.relative("float32")
    assert tolerance.relative("float64", 4.0, 0.5, decompositions=3) == 12 * tolerance.relative("float64")
    seen = {case.id: case.conditioning["decompositions"] for case in vectors.cases(method="SShampoo", kind="trace")}
    assert seen["SShampoo/sum"] == list(range(1, len(seen["SShampoo/sum"]) + 1))
    assert seen["SShampoo/every"][:4] == [1, 1, 1, 2]


def test_kappa_of_an_iteration_by_the_definition_with_50_digits() -> None:
    """For the cases that record the condition number alone; no other case that iterates does."""
    from precond_ref.conformance.build import exact, number
    from precond_ref.conformance.variants import muon

    iterate = {c.id: c for c in vectors.cases("Muon", kind="trace") if c.config.get("root") == "newton_schulz"}
    assert vectors.QUINTIC.keys() == {name for name, c in iterate.items() if "compute_dtype" not in c.config}
    recorded = {entry["id"]: entry["conditioning"]["kappa"] for entry in vectors.entries() if entry["id"] in iterate}
    for name, kappas in vectors.QUINTIC.items():
        case, tensors = iterate[name], vectors.load(iterate[name])
        config = {**muon.DEFAULTS, **case.config, "compute_dtype": None}
        with mp.workdps(50):
            mu, m = number(float(config["momentum"])), 0 * exact(tensors["param"])
            for t, g in enumerate(exact(tensors["grads"])):
                m = mu * m + (1 - mu) * g
                n = (1 - mu) * g + mu * m if config["nesterov"] else m
                want = max(float(mp.nstr(number(muon.condition(n, config)), 6)), recorded[name][t])
                assert kappas[t] == want == case.conditioning["kappa"][t]


def test_an_iteration_in_another_order_is_no_failure() -> None:
    """Along the longer side, and as A (A X): right, and more than the condition number allows."""

    def product(a: Any, b: Any) -> Any:
        return np.sum(a[:, :, None] * b, axis=1)  # the same rounding on every machine

    case = next(c for c in vectors.cases("Muon") if c.id == "Muon/quintic-nesterov")
    recorded = next(e for e in vectors.entries() if e["id"] == case.id)["conditioning"]
    mu, tensors, ratios = case.config["momentum"], vectors.load(case), []
    m = 0 * tensors["param"]
    for t, (grad, want) in enumerate(zip(tensors["grads"], tensors["directions"], strict=True)):
        m = mu * m + (1 - mu) * grad
        x = ((1 - mu) * grad + mu * m).T  # 4 x 2
        x = x / np.sqrt(np.sum(x * x))
        for _ in range(5):
            gram = product(x, x.T)
            y = product(gram, x)
            x = 3.4445 * x - 4.775 * y + 2.0315 * product(gram, y)
        off = np.linalg.norm(case.config["rms"] * 2 * x.T - want) / np.linalg.norm(want)
        both = (case, replace(case, conditioning=recorded))
        ratios.append([off / tolerance.of_case(c, "float64", t + 1) for c in both])
    ours, before = np.max(ratios, axis=0)
    assert ours <= 0.1
    assert before > 1


def test_a_gap_is_measured_normwise() -> None:
    found = results.gap(3, "update", np.array([3.0, 4.5]), np.array([3.0, 4.0]), 0.25)
    assert (found.error, found.tolerance, found.ratio) == (0.1, 0.05, 2.0)
    assert found.norm_ratio == np.hypot(3, 4.5) / 5
    assert results.gap(1, "update", np.array([np.nan]), np.array([1.0]), 1.0).ratio == np.inf
    assert results.gap(1, "update", np.zeros(2), np.zeros(2), 0.0).ratio == 0
    with pytest.raises(ValueError, match=r"update must have shape \(1,\), got \(2,\)"):
        results.gap(1, "update", np.zeros(2), np.zeros(1), 0.0)


# ---- command --------------------------------------------------------------------------------------------------------


MINE = """
import torch

class Right(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=0.0, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                b = self.state[p].setdefault("velocity", torch.zeros_like(p))
                b.mul_(group["momentum"]).add_(p.grad, alpha=self.weight)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * b)

    weight = 1.0

class Wrong(Right):
    @property
    def weight(self):
        return 1 - self.param_groups[0]["momentum"]
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs ``precond-ref check ...`` in a folder with the module above."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(textwrap.dedent(MINE), encoding="utf-8")
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(isolation, "Isolated", Here)
    return lambda *arguments: CliRunner().invoke(application(), ["check", *map(str, arguments)])


def test_check_says_ok(run: Any) -> None:
    result = run("mine:Right", "--method", "sgd")
    assert result.exit_code == 0, result.output
    assert "OK IN PART: mine:Right is SGD in 15 of 16 cases (13 of 14 of tier must)" in result.output
    assert "skipped (1): Right has no argument for nesterov" in result.output


def test_check_says_what_is_wrong(run: Any) -> None:
    result = run(
        "mine:Wrong", "--method", "SGD", "--json", "out.json", "--level", "1", "--map", "state.buffer=velocity"
    )
    assert result.exit_code == 1
    row = next(line.split() for line in result.output.splitlines() if line.split()[:2] == ["failed", "SGD/momentum"])
    assert row[2:4] == ["1", "state.buffer"]
    assert row[-2:] == ["1.000000", "0.250000"]  # cosine, norm ratio: 1 - momentum
    assert "It is SGD with an average, momentum b + (1 - momentum) g, instead of the heavy ball" in result.output
    assert "failed (may)  SGD/stack" in result.output
    failures = json.loads(Path("out.json").read_text(encoding="utf-8"))["failures"]
    assert f"WRONG: {len(failures)} unexpected failures" in result.output
    report = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert report["ok"] is False
    assert "SGD/momentum" in report["failures"]
    assert report["diagnosis"]["matches"][0]["flags"] == ["momentum-ema"]


def test_check_says_what_was_left_out(run: Any) -> None:
    source = """
class Bare:
    def init(self, config, params):
        if len(params) > 1 or any(config.get(name) for name in ("momentum", "nesterov", "weight_decay")):
            raise NotImplementedError("one plain parameter")
        self.params, self.lr = params, config["lr"]

    def step(self, grads):
        self.params = [p - self.lr * g for p, g in zip(self.params, grads)]
        return self.params
"""
    Path("mine.py").write_text(source, encoding="utf-8")
    result = run("mine:Bare", "--method", "SGD")
    assert "one plain parameter" in result.output
    assert "skipped (1): the subject has no save and load" in result.output  # a check of the contract
    assert "OK IN PART: mine:Bare is SGD in 1 of 16 cases (1 of " in result.output
    Path("mine.py").write_text(source.replace("self.params, self.lr", "self.params, self.rate"), encoding="utf-8")
    sys.modules.pop("mine")
    result = run("mine:Bare", "--method", "SGD")
    assert "NOT CHECKED" in result.output
    assert "configurations refused" not in result.output


@pytest.mark.full
def test_expected_failures(run: Any) -> None:
    names = json.loads(
        (run("mine:Wrong", "--method", "SGD", "--json", "out.json"), Path("out.json").read_text(encoding="utf-8"))[1]
    )["failures"]
    Path("xfails.txt").write_text("# known\n" + "\n".join(names) + "\n", encoding="utf-8")
    result = run("mine:Wrong", "--method", "SGD", "--xfails", "xfails.txt")
    assert result.exit_code == 0
    assert f"but for {len(names)} expected failure" in result.output
    result = run("mine:Right", "--method", "SGD", "--xfails", "xfails.txt")
    assert result.exit_code == 1
    assert "expected to fail, but passed: SGD/momentum" in result.output
    Path("xfails.txt").write_text("SGD/no-such  # gone\n", encoding="utf-8")
    result = run("mine:Right", "--method", "SGD", "--xfails", "xfails.txt")
    assert result.exit_code == 1
    assert "there is no such case or check: SGD/no-such" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine:Right"], "--method NAME must say"),
        (["--command", "/no/such --json", "--method", "SGD"], "must begin with a program that can be run"),
        (["--method", "SGD"], "give either TARGET"),
        (["mine:Right", "--method", "sdg"], "no method is called sdg; there are"),
        (["mine:Nope", "--method", "SGD"], "mine has no 'Nope'; it has Right, Wrong"),
        (["mine.py:Right", "--method", "SGD"], "(without the .py)"),
        (["mine:Right", "--method", "SGD", "--map", "lr"], "--map takes OURS=THEIRS, such as eps=epsilon, got 'lr'"),
        (["mine:Right", "--method", "SGD", "--map", "nesterof=n"], "SGD has no 'nesterof'; it has lr, momentum"),
        (["mine:Right", "--method", "SGD", "--map", "state.b=v"], "SGD has no 'state.b'; it has state.buffer"),
        (["mine:Right", "--method", "SGD", "--dtype", "half"], "dtype must be one of"),
        (["mine:Right", "--method", "SGD", "--level", "5"], "level must be 0, 1 or 2"),
        (["mine:Right", "--method", "SGD", "--json", "no/out.json"], "there is no folder no"),
        (["mine:Right", "--method", "SGD", "--xfails", "none.txt"], "No such file"),
    ],
)
def test_a_command_that_cannot_run_says_why(run: Any, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_examples_of_the_help_are_understood(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(subject: Any, method: str, **options: Any) -> None:
        raise ValueError(f"would check {method}")

    monkeypatch.setattr(isolation, "Isolated", lambda *arguments, **options: io.StringIO())
    monkeypatch.setattr(subjects, "Command", lambda *arguments: io.StringIO())
    monkeypatch.setattr(runner, "check", seen)
    monkeypatch.setattr(worlds, "check", lambda target, numbers, **options: seen(None, target))
    monkeypatch.setattr(against, "Pair", lambda first, second, **options: seen(None, second))
    examples = re.findall(r"^  precond-ref (check .*)$", check_command.EXAMPLES, re.M)
    for example in examples:
        assert "would check " in run(*shlex.split(example)[1:]).output, example
    assert len(examples) >= 5


def test_nothing_that_runs_is_not_ok(run: Any) -> None:
    result = run("mine:Right", "--method", "ASGO")
    assert result.exit_code == 1
    assert "NOT CHECKED: no case ran to its end; if beta1 has another name there: --map beta1=NAME" in result.output


# ---- pages ----------------------------------------------------------------------------------------------------------


def console(page: str) -> list[tuple[list[str], list[str]]]:
    """Commands of a page's console blocks, and the lines they are said to print."""
    blocks = re.findall(r"^```console\n\$ precond-ref (.*?)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [(command.split(), said.splitlines()) for command, said in blocks]


def same(said: str, printed: str) -> bool:
    """Equal words; numbers to 2 %, those of the size of rounding to a factor of 10."""

    def number(word: str) -> float | None:
        try:
            return float(word.strip(".,:"))
        except ValueError:
            return None

    words = said.split(), printed.split()
    return len(words[0]) == len(words[1]) and all(
        a == b or ((x := number(a)) is not None and (y := number(b)) is not None
                   and (0.1 < x / y < 10 if max(x, y) < 1e-10 else math.isclose(x, y, rel_tol=0.02)))
        for a, b in zip(*words, strict=True)
    )  # fmt: skip


@pytest.mark.full
def test_the_pages_print_what_the_command_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(isolation, "Isolated", Here)
    page = (ROOT / "docs" / "check.md").read_text(encoding="utf-8")
    for name, code in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(code, encoding="utf-8")

    def printed(arguments: list[str]) -> list[str]:
        for name in ("my_asgo", "recipes"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return CliRunner().invoke(application(), arguments).output.splitlines()

    (wrong, said), (right, said_then) = console(page)
    lines = printed(wrong)
    assert [a for a, b in itertools.zip_longest(said, lines, fillvalue="") if not same(a, b)] == []
    readme = console((ROOT / "README.md").read_text(encoding="utf-8"))
    assert [command for command, _ in readme] == [wrong]
    assert all(line == "..." or any(same(line, real) for real in lines) for line in readme[0][1])
    source = (tmp_path / "my_asgo.py").read_text(encoding="utf-8")
    mistake, correction = '1 / (w.clamp(min=0).sqrt() + group["eps"])', '(w.clamp(min=0) + group["eps"]) ** -0.5'
    assert mistake in source
    (tmp_path / "my_asgo.py").write_text(source.replace(mistake, correction) + "\n\n", encoding="utf-8")
    lines = printed(right)
    assert [a for a, b in itertools.zip_longest(said_then, lines, fillvalue="") if not same(a, b)] == []
    assert printed(["check", "recipes:make", "--method", "ASGO"])[-1].startswith("OK IN PART: ")
    options = ["--level", "1", "--map", "state.gram=precond", "--map", "state.m=mean", "--dtype", "float32"]
    last = printed(["check", "my_asgo:MyASGO", "--method", "ASGO", *options])
    assert last[-1].startswith("OK IN PART: ")
    assert not any("states not compared" in line for line in last)


def test_the_comparison_of_pages_sees_a_difference() -> None:
    assert same("to 1e-14.", "to 8e-15.")
    assert not same("9.0e-02  1.8e-14", "9.9e-02  1.8e-14")
    assert not same("13 failed", "12 failed")
    assert console("```console\n$ precond-ref a --b\nx\ny\n```\n") == [(["a", "--b"], ["x", "y"])]


# ---- pytest ---------------------------------------------------------------------------------------------------------


def pytest_on(folder: Path, *arguments: str) -> tuple[int, str]:
    """``pytest --pyargs precond_ref.conformance ...`` in a folder, as a user would."""
    (folder / "mine.py").write_text(textwrap.dedent(MINE), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "precond_ref.conformance.plugin", "-p", "no:xdist", "-q"]
    command += ["--pyargs", "precond_ref.conformance", *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.full
def test_the_pytest_door(tmp_path: Path) -> None:
    code, output = pytest_on(tmp_path, "--precond-target", "mine:Wrong", "--precond-method", "sgd")
    assert code == 1
    assert re.search(r"FAILED .*test_subject\[SGD/momentum\]", output)
    assert "It is SGD with an average, momentum b + (1 - momentum) g, instead of the heavy ball" in output
    failures = re.findall(r"FAILED .*test_subject\[(.*?)\]", output)
    (tmp_path / "known.txt").write_text("\n".join(failures), encoding="utf-8")
    options = ["--precond-target", "mine:Wrong", "--precond-method", "SGD", "--precond-xfails", "known.txt"]
    code, output = pytest_on(tmp_path, *options)
    assert code == 0, output
    assert f"{len(failures)} xfailed" in output


@pytest.mark.full
def test_the_pytest_door_says_what_it_needs(tmp_path: Path) -> None:
    code, output = pytest_on(tmp_path, "--precond-target", "mine:Right")
    assert code != 0
    assert "give --precond-method, and one of --precond-target and --precond-command" in output
    code, output = pytest_on(tmp_path, "--precond-target", "mine:Nope", "--precond-method", "SGD")
    assert code != 0
    assert "mine has no 'Nope'; it has Right, Wrong" in output
    assert "1 error" in output  # once, not in every test
