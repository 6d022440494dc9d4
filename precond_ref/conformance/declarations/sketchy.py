"""S-AdaGrad, S-Shampoo, its deep-learning version, the online yardsticks, and sketches by themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

from precond_ref.conformance.declarations.base import Case, integers

DEFAULTS: dict[str, dict[str, Any]] = {
    "SAdaGrad": {"size": 3, "beta2": 1.0, "delta": 0.0, "solver": "svd"},
    "SShampoo": {"size": 3, "beta2": 1.0, "eps": 0.0, "relative_eps": False, "every": 1, "tail_decay": None,
        "solver": "svd"},
    "SShampoo.practical": {"size": 3, "beta2": 0.75, "eps": 0.125, "relative_eps": True, "every": 1, "tail_decay": None,
        "graft": "rmsprop", "graft_beta2": 0.5, "graft_eps": 0.25, "start": 0, "momentum": 0.5, "nesterov": True,
        "momentum_ema": False, "weight_decay": 0.0, "decay_after_momentum": True, "merge": 1, "solver": "svd"},
    "AdaFD": {"size": 3, "delta": 0.25},
    "FDSON": {"size": 3, "delta": 0.5, "learning_rate": 0.25},
    "RFDSON": {"size": 3, "delta": 0.5, "learning_rate": 0.25},
}  # fmt: skip


def _case(
    constructor: str,
    name: str,
    shape: tuple[int, ...],
    why: str,
    *,
    seed: int,
    steps: int = 5,
    zero: tuple[int, ...] = (),
    grads: Any = None,
    catches: str = "",
    **rest: Any,
) -> Case:
    """A trace; ``zero``: the updates, counted from 0, whose gradient is zero; other fields go to `Case` or config."""
    config = {**DEFAULTS[constructor], **{k: v for k, v in rest.items() if k in DEFAULTS[constructor]}}
    grads = integers(100 + seed, (steps, *shape)) if grads is None else np.array(grads, float)
    for t in zero:
        grads[t] = 0
    method = constructor.split(".")[0]
    rest = {k: v for k, v in rest.items() if k not in config}
    return Case(
        method=method,
        constructor=constructor,
        name=name,
        why=why,
        config=config,
        shape=shape,
        param=integers(seed, shape),
        grads=grads,
        lr=config.get("learning_rate", rest.pop("lr", 0.5)),
        catches=tuple(catches.split()),
        **rest,
    )


def _reject(constructor: str, argument: str, value: Any, why: str, shape: tuple[int, ...] = (4, 3)) -> Case:
    """A config with one field, or a parameter (a shape), that must be refused."""
    field = argument in DEFAULTS[constructor]
    prefix = constructor.partition(".")[2]
    text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value).strip("-").replace(".", "-")
    return Case(
        method=constructor.split(".")[0],
        constructor=constructor,
        name="-".join(filter(None, ["reject", prefix, argument.replace("_", "-"), text])),
        kind="reject",
        argument=argument,
        why=why,
        config={**DEFAULTS[constructor], **({argument: value} if field else {})},
        shape=shape if field else value,
    )


# Gradients in the plane of e_1 + e_2 and e_3 - e_4, so that no eigenvalue is cut off at size 3.
PLANE = [[1, 1, 2, -2, 0], [2, 2, -1, 1, 0], [-1, -1, 0, 0, 0], [3, 3, 1, -1, 0]]
# Unit vectors in turn, all size of them: every eigenvalue ties, and all mass escapes.
CYCLE = np.eye(4)[[0, 1, 2, 0, 1, 2]]
# A matrix of two equal singular values, then others.
TIED = [[[2, 0], [0, 2], [0, 0]], [[0, 0], [1, 0], [0, -1]], [[1, 2], [-2, 1], [0, 0]], [[1, 0], [3, -1], [0, 2]]]
# A gradient of rank one, then one with a part outside the range of the first.
NARROW = [[[1, 2, 0], [-1, -2, 0], [0, 0, 0], [2, 4, 0]], [[0, 1, 1], [2, 0, -1], [1, 1, 0], [3, 0, 1]],
          [[1, 0, 0], [0, 2, 0], [0, 0, -1], [1, 1, 1]], [[2, -1, 0], [0, 1, 1], [1, 0, 0], [-1, 0, 2]]]  # fmt: skip

CASES = [
    # S-AdaGrad
    _case("SAdaGrad", "sum", (5,), "Algorithm 2: a sum, sketch of rank size - 1", seed=1, steps=6,
          catches="size-plus-one size-minus-one mass-ignored undeflated exponent-one mass-half mass-last"),
    _case("SAdaGrad", "average", (5,), "The exponential version: sketch and escaped mass decay by beta2", seed=2,
          steps=6, size=2, beta2=0.75, catches="tail-sqrt tail-kept decay-sqrt decay-squared weight"),
    _case("SAdaGrad", "delta", (4,), "delta starts the escaped mass and decays with it", seed=3, size=2, beta2=0.75,
          delta=0.5, catches="delta-kept delta-ignored"),
    _case("SAdaGrad", "size-one", (4,), "All mass escapes: AdaGrad-Norm", seed=4, size=1, catches="mass-ignored"),
    _case("SAdaGrad", "size-of-dimension", (4,), "size = d: the smallest eigenvalue is cut and added back: exact",
          seed=5, steps=6, size=4, catches="mass-ignored"),
    _case("SAdaGrad", "size-above-dimension", (3,), "size > d: nothing is cut; full-matrix AdaGrad", seed=6, size=9,
          beta2=0.75),
    _case("SAdaGrad", "zero-gradients", (4,), "Zero gradients first and later give zero, not NaN", seed=7,
          size=2, zero=(0, 2)),
    _case("SAdaGrad", "low-rank", (5,), "Nothing escapes: the pseudo-inverse of a singular statistic", seed=8,
          grads=PLANE),
    _case("SAdaGrad", "ties", (4,), "All eigenvalues tie at the cut and all escape", seed=9, grads=CYCLE,
          catches="mass-ignored"),
    _case("SAdaGrad", "one-dimension", (1,), "d = 1", seed=10, size=2, beta2=0.5),
    _case("SAdaGrad", "memoryless", (4,), "beta2 = 0: only the last gradient counts", seed=11, beta2=0.0, size=2,
          tier="may"),
    _case("SAdaGrad", "stack", (2, 4), "Stacked vectors do not see each other", seed=12, size=2, beta2=0.75,
          stack_ndim=1, tier="should"),
    _case("SAdaGrad", "weight-decay", (4,), "Decoupled weight decay, times the learning rate", seed=13, size=2,
          decay=0.25, tier="should", catches="decay-coupled decay-without-lr decay-after"),
    _case("SAdaGrad", "gram64", (5,), "The solver changes nothing in exact arithmetic", seed=14, beta2=0.75,
          solver="gram64", tier="may"),
    # S-Shampoo
    _case("SShampoo", "sum", (5, 4), "Algorithm 3 without eps", seed=21,
          catches="size-plus-one size-minus-one mass-ignored undeflated exponent-double first-axis-only shared-tail "
          "mass-trace mass-complement"),
    _case("SShampoo", "average", (4, 3), "The exponential version; eps joins eigenvalues and mass at the root",
          seed=22, steps=6, size=2, beta2=0.75, eps=0.25,
          catches="tail-sqrt tail-kept decay-sqrt eps-ignored eps-outside eps-in-sketch "
          "small-axes-whole"),
    _case("SShampoo", "tail-decay", (4, 3), "Another decay of the escaped mass: sqrt(beta2) for beta2 = 1/4", seed=23,
          size=2, beta2=0.25, eps=0.25, tail_decay=0.5, catches="tail-decay-ignored"),
    _case("SShampoo", "relative-eps", (4, 3), "eps in units of the largest eigenvalue with its mass", seed=24,
          beta2=0.75, eps=0.25, relative_eps=True, catches="eps-absolute eps-relative-deflated"),
    _case("SShampoo", "every", (4, 3), "Every third gradient is sketched, all are preconditioned", seed=25, steps=7,
          size=2, beta2=0.75, eps=0.25, every=3, catches="every-ignored every-late every-multiples every-sketches-all"),
    _case("SShampoo", "every-outside", (4, 3), "A gradient outside a stale sketch that has lost nothing gives 0 there",
          seed=26, size=4, every=2, grads=NARROW, catches="identity-outside"),
    _case("SShampoo", "every-outside-eps", (4, 3), "So it does with eps > 0", seed=27, size=4, eps=0.25, every=2,
          grads=NARROW, catches="eps-everywhere axis-skipped"),
    _case("SShampoo", "size-above-dimensions", (3, 2), "Nothing is cut: Shampoo", seed=28, size=9, eps=0.25),
    _case("SShampoo", "size-one", (3, 2), "All mass escapes on both sides", seed=29, size=1),
    _case("SShampoo", "zero-gradients", (3, 2), "Zero gradients first and later give zero, not NaN", seed=30, size=2,
          beta2=0.5, zero=(0, 3)),
    _case("SShampoo", "ties", (3, 2), "Equal singular values at the cut", seed=31, size=2, grads=TIED),
    _case("SShampoo", "row", (1, 4), "An axis of size 1 counts in the exponent", seed=32, size=2, eps=0.25,
          catches="unit-axes-dropped"),
    _case("SShampoo", "column", (4, 1), "The same for columns", seed=33, size=2, beta2=0.75, eps=0.25,
          catches="unit-axes-dropped"),
    _case("SShampoo", "vector", (5,), "One axis: S-AdaGrad", seed=34, catches="exponent-quarter"),
    _case("SShampoo", "order-three", (3, 4, 2), "Three axes: exponent -1/6", seed=35, steps=4, size=2, beta2=0.75,
          eps=0.25, catches="exponent-quarter"),
    _case("SShampoo", "order-four", (2, 3, 1, 2), "Four axes, one of size 1: exponent -1/8", seed=36, steps=3, size=2,
          eps=0.25, tier="should", catches="exponent-quarter unit-axes-dropped"),
    _case("SShampoo", "stack", (2, 3, 2), "Stacked matrices do not see each other", seed=37, steps=4, size=2,
          beta2=0.75, eps=0.25, stack_ndim=1, tier="should"),
    _case("SShampoo", "weight-decay", (3, 2), "Decoupled weight decay, times the learning rate", seed=38, size=2,
          eps=0.25, decay=0.25, tier="should", catches="decay-coupled decay-without-lr decay-after"),
    _case("SShampoo", "gram64", (4, 3), "The solver changes nothing in exact arithmetic", seed=39, beta2=0.75,
          eps=0.25, solver="gram64", tier="may"),
    # the deep-learning version
    _case("SShampoo.practical", "practical", (4, 3), "RMSProp graft, Nesterov momentum, relative eps", seed=41,
          catches="tail-sqrt eps-absolute graft-ignored graft-sgd graft-eps-outside graft-corrected graft-weight "
          "graft-after nesterov-ignored ema-always size-plus-one size-minus-one"),
    _case("SShampoo.practical", "practical-heavy-ball", (4, 3), "Momentum without Nesterov, absolute eps", seed=42,
          nesterov=False, relative_eps=False, beta2=0.5, catches="nesterov-always eps-relative"),
    _case("SShampoo.practical", "practical-ema", (4, 3), "The update enters the momentum times 1 - momentum", seed=43,
          momentum_ema=True, catches="ema-ignored ema-inside"),
    _case("SShampoo.practical", "practical-start", (4, 3), "SGD graft alone for two updates; the sketches see them",
          seed=44, graft="sgd", start=2, catches="start-late start-early start-unseen start-ignored graft-rmsprop"),
    _case("SShampoo.practical", "practical-ungrafted", (4, 3), "No graft, no momentum", seed=45, graft=None,
          momentum=0.0),
    _case("SShampoo.practical", "practical-decay-after", (3, 2), "weight_decay joins the direction", seed=46, size=2,
          weight_decay=0.25, catches="kappa-inside kappa-ignored"),
    _case("SShampoo.practical", "practical-decay-before", (3, 2), "weight_decay joins what enters the momentum",
          seed=47, size=2, weight_decay=0.25, decay_after_momentum=False, catches="kappa-outside"),
    _case("SShampoo.practical", "practical-decay-ema", (3, 2), "weight_decay before a momentum that averages",
          seed=48, size=2, weight_decay=0.25, decay_after_momentum=False, momentum_ema=True, nesterov=False,
          tier="should", catches="kappa-unscaled"),
    _case("SShampoo.practical", "practical-merge-all", (2, 3), "All axes merge: a vector, exponent -1/2", seed=49,
          merge=1024, catches="merge-ignored exponent-unmerged"),
    _case("SShampoo.practical", "practical-merge", (2, 1, 3, 2), "Axes merge up to a product of merge; 1 is dropped",
          seed=50, steps=4, merge=6, catches="merge-ignored merge-below exponent-unmerged"),
    _case("SShampoo.practical", "practical-unit-axes", (3, 1, 2), "Axes of size 1 are dropped", seed=51,
          catches="unit-axes-kept"),
    _case("SShampoo.practical", "practical-vector", (4,), "With a graft a vector gets the graft alone", seed=52,
          catches="vectors-preconditioned"),
    _case("SShampoo.practical", "practical-vector-ungrafted", (4,), "Without one it is preconditioned", seed=53,
          graft=None),
    _case("SShampoo.practical", "practical-scalar", (), "A scalar gets the graft alone", seed=54, tier="should"),
    _case("SShampoo.practical", "practical-single-entry", (1, 1), "No axis of size above 1: the graft alone", seed=55,
          tier="should"),
    _case("SShampoo.practical", "practical-long-axis", (4097, 1), "An axis above 4096: the graft alone", seed=56,
          steps=1, momentum=0.0, tier="should", catches="long-axes-preconditioned"),
    _case("SShampoo.practical", "practical-graft-sum", (3, 2), "graft_beta2 = 1 sums the squares", seed=57, size=2,
          graft_beta2=1.0, catches="graft-sum-empty"),
    _case("SShampoo.practical", "practical-zero-gradients", (3, 2), "Zero gradients and no eps in the graft give zero",
          seed=58, size=2, graft_eps=0.0, zero=(0, 2), catches="zero-nan"),
    _case("SShampoo.practical", "practical-every", (4, 3), "Stale sketches under a graft; another tail decay",
          seed=59, steps=6, size=2, every=2, tail_decay=0.5, relative_eps=False, eps=0.25,
          catches="every-ignored every-late every-multiples tail-decay-ignored"),
    _case("SShampoo.practical", "practical-every-outside", (4, 3),
          "A gradient outside a stale sketch that has lost nothing gives 0 there, before the graft", seed=61, size=4,
          every=2, graft="sgd", grads=NARROW, tier="should", catches="identity-outside eps-everywhere"),
    _case("SShampoo.practical", "practical-gram64", (4, 3), "The solver changes nothing in exact arithmetic", seed=62,
          solver="gram64", tier="may"),
    _case("SShampoo.practical", "practical-stack", (2, 3, 2), "Graft norms are of each member", seed=60, steps=4,
          size=2, stack_ndim=1, tier="should"),
    # yardsticks
    _case("AdaFD", "sum", (5,), "delta joins the root of the sketch", seed=71, steps=6, lr=0.25,
          catches="delta-inside escaped-added no-root size-plus-one undeflated delta-ignored"),
    _case("AdaFD", "size-above-dimension", (3,), "Nothing is cut", seed=72, size=5),
    _case("AdaFD", "zero-gradients", (4,), "Zero gradients give zero", seed=73, size=2, zero=(0, 2)),
    _case("AdaFD", "no-delta", (4,), "delta = 0: zero on the complement of the sketch", seed=74, delta=0.0,
          tier="should"),
    _case("AdaFD", "stack", (2, 4), "Stacked vectors do not see each other", seed=75, stack_ndim=1, size=2,
          tier="should"),
    _case("FDSON", "sum", (5,), "The sketch sees gradients over sqrt(learning_rate sqrt(t))", seed=76, steps=6,
          catches="weight-time weight-timeless weight-squared rate-ignored escaped-added size-plus-one undeflated"),
    _case("FDSON", "size-above-dimension", (3,), "Nothing is cut", seed=77, size=5, delta=0.25, learning_rate=0.5),
    _case("FDSON", "zero-gradients", (4,), "Zero gradients give zero", seed=78, size=2, zero=(0, 2)),
    _case("FDSON", "stack", (2, 4), "Stacked vectors do not see each other", seed=79, stack_ndim=1, size=2,
          tier="should"),
    _case("RFDSON", "sum", (5,), "Half of the escaped mass joins delta; gradients over sqrt(learning_rate t)",
          seed=81, steps=6,
          catches="weight-root-time weight-timeless weight-squared mass-full mass-ignored size-plus-one undeflated"),
    _case("RFDSON", "no-delta", (4,), "delta = 0: RFD0, zero where nothing has escaped", seed=82, size=2, delta=0.0,
          learning_rate=0.5),
    _case("RFDSON", "zero-gradients", (4,), "Zero gradients give zero, with delta = 0 too", seed=83, size=2,
          delta=0.0, zero=(0, 2)),
    _case("RFDSON", "stack", (2, 4), "Stacked vectors do not see each other", seed=84, stack_ndim=1, size=2,
          tier="should"),
]  # fmt: skip


def _sketch(name: str, d: int, q: int, why: str, *, seed: int, rows: Any = None, **config: Any) -> Case:
    """A primitive: batches of rows into an empty sketch."""
    return Case(
        method="sketch.update",
        name=name,
        kind="primitive",
        why=why,
        config={"size": 3, "beta2": 1.0, "tail_decay": None} | config,
        shape=(d,),
        inputs={"rows": integers(seed, (4, q, d)) if rows is None else rows},
    )


CASES += [
    _sketch("vectors", 5, 1, "One new row at a time", seed=91),
    _sketch("blocks", 5, 3, "Three new rows at a time, decayed", seed=92, beta2=0.75),
    _sketch("tail-decay", 4, 2, "Another decay of the escaped mass", seed=93, size=2, beta2=0.75, tail_decay=0.5),
    _sketch("size-of-dimension", 3, 2, "size = d: the smallest eigenvalue is cut", seed=94),
    _sketch("size-above-dimension", 3, 2, "size > d: no cut", seed=95, size=5),
    _sketch("size-one", 3, 2, "size = 1: all escapes", seed=96, size=1),
    _sketch("low-rank", 5, 1, "Nothing escapes from rows in a plane: rounding is not mass", seed=97,
            rows=np.array(PLANE)[:, None]),
    _sketch("ties", 4, 1, "Equal eigenvalues at the cut", seed=98, rows=CYCLE[:, None]),
]  # fmt: skip

CASES += [
    _reject("SAdaGrad", "size", 0, "A sketch has at least one row", (4,)),
    _reject("SAdaGrad", "size", 2.5, "A size is an integer", (4,)),
    _reject("SAdaGrad", "beta2", 1.5, "A decay is at most 1", (4,)),
    _reject("SAdaGrad", "delta", -0.5, "A mass is not negative", (4,)),
    _reject("SAdaGrad", "param", (4, 3), "Vectors only"),
    _reject("SShampoo", "size", 0, "A sketch has at least one row"),
    _reject("SShampoo", "beta2", -0.25, "A decay is at least 0"),
    _reject("SShampoo", "eps", -0.5, "eps is not negative"),
    _reject("SShampoo", "every", 0, "At least one update from one sketched gradient to the next"),
    _reject("SShampoo", "tail_decay", 1.5, "A decay is at most 1"),
    _reject("SShampoo", "param", (), "A scalar has no axis"),
    _reject("SShampoo.practical", "graft", "adam", "The grafts are rmsprop, sgd and none"),
    _reject("SShampoo.practical", "momentum", 1.5, "A decay is at most 1"),
    _reject("SShampoo.practical", "merge", 0, "A product of axes is at least 1"),
    _reject("AdaFD", "delta", -0.5, "delta is not negative", (4,)),
    _reject("AdaFD", "size", 0, "A sketch has at least one row", (4,)),
    _reject("FDSON", "learning_rate", 0.0, "It divides", (4,)),
    _reject("RFDSON", "learning_rate", -0.25, "It is under a root", (4,)),
    _reject("RFDSON", "param", (4, 3), "Vectors only"),
]
