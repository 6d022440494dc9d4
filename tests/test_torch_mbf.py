"""The PyTorch adapter on joined weights and biases, per-sample statistics and batch sizes: against the core."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch_adapter_cases import distance, feed, parameters, recorded, through_file

import precond_ref as pr
import precond_ref_torch as pt
from precond_ref_torch import buckets, routing
from precond_ref_torch import statistics as collecting

torch.set_num_threads(1)
LOUD = {"damping": 0.5, "decay": 0.75, "momentum": 0.5}


class Net(nn.Module):
    """A convolution, a norm, three Linear of which two are alike, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 2, stride=2, padding=1)
        self.norm = nn.LayerNorm(27)
        self.a, self.b = nn.Linear(27, 5), nn.Linear(5, 5)
        self.c, self.d = nn.Linear(5, 5), nn.Linear(5, 4, bias=False)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.tanh(self.conv(x)).flatten(1))
        return self.d(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))))


JOIN = tuple((f"{name}.weight", f"{name}.bias") for name in "abc")
METHODS = {
    "per_output": pr.MBF(**LOUD),
    "blocks": pr.MBF(average=False, **LOUD),
    "per_input": pr.MBF(layout="per_input", **LOUD),
    "contiguous": pr.MBF(layout="contiguous", statistics_every=2, inverse_every=3, **LOUD),
}


def batch(seed: int = 0, n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, 2, 4, 4, generator=generator, dtype=torch.float64),
        torch.randint(4, (n,), generator=generator),
    )


def loss_of(model: Any, x: torch.Tensor, y: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    return nn.functional.cross_entropy(model(x), y, reduction=reduction)


def brute_force(model: nn.Module, x: torch.Tensor, y: torch.Tensor, method: pr.MBF) -> dict[str, Any]:
    """Each sample's gradient by a backward pass of its own, as the core takes them."""
    names, params = zip(*model.named_parameters(), strict=True)
    rows = [torch.autograd.grad(loss_of(model, x[i : i + 1], y[i : i + 1]), params) for i in range(len(x))]
    grads = {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    pairs = dict(JOIN)
    result = {}
    for name, g in grads.items():
        if name in pairs:
            g = torch.cat([g, grads[pairs[name]][..., None]], -1)
        if g.ndim in (3, 5):
            result[name] = method.Samples(g)
    return result


def by_core(method: pr.MBF, steps: int, per_sample: bool, lr: float, decay: float) -> list[torch.Tensor]:
    """What `precond_ref.Optimizer` makes of the model, its gradients by autograd."""
    model = Net()
    opt = pr.Optimizer(method, lr=lr, weight_decay=decay, join=JOIN, fuse=False)
    state = opt.init(dict(model.named_parameters()))
    for step in range(steps):
        x, y = batch(step)
        values = dict(model.named_parameters())
        grads = torch.autograd.grad(loss_of(model, x, y), list(values.values()))
        statistics = brute_force(model, x, y, method) if per_sample else None
        plain = {name: p.detach() for name, p in values.items()}
        new, state = opt.step(plain, dict(zip(values, grads, strict=True)), state, statistics=statistics)
        with torch.no_grad():
            for name, p in values.items():
                p.copy_(new[name])
    return [p.detach() for p in model.parameters()]


def make(model: nn.Module, method: pr.MBF, **options: Any) -> Any:
    return pt.Optimizer(pt.param_groups_for(model, method="MBF"), method, **{"lr": 0.125, **options})


# ---- checks and their mutants ---------------------------------------------------------------------------------------


def check_joined(method: pr.MBF = METHODS["contiguous"], **options: Any) -> None:
    """A model trained with joined weights and biases is the core's, with decay."""
    model = Net()
    opt = make(model, method, weight_decay=0.25, **options)
    for step in range(8):
        opt.zero_grad()
        loss_of(model, *batch(step)).backward()
        opt.step()
    assert distance(list(model.parameters()), by_core(method, 8, False, 0.125, 0.25)) <= 1e-11


def check_per_sample(method: pr.MBF = METHODS["per_output"], micro: int = 1, **options: Any) -> None:
    """With the gradient of every sample on its own, the core does what the hooks do."""
    model = Net()
    opt = make(model, method, **options)
    with pt.PerSampleStatistics(model, opt) as statistics:
        for step in range(4):
            opt.zero_grad()
            for x, y in zip(*(part.chunk(micro) for part in batch(step)), strict=True):
                (loss_of(model, x, y) / micro).backward()
            opt.step(statistics=statistics.take())
    assert distance(list(model.parameters()), by_core(method, 4, True, 0.125, 0.0)) <= 1e-11


def check_take() -> None:
    """Sums instead of means, scaled losses, and sequences: the statistic itself, against each sample's gradient."""
    method = METHODS["blocks"]
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for shape in ((5, 3), (5, 6, 3)):
        x = torch.randn(shape, dtype=torch.float64)
        samples = []
        for sample in x:
            g = torch.autograd.grad(model(sample[None]).square().sum(), list(model.parameters()))
            samples.append([torch.cat([g[0], g[1][:, None]], 1), torch.cat([g[2], g[3][:, None]], 1)])
        expected = [torch.einsum("noi,noj->oij", g, g) / len(x) for g in map(torch.stack, zip(*samples, strict=True))]
        for reduction, factor in (("sum", 8.0), ("mean", 1.0)):
            opt = make(model, method)
            with pt.PerSampleStatistics(model, opt, reduction=reduction) as statistics:
                divisor = len(x) if reduction == "mean" else 1
                (factor * model(x).square().sum() / divisor).backward()
                taken = statistics.take(scale=factor)
                assert not statistics.take()
            found = [taken[p].statistic for p in (model[0].weight, model[2].weight)]
            assert distance(found, expected) <= 1e-13


def check_resume() -> None:
    """Saved, loaded and copied at any step: the same bits."""
    start, grads = recorded([(3, 2), (3,), (3, 2), (3,), (2, 2)], 6)
    names = ["a.w", "a.b", "c.w", "c.b", "d"]
    join = (("a.w", "a.b"), ("c.w", "c.b"))
    grads[1][2] = grads[1][3] = None

    def new(values: Any) -> tuple[Any, Any]:
        params = parameters(values)
        return params, pt.MBF(zip(names, params, strict=True), lr=0.125, join=join, inverse_every=2, **LOUD)

    params, opt = new(start)
    for step in range(len(grads)):
        saved = through_file(opt.state_dict())
        again, other = new([p.detach().clone() for p in params])
        other.load_state_dict(saved)
        twin, twin_opt = pickle.loads(pickle.dumps((params, opt))) if step % 2 else copy.deepcopy((params, opt))
        feed(opt, params, [grads[step]])
        feed(other, again, [grads[step]])
        feed(twin_opt, twin, [grads[step]])
        assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(params, twin, strict=True))
    assert opt.state[params[0]]["m"].shape == (3, 3)
    assert params[1] not in opt.state
    expected = pr.Optimizer(pr.MBF(inverse_every=2, **LOUD), lr=0.125, join=join)
    grads[1] = grads[0]
    params, opt = new(start)
    feed(opt, params, grads)
    values = dict(zip(names, start, strict=True))
    state = expected.init(values)
    for row in grads:
        values, state = expected.step(values, dict(zip(names, row, strict=True)), state)
    assert distance(params, [values[name] for name in names]) <= 1e-12


class Mutant(NamedTuple):
    """A mistake, and the check that must fail for it."""

    check: Callable[[], None]
    target: Any
    attribute: str
    value: Any


def _bias_first(parts: Any) -> Any:
    return parts[0] if len(parts) == 1 else torch.cat([parts[1][:, None], parts[0]], 1)


def _bias_lost(original: Any) -> Any:
    def parts(self: Any, directions: Any, *members: Any) -> Any:
        found = original(self, directions, *members)
        return [0 * d if d.ndim == 1 and len(self.all_params) > len(self) else d for d in found]

    return parts


def _pair_not_joined(modules: Any, found: Any) -> Any:
    return {}


def _batch_mean(original: Any) -> Any:
    """Signals of the mean loss, not of each sample's own."""

    def total(self: Any, module: Any, unit: Any, method: Any, seen: Any, scale: float) -> Any:
        return original(self, module, unit, method, seen, scale * sum(len(x) for x, _ in seen))

    return total


def _without_the_one(original: Any) -> Any:
    def total(self: Any, module: Any, unit: Any, method: Any, seen: Any, scale: float) -> Any:
        if len(unit) == 2 and seen[0][0].ndim == 2:
            seen = [(torch.cat([x, 0 * x[:, :1]], 1), d) for x, d in seen]
            method_blocks = method.blocks
            total = sum(len(x) * method_blocks(pr.MBF.Factors(x, d * len(x))).statistic for x, d in seen)
            return total, torch.tensor(float(sum(len(x) for x, _ in seen)))
        return original(self, module, unit, method, seen, scale)

    return total


def _positions_summed(original: Any) -> Any:
    """Each position of a sequence taken for a sample."""

    def total(self: Any, module: Any, unit: Any, method: Any, seen: Any, scale: float) -> Any:
        if isinstance(module, nn.Linear):
            seen = [(x.flatten(0, -2), d.flatten(0, -2)) for x, d in seen]
        return original(self, module, unit, method, seen, scale)

    return total


def _last_pass_only(original: Any) -> Any:
    def total(self: Any, module: Any, unit: Any, method: Any, seen: Any, scale: float) -> Any:
        return original(self, module, unit, method, seen[-1:], scale)

    return total


TOTAL = collecting.PerSampleStatistics._total
MUTANTS = {
    "bias as first column": Mutant(check_joined, buckets, "joined", _bias_first),
    "bias not updated": Mutant(check_joined, buckets.Bucket, "parts", _bias_lost(buckets.Bucket.parts)),
    "bias not joined": Mutant(check_joined, routing, "_pairs", _pair_not_joined),
    "statistics ignored": Mutant(check_per_sample, buckets.Bucket, "statistic", lambda self, given: None),
    "signals of the mean loss": Mutant(check_per_sample, collecting.PerSampleStatistics, "_total", _batch_mean(TOTAL)),
    "input of the bias 0": Mutant(check_per_sample, collecting.PerSampleStatistics, "_total", _without_the_one(TOTAL)),
    "positions as samples": Mutant(check_take, collecting.PerSampleStatistics, "_total", _positions_summed(TOTAL)),
    "last micro-batch only": Mutant(
        lambda: check_per_sample(micro=3), collecting.PerSampleStatistics, "_total", _last_pass_only(TOTAL)
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_joined_training_is_the_core_s(name: str) -> None:
    check_joined(METHODS[name])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("micro", [1, 3])
def test_per_sample_statistics_are_the_core_s(name: str, micro: int) -> None:
    check_per_sample(METHODS[name], micro)


@pytest.mark.full
def test_compiled() -> None:
    torch._dynamo.reset()
    check_per_sample(METHODS["per_output"], compile="eager")


def test_take() -> None:
    check_take()


def test_resume() -> None:
    check_resume()


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_check_catches(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutant.target, mutant.attribute, mutant.value)
    with pytest.raises(AssertionError):
        mutant.check()


# ---- routing --------------------------------------------------------------------------------------------------------


def test_groups_and_table() -> None:
    opt = make(Net(), METHODS["per_output"])
    table = [line.split("  ") for line in opt.describe().partition("\n\n")[0].splitlines()]
    rows = {
        cells[2]: [cell for cell in cells if cell] for cells in ([c.strip() for c in r if c.strip()] for r in table)
    }
    assert rows["a.weight + bias"][3] == "5 x 28"
    assert rows["c.weight + bias"][1] == "matrix"
    assert rows["d.weight"][3] == "4 x 5"
    assert rows["conv.weight"][1] == "convolution"
    assert {row[5] for name, row in rows.items() if name != "parameter"} == {"MBF"}
    kinds = {name: method.kind for group in opt.param_groups for name, _, method in opt._routed(group)}
    assert kinds["conv.weight"] == "conv"
    assert {kinds[name] for name in ("conv.bias", "norm.weight", "norm.bias")} == {"diagonal"}
    assert "a.bias" not in kinds


def test_join_is_for_every_method() -> None:
    groups = pt.param_groups_for(Net(), join=True, head={"lr": 0.5})
    assert [group["role"] for group in groups] == ["matrix", "convolution", "head", "norm", "bias"]
    assert groups[0]["join"] == JOIN
    assert "join" not in groups[2]
    start, grads = recorded([(3, 2), (3,)], 5)
    for method in (pr.Shampoo(eps=0.25), pr.IFShampoo(beta2=0.25, weight_decay=0.125), pr.Adam(eps=0.25)):
        params = parameters(start)
        opt = pt.Optimizer([("w", params[0]), ("b", params[1])], method, lr=0.125, join=[("w", "b")])
        feed(opt, params, grads)
        values, core = torch.cat([start[0], start[1][:, None]], 1), method.init(torch.zeros(3, 3, dtype=torch.float64))
        for w, b in grads:
            direction, core = method.update(torch.cat([w, b[:, None]], 1), core, values)
            values = values - 0.125 * direction
        assert distance([torch.cat([params[0], params[1][:, None]], 1)], [values]) <= 1e-13
        assert (params[1] in opt.state) == method.elementwise


def test_shared_and_frozen_parameters_are_not_joined() -> None:
    model = nn.ModuleDict({"e": nn.Embedding(4, 3), "a": nn.Linear(3, 4), "b": nn.Linear(3, 4), "c": nn.Linear(3, 3)})
    model["a"].weight = model["e"].weight
    model["c"].weight.requires_grad_(False)
    groups = {group["role"]: group for group in pt.param_groups_for(model, method="MBF")}
    assert groups["matrix"]["join"] == (("b.weight", "b.bias"),)
    assert [name for name, _ in groups["bias"]["params"]] == ["a.bias", "c.bias"]
    assert groups["bias"]["method"] == pr.MBF(kind="diagonal")
    assert groups["embedding"]["method"] == pr.Adam()


def named(*shapes: tuple[int, ...]) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.zeros(shape))) for name, shape in zip("wbv", shapes, strict=False)]


def test_bad_joins_are_refused() -> None:
    for join in ("wb", [("w",)], [("w", "w")], [("w", "b"), ("v", "b")], [(1, 2)], 3):
        with pytest.raises(ValueError, match="join must be pairs of names"):
            pt.MBF(named((3, 2), (3,)), join=join)
    with pytest.raises(ValueError, match=r"join names \(w, nope\)|join names nope"):
        pt.MBF(named((3, 2), (3,)), join=[("w", "nope")])
    with pytest.raises(ValueError, match=r"join names \(x, y\), which are no named parameters"):
        pt.MBF(named((3, 2), (3,)), join=[("x", "y")])
    with pytest.raises(ValueError, match=r"got w \[3, 2\] and b \[2\]"):
        pt.MBF(named((3, 2), (2,)), join=[("w", "b")])
    w, b, v = named((3, 2), (3,), (3, 2))
    with pytest.raises(ValueError, match="join names b, which this group has no parameter of"):
        pt.MBF([{"params": [w]}, {"params": [b]}], join=[("w", "b")])
    with pytest.raises(TypeError, match="one dtype, device and mesh"):
        pt.MBF([w, ("b", nn.Parameter(b[1].double()))], join=[("w", "b")])
    with pytest.raises(ValueError, match="method must be 'MBF' or None"):
        pt.param_groups_for(Net(), method="KFAC")
    opt = pt.MBF([w, b], join=[("w", "b")])
    opt.add_param_group({"params": [v]})
    w[1].grad = torch.ones(3, 2)
    with pytest.raises(RuntimeError, match="w is joined with its bias: both need a gradient"):
        opt.step()


def test_pairs_need_names_of_their_own() -> None:
    twice = [*named((3, 2), (3,)), *named((3, 2), (3,))]
    with pytest.raises(ValueError, match="join names w and b, which more than one parameter of this group is called"):
        pt.MBF(twice, join=[("w", "b")])


def test_a_checkpoint_that_joins_otherwise_is_refused() -> None:
    params = named((3, 2), (3,))
    joined, apart = pt.MBF(params, join=[("w", "b")]), pt.MBF(params)
    for _, p in params:
        p.grad = torch.ones_like(p)
    joined.step()
    with pytest.raises(ValueError, match=r"joins \(w, b\), this group joins nothing"):
        apart.load_state_dict(joined.state_dict())
    other = pt.MBF([(f"module.{name}", p) for name, p in params], join=[("module.w", "module.b")])
    other.load_state_dict(joined.state_dict())  # positions count, not names
    saved = joined.state_dict()
    saved["state"][1] = saved["state"][0]
    with pytest.raises(ValueError, match="parameter 1, which is joined to its weight"):
        joined.load_state_dict(saved)


# ---- statistics and batch sizes given to step -----------------------------------------------------------------------


def test_statistics_of_other_methods_and_bad_ones() -> None:
    start, grads = recorded([(3, 2)] * 2, 4)
    for method in (pr.RFShampoo(beta2=0.25), pr.IFShampoo(beta2=0.25), pr.RFRMSProp(beta2=0.25)):
        params = parameters(start)
        opt = pt.Optimizer(params, method, lr=0.125)
        expected = []
        for p, x in zip(params, start, strict=True):
            p.grad = x.sin()
        given = {p: torch.stack([row[i] for row in grads]) for i, p in enumerate(params)}
        opt.step(lambda: None, statistics=lambda given=given: given)
        for p, x in zip(params, start, strict=True):
            direction, _ = method.update(x.sin(), method.init(x), x, statistic=given[p])
            expected.append(x - 0.125 * direction)
        assert distance(params, expected) <= 1e-13
        before = [p.detach().clone() for p in params]
        with pytest.raises(ValueError, match="must be of one type for all parameters of size"):
            opt.step(statistics={params[0]: given[params[0]]})
        with pytest.raises(ValueError, match=r"no parameter with a gradient.*size \[7\]"):
            opt.step(statistics={torch.zeros(7): given[params[0]]})
        assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


BAD_STATISTICS = {
    "shape": (lambda x: pr.MBF.Samples(x[:, :, :-1]), ValueError, r"size \[4, 2\], updated by MBF: .* got \(5, 4, 1\)"),
    "no samples": (lambda x: pr.MBF.Samples(x[:0]), ValueError, r"got \(0, 4, 2\)"),
    "a tensor": (lambda x: x, TypeError, "an MBF.Samples, MBF.Factors or MBF.Blocks, got Tensor"),
    "None": (lambda x: None, TypeError, "must be a real tensor .* got NoneType"),
    "complex": (lambda x: pr.MBF.Samples(x + 0j), TypeError, "must be a real tensor"),
}


@pytest.mark.parametrize("case", BAD_STATISTICS.values(), ids=BAD_STATISTICS)
def test_a_refused_statistic_changes_nothing(case: Any) -> None:
    """Also not the parameters that are updated before the one it is for."""
    make_bad, error, match = case
    params = parameters(recorded([(3, 2), (4, 2), (3,)], 0)[0])
    opt = pt.MBF(params, lr=0.125)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    before = [p.detach().clone() for p in params], copy.deepcopy(opt.state_dict())
    with pytest.raises(error, match=match):
        opt.step(statistics={params[1]: make_bad(torch.ones(5, 4, 2, dtype=torch.float64))})
    assert all(torch.equal(a, b) for a, b in zip(before[0], params, strict=True))
    after = opt.state_dict()
    assert after["param_groups"] == before[1]["param_groups"]
    for key, entry in before[1]["state"].items():
        assert all(torch.equal(value, after["state"][key][name]) for name, value in entry.items())


def test_statistics_are_checked_by_parameter() -> None:
    params = parameters(recorded([(3, 2), (2, 3), (4, 2)], 0)[0])
    for p in params:
        p.grad = torch.ones_like(p)
    samples = {p: torch.ones(5, *p.shape, dtype=torch.float64) for p in params}
    opt = pt.RFRMSProp(params)
    with pytest.raises(ValueError, match=r"size \[3, 2\], updated by RFRMSProp: .* got \(5, 2, 3\)"):
        opt.step(statistics={**samples, params[0]: samples[params[1]]})  # as many entries
    with pytest.raises(ValueError, match="one number of samples, got 4 and 5"):
        opt.step(statistics={**samples, params[0]: samples[params[0]][:4]})
    with pytest.raises(TypeError, match=r"array of shape \(q, \*param.shape\), got tuple"):
        opt.step(statistics={**samples, params[0]: (samples[params[0]],)})
    with pytest.raises(ValueError, match="updated by ASGO: statistic must not be given for ASGO, which takes none"):
        pt.ASGO(params).step(statistics=samples)
    with pytest.raises(TypeError, match="statistics must be a mapping from parameters.* got MBFSamples"):
        opt.step(statistics=pr.MBF.Samples(samples[params[0]]))
    with pytest.raises(ValueError, match="no parameter with a gradient.*one is 'w'"):
        opt.step(statistics={**samples, "w": 1})
    with pytest.raises(ValueError, match="updated by RFRMSProp"):
        opt.step(statistics={params[0]: samples[params[1]]}, batch_size=7)
    assert opt.param_groups[0]["batch_size"] == 1


def test_batch_size_of_a_step() -> None:
    start, grads = recorded([(3, 2), (3,)], 3)
    method, fallback = pr.IFShampoo(beta2=0.25), pr.RFAdamW(beta2=0.5)
    params = parameters(start)
    opt = pt.Optimizer(params, method, lr=0.125, fallback=fallback)
    states = [method.init(start[0]), fallback.init(start[1])]
    values = list(start)
    for size, row in zip((8, 8, 3), grads, strict=True):
        for p, g in zip(params, row, strict=True):
            p.grad = g
        opt.step(batch_size=size)
        for i, m in enumerate((method, fallback)):
            direction, states[i] = m.replace(batch_size=size).update(row[i], states[i], values[i])
            values[i] = values[i] - 0.125 * direction
    assert distance(params, values) <= 1e-13
    assert opt.param_groups[0]["batch_size"] == 3
    with pytest.raises(ValueError, match="Invalid batch_size value: 0"):
        opt.step(batch_size=0)
    with pytest.raises(ValueError, match="batch_size is no field"):
        pt.MBF(params).step(batch_size=3)


def test_a_collector_that_cannot_be_right_is_refused() -> None:
    model = Net()
    opt = make(model, METHODS["per_output"])
    with pytest.raises(ValueError, match="reduction must be"):
        pt.PerSampleStatistics(model, opt, reduction="none")
    with pytest.raises(ValueError, match="runs MBF on the weight of no Linear"):
        pt.PerSampleStatistics(Net(), opt)
    shared = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    shared[1].weight = shared[0].weight
    with pytest.raises(ValueError, match="0 and 1 share a weight"):
        pt.PerSampleStatistics(shared, make(shared, METHODS["per_output"]))
    x, y = batch()
    with pt.PerSampleStatistics(model, opt) as statistics:
        with torch.no_grad():
            model(x)
        loss_of(model, x, y).backward()
        assert len(statistics.take()) == 5
        first = loss_of(model, x, y)
        with pytest.raises(RuntimeError, match="ran 2 times before one backward pass"):
            (first + loss_of(model, x, y)).backward()
        statistics.take()
    loss_of(model, x, y).backward()
    assert not statistics.take()
    layer = nn.Sequential(nn.Linear(3, 2))
    with (
        pt.PerSampleStatistics(layer, make(layer, METHODS["per_output"])),
        pytest.raises(ValueError, match="first axis counts the samples"),
    ):
        layer(torch.ones(3)).sum().backward()


class ByKeyword(nn.Module):
    """A linear layer called by keyword, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.b(input=self.a(input=x).tanh())
        return result


def test_layers_called_by_keyword_and_frozen_ones() -> None:
    model, x = ByKeyword(), torch.ones(5, 3)
    opt = make(model, METHODS["per_output"])
    with pt.PerSampleStatistics(model, opt) as statistics:
        model(x).square().mean().backward()
        assert set(statistics.take()) == {model.a.weight, model.b.weight}
        opt.zero_grad()
        model.b.requires_grad_(False)
        model(x).square().mean().backward()
        taken = statistics.take()
        assert set(taken) == {model.a.weight}
        opt.step(statistics=taken)


def test_layers_that_no_process_has_run_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)
    model = ByKeyword()
    with pt.PerSampleStatistics(model, make(model, METHODS["per_output"]), process_group=0) as statistics:
        model.b(torch.ones(5, 4)).sum().backward()
        assert set(statistics.take()) == {model.b.weight}


def test_an_input_overwritten_before_take_is_noticed() -> None:
    model, x = ByKeyword(), torch.ones(5, 3)
    with pt.PerSampleStatistics(model, make(model, METHODS["per_output"])) as statistics:
        model(x).sum().backward()
        x.zero_()
        with pytest.raises(RuntimeError, match=r"the input of a was overwritten after its forward pass, before take"):
            statistics.take()
        model(x).sum().backward()
        assert len(statistics.take()) == 2


def test_bad_arguments_of_the_collector() -> None:
    model = ByKeyword()
    with pytest.raises(TypeError, match="optimizer must be one of precond_ref_torch, got SGD"):
        pt.PerSampleStatistics(model, torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
    with pt.PerSampleStatistics(model, make(model, METHODS["per_output"])) as statistics:
        for scale in (0, -1.0, float("nan"), float("inf"), "2"):
            with pytest.raises(ValueError, match=f"scale must be finite and > 0, got {scale!r}"):
                statistics.take(scale=scale)  # type: ignore[arg-type]
