"""The PyTorch adapter: against the core, PyTorch's conventions, checkpoints, precision, routing, bad input."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
import runpy
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from configs import CONFIGS, Config, Decayed
from torch import nn
from torch_adapter_cases import (
    CHECKS,
    MUTANTS,
    ONE_EACH,
    by_core,
    distance,
    feed,
    forced,
    parameters,
    recorded,
    through_file,
)

import precond_ref as pr
import precond_ref_torch as pt
from precond_ref.problems import load_digits
from precond_ref_torch import buckets

torch.set_num_threads(1)
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
every_method = pytest.mark.parametrize("name", ONE_EACH)


def make(name: str, params: Any, **options: Any) -> Any:
    """The class of a method with loud hyperparameters, the method on every parameter."""
    method = ONE_EACH[name].method
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    return getattr(pt, name)(params, **{"fallback": method, **fields, **options})


# ---- against the core -----------------------------------------------------------------------------------------------


@every_config
def test_recorded_gradients_give_the_core_s_parameters(config: Config) -> None:
    start, grads = recorded([config.shape] * 3, 50)
    params = parameters(start)
    decay = {} if config.method.decays else {"weight_decay": 0.25}
    feed(pt.Optimizer(params, **forced(config.method, lr=0.125, **decay)), params, grads)
    # the same operations; products of a stack may sum in another order: a few u per step, 50 steps, u = 1.1e-16
    assert distance(params, by_core(config.method, start, grads, 0.125, *decay.values())) <= 1e-13


@every_config
def test_values_are_read_only_for_weight_decay(config: Config) -> None:
    """What `reads_param` rests on."""
    if config.method.reads_param:
        pytest.skip("reads them")
    start, grads = recorded([config.shape], 3)
    states = [config.method.init(start[0])] * 2
    for (g,) in grads:
        (a, states[0]), (b, states[1]) = (
            config.method.update(g, state, x) for state, x in zip(states, (start[0], g), strict=True)
        )
        assert torch.equal(a, b)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 10)).double()


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits()
    return torch.tensor(images[:200, ::2, ::2].reshape(200, 16) / 16.0), torch.tensor(labels[:200].astype(np.int64))


@every_method
def test_closed_loop_on_a_model(name: str) -> None:
    method = ONE_EACH[name].method
    if method.decays:  # the adapter's decay of a group acts on all of its parameters
        method = method.replace(weight_decay=0.0)
    model, twin = small_model(), small_model()
    opt = pt.Optimizer(model.named_parameters(), method, lr=0.03125)
    core = pr.Optimizer(method, lr=0.03125)
    inputs, labels = digits()
    state = core.init(dict(twin.named_parameters()))
    for _ in range(15):
        opt.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        opt.step()
        values = dict(twin.named_parameters())
        grads = torch.autograd.grad(nn.functional.cross_entropy(twin(inputs), labels), list(values.values()))
        with torch.no_grad():
            new, state = core.step(values, dict(zip(values, grads, strict=True)), state)
            for key, p in values.items():
                p.copy_(new[key])
    assert distance(list(model.parameters()), list(twin.parameters())) <= (1e-12 if method.elementwise else 1e-9)


# ---- checks and their mutants ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_check_passes(check: Any) -> None:
    check(pt.Optimizer)


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_check_catches(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for target, attribute, value in mutant.patches:
        monkeypatch.setattr(target, attribute, value)
    with pytest.raises((AssertionError, pytest.fail.Exception, ValueError)) as caught:
        mutant.check(mutant.cls)
    if isinstance(caught.value, ValueError):  # a state that was cast is refused
        assert "torch.float32 on cpu for a parameter of size" in str(caught.value)


# ---- PyTorch's conventions, all methods -----------------------------------------------------------------------------


@every_method
def test_class_arguments_are_the_fields(name: str) -> None:
    config = ONE_EACH[name]
    start, grads = recorded([config.shape] * 2, 3)
    a, b = parameters(start), parameters(start)
    opt = make(name, a, lr=0.125)
    assert type(opt).__module__ == "precond_ref_torch"
    assert isinstance(opt, torch.optim.Optimizer)
    feed(opt, a, grads)
    feed(pt.Optimizer(b, **forced(config.method, lr=0.125)), b, grads)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@every_method
def test_closure_is_evaluated_once_with_gradients(name: str) -> None:
    start, _ = recorded([ONE_EACH[name].shape], 0)
    (p,) = params = parameters(start)
    opt = make(name, params, lr=0.125)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(p.detach().clone())
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    for _ in range(3):
        before = p.detach().clone()
        loss = opt.step(closure)
        assert torch.equal(calls[-1], before)
        assert torch.equal(loss, (before**2).sum())
    assert len(calls) == 3
    assert not torch.equal(p, start[0])


@every_method
def test_no_gradient_no_change(name: str) -> None:
    start, _ = recorded([ONE_EACH[name].shape], 0)
    params = parameters(start)
    opt = make(name, params)
    opt.step()
    assert torch.equal(params[0], start[0])
    assert not opt.state_dict()["state"]


@every_method
def test_groups_schedulers_and_added_groups(name: str) -> None:
    config = ONE_EACH[name]
    start, grads = recorded([config.shape] * 3, 6)
    params = parameters(start)
    opt = make(name, [{"params": params[:1], "lr": 0.5}, {"params": params[1:2]}], lr=0.25)
    schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=2, gamma=0.5)
    expected, rates = [], [[0.5, 0.5, 0.25, 0.25, 0.125, 0.125], [0.25, 0.25, 0.125, 0.125, 0.0625, 0.0625]]
    for step, row in enumerate(grads):
        if step == 3:
            opt.add_param_group({"params": params[2:], "lr": 0.125, "maximize": True})
        feed(opt, params, [row])
        assert [g["lr"] for g in opt.param_groups[:2]] == [r[step] for r in rates]
        schedule.step() if step < 2 or len(opt.param_groups) == 2 else _scheduled(opt, step)
    for i in range(2):
        x, state = start[i], config.method.init(start[i])
        for row, lr in zip(grads, rates[i], strict=True):
            direction, state = config.method.update(row[i], state, x)
            x = x - lr * direction
        expected.append(x)
    assert distance(params[:2], expected) <= 1e-13
    climbed = by_core(config.method, start[2:], [[-row[2]] for row in grads[3:]], 0.125)
    assert distance(params[2:], climbed) <= 1e-13


def _scheduled(opt: Any, step: int) -> None:
    """What the scheduler, which does not know the third group, would set."""
    for group, lr in zip(opt.param_groups, (0.5, 0.25), strict=False):
        group["lr"] = lr * 0.5 ** ((step + 1) // 2)


@every_method
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_go_on_with_the_same_bits(name: str, how: str) -> None:
    start, grads = recorded([ONE_EACH[name].shape] * 2, 4)
    params = parameters(start)
    opt = make(name, params, lr=0.125)
    feed(opt, params, grads[:2])
    both = (params, opt)
    again, other = pickle.loads(pickle.dumps(both)) if how == "pickle" else copy.deepcopy(both)
    assert type(other) is type(opt)
    feed(opt, params, grads[2:])
    feed(other, again, grads[2:])
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))
    assert repr(other) == repr(opt)


@every_method
@pytest.mark.parametrize("lr", [0.125, torch.tensor(0.125), torch.tensor([0.125])], ids=["float", "0-D", "1-D"])
def test_learning_rate_as_number_or_tensor(name: str, lr: Any) -> None:
    config = ONE_EACH[name]
    start, grads = recorded([config.shape], 3)
    params = parameters(start)
    feed(make(name, params, lr=lr), params, grads)
    assert distance(params, by_core(config.method, start, grads, 0.125)) <= 1e-13


@every_method
def test_memory_layout_does_not_matter(name: str) -> None:
    if len(ONE_EACH[name].shape) != 2:
        pytest.skip("a matrix is needed")
    start, grads = recorded([(5, 3)] * 2, 3)
    plain, strided = parameters(start), [nn.Parameter(v.T.contiguous().T) for v in start]
    feed(make(name, plain, lr=0.125), plain, grads)
    opt = make(name, strided, lr=0.125)
    for row in grads:
        for p, g in zip(strided, row, strict=True):
            p.grad = g.T.contiguous().T
        opt.step()
    assert distance(strided, plain) <= 1e-13
    assert not strided[0].is_contiguous()


@every_method
def test_zero_grad_and_named_parameters(name: str) -> None:
    start, grads = recorded([ONE_EACH[name].shape], 1)
    (p,) = params = parameters(start)
    opt = make(name, [("layer.weight", p)])
    assert opt.state_dict()["param_groups"][0]["param_names"] == ["layer.weight"]
    feed(opt, params, grads)
    opt.zero_grad(set_to_none=False)
    assert not p.grad.any()
    opt.zero_grad()
    assert p.grad is None


def test_presets_are_class_methods() -> None:
    start, grads = recorded([(4, 3)], 3)
    params = parameters(start)
    opt = pt.ASGO.theory(params, lr=0.125, eps=0.25, weight_decay=0.5)
    assert isinstance(opt, pt.ASGO)
    feed(opt, params, grads)
    assert distance(params, by_core(pr.ASGO.theory(eps=0.25), start, grads, 0.125, 0.5)) <= 1e-13
    again = copy.deepcopy(opt)
    again.load_state_dict(through_file(opt.state_dict()))
    with pytest.raises(ValueError, match="is of ASGO.theory, this group runs ASGO"):
        pt.ASGO(params).load_state_dict(opt.state_dict())
    presets = [(n, p) for n, m in pr.list_methods().items() for p in m.presets]
    assert all(callable(getattr(getattr(pt, n), p)) for n, p in presets)


def test_module_exports_every_method() -> None:
    assert set(pr.list_methods()) < set(pt.__all__) <= set(dir(pt))
    assert pt.AGD is pt.AGD
    with pytest.raises(AttributeError, match="no attribute 'NoSuchMethod'"):
        pt.NoSuchMethod  # noqa: B018


def test_many_shapes_on_flat_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also cut: several pieces per buffer, several buffers per group."""
    monkeypatch.setattr(buckets, "PIECE_BYTES", 64)
    monkeypatch.setattr("precond_ref_torch.optimizer.LARGEST_BUFFER", {"other": 40})
    shapes: list[tuple[int, ...]] = [(3, 4), (), (7,), (2, 3, 4), (0, 3), (50,), (1,)]
    start, grads = recorded(shapes, 5)
    params = parameters(start)
    method = ONE_EACH["AGD"].method
    opt = pt.Optimizer(params, method, lr=0.125)
    feed(opt, params, grads)
    kept = [i for i, s in enumerate(shapes) if 0 not in s]
    expected = by_core(method, start, grads, 0.125)
    assert distance([params[i] for i in kept], [expected[i] for i in kept]) <= 1e-13
    assert len(opt._plans[0].buckets) == 4


def test_dissolved_buckets_leave_no_shared_memory() -> None:
    start, grads = recorded([(4, 3)] * 2, 3)
    params = parameters(start)
    opt = pt.ASGO(params)
    feed(opt, params, grads[:1])
    assert opt.state[params[0]]["m"].untyped_storage().nbytes() == 2 * 12 * 8
    feed(opt, params, [[grads[1][0], None]])
    assert all(opt.state[p]["m"].untyped_storage().nbytes() == 12 * 8 for p in params)


# ---- precision, AMP -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_method
def test_low_precision_parameters_keep_their_dtype(name: str, dtype: torch.dtype) -> None:
    config = ONE_EACH[name]
    start, grads = recorded([config.shape] * 2, 3, dtype)
    params = parameters(start)
    opt = make(name, params, lr=0.125)
    feed(opt, params, grads)
    wide = [v.float() for v in start]
    expected = by_core(config.method, wide, [[g.float() for g in row] for row in grads], 0.125)
    assert all(p.dtype == dtype for p in params)
    assert all(v.dtype == torch.float32 for s in opt.state.values() for k, v in s.items() if k != "step")
    assert distance([p.float() for p in params], expected) <= 4 * 3 * torch.finfo(dtype).eps  # three roundings


def amp_model() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(16, 6), torch.randn(16, 3)


@pytest.mark.parametrize("name", ["AGD", "ASGO"])
def test_autocast_accumulation_and_clipping(name: str) -> None:
    """bf16 autocast, four micro-batches, clipped: the parameters are the core's with those gradients."""
    model, x, y = amp_model()
    params = list(model.parameters())
    start, grads = [p.detach().clone() for p in params], []
    opt = make(name, model.parameters(), lr=0.125, fallback=pr.Adam())
    for _ in range(3):
        opt.zero_grad()
        for part, target in zip(x.chunk(4), y.chunk(4), strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = nn.functional.mse_loss(model(part), target) / 4
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        grads.append([p.grad.clone() for p in params])
        opt.step()
    for i, x0 in enumerate(start):
        method = ONE_EACH[name].method if ONE_EACH[name].method.takes(x0.shape) else pr.Adam()
        expected = by_core(method, [x0], [[row[i]] for row in grads], 0.125)
        assert distance([params[i]], expected) <= 16 * 100 * 2**-24  # kappa below 100: eps >= 1/8


def test_grad_scaler_skips_and_goes_on() -> None:
    model, x, y = amp_model()
    opt = pt.AGD(model.parameters(), lr=0.125)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        opt.zero_grad()
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        before = [p.detach().clone() for p in model.parameters()]
        if step == 2:
            next(model.parameters()).grad[0, 0] = torch.inf
        scaler.step(opt)
        scaler.update()
        moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True)]
        assert any(moved) == (step != 2)
    assert {int(s["step"]) for s in opt.state.values()} == {3}
    assert scaler.get_scale() == 512.0


def test_state_of_another_device_is_loaded() -> None:
    """The meta device stands in for the other one: what arrives is on the parameter's."""
    start, grads = recorded([(4, 3)], 2)
    a = parameters(start)
    one = pt.ASGO(a)
    feed(one, a, grads)
    (meta,) = there = [nn.Parameter(start[0].to("meta"))]
    two = pt.ASGO(there)
    two.load_state_dict(one.state_dict())
    assert {v.device.type for k, v in two.state[meta].items() if k != "step"} == {"meta"}
    assert two.state[meta]["step"].device.type == "cpu"
    one.load_state_dict(one.state_dict())
    assert {v.device.type for v in one.state[a[0]].values()} == {"cpu"}


# ---- routing --------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """One of each role, and a head that shares its weight with an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 3)
        self.norm = nn.LayerNorm(6)
        self.middle = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6, bias=False).requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(2, 3, 4))
        self.tied = nn.Linear(6, 11, bias=False)
        self.tied.weight = self.tokens.weight
        self.out = nn.Linear(6, 4)


def test_param_groups_for_a_module() -> None:
    model = Mixed()
    groups = pt.param_groups_for(model, head={"lr": 0.5}, norm={"weight_decay": 0.0})
    roles = {g["role"]: [name for name, _ in g["params"]] for g in groups}
    assert roles == {
        "matrix": ["middle.weight"],
        "convolution": ["conv.weight"],
        "embedding": ["tokens.weight"],
        "head": ["out.weight"],
        "norm": ["norm.weight", "norm.bias"],
        "bias": ["conv.bias", "middle.bias", "out.bias"],
        "other": ["gain"],
    }
    opt = pt.ASGO(groups, lr=0.25, weight_decay=0.125)
    table, fields = (part.splitlines() for part in opt.describe().split("\n\n"))
    assert table[0].split() == ["group", "role", "parameter", "shape", "dtype", "method", "lr", "weight_decay"]
    row = {line.split()[2]: line for line in table[1:]}
    assert row["middle.weight"].split()[-3:] == ["ASGO", "0.25", "0.125"]
    assert row["out.weight"].split()[-3:] == ["Adam", "0.5", "0.125"]
    assert row["norm.bias"].split()[-3:] == ["Adam", "0.25", "0"]
    assert row["conv.weight"].split()[-3:] == ["Adam", "0.25", "0.125"]
    assert len(table) == 1 + 10
    assert fields == [f"group 0: {pr.ASGO()}", f"groups 1, 2, 3, 4, 5, 6: {pr.Adam()}"]
    assert set(opt.param_groups[3]) >= {"beta1", "beta2", "eps", "lr"}
    assert not {"side", "rms"} & set(opt.param_groups[3])
    shampoo = pt.Shampoo(pt.param_groups_for(model), eps=0.25)
    table = shampoo.describe().partition("\n\n")[0].splitlines()
    assert {line.split()[2]: line for line in table}["conv.weight"].split()[-3] == "Shampoo"


def test_param_groups_for_heads_and_methods() -> None:
    model = Mixed()
    groups = pt.param_groups_for(model, heads=["middle"], adam=pr.Adam(beta1=0.5), embedding={"method": pr.SGD()})
    roles = {g["role"]: g for g in groups}
    assert [name for name, _ in roles["head"]["params"]] == ["middle.weight"]
    opt = pt.ASGO(groups, beta1=0.75)
    by_role = {g["role"]: g for g in opt.param_groups}
    assert (by_role["matrix"]["beta1"], by_role["head"]["beta1"]) == (0.75, 0.5)
    assert by_role["embedding"]["method"] == "SGD"
    with pytest.raises(ValueError, match="no role is called heads_"):
        pt.param_groups_for(model, heads_={})
    with pytest.raises(ValueError, match="heads names lm_head"):
        pt.param_groups_for(model, heads=["lm_head"])


def test_matrix_methods_leave_the_rest_to_the_fallback() -> None:
    shapes = [(4, 3), (4,), (2, 3, 4), (5, 3)]
    start, grads = recorded(shapes, 4)
    params = parameters(start)
    names = ["a.weight", "a.bias", "b", "emb.weight"]
    opt = pt.ASGO(list(zip(names, params, strict=True)), lr=0.125, eps=0.25, fallback=pr.SGD())
    feed(opt, params, grads)
    for i, method in enumerate((pr.ASGO(eps=0.25), pr.SGD(), pr.SGD(), pr.SGD())):
        assert distance([params[i]], by_core(method, start[i : i + 1], [[r[i]] for r in grads], 0.125)) <= 1e-13
    with pytest.raises(ValueError, match=r"ASGO does not take a parameter of size \[4\] \(a.bias\): give `fallback`"):
        pt.ASGO(list(zip(names, params, strict=True)), fallback=None)


# ---- the CuPy engine, played by NumPy -------------------------------------------------------------------------------


def test_foreign_engine_shares_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from array_api_compat import array_namespace

    used: list[Any] = []

    def engine(device: torch.device) -> Any:
        used.append(device)
        xp = array_namespace(np.zeros(1))
        return xp, np.from_dlpack, torch.from_numpy, contextlib.nullcontext

    monkeypatch.setattr(buckets, "cupy_engine", engine)
    monkeypatch.setattr("precond_ref_torch.optimizer.check_engine", lambda *_: None)
    for config in (ONE_EACH["AGD"], ONE_EACH["ASGO"], CONFIGS["Shampoo-every"]):
        start, grads = recorded([config.shape] * 2, 4)
        params = parameters(start)
        feed(pt.Optimizer(params, **forced(config.method, lr=0.125, engine="cupy")), params, grads)
        assert distance(params, by_core(config.method, start, grads, 0.125)) <= 1e-12
    assert used


def test_cupy_engine_computes_on_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []

    @contextlib.contextmanager
    def entering(*what: Any) -> Any:
        entered.append(what)
        yield

    def from_external(stream: Any) -> Any:
        return entering("stream", *stream.__cuda_stream__())

    cuda = SimpleNamespace(
        Device=partial(entering, "device"),
        Stream=SimpleNamespace(from_external=from_external),  # CuPy 14 warns of ExternalStream
        UnownedMemory=lambda *_: None,
        MemoryPointer=lambda *_: None,
    )
    fake = SimpleNamespace(cuda=cuda, ndarray=lambda shape, memptr: np.zeros(shape), from_dlpack=np.from_dlpack)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=40 + device.index))
    with buckets.cupy_engine(torch.device("cuda", 2))[3]():
        assert entered == [("device", 2), ("stream", 0, 42)]


def test_cupy_engine_needs_a_gpu() -> None:
    (p,) = parameters([torch.zeros(2, 2)])
    with pytest.raises(ValueError, match="Invalid engine: 'numpy'"):
        pt.AGD([p], engine="numpy")
    with pytest.raises(ValueError, match="`compile` needs engine='torch'"):
        pt.AGD([p], engine="cupy", compile=True)
    try:
        import cupy

        usable = cupy.is_available()
    except ImportError:
        usable = False
    expected = (ValueError, "needs parameters on a CUDA device") if usable else (RuntimeError, "needs CuPy|finds none")
    with pytest.raises(expected[0], match=expected[1]):
        pt.AGD([p], engine="cupy")


# ---- the example ----------------------------------------------------------------------------------------------------


def test_example_learns_the_digits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("PRECOND_REF_DATA", raising=False)
    path = Path(__file__).resolve().parents[1] / "examples" / "torch_mnist.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    runpy.run_path(str(path), run_name="__main__")
    *table, last = capsys.readouterr().out.splitlines()
    assert table[0].startswith("group")
    # an untrained network is right on a tenth of the images
    assert float(last.rpartition(" ")[2].rstrip("%")) > 90


# ---- bad input ------------------------------------------------------------------------------------------------------


def weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(3, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
        ({"lr": float("inf")}, ValueError, "Invalid learning rate: inf"),
        ({"lr": torch.tensor([0.1, 0.2])}, ValueError, "Tensor lr must be 1-element"),
        ({"weight_decay": -0.1}, ValueError, "Invalid weight_decay value: -0.1"),
        ({"beta1": 1.0}, ValueError, r"Invalid beta parameter at index 0: 1.0 \(beta1 must be finite"),
        ({"beta2": -0.5}, ValueError, "Invalid beta parameter at index 1: -0.5"),
        ({"eps": -1.0}, ValueError, "Invalid epsilon value: -1.0"),
        ({"eps": "small"}, TypeError, "Invalid epsilon value: small"),
        ({"every": 0}, ValueError, "Invalid every value: 0"),
        ({"side": "up"}, ValueError, "Invalid side value: up"),
        ({"maximize": 1}, TypeError, "Invalid maximize value: 1"),
        ({"compile": 1}, TypeError, "Invalid compile value: 1"),
        ({"fallback": "Adam"}, TypeError, "fallback must be a precond_ref.Method or None"),
        ({"betas": (0.9, 0.99)}, TypeError, "unexpected keyword argument 'betas'"),
        ({"heads": 2}, ValueError, "heads must divide the rows"),
    ],
)
def test_bad_hyperparameter(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pt.ASGO([weight()], **arguments)
    if not {"betas"} & arguments.keys():
        opt = pt.ASGO([weight()])
        with pytest.raises(error, match=message):
            opt.add_param_group({"params": [weight()], **arguments})
        assert len(opt.param_groups) == 1


def test_bad_parameters() -> None:
    p = weight()
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        pt.ASGO([])
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
        pt.ASGO(p)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        pt.ASGO([{"params": [p]}, {"params": [p]}])
    with pytest.raises(UserWarning, match="duplicate parameters"):  # PyTorch's warning, an error in these tests
        pt.ASGO([p, p])
    with pytest.raises(TypeError, match="ASGO does not support complex parameters"):
        pt.ASGO([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])
    with pytest.raises(TypeError, match="ASGO only supports floating-point parameters, got one of dtype torch.int64"):
        pt.ASGO([nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)])
    with pytest.raises(TypeError, match="optimizer can only optimize Tensors"):
        pt.ASGO([1.0])
    with pytest.raises(TypeError, match="param_group must be a dict"):
        pt.ASGO([p]).add_param_group([p])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="method must be a precond_ref.Method"):
        pt.Optimizer([p], "ASGO")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no method is called Adamm"):
        pt.ASGO([{"params": [p], "method": "Adamm"}])
    with pytest.raises(ValueError, match="weight_decay must be the method's, 0.25, or not be given, got 0.5"):
        pt.Optimizer([p], Decayed(weight_decay=0.25), weight_decay=0.5)


@every_method
def test_sparse_gradient_is_refused(name: str) -> None:
    (p,) = params = parameters([torch.ones(ONE_EACH[name].shape)])
    opt = make(name, params)
    p.grad = torch.ones_like(p).to_sparse()
    with pytest.raises(RuntimeError, match=f"{name} does not support sparse gradients"):
        opt.step()


LOADS = {
    "not a state dict": (lambda d: {"model": 1}, "must have state and param_groups, it has model"),
    "another optimizer's": (
        lambda d: torch.optim.AdamW([weight()]).state_dict(),
        "is of another optimizer, this group runs ASGO",
    ),
    "another method's": (lambda d: pt.AGD([weight()]).state_dict(), "is of AGD, this group runs ASGO"),
    "more groups": (lambda d: d["param_groups"].append(d["param_groups"][0]), "different number of parameter groups"),
    "more parameters": (lambda d: d["param_groups"][0]["params"].append(1), "doesn't match the size"),
    "another version": (
        lambda d: d["param_groups"][0].pop("root_steps"),
        "another version of ASGO: it lacks root_steps",
    ),
    "bad field": (lambda d: d["param_groups"][0].update(beta1=2.0), "Invalid beta parameter at index 0: 2.0"),
    "other state": (lambda d: d["state"][0].pop("gram"), "has step, m for parameter 0, ASGO keeps step, m, gram"),
    "shape": (lambda d: d["state"][0].update(m=torch.ones(2, 3)), r"m of shape \[2, 3\].*it must have shape \[3, 2\]"),
    "dtype": (lambda d: d["state"][0].update(m=torch.ones(3, 2).double()), "dtype torch.float64 for parameter 0"),
    "no step": (lambda d: d["state"][0].pop("step"), "no valid step for parameter 0, got None"),
    "bad step": (lambda d: d["state"][0].update(step=torch.tensor(1.5)), "no valid step for parameter 0"),
    "homeless state": (lambda d: d["state"].update({7: {}}), "has a state of 7, which is in no group"),
}


@pytest.mark.parametrize(("change", "message"), LOADS.values(), ids=LOADS)
def test_bad_checkpoint(change: Any, message: str) -> None:
    (p,) = params = [weight()]
    opt = pt.ASGO(params)
    feed(opt, params, [[torch.ones(3, 2)]])
    before = through_file(opt.state_dict())
    given = through_file(opt.state_dict())
    given = (
        given if not isinstance(result := change(given), dict) or "param_groups" not in (*result, "model") else result
    )
    if isinstance(result, dict) and ("model" in result or "param_groups" in result):
        given = result
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(given)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][0][k], v) for k, v in before["state"][0].items())
    feed(opt, params, [[torch.ones(3, 2)]])
    assert int(opt.state[p]["step"]) == 2


def test_distributed_checkpoint_functions() -> None:
    """The names and values that torch.distributed.checkpoint collects and gives back."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, again = small_model(), small_model()
    start = [p.detach() for p in model.parameters()]
    _, grads = recorded([tuple(p.shape) for p in start], 5)
    one = pt.Shampoo(model.parameters(), lr=0.125, eps=0.25, every=2)
    two = pt.Shampoo(again.parameters(), lr=0.125, eps=0.25, every=2)
    feed(one, list(model.parameters()), grads[:3])
    again.load_state_dict(model.state_dict())
    saved = get_optimizer_state_dict(model, one)
    kept = [f"roots.{i}.{name}" for i in (0, 1) for name in ("basis", "eigenvalues")]
    assert list(saved["state"]["0.weight"]) == ["step", "grams.0", "grams.1", *kept]
    set_optimizer_state_dict(again, two, saved)
    feed(one, list(model.parameters()), grads[3:])
    feed(two, list(again.parameters()), grads[3:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_old_step_formats_are_read() -> None:
    """A counter of another dtype or device layout, as other tools write it, is the same number."""
    start, grads = recorded([(3, 2)], 2)
    params = parameters(start)
    opt = pt.ASGO(params)
    feed(opt, params, grads)
    saved = opt.state_dict()
    saved["state"][0]["step"] = torch.tensor([2.0])
    opt.load_state_dict(saved)
    assert opt.state[params[0]]["step"].dtype == torch.int64
    assert int(opt.state[params[0]]["step"]) == 2


@pytest.mark.parametrize("method", [pr.AGD(), pr.Shampoo()], ids=["flat", "stacked"])
def test_channels_last(method: pr.Method) -> None:
    """A stack of such arrays has another layout than its shape says."""
    start, grads = recorded([(4, 3, 2, 2)] * 2, 3)
    last = torch.channels_last
    params = [torch.nn.Parameter(x.to(memory_format=last, copy=True)) for x in start]
    feed(pt.Optimizer(params, method, lr=0.125), params, [[g.to(memory_format=last) for g in row] for row in grads])
    assert distance(params, by_core(method, start, grads, 0.125)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_autograd_sees_the_step(dtype: torch.dtype, transposed: bool) -> None:
    """A graph from before a step, which would give gradients of the new values, is refused as with PyTorch's own."""
    value = torch.ones(3, 2, dtype=dtype)
    param = torch.nn.Parameter(value.T if transposed else value)
    x = torch.ones_like(param, requires_grad=True)
    loss = (param * x).sum()
    param.grad = torch.ones_like(param)
    pt.SGD([param], lr=0.5).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
