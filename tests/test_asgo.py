"""ASGO and DASGO: the vectors, the optimizers they become in the limit, invariances, hard inputs.

Each check takes the module under test, so that `MUTANTS`, copies of it with one mistake, go through the same check.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from conftest import Backend
from helpers import directions, distance, gradients
from mutation import check_vectors, mutated

import precond_ref as pr
from precond_ref.methods import asgo
from precond_ref.numerics import roots

U = 2.0**-53
LOUD = {"beta1": 0.75, "beta2": 0.5, "eps": 0.25}
VECTORS = "vectors"
CHECKS: dict[str, Callable[[Any], None]] = {VECTORS: check_vectors}


def check(function: Callable[[Any], None]) -> Callable[[Any], None]:
    """A test of the module given, to be run on the real one and on mutants."""
    CHECKS[function.__name__] = function
    return function


def bound(grads: np.ndarray, ridge: float) -> float:
    """32 u kappa: two runs, each with 16 u kappa, and kappa <= (sum ||G_t||_F^2 + ridge) / ridge for every V_t.

    ``ridge`` is eps (under the root), eps^2 (outside), or for eps = 0 the least eigenvalue of all V_t.
    """
    return 32 * U * (float(np.sum(grads**2)) + ridge) / ridge


def least(grads: np.ndarray, left: bool = True) -> float:
    """Least eigenvalue of the first gradient's square, hence of every sum V_t."""
    s = np.linalg.svd(grads[0], compute_uv=False)
    return float(s[-1] ** 2) if len(s) == grads.shape[1 if left else 2] else 0.0


def orthogonal(n: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


def theories(lib: Any, eps: float = 0.25) -> list[tuple[Any, tuple[int, int]]]:
    return [(lib.ASGO.theory(eps=eps), (3, 5)), (lib.ASGO.theory(eps=eps, side="right"), (5, 3))]


@check
def other_roots_converge_to_the_definition(lib: Any) -> None:
    for shape in ((3, 5), (5, 3), (6, 4)):
        grads = gradients(shape)
        fields = {**LOUD, "rms": None, "heads": 2 if shape == (6, 4) else None}
        exact = directions(lib.ASGO(**fields), grads)
        for root in ("newton_schulz", "coupled_newton"):
            got = directions(lib.ASGO(**fields, root=root, root_steps=30), grads)
            assert distance(got, exact) <= bound(grads, 0.25)
    # Polar Express: eps is in the norm only, so that the limit has none; V_t >= 2^-t G_1 G_1^T
    grads = gradients((3, 5))
    exact = directions(lib.ASGO(**{**LOUD, "eps": 0.0}, rms=None), grads)
    got = directions(lib.ASGO(**LOUD, rms=None, root="polar_express", root_steps=12), grads)
    assert distance(got, exact) <= bound(grads, least(grads) / 2**7)


# ---- limits ---------------------------------------------------------------------------------------------------------


@check
def first_step_shrinks_singular_values(lib: Any) -> None:
    for (theory, shape), (exact, _) in zip(theories(lib), theories(lib, 0.0), strict=True):
        for rank in (3, 1):
            u, s, vh = np.linalg.svd(gradients(shape, 1)[0], full_matrices=False)
            u, s, vh = u[:, :rank], s[:rank], vh[:rank]
            g = ((u * s) @ vh)[None]
            tolerance = 32 * U * (s[0] / s[-1]) ** 2
            assert distance(directions(exact, g), (u @ vh)[None]) <= tolerance  # rank 1: u v^T
            assert distance(directions(theory, g), ((u * (s / (s + 0.25))) @ vh)[None]) <= tolerance


@check
def first_step_is_that_of_muon_and_shampoo(lib: Any) -> None:
    for shape in ((3, 5), (5, 3), (4, 4)):
        g = gradients(shape, 1)
        tolerance = 32 * U * np.linalg.cond(g[0]) ** 2
        side = "left" if shape[0] < shape[1] else "right"
        shampoo = directions(pr.Shampoo(eps=0.0), g)
        assert distance(directions(lib.ASGO.theory(side=side), g), shampoo) <= tolerance
        muon = directions(pr.Muon(momentum=0.0, nesterov=False, root="svd"), g)  # 0.2 sqrt(max(m, n)) U V^T
        for fields in ({"beta1": 0.75, "beta2": 0.5}, {"beta1": 0.25, "beta2": 0.875}):
            assert distance(directions(lib.ASGO(eps=0.0, **fields), g), muon) <= tolerance


@check
def without_memory_it_is_muon_without_momentum(lib: Any) -> None:
    muon = pr.Muon(momentum=0.0, nesterov=False, root="svd", rms=None)
    for shape in ((3, 5), (5, 3)):
        grads = gradients(shape)
        tolerance = 32 * U * max(np.linalg.cond(g) for g in grads) ** 2
        got = directions(lib.ASGO(beta1=0.0, beta2=0.0, eps=0.0, rms=None), grads)
        assert distance(got, directions(muon, grads)) <= tolerance
        # with momentum V is the gradient's and not the momentum's square: (G G^T)^{-1/2} M is not polar(M)
        got = directions(lib.ASGO(beta1=0.5, beta2=0.0, eps=0.0, rms=None), grads)
        assert distance(got, directions(muon.replace(momentum=0.5), grads)) > 0.1


@check
def one_column_is_full_adagrad(lib: Any) -> None:
    grads = gradients((5, 1))
    for eps in (0.0, 0.25):
        full = directions(pr.FullAdaGrad(eps=eps), grads[:, :, 0])[..., None]
        # the same V; only the order of its sums may differ, and with eps = 0 its least live eigenvalue matters
        values = [np.linalg.svd(grads[:t, :, 0], compute_uv=False) for t in range(1, 8)]
        kappa = max(float(s[0] / s[-1]) ** 2 for s in values)
        assert distance(directions(lib.ASGO.theory(eps=eps), grads), full) <= 32 * U * kappa


@check
def one_row_is_adagrad_norm(lib: Any) -> None:
    grads = gradients((1, 5))
    norms = np.sqrt(np.cumsum(np.sum(grads**2, axis=(1, 2))))[:, None, None]
    for eps in (0.0, 0.25):
        assert distance(directions(lib.ASGO.theory(eps=eps), grads), grads / (norms + eps)) <= 32 * U
        assert distance(directions(lib.DASGO.theory(eps=eps), grads), grads / (norms + eps)) <= 32 * U


@check
def diagonal_gradients_make_it_adagrad(lib: Any) -> None:
    diagonal = gradients((4,))
    grads = np.stack([np.diag(d) for d in diagonal])
    expected = directions(pr.AdaGrad(eps=0.25), diagonal)
    got = directions(lib.ASGO.theory(eps=0.25), grads)
    assert distance(got, np.stack([np.diag(d) for d in expected])) <= 32 * U


@check
def fixed_singular_vectors_make_it_adagrad_on_singular_values(lib: Any) -> None:
    q, p = orthogonal(4, 1), orthogonal(6, 2)[:, :4]
    values = 1 + np.abs(gradients((4,)))
    grads = np.stack([(q * d) @ p.T for d in values])
    expected = np.stack([(q * d) @ p.T for d in directions(pr.AdaGrad(eps=0.25), values)])
    assert distance(directions(lib.ASGO.theory(eps=0.25), grads), expected) <= bound(grads, least(grads))


@check
def dasgo_theory_of_one_column_is_adagrad(lib: Any) -> None:
    grads = gradients((5, 1))
    expected = directions(pr.AdaGrad(eps=0.25), grads)
    assert distance(directions(lib.DASGO.theory(eps=0.25), grads), expected) <= 8 * U


@check
def dasgo_is_the_diagonal_of_right_asgo(lib: Any) -> None:
    # columns of one gradient that stay orthogonal: G^T G is diagonal, and the two agree
    grads = np.stack([orthogonal(5, s)[:, :3] * np.array([1.0, 2.0, 4.0]) for s in range(5)])
    for rms in (None, 0.25):
        fields = {**LOUD, "rms": rms}
        got, full = directions(lib.DASGO(**fields), grads), directions(lib.ASGO(side="right", **fields), grads)
        assert distance(got, full) <= bound(grads, 0.25)
    assert distance(*(directions(m, gradients((5, 3))) for m in (lib.DASGO(**LOUD), lib.ASGO(**LOUD)))) > 0.05


@check
def heads_are_separate_row_blocks(lib: Any) -> None:
    grads = gradients((6, 4))
    whole = directions(lib.ASGO(**LOUD, rms=None, heads=3), grads)
    parts = [directions(lib.ASGO(**LOUD, rms=None, side="left"), grads[:, i : i + 2]) for i in (0, 2, 4)]
    assert distance(whole, np.concatenate(parts, axis=1)) <= bound(grads, 0.25)
    assert distance(whole, directions(lib.ASGO(**LOUD, rms=None, side="left"), grads)) > 0.05
    one = directions(lib.ASGO(**LOUD, rms=None, heads=1), grads)
    assert np.array_equal(one, directions(lib.ASGO(**LOUD, rms=None, side="left"), grads))


# ---- invariances ----------------------------------------------------------------------------------------------------


@check
def dasgo_columns_have_their_own_scale(lib: Any) -> None:
    grads, s = gradients((5, 3)), np.array([0.125, 2.0, 16.0])
    raw = lib.DASGO(**{**LOUD, "eps": 0.0}, rms=None)
    assert distance(directions(raw, grads * s), directions(raw, grads)) <= 64 * U
    one_sided = lib.ASGO(**{**LOUD, "eps": 0.0}, rms=None, side="right")
    assert distance(directions(one_sided, grads * s), directions(one_sided, grads)) > 0.1
    rows, t = lib.DASGO.theory(), np.array([0.125, 2.0, 16.0, 1.0, 4.0])[:, None]
    assert distance(directions(rows, t * grads), directions(rows, grads)) <= 64 * U


@check
def transposition(lib: Any) -> None:
    method = lib.ASGO(**LOUD)
    for shape in ((3, 5), (5, 3)):
        grads = gradients(shape)
        got = np.swapaxes(directions(method, np.swapaxes(grads, 1, 2)), 1, 2)
        assert distance(got, directions(method, grads)) <= bound(grads, 0.25)
        sides = [lib.ASGO.theory(eps=0.25, side=side) for side in ("left", "right")]
        got = np.swapaxes(directions(sides[1], np.swapaxes(grads, 1, 2)), 1, 2)
        assert distance(got, directions(sides[0], grads)) <= bound(grads, 0.0625)
        got = np.swapaxes(directions(sides[0], np.swapaxes(grads, 1, 2)), 1, 2)
        assert distance(got, directions(sides[0], grads)) > 0.05
    square = gradients((4, 4))
    got = np.swapaxes(directions(method, np.swapaxes(square, 1, 2)), 1, 2)
    assert distance(got, directions(method, square)) > 0.05  # m = n is right, and so is its transpose
    assert distance(directions(method, square), directions(method.replace(side="right"), square)) == 0


@check
def block_diagonal_gradients_decouple(lib: Any) -> None:
    a, b = gradients((2, 3)), gradients((3, 4), seed=1)
    both = np.zeros((len(a), 5, 7))
    both[:, :2, :3], both[:, 2:, 3:] = a, b

    def gap(method: Any) -> float:
        joined = directions(method, both)
        expected = np.zeros_like(joined)
        expected[:, :2, :3], expected[:, 2:, 3:] = directions(method, a), directions(method, b)
        return distance(joined, expected)

    assert gap(lib.ASGO.theory(eps=0.25)) <= bound(both, 0.0625)
    assert gap(lib.ASGO(**LOUD, rms=None)) <= bound(both, 0.25)
    assert gap(lib.DASGO(**LOUD, rms=None)) <= 64 * U
    assert gap(lib.DASGO.theory(eps=0.25)) <= 64 * U
    assert gap(lib.ASGO(**LOUD)) > 0.02  # the norm of the whole update is shared


@check
def zero_rows_and_columns_stay_zero(lib: Any) -> None:
    grads = gradients((3, 5))
    padded = np.zeros((len(grads), 4, 7))
    padded[:, :3, :5] = grads
    for method, ridge in (
        (lib.ASGO.theory(eps=0.25), 0.0625),
        (lib.ASGO.theory(), least(grads)),
        (lib.ASGO(**LOUD, rms=None), 0.25),
        (lib.DASGO(**LOUD, rms=None), 0.25),
        (lib.DASGO.theory(eps=0.25), 0.0625),
    ):
        got = directions(method, padded)
        assert np.all(got[:, 3:] == 0)
        assert np.all(got[:, :, 5:] == 0)
        assert distance(got[:, :3, :5], directions(method, grads)) <= bound(grads, ridge)
    scaled = directions(lib.ASGO(**LOUD), padded)[:, :3, :5]
    assert distance(scaled, directions(lib.ASGO(**LOUD), grads)) > 0.02  # rms counts the added entries


@check
def column_blocks_share_v_and_row_blocks_may_not(lib: Any) -> None:
    grads = gradients((3, 6))
    for method in (lib.ASGO.theory(eps=0.25), lib.ASGO(**LOUD, rms=None)):
        left_half = directions(method, grads)[:, :, :3]
        assert distance(left_half, directions(method.replace(side="left"), grads[:, :, :3])) > 0.05
    theory = lib.ASGO.theory(eps=0.25)
    basis = orthogonal(8, 4)
    top, bottom = gradients((2, 4)) @ basis[:4], gradients((3, 4), seed=1) @ basis[4:]  # G_1 G_2^T = 0
    for rows, decouple in ((np.concatenate([top, bottom], axis=1), True), (gradients((5, 8)), False)):
        got = directions(theory, rows)
        alone = np.concatenate([directions(theory, rows[:, :2]), directions(theory, rows[:, 2:])], axis=1)
        assert (distance(got, alone) <= bound(rows, 0.0625)) == decouple
        assert decouple or distance(got, alone) > 0.02


@check
def a_constant_gradient_gives_its_polar_factor_over_sqrt_t(lib: Any) -> None:
    for rank in (1, 2, 3):
        u, s, vh = np.linalg.svd(gradients((3, 5), 1)[0], full_matrices=False)
        g = (u[:, :rank] * s[:rank]) @ vh[:rank]
        got = directions(lib.ASGO.theory(), np.stack([g] * 6))
        expected = np.stack([u[:, :rank] @ vh[:rank] / math.sqrt(t) for t in range(1, 7)])
        assert distance(got, expected) <= 32 * U * (s[0] / s[rank - 1]) ** 2


@check
def raw_updates_are_bounded_if_momentum_forgets_faster(lib: Any) -> None:
    b1, b2 = 0.75, 0.625  # b1^2 < b2
    limit = (1 - b1) / math.sqrt(1 - b2) / math.sqrt(1 - b1**2 / b2)
    method = lib.ASGO(beta1=b1, beta2=b2, eps=0.0, rms=None)
    worst = np.max(
        [np.linalg.norm(directions(method, gradients((3, 5), 20, seed=s)), 2, axis=(1, 2)) for s in range(5)]
    )
    assert 0.5 * limit < worst <= limit
    shrinking = (b2 / b1) ** np.arange(60.0)  # g_k proportional to the weight in M over that in V: the worst case
    assert 0.99 * limit < directions(method, shrinking[:, None, None])[-1, 0, 0] <= limit
    # the defaults have b1^2 = 0.81 > b2 = 0.8: after one gradient and then none the raw update grows
    quiet = np.zeros((500, 2, 3))
    quiet[0] = gradients((2, 3), 1)[0]
    raw = directions(lib.ASGO(eps=0.0, rms=None), quiet)
    growth = np.linalg.norm(raw[-1], 2) / np.linalg.norm(raw[0], 2)
    assert math.isclose(growth, (0.81 / 0.8) ** (499 / 2), rel_tol=1e-9)
    assert growth > 20
    assert math.isclose(np.sqrt(np.mean(directions(lib.ASGO(eps=0.0), quiet)[-1] ** 2)), 0.2, rel_tol=16 * U)


@check
def rms_is_exact(lib: Any) -> None:
    for shape in ((3, 5), (5, 3), (4, 4), (6, 1), (1, 6)):
        grads = gradients(shape) * 10.0 ** np.arange(-3, 4)[:, None, None]
        for method in (lib.ASGO(), lib.DASGO(), lib.ASGO(every=3), lib.DASGO(**LOUD)):
            norms = np.linalg.norm(directions(method, grads), axis=(1, 2))
            assert np.all(np.abs(norms / (0.2 * math.sqrt(math.prod(shape))) - 1) <= 32 * U)


@check
def rank_and_trace_are_those_of_the_gradients(lib: Any) -> None:
    rng = np.random.default_rng(6)
    grads = rng.integers(-3, 4, (4, 6, 1)) * rng.integers(-3, 4, (4, 1, 5)) * 1.0  # rank one, exact
    method = lib.ASGO.theory(eps=0.25)
    state = method.init(grads[0])
    for t, g in enumerate(grads, start=1):
        _, state = method.update(g, state, g)
        report = method.diagnose(state)
        assert np.array_equal(state.gram, state.gram.T)
        assert int(report.rank) == t
        nuclear = np.sum(np.linalg.svd(np.concatenate(list(grads[:t]), axis=1), compute_uv=False))
        assert abs(report.root_trace / nuclear - 1) <= 16 * math.sqrt(U)


# ---- when the root is renewed ---------------------------------------------------------------------------------------


def inverse_root(V: np.ndarray, eps: float) -> np.ndarray:
    return np.linalg.inv(scipy.linalg.sqrtm(V + eps * np.eye(len(V))))


@check
def root_is_renewed_at_updates_1_and_1_plus_k(lib: Any) -> None:
    grads = gradients((3, 5), 8)
    for due, call in (
        ([True, False, False, True, False, False, True, False], {}),
        ([True] * 8, {"refresh": True}),
        ([False] * 8, {"refresh": False}),
    ):
        method = lib.ASGO(**LOUD, every=3, rms=None)
        state = method.init(grads[0])
        kept, V, M = np.eye(3), np.zeros((3, 3)), np.zeros((3, 5))
        for g, fresh in zip(grads, due, strict=True):
            V, M = 0.5 * V + 0.5 * g @ g.T, 0.75 * M + 0.25 * g
            kept = inverse_root(V, 0.25) if fresh else kept
            direction, state = method.update(g, state, g, **call)
            assert np.linalg.norm(roots.form(state.root) - kept) <= bound(grads, 0.25) * np.linalg.norm(kept)
            assert np.linalg.norm(state.gram - V) <= 16 * U * np.linalg.norm(V)
            assert np.linalg.norm(direction - kept @ M) <= bound(grads, 0.25) * np.linalg.norm(direction)


@check
def zero_gradients_stay_zero(lib: Any) -> None:
    iterative = [lib.ASGO(root=r, eps=0.0) for r in ("newton_schulz", "polar_express", "coupled_newton")]
    exact = [lib.ASGO(), lib.ASGO(eps=0.0), lib.ASGO(heads=2), lib.ASGO(every=3), lib.ASGO.theory()]
    for method in (*iterative, *exact, lib.DASGO(), lib.DASGO(eps=0.0), lib.DASGO.theory()):
        state = method.init(np.zeros((4, 3)))
        for _ in range(2):
            direction, state = method.update(np.zeros((4, 3)), state, np.zeros((4, 3)))
            assert np.array_equal(direction, np.zeros((4, 3)))
        direction, _ = method.update(gradients((4, 3), 1)[0], state, np.zeros((4, 3)))
        assert np.all(np.isfinite(direction))
        assert np.any(direction)


@pytest.mark.parametrize("name", CHECKS)
def test_holds(name: str) -> None:
    CHECKS[name](asgo)


# ---- mutants --------------------------------------------------------------------------------------------------------


def edit(line: str, *pairs: tuple[str, str]) -> tuple[str, str]:
    """A line of the source and what it becomes."""
    new = line
    for a, b in pairs:
        assert a in new, f"{a!r} is not in {new!r}"
        new = new.replace(a, b)
    return line, new


M = "m = ema(state.m, grad, self.beta1)  # (M)\n        gram"
V = "gram = ema(state.gram, gram_of(g if left else t(g, xp), xp), self.beta2)"
U_OF = "u, law = self._blocks(m, xp), roots.Law(-0.5, self.eps)"
P = "root, w = roots.renewed(due, gram, law, state.root, xp=xp)  # (P)"
ITERATED = "partial(roots.inverse_sqrt, gram, self.eps, self.root, self.root_steps, xp=xp)"
SIDE = 'self.side == "left" or (self.side == "smaller" and m < n)'
DUE = "now.due"
RMS = "u = scale_to_rms(u, self.rms, (-2, -1), xp)  # (W)\n        elif"
SUM = "gram = state.gram + (grad @ t(grad, xp) if left"
LAMBDA = "law = roots.Law(-1.0, self.eps, root=True)"
LAMBDA_ROOT = "root = roots.decompose(gram, law, xp=xp)  # (2)"
DIRECTION = "direction = roots.apply(grad, {0 if left else 1: root}, law, 1.0, xp=xp)"
THEORY_SIDE = 'k = shape[0] if self.side == "left" else shape[1]'
READS = edit("    theory: ClassVar[type[ASGOTheory]]", ("    theory", "    reads_param = True\n    theory"))
DASGO_READS = edit("    theory: ClassVar[type[DASGOTheory]]", ("    theory", "    reads_param = True\n    theory"))
DASGO_M = "m = ema(state.m, grad, self.beta1)  # (M)\n        v"
DASGO_V = "v = ema(state.v, xp.sum(grad * grad, axis=-2), self.beta2)"
DASGO_U = "u = m / _infinite_if_zero(xp.sqrt(v + self.eps), xp)[..., None, :]"
DASGO_RMS = "u = scale_to_rms(u, self.rms, (-2, -1), xp)  # (W)\n        return u, DASGOState"
ROWS = "d = state.d + xp.sum(grad * grad, axis=-1)"
ROWS_U = "direction = grad / _infinite_if_zero(xp.sqrt(d) + self.eps, xp)[..., None]"

total = ("ema(", "(lambda old, new, decay: old + new)(")
undamped = ("ema(", "(lambda old, new, decay: decay * old + new)(")
unguarded = ("scale_to_rms(u,", "(lambda u, r, a, xp: u * (r * u.size**0.5 / xp.linalg.norm(u)))(u,")
unscaled = ("scale_to_rms(u, self.rms, (-2, -1), xp)", "u")
side_max = "self.rms * math.sqrt(max(grad.shape[-2:]) / (grad.shape[-2] * grad.shape[-1])),"
MUON, SCHEDULE = "without_memory_it_is_muon_without_momentum", "root_is_renewed_at_updates_1_and_1_plus_k"
CONSTANT = "a_constant_gradient_gives_its_polar_factor_over_sqrt_t"
HEADS = "heads_are_separate_row_blocks"
OTHERS = "other_roots_converge_to_the_definition"
COLUMN, DASGO_COLUMN = "one_column_is_full_adagrad", "dasgo_theory_of_one_column_is_adagrad"

MUTANTS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    # ASGO
    "exponent -1/4": (VECTORS, (edit(U_OF, ("-0.5", "-0.25")),)),
    "exponent -1": (MUON, (edit(U_OF, ("-0.5", "-1.0")),)),
    "eps outside the root": (VECTORS, (edit(U_OF, ("-0.5, self.eps", "-1.0, self.eps, root=True")),)),
    "eps squared": (VECTORS, (edit(U_OF, ("self.eps", "self.eps**2")),)),
    "eps ignored": (VECTORS, (edit(U_OF, ("self.eps", "0.0")),)),
    "V a sum": (VECTORS, (edit(V, total),)),
    "V without memory": (VECTORS, (edit(V, ("state.gram", "0 * state.gram")),)),
    "V without (1 - beta2)": (VECTORS, (edit(V, undamped),)),
    "V from M": (MUON, (edit(V, ("gram = ", "g = self._blocks(m, xp)\n        gram = ")),)),
    "V bias-corrected": (VECTORS, (edit(P, (" gram,", " gram / (1 - self.beta2 ** (state.step + 1)),")),)),
    "V_{t-1}": (MUON, (edit(P, (" gram,", " state.gram,")),)),
    "V_{t-1} in a kept root": (SCHEDULE, (edit(P, (" gram,", " state.gram,")),)),
    "diagonal of V": (VECTORS, (edit(P, (" gram,", " roots.eye_like(xp, gram) * gram,")),)),
    "M without (1 - beta1)": ("raw_updates_are_bounded_if_momentum_forgets_faster", (edit(M, undamped),)),
    "M bias-corrected": (VECTORS, (edit(U_OF, ("_blocks(m,", "_blocks(m / (1 - self.beta1 ** (state.step + 1)),")),)),
    "no momentum": (VECTORS, (edit(U_OF, ("_blocks(m,", "_blocks(grad,")),)),
    "Nesterov": (VECTORS, (edit(U_OF, ("_blocks(m,", "_blocks(ema(m, grad, self.beta1),")),)),
    "betas exchanged": (VECTORS, (edit(M, ("beta1", "beta2")), edit(V, ("beta2", "beta1")))),
    "parameter leaks in": (VECTORS, (edit(M, ("grad,", "grad + 0.125 * param,")), READS)),
    "larger side": (VECTORS, (edit(SIDE, ("m < n", "m > n")),)),
    "ties left": ("transposition", (edit(SIDE, ("m < n", "m <= n")),)),
    "always left": ("transposition", (edit(SIDE, ("m < n", "True")),)),
    "renewed one late": (SCHEDULE, (edit(DUE, ("now.due", "self.due(state.step - 1)")),)),
    "renewed one early": (VECTORS, (edit(DUE, ("now.due", "self.due(now.step)")),)),
    "renewed always": (SCHEDULE, (edit(P, ("state.root", "None")),)),
    "refresh ignored": (SCHEDULE, (edit(DUE, ("now.due", "self.due(state.step)")),)),
    "rms missing": ("rms_is_exact", (edit(RMS, unscaled),)),
    "rms with max(m, n)": ("rms_is_exact", (edit(RMS, ("self.rms,", side_max)),)),
    "rms over rows": (VECTORS, (edit(RMS, ("(-2, -1)", "(-1,)")),)),
    "rms unguarded": ("zero_gradients_stay_zero", (edit(RMS, unguarded),)),
    "doubled": ("first_step_is_that_of_muon_and_shampoo", (edit(RMS, ("self.rms", "2 * self.rms")),)),
    "iterations without eps": (OTHERS, (edit(ITERATED, ("self.eps", "0.0")),)),
    "iterations of V_{t-1}": (OTHERS, (edit(ITERATED, (" gram,", " state.gram,")),)),
    "one iteration for all": (OTHERS, (edit(ITERATED, ("self.root,", '"newton_schulz",')),)),
    "heads exchange V": (HEADS, (edit(P, (" gram,", " gram[..., ::-1, :, :] if self.heads else gram,")),)),
    "heads interleaved": (
        HEADS,
        (
            edit(
                "xp.reshape(matrix, (*stack, self.heads, m // self.heads, n))",
                ("self.heads, m // self.heads, n))", "m // self.heads, self.heads, n))"),
                ("xp.reshape(", "xp.moveaxis(xp.reshape("),
                ("n))", "n)), -2, -3)"),
            ),
        ),
    ),
    # Algorithm 1
    "theory: exponent -1/4": (CONSTANT, (edit(LAMBDA, ("-1.0, self.eps, root=True", "-0.25, self.eps")),)),
    "theory: exponent -1": (CONSTANT, (edit(LAMBDA, ("-1.0, self.eps, root=True", "-1.0, self.eps")),)),
    "theory: eps under the root": (VECTORS, (edit(LAMBDA, ("-1.0, self.eps, root=True", "-0.5, self.eps")),)),
    "theory: no pseudo-inverse": ("zero_rows_and_columns_stay_zero", (edit(DIRECTION, ("xp=xp)", "xp=xp) + 0.125")),)),
    "theory: average": (CONSTANT, (edit(SUM, ("state.gram + ", "0.9 * state.gram + 0.1 * ")),)),
    "theory: no memory": (CONSTANT, (edit(SUM, ("state.gram", "0 * state.gram")),)),
    "theory: V_{t-1}": (COLUMN, (edit(LAMBDA_ROOT, ("(gram,", "(state.gram,")),)),
    "theory: divided by n": ("one_row_is_adagrad_norm", (edit(SUM, ("+ (", "+ 1 / grad.shape[-1] * (")),)),
    "theory: diagonal of V": (VECTORS, (edit(LAMBDA_ROOT, ("(gram,", "(gram * roots.eye_like(xp, gram),")),)),
    "theory: other side": (
        VECTORS,
        (edit('xp, left = now.xp, self.side == "left"', ("==", "!=")), edit(THEORY_SIDE, ("==", "!="))),
    ),
    "theory: doubled": (VECTORS, (edit(DIRECTION, ("direction = ", "direction = 2 * ")),)),
    "theory: ascent": ("diagonal_gradients_make_it_adagrad", (edit(DIRECTION, ("direction = ", "direction = -")),)),
    # DASGO
    "dasgo: rows": (VECTORS, (edit(DASGO_V, ("-2", "-1")), edit(DASGO_U, ("None, :]", "None]")))),
    "dasgo: eps outside the root": (VECTORS, (edit(DASGO_U, ("(v + self.eps)", "(v) + self.eps")),)),
    "dasgo: exponent -1": ("dasgo_columns_have_their_own_scale", (edit(DASGO_U, ("xp.sqrt", "")),)),
    "dasgo: sum": (VECTORS, (edit(DASGO_V, total),)),
    "dasgo: mean over rows": ("dasgo_is_the_diagonal_of_right_asgo", (edit(DASGO_V, ("xp.sum", "xp.mean")),)),
    "dasgo: v_{t-1}": (VECTORS, (edit(DASGO_U, ("v + ", "state.v + ")),)),
    "dasgo: v from M": (VECTORS, (edit(DASGO_V, ("grad * grad", "m * m")),)),
    "dasgo: no momentum": (VECTORS, (edit(DASGO_U, ("u = m", "u = grad")),)),
    "dasgo: parameter leaks in": (VECTORS, (edit(DASGO_M, ("grad,", "grad + 0.125 * param,")), DASGO_READS)),
    "dasgo: rms missing": ("rms_is_exact", (edit(DASGO_RMS, unscaled),)),
    "dasgo: rms with max(m, n)": ("rms_is_exact", (edit(DASGO_RMS, ("self.rms,", side_max)),)),
    "dasgo: rms unguarded": ("zero_gradients_stay_zero", (edit(DASGO_RMS, unguarded),)),
    "dasgo theory: columns": (DASGO_COLUMN, (edit(ROWS, ("-1", "-2")), edit(ROWS_U, ("None]", "None, :]")))),
    "dasgo theory: eps under the root": (DASGO_COLUMN, (edit(ROWS_U, ("(d) + self.eps", "(d + self.eps)")),)),
    "dasgo theory: average": ("one_row_is_adagrad_norm", (edit(ROWS, ("state.d + ", "0.9 * state.d + 0.1 * ")),)),
    "dasgo theory: no memory": ("one_row_is_adagrad_norm", (edit(ROWS, ("state.d", "0 * state.d")),)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str) -> None:
    caught_by, edits = MUTANTS[name]
    planted = mutated(asgo, *edits)
    with np.errstate(all="ignore"), pytest.raises((AssertionError, ValueError)):  # another shape is refused at once
        CHECKS[caught_by](planted)


def test_the_copy_without_a_mistake_passes() -> None:
    copy = mutated(asgo)
    assert copy.ASGO is not asgo.ASGO
    assert pr.list_methods()["ASGO"] is asgo.ASGO
    for name in {caught_by for caught_by, _ in MUTANTS.values()}:
        CHECKS[name](copy)


# ---- hard inputs, on every backend ----------------------------------------------------------------------------------


def stacked_run(backend: Backend, method: Any, grads: np.ndarray, dtype: str = "float64") -> tuple[np.ndarray, Any]:
    """Directions of stacks, (steps, members, m, n), and the report after the last."""
    update = backend.update(method)
    param = backend.asarray(np.zeros(grads.shape[1:]), dtype)
    state = method.init(param, stack_ndim=grads.ndim - 3)
    out = []
    with np.errstate(invalid="ignore", over="ignore"):
        for g in grads:
            direction, state = update(backend.asarray(g, dtype), state, param)
            out.append(backend.numpy(direction).astype(float))
        report = method.diagnose(state)
    return np.stack(out), type(report)(*(backend.numpy(a) for a in report))


@pytest.mark.eager
@pytest.mark.parametrize("method", [pr.ASGO(), pr.ASGO(root="polar_express"), pr.DASGO()], ids=str)
def test_rms_of_tiny_and_huge_gradients_in_float32(backend: Backend, method: Any) -> None:
    # at 1e-25 the squares vanish and eps alone is left of V; at 1e18 they are near the largest float32
    scales = np.array([1e-25, 1e-12, 1e12, 1e18])
    got, _ = stacked_run(backend, method, gradients((4, 3, 5), 2) * scales[:, None, None], "float32")
    rms = np.sqrt(np.mean(got**2, axis=(2, 3)))
    assert np.all(np.abs(rms - 0.2) <= 16 * 2**-24 * 0.2)


@pytest.mark.eager
@pytest.mark.parametrize(
    "method", [pr.ASGO(), pr.ASGO(heads=3), pr.ASGO.theory(), pr.DASGO(), pr.DASGO.theory()], ids=str
)
def test_squares_that_overflow_are_reported(backend: Backend, method: Any) -> None:
    grads = gradients((3, 3, 5), 1)
    grads[0, 1] *= 1e25  # its square is infinite in float32
    got, report = stacked_run(backend, method, grads, "float32")
    assert np.all(np.isfinite(got[0, [0, 2]]))
    assert report.finite.tolist() == [True, False, True]
    if hasattr(report, "eigenvalues"):
        assert np.all(np.isnan(got[0, 1]))
        spectra = report.eigenvalues.reshape(3, -1)
        assert np.isnan(spectra).any(axis=1).tolist() == [False, True, False]
        assert np.isnan(report.root_trace.reshape(3, -1)).any(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize(("method", "axis"), [(pr.DASGO(rms=None), 1), (pr.DASGO.theory(), 0)], ids=["rows", "columns"])
@pytest.mark.parametrize("bad", [math.inf, math.nan], ids=str)
def test_the_scale_says_where_a_bad_entry_was(bad: float, method: Any, axis: int) -> None:
    grad = gradients((4, 5), 1)[0]
    grad[1, 2] = bad
    with np.errstate(invalid="ignore"):
        _, state = method.update(grad, method.init(grad), grad)
    assert np.flatnonzero(~np.isfinite(method.diagnose(state).scale)).tolist() == [1 + axis]


def test_no_eps_is_the_pseudo_inverse_in_dasgo_too() -> None:
    tiny = np.full((2, 3), 1e-25, dtype=np.float32)  # the squares vanish, the gradient does not
    raw = pr.DASGO(eps=0.0, rms=None)
    for method in (pr.DASGO(eps=0.0), raw, pr.DASGO.theory(), pr.ASGO(eps=0.0), pr.ASGO.theory()):
        direction, _ = method.update(tiny, method.init(tiny), tiny)
        assert np.array_equal(direction, np.zeros((2, 3)))


# ---- refusals, states, reports --------------------------------------------------------------------------------------


def test_defaults() -> None:
    assert pr.ASGO() == pr.ASGO(
        beta1=0.9, beta2=0.8, eps=1e-10, side="smaller", rms=0.2, root="eigh", root_steps=10, every=1, heads=None
    )
    assert pr.DASGO() == pr.DASGO(beta1=0.9, beta2=0.95, eps=1e-8, rms=0.2)
    assert pr.ASGO.theory() == pr.ASGO.theory(eps=0.0, side="left")
    assert pr.DASGO.theory() == pr.DASGO.theory(eps=0.0)


def test_reports() -> None:
    grads = gradients((3, 5), 4)
    for method, rows in ((pr.DASGO(**LOUD), False), (pr.DASGO.theory(), True)):
        state = method.init(grads[0])
        for g in grads:
            _, state = method.update(g, state, g)
        squares = np.sum(grads**2, axis=2 if rows else 1)
        weights = np.ones(4) if rows else 0.5 ** np.arange(4, 0, -1)
        assert np.allclose(method.diagnose(state).scale, np.sqrt(weights @ squares), rtol=16 * U, atol=0)
    for shape in ((0, 3), (3, 0), (0, 0)):
        for method in (pr.ASGO(), pr.ASGO(every=2), pr.ASGO.theory(), pr.DASGO(), pr.DASGO.theory()):
            report = method.diagnose(method.init(np.zeros(shape)))
            assert bool(report.finite)
    method = pr.ASGO(heads=2, every=2)
    report = method.diagnose(method.init(np.zeros((2, 4, 5)), stack_ndim=1))
    assert (report.eigenvalues.shape, report.root_trace.shape, report.finite.shape) == ((2, 2, 2), (2, 2), (2,))


def check_a_zero_beside_what_is_not_finite(lib: Any) -> None:
    """A column (row) without a gradient so far is NaN too, with the rest of its member."""
    for method in (lib.DASGO(eps=0.0, rms=None), lib.DASGO.theory()):
        for bad in (np.nan, np.inf):
            grad = np.asarray([[bad, 0.0], [0.0, 0.0]])
            with np.errstate(invalid="ignore"):
                assert np.isnan(method.update(grad, method.init(grad), grad)[0]).all()


def test_a_zero_beside_what_is_not_finite() -> None:
    check_a_zero_beside_what_is_not_finite(pr)


def test_planted_zero_beside_what_is_not_finite() -> None:
    planted = mutated(asgo, (" + bad_as_nan(diagonal, 1, xp)[..., None]", ""))
    with pytest.raises(AssertionError):
        check_a_zero_beside_what_is_not_finite(planted)
