"""Shampoo as run in production, and EShampoo, whose shapes leave no eigenspace of dimension above 1 (see `soap`)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from precond_ref.conformance.declarations.base import integers, maker

LR = 11 / 32
SHARED = {
    "beta1": 25 / 32,
    "beta3": 20 / 32,
    "beta2": 29 / 32,
    "eps": 5 / 32,
    "every": 2,
    "start": None,
    "bias_correction": True,
    "drop_weight": False,
    "graft": None,
    "graft_beta2": 22 / 32,
    "graft_eps": 3 / 64,
    "momentum": 0.0,
    "dampening": 0.0,
    "nesterov": False,
    "weight_decay": 0.0,
    "decay_form": "decoupled",
    "max_dim": 64,
    "target": None,
}
GRAFT = {"graft": "adam", "start": 3}
LAST = {"momentum": 18 / 32, "dampening": 8 / 32, "weight_decay": 13 / 32}
ZEROS = integers(150, (5, 4, 3))
ZEROS[[0, 3]] = 0

PRODUCTION = {**SHARED, "exponents": (), "trace_scaling": 0.0, "root": "eigh", "root_steps": 12}
CORRECTED = {**SHARED, "exponent": 0.5, "basis": "eigh", "tolerance": 0.0, "iterations": 1, "ignored_axes": ()}

_case, reject = maker("Shampoo", PRODUCTION, (4, 3), "Shampoo.production")
case = partial(_case, lr=LR)
SHAMPOO = [
    case("matrix", "A filtered gradient with a look-ahead; roots at updates 2, 4, 6.",
         "statistic-of-filtered statistic-frozen refresh-at-first refresh-always correction-ignored weight-missing "
         "filter-ignored filter-usual filter-late beta3-ignored eps-ignored eps-early eps-outside exponent-half "
         "exponent-order", seed=101, steps=7),
    case("sum", "A sum of statistics, roots at every update, no look-ahead.", "statistic-of-filtered eps-ignored",
         seed=102, change={"beta2": 1.0, "beta3": None, "every": 1, "eps": 4 / 32}),
    case("unfiltered", "beta1 = 0: the gradient itself, whatever beta3 is.", seed=103, change={"beta1": 0.0}),
    case("start", "The first roots at update 3, then at multiples of 2.", "refresh-at-first refresh-always", seed=104,
         steps=6, change={"start": 3}),
    case("uncorrected", "No bias corrections.", "correction-always", seed=105, change={"bias_correction": False}),
    case("drop-weight", "New statistics have weight 1, and are not corrected.",
         "drop-weight-ignored drop-weight-corrected", seed=106, change={"drop_weight": True}),
    case("exponents", "An exponent for each axis; 0 leaves it alone.", "exponents-ignored exponent-zero-applied",
         seed=107, change={"exponents": (0.375, 0.0)}),
    case("trace", "Statistics divided by a power of their trace.", "trace-late trace-ignored", seed=108,
         change={"trace_scaling": 15 / 32}, tier="should"),
    case("adam-graft", "Adam's norm, and Adam's step before the first roots.",
         "graft-ignored graft-of-gradient graft-uncorrected graft-summed graft-eps-inside start-ungrafted", seed=109,
         steps=6, change=GRAFT),
    case("adam-graft-uncorrected", "The graft's correction does not depend on bias_correction.",
         "graft-tied correction-always", seed=110, steps=6, change={**GRAFT, "bias_correction": False}),
    case("rmsprop-graft", "RMSProp's norm, which is not corrected.", "graft-corrected", seed=111, steps=6,
         change={**GRAFT, "graft": "rmsprop", "graft_beta2": 24 / 32, "graft_eps": 5 / 64}),
    case("adagrad-graft", "AdaGrad's norm.", "graft-ignored start-ungrafted", seed=112, steps=6,
         change={**GRAFT, "graft": "adagrad"}),
    case("sgd-graft", "The filtered gradient's norm.", "graft-ignored graft-of-gradient", seed=113, steps=6,
         change={**GRAFT, "graft": "sgd"}),
    case("momentum", "Momentum and decay of the grafted step.",
         "alpha-after alpha-ignored alpha-coupled momentum-before momentum-ignored dampening-ignored", seed=114,
         steps=6, change={**GRAFT, **LAST}),
    case("nesterov", "Nesterov's form.", "nesterov-ignored nesterov-of-gradient dampening-once", seed=115,
         change={**LAST, "nesterov": True}),
    case("l2", "Decay joins the gradient, also that of the statistics.", "alpha-ignored l2-unseen", seed=116,
         change={"weight_decay": 13 / 32, "decay_form": "l2"}),
    case("vector", "One axis: exponent 1/2.", "exponent-order", shape=(5,), seed=117),
    case("order-three", "Three axes: exponent 1/6.", "exponent-half exponent-order", shape=(3, 4, 2), seed=118),
    case("merged", "Axes merge from the right, to two; the exponent counts what is left.",
         "exponent-unmerged merge-from-the-left target-ignored merge-ignored", shape=(4, 3, 2, 2), seed=119,
         change={"target": 2, "max_dim": 64}),
    case("merged-ones", "Axes of size 1 go.", "ones-kept", shape=(3, 1, 4), seed=120,
         change={"target": 3, "max_dim": 4}),
    case("blocks", "Blocks of 3, the last one shorter, with statistics and norms of their own.",
         "graft-whole short-blocks-dropped blocks-ignored", shape=(5, 4), seed=121, steps=6,
         change={**GRAFT, "max_dim": 3}),
    case("coupled-newton", "Twelve coupled Newton iterations.", seed=122, change={"root": "coupled_newton"},
         tier="may"),
    case("higher-order", "Ten iterations of third order.", seed=123,
         change={"root": "higher_order", "exponents": (0.375, None), "root_steps": 10}, tier="may"),
    case("zeros", "Zero gradients first and in between.", seed=124, grads=ZEROS, change=GRAFT),
    case("stack", "Stacked matrices do not see each other.", shape=(2, 3, 2), seed=125, stack_ndim=1, tier="should",
         change=GRAFT),
    reject("production-start", "The first roots are not before update every.", "start", start=1),
    reject("production-nesterov", "Nesterov's form without momentum.", "nesterov", nesterov=True),
    reject("production-exponents", "A negative exponent.", "exponents", exponents=(-0.25,)),
]  # fmt: skip

_case, reject = maker("EShampoo", CORRECTED, (4, 3))
case = partial(_case, lr=LR)
ESHAMPOO = [
    case("matrix", "Bases of eigenvectors at updates 2, 4, 6; Adam in them.",
         "statistic-frozen refresh-at-first refresh-always correction-ignored weight-missing filter-ignored "
         "filter-usual filter-late beta3-ignored eps-inside eps-ignored d-late d-old-basis d-rotated d-uncorrected "
         "d-permuted descending", seed=131, steps=7),
    case("sum", "Sums.", "d-late", shape=(3, 3), seed=132,
         change={"beta2": 1.0, "beta3": None, "every": 1, "eps": 4 / 32}),
    case("filtered", "Statistics and D see the gradient, not what is filtered.", "statistic-of-filtered", seed=133,
         change={"every": 1}),
    case("drop-weight", "New terms have weight 1, and are not corrected.",
         "drop-weight-ignored drop-weight-corrected", seed=134, change={"drop_weight": True}),
    case("uncorrected", "No bias corrections.", "correction-always", seed=212,
         change={"bias_correction": False, "beta1": 26 / 32}),
    case("exponent", "Another power of D.", "exponent-ignored", seed=136, change={"exponent": 15 / 32}),
    case("start", "Adam up to the first bases, at update 3.", "refresh-at-first", seed=137, change={"start": 3}),
    case("qr", "Rounds of orthogonal iteration in descending order, with which D is permuted.",
         "d-kept exact one-round", seed=207, steps=7, change={"basis": "qr", "iterations": 2, "every": 1}),
    case("qr-meta", "Rounds of QR, then the columns in ascending order; D stays.", "descending exact one-round",
         seed=139, steps=6, change={"basis": "qr_meta", "iterations": 2}, tier="should"),
    case("tolerance", "Bases that are near enough stay.", "tolerance-ignored tolerance-new", seed=140, steps=8,
         change={"tolerance": 9 / 32, "every": 1}),
    case("ignored", "An axis without a basis.", "ignored-used", shape=(5, 3), seed=141, change={"ignored_axes": (0,)}),
    case("all-ignored", "No axis has a basis: Adam.", "ignored-used", seed=142, change={"ignored_axes": (0, 1)}),
    case("graft", "Adam's norm, and Adam's step before the first bases.",
         "graft-ignored graft-of-gradient graft-uncorrected graft-summed graft-eps-inside start-ungrafted", seed=143,
         steps=6, change=GRAFT),
    case("graft-uncorrected", "The graft's correction does not depend on bias_correction.", "graft-tied", seed=144,
         steps=6, change={**GRAFT, "bias_correction": False}),
    case("rmsprop-graft", "RMSProp's norm, which is not corrected.", "graft-corrected", seed=145, steps=6,
         change={**GRAFT, "graft": "rmsprop", "graft_beta2": 24 / 32, "graft_eps": 5 / 64}, tier="should"),
    case("momentum", "Momentum and decay of the step.",
         "alpha-after alpha-ignored alpha-coupled momentum-before momentum-ignored dampening-ignored", seed=146,
         steps=6, change=LAST),
    case("nesterov", "Nesterov's form.", "nesterov-ignored nesterov-of-gradient dampening-once", seed=147,
         change={**LAST, "nesterov": True}),
    case("l2", "Decay joins the gradient, also that of the statistics.", "alpha-ignored l2-unseen", seed=148,
         change={"weight_decay": 13 / 32, "decay_form": "l2"}),
    case("merged", "Axes merge from the right, to three.",
         "merge-from-the-left target-ignored merge-ignored", shape=(4, 3, 2, 2), seed=149,
         change={"target": 3, "max_dim": 12}),
    case("blocks", "Blocks of 3, the last one shorter, with bases and norms of their own.",
         "graft-whole short-blocks-dropped blocks-ignored", shape=(5, 3), seed=152, steps=6,
         change={**GRAFT, "max_dim": 3}),
    case("stack", "Stacked matrices do not see each other.", shape=(2, 3, 2), seed=153, stack_ndim=1, tier="should"),
    reject("eps", "eps is above 0.", "eps", eps=0.0),
    reject("start", "The first bases are not before update every.", "start", start=1),
    reject("tolerance", "A relative part is at most 1.", "tolerance", tolerance=1.5),
    reject("basis", "The bases that there are.", "basis", basis="svd"),
]  # fmt: skip

CASES = [replace(c, name=f"production-{c.name}" if c.kind == "trace" else c.name, version=2) for c in SHAMPOO]
CASES += [replace(c, version=2) for c in ESHAMPOO]
