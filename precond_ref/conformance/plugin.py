"""The pytest plugin: ``pytest --pyargs precond_ref.conformance --precond-target my_pkg:MyASGO --precond-method ASGO``.

An entry point loads this module into every pytest run of an environment with precond-ref, for the options; the tests
are in ``test_subject.py``.
"""

from __future__ import annotations

from typing import Any

import pytest

DIAGNOSIS = pytest.StashKey[Any]()
"""Key of the diagnosis of the failures, which ``test_subject.py`` stores."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of ``precond-ref check`` with the prefix ``--precond-``, except for laws, limits and reports."""
    group = parser.getgroup("precond-ref", "checking an optimizer (precond-ref)")
    group.addoption("--precond-target", metavar="MODULE:ATTRIBUTE", help="the implementation to check")
    group.addoption("--precond-command", metavar="PROGRAM", help="a program that speaks JSON lines, instead")
    group.addoption("--precond-method", metavar="NAME", help="the method that it should be, such as ASGO")
    group.addoption("--precond-level", type=int, default=0, help="0: parameters, 1: states too, 2: primitives too")
    group.addoption("--precond-dtype", default="float64", help="float64 or float32")
    group.addoption("--precond-backend", help="array library for functions and for our methods")
    group.addoption("--precond-map", action="append", default=[], metavar="OURS=THEIRS", help="repeatable")
    group.addoption("--precond-deep", action="store_true", help="generate more inputs, for minutes")
    group.addoption("--precond-require", default="", metavar="TIER", help="fail if a case of must (should) is skipped")
    group.addoption("--precond-xfails", metavar="FILE", help="ids of cases that are expected to fail, one a line")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the diagnosis once, after the failures."""
    diagnosis = config.stash.get(DIAGNOSIS, None)
    if diagnosis is not None:
        terminalreporter.section("precond-ref: what it computes")
        for line in diagnosis.lines():
            terminalreporter.write_line(line)
