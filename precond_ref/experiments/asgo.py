"""Claims of ASGO: blocks of the Hessian, constants of the theorems along runs, and two dials on a quadratic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from precond_ref import problems
from precond_ref.experiments.base import Experiment, Tick, Verdict, claim, decided
from precond_ref.experiments.curvature import drawn, groups, hessian, share
from precond_ref.experiments.figures import COLOURS, line, lines, panels, title
from precond_ref.experiments.numbers import Array, Numbers, column, np, paired, spread
from precond_ref.experiments.training import Entry, Language, descend
from precond_ref.methods.asgo import ASGOTheory
from precond_ref.methods.baselines import SGD, AdaGrad, Adam
from precond_ref.methods.muon import Muon
from precond_ref.methods.shampoo import Shampoo

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# ---- blocks of the Hessian ------------------------------------------------------------------------------------------

PARTS = ("layers", "output neurons", "inputs")


class Network(NamedTuple):
    """A network with the batch on which its Hessian is taken (None: the training set)."""

    task: Any
    batch: Any
    lr: float


def network(name: str, seed: int, hidden: tuple[int, ...], images: int) -> Network:
    """Return a network of `NETWORKS`."""
    if name == "transformer":
        task = Language(seed)
        return Network(task, task.batch(10**6), 10**-2.5)
    if name == "digits-mlp":
        return Network(problems.load(name, dtype="float64", seed=seed, hidden=hidden), None, 0.01)
    problem: Any = problems.load(name, dtype="float64", seed=seed, activation="tanh")  # ReLU: no Hessian at a kink
    return Network(problem, tuple(array[:images] for array in problem.train), 10**-2.5)


NETWORKS = {"digits-mlp": 10**6, "mnist-mlp": 48, "mnist-cnn": 32, "transformer": 32}
"""The most columns of a layer that are computed."""


def blocks(
    seed: int,
    tick: Tick,
    steps: int = 300,
    hidden: tuple[int, ...] = (16, 16),
    images: int = 100,
    looks: int = 3,
    columns: Mapping[str, int] = NETWORKS,
) -> Numbers:
    """Return the shares of the Hessian's squared norm in its blocks, and in blocks of the same sizes at random."""
    found: Numbers = {"steps": [round(steps * i / (looks - 1)) for i in range(looks)]}
    for i, name in enumerate(NETWORKS):
        rng = np.random.default_rng([seed, 4])
        task, batch, lr = network(name, seed, hidden, images)
        parts: Numbers = {part + word: [] for word in ("", ", random") for part in PARTS}
        for step in descend(task, Entry(Adam()), lr, steps):
            if step.number not in found["steps"]:
                continue
            params = {key: value.astype("float64") for key, value in step.params.items()}
            blocks_of = groups(params)
            which, weights = drawn(blocks_of["layers"], columns[name], rng)
            matrix = hessian(task, params, batch, which)
            for part in PARTS:
                parts[part].append(share(matrix, blocks_of[part], which, weights))
                parts[f"{part}, random"].append(share(matrix, rng.permutation(blocks_of[part]), which, weights))
            tick((i + len(parts["layers"]) / looks) / len(NETWORKS))
        found[name] = parts
    return found


@claim("A2")
def block_diagonal(runs: list[Numbers]) -> Verdict:
    """Hessians are nearly block-diagonal.

    Holds here if: at every time, more than 0.9 of the squared Frobenius norm in the layers' blocks and more than 0.5
    in those of the output neurons; control: blocks of the same sizes at random.
    """
    text, good = [], dict[str, bool]()
    for name in NETWORKS:
        least = {part: [min(run[name][part]) for run in runs] for part in PARTS}
        control = {part: [max(run[name][f"{part}, random"]) for run in runs] for part in PARTS}
        each = (f"{part} {spread(least[part], 2)}, at random {spread(control[part], 2)}" for part in PARTS)
        text.append(f"{name}: " + ", ".join(each))
        limits = {"layers": 0.9, "output neurons": 0.5}
        good |= {f"{name}, {part}": bool(np.median(least[part]) > limit) for part, limit in limits.items()}
    return decided(good, f"Least share along the run, {'; '.join(text)}")


def blocks_figure(runs: list[Numbers]) -> Figure:
    """Draw the shares by time."""
    figure, axes = panels(2, 4.8, 6.6, rows=2)
    for panel, name in zip(axes, NETWORKS, strict=True):
        for rank, part in enumerate(PARTS):
            line(panel, runs[0]["steps"], column(runs, name, part), part, rank, marker="o")
            random = column(runs, name, f"{part}, random")
            line(panel, runs[0]["steps"], random, f"{part}, at random", rank, linestyle=":")
        title(panel, f"share of the Hessian's squared norm, {name}", xlabel="steps", ylim=(0, 1.02))
    axes[-1].legend(frameon=False, fontsize=8)
    return figure


# ---- right sides of the theorems ------------------------------------------------------------------------------------

BOUNDS = ("ASGO", "Shampoo", "AdaGrad", "AdaGrad by rows", "SGD")


def trace(matrix: Array, power: float) -> float:
    """Return tr A^power of a positive semidefinite matrix."""
    return float(np.sum(np.maximum(np.linalg.eigvalsh(matrix), 0.0) ** power))


def right_sides(G: Array, X: Array) -> dict[str, float]:
    """Return the bounds of the regret at the best constant rate, from gradients and distances (T, m, n).

    They are those of `theory.asgo.regret`, of Shampoo at full size (`theory.sketchy.sshampoo_regret`), of
    `theory.asgo.row_regret` with entries and with rows, and of `theory.gradient_descent.regret`, eps = 0.
    """
    L, R = np.einsum("tij,tkj->ik", G, G), np.einsum("tij,tik->jk", G, G)
    entries, rows = np.sqrt(np.sum(G**2, axis=0)), np.sqrt(np.sum(G**2, axis=(0, 2)))
    operator = float(np.max(np.linalg.svd(X, compute_uv=False)[:, 0]))
    frobenius = float(np.max(np.linalg.norm(X, axis=(1, 2))))
    r = min(G.shape[1:])
    return {
        "ASGO": math.sqrt(2) * operator * trace(L, 0.5),
        "Shampoo": math.sqrt(2 * r) * frobenius * trace(L, 0.25) * trace(R, 0.25),
        "AdaGrad": math.sqrt(2) * float(np.max(np.abs(X))) * float(np.sum(entries)),
        "AdaGrad by rows": math.sqrt(2) * float(np.max(np.linalg.norm(X, axis=2))) * float(np.sum(rows)),
        "SGD": frobenius * float(np.linalg.norm(G)),
    }


def bounds(seed: int, tick: Tick, steps: int = 200) -> Numbers:
    """Return the right sides over SGD's for each weight matrix, after several numbers of steps of one run of Adam."""
    found: Numbers = {}
    for i, name in enumerate(("digits-mlp", "digits-autoencoder")):
        problem = problems.load(name, dtype="float64", seed=seed)
        run = list(descend(problem, Entry(Adam()), 0.01, steps))
        for key in (key for key, value in problem.initial.items() if value.ndim == 2):
            points, gradients = np.stack([s.params[key] for s in run]), np.stack([s.grads[key] for s in run])
            for T in (steps // 20, steps // 4, steps):
                sides = right_sides(gradients[:T], points[:T] - points[T])
                found[f"{name}/{key}, T = {T}"] = {k: side / sides["SGD"] for k, side in sides.items()}
        tick((i + 1) / 2)
    return found


@claim("A3")
def smallest(runs: list[Numbers]) -> Verdict:
    """Its rate is better than those of other structured methods.

    Holds here if: its right side is the smallest of the five in more than 90 % of the records (in part: of the four
    without SGD); this compares upper bounds only.
    """
    records = [record for run in runs for record in run.values()]
    winners = [min(record, key=record.__getitem__) for record in records]
    structured = [min(record, key=lambda k: record[k] if k != "SGD" else math.inf) for record in records]
    counts = ", ".join(f"{k} {winners.count(k) / len(winners):.0%}" for k in BOUNDS)
    alone = structured.count("ASGO") / len(structured)
    shampoo = sum(record["ASGO"] < record["Shampoo"] for record in records) / len(records)
    text = f"Smallest of {len(records)} records: {counts}; without SGD, ASGO in {alone:.0%}; "
    text += f"below Shampoo's in {shampoo:.0%}"
    won = winners.count("ASGO") / len(winners)
    return decided({"the four without SGD": alone > 0.9, "all five": won > 0.9}, text)


def bounds_figure(runs: list[Numbers]) -> Figure:
    """Draw the right sides over SGD's."""
    keys = list(runs[0])
    figure, (axes,) = panels(1, 8.5, 0.27 * len(keys) + 1.2)
    for rank, method in enumerate(BOUNDS[:-1]):
        for row, key in enumerate(keys):
            values = [run[key][method] for run in runs]
            axes.plot(values, [row] * len(values), "o", color=COLOURS[rank], alpha=0.6, markersize=5,
                      label=method if row == 0 else None)  # fmt: skip
    axes.axvline(1.0, color="black", linewidth=0.9)
    axes.set_yticks(range(len(keys)), keys, fontsize=8)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8)
    title(axes, "right side of the regret bound over that of SGD (line), best rate", xscale="log")
    return figure


# ---- two dials ------------------------------------------------------------------------------------------------------

M, N = 20, 30
METHODS: dict[str, Any] = {
    "ASGO": ASGOTheory(eps=1e-6),
    "Shampoo": Shampoo(eps=1e-6),
    "AdaGrad": AdaGrad(eps=1e-6),
    "Muon": Muon(momentum=0.0, nesterov=False, rms=None, root="svd"),
    "SGD": SGD(),
}
COUPLINGS, RANKS, SPACES = (0.0, 0.5, 1.0), (1, 20), (1, 2, 5, 20)


def stacked(method: Any, gradient: Any, rates: Array, steps: int) -> Any:
    """Yield the points (rates, m, n) of all rates at once, from zero."""
    shape = (M, N) if method.ndims[1] > 1 else (M * N,)
    W = np.zeros((len(rates), M, N))
    state = method.init(W.reshape(len(rates), *shape), stack_ndim=1)
    with np.errstate(all="ignore"):
        for t in range(steps):
            yield W
            G = gradient(t, W).reshape(len(rates), *shape)
            direction, state = method.update(G, state, W.reshape(len(rates), *shape))
            W = W - rates[:, None, None] * direction.reshape(W.shape)
        yield W


def quadratic(A: Array, B: Array, target: Array, t: int, W: Array) -> Array:
    """Return the gradient of tr(D^T A D B) / 2, D = W - target."""
    return A @ (W - target) @ B


def subgradient(draws: Array, target: Array, t: int, W: Array) -> Array:
    """Return the subgradient of the sum of |Z_t (W - target)|."""
    return draws[t].T @ np.sign(draws[t] @ (W - target))


def dials(seed: int, tick: Tick, steps: int = 60, count: int = 13) -> Numbers:
    """Return steps to a hundredth of the first loss by coupling and rank of the target, and losses by common space."""
    rng = np.random.default_rng([seed, 5])
    q, p = (np.linalg.qr(rng.standard_normal((d, d)))[0] for d in (M, N))
    A = q * np.geomspace(1, 1e-3, M) @ q.T
    rates = 10.0 ** np.linspace(-2, 1.5, count)
    found: Numbers = {"steps": {}, "losses": {}}
    for i, c in enumerate(COUPLINGS):
        B = p * np.geomspace(1, 10.0 ** (-3 * c), N) @ p.T
        for rank in RANKS:
            target = np.linalg.qr(rng.standard_normal((M, rank)))[0] @ np.linalg.qr(rng.standard_normal((N, rank)))[0].T
            first = np.trace(target.T @ A @ target @ B)
            for name, method in METHODS.items():
                reached = steps + 1
                for t, W in enumerate(stacked(method, partial(quadratic, A, B, target), rates, steps)):
                    D = W - target
                    if np.nanmin(np.sum((A @ D @ B) * D, axis=(1, 2))) <= 0.01 * first:
                        reached = t
                        break
                found["steps"].setdefault(name, {})[f"c = {c:g}, rank {rank}"] = reached
        tick((i + 1) / (len(COUPLINGS) + 1))
    for r in SPACES:
        target, space = rng.standard_normal((M, N)), q[:, :r]
        draws = rng.standard_normal((steps, 4, r)) @ space.T
        test = rng.standard_normal((200, r)) @ space.T
        for name in ("ASGO", "Shampoo", "SGD"):
            points = stacked(METHODS[name], partial(subgradient, draws, target), rates, steps)
            mean = sum(points) / (steps + 1)
            losses = np.sum(np.abs(test @ (mean - target)), axis=(1, 2)) / np.sum(np.abs(test @ target))
            found["losses"].setdefault(name, {})[f"rank {r}"] = float(np.nanmin(losses))
    return found


def steps_of(runs: list[Numbers], name: str, key: str) -> float:
    """Return the median number of steps."""
    return float(np.median([run["steps"][name][key] for run in runs]))


@claim("A4")
def fewest(runs: list[Numbers]) -> Verdict:
    """The better rate shows in iterations.

    Holds here if: fewest steps of five methods to 1 % of the first loss, at all six settings of the dials.
    """
    keys = list(runs[0]["steps"]["ASGO"])
    good = {key: steps_of(runs, "ASGO", key) <= min(steps_of(runs, n, key) for n in METHODS) for key in keys}
    text = "; ".join(
        f"{key}: " + ", ".join(f"{n} {spread([run['steps'][n][key] for run in runs])}" for n in METHODS) for key in keys
    )
    return decided(good, f"Steps at {text}")


def lead(runs: list[Numbers], other: str, key: str) -> list[float]:
    """Return the other's steps over ASGO's, for each seed."""
    return [run["steps"][other][key] / max(run["steps"]["ASGO"][key], 1) for run in runs]


@claim("A5")
def blocks_help(runs: list[Numbers]) -> Verdict:
    """It benefits from block-diagonal Hessians.

    Holds here if: Shampoo's steps over ASGO's grow as c falls from 1 to 0 (equal blocks), for both ranks.
    """
    good, text = {}, []
    for rank in RANKS:
        ratios = {c: lead(runs, "Shampoo", f"c = {c:g}, rank {rank}") for c in COUPLINGS}
        good[f"rank {rank}"] = all(np.median(a) > np.median(b) for a, b in pairwise(ratios.values()))
        text.append(f"rank {rank}: {', '.join(f'{spread(x, 2)} at c = {c:g}' for c, x in ratios.items())}")
    return decided(good, f"Shampoo's steps over ASGO's, {'; '.join(text)}")


@claim("A6")
def rank_helps(runs: list[Numbers]) -> Verdict:
    """It benefits from gradients of low rank.

    Holds here if: AdaGrad's steps over ASGO's are larger for the target of rank 1 than of 20, and ASGO's loss over
    SGD's and over Shampoo's is smaller in a space of dimension 1 than of 20.
    """
    leads = [lead(runs, "AdaGrad", f"c = 0, rank {rank}") for rank in RANKS]
    good = {"the target, over AdaGrad": bool(np.median(leads[0]) > np.median(leads[-1]))}
    text = [f"Target: AdaGrad's steps over ASGO's {spread(leads[0], 2)} at rank 1, {spread(leads[-1], 2)} at 20"]
    for other in ("SGD", "Shampoo"):
        ratios = {
            r: [run["losses"]["ASGO"][f"rank {r}"] / run["losses"][other][f"rank {r}"] for run in runs] for r in SPACES
        }
        good[f"the common space, over {other}"] = paired(ratios[SPACES[0]], ratios[SPACES[-1]]).below
        each = ", ".join(f"{spread(x, 2)} in dimension {r}" for r, x in ratios.items())
        text.append(f"common space: ASGO's loss over {other}'s {each}")
    return decided(good, "; ".join(text))


def dials_figure(runs: list[Numbers]) -> Figure:
    """Draw steps against the coupling, and losses against the dimension of the common space."""
    figure, axes = panels(3, 4.4)
    for panel, rank in zip(axes, RANKS, strict=False):
        steps = {n: [[run["steps"][n][f"c = {c:g}, rank {rank}"] for c in COUPLINGS] for run in runs] for n in METHODS}
        text, legend = f"steps to 1 %, target of rank {rank}", 8 * (rank == RANKS[0])
        lines(panel, COUPLINGS, steps, text, legend, xlabel="coupling c (0: equal blocks)", yscale="log")
    for name in runs[0]["losses"]:
        curves = [[run["losses"][name][f"rank {r}"] for r in SPACES] for run in runs]
        line(axes[2], SPACES, curves, name, list(METHODS).index(name), marker="o")
    title(
        axes[2], "L1 loss of the mean iterate", xlabel="dimension of the gradients' space", xscale="log", yscale="log"
    )
    return figure


EXPERIMENTS = (
    Experiment(name="hessian-blocks", minutes=6.2, needs=("tinyshakespeare", "mnist", "torch"),
        claims=(block_diagonal,),
        title="The Hessian of digits-mlp with two hidden layers of 16 (1482 parameters) over the whole training set; "
        "drawn columns of those of mnist-mlp and mnist-cnn (109386 and 9098 parameters, 100 images) and of a "
        "transformer (two layers of width 32, 512 characters of tinyshakespeare), at three times of 300 steps of Adam.",
        one=blocks, draw=blocks_figure,
        small={"steps": 2, "hidden": (2,), "looks": 2, "images": 5, "columns": dict.fromkeys(NETWORKS, 1)}),
    Experiment(name="bounds", minutes=0.1, claims=(smallest,),
        title="The right sides of the regret bounds, at the best constant rate of each, for the gradients and points "
        "of 200 steps of Adam on digits-mlp and digits-autoencoder; the comparator is the last point.", one=bounds,
        draw=bounds_figure, small={"steps": 20}),
    Experiment(name="dials", minutes=0.1, claims=(fewest, blocks_help, rank_helps),
        title="tr(D^T A D B) / 2, 20 x 30, A rotated of condition 1000, B of condition 1000^c, target of rank 1 or 20; "
        "and an L1 loss with fresh gradients in a common space; 60 steps (61: not reached), the best of 13 " "rates.",
        one=dials, draw=dials_figure, small={"steps": 3, "count": 2}),
)  # fmt: skip
