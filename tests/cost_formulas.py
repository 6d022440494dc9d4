"""What a method keeps and computes for ONE parameter, by hand: the test of what `precond_ref.cost` counts.

`work` has a formula for some methods; the others are compared with what PyTorch runs only. Tags in parentheses are
those of the equations in the method's module. Left out, as by the count: elementwise arithmetic and sums, and what is
done for hard values only, the fallback of `roots.solve`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import singledispatch
from typing import Any, NamedTuple

from precond_ref.fields import is_zero
from precond_ref.methods.asgo import ASGO
from precond_ref.methods.mbf import MBF
from precond_ref.methods.root_free import RFShampoo
from precond_ref.methods.shampoo import Shampoo
from precond_ref.methods.sketchy import SAdaGrad, SShampoo

Shape = tuple[int, ...]


class Stored(NamedTuple):
    """An array of the state."""

    name: str
    shape: Shape
    read: Fraction | int = 1
    """Updates from one reading to the next, on average."""
    written: int = 1


class Product(NamedTuple):
    """``batch`` matrix products (m, k) @ (k, n), done every ``every`` updates."""

    batch: int
    m: int
    k: int
    n: int
    every: int = 1


class Factorization(NamedTuple):
    """``batch`` factorizations of (m, n) matrices; "solve": of (m, m) with n right sides."""

    kind: str
    batch: int
    m: int
    n: int
    every: int = 1


class Work(NamedTuple):
    """State and linear algebra of a method on one parameter."""

    stored: tuple[Stored, ...]
    products: tuple[Product, ...] = ()
    factorizations: tuple[Factorization, ...] = ()


@singledispatch
def work(method: Any, shape: Shape) -> Work:
    """State, products and factorizations of ``method`` on a parameter of ``shape``."""
    raise TypeError(f"no cost formula for {type(method).__name__}")


# ---- parts that several methods share -------------------------------------------------------------------------------


def _kept(name: str, shape: Shape, every: int) -> list[Stored]:
    """A `roots.Root` of matrices of ``shape``."""
    return [Stored(f"{name}.basis", shape, written=every), Stored(f"{name}.eigenvalues", shape[:-1], written=every)]


def _sketch(name: str, d: int, q: int, size: int, solver: str, every: int) -> Work:
    """`sketch.update` of q new rows (A), (S), (rho), and the sketch that it renews."""
    k = min(d, size)
    fields: list[tuple[str, Shape]] = [("basis", (d, k)), ("eigenvalues", (k,)), ("escaped", ())]
    fields += [("least", ()), ("lost", ())] if solver == "nystrom" else []
    stored = tuple(Stored(f"{name}.{field}", shape, written=every) for field, shape in fields)
    rows = k + q
    if solver == "nystrom" and 2 * (size + 8) <= min(d, rows):
        return _nystrom(d, rows, k, size + 8, every)._replace(stored=stored)
    if solver != "gram64":
        tall = (rows, d) if 2 * d < rows else (d, rows)
        return Work(stored, (), (Factorization("svd", 1, *tall, every),))
    if d > rows:
        products = (Product(1, rows, d, rows, every), Product(1, d, rows, k, every))
        return Work(stored, products, (Factorization("eigh", 1, rows, rows, every),))
    return Work(stored, (Product(1, d, rows, d, every),), (Factorization("eigh", 1, d, d, every),))


def _nystrom(d: int, n: int, k: int, p: int, every: int) -> Work:
    """`nystrom.update` of a factor (d, n): (2), (3), (6), E, (8) with 12 steps, and (9) to (11) by blocks of 64."""
    m = min(d, n)
    products = [(2, n, d, p), (2, d, n, p), (1, d, p, k), (1, k, p, n), (1, d, k, n), (1, m, max(d, n), m)]
    products += [(13, 1, m, m), *((1, 1, *shape) for j in range(1, 12) for shape in ((m, j), (j, m))), (1, 12, m, 12)]
    factors = [("qr", 3, d, p), ("qr", 2, n, p), ("svd", 1, p, p), ("eigh", 1, 12, 12)]
    while m:
        b = min(64, m)
        m -= b
        products += [(1, m, b, b), (1, m, b, m)]
        factors += [("eigh", 1, b, b)]
    return Work((), tuple(Product(*x, every) for x in products), tuple(Factorization(*x, every) for x in factors))


def _sketched(prefix: str, dims: Shape, size: int, solver: str, every: int) -> Work:
    """A sketch for every axis, renewed and applied: U^T X, what of X is outside U, then U times the scaled U^T X."""
    parts = []
    for i, (d, rest) in enumerate(_axes(dims)):
        part = _sketch(prefix if prefix == "sketch" else f"{prefix}.{i}", d, rest, size, solver, every)
        k = min(d, size)
        applied = (Product(1, k, d, rest), Product(2, d, k, rest))
        parts.append(part._replace(products=(*part.products, *applied)))
    return _together(*parts)


def _axes(dims: Shape) -> Iterator[tuple[int, int]]:
    """Size of each axis and the product of the others."""
    for i, d in enumerate(dims):
        yield d, math.prod(dims[:i] + dims[i + 1 :])


def _squeezed(shape: Shape) -> Shape:
    return tuple(d for d in shape if d != 1) or (1,)


def _together(*parts: Work) -> Work:
    return Work(*(tuple(x for part in parts for x in part[i]) for i in range(3)))  # type: ignore[arg-type]


def _like(shape: Shape, *names: str) -> tuple[Stored, ...]:
    return tuple(Stored(name, shape) for name in names)


# ---- matrices -------------------------------------------------------------------------------------------------------


@work.register
def _(method: ASGO, shape: Shape) -> Work:
    m, n = shape
    h = method.heads or 1
    left = method.heads is not None or method.side == "left" or (method.side == "smaller" and m < n)
    p, rest = (m // h, n) if left else (n, m)
    gram = (h, p, p) if method.heads is not None else (p, p)
    stored = [Stored("m", shape), Stored("gram", gram)]  # (M), (V)
    if method.every > 1:
        kept = _kept("root", gram, method.every) if method.root == "eigh" else [Stored("root", gram, 1, method.every)]
        stored.extend(kept)  # (P)
    times = 2 if method.root == "eigh" else 1  # Q^T M and Q times it, or P M
    products = [Product(h, p, rest, p)]  # (V)
    products.append(Product(times * h, p, p, rest) if left else Product(times, rest, p, p))  # (U)
    if method.root == "eigh":
        return Work(tuple(stored), tuple(products), (Factorization("eigh", h, p, p, method.every),))  # (P)
    each = {"polar_express": 4, "newton_schulz": 4, "coupled_newton": 3}[method.root]
    products.append(Product(h * each * method.root_steps, p, p, p, method.every))  # (P)
    return Work(tuple(stored), tuple(products), ())


@work.register
def _(method: MBF, shape: Shape) -> Work:
    if method.kind == "diagonal":
        return Work(_like(shape, "m", "statistic"))  # (n), (v)
    lead, (d1, d2) = shape[:-2], shape[-2:]
    if method.kind == "conv":
        count, s = math.prod(lead), d1 * d2
    else:
        count, s = (d1, d2) if method.layout == "per_output" else (d2, d1)
    averaged = method.kind == "fc" and method.average
    matrices, columns = (1, count) if averaged else (count, 1)
    statistic = (s, s) if averaged else (*lead, s, s) if method.kind == "conv" else (count, s, s)
    t1, t2 = method.statistics_every, method.inverse_every
    used = 1 / (Fraction(1, t1) + Fraction(1, t2) - Fraction(1, math.lcm(t1, t2)))  # by (F) or (P)
    stored = [Stored("m", shape), Stored("statistic", statistic, read=used, written=t1)]  # (M), (F)
    if t2 > 1:
        stored.extend(_kept("inverse", statistic, t2))  # (P)
    products = [Product(1, s, count, s, t1)] if averaged and count > 1 else []  # (F)
    if t2 == 1:
        return Work(tuple(stored), tuple(products), (Factorization("solve", matrices, s, columns),))  # (P), (p)
    products.append(Product(2 * matrices, s, s, columns))  # (p)
    return Work(tuple(stored), tuple(products), (Factorization("eigh", matrices, s, s, t2),))  # (P)


# ---- tensors --------------------------------------------------------------------------------------------------------


@work.register
def _(method: Shampoo, shape: Shape) -> Work:
    parts = []
    for i, (d, rest) in enumerate(_axes(shape)):
        stored = [Stored(f"grams.{i}", (d, d))]
        if method.every > 1:
            stored.extend(_kept(f"roots.{i}", (d, d), method.every))
        products = (Product(1, d, rest, d), Product(2, d, d, rest))
        parts.append(Work(tuple(stored), products, (Factorization("eigh", 1, d, d, method.every),)))
    return _together(*parts)


@work.register
def _(method: RFShampoo, shape: Shape) -> Work:
    every, dims = method.every, _squeezed(shape)
    parts = []
    for n, (d, rest) in enumerate(_axes(dims)):
        stored = (
            Stored(f"factors.{n}", (d, d), read=every, written=every),  # (8)
            Stored(f"inverses.{n}", (d, d), written=every),  # (9)
        )
        whitened = [Product(1, e, e, r, every) for j, (e, r) in enumerate(_axes(dims)) if j != n]  # (7)
        products = (*whitened, Product(1, d, rest, d, every), Product(1, d, d, d, every), Product(1, d, d, rest))
        inverse = (Factorization("cholesky", 1, d, d, every), Factorization("solve", 1, d, d, every))
        parts.append(Work(stored, products, inverse))
    return _together(*parts, Work(_like(shape, *([] if is_zero(method.momentum) else ["buffer"]))))  # (3)


# ---- sketches -------------------------------------------------------------------------------------------------------


@work.register
def _(method: SAdaGrad, shape: Shape) -> Work:
    return _sketched("sketch", shape, method.size, method.solver, 1)


@work.register
def _(method: SShampoo, shape: Shape) -> Work:
    return _sketched("sketches", shape, method.size, method.solver, method.every)
