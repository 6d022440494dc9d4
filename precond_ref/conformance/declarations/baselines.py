"""The yardsticks: SGD, AdaGrad (diagonal and full), RMSProp, Adam, Shampoo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from precond_ref.conformance.declarations.base import DECAY, Case, integers, maker, with_zeros


def elementwise(case: Callable[..., Case], seed: int) -> list[Case]:
    """Return the cases of every elementwise method."""
    return [
        case("zero-first", "A zero gradient at the first step.", seed=seed, grads=with_zeros(seed, (2, 3), 0)),
        case(
            "zero-later",
            "Zero gradients in between still change the averages.",
            "",
            seed=seed + 1,
            grads=with_zeros(seed + 1, (2, 3), 2, 3),
        ),
        case("decay", "Decoupled weight decay, before the step and times lr.", DECAY, seed=seed + 2, decay=0.25),
        case("scalar", "A parameter without axes.", shape=(), seed=seed + 3, tier="should"),
        case("vector", "A parameter with one axis.", shape=(5,), seed=seed + 4),
        case(
            "stack",
            "Two parameters at once; elementwise, so the stack changes nothing.",
            stack_ndim=1,
            seed=seed + 5,
            tier="may",
        ),
    ]


def no_eps(case: Callable[..., Case], **change: Any) -> Case:
    """Return a case with an entry whose gradient is always zero."""
    return case(
        "no-eps",
        "No epsilon: 0/0 gives 0 where the gradient is always zero.",
        shape=(3,),
        grads=np.array([[1, 0, -2], [3, 0, 1], [-1, 0, 2]]),
        change={"eps": 0.0, **change},
        tier="should",
    )


case, reject = maker("SGD", {"momentum": 0.75, "nesterov": False}, (2, 3))
SGD = [
    case("plain", "No momentum: the direction is the gradient.", seed=20, change={"momentum": 0.0}),
    case("momentum", "Heavy ball: the new gradient enters with weight 1.",
        "momentum-ema momentum-ignored nesterov-always", seed=21),
    case("nesterov", "The look-ahead form.", "nesterov-ignored momentum-ema", seed=22, change={"nesterov": True}),
    *elementwise(case, 23),
    reject("momentum", "A momentum of 1 never forgets.", "momentum", momentum=1.0),
    reject("negative-momentum", "A negative momentum.", "momentum", momentum=-0.5),
    reject("nesterov", "The look-ahead form without momentum.", "nesterov", momentum=0.0, nesterov=True),
]  # fmt: skip

case, reject = maker("AdaGrad", {"eps": 0.25, "initial": 0.5}, (2, 3))
ADAGRAD = [
    case("plain", "The sum of squares starts above zero.",
        "eps-inside mean initial-ignored initial-squared statistic-after no-root", seed=30),
    case("no-initial", "The sum starts at zero.", "eps-inside", seed=31, change={"initial": 0.0}),
    no_eps(case, initial=0.0),
    *elementwise(case, 32),
    reject("eps", "A negative epsilon.", "eps", eps=-0.25),
    reject("initial", "A negative sum of squares.", "initial", initial=-0.5),
]  # fmt: skip

case, reject = maker("RMSProp", {"beta2": 0.75, "eps": 0.25, "momentum": 0.0}, (2, 3))
RMSPROP = [
    case("plain", "The average starts at zero and is not corrected.",
        "eps-inside corrected weight-missing weights-swapped statistic-after", seed=40),
    case("momentum", "Heavy ball on the preconditioned gradient.", "momentum-ema momentum-on-gradient momentum-ignored",
        seed=41, change={"beta2": 0.5, "momentum": 0.5}),
    no_eps(case),
    *elementwise(case, 42),
    reject("beta2", "A decay of 1 never leaves zero.", "beta2", beta2=1.0),
    reject("eps", "A negative epsilon.", "eps", eps=-0.25),
    reject("momentum", "A momentum of 1 never forgets.", "momentum", momentum=1.0),
]  # fmt: skip

case, reject = maker("Adam", {"beta1": 0.75, "beta2": 0.875, "eps": 0.25}, (2, 3))
ADAM = [
    case("plain", "Both averages corrected, epsilon outside the root.",
        "eps-inside eps-before-correction no-correction-1 no-correction-2 heavy-ball weight-missing", seed=50),
    case("first-step", "One step: both corrections cancel the weights.", "no-correction-1 no-correction-2", seed=51,
        steps=1),
    case("no-averaging", "beta1 = beta2 = 0: g / (|g| + eps).", "eps-inside", seed=52,
        change={"beta1": 0.0, "beta2": 0.0}),
    no_eps(case),
    case("slow-decay", "Decays near 1, as in use: bias corrections in float32 are visible in float64.",
        "float32-correction correction-ahead", seed=53, steps=12, scale=0.25,
        change={"beta1": 0.9375, "beta2": 1 - 2.0**-10}, tier="should"),
    *elementwise(case, 54),
    reject("beta1", "A decay of 1 never forgets the zero start.", "beta1", beta1=1.0),
    reject("beta2", "A decay of 1 never forgets the zero start.", "beta2", beta2=1.0),
    reject("eps", "A negative epsilon.", "eps", eps=-0.25),
]  # fmt: skip

case, reject = maker("FullAdaGrad", {"eps": 0.5}, (2, 2))
FULL = [
    case("matrix", "The whole parameter is one vector.",
        "eps-inside exponent-quarter diagonal left-only statistic-after average", seed=60),
    case("vector", "One axis.", "eps-inside diagonal", shape=(3,), seed=61),
    case("pseudo-inverse", "No epsilon and fewer gradients than entries: the pseudo-inverse.", seed=62, steps=3,
        shape=(4,), change={"eps": 0.0}, tier="should"),
    case("zero-first", "A zero gradient at the first step.", seed=63, grads=with_zeros(63, (2, 2), 0)),
    case("stack", "Each stack member is a vector of its own.", shape=(2, 3), stack_ndim=1, seed=64, tier="may"),
    case("decay", "Decoupled weight decay, before the step and times lr.", DECAY, seed=65, decay=0.25),
    reject("eps", "A negative epsilon.", "eps", eps=-0.5),
    reject("scalar", "A parameter without axes.", "param", shape=()),
]  # fmt: skip

case, reject = maker("Shampoo", {"beta2": 1.0, "eps": 0.5, "every": 1, "bias_correction": False}, (3, 2))
SHAMPOO = [
    case("sum", "The statistics are sums and contain the current gradient.",
        "eps-outside exponent-half exponent-inverse-order statistic-after diagonal", seed=70),
    case("average", "Averages with weight 1 - beta2.", "weight-missing correction-always sum eps-at-start", seed=71,
        change={"beta2": 0.75}),
    case("bias-correction", "Averages divided by 1 - beta2^t.", "correction-ignored", seed=72,
        change={"beta2": 0.75, "bias_correction": True}),
    case("every-3", "Roots of updates 1, 4, 7; the statistics see every update.",
        "every-late every-ignored every-multiples", seed=73, steps=8, change={"beta2": 0.75, "every": 3}),
    case("vector", "One axis: full-matrix AdaGrad with epsilon under the root, exponent -1/2.", "exponent-quarter",
        shape=(3,), seed=74),
    case("order-3", "Three axes: exponent -1/6 for each.", "exponent-quarter exponent-inverse-order last-axis-only",
        shape=(2, 3, 2), seed=75),
    case("row", "An axis of size 1 counts in the exponent.", "exponent-without-ones", shape=(1, 4), seed=76),
    case("column", "An axis of size 1 counts in the exponent.", "exponent-without-ones", shape=(4, 1), seed=77),
    case("rank-one", "Gradients of rank one: the statistics are singular and epsilon carries the rest.",
        "eps-outside eps-ignored", shape=(3, 2), seed=78,
        grads=integers(78, (5, 1, 1), 1, 2) * integers(79, (3, 1), -2, 2) @ integers(80, (1, 2), 1, 2)),
    case("pseudo-inverse", "No epsilon and singular statistics: the pseudo-inverse.", shape=(3, 2), seed=81, steps=4,
        grads=integers(81, (4, 3, 2)) * np.array([[1], [1], [0]]), change={"eps": 0.0}, tier="should"),
    case("zero-first", "A zero gradient at the first step.", seed=82, grads=with_zeros(82, (3, 2), 0)),
    case("zero-later", "Zero gradients in between decay the averages.", "", seed=83, grads=with_zeros(83, (3, 2), 2, 3),
        change={"beta2": 0.75}),
    case("stack", "Two parameters at once, each with its own statistics.", shape=(2, 3, 2), stack_ndim=1, seed=84,
        tier="may"),
    case("decay", "Decoupled weight decay, before the step and times lr.", DECAY, seed=85, decay=0.25),
    reject("beta2", "A decay above 1.", "beta2", beta2=1.5),
    reject("eps", "A negative epsilon.", "eps", eps=-0.5),
    reject("every", "Roots every zero updates.", "every", every=0),
    reject("bias-correction", "A sum has nothing to correct.", "bias_correction", bias_correction=True),
    reject("scalar", "A parameter without axes.", "param", shape=()),
]  # fmt: skip

CASES = [*SGD, *ADAGRAD, *RMSPROP, *ADAM, *FULL, *SHAMPOO]
