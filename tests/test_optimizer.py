"""The tree level: structures, routing, stacking, flat buffers, blocks, rates, decay, non-finite gradients, refusals."""

from __future__ import annotations

import collections
import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from configs import CONFIGS, Config
from conftest import Backend, make_backend
from helpers import distance, gradients, leaves

import precond_ref as pr

ids = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


class Layer(NamedTuple):
    """A tree node of its own type."""

    weight: Any
    bias: Any


def everything(method: Any) -> Any:
    """A route that gives every parameter to one method."""
    return lambda path, array: method


def decay(config: Config) -> float:
    """A decoupled weight decay, none for a method that has its own."""
    return 0.0 if config.method.weight_decay else 0.25


def run(optimizer: pr.Optimizer, params: Any, grads: list[Any]) -> tuple[Any, Any]:
    state = optimizer.init(params)
    for g in grads:
        params, state = optimizer.step(params, g, state)
    return params, state


def flat(tree: Any) -> np.ndarray:
    """All entries of a tree of NumPy arrays, in its order."""
    if isinstance(tree, dict):
        return np.concatenate([flat(v) for v in tree.values()])
    if isinstance(tree, (list, tuple)):
        return np.concatenate([flat(v) for v in tree])
    return np.ravel(tree)


def network(seed: int = 0, layers: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    tree: dict[str, Any] = {
        f"layer{i}": Layer(rng.standard_normal((4, 3)), rng.standard_normal(4)) for i in range(layers)
    }
    tree["head"] = [rng.standard_normal((2, 4)), (rng.standard_normal(2), np.asarray(rng.standard_normal()))]
    return tree


# ---- fused equals one by one ----------------------------------------------------------------------------------------


@pytest.mark.eager_cases
def test_fused_equals_one_by_one(backend: Backend, config: Config) -> None:
    rng = np.random.default_rng(1)
    shapes = {"a": config.shape, "b": config.shape, "c": config.shape}
    if config.method.elementwise:
        shapes |= {"d": (2, 3), "e": (), "f": (5,)}

    def tree() -> dict[str, Any]:
        return {k: backend.asarray(rng.standard_normal(s)) for k, s in shapes.items()}

    params, grads = tree(), [tree() for _ in range(5)]
    optimizer = pr.Optimizer(config.method, lr=0.125, weight_decay=decay(config), route=everything(config.method))
    fused, state = run(optimizer, params, grads)
    single = dataclasses.replace(optimizer, fuse=False)
    separate, _ = run(single, params, grads)
    assert len(state.groups) == 1
    assert len(single.describe(params)) == len(shapes)
    for key in shapes:
        assert distance([backend.numpy(fused[key])], [backend.numpy(separate[key])]) <= 1e-14
        assert fused[key].dtype == params[key].dtype
        assert tuple(fused[key].shape) == tuple(params[key].shape)


@ids
def test_equals_the_method_by_hand(config: Config) -> None:
    grads = gradients(config.shape, 5)
    params, state = {"w": np.ones(config.shape)}, None
    optimizer = pr.Optimizer(
        config.method, lr=lambda step: 0.5 / (1 + step), weight_decay=decay(config), route=everything(config.method)
    )
    state = optimizer.init(params)
    x, s = np.ones(config.shape), config.method.init(np.ones(config.shape))
    for t, g in enumerate(grads):
        params, state = optimizer.step(params, {"w": g}, state)
        direction, s = config.method.update(g, s, x)
        lr = 0.5 / (1 + t)
        x = (1 - lr * decay(config)) * x - lr * direction
        assert np.allclose(params["w"], x, rtol=1e-14, atol=0)
    (member,) = optimizer.unstack(params, state).values()
    for a, b in zip(leaves(member._replace(step=0)), leaves(s._replace(step=0)), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("method", [pr.ASGO(eps=0.25), pr.Shampoo(eps=0.25), pr.Muon(root="svd")], ids=repr)
def test_blocks_equal_separate_matrices(method: Any) -> None:
    rng = np.random.default_rng(2)
    w, grads = rng.standard_normal((5, 7)), gradients((5, 7), 4)
    cut = {f"{i}{j}": (slice(i, i + 3), slice(j, j + 3)) for i in (0, 3) for j in (0, 3, 6)}
    optimizer = pr.Optimizer(method, lr=0.125, weight_decay=0.25, block_size=3)
    blocked, state = run(optimizer, {"w": w}, [{"w": g} for g in grads])
    parts, _ = run(
        pr.Optimizer(method, lr=0.125, weight_decay=0.25),
        {k: w[s] for k, s in cut.items()},
        [{k: g[s] for k, s in cut.items()} for g in grads],
    )
    for key, s in cut.items():
        assert distance([blocked["w"][s]], [parts[key]]) <= 1e-14
    names = set(optimizer.unstack({"w": w}, state))
    assert names == {f"w[{a}, {b}]" for a in ("0:3", "3:5") for b in ("0:3", "3:6", "6:7")}
    assert all(bool(report.finite) for report in optimizer.diagnose({"w": w}, state).values())
    whole, _ = run(pr.Optimizer(method, lr=0.125, weight_decay=0.25), {"w": w}, [{"w": g} for g in grads])
    assert distance([whole["w"]], [blocked["w"]]) > 1e-3  # it is another method


def test_blocks_of_a_tensor_and_of_elementwise_methods() -> None:
    w, grads = np.ones((4, 3, 5)), gradients((4, 3, 5), 3)
    method = pr.Shampoo(eps=0.25)
    optimizer = pr.Optimizer(method, lr=0.125, block_size=2)
    blocked, _ = run(optimizer, {"w": w}, [{"w": g} for g in grads])
    s = (slice(2, 4), slice(2, 3), slice(4, 5))
    part, _ = run(pr.Optimizer(method, lr=0.125), {"w": w[s]}, [{"w": g[s]} for g in grads])
    assert distance([blocked["w"][s]], [part["w"]]) <= 1e-14
    assert blocked["w"].shape == w.shape
    assert pr.Optimizer(pr.Adam(), block_size=2).describe({"w": w})[0].members == (("w", None),)


# ---- trees ----------------------------------------------------------------------------------------------------------


def test_structure_types_and_order_are_kept() -> None:
    params = network()
    params["ordered"] = collections.OrderedDict(z=np.ones(2), a=np.ones((2, 2)))
    params["empty"] = {}
    grads = network(1)
    grads["ordered"] = {"a": np.ones((2, 2)), "z": np.zeros(2)}  # another order of keys
    grads["empty"] = {}
    optimizer = pr.Optimizer(pr.SGD(), lr=0.5)
    new, _ = run(optimizer, params, [grads])
    assert list(new) == list(params)
    assert isinstance(new["layer0"], Layer)
    assert isinstance(new["head"], list)
    assert isinstance(new["head"][1], tuple)
    assert isinstance(new["ordered"], collections.OrderedDict)
    assert list(new["ordered"]) == ["z", "a"]
    assert np.array_equal(new["ordered"]["a"], np.full((2, 2), 0.5))
    assert np.array_equal(new["layer1"].weight, params["layer1"].weight - 0.5 * grads["layer1"].weight)
    assert np.array_equal(new["head"][1][1], params["head"][1][1] - 0.5 * grads["head"][1][1])
    assert pr.Optimizer(pr.SGD()).step({}, {}, pr.Optimizer(pr.SGD()).init({}))[0] == {}
    bare, _ = run(optimizer, np.ones(3), [np.ones(3)])
    assert np.array_equal(bare, np.full(3, 0.5))


def test_parameters_are_not_changed() -> None:
    params, grads = network(), network(1)
    before = flat(params).copy(), flat(grads).copy()
    run(pr.Optimizer(pr.ASGO(), lr=0.5, weight_decay=0.5), params, [grads])
    assert np.array_equal(before[0], flat(params))
    assert np.array_equal(before[1], flat(grads))


def test_under_jit_one_trace_and_the_same_numbers() -> None:
    jax = pytest.importorskip("jax")
    backend = make_backend("jax")
    optimizer = pr.Optimizer(pr.ASGO(eps=0.25, every=2), lr=lambda step: 0.5 / (1 + step), weight_decay=0.25)
    traces = 0

    def step(params: Any, grads: Any, state: Any) -> Any:
        nonlocal traces
        traces += 1
        return optimizer.step(params, grads, state)

    compiled = jax.jit(step)
    rng = np.random.default_rng(3)
    shapes = {"z": (4, 3), "a": (4, 3), "m": (3,), "b": (2, 5)}  # jit sorts the keys
    params = {k: rng.standard_normal(s) for k, s in shapes.items()}
    grads = [{k: rng.standard_normal(s) for k, s in shapes.items()} for _ in range(5)]
    expected, _ = run(optimizer, params, grads)
    got = {k: backend.asarray(v) for k, v in params.items()}
    state = optimizer.init(got)
    for g in grads:
        got, state = compiled(got, {k: backend.asarray(v) for k, v in g.items()}, state)
    assert traces == 1
    assert int(state.step) == 5
    for key in shapes:
        assert distance([np.asarray(got[key])], [expected[key]]) <= 1e-12


# ---- routing --------------------------------------------------------------------------------------------------------


def test_default_route_gives_adam_what_a_matrix_method_cannot_take() -> None:
    params = {
        "w": np.ones((3, 4)),
        "bias": np.ones(3),
        "scale": np.ones(()),
        "conv": np.ones((2, 2, 3, 3)),
        "embedding": {"weight": np.ones((5, 4))},
    }

    def routed(method: Any) -> dict[str, str]:
        groups = pr.Optimizer(method).describe(params)
        return {path: type(g.method).__name__ for g in groups for path, _ in g.members}

    only_w = dict.fromkeys(("bias", "conv", "embedding/weight", "scale"), "Adam")
    for method in (pr.ASGO(), pr.DASGO(), pr.Muon(), pr.ASGO.theory(), pr.DASGO.theory()):
        assert routed(method) == only_w | {"w": type(method).__name__}
    assert routed(pr.Shampoo()) == {
        "w": "Shampoo", "conv": "Shampoo", "embedding/weight": "Shampoo", "bias": "Adam", "scale": "Adam"
    }  # fmt: skip
    assert set(routed(pr.AGD()).values()) == {"AGD"}
    assert routed(pr.FullAdaGrad())["scale"] == "Adam"
    assert routed(pr.FullAdaGrad())["bias"] == "FullAdaGrad"


def test_a_route_of_ones_own() -> None:
    params = {"w": np.ones((3, 4)), "v": np.ones((3, 4)), "b": np.ones(3)}
    seen = []

    def route(path: str, array: Any) -> Any:
        seen.append((path, array.shape))
        return pr.ASGO(eps=0.25) if path == "w" else pr.SGD()

    optimizer = pr.Optimizer(pr.Adam(), lr=1.0, route=route)
    new, _ = run(optimizer, params, [{k: np.full(p.shape, 0.5) for k, p in params.items()}])
    assert set(seen) == {("w", (3, 4)), ("v", (3, 4)), ("b", (3,))}
    assert np.array_equal(new["v"], np.full((3, 4), 0.5))
    assert not np.array_equal(new["w"], new["v"])
    assert [g.name for g in optimizer.describe(params)] == ["b and 1 more", "w"]
    with pytest.raises(TypeError, match="route must return a Method, got None for 'b'"):
        pr.Optimizer(pr.Adam(), route=lambda path, array: None).init(params)


def test_array_valued_hyperparameters_work_though_they_do_not_hash() -> None:
    grads = [{"w": g, "v": g[0]} for g in gradients((3, 4), 4)]
    params = {"w": np.ones((3, 4)), "v": np.ones(4)}
    method = pr.Adam(beta1=np.asarray(0.75), eps=np.asarray(0.25))
    got, _ = run(pr.Optimizer(method, lr=0.5), params, grads)
    expected, _ = run(pr.Optimizer(pr.Adam(beta1=0.75, eps=0.25), lr=0.5), params, grads)
    assert distance([flat(got)], [flat(expected)]) <= 1e-13


# ---- learning rate and decay ----------------------------------------------------------------------------------------


@pytest.mark.eager
@pytest.mark.parametrize("kind", ["float", "numpy", "array", "callable"])
def test_learning_rates_keep_the_dtype(backend: Backend, kind: str) -> None:
    params = {"w": backend.asarray(np.ones((2, 3)), "float32"), "b": backend.asarray(np.ones(3), "float32")}
    lr: Any = {
        "float": 0.5,
        "numpy": np.float64(0.5),
        "array": backend.asarray(0.5, "float64"),
        "callable": lambda step: np.float32(0.5),
    }[kind]
    optimizer = pr.Optimizer(pr.SGD(), lr=lr, weight_decay=0.5)
    new, _ = optimizer.step(params, params, optimizer.init(params))
    for array in new.values():
        assert array.dtype == params["w"].dtype
        assert np.array_equal(backend.numpy(array), np.full(array.shape, 0.25, dtype="float32"))


def test_decay_by_path() -> None:
    params = {"w": np.ones((2, 3)), "v": np.ones((2, 3)), "b": np.ones(3)}
    zero = {k: np.zeros(p.shape) for k, p in params.items()}
    for method in (pr.SGD(), pr.ASGO(eps=0.25)):
        optimizer = pr.Optimizer(method, lr=0.5, weight_decay=lambda path, array: 0.5 if path == "w" else 0.0)
        new, _ = run(optimizer, params, [zero])
        assert np.array_equal(new["w"], np.full((2, 3), 0.75))
        assert np.array_equal(new["v"], params["v"])
        assert np.array_equal(new["b"], params["b"])
    same, _ = run(pr.Optimizer(pr.SGD(), lr=0.5, weight_decay=lambda path, array: 0.5), params, [zero])
    assert np.array_equal(same["b"], np.full(3, 0.75))


def test_zero_rate_moves_nothing() -> None:
    params = network()
    new, _ = run(pr.Optimizer(pr.ASGO(), lr=0.0, weight_decay=0.5), params, [network(1)])
    assert np.array_equal(flat(new), flat(params))


# ---- non-finite gradients -------------------------------------------------------------------------------------------


@pytest.mark.eager
def test_skip_leaves_everything_as_it_was(backend: Backend) -> None:
    rng = np.random.default_rng(4)
    params = {"w": backend.asarray(rng.standard_normal((3, 4))), "b": backend.asarray(rng.standard_normal(3))}
    good = {"w": backend.asarray(rng.standard_normal((3, 4))), "b": backend.asarray(rng.standard_normal(3))}
    bad = {"w": good["w"], "b": backend.asarray([1.0, math.inf, 0.0])}
    optimizer = pr.Optimizer(pr.ASGO(eps=0.25), lr=0.5, on_nonfinite="skip")
    once, _ = run(optimizer, params, [good, good])
    with_bad, state = run(optimizer, params, [good, bad, good])
    assert state.step == 2
    for key in params:
        assert np.array_equal(backend.numpy(once[key]), backend.numpy(with_bad[key]))


def test_skip_under_jit() -> None:
    jax = pytest.importorskip("jax")
    backend = make_backend("jax")
    rng = np.random.default_rng(4)
    params = {"w": backend.asarray(rng.standard_normal((3, 4))), "b": backend.asarray(rng.standard_normal(3))}
    good = {"w": backend.asarray(rng.standard_normal((3, 4))), "b": backend.asarray(rng.standard_normal(3))}
    bad = {"w": good["w"], "b": backend.asarray([1.0, math.nan, 0.0])}
    optimizer = pr.Optimizer(pr.Shampoo(eps=0.25, beta2=0.5), lr=0.5, on_nonfinite="skip")
    step = jax.jit(optimizer.step)
    runs = []
    for sequence in ([good, good], [good, bad, good]):
        p, state = params, optimizer.init(params)
        for g in sequence:
            p, state = step(p, g, state)
        assert int(state.step) == 2
        runs.append(p)
    for key in params:
        assert np.array_equal(np.asarray(runs[0][key]), np.asarray(runs[1][key]))
    strict = pr.Optimizer(pr.SGD(), on_nonfinite="raise")
    with pytest.raises(ValueError, match="on_nonfinite='raise' needs eager execution"):
        jax.jit(strict.step)(params, good, strict.init(params))


def test_raise_names_the_parameters_and_changes_nothing() -> None:
    params = network()
    grads = network(1)
    grads["layer1"].weight[0, 0] = np.nan
    grads["head"][0][0, 0] = np.inf
    optimizer = pr.Optimizer(pr.ASGO(), on_nonfinite="raise")
    state = optimizer.init(params)
    with pytest.raises(ValueError, match="must be finite .* not so: head/0, layer1/weight$"):
        optimizer.step(params, grads, state)
    _, state = optimizer.step(params, network(2), state)
    assert state.step == 1


def test_propagate_spoils_the_matrix_only() -> None:
    params, grads = network(), network(1)
    grads["layer1"].weight[0, 0] = np.inf
    with np.errstate(invalid="ignore"):
        new, state = run(pr.Optimizer(pr.ASGO(eps=0.25)), params, [grads])
    assert np.all(np.isnan(new["layer1"].weight))
    assert all(np.all(np.isfinite(a)) for a in (new["layer0"].weight, new["layer2"].weight, new["head"][0]))
    reports = pr.Optimizer(pr.ASGO(eps=0.25)).diagnose(params, state)
    assert [path for path, report in reports.items() if not bool(report.finite)] == ["layer1/weight"]


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "asgo"}, TypeError, "method must be a Method such as"),
        ({"method": pr.ASGO}, TypeError, "method must be a Method such as"),
        ({"lr": -1.0}, ValueError, "lr must be finite and >= 0, got -1.0"),
        ({"lr": math.nan}, ValueError, "lr must be finite and >= 0, got nan"),
        ({"lr": "fast"}, TypeError, "lr must be a real number"),
        ({"weight_decay": -0.5}, ValueError, "weight_decay must be finite and >= 0, got -0.5"),
        ({"route": "w"}, TypeError, "route must be a callable"),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite must be 'propagate', 'skip' or 'raise', got 'ignore'"),
        ({"block_size": 0}, ValueError, "block_size must be >= 1 or None, got 0"),
        ({"block_size": 2.0}, TypeError, "block_size must be a Python int or None, got 2.0"),
        ({"fuse": "no"}, TypeError, "fuse must be True or False, got 'no'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        pr.Optimizer(**({"method": pr.SGD()} | arguments))


def test_bad_trees() -> None:
    params = {"w": np.ones((2, 3)), "b": np.ones(3)}
    optimizer = pr.Optimizer(pr.ASGO())
    state = optimizer.init(params)
    cases: list[tuple[Any, Any, str]] = [
        ({"w": np.ones((2, 3))}, ValueError, r"structure of params; missing: \['b'\], not in params: \[\]"),
        (params | {"c": np.ones(1)}, ValueError, r"missing: \[\], not in params: \['c'\]"),
        (params | {"w": np.ones((3, 2))}, ValueError, r"'w' must have its parameter's shape \(2, 3\), got \(3, 2\)"),
        (params | {"w": np.ones((2, 3), "float32")}, TypeError, "'w' must have its parameter's dtype float64, got"),
        (params | {"b": None}, TypeError, "grads must be a nesting of .* got None at 'b'"),
        (params | {"b": 1.0}, TypeError, "grads must be a nesting of .* got 1.0 at 'b'"),
    ]
    for grads, error, message in cases:
        with pytest.raises(error, match=message):
            optimizer.step(params, grads, state)
    with pytest.raises(TypeError, match="state must be an OptimizerState, got tuple"):
        optimizer.step(params, params, tuple(state))
    with pytest.raises(ValueError, match="state has 2 groups, these parameters make 1: it is another tree's"):
        optimizer.step({"w": params["w"]}, {"w": params["w"]}, state)
    with pytest.raises(ValueError, match="params has two leaves with the path 'a/b'"):
        optimizer.init({"a/b": np.ones(2), "a": {"b": np.ones(2)}})
    with pytest.raises(TypeError, match="w: param must have a real floating dtype"):
        optimizer.init({"w": np.ones((2, 3), "int64")})
    with pytest.raises(ValueError, match="b: ASGO takes a parameter with exactly 2 axes"):
        pr.Optimizer(pr.ASGO(), route=everything(pr.ASGO())).init({"b": np.ones(3)})
    other = {k: v.copy() for k, v in params.items()}
    smaller = {"w": np.ones((1, 3)), "b": np.ones(3)}
    with pytest.raises(ValueError, match=r"w: state.m must have shape \(1, 3\)"):
        optimizer.step(smaller, smaller, state)
    optimizer.step(other, other, state)  # the state is as good as before


def test_mixed_namespaces_and_devices_are_refused() -> None:
    torch = pytest.importorskip("torch")
    optimizer = pr.Optimizer(pr.SGD())
    params = {"w": torch.ones(2, dtype=torch.float64)}
    with pytest.raises(TypeError, match="dtype|namespace"):
        optimizer.step(params, {"w": np.ones(2)}, optimizer.init(params))
    with pytest.raises(TypeError, match="one array-API namespace"):
        optimizer.init({"w": torch.ones(2), "v": np.ones(2)})
    cpu, other = make_backend("strict"), make_backend("strict-device1")
    params = {"w": cpu.asarray([1.0, 2.0])}
    with pytest.raises(ValueError, match="'w' must be on its parameter's device .*CPU.* got .*device1"):
        optimizer.step(params, {"w": other.asarray([1.0, 2.0])}, optimizer.init(params))


# ---- planted bugs: a tree level that does one thing wrong -----------------------------------------------------------


def test_coupled_decay_would_be_seen() -> None:
    """Decay added to the gradient, decay after the step, decay without the rate: all differ from ours on Adam."""
    g, x, lr, wd = gradients((3, 4), 1)[0], np.ones((3, 4)), 0.5, 0.25
    ours, _ = run(pr.Optimizer(pr.Adam(eps=0.25), lr=lr, weight_decay=wd), x, [g])
    adam = pr.Adam(eps=0.25)
    direction, _ = adam.update(g, adam.init(x), x)
    coupled, _ = adam.update(g + wd * x, adam.init(x), x)
    assert distance([ours], [x * (1 - lr * wd) - lr * direction]) <= 1e-15
    for wrong in (x - lr * coupled, (x - lr * direction) * (1 - lr * wd), x * (1 - wd) - lr * direction):
        assert distance([ours], [wrong]) > 1e-3


def test_what_a_schedule_returns_is_checked() -> None:
    x = np.ones(2)
    for bad, error in ((-0.1, ValueError), (math.nan, ValueError), (None, TypeError), ("fast", TypeError)):
        optimizer = pr.Optimizer(pr.SGD(), lr=lambda step, bad=bad: bad)
        with pytest.raises(error, match=r"lr\(step\) must"):
            optimizer.step(x, x, optimizer.init(x))


def test_a_dict_with_its_own_constructor_is_kept() -> None:
    params = collections.defaultdict(list, w=np.ones(2))
    new, _ = run(pr.Optimizer(pr.SGD(), lr=0.5), params, [{"w": np.ones(2)}])
    assert isinstance(new, collections.defaultdict)
    assert new.default_factory is list
    assert np.array_equal(new["w"], np.full(2, 0.5))
    assert np.array_equal(params["w"], np.ones(2))


def test_empty_parameters_are_not_cut_into_blocks() -> None:
    params = {"w": np.zeros((0, 5)), "v": np.ones((3, 5))}
    new, _ = run(pr.Optimizer(pr.SShampoo(size=2), block_size=2), params, [params])
    assert new["w"].shape == (0, 5)


def test_array_valued_fields_do_not_separate_what_belongs_together() -> None:
    params = {"a": np.ones((3, 4)), "b": np.ones((3, 4))}
    state = pr.Optimizer(pr.MBF(damping=0.5)).init(params)
    optimizer = pr.Optimizer(pr.MBF(damping=np.asarray(0.5)))
    assert len(optimizer.describe(params)) == 1
    optimizer.step(params, params, state)


@pytest.mark.parametrize("method", [pr.RFShampoo(damping=0.5), pr.RFRMSProp(damping=0.5)], ids=repr)
def test_statistics_of_parameters_updated_together(method: Any) -> None:
    rng = np.random.default_rng(5)
    params, grads = ({k: rng.standard_normal((3, 4)) for k in ("a", "b")} for _ in range(2))
    statistics = {k: rng.standard_normal((5, 3, 4)) for k in params}
    results = []
    for fuse in (True, False):
        optimizer = pr.Optimizer(method, fuse=fuse)
        results.append(optimizer.step(params, grads, optimizer.init(params), statistics=statistics)[0])
    for key in params:
        assert distance([results[0][key]], [results[1][key]]) <= 1e-14
    for wrong, error in ((rng.standard_normal((3, 4)), ValueError), (statistics["a"].astype("float32"), TypeError)):
        with pytest.raises(error, match="statistic must have"):
            method.update(grads["a"], method.init(params["a"]), params["a"], statistic=wrong)


def test_joined_parameters_must_have_one_dtype() -> None:
    params = {"w": np.ones((2, 3), "float32"), "b": np.ones(2)}
    with pytest.raises(TypeError, match="join needs one dtype and device, got 'w' float32"):
        pr.Optimizer(pr.MBF(), join=(("w", "b"),)).init(params)


@pytest.mark.parametrize("call", ["step", "diagnose", "unstack"])
def test_what_is_no_state_is_refused(call: str) -> None:
    params = {"w": np.ones((2, 3)), "b": np.ones(2)}
    optimizer = pr.Optimizer(pr.ASGO())
    function = partial(optimizer.step, params, params) if call == "step" else partial(getattr(optimizer, call), params)
    for bad in (None, (), pr.Adam().init(params["w"])):
        with pytest.raises(TypeError, match=f"state must be an OptimizerState, got {type(bad).__name__}"):
            function(state=bad)
    with pytest.raises(ValueError, match="state has 1 groups, these parameters make 2: it is another tree's"):
        function(state=pr.Optimizer(pr.Adam()).init(params))


@pytest.mark.parametrize(("bad", "error"), [(-1.0, ValueError), (np.nan, ValueError), (None, TypeError)], ids=str)
def test_a_callable_decay_must_return_a_rate(bad: Any, error: Any) -> None:
    params = {"w": np.ones((2, 3))}
    optimizer = pr.Optimizer(pr.ASGO(), weight_decay=lambda path, array: bad)
    with pytest.raises(error, match=r"weight_decay\(path, array\) must .* got"):
        optimizer.step(params, params, optimizer.init(params))


def test_statistics_of_two_sizes_must_not_be_fused() -> None:
    params = {"a": np.ones((3, 4)), "b": np.ones((3, 4))}
    statistics = {"a": np.ones((2, 3, 4)), "b": np.ones((5, 3, 4))}
    for method in (pr.RFShampoo(), pr.RFRMSProp()):
        optimizer = pr.Optimizer(method)
        with pytest.raises(ValueError, match=r"of one size for all of a, b .* got shapes \(2, 3, 4\), \(5"):
            optimizer.step(params, params, optimizer.init(params), statistics=statistics)
        apart = pr.Optimizer(method, fuse=False)
        apart.step(params, params, apart.init(params), statistics=statistics)
    shapes = {"a": np.ones((3, 4)), "b": np.ones(5)}  # one flat buffer
    optimizer = pr.Optimizer(pr.RFRMSProp())
    optimizer.step(
        shapes, shapes, optimizer.init(shapes), statistics={k: np.ones((2, *v.shape)) for k, v in shapes.items()}
    )


def test_statistics_that_are_not_finite() -> None:
    params, grads = {"w": np.ones((3, 2))}, {"w": gradients((3, 2), 1)[0]}
    for bad in (pr.MBF.Samples(np.full((4, 3, 2), np.nan)), pr.MBF.Blocks(np.full((2, 2), np.inf))):
        skip = pr.Optimizer(pr.MBF(), on_nonfinite="skip")
        state = skip.init(params)
        same, after = skip.step(params, grads, state, statistics={"w": bad})
        assert same is params
        assert after is state
        with pytest.raises(ValueError, match="not so: the statistics"):
            pr.Optimizer(pr.MBF(), on_nonfinite="raise").step(params, grads, state, statistics={"w": bad})
