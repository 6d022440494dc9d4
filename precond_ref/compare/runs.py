"""Training runs: the choice of the methods of a comparison, and the measurements of each."""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from precond_ref import problems
from precond_ref.optimizer import Optimizer
from precond_ref.problems import Problem
from precond_ref.protocol import Method
from precond_ref.registry import arguments, constructors, parse, required

BACKENDS = {"numpy": "cli", "cupy": "cuda12", "torch": "torch", "jax": "jax"}
"""Array libraries by name, with the extra that installs each."""

SMALLEST_SHARE = 0.1
"""Least share of the entries of a method that takes part without being named: below it, the run is mostly Adam's."""

LARGEST_STATE = 100
"""Largest state, in numbers per entry, of a method that takes part without being named: larger ones take minutes."""

SKETCH_SIZE = 16
"""Value of a field ``size`` that has no default."""

CURVE_POINTS = 40
"""Approximate number of points of a curve, at which the losses of the whole training and test sets are computed."""


class UsageError(ValueError):
    """Raised for a request that cannot be met; the message is one line and says which requests can be met."""


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A method that takes part."""

    name: str
    """Name as in ``--methods``, in its normal spelling."""
    method: Method
    chosen: dict[str, Any]
    """Fields that the comparison sets, see `fields_for`."""
    to_adam: tuple[str, ...]
    """Paths of the parameters that the method does not take and `Adam` updates."""
    share: float
    """Share of the entries that are in parameters which the method takes."""
    state_bytes_per_parameter: float
    """Bytes of the arrays in the optimizer's state, per entry of the parameters."""
    join: tuple[tuple[str, str], ...] = ()
    """Weights and biases that the method takes as one parameter, for ``Optimizer(join=)``."""

    @property
    def plain(self) -> str:
        """The name without fields in brackets."""
        return self.name.partition("(")[0]


@dataclass(kw_only=True)
class Training:
    """The results of one training run; losses and metrics may be NaN or infinite."""

    entrant: Entrant
    lr: float
    lr_source: str
    """"given", "recorded", "default fields" (recorded for the default fields, of which some differ) or "fallback"."""
    seed: int = 0
    """Seed of the problem."""
    batch_losses: list[float] = field(default_factory=list)
    """Loss of each step's batch, before the step."""
    steps: list[int] = field(default_factory=list)
    """Steps done at the points of the two curves below."""
    train_losses: list[float] = field(default_factory=list)
    """Loss on the whole training set."""
    metrics: list[float] = field(default_factory=list)
    """The problem's metric."""
    step_ms: list[float] = field(default_factory=list)
    """Time of each step of the optimizer alone; the first step, which may compile, counts only if it is alone."""
    gradient_ms: list[float] = field(default_factory=list)
    """Time of each loss and gradient before these steps."""

    @property
    def final_loss(self) -> float:
        """Loss on the whole training set after the last step."""
        return self.train_losses[-1]

    @property
    def final_metric(self) -> float:
        """The problem's metric after the last step."""
        return self.metrics[-1]

    @property
    def diverged(self) -> bool:
        """True if a loss was not finite; the run ended there."""
        return not (math.isfinite(self.final_loss) and all(map(math.isfinite, self.batch_losses)))

    @property
    def median_ms(self) -> float:
        """Median time of the optimizer's step, without loss and gradient."""
        return statistics.median(self.step_ms)

    def steps_to(self, target: float) -> float:
        """Return the first recorded number of steps with a training loss of at most ``target``; infinite without."""
        reached = (step for step, loss in zip(self.steps, self.train_losses, strict=True) if loss <= target)
        return next(reached, math.inf)

    def seconds_to(self, target: float) -> float:
        """Return the time of `steps_to` as its number times the medians of the times of step and gradient."""
        return self.steps_to(target) * 1e-3 * (self.median_ms + statistics.median(self.gradient_ms or [0.0]))


@dataclass(frozen=True, kw_only=True)
class Result:
    """The runs of one method, one for each seed. Each number is the median over the seeds."""

    runs: list[Training]

    @property
    def entrant(self) -> Entrant:
        """The method."""
        return self.runs[0].entrant

    @property
    def lr(self) -> float:
        """The learning rate, the same for all seeds."""
        return self.runs[0].lr

    @property
    def lr_source(self) -> str:
        """See `Training.lr_source`."""
        return self.runs[0].lr_source

    @property
    def diverged(self) -> bool:
        """True if any of the runs diverged."""
        return any(run.diverged for run in self.runs)

    @property
    def final_loss(self) -> float:
        """Loss on the whole training set after the last step."""
        return statistics.median(run.final_loss for run in self.runs)

    @property
    def final_metric(self) -> float:
        """The problem's metric after the last step."""
        return statistics.median(run.final_metric for run in self.runs)

    @property
    def median_ms(self) -> float:
        """Time of the optimizer's step, without loss and gradient."""
        return statistics.median(run.median_ms for run in self.runs)

    def steps_to(self, target: float) -> float:
        """Return the number of steps to a training loss of ``target``; infinite if half of the runs do not reach it."""
        return statistics.median_high(run.steps_to(target) for run in self.runs)

    def seconds_to(self, target: float) -> float:
        """Return the time of gradients and steps to ``target``, like `steps_to`."""
        return statistics.median_high(run.seconds_to(target) for run in self.runs)

    @property
    def steps(self) -> list[int]:
        """Steps done at the points of the curves; if a run ended early, those that all runs have."""
        return min((run.steps for run in self.runs), key=len)

    def curve(self, name: str) -> list[tuple[float, float, float]]:
        """Return (least, median, largest) over the seeds at `steps`; ``name`` is "train_losses" or "metrics"."""
        points = zip(*(getattr(run, name)[: len(self.steps)] for run in self.runs), strict=True)
        return [(min(each), statistics.median(each), max(each)) for each in points]

    @property
    def train_losses(self) -> list[float]:
        """Loss on the whole training set, at `steps`."""
        return [median for _, median, _ in self.curve("train_losses")]

    @property
    def metrics(self) -> list[float]:
        """The problem's metric, at `steps`."""
        return [median for _, median, _ in self.curve("metrics")]


# ---- who takes part -------------------------------------------------------------------------------------------------


def fields_for(make: Callable[..., Method], samples: int | None) -> dict[str, Any]:
    """Return the fields with which a comparison calls ``make``: a ``size`` without a default, and the ``batch_size``.

    The batch size belongs to the problem: it is the number of samples whose mean is the loss.
    """
    chosen: dict[str, Any] = {"size": SKETCH_SIZE} if "size" in required(make) else {}
    if samples is not None and "batch_size" in arguments(make):
        chosen["batch_size"] = float(samples)
    return chosen


def choose(problem: Problem, names: Sequence[str] | None = None) -> tuple[list[Entrant], dict[str, str]]:
    """Return the methods that take part in ``problem``, and by name the reasons for which the others do not.

    With ``names`` only these are considered. A method must take at least one of the parameters. Without ``names`` it
    must also keep to `SMALLEST_SHARE` and `LARGEST_STATE`.
    """
    params = problem.init()
    sizes = {path: math.prod(array.shape) for path, array in params.items()}
    total = sum(sizes.values())
    samples = problem.batch_size or (problem.train[0].shape[0] if problem.train else None)
    entrants, left_out = [], {}
    for name in dict.fromkeys(constructors() if names is None else names):
        _, make, given = parse(name)
        chosen = {field: value for field, value in fields_for(make, samples).items() if field not in given}
        missing = [field for field in required(make) if field not in {**chosen, **given}]
        if missing:
            left_out[name] = f"has no default for {', '.join(missing)}"
            continue
        try:
            method = make(**chosen, **given)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{name}: {error}") from error
        join = biases(params) if method.joins_bias else ()
        to_adam = tuple(path for path, array in params.items() if method.for_shape(tuple(array.shape), path) is None)
        share = 1.0 - sum(sizes[path] for path in to_adam) / total
        try:
            state = array_bytes(Optimizer(method, join=join).init(params))
        except (ValueError, TypeError, AttributeError) as error:
            if ":" not in name:
                raise
            raise UsageError(f"{name}: {error}") from error
        relative = state / array_bytes(tuple(params.values()))
        if len(to_adam) == len(params):
            left_out[name] = "takes none of the parameters"
        elif names is None and share < SMALLEST_SHARE:
            left_out[name] = f"takes {share:.1%} of the entries, runs only if --methods names it"
        elif names is None and relative > LARGEST_STATE:
            left_out[name] = f"keeps {relative:.0f} numbers per entry, runs only if --methods names it"
        else:
            entrants.append(
                Entrant(
                    name=name,
                    method=method,
                    chosen=chosen,
                    to_adam=to_adam,
                    share=share,
                    state_bytes_per_parameter=state / total,
                    join=join,
                )
            )
    return entrants, left_out


def biases(params: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return the paths of the weights with two axes and of their biases."""
    pairs = ((path, f"{path.removesuffix('weight')}bias") for path, array in params.items() if array.ndim == 2)
    return tuple((weight, bias) for weight, bias in pairs if weight.endswith("/weight") and bias in params)


def array_bytes(tree: Any) -> int:
    """Return the bytes of all arrays in nested tuples."""
    if isinstance(tree, tuple):
        return sum(map(array_bytes, tree))
    return int(getattr(tree, "nbytes", 0))


# ---- training -------------------------------------------------------------------------------------------------------


def load_problem(name: str, backend: str, dtype: str, seed: int) -> Problem:
    """Return the problem with its arrays in the library ``backend``; UsageError if an argument cannot be met."""
    if backend not in BACKENDS:
        raise UsageError(f"no backend is called {backend}; there are {', '.join(BACKENDS)}")
    try:
        library = importlib.import_module("jax.numpy" if backend == "jax" else backend)
    except ImportError as error:
        raise UsageError(
            f'the backend {backend} is not installed: pip install "precond-ref[{BACKENDS[backend]}]"'
        ) from error
    if backend == "cupy" and not library.is_available():
        raise UsageError("the backend cupy finds no GPU")
    if backend == "jax" and dtype == "float64":
        importlib.import_module("jax").config.update("jax_enable_x64", True)
    try:
        return problems.load(name, xp=library, dtype=dtype, seed=seed)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error


class Trainer:
    """A problem with its functions, which are compiled if the library is JAX."""

    def __init__(self, problem: Problem, backend: str) -> None:
        self.problem = problem
        self._compile: Callable[[Any], Any] = lambda function: function
        self._wait: Callable[[Any], Any] = lambda arrays: arrays
        if backend == "jax":
            jax = importlib.import_module("jax")
            self._compile, self._wait = jax.jit, jax.block_until_ready
        elif backend == "cupy":
            stream = importlib.import_module("cupy").cuda.get_current_stream()
            self._wait = lambda arrays: stream.synchronize()
        self._loss_and_grad = self._compile(problem.loss_and_grad)
        self._loss = self._compile(problem.loss)
        self._metric = self._compile(problem.metric)

    def train(
        self, run: Training, steps: int, *, curves: bool = True, on_step: Callable[[float], Any] | None = None
    ) -> Training:
        """Train ``steps`` steps, or up to the first loss that is not finite, and fill ``run``.

        ``curves=False`` leaves out the whole training and test sets; ``on_step`` is called with each batch loss.
        """
        import numpy as np

        optimizer = Optimizer(run.entrant.method, lr=run.lr, join=run.entrant.join)
        update = self._compile(optimizer.step)
        params = self.problem.init()
        state = optimizer.init(params)
        every = max(1, steps // CURVE_POINTS)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # a diverged run says so itself
            if curves:
                self._look(run, params)
            for step in range(steps):
                begin = time.perf_counter()
                loss, grads = self._loss_and_grad(params, self.problem.batch(step))
                run.batch_losses.append(float(loss))
                self._wait(grads)
                run.gradient_ms.append(1e3 * (time.perf_counter() - begin))
                if on_step is not None:
                    on_step(run.batch_losses[-1])
                if not math.isfinite(run.batch_losses[-1]):
                    break
                start = time.perf_counter()
                params, state = update(params, grads, state)
                self._wait(params)
                run.step_ms.append(1e3 * (time.perf_counter() - start))
                if curves and (step + 1) % every == 0:
                    self._look(run, params)
            if curves and run.steps[-1] != len(run.step_ms):
                self._look(run, params)
        del run.step_ms[: len(run.step_ms) > 1]
        del run.gradient_ms[: len(run.gradient_ms) > 1]
        return run

    def _look(self, run: Training, params: Any) -> None:
        run.steps.append(len(run.step_ms))
        run.train_losses.append(float(self._loss(params, self.problem.train or None)))
        run.metrics.append(float(self._metric(params)))
