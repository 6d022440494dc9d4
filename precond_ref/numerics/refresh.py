"""Doing expensive work only when it is due: the one place that knows about traced conditions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from precond_ref.typing import Array


def check_refresh(refresh: Any, every: int) -> bool:
    """``refresh``; TypeError unless it is a bool, ValueError for False where nothing is kept between updates."""
    if not isinstance(refresh, bool):
        raise TypeError(f"refresh must be True, False or None, got {refresh!r}")
    if every == 1 and not refresh:
        raise ValueError("refresh=False needs every > 1: with every=1 no root is kept from one update to the next")
    return refresh


def is_traced(value: Any) -> bool:
    """Whether ``value`` is a JAX tracer, whose truth cannot be asked."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.core.Tracer)


def _has_no_value(tensor: Any) -> bool:
    """Whether the truth of a PyTorch tensor cannot be asked: on the meta device, fake, or under `torch.func.vmap`."""
    functorch = sys.modules["torch"]._C._functorch
    return tensor.is_meta or hasattr(tensor, "fake_mode") or functorch.is_batchedtensor(tensor)


def renew(due: Any, compute: Callable[[], Array], previous: Array | None) -> Array:
    """``compute()`` if ``due`` else ``previous``; under ``jax.jit`` and ``torch.compile`` only one branch is run.

    Without a ``previous`` it is always due. Where ``due`` is a tensor without a value, both branches are run.
    """
    if previous is None:
        return compute()
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(due, torch.Tensor):
        if torch.compiler.is_compiling():
            return torch.cond(due, compute, lambda: previous.clone(), ())
        if _has_no_value(due):
            return torch.where(due, compute(), previous)
    if is_traced(due):
        return sys.modules["jax"].lax.cond(due, lambda _: compute(), lambda _: previous, None)
    return compute() if bool(due) else previous
