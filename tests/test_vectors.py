"""The conformance vectors: this library reproduces them, the linter finds planted faults, building is deterministic."""

import json
import re
import shutil

import numpy as np
import pytest
from independent import build

from precond_ref.conformance import vectors
from precond_ref.conformance.vectors import cases, load
from precond_ref.numerics import roots, sketch
from precond_ref.numerics.sketch import Sketch

U = np.finfo(np.float64).eps / 2
TRACES = cases(kind="trace")


def fields(state, prefix="state."):
    """Names and values of a state's arrays, as the vectors name them; a sketch by what is unique in it."""
    for name, value in zip(getattr(state, "_fields", range(len(state))), state, strict=True):
        if isinstance(value, Sketch):
            yield f"{prefix}{name}", (value.basis * value.eigenvalues[..., None, :]) @ np.swapaxes(value.basis, -1, -2)
            yield f"{prefix}{name}.eigenvalues", value.eigenvalues
            yield f"{prefix}{name}.escaped", value.escaped
        elif isinstance(value, tuple):
            yield from fields(value, f"{prefix}{name}.")
        elif value is not None and name != "step":
            yield f"{prefix}{name}", value


def run(case, tensors, method=None):
    """All results of our method on a case, in float64."""
    method = case.make() if method is None else method
    param = tensors["param"]
    state = method.init(param, stack_ndim=case.stack_ndim)
    out = {name: [] for name in tensors if name not in case.inputs}
    for grad in tensors["grads"]:
        direction, state = method.update(grad, state, param)
        param = (1 - case.lr * case.decay) * param - case.lr * direction
        got = {"directions": direction, "params": param, **dict(fields(state))}
        assert out.keys() <= got.keys()
        for name in out:
            out[name].append(got[name])
    return {name: np.stack(values) for name, values in out.items()}, got.keys()


def tolerances(case):
    """Allowed relative distance per step: 16 u kappa^(p + 1/2), with the largest kappa so far."""
    kappa = np.maximum.accumulate(case.conditioning["kappa"])
    p = case.conditioning["exponent"]
    return 16 * U * kappa ** (p + 0.5 if p else 0)


def gaps(case, expected, got):
    """Distance over tolerance, per tensor: normwise, or for each entry where the method is elementwise."""
    out = {}
    for name, value in got.items():
        truth = expected[name]
        per_step = tuple(range(1, truth.ndim))
        size = np.sqrt(np.sum(truth**2, axis=per_step))
        distance = np.sqrt(np.sum((value - truth) ** 2, axis=per_step))
        out[name] = np.max(distance / np.where(size > 0, size, 1) / tolerances(case))
    return out


@pytest.mark.parametrize("case", TRACES, ids=lambda case: case.id)
def test_core_reproduces_trace(case):
    tensors = load(case)
    got, names = run(case, tensors)
    assert {n for n in got} == set(tensors) - set(case.inputs)
    worst = gaps(case, tensors, got)
    assert max(worst.values()) <= 1, worst
