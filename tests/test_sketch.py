"""Frequent Directions: the vectors, the dense form, limits, bad input, and planted bugs."""

from __future__ import annotations

from types import ModuleType
from typing import Any
from unittest import mock

import array_api_strict
import numpy as np
import pytest
from conftest import Backend
from mutation import check_vectors, mutated

import precond_ref
from precond_ref.methods import sketchy
from precond_ref.numerics import sketch as fd
from precond_ref.numerics.template import arrays_of, stacked
from precond_ref.problems import online

U = 2.0**-53
TOLERANCE = 1e-12  # of the largest eigenvalue of G; observed: 1.2e-13 over 3e5 updates

KINDS = online.ROWS


def start(lib: ModuleType, d: int, size: int, batch: tuple[int, ...] = ()) -> Any:
    """The sketch of nothing."""
    return arrays_of(stacked(lib.empty(d, size), batch), np.zeros(1), np)


def gram_of(sketch: Any) -> np.ndarray:
    """Gbar."""
    return np.einsum("...ik,...k,...jk->...ij", sketch.basis, sketch.eigenvalues, sketch.basis)


def check_methods(lib: ModuleType) -> None:
    """The vectors of the methods that keep sketches; the statements about sketches are tried in `test_theory.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib, "Sketch", fd.Sketch)
        patch.setattr(sketchy, "fd", lib)
        check_vectors(sketchy)


def check_tight_case(lib: ModuleType) -> None:
    """g_t = e_(t mod l): after N l steps Gbar = 0 and rho = N = ||G - Gbar|| = Omega, exactly."""
    for size, d in ((2, 5), (3, 3), (4, 6)):
        sketch = start(lib, d, size)
        for t in range(6 * size):
            sketch = lib.update(sketch, np.eye(d)[t % size][None])
        assert sketch.escaped == 6.0
        assert np.all(sketch.eigenvalues == 0.0)


def check_low_rank(lib: ModuleType) -> None:
    """I8. rank G <= l - 1: nothing escapes, exactly, and Gbar = G. rank G = l in a span: Gtil = G on it."""
    rng = np.random.default_rng(1)
    for d, rank in ((6, 1), (6, 3), (10, 4)):
        for scale in (1.0, 1e-3, 1e3):
            frame = np.linalg.qr(rng.standard_normal((d, d)))[0][:rank]
            roomy, tight = start(lib, d, rank + 1), start(lib, d, rank)
            g = np.zeros((d, d))
            for _ in range(40):
                row = scale * rng.standard_normal((1, rank)) @ frame
                g = 0.9 * g + row.T @ row
                roomy, tight = lib.update(roomy, row, 0.9), lib.update(tight, row, 0.9)
                unit = np.linalg.norm(g, 2)
                assert roomy.escaped == 0.0
                assert np.linalg.norm(gram_of(roomy) - g, 2) <= TOLERANCE * unit
                inside = frame @ (lib.dense(tight) - g) @ frame.T
                assert np.linalg.norm(inside, 2) <= TOLERANCE * unit


def check_powers(lib: ModuleType) -> None:
    """(Gbar + (rho + ridge) I)^p x against the dense eigendecomposition, and the range when nothing has escaped."""
    rng = np.random.default_rng(2)
    for d, size, count, ridge, relative, exponent in (
        (6, 3, 9, 0.0, False, -0.5),
        (6, 3, 9, 0.25, False, -0.25),
        (5, 4, 9, 0.25, True, -1 / 6),
        (5, 9, 9, 0.125, True, -0.25),
        (6, 4, 2, 0.0, False, -0.5),
        (6, 4, 2, 0.5, False, -0.25),
    ):
        sketch = start(lib, d, size)
        for row in rng.standard_normal((count, 1, d)):
            sketch = lib.update(sketch, row, 0.75)
        x = rng.standard_normal((d, 2))
        w, v = np.linalg.eigh(gram_of(sketch) + sketch.escaped * np.eye(d))
        live = w > 1e-12 * w[-1]
        damped = w + (ridge * w[-1] if relative else ridge)
        expected = (v * np.where(live, np.abs(damped) ** exponent, 0.0)) @ v.T @ x
        got = lib.apply_power(
            sketch.basis, sketch.eigenvalues, sketch.escaped, exponent, x, ridge=ridge, relative=relative
        )
        kappa = damped[-1] / damped[live].min()
        # both routes perturb the statistic by some d u, which a power p of condition kappa amplifies
        assert np.linalg.norm(got - expected) <= 64 * U * kappa ** (0.5 - exponent) * np.linalg.norm(expected)


def check_faded_mass(lib: ModuleType) -> None:
    """A mass decayed for 400 steps must not multiply rounding: the direction is that of the span alone."""
    rng = np.random.default_rng(3)
    d, beta2 = 6, 0.5
    frame, across = np.split(np.linalg.qr(rng.standard_normal((d, d)))[0][:3], [2])
    sketch = start(lib, d, 3)
    for row in rng.standard_normal((8, 1, d)):
        sketch = lib.update(sketch, row, beta2)
    assert sketch.escaped > 0
    coordinates = rng.standard_normal((400, 2))
    g = np.zeros((2, 2))
    for c in coordinates:
        g = beta2 * g + np.outer(c, c)
        row = (c @ frame)[None]
        sketch = lib.update(sketch, row, beta2)
    assert 0 < sketch.escaped < 1e-100
    w, v = np.linalg.eigh(g)
    expected = ((v * w**-0.5) @ v.T @ coordinates[-1]) @ frame
    for ridge in (0.0, np.asarray(0.0)):
        for beside in (0.0, 1.0):  # what is outside the span is not multiplied by the mass's root either
            x = row + beside * across
            got = lib.apply_power(sketch.basis, sketch.eigenvalues, sketch.escaped, -0.5, x.T, ridge=ridge)[:, 0]
            assert np.linalg.norm(got - expected) <= 1e-12 * np.linalg.norm(expected)


def check_non_finite(lib: ModuleType) -> None:
    """NaN for that member, for ever; the others as if alone; LAPACK, which an infinity can hang, never sees it."""
    given = np.linalg.svd

    def svd(matrix: Any, **options: Any) -> Any:
        assert np.isfinite(matrix).all()
        return given(matrix, **options)

    with mock.patch("numpy.linalg.svd", svd):
        check_non_finite_members(lib)


def check_non_finite_members(lib: ModuleType) -> None:
    rows = np.stack([online.rows(kind, 2, 4, 5, 5) for kind in KINDS[:3]], axis=1)
    for bad in (np.nan, np.inf):
        spoilt = rows.copy()
        spoilt[2, 1, 0, 0] = bad
        whole, clean = start(lib, 4, 3, (3,)), start(lib, 4, 3, (3,))
        for t in range(5):
            whole, clean = lib.update(whole, spoilt[t], 0.5), lib.update(clean, rows[t], 0.5)
        assert np.all(np.isnan(whole.eigenvalues[1]))
        assert np.isnan(whole.escaped[1])
        assert np.isfinite(whole.eigenvalues).all(axis=-1).tolist() == [True, False, True]
        for member in (0, 2):
            assert np.array_equal(whole.eigenvalues[member], clean.eigenvalues[member])
            assert whole.escaped[member] == clean.escaped[member]
        direction = lib.apply_power(whole.basis, whole.eigenvalues, whole.escaped, -0.5, np.ones((3, 4, 1)))
        assert np.isnan(direction[1]).all()
        assert np.isfinite(direction[[0, 2]]).all()


def check_gram64(lib: ModuleType) -> None:
    """`gram64` against the definition, one update: ||difference of Gtil|| <= 4 (d + k + q) u s_1^2, in float32 too.

    The Gram matrix sums d or k + q products, and eigh is backward stable:
    its eigenvalues are off by a modest multiple of the order times u ||K||. In float32 the
    factor is rounded before and the result after, which moves singular values by some units of s_1: rho by that
    times s_l, where a Gram matrix in float32 would move it by that times s_1.
    """
    ratio = 0.0
    for d, q in ((6, 1), (4, 7), (10, 3)):
        for size in (1, 3, d, d + 1):
            for dtype, unit in (("float64", 0.0), ("float32", 2.0**-24)):
                for kind in KINDS:
                    rows = online.rows(kind, q, d, 6, 6).astype(dtype)
                    sketch = arrays_of(lib.empty(d, size), rows, lib.array_namespace(rows))
                    wide = start(lib, d, size)
                    for row in rows:
                        exact = lib.update(wide, row.astype("float64"), 0.75, size=size)
                        got = lib.update(sketch, row, 0.75, size=size, solver="gram64")
                        assert got.basis.dtype == got.eigenvalues.dtype == got.escaped.dtype == rows.dtype
                        assert np.all(got.eigenvalues >= 0)
                        gap = np.linalg.norm(lib.dense(got).astype("float64") - lib.dense(exact), 2)
                        top = exact.eigenvalues[0] + exact.escaped
                        order = 4 * (d + sketch.basis.shape[1] + q)
                        ratio = max(ratio, gap / (order * (2 * U + unit) * top))
                        s_l = np.sqrt(np.maximum(exact.escaped - 0.75 * wide.escaped, 0.0))
                        gap = abs(float(got.escaped) - exact.escaped)
                        allowed = order * (2 * U * top + unit * np.sqrt(top) * s_l + unit * exact.escaped)
                        ratio = max(ratio, gap / allowed)
                        sketch = got
                        wide = type(sketch)(*(a.astype("float64") for a in got))
    print(f"\ngram64: largest share of the allowed distance {ratio:.2f}")
    assert ratio <= 1


def check_gram64_range(lib: ModuleType) -> None:
    """Scaling by a power of two scales the sketch exactly, also where the Gram matrix alone would not fit its dtype.

    Beyond that the eigenvalues are infinite, as with the definition, and LAPACK has seen no infinity.
    """
    for d in (3, 7):
        rows = np.random.default_rng(8).standard_normal((4, d))
        sketch = start(lib, d, 3)
        one = lib.update(sketch, rows, size=3, solver="gram64")
        for exponent in (-500, 400, 505):
            scaled = lib.update(sketch, rows * 2.0**exponent, size=3, solver="gram64")
            assert np.array_equal(scaled.eigenvalues, np.ldexp(one.eigenvalues, 2 * exponent))
            assert np.array_equal(scaled.escaped, np.ldexp(one.escaped, 2 * exponent))
            assert np.array_equal(scaled.basis, one.basis)
        with np.errstate(over="ignore", invalid="ignore"):
            for solver in fd.SOLVERS:
                beyond = lib.update(sketch, rows * 2.0**600, size=3, solver=solver)
                assert np.all(np.isinf(beyond.eigenvalues[:2]))
                assert np.isinf(beyond.escaped)


def check_overflow(lib: ModuleType) -> None:
    """Finite rows with a singular value that is not: NaN for that member, which is not the sketch of nothing."""
    rows = np.stack([np.full((2, 4), 1.5e308), np.ones((2, 4))])
    for solver in fd.SOLVERS:
        for size in (1, 3, 6):
            with np.errstate(all="ignore"):
                got = lib.update(start(lib, 4, size, (2,)), rows, size=size, solver=solver)
            assert np.all(np.isnan(got.eigenvalues[0])), (solver, size)
            assert np.isnan(got.escaped[0])
            assert np.isclose(got.eigenvalues[1, 0] + got.escaped[1], 8.0, rtol=1e-14)


def check_total_overflow(lib: ModuleType) -> None:
    """An eigenvalue and a mass whose sum is infinite: NaN for that member, not the finite direction 0."""
    most = np.finfo("float64").max
    basis, eigenvalues = np.broadcast_to(np.eye(3)[:, :2], (2, 3, 2)), np.asarray([[0.9 * most, 0.0], [4.0, 1.0]])
    shift, matrix = np.asarray([0.5 * most, 0.0]), np.ones((2, 3, 2))
    for ridge in (0, 1e-3, np.float64(0)):
        for relative in (False, True):
            with np.errstate(all="ignore"):
                got = lib.apply_power(basis, eigenvalues, shift, -0.5, matrix, ridge=ridge, relative=relative)
            assert np.all(np.isnan(got[0])), (ridge, relative)
            alone = lib.apply_power(basis[1], eigenvalues[1], shift[1], -0.5, matrix[1], ridge=ridge, relative=relative)
            assert np.array_equal(got[1], alone)


def check_shapes(lib: ModuleType) -> None:
    """Many rows, none, no dimension; k = min(d, l); float32 stays."""
    rng = np.random.default_rng(7)
    many = rng.standard_normal((30, 4))
    for size in (1, 3, 4, 6):
        sketch = lib.update(start(lib, 4, size), many, size=size)
        k = min(4, size)
        assert (sketch.basis.shape, sketch.eigenvalues.shape, sketch.escaped.shape) == ((4, k), (k,), ())
        spectrum = np.linalg.eigvalsh(many.T @ many)[::-1]
        cut = spectrum[size - 1] if size <= 4 else 0.0
        assert np.allclose(sketch.eigenvalues, spectrum[:k] - cut, rtol=0, atol=1e-12 * spectrum[0])
        same = lib.update(sketch, np.zeros((0, 4)), 0.5, size=size)
        last = sketch.eigenvalues[-1] if size <= 4 else 0.0
        assert np.allclose(same.eigenvalues, 0.5 * (sketch.eigenvalues - last), rtol=1e-13, atol=1e-13)
        assert np.allclose(same.escaped, 0.5 * (sketch.escaped + last), rtol=1e-13, atol=0)
    nothing = start(lib, 0, 3)
    assert lib.update(nothing, np.zeros((2, 0))).basis.shape == (0, 0)


def check_memory(lib: ModuleType) -> None:
    """A sketch keeps alive no more than itself: all singular vectors of a long factor are many times that."""
    for rows in (1, 9):
        for size in (1, 2):
            for solver in fd.SOLVERS:
                sketch = lib.update(start(lib, 6, size), np.ones((rows, 6)), size=size, solver=solver)
                kept = [array.nbytes if array.base is None else array.base.nbytes for array in sketch]
                assert max(kept) <= 8 * 6 * size, (rows, size, solver)


def check_rounding_inside(lib: ModuleType) -> None:
    """What is orthogonal to a sketch that has lost nothing gives exactly 0, and nothing that a graft could enlarge."""
    rng = np.random.default_rng(4)
    u, _ = np.linalg.qr(rng.standard_normal((9, 3)))
    e, mass = np.array([4.0, 1.0, 0.25]), np.zeros(())
    for scale in (1e-20, 1.0, 1e20):
        x = rng.standard_normal((9, 5)) * scale
        x = x - u @ (u.T @ x)
        assert np.abs(u.T @ x).max() > 0  # rounding
        assert not lib.apply_power(u, e, mass, -0.5, x, ridge=0.25).any()
        inside = 1e-9 * scale * u @ rng.standard_normal((3, 5))
        got = lib.apply_power(u, e, mass, -0.5, x + inside, ridge=0.25)
        want = lib.apply_power(u, e, mass, -0.5, inside, ridge=0.25)
        assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)  # u = 1e-16 beside 1e-9


def check_powers_of_members_apart(lib: ModuleType) -> None:
    """Members with a real part, with rounding or with a fresh direction outside the sketch are as they are alone."""
    rng = np.random.default_rng(5)
    u, _ = np.linalg.qr(rng.standard_normal((9, 9)))
    inside, outside = u[:, :3] @ rng.standard_normal((3, 5)), u[:, 3:] @ rng.standard_normal((6, 5))
    members = np.stack([inside + outside, inside, 1e-16 * outside])
    basis, e, mass = np.stack([u[:, :3]] * 3), np.ones((3, 3)), np.full(3, 1e-45)
    for weight in (0.0, 1.0):
        got = lib.apply_power(basis, e, mass, -0.5, members, ridge=1e-40, weight=weight)
        for i in range(3):
            alone = lib.apply_power(u[:, :3], e[0], mass[0], -0.5, members[i], ridge=1e-40, weight=weight)
            assert np.linalg.norm(got[i] - alone) <= 1e-9 * np.linalg.norm(alone), (weight, i)


CHECKS = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_methods,
        check_tight_case,
        check_low_rank,
        check_powers,
        check_rounding_inside,
        check_powers_of_members_apart,
        check_faded_mass,
        check_non_finite,
        check_gram64,
        check_gram64_range,
        check_overflow,
        check_total_overflow,
        check_shapes,
        check_memory,
    )
}


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str) -> None:
    CHECKS[name](fd)


MUTANTS: dict[str, tuple[str, tuple[str, str]]] = {
    "tail decayed by sqrt(beta2)": ("methods", ("(beta2 if tail_decay", "(beta2**0.5 if tail_decay")),
    "tail not decayed": ("methods", ("else tail_decay) * sketch.escaped", "else tail_decay) ** 0 * sketch.escaped")),
    "cut at the (l+1)-th eigenvalue": ("methods",
        ("s[..., size - 1 : size] if size <= d", "s[..., size : size + 1] if size < d")),
    "cut at the smallest of A": ("methods", ("s[..., size - 1 : size] if size <= d", "s[..., -1:] if size <= d")),
    "a view where one column is kept": ("memory", ("in_float64, own, square\n",
        "in_float64, square\nown = lambda u, xp: xp.reshape(xp.reshape(u, (-1,)), u.shape)\n")),
    "a view of all singular vectors": ("memory", ("own(u[..., :k], xp), s", "u[..., :k], s")),
    "a view of all eigenvectors": ("memory", ("u = own(u[..., :k], xp)", "u = u[..., :k]")),
    "singular values deflated, not squares": ("methods", ("(s - cut) * (s + cut),", "(s - cut) * (s - cut),")),
    "mass adds singular value, not square": ("methods", ("(cut * cut)[..., 0]", "cut[..., 0]")),
    "no deflation": ("methods", ("(s - cut) * (s + cut),", "s * s,")),
    "new rows weighted by 1 - beta2": ("methods",
        ("xp.matrix_transpose(rows)]", "(1.0 if beta2 == 1 else 1 - beta2) ** 0.5 * xp.matrix_transpose(rows)]")),
    "sketch decayed by beta2 in the root": ("methods",
        ("xp.sqrt(beta2 * sketch.eigenvalues)", "beta2 * xp.sqrt(sketch.eigenvalues)")),
    "right singular vectors": ("methods", ("own(u[..., :k], xp), s", "own(u[..., ::-1][..., :k], xp), s")),
    "right singular vectors of the transposed factor": ("methods", ("u = xp.matrix_transpose(vh)", "u = vh")),
    "size above d cut like d": ("shapes",
        ("if size <= d else 0.0 * s[..., :1]", "if size <= d else s[..., d - 1 : d]")),
    "cut before the rank decision is off": ("low_rank", ("xp.where(kept, s, 0.0)", "s")),
    "tail_decay ignored": ("methods", ("(beta2 if tail_decay is None else tail_decay)", "beta2")),
    "tail_decay on the sketch too": ("methods", ("concatenated(sketch, rows, beta2, size",
        "concatenated(sketch, rows, beta2 if tail_decay is None else tail_decay, size")),
    "mass not added back": ("powers",
        ("xp.concat([size + shift[..., None], shift[..., None]]", "xp.concat([size, 0.0 * shift[..., None]]")),
    "mass on the complement only": ("powers", ("size + shift[..., None], shift", "size, shift")),
    "ridge outside the root": ("powers", ("damped) ** exponent)[", "total) ** exponent + ridge)[")),
    "ridge always absolute": ("powers", ("ridge * largest if relative else ridge", "ridge")),
    "complement dropped": ("powers", ("return beyond * outside + basis @", "return basis @")),
    "ridge on the untouched complement": ("powers",
        ("(faded if ridge == 0 else 0.0)", "(faded if ridge == 0 else -1.0)")),
    "rounding inside kept": ("rounding_inside", ("xp.abs(known) > roots.CERTAIN * u * beside", "xp.abs(known) >= 0")),
    "all inside is rounding": ("rounding_inside", ("roots.CERTAIN * u * beside, known", "1e-6 * beside, known")),
    "one complement real, all believed": ("powers_of_members_apart", ("surely(real)", "real.any()")),
    "one mass known, no fresh one": ("powers_of_members_apart", ("surely(~fresh)", "(~fresh).any()")),
    "no rank decision at use": ("faded_mass", ("** 2 * largest", "** 2 * 0.0 * largest")),
    "rank decision at use for numbers only": ("faded_mass", ("xp.where(ridge == 0, faded, 0.0)", "0.0")),
    "NaN reaches LAPACK": ("non_finite", ("xp.where(finite, factor, 0.0)", "factor")),
    "overflow is nothing": ("overflow", ("finite[..., 0] & (s[..., :1] < math.inf)", "finite[..., 0]")),
    "power of infinity is nothing": ("total_overflow", ("xp.where(largest < math.inf, total, math.nan)", "total")),
    "one overflow spoils all": ("total_overflow", ("largest < math.inf, total", "xp.all(largest < math.inf), total")),
    "NaN repaired": ("non_finite", ("0.0 * s[..., :1], math.nan)", "0.0 * s[..., :1], 0.0)")),
    "one bad member spoils all": ("non_finite",
        ("xp.max(xp.abs(factor), axis=(-2, -1)", "xp.max(xp.abs(factor), axis=tuple(range(factor.ndim))")),
    "Gram matrix in the working dtype": ("gram64", ("gram = transposed @ wide if",
        "gram = (xp.astype(xp.astype(transposed, factor.dtype) @ xp.astype(wide, factor.dtype), wide.dtype)) if")),
    "Gram matrix without its rank decision": ("gram64", ("xp.where(kept, s, math.inf)", "s")),
    "Gram matrix that overflows": ("gram64_range", ("xp.where(finite & (peak > 0), peak, 1.0)", "xp.ones_like(peak)")),
    "scale of the Gram matrix forgotten": ("gram64_range", ("s * unit[..., 0]", "s")),
    "Gram eigenvalues for singular values": ("gram64",
        ("s = xp.sqrt(clamp(-w, 0.0, xp=xp))", "s = clamp(-w, 0.0, xp=xp)")),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(name: str) -> None:
    check, change = MUTANTS[name]
    with pytest.raises((AssertionError, np.linalg.LinAlgError, ValueError)):
        CHECKS[check](mutated(fd, change))


def test_planted_bugs_start_from_a_sound_copy() -> None:
    for check in CHECKS.values():
        check(mutated(fd))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_member_on_every_backend(backend: Backend, bad: float) -> None:
    rows = np.random.default_rng(8).standard_normal((2, 2, 4))
    rows[1, 0, 2] = bad
    xp = fd.array_namespace(backend.asarray(rows))
    for solver in fd.SOLVERS:
        sketch = arrays_of(stacked(fd.empty(4, 3), (2,)), backend.asarray(rows), xp)
        sketch = fd.update(sketch, backend.asarray(rows), solver=solver)
        values = backend.numpy(sketch.eigenvalues)
        assert np.isfinite(values[0]).all()
        assert np.isnan(values[1]).all()
        x = backend.asarray(np.ones((2, 4, 1)))
        out = backend.numpy(fd.apply_power(sketch.basis, sketch.eigenvalues, sketch.escaped, -0.5, x))
        assert np.isfinite(out[0]).all()
        assert np.isnan(out[1]).all()


def check_failure(module: Any, solver: str) -> None:
    """The second of three members, on which LAPACK fails: NaN, and the others as without it."""
    rows = np.random.default_rng(0).standard_normal((3, 1, 4))
    rows[1] = [1.0, 0.0, 0.0, 0.0]
    both = [module.update(start(module, 4, 3, r.shape[:1]), r, solver=solver) for r in (rows, rows[[0, 2]])]
    for got, expected in zip(*both, strict=True):
        assert np.array_equal(got[[0, 2]], expected)
    assert np.isnan(both[0].eigenvalues[1]).all()
    assert np.isnan(both[0].escaped[1])


@pytest.mark.parametrize("solver", fd.SOLVERS)
def test_a_failure_of_lapack_is_nan_for_its_member(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linalg = fd.array_namespace(np.empty(0)).linalg

    def watch(name: str) -> None:
        function = getattr(linalg, name)

        def call(a: Any, **options: Any) -> Any:
            if np.any(np.sum(np.abs(a), axis=(-2, -1)) == 1):
                raise np.linalg.LinAlgError("did not converge")
            return function(a, **options)

        monkeypatch.setattr(linalg, name, call)

    watch("eigh")
    watch("svd")
    check_failure(fd, solver)
    old = "attempt(svd, factor, wider=True, xp=xp)" if solver == "svd" else "attempt(xp.linalg.eigh, -gram, xp=xp)"
    new = "svd(factor)" if solver == "svd" else "xp.linalg.eigh(-gram)"
    with pytest.raises(np.linalg.LinAlgError, match="did not converge"):
        check_failure(mutated(fd, (old, new)), solver)


def test_dense_and_report() -> None:
    sketch = start(fd, 4, 3)
    for row in np.random.default_rng(9).standard_normal((5, 1, 4)):
        sketch = fd.update(sketch, row)
    dense = fd.dense(sketch)
    assert np.allclose(dense, gram_of(sketch) + sketch.escaped * np.eye(4), rtol=1e-14)
    report = fd.report(sketch, finite=np.isfinite(dense).all(), xp=fd.array_namespace(dense))
    assert (report.rank[0], bool(report.finite), float(report.escaped[0])) == (2, True, float(sketch.escaped))


def test_gram64_needs_float64() -> None:
    device = array_api_strict.Device("no_float64")
    rows = array_api_strict.ones((1, 3), dtype=array_api_strict.float32, device=device)
    sketch = arrays_of(fd.empty(3, 2), rows, array_api_strict)
    with pytest.raises(ValueError, match="^solver='gram64' needs float64, which .* its device lacks"):
        fd.update(sketch, rows, solver="gram64")


@pytest.mark.parametrize(
    ("rows", "kwargs", "message"),
    [
        ((2, 5), {}, r"rows must have shape \('q', 4\), got \(2, 5\)"),
        ((4,), {}, r"rows must have shape \('q', 4\), got \(4,\)"),
        ((3, 2, 4), {}, r"rows must have shape \('q', 4\), got \(3, 2, 4\)"),
        ((2, 4), {"size": 2}, r"size must be 3 for basis \(4, 3\), got 2"),
        ((2, 4), {"solver": "qr"}, "solver must be one of 'svd', 'gram64', got 'qr'"),
    ],
)
def test_update_refuses_what_does_not_fit(rows: tuple[int, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fd.update(start(fd, 4, 3), np.ones(rows), **kwargs)


def test_a_sketch_that_does_not_fit_is_named() -> None:
    method, grad = precond_ref.SAdaGrad(size=3), np.ones(5)
    state = method.init(grad)
    with pytest.raises(ValueError, match=r"state.sketch.basis must have shape \(5, 3\) for param .*, got \(4, 3\)"):
        method.update(grad, state._replace(sketch=start(fd, 4, 3)), grad)
    with pytest.raises(TypeError, match="state.sketch must be a Sketch, got tuple"):
        method.update(grad, state._replace(sketch=tuple(state.sketch)), grad)
