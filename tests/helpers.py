"""What several test files share: gradient sequences, running a method on a backend, comparing."""

from __future__ import annotations

from typing import Any

import numpy as np
from configs import Config
from conftest import Backend

STEPS = 7


def gradients(shape: tuple[int, ...], steps: int = STEPS, seed: int = 0) -> np.ndarray:
    """Well-conditioned gradients, (steps, *shape)."""
    return np.random.default_rng(seed).standard_normal((steps, *shape))


def run(
    backend: Backend, config: Config, grads: np.ndarray, dtype: str, stack_ndim: int = 0, moving: bool = False
) -> Any:
    """Directions on the host, (steps, *shape), and the last state; no graph is made twice.

    ``moving``: of a parameter that grows.
    """
    update = backend.update(config.method)
    param = backend.asarray(np.full(grads.shape[1:], 0.5), dtype)  # not zero: some methods have a decay of their own
    state = config.method.init(param, stack_ndim=stack_ndim)
    directions = []
    for g in grads:
        direction, state = update(backend.asarray(g, dtype), state, param)
        param = param + 0.125 if moving else param
        assert direction.dtype == param.dtype
        assert tuple(direction.shape) == tuple(param.shape)
        directions.append(backend.numpy(direction))
    if hasattr(update, "graphs"):
        assert update.graphs == len(update.refreshes)
    return np.stack(directions), state


def directions(method: Any, grads: np.ndarray) -> np.ndarray:
    """Directions of a gradient sequence, (steps, *shape)."""
    state = method.init(np.zeros(grads.shape[1:]))
    out = []
    for g in grads:
        d, state = method.update(g, state, np.zeros(g.shape))
        out.append(d)
    return np.stack(out)


def leaves(state: Any) -> list[Any]:
    """Arrays of a state."""
    if isinstance(state, tuple):
        return [leaf for part in state for leaf in leaves(part)]
    return [state] if hasattr(state, "dtype") and hasattr(state, "shape") else []


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Largest normwise relative difference over the steps."""
    gaps = [np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-300) for x, y in zip(a, b, strict=True)]
    return float(np.max(gaps))  # unlike max, NaN where there is one
