"""The optax transformations: equal to the core, and well-behaved in everything that optax users do with one.

Each check is a function of a case and of a library, which is the adapter's module or a copy of it with one mistake.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import pickle
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
from configs import CONFIGS, LOUD, Config, Decayed
from conftest import EAGERLY
from helpers import distance, gradients
from mutation import mutated

import precond_ref as pr
import precond_ref_jax as pj
from precond_ref.problems import datasets, load_digits, mlp
from precond_ref.problems.base import Space
from precond_ref.protocol import Method

jax = pytest.importorskip("jax")
jax.config.update("jax_enable_x64", True)
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

from precond_ref_jax import transformation as adapter  # noqa: E402

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
    cls = factory.__qualname__.partition(".")[0]
    fields = inspect.signature(factory).parameters
    for method, shape in LOUD[cls].values():
        kwargs = {field: getattr(method, field) for field in fields if hasattr(method, field)}
        if inspect.isclass(factory) and type(method) is not factory:
            continue
        if len(kwargs) == len(fields) and factory(**kwargs) == method:
            return Case(name, kwargs, shape)
    return Case(name, {}, next(iter(LOUD[cls].values())).shape)


CASES = {name: case_for(name, factory) for name, factory in FACTORIES.items()}
REPRESENTATIVE = ("agd", "asgo", "shampoo")
"""An elementwise method, one with a single statistic, one with a tuple of them: the quick tier runs on these."""
ENDS = {True: pytest.mark.full, False: pytest.mark.deep}
"""Of a class, and of a preset that sets fields."""
cases = pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=n, marks=() if n in REPRESENTATIVE else ENDS[inspect.isclass(FACTORIES[n])])
        for n, c in CASES.items()
    ],
)
kinds = pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            c,
            id=n,
            marks=() if n in REPRESENTATIVE else ENDS[c.method.name in EAGERLY and inspect.isclass(FACTORIES[n])],
        )
        for n, c in CASES.items()
    ],
)
"""One of each kind of computation, the others in the deep tests: each is compiled, with its values, in `cases`."""
ONE_EACH = {(case.method, case.shape): name for name, case in CASES.items()}


def tier(config: Config) -> Any:
    """Quick, full, or deep."""
    name = ONE_EACH.get((config.method, config.shape))
    return pytest.mark.deep if name is None else () if name in REPRESENTATIVE else pytest.mark.full


configs = pytest.mark.parametrize("config", [pytest.param(c, id=name, marks=tier(c)) for name, c in CONFIGS.items()])


def tree(shape: tuple[int, ...], dtype: Any = "float32", seed: int = 0) -> Any:
    """Parameters or gradients: two of the method's shape, which are stacked, and one that a matrix method leaves."""
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

    last, got = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(transformation.init(params), grads)
    assert last.count.shape == ()
    assert last.count.dtype == jnp.int32
    assert last.count == steps
    gaps = []
    for key, param in params.items():
        state = config.method.init(param)
        expected = []
        for g in grads[key]:
            direction, state = config.method.update(g, state, param)
            expected.append(direction)
        gaps.append(distance(np.asarray(got[key]), np.stack(expected)))
    assert np.max(gaps) <= 1e-13  # unlike max, NaN where there is one
    return np.max(gaps)


@configs
def test_recorded_gradients(config: Config) -> None:
    check_recorded(config, adapter)


def tiny_problem(xp: Any) -> mlp.Classifier:
    """Digits of 4 x 4 pixels, 16-6-10."""
    images, labels = load_digits()
    small = images.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4))
    split = datasets.split_four_fifths(small, labels, scale=16.0)
    return mlp.classifier(lambda: split, 10, "tiny", Space.make(xp, "float64"), 0, hidden=(6,), batch_size=50)


def rounding_decides(method: Any) -> bool:
    """Whether roundings grow to the size of a step: bfloat16 products, and bases of eigenspaces of many dimensions."""
    return method.name in ("SOAP", "EShampoo") or getattr(method, "compute_dtype", None) is not None


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

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any) -> Any:
        traces.append(1)
        grads = jax.grad(problem.loss)(params, batch)
        updates, new = opt.update(grads, state, params, value=1.0, an_argument_nobody_expects=1)
        moved = optax.apply_updates(params, updates)
        return jax.lax.cond(state[0].count >= 0, lambda: (moved, new), lambda: (params, state))

    compilations = []
    for t in range(10):
        batch, before = problem.batch(t), len(COMPILATIONS)
        params, state = step(params, state, batch)
        compilations.append(len(COMPILATIONS) - before)
        host_params, host_state = core.step(host_params, host.loss_and_grad(host_params, host.batch(t))[1], host_state)
    assert len(traces) == 1
    assert compilations[0] > 0
    assert sum(compilations[1:]) == 0
    assert state[0].count == 10
    start = host.init()
    gaps = [
        np.linalg.norm(np.asarray(params[key]) - value) / np.linalg.norm(value - start[key])
        for key, value in host_params.items()
    ]
    assert rounding_decides(case.method) or np.max(gaps) <= (1e-12 if case.method.elementwise else 1e-9)
    return np.max(gaps)


COMPILATIONS: list[str] = []
"""One entry for each compilation of this process."""


def listen(event: str, duration: float, **kwargs: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILATIONS.append(event)


jax.monitoring.register_event_duration_secs_listener(listen)


@kinds
def test_training(case: Case) -> None:
    check_training(case, adapter)


# ---- the interface --------------------------------------------------------------------------------------------------


@functools.cache
def plain(name: str) -> Any:
    """What the adapter's ``scale_by`` update is under jit."""
    return jax.jit(CASES[name].scale_by().update)


def check_inject(case: Case, lib: Any, static_args: Any = pj.STATIC_ARGS) -> None:
    """Hyperparameters in the state: the same updates and states; a changed one acts."""
    make = lib.make_optimizer(case.name, FACTORIES[case.name])
    kwargs = {"learning_rate": 0.5, **case.kwargs}
    injected = optax.inject_hyperparams(make, static_args=static_args[case.name])(**kwargs)
    params, grads = tree(case.shape), tree(case.shape, seed=1)
    state, states = case.scale_by().init(params), injected.init(params)
    update = jax.jit(injected.update)
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
    got, new = jax.jit(opt.update)(grads, state, params)
    wide = jax.tree.map(lambda x: x.astype("float32"), (grads, params))
    expected, wide_state = plain(case.name)(wide[0], opt.init(wide[1]), wide[1])
    close(new, wide_state, ROUNDING)
    close(got, jax.tree.map(lambda x: x.astype("bfloat16"), expected), 2.0**-8)
    mixed, _ = jax.eval_shape(opt.update, grads, state, wide[1])  # gradients of lower precision than the parameters
    assert {x.dtype for x in jax.tree.leaves(mixed)} == {jnp.dtype("float32")}


@kinds
def test_dtypes(case: Case) -> None:
    check_dtypes(case, adapter)


def check_multi_steps(case: Case, lib: Any) -> None:
    """Nothing while gradients gather, then minus the schedule's rate times the direction of their mean."""
    own = case.kwargs.get("learning_rate")
    inner = case.optimizer(lib, own or (lambda count: 0.5 / (1 + count)))
    opt = optax.MultiSteps(inner, every_k_schedule=2)
    params = tree(case.shape)
    state, plain_state = opt.init(params), case.scale_by().init(params)
    update = jax.jit(opt.update)
    for rate, seed in ((0.5, 1), (0.25, 3)):
        first, second = tree(case.shape, seed=seed), tree(case.shape, seed=seed + 1)
        updates, state = update(first, state, params)
        assert not any(np.any(np.asarray(u)) for u in jax.tree.leaves(updates))
        updates, state = update(second, state, params)
        mean = jax.tree.map(lambda x, y: (x + y) / 2, first, second)
        directions, plain_state = plain(case.name)(mean, plain_state, params)
        if not rounding_decides(case.method):
            close(updates, jax.tree.map(lambda d, r=own or rate: -r * d, directions), ROUNDING)


@kinds
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
    kept, before = (
        jax.tree.map(lambda t: t["b"], x.statistics, is_leaf=lambda t: isinstance(t, dict)) for x in (state, frozen)
    )
    close(kept, before, 0.0)
    nothing = {"a": None, "b": optax.MaskedNode()}
    got, state = opt.update(nothing, opt.init(nothing), nothing)
    assert jax.tree.leaves(got) == []
    assert state.count == 1


class Pair(NamedTuple):
    """Parameters that are a named tuple; also what `PerAxis` keeps of an axis."""

    w: Any
    b: Any


class PerAxisState(NamedTuple):
    """State of `PerAxis`."""

    step: Any
    axes: tuple[Pair, ...]


class PerAxis(Method):
    """Nested tuples of arrays, as many as the parameter has axes."""

    state_type: ClassVar[Any] = PerAxisState

    def init(self, param: Any, *, stack_ndim: int = 0) -> PerAxisState:
        zero = 0.0 * param.reshape((*param.shape[:stack_ndim], -1))[..., 0]
        return PerAxisState(0, tuple(Pair(zero + axis, zero) for axis in range(param.ndim - stack_ndim)))

    def update(self, grad: Any, state: Any, param: Any, **_: Any) -> Any:
        axes = tuple(Pair(w + (1 + b) * grad.sum(tuple(range(-len(state.axes), 0))), b + 1) for w, b in state.axes)
        scale = sum(w - b for w, b in axes)
        return grad * scale.reshape(scale.shape + (1,) * len(axes)), PerAxisState(state.step + 1, axes)


def check_containers(lib: Any) -> None:
    """Parameters in tuples, alone, and with other numbers of axes: directions and states are the core's, and the state
    has a tree like the parameters for each array."""
    method, shapes = PerAxis(), ((3, 4), (2, 3, 4), (5,), (3, 4))
    opt = lib.scale_by(method, takes=lambda path, array: array.ndim > 0, fallback=optax.identity())
    for build, chosen in (
        (tuple, shapes[:3]),
        (lambda xs: Pair(xs[0], (xs[1],)), shapes[:2]),
        (lambda xs: xs[0], shapes[1:2]),
        (lambda xs: {"x": list(xs), "y": None, "z": jnp.ones(())}, shapes),
    ):
        rows = [gradients(shape, 2, seed) for seed, shape in enumerate(chosen)]
        expected, states = [], [method.init(np.ones(shape)) for shape in chosen]
        for t in range(2):
            pairs = [method.update(g[t], state, g[t]) for g, state in zip(rows, states, strict=True)]
            expected, states = zip(*pairs, strict=True)
        state = opt.init(build([jnp.asarray(g[0]) for g in rows]))
        structure = jax.tree.structure(state)
        for t in range(2):
            grads = build([jnp.asarray(g[t]) for g in rows])
            got, state = jax.jit(opt.update)(grads, state)
        assert jax.tree.structure(state) == structure
        close([x for x in jax.tree.leaves(got) if x.ndim], [*expected], 1e-14)
        most = max(map(len, chosen))
        assert len(state.statistics.axes) == most
        for i, field in itertools.product(range(most), range(2)):
            array = getattr(state.statistics.axes[i], Pair._fields[field])
            close(jax.tree.leaves(array), [s.axes[i][field] for s in states if i < len(s.axes)], 1e-14)
            alike = jax.tree.map(lambda x: 0.0, array, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
            assert jax.tree.structure(alike) == jax.tree.structure(grads)


def test_containers() -> None:
    check_containers(adapter)


def check_abstract(case: Case, lib: Any) -> None:
    """``init`` of shapes and dtypes alone gives the state of parameters that have them, as optax's own does."""
    opt = case.optimizer(lib)
    params = tree(case.shape, "bfloat16")
    shapes = jax.eval_shape(lambda: params)
    state = opt.init(params)
    close(opt.init(shapes), state, 0.0)
    assert jax.eval_shape(opt.init, shapes) == jax.eval_shape(lambda: state)


@cases
def test_abstract_parameters(case: Case) -> None:
    check_abstract(case, adapter)


def check_vmap(case: Case, lib: Any) -> None:
    """Two models at once, each with its own state."""
    opt = case.scale_by(lib)
    models = [(tree(case.shape, seed=seed), tree(case.shape, seed=seed + 2)) for seed in range(2)]
    batch = jax.tree.map(lambda *xs: jnp.stack(xs), *models)

    def first_step(params: Any, grads: Any, update: Any = opt.update) -> Any:
        return update(grads, opt.init(params), params)

    got = jax.jit(jax.vmap(first_step))(*batch)
    for i, model in enumerate(models):
        close(jax.tree.map(lambda x, i=i: x[i], got), first_step(*model, plain(case.name)), ROUNDING)


some_cases = pytest.mark.parametrize(
    "case", [pytest.param(c, id=n, marks=() if n in REPRESENTATIVE else pytest.mark.deep) for n, c in CASES.items()]
)


@some_cases
def test_vmap(case: Case) -> None:
    check_vmap(case, adapter)


@some_cases
def test_masks(case: Case) -> None:
    check_masks(case, adapter)


# ---- a method that reads its parameter -------------------------------------------------------------------------------


def check_decay_inside(lib: Any) -> None:
    """The parameter that the method sees is the parameter."""
    opt = lib.make_optimizer("decay_inside", Decayed)(0.5, weight_decay=0.25)
    x, state = jnp.ones((2, 2)), opt.init(jnp.ones((2, 2)))
    for expected in (-0.625, -0.859375):  # -0.5 (1 + 0.25), then -0.5 (0.625 + 1 + 0.25 * 0.375)
        updates, state = opt.update(jnp.ones((2, 2)), state, x)
        np.testing.assert_array_equal(updates, np.full((2, 2), expected))
        x = x + updates


def test_weight_decay_inside_the_method() -> None:
    check_decay_inside(adapter)
    make = adapter.make_optimizer("decay_inside", Decayed)
    assert "mask" not in inspect.signature(make).parameters
    params = jnp.ones((2, 2))
    pj.rf_rmsprop(0.5).update(params, pj.rf_rmsprop(0.5).init(params))
    refused = [make(0.5), make(0.5, weight_decay=0.25)]  # it says that it reads them, whatever its fields
    refused += [pj.rf_rmsprop(0.5, weight_decay=0.25), pj.agd(0.5, weight_decay=0.25), pj.adafactor(0.5)]
    for opt in refused:
        with pytest.raises(ValueError, match="requires the current value of parameters, but you are not passing"):
            opt.update(params, opt.init(params))


DTYPES = {"a": "float32", "b": "float64", "c": "bfloat16"}


def check_mixed(lib: Any) -> None:
    """Parameters of one shape and several dtypes, and array-valued hyperparameters."""
    shape = (3, 4)
    params = {key: jnp.asarray(gradients(shape)[0], dtype) for key, dtype in DTYPES.items()}
    fields = {name: jnp.asarray(value, "float64") for name, value in (("beta1", 0.75), ("beta2", 0.5), ("eps", 0.25))}
    opt = lib.scale_by(pr.ASGO(**fields, every=2))
    state = opt.init(params)
    for _ in range(2):
        updates, new = jax.jit(opt.update)(params, state, params)
        assert jax.tree.map(lambda x: x.dtype, (updates, new)) == jax.tree.map(lambda x: x.dtype, (params, state))
        state = new
    wide = lib.scale_by(pr.ASGO(beta1=0.75, beta2=0.5, eps=0.25, every=2), dtype="float64")
    assert {x.dtype for x in jax.tree.leaves(wide.init(params).statistics)} == {jnp.dtype("float64")}


def test_dtypes_beside_each_other() -> None:
    check_mixed(adapter)
    narrow = pj.scale_by(Decayed(narrow_state=True)).init(jnp.ones((2, 2), "bfloat16"))
    assert narrow.statistics.buffer.dtype == jnp.bfloat16
    with pytest.raises(TypeError, match="w: ASGO factorises matrices, which needs float32 or float64"):
        pj.scale_by_asgo(dtype="bfloat16").init({"w": jnp.ones((2, 2))})


# ---- routing --------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_what_a_matrix_method_does_not_take_goes_to_adam_or_where_you_say() -> None:
    params = {"w": jnp.ones((3, 4)), "embedding": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    grads = {key: jnp.asarray(gradients(p.shape)[0]) for key, p in params.items()}

    def first(**options: Any) -> Any:
        opt = pj.scale_by_asgo(eps=0.25, **options)
        return opt.update(grads, opt.init(params), params)

    asgo = pr.ASGO(eps=0.25)
    by_asgo = asgo.update(grads["w"], asgo.init(params["w"]), params["w"])[0]
    sign = jnp.sign(grads["w"])  # Adam's first step
    updates, state = first()
    np.testing.assert_allclose(updates["w"], by_asgo, rtol=0, atol=1e-12)
    np.testing.assert_allclose(updates["embedding"], sign, rtol=0, atol=1e-6)
    np.testing.assert_allclose(updates["bias"], jnp.sign(grads["bias"]), rtol=0, atol=1e-6)
    assert isinstance(state.statistics.m["bias"], optax.MaskedNode)
    updates, _ = first(fallback=optax.scale(2.0))
    np.testing.assert_array_equal(updates["bias"], 2.0 * grads["bias"])
    updates, _ = first(takes=lambda path, array: path == "embedding")
    np.testing.assert_allclose(updates["embedding"], by_asgo, rtol=0, atol=1e-12)
    np.testing.assert_allclose(updates["w"], sign, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="bias: ASGO takes a parameter with exactly 2 axes"):
        first(takes=lambda path, array: True)


def test_parameters_of_one_shape_share_one_factorization() -> None:
    params = {str(i): jnp.ones((4, 4)) for i in range(5)}
    opt = pj.scale_by_asgo(every=3)
    state = opt.init(params)
    text = str(jax.make_jaxpr(opt.update)(params, state, params))
    assert text.count(" eigh[") == 1
    assert text.count(" cond[") == 1


@pytest.mark.full
def test_statistics_are_the_cores() -> None:
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((3, 4))}
    grads = {"a": jnp.asarray(gradients((3, 4))[0]), "b": jnp.asarray(gradients((3, 4))[1])}
    opt = pj.scale_by_shampoo(eps=0.25)
    _, state = opt.update(grads, opt.init(params), params)
    for key, g in grads.items():
        left, right = (gram[key] for gram in state.statistics.grams)
        np.testing.assert_allclose(left, g @ g.T, rtol=0, atol=1e-13)
        np.testing.assert_allclose(right, g.T @ g, rtol=0, atol=1e-13)


# ---- what a user gets wrong -----------------------------------------------------------------------------------------

GOOD = {"w": jnp.ones((3, 4)), "bias": jnp.ones(4)}


@pytest.mark.parametrize(
    ("updates", "params", "error", "message"),
    [
        ({"w": GOOD["w"].T, "bias": GOOD["bias"]}, GOOD, ValueError, "w: the update must have its parameter's shape"),
        ({"w": GOOD["w"]}, GOOD, ValueError, "params must have the structure of the updates: .*key"),
        ({"w": GOOD["w"]}, None, ValueError, "state.statistics.m must have the structure of the updates: .*key"),
        ({"w": GOOD["w"][:2], "bias": GOOD["bias"]}, None, ValueError, "w: state.m must have shape"),
        (jax.tree.map(lambda x: 1j * x, GOOD), GOOD, TypeError, "w: ASGO does not support complex parameters"),
        (jax.tree.map(lambda x: x > 0, GOOD), GOOD, TypeError, "w: ASGO takes real floating arrays, got dtype bool"),
        (GOOD, {"w": None, "bias": GOOD["bias"]}, ValueError, "w: there is an update but no parameter"),
    ],
)
def test_updates_that_do_not_fit(updates: Any, params: Any, error: Any, message: str) -> None:
    opt = pj.scale_by_asgo()
    with pytest.raises(error, match=message):
        opt.update(updates, opt.init(GOOD), params)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pj.agd(), TypeError, r"agd\(\) missing a required argument: 'learning_rate'"),
        (lambda: pj.agd(1.0, b1=0.9), TypeError, r"agd\(\) got an unexpected keyword argument 'b1'"),
        (lambda: pj.agd(1.0, 0.9), TypeError, r"agd\(\) too many positional arguments"),
        (lambda: pj.agd(1.0, beta1=1.0), ValueError, "beta1 must be finite and >= 0 and < 1, got 1.0"),
        (lambda: pj.agd(1.0, mask=True), ValueError, "mask says what weight_decay applies to"),
        (lambda: pj.scale_by("asgo"), TypeError, "method must be a Method such as precond_ref.ASGO"),
        (lambda: pj.scale_by_asgo(takes=["w"]), TypeError, "takes must be a callable"),
        (lambda: pj.scale_by_asgo(fallback=pj.adam), TypeError, "fallback must be an optax.GradientTransformation"),
        (lambda: pj.scale_by_asgo(dtype="int32"), TypeError, "dtype must be a real floating dtype"),
        (lambda: pj.scale_by_asgo().init({"w": 1j * GOOD["w"]}), TypeError, "w: ASGO does not support complex"),
        (lambda: pj.scale_by_agd().init({"w": jnp.arange(3)}), TypeError, "w: AGD takes real floating arrays"),
        (lambda: pj.scale_by_asgo(heads=2).init(GOOD), ValueError, "w: heads must divide the rows"),
        (lambda: pj.scale_by_agd().init("w"), TypeError, "the parameter: .*'w'"),
        (lambda: pj.scale_by_agd().update(GOOD, pj.agd(1.0).init(GOOD)), TypeError, "state must be what init of AGD"),
        (lambda: pj.scale_by_agd().update(GOOD, pj.scale_by_adam().init(GOOD)), TypeError, "what init of AGD returned"),
        (lambda: pj.asgd, AttributeError, "has no attribute 'asgd'"),
        (lambda: pj.scale_by_scale_by, AttributeError, "has no attribute 'scale_by_scale_by'"),
    ],
)
def test_bad_calls(call: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- the package ----------------------------------------------------------------------------------------------------


def test_every_method_and_preset_has_its_two_functions() -> None:
    presets = sum(len(method.presets) for method in pr.list_methods().values())
    assert len(FACTORIES) == len(pr.list_methods()) + presets
    assert {"agd", "full_adagrad", "rmsprop", "asgo_theory"} <= FACTORIES.keys()
    assert set(pj.__all__) <= set(dir(pj))
    for name, factory in FACTORIES.items():
        fields = inspect.signature(factory).parameters
        for function in (getattr(pj, name), getattr(pj, f"scale_by_{name}")):
            parameters = inspect.signature(function).parameters
            assert all(
                parameters[field].default == fields[field].default for field in fields if field != "learning_rate"
            )
            assert function.__doc__
            assert pickle.loads(pickle.dumps(function)) is function
        assert inspect.signature(getattr(pj, name)).parameters["learning_rate"].annotation is optax.ScalarOrSchedule


@pytest.mark.parametrize("name", ["asgo", "agd"])
@pytest.mark.full
def test_the_public_functions_are_the_tested_ones(name: str) -> None:
    params, grads = tree((4, 3), "float64"), tree((4, 3), "float64", seed=1)
    method = pr.list_methods()[name.upper()](eps=0.25) if name == "asgo" else pr.AGD(delta=0.25)
    kwargs = {"eps": 0.25} if name == "asgo" else {"delta": 0.25}
    opt, core = getattr(pj, name)(0.5, **kwargs), pr.Optimizer(method, lr=0.5)
    updates, _ = opt.update(grads, opt.init(params), params)
    close(optax.apply_updates(params, updates), core.step(params, grads, core.init(params))[0], 1e-14)


def test_states_pickle() -> None:
    params = tree((4, 3))
    state = pj.asgo(0.5).init(params)
    close(pickle.loads(pickle.dumps(state)), state, 0.0)


@pytest.mark.full
def test_orbax_saves_and_restores(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax's, at import and about its own future
        checkpoint = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is not installed")
        opts = {name: CASES[name].optimizer() for name in REPRESENTATIVE}
        params = tree((5, 3), "bfloat16")
        states = {}
        for name, opt in opts.items():
            _, states[name] = opt.update(params, opt.init(params), params)
        with checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "states", states)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "states", jax.tree.map(jnp.zeros_like, states))
    close(restored, states, 0.0)


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_lazy_and_says_what_is_missing() -> None:
    assert run_python("import precond_ref_jax, sys; print({'jax', 'optax'} & set(sys.modules))") == "set()"
    code = (
        "import sys, precond_ref_jax as p; sys.modules['optax'] = None\ntry: p.agd\nexcept ImportError as e: print(e)"
    )
    assert run_python(code) == "precond_ref_jax needs optax: python -m pip install 'precond-ref[jax]'"


@pytest.mark.full
def test_example_trains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("flax", reason="the example's network is flax's")
    path = ROOT / "examples" / "jax_mnist.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    monkeypatch.delenv("PRECOND_REF_DATA", raising=False)
    accuracy = runpy.run_path(str(path))["main"](epochs=2)
    assert capsys.readouterr().out.startswith("epoch 1: loss ")
    assert accuracy > 0.9  # 0.94 after two epochs on the digits


# ---- planted bugs ---------------------------------------------------------------------------------------------------


EVERY = Config(pr.ASGO(beta1=0.75, beta2=0.5, eps=0.25, every=3), (4, 3))

MUTANTS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "updates are not counted": ("optax.safe_increment(state.count)", "state.count",
        lambda lib: check_recorded(CONFIGS["AGD-default"], lib)),
    "the last step's scalars": ("scalars(count + 1,", "scalars(count,",
        lambda lib: check_recorded(CONFIGS["AGD-default"], lib)),
    "the method does not see the step": ("state._replace(step=count)", "state._replace(step=0 * count)",
        lambda lib: check_recorded(EVERY, lib)),
    "directions of a stack in the wrong order": ("in zip(direction if stacked", "in zip(direction[::-1] if stacked",
        lambda lib: check_recorded(EVERY, lib)),
    "states of a stack in the wrong order": ("for i in range(len(rows))]", "for i in reversed(range(len(rows)))]",
        lambda lib: check_recorded(EVERY, lib)),
    "the state of the step before": ("column[member.at[0]] = value", "column[member.at[0]] = column[member.at[0]]",
        lambda lib: check_recorded(EVERY, lib)),
    "the sign flips twice": ("[d.astype(p.dtype) for", "[-d.astype(p.dtype) for",
        lambda lib: check_training(CASES["agd"], lib)),
    "the rate's sign does not flip": ("optax.scale_by_learning_rate(learning_rate)",
        "optax.scale_by_learning_rate(learning_rate, flip_sign=False)", lambda lib: check_training(CASES["agd"], lib)),
    "weight decay after the rate": ("*parts, optax.scale_by_learning_rate(learning_rate))",
        "optax.scale_by_learning_rate(learning_rate), *parts)", lambda lib: check_training(CASES["agd"], lib)),
    "what is not taken keeps its gradient": ("outputs = treedef.flatten_up_to(transformed)", "pass",
        lambda lib: check_training(CASES["asgo"], lib)),
    "the other transformation forgets": ("ScaleByState(count, new_statistics, new_fallback)",
        "ScaleByState(count, new_statistics, state.fallback)", lambda lib: check_training(CASES["asgo"], lib)),
    "extra arguments are refused": ("params: Tree = None, **extra_args: Any) ->",
        "params: Tree = None, *, extra_args: Any = {}) ->", lambda lib: check_training(CASES["agd"], lib)),
    "updates in float32": ("[d.astype(p.dtype) for", "[d for", lambda lib: check_dtypes(CASES["agd"], lib)),
    "statistics in half precision": ("bits >= 32", "bits >= 8", lambda lib: check_dtypes(CASES["agd"], lib)),
    "dtypes in one stack": ("tuple((g.shape, p.dtype) for g, p", "tuple((g.shape,) for g, p", check_mixed),
    "array hyperparameters promote": ("jnp.asarray(value, dtype) for name, value in fields.items()",
        "jnp.asarray(value) for name, value in fields.items()", check_mixed),
    "the gradient for the parameter": ("[_real(method, param) for param in params]",
        "[_real(method, grad) for grad in grads]", check_decay_inside),
    "statistics pass for parameters": ("if getattr(value, \"shape\", None) == shape", "if value is not None",
        lambda lib: check_map_params(CASES["dasgo"], lib)),
    "tuples of arrays at the leaves": ("if not held:", "if True:", check_containers),
    "trees for the first parameter's arrays only": ("max(held, key=len)", "held[0][:2]", check_containers),
    "any tuple is a tree like the parameters": ("any(map(_is_tuple, values))", "False", check_containers),
    "shapes are no parameters": ("jnp.zeros_like(x) if isinstance(x, jax.ShapeDtypeStruct) else x", "x",
        lambda lib: check_abstract(CASES["agd"], lib)),
    "None is an update": ("        if leaf is None:\n            return None\n", "",
        lambda lib: check_masks(CASES["agd"], lib)),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_seen(name: str) -> None:
    old, new, check = MUTANTS[name]
    lib = mutated(adapter, (old, new))
    with pytest.raises((AssertionError, TypeError, ValueError, jax.errors.JaxRuntimeError)):
        check(lib)


def test_the_checks_of_the_planted_bugs_pass_without_them() -> None:
    for check in (
        lambda lib: check_recorded(EVERY, lib),
        lambda lib: check_map_params(CASES["dasgo"], lib),
        lambda lib: check_abstract(CASES["agd"], lib),
    ):
        check(adapter)


def test_a_static_argument_left_out_is_seen() -> None:
    left_out = {"asgo": tuple(arg for arg in pj.STATIC_ARGS["asgo"] if arg != "every")}
    hint = r"every must be a Python int, got .*: optax.inject_hyperparams needs static_args=.*STATIC_ARGS\['asgo'\]"
    with pytest.raises(TypeError, match=hint):
        check_inject(CASES["asgo"], adapter, left_out)
    with pytest.raises(TypeError, match=r"got [^:]*: optax[^:]*\['asgo'\]$"):  # and of no other function
        pj.asgo(0.5, every=jnp.asarray(2))
    with pytest.raises(TypeError, match="every must be a Python int, got 2.0$"):
        pj.asgo(0.5, every=2.0)
