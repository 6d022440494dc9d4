"""Shampoo as run in production, and Shampoo with corrected eigenvalues, with their plausible mistakes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np

from precond_ref.conformance.arithmetic import Array, all_finite, eigh, norm, real, sqrt
from precond_ref.conformance.arithmetic import power as raised
from precond_ref.conformance.variants import (
    Variants,
    Walk,
    ema,
    isolation,
    multiply,
    note,
    outside,
    power,
    quotient,
    rivals,
    spread,
    times,
    unfold,
)
from precond_ref.conformance.variants.soap import descending, gram_schmidt

SHARED_FLAGS = {
    "statistic-of-filtered": "with statistics of the filtered gradient F",
    "statistic-frozen": "with statistics that see only the gradients of updates that refresh",
    "refresh-at-first": "with refreshes at updates 1, 1 + every, ... instead of start, then multiples of every",
    "refresh-always": "with a refresh at every update",
    "start-ignored": "with the first refresh at update every, whatever start says",
    "correction-ignored": "without the bias corrections of the statistics and of F",
    "correction-always": "with bias corrections of the statistics and of F, asked for or not",
    "weight-missing": "with L_t = beta2 L_{t-1} + new, still divided by 1 - beta2^t",
    "sum-weighted": "with the weight 1 - beta2 for beta2 = 1 too: the statistics stay zero",
    "drop-weight-ignored": "with the weight 1 - beta2, whatever drop_weight says",
    "drop-weight-corrected": "with a bias correction of what has no weight 1 - beta2",
    "filter-ignored": "with the gradient itself in the place of F",
    "filter-usual": "with F divided by 1 - beta1^t also where beta3 is not beta1",
    "filter-late": "with F made of the new average instead of the old one",
    "beta3-ignored": "with beta1 for beta3",
    "graft-ignored": "without grafting",
    "graft-of-gradient": "with a grafted step made of the gradient instead of F",
    "graft-uncorrected": "without the bias correction of Adam's graft",
    "graft-corrected": "with the bias correction of RMSProp's graft, which has none",
    "graft-tied": "with Adam's correction of the graft only where the others are asked for",
    "graft-summed": "with a graft that sums squares instead of averaging them",
    "graft-eps-inside": "with the graft's eps under the root",
    "graft-whole": "with the norms of the whole parameter instead of each block's",
    "start-applied": "with roots or bases applied before the first refresh too, then scaled to the grafted step's norm",
    "start-ungrafted": "with F itself before the first refresh, not the grafted step",
    "merge-from-the-left": "with axes merged from the left",
    "target-ignored": "with axes merged although there are no more than target",
    "merge-ignored": "without merging",
    "short-blocks-dropped": "without a direction for blocks that are shorter than max_dim",
    "blocks-ignored": "without cutting into blocks",
    "alpha-after": "with weight decay after the momentum",
    "alpha-ignored": "without weight decay",
    "alpha-coupled": "with weight decay added to the gradient, asked for or not",
    "l2-ignored": "without weight decay where it joins the gradient",
    "l2-unseen": "with a decayed gradient that the statistics do not see",
    "momentum-before": "with momentum on F, before preconditioning and grafting",
    "momentum-ignored": "without momentum",
    "dampening-ignored": "without dampening",
    "dampening-once": "with a dampening of what enters B but not of Nesterov's own term",
    "nesterov-ignored": "without Nesterov's form",
    "nesterov-of-gradient": "with the gradient in the place of the step in Nesterov's form",
}
PRODUCTION_FLAGS = SHARED_FLAGS | {
    "eps-ignored": "without eps (pseudo-inverse)",
    "eps-early": "with eps added before the bias correction",
    "eps-outside": "with eps outside the root, (L^p + eps I)^{-1} instead of (L + eps I)^{-p}",
    "trace-late": "with eps added before the division by the trace",
    "trace-ignored": "without the division by the trace",
    "exponents-ignored": "with the exponent 1/(2k) on every axis",
    "exponent-zero-applied": "with the exponent 1/(2k) where the exponent 0 leaves an axis alone",
    "exponent-unmerged": "with the number of axes before merging in the exponent",
    "ones-kept": "with axes of size 1 kept where axes are merged",
    "exponent-half": "with exponents of 1/2",
    "exponent-order": "with exponents of 1/k",
}
ESHAMPOO_FLAGS = SHARED_FLAGS | {
    "eps-inside": "with eps inside the power, (D + eps)^p",
    "eps-ignored": "without eps in the denominator",
    "exponent-ignored": "with the root of D instead of its power p",
    "d-late": "with D updated after its use",
    "d-old-basis": "with D updated in the bases of the update before",
    "d-rotated": "with D rotated into the new bases (by the squares of Q_new^T Q_old)",
    "d-uncorrected": "without the bias correction of D",
    "d-kept": "with D in its old slots when columns are sorted",
    "d-permuted": "with D permuted with the columns, which it is not",
    "descending": "with the columns in descending order",
    "exact": "with eigenvectors at every refresh instead of rounds of QR",
    "one-round": "with one round of QR",
    "tolerance-ignored": "with a new basis at every refresh, whatever the tolerance",
    "tolerance-new": "with a tolerance that asks the new basis",
    "ignored-used": "with a basis for ignored axes too",
}
Piece = tuple[slice, ...]


def production(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """`Shampoo.production`."""
    return walk(config, shape, flags, corrected=False)


def eshampoo(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """`EShampoo`."""
    return walk(config, shape, flags, corrected=True)


def walk(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str], corrected: bool) -> Walk:
    """Either method for one parameter; ``corrected`` is `EShampoo`, with corrected eigenvalues."""
    beta1, beta2 = config["beta1"], config["beta2"]
    beta3 = beta1 if config["beta3"] is None or "beta3-ignored" in flags else config["beta3"]
    drop = config["drop_weight"] and "drop-weight-ignored" not in flags
    summed = beta2 == 1 and "sum-weighted" not in flags
    weight = 1 if summed or drop or "weight-missing" in flags else 1 - beta2
    unbiased = (config["bias_correction"] or "correction-always" in flags) and "correction-ignored" not in flags
    graft = None if "graft-ignored" in flags else config["graft"]
    mu = 0 if "momentum-ignored" in flags else config["momentum"]
    damping = 0 if "dampening-ignored" in flags else config["dampening"]
    unseen = "alpha-ignored" in flags or ("l2-ignored" in flags and config["decay_form"] == "l2")
    alpha = 0 if unseen else config["weight_decay"]
    coupled = config["decay_form"] == "l2" or "alpha-coupled" in flags
    every = config["every"]
    first = every if config["start"] is None or "start-ignored" in flags else config["start"]
    keeps = corrected or (config["start"] or every) > 1
    dims = merged(config, shape, flags)
    exponents = sides(config, shape, dims, flags, corrected)
    blocks = list(cut(dims, 10**9 if "blocks-ignored" in flags else config["max_dim"]))
    whole = 0 in shape or not shape or (config["graft"] is None and not any(exponents))
    grams: dict[tuple[int, int], Array] = {}
    kept: dict[tuple[int, int], Array] = {}
    if whole:
        dims, exponents, blocks = shape, [Fraction(0)] * len(shape), [tuple(slice(0, d) for d in shape)]
    for b, block in enumerate(blocks):
        for i, piece in enumerate(block):
            if exponents[i]:
                grams[b, i] = np.zeros((piece.stop - piece.start,) * 2)
                kept[b, i] = np.eye(piece.stop - piece.start)
    m = v = buffer = filtered_buffer = np.zeros(shape)
    d, out = np.zeros(dims), None

    def due(t: int) -> bool:
        if "refresh-always" in flags:
            return True
        if "refresh-at-first" in flags:
            return (t - 1) % every == 0
        return t == first or (t > first and t % every == 0)

    for t in times(flags):
        g, x = yield out
        plain = g
        g = g + alpha * x if coupled else g
        seen = plain if "l2-unseen" in flags else g
        c2 = 1 - beta2**t if unbiased and beta2 != 1 and (not drop or "drop-weight-corrected" in flags) else 1
        f = filtered = ema(ema(m, g, beta1) if "filter-late" in flags else m, g, beta3) if beta1 else g
        m = ema(m, g, beta1)
        if unbiased and beta1:
            f = filtered = f / (1 - (beta1**t if "filter-usual" in flags else beta3 * beta1 ** (t - 1)))
        f = g if "filter-ignored" in flags else f
        if mu and "momentum-before" in flags:
            filtered_buffer = mu * filtered_buffer + (1 - damping) * f
            f = (1 - damping) * f + mu * filtered_buffer if config["nesterov"] else filtered_buffer
        n, v = grafted_step(config, g if "graft-of-gradient" in flags else f, g, v, graft, t, unbiased, flags)
        parts = {name: np.reshape(value, dims) for name, value in (("g", g), ("f", f), ("n", n), ("s", seen))}
        if "statistic-of-filtered" in flags:
            parts["s"] = np.reshape(filtered, dims)
        p, norms = np.array(0 * parts["f"]), []
        for b, block in enumerate(blocks):
            part = {name: np.asarray(value[block]) for name, value in parts.items()}
            mine = [i for i in range(len(dims)) if (b, i) in grams]
            for i in mine:
                if not ("statistic-frozen" in flags and not due(t)):
                    matrix = unfold(part["s"], i)
                    grams[b, i] = beta2 * grams[b, i] + weight * (matrix @ matrix.T)
            if corrected:
                new_d, step = rescaled(config, part, np.asarray(d[block]), grams, kept, b, mine, due(t), c2, weight,
                                       flags)  # fmt: skip
                d = np.array(d + 0 * parts["g"])
                d[block] = new_d
            else:
                step = part["f"]
                for i in mine:
                    if due(t):
                        kept[b, i] = root(config, grams[b, i], c2, exponents[i], flags)
                    step = multiply(step, kept[b, i], i)
            if graft is not None:
                size = norm(step)
                norms.append(norm(part["n"]))
                if t < first and "start-applied" not in flags:
                    step = part["f"] if "start-ungrafted" in flags else part["n"]
                elif "graft-whole" not in flags:
                    step = step * (norms[-1] / size) if size else step
            short = any(s.stop - s.start < config["max_dim"] for s in block) and len(blocks) > 1
            p[block] = 0 * step if short and "short-blocks-dropped" in flags else step
        if graft is not None and "graft-whole" in flags and t >= first and norm(p):
            p = p * (norm(parts["n"]) / norm(p))
        p = np.reshape(p, shape)
        late = "alpha-after" in flags
        if not coupled and not late:
            p = p + alpha * x
        if mu and "momentum-before" not in flags:
            entering = (1 - damping) * p
            buffer = mu * buffer + entering
            own = p if "dampening-once" in flags else entering
            own = (1 - damping) * g if "nesterov-of-gradient" in flags else own
            p = own + mu * buffer if config["nesterov"] and "nesterov-ignored" not in flags else buffer
        if not coupled and late:
            p = p + alpha * x
        state: dict[str, Any] = {f"grams.{b}.{i}": gram for (b, i), gram in grams.items()}
        if keeps and not corrected:
            state |= {f"roots.{b}.{i}": matrix for (b, i), matrix in kept.items()}
        if corrected and whole:
            state["d"] = d
        elif corrected:
            state |= {f"d.{b}": d[block] for b, block in enumerate(blocks)}
        state |= {"m": m} if config["beta1"] != 0 else {}
        state |= {"v": v} if config["graft"] not in (None, "sgd") else {}
        state |= {"buffer": buffer} if config["momentum"] != 0 else {}
        if config["graft"] is not None and not whole:
            state |= {f"norms.{b}": value for b, value in enumerate(norms or [norm(parts["n"])] * len(blocks))}
        out = np.asarray(p)[()], state


def grafted_step(
    config: Mapping[str, Any],
    f: Array,
    g: Array,
    v: Array,
    graft: str | None,
    t: int,
    unbiased: bool,
    flags: frozenset[str],
) -> tuple[Array, Array]:
    """Return N, and the new v."""
    if graft in (None, "sgd"):
        return f, v
    decay, eps = config["graft_beta2"], config["graft_eps"]
    v = v + g * g if graft == "adagrad" or "graft-summed" in flags else ema(v, g * g, decay)
    correct = graft == "adam" and "graft-uncorrected" not in flags and (unbiased or "graft-tied" not in flags)
    correct = correct or (graft == "rmsprop" and "graft-corrected" in flags)
    used = v / (1 - decay**t) if correct else v
    note(lambda: spread([x for x in np.ravel(used) if x > 0]))
    return quotient(f, sqrt(used + eps) if "graft-eps-inside" in flags else sqrt(used) + eps), v


def root(config: Mapping[str, Any], gram: Array, c2: Any, p: Fraction, flags: frozenset[str]) -> Array:
    """Return R of a statistic."""
    eps = 0 if "eps-ignored" in flags else config["eps"]
    tau = 0 if "trace-ignored" in flags else config["trace_scaling"]
    one = np.eye(len(gram))
    a = (gram + eps * one) / c2 if "eps-early" in flags else gram / c2
    if tau:
        a = a + eps * one if "trace-late" in flags else a
        trace = np.trace(a)
        a = a * (trace if trace > eps else eps) ** -tau if trace > 0 or eps else a
    late = 0 if "eps-early" in flags or (tau and "trace-late" in flags) else eps
    if config["root"] != "eigh":
        note(lambda: spread(eigh(a + late * one)[0]))
    if config["root"] == "coupled_newton":
        return coupled_newton(a + late * one, p.denominator, config["root_steps"])
    if config["root"] == "higher_order":
        return higher_order(a + late * one, p, config["root_steps"])
    return (outside if "eps-outside" in flags else power)(a, -p, late)


def coupled_newton(a: Array, r: int, steps: int) -> Array:
    """Return ``a^(-1/r)`` by coupled Newton iterations."""
    one = np.eye(len(a))
    z = (r + 1) / (2 * norm(a))
    x, m = raised(z, Fraction(1, r)) * one, z * a
    for _ in range(steps):
        t = ((r + 1) * one - m) / r
        x, m = x @ t, np.linalg.matrix_power(t, r) @ m
    return x


def higher_order(a: Array, p: Fraction, steps: int) -> Array:
    """Return ``a^(-p)`` by a round of Newton's iteration and ``steps`` rounds of third order."""
    r, one = p.denominator, np.eye(len(a))
    z = 1 / np.trace(a)
    x, m = raised(z, Fraction(1, r)) * one, z * a
    for i in range(steps + 1):
        rest = one - m
        t = one + rest / r
        if i:
            t = t + real(Fraction(r + 1, 2 * r * r), m) * (rest @ rest)
        x, m = x @ t, np.linalg.matrix_power(t, r) @ m
    return np.linalg.matrix_power(x, p.numerator)


def rescaled(
    config: Mapping[str, Any],
    part: Mapping[str, Array],
    d: Array,
    grams: Mapping[tuple[int, int], Array],
    kept: dict[tuple[int, int], Array],
    b: int,
    mine: list[int],
    due: bool,
    c2: Any,
    weight: Any,
    flags: frozenset[str],
) -> tuple[Array, Array]:
    """Return the new D of a block of `EShampoo`, and its step; renews the bases in ``kept``."""
    eps, beta2 = config["eps"], config["beta2"]

    def onto(x: Array) -> Array:
        for i in mine:
            x = multiply(x, kept[b, i].T, i)
        return x

    stale = onto(part["g"])
    if due:
        for i in mine:
            a = grams[b, i] / c2 + eps * np.eye(len(grams[b, i]))
            old = kept[b, i]
            kept[b, i], order = followed(config, a, old, flags)
            if "d-rotated" in flags:
                d = multiply(d, (kept[b, i].T @ old) ** 2, i)
            elif "d-permuted" in flags or (config["basis"] == "qr" and "d-kept" not in flags):
                d = np.take(d, order, axis=i)
    rotated = stale if "d-old-basis" in flags else onto(part["g"])
    before, d = d, beta2 * d + weight * rotated * rotated
    used = before if "d-late" in flags else d
    used = used if "d-uncorrected" in flags else used / c2
    p = Fraction(1, 2) if "exponent-ignored" in flags else config["exponent"]
    if "eps-inside" in flags:
        denominator = raised(used + eps, p)
    else:
        denominator = np.where(used > 0, raised(np.where(used > 0, used, 1.0), p), 0.0)
        denominator = denominator + (0 if "eps-ignored" in flags else eps)
    note(lambda: spread([x for x in np.ravel(denominator) if x > 0]))
    step = quotient(onto(part["f"]), denominator)
    for i in mine:
        step = multiply(step, kept[b, i], i)
    return d, step


def followed(config: Mapping[str, Any], a: Array, old: Array, flags: frozenset[str]) -> tuple[Array, list[int]]:
    """Return the new basis, and the order of its columns."""
    stay = list(range(len(a)))
    if not (all_finite(a) and all_finite(old)):
        return np.full(old.shape, np.nan), stay
    a = (a + a.T) / 2
    rounds = 1 if "one-round" in flags else config["iterations"]

    def near(q: Array) -> bool:
        inner = q.T @ a @ q
        rest = inner - np.diag(np.diag(inner))
        return bool(norm(rest) <= config["tolerance"] * norm(inner)) and "tolerance-ignored" not in flags

    def eigenvectors() -> Array:
        w, q = eigh(a)
        note(isolation, w, stays=True)  # V is of all bases so far
        return q[:, ::-1] if "descending" in flags else q

    if config["basis"] == "qr_meta" and "exact" not in flags:
        q = old
        for _ in range(rounds):
            q = q if near(q) else gram_schmidt(a @ q, q, flags)
        order = descending(a, q)
        order = order if "descending" in flags else ascending(a, q)
        return q[:, order], order
    if config["basis"] == "eigh" or "exact" in flags:
        new = eigenvectors()
        order = descending(a, old)[::-1]
    else:
        order = descending(a, old)
        new = old[:, order]
        for _ in range(rounds):
            new = gram_schmidt(a @ new, new, flags)
    if near(new if "tolerance-new" in flags else old):
        return old, stay
    return new, order


def ascending(a: Array, q: Array) -> list[int]:
    """Return the order of the columns by ``q^T A q``, the smallest first; equal ones keep their order."""
    values = [column @ a @ column for column in q.T]
    return sorted(range(len(values)), key=lambda j: values[j])


def merged(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> tuple[int, ...]:
    """Return the axes after merging."""
    if config["target"] is None or "merge-ignored" in flags:
        return shape
    target = 1 if "target-ignored" in flags else config["target"]
    dims = shape if "ones-kept" in flags else tuple(d for d in shape if d != 1) or (1,)
    left = "merge-from-the-left" in flags
    dims = dims if left else dims[::-1]
    found: list[int] = []
    for seen, d in enumerate(dims):
        remaining = len(found) + len(dims) - seen
        if seen and remaining > target and found[-1] * d <= config["max_dim"]:
            found[-1] *= d
        else:
            found.append(d)
    return tuple(found if left else found[::-1])


def sides(
    config: Mapping[str, Any], shape: tuple[int, ...], dims: tuple[int, ...], flags: frozenset[str], corrected: bool
) -> list[Fraction]:
    """Return the exponent of each axis, 0 for axes that are not preconditioned."""
    k = max(len(shape if "exponent-unmerged" in flags else dims), 1)
    if corrected:
        return [Fraction(i not in config["ignored_axes"] or "ignored-used" in flags) for i in range(len(dims))]
    default = Fraction(1, 2 * k)
    if "exponent-half" in flags:
        default = Fraction(1, 2)
    elif "exponent-order" in flags:
        default = Fraction(1, k)
    found = []
    for i in range(len(dims)):
        p = config["exponents"][i] if i < len(config["exponents"]) else None
        p = None if "exponents-ignored" in flags or (p == 0 and "exponent-zero-applied" in flags) else p
        found.append(default if p is None else Fraction(p).limit_denominator(1000))
    return found


def cut(dims: tuple[int, ...], size: int) -> Iterator[Piece]:
    """Return the blocks of at most ``size`` on every axis, in row-major order."""
    return product(*([slice(at, min(at + size, d)) for at in range(0, d, size)] for d in dims))


SHARED_EXCLUSIVE = (
    frozenset({"statistic-of-filtered", "l2-unseen", "filter-ignored", "statistic-frozen"}),
    frozenset({"refresh-at-first", "refresh-always"}),
    frozenset({"correction-ignored", "correction-always"}),
    frozenset({"weight-missing", "drop-weight-ignored", "drop-weight-corrected"}),
    frozenset({"weight-missing", "sum-weighted"}),
    frozenset({"filter-ignored", "filter-usual", "filter-late", "beta3-ignored"}),
    frozenset({"graft-ignored", "graft-uncorrected", "graft-corrected", "graft-tied", "graft-summed",
               "graft-eps-inside"}),
    *rivals({"graft-ignored"}, {"graft-of-gradient", "graft-whole", "start-ungrafted", "start-applied"}),
    frozenset({"start-ungrafted", "start-applied"}),
    frozenset({"merge-from-the-left", "target-ignored", "merge-ignored", "ones-kept"}),
    frozenset({"short-blocks-dropped", "blocks-ignored", "graft-whole"}),
    frozenset({"alpha-after", "alpha-ignored", "alpha-coupled", "l2-unseen", "l2-ignored"}),
    frozenset({"momentum-before", "momentum-ignored", "dampening-once", "nesterov-ignored", "nesterov-of-gradient"}),
    frozenset({"dampening-ignored", "dampening-once", "momentum-ignored"}),
    *rivals({"correction-ignored"}, {"filter-usual", "graft-tied", "drop-weight-corrected"}),
)  # fmt: skip

VARIANTS = {
    "Shampoo.production": Variants(
        production,
        PRODUCTION_FLAGS,
        (
            *SHARED_EXCLUSIVE,
            frozenset({"eps-ignored", "eps-early", "eps-outside", "trace-late"}),
            frozenset({"trace-late", "trace-ignored"}),
            frozenset({"exponents-ignored", "exponent-zero-applied", "exponent-half", "exponent-order",
                       "exponent-unmerged"}),
        ),
    ),
    "EShampoo": Variants(
        eshampoo,
        ESHAMPOO_FLAGS,
        (
            *SHARED_EXCLUSIVE,
            frozenset({"eps-inside", "eps-ignored"}),
            frozenset({"d-late", "d-old-basis"}),
            frozenset({"d-rotated", "d-kept", "d-permuted"}),
            frozenset({"d-uncorrected", "correction-ignored"}),
            frozenset({"descending", "exact", "one-round"}),
            frozenset({"tolerance-ignored", "tolerance-new"}),
        ),
    ),
}  # fmt: skip
