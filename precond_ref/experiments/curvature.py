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


def hessian(problem: Any, params: Params, batch: Any = None, columns: Array | None = None, step: float = 1e-5) -> Array:
    """Return ``columns`` (k,) of the Hessian of the loss on a batch, (n, k), by central differences of the gradient.

    None stands for the training set and for all columns. In float64 the differences have an error of about 1e-10 of
    the Hessian's norm.
    """
    x = flat(params)

    def gradient(shift: int, sign: float) -> Array:
        y = x.copy()
        y[shift] += sign * step
        return flat(problem.loss_and_grad(unflat(y, params), batch)[1])

    which = range(x.size) if columns is None else columns
    return np.stack([(gradient(i, 1.0) - gradient(i, -1.0)) / (2 * step) for i in which], axis=1)


def groups(params: Params) -> dict[str, Array]:
    """Return for each entry the number of its layer, its output neuron (with the bias) and its input, (n,) each.

    A kernel's outputs and inputs are its channels. A vector's entries have -1 for the input, and each of these is a
    block of its own in `share`.
    """
    of = {name: name.removesuffix("/weight").removesuffix("/bias") for name in params}
    names = list(dict.fromkeys(of.values()))
    layers, outputs, inputs = {}, {}, {}
    for name, value in params.items():
        number = names.index(of[name])
        layers[name] = np.full(value.shape, number)
        rows = np.indices(value.shape)
        outputs[name] = 10**6 * number + rows[0]
        inputs[name] = 10**6 * number + rows[1] if value.ndim > 1 else np.full(value.shape, -1)
    return {"layers": flat(layers), "output neurons": flat(outputs), "inputs": flat(inputs)}


def drawn(layers: Array, count: int, rng: Any) -> tuple[Array, Array]:
    """Return ``count`` entries of each layer at random, all of a smaller one, and for how many each stands, (k,)."""
    columns, weights = [], []
    for layer in np.unique(layers):
        entries = np.flatnonzero(layers == layer)
        columns.append(rng.permutation(entries)[:count])
        weights.append(np.full(len(columns[-1]), len(entries) / len(columns[-1])))
    return np.concatenate(columns), np.concatenate(weights)


def share(matrix: Array, group: Array, columns: Array | None = None, weights: Array | float = 1.0) -> float:
    """Return the share of the squared Frobenius norm in the blocks of entries of one group, and on the diagonal.

    ``matrix`` has the given columns, with the weights of `drawn`; None stands for all.
    """
    which = np.arange(len(group)) if columns is None else columns
    same = (group[:, None] == group[which]) & (group >= 0)[:, None]
    same[which, np.arange(len(which))] = True
    return float(np.sum(matrix**2 * same * weights) / np.sum(matrix**2 * weights))
