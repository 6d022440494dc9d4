"""Convolutional classifiers: layers of 3 x 3 kernels with stride 2, then one fully connected layer.

The images are a_0, (n, 1, H_0, H_0). Layer l = 1, ..., L has the parameters ``conv{l}/weight`` W_l, (O_l, I_l, 3, 3),
and ``conv{l}/bias`` b_l, (O_l,), and halves the side, H_l = H_{l-1} / 2; P_l = H_l^2. With W_l read as (O_l, 9 I_l):

    U_l = the 3 x 3 patches of a_{l-1}, zero-padded by 1, stride 2       (n, 9 I_l, P_l)          (1)
    s_l = W_l U_l + b_l;  a_l = phi(s_l), read as images                 (n, O_l, P_l)            (2)
    x = a_L read as vectors;  logits = x W^T + b   (``fc1``)             (n, classes)             (3)

and backwards, from delta = d loss / d logits (n, classes), which holds the 1/n of the mean over the samples:

    dW = delta^T x;  db = sum over the samples of delta                                           (4)
    delta_L = (delta W) * phi'(s_L)                                      (n, O_L, P_L)            (5)
    dW_l = sum over the samples of delta_l U_l^T                         (O_l, 9 I_l)             (6)
    db_l = sum over the samples and positions of delta_l                 (O_l,)                   (7)
    delta_{l-1} = (V_l Q_l) * phi'(s_{l-1})                              (n, I_l, P_{l-1})        (8)

where V_l, (I_l, 9 O_l), is W_l with its kernels turned by 180 degrees and O and I exchanged, and Q_l,
(n, 9 O_l, P_{l-1}), the patches with stride 1 of delta_l with a row and a column of zeros after each of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from precond_ref.problems.base import Array, Batch, Params, Space, check_int, generator, import_numpy
from precond_ref.problems.datasets import Split
from precond_ref.problems.mlp import ACTIVATIONS, Classifier

if TYPE_CHECKING:
    import numpy as np

    from precond_ref.methods.mbf import MBFFactors, MBFSamples


@dataclass(frozen=True, kw_only=True, eq=False)
class ConvClassifier(Classifier):
    """Layers (1) to (3) under cross-entropy; a batch is (inputs (n, H_0^2), labels (n,) int32)."""

    side: int
    """H_0, pixels along a side of the images."""

    def activations(self, params: Params, inputs: Array) -> list[Array]:
        """Return U_1, phi(s_1), ..., U_L, phi(s_L), logits."""
        xp, n, side = self.space.xp, inputs.shape[0], self.side
        phi, _ = ACTIVATIONS[self.activation]
        images = xp.reshape(inputs, (n, 1, side, side))
        values = []
        for layer in range(1, len(params) // 2):
            weight, bias = params[f"conv{layer}/weight"], params[f"conv{layer}/bias"]
            u = patches(xp, images, stride=2)  # (1)
            a = phi(xp, xp.reshape(weight, (weight.shape[0], -1)) @ u + bias[:, None])  # (2)
            values += [u, a]
            side //= 2
            images = xp.reshape(a, (n, weight.shape[0], side, side))
        vectors = xp.reshape(images, (n, -1))
        return [*values, vectors @ params["fc1/weight"].T + params["fc1/bias"]]  # (3)

    def signals(self, params: Params, values: list[Array], delta: Array) -> list[Array]:
        """Return delta_1, ..., delta_L, delta from ``values`` (of `activations`) and ``delta`` (n, classes)."""
        xp, n = self.space.xp, delta.shape[0]
        _, slope = ACTIVATIONS[self.activation]
        a = values[-2]
        found = [delta, xp.reshape(delta @ params["fc1/weight"], a.shape) * slope(xp, a)]  # (5)
        for layer in range(len(params) // 2 - 1, 1, -1):
            weight, a = params[f"conv{layer}/weight"], values[2 * layer - 3]
            side = self.side >> layer
            q = patches(xp, spread(xp, xp.reshape(found[-1], (n, -1, side, side))), stride=1)
            v = xp.permute_dims(xp.flip(weight, axis=(2, 3)), (1, 0, 2, 3))
            found.append(xp.reshape(v, (v.shape[0], -1)) @ q * slope(xp, a))  # (8)
        return found[::-1]

    def backward(self, params: Params, values: list[Array], delta: Array) -> Params:
        """Return the gradients from ``values`` (of `activations`) and ``delta`` = d loss / d logits (n, classes)."""
        xp = self.space.xp
        grads: Params = {}
        *signals, _ = self.signals(params, values, delta)
        for layer, signal in enumerate(signals, start=1):
            per_sample = signal @ xp.matrix_transpose(values[2 * layer - 2])
            shape = params[f"conv{layer}/weight"].shape
            grads[f"conv{layer}/weight"] = xp.reshape(xp.sum(per_sample, axis=0), shape)  # (6)
            grads[f"conv{layer}/bias"] = xp.sum(signal, axis=(0, 2))  # (7)
        vectors = xp.reshape(values[-2], (delta.shape[0], -1))
        return {**grads, "fc1/weight": delta.T @ vectors, "fc1/bias": xp.sum(delta, axis=0)}  # (4)

    def statistics(self, params: Params, batch: Batch | None = None) -> dict[str, MBFSamples | MBFFactors]:
        """Return statistics for ``Optimizer(MBF(), join=(("fc1/weight", "fc1/bias"),)).step(..., statistics=)``.

        They are, of each sample's own loss, the gradients of the convolutions, and inputs (with the constant 1) and
        back-signals of the fully connected layer. The labels of the batch make the empirical Fisher matrix, labels
        drawn from the model's softmax make the Fisher matrix.
        """
        from precond_ref.methods.mbf import MBFFactors, MBFSamples  # late: the command's help lists the problems

        self._check(params)
        xp, batch = self.space.xp, self.train if batch is None else batch
        n = batch[0].shape[0]
        values = self.activations(params, batch[0])
        *signals, delta = self.signals(params, values, n * self._head(values[-1], batch)[1])
        vectors = xp.reshape(values[-2], (n, -1))
        inputs = xp.concat([vectors, xp.ones_like(vectors[:, :1])], axis=1)
        result: dict[str, MBFSamples | MBFFactors] = {"fc1/weight": MBFFactors(inputs, delta)}
        for layer, signal in enumerate(signals, start=1):
            name = f"conv{layer}/weight"
            per_sample = signal @ xp.matrix_transpose(values[2 * layer - 2])
            result[name] = MBFSamples(xp.reshape(per_sample, (n, *params[name].shape)))
        return result


def patches(xp: Any, images: Array, stride: int) -> Array:
    """Return the 3 x 3 patches of zero-padded images (n, C, H, H), as columns: (n, 9 C, (H / stride)^2)."""
    n, channels, side, _ = images.shape
    row = xp.zeros_like(images[:, :, :1, :])
    padded = xp.concat([row, images, row], axis=2)
    column = xp.zeros_like(padded[:, :, :, :1])
    padded = xp.concat([column, padded, column], axis=3)
    taps = [padded[:, :, i : i + side : stride, j : j + side : stride] for i in range(3) for j in range(3)]
    return xp.reshape(xp.stack(taps, axis=2), (n, 9 * channels, (side // stride) ** 2))


def spread(xp: Any, images: Array) -> Array:
    """Return images (n, C, H, H) with a row and a column of zeros after each of their own: (n, C, 2 H, 2 H)."""
    n, channels, side, _ = images.shape
    rows = xp.stack([images, xp.zeros_like(images)], axis=3)
    return xp.reshape(xp.stack([rows, xp.zeros_like(rows)], axis=5), (n, channels, 2 * side, 2 * side))


def glorot(channels: Sequence[int], features: int, classes: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return weights uniform within sqrt(6 / (fan in + fan out)) and zero biases; a fan is 9 times the channels."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (fan_in, fan_out) in enumerate(zip((1, *channels), channels, strict=False), start=1):
        shapes[f"conv{layer}"] = (fan_out, fan_in, 3, 3)
    shapes["fc1"] = (classes, features)
    params = {}
    for name, (fan_out, fan_in, *kernel) in shapes.items():
        bound = (6.0 / ((fan_in + fan_out) * (9 if kernel else 1))) ** 0.5
        params[f"{name}/weight"] = rng.uniform(-bound, bound, shapes[name])
        params[f"{name}/bias"] = import_numpy().zeros(fan_out)
    return params


def check_channels(channels: Any, side: int) -> tuple[int, ...]:
    """Return the channels of the layers, each at least 1, of at most as many layers as ``side`` can be halved."""
    if isinstance(channels, str) or not isinstance(channels, Sequence):
        raise TypeError(f"channels must be a sequence of ints, got {channels!r}")
    if not channels or side % 2 ** len(channels):
        raise ValueError(f"channels must be at least one, and {side} divisible by 2^(how many), got {channels!r}")
    return tuple(check_int("channels", count, ge=1) for count in channels)


def conv_classifier(
    data: Callable[[], Split],
    default_steps: int,
    name: str,
    space: Space,
    seed: int,
    *,
    channels: Sequence[int] = (8, 16),
    activation: str = "relu",
    batch_size: int | None = 100,
) -> ConvClassifier:
    """Return a `ConvClassifier` on ``data`` with layers of these channels."""
    split = data()
    side = round(split.train_inputs.shape[1] ** 0.5)
    channels = check_channels(channels, side)
    features = channels[-1] * (side >> len(channels)) ** 2
    return ConvClassifier(
        name=name,
        space=space,
        seed=seed,
        batch_size=batch_size,
        default_steps=default_steps,
        initial=glorot(channels, features, split.classes, generator(seed, "init")),
        train=(space.real(split.train_inputs), space.integer(split.train_labels)),
        test=(space.real(split.test_inputs), space.integer(split.test_labels)),
        activation=activation,
        classes=space.integer(import_numpy().arange(split.classes)),
        side=side,
    )
