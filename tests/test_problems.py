"""Problems: gradients by autograd, closed forms, extreme logits, backends, batches, planted bugs."""

from __future__ import annotations

import inspect
import itertools
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import array_api_compat
import array_api_strict
import mpmath
import numpy as np
import pytest
from conftest import Backend
from hypothesis import given
from hypothesis import strategies as st
from mutation import mutated

from precond_ref import problems
from precond_ref.problems import base, cnn, losses, mlp, synthetic

U = 2.0**-53
"""Unit roundoff of float64."""


class Case(NamedTuple):
    """A problem, small."""

    name: str
    options: dict[str, Any]

    def load(self, *args: Any, **kwargs: Any) -> Any:
        return problems.load(self.name, *args, **{"dtype": "float64", **kwargs, **self.options})


CASES = {
    "quadratic": Case("quadratic", {"size": 7, "condition": 64.0}),
    "matrix-quadratic": Case("matrix-quadratic", {"shape": (5, 3)}),
    "matrix-regression": Case(
        "matrix-regression", {"samples": 40, "shape": (3, 6), "condition": 64.0, "batch_size": 8}
    ),
    "digits-softmax": Case("digits-softmax", {}),
    "digits-mlp": Case("digits-mlp", {"hidden": (9, 7, 8)}),
    "digits-mlp-relu": Case("digits-mlp", {"activation": "relu", "batch_size": 32}),
    "digits-autoencoder": Case("digits-autoencoder", {"hidden": (9, 4)}),
    "digits-cnn": Case("digits-cnn", {"channels": (3, 4), "activation": "tanh"}),
    "digits-cnn-relu": Case("digits-cnn", {"channels": (2, 3, 4), "batch_size": 32}),
    "mnist-softmax": Case("mnist-softmax", {"batch_size": 32}),
    "mnist-mlp": Case("mnist-mlp", {"batch_size": 32}),
    "mnist-autoencoder": Case("mnist-autoencoder", {"batch_size": 16, "hidden": (20, 5, 20)}),
    "mnist-cnn": Case("mnist-cnn", {"batch_size": 16, "channels": (2, 3), "activation": "tanh"}),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(scope="module", autouse=True)
def small_mnist(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """125 images of noise in the place of MNIST: 100 to train on, 25 to test on."""
    folder, rng = tmp_path_factory.mktemp("mnist"), np.random.default_rng(1)
    for kind, array in {
        "images-idx3": rng.integers(0, 256, (125, 28, 28)),
        "labels-idx1": rng.integers(0, 10, 125),
    }.items():
        header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
        (folder / f"t10k-{kind}-ubyte").write_bytes(header + array.astype("uint8").tobytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRECOND_REF_DATA", str(folder))
        yield


def off_start(problem: Any) -> Any:
    """Parameters away from the start, where biases are zero: init plus normal noise of deviation 1/8."""
    rng = np.random.default_rng(2)
    return {
        name: problem.space.real(value + 0.125 * rng.standard_normal(value.shape))
        for name, value in problem.initial.items()
    }


def distance(a: Any, b: Any) -> float:
    """Normwise relative difference of two host arrays."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300))


# ---- gradients: PyTorch's autograd on a forward pass of its own -----------------------------------


def torch_loss(problem: Any, params: Any, batch: Any) -> Any:
    """The loss in PyTorch's own functions, from arrays of the NumPy ``problem``."""
    import torch
    from torch.nn import functional

    if isinstance(problem, synthetic.Quadratic):
        q = torch.tensor(problem.basis)
        d = params["x"] - torch.tensor(problem.optimum)
        return 0.5 * d @ (q @ torch.diag(torch.tensor(problem.eigenvalues)) @ q.T) @ d
    if isinstance(problem, synthetic.MatrixQuadratic):
        p, r = torch.tensor(problem.left_basis), torch.tensor(problem.right_basis)
        a = p @ torch.diag(torch.tensor(problem.left_eigenvalues)) @ p.T
        b = r @ torch.diag(torch.tensor(problem.right_eigenvalues)) @ r.T
        d = params["weight"] - torch.tensor(problem.optimum)
        return 0.5 * torch.trace(d.T @ a @ d @ b)
    batch = [torch.tensor(array) for array in batch]
    n = batch[0].shape[0]
    if isinstance(problem, synthetic.MatrixRegression):
        outputs = functional.linear(batch[0], params["weight"])
        return functional.mse_loss(outputs, batch[1], reduction="sum") / (2 * n)
    logits = torch_logits(problem, params, batch[0])
    if isinstance(problem, mlp.Classifier):
        return functional.cross_entropy(logits, batch[1].long())
    return functional.binary_cross_entropy_with_logits(logits, batch[0], reduction="sum") / n


def torch_logits(problem: Any, params: Any, inputs: Any) -> Any:
    import torch

    layers = sorted({name.split("/")[0] for name in params})
    phi = {"tanh": torch.tanh, "relu": torch.relu}[problem.activation]
    for layer in layers:
        if layer.startswith("conv"):
            images = inputs.unflatten(1, (1, problem.side, problem.side)) if inputs.ndim == 2 else inputs
            kernels, bias = params[f"{layer}/weight"], params[f"{layer}/bias"]
            inputs = phi(torch.nn.functional.conv2d(images, kernels, bias, stride=2, padding=1))
            continue
        inputs = inputs.flatten(1)
        inputs = torch.nn.functional.linear(inputs, params[f"{layer}/weight"], params[f"{layer}/bias"])
        inputs = inputs if layer == layers[-1] else phi(inputs)
    return inputs


def check_autograd(problem: Any) -> None:
    """Loss and gradient, on a batch and on everything, against PyTorch's."""
    torch = pytest.importorskip("torch")
    params = off_start(problem)
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}
    for batch in (problem.batch(3), None):
        value, grads = problem.loss_and_grad(params, batch)
        expected = torch_loss(problem, leaves, problem.train if batch is None else batch)
        gradients = torch.autograd.grad(expected, list(leaves.values()))
        assert distance(value, expected.detach()) <= 1e-12
        assert distance(problem.loss(params, batch), expected.detach()) <= 1e-12
        for name, gradient in zip(leaves, gradients, strict=True):
            assert distance(grads[name], gradient) <= 1e-12, name


@cases
def test_gradient_is_autograd(case: Case) -> None:
    check_autograd(case.load())


def check_metric(problem: Any) -> None:
    """The metric of networks against PyTorch's, of synthetic problems against a difference of two losses."""
    torch = pytest.importorskip("torch")
    params = off_start(problem)
    if not isinstance(problem, mlp.Network):
        (name,) = params
        gap = problem.loss(params) - problem.loss({name: problem.optimum})
        assert distance(problem.metric(params), gap) <= 1e-12
        return
    tensors = {name: torch.tensor(value) for name, value in params.items()}
    inputs = torch.tensor(problem.test[0])
    logits = torch_logits(problem, tensors, inputs)
    if isinstance(problem, mlp.Classifier):
        expected = np.mean(logits.argmax(1).numpy() == problem.test[1])
    else:
        expected = torch.nn.functional.mse_loss(torch.sigmoid(logits), inputs) * inputs.shape[1]
    assert distance(problem.metric(params), expected) <= 1e-12


@cases
def test_metric(case: Case) -> None:
    problem = case.load()
    check_metric(problem)
    assert problem.higher_is_better == (problem.metric_name == "test accuracy")


# ---- closed forms of the quadratics ---------------------------------------------------------------


def check_hessian(problem: Any) -> None:
    """The Hessian, column by column from the gradient (which is linear), has the promised eigenvalues.

    Products of orthogonal factors: errors of a few n u, n at most 15 here.
    """
    (name,) = problem.initial
    optimum = problem.optimum
    value, grads = problem.loss_and_grad({name: optimum})
    assert value == 0.0
    assert not np.any(grads[name])
    columns = []
    for index in np.ndindex(optimum.shape):
        unit = np.zeros(optimum.shape)
        unit[index] = 1.0
        columns.append(problem.loss_and_grad({name: optimum + unit})[1][name].ravel())
    hessian = np.stack(columns)
    if name == "x":
        spectrum = problem.eigenvalues
    else:
        spectrum = np.outer(problem.left_eigenvalues, problem.right_eigenvalues).ravel()
    assert distance(hessian, hessian.T) <= 64 * 15 * U
    assert distance(np.linalg.eigvalsh(hessian), np.sort(spectrum)) <= 64 * 15 * U
    assert distance(hessian, np.diag(np.diag(hessian))) > 0.1  # eigenvectors are not the axes


@pytest.mark.parametrize("name", ["quadratic", "matrix-quadratic"])
def test_quadratic_has_its_spectrum_and_optimum(name: str) -> None:
    check_hessian(CASES[name].load())


def test_spectrum_options() -> None:
    spectrum = [3.0, 0.0, 0.5]
    problem = problems.load("quadratic", dtype="float64", spectrum=spectrum)
    assert problem.eigenvalues.tolist() == spectrum
    assert problem.init()["x"].shape == (3,)
    check_hessian(problem)
    problem = problems.load("matrix-quadratic", dtype="float64", left_spectrum=[4.0, 1.0], shape=(9, 3))
    assert problem.init()["weight"].shape == (2, 3)
    assert distance(problem.right_eigenvalues, [1.0, 10**-0.5, 0.1]) <= 4 * U
    assert problems.load("quadratic", condition=64.0, size=4, dtype="float64").eigenvalues.tolist() == [
        1.0,
        0.25,
        0.0625,
        0.015625,
    ]


def test_regression_optimum_and_conditioning() -> None:
    problem = problems.load(
        "matrix-regression", dtype="float64", samples=4096, shape=(3, 6), condition=1024.0, noise=0.5
    )
    inputs, targets = problem.train
    weight = problem.optimum
    loss, grads = problem.loss_and_grad({"weight": weight})
    assert np.linalg.norm(grads["weight"]) <= 1e-12 * np.linalg.norm(inputs) * np.linalg.norm(targets) / 4096
    assert problem.metric({"weight": weight}) == 0.0
    # noise of variance 1/4 on 3 outputs: 3/8 (1 - 6/4096), with a deviation of 3/8 sqrt(2 / 12288) = 0.005
    assert abs(loss - 0.375) <= 0.025
    # sample covariances of 4096 samples are within a factor (1 +- 2 sqrt(6/4096))^2 = 1.17 of the true one
    w = np.linalg.eigvalsh(inputs.T @ inputs / 4096)
    assert 1024 / 1.17**2 <= w[-1] / w[0] <= 1024 * 1.17**2
    covariance = inputs.T @ inputs
    assert distance(covariance, np.diag(np.diag(covariance))) > 0.1


# ---- losses at any logits -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_logits_cross_entropy(dtype: str) -> None:
    check_extreme_cross_entropy(losses, dtype)


def check_extreme_cross_entropy(module: Any, dtype: str = "float64") -> None:
    logits = np.asarray([[1e4, 0.0, -1e4]] * 2 + [[-1e4, -1e4, -1e4]], dtype=dtype)
    one_hot = np.asarray([[1, 0, 0], [0, 0, 1], [0, 1, 0]], dtype=dtype)
    xp = array_api_compat.array_namespace(logits)
    value, grad = module.cross_entropy(xp, logits, one_hot)
    third = np.asarray(1 / 3, dtype)
    assert value.dtype == grad.dtype == logits.dtype
    unit = float(np.finfo(dtype).eps)
    assert distance(value, (2e4 + np.log(3.0)) / 3) <= unit
    expected = np.asarray([[0, 0, 0], [1, 0, -1], [third, third - 1, third]]) / 3
    assert distance(grad, expected) <= 4 * unit


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_logits_binary_cross_entropy(dtype: str) -> None:
    check_extreme_binary(losses, dtype)


def check_extreme_binary(module: Any, dtype: str = "float64") -> None:
    for z, x, loss, slope in [
        (1e4, 0.0, 1e4, 1.0),
        (1e4, 1.0, 0.0, 0.0),
        (1e4, 0.5, 5e3, 0.5),
        (-1e4, 1.0, 1e4, -1.0),
        (-1e4, 0.0, 0.0, 0.0),
        (-1e4, 0.25, 2.5e3, -0.25),
    ]:
        logits, targets = np.asarray([[z]], dtype=dtype), np.asarray([[x]], dtype=dtype)
        xp = array_api_compat.array_namespace(logits)
        value, grad = module.binary_cross_entropy(xp, logits, targets)
        assert value.dtype == grad.dtype == logits.dtype
        assert (float(value), float(grad[0, 0])) == (loss, slope)


wide = st.one_of(st.floats(-50, 50, allow_subnormal=False), st.floats(-1e4, 1e4, allow_subnormal=False))


@given(z=wide, x=st.floats(0, 1, allow_subnormal=False))
def test_binary_cross_entropy_is_its_definition(z: float, x: float) -> None:
    with mpmath.workdps(50):
        p, q = 1 / (1 + mpmath.exp(-mpmath.mpf(z))), 1 / (1 + mpmath.exp(mpmath.mpf(z)))  # q = 1 - p
        expected = -x * mpmath.log(p) - (1 - mpmath.mpf(x)) * mpmath.log(q)
        logits, targets = np.asarray([[z]]), np.asarray([[x]])
        xp = array_api_compat.array_namespace(logits)
        value, grad = losses.binary_cross_entropy(xp, logits, targets)
        # half a dozen roundings of terms no larger than these; below `tiny` the format has fewer digits
        tiny = float(np.finfo("float64").tiny)
        assert abs(float(value) - expected) <= 8 * U * (max(z, 0.0) + expected) + tiny
        assert abs(float(grad[0, 0]) - (p - x)) <= 8 * U * (p + x) + tiny
        assert abs(float(losses.sigmoid(xp, logits)[0, 0]) - p) <= 8 * U * p + tiny


@given(z=st.lists(wide, min_size=3, max_size=3), label=st.integers(0, 2))
def test_cross_entropy_is_its_definition(z: list[float], label: int) -> None:
    with mpmath.workdps(50):
        exps = [mpmath.exp(mpmath.mpf(v)) for v in z]
        p = [e / mpmath.fsum(exps) for e in exps]
        expected = -mpmath.log(p[label])
        logits, one_hot = np.asarray([z]), np.eye(3)[[label]]
        value, grad = losses.cross_entropy(array_api_compat.array_namespace(logits), logits, one_hot)
        # z - max z is rounded once: absolute error u (max z - z_i) in each exponent, then exp, sum, log
        spread = max(z) - min(z) + 1
        assert abs(float(value) - expected) <= 8 * U * spread
        for i in range(3):
            assert abs(float(grad[0, i]) - (p[i] - (i == label))) <= 8 * U * spread


# ---- every backend --------------------------------------------------------------------------------


def results(problem: Any, compiled: Callable[[Any], Any] = lambda function: function) -> dict[str, Any]:
    """Everything a problem computes, flat."""
    params, first, later = problem.init(), problem.batch(1), problem.batch(200)
    loss, loss_and_grad = compiled(problem.loss), compiled(problem.loss_and_grad)
    value, grads = loss_and_grad(params, first)
    out = {
        "value": value,
        "loss": loss(params, first),
        "loss of everything": loss(params),
        "metric": compiled(problem.metric)(params),
        "value later": loss_and_grad(params, later)[0],
    }
    out |= {f"grad {name}": grad for name, grad in grads.items()}
    out |= {f"init {name}": value for name, value in params.items()}
    out |= {f"batch {i}": array for i, array in enumerate(first or ())}
    return out


def freeze(problem: Any) -> None:
    """Make all arrays of a NumPy problem, and those it will give, read-only."""
    for value in vars(problem).values():
        for array in value if isinstance(value, tuple) else (value,):
            if isinstance(array, np.ndarray):
                array.flags.writeable = False
    give, batch = problem.init, problem.batch

    def read_only(array: np.ndarray) -> np.ndarray:
        array.flags.writeable = False
        return array

    def frozen_batch(step: int) -> Any:
        arrays = batch(step)
        return None if arrays is None else tuple(map(read_only, arrays))

    object.__setattr__(problem, "init", lambda: {name: read_only(value) for name, value in give().items()})
    object.__setattr__(problem, "batch", frozen_batch)


def on(backend: Backend, case: Case, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """The case on the backend, and its results."""
    if backend.name == "jax" and ("cnn" in case.name or "mnist" in case.name):
        pytest.skip("JAX compiles each operation by itself: jax-jit has them all")
    problem = case.load(backend.xp, device=backend.device, **kwargs)
    if backend.readonly:
        freeze(problem)
    return problem, results(problem, backend.jit)


@cases
def test_backends_agree(case: Case, backend: Backend) -> None:
    expected, (_, got) = results(case.load()), on(backend, case)
    assert got.keys() == expected.keys()
    for name, array in got.items():
        assert distance(backend.numpy(array), expected[name]) <= 1e-12, name
        if backend.device is not None:
            assert array_api_compat.device(array) == backend.device


@cases
def test_float32_stays_float32(case: Case, backend: Backend) -> None:
    problem, got = on(backend, case, dtype="float32")
    for name, array in got.items():
        if name == "batch 1" and isinstance(problem, mlp.Classifier):
            assert array.dtype == backend.xp.int32
        else:
            assert array.dtype == backend.xp.float32, name
        assert np.all(np.isfinite(backend.numpy(array)))


@cases
def test_float32_is_close(case: Case) -> None:
    exact, rounded = case.load(), case.load(dtype="float32")
    expected, got = results(exact), results(rounded)
    # Inputs are rounded once, sums have at most 784 terms, there are at most 5 layers of them.
    # An accuracy may turn on a tie.
    for name in got:
        if not (name == "metric" and isinstance(exact, mlp.Classifier)):
            assert distance(got[name], expected[name]) <= 5 * 784 * 2.0**-24, name


def test_nothing_is_shared() -> None:
    torch = pytest.importorskip("torch")
    for xp in (np, torch):
        problem = CASES["digits-mlp"].load(xp)
        before = problem.loss(problem.init())
        spoiled, batch = problem.init(), problem.batch(0)
        for array in (*spoiled.values(), *batch):
            array[...] = 1
        assert problem.loss(problem.init()) == before


# ---- seeds and batches ----------------------------------------------------------------------------


@cases
def test_seed_decides(case: Case) -> None:
    one, same, other = (results(case.load(seed=seed)) for seed in (3, 3, 4))
    for name in one:
        assert np.array_equal(one[name], same[name])
        if not (name.endswith("/bias") or name == "metric"):
            assert not np.array_equal(one[name], other[name]), name


def test_seed_leaves_the_split_alone() -> None:
    one, other = (CASES["digits-mlp"].load(seed=seed) for seed in (3, 4))
    for a, b in zip(one.train + one.test, other.train + other.test, strict=True):
        assert np.array_equal(a, b)


def check_epochs(problem: Any) -> None:
    """Each epoch takes each sample at most once, all but the last short batch, in an order of its own."""
    inputs = problem.train[0]
    row_of = {row.tobytes(): i for i, row in enumerate(inputs)}
    assert len(row_of) == len(inputs)
    per_epoch = len(inputs) // problem.batch_size
    orders = []
    for epoch in range(3):
        order = []
        for position in range(per_epoch):
            batch = problem.batch(epoch * per_epoch + position)
            rows = [row_of[row.tobytes()] for row in batch[0]]
            assert len(rows) == problem.batch_size
            assert all(np.array_equal(a, b[rows]) for a, b in zip(batch, problem.train, strict=True))
            order += rows
        assert len(set(order)) == per_epoch * problem.batch_size
        assert order != sorted(order)
        orders.append(order)
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("batch_size", [1, 7, 8, 39, 40])
def test_batches_cover_an_epoch_once(batch_size: int) -> None:
    check_epochs(problems.load("matrix-regression", samples=40, shape=(2, 3), batch_size=batch_size))


def test_batches_keep_labels_with_their_images() -> None:
    check_epochs(CASES["digits-mlp"].load())


def test_any_step_may_be_asked_first() -> None:
    one, other = CASES["digits-mlp"].load(), CASES["digits-mlp"].load()
    late = one.batch(100)
    for step in range(101):
        last = other.batch(step)
    assert all(np.array_equal(a, b) for a, b in zip(late, last, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(late, one.batch(np.int64(100)), strict=True))


def test_full_batch() -> None:
    for name in ("quadratic", "matrix-quadratic", "matrix-regression"):
        problem = problems.load(name)
        assert problem.batch_size is None
        assert problem.batch(5) is None
    problem = problems.load("digits-softmax", batch_size=None)
    assert problem.batch(5) is None
    assert problem.loss(problem.init()) == problem.loss(problem.init(), problem.train)


# ---- the registry and its errors ------------------------------------------------------------------


def test_every_problem_is_tested() -> None:
    assert {case.name for case in CASES.values()} == set(problems.list_problems())


def test_defaults_of_every_problem() -> None:
    for name, description in problems.list_problems().items():
        problem = problems.load(name)
        assert problem.name == name
        assert "\n" not in description
        assert problem.default_steps >= 100
        assert problem.space.dtype == "float32"
        assert isinstance(problem.metric_name, str)
        assert name in repr(problem)
        assert len(repr(problem)) < 300
        assert all(isinstance(value, np.ndarray) for value in problem.init().values())


def test_layers_are_named_like_torch() -> None:
    shapes = {name: value.shape for name, value in problems.load("digits-autoencoder").init().items()}
    widths = [64, 32, 16, 32, 64]
    expected: dict[str, tuple[int, ...]] = {}
    for layer, (i, o) in enumerate(itertools.pairwise(widths), start=1):
        expected |= {f"fc{layer}/weight": (o, i), f"fc{layer}/bias": (o,)}
    assert shapes == expected
    assert list(shapes) == list(expected)


REFUSED = {
    "name": (lambda: problems.load("rosenbrock"), ValueError, "no problem is called 'rosenbrock'; there are quadr"),
    "dtype": (lambda: problems.load("quadratic", dtype="float16"), ValueError, "'float32', 'float64', got 'float16'"),
    "dtype object": (lambda: problems.load("quadratic", dtype=np.float32), ValueError, "dtype must be one of"),
    "xp": (lambda: problems.load("quadratic", xp="torch"), TypeError, "array-API namespace"),
    "no float64": (
        lambda: problems.load(
            "quadratic", xp=array_api_strict, dtype="float64", device=array_api_strict.Device("no_float64")
        ),
        ValueError,
        "'float64' is not available in array_api_strict",
    ),
    "seed": (lambda: problems.load("quadratic", seed=-1), ValueError, "seed must be >= 0, got -1"),
    "seed kind": (lambda: problems.load("quadratic", seed=1.5), TypeError, "seed must be an int, got 1.5"),
    "option": (
        lambda: problems.load("quadratic", hidden=(3,)),
        TypeError,
        "quadratic has no option hidden; it has size, condition, spectrum",
    ),
    "no option": (lambda: problems.load("digits-mlp", data=1), TypeError, "it has hidden, activation, batch_size"),
    "size": (lambda: problems.load("quadratic", size=0), ValueError, "size must be >= 1, got 0"),
    "size kind": (lambda: problems.load("quadratic", size=True), TypeError, "size must be an int, got True"),
    "condition": (lambda: problems.load("quadratic", condition=0.5), ValueError, "finite and >= 1, got 0.5"),
    "condition kind": (lambda: problems.load("quadratic", condition="x"), TypeError, "condition must be a real"),
    "spectrum": (lambda: problems.load("quadratic", spectrum=[1, -1]), ValueError, "eigenvalues >= 0"),
    "spectrum kind": (lambda: problems.load("quadratic", spectrum="ab"), TypeError, "spectrum must be a sequence"),
    "spectrum axes": (lambda: problems.load("quadratic", spectrum=[[1.0]]), ValueError, "at least one"),
    "shape": (lambda: problems.load("matrix-quadratic", shape=3), TypeError, "shape must be a pair of ints, got 3"),
    "shape length": (lambda: problems.load("matrix-quadratic", shape=(3,)), TypeError, "a pair of ints"),
    "shape value": (lambda: problems.load("matrix-regression", shape=(3, 0)), ValueError, "shape\\[1\\] must be"),
    "samples": (lambda: problems.load("matrix-regression", samples=31), ValueError, "samples must be at least"),
    "noise": (lambda: problems.load("matrix-regression", noise=-1.0), ValueError, "noise must be finite and >= 0"),
    "batch size": (lambda: problems.load("digits-mlp", batch_size=1438), ValueError, "samples, 1437, or None"),
    "batch size 0": (lambda: problems.load("digits-mlp", batch_size=0), ValueError, "batch_size must be >= 1"),
    "hidden": (lambda: problems.load("digits-mlp", hidden=5), TypeError, "hidden must be a sequence"),
    "hidden width": (lambda: problems.load("digits-mlp", hidden=(5, 0)), ValueError, "hidden width must be >= 1"),
    "activation": (lambda: problems.load("digits-mlp", activation="gelu"), ValueError, "tanh, relu, got 'gelu'"),
    "channels": (lambda: problems.load("digits-cnn", channels=5), TypeError, "channels must be a sequence"),
    "no channels": (lambda: problems.load("digits-cnn", channels=()), ValueError, "channels must be at least one"),
    "too many layers": (lambda: problems.load("digits-cnn", channels=(2, 2, 2, 2)), ValueError, "8 divisible by"),
    "channels value": (lambda: problems.load("digits-cnn", channels=(2, 0)), ValueError, "channels must be >= 1"),
    "step": (lambda: problems.load("digits-mlp").batch(-1), ValueError, "step must be >= 0, got -1"),
    "step kind": (lambda: problems.load("digits-mlp").batch(1.0), TypeError, "step must be an int, got 1.0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    call, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("function", ["loss", "loss_and_grad", "metric"])
def test_wrong_parameters_are_refused(function: str) -> None:
    problem = problems.load("digits-softmax")
    call, params = getattr(problem, function), problem.init()
    with pytest.raises(ValueError, match="has the parameters fc1/weight, fc1/bias, got fc1/weight"):
        call({"fc1/weight": params["fc1/weight"]})
    with pytest.raises(ValueError, match=r"fc1/weight must have shape \(10, 64\), got \(64, 10\)"):
        call({**params, "fc1/weight": params["fc1/weight"].T})
    with pytest.raises(TypeError, match="fc1/bias must have dtype float32, got float64"):
        call({**params, "fc1/bias": params["fc1/bias"].astype("float64")})


# ---- planted bugs ---------------------------------------------------------------------------------

MODULES = {"losses": losses, "mlp": mlp, "cnn": cnn, "synthetic": synthetic, "base": base}


class Bug(NamedTuple):
    """An edit of a module's source, where it shows, and the checks that must reject it."""

    module: str
    old: str
    new: str
    case: str
    checks: tuple[Callable[[Any], None], ...] = (check_autograd,)


BUGS = {
    "sum instead of mean over the samples": Bug("losses", "(xp.exp(log_p) - one_hot) / n", "(xp.exp(log_p) - one_hot)",
        "digits-softmax"),
    "gradient of the wrong sign": Bug("losses", "(sigmoid(xp, logits) - targets) / n",
        "(targets - sigmoid(xp, logits)) / n", "digits-autoencoder"),
    "mean over the pixels too": Bug("losses", "(sigmoid(xp, logits) - targets) / n",
        "(sigmoid(xp, logits) - targets) / n / 64", "digits-autoencoder"),
    "loss without its linear term": Bug("losses", " - logits * targets", "", "digits-autoencoder"),
    "slope of tanh not squared": Bug("mlp", "1.0 - a * a", "1.0 - a", "digits-mlp"),
    "slope of ReLU everywhere 1": Bug("mlp", "a > 0.0", "a >= 0.0", "digits-mlp-relu"),
    "activation not propagated through": Bug("mlp", " * slope(self.space.xp, a)", "", "digits-mlp"),
    "mean instead of sum in the bias": Bug("mlp", "xp.sum(signal, axis=0)", "xp.mean(signal, axis=0)", "mnist-mlp"),
    "logits through the activation": Bug("mlp", "phi(self.space.xp, s) if layer < depth else s",
        "phi(self.space.xp, s)", "mnist-autoencoder"),
    "bias left out": Bug("mlp", ' + params[f"fc{layer}/bias"]', "", "digits-softmax", (check_autograd, check_metric)),
    "eigenvalues left out": Bug("synthetic", "self.basis @ (self.eigenvalues * c)", "self.basis @ c", "quadratic",
        (check_autograd, check_hessian)),
    "eigenvectors as rows": Bug("synthetic", "self.basis @ (self.eigenvalues * c)",
        "self.basis.T @ (self.eigenvalues * c)", "quadratic", (check_autograd, check_hessian)),
    "right factor not transposed": Bug("synthetic", "scaled @ self.right_basis.T", "scaled @ self.right_basis",
        "matrix-quadratic", (check_autograd, check_hessian)),
    "left spectrum squared": Bug("synthetic", "self.left_eigenvalues[:, None] * c",
        "self.left_eigenvalues[:, None] ** 2 * c", "matrix-quadratic", (check_autograd, check_hessian)),
    "factor 2 lost in the regression": Bug("synthetic", "residual.T @ inputs / inputs.shape[0]",
        "residual.T @ inputs / (2 * inputs.shape[0])", "matrix-regression"),
    "gap without its factor 1/2": Bug("synthetic", "xp.sum(distance * distance) / (2 *",
        "xp.sum(distance * distance) / (1 *", "matrix-regression", (check_metric,)),
    "accuracy of the training set": Bug("mlp", "inputs, labels = self.test", "inputs, labels = self.train",
        "digits-softmax", (check_metric,)),
    "reconstruction without its sigmoid": Bug("mlp", "sigmoid(xp, self.activations(params, inputs)[-1])",
        "self.activations(params, inputs)[-1]", "digits-autoencoder", (check_metric,)),
    "kernels not turned": Bug("cnn", "xp.flip(weight, axis=(2, 3))", "weight", "digits-cnn"),
    "kernels turned to and fro": Bug("cnn", "axis=(2, 3)", "axis=(2,)", "digits-cnn"),
    "bias of one position": Bug("cnn", "xp.sum(signal, axis=(0, 2))", "xp.sum(signal[:, :, 0], axis=0)", "digits-cnn"),
    "kernels lose their slope": Bug("cnn", "@ q * slope(xp, a)", "@ q", "digits-cnn"),
    "zeros before instead of after": Bug("cnn", "[rows, xp.zeros_like(rows)]", "[xp.zeros_like(rows), rows]",
        "digits-cnn"),
    "taps transposed": Bug("cnn", "for i in range(3) for j in range(3)", "for j in range(3) for i in range(3)",
        "digits-cnn", (check_autograd, check_metric)),
    "overlapping batches": Bug("base", "start = position * self.batch_size", "start = position", "digits-mlp",
        (check_epochs,)),
    "the same order each epoch": Bug("base", '"batches", epoch)', '"batches", 0)', "digits-mlp", (check_epochs,)),
    "labels not shuffled": Bug("base", "xp.take(array, index, axis=0)",
        "xp.take(array, index * (array.ndim > 1), axis=0)", "digits-mlp", (check_epochs,)),
}  # fmt: skip


def plant(monkeypatch: pytest.MonkeyPatch, bug: Bug) -> Any:
    """The problem of the bug's case, running the edited module."""
    module = MODULES[bug.module]
    copy = mutated(module, (bug.old, bug.new))
    for name, value in vars(copy).items():
        if inspect.isfunction(value) and module is losses and hasattr(mlp, name):
            monkeypatch.setattr(mlp, name, value)
        elif inspect.isclass(value) and value.__module__ == copy.__name__:
            for method, function in vars(value).items():
                if inspect.isfunction(function) and not method.startswith("__"):
                    monkeypatch.setattr(getattr(module, name), method, function)
    return CASES[bug.case].load()


PAIRS = [(name, check) for name, bug in BUGS.items() for check in bug.checks]


@pytest.mark.parametrize(("name", "check"), PAIRS)
def test_planted_bug_is_caught(monkeypatch: Any, name: str, check: Callable[[Any], None]) -> None:
    check(CASES[BUGS[name].case].load())
    problem = plant(monkeypatch, BUGS[name])
    with pytest.raises(AssertionError):
        check(problem)


UNSAFE = {
    "largest logit not subtracted": ("logits - xp.max(logits, axis=1, keepdims=True)", "logits - 0.0",
        check_extreme_cross_entropy),
    "logarithm of the softmax": ("shifted - xp.log(xp.sum(xp.exp(shifted), axis=1, keepdims=True))",
        "xp.log(xp.exp(shifted) / xp.sum(xp.exp(shifted), axis=1, keepdims=True))", check_extreme_cross_entropy),
    "exponential of both signs": ("log1p(xp.exp(-xp.abs(logits)))", "log1p(xp.exp(-logits))", check_extreme_binary),
    "sigmoid of both signs": ("small = xp.exp(-xp.abs(logits))", "small = xp.exp(-logits)", check_extreme_binary),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE)
def test_planted_overflow_is_caught(name: str) -> None:
    old, new, check = UNSAFE[name]
    with pytest.raises((AssertionError, RuntimeWarning)):
        check(mutated(losses, (old, new)))


# ---- learning -------------------------------------------------------------------------------------


def test_digits_are_learned() -> None:
    problem = problems.load("digits-softmax")
    params = problem.init()
    for step in range(problem.default_steps):
        _, grads = problem.loss_and_grad(params, problem.batch(step))
        params = {name: params[name] - np.float32(0.5) * grads[name] for name in params}
    assert 0.93 < problem.metric(params) <= 1.0
