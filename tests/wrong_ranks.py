"""Optimizers for `precond-ref check --world`: a right one, whole on every rank, and what is made wrong of it.

``python -m pytest tests/test_worlds.py`` runs them; each says what the command must call its mistake.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def whole(x: Any) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def part(full: Tensor, p: Any) -> Tensor:
    """What this rank has of it."""
    if not isinstance(p, DTensor):
        return full
    everywhere = DTensor.from_local(full, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
    return everywhere.redistribute(p.device_mesh, p.placements).to_local()


def local(x: Any) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


class Right(torch.optim.Optimizer):
    """``x <- (1 - lr decay) x - lr m (V + I)^{-1/2}``, its state whole on every rank."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def seen(self, p: Any) -> Tensor:
        """The gradient that is used."""
        return whole(p.grad)

    def direction(self, g: Tensor, state: dict[str, Any], p: Any) -> Tensor:
        if not state:
            state |= {"step": torch.tensor(0.0), "m": torch.zeros_like(g), "v": torch.zeros(g.shape[-1:] * g.ndim)}
            state["v"] = state["v"].to(g)
        state["step"] += 1
        state["m"].mul_(0.5).add_(g)
        state["v"].mul_(0.5).add_(g.T @ g if g.ndim == 2 else g * g)
        return self.root(state["m"], state["v"])

    def root(self, m: Tensor, v: Tensor) -> Tensor:
        if m.ndim == 1:
            return m / (v + 1).sqrt()
        w, q = torch.linalg.eigh(v)
        return m @ (q * (w + 1) ** -0.5) @ q.T

    def change(self, p: Any, group: dict[str, Any]) -> Tensor:
        """What is subtracted from the local part."""
        return group["lr"] * part(self.direction(self.seen(p), self.state[p], p), p)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    change = self.change(p, group)
                    local(p).mul_(1 - group["lr"] * group["weight_decay"]).sub_(change)


class PerShard(Right):
    """Each shard is updated by itself."""

    def change(self, p: Any, group: dict[str, Any]) -> Tensor:
        return group["lr"] * self.direction(local(p.grad), self.state[p], p)


class PerShardLoaded(Right):
    """Each shard is updated by itself; its state is a DTensor, which any number of ranks can load."""

    def change(self, p: Any, group: dict[str, Any]) -> Tensor:
        momentum = self.state[p].setdefault("m", torch.zeros_like(p))
        m = local(momentum.mul_(0.5).add_(p.grad))
        return group["lr"] * (self.root(m, m.T @ m) if m.ndim == 2 else m)


class LocalGram(Right):
    """The length is the whole's, the Gram matrix the shard's."""

    def change(self, p: Any, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        u = self.direction(local(p.grad), state, p)
        size = (u * u).sum()
        if isinstance(p, DTensor):
            dist.all_reduce(size)
        return group["lr"] * u / size.sqrt()


class Heads(Right):
    """Blocks of four rows of the largest matrix are matrices of their own."""

    def direction(self, g: Tensor, state: dict[str, Any], p: Any) -> Tensor:
        number = 3 if g.ndim == 2 and tuple(p.shape) == (12, 8) else 1
        return torch.cat([super(Heads, self).direction(b, state.setdefault(str(k), {}), p)
                          for k, b in enumerate(g.chunk(number))])  # fmt: skip


class LocalHeads(Heads):
    """The split is made in as many blocks, of the shard's rows; the rest is whole."""

    def change(self, p: Any, group: dict[str, Any]) -> Tensor:
        if tuple(p.shape) == (12, 8) or (p.shape[0] % 3 == 0 and not isinstance(p, DTensor)):
            return group["lr"] * self.direction_of(local(p.grad), self.state[p], p)
        return super().change(p, group)

    def direction_of(self, g: Tensor, state: dict[str, Any], p: Any) -> Tensor:
        blocks = g.chunk(3) if g.ndim == 2 and g.shape[1] == 8 and g.shape[0] != 8 else [g]
        return torch.cat([Right.direction(self, b, state.setdefault(str(k), {}), p) for k, b in enumerate(blocks)])


class Forgetful(Right):
    """Directions are those of the owner, the last rank, which has no state of the matrices after loading."""

    def direction(self, g: Tensor, state: dict[str, Any], p: Any) -> Tensor:
        out = super().direction(g, state, p)
        dist.broadcast(out, src=dist.get_world_size() - 1)
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for value in state.values() if dist.get_world_size() > 1 == dist.get_world_size() - dist.get_rank() else ():
                if value.ndim == 2:
                    value.zero_()


class Cast(Right):
    """Loading rounds the state to float32, and goes on in float64."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for value in state.values():
                value.copy_(value.float())


class CastType(Right):
    """Loading leaves the momentum in float32; nothing is used of it before it is replaced."""

    def direction(self, g: Tensor, state: dict[str, Any], p: Any) -> Tensor:
        out = super().direction(g, state, p)
        state["last"] = g.clone()
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["last"] = state["last"].float()


class Hooked(Right):
    """Sees each gradient when it is there, in the backward."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0):
        super().__init__(params, lr, weight_decay)
        for group in self.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(self.arrived)

    def arrived(self, p: Any) -> None:
        raise NotImplementedError


class DoubleAccumulation(Hooked):
    """The sum of the gradient so far is added to a buffer after each micro-batch."""

    def arrived(self, p: Any) -> None:
        state = self.__dict__.setdefault("buffers", {})
        state[p] = state.get(p, 0) + whole(p.grad)

    def seen(self, p: Any) -> Tensor:
        return self.buffers.pop(p)


class PerMicroBatch(Hooked):
    """A step in each backward."""

    @torch.no_grad()
    def arrived(self, p: Any) -> None:
        Right.step_of(self, p)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


def _step_of(self: Right, p: Any) -> None:
    group = self.param_groups[0]
    change = self.change(p, group)
    local(p).mul_(1 - group["lr"] * group["weight_decay"]).sub_(change)


Right.step_of = _step_of  # type: ignore[attr-defined]


class SkippingRank(Right):
    """Rank 1 makes no step."""

    def change(self, p: Any, group: dict[str, Any]) -> Tensor:
        change = super().change(p, group)
        return change if dist.get_rank() != 1 else 0 * change

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, lr)


class SkippedParameter(SkippingRank):
    """The last rank leaves a parameter out."""

    def change(self, p: Any, group: dict[str, Any]) -> Tensor:
        change = Right.change(self, p, group)
        last = dist.get_world_size() > 1 and dist.get_rank() == dist.get_world_size() - 1
        return 0 * change if last and tuple(p.shape) == (5, 6) else change


class AveragedTwice(Right):
    """The gradient is divided by the number of ranks, which FSDP has done."""

    def seen(self, p: Any) -> Tensor:
        return super().seen(p) / dist.get_world_size()


class Summed(Right):
    """The gradient is multiplied by the number of ranks."""

    def seen(self, p: Any) -> Tensor:
        return super().seen(p) * dist.get_world_size()


class DifferingReplicas(Right):
    """The second half of the ranks goes a little further."""

    def change(self, p: Any, group: dict[str, Any]) -> Tensor:
        second = dist.get_world_size() > 1 and dist.get_rank() >= dist.get_world_size() // 2
        return super().change(p, group) * (1.0 + 2.0**-10 * second)


class ArraySplit(Right):
    """Rows are cut as NumPy's array_split cuts them, not as chunk does."""

    def change(self, p: Any, group: dict[str, Any]) -> Tensor:
        change = group["lr"] * self.direction(self.seen(p), self.state[p], p)
        if not isinstance(p, DTensor):
            return change
        mine, out = change.tensor_split(dist.get_world_size())[dist.get_rank()], torch.zeros_like(local(p))
        rows = min(len(out), len(mine))
        out[:rows] = mine[:rows]
        return out


class OwnersByActive(Right):
    """Owners are counted among the parameters that have a gradient, and their states do not move with them."""

    def change(self, p: Any, group: dict[str, Any]) -> Tensor:
        active = [q for q in group["params"] if q.grad is not None]
        self.owner = next(i for i, q in enumerate(active) if q is p) % dist.get_world_size()
        return super().change(p, group)

    def direction(self, g: Tensor, state: dict[str, Any], p: Any) -> Tensor:
        out = super().direction(g, state, p) if dist.get_rank() == self.owner else torch.empty_like(g)
        out = out.contiguous()
        dist.broadcast(out, src=self.owner)
        return out


class SwappedTwins(Right):
    """Results of two matrices of the same shape come back in the other order."""

    def change(self, p: Any, group: dict[str, Any]) -> Tensor:
        change = super().change(p, group)
        if dist.get_world_size() > 1 and tuple(p.shape) == (8, 8):
            self.waiting = [*getattr(self, "waiting", []), (p, change)]
            if len(self.waiting) == 1:
                return torch.zeros_like(change)
            other, first = self.waiting[0]
            local(other).sub_(change)
            self.waiting = []
            return first
        return change


class LocalNorm(Right):
    """The direction is the whole's, the length the shard's."""

    def change(self, p: Any, group: dict[str, Any]) -> Tensor:
        change = super().change(p, group)
        return group["lr"] * change / (change.norm() + 1e-30)

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, lr)


class Hanging(Right):
    """Rank 1 does not come to the third exchange."""

    def seen(self, p: Any) -> Tensor:
        self.times = getattr(self, "times", 0) + 1
        if self.times == 3 and dist.get_rank() == 1:
            torch.distributed.recv(torch.zeros(1), src=0)
        return super().seen(p)


class Aborting(Right):
    """Each rank sends another number of entries."""

    def seen(self, p: Any) -> Tensor:
        if dist.get_world_size() > 1:
            dist.all_reduce(torch.zeros(10**5 * (1 + dist.get_rank())))
        return super().seen(p)


class Dying(Right):
    """Rank 1 ends."""

    def seen(self, p: Any) -> Tensor:
        if dist.get_rank() == 1:
            os._exit(3)
        return super().seen(p)


class RefusingRank(Right):
    """Rank 1 raises, the others wait for it."""

    def seen(self, p: Any) -> Tensor:
        if dist.get_rank() == 1:
            raise ValueError("not on this rank")
        return super().seen(p)


def device_norm(learning_rate: float) -> Any:
    """For JAX: the length of a step is that of the rows of each device."""
    import jax
    import jax.numpy as jnp
    import optax

    def one(g: Any) -> Any:
        rows = jax.sharding.PartitionSpec("shard")
        if g.shape[0] % jax.sharding.get_abstract_mesh().shape["shard"]:
            return g / jnp.linalg.norm(g)
        return jax.shard_map(lambda x: x / jnp.linalg.norm(x), in_specs=rows, out_specs=rows)(g)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda g: -learning_rate * one(g), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
