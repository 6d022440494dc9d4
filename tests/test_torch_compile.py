"""``compile=True``: the same numbers from one graph (two with ``every > 1``), none compiled after the first steps."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from configs import CONFIGS, LOUD, Config
from torch._dynamo.utils import counters
from torch_adapter_cases import ONE_EACH, by_core, distance, feed, forced, parameters, recorded

import precond_ref_torch as pt
from precond_ref_torch import passes

torch.set_num_threads(1)
BACKEND = "eager"  # the same graph, run as it is; "aot_eager" also takes out the writing in place
QUICK = {f"{name}-{next(iter(variants))}" for name, variants in LOUD.items()}
REST = {name for name, config in CONFIGS.items() if config.method.every > 1} - QUICK


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def check_compiled(config: Config, backend: str = BACKEND) -> None:
    every = config.method.every
    start, grads = recorded([config.shape] * 2, 2 * every + 3)
    params = parameters(start)
    opt = pt.Optimizer(params, **forced(config.method, lr=0.125, compile=backend))
    feed(opt, params, grads[: every + 1])
    expected = 1 if every == 1 else 2
    assert graphs() == expected
    opt.param_groups[0]["lr"] = 0.25
    feed(opt, params, grads[every + 1 :])
    assert graphs() == expected, "compiled again"
    eager = parameters(start)
    other = pt.Optimizer(eager, **forced(config.method, lr=0.125))
    feed(other, eager, grads[: every + 1])
    other.param_groups[0]["lr"] = 0.25
    feed(other, eager, grads[every + 1 :])
    # scalars are 0-D float64 tensors: the same numbers, other roundings of products with them
    assert distance(params, eager) <= 1e-13


QUICKEST = ("AGD-default", "ASGO-every")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICKEST else pytest.mark.full) for n in sorted(QUICK | {"ASGO-every"})]
    + [pytest.param(n, marks=pytest.mark.deep) for n in sorted(REST - {"ASGO-every"})],
)
def test_compiled_updates(name: str) -> None:
    check_compiled(CONFIGS[name], "aot_eager" if name in QUICKEST else BACKEND)


@pytest.mark.deep
@pytest.mark.parametrize("name", CONFIGS)
def test_all_compiled_updates(name: str) -> None:
    check_compiled(CONFIGS[name], "aot_eager")


def _numbers_in_graph(self: Any, task: Any) -> Any:
    """The mistake of handing the step's scalars over as Python numbers."""
    return self.compiled, task._replace(scalars=type(task.scalars)(*map(float, task.scalars)))


@pytest.mark.parametrize("name", ["AGD-default", "Adam-default"])
def test_check_catches_numbers_in_the_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes.Graph, "ready", _numbers_in_graph)
    # either graph after graph, or none: Dynamo refuses a bound of clip that changes from call to call
    with pytest.raises((AssertionError, torch._dynamo.exc.Unsupported), match="compiled again|assert [23] == 1|isnan"):
        check_compiled(CONFIGS[name])


def test_check_catches_a_root_renewed_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONFIGS["ASGO-every"].method.__class__, "due", lambda method, step: True)
    with pytest.raises(AssertionError):
        check_compiled(CONFIGS["ASGO-every"])


@pytest.mark.full
def test_more_shapes_than_graphs_of_one_function() -> None:
    """PyTorch compiles one function at most eight times; each shape has a function of its own."""
    shapes: list[tuple[int, ...]] = [(3, n) for n in range(2, 12)]
    start, grads = recorded(shapes, 2)
    params = parameters(start)
    method = ONE_EACH["DASGO"].method
    feed(pt.Optimizer(params, method, lr=0.125, compile=BACKEND), params, grads)
    assert graphs() == len(shapes)
    assert distance(params, by_core(method, start, grads, 0.125)) <= 1e-12


def test_missing_gradients_compile_once_more() -> None:
    """Buffers of other sizes: one graph for any size, and one for a parameter alone."""
    method = ONE_EACH["AGD"].method
    start, grads = recorded([(4, 3)] * 5, 8)
    for step in (2, 3, 5):
        for i in range(step % 4 + 1):
            grads[step][i] = None
    params = parameters(start)
    feed(pt.Optimizer(params, method, lr=0.125, compile=BACKEND), params, grads)
    assert graphs() == 2
    assert distance(params, by_core(method, start, grads, 0.125)) <= 1e-13


@pytest.mark.full
def test_low_precision_and_checkpoints() -> None:
    config = CONFIGS["Shampoo-every"]
    start, grads = recorded([config.shape] * 2, 6, torch.bfloat16)
    params = parameters(start)
    opt = pt.Optimizer(params, **forced(config.method, lr=0.125, compile=BACKEND))
    feed(opt, params, grads[:4])
    again = parameters([p.detach() for p in params])
    other = pt.Optimizer(again, **forced(config.method))
    other.load_state_dict(opt.state_dict())
    feed(opt, params, grads[4:])
    feed(other, again, grads[4:])
    assert other.param_groups[0]["compile"] == BACKEND
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))
    assert {v.dtype for k, v in opt.state[params[0]].items() if k != "step"} == {torch.float32}


def check_compiled_by_the_caller(whole: bool, inner: bool | str, cls: Any = pt.ASGO) -> None:
    """``torch.compile`` of the step, or of a whole training step: the same bits as without, one warning or none."""
    torch.manual_seed(0)
    values, x = torch.randn(4, 3), torch.randn(5, 3)
    (param,), (twin,) = parameters([values]), parameters([values])
    opt, other = cls([param], compile=inner), cls([twin], compile=inner)

    def backward(param: Any) -> None:
        param.grad = None
        (x @ param.T).square().mean().backward()

    def train(param: Any, opt: Any) -> None:
        backward(param)
        opt.step()

    compiled = torch.compile(train if whole else opt.step, backend=BACKEND)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            if whole:
                compiled(param, opt)
            else:
                backward(param)
                compiled()
    assert sum("give the optimizer compile=True" in str(w.message) for w in caught) == (not inner)
    assert graphs() <= bool(inner) + 2 * whole, "graphs of the step"
    for _ in range(3):
        train(twin, other)
    assert torch.equal(param, twin)


@pytest.mark.parametrize(("whole", "inner"), [(False, False), (True, False), (False, BACKEND)])
def test_a_step_compiled_by_the_caller(whole: bool, inner: bool | str) -> None:
    check_compiled_by_the_caller(whole, inner)


def test_check_catches_a_step_cut_into_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pt.Optimizer, "_step_uncompiled", torch.no_grad()(pt.Optimizer._update))
    with pytest.raises(AssertionError):
        check_compiled_by_the_caller(False, False, pt.SGD)
