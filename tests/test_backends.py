"""Every configuration of every method on every backend: values, dtypes, purity, stacking."""

from __future__ import annotations

import numpy as np
import pytest
from configs import CONFIGS, Config
from conftest import Backend, make_backend, needs_float64
from helpers import distance, gradients, leaves, run
from mutation import mutated

from precond_ref.methods import agd


@pytest.mark.cases(first_on=("torch-compile",))  # seconds for each graph; `--backend torch-compile` makes all
def test_float64_agrees_with_numpy(backend: Backend, config: Config) -> None:
    grads = gradients(config.shape)
    expected, _ = run(make_backend("numpy"), config, grads, "float64")
    got, state = run(backend, config, grads, "float64")
    assert distance(got, expected) <= 1e-12
    assert int(state.step) == len(grads)
    assert all(leaf.dtype == backend.asarray(0.0).dtype for leaf in leaves(state)[1:] if leaf.ndim)


@pytest.mark.float32
@pytest.mark.cases(first_on=("torch-compile", "jax-jit"))  # a graph for each
def test_float32_stays_float32(backend: Backend, config: Config) -> None:
    grads = gradients(config.shape).astype(np.float32).astype(np.float64)
    expected, _ = run(make_backend("numpy"), config, grads, "float64")
    got, state = run(backend, config, grads, "float32")
    float32 = backend.asarray(0.0, "float32").dtype
    assert all(leaf.dtype == float32 for leaf in leaves(state._replace(step=0)))
    # kappa of the regularised statistics is below 100 for these gradients and eps >= 1/8: 16 u kappa
    assert distance(got, expected) <= 16 * 100 * 2**-24


@pytest.mark.parametrize("name", ["jax-jit", "torch-compile"])
def test_a_second_graph_is_counted(name: str) -> None:
    backend, method = make_backend(name), agd.AGD()
    update = backend.update(method)
    for dtype in ("float32", "float64"):
        param = backend.asarray(np.ones(3), dtype)
        update(param, method.init(param), param)
    assert (update.graphs, len(update.refreshes)) == (2, 1)


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if needs_float64(config)])
def test_gram64_is_refused_where_there_is_no_float64(name: str) -> None:
    with pytest.raises(ValueError, match="^solver='gram64' needs float64, which .* its device lacks"):
        run(make_backend("strict-no-float64"), CONFIGS[name], gradients(CONFIGS[name].shape), "float32")


def test_a_planted_float64_is_seen_where_there_is_none() -> None:
    line = "m = ema(state.m, grad, self.beta1)"
    method = mutated(agd, (line, f"{line}; m = xp.astype(xp.astype(m, xp.float64), grad.dtype)")).AGD()
    run(make_backend("strict"), Config(method), gradients((5, 3)), "float32")  # which has float64
    with pytest.raises(ValueError, match="does not support dtype"):
        run(make_backend("strict-no-float64"), Config(method), gradients((5, 3)), "float32")


HOST = {
    "operand": "m = m + __import__('numpy').ones(m.shape)",
    "argument": "xp.where(__import__('numpy').ones(m.shape, bool), m, m)",
    "conversion": "__import__('numpy').asarray(m)",
}


@pytest.mark.parametrize("planted", HOST.values(), ids=HOST)
def test_planted_numpy_in_a_step_is_seen_on_dpnp(planted: str) -> None:
    line = "m = ema(state.m, grad, self.beta1)"
    config = Config(mutated(agd, (line, f"{line}; {planted}")).AGD())
    run(make_backend("numpy"), config, gradients((5, 3)), "float64")
    backend = make_backend("dpnp")
    with pytest.raises(TypeError):
        run(backend, config, gradients((5, 3)), "float64")


@pytest.mark.eager_cases
def test_stacked_equals_a_loop(backend: Backend, config: Config) -> None:
    grads = gradients((2, 3, *config.shape))
    stacked, _ = run(backend, config, grads, "float64", stack_ndim=2)
    for i in range(2):
        for j in range(3):
            single, _ = run(backend, config, grads[:, i, j], "float64")
            assert distance(stacked[:, i, j], single) <= 1e-14
