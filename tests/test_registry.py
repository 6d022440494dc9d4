"""Methods by name: the one way from a text to a method, and methods in files of somebody else."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutation import mutated

import precond_ref as pr
import precond_ref_jax
import precond_ref_torch as pt
from precond_ref import protocol, registry
from precond_ref.compare import rates
from precond_ref.fields import nearest
from precond_ref.methods import asgo
from precond_ref.registry import constructors, parse, parse_list
from precond_ref_torch import optimizer, states

torch.set_num_threads(1)

THEIRS = '''
from typing import Any, NamedTuple

import precond_ref
from precond_ref.fields import integer, real
from precond_ref.numerics.template import zeros


class HalfState(NamedTuple):
    step: Any
    m: Any


class Half(precond_ref.Method):
    """Momentum, divided by two."""

    beta: float = real("beta, decay of m", default=0.5, ge=0, lt=1)
    power: int = integer("of two", default=1, ge=0)

    state_type = HalfState
    elementwise = True

    @staticmethod
    def quarter(beta: float = 0.25):
        return Half(beta=beta, power=2)

    presets = ("quarter",)

    def state_of(self, shape):
        return HalfState(0, zeros(*shape))

    def step(self, grad, state, param, now):
        m = self.beta * state.m + grad
        return m / 2**self.power, HalfState(now.step, m)

    def report(self, state, finite, xp):
        return finite


class SGD(Half):
    """Has the name of one of the package."""

    size: int = integer("of nothing, without a default", ge=1)


class Fixed(Half, preset="Half.fixed"):
    """A preset with mathematics of its own."""

    def step(self, grad, state, param, now):
        return grad, HalfState(now.step, state.m)


class _Base(Half):
    pass


class Against(precond_ref.ASGO):
    """ASGO's step in the other direction, which is wrong, and named at once."""

    def step(self, grad, state, param, now):
        u, state = super().step(grad, state, param, now)
        return -u, state


def helper():
    pass
'''


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module ``theirs``, a file in the current folder."""
    (tmp_path / "theirs.py").write_text(THEIRS)
    (tmp_path / "broken.py").write_text("raise RuntimeError('at its beginning')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield registry.load("theirs:Half").__module__
    sys.modules.pop("theirs", None)
    for name in [name for name in registry._CLASSES if name.startswith("theirs:")]:
        del registry._CLASSES[name]


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "precond_ref.cli", *arguments], capture_output=True, text=True, check=False
    )


# ---- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("theirs")
def check_texts() -> None:
    """What each text says, and how it is written."""
    half = registry.load("theirs:Half")
    for text, made, right in (
        ("asgo", pr.ASGO(), "ASGO"),
        (" asgo.THEORY ( side='right' )", pr.ASGO.theory(side="right"), "ASGO.theory(side='right')"),
        ("mbf.authors_code(network='cnn')", pr.MBF.authors_code("cnn"), "MBF.authors_code(network='cnn')"),
        ("precond_ref:ASGO(eps=1e-8)", pr.ASGO(eps=1e-8), "ASGO(eps=1e-08)"),
        ("precond_ref:ASGO.theory", pr.ASGO.theory(), "ASGO.theory"),
        ("precond_ref:MBF.authors_code", pr.MBF.authors_code(), "MBF.authors_code"),
        ("theirs:Half", half(), "theirs:Half"),
        ("theirs:Half(beta=0.25, power=3)", half(beta=0.25, power=3), "theirs:Half(beta=0.25, power=3)"),
        ("theirs:Half.quarter", half(beta=0.25, power=2), "theirs:Half.quarter"),
        ("theirs:Half.fixed(beta=0)", half.fixed(beta=0), "theirs:Half.fixed(beta=0)"),
        ("theirs:SGD(size=3)", registry.load("theirs:SGD")(size=3), "theirs:SGD(size=3)"),
    ):
        named = parse(text)
        assert (named.text, named.made()) == (right, made)
        assert type(named.made()) is type(made)
        assert parse(right) == named
    assert [named.text for named in parse_list("sgd, theirs:Half(beta=0.5,power=2) ,,RFShampoo(beta2=(0.5)),")] == [
        "SGD",
        "theirs:Half(beta=0.5, power=2)",
        "RFShampoo(beta2=0.5)",
    ]
    assert parse("SShampoo").made(size=7, eps=1.0) == pr.SShampoo(size=7)
    assert parse("SShampoo(size=3)").made(size=7) == pr.SShampoo(size=3)


@pytest.mark.usefixtures("theirs")
def test_texts() -> None:
    check_texts()


BUGS = {
    "case counts": ("name.lower() not in known:", "name not in known:"),
    "commas in brackets split": ('character == "," and depth == 0', 'character == ","'),
    "fields are lost": ("return Named(name, make, fields)", "return Named(name, make, {})"),
    "preset is its owner": ('return f"{load(owner).name}.{preset}", found', "return load(owner).name, found"),
    "named by its place": ("return found.name, found", "return name, found"),
    "a default replaces what is given": ("if name in missing}, **self.fields}", "if name in missing}} | {**missing}"),
}


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("bug", BUGS)
def test_checks_of_texts_catch(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = mutated(registry, BUGS[bug])
    for name in ("parse", "parse_list"):
        monkeypatch.setitem(globals(), name, getattr(wrong, name))
    with pytest.raises((AssertionError, ValueError)):
        check_texts()


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Nothing", "no method is called Nothing; there are Adafactor"),
        ("_Sketched", "no method is called _Sketched"),
        ("", "no method is called ;"),
        ("ASGO(1)", "must be like 'SShampoo(size=64, every=10)': fields are given by name"),
        ("ASGO(every=3", "must be like"),
        ("ASGO(every=3)(", "must be like"),
        ("ASGO(every=len)", "must be like"),
        ("ASGO(rms=true)", "the value of rms must be a number, True, False, None or a text in quotes, got true"),
        ("theirs:_Base", "theirs:_Base begins with an underscore: it is a base of other classes and cannot be named"),
        ("ASGO(evry=3)", "ASGO has no field evry; it has beta1, beta2, eps"),
        ("theirs:Half(gamma=3)", "theirs:Half has no field gamma; it has beta, power"),
        ("nobody:Half", "there is no module 'nobody'"),
        ("theirs:Nothing", "theirs has no 'Nothing'; it has"),
        ("theirs:helper", "theirs:helper must be a class made from precond_ref.Method, got <function"),
        ("theirs:Half.step", "theirs:Half.step must be a class made from"),
        ("precond_ref:Method", "precond_ref:Method must be a class made from"),
        ("theirs.py:Half", "there is no module 'theirs.py' (without the .py)"),
    ],
)
def test_texts_that_say_nothing(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(text)


@pytest.mark.usefixtures("theirs")
def test_what_cannot_be_made() -> None:
    for text, message in (
        ("theirs:SGD", "theirs:SGD needs size: 'theirs:SGD(size=...)'"),
        ("theirs:Half(beta=1)", "beta must be finite and >= 0 and < 1, got 1"),
        ("ASGO(every='x')", "every must be a Python int, got 'x'"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            parse(text).made()
    with pytest.raises(ImportError, match="importing broken failed: .*at its beginning"):
        parse("broken:Half")


# ---- names ----------------------------------------------------------------------------------------------------------


def test_names_of_the_package() -> None:
    for name, make in constructors().items():
        fields = {"size": 2, "delta": 0.25, "learning_rate": 0.5}
        made = parse(name).made(**fields)
        assert registry.class_of(made.name) is type(made)
        assert made.name == name if isinstance(make, type) else made.name.split(".")[0] == name.split(".")[0]
    old = {"ASGOTheory": "ASGO.theory", "DASGOTheory": "DASGO.theory", "SShampooPractical": "SShampoo.practical"}
    assert {name: registry.class_of(name).name for name in old} == old
    assert all(set(name).isdisjoint(".:_") for name in pr.list_methods())


def test_a_class_from_outside_takes_no_name_of_the_package() -> None:
    before = dict(pr.list_methods())
    shadow: Any = type("MBF", (pr.Method,), {})
    assert shadow.name == f"{__name__}:MBF"
    assert registry.class_of(shadow.name) is shadow
    assert pr.list_methods() == before
    assert registry.class_of("MBF") is pr.MBF is parse("mbf").make
    with pytest.raises(ValueError, match="preset must be NAME.preset of a class .* before, got 'No.such'"):
        type("Such", (pr.Method,), {}, preset="No.such")


def test_a_mutated_copy_changes_no_name() -> None:
    copy = mutated(asgo, ("def _left(self, m: int, n: int)", "def _left(self, m: int, n: int, /)"))
    assert copy.ASGO.name == "ASGO"
    assert copy.ASGO.theory is copy.ASGOTheory is not pr.ASGO.theory
    assert registry.class_of("ASGO") is pr.ASGO
    assert registry.class_of("ASGO.theory") is pr.ASGO.theory


@pytest.mark.usefixtures("theirs")
def test_a_base_has_no_name() -> None:
    base = registry.load("theirs:_Base")
    with pytest.raises(ValueError, match="no method is called theirs:_Base; import theirs first"):
        pt.Optimizer([torch.nn.Parameter(torch.ones(2))], base())


# ---- mistakes of a beginner ------------------------------------------------------------------------------------------

FIRST = """
from typing import Any, NamedTuple

from precond_ref import Method
from precond_ref.numerics.template import zeros


class S(NamedTuple):
    step: Any
    m: Any


class M(Method):
    state_type = S

    def state_of(self, shape):
        return S(0, zeros(*shape))

    def step(self, grad, state, param, now):
        return now.xp.sign(grad), S(now.step, state.m + grad)
"""
RETURNED = "now.xp.sign(grad), S(now.step, state.m + grad)"
TURNED = "must return (direction, new state), the state a S, got "
MISTAKES = {
    "no state_type": ("state_type = S", "pass", "needs state_type, the NamedTuple class of its state"),
    "no step in the state": ("    step: Any\n", "", "whose first field is step; it has state_type = S"),
    "no state_of": ("def state_of", "def state", "M needs a function state_of(self, shape)"),
    "no step": ("def step", "def move", "M needs a function step(self, grad, state, param, now)"),
    "one number of axes": ("state_type = S", "ndims = 2", "ndims of M must be two numbers, as (2, 2), got 2"),
    "no state": ("S(0, zeros(*shape))", "zeros(*shape)", "state_of of {}:M must return a S, got Spec"),
    "an array": ("zeros(*shape)", "__import__('numpy').ones(shape)", "for each array, got ndarray in entry m"),
    "wrong order": (RETURNED, "S(now.step, grad), grad", TURNED + "(S, ndarray)"),
    "direction alone": (RETURNED, "grad", TURNED + "ndarray"),
    "state alone": (RETURNED, "S(now.step, state.m)", TURNED + "(int, ndarray)"),
    "a dict": (RETURNED, "grad, {'step': now.step, 'm': grad}", TURNED + "(ndarray, dict)"),
    "a number": ("xp.sign(grad)", "xp.sum(grad)", "a direction of the gradient's shape (2, 3), got ()"),
    "another dtype": ("xp.sign(grad)", "xp.astype(grad, now.xp.float32)",
        "step of {}:M must return a direction of the gradient's dtype float64, got float32"),
    "a slip in an attribute": ("state_type = S", "state_typ = S",
        "M has an attribute state_typ, which no method has: is "
        "it state_type? What is your own may begin with an underscore, or be a field"),
    "a slip in a declared attribute": ("state_type = S", "state_type = S; elementwize = True",
        "M has an attribute elementwize, which no method has: is it elementwise?"),
    "a slip in a function": ("def state_of", "def satte_of",
        "has an attribute satte_of, which no method has: is it state_of?"),
    "the old step": ("S(now.step,", "S(state.step,", "with now.step, here 1, as its step, got 0"),
    "a step more": ("S(now.step,", "S(now.step + 1,", "with now.step, here 1, as its step, got 2"),
    "fields of the state mixed up": ("S(now.step, state.m + grad)", "S(grad, now.step)", "as its step, got ndarray"),
}  # fmt: skip


def one_update(source: str) -> tuple[pr.Method, Any]:
    """The method ``M`` of a module, and its state after an update."""
    space: dict[str, Any] = {"__name__": "first"}
    exec(compile(source, "first.py", "exec", dont_inherit=True), space)  # without this file's string annotations
    method, ones = space["M"](), np.ones((2, 3))
    return method, method.update(ones, method.init(ones), ones)[1]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_a_first_method_are_named(mistake: str) -> None:
    old, new, message = MISTAKES[mistake]
    assert FIRST.count(old) == 1
    with pytest.raises((TypeError, ValueError), match=re.escape(message.format("first"))):
        one_update(FIRST.replace(old, new))
    registry._CLASSES.pop("first:M", None)


@pytest.mark.parametrize("mistake", [name for name in MISTAKES if "slip" in name])
def test_slips_that_are_not_looked_for_are_not_named(monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    monkeypatch.setattr(protocol, "nearest", lambda *_: [])
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        test_mistakes_of_a_first_method_are_named(mistake)
    registry._CLASSES.pop("first:M", None)


def test_names_of_ones_own_are_not_refused() -> None:
    own = (
        "state_type = S\n    _state_typ = 1\n    steps: int = 3\n    period: float = 0.5\n    Steps = 4\n    limit = 2"
    )
    method, _ = one_update(FIRST.replace("state_type = S", own) + "\n    def clipped(self, x):\n        return x\n")
    assert (method.steps, method.period, method.limit) == (3, 0.5, 2)  # type: ignore[attr-defined]
    registry._CLASSES.pop("first:M", None)


@pytest.mark.parametrize(
    ("name", "known", "found"),
    [
        ("bta1", ["beta1", "beta2"], ["beta1"]),
        ("beta", ["beta1", "beta2", "eps"], ["beta1", "beta2"]),
        ("espilon", ["epsilon"], ["epsilon"]),
        ("wieght_deacy", ["weight_decay"], ["weight_decay"]),
        ("momentun", ["momentum", "momenta_x"], ["momentum"]),
        ("eps", ["eps", "esp"], ["esp"]),
        ("wd", ["lr"], []),
        ("initial_lr", ["initial", "lr"], []),
        ("max_momentum", ["momentum"], []),
        ("role", ["root"], []),
    ],
)
def test_slips(name: str, known: list[str], found: list[str]) -> None:
    assert nearest(name, known) == found


def test_fields_are_given_by_name() -> None:
    message = re.escape("fields of DASGO are given by name, DASGO(beta1=..., beta2=..., eps=..., rms=...), got (0.9,)")
    with pytest.raises(TypeError, match=message):
        pr.DASGO(0.9)
    with pytest.raises(TypeError, match="unexpected keyword argument 'bta1'"):
        pr.DASGO(bta1=0.9)
    assert registry.arguments(pr.DASGO) == ["beta1", "beta2", "eps", "rms"]
    assert pickle.loads(pickle.dumps(pr.DASGO(eps=0.5))) == pr.DASGO(eps=0.5)


CLASSES: dict[str, Callable[[Any], Any]] = {
    "core": lambda cls: pr.Optimizer(cls),
    "core's route": lambda cls: pr.Optimizer(pr.SGD(), route=lambda *_: cls).init(np.ones(3)),
    "torch": lambda cls: pt.Optimizer([torch.nn.Parameter(torch.ones(3))], cls),
    "torch's fallback": lambda cls: pt.ASGO([torch.nn.Parameter(torch.ones(3))], fallback=cls),
    "torch's group": lambda cls: pt.ASGO([{"params": [torch.nn.Parameter(torch.ones(3))], "method": cls}]),
    "JAX": lambda cls: precond_ref_jax.scale_by(cls),
}


@pytest.mark.parametrize("place", CLASSES)
def test_a_class_in_the_place_of_a_method_is_named(place: str) -> None:
    with pytest.raises(TypeError, match=re.escape("<class 'precond_ref.methods.agd.AGD'>") + ".*: that is the class, "
                       r"an instance is AGD\(\.\.\.\)$"):  # fmt: skip
        CLASSES[place](pr.AGD)
    with pytest.raises(TypeError, match="got <class 'int'>(?!.* the class)"):
        CLASSES[place](int)


def test_what_a_class_lacks_is_said_by_jax_too() -> None:
    space: dict[str, Any] = {"__name__": "first"}
    exec(FIRST.replace("state_type = S", "pass"), space)
    with pytest.raises(TypeError, match="first:M needs state_type, the NamedTuple class of its state"):
        precond_ref_jax.scale_by(space["M"]())
    registry._CLASSES.pop("first:M", None)


SLIPS = {
    "bta1": ("AGD", "AGD has no field bta1, which a group has: is it beta1?"),
    "betas": ("Adam", "Adam has no field betas, which a group has: is it beta1 or beta2?"),
    "wieght_decay": ("AGD", "is it weight_decay?"),
    "fallbck": ("ASGO", "is it fallback?"),
    "evry": ("ASGO", "is it every?"),
    "netwrok": ("MBF.authors_code", "is it network?"),
}
THEIRS_KEYS = (
    # what torch.optim.lr_scheduler, swa_utils, timm, Lightning and others keep in groups
    "initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr", "base_momentum", "max_momentum", "lr_scale", "lr_mult",
    "name", "role", "fix_lr", "wd_mult", "decay_mult", "weight_decay_end", "lr_max", "weight_sum", "train_mode",
    "r", "k", "moe", "foreach", "fused", "capturable", "differentiable",
)  # fmt: skip


def group_of(key: str, value: Any, method: str) -> dict[str, Any]:
    return {"params": [torch.nn.Parameter(torch.ones(3, 3))], "method": method, key: value}


@pytest.mark.parametrize("key", SLIPS)
def test_a_slip_in_a_group_is_named(key: str) -> None:
    method, message = SLIPS[key]
    with pytest.raises(ValueError, match=re.escape(message)):
        pt.ASGO([group_of(key, 0.5, method)])


@pytest.mark.parametrize("key", SLIPS)
def test_a_slip_in_a_group_that_is_not_looked_for_passes(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr(optimizer, "nearest", lambda *_: [])
    pt.ASGO([group_of(key, 0.5, SLIPS[key][0])])


def test_keys_of_schedulers_and_wrappers_are_taken() -> None:
    needed = {"size": 2, "delta": 0.25, "learning_rate": 0.5}
    for name, make in constructors().items():
        group = group_of("method", name, name) | {field: needed[field] for field in registry.required(make)}
        pt.SGD([group | dict.fromkeys(THEIRS_KEYS)])


def test_groups_that_a_scheduler_has_changed_are_taken() -> None:
    for make in (torch.optim.lr_scheduler.OneCycleLR, torch.optim.lr_scheduler.CyclicLR):
        opt = pt.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.5, momentum=0.5)
        make(opt, *((0.5, 10) if make is torch.optim.lr_scheduler.OneCycleLR else (0.1, 0.5)), cycle_momentum=True)
        assert {"initial_lr", "max_momentum", "base_momentum"} <= opt.param_groups[0].keys()
        again = pt.SGD([dict(group) for group in opt.param_groups])
        assert again.param_groups[0]["initial_lr"] == opt.param_groups[0]["initial_lr"]


@pytest.mark.usefixtures("theirs")
def test_a_file_without_a_class_is_named() -> None:
    with pytest.raises(ValueError, match="no method is called theirs; .*; for a class in theirs.py: theirs:Class$"):
        parse("theirs")
    with pytest.raises(ValueError, match=f"{[*constructors()][-1]}$"):
        parse("nobody")


@pytest.mark.usefixtures("theirs")
@pytest.mark.full
def test_a_map_to_what_is_no_argument() -> None:
    for target in ("precond_ref:SGD", "torch.optim:SGD"):
        ran = program("check", target, "--method", "SGD", "--map", "momentum=mas")
        assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
        assert "SGD has no argument 'mas', which momentum is mapped to; it has " in ran.stderr


def test_a_first_method_without_mistakes() -> None:
    method, state = one_update(FIRST)
    assert state.step == 1
    with pytest.raises(NotImplementedError, match="^first:M has no report"):
        method.diagnose(state)
    registry._CLASSES.pop("first:M", None)


@pytest.mark.full
def test_commands_say_in_one_line_where_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("first.py").write_text(FIRST.replace("xp.sign", "xp.sgn"))
    Path("second.py").write_text(FIRST.replace("state_type = S", "pass"))
    Path("third.py").write_text("class M(:\n")
    place = "first:M failed: AttributeError: module 'array_api_compat.numpy' has no attribute 'sgn' (first.py, line 20)"
    for name, message in (("first", place), ("second", "second:M needs state_type"), ("third", "third.py, line 1")):
        for command in (
            ("compare", "--problem", "matrix-regression", "--steps", "2", "--methods"),
            ("regret", "--rounds", "5", "--method"),
        ):
            ran = program(*command, f"{name}:M")
            assert (ran.returncode, ran.stderr.count("\n")) == (2, 1), ran.stderr
            assert message in ran.stderr


# ---- a method in a file of its own ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("theirs")
@pytest.mark.full
def test_the_commands_take_it() -> None:
    text = "theirs:Half(beta=0.25)"
    ran = program("compare", "--problem", "quadratic", "--steps", "4", "--methods", f"SGD,{text},theirs:Half.quarter",
                  "--lr", "theirs:half=0.125", "--json", "all.json", "--output", "all.svg")  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    results = {run["method"]: run for run in json.loads(Path("all.json").read_text())["results"]}
    assert {name: (run["lr"], run["lr_source"]) for name, run in results.items()} == {
        "SGD": (rates.record()["quadratic"]["methods"]["SGD"]["lr"], "recorded"),
        text: (0.125, "given"),
        "theirs:Half.quarter": (rates.FALLBACK, "fallback"),
    }
    ran = program("compare", "--problem", "quadratic", "--tune", "--methods", f"SGD,{text}")
    assert (ran.returncode, ran.stderr) == (
        2,
        f"error: --tune is for methods of `precond-ref list`, without fields, got {text}\n",
    )
    ran = program("regret", "--method", text, "--rounds", "20", "--set", "power=3", "--json", "game.json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(Path("game.json").read_text())["method"] == "Half(beta=0.25, power=3)"
    assert Path("precond-ref-regret-theirs.Half.png").exists()
    ran = program("cost", "--preset", "gpt2", "--method", text, "--json")
    assert ran.returncode == 0, ran.stderr
    (cost,) = json.loads(ran.stdout)["methods"]
    assert (cost["name"], cost["state_bytes"]) == (text, 4 * json.loads(ran.stdout)["entries"])
    for command in (("compare", "--methods"), ("regret", "--method"), ("cost", "--preset", "gpt2", "--method")):
        for wrong, message in (("broken:Half", "importing broken failed"), ("theirs:helper", "must be a class made")):
            ran = program(*command, wrong)
            assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
            assert message in ran.stderr


@pytest.mark.usefixtures("theirs")
@pytest.mark.full
def test_check_says_which_fields_the_other_side_gave() -> None:
    for first, passed in (("theirs:Half", True), ("theirs:Half(beta=0.25)", False)):
        ran = program("check", first, "--against", "theirs:Half(beta=0.25)", "--examples", "2")
        assert ran.returncode == 0, ran.stderr
        assert (f"\n{first} is given what --against has in brackets: beta=0.25\n" in ran.stdout) is passed


@pytest.mark.usefixtures("theirs")
@pytest.mark.full
def test_check_runs_the_class_itself_and_has_no_vectors_for_it() -> None:
    """A class made from ASGO that does something else is not taken for ASGO."""
    ran = program("check", "theirs:Against", "--method", "asgo")
    assert ran.returncode == 1
    assert "WRONG: " in ran.stdout
    ran = program("check", "precond_ref:ASGO", "--method", "theirs:Half")
    assert (ran.returncode, ran.stderr) == (
        2,
        "error: there are no test vectors for theirs:Half: --method takes a name that `precond-ref list` prints\n",
    )
    ran = program("check", "precond_ref:ASGO", "--method", "ASGO(every=3)")
    assert "no test vectors for ASGO(every=3)" in ran.stderr


@pytest.mark.usefixtures("theirs")
def test_no_bound_is_claimed_for_it() -> None:
    from precond_ref import regret

    class Mine(pr.SAdaGrad):
        """Its step may be anything."""

    assert regret.bound_of(pr.SAdaGrad(size=2), 1) is not None
    assert regret.bound_of(Mine(size=2), 1) is None


def check_groups() -> None:
    """In a group by name, by text and by object; through a file; in what is printed."""
    half = registry.load("theirs:Half")
    results = []
    for given in (
        {"method": "theirs:Half", "beta": 0.25},
        {"method": "theirs:Half(beta=0.25)"},
        {"method": half(beta=0.25)},
    ):
        param = torch.nn.Parameter(torch.ones(3, 2))
        opt = pt.ASGO([{"params": [param], **given}], lr=0.5)
        assert opt.param_groups[0]["method"] == "theirs:Half"
        assert "  theirs:Half  " in opt.describe()
        for _ in range(2):
            param.grad = torch.full((3, 2), 0.5)
            opt.step()
        results.append(param)
        torch.save(opt.state_dict(), "state.pt")
    for param in results:
        assert torch.equal(param, torch.full((3, 2), 1 - 0.5 * 0.25 - 0.5 * 0.3125))
    saved = torch.load("state.pt")
    opt.load_state_dict(saved)
    with pytest.raises(ValueError, match="loaded state dict is of theirs:Half, this group runs SGD"):
        pt.SGD([torch.nn.Parameter(torch.ones(3, 2))]).load_state_dict(saved)
    with pytest.raises(ValueError, match="theirs:Half has no field gamma|Half has no field gamma"):
        pt.ASGO([{"params": [param], "method": "theirs:Half(gamma=1)"}])


@pytest.mark.usefixtures("theirs")
def test_groups_and_checkpoints_of_pytorch() -> None:
    check_groups()


def check_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name in a file is compared, and looked up among the classes there are; presets have old names, too."""
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    param = torch.nn.Parameter(torch.ones(3, 2))
    opt = pt.ASGO.theory([param], lr=0.5)
    param.grad = torch.ones(3, 2)
    opt.step()
    saved = opt.state_dict()
    assert saved["param_groups"][0]["method"] == "ASGO.theory"
    for name in ("trap:Method", "trap:Half(beta=0.5)"):
        wrong = {**saved, "param_groups": [{**saved["param_groups"][0], "method": name}]}
        with pytest.raises(ValueError, match="loaded state dict is of trap"):
            opt.load_state_dict(wrong)
        wrong = {**saved, "param_groups": [{**saved["param_groups"][0], "fallback": {"method": name}}]}
        with pytest.raises(ValueError, match="no method is called trap.*; import trap first"):
            opt.load_state_dict(wrong)
    old = {**saved, "param_groups": [{**saved["param_groups"][0], "method": "ASGOTheory"}]}
    opt.load_state_dict(old)
    assert opt.param_groups[0]["method"] == "ASGO.theory"
    opt.step()
    opt = pt.SGD([{"params": [param], "method": "ASGOTheory"}])
    assert opt.param_groups[0]["method"] == "ASGO.theory"


def test_loading_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_loading(tmp_path, monkeypatch)


def test_the_check_of_loading_catches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "current", lambda name: parse(name).name)
    with pytest.raises(ImportError):
        check_loading(tmp_path, monkeypatch)
    monkeypatch.setattr(states, "current", lambda name: name)
    with pytest.raises(ValueError, match="is of ASGOTheory, this group runs ASGO.theory"):
        check_loading(tmp_path, monkeypatch)


def check_defined_again() -> None:
    """As in a notebook: the new class runs, and a method of the old one is refused."""

    def made(factor: float) -> Any:
        class Again(pr.SGD):
            def step(self, grad: Any, state: Any, param: Any, now: Any) -> Any:
                direction, state = super().step(grad, state, param, now)
                return factor * direction, state

        return Again()

    moved = []
    for factor in (1.0, 2.0):
        method = made(factor)
        param = torch.nn.Parameter(torch.zeros(2))
        opt = pt.Optimizer([param], method, lr=0.5)
        param.grad = torch.ones(2)
        opt.step()
        moved.append(float(param.detach()[0]))
    assert moved == [-0.5, -1.0]
    made(3.0)
    with pytest.raises(ValueError, match="Again was defined again since .*Again.* was made: make that anew"):
        pt.Optimizer([param], method)


def test_a_class_that_was_defined_again() -> None:
    check_defined_again()


def _by_name(cls: Any, values: Any, types: Any, known: dict[Any, Any] = {}) -> Any:  # noqa: B006
    """A cache that knows classes by their names."""
    return known.setdefault((cls.name, values), cls(**dict(zip(cls.symbols, values, strict=True))))


def test_the_check_of_a_class_defined_again_catches(monkeypatch: pytest.MonkeyPatch) -> None:
    fields, encode = dataclasses.fields, states.encode
    monkeypatch.setattr(
        states, "encode", lambda m: {"method": m.name, **{f.name: getattr(m, f.name) for f in fields(m)}}
    )
    with pytest.raises(pytest.fail.Exception):
        check_defined_again()
    monkeypatch.setattr(states, "encode", encode)
    monkeypatch.setattr(optimizer, "_cached", _by_name)
    with pytest.raises(AssertionError):
        check_defined_again()


@pytest.mark.usefixtures("theirs")
def test_optax() -> None:
    import jax.numpy as jnp

    made = parse("theirs:Half(beta=0.25)").made()
    transformation = precond_ref_jax.scale_by(made)
    grads = {"w": jnp.full((3, 2), 0.5)}
    state = transformation.init(grads)
    for _ in range(2):
        updates, state = transformation.update(grads, state, grads)
    np.testing.assert_array_equal(updates["w"], np.full((3, 2), 0.3125, np.float32))
