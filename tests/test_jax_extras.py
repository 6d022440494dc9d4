"""The optax transformations with joined weights and biases, given statistics and batch sizes: against the core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import distance as apart
from mutation import mutated

import precond_ref as pr

jax = pytest.importorskip("jax")
jax.config.update("jax_enable_x64", True)
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import precond_ref_jax as pj  # noqa: E402
from precond_ref_jax import transformation as adapter  # noqa: E402

LOUD = {"damping": 0.5, "decay": 0.75, "momentum": 0.5}
JOIN = (("a/w", "a/b"), ("c/w", "c/b"))
SHAPES = {"a": {"w": (3, 4), "b": (3,)}, "c": {"w": (3, 4), "b": (3,)}, "d": {"w": (3, 5), "b": (2,)}}


def is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def tree(seed: int, lead: tuple[int, ...] = ()) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: rng.standard_normal(lead + shape), SHAPES, is_leaf=is_shape)


def turned(values: Any) -> Any:
    """The same network with its weights (in, out)."""
    return jax.tree.map(lambda x: x.mT if x.ndim == 2 else x, values)


def distance(got: Any, expected: Any) -> float:
    return apart(*(list(map(np.asarray, jax.tree.leaves(tree))) for tree in (got, expected)))


def samples(values: Any) -> dict[str, Any]:
    """Per-sample gradients (n, ...) as the core takes them."""
    result = {}
    for name, layer in values.items():
        w, b = layer["w"], layer["b"]
        result[f"{name}/w"] = pr.MBF.Samples(np.concatenate([w, b[..., None]], -1) if name != "d" else w)
    return result


def train(opt: Any, params: Any, rows: list[Any], **extra: Callable[[int], Any]) -> Any:
    state = opt.init(params)

    @jax.jit
    def step(params: Any, state: Any, grads: Any, extra: Any) -> Any:
        updates, state = opt.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    for t, grads in enumerate(rows):
        params, state = step(params, state, grads, {name: value(t) for name, value in extra.items()})
    return params


def check_joined(lib: Any) -> None:
    """Weights (O, I) and, with the layout for it, (I, O): the core's `Optimizer(join=)`."""
    start, rows = tree(0), [tree(t) for t in range(1, 6)]
    core = pr.Optimizer(pr.MBF(**LOUD), lr=0.125, weight_decay=0.25, join=JOIN)
    expected, state = start, core.init(start)
    for grads in rows:
        expected, state = core.step(expected, grads, state)
    make = lib.make_optimizer("mbf", pr.MBF)
    opt = make(0.125, weight_decay=0.25, join=JOIN, **LOUD)
    assert distance(train(opt, start, rows), expected) <= 1e-12
    kernels = make(0.125, weight_decay=0.25, join=JOIN, join_axis=0, layout="per_input", **LOUD)
    assert distance(turned(train(kernels, turned(start), [turned(g) for g in rows])), expected) <= 1e-12


def check_statistics(lib: Any) -> None:
    """Per-sample gradients, joined too; a parameter without any beside others of its shape."""
    start, per_sample = tree(0), [tree(t, (5,)) for t in range(1, 5)]
    rows = [jax.tree.map(lambda g: g.mean(0), given) for given in per_sample]
    core = pr.Optimizer(pr.MBF(**LOUD), lr=0.125, join=JOIN, fuse=False)
    for names in (("a/w", "c/w", "d/w"), ("c/w",)):
        expected, state = start, core.init(start)
        for grads, given in zip(rows, per_sample, strict=True):
            statistics = {name: value for name, value in samples(given).items() if name in names}
            expected, state = core.step(expected, grads, state, statistics=statistics)

        def at(t: int, names: Any = names) -> Any:
            return {name: value for name, value in samples(per_sample[t]).items() if name in names}

        opt = lib.make_optimizer("mbf", pr.MBF)(0.125, join=JOIN, **LOUD)
        assert distance(train(opt, start, rows, statistics=at), expected) <= 1e-12


def check_batch_size(lib: Any) -> None:
    """A batch size that changes from step to step, traced; the fallback's too."""
    sizes = (8.0, 8.0, 3.0)
    start, rows = tree(0), [tree(t) for t in range(1, 4)]
    method, other = pr.IFShampoo(beta2=0.25), pr.RFAdamW(beta2=0.5)
    opt = optax.chain(lib.scale_by(method, fallback=lib.scale_by(other)), optax.scale(-0.125))
    got = train(opt, start, rows, batch_size=lambda t: sizes[t])
    for name, layer in start.items():
        for key, x in layer.items():
            chosen, state = (method, method.init(x)) if key == "w" else (other, other.init(x))
            for size, grads in zip(sizes, rows, strict=True):
                direction, state = chosen.replace(batch_size=size).update(grads[name][key], state, x)
                x = x - 0.125 * direction
            assert distance(got[name][key], x) <= 1e-12


def check_statistics_of_pseudo_gradients(lib: Any) -> None:
    """Plain arrays (q, ...), stacked behind q."""
    start, given = tree(0), tree(1, (3,))
    method = pr.RFShampoo(beta2=0.25)
    opt = lib.scale_by(method)
    statistics = {"a/w": given["a"]["w"], "c/w": given["c"]["w"]}
    updates, _ = jax.jit(opt.update)(start, opt.init(start), start, statistics=statistics)
    for name in ("a", "c"):
        x = start[name]["w"]
        direction, _ = method.update(x, method.init(x), x, statistic=given[name]["w"])
        assert distance(updates[name]["w"], direction) <= 1e-12


CHECKS = (check_joined, check_statistics, check_batch_size, check_statistics_of_pseudo_gradients)
MUTANTS = {
    "bias first": ("[parts[0], jnp.expand_dims(parts[1], axis)]", "[jnp.expand_dims(parts[1], axis), parts[0]]", 0),
    "first entry as bias": ("[array[:, :-1], array[:, -1]]", "[array[:, 1:], array[:, 0]]", 0),
    "rows and columns mixed up": ("[array[:-1], array[-1]]", "[array[1:], array[0]]", 0),
    "statistics ignored": ("old, statistics.pop(name, None)", "old, None and statistics.pop(name, None)", 1),
    "statistics not in the label": (
        "structure(member.statistic), shapes",
        "structure(None), shapes[: len(jax.tree.leaves(member.state))]",
        1,
    ),
    "first batch size kept": ("batch_size=extra_args[", "batch_size=0 * extra_args[", 2),
    "stacked before the samples": ("isinstance(given[0], tuple) else 1", "isinstance(given[0], tuple) else 0", 3),
}


@pytest.mark.parametrize("check", CHECKS)
def test_check_passes(check: Any) -> None:
    check(adapter)


@pytest.mark.parametrize("name", MUTANTS)
def test_check_catches(name: str) -> None:
    old, new, check = MUTANTS[name]
    with pytest.raises((AssertionError, ValueError, TypeError)):
        CHECKS[check](mutated(adapter, (old, new)))


@pytest.mark.full
def test_pairs_under_masks_and_without_updates() -> None:
    params, grads = tree(0), tree(1)
    opt = pj.scale_by_mbf(join=JOIN, **LOUD)
    expected, _ = opt.update(grads, opt.init(params), params)
    parts = optax.multi_transform(
        {"mbf": opt, "rest": optax.identity()},
        {name: dict.fromkeys("wb", "mbf" if name in "ac" else "rest") for name in SHAPES},
    )
    got, _ = parts.update(grads, parts.init(params), params, statistics={"d/w": 0.0})
    assert distance(got, {**expected, "d": grads["d"]}) <= 1e-12
    holes = {**grads, "a": {"w": None, "b": None}}
    got, after = opt.update(holes, opt.init(params), params)
    assert distance(got, {**expected, "a": {"w": None, "b": None}}) <= 1e-12
    assert isinstance(after.statistics.m["c"]["b"], optax.MaskedNode)
    assert after.statistics.m["c"]["w"].shape == (3, 5)
    assert not np.any(after.statistics.m["a"]["w"])


def test_bad_joins_and_statistics() -> None:
    params = tree(0)
    for join in ("wb", [("a/w",)], [("a/w", "a/w")], [("a/w", "a/b"), ("c/w", "a/b")], [(0, 1)], 5, True, 0):
        with pytest.raises(ValueError, match="join must be pairs of paths"):
            pj.mbf(0.1, join=join)
    for axis in (2, -1, True, 1.0, "1"):
        with pytest.raises(ValueError, match=f"join_axis must be 0 or 1, got {axis!r}"):
            pj.mbf(0.1, join=JOIN, join_axis=axis)
    with pytest.raises(ValueError, match="join names a/x, which the tree does not have"):
        pj.mbf(0.1, join=[("a/w", "a/x")]).init(params)
    with pytest.raises(
        ValueError, match=r"a/w: join needs a weight \(I, O\) and a bias \(O,\), got \(3, 4\) and \(3,\)"
    ):
        pj.mbf(0.1, join=JOIN, join_axis=0).init(params)
    mixed = {**params, "a": {"w": params["a"]["w"], "b": params["a"]["b"].astype("float32")}}
    with pytest.raises(TypeError, match="join needs one dtype"):
        pj.mbf(0.1, join=JOIN).init(mixed)
    opt = pj.mbf(0.1, join=JOIN)
    state = opt.init(params)
    with pytest.raises(ValueError, match=r"a/w: join needs .*got \(3, 4\) and \(\)"):
        opt.update({**params, "a": {"w": params["a"]["w"], "b": None}}, state, params)
    with pytest.raises(ValueError, match="statistics names a/b: no parameter, or one joined to its weight"):
        opt.update(params, state, params, statistics={"a/b": pr.MBF.Samples(jnp.ones((2, 3)))})
    with pytest.raises(ValueError, match="statistics names nope: no parameter, or"):
        opt.update(params, state, params, statistics={"nope": None})
    for bad in (pr.MBF.Samples(jnp.ones((2, 3, 5))), [1], "a/w", {1: None, "a/w": None}, dict):
        with pytest.raises(TypeError, match="statistics must be a mapping from paths"):
            opt.update(params, state, params, statistics=bad)
    adam = pj.adam(0.1)
    with pytest.raises(ValueError, match="a/w: statistics must not be given for Adam"):
        adam.update(params, adam.init(params), params, statistics={"a/w": jnp.ones((2, 3, 4))})


def test_injected_batch_size() -> None:
    """The same through optax.inject_hyperparams: a number in the state that may be set."""
    params, grads = tree(0), tree(1)
    opt = optax.inject_hyperparams(pj.scale_by_rf_rmsprop)(batch_size=2.0)
    state = opt.init(params)
    state.hyperparams["batch_size"] = jnp.asarray(8.0)
    got, _ = opt.update(grads, state, params)
    plain = pj.scale_by_rf_rmsprop(batch_size=8.0)
    expected, _ = plain.update(grads, plain.init(params), params)
    assert distance(got, expected) <= 1e-12


def check_products(module: Any) -> None:
    """Every product of a step is float32 proper, or what the user has chosen."""
    opt = module.scale_by(pr.ASGO())
    params = {"w": jnp.ones((3, 4), "float32"), "b": jnp.ones(3, "float32")}
    state = opt.init(params)

    def precisions() -> set[str]:
        text = jax.jit(lambda u, s, p: opt.update(u, s, p)).lower(params, state, params).as_text()
        return {line.split("precision = ")[1].split("]")[0] for line in text.splitlines() if "dot_general" in line}

    assert precisions() == {"[HIGHEST, HIGHEST"}
    with jax.default_matmul_precision("tensorfloat32"):
        assert precisions() == {"[HIGH, HIGH"}
    assert jax.config.jax_default_matmul_precision is None


def test_products_are_float32() -> None:
    check_products(adapter)
    for change in (("chosen or", "None and"), ('chosen or "highest"', '"highest"')):
        with pytest.raises(AssertionError):
            check_products(mutated(adapter, change))
