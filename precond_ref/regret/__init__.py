"""A method on an online problem: its regret against the best fixed point, and the bound of the theory.

game = regret.play(precond_ref.SAdaGrad(size=3), online.adversary("random", (6,), rounds=200), lr=0.5)
game.regret[-1], game.bound[-1]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from precond_ref import theory
from precond_ref.methods.agd import AGD
from precond_ref.methods.asgo import ASGOTheory, DASGOTheory
from precond_ref.methods.baselines import SGD, AdaGrad
from precond_ref.methods.sketchy import SAdaGrad, SShampoo
from precond_ref.problems.base import import_numpy
from precond_ref.problems.online import Stream
from precond_ref.theory.base import Check, Run, Statement
from precond_ref.theory.sketchy import omega

np = import_numpy()
Array = Any

__all__ = [
    "Comparator",
    "Game",
    "Lost",
    "bound_of",
    "checkpoints",
    "comparator_of_linear",
    "comparator_of_logistic",
    "play",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparator:
    """The fixed point with which the regret compares."""

    point: Array
    how: str
    remark: str = ""
    """A remark for the reader, or ""."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lost:
    """The mass that a sketch has lost, at the rounds of the game."""

    name: str
    """Name of the axis; "" for a vector."""
    escaped: Array
    """rho_{1:t}."""
    limit: Array
    """Omega_l(G_t), which bounds it."""
    spectrum: Array
    """Eigenvalues of G_T, descending."""
    sketched: Array
    """Eigenvalues of Gbar_T, descending."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Game:
    """A run with its regret at some rounds."""

    run: Run
    comparator: Comparator
    rounds: Array
    """Numbers of rounds played; the last is the number of all rounds."""
    loss: Array
    """Mean loss over these rounds."""
    best_loss: Array
    """Mean loss of the comparator over these rounds."""
    regret: Array
    checks: list[Check]
    """Checks of the bound on the first rounds, for each number of rounds; empty if no bound is known."""
    statement: Statement | None
    lost: list[Lost]

    @property
    def bound(self) -> Array:
        """Right sides of the bound; NaN if an assumption is not met."""
        return np.array([check.right if check.applies else np.nan for check in self.checks])


def checkpoints(rounds: int, count: int = 60) -> list[int]:
    """Return at most ``count`` numbers of rounds, in equal ratios; the last is ``rounds``."""
    return sorted({round(x) for x in np.geomspace(1, rounds, count)})


def bound_of(method: Any, ndim: int) -> tuple[Statement, Callable[[Run, Array], Check]] | None:
    """Return the regret bound of a method with its fields, as a function of run and comparator; None if unknown.

    ``ndim`` is the number of axes of the parameter. A method from outside this package has no known bound, even if it
    is a subclass of one of this package.
    """
    if ":" in method.name:
        return None
    if isinstance(method, SAdaGrad) and method.beta2 == 1 and method.delta == 0:
        return theory.sketchy.regret, theory.sketchy.regret
    if isinstance(method, SShampoo) and _plain(method) and ndim == 2 and not method.relative_eps:
        statement = theory.sketchy.sshampoo_regret
        return statement, lambda run, u: statement(run, u, min(run.gradients.shape[1:]))
    if isinstance(method, ASGOTheory):
        return theory.asgo.regret, theory.asgo.regret
    if isinstance(method, (DASGOTheory, AdaGrad)):
        return theory.asgo.row_regret, theory.asgo.row_regret
    if isinstance(method, SGD) and method.momentum == 0:
        return theory.gradient_descent.regret, theory.gradient_descent.regret
    if isinstance(method, AGD) and method.clip is None:
        return theory.agd.regret_measured, theory.agd.regret_measured
    return None


def _plain(method: SAdaGrad | SShampoo) -> bool:
    """Return whether the sketches are of the plain sum of all rounds."""
    whole = isinstance(method, SAdaGrad) or (method.every == 1 and method.tail_decay in (None, 1))
    return bool(whole and method.beta2 == 1)


def play(
    method: Any,
    stream: Stream,
    lr: Array,
    comparator: Callable[[Run], Comparator] | None = None,
    *,
    count: int = 60,
    on_round: Callable[[int], Any] = lambda t: None,
) -> Game:
    """Run ``method`` on ``stream`` at rate ``lr``, a number or (rounds,).

    ``comparator`` defaults to the best point of the unit ball for linear losses; other losses need it.
    """
    if comparator is None:
        if stream.loss is not None:
            raise ValueError("a stream of losses that are not linear needs a comparator")
        comparator = comparator_of_linear
    rounds = checkpoints(stream.rounds, count)
    known = bound_of(method, len(stream.shape))
    wanted, kept = set(rounds), {}

    def look(t: int, state: Any) -> None:
        if t + 1 in wanted:
            kept[t + 1] = state
        on_round(t)

    whole = isinstance(method, AGD)  # its bound needs every state
    run = theory.record(method, stream, lr, keep_states=whole, on_round=look)
    best = comparator(run)
    paid, theirs = np.cumsum(run.paid), np.cumsum(run.losses(best.point))
    index = np.array(rounds) - 1
    parts = [run.first(k, None if whole else kept[k]) for k in rounds]
    return Game(
        run=run,
        comparator=best,
        rounds=np.array(rounds),
        loss=paid[index] / rounds,
        best_loss=theirs[index] / rounds,
        regret=(paid - theirs)[index],
        checks=[known[1](part, best.point) for part in parts] if known else [],
        statement=known[0] if known else None,
        lost=_lost(parts),
    )


def comparator_of_linear(run: Run, radius: float = 1.0) -> Comparator:
    """Return the point of a ball around 0 with the least sum of linear losses."""
    total = np.sum(run.gradients, axis=0)
    point = -radius * total / max(float(np.linalg.norm(total)), 1e-300)
    return Comparator(point=point, how=f"the best point of the ball of radius {radius:g} around 0")


def comparator_of_logistic(features: Array, signs: Array, radius: float | None = None) -> Comparator:
    """Return the minimizer of the total logistic loss by SciPy, in the ball around 0 of this radius if one is given."""
    from scipy.optimize import minimize

    def total(x: Array) -> tuple[float, Array]:
        margin = signs * (features @ x)
        loss = np.mean(np.logaddexp(0.0, -margin))
        return float(loss), (-signs * np.exp(-np.logaddexp(0.0, margin))) @ features / len(signs)

    start = np.zeros(features.shape[1])
    found = minimize(total, start, jac=True, method="L-BFGS-B", options={"maxiter": 500, "gtol": 1e-6, "maxcor": 30})
    remark = ""
    if radius is not None and np.linalg.norm(found.x) > radius:
        found = minimize(
            total,
            found.x * radius / np.linalg.norm(found.x),
            jac=True,
            method="SLSQP",
            constraints={"type": "ineq", "fun": lambda x: radius**2 - x @ x, "jac": lambda x: -2 * x},
            options={"maxiter": 1000, "ftol": 1e-14},
        )
        point = found.x * min(1.0, radius / float(np.linalg.norm(found.x)))
        slope = total(point)[1]
        slope = slope - (slope @ point) / (point @ point) * point
        how = f"SLSQP in the ball of radius {radius:g}; largest slope along its surface"
    else:
        point, slope, how = found.x, total(found.x)[1], "L-BFGS; largest slope"
        if radius is None:
            remark = (
                "no --radius: if some feature comes with one label only, no point is a minimizer, this is where SciPy "
                "stopped, and D and the bound are as large as that is far."
            )
    how = f"the minimizer of the mean loss by SciPy ({how} {float(np.max(np.abs(slope))):.1e})"
    return Comparator(point=point, how=how, remark=remark)


def _lost(parts: list[Run]) -> list[Lost]:
    """Return the mass that the sketches of S-AdaGrad and S-Shampoo have lost, for plain sums only."""
    method, whole = parts[-1].method, parts[-1]
    if ":" in method.name or not isinstance(method, (SAdaGrad, SShampoo)) or not _plain(method):
        return []
    out = []
    axes = range(whole.gradients.ndim - 1)
    for axis in axes:
        d = whole.gradients.shape[1 + axis]
        gram, done, limits, masses = np.zeros((d, d)), 0, [], []
        for part in parts:
            new = np.moveaxis(part.gradients[done:], 1 + axis, -1).reshape(-1, d)
            gram, done = gram + new.T @ new, len(part.gradients)
            spectrum = np.linalg.eigvalsh(gram)[::-1]
            spectrum = np.where(spectrum > 1e-13 * spectrum[0], spectrum, 0.0)  # the rest is rounding
            limits.append(float(omega(spectrum, method.size)))
            masses.append(float(_sketch(part.states[-1], axis).escaped))
        out.append(
            Lost(
                name="" if len(axes) == 1 else f"axis {axis}",
                escaped=np.array(masses),
                limit=np.array(limits),
                spectrum=spectrum,
                sketched=np.asarray(_sketch(whole.states[-1], axis).eigenvalues),
            )
        )
    return out


def _sketch(state: Any, axis: int) -> Any:
    return state.sketches[axis] if hasattr(state, "sketches") else state.sketch
