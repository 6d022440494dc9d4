"""The mutation tool edits what it says, keeps the library itself apart, and lets checks and tests see the mutant."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutation import mutated

import precond_ref
from precond_ref.conformance import results

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import mutate

FOLDERS = Path(__file__).parent, Path(mutate.__file__).parent
SOURCE = '''"""Text."""

class Method:
    a: float = 1.0
    b: float = 2.0

    def step(self, x):
        """Not code."""
        return self.a * max(x, 0)
'''
EDITS = {
    "operator: self.a * max(x, 0) -> (self.a / max(x, 0))", "dropped term: self.a * max(x, 0) -> self.a",
    "dropped term: self.a * max(x, 0) -> max(x, 0)", "other field: self.a -> self.b",
    "swapped arguments: max(x, 0) -> max(0, x)", "removed call: max(x, 0) -> x", "removed call: max(x, 0) -> 0",
    "function: max(x, 0) -> min(x, 0)", "constant: 0 -> 1", "constant: 0 -> -1",
}  # fmt: skip


def named(text: str, module: str = "precond_ref.numerics.ema") -> Any:
    return next(m for m in mutate.mutants(module) if str(m).endswith(text))


HEAVY = "momentum * buffer + new -> (momentum * buffer - new)"


@pytest.fixture(autouse=True)
def one_library() -> Iterator[None]:
    """After a test the library is imported as before."""
    kept = mutate.ours()
    yield
    mutate.exchange(kept)
    mutate.WORLD.clear()


def check_edits(tool: Any, file: Path) -> None:
    file.write_text(SOURCE, encoding="utf-8")
    found = tool.mutants("small")
    assert {str(m).partition(" ")[2] for m in found} == EDITS
    assert {m.line for m in found} == {9}
    swapped = next(m for m in found if m.kind == "swapped arguments")
    assert tool.applied(swapped, SOURCE) == SOURCE.replace("max(x, 0)", "max(0, x)")


def check_apart(tool: Any) -> None:
    """The library is as it was, and the subject is the mutant."""
    library, case = sys.modules["precond_ref"], next(c for c in results.cases("SGD") if c.config["momentum"])
    tool.plant(named(HEAVY))
    assert sys.modules["precond_ref"] is library
    subject, grad = tool.Mutated(), np.ones(case.shape)
    subject.init(results.config_of(case), [np.zeros(case.shape)])
    subject.step([grad])
    (method := precond_ref.SGD(momentum=0.5)).init(grad)
    assert np.array_equal(method.update(grad, method.init(grad), grad)[0], grad)
    assert subject.params[0].ravel()[0] == case.lr  # the gradient, with the other sign
    assert tool.checked("SGD", "vectors").failures


def check_fates(tool: Any) -> None:
    """A mutant that a case kills, one that changes nothing, and one that only the other inputs show."""
    truth = {"SGD": tool.steps("SGD")}
    assert tool.judged(named(HEAVY), ["SGD"], truth, False)["fate"] == "killed"
    nothing = named("dropped term: 1.0 * buffer -> buffer")
    assert tool.judged(nothing, ["SGD"], truth, False)["fate"] == "equivalent"


def test_edits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutate, "path_of", lambda module: tmp_path / "small.py")
    check_edits(mutate, tmp_path / "small.py")


def check_tested(tool: Any) -> None:
    """A test sees the mutant in its lines, and passes without it; a line that it does not run has no test."""
    test, module, found = (
        "tests/test_diagnose.py::test_what_an_update_may_be_off",
        "precond_ref.conformance.tolerance",
        [],
    )
    both = [named("before + after -> (before - after)", module), named("step - 1 -> (step + 1)", module)]

    def then(tests: Any) -> None:
        ((_, ran),) = tool.in_processes(1, [(None, tool.watched, (tests, [module]))], 300)
        told = dict(tool.in_processes(1, [(m, tool.tested, (m, tests, [test])) for m in both], 300))
        found.extend([ran["failed"], *([tool.running(m, ran), told[m]["fate"]] for m in both)])

    tool.with_tests([test], False, then)
    assert found == ["", [[test], "killed"], [[], "survivor"]]


def test_the_library_is_kept_apart() -> None:
    check_apart(mutate)


@pytest.mark.full
def test_fates() -> None:
    check_fates(mutate)


def apart(check: Callable[[Any], None], *changes: tuple[str, str]) -> None:
    """Make the check in a fresh process: the tool forks it, and a process with JAX must not be forked."""
    code = (
        f"import sys; sys.path[:0] = {[*map(str, FOLDERS)]!r}; import mutate, mutation, test_mutate; "
        f"test_mutate.{check.__name__}(mutation.mutated(mutate, *{changes!r}))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert made.returncode == 0, made.stderr


@pytest.mark.full
def test_tests_see_the_mutant() -> None:
    apart(check_tested)


KEPT = "ours())\n    finally:\n        "
SUBJECT = "with other_world():\n            return super"
PLANTED = {
    "one function fewer": (check_edits, ('"max": "min", ', "")),
    "a place is one too far": (check_edits, ("source[: mutant.start] + ", "source[: mutant.start + 1] + ")),
    "the library is mutated": (check_apart, (f"{KEPT}exchange(kept)", f"{KEPT}pass")),
    "the subject is the library": (check_apart, (SUBJECT, "if True:\n            return super")),
    "no mutant is imported": (check_apart, ("if name == self.name else None", "if not name else None")),
}  # fmt: skip
PLANTED_IN_A_LONG_CHECK = {
    "failures are not seen": (check_fates, ("            if report.failures:", "            if False:")),
    "all is killed": (check_fates, ("if len(report.failures) > len(edge)", "if True")),
}


def caught(check: Any, change: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = mutated(mutate, change)
    monkeypatch.setattr(tool, "GIGABYTES", 16)
    arguments = []
    if check is check_edits:
        monkeypatch.setattr(tool, "path_of", lambda module: tmp_path / "small.py")
        arguments = [tmp_path / "small.py"]
    with pytest.raises((AssertionError, StopIteration)):
        check(tool, *arguments)


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_bug_is_caught(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caught(*PLANTED[what], tmp_path, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("what", PLANTED_IN_A_LONG_CHECK)
def test_a_planted_bug_in_what_runs_is_caught(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caught(*PLANTED_IN_A_LONG_CHECK[what], tmp_path, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize(
    "change",
    [
        ("function.__code__ = new[", "_ = new["),
        ("if own & lines)", "if lines)"),
        ("report.nodeid * report.failed", '""'),
    ],
)
def test_a_planted_bug_in_the_tests_is_caught(change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError, match="assert found =="):
        apart(check_tested, change)
