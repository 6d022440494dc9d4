"""SOAP. Shapes and gradients are such that no statistic has a multiple eigenvalue, so that a run is determined.

An m x n matrix has simple eigenvalues at the first update for ``|m - n| <= 1`` only. Within the null space of a longer
axis each eigensolver has a basis of its own.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from precond_ref.conformance.declarations.base import DECAY, integers, maker

LR = 11 / 32

FIELDS = {
    "beta1": 25 / 32,
    "beta2": 29 / 32,
    "shampoo_beta": 22 / 32,
    "eps": 5 / 32,
    "eps_position": "uncorrected",
    "every": 2,
    "max_dim": 64,
    "merge": False,
    "channels_last": False,
    "vectors": False,
    "normalize": False,
    "normalize_eps": 3 / 64,
    "bias_correction": True,
    "basis": "qr",
    "order": "use_first",
    "sort": "before",
    "second_moment": "permute",
    "iterations": 1,
    "nesterov": False,
}
_case, reject = maker("SOAP", FIELDS, (4, 3))
case = partial(_case, lr=LR)
ONE = {"shampoo_beta": None}
ZERO_FIRST = integers(21, (5, 4, 3))
ZERO_FIRST[0] = 0

CASES = [
    case("matrix", "The authors' form: the first gradient makes the bases only, they are renewed at updates 3 and 5.",
         "v-kept v-inverse v-rotated v-reset ascending unsorted rayleigh-stale exact two-rounds renewed-first "
         "renewed-always renewed-at-multiples renewed-at-second first-used correction-late correction-ignored "
         "eps-inside eps-corrected eps-ignored m-left-behind m-ignored back-transposed betas-swapped "
         "shampoo-beta-ignored shampoo-beta-for-v statistic-of-m statistic-frozen sort-late",
         seed=9, steps=7),
    case("square", "Both axes have the same size.", "v-other-axis v-kept", shape=(3, 3), seed=2, steps=6,
         change={"beta2": 30 / 32}),
    case("wide", "More columns than rows; L decays by beta2; the bases are renewed at each update.",
         "back-transposed exact", shape=(3, 4), seed=3,
         change={"shampoo_beta": None, "every": 1, "beta1": 26 / 32}),
    case("one-beta", "L decays by beta2, which has no decay of its own.", "exact v-kept first-used renewed-always",
         seed=40, steps=7, change=ONE),
    case("one-beta-decay", "The same with decoupled weight decay.", DECAY, shape=(3, 2), seed=29, decay=13 / 32,
         change=ONE),
    case("one-beta-order-three", "The same for three axes.", shape=(2, 3, 4), seed=30, change=ONE),
    case("one-beta-vector", "The same for a vector, which has no basis.", "vectors-preconditioned", shape=(2,), seed=31,
         change=ONE),
    case("two-rounds", "Two rounds of orthogonal iteration in a renewal.", seed=4, change={"iterations": 2}),
    case("eigenvectors", "Eigenvectors at each renewal; the second moment is sorted.", "v-kept", seed=5,
         change={"basis": "eigh"}),
    case("sorted-after", "The columns are sorted after the QR.", "sort-early", seed=6, change={"sort": "after"},
         tier="should"),
    case("kept", "The second moment stays in its slots.", seed=213, steps=6,
         change={"second_moment": "keep", "sort": "after"}, tier="should"),
    case("rotated", "The second moment is rotated by the squares of Q_new^T Q_old.", seed=8,
         change={"second_moment": "rotate"}, tier="should"),
    case("update-first", "The statistics and bases are renewed before they are used; no update is skipped.", seed=9,
         change={"order": "update_first", "every": 3}),
    case("nvidia", "As in NVIDIA's Emerging-Optimizers: renewed at each update and then used, V kept in its slots.",
         "eps-uncorrected", seed=214, steps=6,
         change={"order": "update_first", "every": 1, "sort": "after", "second_moment": "keep",
                 "eps_position": "corrected"}, tier="should"),
    case("corrected-eps", "eps joins the root of the corrected second moment.", "eps-uncorrected", seed=10,
         change={"eps_position": "corrected"}),
    case("largest-eps", "eps is the least denominator.", "eps-added", seed=11,
         change={"eps_position": "max", "eps": 37 / 32}),
    case("uncorrected", "No bias corrections.", "correction-always", seed=12, change={"bias_correction": False}),
    case("nesterov", "A look ahead with the current gradient.", "nesterov-ignored nesterov-same", seed=13,
         change={"nesterov": True}, tier="should"),
    case("nesterov-uncorrected", "The same without bias corrections.", "nesterov-ignored correction-always", seed=26,
         change={"nesterov": True, "bias_correction": False}, tier="should"),
    case("normalized", "The update is divided by its root mean square, before the bias correction.",
         "normalize-ignored normalize-last normalize-gradient", seed=14,
         change={"normalize": True, "normalize_eps": 5 / 64}),
    case("one-side", "An axis longer than max_dim has no basis.",
         "long-axes-preconditioned long-axes-end-all", shape=(5, 3), seed=15, change={"max_dim": 4}),
    case("no-side", "No axis has a basis: Adam, from the second gradient on.", "long-axes-preconditioned", seed=16,
         change={"max_dim": 2}),
    case("vector", "A vector has no basis.", "vectors-preconditioned", shape=(2,), seed=17),
    case("vector-of-two", "A vector with a basis.", "vectors-ignored", shape=(2,), seed=18, change={"vectors": True},
         tier="should"),
    case("scalar", "A parameter without axes.", shape=(), seed=19, tier="should"),
    case("order-three", "A basis for each of three axes.", shape=(2, 3, 4), seed=20),
    case("zero-first", "A zero first gradient: the bases stay, the first renewal makes them.", seed=21,
         grads=ZERO_FIRST, change={"every": 1}, tier="should"),
    case("merged", "Axes merge from left to right up to a product of max_dim.",
         "merge-ignored merge-from-the-right", shape=(4, 3, 2, 2), seed=22, change={"merge": True, "max_dim": 6}),
    case("merged-long", "A first axis longer than max_dim stands alone, without a basis; the others merge.",
         "merge-ignored", shape=(7, 3, 2), seed=41, change={"merge": True, "max_dim": 6}),
    case("merged-ones", "Axes of size 1 merge to one of size 1.", shape=(1, 1), seed=27,
         change={"merge": True, "max_dim": 6}, tier="should"),
    case("channels-last", "The axes of a convolution are taken in the order 0, 3, 1, 2.", "layout-ignored",
         shape=(4, 2, 3, 2), seed=23, change={"merge": True, "max_dim": 6, "channels_last": True}, tier="should"),
    case("stack", "Stacked matrices do not see each other, not in the order of columns either.", shape=(2, 3, 2),
         seed=24, stack_ndim=1, tier="should"),
    case("decay", "Decoupled weight decay, times the learning rate, at the first update too.",
         f"{DECAY} decay-after-moving", shape=(3, 2), seed=25, decay=13 / 32),
    reject("beta1", "A decay of 1 never leaves zero.", "beta1", beta1=1.0),
    reject("shampoo-beta", "A negative decay.", "shampoo_beta", shampoo_beta=-0.25),
    reject("eps", "eps is not negative.", "eps", eps=-0.25),
    reject("every", "At least one update from one renewal to the next.", "every", every=0),
    reject("max-dim", "A size is at least 1.", "max_dim", max_dim=0),
    reject("basis", "The bases are made by QR or by eigh.", "basis", basis="svd"),
    reject("channels-last", "Without merging the order of axes changes nothing.", "channels_last", channels_last=True),
]  # fmt: skip
CASES = [replace(case, version=2) for case in CASES]
