"""Parameters by name and shape: of well-known models, and from files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from precond_ref.files import read_json, shown

Shapes = Mapping[str, tuple[int, ...]]


def _gpt2(layers: int, width: int) -> Shapes:
    """GPT-2 (Radford et al., 2019), names and (input, output) layout of Hugging Face, the tied head not repeated."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (50257, width), "wpe.weight": (1024, width)}
    linear = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
    for i in range(layers):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{norm}.weight": (width,), f"h.{i}.{norm}.bias": (width,)}
        for name, shape in linear.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def _llama(layers: int, width: int, hidden: int, keys: int) -> Shapes:
    """Llama 2 (Touvron et al., 2023), names and (output, input) layout of Hugging Face; ``keys`` rows of k and v."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (32000, width)}
    linear = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    for i in range(layers):
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"layers.{i}.{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return shapes | {"norm.weight": (width,), "lm_head.weight": (32000, width)}


def _resnet50() -> Shapes:
    """ResNet-50 (He et al., 2016), names and layout of torchvision."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, norm: str, shape: tuple[int, ...]) -> None:
        shapes.update({f"{name}.weight": shape, f"{norm}.weight": shape[:1], f"{norm}.bias": shape[:1]})

    conv("conv1", "bn1", (64, 3, 7, 7))
    inputs = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for block in range(blocks):
            path = f"layer{stage}.{block}"
            conv(f"{path}.conv1", f"{path}.bn1", (width, inputs, 1, 1))
            conv(f"{path}.conv2", f"{path}.bn2", (width, width, 3, 3))
            conv(f"{path}.conv3", f"{path}.bn3", (4 * width, width, 1, 1))
            if block == 0:
                conv(f"{path}.downsample.0", f"{path}.downsample.1", (4 * width, inputs, 1, 1))
            inputs = 4 * width
    return shapes | {"fc.weight": (1000, 2048), "fc.bias": (1000,)}


PRESETS: Mapping[str, Callable[[], Shapes]] = MappingProxyType(
    {
        "gpt2": lambda: _gpt2(12, 768),
        "gpt2-xl": lambda: _gpt2(48, 1600),
        "llama-7b": lambda: _llama(32, 4096, 11008, 4096),
        "llama-70b": lambda: _llama(80, 8192, 28672, 1024),
        "resnet50": _resnet50,
    }
)


def read(path: Path) -> Shapes:
    """Shapes by name from a JSON file ``{"fc.weight": [512, 784], ...}``, or the header of a safetensors file.

    ValueError for anything else, and beyond 64 axes, 2^63 entries of a parameter, or 16 MiB of JSON.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np") as file:
                found: Any = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
    else:
        found = read_json(path)
    if not isinstance(found, dict) or not found:
        raise ValueError(f'{path} must hold one object {{"name": [sizes], ...}} with at least one name')
    for name, shape in found.items():
        where, got = f"{path}: the shape of {shown(name, 80)!r} must", shown(shape, 80)
        if not isinstance(shape, list) or not all(type(d) is int and d >= 1 for d in shape):
            raise ValueError(f"{where} be a list of positive integers, got {got}")
        if len(shape) > 64 or math.prod(shape) >= 2**63:
            raise ValueError(f"{where} have at most 64 axes and less than 2^63 entries, got {got}")
    return {name: tuple(shape) for name, shape in found.items()}
