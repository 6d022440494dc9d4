"""The methods of :mod:`precond_ref` as optax gradient transformations.

For every method there are ``scale_by_<name>(...)`` and ``<name>(learning_rate, ...)``, made from its signature, and so
for every preset (``scale_by_asgo_theory``). The name is the class's in lower case, with the prefixes Full, IF, RF and S
set off: ``agd``, ``full_adagrad``. JAX and optax are imported at the first use.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from precond_ref.protocol import Method
from precond_ref.registry import list_methods

OPTIONS = ("takes", "fallback", "dtype", "join", "join_axis")
"""Keyword arguments of every function, besides the method's own; `scale_by` explains them."""


def _factories() -> dict[str, Callable[..., Method]]:
    """Return the factory of each name: the method's class, or a preset of it."""
    found: dict[str, Callable[..., Method]] = {}
    for class_name, method in list_methods().items():
        name = re.sub(r"^(Full|IF|RF|S)(?=AdaGrad|AdamW|RMSProp|Shampoo)", r"\1_", class_name).lower()
        found[name] = method
        found |= {f"{name}_{preset}": getattr(method, preset) for preset in method.presets}
    return found


def _static(factory: Callable[..., Method]) -> tuple[str, ...]:
    """Return the arguments that must be Python values: those not annotated as a float, and the options."""
    fields = inspect.signature(factory).parameters.values()
    return (*(field.name for field in fields if "float" not in str(field.annotation)), *OPTIONS)


def _decays(factory: Callable[..., Method]) -> bool:
    """Return True if the method has a weight decay of its own."""
    return "weight_decay" in inspect.signature(factory).parameters


STATIC_ARGS: Mapping[str, tuple[str, ...]] = {
    function: static
    for name, factory in _factories().items()
    for function, static in (
        (f"scale_by_{name}", _static(factory)),
        (name, _static(factory) + (() if _decays(factory) else ("mask",))),
    )
}
"""By function name, the ``static_args`` of ``optax.inject_hyperparams(function, static_args=...)``."""

__all__ = ["STATIC_ARGS", "ScaleByState", "scale_by", *STATIC_ARGS]


def __getattr__(name: str) -> Any:
    factories = _factories()
    base = name.removeprefix("scale_by_")
    if base not in factories and name not in ("ScaleByState", "scale_by"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from precond_ref_jax import transformation
    except ModuleNotFoundError as error:
        if error.name not in ("jax", "optax"):
            raise
        raise ModuleNotFoundError(
            f"precond_ref_jax needs {error.name}: python -m pip install 'precond-ref[jax]'", name=error.name
        ) from error
    if base in factories:
        make = transformation.make_optimizer if name == base else transformation.make_scale_by
        globals()[name] = make(name, factories[base])
    else:
        globals()[name] = getattr(transformation, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
