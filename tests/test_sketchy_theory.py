"""The regret bounds of S-AdaGrad and S-Shampoo on adversarial linear losses, with their constants, and planted bugs."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mutation import mutated

from precond_ref.methods import sketchy
from precond_ref.numerics import sketch as fd

ADVERSARIES = (
    "gaussian",
    "constant",
    "basis in turn",
    "iid orthonormal",
    "along x",
    "against x",
    "sign by turns",
    "doubling switches",
    "geometric growth",
    "geometric decay",
    "least preconditioned direction",
    "most preconditioned direction",
    "cauchy",
)
ROUNDING = 1 + 1e-9  # the inequalities hold exactly; sums of rounded steps stand on both sides


def adversary(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    """A function ``(t, x, bound) -> g`` of the step from 0, the point played and the last Gtil (None for matrices)."""
    n = int(np.prod(shape))
    frame = np.linalg.qr(rng.standard_normal((n, n)))[0]
    fixed = rng.standard_normal(shape)

    def gradient(t: int, x: np.ndarray, bound: np.ndarray | None) -> np.ndarray:
        noise = rng.standard_normal(shape)
        unit = x / np.linalg.norm(x) if x.any() else fixed
        if kind == "constant":
            return fixed
        if kind == "basis in turn":
            return np.eye(n)[t % n].reshape(shape)
        if kind == "iid orthonormal":
            return frame[rng.integers(n)].reshape(shape)
        if kind == "along x":
            return unit
        if kind == "against x":
            return -unit + 0.1 * noise
        if kind == "sign by turns":
            return (-1.0) ** t * fixed
        if kind == "doubling switches":
            return (-1.0) ** int(np.log2(t + 1)) * fixed + 0.1 * noise
        if kind == "geometric growth":
            return 1.3**t * noise
        if kind == "geometric decay":
            return 1.3**-t * noise
        if kind.endswith("direction") and bound is not None and bound.any():
            v = np.linalg.eigh(bound)[1][:, 0 if kind.startswith("least") else -1]
            return v if v @ x >= 0 else -v
        if kind == "cauchy":
            return np.clip(rng.standard_cauchy(shape), -50, 50)
        return noise

    return gradient


def spectrum(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, those up to 1e-13 of the largest set to zero, and eigenvectors."""
    w, v = np.linalg.eigh(matrix)
    return np.where(w > 1e-13 * w[..., -1:], w, 0.0), v


def trace_root(matrix: np.ndarray, power: float, live_only: bool = False) -> np.ndarray:
    """tr A^power, A positive semidefinite; ``live_only`` without what may be rounding of zero."""
    w = spectrum(matrix)[0] if live_only else np.maximum(np.linalg.eigvalsh(matrix), 0.0)
    return np.sum(w**power, axis=-1)


def omega(gram: np.ndarray, size: int) -> np.ndarray:
    """min over k < l of (sum of the eigenvalues after the k-th) / (l - k)."""
    w = np.maximum(np.linalg.eigvalsh(gram)[..., ::-1], 0.0)
    return np.min([w[..., k:].sum(axis=-1) / (size - k) for k in range(min(size, w.shape[-1] + 1))], axis=0)


def project(y: np.ndarray, bound: np.ndarray, radius: float) -> np.ndarray:
    """Closest points of the ball in the norm of bound^{1/2}, by bisection on the multiplier."""
    w, v = spectrum(bound)
    w = np.sqrt(w)
    z = np.einsum("bji,bj->bi", v, y)
    low, high = np.zeros(len(y)), np.max(w, axis=1) * (np.linalg.norm(y, axis=1) / radius + 1)

    def at(multiplier: np.ndarray) -> np.ndarray:
        total = w + multiplier[:, None]
        return np.where(w > 0, w * z / np.where(total > 0, total, 1.0), 0.0)

    for _ in range(60):
        middle = 0.5 * (low + high)
        outside = np.linalg.norm(at(middle), axis=1) > radius
        low, high = np.where(outside, middle, low), np.where(outside, high, middle)
    on_sphere = np.where((np.linalg.norm(at(0 * low), axis=1) <= radius)[:, None], at(0 * low), at(high))
    inside = np.linalg.norm(y, axis=1) <= radius
    return np.where(inside[:, None], y, np.einsum("bij,bj->bi", v, on_sphere))


class Worst(dict):
    """Largest ratio of each name, and where."""

    def record(self, name: str, left: np.ndarray, right: np.ndarray, where: list[str]) -> None:
        ratio = np.where(left > 0, left / np.where(right > 0, right, np.where(left > 0, 1e-300, 1.0)), 0.0)
        i = int(np.argmax(ratio))
        self[name] = max(self.get(name, (-np.inf, "")), (float(ratio[i]), where[i]))

    def settle(self, title: str) -> None:
        print(f"\n{title}; largest left side / right side:")
        for name, (value, where) in self.items():
            print(f"    {name:20} {value:.3f}   {where}")
        assert max(value for value, _ in self.values()) <= ROUNDING, self


def check_sadagrad_regret(lib: Any, dims: tuple[int, ...] = (1, 2, 4), steps: int = 30, seeds: int = 1) -> None:
    """Every adversary, every size, in a ball of radius 1 (eta = D / sqrt(2) and others) and unconstrained."""
    worst, runs = Worst(), 0
    etas = np.array([np.sqrt(2.0), 0.3, 3.0, 0.3, 1.0, 3.0])  # the first is 2 / sqrt(2), the first three in the ball
    for d in dims:
        for size in range(1, d + 2):
            cases = [(kind, c) for kind in ADVERSARIES for c in range(6) for _ in range(seeds)]
            where = [f"{kind}, d={d}, l={size}, eta={etas[c]:.2f}" for kind, c in cases]
            players = [
                adversary(kind, (d,), np.random.default_rng([d, size, c, i])) for i, (kind, c) in enumerate(cases)
            ]
            choice = np.array([c for _, c in cases])
            eta, ball = etas[choice], choice < 3
            runs += len(cases)
            method = lib.SAdaGrad(size=size)
            x, bound = np.zeros((len(cases), d)), np.zeros((len(cases), d, d))
            state = method.init(x, stack_ndim=1)
            points, grads, quadratic = [], [], np.zeros(len(cases))
            for t in range(steps):
                g = np.stack([play(t, x[i], bound[i]) for i, play in enumerate(players)])
                direction, state = method.update(g, state, x)
                bound = lib.fd.dense(state.sketch)
                w, v = spectrum(bound)
                inverse = np.where(w > 0, np.where(w > 0, w, 1.0) ** -0.5, 0.0)
                quadratic += np.sum(inverse * np.einsum("bji,bj->bi", v, g) ** 2, axis=1)
                points.append(x)
                grads.append(g)
                y = x - eta[:, None] * direction
                x = np.where(ball[:, None], project(y, bound, 1.0), y)
            played, all_grads = np.stack(points), np.stack(grads)
            total = all_grads.sum(axis=0)
            unit = total / np.maximum(np.linalg.norm(total, axis=1), 1e-300)[:, None]
            gram = np.einsum("tbi,tbj->bij", all_grads, all_grads)
            own, tail, rho = trace_root(gram, 0.5), omega(gram, size), state.sketch.escaped
            paid = np.sum(all_grads * played, axis=(0, 2))
            worst.record("quadratic lemma", quadratic, 2 * own, where)
            for length in (0.5, 1.0, 4.0):
                best = -np.where(ball, 1.0, length)[:, None] * unit
                regret = paid - np.sum(total * best, axis=1)
                free = np.max(np.linalg.norm(played - best, axis=2), axis=0)
                diameter = np.where(ball, 2.0, free)
                scale = diameter**2 / (2 * eta)
                right = scale * trace_root(bound, 0.5) + eta / 2 * quadratic
                worst.record("any eta, by Gtil", regret, right, where)
                right = scale * (own + np.sqrt(max(d * (d - size), 0) * rho)) + eta * own
                worst.record("any eta, by G", regret, right, where)
                first = choice == 0
                names = [text for text, chosen in zip(where, first, strict=True) if chosen]
                right = 2 * (np.sqrt(2) * own + d * np.sqrt(tail / 2))
                worst.record("Theorem 3", regret[first], right[first], names)
                right = 2 * (np.sqrt(2) * own + np.sqrt(max(d * (d - size), 0) * tail / 2))
                worst.record("Corollary 4", regret[first], right[first], names)
    worst.settle(f"S-AdaGrad, {runs} runs of {steps} steps")


def against(
    length: np.ndarray, paid: np.ndarray, total: np.ndarray, unit: np.ndarray, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Regret to X* = -length unit, and D = max ||X_t - X*||."""
    best = -length[:, None, None] * unit
    regret = paid - np.sum(total * best, axis=(1, 2))
    return regret, np.max(np.linalg.norm(points - best, axis=(2, 3)), axis=0)


def check_sshampoo_regret(
    lib: Any, shapes: tuple[tuple[int, int], ...] = ((3, 2), (2, 4)), steps: int = 30, seeds: int = 1
) -> None:
    """Every adversary, rank and size, unconstrained.

    Theorem 5 wants eta = D / sqrt(2 r): after 1, 2, 4, ... steps the comparator is moved along the sum of gradients
    until D is that, where such a comparator exists.
    """
    worst, runs, solved = Worst(), 0, 0
    for m, n in shapes:
        for size in range(1, max(m, n) + 2):
            for eps in (0.0, 0.001, 1.0):
                cases = [
                    (kind, rank, eta)
                    for kind in ADVERSARIES
                    for rank in range(1, min(m, n) + 1)
                    for eta in (0.3, 1.0, 3.0)
                    for _ in range(seeds)
                ]
                where = [f"{kind}, {m}x{n}, r={rank}, l={size}, eps={eps}" for kind, rank, _ in cases]
                players, factors = [], []
                for i, (kind, rank, _) in enumerate(cases):
                    rng = np.random.default_rng([m, n, size, i])
                    players.append(adversary(kind, (m, rank), rng))
                    factors.append(np.linalg.qr(rng.standard_normal((n, n)))[0][:rank])
                ranks, eta = (np.array([case[i] for case in cases], dtype=float) for i in (1, 2))
                runs += len(cases)
                method = lib.SShampoo(size=size, eps=eps)
                x = np.zeros((len(cases), m, n))
                state = method.init(x, stack_ndim=1)
                points, grads = [], []
                paid, quadratic, total = np.zeros(len(cases)), np.zeros(len(cases)), np.zeros_like(x)
                left, right = np.zeros((len(cases), m, m)), np.zeros((len(cases), n, n))
                for t in range(steps):
                    g = np.stack(
                        [
                            play(t, x[i] @ f.T, None) @ f  # rank at most r
                            for i, (play, f) in enumerate(zip(players, factors, strict=True))
                        ]
                    )
                    direction, state = method.update(g, state, x)
                    quadratic += np.sum(g * direction, axis=(1, 2))
                    paid += np.sum(g * x, axis=(1, 2))
                    total += g
                    left += g @ np.swapaxes(g, 1, 2)
                    right += np.swapaxes(g, 1, 2) @ g
                    points.append(x)
                    grads.append(g)
                    x = x - eta[:, None, None] * direction
                    if (t + 1) & t and t + 1 < steps:
                        continue
                    bounds = [lib.fd.dense(s) + eps * np.eye(d) for s, d in zip(state.sketches, (m, n), strict=True)]
                    own = trace_root(left + eps * np.eye(m), 0.25) * trace_root(right + eps * np.eye(n), 0.25)
                    worst.record("quadratic lemma", quadratic, 2 * ranks * own, where)
                    unit = total / np.maximum(np.linalg.norm(total, axis=(1, 2)), 1e-300)[:, None, None]
                    game = (paid, total, unit, np.stack(points))
                    for length in (0.5, 2.0):
                        regret, diameter = against(length * np.ones(len(cases)), *game)
                        traces = trace_root(bounds[0], 0.25) * trace_root(bounds[1], 0.25)
                        worst.record("any eta", regret, diameter**2 / (2 * eta) * traces + eta * ranks * own, where)
                    wanted = eta * np.sqrt(2 * ranks)
                    low, high = np.zeros(len(cases)), 2 * wanted  # |X*| <= D, since X_1 = 0
                    for _ in range(60):
                        middle = 0.5 * (low + high)
                        far = against(middle, *game)[1] > wanted
                        low, high = np.where(far, low, middle), np.where(far, middle, high)
                    regret, diameter = against(low, *game)
                    found = np.abs(diameter - wanted) <= 1e-9 * wanted
                    solved += int(found.sum())
                    product = np.ones(len(cases))
                    for gram, bound, sketch, d in zip((left, right), bounds, state.sketches, (m, n), strict=True):
                        statistic = trace_root(gram + eps * np.eye(d), 0.25)
                        tail = omega(gram, size)
                        mass = sketch.escaped
                        rounding = 1e-14 * np.linalg.norm(gram, 2, (1, 2))  # of the eigenvalues; both are tight
                        worst.record("mass by Omega", mass, tail + 10 * rounding, where)
                        rounded = trace_root(gram + (eps + rounding)[:, None, None] * np.eye(d), 0.25)
                        worst.record("root trace", trace_root(bound, 0.25, True), rounded + d * mass**0.25, where)
                        product = product * (statistic + d * tail**0.25)
                    right_side = np.sqrt(2 * ranks) * wanted * product
                    worst.record("Theorem 5", np.where(found, regret, 0.0), right_side, where)
    assert solved > 0
    worst.settle(f"S-Shampoo, {runs} runs of {steps} steps, {solved} instances of Theorem 5")


def test_sadagrad_regret() -> None:
    check_sadagrad_regret(sketchy)


def test_sshampoo_regret() -> None:
    check_sshampoo_regret(sketchy)


@pytest.mark.deep
def test_sadagrad_regret_deep() -> None:
    check_sadagrad_regret(sketchy, dims=(1, 2, 3, 4, 6, 10), steps=120, seeds=2)


@pytest.mark.deep
def test_sshampoo_regret_deep() -> None:
    check_sshampoo_regret(sketchy, shapes=((1, 3), (3, 2), (5, 2), (3, 3), (4, 3)), steps=100)


def library(change: tuple[str, str]) -> ModuleType:
    """The methods on a sketch with ``change``."""
    lib = mutated(sketchy)
    lib.fd = mutated(fd, (change,))
    return lib


MUTANTS = {
    "mass not added back": (
        "xp.concat([eigenvalues + shift[..., None], shift[..., None]]",
        "xp.concat([eigenvalues, 0.0 * shift[..., None]]",
    ),
    "mass forgets": ("else tail_decay) * sketch.escaped", "else tail_decay) * 0.5 * sketch.escaped"),
    "singular values deflated": ("(s - cut) * (s + cut),", "(s - cut) * (s - cut),"),
    "square root missing": (") ** exponent)", ") ** (exponent / 2))"),
    "ascent": ("return outside * matrix + basis @", "return -outside * matrix - basis @"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_breaks_a_bound(name: str) -> None:
    lib = SimpleNamespace(**vars(library(MUTANTS[name])))
    with pytest.raises(AssertionError):
        check_sadagrad_regret(lib, dims=(2, 4))


@pytest.mark.parametrize("name", ["square root missing", "mass forgets"])
def test_planted_bug_breaks_a_bound_of_sshampoo(name: str) -> None:
    with pytest.raises(AssertionError):
        check_sshampoo_regret(SimpleNamespace(**vars(library(MUTANTS[name]))), shapes=((3, 2),))
