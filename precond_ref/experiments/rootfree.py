"""Claims of the root-free methods: half precision, invariance, and the law of scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from precond_ref import problems
from precond_ref.compare.rates import record
from precond_ref.experiments.base import Experiment, Tick, Verdict, claim, decided
from precond_ref.experiments.figures import dots, panels, title
from precond_ref.experiments.numbers import Array, Numbers, np, spread
from precond_ref.methods.baselines import Adam, RMSProp
from precond_ref.methods.inverse_free import IFShampoo
from precond_ref.methods.root_free import RFAdamW, RFRMSProp, RFShampoo
from precond_ref.methods.shampoo import Shampoo
from precond_ref.optimizer import Optimizer
from precond_ref.problems import online

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# ---- half precision -------------------------------------------------------------------------------------------------


def bfloat16(x: Array) -> Array:
    """Return a float32 array rounded to the nearest number of bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, dtype="float32").view("uint32")
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype("uint32").view("float32")
    return np.where(np.isfinite(x), rounded, x)


def exact(x: Array) -> Array:
    """Return the array itself."""
    return x


def rounded(tree: Any) -> Any:
    """Return nested tuples with all their arrays in bfloat16."""
    if isinstance(tree, tuple):
        parts = [rounded(each) for each in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return bfloat16(tree) if isinstance(tree, np.ndarray) else tree


def newton_root(A: Array, fl: Any, rounds: int = 30) -> Array:
    """Return A^(-1/4) by the coupled Newton iteration of Shampoo's codes, each operation rounded by ``fl``."""
    identity = np.eye(len(A), dtype="float32")
    z = np.float32(5.0 / (2.0 * np.linalg.norm(A)))
    M, X = fl(z * A), fl(z ** np.float32(0.25) * identity)
    for _ in range(rounds):
        T = fl(np.float32(1.25) * identity - fl(np.float32(0.25) * M))
        square = fl(T @ T)
        M, X = fl(fl(square @ square) @ M), fl(X @ T)
        if np.max(np.abs(M - identity)) < 1e-5:
            break
    return X


def shampoo(problem: Any, lr: float, eps: float, steps: int, statistics: Any, newton: Any) -> tuple[float, float]:
    """Train with Shampoo on the weights and Adam on the biases; ``newton`` rounds a Newton root (None: eigenvectors).

    Returns the last loss and the share of the statistics that were indefinite before eps.
    """
    params, adam = problem.init(), Optimizer(Adam(), lr=lr)
    grams = {k: [np.zeros((d, d), "float32") for d in v.shape] for k, v in params.items() if v.ndim == 2}
    biases = {k: v for k, v in params.items() if v.ndim == 1}
    state, indefinite, count = adam.init(biases), 0, 0
    for step in range(steps):
        _, grads = problem.loss_and_grad(params, problem.batch(step))
        for name, pair in grams.items():
            roots, G = [], grads[name]
            for i, rows in enumerate((G, G.T)):
                pair[i] = statistics(pair[i] + rows @ rows.T)
                A = pair[i] + np.float32(eps) * np.eye(len(rows), dtype="float32")
                if newton is None:
                    w, v = np.linalg.eigh(A)
                    indefinite, count = indefinite + (w[0] < eps / 2), count + 1
                    roots.append((v * np.maximum(w, eps) ** np.float32(-0.25)) @ v.T)
                else:
                    roots.append(newton_root(newton(A), newton))
            params = {**params, name: params[name] - np.float32(lr) * (roots[0] @ G @ roots[1]).astype("float32")}
        biases, state = adam.step({k: params[k] for k in biases}, {k: grads[k] for k in biases}, state)
        params = {**params, **biases}
        if not all(np.all(np.isfinite(value)) for value in params.values()):
            return float("nan"), indefinite / max(count, 1)
    return float(problem.loss(params)), indefinite / max(count, 1)


def stored(problem: Any, method: Any, lr: float, steps: int, parameters: Any, state_too: bool) -> float:
    """Return the last loss; parameters, and perhaps state and gradients, are stored through a rounding."""
    opt = Optimizer(method, lr=lr)
    params = {k: parameters(v) for k, v in problem.init().items()}
    state = opt.init(params)
    for step in range(steps):
        _, grads = problem.loss_and_grad(params, problem.batch(step))
        if state_too:
            grads = {k: bfloat16(g) for k, g in grads.items()}
        params, state = opt.step(params, grads, state)
        params = {k: parameters(v) for k, v in params.items()}
        state = rounded(state) if state_too else state
    return float(problem.loss(params))


EPSILONS = (1e-6, 1e-4, 1e-2)


def half(seed: int, tick: Tick, steps: int = 280, epsilons: tuple[float, ...] = EPSILONS) -> Numbers:
    """Return the last loss of each variant, at the rates that `compare` recorded for float32."""
    problem = problems.load("digits-mlp", seed=seed)
    rates = {name: entry["lr"] for name, entry in record()["digits-mlp"]["methods"].items()}
    found: Numbers = {"indefinite": {}}
    variants = {
        "float32": (exact, None), "statistics in bfloat16": (bfloat16, None),
        "Newton roots in float32": (exact, exact), "Newton roots in bfloat16": (exact, bfloat16),
    }  # fmt: skip
    with np.errstate(all="ignore"):
        for i, eps in enumerate(epsilons):
            for name, (statistics, newton) in variants.items():
                key = f"Shampoo, eps {eps:g}, {name}"
                found[key], found["indefinite"][key] = shampoo(
                    problem, rates["Shampoo"], eps, steps, statistics, newton
                )
            tick(0.8 * (i + 1) / len(epsilons))
        makers = {"IF-Shampoo": IFShampoo(batch_size=100.0), "RF-Shampoo": RFShampoo(batch_size=100.0), "Adam": Adam()}
        for name, method in makers.items():
            lr = rates[name.replace("-", "")]
            found[f"{name}, float32"] = stored(problem, method, lr, steps, exact, False)
            found[f"{name}, parameters in bfloat16"] = stored(problem, method, lr, steps, bfloat16, False)
            found[f"{name}, all stored in bfloat16"] = stored(problem, method, lr, steps, bfloat16, True)
    return found


def rise(runs: list[Numbers], key: str, plain: str) -> list[float]:
    """Return each seed's loss over that of float32; infinite for NaN."""
    return [float("inf") if run[key] is None else run[key] / run[plain] for run in runs]


@claim("R5")
def breaks(runs: list[Numbers]) -> Verdict:
    """It works in half precision, where Shampoo's roots fail.

    Holds here if: Shampoo with statistics or with Newton roots in bfloat16 is NaN or its loss rises by more than 10 %
    (median over the seeds of the loss over that of float32), at each of three eps, and IF-Shampoo's rises by less,
    with parameters and with everything in bfloat16.
    """
    text, good = [], {}
    for eps in [key.split(",")[1] for key in runs[0] if key.startswith("Shampoo") and key.endswith(", float32")]:
        for name in ("statistics in bfloat16", "Newton roots in bfloat16"):
            ratios = rise(runs, f"Shampoo,{eps}, {name}", f"Shampoo,{eps}, float32")
            good[f"Shampoo,{eps}, {name}"] = float(np.median(ratios)) > 1.1
            failed = sum(not np.isfinite(x) for x in ratios)
            word = f"NaN in {failed} of {len(runs)} runs" if failed else f"times {spread(ratios)}"
            text.append(f"Shampoo,{eps}, {name}: {word}")
    for name in ("parameters in bfloat16", "all stored in bfloat16"):
        for method in ("IF-Shampoo", "RF-Shampoo", "Adam"):
            ratios = rise(runs, f"{method}, {name}", f"{method}, float32")
            text.append(f"{method}, {name}: times {spread(ratios)}")
            if method == "IF-Shampoo":
                good[f"{method}, {name}"] = float(np.median(ratios)) < 1.1
    return decided(good, f"Loss over that of float32: {'; '.join(text)}")


def half_figure(runs: list[Numbers]) -> Figure:
    """Draw the losses of all seeds."""
    keys = [key for key in runs[0] if key != "indefinite"]
    figure, (axes,) = panels(1, 8.0, 0.26 * len(keys) + 1)
    dots(axes, [f"{key} ({sum(run[key] is None for run in runs)} NaN)" if any(run[key] is None for run in runs) else key
                for key in keys], [[run[key] for run in runs] for key in keys])  # fmt: skip
    title(axes, "loss on the training set, each seed", xscale="log")
    return figure


# ---- laws -----------------------------------------------------------------------------------------------------------


def laws(seed: int, tick: Tick, steps: int = 50) -> Numbers:
    """Return the error of runs in other coordinates W = A W' M^T, and of the laws of scale."""
    rng = np.random.default_rng([seed, 8])
    f = online.smooth("log-cosh", (6, 5), seed)
    A, M = (np.eye(d) + 0.2 * rng.standard_normal((d, d)) for d in (6, 5))
    start = rng.standard_normal((6, 5))
    found: Numbers = {"invariance": {}, "scale": {}}
    pairs = {
        "RF-Shampoo": (RFShampoo(damping=0.0), 0.05),
        "RF-Shampoo, beta2 0.1": (RFShampoo(damping=0.0, beta2=0.1), 0.05),
        "Shampoo": (Shampoo(eps=1e-12), 0.05),
    }
    for name, (method, lr) in pairs.items():
        W, V = start, np.linalg.solve(A, np.linalg.solve(M, start.T).T)
        s, r = method.init(W), method.init(V)
        if name != "Shampoo":  # S_n = I there is A^T A and M^T M here
            factors = (A.T @ A, M.T @ M)
            inverses = tuple(np.linalg.inv(each) for each in factors)
            r = r._replace(factors=factors, inverses=inverses)
        for _ in range(steps):
            direction, s = method.update(f.gradient(W), s, W)
            other, r = method.update(A.T @ f.gradient(A @ V @ M.T) @ M, r, V)
            W, V = W - lr * direction, V - lr * other
        found["invariance"][name] = float(np.linalg.norm(A @ V @ M.T - W) / np.linalg.norm(W - start))
    tick(0.5)
    gradients = rng.standard_normal((steps, 6, 5))
    for name, (method, power) in {
        "RMSProp": (RMSProp(eps=0.0), 0), "Adam": (Adam(eps=0.0), 0), "Shampoo": (Shampoo(eps=0.0), 0),
        "RF-RMSProp": (RFRMSProp(damping=0.0, initial=0.0), 1),
        "RF-AdamW": (RFAdamW(damping=0.0, bias_correction=True), 1),
    }.items():  # fmt: skip
        s, r, worst = method.init(start), method.init(start), 0.0
        for g in gradients:
            one, s = method.update(g, s, start)
            four, r = method.update(4.0 * g, r, start)
            worst = max(worst, float(np.max(np.abs(four * 4.0**power - one)) / np.max(np.abs(one))))
        found["scale"][name] = worst
    return found


@claim("R4")
def invariant(runs: list[Numbers]) -> Verdict:
    """Invariance gives root-free methods that are not diagonal.

    Holds here if: runs of RF-Shampoo without damping in coordinates W = A W' M^T differ by less than 1e-11, those of
    Shampoo by more than 1e-2.
    """
    ours, theirs = ([run["invariance"][name] for run in runs] for name in ("RF-Shampoo", "Shampoo"))
    good = {"RF-Shampoo": max(ours) < 1e-11, "Shampoo": min(theirs) > 1e-2}
    ill = max(run["invariance"]["RF-Shampoo, beta2 0.1"] for run in runs)
    text = (
        f"Distance of the runs: RF-Shampoo at most {max(ours):.1e} (with beta2 = 0.1, whose factors become "
        f"ill-conditioned, rounding grows to {ill:.1e}), Shampoo {spread(theirs, 2)}"
    )
    return decided(good, text)


@claim("R6")
def scales(runs: list[Numbers]) -> Verdict:
    """The root is a fundamental difference, not a detail.

    Holds here if: u(4 g) = u(g) with the root and u(g) / 4 without, to 1e-12.
    """
    worst = {name: max(run["scale"][name] for run in runs) for name in runs[0]["scale"]}
    text = "Largest deviation: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    return decided({name: value < 1e-12 for name, value in worst.items()}, text)


def laws_figure(runs: list[Numbers]) -> Figure:
    """Draw the errors."""
    figure, (axes,) = panels(1, 7.0, 2.8)
    keys = [(law, name) for law in runs[0] for name in runs[0][law]]
    values = [[max(run[law][name], 1e-17) for run in runs] for law, name in keys]
    dots(axes, [f"{law}, {name}" for law, name in keys], values)
    title(axes, "deviation from the law, each seed (exact: 1e-17)", xscale="log", xlim=(1e-18, 10))
    return figure


EXPERIMENTS = (
    Experiment(
        name="half-precision", minutes=0.5, claims=(breaks,),
        title="digits-mlp, 280 steps, rates recorded for float32. bfloat16 is emulated: each stored number is rounded, "
              "sums are in float32; in the Newton roots every product is rounded.",
        one=half, draw=half_figure, small={"steps": 3, "epsilons": (1e-4,)},
    ),
    Experiment(
        name="laws", minutes=0.1, claims=(invariant, scales),
        title="50 steps on a log-cosh loss, 6 x 5, in two coordinate systems; gradients times 4.",
        one=laws, draw=laws_figure, small={"steps": 5},
    ),
)  # fmt: skip
