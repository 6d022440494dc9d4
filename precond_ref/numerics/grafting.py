"""Scaling of a direction to a prescribed size."""

from __future__ import annotations

import math

from precond_ref.numerics.arrays import normed
from precond_ref.typing import Array, Namespace, Scalar


def scale_to_rms(update: Array, rms: Scalar, axes: tuple[int, ...], xp: Namespace) -> Array:
    """Return ``update`` scaled to the root mean square ``rms`` over ``axes``; zero stays zero."""
    count = math.prod([update.shape[axis] for axis in axes])
    if count == 0:
        return update
    _, unit, norm = normed(update, axes, xp)
    return unit * (rms * math.sqrt(count) / xp.where(norm == 0, 1.0, norm))  # rms sqrt(mn) U / ||U||_F


def scale_to_norm(update: Array, like: Array, axes: tuple[int, ...], xp: Namespace) -> Array:
    """Return ``update`` scaled to the Frobenius norm of ``like`` over ``axes``; zero stays zero."""
    return grafted(update, like, axes, xp)[0]


def grafted(update: Array, like: Array, axes: tuple[int, ...], xp: Namespace) -> tuple[Array, Array]:
    """Return `scale_to_norm`, and the norm of ``like`` without ``axes``."""
    _, unit, own = normed(update, axes, xp)
    size, _, norm = normed(like, axes, xp)
    whole = xp.reshape(size * norm, tuple(d for i, d in enumerate(norm.shape) if i not in axes))
    return unit * (size * (norm / xp.where(own == 0, 1.0, own))), whole  # U ||N||_F / ||U||_F
