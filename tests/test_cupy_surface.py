"""The core and `Optimizer` use nothing that CuPy lacks, as far as names, signatures and attributes go.

Every method and `Optimizer` give what they give on NumPy, bit for bit: the surface computes there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from configs import CONFIGS, Config
from conftest import Backend, make_backend
from helpers import gradients, leaves
from mutation import mutated

import precond_ref as pr
from precond_ref import optimizer
from precond_ref.methods import agd
from precond_ref.numerics import arrays, bases, roots
from precond_ref.numerics import refresh as reading

cupy = pytest.importorskip("cupy", "14.0", reason="CuPy 14 is not installed")
from cupy_surface import OPERATORS, SURFACE  # noqa: E402

ids = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
STATISTICS = ("RFShampoo-every", "IFShampoo-plain", "MBF-per_output")


def method_results(backend: Backend, config: Config, statistic: bool = False) -> list[np.ndarray]:
    """All arrays that come of four updates of two stacked parameters, with a refresh and, where it can be, without."""
    method, shape = config
    param = backend.asarray(np.full((2, *shape), 0.5))
    state = method.init(param, stack_ndim=1)
    results = leaves(state)
    for g, q, refresh in zip(
        gradients((2, *shape), 4), gradients((3, 2, *shape), 4, 1), (None, True, method.every == 1, None), strict=True
    ):
        extra: dict[str, Any] = {}
        if statistic:
            given = pr.MBF.Samples(backend.asarray(np.moveaxis(q, 0, 1))) if isinstance(method, pr.MBF) else None
            extra = {"statistic": backend.asarray(q) if given is None else given}
        direction, state = method.update(backend.asarray(g), state, param, refresh=refresh, **extra)
        results += [direction, *leaves(state), *leaves(method.diagnose(state))]
    return [backend.numpy(result) for result in results]


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "fused": {},
    "schedule": {"lr": lambda step: 0.5 / (1 + step), "on_nonfinite": "raise"},
    "apart, joined": {"fuse": False, "join": (("w", "bias"),), "on_nonfinite": "skip"},
    "blocks": {"block_size": 12},
}


def optimizer_results(backend: Backend, config: Config, lib: Any = optimizer, **options: Any) -> list[np.ndarray]:
    """Parameters and states of three steps on a tree, with a refresh and, where it can be, without."""
    # sides that the numbers of blocks of all configurations divide, with the joined bias too
    shapes = {"a": config.shape, "b": config.shape, "w": (12, 32 - ("join" in options)), "bias": (12,), "n": ()}
    trees = [{k: backend.asarray(gradients(s, 4, i)[t]) for i, (k, s) in enumerate(shapes.items())} for t in range(4)]
    opt = lib.Optimizer(config.method, **{"lr": 0.5, **options})
    params, state = trees[0], opt.init(trees[0])
    for grads, refresh in zip(trees[1:], (None, True, config.method.every == 1), strict=True):
        params, state = opt.step(params, grads, state, refresh=refresh)
    return [backend.numpy(leaf) for leaf in [*params.values(), *leaves(state)]]


def check_surface(results: Callable[..., list[np.ndarray]], *args: Any, **options: Any) -> None:
    """``results`` on CuPy's surface are those on NumPy: values, shapes and dtypes."""
    got = results(make_backend("cupy-surface"), *args, **options)
    with pytest.MonkeyPatch.context() as patch:  # as on a device, where no value is read: others round otherwise
        for module in (arrays, bases, reading):
            patch.setattr(module, "readable", lambda array: False)
        expected = results(make_backend("numpy"), *args, **options)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


@ids
def test_methods_use_what_cupy_has(config: Config) -> None:
    check_surface(method_results, config)


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_use_what_cupy_has(name: str) -> None:
    check_surface(method_results, CONFIGS[name], statistic=True)


@ids
@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_optimizer_uses_what_cupy_has(config: Config, options: dict[str, Any]) -> None:
    check_surface(optimizer_results, config, **options)


def test_the_names_are_counted() -> None:
    for used in (SURFACE.used, SURFACE.linalg.used):
        used.clear()
    for config in CONFIGS.values():
        method_results(make_backend("cupy-surface"), config)
        for options in OPTIMIZERS.values():
            optimizer_results(make_backend("cupy-surface"), config, **options)
    names = sorted(SURFACE.used) + sorted(f"linalg.{name}" for name in SURFACE.linalg.used)
    print(f"\nCuPy {cupy.__version__}: the core and Optimizer use {len(names)} names: {', '.join(names)}")
    assert {"where", "linalg.eigh", "linalg.svd", "linalg.solve"} <= set(names)
    assert len(OPERATORS) > 50


LINE = "m = ema(state.m, grad, self.beta1)"
LACKS: dict[str, tuple[str, type[Exception], str]] = {
    "function": (f"{LINE}; xp.spacing(m)", AttributeError, "spacing"),
    "function of linalg": (f"{LINE}; xp.linalg.multi_dot([m, m])", AttributeError, "multi_dot"),
    "argument": (f"{LINE}; xp.max(m, initial=0.0)", TypeError, "unexpected keyword argument 'initial'"),
    "argument of linalg": (f"{LINE}; xp.linalg.svd(m, hermitian=False)", TypeError, "argument 'hermitian'"),
    "argument passed on": (f"{LINE}; xp.zeros((2,), like=None)", TypeError, "unexpected keyword argument 'like'"),
    "too few": (f"{LINE}; xp.tril()", TypeError, "missing a required argument"),
    "argument of a ufunc": (f"{LINE}; xp.sqrt(m * m, where=True)", TypeError, "takes 1 arrays, got 1 and .'where'."),
    "output of a ufunc": (f"{LINE}; xp.add(m, m, m * 1)", TypeError, "takes 2 arrays, got 3"),
    "attribute": (f"{LINE}; m.ctypes", AttributeError, "ctypes"),
    "method": (f"{LINE}; m.partition(0)", AttributeError, "partition is no method of the array API"),
    "index": (f"{LINE}; ([0] * 99)[xp.argmax(m)]", TypeError, "indices must be integers"),
    "NumPy's array": (f"{LINE}; m = m + __import__('numpy').ones(m.shape)", TypeError, "unsupported|Unsupported"),
    "NumPy's argument": (f"{LINE}; xp.concat([m, __import__('numpy').ones(m.shape)])", TypeError, "Unsupported type"),
    "to NumPy": (f"{LINE}; __import__('numpy').cos(m)", TypeError, "."),
    "implicitly to NumPy": (f"{LINE}; __import__('numpy').asarray(m)", TypeError, "Implicit conversion"),
}


@pytest.mark.parametrize("name", LACKS)
def test_planted_use_of_what_cupy_lacks_is_caught(name: str) -> None:
    planted, error, message = LACKS[name]
    config = Config(mutated(agd, (LINE, planted)).AGD(), (4, 4))
    if name != "too few":
        method_results(make_backend("numpy"), config)  # NumPy has it
    with pytest.raises(error, match=message):
        check_surface(method_results, config)


def test_planted_use_in_the_optimizer_is_caught() -> None:
    lib = mutated(optimizer, ("return xp.stack(parts)", "return xp.stack(parts, dtype=None, like=None)"))
    with pytest.raises(TypeError, match="unexpected keyword argument 'like'"):
        check_surface(optimizer_results, CONFIGS["ASGO-right"], lib)
    lib = mutated(optimizer, ("return xp.stack(parts)", "return xp.block([[*parts]])"))
    with pytest.raises(AttributeError, match="block"):
        check_surface(optimizer_results, CONFIGS["ASGO-right"], lib)


def test_planted_solve_of_a_matrix_for_a_whole_stack_is_caught() -> None:
    """Which CuPy refuses, and the array API allows."""
    old = "xp.linalg.solve(a, b),), damped, b"
    lib = mutated(roots, (old, "xp.linalg.solve(a[0, ...], b),), damped, b"))
    matrices = np.stack([np.eye(3)] * 2)
    for backend in map(make_backend, ("numpy", "cupy-surface")):
        a, b = backend.asarray(matrices), backend.asarray(matrices)
        roots.solve(a, b, ridge=0.5)
        if backend.name == "numpy":
            lib.solve(a, b, ridge=0.5)
        else:
            with pytest.raises(ValueError, match=r"solve\(\) of arrays of shapes \(3, 3\) and \(2, 3, 3\)"):
                lib.solve(a, b, ridge=0.5)


def test_planted_difference_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    sqrt = SURFACE.sqrt
    monkeypatch.setitem(vars(SURFACE), "sqrt", lambda x: sqrt(x) * (1 + 2**-50))
    with pytest.raises(AssertionError):
        check_surface(method_results, CONFIGS["AGD-default"])
