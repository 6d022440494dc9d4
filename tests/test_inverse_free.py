"""IF-Shampoo: laws, fixed points, rates, structures, half precision, the authors' package, planted bugs."""

from __future__ import annotations

import dataclasses
import warnings

import mpmath
import numpy as np
import pytest
import root_free_oracle as oracle
import scipy.linalg
from helpers import distance as gap
from mutation import mutated
from root_free_oracle import along, kron, noisy, normal, positive, run, train, transformed

import precond_ref as pr
from precond_ref.methods import inverse_free

U = 2**-53
LOUD = {
    "beta2": 0.25,
    "damping": 0.25,
    "momentum": 0.5,
    "riemannian_momentum": 0.75,
    "weight_decay": 0.125,
    "batch_size": 2,
}
PLAIN = {"beta2": 0.25, "damping": 0.25, "momentum": 0.0, "riemannian_momentum": 0.0, "clip": False}
STRUCTURES = (
    "dense",
    "diagonal",
    "block-diagonal(2)",
    "tril",
    "triu",
    "tril-toeplitz",
    "triu-toeplitz",
    "hierarchical(1,2)",
)
each_structure = pytest.mark.parametrize("structure", STRUCTURES)


def start_at(method, param, factors):
    """The initial state with other factors."""
    return method.init(param)._replace(factors=tuple(factors))


def members(structure, dims, seed=0):
    """Well-conditioned matrices of the class."""
    result = []
    for i, d in enumerate(dims):
        e = oracle.basis(structure, d)
        x = np.tensordot(normal(len(e), seed=seed + i), e, 1)
        result.append(np.eye(d) + 0.5 * x / np.linalg.norm(x, 2))
    return result


# ---- checks: each takes the class, right or mutated ----


def check_oracle(cls):
    cases = [
        ((3, 4), {}, None),
        ((3, 4), {"clip": False, "beta2": 0.0625}, None),
        ((3, 4), {"every": 2, "momentum": 0.0}, None),
        ((3, 4), {"riemannian_momentum": 0.0}, ("tril", "hierarchical(1,2)")),
        ((4, 3), {}, ("block-diagonal(2)", "triu-toeplitz")),
        ((5,), {"batch_size": 0.5}, None),
        ((2, 3, 2), {}, None),
        ((2, 3, 2, 2), {"weight_decay": 0.0}, ("dense", "diagonal", "triu", "tril-toeplitz")),
    ]
    for shape, changes, structure in cases:
        fields = {**LOUD, **changes}
        grads, params = normal(6, *shape, seed=1), normal(6, *shape, seed=2)
        expected, factors, momenta = oracle.inverse_free(grads, params, structure=structure, **fields)
        got, state = run(cls(**fields, structure=structure or "dense"), grads, params)
        # Six steps of sums of at most D = 24 products, conditioned below 10 as the clip keeps the factors near I.
        assert gap(got, expected) <= 10 * 6 * 24 * U, (shape, changes)
        assert gap(state.factors, factors) <= 10 * 6 * 24 * U
        if state.momenta is not None:
            assert gap(state.momenta, momenta) <= 10 * 6 * 24 * U


def check_statistic(cls):
    grads, params = normal(5, 3, 2, seed=1), normal(5, 3, 2, seed=2)
    statistics = normal(5, 4, 3, 2, seed=3)
    expected, _, _ = oracle.inverse_free(grads, params, statistics=statistics, **LOUD)
    assert gap(run(cls(**LOUD), grads, params, statistics=statistics)[0], expected) <= 10 * 5 * 24 * U


def check_affine(cls):
    """L1 and L13: W = A V M^T, K = A^-1 and M^-1 at the start, no damping: the same path and the same m."""
    targets, start = normal(100, 4, 3, seed=1), normal(4, 3, seed=2)
    method = cls(**{**LOUD, "damping": 0.0})
    maps = members("dense", (4, 3), seed=3)
    inverses = [np.linalg.inv(a) for a in maps]
    w, state = train(method, start, noisy(targets), 100, 2**-6)
    v0 = along(start, inverses)
    v, other = train(method, v0, transformed(noisy(targets), maps), 100, 2**-6, start_at(method, v0, inverses))
    assert gap([along(x, maps) for x in v], w) <= 1e-12
    assert gap(other.momenta, state.momenta) <= 1e-12
    assert gap([a @ k for a, k in zip(maps, other.factors, strict=True)], state.factors) <= 1e-12


def check_orthogonal(cls):
    """L2: orthogonal A and M, everything else on, from the identity."""
    targets, start = normal(100, 4, 3, seed=1), normal(4, 3, seed=2)
    method = cls(**LOUD)
    maps = [np.linalg.qr(normal(d, d, seed=d))[0] for d in (4, 3)]
    w, _ = train(method, start, noisy(targets), 100, 2**-6)
    v, _ = train(method, along(start, [a.T for a in maps]), transformed(noisy(targets), maps), 100, 2**-6)
    assert gap([along(x, maps) for x in v], w) <= 1e-12


def check_group(cls):
    """L3: A in the structure's own group, no damping; three axes."""
    targets, start = normal(60, 4, 3, 2, seed=1), normal(4, 3, 2, seed=2)
    for structure in STRUCTURES:
        method = cls(**{**LOUD, "damping": 0.0}, structure=structure)
        maps = members(structure, (4, 3, 2), seed=3)
        inverses = [np.linalg.inv(a) for a in maps]
        w, state = train(method, start, noisy(targets), 60, 2**-6)
        v0 = along(start, inverses)
        v, other = train(method, v0, transformed(noisy(targets), maps), 60, 2**-6, start_at(method, v0, inverses))
        assert gap([along(x, maps) for x in v], w) <= 1e-12, structure
        assert gap(other.momenta, state.momenta) <= 1e-12, structure


def check_gauge(cls):
    """L4: (c C, K / c) and C Q give the same directions."""
    targets, start = normal(100, 4, 3, seed=1), normal(4, 3, seed=2)
    method = cls(**LOUD)
    w, _ = train(method, start, noisy(targets), 100, 2**-6)
    q = np.linalg.qr(normal(4, 4, seed=3))[0]
    scaled, _ = train(
        method, start, noisy(targets), 100, 2**-6, start_at(method, start, (3 * np.eye(4), np.eye(3) / 3))
    )
    rotated, _ = train(method, start, noisy(targets), 100, 2**-6, start_at(method, start, (q, np.eye(3))))
    assert gap(scaled, w) <= 1e-12
    assert gap(rotated, w) <= 1e-12


def check_reduction(cls):
    """L5: the mean with B and the sum with B = 1 give the same directions where S_0 and lambda are divided by B."""
    grads, params = normal(50, 4, 3, seed=1), normal(50, 4, 3, seed=2)
    mean, total = cls(**{**LOUD, "batch_size": 8, "damping": 0.25}), cls(**{**LOUD, "batch_size": 1, "damping": 2.0})
    eyes = (np.eye(4), np.eye(3))
    u, _ = run(mean, grads, params, start_at(mean, params[0], (np.sqrt(8) * eyes[0], eyes[1])))
    v, _ = run(total, 8 * grads, params, start_at(total, params[0], eyes))
    assert gap(u, v) <= 1e-12


def check_scaling(cls):
    """L6: g -> s g, S_0 -> s^2 S_0, lambda -> s^2 lambda: u -> u / s. L7: curvature -> s curvature: u unchanged."""
    fields = {**LOUD, "weight_decay": 0.0}
    grads, params, s = normal(50, 4, 3, seed=1), normal(50, 4, 3, seed=2), 3.0
    small, large = cls(**fields), cls(**{**fields, "damping": 0.25 * s**2})
    u, _ = run(small, grads, params)
    v, _ = run(large, s * grads, params, start_at(large, params[0], (np.eye(4) / s, np.eye(3))))
    assert gap(s * v, u) <= 1e-12
    statistics = normal(50, 2, 4, 3, seed=3)
    newton = cls(**{**fields, "damping": 0.25 * s})
    u, _ = run(small, grads, params, statistics=statistics)
    start = start_at(newton, params[0], (np.eye(4) / np.sqrt(s), np.eye(3)))
    v, _ = run(newton, s * grads, params, start, statistics=np.sqrt(s) * statistics)
    assert gap(v, u) <= 1e-12


def check_permutation(cls):
    """L9: the axes and their structures in another order. L10: axes of size 1 drop out."""
    grads, params = normal(20, 4, 3, 2, seed=1), normal(20, 4, 3, 2, seed=2)
    u, _ = run(cls(**LOUD, structure=("dense", "tril", "diagonal")), grads, params)
    turned = [np.ascontiguousarray(x.transpose(0, 3, 1, 2)) for x in (grads, params)]
    v, _ = run(cls(**LOUD, structure=("diagonal", "dense", "tril")), *turned)
    assert gap(v.transpose(0, 2, 3, 1), u) <= 1e-12
    flat = [x.reshape(20, 1, 4, 3, 1, 2) for x in (grads, params)]
    v, _ = run(cls(**LOUD, structure=("dense", "tril", "diagonal")), *flat)
    np.testing.assert_array_equal(v.reshape(u.shape), u)


def check_first_order(cls):
    """L11: (K K^T)^-1 after one step is RF-Shampoo's S up to O(beta2^2)."""
    shape, g = (4, 3, 2), normal(4, 3, 2, seed=1)
    s = [positive(d, seed=d) for d in shape]
    k = [np.linalg.cholesky(np.linalg.inv(x)) @ np.linalg.qr(normal(len(x), len(x)))[0] for x in s]
    errors = []
    for beta2 in (2**-10, 2**-11):
        fields = {"beta2": beta2, "damping": 0.25, "batch_size": 2}
        method = cls(**fields, momentum=0.0, riemannian_momentum=0.0, clip=False)
        _, state = method.update(g, start_at(method, g, k), g)
        _, expected = oracle.root_free(g[None], g[None], factors=s, **fields)
        errors.append(
            [np.linalg.norm(np.linalg.inv(x @ x.T) - y) for x, y in zip(state.factors, expected, strict=True)]
        )
    ratios = np.divide(*errors)
    assert np.all((ratios > 3.8) & (ratios < 4.2)), ratios


def check_expm(cls):
    """L12: K Expm(-beta2 m) up to O(beta2^2)."""
    g, k = normal(4, 3, seed=1), [np.eye(d) + 0.25 * normal(d, d, seed=d) for d in (4, 3)]
    errors = []
    for beta2 in (2**-10, 2**-11):
        method = cls(**{**LOUD, "beta2": beta2, "clip": False})
        _, state = method.update(g, start_at(method, g, k), g)
        exact = [x @ scipy.linalg.expm(-beta2 * m) for x, m in zip(k, state.momenta, strict=True)]
        errors.append([np.linalg.norm(x - y) for x, y in zip(state.factors, exact, strict=True)])
    ratios = np.divide(*errors)
    assert np.all((ratios > 3.8) & (ratios < 4.2)), ratios


def converged(cls, sigma, shape, **changes):
    """Factors after 400 updates with the curvature ``sigma``."""
    method = cls(**{**PLAIN, "clip": True, **changes})
    statistic = oracle.pseudo_gradients(sigma, shape)
    w = np.zeros(shape)
    _, state = run(method, np.zeros((400, *shape)), np.zeros((400, *shape)), statistics=[statistic] * 400)
    return method, statistic, w, state.factors


def check_fixed_point(cls):
    """Section 5.1 and 5.2: the stationary equations, the trace identities, and the minimum of KL."""
    shape, damping = (3, 2), 0.25
    sigma = positive(6)
    _, statistic, _, (c, k) = converged(cls, sigma, shape)
    s_c, s_k = np.linalg.inv(c @ c.T), np.linalg.inv(k @ k.T)
    right = np.mean([x @ k @ k.T @ x.T for x in statistic], axis=0) + damping * np.trace(k @ k.T) * np.eye(3)
    left = np.mean([x.T @ c @ c.T @ x for x in statistic], axis=0) + damping * np.trace(c @ c.T) * np.eye(2)
    assert gap([2 * s_c, 3 * s_k], [right, left]) <= 1e-12
    noise = np.mean([np.sum((c.T @ x @ k) ** 2) for x in statistic])
    assert noise + damping * np.sum(c**2) * np.sum(k**2) == pytest.approx(6, rel=1e-12)
    target = sigma + damping * np.eye(6)
    s = np.kron(s_c, s_k)
    assert np.trace(np.linalg.solve(s, target)) == pytest.approx(6, rel=1e-12)

    def kl(a, b):  # twice the divergence, up to a constant
        s = np.kron(a, b)
        return np.trace(np.linalg.solve(s, target)) + np.linalg.slogdet(s)[1]

    for seed in range(10):
        e, f = normal(3, 3, seed=seed), normal(2, 2, seed=seed)
        assert kl(s_c + 2**-7 * (e + e.T), s_k + 2**-7 * (f + f.T)) > kl(s_c, s_k)


def check_clip(cls):
    """One update keeps every singular value of K_old^-1 K_new above 1 - beta2, for any gradient."""
    for scale in (1.0, 1e8, 1e100):
        method = cls(**{**LOUD, "beta2": 0.5})
        g = scale * normal(5, 4, seed=1)
        _, state = method.update(g, method.init(g), g)
        for factor in state.factors:
            assert np.linalg.svd(factor, compute_uv=False)[-1] >= 0.5 - 8 * U
            assert np.linalg.norm(factor - np.eye(len(factor))) <= 0.5 + 8 * U


def check_range(cls):
    """In float16 the order of evaluation keeps every intermediate below 65504, where the plain one overflows."""
    g = np.full((64, 64), 32.0, dtype=np.float16)
    method = cls(**{**LOUD, "batch_size": 4, "weight_decay": 0.0, "momentum": 0.0, "narrow_state": True})
    k = (4 * np.eye(64, dtype=np.float16), np.eye(64, dtype=np.float16) / 4)
    state = start_at(method, g, k)
    with np.errstate(over="raise", invalid="raise"):
        u, state = method.update(g, state, g)
    assert np.isfinite(u).all()
    assert all(np.isfinite(f).all() for f in state.factors)
    stale = method.replace(every=2)
    k = (256 * np.eye(64, dtype=np.float16), np.eye(64, dtype=np.float16) / 16)
    with np.errstate(over="raise", invalid="raise"):
        u, _ = stale.update(g, start_at(stale, g, k)._replace(step=1), g)
    np.testing.assert_array_equal(u, np.float16(32 * 256))


def check_descent(cls):
    """<G, u - kappa W> = ||P||_F^2 >= 0 with P from the new factors."""
    method = cls(**{**LOUD, "momentum": 0.0})
    grads, params = normal(10, 4, 3, seed=1), normal(10, 4, 3, seed=2)
    state = method.init(params[0])
    for g, w in zip(grads, params, strict=True):
        u, state = method.update(g, state, w)
        c, k = state.factors
        assert np.sum(g * (u - 0.125 * w)) == pytest.approx(np.sum((c.T @ g @ k) ** 2), rel=1e-13)


CHECKS = {
    f.__name__.removeprefix("check_"): f
    for f in (
        check_oracle,
        check_statistic,
        check_affine,
        check_orthogonal,
        check_group,
        check_gauge,
        check_reduction,
        check_scaling,
        check_permutation,
        check_first_order,
        check_expm,
        check_fixed_point,
        check_clip,
        check_range,
        check_descent,
    )
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_check(check):
    check(pr.IFShampoo)


MUTANTS = {
    "K contracts the gradient": ("multiply(p, _t(k, xp), n, xp)", "multiply(p, k, n, xp)", "affine"),
    "K^T K applied": (
        "multiply(multiply(u, _t(small, xp), n, xp), small, n, xp)",
        "multiply(multiply(u, small, n, xp), _t(small, xp), n, xp)",
        "descent",
    ),
    "K K^T in the damping": ("_t(k, xp) @ k for k in scaled", "k @ _t(k, xp) for k in scaled", "first_order"),
    "m K": ("k @ unit", "unit @ k", "affine"),
    "K left out of its update": ("(k @ unit)", "unit", "expm"),
    "no half": ("m = project(h", "m = 2 * project(h", "first_order"),
    "no B": ("sqrt(self.batch_size / g.shape[-1])", "sqrt(1 / g.shape[-1])", "reduction"),
    "B squared": ("sqrt(self.batch_size / g.shape[-1])", "(self.batch_size / g.shape[-1])", "reduction"),
    "samples summed": ("sqrt(self.batch_size / g.shape[-1])", "sqrt(self.batch_size)", "statistic"),
    "no d_n": ("dims[n] * (rows @", "(rows @", "fixed_point"),
    "damping over d_n": ("self.damping * math.prod(dims)", "self.damping * math.prod(dims) / dims[n]", "fixed_point"),
    "damping with its own trace": ("if j != n:", "if True:", "fixed_point"),
    "damping without traces": ("if j != n:", "if False:", "fixed_point"),
    "damping on I": ("+ damping * grams[n]", "+ damping * identity(xp, grams[n])", "gauge"),
    "no identity": ("project(h - identity(xp, h)", "project(h", "fixed_point"),
    "heavy ball on m": ("m = ema(momenta[n], m, self.", "m = m + momenta[n] * (self.", "oracle"),
    "clip by K": ("clamp(peak * norm,", "clamp(xp.linalg.matrix_norm(k, keepdims=True),", "clip"),
    "clip by the largest entry": ("clamp(peak * norm,", "clamp(peak,", "clip"),
    "clip left out": ("if self.clip else 1.0", "if not self.clip else 1.0", "clip"),
    "normalised below 1 too": ("clamp(peak * norm, 1.0, xp=xp)", "peak * norm", "fixed_point"),
    "clipped m kept": ("new_momenta.append(m)", "new_momenta.append(m / length)", "oracle"),
    "old factors used": ("copy=False), factors, dims", "copy=False), state.factors, dims", "descent"),
    "r instead of r^2": ("scale = scale * peak", "scale = scale * xp.sqrt(peak)", "oracle"),
    "no scaling of K in the direction": ("small = k / xp.sqrt(peak)", "small, peak = k, 1.0 + 0 * peak", "range"),
    "no scaling of K in P": ("k * (1 / math.sqrt(d)) for k, d in", "k * math.sqrt(d) for k, d in", "range"),
    "decay before the preconditioner": (
        "(xp.astype(grad, dtype, copy=False), factors",
        "(grad + self.weight_decay * param, factors",
        "descent",
    ),
    "averaged momentum": ("self.momentum * state.buffer + u", "ema(state.buffer, u, self.momentum)", "oracle"),
    "renewed after the first interval": (
        "now.due",
        "now.step % self.every == 0",
        "oracle",
    ),
    "gradient instead of statistic": ("samples(grad, statistic,", "samples(grad, None,", "statistic"),
    "structures reversed": ("return self.structure\n", "return self.structure[::-1]\n", "permutation"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name):
    old, new, check = MUTANTS[name]
    cls = mutated(inverse_free, (old, new)).IFShampoo
    with pytest.raises((AssertionError, FloatingPointError)), np.errstate(all="ignore"):
        CHECKS[check](cls)


# ---- truth at 50 digits, closed forms, rates ----


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 2)])
def test_mpmath(shape):
    grads, params = normal(4, *shape, seed=1), normal(4, *shape, seed=2)
    with mpmath.workdps(50):
        truth, factors, _ = oracle.inverse_free(oracle.exact(grads), oracle.exact(params), **LOUD)
    got, state = run(pr.IFShampoo(**LOUD), grads, params)
    # Four steps of sums of at most D = 8 products, conditioned below 10.
    assert gap(got, truth.astype(float)) <= 10 * 4 * 8 * U
    assert gap(state.factors, [k.astype(float) for k in factors]) <= 10 * 4 * 8 * U


def test_constant_gradient_on_one_axis():
    """(K K^T)^-1 = B g g^T + lambda I, u = g / (B |g|^2 + lambda); the same K K^T for the triangular classes."""
    g = np.array([1.0, -0.5, 0.25, 2.0])
    expected = 2 * np.outer(g, g) + 0.5 * np.eye(4)
    for structure in ("dense", "tril", "triu"):
        method = pr.IFShampoo(**{**PLAIN, "damping": 0.5}, batch_size=2, structure=structure)
        u, state = run(method, np.tile(g, (400, 1)), np.tile(g, (400, 1)))
        k = state.factors[0]
        assert gap([np.linalg.inv(k @ k.T)], [expected]) <= 1e-13
        assert gap(u[-1:], [g / (2 * g @ g + 0.5)]) <= 1e-13
    method = pr.IFShampoo(**{**PLAIN, "damping": 0.5}, batch_size=2, structure="diagonal")
    _, state = run(method, np.tile(g, (400, 1)), np.tile(g, (400, 1)))
    assert gap([1 / np.diag(state.factors[0]) ** 2], [2 * g**2 + 0.5]) <= 1e-13


def test_scalar_recursion():
    """Along an eigenvector of a constant curvature h: k <- k (1 - beta2 (h k^2 - 1) / 2)."""
    h = np.array([0.25, 1.5, 3.0])
    method = pr.IFShampoo(**{**PLAIN, "damping": 0.0})
    statistic = np.sqrt(3) * np.diag(np.sqrt(h))  # three gradients with the mean outer product diag(h)
    k, state = np.ones(3), method.init(h)
    for _ in range(20):
        _, state = method.update(h, state, h, statistic=statistic)
        k = k * (1 - 0.25 * (h * k**2 - 1) / 2)
        np.testing.assert_allclose(state.factors[0], np.diag(k), rtol=20 * 8 * U, atol=0)


def test_kronecker_curvature_is_found():
    """5.4: S_C x S_K -> R x S_x without damping, and u is then G preconditioned by its inverse, also on three axes."""
    for shape in ((3, 4), (3, 2, 2)):
        parts = [positive(d, seed=d) for d in shape]
        _, _, _, factors = converged(pr.IFShampoo, kron(parts), shape, damping=0.0)
        got = kron([np.linalg.inv(k @ k.T) for k in factors])
        assert gap([got], [kron(parts)]) <= 1e-12
        g = normal(*shape)
        method = pr.IFShampoo(**PLAIN, every=2)
        u, _ = method.update(g, start_at(method, g, factors)._replace(step=1), g)
        assert gap([u], [np.linalg.solve(kron(parts), g.reshape(-1)).reshape(shape)]) <= 1e-12


def test_local_rates():
    """5.5: overall scale 1 - N beta2, trace-free shape 1 - beta2, gauge 1, for a Kronecker curvature."""
    shape, epsilon, beta2 = (3, 4), 1e-6, 0.125
    parts = [positive(d, seed=d) for d in shape]
    method, statistic, w, (c, k) = converged(pr.IFShampoo, kron(parts), shape, damping=0.0, beta2=beta2, clip=False)
    e = normal(3, 3)
    e = e + e.T - 2 * np.trace(e) / 3 * np.eye(3)

    def after(c0, k0):
        state = method.update(w, start_at(method, w, (c0, k0)), w, statistic=statistic)[1]
        return [np.linalg.solve(old, new) - np.eye(len(old)) for old, new in zip((c, k), state.factors, strict=True)]

    dc, dk = after(c * (1 + epsilon), k)
    # The neglected second order is epsilon times a number below 10.
    assert (np.trace(dc) / 3 + np.trace(dk) / 4) / epsilon == pytest.approx(1 - 2 * beta2, abs=10 * epsilon)
    dc, dk = after(c @ (np.eye(3) + epsilon * e), k)
    np.testing.assert_allclose(dc / epsilon, (1 - beta2) * e, rtol=0, atol=100 * epsilon)
    dc, dk = after(c * (1 + epsilon), k / (1 + epsilon))
    np.testing.assert_allclose(dc / epsilon, np.eye(3), rtol=0, atol=10 * epsilon)


def test_newton_rate():
    """5.7: with the Hessian as curvature the error contracts by 1 - lr, whatever the condition number."""
    r, x = np.diag([1.0, 5.0, 30.0]), np.diag([0.25, 1.0, 2.0, 7.5])  # condition number 900
    hessian = np.kron(r, x)
    method, statistic, _, factors = converged(pr.IFShampoo, hessian, (3, 4), damping=0.0)
    w = normal(3, 4)
    state = start_at(method, w, factors)
    for _ in range(20):
        u, state = method.update(r @ w @ x, state, w, statistic=statistic)
        new = w - 0.3 * u
        assert np.linalg.norm(new) == pytest.approx(0.7 * np.linalg.norm(w), rel=1e-10)
        w = new


def test_fisher_is_the_hessian_for_the_right_noise():
    """5.6 with exact expectations: residual covariance I gives I x E[x x^T], the Hessian; R gives R x E[x x^T]."""
    x, r = positive(4, seed=1), positive(3, seed=2)
    for noise in (np.eye(3), r):
        _, _, _, factors = converged(pr.IFShampoo, np.kron(noise, x), (3, 4), damping=0.0)
        assert gap([kron([np.linalg.inv(k @ k.T) for k in factors])], [np.kron(noise, x)]) <= 1e-12


@pytest.mark.deep
@pytest.mark.parametrize(("clip", "low", "high"), [(False, 0.0, 0.05), (True, 0.1, 0.2)])
def test_fisher_from_samples(clip, low, high):
    """5.6 with sampled mini-batches of 8: the averaged S_C x S_K is the Hessian; the clip of noisy m_n shrinks it."""
    rng = np.random.default_rng(0)
    a = np.linalg.cholesky(positive(4, seed=1))
    fields = {"beta2": 0.005, "damping": 0.0, "momentum": 0.0, "batch_size": 8}
    method = pr.IFShampoo(**fields, riemannian_momentum=0.0, clip=clip)
    w = np.zeros((3, 4))
    state, total, steps = method.init(w), 0, 25000
    for t in range(steps):
        inputs, errors = rng.standard_normal((8, 4)) @ a.T, rng.standard_normal((8, 3))
        _, state = method.update(errors.T @ inputs / 8, state, w)
        if t >= 5000:
            total = total + kron([np.linalg.inv(k @ k.T) for k in state.factors])
    error = gap([total / (steps - 5000)], [np.kron(np.eye(3), a @ a.T)])
    print(f"relative error {error:.3f}")
    assert low <= error <= high


def test_damping_breaks_affine_invariance():
    """The negative test of L1: lambda I is not invariant."""
    targets, start = normal(100, 4, 3, seed=1), normal(4, 3, seed=2)
    method = pr.IFShampoo(**LOUD)
    maps = members("dense", (4, 3), seed=3)
    inverses = [np.linalg.inv(a) for a in maps]
    w, _ = train(method, start, noisy(targets), 100, 2**-6)
    v0 = along(start, inverses)
    v, _ = train(method, v0, transformed(noisy(targets), maps), 100, 2**-6, start_at(method, v0, inverses))
    assert gap([along(x, maps) for x in v], w) >= 1e-3


def test_small_axes_are_dense():
    """L10: where a class is all of the matrices, and on axes of size 1, the directions are those of dense factors."""
    grads, params = normal(10, 4, 3, seed=1), normal(10, 4, 3, seed=2)
    u, _ = run(pr.IFShampoo(**LOUD), grads, params)
    for structure in ("hierarchical(4,2)", "hierarchical(15,15)", "block-diagonal(30)"):
        np.testing.assert_array_equal(run(pr.IFShampoo(**LOUD, structure=structure), grads, params)[0], u)
    ones = normal(10, 1, 1, seed=3), normal(10, 1, 1, seed=4)
    u, _ = run(pr.IFShampoo(**LOUD), *ones)
    for structure in STRUCTURES:
        np.testing.assert_array_equal(run(pr.IFShampoo(**LOUD, structure=structure), *ones)[0], u)


@each_structure
def test_factors_stay_in_their_class(structure):
    grads = normal(300, 5, 4, seed=1)
    _, state = run(pr.IFShampoo(**LOUD, structure=structure), grads, grads)
    for factor in state.factors:
        e = oracle.basis(structure, len(factor)).reshape(-1, factor.size)
        inside = e.T @ np.linalg.lstsq(e.T, factor.reshape(-1), rcond=None)[0]
        # Zeros stay exactly zero; tied entries drift apart by rounding, one step of 4 d u at a time.
        assert np.linalg.norm(factor.reshape(-1) - inside) <= 300 * 4 * 5 * U * np.linalg.norm(factor)
        assert np.all(factor[oracle.basis(structure, len(factor)).sum(axis=0) == 0] == 0)


# ---- half precision ----


def low_precision(name):
    if name == "torch":
        torch = pytest.importorskip("torch")
        return torch.bfloat16, torch.float32, lambda x, dtype: torch.as_tensor(np.asarray(x, np.float32)).to(dtype)
    jnp = pytest.importorskip("jax").numpy
    return jnp.bfloat16, jnp.float32, lambda x, dtype: jnp.asarray(np.asarray(x, np.float32)).astype(dtype)


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_bfloat16_parameters_have_a_float32_state(library):
    """The direction is the float32 one for the same gradients, rounded once."""
    bfloat16, float32, make = low_precision(library)
    method = pr.IFShampoo(**LOUD)
    grads = normal(5, 4, 3, seed=1)
    param = make(normal(4, 3, seed=2), bfloat16)
    state = method.init(param)
    wide = make(np.asarray(param.astype(float32) if library == "jax" else param.float()), float32)
    other = method.init(wide)
    for g in grads:
        g16 = make(g, bfloat16)
        u, state = method.update(g16, state, param)
        v, other = method.update(g16.astype(float32) if library == "jax" else g16.float(), other, wide)
        assert u.dtype == bfloat16
        assert state.factors[0].dtype == state.momenta[0].dtype == state.buffer.dtype == float32
        assert bool((u == (v.astype(bfloat16) if library == "jax" else v.to(bfloat16))).all())


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_narrow_state_is_bfloat16(library):
    bfloat16, _, make = low_precision(library)
    method = pr.IFShampoo(**LOUD, narrow_state=True, structure=("hierarchical(1,1)", "tril-toeplitz"))
    param = make(normal(4, 3, seed=2), bfloat16)
    state = method.init(param)
    expected, _ = run(method, normal(5, 4, 3, seed=1), np.tile(np.asarray(normal(4, 3, seed=2)), (5, 1, 1)))
    for g, e in zip(normal(5, 4, 3, seed=1), expected, strict=True):
        u, state = method.update(make(g, bfloat16), state, param)
        got = np.asarray(u.float() if library == "torch" else u.astype("float32"))
        assert gap([got], [e]) <= 5 * 8 * 2**-9  # five steps of eight roundings each
    assert all(x.dtype == bfloat16 for x in (*state.factors, *state.momenta, state.buffer, u))
    assert bool(method.diagnose(state).finite)


def bfloat16_stream(condition, steps, seed=0):
    """Gradients with covariance diag(1 ... 1/condition) in a random basis, and that covariance, dimension 8."""
    rng = np.random.default_rng(seed)
    h = np.logspace(0, -np.log10(condition), 8)
    q = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    return rng.standard_normal((steps, 8)) * np.sqrt(h) @ q.T, q * h @ q.T


def rounded_to_bfloat16(x):
    bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def test_bfloat16_factors_stay_definite_where_bfloat16_statistics_do_not():
    """At condition number 1e4: S stored in bfloat16 turns indefinite, K K^T is positive by construction and useful."""
    torch = pytest.importorskip("torch")
    grads, h = bfloat16_stream(1e4, 1500)
    s, indefinite = np.eye(8, dtype=np.float32), 0
    for g in grads.astype(np.float32):
        s = rounded_to_bfloat16(0.95 * s + 0.05 * np.outer(g, g))
        indefinite += np.linalg.eigvalsh(s.astype(float))[0] <= 0
    assert indefinite > 500
    method = pr.IFShampoo(beta2=0.05, damping=0.0, momentum=0.0, riemannian_momentum=0.5, narrow_state=True)
    param = torch.zeros(8, dtype=torch.bfloat16)
    state, total = method.init(param), 0
    for t, g in enumerate(torch.as_tensor(grads).to(torch.bfloat16)):
        _, state = method.update(g, state, param)
        if t >= 500:
            k = state.factors[0].double().numpy()
            total = total + k @ k.T / 1000
    assert bool(method.diagnose(state).finite)
    root = np.linalg.cholesky(h)
    spectrum = np.linalg.eigvalsh(root.T @ total @ root)
    print(f"indefinite {indefinite} of 1500, eigenvalues of mean(K K^T) H: {spectrum[0]:.2f} .. {spectrum[-1]:.2f}")
    assert spectrum[0] > 0.25
    assert spectrum[-1] < 4


# ---- the authors' package ----


def torch_model(torch, dtype):
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(48, 10), torch.nn.Tanh()
    return torch.nn.Sequential(*layers, torch.nn.Linear(10, 4)).to(dtype)


def distance_to_package(dtype, structures, steps=50, **fields):
    """Largest relative difference of any parameter after any step, on a small convolutional network."""
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("sirfshampoo", reason="sirfshampoo is not installed")
    torch.set_num_threads(1)
    theirs, ours = torch_model(torch, dtype), torch_model(torch, dtype)
    names = {
        "momentum": "alpha1",
        "riemannian_momentum": "alpha2",
        "damping": "lam",
        "weight_decay": "kappa",
        "every": "T",
    }
    optimizer = package.SIRFShampoo(
        theirs, lr=2**-5, structures=structures[0], **{names.get(k, k): v for k, v in fields.items()}
    )
    method = pr.IFShampoo(**fields, batch_size=16, structure=structures[1])
    states = [method.init(p.detach()) for p in ours.parameters()]
    rng, worst = torch.Generator().manual_seed(1), 0.0
    for _ in range(steps):
        x = torch.randn(16, 2, 6, 6, generator=rng).to(dtype)
        y = torch.randint(0, 4, (16,), generator=rng)
        for net in (theirs, ours):
            net.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            for i, p in enumerate(ours.parameters()):
                u, states[i] = method.update(p.grad, states[i], p.detach())
                p -= 2**-5 * u
            pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
            worst = np.max([worst, *(float((a - b).norm() / b.norm()) for a, b in pairs)])
    return worst


PACKAGE_FIELDS = {
    "defaults": {},
    "loud": {
        "beta2": 0.125,
        "momentum": 0.75,
        "riemannian_momentum": 0.25,
        "damping": 0.0625,
        "weight_decay": 0.03125,
        "every": 2,
    },
}


@pytest.mark.parametrize("fields", PACKAGE_FIELDS.values(), ids=PACKAGE_FIELDS)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("float64", 1e-14)])
def test_authors_package(fields, dtype, bound):
    torch = pytest.importorskip("torch")
    assert distance_to_package(getattr(torch, dtype), ("dense", "dense"), **fields) <= bound


def package_structures(monkeypatch):
    """The structures of `singd` that the released `sirfshampoo` does not offer."""
    package = pytest.importorskip("sirfshampoo", reason="sirfshampoo is not installed")
    from singd.structures.blockdiagonal import BlockDiagonalMatrixTemplate
    from singd.structures.diagonal import DiagonalMatrix
    from singd.structures.hierarchical import Hierarchical15_15Matrix
    from singd.structures.triltoeplitz import TrilToeplitzMatrix
    from singd.structures.triutoeplitz import TriuToeplitzMatrix

    class Block5(BlockDiagonalMatrixTemplate):
        BLOCK_DIM = 5

    class Transposed(Block5):
        def rmatmat(self, mat):
            blocks = self._blocks.transpose(-1, -2)
            return type(self)(blocks, self._last.T) @ mat

        def from_inner(self, X=None):
            import torch

            return self.from_mat_inner(
                self.rmatmat(torch.eye(self.shape[0], dtype=self._blocks.dtype) if X is None else X)
            )

    added = {
        "diagonal": DiagonalMatrix,
        "triltoeplitz": TrilToeplitzMatrix,
        "triutoeplitz": TriuToeplitzMatrix,
        "hierarchical": Hierarchical15_15Matrix,
        "block5": Block5,
        "block5 transposed": Transposed,
    }
    old = package.SIRFShampoo.SUPPORTED_STRUCTURES
    monkeypatch.setattr(package.SIRFShampoo, "SUPPORTED_STRUCTURES", {**old, **added})


@pytest.mark.filterwarnings("ignore:Calling naive implementation:UserWarning:singd.structures.base")
@pytest.mark.parametrize(
    "structures",
    [
        ("diagonal", "diagonal"),
        ("triltoeplitz", "tril-toeplitz"),
        ("triutoeplitz", "triu-toeplitz"),
        ("hierarchical", "hierarchical(15,15)"),
        ("block5 transposed", "block-diagonal(5)"),
    ],
)
@pytest.mark.full
def test_authors_structures(structures, monkeypatch):
    torch = pytest.importorskip("torch")
    package_structures(monkeypatch)
    # One rounding of the parameters in each of the 50 steps.
    assert distance_to_package(torch.float32, structures, **PACKAGE_FIELDS["loud"]) <= 50 * 2**-24


def test_authors_block_diagonal_lacks_transposes(monkeypatch):
    """singd 0.0.5 contracts with K and K K^T where K^T and K^T K belong: a fact about it, and a check of the above."""
    torch = pytest.importorskip("torch")
    package_structures(monkeypatch)
    assert distance_to_package(torch.float32, ("block5", "block-diagonal(5)"), **PACKAGE_FIELDS["loud"]) >= 1e-5


# ---- the contract ----


def test_empty_parameters():
    method = pr.IFShampoo(**LOUD)
    w = np.zeros((0, 3))
    u, state = method.update(w, method.init(w), w)
    assert u.shape == (0, 3)
    assert state.step == 1


def test_diagnose():
    grads = normal(3, 4, 3, seed=1)
    method = pr.IFShampoo(**LOUD)
    report = method.diagnose(run(method, grads, grads)[1])
    _, (c, k), _ = oracle.inverse_free(grads, grads, **LOUD)
    assert gap(report.inverses, [c @ c.T, k @ k.T]) <= 1e-13
    assert gap(report.eigenvalues, [np.linalg.eigvalsh(c @ c.T), np.linalg.eigvalsh(k @ k.T)]) <= 1e-13
    assert bool(report.finite)


CHANGES = {
    "beta2": 0.125,
    "damping": 0.5,
    "momentum": 0.25,
    "riemannian_momentum": 0.5,
    "weight_decay": 0.25,
    "batch_size": 3,
    "every": 2,
    "structure": "tril",
    "clip": False,
    "narrow_state": True,
}


@pytest.mark.parametrize("field", CHANGES)
def test_no_dead_field(field):
    dtype = np.float16 if field == "narrow_state" else np.float64
    grads = normal(4, 4, 3, seed=1).astype(dtype)
    base = pr.IFShampoo(**LOUD)
    u, _ = run(base, grads, grads)
    v, _ = run(base.replace(**{field: CHANGES[field]}), grads, grads)
    assert gap(v[-1:].astype(float), u[-1:].astype(float)) >= 1e-4


def test_every_field_is_perturbed():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(pr.IFShampoo)}


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"beta2": 0.0}, ValueError, "beta2 must be finite and > 0"),
        ({"beta2": 1.0}, ValueError, "beta2 must be"),
        ({"damping": -1.0}, ValueError, "damping"),
        ({"damping": float("nan")}, ValueError, "damping"),
        ({"momentum": 1.0}, ValueError, "momentum"),
        ({"riemannian_momentum": 1.0}, ValueError, "riemannian_momentum"),
        ({"weight_decay": -1e-3}, ValueError, "weight_decay"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"batch_size": "auto"}, TypeError, "batch_size"),
        ({"every": 0}, ValueError, "every"),
        ({"every": 1.5}, TypeError, "every"),
        ({"clip": 1}, TypeError, "clip"),
        ({"narrow_state": None}, TypeError, "narrow_state"),
        ({"structure": "full"}, ValueError, "structure must be one of"),
        ({"structure": ["dense"]}, TypeError, "structure must be a string"),
        ({"structure": ("dense", 3)}, TypeError, "structure must be a string"),
    ],
)
def test_bad_fields(fields, error, match):
    with pytest.raises(error, match=match):
        pr.IFShampoo(**fields)


def test_large_beta2_warns():
    with pytest.warns(UserWarning, match=r"weight of the new term.*give beta2=0\.01") as record:
        pr.IFShampoo(beta2=0.99)
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pr.IFShampoo(beta2=0.5)


def test_bad_arrays():
    method = pr.IFShampoo(structure=("dense", "diagonal"))
    w = normal(4, 3)
    state = method.init(w)
    with pytest.raises(ValueError, match="one entry for each of the 3 axes"):
        method.init(normal(4, 3, 2))
    with pytest.raises(ValueError, match="one entry for each of the 1 axes"):
        method.init(normal(4, 1))
    with pytest.raises(ValueError, match="grad must have param's shape"):
        method.update(normal(3, 4), state, w)
    with pytest.raises(ValueError, match=r"state\.factors\[0\] must have shape"):
        method.update(normal(3, 4), state._replace(buffer=normal(3, 4)), normal(3, 4))
    with pytest.raises(ValueError, match=r"state\.momenta\[0\] must have shape"):
        method.update(w, state._replace(momenta=state.momenta[::-1]), w)
    with pytest.raises(ValueError, match="statistic must have shape"):
        method.update(w, state, w, statistic=w)
    with pytest.raises(ValueError, match="refresh=False needs every > 1"):
        method.update(w, state, w, refresh=False)
    with pytest.raises(TypeError, match="real floating"):
        method.init(np.zeros((2, 2), dtype=int))
