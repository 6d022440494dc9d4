"""Online gradient descent, the yardstick of the other methods (Zinkevich, 2003)."""

from __future__ import annotations

from precond_ref.theory.base import Array, Run, Sides, Source, about, np

statement = about("SGD")


@statement("sgd.regret", "R_T <= D^2 / (2 eta_T) + 1/2 sum eta_t |g_t|^2", Source.PROVED, "theory.md#gradient-descent")
def regret(run: Run, comparator: Array) -> Sides:
    """`SGD` without momentum, convex losses, rates that do not increase, D = max_t |x_t - u|."""
    T = len(run.gradients)
    D = float(np.max(np.linalg.norm((run.points[:-1] - comparator).reshape(T, -1), axis=1)))
    squares = np.sum(run.gradients.reshape(T, -1) ** 2, axis=1)
    return Sides(
        left=run.regret(comparator),
        right=D**2 / (2 * run.rates[-1]) + 0.5 * np.sum(run.rates * squares),
        symbols={"D": D, "eta_T": run.rates[-1], "T": T},
        assumptions={
            "no momentum": run.method.momentum == 0,
            "rates do not increase": bool(np.all(np.diff(run.rates) <= 0)),
        },
    )
