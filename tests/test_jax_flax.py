"""The optax transformations inside flax.nnx.Optimizer: a few steps, one trace, and a resume."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mutation import mutated

jax = pytest.importorskip("jax")
jax.config.update("jax_enable_x64", True)
pytest.importorskip("optax")
nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")

import jax.numpy as jnp  # noqa: E402
from test_jax_adapter import CASES, Case, adapter  # noqa: E402


class Network(nnx.Module):  # type: ignore[misc]
    """A kernel; two more if ``deep``, so that two are stacked, and a convolution of four axes."""

    def __init__(self, deep: bool) -> None:
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(1, 2, (2, 2), rngs=rngs) if deep else None
        self.layers = nnx.List([nnx.Linear(d, 4, rngs=rngs) for d in ((8, 4, 4) if deep else (4,))])

    def __call__(self, x: Any) -> Any:
        x = (self.conv(x) if self.conv else x).reshape(x.shape[0], -1)
        for layer in self.layers:
            x = layer(jnp.tanh(x))
        return x


def check_steps_and_resume(case: Case, lib: Any, deep: bool = False) -> None:
    """Four steps in one trace, each of them moves, and two after a resume in a new optimizer are the last two."""
    x, y = jnp.asarray(np.random.default_rng(0).standard_normal((6, 2, 2, 1))), jnp.eye(6, 4)
    traces: list[int] = []

    def loss(model: Any) -> Any:
        return jnp.mean((model(x) - y) ** 2)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        traces.append(1)
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    transformation = case.optimizer(lib, case.kwargs.get("learning_rate", 2.0**-6))

    def start() -> Any:
        model = Network(deep)
        return model, nnx.Optimizer(model, transformation, wrt=nnx.Param)

    model, optimizer = start()
    losses = [float(step(model, optimizer)) for _ in range(2)]
    saved = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state((model, optimizer))))
    losses += [float(step(model, optimizer)) for _ in range(2)]
    resumed = start()
    state = nnx.state(resumed)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, saved))
    nnx.update(resumed, state)
    assert [float(step(*resumed)) for _ in range(2)] == losses[2:]
    assert len(traces) == 1
    assert np.all(np.isfinite(losses))
    assert len(set(losses)) == 4
    assert int(resumed[1].opt_state[0].count[...]) == 4


def test_a_state_with_tuples_of_arrays() -> None:
    check_steps_and_resume(CASES["shampoo"], adapter)


def test_tuples_at_the_leaves_are_seen() -> None:
    with pytest.raises(TypeError, match="state.grams must be a tuple of arrays, got State"):
        check_steps_and_resume(CASES["shampoo"], mutated(adapter, ("if not held:", "if True:")))


@pytest.mark.deep
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_method(case: Case) -> None:
    check_steps_and_resume(case, adapter, deep=True)
