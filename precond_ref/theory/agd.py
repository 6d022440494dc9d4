"""AGD: a regret identity, regret with measured and with closed right sides, and gradients of smooth functions.

D_t = max(sqrt(b_t), delta sqrt(1 - beta2^t)) (b_t the running maximum with ``amsgrad``),
alphahat_t = alpha_t sqrt(1 - beta2^t) / (1 - beta1^t) and H_t = D_t / alphahat_t, so that x_{t+1} = x_t - m_t / H_t;
P_t = sum_i m_i^2 / H_i, kappa = beta1 / (1 - beta1), d_t = x_t - x* for any fixed x*, Delta_i = max_t |d_{t,i}|,
G_i = max_t |g_{t,i}|. No statement is a quotation: the paper's theorems were not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from precond_ref.methods.agd import AGDScalars
from precond_ref.problems.online import Objective
from precond_ref.theory.base import Array, Run, Sides, Source, about, np

PAGE = "methods/agd.md#what-is-proved"
statement = about("AGD")


def varying_beta1(method: Any, beta1: Array) -> Callable[..., Any]:
    """Return updates with beta_{1,t} for `record`; they keep the last corrected average."""

    def update(t: int, g: Array, state: Any, x: Array) -> Any:
        now, c1 = method.replace(beta1=float(beta1[t])), 1 - float(beta1[t]) ** (t + 1)
        before = 1 / (1 - float(beta1[t - 1]) ** t) if t else 0.0
        weights = (1 - now.beta1) / c1, before - now.beta1 / c1  # of g_t and m_{t-1} in s_t
        if now.from_new:
            weights = (1 - now.beta1) * before / now.beta1, before / now.beta1 - 1 / c1  # of g_t and m_t
        sqrt_c2 = math.sqrt(1 - method.beta2 ** (t + 1))
        return now.update(g, state, x, scalars=AGDScalars(*weights, method.delta * sqrt_c2, sqrt_c2 / c1), xp=np)

    return update


class AGDForm:
    """The quantities of a run of `AGD`; ``beta1`` (T,) if it varied."""

    def __init__(self, run: Run, star: Array, beta1: Array | None = None) -> None:
        method, T = run.method, len(run.gradients)
        t = np.arange(1, T + 1)
        self.T, self.n, self.delta = T, run.points.shape[-1], method.delta
        self.beta1 = np.full(T, method.beta1) if beta1 is None else beta1
        c1, c2 = 1 - self.beta1**t, 1 - method.beta2**t
        columns = (-1, *[1] * (run.points.ndim - 1))
        c1, c2, self.rates = (a.reshape(columns) for a in (c1, c2, run.rates))
        self.m = np.stack([state.m for state in run.all_states()[1:]])
        top = np.stack([state.b_max if method.amsgrad else state.b for state in run.all_states()[1:]])
        self.root = np.maximum(np.sqrt(top / c2), method.delta)
        """max(sqrt(bhat_t), delta)."""
        self.h = self.root * c1 / self.rates
        self.effective = (self.rates * np.sqrt(c2) / c1).reshape(-1)
        self.d = run.points - star
        self.kappa = method.beta1 / (1 - method.beta1)
        self.spread, self.peak = np.max(abs(self.d[:-1]), axis=0), np.max(abs(run.gradients), axis=0)
        self.alpha = float(run.rates[0])
        self.symbols = {
            "alpha": self.alpha, "beta1": method.beta1, "beta2": method.beta2, "delta": method.delta, "T": T,
            "n": self.n, "Delta": np.max(self.spread), "G": np.max(self.peak),
        }  # fmt: skip
        self.assumptions = {"not clipped": method.clip is None}

    def terms(self) -> list[Array]:
        """Return the four sums of the right side of the identity."""
        p = np.sum(self.m**2 / self.h, axis=1)
        d = self.d
        return [
            self.h * (d[:-1] - d[1:]) * (d[:-1] + d[1:]) / 2,
            p / 2,
            self.kappa * self.m[-1] * d[-2],
            self.kappa * p[:-1],
        ]


def _size(run: Run, star: Array) -> float:
    """Return the size of the rounding of the losses (T sums of numbers of their size) and of their arguments a_t x."""
    size = np.sum(abs(run.paid)) + np.sum(abs(run.losses(star)))
    size += np.sum(abs(run.gradients) * (abs(run.points[:-1]) + abs(star)))
    return float((len(run.paid) + 16) * 2.0**-53 * size)


@statement(
    "agd.identity",
    "sum <g_t, d_t> = 1/2 sum_t sum_i H_{t,i} (d_{t,i}^2 - d_{t+1,i}^2) + 1/2 sum P_t + kappa <m_T, d_T> "
    "+ kappa sum_{t<T} P_t",
    Source.PROVED,
    PAGE,
    identity=True,
)
def identity(run: Run, star: Array) -> Sides:
    """(i), any gradients, any positive rates. To see it to 1e-13, most steps must be above 1/100 of x."""
    form = AGDForm(run, star)
    left, terms = run.gradients * form.d[:-1], form.terms()
    size = np.sum(abs(left)) + sum(np.sum(abs(term)) for term in terms)
    # rounding x moves a step, and with it H (d_t - d_{t+1}), by u |x| H
    moved = 2.0**-52 * np.sum(
        form.h * np.maximum(abs(run.points[:-1]), abs(form.d[:-1])) * abs(form.d[:-1] + form.d[1:])
    )
    return Sides(
        left=np.sum(left),
        right=sum(np.sum(term) for term in terms),
        rounding=1e-13 * size + moved,
        symbols=form.symbols,
        assumptions=form.assumptions,
    )


@statement(
    "agd.regret-measured",
    "R_T <= 1/2 sum_i Delta_i^2 [H_{1,i} + sum_{t>1} (H_{t,i} - H_{t-1,i})_+] + 1/2 sum P_t + kappa <m_T, d_T> "
    "+ kappa sum_{t<T} P_t",
    Source.PROVED,
    PAGE,
)
def regret_measured(run: Run, star: Array) -> Sides:
    """(ii), convex losses, plain or amsgrad, any rates."""
    form = AGDForm(run, star)
    rises = form.h[0] + np.sum(np.maximum(np.diff(form.h, axis=0), 0), axis=0)
    _, *rest = form.terms()
    terms = [float(np.sum(form.spread**2 * rises) / 2), *(float(np.sum(term)) for term in rest)]
    rounding = _size(run, star) + 1e-13 * sum(map(abs, terms))
    return Sides(
        left=run.regret(star),
        right=sum(terms),
        rounding=rounding,
        symbols={**form.symbols, **{f"term {i + 1}": term for i, term in enumerate(terms)}},
        assumptions=form.assumptions,
    )


def _falling(run: Run) -> dict[str, Any]:
    """Return the assumptions of the closed forms about the run: alpha_t = alpha / sqrt t, amsgrad."""
    t = np.arange(1, len(run.rates) + 1)
    return {
        "amsgrad": run.method.amsgrad,
        "alpha_t = alpha / sqrt t": np.allclose(run.rates * np.sqrt(t), run.rates[0], rtol=1e-12),
        "delta > 0": run.method.delta > 0,
    }


@statement(
    "agd.regret-closed",
    "R_T <= sqrt(T) sum_i [Delta_i^2 max(2 G_i / (1 + beta1), delta) / (2 alpha) "
    "+ (1 + beta1)/(1 - beta1) alpha G_i^2 / delta] + kappa sum_i G_i Delta_i",
    Source.PROVED,
    PAGE,
)
def regret_closed(run: Run, star: Array) -> Sides:
    """(iii), first form."""
    form = AGDForm(run, star)
    beta1 = run.method.beta1
    top = np.maximum(2 * form.peak / (1 + beta1), form.delta)
    terms = [
        math.sqrt(form.T) * np.sum(form.spread**2 * top) / (2 * form.alpha),
        math.sqrt(form.T) * (1 + beta1) / (1 - beta1) * form.alpha * np.sum(form.peak**2) / form.delta,
        form.kappa * np.sum(form.peak * form.spread),
    ]
    return Sides(
        left=run.regret(star),
        right=sum(terms),
        rounding=_size(run, star) + 1e-13 * sum(terms),
        symbols={**form.symbols, **{f"term {i + 1}": term for i, term in enumerate(terms)}},
        assumptions={**form.assumptions, **_falling(run)},
    )


@statement(
    "agd.root",
    "max(sqrt(bhat_t), delta) <= max(2 G_i / (1 + beta1), delta)",
    Source.PROVED,
    PAGE,
)
def root(run: Run, star: Array) -> Sides:
    """The bound of the denominator in (iii) and (iv), at the worst t and i."""
    form = AGDForm(run, star)
    top = np.maximum(2 * form.peak / (1 + run.method.beta1), form.delta)
    share = form.root / np.maximum(top, 1e-300)
    where = np.unravel_index(np.argmax(share), share.shape)
    return Sides(left=form.root[where], right=top[where[1:]], rounding=1e-12 * top[where[1:]], symbols=form.symbols)


@statement(
    "agd.regret-closed-varying",
    "R_T <= 1/(1 - beta1) [sqrt(T) n Delta^2 max(2 G, delta) / (2 alpha) + sum_t beta_{1,t} n Delta^2 / (2 alphahat_t) "
    "+ sqrt(T) n alpha G^2 (beta1 + 1 / delta)]",
    Source.PROVED,
    PAGE,
)
def regret_closed_varying(run: Run, star: Array, beta1: Array) -> Sides:
    """(iii), second form, beta_{1,t} <= beta1 non-increasing."""
    form = AGDForm(run, star, beta1)
    spread, peak, root_t = np.max(form.spread), np.max(form.peak), math.sqrt(form.T)
    n = run.points[0].size
    terms = [
        root_t * n * spread**2 * max(2 * peak, form.delta) / (2 * form.alpha),
        np.sum(form.beta1 / form.effective) * n * spread**2 / 2,
        root_t * n * form.alpha * peak**2 * (run.method.beta1 + 1 / form.delta),
    ]
    right = sum(terms) / (1 - run.method.beta1)
    return Sides(
        left=run.regret(star),
        right=right,
        rounding=_size(run, star) + 1e-13 * right,
        symbols=form.symbols,
        assumptions={
            **form.assumptions,
            **_falling(run),
            "beta1 does not increase": bool(np.all(np.diff(beta1) <= 0) and beta1[0] <= run.method.beta1),
        },
    )


def largest_u(beta1: float) -> float:
    """Return the largest u with u + (beta1 u / (1 - beta1))^2 <= 1."""
    kappa = beta1 / (1 - beta1)
    return (math.sqrt(1 + 4 * kappa**2) - 1) / (2 * kappa**2) if kappa else 1.0


def _smooth(run: Run, objective: Objective) -> tuple[AGDForm, float, dict[str, Any]]:
    """Return the form, alpha (the largest rate), and the condition on u = L alpha / delta."""
    form = AGDForm(run, objective.minimizer)
    alpha = float(np.max(run.rates))
    u = objective.curvature * alpha / run.method.delta
    form.symbols |= {"u": u, "L": objective.curvature, "alpha": alpha}
    return form, alpha, {**form.assumptions, "u + (kappa u)^2 <= 1": u + (form.kappa * u) ** 2 <= 1 + 1e-12}


@statement("agd.gradients", "sum_t sum_i eta_{t,i} (d_i F(x_t))^2 <= 2 (F(x_1) - F*)", Source.PROVED, PAGE)
def gradients(run: Run, objective: Objective) -> Sides:
    """(iv), exact gradients of a smooth function, eta_t = alpha_t / max(sqrt(bhat_t), delta)."""
    form, _, assumptions = _smooth(run, objective)
    left = np.sum(form.rates / form.root * run.gradients**2)
    right = 2 * float(objective.value(run.points[0]))
    return Sides(left=left, right=right, rounding=1e-12 * right, symbols=form.symbols, assumptions=assumptions)


@statement(
    "agd.least-gradient",
    "min_t |grad F(x_t)|^2 <= 2 (F(x_1) - F*) max(2 G / (1 + beta1), delta) / sum alpha_t",
    Source.PROVED,
    PAGE,
)
def least_gradient(run: Run, objective: Objective) -> Sides:
    """(iv), second form."""
    form, _, assumptions = _smooth(run, objective)
    left = np.min(np.sum(run.gradients.reshape(form.T, -1) ** 2, axis=1))
    top = max(2 * float(np.max(form.peak)) / (1 + run.method.beta1), form.delta)
    right = 2 * float(objective.value(run.points[0])) * top / np.sum(run.rates)
    return Sides(left=left, right=right, rounding=1e-12 * right, symbols=form.symbols, assumptions=assumptions)


@statement(
    "agd.gradients-noisy",
    "E sum_t sum_i eta_{t,i} (d_i F(x_t))^2 <= 2 (F(x_1) - F*) + (alpha / delta) sigma^2 / (1 - beta1) sum rho_t^2",
    Source.PROVED,
    PAGE,
)
def gradients_noisy(run: Run, objective: Objective, sigma: float) -> Sides:
    """(v): the mean over the replicas (second axis of the points), rho_t = (1 - beta1) / (1 - beta1^t)."""
    form, alpha, assumptions = _smooth(run, objective)
    left = np.sum(form.rates / form.root * objective.gradient(run.points[:-1]) ** 2, axis=(0, 2))
    beta1 = run.method.beta1
    rho = (1 - beta1) / (1 - beta1 ** np.arange(1, form.T + 1))
    floor = alpha / run.method.delta * sigma**2 / (1 - beta1) * np.sum(rho**2)
    right = 2 * float(np.ravel(objective.value(run.points[0]))[0]) + floor
    # four standard errors of the mean
    spread = 4 * float(np.std(left)) / math.sqrt(left.size)
    return Sides(
        left=np.mean(left),
        right=right,
        rounding=spread,
        symbols={**form.symbols, "sigma": sigma},
        assumptions=assumptions,
    )
