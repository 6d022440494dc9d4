"""Claims of Sketchy, and ASGO's about the rank of gradients: spectra along a training, and regret against memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from precond_ref import problems, regret
from precond_ref.experiments.base import NOT, Experiment, Tick, Verdict, claim, decided
from precond_ref.experiments.figures import COLOURS, line, lines, panels, title
from precond_ref.experiments.numbers import Array, Numbers, column, np, paired, spread
from precond_ref.experiments.training import Entry, Language, descend
from precond_ref.methods.baselines import AdaGrad, Adam, FullAdaGrad
from precond_ref.methods.online_sketches import FDSON, RFDSON, AdaFD
from precond_ref.methods.sketchy import SAdaGrad
from precond_ref.problems import online

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# ---- spectra along a training ---------------------------------------------------------------------------------------

TASKS = ("transformer", "mnist-mlp", "mnist-cnn")


def matrices(grads: dict[str, Array]) -> dict[str, Array]:
    """Return the gradients of matrices and kernels as matrices (O, the rest)."""
    return {name: g.reshape(len(g), -1) for name, g in grads.items() if g.ndim > 1 and min(g.shape[:2]) > 1}


def concentration(G: Array) -> tuple[float, float]:
    """Return stable rank and (nuclear / Frobenius norm)^2, both over min(m, n)."""
    s = np.linalg.svd(G, compute_uv=False)
    s = s / max(s[0], 1e-30)
    return float(np.sum(s**2) / len(s)), float(np.sum(s) ** 2 / np.sum(s**2) / len(s))


def averaged(averages: dict[str, Array], grads: dict[str, Array]) -> None:
    """Renew the averages (0.99) of GG^T and G^TG of the factors with at least 16 rows."""
    for name, G in matrices(grads).items():
        for side, rows in (("left", G), ("right", G.T)):
            if len(rows) >= 16:
                key = f"{name} {side}"
                averages[key] = 0.99 * averages.get(key, 0.0) + 0.01 * (rows @ rows.T)


def shares(matrix: Array, parts: tuple[int, ...] = (4, 8, 16)) -> list[float]:
    """Return the shares of the trace in the leading d / part eigenvalues."""
    w = np.linalg.eigvalsh(matrix)
    return [float(np.sum(w[-max(1, len(w) // part) :]) / np.sum(w)) for part in parts]


def leading(matrix: Array) -> Array:
    """Return the leading d / 8 eigenvectors, (d, k)."""
    return np.linalg.eigh(matrix)[1][:, -max(1, len(matrix) // 8) :]


def rotation(old: dict[str, Array], new: dict[str, Array]) -> list[float]:
    """Return the median over factors of mean cos^2 between leading spaces, and of the mass that the old one keeps."""
    cosines, kept = [], []
    for name, matrix in new.items():
        u, v = leading(old[name]), leading(matrix)
        cosines.append(float(np.mean(np.linalg.svd(u.T @ v, compute_uv=False) ** 2)))
        kept.append(float(np.trace(u.T @ matrix @ u) / np.trace(v.T @ matrix @ v)))
    return [float(np.median(cosines)), float(np.median(kept))]


def along(task: Any, steps: int, batches: Any) -> Numbers:
    """Return rank of the gradients, concentration and rotation of the factors along one run of Adam."""
    times = [1, *(round(steps * share) for share in (0.05, 0.33, 0.67, 1.0))]
    found: Numbers = {"steps": times, "stable": [], "nuclear": [], "control": [], "shares": [], "least": []}
    averages: dict[str, Array] = {}
    first: dict[str, Array] = {}
    frozen: dict[str, Array] = {}
    rng = np.random.default_rng([task.seed, 6])
    for step in descend(task, Entry(Adam()), 10**-2.5, steps):
        averaged(averages, step.grads)
        if step.number in times:
            grads = matrices(step.grads)
            measured = np.array([concentration(G) for G in grads.values()])
            normal = np.array([concentration(rng.standard_normal(G.shape)) for G in grads.values()])
            found["stable"].append(float(np.median(measured[:, 0])))
            found["nuclear"].append(float(np.median(measured[:, 1])))
            found["control"].append([float(x) for x in np.median(normal, axis=0)])
        if step.number in times[2:]:
            each = np.array([shares(L) for L in averages.values()])
            found["shares"].append([float(x) for x in np.median(each, axis=0)])
            found["least"].append(float(np.min(each[:, 0])))
        if step.number == times[2]:
            first = dict(averages)
            frozen, params = dict(averages), step.params
    for number in range(times[2], steps):
        averaged(frozen, task.loss_and_grad(params, batches(10**6 + number))[1])
    found["rotation"], found["frozen"] = rotation(first, averages), rotation(first, frozen)
    return found


def spectra(seed: int, tick: Tick, steps: int = 300, width: int = 64, batch: int = 50) -> Numbers:
    """Train a transformer, a network of dense layers and a convolutional one."""
    found: Numbers = {}
    language = Language(seed, width=width)
    found["transformer"] = along(language, steps, language.batch)
    for i, name in enumerate(TASKS[1:]):
        tick((i + 1) / len(TASKS))
        network = problems.load(name, seed=seed, batch_size=batch)
        found[name] = along(network, steps, network.batch)
    return found


@claim("A1")
def low_rank(runs: list[Numbers]) -> Verdict:
    """Gradients have low rank.

    Holds here if: stable rank and (nuclear/Frobenius)^2, medians over the matrices, below 1/4 of those of Gaussian
    matrices at every time, on all networks.
    """
    good, text = {}, []
    for task in TASKS:
        for i, measure in enumerate(("stable", "nuclear")):
            name = f"{task}, {('stable rank', '(nuclear/Frobenius)^2')[i]}"
            worst = [
                max(a / c[i] for a, c in zip(run[task][measure], run[task]["control"], strict=True)) for run in runs
            ]
            good[name] = float(np.median(worst)) < 0.25
            text.append(f"{name} {spread(worst, 2)}")
    return decided(good, f"Largest share of the control along the run: {'; '.join(text)}")


@claim("S1")
def concentrated(runs: list[Numbers]) -> Verdict:
    """The spectra of the Kronecker factors concentrate on a small leading space.

    Holds here if: median share of the leading quarter above 0.9 from step 99 on, on all networks.
    """
    worst = {task: [min(share[0] for share in run[task]["shares"]) for run in runs] for task in TASKS}
    text = "; ".join(
        f"{task} {spread(each, 2)}, least factor {spread([min(run[task]['least']) for run in runs], 2)}"
        for task, each in worst.items()
    )
    good = {task: float(np.median(each)) > 0.9 for task, each in worst.items()}
    return decided(good, f"Least median share of the top quarter along the run: {text}")


@claim("S2")
def turns(runs: list[Numbers]) -> Verdict:
    """This leading space changes during training.

    Holds here if: it turns more than with frozen weights, beyond two standard errors, on all networks.
    """
    good, text = {}, []
    for task in TASKS:
        moved, still = ([run[task][key][0] for run in runs] for key in ("rotation", "frozen"))
        good[task] = paired(moved, still).below
        kept = spread([run[task]["rotation"][1] for run in runs], 2)
        text.append(
            f"{task} {spread(moved, 2)}, weights frozen {spread(still, 2)}, the old space keeps {kept} of the mass"
        )
    first = runs[0][TASKS[0]]["steps"]
    return decided(
        good,
        f"Mean cos^2 of the leading d/8 at steps {first[2]} and {first[-1]}: {'; '.join(text)}; random 0.12",
    )


def spectra_figure(runs: list[Numbers]) -> Figure:
    """Draw rank, share of the leading space, and rotation."""
    figure, (left, middle, right) = panels(3, 4.4)
    for rank, task in enumerate(TASKS):
        steps = runs[0][task]["steps"]
        for j, (measure, style) in enumerate((("stable", "-"), ("nuclear", "--"))):
            ratios = [[a / c[j] for a, c in zip(run[task][measure], run[task]["control"], strict=True)] for run in runs]
            name = "stable rank" if j == 0 else "nuclear"
            line(left, steps, ratios, f"{task}, {name}", rank, linestyle=style, marker="o", markersize=3)
        for j, part in enumerate((4, 8, 16)):
            curves = [[share[j] for share in run[task]["shares"]] for run in runs]
            line(middle, steps[2:], curves, f"{task}, top d/{part}", rank, linestyle=("-", "--", ":")[j], marker="o")
        for j, key in enumerate(("frozen", "rotation")):
            values = [run[task][key][0] for run in runs]
            right.plot([2 * rank + j] * len(values), values, "o", color=COLOURS[rank], alpha=0.6)
    left.axhline(0.25, color="black", linewidth=0.8)
    middle.axhline(0.9, color="black", linewidth=0.8)
    right.axhline(0.125, color="0.6", linewidth=0.8)
    title(left, "rank of gradients over that of Gaussian ones", xlabel="steps", ylim=(0, None))
    title(middle, "share of the leading space of the factors", xlabel="steps", ylim=(0, 1.02))
    title(right, "mean cos^2 of leading spaces (grey: random)", ylim=(0, 1.02))
    right.set_xticks(
        range(2 * len(TASKS)), [f"{task},\n{word}" for task in TASKS for word in ("frozen", "trained")], fontsize=6
    )
    left.legend(frameon=False, fontsize=7.5)
    middle.legend(frameon=False, fontsize=7.5, ncols=2)
    return figure


# ---- regret against memory ------------------------------------------------------------------------------------------

RADIUS = 5.0
ADVERSARIES = ("random", "alternating", "doubling switches", "least preconditioned", "most preconditioned")
"""Kinds of `precond_ref.problems.online.adversary`."""


def one_pass(method: Any, features: Array, signs: Array, rates: Array) -> Array:
    """Return the sum of the logistic losses of a pass from zero, for all rates at once, (rates,)."""
    x = np.zeros((len(rates), features.shape[1]))
    state, total = method.init(x, stack_ndim=1), np.zeros(len(rates))
    scaled = isinstance(method, (FDSON, RFDSON))  # learning_rate=1: the rate scales gradients and steps
    into, out = (rates**-0.5, rates**0.5) if scaled else (np.ones_like(rates), rates)
    with np.errstate(all="ignore"):
        for a, y in zip(features, signs, strict=True):
            margin = y * (x @ a)
            total += np.logaddexp(0.0, -margin)
            slope = -y * np.exp(-np.logaddexp(0.0, margin))
            direction, state = method.update((slope * into)[:, None] * a, state, x)
            x = x - out[:, None] * direction
    return np.where(np.isfinite(total), total, np.inf)


def sized(size: int, make: Callable[[], online.Stream], rates: Array, best: Any = None) -> list[regret.Game]:
    """Return the games of S-AdaGrad at these rates, of which only the last round is looked at."""
    return [regret.play(SAdaGrad(size=size), make(), float(lr), best, count=2) for lr in rates]


def record(found: Numbers, name: str, game: regret.Game) -> None:
    """Write regret, bound and lost mass of the last round."""
    found["regret"][name], found["bound"][name] = float(game.regret[-1]), float(game.bound[-1])
    if game.lost:
        found["lost"][name] = [float(game.lost[0].escaped[-1]), float(game.lost[0].limit[-1])]


def played(kind: str, seed: int, rounds: int, sizes: tuple[int, ...], rates: Array, d: int) -> Numbers:
    """Return regret, bound and lost mass by size against an adversary on d entries, at the rate of least bound."""
    found: Numbers = {"regret": {}, "bound": {}, "lost": {}}
    make = partial(online.adversary, kind, (d,), rounds=rounds, seed=seed)
    for size in (*(size for size in sizes if size < d), d):
        games = sized(size, make, rates)
        record(found, str(size) if size < d else "full", min(games, key=lambda game: game.bound[-1]))
    diagonal = [regret.play(AdaGrad(eps=0.0), make(), float(lr), count=2) for lr in rates]
    found["regret"]["diagonal"] = float(min(diagonal, key=lambda game: game.bound[-1]).regret[-1])
    return found


def memory(
    seed: int,
    tick: Tick,
    rounds: int = 2000,
    sizes: tuple[int, ...] = (1, 2, 5, 10, 20, 40, 80),
    rates: int = 9,
    peers: tuple[int, ...] = (5, 10, 20),
    d: int = 50,
) -> Numbers:
    """Return regrets of S-AdaGrad, bounds and lost mass by size, on a shuffled a9a and against adversaries.

    And losses of earlier sketches on a9a.
    """
    features, signs = online.libsvm("a9a")
    order = np.random.default_rng([seed, 7]).permutation(len(signs))[:rounds]
    features, signs = features[order], signs[order]
    best = regret.comparator_of_logistic(features, signs, RADIUS)
    least = float(np.sum(np.logaddexp(0.0, -signs * (features @ best.point))))
    grid = 10.0 ** np.linspace(-1.5, 0.5, rates)
    ours: Numbers = {"regret": {}, "bound": {}, "lost": {}}
    found: Numbers = {"a9a": ours, "loss": {}, "failed": {}}
    for i, size in enumerate(sizes):
        losses = one_pass(SAdaGrad(size=size), features, signs, grid)
        stream = partial(online.linear_model, "logistic", features, signs)
        record(ours, str(size), sized(size, stream, grid[[np.argmin(losses)]], lambda run: best)[0])
        tick(0.5 * (i + 1) / len(sizes))
    ours["regret"]["diagonal"] = float(np.min(one_pass(AdaGrad(eps=0.0), features, signs, grid))) - least
    few = grid[2 : 2 + max(1, rates // 3)]
    ours["regret"]["full"] = float(np.min(one_pass(FullAdaGrad(eps=0.0), features, signs, few))) - least
    for i, kind in enumerate(ADVERSARIES):
        found[kind] = played(kind, seed, rounds // 10, sizes, 10.0 ** np.linspace(-2, 1, rates), d)
        tick(0.5 + 0.2 * (i + 1) / len(ADVERSARIES))
    wide = 10.0 ** np.linspace(-4, 0, rates)
    for i, size in enumerate(peers):
        makers: dict[str, Any] = {
            "S-AdaGrad": (lambda delta, size=size: SAdaGrad(size=size), (0.0,)),
            "RFD-SON": (lambda delta, size=size: RFDSON(size=size, delta=0.0, learning_rate=1.0), (0.0,)),
            "Ada-FD": (lambda delta, size=size: AdaFD(size=size, delta=delta), (1e-2, 1e-1, 1.0)),
            "FD-SON": (lambda delta, size=size: FDSON(size=size, delta=delta, learning_rate=1.0), (1e-2, 1e-1, 1.0)),
        }
        for name, (make, deltas) in makers.items():
            losses = np.concatenate([one_pass(make(delta), features, signs, wide) for delta in deltas]) / rounds
            found["loss"].setdefault(name, {})[str(size)] = float(np.min(losses))
            found["failed"].setdefault(name, {})[str(size)] = float(np.mean(losses > np.log(2)))
        tick(0.7 + 0.3 * (i + 1) / len(peers))
    return found


def known_sizes(runs: list[Numbers], stream: str) -> list[str]:
    """Return the sizes of sketches on a stream."""
    return [size for size in runs[0][stream]["bound"] if size != "full"]


@claim("S3")
def monotone(runs: list[Numbers]) -> Verdict:
    """One dial leads from d k to d^2 memory.

    Holds here if: median regret falls with the size and ends within 2 % of full AdaGrad's.
    """
    good, text = dict[str, bool](), []
    for stream in ("a9a", *ADVERSARIES):
        sizes = known_sizes(runs, stream)
        medians = [float(np.median(column(runs, stream, "regret", size))) for size in sizes]
        full = column(runs, stream, "regret", "full")
        ends = paired(column(runs, stream, "regret", sizes[-1]), full)
        target = float(np.median(full))
        good[f"the end on {stream}"] = abs(medians[-1] - target) <= 0.02 * abs(target)
        good[f"the fall on {stream}"] = all(a >= b for a, b in pairwise(medians))
        shown = (*sizes, "diagonal", "full") if stream == "a9a" else (sizes[0], sizes[-1], "full")
        each = ", ".join(f"{size}: {spread(column(runs, stream, 'regret', size))}" for size in shown)
        text.append(f"{stream} {each}; size {sizes[-1]} minus full {ends}")
    return decided(good, f"Regret by size, {'; '.join(text)}")


@claim("S4")
def up_to_tail(runs: list[Numbers]) -> Verdict:
    """The regret is that of the full matrix up to the bottom eigenvalues.

    Holds here if: escaped mass at most Omega, regret at most the bound, at every size, and the bound falls with it.
    """
    good, text = {"the mass": True, "the regret": True}, []
    for stream in ("a9a", *ADVERSARIES):
        sizes = known_sizes(runs, stream)
        each = [
            (run[stream]["regret"][s], run[stream]["bound"][s], *run[stream]["lost"][s]) for run in runs for s in sizes
        ]
        medians = [float(np.median(column(runs, stream, "bound", s))) for s in sizes]
        good["the mass"] &= all(mass <= limit * (1 + 1e-4) for _, _, mass, limit in each)
        good["the regret"] &= all(paid <= bound for paid, bound, _, _ in each)
        good[f"the bound's fall on {stream}"] = all(a >= b for a, b in pairwise(medians))
        shares = [mass / limit for _, _, mass, limit in each if limit > 0]
        times = [bound / paid for paid, bound, _, _ in each if paid > 0]
        text.append(
            f"{stream}: escaped mass over Omega {min(shares):.2f} to {max(shares):.2f}; bound {medians[0]:.3g} at size "
            f"{sizes[0]}, {medians[-1]:.3g} at {sizes[-1]}; it is {min(times):.2g} to {max(times):.2g} times the regret"
        )
    if not (good["the mass"] and good["the regret"]):
        return Verdict(NOT, "; ".join(text))
    return decided(good, "; ".join(text))


@claim("S5")
def earlier(runs: list[Numbers]) -> Verdict:
    """It is better than earlier methods with Frequent Directions.

    Holds here if: mean loss at the best setting below those of RFD-SON, Ada-FD and FD-SON, at all three sizes.
    """
    good: dict[str, bool] = {}
    sizes, text = list(runs[0]["loss"]["S-AdaGrad"]), []
    for name in ("RFD-SON", "Ada-FD", "FD-SON"):
        gaps = {s: paired(column(runs, "loss", "S-AdaGrad", s), column(runs, "loss", name, s)) for s in sizes}
        good |= {f"{name} at size {s}": gap.below for s, gap in gaps.items()}
        text.append(f"minus {name} " + ", ".join(f"{gap} at size {s}" for s, gap in gaps.items()))
    failed = "; ".join(f"{n} {np.mean([run['failed'][n][sizes[0]] for run in runs]):.0%}" for n in runs[0]["failed"])
    measured = f"Best mean loss {'; '.join(text)}. Settings worse than never moving, size {sizes[0]}: {failed}"
    return decided(good, measured)


def memory_figure(runs: list[Numbers]) -> Figure:
    """Draw regret and bound, and losses, against the size."""
    figure, axes = panels(3, 4.2, 6.6, rows=2)
    axes.pop().remove()
    sizes = known_sizes(runs, "a9a")
    numbers = [int(size) for size in sizes]
    for rank, name in ((2, "full"), (3, "diagonal")):
        level = float(np.median(column(runs, "a9a", "regret", name)))
        axes[0].axhline(level, color=COLOURS[rank], linestyle=":", label=f"{name} AdaGrad")
    regrets = {"S-AdaGrad": [[run["a9a"]["regret"][s] for s in sizes] for run in runs]}
    lines(axes[0], numbers, regrets, "regret on a9a", xlabel="size of the sketch", xscale="log")
    line(axes[1], numbers, [[run["a9a"]["bound"][s] for s in sizes] for run in runs], "bound", 1, marker="o")
    title(axes[1], "bound of the regret on a9a", xlabel="size of the sketch", xscale="log", ylim=(0, None))
    for panel, what in zip(axes[2:4], ("regret", "bound"), strict=True):
        ratios = {}
        for kind in ADVERSARIES:
            few = known_sizes(runs, kind)
            ratios[kind] = [[run[kind][what][s] / run[kind][what]["full"] for s in few] for run in runs]
        text = f"adversaries: {what} over the full matrix's"
        lines(panel, [int(s) for s in few], ratios, text, 7, xlabel="size of the sketch", xscale="log")
    few = list(runs[0]["loss"]["S-AdaGrad"])
    losses = {name: [[run["loss"][name][s] for s in few] for run in runs] for name in runs[0]["loss"]}
    lines(axes[4], [int(s) for s in few], losses, "mean loss on a9a, best setting", xlabel="size", xscale="log")
    return figure


EXPERIMENTS = (
    Experiment(
        name="spectra", minutes=0.9, needs=("tinyshakespeare", "mnist", "torch"),
        claims=(low_rank, concentrated, turns),
        title="300 steps of Adam on a transformer (two layers of width 64, tinyshakespeare), mnist-mlp and mnist-cnn: "
              "the gradients of matrices, and averages (0.99) of GG^T and G^TG with at least 16 rows.",
        one=spectra, draw=spectra_figure, small={"steps": 40, "width": 16, "batch": 2},
    ),
    Experiment(
        name="memory", minutes=7.6, needs=("a9a",), claims=(monotone, up_to_tail, earlier),
        title="Online logistic regression on 2000 rows of a9a (another order for each seed), comparator in a ball of "
              "radius 5, the best of 9 rates (3 for the full matrix; times 3 offsets for Ada-FD and FD-SON); and "
              "linear losses of five adversaries in dimension 50, 200 rounds, comparator in the unit ball, at the rate "
              "of the least bound.",
        one=memory, draw=memory_figure, small={"rounds": 40, "sizes": (1, 3), "rates": 3, "peers": (2,), "d": 4},
    ),
)  # fmt: skip
