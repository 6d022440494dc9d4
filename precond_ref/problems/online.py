r"""The problems of the theorems: adversaries, convex and smooth functions with a known minimum, online regression.

A `Stream` shows a method one loss per round::

    stream = online.adversary("polar", (4, 3), rounds=50, seed=1)
    stream = online.repeated(online.nonsmooth("nuclear", (4, 3), seed=1), start=np.zeros((4, 3)), rounds=50)
    stream = online.logistic("a9a")

Everything is float64 on NumPy, and depends only on the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from precond_ref.problems.base import check_int, check_real, generator, import_numpy
from precond_ref.problems.datasets import load_libsvm

Array = Any
Pairs = dict[str, tuple[Callable[..., Any], Callable[..., Any]]]

ADVERSARIES = {
    "random": "normal entries",
    "low rank": "a normal column times a normal row",
    "constant": "the same gradient always",
    "alternating": "the same gradient with alternating sign, and a little noise",
    "doubling switches": "the same gradient, its sign switched at rounds 1, 3, 7, 15, ..., and a little noise",
    "cyclic basis": "one entry at a time, in turn",
    "orthonormal": "a random element of one orthonormal basis",
    "growing": "normal entries times 1.3^t",
    "shrinking": "normal entries times 1.3^-t",
    "cauchy": "heavy tails, cut at 50",
    "quadratic": "the gradient of a quadratic with minimum at the target",
    "along": "towards larger distance: x - target, scaled to norm 1",
    "against": "the opposite of `along`, and a little noise",
    "sign": "signs of x - target",
    "polar": "polar factor of x - target: all singular values 1",
    "rank one": "first singular pair of x - target",
    "rows": "x - target with rows scaled to norm 1",
    "least preconditioned": "the direction in which the method's statistic is least",
    "most preconditioned": "the direction in which the method's statistic is largest",
}
"""Kinds of `adversary`, with the gradient of each round."""

NONSMOOTH = ("L1", "nuclear", "max")
SMOOTH = ("least squares", "log-cosh", "pseudo-Huber", "column blocks")
NONCONVEX = ("parabola", "cosine", "rational")
LINKS = ("linear", "absolute", "squared", "logistic")


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """Losses f_0, f_1, ... of one parameter, with a (sub)gradient each."""

    name: str
    rounds: int
    start: Array
    """x_0."""
    gradient: Callable[[int, Array, Array | None], Array]
    """``(t, x, statistic)`` to a subgradient of f_t at x; two adversaries read the method's statistic (d, d)."""
    loss: Callable[[int, Array], float] | None = None
    """``(t, x)`` to f_t(x); None: f_t is linear, <g_t, x>."""
    target: Array | None = None
    """A point of interest: the minimum, or the point to which an adversary relates x."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.start.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """A function with minimum 0 at ``minimizer``."""

    name: str
    value: Callable[[Array], Any]
    gradient: Callable[[Array], Array]
    minimizer: Array
    curvature: Any = None
    """L with ``f(Y) <= f(X) + <grad f(X), Y - X> + 1/2 ||Y - X||_L^2``, a number or (m, m); None if there is none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TwoLayer:
    """f(x) = m^(-1/2) sum_r a_r tanh(w_r x) on n unit vectors x, a_r = +-1 fixed: one block per hidden neuron."""

    inputs: Array
    """(n, d), rows of norm 1."""
    signs: Array
    """a, (m,)."""
    start: Array
    """w, (m, d)."""
    targets: Array
    """(n,)."""

    second_derivative = 4 / (3 * math.sqrt(3))
    """``sup |tanh''|``."""

    def residual(self, w: Array) -> Array:
        """Return the outputs minus the targets, (n,)."""
        np = import_numpy()
        return np.tanh(self.inputs @ w.T) @ self.signs / math.sqrt(len(self.signs)) - self.targets

    def jacobian(self, w: Array) -> Array:
        """Return the Jacobian of the outputs, by blocks: (n, m, d)."""
        np = import_numpy()
        slopes = (1 - np.tanh(self.inputs @ w.T) ** 2) * self.signs / math.sqrt(len(self.signs))
        return slopes[:, :, None] * self.inputs[:, None, :]


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearBlocks:
    """Outputs that are linear in the parameters: residual J w - y, with the blocks of `TwoLayer`."""

    blocks: Array
    """J, (n, B, s)."""
    start: Array
    """w, (B, s)."""
    targets: Array
    """(n,)."""

    def residual(self, w: Array) -> Array:
        """Return the residual, (n,)."""
        np = import_numpy()
        return np.einsum("nbs,bs->n", self.blocks, w) - self.targets

    def jacobian(self, w: Array) -> Array:
        """Return the Jacobian by blocks, (n, B, s)."""
        return self.blocks


def choose(what: str, kind: str, known: Any) -> None:
    """Raise ValueError unless ``kind`` is one of ``known``."""
    if kind not in known:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, known))}, got {kind!r}")


def adversary(
    kind: str,
    shape: tuple[int, ...],
    *,
    rounds: int,
    seed: int = 0,
    scale: float = 1.0,
    start: Array | None = None,
    target: Array | None = None,
) -> Stream:
    """Return linear losses whose gradient may depend on the point played; ``kind`` is one of `ADVERSARIES`.

    ``shape`` has one or two axes. ``start`` defaults to zeros, ``target`` to a normal point. For kinds about matrices
    a vector is a column. ValueError for an unknown kind or a wrong shape.
    """
    np = import_numpy()
    choose("kind", kind, ADVERSARIES)
    rounds, scale = check_int("rounds", rounds, ge=1), check_real("scale", scale, ge=0.0)
    lengths = [check_int("shape", n, ge=1) for n in shape] if isinstance(shape, tuple | list) else []
    if len(lengths) not in (1, 2):
        raise ValueError(f"shape must have one or two axes of length >= 1, got {shape!r}")
    rng = generator(check_int("seed", seed, ge=0), "adversary")
    size = math.prod(shape)
    goal = rng.standard_normal(shape) if target is None else target
    fixed, noise = rng.standard_normal(shape), rng.standard_normal((rounds, *shape))
    frame = np.linalg.qr(rng.standard_normal((size, size)))[0].reshape(size, *shape)
    picks, slim = rng.integers(size, size=rounds), rng.standard_normal((2, rounds, *shape))
    rows = rng.standard_normal((shape[0], shape[0]))
    curvature = rows @ rows.T

    def away(x: Array) -> Array:
        return x - goal if (x != goal).any() else fixed

    def matrix(function: Callable[[Array], Array]) -> Callable[..., Array]:
        return lambda t, x, statistic: function(away(x).reshape(shape[0], -1)).reshape(shape)

    def preconditioned(column: int) -> Callable[..., Array]:
        def gradient(t: int, x: Array, statistic: Array | None) -> Array:
            if statistic is None or not statistic.any():
                return noise[t]
            v = np.linalg.eigh(statistic)[1][:, column]
            if len(v) == size:
                g = v.reshape(shape)
            else:  # of the rows, or of the columns
                g = np.outer(v, fixed[0]) if len(v) == shape[0] else np.outer(fixed[:, 0], v)
            return g if np.sum(g * (x - goal)) >= 0 else -g

        return gradient

    gradients: dict[str, Callable[..., Array]] = {
        "random": lambda t, x, s: noise[t],
        "low rank": lambda t, x, s: slim[0, t][..., :1] * slim[1, t][:1] if len(shape) == 2 else slim[0, t],
        "constant": lambda t, x, s: fixed,
        "alternating": lambda t, x, s: (-1.0) ** t * fixed + 0.1 * noise[t],
        "doubling switches": lambda t, x, s: (-1.0) ** int(math.log2(t + 1)) * fixed + 0.1 * noise[t],
        "cyclic basis": lambda t, x, s: np.eye(size)[t % size].reshape(shape),
        "orthonormal": lambda t, x, s: frame[picks[t]],
        "growing": lambda t, x, s: 1.3**t * noise[t],
        "shrinking": lambda t, x, s: 1.3**-t * noise[t],
        "cauchy": lambda t, x, s: np.clip(slim[0, t] / slim[1, t], -50, 50),
        "quadratic": lambda t, x, s: curvature @ (x - goal),
        "along": lambda t, x, s: away(x) / np.linalg.norm(away(x)),
        "against": lambda t, x, s: -away(x) / np.linalg.norm(away(x)) + 0.1 * noise[t],
        "sign": lambda t, x, s: np.sign(away(x)),
        "polar": matrix(polar),
        "rank one": matrix(top_pair),
        "rows": matrix(lambda y: y / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), 1e-300)),
        "least preconditioned": preconditioned(0),
        "most preconditioned": preconditioned(-1),
    }
    play = gradients[kind]
    return Stream(
        name=kind,
        rounds=rounds,
        start=np.zeros(shape) if start is None else start,
        gradient=lambda t, x, statistic: scale * play(t, x, statistic),
        target=goal,
    )


def repeated(objective: Objective, start: Array, rounds: int, noise: Callable[[int], Array] | None = None) -> Stream:
    """Return the same function in every round; ``noise(t)`` is added to its gradient. ``start`` may stack replicas."""
    return Stream(
        name=objective.name,
        rounds=check_int("rounds", rounds, ge=1),
        start=start,
        gradient=lambda t, x, s: objective.gradient(x) if noise is None else objective.gradient(x) + noise(t),
        loss=lambda t, x: objective.value(x),
        target=objective.minimizer,
    )


def nonsmooth(kind: str, shape: tuple[int, int], seed: int = 0) -> Objective:
    """Return a convex function of a matrix, with a subgradient; ``kind`` is one of `NONSMOOTH`."""
    np = import_numpy()
    choose("kind", kind, NONSMOOTH)
    rng = generator(seed, "nonsmooth")
    best, a = rng.standard_normal(shape), rng.standard_normal((6, shape[0]))

    def largest(x: Array) -> Array:
        g = np.zeros_like(x)
        index = np.unravel_index(np.argmax(np.abs(x)), x.shape)
        g[index] = np.sign(x[index])
        return g

    functions: Pairs = {
        "L1": (lambda x: np.abs(a @ x).sum(), lambda x: a.T @ np.sign(a @ x)),
        "nuclear": (lambda x: np.linalg.norm(x, "nuc"), polar),
        "max": (lambda x: np.abs(x).max(), largest),
    }
    value, gradient = functions[kind]
    return Objective(
        name=kind, value=lambda w: float(value(w - best)), gradient=lambda w: gradient(w - best), minimizer=best
    )


def smooth(kind: str, shape: tuple[int, int], seed: int = 0, spread: float = 1.0) -> Objective:
    """Return a convex function of a matrix with a Hessian of at most I_n (x) L; ``kind`` is one of `SMOOTH`.

    L has the condition number 100^(2 spread) at most. Leading axes of the argument are replicas.
    """
    np = import_numpy()
    choose("kind", kind, SMOOTH)
    rng, (m, n) = generator(seed, "smooth"), shape
    best = rng.standard_normal(shape)
    a = rng.standard_normal((m + 2, m)) * 10.0 ** rng.uniform(-spread, spread, m)
    gram = a.T @ a
    w, v = np.linalg.eigh(gram)
    half = v * np.sqrt(w) @ v.T
    q = np.linalg.qr(rng.standard_normal((n, m, m)))[0]
    blocks = np.einsum("jik,jk,jlk->jil", q, rng.uniform(0, 1, (n, m)), q)

    def per_column(x: Array) -> Array:
        return half @ np.einsum("jil,...lj->...ij", blocks, half @ x)

    def total(x: Array) -> Any:
        return np.sum(x, axis=(-2, -1))

    functions: Pairs = {
        "least squares": (lambda x: total((a @ x) ** 2) / 2, lambda x: gram @ x),
        "log-cosh": (lambda x: total(np.logaddexp(a @ x, -a @ x) - math.log(2)), lambda x: a.T @ np.tanh(a @ x)),
        "pseudo-Huber": (
            lambda x: total(np.sqrt(1 + (a @ x) ** 2) - 1),
            lambda x: a.T @ (a @ x / np.sqrt(1 + (a @ x) ** 2)),
        ),
        "column blocks": (lambda x: total(x * per_column(x)) / 2, per_column),
    }
    value, gradient = functions[kind]
    return Objective(
        name=kind,
        value=lambda w: value(w - best),
        gradient=lambda w: gradient(w - best),
        minimizer=best,
        curvature=gram,
    )


def nonconvex(kind: str, size: int, seed: int = 0) -> Objective:
    """Return sum_i w_i phi((Q x)_i), Q orthogonal, ``|phi''| <= 1``, so L = max w; ``kind`` of `NONCONVEX` is phi.

    phi is z^2 / 2, 1 - cos z or z^2 / (1 + z^2) / 2. Leading axes of the argument are replicas.
    """
    np = import_numpy()
    choose("kind", kind, NONCONVEX)
    rng = generator(seed, "nonconvex")
    w, q = 10.0 ** rng.uniform(-1, 1, size), np.linalg.qr(rng.standard_normal((size, size)))[0]
    functions: Pairs = {
        "parabola": (lambda z: z**2 / 2, lambda z: z),
        "cosine": (lambda z: 1 - np.cos(z), np.sin),
        "rational": (lambda z: z**2 / (1 + z**2) / 2, lambda z: z / (1 + z**2) ** 2),
    }
    phi, slope = functions[kind]
    return Objective(
        name=kind,
        value=lambda x: phi(x @ q.T) @ w,
        gradient=lambda x: (slope(x @ q.T) * w) @ q,
        minimizer=np.zeros(size),
        curvature=float(w.max()),
    )


def regularised_logistic(samples: int, size: int, seed: int = 0, ridge: float = 0.05) -> tuple[Objective, Any]:
    """Return ``mean log(1 + exp(-y a x)) + ridge/2 |x|^2`` minus its minimum, and gradients (samples, size)."""
    np = import_numpy()
    rng = generator(seed, "logistic")
    a = rng.standard_normal((samples, size)) * 2.0 ** rng.uniform(-3, 0, size)
    y = rng.choice((-1.0, 1.0), samples)

    def raw(x: Array) -> float:
        return float(np.mean(np.logaddexp(0, -y * (a @ x))) + ridge / 2 * x @ x)

    def per_sample(x: Array) -> Array:
        return (-y / (1 + np.exp(y * (a @ x))))[:, None] * a + ridge * x

    best = np.zeros(size)
    for _ in range(30):  # Newton's method
        p = 1 / (1 + np.exp(y * (a @ best)))
        hessian = (a * (p * (1 - p))[:, None]).T @ a / samples + ridge * np.eye(size)
        best = best - np.linalg.solve(hessian, per_sample(best).mean(axis=0))
    objective = Objective(
        name="logistic",
        value=lambda x: raw(x) - raw(best),
        gradient=lambda x: per_sample(x).mean(axis=0),
        minimizer=best,
        curvature=float(np.linalg.norm(a, 2) ** 2 / (4 * samples) + ridge),
    )
    return objective, per_sample


def linear_model(
    link: str, features: Array, responses: Array, start: Array | None = None, target: Any = None
) -> Stream:
    """Return losses of z = a_t x: z, ``|z - y_t|``, (z - y_t)^2 / 2 or log(1 + exp(-y_t z)), by ``link`` of `LINKS`.

    ``features`` is (rounds, d), ``responses`` (rounds,), for the logistic loss +-1.
    """
    np = import_numpy()
    choose("link", link, LINKS)
    a, y = features, responses
    if a.ndim != 2 or y.shape != a.shape[:1] or not len(y):
        raise ValueError(f"features must be (rounds, d) and responses (rounds,), got {a.shape} and {y.shape}")
    functions: Pairs = {
        "linear": (lambda t, z: z, lambda t, z: 1.0),
        "absolute": (lambda t, z: abs(z - y[t]), lambda t, z: np.sign(z - y[t])),
        "squared": (lambda t, z: (z - y[t]) ** 2 / 2, lambda t, z: z - y[t]),
        "logistic": (
            lambda t, z: np.logaddexp(0.0, -y[t] * z),
            lambda t, z: -y[t] * np.exp(-np.logaddexp(0.0, y[t] * z)),
        ),
    }
    loss, slope = functions[link]
    return Stream(
        name=link,
        rounds=len(y),
        start=np.zeros(a.shape[1]) if start is None else start,
        gradient=lambda t, x, s: slope(t, a[t] @ x) * a[t],
        loss=lambda t, x: float(loss(t, a[t] @ x)),
        target=target,
    )


def random_linear_model(link: str, size: int, rounds: int, seed: int = 0, distance: float = 1.0) -> Stream:
    """Return `linear_model` with normal features of different sizes and responses, or signs, that fit ``target``."""
    np = import_numpy()
    rng = generator(seed, "linear model")
    a = rng.standard_normal((rounds, size)) * 10.0 ** rng.uniform(-1, 1, size)
    star = rng.standard_normal(size)
    y = a @ star
    start = star + distance * rng.standard_normal(size)
    return linear_model(link, a, np.sign(y) if link == "logistic" else y, start, star)


def libsvm(name_or_path: str | Path, rows: int | None = None) -> tuple[Array, Array]:
    """Return the features (n, d + 1) of a LIBSVM file in file order, the last column 1, and its labels as `signs`."""
    np = import_numpy()
    features, labels = load_libsvm(name_or_path)
    if rows is not None and check_int("rows", rows, ge=1) > len(labels):
        raise ValueError(f"rows must be at most {len(labels)}, the lines of {name_or_path}, got {rows}")
    features = np.concatenate([features, np.ones((len(labels), 1))], axis=1)
    return features[:rows], signs(labels)[:rows]


def signs(labels: Array) -> Array:
    """Return labels of two classes as 1 for the larger and -1 for the smaller; ValueError if there are not two."""
    np = import_numpy()
    classes = np.unique(labels)
    if len(classes) != 2:
        some = ", ".join(f"{x:g}" for x in classes[:5]) + ", ..." * (len(classes) > 5)
        raise ValueError(f"logistic regression wants labels of two classes, got {len(classes)}: {some}")
    return np.where(labels == classes[1], 1.0, -1.0)


def logistic(name_or_path: str | Path, rows: int | None = None) -> Stream:
    """Return online logistic regression on a LIBSVM file in file order, with an intercept, from zero."""
    return linear_model("logistic", *libsvm(name_or_path, rows))


def two_layer(neurons: int, samples: int, size: int, seed: int = 0, residual: float = 0.0625) -> TwoLayer:
    """Return a `TwoLayer` whose first residual has the norm ``residual``."""
    np = import_numpy()
    rng = generator(seed, "two layers")
    x = rng.standard_normal((samples, size))
    net = TwoLayer(
        inputs=x / np.linalg.norm(x, axis=1, keepdims=True),
        signs=rng.choice((-1.0, 1.0), neurons),
        start=rng.standard_normal((neurons, size)),
        targets=np.zeros(samples),
    )
    direction = rng.standard_normal(samples)
    targets = net.residual(net.start) - residual * direction / np.linalg.norm(direction)
    return TwoLayer(inputs=net.inputs, signs=net.signs, start=net.start, targets=targets)


def linear_blocks(blocks: int, samples: int, size: int, seed: int = 0) -> LinearBlocks:
    """Return a `LinearBlocks` with normal entries, which starts at zero."""
    rng = generator(seed, "linear blocks")
    return LinearBlocks(
        blocks=rng.standard_normal((samples, blocks, size)),
        start=import_numpy().zeros((blocks, size)),
        targets=rng.standard_normal(samples),
    )


def rows(kind: str, count: int, size: int, rounds: int, seed: int = 0) -> Array:
    """Return new rows of a sketch, (rounds, count, size); ``kind`` is one of `ROWS`."""
    np = import_numpy()
    choose("kind", kind, ROWS)
    rng = generator(seed, "rows")
    new = rng.standard_normal((rounds, count, size))
    frame = np.linalg.qr(rng.standard_normal((size, size)))[0]
    t = np.arange(rounds)[:, None, None]
    turning = 0.1 * new
    turning[:, 0, 0] += np.cos(0.3 * t[:, 0, 0])
    turning[:, 0, -1] += np.sin(0.3 * t[:, 0, 0])
    low = min(2, size)
    return {
        "random": new,
        "power law": new * (1.0 + np.arange(size)) ** -1.5 @ frame,
        "exponential decay": new * 4.0 ** -np.arange(size) @ frame,
        "cauchy": rng.standard_cauchy(new.shape),
        "growing": new * 1.5**t,
        "shrinking": new * 1.5**-t,
        "low rank": new[..., :low] @ frame[:low],
        "rotating": turning,
        "cyclic basis": frame[(t[..., 0] * count + np.arange(count)) % size],
        "orthonormal": frame[rng.integers(size, size=(rounds, count))],
    }[kind]


ROWS = (
    "random",
    "power law",
    "exponential decay",
    "cauchy",
    "growing",
    "shrinking",
    "low rank",
    "rotating",
    "cyclic basis",
    "orthonormal",
)


def polar(x: Array) -> Array:
    """Return the polar factor of a matrix."""
    np = import_numpy()
    u, _, vh = np.linalg.svd(x, full_matrices=False)
    return u @ vh


def top_pair(x: Array) -> Array:
    """Return the outer product of a matrix's first pair of singular vectors."""
    np = import_numpy()
    u, _, vh = np.linalg.svd(x, full_matrices=False)
    return np.outer(u[:, 0], vh[0])
