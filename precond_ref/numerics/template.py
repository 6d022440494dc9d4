"""Templates of states, with shapes instead of arrays: the values of `Method.state_of`.

`zeros`, `full` and `eye` take the sizes of ONE parameter's array, without stack axes::

    ASGOState(step=0, m=zeros(m, n), gram=zeros(k, k), root=None)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from precond_ref.numerics.arrays import eye_like, placement
from precond_ref.typing import Array, Namespace, Scalar


@dataclass(frozen=True)
class Spec:
    """Description of an array of a state before the first update."""

    shape: tuple[int, ...]
    value: Scalar = 0.0
    """Value of every entry; with ``identity``, of the entries on the diagonal."""
    identity: bool = False
    """True if the entries outside the diagonal of the last two axes are zero."""

    @property
    def size(self) -> int:
        """Number of entries of the array."""
        return math.prod(self.shape)

    def array(self, like: Array, dtype: Any, xp: Namespace) -> Array:
        """Return the array on the device of ``like``; with the shape of ``like`` it is sharded like ``like``."""
        if self.shape == tuple(like.shape):
            made = xp.zeros_like(like, dtype=dtype)
        else:
            made = xp.zeros(self.shape, **{**placement(like), "dtype": dtype})
        if self.identity:
            made = eye_like(xp, made)
            return made if _is(self.value, 1.0) else made * self.value
        return made if _is(self.value, 0.0) else made + self.value


def zeros(*shape: int) -> Spec:
    """Return the `Spec` of zeros of ``shape``, the sizes of one parameter's array."""
    return Spec(shape)


def full(value: Scalar, *shape: int) -> Spec:
    """Return the `Spec` of an array of ``shape`` with ``value`` in every entry."""
    return Spec(shape, value)


def eye(*shape: int) -> Spec:
    """Return the `Spec` of identity matrices of ``shape`` (..., n, n)."""
    return Spec(shape, 1.0, identity=True)


def stacked(template: Any, stack: tuple[int, ...]) -> Any:
    """Return ``template`` with the axes ``stack`` in front of every shape."""
    return _mapped(template, lambda spec: replace(spec, shape=(*stack, *spec.shape)))


def arrays_of(template: Any, like: Array, xp: Namespace, dtype: Any = None) -> Any:
    """Return the arrays that ``template`` describes, on the device of ``like``, in ``dtype`` or that of ``like``."""
    return _mapped(template, lambda spec: spec.array(like, like.dtype if dtype is None else dtype, xp))


def _mapped(tree: Any, function: Callable[[Spec], Any]) -> Any:
    if isinstance(tree, tuple):
        parts = [_mapped(part, function) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return function(tree) if isinstance(tree, Spec) else tree


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield name, such as ``grams.0`` or ``root.basis``, and value of each leaf of nested tuples that is not None."""
    if isinstance(tree, tuple):
        names = getattr(tree, "_fields", range(len(tree)))
        for name, part in zip(names, tree, strict=True):
            yield from leaves(part, f"{path}.{name}" if path else str(name))
    elif tree is not None:
        yield path, tree


def _is(value: Scalar, number: float) -> bool:
    return isinstance(value, (int, float)) and value == number
