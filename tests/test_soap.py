"""SOAP against a plain model that carries M' as the authors' code does, limits, invariances, and planted bugs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import directions, distance, gradients
from mutation import mutated

import precond_ref as pr
from precond_ref.conformance import variants
from precond_ref.conformance.declarations.soap import CASES
from precond_ref.methods import soap
from precond_ref.numerics import bases

LOUD = {"beta1": 0.75, "beta2": 0.875, "shampoo_beta": 0.625, "eps": 0.1875, "every": 2}


def model(grads: np.ndarray, turn: Any = None, *, beta1: float, beta2: float, shampoo_beta: float, eps: float,
          every: int, sides: tuple[int, ...] | None = None, eigh: bool = False) -> np.ndarray:  # fmt: skip
    """Directions for tensors, by einsum-free loops; M' is carried by back-projection, as the authors' code does.

    ``turn(d)``: a signed permutation that the first basis of an axis of size d gets, columns; nothing may depend on it.
    """
    order = grads.ndim - 1
    sides = tuple(range(order)) if sides is None else sides

    def on(x: np.ndarray, q: np.ndarray, axis: int) -> np.ndarray:
        return np.moveaxis(np.tensordot(q, x, (1, axis)), 0, axis)

    def there(x: np.ndarray) -> np.ndarray:
        for i in sides:
            x = on(x, Q[i].T, i)
        return x

    def back(x: np.ndarray) -> np.ndarray:
        for i in sides:
            x = on(x, Q[i], i)
        return x

    def statistic(x: np.ndarray, axis: int) -> np.ndarray:
        others = [i for i in range(order) if i != axis]
        return np.tensordot(x, x, (others, others))

    L: Any = {i: (1 - shampoo_beta) * statistic(grads[0], i) for i in sides}
    Q: Any = {i: np.linalg.eigh(L[i])[1][:, ::-1] for i in sides}
    if turn is not None:
        Q = {i: Q[i] @ turn(len(Q[i])) for i in sides}
    M = V = np.zeros(grads.shape[1:])
    found = [M]
    for s, g in enumerate(grads[1:], start=1):
        rotated = there(g)
        M, V = beta1 * M + (1 - beta1) * rotated, beta2 * V + (1 - beta2) * rotated**2
        found.append(back(M / (np.sqrt(V) + eps)) * np.sqrt(1 - beta2**s) / (1 - beta1**s))
        L = {i: shampoo_beta * L[i] + (1 - shampoo_beta) * statistic(g, i) for i in sides}
        if s % every == 0:
            M = back(M)
            for i in sides:
                order_of_columns = np.argsort(-np.diag(Q[i].T @ L[i] @ Q[i]), kind="stable")
                V = np.take(V, order_of_columns, axis=i)
                Q[i] = np.linalg.eigh(L[i])[1][:, ::-1] if eigh else np.linalg.qr(L[i] @ Q[i][:, order_of_columns])[0]
            M = there(M)
    return np.stack(found)


def rotation(d: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]


def signed_permutation(d: int) -> np.ndarray:
    rng = np.random.default_rng(d)
    return np.eye(d)[rng.permutation(d)] * rng.choice([-1, 1], d)


# ---- checks, each of which takes the class --------------------------------------------------------------------------


def check_model(cls: Any) -> None:
    for shape, every in (((4, 3), 2), ((3, 3), 1), ((2, 3, 4), 3)):
        grads = gradients(shape, 9)
        fields = {**LOUD, "every": every}
        assert distance(directions(cls(**fields), grads)[1:], model(grads, **fields)[1:]) <= 1e-12
        assert not np.any(directions(cls(**fields), grads)[0])
    grads = gradients((4, 3), 9, seed=1)
    found = directions(cls(**LOUD, basis="eigh"), grads)
    assert distance(found[1:], model(grads, **LOUD, eigh=True)[1:]) <= 1e-12
    one_side = directions(cls(**LOUD, max_dim=4), gradients((5, 3), 8))
    assert distance(one_side[1:], model(gradients((5, 3), 8), **LOUD, sides=(1,))[1:]) <= 1e-12


def check_adam(cls: Any) -> None:
    """On the identity basis SOAP is Adam, fed G_2, G_3, ...; eps is that of the uncorrected root, or Adam's."""
    grads = gradients((4, 3), 12)
    for extra, eps in (({"eps_position": "corrected"}, 0.1875), ({}, 0.0), ({"eps_position": "max"}, 0.0)):
        adam = directions(pr.Adam(beta1=0.75, beta2=0.875, eps=eps), grads[1:])
        method = cls(beta1=0.75, beta2=0.875, eps=eps, every=1, **extra)
        assert distance(directions(method.replace(max_dim=2), grads)[1:], adam) <= 1e-14
        state, kept = method.init(grads[0]), []
        for g in grads:
            direction, state = method.update(g, state, g, refresh=False)
            kept.append(direction)
        assert distance(np.stack(kept[1:]), adam) <= 1e-14
        assert not np.any(kept[0])
    vector = directions(cls(beta1=0.75, beta2=0.875, eps=0.0), grads[:, 0])[1:]
    assert distance(vector, directions(pr.Adam(beta1=0.75, beta2=0.875, eps=0.0), grads[1:, 0])) <= 1e-14


def check_second_direction(cls: Any) -> None:
    """At t = 2 with eps = 0 it is the sign of the rotated gradient: its norm is sqrt(mn)."""
    second = directions(cls(eps=0.0), gradients((4, 3), 2))[1]
    assert abs(np.linalg.norm(second) / np.sqrt(12) - 1) <= 1e-14


def check_equivariance(cls: Any) -> None:
    grads, left, right = gradients((4, 3), 8), rotation(4), rotation(3)
    for basis in ("qr", "eigh"):
        method = cls(**LOUD, basis=basis)
        plain = directions(method, grads)[1:]
        assert distance(directions(method, left @ grads @ right.T)[1:], left @ plain @ right.T) <= 1e-12
        assert distance(directions(method, np.swapaxes(grads, 1, 2))[1:], np.swapaxes(plain, 1, 2)) <= 1e-12
        scaled = method.replace(eps=8 * 0.1875)
        assert np.array_equal(directions(scaled, 8 * grads)[1:], plain)
    one = cls(**LOUD, max_dim=4)
    grads, signs = gradients((5, 4), 8), signed_permutation(5)
    plain = directions(one, grads)[1:]
    assert distance(directions(one, signs @ grads @ left.T)[1:], signs @ plain @ left.T) <= 1e-12
    assert distance(directions(one, rotation(5) @ grads)[1:], rotation(5) @ plain) > 0.1


def check_scaled_statistics(cls: Any) -> None:
    """A renewal takes no notice of the statistics' scale."""
    grads, zero = gradients((4, 3), 6), np.zeros((4, 3))
    for fields in ({}, {"basis": "eigh"}, {"sort": "after"}, {"iterations": 2}):
        method = cls(**LOUD, **fields)
        state = method.init(grads[0])
        for g in grads[:5]:
            _, state = method.update(g, state, g)
        scaled = state._replace(grams=tuple(8 * gram for gram in state.grams))
        renewed = [method.update(zero, s, zero, refresh=True)[1] for s in (state, scaled)]
        one, other = (method.update(grads[5], s, zero, refresh=False)[0] for s in renewed)
        assert np.linalg.norm(one - other) <= 1e-13 * np.linalg.norm(one), fields
        assert np.linalg.norm(one - method.update(grads[5], state, zero)[0]) > 1e-3 * np.linalg.norm(one), fields


def check_polar(cls: Any) -> None:
    g = gradients((4, 3), 1)
    u, s, vh = np.linalg.svd(g[0], full_matrices=False)
    for basis, eps in itertools.product(("qr", "eigh"), (0.1875, 1e-3)):
        method = cls(eps=eps, order="update_first", eps_position="corrected", basis=basis)
        assert distance(directions(method, g), [(u * (s / (s + eps))) @ vh]) <= 1e-10


def check_relation(cls: Any) -> None:
    """Row sums of V are the diagonal of Q^T L Q where both averages have seen the same gradients in a fixed basis."""
    grads, method = gradients((4, 3), 8), cls(**{**LOUD, "shampoo_beta": None, "every": 100})
    _, state = method.update(grads[0], method.init(grads[0]), grads[0])
    state = state._replace(grams=tuple(0 * gram for gram in state.grams))
    for g in grads[1:]:
        _, state = method.update(g, state, g)
    for axis, (gram, q) in enumerate(zip(state.grams, state.bases, strict=True)):
        assert np.allclose(np.sum(state.v, axis=1 - axis), np.diag(q.T @ gram @ q), rtol=1e-13)


def check_degenerate_statistics(cls: Any) -> None:
    """Zero gradients keep the basis; dependent columns give an orthogonal basis; members do not mix."""
    grads = gradients((3, 5, 3), 6)
    grads[:2, 1] = 0
    grads[:, 2] = grads[:1, 2]  # of rank 3 for ever, on five rows
    method = cls(**{**LOUD, "every": 1})
    state = method.init(grads[0], stack_ndim=1)
    for t, g in enumerate(grads):
        _, state = method.update(g, state, g)
        lost = np.max(np.abs(np.swapaxes(state.bases[0], -1, -2) @ state.bases[0] - np.eye(5)), axis=(-2, -1))
        assert np.all(lost <= 1e-13), t
        if t < 2:
            assert np.allclose(np.abs(state.bases[0][1]), np.eye(5)[::-1], atol=1e-14)
    alone = method.init(grads[0, 0])
    for g in grads[:, 0]:
        _, alone = method.update(g, alone, g)
    assert np.array_equal(alone.bases[0], state.bases[0][0])
    zero = cls(**{**LOUD, "every": 1, "eps": 0.0})
    assert not np.any(directions(zero, np.zeros((4, 3, 2))))


def check_forms(cls: Any) -> None:
    """The forms of other libraries by formulas: one update after the renewal of a basis."""
    grads = gradients((3, 3), 4, seed=5)

    def state_after(count: int, **fields: Any) -> Any:
        method = cls(**{**LOUD, "every": 1, **fields})
        state = method.init(grads[0])
        for g in grads[:count]:
            _, state = method.update(g, state, g)
        return state

    before = state_after(2)
    for fields in ({"second_moment": "keep"}, {"second_moment": "rotate"}, {"sort": "after"}, {"iterations": 3}):
        method = cls(**{**LOUD, "every": 1, **fields})
        _, after = method.update(grads[2], before, grads[0])
        rotated = before.bases[0].T @ grads[2] @ before.bases[1]
        v = 0.875 * before.v + 0.125 * rotated**2
        for axis, (gram, old, new) in enumerate(zip(after.grams, before.bases, after.bases, strict=True)):
            a = np.diag(old.T @ gram @ old)
            start = old if fields.get("sort") == "after" else old[:, np.argsort(-a, kind="stable")]
            order = np.argsort(-a, kind="stable")
            for _ in range(fields.get("iterations", 1)):
                start = np.linalg.qr(gram @ start)[0]
            if fields.get("sort") == "after":
                order = np.argsort(-np.diag(start.T @ gram @ start), kind="stable")
                start = start[:, order]
            assert np.allclose(np.abs(new.T @ start), np.eye(3), atol=1e-13), fields
            if fields.get("second_moment") == "rotate":
                v = np.moveaxis(np.tensordot((new.T @ old) ** 2, v, (1, axis)), 0, axis)
            elif fields.get("second_moment") != "keep":
                v = np.take(v, order, axis=axis)
        assert np.allclose(after.v, v, rtol=1e-13), fields


def check_scale(cls: Any) -> None:
    """Bias corrections, look-ahead and normalisation on the identity basis, where all are elementwise."""
    grads = gradients((2, 3), 6)
    base = {"beta1": 0.75, "beta2": 0.875, "eps": 0.1875, "max_dim": 1}
    m = v = np.zeros((2, 3))
    for s, g in enumerate(grads[1:], start=1):
        m, v = 0.75 * m + 0.25 * g, 0.875 * v + 0.125 * g**2
        c1, c2, ahead = 1 - 0.75**s, 1 - 0.875**s, 1 - 0.75 ** (s + 1)
        n = m / (np.sqrt(v) + 0.1875)
        rms = np.sqrt(np.mean(n**2))
        expected = {
            (): n * np.sqrt(c2) / c1,
            (("bias_correction", False),): n,
            (("eps_position", "corrected"),): m / c1 / (np.sqrt(v / c2) + 0.1875),
            (("eps_position", "max"),): m / c1 / np.maximum(np.sqrt(v / c2), 0.1875),
            (("nesterov", True),): (0.75 * m / ahead + 0.25 * g / c1) / (np.sqrt(v) + 0.1875) * np.sqrt(c2),
            (("nesterov", True), ("bias_correction", False)): (0.75 * m + 0.25 * g) / (np.sqrt(v) + 0.1875),
            (("normalize", True), ("normalize_eps", 0.125)): n / (rms + 0.125) * np.sqrt(c2) / c1,
        }
        for fields, want in expected.items():
            got = directions(cls(**base, **dict(fields)), grads[: s + 1])
            assert np.allclose(got[s], want, rtol=1e-13, atol=0), fields
            assert not np.any(got[0]), fields


def check_merging(cls: Any) -> None:
    """Merged axes are those of a reshaped parameter; the layout of a convolution is a transposed one."""
    assert cls(merge=True, max_dim=6).axes((4, 3, 2, 2)) == (4, 6, 2)
    assert cls(merge=True, max_dim=10).axes((20, 3)) == (20, 3)
    assert cls(merge=True, max_dim=12).axes((1, 3, 1, 4)) == (12,)
    assert cls(max_dim=6).axes((4, 3, 2, 1)) == (4, 3, 2, 1)
    grads = gradients((4, 3, 2, 2), 7)
    merged = directions(cls(**LOUD, merge=True, max_dim=6), grads)[1:]
    plain = directions(cls(**LOUD), grads.reshape(7, 4, 6, 2))[1:]
    assert distance(merged, plain.reshape(6, 4, 3, 2, 2)) <= 1e-14
    moved = directions(cls(**LOUD, merge=True, max_dim=6, channels_last=True), np.moveaxis(grads, 2, 4))[1:]
    assert distance(np.moveaxis(moved, 4, 2), merged) <= 1e-13


CHECKS: dict[str, Callable[[Any], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str) -> None:
    CHECKS[name](pr.SOAP)


BUGS = {
    "V not permuted": (soap, "return orthogonal.taken(v, order, axis, xp)  # (R3)", "return v", "model"),
    "V permuted by the inverse": (soap, "taken(v, order, axis", "taken(v, xp.argsort(order, axis=-1), axis",
                                  "model"),
    "columns ascending": (bases, "descending=True, stable=True", "descending=False, stable=True", "model"),
    "ties disturbed": (bases, "return xp.argsort(values, axis=-1, descending=True, stable=True)",
                       "return xp.flip(xp.argsort(values, axis=-1, stable=True), axis=-1)", "degenerate_statistics"),
    "product in the old order": (bases, "taken(product, order, 1, xp)", "product", "model"),
    "unsorted": (soap, "# (R1), (R2)", "; start, product = old, None", "model"),
    "bases renewed before their use": (soap, 'if self.order == "update_first":\n            grams',
                                       "if True:\n            grams", "model"),
    "update 1 not skipped": (soap, "else 1.0 - k.first  # 0", "else 1.0  # 0", "model"),
    "t for s": (soap, 's = step - 1 if self.order == "use_first" else step', "s = step", "model"),
    "eps inside the root": (soap, "return root + self.eps", "return xp.sqrt(v + self.eps)", "model"),
    "eps on the corrected root": (soap, 'if self.eps_position == "uncorrected":\n            return', "if False:\n"
                                  "            return", "model"),
    "M' not rotated": (soap, "orthogonal.onto(self._arranged(m, now.stack, xp), new, xp) if", "average if", "model"),
    "M' of the M before": (soap, "self._renewed(g, m, grams", "self._renewed(g, state.m, grams", "model"),
    "V rotated": (soap, 'if self.second_moment == "rotate":', "if True:", "model"),
    "Q for its transpose": (soap, "orthogonal.back(n, bases, xp), None",
                            "orthogonal.onto(n, bases, xp), None", "model"),
    "beta2 for L": (soap, "decay = now.xp, self.beta2 if self.shampoo_beta is None else self.shampoo_beta",
                    "decay = now.xp, self.beta2", "model"),
    "L of beta2 alone": (soap, "decay = now.xp, self.beta2 if self.shampoo_beta is None else self.shampoo_beta",
                         "decay = now.xp, 0.5 if self.shampoo_beta is None else self.shampoo_beta", "relation"),
    "L from M": (soap, '        elif self.order == "use_first":\n', '        elif self.order == "use_first":\n'
                 "            g = self._arranged(ema(state.m, grad, self.beta1), stack, xp)\n", "model"),
    "statistic frozen": (soap, "        grams = tuple(gram if", "        old_grams = grams\n"
                         "        grams = grams if not now.due else tuple(gram if", "model"),
    "one long axis ends all": (soap, "and min(dims) <= self.max_dim", "and max(dims) <= self.max_dim", "model"),
    "long axes have a basis": (soap, "tuple(d <= self.max_dim for d in dims)", "tuple(True for d in dims)", "model"),
    "vectors have a basis": (soap, "len(shape) >= (1 if self.vectors else 2) and", "len(shape) >= 1 and", "adam"),
    "eigenvectors always": (soap, "            now.k.first > 0,", "            True,", "model"),
    "no eigenvectors at first": (soap, "            now.k.first > 0,", "            False,", "polar"),
    "a ridge on L": (bases, "half = 0.5 * matrix", "half = 0.5 * (matrix + identity(xp, matrix))",
                     "scaled_statistics"),
    "L^-1": (bases, "matrix @ basis if i or product is None else product", "xp.linalg.solve(matrix, basis)", "model"),
    "refresh=False ignored": (soap, "renew(now.due, refreshed", "renew(True, refreshed", "adam"),
    "one round only": (soap, "start, self.iterations, product", "start, 1, product", "forms"),
    "V kept although sorted after": (soap, "order, new, _ = orthogonal.in_order(gram, new, xp)",
                                     "order, new, _ = None, *orthogonal.in_order(gram, new, xp)[1:]",
                                     "forms"),
    "V permuted and rotated": (soap, "return multiply(v, turn * turn, axis, xp)",
                               "v = multiply(v, turn * turn, axis, xp)", "forms"),
    "rotated by Q, not by its squares": (soap, "multiply(v, turn * turn, axis", "multiply(v, turn, axis", "forms"),
    "normalised after the correction": (soap, "n = quotient(n, size + self.normalize_eps, xp)  # (n)",
                                        "n = quotient(n, k.root_c2 * size + self.normalize_eps, xp)", "scale"),
    "look-ahead by s": (soap, "self.beta1 * k.inverse_next", "self.beta1 * k.inverse_c1", "scale"),
    "look-ahead not skipped": (soap, "_scaled(used, self.beta1 * k", "_scaled(1.0, self.beta1 * k", "scale"),
    "max is a sum": (soap, "return clamp(corrected, self.eps, xp=xp)", "return corrected + self.eps", "scale"),
    "merged from the right": (soap, "    for d in shape:\n", "    for d in shape[::-1]:\n", "merging"),
    "size 1 ends a product": (soap, "if product * d <= bound:", "if 1 < product * d <= bound and d > 1:", "merging"),
    "layout not undone": (soap, "return x if moved == shape else xp.moveaxis(x, stack + 1, stack + 3)",
                          "return xp.reshape(x, like.shape)", "merging"),
}  # fmt: skip


def planted(module: Any, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`SOAP` with a piece of a module exchanged."""
    copy = mutated(module, (old, new))
    if module is soap:
        return copy.SOAP
    monkeypatch.setattr(soap, "orthogonal", copy)
    return pr.SOAP


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, old, new, check = BUGS[name]
    cls = planted(module, old, new, monkeypatch)
    with pytest.raises((AssertionError, np.linalg.LinAlgError)), np.errstate(all="ignore"):
        CHECKS[check](cls)


# ---- the rest -------------------------------------------------------------------------------------------------------


def test_no_sign_or_order_of_the_first_basis_matters() -> None:
    grads = gradients((4, 3), 9)
    for every in (1, 2):
        plain = model(grads, **{**LOUD, "every": every})[1:]
        turned = model(grads, signed_permutation, **{**LOUD, "every": every})[1:]
        assert distance(turned, plain) <= 1e-12
    generic = model(grads, lambda d: rotation(d), **LOUD)[1:]  # a rotation matters: V is no tensor
    assert distance(generic, plain) > 0.1


def check_orthonormal(module: Any) -> None:
    """Gram-Schmidt by hand: what depends on columns before is replaced, after all the others, by columns of another
    basis; each member of a stack by its own sizes."""
    rng = np.random.default_rng(0)
    full, low = rng.standard_normal((4, 4)), rng.standard_normal((4, 2)) @ rng.standard_normal((2, 4))
    gap = np.stack([full[0], 2 * full[0], full[1], 0 * full[0]], axis=1)  # of rank 2, in columns 0 and 2
    spare = rotation(4, seed=1)
    columns = np.stack([full, 1e-20 * full, 1e200 * full, low, gap, np.zeros((4, 4))])
    chosen = (0, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (2, [0, 1, 2, 3]), (3, [0, 1]), (4, [0, 2]), (5, [])
    for stack in (chosen, chosen[3:4], chosen[4:5], (chosen[0], *chosen[3:5])):  # right: 0, 2, 1 and 1 columns
        members = columns[[member for member, _ in stack]]
        got = module.orthonormal(members, np.broadcast_to(spare, members.shape))
        for x, q, (_, first) in zip(members, got, stack, strict=True):
            found: dict[int, np.ndarray] = {}
            for j in [*first, *(j for j in range(4) if j not in first)]:
                y = x[:, j] / np.max(np.abs(x)) if j in first else spare[:, j]
                for earlier in found.values():
                    y = y - earlier * (earlier @ y)
                found[j] = y / np.linalg.norm(y)
            assert np.allclose(np.abs([found[j] @ q[:, j] for j in range(4)]), 1, atol=1e-10), first


def test_orthonormal() -> None:
    check_orthonormal(bases)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("> _rounding(lengths(columns, xp), xp)", "> -1"),
        ("lengths(columns, xp)", "xp.sqrt(xp.sum(columns * columns, axis=-2))"),
        ("columns[..., right:], spare[..., right:])", "columns[..., right:], 0.0)"),
        ("taken(xp.where(known[..., None, :],", "(lambda x, *_: x)(xp.where(known[..., None, :],"),
        ("new = taken(new, xp.argsort(last, axis=-1), 1, xp)", ""),
        ("xp.matrix_transpose(free) @ start if right else start", "start[..., right:, :]"),
        ("free @ new], axis=-1)", "free], axis=-1)"),
        ("int(xp.argmin(", "1 + int(xp.argmin("),
        ("xp.all(sure, axis=-1)", "xp.any(sure, axis=-1)"),
        ("xp.max(sizes, axis=-1, keepdims=True)", "xp.max(sizes)"),
    ],
)
def test_planted_bugs_of_orthonormal(old: str, new: str) -> None:
    with pytest.raises((AssertionError, RuntimeWarning)):
        check_orthonormal(mutated(bases, (old, new)))


def test_a_degenerate_eigenspace_leaves_the_run_undetermined() -> None:
    """After G_1 = I every basis is one of eigenvectors, and G_2 = e_1 e_1^T has another direction in each."""
    method = pr.SOAP(eps=0.0)
    g = np.array([[1.0, 0.0], [0.0, 0.0]])
    _, state = method.update(np.eye(2), method.init(g), g)
    c = np.sqrt(0.5)
    for basis, factor in ((np.eye(2), 1), (np.array([[c, -c], [c, c]]), 2)):
        direction, _ = method.update(g, state._replace(bases=(basis, basis)), g)
        assert np.allclose(direction, factor * g, atol=1e-15)


def test_factored_second_moment_is_shampoo_of_power_one_half() -> None:
    """V_ij replaced by (row sum)(column sum) / sum in the eigenbases: sqrt(tr L) L^{-1/2} G R^{-1/2}."""
    g = gradients((3, 3), 1)[0]
    method = pr.SOAP(beta1=0.0, beta2=0.0, eps=0.0, order="update_first")
    _, state = method.update(g, method.init(g), g)
    v = np.outer(*(np.diag(q.T @ gram @ q) for gram, q in zip(state.grams, state.bases, strict=True)))
    rotated = state.bases[0].T @ g @ state.bases[1]
    direction = state.bases[0] @ (rotated / np.sqrt(v / np.trace(g @ g.T))) @ state.bases[1].T
    expected = pr.Shampoo(eps=0.0).update(g, pr.Shampoo(eps=0.0).init(g), g)[0]  # powers 1/4
    half = np.linalg.inv(expected) @ expected  # I: the polar factor squared away
    u, s, vh = np.linalg.svd(g)
    assert np.allclose(direction, np.linalg.norm(g) * u @ np.diag(1 / s) @ vh, rtol=1e-12)
    assert np.allclose(half, np.eye(3), atol=1e-12)


def test_refresh_overrules() -> None:
    grads = gradients((4, 3), 4)
    method = pr.SOAP(**{**LOUD, "every": 1})
    for g, refresh in ((grads[0], True), (grads[0], None)):
        _, state = method.update(g, method.init(g), g, refresh=refresh)
        assert not np.array_equal(state.bases[0], np.eye(4))
    direction, kept = method.update(grads[1], state, grads[1], refresh=False)
    assert all(np.array_equal(a, b) for a, b in zip(kept.bases, state.bases, strict=True))
    assert not np.array_equal(kept.grams[0], state.grams[0])
    assert np.array_equal(direction, method.update(grads[1], state, grads[1], refresh=True)[0])
    with pytest.raises(TypeError, match="refresh must be True, False or None, got 1"):
        method.update(grads[1], state, grads[1], refresh=1)


def test_report() -> None:
    grads, method = gradients((4, 3), 5), pr.SOAP(**LOUD)
    assert np.array_equal(method.diagnose(method.init(grads[0])).denominator, np.full((4, 3), 0.1875))
    _, state = method.update(grads[0], method.init(grads[0]), grads[0])
    report = method.diagnose(state)
    assert np.allclose(report.rayleigh[1], np.linalg.eigvalsh(state.grams[1])[::-1])
    assert max(report.off_diagonal) <= 1e-7  # the root of a difference of squares
    for g in grads[1:4]:
        _, state = method.update(g, state, g)
    report = method.diagnose(state)
    q, gram = state.bases[0], state.grams[0]
    inner = q.T @ gram @ q
    assert np.isclose(report.off_diagonal[0], np.linalg.norm(inner - np.diag(np.diag(inner))) / np.linalg.norm(gram))
    assert 0.01 < report.off_diagonal[0] < 1
    assert max(report.orthogonality) <= 1e-14
    assert np.allclose(report.denominator, np.sqrt(state.v) + 0.1875)
    assert bool(report.finite)
    assert pr.SOAP(max_dim=1).diagnose(pr.SOAP(max_dim=1).init(grads[0])).rayleigh == ()


def test_nvidias_form() -> None:
    fields = dataclasses.asdict(pr.SOAP.nvidia())
    changed = {name: value for name, value in fields.items() if value != getattr(pr.SOAP(), name)}
    assert changed == {"beta1": 0.9, "eps_position": "corrected", "every": 1, "order": "update_first", "sort": "after",
                       "second_moment": "keep"}  # fmt: skip


def test_equals_pytorch_optimizer_within_its_float32_bases() -> None:
    """Its QR is always of float32: bases of float64 runs are orthogonal to 1e-7."""
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    grads = gradients((4, 3), 12)
    p = torch.nn.Parameter(torch.zeros((4, 3), dtype=torch.float64))
    theirs = pytorch_optimizer.SOAP([p], lr=1.0, betas=(0.75, 0.875), shampoo_beta=0.625, eps=0.1875,
                                    precondition_frequency=2, weight_decay=0.0)  # fmt: skip
    found = []
    for g in grads:
        before = p.detach().clone()
        p.grad = torch.tensor(g)
        theirs.step()
        found.append((before - p.detach()).numpy())
    ours = directions(pr.SOAP(**LOUD), grads)
    assert not np.any(found[0])
    assert distance(ours[1:], np.stack(found[1:])) <= 1e-5
    wrong = directions(pr.SOAP(**LOUD, second_moment="keep"), grads)
    assert distance(wrong[1:], np.stack(found[1:])) > 1e-2


@pytest.mark.parametrize("case", [case for case in CASES if case.kind == "trace"], ids=lambda case: case.name)
def test_cases_are_the_library_and_catch_what_they_say(case: Any) -> None:
    method = pr.SOAP(**case.config)
    given = {"lr": case.lr, "decay": case.decay, "stack_ndim": case.stack_ndim}
    right = variants.run(method, case.param, case.grads, **given)
    state = method.init(case.param, stack_ndim=case.stack_ndim)
    for g, want in zip(case.grads, right.directions, strict=True):
        direction, state = method.update(g, state, case.param)
        assert np.linalg.norm(direction - want) <= 1e-12 * np.linalg.norm(want)
    for flag in case.catches:
        wrong = variants.run(method, case.param, case.grads, **given, flags=frozenset({flag}))
        assert distance(wrong.params, right.params) > 1e-3, flag


def test_fields_that_need_each_other() -> None:
    with pytest.raises(ValueError, match="channels_last=True needs merge=True"):
        pr.SOAP(channels_last=True)
