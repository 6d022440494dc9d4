"""What the PyTorch adapter's tests share: recorded runs, the same by the core, checks and mistakes they catch."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from configs import CONFIGS, LOUD, Decayed
from torch import Tensor

import precond_ref as pr
import precond_ref_torch as pt
from precond_ref.protocol import Method
from precond_ref_torch import buckets, optimizer, states

ONE_EACH = {name: next(iter(variants.values())) for name, variants in LOUD.items()}


def _takes_model(method: Method) -> bool:
    """Whether the matrices of the distributed tests' model fit: not those of heads or of one structure per axis."""
    try:
        for shape in ((7, 5), (7, 7), (1, 7)):
            if method.takes(shape):
                states.template(method, shape, torch.float64)
    except ValueError:
        return False
    return True


FSDP = [name for name, config in CONFIGS.items() if _takes_model(config.method)]
FSDP_EACH = list({CONFIGS[name].method.name: name for name in reversed(FSDP)}.values())
"""One of each method and preset."""


def recorded(shapes: list[tuple[int, ...]], steps: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """Start values, and for each step a gradient per parameter."""
    generator = torch.Generator().manual_seed(seed)
    draw = [
        [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes] for _ in range(steps + 1)
    ]
    return draw[0], draw[1:]


def parameters(values: list[Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(v.clone()) for v in values]


def feed(opt: torch.optim.Optimizer, params: list[Any], grads: list[Any], steps: Any = None) -> None:
    """One step per entry of ``grads``; None stands for no gradient."""
    for row in grads:
        for p, g in zip(params, row, strict=True):
            p.grad = None if g is None else g.clone()
        opt.step()


def by_core(method: Method, start: list[Tensor], grads: list[Any], lr: float, decay: float = 0.0) -> list[Tensor]:
    """Each parameter alone, by the core: ``x (1 - lr decay) - lr direction``, skipped without a gradient."""
    result = []
    for i, x in enumerate(start):
        state = method.init(x)
        for row in grads:
            if row[i] is not None:
                direction, state = method.update(row[i], state, x)
                x = x * (1 - lr * decay) - lr * direction
        result.append(x)
    return result


def distance(got: list[Any], expected: list[Any]) -> float:
    """Largest normwise relative difference of two lists of tensors; NaN where there is one."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(got, expected, strict=True)]
    return float(
        np.max([float((a - b).norm() / b.norm().clamp_min(1e-300)) for a, b in pairs])
    )  # NaN where there is one


def through_file(state_dict: Any) -> Any:
    """``state_dict`` after torch.save and torch.load(weights_only=True)."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def forced(method: Method, **options: Any) -> dict[str, Any]:
    """Arguments for `Optimizer` that give every parameter to ``method``, whatever it takes by default."""
    return {"method": method, "fallback": method, **options}


# ---- checks: each takes the optimizer class, and must fail for the mistakes listed with it -------------------------


def check_agrees_with_core(cls: Any) -> None:
    """Groups with their own rates and decays, members without a gradient at some steps."""
    for config in (ONE_EACH["AGD"], ONE_EACH["Adam"], ONE_EACH["ASGO"], ONE_EACH["Shampoo"]):
        start, grads = recorded([config.shape] * 5, 8)
        grads[2][1] = grads[5][1] = grads[5][4] = grads[0][3] = None
        params = parameters(start)
        rates = ((0.25, 0.5), (0.125, 0.0))
        groups = [
            {"params": params[:3], "lr": rates[0][0], "weight_decay": rates[0][1]},
            {"params": params[3:], "lr": rates[1][0], "weight_decay": rates[1][1]},
        ]
        feed(cls(groups, **forced(config.method, lr=0.5)), params, grads)
        expected = by_core(config.method, start[:3], [row[:3] for row in grads], *rates[0])
        expected += by_core(config.method, start[3:], [row[3:] for row in grads], *rates[1])
        assert distance(params, expected) <= 1e-13


def check_pieces_of_a_stack(cls: Any) -> None:
    """Five matrices by twos and a last one, and one by one."""
    for name in ("ASGO", "Shampoo", "IFShampoo", "SShampoo"):
        method, shape = ONE_EACH[name].method, ONE_EACH[name].shape
        start, grads = recorded([shape] * 5, 8)
        expected = by_core(method, start, grads, 0.125)
        for count in (2, 1):
            params = parameters(start)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(buckets, "PIECE_BYTES", count * start[0].nbytes)
                opt = cls(params, **forced(method, lr=0.125))
                feed(opt, params, grads)
            assert distance(params, expected) <= 1e-13
            assert [len(bucket.pieces) for bucket in opt._plans[0].buckets] == [-(-5 // count)]


def check_maximize(cls: Any) -> None:
    """Climbing is descending with negated gradients, bit for bit; p.grad and its values stay what they were."""
    for config in (ONE_EACH["AGD"], ONE_EACH["ASGO"], ONE_EACH["SGD"]):
        for count in (1, 3):
            start, grads = recorded([config.shape] * count, 4)
            down, up = parameters(start), parameters(start)
            feed(cls(down, **forced(config.method)), down, [[-g for g in row] for row in grads])
            opt = cls(up, **forced(config.method, maximize=True))
            for row in grads:
                given = [g.clone() for g in row]
                for p, g in zip(up, given, strict=True):
                    p.grad = g
                opt.step()
                assert all(p.grad is g and torch.equal(g, r) for p, g, r in zip(up, given, row, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(up, down, strict=True))


def check_resume(cls: Any) -> None:
    """Saved at any step and loaded into a new optimizer: the same bits, also after the first went on."""
    for dtype in (torch.float64, torch.bfloat16):
        for config in (ONE_EACH["AGD"], ONE_EACH["ASGO"], CONFIGS["Shampoo-every"]):
            start, grads = recorded([config.shape] * 3, 6, dtype)
            grads[0][2] = grads[3][1] = None
            params = parameters(start)
            opt = cls(params, **forced(config.method, lr=0.125))
            saved = []
            for row in grads:
                saved.append((through_file(opt.state_dict()), [p.detach().clone() for p in params]))
                feed(opt, params, [row])
            for step, (state_dict, values) in enumerate(saved):
                again = parameters(values)
                other = cls(again, **forced(config.method, lr=0.5))
                with warnings.catch_warnings(action="ignore"):  # the last parameter's first gradient comes later
                    other.load_state_dict(state_dict)
                assert other.state_dict()["param_groups"] == opt.state_dict()["param_groups"]
                feed(other, again, grads[step:])
                assert all(torch.equal(a, b) for a, b in zip(again, params, strict=True))


def check_loaded_is_a_copy(cls: Any) -> None:
    """Loading a state dict that is still in use: neither optimizer changes the other."""
    config = ONE_EACH["Adam"]
    start, grads = recorded([config.shape], 6)
    a, b = parameters(start), parameters(start)
    first, second = cls(a, **forced(config.method)), cls(b, **forced(config.method))
    feed(first, a, grads[:3])
    given = first.state_dict()
    second.load_state_dict(given)
    before = second.state[b[0]]["m"].clone()
    feed(first, a, grads[3:])
    assert torch.equal(second.state[b[0]]["m"], before)
    feed(second, b, grads[3:])
    assert torch.equal(given["state"][0]["m"], before)


def check_refused_load_changes_nothing(cls: Any) -> None:
    """Another shape in the last parameter: an error, and everything as before."""
    config = ONE_EACH["ASGO"]
    start, grads = recorded([config.shape] * 2, 3)
    params = parameters(start)
    opt = cls(params, **forced(config.method, lr=0.125))
    feed(opt, params, grads)
    other = parameters([start[0], start[1][:, :2]])
    wrong = cls(other, **forced(config.method, lr=0.5))
    feed(wrong, other, [[row[0], row[1][:, :2]] for row in grads])
    before = through_file(opt.state_dict())
    with pytest.raises(ValueError, match="shape"):
        opt.load_state_dict(wrong.state_dict())
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, entry in before["state"].items():
        assert all(torch.equal(after["state"][key][name], value) for name, value in entry.items())


def check_low_precision(cls: Any) -> None:
    """bfloat16 parameters: float32 statistics, and one rounding of the float32 result per step."""
    for method in (ONE_EACH["AGD"].method, ONE_EACH["ASGO"].method):
        start, grads = recorded([(5, 3)] * 2, 6, torch.bfloat16)
        params = parameters(start)
        opt = cls(params, **forced(method, lr=0.125, weight_decay=0.5))
        feed(opt, params, grads)
        for i, x in enumerate(start):
            state = method.init(x.float())
            for row in grads:
                direction, state = method.update(row[i].float(), state, x.float())
                x = (x.float() * (1 - 0.125 * 0.5) - 0.125 * direction).to(torch.bfloat16)
            assert all(v.dtype == torch.float32 for k, v in opt.state[params[i]].items() if k != "step")
            # float32 results that differ by rounding (stacked or not) may round to neighbours: one bfloat16 unit
            assert torch.equal(params[i], x) or distance([params[i].float()], [x.float()]) <= 2**-9


def check_replaced_state(cls: Any) -> None:
    """State replaced by the user (moved, zeroed, or cleared) is used at the next step."""
    config = ONE_EACH["Adam"]
    start, grads = recorded([config.shape] * 2, 5)
    params = parameters(start)
    opt = cls(params, **forced(config.method, lr=0.125))
    feed(opt, params, grads[:2])
    for p in params:
        opt.state[p]["m"] = torch.zeros_like(p)
    values = [p.detach().clone() for p in params]
    old = [opt.state[p]["v"].clone() for p in params]
    feed(opt, params, grads[2:3])
    for p, x, v, g in zip(params, values, old, grads[2], strict=True):
        direction, _ = config.method.update(g, type(config.method.init(x))(step=2, m=torch.zeros_like(x), v=v), x)
        assert distance([p], [x - 0.125 * direction]) <= 1e-13
    opt.state.clear()
    values = [p.detach().clone() for p in params]
    feed(opt, params, grads[3:])
    assert distance(params, by_core(config.method, values, grads[3:], 0.125)) <= 1e-13


def check_changed_hyperparameter(cls: Any) -> None:
    """A field or rate of a group changed between steps (by a scheduler) is used from then on."""
    start, grads = recorded([(3, 2)] * 2, 4)
    params = parameters(start)
    opt = cls(params, method=pr.SGD(momentum=0.5), lr=0.5)
    feed(opt, params, grads[:2])
    opt.param_groups[0]["momentum"] = 0.75
    opt.param_groups[0]["lr"] = 0.25
    feed(opt, params, grads[2:])
    for i, x in enumerate(start):
        buffer = torch.zeros_like(x)
        for row, momentum, lr in zip(grads, (0.5, 0.5, 0.75, 0.75), (0.5, 0.5, 0.25, 0.25), strict=True):
            buffer = momentum * buffer + row[i]
            x = x - lr * buffer
        assert distance([params[i]], [x]) <= 1e-13


def check_own_decay(cls: Any) -> None:
    """A method with its own weight_decay gets the adapter's, and nothing is decayed a second time."""
    start, grads = recorded([(3, 2)] * 2, 4)
    params = parameters(start)
    feed(cls(params, method=Decayed(weight_decay=0.25), lr=0.125), params, grads)
    for i, x in enumerate(start):
        buffer = torch.zeros_like(x)
        for row in grads:
            buffer = 0.5 * buffer + row[i] + 0.25 * x
            x = x - 0.125 * buffer
        assert distance([params[i]], [x]) <= 1e-13


def check_refused_gradient_changes_nothing(cls: Any) -> None:
    """A sparse gradient in the last group: an error before any parameter moves."""
    start, _ = recorded([(3, 2), (4, 2)], 1)
    params = parameters(start)
    opt = cls([{"params": params[:1]}, {"params": params[1:]}], method=pr.Adam())
    params[0].grad = torch.ones(3, 2, dtype=torch.float64)
    params[1].grad = torch.ones(4, 2, dtype=torch.float64).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        opt.step()
    assert all(torch.equal(p, x) for p, x in zip(params, start, strict=True))


# ---- planted mistakes -----------------------------------------------------------------------------------------------

BASE = pt.Optimizer
Patch = tuple[Any, str, Any]


class CastOnLoad(BASE):
    def load_state_dict(self, state_dict: Any) -> None:
        torch.optim.Optimizer.load_state_dict(self, state_dict)


class StepLost(BASE):
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for entry in self.state.values():
            entry["step"].zero_()


class HalfLoaded(BASE):
    def _merged_groups(self, saved_groups: Any) -> Any:
        self.param_groups = super()._merged_groups(saved_groups)
        return self.param_groups


class AliasOnLoad(BASE):
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for entry, saved in zip(self.state.values(), state_dict["state"].values(), strict=True):
            entry.update(saved)


class UnequalStepsStacked(BASE):
    def _labels(self, group: Any) -> Iterator[Any]:
        for label, size, member in super()._labels(group):
            yield label[:-1], size, member


class GroupRateIgnored(BASE):
    def _update(self, *given: Any) -> None:
        kept = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = self.defaults["lr"]
        super()._update(*given)
        for group, lr in zip(self.param_groups, kept, strict=True):
            group["lr"] = lr


class MissingGradientIsZero(BASE):
    def _update(self, *given: Any) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        super()._update(*given)


class ChecksTooLate(BASE):
    def _update(self, *given: Any) -> None:
        for group in self.param_groups:
            groups, self.param_groups = self.param_groups, [group]
            try:
                super()._update(*given)
            finally:
                self.param_groups = groups


def _decay_after(group: Any, bucket: Any, params: Any, directions: Any) -> None:
    lr, decay = group["lr"], group["weight_decay"]
    torch._foreach_add_(params, directions, alpha=-lr)
    torch._foreach_mul_(params, 1 - lr * decay)


def _decay_without_rate(group: Any, bucket: Any, params: Any, directions: Any) -> None:
    torch._foreach_mul_(params, 1 - group["weight_decay"])
    torch._foreach_add_(params, directions, alpha=-group["lr"])


def _decay_twice(group: Any, bucket: Any, params: Any, directions: Any) -> None:
    torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
    torch._foreach_add_(params, directions, alpha=-group["lr"])


def _rounds_twice(group: Any, bucket: Any, params: Any, directions: Any) -> None:
    torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
    for p, d in zip(params, directions, strict=True):
        p.sub_((group["lr"] * d).to(p.dtype))


def _negates_in_place(original: Any) -> Any:
    def directions(self: Any, grads: Any, params: Any, step: Any, scalars: Any, options: Any, *rest: Any) -> Any:
        if options["maximize"]:
            torch._foreach_neg_(grads)
        return original(self, grads, params, step, scalars, {**options, "maximize": False}, *rest)

    return directions


def _old_scalars(original: Any) -> Any:
    def directions(self: Any, grads: Any, params: Any, step: Any, scalars: Any, *rest: Any) -> Any:
        return original(self, grads, params, step, self.method.scalars(max(step, 1)), *rest)

    return directions


def _narrow(method: Any, dtype: torch.dtype) -> torch.dtype:
    return dtype


def _frozen(original: Any) -> Any:
    first: dict[Any, Any] = {}
    return lambda group: first.setdefault(id(group), original(group))


class Mutant(NamedTuple):
    """A mistake: a subclass of `Optimizer`, or patches of the package, and the check that must fail for it."""

    check: Callable[[Any], None]
    cls: Any = BASE
    patches: tuple[Patch, ...] = ()


def _first_states(original: Any) -> Any:
    def pieces(self: Any) -> Iterator[Any]:
        first, *rest = original(self)
        for piece in (first, *rest):
            fits = piece.span.stop - piece.span.start == first.span.stop - first.span.start
            yield piece._replace(span=first.span) if fits and not self.flat else piece

    return pieces


def _without_the_rest(original: Any) -> Any:
    def pieces(self: Any) -> list[Any]:
        found = list(original(self))
        return found[:-1] + found[-1:] * (len(found) < 3)

    return pieces


def _zero_parameters(gather: Any) -> Any:
    def gathered(self: Any) -> Any:
        grads, params = gather(self)
        return grads, [torch.zeros_like(p) for p in params]

    return gathered


MUTANTS: dict[str, Mutant] = {
    "pieces of a stack with the first one's states": Mutant(
        check_pieces_of_a_stack, patches=((buckets.Bucket, "_pieces", _first_states(buckets.Bucket._pieces)),)
    ),
    "last piece of a stack left out": Mutant(
        check_pieces_of_a_stack, patches=((buckets.Bucket, "_pieces", _without_the_rest(buckets.Bucket._pieces)),)
    ),
    "state cast to the parameter's dtype on load": Mutant(check_resume, CastOnLoad),
    "step not restored": Mutant(check_resume, StepLost),
    "loaded tensors shared with the state dict": Mutant(check_loaded_is_a_copy, AliasOnLoad),
    "groups loaded before the states are checked": Mutant(check_refused_load_changes_nothing, HalfLoaded),
    "gradient negated in place": Mutant(
        check_maximize, patches=((buckets.Bucket, "directions", _negates_in_place(buckets.Bucket.directions)),)
    ),
    "stacked with unequal steps": Mutant(
        check_agrees_with_core, UnequalStepsStacked, ((buckets.Bucket, "in_step", lambda self: True),)
    ),
    "groups' lr ignored": Mutant(check_agrees_with_core, GroupRateIgnored),
    "missing gradient taken as zero": Mutant(check_agrees_with_core, MissingGradientIsZero),
    "decay after the step": Mutant(check_agrees_with_core, patches=((optimizer, "_apply", _decay_after),)),
    "decay not times lr": Mutant(check_agrees_with_core, patches=((optimizer, "_apply", _decay_without_rate),)),
    "scalars of the step before": Mutant(
        check_agrees_with_core, patches=((buckets.Bucket, "directions", _old_scalars(buckets.Bucket.directions)),)
    ),
    "decayed inside and outside": Mutant(check_own_decay, patches=((optimizer, "_apply", _decay_twice),)),
    "parameter not handed to a method that reads it": Mutant(
        check_own_decay, patches=((buckets.Bucket, "gather", _zero_parameters(buckets.Bucket.gather)),)
    ),
    "statistics in bfloat16": Mutant(check_low_precision, patches=((states, "work_dtype", _narrow),)),
    "rounded twice per step": Mutant(check_low_precision, patches=((optimizer, "_apply", _rounds_twice),)),
    "replaced state ignored": Mutant(
        check_replaced_state, patches=((buckets.Bucket, "holds", lambda self, state: True),)
    ),
    "hyperparameters frozen at the first step": Mutant(
        check_changed_hyperparameter, patches=((optimizer, "_method", _frozen(optimizer._method)),)
    ),
    "sparse gradient found after other groups moved": Mutant(check_refused_gradient_changes_nothing, ChecksTooLate),
}

CHECKS: dict[str, Callable[[Any], None]] = {mutant.check.__name__: mutant.check for mutant in MUTANTS.values()}
