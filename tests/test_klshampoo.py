"""KL-Shampoo, KL-SOAP and the idealised form: their laws and limits, and planted bugs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from helpers import directions, distance, gradients
from mutation import mutated

import precond_ref as pr
from precond_ref.methods import klshampoo

FIELDS: dict[str, Any] = {
    "beta1": 0.75, "beta2": 0.875, "shampoo_beta": 0.625, "eps": 0.25, "every": 3, "initial": 0.375,
}  # fmt: skip
STEPS = 12


def rotation(seed: int, d: int) -> np.ndarray:
    q: np.ndarray = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]
    return q


def states(method: Any, grads: np.ndarray) -> list[Any]:
    state, out = method.init(grads[0]), []
    for g in grads:
        _, state = method.update(g, state, g)
        out.append(state)
    return out


def check_first(module: ModuleType) -> None:
    """The first direction is exactly 0; the second has no bases in it."""
    grads = gradients((4, 3), 2)
    for inner in ("shampoo", "adam"):
        assert not np.any(directions(module.KLShampoo(inner=inner, **FIELDS), grads)[0])
    second = directions(module.KLShampoo(**FIELDS), grads)[1]
    assert np.allclose(second, 0.25 * grads[1] / (0.375 + 0.25), rtol=1e-13, atol=0)
    cube = gradients((2, 3, 2), 2)
    second = directions(module.KLShampoo(**FIELDS), cube)[1]
    assert np.allclose(second, 0.25 * cube[1] / (0.375**1.5 + 0.25), rtol=1e-13, atol=0)


def check_statistics(module: ModuleType) -> None:
    """S is the average of G S_other^-1 G^T with the other factor as it was before, and l its diagonal's."""
    grads = gradients((4, 3), 7)
    method = module.KLShampoo(clamp=None, **FIELDS)
    seen = states(method, grads)
    for t in range(1, 7):
        old, new = seen[t - 1], seen[t]
        (qa, la), (qb, lb) = old.factors
        for axis, (q, w, other, spectrum, x) in enumerate(((qa, la, qb, lb, grads[t]), (qb, lb, qa, la, grads[t].T))):
            term = x @ (other / spectrum) @ other.T @ x.T / x.shape[1]
            gram = 0.625 * old.grams[axis] + 0.375 * term
            assert np.allclose(new.grams[axis], gram, rtol=0, atol=1e-12 * np.linalg.norm(gram))
            want = 0.625 * w + 0.375 * np.diag(q.T @ term @ q)
            assert np.allclose(new.factors[axis].eigenvalues, want, rtol=1e-12, atol=0)
            basis = new.factors[axis].basis
            if t % 3:
                assert np.array_equal(basis, q)
            else:
                upper = basis.T @ gram @ q
                assert np.allclose(basis.T @ basis, np.eye(len(q)), rtol=0, atol=1e-14)
                assert np.allclose(np.tril(upper, -1), 0, rtol=0, atol=1e-13 * np.linalg.norm(gram))
                assert np.all(np.diag(upper) > 0)
    first = seen[0]
    for axis, x in enumerate((grads[0], grads[0].T)):
        gram = 0.375 * x @ x.T / x.shape[1]
        assert np.allclose(first.grams[axis], gram, rtol=0, atol=1e-14 * np.linalg.norm(gram))
        turned = first.factors[axis].basis.T @ gram @ first.factors[axis].basis
        assert np.allclose(turned, np.diag(np.sort(np.diag(turned))[::-1]), rtol=0, atol=1e-13)


def check_rotation(module: ModuleType) -> None:
    """G -> U G V turns the directions, and transposition transposes them."""
    grads = gradients((4, 4), STEPS)
    u, v = rotation(1, 4), rotation(2, 4)
    for changes in ({}, {"inner": "adam"}, {"normalize": True}):
        method = module.KLShampoo(**FIELDS, **changes)
        want = directions(method, grads)[1:]
        assert distance(directions(method, u @ grads @ v)[1:], u @ want @ v) <= 1e-11
        assert distance(directions(method, np.swapaxes(grads, 1, 2))[1:], np.swapaxes(want, 1, 2)) <= 1e-11
        if changes == {"normalize": True}:
            assert np.allclose(np.mean(want**2, axis=(1, 2)), 1, rtol=1e-13)


def check_fixed_basis(module: ModuleType) -> None:
    """After a first gradient of zero, without renewals: Adam without corrections, or a rank-one form of it."""
    grads = gradients((4, 3), STEPS)
    grads[0] = 0
    fields = {**FIELDS, "every": 999}
    m, v, la, lb = np.zeros((4, 3)), np.zeros((4, 3)), np.full(4, 0.375), np.full(3, 0.375)
    adam, rank_one = [], []
    for g in grads[1:]:
        m, v = 0.75 * m + 0.25 * g, 0.875 * v + 0.125 * g * g
        adam.append(m / (np.sqrt(v) + 0.25))
        rank_one.append(m / (np.sqrt(np.outer(la, lb)) + 0.25))
        la, lb = (
            0.625 * la + 0.375 * np.mean(g * g / lb, axis=1),
            0.625 * lb + 0.375 * np.mean(g * g / la[:, None], axis=0),
        )
    got = directions(module.KLShampoo(inner="adam", **fields), grads)[1:]
    assert distance(got, np.stack(adam)) <= 1e-13
    assert distance(directions(module.KLShampoo(clamp=None, **fields), grads)[1:], np.stack(rank_one)) <= 1e-13


def check_rank_one(module: ModuleType) -> None:
    """Squares a b^T: the product of the eigenvalues tends to them."""
    a, b = np.random.default_rng(1).uniform(0.5, 2, (2, 4))
    grads = np.sign(gradients((4, 3), 200)) * np.sqrt(a[:, None] * b[:3])
    grads[0] = 0
    state = states(module.KLShampoo(**{**FIELDS, "every": 999}), grads)[-1]
    rows, columns = (factor.eigenvalues[::-1] for factor in state.factors)  # the bases are reversed
    assert np.allclose(np.outer(rows, columns), np.outer(a, b[:3]), rtol=1e-12, atol=0)


def check_fixed_point(module: ModuleType) -> None:
    """Squares V that are the same at every update: means of V / (l_a l_b^T) over rows and columns are 1.

    The estimate with the row and column sums of V, Adafactor's, is another one.
    """
    v = np.random.default_rng(1).uniform(0.25, 4, (4, 3)) ** 2
    grads = np.sign(gradients((4, 3), 300)) * np.sqrt(v)
    grads[0] = 0
    state = states(module.KLShampoo(**{**FIELDS, "every": 999}), grads)[-1]
    fit = np.outer(*(factor.eigenvalues[::-1] for factor in state.factors))  # the bases are reversed
    for axis in (0, 1):
        assert np.allclose(np.mean(v / fit, axis=axis), 1, rtol=1e-12, atol=0)
    sums = pr.Adafactor(eps1=0.0, clip=None, parameter_scale=False)
    other = sums.diagnose(states(sums, grads[1:])[-1]).denominator ** 2
    for axis in (0, 1):
        assert np.allclose(np.sum(other, axis=axis), np.sum(v, axis=axis), rtol=1e-12, atol=0)
    assert np.linalg.norm(fit - other) > 0.1 * np.linalg.norm(other)


def check_scale(module: ModuleType) -> None:
    """G, initial and eps by c, c^(2/N) and c: the same directions up to the first renewal, and others after it."""
    for shape in ((4, 3), (2, 3, 2)):
        grads = gradients(shape, 9)
        method = module.KLShampoo(clamp=None, **{**FIELDS, "every": 5})
        scaled = method.replace(initial=0.375 * 8 ** (2 / len(shape)), eps=8 * 0.25)
        want, got = directions(method, grads), directions(scaled, 8 * grads)
        assert distance(got[1:6], want[1:6]) <= 1e-13
        assert distance(got[6:], want[6:]) > 1e-2


def check_optimum(module: ModuleType) -> None:
    """Gradients A X_i B with the second moment A A^T (x) B^T B: the exact form finds this product."""
    a, b = gradients((3, 3), 1)[0] + 2 * np.eye(3), gradients((2, 2), 1)[0] + 2 * np.eye(2)
    grads = np.stack([np.sqrt(6) * a @ x @ b for x in np.eye(6).reshape(6, 3, 2)] * 50)
    method = module.KLShampooExact(beta1=0.0, beta2=0.984375, eps=0.0, initial=1.0)
    last = states(method, grads)[-6:]
    left, right = (sum(state.grams[n] for state in last) / 6 for n in (0, 1))
    found, want = np.kron(left, right), np.kron(a @ a.T, b.T @ b)
    assert np.linalg.norm(found - want) <= 0.05 * np.linalg.norm(want)
    assert abs(np.trace(np.linalg.solve(found, want)) - 6) <= 0.05 * 6


def check_gauge(module: ModuleType) -> None:
    """One factor times k, the other divided by it: no later direction changes."""
    grads = gradients((4, 3), STEPS)
    method = module.KLShampoo(clamp=None, **FIELDS)
    seen = states(method, grads[:5])[-1]
    scaled = seen._replace(
        grams=(8 * seen.grams[0], seen.grams[1] / 8),
        factors=tuple(f._replace(eigenvalues=f.eigenvalues * c) for f, c in zip(seen.factors, (8, 1 / 8), strict=True)),
    )
    for g in grads[5:]:
        (one, seen), (other, scaled) = (method.update(g, s, g) for s in (seen, scaled))
        assert np.allclose(one, other, rtol=0, atol=1e-12 * np.linalg.norm(one))


def check_bound(module: ModuleType) -> None:
    """Small gradients: the eigenvalues end at their bound; damping comes through the other factors."""
    grads = 2.0**-20 * gradients((12, 11), 4)
    fields = {**FIELDS, "shampoo_beta": 0.0, "start": "identity", "initial": 0.01}
    for clamp, bounds in ((4000, (1 / 144, 1 / 121)), (11, (1 / 121, 1 / 121)), (1, (0.01, 0.01))):
        last = states(module.KLShampoo(clamp=clamp, **fields), grads)[-1]
        for factor, bound in zip(last.factors, bounds, strict=True):
            assert np.allclose(factor.eigenvalues, bound, rtol=1e-14, atol=0)
    damped = states(module.KLShampoo(damping=0.5, **FIELDS), np.zeros((2, 4, 3)))[-1]
    for factor in damped.factors:
        assert np.allclose(factor.eigenvalues, 0.625 * 0.375 + 0.375 * 0.5 / 0.375, rtol=1e-14, atol=0)


def check_deficient(module: ModuleType) -> None:
    """Where S Q has lost rank the old columns complete it; nothing at all leaves the basis."""
    grads = np.zeros((5, 4, 3))
    state = states(module.KLShampoo(**{**FIELDS, "start": "identity"}), grads)[-1]
    assert all(np.array_equal(factor.basis, np.eye(factor.basis.shape[-1])) for factor in state.factors)
    a, b = gradients((4,), 2)
    grads[:] = np.outer(a, b[:3])
    state = states(module.KLShampoo(**{**FIELDS, "start": "identity"}), grads)[-1]
    for factor, vector in zip(state.factors, (a, b[:3]), strict=True):
        q, r = np.linalg.qr(np.column_stack([vector * vector[0], np.eye(len(vector))[:, 1:]]))
        assert np.allclose(factor.basis, q * np.sign(np.diag(r)), rtol=0, atol=1e-13)


def check_exact(module: ModuleType) -> None:
    """The factors of root-free Shampoo, the polar factor in the limit, and one-sided Shampoo for one column."""
    grads = gradients((4, 3), STEPS)
    exact = module.KLShampooExact(beta1=0.0, beta2=0.625, eps=0.0, initial=1.0)
    free = pr.RFShampoo(beta2=0.375, damping=0.0, momentum=0.0)
    for ours, theirs in zip(states(exact, grads), states(free, grads), strict=True):
        for one, other in zip(ours.grams, theirs.factors, strict=True):
            assert np.allclose(one, other, rtol=0, atol=1e-12 * np.linalg.norm(other))
    square = gradients((4, 4), 1)[0]
    got = directions(exact, np.stack([square] * 120))[-1]
    assert np.allclose(got, 2 * scipy.linalg.polar(square)[0], rtol=0, atol=1e-10)
    vector = gradients((4, 1), STEPS)
    shampoo = pr.Shampoo(beta2=0.625, eps=0.25, bias_correction=True)
    ours = module.KLShampooExact(beta1=0.0, beta2=0.625, eps=0.25, initial=0.0, bias_correction=True)
    assert distance(directions(ours, vector), directions(shampoo, vector[..., 0])[..., None]) <= 1e-12
    meta = module.KLShampooExact(
        beta1=0.0, beta2=0.625, eps=0.25, initial=0.0, exponent=None, divide=False, bias_correction=True
    )
    one, two = gradients((4, 3), 2)
    right = scipy.linalg.fractional_matrix_power(one.T @ one + 0.25 * np.eye(3), -0.25)
    left = scipy.linalg.fractional_matrix_power(one @ one.T + 0.25 * np.eye(4), -0.25)
    second = states(meta, np.stack([one, two]))[-1].grams[0]
    assert np.allclose(directions(meta, one[None])[0], left @ one @ right, rtol=0, atol=1e-12)
    assert np.allclose(second, 0.625 * 0.375 * one @ one.T + 0.375 * two @ right @ right @ two.T, rtol=0, atol=1e-12)


CHECKS = {
    "first": check_first,
    "statistics": check_statistics,
    "rotation": check_rotation,
    "fixed basis": check_fixed_basis,
    "rank one": check_rank_one,
    "optimum": check_optimum,
    "point": check_fixed_point,
    "scale": check_scale,
    "gauge": check_gauge,
    "bound": check_bound,
    "deficient": check_deficient,
    "exact": check_exact,
}


@pytest.mark.parametrize("name", CHECKS)
def test_klshampoo(name: str) -> None:
    CHECKS[name](klshampoo)


BUGS = {
    "eps on each eigenvalue": ("inner * (e / (1 + self.eps * e))", "inner * (e / (1 + self.eps))", "first"),
    "no share in the statistic": ("* (dims[n] / math.prod(dims)), b3)", ", b3)", "statistics"),
    "sums in the eigenvalues": ("a = xp.mean(y * y, axis=-1)", "a = xp.sum(y * y, axis=-1)", "statistics"),
    "the other factor unused": ("start=1.0 * rotated)", "start=1.0 * rotated) * 0 + rotated", "rank one"),
    "own factor used": ("if j != n]\n            y", "if j == n]\n            y", "statistics"),
    "QR of S": ("k.first else _orthogonal(gram @ basis, basis", "k.first else _orthogonal(gram, basis", "statistics"),
    "ascending": ("xp.flip(q, axis=-1)", "q", "statistics"),
    "signs free": ("xp.where(diagonal < 0, -xp.ones_like(diagonal), 1.0)", "xp.ones_like(diagonal)", "statistics"),
    "average in the wrong bases": ("u = multiply(u, basis, n, xp)", "u = u", "rotation"),
    "squares outside of the bases": ("xp.reshape(rotated * rotated, grad.shape)", "grad * grad", "rotation"),
    "normalised to norm 1": ("xp.mean(u * u, axis=tuple", "xp.sum(u * u, axis=tuple", "rotation"),
    "decays exchanged": ("self.beta2 if self.shampoo_beta is None else self.shampoo_beta", "self.beta2", "fixed basis"),
    "average from the first": ("_choose(first, state.m +", "_choose(0.0, state.m +", "first"),
    "eigenvalues move at first": ("_choose(first, w, new, xp) + bad", "new + bad", "first"),
    "bound of the axis ignored": (
        "max(10, min(dims[n], self.clamp)) ** 2, xp", "max(10, self.clamp) ** 2, xp", "bound",
    ),
    "bound above": ("clamp(new, 1 / max", "clamp(new, 0.0, 1 / max", "bound"),
    "damping without the others": ("self.damping * math.prod(", "self.damping + 0 * math.prod(", "bound"),
    "nothing completed": ("basis, columns), xp)[0]", "columns, columns), xp)[0]", "deficient"),
    "eps squared": ("inner * (e / (1 + self.eps * e))", "inner * (e / (1 + self.eps * self.eps * e))", "scale"),
    "products of the roots": ("a = xp.mean(y * y, axis=-1)", "a = xp.mean(xp.abs(y), axis=-1)", "point"),
    "half of the exponent": ("else -self.exponent, self.eps", "else -self.exponent / 2, self.eps", "optimum"),
    "exponent of Shampoo": ("else -self.exponent, self.eps", "else -self.exponent / 2, self.eps", "exact"),
    "undivided": ("if self.divide else 1.0", "if not self.divide else 1.0", "exact"),
    "axis whitened itself": ("multiply(x, root, j, xp) if j != n else x", "multiply(x, root, j, xp)", "exact"),
    "statistic not corrected": ("gram * k.inverse_c2, law", "gram, law", "exact"),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name: str) -> None:
    old, new, checks = BUGS[name]
    module = mutated(klshampoo, (old, new))
    check = next(CHECKS[check] for check in CHECKS if check in checks)
    with np.errstate(all="ignore"), pytest.raises(AssertionError):
        check(module)


def test_presets_and_report() -> None:
    assert pr.KLShampoo.soap(every=3) == pr.KLShampoo(inner="adam", every=3)
    assert isinstance(pr.KLShampoo.meta(), pr.KLShampoo.exact)
    method, grads = pr.KLShampoo(**FIELDS), gradients((4, 3), 5)
    state = states(method, grads)[-1]
    report = method.diagnose(state)
    for n in range(2):
        basis, w = state.factors[n]
        turned = basis.T @ state.grams[n] @ basis
        outside = np.linalg.norm(turned - np.diag(np.diag(turned))) / np.linalg.norm(turned)
        assert np.array_equal(report.eigenvalues[n], w)
        assert np.allclose(report.diagonal[n], np.diag(turned), rtol=1e-13)
        assert np.isclose(report.staleness[n], outside, rtol=1e-13)
        assert report.floored[n] == 0
    assert bool(report.finite)
    exact = pr.KLShampoo.exact(eps=0.25)
    state = states(exact, grads)[-1]
    assert np.allclose(exact.diagnose(state).eigenvalues[0], np.linalg.eigvalsh(state.grams[0]), rtol=1e-12)
