"""Training of every method that fits on one problem, side by side: the job of ``precond-ref compare``.

    comparison = compare.prepare("digits-mlp", methods="ASGO,Adam", steps=100)
    comparison.train()
    best = comparison.ranked[0]

All methods start from the same parameters and see the same batches in the same order. `Adam` updates a parameter that
a method does not take, at the method's learning rate. With several seeds each method trains once from each, and what
is reported is the median over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from precond_ref.compare.rates import parse_rates, planned, tune
from precond_ref.compare.runs import Result, Trainer, Training, UsageError, choose, load_problem
from precond_ref.problems import Problem
from precond_ref.registry import parse_list

__all__ = ["Comparison", "Result", "Training", "UsageError", "prepare", "tune"]

YARDSTICK = "Adam"
"""Method whose final loss is the target of the others, if no target is given and it takes part."""


@dataclass(kw_only=True)
class Comparison:
    """A problem and its runs, with their settings."""

    problems: list[Problem]
    """The problem, once for each seed."""
    backend: str
    steps: int
    planned: list[Training]
    """Runs with their seeds and learning rates, in the order of training, before they are trained."""
    left_out: Mapping[str, str]
    """Reasons for which methods do not take part, by name."""
    finished: list[Training] = field(default_factory=list)
    """Finished runs, in the order of training."""
    given_target: float | None = None
    """Loss on the training set to which steps and time are counted; None: chosen, see `target`."""

    @property
    def problem(self) -> Problem:
        """The problem of the first seed."""
        return self.problems[0]

    @property
    def seeds(self) -> list[int]:
        """The seeds, in the order of training."""
        return [problem.seed for problem in self.problems]

    def train(
        self, on_run: Callable[[Training], Any] | None = None, on_step: Callable[[float], Any] | None = None
    ) -> None:
        """Train all methods; ``on_run`` is called before each run, ``on_step`` with each batch loss."""
        trainers = {problem.seed: Trainer(problem, self.backend) for problem in self.problems}
        for run in self.planned:
            if on_run is not None:
                on_run(run)
            self.finished.append(trainers[run.seed].train(run, self.steps, on_step=on_step))

    @property
    def results(self) -> list[Result]:
        """The finished runs of each method together, in the order of training."""
        runs: dict[str, list[Training]] = {}
        for run in self.finished:
            runs.setdefault(run.entrant.name, []).append(run)
        return [Result(runs=each) for each in runs.values()]

    @property
    def ranked(self) -> list[Result]:
        """The results, the smallest median of the final training losses first; then those with a diverged run."""
        return sorted(self.results, key=lambda each: (each.diverged, 0.0 if each.diverged else each.final_loss))

    @property
    def target(self) -> tuple[float, str] | None:
        """The loss to which steps and time are counted, and its origin; None if every method diverged.

        It is the one given, or the final loss of `YARDSTICK`, or of the method in the middle of the ranking.
        """
        if self.given_target is not None:
            return self.given_target, "given"
        sound = [each for each in self.ranked if not each.diverged]
        if not sound:
            return None
        chosen = next((each for each in sound if each.entrant.name == YARDSTICK), sound[len(sound) // 2])
        return chosen.final_loss, f"final loss of {chosen.entrant.name}"


def prepare(
    problem: str = "digits-mlp",
    *,
    methods: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    seeds: int = 1,
    backend: str = "numpy",
    dtype: str = "float32",
    lr: Sequence[str] = (),
    target: float | None = None,
) -> Comparison:
    """Return a comparison that is ready to train; arguments as on the command line. UsageError if one is wrong."""
    if seeds < 1:
        raise UsageError(f"--seeds must be at least 1, got {seeds}")
    if target is not None and not math.isfinite(target):
        raise UsageError(f"--target must be finite, got {target}")
    try:
        names = None if methods is None else [named.text for named in parse_list(methods)]
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    several = [load_problem(problem, backend, dtype, each) for each in range(seed, seed + seeds)]
    loaded = several[0]
    steps = loaded.default_steps if steps is None else steps
    if steps < 1:
        raise UsageError(f"--steps must be at least 1, got {steps}")
    entrants, left_out = choose(loaded, names)
    if names is not None and left_out:
        refused = ", ".join(f"{name} {reason}" for name, reason in left_out.items())
        fitting = ", ".join(entrant.name for entrant in choose(loaded)[0])
        raise UsageError(f"on {problem}, {refused}; without --methods there run {fitting}")
    return Comparison(
        problems=several,
        backend=backend,
        steps=steps,
        planned=planned(problem, entrants, parse_rates(lr, entrants), range(seed, seed + seeds)),
        left_out=left_out,
        given_target=target,
    )
