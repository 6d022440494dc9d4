"""Elementwise updates of the PyTorch adapter in few passes: the same numbers as the method's own ``update``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from configs import CONFIGS
from torch_adapter_cases import distance, feed, parameters, recorded

import precond_ref as pr
import precond_ref_torch as pt
from precond_ref_torch import buckets, optimizer, passes, states

torch.set_num_threads(1)
ELEMENTWISE = {name: config.method for name, config in CONFIGS.items() if config.method.elementwise}


# ---- tapes ----------------------------------------------------------------------------------------------------------


def _tape(method: Any, dtype: Any) -> Any:
    return passes.Tape(method, states.template(method, (1,), dtype), dtype, torch.device("cpu"))


def check_tape(method: Any, dtype: Any, special: bool = False) -> None:
    """Six updates by the tape and by the method, bit for bit; of what is given only averages are changed."""
    tape, n = _tape(method, dtype), 7
    generator = torch.Generator().manual_seed(1)
    state, arrays = method.init(torch.zeros(n, dtype=dtype)), None
    for step in range(6):
        grad, param = (torch.randn(n, dtype=dtype, generator=generator) for _ in range(2))
        grad[0] = 0.0
        if special and step == 3:
            grad[1:5] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
        arrays = [a.clone() for a in states.tensors(state)] if arrays is None else arrays
        before = [grad.clone(), param.clone(), *(a.clone() for a in arrays)]
        marks = passes.Marks()
        assert not tape.start(marks, step)
        found = tape(grad, arrays, param, method.scalars(step + 1), marks.tensors)
        assert marks.begun(step) == any(new is old for new, old in zip(found[1:], arrays, strict=True))
        kept = [old for new, old in zip(found[1:], arrays, strict=True) if new is not old]
        given = [b for b, new, old in zip(before[2:], found[1:], arrays, strict=True) if new is not old]
        assert all(map(_same, [grad, param, *kept], [*before[:2], *given])), "what was given is changed"
        direction, state = method.update(grad, state, param)
        assert all(map(_same, found, [direction, *states.tensors(state)])), f"step {step + 1}"
        arrays = [a.clone() for a in found[1:]]


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_tapes(name: str, dtype: Any, special: bool) -> None:
    check_tape(ELEMENTWISE[name], dtype, special)


def _too_early(self: Any, grad: Any, arrays: Any, param: Any, scalars: Any, marks: Any) -> Any:
    """The mistake of one array less: a result is overwritten."""
    values = [grad, *arrays, param, *self.fixed, *self._room(grad.shape[0])]
    self._renew(scalars)
    values[self.inputs : self.inputs + len(self.fixed)] = self.fixed
    for function, slots, options, slot, _ in self.each:
        function(*[values[i] for i in slots], out=values[min(slot, len(values) - 2)], **options)
    return [values[min(i, len(values) - 2)] for i in self.results]


def _numbers_of_the_first_step(self: Any, scalars: Any) -> None:
    if self.scalars is self:
        RENEW(self, scalars)


RENEW = passes.Tape._renew


@pytest.mark.parametrize(
    ("what", "wrong"), [("__call__", _too_early), ("_renew", _numbers_of_the_first_step)], ids=["memory", "numbers"]
)
def test_check_catches(what: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes.Tape, what, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        check_tape(pr.AGD(), torch.float64)


def test_a_tape_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    _tape(pr.AGD(), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


class Mean(pr.SGD):
    """Called elementwise, and is not."""

    def step(self, grad: Any, state: Any, param: Any, now: Any) -> Any:
        direction, state = super().step(grad, state, param, now)
        return direction - now.xp.mean(grad), state


class Choosy(pr.SGD):
    """Looks at values."""

    def step(self, grad: Any, state: Any, param: Any, now: Any) -> Any:
        direction, state = super().step(grad, state, param, now)
        return (direction if bool(grad[0] > 0) else 2 * direction), state


class Still(pr.SGD):
    """Computes nothing, and keeps its state."""

    def step(self, grad: Any, state: Any, param: Any, now: Any) -> Any:
        return grad, state._replace(step=now.step)


def test_a_tape_without_a_call() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    pt.Optimizer([param], Still(momentum=0.5), lr=0.5).step()
    assert param.tolist() == [0.5] * 3


@pytest.mark.parametrize("cls", [Mean, Choosy])
def test_what_no_tape_can_repeat(cls: Any) -> None:
    method = cls()
    template = states.template(method, (1,), torch.float64)
    assert passes.record(method, template, torch.float64, torch.device("cpu")) is None
    start, grads = recorded([(5,)], 3)
    params = parameters(start)
    feed(pt.Optimizer(params, method, lr=0.5), params, grads)
    x, state = start[0], method.init(start[0])
    for (grad,) in grads:
        direction, state = method.update(grad, state, x)
        x = x - 0.5 * direction
    assert distance(params, [x]) <= 1e-15


# ---- graphs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled() -> Iterator[Any]:
    torch._dynamo.reset()
    yield lambda params, **options: pt.AGD(params, lr=0.125, weight_decay=0.25, compile="eager", **options)
    torch._dynamo.reset()


def check_sizes(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lone parameters and joined ones of several sizes, rates and directions that change, other memory in between."""
    monkeypatch.setitem(optimizer.LARGEST_MEMBER, "cpu", 8)
    shapes: list[tuple[int, ...]] = [(3, 4), (2,), (5,), (12,), (9,), (1,)]
    start, grads = recorded(shapes, 9)
    params, twins = parameters(start), parameters(start)
    opt, other = make(params), pt.AGD(twins, lr=0.125, weight_decay=0.25)
    for step, row in enumerate(grads):
        for some, each in ((params, opt), (twins, other)):
            if step == 3:
                each.param_groups[0]["lr"] = 0.5
            if step == 4:
                each.param_groups[0]["maximize"] = True
            if step == 5:
                each.param_groups[0]["weight_decay"] = 0.0
            if step in (2, 8):  # where the step before has called the same graph
                for param in some:
                    param.data = param.data.clone()
            if step == 7:  # gradients that are parts of one buffer, one of them as far from its start as it is long
                row = [part.view(shape) for part, shape in zip(_in_one(row), shapes, strict=True)]
            versions = [param._version for param in some]
            feed(each, some, [row])
            assert all(p._version > v for p, v in zip(some, versions, strict=True))
        assert distance(params, twins) <= 1e-13, f"step {step + 1}"


def _in_one(parts: list[Any]) -> Any:
    flat = torch.cat([part.reshape(-1) for part in parts])
    return torch.split(flat, [part.numel() for part in parts])


@pytest.mark.full
def test_graphs(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_sizes(compiled, monkeypatch)


def _stale(self: Any, grads: Any, common: Any) -> Any:
    """The mistake of moving the memory where the parameter once was."""
    if self.called[0] is not None:
        self.called = (self.params[0].data_ptr(), *self.called[0][1:]), *self.called[1:]
    return LONE(self, grads, common)


def _any_rates(self: Any, task: Any) -> Any:
    """The mistake of taking the graph of other constants."""
    graph, arguments = READY(self, task._replace(maximize=False))
    return graph, arguments


def _decay_forgotten(self: Any, found: Any) -> Any:
    scalars, common = NUMBERS(self, found)
    return scalars, (common[0], common[1][:1], *common[2:])


LONE, READY, NUMBERS = buckets.Bucket.lone, passes.Graph.ready, optimizer.BucketStep._numbers


@pytest.mark.full
@pytest.mark.parametrize(
    ("where", "what", "wrong"),
    [
        (buckets.Bucket, "lone", _stale),
        (passes.Graph, "ready", _any_rates),
        (optimizer.BucketStep, "_numbers", _decay_forgotten),
    ],
    ids=["place", "constants", "rates"],
)
def test_check_catches_a_graph(
    where: Any, what: str, wrong: Any, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, what, wrong)
    with pytest.raises(AssertionError, match="step"):
        check_sizes(compiled, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_rounded_once(dtype: Any, compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lone parameter's graph and a joined one's: the bits of float32, rounded."""
    monkeypatch.setitem(optimizer.LARGEST_MEMBER, "cpu", 8)
    start, grads = recorded([(12,), (5,)], 4, dtype)
    params, twins = parameters(start), parameters(start)
    opt = compiled(params)
    feed(opt, params, grads)
    feed(pt.AGD(twins, lr=0.125, weight_decay=0.25), twins, grads)
    assert distance([p.float() for p in params], [p.float() for p in twins]) <= 2**-9
    assert {opt.state[p][name].dtype for p in params for name in ("m", "b")} == {torch.float32}


@pytest.mark.full
def test_a_graph_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a graph ends early its state and value are unknown; parameters before it are stepped, others as before."""
    monkeypatch.setitem(optimizer.LARGEST_MEMBER, "cpu", 1)
    start, grads = recorded([(4,)] * 3, 2)
    params = parameters(start)
    opt = pt.AGD(params, compile="eager")
    feed(opt, params, grads[:1])
    calls = iter(range(10))
    graph = next(k for k in opt._kernels.values() if isinstance(k, passes.Graph))

    def failing(*given: Any) -> Any:
        if next(calls) == 1:
            raise MemoryError
        return original(*given)

    ((key, (original, order)),) = graph.chosen.items()
    graph.chosen[key] = failing, order
    for bucket in opt._plans[0].buckets:
        bucket.called = (None,)
    with pytest.raises(MemoryError) as caught:
        feed(opt, params, grads[1:])
    (note,) = caught.value.__notes__
    assert "stepped: 0 of group 0" in note
    assert "of unknown state and value (those of a compiled graph; load a checkpoint): 1 of group 0" in note
    assert "as before the step: 2 of group 0" in note
    assert [int(opt.state[p]["step"]) for p in params] == [2, 1, 1]
