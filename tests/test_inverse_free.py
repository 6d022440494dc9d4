"""IF-Shampoo: laws, fixed points, rates, structures, half precision, the authors' package, planted bugs."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
from helpers import distance as gap
from kronecker import LAWS, along, basis, converged, curvature, kron, noisy, normal, positive, run, train, transformed
from mutation import check_vectors, mutated

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
        e = basis(structure, d)
        x = np.tensordot(normal(len(e), seed=seed + i), e, 1)
        result.append(np.eye(d) + 0.5 * x / np.linalg.norm(x, 2))
    return result


# ---- checks: each takes the class, right or mutated ----


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
        other = pr.RFShampoo(**fields, momentum=0.0)
        begin = other.init(g)._replace(factors=tuple(s), inverses=tuple(np.linalg.inv(x) for x in s))
        expected = other.update(g, begin, g)[1].factors
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


def check_trace_and_divergence(cls):
    """Section 5.1 and 5.2: the trace identities, and the minimum of KL."""
    damping, sigma = 0.25, positive(6)
    _, statistic, state = converged(partial(cls, **LOUD), sigma, (3, 2))
    (c, k), (s_c, s_k) = state.factors, curvature(state)
    noise = np.mean([np.sum((c.T @ x @ k) ** 2) for x in statistic])
    assert noise + damping * np.sum(c**2) * np.sum(k**2) == pytest.approx(6, rel=1e-12)
    target = sigma + damping * np.eye(6)

    def kl(a, b):  # twice the divergence, up to a constant
        s = np.kron(a, b)
        return np.trace(np.linalg.solve(s, target)) + np.linalg.slogdet(s)[1]

    assert np.trace(np.linalg.solve(np.kron(s_c, s_k), target)) == pytest.approx(6, rel=1e-12)
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


CHECKS = {"vectors": lambda cls: check_vectors(SimpleNamespace(IFShampoo=cls))} | {
    f.__name__.removeprefix("check_"): f
    for f in (
        check_group,
        check_first_order,
        check_expm,
        check_trace_and_divergence,
        check_clip,
        check_range,
        check_descent,
    )
}
CHECKS |= {name: lambda cls, law=law: law(partial(cls, **LOUD)) for name, law in LAWS.items()}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_check(check):
    check(pr.IFShampoo)


MUTANTS = {
    "K contracts the gradient": ("multiply(p, t(k, xp), n, xp)", "multiply(p, k, n, xp)", "affine"),
    "K^T K applied": (
        "multiply(multiply(u, t(small, xp), n, xp), small, n, xp)",
        "multiply(multiply(u, small, n, xp), t(small, xp), n, xp)",
        "descent",
    ),
    "K K^T in the damping": ("gram_of(t(k, xp), xp) for k in scaled", "gram_of(k, xp) for k in scaled", "first_order"),
    "m K": ("k @ unit", "unit @ k", "affine"),
    "K left out of its update": ("(k @ unit)", "unit", "expm"),
    "no half": ("m = project(h", "m = 2 * project(h", "first_order"),
    "no B": ("sqrt(self.batch_size / g.shape[-1])", "sqrt(1 / g.shape[-1])", "reduction"),
    "B squared": ("sqrt(self.batch_size / g.shape[-1])", "(self.batch_size / g.shape[-1])", "reduction"),
    "samples summed": ("sqrt(self.batch_size / g.shape[-1])", "sqrt(self.batch_size)", "fixed_point"),
    "no d_n": ("dims[n] * gram_of(", "gram_of(", "fixed_point"),
    "damping over d_n": ("self.damping * math.prod(dims)", "self.damping * math.prod(dims) / dims[n]", "fixed_point"),
    "damping with its own trace": ("if j != n:", "if True:", "fixed_point"),
    "damping without traces": ("if j != n:", "if False:", "fixed_point"),
    "damping on I": ("+ damping * grams[n]", "+ damping * identity(xp, grams[n])", "gauge"),
    "no identity": ("project(h - identity(xp, h)", "project(h", "fixed_point"),
    "heavy ball on m": ("m = ema(momenta[n], m, self.", "m = m + momenta[n] * (self.", "vectors"),
    "clip by K": ("clamp(size * norm,", "clamp(xp.linalg.matrix_norm(k, keepdims=True),", "clip"),
    "clip by the largest entry": ("clamp(size * norm,", "clamp(largest_entry(m, (-2, -1), xp),", "clip"),
    "clip left out": ("if self.clip else 1.0", "if not self.clip else 1.0", "clip"),
    "normalised below 1 too": ("clamp(size * norm, 1.0, xp=xp)", "size * norm", "fixed_point"),
    "clipped m kept": ("new_momenta.append(m)", "new_momenta.append(m / length)", "vectors"),
    "old factors used": ("copy=False), factors, dims", "copy=False), state.factors, dims", "descent"),
    "r instead of r^2": ("scale = scale * peak", "scale = scale * xp.sqrt(peak)", "vectors"),
    "no scaling of K in the direction": ("small = k / xp.sqrt(peak)", "small, peak = k, 1.0 + 0 * peak", "range"),
    "no scaling of K in P": ("k * (1 / math.sqrt(d)) for k, d in", "k * math.sqrt(d) for k, d in", "range"),
    "decay before the preconditioner": (
        "(xp.astype(grad, dtype, copy=False), factors",
        "(grad + self.weight_decay * param, factors",
        "descent",
    ),
    "averaged momentum": ("state.buffer, u, self", "state.buffer, (1 - self.momentum) * u, self", "vectors"),
    "renewed after the first interval": ("now.due", "now.step % self.every == 0", "vectors"),
    "gradient instead of statistic": ("samples(grad, statistic,", "samples(grad, None,", "fixed_point"),
    "structures reversed": ("return self.structure\n", "return self.structure[::-1]\n", "permutation"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name):
    old, new, check = MUTANTS[name]
    cls = mutated(inverse_free, (old, new)).IFShampoo
    with pytest.raises((AssertionError, FloatingPointError)), np.errstate(all="ignore"):
        CHECKS[check](cls)


# ---- closed forms ----


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
        e = basis(structure, len(factor)).reshape(-1, factor.size)
        inside = e.T @ np.linalg.lstsq(e.T, factor.reshape(-1), rcond=None)[0]
        # Zeros stay exactly zero; tied entries drift apart by rounding, one step of 4 d u at a time.
        assert np.linalg.norm(factor.reshape(-1) - inside) <= 300 * 4 * 5 * U * np.linalg.norm(factor)
        assert np.all(factor[basis(structure, len(factor)).sum(axis=0) == 0] == 0)


# ---- half precision ----


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_narrow_state_is_bfloat16(library):
    if library == "torch":
        torch = pytest.importorskip("torch")
        bfloat16, update = torch.bfloat16, lambda method: method.update
    else:
        jax = pytest.importorskip("jax")
        bfloat16, update = jax.numpy.bfloat16, lambda method: jax.jit(method.update)

    def make(x, dtype):
        x = np.asarray(x, np.float32)
        return torch.as_tensor(x).to(dtype) if library == "torch" else jax.numpy.asarray(x).astype(dtype)

    method = pr.IFShampoo(**LOUD, narrow_state=True, structure=("hierarchical(1,1)", "tril-toeplitz"))
    param = make(normal(4, 3, seed=2), bfloat16)
    state = method.init(param)
    expected, _ = run(method, normal(5, 4, 3, seed=1), np.tile(np.asarray(normal(4, 3, seed=2)), (5, 1, 1)))
    step = update(method)
    for g, e in zip(normal(5, 4, 3, seed=1), expected, strict=True):
        u, state = step(make(g, bfloat16), state, param)
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


# ---- reports, refusals ----


def test_diagnose():
    grads = normal(3, 4, 3, seed=1)
    method = pr.IFShampoo(**LOUD)
    _, state = run(method, grads, grads)
    report = method.diagnose(state)
    c, k = state.factors
    assert gap(report.inverses, [c @ c.T, k @ k.T]) <= 1e-13
    assert gap(report.eigenvalues, [np.linalg.eigvalsh(c @ c.T), np.linalg.eigvalsh(k @ k.T)]) <= 1e-13
    assert bool(report.finite)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"structure": "full"}, ValueError, "structure must be one of"),
        ({"structure": ["dense"]}, TypeError, "structure must be a string"),
        ({"structure": ("dense", 3)}, TypeError, "structure must be a string"),
    ],
)
def test_bad_structures(fields, error, match):
    with pytest.raises(error, match=match):
        pr.IFShampoo(**fields)


def test_bad_arrays():
    method = pr.IFShampoo(structure=("dense", "diagonal"))
    w = normal(4, 3)
    state = method.init(w)
    for shape, axes in (((4, 3, 2), 3), ((4, 1), 1)):
        with pytest.raises(ValueError, match=f"one entry for each of the {axes} axes"):
            method.init(normal(*shape))
    with pytest.raises(ValueError, match=r"state\.momenta\[0\] must have shape"):
        method.update(w, state._replace(momenta=state.momenta[::-1]), w)
