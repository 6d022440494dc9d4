"""The cases of the conformance vectors: inputs, configurations and what each is for; `build` adds the results."""

from __future__ import annotations

import importlib

from precond_ref.conformance.declarations.base import Case

FAMILIES = ("agd", "asgo", "baselines", "primitives", "sketchy", "root_free", "inverse_free", "mbf")
"""Modules of this folder that export ``CASES``."""


def declared() -> list[Case]:
    """All cases, in the manifest's order."""
    modules = [importlib.import_module(f"{__name__}.{family}") for family in FAMILIES]
    return sorted((case for module in modules for case in module.CASES), key=lambda c: f"{c.method}/{c.name}")
