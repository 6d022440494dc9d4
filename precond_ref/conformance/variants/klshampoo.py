"""KL-Shampoo, KL-SOAP and their idealised form, with their plausible mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from precond_ref.conformance.arithmetic import eigh, norm, real, spacing, sqrt
from precond_ref.conformance.variants import (
    COMMON,
    EVERY,
    Variants,
    Walk,
    due,
    ema,
    isolation,
    multiply,
    note,
    power,
    quotient,
    rivals,
    spread,
    times,
    unfold,
)

FLAGS = {
    "share-missing-in-eigenvalues": "with sums instead of means of the squares in the eigenvalues",
    "share-missing-in-statistics": "without d_n/D in the statistics, but at the first update",
    "inverse-root": "with the other factors' inverse roots instead of their inverses in the statistics and eigenvalues",
    "other-factors-unused": "with each statistic from the gradient alone, as in Shampoo",
    "exponent-quarter": "with exponent -1/(2N) on each axis, as in Shampoo",
    "eps-per-axis": "with eps added to each eigenvalue instead of to the product of the roots",
    "eps-ignored": "without eps",
    "eigenvalues-of-statistics": "with the eigenvalues taken from the statistic at each renewal",
    "qr-of-statistic": "with the Q-factor of S instead of that of S Q",
    "eigh-at-renewal": "with an eigendecomposition at each renewal instead of one QR",
    "second-axis-new": "with each axis seeing the new eigenvalues of those before it",
    "third-axis-first": "with the eigenvalues of three axes renewed from the last to the first: those of axis 3 are "
    "new in those of axis 2, those of axis 2 in the statistic and eigenvalues of axis 1 (as in the authors' code)",
    "own-factor-too": "with each axis' statistic and eigenvalues whitened by its own factor too",
    "initial-one": "with the eigenvalues started at 1",
    "damping-ignored": "without damping",
    "clamp-ignored": "without the bound of the eigenvalues",
    "momentum-in-basis": "with the average kept in the bases and not carried to the new ones",
    "momentum-corrected": "with a bias-corrected average of gradients",
    "momentum-from-first": "with the first gradient in the average",
    "first-moves": "with a first update that moves the parameter like the later ones",
    "square-of-gradient": "with KL-SOAP's squares taken outside of the bases",
    "normalize-ignored": "without the scaling to root mean square 1",
    "start-identity": "with identity bases at the first update",
    "start-eigh": "with eigenvectors at the first update, asked for or not",
    "decays-swapped": "with the decay of V for the statistics and the other way round",
    "decay-after-moving": "with weight decay applied after the step, and none where the step is zero",  # done by `run`
    **{name: text.replace("roots", "bases") for name, text in EVERY.items()},
}


def kl_shampoo(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """The authors' algorithm."""
    dims = [d for d in shape if d != 1] or [1]
    order, entries = len(dims), int(np.prod(dims))
    b1, b2, eps = config["beta1"], config["beta2"], 0.0 if "eps-ignored" in flags else config["eps"]
    b3 = b2 if config["shampoo_beta"] is None else config["shampoo_beta"]
    if "decays-swapped" in flags:
        b2, b3 = b3, b2
    delta = 0.0 if "damping-ignored" in flags else config["damping"]
    soap, clamp = config["inner"] == "adam", None if "clamp-ignored" in flags else config["clamp"]
    eigen = (config["start"] == "eigh" or "start-eigh" in flags) and "start-identity" not in flags
    half = Fraction(1, 2 * order) if "exponent-quarter" in flags else Fraction(1, 2)
    grams, bases = [np.zeros((d, d)) for d in dims], [np.eye(d) for d in dims]
    start = 1.0 if "initial-one" in flags else config["initial"]
    values = [start + 0 * np.zeros(d) for d in dims]
    m, v, out = np.zeros(dims), np.zeros(dims), None

    def rotated(x: Any, back: bool = False) -> Any:
        for n, q in enumerate(bases):
            x = multiply(x, q if back else q.T, n)
        return x

    for t in times(flags):
        g, _ = yield out
        g = np.reshape(g, dims)
        first = t == 1
        moves = not first or "first-moves" in flags
        if moves or "momentum-from-first" in flags:
            m = ema(m, rotated(g) if "momentum-in-basis" in flags else g, b1)
        used = m / (1 - b1**t) if "momentum-corrected" in flags else m
        inner = used if "momentum-in-basis" in flags else rotated(used)
        turned = rotated(g)
        direction = np.zeros(dims) * g
        if moves:
            if soap:
                v = ema(v, (g if "square-of-gradient" in flags else turned) ** 2, b2)
                u = quotient(inner, sqrt(v) + eps)
            else:
                u = inner
                outer = 1
                for n, w in enumerate(values):
                    outer = outer * _along(_inverse(w + eps if "eps-per-axis" in flags else w, half), n, order)
                u = inner * (outer if "eps-per-axis" in flags else outer / (1 + eps * outer))
            direction = rotated(u, back=True)
            if config["normalize"] and "normalize-ignored" not in flags:
                direction = direction / (real(1e-30, direction) + sqrt(np.sum(direction * direction) / entries))
        renewed = due(t, config["every"], flags)
        new_values: list[Any] = [None] * order
        new_bases: list[Any] = [None] * order
        r = [_inverse(w, Fraction(1, 2)) for w in values]
        backwards = "third-axis-first" in flags and order == 3 and not first

        def unfolded(n: int, whitening: list[Any]) -> tuple[Any, Any]:
            """Return the gradient scaled on the other axes, unfolded, and the damping of this axis."""
            scaled, ridge = turned, delta  # noqa: B023
            for j in range(order):
                if j != n or "own-factor-too" in flags:
                    rj = whitening[j]
                    ridge = ridge * (np.sum(rj * rj) / dims[j])
                    if "inverse-root" in flags:
                        rj = sqrt(rj)
                    if not first and "other-factors-unused" not in flags:  # noqa: B023
                        scaled = scaled * _along(rj, j, order)
            return unfold(scaled, n), ridge

        for n in reversed(range(order)) if backwards else range(order):
            seen, seen_by_values = list(r), list(r)
            if "second-axis-new" in flags and not first:
                seen = seen_by_values = [*(_inverse(w, Fraction(1, 2)) for w in new_values[:n]), *r[n:]]
            elif backwards and n < 2:
                seen_by_values[n + 1] = _inverse(new_values[n + 1], Fraction(1, 2))
                seen = seen_by_values if n == 0 else seen
            y, _ = unfolded(n, seen)
            z = bases[n] @ y
            share = 1 if "share-missing-in-statistics" in flags and not first else real(Fraction(dims[n], entries), y)
            grams[n] = ema(grams[n], share * (z @ z.T), b3)
            w = values[n]
            if not first:
                y, ridge = unfolded(n, seen_by_values)
                mean = 1 if "share-missing-in-eigenvalues" in flags else real(Fraction(dims[n], entries), y)
                w = ema(w, np.sum(y * y, axis=1) * mean + ridge, b3)
                if clamp is not None:
                    floor = real(Fraction(1, max(10, min(dims[n], clamp)) ** 2), y)
                    w = np.where(w > 0, np.maximum(w, floor), w)
            basis = bases[n]
            if first and renewed:
                if eigen:
                    e, q = eigh((grams[n] + grams[n].T) / 2)
                    note(isolation, e, stays=True)
                    basis = q[:, ::-1]
            elif renewed:
                if "eigh-at-renewal" in flags:
                    basis = eigh((grams[n] + grams[n].T) / 2)[1][:, ::-1]
                else:
                    basis = _orthogonal(grams[n] if "qr-of-statistic" in flags else grams[n] @ basis, basis)
                if "eigenvalues-of-statistics" in flags:
                    w = np.maximum(np.diag(basis.T @ grams[n] @ basis), 0)
            new_values[n], new_bases[n] = w, basis
        values, bases = new_values, new_bases
        state = {f"grams.{n}": gram for n, gram in enumerate(grams)}
        state |= {f"factors.{n}": (q * w) @ q.T for n, (q, w) in enumerate(zip(bases, values, strict=True))}
        out = direction.reshape(shape), state | {"m": m.reshape(shape)} | ({"v": v.reshape(shape)} if soap else {})


def _inverse(w: Any, exponent: Fraction) -> Any:
    """Return ``w ** -exponent``, and 0 for w = 0."""
    root = sqrt(w) if exponent == Fraction(1, 2) else np.where(w == 0, 1.0, w) ** real(exponent, w)
    return quotient(np.where(w == 0, 0.0, 1.0), root)


def _along(vector: Any, axis: int, order: int) -> Any:
    return np.reshape(vector, [-1 if i == axis else 1 for i in range(order)])


def _orthogonal(columns: Any, basis: Any) -> Any:
    """Return the Q-factor by the method of Gram and Schmidt, done twice."""
    q: list[Any] = []
    longest = max(norm(column) for column in columns.T)
    residuals = []
    for j in range(len(columns)):
        for vector in (columns[:, j], basis[:, j]):
            rest = vector
            for other in [*q, *q]:
                rest = rest - other * np.sum(other * rest)
            size = norm(rest)
            if size > len(columns) * spacing(columns) * longest or vector is basis[:, j]:
                break
        residuals.append(size)
        q.append(rest / size)
    note(spread, np.array(residuals), stays=True)
    return np.stack(q, axis=1)


EXACT_FLAGS = {
    "share-missing": "without d_n/D in the statistics",
    "share-always": "with d_n/D in the statistics, asked for or not",
    "other-factors-unused": "with each statistic from the gradient alone, as in Shampoo",
    "other-factors-new": "with each axis seeing the new roots of those before it",
    "own-factor-too": "with each axis' statistic whitened by its own root too",
    "exponent-shampoo": "with exponent -1/(2N) on each axis",
    "exponent-half": "with exponent -1/2 on each axis",
    "eps-ignored": "without eps",
    "initial-zero": "with the statistics started at zero",
    "initial-one": "with the statistics started at I",
    "correction-ignored": "without bias corrections",
    "correction-always": "with bias corrections, asked for or not",
    "momentum-ignored": "without the average of gradients",
    "heavy-ball": "with M = beta1 M + G, without the weight 1 - beta1",
    "statistic-of-average": "with the averaged gradient in the statistics",
    "decays-swapped": "with beta1 and beta2 interchanged",
    "statistic-after": "with roots of the statistics before this gradient",
    **EVERY,
}


def exact_form(config: Mapping[str, Any], shape: tuple[int, ...], flags: frozenset[str]) -> Walk:
    """The idealised form, and Meta's form of it."""
    dims = [d for d in shape if d != 1] or [1]
    order, entries = len(dims), int(np.prod(dims))
    b1, b3, eps = config["beta1"], config["beta2"], 0.0 if "eps-ignored" in flags else config["eps"]
    if "decays-swapped" in flags:
        b1, b3 = b3, b1
    exponent = Fraction(1, 2 * order) if config["exponent"] is None else Fraction(float(config["exponent"]))
    exponent = Fraction(1, 2 * order) if "exponent-shampoo" in flags else exponent
    exponent = Fraction(1, 2) if "exponent-half" in flags else exponent
    start = 0.0 if "initial-zero" in flags else 1.0 if "initial-one" in flags else config["initial"]
    corrected = (config["bias_correction"] or "correction-always" in flags) and "correction-ignored" not in flags
    divide = (config["divide"] or "share-always" in flags) and "share-missing" not in flags
    grams, roots = [start * np.eye(d) for d in dims], [np.eye(d) for d in dims]
    m, out = np.zeros(dims), None
    for t in times(flags):
        g, _ = yield out
        g = np.reshape(g, dims)
        m = g if "momentum-ignored" in flags else b1 * m + g if "heavy-ball" in flags else ema(m, g, b1)
        new = list(roots)
        for n in range(order):
            x = m if "statistic-of-average" in flags else g
            for j in range(order):
                if (j != n or "own-factor-too" in flags) and "other-factors-unused" not in flags:
                    x = multiply(x, (new if "other-factors-new" in flags else roots)[j], j)
            x = unfold(x, n)
            old = grams[n]
            grams[n] = ema(old, (real(Fraction(dims[n], entries), x) if divide else 1) * (x @ x.T), b3)
            if due(t, config["every"], flags):
                used = old if "statistic-after" in flags else grams[n]
                new[n] = power(used / (1 - b3**t) if corrected else used, -exponent, eps)
        roots = new
        direction = m / (1 - b1**t) if corrected else m
        for n, root in enumerate(roots):
            direction = multiply(direction, root, n)
        state = {f"grams.{n}": gram for n, gram in enumerate(grams)}
        out = (
            direction.reshape(shape),
            state | {f"roots.{n}": root for n, root in enumerate(roots)} | {"m": m.reshape(shape)},
        )


VARIANTS = {
    "KLShampoo": Variants(
        kl_shampoo,
        FLAGS,
        (
            frozenset({"eps-per-axis", "eps-ignored"}),
            frozenset({"qr-of-statistic", "eigh-at-renewal"}),
            frozenset({"inverse-root", "other-factors-unused"}),
            frozenset({"second-axis-new", "third-axis-first", "other-factors-unused"}),
            frozenset({"own-factor-too", "other-factors-unused"}),
            frozenset({"momentum-from-first", "first-moves"}),
            frozenset({"start-identity", "start-eigh"}),
            frozenset(EVERY),
            *rivals({"decay-after-moving"}, {flag for flag in COMMON if flag.startswith("decay")}),
        ),
    ),
    "KLShampoo.exact": Variants(
        exact_form,
        EXACT_FLAGS,
        (
            frozenset({"share-missing", "share-always"}),
            frozenset({"other-factors-unused", "other-factors-new"}),
            frozenset({"other-factors-unused", "own-factor-too"}),
            frozenset({"exponent-shampoo", "exponent-half"}),
            frozenset({"initial-zero", "initial-one"}),
            frozenset({"correction-ignored", "correction-always"}),
            frozenset({"momentum-ignored", "heavy-ball"}),
            *rivals({"momentum-ignored"}, {"statistic-of-average"}),
            frozenset(EVERY),
        ),
    ),
}
