"""Contenders of this environment: the adapters, the frameworks' own optimizers, and bare costs as floors.

Each entry of `OURS` makes a function that does one step on a workload.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from precond_ref.bench import by_hand as hand
from precond_ref.bench.by_hand import by_hand
from precond_ref.bench.peers import GRADIENTS, Step, jax_step, torch_step, with_adam
from precond_ref.bench.workloads import Shapes, split

LR = 1e-4


def _torch(name: str, compiled: bool = False, preset: str | None = None, **fields: Any) -> Callable[[Shapes], Step]:
    def make(shapes: Shapes) -> Step:
        import precond_ref_torch

        cls = getattr(precond_ref_torch, name)
        cls = getattr(cls, preset) if preset else cls
        return torch_step(lambda params: [cls(params.items(), lr=LR, compile=compiled, **fields)], shapes)

    return make


def adapter(method: str, shapes: Shapes) -> tuple[Step, Callable[[], int]]:
    """Return a step of ``method``, such as "SShampoo(size=64)", by the PyTorch adapter, and the bytes of its state."""
    import precond_ref_torch
    from precond_ref.bench.memory import state_bytes
    from precond_ref.cost.report import SIZE
    from precond_ref.registry import parse

    optimizers: list[Any] = []
    made = parse(method).made(size=SIZE)

    def make(params: dict[str, Any]) -> list[Any]:
        optimizers.append(precond_ref_torch.Optimizer(params.items(), made, lr=LR))
        return optimizers

    return torch_step(make, shapes), lambda: state_bytes(optimizers[0])


def _numpy(name: str, **fields: Any) -> Callable[[Shapes], Step]:
    def make(shapes: Shapes) -> Step:
        import numpy as np

        import precond_ref

        rng = np.random.default_rng(0)

        def draw() -> dict[str, Any]:
            return {path: rng.standard_normal(shape).astype("float32") for path, shape in shapes.items()}

        optimizer = precond_ref.Optimizer(getattr(precond_ref, name)(**fields), lr=LR)
        params, turn = draw(), itertools.cycle([draw() for _ in range(GRADIENTS)])
        carried: list[Any] = [params, optimizer.init(params)]

        def step() -> None:
            carried[:] = optimizer.step(carried[0], next(turn), carried[1])

        return step

    return make


def _torch_own(name: str, **options: Any) -> Callable[[Shapes], Step]:
    def make(shapes: Shapes) -> Step:
        import torch

        cls = getattr(torch.optim, name)
        return torch_step(lambda params: [cls(list(params.values()), lr=LR, **options)], shapes)

    return make


def _torch_matrices(name: str) -> Callable[[Shapes], Step]:
    """Of torch itself, for matrices; Adam has the rest."""

    def make(shapes: Shapes) -> Step:
        import torch

        return torch_step(with_adam(lambda params: getattr(torch.optim, name)(params, lr=LR)), shapes)

    return make


def _jax(name: str, **fields: Any) -> Callable[[Shapes], Step]:
    def make(shapes: Shapes) -> Step:
        import precond_ref_jax

        return jax_step(getattr(precond_ref_jax, name)(LR, **fields), shapes)

    return make


def _optax(name: str) -> Callable[[Shapes], Step]:
    def make(shapes: Shapes) -> Step:
        import optax

        return jax_step(getattr(optax, name)(LR), shapes)

    return make


# ---- floors: the products and factorizations alone ------------------------------------------------------------------


def _stacks(shapes: Shapes) -> list[list[Any]]:
    """Return for each shape of matrices GRADIENTS stacks of them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    counts: dict[tuple[int, ...], int] = {}
    for shape in split(shapes)[0].values():
        counts[shape] = counts.get(shape, 0) + 1
    return [
        [torch.randn(count, *shape, generator=generator) for _ in range(GRADIENTS)] for shape, count in counts.items()
    ]


def _bare(compute: Callable[[Any, Any], None]) -> Callable[[Shapes], Step]:
    """``compute(gradient, running statistic)`` for each stack, the statistic being made by ``start``."""

    def make(shapes: Shapes) -> Step:
        import torch

        work = []
        for grads in _stacks(shapes):
            m, n = grads[0].shape[-2:]
            eyes = [torch.eye(d).repeat(grads[0].shape[0], 1, 1) for d in (m, n)]
            work.append((itertools.cycle(grads), eyes))

        def step() -> None:
            for turn, eyes in work:
                compute(next(turn), eyes)

        return step

    return make


def _asgo(g: Any, statistics: list[Any]) -> None:
    import torch

    left = g.shape[-2] < g.shape[-1]
    gram = g @ g.mT if left else g.mT @ g
    side = statistics[0 if left else 1]
    side.mul_(0.8).add_(gram, alpha=0.2)
    w, q = torch.linalg.eigh(side)
    root = (q * w.clamp(min=1e-10).rsqrt()[..., None, :]) @ q.mT
    _ = root @ g if left else g @ root


def _shampoo(g: Any, statistics: list[Any]) -> None:
    import torch

    update = g
    for side, gram in zip(statistics, (g @ g.mT, g.mT @ g), strict=True):
        side.add_(gram)
        w, q = torch.linalg.eigh(side)
        root = (q * w.clamp(min=1e-6).pow(-0.25)[..., None, :]) @ q.mT
        update = root @ update if side is statistics[0] else update @ root


def _soap(every: int) -> Callable[[Any, list[Any]], None]:
    turn = itertools.count()

    def compute(g: Any, statistics: list[Any]) -> None:
        import torch

        due = next(turn) % every == 0
        _ = statistics[0] @ (statistics[0].mT @ g @ statistics[1]) @ statistics[1].mT
        for side, gram in zip(statistics, (g @ g.mT, g.mT @ g), strict=True):
            if due:
                torch.linalg.qr(gram @ side)
        if due:
            _ = statistics[0].mT @ g @ statistics[1]

    return compute


def _if_shampoo(g: Any, statistics: list[Any]) -> None:
    k, c = statistics
    _, _ = k.mT @ k, c.mT @ c  # grams
    p = k.mT @ g @ c  # (1)
    h, i = p @ p.mT, p.mT @ p  # (2)
    _, _ = k @ h, c @ i  # (4)
    _ = k @ (k.mT @ g) @ c @ c.mT  # (5)


# ---- roots and sketches alone ---------------------------------------------------------------------------------------


def _root(function: str, *arguments: Any, dtype: str = "float32") -> Callable[[Shapes], Step]:
    """Return a step of a function of `precond_ref.numerics.roots`, or of "eigh" alone, on the smaller Gram matrices."""

    def make(shapes: Shapes) -> Step:
        import torch
        from array_api_compat import array_namespace

        from precond_ref.numerics import roots

        xp = array_namespace(torch.empty(0))
        grams = [[(g @ g.mT if g.shape[-2] < g.shape[-1] else g.mT @ g) for g in stack] for stack in _stacks(shapes)]
        turns = [itertools.cycle(stack) for stack in grams]

        def step() -> None:
            for turn in turns:
                gram = next(turn)
                if function == "eigh":
                    torch.linalg.eigh(gram)
                else:
                    getattr(roots, function)(gram.to(getattr(torch, dtype)), *arguments, xp=xp).to(gram.dtype)

        return step

    return make


def _sketch(solver: str | None, size: int = 32) -> Callable[[Shapes], Step]:
    """Return a step of Frequent Directions on the left side of every matrix; without a solver, of its bare SVD."""

    def make(shapes: Shapes) -> Step:
        import torch
        from array_api_compat import array_namespace

        from precond_ref.numerics import nystrom, sketch
        from precond_ref.numerics.template import arrays_of, stacked

        lib: Any = nystrom if solver == "nystrom" else sketch
        options = {} if solver in (None, "nystrom") else {"solver": solver}
        xp = array_namespace(torch.empty(0))
        work: list[list[Any]] = []
        for stack in _stacks(shapes):
            count, d, _ = stack[0].shape
            empty = arrays_of(stacked(lib.empty(d, size), (count,)), stack[0], xp)
            work.append([itertools.cycle(stack), lib.update(empty, stack[0].mT, 0.99, size=size, xp=xp)])

        def step() -> None:
            for item in work:
                rows = next(item[0]).mT
                if solver is None:
                    factor = torch.cat([item[1].basis, rows.mT], dim=-1)
                    torch.linalg.svd(factor, full_matrices=False)
                else:
                    item[1] = lib.update(item[1], rows, 0.99, size=size, xp=xp, **options)

        return step

    return make


def _bare_nystrom(size: int) -> Callable[[Shapes], Step]:
    """The products, QR factorizations and small SVD of a certified sketch, and the Gram matrix of what is left."""

    def make(shapes: Shapes) -> Step:
        import torch

        def qr(matrix: Any) -> Any:
            return torch.linalg.qr(matrix)[0]

        turns = [itertools.cycle(stack) for stack in _stacks(shapes)]

        def step() -> None:
            for turn in turns:
                g = next(turn)
                b = torch.cat([g[..., :size], g], dim=-1)
                x = b[..., : size + 8]
                x = b @ qr(b.mT @ qr(x))
                w = qr(b.mT @ qr(x))
                f, triangle = torch.linalg.qr(b @ w)
                u, s, vt = torch.linalg.svd(triangle)
                r = b - (f @ u[..., :size]) @ ((s[..., :size, None] * vt[..., :size, :]) @ w.mT)
                _ = r @ r.mT

        return step

    return make


# ---- training steps of a convolutional network ----------------------------------------------------------------------


def _training(make: Callable[[Any], list[Any]]) -> Callable[[Shapes], Step]:
    """Return a step of forward, backward and update of a ResNet-20 on batches of 64 images of 32 x 32."""

    def build(shapes: Shapes) -> Step:
        import torch
        from torch import nn
        from torch.nn import functional

        width = shapes["stem.weight"][0]
        smoke = width < 16

        class Block(nn.Module):
            def __init__(self, inputs: int, outputs: int) -> None:
                super().__init__()
                self.stride = outputs // inputs
                self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
                self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
                self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

            def forward(self, x: Any) -> Any:
                y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
                if self.stride > 1:
                    x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
                return functional.relu(x + y)

        torch.manual_seed(0)
        layers: list[Any] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
        for stage in range(3):
            for _ in range(1 if smoke else 3):
                layers.append(Block(inputs, width * 2**stage))
                inputs = width * 2**stage
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))
        batch, size = (2, 8) if smoke else (64, 32)
        images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
        optimizers = make(model)

        def step() -> None:
            model.zero_grad()
            loss: Any = functional.cross_entropy(model(images), labels)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()

        return step

    return build


def _adam_training(model: Any) -> list[Any]:
    import torch

    return [torch.optim.Adam(model.parameters(), lr=LR, foreach=True)]


def _mbf_training(preset: bool) -> Callable[[Any], list[Any]]:
    def make(model: Any) -> list[Any]:
        import precond_ref_torch

        cls = precond_ref_torch.MBF
        if preset:
            return [cls.authors_code(model.named_parameters(), lr=LR, network="cnn")]
        return [cls(model.named_parameters(), lr=LR)]

    return make


ELEMENTWISE = {
    "Adam": "adam", "RMSProp": "rmsprop", "AdaGrad": "adagrad", "RFRMSProp": "rf_rmsprop", "RFAdamW": "rf_adamw",
}  # fmt: skip
"""The elementwise methods beside AGD, and their names in JAX."""


OURS: dict[str, Callable[[Shapes], Step]] = {
    "torch AdamW foreach": _torch_own("AdamW", foreach=True),
    "torch Adam foreach": _torch_own("Adam", foreach=True),
    "torch Adam fused": _torch_own("Adam", fused=True),
    "torch Muon": _torch_matrices("Muon"),
    "torch Adafactor": _torch_own("Adafactor"),
    "AGD": _torch("AGD", weight_decay=1e-2),
    "AGD, by hand": by_hand(hand.agd, LR, elementwise=True),
    "AGD, compile": _torch("AGD", compiled=True, weight_decay=1e-2),
    **{f"{name}, compile": _torch(name, compiled=True) for name in ELEMENTWISE},
    "ASGO": _torch("ASGO"),
    "ASGO, every=10": _torch("ASGO", every=10),
    "ASGO, by hand": by_hand(hand.asgo, LR),
    "ASGO, bare": _bare(_asgo),
    "DASGO": _torch("DASGO"),
    "Muon": _torch("Muon"),
    "Muon.torch": _torch("Muon", preset="torch"),
    "Adafactor.torch": _torch("Adafactor", preset="torch"),
    "KLShampoo": _torch("KLShampoo"),
    "Shampoo": _torch("Shampoo"),
    "Shampoo, by hand": by_hand(hand.shampoo, LR),
    "Shampoo, bare": _bare(_shampoo),
    "SOAP": _torch("SOAP"),
    "SOAP, every step": _torch("SOAP", every=1),
    "SOAP, by hand": by_hand(hand.soap(10), LR),
    "SOAP, bare": _bare(_soap(10)),
    "SOAP, bare, every step": _bare(_soap(1)),
    "IFShampoo": _torch("IFShampoo"),
    "IFShampoo, compile": _torch("IFShampoo", compiled=True),
    "IFShampoo, by hand": by_hand(hand.if_shampoo, LR),
    "IFShampoo, bare": _bare(_if_shampoo),
    "RFShampoo": _torch("RFShampoo"),
    "RFRMSProp": _torch("RFRMSProp"),
    "MBF": _torch("MBF"),
    "SShampoo": _torch("SShampoo", size=32),
    "SShampoo, nystrom": _torch("SShampoo", size=32, solver="nystrom"),
    "SShampoo, size 128": _torch("SShampoo", size=128),
    "SShampoo, size 128, nystrom": _torch("SShampoo", size=128, solver="nystrom"),
    "SShampoo, NumPy": _numpy("SShampoo", size=32),
    "SShampoo, NumPy, nystrom": _numpy("SShampoo", size=32, solver="nystrom"),
    "SShampoo, NumPy, size 128": _numpy("SShampoo", size=128),
    "SShampoo, NumPy, size 128, nystrom": _numpy("SShampoo", size=128, solver="nystrom"),
    "SShampoo, gram64": _torch("SShampoo", size=32, solver="gram64"),
    "eigh alone": _root("eigh"),
    "power -1/2": _root("power", -0.5, 1e-6),
    "power -1/2 in float64": _root("power", -0.5, 1e-6, dtype="float64"),
    "Newton-Schulz, 10 steps": _root("inverse_sqrt_newton_schulz", 1e-6, 10),
    "Polar Express, 10 steps": _root("inverse_sqrt_polar_express", 1e-6, 10),
    "coupled Newton, 10 steps": _root("inverse_root_coupled_newton", 2, 1e-6, 10),
    "svd alone": _sketch(None),
    "sketch, svd": _sketch("svd"),
    "sketch, gram64": _sketch("gram64"),
    "sketch, size 128, svd": _sketch("svd", 128),
    "sketch, nystrom": _sketch("nystrom"),
    "sketch, size 128, nystrom": _sketch("nystrom", 128),
    "sketch, nystrom, bare": _bare_nystrom(32),
    "sketch, size 128, nystrom, bare": _bare_nystrom(128),
    "training with Adam": _training(_adam_training),
    "training with MBF, authors_code('cnn')": _training(_mbf_training(True)),
    "training with MBF": _training(_mbf_training(False)),
    "optax.adam": _optax("adam"),
    "agd": _jax("agd"),
    **{name: _jax(name) for name in ELEMENTWISE.values()},
    "asgo": _jax("asgo"),
    "shampoo": _jax("shampoo"),
    "if_shampoo": _jax("if_shampoo"),
    "mbf": _jax("mbf"),
    "s_shampoo": _jax("s_shampoo", size=32),
    "s_shampoo, nystrom": _jax("s_shampoo", size=32, solver="nystrom"),
    "s_shampoo, size 128": _jax("s_shampoo", size=128),
    "s_shampoo, size 128, nystrom": _jax("s_shampoo", size=128, solver="nystrom"),
    "s_shampoo, practical": _jax("s_shampoo_practical", size=32, merge=1),
}
"""Steps by name; capitals are the PyTorch adapter, small letters the JAX adapter."""
