"""The cost model: the count against what PyTorch runs and keeps, and against formulas written by hand."""

from __future__ import annotations

import json
import math
import re
import tracemalloc
from collections import Counter
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import cost_formulas
import numpy as np
import pytest
import torch
from array_api_compat import array_namespace
from configs import CONFIGS, FIRST, Config
from helpers import leaves
from hypothesis import given
from hypothesis import strategies as st
from mutation import mutated
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import precond_ref as pr
import precond_ref_torch
from precond_ref import cost
from precond_ref.cost import counting, movement, report
from precond_ref.cost.shapes import PRESETS, read
from precond_ref.numerics import roots, template
from precond_ref.numerics.refresh import renew
from precond_ref.numerics.template import eye, zeros
from precond_ref.protocol import Method
from precond_ref_torch import states

SHAPES: dict[int, list[tuple[int, ...]]] = {
    0: [()],
    1: [(1,), (2,), (7,)],
    2: [(1, 1), (1, 4), (4, 1), (5, 3), (3, 5), (4, 4), (6, 9), (12, 2)],
    3: [(1, 1, 1), (2, 3, 4), (4, 1, 3), (3, 5, 2)],
    4: [(2, 3, 3, 2), (1, 2, 1, 3), (4, 2, 3, 3), (3, 1, 4, 2)],
}


def shapes_of(method: Any) -> list[tuple[int, ...]]:
    """Shapes of every order that the method takes."""
    low, high = method.ndims
    shapes = [shape for ndim, its in SHAPES.items() if low <= ndim <= high for shape in its]
    return [shape for shape in shapes if fits(method, shape)]


def fits(method: Any, shape: tuple[int, ...]) -> bool:
    """Whether `heads`, `blocks` or `structure` do."""
    try:
        method.init(np.zeros(shape))
    except ValueError as error:
        assert any(field in str(error) for field in ("heads", "blocks", "structure"))  # noqa: PT017
        return False
    return True


def real_arrays(method: Any, shape: tuple[int, ...], dtype: Any = torch.float32, steps: int = 0) -> dict[str, Any]:
    """Name and shape of every array of a state, after some updates."""
    param = torch.full(shape, 0.5, dtype=dtype)
    state = method.init(param)
    for seed in range(steps):
        grad = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
        _, state = method.update(grad, state, param)
    return {name: tuple(array.shape) for name, array in states.to_dict(state).items()}


def stored(work: Any) -> dict[str, Any]:
    """Name and shape of every array of a state, from a count or a formula."""
    return {array.name: array.shape for array in work.stored}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_state_is_exact(config: Any) -> None:
    for shape in {config.shape, *shapes_of(config.method)}:
        assert stored(counting.count(config.method, shape)) == real_arrays(config.method, shape), shape
    assert stored(counting.count(config.method, config.shape)) == real_arrays(config.method, config.shape, steps=2)


@given(data=st.data())
def test_state_is_exact_on_any_shape(data: st.DataObject) -> None:
    config = data.draw(st.sampled_from(list(CONFIGS.values())))
    low, high = config.method.ndims
    sizes = st.lists(st.integers(0, 9), min_size=low, max_size=min(high, 5))
    shape = tuple(data.draw(sizes))
    try:
        state = config.method.init(np.zeros(shape))
    except ValueError:
        return  # `heads` or `structure` does not fit
    assert sum(map(math.prod, stored(counting.count(config.method, shape)).values())) == sum(
        a.size for a in leaves(state)
    )


class Recorder(TorchDispatchMode):
    """Kinds and sizes of the factorizations that run."""

    KINDS: ClassVar = {
        "_linalg_eigh": "eigh",
        "_linalg_svd": "svd",
        "linalg_cholesky_ex": "cholesky",
        "_linalg_solve_ex": "solve",
        "linalg_qr": "qr",
    }

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[str, int, int], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.KINDS:
            *stack, m, n = args[name == "_linalg_solve_ex"].shape  # of a solve the right sides'
            key = (self.KINDS[name], m, n)
            self.seen[key] = self.seen.get(key, 0) + math.prod(stack)
        return func(*args, **(kwargs or {}))


def measured(method: Any, shape: tuple[int, ...], due: Any) -> tuple[int, dict[tuple[str, int, int], int]]:
    """Flops of the products and the factorizations of one update, as PyTorch counts and runs them."""
    param = torch.full(shape, 0.5, dtype=torch.float64)
    grad = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = method.init(param)
    for seed in range(48 * (not {"factors", "bases"}.isdisjoint(state._fields))):  # until statistics have full rank
        _, state = method.update(
            torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), state, param
        )
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as flops, Recorder() as recorder:
        patch.setattr(roots, "_by_matrix", lambda *given: False)  # as on a device
        method.update(grad, state, param, refresh=due, xp=array_namespace(param))
    return flops.get_total_flops(), recorder.seen


def counted(method: Any, shape: tuple[int, ...], due: Any) -> Any:
    """The same, counted."""
    flops, sizes = 0, {}
    for each, times in counting.count_one(method, shape, due)[0].items():
        if each.kind == "product":
            flops += times * each.flops
        else:
            sizes[each.kind, each.m, each.n] = sizes.get((each.kind, each.m, each.n), 0) + times * each.batch
    return flops, sizes


@pytest.mark.parametrize(
    "config", [pytest.param(c, id=n, marks=() if n in FIRST else pytest.mark.deep) for n, c in CONFIGS.items()]
)
@pytest.mark.full
def test_products_and_factorizations_are_those_that_run(config: Any) -> None:
    for shape in {config.shape, *shapes_of(config.method)}:
        for due, _ in counting.schedule(config.method.periods):
            assert counted(config.method, shape, due) == measured(config.method, shape, due), (shape, due)


# ---- formulas -------------------------------------------------------------------------------------------------------

CASES = {
    **{name: config for name, config in CONFIGS.items() if type(config.method) in cost_formulas.work.registry},
    "MBF-statistic": Config(pr.MBF(statistics_every=2)),
    "MBF-common factor": Config(pr.MBF(statistics_every=6, inverse_every=4)),
    "ASGO-newton every": Config(pr.ASGO(every=4, root="coupled_newton", root_steps=3), (4, 6)),
}


def by_formula(work: Any) -> tuple[Any, Any]:
    """Arrays with the share of the updates that reads and writes them; number of each operation per update."""
    arrays = {a.name: (a.shape, Fraction(1) / a.read, Fraction(1, a.written)) for a in work.stored}
    done = Counter[Any]()
    for m in work.products:
        done["product", *sorted((m.m, m.n)), m.k] += Fraction(m.batch, m.every)
    for f in work.factorizations:
        done[f.kind, f.m, f.n, 0] += Fraction(f.batch, f.every)
    return arrays, {key: times for key, times in done.items() if times}


def by_count(work: Any) -> tuple[Any, Any]:
    """The same; (m, k) @ (k, n) and its transposed are one operation."""
    arrays = {a.name: (a.shape, a.read, a.written) for a in work.stored}
    done = Counter[Any]()
    for each, times in work.done.items():
        sizes = sorted((each.m, each.n)) if each.kind == "product" else (each.m, each.n)
        done[each.kind, *sizes, each.k] += times * each.batch
    return arrays, {key: times for key, times in done.items() if times}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_count_is_the_formula(case: Any) -> None:
    for shape in {case.shape, *shapes_of(case.method)}:
        assert by_count(counting.count(case.method, shape)) == by_formula(cost_formulas.work(case.method, shape)), shape


def answers(method: Any) -> dict[Any, Fraction]:
    """What `due` answers in the long run, with its share of the updates."""
    cycle = math.lcm(*(value for name, value in vars(method).items() if name.endswith("every")))
    found = Counter(method.due(step) for step in range(1000 * cycle, 1001 * cycle))
    return {due: Fraction(times, cycle) for due, times in found.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_periods_are_those_of_due(case: Any) -> None:
    assert dict(counting.schedule(case.method.periods)) == answers(case.method)


@pytest.mark.parametrize("wrong", [(3, 2), (2, 6), (2, 1)])
def test_wrong_periods_are_seen(wrong: tuple[int, int]) -> None:
    assert dict(counting.schedule(wrong)) != answers(pr.MBF(statistics_every=2, inverse_every=3))


# A formula, and the same with a mistake.
WRONG_FORMULAS = {
    "ASGO on the larger side": ("and m < n)\n    p, rest = (m // h", "and m >= n)\n    p, rest = (m // h"),
    "ASGO heads not counted": ("gram = (h, p, p) if", "gram = (p, p) if"),
    "ASGO root forgotten": ("stored.extend(kept)", "list(kept)"),
    "Polar Express with three products": ('"polar_express": 4', '"polar_express": 3'),
    "MBF block size": ("count, s = (d1, d2) if method", "count, s = (d2, d1) if method"),
    "MBF conv blocks": ("(*lead, s, s) if method.kind", "(s, s) if method.kind"),
    "MBF statistic read with (F) only": ("read=used", "read=t1"),
    "MBF inverse forgotten": ("    if t2 > 1:", "    if False:"),
    "Shampoo unfolded wrongly": ("        products = (Product(1, d, rest", "        products = (Product(1, d, d"),
    "RFShampoo without its inverses": ('            Stored(f"inverses.{n}", (d, d), written=every),  # (9)\n', ""),
    "RFShampoo whitens every axis": ("if j != n]", "]"),
    "axes of size 1 kept": ("tuple(d for d in shape if d != 1) or (1,)", "shape or (1,)"),
    "sketch wider than the axis": ("    k = min(d, size)\n    fields", "    k = size\n    fields"),
    "sketch without the old rows": ("rows = k + q", "rows = q"),
    "gram64 on the larger side": ("    if d > rows:", "    if d < rows:"),
}  # fmt: skip


@pytest.mark.parametrize("change", WRONG_FORMULAS.values(), ids=WRONG_FORMULAS)
def test_a_wrong_formula_is_seen(change: tuple[str, str]) -> None:
    wrong = mutated(cost_formulas, change).work
    cases = CASES.values()
    assert any(by_formula(wrong(c.method, c.shape)) != by_count(counting.count(c.method, c.shape)) for c in cases)


WRONG_COUNTS = {
    "a product not counted": ("right[-1], left[-1])] += 1", "right[-1], left[-1])] = 1"),
    "products of a stack counted once": ('Operation("product", math.prod(batch)', 'Operation("product", 1'),
    "a factorization counted twice": ("self.done[Operation(kind, math.prod(batch), m, n)] += 1",
                                      "self.done[Operation(kind, math.prod(batch), m, n)] += 2"),
    "a solution not counted": ("x.shape[-1], columns)] += 1", "x.shape[-1], columns)] += 0"),
    "a power counted as one product": ("n.bit_length() + n.bit_count() - 2", "1 * (n > 2)"),
    "every ignored": ("done.get(each, Fraction(0)) + times * share", "Fraction(times)"),
    "every ignored in what is written": ("known.written + share * written", "max(known.written, Fraction(written))"),
    "periods without their common multiple": ("math.lcm(*renewed, *others)", "math.prod((*renewed, *others))"),
    "an entry of a tuple forgotten": ("written in arrays:", "written in [a for a in arrays if '.1' not in a[0]]:"),
    "what is not finite is marked by a write": ("and shape == kept.shape:", "and False:"),
    "a condition on entries is true": ("        return False\n", "        return True\n"),
    "a kept array written": ("new is not old)", "True)"),
    "a view is another array": ("self if of is None else of.whole", "self"),
    "an array that is used after it is renewed": ("old.used or new.used", "old.used"),
}  # fmt: skip


@pytest.mark.parametrize("change", WRONG_COUNTS.values(), ids=WRONG_COUNTS)
def test_a_wrong_count_is_seen(change: tuple[str, str]) -> None:
    wrong = mutated(counting, change).count
    assert any(
        by_count(wrong(c.method, c.shape)) != by_formula(cost_formulas.work(c.method, c.shape)) for c in CASES.values()
    )


def test_factorizations_by_leading_terms() -> None:
    kinds = ("product", "eigh", "svd", "qr", "cholesky", "solve")
    assert {kind: counting.Operation(kind, 2, 6, 3, 5).flops for kind in kinds} == {
        "product": 360, "eigh": 486, "svd": 2 * (6 * 6 * 9 + 20 * 27),
        "qr": 2 * (4 * 6 * 9 - 36), "cholesky": 18, "solve": 720,
    }  # fmt: skip
    assert counting.Operation("qr", 1, 3, 6).flops == 2 * 9 * 6 + 18


# ---- arrays without entries, and a method of someone else -----------------------------------------------------------

EXPRESSIONS: dict[str, Any] = {
    "operators": lambda xp, x, y: -x[0, ...] + 2 * x / (3 - x) ** 2 - abs(x[..., :1]) % 3.0 // (x + 2),
    "comparisons": lambda xp, x, y: (x[:, :, None] < 1) & ~(x[0, :, :1] == 0) | (x[..., 0] != x[..., -1])[0, :, None],
    "slices": lambda xp, x, y: x[1:, ::2, -3:-1][..., None, :],
    "dots in the middle": lambda xp, x, y: x[0, ..., None, 2],
    "a NumPy number": lambda xp, x, y: np.float32(2) * x,
    "reshape": lambda xp, x, y: xp.reshape(x, (4, -1)),
    "flat": lambda xp, x, y: xp.reshape(x, (-1,)),
    "moveaxis": lambda xp, x, y: xp.moveaxis(x, 0, -1),
    "moveaxis back": lambda xp, x, y: xp.moveaxis(x, -1, 1),
    "permute_dims": lambda xp, x, y: xp.permute_dims(x, (2, 0, 1)),
    "expand_dims": lambda xp, x, y: xp.expand_dims(x, axis=-2),
    "squeeze": lambda xp, x, y: xp.squeeze(x[:1, ...], 0),
    "broadcast_to": lambda xp, x, y: xp.broadcast_to(x, (5, *x.shape)),
    "diagonal": lambda xp, x, y: xp.linalg.diagonal(x),
    "sum": lambda xp, x, y: xp.sum(x, axis=(0, -1)),
    "max": lambda xp, x, y: xp.max(x, axis=1, keepdims=True),
    "mean": lambda xp, x, y: xp.mean(x),
    "all": lambda xp, x, y: xp.all(x > 0, axis=-1),
    "trace": lambda xp, x, y: xp.linalg.trace(x),
    "vector_norm": lambda xp, x, y: xp.linalg.vector_norm(x, axis=0),
    "matrix_norm": lambda xp, x, y: xp.linalg.matrix_norm(x, keepdims=True),
    "where": lambda xp, x, y: xp.where(x[0, :1] > 0, x, 0.0),
    "maximum": lambda xp, x, y: xp.maximum(x, 1.0),
    "isfinite": lambda xp, x, y: xp.isfinite(x),
    "concat": lambda xp, x, y: xp.concat([x, x[:, :1]], axis=1),
    "stack": lambda xp, x, y: xp.stack([x, x], axis=-1),
    "take": lambda xp, x, y: xp.take(x, xp.argmax(x[0, 0, :, None] + x[0, :1], axis=1), axis=1),
    "argmin": lambda xp, x, y: xp.argmin(x, axis=0),
    "eye": lambda xp, x, y: xp.eye(3, dtype=x.dtype) + xp.zeros((2, 1, 1), dtype=x.dtype),
    "full": lambda xp, x, y: xp.full(3, 2.0, dtype=x.dtype) * xp.full_like(x[..., :1], 2.0),
    "astype": lambda xp, x, y: xp.astype(x > 0, xp.float64) + xp.astype(x, xp.float64),
    "matmul": lambda xp, x, y: y @ x,
    "a matrix and a vector": lambda xp, x, y: x @ x[0, 0, :],
    "a vector and a matrix": lambda xp, x, y: y[0, 0, :] @ x,
    "matrix_power": lambda xp, x, y: xp.linalg.matrix_power(y, 5),
    "eigh": lambda xp, x, y: xp.linalg.eigh(y).eigenvalues[..., None] * xp.linalg.eigh(y).eigenvectors,
    "left singular vectors": lambda xp, x, y: xp.linalg.svd(x, full_matrices=False)[0],
    "singular values": lambda xp, x, y: xp.linalg.svd(x, full_matrices=False).S,
    "right singular vectors": lambda xp, x, y: xp.linalg.svd(x, full_matrices=False).Vh,
    "qr": lambda xp, x, y: xp.linalg.qr(xp.matrix_transpose(x)).Q @ xp.linalg.qr(xp.matrix_transpose(x)).R,
    "cholesky": lambda xp, x, y: xp.linalg.cholesky(y),
    "solve": lambda xp, x, y: xp.linalg.solve(y, x),
    "inv": lambda xp, x, y: xp.linalg.inv(y),
}  # fmt: skip


def made(expression: Any, xp: Any, ones: Any, eyes: Any) -> Any:
    """Shape and dtype of the result."""
    result = expression(xp, ones, eyes)
    return result.shape, result.dtype.name


ONES, EYES = np.ones((2, 3, 4), "float32"), 2 * np.broadcast_to(np.eye(3, dtype="float32"), (2, 3, 3))
REAL = {name: made(expression, array_namespace(ONES), ONES, EYES) for name, expression in EXPRESSIONS.items()}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_shapes_are_those_of_numpy(name: str) -> None:
    xp = counting.Counting()
    assert made(EXPRESSIONS[name], xp, xp.zeros(ONES.shape), xp.zeros(EYES.shape)) == REAL[name]


WRONG_SHAPES = {
    "moveaxis": ("destination % len(shape), rest.pop", "source % len(shape), rest.pop"),
    "left singular vectors": ("((m, min(m, n)), (min(m, n),),", "((m, n), (min(m, n),),"),
    "argmin": ("DType.int64)\n", "DType.int32)\n"),
    "a vector and a matrix": ("(*batch, *left[-2:-1] * (x.ndim > 1)", "(*batch, *left[-2:-1]"),
    "take": ("(*x.shape[:at], *indices.shape, *x.shape[at + 1 :])", "(*indices.shape, *x.shape[at + 1 :])"),
    "concat": ("sum(x.shape[at] for x in arrays)", "len(arrays)"),
    "matrix_norm": ("_reduced(s, axis=(-2, -1), keepdims=keepdims)", "_reduced(s, axis=(-2, -1))"),
    "comparisons": ("self.xp.made(self, other, dtype=DType.bool)", "self.xp.made(self, other)"),
    "slices": ("len(range(*k.indices(next(sizes))))", "next(sizes)"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "change"), WRONG_SHAPES.items(), ids=WRONG_SHAPES)
def test_a_wrong_shape_is_seen(name: str, change: tuple[str, str]) -> None:
    xp = mutated(counting, change).Counting()
    assert made(EXPRESSIONS[name], xp, xp.zeros(ONES.shape), xp.zeros(EYES.shape)) != REAL[name]


class MineState(NamedTuple):
    """State of `Mine`."""

    step: Any
    m: Any
    pair: tuple[Any, ...]
    basis: Any


class Mine(Method):
    """A third party's method: bases by QR, renewed every few steps, and the count knows nothing of it."""

    every: int = 5

    state_type: ClassVar[Any] = MineState
    ndims: ClassVar[tuple[int, int]] = (2, 2)

    def state_of(self, shape: tuple[int, ...]) -> MineState:
        m, n = shape
        return MineState(0, zeros(m, n), (zeros(m, m), zeros(n, n)), eye(m, m))

    def step(self, grad: Any, state: MineState, param: Any, now: Any) -> tuple[Any, MineState]:
        xp = now.xp
        m = 0.9 * state.m + grad
        left = 0.9 * state.pair[0] + grad @ xp.matrix_transpose(grad)
        right = renew(now.due, lambda: 0.9 * state.pair[1] + xp.matrix_transpose(grad) @ grad, state.pair[1])
        basis = renew(now.due, lambda: xp.linalg.qr(left @ state.basis)[0], state.basis)
        return basis @ (xp.matrix_transpose(basis) @ m), MineState(now.step, m, (left, right), basis)


def test_a_method_of_someone_else_has_a_cost() -> None:
    fifth = Fraction(1, 5)
    work = counting.count(Mine(), (8, 6))
    assert by_count(work) == (
        {"m": ((8, 6), 1, 1), "pair.0": ((8, 8), 1, 1), "pair.1": ((6, 6), fifth, fifth), "basis": ((8, 8), 1, fifth)},
        {
            ("product", 8, 8, 6): 1,
            ("product", 6, 6, 8): fifth,
            ("product", 8, 8, 8): fifth,
            ("qr", 8, 8, 0): fifth,
            ("product", 6, 8, 8): 2,
        },
    )
    estimate = cost.estimate("", Mine(), {"w": (8, 6), "bias": (6,)})
    assert estimate.state_bytes == 4 * (48 + 64 + 36 + 64 + 2 * 6)
    flops = 2 * 8 * 8 * 6 * 3 + (2 * 6 * 6 * 8 + 2 * 8**3 + 8 * 8**3 / 3) / 5
    assert estimate.flops == pytest.approx(flops, rel=1e-15)


LACKS: dict[str, tuple[Any, str]] = {
    "a function": (lambda xp, g: xp.linalg.eigvalsh(g), "the count lacks the array function eigvalsh"),
    "an option": (lambda xp, g: xp.linalg.matrix_norm(g, ord="nuc"), "matrix_norm() got an unexpected keyword"),
    "a full decomposition": (lambda xp, g: xp.linalg.svd(g)[0], "svd with full_matrices=False only"),
    "a value": (lambda xp, g: g * float(g[0, 0]), "float() argument must be"),
    "an index array": (lambda xp, g: g[g > 0], "indices must be integers"),
    "a method of an array": (lambda xp, g: g.clone(), "no attribute 'clone'"),
}


@pytest.mark.parametrize(("wrong", "message"), LACKS.values(), ids=LACKS)
def test_what_the_count_lacks_is_named(wrong: Any, message: str) -> None:
    class Wrong(Mine):
        def step(self, grad: Any, state: MineState, param: Any, now: Any) -> tuple[Any, MineState]:
            return wrong(now.xp, grad), state

    with pytest.raises(ValueError, match="the step of Wrong cannot be counted: .*" + re.escape(message)):
        cost.estimate("", Wrong(), {"w": (3, 3)})


# ---- a whole model --------------------------------------------------------------------------------------------------

MODEL = {"embedding": (11, 6), "a.weight": (8, 6), "b.weight": (8, 6), "conv": (4, 2, 3, 3), "bias": (8,), "scale": ()}
ROUTED = [
    pr.ASGO(every=3),
    pr.MBF(),
    pr.SShampoo(size=3),
    pr.SShampoo.practical(size=3),
    pr.IFShampoo(narrow_state=True),
    pr.RFShampoo(),
    pr.AGD(amsgrad=True),
    pr.FullAdaGrad(),
]


@pytest.mark.parametrize("method", ROUTED, ids=lambda m: type(m).__name__)
def test_state_of_a_model_is_that_of_the_optimizer(method: Any) -> None:
    state = pr.Optimizer(method).init({name: np.zeros(shape, "float32") for name, shape in MODEL.items()})
    measured = sum(array.nbytes for array in leaves(state))
    assert cost.estimate("", method, MODEL).state_bytes == measured


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("method", ROUTED, ids=lambda m: type(m).__name__)
def test_state_of_a_model_is_that_of_the_adapter(method: Any, dtype: str) -> None:
    params = [(n, torch.nn.Parameter(torch.zeros(s, dtype=getattr(torch, dtype)))) for n, s in MODEL.items()]
    for _, param in params:
        param.grad = torch.ones_like(param)
    optimizer = precond_ref_torch.Optimizer(params, method, lr=0.0)
    if dtype == "bfloat16" and method.narrow_state:
        dtype_size = 2
    else:
        dtype_size = 8 if dtype == "float64" else 4
    optimizer.step()
    measured = sum(
        tensor.numel() * tensor.element_size()
        for entry in optimizer.state.values()
        for name, tensor in entry.items()
        if name != "step"
    )
    estimate = cost.estimate("", method, MODEL, dtype=dtype)
    assert estimate.state_bytes == measured
    assert measured % dtype_size == 0


def test_s_shampoo_of_rank_256_on_4096_by_1024() -> None:
    method = pr.SShampoo(size=257)  # the sketch has rank size - 1
    measured = sum(array.nbytes for array in leaves(method.init(np.zeros((4096, 1024), "float32"))))
    assert measured == 4 * ((4096 + 1024) * 257 + 2 * (257 + 1))
    assert cost.estimate("", method, {"w": (4096, 1024)}).state_bytes == measured
    assert measured < 4 * 4096 * 1024 / 3  # a third of the parameter; Adam keeps it twice


def test_nothing_is_allocated() -> None:
    tracemalloc.start()
    try:
        estimate = cost.estimate("", pr.Shampoo(every=10), PRESETS["llama-70b"](), mesh=64, dtype="bfloat16")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert estimate.state_bytes > 1e12
    assert peak < 1e7


def test_huge_parameters_are_counted() -> None:
    assert cost.estimate("", pr.SAdaGrad(size=3), {"w": (2**40,)}).state_bytes == 4 * (3 * 2**40 + 3 + 1)
    for method in (pr.Adam(), pr.Shampoo(every=10), pr.SShampoo(size=9), pr.MBF(), pr.Muon()):
        estimate = cost.estimate("", method, {"w": (2**20, 2**20)})
        assert estimate.state_bytes == 4 * sum(
            spec.size for _, spec in template.leaves(method.state_of((2**20, 2**20))[1:])
        )


def test_one_count_per_method_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(cost, "count", lambda *args: seen.append(args) or counting.count(*args))
    cost.estimate("", pr.ASGO(), PRESETS["gpt2-xl"](), mesh=4)
    assert len(seen) == len(set(seen)) == 9


PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama-7b": 6_738_415_616,
    "llama-70b": 68_976_648_192,
    "resnet50": 25_557_032,
}


def test_presets_have_the_published_number_of_parameters() -> None:
    assert {name: sum(map(math.prod, make().values())) for name, make in PRESETS.items()} == PUBLISHED


def test_amortized_bytes_and_flops_by_hand() -> None:
    estimate = cost.estimate("", pr.Shampoo(every=10), {"w": (4, 2)}, device=cost.Device(2.0, 1e9))
    products = 2 * (4 * 2 * 4 + 2 * 4 * 4 * 2) + 2 * (2 * 4 * 2 + 2 * 2 * 2 * 4)
    roots = (9 * 4**3 + 9 * 2**3) / 10
    assert estimate.flops == pytest.approx(products + roots, rel=1e-15)
    statistics, kept = 2 * 4 * (16 + 4), (1 + 1 / 10) * 4 * (16 + 4 + 4 + 2)
    assert estimate.moved == pytest.approx(3 * 4 * 8 + statistics + kept, rel=1e-15)
    assert estimate.seconds == estimate.moved / 2
    assert cost.estimate("", pr.Shampoo(), {"w": (4, 2)}, device=cost.Device(1e9, 2.0)).seconds == (
        cost.estimate("", pr.Shampoo(), {"w": (4, 2)}).flops / 2
    )


def test_own_and_calls() -> None:
    estimate = cost.estimate("", pr.ASGO(), MODEL)
    assert estimate.own == (48 + 48) / estimate.entries
    assert estimate.calls == (6, 2)
    assert cost.estimate("", pr.Adam(), MODEL).own == 1


# ---- several devices ------------------------------------------------------------------------------------------------


def test_splits_by_hand() -> None:
    shapes = {f"w{i}": (4, 4) for i in range(5)} | {"bias": (6,)}
    method = pr.Shampoo()
    [owner] = cost.estimate("", method, shapes, mesh=2).mesh
    assert (owner.name, owner.devices, owner.idle) == ("owner", 2, 0)
    assert owner.balance == 3 / 2.5  # five equal matrices on two devices
    assert owner.state_bytes == 3 * 2 * 64 + 24
    assert owner.sent == 2 * 4 * 5 * 8  # half of each matrix to its owner, half of its direction back
    assert cost.estimate("", pr.Adam(), shapes, mesh=2).mesh[0].sent == 0


def test_uneven_parts_are_summed() -> None:
    """On four devices 5, 7 and 3 rows are 2 2 1 0, 2 2 2 1 and 1 1 1 0; the owner's own rows are not sent."""
    shapes = {"up": (5, 7), "down": (7, 5), "head": (3, 7)}
    parts = {"up": (14, 14, 7, 0), "down": (10, 10, 10, 5), "head": (7, 7, 7, 0)}
    layout = movement.Layout((4,), (movement.Cut(0),))
    for owners in product(range(4), repeat=3):
        parcels = [movement.Parcel(shape, layout, owner) for shape, owner in zip(shapes.values(), owners, strict=True)]
        expected = sum(sum(parts[name]) - parts[name][owner] for name, owner in zip(shapes, owners, strict=True))
        out, back = movement.traffic(parcels)
        assert sum(out) == sum(back) == expected
    owner = cost.estimate("", pr.ASGO(), shapes, mesh=4, dtype="float64").mesh[0]
    assert owner.sent == 2 * 8 * 60  # owners 0, 1 and 2; the formula for even parts says 2 * 8 * 91 * 3 / 4 = 1092
    assert owner.idle == 1


def test_replicas() -> None:
    """Of 2 x 2 devices one in each pair, which has half of it; alone it serves the other replica, too."""
    owner, replica = cost.estimate("", pr.ASGO(), {"w": (4, 6)}, mesh=(2, 2), dtype="float64").mesh[:2]
    assert owner.sent == 8 * (12 + 3 * 12)
    assert replica.sent == 8 * (2 * 12 + 2 * 12)
    assert (owner.idle, replica.idle) == (3, 2)
    assert replica.state_bytes == owner.state_bytes
    layout = movement.Layout((2, 2), (None, movement.Cut(0)))
    apart = movement.Parcel((4, 6), layout, 1, apart=(0,))
    assert [apart.owner_of(rank) for rank in range(4)] == [1, 1, 3, 3]
    assert movement.traffic([apart]) == ([12, 0, 12, 0], [0, 12, 0, 12])


def test_cut_matrices() -> None:
    """One Muon matrix p x q on two devices: X X' makes partial sums; the polynomial in it, p x p, is repeated."""
    method = pr.Muon(root_steps=1)
    owner, cut = cost.estimate("", method, {"w": (4, 16)}, mesh=2).mesh
    assert (owner.balance, owner.idle) == (2.0, 1)
    assert cut.name == "cut 2"
    assert cut.balance == pytest.approx((2 * 2 * 4 * 4 * 16 / 2 + 2 * 4**3) / ((2 * 2 * 4 * 4 * 16 + 2 * 4**3) / 2))
    assert cut.sent == 4 * (2 * 64 / 2 + 2 * 4 * 4)


def test_owners_of_llama_70b() -> None:
    """561 matrices: what 1024 devices leave idle, and the bound of Graham for the largest load."""
    for devices, idle in ((8, 0), (64, 0), (1024, 463)):
        owner = cost.estimate("", pr.Muon(), PRESETS["llama-70b"](), mesh=devices, dtype="bfloat16").mesh[0]
        assert owner.idle == idle
        assert (owner.balance < 1.05) == (devices < 1024)


# ---- regions --------------------------------------------------------------------------------------------------------


def check_regions(lib: Any) -> None:
    """Each entry of a tensor is on some device, once for each copy; parts have the sizes of `torch.chunk`."""
    cut = lib.Cut
    for mesh, cuts in (
        ((4,), (cut(0),)),
        ((3,), (cut(1),)),
        ((2, 2), (None, cut(0))),
        ((2, 2), (cut(0), cut(1))),
        ((2, 2), (cut(0, 2), cut(0))),
        ((2, 3), (cut(0, 3), cut(0))),
        ((2, 2), (cut(0), None)),
    ):
        for shape in ((10, 6), (3, 5), (1, 2), (7, 7)):
            layout = lib.Layout(mesh, cuts)
            times = np.zeros(shape, int)
            numbers = torch.arange(math.prod(shape)).reshape(shape)
            for place, region in zip(product(*map(range, mesh)), lib.regions(shape, layout), strict=True):
                expected = numbers
                for c, size, at in zip(cuts, mesh, place, strict=True):
                    if c is not None:
                        chunks = [
                            [*part.chunk(size, c.axis), *[part.narrow(c.axis, 0, 0)] * size][at]
                            for part in [*expected.chunk(c.factor, c.axis)]
                        ]
                        expected = torch.cat(chunks, c.axis)
                found = torch.empty(lib.sizes(region), dtype=numbers.dtype)
                for whole, part in lib.blocks(region):
                    found[part] = numbers[whole]
                    times[whole] += 1
                assert torch.equal(found, expected)
            copies = math.prod(size for size, c in zip(mesh, cuts, strict=True) if c is None)
            assert (times == copies).all()


def test_regions() -> None:
    check_regions(movement)


REGION_MUTANTS = {
    "a strided shard is read as a contiguous one": (
        "parts = _chunks(region[cut.axis], cut.factor)",
        "parts = [region[cut.axis]]",
    ),
    "even chunks": ("size = -(-total // number)", "size = total // number"),
    "parts in the place of the whole": ("at += stop - start", "at += 0"),
}


@pytest.mark.parametrize("old_new", REGION_MUTANTS.values(), ids=REGION_MUTANTS)
def test_planted_region_is_caught(old_new: Any) -> None:
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check_regions(mutated(movement, old_new))


def check_assignment(lib: Any) -> None:
    """The next costliest to the device with the least; equal ones by name, whatever their order."""
    assert lib.assign([3.0, 3.0, 2.0, 2.0, 2.0], list("abcde"), [0.0, 0.0]) == [0, 1, 0, 1, 0]
    assert lib.assign([2.0, 2.0, 2.0, 3.0, 3.0], list("edcba"), [0.0, 0.0]) == [0, 1, 0, 1, 0]
    assert lib.assign([1.0, 2.0, 3.0], list("abc"), [0.0, 0.0]) == [1, 1, 0]
    assert lib.assign([1.0, 1.0], list("ab"), [5.0, 0.0]) == [1, 1]
    # by flops: a matrix of 2 x 8 entries is less work than one of 4 x 4 for a method with an eigendecomposition
    shapes = [(4, 4), (2, 8), (2, 8), (2, 8)]
    owners = lib.assign([lib.work(pr.ASGO(), shape) for shape in shapes], list("abcd"), [0.0, 0.0])
    costs = [cost.estimate("", pr.ASGO(), {"w": shape}).flops for shape in shapes]
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == device) for device in range(2)]
    best = min(max(sum(some), sum(costs) - sum(some)) for r in range(5) for some in combinations(costs, r))
    assert max(loads) == best


def test_assignment() -> None:
    check_assignment(movement)


ASSIGN_MUTANTS = {
    "by number": ("load, result[i] = heap[0]", "load, result[i] = heap[0][0], i % len(loads)"),
    "in the order given": ("key=lambda i: (-costs[i], names[i], i)", "key=lambda i: i"),
    "ties by position": ("(-costs[i], names[i], i)", "(-costs[i], i)"),
    "by size": ("done.items())) + entries", "done.items())) * 0 + entries * sum(shape)"),
    "loads forgotten": ("heap = [(load, device)", "heap = [(0.0, device)"),
}


@pytest.mark.parametrize("old_new", ASSIGN_MUTANTS.values(), ids=ASSIGN_MUTANTS)
def test_planted_assignment_is_caught(old_new: Any) -> None:
    with pytest.raises(AssertionError):
        check_assignment(mutated(movement, old_new))


# ---- the command ----------------------------------------------------------------------------------------------------


def run_cost(*arguments: str) -> Any:
    from typer.testing import CliRunner

    from precond_ref.cli import application

    return CliRunner().invoke(application(), ["cost", *arguments], env={"COLUMNS": "40"})


def test_table_figure_and_json(tmp_path: Any) -> None:
    file = tmp_path / "shapes.json"
    file.write_text(json.dumps({name: list(shape) for name, shape in MODEL.items() if shape}))
    figure = tmp_path / "cost.png"
    arguments = ("--shapes", str(file), "--method", "ASGO", "--method", "SShampoo(size=3, every=2)", "--mesh", "3")
    result = run_cost(*arguments, "--output", str(figure))
    assert result.exit_code == 0, result.output
    assert "SShampoo(size=3, every=2)" in result.stdout
    assert "On 3 devices" in result.stdout
    assert "\u2026" not in result.stdout  # no column is cut short, however narrow the terminal
    assert "flops/step" in result.stdout
    assert figure.read_bytes()[:4] == b"\x89PNG"
    shown = json.loads(run_cost(*arguments, "--json").stdout)
    expected = cost.estimate("", pr.ASGO(), read(file), mesh=3)
    assert shown["methods"][0]["state_bytes"] == expected.state_bytes
    assert shown["methods"][0]["mesh"][0]["sent"] == expected.mesh[0].sent
    assert shown["methods"][1]["method"] == repr(pr.SShampoo(size=3, every=2))


def test_the_page_shows_what_the_command_prints() -> None:
    shown = (Path(__file__).parents[1] / "docs/images/cost-llama-7b.txt").read_text(encoding="utf-8")
    assert run_cost("--preset", "llama-7b", "--mesh", "8").stdout.splitlines() == shown.splitlines()[:-1]


def test_all_presets_and_methods_run() -> None:
    for preset in PRESETS:
        result = run_cost("--preset", preset)
        assert result.exit_code == 0, result.output
        assert f"{PUBLISHED[preset]:,} parameters" in result.stdout


def test_shapes_of_a_safetensors_file(tmp_path: Any) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.zeros((2, 3), "float32"), "b": np.zeros(4, "float32")}, tmp_path / "m.safetensors")
    assert read(tmp_path / "m.safetensors") == {"a": (2, 3), "b": (4,)}


REFUSED = {
    "neither": ((), "give one of --preset and --shapes"),
    "preset": (("--preset", "gpt9"), "there is no preset 'gpt9'; there are gpt2,"),
    "method": (("--preset", "gpt2", "--method", "Azgo"), "no method is called Azgo; there are Adafactor"),
    "field": (("--preset", "gpt2", "--method", "ASGO(k=1)"), "ASGO has no field k; it has beta1, beta2,"),
    "value": (("--preset", "gpt2", "--method", "ASGO(every=0)"), "every must be >= 1, got 0"),
    "needs": (("--preset", "gpt2", "--method", "AdaFD"), "AdaFD needs delta"),
    "syntax": (("--preset", "gpt2", "--method", "ASGO(1"), "must be like 'SShampoo(size=64, every=10)'"),
    "dtype": (("--preset", "gpt2", "--dtype", "int8"), "dtype must be one of float64"),
    "mesh": (("--preset", "gpt2", "--mesh", "0"), "mesh must be >= 1, or two such numbers, got (0,)"),
    "rate": (("--preset", "gpt2", "--bandwidth", "0"), "--bandwidth must be finite and > 0, got 0.0"),
    "rate inf": (("--preset", "gpt2", "--matmul-rate", "inf"), "--matmul-rate must be finite and > 0, got inf"),
    "folder": (("--preset", "gpt2", "--output", "nowhere/a.svg"), "there is no folder nowhere to write a.svg to"),
    "a folder": (("--preset", "gpt2", "--output", "."), ". is a folder, no file can be written there"),
    "suffix": (("--preset", "gpt2", "--output", "a.foo"), "--output must end in one of"),
    "no suffix": (("--preset", "gpt2", "--output", "noext"), "--output must end in one of"),
    "file": (("--shapes", "nowhere.json"), "No such file"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(arguments: tuple[str, ...], message: str) -> None:
    result = run_cost(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["[1]", "{}", '{"a": [0]}', '{"a": 3}', "x"])
def test_a_file_of_something_else_is_refused(text: str, tmp_path: Any) -> None:
    (tmp_path / "shapes.json").write_text(text)
    with pytest.raises(ValueError, match=r"shapes\.json"):
        read(tmp_path / "shapes.json")


def test_quantities() -> None:
    assert [report.quantity(x, "B") for x in (0, 7, 999, 1000, 12345, 1.5e9)] == [
        "0 B", "7 B", "999 B", "1.00 kB", "12.3 kB", "1.50 GB",
    ]  # fmt: skip
    assert [report.duration(x) for x in (2.0, 0.0125, 3e-7)] == ["2 s", "12.5 ms", "0.3 us"]
    assert [report.duration(x) for x in (599.0, 600.0, 2270.0, 36000.0)] == ["599 s", "10 min", "37.8 min", "10 h"]
