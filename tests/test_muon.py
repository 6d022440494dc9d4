"""Muon, NorMuon and AdaMuon: golden values, singular values, identities, limits and theorems, and planted bugs."""

from __future__ import annotations

import itertools
import math
import types
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from array_api_compat import array_namespace
from helpers import directions, distance, gradients
from mutation import mutated

import precond_ref as pr
from precond_ref.conformance import tolerance
from precond_ref.conformance.variants import muon as variant
from precond_ref.methods import muon
from precond_ref.numerics import axes, orthogonal, roots

START = np.array([[1, -2, 0.5], [0, 1, -1]])
GRADS = np.array([[[0.5, -1, 0.25], [2, 0.5, -1]], [[0, 1, 0.5], [-0.5, 0.25, 1]], [[1, 1, -0.5], [0.25, 0, 0.75]]])
GOLDEN = {
    # W_3 with rate 0.1 and decay 0.1, row by row
    "exact": ".905762360637 -1.97907618906 .428169386691 -.228206302597 .919459223271 -1.03732106032",
    "jordan": ".91096342526 -1.93866720421 .452851777125 -.159519520845 .943051707081 -1.04589255685",
    "transposed": ".897628059146 -1.93823326775 .445593029552 -.195370715042 .936928017738 -1.06288182107",
    "torch": ".949744545765 -1.93992916818 .473961264103 -.0552591733377 .96086027436 -.996485379872",
    "moonlight": ".949744546175 -1.9399291674 .473961262928 -.0552591738198 .960860273685 -.99648537969",
    "optax": ".881380552147 -1.97186456996 .492606264114 -.161384635766 .975735138341 -1.12349121419",
    "emerging": ".770766089139 -1.89450180152 .348513637399 -.40375020749 .852521963401 -.997429450534",
    "dion": ".873696093771 -1.90905716663 .40365044098 -.196940161389 .909308242166 -.96979376145",
    "heavyball": ".845325399515 -2.01418969453 .472967949768 -.0792964802828 .949853713358 -1.10777345895",
    "NorMuon": ".916906625711 -1.94537328979 .462270933652 -.189782463737 .934362955589 -1.04177805515",
    "AdaMuon": ".907954226774 -1.96008175141 .464981079544 -.062344773226 .911611248446 -.988059276503",
}
Q = {
    # q(1), q(.5), q(.1), q(.01), q(.001) and the slope at 0
    ("jordan", 5): (0.6964364095, 0.7654385305, 0.7121200817, 0.6989170633, 0.4705439512, 484.9),
    ("quintic5", 5): (0.9783455603, 0.9858693541, 1.019049889, 1.018025225, 0.474981564, 492.7),
    ("polar_express", 5): (1.028751449, 0.9343310005, 0.8749324699, 1.066000499, 0.8461773735, 976.3),
    ("dion", 5): (0.8591289631, 0.9106108757, 1.059161138, 1.027110178, 0.8588726435, 989.5),
    ("classical", 10): (1, 1, 1, 1, 0.80714823, 1024),
    ("aol4", 4): (-0.9935212262, 1.007487372, 1.003879347, 0.8658844226, 0.1038675375, 104.1),
}
FIRST_TRIPLES = {
    (1e-3, 10, 0.01, 0.02): (8.237312490495555, -23.1577474145582, 16.68056841144592),
    (1e-3, 5, 0.02, 0.02): (8.156554524902461, -22.483292925577953, 15.878769915207466),
}


def presets(lib: Any) -> dict[str, Any]:
    """Those of the golden values, in the parameter's precision."""
    exactly: dict[str, Any] = {"compute_dtype": None}
    return {
        "exact": lib.Muon.exact(),
        "jordan": lib.Muon.jordan(**exactly),
        "transposed": lib.Muon.jordan(**exactly),
        "torch": lib.Muon.torch(rms=0.2, **exactly),
        "moonlight": lib.Muon.moonlight(**exactly),
        "optax": lib.Muon.optax(),
        "emerging": lib.Muon.emerging(),
        "dion": lib.Muon.dion(**exactly),
        "heavyball": lib.Muon.heavyball(),
        "NorMuon": lib.NorMuon(),
        "AdaMuon": lib.AdaMuon(),
    }


def trajectory(method: Any, grads: np.ndarray, start: np.ndarray, lr: float = 0.1, decay: float = 0.1) -> np.ndarray:
    x, state = start, method.init(start)
    for g in grads:
        direction, state = method.update(g, state, x)
        x = (1 - lr * decay) * x - lr * direction
    return x


# ---- golden values and singular values ------------------------------------------------------------------------------


def check_golden_values(lib: Any = muon) -> None:
    for name, method in presets(lib).items():
        want = np.array([float(text) for text in GOLDEN[name].split()]).reshape(2, 3)
        if name == "transposed":
            got = trajectory(method, np.swapaxes(GRADS, 1, 2), START.T).T
        else:
            got = trajectory(method, GRADS, START)
        assert np.max(np.abs(got - want)) <= 6e-12, name  # twelve digits are given


def check_polynomials(lib: Any = orthogonal) -> None:
    for (name, steps), (*values, slope) in Q.items():
        triples = lib.triples(name, steps)
        got = [lib.image(s, triples) for s in (1, 0.5, 0.1, 0.01, 0.001)]
        assert np.allclose(got, values, rtol=2e-9, atol=0), name
        assert abs(math.prod(a for a, _, _ in triples) / slope - 1) < 6e-4, name  # four digits


def check_remez(lib: Any = orthogonal) -> None:
    for arguments, first in FIRST_TRIPLES.items():
        assert np.allclose(lib.remez(*arguments)[0], first, rtol=1e-13, atol=0)
    last = (2.346541325859639, -1.7097828382687088, 0.42323551169305323)
    assert np.allclose(lib.remez(1e-3, 5, 0.02, 0.02)[-1], last, rtol=1e-12, atol=0)
    assert np.allclose(lib.remez(1e-3, 5, 0.02, 0.02), lib.SETS["dion"], rtol=1e-12, atol=0)
    assert np.allclose(lib.remez(1e-3, 5), lib.SETS["cans"], rtol=0, atol=5e-5)
    list_of_authors = np.array(lib.remez(1e-3, 8, 0.0, 0.02407327424182761)[:6])
    scaled = list_of_authors / 1.01 ** np.array([1, 3, 5])
    assert np.allclose(scaled, lib.SETS["polar_express"][:6], rtol=1e-13, atol=0)
    s = np.linspace(0.001, 1, 20001)  # the first polynomial without cushion: 1 - p reaches E, -E, E, -E
    error = 1 - lib.image(s, lib.remez(1e-3, 1))
    assert abs(error.max() + error.min()) < 1e-4
    assert abs(error[0] - error.max()) < 1e-9
    assert abs(error[-1] - error.min()) < 1e-9


def closed_form(n: np.ndarray, fields: dict[str, Any]) -> np.ndarray:
    """The direction of N by singular values, from what a preset's fields say."""
    u, s, vt = np.linalg.svd(n, full_matrices=False)
    if fields["root"] == "svd":
        q = np.ones_like(s)
    else:
        norm = {"frobenius": np.sqrt(np.sum(s**2)), "schatten4": np.sum(s**4) ** 0.25, "spectral": s[0]}
        nu = norm[fields["normalization"]]
        if fields["normalization"] == "schatten4":
            nu = max(nu, fields["eps"] ** 0.5)
        else:
            nu *= fields["normalization_factor"]
            nu = nu + fields["eps"] if fields["eps_rule"] == "add" else max(nu, fields["eps"])
        triples = variant.polynomials(fields, frozenset(), 0.0)
        q = s / nu
        for a, b, c in triples:
            q = a * q + b * q**3 + c * q**5
    r, k = n.shape if fields["outputs"] == "rows" else n.shape[::-1]
    scale = fields["rms"] and fields["rms"] * math.sqrt(max(r, k))
    c = {"max": scale or 1, "jordan": math.sqrt(max(1, r / k)), "ratio": math.sqrt(r / k)}[fields["scale"]]
    return c * (u * q) @ vt


def averaged(grads: np.ndarray, fields: dict[str, Any]) -> list[np.ndarray]:
    """N_t as sums over all gradients."""
    mu, out = fields["momentum"], []
    weight = 1 if fields["momentum_form"] == "sum" else 1 - mu
    for t in range(1, len(grads) + 1):
        b = weight * sum(mu ** (t - i) * grads[i - 1] for i in range(1, t + 1))
        c1, c2 = (1 - mu**t, 1 - mu ** (t + 1)) if fields["bias_correction"] else (1, 1)
        if not fields["nesterov"]:
            out.append(b / c1)
        elif fields["nesterov_form"] == "added":
            out.append(grads[t - 1] + b)
        else:
            out.append(weight * grads[t - 1] / c1 + mu * b / c2)
    return out


def check_singular_values(lib: Any = muon) -> None:
    rng = np.random.default_rng(7)
    methods = [lib.Muon.exact(nesterov=False), lib.Muon.optax(nesterov=False, rms=0.25), lib.Muon.emerging(rms=0.375),
               lib.Muon.heavyball(heavyball_momentum=True), lib.Muon.pytorch_optimizer(compute_dtype=None),
               lib.Muon.torch(eps=3.0, coefficients=(3.25, -4.0, 1.75), root_steps=3, compute_dtype=None),
               lib.Muon.optax(normalization="schatten4"), lib.Muon.dion(nesterov=True, compute_dtype=None),
               lib.Muon(normalization="spectral", coefficients="deepseekv4", root_steps=10, scale="ratio", eps=0.5),
               lib.Muon(coefficients=((3.25, -4.0, 1.75), (3.5, -4.5, 1.75)), root_steps=3, after_last="cycle"),
               lib.Muon(coefficients="polar_express", root_steps=9, normalization_factor=1.01, eps=0.25)]  # fmt: skip
    methods += [method for name, method in presets(lib).items() if isinstance(method, lib.Muon)]
    for method, shape in itertools.product(methods, ((4, 6), (6, 4), (1, 5), (4, 1))):
        grads = rng.standard_normal((3, *shape))
        fields = vars(method)
        for got, n in zip(directions(method, grads), averaged(grads, fields), strict=True):
            want = closed_form(n, fields)
            assert np.linalg.norm(got - want) <= 1e-13 * 5 * np.linalg.norm(want), method  # 5: slopes up to 490


def check_rank_one(lib: Any = muon) -> None:
    u, v = np.array([3.0, 4]) / 5, np.array([2.0, -1, 2]) / 3
    for name, steps in (("jordan", 5), ("quintic5", 3), ("classical", 12)):
        method = lib.Muon(momentum=0.0, nesterov=False, rms=None, coefficients=name, root_steps=steps)
        q = orthogonal.image(1.0, orthogonal.triples(name, steps))
        assert np.allclose(directions(method, 7 * np.outer(u, v)[None])[0], q * np.outer(u, v), rtol=1e-12)


# ---- identities -----------------------------------------------------------------------------------------------------


def check_identities(lib: Any = muon) -> None:
    grads = gradients((4, 3), 5)
    plain: dict[str, Any] = {"momentum": 0.75, "rms": None, "coefficients": "quintic5"}
    average, total = lib.Muon(**plain), lib.Muon(**plain, momentum_form="sum")
    assert distance(directions(total, grads), directions(average, grads)) <= 1e-13
    loud = {**plain, "eps": 0.375}
    assert distance(directions(lib.Muon(**loud, momentum_form="sum"), grads),
                    directions(lib.Muon(**{**loud, "eps": 0.375 / 4}), grads)) <= 1e-13  # fmt: skip
    for kind, power in (("frobenius", 1), ("spectral", 1), ("schatten4", 2), ("aol", 2)):
        method = lib.Muon(**plain, eps=0.375, normalization=kind)
        scaled = method.replace(eps=0.375 * 4.0**power)
        assert np.array_equal(directions(scaled, 4 * grads), directions(method, grads)), kind
        small, tiny = (directions(method, 2.0**-p * grads) for p in (300, 600))  # eps alone is seen
        assert np.array_equal(tiny, 2.0**-300 * small), kind
    assert np.array_equal(directions(average, -grads), -directions(average, grads))
    constant = np.stack([grads[0]] * 4)
    for form in ({}, {"momentum_form": "sum"}, {"bias_correction": True}, {"nesterov_form": "added"}):
        made = directions(average.replace(**form), constant)
        assert distance(made, np.stack([made[0]] * 4)) <= 1e-12, form
    without = average.replace(momentum=0.0)
    assert distance(directions(without.replace(nesterov=False), grads), directions(without, grads)) <= 1e-13


def check_rotations(lib: Any = muon) -> None:
    rng = np.random.default_rng(3)
    q, r = (np.linalg.qr(rng.standard_normal((d, d)))[0] for d in (4, 3))
    grads = gradients((4, 3), 3)
    for kind in ("frobenius", "spectral", "schatten4"):
        method = lib.Muon(momentum=0.75, normalization=kind)
        assert distance(directions(method, q @ grads @ r), q @ directions(method, grads) @ r) <= 1e-12
    aol = lib.Muon(momentum=0.75, normalization="aol")
    assert distance(directions(aol, q @ grads @ r), q @ directions(aol, grads) @ r) > 1e-2
    assert distance(directions(aol, np.swapaxes(grads, 1, 2)), np.swapaxes(directions(aol, grads), 1, 2)) <= 1e-12
    nor = lib.NorMuon(momentum=0.75, beta2=0.625, eps2=0.125)
    order, signs = [2, 0, 3, 1], np.array([1, -1, -1, 1])[:, None]
    assert distance(directions(nor, signs * grads[:, order] @ r), signs * directions(nor, grads)[:, order] @ r) <= 1e-12
    ada = lib.AdaMuon(momentum=0.75, beta2=0.625)
    columns = [1, 2, 0]
    moved = directions(ada, (signs * grads[:, order])[..., columns])
    assert distance(moved, (signs * directions(ada, grads)[:, order])[..., columns]) <= 1e-12


def check_limits(lib: Any = muon) -> None:
    grads = gradients((4, 3), 4)
    exact = lib.Muon.exact(momentum=0.75)
    classical = exact.replace(root="newton_schulz", coefficients="classical", root_steps=30)
    assert distance(directions(classical, grads), directions(exact, grads)) <= 1e-13
    bare = lib.Muon.exact(momentum=0.0, nesterov=False)
    asgo = pr.ASGO(beta1=0.0, beta2=0.0, eps=0.0, rms=None)
    assert distance(directions(asgo, grads), directions(bare, grads)) <= 1e-12
    for g, d in zip(grads, directions(pr.Shampoo(beta2=0.0, eps=0.0), grads), strict=True):
        assert np.linalg.norm(d - scipy.linalg.polar(g)[0]) <= 1e-12
    for g, d in zip(grads, directions(bare.replace(dual_norm=True), grads), strict=True):
        nuclear = np.sum(np.linalg.svd(g, compute_uv=False))
        assert np.linalg.norm(d - nuclear * scipy.linalg.polar(g)[0]) <= 1e-12 * nuclear
    square = gradients((3, 3), 4)  # rows of a square polar factor have norm 1
    nor = lib.NorMuon(momentum=0.75, beta2=0.625, root="svd", scale="ratio", eps2=0.0)
    assert distance(directions(nor, square), directions(lib.Muon.exact(momentum=0.75), square)) <= 1e-13
    raw = lib.NorMuon(momentum=0.0, nesterov=False, beta2=0.625, eps2=0.125, root="svd", rescale="none", scale="ratio")
    polar = scipy.linalg.polar(grads[0])[0]
    rows = [row / (math.sqrt(0.375 * sum(x * x for x in row) / 3) + 0.125) for row in polar]
    assert np.linalg.norm(directions(raw, grads[:1])[0] - np.array(rows) * math.sqrt(4 / 3)) <= 1e-13
    moments = [0.375 * sum(x * x for x in row) / 3 for row in polar]
    least = sorted(moments)[1] + 1e-3  # above some and below others
    rows = [row / math.sqrt(max(v, least)) for row, v in zip(polar, moments, strict=True)]
    floor = raw.replace(eps2=least, eps2_rule="max")
    assert np.linalg.norm(directions(floor, grads[:1])[0] - np.array(rows) * math.sqrt(4 / 3)) <= 1e-13
    (far,) = directions(floor.replace(rescale="norm", eps2=1e3), grads[:1])  # u = o / sqrt(1e3), below 1e3
    assert np.linalg.norm(far - math.sqrt(4 / 3) * math.sqrt(3) * polar / math.sqrt(1e3) / 1e3) <= 1e-18
    ada = directions(lib.AdaMuon(momentum=0.75, beta2=0.625, sign=False), grads[:1])
    o = directions(lib.Muon.jordan(momentum=0.75, compute_dtype=None), grads[:1])
    assert np.max(np.abs(ada - 0.2 * np.sign(o))) <= 1e-6
    zero = np.zeros((2, 3, 3))
    for method in (lib.Muon(), exact, lib.NorMuon(), lib.NorMuon(eps=0.0, eps2=0.0), lib.AdaMuon(eps=0.0, eps2=0.0)):
        assert np.array_equal(directions(method, zero), zero)
    huge = np.random.default_rng(3).uniform(0.5, 1.0, (1, 4, 3))
    for kind in orthogonal.NORMALIZATIONS:
        method = lib.Muon(momentum=0.0, nesterov=False, normalization=kind)
        assert distance(directions(method, 1.5e308 * huge), directions(method, huge)) <= 1e-12, kind
        assert distance(directions(method, 1e-300 * huge), directions(method, huge)) <= 1e-12, kind


def check_padding(lib: Any = muon) -> None:
    """Rows and columns of zeros stay zero and change nothing else; only the exact form decouples blocks."""
    grads = gradients((3, 4), 4)
    padded = np.pad(grads, ((0, 0), (0, 2), (0, 4)))  # wide as before, which "aol" sees
    for method in (
        lib.Muon(momentum=0.75, rms=None),
        lib.Muon(momentum=0.75, rms=None, eps=0.25, normalization="schatten4"),
        lib.Muon(momentum=0.75, rms=None, eps=0.25, normalization="aol"),
        lib.Muon.exact(momentum=0.75),
        lib.AdaMuon(momentum=0.75, beta2=0.625, rescale="norm", rms=None, scale="max"),
    ):
        made, want = directions(method, padded), directions(method, grads)
        assert distance(made[:, :3, :4], want) <= 1e-13, method
        assert not np.any(made[:, 3:])
        assert not np.any(made[:, :, 4:])
    blocks = np.copy(padded)
    blocks[:, 3:, 4:] = gradients((2, 4), 4, seed=1)
    exact, iterated = lib.Muon.exact(momentum=0.75), lib.Muon(momentum=0.75, rms=None)
    for method, close in ((exact, True), (iterated, False)):
        apart = distance(directions(method, blocks)[:, :3, :4], directions(method, grads))
        assert apart <= 1e-13 if close else apart > 1e-2, method


def check_sizes(lib: Any = muon) -> None:
    """Norms of the directions, and the largest parameter that decay allows."""
    wide = gradients((3, 4), 6)
    wide[:, 1] = wide[:, 0] - 2 * wide[:, 2]  # of rank 2
    for grads in (wide, np.swapaxes(wide, 1, 2)):
        for o in directions(lib.Muon.exact(momentum=0.75), grads):
            assert np.linalg.norm(o @ o.T @ o - o) <= 1e-13  # O^T O is a projector
            assert abs(np.sum(o * o) - 2) <= 1e-13
        plain = {"momentum": 0.75, "coefficients": "quintic5", "eps": 1e-7, "scale": "ratio"}
        rows, whole = lib.NorMuon(**plain, beta2=0.625, eps2=0.0), lib.Muon(**plain)
        sizes = [np.linalg.norm(directions(method, grads), axis=(1, 2)) for method in (rows, whole)]
        assert np.allclose(*sizes, rtol=1e-13, atol=0)
    assert np.allclose(directions(lib.Muon.jordan(momentum=0.0, compute_dtype=None), np.full((1, 1, 1), -3.0)),
                       -0.6964364095, rtol=1e-6, atol=0)  # fmt: skip
    diagonal = np.diag([3.0, -0.5, 2.0])
    assert np.allclose(directions(lib.Muon.exact(momentum=0.0), diagonal[None])[0], np.sign(diagonal), atol=1e-15)
    w, method, largest = START, lib.Muon.torch(momentum=0.75, compute_dtype=None), 0.0
    state, bound = method.init(w), max(np.linalg.norm(w, 2), 1.1344 / 0.5)
    for g in np.concatenate([gradients((2, 3), 30), np.stack([GRADS[0]] * 30)]):
        direction, state = method.update(g, state, w)
        w = (1 - 0.125 * 0.5) * w - 0.125 * direction
        largest = max(largest, np.linalg.norm(w, 2))
    assert largest <= bound
    assert np.linalg.norm(w, 2) > 0.5 * 0.68 / 0.5  # so that the bound says something


# ---- layouts and blocks ---------------------------------------------------------------------------------------------


def check_blocks_are_parameters(lib: Any = muon) -> None:
    grads = gradients((6, 4), 4)
    for method in (
        lib.Muon(momentum=0.75, scale="jordan", eps=0.25, dual_norm=True),
        lib.NorMuon(momentum=0.75, beta2=0.625, eps2=0.125, statistic="short"),
        lib.AdaMuon(momentum=0.75, beta2=0.625, eps2=0.125),
    ):
        for blocks, sizes in ((3, (2, 2, 2)), ((1, 5), (1, 5)), ((3, 2, 1), (3, 2, 1))):
            ends = np.cumsum(sizes)
            want = [directions(method, grads[:, e - s : e]) for e, s in zip(ends, sizes, strict=True)]
            got = directions(method.replace(blocks=blocks), grads)
            assert distance(got, np.concatenate(want, axis=1)) <= 1e-14, (method, blocks)
            turned = method.replace(blocks=blocks, outputs="columns")
            assert distance(directions(turned, np.swapaxes(grads, 1, 2)), np.swapaxes(got, 1, 2)) <= 1e-13


def check_layouts(lib: Any = muon) -> None:
    kernel = gradients((2, 3, 4, 5), 3)  # as height x width x inputs x outputs
    for method in (
        lib.Muon(momentum=0.75, scale="ratio", eps=0.25),
        lib.NorMuon(momentum=0.75, beta2=0.625, eps2=0.125),
        lib.AdaMuon(momentum=0.75, beta2=0.625, eps2=0.125, rescale="none", scale="jordan"),
    ):
        as_matrix = np.stack([np.moveaxis(g, 3, 0).reshape(5, 24) for g in kernel])
        want = np.stack([np.moveaxis(d.reshape(5, 2, 3, 4), 0, 3) for d in directions(method, as_matrix)])
        assert distance(directions(method.replace(layout=((0, 1, 2), (3,))), kernel), want) <= 1e-13
        first = np.moveaxis(kernel, 4, 1)  # outputs first
        want = directions(method, first.reshape(3, 5, 24)).reshape(first.shape)
        assert distance(directions(method.replace(layout="flatten"), first), want) <= 1e-13
        each = np.stack([directions(method, kernel[:, i, j]) for i in range(2) for j in range(3)], axis=1)
        assert distance(directions(method.replace(layout="batch"), kernel), each.reshape(kernel.shape)) <= 1e-13
        heads = kernel[:, 0]  # embedding x heads x size
        each = np.stack([directions(method.replace(outputs="columns"), heads[:, :, h]) for h in range(4)], axis=2)
        assert distance(directions(method.replace(layout=((0,), (2,))), heads), each) <= 1e-13
        last = np.stack([g.transpose(2, 1, 0).reshape(20, 3) for g in heads])  # size and heads as outputs
        want = np.stack([d.reshape(5, 4, 3).transpose(2, 1, 0) for d in directions(method, last)])
        assert distance(directions(method.replace(layout=((0,), (2, 1))), heads), want) <= 1e-13


def check_aol(lib: Any = muon) -> None:
    for shape, outputs in itertools.product(((3, 5), (5, 3), (4, 4)), ("rows", "columns")):
        g = gradients(shape, 1)[0]
        turned = shape[0] > shape[1]
        x = g.T.copy() if turned else g.copy()
        for i, row in enumerate(x.copy() @ (g if turned else g.T)):
            x[i] /= math.sqrt(max(sum(abs(entry) for entry in row), 4.0))
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        want = (u * orthogonal.image(s, orthogonal.triples("quintic5", 3))) @ vt
        method = lib.Muon(momentum=0.0, nesterov=False, rms=None, coefficients="quintic5", root_steps=3, eps=4.0,
                          normalization="aol", outputs=outputs)  # fmt: skip
        assert np.linalg.norm(directions(method, g[None])[0] - (want.T if turned else want)) <= 1e-13


# ---- theorems -------------------------------------------------------------------------------------------------------


def check_descent(lib: Any = muon) -> None:
    """One step with dual_norm, rate 1/L: f falls by ||G||_*^2 / (2 L) at least; and the bound for any momentum."""
    rng = np.random.default_rng(11)
    dual = lib.Muon.exact(momentum=0.0, nesterov=False).replace(dual_norm=True)
    plain = lib.Muon.exact(momentum=0.75, nesterov=False)
    for _ in range(20):
        root = rng.standard_normal((4, 4))
        h, target, w = root @ root.T, rng.standard_normal((4, 3)), rng.standard_normal((4, 3))

        def f(w: np.ndarray, h: np.ndarray = h, target: np.ndarray = target) -> float:
            return 0.5 * float(np.sum((w - target) * (h @ (w - target))))

        smooth, g = np.trace(h), h @ (w - target)
        nuclear = np.sum(np.linalg.svd(g, compute_uv=False))
        after = w - directions(dual, g[None])[0] / smooth
        assert f(after) <= f(w) - nuclear**2 / (2 * smooth) + 1e-12 * f(w)
        rate, x, state, b, left, right = 0.05, w, plain.init(w), np.zeros_like(w), 0.0, 0.0
        for _ in range(8):
            g = h @ (x - target)
            b = 0.75 * b + 0.25 * g
            left += np.sum(np.linalg.svd(g, compute_uv=False))
            right += 2 * np.sum(np.linalg.svd(g - b, compute_uv=False)) + rate * smooth / 2
            direction, state = plain.update(g, state, x)
            x = x - rate * direction
        assert left <= (right + (f(w) - f(x)) / rate) * (1 + 1e-12)


CHECKS = (
    check_golden_values, check_singular_values, check_rank_one, check_identities, check_rotations, check_limits,
    check_padding, check_sizes, check_blocks_are_parameters, check_layouts, check_aol, check_descent,
)  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_muon(check: Any) -> None:
    check()


def test_polynomials_and_remez() -> None:
    check_polynomials()
    check_remez()


def with_polynomials(*changes: tuple[str, str]) -> types.ModuleType:
    """The methods on changed numerics."""
    copy = mutated(muon)
    copy.orthogonal = mutated(orthogonal, *changes)
    return copy


ROW_MEAN = "xp.sum(o * o, axis=-1 if rows else -2) / max(k if rows else r, 1)"
BUGS: dict[str, tuple[str, tuple[str, str]]] = {
    "momentum ignored": ("check_singular_values", ("else ema(old, grad, mu)", "else grad")),
    "an average of twice": ("check_singular_values", ("mu * old + grad if", "mu * old + 2 * grad if")),
    "Nesterov's form always": ("check_singular_values", ("if not self.nesterov:", "if False:")),
    "Nesterov's form mixed": ("check_golden_values", ("return m, ema(grad, m, 1 - mu)", "return m, grad + mu * m")),
    "added is weighted": ("check_singular_values", ("return m, grad + m  #", "return m, ema(grad, m, 1 - mu)  #")),
    "a sum's Nesterov added": ("check_golden_values", ("return m, grad + mu * m", "return m, grad + m")),
    "t for both corrections": ("check_golden_values", ("self.momentum, step + 1, like", "self.momentum, step, like")),
    "no correction without Nesterov": ("check_singular_values", ("m * k.average if self.bias_correction else m", "m")),
    "min for max": ("check_singular_values", ("math.sqrt(max(r, k))", "math.sqrt(min(r, k))")),
    "no floor": ("check_golden_values", ('max(1, ratio) if self.scale == "jordan" else ratio', "ratio")),
    "a floor always": ("check_singular_values", ('if self.scale == "jordan" else ratio', "if True else ratio")),
    "inputs over outputs": ("check_singular_values", ("ratio = r / max(k, 1)", "ratio = k / max(r, 1)")),
    "columns as rows": ("check_golden_values", ("xp.matrix_transpose(matrices) if", "matrices if")),
    "no dual norm": ("check_limits", ("if self.dual_norm:", "if False:")),
    "norm of the gradient": ("check_descent", ("xp.sum(piece * o,", "xp.sum(piece * piece,")),
    "blocks as one": ("check_blocks_are_parameters", ("if self.blocks is None:\n            return [rows]",
                                                      "if True:\n            return [rows]")),
    "a block too few": ("check_blocks_are_parameters", ("start += size\n", "start += 1\n")),
    "kernel from the inputs": ("check_layouts", ("stored = (shape[0], math.prod(shape[1:]))",
                                                 "stored = (math.prod(shape[:-1]), shape[-1])")),
    "inputs before outputs": ("check_layouts", ("+ outputs), outputs, inputs", "+ outputs), inputs, outputs")),
    "axes not moved back": ("check_layouts", ("sorted(range(len(order)), key=lambda i: order[i])", "order")),
    "square turned": ("check_aol", ("(r == k and columns)", "r == k")),
    "columns of v": ("check_golden_values", (ROW_MEAN, "xp.sum(o * o, axis=-2)[..., :r] / r")),
    "sum of squares": ("check_limits", (ROW_MEAN, "xp.sum(o * o, axis=-1 if rows else -2)")),
    "v of the gradient": ("check_golden_values", (ROW_MEAN, ROW_MEAN.replace("o * o", "piece * piece"))),
    "no root of v": ("check_golden_values", ("else self._at_least(xp.sqrt(v), xp)", "else self._at_least(v, xp)")),
    "eps2 added": ("check_limits", ('if self.eps2_rule == "add":', "if True:")),
    "eps2 as the least beside v's root": ("check_limits",
        ('xp.sqrt(self._at_least(v, xp)) if self.eps2_rule == "max" else ', "")),
    "norm not restored": ("check_golden_values", ("self._factor(r, k) * size if", "self._factor(r, k) if")),
    "no sign": ("check_golden_values", ("xp.sign(n) + 0.0 * n if self.sign else n", "n")),
    "V of N": ("check_golden_values", ("self._turned(o * o, xp)", "self._turned(n * n, xp)")),
    "V over whole columns": ("check_padding", ("ema(state.v, self._turned(o * o, xp), self.beta2)",
                                               "ema(state.v, self._turned(o * o + xp.mean(o * o), xp), self.beta2)")),
    "norm of N restored": ("check_sizes", ("target = self._factor(r, k) * size",
                                           "target = self._factor(r, k) * size**2")),
    "rms of one side": ("check_golden_values", ("rms * math.sqrt(r * k)", "rms * math.sqrt(k)")),
}  # fmt: skip
NUMERIC_BUGS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "one step fewer": ("check_golden_values", (("for k in range(steps))", "for k in range(steps - 1))"),)),
    "the last triples": ("check_singular_values", (("min(k, last)] for", "max(last - k, 0)] for"),)),
    "repeat for cycle": ("check_singular_values", (("k % len(table) if", "min(k, last) if"),)),
    "spectral for Frobenius": ("check_golden_values", (('if normalization == "spectral":', "if True:"),)),
    "no factor": ("check_golden_values", (("nu = factor * norm", "nu = norm"),)),
    "eps floor for add": ("check_singular_values", (('if eps_rule == "add" else', "if False else"),)),
    "eps of the unit": ("check_identities", (("nu + eps / size", "nu + eps"),)),
    "eps of the norm": ("check_identities", (("sqrt(eps) / size", "sqrt(eps / size)"),)),
    "eps over the square": ("check_identities", (
        ("xp.maximum(xp.sqrt(square), sqrt(eps) / size)", "xp.sqrt(xp.maximum(square, eps / size / size))"),)),
    "rows of a tall matrix": ("check_aol", (("unit if not flipped else xp.matrix_transpose(unit)", "unit"),
                              ("nu = xp.matrix_transpose(nu) if flipped else nu", "nu = nu"))),
    "no absolute values": ("check_aol", (("xp.sum(xp.abs(gram)", "xp.sum(gram"),)),
    "cubic term": ("check_golden_values", (("(product if alpha == 1", "(-product if alpha == 1"),)),
    "norm of the matrix": ("check_limits", (("        nu = norm\n", "        nu = norm * size\n"),
                           ("return unit /", "return matrix /"))),
    "root mean square for the norm": ("check_padding", (
        ("        nu = norm\n", "        nu = norm / (unit.shape[-2] * unit.shape[-1]) ** 0.25\n"),)),
    "a step more": ("check_sizes", (("for k in range(steps))", "for k in range(steps + 1))"),)),
    "Jordan's coefficients": ("check_golden_values", (('"jordan": _table("3.4445', '"jordan": _table("3.4446'),)),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("name", [*BUGS, *NUMERIC_BUGS])
def test_planted_bug_is_caught(name: str) -> None:
    if name in BUGS:
        check, change = BUGS[name]
        lib = mutated(muon, change)
    else:
        check, changes = NUMERIC_BUGS[name]
        lib = with_polynomials(*changes)
    with np.errstate(all="ignore"), pytest.raises((AssertionError, ValueError, IndexError)):
        globals()[check](lib)


@pytest.mark.parametrize(
    ("check", "old", "new"),
    [
        (check_remez, "f = 1 + safety", "f = 1.0"),
        (check_remez, "if cushion * high > low:", "if False:"),
        (check_remez, "_best(max(low, cushion * high), high)", "_best(low, high)"),
        (check_remez, "signs = (low, q, r, high), (1, -1, 1, -1)", "signs = (low, q, r, high), (1, 1, -1, -1)"),
        (check_polynomials, "c / SAFETY**5) for", "c / SAFETY**3) for"),
        (check_polynomials, "-7.0585", "-7.0586"),
    ],
)
def test_planted_bug_in_the_coefficients_is_caught(check: Any, old: str, new: str) -> None:
    with pytest.raises((AssertionError, ValueError, ZeroDivisionError)):
        check(mutated(orthogonal, (old, new)))


def check_one_call(lib: Any = orthogonal) -> None:
    """PyTorch's sum of a matrix and a product as one call, of a matrix, of stacks and of more axes."""
    for shape in ((4, 3), (1, 3, 4), (3, 4, 4), (2, 2, 3, 4)):
        x = np.random.default_rng(6).standard_normal(shape)
        want = orthogonal.orthogonalized(x, orthogonal.SETS["quintic5"])
        got = lib.orthogonalized(torch.tensor(x), orthogonal.SETS["quintic5"]).numpy()
        assert got.shape == shape
        assert distance(got, want) <= 1e-12


def test_products_are_added_in_one_call() -> None:
    check_one_call()
    for old, new in (
        ("beta=beta, alpha=alpha", "beta=alpha, alpha=beta"),
        ("fused(c, a, b,", "fused(c, a, a,"),
        ("    x = xp.reshape(x, matrix.shape)\n", ""),
        ("(x, poly) if flipped", "(poly, x) if flipped"),
    ):
        with pytest.raises((AssertionError, RuntimeError)):
            check_one_call(mutated(orthogonal, (old, new)))


def check_symmetric(lib: Any = axes) -> None:
    """Large products with a transpose, of which PyTorch computes three quarters, with an odd side too."""
    rng = np.random.default_rng(7)
    for shape in ((257, 512), (257, 640)):
        x = rng.integers(-8, 8, shape).astype(np.float64)  # exact sums
        for xp, rows in ((torch, torch.tensor(x)), (torch, torch.tensor(x.T.copy()).T), (np, x)):
            for stack in (1, 2):
                got = np.asarray(lib.gram_of(xp.stack([rows] * stack), array_namespace(rows)))
                assert np.array_equal(got, [x @ x.T] * stack), (xp, stack)
            assert np.array_equal(np.asarray(lib.gram_of(rows, array_namespace(rows))), x @ x.T), xp


def test_large_products_are_symmetric() -> None:
    check_symmetric()
    for old, new in (
        ("xp.matrix_transpose(u[:, a - c : b - c])", "xp.matrix_transpose(u[:, : b - a])"),
        ("xp.matrix_transpose(u[:, a - c : b - c])", "u[:, a - c : b - c]"),
        ("xp.matrix_transpose(rows[a:, :])", "xp.matrix_transpose(rows[: n - a, :])"),
        (" or math.prod(x.shape[:-2]) != 1", ""),
    ):
        with pytest.raises((AssertionError, RuntimeError, ValueError)):
            check_symmetric(mutated(axes, (old, new)))


def test_a_planted_bug_in_the_rank_is_caught() -> None:
    copy = mutated(muon)
    copy.roots = mutated(roots, ("keep = s > max(matrix.shape[-2:])", "keep = s > -max(matrix.shape[-2:])"))
    with pytest.raises(AssertionError):
        check_sizes(copy)


# ---- bfloat16 -------------------------------------------------------------------------------------------------------


def check_bfloat16(lib: Any = muon) -> None:
    """Products in bfloat16, real or rounded to its digits, are within the tolerance; those of 7 digits are not."""
    rng = np.random.default_rng(5)
    exact = lib.Muon.torch(momentum=0.0, nesterov=False, rms=None, compute_dtype=None)
    method = exact.replace(compute_dtype="bfloat16")
    config = vars(exact)
    largest = {"numpy": 0.0, "torch": 0.0}
    for shape in ((6, 4), (4, 6), (8, 8)) * 10:
        g = rng.standard_normal((1, *shape))
        want = directions(exact, g)
        kappa = variant.condition(g[0], config)
        tensor = torch.tensor(g[0])
        found = {
            "numpy": directions(method, g)[0],
            "torch": method.update(tensor, method.init(tensor), tensor)[0].numpy(),
        }
        for name, got in found.items():
            error = np.linalg.norm(got - want[0]) / np.linalg.norm(want[0])
            largest[name] = max(largest[name], error / (tolerance.BFLOAT16 * kappa))
            assert got.dtype == np.float64
    for name, ratio in largest.items():
        assert tolerance.PRODUCTS / 8 <= ratio <= tolerance.PRODUCTS, name


def test_products_in_bfloat16() -> None:
    check_bfloat16()


@pytest.mark.full
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("if compute_dtype is None or xp.finfo(like.dtype).bits < 32:", "if True:"),
        ("(digits - 8)", "(digits - 5)"),
        ("(digits - 8)", "(digits - 24)"),
        ("return lambda x: xp.astype(x, xp.bfloat16, copy=False)", "return lambda x: x"),
    ],
)
def test_planted_bug_in_the_rounding_is_caught(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_bfloat16(with_polynomials((old, new)))


def check_rounding(module: Any) -> None:
    """PyTorch's own bfloat16, down to where it ends, and halfway between two numbers."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal(3000) * 2.0 ** np.repeat([0, -128, -140], 1000)
    x = np.concatenate([x, np.arange(257, 511, 2) / 256])
    for dtype in (np.float64, np.float32):
        rounded = module._rounding(x.astype(dtype), "bfloat16", np)(x.astype(dtype))
        want = torch.tensor(x.astype(dtype)).to(torch.bfloat16).to(torch.float64).numpy()
        assert np.array_equal(rounded, want)


def test_bfloat16_has_eight_digits() -> None:
    check_rounding(orthogonal)


@pytest.mark.parametrize(
    ("old", "new"), [("(digits - 134)", "(digits - 133)"), ("< 2.0**-126", "< 0"), (") + 1.0, 1.5", ") + 2.0, 1.5")]
)
def test_planted_bugs_where_bfloat16_ends(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_rounding(mutated(orthogonal, (old, new)))


def test_sensitivity_bounds_what_errors_become() -> None:
    """Perturbations of size e of X_0 change O by at most e times the largest divided difference, which it adds up."""
    rng = np.random.default_rng(9)
    for name, steps in (("jordan", 5), ("quintic5", 5), ("classical", 8)):
        triples = orthogonal.triples(name, steps)
        for shape in ((4, 3), (3, 5)):
            x = rng.standard_normal(shape)
            x /= np.linalg.norm(x)
            o = orthogonal.orthogonalized(x, triples, "frobenius")
            bound = variant.sensitivity(np.linalg.svd(x, compute_uv=False), list(triples)) * np.linalg.norm(o)
            for _ in range(20):
                e = rng.standard_normal(shape) * 1e-7
                moved = orthogonal.orthogonalized(x + e, triples, factor=1 / np.linalg.norm(x + e))  # nu = 1
                assert np.linalg.norm(moved - o) <= bound * np.linalg.norm(e)


def test_exact_in_fifty_digits_of_a_polynomial() -> None:
    """The second implementation's polynomials are the library's, digit by digit."""
    for name, table in orthogonal.SETS.items():
        fields = {"coefficients": name, "root_steps": len(table), "after_last": "repeat"}
        assert variant.polynomials(fields, frozenset(), 0.0) == list(table), name
    assert Fraction(variant.JORDAN.split()[0]) == Fraction(34445, 10000)


# ---- refusals and warnings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pr.Muon(bias_correction=True, momentum_form="sum"), "bias_correction=True needs momentum_form="),
        (lambda: pr.Muon(bias_correction=True, nesterov_form="added"), "bias_correction=True needs .* 'added'"),
        (lambda: pr.Muon(outputs="columns", layout="flatten"), "outputs='columns' needs layout='matrix' or 'batch'"),
        (lambda: pr.Muon(coefficients=(1.0, 2.0)), r"coefficients must be three .* got \(1.0, 2.0\)"),
        (lambda: pr.Muon(coefficients=((1.0, 2.0, math.nan),)), "coefficients must be three finite numbers"),
        (lambda: pr.Muon(coefficients=()), r"coefficients must be .* got \(\)"),
        (lambda: pr.Muon(layout=((0,), (0,))), r"layout must be .* got \(\(0,\), \(0,\)\)"),
        (lambda: pr.Muon(layout=((0,),)), "layout must be 'matrix', 'flatten', 'batch', or a pair"),
        (lambda: pr.Muon(layout=((-1,), (0,))), "layout must be"),
        (lambda: pr.Muon(blocks=0), "blocks must be a whole number >= 1, a tuple of them, or None, got 0"),
        (lambda: pr.Muon(blocks=(2, 0)), "blocks must be"),
        (lambda: pr.Muon(blocks=4).init(np.zeros((6, 3))), r"blocks must divide the outputs, got blocks=4 and shape"),
        (lambda: pr.Muon(blocks=(4, 3)).init(np.zeros((6, 3))), r"blocks must have the sum 6 for shape \(6, 3\)"),
        (lambda: pr.Muon(blocks=4, outputs="columns").init(np.zeros((4, 3))), "blocks must divide the outputs"),
        (lambda: pr.Muon().init(np.zeros((6, 3, 2))), "takes a parameter with exactly 2 axes"),
        (lambda: pr.Muon(layout=((0,), (3,))).init(np.zeros((6, 3, 2))), "takes a parameter with 4 to 64 axes"),
        (lambda: pr.NorMuon(rescale="rms", rms=None), "rescale='rms' needs rms, got rms=None"),
    ],
)  # fmt: skip
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_uphill_step_near_rank_one_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="the singular value of a gradient of rank one to -0.9935 < 0") as caught:
        method = pr.Muon(momentum=0.0, nesterov=False, coefficients="aol4", root_steps=4, rms=None)
    assert caught[0].filename == __file__
    g = np.outer([1.0, 2, 2], [3.0, 4]) / 15
    assert np.allclose(directions(method, g[None])[0], -0.9935212262 * g, rtol=1e-9)
    with pytest.warns(UserWarning, match="uphill") as caught:
        pr.NorMuon(coefficients="aol4", root_steps=4, normalization="aol")
    assert {warning.filename for warning in caught} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in orthogonal.SETS:
            if name != "aol4":
                pr.Muon(coefficients=name, root_steps=10)
        pr.Muon(coefficients="aol4", root_steps=4, normalization_factor=1.25)
        pr.Muon(coefficients="aol4", root="svd")


def test_the_reports() -> None:
    grads = gradients((4, 3), 1)
    for method in (pr.Muon(momentum=0.25), pr.NorMuon(momentum=0.25), pr.AdaMuon(momentum=0.25)):
        _, state = method.update(grads[0], method.init(grads[0]), grads[0])
        report = method.diagnose(state)
        values = np.linalg.svd(grads[0], compute_uv=False) * 0.75
        assert np.allclose(report.singular_values, values, rtol=1e-13)
        assert bool(report.finite)
    stack = pr.Muon(layout="batch")
    kernel = gradients((2, 4, 3), 1)[0]
    _, state = stack.update(kernel, stack.init(kernel), kernel)
    assert stack.diagnose(state).singular_values.shape == (2, 3)


def test_torch_muon_is_the_preset_within_its_bfloat16() -> None:
    grads = gradients((6, 8), 6)
    p = torch.nn.Parameter(torch.zeros(6, 8, dtype=torch.float64))
    theirs = torch.optim.Muon([p], lr=1.0, weight_decay=0.0, momentum=0.75)
    method, out = pr.Muon.torch(momentum=0.75, compute_dtype=None), []
    averages = averaged(grads, vars(method))
    for g in grads:
        p.grad, before = torch.tensor(g), p.detach().numpy().copy()
        theirs.step()
        out.append(before - p.detach().numpy())
    for got, want, n in zip(out, directions(method, grads), averages, strict=True):
        limit = tolerance.PRODUCTS * tolerance.BFLOAT16 * variant.condition(n, vars(method))
        assert np.linalg.norm(got - want) <= limit * np.linalg.norm(want)
