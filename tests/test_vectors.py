"""The conformance vectors: this library reproduces them, the linter finds planted faults, building is deterministic."""

import ast
import hashlib
import inspect
import json
import operator
import re
import shutil
import sys
from pathlib import Path

import mpmath
import numpy as np
import pytest
from mutation import mutated
from safetensors.numpy import load as parse
from safetensors.numpy import save
from typer.testing import CliRunner

import precond_ref
from precond_ref import cli, conformance
from precond_ref.cli import vectors as vectors_command
from precond_ref.conformance import arithmetic, build, declarations, vectors
from precond_ref.conformance.tolerance import of_case
from precond_ref.conformance.vectors import cases, load, verify
from precond_ref.methods import agd, asgo, baselines, muon, shampoo, sketchy
from precond_ref.numerics import roots, sketch
from precond_ref.numerics.template import arrays_of

TRACES, PRIMITIVES, REJECTS = (cases(kind=kind) for kind in ("trace", "primitive", "reject"))
BY_ID = {case.id: case for case in cases()}
FIRST = vectors.FOLDER / "v1"
SOME = [pytest.param(c, marks=pytest.mark.full if c.deep else (), id=c.id) for c in TRACES]


def by_id(case):
    return case.id


# ---- the library against the vectors --------------------------------------------------------------------------------


FREE_SIGNS = "state.bases.", "state.rotated_m"


def fields(state, prefix="state."):
    """Names and values of a state's arrays, as the vectors name them; a sketch by what is unique in it."""
    for name, value in zip(getattr(state, "_fields", range(len(state))), state, strict=True):
        if isinstance(value, sketch.Sketch):
            if value.basis.shape[-2] > 512:  # the product is too large to be given
                continue
            yield f"{prefix}{name}", product(value)
            yield f"{prefix}{name}.eigenvalues", value.eigenvalues
            yield f"{prefix}{name}.escaped", value.escaped
        elif isinstance(value, roots.Root):
            yield f"{prefix}{name}", product(value)
        elif isinstance(value, tuple):
            yield from fields(value, f"{prefix}{name}.")
        elif value is not None and name != "step" and not f"{prefix}{name}".startswith(FREE_SIGNS):
            yield f"{prefix}{name}", value


def product(s):
    """U diag(e) U^T."""
    return (s.basis * s.eigenvalues[..., None, :]) @ np.swapaxes(s.basis, -1, -2)


def run(case, method):
    """All results of ``method`` on a trace, each stacked over the steps that have results."""
    tensors = load(case)
    param = tensors["param"]
    state = method.init(param, stack_ndim=case.stack_ndim)
    steps = []
    for grad, rate in zip(tensors["grads"], case.rates, strict=True):
        direction, state = method.update(grad, state, param)
        param = (1 - rate * case.decay) * param - rate * direction
        steps.append({"directions": direction, "params": param, **dict(fields(state))})
    return {name: np.stack([fold(case, steps[t - 1][name]) for t in case.stored]) for name in steps[0]}


def fold(case, x):
    """What is stored of a result."""
    if not case.fold or x.size <= case.fold:
        return x
    sums = np.bincount(np.arange(x.size) % case.fold, x.ravel(), case.fold)
    return np.append(sums, np.sqrt(np.sum(x * x)))


def gap(case, got):
    """Largest normwise distance from the truth over what rounding explains."""
    steps = case.stored if case.kind == "trace" else (1,)
    allowed = np.array([of_case(case, "float64", t) for t in steps])
    ratios = []
    for name, truth in load(case).items():
        if name in case.inputs:
            continue
        assert got[name].shape == truth.shape, name
        axes = tuple(range(1, truth.ndim)) if case.kind == "trace" else None
        folded = case.fold and truth.shape[1:] == (case.fold + 1,)  # the last is the norm
        size = np.sqrt(np.sum(truth**2, axis=axes))
        if folded:  # at most ceil(4356 / 64) = 69 entries in a sum
            size = np.sqrt(70) * truth[:, -1]
        if name == "params":  # each is the one before minus a step, which may cancel, and has the errors of all
            size = np.maximum(size, np.concat([[np.linalg.norm(load(case)["param"])], size[:-1]])) * steps
        distance = np.sqrt(np.sum((got[name] - truth) ** 2, axis=axes))
        ratios.append(distance / np.where(size > 0, size, 1) / allowed)
    return np.max(np.concatenate([np.atleast_1d(r) for r in ratios]))  # NaN where there is one


@pytest.mark.parametrize("case", SOME)
def test_core_reproduces_trace(case):
    got = run(case, case.make())
    unique = {name for name in got if not name.endswith((".eigenvalues", ".escaped"))}
    assert unique <= load(case).keys() - set(case.inputs) <= got.keys()
    assert gap(case, got) <= 1


def apply(case, roots=roots, sketch=sketch):
    """Our result of a primitive."""
    config, tensors = case.config, load(case)
    if case.constructor == "roots.power":
        numerator, denominator = config["exponent"]
        return {"result": roots.power(tensors["matrix"], numerator / denominator, config["ridge"])}
    rows = tensors["rows"]
    state = arrays_of(sketch.empty(rows.shape[-1], config["size"]), rows, np)
    out = []
    for batch in rows:
        state = sketch.update(state, batch, config["beta2"], config["tail_decay"], size=config["size"])
        out.append({"product": product(state), "eigenvalues": state.eigenvalues, "escaped": state.escaped})
    return {name: np.stack([step[name] for step in out]) for name in out[0]}


@pytest.mark.parametrize("case", PRIMITIVES, ids=by_id)
def test_core_reproduces_primitive(case):
    assert gap(case, apply(case)) <= 1


@pytest.mark.parametrize("case", REJECTS, ids=by_id)
def test_core_refuses(case):
    name = "param(eter)?" if case.argument == "param" else case.argument
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        case.make().init(np.zeros(case.shape), stack_ndim=case.stack_ndim)


PLANTED = [
    (agd, "k.of_gradient * grad - k.of_average * (m if self.from_new else state.m)", "(grad - state.m)", "AGD/plain"),
    (agd, "clamp(root, k.floor, xp=xp)", "clamp(root, self.delta, xp=xp)", "AGD/switch"),
    (agd, "xp.maximum(state.b_max, b)", "b", "AGD/amsgrad"),
    (agd, "k.factor * u", "k.factor * one_minus_power(self.beta1, now.step) * u", "AGD/first-step"),
    (agd, "quotient(m, clamp(root, k.floor, xp=xp), xp, bound=least)",
        "m / clamp(root, k.floor, xp=xp)", "AGD/zero-delta"),
    (asgo, "(m, xp), roots.Law(-0.5, self.eps)", "(m, xp), roots.Law(-0.25, self.eps)", "ASGO/left"),
    (asgo, "(m, xp), roots.Law(-0.5, self.eps)", "(m, xp), roots.Law(-1.0, self.eps, root=True)", "ASGO/right"),
    (asgo, 'self.side == "smaller" and m < n', 'self.side == "smaller" and m <= n', "ASGO/tie"),
    (asgo, "now.due", "now.step % self.every == 0", "ASGO/every-3"),
    (asgo, "ema(state.gram, gram_of(", "ema(state.gram, 2 * gram_of(", "ASGO/heads"),
    (asgo, "decompose(gram, law, xp=xp)  # (2)", "decompose(state.gram, law)", "ASGO/theory"),
    (asgo, "xp.sum(grad * grad, axis=-2)", "xp.mean(grad * grad, axis=-2)", "DASGO/columns"),
    (baselines, "grad, self.momentum, self.nesterov)", "grad, self.momentum)", "SGD/nesterov"),
    (baselines, 'uncorrected" else self.eps)', 'uncorrected" else 1.1 * self.eps)', "Adam/plain"),
    (shampoo, "-0.5 / len(state.grams), self.eps)\n        grams", "-0.25, self.eps)\n        grams",
        "Shampoo/order-3"),
    (shampoo, "gram * k.correction if", "gram if", "Shampoo/bias-correction"),
    (muon, "self.rms * math.sqrt(max(r, k))", "self.rms * math.sqrt(r)", "Muon/wide"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "old", "new", "id"), PLANTED, ids=[f"{p[3]}: {p[2]}" for p in PLANTED])
def test_vectors_catch_planted_bug(module, old, new, id):
    copy, case = mutated(module, (old, new)), BY_ID[id]
    make = operator.attrgetter(case.constructor)(copy)
    with np.errstate(invalid="ignore"):
        assert not gap(case, run(case, make(**case.config))) <= 1e6


@pytest.mark.parametrize(
    ("old", "new", "id"),
    [
        ("keep = known | (law.ridge > 0)", "keep = known | (law.ridge >= 0)", "roots.power/pseudo-inverse-2"),
        ("w) + self.ridge) ** self.exponent", "w)) ** self.exponent + self.ridge", "roots.power/ridge-4"),
        ("w, q, finite = eigh(matrix, xp=xp)", "w, q, finite = eigh(matrix * matrix, xp=xp)", "roots.power/no-ridge-6"),
        ("s[..., size - 1 : size] if size <= d", "s[..., size : size + 1] if size < d", "sketch.update/vectors"),
        ("eigenvalues=(s - cut) * (s + cut)", "eigenvalues=s * s", "sketch.update/blocks"),
        ("xp.sqrt(beta2 * sketch.eigenvalues)", "beta2 * xp.sqrt(sketch.eigenvalues)", "sketch.update/blocks"),
        ("(beta2 if tail_decay is None else tail_decay)", "beta2", "sketch.update/tail-decay"),
        ("(beta2 if tail_decay is None else tail_decay)", "(tail_decay or 1.0)", "sketch.update/blocks"),
    ],
)
def test_primitives_catch_planted_bug(old, new, id):
    case = BY_ID[id]
    planted = (
        {"roots": mutated(roots, (old, new))}
        if case.constructor == "roots.power"
        else {"sketch": mutated(sketch, (old, new))}
    )
    with np.errstate(all="ignore"):
        assert not gap(case, apply(case, **planted)) <= 1e6


def test_traces_catch_a_missing_rank_decision(monkeypatch):
    """Rounding that counts as escaped mass: the sketch hardly shows it, its inverse root does."""
    zero_only = ("** 2 * largest", "** 2 * 0.0")
    all_real = ("real = beside > roots.CERTAIN * u * top", "real = top >= 0")
    planted = mutated(sketch, ("s = xp.where(kept, s, 0.0)", "pass"), zero_only, all_real)
    planted.Sketch = sketch.Sketch
    monkeypatch.setattr(sketchy, "fd", planted)
    case = BY_ID["SAdaGrad/low-rank"]
    assert not gap(case, run(case, case.make())) <= 1e6


# ---- what the cases cover -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constructor", dict.fromkeys(case.constructor for case in TRACES))
def test_config_names_every_argument_and_each_is_varied(constructor):
    make = operator.attrgetter(constructor)(precond_ref)
    configs = [case.config for case in cases() if case.constructor == constructor]
    expected = set(inspect.signature(make).parameters)
    assert all(config.keys() <= expected for config in configs)
    assert max(map(len, configs)) == len(expected)  # cases of before there was a field do not name it
    traces = [case.config for case in TRACES if case.constructor == constructor]
    varied = {name: {json.dumps(config[name]) for config in traces if name in config} for name in expected}
    constant = {name for name in expected if len(varied[name]) == 1}
    assert constant == set()


def test_every_method_has_cases_of_each_kind():
    for kind in (TRACES, REJECTS):
        assert {case.method for case in kind} == set(precond_ref.list_methods())


def test_truth_shares_no_code_with_the_library():
    folder = Path(build.__file__).parent
    files = [
        folder / "build.py",
        folder / "arithmetic.py",
        *folder.glob("declarations/*.py"),
        *folder.glob("variants/*.py"),
    ]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            ours = {name for name in names if name.startswith("precond_ref") and "conformance" not in name}
            assert ours <= {"precond_ref.protocol"}, file  # the variants name the type of a method


def test_truth_keeps_zeros_and_rounds_once():
    third, tiny = mpmath.mpf(1) / 3, mpmath.mpf(10) ** -45
    assert arithmetic.rounded([0.5, 0.0]).tolist() == [0.5, 0.0]
    assert arithmetic.rounded(np.array([third, tiny, -third], dtype=object)).tolist() == [1 / 3, 0.0, -1 / 3]


# ---- the linter -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A copy of some of the vectors."""
    copy = tmp_path / "v1"
    for name in ("AGD", "ASGO", "roots.power"):
        shutil.copytree(FIRST / name, copy / name)
    manifest = json.loads((FIRST / "manifest.json").read_text(encoding="utf-8"))
    manifest["cases"] = [e for e in manifest["cases"] if (copy / e["method"]).is_dir()]
    write(copy, manifest)
    assert verify(copy) == []
    return copy


def write(folder, manifest):
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def change_entry(**changes):
    """Plants a change of the first trace's entry."""

    def plant(folder):
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        manifest["cases"][0] |= changes
        write(folder, manifest)

    return plant


def change_tensors(function):
    """Plants a change of the first trace's tensors, with the right sha256."""

    def plant(folder):
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        entry = manifest["cases"][0]
        tensors = parse((folder / entry["file"]).read_bytes())
        function(tensors)
        content = save(tensors)
        (folder / entry["file"]).write_bytes(content)
        entry["sha256"] = hashlib.sha256(content).hexdigest()
        write(folder, manifest)

    return plant


def flip_byte(folder):
    file = folder / "AGD/plain.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def duplicate(folder):
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["cases"].append(manifest["cases"][1])
    write(folder, manifest)


def put(name, index, value):
    return lambda tensors: tensors[name].__setitem__(index, value)


ABOUT = {"kappa": [1] * 6, "exponent": 0.5, "stale": False, "decompositions": [1] * 6}
FAULTS = {
    "flipped byte": (flip_byte, "AGD/plain: sha256 of .* must be"),
    "missing file": (lambda f: (f / "ASGO/left.safetensors").unlink(), "ASGO/left: .*No such file"),
    "orphan": (lambda f: (f / "AGD/other.safetensors").write_bytes(b""), "AGD/other.safetensors: belongs to no case"),
    "duplicate id": (duplicate, "AGD/clip: listed 2 times"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: "),
    "damaged file": (lambda f: change_entry(sha256=hashlib.sha256(b"x").hexdigest())(f)
                     or (f / "AGD/amsgrad.safetensors").write_bytes(b"x"), "AGD/amsgrad: .*header"),
    "too large": (lambda f: (f / "AGD/amsgrad.safetensors").write_bytes(bytes(5_000_000)), "all files together"),
    "unknown field": (change_entry(colour="red"), "manifest.json: .*colour"),
    "unknown tier": (change_entry(tier="maybe"), "manifest.json: .*maybe"),
    "not dyadic": (change_entry(lr=0.1), "AGD/amsgrad: lr must be a multiple of a power of 2"),
    "config not dyadic": (change_entry(config={"beta1": 0.9}), "AGD/amsgrad: beta1 must be a multiple"),
    "ill-conditioned": (change_entry(conditioning=ABOUT | {"kappa": [1e4] * 6}),
                        "AGD/amsgrad: a must-case has condition numbers up to 1000, got 10000"),
    "kappas": (change_entry(conditioning=ABOUT | {"kappa": [1]}), "conditioning.kappa must have 6 entries"),
    "decompositions": (change_entry(conditioning=ABOUT | {"decompositions": [1]}), "decompositions must have 6"),
    "other method": (change_entry(constructor="ASGO"), "AGD/amsgrad: id and constructor must start with the method"),
    "other file": (change_entry(file="AGD/clip.safetensors"), "AGD/amsgrad: file must be AGD/amsgrad.safetensors"),
    "wrong shape": (change_entry(shape=[3, 2]), r"AGD/amsgrad: param must have shape \(3, 2\), got \(2, 3\)"),
    "input not bfloat16": (change_tensors(put("grads", 0, 1 + 2**-8)), "AGD/amsgrad: grads is not exact in bfloat16"),
    "large input": (change_tensors(put("param", 0, 16)), "AGD/amsgrad: param must be at most 8 in magnitude"),
    "no input": (change_tensors(put("grads", ..., 0)), "AGD/amsgrad: grads must be .* not all zero"),
    "not finite": (change_tensors(put("directions", 0, np.inf)), "AGD/amsgrad: directions is not finite"),
    "float32": (change_tensors(lambda t: t.update(params=t["params"].astype("f4"))), "params must be float64"),
    "steps of a state": (change_tensors(lambda t: t.update({"state.m": t["state.m"][:2]})), "state.m must have 6 st"),
    "missing tensor": (change_tensors(lambda t: t.pop("directions")), r"lacks the tensors \['directions'\]"),
    "missing input": (change_tensors(lambda t: t.pop("grads")), r"lacks the tensors \['grads'\]"),
    "strange tensor": (change_tensors(lambda t: t.update(more=t["params"])), "more is no tensor of a trace"),
}  # fmt: skip


def test_vectors_are_in_order():
    assert verify() == []


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_finds_planted_fault(fault, folder):
    plant, message = FAULTS[fault]
    plant(folder)
    assert any(re.search(message, line) for line in verify(folder)), verify(folder)


def test_load_refuses_another_file(folder):
    flip_byte(folder)
    (case,) = (c for c in cases(folder=folder) if c.id == "AGD/plain")
    with pytest.raises(ValueError, match="sha256 of .* must be [0-9a-f]+, got [0-9a-f]+"):
        load(case)


# ---- the builder and the commands -----------------------------------------------------------------------------------


PARTS = 12
EQUAL = {"AdaMuon/large-gradients", "AdaMuon/sign-zero-row"}
"""Of equal singular values, whose difference is rounding: kappa depends on the number of digits."""


@pytest.mark.full
@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.deep) for i in range(1, PARTS))])
def test_building_changes_nothing(part, tmp_path, monkeypatch):
    """With more digits either, and whatever precision others have left behind."""
    everything = build.declared()
    assert sorted(f"{case.method}/{case.name}" for case in everything) == sorted(case.id for case in cases())
    chosen = everything[part::PARTS]
    monkeypatch.setattr(build, "declared", lambda: chosen)
    monkeypatch.setattr(build, "DIGITS", 70)
    with mpmath.workdps(15):
        build.build(tmp_path)
    lines = vectors_command.compared(vectors.FOLDER, tmp_path)
    assert [line for line in lines if not line.startswith("gone: ") and "manifest.json" not in line] == []
    assert sum(file.suffix == ".safetensors" for file in tmp_path.rglob("*")) > 50
    for version in ("v1", "v2"):
        built, kept = (
            json.loads((place / version / "manifest.json").read_text()) for place in (tmp_path, vectors.FOLDER)
        )
        for entry in (entry for entry in [*built["cases"], *kept["cases"]] if entry["id"] in EQUAL):
            entry["conditioning"]["kappa"] = []
        assert [entry for entry in built["cases"] if entry not in kept["cases"]] == []
    monkeypatch.setattr(build, "exponent", lambda case: 0.125)
    entry, _ = build.described(next(case for case in chosen if case.kind == "trace" and case.version == 1))
    assert entry not in json.loads((vectors.FOLDER / "v1" / "manifest.json").read_text())["cases"]


@pytest.fixture
def command(monkeypatch, folder):
    """The command with ``folder`` in place of the vectors, and AGD the only family."""
    monkeypatch.setattr(vectors, "FOLDER", folder.parent)
    monkeypatch.setattr(vectors, "VERSIONS", ("v1",))
    monkeypatch.setattr(declarations, "FAMILIES", ["agd"])
    return lambda *arguments: CliRunner().invoke(cli.application(), ["vectors", *map(str, arguments)])


def test_build_writes_what_check_wants(command, folder):
    result = command("build", "--check")
    assert result.exit_code == 1
    assert "gone: v1/ASGO/left.safetensors\n" in result.output
    assert (folder / "ASGO").is_dir()
    result = command("build")
    assert result.exit_code == 0
    assert not (folder / "ASGO").exists()
    assert re.search(r"^\d+ cases in ", result.output, re.M)
    result = command("build", "--check")
    assert (result.exit_code, result.output) == (0, "the files are what the build gives\n")
    flip_byte(folder)
    (folder / "AGD/clip.safetensors").unlink()
    result = command("build", "--check")
    lines = ["changed: v1/AGD/plain.safetensors", "new: v1/AGD/clip.safetensors", "2 files differ"]
    assert (result.exit_code, result.output.splitlines()) == (1, lines)


def test_build_refuses_to_write_faulty_vectors(command, folder, monkeypatch):
    before = (folder / "manifest.json").read_bytes()
    rounded = build.rounded
    monkeypatch.setattr(build, "rounded", lambda array: np.where(rounded(array) == 3, 3.001, rounded(array)))
    result = command("build")
    assert result.exit_code == 1
    assert "is not exact in bfloat16" in result.output
    assert (folder / "manifest.json").read_bytes() == before


def test_build_interrupted_writes_nothing(command, folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "described", interrupted)
    result = command("build")
    assert (result.exit_code, result.output) == (130, "interrupted: nothing was written\n")
    assert (folder / "ASGO").is_dir()


def test_build_says_what_to_install(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpmath", None)
    monkeypatch.delitem(sys.modules, "precond_ref.conformance.build")
    monkeypatch.delattr(conformance, "build")
    result = command("build")
    assert result.exit_code == 2
    assert 'mpmath is not installed: pip install "precond-ref[vectors]"' in result.output


def test_verify_command(command, folder):
    count = len(cases(folder=folder))
    assert command("verify").output == command("verify", folder).output == f"{count} cases: ok\n"
    flip_byte(folder)
    result = command("verify", folder)
    assert result.exit_code == 1
    assert result.output.startswith("AGD/plain: sha256 of ")


def test_list_command(command):
    lines = command("list", "--method", "ASGO", "--tier", "may").output.splitlines()
    assert [line.split()[:3] for line in lines] == [[c.id, "may", c.kind] for c in cases("ASGO", "may")]
    entries = json.loads(command("list", "--json").output)
    assert [entry["id"] for entry in entries] == [c.id for c in cases(folder=vectors.FOLDER / "v1")]
    presets = [c.id for c in cases("ASGO") if c.constructor == "ASGO.theory"]
    assert [line.split()[0] for line in command("list", "--method", "ASGO.theory").output.splitlines()] == presets != []
    result = command("list", "--method", "AG")
    wanted = "error: --method must be one of AGD, ASGO, roots.power, ASGO.theory, got 'AG'\n"
    assert (result.exit_code, result.output) == (2, wanted)
