"""RF-RMSProp, RF-AdamW and RF-Shampoo: laws, closed forms, rates, bfloat16, the authors' numbers, planted bugs."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import root_free_oracle as oracle
from helpers import distance as gap
from mutation import mutated
from root_free_oracle import along, kron, noisy, normal, positive, run, train, transformed

import precond_ref as pr
from precond_ref.methods import root_free

U = 2**-53
DIAGONAL = {
    "beta2": 0.25,
    "damping": 0.125,
    "momentum": 0.5,
    "weight_decay": 0.125,
    "batch_size": 8,
    "initial": 0.5,
}
ADAM = {"beta1": 0.75, "beta2": 0.875, "damping": 0.125, "batch_size": 4, "initial": 0.5}
FACTORS = {"beta2": 0.25, "damping": 0.25, "momentum": 0.5, "weight_decay": 0.125, "batch_size": 2}
METHODS = SimpleNamespace(RFRMSProp=pr.RFRMSProp, RFAdamW=pr.RFAdamW, RFShampoo=pr.RFShampoo)


def start_at(method, param, factors):
    """The initial state of RF-Shampoo with other factors."""
    return method.init(param)._replace(factors=tuple(factors), inverses=tuple(np.linalg.inv(s) for s in factors))


def well_conditioned(d, seed):
    x = normal(d, d, seed=seed)
    return np.eye(d) + 0.5 * x / np.linalg.norm(x, 2)


# ---- checks: each takes the three classes, right or mutated ----


def check_rms_prop(m):
    grads, params = normal(8, 3, 2, seed=1), normal(8, 3, 2, seed=2)
    for changes in ({}, {"momentum": 0.0}, {"weight_decay": 0.0, "beta2": 0.0625}, {"damping": 0.0, "initial": 2.0}):
        fields = {**DIAGONAL, **changes}
        expected, s = oracle.rms_prop(grads, params, **fields)
        got, state = run(m.RFRMSProp(**fields), grads, params)
        # Eight steps of eight roundings; g / (s + lambda) is as well conditioned as its inputs.
        assert gap(got, expected) <= 64 * U
        assert gap([state.s], [s]) <= 64 * U


def check_adam_w(m):
    grads = normal(8, 3, 2, seed=1)
    for changes in ({}, {"bias_correction": True}, {"bias_correction": True, "beta1": 0.0}, {"damping": 0.0}):
        fields = {**ADAM, **changes}
        got, _ = run(m.RFAdamW(**fields), grads, grads)
        # m cancels when its terms do: 8 steps of 8 roundings relative to sums at most 10 times their result.
        assert gap(got, oracle.adam_w(grads, **fields)) <= 640 * U


def check_shampoo(m):
    cases = [((3, 4), {}), ((3, 4), {"every": 2, "momentum": 0.0}), ((5,), {"batch_size": 0.5}), ((2, 3, 2), {})]
    for shape, changes in [*cases, ((2, 3, 2, 2), {"weight_decay": 0.0, "beta2": 0.0625})]:
        fields = {**FACTORS, **changes}
        grads, params = normal(6, *shape, seed=1), normal(6, *shape, seed=2)
        expected, factors = oracle.root_free(grads, params, **fields)
        got, state = run(m.RFShampoo(**fields), grads, params)
        # Six steps of sums of at most D = 24 terms; inverses of factors with condition number below 100.
        assert gap(got, expected) <= 100 * 6 * 24 * U, (shape, changes)
        assert gap(state.factors, factors) <= 100 * 6 * 24 * U
        assert gap(state.inverses, [np.linalg.inv(s) for s in factors]) <= 100 * 6 * 24 * U


def check_statistic(m):
    grads, params = normal(5, 3, 2, seed=1), normal(5, 3, 2, seed=2)
    statistics = normal(5, 4, 3, 2, seed=3)
    expected, _ = oracle.root_free(grads, params, statistics=statistics, **FACTORS)
    assert gap(run(m.RFShampoo(**FACTORS), grads, params, statistics=statistics)[0], expected) <= 100 * 5 * 24 * U
    method = m.RFRMSProp(**DIAGONAL)
    s = method.init(grads[0]).s
    _, state = method.update(grads[0], method.init(grads[0]), params[0], statistic=statistics[0])
    assert gap([state.s], [0.75 * s + 0.25 * 8 * np.mean(statistics[0] ** 2, axis=0)]) <= 16 * U


def check_affine(m):
    """L1 and L13: W = A V M^T, S = A^T A and M^T M at the start, no damping: the same path, S = A^T S A."""
    targets, start = normal(100, 4, 3, seed=1), normal(4, 3, seed=2)
    method = m.RFShampoo(**{**FACTORS, "damping": 0.0})
    maps = [well_conditioned(4, 3), well_conditioned(3, 4)]
    w, state = train(method, start, noisy(targets), 100, 2**-6)
    v0 = along(start, [np.linalg.inv(a) for a in maps])
    begin = start_at(method, v0, [a.T @ a for a in maps])
    v, other = train(method, v0, transformed(noisy(targets), maps), 100, 2**-6, begin)
    assert gap([along(x, maps) for x in v], w) <= 1e-12
    assert gap(other.factors, [a.T @ s @ a for a, s in zip(maps, state.factors, strict=True)]) <= 1e-12


def check_orthogonal(m):
    """L2: orthogonal A and M, everything else on, from the identity."""
    targets, start = normal(100, 4, 3, seed=1), normal(4, 3, seed=2)
    method = m.RFShampoo(**FACTORS)
    maps = [np.linalg.qr(normal(d, d, seed=d))[0] for d in (4, 3)]
    w, _ = train(method, start, noisy(targets), 100, 2**-6)
    v, _ = train(method, along(start, [a.T for a in maps]), transformed(noisy(targets), maps), 100, 2**-6)
    assert gap([along(x, maps) for x in v], w) <= 1e-12


def check_gauge(m):
    """L4: (c S_C, S_K / c) gives the same directions."""
    targets, start = normal(100, 4, 3, seed=1), normal(4, 3, seed=2)
    method = m.RFShampoo(**FACTORS)
    w, _ = train(method, start, noisy(targets), 100, 2**-6)
    v, _ = train(method, start, noisy(targets), 100, 2**-6, start_at(method, start, (3 * np.eye(4), np.eye(3) / 3)))
    assert gap(v, w) <= 1e-12


def check_diagonal_affine(m):
    """L8, second part: RF-RMSProp under w = D v with s = D^2 at the start and no damping."""
    targets, start = normal(100, 5, seed=1), normal(5, seed=2)
    d = np.array([0.5, 3.0, 1.0, 7.0, 0.25])
    method = m.RFRMSProp(**{**DIAGONAL, "damping": 0.0})
    w, _ = train(method, start, noisy(targets), 100, 2**-6)
    state = method.init(start)._replace(s=0.5 * d**2)
    v, _ = train(method, start / d, lambda t, v: d * (d * v - targets[t]), 100, 2**-6, state)
    assert gap(d * v, w) <= 1e-12


def check_reduction(m):
    """L5: the mean with B and the sum with B = 1, where S_0 and lambda are divided by B."""
    grads, params = normal(50, 4, 3, seed=1), normal(50, 4, 3, seed=2)
    mean = m.RFRMSProp(**{**DIAGONAL, "batch_size": 8, "damping": 0.125, "initial": 0.5})
    total = m.RFRMSProp(**{**DIAGONAL, "batch_size": 1, "damping": 1.0, "initial": 4.0})
    assert gap(run(mean, grads, params)[0], run(total, 8 * grads, params)[0]) <= 1e-12
    mean = m.RFAdamW(**{**ADAM, "batch_size": 8, "damping": 0.125, "initial": 0.5})
    total = m.RFAdamW(**{**ADAM, "batch_size": 1, "damping": 1.0, "initial": 4.0})
    assert gap(run(mean, grads, params)[0], run(total, 8 * grads, params)[0]) <= 1e-12
    mean = m.RFShampoo(**{**FACTORS, "batch_size": 8, "damping": 0.25})
    total = m.RFShampoo(**{**FACTORS, "batch_size": 1, "damping": 2.0})
    state = start_at(mean, params[0], (np.eye(4) / 8, np.eye(3)))
    assert gap(run(mean, grads, params, state)[0], run(total, 8 * grads, params)[0]) <= 1e-12


def check_scaling(m):
    """L6: g -> s g, S_0 -> s^2 S_0, lambda -> s^2 lambda: u -> u / s. L7: curvature -> s curvature: u unchanged."""
    grads, params, s = normal(50, 4, 3, seed=1), normal(50, 4, 3, seed=2), 3.0
    statistics = normal(50, 2, 4, 3, seed=3)
    for cls, fields in ((m.RFRMSProp, DIAGONAL), (m.RFShampoo, FACTORS)):
        small = cls(**{**fields, "weight_decay": 0.0})
        for power, scaled in ((2, None), (1, np.sqrt(s) * statistics)):
            large = small.replace(damping=fields["damping"] * s**power)
            if cls is m.RFRMSProp:
                state = (large := large.replace(initial=0.5 * s**power)).init(params[0])
            else:
                state = start_at(large, params[0], (s**power * np.eye(4), np.eye(3)))
            u, _ = run(small, grads, params, statistics=None if power == 2 else statistics)
            v, _ = run(large, s * grads, params, state, statistics=scaled)
            assert gap(v * s ** (power - 1), u) <= 1e-12


def check_permutation(m):
    """L9: axes in another order. L10: axes of size 1 drop out."""
    grads, params = normal(20, 4, 3, 2, seed=1), normal(20, 4, 3, 2, seed=2)
    method = m.RFShampoo(**FACTORS)
    u, _ = run(method, grads, params)
    v, _ = run(method, *(np.ascontiguousarray(x.transpose(0, 3, 1, 2)) for x in (grads, params)))
    assert gap(v.transpose(0, 2, 3, 1), u) <= 1e-12
    v, _ = run(method, *(x.reshape(20, 1, 4, 3, 1, 2) for x in (grads, params)))
    np.testing.assert_array_equal(v.reshape(u.shape), u)


def converged(m, sigma, shape, **changes):
    method = m.RFShampoo(**{"beta2": 0.25, "momentum": 0.0, "damping": 0.25, **changes})
    statistic, w = oracle.pseudo_gradients(sigma, shape), np.zeros((400, *shape))
    return method, statistic, run(method, w, w, statistics=[statistic] * 400)[1].factors


def check_fixed_point(m):
    """5.1, 5.4: the stationary equations with damping; a Kronecker curvature is found without; the inverse-free one."""
    shape, sigma = (3, 2), positive(6)
    _, statistic, (s_c, s_k) = converged(m, sigma, shape)
    c, k = np.linalg.inv(s_c), np.linalg.inv(s_k)
    right = np.mean([x @ k @ x.T for x in statistic], axis=0) + 0.25 * np.trace(k) * np.eye(3)
    left = np.mean([x.T @ c @ x for x in statistic], axis=0) + 0.25 * np.trace(c) * np.eye(2)
    assert gap([2 * s_c, 3 * s_k], [right, left]) <= 1e-12
    inverse_free = pr.IFShampoo(beta2=0.25, momentum=0.0, damping=0.25, riemannian_momentum=0.0)
    w = np.zeros((400, *shape))
    factors = run(inverse_free, w, w, statistics=[statistic] * 400)[1].factors
    assert gap([kron([np.linalg.inv(x @ x.T) for x in factors])], [np.kron(s_c, s_k)]) <= 1e-12
    parts = [positive(d, seed=d) for d in (3, 2, 2)]
    assert gap([kron(converged(m, kron(parts), (3, 2, 2), damping=0.0)[2])], [kron(parts)]) <= 1e-12


def check_one_axis(m):
    """S_t = (1 - beta2)^t I + (1 - (1 - beta2)^t) (B g g^T + lambda I) for a constant g: the full-matrix method."""
    g = np.array([1.0, -0.5, 0.25, 2.0])
    method = m.RFShampoo(**{**FACTORS, "weight_decay": 0.0, "momentum": 0.0})
    state = method.init(g)
    for t in range(1, 30):
        u, state = method.update(g, state, g)
        rest = 0.75**t
        s = rest * np.eye(4) + (1 - rest) * (2 * np.outer(g, g) + 0.25 * np.eye(4))
        assert gap([state.factors[0]], [s]) <= 1e-13
        assert gap([u], [np.linalg.solve(s, g)]) <= 1e-13


CHECKS = {
    f.__name__.removeprefix("check_"): f
    for f in (
        check_rms_prop,
        check_adam_w,
        check_shampoo,
        check_statistic,
        check_affine,
        check_orthogonal,
        check_gauge,
        check_diagonal_affine,
        check_reduction,
        check_scaling,
        check_permutation,
        check_fixed_point,
        check_one_axis,
    )
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_check(check):
    check(METHODS)


MUTANTS = {
    "square root": ("u = quotient(g, s + self.damping", "u = quotient(g, xp.sqrt(s) + self.damping", "scaling"),
    "old s used": ("u = quotient(g, s + self.damping", "u = quotient(g, state.s + self.damping", "rms_prop"),
    "damping inside the average": (
        "self.beta2 * (self.batch_size * square)",
        "self.beta2 * (self.batch_size * square + self.damping)",
        "rms_prop",
    ),
    "no B": ("self.beta2 * (self.batch_size * square)", "self.beta2 * square", "reduction"),
    "B squared": ("(self.batch_size * square)", "(self.batch_size**2 * square)", "reduction"),
    "beta2 as a decay": (
        "s = (1 - self.beta2) * state.s + self.beta2 * (",
        "s = self.beta2 * state.s + (1 - self.beta2) * (",
        "rms_prop",
    ),
    "s starts at 0": ("s=full(self.initial, *shape), buffer", "s=zeros(*shape), buffer", "rms_prop"),
    "RMSProp decay before the preconditioner": (
        "u = quotient(g, s",
        "u = quotient(g + self.weight_decay * param, s",
        "diagonal_affine",
    ),
    "RMSProp averaged momentum": (
        "None if state.buffer is None else self.momentum * state.buffer + u",
        "None if state.buffer is None else ema(state.buffer, u, self.momentum)",
        "rms_prop",
    ),
    "samples summed": ("** 2, axis=0)", "** 2, axis=0) * len(statistic)", "statistic"),
    "AdamW without B": ("self.batch_size * (g * g), self.beta2", "(g * g), self.beta2", "reduction"),
    "AdamW momentum in the curvature": ("self.batch_size * (g * g)", "self.batch_size * (m * m)", "adam_w"),
    "the code's correction": (
        "0.0 if self.bias_correction else self.initial",
        "self.initial",
        "adam_w",
    ),
    "m not corrected": ("m * k.inverse_c1", "m", "adam_w"),
    "s not corrected": ("s * k.inverse_c2 + self.damping, xp", "s + self.damping, xp", "adam_w"),
    "damping corrected too": (
        "s * k.inverse_c2 + self.damping, xp",
        "(s + self.damping) * k.inverse_c2, xp",
        "adam_w",
    ),
    "no d_n / D": ("* (dims[n] / math.prod(dims))", "", "fixed_point"),
    "damping without traces": ("traces[j] * damping", "damping", "gauge"),
    "damping outside the curvature": (
        "(self.batch_size / g.shape[-1] * outer + damping) * (dims[n] / math.prod(dims))",
        "self.batch_size / g.shape[-1] * outer * (dims[n] / math.prod(dims)) + damping",
        "fixed_point",
    ),
    "its own inverse as well": ("if j != n:", "if True:", "affine"),
    "no whitening": ("multiply(whitened, inverse, j, xp)", "whitened", "affine"),
    "factors one after the other": (
        "self.beta2 * (0.5 * (h + _t(h, xp))))  # (8)",
        "self.beta2 * (0.5 * (h + _t(h, xp))))\n"
        "            inverses = (*inverses[:n], _inverse(new[n], xp), *inverses[n + 1 :])",
        "permutation",
    ),
    "stale inverses": ("tuple(_inverse(s, xp) for s in new)", "inverses", "one_axis"),
    "inverse root": ("_t(half, xp) @ half, math", "half, math", "one_axis"),
    "samples of the factors summed": ("self.batch_size / g.shape[-1] * outer", "self.batch_size * outer", "statistic"),
    "factors' weight as a decay": (
        "(1 - self.beta2) * factor + self.beta2",
        "self.beta2 * factor + (1 - self.beta2)",
        "one_axis",
    ),
    "factors renewed a step late": ("now.due", "now.step % self.every == 0", "shampoo"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name):
    old, new, check = MUTANTS[name]
    with pytest.raises(AssertionError):
        CHECKS[check](mutated(root_free, (old, new)))


# ---- truth at 50 digits and closed forms ----


def test_mpmath():
    with mpmath.workdps(50):
        grads, params = normal(5, 3, seed=1), normal(5, 3, seed=2)
        exact = oracle.exact(grads), oracle.exact(params)
        diagonal, _ = oracle.rms_prop(*exact, **DIAGONAL)
        adam = [oracle.adam_w(exact[0], **ADAM, bias_correction=corrected) for corrected in (False, True)]
    assert gap(run(pr.RFRMSProp(**DIAGONAL), grads, params)[0], diagonal.astype(float)) <= 40 * U
    for corrected, truth in zip((False, True), adam, strict=True):
        got, _ = run(pr.RFAdamW(**ADAM, bias_correction=corrected), grads, params)
        assert gap(got, truth.astype(float)) <= 400 * U


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 2)])
def test_mpmath_factors(shape):
    grads, params = normal(4, *shape, seed=1), normal(4, *shape, seed=2)
    with mpmath.workdps(50):
        truth, factors = oracle.root_free(oracle.exact(grads), oracle.exact(params), **FACTORS)
    got, state = run(pr.RFShampoo(**FACTORS), grads, params)
    assert gap(got, truth.astype(float)) <= 100 * 4 * 8 * U
    assert gap(state.factors, [s.astype(float) for s in factors]) <= 100 * 4 * 8 * U


def test_corrected_averages_do_not_cancel():
    """s_1 - beta2 s_0 for B g^2 = 1e-12 has no correct digit in float32; the state leaves s_0 out instead."""
    g = np.asarray([1e-6], dtype=np.float32)
    method = pr.RFAdamW(damping=0.0, bias_correction=True)
    u, _ = method.update(g, method.init(g), g)
    assert u[0] == pytest.approx(1e6, rel=16 * 2**-24)


def test_constant_gradient():
    g = np.array([0.5, -2.0, 0.125])
    method = pr.RFRMSProp(**{**DIAGONAL, "initial": 1.0})
    state = method.init(g)
    for t in range(1, 40):
        _, state = method.update(g, state, g)
        rest = 0.75**t
        np.testing.assert_allclose(state.s, rest + (1 - rest) * 8 * g**2, rtol=4 * t * U, atol=0)


def test_one_step_bound():
    """|g| / (s + lambda) <= 1 / (2 sqrt(beta2 B ((1 - beta2) s_old + lambda))), reached at beta2 B g^2 = the rest."""
    beta2, batch_size, damping, s = 0.25, 8, 0.125, 0.5
    rest = 0.75 * s + damping
    bound = 1 / (2 * math.sqrt(beta2 * batch_size * rest))
    worst = math.sqrt(rest / (beta2 * batch_size))
    g = np.concat([worst * np.logspace(-3, 3, 101), [worst]])
    method = pr.RFRMSProp(beta2=beta2, damping=damping, batch_size=batch_size, initial=s)
    u, _ = method.update(g, method.init(g), g)
    assert np.max(u) <= bound * (1 + 8 * U)
    assert u[-1] == pytest.approx(bound, rel=8 * U)


def test_scale_is_forgotten():
    """L6 without rescaling the start: u(s g) -> u(g) / s once (1 - beta2)^t is negligible."""
    grads = np.tile(normal(1, 4, 3, seed=1), (400, 1, 1)) * (1 + 0.25 * normal(400, 1, 1, seed=2))
    for method in (pr.RFRMSProp(beta2=0.25, damping=0.0), pr.RFAdamW(beta1=0.5, beta2=0.75, damping=0.0)):
        u, v = (run(method, s * grads, grads)[0] for s in (1.0, 3.0))
        assert gap(3 * v[-1:], u[-1:]) <= 1e-13
        assert gap(3 * v[:1], u[:1]) >= 0.1


def test_exponents():
    """L8: u(s g) = s^(1 - 2/p) u(g): p = 2 for the methods with a root, p = 1 for those without."""
    grads = normal(5, 4, 3, seed=1)
    for method in (pr.RMSProp(beta2=0.75, eps=0.0), pr.Adam(beta1=0.5, beta2=0.75, eps=0.0), pr.Shampoo(eps=0.0)):
        u, v = (run(method, s * grads, grads)[0] for s in (1.0, 3.0))
        assert gap(v, u) <= 1e-13
    for method in (
        pr.RFRMSProp(beta2=0.25, damping=0.0, initial=0.0),
        pr.RFAdamW(beta1=0.5, beta2=0.75, damping=0.0, bias_correction=True),
    ):
        u, v = (run(method, s * grads, grads)[0] for s in (1.0, 3.0))
        assert gap(3 * v, u) <= 1e-13


def test_rooted_methods_are_not_affine():
    """L8: under w = D v RMSProp with the start rescaled takes another path."""
    targets, start, d = normal(20, 5, seed=1), normal(5, seed=2), np.array([0.5, 3.0, 1.0, 7.0, 0.25])
    method = pr.RMSProp(beta2=0.75, eps=0.0)
    w, _ = train(method, start, noisy(targets), 20, 2**-6)
    v, _ = train(method, start / d, lambda t, v: d * (d * v - targets[t]), 20, 2**-6)
    assert gap(d * v, w) >= 1e-2


def test_damping_breaks_affine_invariance():
    """The negative test of L1."""
    targets, start = normal(100, 4, 3, seed=1), normal(4, 3, seed=2)
    method = pr.RFShampoo(**FACTORS)
    maps = [well_conditioned(4, 3), well_conditioned(3, 4)]
    w, _ = train(method, start, noisy(targets), 100, 2**-6)
    v0 = along(start, [np.linalg.inv(a) for a in maps])
    begin = start_at(method, v0, [a.T @ a for a in maps])
    v, _ = train(method, v0, transformed(noisy(targets), maps), 100, 2**-6, begin)
    assert gap([along(x, maps) for x in v], w) >= 1e-3


# ---- coincidences ----


def test_adam_without_momentum_is_rms_prop():
    grads = normal(8, 3, 2, seed=1)
    u, _ = run(pr.RFAdamW(**{**ADAM, "beta1": 0.0}), grads, grads)
    v, _ = run(pr.RFRMSProp(beta2=0.125, damping=0.125, batch_size=4, initial=0.5), grads, grads)
    np.testing.assert_array_equal(u, v)


def test_scalar_shampoo_is_rms_prop():
    grads, params = normal(8, 1, seed=1), normal(8, 1, seed=2)
    fields = {**FACTORS, "damping": 0.0}
    u, _ = run(pr.RFShampoo(**fields), grads, params)
    v, _ = run(pr.RFRMSProp(**fields), grads, params)
    assert gap(u, v) <= 64 * U


# ---- rates on quadratics ----


def test_newton_rate():
    """5.7: with s at the Hessian the error contracts by 1 - lr at any condition number."""
    h, w = np.logspace(0, 6, 5), normal(5, seed=1)
    method = pr.RFRMSProp(beta2=0.25, damping=0.0)
    state = method.init(w)._replace(s=h)
    for _ in range(20):
        u, state = method.update(h * w, state, w, statistic=np.sqrt(h)[None])
        new = w - 0.3 * u
        np.testing.assert_allclose(new, 0.7 * w, rtol=1e-13, atol=0)
        w = new


def test_superlinear_rate():
    """5.7 at lr = 1: e_{t+1} = e_t (1 - h / s_t), whose logarithm has second difference -> log(1 - beta2)."""
    h, w, beta2 = np.asarray([3.0]), np.asarray([1.0]), 0.25
    method = pr.RFRMSProp(beta2=beta2, damping=0.0)
    state, logs = method.init(w), []
    for _ in range(25):
        u, state = method.update(h * w, state, w, statistic=np.sqrt(h)[None])
        w = w - u
        logs.append(math.log(abs(w[0])))
    s = h + (1 - beta2) ** np.arange(1, 26) * (1 - h)
    expected = math.log(1 - beta2) + np.log(s[:-1] / s[1:])[1:]  # the last term is about beta2 (1 - beta2)^t
    # s_t - h has lost a factor 1 / (1 - beta2)^t of its digits.
    np.testing.assert_allclose(np.diff(logs, 2), expected, rtol=0, atol=64 * U / (1 - beta2) ** 25)
    assert expected[-1] == pytest.approx(math.log(1 - beta2), abs=1e-3)


def test_heavy_ball_rate():
    """5.7: at S = H, e_{t+1} = (1 + alpha1 - lr) e_t - alpha1 e_{t-1}; modulus sqrt(alpha1) for complex roots."""
    h, alpha, lr = np.logspace(0, 3, 4), 0.5, 0.25
    method = pr.RFRMSProp(beta2=0.25, damping=0.0, momentum=alpha)
    path, state = [normal(4, seed=1)], None
    state = method.init(path[0])._replace(s=h)
    for _ in range(40):
        u, state = method.update(h * path[-1], state, path[-1], statistic=np.sqrt(h)[None])
        path.append(path[-1] - lr * u)
    for before, now, after in zip(path[:-2], path[1:-1], path[2:], strict=True):
        expected = (1 + alpha - lr) * now - alpha * before
        assert np.linalg.norm(after - expected) <= 1e-13 * (np.linalg.norm(now) + np.linalg.norm(before))
    assert np.all(np.abs(np.roots([1, -(1 + alpha - lr), alpha])) == pytest.approx(math.sqrt(alpha)))


def test_vanishing_gradients_need_damping():
    """5.8: full-batch curvature g^2 without damping vanishes with g and w keeps jumping; with it: 1 - lr h / lambda."""
    w, h = np.asarray([1.0]), 1.0

    def path(damping, lr, steps):
        method = pr.RFRMSProp(beta2=0.25, damping=damping)
        return np.abs(train(method, w, lambda t, x: h * x, steps, lr)[0][:, 0])

    assert path(0.0, 0.25, 400)[-100:].max() > 1e-2
    late = path(0.5, 0.25, 120)  # s is below lambda (1 - beta2)^120 = 1e-15 lambda by then
    assert late[-1] / late[-2] == pytest.approx(1 - 0.25 * h / 0.5, rel=1e-10)


def test_local_rates():
    """5.5: overall scale 1 - N beta2, trace-free shape 1 - beta2, gauge 1, for a Kronecker curvature."""
    shape, epsilon, beta2 = (3, 4), 1e-6, 0.125
    method, statistic, (c, k) = converged(
        METHODS, kron([positive(d, seed=d) for d in shape]), shape, damping=0.0, beta2=beta2
    )
    w, e = np.zeros(shape), normal(3, 3)
    e = e + e.T - 2 * np.trace(e) / 3 * np.eye(3)
    root = np.linalg.cholesky(c)

    def after(c0, k0):
        new_c, new_k = method.update(w, start_at(method, w, (c0, k0)), w, statistic=statistic)[1].factors
        inverse = np.linalg.inv(root)
        return inverse @ new_c @ inverse.T - np.eye(3), np.linalg.solve(k, new_k) - np.eye(4)

    dc, dk = after(c * (1 + epsilon), k)
    # The neglected second order is epsilon times a number below 10.
    assert (np.trace(dc) / 3 + np.trace(dk) / 4) / epsilon == pytest.approx(1 - 2 * beta2, abs=10 * epsilon)
    dc, _ = after(root @ (np.eye(3) + epsilon * e) @ root.T, k)
    np.testing.assert_allclose(dc / epsilon, (1 - beta2) * e, rtol=0, atol=100 * epsilon)
    dc, _ = after(c * (1 + epsilon), k / (1 + epsilon))
    np.testing.assert_allclose(dc / epsilon, np.eye(3), rtol=0, atol=10 * epsilon)


# ---- bfloat16 ----


def low_precision(name):
    if name == "torch":
        torch = pytest.importorskip("torch")
        return torch.bfloat16, torch.float32, torch.ones(3, dtype=torch.bfloat16)
    jnp = pytest.importorskip("jax").numpy
    return jnp.bfloat16, jnp.float32, jnp.ones(3, dtype=jnp.bfloat16)


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_dead_zone(library):
    """In bfloat16 s cannot leave a power of two for beta2 <= 2^-9; in the float32 state it decays as it should."""
    bfloat16, float32, param = low_precision(library)
    grad = 2.0**-10 * param
    for beta2, stuck in ((2**-9, True), (0.00118, True), (2**-8, False), (0.0103, False)):
        narrow, wide = (pr.RFRMSProp(beta2=beta2, narrow_state=narrow) for narrow in (True, False))
        states = [narrow.init(param), wide.init(param)]
        assert (states[0].s.dtype, states[1].s.dtype) == (bfloat16, float32)
        for _ in range(20):
            for i, method in enumerate((narrow, wide)):
                u, states[i] = method.update(grad, states[i], param)
                assert u.dtype == bfloat16
        assert bool((states[0].s == 1).all()) is stuck
        s = (1 - beta2) ** 20 + (1 - (1 - beta2) ** 20) * 2.0**-20
        assert float(states[1].s[0]) == pytest.approx(s, rel=20 * 3 * 2**-24)


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("method", [pr.RFRMSProp(**DIAGONAL), pr.RFAdamW(**ADAM, bias_correction=True)], ids=repr)
def test_bfloat16_parameters_have_a_float32_state(library, method):
    """The direction is the float32 one for the same gradients, rounded once."""
    bfloat16, float32, param = low_precision(library)
    convert = (lambda x, d: x.to(d)) if library == "torch" else (lambda x, d: x.astype(d))
    state, wide = method.init(param), method.init(convert(param, float32))
    for t in range(5):
        grad = (0.75 + t) * param
        u, state = method.update(grad, state, param)
        v, wide = method.update(convert(grad, float32), wide, convert(param, float32))
        assert u.dtype == bfloat16
        assert {str(x.dtype) for x in state if hasattr(x, "dtype")} == {str(convert(param, float32).dtype)}
        assert bool((u == convert(v, bfloat16)).all())


def test_float16_on_numpy():
    g = np.asarray([1.0, 300.0], dtype=np.float16)
    method = pr.RFRMSProp(**DIAGONAL)
    u, state = method.update(g, method.init(g), g)
    assert (u.dtype, state.s.dtype, state.buffer.dtype) == (np.float16, np.float32, np.float32)
    assert np.isfinite(u).all()  # 300^2 is beyond float16


def test_factors_need_float32():
    with pytest.raises(TypeError, match="RFShampoo factorises matrices, which needs float32 or float64"):
        pr.RFShampoo().init(np.zeros((2, 2), dtype=np.float16))


# ---- the authors' code ----


AUTHORS = {  # method, learning rate, decoupled decay, parameters after each of three steps
    "rms_prop": (
        pr.RFRMSProp(beta2=0.25, damping=0.125, momentum=0.5, weight_decay=0.125, batch_size=4),
        (0.25, 0.0),
        [
            [0.8576388888888888, -1.8041666666666667, 0.484375],
            [0.6929904513888888, -1.7418238146551723, 0.5058702256944444],
            [0.589010281032986, -1.627546559316003, 0.3404083914824496],
        ],
    ),
    "adam_w": (
        pr.RFAdamW(beta1=0.75, beta2=0.875, damping=0.125, batch_size=4),
        (0.25, 0.5),
        [
            [0.8472222222222222, -1.7083333333333333, 0.4375],
            [0.7034406565656566, -1.5182658450704223, 0.39150815217391305],
            [0.5835956808779282, -1.33743974815383, 0.2990587554327441],
        ],
    ),
    "adam_w, its correction with s_0 = 0": (
        pr.RFAdamW(beta1=0.75, beta2=0.875, damping=0.125, batch_size=4, bias_correction=True),
        (0.25, 0.0),
        [
            [0.8888888888888888, -1.9393939393939394, 0.5],
            [0.765736179529283, -1.9563603459090395, 0.612781954887218],
            [0.6639330390931559, -1.9631508254615453, 0.5537799684910223],
        ],
    ),
}


@pytest.mark.parametrize(("method", "rates", "expected"), AUTHORS.values(), ids=AUTHORS)
def test_authors_numbers(method, rates, expected):
    """What `rfrmsprop.py` and `rfadamw.py` of yorkerlin/remove-the-square-root give in float64."""
    lr, decay = rates
    w = np.array([1.0, -2.0, 0.5])
    state = method.init(w)
    for g, e in zip(([0.5, -1.0, 0.0], [0.25, 2.0, -0.125], [0.0, -0.5, 1.0]), expected, strict=True):
        u, state = method.update(np.array(g), state, w)
        w = (1 - lr * decay) * w - lr * u
        assert gap([w], [e]) <= 16 * U


# ---- the contract ----


FACTORED = pytest.mark.parametrize("make", [pr.RFShampoo, pr.IFShampoo])


@FACTORED
def test_every_and_refresh(make):
    grads = normal(6, 4, 3, seed=1)
    method, w = make(**FACTORS, every=3), grads[0]
    state, changed = method.init(w), []
    for g in grads:
        old = state.factors
        _, state = method.update(g, state, w)
        changed.append(not np.array_equal(old[0], state.factors[0]))
    assert changed == [True, False, False, True, False, False]
    kept = method.update(w, method.init(w), w, refresh=False)[1]
    np.testing.assert_array_equal(kept.factors[0], np.eye(4))
    now = method.update(w, state, w, refresh=True)[1]
    assert not np.array_equal(now.factors[0], state.factors[0])


@FACTORED
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_member_does_not_touch_the_others(bad, make):
    method = make(**FACTORS)
    grads = normal(2, 4, 3, seed=1)
    expected, _ = method.update(grads[1], method.init(grads[1]), grads[1])
    grads[0, 1, 2] = bad
    with np.errstate(invalid="ignore"):
        u, state = method.update(grads, method.init(grads, stack_ndim=1), np.stack([grads[1]] * 2))
    assert np.isnan(u[0]).all()
    assert gap([u[1]], [expected]) <= 1e-14
    assert method.diagnose(state).finite.tolist() == [False, True]


TRACED = {
    "RFRMSProp": DIAGONAL,
    "RFAdamW": {**ADAM, "bias_correction": True},
    "RFShampoo": FACTORS,
    "IFShampoo": {**FACTORS, "riemannian_momentum": 0.5},
}


@pytest.mark.parametrize("name", TRACED)
def test_array_valued_fields(name):
    """Hyperparameters may be tracers, as optax's ``inject_hyperparams`` makes them: the same numbers."""
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    cls, static = getattr(pr, name), {"bias_correction", "every"}
    fixed = {k: v for k, v in TRACED[name].items() if k in static}
    floats = {k: float(v) for k, v in TRACED[name].items() if k not in static}

    @jax.jit
    def two_steps(values, grads):
        method = cls(**values, **fixed)
        state = method.init(grads[0])
        _, state = method.update(grads[0], state, grads[0])
        return method.update(grads[1], state, grads[0])[0]

    grads = normal(2, 4, 3, seed=1)
    got = two_steps({k: jax.numpy.asarray(v) for k, v in floats.items()}, jax.numpy.asarray(grads))
    expected, _ = run(cls(**floats, **fixed), grads, [grads[0]] * 2)
    assert gap([np.asarray(got)], expected[-1:]) <= 1e-13


@pytest.mark.parametrize("name", TRACED)
def test_no_two_arrays_share_memory(name):
    """So that a caller may write into a state or a direction in place."""
    w = normal(4, 3, seed=1)
    for changes in ({}, {"momentum": 0.0}) if name != "RFAdamW" else ({}, {"bias_correction": False}):
        method = getattr(pr, name)(**{**TRACED[name], **changes})
        state = method.init(w)
        u, new = method.update(w, state, w)
        for arrays in ([*leaves(state), w], [*leaves(new), u, w]):
            assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(arrays, 2))


def leaves(state):
    return [leaf for part in state for leaf in (part if isinstance(part, tuple) else (part,)) if hasattr(leaf, "shape")]


@pytest.mark.parametrize("name", TRACED)
def test_in_an_optimizer(name):
    """Two matrices of one shape are stacked, a third shape is not: the same as one at a time."""
    method = getattr(pr, name)(**TRACED[name])
    params = {"a": normal(4, 3, seed=1), "b": normal(4, 3, seed=2), "c": normal(2, 2, 3, seed=3)}
    paths = []
    for fuse in (True, False):
        optimizer = pr.Optimizer(method, lr=0.125, fuse=fuse)
        state, p = optimizer.init(params), params
        for t in range(3):
            p, state = optimizer.step(p, {k: np.cos(t + v) for k, v in p.items()}, state)
        paths.append(p)
        assert all(bool(np.all(r.finite)) for r in optimizer.diagnose(p, state).values())
    for key in params:
        assert gap([paths[0][key]], [paths[1][key]]) <= 1e-14


def test_zero_over_zero_is_zero():
    g = np.asarray([0.0, 1.0])
    for method in (pr.RFRMSProp(damping=0.0, initial=0.0), pr.RFAdamW(damping=0.0, initial=0.0)):
        u, _ = method.update(g, method.init(g), g)
        assert u[0] == 0
        assert np.isfinite(u[1])


def test_empty_parameters():
    w = np.zeros((0, 3))
    for method in (pr.RFRMSProp(), pr.RFAdamW(), pr.RFShampoo()):
        u, state = method.update(w, method.init(w), w)
        assert u.shape == (0, 3)
        assert state.step == 1


def test_diagnose():
    grads = normal(3, 4, 3, seed=1)
    for method in (pr.RFRMSProp(**DIAGONAL), pr.RFRMSProp(**{**DIAGONAL, "momentum": 0.0})):
        _, state = run(method, grads, grads)
        report = method.diagnose(state)
        np.testing.assert_array_equal(report.denominator, state.s + 0.125)
        assert bool(report.finite)
    method = pr.RFAdamW(**ADAM, bias_correction=True)
    report = method.diagnose(run(method, grads[:1], grads[:1])[1])
    assert gap([report.denominator], [4 * grads[0] ** 2 + 0.125]) <= 8 * U
    method = pr.RFShampoo(**FACTORS)
    report = method.diagnose(run(method, grads, grads)[1])
    factors = oracle.root_free(grads, grads, **FACTORS)[1]
    assert gap(report.eigenvalues, [np.linalg.eigvalsh(s) for s in factors]) <= 1e-13
    assert bool(report.finite)


CHANGES = {
    "RFRMSProp": {
        "beta2": 0.125,
        "damping": 0.25,
        "momentum": 0.25,
        "weight_decay": 0.25,
        "batch_size": 4,
        "initial": 1.0,
        "narrow_state": True,
    },
    "RFAdamW": {
        "beta1": 0.5,
        "beta2": 0.75,
        "damping": 0.25,
        "batch_size": 2,
        "initial": 1.0,
        "bias_correction": True,
        "narrow_state": True,
    },
    "RFShampoo": {"beta2": 0.125, "damping": 0.5, "momentum": 0.25, "weight_decay": 0.25, "batch_size": 3, "every": 2},
}
BASES = {"RFRMSProp": DIAGONAL, "RFAdamW": ADAM, "RFShampoo": FACTORS}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, changes in CHANGES.items() for field in changes])
def test_no_dead_field(name, field):
    grads = normal(4, 4, 3, seed=1).astype(np.float16 if field == "narrow_state" else np.float64)
    base = getattr(pr, name)(**BASES[name])
    u, _ = run(base, grads, grads)
    v, _ = run(base.replace(**{field: CHANGES[name][field]}), grads, grads)
    assert gap(v[-1:].astype(float), u[-1:].astype(float)) >= 1e-4


@pytest.mark.parametrize("name", CHANGES)
def test_every_field_is_perturbed(name):
    fields = {field.name for field in dataclasses.fields(getattr(pr, name))}
    assert set(CHANGES[name]) == fields == set(getattr(pr, name).symbols)


@pytest.mark.parametrize(
    ("name", "fields", "error"),
    [
        ("RFRMSProp", {"beta2": 0.0}, ValueError),
        ("RFRMSProp", {"beta2": 1.5}, ValueError),
        ("RFRMSProp", {"damping": -1.0}, ValueError),
        ("RFRMSProp", {"momentum": 1.0}, ValueError),
        ("RFRMSProp", {"weight_decay": -1.0}, ValueError),
        ("RFRMSProp", {"batch_size": 0}, ValueError),
        ("RFRMSProp", {"initial": -1.0}, ValueError),
        ("RFRMSProp", {"initial": float("inf")}, ValueError),
        ("RFRMSProp", {"narrow_state": 1}, TypeError),
        ("RFAdamW", {"beta1": 1.0}, ValueError),
        ("RFAdamW", {"beta2": 1.0}, ValueError),
        ("RFAdamW", {"damping": -1.0}, ValueError),
        ("RFAdamW", {"batch_size": -2}, ValueError),
        ("RFAdamW", {"initial": -1.0}, ValueError),
        ("RFAdamW", {"bias_correction": None}, TypeError),
        ("RFAdamW", {"narrow_state": "no"}, TypeError),
        ("RFShampoo", {"beta2": -0.5}, ValueError),
        ("RFShampoo", {"damping": float("nan")}, ValueError),
        ("RFShampoo", {"damping": 0.0, "beta2": 1.0}, ValueError),  # nothing makes the factors definite
        ("RFShampoo", {"momentum": -0.5}, ValueError),
        ("RFShampoo", {"weight_decay": -1.0}, ValueError),
        ("RFShampoo", {"batch_size": "auto"}, TypeError),
        ("RFShampoo", {"every": 0}, ValueError),
    ],
)
def test_bad_fields(name, fields, error):
    with pytest.raises(error, match=next(iter(fields))):
        getattr(pr, name)(**fields)


@pytest.mark.parametrize("cls", [pr.RFRMSProp, pr.RFShampoo])
def test_large_beta2_warns(cls):
    with pytest.warns(UserWarning, match=r"weight of the new term.*give beta2=0\.01") as record:
        cls(beta2=0.99)
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls(beta2=0.5)
        pr.RFAdamW(beta2=0.99)


def test_first_line_says_what_beta2_is():
    for cls in (pr.RFRMSProp, pr.RFShampoo, pr.IFShampoo):
        assert "``beta2`` is the weight of the *new* term" in cls.__doc__.splitlines()[0]
        assert "NEW" in cls.symbols["beta2"]
    assert "are *decays*" in pr.RFAdamW.__doc__.splitlines()[0]


def test_bad_arrays():
    w = normal(4, 3)
    method = pr.RFShampoo(**FACTORS)
    state = method.init(w)
    with pytest.raises(ValueError, match="grad must have param's shape"):
        method.update(normal(3, 4), state, w)
    with pytest.raises(ValueError, match=r"state\.factors\[0\] must have shape"):
        method.update(normal(3, 4), state._replace(buffer=normal(3, 4)), normal(3, 4))
    with pytest.raises(ValueError, match=r"state\.inverses\[0\] must have shape"):
        method.update(w, state._replace(inverses=state.inverses[::-1]), w)
    with pytest.raises(ValueError, match="statistic must have shape"):
        method.update(w, state, w, statistic=w)
    with pytest.raises(ValueError, match="refresh=False needs every > 1"):
        method.update(w, state, w, refresh=False)
    with pytest.raises(TypeError, match="state must be a RFRMSPropState"):
        pr.RFRMSProp().update(w, state, w)
    with pytest.raises(TypeError, match="real floating"):
        pr.RFAdamW().init(np.zeros(3, dtype=int))
