"""Instances of the theorems: drawn fields, the run they describe, and every statement held against it.

``python tests/theory_cases.py [FAMILY ...]`` searches for violations with Hypothesis, which is told to
make the ratios large, and records the worst instances in ``theory_worst.json``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import hypothesis
import numpy as np
from hypothesis import strategies as st

from precond_ref import theory
from precond_ref.methods import agd, asgo, baselines, inverse_free, mbf, root_free, sketchy
from precond_ref.numerics import nystrom
from precond_ref.numerics import sketch as fd
from precond_ref.problems import online
from precond_ref.problems.base import generator
from precond_ref.theory import Check

WORST = Path(__file__).with_name("theory_worst.json")
REAL = SimpleNamespace(
    agd=agd,
    asgo=asgo,
    baselines=baselines,
    fd=fd,
    inverse_free=inverse_free,
    mbf=mbf,
    nystrom=nystrom,
    root_free=root_free,
    sketchy=sketchy,
)
"""The modules under test; a mutant replaces one."""
SEEDS = (0, 2**16)
Case = Mapping[str, Any]


class Family(NamedTuple):
    """Fields of an instance, each a tuple of choices, a range of ints, or a range of floats; and how to play it."""

    fields: Mapping[str, Any]
    play: Callable[[Any, Case], list[Check]]
    statements: tuple[str, ...]


class Ints(NamedTuple):
    low: int
    high: int


class Floats(NamedTuple):
    low: float
    high: float


FAMILIES: dict[str, Family] = {}
EXAMPLES = {
    "sadagrad_online": 21_000,
    "sshampoo_online": 30_000,
    "sketch_stream": 22_000,
    "nystrom_online": 17_500,
    "factors_at_rest": 14_000,
    "mbf_network": 13_000,
    "asgo_online": 17_000,
    "mbf_linear": 16_000,
}  # fmt: skip
"""Of the long search, where a statement does not apply to all instances; else 1e4."""


def family(*statements: str, **fields: Any) -> Callable[[Callable[[Any, Case], list[Check]]], None]:
    """Register a function ``(lib, case) -> checks``."""

    def register(play: Callable[[Any, Case], list[Check]]) -> None:
        FAMILIES[play.__name__] = Family({"seed": Ints(*SEEDS), **fields}, play, statements)

    return register


def strategy(fields: Mapping[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Hypothesis draws the fields; simple values come first."""
    return st.fixed_dictionaries(
        {
            name: st.integers(each.low, each.high)
            if isinstance(each, Ints)
            else st.floats(each.low, each.high)
            if isinstance(each, Floats)
            else st.sampled_from(each)
            for name, each in fields.items()
        }
    )


def drawn(fields: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The fields, at random."""
    rng = generator(seed, "case")
    return {
        name: int(rng.integers(each.low, each.high + 1))
        if isinstance(each, Ints)
        else float(rng.uniform(each.low, each.high))
        if isinstance(each, Floats)
        else each[int(rng.integers(len(each)))]
        for name, each in fields.items()
    }


def play(name: str, case: Case, lib: Any = REAL) -> dict[str, Check]:
    """The checks of an instance that apply, by statement."""
    with np.errstate(all="ignore"):
        checks = FAMILIES[name].play(lib, case)
    assert {check.statement for check in checks} == set(FAMILIES[name].statements)
    return {check.statement: check for check in checks if check.applies}


def normal(seed: int, *shape: int) -> np.ndarray:
    return generator(seed, "case start").standard_normal(shape)


# ---- ASGO -----------------------------------------------------------------------------------------------------------

SIDE = ("left", "right")
EPS = (0.0, 1e-8, 1e-3, 0.3)


@family(
    "asgo.energy", "asgo.drift", "asgo.norm", "asgo.monotone", "asgo.regret", "asgo.regret-sharper", "asgo.step",
    "asgo.shampoo", "asgo.rank",
    kind=tuple(online.ADVERSARIES), side=SIDE, eps=EPS, equal=(False, True), m=Ints(1, 5), n=Ints(1, 5),
    rounds=Ints(1, 24), eta=Floats(-2, 1), scale=Floats(-1, 1),
)  # fmt: skip
def asgo_online(lib: Any, case: Case) -> list[Check]:
    """Algorithm 1 against an adversary; ``eta`` and ``scale`` are exponents of 2 and 10."""
    scale, shape = 10.0 ** case["scale"], (case["m"], case["n"])
    start = normal(case["seed"], *shape)
    target = normal(case["seed"] + 1, *shape)
    if case["equal"]:
        start = target + online.polar(start)  # all singular values of W_0 - U equal
    stream = online.adversary(
        case["kind"], shape, rounds=case["rounds"], seed=case["seed"], scale=scale, start=start, target=target
    )
    method = lib.asgo.ASGO.theory(eps=case["eps"] * scale, side=case["side"])
    eta = float(np.linalg.norm(start - target, 2)) * 2.0 ** case["eta"]
    run = theory.record(method, stream, eta)
    a = theory.asgo
    return [
        s(run, target)
        for s in (a.energy, a.drift, a.norm, a.monotone, a.regret, a.regret_sharper, a.step, a.shampoo, a.rank)
    ]


@family(
    "asgo.row-regret", "asgo.diagonal-energy",
    kind=tuple(online.ADVERSARIES), eps=(0.0, 1e-3, 0.3), m=Ints(1, 5), n=Ints(1, 5), rounds=Ints(1, 30),
    eta=Floats(-2, 1), scale=Floats(-3, 3),
)  # fmt: skip
def dasgo_online(lib: Any, case: Case) -> list[Check]:
    """The diagonal form against an adversary."""
    scale, shape = 10.0 ** case["scale"], (case["m"], case["n"])
    start, target = normal(case["seed"], *shape), normal(case["seed"] + 1, *shape)
    stream = online.adversary(
        case["kind"], shape, rounds=case["rounds"], seed=case["seed"], scale=scale, start=start, target=target
    )
    eta = float(np.linalg.norm(start - target, axis=1).max()) * 2.0 ** case["eta"]
    run = theory.record(lib.asgo.DASGO.theory(eps=case["eps"] * scale), stream, eta)
    return [theory.asgo.row_regret(run, target), theory.asgo.diagonal_energy(run, target)]


@family(
    "asgo.nonsmooth", "asgo.nonsmooth-rate",
    kind=online.NONSMOOTH, eps=(0.0, 1e-3, 0.3), m=Ints(1, 5), n=Ints(1, 5), rounds=Ints(1, 40), eta=Floats(-3, 1),
)  # fmt: skip
def asgo_nonsmooth(lib: Any, case: Case) -> list[Check]:
    """A convex function with corners."""
    objective = online.nonsmooth(case["kind"], (case["m"], case["n"]), case["seed"])
    start = normal(case["seed"], case["m"], case["n"])
    eta = float(np.linalg.norm(start - objective.minimizer, 2)) * 2.0 ** case["eta"]
    run = theory.record(lib.asgo.ASGO.theory(eps=case["eps"]), online.repeated(objective, start, case["rounds"]), eta)
    return [theory.asgo.nonsmooth(run, objective), theory.asgo.nonsmooth_rate(run, objective)]


@family(
    "asgo.smooth", "asgo.curvature",
    kind=online.SMOOTH, eps=(0.0, 1e-6, 0.1), m=Ints(1, 5), n=Ints(1, 5), rounds=Ints(2, 40), eta=Floats(-1, 1),
    distance=Floats(-1, 1),
)  # fmt: skip
def asgo_smooth(lib: Any, case: Case) -> list[Check]:
    """A smooth convex function, exact gradients."""
    objective = online.smooth(case["kind"], (case["m"], case["n"]), case["seed"])
    start = objective.minimizer + 10.0 ** case["distance"] * normal(case["seed"], case["m"], case["n"])
    eta = float(np.linalg.norm(start - objective.minimizer, 2)) * 2.0 ** case["eta"]
    run = theory.record(lib.asgo.ASGO.theory(eps=case["eps"]), online.repeated(objective, start, case["rounds"]), eta)
    return [theory.asgo.smooth(run, objective), theory.asgo.curvature(run, objective)]


@family(
    "asgo.noisy",
    kind=online.SMOOTH, m=Ints(1, 4), n=Ints(1, 4), rounds=Ints(2, 30), eta=Floats(-2, 1), sigma=Floats(-2, 1),
    spread=(0.0, 1.0),
)  # fmt: skip
def asgo_noisy(lib: Any, case: Case) -> list[Check]:
    """A smooth convex function with noise B Z_t, Z_t normal: E[N N^T] = n B B^T; 16 replicas."""
    m, n, rounds = case["m"], case["n"], case["rounds"]
    objective = online.smooth(case["kind"], (m, n), case["seed"], spread=case["spread"])
    start = objective.minimizer + online.polar(normal(case["seed"], m, n))
    rng = generator(case["seed"], "noise")
    root, draws = 10.0 ** case["sigma"] * rng.standard_normal((m, m)), rng.standard_normal((rounds, 16, m, n))
    stream = online.repeated(objective, np.tile(start, (16, 1, 1)), rounds, lambda t: root @ draws[t])
    run = theory.record(lib.asgo.ASGO.theory(eps=1e-3), stream, 2.0 ** case["eta"], stack_ndim=1)
    return [theory.asgo.noisy(run, objective, math.sqrt(n) * float(np.linalg.norm(root, "nuc")))]


# ---- gradient descent -----------------------------------------------------------------------------------------------


@family(
    "sgd.regret",
    kind=tuple(online.ADVERSARIES), n=Ints(1, 5), rounds=Ints(1, 30), eta=Floats(-3, 3), power=(0.0, 0.5, 1.0),
)  # fmt: skip
def sgd_online(lib: Any, case: Case) -> list[Check]:
    """Rates 2^eta t^-power against an adversary."""
    target = normal(case["seed"], case["n"])
    stream = online.adversary(case["kind"], (case["n"],), rounds=case["rounds"], seed=case["seed"], target=target)
    rates = 2.0 ** case["eta"] * np.arange(1.0, case["rounds"] + 1) ** -case["power"]
    return [theory.gradient_descent.regret(theory.record(lib.baselines.SGD(), stream, rates), target)]


# ---- AGD ------------------------------------------------------------------------------------------------------------

BETAS = {"beta1": (0.0, 0.5, 0.75, 0.9), "beta2": (0.0, 0.5, 0.9, 0.999)}


@family(
    "agd.identity",
    **BETAS, amsgrad=(False, True), delta=Floats(-2, 0), n=Ints(1, 4), rounds=Ints(2, 40), rate=Floats(-1, 1),
)  # fmt: skip
def agd_linear(lib: Any, case: Case) -> list[Check]:
    """Random gradients, a random rate at each step."""
    rng = generator(case["seed"], "gradients")
    n, rounds = case["n"], case["rounds"]
    grads = rng.standard_normal((rounds, n)) * 10.0 ** rng.uniform(-1, 1, n)
    start, star = rng.standard_normal((2, n))
    stream = online.Stream(name="given", rounds=rounds, start=start, gradient=lambda t, x, s: grads[t])
    rates = 10.0 ** (case["rate"] * rng.uniform(-1, 1, rounds))
    return [theory.agd.identity(theory.record(agd_method(lib, case), stream, rates), star)]


def agd_method(lib: Any, case: Case, **fields: Any) -> Any:
    drawn = {name: case[name] for name in ("beta1", "beta2", "amsgrad") if name in case}
    return lib.agd.AGD(**{"delta": 10.0 ** case["delta"] if "delta" in case else 1.0, **drawn, **fields})


@family(
    "agd.regret-measured", "agd.root",
    **BETAS, amsgrad=(False, True), link=online.LINKS, delta=Floats(-2, 1), n=Ints(1, 3), rounds=Ints(1, 39),
    distance=Floats(-1, 1), rate=Floats(-1, 0.5), spread=(0.0, 0.25),
)  # fmt: skip
def agd_convex(lib: Any, case: Case) -> list[Check]:
    """Online linear, absolute, squared or logistic losses."""
    stream = online.random_linear_model(case["link"], case["n"], case["rounds"], case["seed"], 10.0 ** case["distance"])
    alpha = float(np.linalg.norm(stream.start - stream.target)) * 10.0 ** case["rate"]
    rates = alpha * 10.0 ** (case["spread"] * generator(case["seed"], "rates").uniform(-1, 1, case["rounds"]))
    run = theory.record(agd_method(lib, case), stream, rates)
    return [theory.agd.regret_measured(run, stream.target), theory.agd.root(run, stream.target)]


@family(
    "agd.regret-closed", "agd.regret-closed-varying",
    **BETAS, power=(0.0, 0.5, 1.0), link=online.LINKS, delta=Floats(-2, 1), n=Ints(1, 3), rounds=Ints(1, 39),
    distance=Floats(-1, 1), rate=Floats(-1, 0.5),
)  # fmt: skip
def agd_falling(lib: Any, case: Case) -> list[Check]:
    """amsgrad, rates alpha / sqrt t; beta1 constant, and falling as t^-power."""
    stream = online.random_linear_model(case["link"], case["n"], case["rounds"], case["seed"], 10.0 ** case["distance"])
    alpha = float(np.linalg.norm(stream.start - stream.target)) * 10.0 ** case["rate"]
    t = np.arange(1, case["rounds"] + 1)
    method = agd_method(lib, case, amsgrad=True)
    run = theory.record(method, stream, alpha / np.sqrt(t))
    beta1 = method.beta1 / t ** case["power"]
    varied = theory.record(method, stream, alpha / np.sqrt(t), update=theory.agd.varying_beta1(method, beta1))
    return [
        theory.agd.regret_closed(run, stream.target),
        theory.agd.regret_closed_varying(varied, stream.target, beta1),
    ]


AGD_SMOOTH = {
    **BETAS, "amsgrad": (False, True), "kind": online.NONCONVEX, "n": Ints(1, 4), "rounds": Ints(1, 50),
    "alpha": Floats(-2, 1), "share": (1.0, 0.5, 0.25), "rates": ("constant", "falling", "random"),
    "distance": Floats(-1, 1),
}  # fmt: skip


def agd_smooth_parts(lib: Any, case: Case) -> tuple[online.Objective, Any, np.ndarray, np.ndarray]:
    """Objective, method with u = share times the largest allowed, first point and rates."""
    objective = online.nonconvex(case["kind"], case["n"], case["seed"])
    alpha, rounds = 10.0 ** case["alpha"], case["rounds"]
    u = case["share"] * theory.agd.largest_u(case["beta1"])
    method = agd_method(lib, case, delta=objective.curvature * alpha / u)
    rates = {
        "constant": np.ones(rounds),
        "falling": 1 / np.sqrt(np.arange(1, rounds + 1)),
        "random": generator(case["seed"], "rates").uniform(0.1, 1, rounds),
    }[case["rates"]]
    rates[0] = 1.0  # the largest rate is the alpha of u
    return objective, method, 10.0 ** case["distance"] * normal(case["seed"], case["n"]), alpha * rates


@family("agd.gradients", "agd.least-gradient", **AGD_SMOOTH)
def agd_smooth(lib: Any, case: Case) -> list[Check]:
    """A smooth function, convex or not, exact gradients."""
    objective, method, start, rates = agd_smooth_parts(lib, case)
    run = theory.record(method, online.repeated(objective, start, case["rounds"]), rates)
    return [theory.agd.gradients(run, objective), theory.agd.least_gradient(run, objective)]


@family("agd.gradients-noisy", **AGD_SMOOTH, sigma=Floats(-1, 1))
def agd_noisy(lib: Any, case: Case) -> list[Check]:
    """The same with independent noise of norm sigma, 100 replicas."""
    objective, method, start, rates = agd_smooth_parts(lib, case)
    n, sigma = case["n"], 10.0 ** case["sigma"]
    signs = generator(case["seed"], "signs").choice([-1.0, 1.0], (case["rounds"], 100, n))
    stream = online.repeated(
        objective, np.tile(start, (100, 1)), case["rounds"], lambda t: sigma / math.sqrt(n) * signs[t]
    )
    return [theory.agd.gradients_noisy(theory.record(method, stream, rates), objective, sigma)]


# ---- Sketchy --------------------------------------------------------------------------------------------------------


@family(
    "sketch.lower", "sketch.error", "sketch.mass", "sketch.growth", "sketch.trace", "sketch.eigenvalues", "sketch.rank",
    "sketch.exact", "sketch.low-rank", "sketch.root-trace",
    kind=online.ROWS, d=Ints(1, 6), count=Ints(1, 3), size=Ints(1, 7), rounds=Ints(1, 20), beta2=(1.0, 0.9, 0.5),
)  # fmt: skip
def sketch_stream(lib: Any, case: Case) -> list[Check]:
    """Frequent Directions on a stream of rows."""
    rows = online.rows(case["kind"], case["count"], case["d"], case["rounds"], case["seed"])
    s = theory.sketchy.record_sketch(rows, min(case["size"], case["d"] + 1), case["beta2"], lib=lib.fd)
    t = theory.sketchy
    return [
        each(s)
        for each in (
            t.lower, t.error, t.mass, t.growth, t.trace, t.eigenvalues, t.rank, t.exact, t.low_rank, t.root_trace
        )
    ]  # fmt: skip


@family(
    "nystrom.lower", "nystrom.error", "nystrom.growth", "nystrom.least", "nystrom.weyl", "nystrom.trace",
    "nystrom.mass", "nystrom.root-trace",
    kind=online.ROWS, d=Ints(8, 14), count=Ints(8, 14), size=Ints(1, 4), spare=Ints(1, 3), rounds=Ints(1, 8),
    beta2=(1.0, 0.9, 0.5),
)  # fmt: skip
def nystrom_stream(lib: Any, case: Case) -> list[Check]:
    """Certified sketches on a stream of rows, some of them by the exact decomposition."""
    rows = online.rows(case["kind"], case["count"], case["d"], case["rounds"], case["seed"])
    t = theory.sketchy
    s = t.record_certified(rows, case["size"], case["beta2"], spare=case["spare"], lib=lib.nystrom)
    return [
        each(s)
        for each in (
            t.certified_lower, t.certified_error, t.certified_growth, t.certified_least, t.weyl, t.certified_trace,
            t.certified_mass, t.certified_root_trace,
        )
    ]  # fmt: skip


@family(
    "sadagrad.quadratic", "sadagrad.regret-by-sketch", "sadagrad.regret", "sadagrad.theorem-3", "sadagrad.corollary-4",
    kind=tuple(online.ADVERSARIES), ball=(True, False), d=Ints(1, 6), size=Ints(1, 7), rounds=Ints(1, 30),
    eta=Floats(-2, 2), length=Floats(-2, 2), tuned=(True, True, True, False),
)  # fmt: skip
def sadagrad_online(lib: Any, case: Case) -> list[Check]:
    """In the unit ball (D = 2) or free; ``tuned``: eta = D / sqrt 2, by the rate or by the comparator."""
    d, t = case["d"], theory.sketchy
    stream = online.adversary(case["kind"], (d,), rounds=case["rounds"], seed=case["seed"], target=np.zeros(d))
    eta = math.sqrt(2) if case["tuned"] and case["ball"] else 2.0 ** case["eta"]
    project = t.project_to_ball(1.0) if case["ball"] else None
    method = lib.sketchy.SAdaGrad(size=min(case["size"], d + 1))
    run = theory.record(method, stream, eta, project=project)
    total = np.sum(run.gradients, axis=0)
    unit = -total / max(float(np.linalg.norm(total)), 1e-300)
    diameter = 2.0 if case["ball"] else None
    comparator = unit if case["ball"] else 2.0 ** case["length"] * unit
    if case["tuned"] and not case["ball"]:
        found = t.comparator_at_distance(run, eta * math.sqrt(2))
        comparator = comparator if found is None else found
    return [
        s(run, comparator, diameter)
        for s in (t.quadratic, t.regret_by_sketch, t.regret, t.theorem_3, t.corollary_4)
    ]  # fmt: skip


@family(
    "sshampoo.quadratic", "sshampoo.root-trace", "sshampoo.regret", "sshampoo.theorem-5",
    kind=tuple(k for k in online.ADVERSARIES if "preconditioned" not in k), m=Ints(1, 4), n=Ints(1, 4), rank=Ints(1, 3),
    size=Ints(1, 5), eps=(0.0, 1e-3, 1.0), rounds=Ints(1, 24), eta=Floats(-2, 2), length=Floats(-2, 2),
    tuned=(True, True, True, False),
)  # fmt: skip
def sshampoo_online(lib: Any, case: Case) -> list[Check]:
    """Gradients of rank at most r, free; ``tuned``: the comparator has distance eta sqrt(2 r)."""
    t = theory.sketchy
    return sshampoo_checks(
        lib, case, "svd", (t.sshampoo_quadratic, t.sshampoo_root_trace, t.sshampoo_regret, t.theorem_5)
    )


@family(
    "nystrom.quadratic", "nystrom.regret", "nystrom.theorem-5",
    kind=tuple(k for k in online.ADVERSARIES if "preconditioned" not in k), m=Ints(20, 22), n=Ints(20, 22),
    rank=Ints(1, 3),
    size=Ints(1, 2), eps=(0.0, 1e-3, 1.0), rounds=Ints(1, 24), eta=Floats(-2, 2), length=Floats(-2, 2), tuned=(True,),
)  # fmt: skip
def nystrom_online(lib: Any, case: Case) -> list[Check]:
    """The same with certified sketches, on matrices so large that these are not exact."""
    t = theory.sketchy
    return sshampoo_checks(lib, case, "nystrom", (t.certified_quadratic, t.certified_regret, t.certified_theorem_5))


def sshampoo_checks(lib: Any, case: Case, solver: str, statements: tuple[Any, ...]) -> list[Check]:
    """Of a run of S-Shampoo."""
    m, n, t = case["m"], case["n"], theory.sketchy
    rank, size = min(case["rank"], m, n), min(case["size"], max(m, n) + 1)
    narrow = online.adversary(
        case["kind"], (m, rank), rounds=case["rounds"], seed=case["seed"], target=np.zeros((m, rank))
    )
    frame = np.linalg.qr(normal(case["seed"], n, n))[0][:rank]
    stream = online.Stream(
        name=case["kind"],
        rounds=case["rounds"],
        start=np.zeros((m, n)),
        gradient=lambda i, x, s: narrow.gradient(i, x @ frame.T, s) @ frame,
    )
    eta = 2.0 ** case["eta"]
    run = theory.record(lib.sketchy.SShampoo(size=size, eps=case["eps"], solver=solver), stream, eta)
    total = np.sum(run.gradients, axis=0)
    comparator = -(2.0 ** case["length"]) * total / max(float(np.linalg.norm(total)), 1e-300)
    if case["tuned"]:
        found = t.comparator_at_distance(run, eta * math.sqrt(2 * rank))
        comparator = comparator if found is None else found
    return [s(run, comparator, rank) for s in statements]


# ---- root-free methods ----------------------------------------------------------------------------------------------


@family(
    "rf.step", "rf.constant", "rf.newton",
    n=Ints(1, 5), rounds=Ints(1, 30), beta2=Floats(0.001, 0.5), damping=Floats(-4, 1), batch=(1, 8, 128),
    scale=Floats(-3, 3), lr=Floats(0.1, 1.5), condition=Floats(0, 6),
)  # fmt: skip
def rf_diagonal(lib: Any, case: Case) -> list[Check]:
    """RF-RMSProp on random gradients, a constant one, and a quadratic with s at its curvature."""
    shape, rounds = (case["n"],), case["rounds"]
    method = lib.root_free.RFRMSProp(beta2=case["beta2"], damping=10.0 ** case["damping"], batch_size=case["batch"])
    runs = [
        theory.record(
            method, online.adversary(kind, shape, rounds=rounds, seed=case["seed"], scale=10.0 ** case["scale"]), 0.1
        )
        for kind in ("random", "constant")
    ]
    h = 10.0 ** np.linspace(0, case["condition"], case["n"])
    target = normal(case["seed"], case["n"])
    stream = online.Stream(
        name="quadratic",
        rounds=min(rounds, 20),
        start=0 * target,
        target=target,
        gradient=lambda t, x, s: h * (x - target),
    )
    newton = method.replace(damping=0.0, batch_size=1)
    at_curvature = theory.root_free.given_statistic(newton, np.sqrt(h)[None])

    def update(t: int, g: np.ndarray, state: Any, x: np.ndarray) -> Any:
        return at_curvature(t, g, state._replace(s=h), x)

    run = theory.record(newton, stream, case["lr"], update=update)
    first = run.states[0]._replace(s=h)
    run = theory.Run(**{**vars_of(run), "states": (first, *run.states[1:])})
    return [theory.root_free.step(runs[0]), theory.root_free.constant(runs[1]), theory.root_free.newton(run, h)]


def vars_of(run: Any) -> dict[str, Any]:
    return {name: getattr(run, name) for name in run.__dataclass_fields__}


@family(
    "rf.floor", "if.clip", "if.change", "if.descent",
    kind=("random", "constant", "growing", "shrinking", "cauchy", "cyclic basis"), m=Ints(2, 4), n=Ints(2, 4),
    rounds=Ints(1, 15), beta2=Floats(0.01, 0.5), damping=(0.0, 1e-3, 1.0), riemannian=(0.0, 0.5), kappa=(0.0, 0.125),
    scale=Floats(-3, 2),
)  # fmt: skip
def factors(lib: Any, case: Case) -> list[Check]:
    """RF-Shampoo and IF-Shampoo without momentum."""
    stream = online.adversary(
        case["kind"], (case["m"], case["n"]), rounds=case["rounds"], seed=case["seed"], scale=10.0 ** case["scale"],
        start=normal(case["seed"], case["m"], case["n"]),
    )  # fmt: skip
    fields = {
        "beta2": case["beta2"],
        "damping": case["damping"],
        "momentum": 0.0,
        "weight_decay": case["kappa"],
        "batch_size": 8,
    }
    with_inverse = theory.record(lib.root_free.RFShampoo(**fields), stream, 0.01)
    free = theory.record(lib.inverse_free.IFShampoo(**fields, riemannian_momentum=case["riemannian"]), stream, 0.01)
    t = theory.root_free
    return [t.floor(with_inverse), t.clip(free), t.change(free), t.descent(free)]


@family(
    "rf.stationary",
    free=(True, False), m=Ints(2, 4), n=Ints(2, 4), damping=Floats(-1, 1), batch=(1, 8), scale=Floats(-1, 0),
)  # fmt: skip
def factors_at_rest(lib: Any, case: Case) -> list[Check]:
    """RF-Shampoo or IF-Shampoo under a constant gradient until nothing moves."""
    stream = online.adversary(
        "constant", (case["m"], case["n"]), rounds=40, seed=case["seed"], scale=10.0 ** case["scale"]
    )
    fields = {"beta2": 0.5, "damping": 10.0 ** case["damping"], "momentum": 0.0, "batch_size": case["batch"]}
    if case["free"]:
        method = lib.inverse_free.IFShampoo(**fields, riemannian_momentum=0.0)
    else:
        method = lib.root_free.RFShampoo(**fields)
    return [theory.root_free.stationary(theory.record(method, stream, 0.0))]


# ---- MBF ------------------------------------------------------------------------------------------------------------


@family(
    "mbf.residual", "mbf.contraction", "mbf.floor",
    blocks=Ints(1, 5), samples=Ints(1, 6), size=Ints(1, 4), rounds=Ints(1, 20), damping=Floats(-2, 1),
    share=Floats(0.1, 1),
)  # fmt: skip
def mbf_linear(lib: Any, case: Case) -> list[Check]:
    """Outputs linear in the parameters; ``share`` of eta = 1 / B."""
    net = online.linear_blocks(case["blocks"], case["samples"], case["size"], case["seed"])
    eta = case["share"] / case["blocks"]
    run = theory.mbf.record_network(net, 10.0 ** case["damping"], eta, case["rounds"], lib=lib.mbf)
    return [theory.mbf.residual(run, net), theory.mbf.contraction(run, net), theory.mbf.floor(run, net)]


@family(
    "mbf.two-layer", "mbf.radius",
    neurons=(100, 200, 400), samples=Ints(1, 4), size=Ints(2, 8), rounds=Ints(1, 12), damping=Floats(-1, 0.5),
    residual=Floats(-3, -1), share=Floats(0.1, 1),
)  # fmt: skip
def mbf_network(lib: Any, case: Case) -> list[Check]:
    """A wide two-layer network with lambda = c / m."""
    net = online.two_layer(case["neurons"], case["samples"], case["size"], case["seed"], 10.0 ** case["residual"])
    m = case["neurons"]
    run = theory.mbf.record_network(net, 10.0 ** case["damping"] / m, case["share"] / m, case["rounds"], lib=lib.mbf)
    return [theory.mbf.two_layer(run, net), theory.mbf.radius(run, net)]


@family(
    "mbf.descent", "mbf.descent-by-gradient", "mbf.linear-rate",
    samples=Ints(1, 20), size=Ints(1, 4), rounds=Ints(1, 20), damping=Floats(-2, 1), ridge=Floats(-2, 0),
    decay=(0.0, 0.5, 0.9), statistics=Ints(1, 3), inverse=Ints(1, 5), share=Floats(0.1, 1), distance=Floats(-1, 1),
)  # fmt: skip
def mbf_descent(lib: Any, case: Case) -> list[Check]:
    """Regularised logistic regression with stale statistics and inverses; ``share`` of alpha = lambda / L."""
    ridge, damping = 10.0 ** case["ridge"], 10.0 ** case["damping"]
    objective, per_sample = online.regularised_logistic(case["samples"], case["size"], case["seed"], ridge)
    method = lib.mbf.MBF(
        damping=damping,
        decay=case["decay"],
        momentum=0.0,
        statistics_every=case["statistics"],
        inverse_every=case["inverse"],
    )
    start = 10.0 ** case["distance"] * normal(case["seed"], 1, case["size"])
    stream = online.Stream(
        name="logistic", rounds=case["rounds"], start=start, gradient=lambda t, w, s: objective.gradient(w[0])[None]
    )

    def update(t: int, g: np.ndarray, state: Any, w: np.ndarray) -> Any:
        return method.update(g, state, w, statistic=lib.mbf.MBFSamples(per_sample(w[0])[:, None]))

    run = theory.record(method, stream, case["share"] * damping / objective.curvature, update=update)
    t = theory.mbf
    return [s(run, objective, per_sample, ridge) for s in (t.descent, t.descent_by_gradient, t.linear_rate)]


# ---- the search -----------------------------------------------------------------------------------------------------


class Violation(AssertionError):
    """A counterexample."""

    def __init__(self, name: str, case: Case, check: Check) -> None:
        super().__init__(
            f"{check.statement} is violated: left {check.left!r} > right {check.right!r} (ratio {check.ratio:.6g})\n"
            f"    play({name!r}, {dict(case)})\n    symbols: {dict(check.symbols)}"
        )


def search(name: str, examples: int, seed: int | None = None, lib: Any = REAL) -> dict[str, Any]:
    """Let Hypothesis look for violations; the worst instance and the number of instances of each statement.

    ``seed=None`` is the same search always. Raises `Violation` with the smallest counterexample.
    """
    found: dict[str, Any] = {s: {"ratio": -math.inf, "instances": 0, "case": None} for s in FAMILIES[name].statements}

    def look(case: dict[str, Any]) -> None:
        for statement, check in play(name, case, lib).items():
            entry = found[statement]
            entry["instances"] += 1
            if check.ratio > entry["ratio"]:
                entry.update(ratio=check.ratio, case=case)
            if math.isfinite(check.ratio):
                hypothesis.target(check.ratio, label=statement)
            if not check.holds:
                raise Violation(name, case, check)

    test = hypothesis.settings(
        max_examples=examples,
        derandomize=seed is None,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.target, hypothesis.Phase.shrink),
    )(hypothesis.given(strategy(FAMILIES[name].fields))(look))
    (test if seed is None else hypothesis.seed(seed)(test))()
    return found


def merge(new: Mapping[str, Any], name: str, path: Path = WORST) -> None:
    """Record worst instances that are worse than those known, and how many were searched."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for statement, entry in new.items():
        old = known.get(statement, {"ratio": -math.inf, "instances": 0})
        best = entry if entry["ratio"] > old["ratio"] else old
        known[statement] = {
            "family": name,
            "ratio": best["ratio"],
            "instances": max(entry["instances"], old["instances"]),
            "case": best["case"],
        }
    ordered = {s: known[s] for s in theory.list_statements() if s in known}
    path.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--examples", type=int, help="default: so many that each statement applies to 10000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, default=WORST, help="the file of worst instances")
    options = parser.parse_args(arguments)
    if unknown := set(options.families) - FAMILIES.keys():
        parser.error(f"there is no family {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    for name in options.families or FAMILIES:
        found = search(name, options.examples or EXAMPLES.get(name, 10_500), seed=options.seed)
        merge(found, name, options.record)
        for statement, entry in found.items():
            print(f"{statement:28} {entry['instances']:7} instances, largest ratio {entry['ratio']:.6f}", flush=True)


if __name__ == "__main__":
    main()
