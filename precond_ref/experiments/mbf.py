"""Claims of MBF: cost of a step, convergence, the share of the Fisher matrix in mini-blocks, and an autoencoder."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from precond_ref import problems, theory
from precond_ref.experiments import training
from precond_ref.experiments.base import Experiment, Tick, Verdict, claim, decided
from precond_ref.experiments.figures import lines, panels, title
from precond_ref.experiments.kfac import KFAC, factors
from precond_ref.experiments.numbers import Array, Numbers, column, np, paired, spread
from precond_ref.experiments.training import Entry, Vision, comparison, descend
from precond_ref.methods.baselines import SGD, Adam
from precond_ref.methods.mbf import MBF
from precond_ref.methods.shampoo import Shampoo
from precond_ref.optimizer import Optimizer
from precond_ref.problems import online

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOMENTUM = "SGD, momentum"

# ---- cost of a step -------------------------------------------------------------------------------------------------

WIDTHS = (64, 128, 256, 512)
TIMED: dict[str, Any] = {
    MOMENTUM: SGD(momentum=0.9), "Adam": Adam(), "MBF": MBF.authors_code(), "Shampoo, every 25": Shampoo(every=25),
    "KFAC, every 20": KFAC(),
}  # fmt: skip


def cost(
    seed: int, tick: Tick, widths: tuple[int, ...] = WIDTHS, batch: int = 500, first: int = 26, steps: int = 50
) -> Numbers:
    """Return processor seconds of a gradient, and of steps after the ``first`` ones, by width of an autoencoder."""
    found: Numbers = {}
    for i, width in enumerate(widths):
        hidden = (width, width // 2, width)
        problem: Any = problems.load("mnist-autoencoder", seed=seed, hidden=hidden, batch_size=batch)
        params, batches = problem.init(), [problem.batch(step) for step in range(3)]
        start = time.process_time()
        for each in batches:
            _, grads = problem.loss_and_grad(params, each)
        found[str(width)] = {"gradient": (time.process_time() - start) / len(batches)}
        names = [name for name in params if name.endswith("weight")]
        for name, method in TIMED.items():
            join = tuple((w, w.replace("weight", "bias")) for w in names) if method.joins_bias else ()
            opt = Optimizer(method, lr=1e-6, join=join)
            state, x = opt.init(params), params
            for step in range(first + steps):
                if step == first:
                    start = time.process_time()
                given = None
                if isinstance(method, KFAC):
                    given = factors(problem, x, batches[0][0], np.random.default_rng([seed, 5, step]))
                x, state = opt.step(x, grads, state, statistics=given)
            found[str(width)][name] = (time.process_time() - start) / steps
        tick((i + 1) / len(widths))
    return found


def ratio(run: Numbers, width: str, name: str) -> float:
    """Return the time of an iteration, gradient and step, over that of SGD with momentum."""
    one = run[width]
    return (one["gradient"] + one[name]) / (one["gradient"] + one[MOMENTUM])


@claim("M1")
def slightly(runs: list[Numbers]) -> Verdict:
    """The cost of a step is only slightly above that of first-order methods.

    Holds here if: gradient and step of MBF take less than 1.5 times those of SGD with momentum, at every width.
    """
    found = {width: [ratio(run, width, "MBF") for run in runs] for width in runs[0]}
    good = {f"width {width}": float(np.median(each)) < 1.5 for width, each in found.items()}
    text = ", ".join(f"{spread(each, 3)} at width {width}" for width, each in found.items())
    for name in ("Shampoo, every 25", "KFAC, every 20"):
        text += f"; {name}, " + ", ".join(spread([ratio(run, width, name) for run in runs], 3) for width in runs[0])
    return decided(good, f"An iteration over that of SGD with momentum: {text}")


def cost_figure(runs: list[Numbers]) -> Figure:
    """Draw the ratios against the width."""
    figure, (axes,) = panels(1, 6.5)
    ratios = {name: [[ratio(run, width, name) for width in run] for run in runs] for name in TIMED}
    text = "processor time of an iteration over that of SGD with momentum"
    axes.axhline(1.5, color="black", linewidth=0.8)
    lines(axes, [int(width) for width in runs[0]], ratios, text, xlabel="width", xscale="log", ylim=(0, 8))
    return figure


# ---- convergence, and the Fisher matrix -----------------------------------------------------------------------------

LAYERS = ("fc1", "fc2", "fc3")


def errors(inputs: Array, signals: Array) -> dict[str, float]:
    """Return the relative Frobenius errors of approximations of the empirical Fisher matrix of a linear layer.

    ``inputs`` (n, J) have the 1 of the bias, ``signals`` (n, O) are of each sample's own loss.
    """
    n, J, O = len(inputs), inputs.shape[1], signals.shape[1]  # noqa: E741
    g = (signals[:, :, None] * inputs[:, None, :]).reshape(n, O * J)
    F = g.T @ g / n
    blocks = np.einsum("ojok->ojk", F.reshape(O, J, O, J))
    own, shared = np.zeros((O, J, O, J)), np.zeros((O, J, O, J))
    for o in range(O):
        own[o, :, o, :], shared[o, :, o, :] = blocks[o], np.mean(blocks, axis=0)
    approximations = {
        "diagonal": np.diag(np.diag(F)),
        "MBF, a block per neuron": own.reshape(F.shape),
        "MBF, one block (averaged)": shared.reshape(F.shape),
        "KFAC": np.kron(signals.T @ signals / n, inputs.T @ inputs / n),
    }
    return {name: float(np.linalg.norm(F - each) / np.linalg.norm(F)) for name, each in approximations.items()}


def fisher(seed: int, tick: Tick, steps: int = 200, hidden: tuple[int, ...] = (16, 16), rounds: int = 20) -> Numbers:
    """Return `errors` of each layer at three times of a training, and whether the theorem of convergence held."""
    problem: Any = problems.load("digits-mlp", dtype="float64", seed=seed, hidden=hidden)
    found: Numbers = {"steps": [0, steps // 2, steps], "errors": []}
    for step in descend(problem, Entry(Adam()), 0.01, steps):
        if step.number not in found["steps"]:
            continue
        values = problem.activations(step.params, problem.train[0])
        delta = len(values[0]) * problem._head(values[-1], problem.train)[1]
        pairs = zip(LAYERS, values, problem.signals(step.params, values, delta), strict=False)
        found["errors"].append({n: errors(np.pad(a, ((0, 0), (0, 1)), constant_values=1.0), d) for n, a, d in pairs})
        tick(len(found["errors"]) / 4)
    net = online.two_layer(200, 3, 5, seed, 1e-2)
    run = theory.mbf.record_network(net, 1.0 / 200, 0.5 / 200, rounds)
    check = theory.mbf.two_layer(run, net)
    found["convergence"] = {"factor": check.left, "bound": check.right, "applies": check.applies, "holds": check.holds}
    return found


@claim("M5")
def between(runs: list[Numbers]) -> Verdict:
    """It lies between diagonal and layer-wise methods.

    Holds here if: error of the layer's Fisher matrix: diagonal above MBF's blocks above KFAC, in every layer.
    """
    text: list[str] = []
    good: dict[str, bool] = {}
    for layer in LAYERS:
        means = {
            name: [float(np.mean([each[layer][name] for each in run["errors"]])) for run in runs]
            for name in runs[0]["errors"][0][layer]
        }
        d, own, _, kfac = (float(np.median(each)) for each in means.values())
        good |= {f"diagonal above MBF in {layer}": d > own, f"MBF above KFAC in {layer}": own > kfac}
        text.append(f"{layer}: {', '.join(f'{name} {spread(each, 2)}' for name, each in means.items())}")
    return decided(good, f"Relative error, mean over three times; {'; '.join(text)}")


@claim("M4")
def converges(runs: list[Numbers]) -> Verdict:
    """It converges linearly.

    Holds here if: the residual of a wide two-layer network shrinks at least as proved (`theory.mbf.two_layer`).
    """
    found = column(runs, "convergence")
    good = all(each["holds"] and each["applies"] for each in found)
    factor, bound = (spread([1 - each[key] for each in found], 2) for key in ("factor", "bound"))
    return decided({"all": good}, f"1 - |r_k+1| / |r_k| in the worst round {factor}, proved at least {bound}")


def fisher_figure(runs: list[Numbers]) -> Figure:
    """Draw the errors by time."""
    figure, axes = panels(3, 4.0)
    for panel, layer in zip(axes, LAYERS, strict=True):
        names = runs[0]["errors"][0][layer]
        curves = {name: [[each[layer][name] for each in run["errors"]] for run in runs] for name in names}
        text, legend = f"error of the layer's Fisher matrix, {layer}", 8 * (layer == LAYERS[0])
        lines(panel, runs[0]["steps"], curves, text, legend, xlabel="steps", ylim=(0, None))
    return figure


# ---- the autoencoder ------------------------------------------------------------------------------------------------

TRAINED = {
    MOMENTUM: Entry(SGD(momentum=0.9)), "Adam": Entry(Adam()), "MBF": Entry(MBF.authors_code()),
    "Shampoo, every 5": Entry(Shampoo(every=5)), "KFAC": Entry(KFAC()),
}  # fmt: skip


def images(seed: int, hidden: tuple[int, ...] = (100, 30, 100), batch: int = 100) -> Vision:
    """Return the autoencoder of a seed."""
    return Vision("mnist-autoencoder", seed, batch_size=batch, options={"hidden": hidden}, points=15)


@claim("M2")
def first_of_all(runs: list[Numbers]) -> Verdict:
    """It is faster in epochs and in time on autoencoders.

    Holds here if: smallest validation loss after the last step, and least processor time to the last loss of SGD with
    momentum, of four methods without KFAC.
    """
    return faster(runs, MOMENTUM, "Adam", "Shampoo, every 5")


@claim("M6")
def faster_than_kfac(runs: list[Numbers]) -> Verdict:
    """It is faster than KFAC.

    Holds here if: M2 with KFAC in the place of the other methods.
    """
    return faster(runs, "KFAC")


def faster(runs: list[Numbers], *others: str) -> Verdict:
    """Return whether MBF ends lower than the others, and is sooner at SGD's last loss, in processor time."""
    gaps = {name: paired(column(runs, "MBF", "validation"), column(runs, name, "validation")) for name in others}
    times = {name: [training.reached(run, name, MOMENTUM)[1] for run in runs] for name in ("MBF", *others)}
    epochs = all(gap.below for gap in gaps.values())
    fastest = all(np.median(times["MBF"]) < np.median(times[name]) for name in others)
    text = (
        f"MBF's validation loss {spread(column(runs, 'MBF', 'validation'), 4)}, minus "
        + ", ".join(
            f"{name}'s ({spread(column(runs, name, 'validation'), 4)})" if math.isinf(gap.mean) else f"{name}'s {gap}"
            for name, gap in gaps.items()
        )
        + "; processor seconds to SGD's last loss "
        + ", ".join(f"{name} {spread(each)}" for name, each in times.items()).replace("inf", "not reached")
    )
    return decided({"epochs": epochs, "time": bool(fastest)}, text)


def autoencoder_table(runs: list[Numbers]) -> str:
    """Return loss and time."""

    columns = {
        **training.until(runs, MOMENTUM),
        "seconds in all": lambda name: spread(column(runs, name, "seconds")),
    }
    return training.table(runs, columns)


def autoencoder_figure(runs: list[Numbers]) -> Figure:
    """Draw the losses against steps and against seconds."""
    figure, (left, right, last) = panels(3, 4.4)
    training.descents(left, right, runs, list(TRAINED))
    training.scored(last, runs, list(TRAINED), "validation")
    title(left, "validation loss per image", xlabel="steps", yscale="log")
    title(right, "the same against processor time", xlabel="seconds", yscale="log")
    title(last, "last validation loss of each seed")
    left.legend(frameon=False, fontsize=8)
    return figure


EXPERIMENTS = (
    Experiment(
        name="step-cost", minutes=5, needs=("mnist",), claims=(slightly,),
        title="Autoencoders 784-w-w/2-w-784 on MNIST, batches of 500, processor time on one thread; MBF as in the "
              "authors' code (statistics every 2, inverses every 25 steps), after its first 26 steps.",
        one=cost, draw=cost_figure, small={"widths": (8,), "batch": 5, "first": 1, "steps": 2},
    ),
    Experiment(
        name="fisher", minutes=0.1, claims=(converges, between),
        title="The empirical Fisher matrix of each layer of digits-mlp with two hidden layers of 16, at three times of "
              "200 steps of Adam; and MBF with exact Jacobian blocks on wide two-layer networks.",
        one=fisher, draw=fisher_figure, small={"steps": 2, "hidden": (2, 2), "rounds": 2},
    ),
    Experiment(
        name="autoencoder", minutes=6.2, needs=("mnist",), claims=(first_of_all, faster_than_kfac),
        title="The autoencoder 784-100-30-100-784 on MNIST, 150 steps of 100 images, validation on 1600 images.",
        **comparison(images, TRAINED, 150, grid=(-20, -2)),  # MBF's rates are smaller
        table=autoencoder_table, draw=autoencoder_figure, small={"steps": 2, "hidden": (4,), "batch": 4},
    ),
)  # fmt: skip
