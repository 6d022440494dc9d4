"""The class of a case, and functions that make cases: float64 arrays of small integers times powers of 2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case; the fields are those of its manifest entry, ``method/name`` its id.

    ``config`` has every argument of the constructor, so that a vector does not depend on defaults.
    """

    method: str
    name: str
    why: str
    config: Mapping[str, Any]
    shape: tuple[int, ...]
    constructor: str = ""
    """The constructor of the method; empty means ``method``."""
    kind: str = "trace"
    tier: str = "must"
    catches: tuple[str, ...] = ()
    param: Any = None
    """First parameter of a trace, of ``shape``."""
    grads: Any = None
    """Gradients of a trace, (T, *shape)."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Tensors given to a primitive."""
    lr: float | tuple[float, ...] = 0.5
    """Learning rate; a tuple has one rate for each step."""
    decay: float = 0.0
    """Decoupled weight decay: x <- (1 - lr decay) x - lr direction."""
    stack_ndim: int = 0
    argument: str = ""
    """For a reject, the refused field of ``config``, or "param" for the shape."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields that the constructor makes of ``config``, if they differ from ``config``."""
    version: int = 1
    """Version of the vectors; only version 2 has the fields below."""
    generated: Mapping[str, Any] = field(default_factory=dict)
    """Inputs that are not stored: arguments of `precond_ref.conformance.generated.tensor` without the shape."""
    checkpoints: tuple[int, ...] = ()
    """Steps, counted from 1, whose results are stored; () means all steps."""
    fold: int = 0
    """Results with more entries than this are folded."""
    deep: bool = False
    """True if only a deep check runs the case."""


def integers(seed: int, shape: tuple[int, ...], low: int = -3, high: int = 3) -> np.ndarray:
    """Return integers from ``low`` to ``high``, the same on every machine, by Knuth's MMIX linear congruences."""
    out = np.empty(shape)
    state, flat = (seed + 1) * 0x9E3779B97F4A7C15 % 2**64, out.reshape(-1)
    for i in range(flat.size):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        flat[i] = low + (state >> 33) % (high - low + 1)
    return out


def with_zeros(seed: int, shape: tuple[int, ...], *at: int) -> np.ndarray:
    """Return five integer gradients, zero at the steps ``at``, counted from 0."""
    grads = integers(seed, (5, *shape))
    grads[list(at)] = 0
    return grads


DECAY = "decay-coupled decay-without-lr decay-after decay-ignored"


def maker(
    method: str, config: Mapping[str, Any], shape: tuple[int, ...], constructor: str = ""
) -> tuple[Callable[..., Case], Callable[..., Case]]:
    """Makers of a method's traces and rejects from a complete ``config``; a case names the fields that it changes."""

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
        """Return a trace on ``grads``, or on integers of ``seed`` times ``scale``; ``catches`` is a text of words."""
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
