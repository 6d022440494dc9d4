"""The named variants: without flags they are the vectors, every flag can be seen, and some are known methods."""

import dataclasses
import math
from functools import cache

import numpy as np
import pytest
from mutation import mutated

import precond_ref as pr
from precond_ref.conformance import generated, variants
from precond_ref.conformance.tolerance import of_case
from precond_ref.conformance.vectors import cases, load
from precond_ref.methods import adafactor, baselines, inverse_free, mbf, root_free, shampoo, sketchy

TRACES = cases(kind="trace")
SOME = [pytest.param(case, marks=pytest.mark.full if case.deep else (), id=case.id) for case in TRACES]
CLASSES = tuple(variants.registry())
SEEN = 1e-6  # a flag changes at least one case by more
SAME = {("eps-ignored", "polar-express")}  # iterations that converge to the root without eps


def by_id(case):
    return case.id


@cache
def tensors(case_id):
    (case,) = (c for c in TRACES if c.id == case_id)
    return load(case)


def run(case, *flags, method=None):
    given = tensors(case.id)
    method = case.make() if method is None else method
    return variants.run(method, given["param"], given["grads"], lr=case.rates, decay=case.decay,
                        stack_ndim=case.stack_ndim, flags=frozenset(flags))  # fmt: skip


def distance(got, want):
    """Largest relative distance over the steps; infinite where only one is finite."""
    if not np.array_equal(np.isfinite(got), np.isfinite(want)):
        return math.inf
    got, want = (np.nan_to_num(x).reshape(len(x), -1) for x in (got, want))
    size = np.linalg.norm(want, axis=1)
    with np.errstate(over="ignore"):
        return np.max(np.linalg.norm(got - want, axis=1) / np.where(size > 0, size, 1))


def stored(case, values):
    """What the vectors have of a result after every step."""
    return np.stack([generated.folded(np.asarray(values[t - 1]), case.fold) for t in case.stored])


def departure(case, *flags):
    """How far the directions or parameters of a variant are from the truth."""
    trace, want = run(case, *flags), tensors(case.id)
    pairs = (trace.directions, want["directions"]), (trace.params, want["params"])
    return max(distance(stored(case, got), true) for got, true in pairs)


def cases_of(name):
    return [case for case in TRACES if case.make().name == name and not case.deep]


def test_every_method_with_vectors_has_variants():
    assert {case.make().name for case in TRACES} <= set(CLASSES)


@pytest.mark.parametrize("case", SOME)
def test_without_flags_it_is_the_truth(case):
    trace, want = run(case), tensors(case.id)
    states = {name.removeprefix("state.") for name in want if name.startswith("state.")}
    allowed = max(1e-12, *(of_case(case, "float64", t) for t in case.stored))
    assert departure(case) <= allowed
    assert states <= trace.states[0].keys()
    for name in states:
        assert distance(stored(case, [s[name] for s in trace.states]), want[f"state.{name}"]) <= allowed, name


def check_flags_differ(name, run=run):
    """From none and from each other: those that no case has parted so far run on the next."""
    together = [("", *variants.registry()[name].flags)]
    for case in cases_of(name):
        parted = []
        for flags in together:
            alike = []
            for flag in flags:
                trace = run(case, *filter(None, [flag]))
                for group, first in alike:
                    if not (
                        distance(trace.params, first.params) > SEEN
                        or distance(trace.directions, first.directions) > SEEN
                    ):
                        group.append(flag)
                        break
                else:
                    alike.append(([flag], trace))
            parted += [tuple(group) for group, _ in alike if len(group) > 1]
        together = parted
    assert {*together} <= SAME


@pytest.mark.parametrize(
    "name", ["SGD", *(pytest.param(name, marks=pytest.mark.full) for name in CLASSES if name != "SGD")]
)
def test_every_flag_is_seen_and_no_two_are_the_same(name):
    check_flags_differ(name)


@pytest.mark.parametrize("instead", [(), ("momentum-ignored",)], ids=["of none", "of another"])
def test_planted_flag_with_the_effect(instead):
    def exchanged(case, *flags):
        return run(case, *(instead if "momentum-ema" in flags else flags))

    with pytest.raises(AssertionError):
        check_flags_differ("SGD", exchanged)


@pytest.mark.parametrize("name", CLASSES)
def test_texts_make_sentences(name):
    for flag, text in variants.registry()[name].flags.items():
        assert text.startswith(("with ", "without ")), flag
        assert not text.endswith("."), flag


@pytest.mark.parametrize("case", [c for c in TRACES if c.catches], ids=by_id)
def test_a_case_catches_what_it_says(case):
    known = {*variants.of(case.make()).flags, *variants.COMMON}
    assert set(case.catches) <= known
    assert [flag for flag in case.catches if not departure(case, flag) > SEEN] == []


# ---- flags that are another configuration, or the library with a line exchanged ------------------------------------

S, RF, IF, M = "SShampoo/", "RFShampoo/", "IFShampoo/", "MBF/"
OTHER_CONFIGURATIONS = [
    ("SAdaGrad/average", "size-plus-one", {"size": 3}),
    ("SAdaGrad/sum", "size-minus-one", {"size": 2}),
    ("SAdaGrad/delta", "delta-ignored", {"delta": 0.0}),
    ("SAdaGrad/delta", "delta-squared", {"delta": 0.25}),
    (S + "average", "tail-sqrt", {"tail_decay": 0.75**0.5}),
    (S + "average", "tail-kept", {"tail_decay": 1.0}),
    (S + "average", "mass-last", {"tail_decay": 0.0}),
    (S + "average", "eps-ignored", {"eps": 0.0}),
    (S + "average", "eps-relative", {"relative_eps": True}),
    (S + "relative-eps", "eps-absolute", {"relative_eps": False}),
    (S + "every", "every-ignored", {"every": 1}),
    (S + "tail-decay", "tail-decay-ignored", {"tail_decay": None}),
    (S + "practical", "tail-sqrt", {"tail_decay": 0.75**0.5}),
    (S + "practical", "graft-ignored", {"graft": None}),
    (S + "practical", "graft-sgd", {"graft": "sgd"}),
    (S + "practical", "nesterov-ignored", {"nesterov": False}),
    (S + "practical", "ema-always", {"momentum_ema": True}),
    (S + "practical-start", "start-late", {"start": 3}),
    (S + "practical-start", "start-early", {"start": 1}),
    (S + "practical-decay-after", "kappa-inside", {"decay_after_momentum": False}),
    (S + "practical-decay-after", "kappa-ignored", {"weight_decay": 0.0}),
    (S + "practical-merge", "merge-ignored", {"merge": 1}),
    (S + "practical-merge", "merge-below", {"merge": 5}),
    ("AdaFD/sum", "delta-ignored", {"delta": 0.0}),
    ("Muon/quintic", "eps-thousandth", {"eps": 1e-3}),
    ("Muon/quintic", "coefficient-off", {"coefficients": (3.4445, -4.7750, 2.0316)}),
    ("FDSON/sum", "size-plus-one", {"size": 4}),
    ("RFDSON/sum", "delta-ignored", {"delta": 0.0}),
    ("RFRMSProp/initial", "initial-one", {"initial": 1.0}),
    ("RFRMSProp/plain", "initial-times-batch", {"initial": 4.0}),
    ("RFRMSProp/plain", "batch-squared", {"batch_size": 16.0}),
    ("RFRMSProp/plain", "damping-ignored", {"damping": 0.0}),
    ("RFRMSProp/momentum", "momentum-ignored", {"momentum": 0.0}),
    ("RFAdamW/plain", "betas-swapped", {"beta1": 0.875, "beta2": 0.75}),
    ("RFAdamW/plain", "weights-swapped", {"beta2": 0.125}),
    ("RFAdamW/corrected", "correction-ignored", {"bias_correction": False}),
    (RF + "matrix", "batch-ignored", {"batch_size": 1.0}),
    (RF + "matrix", "damping-ignored", {"damping": 0.0}),
    (RF + "every", "every-ignored", {"every": 1}),
    (RF + "weight-decay", "kappa-ignored", {"weight_decay": 0.0}),
    (IF + "dense", "batch-squared", {"batch_size": 4.0}),
    (IF + "dense", "riemannian-ignored", {"riemannian_momentum": 0.0}),
    (IF + "dense", "clip-ignored", {"clip": False}),
    (IF + "unclipped", "clip-always", {"clip": True}),
    (IF + "tril", "structure-dense", {"structure": "dense"}),
    (IF + "tril", "structure-mirrored", {"structure": "triu"}),
    (IF + "per-axis", "structure-first", {"structure": "diagonal"}),
    (M + "per-output", "layout-per-input", {"layout": "per_input"}),
    (M + "per-input", "layout-contiguous", {"layout": "contiguous"}),
    (M + "contiguous", "layout-per-output", {"layout": "per_output"}),
    (M + "per-output", "average-ignored", {"average": False}),
    (M + "per-output-blocks", "average-always", {"average": True}),
    (M + "per-output", "weights-swapped", {"decay": 0.25}),
    (M + "per-output", "momentum-ignored", {"momentum": 0.0}),
    (M + "schedule", "statistics-every-update", {"statistics_every": 1}),
]


def reference(case, method):
    """Directions and parameters of the library."""
    given = tensors(case.id)
    param, directions, params = given["param"], [], []
    state = method.init(param, stack_ndim=case.stack_ndim)
    for grad in given["grads"]:
        direction, state = method.update(grad, state, param)
        param = (1 - case.lr * case.decay) * param - case.lr * direction
        directions.append(direction)
        params.append(param)
    return np.stack(directions), np.stack(params)


@pytest.mark.filterwarnings("ignore:beta2 of")
@pytest.mark.parametrize(("case_id", "flag", "changes"), OTHER_CONFIGURATIONS, ids=lambda v: str(v))
def test_flag_is_another_configuration(case_id, flag, changes):
    (case,) = (c for c in TRACES if c.id == case_id)
    directions, params = reference(case, case.make().replace(**changes))
    trace = run(case, flag)
    assert distance(trace.directions, directions) <= 1e-11
    assert distance(trace.params, params) <= 1e-11
    assert departure(case, flag) > SEEN


EXCHANGED = [
    (sketchy, S + "sum", "exponent-double", [("exponent = -0.5 / len(dims)", "exponent = -1.0 / len(dims)")]),
    (sketchy, "SAdaGrad/sum", "exponent-quarter", [("*sketch, -0.5, grad", "*sketch, -0.25, grad")]),
    (
        sketchy,
        "SAdaGrad/average",
        "mass-half",
        [("apply_power(*sketch,", "apply_power(*sketch._replace(escaped=sketch.escaped / 2),")],
    ),
    (sketchy, S + "practical", "graft-eps-outside", [("xp.sqrt(v + self.graft_eps)", "(xp.sqrt(v) + self.graft_eps)")]),
    (
        root_free,
        "RFRMSProp/plain",
        "root",
        [("quotient(g, s + self.damping, xp, bound=self.damping)", "g / (xp.sqrt(s) + self.damping)")],
    ),
    (
        root_free,
        "RFAdamW/corrected",
        "correction-inflates",
        [("0.0 if self.bias_correction else self.initial", "self.initial")],
    ),
    (root_free, RF + "matrix", "share-missing", [(" * (dims[n] / math.prod(dims))", "")]),
    (
        root_free,
        RF + "matrix",
        "momentum-ema",
        [
            (
                "u, self.momentum)  # (3)\n        return direction,",
                "(1 - self.momentum) * u, self.momentum)\n        return direction,",
            )
        ],
    ),
    (inverse_free, IF + "dense", "factor-dropped", [("(k @ unit)", "unit")]),
    (inverse_free, IF + "dense", "factor-right", [("(k @ unit)", "(unit @ k)")]),
    (inverse_free, IF + "dense", "no-transpose", [("p = multiply(p, t(k, xp), n, xp)", "p = multiply(p, k, n, xp)")]),
    # singd 0.0.5 takes blocks to be symmetric: its rmatmat and from_inner have K for K^T
    (
        inverse_free,
        IF + "block-diagonal",
        "blocks-transposed",
        [
            ("p = multiply(p, t(k, xp), n, xp)", "p = multiply(p, k, n, xp)"),
            ("grams = [gram_of(t(k, xp), xp) for k in scaled]", "grams = [gram_of(k, xp) for k in scaled]"),
            ("multiply(u, t(small, xp), n, xp), small", "multiply(u, small, n, xp), small"),
        ],
    ),
    (
        mbf,
        M + "per-output",
        "root",
        [("roots.solve(f, columns, self.damping, own, xp=xp)", "roots.power(f, -0.5, self.damping, xp=xp) @ columns")],
    ),
    (mbf, M + "schedule", "early-inverses-missing", [("((step <= t2) & statistics) | (step", "(step")]),
    (baselines, "Adam/form-nadam-scheduled", "nadam-product",
     [("_scheduled(beta1, psi, step, like)\n", "_scheduled(beta1, psi, step, like, product=False)\n")]),
    (shampoo, "Shampoo/production-sum", "sum-weighted",
     [("else accumulate(old, new, self.beta2)", "else self.beta2 * old + (1 - self.beta2) * new")]),
    (shampoo, "Shampoo/production-adam-graft", "start-applied",
     [("                p = _mixed(now.k.preconditioned, p, parts[2])\n", "")]),
    (adafactor, "Adafactor/weight-decay", "scale-after-decay",
     [("  # (7)\n        late", "\n        held, x2 = scale, x * (1 - 0.34375 * self.weight_decay * scale)\n"
       "        scale = clamp(_rms(x2, now.stack, xp), self.eps2, xp=xp)\n        late"),
      ("self.weight_decay * scale * x", "self.weight_decay * held * x")]),
    (mbf, M + "diagonal", "square-of-gradient", [("statistic, n * n, D", "statistic, grad * grad, D")]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "case_id", "flag", "changes"), EXCHANGED, ids=[f"{e[1]}: {e[2]}" for e in EXCHANGED]
)
def test_flag_is_the_library_with_a_line_exchanged(module, case_id, flag, changes):
    (case,) = (c for c in TRACES if c.id == case_id)
    copy, method = mutated(module, *changes), case.make()
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    directions, params = reference(case, getattr(copy, type(method).__name__)(**fields))
    trace = run(case, flag)
    assert distance(trace.directions, directions) <= 1e-11
    assert distance(trace.params, params) <= 1e-11
    assert departure(case, flag) > SEEN


def rates_outside_and_inside(case, first, **unaveraged):
    """Parameters of steps with weight decay times ``first`` (None: the current rate), and an average of whole steps."""
    method, given = case.make(), tensors(case.id)
    beta = getattr(method, "momentum", 0.0) or getattr(method, "beta1", 0.0)
    weight = 1 - beta if method.name == "Adafactor" else 1
    method = method.replace(**unaveraged)
    param, ball, params = given["param"], 0.0, []
    state = method.init(param)
    for grad, rate in zip(given["grads"], case.rates, strict=True):
        direction, state = method.update(grad, state, param)
        step = rate * direction
        if unaveraged:
            ball = step = beta * ball + weight * step
        param = (1 - (rate if first is None else first) * case.decay) * param - step
        params.append(param)
    return np.stack(params)


@pytest.mark.parametrize(
    ("case_id", "flag", "unaveraged"),
    [
        ("SGD/changing-rate", "rate-inside", {"momentum": 0.0}),
        ("RMSProp/changing-rate", "rate-inside", {"momentum": 0.0}),
        ("Adafactor/rates", "rate-inside", {"beta1": 0.0}),
        ("Adam/changing-rate", "decay-first-rate", {}),
        ("Muon/rates", "decay-first-rate", {}),
    ],
)
def test_flag_is_another_place_of_the_rate(case_id, flag, unaveraged):
    (case,) = (c for c in TRACES if c.id == case_id)
    first = case.rates[0] if flag == "decay-first-rate" else None
    assert distance(run(case, flag).params, rates_outside_and_inside(case, first, **unaveraged)) <= 1e-11
    assert departure(case, flag) > SEEN


def test_unknown_flag_is_refused():
    with pytest.raises(KeyError, match="SAdaGrad has no variant no-such-flag"):
        variants.run(pr.SAdaGrad(size=2), np.zeros(3), np.ones((1, 3)), lr=1.0, flags=frozenset({"no-such-flag"}))
