"""What the families share: cases, the loop over steps, matrix functions and integers in 50-digit arithmetic.

Arrays are NumPy object arrays of mpmath numbers: ``+ - * /``, ``@``, ``np.tensordot``, indexing and reshaping work on
them. A family module has ``CASES``, a list of `Case`, and ``run(case)``, which gives a `Trace` for a case of kind
"trace" (made by `drive`) and a dict of tensors for one of kind "primitive" (its lists "_kappa" and "_decompositions"
are not stored); a "reject" is not run. A method is two functions of one parameter::

    start(param, c) -> state                                state: dict of field name -> array or number
    step(t, grad, param, state, c) -> direction, state, kappa       t = 1, 2, ...

``c`` has the config's fields as attributes, floats as mpmath numbers. State names are those of the stored tensors
without "state." ("m", "grams.0"); names that start with "_" are kept from step to step and not stored. ``kappa`` is the
condition number of the (ridged) statistic whose root the direction uses; for elementwise methods that of the bias
correction, 1 / (1 - beta2^t), or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import mpmath as mp
import numpy as np

DIGITS = mp.mp.dps = 50
TINY = mp.mpf(10) ** -40
"""What is below this, relative to the largest of its kind, is zero that arithmetic has blurred."""

Array = Any  # an object array of mpf


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
    param: Array = None
    """Of ``shape``: first parameter of a trace."""
    grads: Array = None
    """(T, *shape) of a trace."""
    inputs: Mapping[str, Array] = field(default_factory=dict)
    """Tensors given to a primitive."""
    lr: float = 0.5
    decay: float = 0.0
    """Decoupled: x <- (1 - lr decay) x - lr direction."""
    stack_ndim: int = 0
    argument: str = ""
    """Of a reject: what is refused, a field of ``config``, or "param" for its shape."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a method does on a case; lists have one entry per step."""

    directions: list[Array]
    params: list[Array]
    """After each step."""
    states: list[dict[str, Array]]
    kappas: list[Any]
    decompositions: list[int]
    """How many decompositions' errors are in the statistic: what a sketch is off by stays in it."""
    exponent: float = 0.0
    """Total exponent p of the root, as in L^-1/4 G R^-1/4: 0.5; 0 for none."""
    stale: bool = False
    """Whether a root may be older than the statistic."""


def drive(
    case: Case, start: Callable[..., dict], step: Callable[..., tuple], *, exponent: float = 0.0, stale: bool = False
) -> Trace:
    """Run a method over a case's gradients; stacked parameters one after the other."""
    if case.stack_ndim:
        first = replace(case, stack_ndim=case.stack_ndim - 1, shape=case.shape[1:])
        members = [
            drive(replace(first, param=case.param[i], grads=case.grads[:, i]), start, step)
            for i in range(case.shape[0])
        ]
        steps = range(len(case.grads))
        return Trace(
            directions=[np.stack([m.directions[t] for m in members]) for t in steps],
            params=[np.stack([m.params[t] for m in members]) for t in steps],
            states=[
                {k: np.stack([exact(m.states[t][k]) for m in members]) for k in members[0].states[t]} for t in steps
            ],
            kappas=[max(m.kappas[t] for m in members) for t in steps],
            decompositions=members[0].decompositions,
            exponent=exponent,
            stale=stale,
        )
    c = namespace(case.config)
    lr, decay, param = mp.mpf(case.lr), mp.mpf(case.decay), exact(case.param)
    state, trace = (
        start(param, c),
        Trace(directions=[], params=[], states=[], kappas=[], decompositions=[], exponent=exponent, stale=stale),
    )
    for t, grad in enumerate(exact(case.grads), start=1):
        direction, state, kappa = step(t, exact(grad), param, state, c)
        param = (1 - lr * decay) * param - lr * direction
        trace.directions.append(direction)
        trace.params.append(param)
        trace.states.append({name: exact(value) for name, value in state.items() if not name.startswith("_")})
        trace.kappas.append(kappa)
        trace.decompositions.append(state.get("_decompositions", 1))
    return trace


def namespace(config: Mapping[str, Any]) -> SimpleNamespace:
    """The config with its floats as mpmath numbers."""
    return SimpleNamespace(**{k: mp.mpf(v) if isinstance(v, float) else v for k, v in config.items()})


# ---- arrays ---------------------------------------------------------------------------------------------------------


def exact(values: Any) -> Array:
    """Object array of mpmath numbers with exactly these values."""
    values = np.asarray(values)
    out = np.empty(values.shape, dtype=object)
    out.reshape(-1)[:] = [mp.mpf(v if isinstance(v, mp.mpf) else float(v)) for v in values.reshape(-1)]
    return out


def zeros(*shape: int) -> Array:
    """Zeros of this shape."""
    return exact(np.zeros(shape))


def eye(d: int) -> Array:
    """The identity (d, d)."""
    return exact(np.eye(d))


def each(function: Callable[..., Any], *arrays: Array) -> Array:
    """``function`` applied to each entry of the (broadcast) arrays."""
    broadcast = np.broadcast_arrays(*[exact(a) for a in arrays])
    out = np.empty(broadcast[0].shape, dtype=object)
    out.reshape(-1)[:] = [function(*entries) for entries in zip(*(b.reshape(-1) for b in broadcast), strict=True)]
    return out


def sqrt(array: Array) -> Array:
    """Square root of each entry."""
    return each(mp.sqrt, array)


def quotient(a: Array, b: Array) -> Array:
    """``a / b`` for each entry, with 0/0 = 0."""
    return each(lambda x, y: mp.mpf(0) if x == 0 and y == 0 else x / y, a, b)


def norm(array: Array) -> Any:
    """Root of the sum of squares of all entries."""
    return mp.sqrt(mp.fsum(x * x for x in exact(array).reshape(-1)))


def rounded(array: Array) -> np.ndarray:
    """float64, each entry rounded once; what only inexact arithmetic keeps from being zero is zero."""
    array = exact(array)
    largest = max((abs(x) for x in array.reshape(-1)), default=0)
    return np.array([0.0 if abs(x) <= TINY * largest else float(x) for x in array.reshape(-1)]).reshape(array.shape)


def integers(seed: int, shape: tuple[int, ...], low: int = -3, high: int = 3) -> Array:
    """Integers from ``low`` to ``high``, the same on every machine: a linear congruential generator (Knuth's MMIX)."""
    out = np.empty(shape, dtype=object)
    state, flat = (seed + 1) * 0x9E3779B97F4A7C15 % 2**64, out.reshape(-1)
    for i in range(flat.size):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        flat[i] = mp.mpf(low + (state >> 33) % (high - low + 1))
    return out


def with_zeros(seed: int, shape: tuple[int, ...], *at: int) -> Array:
    """Five integer gradients, zero at the steps ``at``, counted from 0."""
    grads = integers(seed, (5, *shape))
    grads[list(at)] = mp.mpf(0)
    return grads


# ---- matrices -------------------------------------------------------------------------------------------------------


def eig(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues (d,), ascending, and eigenvectors (d, d), as columns, of a symmetric matrix."""
    d = len(matrix)
    symmetric = (matrix + matrix.T) / 2
    w, q = mp.eigsy(mp.matrix(symmetric.tolist()))
    order = sorted(range(d), key=lambda i: w[i])
    vectors = np.empty((d, d), dtype=object)
    for row in range(d):
        for column, i in enumerate(order):
            vectors[row, column] = q[row, i]
    values = exact([w[i] for i in order])
    cut = TINY * max(abs(v) for v in values)
    return each(lambda v: mp.mpf(0) if abs(v) <= cut else v, values), vectors


def function(matrix: Array, f: Callable[[Any], Any]) -> Array:
    """``f`` of a symmetric matrix, through its eigenvalues."""
    w, q = eig(matrix)
    return (q * each(f, w)) @ q.T


def power(matrix: Array, exponent: Any, ridge: Any = 0) -> Array:
    """``(matrix + ridge I)^exponent`` of a positive semidefinite matrix; without ridge, zero eigenvalues stay zero."""
    ridge = mp.mpf(ridge)
    return function(matrix, lambda v: mp.mpf(0) if v + ridge == 0 else (max(v, 0) + ridge) ** mp.mpf(exponent))


def condition(matrix: Array, ridge: Any = 0) -> Any:
    """Condition number of ``matrix + ridge I`` on its range; 1 for zero."""
    w = [max(v, 0) + mp.mpf(ridge) for v in eig(matrix)[0]]
    live = [v for v in w if v > 0]
    return max(live) / min(live) if live else mp.mpf(1)


def shifted_condition(matrix: Array, shift: Any) -> Any:
    """Condition number of ``(matrix^{1/2} + shift I)^2`` on its range; 1 for zero."""
    roots = [mp.sqrt(max(w, 0)) + shift for w in eig(matrix)[0]]
    live = [r for r in roots if r > 0]
    return (max(live) / min(live)) ** 2 if live else mp.mpf(1)


def svd(matrix: Array) -> tuple[Array, Array, Array]:
    """Thin singular value decomposition: U (m, k), s (k,) descending, V^T (k, n), with k = min(m, n)."""
    wide = matrix.shape[0] < matrix.shape[1]  # mpmath wants rows >= columns
    u, s, v = mp.svd_r(mp.matrix((matrix.T if wide else matrix).tolist()))
    u, s, v = (np.array(x.tolist(), dtype=object) for x in (u, s, v))
    s = s.reshape(-1)
    s = each(lambda x: mp.mpf(0) if abs(x) <= TINY * s[0] else x, s)
    return (v.T, s, u.T) if wide else (u, s, v)


def mode_product(tensor: Array, matrix: Array, axis: int) -> Array:
    """``matrix`` applied along ``axis``."""
    return np.moveaxis(np.tensordot(matrix, tensor, axes=(1, axis)), 0, axis)


def mode_gram(tensor: Array, axis: int) -> Array:
    """``G_(axis) G_(axis)^T`` of the unfolding along ``axis``."""
    unfolded = np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
    return unfolded @ unfolded.T


# ---- cases ----------------------------------------------------------------------------------------------------------


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
        grads: Array = None,
        change: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Case:
        """On ``grads``, else on integers of ``seed`` times ``scale``; ``catches`` are words."""
        given = integers(seed, (steps, *shape)) * mp.mpf(scale) if grads is None else exact(grads)
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

    def reject(name: str, why: str, argument: str, *, shape: tuple[int, ...] = shape, **change: Any) -> Case:
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
        )

    return trace, reject
