"""RF-RMSProp, RF-Shampoo and IF-Shampoo: bounds of one update, closed forms, and properties of a fixed point.

The paper's convergence arguments were not read and no rate of the stochastic methods is known here. S is the
preconditioner (S_n one per axis, S_n^{-1} = K_n K_n^T), lambda the damping, B the batch size, beta2 the weight of
the new term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from precond_ref.theory.base import Array, Run, Sides, Source, about, np

DIAGONAL, INVERSE = "theory.md#root-free-methods", "methods/inverse_free.md#equations"
rf_rmsprop, rf_shampoo, if_shampoo = about("RFRMSProp"), about("RFShampoo"), about("IFShampoo")
either = about("RFShampoo", "IFShampoo")


def given_statistic(method: Any, statistic: Array) -> Callable[..., Any]:
    """Return updates for `record` with this curvature in the place of the gradient's square."""
    return lambda t, g, state, x: method.update(g, state, x, statistic=statistic)


def _plain(run: Run) -> dict[str, bool]:
    method = run.method
    return {"no momentum": method.momentum == 0, "no weight decay": method.weight_decay == 0}


@rf_rmsprop(
    "rf.step", "|g| / (s_t + lambda) <= 1 / (2 sqrt(beta2 B ((1 - beta2) s_{t-1} + lambda)))", Source.PROVED, DIAGONAL
)
def step(run: Run) -> Sides:
    """`RFRMSProp`, any gradients, at the worst t and i; equal at beta2 B g^2 = (1 - beta2) s + lambda."""
    k = run.method
    before = np.stack([state.s for state in run.all_states()[:-1]])
    bound = 0.5 / np.sqrt(k.beta2 * k.batch_size * ((1 - k.beta2) * before + k.damping))
    where = np.unravel_index(np.argmax(abs(run.directions) / bound), bound.shape)
    return Sides(
        left=abs(run.directions[where]),
        right=bound[where],
        rounding=1e-14 * bound[where],
        symbols={"beta2": k.beta2, "lambda": k.damping, "B": k.batch_size, "t": where[0]},
        assumptions=_plain(run),
    )


@rf_rmsprop(
    "rf.constant",
    "s_t = (1 - beta2)^t s_0 + (1 - (1 - beta2)^t) B g^2 for a constant gradient",
    Source.PROVED,
    DIAGONAL,
    identity=True,
)
def constant(run: Run) -> Sides:
    """`RFRMSProp` at the last t and the worst entry."""
    k, g, T = run.method, np.ravel(run.gradients[0]), len(run.gradients)
    rest = (1 - k.beta2) ** T
    expected, got = rest * k.initial + (1 - rest) * k.batch_size * g**2, np.ravel(run.states[-1].s)
    i = int(np.argmax(abs(got - expected) / expected))
    return Sides(
        left=got[i],
        right=expected[i],
        rounding=4 * T * 2.0**-53 * (1 + 1 / k.beta2) * expected[i],  # 1 - beta2 is rounded
        symbols={"beta2": k.beta2, "B": k.batch_size, "T": T},
        assumptions={"the gradient is constant": bool(np.all(run.gradients == run.gradients[0]))},
    )


@rf_rmsprop("rf.newton", "|x_{t+1} - x*| = |1 - lr| |x_t - x*| while S = H", Source.PROVED, DIAGONAL, identity=True)
def newton(run: Run, curvature: Array) -> Sides:
    """`RFRMSProp` on 1/2 sum h_i (x_i - x*_i)^2 with s = h: whatever the condition number; at the worst t."""
    curvature = np.asarray(curvature, dtype=float)
    if run.stream.target is None or curvature.shape != run.stream.shape:
        raise ValueError(
            f"the stream must have a target and curvature its shape {run.stream.shape}, got {curvature.shape}"
        )
    error = np.linalg.norm((run.points - run.stream.target).reshape(len(run.points), -1), axis=1)
    expected = abs(1 - run.rate) * error[:-1]
    t = int(np.argmax(abs(error[1:] - expected) / error[:-1]))
    at_curvature = all(np.allclose(state.s, curvature, rtol=1e-12, atol=0) for state in run.all_states())
    return Sides(
        left=error[t + 1],
        right=expected[t],
        rounding=1e-13 * error[t] + 2.0**-50 * np.linalg.norm(run.stream.target),
        symbols={"condition": curvature.max() / curvature.min(), "lr": run.rate, "t": t},
        assumptions={**_plain(run), "no damping": run.method.damping == 0, "S = H": at_curvature},
    )


@rf_shampoo("rf.floor", "(1 - beta2)^t <= lambda_min(S_n)", Source.PROVED, "theory.md#root-free-methods")
def floor(run: Run) -> Sides:
    """`RFShampoo`: every factor stays positive definite, at the worst t and axis; both sides in units of the left."""
    k = run.method
    least = [
        (float(np.linalg.eigvalsh(factor)[0]) / (1 - k.beta2) ** t, t, axis)
        for t, state in enumerate(run.all_states()[1:], start=1)
        for axis, factor in enumerate(state.factors)
    ]
    worst, t, axis = least[np.argmin([value for value, *_ in least])]  # unlike min, argmin finds a NaN
    top = np.max([np.linalg.eigvalsh(f)[-1] for f in run.states[t].factors])
    return Sides(
        left=1.0,
        right=worst,
        rounding=64 * 2.0**-53 * (1 + top / (1 - k.beta2) ** t),
        symbols={"beta2": k.beta2, "t": t, "axis": axis},
        assumptions={"renewed at every update": k.every == 1},
    )


def _changes(run: Run) -> list[Array]:
    """Return K_old^{-1} K_new of every update and axis."""
    return [
        np.linalg.solve(old, new)
        for before, after in zip(run.all_states()[:-1], run.all_states()[1:], strict=True)
        for old, new in zip(before.factors, after.factors, strict=True)
    ]


@if_shampoo("if.clip", "1 - beta2 <= sigma_min(K_n^{-1} K_n,new)", Source.PROVED, INVERSE)
def clip(run: Run) -> Sides:
    """`IFShampoo`, any gradients: K_n stays invertible; the worst update and axis."""
    least = min(float(np.linalg.svd(change, compute_uv=False)[-1]) for change in run.form(_changes))
    k = run.method
    return Sides(
        left=1 - k.beta2,
        right=least,
        rounding=1e-9,
        symbols={"beta2": k.beta2, "T": len(run.gradients)},
        assumptions={"clipped": k.clip, "beta2 < 1": k.beta2 < 1},
    )


@if_shampoo("if.change", "|K_n^{-1} K_n,new - I|_F <= beta2", Source.PROVED, INVERSE)
def change(run: Run) -> Sides:
    """`IFShampoo`, any gradients: the relative change of a factor; the worst update and axis."""
    largest = np.max([np.linalg.norm(change - np.eye(len(change))) for change in run.form(_changes)])
    k = run.method
    return Sides(
        left=largest,
        right=k.beta2,
        rounding=1e-9,
        symbols={"beta2": k.beta2, "T": len(run.gradients)},
        assumptions={"clipped": k.clip},
    )


@if_shampoo("if.descent", "<G, u - kappa W> = |K_1^T x ... G|_F^2 >= 0", Source.PROVED, INVERSE, identity=True)
def descent(run: Run) -> Sides:
    """`IFShampoo` on matrices: every direction descends, with P from the factors in use; at the worst t."""
    _two_factors(run)
    sides = []
    for G, W, u, state in zip(run.gradients, run.points, run.directions, run.all_states()[1:], strict=False):
        left_factor, right_factor = state.factors
        right = float(np.sum((left_factor.T @ G @ right_factor) ** 2))
        sides.append((float(np.sum(G * (u - run.method.weight_decay * W))), right, float(np.sum(abs(G * u)))))
    left, right, size = sides[np.argmax([abs(left - right) / (right + 1e-300) for left, right, _ in sides])]
    kappa = run.method.weight_decay
    return Sides(
        left=left,
        right=right,
        rounding=1e-12 * (size + right),
        symbols={"kappa": kappa, "T": len(run.gradients)},
        assumptions={"no momentum": run.method.momentum == 0},
    )


@either(
    "rf.stationary",
    "B |S_C^{-1/2} G S_K^{-1/2}|_F^2 + lambda tr S_C^{-1} tr S_K^{-1} = d_C d_K at a fixed point",
    Source.PROVED,
    DIAGONAL,
    identity=True,
)
def stationary(run: Run) -> Sides:
    """`RFShampoo` and `IFShampoo` under a constant gradient: the trace of the fixed-point equation."""
    _two_factors(run)
    k, G = run.method, run.gradients[-1]
    inverses, before = (_inverses(state) for state in (run.states[-1], run.states[-2]))
    moved = max(
        float(np.linalg.norm(new - old) / np.linalg.norm(new)) for new, old in zip(inverses, before, strict=True)
    )
    left = k.batch_size * np.sum(G * (inverses[0] @ G @ inverses[1])) + k.damping * np.prod(
        [np.trace(a) for a in inverses]
    )
    return Sides(
        left=left,
        right=G.size,
        rounding=1e-6 * G.size,  # the distance that is left at a last change of 1e-9 and rates down to 1e-3
        symbols={"lambda": k.damping, "B": k.batch_size, "beta2": k.beta2, "last change": moved},
        assumptions={
            "the gradient is constant": bool(np.all(run.gradients == G)),
            "renewed at every update": k.every == 1,
            "stationary": moved <= 1e-9,
        },
    )


def _two_factors(run: Run) -> None:
    if len(run.stream.shape) != 2 or 1 in run.stream.shape:
        raise ValueError(f"the parameter must be a matrix with both sides above 1, got shape {run.stream.shape}")


def _inverses(state: Any) -> list[Array]:
    """Return S_n^{-1} of either method."""
    if hasattr(state, "inverses"):
        return [np.linalg.inv(s) for s in state.factors]
    return [k @ k.T for k in state.factors]
