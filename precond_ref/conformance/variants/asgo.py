"""ASGO and DASGO, practical and theory, with their plausible mistakes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from precond_ref.conformance.arithmetic import eigh, norm, real, sqrt
from precond_ref.conformance.variants import (
    EVERY,
    LATE,
    PRECONDITIONED,
    Variants,
    Walk,
    decayed,
    due,
    ema,
    note,
    outside,
    power,
    rivals,
    spread,
    stale,
    times,
)

AVERAGES = {
    "sum": "with a plain sum instead of an average as the statistic",
    "weight-missing": "with V_t = beta2 V_{t-1} + new, without the weight 1 - beta2",
    "corrected": "with the statistic divided by 1 - beta2^t",
    "statistic-after": "with the statistic before this gradient",
    "statistic-of-momentum": "with the statistic of M_t instead of the raw gradient",
    "heavy-ball": "with M_t = beta1 M_{t-1} + G_t, without the weight 1 - beta1",
    "momentum-corrected": "with M_t divided by 1 - beta1^t",
    "momentum-ignored": "without momentum",
    "momentum-of-preconditioned": "with momentum on the preconditioned gradient instead of on the gradient",
    "nesterov": "with beta1 M_t + (1 - beta1) G_t in the place of M_t",
    "betas-swapped": "with beta1 and beta2 interchanged",
    "rms-ignored": "without scaling to the root mean square",
    "rms-max": "with the fixed factor rms sqrt(max(m, n)), as in Muon, instead of scaling to the root mean square",
    "rms-frobenius": "with U / ||U||_F times rms, without sqrt(m n)",
    "rms-rows": "with U scaled to the Frobenius norm rms sqrt(m) instead of rms sqrt(m n)",
    "rms-longer": "with U scaled to the Frobenius norm rms sqrt(max(m, n)) instead of rms sqrt(m n)",
    "rms-columns": "with U scaled to the Frobenius norm rms sqrt(n) instead of rms sqrt(m n)",
    "zero-nan": "with NaN for a zero update: it divides by ||U||_F = 0",
    "started-whole": "with V started at the first G G^T, not weighted by 1 - beta2",
    **LATE,
    **PRECONDITIONED,
}
EXPONENTS = frozenset({"exponent-quarter", "exponent-one"})
EXPRESS = (  # Polar Express (Amsel et al., 2025)
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
ASGO_FLAGS = {
    "rms-per-head": "with each head scaled to the root mean square by itself",
    "eps-outside": "with eps outside the root, (V^{1/2} + eps I)^{-1} instead of (V + eps I)^{-1/2}",
    "eps-ignored": "without eps (pseudo-inverse)",
    "eps-squared": "with eps^2 in the place of eps",
    "eps-at-start": "with eps I as the statistic's start instead of added under each root",
    "exponent-quarter": "with exponent -1/4 instead of -1/2",
    "exponent-one": "with exponent -1 instead of -1/2",
    "other-side": "with the statistic on the other side",
    "always-left": "with the statistic always on the left",
    "always-right": "with the statistic always on the right",
    "tie-left": "with the left side for a square matrix under side='smaller'",
    "diagonal": "with the diagonal of V only",
    "gram-mean": "with G G^T divided by the number of its terms",
    "heads-ignored": "without the blocks of heads",
    "newton-schulz": "with Newton-Schulz iterations for the inverse root",
    "polar-express": "with Polar Express iterations for the inverse root (eps only in their norm)",
    **EVERY,
    **AVERAGES,
}


def asgo(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """Algorithm 2."""
    rows, columns = shape
    tie = rows <= columns if "tie-left" in flags else rows < columns
    left = config["heads"] is not None or config["side"] == "left" or (config["side"] == "smaller" and tie)
    if "always-left" in flags or "always-right" in flags:
        left = "always-left" in flags
    elif "other-side" in flags:
        left = not left
    heads = config["heads"] if config["heads"] and left and "heads-ignored" not in flags else 1
    eps = _eps(config["eps"], flags)
    if "eps-squared" in flags:
        eps = eps**2
    start, eps = (eps, 0.0) if "eps-at-start" in flags else (0.0, eps)

    def product(x: np.ndarray) -> np.ndarray:
        blocks = x.reshape(heads, rows // heads, columns) if left else x.T[None]
        return blocks @ blocks.swapaxes(-1, -2) / (blocks.shape[-1] if "gram-mean" in flags else 1)

    def root(gram: np.ndarray) -> np.ndarray:
        if "diagonal" in flags:
            gram = gram * np.eye(gram.shape[-1])
        solver = config["root"]
        if flags & {"newton-schulz", "polar-express"}:
            solver = "newton_schulz" if "newton-schulz" in flags else "polar_express"
        if solver != "eigh" and not flags & {*EXPONENTS, "eps-outside"}:
            return np.stack([_iterated(solver, block, eps, config["root_steps"]) for block in gram])
        exponent = -0.25 if "exponent-quarter" in flags else -1.0 if "exponent-one" in flags else -0.5
        function = outside if "eps-outside" in flags else power
        return np.stack([function(block, exponent, eps) for block in gram])

    def apply(p: np.ndarray, x: np.ndarray) -> np.ndarray:
        return (p @ x.reshape(heads, rows // heads, columns)).reshape(shape) if left else x @ p[0]

    size = rows // heads if left else columns
    kept = np.tile(np.eye(size), (heads, 1, 1))

    def precondition(t: int, gram: np.ndarray, x: np.ndarray) -> np.ndarray:
        nonlocal kept
        if due(t, config["every"], flags):
            kept = root(gram)
        return (kept @ x.reshape(heads, rows // heads, columns)).reshape(shape) if left else x @ kept[0]

    def state(gram: np.ndarray) -> dict[str, np.ndarray]:
        arrays = {"gram": gram} | ({"root": kept} if config["every"] > 1 else {})
        return {key: a if config["heads"] is not None else a[0] for key, a in arrays.items()}

    return _averaged(config, shape, flags, np.tile(start * np.eye(size), (heads, 1, 1)), product, precondition, state)


def _iterated(solver: str, gram: np.ndarray, eps: float, steps: int) -> np.ndarray:
    """Return ``(V + eps I)^{-1/2}`` by a coupled iteration; in Polar Express eps enters only the norm."""
    identity = np.eye(len(gram))
    damped = gram + eps * identity
    note(lambda: spread([w for w in eigh(gram if solver == "polar_express" else damped)[0] if w > 0]))
    if solver == "coupled_newton":
        scale = real(1.5, gram) / (norm(damped) or 1.0)
        m, x = damped * scale, identity * sqrt(scale)
        for _ in range(steps):
            t = (3 * identity - m) / 2
            x, m = x @ t, t @ t @ m
        return x
    if solver == "newton_schulz":
        size, shifted, table = norm(gram) + eps or 1.0, damped, [(2.0, -1.5, 0.5)] * steps
    else:
        safety = real(1.01, gram)
        size, shifted = safety * norm(damped) or 1.0, gram
        table = [EXPRESS[min(i, 7)] for i in range(steps)]
        table = [
            (a / safety, b / safety**3, c / safety**5) if i < 7 else (a, b, c) for i, (a, b, c) in enumerate(table)
        ]
    y, z = shifted / size, identity
    for a, b, c in table:
        zy = z @ y
        p = b * zy + c * zy @ zy
        y, z = a * y + y @ p, a * z + p @ z
    return z / sqrt(size)


DASGO_FLAGS = {
    "eps-outside": "with eps outside the root, sqrt(v) + eps instead of sqrt(v + eps)",
    "eps-ignored": "without eps (pseudo-inverse)",
    "no-root": "with v + eps instead of its square root in the denominator",
    "rows": "with one scale per row instead of per column",
    "mean": "with means instead of sums of the squares of a column",
    "elementwise": "with one scale per entry instead of per column",
    "amsgrad": "with the running maximum of v, as in AMSGrad",
    **AVERAGES,
}


def dasgo(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """Algorithm 4."""
    eps = _eps(config["eps"], flags)

    def product(x: np.ndarray) -> np.ndarray:
        if "elementwise" in flags:
            return x * x
        axis = 1 if "rows" in flags else 0
        total = np.sum(x * x, axis=axis, keepdims=True)
        return total / shape[axis] if "mean" in flags else total

    largest = 0 * product(np.zeros(shape))

    def precondition(t: int, v: np.ndarray, x: np.ndarray) -> np.ndarray:
        nonlocal largest
        largest = np.maximum(largest, v)
        used = largest if "amsgrad" in flags else v
        return x / _infinite_if_zero(_scale(used, eps, "eps-outside" not in flags, flags))

    return _averaged(config, shape, flags, 0 * product(np.zeros(shape)), product, precondition, lambda v: {"v": v[0]})


def _averaged(
    config: Mapping[str, Any],
    shape: tuple[int, ...],
    flags: frozenset[str],
    v: np.ndarray,
    product: Callable[[np.ndarray], np.ndarray],
    precondition: Callable[[int, np.ndarray, np.ndarray], np.ndarray],
    state: Callable[[np.ndarray], dict[str, np.ndarray]],
) -> Walk:
    """Averages, momentum and scaling around ``product`` (the new term of V) and ``precondition``."""
    beta1, beta2, rms = config["beta1"], config["beta2"], config["rms"]
    if "betas-swapped" in flags:
        beta1, beta2 = beta2, beta1
    if "momentum-ignored" in flags:
        beta1 = 0.0
    m, out = np.zeros(shape), None
    for t in times(flags):
        g, x = yield out
        after = "momentum-of-preconditioned" in flags
        if not after:
            m = beta1 * m + g if "heavy-ball" in flags else ema(m, g, beta1)
        new = product(m if "statistic-of-momentum" in flags else g)
        old, v = v, v + new if "sum" in flags else beta2 * v + new if "weight-missing" in flags else ema(v, new, beta2)
        if t == 1 and "started-whole" in flags:
            v = new
        used = old if stale(t, flags) else v
        if "corrected" in flags:
            used = used / (1 - beta2**t)
        if after:
            u = precondition(t, used, decayed(config, flags, g, x))
            m = beta1 * m + u if "heavy-ball" in flags else ema(m, u, beta1)
            u = ema(u, m, 1 - beta1) if "nesterov" in flags else m
        else:
            moved = ema(g, m, 1 - beta1) if "nesterov" in flags else m
            u = precondition(t, used, decayed(config, flags, moved, x))
        if "momentum-corrected" in flags:
            u = u / (1 - beta1**t)
        if rms is not None and "rms-max" in flags:
            u = u * rms * sqrt(real(max(shape), u))
        elif rms is not None and "rms-ignored" not in flags:
            parts = []
            for part in np.split(u, config["heads"] if "rms-per-head" in flags and config["heads"] else 1):
                entries = shape[0] if "rms-rows" in flags else shape[1] if "rms-columns" in flags else part.size
                entries = max(shape) if "rms-longer" in flags else entries
                size = 1.0 if "rms-frobenius" in flags else sqrt(real(entries, u))
                parts.append(part * (rms * size / (norm(part) if "zero-nan" in flags else norm(part) or 1.0)))
            u = np.concatenate(parts)
        out = u, {"m": m} | state(v)


ASGO_THEORY_FLAGS = {
    "eps-inside": "with eps under the root, (V + eps I)^{-1/2} instead of (V^{1/2} + eps I)^{-1}",
    "eps-ignored": "without eps (pseudo-inverse)",
    "exponent-quarter": "with exponent -1/4 instead of -1/2",
    "exponent-one": "with exponent -1 instead of -1/2",
    "other-side": "with the statistic on the other side",
    "smaller-side": "with the statistic on the smaller side (right for a square matrix)",
    "diagonal": "with the diagonal of V only",
    "gram-mean": "with G G^T divided by the number of its terms",
    "average": "with the mean of the products instead of their sum",
    "statistic-after": "with the statistic before this gradient",
    **LATE,
    **PRECONDITIONED,
    "no-accumulation": "with this gradient's product only, nothing accumulated",
}


def asgo_theory(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """Algorithm 1."""
    eps = _eps(config["eps"], flags)
    left = config["side"] == "left"
    if "other-side" in flags:
        left = not left
    elif "smaller-side" in flags:
        left = shape[0] < shape[1]
    exponent = -0.25 if "exponent-quarter" in flags else -1.0 if "exponent-one" in flags else -0.5
    size = shape[0] if left else shape[1]
    gram, out = np.zeros((size, size)), None
    for t in times(flags):
        g, x = yield out
        new = g @ g.T if left else g.T @ g
        if "gram-mean" in flags:
            new = new / (shape[1] if left else shape[0])
        old, gram = gram, new if "no-accumulation" in flags else gram + new
        used = (old if stale(t, flags) else gram) / (t if "average" in flags else 1)
        if "diagonal" in flags:
            used = used * np.eye(size)
        root = power(used, exponent, eps) if "eps-inside" in flags else outside(used, exponent, eps)
        moved = decayed(config, flags, g, x)
        out = root @ moved if left else moved @ root, {"gram": gram}


DASGO_THEORY_FLAGS = {
    "eps-inside": "with eps under the root",
    "eps-ignored": "without eps (pseudo-inverse)",
    "no-root": "with d + eps instead of sqrt(d) + eps in the denominator",
    "columns": "with one scale per column instead of per row",
    "mean": "with means instead of sums of the squares of a row",
    "average": "with the mean over the steps instead of the sum",
    "elementwise": "with one scale per entry instead of per row",
    "statistic-after": "with the statistic before this gradient",
    **LATE,
    **PRECONDITIONED,
    "no-accumulation": "with this gradient's squares only, nothing accumulated",
}


def dasgo_theory(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """One scale per row, summed."""
    eps, axis = _eps(config["eps"], flags), 0 if "columns" in flags else 1
    d: Any = 0.0
    out = None
    for t in times(flags):
        g, x = yield out
        new = g * g if "elementwise" in flags else np.sum(g * g, axis=axis, keepdims=True)
        if "mean" in flags:
            new = new / shape[axis]
        old, d = d, new if "no-accumulation" in flags else d + new
        used = (old if stale(t, flags) else d) / (t if "average" in flags else 1)
        u = decayed(config, flags, g, x) / _infinite_if_zero(_scale(used, eps, "eps-inside" in flags, flags))
        out = u, {"d": d[:, 0] if d.shape[1] == 1 else d}


def _eps(eps: float, flags: frozenset[str]) -> float:
    return 0.0 if "eps-ignored" in flags else eps


def _scale(square: np.ndarray, eps: float, inside: bool, flags: frozenset[str]) -> np.ndarray:
    if "no-root" in flags:
        return square + eps
    return sqrt(square + eps) if inside else sqrt(square) + eps


def _infinite_if_zero(denominator: np.ndarray) -> np.ndarray:
    return np.where(denominator == 0, np.inf, denominator)


AVERAGING = (
    frozenset({"sum", "weight-missing"}),
    frozenset({"sum", "corrected"}),
    frozenset({"sum", "betas-swapped"}),
    *rivals(
        {"momentum-ignored"},
        {"momentum-of-preconditioned", "heavy-ball", "momentum-corrected", "nesterov", "statistic-of-momentum"},
    ),
    frozenset({"momentum-of-preconditioned", "statistic-of-momentum"}),
    frozenset({"rms-ignored", "rms-max", "rms-frobenius", "rms-rows", "rms-columns", "rms-longer", "rms-per-head"}),
    frozenset({"statistic-after", "statistic-late"}),
    frozenset({"sum", "weight-missing", "started-whole"}),
    *rivals({"zero-nan"}, {"rms-ignored", "rms-max"}),
)
VARIANTS = {
    "ASGO": Variants(asgo, ASGO_FLAGS, (EXPONENTS, frozenset({"newton-schulz", "polar-express"}),
        *rivals({"newton-schulz", "polar-express"}, {"eps-outside", *EXPONENTS}),
        frozenset({"eps-ignored", "eps-squared"}), frozenset({"eps-ignored", "eps-outside", "eps-at-start"}),
        frozenset({"other-side", "always-left", "always-right", "tie-left"}), frozenset(EVERY), *AVERAGING)),
    "ASGO.theory": Variants(asgo_theory, ASGO_THEORY_FLAGS, (EXPONENTS, frozenset({"eps-inside", "eps-ignored"}),
        frozenset({"other-side", "smaller-side"}), frozenset({"average", "no-accumulation"}),
        frozenset({"statistic-after", "statistic-late", "no-accumulation"}))),
    "DASGO": Variants(dasgo, DASGO_FLAGS, (frozenset({"eps-outside", "eps-ignored"}),
        frozenset({"eps-outside", "no-root"}), frozenset({"rows", "elementwise"}), frozenset({"mean", "elementwise"}),
        *AVERAGING)),
    "DASGO.theory": Variants(dasgo_theory, DASGO_THEORY_FLAGS, (frozenset({"eps-inside", "eps-ignored"}),
        frozenset({"eps-inside", "no-root"}), frozenset({"columns", "elementwise"}), frozenset({"mean", "elementwise"}),
        frozenset({"average", "no-accumulation"}),
        frozenset({"statistic-after", "statistic-late", "no-accumulation"}))),
}  # fmt: skip
