"""IF-Shampoo, with its plausible mistakes; several are those of the authors' code at some time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from precond_ref.conformance.arithmetic import eigh, norm
from precond_ref.conformance.variants import Variants, Walk, due, multiply, note, spread, times, unfold
from precond_ref.conformance.variants.root_free import (
    FACTOR_EXCLUSIVE,
    FACTOR_FLAGS,
    GAUSS_SEIDEL,
    HeavyBall,
    factor_dims,
    in_order,
)

FLAGS = {
    **{k: v for k, v in FACTOR_FLAGS.items() if k != "accumulated"},
    "trace-mean": "with mean traces of the other factors' K^T K instead of traces",
    "damping-identity": "with damping times the identity instead of K_n^T K_n",
    "no-transpose": "with K_n instead of K_n^T contracting the gradient, as in early versions of the authors' code",
    "transposed": "with K_n^T K_n instead of K_n K_n^T in the direction",
    "factor-dropped": "with K_n - beta2 m_n, without the factor K_n, as in early versions of the authors' code",
    "factor-right": "with K_n - beta2 m_n K_n, the factor on the right",
    "no-half": "without the factor 1/2 of m_n",
    "gamma-ignored": "without - I in m_n: the curvature is summed, not averaged",
    "exponential": "with the matrix exponential of -beta2 m_n instead of its first two terms",
    "heavy-ball-riemannian": "with m_n = alpha2 m_n + new, without the weight 1 - alpha2, as in SINGD",
    "names-swapped": "with beta2 and riemannian_momentum interchanged, as the authors' prototype names them",
    "riemannian-ignored": "without Riemannian momentum",
    "clip-ignored": "without the clip",
    "clip-always": "with the clip, though it is off",
    "clip-normalises": "with m_n divided by its norm also where that is below 1",
    "clip-max": "with the largest entry of m_n in the place of its Frobenius norm, as in SINGD",
    "clip-spectral": "with the spectral norm of m_n in the place of its Frobenius norm",
    "clip-factor": "with the norm of K_n in the place of that of m_n, as in an interim version of the authors' code",
    "clip-stored": "with the clipped m_n stored as the Riemannian momentum",
    "clip-new": "with the clip on what enters the Riemannian momentum instead of on m_n",
    "structure-dense": "with dense factors, whatever the structure",
    "structure-half": "with one-sided parts of the structure (a triangle, a rectangle) not doubled",
    "structure-mirrored": "with the transposed structure",
    "structure-first": "with the first axis's structure on all axes",
    "toeplitz-sum": "with sums instead of means along the diagonals of Toeplitz factors",
    "toeplitz-norm": "with each diagonal of a Toeplitz factor counted once in the norm",
    "blocks-transposed": "with block-diagonal factors' K in the place of K^T, as in singd 0.0.5, which takes blocks "
    "to be symmetric",
}


def _members(structure: str, d: int) -> tuple[np.ndarray, bool]:
    """Return which entries are free, and whether diagonals are constant."""
    name, _, rest = structure.partition("(")
    sizes = [int(s) for s in rest.rstrip(")").split(",") if s]
    i, j = np.indices((d, d))
    if name == "diagonal":
        return i == j, False
    if name == "block-diagonal":
        return i // sizes[0] == j // sizes[0], False
    if name.startswith("tri"):
        return (i >= j if name.startswith("tril") else i <= j), name.endswith("toeplitz")
    if name == "hierarchical":
        top = min(sizes[0], d)
        bottom = d - min(sizes[1], d - top)
        return (i < top) | ((i >= bottom) & (j >= top)) | (i == j), False
    return np.full((d, d), True), False


def _projected(x: np.ndarray, structure: str, flags: frozenset[str]) -> np.ndarray:
    free, constant = _members(structure, len(x))
    if "structure-mirrored" in flags:
        free = free.T
    m = np.where(free, x / 2 if "structure-half" in flags else x / (1 + free.T), 0.0)
    if constant:
        average = np.sum if "toeplitz-sum" in flags else np.mean
        sign = -1 if free[-1, 0] else 1
        m = sum(average(np.diagonal(m, sign * k)) * np.eye(len(x), k=sign * k) for k in range(len(x)))
    return m if "no-half" not in flags else 2 * m


def _length(m: np.ndarray, k: np.ndarray, constant: bool, flags: frozenset[str]) -> Any:
    measured = k if "clip-factor" in flags else m
    if constant and "toeplitz-norm" in flags:
        measured = m[:, 0] if m[-1, 0] or not m[0, -1] else m[0]
    if "clip-max" in flags:
        return np.abs(m).max()
    return norm(measured, 2 if "clip-spectral" in flags else None)


def _exponential(x: np.ndarray) -> np.ndarray:
    """Return the matrix exponential of ``x``, of norm 1 at most, by its series."""
    total = term = np.eye(len(x))
    for k in range(1, 30):
        term = term @ x / k
        total = total + term
    return total


def if_shampoo(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """IF-Shampoo."""
    dims, beta2, alpha2 = factor_dims(shape, flags), config["beta2"], config["riemannian_momentum"]
    structures = (config["structure"],) * len(dims) if isinstance(config["structure"], str) else config["structure"]
    if "structure-dense" in flags:
        structures = ("dense",) * len(dims)
    if "structure-first" in flags or len(structures) != len(dims):
        structures = (structures[0],) * len(dims)
    swapped = ["blocks-transposed" in flags and s.startswith("block") for s in structures]
    total, damping = math.prod(dims), 0.0 if "damping-ignored" in flags else config["damping"]
    b = config["batch_size"]
    b = 1.0 if "batch-ignored" in flags else b**2 if "batch-squared" in flags else b
    if "weights-swapped" in flags:
        beta2 = 1 - beta2
    elif "names-swapped" in flags:
        beta2, alpha2 = alpha2, beta2
    if "riemannian-ignored" in flags:
        alpha2 = 0.0
    weight = 1.0 if "heavy-ball-riemannian" in flags else 1 - alpha2
    clips = (config["clip"] or "clip-always" in flags) and "clip-ignored" not in flags
    factors, momenta = [np.eye(d) for d in dims], [np.zeros((d, d)) for d in dims]
    ball, out = HeavyBall(config, shape, flags), None

    def contraction(k: np.ndarray, n: int) -> np.ndarray:
        return k if swapped[n] or "no-transpose" in flags else k.T

    def gram(k: np.ndarray, n: int) -> np.ndarray:
        return k @ k.T if swapped[n] else k.T @ k

    def clipped(m: np.ndarray, k: np.ndarray, structure: str) -> np.ndarray:
        length = _length(m, k, structure.endswith("toeplitz"), flags)
        return m / (length if "clip-normalises" in flags and length else max(1.0, length))

    for t in times(flags):
        g, x = yield out
        g = ball.gradient(g, x)
        before = list(factors)
        if due(t, config["every"], flags):
            given = factors if flags & GAUSS_SEIDEL else list(factors)
            axes = enumerate(zip(dims, list(factors), structures, strict=True))
            for n, (d, k, structure) in in_order(axes, flags):
                p, trace = np.reshape(g, dims), 1.0
                for j, other in enumerate(given):
                    p = multiply(p, contraction(other, j), j)
                    if j != n and "trace-missing" not in flags:
                        trace *= np.trace(gram(other, j)) / (dims[j] if "trace-mean" in flags else 1)
                own = np.eye(d) if "damping-identity" in flags else gram(k, n)
                h = b * unfold(p, n) @ unfold(p, n).T + damping * trace * own
                h = h if "share-missing" in flags else h * d / total
                m = _projected(h - (0.0 if "gamma-ignored" in flags else 1.0) * np.eye(d), structure, flags)
                if clips and "clip-new" in flags:
                    m = clipped(m, k, structure)
                m = momenta[n] = alpha2 * momenta[n] + weight * m
                if clips and "clip-stored" in flags:
                    momenta[n] = clipped(m, k, structure)
                step = beta2 * (clipped(m, k, structure) if clips and "clip-new" not in flags else m)
                if "factor-dropped" in flags:
                    factors[n] = k - step
                elif "factor-right" in flags:
                    factors[n] = k - step @ k
                elif "exponential" in flags:
                    factors[n] = k @ _exponential(-step)
                else:
                    factors[n] = k - k @ step
                note(lambda k: spread(eigh(k @ k.T)[0]), factors[n])
        u = np.reshape(ball.averaged(g), dims)
        for n, k in enumerate(before if "factors-after" in flags else factors):
            if "transposed" in flags:
                k = k.T
            u = multiply(multiply(u, k if swapped[n] else k.T, n), k, n)
        kept = {f"factors.{n}": k for n, k in enumerate(factors)}
        if config["riemannian_momentum"]:
            kept |= {f"momenta.{n}": m for n, m in enumerate(momenta)}
        out = ball.direction(u.reshape(shape), x), {**kept, **ball.state()}


VARIANTS = {
    "IFShampoo": Variants(
        if_shampoo,
        FLAGS,
        (
            *FACTOR_EXCLUSIVE,
            frozenset({"factor-dropped", "factor-right", "exponential"}),
            frozenset({"heavy-ball-riemannian", "riemannian-ignored"}),
            frozenset({"names-swapped", "riemannian-ignored", "weights-swapped"}),
            frozenset(f for f in FLAGS if f.startswith("clip") or f == "toeplitz-norm"),
            frozenset({"structure-dense", "structure-first", "structure-mirrored"}),
        ),
    )
}
