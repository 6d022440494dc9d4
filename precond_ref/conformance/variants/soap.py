"""SOAP, with its plausible mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from precond_ref.conformance.arithmetic import Array, all_finite, eigh, norm, real, spacing, sqrt
from precond_ref.conformance.variants import (
    COMMON,
    Variants,
    Walk,
    ema,
    isolation,
    multiply,
    note,
    quotient,
    rivals,
    spread,
    times,
    unfold,
)

CERTAIN = 16  # spacings, beside the largest, that count as rounding

SOAP_FLAGS = {
    "v-kept": "with V in its old slots when the columns of a basis are put into another order",
    "v-inverse": "with V permuted by the inverse of the columns' permutation",
    "v-rotated": "with V rotated into the new bases (by the squares of Q_new^T Q_old)",
    "v-reset": "with V set to zero when the bases are renewed",
    "v-other-axis": "with V permuted along the other axis of the same size",
    "ascending": "with the columns in ascending order in front of the QR",
    "unsorted": "with a QR of columns that are not sorted first",
    "rayleigh-stale": "with a_j = q_j^T L q_j of the statistic before this gradient",
    "exact": "with eigenvectors at every renewal instead of one round of orthogonal iteration",
    "two-rounds": "with one round of orthogonal iteration more",
    "renewed-first": "with the bases renewed before they are used",
    "renewed-always": "with the bases renewed at every update",
    "renewed-at-multiples": "with the bases renewed at updates every, 2 every, ... after the first",
    "renewed-at-second": "with the bases renewed at updates 2, 2 + every, ... after the first",
    "first-used": "with a first update that moves the parameter, and bias corrections that count it",
    "correction-late": "with bias corrections that count the first update, which is skipped",
    "correction-ignored": "without the bias corrections",
    "correction-always": "with bias corrections, asked for or not",
    "eps-inside": "with eps inside the root, sqrt(V + eps)",
    "eps-corrected": "with eps added to the root of the corrected V",
    "eps-uncorrected": "with eps added to the root of V before its correction",
    "eps-added": "with eps added to the denominator instead of being its least value",
    "eps-ignored": "without eps",
    "m-left-behind": "with M kept in the coordinates of the bases and not carried over when these are renewed",
    "m-ignored": "with the gradient itself in the place of its average",
    "back-transposed": "with Q^T in the place of Q on the way back",
    "betas-swapped": "with the decay of V for L, and that of L for V",
    "shampoo-beta-ignored": "with beta2 for L too",
    "shampoo-beta-for-v": "with shampoo_beta for V too",
    "beta1-for-l": "with beta1 for L",
    "statistic-of-m": "with the statistics taken from M instead of the gradient",
    "statistic-frozen": "with statistics that see only the gradients of updates that renew the bases",
    "long-axes-preconditioned": "with a basis for axes longer than max_dim too",
    "long-axes-end-all": "without any basis where one axis is longer than max_dim",
    "vectors-preconditioned": "with a basis for vectors too",
    "vectors-ignored": "without a basis for vectors",
    "normalize-ignored": "without the division by the root mean square",
    "normalize-last": "with the bias correction before the division by the root mean square",
    "normalize-gradient": "with the gradient divided by its root mean square, not the update",
    "merge-ignored": "without merging",
    "merge-from-the-right": "with axes merged from the right",
    "layout-ignored": "with the axes in their own order, not 0, 3, 1, 2",
    "sort-early": "with the columns sorted before the QR",
    "sort-late": "with the columns sorted after the QR",
    "decay-after-moving": "with weight decay applied after the step, and none where the step is zero",  # done by `run`
    "nesterov-ignored": "without the look-ahead",
    "nesterov-same": "with 1 - beta1^s instead of 1 - beta1^(s+1) under the look-ahead's average",
}


def soap(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """SOAP for one parameter."""
    beta1, beta2, eps = config["beta1"], config["beta2"], config["eps"]
    beta3 = beta2 if config["shampoo_beta"] is None else config["shampoo_beta"]
    decay_v, decay_l = beta2, beta3
    if "betas-swapped" in flags:
        decay_v, decay_l = beta3, beta2
    elif "shampoo-beta-ignored" in flags:
        decay_l = beta2
    elif "shampoo-beta-for-v" in flags:
        decay_v = beta3
    elif "beta1-for-l" in flags:
        decay_l = beta1
    eps = 0.0 if "eps-ignored" in flags else eps
    early = config["order"] == "update_first"
    skip = not early and "first-used" not in flags
    moved, dims, preconditioned = layout(config, shape, flags)
    grams: dict[int, Array] = {i: np.zeros((dims[i], dims[i])) for i in preconditioned}
    bases: dict[int, Array] = {i: np.eye(dims[i]) for i in preconditioned}
    m, v, out = np.zeros(shape), np.zeros(dims), None
    behind = np.zeros(dims)  # M in the coordinates of the bases, of "m-left-behind"

    def there(x: Array) -> Array:
        return np.reshape(np.transpose(x, (0, 3, 1, 2)) if moved != shape else x, dims)

    def back(x: Array) -> Array:
        x = np.reshape(x, moved)
        return np.transpose(x, (0, 2, 3, 1)) if moved != shape else x

    def rotated(x: Array, home: bool = False) -> Array:
        for i, q in bases.items():
            x = multiply(x, q if home else q.T, i)
        return x

    def due(t: int) -> bool:
        every = config["every"]
        if t == 1 or "renewed-always" in flags:
            return True
        if "renewed-at-multiples" in flags:
            return t % every == 0
        return (t - (2 if "renewed-at-second" in flags else 1)) % every == 0

    def observe(g: Array, t: int) -> None:
        nonlocal v
        before, seen = dict(grams), there(m) if "statistic-of-m" in flags and t > 1 else g
        for i in grams:
            if not ("statistic-frozen" in flags and not due(t)):
                grams[i] = ema(grams[i], unfold(seen, i) @ unfold(seen, i).T, decay_l)
        if not due(t):
            return
        for i, gram in grams.items():
            stale = before[i] if "rayleigh-stale" in flags and t > 1 else gram
            bases[i], v = renewed(config, gram, stale, bases[i], v, i, t == 1, flags)
        if "v-reset" in flags:
            v = v * 0

    for t in times(flags):
        grad, _ = yield out
        if "normalize-gradient" in flags:
            grad = grad / (sqrt(real(1, grad) * np.sum(grad * grad) / max(grad.size, 1)) or 1)
        g = there(grad)
        if early or t == 1 or "renewed-first" in flags:
            observe(g, t)
        direction = 0 * grad
        rms: Any = 0.0
        if t > 1 or not skip:
            s = t if early or {"first-used", "correction-late"} & flags else t - 1
            corrected = (
                config["bias_correction"] or "correction-always" in flags
            ) and "correction-ignored" not in flags
            c1, c_next, c2 = (1 - beta1**s, 1 - beta1 ** (s + 1), 1 - beta2**s) if corrected else (1, 1, 1)
            g_rotated = rotated(g)
            m = ema(m, grad, beta1)
            behind = ema(behind, g_rotated, beta1)
            average = behind if "m-left-behind" in flags else rotated(there(m))
            v = ema(v, g_rotated * g_rotated, decay_v)
            average = g_rotated if "m-ignored" in flags else average
            if config["nesterov"] and "nesterov-ignored" not in flags:
                c_next = c1 if "nesterov-same" in flags else c_next
                average, c1 = beta1 * average / c_next + (1 - beta1) * g_rotated / c1, 1
            position = config["eps_position"]
            for name in ("corrected", "uncorrected"):
                position = name if f"eps-{name}" in flags else position
            root, after = sqrt(v / c2), 1
            if "eps-inside" in flags:
                root = sqrt(v / c2 + eps)
            elif position == "uncorrected":
                root, after = sqrt(v) + eps, sqrt(real(1, v) * c2)
            elif position == "corrected" or "eps-added" in flags:
                root = root + eps
            else:
                root = np.maximum(root, eps)
            note(positive_spread, root)
            n = quotient(average, root)
            for i, q in bases.items():
                n = multiply(n, q.T if "back-transposed" in flags else q, i)
            rms = sqrt(real(1, n) * np.sum(n * n) / max(n.size, 1))
            factor = after / c1
            if config["normalize"] and "normalize-last" in flags:
                n, factor = n * factor, 1
                n = quotient(n, np.full(n.shape, sqrt(real(1, n) * np.sum(n * n) / n.size) + config["normalize_eps"]))
            elif config["normalize"] and "normalize-ignored" not in flags:
                n = quotient(n, np.full(n.shape, rms + config["normalize_eps"]))
            direction = back(n * factor)
        if not (early or t == 1 or "renewed-first" in flags):
            observe(g, t)
        state: dict[str, Any] = {"m": m, "v": v} | {f"grams.{i}": gram for i, gram in grams.items()}
        out = direction, state | ({"rms": rms} if config["normalize"] else {})


def positive_spread(values: Array) -> Any:
    """Return the largest value over the smallest one above 0."""
    return spread([x for x in np.ravel(values) if x > 0])


def layout(
    config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]
) -> tuple[tuple[int, ...], tuple[int, ...], list[int]]:
    """Return the shape with its axes in order, the axes after merging, and which of these have a basis."""
    bound = config["max_dim"]
    vectors = (config["vectors"] or "vectors-preconditioned" in flags) and "vectors-ignored" not in flags
    plain: tuple[Any, ...] = (shape, shape, [])
    if 0 in shape or not shape or (len(shape) == 1 and not vectors):
        return plain
    moved = dims = shape
    if config["merge"] and "merge-ignored" not in flags:
        if config["channels_last"] and len(shape) == 4 and "layout-ignored" not in flags:
            moved = (shape[0], shape[3], shape[1], shape[2])
        right = "merge-from-the-right" in flags
        dims, product = (), 1
        for d in moved[::-1] if right else moved:
            if product * d <= bound:
                product *= d
                continue
            dims += (product,) if product > 1 else (d,)
            product = d if product > 1 else 1
        if product > 1 or not dims:
            dims += (product,)
        dims = dims[::-1] if right else dims
    found = [i for i, d in enumerate(dims) if d <= bound or "long-axes-preconditioned" in flags]
    if "long-axes-end-all" in flags and len(found) < len(dims):
        found = []
    return (moved, dims, found) if found else plain


def renewed(
    config: Mapping[str, Any],
    gram: Array,
    stale: Array,
    old: Array,
    v: Array,
    axis: int,
    first: bool,
    flags: frozenset[str],
) -> tuple[Array, Array]:
    """Return the new basis, and V in the order of its columns."""
    if not (all_finite(gram) and all_finite(old)):
        return np.full(old.shape, np.nan), v
    gram = (gram + gram.T) / 2
    early = (config["sort"] == "before" or "sort-early" in flags) and "sort-late" not in flags
    order = list(range(len(gram)))
    if early and "unsorted" not in flags:
        order = descending(stale, old)[:: -1 if "ascending" in flags else 1]
    if first or config["basis"] == "eigh" or "exact" in flags:
        w, q = eigh(gram)
        note(isolation, w, stays=True)  # V is of all bases so far
        new = q[:, ::-1]
    else:
        new = old[:, order]
        for _ in range(config["iterations"] + ("two-rounds" in flags)):
            new = gram_schmidt(gram @ new, new, flags)
        if not early and "unsorted" not in flags:
            order = descending(gram, new)
            new = new[:, order]
    if config["second_moment"] == "rotate" or "v-rotated" in flags:
        return new, multiply(v, (new.T @ old) ** 2, axis)
    if config["second_moment"] == "keep" or "v-kept" in flags:
        return new, v
    if "v-inverse" in flags:
        order = list(np.argsort(order))
    if "v-other-axis" in flags:
        axis = next((i for i, d in enumerate(v.shape) if i != axis and d == len(gram)), axis)
    return new, np.take(v, order, axis=axis)


def descending(gram: Array, basis: Array) -> list[int]:
    """Return the order of columns by ``q^T L q``, the largest first; rounding is 0, equal ones keep their order."""
    a = [q @ gram @ q for q in basis.T]
    least = CERTAIN * spacing(gram) * max(a)
    return sorted(range(len(a)), key=lambda j: -a[j] if a[j] > least else 0)


def gram_schmidt(columns: Array, spare: Array, flags: frozenset[str]) -> Array:
    """Return the columns after Gram-Schmidt from left to right; ``spare`` replaces dependent ones, after all others."""
    d, spare = len(columns), spare[:, :: -1 if "other-completion" in flags else 1]
    least = CERTAIN * spacing(columns) * max(norm(z) for z in columns.T)
    found: dict[int, Array] = {}

    def rest(x: Array) -> Array:
        for _ in range(2):
            for q in found.values():
                x = x - q * (q @ x)
        return x

    for j in range(d):
        x = rest(columns[:, j])
        if norm(x) > least:
            found[j] = x / norm(x)
    for j in range(d):
        if j not in found:
            x = rest(spare[:, j])
            found[j] = x / norm(x)
    return np.stack([found[j] for j in range(d)], axis=1)


VARIANTS = {
    "SOAP": Variants(
        soap,
        SOAP_FLAGS,
        (
            frozenset({"v-kept", "v-inverse", "v-rotated", "v-reset", "v-other-axis"}),
            frozenset({"ascending", "unsorted", "rayleigh-stale", "sort-early", "sort-late", "exact", "two-rounds"}),
            frozenset({"renewed-always", "renewed-at-multiples", "renewed-at-second"}),
            frozenset({"first-used", "correction-late", "correction-ignored", "correction-always"}),
            frozenset({"eps-inside", "eps-corrected", "eps-uncorrected", "eps-added", "eps-ignored"}),
            frozenset({"m-left-behind", "m-ignored"}),
            frozenset({"betas-swapped", "shampoo-beta-ignored", "shampoo-beta-for-v", "beta1-for-l"}),
            frozenset({"statistic-of-m", "statistic-frozen"}),
            frozenset({"long-axes-preconditioned", "long-axes-end-all"}),
            frozenset({"vectors-preconditioned", "vectors-ignored"}),
            frozenset({"normalize-ignored", "normalize-last", "normalize-gradient"}),
            frozenset({"merge-ignored", "merge-from-the-right", "layout-ignored"}),
            frozenset({"nesterov-ignored", "nesterov-same", "m-ignored"}),
            *rivals({"decay-after-moving"}, {flag for flag in COMMON if flag.startswith("decay")}),
            *rivals({"renewed-first"}, {"first-used", "rayleigh-stale"}),
        ),
    ),
}
