"""Ways in which training loops use a torch optimizer; each must give the same steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Grads = Sequence[torch.Tensor | None]


class Unfit(RuntimeError):
    """Raised for an optimizer that a training loop cannot work with."""


def assigned(optimizer: Any, params: list[Any], grads: Grads) -> None:
    """Make a step in which each gradient is a new tensor."""
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step()


def buffered(optimizer: Any, params: list[Any], grads: Grads) -> None:
    """Make a step in which each parameter keeps one gradient tensor, which is set to zero between steps."""
    optimizer.zero_grad(set_to_none=False)
    for p, g in zip(params, grads, strict=True):
        if g is None or p.grad is None:
            p.grad = g
        else:
            p.grad += g
    optimizer.step()


def loss_of(params: list[Any], grads: Grads, share: float = 1.0) -> Any:
    """Return a loss with these gradients, times ``share``."""
    return sum((share * p * g).sum() for p, g in zip(params, grads, strict=True) if g is not None)


def accumulated(optimizer: Any, params: list[Any], grads: Grads) -> None:
    """Make a step whose gradient is the sum over two micro-batches."""
    optimizer.zero_grad()
    for share in (0.25, 0.75):
        loss_of(params, grads, share).backward()
    optimizer.step()


def closed(optimizer: Any, params: list[Any], grads: Grads) -> None:
    """Make a step by ``step(closure)``; the closure computes the loss."""
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
    """Make a step by ``step(closure)`` under ``torch.no_grad()``."""
    with torch.no_grad():
        closed(optimizer, params, grads)
        if torch.is_grad_enabled():
            raise Unfit("step(closure) leaves gradients enabled")


def scaled(optimizer: Any, params: list[Any], grads: Grads) -> None:
    """Make a step with a ``GradScaler``, after one that the scaler skips because its gradient is infinite."""
    for factor in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(loss_of(params, grads, factor)).backward()
        scaler.step(optimizer)
        scaler.update()


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same values in the opposite order of memory; a vector gets gaps in memory."""
    if tensor.ndim < 2:
        return torch.stack([tensor, tensor], -1)[..., 0]
    axes = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(axes).contiguous().permute(axes)


def strided(optimizer: Any, params: list[Any], grads: Grads) -> None:
    """Make a step with gradients that are not contiguous."""
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
"""Functions that set the gradients and make one step, by their description in messages."""


class Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the kernels that run, without overload."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))
