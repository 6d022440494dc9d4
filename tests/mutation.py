"""Planted bugs: a copy of a module with a piece of its source exchanged."""

from __future__ import annotations

import inspect
from types import ModuleType

from precond_ref import protocol


def mutated(module: ModuleType, changes: tuple[tuple[str, str], ...] = ()) -> ModuleType:
    """``module`` executed anew with each ``(old, new)`` exchanged; ``old`` must occur exactly once.

    Methods that the copy defines do not enter the registry.
    """
    source = inspect.getsource(module)
    for old, new in changes:
        if source.count(old) != 1:
            raise ValueError(f"{old!r} occurs {source.count(old)} times in {module.__name__}")
        source = source.replace(old, new)
    copy = ModuleType(module.__name__)
    copy.__file__ = module.__file__
    registered = dict(protocol._REGISTRY)
    try:
        exec(compile(source, f"<{module.__name__} mutated>", "exec"), copy.__dict__)
    finally:
        protocol._REGISTRY.clear()
        protocol._REGISTRY.update(registered)
    return copy
