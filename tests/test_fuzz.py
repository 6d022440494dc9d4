"""The fuzz finds nothing in this tree, and each of its checks finds the bug that is planted for it."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import precond_ref_torch  # noqa: E402

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import fuzz  # noqa: E402
import fuzz_torch  # noqa: E402
from fuzz import Case, Step, violations  # noqa: E402
from fuzz_torch import Group, OptimizerCase  # noqa: E402

Change = Callable[..., Any]


def checks(case: Any) -> set[str]:
    return {found.check for found in violations(case)}


def plant(monkeypatch: pytest.MonkeyPatch, name: str, change: Change, function: str = "update") -> None:
    """Method ``name`` with ``function`` replaced by ``change(self, original, *arguments, **options)``."""
    base = fuzz.MAKERS[name]

    def planted(self: Any, *given: Any, **options: Any) -> Any:
        return change(self, getattr(super(cls, self), function), *given, **options)

    cls = type(name, (base,), {function: planted})
    monkeypatch.setitem(fuzz.MAKERS, name, cls)


@pytest.mark.full
def test_a_small_run_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--updates", "4000", "--jobs", "1"]) == 0, capsys.readouterr().out


# ---- the core's checks ----------------------------------------------------------------------------------------------


def impure(self: Any, update: Change, grad: Any, *rest: Any, **options: Any) -> Any:
    result = update(grad, *rest, **options)
    grad += 1
    return result


def impure_state(self: Any, update: Change, grad: Any, state: Any, *rest: Any, **options: Any) -> Any:
    result = update(grad, state, *rest, **options)
    state.v[...] = 2
    return result


def lent(self: Any, update: Change, grad: Any, *rest: Any, **options: Any) -> Any:
    _, state = update(grad, *rest, **options)
    return grad, state


def lent_state(self: Any, update: Change, *given: Any, **options: Any) -> Any:
    direction, state = update(*given, **options)
    return direction, state._replace(v=direction)


def narrow(self: Any, update: Change, *given: Any, **options: Any) -> Any:
    direction, state = update(*given, **options)
    return direction.astype("float32"), state


def uncounted(self: Any, update: Change, grad: Any, state: Any, *rest: Any, **options: Any) -> Any:
    direction, new = update(grad, state, *rest, **options)
    return direction, new._replace(step=state.step)


def mixed(self: Any, update: Change, *given: Any, **options: Any) -> Any:
    direction, state = update(*given, **options)
    return direction + 1e-9 * direction[:1, ...], state


def without_scalars(self: Any, update: Change, *given: Any, scalars: Any = None, **options: Any) -> Any:
    k = scalars and scalars._replace(inverse_c1=1.0)
    return update(*given, scalars=k, **options)


def only_numpy(self: Any, update: Change, grad: Any, *rest: Any, **options: Any) -> Any:
    direction, state = update(grad, *rest, **options)
    return direction * (1 + 1e-9 * isinstance(grad, np.ndarray)), state


def warns(self: Any, update: Change, *given: Any, **options: Any) -> Any:
    warnings.warn("slow", UserWarning, stacklevel=1)
    return update(*given, **options)


def divides(self: Any, update: Change, grad: Any, *rest: Any, **options: Any) -> Any:
    direction, state = update(grad, *rest, **options)
    return np.where(grad == 0, direction, direction * grad / grad), state


def raises_at_nan(self: Any, update: Change, grad: Any, *rest: Any, **options: Any) -> Any:
    if not np.isfinite(grad).all():
        raise np.linalg.LinAlgError("did not converge")
    return update(grad, *rest, **options)


def swallows(self: Any, update: Change, *given: Any, **options: Any) -> Any:
    direction, state = update(*given, **options)
    return np.where(np.isfinite(direction), direction, 0.0), state


def spreads(self: Any, update: Change, grad: Any, *rest: Any, **options: Any) -> Any:
    direction, state = update(grad, *rest, **options)
    return direction + 0 * np.sum(grad), state


def unseen(self: Any, diagnose: Change, state: Any) -> Any:
    return diagnose(state)._replace(finite=np.asarray(True))


def no_answer(self: Any, update: Change, *given: Any, **options: Any) -> Any:
    direction, state = update(*given, **options)
    return direction / 0.0, state


def long_with_eps(self: Any, update: Change, *given: Any, **options: Any) -> Any:
    direction, state = update(*given, **options)
    return direction if self.eps == 0 else 10 * direction, state


def takes_anything(self: Any, update: Change, grad: Any, state: Any, param: Any, **options: Any) -> Any:
    if getattr(grad, "dtype", None) != param.dtype:
        return np.zeros(param.shape), state
    return update(grad, state, param, **options)


def wrong_error(self: Any, update: Change, grad: Any, state: Any, param: Any, **options: Any) -> Any:
    if type(state) is not self.state_type:
        raise KeyError("state")
    return update(grad, state, param, **options)


def no_message(self: Any, update: Change, *given: Any, **options: Any) -> Any:
    try:
        return update(*given, **options)
    except ValueError:
        raise ValueError from None


def changes_then_refuses(self: Any, update: Change, grad: Any, state: Any, param: Any, **options: Any) -> Any:
    try:
        return update(grad, state, param, **options)
    except TypeError:
        param += 1
        raise


def half_mixed(self: Any, update: Change, *given: Any, **options: Any) -> Any:
    direction, state = update(*given, **options)
    return direction + 0.5 * direction[:1, ...], state


def half_as_long_on_torch(self: Any, update: Change, grad: Any, *rest: Any, **options: Any) -> Any:
    direction, state = update(grad, *rest, **options)
    return direction if is_numpy(grad) else 0.5 * direction, state


FEW = tuple(Step(seed=seed) for seed in range(3))
MANY = tuple(Step(seed=4 * seed) for seed in range(60))  # a multiple of 4 has a bad call
NAN = (Step(), Step(bad=(1, "nan")))
PLANTED: list[tuple[str, Change, Case]] = [
    ("purity", impure, Case("Adam", steps=FEW)),
    ("purity", impure_state, Case("Adam", steps=FEW)),
    ("purity", lent, Case("Adam", steps=FEW)),
    ("purity", lent_state, Case("Adam", steps=FEW)),
    ("kind", narrow, Case("Adam", steps=FEW)),
    ("kind", uncounted, Case("Adam", steps=FEW)),
    ("stack", mixed, Case("ASGO", stack=(3,), steps=FEW)),
    ("stack", mixed, Case("SGD", stack=(2, 2), steps=FEW)),
    ("stack", without_scalars, Case("Adam", stack=(2,), steps=FEW)),
    ("stack", half_mixed, Case("Muon", {"compute_dtype": "bfloat16"}, stack=(3,), steps=FEW)),
    ("stack", half_mixed, Case("NorMuon", {"compute_dtype": "bfloat16"}, stack=(3,), library="torch", steps=FEW)),
    ("library", half_as_long_on_torch, Case("Muon", {"compute_dtype": "bfloat16"}, steps=FEW)),
    ("library", half_as_long_on_torch, Case("Muon", {"compute_dtype": "bfloat16", "root": "svd"}, steps=FEW)),
    ("library", only_numpy, Case("Shampoo", {"eps": 0.5}, steps=FEW)),
    ("raises", warns, Case("Adam")),
    ("raises", divides, Case("Adam", steps=(Step("sparse"),))),
    ("raises", raises_at_nan, Case("Muon", stack=(2,), steps=NAN)),
    ("nonfinite", swallows, Case("Adam", stack=(2,), steps=NAN)),
    ("nonfinite", swallows, Case("Muon", stack=(2,), steps=NAN)),
    ("nonfinite", spreads, Case("Muon", stack=(2,), steps=NAN)),
    ("nonfinite", no_answer, Case("Muon")),
    ("eps", long_with_eps, Case("FullAdaGrad", {"eps": 0.25})),
    ("refusal", takes_anything, Case("Adam", steps=MANY)),
    ("refusal", wrong_error, Case("Adam", steps=MANY)),
    ("refusal", no_message, Case("Adam", steps=MANY)),
    ("refusal", changes_then_refuses, Case("Adam", steps=MANY)),
]


@pytest.mark.parametrize(("check", "bug", "case"), PLANTED, ids=[f"{c}-{b.__name__}-{k.make}" for c, b, k in PLANTED])
def test_a_planted_bug_is_found(check: str, bug: Change, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with np.errstate(all="ignore"):
        assert not checks(case)
        plant(monkeypatch, case.make, bug)
        assert check in checks(case)


def test_a_diagnosis_that_sees_no_nan_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("Adam", stack=(2,), steps=NAN)
    plant(monkeypatch, "Adam", unseen, "diagnose")
    assert checks(case) == {"nonfinite"}


def test_conditioning_explains_what_it_should_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A singular value at the edge of the rank decision may be kept or not; a well-conditioned one may not."""

    def perturbed(self: Any, update: Change, grad: Any, *rest: Any, **options: Any) -> Any:
        noise = 1 + 4e-16 * isinstance(grad, np.ndarray) * (np.arange(grad.shape[-1]) - 1.0)
        return update(grad * noise if isinstance(grad, np.ndarray) else grad, *rest, **options)

    plant(monkeypatch, "Shampoo", perturbed)
    assert "library" not in checks(Case("Shampoo", {"eps": 0.0}, (6, 6), steps=(Step("ill-conditioned"),)))
    gram = {"merge": 2, "solver": "gram64"}  # whose vectors are off by u (s_1 / s_i)^2; it computes with infinities
    assert not checks(Case("SShampoo.practical", gram, (4, 2), steps=(Step("ill-conditioned"),)))

    def scaled(self: Any, update: Change, grad: Any, *rest: Any, **options: Any) -> Any:
        direction, state = update(grad, *rest, **options)
        return direction * (1 + 1e-11 * isinstance(grad, np.ndarray)), state

    plant(monkeypatch, "Muon", scaled)
    assert "library" in checks(Case("Muon", {"root": "svd"}, (6, 6)))


def nan_at_large(self: Any, update: Change, grad: Any, *rest: Any, **options: Any) -> Any:
    direction, state = update(grad, *rest, **options)
    return np.where(np.max(np.abs(grad)) > 1e5, math.nan, direction) if is_numpy(grad) else direction, state


def is_numpy(value: Any) -> bool:
    return isinstance(value, np.ndarray)


BAD_THEN_GOOD = (Step(bad=(1, "-inf")), Step())
INDEFINITE = (Step(), Step("ill-conditioned", 6e15, 817510))


def test_a_singular_factor_may_be_definite_in_its_stack_alone() -> None:
    fields = {"beta2": 1.0, "damping": 2.18e-08, "batch_size": 0.9956}
    steps = (Step("ill-conditioned", seed=505318),)
    assert not checks(Case("RFShampoo", fields, (4, 7), (2,), "float32", "torch", steps))


@pytest.mark.parametrize(
    ("check", "bug", "case"),
    [
        ("nonfinite", spreads, Case("ASGO", shape=(1, 4), stack=(3,), steps=(Step(seed=566327, bad=(0, "inf")),))),
        ("library", only_numpy, Case("RMSProp", shape=(4,), steps=BAD_THEN_GOOD)),
        ("library", nan_at_large, Case("RFShampoo", shape=(3,), stack=(2,), steps=(Step(), Step("constant", 1e6)))),
    ],
    ids=["memory order", "an infinite average", "an indefinite factor"],
)
def test_what_is_explained_hides_no_bug(check: str, bug: Change, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    explained = case.but(steps=INDEFINITE) if case.make == "RFShampoo" else case
    assert not checks(explained)
    plant(monkeypatch, case.make, bug)
    assert check in checks(case)


def test_a_bad_gradient_keeps_the_order_of_axes_in_memory() -> None:
    case = Case("ASGO", shape=(3, 4), stack=(2,), steps=(Step(seed=1, bad=(0, "inf")),))
    clean = fuzz.gradient(case, case.steps[0], None)
    spoiled, where = fuzz.Runner(case).spoiled(clean, case.steps[0])
    assert clean.flags.f_contiguous
    assert spoiled.strides == clean.strides
    assert (spoiled == clean).tolist() == (~where).tolist()


# ---- the optimizers' checks -----------------------------------------------------------------------------------------

Optimizer = precond_ref_torch.Optimizer


def accepts(self: Any, original: Change, *given: Any, **options: Any) -> Any:
    try:
        return original(self, *given, **options)
    except (ValueError, TypeError):
        return None


def moves_first(self: Any, original: Change, *given: Any, **options: Any) -> Any:
    with torch.no_grad():
        for group in self.param_groups:
            for p in group["params"]:
                p += 1
    return original(self, *given, **options)


def forgets(self: Any, original: Change, saved: Any) -> Any:
    original(self, saved)
    for entry in self.state.values():
        for value in entry.values():
            value += 1


def key_error(self: Any, original: Change, saved: Any) -> Any:
    try:
        original(self, saved)
    except ValueError as error:
        raise KeyError(str(error)) from None


def half_loaded(self: Any, original: Change, saved: Any) -> Any:
    try:
        original(self, saved)
    except ValueError:
        self.state.clear()
        raise


def views(self: Any, original: Change) -> Any:
    saved = original(self)
    for entry in saved["state"].values():
        for name, value in entry.items():
            entry[name] = torch.zeros((8, *value.shape), dtype=value.dtype)[0]
    return saved


def another_default(self: Any, original: Change, group: Any) -> Any:
    named = isinstance(group.get("method"), str)
    original(self, group)
    if named:
        self.param_groups[-1]["lr"] = 1.0


WRONG: list[tuple[str, str, Change]] = [
    ("refused", "step", accepts),
    ("refused", "step", moves_first),
    ("torn", "step", moves_first),
    ("resume", "load_state_dict", forgets),
    ("mutated", "load_state_dict", key_error),
    ("mutated", "load_state_dict", half_loaded),
    ("bytes", "state_dict", views),
    ("names", "add_param_group", another_default),
]


@pytest.mark.parametrize(("check", "function", "bug"), WRONG, ids=[f"{c}-{b.__name__}" for c, _, b in WRONG])
def test_a_planted_bug_of_the_optimizer_is_found(
    check: str, function: str, bug: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = (Group(((64, 64),)),) if check == "bytes" else (Group(((3, 2), (4,))), Group())
    cases = [OptimizerCase(check, groups=groups, seed=seed) for seed in range(12)]
    before = sum(len(violations(case)) for case in cases)
    original = getattr(Optimizer, function)
    monkeypatch.setattr(Optimizer, function, lambda self, *given, **options: bug(self, original, *given, **options))
    assert sum(len(violations(case)) for case in cases) > before


def not_finite(self: Any, original: Change, saved: Any) -> Any:
    original(self, saved)
    warnings.warn("loaded state dict has values that are not finite: all", UserWarning, stacklevel=1)


def test_an_optimizer_may_say_what_is_so(monkeypatch: pytest.MonkeyPatch) -> None:
    diverges = {"side": "right", "root": "polar_express", "root_steps": 40, "every": 8}
    infinite, finite = (OptimizerCase("resume", "ASGO", f, (Group(((2, 4),)),)) for f in (diverges, {}))
    inherits = OptimizerCase("names", "RFShampoo", {"weight_decay": 1.0}, seed=2)  # a group named RFShampoo
    compiles = OptimizerCase("mutated", groups=(Group(((),)), Group(((5,),))), seed=194322)  # compile = another
    assert not [found for case in (infinite, finite, inherits, compiles) for found in violations(case)]
    original = Optimizer.load_state_dict
    monkeypatch.setattr(Optimizer, "load_state_dict", lambda self, saved: not_finite(self, original, saved))
    assert checks(finite) == {"resume"}


def test_a_group_with_another_weight_decay_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets_decay(self: Any, group: Any) -> None:
        own = {"weight_decay": 0.0} if isinstance(group.get("method"), str) else {}
        original(self, {**group, **own})

    original = Optimizer.add_param_group
    monkeypatch.setattr(Optimizer, "add_param_group", forgets_decay)
    assert checks(OptimizerCase("names", "RFShampoo", {"weight_decay": 1.0}, seed=2)) == {"names"}


# ---- what is drawn, shrunk and printed ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", fuzz.MAKERS)
def test_every_field_takes_several_values(name: str) -> None:
    drawn = [fuzz.built(name, fuzz.draw_fields(np.random.default_rng(seed), name)) for seed in range(60)]
    fields = {field.name for field in dataclasses.fields(drawn[0])}
    if not isinstance(fuzz.MAKERS[name], type):  # a preset: what it takes, the rest it decides
        fields &= VARIED.get(name, {*inspect.signature(fuzz.MAKERS[name]).parameters})
    for field in fields:
        assert len({getattr(method, field) for method in drawn}) > 1, field


VARIED = {"MBF.authors_code": {"damping", "statistics_every", "inverse_every"}}
"""Fields that a preset varies under other names."""


def test_everything_is_drawn() -> None:
    cases = [fuzz.drawn(0, number, list(fuzz.MAKERS), ["numpy", "torch"]) for number in range(700)]
    core = [case for case in cases if isinstance(case, Case)]
    assert {case.make for case in core} == set(fuzz.MAKERS)
    assert {(case.dtype, case.library) for case in core} == {(d, x) for d in ("float32", "float64") for x in fuzz.XP}
    steps = [step for case in core for step in case.steps]
    assert {step.kind for step in steps} == set(fuzz.KINDS)
    assert {step.bad[1] for step in steps if step.bad} == {"nan", "inf", "-inf"}
    assert {step.refresh for step in steps} >= {None, True, False, (True, False), (False, True)}
    assert {len(case.stack) for case in core} == {0, 1, 2}
    assert {len(case.shape) for case in core} == {0, 1, 2, 3, 4}
    assert any(0 in case.shape for case in core)
    scales = [math.log10(step.scale) for step in steps]
    assert min(scales) < -28
    assert max(scales) > 28
    assert {case.action for case in cases if isinstance(case, OptimizerCase)} == set(fuzz_torch.ACTIONS)
    for case in core[:200]:
        for step in case.steps:
            assert np.isfinite(fuzz.gradient(case, step, None)).all()
    for case in cases[:200]:
        assert eval(repr(case), {**vars(fuzz_torch), **vars(fuzz)}) == case


def test_a_violation_is_made_small_printed_and_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, "SGD", lent)
    assert fuzz.main(["--updates", "200", "--jobs", "1", "--method", "SGD", "--namespace", "numpy"]) == 1
    printed = capsys.readouterr().out
    assert "1 violations" in printed
    assert "purity, SGD: in " in printed
    lines = [line.strip() for line in printed.splitlines() if line.startswith("  ")]
    assert lines[0] == "from fuzz import *"
    case = eval(lines[1].removeprefix("violations"), vars(fuzz))
    assert len(repr(case)) < 60
    assert checks(case) == {"purity"}


def test_what_is_made_smaller_violates_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its kind, MBF refuses this shape; that is another violation."""
    plant(monkeypatch, "MBF", warns)
    case, found = fuzz.shrunk(Case("MBF", {"kind": "conv"}, (2, 1, 2, 1), dtype="float32"), ("raises", "MBF"))
    assert found.text.endswith("UserWarning: slow")
    assert case.fields == {"kind": "conv"}
    assert case.shape == (1, 1, 1, 1)


def test_a_violation_that_needs_what_ran_before_is_told() -> None:
    case, found = fuzz.shrunk(Case("SGD"), ("raises", "SGD"))
    assert case == Case("SGD")
    assert found == ("raises", "not violated alone: what ran before it in the process matters")


def test_learning_rates_have_their_squares_in_float32() -> None:
    rates = [fuzz.draw_fields(np.random.default_rng(seed), "FDSON")["learning_rate"] for seed in range(200)]
    assert 1e-15 <= min(rates) < 1e-11
    assert 1e3 < max(rates) <= 1e15


def test_what_the_command_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        fuzz.main(["--method", "Adamm"])
    assert "no method is called Adamm; there are Adafactor, " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        fuzz.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"\n  {check} " in printed for check in {c for c, *_ in PLANTED} | set(fuzz_torch.ACTIONS))


def test_seconds_end_a_run() -> None:
    assert fuzz.campaign(0, 10**9, 0.01, ["SGD"], ["numpy"], 1).cases == 25


@pytest.mark.deep
def test_two_processes_find_what_one_finds() -> None:
    def run(jobs: int) -> fuzz.Work:
        return fuzz.campaign(0, 500, math.inf, ["Adam", "SGD"], ["numpy"], jobs)

    one, two = run(1), run(2)
    assert one.found == two.found == {}
    assert two.updates >= 500
