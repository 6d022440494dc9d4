"""S-AdaGrad, S-Shampoo, its deep-learning version and the online yardsticks, with their plausible mistakes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from precond_ref.conformance.arithmetic import all_finite, norm, power, real, spacing, sqrt, svd
from precond_ref.conformance.variants import (
    EVERY,
    LATE,
    Variants,
    Walk,
    due,
    note,
    note_singular,
    quotient,
    spread,
    stale,
    times,
    unfold,
)

LARGEST_AXIS = 4096
STORED = 512  # the product of a longer axis's sketch is not given


class Sketch(NamedTuple):
    """U diag(e) U^T with orthonormal U, and the escaped mass."""

    basis: np.ndarray
    e: np.ndarray
    mass: float


SKETCH_FLAGS = {
    "size-plus-one": "with a sketch of size + 1: the cut is at the (size + 1)-th eigenvalue, as where size means rank",
    "size-minus-one": "with a sketch of size - 1",
    "undeflated": "with the size - 1 largest eigenvalues kept whole, nothing subtracted from them",
    "mass-ignored": "without the escaped mass: only the sketch is inverted",
    "mass-complement": "with the escaped mass added outside the sketch only, not to the sketch's own eigenvalues",
    "mass-outside": "with the escaped mass added outside the sketch's columns only, whose zero eigenvalues give zero",
    "mass-last": "with the mass of the last cut alone, not the sum of all",
    "mass-trace": "with the sum of all eigenvalues from the size-th on escaping, instead of the size-th",
    "statistic-after": "with the sketch before this gradient",
    **LATE,
}
DECAY_FLAGS = {
    "mass-decayed-new": "with the mass of the last cut decayed too: rho = beta2 (rho + cut) instead of beta2 rho + cut",
    "tail-sqrt": "with the escaped mass decayed by sqrt(beta2), as in the authors' tearfree code",
    "tail-kept": "with an escaped mass that is not decayed",
    "decay-sqrt": "with the sketch decayed by sqrt(beta2)",
    "decay-squared": "with the sketch decayed by beta2^2: its factor is multiplied by beta2 instead of sqrt(beta2)",
    "weight": "with 1 - beta2 times the new statistic",
}
EXCLUSIVE = (
    frozenset({"size-plus-one", "size-minus-one"}),
    frozenset({"mass-ignored", "mass-complement", "mass-outside", "mass-decayed-new", "mass-last", "mass-trace",
               "tail-sqrt", "tail-kept", "shared-tail", "mass-full", "escaped-added", "tail-decay-ignored"}),
    frozenset({"decay-sqrt", "decay-squared"}),
    frozenset({"statistic-after", *LATE, *EVERY, "every-sketches-all", "every-mean"}),
)  # fmt: skip


def empty(d: int, mass: float = 0.0) -> Sketch:
    """Return the sketch before the first row."""
    return Sketch(np.zeros((d, 1)), np.zeros(1), mass)


def state(name: str, sketch: Sketch) -> dict[str, Any]:
    """Return the unique arrays of a sketch: its product and its mass."""
    if len(sketch.basis) > STORED:
        return {}
    return {name: (sketch.basis * sketch.e) @ sketch.basis.T, f"{name}.escaped": sketch.mass}


def sketched(
    old: Sketch, columns: np.ndarray, size: int, beta2: float, tail_decay: float | None, flags: frozenset[str]
) -> Sketch:
    """Frequent Directions: ``[beta2 S + Y Y^T - rho I]_+`` and the new mass; ``columns`` Y is (d, q)."""
    size = max(size + ("size-plus-one" in flags) - ("size-minus-one" in flags), 1)
    tail_decay = beta2 if tail_decay is None or "tail-decay-ignored" in flags else tail_decay
    if "tail-sqrt" in flags:
        tail_decay = sqrt(beta2)
    if "tail-kept" in flags:
        tail_decay = 1.0
    if "mass-last" in flags:
        tail_decay = 0.0
    keep = sqrt(beta2) if "decay-sqrt" in flags else beta2**2 if "decay-squared" in flags else beta2
    weight = 1 - beta2 if "weight" in flags and beta2 < 1 else 1.0
    factor = np.concatenate([old.basis * sqrt(keep * old.e), sqrt(weight) * columns], axis=1)
    if not all_finite(factor):
        return Sketch(old.basis, old.e * np.nan, np.nan)
    u, s, _ = svd(factor)
    s = np.where(s > max(factor.shape) * spacing(s) * s[0], s, 0.0)
    cut = s[size - 1] if size <= len(s) else 0.0
    escaped = np.sum(s[size - 1 :] ** 2) if "mass-trace" in flags else cut**2
    e = (s - cut) * (s + cut)
    if "undeflated" in flags and size <= len(s):
        e = np.where(np.arange(len(s)) < size - 1, s**2, 0.0)
    note(lambda: _sensitivity(s, cut), stays=True)
    k = max(min(size, len(s)), 1)
    return Sketch(
        u[:, :k],
        np.maximum(e[:k], 0),
        tail_decay * (old.mass + escaped) if "mass-decayed-new" in flags else tail_decay * old.mass + escaped,
    )


def _sensitivity(s: np.ndarray, cut: Any) -> Any:
    """Condition number of the new eigenvalues and mass as functions of the factor with singular values ``s``.

    They are computed with errors of u s_1 each: a difference s_i^2 - cut^2 is off by 2 u s_1 (s_i + cut), cut^2 by
    2 u s_1 cut.
    """
    top = (s[0] - cut) * (s[0] + cut)
    found = [2 * s[0] * (s[0] + cut) / top] if top > spacing(s) * s[0] ** 2 else []
    return max([*found, 2 * s[0] / cut] if cut > 0 else found, default=1)


ROOT_FLAGS = {
    "identity-outside": "with the identity instead of zero where nothing has been seen (eigenvalue and mass zero)",
}
EPS_FLAGS = {
    "eps-ignored": "without eps (pseudo-inverse)",
    "eps-outside": "with eps added to the root instead of under it",
    "eps-relative": "with eps in units of the largest eigenvalue though relative_eps is off",
    "eps-absolute": "with an absolute eps though relative_eps is on",
    "eps-relative-deflated": "with eps in units of the largest eigenvalue of the sketch without its mass",
    "eps-everywhere": "with eps^(-1/(2 n)) instead of zero where nothing has been seen (eigenvalue and mass zero), as "
    "where rounding counts as mass",
    "eps-in-sketch": "with eps added to the sketch's eigenvalues at every update instead of at the root, as in the "
    "authors' distributed_shampoo",
    "axis-skipped": "with an axis left alone while its mass or one of its size - 1 eigenvalues is zero, as in the "
    "authors' distributed_shampoo",
}
EPS_EXCLUSIVE = (
    frozenset({"eps-ignored", "eps-outside", "eps-relative", "eps-absolute", "eps-relative-deflated", "eps-in-sketch"}),
    frozenset({"identity-outside", "eps-everywhere", "axis-skipped"}),
    frozenset({"eps-ignored", "eps-everywhere"}),
)


def apply(
    sketch: Sketch,
    x: np.ndarray,
    exponent: float | Fraction,
    flags: frozenset[str],
    eps: float = 0.0,
    relative: bool = False,
) -> np.ndarray:
    """Return ``(S + (mass + eps) I)^exponent x``, zero on the null space of S + mass I."""
    u, e, mass = sketch
    total = np.append(e, 0.0) + (0.0 if "mass-ignored" in flags else mass)
    if "mass-complement" in flags:
        total = np.where(np.append(e, 0.0) > 0, np.append(e, 0.0), mass)
    elif "mass-outside" in flags:
        total = np.append(e, mass)
    unit = e.max(initial=0) if "eps-relative-deflated" in flags else total.max()
    ridge = eps * unit if (relative or "eps-relative" in flags) and "eps-absolute" not in flags else eps
    if flags & {"eps-ignored", "eps-in-sketch"}:
        ridge = 0.0
    live = (total > 0) | ("eps-everywhere" in flags and ridge > 0)
    safe = np.where(live, total, 1.0)
    own = total[: len(u)]  # no complement where there are as many columns as rows
    note_singular(live[: min(len(u), len(live))])
    note(lambda: 2 * spread(own[own > 0] + ridge) if own.any() else 1)  # errors of singular values count twice
    root = 1 / (power(safe, -exponent) + ridge) if "eps-outside" in flags else power(safe + ridge, exponent)
    scale = np.where(live, root, 1.0 if "identity-outside" in flags else 0.0)
    known = u.T @ x
    outside = x - u @ known
    known = np.where(abs(known) > 16 * spacing(x) * abs(outside).max(axis=0), known, 0 * known)  # else it is rounding
    return scale[-1] * outside + u @ (scale[:-1, None] * known)


# ---- S-AdaGrad ------------------------------------------------------------------------------------------------------

SADAGRAD_FLAGS = {
    # with one new column no other eigenvalue escapes, and the gradient is in the span of the sketch's columns
    **{k: v for k, v in SKETCH_FLAGS.items() if k not in ("mass-trace", "mass-outside")},
    **DECAY_FLAGS,
    "exponent-one": "with exponent -1 instead of -1/2",
    "exponent-quarter": "with exponent -1/4 instead of -1/2",
    "mass-half": "with half of the escaped mass, as in robust Frequent Directions",
    "delta-ignored": "without delta",
    "delta-kept": "with a delta that does not decay: it is added at each use",
    "delta-squared": "with delta^2 in the place of delta",
}


def sadagrad(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """Algorithm 2."""
    delta = config["delta"] ** (2 if "delta-squared" in flags else 1)
    exponent = -1.0 if "exponent-one" in flags else -0.25 if "exponent-quarter" in flags else -0.5
    sketch = empty(shape[0], 0.0 if flags & {"delta-ignored", "delta-kept"} else delta)
    out = None
    for t in times(flags):
        g, _ = yield out
        old, sketch = sketch, sketched(sketch, g[:, None], config["size"], config["beta2"], None, flags)
        used = old if stale(t, flags) else sketch
        mass = used.mass / 2 if "mass-half" in flags else used.mass
        used = used._replace(mass=mass + (delta if "delta-kept" in flags else 0.0))
        out = apply(used, g[:, None], exponent, flags)[:, 0], state("sketch", sketch)


# ---- S-Shampoo ------------------------------------------------------------------------------------------------------

SSHAMPOO_FLAGS = {
    **SKETCH_FLAGS,
    **DECAY_FLAGS,
    **ROOT_FLAGS,
    **EPS_FLAGS,
    **EVERY,
    "every-sketches-all": "with every gradient sketched and only the roots kept, as in Shampoo",
    "every-mean": "with the mean of the gradients since the last one sketched",
    "tail-decay-ignored": "with the escaped mass decayed by beta2, whatever tail_decay",
    "shared-tail": "with the largest axis's escaped mass on all axes",
    "small-axes-whole": "with the whole statistic of axes of at most size + 1, as in the authors' distributed_shampoo",
    "exponent-double": "with exponent -1/n on each axis instead of -1/(2 n)",
    "exponent-quarter": "with exponent -1/4 on each axis whatever their number",
    "first-axis-only": "with the first axis alone preconditioned, with exponent -1/2",
}
TENSOR_FLAGS = {
    "unit-axes-dropped": "with axes of size 1 left out of the exponent",
    "matrix": "with a tensor read as a matrix, its first axis by all others",
}


class _Axes:
    """One sketch per axis of ``dims``, applied to gradients of that shape."""

    def __init__(self, config: Mapping[str, Any], dims: tuple[int, ...], order: int, flags: frozenset[str]) -> None:
        self.config, self.dims, self.flags = config, dims, flags
        self.exponent = Fraction(-1, 2 * max(order, 1))
        if "exponent-double" in flags:
            self.exponent *= 2
        elif "exponent-quarter" in flags:
            self.exponent = Fraction(-1, 4)
        elif "first-axis-only" in flags:
            self.exponent = Fraction(-1, 2)
        self.sketches = self.used = [empty(d) for d in dims]
        self.pending: list[np.ndarray] = []
        self.seen = False

    def precondition(self, t: int, g: np.ndarray, learn: bool = True) -> np.ndarray:
        """Return ``g`` preconditioned along all axes; with ``learn`` its statistics enter the sketches before."""
        c, flags, x = self.config, self.flags, np.reshape(g, self.dims)
        renewed = due(t, c["every"], flags)
        self.pending.append(x)
        before = self.sketches
        if learn and (renewed or "every-sketches-all" in flags):
            new = np.mean(self.pending, axis=0) if "every-mean" in flags else x
            self.sketches = [self._updated(s, unfold(new, i)) for i, s in enumerate(self.sketches)]
            self.pending, self.seen = [], True
        if renewed:
            self.used = before if stale(t, flags) else self.sketches
        if not self.seen and flags & {"every-late"}:
            return g
        largest = max(s.mass for s in self.used)
        for i, s in enumerate(self.used[:1] if "first-axis-only" in flags else self.used):
            if "axis-skipped" in flags and not (s.mass > 0 and np.count_nonzero(s.e) >= min(c["size"] - 1, len(s.e))):
                continue
            s = s._replace(mass=largest) if "shared-tail" in flags else s
            eps, relative = c["eps"], c["relative_eps"]
            moved = apply(s, unfold(x, i), self.exponent, flags, eps, relative)
            x = np.moveaxis(moved.reshape(x.shape[i], *x.shape[:i], *x.shape[i + 1 :]), 0, i)
        return x.reshape(g.shape)

    def _updated(self, s: Sketch, columns: np.ndarray) -> Sketch:
        c = self.config
        if "eps-in-sketch" in self.flags:
            scale = s.e.max(initial=0) if c["relative_eps"] else 1.0
            s = s._replace(e=s.e + c["eps"] * scale)
        whole = "small-axes-whole" in self.flags and len(columns) <= c["size"] + 1
        return sketched(s, columns, len(columns) + 2 if whole else c["size"], c["beta2"], c["tail_decay"], self.flags)

    def state(self) -> dict[str, Any]:
        """Return the state of all axes."""
        return {k: v for i, s in enumerate(self.sketches) for k, v in state(f"sketches.{i}", s).items()}


def sshampoo(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """Algorithm 3."""
    dims = (shape[0], math.prod(shape[1:])) if "matrix" in flags and len(shape) > 2 else shape
    order = sum(d > 1 for d in dims) if "unit-axes-dropped" in flags else len(dims)
    axes, out = _Axes(config, dims, order, flags), None
    for t in times(flags):
        g, _ = yield out
        out = axes.precondition(t, g), axes.state()


# ---- the deep-learning version --------------------------------------------------------------------------------------

PRACTICAL_FLAGS = {
    **SSHAMPOO_FLAGS,
    "graft-ignored": "without grafting",
    "graft-sgd": "with the norm of the gradient in the place of the RMSProp graft's",
    "graft-rmsprop": "with the RMSProp graft in the place of the gradient's norm",
    "graft-eps-outside": "with graft_eps added to the root of the graft's average instead of under it",
    "graft-eps-ignored": "without graft_eps",
    "graft-corrected": "with the graft's average divided by 1 - graft_beta2^t",
    "graft-weight": "with V = graft_beta2 V + G^2, without the weight 1 - graft_beta2",
    "graft-sum-empty": "with V = graft_beta2 V + (1 - graft_beta2) G^2 for graft_beta2 = 1 too, where it stays zero",
    "graft-after": "with the graft's average before this gradient",
    "graft-of-momentum": "with momentum before the graft: the norm is given to the averaged update",
    "start-ignored": "with the preconditioner used from the first update on, whatever start",
    "start-late": "with the graft alone for start + 1 updates",
    "start-early": "with the graft alone for start - 1 updates",
    "start-unseen": "with sketches that do not see the first start gradients",
    "momentum-ignored": "without momentum",
    "nesterov-ignored": "without Nesterov's form",
    "nesterov-always": "with Nesterov's form, asked for or not",
    "ema-ignored": "with a momentum that is not multiplied by 1 - momentum, whatever momentum_ema",
    "ema-always": "with updates multiplied by 1 - momentum, whatever momentum_ema",
    "ema-inside": "with only what enters the momentum multiplied by 1 - momentum, not Nesterov's other term",
    "kappa-ignored": "without weight decay",
    "kappa-coupled": "with weight decay added to the gradient",
    "kappa-inside": "with weight decay before the momentum",
    "kappa-outside": "with weight decay after the momentum",
    "kappa-unscaled": "with weight decay added after the factor 1 - momentum of momentum_ema",
    "merge-ignored": "without merging axes",
    "merge-below": "with axes merged only while their product is below merge, not equal to it",
    "exponent-unmerged": "with the exponent of the axes before merging",
    "unit-axes-kept": "with axes of size 1 counted in the exponent",
    "vectors-preconditioned": "with vectors preconditioned under a graft too",
    "long-axes-preconditioned": "with axes above 4096 preconditioned under a graft too",
    "zero-nan": "with 0/0 = NaN for a zero gradient",
}


def _merged(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> tuple[int, ...]:
    if config["graft"] is not None and (
        (len(shape) <= 1 and "vectors-preconditioned" not in flags)
        or (max(shape, default=1) > LARGEST_AXIS and "long-axes-preconditioned" not in flags)
    ):
        return ()
    groups = [1]
    for d in shape:
        product = groups[-1] * d
        merges = product < config["merge"] if "merge-below" in flags else product <= config["merge"]
        if "merge-ignored" not in flags and merges:
            groups[-1] = product
        else:
            groups.append(d)
    return tuple(d for d in groups if d > 1)


def practical(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """The authors' tearfree code, with the tail's decay of the paper."""
    c, dims = config, _merged(config, shape, flags)
    order = len(dims)
    if "exponent-unmerged" in flags:
        order = len(shape)
    elif "unit-axes-kept" in flags:
        order += sum(d == 1 for d in shape)
    axes = _Axes(c, dims, order, flags)
    mu = 0.0 if "momentum-ignored" in flags else c["momentum"]
    nesterov = (c["nesterov"] or "nesterov-always" in flags) and "nesterov-ignored" not in flags
    averaged = (c["momentum_ema"] or "ema-always" in flags) and "ema-ignored" not in flags
    kappa = 0.0 if flags & {"kappa-ignored", "kappa-coupled"} else c["weight_decay"]
    after = (c["decay_after_momentum"] or "kappa-outside" in flags) and "kappa-inside" not in flags
    grafts = c["graft"] is not None and "graft-ignored" not in flags
    rmsprop = (c["graft"] == "rmsprop" and "graft-sgd" not in flags) or (grafts and "graft-rmsprop" in flags)
    start = c["start"] + ("start-late" in flags) - ("start-early" in flags)
    v, m, previous, out = np.zeros(shape), np.zeros(shape), np.zeros(shape), None
    divide = np.divide if "zero-nan" in flags else quotient
    for t in times(flags):
        g, x = yield out
        if "kappa-coupled" in flags:
            g = g + c["weight_decay"] * x
        v_old, beta = v, c["graft_beta2"]
        weight = 1.0 if "graft-weight" in flags or (beta == 1 and "graft-sum-empty" not in flags) else 1 - beta
        v = beta * v + weight * g * g
        n = g
        if rmsprop:
            square = (v_old if "graft-after" in flags else v) / (1 - beta**t if "graft-corrected" in flags else 1)
            eps = 0.0 if "graft-eps-ignored" in flags else c["graft_eps"]
            n = divide(g, sqrt(square) + eps if "graft-eps-outside" in flags else sqrt(square + eps))
        u = n
        if dims:
            u = axes.precondition(t, g, learn=t > c["start"] or "start-unseen" not in flags)
            if grafts:
                if "graft-of-momentum" in flags:
                    u = previous = mu * previous + u
                length = norm(u)
                if length > 0 or "zero-nan" in flags:
                    u = u * (norm(n) / length)
                if t <= start and "start-ignored" not in flags:
                    u = n
        if not after and "kappa-unscaled" not in flags:
            u = u + kappa * x
        entering = (1 - mu) * u if averaged else u
        if "ema-inside" not in flags:
            u = entering
        if not after and "kappa-unscaled" in flags:
            entering, u = entering + kappa * x, u + kappa * x
        if mu and not ("graft-of-momentum" in flags and dims and grafts):
            m = mu * m + entering
            u = u + mu * m if nesterov else m
        if after:
            u = u + kappa * x
        stored = axes.state() if dims else {}
        stored |= {"v": v} if c["graft"] == "rmsprop" else {}
        out = u, stored | ({"m": m} if c["momentum"] else {})


# ---- the yardsticks of the online experiments -----------------------------------------------------------------------

ONLINE_FLAGS = {
    "size-plus-one": SKETCH_FLAGS["size-plus-one"],
    "size-minus-one": SKETCH_FLAGS["size-minus-one"],
    "undeflated": SKETCH_FLAGS["undeflated"],
    "statistic-after": SKETCH_FLAGS["statistic-after"],
    **LATE,
    "delta-ignored": "without delta",
}
ADAFD_FLAGS = {
    **ONLINE_FLAGS,
    "delta-inside": "with delta under the root, (S + delta I)^{-1/2}",
    "no-root": "with S instead of its root, (S + delta I)^{-1}",
    "escaped-added": "with the escaped mass added to S",
}
NEWTON_FLAGS = {
    **ONLINE_FLAGS,
    "weight-timeless": "with gradients sketched over sqrt(learning_rate), whatever t",
    "weight-squared": "with gradients sketched without the outer root of their scale",
    "weight-one": "with raw gradients sketched",
    "counter-ahead": "with t counted from 2",
    "rate-ignored": "with a direction that is not divided by learning_rate, so that it counts twice",
    "exponent-half": "with exponent -1/2 instead of -1",
}
FDSON_FLAGS = {
    **NEWTON_FLAGS,
    "weight-time": "with t in the place of sqrt(t) in the scale of the sketched gradients",
    "escaped-added": "with the escaped mass added to delta",
}
RFDSON_FLAGS = {
    **NEWTON_FLAGS,
    "weight-root-time": "with sqrt(t) in the place of t in the scale of the sketched gradients",
    "mass-full": "with all of the escaped mass instead of half of it",
    "mass-ignored": "without the escaped mass",
}


def adafd(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """Ada-FD."""
    delta, sketch, out = 0.0 if "delta-ignored" in flags else config["delta"], empty(shape[0]), None
    for t in times(flags):
        g, _ = yield out
        old, sketch = sketch, sketched(sketch, g[:, None], config["size"], 1.0, None, flags)
        used = old if stale(t, flags) else sketch
        if flags & {"delta-inside", "no-root"}:
            used = used._replace(mass=delta)
        else:
            mass = used.mass if "escaped-added" in flags else 0.0
            used = Sketch(used.basis, sqrt(used.e + mass) - sqrt(mass), sqrt(mass) + delta)
        exponent = -0.5 if "delta-inside" in flags else -1.0
        out = apply(used, g[:, None], exponent, flags)[:, 0], state("sketch", sketch)


def _online_newton(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str], robust: bool) -> Walk:
    """FD-SON, or RFD-SON if ``robust``."""
    delta, sketch, out = 0.0 if "delta-ignored" in flags else config["delta"], empty(shape[0]), None
    rate = config["learning_rate"]
    rooted = "weight-root-time" in flags if robust else "weight-time" not in flags
    share = 0.5 if robust else 0.0
    if flags & {"mass-full", "escaped-added"}:
        share = 1.0
    elif "mass-ignored" in flags:
        share = 0.0
    for t in times(flags, 2 if "counter-ahead" in flags else 1):
        g, _ = yield out
        time = real(1 if "weight-timeless" in flags else t, rate)
        scale = rate * (sqrt(time) if rooted else time)
        weight = 1.0 if "weight-one" in flags else 1 / scale if "weight-squared" in flags else 1 / sqrt(scale)
        old, sketch = sketch, sketched(sketch, weight * g[:, None], config["size"], 1.0, None, flags)
        used = old if stale(t, flags) else sketch
        used = used._replace(mass=delta + share * used.mass)
        direction = apply(used, g[:, None], -0.5 if "exponent-half" in flags else -1.0, flags - {"mass-ignored"})[:, 0]
        out = direction / (1.0 if "rate-ignored" in flags else rate), state("sketch", sketch)


def fdson(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """FD-SON."""
    return _online_newton(config, shape, flags, robust=False)


def rfdson(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """RFD-SON."""
    return _online_newton(config, shape, flags, robust=True)


_WEIGHTS = frozenset({"weight-timeless", "weight-one", "weight-time", "weight-root-time"})
_RAW = frozenset({"weight-one", "weight-squared"})
_EXPONENTS = frozenset(
    {"exponent-one", "exponent-quarter", "exponent-double", "first-axis-only", "exponent-half", "exponent-unmerged",
     "unit-axes-kept"}
)  # fmt: skip
VARIANTS = {
    "SAdaGrad": Variants(sadagrad, SADAGRAD_FLAGS, (*EXCLUSIVE, _EXPONENTS, frozenset({"delta-ignored", "delta-kept"}),
        frozenset({"delta-ignored", "delta-squared"}), frozenset({"mass-half", "mass-ignored"}))),
    "SShampoo": Variants(sshampoo, {**SSHAMPOO_FLAGS, **TENSOR_FLAGS}, (*EXCLUSIVE, *EPS_EXCLUSIVE, _EXPONENTS)),
    "SShampoo.practical": Variants(practical, PRACTICAL_FLAGS, (*EXCLUSIVE, *EPS_EXCLUSIVE, _EXPONENTS,
        frozenset(f for f in PRACTICAL_FLAGS if f.startswith("graft")),
        frozenset(f for f in PRACTICAL_FLAGS if f.startswith("start")),
        frozenset(f for f in PRACTICAL_FLAGS if f.startswith(("momentum", "nesterov"))),
        frozenset(f for f in PRACTICAL_FLAGS if f.startswith(("momentum", "ema"))),
        frozenset(f for f in PRACTICAL_FLAGS if f.startswith("kappa")),
        frozenset(f for f in PRACTICAL_FLAGS if f.startswith("merge")))),
    "AdaFD": Variants(adafd, ADAFD_FLAGS, (*EXCLUSIVE, frozenset({"delta-ignored", "delta-inside"}),
        frozenset({"delta-inside", "no-root"}), frozenset({"escaped-added", "delta-inside"}),
        frozenset({"escaped-added", "no-root"}))),
    "FDSON": Variants(fdson, FDSON_FLAGS, (*EXCLUSIVE, _WEIGHTS, _RAW, _EXPONENTS)),
    "RFDSON": Variants(rfdson, RFDSON_FLAGS, (*EXCLUSIVE, _WEIGHTS, _RAW, _EXPONENTS)),
}  # fmt: skip
