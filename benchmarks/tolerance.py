"""Measure the errors of correct computations of ``A^{-p} G``, for the constant of the tolerance.

    python benchmarks/tolerance.py            # prints; about a minute
    python benchmarks/tolerance.py --write    # puts the tables into docs/tolerance.md

float32 results of NumPy and PyTorch are compared with float64 results of the same formula, whose error is smaller by
2^-29. Both precisions of this library are compared with the 50-digit vectors.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from array_api_compat import array_namespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from precond_ref.conformance import check, tolerance, vectors
from precond_ref.conformance.subjects import Reference
from precond_ref.numerics import roots, sketch
from precond_ref.numerics.template import arrays_of, stacked

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tolerance.md"
KAPPAS = (1e0, 1e1, 1e2, 1e3, 1e4)
SIZES = (2, 4, 8, 16, 32, 64, 128)
DRAWS = 8
U = tolerance.UNIT_ROUNDOFF["float32"]
LIBRARIES: dict[str, Callable[[np.ndarray], Any]] = {
    "NumPy": lambda a: a.astype(np.float32),
    "PyTorch": lambda a: torch.tensor(a, dtype=torch.float32),
}


def spectra(size: int, kappa: float) -> Iterator[np.ndarray]:
    """Yield eigenvalues between 1 / kappa and 1: even in the logarithm, all small but one, all large but one."""
    yield np.geomspace(1 / kappa, 1, size)
    yield np.where(np.arange(size) == 0, 1, 1 / kappa)
    yield np.where(np.arange(size) == 0, 1 / kappa, 1)


def orthogonal(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a random orthogonal matrix."""
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


def one_sided(exponent: float) -> Callable[[Any], Any]:
    """Return the function ``(G G^T)^{-p} G``: the statistic is fresh."""
    return lambda g: roots.power(g @ g.T, -exponent) @ g


def two_sided(g: Any) -> Any:
    """Return ``(G G^T)^{-1/4} G (G^T G)^{-1/4}``: fresh, with the total p = 1/2."""
    return roots.power(g @ g.T, -0.25) @ g @ roots.power(g.T @ g, -0.25)


def error(formula: Callable[..., Any], library: str, *inputs: np.ndarray) -> float:
    """Return the normwise relative error of the float32 result, in unit roundoffs; inputs are float32 numbers."""
    inputs = tuple(a.astype(np.float32).astype(np.float64) for a in inputs)
    truth = formula(*inputs)
    got = np.asarray(formula(*(LIBRARIES[library](a) for a in inputs)), np.float64)
    return float(np.linalg.norm(got - truth) / np.linalg.norm(truth)) / U


def worst(kappa: float, measure: Callable[[np.random.Generator, np.ndarray, str], float]) -> np.ndarray:
    """Return the largest error for each size, over spectra, draws and libraries."""
    rng = np.random.default_rng(0)
    return np.array(
        [
            max(
                measure(rng, w, library)
                for w in spectra(size, kappa)
                for _ in range(DRAWS if size < 64 else 2)
                for library in LIBRARIES
            )
            for size in SIZES
        ]
    )


def fresh(formula: Callable[[Any], Any]) -> Callable[[np.random.Generator, np.ndarray, str], float]:
    """Return a measure of errors on gradients whose ``G G^T`` has the spectrum."""

    def measure(rng: np.random.Generator, w: np.ndarray, library: str) -> float:
        size = len(w)
        return error(formula, library, (orthogonal(rng, size) * np.sqrt(w)) @ orthogonal(rng, size))

    return measure


def bare(exponent: float) -> Callable[[np.random.Generator, np.ndarray, str], float]:
    """Return a measure of errors of the root itself."""

    def measure(rng: np.random.Generator, w: np.ndarray, library: str) -> float:
        q = orthogonal(rng, len(w))
        return error(lambda a: roots.power(a, -exponent), library, (q * w) @ q.T)

    return measure


def stale(exponent: float) -> Callable[[np.random.Generator, np.ndarray, str], float]:
    """Return a measure of errors of the root applied to a gradient that is not part of the statistic."""

    def measure(rng: np.random.Generator, w: np.ndarray, library: str) -> float:
        q = orthogonal(rng, len(w))
        h = rng.standard_normal((len(w), len(w)))
        return error(lambda a, g: roots.power(a, -exponent) @ g, library, (q * w) @ q.T, h)

    return measure


PROBLEMS = {  # name: measure, and the power of kappa in the tolerance
    "fresh, (G Gᵀ)^(-1/2) G": (fresh(one_sided(0.5)), 1.0),
    "fresh, (G Gᵀ)^(-1/4) G": (fresh(one_sided(0.25)), 0.75),
    "fresh, L^(-1/4) G R^(-1/4)": (fresh(two_sided), 1.0),
    "bare, A^(-1/2)": (bare(0.5), 1.0),
    "bare, A^(-1/4)": (bare(0.25), 1.0),
    "stale, A^(-1/2) H": (stale(0.5), 1.0),
}


def powers() -> tuple[str, str, float]:
    """Return tables of errors in unit roundoffs by condition number, and of ``C = error / (u kappa^power)`` by size."""
    heads = " | ".join(f"κ = {k:g}" for k in KAPPAS)
    lines = [f"| problem | {heads} | slope | tolerance's |", "|---" * (len(KAPPAS) + 3) + "|"]
    sizes = ["| problem | " + " | ".join(f"n = {n}" for n in SIZES) + " |", "|---" * (len(SIZES) + 1) + "|"]
    largest = 0.0
    for name, (measure, power) in PROBLEMS.items():
        errors = np.array([worst(kappa, measure) for kappa in KAPPAS])  # (kappas, sizes)
        tops = np.max(errors, axis=1)
        slope = np.polyfit(np.log10(KAPPAS[1:]), np.log10(tops[1:]), 1)[0]
        constants = np.max(errors / np.array(KAPPAS)[:, None] ** power, axis=0)
        largest = max(largest, float(np.max(constants)))
        lines.append(f"| {name} | {' | '.join(f'{e:.0f}' for e in tops)} | {slope:.2f} | {power:.2f} |")
        sizes.append(f"| {name} | {' | '.join(f'{c:.1f}' for c in constants)} |")
    return "\n".join(lines), "\n".join(sizes), largest


def sums() -> str:
    """Return a table of errors of ``G G^T`` with sums of n terms, added one after the other and by the libraries."""
    lengths, rng = (8, 32, 128, 512, 2048), np.random.default_rng(0)
    lines = ["| sum | " + " | ".join(f"n = {n}" for n in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    grads = [rng.standard_normal((20, 8, n)).astype(np.float32) for n in lengths]

    def in_sequence(g: np.ndarray) -> np.ndarray:
        return np.cumsum(g[..., :, None, :] * g[..., None, :, :], axis=-1, dtype=np.float32)[..., -1]

    ways = {"one after the other": in_sequence} | {
        name: lambda g, make=make: np.asarray(make(g) @ make(g).mT) for name, make in LIBRARIES.items()
    }
    for name, way in ways.items():
        errors = []
        for g in grads:
            truth = g.astype(np.float64) @ g.astype(np.float64).mT
            errors.append(max(map(np.linalg.norm, way(g) - truth)) / min(map(np.linalg.norm, truth)) / U)
        lines.append(f"| {name} | {' | '.join(f'{e:.1f}' for e in errors)} |")
    return "\n".join(lines)


def growth() -> str:
    """Return a table of errors of a sketch after 1, 2, 4, ... updates by a row: the 99 % quantile of 200 streams."""
    updates, rng = [1, 2, 4, 8, 16, 32], np.random.default_rng(0)
    lines = ["| sketch | library | " + " | ".join(f"t = {t}" for t in updates) + " |", "|---" * 8 + "|"]
    for d, size in ((3, 9), (5, 3), (16, 8)):
        rows = rng.integers(-8, 9, (updates[-1], 200, 1, d)).astype(np.float64)
        for library, narrow in LIBRARIES.items():
            errors = []
            empty = stacked(sketch.empty(d, size), (200,))
            low, high = (arrays_of(empty, x, array_namespace(x)) for x in (narrow(rows[0]), rows[0]))
            for row in rows:
                low, high = sketch.update(low, narrow(row), size=size), sketch.update(high, row, size=size)
                got, want = (np.asarray((s.basis * s.eigenvalues[:, None, :]) @ s.basis.mT) for s in (low, high))
                distance, length = (np.linalg.norm(a, axis=(1, 2)) for a in (got - want, want))
                errors.append(np.quantile(distance[length > 0] / length[length > 0], 0.99) / U)
            cells = " | ".join(f"{errors[t - 1]:.0f}" for t in updates)
            lines.append(f"| d = {d}, {'nothing cut' if size > d else f'size {size}'} | {library} | {cells} |")
    return "\n".join(lines)


def on_vectors() -> tuple[str, float]:
    """Return the table of the largest ratios of error to tolerance of this library, and the largest of all."""
    constructors = list(dict.fromkeys(case.constructor for case in vectors.cases(kind="trace")))
    lines = ["| library | precision | results | largest error / tolerance | at |", "|---|---|---|---|---|"]
    largest = 0.0
    for backend in ("numpy", "torch"):
        for dtype in tolerance.UNIT_ROUNDOFF:
            found = [
                r
                for name in constructors
                for r in check(Reference(backend, dtype), name, level=1, dtype=dtype, diagnose=False, deep=True).results
                if r.gap
            ]
            top = max(found, key=lambda r: r.gap.ratio)  # type: ignore[union-attr]
            assert top.gap is not None
            largest = max(largest, top.gap.ratio)
            where = f"{top.id}, {top.gap.quantity}"
            lines.append(f"| {backend} | {dtype} | {len(found)} | {top.gap.ratio:.2f} | {where} |")
    return "\n".join(lines), largest


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/tolerance.md")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    condition, size, constant = powers()
    steps, added = growth(), sums()
    table, ratio = on_vectors()
    print(f"{condition}\n\n{size}\n\nlargest C: {constant:.1f}\n\n{added}\n\n{steps}\n\n{table}")
    print(f"\nlargest ratio: {ratio:.2f}")
    if write:
        page = PAGE.read_text(encoding="utf-8")
        for name, text in {
            "condition": condition,
            "size": size,
            "sums": added,
            "growth": steps,
            "vectors": table,
        }.items():
            pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
            page = re.sub(pattern, rf"\g<1>{text}\n\g<2>", page, flags=re.DOTALL)
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
