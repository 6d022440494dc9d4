"""Steps written by hand in PyTorch: the mathematics of a method's defaults for float32 matrices, and nothing else.

They are floors: in place where PyTorch can, on pieces that stay in a CPU's cache, without a guard against what is not
finite, a check of arguments, an optimizer around it, or a state that survives an exception.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from precond_ref.bench.peers import GRADIENTS, Step
from precond_ref.bench.workloads import Shapes, split

PIECE = 2**16
"""Entries of a piece of matrices."""
LONG_PIECE = 2**18
"""Entries of a piece for an elementwise method."""
Update = Callable[[Any, Any, dict[str, Any]], None]
"""Of gradients, parameters (written) and a state (written), the first two as stacks."""


def by_hand(update: Update, lr: float, elementwise: bool = False) -> Callable[[Shapes], Step]:
    """Return a maker of a step that gives each piece of the workload to ``update``."""

    def make(shapes: Shapes) -> Step:
        import torch

        generator = torch.Generator().manual_seed(0)
        work: list[tuple[Iterator[Any], Any, dict[str, Any]]] = []
        sizes: list[tuple[int, ...]] = []
        if elementwise:
            entries = sum(int(torch.Size(shape).numel()) for shape in shapes.values())
            sizes = [(min(LONG_PIECE, entries - at),) for at in range(0, entries, LONG_PIECE)]
        else:
            for shape in dict.fromkeys(split(shapes)[0].values()):
                count = sum(other == shape for other in split(shapes)[0].values())
                room = max(PIECE // (shape[0] * shape[1]), 1)
                sizes += [(min(room, count - at), *shape) for at in range(0, count, room)]
        for size in sizes:
            grads = [torch.randn(size, generator=generator) for _ in range(GRADIENTS)]
            work.append((itertools.cycle(grads), torch.randn(size, generator=generator), {"lr": lr, "t": 0}))

        def step() -> None:
            for grads, x, state in work:
                update(next(grads), x, state)

        return step

    return make


def _zeros(x: Any, s: dict[str, Any], *names: str) -> None:
    if names[0] not in s:
        s |= {name: x.new_zeros(x.shape) for name in names}


def _sides(x: Any, s: dict[str, Any], start: float, *names: str) -> None:
    import torch

    if names[0] not in s:
        for name, d in zip(names, x.shape[-2:], strict=True):
            s[name] = start * torch.eye(d).repeat(x.shape[0], 1, 1)


def _moved(x: Any, u: Any, lr: float, decay: float = 0.0) -> None:
    import torch

    torch._fused_sgd_(
        [x], [u], [], weight_decay=decay, lr=lr, momentum=0.0, dampening=0.0, nesterov=False, maximize=False,
        is_first_step=False,
    )  # fmt: skip


def agd(g: Any, x: Any, s: dict[str, Any]) -> None:
    """AGD's (m), (s), (b), (x), and decoupled weight decay."""
    import torch

    _zeros(x, s, "m", "b", "u")
    m, b, u, t = s["m"], s["b"], s["u"], s["t"]
    c1, before, root = 1 - 0.9 ** (t + 1), 1 - 0.9**t, (1 - 0.999 ** (t + 1)) ** 0.5
    back = 1 / (0.9 * before) if t else 0.0
    m.lerp_(g, 0.1)
    torch.mul(g, 0.1 / c1 * (1 + 0.1 * back), out=u).sub_(m, alpha=0.1 / c1 * back)
    b.lerp_(u.mul_(u), 1e-3)
    torch.div(m, torch.sqrt(b, out=u).clamp_(min=1e-5 * root), out=u)
    _moved(x, u.mul_(root / c1), s["lr"], 1e-2)
    s["t"] = t + 1


def asgo(g: Any, x: Any, s: dict[str, Any]) -> None:
    """ASGO's (M), (V), (P), (U), (W), on the smaller side."""
    import torch

    m, n = x.shape[-2:]
    _zeros(x, s, "m")
    _sides(x, s, 0.0, "left", "right")
    side = s["left" if m < n else "right"]
    s["m"].lerp_(g, 0.1)
    side.lerp_(g @ g.mT if m < n else g.mT @ g, 0.2)
    w, q = torch.linalg.eigh(side)
    root = (q * w.clamp_(min=0).add_(1e-10).rsqrt_()[..., None, :]) @ q.mT
    u = root @ s["m"] if m < n else s["m"] @ root
    _moved(x, u.mul_(0.2 * (m * n) ** 0.5 / torch.linalg.vector_norm(u, dim=(-2, -1), keepdim=True)), s["lr"])


def shampoo(g: Any, x: Any, s: dict[str, Any]) -> None:
    """Shampoo: two statistics, their roots of order -1/4, and the product."""
    import torch

    _sides(x, s, 0.0, "left", "right")
    roots = []
    for side, gram in ((s["left"], g @ g.mT), (s["right"], g.mT @ g)):
        w, q = torch.linalg.eigh(side.add_(gram))
        roots.append((q * w.clamp_(min=0).add_(1e-6).pow_(-0.25)[..., None, :]) @ q.mT)
    _moved(x, roots[0] @ g @ roots[1], s["lr"])


def soap(every: int) -> Update:
    """SOAP's (P), (M), (V), (N), (C), (L), (R); after its first update, which makes the bases (the identity here)."""

    def update(g: Any, x: Any, s: dict[str, Any]) -> None:
        import torch

        _zeros(x, s, "m", "v", "rotated_m")
        _sides(x, s, 1.0, "p", "q")
        _sides(x, s, 0.0, "left", "right")
        p, q, t = s["p"], s["q"], s["t"] + 1
        rotated = p.mT @ g @ q
        s["m"].lerp_(g, 0.05)
        average = s["rotated_m"].lerp_(rotated, 0.05)
        s["v"].lerp_(rotated.mul_(rotated), 0.05)
        u = p @ (average / s["v"].sqrt().add_(1e-8)) @ q.mT
        _moved(x, u.mul_((1 - 0.95**t) ** 0.5 / (1 - 0.95**t)), s["lr"])
        for axis, (name, basis, gram) in enumerate((("left", "p", g @ g.mT), ("right", "q", g.mT @ g))):
            s[name].lerp_(gram, 0.05)
            if t % every == 0:
                product = s[name] @ s[basis]
                order = (s[basis] * product).sum(-2).argsort(descending=True)
                columns = order[..., None, :].expand_as(product)
                s[basis] = torch.linalg.qr(product.gather(-1, columns))[0]
                s["v"] = (
                    s["v"].gather(-2, order[..., :, None].expand_as(x))
                    if axis == 0
                    else s["v"].gather(-1, order[..., None, :].expand_as(x))
                )
        if t % every == 0:
            s["rotated_m"] = s["p"].mT @ s["m"] @ s["q"]
        s["t"] = t

    return update


def if_shampoo(g: Any, x: Any, s: dict[str, Any]) -> None:
    """IF-Shampoo's (1) to (6) with dense factors."""
    import torch

    _zeros(x, s, "b")
    _sides(x, s, 1.0, "c", "k")
    _sides(x, s, 0.0, "m_c", "m_k")
    dims = x.shape[-2:]
    factors = [s["c"], s["k"]]
    grams = [factor.mT @ factor for factor in factors]
    traces = [gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] for gram in grams]
    p = factors[0].mT @ g @ factors[1]  # (1)
    new = []
    for i, (rows, name) in enumerate(((p, "m_c"), (p.mT, "m_k"))):
        size = dims[i] / (dims[0] * dims[1])
        h = torch.baddbmm(grams[i].mul_(1e-3 * size * traces[1 - i]), rows, rows.mT, alpha=size)  # (2)
        h.diagonal(dim1=-2, dim2=-1).sub_(1)
        m = s[name].mul_(0.5).add_(h, alpha=0.25)  # (3)
        length = torch.linalg.vector_norm(m, dim=(-2, -1), keepdim=True).clamp_(min=1)
        new.append(factors[i] - (factors[i] @ m).mul_(0.01 / length))  # (4)
    s["c"], s["k"] = new
    u = new[0] @ (new[0].mT @ g) @ new[1] @ new[1].mT  # (5)
    _moved(x, s["b"].mul_(0.9).add_(u), s["lr"])  # (6)
