"""Frequent Directions, S-AdaGrad and S-Shampoo: the losses of a sketch, and regret.

G_t = sum_s beta2^(t-s) M_s, Gbar_t its sketch of size l, rho_{1:t} the escaped mass, Gtil_t = Gbar_t + rho_{1:t} I, and
Omega = min_{k<l} (sum_{i>k} lambda_i) / (l - k). ``A <= B`` between matrices is written as
``lambda_1(B) + lambda_1(A - B) <= lambda_1(B)``, at the tightest round.

For a certified sketch (`precond_ref.numerics.nystrom`), the bounds on rho_{1:t} have kappa_t l in the place of l, with
kappa_t = tr(G_t - Gbar_t) / (l rho_{1:t}); kappa_t is known only afterwards.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from precond_ref.numerics import nystrom
from precond_ref.numerics import sketch as fd
from precond_ref.theory.base import (
    Array,
    Run,
    Sides,
    Source,
    Statement,
    about,
    np,
    pseudo_power,
    statement,
    trace_power,
)

PAGE = "methods/sketchy.md#what-is-proved"
sadagrad, sshampoo = about("SAdaGrad"), about("SShampoo")
TOLERANCE = 1e-12
"""Rounding of a sketch, as a share of the largest eigenvalue of G_t; observed: 1.2e-13 over 3e5 updates."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sketched:
    """A stream of rows and the sketches after each update."""

    rows: Array
    """(T, q, d)."""
    basis: Array
    """(T, d, k)."""
    eigenvalues: Array
    """(T, k)."""
    escaped: Array
    """rho_{1:t}, (T,)."""
    size: int
    """l."""
    beta2: float
    sums: tuple[Array, Array] | None = None
    """For a certified sketch: the decayed sum of s_l^2 and the sum for tr(G_t - Gbar_t), (T,) each."""

    @property
    def least(self) -> Array:
        """The first of the sums; TypeError without certificates."""
        return self._certified[0]

    @property
    def lost(self) -> Array:
        """The second of the sums; TypeError without certificates."""
        return self._certified[1]

    @property
    def _certified(self) -> tuple[Array, Array]:
        if self.sums is None:
            raise TypeError("the statement is about what theory.sketchy.record_certified(rows, size) returns")
        return self.sums

    @functools.cached_property
    def news(self) -> Array:
        """M_t, (T, d, d)."""
        return np.swapaxes(self.rows, 1, 2) @ self.rows

    @functools.cached_property
    def gram(self) -> Array:
        """G_t, (T, d, d)."""
        total, out = 0.0 * self.news[0], []
        for new in self.news:
            total = self.beta2 * total + new
            out.append(total)
        return np.stack(out)

    @functools.cached_property
    def spectrum(self) -> Array:
        """Eigenvalues of G_t, descending, (T, d)."""
        return np.maximum(np.linalg.eigvalsh(self.gram)[:, ::-1], 0.0)

    @functools.cached_property
    def low(self) -> Array:
        """Gbar_t, (T, d, d)."""
        return (self.basis * self.eigenvalues[:, None, :]) @ np.swapaxes(self.basis, 1, 2)

    @functools.cached_property
    def bound(self) -> Array:
        """Gtil_t, (T, d, d)."""
        return self.low + self.escaped[:, None, None] * np.eye(self.low.shape[-1])

    @property
    def dimension(self) -> int:
        """d."""
        return int(self.rows.shape[-1])

    @functools.cached_property
    def omega(self) -> Array:
        """Omega_l(G_t), (T,)."""
        return omega(self.spectrum, self.size)

    def before(self, array: Array) -> Array:
        """Return the array of the previous round, 0 at the first round."""
        return np.concatenate([0 * array[:1], array[:-1]])

    @functools.cached_property
    def candidates(self) -> Array:
        """Eigenvalues of A_t = beta2 Gbar_{t-1} + M_t, descending, (T, d)."""
        return np.linalg.eigvalsh(self.beta2 * self.before(self.low) + self.news)[:, ::-1]


def record_sketch(
    rows: Array, size: int, beta2: float = 1.0, tail_decay: float | None = None, *, solver: str = "svd", lib: Any = fd
) -> Sketched:
    """Sketch ``rows`` (T, q, d) from an empty sketch; ``lib`` replaces `precond_ref.numerics.sketch`."""
    d = rows.shape[-1]
    k = min(d, size)
    sketch = lib.Sketch(basis=np.zeros((d, k)), eigenvalues=np.zeros(k), escaped=np.zeros(()))
    out = []
    for new in rows:
        sketch = lib.update(sketch, new, beta2, tail_decay, size=size, solver=solver)
        out.append(sketch)
    basis, eigenvalues, escaped = (np.stack(part) for part in zip(*out, strict=True))
    return Sketched(rows=rows, basis=basis, eigenvalues=eigenvalues, escaped=escaped, size=size, beta2=beta2)


def record_certified(
    rows: Array, size: int, beta2: float = 1.0, *, spare: int = nystrom.SPARE, lib: Any = nystrom
) -> Sketched:
    """Return the record of a certified sketch; ``lib`` stands for `precond_ref.numerics.nystrom`."""
    d = rows.shape[-1]
    k = min(d, size)
    sketch = lib.CertifiedSketch(np.zeros((d, k)), np.zeros(k), *(np.zeros(()) for _ in range(3)))
    out = []
    for new in rows:
        sketch = lib.update(sketch, new, beta2, size=size, spare=spare)
        out.append(sketch)
    basis, eigenvalues, escaped, least, lost = (np.stack(part) for part in zip(*out, strict=True))
    return Sketched(
        rows=rows, basis=basis, eigenvalues=eigenvalues, escaped=escaped, size=size, beta2=beta2, sums=(least, lost)
    )


def omega(spectrum: Array, size: Any) -> Array:
    """Return the min over k < l of (sum of eigenvalues after the k-th) / (l - k); ``spectrum`` (..., d) descends.

    ``size`` (l) is any positive number, or one for each spectrum. A k with l - k below 1e-9 is left out, as l - k may
    be rounding there.
    """
    left = np.asarray(size)[..., None] - np.arange(spectrum.shape[-1] + 1)
    tails = np.concatenate([spectrum[..., ::-1].cumsum(axis=-1)[..., ::-1], 0 * spectrum[..., :1]], axis=-1)
    return np.min(np.where(left > 1e-9, tails, np.inf) / np.where(left > 1e-9, left, 1.0), axis=-1)


def effective(size: int, lost: Any, escaped: Any) -> Any:
    """Return kappa l of a certified sketch; l where no mass has escaped."""
    return np.where(escaped > 0, lost / np.where(escaped > 0, escaped, 1.0), size)


def _order(s: Sketched, smaller: Array, larger: Array) -> Sides:
    """Return the sides of smaller <= larger, (T, d, d)."""
    unit = np.maximum(s.spectrum[:, 0], 1e-300)
    excess = np.linalg.eigvalsh(smaller - larger)[:, -1] / unit
    t = int(np.argmax(excess))
    return Sides(left=1 + excess[t], right=1.0, rounding=TOLERANCE, symbols=_symbols(s, t))


def _symbols(s: Sketched, t: int) -> dict[str, Any]:
    return {
        "t": t, "d": s.dimension, "l": s.size, "beta2": s.beta2, "rho": s.escaped[t], "Omega": s.omega[t],
        "lambda_1": s.spectrum[t, 0],
    }  # fmt: skip


def _worst(s: Sketched, left: Array, right: Array, rounding: float = TOLERANCE) -> Sides:
    """Return the sides of left <= right at the round with the largest ratio, in units of lambda_1(G_t)."""
    unit = np.maximum(s.spectrum[:, 0], 1e-300)
    left, right = left / unit, right / unit
    t = int(np.argmax(left / (right + rounding)))
    return Sides(left=left[t], right=right[t] + rounding, rounding=0.0, symbols=_symbols(s, t))


@statement("sketch.lower", "Gbar_t <= G_t", Source.PAPER, PAGE)
def lower(s: Sketched) -> Sides:
    """(i), left half."""
    return _order(s, s.low, s.gram)


@statement("sketch.error", "|G_t - Gbar_t| <= rho_{1:t}", Source.PAPER, PAGE)
def error(s: Sketched) -> Sides:
    """(i), right half; equal for the first l basis vectors in turn."""
    return _worst(s, np.linalg.norm(s.gram - s.low, 2, axis=(1, 2)), s.escaped)


@statement("sketch.mass", "rho_{1:t} <= Omega_l(G_t)", Source.FORM, PAGE)
def mass(s: Sketched) -> Sides:
    """(ii), Lemma 1 and Observation 6: the constant is 1."""
    return _worst(s, s.escaped, s.omega)


@statement("sketch.growth", "beta2 Gtil_{t-1} + M_t <= Gtil_t", Source.PROVED, PAGE)
def growth(s: Sketched) -> Sides:
    """(iii)."""
    return _order(s, s.beta2 * s.before(s.bound) + s.news, s.bound)


@statement(
    "sketch.trace",
    "tr Gbar_t = tr G_t - l rho_{1:t} - sum_s beta2^(t-s) sum_{i>l} lambda_i(A_s), l <= d",
    Source.PROVED,
    PAGE,
    identity=True,
)
def trace(s: Sketched) -> Sides:
    """(iv), at the round where it is worst."""
    gone, beyond = 0.0, []
    for tail in np.maximum(s.candidates[:, s.size :], 0.0).sum(axis=1):
        gone = s.beta2 * gone + tail
        beyond.append(gone)
    left = np.trace(s.low, axis1=1, axis2=2)
    right = np.trace(s.gram, axis1=1, axis2=2) - s.size * s.escaped - np.array(beyond)
    unit = np.maximum(s.spectrum[:, 0], 1e-300)
    t = int(np.argmax(abs(left - right) / unit))
    return Sides(
        left=left[t] / unit[t],
        right=right[t] / unit[t],
        rounding=TOLERANCE,
        assumptions={"l <= d": s.size <= s.dimension},
        symbols=_symbols(s, t),
    )


@statement("sketch.eigenvalues", "lambda_i(Gbar_t) <= lambda_i(G_t)", Source.PROVED, PAGE)
def eigenvalues(s: Sketched) -> Sides:
    """(v), first half, at the worst i."""
    own = np.linalg.eigvalsh(s.low)[:, ::-1]
    excess = np.max((own - s.spectrum) / np.maximum(s.spectrum[:, :1], 1e-300), axis=1)
    t = int(np.argmax(excess))
    return Sides(left=1 + excess[t], right=1.0, rounding=TOLERANCE, symbols=_symbols(s, t))


@statement("sketch.rank", "rank Gbar_t <= l - 1", Source.PAPER, PAGE)
def rank(s: Sketched) -> Sides:
    """(v), second half."""
    t = int(np.argmax(np.sum(s.eigenvalues > 0, axis=1)))
    return Sides(
        left=np.sum(s.eigenvalues[t] > 0),
        right=s.size - 1,
        rounding=0.0,
        assumptions={"l <= d": s.size <= s.dimension},
        symbols=_symbols(s, t),
    )


@statement("sketch.exact", "|Gtil_t - G_t| = 0 for l >= d", Source.PROVED, PAGE, identity=True)
def exact(s: Sketched) -> Sides:
    """(vi), first half."""
    gap = np.linalg.norm(s.bound - s.gram, 2, axis=(1, 2)) / np.maximum(s.spectrum[:, 0], 1e-300)
    t = int(np.argmax(gap))
    return Sides(
        left=gap[t],
        right=0.0,
        rounding=TOLERANCE,
        assumptions={"l >= d": s.size >= s.dimension},
        symbols=_symbols(s, t),
    )


@statement("sketch.low-rank", "rho_{1:t} = 0 while rank G_t < l", Source.PROVED, PAGE, identity=True)
def low_rank(s: Sketched) -> Sides:
    """(vi), second half, at the last round at which the rank of all rows so far is below l."""
    ranks = [np.linalg.matrix_rank(s.rows[: t + 1].reshape(-1, s.dimension)) for t in range(len(s.rows))]
    below = [t for t, r in enumerate(ranks) if r < s.size]
    t = below[-1] if below else 0
    return Sides(
        left=s.escaped[t] / max(s.spectrum[t, 0], 1e-300),
        right=0.0,
        # the square of what rounding of several updates leaves of a singular value: more than the rank decision removes
        rounding=(8 * (s.dimension + s.size + s.rows.shape[1]) * 2.0**-52) ** 2,
        assumptions={"rank < l at first": bool(below)},
        symbols=_symbols(s, t),
    )


@statement("sketch.root-trace", "tr Gtil_t^{1/2} <= tr G_t^{1/2} + sqrt(d (d - l)_+ rho_{1:t})", Source.PROVED, PAGE)
def root_trace(s: Sketched) -> Sides:
    """(vii)."""
    return _root_trace(s, s.size)


def _root_trace(s: Sketched, size: Any) -> Sides:
    d = s.dimension
    left = trace_power(s.bound, 0.5)
    right = np.sum(np.sqrt(s.spectrum), axis=1) + np.sqrt(d * np.maximum(d - size, 0) * s.escaped)
    t = int(np.argmax(left / np.maximum(right, 1e-300)))
    # an eigenvalue 0 is good to u lambda_1, its root to sqrt(u)
    return Sides(left=left[t], right=right[t], rounding=4 * d * 2.0**-26 * right[t], symbols=_symbols(s, t))


# ---- certified sketches ---------------------------------------------------------------------------------------------


def _certified(exact: Statement, formula: str, about: str) -> Statement:
    """Register ``exact`` for certified sketches too: "sketch.lower" as "nystrom.lower", `certified_lower`."""

    @functools.wraps(exact.function)
    def function(*given: Any) -> Sides:
        sides = exact.function(*given)
        if not exact.methods:
            return sides
        met = {name: met for name, met in sides.assumptions.items() if name != "exact cuts"}
        run, *others = given
        return replace(sides, assumptions={**met, "certified": run.form(SShampooForm, *others).certified})

    name = exact.name.partition(".")[2]
    function.__name__, function.__doc__ = f"certified_{name.replace('-', '_')}", about
    return statement(f"nystrom.{name}", formula, Source.PROVED, PAGE, methods=exact.methods)(function)


certified_lower = _certified(
    lower, "Gbar_t <= G_t, certified sketch", "(i), left half, whatever was found of the leading eigenvectors."
)
certified_error = _certified(error, "|G_t - Gbar_t| <= rho_{1:t}, certified", "(i), right half.")
certified_growth = _certified(growth, "beta2 Gtil_{t-1} + M_t <= Gtil_t, certified", "(iii).")


def _cuts(s: Sketched) -> Array:
    """Decayed sum of lambda_l(A_s), (T,)."""
    total, out = 0.0, []
    for cut in np.maximum(s.candidates[:, s.size - 1], 0.0):
        total = s.beta2 * total + cut
        out.append(total)
    return np.array(out)


@statement("nystrom.least", "sum_s beta2^(t-s) s_l^2 <= sum_s beta2^(t-s) lambda_l(A_s), l <= d", Source.PROVED, PAGE)
def certified_least(s: Sketched) -> Sides:
    """Return the number by which ``diagnose`` divides the mass."""
    return _worst(s, s.least, _cuts(s))


@statement("nystrom.weyl", "sum_s beta2^(t-s) lambda_l(A_s) <= rho_{1:t}, certified, l <= d", Source.PROVED, PAGE)
def weyl(s: Sketched) -> Sides:
    """No mass could be smaller."""
    return _worst(s, _cuts(s), s.escaped)


@statement("nystrom.trace", "tr Gbar_t = tr G_t - sum_s beta2^(t-s) |R_s|_F^2", Source.PROVED, PAGE, identity=True)
def certified_trace(s: Sketched) -> Sides:
    """At the round where it is worst."""
    unit = np.maximum(s.spectrum[:, 0], 1e-300)
    left = np.trace(s.low, axis1=1, axis2=2) / unit
    right = (np.trace(s.gram, axis1=1, axis2=2) - s.lost) / unit
    t = int(np.argmax(abs(left - right)))
    return Sides(left=left[t], right=right[t], rounding=TOLERANCE, symbols=_symbols(s, t))


@statement(
    "nystrom.mass", "rho_{1:t} <= Omega_{kappa l}(G_t), kappa l = tr(G_t - Gbar_t) / rho_{1:t}", Source.PROVED, PAGE
)
def certified_mass(s: Sketched) -> Sides:
    """(ii) with the kappa that was measured; kappa >= 1 gives the exact sketch's bound."""
    return _worst(s, s.escaped, omega(s.spectrum, effective(s.size, s.lost, s.escaped)))


@statement(
    "nystrom.root-trace", "tr Gtil_t^{1/2} <= tr G_t^{1/2} + sqrt(d (d - kappa l) rho_{1:t})", Source.PROVED, PAGE
)
def certified_root_trace(s: Sketched) -> Sides:
    """(vii)."""
    return _root_trace(s, effective(s.size, s.lost, s.escaped))


# ---- S-AdaGrad ------------------------------------------------------------------------------------------------------


class SAdaGradForm:
    """The quantities of a run of `SAdaGrad` with ``beta2 = 1`` and a comparator."""

    def __init__(self, run: Run, comparator: Array, diameter: float | None = None) -> None:
        g = run.gradients
        self.d, self.size, self.eta, self.T = g.shape[-1], run.method.size, run.rate, len(g)
        sketch = run.states[-1].sketch
        self.rho = float(sketch.escaped)
        self.bound = (sketch.basis * sketch.eigenvalues) @ sketch.basis.T + self.rho * np.eye(self.d)
        if len(g) > 64 * self.d:  # a long run: squares are accurate enough
            spectrum = np.maximum(np.linalg.eigvalsh(g.T @ g)[::-1], 0.0)
        else:
            spectrum = np.linalg.svd(g, compute_uv=False) ** 2
        self.spectrum = np.concatenate([spectrum, np.zeros(max(self.d - len(spectrum), 0))])
        self.own = float(np.sum(np.sqrt(self.spectrum)))
        """tr G_T^{1/2}."""
        self.omega = float(omega(self.spectrum, self.size))
        far = float(np.max(np.linalg.norm(run.points[:-1] - comparator, axis=1)))
        self.D = far if diameter is None else diameter
        self.regret = run.regret(comparator)
        self.symbols = {
            "D": self.D, "eta": self.eta, "d": self.d, "l": self.size, "rho": self.rho, "Omega": self.omega,
            "tr G^1/2": self.own, "T": self.T,
        }  # fmt: skip
        self.assumptions = {
            "the rate is constant": run.constant_rate,
            "a plain sum": run.method.beta2 == 1 and run.method.delta == 0,
            "D is not exceeded": far <= self.D * (1 + 1e-9),
        }

    def tuned(self) -> dict[str, bool]:
        """Return the assumptions of the paper's forms: eta = D / sqrt(2)."""
        return {**self.assumptions, "eta = D / sqrt 2": abs(self.eta * np.sqrt(2) - self.D) <= 1e-8 * self.D}


def quadratic_sum(run: Run) -> float:
    """Return sum_t g_t^T Gtil_t^{-1/2} g_t, from the sketches and not from the directions."""
    total = 0.0
    for g, state in zip(run.gradients, run.all_states()[1:], strict=True):
        sketch = state.sketch
        bound = (sketch.basis * sketch.eigenvalues) @ sketch.basis.T + sketch.escaped * np.eye(len(g))
        total += float(g @ pseudo_power(bound, -0.5) @ g)
    return total


@sadagrad("sadagrad.quadratic", "sum g_t^T Gtil_t^{-1/2} g_t <= 2 tr G_T^{1/2}", Source.PROVED, PAGE)
def quadratic(run: Run, comparator: Array, diameter: float | None = None) -> Sides:
    """AdaGrad's lemma, for Gtil >= G."""
    form: SAdaGradForm = run.form(SAdaGradForm, comparator, diameter)
    plain = {"a plain sum": form.assumptions["a plain sum"]}
    return Sides(left=run.form(quadratic_sum), right=2 * form.own, symbols=form.symbols, assumptions=plain)


@sadagrad(
    "sadagrad.regret-by-sketch",
    "R_T <= D^2/(2 eta) tr Gtil_T^{1/2} + eta/2 sum g_t^T Gtil_t^{-1/2} g_t",
    Source.PROVED,
    PAGE,
)
def regret_by_sketch(run: Run, comparator: Array, diameter: float | None = None) -> Sides:
    """Any rate; ``diameter`` of the domain, or None: D is the realised distance."""
    form: SAdaGradForm = run.form(SAdaGradForm, comparator, diameter)
    right = form.D**2 / (2 * form.eta) * trace_power(form.bound, 0.5) + form.eta / 2 * run.form(quadratic_sum)
    return Sides(left=form.regret, right=right, symbols=form.symbols, assumptions=form.assumptions)


@sadagrad(
    "sadagrad.regret",
    "R_T <= D^2/(2 eta) (tr G_T^{1/2} + sqrt(d (d - l)_+ rho_{1:T})) + eta tr G_T^{1/2}",
    Source.PROVED,
    PAGE,
)
def regret(run: Run, comparator: Array, diameter: float | None = None) -> Sides:
    """Any rate."""
    form: SAdaGradForm = run.form(SAdaGradForm, comparator, diameter)
    lost = np.sqrt(form.d * max(form.d - form.size, 0) * form.rho)
    right = form.D**2 / (2 * form.eta) * (form.own + lost) + form.eta * form.own
    return Sides(left=form.regret, right=right, symbols=form.symbols, assumptions=form.assumptions)


@sadagrad(
    "sadagrad.theorem-3", "R_T <= D (sqrt 2 tr G_T^{1/2} + d sqrt(Omega_l / 2)), eta = D / sqrt 2", Source.FORM, PAGE
)
def theorem_3(run: Run, comparator: Array, diameter: float | None = None) -> Sides:
    """Theorem 3 of the paper, in its form; the constants were proved here."""
    form: SAdaGradForm = run.form(SAdaGradForm, comparator, diameter)
    right = form.D * (np.sqrt(2) * form.own + form.d * np.sqrt(form.omega / 2))
    return Sides(left=form.regret, right=right, symbols=form.symbols, assumptions=form.tuned())


@sadagrad(
    "sadagrad.corollary-4",
    "R_T <= D (sqrt 2 tr G_T^{1/2} + sqrt(d (d - l)_+ Omega_l / 2)), eta = D / sqrt 2",
    Source.FORM,
    PAGE,
)
def corollary_4(run: Run, comparator: Array, diameter: float | None = None) -> Sides:
    """Corollary 4 of the paper, in its form; the constants were proved here."""
    form: SAdaGradForm = run.form(SAdaGradForm, comparator, diameter)
    right = form.D * (np.sqrt(2) * form.own + np.sqrt(form.d * max(form.d - form.size, 0) * form.omega / 2))
    return Sides(left=form.regret, right=right, symbols=form.symbols, assumptions=form.tuned())


# ---- S-Shampoo ------------------------------------------------------------------------------------------------------


class SShampooForm:
    """The quantities of a run of `SShampoo` on matrices with ``beta2 = 1`` and a comparator; r bounds the ranks."""

    def __init__(self, run: Run, comparator: Array, rank: int) -> None:
        G, eps = run.gradients, run.method.eps
        if G.ndim != 3:
            raise ValueError(f"the parameter must be a matrix, got shape {G.shape[1:]}")
        self.eta, self.r, self.size, self.shape = run.rate, rank, run.method.size, G.shape[1:]
        self.D = float(np.max(np.linalg.norm(run.points[:-1] - comparator, axis=(1, 2))))
        self.own, self.omegas, self.masses, self.roots, certified = [], [], [], [], []
        for turned, sketch, d in zip((G, np.swapaxes(G, 1, 2)), run.states[-1].sketches, self.shape, strict=True):
            spectrum = np.linalg.svd(np.concatenate(list(turned), axis=-1), compute_uv=False) ** 2
            spectrum = np.concatenate([spectrum, np.zeros(max(d - len(spectrum), 0))])
            bound = (sketch.basis * sketch.eigenvalues) @ sketch.basis.T + (sketch.escaped + eps) * np.eye(d)
            self.own.append(float(np.sum((spectrum + eps) ** 0.25)))
            certified.append(hasattr(sketch, "lost"))
            size = effective(self.size, sketch.lost, sketch.escaped) if certified[-1] else self.size
            self.omegas.append(float(omega(spectrum, size)))
            self.masses.append(float(sketch.escaped))
            self.roots.append(float(trace_live(bound, 0.25)))
        self.regret, self.certified = run.regret(comparator), all(certified)
        self.symbols = {
            "D": self.D, "eta": self.eta, "r": rank, "l": self.size, "eps": eps, "T": len(G),
            "tr L^1/4": self.own[0], "tr R^1/4": self.own[1], "rho_L": self.masses[0], "rho_R": self.masses[1],
        }  # fmt: skip
        self.assumptions = {
            "the rate is constant": run.constant_rate,
            "a plain sum": run.method.beta2 == 1 and run.method.tail_decay in (None, 1),
            "renewed at every update": run.method.every == 1,
            "eps is absolute": not run.method.relative_eps,
            "rank at most r": bool(np.all(np.linalg.matrix_rank(G, tol=1e-9 * np.max(np.abs(G))) <= rank)),
        }


def trace_live(matrix: Array, exponent: float) -> Any:
    """Return tr A^exponent without eigenvalues that may be rounding of zero, up to 1e-13 of the largest."""
    w = np.linalg.eigvalsh(matrix)
    return np.sum(np.where(w > 1e-13 * w[..., -1:], np.maximum(w, 0.0), 0.0) ** exponent, axis=-1)


@sshampoo(
    "sshampoo.quadratic",
    "sum <G_t, Ltil_t^{-1/4} G_t Rtil_t^{-1/4}> <= 2 r tr L_T^{1/4} tr R_T^{1/4}",
    Source.PROVED,
    PAGE,
)
def sshampoo_quadratic(run: Run, comparator: Array, rank: int) -> Sides:
    """Shampoo's lemma, for gradients of rank at most r; by the directions taken."""
    form: SShampooForm = run.form(SShampooForm, comparator, rank)
    left = np.sum(run.gradients * run.directions)
    return Sides(
        left=left, right=2 * rank * form.own[0] * form.own[1], symbols=form.symbols, assumptions=form.assumptions
    )


@sshampoo("sshampoo.root-trace", "tr Ltil_T^{1/4} <= tr L_T^{1/4} + m (rho^L_{1:T})^{1/4}", Source.PROVED, PAGE)
def sshampoo_root_trace(run: Run, comparator: Array, rank: int) -> Sides:
    """The statement for the axis on which it is tighter."""
    form: SShampooForm = run.form(SShampooForm, comparator, rank)
    right = [own + d * mass**0.25 for own, d, mass in zip(form.own, form.shape, form.masses, strict=True)]
    i = int(np.argmax(np.array(form.roots) / np.maximum(right, 1e-300)))
    return Sides(
        left=form.roots[i],
        right=right[i],
        rounding=1e-3 * right[i],  # eigenvalues are good to u lambda_1, a fourth root of zero to u^(1/4)
        symbols=form.symbols,
        assumptions={name: met for name, met in form.assumptions.items() if name != "the rate is constant"},
    )


@sshampoo(
    "sshampoo.regret",
    "R_T <= D^2/(2 eta) tr Ltil_T^{1/4} tr Rtil_T^{1/4} + eta r tr L_T^{1/4} tr R_T^{1/4}",
    Source.PROVED,
    PAGE,
)
def sshampoo_regret(run: Run, comparator: Array, rank: int) -> Sides:
    """Any rate."""
    form: SShampooForm = run.form(SShampooForm, comparator, rank)
    right = form.D**2 / (2 * form.eta) * form.roots[0] * form.roots[1] + form.eta * rank * form.own[0] * form.own[1]
    return Sides(left=form.regret, right=right, symbols=form.symbols, assumptions=form.assumptions)


@sshampoo(
    "sshampoo.theorem-5",
    "R_T <= sqrt(2 r) D (tr L_T^{1/4} + m Omega_L^{1/4}) (tr R_T^{1/4} + n Omega_R^{1/4}), eta = D / sqrt(2 r)",
    Source.FORM,
    PAGE,
)
def theorem_5(run: Run, comparator: Array, rank: int) -> Sides:
    """The paper's Theorem 5."""
    form: SShampooForm = run.form(SShampooForm, comparator, rank)
    right = np.sqrt(2 * rank) * form.D
    for own, d, tail in zip(form.own, form.shape, form.omegas, strict=True):
        right = right * (own + d * tail**0.25)
    tuned = abs(form.eta * np.sqrt(2 * rank) - form.D) <= 1e-8 * form.D
    return Sides(
        left=form.regret,
        right=right,
        symbols=form.symbols,
        assumptions={**form.assumptions, "exact cuts": not form.certified, "eta = D / sqrt(2 r)": tuned},
    )


certified_regret = _certified(
    sshampoo_regret,
    "R_T <= D^2/(2 eta) tr Ltil_T^{1/4} tr Rtil_T^{1/4} + eta r tr L_T^{1/4} tr R_T^{1/4}, certified",
    "Any rate, with the masses that were reported.",
)
certified_quadratic = _certified(
    sshampoo_quadratic,
    "sum <G_t, Ltil_t^{-1/4} G_t Rtil_t^{-1/4}> <= 2 r tr L_T^{1/4} tr R_T^{1/4}, certified",
    "Shampoo's lemma.",
)
certified_theorem_5 = _certified(
    theorem_5,
    "R_T <= sqrt(2 r) D (tr L_T^{1/4} + m Omega_{L, kappa l}^{1/4}) (tr R_T^{1/4} + n Omega_{R, kappa l}^{1/4})",
    "Theorem 5 with the kappa of each side as measured, eta = D / sqrt(2 r).",
)


def comparator_at_distance(run: Run, distance: float) -> Array | None:
    """Return a point opposite to the sum of linear gradients with ``distance`` = max_t ||x_t - u||, or None."""
    total = np.sum(run.gradients, axis=0)
    unit = total / max(float(np.linalg.norm(total)), 1e-300)

    def far(length: float) -> float:
        gaps = (run.points[:-1] + length * unit).reshape(len(run.gradients), -1)
        return float(np.max(np.linalg.norm(gaps, axis=1)))

    low, high = 0.0, 2 * distance
    if far(low) > distance or far(high) < distance:
        return None
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if far(middle) > distance else (middle, high)
    return -low * unit


def project_to_ball(radius: float) -> Any:
    """Return the projection to the ball around 0 in the norm of Gtil^{1/2}, by bisection on the multiplier."""

    def project(y: Array, state: Any) -> Array:
        if np.linalg.norm(y) <= radius:
            return y
        sketch = state.sketch
        bound = (sketch.basis * sketch.eigenvalues) @ sketch.basis.T + sketch.escaped * np.eye(len(y))
        w, v = np.linalg.eigh(bound)
        w = np.sqrt(np.where(w > 1e-13 * w[-1], w, 0.0))
        z = v.T @ y

        def at(multiplier: float) -> Array:
            return np.where(w > 0, w * z / np.where(w + multiplier > 0, w + multiplier, 1.0), 0.0)

        low, high = 0.0, float(w[-1]) * (np.linalg.norm(y) / radius + 1)
        if np.linalg.norm(at(0.0)) <= radius:
            return v @ at(0.0)
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if np.linalg.norm(at(middle)) > radius else (low, middle)
        return v @ at(high)

    return project
