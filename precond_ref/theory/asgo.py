"""ASGO's Algorithm 1 and its diagonal form: an energy identity, regret, rates, and comparisons with other methods.

With W_{t+1} = W_t - eta Lam_t^{-1} G_t, Lam_t = V_t^{1/2} + eps I, U any comparator: D = max_t ||W_t - U||_op as
realised, S = tr V_{T-1}^{1/2} = ||[G_0 ... G_{T-1}]||_*, c = D^2 / (2 eta) + eta. A run with ``side="right"`` is
transposed first.
"""

from __future__ import annotations

import functools
from typing import Any

from precond_ref.problems.online import Objective
from precond_ref.theory.base import ROUNDING, Array, Run, Sides, Source, about, np, pseudo_power

PAGE = "methods/asgo.md#what-is-proved"
statement = about("ASGO.theory")
U64 = 2.0**-53


class LeftForm:
    """The quantities of a run of `ASGO.theory` or `DASGO.theory`, with a comparator and the statistic on the left."""

    def __init__(self, run: Run, comparator: Array) -> None:
        turn = getattr(run.method, "side", "left") == "right"
        X, G, P = run.points - comparator, run.gradients, run.directions
        self.X, self.G, self.P = (np.swapaxes(a, -1, -2) for a in (X, G, P)) if turn else (X, G, P)
        self.eta, self.eps, self.m, self.T = run.rate, run.method.eps, self.X.shape[-2], len(G)
        self.wide = np.concatenate(list(self.G), axis=-1)
        """[G_0 ... G_{T-1}]."""
        self.D = float(np.max(np.linalg.svd(self.X[:-1], compute_uv=False)[..., 0]))
        self.S = float(np.sum(np.linalg.svd(self.wide, compute_uv=False)))
        self.c = self.D**2 / (2 * self.eta) + self.eta
        self.tail = self.D**2 * self.m * self.eps / (2 * self.eta)
        self.regret = float(np.sum(self.G * self.X[:-1]))
        self.drift = float(np.sum(self.G * self.P))
        """sum ||G_t||^2_{Lam_t^{-1}}, by the directions taken."""
        self.symbols = {"D": self.D, "S": self.S, "eta": self.eta, "eps": self.eps, "m": self.m, "T": self.T}
        self.assumptions = {"the rate is constant": run.constant_rate}

    @functools.cached_property
    def roots(self) -> tuple[Array, float, float]:
        """Return Lam_t (T, m, m), the largest error of a singular value in V_t, and the smallest ratio s / max(s).

        Lam_t comes from the singular values s of [G_0 ... G_t]; V_t is not formed. V_t holds squares: in it, s has an
        error of u max(s)^2 / s, and an s below sqrt(u) max(s) is lost. Where s is 0, rounding of G is multiplied by
        1 / eps; without eps it is multiplied by 1 / sqrt(u) where rounding of V_t counts as more than zero.
        """
        n = self.G.shape[-1]
        out, loss, least = [], 0.0, 1.0
        for t in range(self.T):
            u, s, _ = np.linalg.svd(self.wide[:, : (t + 1) * n], full_matrices=False)
            relative = s[s > 0] / s[0] if s[0] > 0 else np.ones(1)
            loss = max(loss, float(np.max(np.where(relative < 2e-7, relative, U64 / relative))))
            least = min(least, float(relative[relative > 1e-12].min()))  # the others are zeros
            if self.eps > 0:
                loss = max(loss, U64 * float(s[0]) / self.eps)
            elif len(s) < self.m or relative.min() < 1e-12:
                loss = max(loss, 2.0**-27)
            out.append((u * s) @ u.T + self.eps * np.eye(self.m))
        return np.stack(out), loss, least

    @property
    def rounding(self) -> float:
        """Return the largest share of a sum over the rounds that may be rounding of the steps."""
        return ROUNDING + 8 * self.roots[1]

    def energy(self, Lam: Array) -> tuple[list[Any], list[Any]]:
        """Return the terms of the left and the right side of the energy identity."""
        X, G = self.X, self.G
        growth = np.diff(Lam, axis=0)
        inverse = np.linalg.pinv(Lam, rcond=1e-7, hermitian=True)
        right = [
            np.sum(X[0] * (Lam[0] @ X[0])),
            *np.sum(X[1:-1] * (growth @ X[1:-1]), axis=(1, 2)),
            -np.sum(X[-1] * (Lam[-1] @ X[-1])),
            *(self.eta**2 * np.sum(G * (inverse @ G), axis=(1, 2))),
        ]
        return list(2 * self.eta * np.sum(G * X[:-1], axis=(1, 2))), right


@statement(
    "asgo.energy",
    "2 eta sum <G_t, W_t - U> = |W_0 - U|^2_{Lam_0} + sum_{t>0} |W_t - U|^2_{Lam_t - Lam_{t-1}} "
    "- |W_T - U|^2_{Lam_{T-1}} + eta^2 sum |G_t|^2_{Lam_t^{-1}}",
    Source.PROVED,
    PAGE,
    identity=True,
)
def energy(run: Run, comparator: Array) -> Sides:
    """T0: any gradients, any comparator; the roots are computed again, from singular values."""
    form: LeftForm = run.form(LeftForm, comparator)
    Lam, loss, _ = form.roots
    left, right = form.energy(Lam)
    size = sum(abs(x) for x in (*left, *right))
    # below sqrt(u) of the largest, a root is lost in V with eps = 0: the identity then holds with another Lam
    readable = form.eps > 0 or loss <= 2.0**-26
    return Sides(
        left=sum(left),
        right=sum(right),
        rounding=(1e-11 + 8 * loss) * size,
        assumptions={**form.assumptions, "float64 holds the squares": readable},
        symbols={**form.symbols, "loss": loss},
    )


@statement(
    "asgo.diagonal-energy",
    "the same for DASGO, Lam_t = diag(d_t^{1/2} + eps)",
    Source.PROVED,
    PAGE,
    identity=True,
    methods=("DASGO.theory",),
)
def diagonal_energy(run: Run, comparator: Array) -> Sides:
    """T0 of `DASGO.theory`."""
    form: LeftForm = run.form(LeftForm, comparator)
    sums = np.sqrt(np.cumsum(np.sum(form.G**2, axis=2), axis=0)) + form.eps
    left, right = form.energy(sums[:, :, None] * np.eye(form.m))
    size = sum(abs(x) for x in (*left, *right))
    return Sides(
        left=sum(left), right=sum(right), rounding=1e-11 * size, assumptions=form.assumptions, symbols=form.symbols
    )


@statement("asgo.drift", "sum |G_t|^2_{Lam_t^{-1}} <= 2 S", Source.PROVED, PAGE)
def drift(run: Run, comparator: Array) -> Sides:
    """L1, a property of the gradients alone."""
    form: LeftForm = run.form(LeftForm, comparator)
    return Sides(left=form.drift, right=2 * form.S, rounding=form.rounding * form.S, symbols=form.symbols)


@statement(
    "asgo.norm", "sum_t |W_t - U|^2_{A_t} <= sum_t |W_t - U|_op^2 tr A_t, A_t = Lam_t - Lam_{t-1}", Source.PROVED, PAGE
)
def norm(run: Run, comparator: Array) -> Sides:
    """L2, summed over the rounds (Lam_{-1} = 0)."""
    form: LeftForm = run.form(LeftForm, comparator)
    Lam, _, _ = form.roots
    growth = np.diff(Lam, axis=0, prepend=0 * Lam[:1])
    X = form.X[:-1]
    left = np.sum(X * (growth @ X))
    right = np.sum(np.linalg.svd(X, compute_uv=False)[:, 0] ** 2 * np.trace(growth, axis1=1, axis2=2))
    return Sides(left=left, right=right, symbols=form.symbols)


@statement("asgo.monotone", "Lam_t >= Lam_{t-1}", Source.PROVED, PAGE)
def monotone(run: Run, comparator: Array) -> Sides:
    """The square root is operator monotone; V_t is the method's. Left side: the largest fall, in units of |Lam_T|."""
    turn = [np.asarray(state.gram) for state in run.all_states()[1:]]
    roots = pseudo_power(np.stack(turn), 0.5, floor=0.0)
    top = np.linalg.norm(roots[-1], 2)
    fall = -np.min(np.linalg.eigvalsh(np.diff(roots, axis=0)), initial=0.0) / (top + 1e-300)
    # a zero eigenvalue of V is good to u |V|, its root to sqrt(u)
    return Sides(left=1 + fall, right=1.0, rounding=8 * roots.shape[-1] * 2.0**-26, symbols={"T": len(turn)})


@statement("asgo.regret", "sum <G_t, W_t - U> <= D^2/(2 eta) (S + m eps) + eta S", Source.PROVED, PAGE)
def regret(run: Run, comparator: Array) -> Sides:
    """T1: any gradients, also chosen by an adversary, any comparator, any rate."""
    form: LeftForm = run.form(LeftForm, comparator)
    right = form.D**2 / (2 * form.eta) * (form.S + form.m * form.eps) + form.eta * form.S
    return Sides(
        left=form.regret,
        right=right,
        rounding=form.rounding * right,
        symbols=form.symbols,
        assumptions=form.assumptions,
    )


@statement(
    "asgo.regret-sharper",
    "sum <G_t, W_t - U> + |W_T - U|^2_{Lam_{T-1}} / (2 eta) "
    "<= D^2/(2 eta) (S + m eps) + eta/2 sum |G_t|^2_{Lam_t^{-1}}",
    Source.PROVED,
    PAGE,
)
def regret_sharper(run: Run, comparator: Array) -> Sides:
    """T1 before its two last estimates."""
    form: LeftForm = run.form(LeftForm, comparator)
    u, s, _ = np.linalg.svd(form.wide, full_matrices=False)
    last = form.X[-1]
    over = (np.sum((np.sqrt(s)[:, None] * (u.T @ last)) ** 2) + form.eps * np.sum(last**2)) / (2 * form.eta)
    right = form.D**2 / (2 * form.eta) * (form.S + form.m * form.eps) + form.eta / 2 * form.drift
    return Sides(
        left=form.regret + over,
        right=right,
        rounding=form.rounding * right,
        symbols=form.symbols,
        assumptions=form.assumptions,
    )


@statement("asgo.step", "|W_{t+1} - W_t|_op <= eta", Source.PROVED, "methods/asgo.md#coincides-with")
def step(run: Run, comparator: Array) -> Sides:
    """V_t >= G_t G_t^T; in floating point as long as V has the small singular values."""
    form: LeftForm = run.form(LeftForm, comparator)
    _, _, least = form.roots
    top = float(np.linalg.norm(form.wide, 2))
    # V^{1/2} is good to sqrt(u) of its norm; without eps, an inverse root of V to u over its share of the largest
    noise = 2.0**-26 * top / form.eps if form.eps > 0 else U64 / least**2
    left = np.max(np.linalg.svd(np.diff(form.X, axis=0), compute_uv=False)[:, 0])
    return Sides(
        left=left,
        right=form.eta,
        rounding=(1e-9 + 8 * form.m * noise) * form.eta,
        symbols={**form.symbols, "noise": noise},
        assumptions={"float64 holds the squares": noise <= 1e-4},
    )


def _average_gap(run: Run, objective: Objective) -> float:
    return float(objective.value(np.mean(run.points[:-1], axis=0)))


@statement("asgo.nonsmooth", "f(mean W_t) - f* <= (c S + D^2 m eps / (2 eta)) / T", Source.PROVED, PAGE)
def nonsmooth(run: Run, objective: Objective) -> Sides:
    """T2 with the realised S: f convex, subgradients."""
    form: LeftForm = run.form(LeftForm, objective.minimizer)
    right = (form.c * form.S + form.tail) / form.T
    return Sides(left=_average_gap(run, objective), right=right, symbols=form.symbols, assumptions=form.assumptions)


@statement("asgo.nonsmooth-rate", "f(mean W_t) - f* <= c tr Q / sqrt(T) + D^2 m eps / (2 eta T)", Source.PROVED, PAGE)
def nonsmooth_rate(run: Run, objective: Objective) -> Sides:
    """T2 with G_t G_t^T <= Q^2 = q^2 I, q the largest spectral norm of the run."""
    form: LeftForm = run.form(LeftForm, objective.minimizer)
    q = float(np.max(np.linalg.svd(form.G, compute_uv=False)[:, 0]))
    right = form.c * form.m * q / np.sqrt(form.T) + form.tail / form.T
    return Sides(
        left=_average_gap(run, objective), right=right, symbols={**form.symbols, "q": q}, assumptions=form.assumptions
    )


@statement("asgo.smooth", "sum (f(W_t) - f*) <= c^2/2 tr L + D^2 m eps / (2 eta)", Source.PROVED, PAGE)
def smooth(run: Run, objective: Objective) -> Sides:
    """T3 without noise: f convex, smooth with the matrix L."""
    form: LeftForm = run.form(LeftForm, objective.minimizer)
    right = form.c**2 / 2 * np.trace(objective.curvature) + form.tail
    left = sum(float(objective.value(W)) for W in run.points[:-1])
    return Sides(
        left=left,
        right=right,
        symbols={**form.symbols, "tr L": np.trace(objective.curvature)},
        assumptions={**form.assumptions, "left side": getattr(run.method, "side", "left") == "left"},
    )


@statement("asgo.curvature", "S^2 <= tr L sum |G_t|^2_{L^{-1}}", Source.PROVED, PAGE)
def curvature(run: Run, objective: Objective) -> Sides:
    """L3, for any L > 0."""
    form: LeftForm = run.form(LeftForm, objective.minimizer)
    z2 = np.sum(form.G * np.linalg.solve(objective.curvature, form.G))
    return Sides(left=form.S**2, right=np.trace(objective.curvature) * z2, symbols={**form.symbols, "z^2": z2})


@statement(
    "asgo.noisy",
    "E sum (f(W_t) - f*) <= c^2/2 tr L + c sqrt(T) tr Vn + D^2 m eps / (2 eta), E[N_t N_t^T] <= Vn^2",
    Source.PROVED,
    PAGE,
)
def noisy(run: Run, objective: Objective, noise_trace: float) -> Sides:
    """T3 with noise, D the largest over the replicas (first axis of the points); the left side is a mean over them."""
    X = run.points[:-1] - objective.minimizer
    T, m, eta, eps = len(X), X.shape[-2], run.rate, run.method.eps
    D = float(np.max(np.linalg.svd(X, compute_uv=False)[..., 0]))
    c = D**2 / (2 * eta) + eta
    trace = np.trace(objective.curvature)
    right = c**2 / 2 * trace + c * np.sqrt(T) * noise_trace + D**2 * m * eps / (2 * eta)
    left = np.mean(np.sum([objective.value(W) for W in run.points[:-1]], axis=0))
    return Sides(
        left=left,
        right=right,
        symbols={"D": D, "eta": eta, "T": T, "tr L": trace, "tr Vn": noise_trace, "replicas": X.shape[1]},
        assumptions={"the rate is constant": run.constant_rate},
    )


@statement("asgo.shampoo", "S <= tr L^{1/4} tr R^{1/4}, L = sum G_t G_t^T, R = sum G_t^T G_t", Source.PROVED, PAGE)
def shampoo(run: Run, comparator: Array) -> Sides:
    """T4: never more than Shampoo's quantity; S from the method's own V."""
    form: LeftForm = run.form(LeftForm, comparator)
    S, slack = own_root_trace(run)
    quarter = [
        np.sum(np.sqrt(np.linalg.svd(np.concatenate(list(a), axis=-1), compute_uv=False)))
        for a in (form.G, np.swapaxes(form.G, -1, -2))
    ]
    return Sides(left=S, right=quarter[0] * quarter[1], rounding=slack * S, symbols=form.symbols)


@statement("asgo.rank", "S <= sqrt(rank V) (sum |G_t|_F^2)^{1/2}", Source.PROVED, PAGE)
def rank(run: Run, comparator: Array) -> Sides:
    """T4 against the quantity of SGD; S from the method's own V."""
    form: LeftForm = run.form(LeftForm, comparator)
    S, slack = own_root_trace(run)
    r = np.linalg.matrix_rank(form.wide)
    return Sides(left=S, right=np.sqrt(r * np.sum(form.G**2)), rounding=slack * S, symbols={**form.symbols, "rank": r})


def own_root_trace(run: Run) -> tuple[float, float]:
    """Return S of the method's ``diagnose``, and its relative error: eigenvalues of V have an error of u ||V||."""
    report = run.method.diagnose(run.states[-1])
    return float(report.root_trace), 8 * len(np.atleast_1d(report.eigenvalues)) * 2.0**-26


@statement(
    "asgo.row-regret",
    "sum <G_t, W_t - U> <= D^2/(2 eta) (sum_i s_i + m eps) + eta sum_i s_i",
    Source.PROVED,
    PAGE,
    methods=("DASGO.theory", "AdaGrad"),
)
def row_regret(run: Run, comparator: Array) -> Sides:
    """T5, `DASGO.theory`: D = max_{t,i} |(W_t - U)_i|, s_i = (sum_t |(G_t)_i|^2)^{1/2}.

    For `AdaGrad` each entry is a row, and a start of the sum of squares (``initial``) counts in s_i.
    """
    m = run.points[0].size if run.method.elementwise else run.points.shape[1]
    X, G = (
        (run.points - comparator).reshape(len(run.points), m, -1),
        run.gradients.reshape(-1, m, run.points[0].size // m),
    )
    s = np.sqrt(np.sum(G**2, axis=(0, 2)) + getattr(run.method, "initial", 0.0))
    D, eta = float(np.max(np.linalg.norm(X[:-1], axis=2))), run.rate
    right = D**2 / (2 * eta) * (s.sum() + m * run.method.eps) + eta * s.sum()
    return Sides(
        left=run.linear_regret(comparator),
        right=right,
        symbols={"D": D, "sum s": s.sum(), "eta": eta, "m": m, "eps": run.method.eps, "T": len(G)},
        assumptions={"the rate is constant": run.constant_rate},
    )
