"""Tests of the subject that ``--precond-target`` names: one per case and contract check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from precond_ref.conformance import results, runner, subjects
from precond_ref.conformance.plugin import DIAGNOSIS
from precond_ref.conformance.results import read_xfails
from precond_ref.conformance.subjects import parse_map


def option(config: pytest.Config, name: str) -> Any:
    """Return the value of the option ``--precond-NAME``."""
    return config.getoption(f"precond_{name}", default=None)


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Any:
    """Run the whole check once."""
    dtype = option(pytestconfig, "dtype")
    names = parse_map(option(pytestconfig, "map"))
    command = option(pytestconfig, "command")
    if command:
        subject: Any = subjects.Command(command, dtype, names)
    else:
        target = subjects.load_target(option(pytestconfig, "target"))
        subject = subjects.wrap(target, backend=option(pytestconfig, "backend"), dtype=dtype, names=names)
    try:
        found = runner.check(
            subject,
            option(pytestconfig, "method"),
            level=option(pytestconfig, "level"),
            dtype=dtype,
            deep=option(pytestconfig, "deep"),
            require=option(pytestconfig, "require"),
        )
        pytestconfig.stash[DIAGNOSIS] = found.diagnosis
        yield found
    finally:
        if command:
            subject.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test per id; an expected failure that is no id is a usage error."""
    if "name" not in metafunc.fixturenames:
        return
    config = metafunc.config
    if not option(config, "method") or bool(option(config, "target")) == bool(option(config, "command")):
        raise pytest.UsageError("give --precond-method, and one of --precond-target and --precond-command")
    try:
        names = runner.ids(option(config, "method"), option(config, "level"))
        runner.refuse_unknown(parse_map(option(config, "map")), option(config, "method"))
        if option(config, "target"):
            subjects.load_target(option(config, "target"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    file = option(config, "xfails")
    expected = read_xfails(Path(file)) if file else ()
    if unknown := sorted(set(expected) - set(names)):
        raise pytest.UsageError(f"expected to fail, but there is no such case or check: {', '.join(unknown)}")
    marks = {name: [pytest.mark.xfail(strict=True)] for name in expected}
    metafunc.parametrize("name", [pytest.param(name, id=name, marks=marks.get(name, [])) for name in names])


def test_subject(report: results.Report, name: str) -> None:
    """Judge one case or contract check; a failed case of tier "may" is skipped."""
    found = [r for r in report.results if r.id == name]
    if not found:
        pytest.skip("nothing ran that this could be seen in")
    result = found[0]
    if name in report.missing:
        pytest.fail(f"{result.why}\nskipped: {result.message}", pytrace=False)
    if result.status == results.SKIPPED or (result.status != results.PASSED and result.tier == "may"):
        pytest.skip(result.message or f"tier {result.tier}: {result.gap}")
    if result.status != results.PASSED:
        pytest.fail(f"{result.why}\n{result.message or result.gap}", pytrace=False)


def test_something_ran(report: results.Report) -> None:
    """Fail if the subject has no configuration of any case, because it was then not checked."""
    assert report.ran, "no case ran to its end"
