"""The cases of the conformance vectors: inputs, configurations and purposes; `build` adds the results."""

from __future__ import annotations

import importlib
import pkgutil

from precond_ref.conformance.declarations.base import Case

FAMILIES = tuple(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")
"""Modules of this folder that export ``CASES``."""

TIERS = {"SShampoo/every-outside-eps": "may", "SShampoo/practical-every-outside": "may"}
"""Tiers that version 2 has for cases of version 1, whose files never change.

The two ask for zero where eigenvalue and mass are zero, also with eps > 0: the paper's equation, taken literally, does
not.
"""


def declared() -> list[Case]:
    """Return all cases, in the order of the manifest."""
    modules = [importlib.import_module(f"{__name__}.{family}") for family in FAMILIES]
    return sorted((case for module in modules for case in module.CASES), key=lambda c: f"{c.method}/{c.name}")
