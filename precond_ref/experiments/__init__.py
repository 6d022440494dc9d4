"""Experiments that test the claims of the papers: ``precond-ref experiments``.

record = experiments.list_experiments()["dials"].run(seeds=[0, 1])
"""

from __future__ import annotations

import importlib
from functools import cache

from precond_ref.experiments.base import Claim, Experiment

__all__ = ["Claim", "Experiment", "list_experiments"]

FAMILIES = ("asgo", "sketchy", "rootfree", "mbf", "agd", "language", "vision")


@cache
def list_experiments() -> dict[str, Experiment]:
    """Return the experiments by name."""
    modules = [importlib.import_module(f"precond_ref.experiments.{name}") for name in FAMILIES]
    return {each.name: each for module in modules for each in module.EXPERIMENTS}
