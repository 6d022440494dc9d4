"""The Hessian of a problem's loss, and parts of it."""

from __future__ import annotations

from typing import Any

from precond_ref.experiments.numbers import Array, np

Params = dict[str, Array]


def flat(params: Params) -> Array:
    """Return all entries, (n,), in the order of the keys."""
    return np.concatenate([np.ravel(value) for value in params.values()])


def unflat(vector: Array, like: Params) -> Params:
    """Return the parameters of `flat`."""
    ends = np.cumsum([value.size for value in like.values()])[:-1]
    parts = np.split(vector, ends)
    return {name: part.reshape(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}


def hessian(problem: Any, params: Params, step: float = 1e-5) -> Array:
    """Return the Hessian (n, n) of the loss on the training set, by central differences of the gradient in float64.

    The differences have an error of about 1e-10 of its norm.
    """
    x = flat(params)

    def gradient(shift: int, sign: float) -> Array:
        y = x.copy()
        y[shift] += sign * step
        return flat(problem.loss_and_grad(unflat(y, params))[1])

    columns = np.stack([(gradient(i, 1.0) - gradient(i, -1.0)) / (2 * step) for i in range(x.size)])
    return (columns + columns.T) / 2


def groups(params: Params) -> dict[str, Array]:
    """Return for each entry the number of its layer, its output neuron (with the bias) and its input, (n,) each.

    A layer's bias has -1 for the input, and each of these entries is a block of its own in `share`.
    """
    names = list(dict.fromkeys(name.split("/")[0] for name in params))
    layers, outputs, inputs = {}, {}, {}
    for name, value in params.items():
        number = names.index(name.split("/")[0])
        layers[name] = np.full(value.shape, number)
        rows = np.indices(value.shape)
        outputs[name] = 1000 * number + rows[0]
        inputs[name] = 1000 * number + rows[1] if value.ndim == 2 else np.full(value.shape, -1)
    return {"layers": flat(layers), "output neurons": flat(outputs), "inputs": flat(inputs)}


def share(matrix: Array, group: Array) -> float:
    """Return the share of the squared Frobenius norm in the blocks of entries of one group, and on the diagonal."""
    same = (group[:, None] == group[None, :]) & (group >= 0)[:, None]
    np.fill_diagonal(same, True)
    return float(np.sum(matrix**2 * same) / np.sum(matrix**2))
