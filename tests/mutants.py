"""Planted bugs: a copy of a module with one piece of its text replaced."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types


def mutant(module: str, old: str, new: str) -> types.ModuleType:
    """``module`` with ``old``, which must occur exactly once, replaced by ``new``; its methods stay unregistered."""
    original = importlib.import_module(module)
    source = inspect.getsource(original)
    if source.count(old) != 1:
        raise ValueError(f"{old!r} must occur exactly once in {module}, got {source.count(old)}")
    source = re.sub(r"^(class \w+\(Method)\)", r"\1, register=False)", source.replace(old, new), flags=re.MULTILINE)
    copy = types.ModuleType(f"{module}_mutant")
    sys.modules[copy.__name__] = copy  # dataclasses look their annotations up there
    try:
        exec(compile(source, copy.__name__, "exec"), copy.__dict__)
    finally:
        del sys.modules[copy.__name__]
    return copy
