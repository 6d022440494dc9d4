"""The conformance vectors: inputs and 50-digit results, one file per case; *Vector format* in the documentation.

``cases()`` lists them, ``load(case)`` returns the arrays, ``verify()`` returns the faults of a folder of vectors.
Loading needs NumPy and safetensors, verifying needs jsonschema too: the extra ``cli``.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from precond_ref.files import parse_json, read, read_json, shown

if TYPE_CHECKING:
    import numpy as np

    from precond_ref.protocol import Method

FOLDER = Path(__file__).parent / "vectors"
VERSIONS = ("v1", "v2")
"""Folders in ``FOLDER``, each with a manifest; the cases of all of them count."""
SCHEMA = Path(__file__).parent / "schema.json"
ID = re.compile(r"[A-Za-z]+(\.[A-Za-z]+)*/[a-z0-9-]+")
MAX_BYTES = 5_000_000
MAX_FAULTS = 20  # number of faults shown of a manifest that does not fit the schema
MUST_KAPPA = 1e3
INPUT_BITS, FIELD_BITS = {1: 8, 2: 53}, 24  # significant bits: of bfloat16 in version 1, of float64 in 2; of float32
LARGEST = {1: 8.0, 2: 2.0**14}
"""Largest magnitude of an input, by version."""

QUINTIC: Mapping[str, tuple[float, ...]] = {
    "Muon/quintic": (81.7275, 77.7087, 171.153, 62.4079, 74.172),
    "Muon/quintic-3": (56.8112, 43.3018, 207.423, 36.2099, 33.2867),
    "Muon/quintic-four": (140.046, 677.82, 87.737, 106.61, 86.679),
    "Muon/quintic-nesterov": (83.5346, 191.622, 88.552, 77.4003, 90.5438),
}
"""kappa of the cases that record the condition number although they iterate: it leaves out the slope of the polynomial.
Here is the larger of the condition number and of the kappa of iterations, see *Tolerance*."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An entry of the manifest; *Vector format* in the documentation explains the fields."""

    id: str
    method: str
    constructor: str
    kind: str
    tier: str
    config: Mapping[str, Any]
    shape: tuple[int, ...]
    stack_ndim: int
    why: str
    catches: tuple[str, ...]
    steps: int = 0
    lr: float | tuple[float, ...] = 0.0
    """Learning rate; a tuple has one rate for each step."""
    decay: float = 0.0
    checkpoints: tuple[int, ...] = ()
    """Steps, counted from 1, that have results; () means all steps."""
    fold: int = 0
    """Results of more entries are folded, `precond_ref.conformance.generated.folded`."""
    generated: Mapping[str, Any] = field(default_factory=dict)
    """Inputs that are in no file: arguments of `precond_ref.conformance.generated.tensor`."""
    deep: bool = False
    """True if only a deep check runs the case."""
    inputs: tuple[str, ...] = ()
    conditioning: Mapping[str, Any] = field(default_factory=dict)
    argument: str = ""
    file: str = ""
    sha256: str = ""
    folder: Path = field(default=FOLDER, repr=False, compare=False)
    """Folder of the manifest."""
    version: int = field(default=1, compare=False)
    """Version of the manifest."""

    @property
    def narrow(self) -> bool:
        """Return True if the products of the case are in bfloat16; their tolerance then holds without any slack."""
        return self.config.get("compute_dtype") is not None

    @property
    def kappa(self) -> float:
        """Largest condition number of its steps."""
        return float(max(self.conditioning["kappa"], default=1.0))

    @property
    def stored(self) -> tuple[int, ...]:
        """Steps that have results, counted from 1."""
        return self.checkpoints or tuple(range(1, self.steps + 1))

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rate of each step."""
        return self.lr if isinstance(self.lr, tuple) else (self.lr,) * self.steps

    def make(self) -> Method:
        """Return the method of a trace or a reject, from constructor and config; ValueError or TypeError if refused."""
        import precond_ref

        name, _, preset = self.constructor.partition(".")
        method = precond_ref.list_methods().get(name)
        if method is None or (preset and preset not in method.presets):
            raise ValueError(f"{shown(self.constructor)!r} is no method or preset of this library")
        return operator.attrgetter(self.constructor)(precond_ref)(**tuples(self.config))


def tuples(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with tuples in the place of JSON's lists."""

    def made(value: Any) -> Any:
        return tuple(map(made, value)) if isinstance(value, list) else value

    return {name: made(value) for name, value in config.items()}


def cases(
    method: str | None = None, tier: str | None = None, kind: str | None = None, *, folder: Path | None = None
) -> list[Case]:
    """Return the cases in the order of the manifests, or only the cases of a method, tier or kind.

    ``folder`` is a copy of one version. A later version may have another tier for a case of an earlier one.
    """
    found = [_case(entry) for entry in entries(folder)]
    wanted = {"method": method, "tier": tier, "kind": kind}
    return [
        case for case in found if all(value is None or getattr(case, key) == value for key, value in wanted.items())
    ]


def entries(folder: Path | None = None) -> list[dict[str, Any]]:
    """Return the entries of the manifests, each with its present tier, its version and its folder."""
    folders = [folder] if folder else [FOLDER / version for version in VERSIONS if (FOLDER / version).is_dir()]
    manifests = [_parsed(read(file, MAX_BYTES), file) for file in (place / "manifest.json" for place in folders)]
    tiers = {id: tier for manifest in manifests for id, tier in manifest.get("tiers", {}).items()}
    return [
        entry | {"folder": place, "version": manifest["version"], "tier": tiers.get(entry["id"], entry["tier"])}
        for place, manifest in zip(folders, manifests, strict=True)
        for entry in manifest["cases"]
    ]


_parsed = lru_cache(maxsize=len(VERSIONS))(parse_json)  # once for the same bytes; no caller changes the result


def _case(entry: dict[str, Any]) -> Case:
    arguments: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    if entry["id"] in QUINTIC:
        arguments["conditioning"] = entry["conditioning"] | {"kappa": QUINTIC[entry["id"]]}
    return Case(**arguments)


def load(case: Case) -> dict[str, np.ndarray]:
    """Return the tensors of a case by name, float64, with the generated inputs; empty for a reject.

    ValueError if the file is not the recorded one, is not in the manifest's folder, or is too large.
    """
    from precond_ref.conformance import generated

    tensors = _stored(case)
    for name, given in case.generated.items():
        lead = (case.steps,) if name == "grads" else ()
        tensors[name] = generated.tensor((*lead, *case.shape), **given)
    return tensors


def _stored(case: Case) -> dict[str, np.ndarray]:
    from safetensors.numpy import load as parse

    if case.kind == "reject":
        return {}
    if not ID.fullmatch(case.id) or case.file != f"{case.id}.safetensors":
        raise ValueError(f"file must be {case.id}.safetensors, got {case.file}")
    content = read(_inside(case.folder, case.file), MAX_BYTES)
    digest = hashlib.sha256(content).hexdigest()
    if digest != case.sha256:
        raise ValueError(f"sha256 of {case.folder / case.file} must be {case.sha256}, got {digest}")
    try:
        return parse(content)
    except KeyError as error:
        raise ValueError(f"{case.file} has a tensor of type {error}") from error


def verify(folder: Path | None = None) -> list[str]:
    """Return the faults of the installed vectors, or of the version in ``folder``, one sentence per fault.

    Only files inside the folder are read, and at most `MAX_BYTES` of them.
    """
    if folder:
        return [shown(fault) for fault in _all_faults(folder)]
    faults = [f"{version}: {fault}" for version in VERSIONS for fault in verify(FOLDER / version)]
    if not faults:
        listed = cases()
        faults += [f"{id}: in {n} versions" for id, n in Counter(case.id for case in listed).items() if n > 1]
        known = {case.id for case in listed}
        for version in VERSIONS:
            tiers = read_json(FOLDER / version / "manifest.json", MAX_BYTES).get("tiers", {})
            faults += [f"{version}: tiers has no case {id}" for id in tiers if id not in known]
    return faults


def _all_faults(folder: Path) -> Iterator[str]:
    import jsonschema

    try:
        manifest = read_json(_inside(folder, "manifest.json"), MAX_BYTES)
    except (OSError, ValueError) as error:
        yield f"manifest.json: {error}"
        return
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    found = [f"manifest.json: {e.json_path}: {e.message}" for e in islice(validator.iter_errors(manifest), MAX_FAULTS)]
    if found:
        yield from found
        return
    listed = cases(folder=folder)
    yield from (f"{id}: listed {n} times" for id, n in Counter(c.id for c in listed).items() if n > 1)
    files = {p.relative_to(folder).as_posix(): p.lstat().st_size for p in folder.rglob("*") if not p.is_dir()}
    yield from (f"{file}: belongs to no case" for file in files.keys() - {c.file for c in listed} - {"manifest.json"})
    if sum(files.values()) > MAX_BYTES:
        yield f"all files together have {sum(files.values())} bytes, more than {MAX_BYTES}"
        return
    for case in {case.id: case for case in listed}.values():
        yield from (f"{case.id}: {fault}" for fault in _faults(case))


def _inside(folder: Path, name: str) -> Path:
    """Return the path of a regular file that no link leads to; installers may make links of our own files."""
    path = folder / name
    if folder.parent != FOLDER and path.resolve() != folder.resolve() / name:
        raise ValueError(f"{name} must not be behind a link")
    if path.exists() and not path.is_file():
        raise ValueError(f"{name} must be a regular file")
    return path


def _faults(case: Case) -> Iterator[str]:
    from safetensors import SafetensorError

    if case.id.split("/")[0] != case.method or case.constructor.split(".")[0] != case.method.split(".")[0]:
        yield f"id and constructor must start with the method {case.method}, got constructor {case.constructor}"
    rates = case.lr if isinstance(case.lr, tuple) else (case.lr,)
    for name, value in [*case.config.items(), *(("lr", rate) for rate in rates), ("decay", case.decay)]:
        if isinstance(value, float) and not _has_bits([value], FIELD_BITS):
            yield f"{name} must be a multiple of a power of 2 with {FIELD_BITS} bits, got {value!r}"
    if case.version == 1 and (case.checkpoints or case.fold or case.generated or case.deep or len(rates) != 1):
        yield "version 1 has no checkpoints, fold, generated, deep, and one lr"
    if case.kind == "reject":
        return
    largest = max(case.conditioning["kappa"])
    if case.tier == "must" and largest > MUST_KAPPA:
        yield f"a must-case has condition numbers up to {MUST_KAPPA:g}, got {largest:g}"
    try:
        tensors = load(case)
    except (OSError, ValueError, SafetensorError) as error:
        yield str(error)
        return
    for name, tensor in tensors.items():
        if tensor.dtype != "float64":
            yield f"{name} must be float64, got {tensor.dtype}"
        elif not all(map(math.isfinite, tensor.flat)):
            yield f"{name} is not finite"
        elif name in case.inputs and not _has_bits(tensor.flat, INPUT_BITS[case.version]):
            yield f"{name} is not exact in bfloat16"
    if missing := set(case.inputs) - tensors.keys():
        yield f"lacks the tensors {sorted(missing)}"
    if not tensors.keys() - set(case.inputs):
        yield "has no result"
    if case.kind == "trace":
        yield from _trace_faults(case, tensors)


def _trace_faults(case: Case, tensors: Mapping[str, np.ndarray]) -> Iterator[str]:
    from precond_ref.conformance import generated

    many, stored = (case.steps, *case.shape), len(case.stored)
    result = (stored, case.fold + 1) if generated.folds(case.shape, case.fold) else (stored, *case.shape)
    shapes = {"param": case.shape, "grads": many, "directions": result, "params": result}
    for name, shape in shapes.items():
        if name not in tensors:
            yield f"lacks the tensors ['{name}']"
        elif tensors[name].shape != shape:
            yield f"{name} must have shape {shape}, got {tensors[name].shape}"
    for name in tensors.keys() - shapes.keys():
        if not name.startswith("state."):
            yield f"{name} is no tensor of a trace"
        elif tensors[name].shape[:1] != (stored,):
            yield f"{name} must have {stored} steps, got shape {tensors[name].shape}"
    for name in {"param", "grads"} & tensors.keys():
        if not 0 < abs(tensors[name]).max(initial=0) <= LARGEST[case.version]:
            yield f"{name} must be at most {LARGEST[case.version]:g} in magnitude and not all zero"
    for name in ("kappa", "decompositions"):
        if len(case.conditioning[name]) != case.steps:
            yield f"conditioning.{name} must have {case.steps} entries, got {len(case.conditioning[name])}"
    if list(case.stored) != sorted({*case.stored}) or not {*case.stored} <= {*range(1, case.steps + 1)}:
        yield f"checkpoints must be steps from 1 to {case.steps}, ascending, got {case.checkpoints}"
    if len(case.rates) != case.steps:
        yield f"lr must have {case.steps} entries, got {len(case.rates)}"
    if case.fold and (case.decay or case.stack_ndim):
        yield "a case whose results are folded has no decay and no stack"


def _has_bits(values: Iterable[float], bits: int) -> bool:
    """Return whether each value has at most ``bits`` significant bits, and an exponent that every format has."""
    return all(x == 0 or ((math.frexp(x)[0] * 2**bits).is_integer() and 2**-100 < abs(x) < 2**100) for x in values)
