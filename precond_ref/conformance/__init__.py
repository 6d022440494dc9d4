"""Checks of other implementations: vectors of inputs and results, and the code that runs them.

``precond-ref check`` is the command, `check` the function. They need NumPy and safetensors, the extra ``cli``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from precond_ref.conformance.isolation import Isolated
    from precond_ref.conformance.processes import Limits
    from precond_ref.conformance.results import Report, cases
    from precond_ref.conformance.runner import check, run_case
    from precond_ref.conformance.subjects import Config, Subject, Unsupported, wrap
    from precond_ref.conformance.vectors import Case, load

_WHERE = {
    "check": "runner", "cases": "results", "run_case": "runner", "Report": "results",
    "Config": "subjects", "Subject": "subjects", "Unsupported": "subjects", "wrap": "subjects",
    "Isolated": "isolation", "Limits": "processes", "Case": "vectors", "load": "vectors",
}  # fmt: skip
__all__ = [
    "Case", "Config", "Isolated", "Limits", "Report", "Subject", "Unsupported", "cases", "check", "load", "run_case",
    "wrap",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
