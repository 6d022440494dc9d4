"""MBF in the idealised setting of its abstract: full batch, exact Jacobian blocks, squared loss; and descent.

r = u - y (n,), blocks J_b (n, s), G_b = J_b J_b^T, M(w) = sum_b G_b (G_b + lambda I)^{-1}, steps
w_b <- w_b - eta (J_b^T J_b + lambda I)^{-1} J_b^T r. In `MBF`: ``average=False, decay=0, momentum=0``, the outputs'
Jacobian as samples, the gradient J^T r / n, and ``damping`` lambda / n. The paper's own theorem was not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from precond_ref.methods import mbf as methods
from precond_ref.problems.online import Objective, Stream, TwoLayer
from precond_ref.theory.base import Array, Run, Sides, Source, about, np, record

PAGE = "methods/mbf.md#theory"
statement = about("MBF")


def record_network(net: Any, damping: float, eta: float, rounds: int, lib: Any = methods) -> Run:
    """Run MBF with the exact Jacobian blocks of ``net``, which has residual(w) (n,) and jacobian(w) (n, B, s)."""
    n = len(net.residual(net.start))
    method = lib.MBF(average=False, decay=0.0, momentum=0.0, damping=damping / n)
    stream = Stream(
        name="network",
        rounds=rounds,
        start=net.start,
        gradient=lambda t, w, s: np.einsum("n,nbs->bs", net.residual(w), net.jacobian(w)) / n,
        loss=lambda t, w: 0.5 * float(np.sum(net.residual(w) ** 2)),
    )

    def update(t: int, g: Array, state: Any, w: Array) -> Any:
        return method.update(g, state, w, statistic=lib.MBFSamples(net.jacobian(w)))

    return record(method, stream, eta, update=update)


def block_sum(jacobian: Array, damping: float) -> Array:
    """Return M, (n, n)."""
    grams = np.einsum("nbs,mbs->bnm", jacobian, jacobian)
    return np.sum(grams @ np.linalg.inv(grams + damping * np.eye(len(jacobian))), axis=0)


class NetworkForm:
    """The quantities of a run of `record_network`."""

    def __init__(self, run: Run, net: Any) -> None:
        self.eta = run.rate
        self.residuals = np.stack([net.residual(w) for w in run.points])
        self.norms = np.linalg.norm(self.residuals, axis=1)
        self.jacobian = net.jacobian(run.points[0])
        n, self.B, _ = self.jacobian.shape
        self.damping = run.method.damping * n
        self.M = block_sum(self.jacobian, self.damping)
        self.low = float(np.linalg.eigvalsh(self.M)[0])
        self.symbols = {"eta": self.eta, "B": self.B, "n": n, "lambda": self.damping, "lmin(M)": self.low}
        self.assumptions = {"eta <= 1 / B": self.eta <= 1 / self.B * (1 + 1e-12)}

    def worst(self, factor: float) -> tuple[Any, Any]:
        """Return |r_{k+1}| and factor |r_k| at their largest ratio, without residuals near rounding."""
        live = self.norms[:-1] > 1e-4 * self.norms[0]
        k = int(np.argmax(np.where(live, self.norms[1:] / np.maximum(self.norms[:-1], 1e-300), 0.0)))
        return self.norms[k + 1] / self.norms[k], factor


@statement("mbf.residual", "r_{k+1} = (I - eta M) r_k, outputs linear in w", Source.PROVED, PAGE, identity=True)
def residual(run: Run, net: Any) -> Sides:
    """T0: the norm of the difference, at the worst k."""
    form: NetworkForm = run.form(NetworkForm, net)
    r = form.residuals
    gap = np.linalg.norm(r[1:] - (r[:-1] - form.eta * r[:-1] @ form.M), axis=1)
    return Sides(left=np.max(gap), right=0.0, rounding=1e-11 * np.max(form.norms), symbols=form.symbols)


@statement("mbf.contraction", "|r_{k+1}| <= (1 - eta lmin(M)) |r_k|, outputs linear in w", Source.PROVED, PAGE)
def contraction(run: Run, net: Any) -> Sides:
    """T0, at the worst k; both sides divided by |r_k|."""
    form: NetworkForm = run.form(NetworkForm, net)
    left, right = form.worst(1 - form.eta * form.low)
    return Sides(left=left, right=right, rounding=1e-8, symbols=form.symbols, assumptions=form.assumptions)


@statement("mbf.floor", "lmin(sum G_b) / (max |J_b|^2 + lambda) <= lmin(M)", Source.PROVED, PAGE)
def floor(run: Run, net: Any) -> Sides:
    """T0: about the Jacobian alone."""
    form: NetworkForm = run.form(NetworkForm, net)
    grams = np.einsum("nbs,mbs->bnm", form.jacobian, form.jacobian)
    spectrum = np.linalg.eigvalsh(np.sum(grams, axis=0))
    left = spectrum[0] / (np.max(np.linalg.norm(grams, 2, axis=(1, 2))) + form.damping)
    regular = spectrum[0] > 1e-8 * spectrum[-1]  # else both sides are 0 and rounding
    return Sides(
        left=left, right=form.low, rounding=1e-10, symbols=form.symbols, assumptions={"sum G_b is regular": regular}
    )


def _hypothesis(form: NetworkForm, net: TwoLayer) -> tuple[float, dict[str, Any]]:
    """Return R, and the assumption that the Jacobian changes little enough within R."""
    radius = math.sqrt(form.B / form.damping) * form.norms[0] / form.low
    drift = net.second_derivative * float(np.linalg.norm(net.inputs, 2)) * radius / math.sqrt(form.B)
    allowed = form.low / 4 * math.sqrt(form.damping / form.B)
    form.symbols |= {"R": radius, "drift": drift, "allowed": allowed}
    return radius, {**form.assumptions, "lmin(M) > 0": form.low > 0, "drift <= allowed": drift <= allowed}


@statement("mbf.two-layer", "|r_{k+1}| <= (1 - eta mu_0 / 2) |r_k|, mu_0 = lmin(M(w_0))", Source.PROVED, PAGE)
def two_layer(run: Run, net: TwoLayer) -> Sides:
    """T1: wide networks or small residuals; at the worst k, both sides divided by |r_k|."""
    form: NetworkForm = run.form(NetworkForm, net)
    _, assumptions = _hypothesis(form, net)
    left, right = form.worst(1 - form.eta * form.low / 2)
    return Sides(left=left, right=right, rounding=1e-8, symbols=form.symbols, assumptions=assumptions)


@statement("mbf.radius", "|w_k - w_0| <= sqrt(B / lambda) |r_0| / mu_0", Source.PROVED, PAGE)
def radius(run: Run, net: TwoLayer) -> Sides:
    """T1: the distance of the weights from the start."""
    form: NetworkForm = run.form(NetworkForm, net)
    right, assumptions = _hypothesis(form, net)
    left = np.max(np.linalg.norm((run.points - run.points[0]).reshape(len(run.points), -1), axis=1))
    return Sides(left=left, right=right, symbols=form.symbols, assumptions=assumptions)


class DescentForm:
    """The quantities of a run of MBF on (1, J) with given per-sample gradients, from F = 0, on a smooth objective."""

    def __init__(self, run: Run, objective: Objective, per_sample: Callable[[Array], Array], convexity: float) -> None:
        k, self.alpha = run.method, run.rate
        t1, t2 = k.statistics_every, k.inverse_every
        size = run.points.shape[-1]
        average, self.norms, used = np.zeros((size, size)), [], 0.0
        for i, w in enumerate(run.points[:-1]):
            if i % t1 == 0:
                samples = per_sample(w[0])
                average = k.decay * average + (1 - k.decay) * samples.T @ samples / len(samples)
            if (i <= t2 and i % t1 == 0) or i % t2 == 0:
                used = float(np.linalg.norm(average, 2))
            self.norms.append(used)
        values = np.array([objective.value(w[0]) for w in run.points])
        self.live = values[:-1] > 1e-9  # below, the decrease drowns in rounding of f
        self.decrease, self.gap = values[:-1] - values[1:], values[:-1]
        G, P = run.gradients[:, 0], run.directions[:, 0]
        self.product, self.square = np.sum(G * P, axis=1), np.sum(G * G, axis=1)
        self.damping, self.convexity, self.F = k.damping, convexity, np.array(self.norms)
        self.symbols = {"alpha": self.alpha, "lambda": k.damping, "L": objective.curvature, "mu": convexity}
        self.assumptions = {
            "alpha <= lambda / L": self.alpha <= k.damping / objective.curvature * (1 + 1e-12),
            "no momentum": k.momentum == 0,
            "some decrease above rounding": bool(self.live.any()),
        }

    def sides(self, least: Array) -> Sides:
        """Return the sides of least <= decrease at the round with the worst ratio."""
        ratio = np.where(self.live, least / np.where(self.decrease > 0, self.decrease, 1e-300), -np.inf)
        t = int(np.argmax(ratio))
        return Sides(
            left=least[t],
            right=self.decrease[t],
            rounding=1e-14,
            symbols={**self.symbols, "|F|": self.F[t], "t": t},
            assumptions=self.assumptions,
        )


@statement("mbf.descent", "alpha/2 grad^T p <= f(w) - f(w - alpha p)", Source.PROVED, PAGE)
def descent(run: Run, objective: Objective, per_sample: Callable[[Array], Array], convexity: float) -> Sides:
    """T2, any F >= 0, stale or not."""
    form: DescentForm = run.form(DescentForm, objective, per_sample, convexity)
    return form.sides(form.alpha / 2 * form.product)


@statement(
    "mbf.descent-by-gradient", "alpha |grad|^2 / (2 (lambda + |F|)) <= f(w) - f(w - alpha p)", Source.PROVED, PAGE
)
def descent_by_gradient(
    run: Run, objective: Objective, per_sample: Callable[[Array], Array], convexity: float
) -> Sides:
    """T2 with the spectral norm of the F in use, which is computed again."""
    form: DescentForm = run.form(DescentForm, objective, per_sample, convexity)
    return form.sides(form.alpha * form.square / (2 * (form.damping + form.F)))


@statement("mbf.linear-rate", "alpha mu / (lambda + |F|) (f(w) - f*) <= f(w) - f(w - alpha p)", Source.PROVED, PAGE)
def linear_rate(run: Run, objective: Objective, per_sample: Callable[[Array], Array], convexity: float) -> Sides:
    """T2 under the inequality of Polyak and Lojasiewicz with the constant mu (such as a strong convexity)."""
    form: DescentForm = run.form(DescentForm, objective, per_sample, convexity)
    return form.sides(form.alpha * form.convexity / (form.damping + form.F) * form.gap)
