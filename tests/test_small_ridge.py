"""Small ridges on statistics of low rank: every method against 50 digits, for eps from 0 to 1."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import mpmath
import numpy as np
import pytest
from conftest import make_backend
from mutation import mutated
from test_roots import U, from_mp, gap, to_mp

import precond_ref as pr
from precond_ref import protocol
from precond_ref.conformance import tolerance
from precond_ref.methods import asgo, mbf, shampoo
from precond_ref.numerics import roots
from precond_ref.numerics import sketch as fd

RIDGES = (0.0, 1e-30, 1e-16, 1e-12, 1e-8, 1e-4, 1.0)
SCALES = (2.0**-33, 1.0, 2.0**33)  # 1e-10 to 1e10, without rounding
D, RANK, STEPS = 6, 2, 3
# G_t = C Y_t, or C Y_t B^T for what is preconditioned on both sides: small integers, exact in float32.
C = np.array([[1, 2], [-1, 3], [2, 0], [0, 1], [3, -1], [-2, 2]], dtype=float)
B = np.array([[2, 1], [1, -1], [0, 3], [-1, 2], [1, 1]], dtype=float)
Y = np.array([[[3, -1, 2], [1, 2, 0]], [[1, 1, -2], [0, 3, 1]], [[-1, 2, 1], [2, 1, 1]]], dtype=float)
# The same with an integer basis of the complement: C = [I; A], ACROSS = [-A^T; I].
A = np.array([[2, -1], [1, 3], [-2, 1], [1, 1]], dtype=float)
INSIDE, ACROSS = np.concatenate([np.eye(2), A]), np.concatenate([-A.T, np.eye(4)])

Matrix = mpmath.matrix


class Law(NamedTuple):
    """(w^{root} + eps)^(-1/power)."""

    power: int
    outside: bool = False

    def of(self, a: Matrix, eps: float) -> Matrix:
        """Of a matrix with positive eigenvalues, which are not computed."""
        a = (square_root(a) if self.outside else a) + mpmath.mpf(eps) * mpmath.eye(a.rows)
        for _ in range(int(math.log2(self.power))):
            a = square_root(a)
        return mpmath.inverse(a)


def square_root(a: Matrix) -> Matrix:
    """Of a matrix of order 1 or 2 with positive eigenvalues, by Cayley and Hamilton: no eigenvalue is computed."""
    if a.rows == 1:
        return mpmath.matrix([[mpmath.sqrt(a[0])]])
    root = mpmath.sqrt(a[0, 0] * a[1, 1] - a[0, 1] * a[1, 0])
    return (a + root * mpmath.eye(2)) / mpmath.sqrt(a[0, 0] + a[1, 1] + 2 * root)


class Subject(NamedTuple):
    """A method, and the same in the coordinates of the range."""

    make: Callable[[float], Any]
    law: Law
    statistic: tuple[Callable[[int], float], Callable[[int], float]] = (lambda t: 1.0, lambda t: 1.0)
    """Weights of the old and the new term at update t, counted from 1."""
    momentum: tuple[float, float] = (0.0, 1.0)
    two_sided: bool = False
    columns: int = 3
    layout: Callable[[np.ndarray], np.ndarray] = lambda g: g
    every: int = 1
    sketched: bool = False


def average(decay: float, columns: int = 1) -> tuple[Callable[[int], float], Callable[[int], float]]:
    return lambda t: decay, lambda t: (1 - decay) / columns


LOUD = {"beta1": 0.75, "beta2": 0.5, "rms": None, "side": "left"}
MBF = {"momentum": 0.5, "decay": 0.75}
WHOLE = {"size": D + 1}
HALF, QUARTER, ONE = Law(2), Law(4), Law(1)
flat: dict[str, Any] = {"columns": 1, "layout": lambda g: g[:, 0]}
rows: dict[str, Any] = {"layout": lambda g: g.T, "statistic": average(0.75, 3), "momentum": (0.5, 1.0)}
practical: dict[str, Any] = {"graft": None, "momentum": 0.0, "merge": 1, "relative_eps": False, "beta2": 1.0}
SUBJECTS = {
    "ASGO": Subject(lambda e: pr.ASGO(**LOUD, eps=e), HALF, average(0.5), (0.75, 0.25)),
    "ASGO(every=2)": Subject(lambda e: pr.ASGO(**LOUD, eps=e, every=2), HALF, average(0.5), (0.75, 0.25), every=2),
    "ASGO(right)": Subject(
        lambda e: pr.ASGO(**{**LOUD, "side": "right"}, eps=e), HALF, average(0.5), (0.75, 0.25), layout=np.transpose
    ),
    "ASGO.theory": Subject(lambda e: pr.ASGO.theory(eps=e), Law(1, True)),
    "FullAdaGrad": Subject(lambda e: pr.FullAdaGrad(eps=e), Law(1, True), **flat),
    "Shampoo": Subject(lambda e: pr.Shampoo(eps=e), QUARTER, two_sided=True),
    "Shampoo(beta2, every=2)": Subject(
        lambda e: pr.Shampoo(eps=e, beta2=0.5, every=2), QUARTER, average(0.5), two_sided=True, every=2
    ),
    "Shampoo of a vector": Subject(lambda e: pr.Shampoo(eps=e), HALF, **flat),
    "MBF": Subject(lambda e: pr.MBF(damping=e, **MBF), ONE, **rows),
    "MBF(inverse_every=2)": Subject(lambda e: pr.MBF(damping=e, **MBF, inverse_every=2), ONE, every=1, **rows),
    "SAdaGrad": Subject(lambda e: pr.SAdaGrad(**WHOLE, delta=e), HALF, sketched=True, **flat),
    "SAdaGrad(gram64)": Subject(lambda e: pr.SAdaGrad(**WHOLE, delta=e, solver="gram64"), HALF, sketched=True, **flat),
    "AdaFD": Subject(lambda e: pr.AdaFD(**WHOLE, delta=e), Law(1, True), sketched=True, **flat),
    "FDSON": Subject(
        lambda e: pr.FDSON(**WHOLE, delta=e, learning_rate=1.0), ONE, (lambda t: 1.0, lambda t: t**-0.5),
        sketched=True, **flat,
    ),
    "RFDSON": Subject(
        lambda e: pr.RFDSON(**WHOLE, delta=e, learning_rate=1.0), ONE, (lambda t: 1.0, lambda t: 1 / t),
        sketched=True, **flat,
    ),
    "SShampoo": Subject(lambda e: pr.SShampoo(**WHOLE, eps=e), QUARTER, two_sided=True, sketched=True),
    "SShampoo.practical": Subject(
        lambda e: pr.SShampoo.practical(**WHOLE, eps=e, **practical), QUARTER, two_sided=True, sketched=True
    ),
}  # fmt: skip


def gradients(subject: Subject, scale: float) -> np.ndarray:
    y = Y[:, :, :RANK] @ B.T if subject.two_sided else Y[:, :, : subject.columns]
    return np.stack([subject.layout(scale * (C @ part)) for part in y])


@cache
def truth(name: str, eps: float, scale: float) -> tuple[list[np.ndarray], list[float]]:
    """Directions in 50 digits, by ``f(C S C^T) C = C f(S C^T C)``, and the condition number of each statistic."""
    subject = SUBJECTS[name]
    inner = Y[:, :, :RANK] if subject.two_sided else Y[:, :, : subject.columns]
    directions, conditions, kept = [], [], None
    with mpmath.workdps(50):
        c, b, old = to_mp(C), to_mp(B), [mpmath.zeros(RANK), mpmath.zeros(RANK)]
        m = 0 * to_mp(inner[0])
        for t, part in enumerate(inner, 1):
            y = mpmath.mpf(scale) * to_mp(part)
            keep, add = (mpmath.mpf(weight(t)) for weight in subject.statistic)
            grams = (y * b.T * b * y.T, y.T * c.T * c * y) if subject.two_sided else (y * y.T, mpmath.zeros(RANK))
            old = [keep * s + add * gram for s, gram in zip(old, grams, strict=True)]
            m = mpmath.mpf(subject.momentum[0]) * m + mpmath.mpf(subject.momentum[1]) * y
            # one column: S has rank one at the first update, and f(S C^T C) is made on the range of y alone
            frames = [(c, old[0], y if t == 1 and subject.columns == 1 else None), (b, old[1], None)]
            if kept is None or (t - 1) % subject.every == 0:
                kept = [_factor(subject.law, *frame, eps) for frame in frames[: 1 + subject.two_sided]]
            d = c * kept[0] * m
            directions.append(from_mp(d * kept[1].T * b.T if subject.two_sided else d))
            conditions.append(max(_condition(frame, s) for frame, s, _ in frames[: 1 + subject.two_sided]))
    return [subject.layout(d) for d in directions], conditions


def _factor(law: Law, frame: Matrix, s: Matrix, y: Matrix | None, eps: float) -> Matrix:
    """F with f(V) frame = frame F; for V = v v^T, v = frame y, only F y = y f(v^T v) counts."""
    if y is None:
        return law.of(s * frame.T * frame, eps)
    v = frame * y
    return law.of(v.T * v, eps)[0] * mpmath.eye(RANK)


def _condition(frame: Matrix, s: Matrix) -> float:
    """Largest over smallest eigenvalue of ``frame s frame^T`` that is not zero."""
    f = from_mp(frame)
    w = np.sort(np.abs(np.linalg.eigvals(from_mp(s) @ (f.T @ f))))
    live = w[w > 1e-12 * w[-1]]
    return float(live[-1] / live[0])


def run(method: Any, grads: np.ndarray, dtype: str, library: str = "numpy") -> tuple[list[np.ndarray], Any]:
    backend = make_backend(library)
    arrays = [backend.asarray(g, dtype) for g in grads]
    state, out = method.init(arrays[0]), []
    for g in arrays:
        d, state = method.update(g, state, g)
        out.append(backend.numpy(d).astype(float))
    return out, state


def allowed(name: str, dtype: str, kappa: float, eps: float, grads: np.ndarray, t: int) -> float:
    """16 u times the condition number on the range, whatever eps; where MBF uses LU, that of F + lambda I."""
    if name == "MBF":
        f = np.zeros((D, D))
        for g in grads[: t + 1]:
            f = 0.75 * f + 0.25 / 3 * g.T @ g
        f += eps * np.eye(D)
        if eps > 0.99 * np.finfo(dtype).eps ** 0.5 * np.max(np.abs(f)):  # then by LU
            kappa = np.linalg.norm(f, 2) / eps
    return tolerance.relative(dtype, kappa, stale=True, decompositions=t + 1 if SUBJECTS[name].sketched else 1)


def check_in_range(name: str, library: str = "numpy", ridges: tuple[float, ...] = RIDGES) -> None:
    """Directions of gradients in the range of their statistic, all scales, both precisions."""
    subject = SUBJECTS[name]
    for scale in SCALES:
        grads = gradients(subject, scale)
        for eps in ridges:
            expected, conditions = truth(name, eps, scale)
            for dtype in U:
                got, _ = run(subject.make(eps), grads, dtype, library)
                for t, (d, want, kappa) in enumerate(zip(got, expected, conditions, strict=True)):
                    bound = allowed(name, dtype, kappa, eps, grads, t)
                    assert gap(d, want) <= bound, (name, library, scale, eps, dtype, t, gap(d, want), bound)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_gradients_in_range_whatever_the_ridge(name: str, library: str) -> None:
    check_in_range(name, library)


# ---- a part outside the range ---------------------------------------------------------------------------------------

LAWS = {
    "(V + eps)^(-1/2)": (HALF, roots.Law(-0.5, 0.0)),
    "(V + eps)^(-1/4)": (QUARTER, roots.Law(-0.25, 0.0)),
    "(V + eps)^-1": (ONE, roots.Law(-1.0, 0.0)),
    "(V^(1/2) + eps)^-1": (Law(1, True), roots.Law(-1.0, 0.0, root=True)),
}
GRAM, PART = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[1.0, -1.0, 2.0], [2.0, 0.0, 1.0]])
BEYOND = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0], [-1.0, 2.0, 0.0], [1.0, 1.0, 1.0]])


@cache
def split(law: Law, eps: float, scale: float) -> tuple[np.ndarray, float]:
    """f(V) INSIDE PART for V = scale^2 INSIDE GRAM INSIDE^T, and f(0), in 50 digits."""
    with mpmath.workdps(50):
        inside = to_mp(INSIDE)
        f = law.of(mpmath.mpf(scale) ** 2 * to_mp(GRAM) * inside.T * inside, eps)
        zero = mpmath.mpf(eps) ** (-1 / mpmath.mpf(law.power)) if eps else mpmath.mpf(0)
        return from_mp(inside * f * to_mp(PART)), float(zero)


def check_real_part(library: str = "numpy", scales: tuple[float, ...] = SCALES) -> None:
    """What is outside is multiplied by f(0), at any size above rounding, in each member of a stack for itself."""
    backend = make_backend(library)
    for (law, form), eps, scale, dtype, share in itertools.product(
        LAWS.values(), RIDGES if library == "numpy" else RIDGES[::3], scales, U, (1.0, 2.0**-10)
    ):
        gram = scale**2 * INSIDE @ GRAM @ INSIDE.T
        tensor = np.stack([INSIDE @ PART, INSIDE @ PART + share * ACROSS @ BEYOND])
        inside, zero = split(law, eps, scale)
        form = form._replace(ridge=eps)
        stack = backend.asarray(np.stack([gram, gram]), dtype)
        got = roots.apply(backend.asarray(tensor, dtype), {0: roots.decompose(stack, form)}, form)
        expected = np.stack([inside, inside + zero * share * ACROSS @ BEYOND])
        kappa = _condition(to_mp(INSIDE), to_mp(GRAM))
        for i, rounding in enumerate((kappa, kappa / share)):
            error = gap(backend.numpy(got)[i].astype(float), expected[i])
            assert error <= 16 * U[dtype] * rounding, (law, eps, scale, dtype, share, i, error)


def check_long() -> None:
    """A matrix with known eigenvalues is formed for long gradients, and for these alone."""
    rng, original = np.random.default_rng(8), roots.form
    for (law, form), dtype, kappa, columns in itertools.product(LAWS.values(), U, (1e2, 1e4), (4, 3)):
        q = np.linalg.qr(rng.standard_normal((2, 2)))[0]
        matrix = (q * np.asarray([1.0, 1 / kappa]) @ q.T).astype(dtype)
        matrix, eps = (matrix + matrix.T) / 2, 2.0**-20
        tensor, form = rng.standard_normal((2, columns)).astype(dtype), form._replace(ridge=eps)
        formed: list[Any] = []

        def spy(root: Any, formed: list[Any] = formed, **options: Any) -> Any:
            formed.append(root)
            return original(root, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(roots, "form", spy)
            got = roots.apply(tensor, {0: roots.decompose(matrix, form)}, form)
        assert len(formed) == (columns == 4)
        with mpmath.workdps(50):
            expected = from_mp(law.of(to_mp(matrix.astype(float)), eps) * to_mp(tensor.astype(float)))
        assert gap(got.astype(float), expected) <= 16 * U[dtype] * kappa, (law, dtype, kappa, columns)


def test_a_matrix_is_formed_for_long_gradients() -> None:
    check_long()


def check_real_part_of_methods() -> None:
    """The same where a method meets it: a gradient that its statistic does not hold."""
    y, z = INSIDE @ PART, ACROSS @ BEYOND
    for eps, dtype in itertools.product(RIDGES[1:], U):
        cases: list[tuple[Any, list[np.ndarray], Callable[[Matrix], Matrix], Law, Matrix, tuple[float, float]]] = [
            # V forgets what M keeps
            (pr.ASGO(beta1=0.5, beta2=0.0, eps=eps, rms=None, side="left"), [z, y], HALF, 1.0, (0.5, 0.25)),
            # a root kept from the update before
            (pr.ASGO(beta1=0.0, beta2=0.0, eps=eps, rms=None, side="left", every=2), [y, y + z], HALF, 1.0, (1, 1)),
            (pr.MBF(damping=eps, momentum=0.0, decay=0.0, inverse_every=2), [y.T, (y + z).T], ONE, 1 / 3, (1, 1)),
        ]
        for method, grads, law, weight, (a, b) in cases:
            arrays = [g.astype(dtype) for g in grads]
            state = method.init(arrays[0])
            if isinstance(method, pr.MBF):  # updates 1 and 2 both renew
                _, state = method.update(arrays[0], state, arrays[0])
                got, _ = method.update(arrays[1], state, arrays[1], refresh=(False, False))
                got = got.T
            else:
                for g in arrays:
                    got, state = method.update(g, state, g)
            with mpmath.workdps(50):
                c, p = to_mp(INSIDE), to_mp(PART)
                inside = from_mp(c * law.of(weight * p * p.T * c.T * c, eps) * p)
                expected = a * inside + b * float(mpmath.mpf(eps) ** (-1 / mpmath.mpf(law.power))) * z
            kappa = _condition(to_mp(INSIDE), to_mp(PART @ PART.T))
            error = gap(np.asarray(got, dtype=float), expected)
            assert error <= 16 * U[dtype] * kappa, (method, dtype, error)


def check_kept_root_is_linear(library: Any = pr) -> None:
    """Between two renewals a direction is a fixed matrix times the gradient: whatever the gradient's scale is."""
    first, outside = np.zeros((2, 4, 3), "float32")
    first[0], first[1], outside[3] = 1.0, 0.5, 1.0
    for method in (
        library.ASGO(beta1=0.0, beta2=0.9, eps=1e-30, rms=None, side="left", every=9),
        library.Shampoo(beta2=0.9, eps=1e-30, every=9),
        library.MBF(layout="per_input", damping=1e-30, momentum=0.0, inverse_every=9),
    ):
        _, state = method.update(first, method.init(first), first)
        whole = method.update(outside, state, first, refresh=False)[0].astype(float)
        assert np.linalg.norm(whole) > 1e3, method
        for scale in (2.0**-12, 2.0**-30, 2.0**-40, 2.0**-50):
            got = method.update(np.float32(scale) * outside, state, first, refresh=False)[0].astype(float)
            assert gap(got / scale, whole) <= 16 * U["float32"], (method, scale)


def check_hidden_part() -> None:
    """A fresh direction that its own square is too small to show: f(w) with the w that it has put there."""
    for dtype, eps in itertools.product(U, RIDGES[1:]):
        small = 2.0**-14 if dtype == "float32" else 2.0**-29
        y, z = INSIDE @ PART[:, :1], small * ACROSS @ BEYOND[:, :1]
        size = float(np.linalg.norm(z))
        for method, expected in (
            (pr.ASGO.theory(eps=eps), 1 / (size + eps)),
            (pr.ASGO(beta1=0.0, beta2=0.75, eps=eps, rms=None, side="left"), (size**2 / 4 + eps) ** -0.5),
            (pr.FullAdaGrad(eps=eps), 1 / (size + eps)),
            (pr.Shampoo(eps=eps), (size**2 + eps) ** -0.25 * (np.linalg.norm(y) ** 2 + size**2 + eps) ** -0.25),
            (pr.MBF(damping=eps, momentum=0.0, decay=0.75, layout="per_input"), 1 / (size**2 / 4 + eps)),
        ):
            directions, _ = run(method, np.stack([y, z]), dtype)
            by_lu = isinstance(method, pr.MBF) and eps > 2 * np.finfo(dtype).eps ** 0.5 * np.linalg.norm(y) ** 2
            kappa = 1 + np.linalg.norm(y) ** 2 / eps if by_lu else 1.0
            assert gap(directions[1], expected * z) <= 16 * U[dtype] * kappa, (method, dtype)


def check_in_range_of_bad_condition() -> None:
    """An eigenvector of a small eigenvalue leaks most: the error is that of its condition number, 2^12 to 2^16."""
    q = np.linalg.qr(np.random.default_rng(1).standard_normal((6, 6)))[0]
    for (law, form), bits, eps in itertools.product(LAWS.values(), (12, 14, 16), (1e-30, 1e-12, 1e-8)):
        form = form._replace(ridge=eps)
        w = np.array([2.0**-bits, 1.0])
        gram = ((q[:, :2] * w) @ q[:, :2].T).astype("float32")
        got = roots.apply(q[:, :1].astype("float32"), {0: roots.decompose(gram, form)}, form)
        expected = ((w[0] ** (0.5 if law.outside else 1) + eps) ** form.exponent) * q[:, :1]
        assert gap(got.astype(float), expected) <= 16 * U["float32"] * 2.0**bits, (law, bits, eps)


def check_sketch() -> None:
    """The same decision for sketches with a small mass."""
    for eps, scale, dtype, share in itertools.product(RIDGES[1:], SCALES, U, (0.0, 1.0, 2.0**-10)):
        s = np.linalg.svd(scale * INSIDE @ np.linalg.cholesky(GRAM), full_matrices=False)
        u, e = s[0].astype(dtype), (s[1] ** 2).astype(dtype)
        tensor = INSIDE @ PART + share * ACROSS @ BEYOND
        got = fd.apply_power(u, e, np.asarray(eps, dtype), -0.5, tensor.astype(dtype))
        inside, zero = split(HALF, eps, scale)
        faded = eps <= (D * np.finfo(dtype).eps) ** 2 * (e[0] + eps)
        expected = inside + (0.0 if faded else zero * share) * ACROSS @ BEYOND
        kappa = _condition(to_mp(INSIDE), to_mp(GRAM))
        assert gap(got.astype(float), expected) <= 16 * U[dtype] * kappa / (share or 1.0), (eps, scale, dtype, share)


def check_flat(library: str = "numpy") -> None:
    """A ridge far above V leaves f(0) of everything, however badly V is conditioned."""
    backend = make_backend(library)
    w, q = np.array([0, 0, 2.0**-18, 1]), np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
    gram, tensor = (q * w) @ q.T, q[:, 2:] @ np.array([[1.0, 2.0], [1.0, -1.0]])
    for _, form in LAWS.values():
        law = form._replace(ridge=2.0**30)
        got = roots.apply(
            backend.asarray(tensor, "float32"), {0: roots.decompose(backend.asarray(gram, "float32"), law)}, law
        )
        assert gap(backend.numpy(got) * law.ridge**-law.exponent, tensor) <= 16 * U["float32"]


def network_gradients(batch: int) -> Iterator[np.ndarray]:
    """Of the first weights of a network 8 - 16 - 3 with tanh, in float32: rank ``batch`` up to rounding."""
    rng = np.random.default_rng(7)
    for _ in range(12):
        x, w1, w2 = (rng.standard_normal(s).astype("float32") for s in ((batch, 8), (16, 8), (3, 16)))
        h = np.tanh(x @ (w1 * np.float32(8**-0.5)).T)
        out = h @ (w2 / 4).T
        yield (((out @ (w2 / 4)) * (1 - h * h)).T @ x) * np.float32(2 / out.size)


def check_networks() -> None:
    """No first direction is longer than 1, and almost all are 1: the polar factor of the gradient."""
    for eps, scale, batch in itertools.product((1e-8, 1e-12, 1e-15), SCALES, (4, 32)):
        lengths = []
        for method in (
            pr.ASGO.theory(eps=eps),
            pr.ASGO(beta1=0.0, beta2=0.0, eps=eps**2, rms=None),
            pr.Shampoo(eps=eps**2),
            pr.Shampoo(eps=eps**2, every=2),
        ):
            for grad in network_gradients(batch):
                directions, _ = run(method, np.float32(scale) * grad[None], "float32")
                lengths.append(np.linalg.norm(directions[0], 2))
        assert max(lengths) < 1.01
        if eps < 1e-3 * scale * 1e-2:
            assert abs(np.median(lengths) - 1) < 1e-3


@pytest.mark.parametrize("library", ["strict-device1", "torch"])
def test_on_other_libraries(library: str) -> None:
    check_real_part(library, (1.0,))
    check_flat(library)


@pytest.mark.parametrize("name", ["ASGO(every=2)", "AdaFD"])
def test_compiled(name: str) -> None:
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    subject = SUBJECTS[name]
    method, grads = subject.make(1e-16), gradients(subject, 1.0)
    (expected, *_), (kappa, *_) = truth(name, 1e-16, 1.0)
    grad = grads[0].astype("float32")
    direction, _ = jax.jit(partial(method.update, refresh=True))(grad, method.init(jax.numpy.asarray(grad)), grad)
    tensor, xp = torch.tensor(grad), make_backend("torch").xp
    update = torch.compile(partial(method.update, refresh=True, xp=xp), backend="aot_eager", fullgraph=True)
    for got in (direction, update(tensor, method.init(tensor), tensor)[0]):
        assert gap(np.asarray(got, dtype=float), expected) <= tolerance.relative("float32", kappa, stale=True)


# ---- what diagnose says ---------------------------------------------------------------------------------------------


def check_accuracy() -> None:
    """An upper bound of the error; the condition number on the range, for all small ridges."""
    for name, dtype in itertools.product(SUBJECTS, U):
        subject, reported = SUBJECTS[name], []
        grads = gradients(subject, 1.0)
        for eps in (1e-30, 1e-16, 1e-4):
            method = subject.make(eps)
            got, state = run(method, grads, dtype)
            expected, conditions = truth(name, eps, 1.0)
            accuracy = method.diagnose(state).accuracy
            accuracy = max(float(a) for a in accuracy) if isinstance(accuracy, tuple) else float(accuracy)
            reported.append(accuracy)
            error = gap(got[-1], expected[-1])
            assert error <= accuracy * (STEPS if subject.sketched else 1), (name, eps, dtype, error, accuracy)
        assert reported[:2] == pytest.approx([16 * U[dtype] * conditions[-1]] * 2, rel=1e-2)
    large = pr.ASGO.theory(eps=2.0**20)
    _, state = run(large, gradients(SUBJECTS["ASGO.theory"], 1.0), "float64")
    assert float(large.diagnose(state).accuracy) == pytest.approx(16 * U["float64"], rel=1e-3)
    zero = pr.ASGO.theory().diagnose(pr.ASGO.theory().init(np.zeros((2, 3))))
    assert float(zero.accuracy) == 16 * U["float64"]


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_real_part,
        check_real_part_of_methods,
        check_kept_root_is_linear,
        check_hidden_part,
        check_in_range_of_bad_condition,
        check_sketch,
        check_flat,
        check_networks,
        check_accuracy,
    )
}


@pytest.mark.parametrize("name", CHECKS)
def test_small_ridge(name: str) -> None:
    CHECKS[name]()


# ---- planted bugs ---------------------------------------------------------------------------------------------------

STALE = {
    "ASGO": (asgo, "(1 - self.beta2) * due if", "(1 - self.beta2) if"),
    "Shampoo": (shampoo, "weight = weight * due if self.every", "weight = weight if self.every"),
    "MBF": (mbf, "own = own * (statistics_due & inverse_due)", "own = own * 1.0"),
}


@pytest.mark.parametrize("name", STALE)
def test_a_kept_root_that_is_said_to_know_the_gradient_is_caught(name: str) -> None:
    module, old, new = STALE[name]
    library = SimpleNamespace(ASGO=pr.ASGO, Shampoo=pr.Shampoo, MBF=pr.MBF)
    setattr(library, name, getattr(mutated(module, (old, new)), name))
    with pytest.raises(AssertionError):
        check_kept_root_is_linear(library)


REAL = " > unit * top"
REAL_SKETCH = " > roots.CERTAIN * u * top"


def formed(tensor: Any, known: Any, law: Any, weight: Any = 0.0, *, xp: Any = None) -> Any:
    """The product with matrices, as it was."""
    xp = np if xp is None else xp
    for axis, (root, _) in known.items():
        tensor = roots.multiply(tensor, roots.form(root, xp=xp), axis, xp)
    return tensor


def in_range(*names: str) -> Callable[[], None]:
    def check() -> None:
        for name in names:
            check_in_range(name)

    return check


SKETCHES = in_range("AdaFD", "FDSON", "SAdaGrad")
MATRICES = in_range("ASGO.theory", "FullAdaGrad", "Shampoo", "ASGO(every=2)", "MBF(inverse_every=2)")
BUGS: dict[str, tuple[Callable[[], None], Any, str, Any]] = {
    "a matrix formed": (MATRICES, roots, "apply", formed),
    "a matrix formed, on networks": (check_networks, roots, "apply", formed),
    "a matrix formed of rounding": (MATRICES, roots, "_by_matrix", lambda *given: True),
    "a matrix formed for short gradients": (check_long, roots, "_by_matrix", ("if any(2 *", "if any(1 *")),
    "a matrix formed of its roots": (check_long, roots, "form", ("root.eigenvalues[", "root.eigenvalues[..., ::-1][")),
    "all is rounding": (check_real_part, roots, "_gain", (REAL, " > math.inf * top")),
    "all is rounding, in methods": (check_real_part_of_methods, roots, "_gain", (REAL, " > math.inf * top")),
    "nothing is rounding": (MATRICES, roots, "_gain", (REAL, " > 0.0 * top")),
    "an absolute threshold": (check_real_part, roots, "_gain", (REAL, REAL.replace("top", "1e9"))),
    "an absolute threshold, in range": (MATRICES, roots, "_gain", (REAL, REAL.replace("top", "1e-3"))),
    "a threshold of the gradient alone": (
        check_in_range_of_bad_condition, roots, "_gain", ("largest / xp.where(known, w,", "1.0 / xp.where(known, 1.0,")
    ),
    "rounding dropped": (check_flat, roots, "_gain", ("xp.where(real, beyond, mean)", "xp.where(real, beyond, 0.0)")),
    "what G has put there forgotten": (check_hidden_part, roots, "_gain", ("put = weight *", "put = 0.0 *")),
    "what G has put there, whatever V says": (
        check_real_part_of_methods, roots, "_gain", (" & (put <= 2 * unit * along(largest))", "")
    ),
    "eigenvalues that are rounding": (check_real_part, roots, "decompose", ("xp.where(known, w, 0.0)", "w")),
    "one eigenvalue known, all decomposed": (check_real_part, roots, "decompose", ("surely(known)", "known.any()")),
    "one eigenvalue known, all believed": (check_real_part, roots, "_gain", ("surely(known)", "known.any()")),
    "accuracy by what is rounding": (check_accuracy, roots, "accuracy", ("xp.where(known, w, largest)", "w")),
    "accuracy without the condition": (check_accuracy, roots, "accuracy", ("least + ridge)", "largest + ridge)")),
    "all of a sketch's complement is rounding": (check_sketch, fd, "apply_power", (REAL_SKETCH, " > math.inf * most")),
    "nothing of a sketch's complement is": (SKETCHES, fd, "apply_power", (REAL_SKETCH, " > 0.0 * most")),
    "a sketch's threshold absolute": (SKETCHES, fd, "apply_power", (REAL_SKETCH, " > roots.CERTAIN * u")),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, module, function, change = BUGS[name]
    planted = change if callable(change) else mutated(getattr(module, function), change)
    monkeypatch.setattr(module, function, planted)
    with pytest.raises(AssertionError):
        check()


# ---- what the largest and the smallest numbers make of it -----------------------------------------------------------

TINY = {
    "ASGO": {"rms": None}, "ASGO.theory": {}, "Shampoo": {}, "FullAdaGrad": {}, "ASGO every": {"every": 3, "rms": None},
}  # fmt: skip


def check_ridge_below_the_dtype(library: Any = pr) -> None:
    """A ridge that float32 has no number for is none: the same bits, and no warning."""
    grad = np.random.default_rng(3).standard_normal((4, 3)).astype("float32")
    for name, fields in TINY.items():
        make = operator.attrgetter(name.split()[0])(library)
        with np.errstate(all="raise", under="ignore"):
            directions = [m.update(grad, m.init(grad), grad)[0] for m in (make(eps=e, **fields) for e in (1e-48, 0.0))]
        assert np.array_equal(*directions), name


def check_ridge_of_numpy(library: Any = pr) -> None:
    """A ridge that is a number of NumPy's is that number, with another array library too."""
    torch = pytest.importorskip("torch")
    grad = torch.arange(12.0).reshape(4, 3).sin()
    for name, fields in TINY.items():
        make = operator.attrgetter(name.split()[0])(library)
        methods = [make(eps=kind(0.25), **fields) for kind in (np.float64, np.float32, float)]
        first, *others = (m.update(grad, m.init(grad), grad)[0] for m in methods)
        assert all(torch.equal(first, other) for other in others), name


def check_large_gradients_beside_a_kept_root(library: Any = pr) -> None:
    """Squares that overflow are asked for nothing: what a kept root makes of large gradients is finite, silently."""
    for method, dtype, scales in (
        (library.MBF.authors_code(), "float32", (4e-8, 4e20, 0.0)),
        (library.SShampoo(size=4, every=8), "float64", (1.0, 1e6, 4e307)),
    ):
        grads = np.asarray([[[1.0], [0.5]], [[1.0], [-0.75]], [[0.5], [1.0]]], dtype)
        state = method.init(grads[0])
        with np.errstate(all="raise", under="ignore"):
            for t, scale in enumerate(scales):
                refresh = True if scale == 1e6 else None
                direction, state = method.update(grads[t] * np.asarray(scale, dtype), state, grads[0], refresh=refresh)
        assert np.isfinite(direction).all()


@pytest.mark.parametrize(
    "check", [check_ridge_below_the_dtype, check_ridge_of_numpy, check_large_gradients_beside_a_kept_root]
)
def test_the_range_of_the_dtype(check: Any) -> None:
    check()


RANGE = {
    "ridge": (check_ridge_below_the_dtype, roots.Law, "within", lambda: lambda law, *_: law),
    "numpy": (check_ridge_of_numpy, protocol.Method, "__post_init__",
        lambda: mutated(protocol.Method.__post_init__, ('== "numpy"', '== "none"'))),
    "root": (check_large_gradients_beside_a_kept_root, roots, "_gain",
        lambda: mutated(roots._gain, ("square(outside, xp)", "outside * outside"))),
    "sketch": (check_large_gradients_beside_a_kept_root, fd, "apply_power",
        lambda: mutated(fd.apply_power, ("clamp(known, -most, most, xp=xp)", "known"))),
}  # fmt: skip


@pytest.mark.parametrize("name", RANGE)
def test_planted_bugs_of_the_range(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check, owner, attribute, planted = RANGE[name]
    monkeypatch.setattr(owner, attribute, planted())
    with pytest.raises((AssertionError, FloatingPointError, NotImplementedError, TypeError)):
        check()
