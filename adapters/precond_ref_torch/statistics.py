"""Per-sample statistics for MBF, from the inputs of its layers and the gradients of their outputs."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from precond_ref import MBF
from precond_ref_torch import states
from precond_ref_torch.buckets import Unit, shape_of
from precond_ref_torch.optimizer import Optimizer

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class PerSampleStatistics:
    """Compute means over the samples of g_b g_b^T, for ``step(statistics=these.take())``.

    They stand in the place of G G^T of the batch gradient.

    It watches the `torch.nn.Linear` and convolutions of ``model`` whose weights ``optimizer`` gives to MBF, except
    ``kind="diagonal"``, while it is open: it is a context manager, and `close` ends it. The first axis of the input
    of a layer counts the samples. Several backward passes before `take` count as one batch.

    Arguments:
        model: the module; nothing in it may mix samples, as batch normalisation does in training.
        optimizer: an optimizer of this package, with its groups.
        reduction: "mean" or "sum": the loss is the mean or the sum of the samples' losses; the mean is
            over all samples since the last `take`.
        process_group: processes whose samples are averaged, as `torch.distributed` has them. Under
            `DistributedDataParallel` it must be given, or parameters differ between ranks.

    Raises ValueError if the optimizer has no such layer, or one whose weight two modules share; TypeError for an
    optimizer of another package.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, reduction: str = "mean", process_group: Any = None
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be one of precond_ref_torch, got {type(optimizer).__name__}")
        self.reduction, self.process_group = reduction, process_group
        units = {
            unit[0]: (unit, method)
            for group in optimizer.param_groups
            for _, unit, method in optimizer._routed(group)
            if isinstance(method, MBF) and method.kind != "diagonal"
        }
        self._layers: dict[Any, tuple[str, nn.Module, Unit, MBF]] = {}
        for name, module in model.named_modules():
            if not isinstance(module, (nn.Linear, *CONVOLUTIONS)) or module.weight not in units:
                continue
            if module.weight in self._layers:
                other = self._layers[module.weight][0]
                raise ValueError(f"{other} and {name} share a weight: its per-sample gradients cannot be told apart")
            unit, method = units[module.weight]
            if len(unit) == 2 and unit[1] is not module.bias:
                raise ValueError(f"the weight of {name} is joined with the bias of another layer")
            self._layers[module.weight] = name or "the model", module, unit, method
        if not self._layers:
            raise ValueError("optimizer runs MBF on the weight of no Linear or convolution of this model")
        self._open: dict[Any, int] = dict.fromkeys(self._layers, 0)
        self._seen: dict[Any, list[tuple[Tensor, Tensor, int]]] = {weight: [] for weight in self._layers}
        self._idle = False
        self._hooks = [
            module.register_forward_hook(partial(self._forward, weight), with_kwargs=True)
            for weight, (_, module, _, _) in self._layers.items()
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def take(self, scale: float = 1.0) -> dict[Any, Any]:
        """Return statistics of the samples since the last call, by weight; ``scale`` is the factor on the loss.

        A layer that has seen no sample, or whose weight is frozen, is left out. With a ``process_group``, a collective.
        RuntimeError if the input of a layer was overwritten since, as its gradients are then lost.
        """
        if not (isinstance(scale, (int, float, Tensor)) and scale > 0 and math.isfinite(scale)):
            raise ValueError(f"scale must be finite and > 0, got {scale!r}")
        taken = {}
        everything, self._seen = self._seen, {weight: [] for weight in self._layers}
        self._open = dict.fromkeys(self._layers, 0)
        for weight, (name, module, unit, method) in self._layers.items():
            seen = everything[weight]
            if any(x._version != version for x, _, version in seen):
                raise RuntimeError(f"the input of {name} was overwritten after its forward pass, before take()")
            if not weight.requires_grad or (not seen and self.process_group is None):
                continue
            total, count = self._total(module, unit, method, [(x, d) for x, d, _ in seen], scale)
            if self.process_group is not None:
                for tensor in (total, count):
                    torch.distributed.all_reduce(tensor, group=self.process_group)
                if not count:
                    continue
            taken[weight] = MBF.Blocks(total / count)
        return taken

    # ---- private ----------------------------------------------------------------------------------------------------

    def _forward(
        self, weight: Any, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
    ) -> None:
        if self._idle or not weight.requires_grad or not output.requires_grad:
            return
        self._open[weight] += 1
        x = (*inputs, *named.values())[0].detach()
        version = x._version

        def backward(signal: Tensor) -> None:
            name = self._layers[weight][0]
            if self._open[weight] != 1:
                raise RuntimeError(
                    f"{name} ran {self._open[weight]} times before one backward pass: per-sample statistics need one "
                    f"run each (run what needs no gradient under torch.no_grad)"
                )
            self._open[weight] = 0
            if x.ndim < 2 or (isinstance(module, CONVOLUTIONS) and x.ndim < weight.ndim):
                raise ValueError(f"{name} needs inputs whose first axis counts the samples, got shape {list(x.shape)}")
            self._seen[weight].append((x, signal.detach(), version))

        output.register_hook(backward)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _total(
        self, module: nn.Module, unit: Unit, method: MBF, seen: list[tuple[Tensor, Tensor]], scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return the sum over this process's samples of g_b g_b^T (averaged: of its mean over b), and their number."""
        dtype = states.work_dtype(method, unit[0].dtype)
        count = sum(len(x) for x, _ in seen)
        factor = (count if self.reduction == "mean" else 1.0) / scale
        shape = states.template(method, shape_of(unit), dtype).statistic.shape
        total = torch.zeros(shape, dtype=dtype, device=unit[0].device)
        for x, signal in seen:
            x, signal = x.to(dtype), signal.to(dtype) * factor
            if isinstance(module, nn.Linear) and x.ndim == 2:
                if len(unit) == 2:
                    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
                statistic: Any = MBF.Factors(x, signal)  # without a gradient of its own for each sample
            else:
                statistic = MBF.Samples(self._gradients(module, unit, x, signal))
            total += len(x) * method.blocks(statistic).statistic
        return total, torch.tensor(float(count), dtype=dtype, device=unit[0].device)

    def _gradients(self, module: Any, unit: Unit, x: Tensor, signal: Tensor) -> Tensor:
        """Return the per-sample gradients (n, *unit) of a layer of any kind."""
        weights = {"weight": module.weight.detach().to(x.dtype)}
        if module.bias is not None:
            weights["bias"] = module.bias.detach().to(x.dtype)

        def gradient(x: Tensor, signal: Tensor) -> Any:
            def run(weights: Any) -> Any:
                return torch.func.functional_call(module, weights, (x[None],))

            return torch.func.vjp(run, weights)[1](signal[None])[0]

        self._idle = True
        try:
            found = torch.func.vmap(gradient)(x, signal)
        finally:
            self._idle = False
        return torch.cat([found["weight"], found["bias"][..., None]], -1) if len(unit) == 2 else found["weight"]
