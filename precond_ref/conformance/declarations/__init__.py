"""The cases of the conformance vectors: inputs, configurations and purposes; `build` adds the results."""

from __future__ import annotations

import importlib

from precond_ref.conformance.declarations.base import Case

FAMILIES = ("agd", "asgo", "baselines", "primitives", "sketchy", "root_free", "inverse_free", "mbf", "muon",
            "adafactor", "klshampoo", "adam_forms", "soap", "production", "second")  # fmt: skip
"""Modules of this folder that export ``CASES``; those of the last six are version 2, and some of "muon"."""

TIERS = {"SShampoo/every-outside-eps": "may", "SShampoo/practical-every-outside": "may"}
"""Tiers that version 2 has for cases of version 1, whose files never change.

The two ask for zero where eigenvalue and mass are zero, also with eps > 0: the paper's equation, taken literally, does
not.
"""


def declared() -> list[Case]:
    """Return all cases, in the order of the manifest."""
    modules = [importlib.import_module(f"{__name__}.{family}") for family in FAMILIES]
    return sorted((case for module in modules for case in module.CASES), key=lambda c: f"{c.method}/{c.name}")
