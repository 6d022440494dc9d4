"""RF-RMSProp, RF-AdamW and RF-Shampoo: laws, closed forms, rates, bfloat16, the authors' numbers, planted bugs."""

from __future__ import annotations

import math
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import distance as gap
from helpers import leaves
from kronecker import LAWS, noisy, normal, run, train
from mutation import check_vectors, mutated

import precond_ref as pr
from precond_ref.methods import root_free

U = 2**-53
DIAGONAL = {"beta2": 0.25, "damping": 0.125, "momentum": 0.5, "weight_decay": 0.125, "batch_size": 8, "initial": 0.5}
ADAM = {"beta1": 0.75, "beta2": 0.875, "damping": 0.125, "batch_size": 4, "initial": 0.5}
FACTORS = {"beta2": 0.25, "damping": 0.25, "momentum": 0.5, "weight_decay": 0.125, "batch_size": 2}
METHODS = SimpleNamespace(RFRMSProp=pr.RFRMSProp, RFAdamW=pr.RFAdamW, RFShampoo=pr.RFShampoo)


# ---- checks: each takes the three classes, right or mutated ----


def check_statistic(m):
    """The mean over the samples takes the gradient's place in the curvature."""
    grad, samples = normal(3, seed=1), normal(4, 3, seed=3)
    method = m.RFShampoo(**FACTORS)
    _, state = method.update(grad, method.init(grad), grad, statistic=samples)
    expected = 0.75 * np.eye(3) + 0.25 * (
        2 * np.mean(samples[:, :, None] * samples[:, None], axis=0) + 0.25 * np.eye(3)
    )
    assert gap(state.factors, [expected]) <= 16 * U
    method = m.RFRMSProp(**DIAGONAL)
    _, state = method.update(grad, method.init(grad), grad, statistic=samples)
    assert gap([state.s], [0.75 * 0.5 + 0.25 * 8 * np.mean(samples**2, axis=0)]) <= 16 * U


def check_diagonal_affine(m):
    """L8, second part: RF-RMSProp under w = D v with s = D^2 at the start and no damping."""
    targets, start = normal(100, 5, seed=1), normal(5, seed=2)
    d = np.array([0.5, 3.0, 1.0, 7.0, 0.25])
    method = m.RFRMSProp(**{**DIAGONAL, "damping": 0.0})
    w, _ = train(method, start, noisy(targets), 100, 2**-6)
    state = method.init(start)._replace(s=0.5 * d**2)
    v, _ = train(method, start / d, lambda t, v: d * (d * v - targets[t]), 100, 2**-6, state)
    assert gap(d * v, w) <= 1e-12


def check_diagonal_reduction(m):
    """L5: the mean with B and the sum with B = 1, where S_0 and lambda are divided by B."""
    grads, params = normal(50, 4, 3, seed=1), normal(50, 4, 3, seed=2)
    for cls, fields in ((m.RFRMSProp, DIAGONAL), (m.RFAdamW, ADAM)):
        mean = cls(**{**fields, "batch_size": 8, "damping": 0.125, "initial": 0.5})
        total = cls(**{**fields, "batch_size": 1, "damping": 1.0, "initial": 4.0})
        assert gap(run(mean, grads, params)[0], run(total, 8 * grads, params)[0]) <= 1e-12


def check_diagonal_scaling(m):
    """L6: g -> s g, S_0 -> s^2 S_0, lambda -> s^2 lambda: u -> u / s."""
    grads, params, s = normal(50, 4, 3, seed=1), normal(50, 4, 3, seed=2), 3.0
    small = m.RFRMSProp(**{**DIAGONAL, "weight_decay": 0.0})
    large = small.replace(damping=small.damping * s**2, initial=small.initial * s**2)
    assert gap(s * run(large, s * grads, params)[0], run(small, grads, params)[0]) <= 1e-12


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


CHECKS = {"vectors": check_vectors} | {
    f.__name__.removeprefix("check_"): f
    for f in (check_statistic, check_diagonal_affine, check_diagonal_reduction, check_diagonal_scaling, check_one_axis)
}
CHECKS |= {name: lambda m, law=law: law(partial(m.RFShampoo, **FACTORS)) for name, law in LAWS.items()}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_check(check):
    check(METHODS)


MUTANTS = {
    "square root": ("u = quotient(g, s + self.damping", "u = quotient(g, xp.sqrt(s) + self.damping",
        "diagonal_scaling"),
    "old s used": ("u = quotient(g, s + self.damping", "u = quotient(g, state.s + self.damping", "vectors"),
    "damping inside the average": ("self.beta2 * (self.batch_size * square)",
        "self.beta2 * (self.batch_size * square + self.damping)", "vectors"),
    "no B": ("self.beta2 * (self.batch_size * square)", "self.beta2 * square", "diagonal_reduction"),
    "B squared": ("(self.batch_size * square)", "(self.batch_size**2 * square)", "diagonal_reduction"),
    "beta2 as a decay": ("s = (1 - self.beta2) * state.s + self.beta2 * (",
        "s = self.beta2 * state.s + (1 - self.beta2) * (", "vectors"),
    "s starts at 0": ("s=full(self.initial, *shape), buffer", "s=zeros(*shape), buffer", "vectors"),
    "RMSProp decay before the preconditioner": ("u = quotient(g, s", "u = quotient(g + self.weight_decay * param, s",
        "diagonal_affine"),
    "RMSProp averaged momentum": ("heavy_ball(state.buffer, u, self.momentum)  # (3)\n        return xp.astype",
        "heavy_ball(state.buffer, (1 - self.momentum) * u, self.momentum)\n        return xp.astype", "vectors"),
    "samples summed": ("** 2, axis=0)", "** 2, axis=0) * len(statistic)", "statistic"),
    "AdamW without B": ("self.batch_size * (g * g), self.beta2", "(g * g), self.beta2", "diagonal_reduction"),
    "AdamW momentum in the curvature": ("self.batch_size * (g * g)", "self.batch_size * (m * m)", "vectors"),
    "the code's correction": ("0.0 if self.bias_correction else self.initial", "self.initial", "vectors"),
    "m not corrected": ("m * k.inverse_c1", "m", "vectors"),
    "s not corrected": ("s * k.inverse_c2 + self.damping, xp", "s + self.damping, xp", "vectors"),
    "damping corrected too": ("s * k.inverse_c2 + self.damping, xp", "(s + self.damping) * k.inverse_c2, xp",
        "vectors"),
    "no d_n / D": ("* (dims[n] / math.prod(dims))", "", "fixed_point"),
    "damping without traces": ("traces[j] * damping", "damping", "gauge"),
    "damping outside the curvature": ("(self.batch_size / g.shape[-1] * outer + damping) * (dims[n] / math.prod(dims))",
        "self.batch_size / g.shape[-1] * outer * (dims[n] / math.prod(dims)) + damping", "fixed_point"),
    "its own inverse as well": ("if j != n:", "if True:", "affine"),
    "no whitening": ("multiply(whitened, inverse, j, xp)", "whitened", "affine"),
    "factors one after the other": ("self.beta2 * (0.5 * (h + t(h, xp))))  # (8)",
        "self.beta2 * (0.5 * (h + t(h, xp))))\n"
        "            inverses = (*inverses[:n], _inverse(new[n], xp), *inverses[n + 1 :])", "permutation"),
    "stale inverses": ("tuple(_inverse(s, xp) for s in new)", "inverses", "one_axis"),
    "inverse root": ("t(half, xp) @ half, math", "half, math", "one_axis"),
    "samples of the factors summed": ("self.batch_size / g.shape[-1] * outer", "self.batch_size * outer", "statistic"),
    "factors' weight as a decay": ("(1 - self.beta2) * factor + self.beta2", "self.beta2 * factor + (1 - self.beta2)",
        "one_axis"),
    "factors renewed a step late": ("now.due", "now.step % self.every == 0", "vectors"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name):
    old, new, check = MUTANTS[name]
    with pytest.raises(AssertionError):
        CHECKS[check](mutated(root_free, (old, new)))


# ---- closed forms ----


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
@pytest.mark.parametrize(
    "method", [pr.RFRMSProp(**DIAGONAL), pr.RFAdamW(**ADAM, bias_correction=True), pr.IFShampoo(**FACTORS)], ids=repr
)
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
        assert {str(x.dtype) for x in leaves(state._replace(step=0))} == {str(convert(param, float32).dtype)}
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


# ---- renewals, fields, reports ----


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


def test_zero_over_zero_is_zero():
    g = np.asarray([0.0, 1.0])
    for method in (pr.RFRMSProp(damping=0.0, initial=0.0), pr.RFAdamW(damping=0.0, initial=0.0)):
        u, _ = method.update(g, method.init(g), g)
        assert u[0] == 0
        assert np.isfinite(u[1])


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
    _, state = run(method, grads, grads)
    report = method.diagnose(state)
    assert gap(report.eigenvalues, [np.linalg.eigvalsh(s) for s in state.factors]) <= 1e-13
    assert bool(report.finite)


def test_factors_that_nothing_makes_definite_are_refused():
    with pytest.raises(ValueError, match="damping"):
        pr.RFShampoo(damping=0.0, beta2=1.0)


@pytest.mark.parametrize("cls", [pr.RFRMSProp, pr.RFShampoo, pr.IFShampoo])
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


@FACTORED
def test_bad_arrays(make):
    w = normal(4, 3)
    method = make(**FACTORS)
    state = method.init(w)
    with pytest.raises(ValueError, match=r"state\.factors\[0\] must have shape"):
        method.update(normal(3, 4), state._replace(buffer=normal(3, 4)), normal(3, 4))
    with pytest.raises(ValueError, match="statistic must have shape"):
        method.update(w, state, w, statistic=w)
