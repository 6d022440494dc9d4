"""Every configuration of every method on every backend: values, dtypes, purity, stacking."""

from __future__ import annotations

import numpy as np
import pytest
from configs import Config
from conftest import Backend, make_backend
from helpers import distance, gradients, leaves, run


@pytest.mark.cases
def test_float64_agrees_with_numpy(backend: Backend, config: Config) -> None:
    grads = gradients(config.shape)
    expected, _ = run(make_backend("numpy"), config, grads, "float64")
    got, state = run(backend, config, grads, "float64")
    assert distance(got, expected) <= 1e-12
    assert all(leaf.dtype == backend.asarray(0.0).dtype for leaf in leaves(state)[1:] if leaf.ndim)


@pytest.mark.float32
@pytest.mark.cases(first_on=("torch-compile", "jax-jit"))  # a graph for each: those of float64 are all compiled
def test_float32_stays_float32(backend: Backend, config: Config) -> None:
    grads = gradients(config.shape).astype(np.float32).astype(np.float64)
    expected, _ = run(make_backend("numpy"), config, grads, "float64")
    got, state = run(backend, config, grads, "float32")
    float32 = backend.asarray(0.0, "float32").dtype
    assert all(leaf.dtype == float32 for leaf in leaves(state._replace(step=0)))
    # kappa of the regularised statistics is below 100 for these gradients and eps >= 1/8: 16 u kappa
    assert distance(got, expected) <= 16 * 100 * 2**-24


@pytest.mark.eager_cases
def test_stacked_equals_a_loop(backend: Backend, config: Config) -> None:
    grads = gradients((2, 3, *config.shape))
    stacked, _ = run(backend, config, grads, "float64", stack_ndim=2)
    for i in range(2):
        for j in range(3):
            single, _ = run(backend, config, grads[:, i, j], "float64")
            assert distance(stacked[:, i, j], single) <= 1e-14
