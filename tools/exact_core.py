"""The library's own source run with mpmath: an array namespace over NumPy's object arrays, and a loader.

`load` imports a copy of ``precond_ref``. In the copy a float literal is an mpmath number of exactly its value, a
quotient of integers has all digits, and ``float`` and ``math`` are those of mpmath; the other text does not change.
PyPI's mparray is such a namespace too, but takes ten times as long, lacks ``linalg``, and has the ``finfo`` of float64.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.abc
import importlib.machinery
import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mpmath as mp
import numpy as np

import precond_ref
from precond_ref.conformance import arithmetic
from precond_ref.conformance.arithmetic import TINY, exact

FLOAT = np.dtype(object)
INFO = SimpleNamespace(bits=64, eps=TINY, smallest_normal=mp.mpf(2) ** -1022, max=mp.mpf(2) ** 1023)


class Array:
    """An array of mpmath numbers, of bools or of integers; every operator and function makes a new one."""

    def __init__(self, data: Any) -> None:
        data = np.asarray(data)
        self.data = exact(data) if data.dtype.kind == "f" else data

    dtype = property(lambda self: self.data.dtype)
    shape = property(lambda self: self.data.shape)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    device = "cpu"

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return NAMESPACE

    def __getitem__(self, key: Any) -> Array:
        return Array(self.data[key])

    def __bool__(self) -> bool:
        return bool(self.data)


def _operator(function: Callable[..., Any], swapped: bool = False) -> Callable[..., Array]:
    def method(self: Array, *others: Any) -> Array:
        operands = [self.data, *map(_data, others)]
        return Array(function(*operands[::-1] if swapped else operands))

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or"):
    _function = getattr(operator, f"{_name}_" if _name in ("and", "or") else _name)
    setattr(Array, f"__{_name}__", _operator(_function))
    setattr(Array, f"__r{_name}__", _operator(_function, swapped=True))
for _name in ("neg", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Array, f"__{_name}__", _operator(getattr(operator, _name)))


def _data(value: Any) -> Any:
    """Return the NumPy array of an `Array`; a number becomes 0-D, because mpmath is slow to refuse NumPy's operands."""
    if isinstance(value, Array):
        return value.data
    return np.asarray(arithmetic.number(value) if isinstance(value, float) else value)


def _wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a NumPy function that takes `Array`, also in sequences."""

    def wrapper(*args: Any, **kwargs: Any) -> Array:
        given = [[a.data for a in x] if isinstance(x, list) else x.data if isinstance(x, Array) else x for x in args]
        return Array(function(*given, **kwargs))

    return wrapper


def _each(function: Callable[[Any], Any], kind: type = object) -> Callable[[Array], Array]:
    return lambda x: Array(np.asarray(np.frompyfunc(function, 1, 1)(x.data), kind))


def _batched(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of matrices that takes stacks of matrices."""

    def wrapper(*args: Array, **kwargs: Any) -> Any:
        stack = args[0].shape[:-2]
        results = [function(*(a.data[i] for a in args)) for i in np.ndindex(*stack)]
        if not isinstance(results[0], tuple):
            return Array(np.stack(results).reshape(*stack, *results[0].shape))
        parts = zip(*results, strict=True)
        return tuple(Array(np.stack(part).reshape(*stack, *part[0].shape)) for part in parts)

    return wrapper


def _matrix(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of mpmath's matrices that takes object arrays."""
    return lambda *args: np.array(function(*(mp.matrix(a.tolist()) for a in args)).tolist(), dtype=object)


def _qr(matrix: Any) -> tuple[Any, Any]:
    """Return Q and R by the method of Gram and Schmidt, done twice; for a dependent column any unit vector."""
    q, r = exact(np.zeros(matrix.shape)), exact(np.zeros(matrix.shape))
    for j in range(len(matrix)):
        rest, size = _beyond(q[:, :j], matrix[:, j])
        r[j, j] = size
        if size <= TINY * arithmetic.norm(matrix[:, j]):
            rest, size = max((_beyond(q[:, :j], unit) for unit in exact(np.eye(len(matrix)))), key=lambda pair: pair[1])
        q[:, j] = rest / size
    return q, r  # of which the diagonal alone is right


def _beyond(q: Any, vector: Any) -> tuple[Any, Any]:
    """Return the part of a vector that is orthogonal to the columns of ``q``, and its length."""
    for _ in range(2):
        vector = vector - q @ (q.T @ vector) if q.shape[1] else vector
    return vector, arithmetic.norm(vector)


def _zeros(shape: tuple[int, ...], dtype: Any = FLOAT, device: Any = None) -> Any:
    return Array(exact(np.zeros(shape)) if dtype == FLOAT else np.zeros(shape, dtype))


NUMPY = ("abs", "sum", "max", "min", "all", "mean", "logical_and", "reshape", "moveaxis", "expand_dims", "take", "tril",
         "broadcast_to", "triu", "flip", "any", "sign")  # fmt: skip
NAMESPACE = ModuleType("exact_core.NAMESPACE")
vars(NAMESPACE).update(
    float32=FLOAT,
    float64=FLOAT,
    bfloat16=FLOAT,
    int32=np.dtype(np.int32),
    isdtype=lambda dtype, kind: kind == "real floating" and dtype == FLOAT,
    finfo=lambda dtype: INFO,
    astype=lambda x, dtype, copy=True: Array(exact(x.data) if dtype == FLOAT else x.data.astype(dtype)),
    zeros=_zeros,
    zeros_like=lambda x, dtype=None: _zeros(x.shape, dtype or x.dtype),
    ones_like=lambda x: _zeros(x.shape) + 1.0,
    full_like=lambda x, value, dtype=None: _zeros(x.shape) + value,
    where=lambda c, x, y: Array(np.where(c.data, _data(x), _data(y))),
    maximum=lambda x, y: Array(np.maximum(_data(x), _data(y))),
    minimum=lambda x, y: Array(np.minimum(_data(x), _data(y))),
    sqrt=_each(mp.sqrt),
    log=_each(mp.log),
    expm1=_each(mp.expm1),
    isfinite=_each(mp.isfinite, bool),
    argsort=lambda x, *, axis, descending=False, stable=True: Array(
        np.argsort(-x.data if descending else x.data, axis, kind="stable")
    ),
    take_along_axis=lambda x, index, *, axis: Array(np.take_along_axis(x.data, index.data, axis)),
    concat=_wrapped(np.concatenate),
    permute_dims=_wrapped(np.transpose),
    matrix_transpose=_wrapped(lambda x: np.swapaxes(x, -1, -2)),
    **{name: _wrapped(getattr(np, name)) for name in NUMPY},
    linalg=SimpleNamespace(
        eigh=_batched(arithmetic.eigh),
        svd=_batched(arithmetic.svd),
        qr=_batched(_qr),
        svdvals=_batched(lambda a: arithmetic.svd(a)[1]),
        solve=_batched(_matrix(lambda a, b: mp.inverse(a) * b)),
        diagonal=_wrapped(lambda a: np.diagonal(a, axis1=-2, axis2=-1)),
        cholesky=_batched(_matrix(mp.cholesky)),
        trace=_wrapped(lambda a: np.trace(a, axis1=-2, axis2=-1)),
        matrix_power=lambda a, n: functools.reduce(operator.matmul, [a] * n),
    ),
)

# ---- the copy of the library ----------------------------------------------------------------------------------------


class _Exactly(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return _call("_number", node) if isinstance(node.value, float) else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        return _call("_quotient", node.left, node.right) if isinstance(node.op, ast.Div) else node

    def visit_FormattedValue(self, node: ast.FormattedValue) -> ast.expr:  # mpmath's numbers take no format
        self.generic_visit(node)
        node.value = _call("_printed", node.value) if node.format_spec else node.value
        return node


@functools.cache
def _compiled(text: str, name: str) -> Any:
    return compile(ast.fix_missing_locations(_Exactly().visit(ast.parse(text))), name, "exec")


def _call(name: str, *args: ast.expr) -> ast.expr:
    return ast.copy_location(ast.Call(ast.Name(name, ast.Load()), list(args), []), args[0])


def _quotient(a: Any, b: Any) -> Any:
    return mp.mpf(a) / b if isinstance(a, int) else a / b


def _printed(value: Any) -> Any:
    return float(value) if isinstance(value, mp.mpf) else value


class _Float(type):
    """The ``float`` of the copy."""

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, (float, mp.mpf))

    def __call__(cls, value: Any) -> Any:
        return mp.mpf(value) if isinstance(value, str) else arithmetic.number(value)


GLOBALS = {"_number": arithmetic.number, "_quotient": _quotient, "_printed": _printed, "float": _Float("float", (), {})}
MATH = SimpleNamespace(
    **vars(math)
    | {name: getattr(mp, name) for name in ("sqrt", "log", "expm1", "isfinite")}
    | {"inf": mp.mpf("inf"), "nan": mp.mpf("nan")}
)


class _Loader(importlib.machinery.SourceFileLoader):
    changes: dict[str, tuple[str, str]]

    def get_code(self, fullname: str) -> Any:
        text = self.get_source(fullname) or ""
        if fullname in self.changes:
            old, new = self.changes.pop(fullname)
            if text.count(old) != 1:
                raise LookupError(f"{old!r} occurs {text.count(old)} times in {fullname}")
            text = text.replace(old, new)
        return _compiled(text, f"{self.path} (exact)")

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(GLOBALS)
        super().exec_module(module)
        if "math" in vars(module):
            vars(module)["math"] = MATH


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, changes: Mapping[str, tuple[str, str]]) -> None:
        self.changes = dict(changes)

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname.split(".")[0] != "precond_ref":
            return None
        root = [str(Path(precond_ref.__file__).parents[1])]
        spec = importlib.machinery.PathFinder.find_spec(fullname, path or root)
        if spec and spec.origin:
            spec.loader = _Loader(fullname, spec.origin)
            spec.loader.changes = self.changes
        return spec


@contextmanager
def _set_aside() -> Iterator[None]:
    """Context manager that takes the library's modules out of ``sys.modules`` and puts them back."""
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "precond_ref"}
    for name in ours:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "precond_ref"]:
            del sys.modules[name]
        sys.modules.update(ours)


def load(changes: Mapping[str, tuple[str, str]] | None = None) -> ModuleType:
    """Return the library at any precision; ``changes`` has a planted ``(old, new)`` by module."""
    finder = _Finder(changes or {})
    with _set_aside(), mp.workdps(arithmetic.DIGITS):
        sys.meta_path.insert(0, finder)
        try:
            core = importlib.import_module("precond_ref")
            for name in core.__all__:  # a method is imported when it is named
                getattr(core, name)
        finally:
            sys.meta_path.remove(finder)
    if finder.changes:
        raise LookupError(f"not loaded: {', '.join(finder.changes)}")
    return core
