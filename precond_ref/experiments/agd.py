"""Claims of AGD: the squared gradient difference beside the Hessian, and the switch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from precond_ref import problems
from precond_ref.experiments.base import Experiment, Tick, Verdict, claim, decided
from precond_ref.experiments.curvature import flat, hessian
from precond_ref.experiments.figures import line, lines, panels, title
from precond_ref.experiments.numbers import Array, Numbers, column, np, paired, spearman, spread
from precond_ref.experiments.training import Entry, descend
from precond_ref.methods.agd import AGD
from precond_ref.optimizer import Optimizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS = {
    "difference": "|s| with |H dx|", "sqrt(b)": "sqrt(b) with |diag H|", "sqrt(v)": "Adam's sqrt(v) with |diag H|",
}  # fmt: skip
BATCHES = ("batches of 100", "full batch")
LR = 10**-2.5

# ---- curvature ------------------------------------------------------------------------------------------------------


def both(a: Array, b: Array, sizes: list[int]) -> list[float]:
    """Return Spearman's correlation over all entries, and the mean of those within the weights of each layer."""
    ends = np.cumsum(sizes)[:-1]
    inside = [spearman(x, y) for x, y in zip(np.split(a, ends), np.split(b, ends), strict=True) if len(x) > 60]
    return [spearman(a, b), float(np.mean(inside))]


def difference(g: Array, mean: Array, t: int) -> tuple[Array, Array]:
    """Return AGD's s of the update after ``t`` updates, and the new average of gradients."""
    new = 0.9 * mean + 0.1 * g
    return new / (1 - 0.9 ** (t + 1)) - (mean / (1 - 0.9**t) if t else 0.0), new


def curvature(seed: int, tick: Tick, steps: int = 300, hidden: tuple[int, ...] = (16, 16)) -> Numbers:
    """Return correlations of AGD's s with H times the step, and of sqrt(b) and Adam's sqrt(v) with |diag H|."""
    found: Numbers = {}
    for i, (kind, size) in enumerate(zip(BATCHES, (100, None), strict=True)):
        problem = problems.load("digits-mlp", dtype="float64", seed=seed, hidden=hidden, batch_size=size)
        sizes = [value.size for value in problem.initial.values()]
        times = sorted({max(2, steps // 30), steps // 2, steps})
        v, before, mean = np.zeros(sum(sizes)), flat(problem.init()), np.zeros(sum(sizes))
        part: Numbers = {"steps": times, **{what: [] for what in PAIRS}}
        opt = Optimizer(AGD(), lr=LR)
        for step in descend(problem, Entry(opt.method), LR, steps):
            g, x, t = flat(step.grads), flat(step.params), step.number
            v = 0.999 * v + 0.001 * g * g
            s, mean = difference(g, mean, t)
            if t in times:
                H = hessian(problem, step.params)
                members = opt.unstack(step.params, step.state)
                b = flat({name: members[name].b for name in step.params})
                part["difference"].append(both(np.abs(s), np.abs(H @ (x - before)), sizes))
                part["sqrt(b)"].append(both(np.sqrt(b), np.abs(np.diag(H)), sizes))
                part["sqrt(v)"].append(both(np.sqrt(v), np.abs(np.diag(H)), sizes))
                tick((i + len(part["difference"]) / len(times)) / 2)
            before = x
        found[kind] = part
    return found


def least(runs: list[Numbers], kind: str, what: str, where: int) -> list[float]:
    """Return the least correlation along the run, for each seed."""
    return [min(each[where] for each in run[kind][what]) for run in runs]


@claim("G1")
def differences(runs: list[Numbers]) -> Verdict:
    """The difference of gradients is the Hessian's rows times the step.

    Holds here if: Spearman's correlation of |s| with |H dx| above 0.9 at every time, over all entries and within
    layers, with batches and without.
    """
    found = {(k, w): least(runs, k, "difference", w) for k in BATCHES for w in (0, 1)}
    good = {f"{k}{', within layers' if w else ''}": float(np.median(each)) > 0.9 for (k, w), each in found.items()}
    last = spread([run["full batch"]["difference"][-1][0] for run in runs], 2)
    text = "; ".join(
        f"{kind}{', within layers' if where else ''} {spread(each, 2)}" for (kind, where), each in found.items()
    )
    return decided(good, f"Least correlation along the run: {text}; full batch at the end {last}")


@claim("G2")
def follows(runs: list[Numbers]) -> Verdict:
    """Its square root follows the Hessian's diagonal.

    Holds here if: correlation of sqrt(b) with |diag H| within layers above 0.5 and above that of Adam's sqrt(v),
    along the same run, with batches and without.
    """
    text, good = [], {}
    for kind in BATCHES:
        ours, adam = (least(runs, kind, what, 1) for what in ("sqrt(b)", "sqrt(v)"))
        gap = paired(ours, adam)
        good[kind] = float(np.median(ours)) > 0.5 and gap.above
        everywhere = " and ".join(spread(least(runs, kind, what, 0), 2) for what in ("sqrt(b)", "sqrt(v)"))
        text.append(
            f"{kind}: sqrt(b) {spread(ours, 2)}, Adam's sqrt(v) {spread(adam, 2)}, difference {gap}; over all "
            f"layers {everywhere}"
        )
    return decided(good, f"Least correlation with |diag H| within layers along the run: {'; '.join(text)}")


def curvature_figure(runs: list[Numbers]) -> Figure:
    """Draw the correlations by time."""
    figure, axes = panels(2, 5.4)
    for panel, kind in zip(axes, BATCHES, strict=True):
        for rank, (what, label) in enumerate(PAIRS.items()):
            for where, style in ((0, "-"), (1, "--")):
                curves = [[each[where] for each in run[kind][what]] for run in runs]
                name = label + (", within layers" if where else "")
                line(panel, runs[0][kind]["steps"], curves, name, rank, linestyle=style, marker="o", markersize=3)
        title(panel, f"Spearman's correlation, {kind}", xlabel="steps", ylim=(-0.2, 1.05))
    axes[0].legend(frameon=False, fontsize=7.5)
    return figure


# ---- the switch -----------------------------------------------------------------------------------------------------

DELTAS = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
TASKS = ("digits-mlp", "digits-autoencoder", "digits-cnn")


def switch(seed: int, tick: Tick, steps: int = 200) -> Numbers:
    """Return the share of coordinates that take SGD's step, by time, for each task and delta, and by layer at 1e-3."""
    found: Numbers = {"steps": [round(steps * share) for share in (0.05, 0.25, 0.5, 0.75, 1.0)]}
    for i, task in enumerate(TASKS):
        problem = problems.load(task, seed=seed)
        layers: Numbers = {}
        found[task] = {}
        for delta in DELTAS:
            shares = []
            opt = Optimizer(AGD(delta=delta), lr=LR)
            for step in descend(problem, Entry(opt.method), LR, steps):
                if step.number in found["steps"]:
                    sgd = {name: report.is_sgd for name, report in opt.diagnose(step.params, step.state).items()}
                    shares.append(float(np.mean(flat(sgd))))
                    for name in (name for name in sgd if delta == 1e-3 and name.endswith("weight")):
                        layers.setdefault(name, []).append(float(np.mean(sgd[name])))
            found[task][f"{delta:g}"] = shares
        found[f"{task}, layers"] = layers
        tick((i + 1) / len(TASKS))
    return found


@claim("G3")
def switches(runs: list[Numbers]) -> Verdict:
    """It switches between SGD and the adaptive step by itself.

    Holds here if: the share of coordinates that take SGD's step changes by more than 0.2 in a run, at one delta on
    all three tasks.
    """
    change = {
        (task, f"{d:g}"): [max(run[task][f"{d:g}"]) - min(run[task][f"{d:g}"]) for run in runs]
        for task in TASKS
        for d in DELTAS
    }
    full = [f"{d:g}" for d in DELTAS if all(np.median(change[task, f"{d:g}"]) > 0.2 for task in TASKS)]
    some = [f"{d:g}" for d in DELTAS if any(np.median(change[task, f"{d:g}"]) > 0.2 for task in TASKS)]
    default = ", ".join(f"{task} {spread(change[task, '1e-05'], 2)}" for task in TASKS)
    middle = ", ".join(f"{task} {spread(change[task, '0.001'])}" for task in TASKS)
    text = (
        f"Change above 0.2 on all tasks at delta {', '.join(full) or 'none'}, on some at "
        f"{', '.join(some) or 'none'}; at the "
        f"default 1e-5: {default}; at 1e-3: {middle}"
    )
    return decided({"some delta on some task": bool(some), "one delta on all tasks": bool(full)}, text)


def switch_figure(runs: list[Numbers]) -> Figure:
    """Draw the shares by time, and at delta 1e-3 by layer."""
    figure, axes = panels(3, 4.2, 6.6, rows=2)
    for panel, below, task in zip(axes, axes[3:], TASKS, strict=False):
        shares = {f"delta {delta}": column(runs, task, delta) for delta in runs[0][task]}
        text, legend = f"share of SGD's steps, {task}", 8 * (task == TASKS[0])
        lines(panel, runs[0]["steps"], shares, text, legend, xlabel="steps", ylim=(-0.02, 1.02))
        layers = {name: column(runs, f"{task}, layers", name) for name in runs[0][f"{task}, layers"]}
        text = f"by layer, delta 1e-3, {task}"
        lines(below, runs[0]["steps"], layers, text, xlabel="steps", ylim=(-0.02, 1.02))
    return figure


EXPERIMENTS = (
    Experiment(
        name="curvature", minutes=1.3, claims=(differences, follows),
        title="digits-mlp with two hidden layers of 16 (1482 parameters), 300 steps of AGD at 10^-2.5, with batches "
              "and with the whole training set; Hessian of the loss on the training set at three times.",
        one=curvature, draw=curvature_figure, small={"steps": 4, "hidden": (2,)},
    ),
    Experiment(
        name="switch", minutes=0.3, claims=(switches,),
        title="AGD at 10^-2.5 on three problems of the digits, 200 steps, six values of delta.",
        one=switch, draw=switch_figure, small={"steps": 10},
    ),
)  # fmt: skip
