"""`load_state_dict` of the PyTorch adapter: damaged state dicts, what wrappers keep, what is warned of."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch_adapter_cases import feed, parameters, recorded, through_file

import precond_ref as pr
import precond_ref_torch as pt
from precond_ref_torch import buckets, optimizer

torch.set_num_threads(1)

SHAPES: list[tuple[int, ...]] = [(4, 3), (4,), (2, 3)]
MAKERS: dict[str, Callable[[Any], Any]] = {
    "AGD": lambda params: pt.AGD(params, amsgrad=True),
    "ASGO": lambda params: pt.ASGO([{"params": params[:2]}, {"params": params[2:], "method": "Muon", "lr": 0.5}]),
    "Shampoo": lambda params: pt.Shampoo(params, every=2, eps=0.25),
    "MBF": lambda params: pt.MBF(list(zip("wbx", params, strict=True)), join=[("w", "b")]),
    "SShampoo": lambda params: pt.SShampoo.practical(params, size=2, weight_decay=0.25),
}


def nested(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that has no shape."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a prototype
        return torch.nested.nested_tensor([tensor.reshape(-1)])


TENSORS: list[Callable[[torch.Tensor], Any]] = [
    lambda t: t.clone().fill_(float("nan")) if t.is_floating_point() else t.to(torch.complex64),
    lambda t: torch.full_like(t, torch.inf) if t.is_floating_point() else -t - 1,
    lambda t: t.to(torch.float16),
    lambda t: t[None],
    lambda t: t.flatten()[:1],
    lambda t: t.to_sparse() if t.ndim else t.to(torch.bool),
    lambda t: t.to("meta"),
    nested,
    lambda t: torch.empty(0),
    lambda t: t.numpy(),
    lambda t: t.tolist(),
]
VALUES: list[Any] = [
    None, True, 0, -1, 7, 2**70, 0.5, -0.5, float("nan"), float("inf"), 1e400, 1j, "x", "", b"x", "Adam",
    [], [1], (), {}, {"a": 1}, {0: None}, object(), range(3), len, np.float64(0.5), np.ones(2), torch.tensor(0.5),
    torch.tensor(float("nan")), torch.ones(2), torch.tensor(1j), torch.ones((), device="meta"), set(), float,
]  # fmt: skip


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a state dict with every one of its keys."""
    if isinstance(node, (dict, list)):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            yield node, key
            yield from places(node[key])


def damaged(state_dict: Any, rng: random.Random) -> Any:
    """A copy with one thing replaced, removed, renamed, put in, or swapped with another."""
    result = copy.deepcopy(state_dict)
    found = list(places(result))
    place, key = rng.choice(found)
    kind = rng.randrange(6)
    if kind == 0 and isinstance(place[key], torch.Tensor):
        place[key] = rng.choice(TENSORS)(place[key])
    elif kind <= 2:
        place[key] = rng.choice(VALUES)
    elif kind == 3:
        del place[key]
    elif kind == 4:
        other, name = rng.choice(found)
        place[key], other[name] = other[name], place[key]
    elif isinstance(place, dict):
        new = rng.choice(["x", "m", 7, None, (1, 2), 1, "step"])
        place[new] = place.pop(key) if rng.random() < 0.5 else rng.choice(VALUES)
    else:
        place.insert(key, rng.choice(VALUES))
    return result


def contents(opt: Any) -> Any:
    """Groups and state as they are, tensors by value."""
    return copy.deepcopy((opt.state_dict()["param_groups"], opt.state_dict()["state"]))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def finite(opt: Any, params: Any) -> bool:
    tensors = [v for p in params for v in opt.state.get(p, {}).values() if isinstance(v, torch.Tensor)]
    return all(t.isfinite().all() for t in tensors if not t.is_meta and not t.is_sparse)


def check_damaged(cls: str, count: int, seed: int = 0) -> dict[str, int]:
    """Loaded, and the next step works, or ValueError, and nothing has changed; NaN and lost states are warned of."""
    rng = random.Random(f"{cls}{seed}")
    start, grads = recorded(SHAPES, 4, torch.float32)
    params = parameters(start)
    opt = MAKERS[cls](params)
    feed(opt, params, grads[:3])
    saved = opt.state_dict()
    tally = {"loaded": 0, "refused": 0}
    for _ in range(count):
        given = damaged(saved, rng)
        params = parameters(start)
        other = MAKERS[cls](params)
        feed(other, params, grads[:1])
        before = contents(other)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                other.load_state_dict(given)
            except ValueError:
                assert same(before, contents(other))
                tally["refused"] += 1
            else:
                messages = " ".join(str(w.message) for w in caught)
                assert finite(other, params) or "not finite" in messages
                lost = [p for p in params if "step" not in other.state.get(p, {})]
                assert len(lost) in (cls == "MBF", len(params)) or "start afresh" in messages
                for group in other.param_groups:
                    group["compile"] = False  # True is a value like another, but takes seconds
                feed(other, params, grads[3:])
                tally["loaded"] += 1
    return tally


@pytest.mark.parametrize("cls", MAKERS)
def test_damaged_state_dicts(cls: str) -> None:
    tally = check_damaged(cls, 60)
    assert min(tally.values()) > 0


@pytest.mark.deep
@pytest.mark.parametrize("cls", MAKERS)
def test_many_damaged_state_dicts(cls: str) -> None:
    print(check_damaged(cls, 3000, seed=1))


# ---- mistakes that the damage must show -----------------------------------------------------------------------------


def _unchecked_keys(state_dict: Any) -> Any:
    return [list(group["params"]) for group in state_dict["param_groups"]]


LOADED_MISTAKES: dict[str, tuple[str, Any]] = {
    "structure not checked": ("_checked_keys", _unchecked_keys),
    "infinite values not looked for": ("_finite", lambda value: True),
    "any step taken": ("_count", lambda step: step),
    "rates not checked": ("_check_rates", lambda group: None),
}


@pytest.mark.parametrize(("name", "mistake"), LOADED_MISTAKES.values(), ids=LOADED_MISTAKES)
def test_damage_shows(name: str, mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, name, mistake)
    with pytest.raises((AssertionError, ValueError, TypeError, AttributeError, KeyError, RuntimeError)):
        check_damaged("Shampoo", 200)


# ---- what wrappers keep ---------------------------------------------------------------------------------------------


class Lookahead:
    """Slow weights in ``optimizer.state``, as timm's Lookahead keeps them: here from before the first step on."""

    def __init__(self, base: Any, params: Any) -> None:
        self.base, self.params, self.count = base, params, 0
        for p in params:
            base.state[p]["slow_buffer"] = p.detach().clone()

    def step(self) -> None:
        self.base.step()
        self.count += 1
        if self.count % 2 == 0:
            for p in self.params:
                slow = self.base.state[p]["slow_buffer"]
                slow.lerp_(p.detach(), 0.5)
                p.data.copy_(slow)
                self.base.state[p]["synced"] = self.count  # a new object each time


def check_wrapper(cls: str) -> None:
    """The same bits without a break and over a file, at any step; and the buckets are made once."""
    start, grads = recorded(SHAPES, 7, torch.float32)
    whole = parameters(start)
    wrapped = Lookahead(MAKERS[cls](whole), whole)
    for row in grads:
        for p, g in zip(whole, row, strict=True):
            p.grad = g.clone()
        wrapped.step()
    for stop in (0, 2, 3):
        first = parameters(start)
        one = Lookahead(MAKERS[cls](first), first)
        for row in grads[:stop]:
            for p, g in zip(first, row, strict=True):
                p.grad = g.clone()
            one.step()
        second = parameters([p.detach() for p in first])
        two = Lookahead(MAKERS[cls](second), second)
        two.base.load_state_dict(through_file(one.base.state_dict()))
        two.count = stop
        made = []
        for row in grads[stop:]:
            for p, g in zip(second, row, strict=True):
                p.grad = g.clone()
            two.step()
            made.append([plan.buckets for plan in two.base._plans.values()])
        assert all(torch.equal(a, b) for a, b in zip(second, whole, strict=True))
        assert all(b is a for now in made[1:] for one_, other in zip(made[0], now, strict=True)
                   for a, b in zip(one_, other, strict=True))  # fmt: skip


@pytest.mark.parametrize("cls", [name for name in MAKERS if name != "MBF"])
def test_what_a_wrapper_keeps_is_kept(cls: str) -> None:
    check_wrapper(cls)


WRAPPER_MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "dropped on load": (optimizer, "_copied", lambda value, device: None),
    "cut again when it changes": (buckets.Bucket, "holds", lambda self, state: self.kept == 0),
}


@pytest.mark.parametrize("mistake", WRAPPER_MISTAKES.values(), ids=WRAPPER_MISTAKES)
def test_wrapper_check_catches(mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*mistake)
    with pytest.raises((AssertionError, AttributeError)):
        check_wrapper("AGD")


def test_wrapper_entries_are_copies_and_go_with_the_state_of_the_optimizer() -> None:
    """A hook's own key of ``state`` too; but no state of a parameter that is in no group."""
    start, grads = recorded(SHAPES, 2, torch.float32)
    params = parameters(start)
    opt = pt.AGD(params)
    feed(opt, params, grads)
    opt.state["scale"] = {"value": torch.ones(2)}
    opt.state[params[0]]["slow_buffer"] = torch.ones(4, 3)
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    saved["state"][0]["slow_buffer"].zero_()
    saved["state"]["scale"]["value"].zero_()
    assert opt.state[params[0]]["slow_buffer"].min() == 1 == opt.state["scale"]["value"].min()
    saved["state"][7] = saved["state"][0]
    with pytest.raises(ValueError, match="a state of 7, which is in no group"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3.0), np.float64(3.0)])
def test_a_number_as_step(step: Any) -> None:
    """Loaded, or put into the state by hand: the counter again, on the CPU."""
    start, grads = recorded(SHAPES, 4, torch.float32)
    results = []
    for how in ("as it is", "loaded", "by hand"):
        params = parameters(start)
        opt = pt.AGD(params)
        feed(opt, params, grads[:3])
        if how == "loaded":
            saved = opt.state_dict()
            saved["state"] = {k: {**entry, "step": step} for k, entry in saved["state"].items()}
            opt.load_state_dict(saved)
        elif how == "by hand":
            for p in params:
                opt.state[p]["step"] = step
        feed(opt, params, grads[3:])
        assert all(int(opt.state[p]["step"]) == 4 and opt.state[p]["step"].dtype == torch.int64 for p in params)
        results.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("step", [-1, 1.5, float("nan"), float("inf"), 2**70, True, "3", None, torch.ones(2), 1j])
def test_no_count_as_step(step: Any) -> None:
    start, grads = recorded(SHAPES, 1, torch.float32)
    params = parameters(start)
    opt = pt.AGD(params)
    feed(opt, params, grads)
    saved = opt.state_dict()
    saved["state"][1] = {**saved["state"][1], "step": step}
    with pytest.raises(ValueError, match="no valid step for parameter 1"):
        opt.load_state_dict(saved)
    opt.state[params[1]]["step"] = step
    with pytest.raises(ValueError, match=r"a parameter of size \[4\] has no valid step"):
        opt.step()


# ---- what is warned of ----------------------------------------------------------------------------------------------


def test_partial_and_infinite_states_are_warned_of_before_anything_is_loaded() -> None:
    start, grads = recorded(SHAPES, 2, torch.float32)
    params = parameters(start)
    opt = pt.AGD(params)
    feed(opt, params, grads)
    before = contents(opt)
    partial, infinite = copy.deepcopy(opt.state_dict()), copy.deepcopy(opt.state_dict())
    del partial["state"][1]
    infinite["state"][2]["m"][0, 0] = torch.inf
    for given, message in (
        (partial, "no state of parameters 1, which start afresh"),
        (infinite, "values that are not finite: m of 2"),
    ):
        with pytest.raises(UserWarning, match=message):
            opt.load_state_dict(given)
        assert same(before, contents(opt))
        with pytest.warns(UserWarning, match=message):
            opt.load_state_dict(given)
        opt.load_state_dict(dict(zip(("param_groups", "state"), before, strict=True)))
    params[1].requires_grad = False  # frozen: it needs none
    opt.load_state_dict(partial)
    opt.load_state_dict({"state": {}, "param_groups": before[0]})  # saved before the first step


def test_a_parameter_twice_is_refused() -> None:
    params = parameters([torch.ones(2), torch.ones(2)])
    opt = pt.Optimizer(params, pr.Adam())
    saved = opt.state_dict()
    saved["param_groups"][0]["params"] = [0, 0]
    with pytest.raises(ValueError, match="has a parameter twice in its groups"):
        opt.load_state_dict(saved)
