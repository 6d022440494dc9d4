"""Steps on shapes alone: the meta device, fake tensors, and what estimates memory with them; `torch.func.vmap`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from configs import CONFIGS, Config
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.fx.experimental.proxy_tensor import make_fx
from torch_adapter_cases import ONE_EACH, forced, parameters, recorded

import precond_ref_torch as pt
from precond_ref.numerics import refresh, roots
from precond_ref_torch import states

torch.set_num_threads(1)
MODES: dict[str, tuple[Any, str]] = {"meta": (nullcontext, "meta"), "fake": (FakeTensorMode, "cpu")}


def trained(config: Config, device: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Shapes, dtypes and devices after some steps, another set of gradients among them."""
    params = [nn.Parameter(torch.empty(config.shape, dtype=dtype, device=device)) for _ in range(3)]
    opt = pt.Optimizer(params, **forced(config.method, lr=0.125, weight_decay=0.0))
    for step in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        params[2].grad = None if step == 1 else params[2].grad
        opt.step()
    entries = [p.detach() for p in params], *(list(opt.state[p].values()) for p in params)
    return [(tuple(v.shape), v.dtype) for entry in entries for v in entry]


def check_on_shapes_alone(config: Config, mode: str) -> None:
    if config.method.decays:
        config = config._replace(method=config.method.replace(weight_decay=0.0))
    context, device = MODES[mode]
    with context():
        found = trained(config, device)
    assert found == trained(config, "cpu")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ONE_EACH)
def test_steps_on_shapes_alone(name: str, mode: str) -> None:
    check_on_shapes_alone(ONE_EACH[name], mode)


@pytest.mark.deep
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_all_steps_on_shapes_alone(config: Config, mode: str) -> None:
    check_on_shapes_alone(config, mode)


def test_checks_catch_a_value_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refresh, "_has_no_value", lambda tensor: False)
    with pytest.raises(RuntimeError, match="meta"):
        trained(CONFIGS["MBF-per_output"], "meta")
    monkeypatch.setattr(states, "has_value", lambda tensor: True)
    with pytest.raises(RuntimeError), FakeTensorMode():
        trained(CONFIGS["Adam-default"], "cpu")


def test_joined_biases_and_low_precision() -> None:
    for mode, (context, device) in MODES.items():
        with context():
            made: Any = {"device": device, "dtype": torch.bfloat16}
            model = nn.Sequential(nn.Linear(3, 4, **made), nn.LayerNorm(4, **made), nn.Linear(4, 2, **made))
            opt = pt.MBF(pt.param_groups_for(model, method="MBF"), lr=0.125, damping=0.5)
            for _ in range(2):
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
                opt.step()
            assert opt.state[model[0].weight]["m"].shape == (4, 4), mode
            assert opt.state[model[0].weight]["m"].dtype == torch.float32


def test_no_template_is_fake() -> None:
    """One that was first asked for in a mode is no tensor of that mode."""
    states.template.cache_clear()
    with FakeTensorMode():
        trained(CONFIGS["Shampoo-every"], "cpu")
    spec = states.template(CONFIGS["Shampoo-every"].method, CONFIGS["Shampoo-every"].shape, torch.float32)
    assert not any(isinstance(a, torch.Tensor) for a in states.to_dict(spec).values())


@pytest.mark.parametrize(
    "make",
    [
        lambda model: pt.Adam(model.parameters()),
        lambda model: pt.Shampoo(model.parameters()),
        lambda model: pt.MBF(pt.param_groups_for(model, method="MBF"), damping=0.5),
    ],
    ids=["Adam", "Shampoo", "MBF"],
)
def test_memory_estimate_is_what_is_kept(make: Callable[[Any], Any]) -> None:
    def build() -> Any:
        return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))

    def train(model: Any, opt: Any, after: Callable[[], None] = lambda: None) -> None:
        for _ in range(2):
            model(torch.ones(4, 16)).square().mean().backward()
            opt.step()
            opt.zero_grad()
            after()

    model = build()
    opt = make(model)
    train(model, opt)
    kept = sum(v.numel() * v.element_size() for entry in opt.state.values() for v in entry.values())
    with FakeTensorMode():
        model = build()
        opt = make(model)
        tracker = MemTracker()
        tracker.track_external(model, opt)
        with tracker:
            train(model, opt, tracker.reset_mod_stats)
    snapshot = tracker.get_tracker_snapshot("current")
    estimate = sum(v for place in snapshot.values() for kind, v in place.items() if "OPT" in str(kind))
    assert kept <= estimate <= kept + 2048  # and a few 0-D tensors of each bucket


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["Adam", "Shampoo"])
def test_a_state_without_values_is_saved_and_loaded(name: str, mode: str) -> None:
    """And refused where there are values."""
    context, device = MODES[mode]
    made = forced(ONE_EACH[name].method, lr=0.125)
    real = nn.Parameter(torch.zeros(ONE_EACH[name].shape))
    opt = pt.Optimizer([real], **made)
    with context():
        params = [nn.Parameter(torch.empty(ONE_EACH[name].shape, device=device))]
        fake = pt.Optimizer(params, **made)
        for _ in range(2):
            params[0].grad = torch.zeros_like(params[0])
            fake.step()
            saved = fake.state_dict()
            fake.load_state_dict(saved)
    with pytest.raises(ValueError, match="loaded state dict has"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("name", ["Adam", "Shampoo", "MBF"])
def test_graphs_with_symbolic_shapes(name: str) -> None:
    """`make_fx` traces without telling so; its sizes cannot be hashed."""
    method, shape = ONE_EACH[name].method, ONE_EACH[name].shape

    def direction(grad: Any) -> Any:
        return method.update(grad, method.init(grad), grad)[0]

    (start,), _ = recorded([shape], 1)
    graph = make_fx(direction, tracing_mode="symbolic")(start)
    assert torch.allclose(graph(start), direction(start), rtol=1e-10, atol=1e-14)


def test_solve_under_vmap() -> None:
    """The members of which LU is unsure are done again there too."""
    (matrix, right), _ = recorded([(4, 3, 3), (4, 3, 2)], 1)
    matrix = matrix @ matrix.mT
    matrix[2] *= 1e20  # rounding hides the ridge
    expected = roots.solve(matrix, right, 0.5)
    found = torch.func.vmap(lambda a, b: roots.solve(a, b, 0.5))(matrix, right)
    assert torch.allclose(found, expected, rtol=1e-12, atol=0.0)
    method, shape = CONFIGS["MBF-per_output"].method, CONFIGS["MBF-per_output"].shape
    (grads,), _ = recorded([(4, *shape)], 1)

    def direction(grad: Any) -> Any:
        return method.update(grad, method.init(grad), grad)[0]

    whole = torch.stack([direction(g) for g in parameters(list(grads))])
    assert torch.allclose(torch.func.vmap(direction)(grads), whole.detach(), rtol=1e-10, atol=1e-14)
