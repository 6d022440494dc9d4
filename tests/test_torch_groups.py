"""Parameter groups of the PyTorch adapter: methods by name, PyTorch's flags, what is changed between steps."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from configs import DecayedState
from torch import nn
from torch_adapter_cases import ONE_EACH, feed, forced, parameters, recorded, through_file

import precond_ref as pr
import precond_ref_torch as pt
from precond_ref.registry import constructors
from precond_ref_torch import optimizer, states

torch.set_num_threads(1)
ASKED = {"size": 2, "delta": 0.25, "learning_rate": 0.5}
"""Values of fields that have no default."""
SHAPE = (4, 3)


# ---- methods by name ------------------------------------------------------------------------------------------------


def check_named() -> None:
    """Every name that is listed, in a group of optimizers for other methods: that method, as if it had been given."""
    for name, make in constructors().items():
        shape = ONE_EACH[name.partition(".")[0]].shape
        asked = {key: ASKED[key] for key in inspect.signature(make).parameters if key in ASKED}
        made: Any = make(**asked)
        start, grads = recorded([shape], 2, torch.float32)
        expected = parameters(start)
        feed(pt.Optimizer(expected, **forced(made, lr=0.5)), expected, grads)
        for outer in (pt.ASGO, pt.FullAdaGrad, pt.SShampoo.practical):
            params = parameters(start)
            given = {"params": params, "method": name, "fallback": made, **asked}
            before = dict(given)
            opt = outer([given], lr=0.5)
            assert given == before
            (group,) = opt.param_groups
            assert {"method": group["method"]} | {f.name: group[f.name] for f in dataclasses.fields(made)} == (
                states.encode(made)
            )
            assert opt.describe().endswith(f"\ngroup 0: {made.for_shape(shape) or made!r}")
            feed(opt, params, grads)
            assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


def _outer_defaults(name: str, given: Any) -> Any:
    """What was done before: the name, and whatever fields the other method has."""
    return {"method": states.class_of(name).name}, set()


def _fields_ignored(name: str, given: Any) -> Any:
    return NAMED(name, {key: value for key, value in given.items() if key in ASKED})


NAMED, RATES = states.named, optimizer._check_rates


def test_methods_by_name() -> None:
    check_named()


def test_fields_of_the_group_count() -> None:
    check_fields()


def check_fields() -> None:
    """Fields and arguments of presets that the group gives; the rest is the method's, rates are the optimizer's."""
    opt = pt.ASGO(
        [
            {"params": [weight()], "method": "Adam", "beta2": 0.5},
            {"params": [weight()], "method": "MBF.authors_code", "network": "cnn", "momentum": 0.25},
            {"params": [weight()], "method": "SShampoo.practical", "size": 2, "weight_decay": 0.5},
            {"params": [weight()], "method": "SShampoo.practical", "size": 3},
            {"params": [weight()], "method": "ASGO.theory", "side": "right"},
        ],
        beta2=0.25,
        weight_decay=0.125,
    )
    opt.add_param_group({"params": [weight()], "method": "AGD", "delta": 0.5, "lr": 0.75})
    adam, mbf, decayed, plain, theory, agd = [optimizer._method(group) for group in opt.param_groups]
    assert adam == pr.Adam(beta2=0.5)
    assert mbf == pr.MBF.authors_code("cnn").replace(momentum=0.25)
    assert "network" not in opt.param_groups[1]
    assert decayed == pr.SShampoo.practical(size=2, weight_decay=0.5)
    assert plain == pr.SShampoo.practical(size=3, weight_decay=0.125)
    assert theory == pr.ASGO.theory(side="right")
    assert agd == pr.AGD(delta=0.5)
    assert [group["weight_decay"] for group in opt.param_groups] == [0.125, 0.125, 0.5, 0.125, 0.125, 0.125]
    assert opt.param_groups[5]["lr"] == 0.75


@pytest.mark.parametrize("mistake", [_outer_defaults, _fields_ignored])
def test_checks_of_names_catch(mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "named", mistake)
    with pytest.raises((AssertionError, KeyError, ValueError)):
        check_fields()
    if mistake is _outer_defaults:
        with pytest.raises((AssertionError, ValueError)):
            check_named()


def test_a_checkpoint_of_methods_by_name() -> None:
    """Loaded into groups that name them, or have them; refused by a group with another preset of the class."""
    start, grads = recorded([SHAPE, SHAPE], 4)
    params = parameters(start)
    opt = pt.ASGO(named_groups(params))
    feed(opt, params, grads[:2])
    saved = through_file(opt.state_dict())
    again = parameters([p.detach() for p in params])
    other = pt.AGD([{"params": again[0], "method": pr.MBF()}, {"params": again[1], "method": "ASGO.theory"}])
    other.load_state_dict(saved)
    feed(opt, params, grads[2:])
    feed(other, again, grads[2:])
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))
    copied = pt.DASGO(copy.deepcopy(opt.param_groups))  # groups of another optimizer, class names and all
    assert copied.describe() == opt.describe()
    with pytest.raises(ValueError, match="loaded state dict is of ASGO.theory, this group runs ASGO"):
        pt.AGD([{"params": again[0], "method": "MBF"}, {"params": again[1], "method": "ASGO"}]).load_state_dict(saved)


def named_groups(params: Any) -> Any:
    return [{"params": params[0], "method": "MBF.authors_code"}, {"params": params[1], "method": "ASGO.theory"}]


def weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(SHAPE))


class Clashing(pr.Method):
    """A method whose field is called like an argument of the optimizer."""

    lr: float = 0.5
    state_type = DecayedState
    elementwise = True


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        (
            {"method": "Adamm"},
            ValueError,
            "no method is called Adamm; there are Adafactor, .*SShampoo.prac",
        ),
        ({"method": "ASGO.practice"}, ValueError, "no method is called ASGO.practice; there are"),
        ({"method": 3}, TypeError, "method must be a precond_ref.Method or the name of one, got 3"),
        ({"method": None}, TypeError, "method must be a precond_ref.Method or the name of one, got None"),
        ({"method": ["Adam"]}, TypeError, "method must be a precond_ref.Method or the name of one"),
        ({"method": "SAdaGrad"}, TypeError, "missing 1 required keyword-only argument: 'size'"),
        ({"method": "Adam", "every": 5}, ValueError, "Adam has no field every; it has amsgrad, beta1, beta2, .*eps,"),
        ({"method": "Adam", "delta": 5}, ValueError, "Adam has no field delta; it has amsgrad, beta1, beta2, .*eps,"),
        ({"method": pr.SGD(), "beta1": 0.5}, ValueError, "SGD has no field beta1; it has momentum, nesterov"),
        ({"delta": 0.5}, ValueError, "ASGO has no field delta; it has "),
        ({"method": "Adam", "beta1": 2.0}, ValueError, "Invalid beta parameter at index 0: 2.0"),
        ({"method": "Adam", "eps": torch.tensor(1j)}, TypeError, "Invalid epsilon value: .*must be a real number"),
        ({"method": "Adam", "eps": 2**70}, ValueError, "Invalid epsilon value: 1180591620717411303424"),
        ({"method": Clashing()}, ValueError, "Clashing has fields that this adapter names itself: lr"),
        (
            {"method": "test_torch_groups:Clashing"},
            ValueError,
            "Clashing has fields that this adapter names itself: lr",
        ),
        ({"compile": "no such backend"}, ValueError, "Invalid compile value: no such backend"),
        ({"lr": None}, ValueError, "Invalid learning rate: None"),
        ({"lr": "0.1"}, ValueError, "Invalid learning rate: 0.1"),
    ],
)
def test_refused_groups(group: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pt.ASGO([{"params": [weight()], **group}])
    opt = pt.ASGO([weight()])
    with pytest.raises(error, match=message):
        opt.add_param_group({"params": [weight()], **group})
    assert len(opt.param_groups) == 1


# ---- flags of PyTorch's optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["foreach", "fused", "capturable", "differentiable"])
def test_flags_of_pytorch_s_optimizers(flag: str) -> None:
    makers: list[Callable[..., Any]] = [
        lambda **given: pt.AGD([weight()], **given),
        lambda **given: pt.ASGO.theory([weight()], **given),
        lambda **given: pt.Optimizer([weight()], pr.Adam(), **given),
        lambda **given: pt.Adam([{"params": [weight()], **given}]),
        lambda **given: pt.Adam([{"params": [weight()], "method": "AGD", **given}]),
    ]
    for make in makers:
        for value in (None, False):
            assert flag not in make(**{flag: value}).defaults or flag == "differentiable"  # PyTorch's own default
        for value in (True, 1, "yes"):
            with pytest.raises(ValueError, match=f"{flag} must be False or None, got {value!r}: [a-z ]+"):
                make(**{flag: value})
        saved = make().state_dict()
        saved["param_groups"][0][flag] = True
        with pytest.raises(ValueError, match=f"{flag} must be False or None"):
            make().load_state_dict(saved)
    assert flag not in inspect.signature(pt.AGD).parameters  # which code asks before it gives True
    with pytest.raises(TypeError, match="unexpected keyword argument 'fusedd'"):
        pt.Optimizer([weight()], pr.Adam(), fusedd=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'fusedd'"):
        pt.AGD([weight()], fusedd=False)


# ---- the default device ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_EACH)
def test_the_default_device_does_not_matter(name: str) -> None:
    """Under one that holds no values, whatever follows it shows."""
    config = ONE_EACH[name]
    start, grads = recorded([config.shape] * 2, 4)
    expected = parameters(start)
    feed(pt.Optimizer(expected, **forced(config.method, lr=0.125)), expected, grads)
    params = parameters(start)
    with torch.device("meta"):
        opt = pt.Optimizer(params, **forced(config.method, lr=0.125))
        feed(opt, params, grads[:2])
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        feed(opt, params, grads[2:])
    assert {value.device.type for entry in opt.state.values() for value in entry.values()} == {"cpu"}
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


# ---- what is changed between steps ----------------------------------------------------------------------------------


class Change(NamedTuple):
    """What is done to an optimizer's last group or its parameter after two steps, and the error of the third."""

    change: Callable[[Any, Any], Any]
    error: type[Exception]
    message: str
    make: Callable[[Any], Any] = pt.AGD


def put(**entries: Any) -> Callable[[Any, Any], Any]:
    return lambda opt, param: opt.param_groups[1].update(entries)


def lose(name: str) -> Callable[[Any, Any], Any]:
    return lambda opt, param: opt.param_groups[1].pop(name)


def reshape(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, Any], Any]:
    def change(opt: Any, param: Any) -> None:
        old, param.grad = param.grad, None
        new = torch.nn.Parameter(function(param.data))
        if new.is_meta:
            torch.utils.swap_tensors(param, new)
        else:
            param.data = new.data
        param.grad = function(old)

    return change


CHANGES = {
    "lr None": Change(put(lr=None), ValueError, "Invalid learning rate: None"),
    "lr NaN": Change(put(lr=float("nan")), ValueError, "Invalid learning rate: nan"),
    "lr inf": Change(put(lr=float("inf")), ValueError, "Invalid learning rate: inf"),
    "lr < 0": Change(put(lr=-0.5), ValueError, "Invalid learning rate: -0.5"),
    "lr text": Change(put(lr="0.5"), ValueError, "Invalid learning rate: 0.5"),
    "lr tensors": Change(put(lr=torch.ones(2)), ValueError, "Tensor lr must be 1-element"),
    "lr filled with NaN": Change(
        lambda opt, param: opt.param_groups[1]["lr"].fill_(torch.nan),
        ValueError,
        "Invalid learning rate: nan",
        lambda groups: pt.AGD(groups, lr=torch.tensor(0.5)),
    ),
    "weight_decay < 0": Change(put(weight_decay=-1), ValueError, "Invalid weight_decay value: -1"),
    "weight_decay None": Change(put(weight_decay=None), ValueError, "Invalid weight_decay value: None"),
    "maximize": Change(put(maximize="no"), TypeError, "Invalid maximize value: no"),
    "compile": Change(put(compile=3), TypeError, "Invalid compile value: 3"),
    "compile's backend": Change(put(compile="no such"), ValueError, "Invalid compile value: no such"),
    "engine": Change(put(engine="cuda"), ValueError, "Invalid engine: 'cuda'"),
    "join": Change(put(join=[("a", "b")]), ValueError, "join names a and b, which this group has no parameter of"),
    "fallback": Change(put(fallback="Adam"), TypeError, "fallback must be a precond_ref.Method or None"),
    "fallback's field": Change(put(fallback={"method": "Adam", "beta1": 0.5}), ValueError, "Adam needs beta2, eps"),
    "beta1": Change(put(beta1=2.0), ValueError, "Invalid beta parameter at index 0: 2.0"),
    "beta1 of lists": Change(put(beta1=[0.5]), TypeError, r"Invalid beta parameter at index 0: \[0.5\]"),
    "no beta1": Change(lose("beta1"), ValueError, "AGD needs beta1"),
    "no lr": Change(lose("lr"), ValueError, "parameter group 1 has lost its entry 'lr'"),
    "method": Change(put(method="Adam"), ValueError, "Adam needs eps"),
    "method unknown": Change(put(method="Adamm"), ValueError, "no method is called Adamm"),
    "method itself": Change(put(method=pr.Adam()), TypeError, "method must be a precond_ref.Method or the name of one"),
    "every": Change(put(every=2), ValueError, "Shampoo needs .roots.0.*its state has none", pt.Shampoo),
    "every 0": Change(put(every=0), ValueError, "Invalid every value: 0", pt.Shampoo),
    "amsgrad": Change(put(amsgrad=True), ValueError, "AGD needs 'b_max'"),
    "dtype": Change(reshape(lambda t: t.double()), ValueError, r"AGD needs 'm' of .*float64.*one of .*float32"),
    "dtype of a matrix": Change(reshape(lambda t: t.double()), ValueError, "ASGO needs 'm' of .*float64", pt.ASGO),
    "shape": Change(reshape(lambda t: t[:2].clone()), ValueError, r"AGD needs 'm' of shape \[2, 3\]"),
    "layout": Change(reshape(lambda t: t.T.contiguous()), ValueError, r"AGD needs 'm' of shape \[3, 4\]"),
    "device": Change(reshape(lambda t: t.to("meta")), ValueError, "on meta.*was changed; delete"),
    "no state": Change(lambda opt, param: opt.state[param].pop("m"), ValueError, "AGD needs 'm'.*its state has none"),
    "gradient": Change(
        lambda opt, param: setattr(param, "data", param.data[:2].clone()),
        ValueError,
        r"a parameter of size \[2, 3\] has a gradient of shape \[4, 3\]",
    ),
}  # fmt: skip


def check_change(case: Change) -> None:
    """An error, time and again, and no parameter, counter or state has changed."""
    start, grads = recorded([SHAPE] * 2, 3, torch.float32)
    params = parameters(start)
    opt = case.make([{"params": params[:1]}, {"params": params[1:]}])
    feed(opt, params, grads[:2])
    for p, g in zip(params, grads[2], strict=True):
        p.grad = g.clone()
    case.change(opt, params[1])
    before = copy.deepcopy([(p.detach(), opt.state[p]) for p in params])
    for _ in range(2):
        with pytest.raises(case.error, match=case.message):
            opt.step()
    for p, (value, entry) in zip(params, before, strict=True):
        assert p.is_meta or torch.equal(p.detach(), value)
        assert opt.state[p].keys() == entry.keys()
        assert all(torch.equal(opt.state[p][key], tensor) for key, tensor in entry.items())


@pytest.mark.parametrize("case", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_between_steps_is_checked(case: Change) -> None:
    check_change(case)


CHANGE_MISTAKES: dict[str, tuple[str, str, Any]] = {
    "rates not checked": ("lr NaN", "_check_rates", lambda group: None),
    "a tensor's rate checked once": (
        "lr filled with NaN",
        "_check_rates",
        lambda group: None if isinstance(group["lr"], torch.Tensor) else RATES(group),
    ),
    "states not checked": ("every", "_check_entry", lambda *given: None),
    "dtype not looked at": ("dtype", "LAYOUT", lambda param: None),
    "shape not looked at": ("shape", "LAYOUT", lambda param: (param.dtype, param.device)),
    "entries not looked at": ("maximize", "ENTRIES", lambda group: (None,) * 8),
}


@pytest.mark.parametrize(("case", "name", "mistake"), CHANGE_MISTAKES.values(), ids=CHANGE_MISTAKES)
def test_check_of_changes_catches(case: str, name: str, mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, name, mistake)
    with pytest.raises((AssertionError, pytest.fail.Exception, KeyError, RuntimeError)):
        check_change(CHANGES[case])


def test_an_unchanged_group_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steady state; a new rate costs the check of the rates alone."""
    start, grads = recorded([SHAPE] * 2, 6)
    params = parameters(start)
    opt = pt.AGD(params)
    feed(opt, params, grads[:1])
    calls: list[str] = []
    for name in ("_check_rates", "_check_entry", "_own_pairs", "_plain"):
        monkeypatch.setattr(optimizer, name, lambda *given, name=name: calls.append(name))
    feed(opt, params, grads[1:3])
    assert not calls
    opt.param_groups[0]["lr"] = 0.5
    feed(opt, params, grads[3:])
    assert calls == ["_check_rates"]


def test_what_may_be_changed_between_steps() -> None:
    """A precision that the statistics have already; a fallback as a method; fields that need no other state."""
    start, grads = recorded([SHAPE, (4,)], 6, torch.float32)
    params = parameters(start)
    opt = pt.ASGO(params, lr=0.5)
    feed(opt, params, grads[:2])
    for p in params:
        p.grad, p.data = None, p.data.bfloat16()
    feed(opt, params, [[g.bfloat16() for g in row] for row in grads[2:3]])
    assert params[0].dtype == torch.bfloat16
    assert opt.state[params[0]]["m"].dtype == torch.float32
    group = opt.param_groups[0]
    group["fallback"], group["maximize"], group["beta1"] = pr.Adam(beta1=0.5), True, 0.25
    feed(opt, params, [[g.bfloat16() for g in row] for row in grads[3:]])
    assert group["fallback"] == states.encode(pr.Adam(beta1=0.5))
    assert int(opt.state[params[1]]["step"]) == 6


def test_a_parameter_may_be_replaced_in_its_group() -> None:
    """By one of the same layout, which then moves like a new one; the old one stays."""
    start, grads = recorded([SHAPE], 2)
    first, second, alone = parameters(start), parameters(start), parameters(start)
    opt, other = pt.AGD(first, lr=0.5), pt.AGD(alone, lr=0.5)
    feed(opt, first, grads[:1])
    before = first[0].detach().clone()
    opt.param_groups[0]["params"][0] = second[0]
    feed(opt, second, grads[1:])
    feed(other, alone, grads[1:])
    assert torch.equal(first[0], before)
    assert torch.equal(second[0], alone[0])


def test_what_a_method_no_longer_keeps_does_not_come_back() -> None:
    """Roots from before every=1 would be used out of date once it is 2 again."""
    start, grads = recorded([SHAPE], 5)
    params = parameters(start)
    opt = pt.Shampoo(params, every=2, eps=0.25)
    feed(opt, params, grads[:1])
    opt.state[params[0]]["slow_buffer"] = torch.ones(2)
    opt.param_groups[0]["every"] = 1
    feed(opt, params, grads[1:3])
    assert list(opt.state[params[0]]) == ["step", "grams.0", "grams.1", "slow_buffer"]
    opt.param_groups[0]["every"] = 2
    with pytest.raises(ValueError, match="its state has none"):
        feed(opt, params, grads[3:4])
    del opt.state[params[0]]
    feed(opt, params, grads[3:])
    assert int(opt.state[params[0]]["step"]) == 2


def check_refused_steps() -> None:
    """A refused step makes no state, and loses nothing that a method kept; what is outdated goes with the next step."""
    start, grads = recorded([SHAPE], 4)

    def refused(opt: pt.Optimizer) -> None:
        with pytest.raises(ValueError, match="statistics has 1 keys"):
            opt.step(statistics={torch.ones(2): torch.ones(2)})

    params, same = parameters(start), parameters(start)
    opt, other = (pt.Shampoo(p, every=2, eps=0.25) for p in (params, same))
    params[0].grad = grads[0][0].clone()
    refused(opt)
    assert not opt.state
    feed(other, same, grads)
    feed(opt, params, grads[:2])
    kept = list(opt.state[params[0]])
    opt.param_groups[0]["every"] = 1
    refused(opt)
    assert sorted(opt.state[params[0]]) == sorted(kept)
    opt.param_groups[0]["every"] = 2
    feed(opt, params, grads[2:])
    assert torch.equal(params[0], same[0])
    opt.param_groups[0]["every"] = 1
    refused(opt)
    feed(opt, params, grads[:1])
    assert list(opt.state[params[0]]) == ["step", "grams.0", "grams.1"]


def test_refused_steps_change_no_state() -> None:
    check_refused_steps()


def test_the_check_catches_state_of_a_refused_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pt.Optimizer, "_unmake", lambda self, stepped: self._made.clear())
    with pytest.raises(AssertionError):
        check_refused_steps()


def test_fields_may_be_tensors() -> None:
    """Scalars of the step are made in the dtype of the arithmetic then, whatever else is updated."""
    start, grads = recorded([SHAPE], 3)
    for compiled in (False, "eager"):
        results = []
        for beta2 in (0.5, torch.tensor(0.5, dtype=torch.float64)):
            params = parameters(start)
            feed(pt.Adam(params, lr=0.5, beta2=beta2, compile=compiled), params, grads)
            results.append(params)
        assert torch.allclose(*(result[0] for result in results), rtol=1e-13, atol=0)


def test_true_is_no_one_also_after_one_was_met() -> None:
    opt = pt.Adam([weight()], eps=1.0)
    opt.param_groups[0]["params"][0].grad = torch.ones(SHAPE)
    opt.step()
    opt.param_groups[0]["eps"] = True
    with pytest.raises(TypeError, match="eps"):
        opt.step()
