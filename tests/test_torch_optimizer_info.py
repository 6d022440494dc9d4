"""The PyTorch adapter as PyTorch tests its own optimizers: an `OptimizerInfo` for each method, and what must hold.

`torch.testing._internal.common_optimizers` gives inputs, schedulers and errors; the checks are ours, after the names in
PyTorch's test/test_optim.py. Not for these optimizers: foreach, fused, capturable and differentiable (refused, see
test_torch_groups.py), complex and sparse parameters (refused), older state dicts (there are none), CUDA.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch_adapter_cases import through_file

import precond_ref_torch as pt
from precond_ref.registry import constructors
from precond_ref_torch import buckets, optimizer

torch.set_num_threads(1)
ASKED = {"size": 2, "delta": 0.25, "learning_rate": 0.5}
RATES = {"IFShampoo": 1e-4, "RFShampoo": 1e-4, "RFRMSProp": 1e-4, "RFAdamW": 1e-4}
"""Learning rates of methods whose step is not about as long as the rate."""


@pytest.fixture(scope="module")
def common() -> Any:
    """The private module, imported when it is needed: that takes seconds."""
    pytest.importorskip("expecttest", reason="torch.testing._internal imports it")
    from torch.testing._internal import common_optimizers

    return common_optimizers


class Info:
    """The `OptimizerInfo` of a class or preset, as arguments of its `make`."""

    def __init__(self, common: Any, name: str) -> None:
        method, _, preset = name.partition(".")
        self.cls = getattr(pt, method)
        self.make = getattr(self.cls, preset) if preset else self.cls
        own = inspect.signature(constructors()[name]).parameters
        asked = {key: value for key, value in ASKED.items() if key in own}
        rate = RATES.get(name, 1e-3)
        variants = (
            ("default", {}),
            ("Tensor lr", {"lr": torch.tensor(rate)}),
            ("weight_decay", {"weight_decay": 0.1}),
            ("maximize", {"maximize": True, "weight_decay": 0.1, "foreach": False, "fused": None}),
        )
        self.info = common.OptimizerInfo(
            self.cls,
            optim_inputs_func=lambda device, dtype=None: [
                common.OptimizerInput(None, {"lr": rate, **asked, **copy.deepcopy(extra)}, desc)
                for desc, extra in variants
            ],
            optim_error_inputs_func=common.get_error_inputs_for_all_optims,
            supported_impls=(),
            not_og_supported_flags=(),
            supports_complex=False,
        )
        self.asked = asked

    def inputs(self) -> list[dict[str, Any]]:
        return [each.kwargs for each in self.info.optim_inputs_func(device="cpu")]

    def default(self) -> dict[str, Any]:
        return self.inputs()[0]


QUICK = ("AGD", "ASGO.theory", "SShampoo.practical")


@pytest.fixture(params=[pytest.param(n, marks=[] if n in QUICK else [pytest.mark.deep]) for n in constructors()])
def info(request: pytest.FixtureRequest, common: Any) -> Info:
    torch.manual_seed(0)
    return Info(common, request.param)


class Problem:
    """PyTorch's: the squares of W x + b."""

    def __init__(self, contiguous: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.weight = nn.Parameter(draw(10, 5) if contiguous else draw(10, 5, 2)[..., 0])
        self.bias = nn.Parameter(draw(10) if contiguous else draw(10, 2)[..., 0])
        self.input = draw(5)

    @property
    def params(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return [("weight", self.weight), ("bias", self.bias)]

    def closure(self) -> torch.Tensor:
        self.weight.grad = self.bias.grad = None
        loss = (self.weight.mv(self.input) + self.bias).pow(2).sum()
        loss.backward()
        return loss.detach()

    def train(self, opt: Any, steps: int, *schedulers: Any) -> float:
        for _ in range(steps):
            loss = opt.step(self.closure)
            for scheduler in schedulers:
                scheduler.step(*((loss,) if isinstance(scheduler, ReduceLROnPlateau) else ()))
        return float(self.closure())


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    return bool(a == b)


def without_names(state_dict: Any) -> Any:
    groups = [{k: v for k, v in group.items() if k != "param_names"} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def test_errors(info: Info, common: Any) -> None:
    for error in info.info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = error.optimizer_error_input
        opened = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with opened(error.error_type, match=error.error_regex):
            info.make(given.params, **{**info.asked, **given.kwargs})


@pytest.mark.parametrize("contiguous", [True, False])
def test_goes_in_the_right_direction(info: Info, contiguous: bool) -> None:
    for options in info.inputs():
        problem = Problem(contiguous)
        before = float(problem.closure())
        after = problem.train(info.make(problem.params, **options), 20)
        assert after > before if options.get("maximize") else after < before


def test_goes_in_the_right_direction_with_schedulers(info: Info, common: Any) -> None:
    """Those PyTorch tests SGD and Adam with, and a rate of one group."""
    (longest,) = [each.scheduler_inputs for each in common.optim_db if each.name == "SGD"]
    for constructors_ in longest:
        problem = Problem()
        groups = [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 1e-4}]
        opt = info.make(groups, **info.default())
        before = float(problem.closure())
        assert problem.train(opt, 20, *(each(opt) for each in constructors_)) < before


def test_param_groups(info: Info) -> None:
    """Rates and decays of groups; a rate of almost nothing leaves its parameter where it is."""
    for options in info.inputs():
        problem, still = Problem(), nn.Parameter(torch.ones(2))
        still.grad = torch.ones(2)
        groups = [
            {"params": [problem.weight], **options},
            {"params": [problem.bias], **options, "weight_decay": 0.0},
            {"params": [still], "maximize": False},
        ]
        opt = info.make(groups, **info.asked, lr=1e-28)
        before = float(problem.closure())
        after = problem.train(opt, 20)
        assert after > before if options.get("maximize") else after < before
        assert equal(still.detach(), torch.ones(2))


def test_no_gradient_and_zero_gradient_change_nothing(info: Info) -> None:
    for options in info.inputs():
        if "weight_decay" in options:
            continue
        problem = Problem()
        before = [p.detach().clone() for p in problem.params]
        opt = info.make(problem.params, **options)
        assert opt.step(lambda: 1.5) == 1.5
        for p in problem.params:
            p.grad = torch.zeros_like(p)
        opt.step()
        assert all(equal(p.detach(), x) for p, x in zip(problem.params, before, strict=True))
        info.make([torch.randn(2, 3) for _ in range(2)], **options).step()


def test_printed_copied_and_not_empty(info: Info) -> None:
    for options in info.inputs():
        problem = Problem()
        opt = info.make(problem.params, **options)
        problem.train(opt, 2)
        assert type(opt).__name__ in repr(opt)
        public = [{key for key in vars(each) if not key.startswith("_")} for each in (opt, copy.deepcopy(opt))]
        assert public[0] == public[1]
        assert all(len(entry) for entry in opt.state.values())


@pytest.mark.parametrize("named", [(False, False), (False, True), (True, False), (True, True)])
def test_state_dict_is_deterministic(info: Info, named: tuple[bool, bool]) -> None:
    """Through a file, read with and without weights_only, into equal parameters with and without names."""
    for options in info.inputs():
        one, two = Problem(), Problem()
        first = info.make(one.named() if named[0] else one.params, **options)
        one.train(first, 3)
        saved = first.state_dict()
        assert equal(through_file(saved)["state"], saved["state"])
        for p, q in zip(one.params, two.params, strict=True):
            q.data.copy_(p)
        second = info.make(two.named() if named[1] else two.params, **options)
        second.load_state_dict(copy.deepcopy(saved))
        assert one.train(first, 3) == two.train(second, 3)
        assert equal(one.weight, two.weight)
        assert equal(one.bias, two.bias)
        states = [without_names(each.state_dict()) for each in (first, second)]
        assert equal(states[0], states[1])
        if any(named):
            assert second.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
        second.param_groups.extend(second.param_groups)
        assert equal(states[0]["param_groups"][-1], without_names(second.state_dict())["param_groups"][-1])


def test_step_that_is_no_tensor_is_loaded(info: Info) -> None:
    for options in info.inputs():
        problem = Problem()
        opt = info.make(problem.params, **options)
        problem.train(opt, 3)
        saved = copy.deepcopy(opt.state_dict())
        for entry in saved["state"].values():
            entry["step"] = entry["step"].item()
        opt.load_state_dict(saved)
        problem.train(opt, 1)
        assert {int(entry["step"]) for entry in opt.state.values()} == {4}


def test_state_dict_hooks(info: Info) -> None:
    problem = Problem()
    opt = info.make(problem.params, **info.default())
    opt.register_state_dict_pre_hook(lambda opt: opt.state.update(test=1))
    assert opt.state_dict()["state"]["test"] == 1
    opt.load_state_dict(opt.state_dict())  # what a hook put in is no state of a parameter
    assert opt.state["test"] == 1

    def post(opt: Any, state_dict: Any) -> Any:
        return {**state_dict, "seen": state_dict["state"].pop("test")}

    opt.register_state_dict_post_hook(post)
    assert opt.state_dict()["seen"] == 1
    assert "test" not in opt.state_dict()["state"]


def test_load_state_dict_hooks(info: Info) -> None:
    problem = Problem()
    opt = info.make(problem.params, **info.default())
    saved = opt.state_dict()

    def changes(opt: Any, state_dict: Any) -> None:
        state_dict["param_groups"][0]["lr"] = 0.002

    def replaces(opt: Any, state_dict: Any) -> Any:
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] = 0.003
        return state_dict

    seen: list[float] = []
    opt.register_load_state_dict_post_hook(lambda opt: seen.append(opt.param_groups[0]["lr"]))
    opt.register_load_state_dict_pre_hook(changes)
    opt.load_state_dict(saved)
    handle = opt.register_load_state_dict_pre_hook(replaces, prepend=True)
    opt.load_state_dict(saved)
    handle.remove()
    opt.register_load_state_dict_pre_hook(replaces)
    opt.load_state_dict(saved)
    assert seen == [0.002, 0.002, 0.003]


def test_step_hooks(info: Info) -> None:
    """Global and own, in order, for this optimizer and another; gone when removed."""
    problem = Problem()
    opt, other = info.make(problem.params, **info.default()), torch.optim.SGD(problem.params)
    seen: list[int] = []
    note: Callable[[int], Any] = lambda number: lambda *given: seen.append(number)  # noqa: E731
    handles = [register_optimizer_step_pre_hook(note(0)), register_optimizer_step_post_hook(note(5))]
    try:
        for each in (opt, other):
            handles += [each.register_step_pre_hook(note(1)), each.register_step_post_hook(note(2))]
        for each in (opt, other, opt):
            each.step()
    finally:
        for handle in handles:
            handle.remove()
    opt.step()
    assert seen == [0, 1, 2, 5] * 3


def test_mixed_dtypes(info: Info) -> None:
    """Parameters of several precisions together move as each of them alone, but for products in another order."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    start = [torch.rand(2, 3, dtype=dtype) for dtype in dtypes]
    grads = [torch.rand(2, 3, dtype=dtype) for dtype in dtypes]
    results = []
    for together in (True, False):
        params = [nn.Parameter(value.clone()) for value in start]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        for part in [params] if together else [[p] for p in params]:
            opt = info.make(part, **info.default())
            for _ in range(3):
                opt.step()
        results.append(params)
    assert all(a.dtype == value.dtype and equal(a, b) for a, b, value in zip(*results, start, strict=True))


# ---- against PyTorch's own, with the inputs that PyTorch tests them with --------------------------------------------

TWINS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (pt.Adam, {"lr": "lr", "weight_decay": "weight_decay", "maximize": "maximize"}),
    "SGD": (pt.SGD, {"lr": "lr", "momentum": "momentum", "nesterov": "nesterov", "maximize": "maximize"}),
    "Adagrad": (pt.AdaGrad, {"lr": "lr", "initial_accumulator_value": "initial", "maximize": "maximize"}),
    "RMSprop": (pt.RMSProp, {"lr": "lr", "maximize": "maximize", "momentum": "momentum"}),
}


def twin_inputs(common: Any, name: str) -> Iterator[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """What both take: PyTorch's arguments, coupled decay left out, and ours."""
    (theirs,) = [each for each in common.optim_db if each.name == name]
    names = TWINS[name][1]
    for each in theirs.optim_inputs_func(device="cpu"):
        given = {
            key: value for key, value in each.kwargs.items() if value and (name == "AdamW" or key != "weight_decay")
        }
        if given.keys() <= names.keys():
            yield theirs.optim_cls, given, {names[key]: value for key, value in given.items()}


def check_twins(common: Any, name: str) -> int:
    count = 0
    for cls, theirs, ours in twin_inputs(common, name):
        one, two = Problem(), Problem()
        reference = cls(one.params, **theirs)
        group = reference.param_groups[0]
        ours = {"lr": group["lr"], "weight_decay": group["weight_decay"], **ours}
        one.train(reference, 20)
        two.train(TWINS[name][0](two.params, **ours), 20)
        # float32, 20 steps, a few roundings each: 1e-5 is 80 units
        assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(two.params, one.params, strict=True))
        count += 1
    return count


@pytest.mark.parametrize("name", TWINS)
def test_the_same_as_pytorch_s_own(common: Any, name: str) -> None:
    assert check_twins(common, name) >= 2


# ---- mistakes -------------------------------------------------------------------------------------------------------


def _keyless(self: Any, state_dict: Any) -> None:
    LOAD(self, {**state_dict, "state": {k: v for k, v in state_dict["state"].items() if not isinstance(k, str)}})


def _nameless(self: Any, saved_groups: Any) -> Any:
    return [{k: v for k, v in group.items() if k != "param_names"} for group in MERGED(self, saved_groups)]


def _always_down(self: Any, grads: Any, params: Any, step: Any, scalars: Any, options: Any, *rest: Any) -> Any:
    return DIRECTIONS(self, grads, params, step, scalars, {**options, "maximize": False}, *rest)


def _decay_alone(group: Any, bucket: Any, params: Any, directions: Any) -> None:
    torch._foreach_mul_(params, 1 - float(group["weight_decay"]))
    APPLY(group, bucket, params, directions)


LOAD, MERGED = pt.Optimizer.load_state_dict, pt.Optimizer._merged_groups
DIRECTIONS, APPLY = buckets.Bucket.directions, optimizer._apply
MISTAKES: dict[str, tuple[Callable[..., Any], tuple[Any, str, Any]]] = {
    "hooks' entries lost": (test_state_dict_hooks, (pt.Optimizer, "load_state_dict", _keyless)),
    "names lost": (lambda info: test_state_dict_is_deterministic(info, (True, False)),
        (pt.Optimizer, "_merged_groups", _nameless)),
    "maximize ignored": (lambda info: test_goes_in_the_right_direction(info, True),
        (buckets.Bucket, "directions", _always_down)),
    "only tensors as step": (test_step_that_is_no_tensor_is_loaded,
        (optimizer, "_count", lambda step: int(step) if isinstance(step, torch.Tensor) else None)),
    "decay without a gradient's step": (test_param_groups, (optimizer, "_apply", _decay_alone)),
}  # fmt: skip


@pytest.mark.parametrize(("check", "mistake"), MISTAKES.values(), ids=MISTAKES)
def test_checks_catch(check: Any, mistake: Any, common: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*mistake)
    with pytest.raises((AssertionError, ValueError, KeyError)):
        check(Info(common, "Adam"))


def test_twins_catch(common: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "_apply", _decay_alone)
    with pytest.raises(AssertionError):
        check_twins(common, "AdamW")
