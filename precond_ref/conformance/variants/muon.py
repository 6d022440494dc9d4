"""Muon, NorMuon and AdaMuon, with their plausible mistakes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from fractions import Fraction
from itertools import count
from typing import Any

import numpy as np

from precond_ref.conformance.arithmetic import Array, norm, real, spacing, sqrt, svd
from precond_ref.conformance.variants import Variants, Walk, ema, note, quotient, rivals, spread, times
from precond_ref.conformance.variants.asgo import EXPRESS

SAFETY = 1.01
JORDAN, CLASSICAL = "3.4445 -4.7750 2.0315", "2 -1.5 0.5"
SETS = {
    "jordan": [JORDAN],
    "quintic5": ["4.0848 -6.8946 2.9270", "3.9505 -6.3029 2.6377", "3.7418 -5.5913 2.3037", "2.8769 -3.1427 1.2046",
        "2.8366 -3.0525 1.2012"],
    "dion": ["8.156554524902461 -22.483292925577953 15.878769915207466",
        "4.042929935166728 -2.808917465908707 0.5000178451051303",
        "3.891667802292663 -2.772484153217686 0.5060648178503394",
        "3.285753657755655 -2.368129493342538 0.4644902423300309",
        "2.346541325859639 -1.7097828382687088 0.42323551169305323"],
    "cans": ["8.4703 -25.1081 18.6293", "4.1828 -3.1087 0.5806", "3.9619 -2.9541 0.5630", "3.2866 -2.4647 0.5074",
        "2.2737 -1.6447 0.4162"],
    "classical": [CLASSICAL],
    "deepseekv4": 8 * [JORDAN] + 2 * [CLASSICAL],
    "cubic5": ["3.3656576 -3.3420992 0", "2.5744352 -1.4957376 0", "2.5368962 -1.4312570 0", "2.4418906 -1.2764040 0",
        "2.2230472 -0.9630650 0"],
    "aol4": ["4.0098 -7.0585 2.4635", "3.4585 -5.5479 2.5959", "2.7573 -3.2939 1.4254", "2.7215 -3.0494 1.3169"],
}  # fmt: skip
"""In the digits of their authors, all of which count."""

DEFAULTS: Mapping[str, Any] = {
    "momentum_form": "average",
    "nesterov_form": "weighted",
    "bias_correction": False,
    "coefficients": "jordan",
    "after_last": "repeat",
    "normalization": "frobenius",
    "normalization_factor": 1.0,
    "eps": 0.0,
    "eps_rule": "add",
    "compute_dtype": "",
    "scale": "max",
    "outputs": "rows",
    "layout": "matrix",
    "blocks": None,
    "dual_norm": False,
}
"""Values of the fields that the first cases do not name."""

AVERAGE = {
    "momentum-ignored": "without momentum",
    "momentum-seeded": "with the first gradient as the momentum's start",
    "momentum-of-orthogonal": "with momentum on the orthogonalised gradient instead of on the gradient",
    "average": "with an average instead of a sum as momentum",
    "sum": "with a sum instead of an average as momentum",
    "nesterov-ignored": "without Nesterov's form",
    "nesterov-always": "with Nesterov's form, asked for or not",
    "nesterov-stored": "with Nesterov's look-ahead kept as the momentum",
    "nesterov-mixed": "with G + momentum M_t, M_t an average, as Nesterov's form (G not weighted by 1 - momentum)",
    "nesterov-exchanged": "with the two weights of Nesterov's form exchanged",
    "nesterov-whole": "with (1 - momentum) G + M_t, M_t an average, as Nesterov's form (M_t not weighted by momentum)",
    "nesterov-corrected": "with M_t / (1 - momentum^(t+1)) and G / (1 - momentum^t) in Nesterov's form, as in optax",
    "nesterov-added": "with G + M_t as Nesterov's form, as in HeavyBall",
    "nesterov-weighted": "with Nesterov's form on the average instead of G + M_t",
    "correction-ignored": "without the bias correction",
    "correction-same": "with 1 - momentum^t for both terms of the bias-corrected Nesterov's form",
}
ORTHOGONAL = {
    "exact": "with the exact polar factor instead of Newton-Schulz iterations",
    "newton-schulz": "with Newton-Schulz iterations instead of the exact polar factor",
    "one-step-fewer": "with one Newton-Schulz iteration fewer",
    "one-step-more": "with one Newton-Schulz iteration more",
    "cubic": "with the cubic iteration 1.5 X - 0.5 X X^T X instead of Jordan's quintic",
    "jordan": "with Jordan's quintic at each step, whatever the coefficients",
    "coefficients-reversed": "with the triples in reversed order",
    "first-triple": "with the first triple at each step",
    "coefficient-off": "with the last coefficient of each triple larger by 1e-4",
    "last-triples": "with the last triples of the sequence, if it has more than there are steps",
    "after-last-repeated": "with the last triple repeated instead of the sequence anew",
    "after-last-cycled": "with the sequence anew instead of the last triple repeated",
    "spectral-start": "with Newton-Schulz started from X / ||X||_2 instead of X / ||X||_F",
    "frobenius-start": "with Newton-Schulz started from X / ||X||_F, whatever the normalization",
    "factor-ignored": "without the factor in the normalization",
    "eps-ignored": "without eps in the normalization",
    "eps-thousandth": "with eps = 1e-3 in the normalization, whatever eps is",
    "eps-added": "with eps added to the norm instead of as its floor",
    "eps-floor": "with eps as a floor of the norm instead of added",
    "eps-of-norm": "with eps as a floor of the norm instead of its square",
}
SHAPED = {
    "rms-ignored": "without the factor rms sqrt(max(m, n))",
    "rms-jordan": "with the factor sqrt(max(1, m / n)) instead of rms sqrt(max(m, n))",
    "rms-exact": "with the root mean square scaled to rms exactly instead of the factor rms sqrt(max(m, n))",
    "rms-min": "with min(m, n) instead of max(m, n) in the factor",
    "rms-rows": "with the number of outputs instead of max(m, n) in the factor",
    "rms-columns": "with the number of inputs instead of max(m, n) in the factor",
    "rms-one": "with rms = 1",
    "scale-ignored": "without the factor of the shape",
    "scale-max": "with rms sqrt(max(m, n)) instead of the factor of m / n",
    "scale-inverted": "with n / m instead of m / n in the factor",
    "floor-ignored": "with sqrt(m / n) instead of sqrt(max(1, m / n)) as factor",
    "floor-always": "with sqrt(max(1, m / n)) instead of sqrt(m / n) as factor",
    "blocks-ignored": "with the blocks orthogonalised as one matrix",
    "blocks-whole-scale": "with the factor of the whole matrix for each block",
    "flatten-inputs": "with kernels flattened to (inputs, outputs x height x width) instead of by outputs",
    "flatten-ignored": "with the last two axes of a kernel as matrices instead of the kernel flattened",
}
MUON_FLAGS = {
    **AVERAGE,
    **ORTHOGONAL,
    **SHAPED,
    "dual-ignored": "without the factor <N, O>",
    "dual-always": "with the factor <N, O>, asked for or not",
    "decay-scaled": "with weight decay multiplied by the factor of the step's shape too",
}
RESCALED = {
    "v-ignored": "without the second moment",
    "v-of-gradient": "with the second moment of N instead of O",
    "v-not-rooted": "with v instead of its root as denominator",
    "v-corrected": "with bias correction of v",
    "v-weight-missing": "with v_t = beta2 v_{t-1} + new, without the weight 1 - beta2",
    "eps2-ignored": "without eps2",
    "eps2-inside": "with eps2 inside the root of v",
    "eps2-missing-in-norm": "without eps2 in the norm's denominator",
    "rescale-ignored": "without the norm restored",
    "rescale-rms": "with the root mean square scaled to rms instead of the norm restored",
    "rescale-norm": "with the norm of O restored instead of the root mean square scaled to rms",
    "rescale-always": "with the norm of O restored where no norm is",
}
NORMUON_FLAGS = {
    **AVERAGE,
    **ORTHOGONAL,
    **SHAPED,
    **RESCALED,
    "statistic-column": "with a second moment of each column instead of each row",
    "statistic-row": "with a second moment of each row instead of the longer side",
    "statistic-short": "with a second moment of the longer side instead of each row",
    "statistic-sum": "with sums of squares instead of means in the second moment",
    "statistic-entry": "with a second moment of each entry instead of each row",
    "eps2-added": "with eps2 added instead of as the least of v and of the norm",
    "eps2-floor": "with eps2 as the least of v and of the norm instead of added",
}
ADAMUON_FLAGS = {
    **AVERAGE,
    **ORTHOGONAL,
    **SHAPED,
    **RESCALED,
    "sign-ignored": "without the sign",
    "sign-always": "with the sign of N orthogonalised, asked for or not",
    "sign-of-gradient": "with momentum on the gradient's sign instead of the sign of N",
    "v-correction-ignored": "without the bias correction of v",
}


def polynomials(config: Mapping[str, Any], flags: frozenset[str], like: Any) -> list[tuple[Any, Any, Any]]:
    """Return the triple of each step."""
    chosen = "jordan" if "jordan" in flags else config["coefficients"]
    if chosen == "polar_express":
        f = real(SAFETY, like)
        rows = [tuple(real(x, like) for x in row) for row in EXPRESS]
        table = [(a / f, b / f**3, c / f**5) for a, b, c in rows[:-1]] + rows[-1:]
    elif isinstance(chosen, str):
        table = [tuple(real(Fraction(x), like) for x in row.split()) for row in SETS[chosen]]
    else:
        nested = isinstance(chosen[0], (tuple, list))
        table = [tuple(real(float(x), like) for x in row) for row in (chosen if nested else [chosen])]
    if "coefficient-off" in flags:
        table = [(a, b, c + real(Fraction(1, 10000), like)) for a, b, c in table]
    if "cubic" in flags:
        table = [(1.5, -0.5, 0.0)]
    steps = config["root_steps"] - ("one-step-fewer" in flags) + ("one-step-more" in flags)
    cycle = (config["after_last"] == "cycle" or "after-last-cycled" in flags) and "after-last-repeated" not in flags
    if "last-triples" in flags:
        table = table[-steps:]
    used = [table[k % len(table)] if cycle else table[min(k, len(table) - 1)] for k in range(steps)]
    if "coefficients-reversed" in flags:
        used.reverse()
    return [table[0]] * steps if "first-triple" in flags else used


def _value(s: Any, triples: list[Any]) -> Any:
    for a, b, c in triples:
        s = s * (a + s * s * (b + c * s * s))
    return s


def _slope(s: Any, triples: list[Any]) -> Any:
    slope = s * 0 + 1
    for a, b, c in triples:
        slope = slope * (a + s * s * (3 * b + 5 * c * s * s))
        s = s * (a + s * s * (b + c * s * s))
    return slope


def sensitivity(s: Array, triples: list[Any]) -> Any:
    """To first order the relative error of O for rounding errors of size one in ``X_0`` and in each step.

    A step rounds what it adds up, ``|a| s + |b| s^3 + |c| s^5``. The steps after it multiply an error at most by the
    largest divided difference of their polynomial q: ``(q(s) - q(s')) / (s - s')``, its slope, and that with plus
    signs.
    """
    total, start = 0, s
    for j in range(len(triples) + 1):
        rest, size = triples[j:], s
        if j:
            a, b, c = (abs(x) for x in triples[j - 1])
            old = abs(_value(start, triples[: j - 1]))
            size = a * old + b * old**3 + c * old**5
        q = _value(s, rest)
        most = max(abs(_slope(s, rest)))
        for i in range(len(s)):
            for k in range(i):
                if s[i] != s[k]:
                    most = max(most, abs((q[i] - q[k]) / (s[i] - s[k])))
                if s[i] != -s[k]:
                    most = max(most, abs((q[i] + q[k]) / (s[i] + s[k])))
        total = total + most * norm(size)
        if j < len(triples):
            s = _value(s, triples[j : j + 1])
    return total / norm(_value(start, triples))


def live(s: Array, shape: tuple[int, ...]) -> Array:
    """Return which singular values are not rounding."""
    return s > max(shape) * spacing(s) * s[0]


def condition(x: Array, config: Mapping[str, Any]) -> Any:
    """Return the factor by which `orthogonal` enlarges relative errors of N and of its products.

    What the first cases, which do not name ``compute_dtype``, record of it is that of the polar factor.
    """
    if not x.any():
        return 1
    if config["root"] == "newton_schulz" and config["compute_dtype"] != "":
        none: frozenset[str] = frozenset()
        return sensitivity(svd(_started(x, config, none))[1], polynomials(config, none, x))
    s = svd(x)[1]
    return spread(s[live(s, x.shape)]) ** 2


def orthogonal(x: Array, config: Mapping[str, Any], flags: frozenset[str]) -> Array:
    """Return ``ortho`` of one matrix."""
    if not x.any():
        return x
    if not ((config["root"] == "newton_schulz" or "newton-schulz" in flags) and "exact" not in flags):
        u, s, vt = svd(x)
        return (u * live(s, x.shape)) @ vt
    triples = polynomials(config, flags, x)
    x = _started(x, config, flags)
    tall = x.shape[0] > x.shape[1]
    for a, b, c in triples:
        square = x.T @ x if tall else x @ x.T
        inner = a * np.eye(len(square)) + square @ (b * np.eye(len(square)) + c * square)
        x = x @ inner if tall else inner @ x
    return x


def _started(x: Array, config: Mapping[str, Any], flags: frozenset[str]) -> Array:
    """Return N / nu."""
    kind, eps = config["normalization"], 0.0 if "eps-ignored" in flags else config["eps"]
    eps = 1e-3 if "eps-thousandth" in flags else eps
    if kind == "frobenius" and "spectral-start" in flags:
        kind = "spectral"
    if "frobenius-start" in flags:
        kind = "frobenius"
    floor = "eps-of-norm" in flags
    if kind == "schatten4":
        fourth = norm(x @ x.T)
        return x / (max(sqrt(fourth), eps) if floor else sqrt(max(fourth, real(eps, x))))
    if kind == "aol":
        columns = config["outputs"] == "columns" or not isinstance(config["layout"], str)
        turned = x.shape[0] > x.shape[1] or (x.shape[0] == x.shape[1] and columns)
        rows = x.T if turned else x
        sums = np.sum(abs(rows @ rows.T), axis=1)
        sizes = np.maximum(sqrt(sums), eps) if floor else sqrt(np.maximum(sums, real(eps, x)))
        rows = quotient(rows, sizes[:, None] * np.ones(rows.shape))
        return rows.T if turned else rows
    nu = norm(x, 2 if kind == "spectral" else "fro")
    nu = nu if "factor-ignored" in flags else config["normalization_factor"] * nu
    added = (config["eps_rule"] == "add" or "eps-added" in flags) and "eps-floor" not in flags
    return x / (nu + eps if added else max(nu, eps))


def factor(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str], like: Array) -> Any:
    """Return c of an (r, k) matrix."""
    r, k = shape
    rms = 1.0 if "rms-one" in flags else config["rms"]
    kind = config["scale"]
    if "scale-ignored" in flags and kind != "max":
        return 1
    if kind == "max" and "rms-jordan" not in flags:
        if rms is None or "rms-ignored" in flags:
            return 1
        of = {"rms-min": min(r, k), "rms-rows": r, "rms-columns": k}
        return rms * sqrt(real(next((side for flag, side in of.items() if flag in flags), max(r, k)), like))
    if kind == "max" and rms is None:
        return 1
    if kind != "max" and "scale-max" in flags:
        return rms * sqrt(real(max(r, k), like))
    floor = (kind != "ratio" or "floor-always" in flags) and "floor-ignored" not in flags
    ratio = Fraction(k, r) if "scale-inverted" in flags else Fraction(r, k)
    return sqrt(real(max(Fraction(1), ratio) if floor else ratio, like))


class Layout:
    """A parameter as stored (the momentum) and as one list of matrices with outputs as rows."""

    def __init__(self, config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> None:
        self.shape, self.columns = shape, config["outputs"] == "columns"
        kind, axes = config["layout"], range(len(shape))
        if kind == "matrix":
            groups: list[Any] = [(0,), (1,)]
        elif kind == "flatten":
            groups = [(0,), tuple(axes[1:])]
        elif kind == "batch":
            groups = [tuple(axes[:-2]), (axes[-2],), (axes[-1],)]
        else:
            inputs, outputs = map(tuple, kind)
            groups = [tuple(a for a in axes if a not in inputs + outputs), outputs, inputs]
        self.order = [axis for group in groups for axis in group]
        self.stored = tuple(int(np.prod([shape[a] for a in group], dtype=int)) for group in groups)
        self.kernel = len(shape) > 2 and kind == "flatten"
        self.flags = flags

    def store(self, x: Array) -> Array:
        """Return an array of the parameter's shape in the shape of the momentum."""
        return np.transpose(x, self.order).reshape(self.stored)

    def restore(self, x: Array) -> Array:
        """Return an array of the momentum's shape in the shape of the parameter."""
        moved = x.reshape([self.shape[axis] for axis in self.order])
        return np.transpose(moved, np.argsort(self.order))

    def each(self, x: Array, function: Callable[..., Array], *more: Array) -> Array:
        """Apply ``function`` to every matrix of a stored ``x``, with outputs as rows, and to those of ``more``."""
        if self.kernel and self.flags & {"flatten-inputs", "flatten-ignored"}:
            return self._otherwise(x, function, *more)
        arrays = [a.reshape(-1, *self.stored[-2:]) for a in (x, *more)]
        made = []
        for matrices in zip(*arrays, strict=True):
            turned = [m.T if self.columns else m for m in matrices]
            out = function(*turned)
            made.append(out.T if self.columns else out)
        return np.stack(made).reshape(self.stored)

    def _otherwise(self, x: Array, function: Callable[..., Array], *more: Array) -> Array:
        """Return the stored ``x`` if the matrices of a kernel are made in a wrong way."""
        whole = [a.reshape(self.shape) for a in (x, *more)]
        if "flatten-inputs" in self.flags:
            moved = [np.moveaxis(a, 1, 0) for a in whole]
            out = function(*(a.reshape(len(a), -1) for a in moved)).reshape(moved[0].shape)
            return np.moveaxis(out, 0, 1).reshape(self.stored)
        stacks = [a.reshape(-1, *self.shape[-2:]) for a in whole]
        return np.stack([function(*parts) for parts in zip(*stacks, strict=True)]).reshape(self.stored)


def cuts(blocks: Any, rows: int, flags: frozenset[str]) -> list[slice]:
    """Return the rows of each block."""
    if blocks is None or "blocks-ignored" in flags:
        return [slice(0, rows)]
    sizes = [rows // blocks] * blocks if isinstance(blocks, int) else list(blocks)
    if sum(sizes) != rows:  # of a kernel flattened in a wrong way
        return [slice(0, rows)]
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def averages(config: Mapping[str, Any], layout: Layout, flags: frozenset[str]) -> Generator[Any, Array, None]:
    """(1) and (2): gets gradients in the stored shape by ``send``, and yields N_t, B_t and t."""
    mu = 0.0 if "momentum-ignored" in flags else config["momentum"]
    nesterov = (config["nesterov"] or "nesterov-always" in flags) and "nesterov-ignored" not in flags
    added = (config["nesterov_form"] == "added" or "nesterov-added" in flags) and "nesterov-weighted" not in flags
    total = (config["momentum_form"] == "sum" or "sum" in flags) and "average" not in flags
    corrected = config["bias_correction"] and "correction-ignored" not in flags
    weight = 1 if total else 1 - mu
    twice = (corrected or "nesterov-corrected" in flags) and "correction-same" not in flags
    m: Any = np.zeros(layout.stored)
    out: Any = None
    for t in times(flags):
        new = yield out
        if "sign-of-gradient" in flags:
            new = signs(new)
        if "momentum-of-orthogonal" in flags:
            new = layout.each(new, lambda rows: _ortho(rows, config, flags))
        m = new if t == 1 and "momentum-seeded" in flags else mu * m + weight * new
        c1 = 1 - mu**t if corrected or "nesterov-corrected" in flags else 1
        c2 = 1 - mu ** (t + 1) if twice else c1
        if not nesterov:
            n = m / c1 if corrected else m
        elif added:
            n = new + m
        elif "nesterov-mixed" in flags:
            n = new + mu * m
        elif "nesterov-exchanged" in flags:
            n = mu * new / c1 + weight * m / c2
        elif "nesterov-whole" in flags and not total:
            n = weight * new / c1 + m / c2
        else:
            n = weight * new / c1 + mu * m / c2
        m = n if "nesterov-stored" in flags else m
        out = n, m, t


def signs(x: Array) -> Array:
    """Return -1, 0 or 1 for each entry."""
    return np.where(x > 0, 1, np.where(x < 0, -1, 0)) * (x * 0 + 1)


def muon(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """Muon."""
    config = {**DEFAULTS, **config}
    layout = Layout(config, shape, flags)

    def direct(x: Array, param: Array) -> Array:
        return layout.each(x, lambda rows, p: _by_blocks(rows, config, flags, one, p), param)

    def one(x: Array, p: Array, whole: tuple[int, int]) -> Array:
        o = x if "momentum-of-orthogonal" in flags else orthogonal(x, config, flags)
        note(lambda: condition(x, config))
        c = factor(config, whole if "blocks-whole-scale" in flags else x.shape, flags, x)
        if "rms-exact" in flags and config["rms"] is not None:
            c = config["rms"] * sqrt(real(o.size, o)) / (norm(o) or 1.0)
        if (config["dual_norm"] or "dual-always" in flags) and "dual-ignored" not in flags:
            c = c * np.sum(x * o)
        return c * o + (c - 1) * config["outer_decay"] * p if "decay-scaled" in flags else c * o

    steps = averages(config, layout, flags)
    next(steps)
    out = None
    while True:
        g, p = yield out
        n, m, _ = steps.send(layout.store(g))
        out = layout.restore(direct(n, layout.store(p))), {"m": m}


def _ortho(rows: Array, config: Mapping[str, Any], flags: frozenset[str]) -> Array:
    return _by_blocks(rows, config, flags, lambda x, whole: orthogonal(x, config, flags))


def _by_blocks(
    rows: Array, config: Mapping[str, Any], flags: frozenset[str], one: Callable[..., Array], *more: Array
) -> Array:
    return np.concatenate(
        [one(rows[cut], *(a[cut] for a in more), rows.shape) for cut in cuts(config["blocks"], len(rows), flags)]
    )


def rescaled(u: Array, o: Array, config: Mapping[str, Any], whole: Any, flags: frozenset[str]) -> Array:
    """Return (7)."""
    kind = config["rescale"]
    if kind == "norm" and "rescale-rms" in flags:
        kind = "rms"
    if (kind == "rms" and "rescale-norm" in flags) or (kind == "none" and "rescale-always" in flags):
        kind = "norm"
    c = factor(config, whole if "blocks-whole-scale" in flags else u.shape, flags, u)
    if kind == "none" or "rescale-ignored" in flags:
        return c * u
    eps2 = 0.0 if flags & {"eps2-ignored", "eps2-missing-in-norm"} else config["eps2"]
    rms = 1.0 if "rms-one" in flags else config["rms"]
    target = c * norm(o) if kind == "norm" else rms * sqrt(real(u.size, u))
    size = max(norm(u), eps2) if eps2_floor(config, flags) else norm(u) + eps2
    return u * (target / size if size else 0)


def eps2_floor(config: Mapping[str, Any], flags: frozenset[str]) -> bool:
    """Return whether eps2 is the least of a denominator, and not added."""
    return (config.get("eps2_rule") == "max" or "eps2-floor" in flags) and "eps2-added" not in flags


def second_moment(
    config: Mapping[str, Any], flags: frozenset[str], old: Array, square: Array, o: Array, n: Array, t: int
) -> tuple[Array, Array]:
    """Return v and U of (5) and (6) for O = ortho(N); the shape of ``square`` and v broadcasts with that of O."""
    beta2, eps2 = config["beta2"], 0.0 if "eps2-ignored" in flags else config["eps2"]
    v = beta2 * old + square if "v-weight-missing" in flags else ema(old, square, beta2)
    if "v-ignored" in flags:
        return v, o
    corrected = config.get("v_bias_correction", False) and "v-correction-ignored" not in flags
    used = v / (1 - beta2**t) if corrected or "v-corrected" in flags else v
    if eps2_floor(config, flags):
        least = np.where(used < eps2, eps2, used)
        denominator = least if "v-not-rooted" in flags else sqrt(least)
    elif "eps2-inside" in flags:
        denominator = sqrt(used + eps2)
    else:
        denominator = (used if "v-not-rooted" in flags else sqrt(used)) + eps2
    note(lambda: condition(n, config) * spread([x for x in sqrt(used).reshape(-1) if x > 0]))
    return v, quotient(o, denominator * np.ones(o.shape))


def normuon(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """NorMuon."""
    config = {**DEFAULTS, **config}
    layout = Layout(config, shape, flags)
    old: dict[int, Array] = {}  # of each matrix and block, in order
    t, number = 0, count()

    def one(x: Array, whole: tuple[int, int]) -> Array:
        o = x if "momentum-of-orthogonal" in flags else orthogonal(x, config, flags)
        r, k = o.shape
        squares = (x * x) if "v-of-gradient" in flags else o * o
        short = (config["statistic"] == "short" or "statistic-short" in flags) and "statistic-row" not in flags
        axis = 0 if "statistic-column" in flags or (short and r < k) else 1
        square = np.sum(squares, axis=axis, keepdims=True)
        if "statistic-entry" in flags:
            square = squares
        elif "statistic-sum" not in flags:
            square = square / squares.shape[axis]
        i = next(number)
        old[i], u = second_moment(config, flags, old.get(i, 0 * square), square, o, x, t)
        return rescaled(u, o, config, whole, flags)

    steps = averages(config, layout, flags)
    next(steps)
    out = None
    while True:
        g, _ = yield out
        n, m, t = steps.send(layout.store(g))
        number = count()
        direction = layout.restore(layout.each(n, lambda rows: _by_blocks(rows, config, flags, one)))
        batch = layout.stored[:-2]
        v = [old[i].reshape(-1) for i in range(len(old))]
        if isinstance(config["blocks"], int) and "blocks-ignored" not in flags:
            kept = np.stack(v).reshape(*batch, config["blocks"], -1)
        else:
            kept = np.concatenate(v).reshape(*batch, -1)
        out = direction, {"m": m, "v": kept}


def adamuon(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """AdaMuon."""
    config = {**DEFAULTS, **config}
    layout = Layout(config, shape, flags)
    signed = (config["sign"] or "sign-always" in flags) and not flags & {"sign-ignored", "sign-of-gradient"}
    steps = averages(config, layout, flags)
    next(steps)
    v, out = np.zeros(layout.stored), None
    while True:
        g, _ = yield out
        n, m, t = steps.send(layout.store(g))
        n = signs(n) if signed else n
        o = n if "momentum-of-orthogonal" in flags else layout.each(n, lambda rows: _ortho(rows, config, flags))
        square = n * n if "v-of-gradient" in flags else o * o
        v, u = second_moment(config, flags, v, square, o, n.reshape(-1, n.shape[-1]), t)

        def finish(u: Array, o: Array) -> Array:
            return _by_blocks(u, config, flags, lambda u, o, whole: rescaled(u, o, config, whole, flags), o)

        out = layout.restore(layout.each(u, finish, o)), {"m": m, "v": v}


EXCLUSIVE = (
    frozenset({"momentum-ignored", "momentum-seeded"}),
    frozenset({"momentum-ignored", "average", "sum"}),
    frozenset({"momentum-ignored", "nesterov-ignored", "nesterov-mixed", "nesterov-corrected", "nesterov-added",
               "nesterov-weighted", "nesterov-exchanged", "nesterov-whole"}),
    *rivals({"momentum-ignored"}, {"nesterov-always", "momentum-of-orthogonal"}),
    *rivals({"nesterov-stored"}, {"momentum-ignored", "nesterov-ignored"}),
    *rivals({"momentum-ignored"}, {"correction-ignored", "correction-same"}),
    frozenset({"nesterov-ignored", "nesterov-always"}),
    *rivals({"nesterov-ignored", "nesterov-added", "nesterov-mixed"}, {"correction-same"}),
    frozenset({"correction-ignored", "correction-same"}),
    frozenset({"rms-ignored", "rms-jordan", "rms-exact", "rms-min", "rms-rows", "rms-columns", "rms-one"}),
    frozenset({"scale-ignored", "scale-max", "scale-inverted"}),
    frozenset({"scale-ignored", "decay-scaled"}),
    frozenset({"scale-ignored", "scale-max", "floor-ignored", "floor-always"}),
    frozenset({"exact", "newton-schulz"}),
    frozenset({"cubic", "jordan", "coefficients-reversed", "first-triple", "last-triples"}),
    frozenset({"cubic", "coefficient-off"}),
    frozenset({"after-last-repeated", "after-last-cycled", "first-triple", "cubic", "jordan"}),
    *rivals({"exact"}, set(ORTHOGONAL) - {"exact", "newton-schulz"}),
    frozenset({"one-step-fewer", "one-step-more"}),
    frozenset({"spectral-start", "frobenius-start"}),
    frozenset({"eps-ignored", "eps-added", "eps-floor", "eps-of-norm"}),
    frozenset({"eps-ignored", "eps-thousandth"}),
    frozenset({"blocks-ignored", "blocks-whole-scale"}),
    frozenset({"flatten-inputs", "flatten-ignored"}),
)  # fmt: skip
SECOND = (
    frozenset({"v-ignored", "v-of-gradient", "momentum-of-orthogonal"}),
    *rivals({"v-ignored"}, {"v-not-rooted", "v-corrected", "v-weight-missing", "eps2-inside"}),
    frozenset({"v-not-rooted", "eps2-inside"}),
    frozenset({"eps2-ignored", "eps2-inside", "eps2-missing-in-norm", "eps2-added", "eps2-floor"}),
    frozenset({"rescale-ignored", "rescale-rms", "rescale-norm", "rescale-always"}),
    *rivals({"rms-exact"}, set(RESCALED)),
)

VARIANTS = {
    "Muon": Variants(muon, MUON_FLAGS, (*EXCLUSIVE, frozenset({"dual-ignored", "dual-always"}))),
    "NorMuon": Variants(normuon, {name: text for name,
        text in NORMUON_FLAGS.items() if name not in ("rms-exact", "flatten-ignored")}, (*EXCLUSIVE, *SECOND,
        frozenset(name for name in NORMUON_FLAGS if name.startswith("statistic-")),
        *rivals({"v-ignored"}, {name for name in NORMUON_FLAGS if name.startswith("statistic-")}))),
    "AdaMuon": Variants(adamuon, {name: text for name,
        text in ADAMUON_FLAGS.items() if name not in ("rms-exact", "flatten-ignored")}, (*EXCLUSIVE, *SECOND,
        frozenset({"sign-ignored", "sign-always", "sign-of-gradient"}),
        frozenset({"v-correction-ignored", "v-corrected", "v-ignored"}))),
}  # fmt: skip
