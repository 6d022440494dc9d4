"""Writes the conformance vectors from the cases of all families: `precond-ref vectors build`."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import mpmath as mp
import numpy as np
from safetensors.numpy import save

from .base import DIGITS, Case, Trace, rounded

FAMILIES = ["agd", "asgo", "baselines", "primitives", "sketchy", "root_free", "inverse_free", "mbf"]


def families() -> list[ModuleType]:
    """The family modules."""
    return [importlib.import_module(f".{name}", __package__) for name in FAMILIES]


def build(folder: Path, on_case: Callable[[str, int, int], Any] = lambda name, done, total: None) -> None:
    """Write all cases into ``folder``, which must be empty or absent; ``on_case(id, done, total)`` before each."""
    pairs = [(module, case) for module in families() for case in module.CASES]
    pairs.sort(key=lambda pair: f"{pair[1].method}/{pair[1].name}")
    entries = []
    for done, (module, case) in enumerate(pairs):
        on_case(f"{case.method}/{case.name}", done, len(pairs))
        with mp.workdps(DIGITS):
            entry, content = described(case, None if case.kind == "reject" else module.run(case))
        entries.append(entry)
        if content:
            file = folder / entry["file"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    manifest = {"version": 1, "cases": entries}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8", newline="\n")


def described(case: Case, result: Any) -> tuple[dict[str, Any], bytes]:
    """Manifest entry and file content of a case; ``result`` is what its family's ``run`` returned."""
    identifier = f"{case.method}/{case.name}"
    entry: dict[str, Any] = {
        "id": identifier,
        "method": case.method,
        "constructor": case.constructor or case.method,
        "kind": case.kind,
        "tier": case.tier,
        "config": dict(case.config),
        "shape": list(case.shape),
        "stack_ndim": case.stack_ndim,
        "why": case.why,
        "catches": sorted(case.catches),
    }
    if case.kind == "reject":
        return entry | {"argument": case.argument}, b""
    if case.kind == "trace":
        inputs = {"param": case.param, "grads": case.grads}
        entry |= {"steps": len(case.grads), "lr": case.lr, "decay": case.decay}
        kappa, exponent, stale = result.kappas, result.exponent, result.stale
        decompositions = result.decompositions
        outputs = dict(trace_tensors(result))
    else:
        inputs, outputs = case.inputs, {name: array for name, array in result.items() if not name.startswith("_")}
        kappa, exponent, stale = result.get("_kappa", [1]), 0.0, False
        decompositions = result.get("_decompositions", [1])
    tensors = {name: rounded(array) for name, array in {**inputs, **outputs}.items()}
    content = save(tensors)
    entry |= {
        "inputs": sorted(inputs),
        "conditioning": {
            "kappa": [float(mp.nstr(mp.mpf(k), 6)) for k in kappa],
            "exponent": float(exponent),
            "stale": stale,
            "decompositions": decompositions,
        },
        "file": f"{identifier}.safetensors",
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return entry, content


def trace_tensors(trace: Trace) -> Iterator[tuple[str, Any]]:
    """Names and stacked arrays of what a trace holds."""
    yield "directions", np.stack(trace.directions)
    yield "params", np.stack(trace.params)
    for name in trace.states[0]:
        yield f"state.{name}", np.stack([state[name] for state in trace.states])
