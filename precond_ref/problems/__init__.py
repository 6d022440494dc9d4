"""Problems for optimizers: losses with hand-derived gradients in the array API, and loaders for real data.

    problem = precond_ref.problems.load("digits-mlp", dtype="float64")
    params = problem.init()
    loss, grads = problem.loss_and_grad(params, problem.batch(0))

Parameters are flat dicts; weights are (O, I) as in PyTorch, y = x W^T + b. Random numbers come from NumPy and
are the same for every array library.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from precond_ref.problems import cnn, datasets, mlp, synthetic
from precond_ref.problems.base import Problem, Space, check_int
from precond_ref.problems.datasets import load_digits, load_libsvm, load_mnist, load_text

__all__ = [
    "Problem",
    "list_problems",
    "load",
    "load_digits",
    "load_libsvm",
    "load_mnist",
    "load_text",
]


class Entry(NamedTuple):
    """An entry of the registry."""

    description: str
    make: Callable[..., Problem]
    """Takes name, space and seed; its keyword-only arguments are the problem's options."""


_PROBLEMS: dict[str, Entry] = {
    "quadratic": Entry("vector quadratic with a given spectrum", synthetic.quadratic),
    "matrix-quadratic": Entry("matrix quadratic 1/2 <W - W*, A (W - W*) B> with given spectra",
        synthetic.matrix_quadratic),
    "matrix-regression": Entry("least squares with a matrix of weights and ill-conditioned inputs",
        synthetic.matrix_regression),
    "digits-softmax": Entry("softmax regression on the 8 x 8 digits",
        partial(mlp.softmax_regression, datasets.digits_split, 280)),
    "digits-mlp": Entry("classifier 64-32-32-10 on the 8 x 8 digits",
        partial(mlp.classifier, datasets.digits_split, 280, hidden=(32, 32))),
    "digits-autoencoder": Entry("autoencoder 64-32-16-32-64 on the 8 x 8 digits",
        partial(mlp.autoencoder, datasets.digits_split, 700, hidden=(32, 16, 32))),
    "digits-cnn": Entry("convolutional classifier, 3 x 3 kernels, 8 and 16 channels, on the 8 x 8 digits",
        partial(cnn.conv_classifier, datasets.digits_split, 280)),
    "mnist-softmax": Entry("softmax regression on MNIST's test set (needs PRECOND_REF_DATA)",
        partial(mlp.softmax_regression, datasets.mnist_split, 800)),
    "mnist-mlp": Entry("classifier 784-128-64-10 on MNIST's test set (needs PRECOND_REF_DATA)",
        partial(mlp.classifier, datasets.mnist_split, 800, hidden=(128, 64))),
    "mnist-autoencoder": Entry("autoencoder 784-250-50-250-784 on MNIST's test set (needs PRECOND_REF_DATA)",
        partial(mlp.autoencoder, datasets.mnist_split, 1600, hidden=(250, 50, 250))),
    "mnist-cnn": Entry(
        "convolutional classifier, 3 x 3 kernels, 8 and 16 channels, on MNIST's test set (needs PRECOND_REF_DATA)",
        partial(cnn.conv_classifier, datasets.mnist_split, 800),
    ),
}  # fmt: skip


def list_problems() -> dict[str, str]:
    """Return one line about each problem, by name; reads no data and imports no array library."""
    return {name: entry.description for name, entry in _PROBLEMS.items()}


def load(
    name: str,
    xp: Any = None,
    dtype: str = "float32",
    device: Any = None,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Return the problem called ``name``, with its arrays in the namespace ``xp`` (default NumPy).

    ``dtype`` is "float32" or "float64". ``seed`` decides the first parameters, the order of the batches, and
    drawn data (never the split of real data). ``options`` are the problem's own, such as ``condition``,
    ``hidden`` or ``batch_size``.
    Errors: ValueError for an unknown name or dtype, or a value out of range; TypeError, with the known options, for an
    unknown option; FileNotFoundError if the data are missing.
    """
    if name not in _PROBLEMS:
        raise ValueError(f"no problem is called {name!r}; there are {', '.join(_PROBLEMS)}")
    make = _PROBLEMS[name].make
    known = [p.name for p in inspect.signature(make).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise TypeError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    seed = check_int("seed", seed, ge=0)
    return make(name, Space.make(xp, dtype, device), seed, **options)
