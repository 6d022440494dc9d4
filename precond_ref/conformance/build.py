"""Builder of the conformance vectors: results of the cases by the second implementation (`variants`) with 50 digits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import mpmath as mp
import numpy as np
from safetensors.numpy import save

from precond_ref.conformance import generated, variants
from precond_ref.conformance.arithmetic import DIGITS, exact, number, rounded
from precond_ref.conformance.declarations import TIERS, declared
from precond_ref.conformance.declarations.base import Case
from precond_ref.conformance.variants import root_free, sketchy

EXPONENTS = {"ASGO": 0.5, "KLShampoo": 0.5, "FullAdaGrad": 0.5, "Muon": 0.5, "NorMuon": 0.5, "AdaMuon": 0.5,
             "Shampoo": 0.5, "SAdaGrad": 0.5, "SShampoo": 0.5, "AdaFD": 1.0, "FDSON": 1.0, "RFDSON": 1.0}  # fmt: skip
"""Total exponent p of the root by method, such as 0.5 for L^-1/4 G R^-1/4; `exponent` has the others."""


def build(folder: Path, on_case: Callable[[str, int, int], Any] = lambda name, done, total: None) -> None:
    """Write all cases into ``folder``, which must be empty or absent; ``on_case(id, done, total)`` before each."""
    cases = declared()
    entries: dict[int, list[dict[str, Any]]] = {}
    for done, case in enumerate(cases):
        on_case(f"{case.method}/{case.name}", done, len(cases))
        with mp.workdps(DIGITS):
            entry, content = described(case)
        entries.setdefault(case.version, []).append(entry)
        if content:
            file = folder / f"v{case.version}" / entry["file"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    for version, listed in entries.items():
        place = folder / f"v{version}" / "manifest.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(manifest(version, listed), encoding="utf-8", newline="\n")


def manifest(version: int, entries: list[dict[str, Any]]) -> str:
    """Return the manifest of one version; from version 2 on it has a line for each case."""
    if version == 1:
        return json.dumps({"version": 1, "cases": entries}, indent=1, sort_keys=True, allow_nan=False) + "\n"
    lines = [json.dumps(entry, sort_keys=True, allow_nan=False, separators=(",", ":")) for entry in entries]
    tiers = json.dumps(TIERS, sort_keys=True, indent=1)
    return f'{{"version": {version},\n"tiers": {tiers},\n"cases": [\n' + ",\n".join(lines) + "\n]}\n"


def described(case: Case) -> tuple[dict[str, Any], bytes]:
    """Return the manifest entry and the file content of a case."""
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
        entry |= {"checkpoints": case.checkpoints} if case.checkpoints else {}
        entry |= {"fold": case.fold} if case.fold else {}
        entry |= {"deep": True} if case.deep else {}
        entry |= {"generated": case.generated} if case.generated else {}
        trace = run(case)
        steps = case.checkpoints or range(1, len(case.grads) + 1)
        results = [
            {"directions": trace.directions[t - 1], "params": trace.params[t - 1]}
            | {f"state.{name}": value for name, value in trace.states[t - 1].items()}
            for t in steps
        ]
        outputs = {
            name: np.stack([generated.folded(np.asarray(step[name]), case.fold) for step in results])
            for name in results[0]
        }
        kappas, decompositions = trace.kappas, trace.decompositions
    else:
        inputs = dict(case.inputs)
        outputs, kappa, count = PRIMITIVES[case.method](case)
        kappas, decompositions = [kappa], [count]
    tensors = {name: rounded(array) for name, array in {**inputs, **outputs}.items() if name not in case.generated}
    content = save(tensors)
    entry |= {
        "inputs": sorted(inputs),
        "conditioning": {
            "kappa": [float(mp.nstr(number(k), 6)) for k in kappas],
            "exponent": exponent(case),
            "stale": stale(case),
            "decompositions": decompositions,
        },
        "file": f"{identifier}.safetensors",
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return entry, content


def precise(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with its floats as mpmath numbers."""
    return {name: number(value) if isinstance(value, float) else value for name, value in config.items()}


def run(case: Case) -> variants.Trace:
    """Run the method on a trace with 50 digits."""
    constructor = case.constructor or case.method
    return variants.walk(
        constructor.partition(".")[0] if case.fields else constructor,  # MBF.authors_code makes an MBF of these fields
        precise(case.fields or case.config),
        exact(case.param),
        exact(case.grads),
        lr=[number(rate) for rate in case.lr] if isinstance(case.lr, tuple) else number(case.lr),
        decay=number(case.decay),
        stack_ndim=case.stack_ndim,
        conditioned=True,
    )


def exponent(case: Case) -> float:
    """Return the total exponent of the root, 0 without a root; each factor of a root-free method counts 1."""
    if case.method in ("RFShampoo", "IFShampoo"):
        return float(len(root_free.factor_dims(case.shape[case.stack_ndim :], frozenset())))
    if case.method == "MBF":
        return 0.0 if case.config.get("kind") == "diagonal" else 1.0
    return EXPONENTS.get(case.method, 0.0)


def stale(case: Case) -> bool:
    """Return whether a root may be older than the statistic."""
    config = case.fields or case.config
    if case.method in ("SOAP", "EShampoo") or case.constructor == "Shampoo.production":  # of another gradient
        return True
    return bool(config.get("every", 1) > 1 or (config.get("inverse_every", 1) > 1 and config["kind"] != "diagonal"))


# ---- primitives: results, condition number, number of decompositions -------------------------------------------------


def _power(case: Case) -> tuple[dict[str, Any], Any, int]:
    matrix, exponent = exact(case.inputs["matrix"]), Fraction(*case.config["exponent"])
    with variants.conditioning() as noted:
        members = [
            variants.power(m, exponent, number(case.config["ridge"])) for m in matrix.reshape(-1, *matrix.shape[-2:])
        ]
    return {"result": np.stack(members).reshape(matrix.shape)}, *noted.after_update()


def _sketch(case: Case) -> tuple[dict[str, Any], Any, int]:
    c, d = precise(case.config), case.shape[-1]
    sketch, out = sketchy.empty(d), []
    with variants.conditioning() as noted:
        for rows in exact(case.inputs["rows"]):
            sketch = sketchy.sketched(sketch, rows.T, c["size"], c["beta2"], c["tail_decay"], frozenset())
            kappa, count = noted.after_update()
            e = np.append(sketch.e, np.zeros(d))[: min(d, c["size"])]
            out.append({"eigenvalues": e, **sketchy.state("product", sketch)})
    results = {name: np.stack([step[name] for step in out]) for name in out[0]}
    return {name.removeprefix("product."): array for name, array in results.items()}, kappa, count


PRIMITIVES = {"roots.power": _power, "sketch.update": _sketch}
