"""Planted bugs: a copy of a module or function with pieces of its source exchanged."""

from __future__ import annotations

import inspect
import operator
import textwrap
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from precond_ref import protocol


class Bug(NamedTuple):
    """An edit of a module's source, and the checks that must reject it."""

    old: str
    new: str
    checks: tuple[str, ...]


def mutated(subject: Any, *changes: tuple[str, str]) -> Any:
    """``subject``, a module or function, executed anew with each ``(old, new)`` exchanged.

    ``old`` must occur exactly once; a `LookupError` says otherwise, which no test of a planted bug expects.
    Methods that the copy defines are not found by their names.
    """
    source = textwrap.dedent(inspect.getsource(subject))
    for old, new in changes:
        if source.count(old) != 1:
            raise LookupError(f"{old!r} occurs {source.count(old)} times in {subject.__name__}")
        source = source.replace(old, new)
    module = inspect.getmodule(subject)
    copy = ModuleType(module.__name__)
    copy.__file__ = module.__file__
    if subject is not module:
        vars(copy).update(vars(module))
    registered = dict(protocol._CLASSES)
    try:
        exec(compile(source, f"<{subject.__name__} mutated>", "exec"), vars(copy))
    finally:
        protocol._CLASSES.clear()
        protocol._CLASSES.update(registered)
    return copy if subject is module else getattr(copy, subject.__name__)


def check_vectors(lib: Any) -> None:
    """The conformance vectors of all methods that ``lib`` has, a module of methods or its copy: parameters and states.

    `test_vectors.py` runs them on the library itself; here they are what a planted bug is shown to.
    """
    from test_vectors import TRACES, gap, load, run

    cases = [case for case in TRACES if case.version == 1 and hasattr(lib, case.constructor.partition(".")[0])]
    assert cases
    for case in cases:
        config = {name: tuple(value) if isinstance(value, list) else value for name, value in case.config.items()}
        with np.errstate(all="ignore"):
            got = run(case, operator.attrgetter(case.constructor)(lib)(**config))
            assert load(case).keys() - set(case.inputs) <= got.keys(), case.id
            assert gap(case, got) <= 1, case.id
