"""Optimizers of other packages. This module runs in their environments, without precond_ref: `benchmarks/peers.sh`.

Each entry of `PEERS` makes a function that does one step on a workload.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

try:
    from precond_ref.bench.workloads import Shapes, split
except ModuleNotFoundError:  # run as a script
    from workloads import Shapes, split  # type: ignore[import-not-found, no-redef]

Step = Callable[[], None]
GRADIENTS = 4
"""Sets of gradients that are used in turn, while the parameters have less than `MANY` entries; from there on one."""
MANY = 2 * 10**7


def torch_parameters(shapes: Shapes) -> tuple[dict[str, Any], Callable[[], None]]:
    """Return parameters, and a function that gives them the next gradients."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def draw() -> list[Any]:
        return [torch.randn(shape, generator=generator) for shape in shapes.values()]

    params = {name: torch.nn.Parameter(value) for name, value in zip(shapes, draw(), strict=True)}
    entries = sum(param.numel() for param in params.values())
    turn = itertools.cycle([draw() for _ in range(GRADIENTS if entries < MANY else 1)])

    def renew() -> None:
        for param, grad in zip(params.values(), next(turn), strict=True):
            param.grad = grad

    renew()
    return params, renew


def torch_step(make: Callable[[dict[str, Any]], list[Any]], shapes: Shapes) -> Step:
    """Return one step of all optimizers that ``make`` returns for named parameters."""
    params, renew = torch_parameters(shapes)
    optimizers = make(params)

    def step() -> None:
        renew()
        for optimizer in optimizers:
            optimizer.step()

    return step


def jax_step(optimizer: Any, shapes: Shapes) -> Step:
    """Return one jitted step of an optax optimizer with donated parameters and state."""
    jax: Any = importlib.import_module("jax")

    def draw(seed: int) -> dict[str, Any]:
        keys = jax.random.split(jax.random.PRNGKey(seed), len(shapes))
        return {name: jax.random.normal(key, shape) for (name, shape), key in zip(shapes.items(), keys, strict=True)}

    carried = [draw(0)]
    carried.append(optimizer.init(carried[0]))
    turn = itertools.cycle([draw(seed) for seed in range(1, GRADIENTS + 1)])

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return jax.tree_util.tree_map(lambda p, u: p + u, params, updates), state

    jitted = jax.jit(update, donate_argnums=(0, 1))

    def step() -> None:
        carried[:] = jax.block_until_ready(jitted(*carried, next(turn)))

    return step


def with_adam(make: Callable[[list[Any]], Any]) -> Callable[[dict[str, Any]], list[Any]]:
    """Return ``make`` for matrices and tensors, and `torch.optim.Adam` for the rest, the routing of precond_ref."""

    def both(params: dict[str, Any]) -> list[Any]:
        import torch

        matrices = [p for p in params.values() if p.ndim > 1]
        rest = [p for p in params.values() if p.ndim < 2]
        return [make(matrices), *([torch.optim.Adam(rest, lr=1e-4, foreach=True)] if rest else [])]

    return both


def _atorch_agd(shapes: Shapes) -> Step:
    found = [
        pathlib.Path(folder) / "atorch" / "optimizers" / "agd.py"
        for folder in sys.path
        if (pathlib.Path(folder) / "atorch" / "optimizers" / "agd.py").is_file()
    ]
    if not found:
        raise ModuleNotFoundError("atorch", name="atorch")
    spec: Any = importlib.util.spec_from_file_location("atorch_agd", found[0])  # the whole package needs a framework
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return torch_step(lambda params: [module.AGD(list(params.values()), lr=1e-4, weight_decay=1e-2)], shapes)


def _pytorch_optimizer(name: str, **options: Any) -> Callable[[Shapes], Step]:
    def make(shapes: Shapes) -> Step:
        cls = getattr(importlib.import_module("pytorch_optimizer"), name)
        return torch_step(with_adam(lambda params: cls(params, lr=1e-4, **options)), shapes)

    return make


def _heavyball(name: str, **options: Any) -> Callable[[Shapes], Step]:
    """Not compiled."""

    def make(shapes: Shapes) -> Step:
        package: Any = importlib.import_module("heavyball")
        package.utils.compile_mode = None
        options_ = {"merge_dims": False, "use_precond_schedule": False, "consume_grad": False, **options}
        return torch_step(with_adam(lambda params: getattr(package, name)(params, lr=1e-4, **options_)), shapes)

    return make


def _sirf_shampoo(shapes: Shapes) -> Step:
    import torch

    package: Any = importlib.import_module("sirfshampoo")
    matrices, rest = split(shapes)
    model = torch.nn.Sequential(*(torch.nn.Linear(i, o, bias=False) for o, i in matrices.values()))
    own, renew = torch_parameters(rest) if rest else ({}, lambda: None)
    optimizers = [package.SIRFShampoo(model, lr=1e-4, batch_size=1)]
    if own:
        optimizers.append(torch.optim.Adam(list(own.values()), lr=1e-4, foreach=True))
    turn = itertools.cycle([[torch.randn(p.shape) for p in model.parameters()] for _ in range(GRADIENTS)])

    def step() -> None:
        renew()
        for param, grad in zip(model.parameters(), next(turn), strict=True):
            param.grad = grad
        for optimizer in optimizers:
            optimizer.step()

    return step


def _precondition_fd(rank: int) -> Callable[[Shapes], Step]:
    def make(shapes: Shapes) -> Step:
        package: Any = importlib.import_module("precondition.distributed_shampoo")
        largest = max(max(shape) for shape in shapes.values())
        optimizer = package.distributed_shampoo(
            1e-4,
            block_size=largest,
            start_preconditioning_step=1,
            compression_rank=rank,
            frequent_directions=True,
            reuse_preconditioner=True,
            best_effort_shape_interpretation=False,
            generate_training_metrics=False,
        )
        return jax_step(optimizer, shapes)

    return make


ONE_SIDED = {
    "pre_conditioner_type": 1,
    "graft_type": 0,
    "betas": (0.9, 0.8),
    "nesterov": False,
    "moving_average_for_momentum": True,
    "shape_interpretation": False,
    "use_svd": True,
    "start_preconditioning_step": 1,
    "preconditioning_compute_steps": 1,
    "matrix_eps": 1e-10,
}
PEERS: dict[str, tuple[str, Callable[[Shapes], Step]]] = {
    "atorch AGD": ("torch", _atorch_agd),
    "pytorch_optimizer ScalableShampoo, one side": ("torch", _pytorch_optimizer("ScalableShampoo", **ONE_SIDED)),
    "pytorch_optimizer Shampoo": ("torch", _pytorch_optimizer("Shampoo")),
    "pytorch_optimizer SOAP": ("torch", _pytorch_optimizer("SOAP")),
    "pytorch_optimizer SOAP, every step": ("torch", _pytorch_optimizer("SOAP", precondition_frequency=1)),
    "heavyball SOAP": ("torch", _heavyball("SOAP", precondition_frequency=10)),
    "heavyball KLShampoo": ("torch", _heavyball("KLShampoo", precondition_frequency=10)),
    "sirfshampoo": ("torch", _sirf_shampoo),
    "precondition_opt FD": ("jax", _precondition_fd(32)),
    "precondition_opt FD, size 128": ("jax", _precondition_fd(128)),
}
"""Peers by name: their environment, and the function that makes a step."""
