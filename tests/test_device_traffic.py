"""What a step asks of a device, counted without one: values that the host reads, and calls that compute.

Reading a value makes the host wait for the device. array-api-strict's second device shows every call that the
tree-level optimizer makes of an array library, as on CuPy; PyTorch's meta device has no values: reading one raises.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch
from configs import CONFIGS, Config
from mutation import mutated
from torch.utils._python_dispatch import TorchDispatchMode

import precond_ref as pr
import precond_ref_torch.optimizer
from precond_ref import optimizer
from precond_ref.cost.report import SIZE
from precond_ref.methods import agd
from precond_ref.registry import parse
from precond_ref_torch.buckets import Bucket

READS = {"__bool__", "__float__", "__int__", "__index__", "__complex__", "__array__", "__buffer__", "__dlpack__",
         "to_device", "nonzero", "repeat", "unique_all", "unique_counts", "unique_inverse", "unique_values",
         "clip"}  # fmt: skip
"""What waits for the device; array-api-compat's ``clip`` for CuPy chooses entries by a mask, and counts them."""
FREE = {"shape", "ndim", "dtype", "device", "size", "mT", "T", "__array_namespace__", "__repr__", "finfo", "isdtype",
        "__getattr__", "prim.device.default", "aten.empty.memory_format", "aten.empty_like.default"}  # fmt: skip
VIEWS = {"reshape", "__getitem__"}  # of contiguous arrays


def asks(config: Config) -> int:
    """How often an update must know what only values tell.

    MBF's, where it solves at every one: whether a solution is to be believed. A round of orthogonal iteration: whether
    columns are independent, of each axis with a basis (EShampoo's here have two).
    """
    method = config.method
    if isinstance(method, pr.KLShampoo) and method.every == 1:
        return sum(d != 1 for d in config.shape)
    if isinstance(method, pr.EShampoo) and method.basis != "eigh" and method.every == 1:
        return 2 * method.iterations
    return isinstance(method, pr.MBF) and method.kind != "diagonal" and method.inverse_every == 1


def census(step: Callable[[], Any]) -> tuple[Counter[str], int]:
    """Calls of array-api-strict that compute, by name, and reads by the host."""
    calls: Counter[str] = Counter()

    def inside(frame: Any) -> bool:
        return frame is not None and frame.f_globals.get("__name__", "").startswith("array_api_strict")

    def seen(frame: Any, event: str, _: Any) -> None:
        if event == "call" and inside(frame) and not inside(frame.f_back):
            owner = type(frame.f_locals.get("self")).__name__
            if owner in ("Array", "NoneType"):  # not the methods of devices and dtypes
                key, wrapped = frame.f_locals.get("key"), frame.f_locals.get("func")
                masked = any(hasattr(part, "dtype") for part in (key if isinstance(key, tuple) else (key,)))
                calls["nonzero" if masked else getattr(wrapped, "__name__", frame.f_code.co_name)] += 1

    sys.setprofile(seen)
    try:
        step()
    finally:
        sys.setprofile(None)
    reads = sum(calls.pop(name, 0) for name in READS)
    return Counter({name: count for name, count in calls.items() if name not in FREE | VIEWS}), reads


def second_step(config: Config, count: int, module: Any = optimizer, **fields: Any) -> tuple[Counter[str], int]:
    """Of ``count`` equal parameters; what is renewed every few steps was renewed in the first."""
    device, rng = array_api_strict.Device("device1"), np.random.default_rng(0)
    trees = [
        {str(i): array_api_strict.asarray(rng.standard_normal(config.shape), device=device) for i in range(count)}
        for _ in range(3)
    ]
    opt = module.Optimizer(config.method, lr=0.5, **fields)
    params, state = opt.step(trees[0], trees[1], opt.init(trees[0]))
    return census(lambda: opt.step(params, trees[2], state))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_value_is_read_and_no_call_is_made_for_each_parameter(config: Config) -> None:
    few, many = second_step(config, 2), second_step(config, 7)
    assert few == many
    assert few[1] == asks(config)
    assert few[0]["__add__"] + few[0]["__mul__"] + few[0]["__rmul__"] > 0  # the census sees what is computed


def test_planted_bugs_are_counted() -> None:
    config = CONFIGS["AGD-default"]
    line = "m = ema(state.m, grad, self.beta1)"
    for asking in ("{} if xp.max(grad) else grad", "{}; float(m[0])", "{}; xp.clip(m, min=0.0)", "{}; m[m > 0]"):
        method = mutated(agd, (line, asking.format(line))).AGD()
        with array_api_strict.ArrayAPIStrictFlags(boolean_indexing=True, data_dependent_shapes=True):
            assert second_step(config._replace(method=method), 2)[1] == 1, asking
    assert second_step(config, 2, fuse=False) != second_step(config, 7, fuse=False)
    loop = mutated(optimizer, ("_gather(group, joined_gradients, xp), group_state", "xp.stack([*map(xp.negative, "
                               "joined_gradients.values())]), group_state"))  # fmt: skip
    right = CONFIGS["ASGO-right"]
    assert second_step(right, 2, loop) != second_step(right, 7, loop)


def test_clip_is_called_nowhere() -> None:
    sources = Path(pr.__file__).parent.rglob("*.py")
    assert [path.name for path in sources if "xp.clip(" in path.read_text(encoding="utf-8")] == []


class Operations(TorchDispatchMode):
    """Operations on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        # The result too: what is made or copied there has no argument there.
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
        if str(function) not in FREE and any(getattr(x, "is_meta", False) for x in leaves):
            self.calls[str(function)] += 1
        return result


def torch_operations(method: Any, shape: tuple[int, ...], count: int) -> Counter[str]:
    """Of the PyTorch adapter's second step."""
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for _ in range(count)]
    opt = precond_ref_torch.Optimizer(params, method, lr=0.5)
    for _ in range(2):
        for p in params:
            p.grad = torch.empty(shape, device="meta")
        with Operations() as operations:
            opt.step()
    return operations.calls


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.full
def test_torch_reads_no_value_and_makes_no_call_for_each_parameter(config: Config) -> None:
    few, many = (torch_operations(config.method, config.shape, count) for count in (2, 7))
    assert few == many
    assert few.total() > 4


@pytest.mark.full
def test_the_documentation_has_these_counts() -> None:
    page = (Path(__file__).parents[1] / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.+)` \| (\d+) \| (\d+) \|$", page.partition("## A CUDA GPU")[2], re.MULTILINE)
    assert len(rows) == 12
    for text, core, adapter in rows:
        config = Config(parse(text).made(size=SIZE), (6, 6))
        counted = second_step(config, 100)[0].total(), torch_operations(*config, 100).total()
        assert counted == (int(core), int(adapter)), text


def test_buffers_of_one_parameter_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(precond_ref_torch.optimizer.LARGEST_BUFFER, "other", 1)
    few, many = (torch_operations(pr.AGD(), (5, 3), count) for count in (2, 7))
    assert few.total() < many.total()


@pytest.mark.parametrize("make", [torch.zeros, lambda shape, device: torch.ones(shape).to(device)])
def test_what_is_made_or_copied_for_each_parameter_is_counted(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    gather = Bucket.gather

    def making(self: Bucket) -> Any:
        for param in self.params:
            make((), device=param.device)
        return gather(self)

    monkeypatch.setattr(Bucket, "gather", making)
    few, many = (torch_operations(pr.AGD(), (5, 3), count) for count in (2, 7))
    assert few.total() + 5 == many.total()
