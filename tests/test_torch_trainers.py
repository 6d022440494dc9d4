"""Trainers of other packages (deep; skipped where one is missing): a few steps, and a resume with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import precond_ref as pr
import precond_ref_torch as pt

torch.set_num_threads(1)
pytestmark = [pytest.mark.deep, pytest.mark.filterwarnings("ignore")]  # the trainers' own
MIDDLE, END, BATCH = 3, 7, 4

METHODS = {
    "elementwise": lambda model: pt.AGD(model.parameters(), lr=0.125),
    "whole matrices": lambda model: pt.ASGO(model.named_parameters(), lr=0.125, every=2),
    "sketches": lambda model: pt.SShampoo(model.parameters(), lr=0.125, size=2),
    "joined": lambda model: pt.MBF(pt.param_groups_for(model, method="MBF"), lr=0.125, damping=0.5),
    "several": lambda model: pt.Optimizer(
        pt.param_groups_for(model, head={"method": pr.AdaGrad()}), pr.Shampoo(every=3), lr=0.125
    ),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1))


def data(equal: bool = False) -> TensorDataset:
    """Batches, all different or all equal."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH * END, 3, generator=generator)
    if equal:
        x = x[:BATCH].repeat(END, 1)
    return TensorDataset(x, x.sum(1, keepdim=True).tanh())


def by_hand(make: Any, schedule: bool, equal: bool = False) -> list[torch.Tensor]:
    model = network()
    opt = make(model)
    rates = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)) if schedule else None
    for x, y in DataLoader(data(equal), BATCH):
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        opt.step()
        if rates is not None:
            rates.step()
    return [p.detach().clone() for p in model.parameters()]


def same(model: nn.Module, expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, x) for p, x in zip(model.parameters(), expected, strict=True))


@every_method
def test_lightning(make: Any, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, index: int) -> Any:
            return (self.net(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            opt = make(self.net)
            rates = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
            return {"optimizer": opt, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

    def trainer(steps: int) -> Any:
        return lightning.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip

    first, second, loader = Module(), Module(), DataLoader(data(equal=True), BATCH)  # which it resumes with is its own
    begun = trainer(MIDDLE)
    begun.fit(first, loader)
    begun.save_checkpoint(tmp_path / "middle.ckpt")
    trainer(END).fit(second, loader, ckpt_path=tmp_path / "middle.ckpt")
    assert same(second.net, by_hand(make, schedule=True, equal=True))


@every_method
def test_transformers(make: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Any, y: Any) -> dict[str, Any]:
            return {"loss": (self.net(x) - y).square().mean()}

    class InOrder(transformers.Trainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *given: Any) -> Any:
            return torch.utils.data.SequentialSampler(data())

    def trainer(model: Model, steps: int) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=BATCH, save_steps=MIDDLE,
            report_to=[], use_cpu=True, disable_tqdm=True, max_grad_norm=0.0, remove_unused_columns=False,
        )  # fmt: skip
        opt = make(model.net)
        rates = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
        rows = [{"x": x, "y": y} for x, y in data()]
        return InOrder(model=model, args=arguments, train_dataset=rows, optimizers=(opt, rates))

    first, second = Model(), Model()
    trainer(first, MIDDLE).train()
    trainer(second, END).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{MIDDLE}"))
    assert same(second.net, by_hand(make, schedule=True))


@every_method
def test_accelerate(make: Any, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def run(steps: range, load: bool) -> nn.Module:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True)
        model = network()
        model, opt, loader = accelerator.prepare(model, make(model), DataLoader(data(), BATCH))
        if load:
            accelerator.load_state(tmp_path)
        for step, (x, y) in enumerate(loader):
            if step in steps:
                opt.zero_grad()
                accelerator.backward((model(x) - y).square().mean())
                opt.step()
        if not load:
            accelerator.save_state(tmp_path)
        return accelerator.unwrap_model(model)

    run(range(MIDDLE), load=False)
    assert same(run(range(MIDDLE, END), load=True), by_hand(make, schedule=False))
