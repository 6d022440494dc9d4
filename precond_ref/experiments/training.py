"""Training for the experiments: tasks, one search of the learning rate for all methods, runs from the same seeds.

A task has ``init()``, ``batch(step)`` and ``loss_and_grad(params, batch)`` as `Problem` has, ``validation(params)``,
the loss on data that no step sees, and ``scores(params)``. `Language` is a small transformer on tinyshakespeare, whose
gradients PyTorch computes; `Vision` a problem of `precond_ref.problems` whose training set has lost a fifth for
validation; `Recommender` a factorization machine on a9a.

The search is the same for every method of an experiment: the half decades of the learning rate from 1e-3 to 0.3 from
the seeds of `precond_ref.compare.rates.SEEDS`, more if the best is at an end, then the two quarter decades beside the
best. The best rate has the smallest mean validation loss after the last step. A run stops when its loss has doubled.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from precond_ref import problems
from precond_ref.compare.rates import SEEDS
from precond_ref.experiments.base import Tick
from precond_ref.experiments.figures import dots, line
from precond_ref.experiments.kfac import KFAC, factors
from precond_ref.experiments.numbers import Array, Numbers, column, markdown, np, spread
from precond_ref.methods.baselines import Adam
from precond_ref.optimizer import Optimizer
from precond_ref.problems import online
from precond_ref.protocol import Method

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Params = dict[str, Array]


class Step(NamedTuple):
    """What a training run has before its step is made."""

    number: int
    loss: float
    params: Params
    grads: Params
    state: Any


class Entry(NamedTuple):
    """A method of a comparison."""

    method: Method
    weight_decay: float = 0.0


def descend(task: Any, entry: Entry, lr: float, steps: int) -> Iterator[Step]:
    """Train and yield each step before it is made, and the end; a diverged run ends with a loss that is not finite."""
    join = tuple(pair for pair in getattr(task, "join", ()) if entry.method.joins_bias)
    first = task.init()
    own = [name for name in first if name in getattr(task, "own", first)]
    main = Optimizer(entry.method, lr=lr, weight_decay=entry.weight_decay, join=join)
    rest = Optimizer(Adam(), lr=getattr(task, "rest_lr", 1e-3))
    mine, others = {k: first[k] for k in own}, {k: v for k, v in first.items() if k not in own}
    state, other_state = main.init(mine), rest.init(others)
    start = math.inf
    for number in range(steps + 1):
        params = {name: (mine if name in mine else others)[name] for name in first}
        loss, grads = task.loss_and_grad(params, task.batch(number))
        loss, start = float(loss), min(start, float(loss)) if number == 0 else start
        if not loss < 2 * start + 1:
            loss = math.nan
        yield Step(number, loss, params, grads, state)
        if number == steps or math.isnan(loss):
            return
        given = None
        if isinstance(entry.method, KFAC) and number % entry.method.statistics_every == 0:
            given = factors(task.problem, params, task.batch(number)[0], np.random.default_rng([task.seed, 5, number]))
        with np.errstate(all="ignore"):
            mine, state = main.step(mine, {k: grads[k] for k in mine}, state, statistics=given)
            others, other_state = rest.step(others, {k: grads[k] for k in others}, other_state)


def finish(task: Any, entry: Entry, lr: float, steps: int) -> Numbers:
    """Return the scores after the last step, the validation losses along the run, and its processor time.

    Of a task with ``curves`` also the mean losses of the batches since the point before ("training"), and with a
    ``test`` its value at each point ("testing").
    """
    curve: list[tuple[int, float]] = []
    more: dict[str, list[tuple[int, float]]] = {"training": [], "testing": []} if getattr(task, "curves", 0) else {}
    batches: list[float] = []
    every, seconds, start = max(1, steps // getattr(task, "points", 1)), 0.0, time.process_time()
    for step in descend(task, entry, lr, steps):
        seconds += time.process_time() - start  # of gradients and steps alone
        if math.isnan(step.loss):
            return {"validation": None, "test": None, "train": None, "curve": curve, "seconds": seconds, **more}
        batches.append(step.loss)
        if step.number % every == 0:
            curve.append((step.number, task.validation(step.params)))
            if more:
                more["training"].append((step.number, sum(batches) / len(batches)))
                if hasattr(task, "test"):
                    more["testing"].append((step.number, task.test(step.params)))
            batches.clear()
        start = time.process_time()
    return {"validation": curve[-1][1], **task.scores(step.params), "curve": curve, "seconds": seconds, **more}


def reached(run: Numbers, name: str, first: str) -> tuple[float, float]:
    """Return steps and seconds of a method to the last validation loss of ``first``, infinite if it is not reached."""
    target, curve = run[first]["validation"], run[name]["curve"]
    step = next((step for step, loss in curve if loss <= target), math.inf)
    if run[name]["validation"] is None:
        return math.inf, math.inf
    return step, step / curve[-1][0] * run[name]["seconds"]


def until(runs: list[Numbers], first: str) -> dict[str, Callable[[str], str]]:
    """Return the columns of `reached`, for `table`."""

    def column(i: int) -> Callable[[str], str]:
        return lambda name: spread([reached(run, name, first)[i] for run in runs]).replace("inf", "not reached")

    return {f"steps to the last loss of {first}": column(0), "seconds to it": column(1)}


def search(
    tasks: list[Any],
    entries: dict[str, Entry],
    steps: int,
    tick: Tick,
    grid: tuple[int, int] = (-12, -2),
    most: int = 4,
) -> Numbers:
    """Return for each method its best rate, and every rate tried with its mean validation loss over the ``tasks``.

    Rates are 10^(k / 4); ``grid`` has the first and the last k, every second is tried; it goes on by ``most`` at most.
    """
    found: Numbers = {}
    for i, (name, entry) in enumerate(entries.items()):
        tried: dict[int, float] = {}

        def loss(k: int, entry: Entry = entry, tried: dict[int, float] = tried) -> float:
            if k not in tried:
                ends = [deque(descend(task, entry, 10 ** (k / 4), steps), maxlen=1)[0] for task in tasks]
                losses = [
                    math.inf if math.isnan(end.loss) else task.validation(end.params)
                    for task, end in zip(tasks, ends, strict=True)
                ]
                tried[k] = sum(losses) / len(losses)
            return tried[k]

        for k in range(grid[0], grid[1] + 1, 2):
            loss(k)
            tick((i + len(tried) / (len(range(*grid, 2)) + 4)) / len(entries))
        for _ in range(most):
            best = min(tried, key=lambda k: tried[k])
            if best not in (min(tried), max(tried)) or not math.isfinite(tried[best]):
                break
            loss(best + (2 if best == max(tried) else -2))
        for k in (best - 1, best + 1):
            loss(k)
        best = min(tried, key=lambda k: tried[k])
        found[name] = {"lr": 10 ** (best / 4), "tried": [[10 ** (k / 4), tried[k]] for k in sorted(tried)]}
        tick((i + 1) / len(entries))
    return found


def compare(task: Any, entries: dict[str, Entry], steps: int, found: Numbers, tick: Tick) -> Numbers:
    """Return the results of each method on the task, at the rates found."""
    result = {}
    for i, (name, entry) in enumerate(entries.items()):
        result[name] = finish(task, entry, found[name]["lr"], steps)
        tick((i + 1) / len(entries))
    return result


def comparison(make: Callable[..., Any], entries: dict[str, Entry], length: int, **how: Any) -> dict[str, Any]:
    """Return search and run of an experiment that compares methods on the tasks ``make(seed, **options)``."""

    def rates(tick: Tick, steps: int = length, **options: Any) -> Numbers:
        return search([make(seed, **options) for seed in SEEDS], entries, steps, tick, **how)

    def one(seed: int, tick: Tick, found: Numbers, steps: int = length, **options: Any) -> Numbers:
        return compare(make(seed, **options), entries, steps, found, tick)

    return {"search": rates, "one": one}


# ---- tasks ----------------------------------------------------------------------------------------------------------


class Language:
    """A character-level transformer on tinyshakespeare: two layers, GELU, learnt positions, no biases in linear maps.

    ``own`` are the matrices of its layers, which a method gets; embeddings, head and norms always get Adam. The last
    tenth of the text is for validation, of which ``validation`` takes 64 windows spread evenly.
    """

    rest_lr, points, curves = 10**-2.5, 10, True

    def __init__(self, seed: int, width: int = 32, context: int = 32, batch: int = 16, layers: int = 2) -> None:
        import torch

        self.torch, self.seed, self.context, self.size, self.layers = torch, seed, context, batch, layers
        alphabet, numbers = np.unique(
            np.frombuffer(problems.load_text("tinyshakespeare").encode("utf-32-le"), "<u4"), return_inverse=True
        )
        cut = len(numbers) * 9 // 10
        self.text, held = numbers[:cut], numbers[cut:]
        places = np.linspace(0, len(held) - context - 1, 64).astype(int)
        self.held_out = held[places[:, None] + np.arange(context + 1)]
        shapes = {"token": (len(alphabet), width), "position": (context, width), "head": (len(alphabet), width)}
        for i in range(layers):
            shapes |= {f"{i}/{name}": (width, width) for name in ("query", "key", "value", "out")}
            shapes |= {f"{i}/up": (4 * width, width), f"{i}/down": (width, 4 * width)}
        rng = np.random.default_rng([seed, 0])
        scale = {"token": 0.1, "position": 0.1}
        self.first = {k: scale.get(k, s[1] ** -0.5) * rng.standard_normal(s) for k, s in shapes.items()}
        self.own = tuple(name for name in shapes if "/" in name)
        norms = [f"norm{i}{part}" for i in range(layers) for part in "ab"] + ["norm"]
        self.first |= {name: np.ones(width) for name in norms}

    def init(self) -> Params:
        """Return the first weights in float32."""
        return {name: value.astype("float32") for name, value in self.first.items()}

    def batch(self, step: int) -> Array:
        """Return (batch, context + 1) characters from random places of the text."""
        rng = np.random.default_rng([self.seed, 1, step])
        starts = rng.integers(len(self.text) - self.context, size=(self.size, 1))
        return self.text[starts + np.arange(self.context + 1)]

    def _loss(self, p: dict[str, Any], tokens: Array) -> Any:
        functional, tokens = self.torch.nn.functional, self.torch.from_numpy(tokens)
        x = p["token"][tokens[:, :-1]] + p["position"]
        width = x.shape[-1]

        def norm(y: Any, name: str) -> Any:
            return functional.layer_norm(y, (width,)) * p[name]

        for i in range(self.layers):
            y = norm(x, f"norm{i}a")
            q, k, v = ((y @ p[f"{i}/{n}"].T).unflatten(-1, (4, -1)).transpose(1, 2) for n in ("query", "key", "value"))
            seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
            x = x + seen @ p[f"{i}/out"].T
            x = x + functional.gelu(norm(x, f"norm{i}b") @ p[f"{i}/up"].T) @ p[f"{i}/down"].T
        logits = norm(x, "norm") @ p["head"].T
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def loss_and_grad(self, params: Params, batch: Array) -> tuple[float, Params]:
        """Return the mean loss in nats per character and its gradient."""
        leaves = {name: self.torch.from_numpy(value).requires_grad_() for name, value in params.items()}
        loss = self._loss(leaves, batch)
        grads = self.torch.autograd.grad(loss, list(leaves.values()))
        return loss.item(), {name: grad.numpy() for name, grad in zip(leaves, grads, strict=True)}

    def validation(self, params: Params) -> float:
        """Return the loss on the windows held out."""
        with self.torch.no_grad():
            return self._loss({k: self.torch.from_numpy(v) for k, v in params.items()}, self.held_out).item()

    def scores(self, params: Params) -> Numbers:
        """Return nothing beyond the validation loss."""
        return {}


@dataclass
class Vision:
    """A problem of `precond_ref.problems`; the last fifth of its training set is for validation.

    ``images`` is the number of images kept for training (None: all), ``options`` are the problem's.
    """

    name: str
    seed: int
    images: int | None = None
    batch_size: int = 100
    options: Mapping[str, Any] = field(default_factory=dict)
    points: int = 1
    curves: bool = False

    def __post_init__(self) -> None:
        whole = problems.load(self.name, seed=self.seed, batch_size=self.batch_size, **self.options)
        count = len(whole.train[0])
        cut, keep = count * 4 // 5, min(self.images or count, count * 4 // 5)
        train = tuple(array[:keep] for array in whole.train)
        self.problem, self.held_out = replace(whole, train=train), tuple(array[cut:] for array in whole.train)
        self.init, self.batch, self.loss_and_grad = whole.init, self.problem.batch, self.problem.loss_and_grad
        pairs = [(name, name.replace("weight", "bias")) for name in whole.initial if name.endswith("weight")]
        self.join = tuple(pair for pair in pairs if whole.initial[pair[0]].ndim == 2)

    def validation(self, params: Params) -> float:
        """Return the loss on the fifth held out."""
        return float(self.problem.loss(params, self.held_out))

    def test(self, params: Params) -> float:
        """Return the metric on the test set, an accuracy in percent."""
        return (100.0 if self.problem.higher_is_better else 1.0) * float(self.problem.metric(params))

    def scores(self, params: Params) -> Numbers:
        """Return the loss on the training set, and `test`."""
        return {"train": float(self.problem.loss(params)), "test": self.test(params)}


class Recommender:
    """A factorization machine of rank 8 with the logistic loss on a9a: w0 + w x + sum_f ((V x)_f^2 - V_f^2 x^2) / 2.

    4000 rows of a random order are for validation and 8000 for the test.
    """

    def __init__(self, seed: int, rank: int = 8, size: int = 1000) -> None:
        features, signs = online.libsvm("a9a")
        order = np.random.default_rng([seed, 3]).permutation(len(signs))
        self.x, self.y, self.seed, self.size = features[order].astype("float32"), signs[order], seed, size
        rng = np.random.default_rng([seed, 0])
        self.first = {"w": np.zeros(features.shape[1]), "v": 0.05 * rng.standard_normal((rank, features.shape[1]))}

    def init(self) -> Params:
        """Return the first weights in float32."""
        return {name: value.astype("float32") for name, value in self.first.items()}

    def batch(self, step: int) -> Array:
        """Return the rows of a batch."""
        return 12000 + np.random.default_rng([self.seed, 1, step]).integers(len(self.y) - 12000, size=self.size)

    def _logits(self, params: Params, x: Array) -> tuple[Array, Array]:
        inner = x @ params["v"].T
        return x @ params["w"] + 0.5 * (np.sum(inner**2, axis=1) - x**2 @ np.sum(params["v"] ** 2, axis=0)), inner

    def loss_and_grad(self, params: Params, batch: Array) -> tuple[float, Params]:
        """Return the mean log-loss and its gradient."""
        x, y = self.x[batch], self.y[batch]
        logits, inner = self._logits(params, x)
        slope = (-y * np.exp(-np.logaddexp(0.0, y * logits)) / len(y)).astype("float32")
        v = (slope[:, None] * inner).T @ x - params["v"] * (slope @ x**2)
        return float(np.mean(np.logaddexp(0.0, -y * logits))), {"w": slope @ x, "v": v}

    def _log_loss(self, params: Params, rows: slice) -> float:
        return float(np.mean(np.logaddexp(0.0, -self.y[rows] * self._logits(params, self.x[rows])[0])))

    def validation(self, params: Params) -> float:
        """Return the log-loss of the rows held out."""
        return self._log_loss(params, slice(4000))

    def scores(self, params: Params) -> Numbers:
        """Return the log-loss of the test rows."""
        return {"test": self._log_loss(params, slice(4000, 12000))}


# ---- results --------------------------------------------------------------------------------------------------------


def ranked(runs: list[Numbers]) -> list[str]:
    """Return the methods of a comparison, the smallest mean validation loss first."""

    def mean(name: str) -> float:
        found = column(runs, name, "validation")
        return math.inf if None in found else sum(found) / len(found)

    return sorted(runs[0], key=mean)


def table(runs: list[Numbers], columns: Mapping[str, Callable[[str], Any]], unit: str = "") -> str:
    """Return a Markdown table of the methods, the best first: validation loss, and each column's cells."""
    rows = [
        (name, spread(column(runs, name, "validation"), 4), *(cell(name) for cell in columns.values()))
        for name in ranked(runs)
    ]
    return markdown(("method", f"validation loss{unit}", *columns), rows)


def descents(
    steps: Axes, seconds: Axes | None, runs: list[Numbers], names: list[str], first: int = 0, key: str = "curve"
) -> None:
    """Draw curves of `finish` from the point ``first`` on, against steps and, perhaps, against processor time.

    After a run has diverged, its loss counts as infinite. Methods whose runs all end before the second point are left
    out.
    """
    for rank, name in enumerate(names):
        curves = [curve[first:] for curve in column(runs, name, key)]
        x = np.array([step for step, _ in max(curves, key=len)])
        if len(x) < 2:
            continue
        losses = [[loss for _, loss in curve] + [math.inf] * (len(x) - len(curve)) for curve in curves]
        for axes, unit in ((steps, 1.0), (seconds, float(np.median(column(runs, name, "seconds"))) / x[-1])):
            if axes is not None:
                line(axes, unit * x, losses, name, rank)


def scored(axes: Axes, runs: list[Numbers], names: list[str], score: str, best: str | None = None) -> None:
    """Draw `dots` of the methods' last scores, and beside the name how many runs diverged."""
    values = [column(runs, name, score) for name in names]
    lost = [f" ({each.count(None)} diverged)" if None in each else "" for each in values]
    labels = [name + word for name, word in zip(names, lost, strict=True)]
    dots(axes, labels, values, None if best is None else names.index(best))
