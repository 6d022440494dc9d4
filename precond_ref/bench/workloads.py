"""Workloads: parameters by name and shape. This module imports only the standard library, because peers run it too."""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def matrices(count: int = 100, size: int = 64) -> Shapes:
    """Return equal square matrices."""
    return {f"layer{i}.weight": (size, size) for i in range(count)}


def transformer(layers: int = 6, width: int = 384) -> Shapes:
    """Return the blocks of a transformer, (output, input): 10.6 million parameters, with norms and biases."""
    shapes: Shapes = {}
    linear = {
        "attention": (3 * width, width),
        "projection": (width, width),
        "expand": (4 * width, width),
        "contract": (width, 4 * width),
    }
    for i in range(layers):
        for name, shape in linear.items():
            shapes |= {f"block{i}.{name}.weight": shape, f"block{i}.{name}.bias": shape[:1]}
        shapes |= {f"block{i}.norm{j}.{kind}": (width,) for j in (1, 2) for kind in ("weight", "bias")}
    return shapes


def convolutions(blocks: int = 3, width: int = 16, classes: int = 10) -> Shapes:
    """Return ResNet-20 (He et al., 2016, for CIFAR): three stages of 3 x 3 convolutions, norms, and a classifier."""
    shapes: Shapes = {"stem.weight": (width, 3, 3, 3), "stem_norm.weight": (width,), "stem_norm.bias": (width,)}
    inputs = width
    for stage in range(3):
        outputs = width * 2**stage
        for block in range(blocks):
            for j in (1, 2):
                path = f"stage{stage}.{block}.conv{j}"
                shapes[f"{path}.weight"] = (outputs, inputs, 3, 3)
                shapes |= {f"{path}_norm.{kind}": (outputs,) for kind in ("weight", "bias")}
                inputs = outputs
    return shapes | {"fc.weight": (classes, inputs), "fc.bias": (classes,)}


def large(rows: int = 4096, columns: int = 1024) -> Shapes:
    """Return one matrix."""
    return {"layer.weight": (rows, columns)}


def few() -> Shapes:
    """Return ten of the hundred matrices: some peers take many minutes to compile the hundred."""
    return matrices(10)


def squares() -> Shapes:
    """Return two matrices of the transformer's width."""
    return matrices(2, 384)


def square() -> Shapes:
    """One matrix of 1024 x 1024."""
    return matrices(1, 1024)


def contraction() -> Shapes:
    """Return one matrix of the transformer that is four times as long as wide."""
    return large(384, 1536)


def tiny() -> Shapes:
    """Five thousand vectors."""
    return {f"layer{i}.bias": (16,) for i in range(5000)}


WORKLOADS = {
    "matrices": matrices,
    "few": few,
    "squares": squares,
    "square": square,
    "contraction": contraction,
    "transformer": transformer,
    "convolutions": convolutions,
    "large": large,
    "tiny": tiny,
}
SMOKE: dict[str, Shapes] = {
    "matrices": matrices(3, 8),
    "few": matrices(2, 8),
    "squares": matrices(2, 16),
    "square": matrices(1, 24),
    "contraction": large(8, 32),
    "transformer": transformer(1, 8),
    "convolutions": convolutions(1, 2),
    "large": large(16, 8),
    "tiny": {f"layer{i}.bias": (2,) for i in range(4)},
}
"""Small versions of the workloads, which only show whether everything runs."""


def shapes(workload: str, smoke: bool) -> Shapes:
    """Return the parameters of a workload."""
    return SMOKE[workload] if smoke else WORKLOADS[workload]()


def split(shapes: Shapes) -> tuple[Shapes, Shapes]:
    """Return matrices and tensors, and the rest."""
    return {k: v for k, v in shapes.items() if len(v) > 1}, {k: v for k, v in shapes.items() if len(v) < 2}
