"""Bytes of state, measured and by the count of `precond_ref.cost`, and the peak memory of one step."""

from __future__ import annotations

import importlib
import math
import os
import tracemalloc
from typing import Any, NamedTuple

from precond_ref.bench.peers import torch_parameters
from precond_ref.bench.workloads import Shapes
from precond_ref.bench.workloads import shapes as workload_shapes
from precond_ref.cost import estimate
from precond_ref.cost.report import SIZE
from precond_ref.registry import parse

METHODS = {
    "matrices": ("Adam", "AGD", "ASGO", "SShampoo(size=33)", "IFShampoo", "RFShampoo", "MBF", "Shampoo", "Muon"),
    "convolutions": ("Adam", "AGD", "SShampoo(size=33)", "IFShampoo", "MBF"),
    "large": ("Adam", "AGD", "ASGO", "SShampoo(size=257, solver='gram64')", "MBF"),
}


class Memory(NamedTuple):
    """Bytes of one method on one workload, float32."""

    workload: str
    method: str
    parameters: int
    measured: int
    """Bytes of the arrays in the state, after two steps of the PyTorch adapter."""
    formula: int
    """Bytes by the count of `precond_ref.cost`."""
    torch_peak: int | None
    """Peak memory of the third step of the PyTorch adapter, beside parameters, gradients and state."""
    numpy_peak: int | None
    """Peak of a step by `precond_ref.Optimizer` on NumPy."""
    jax_peak: int | None
    """Temporaries of the compiled step of the JAX adapter, parameters and state donated, as XLA reports.

    None for ``gram64``, which needs the float64 that JAX has switched off.
    """


def measure(workload: str, method: str, *, smoke: bool) -> Memory:
    """Return all columns of one row."""
    found = workload_shapes(workload, smoke)
    state, torch_peak = _torch(method, found)
    return Memory(
        workload=workload,
        method=method,
        parameters=4 * sum(map(math.prod, found.values())),
        measured=state,
        formula=formula(method, found),
        torch_peak=torch_peak,
        numpy_peak=_numpy(method, found),
        jax_peak=None if "gram64" in method else _jax(method, found),
    )


def state_bytes(optimizer: Any) -> int:
    """Return the bytes of the arrays in the state of a PyTorch optimizer, its counters left out."""
    return sum(
        tensor.numel() * tensor.element_size()
        for entry in optimizer.state.values()
        for name, tensor in entry.items()
        if name != "step"
    )


def formula(method: str, shapes: Shapes) -> int:
    """Return the bytes of the state by `precond_ref.cost`."""
    return estimate(method, parse(method).made(size=SIZE), shapes).state_bytes


def _torch(method: str, shapes: Shapes) -> tuple[int, int | None]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler announces itself; read when PyTorch is imported
    from torch.profiler import ProfilerActivity, profile

    import precond_ref_torch

    params, renew = torch_parameters(shapes)
    optimizer = precond_ref_torch.Optimizer(params.items(), parse(method).made(size=SIZE), lr=1e-4)
    for _ in range(2):
        renew()
        optimizer.step()
    state = state_bytes(optimizer)
    renew()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        optimizer.step()
    result: Any = recorded.profiler
    events = [e for e in result.kineto_results.events() if e.name() == "[memory]"]
    peak = now = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return state, peak if events else None


def _numpy(method: str, shapes: Shapes) -> int:
    import numpy as np

    from precond_ref import Optimizer

    rng = np.random.default_rng(0)
    params, grads = (
        {name: rng.standard_normal(shape, dtype="float32") for name, shape in shapes.items()} for _ in range(2)
    )
    optimizer = Optimizer(parse(method).made(size=SIZE), lr=1e-4)
    state = optimizer.init(params)
    tracemalloc.start()
    try:
        optimizer.step(params, grads, state)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _jax(method: str, shapes: Shapes) -> int | None:
    jax: Any = importlib.import_module("jax")
    import jax.numpy as jnp

    import precond_ref_jax

    optimizer: Any = precond_ref_jax.scale_by(parse(method).made(size=SIZE))
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    state = jax.eval_shape(optimizer.init, params)

    def step(params: Any, state: Any, grads: Any) -> Any:
        directions, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, d: p - 1e-4 * d, params, directions), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    analysis: Any = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)
