"""The quick tier has every check that a planted bug is shown to, so that it would catch these bugs as --full does."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import PLANTED, is_quick

IN_PROCESSES = {"test_torch_meshes": "each check is of what the ranks of a mesh saw, in gloo processes"}
"""Files whose checks of planted bugs the quick tier leaves out, as it starts no processes; the reasons."""
FILES = sorted(Path(__file__).parent.glob("test_*.py"))


def unseen(source: str) -> set[str]:
    """Functions ``check*`` that tests of planted bugs in ``source`` use, and no test of the quick tier does."""
    uses: dict[str, set[str]] = {}
    quick, planted, functions = set(), set(), set()
    for node in ast.parse(source).body:
        names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            uses.setdefault(node.name, set()).update(names)
            functions.add(node.name)
            if node.name.startswith("test_"):
                marks = {d.attr for d in node.decorator_list if isinstance(d, ast.Attribute)}  # not those of parameters
                (planted if PLANTED.search(node.name) else quick).update([node.name] * (not marks & {"full", "deep"}))
        else:
            for name in (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)):
                uses.setdefault(name, set()).update(names)

    def reached(start: set[str]) -> set[str]:
        found, new = set(), set(start)
        while new:
            found |= new
            new = {used for name in new for used in uses.get(name, ())} - found
        return {name for name in found if name.startswith("check") and name in functions}

    return reached(planted) - reached(set() if uses.get("pytestmark") else quick)


@pytest.mark.full
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_checks_of_planted_bugs_are_quick(file: Path) -> None:
    found = unseen(file.read_text(encoding="utf-8"))
    assert bool(found) == (file.stem in IN_PROCESSES), found  # nor is a file excused that needs no excuse


SOUND = """
def check_sum(lib): assert lib.sum([1]) == 1
CHECKS = [check_sum]
def test_check(): CHECKS[0](lib)
def test_planted_bug_is_caught(): check_sum(bad)
"""


def test_a_check_that_is_not_quick_is_found() -> None:
    assert unseen(SOUND) == set()
    assert unseen(SOUND.replace("CHECKS[0](lib)", "pass")) == {"check_sum"}
    assert unseen(SOUND.replace("def test_check()", "@pytest.mark.full\ndef test_check()")) == {"check_sum"}


def test_what_the_quick_tier_leaves_out() -> None:
    assert is_quick("test_float64_agrees_with_numpy", "jax-jit", first=True)
    assert is_quick("test_other", "torch", first=False)
    assert not is_quick("test_float64_agrees_with_numpy", "jax-jit", first=False)
    assert not is_quick("test_other", "jax", first=True)
    assert not is_quick("test_other", "strict-device1", first=False)
    assert not is_quick("test_planted_bug_is_caught", "numpy", first=True)
