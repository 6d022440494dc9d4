"""S-AdaGrad, S-Shampoo and the online yardsticks: 50-digit truth, golden values, limits, knobs, bad input, bugs."""

from __future__ import annotations

import os
from types import ModuleType, SimpleNamespace
from typing import Any

import mpmath
import numpy as np
import pytest
from helpers import distance as gap
from mutation import mutated
from root_free_oracle import exact

import precond_ref as pr
from precond_ref.methods import online_sketches, sketchy
from precond_ref.problems import load_libsvm

U = 2.0**-53


def grads_of(shape: tuple[int, ...], steps: int, seed: int = 0) -> np.ndarray:
    """Small integers, never all zero in a step."""
    return np.random.default_rng([seed, *shape]).integers(-4, 5, (steps, *shape)) + 0.125


def run(method: Any, grads: np.ndarray, param: Any = None, lr: float | None = None) -> np.ndarray:
    """Directions, (steps, ...); with ``lr`` the parameters after each step, from zero, instead."""
    x = np.zeros(grads.shape[1:]) if param is None else param
    state = method.init(x)
    out = []
    for g in grads:
        direction, state = method.update(g, state, x)
        if lr is not None:
            x = x - lr * direction
        out.append(direction if lr is None else x)
    return np.stack(out)


# ---- truth with 50 digits and dense matrices ------------------------------------------------------------------------


def spectral(matrix: np.ndarray, function: Any) -> tuple[np.ndarray, list[Any]]:
    """Q diag(function(w)) Q^T, and w ascending."""
    w, q = mpmath.eigsy(mpmath.matrix(matrix.tolist()))
    values = [w[i] for i in range(len(w))]
    q = np.array(q.tolist(), dtype=object)
    return (q * np.array([function(v, values) for v in values], dtype=object)) @ q.T, values


def truth(
    grads: np.ndarray,
    size: int,
    beta2: float = 1.0,
    eps: float = 0.0,
    relative_eps: bool = False,
    every: int = 1,
    tail_decay: float | None = None,
    delta: float = 0.0,
) -> tuple[np.ndarray, float]:
    """Directions by the recursion Gbar = [beta2 Gbar + M - rho I]_+, and the largest condition number met."""
    with mpmath.workdps(50):
        order = grads.ndim - 1
        dims = grads.shape[1:]
        exponent = mpmath.mpf(-1) / (2 * order)
        sketches = [exact(np.zeros((d, d))) for d in dims]
        masses = [mpmath.mpf(delta) for _ in dims]
        tail = beta2 if tail_decay is None else tail_decay
        directions, kappa = [], mpmath.mpf(1)
        for t, grad in enumerate(grads):
            g = p = exact(grad)
            for axis, d in enumerate(dims):
                if t % every == 0:
                    unfolded = np.moveaxis(g, axis, 0).reshape(d, -1)
                    a = beta2 * sketches[axis] + unfolded @ unfolded.T
                    w = spectral(a, lambda v, _: v)[1]
                    rho = max(w[d - size], mpmath.mpf(0)) if size <= d else mpmath.mpf(0)
                    rho = rho if rho > 1e-30 * w[-1] else mpmath.mpf(0)
                    masses[axis] = tail * masses[axis] + rho
                    sketches[axis] = spectral(a, lambda v, w, rho=rho: v - rho if v - rho > 1e-30 * w[-1] else 0 * v)[0]
                mass = masses[axis]
                met = []

                def power(v: Any, w: list[Any], mass: Any = mass, met: list[Any] = met) -> Any:
                    total = max(v, 0) + mass
                    largest = w[-1] + mass
                    if total <= 1e-30 * largest:
                        return mpmath.mpf(0)
                    met.append(total + eps * (largest if relative_eps else 1))
                    return met[-1] ** exponent

                root = spectral(sketches[axis], power)[0]
                kappa = max(kappa, max(met) / min(met))
                p = np.moveaxis(np.tensordot(root, p, axes=(1, axis)), 0, axis)
            directions.append(p.astype(float))
        return np.stack(directions), float(kappa)


def assert_true(method: Any, grads: np.ndarray, **fields: Any) -> float:
    """Error within 16 u kappa (total exponent 1/2, statistics of condition kappa); returns the share of it."""
    expected, kappa = truth(grads, method.size, **fields)
    share = gap(run(method, grads), expected) / (16 * U * kappa)
    assert share <= 1, (method, share, kappa)
    return share


def check_sadagrad_truth(lib: Any) -> None:
    shares = [
        assert_true(lib.SAdaGrad(size=size, beta2=beta2, delta=delta), grads_of((4,), 8), beta2=beta2, delta=delta)
        for size in (1, 2, 3, 4, 5)
        for beta2 in (1.0, 0.75)
        for delta in (0.0, 0.5)
    ]
    print(f"\nS-AdaGrad against 50 digits: largest share of 16 u kappa {max(shares):.2f}")


SSHAMPOO_CASES: tuple[tuple[tuple[int, ...], int, dict[str, Any]], ...] = (
    ((3, 3), 2, {}),
    ((3, 4), 3, {"beta2": 0.75}),
    ((4, 3), 2, {"beta2": 0.75, "eps": 0.25, "tail_decay": 0.5}),
    ((3, 4), 2, {"beta2": 0.5, "eps": 0.25, "relative_eps": True}),
    ((4, 3), 2, {"eps": 0.25, "every": 3, "beta2": 0.75}),
    ((2, 3), 7, {"eps": 0.125}),
    ((2, 3, 2), 2, {"eps": 0.25, "beta2": 0.75}),
    ((1, 4), 2, {"eps": 0.25}),
    ((4,), 2, {"eps": 0.25, "beta2": 0.75}),
)


def check_sshampoo_truth(lib: Any) -> None:
    shares = [
        assert_true(lib.SShampoo(size=size, **fields), grads_of(shape, 6), **fields)
        for shape, size, fields in SSHAMPOO_CASES
    ]
    print(f"\nS-Shampoo against 50 digits: largest share of 16 u kappa {max(shares):.2f}")


# ---- the practical version, by another route ------------------------------------------------------------------------

PRACTICAL: tuple[tuple[tuple[int, ...], tuple[int, ...] | None, dict[str, Any]], ...] = (
    # shape, axes after merging (None: graft only), fields
    ((4, 3), (4, 3), {"merge": 4}),
    ((4, 3), (12,), {"merge": 12}),
    ((2, 1, 3, 4), (6, 4), {"merge": 6, "every": 2}),
    ((2, 3, 1, 2), (2, 3, 2), {"merge": 1}),
    ((4, 2, 2), (4, 4), {"merge": 4, "relative_eps": False}),
    ((3, 4), (3, 4), {"merge": 5, "graft": "sgd", "start": 2}),
    ((3, 4), (3, 4), {"merge": 5, "start": 3, "momentum_ema": True, "nesterov": False}),
    ((3, 4), (3, 4), {"merge": 5, "graft_beta2": 1.0, "weight_decay": 0.25, "tail_decay": 0.25}),
    ((3, 4), (3, 4), {"merge": 5, "weight_decay": 0.25, "decay_after_momentum": False, "momentum_ema": True}),
    ((3, 4), (3, 4), {"merge": 5, "graft": None, "momentum": 0.0}),
    ((5,), None, {"weight_decay": 0.5}),
    ((5,), (5,), {"graft": None}),
    ((), None, {}),
    ((1, 1), None, {"graft": None}),
)


def check_practical(lib: Any) -> None:
    worst = 0.0
    for shape, axes, fields in PRACTICAL:
        base: dict[str, Any] = {
            "size": 3, "beta2": 0.75, "eps": 0.25, "relative_eps": True, "every": 1, "tail_decay": None,
            "graft": "rmsprop", "graft_beta2": 0.5, "graft_eps": 0.25, "start": 0, "momentum": 0.75, "nesterov": True,
            "momentum_ema": False, "weight_decay": 0.0, "decay_after_momentum": True, "merge": 1024,
        }  # fmt: skip
        f = SimpleNamespace(**(base | fields))
        grads = grads_of(shape, 6)
        param = np.reshape(np.arange(1.0, 1.0 + grads[0].size), shape)
        if axes is None:
            preconditioned, kappa = grads, 1.0
        else:
            keys = ("beta2", "eps", "relative_eps", "every", "tail_decay")
            preconditioned, kappa = truth(
                grads.reshape(6, *axes), f.size, **{key: getattr(f, key) for key in keys}
            )  # fmt: skip
        v, m, expected = 0.0, 0.0, []
        for t, g in enumerate(grads):
            v = (1 - f.graft_beta2 if f.graft_beta2 < 1 else 1.0) * g**2 + f.graft_beta2 * v
            graft = {"rmsprop": g / np.sqrt(v + f.graft_eps), "sgd": g, None: None}[f.graft]
            p = preconditioned[t].reshape(shape)
            if graft is None:
                u = p
            elif axes is None or t < f.start:
                u = graft
            else:
                u = p * np.sqrt(np.sum(graft**2) / np.sum(p**2))
            if not f.decay_after_momentum:
                u = u + f.weight_decay * param
            if f.momentum:
                u = u * (1 - f.momentum) if f.momentum_ema else u
                m = f.momentum * m + u
                u = u + f.momentum * m if f.nesterov else m
            if f.decay_after_momentum:
                u = u + f.weight_decay * param
            expected.append(u)
        method = lib.SShampoo.practical(**vars(f))
        error = gap(run(method, grads, param), np.stack(expected))
        worst = max(worst, error / (16 * U * kappa))
        assert error <= 16 * U * kappa, (shape, fields, error)
    print(f"\npractical S-Shampoo against the model: largest share of 16 u kappa {worst:.2f}")


# ---- golden values --------------------------------------------------------------------------------------------------

GOLDEN_VECTORS = np.array([[2.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
GOLDEN_MATRICES = np.array([[[1.0, 2], [0, 1], [3, 0]], [[0, 1], [1, -1], [2, 1]]])
DIGITS = 6e-9  # the values are given to eight or nine decimals


def check_golden(lib: Any) -> None:
    """Four steps of S-AdaGrad, two of S-Shampoo, lr = 1 from zero."""
    for size, beta2, rho, top, x in (
        (1, 1.0, 9.0, 0.0, (-1.33333333, -0.78054693, -0.74158162)),
        (2, 1.0, 3.0, 3.0, (-1.35188096, -1.46461562, -1.1717224)),
        (3, 1.0, 1.0, None, (-1.3275138, -1.54085229, -1.54085229)),
        (1, 0.5, 4.25, 0.0, None),
        (2, 0.5, 0.6619125112, 2.926174978, (-1.54902933, -1.54902933, -1.30561708)),
        (3, 0.5, 0.3288353904, None, (-1.50997155, -1.60724535, -1.50997155)),
    ):
        method = lib.SAdaGrad(size=size, beta2=beta2)
        x_t, state = np.zeros(3), method.init(np.zeros(3))
        for g in GOLDEN_VECTORS:
            direction, state = method.update(g, state, x_t)
            x_t = x_t - direction
        assert abs(state.sketch.escaped - rho) <= DIGITS
        assert top is None or abs(state.sketch.eigenvalues[0] - top) <= DIGITS
        assert x is None or np.max(np.abs(x_t - x)) <= DIGITS
    for size, left, right, x in (
        (2, 7.0580108302, 6.8902277714,
         [[-0.15096235, -1.2145704], [-0.26984683, -0.06064329], [-1.48215804, -0.0925835]]),
        (3, 2.6910517021, 0.0,
         [[-0.10379198, -1.26233657], [-0.35617109, 0.05964505], [-1.49443799, -0.08332931]]),
    ):  # fmt: skip
        method = lib.SShampoo(size=size)
        x_t, state = np.zeros((3, 2)), method.init(np.zeros((3, 2)))
        for g in GOLDEN_MATRICES:
            direction, state = method.update(g, state, x_t)
            x_t = x_t - direction
        assert abs(state.sketches[0].escaped - left) <= DIGITS
        assert abs(state.sketches[1].escaped - right) <= DIGITS
        assert np.max(np.abs(x_t - x)) <= DIGITS


# ---- limits and symmetries ------------------------------------------------------------------------------------------


def check_limits(lib: Any) -> None:
    """The known optimizers each method becomes."""
    vectors, matrices = grads_of((5,), 12, 1), grads_of((4, 3), 12, 1)
    for size in (5, 6, 9):
        assert gap(run(lib.SAdaGrad(size=size), vectors), run(pr.FullAdaGrad(), vectors)) <= 1e-12
    for size in (4, 5):
        for eps in (0.0, 0.25):
            expected = run(pr.Shampoo(eps=eps), matrices)
            assert gap(run(lib.SShampoo(size=size, eps=eps), matrices), expected) <= 1e-12
        average = run(pr.Shampoo(beta2=0.75, eps=0.0), matrices)  # weights the new term by 1 - beta2
        assert gap(run(lib.SShampoo(size=size, beta2=0.75), matrices), 0.25**0.5 * average) <= 1e-12
    tensors = grads_of((2, 3, 2), 12, 1)
    assert gap(run(lib.SShampoo(size=4, eps=0.25), tensors), run(pr.Shampoo(eps=0.25), tensors)) <= 1e-12

    norms = np.cumsum(np.sum(vectors**2, axis=1))
    assert gap(run(lib.SAdaGrad(size=1), vectors), vectors / np.sqrt(norms)[:, None]) <= 1e-14
    norms = np.cumsum(np.linalg.norm(matrices, 2, axis=(1, 2)) ** 2)
    assert gap(run(lib.SShampoo(size=1), matrices), matrices / np.sqrt(norms)[:, None, None]) <= 1e-14

    first = run(lib.SAdaGrad(size=3), vectors[:1])
    assert gap(first, vectors[:1] / np.linalg.norm(vectors[0])) <= 1e-14
    for beta2 in (1.0, 0.75):
        one_axis = run(lib.SShampoo(size=3, beta2=beta2), vectors)
        assert gap(run(lib.SAdaGrad(size=3, beta2=beta2), vectors), one_axis) <= 1e-14


def check_low_rank_steps(lib: Any) -> None:
    """Gradients in a span of rank l - 1 and l: the steps of full-matrix AdaGrad in the coordinates of the span."""
    rng = np.random.default_rng(3)
    for rank, size in ((3, 4), (3, 3), (2, 6)):
        frame = np.linalg.qr(rng.standard_normal((6, 6)))[0][:rank]
        coordinates = rng.standard_normal((60, rank))
        small = run(pr.FullAdaGrad(), coordinates)
        got = run(lib.SAdaGrad(size=size), coordinates @ frame)
        for t in range(60):
            w = np.linalg.eigvalsh(coordinates[: t + 1].T @ coordinates[: t + 1])
            kappa = w[-1] / w[max(0, rank - t - 1)]
            assert gap(got[t : t + 1], small[t : t + 1] @ frame) <= 16 * U * (kappa + t)  # each update rounds


def check_symmetries(lib: Any) -> None:
    """Rotations and transposition commute with the step; without eps it does not see the gradients' scale."""
    rng = np.random.default_rng(4)
    rotate = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    vectors = rng.standard_normal((10, 5))
    method = lib.SAdaGrad(size=3, beta2=0.75)
    plain = run(method, vectors)
    assert gap(run(method, vectors @ rotate), plain @ rotate) <= 1e-12
    assert gap(run(method, 64.0 * vectors), plain) <= 1e-14
    left, right = np.linalg.qr(rng.standard_normal((4, 4)))[0], np.linalg.qr(rng.standard_normal((3, 3)))[0]
    matrices = rng.standard_normal((10, 4, 3))
    method = lib.SShampoo(size=2, beta2=0.75, eps=0.25, relative_eps=True, tail_decay=0.5)
    plain = run(method, matrices)
    assert gap(run(method, left @ matrices @ right), left @ plain @ right) <= 1e-12
    assert gap(run(method, np.swapaxes(matrices, 1, 2)), np.swapaxes(plain, 1, 2)) <= 1e-12
    assert gap(run(method, 64.0 * matrices), plain) <= 1e-12


def check_online(lib: Any) -> None:
    """The yardsticks against dense formulas: S by the choice-free recursion on scaled gradients."""
    size, delta, lr = 3, 0.5, 0.25
    grads = grads_of((5,), 9, 5)

    def dense(scales: np.ndarray) -> list[tuple[np.ndarray, float]]:
        s, mass, out = np.zeros((5, 5)), 0.0, []
        for g, scale in zip(grads, scales, strict=True):
            w, v = np.linalg.eigh(s + scale**2 * np.outer(g, g))
            rho = max(w[5 - size], 0.0)
            s, mass = (v * np.maximum(w - rho, 0.0)) @ v.T, mass + rho
            out.append((s, mass))
        return out

    t = np.arange(1.0, 10.0)
    eye = np.eye(5)
    ada, son, rfd = [], [], []
    for (s, _), g in zip(dense(np.ones(9)), grads, strict=True):
        w, v = np.linalg.eigh(s)
        root = (v * np.sqrt(np.maximum(w, 0.0))) @ v.T
        ada.append(np.linalg.solve(delta * eye + root, g))
    for (s, _), g in zip(dense((lr * np.sqrt(t)) ** -0.5), grads, strict=True):
        son.append(np.linalg.solve(delta * eye + s, g) / lr)
    for (s, mass), g in zip(dense((lr * t) ** -0.5), grads, strict=True):
        rfd.append(np.linalg.solve((delta + mass / 2) * eye + s, g) / lr)
    # the square root of S has rounding sqrt(u) on its kernel, against delta: 5 sqrt(u ||S||) / delta
    assert gap(run(lib.AdaFD(size=size, delta=delta), grads), np.stack(ada)) <= 5 * np.sqrt(U * 400) / delta
    assert gap(run(lib.FDSON(size=size, delta=delta, learning_rate=lr), grads), np.stack(son)) <= 1e-12
    assert gap(run(lib.RFDSON(size=size, delta=delta, learning_rate=lr), grads), np.stack(rfd)) <= 1e-12


CHECKS = {
    "sadagrad_truth": check_sadagrad_truth,
    "sshampoo_truth": check_sshampoo_truth,
    "practical": check_practical,
    "golden": check_golden,
    "limits": check_limits,
    "low_rank_steps": check_low_rank_steps,
    "symmetries": check_symmetries,
}


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str) -> None:
    CHECKS[name](sketchy)


def test_online_yardsticks() -> None:
    check_online(online_sketches)


SKETCHY_MUTANTS: dict[str, tuple[str, tuple[str, str]]] = {
    "S-AdaGrad without the square root": ("sadagrad_truth", ("e, rho, -0.5, grad", "e, rho, -1.0, grad")),
    "S-AdaGrad statistic after use": (
        "golden",
        ("rho = sketch\n        direction", "rho = state.sketch\n        direction"),
    ),
    "S-AdaGrad gives NaN from the second update": (
        "sadagrad_truth",
        ("return direction, SAdaGradState", "return direction * (xp.nan if state.step else 1), SAdaGradState"),
    ),
    "delta ignored": ("sadagrad_truth", ("self.size, self.delta)", "self.size)")),
    "size taken as rank": ("golden", ("beta2, size=self.size, solver", "beta2, size=self.size + 1, solver")),
    "S-AdaGrad beta2 ignored": ("golden", ("rows, self.beta2, size", "rows, 1.0, size")),
    "exponent -1/ndim": ("golden", ("exponent = -0.5 / len(dims)", "exponent = -1.0 / len(dims)")),
    "exponent -1/4 for every order": ("limits", ("exponent = -0.5 / len(dims)", "exponent = -0.25")),
    "exponent counts axes before merging": ("practical", ("-0.5 / len(dims)", "-0.5 / (grad.ndim - now.stack)")),
    "S-Shampoo statistic after use": ("golden", ("rho = sketch\n        p =", "rho = old\n        p =")),
    "both sides swapped": (
        "sshampoo_truth",
        ("old, rows, method", "old, rows if d != rows.shape[-2] else xp.matrix_transpose(rows), method"),
    ),
    "unfolding without transposition": (
        "limits",
        ("xp.matrix_transpose(xp.reshape(g, shape))  #", "xp.reshape(g, (*stack, shape[-1], d))  #"),
    ),
    "second axis sees the preconditioned gradient": (
        "golden",
        ("g, p = rows, xp.matrix_transpose(p)", "g = p = xp.matrix_transpose(p)"),
    ),
    "every=k ignored": ("sshampoo_truth", ("compute, None if method.every == 1 else old", "compute, None")),
    "tail_decay ignored": ("sshampoo_truth", ("method.tail_decay, size", "None, size")),
    "tail not decayed by default": ("sshampoo_truth", ("method.tail_decay, size", "method.tail_decay or 1.0, size")),
    "eps ignored": ("sshampoo_truth", ("ridge=method.eps", "ridge=0.0")),
    "relative eps ignored": ("sshampoo_truth", ("relative=method.relative_eps", "relative=False")),
    "graft per row": ("practical", ("tuple(range(now.stack, grad.ndim))", "(-1,)")),
    "graft eps outside the root": ("practical", ("xp.sqrt(v + self.graft_eps)", "xp.sqrt(v) + self.graft_eps")),
    "graft sum weighted by 1 - beta2": (
        "practical",
        (
            "accumulate(state.v, grad * grad, self.graft_beta2)",
            "state.v + (1 - self.graft_beta2) * (grad * grad - state.v)",
        ),
    ),
    "start off by one": ("practical", ("float(step > self.start)", "float(step >= self.start)")),
    "no Nesterov": ("practical", ("u + self.momentum * m if self.nesterov else 1.0 * m", "1.0 * m")),
    "momentum as an average": (
        "practical",
        ("m = self.momentum * state.m + u", "m = self.momentum * state.m + (1 - self.momentum) * u"),
    ),
    "weight decay always after the momentum": (
        "practical",
        ("if self.reads_param and not self.decay_after_momentum", "if False"),
    ),
    "merged from the right": ("practical", ("for d in shape:", "for d in reversed(shape):")),
    "unit axes kept": ("practical", ("if d > 1)", "if d > 0)")),
    "merged only below the limit": ("practical", ("product * d > self.merge", "product * d >= self.merge")),
    "vectors preconditioned": ("practical", ("len(shape) <= 1", "len(shape) < 1")),
    "exclusions without a graft": (
        "practical",
        ("(self.graft is not None and (len(shape) <= 1 or", "((len(shape) <= 1 or"),
    ),
}

ONLINE_MUTANTS = {
    "Ada-FD delta squared under the root": (
        "self._apply(grad, sketch, shift, weight, xp, root=True)",
        "self._apply(grad, sketch._replace(eigenvalues=sketch[1] + self.delta**2), shift, weight, xp, root=True)",
    ),
    "Ada-FD without the root": ("weight, xp, root=True)", "weight, xp)"),
    "FD-SON decays like RFD-SON": (
        "self.learning_rate * _real(step, like) ** 0.5)",
        "self.learning_rate * _real(step, like))",
    ),
    "RFD-SON adds the whole mass": ("0.5 * sketch.escaped", "1.0 * sketch.escaped"),
    "RFD-SON without delta": ("sketch.escaped + self.delta", "sketch.escaped"),
    "sketch of unscaled gradients": ("grad[..., None, :] * weight", "grad[..., None, :]"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", SKETCHY_MUTANTS)
def test_planted_bug_is_caught(name: str) -> None:
    check, change = SKETCHY_MUTANTS[name]
    with pytest.raises((AssertionError, ValueError)):
        CHECKS[check](mutated(sketchy, change))


@pytest.mark.parametrize("name", ONLINE_MUTANTS)
def test_planted_bug_in_a_yardstick_is_caught(name: str) -> None:
    with pytest.raises(AssertionError):
        check_online(mutated(online_sketches, ONLINE_MUTANTS[name]))


def test_planted_bugs_start_from_a_sound_copy() -> None:
    copy: ModuleType = mutated(sketchy)
    for check in CHECKS.values():
        check(copy)
    check_online(mutated(online_sketches))


# ---- fields and arguments -------------------------------------------------------------------------------------------

PRACTICAL_BASE = pr.SShampoo.practical(
    size=2, beta2=0.75, eps=0.25, graft_beta2=0.5, graft_eps=0.25, momentum=0.5, weight_decay=0.25, merge=4
)
KNOBS: tuple[tuple[Any, tuple[int, ...], dict[str, Any]], ...] = (
    (pr.SAdaGrad(size=2, beta2=0.75), (5,), {"size": 3, "beta2": 0.5, "delta": 0.5}),
    (
        pr.SShampoo(size=2, beta2=0.75, eps=0.25),
        (4, 3),
        {"size": 3, "beta2": 0.5, "eps": 0.5, "relative_eps": True, "every": 2, "tail_decay": 0.5},
    ),
    (
        PRACTICAL_BASE,
        (4, 3),
        {
            "size": 3,
            "beta2": 0.5,
            "eps": 0.5,
            "relative_eps": False,
            "every": 2,
            "tail_decay": 0.5,
            "graft": "sgd",
            "graft_beta2": 0.75,
            "graft_eps": 0.5,
            "start": 1,
            "momentum": 0.25,
            "nesterov": False,
            "momentum_ema": True,
            "weight_decay": 0.5,
            "decay_after_momentum": False,
            "merge": 12,
        },
    ),
    (pr.AdaFD(size=2, delta=0.5), (5,), {"size": 3, "delta": 0.25}),
    (pr.FDSON(size=2, delta=0.5, learning_rate=0.5), (5,), {"size": 3, "delta": 0.25, "learning_rate": 0.25}),
    (pr.RFDSON(size=2, delta=0.5, learning_rate=0.5), (5,), {"size": 3, "delta": 0.25, "learning_rate": 0.25}),
)


@pytest.mark.parametrize(("base", "shape", "field", "value"), [(m, s, f, v) for m, s, c in KNOBS for f, v in c.items()])
def test_no_dead_knob(base: Any, shape: tuple[int, ...], field: str, value: Any) -> None:
    grads, param = grads_of(shape, 6, 2), np.ones(shape)
    assert gap(run(base.replace(**{field: value}), grads, param), run(base, grads, param)) > 1e-3


def test_knobs_are_complete() -> None:
    for base, _, changes in KNOBS:
        assert set(changes) | {"solver"} == set(base.symbols) | {"solver"}


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_gram64_makes_the_same_steps(size: int) -> None:
    vectors, matrices = grads_of((4,), 8, 3), grads_of((4, 3), 8, 3)
    _, kappa = truth(vectors, size, 0.75)
    # squaring: the Gram matrix of condition kappa carries n u kappa into each of its eigenvalues
    got = run(pr.SAdaGrad(size=size, beta2=0.75, solver="gram64"), vectors)
    assert gap(got, run(pr.SAdaGrad(size=size, beta2=0.75), vectors)) <= 16 * 5 * U * kappa
    fields = {"size": size, "beta2": 0.75, "eps": 0.25}
    _, kappa = truth(matrices, size, 0.75, 0.25)
    got = run(pr.SShampoo(**fields, solver="gram64"), matrices)
    assert gap(got, run(pr.SShampoo(**fields), matrices)) <= 16 * 7 * U * kappa


def test_practical_excludes_long_axes() -> None:
    method = pr.SShampoo.practical(size=2, momentum=0.0, graft_eps=0.25)
    for shape, axes in (((4097, 1), ()), ((4096, 2), (4096, 2)), ((3, 3, 64, 128), (576, 128)), ((0, 4), ())):
        assert method.axes(shape) == axes
    assert method.replace(graft=None).axes((4097, 1)) == (4097,)
    long = np.ones((4097, 1))
    direction, state = method.update(long, method.init(long), long)
    assert state.sketches == ()
    assert np.allclose(direction, 1 / np.sqrt(0.001 + 0.25), rtol=1e-14)
    assert bool(method.diagnose(state).finite)
    assert method.replace(graft="sgd").diagnose(state._replace(v=None)).finite is None


def test_zero_gradients_stay_zero() -> None:
    for method, shape in [(base, shape) for base, shape, _ in KNOBS]:
        if method.decays:
            method = method.replace(weight_decay=0.0)
        assert not run(method, np.zeros((3, *shape))).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_bad_gradient_spoils_its_member_only(bad: float) -> None:
    for method, shape, _ in KNOBS:
        grads = grads_of((3, *shape), 4, 4)
        spoilt = grads.copy()
        spoilt[1, 1][(0,) * len(shape)] = bad
        x = np.zeros(grads.shape[1:])
        state = clean_state = method.init(x, stack_ndim=1)
        for g, clean in zip(spoilt, grads, strict=True):
            direction, state = method.update(g, state, x)
            expected, clean_state = method.update(clean, clean_state, x)
            assert np.array_equal(direction[[0, 2]], expected[[0, 2]])
        assert np.isnan(direction[1]).all()
        assert method.diagnose(state).finite.tolist() == [True, False, True]


def test_report() -> None:
    method = pr.SShampoo(size=2)
    grads = grads_of((4, 3), 5)
    state = method.init(grads[0])
    for g in grads:
        _, state = method.update(g, state, g)
    report = method.diagnose(state)
    assert [e.shape for e in report.eigenvalues] == [(2,), (2,)]
    assert [int(r) for r in report.rank] == [1, 1]
    assert all(rho > 0 for rho in report.escaped)
    assert bool(report.finite)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pr.SAdaGrad(size=0), "size must be >= 1, got 0"),
        (lambda: pr.SAdaGrad(size=2.0), "size must be a Python int, got 2.0"),
        (lambda: pr.SAdaGrad(size=2, beta2=1.5), "beta2 must be finite and >= 0 and <= 1, got 1.5"),
        (lambda: pr.SAdaGrad(size=2, delta=-1.0), "delta must be finite and >= 0"),
        (lambda: pr.SAdaGrad(size=2, solver="qr"), "solver must be one of 'svd', 'gram64', got 'qr'"),
        (lambda: pr.SShampoo(size=2, eps=float("nan")), "eps must be finite and >= 0"),
        (lambda: pr.SShampoo(size=2, tail_decay=2.0), "tail_decay must be .* or None, got 2.0"),
        (lambda: pr.SShampoo(size=2, relative_eps=1), "relative_eps must be True or False, got 1"),
        (lambda: pr.SShampoo(size=2, every=0), "every must be >= 1, got 0"),
        (lambda: pr.SShampoo.practical(graft="adam"), "graft must be one of 'rmsprop', 'sgd', got 'adam'"),
        (lambda: pr.SShampoo.practical(graft=None, start=1), "start > 0 needs a graft"),
        (lambda: pr.SShampoo.practical(merge=0), "merge must be >= 1"),
        (lambda: pr.FDSON(size=2, delta=0.0, learning_rate=0.0), "learning_rate must be finite and > 0"),
        (lambda: pr.RFDSON(size=2, delta=0.0, learning_rate=0.0), "learning_rate must be finite and > 0"),
        (lambda: pr.AdaFD(size=2, delta=-1.0), "delta must be finite and >= 0"),
        (lambda: pr.SAdaGrad(size=2).init(np.zeros((2, 3))), "takes a parameter with exactly 1 axes"),
        (lambda: pr.SShampoo(size=2).init(np.zeros(())), "takes a parameter with 1 to 64 axes"),
        (lambda: pr.SShampoo(size=2).init(np.zeros((2, 2), "float16")), "needs float32 or float64"),
        (lambda: update_with(pr.SAdaGrad(size=3), (4,), (5,)), "state.sketch.basis must have shape .* got"),
        (lambda: update_with(pr.SShampoo(size=3), (4, 2), (4, 5)), r"state.sketches\[1\].basis must have shape"),
        (lambda: update_with(pr.AdaFD(size=3, delta=1.0), (4,), (5,)), "state.sketch.basis must have shape"),
        (lambda: update_with(pr.SAdaGrad(size=3), (4,), (4,), refresh=False), "refresh=False needs every > 1"),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def update_with(method: Any, first: tuple[int, ...], second: tuple[int, ...], **kwargs: Any) -> Any:
    """An update in one shape with the state of another."""
    return method.update(np.ones(second), method.init(np.ones(first)), np.ones(second), **kwargs)


def test_refresh_overrules_the_counter() -> None:
    grads = grads_of((4, 3), 6, 5)
    method = pr.SShampoo(size=2, eps=0.25, every=3)
    state, by_hand = method.init(grads[0]), method.init(grads[0])
    for t, g in enumerate(grads):
        expected, state = method.update(g, state, g)
        got, by_hand = method.update(g, by_hand, g, refresh=t % 3 == 0)
        assert np.array_equal(got, expected)


def test_routing() -> None:
    assert [pr.SAdaGrad(size=2).takes(s) for s in ((), (3,), (3, 2))] == [False, True, False]
    assert [pr.AdaFD(size=2, delta=1.0).takes(s) for s in ((), (3,), (3, 2))] == [False, True, False]
    assert [pr.SShampoo(size=2).takes(s) for s in ((3,), (3, 2), (3, 2, 2))] == [False, True, True]
    assert [pr.SShampoo.practical().takes(s) for s in ((), (3,), (3, 2))] == [True, True, True]


# ---- real data ------------------------------------------------------------------------------------------------------


def online_loss(method: Any, features: np.ndarray, signs: np.ndarray, lr: float) -> float:
    """Mean logistic loss of one pass in file order, from zero."""
    x, total = np.zeros(features.shape[1]), 0.0
    state = method.init(x)
    for a, y in zip(features, signs, strict=True):
        margin = y * (a @ x)
        total += np.logaddexp(0.0, -margin)
        direction, state = method.update(-y * a / (1 + np.exp(min(margin, 700.0))), state, x)
        x = x - lr * direction
    return float(total / len(signs))


@pytest.mark.deep
@pytest.mark.skipif("PRECOND_REF_DATA" not in os.environ, reason="needs a9a in the folder PRECOND_REF_DATA")
def test_logistic_regression_on_a9a() -> None:
    """The numbers of an independent implementation: whole file, and first 4000 rows at lr 0.1 by size."""
    features, labels = load_libsvm("a9a", 123)
    features = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    signs = np.where(labels > 0, 1.0, -1.0)
    for method, lr, expected in (
        (pr.SAdaGrad(size=10), 10**-0.375, 0.33255),
        (pr.SAdaGrad(size=10, solver="gram64"), 10**-0.375, 0.33255),
        (pr.RFDSON(size=10, delta=0.0, learning_rate=10**-1.75), 10**-1.75, 0.33450),
        (pr.AdaFD(size=10, delta=1.0), 1e-2, 0.35410),
        (pr.FDSON(size=10, delta=1.0, learning_rate=0.1), 0.1, 0.53912),
    ):
        got = online_loss(method, features, signs, lr)
        print(f"\n{method}: {got:.5f}", end="")
        assert abs(got - expected) <= 5.1e-6
    sizes = (1, 2, 3, 5, 10, 20, 40, 125)
    got = [online_loss(pr.SAdaGrad(size=size), features[:4000], signs[:4000], 0.1) for size in sizes]
    print("\nfirst 4000 rows, by size:", dict(zip(sizes, np.round(got, 5).tolist(), strict=True)))
    assert np.all(np.diff(got) < 0)
    assert np.max(np.abs(np.array(got) - [0.4477, 0.4261, 0.4090, 0.3942, 0.3793, 0.3684, 0.3627, 0.3612])) < 1e-4
