"""Branches for work that is due only in some updates; only this module treats traced conditions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from array_api_compat import is_numpy_array

from precond_ref.typing import Array


def check_refresh(refresh: Any, every: int | None = None) -> bool:
    """Return ``refresh``; TypeError unless it is a bool, ValueError for False if no root is kept between updates.

    ``every=None`` is for a method that always keeps a root or basis.
    """
    if not isinstance(refresh, bool):
        raise TypeError(f"refresh must be True, False or None, got {refresh!r}")
    if every == 1 and not refresh:
        raise ValueError("refresh=False needs every > 1: with every=1 no root is kept from one update to the next")
    return refresh


def is_traced(value: Any) -> bool:
    """Return whether ``value`` is a JAX tracer, which has no truth value."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.core.Tracer)


def _has_no_value(tensor: Any) -> bool:
    """Return whether a PyTorch tensor has no truth value: on the meta device, fake, or under `torch.func.vmap`."""
    functorch = sys.modules["torch"]._C._functorch
    return tensor.is_meta or hasattr(tensor, "fake_mode") or functorch.is_batchedtensor(tensor)


def readable(array: Array) -> bool:
    """Return whether it costs nothing to know values of ``array``: with NumPy, and PyTorch on the CPU.

    Return False where a device would have to be waited for, and in what is traced or compiled.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return not (torch.compiler.is_compiling() or array.device.type != "cpu" or _has_no_value(array))
    return bool(is_numpy_array(array))


def surely(condition: Array) -> bool:
    """Return whether all of ``condition`` is true, if it is `readable`; else False."""
    return readable(condition) and bool(condition.all())


def renew(due: Any, compute: Callable[[], Array], previous: Array | None) -> Array:
    """Return ``compute()`` if ``due``, else ``previous``, see `either`; without a ``previous`` it is always due."""
    if previous is None:
        return compute()
    # A compiled branch must not return one of its inputs.
    return either(due, compute, lambda: previous.clone() if _compiles(due) else previous)


def either(condition: Any, yes: Callable[[], Array], no: Callable[[], Array]) -> Array:
    """Return ``yes()`` or ``no()``; also under ``jax.jit`` and ``torch.compile`` only one branch runs.

    If ``condition`` is a tensor without a value, both branches run.
    """
    torch = sys.modules.get("torch")
    if _compiles(condition):
        return torch.cond(condition, yes, no, ())  # type: ignore[union-attr]
    if torch is not None and isinstance(condition, torch.Tensor) and _has_no_value(condition):
        return torch.where(condition, yes(), no())
    if is_traced(condition):
        return sys.modules["jax"].lax.cond(condition, lambda _: yes(), lambda _: no(), None)
    return yes() if bool(condition) else no()


def _compiles(condition: Any) -> bool:
    """Return whether ``condition`` is a tensor that ``torch.compile`` traces."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(condition, torch.Tensor) and torch.compiler.is_compiling()
