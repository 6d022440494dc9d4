"""What a case is, and what the families make cases with: float64 arrays of small integers times powers of 2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case; the fields are those of its manifest entry, ``method/name`` its id.

    ``config`` names every argument of the constructor, so that a vector does not depend on anyone's defaults.
    """

    method: str
    name: str
    why: str
    config: Mapping[str, Any]
    shape: tuple[int, ...]
    constructor: str = ""
    """``method`` if empty."""
    kind: str = "trace"
    tier: str = "must"
    catches: tuple[str, ...] = ()
    param: Any = None
    """Of ``shape``: first parameter of a trace."""
    grads: Any = None
    """(T, *shape) of a trace."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Tensors given to a primitive."""
    lr: float | tuple[float, ...] = 0.5
    """A tuple has one for each step."""
    decay: float = 0.0
    """Decoupled: x <- (1 - lr decay) x - lr direction."""
    stack_ndim: int = 0
    argument: str = ""
    """Of a reject: what is refused, a field of ``config``, or "param" for its shape."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What the constructor makes of ``config``, where that is something else."""
    version: int = 1
    """Of the vectors; the fields below are version 2's."""
    generated: Mapping[str, Any] = field(default_factory=dict)
    """Inputs that are not stored: arguments of `precond_ref.conformance.generated.tensor` without the shape."""
    checkpoints: tuple[int, ...] = ()
    """Steps, counted from 1, whose results are stored; () is all."""
    fold: int = 0
    """Results of more entries are folded."""
    deep: bool = False
    """Whether it is left out unless asked for."""


def integers(seed: int, shape: tuple[int, ...], low: int = -3, high: int = 3) -> np.ndarray:
    """Integers from ``low`` to ``high``, the same on every machine: a linear congruential generator (Knuth's MMIX)."""
    out = np.empty(shape)
    state, flat = (seed + 1) * 0x9E3779B97F4A7C15 % 2**64, out.reshape(-1)
    for i in range(flat.size):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        flat[i] = low + (state >> 33) % (high - low + 1)
    return out


def with_zeros(seed: int, shape: tuple[int, ...], *at: int) -> np.ndarray:
    """Five integer gradients, zero at the steps ``at``, counted from 0."""
    grads = integers(seed, (5, *shape))
    grads[list(at)] = 0
    return grads


DECAY = "decay-coupled decay-without-lr decay-after decay-ignored"


def maker(
    method: str, config: Mapping[str, Any], shape: tuple[int, ...], constructor: str = ""
) -> tuple[Callable[..., Case], Callable[..., Case]]:
    """Makers of a method's traces and rejects from a complete ``config``, of which each names what it changes."""

    def trace(
        name: str,
        why: str,
        catches: str = "",
        *,
        shape: tuple[int, ...] = shape,
        steps: int = 5,
        seed: int = 0,
        scale: float = 1,
        grads: Any = None,
        change: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Case:
        """On ``grads``, else on integers of ``seed`` times ``scale``; ``catches`` are words."""
        given = integers(seed, (steps, *shape)) * scale if grads is None else grads
        full = {**config, **(change or {})}
        return Case(
            method=method,
            constructor=constructor,
            name=name,
            why=why,
            catches=tuple(catches.split()),
            config=full,
            shape=shape,
            param=integers(seed + 1000, shape, 1, 5),
            grads=given,
            **fields,
        )

    def reject(
        name: str, why: str, argument: str, *, shape: tuple[int, ...] = shape, version: int = 1, **change: Any
    ) -> Case:
        full = {**config, **change}
        return Case(
            method=method,
            constructor=constructor,
            name=f"reject-{name}",
            why=why,
            config=full,
            shape=shape,
            kind="reject",
            argument=argument,
            version=version,
        )

    return trace, reject
