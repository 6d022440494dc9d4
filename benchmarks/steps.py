"""Time of one step: an optimizer of this package beside a well-known one, in turn, in one process.

``python benchmarks/steps.py torch`` or ``jax``; prints medians of the time that the process computed, which other
processes disturb less than they do the time that passed, with quartiles, and the ratios of medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

COUNT, SIZE = 100, 64
Steps = dict[str, Callable[[], None]]


def torch_steps() -> Steps:
    """AGD, eager and compiled, beside ``torch.optim.AdamW(foreach=True)``: the base."""
    import torch

    import precond_ref_torch

    torch.set_num_threads(1)
    torch.manual_seed(0)

    def matrices() -> list[Any]:
        params = [torch.nn.Parameter(torch.randn(SIZE, SIZE)) for _ in range(COUNT)]
        for p in params:
            p.grad = torch.randn(SIZE, SIZE)
        return params

    return {
        "AdamW foreach": torch.optim.AdamW(matrices(), lr=1e-4, foreach=True).step,
        "AGD eager": precond_ref_torch.AGD(matrices(), lr=1e-4, weight_decay=1e-2).step,
        "AGD compiled": precond_ref_torch.AGD(matrices(), lr=1e-4, weight_decay=1e-2, compile=True).step,
    }


def jax_steps() -> Steps:
    """agd beside ``optax.adam``, the base; both under ``jit`` with donated parameters and states."""
    import jax
    import optax

    import precond_ref_jax

    keys = jax.random.split(jax.random.key(0), 2 * COUNT)
    grads = [jax.random.normal(key, (SIZE, SIZE)) for key in keys[COUNT:]]

    def stepper(optimizer: Any) -> Callable[[], None]:
        params = [jax.random.normal(key, (SIZE, SIZE)) for key in keys[:COUNT]]
        carried = [params, optimizer.init(params)]

        def update(params: Any, state: Any, grads: Any) -> Any:
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        jitted = jax.jit(update, donate_argnums=(0, 1))

        def step() -> None:
            carried[:] = jax.block_until_ready(jitted(*carried, grads))  # type: ignore[no-untyped-call]

        return step

    return {"optax.adam": stepper(optax.adam(1e-4)), "agd": stepper(precond_ref_jax.agd(1e-4))}


def measure(steps: Steps, rounds: int, repeat: int) -> dict[str, list[float]]:
    """Seconds per step of each, ``rounds`` times, taken in turn so that a busy machine slows all of them."""
    for step in steps.values():
        for _ in range(5):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            for _ in range(repeat):
                step()
            seconds[name].append((time.process_time() - start) / repeat)
    return seconds


def main() -> None:
    """Measure one library and print a table; the first row is the base of the ratios."""
    libraries = {"torch": torch_steps, "jax": jax_steps}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=libraries)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--repeat", type=int, default=5, help="steps per measurement")
    arguments = parser.parse_args()
    seconds = measure(libraries[arguments.library](), arguments.rounds, arguments.repeat)
    base = None
    print(f"{COUNT} matrices of {SIZE} x {SIZE}, float32, one thread; CPU milliseconds per step")
    for name, values in seconds.items():
        low, median, high = (1e3 * q for q in statistics.quantiles(values, n=4))
        base = base or median
        print(f"{name:14} {median:7.3f}  (quartiles {low:.3f} to {high:.3f})  {median / base:.2f}")


if __name__ == "__main__":
    main()
