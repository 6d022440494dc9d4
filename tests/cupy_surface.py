"""CuPy's names and signatures without a GPU: `SURFACE` computes in NumPy what CuPy would be asked for.

CuPy imports without a GPU, but makes no array. Each name is looked up in `array_api_compat.cupy`, each call's arguments
are bound to the signature found there, and arrays have the operators and attributes of `cupy.ndarray`. What CuPy lacks
raises as it does there: AttributeError for a name, TypeError for an argument. The numbers are NumPy's: those of CuPy
itself, and its dtypes, only a GPU shows.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

import array_api_compat.cupy
import array_api_compat.numpy
import cupy
import numpy as np

DEVICE = object()
"""Where all arrays are: a name that means nothing to NumPy."""
_NAMES = (*operator.__all__, "bool", "complex", "float", "int", "len")
OPERATORS = {f"__{side}{name.rstrip('_')}__" for name in _NAMES for side in ("", "r")} & {*dir(cupy.ndarray)}


class Array:
    """A NumPy array with the operators and attributes of `cupy.ndarray`, as far as the array API has them."""

    __array_ufunc__ = None  # NumPy's operators leave the work to ours

    def __init__(self, values: Any) -> None:
        self._values = np.asarray(values)

    def __array_namespace__(self, *, api_version: str | None = None) -> Surface:
        return SURFACE

    def __array__(self, *args: Any, **options: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def get(self) -> np.ndarray:
        """The values on the host."""
        return self._values

    def __getattr__(self, name: str) -> Any:
        getattr(cupy.ndarray, name)
        value = DEVICE if name == "device" else getattr(self._values, name)
        if callable(value):
            raise AttributeError(f"cupy.ndarray.{name} is no method of the array API, and shows no signature")
        return _wrapped(value)


def _operator(name: str) -> Callable[..., Any]:
    def operate(self: Array, *others: Any) -> Any:
        return _wrapped(getattr(self._values, name)(*_values(others)))

    return operate


for _name in OPERATORS:
    setattr(Array, _name, _operator(_name))


def _wrapped(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return Array(value)
    if isinstance(value, (tuple, list)):
        parts = [_wrapped(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _values(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(map(_values, value))
    if isinstance(value, Array):
        return value._values
    if hasattr(type(value), "__array_namespace__") and not isinstance(value, np.generic):  # NumPy's numbers are taken
        raise TypeError(f"Unsupported type {type(value)}")
    return "cpu" if value is DEVICE else value


class Surface:
    """The namespace ``cupy``, whose functions are those of ``numpy``; ``used`` has the names asked for."""

    def __init__(self, cupy: ModuleType, numpy: ModuleType) -> None:
        self.__name__ = f"surface of {cupy.__name__}"
        self.used: set[str] = set()
        self._cupy, self._numpy = cupy, numpy

    def __getattr__(self, name: str) -> Any:
        theirs, ours = getattr(self._cupy, name), getattr(self._numpy, name)
        self.used.add(name)
        if isinstance(theirs, type) or not callable(theirs):
            return theirs  # dtypes, numbers

        def call(*args: Any, **options: Any) -> Any:
            check_arguments(name, theirs, args, options)
            if name == "asarray":  # which takes NumPy's arrays too
                args = (_values(args[0]) if isinstance(args[0], Array) else args[0], *args[1:])
                return Array(np.array(ours(*args, **_values_of(options))))
            return _wrapped(ours(*_values(args), **_values_of(options)))

        return call


def _values_of(options: dict[str, Any]) -> dict[str, Any]:
    return {key: _values(value) for key, value in options.items()}


def check_arguments(name: str, function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """TypeError, ValueError for arguments that CuPy's ``function`` does not take."""
    if isinstance(function, cupy.ufunc):
        if len(args) != function.nin or options:
            raise TypeError(f"{name}() takes {function.nin} arrays, got {len(args)} and {sorted(options)}")
        return
    signature = inspect.signature(function)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]  # what is passed on is unknown
    signature.replace(parameters=named).bind(*args, **options)
    if name == "solve" and args[0].shape[:-1] != args[1].shape[:-1]:  # CuPy stacks both alike, or raises
        raise ValueError(f"solve() of arrays of shapes {args[0].shape} and {args[1].shape}")


SURFACE = Surface(array_api_compat.cupy, array_api_compat.numpy)
SURFACE.linalg = Surface(array_api_compat.cupy.linalg, array_api_compat.numpy.linalg)
