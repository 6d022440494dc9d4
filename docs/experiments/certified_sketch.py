"""Escaped mass and losses of S-Shampoo with ``solver="nystrom"``, along training runs on digits and MNIST.

    python docs/experiments/certified_sketch.py       # some minutes

Both solvers sketch the gradients of one run, that of the exact solver; then each trains by itself.
"""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import common
import numpy as np

import precond_ref as pr
from precond_ref import problems
from precond_ref.numerics import nystrom, sketch
from precond_ref.numerics.template import arrays_of


class Setting(NamedTuple):
    """A problem, the sketch size, the learning rate, the steps, and decays to sketch with."""

    problem: str
    size: int
    lr: float
    steps: int
    beta2: tuple[float, ...]


SETTINGS = (
    Setting("digits-mlp", 8, 0.001, 280, (1.0, 0.999, 0.9)),
    Setting("mnist-mlp", 24, 0.001, 200, (0.999,)),
)
SEEDS = (0, 1, 2)
PASSES = (0, 1, 2)
EVERY = 5


def method(setting: Setting, solver: str) -> Any:
    """Return the deep-learning version; every axis keeps its own sketch."""
    return pr.SShampoo.practical(size=setting.size, merge=1, solver=solver)


class Pair:
    """The sketches of one side of one matrix, exact and certified, and the ratios of their masses."""

    def __init__(self, d: int, setting: Setting, beta2: float) -> None:
        self.size, self.beta2 = setting.size, beta2
        self.exact = arrays_of(sketch.empty(d, setting.size), np.zeros(1, "float32"), np)
        self.certified = {k: arrays_of(nystrom.empty(d, setting.size), np.zeros(1, "float32"), np) for k in PASSES}
        self.loss: dict[int, list[float]] = {k: [] for k in PASSES}
        self.known: list[float] = []
        self.kappa: list[float] = []

    def see(self, rows: np.ndarray, look: bool) -> None:
        """Sketch new rows."""
        self.exact = sketch.update(self.exact, rows, self.beta2)
        for k, old in self.certified.items():
            new = self.certified[k] = nystrom.update(old, rows, self.beta2, passes=k)
            if look:
                self.loss[k].append(float(new.escaped / self.exact.escaped))
        if look:
            new = self.certified[1]
            self.known.append(float(new.escaped / new.least))
            self.kappa.append(float(new.lost / (self.size * new.escaped)))


def train(setting: Setting, solver: str, seed: int, pairs: dict[str, Pair] | None = None) -> dict[str, float]:
    """Train, and return the losses on the whole training set and the test error; ``pairs`` sketch the gradients."""
    problem = problems.load(setting.problem, seed=seed)
    optimizer = pr.Optimizer(method(setting, solver), lr=setting.lr)
    params = problem.init()
    state = optimizer.init(params)
    for step in range(setting.steps):
        _, grads = problem.loss_and_grad(params, problem.batch(step))
        for name, pair in (pairs or {}).items():
            path, _, side = name.partition(" ")
            g = grads[path]
            pair.see(g.T if side == "left" else g, step % EVERY == EVERY - 1)
        params, state = optimizer.step(params, grads, state)
    return {"loss": float(problem.loss(params, problem.train)), "metric": float(problem.metric(params))}


def sides(setting: Setting) -> dict[str, int]:
    """Return the sketched sides, ``path left`` or ``path right``, that are not left to the SVD."""
    found = {}
    for path, value in problems.load(setting.problem).init().items():
        for side, d, q in (("left", *value.shape), ("right", *value.shape[::-1])) if value.ndim == 2 else ():
            if not nystrom.is_exact(setting.size, d, min(d, setting.size) + q):
                found[f"{path} {side}"] = d
    return found


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    figure, panels = common.axes(10, 3.8, len(SETTINGS))
    streams, results, data = [], [], {}
    with common.progress() as bar:
        task = bar.add_task("", total=sum(len(setting.beta2) + 2 * len(SEEDS) for setting in SETTINGS))
        for setting, panel in zip(SETTINGS, panels, strict=True):
            record: dict[str, Any] = {"size": setting.size, "lr": setting.lr, "sides": {}, "final": {}}
            for beta2 in setting.beta2:
                pairs = {name: Pair(d, setting, beta2) for name, d in sides(setting).items()}
                train(setting, "svd", 0, pairs)
                bar.advance(task)
                for i, (name, pair) in enumerate(pairs.items()):
                    last = {k: pair.loss[k][-1] for k in PASSES}
                    record["sides"][f"{name}, beta2 = {beta2}"] = {
                        "escaped over exact, by passes": last, "largest": max(pair.loss[1]),
                        "certificate": pair.known[-1], "kappa": min(pair.kappa),
                    }  # fmt: skip
                    streams.append(
                        (setting.problem, name, beta2, *(f"{last[k]:.3f}" for k in PASSES), f"{max(pair.loss[1]):.3f}",
                         f"{pair.known[-1]:.3f}", f"{min(pair.kappa):.2f}")
                    )  # fmt: skip
                    if beta2 == 0.999:
                        steps = EVERY * np.arange(1, len(pair.known) + 1)
                        panel.plot(steps, pair.loss[1], color=common.COLOURS[i], label=name)
                        panel.plot(steps, pair.known, color=common.COLOURS[i], linestyle=":", linewidth=1)
            for solver in ("svd", "nystrom"):
                runs = []
                for seed in SEEDS:
                    runs.append(train(setting, solver, seed))
                    bar.advance(task)
                record["final"][solver] = runs
                losses, metrics = ([run[key] for run in runs] for key in ("loss", "metric"))
                results.append(
                    (setting.problem, setting.size, f"`{solver}`", " ".join(f"{x:.5f}" for x in losses),
                     f"{statistics.mean(losses):.5f}", " ".join(f"{x:.4f}" for x in metrics))
                )  # fmt: skip
            data[setting.problem] = record
            panel.set(xlabel="steps", ylabel="escaped mass / that of the exact solver", ylim=(1.0, 1.1))
            panel.set_title(f"{setting.problem}, size {setting.size}, beta2 = 0.999", loc="left")
            panel.legend(fontsize=8)
    heads = (
        ("problem", "matrix and side", "beta2", "no pass", "1 pass", "2 passes", "1 pass, largest", "`certificate`",
         "`kappa`, smallest"),
        ("problem", "size", "solver", "training loss, seeds 0 to 2", "mean", "test accuracy"),
    )  # fmt: skip
    tables = common.table(heads[0], streams) + "\n" + common.table(heads[1], results)
    common.save(options.output, "certified_sketch", tables=tables, data=data, figure=figure)


if __name__ == "__main__":
    main()
