"""Method states as flat dicts of tensors, ``{"m": ..., "grams.0": ...}``, and back."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from precond_ref import Method, list_methods


def to_dict(state: Any) -> dict[str, Tensor]:
    """The tensors of a method state by name; the step and what is None are left out."""
    return dict(_named(state._replace(step=None), ()))


def _named(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, tuple):
        names = getattr(value, "_fields", range(len(value)))
        for name, part in zip(names, value, strict=True):
            yield from _named(part, (*path, str(name)))
    elif value is not None:
        yield ".".join(path), value


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a method state in the order of `to_dict`."""
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in tensors(part)]
    return [value] if hasattr(value, "shape") else []


def fill(template: Any, arrays: Iterator[Any], step: int) -> Any:
    """A state like ``template`` with the next of ``arrays`` for each of its tensors, and ``step``."""
    if isinstance(template, tuple):
        parts = [fill(part, arrays, step) for part in template]
        return type(template)(*parts) if hasattr(template, "_fields") else tuple(parts)
    if template is None:
        return None
    return step if isinstance(template, int) else next(arrays)


@lru_cache(maxsize=4096)
def template(method: Method, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """The state of one parameter without its values; ValueError or TypeError if the method does not take it."""
    return method.init(torch.empty(shape, dtype=dtype, device="meta"))


def work_dtype(method: Method, dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics and arithmetic: the parameter's, but float32 at least (unless ``narrow_state`` is set)."""
    narrow = getattr(method, "narrow_state", False) or torch.finfo(dtype).bits >= 32
    return dtype if narrow else torch.float32


def reads_param(method: Method) -> bool:
    """Whether directions depend on the parameter's values: in the package's own methods only through weight decay."""
    return getattr(method, "weight_decay", 0.0) != 0 or not type(method).__module__.startswith("precond_ref.")


def due(method: Any, step: int) -> Any:
    """``refresh`` of the update after ``step`` completed ones, for a graph that does not know the step."""
    return method.due(step) if hasattr(method, "due") else step % getattr(method, "every", 1) == 0


# ---- methods as plain data, for parameter groups and checkpoints ----------------------------------------------------


def type_of(name: str) -> type[Method]:
    """The `Method` class of that name: the registered one, else one that a preset makes."""
    if name in list_methods():
        return list_methods()[name]
    classes: list[type[Method]] = [Method]
    for cls in classes:
        classes.extend(cls.__subclasses__())
    named = [cls for cls in classes[1:] if cls.__name__ == name]
    importable = [cls for cls in named if getattr(sys.modules.get(cls.__module__), name, None) is cls]
    for cls in (*importable, *named):  # a class that its module no longer knows by this name is the last choice
        return cls
    raise ValueError(f"no method is called {name!r}")


def encode(method: Method) -> dict[str, Any]:
    """``{"method": name, field: value, ...}``."""
    fields = dataclasses.fields(method)  # type: ignore[arg-type]
    return {"method": type(method).__name__, **{f.name: getattr(method, f.name) for f in fields}}


def field_names(name: str) -> list[str]:
    """Fields of the method of that name."""
    return [f.name for f in dataclasses.fields(type_of(name))]  # type: ignore[arg-type]


TORCH_NAMES = {
    "beta1": "beta parameter at index 0",
    "beta2": "beta parameter at index 1",
    "eps": "epsilon value",
}


def decode(data: Mapping[str, Any]) -> Method:
    """The method that `encode` made plain; ValueError or TypeError in PyTorch's wording for a field out of range."""
    values = {name: data[name] for name in field_names(data["method"])}
    return make(type_of(data["method"]), values)


def make(factory: Any, values: Mapping[str, Any]) -> Method:
    """``factory(**values)``, with PyTorch's wording for a field out of range."""
    try:
        method: Method = factory(**values)
    except (ValueError, TypeError) as error:
        name = str(error).partition(" ")[0]
        if name not in values:
            raise
        label = TORCH_NAMES.get(name, f"{name} value")
        raise type(error)(f"Invalid {label}: {values[name]} ({error})") from None
    return method
