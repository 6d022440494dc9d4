"""Training of every method that fits on one problem, side by side: the job of ``precond-ref compare``.

    comparison = compare.prepare("digits-mlp", methods="ASGO,Adam", steps=100)
    comparison.train()
    best = comparison.ranked[0]

All methods start from the same parameters and see the same batches in the same order. `Adam` updates a parameter that
a method does not take, at the method's learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from precond_ref.compare.rates import parse_rates, planned, tune
from precond_ref.compare.runs import Run, Trainer, UsageError, choose, load_problem
from precond_ref.problems import Problem
from precond_ref.registry import parse_list

__all__ = ["Comparison", "Run", "UsageError", "prepare", "tune"]


@dataclass(kw_only=True)
class Comparison:
    """A problem and its runs, with their settings."""

    problem: Problem
    backend: str
    steps: int
    planned: list[Run]
    """Runs with their learning rates, in the order of training, before they are trained."""
    left_out: Mapping[str, str]
    """Reasons for which methods do not take part, by name."""
    finished: list[Run] = field(default_factory=list)
    """Finished runs, in the order of training."""

    def train(self, on_run: Callable[[Run], Any] | None = None, on_step: Callable[[float], Any] | None = None) -> None:
        """Train all methods; ``on_run`` is called before each run, ``on_step`` with each batch loss."""
        trainer = Trainer(self.problem, self.backend)
        for run in self.planned:
            if on_run is not None:
                on_run(run)
            self.finished.append(trainer.train(run, self.steps, on_step=on_step))

    @property
    def ranked(self) -> list[Run]:
        """Finished runs, the smallest final training loss first, diverged runs last."""
        return sorted(self.finished, key=lambda run: (run.diverged, 0.0 if run.diverged else run.final_loss))


def prepare(
    problem: str = "digits-mlp",
    *,
    methods: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    backend: str = "numpy",
    dtype: str = "float32",
    lr: Sequence[str] = (),
) -> Comparison:
    """Return a comparison that is ready to train; arguments as on the command line. UsageError if one is wrong."""
    try:
        names = None if methods is None else [named.text for named in parse_list(methods)]
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    loaded = load_problem(problem, backend, dtype, seed)
    steps = loaded.default_steps if steps is None else steps
    if steps < 1:
        raise UsageError(f"--steps must be at least 1, got {steps}")
    entrants, left_out = choose(loaded, names)
    if names is not None and left_out:
        refused = ", ".join(f"{name} {reason}" for name, reason in left_out.items())
        fitting = ", ".join(entrant.name for entrant in choose(loaded)[0])
        raise UsageError(f"on {problem}, {refused}; without --methods there run {fitting}")
    return Comparison(
        problem=loaded,
        backend=backend,
        steps=steps,
        planned=planned(problem, entrants, parse_rates(lr, entrants)),
        left_out=left_out,
    )
