"""Method states as flat dicts of tensors, ``{"m": ..., "grams.0": ...}``, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from precond_ref import Method
from precond_ref.registry import arguments, class_of, constructors, parse


def to_dict(state: Any) -> dict[str, Tensor]:
    """Return the tensors of a method state by name, without the step and without None."""
    return dict(_named(state._replace(step=None), ()))


def _named(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, tuple):
        names = getattr(value, "_fields", range(len(value)))
        for name, part in zip(names, value, strict=True):
            yield from _named(part, (*path, str(name)))
    elif value is not None:
        yield ".".join(path), value


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors of a method state in the order of `to_dict`."""
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in tensors(part)]
    return [value] if hasattr(value, "shape") else []


def fill(template: Any, arrays: Iterator[Any], step: int) -> Any:
    """Return a state like ``template``, with the next of ``arrays`` for each of its tensors, and with ``step``."""
    if isinstance(template, tuple):
        parts = [fill(part, arrays, step) for part in template]
        return type(template)(*parts) if hasattr(template, "_fields") else tuple(parts)
    if template is None:
        return None
    return step if isinstance(template, int) else next(arrays)


class Spec(SimpleNamespace):
    """A tensor without its values: shape and dtype. A meta tensor that is made among fake ones would stay fake."""


@lru_cache(maxsize=4096)
def template(method: Method, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """Return the state of one parameter without its values; ValueError or TypeError if the method does not take it."""
    return _spec(method.init(torch.empty(shape, dtype=dtype, device="meta")))


def _spec(value: Any) -> Any:
    if isinstance(value, tuple):
        parts = [_spec(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return Spec(shape=value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value


def work_dtype(method: Method, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics and arithmetic: the parameter's, at least float32 without ``narrow_state``."""
    narrow = method.narrow_state or torch.finfo(dtype).bits >= 32
    return dtype if narrow else torch.float32


def is_own(method: Method) -> bool:
    """Return True for a method of this package; others may refuse a part of a parameter after another was stepped."""
    return type(method).__module__.startswith("precond_ref.")


def has_value(tensor: Tensor) -> bool:
    """Return True if the numbers in ``tensor`` can be read: it is neither fake nor on the meta device."""
    return not tensor.is_meta and not hasattr(tensor, "fake_mode")


def count(step: Tensor) -> int:
    """Return the number in a counter; 0 if the counter is fake."""
    return int(step) if has_value(step) else 0


# ---- methods as plain data, for parameter groups and checkpoints ----------------------------------------------------


def encode(method: Method) -> dict[str, Any]:
    """Return ``{"method": name, field: value, ...}``; ValueError if the class cannot be found by its name."""
    if class_of(method.name) is not type(method):
        raise ValueError(f"{method.name} was defined again since {method!r} was made: make that anew")
    fields = dataclasses.fields(method)  # type: ignore[arg-type]
    return {"method": method.name, **{f.name: getattr(method, f.name) for f in fields}}


def named(text: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Return `encode` of the method that ``text`` names, and the names of its arguments.

    ``given`` may have any of its arguments and fields; the others come from the text or are the method's defaults.
    """
    found = parse(current(text) if isinstance(text, str) else class_of(text).name)
    own = arguments(found.make)
    encoded = encode(make(found.make, {**found.fields, **{key: given[key] for key in own if key in given}}))
    return {key: given.get(key, value) if key != "method" else value for key, value in encoded.items()}, set(own)


def current(name: Any) -> Any:
    """Return the current name of the method that a file calls ``name``; ``name`` itself if there is none."""
    try:
        return class_of(name).name
    except (ValueError, TypeError):
        return name


def field_names(name: str) -> list[str]:
    """Return the fields of the method of that name."""
    return [f.name for f in dataclasses.fields(class_of(name))]  # type: ignore[arg-type]


def empty_fields(name: str) -> list[str]:
    """Return the fields whose default is an empty tuple."""
    return [f.name for f in dataclasses.fields(class_of(name)) if f.default == ()]  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def all_field_names() -> frozenset[str]:
    """Return the fields of all methods and the arguments of all presets."""
    return frozenset(name for make in constructors().values() for name in arguments(make))


TORCH_NAMES = {
    "beta1": "beta parameter at index 0",
    "beta2": "beta parameter at index 1",
    "eps": "epsilon value",
}


def decode(data: Mapping[str, Any]) -> Method:
    """Return the method of a result of `encode`; ValueError or TypeError as PyTorch words it for a bad field."""
    names = field_names(data["method"])
    missing = [name for name in names if name not in data]
    if missing:
        raise ValueError(f"{data['method']} needs {', '.join(missing)}, which no entry gives")
    return make(class_of(data["method"]), {name: data[name] for name in names})


def make(factory: Any, values: Mapping[str, Any]) -> Method:
    """Return ``factory(**values)``; errors for a field out of range have PyTorch's wording."""
    for name, value in values.items():
        if isinstance(value, Tensor) and (value.is_complex() or value.is_meta):
            raise TypeError(f"Invalid {TORCH_NAMES.get(name, f'{name} value')}: {value} (it must be a real number)")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"Invalid {TORCH_NAMES.get(name, f'{name} value')}: {value} (PyTorch has no such integer)")
    try:
        method: Method = factory(**values)
    except (ValueError, TypeError) as error:
        name = str(error).partition(" ")[0]
        if name not in values:
            raise
        label = TORCH_NAMES.get(name, f"{name} value")
        raise type(error)(f"Invalid {label}: {values[name]} ({error})") from None
    return method
