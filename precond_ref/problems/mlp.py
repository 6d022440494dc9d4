"""Multilayer perceptrons: softmax regression (no hidden layer), classifiers, autoencoders.

The inputs are a_0, (n, I_1). Layer l = 1, ..., L has the parameters ``fc{l}/weight`` W_l, (O_l, I_l),
and ``fc{l}/bias`` b_l, (O_l,):

    s_l = a_{l-1} W_l^T + b_l                       (n, O_l)        (1)
    a_l = phi(s_l)  for l < L;  logits = s_L        (n, O_l)        (2)

and backwards, from delta_L = d loss / d logits (n, O_L), which holds the 1/n of the mean over the samples:

    dW_l = delta_l^T a_{l-1}                        (O_l, I_l)      (3)
    db_l = sum over the samples of delta_l          (O_l,)          (4)
    delta_{l-1} = (delta_l W_l) * phi'(s_{l-1})     (n, I_l)        (5)

phi is tanh, phi' = 1 - a^2, or ReLU, phi' = [a > 0] (0 at the kink); both follow from a_l alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from precond_ref.numerics.arrays import clamp
from precond_ref.problems.base import Array, Batch, Params, Problem, Space, check_int, generator, import_numpy
from precond_ref.problems.datasets import Split
from precond_ref.problems.losses import binary_cross_entropy, cross_entropy, sigmoid

if TYPE_CHECKING:
    import numpy as np

ACTIVATIONS: dict[str, tuple[Callable[[Any, Array], Array], Callable[[Any, Array], Array]]] = {
    "tanh": (lambda xp, s: xp.tanh(s), lambda xp, a: 1.0 - a * a),
    "relu": (lambda xp, s: clamp(s, 0.0, xp=xp), lambda xp, a: xp.astype(a > 0.0, a.dtype)),
}
"""phi as a function of s, and phi' as a function of a = phi(s)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Network(Problem):
    """Layers (1) to (5); the subclass has the targets of the logits."""

    activation: str
    """phi: "tanh" or "relu"."""
    test: Batch = field(repr=False)
    """Test set, laid out like ``train``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")

    def activations(self, params: Params, inputs: Array) -> list[Array]:
        """Return inputs a_0 (n, I_1), hidden activations a_1, ..., a_{L-1}, logits s_L (n, O_L)."""
        phi, _ = ACTIVATIONS[self.activation]
        depth = len(params) // 2
        values = [inputs]
        for layer in range(1, depth + 1):
            s = values[-1] @ params[f"fc{layer}/weight"].T + params[f"fc{layer}/bias"]  # (1)
            values.append(phi(self.space.xp, s) if layer < depth else s)  # (2)
        return values

    def signals(self, params: Params, values: list[Array], delta: Array) -> list[Array]:
        """Return delta_1, ..., delta_L from ``values`` (of `activations`) and ``delta`` = delta_L (n, O_L)."""
        _, slope = ACTIVATIONS[self.activation]
        found = [delta]
        for layer in range(len(values) - 1, 1, -1):
            a = values[layer - 1]
            found.append((found[-1] @ params[f"fc{layer}/weight"]) * slope(self.space.xp, a))  # (5)
        return found[::-1]

    def backward(self, params: Params, values: list[Array], delta: Array) -> Params:
        """Return the gradients from ``values`` (of `activations`) and ``delta`` = d loss / d logits (n, O_L)."""
        grads: Params = {}
        for layer, (a, signal) in enumerate(zip(values, self.signals(params, values, delta), strict=False), start=1):
            grads[f"fc{layer}/weight"] = signal.T @ a  # (3)
            grads[f"fc{layer}/bias"] = self.space.xp.sum(signal, axis=0)  # (4)
        return {name: grads[name] for name in params}

    @abstractmethod
    def _head(self, logits: Array, batch: Batch) -> tuple[Array, Array]:
        """Return the loss, 0-D, and d loss / d logits (n, O_L)."""

    def _loss(self, params: Params, batch: Batch) -> Array:
        return self._head(self.activations(params, batch[0])[-1], batch)[0]

    def _loss_and_grad(self, params: Params, batch: Batch) -> tuple[Array, Params]:
        values = self.activations(params, batch[0])
        loss, delta = self._head(values[-1], batch)
        return loss, self.backward(params, values, delta)


@dataclass(frozen=True, kw_only=True, eq=False)
class Classifier(Network):
    """Cross-entropy of softmax(logits); a batch is (inputs (n, pixels), labels (n,) int32)."""

    classes: Array = field(repr=False)
    """0, ..., classes - 1, int32."""

    metric_name: ClassVar[str] = "test accuracy"
    higher_is_better: ClassVar[bool] = True

    def _head(self, logits: Array, batch: Batch) -> tuple[Array, Array]:
        xp = self.space.xp
        one_hot = xp.astype(batch[1][:, None] == self.classes[None, :], logits.dtype)
        return cross_entropy(xp, logits, one_hot)

    def _metric(self, params: Params) -> Array:
        xp = self.space.xp
        inputs, labels = self.test
        guesses = xp.argmax(self.activations(params, inputs)[-1], axis=1)
        return xp.mean(xp.astype(guesses == labels, self.space.real_dtype))


@dataclass(frozen=True, kw_only=True, eq=False)
class Autoencoder(Network):
    """Binary cross-entropy of sigmoid(logits) against the inputs, summed over pixels; a batch is (inputs,).

    The metric is the squared error of the reconstruction, summed over pixels, mean over the test images.
    """

    metric_name: ClassVar[str] = "test squared error per image"
    higher_is_better: ClassVar[bool] = False

    def _head(self, logits: Array, batch: Batch) -> tuple[Array, Array]:
        return binary_cross_entropy(self.space.xp, logits, batch[0])

    def _metric(self, params: Params) -> Array:
        xp = self.space.xp
        (inputs,) = self.test
        errors = sigmoid(xp, self.activations(params, inputs)[-1]) - inputs
        return xp.sum(errors * errors) / inputs.shape[0]


def glorot(widths: Sequence[int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return weights (O, I) uniform within sqrt(6 / (I + O)) and zero biases (O,) for consecutive ``widths``."""
    params = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
        bound = (6.0 / (fan_in + fan_out)) ** 0.5
        params[f"fc{layer}/weight"] = rng.uniform(-bound, bound, (fan_out, fan_in))
        params[f"fc{layer}/bias"] = import_numpy().zeros(fan_out)
    return params


def check_widths(hidden: Any) -> tuple[int, ...]:
    """Return the widths of the hidden layers, each at least 1."""
    if isinstance(hidden, str) or not isinstance(hidden, Sequence):
        raise TypeError(f"hidden must be a sequence of layer widths, got {hidden!r}")
    return tuple(check_int("hidden width", width, ge=1) for width in hidden)


def classifier(
    data: Callable[[], Split],
    default_steps: int,
    name: str,
    space: Space,
    seed: int,
    *,
    hidden: Sequence[int],
    activation: str = "tanh",
    batch_size: int | None = 100,
) -> Classifier:
    """Return a `Classifier` on ``data`` with hidden layers of these widths (none: softmax regression)."""
    hidden, split = check_widths(hidden), data()
    widths = (split.train_inputs.shape[1], *hidden, split.classes)
    return Classifier(
        name=name,
        space=space,
        seed=seed,
        batch_size=batch_size,
        default_steps=default_steps,
        initial=glorot(widths, generator(seed, "init")),
        train=(space.real(split.train_inputs), space.integer(split.train_labels)),
        test=(space.real(split.test_inputs), space.integer(split.test_labels)),
        activation=activation,
        classes=space.integer(import_numpy().arange(split.classes)),
    )


def softmax_regression(
    data: Callable[[], Split],
    default_steps: int,
    name: str,
    space: Space,
    seed: int,
    *,
    batch_size: int | None = 100,
) -> Classifier:
    """Return a `Classifier` without hidden layers, whose loss is convex."""
    return classifier(data, default_steps, name, space, seed, hidden=(), batch_size=batch_size)


def autoencoder(
    data: Callable[[], Split],
    default_steps: int,
    name: str,
    space: Space,
    seed: int,
    *,
    hidden: Sequence[int],
    activation: str = "tanh",
    batch_size: int | None = 100,
) -> Autoencoder:
    """Return an `Autoencoder` on ``data`` with hidden layers of these widths, the code among them."""
    hidden, split = check_widths(hidden), data()
    pixels = split.train_inputs.shape[1]
    return Autoencoder(
        name=name,
        space=space,
        seed=seed,
        batch_size=batch_size,
        default_steps=default_steps,
        initial=glorot((pixels, *hidden, pixels), generator(seed, "init")),
        train=(space.real(split.train_inputs),),
        test=(space.real(split.test_inputs),),
        activation=activation,
    )
