"""``check TARGET --against OTHER``: any two implementations, on inputs that are made up."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from precond_ref import registry
from precond_ref.conformance import against, results, runner, subjects
from precond_ref.conformance.against import Pair

FILE = '''
import os
import precond_ref


class Plain(precond_ref.ASGO):
    pass


class Late(precond_ref.ASGO):
    """Wrong from the third step on, where a matrix is wide."""

    def step(self, grad, state, param, now):
        u, state = super().step(grad, state, param, now)
        return (1.0001 * u if now.step > 2 and grad.shape[-1] > grad.shape[-2] else u), state


def momentum(param, grad, state, *, lr, momentum=0.0):
    b = grad if state is None else momentum * state + grad
    return param - lr * b, b


def damped(param, grad, state, *, lr, momentum=0.0):
    b = grad if state is None else momentum * state + (1 - momentum) * grad
    return param - lr * b, b


def large(param, grad, state, *, lr, mass=0.0):
    if abs(grad).max() > 64:
        raise ZeroDivisionError("a large gradient")
    return momentum(param, grad, state, lr=lr, momentum=mass)


def flat(param, grad, state, *, lr, momentum=0.0):
    if param.ndim == 2:
        raise ValueError("no matrices")
    return param - lr * grad, None


def gone(param, grad, state, *, lr, momentum=0.0):
    os._exit(3)


def scales(param, grad, state, *, lr, momentum=0.0):
    grad *= lr
    b = grad if state is None else momentum * state + grad
    return param - b, b


class Scales(precond_ref.SGD):
    """Its gradient is not the caller's any more."""

    def step(self, grad, state, param, now):
        grad *= 2.0
        return super().step(grad / 2.0, state, param, now)


class Adds(precond_ref.SGD):
    """Its state is not the caller's any more."""

    def step(self, grad, state, param, now):
        b = state.buffer
        b *= self.momentum
        b += grad
        return 1.0 * b, state._replace(step=now.step)
'''


@pytest.fixture(autouse=True)
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module ``pairs``, a file in the current folder."""
    pytest.importorskip("hypothesis")
    (tmp_path / "pairs.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield
    sys.modules.pop("pairs", None)
    for name in [name for name in registry._CLASSES if name.startswith("pairs:")]:
        del registry._CLASSES[name]


def look(first: str, second: str, **options: Any) -> Any:
    """The difference found in this process, or None."""
    pair = Pair(first, second, **options)
    return pair.difference(pair.shapes()[0], examples=200)


def test_what_agrees() -> None:
    assert look("pairs:Plain", "precond_ref:ASGO") is None
    assert look("pairs:Plain(every=2)", "precond_ref:ASGO(every=2)", dtype="float32") is None
    assert look("pairs:Plain", "precond_ref:ASGO(every=2)") is None  # which the first is given too
    assert look("pairs:momentum", "precond_ref:SGD(momentum=0.5)") is None
    assert look("pairs:momentum", "precond_ref:SGD(momentum=0.5)", backend="strict") is None
    small = Pair("pairs:large", "precond_ref:SGD(momentum=0.5)", names={"momentum": "mass"})
    assert small.distance(np.zeros((2, 2)), np.ones((3, 2, 2)))[0] <= 1


def test_planted_bugs_are_shrunk() -> None:
    late = look("pairs:Late", "precond_ref:ASGO")
    assert late.grads.shape[0] == 3
    assert late.grads.shape[1:] in ((2, 4), (1, 3))
    assert np.count_nonzero(late.grads) <= 2
    assert not late.param.any()
    damped = look("pairs:damped", "precond_ref:SGD(momentum=0.5)")
    assert (damped.grads.shape[0], np.count_nonzero(damped.grads)) == (2, 1)
    fields = look("pairs:Plain(beta2=0.5)", "precond_ref:ASGO")
    assert fields.grads.shape[0] <= 2
    raised = look("pairs:large", "pairs:momentum")
    assert (raised.got, raised.ratio) == ("ZeroDivisionError: a large gradient (pairs.py, line 30)", float("inf"))
    assert np.max(np.abs(raised.grads)) == 128
    assert raised.grads.shape[0] == 1


IN_PLACE = {
    "pairs:Scales": r"Changed: update of pairs:Scales changed grad, which it was given, in place",
    "pairs:Adds": r"Changed: update of pairs:Adds changed state.buffer, which it was given, in place",
    "pairs:scales": r"Changed: the gradient that was given was changed in place",
}


@pytest.mark.parametrize("place", IN_PLACE)
@pytest.mark.full
def test_changes_in_place_are_found(place: str) -> None:
    found = look(place, "precond_ref:SGD(momentum=0.5)")
    assert (found.ratio, found.got) == (float("inf"), IN_PLACE[place])
    assert np.count_nonzero(found.grads) == 1


@pytest.mark.parametrize("place", IN_PLACE)
def test_changes_in_place_that_are_not_looked_for_pass(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(np, "array_equal", lambda *_, **__: True)
    assert look(place, "precond_ref:SGD(momentum=0.5)") is None


@pytest.mark.full
def test_changes_in_place_are_found_by_the_command() -> None:
    ran = program("pairs:Adds", "--against", "precond_ref:SGD(momentum=0.5)")
    assert ran.returncode == 1
    assert "WRONG: they differ by inf times the tolerance" in ran.stdout


NEEDED = {"size": 2, "delta": 0.25, "learning_rate": 0.5}
"""What has no default."""


def check_listed(name: str) -> None:
    """``precond_ref:NAME`` can be checked, and compared with itself."""
    place = f"precond_ref:{name}"
    case = next((case for case in results.cases(name) if case.tier == "must"), None)
    target = subjects.wrap(subjects.load_target(place))
    if case is None:  # a preset of which only its method has vectors
        assert isinstance(target, subjects.Reference)
        assert not isinstance(registry.constructors()[name], type)
        with pytest.raises(ValueError, match=f"no test vectors for {name} by itself: take --against precond_ref:"):
            runner.check(target, name)
    else:
        assert runner.run_case(target, case).status == "passed"
    fields = {field: NEEDED[field] for field in registry.required(registry.constructors()[name])}
    text = registry.Named(place, registry.constructors()[name], fields).text
    pair = Pair(text, text)
    assert pair.difference(pair.shapes()[0], examples=3) is None


@pytest.mark.parametrize("name", registry.constructors())
def test_every_name_in_the_list_is_a_target(name: str) -> None:
    check_listed(name)


@pytest.mark.full
def test_a_preset_is_compared_with_what_it_makes() -> None:
    method = registry.parse("MBF.authors_code").made()
    fields = ", ".join(f"{name}={getattr(method, name)!r}" for name in method.symbols)
    assert look(f"precond_ref:MBF({fields})", "precond_ref:MBF.authors_code") is None
    assert look("precond_ref:MBF", "precond_ref:MBF.authors_code") is None  # which is given what the other makes
    assert look("precond_ref:MBF.authors_code(network='cnn')", "precond_ref:MBF.authors_code").ratio > 1
    ran = program("precond_ref:MBF.authors_code", "--method", "MBF.authors_code")
    assert ran.returncode == 0, ran.stdout


def check_fields_beside_a_preset() -> None:
    """``MBF.authors_code`` takes no ``damping``: a case that gives one changes what the preset makes."""
    subject = subjects.wrap(registry.parse("MBF.authors_code").make)
    case = next(case for case in runner.cases("MBF") if case.id == "MBF/no-damping")
    subject.init(results.config_of(case), [np.zeros((3, 4))])
    assert (subject.method.damping, subject.method.layout) == (0.0, "contiguous")
    with pytest.raises(subjects.Unsupported, match="optax sets other fields: outputs='columns' needs"):
        subjects.wrap(registry.parse("Muon.optax").make).init(
            results.config_of(next(case for case in runner.cases("Muon") if case.config.get("layout") == "flatten")), []
        )


def test_a_preset_as_a_target_takes_the_other_fields_of_its_class() -> None:
    check_fields_beside_a_preset()


def test_a_preset_that_takes_its_own_arguments_only_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = lambda self, target, made, own: target(**subjects.arguments(target, own, self.fields))  # noqa: E731
    monkeypatch.setattr(subjects.Reference, "_of_preset", planted)
    with pytest.raises((AssertionError, subjects.Unsupported)):
        check_fields_beside_a_preset()


def test_presets_that_are_not_known_are_no_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "made_by", lambda make: make if isinstance(make, type) else None)
    with pytest.raises((AssertionError, ValueError)):
        check_listed("MBF.authors_code")


def test_mistakes_of_the_comparison_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without wide matrices, or with two steps only, the late mistake would pass."""
    with monkeypatch.context() as patch:
        patch.setattr(against, "MOST_STEPS", 2)
        assert look("pairs:Late", "precond_ref:ASGO") is None
    monkeypatch.setattr(against, "SHAPES", ((2, 2), (3, 2)))
    assert look("pairs:Late", "precond_ref:ASGO") is None


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    ["ASGO", "Shampoo", "SShampoo(size=2)", "RFShampoo", "MBF", "Muon", "FDSON(size=2, delta=0.25, learning_rate=0.5)"],
)
def test_two_libraries_agree(name: str) -> None:
    """The tolerance leaves room for the decompositions of another library."""
    starts = tuple(partial(against._here, dtype="float64", backend=b, names={}) for b in ("torch", "numpy"))
    place = f"precond_ref:{name}"
    pair = Pair(place, place, starts=starts)  # type: ignore[arg-type]
    assert pair.difference(pair.shapes()[0], examples=50) is None


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "precond_ref.cli", "check", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.full
def test_the_command() -> None:
    right = program("pairs:Plain", "--against", "precond_ref:ASGO")
    assert (right.returncode, right.stderr) == (0, "")
    assert right.stdout == (
        "pairs:Plain against precond_ref:ASGO: float64, 100 inputs, seed 0\nshapes: (2, 2), (3, 2), (2, 4), (1, 3)\n\n"
        "OK: they agree on all of them\n"
    )
    wrong = program("pairs:damped", "--against", "precond_ref:SGD(momentum=0.5)", "--json", "report.json")
    assert wrong.returncode == 1
    assert wrong.stdout.endswith(" times the tolerance\n")
    report = json.loads(Path("report.json").read_text())
    assert report["ok"] is False
    assert report["program"] in wrong.stdout
    shown = subprocess.run([sys.executable, "-c", report["program"]], capture_output=True, text=True, check=True)
    assert re.search(r"times the tolerance apart", shown.stdout)
    part = program("pairs:flat", "--against", "pairs:momentum")
    assert part.returncode == 0
    assert "not taken by pairs:flat: (2, 4) (ValueError: no matrices (pairs.py, line 36))" in part.stdout
    ended = program("pairs:gone", "--against", "pairs:momentum")
    assert ended.returncode == 1
    assert "\nWRONG: " in ended.stdout


@pytest.mark.full
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pairs:momentum", "--against", "pairs:nothing"), "pairs has no 'nothing'"),
        (("pairs:nothing", "--against", "pairs:momentum"), "pairs has no 'nothing'"),
        (("pairs:momentum", "--against", "precond_ref:SShampoo"), "SShampoo needs size"),
        (("pairs:momentum", "--against", "precond_ref:SGD(momentum=2)"), "momentum must be finite"),
        (
            ("pairs:momentum", "--against", "precond_ref:SGD(momentum=0.5, nesterov=True)"),
            "there is no shape that both",
        ),
        (("pairs:momentum", "--against", "pairs:momentum", "--method", "SGD"), "--against goes with TARGET"),
        (("pairs:momentum", "--against", "pairs:momentum", "--examples", "0"), "--examples must be >= 1"),
        (("pairs:momentum", "--against", "pairs:momentum", "--dtype", "int8"), "dtype must be one of"),
    ],
)
def test_refused(arguments: tuple[str, ...], message: str) -> None:
    ran = program(*arguments)
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert message in ran.stderr
