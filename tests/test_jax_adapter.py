"""The optax transformations: equal to the core, and well-behaved in everything that optax users do with one.

Each check is a function of a case and of a library, which is the adapter's module or a copy of it with one mistake.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import pickle
import runpy
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import precond_ref_jax as pj
import pytest
from configs import CONFIGS, LOUD, Config
from helpers import distance, gradients

import precond_ref as pr
from precond_ref.problems import datasets, load_digits, mlp
from precond_ref.problems.base import Space
from precond_ref.protocol import Method

jax = pytest.importorskip("jax")
jax.config.update("jax_enable_x64", True)
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402
from precond_ref_jax import transformation as adapter  # noqa: E402

jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling is what these tests cost
ROOT = Path(__file__).resolve().parents[1]
FACTORIES = pj._factories()


class Case(NamedTuple):
    """A pair of public functions with loud arguments."""

    name: str
    kwargs: dict[str, Any]
    shape: tuple[int, ...]

    @property
    def method(self) -> Method:
        return FACTORIES[self.name](**self.kwargs)

    def scale_by(self, lib: Any = adapter, **options: Any) -> Any:
        make = lib.make_scale_by(f"scale_by_{self.name}", FACTORIES[self.name])
        return make(**self.kwargs, **options)

    def optimizer(self, lib: Any = adapter, learning_rate: Any = 0.5, **options: Any) -> Any:
        make = lib.make_optimizer(self.name, FACTORIES[self.name])
        return make(**{"learning_rate": learning_rate, **self.kwargs, **options})


def case_for(name: str, factory: Any) -> Case:
    cls = next(c for c in pr.list_methods() if getattr(pr, c) is factory or factory.__qualname__.startswith(f"{c}."))
    fields = inspect.signature(factory).parameters
    for method, shape in LOUD[cls].values():
        kwargs = {field: getattr(method, field) for field in fields if hasattr(method, field)}
        is_preset = type(method).__name__ != cls
        if is_preset != inspect.isclass(factory) and len(kwargs) == len(fields) and factory(**kwargs) == method:
            return Case(name, kwargs, shape)
    return Case(name, {}, next(iter(LOUD[cls].values())).shape)


CASES = {name: case_for(name, factory) for name, factory in FACTORIES.items()}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
QUICK = {(case.method, case.shape) for case in CASES.values()}
configs = pytest.mark.parametrize(
    "config",
    [pytest.param(c, id=name, marks=() if c in QUICK else pytest.mark.deep) for name, c in CONFIGS.items()],
)


def tree(shape: tuple[int, ...], dtype: Any = "float32", seed: int = 0) -> Any:
    """Parameters or gradients: two of the method's shape, so that they are stacked, and one that a matrix method gives away."""
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(rng.standard_normal(shape), dtype),
        "b": [jnp.asarray(rng.standard_normal(shape), dtype), jnp.asarray(rng.standard_normal(3), dtype)],
    }


def close(got: Any, expected: Any, bound: float) -> None:
    """Same structure, dtypes and, normwise, values."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        x, y = np.asarray(x, "float64"), np.asarray(y, "float64")
        assert np.linalg.norm(x - y) <= bound * np.linalg.norm(y), (x, y)


# Two compilations of the same float32 operations round differently: a few u, times a condition below 100.
ROUNDING = 16 * 100 * 2.0**-24


# ---- equal to the core ----------------------------------------------------------------------------------------------


def check_recorded(config: Config, lib: Any) -> float:
    """50 recorded gradients in float64: largest relative distance of a direction from the core's on NumPy."""
    steps = 50
    grads = {"a": gradients(config.shape, steps), "b": gradients(config.shape, steps, 1)}
    params = {key: np.random.default_rng(3).standard_normal(g.shape[1:]) for key, g in grads.items()}
    transformation = lib.scale_by(config.method, takes=lambda path, array: True)

    def step(state: Any, g: Any) -> Any:
        updates, state = transformation.update(g, state, params)
        return state, updates

    last, got = jit(lambda s, g: jax.lax.scan(step, s, g))(transformation.init(params), grads)
    assert last.count.shape == ()
    assert last.count.dtype == jnp.int32
    assert last.count == steps
    worst = 0.0
    for key, param in params.items():
        state = config.method.init(param)
        expected = []
        for g in grads[key]:
            direction, state = config.method.update(g, state, param)
            expected.append(direction)
        worst = max(worst, distance(np.asarray(got[key]), np.stack(expected)))
    assert worst <= 1e-13
    return worst


@configs
def test_recorded_gradients(config: Config) -> None:
    check_recorded(config, adapter)


def tiny_problem(xp: Any) -> mlp.Classifier:
    """Digits of 4 x 4 pixels, 16-6-10."""
    images, labels = load_digits()
    small = images.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4))
    split = datasets.split_four_fifths(small, labels, scale=16.0)
    return mlp.classifier(lambda: split, 10, "tiny", Space.make(xp, "float64"), 0, hidden=(6,), batch_size=50)


def check_training(case: Case, lib: Any) -> float:
    """A network trained by autodiff under jit against the core's `Optimizer` with hand-derived gradients on NumPy.

    On the way: unknown extra arguments, one trace and one compilation, a state that lax.cond takes, donation.
    """
    host, problem = tiny_problem(np), tiny_problem(jnp)
    fields = inspect.signature(FACTORIES[case.name]).parameters
    own = "weight_decay" in fields
    rate = case.kwargs["learning_rate"] if "learning_rate" in fields else lambda step: 0.125 / (1 + 0.5 * step)
    core = pr.Optimizer(case.method, lr=rate, weight_decay=0.0 if own else 0.25)
    opt = case.optimizer(lib, rate, **({} if own else {"weight_decay": 0.25}))
    params, host_params = problem.init(), host.init()
    state, host_state = opt.init(params), core.init(host_params)
    traces: list[int] = []

    @partial(jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any) -> Any:
        traces.append(1)
        grads = jax.grad(problem.loss)(params, batch)
        updates, new = opt.update(grads, state, params, value=1.0, an_argument_nobody_expects=1)
        moved = optax.apply_updates(params, updates)
        return jax.lax.cond(state[0].count >= 0, lambda: (moved, new), lambda: (params, state))

    compilations = []
    for t in range(10):
        with compilations_counted() as count:
            params, state = step(params, state, problem.batch(t))
        compilations.append(len(count))
        host_params, host_state = core.step(host_params, host.loss_and_grad(host_params, host.batch(t))[1], host_state)
    assert len(traces) == 1
    assert sum(compilations[1:]) == 0
    assert state[0].count == 10
    start = host.init()
    worst = max(
        np.linalg.norm(np.asarray(params[key]) - value) / np.linalg.norm(value - start[key])
        for key, value in host_params.items()
    )
    assert worst <= (1e-12 if case.method.elementwise else 1e-9)
    return worst


@contextlib.contextmanager
def compilations_counted() -> Iterator[list[str]]:
    found: list[str] = []

    def listen(event: str, duration: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@cases
def test_training(case: Case) -> None:
    check_training(case, adapter)


# ---- the interface --------------------------------------------------------------------------------------------------


@functools.cache
def plain(name: str) -> Any:
    """What the adapter's ``scale_by`` update is under jit."""
    return jit(CASES[name].scale_by().update)


def check_inject(case: Case, lib: Any, static_args: Any = pj.STATIC_ARGS) -> None:
    """Hyperparameters in the state: the same updates and states; a changed one acts."""
    make = lib.make_optimizer(case.name, FACTORIES[case.name])
    kwargs = {"learning_rate": 0.5, **case.kwargs}
    injected = optax.inject_hyperparams(make, static_args=static_args[case.name])(**kwargs)
    params, grads = tree(case.shape), tree(case.shape, seed=1)
    state, states = case.scale_by().init(params), injected.init(params)
    update = jit(injected.update)
    for _ in range(2):
        directions, state = plain(case.name)(grads, state, params)
        got, states = update(grads, states, params)
    rate = kwargs["learning_rate"]
    close(got, jax.tree.map(lambda d: -rate * d, directions), ROUNDING)
    if not any(value == 0.0 for value in case.kwargs.values()):  # a momentum of 0 in the state keeps its buffer
        close(states.inner_state[0], state, ROUNDING)
    if "learning_rate" not in case.kwargs:
        states.hyperparams["learning_rate"] = jnp.float32(0.0)
        got, _ = update(grads, states, params)
        assert not any(np.any(np.asarray(u)) for u in jax.tree.leaves(got))


@cases
def test_inject_hyperparams(case: Case) -> None:
    check_inject(case, adapter)


def check_dtypes(case: Case, lib: Any) -> None:
    """Half-precision parameters: updates in their dtype, statistics and arithmetic in float32 and only there."""
    opt = case.scale_by(lib)
    params, grads = tree(case.shape, "bfloat16"), tree(case.shape, "bfloat16", seed=1)
    state = opt.init(params)
    got, new = jit(opt.update)(grads, state, params)
    wide = jax.tree.map(lambda x: x.astype("float32"), (grads, params))
    expected, wide_state = plain(case.name)(wide[0], opt.init(wide[1]), wide[1])
    close(new, wide_state, ROUNDING)
    close(got, jax.tree.map(lambda x: x.astype("bfloat16"), expected), 2.0**-8)
    mixed, _ = jax.eval_shape(opt.update, grads, state, wide[1])  # gradients of lower precision than the parameters
    assert {x.dtype for x in jax.tree.leaves(mixed)} == {jnp.dtype("float32")}


@cases
def test_dtypes(case: Case) -> None:
    check_dtypes(case, adapter)


def check_multi_steps(case: Case, lib: Any) -> None:
    """Nothing while gradients gather, then minus the schedule's rate times the direction of their mean."""
    own = case.kwargs.get("learning_rate")
    inner = case.optimizer(lib, own or (lambda count: 0.5 / (1 + count)))
    opt = optax.MultiSteps(inner, every_k_schedule=2)
    params = tree(case.shape)
    state, plain_state = opt.init(params), case.scale_by().init(params)
    update = jit(opt.update)
    for rate, seed in ((0.5, 1), (0.25, 3)):
        first, second = tree(case.shape, seed=seed), tree(case.shape, seed=seed + 1)
        updates, state = update(first, state, params)
        assert not any(np.any(np.asarray(u)) for u in jax.tree.leaves(updates))
        updates, state = update(second, state, params)
        mean = jax.tree.map(lambda x, y: (x + y) / 2, first, second)
        directions, plain_state = plain(case.name)(mean, plain_state, params)
        close(updates, jax.tree.map(lambda d, r=own or rate: -r * d, directions), ROUNDING)


@cases
def test_multi_steps_and_schedule(case: Case) -> None:
    check_multi_steps(case, adapter)


def check_map_params(case: Case, lib: Any) -> None:
    """optax.tree.map_params finds what has the parameters' shapes, also beside their specs and inside a mask."""
    skip = {"is_leaf": lambda x: isinstance(x, optax.MaskedNode)}
    params = tree(case.shape)
    names = {"a": "A", "b": ["B", "C"]}
    for opt in (case.optimizer(lib), optax.masked(case.optimizer(lib), {"a": True, "b": [True, False]})):
        state = opt.init(params)
        same = optax.tree.map_params(opt, lambda x: x, state)
        close(same, state, 0.0)
        shapes = {"A": case.shape, "B": case.shape, "C": (3,)}
        seen = []

        def visit(x: Any, name: str, seen: Any = seen) -> Any:
            if not isinstance(x, optax.MaskedNode):
                seen.append((name, x.shape))
            return name

        marked = optax.tree.map_params(opt, visit, state, names, **skip)
        assert all(shape == shapes[name] for name, shape in seen)
        arrays = sum(x.shape == case.shape for x in jax.tree.leaves(same) if hasattr(x, "shape"))
        gone = optax.tree.map_params(opt, lambda x: x, state, transform_non_params=lambda x: None)
        assert len(jax.tree.leaves(gone)) == len(seen)
        if case.method.elementwise:
            assert sum(name != "C" for name, _ in seen) == arrays
        del marked


@cases
def test_map_params(case: Case) -> None:
    check_map_params(case, adapter)


def check_masks(case: Case, lib: Any) -> None:
    """Masks, None leaves, and several transformations beside each other leave the rest alone."""
    params, grads = tree(case.shape), tree(case.shape, seed=1)
    alone = {"a": grads["a"]}
    opt = case.scale_by(lib)
    expected, _ = opt.update(alone, opt.init({"a": params["a"]}), {"a": params["a"]})
    mask = {"a": True, "b": False}
    for masked in (
        optax.masked(opt, mask),
        optax.multi_transform({"m": opt, "id": optax.identity()}, {"a": "m", "b": "id"}),
    ):
        got, state = masked.update(grads, masked.init(params), params)
        close(got, {"a": expected["a"], "b": grads["b"]}, ROUNDING)
        close(optax.tree.map_params(masked, lambda x: x, state), state, 0.0)
    holes = {"a": params["a"], "b": [None, None]}
    got, state = opt.update({"a": grads["a"], "b": [None, None]}, opt.init(holes), params)
    close(got, {"a": expected["a"], "b": [None, None]}, ROUNDING)
    frozen = opt.init(params)
    got, state = opt.update({"a": grads["a"], "b": [None, None]}, frozen, params)
    close(got, {"a": expected["a"], "b": [None, None]}, ROUNDING)
    for field in case.method.state_type._fields[1:]:
        close(getattr(state.statistics, field)["b"], getattr(frozen.statistics, field)["b"], 0.0)
    nothing = {"a": None, "b": optax.MaskedNode()}
    got, state = opt.update(nothing, opt.init(nothing), nothing)
    assert jax.tree.leaves(got) == []
    assert state.count == 1


def check_vmap(case: Case, lib: Any) -> None:
    """Two models at once, each with its own state."""
    opt = case.scale_by(lib)
    models = [(tree(case.shape, seed=seed), tree(case.shape, seed=seed + 2)) for seed in range(2)]
    batch = jax.tree.map(lambda *xs: jnp.stack(xs), *models)

    def first_step(params: Any, grads: Any, update: Any = opt.update) -> Any:
        return update(grads, opt.init(params), params)

    got = jit(jax.vmap(first_step))(*batch)
    for i, model in enumerate(models):
        close(jax.tree.map(lambda x, i=i: x[i], got), first_step(*model, plain(case.name)), ROUNDING)


REPRESENTATIVE = ("agd", "asgo", "shampoo")
"""An elementwise method, one with a single statistic, one with a tuple of them: by default only these are vmapped and masked."""
some_cases = pytest.mark.parametrize(
    "case", [pytest.param(c, id=n, marks=() if n in REPRESENTATIVE else pytest.mark.deep) for n, c in CASES.items()]
)


@some_cases
def test_vmap(case: Case) -> None:
    check_vmap(case, adapter)


@some_cases
def test_masks(case: Case) -> None:
    check_masks(case, adapter)
