"""State and work of a method for ONE parameter, counted by running its step on shapes, without allocating arrays.

`Counting` is an array-API namespace whose arrays, `Shaped`, have a shape and a dtype and no entries. It records matrix
products and factorizations; every other function makes the shape of its result. There are three rules:

* A condition on entries is false: work for rare values only, such as the fallback of `roots.solve`, is not counted.
* An update reads an array of the state if it computes with the array, before or after renewing it. It writes the array
  if it returns another one in its place. Reshaping, transposing and indexing do not count as computing.
* Adding ``0.0 * x``, which marks values that are not finite, reads and writes nothing.
"""

from __future__ import annotations

import math
from collections import Counter, namedtuple
from collections.abc import Callable, Iterable
from enum import IntEnum
from fractions import Fraction
from functools import cache, partial
from itertools import combinations, product, zip_longest
from types import SimpleNamespace
from typing import Any, NamedTuple

from precond_ref.numerics.template import leaves
from precond_ref.protocol import Method

Shape = tuple[int, ...]


class Stored(NamedTuple):
    """An array of the state."""

    name: str
    """Path in the state, such as ``grams.0``."""
    shape: Shape
    read: Fraction
    """Share of the updates that read the array."""
    written: Fraction


class Operation(NamedTuple):
    """``batch`` matrix products (m, k) @ (k, n), or factorizations of (m, n) matrices."""

    kind: str
    """"product", "eigh", "svd", "qr", "cholesky" or "solve" (of (m, m), n right sides)."""
    batch: int
    m: int
    n: int
    k: int = 0

    @property
    def flops(self) -> Fraction:
        """A product: 2 m k n. Golub and Van Loan, Matrix Computations (4th edition), 8.3.5, figure 8.6.1, 4.2.5, 3.2:

        Symmetric QR with vectors 9 n^3, thin R-SVD with both factors 6 m n^2 + 20 n^3 for m >= n, Cholesky n^3 / 3,
        LU and n substitutions 2/3 m^3 + 2 m^2 n. LAPACK Working Note 41: QR with its thin factor 4 m n^2 - 4/3 n^3
        for m >= n, else 2 m^2 n + 2/3 m^3. Leading terms; the algorithms in use differ from them by small factors.
        """
        _, batch, m, n, k = self
        long, short = max(m, n), min(m, n)
        thirds = {
            "product": 6 * m * k * n,
            "eigh": 27 * short**3,
            "svd": 18 * long * short**2 + 60 * short**3,
            "qr": 12 * m * n**2 - 4 * n**3 if m >= n else 6 * m**2 * n + 2 * m**3,
            "cholesky": short**3,
            "solve": 2 * m**3 + 6 * m**2 * n,
        }
        return Fraction(batch * thirds[self.kind], 3)


class Work(NamedTuple):
    """State and linear algebra of a method on one parameter."""

    stored: tuple[Stored, ...]
    done: dict[Operation, Fraction]
    """Number of times that each operation is done per update."""


def count(method: Method, shape: Shape) -> Work:
    """Return state, products and factorizations of ``method`` on a parameter of ``shape``.

    ValueError for a shape that the method refuses, and for a step that uses a function that `Counting` lacks.
    """
    done: dict[Operation, Fraction] = {}
    stored: dict[str, Stored] = {}
    for due, share in schedule(method.periods):
        operations, arrays = count_one(method, shape, due)
        for each, times in operations.items():
            done[each] = done.get(each, Fraction(0)) + times * share
        for name, size, read, written in arrays:
            known = stored.get(name, Stored(name, size, Fraction(0), Fraction(0)))
            stored[name] = Stored(name, size, known.read + share * read, known.written + share * written)
    return Work(tuple(stored.values()), done)


def count_one(method: Method, shape: Shape, due: Any) -> tuple[Counter[Operation], list[tuple[str, Shape, bool, bool]]]:
    """Return the operations of one update, and for each array of the state name, shape, and if it is read, written."""
    xp = Counting()
    grad, param = xp.zeros(shape), xp.zeros(shape)
    try:
        state = method.init(param)._replace(step=10**9)  # a late step: the count is for the long run
        _, after = method.update(grad, state, param, refresh=due, xp=xp)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"the step of {type(method).__name__} cannot be counted: {error}") from error
    both = zip(leaves(state._replace(step=None)), leaves(after._replace(step=None)), strict=True)
    pairs = [(name, old.whole, new.whole) for (name, old), (_, new) in both]
    return xp.done, [(name, old.shape, old.used or new.used, new is not old) for name, old, new in pairs]


@cache
def schedule(periods: int | tuple[int, ...]) -> tuple[tuple[Any, Fraction], ...]:
    """Return the possible values of `Method.due` with their shares of the updates: t renews if the period divides t."""
    each, found = periods if isinstance(periods, tuple) else (periods,), []
    for due in product((True, False), repeat=len(each)):
        renewed, kept = ([k for k, d in zip(each, due, strict=True) if d is wanted] for wanted in (True, False))
        some = (subset for r in range(len(kept) + 1) for subset in combinations(kept, r))
        share = sum((Fraction((-1) ** len(others), math.lcm(*renewed, *others)) for others in some), Fraction(0))
        if share:
            found.append((due if isinstance(periods, tuple) else due[0], share))
    return tuple(found)


# ---- arrays without entries -----------------------------------------------------------------------------------------


DType = IntEnum("DType", "bool int32 int64 float32 float64", start=0)  # in the order of promotion


class Shaped:
    """An array without entries, or a view of one."""

    __slots__ = ("dtype", "mark", "shape", "used", "whole", "xp")
    __array_ufunc__ = None  # NumPy's numbers then leave the operators to this class
    device = None

    def __init__(self, xp: Counting, shape: Shape, dtype: DType, of: Shaped | None = None):
        self.xp, self.shape, self.dtype = xp, shape, dtype
        self.whole: Shaped = self if of is None else of.whole
        self.mark: bool = of is not None and of.mark  # true for 0.0 * x, which only marks non-finite values
        self.used = False  # true if a computation has read it

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))

    def __array_namespace__(self, *, api_version: str | None = None) -> Counting:
        return self.xp

    def __bool__(self) -> bool:
        return False

    def __add__(self, other: Any) -> Shaped:
        shape = broadcast(self.shape, getattr(other, "shape", ()))
        for kept, added in ((self, other), (other, self)):
            if getattr(added, "mark", False) and isinstance(kept, Shaped) and shape == kept.shape:
                return kept
        return self.xp.made(self, other, shape=shape)

    def __mul__(self, other: Any) -> Shaped:
        return self.xp.made(self, other, mark=isinstance(other, (int, float)) and other == 0)

    __radd__, __rmul__ = __add__, __mul__

    def __matmul__(self, other: Shaped) -> Shaped:
        return self.xp.matmul(self, other)

    def __getitem__(self, key: Any) -> Shaped:
        keys = list(key) if isinstance(key, tuple) else [key]
        at = next((i for i, k in enumerate(keys) if k is ...), len(keys))
        keys[at : at + 1] = [slice(None)] * (self.ndim - sum(k is not None and k is not ... for k in keys))
        sizes, shape = iter(self.shape), []
        for k in keys:
            if isinstance(k, slice):
                shape.append(len(range(*k.indices(next(sizes)))))
            elif k is None:
                shape.append(1)
            else:
                range(next(sizes))[k]  # IndexError, TypeError
        return Shaped(self.xp, tuple(shape), self.dtype, self)


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Iterable) else (value,)


def broadcast(*shapes: Shape) -> Shape:
    """Return the common shape; ValueError if there is none."""
    if all(shape == shapes[0] or not shape for shape in shapes):
        return shapes[0]
    columns = zip_longest(*(shape[::-1] for shape in shapes), fillvalue=1)
    sizes = [set(column) - {1} or {1} for column in columns][::-1]
    if any(len(size) > 1 for size in sizes):
        raise ValueError(f"shapes {', '.join(map(str, shapes))} do not fit together")
    return tuple(size.pop() for size in sizes)


def _reshaped(shape: Shape, new: Any) -> Shape:
    size, known = math.prod(shape), abs(math.prod(_tuple(new)))
    made = tuple(size // max(known, 1) if d == -1 else d for d in _tuple(new))
    if math.prod(made) != size:
        raise ValueError(f"shape {shape} cannot become {new}")
    return made


def _moved(shape: Shape, source: int, destination: int) -> Shape:
    rest = list(shape)
    rest.insert(destination % len(shape), rest.pop(source))
    return tuple(rest)


def _reduced(shape: Shape, *, axis: Any = None, keepdims: Any = False, **_: Any) -> Shape:
    gone = {a % len(shape) for a in (range(len(shape)) if axis is None else _tuple(axis))}
    return tuple(1 if i in gone else d for i, d in enumerate(shape) if keepdims or i not in gone)


VIEWS: dict[str, Callable[..., Shape]] = {
    "reshape": _reshaped,
    "moveaxis": _moved,
    "permute_dims": lambda s, axes: tuple(s[axis] for axis in axes),
    "matrix_transpose": lambda s: (*s[:-2], s[-1], s[-2]),
    "expand_dims": lambda s, *, axis=0: _moved((1, *s), 0, axis),
    "squeeze": lambda s, axis: _reduced(s, axis=axis),
    "broadcast_to": lambda s, shape: tuple(shape),
    "diagonal": lambda s: (*s[:-2], min(s[-2:])),
}
"""Functions from the shape of an array to the shape of its view."""
SUMS = "sum prod mean max min var std vector_norm all any argmax argmin"
REDUCTIONS: dict[str, Callable[..., Shape]] = dict.fromkeys(SUMS.split(), _reduced)
REDUCTIONS["trace"] = lambda s: s[:-2]
REDUCTIONS["matrix_norm"] = lambda s, *, keepdims=False: _reduced(s, axis=(-2, -1), keepdims=keepdims)
for _name, _shape in (VIEWS | REDUCTIONS).items():
    _shape.__qualname__ = _name  # so that a TypeError names it
FACTORS: dict[str, tuple[Callable[..., Any], Callable[..., tuple[Shape, ...]]]] = {
    "eigh": (namedtuple("Eigh", "eigenvalues eigenvectors"), lambda m, n: ((n,), (n, n))),
    "svd": (namedtuple("SVD", "U S Vh"), lambda m, n, **_: ((m, min(m, n)), (min(m, n),), (min(m, n), n))),
    "qr": (namedtuple("QR", "Q R"), lambda m, n: ((m, min(m, n)), (min(m, n), n))),
    "cholesky": (lambda lower: lower, lambda m, n: ((m, n),)),
}
"""The result type of a factorization of (m, n) matrices, and the shapes of its parts."""
ENTRIES = """abs exp expm1 log log1p log2 sqrt square sign sin cos tanh round floor ceil negative reciprocal tril triu
flip roll add subtract multiply divide pow floor_divide remainder maximum minimum clip copysign hypot"""
TRUTHS = """isfinite isinf isnan signbit equal not_equal less less_equal greater greater_equal logical_and logical_or
logical_not logical_xor all any"""
DTYPES = (
    dict.fromkeys(ENTRIES.split())
    | dict.fromkeys(TRUTHS.split(), DType.bool)
    | dict.fromkeys(["argmax", "argmin"], DType.int64)
)
OPERATORS = "sub rsub truediv rtruediv pow rpow floordiv rfloordiv mod rmod neg abs invert and rand or ror xor rxor"


for _name in OPERATORS.split():
    setattr(Shaped, f"__{_name}__", lambda self, *other: self.xp.made(self, *other))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Shaped, f"__{_name}__", lambda self, other: self.xp.made(self, other, dtype=DType.bool))


class Counting:
    """The namespace of `Shaped`; it also has the functions of ``linalg``."""

    __name__ = __name__
    bool, int32, int64, float32, float64 = DType
    inf, nan, pi, e, newaxis = math.inf, math.nan, math.pi, math.e, None
    linalg = property(lambda self: self)

    def __init__(self) -> None:
        self.done: Counter[Operation] = Counter()

    def __getattr__(self, name: str) -> Any:
        if name in VIEWS:
            return lambda x, *given, **options: Shaped(self, VIEWS[name](x.shape, *given, **options), x.dtype, x)
        if name in DTYPES and name not in REDUCTIONS:
            return lambda *operands, **_: self.made(*operands, dtype=DTYPES[name])
        if name in REDUCTIONS or name in FACTORS:
            return partial(self.reduced if name in REDUCTIONS else self.factorized, name)
        raise AttributeError(f"the count lacks the array function {name}")

    def made(self, *operands: Any, shape: Any = None, dtype: Any = None, mark: Any = False) -> Shaped:
        """Return a new array computed from all ``operands``, by default of their common shape and dtype."""
        arrays = [x for x in operands if isinstance(x, Shaped)]
        for x in arrays:
            x.whole.used = True
        shape = broadcast(*(getattr(x, "shape", ()) for x in operands)) if shape is None else shape
        dtype = max([x.dtype for x in arrays], default=DType.float32) if dtype is None else dtype
        result = Shaped(self, shape, dtype)
        result.mark = mark
        return result

    def isdtype(self, dtype: DType, kind: Any) -> Any:
        own = ("real floating", "numeric") if dtype >= DType.float32 else ("integral", "signed integer", "numeric")
        return any(each in (own if dtype else ("bool",)) for each in ((kind,) if isinstance(kind, str) else kind))

    def finfo(self, dtype: DType) -> Any:
        bits, digits, least = (32, 23, -126) if dtype == DType.float32 else (64, 52, -1022)
        largest = (2 - 2.0**-digits) * 2.0 ** (1 - least)
        return SimpleNamespace(bits=bits, eps=2.0**-digits, smallest_normal=2.0**least, max=largest, min=-largest)

    def zeros(self, shape: Any, value: Any = 0, *, dtype: Any = None, device: Any = None) -> Shaped:
        return Shaped(self, _tuple(shape), DType.float32 if dtype is None else dtype)

    def zeros_like(self, x: Shaped, value: Any = 0, *, dtype: Any = None, device: Any = None) -> Shaped:
        return self.zeros(x.shape, dtype=x.dtype if dtype is None else dtype)

    ones = empty = full = zeros
    ones_like = empty_like = full_like = zeros_like

    def eye(self, rows: int, columns: int | None = None, **options: Any) -> Shaped:
        return self.zeros((rows, rows if columns is None else columns), **options)

    def astype(self, x: Shaped, dtype: DType, *, copy: Any = True) -> Shaped:
        return x if dtype == x.dtype and not copy else self.made(x, dtype=dtype, mark=x.mark)

    def where(self, condition: Shaped, x: Any, y: Any) -> Shaped:
        return self.made(condition, x, y, dtype=self.made(x, y).dtype)

    def concat(self, arrays: Any, *, axis: int = 0) -> Shaped:
        first, at = arrays[0].shape, axis % arrays[0].ndim
        return self.made(*arrays, shape=(*first[:at], sum(x.shape[at] for x in arrays), *first[at + 1 :]))

    def stack(self, arrays: Any, *, axis: int = 0) -> Shaped:
        return self.concat([self.expand_dims(x, axis=axis) for x in arrays], axis=axis)

    def take(self, x: Shaped, indices: Shaped, *, axis: int) -> Shaped:
        at = axis % x.ndim
        return self.made(x, indices, shape=(*x.shape[:at], *indices.shape, *x.shape[at + 1 :]), dtype=x.dtype)

    def argsort(self, x: Shaped, **_: Any) -> Shaped:
        return self.made(x, dtype=self.int64)

    def take_along_axis(self, x: Shaped, indices: Shaped, *, axis: int) -> Shaped:
        return self.made(x, indices, shape=indices.shape, dtype=x.dtype)

    def reduced(self, name: str, x: Shaped, *, dtype: Any = None, **options: Any) -> Shaped:
        dtype = DTYPES.get(name) if dtype is None else dtype
        return self.made(x, shape=REDUCTIONS[name](x.shape, **options), dtype=dtype, mark=x.mark)

    def factorized(self, kind: str, x: Shaped, **options: Any) -> Any:
        if options.get("full_matrices", kind == "svd"):
            raise TypeError("the count has svd with full_matrices=False only")
        *batch, m, n = x.shape
        self.done[Operation(kind, math.prod(batch), m, n)] += 1
        made = [self.made(x, shape=(*batch, *shape)) for shape in FACTORS[kind][1](m, n, **options)]
        return FACTORS[kind][0](*made)

    def matmul(self, x: Shaped, y: Shaped) -> Shaped:
        left, right = (1, *x.shape)[-max(x.ndim, 2) :], y.shape if y.ndim > 1 else (*y.shape, 1)
        if left[-1] != right[-2]:
            raise ValueError(f"shapes {x.shape} and {y.shape} do not multiply")
        batch = broadcast(left[:-2], right[:-2])
        self.done[Operation("product", math.prod(batch), left[-2], right[-1], left[-1])] += 1
        return self.made(x, y, shape=(*batch, *left[-2:-1] * (x.ndim > 1), *right[-1:] * (y.ndim > 1)))

    def matrix_power(self, x: Shaped, n: int) -> Shaped:
        for _ in range(n.bit_length() + n.bit_count() - 2):
            self.matmul(x, x)
        return self.made(x)

    def solve(self, x: Shaped, right: Shaped) -> Shaped:
        columns = 1 if right.ndim == 1 else right.shape[-1]
        self.done[Operation("solve", math.prod(x.shape[:-2]), x.shape[-1], columns)] += 1
        return self.made(x, right, shape=right.shape)

    def inv(self, x: Shaped) -> Shaped:
        return self.solve(x, x)
