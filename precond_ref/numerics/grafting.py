"""Giving a direction a prescribed size."""

from __future__ import annotations

import math

from precond_ref.protocol import Array, Namespace, Scalar


def scale_to_rms(update: Array, rms: Scalar, axes: tuple[int, ...], xp: Namespace) -> Array:
    """``update`` with root mean square ``rms`` over ``axes``; zero stays zero.

    Divides by the largest entry first, so that no square over- or underflows.
    """
    count = math.prod([update.shape[axis] for axis in axes])
    if count == 0:
        return update
    peak = xp.max(xp.abs(update), axis=axes, keepdims=True)
    unit = update / xp.where(peak == 0, 1.0, peak)
    norm = xp.sqrt(xp.sum(unit * unit, axis=axes, keepdims=True))
    return unit * (rms * math.sqrt(count) / xp.where(norm == 0, 1.0, norm))  # rms sqrt(mn) U / ||U||_F


def scale_to_norm(update: Array, like: Array, axes: tuple[int, ...], xp: Namespace) -> Array:
    """``update`` with the Frobenius norm of ``like`` over ``axes``; zero stays zero.

    Each is divided by its largest entry first, so that no square over- or underflows.
    """
    units, norms = [], []
    for array in (update, like):
        peak = xp.max(xp.abs(array), axis=axes, keepdims=True)
        unit = array / xp.where(peak == 0, 1.0, peak)
        units.append(unit)
        norms.append((peak, xp.sqrt(xp.sum(unit * unit, axis=axes, keepdims=True))))
    (_, own), (peak, norm) = norms
    return units[0] * (peak * (norm / xp.where(own == 0, 1.0, own)))  # U ||N||_F / ||U||_F
