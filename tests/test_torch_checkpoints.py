"""State dicts of the PyTorch adapter: memory of their own, and PyTorch's functions for distributed checkpoints."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from configs import CONFIGS
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch_adapter_cases import ONE_EACH, feed, forced, parameters, recorded

import precond_ref_torch as pt
from precond_ref_torch import buckets, optimizer

torch.set_num_threads(1)


def file_size(value: Any) -> int:
    file = io.BytesIO()
    torch.save(value, file)
    return file.tell()


def content(entry: Any) -> int:
    return sum(v.numel() * v.element_size() for v in entry.values())


# ---- memory ---------------------------------------------------------------------------------------------------------


def check_own_memory(name: str) -> None:
    """Ten equal parameters: a file with one's state holds that state, and no tensor shares memory with another."""
    config = ONE_EACH[name]
    shape = tuple(8 * d for d in config.shape)
    start, grads = recorded([shape] * 10, 2)
    params = parameters(start)
    opt = pt.Optimizer(params, **forced(config.method, lr=0.125))
    feed(opt, params, grads)
    saved = opt.state_dict()["state"]
    assert file_size(saved[3]) <= content(saved[3]) + 1000 * (len(saved[3]) + 1)
    tensors = [tensor for entry in saved.values() for tensor in entry.values()]
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)
    assert len({t.untyped_storage().data_ptr() for t in tensors if t.numel()}) == len(tensors)


@pytest.mark.parametrize("name", ["Adam", "ASGO", "Shampoo", "SShampoo"])
def test_state_dicts_have_memory_of_their_own(name: str) -> None:
    check_own_memory(name)


def test_check_catches_views_of_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer.Optimizer, "_release", lambda self: None)
    with pytest.raises(AssertionError):
        check_own_memory("Adam")


def check_state_dict_stays(name: str) -> None:
    """What was handed out is what it was, whatever follows; and training does not see that it was handed out."""
    config = ONE_EACH[name]
    for count in (1, 3):
        start, grads = recorded([config.shape] * count, 6)
        one, two = parameters(start), parameters(start)
        first, second = (pt.Optimizer(p, **forced(config.method, lr=0.125)) for p in (one, two))
        feed(first, one, grads[:3])
        handed = first.state_dict()
        kept = copy.deepcopy(handed)
        feed(first, one, grads[3:])
        for key, entry in kept["state"].items():
            assert list(handed["state"][key]) == list(entry)
            assert all(torch.equal(handed["state"][key][n], v) for n, v in entry.items())
        feed(second, two, grads)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", ["AGD", "ASGO", "RFShampoo"])
def test_later_steps_leave_a_state_dict_alone(name: str) -> None:
    check_state_dict_stays(name)


@pytest.mark.parametrize("what", ["entries", "tensors"])
def test_check_catches_a_state_dict_that_changes(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "entries":
        monkeypatch.setattr(optimizer.Optimizer, "_handed", lambda self: self.state)
    else:
        original = buckets.Bucket.__init__
        monkeypatch.setattr(buckets.Bucket, "__init__", lambda self, *given: original(self, *given[:6], False))
    with pytest.raises(AssertionError):
        check_state_dict_stays("AGD")


def test_state_dict_keeps_buckets_and_memory_at_rest() -> None:
    """The next step makes the buffers anew; nothing is held twice once the state dict is gone."""
    start, grads = recorded([(8, 4)] * 3, 3)
    params = parameters(start)
    opt = pt.Adam(params)
    feed(opt, params, grads[:2])
    opt.state_dict()
    feed(opt, params, grads[2:])
    assert [len(bucket) for bucket in opt._plans[0].buckets] == [3]
    assert not opt._lent
    assert len({opt.state[p]["m"].untyped_storage().data_ptr() for p in params}) == 1


# ---- torch.distributed.checkpoint -----------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "full": {"full_state_dict": True},
    "offloaded": {"full_state_dict": True, "cpu_offload": True},
    "flat": {"flatten_optimizer_state_dict": True},
}


class Net(nn.Module):
    """Parameters of one shape, and a vector."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for i in range(3):
            value = torch.randn(shape if i < 2 else (3,), generator=generator, dtype=torch.float64)
            self.register_parameter(f"p{i}", nn.Parameter(value))


def check_functions(make: Any, build: Any, options: dict[str, Any]) -> None:
    """Saved, put into another optimizer: the same bits go on."""
    one, two = build(), build()
    params, others = list(one.parameters()), list(two.parameters())
    _, grads = recorded([tuple(p.shape) for p in params], 4)
    first, second = make(one), make(two)
    feed(first, params, grads[:2])
    two.load_state_dict(one.state_dict())
    saved = get_optimizer_state_dict(one, first, options=StateDictOptions(**options))
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    set_optimizer_state_dict(two, second, torch.load(file), options=StateDictOptions(**options))
    assert [g["join"] for g in second.param_groups] == [g["join"] for g in first.param_groups]
    feed(first, params, grads[2:])
    feed(second, others, grads[2:])
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


WITH_STATE = {name: CONFIGS["SGD-momentum"] if name == "SGD" else config for name, config in ONE_EACH.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", WITH_STATE)  # PyTorch's function for full state dicts asserts that there is a tensor
def test_functions_for_distributed_checkpoints(name: str, options: dict[str, Any]) -> None:
    config = WITH_STATE[name]
    check_functions(
        lambda net: pt.Optimizer(net.parameters(), config.method, lr=0.125), lambda: Net(config.shape), options
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_functions_for_joined_biases(options: dict[str, Any]) -> None:
    """A bias without a state of its own, fields and pairs that are tuples."""
    check_functions(
        lambda net: pt.MBF(pt.param_groups_for(net, method="MBF"), lr=0.125, damping=0.5),
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double(),
        options,
    )
    check_functions(
        lambda net: pt.IFShampoo(net.parameters(), lr=0.125, structure=("diagonal", "tril")),
        lambda: nn.Linear(3, 4, bias=False).double(),
        options,
    )


def test_check_catches_lists_for_tuples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "_tuples", lambda value: value)
    with pytest.raises((AssertionError, TypeError, ValueError)):
        test_functions_for_joined_biases(OPTIONS["full"])
