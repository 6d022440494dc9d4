"""The classes of factors: products, free entries and the projection, against a least-squares solver."""

from __future__ import annotations

import array_api_compat
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from kronecker import basis, free_entries, least_squares
from mutation import mutated

from precond_ref.numerics import structured

XP = array_api_compat.array_namespace(np.zeros(1))
SIZES = (1, 2, 3, 4, 5, 7)
CLASSES = (
    "dense",
    "diagonal",
    "block-diagonal(2)",
    "block-diagonal(3)",
    "block-diagonal(30)",
    "tril",
    "triu",
    "tril-toeplitz",
    "triu-toeplitz",
    "hierarchical(2,1)",
    "hierarchical(1,2)",
    "hierarchical(15,15)",
)
each_class = pytest.mark.parametrize("structure", CLASSES)


def symmetric(d, seed=0):
    x = np.random.default_rng(seed).standard_normal((d, d))
    return x + x.T


def member(structure, d, seed=0):
    e = basis(structure, d)
    return np.tensordot(np.random.default_rng(seed).standard_normal(len(e)), e, 1)


def relative(a, b):
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300)


# ---- checks: each takes the module, right or mutated ----


def check_entries(module):
    for structure in CLASSES:
        for d in SIZES:
            cells = {cell for tied in free_entries(structure, d) for cell in tied}
            got = module.mask(structure, np.zeros((d, d)), XP)
            assert {tuple(map(int, cell)) for cell in np.argwhere(got)} == cells, (structure, d)


def check_projection(module):
    for structure in CLASSES:
        for d in SIZES:
            x = symmetric(d)
            # The solver works with columns of norm up to sqrt(2 d) and as many unknowns as entries: d^2 u covers both.
            assert relative(module.project(x, structure, XP), least_squares(x, structure)) <= 32 * d**2 * 2**-53


def check_copied_and_doubled(module):
    x = np.array([[3.0, 5.0, 7.0], [5.0, 9.0, 11.0], [7.0, 11.0, 13.0]])
    expected = {
        "dense": x,
        "diagonal": np.diag([3.0, 9.0, 13.0]),
        "block-diagonal(2)": np.array([[3.0, 5.0, 0.0], [5.0, 9.0, 0.0], [0.0, 0.0, 13.0]]),
        "tril": np.array([[3.0, 0.0, 0.0], [10.0, 9.0, 0.0], [14.0, 22.0, 13.0]]),
        "triu": np.array([[3.0, 10.0, 14.0], [0.0, 9.0, 22.0], [0.0, 0.0, 13.0]]),
        "hierarchical(1,1)": np.array([[3.0, 10.0, 14.0], [0.0, 9.0, 0.0], [0.0, 22.0, 13.0]]),
    }
    c = (25.0 / 3, 16.0, 14.0)  # mean of the diagonal, twice the mean of the first and of the second off it
    expected["tril-toeplitz"] = scipy.linalg.toeplitz(c, (c[0], 0.0, 0.0))
    expected["triu-toeplitz"] = expected["tril-toeplitz"].T
    for structure, value in expected.items():
        np.testing.assert_allclose(2 * module.project(x, structure, XP), value, rtol=4 * 2**-53, atol=0)


CHECKS = {f.__name__.removeprefix("check_"): f for f in (check_entries, check_projection, check_copied_and_doubled)}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_check(check):
    check(structured)


MUTANTS = {
    "one-sided parts not doubled": ("(1 + xp.matrix_transpose(free))", "2", "projection"),
    "everything doubled": ("x * (free / (1 + xp.matrix_transpose(free)))", "x * free", "copied_and_doubled"),
    "diagonal doubled": ("(free / (1 + xp.matrix_transpose(free)))", "free / (2 - xp.tril(free))", "projection"),
    "tied entries summed": (" / xp.astype(d - index, lower.dtype)", "", "projection"),
    "mean over d": ("xp.astype(d - index, lower.dtype)", "d", "projection"),
    "last block dropped": (
        "row // sizes[0] == column // sizes[0]",
        "(row // sizes[0] == column // sizes[0]) & (row < d // sizes[0] * sizes[0])",
        "entries",
    ),
    "triangles swapped": ('("tril", "tril-toeplitz")', '("triu", "tril-toeplitz")', "entries"),
    "no toeplitz ties": ('if structure == "tril-toeplitz"', 'if structure == "never"', "projection"),
    "hierarchy without D": ("& (column >= a)", "& (column >= d - b)", "entries"),
    "hierarchy's sizes swapped": ("a, b = sizes", "b, a = sizes", "entries"),
    "hierarchy without B2": ("(row < a) |", "((row < a) & (column < d - b)) |", "entries"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name):
    old, new, check = MUTANTS[name]
    with pytest.raises(AssertionError):
        CHECKS[check](mutated(structured, (old, new)))


# ---- what the classes must satisfy ----


@each_class
@pytest.mark.parametrize("d", SIZES)
def test_closed_under_products(structure, d):
    a, b = member(structure, d, 1), member(structure, d, 2)
    e = basis(structure, d).reshape(-1, d * d)
    product = (a @ b).reshape(-1)
    inside = e.T @ np.linalg.lstsq(e.T, product, rcond=None)[0]
    assert np.linalg.norm(product - inside) <= 32 * d**2 * 2**-53 * np.linalg.norm(product)


@each_class
def test_projection_recovers_symmetric_parts_of_members(structure):
    """X = m + m^T with m in the class is fitted exactly."""
    m = member(structure, 6)
    x = m + m.T
    p = structured.project(x, structure, XP)
    assert relative(p + p.T, x) <= 8 * 2**-53


@each_class
def test_identity_becomes_half(structure):
    np.testing.assert_array_equal(structured.project(np.eye(5), structure, XP), 0.5 * np.eye(5))


def test_small_sizes_are_dense():
    x = symmetric(4)
    for structure in ("block-diagonal(4)", "block-diagonal(30)", "hierarchical(4,2)", "hierarchical(15,15)"):
        np.testing.assert_array_equal(structured.project(x, structure, XP), x / 2)
    for structure in CLASSES:
        np.testing.assert_array_equal(structured.project(np.array([[3.0]]), structure, XP), [[1.5]])


@each_class
def test_all_backends(structure, backend):
    x = np.stack([symmetric(5, seed) for seed in range(2)])
    got = backend.numpy(structured.project(backend.asarray(x), structure, backend.xp))
    expected = np.stack([structured.project(y, structure, XP) for y in x])
    assert relative(got, expected) <= 8 * 2**-53


@given(st.sampled_from(CLASSES), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_projection_is_least_squares(structure, d, seed):
    x = symmetric(d, seed)
    assert relative(structured.project(x, structure, XP), least_squares(x, structure)) <= 32 * d**2 * 2**-53


@pytest.mark.parametrize(
    "structure",
    ["", "full", "block-diagonal", "block-diagonal()", "block-diagonal(0)", "block-diagonal(2,3)", "block-diagonal(-1)",
     "block-diagonal(2", "block-diagonal(2.0)", "block-diagonal(b)", "hierarchical(15)", "hierarchical(15,0)",
     "dense(3)", "dense(", "diagonal()", "tril toeplitz", "block-diagonal(2)x"],
)  # fmt: skip
def test_unknown_structure_is_refused(structure):
    with pytest.raises(ValueError, match="structure must be one of dense, diagonal"):
        structured.parse(structure)


def test_sizes_are_read():
    assert structured.parse("hierarchical(15, 3)") == ("hierarchical", (15, 3))
    assert structured.parse("tril") == ("tril", ())
