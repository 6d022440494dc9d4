"""Train a classifier with ASGO on its matrices and Adam on the rest: `python examples/torch_mnist.py`.

The program uses MNIST's test files if the environment variable PRECOND_REF_DATA names their folder, else the digits
that come with precond_ref.
"""

import os

import torch
from torch import nn

import precond_ref_torch
from precond_ref.problems import load_digits, load_mnist


def images_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs in [0, 1] as rows, and classes."""
    if os.environ.get("PRECOND_REF_DATA"):
        images, labels = load_mnist("t10k")
    else:
        images, labels = load_digits()
    inputs = torch.tensor(images.reshape(len(images), -1), dtype=torch.float32)
    return inputs / inputs.max(), torch.tensor(labels, dtype=torch.int64)


def main() -> None:
    torch.manual_seed(0)
    inputs, labels = images_and_labels()
    order = torch.randperm(len(inputs))
    inputs, labels = inputs[order], labels[order]
    split = len(inputs) * 4 // 5

    model = nn.Sequential(
        nn.Linear(inputs.shape[1], 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    groups = precond_ref_torch.param_groups_for(model, head={"lr": 3e-3}, norm={"lr": 3e-3}, bias={"lr": 3e-3})
    optimizer = precond_ref_torch.ASGO(groups, lr=1e-2, every=5)
    epochs, batch = 5, 64
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    print(optimizer.describe())

    for _ in range(epochs):
        for start in range(0, split, batch):
            rows = slice(start, min(start + batch, split))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
        schedule.step()

    with torch.no_grad():
        right = (model(inputs[split:]).argmax(dim=1) == labels[split:]).float().mean()
    print(f"test accuracy {100 * float(right):.1f}%")


if __name__ == "__main__":
    main()
