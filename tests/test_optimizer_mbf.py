"""MBF on trees: routing, joined biases, statistics by path, one weight decay; planted bugs; the authors' experiment."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from configs import Decayed
from conftest import make_backend
from mutation import Bug, mutated

import precond_ref as pr
from precond_ref import optimizer, problems

LOUD = {"damping": 0.25, "decay": 0.75, "momentum": 0.5}
JOIN = (("a/weight", "a/bias"), ("b/weight", "b/bias"))
SHAPES = {
    "a/weight": (3, 4),
    "a/bias": (3,),
    "b/weight": (3, 4),
    "b/bias": (3,),
    "c/weight": (2, 5),
    "conv/weight": (2, 3, 2, 2),
    "conv/bias": (2,),
    "norm": (5,),
    "scale": (),
}


def relative(a: Any, b: Any) -> float:
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300))


def tree(seed: int) -> dict[str, Any]:
    """Nested parameters (or gradients) with the paths and shapes of SHAPES."""
    random, result = np.random.default_rng(seed), {}
    for path, shape in SHAPES.items():
        *folders, name = path.split("/")
        place = result
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = random.standard_normal(shape)
    return result


def flat(nested: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(nested, dict):
        return {path: nested}
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= flat(value, f"{path}/{key}" if path else key)
    return found


def joined(leaves: dict[str, Any], pairs: Any = JOIN) -> dict[str, Any]:
    result = dict(leaves)
    for weight, bias in pairs:
        result[weight] = np.concatenate([result[weight], result.pop(bias)[:, None]], axis=1)
    return result


KIND = {"conv/weight": "conv", "conv/bias": "diagonal", "norm": "diagonal", "scale": "diagonal"}
"""Kind of the default routing; the others are ``fc``."""


# ---- checks: each takes the optimizer module, the original or one with a planted bug --------------------------------


def check_by_hand(module: Any, *, fuse: bool = True) -> None:
    """Five steps with joined biases, decay and a schedule equal the method on each parameter."""
    method = pr.MBF(**LOUD, statistics_every=2, inverse_every=3)
    decay = {"a/weight": 0.25}
    opt = module.Optimizer(
        method,
        lr=lambda step: 0.5 / (1 + step),
        weight_decay=lambda path, array: decay.get(path, 0.125),
        join=JOIN,
        fuse=fuse,
    )
    params = tree(0)
    state, expected = opt.init(params), joined(flat(params))
    methods = {path: method.replace(kind=KIND.get(path, "fc")) for path in expected}
    states = {path: methods[path].init(value) for path, value in expected.items()}
    for step in range(5):
        grads = tree(step + 1)
        params, state = opt.step(params, grads, state)
        for path, grad in joined(flat(grads)).items():
            direction, states[path] = methods[path].update(grad, states[path], expected[path])
            rate = 0.5 / (1 + step)
            expected[path] = (1 - rate * decay.get(path, 0.125)) * expected[path] - rate * direction
    assert list(flat(params)) == list(SHAPES)
    for path, value in joined(flat(params)).items():
        assert relative(value, expected[path]) <= 1e-12, path
    single = opt.unstack(params, state)
    assert set(single) == set(expected)
    for path, member in single.items():
        assert relative(member.statistic, states[path].statistic) <= 1e-12, path


def check_statistics(module: Any, *, fuse: bool = True) -> None:
    """What is given by path reaches the parameter of that path, in a stack too; the others use their gradients."""
    random, method = np.random.default_rng(9), pr.MBF(**LOUD)
    opt = module.Optimizer(method, lr=0.5, join=JOIN, fuse=fuse)
    params, grads = tree(0), tree(1)
    x, d = random.standard_normal((2, 6, 5)), random.standard_normal((2, 6, 3))
    for pair in (
        [pr.MBF.Factors(x[k], d[k]) for k in range(2)],
        [pr.MBF.Samples(d[k][:, :, None] * x[k][:, None, :]) for k in range(2)],
        [pr.MBF.Blocks(x[k].T @ x[k]) for k in range(2)],
    ):
        given = {
            "a/weight": pair[0],
            "b/weight": pair[1],
            "conv/weight": pr.MBF.Samples(random.standard_normal((4, 2, 3, 2, 2))),
        }
        new, _ = opt.step(params, grads, opt.init(params), statistics=given)
        before, gradients = joined(flat(params)), joined(flat(grads))
        for path, value in joined(flat(new)).items():
            single = method.replace(kind=KIND.get(path, "fc"))
            more = {"statistic": given[path]} if path in given else {}
            direction, _ = single.update(gradients[path], single.init(gradients[path]), gradients[path], **more)
            assert relative(value, before[path] - 0.5 * direction) <= 1e-12, path


def check_decay(module: Any) -> None:
    """Two weight decays are refused, wherever they come from; one is not."""
    for decay in (0.5, lambda path, array: 0.5, np.asarray(0.0)):
        with pytest.raises(ValueError, match="weight_decay must be 0 beside a method with its own, got"):
            module.Optimizer(Decayed(weight_decay=0.125), weight_decay=decay)
        routed = module.Optimizer(pr.Adam(), weight_decay=decay, route=lambda path, array: Decayed(weight_decay=0.125))
        with pytest.raises(ValueError, match="weight_decay must be 0 beside"):
            routed.init({"w": np.ones(3)})
    module.Optimizer(Decayed(weight_decay=0.125))
    module.Optimizer(Decayed(), weight_decay=0.5)
    module.Optimizer(Decayed(weight_decay=0.125), weight_decay=0.5, route=lambda path, array: pr.Adam()).init(
        {"w": np.ones(3)}
    )


def check_routing(module: Any) -> None:
    """Four axes: conv; two: fc; the rest: diagonal. A ``diagonal`` method is for everything."""
    params = tree(0)
    for start in (pr.MBF(**LOUD), pr.MBF(**LOUD, kind="conv"), pr.MBF.authors_code()):
        for group in module.Optimizer(start, join=JOIN).describe(params):
            for path, _ in group.members:
                assert group.method == start.replace(kind=KIND.get(path, "fc")), path
    (group,) = module.Optimizer(pr.MBF(kind="diagonal")).describe(params)
    assert group.method == pr.MBF(kind="diagonal")
    assert len(group.members) == len(SHAPES)
    more = {"conv1d": np.ones((2, 3, 4)), "conv3d": np.ones((2, 2, 2, 2, 2)), "embedding": np.ones((9, 4))}
    kinds = [g.method.kind for g in module.Optimizer(pr.MBF(), fuse=False).describe(more)]
    assert kinds == ["diagonal", "diagonal", "fc"]


CHECKS: dict[str, Callable[[Any], None]] = {
    "by_hand": check_by_hand,
    "by_hand_unfused": lambda module: check_by_hand(module, fuse=False),
    "statistics": check_statistics,
    "statistics_unfused": lambda module: check_statistics(module, fuse=False),
    "decay": check_decay,
    "routing": check_routing,
}


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str) -> None:
    CHECKS[name](optimizer)


def test_a_fused_tree_has_a_stack_and_a_buffer() -> None:
    groups = pr.Optimizer(pr.MBF(), join=JOIN).describe(tree(0))
    assert sorted(len(g.members) for g in groups) == [1, 1, 2, 3]


# ---- other methods, other libraries, whole problems -----------------------------------------------------------------


def test_any_method_takes_joined_matrices() -> None:
    params, grads = tree(0), tree(1)
    opt = pr.Optimizer(pr.ASGO(eps=0.25), lr=0.5, join=JOIN[:1], block_size=3)
    new, _ = opt.step(params, grads, opt.init(params))
    whole = pr.Optimizer(pr.ASGO(eps=0.25), lr=0.5, block_size=3)
    matrices = joined(flat(params), JOIN[:1])
    expected, _ = whole.step(matrices, joined(flat(grads), JOIN[:1]), whole.init(matrices))
    for path, value in joined(flat(new), JOIN[:1]).items():
        assert relative(value, expected[path]) <= 1e-14


def test_large_damping_is_heavy_ball_sgd() -> None:
    """At rate lr / lambda; the distance is at most |F| / lambda of the way gone."""
    problem = problems.load("digits-cnn", dtype="float64", channels=(2, 3))
    params, large, join, runs = problem.init(), 2.0**30, (("fc1/weight", "fc1/bias"),), []
    own_rule = [path for path in params if path.startswith("conv") and path.endswith("bias")]
    for method, lr in ((pr.MBF(damping=large, momentum=0.75), 0.0625 * large), (pr.SGD(momentum=0.75), 0.0625)):
        opt, values = pr.Optimizer(method, lr=lr, join=join), params
        state = opt.init(params)
        for step in range(5):
            _, grads = problem.loss_and_grad(values, problem.batch(step))
            values, state = opt.step(values, grads | {p: 0 * grads[p] for p in own_rule}, state)
        runs.append(values)
    for path in params.keys() - own_rule:
        gone = np.linalg.norm(runs[1][path] - params[path])
        assert gone > 0
        assert np.linalg.norm(runs[0][path] - runs[1][path]) <= 100 / large * gone, path


def test_names_of_layers_do_not_matter() -> None:
    params, grads = flat(tree(0)), flat(tree(1))
    results = []
    for names in ({p: p for p in params}, {p: f"{9 - i}" for i, p in enumerate(params)}):
        renamed, gradients = ({names[p]: v for p, v in t.items()} for t in (params, grads))
        opt = pr.Optimizer(pr.MBF(**LOUD), lr=0.5, join=tuple((names[w], names[b]) for w, b in JOIN))
        new, _ = opt.step(renamed, gradients, opt.init(renamed))
        results.append({p: new[names[p]] for p in params})
    for path in params:
        assert relative(results[0][path], results[1][path]) <= 1e-14


@pytest.mark.parametrize("library", ["strict-device1", "torch", "jax-jit"])
def test_a_problem_on_other_libraries(library: str) -> None:
    """Five steps of a convolutional network with per-sample statistics."""
    results = []
    for backend in (make_backend("numpy"), make_backend(library)):
        problem = problems.load(
            "digits-cnn", backend.xp, dtype="float64", device=backend.device, channels=(2,), activation="tanh"
        )
        method = pr.MBF(**LOUD, inverse_every=2)
        opt = pr.Optimizer(method, lr=0.125, weight_decay=0.25, join=(("fc1/weight", "fc1/bias"),))

        def train_step(params: Any, state: Any, batch: Any, problem: Any = problem, opt: Any = opt) -> Any:
            _, grads = problem.loss_and_grad(params, batch)
            return opt.step(params, grads, state, statistics=problem.statistics(params, batch))

        if library == "jax-jit" and results:
            import jax

            train_step = jax.jit(train_step)
        params = problem.init()
        state = opt.init(params)
        for step in range(5):
            params, state = train_step(params, state, problem.batch(step))
        results.append({path: backend.numpy(value) for path, value in params.items()})
    for path, value in results[0].items():
        assert relative(results[1][path], value) <= 1e-10


def test_skip_keeps_joined_parameters() -> None:
    params, grads = tree(0), tree(1)
    grads["a"]["bias"] = grads["a"]["bias"] * np.nan
    opt = pr.Optimizer(pr.MBF(), join=JOIN, on_nonfinite="skip")
    assert opt.step(params, grads, opt.init(params))[0] is params
    opt = pr.Optimizer(pr.MBF(), join=JOIN, on_nonfinite="raise")
    with pytest.raises(ValueError, match="not so: a/bias"):
        opt.step(params, grads, opt.init(params))


# ---- refusals -------------------------------------------------------------------------------------------------------


def step(statistics: Any, method: Any = None, **options: Any) -> Any:
    params, grads = tree(0), tree(1)
    opt = pr.Optimizer(method or pr.MBF(), join=JOIN, **options)
    return opt.step(params, grads, opt.init(params), statistics=statistics)


SAMPLES = pr.MBF.Samples(np.ones((2, 3, 5)))
REFUSED: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "a pair, not pairs": (lambda: pr.Optimizer(pr.MBF(), join=("a/weight", "a/bias")), ValueError,
        r"join must be pairs of paths \(weight, bias\), no path twice, got \('a/weight', 'a/bias'\)"),
    "a triple": (lambda: pr.Optimizer(pr.MBF(), join=(("a", "b", "c"),)), ValueError, "join must be pairs"),
    "twice": (lambda: pr.Optimizer(pr.MBF(), join=(("a", "b"), ("c", "b"))), ValueError, "no path twice"),
    "join that is no tuple": (lambda: pr.Optimizer(pr.MBF(), join=5), TypeError, "join must be a tuple of pairs"),
    "join of numbers": (lambda: pr.Optimizer(pr.MBF(), join=(5,)), ValueError, "join must be pairs"),
    "statistics that are no mapping": (lambda: step([SAMPLES]), TypeError, "statistics must be a mapping .* got list"),
    "statistics of a list": (lambda: step({"c/weight": pr.MBF.Samples([[1.0]])}), TypeError,
        "statistic.grads must be an array, got list"),
    "two letters": (lambda: pr.Optimizer(pr.MBF(), join=("ab",)), ValueError, "join must be pairs"),
    "unknown": (lambda: pr.Optimizer(pr.MBF(), join=(("a/weight", "a/bias0"),)).init(tree(0)), ValueError,
        "join names 'a/bias0', which the parameters do not have"),
    "shapes": (lambda: pr.Optimizer(pr.MBF(), join=(("a/weight", "norm"),)).init(tree(0)), ValueError,
        r"join needs a weight \(O, I\) and a bias \(O,\), got 'a/weight' \(3, 4\) and 'norm' \(5,\)"),
    "conv with bias": (lambda: pr.Optimizer(pr.MBF(), join=(("conv/weight", "conv/bias"),)).init(tree(0)), ValueError,
        "join needs a weight"),
    "statistics of the bias": (lambda: step({"a/bias": SAMPLES}), ValueError,
        "statistics names a/bias: no parameter, or one joined"),
    "statistics of blocks": (lambda: step({"a/weight": SAMPLES}, block_size=2), ValueError, "cut into blocks"),
    "statistics of half a stack": (lambda: step({"a/weight": SAMPLES}), ValueError,
        r"statistics must be of one type for all of a/weight, b/weight \(updated together\), or none"),
    "statistics of two types": (lambda: step({"a/weight": SAMPLES, "b/weight": pr.MBF.Blocks(np.eye(5))}), ValueError,
        "of one type"),
    "statistics of a wrong shape": (lambda: step({"c/weight": SAMPLES}), ValueError,
        r"^c/weight: statistic.grads must have shape"),
    "statistics for Adam": (lambda: step({"norm": SAMPLES}, pr.Adam(), fuse=False), ValueError,
        "^norm: statistic must not be given for Adam"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    call, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        call()


# ---- planted bugs ---------------------------------------------------------------------------------------------------


BUGS = {
    "bias first": Bug("concat([w, b[:, None]], axis=1)", "concat([b[:, None], w], axis=1)", ("by_hand", "statistics")),
    "bias from the first column": Bug("merged[weight][:, :-1], merged[weight][:, -1]",
        "merged[weight][:, 1:], merged[weight][:, 0]", ("by_hand",)),
    "gradients not joined like parameters": Bug("self._joined(leaves), self._joined(gradients)",
        "self._joined(leaves), self._joined({k: g * (g.ndim > 1) for k, g in gradients.items()})",
        ("by_hand", "by_hand_unfused")),
    "statistics ignored": Bug('{"statistic": parts[0]} if parts else {}', "{}", ("statistics", "statistics_unfused")),
    "first member's statistics for all": Bug("xp.stack(list(arrays))", "xp.stack([arrays[0] for _ in arrays])",
        ("statistics",)),
    "statistics in reverse": Bug("xp.stack(list(arrays))", "xp.stack(list(arrays)[::-1])", ("statistics",)),
    "decay checked for numbers only": Bug("not is_zero(method.weight_decay) and not is_zero(self.weight_decay)",
        "not is_zero(method.weight_decay) and self.weight_decay == 0.5", ("decay",)),
    "routed methods not checked": Bug("        self._check_decay(method)\n", "", ("decay",)),
    "one kind for all matrices and tensors": Bug("self.method.for_shape(tuple(array.shape), path)",
        "self.method.for_shape(tuple(array.shape)[:2], path)", ("routing",)),
    "Adam for what is no matrix": Bug("self.method.for_shape(tuple(array.shape), path) or Adam()",
        "(self.method.for_shape(tuple(array.shape), path) if array.ndim > 1 else Adam())", ("routing", "by_hand")),
}  # fmt: skip


@pytest.mark.parametrize(("name", "check"), [(name, check) for name, bug in BUGS.items() for check in bug.checks])
def test_planted_bug_is_caught(name: str, check: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        CHECKS[check](mutated(optimizer, BUGS[name][:2]))


# ---- the authors' experiment ----------------------------------------------------------------------------------------

WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
LINEAR = (4, 8)
"""Layers without ReLU: the code and the output."""


def autoencoder_gradient(params: dict[str, Any], images: Any) -> tuple[float, dict[str, Any]]:
    """Binary cross-entropy with logits, summed over pixels, mean over images, and its gradient."""
    values = [images]
    for layer in range(1, 9):
        s = values[-1] @ params[f"{layer}/weight"].T + params[f"{layer}/bias"]
        values.append(s if layer in LINEAR else np.maximum(s, 0))
    z, n = values[-1], len(images)
    loss = float(np.sum(np.maximum(z, 0) - z * images + np.log1p(np.exp(-np.abs(z)))) / n)
    delta, grads = (1 / (1 + np.exp(-z)) - images) / n, {}
    for layer in range(8, 0, -1):
        if layer not in LINEAR:
            delta = delta * (values[layer] > 0)
        grads[f"{layer}/weight"], grads[f"{layer}/bias"] = delta.T @ values[layer - 1], delta.sum(axis=0)
        delta = delta @ params[f"{layer}/weight"]
    return loss, grads


def train(opt: Any, images: Any, seed: int, steps: int) -> list[float]:
    """Loss over all images at the start and at the end."""
    random, params = np.random.default_rng(seed), {}
    for layer in range(1, 9):
        fan_in, fan_out = WIDTHS[layer - 1 : layer + 1]
        bound = fan_in**-0.5
        params[f"{layer}/weight"] = random.uniform(-bound, bound, (fan_out, fan_in)).astype("float32")
        params[f"{layer}/bias"] = random.uniform(-bound, bound, fan_out).astype("float32")
    state, first = opt.init(params), autoencoder_gradient(params, images)[0]
    for step in range(steps):
        if step % 10 == 0:
            order = random.permutation(len(images))
        batch = images[order[step % 10 * 1000 :][:1000]]
        params, state = opt.step(params, autoencoder_gradient(params, batch)[1], state)
    return [first, autoencoder_gradient(params, images)[0]]


@pytest.mark.deep
def test_the_authors_autoencoder() -> None:
    """The authors' log: 543.67 at the start, 172.8 (train) and 171.6 (test) after 60 iterations of 1000 images.

    Here without warm start and on the 10000 test images; SGD with momentum at the authors' rate is behind. Blocks of
    neurons do better with fresh inverses and a higher rate, and diverge under the authors' schedule and rate.
    """
    if "PRECOND_REF_DATA" not in os.environ:
        pytest.skip("needs MNIST, PRECOND_REF_DATA")
    images = (problems.load_mnist()[0].reshape(-1, 784) / 255).astype("float32")
    join = tuple((f"{layer}/weight", f"{layer}/bias") for layer in range(1, 9))
    losses = [train(pr.Optimizer(pr.MBF.authors_code(), lr=1e-5, join=join), images, seed, 60) for seed in (1, 2, 3)]
    sgd = train(pr.Optimizer(pr.SGD(momentum=0.9), lr=3e-3), images, 1, 60)
    print("loss before and after 60 iterations: MBF", losses, "SGD", sgd)
    assert all(abs(first - 543.67) < 3 for first, _ in losses)
    assert 160 < np.median([last for _, last in losses]) < 190
    assert np.median([last for _, last in losses]) < sgd[1]
    rows = pr.MBF(damping=3e-4, statistics_every=2, inverse_every=2)
    fresh = train(pr.Optimizer(rows, lr=3e-5, join=join), images, 1, 60)
    with np.errstate(all="ignore"):
        stale = train(pr.Optimizer(rows.replace(inverse_every=25), lr=1e-5, join=join), images, 1, 50)
    print("per_output: fresh inverses", fresh, "the authors' schedule and rate", stale)
    assert 115 < fresh[1] < 127
    assert not np.isfinite(stale[1])
