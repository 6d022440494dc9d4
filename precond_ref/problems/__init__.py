"""What optimizers are run on: losses with hand-derived gradients in array API, and loaders for real data.

    problem = precond_ref.problems.load("digits-mlp", dtype="float64")
    params = problem.init()
    loss, grads = problem.loss_and_grad(params, problem.batch(0))

Parameters are flat dicts; weights are (O, I) as in PyTorch, y = x W^T + b. Random numbers come from NumPy and are the
same for every array library.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from precond_ref.problems import datasets, mlp, synthetic
from precond_ref.problems.base import Problem, Space
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
    """A line of the registry."""

    description: str
    make: Callable[..., Problem]
    """Takes name, space and seed; its keyword-only arguments are the problem's options."""


DIGITS = functools.partial
_PROBLEMS: dict[str, Entry] = {
    "quadratic": Entry("1/2 (x - x*)^T A (x - x*) with a given spectrum", synthetic.quadratic),
}
