"""The cases of PyTorch's optimizers for ``fuzz.py``: names, refused and interrupted steps, checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from fuzz import BETA2, MAKERS, Found, Record, Rng, bad_values, bits, built, draw_fields, kind, pick

import precond_ref_torch
from precond_ref.registry import class_of

Shape = tuple[int, ...]
SHAPES: tuple[Shape, ...] = ((3, 2), (3, 2), (2, 4), (4,), (4,), (5,), (), (2, 3, 2), (2, 2, 2, 2))


@dataclass(frozen=True, repr=False)
class Group(Record):
    """Parameters of these shapes, with a method of their own or with the method of the optimizer."""

    shapes: tuple[Shape, ...] = ((3, 2),)
    make: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class OptimizerCase(Record):
    """An optimizer, the number of its steps, and the action after them; ``seed`` chooses the details."""

    action: str
    make: str = "Adam"
    fields: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[Group, ...] = (Group(),)
    dtype: str = "float32"
    steps: int = 1
    seed: int = 0


def draw(rng: Rng, names: list[str]) -> OptimizerCase:
    """Return a case whose optimizer takes its groups."""
    while True:
        groups = []
        for _ in range(rng.integers(1, 4)):
            make = pick(rng, names) if rng.random() < 0.5 else None
            shapes = tuple(pick(rng, SHAPES) for _ in range(rng.integers(1, 4)))
            groups.append(Group(shapes, make, draw_fields(rng, make) if make else {}))
        action, make, dtype = pick(rng, list(ACTIONS)), pick(rng, names), pick(rng, ("float32", "float64"))
        if action == "bytes":  # large, and several that may share a buffer
            groups = [Group(((24,) if make == "FullAdaGrad" else pick(rng, ((48, 48), (1500,))),) * 8)]
        details = int(rng.integers(1, 4)), int(rng.integers(10**6))
        case = OptimizerCase(action, make, draw_fields(rng, make), tuple(groups), dtype, *details)
        try:
            optimizer(case)
        except (ValueError, TypeError):  # heads that do not divide the rows
            continue
        return case


def smaller(case: OptimizerCase) -> Iterator[OptimizerCase]:
    """Yield the case with one part left out or simplified."""
    changes: list[dict[str, Any]] = [{"steps": 1}, {"make": "Adam", "fields": {}}, {"dtype": "float32"}]
    for i, group in enumerate(case.groups):
        before, after = case.groups[:i], case.groups[i + 1 :]
        parts: list[dict[str, Any]] = [{"make": None, "fields": {}}]
        if before or after:
            changes.append({"groups": before + after})
        if len(group.shapes) > 1:
            parts += [{"shapes": group.shapes[:j] + group.shapes[j + 1 :]} for j in range(len(group.shapes))]
        parts += [{"fields": {k: v for k, v in group.fields.items() if k != name}} for name in group.fields]
        changes += [{"groups": (*before, group.but(**part), *after)} for part in parts]
    changes += [{"fields": {k: v for k, v in case.fields.items() if k != name}} for name in case.fields]
    changes += [{"seed": seed} for seed in range(3)]
    yield from (other for other in (case.but(**change) for change in changes) if other != case)


def optimizer(case: OptimizerCase) -> Any:
    """Return the optimizer before its first step."""
    generator, groups = torch.Generator().manual_seed(case.seed), []
    for group in case.groups:
        params = [torch.randn(s, generator=generator, dtype=getattr(torch, case.dtype)) for s in group.shapes]
        own = {"method": built(group.make, group.fields)} if group.make else {}
        groups.append({"params": [torch.nn.Parameter(p) for p in params], **own})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", BETA2, UserWarning)
        return precond_ref_torch.Optimizer(groups, built(case.make, case.fields), lr=0.125)


def params_of(opt: Any) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]


def give_gradients(opt: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params_of(opt):
        p.grad = None
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def stepped(case: OptimizerCase) -> Any:
    """Return the optimizer after the case's steps, with the gradients of one more step."""
    opt = optimizer(case)
    for step in range(case.steps):
        give_gradients(opt, step)
        opt.step()
    give_gradients(opt, case.steps)
    return opt


def parts(opt: Any) -> list[Any]:
    """Return for each parameter its bits and those of its state."""
    return [(*bits(p.detach()), {k: bits(v) for k, v in opt.state.get(p, {}).items()}) for p in params_of(opt)]


def settings(opt: Any) -> str:
    return repr([{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups])


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


# ---- the actions: each returns what is wrong, or None ---------------------------------------------------------------


def names(case: OptimizerCase, rng: Rng) -> str | None:
    """Check a group that names its method by a string; its weight decay is that of the optimizer."""
    name = pick(rng, list(MAKERS))
    arguments = inspect.signature(MAKERS[name]).parameters
    drawn = draw_fields(rng, name)
    required = {n: drawn[n] for n, p in arguments.items() if p.default is p.empty}
    method, ends = built(name, required), []
    if "weight_decay" in inspect.signature(type(method)).parameters:  # the optimizer's, as for every method
        method = method.replace(weight_decay=getattr(built(case.make, case.fields), "weight_decay", 0.0))
    start = torch.randn((5,) if method.ndims[1] == 1 else (4, 3), generator=torch.Generator().manual_seed(case.seed))
    for own in ({"method": name, **required}, {"method": method}):
        group = {"params": [torch.nn.Parameter(start.clone())], **own}
        try:
            opt = precond_ref_torch.Optimizer([group], built(case.make, case.fields), lr=0.125)
        except Exception as error:
            return f"a group with method={name!r}: {said(error)}"
        for step in range(3):
            give_gradients(opt, step)
            opt.step()
        ends.append(parts(opt))
    return None if ends[0] == ends[1] else f"a group with method={name!r} is not run as {method!r}"


def refused(case: OptimizerCase, rng: Rng) -> str | None:
    """Check a bad hyperparameter, or a parameter that has become another one."""

    opt = stepped(case)
    group = pick(rng, opt.param_groups)
    param = pick(rng, group["params"])
    bads: list[tuple[str, Any]] = [("lr", v) for v in (None, math.nan, math.inf, -1.0, "x", [0.1])]
    bads += [("weight_decay", v) for v in (-1.0, math.nan, None, "x")] + [("maximize", v) for v in ("no", 1, None)]
    fields = dataclasses.fields(class_of(group["method"]))  # type: ignore[arg-type]
    bads += [(f.name, pick(rng, bad_values(str(f.type)))) for f in fields]
    name, value = pick(rng, [*bads, *[("dtype", None), ("shape", None)] * 2])
    if name == "shape" and not any(torch.is_tensor(v) and v.ndim for v in opt.state[param].values()):
        name, value = "lr", None  # SGD without momentum keeps nothing of a shape
    if name in ("dtype", "shape"):
        what, param.grad = f"{name} of a parameter changed", None
        wider = torch.float64 if case.dtype == "float32" else torch.float32
        param.data = param.data.to(wider) if name == "dtype" else torch.zeros((*param.shape, 2), dtype=param.dtype)
        give_gradients(opt, case.steps)
    else:
        what, group[name] = f"group[{name!r}] = {value!r}", value
    before = parts(opt)
    try:
        opt.step()
        return f"{what} is accepted"
    except Exception as error:
        moved = sum(b != a for b, a in zip(before, parts(opt), strict=True))
        if moved or not isinstance(error, (ValueError, TypeError)) or not str(error).strip():
            return (
                f"{what} is refused with {said(error)}, {moved} of {len(before)} parameters or their states have moved"
            )
    return None


def torn(case: OptimizerCase, rng: Rng) -> str | None:
    """Check an exception at some call that the package makes inside ``step``."""
    whole = stepped(case)
    calls, _ = interrupted(whole, -1, KeyboardInterrupt)
    opt, at = stepped(case), int(rng.integers(calls))
    before, error = parts(opt), pick(rng, (KeyboardInterrupt, RuntimeError, np.linalg.LinAlgError))
    _, where = interrupted(opt, at, error)
    half = sum(now not in ends for now, *ends in zip(parts(opt), before, parts(whole), strict=True))
    return (
        f"{error.__name__} at call {at + 1} of {calls}, {where}: {half} parameters are half stepped" if half else None
    )


def interrupted(opt: Any, at: int, error: type[BaseException]) -> tuple[int, str]:
    """Make a step that raises ``error`` at this call; return the number of calls, and the called function."""
    count, where = 0, ""

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count, where
        if event in ("call", "c_call") and frame.f_globals.get("__name__", "").startswith("precond_ref"):
            count += 1
            if count == at + 1:
                where = getattr(argument, "__name__", frame.f_code.co_name)
                raise error("injected")

    try:
        sys.setprofile(profile)
        opt.step()
    except BaseException:
        if not where:
            raise
    finally:
        sys.setprofile(None)
        torch.set_grad_enabled(True)
    return count, where


def resume(case: OptimizerCase, rng: Rng) -> str | None:
    """Check that a run goes on from a checkpoint, through `torch.save` or not."""
    opt, other = stepped(case), stepped(case.but(steps=int(rng.integers(0, 3))))
    opt.describe()
    saved = opt.state_dict()
    if rng.random() < 0.5:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    finite = all(bool(torch.isfinite(value).all()) for entry in opt.state.values() for value in entry.values())
    with warnings.catch_warnings():
        if not finite:  # as of a polynomial that diverges
            warnings.filterwarnings("ignore", ".* values that are not finite", UserWarning)
        other.load_state_dict(saved)
    for p, q in zip(params_of(opt), params_of(other), strict=True):
        q.data = p.data.clone()
    for step in (11, 12):
        for one in (opt, other):
            give_gradients(one, step)
            one.step()
    return None if parts(opt) == parts(other) else "a resumed optimizer goes on otherwise"


def mutated(case: OptimizerCase, rng: Rng) -> str | None:
    """Check a checkpoint with one entry replaced or left out."""
    saved = copy.deepcopy(stepped(case).state_dict())
    places: list[tuple[Any, Any, str]] = []

    def walk(value: Any, path: str) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            places.append((value, key, f"{path}[{key!r}]"))
            if isinstance(value[key], (dict, list)):
                walk(value[key], f"{path}[{key!r}]")

    walk(saved, "saved")
    container, key, path = pick(rng, places)
    old, partial = container[key], False
    junk: list[Any] = [None, "x", -1, 1.5, math.nan, [], {}, (1,), torch.zeros(2), True, b"x"]
    if isinstance(old, torch.Tensor) and rng.random() < 0.7:
        junk = [old[None], old.to(torch.complex64), -old - 1]
        if old.is_floating_point():
            junk = [*junk[:2], old.half(), *[torch.full_like(old, x) for x in (math.nan, math.inf)] * 2]
    if key == "compile":  # compiling is not loading
        junk = [value for value in junk if not isinstance(value, (bool, str))]
    if rng.random() < 0.3:
        what, partial, _ = f"del {path}", isinstance(old, torch.Tensor), container.pop(key)
    else:
        new = container[key] = pick(rng, junk)
        partial = isinstance(new, torch.Tensor) and not bool(torch.isfinite(new).all())
        what = f"{path} = {f'{kind(new)} {new.flatten()[:1].tolist()}' if isinstance(new, torch.Tensor) else repr(new)}"
    opt = stepped(case.but(steps=1))
    before = parts(opt), settings(opt)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            opt.load_state_dict(saved)
        except ValueError as error:
            fine = str(error).strip() and (parts(opt), settings(opt)) == before
            return None if fine else f"{what}: refused without a message, or after something was loaded"
        except Exception as error:
            return f"{what}: {said(error)}"
    if partial and not warned:
        return f"{what} is loaded in silence"
    give_gradients(opt, case.steps)
    try:
        opt.step()
    except Exception as error:
        return f"{what} is loaded, and step raises {said(error)}"
    return None


def saved_bytes(case: OptimizerCase, rng: Rng) -> str | None:
    """Check the number of bytes that are saved for the state of each parameter."""
    saved = stepped(case).state_dict()["state"]
    for entry in saved.values():
        file, own = io.BytesIO(), sum(value.numel() * value.element_size() for value in entry.values())
        torch.save(entry, file)
        if file.tell() > own + 2048 + 1024 * len(entry):
            return f"torch.save of one state writes {file.tell()} bytes for {own}"
    return None


ACTIONS: dict[str, Callable[[OptimizerCase, Rng], str | None]] = {
    "names": names, "refused": refused, "torn": torn, "resume": resume, "mutated": mutated, "bytes": saved_bytes,
}  # fmt: skip


def examined(case: OptimizerCase) -> tuple[list[Found], int]:
    """Return the violations of a case, and its number of updates."""
    optimizer(case)  # ValueError or TypeError for what is no case
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", BETA2, UserWarning)
        try:
            text = ACTIONS[case.action](case, np.random.default_rng(case.seed))
        except Exception as error:
            text = said(error)
    found = [Found(case.action, text)] if text else []
    return found, (case.steps + 1) * sum(len(group.shapes) for group in case.groups)


def violations(case: OptimizerCase) -> list[Found]:
    """Return the violations of a case."""
    return examined(case)[0]
