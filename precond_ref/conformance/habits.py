"""Ways in which training loops use a torch optimizer. Whatever the way, the steps are the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Grads = Sequence[torch.Tensor | None]


class Unfit(RuntimeError):
    """What a training loop cannot work with."""


def assigned(optimizer: Any, params: list[Any], grads: Grads) -> None:
    """Each gradient is a new tensor."""
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step()


def buffered(optimizer: Any, params: list[Any], grads: Grads) -> None:
    """One tensor per parameter is the gradient in all steps, set to zero in between."""
    optimizer.zero_grad(set_to_none=False)
    for p, g in zip(params, grads, strict=True):
        if g is None or p.grad is None:
            p.grad = g
        else:
            p.grad += g
    optimizer.step()


def loss_of(params: list[Any], grads: Grads, share: float = 1.0) -> Any:
    """A loss with these gradients."""
    return sum((share * p * g).sum() for p, g in zip(params, grads, strict=True) if g is not None)


def accumulated(optimizer: Any, params: list[Any], grads: Grads) -> None:
    """The gradient is the sum over two micro-batches."""
    optimizer.zero_grad()
    for share in (0.25, 0.75):
        loss_of(params, grads, share).backward()
    optimizer.step()


def closed(optimizer: Any, params: list[Any], grads: Grads) -> None:
    """``step(closure)``, in which the loss is computed."""
    calls = []

    def closure() -> Any:
        optimizer.zero_grad()
        loss = loss_of(params, grads)
        if not loss.requires_grad:
            raise Unfit("the closure is called without torch.enable_grad()")
        loss.backward()
        calls.append(loss)
        return loss

    returned = optimizer.step(closure)
    if len(calls) != 1:
        raise Unfit(f"the closure is called {len(calls)} times")
    if returned is None or float(returned.detach()) != float(calls[0].detach()):
        raise Unfit("step(closure) does not return the loss of the closure")


def closed_under_no_grad(optimizer: Any, params: list[Any], grads: Grads) -> None:
    """The same, called under ``torch.no_grad()``."""
    with torch.no_grad():
        closed(optimizer, params, grads)
        if torch.is_grad_enabled():
            raise Unfit("step(closure) leaves gradients enabled")


def scaled(optimizer: Any, params: list[Any], grads: Grads) -> None:
    """With a ``GradScaler``; before the step one that is skipped, for its gradient is infinite."""
    for factor in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(loss_of(params, grads, factor)).backward()
        scaler.step(optimizer)
        scaler.update()


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in the opposite order of memory; with gaps, if there is one axis."""
    if tensor.ndim < 2:
        return torch.stack([tensor, tensor], -1)[..., 0]
    axes = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(axes).contiguous().permute(axes)


def strided(optimizer: Any, params: list[Any], grads: Grads) -> None:
    """Gradients that are not contiguous."""
    assigned(optimizer, params, [None if g is None else transposed(g) for g in grads])


HABITS: Mapping[str, Callable[[Any, list[Any], Grads], None]] = {
    "": assigned,
    "one gradient buffer, zero_grad(set_to_none=False)": buffered,
    "two micro-batches a step": accumulated,
    "step(closure)": closed,
    "step(closure) under torch.no_grad()": closed_under_no_grad,
    "a GradScaler that skips steps": scaled,
    "gradients that are not contiguous": strided,
    "parameters that are not contiguous": strided,
}
"""Functions that give the gradients and make one step, by what is said of them."""


class Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the kernels that run, without overload."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))
