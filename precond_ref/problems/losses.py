"""Losses of a network's last layer: value and gradient in the logits, safe for logits of any size."""

from __future__ import annotations

from typing import Any

from precond_ref.numerics.arrays import clamp

Array = Any


def cross_entropy(xp: Any, logits: Array, one_hot: Array) -> tuple[Array, Array]:
    """Return the mean over the samples of -log softmax(logits)[label], and its gradient in the logits, (n, classes).

    ``logits`` and ``one_hot`` are (n, classes). The largest logit is subtracted first, so nothing overflows.
    """
    n = logits.shape[0]
    shifted = logits - xp.max(logits, axis=1, keepdims=True)
    log_p = shifted - xp.log(xp.sum(xp.exp(shifted), axis=1, keepdims=True))
    return -xp.sum(one_hot * log_p) / n, (xp.exp(log_p) - one_hot) / n


def binary_cross_entropy(xp: Any, logits: Array, targets: Array) -> tuple[Array, Array]:
    """Return the mean over the samples of sum_pixels -x log p - (1 - x) log(1 - p), p = sigmoid(z), and its gradient.

    ``logits`` z, ``targets`` x in [0, 1] and the gradient in z are (n, pixels). The loss is computed as
    max(z, 0) - z x + log(1 + exp(-abs(z))), so that nothing overflows.
    """
    n = logits.shape[0]
    value = xp.sum(clamp(logits, 0.0, xp=xp) - logits * targets + xp.log1p(xp.exp(-xp.abs(logits)))) / n
    return value, (sigmoid(xp, logits) - targets) / n


def sigmoid(xp: Any, logits: Array) -> Array:
    """Return 1 / (1 + exp(-z)) elementwise, with full relative accuracy for both signs of z."""
    small = xp.exp(-xp.abs(logits))
    return xp.where(logits >= 0.0, xp.ones_like(small), small) / (1.0 + small)
