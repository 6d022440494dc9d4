"""RF-RMSProp, RF-AdamW and RF-Shampoo."""

from __future__ import annotations

from typing import Any

from precond_ref.conformance.declarations.base import Case, integers

DEFAULTS: dict[str, dict[str, Any]] = {
    "RFRMSProp": {
        "beta2": 0.25,
        "damping": 0.125,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "batch_size": 4.0,
        "initial": 1.0,
        "narrow_state": False,
    },
    "RFAdamW": {
        "beta1": 0.75,
        "beta2": 0.875,
        "damping": 0.125,
        "batch_size": 4.0,
        "initial": 1.0,
        "bias_correction": False,
        "narrow_state": False,
    },
    "RFShampoo": {
        "beta2": 0.25,
        "damping": 0.25,
        "momentum": 0.5,
        "weight_decay": 0.0,
        "batch_size": 2.0,
        "every": 1,
    },
}


def _case(method: str, name: str, shape: tuple[int, ...], why: str, *, seed: int, steps: int = 5, catches: str = "",
          zero: Any = (), scale: float = 1.0, **rest: Any) -> Case:  # fmt: skip
    """A trace; gradients are integers times ``scale``, zero at the updates ``zero`` (counted from 0)."""
    defaults = DEFAULTS[method]
    grads = integers(100 + seed, (steps, *shape)) * scale
    for t in zero:
        grads[t] = 0
    return Case(
        method=method,
        name=name,
        why=why,
        config={**defaults, **{k: v for k, v in rest.items() if k in defaults}},
        shape=shape,
        param=integers(seed, shape),
        grads=grads,
        catches=tuple(catches.split()),
        **{"lr": 0.5} | {k: v for k, v in rest.items() if k not in defaults},
    )


CASES = [
    _case("RFRMSProp", "plain", (3, 2), "s before use, no root, B inside, damping outside the average", seed=1,
          catches="root initial-zero batch-ignored batch-squared statistic-after corrected damping-inside "
          "weights-swapped bfloat16-state"),
    _case("RFRMSProp", "initial", (4,), "s_0 other than 1", seed=2, initial=0.5,
          catches="initial-one initial-times-batch"),
    _case("RFRMSProp", "momentum", (3, 2), "Heavy ball on the preconditioned gradient", seed=3, momentum=0.75,
          catches="momentum-ema momentum-ignored momentum-on-gradient nesterov"),
    _case("RFRMSProp", "weight-decay", (4,), "kappa w joins the preconditioned gradient, inside the momentum", seed=4,
          momentum=0.5, weight_decay=0.25, catches="kappa-outside kappa-coupled kappa-ignored"),
    _case("RFRMSProp", "zero-gradients", (4,), "Zero gradients first and later; s decays", seed=6, zero=(0, 2)),
    _case("RFRMSProp", "no-damping", (4,), "damping = 0 and s_0 = 0: 0/0 is 0", seed=7, damping=0.0, initial=0.0,
          zero=(0,), catches="zero-nan"),
    _case("RFRMSProp", "narrow-state", (4,), "The dtype of the state of a narrow parameter is no matter in float64",
          seed=10, narrow_state=True, tier="may"),
    _case("RFRMSProp", "scalar", (), "A scalar", seed=8, tier="should"),
    _case("RFRMSProp", "slow", (4,), "beta2 = 2^-10 and gradients of about 2^-7: in bfloat16 s cannot decay", seed=9,
          beta2=2**-10, scale=2**-7, steps=6, batch_size=1.0, tier="should", catches="bfloat16-state"),
    _case("RFAdamW", "plain", (3, 2), "Averaged gradient over averaged square, no root, no corrections", seed=11,
          catches="root initial-zero batch-ignored statistic-after corrected-1 corrected-2 damping-inside "
          "weights-swapped betas-swapped heavy-ball nesterov momentum-of-preconditioned"),
    _case("RFAdamW", "corrected", (4,), "Both corrections; s_0 plays no part", seed=12, bias_correction=True,
          catches="correction-inflates correction-ignored correction-1-ignored correction-2-ignored correction-ahead"),
    _case("RFAdamW", "initial", (4,), "s_0 other than 1", seed=13, initial=0.5,
          catches="initial-one initial-times-batch"),
    _case("RFAdamW", "weight-decay", (4,), "Decoupled weight decay, times the learning rate", seed=14, decay=0.25,
          catches="decay-coupled decay-without-lr decay-after"),
    _case("RFAdamW", "zero-gradients", (4,), "Zero gradients first and later", seed=15, zero=(0, 2)),
    _case("RFAdamW", "zero-gradients-corrected", (4,), "0/0 is 0 without damping", seed=16, zero=(0, 2), damping=0.0,
          bias_correction=True, catches="zero-nan"),
    _case("RFAdamW", "narrow-state", (4,), "The dtype of the state of a narrow parameter is no matter in float64",
          seed=18, narrow_state=True, beta1=0.5, beta2=0.75, batch_size=8.0, tier="may"),
    _case("RFAdamW", "scalar", (), "A scalar", seed=17, tier="should"),
    _case("RFShampoo", "matrix", (3, 2), "Both factors from the old ones, momentum, batch size", seed=21, steps=6,
          catches="gauss-seidel share-missing trace-missing damping-outside batch-ignored factors-after exponent-half "
          "weights-swapped unwhitened accumulated momentum-ema momentum-ignored"),
    _case("RFShampoo", "no-damping", (2, 3), "damping = 0", seed=22, damping=0.0, beta2=0.5, batch_size=1.0),
    _case("RFShampoo", "weight-decay", (3, 2), "kappa w joins the preconditioned gradient, inside the momentum",
          seed=23, weight_decay=0.25, catches="kappa-outside kappa-coupled kappa-ignored"),
    _case("RFShampoo", "every", (3, 2), "Factors renewed at updates 1, 4, 7; no momentum", seed=25, steps=7, every=3,
          momentum=0.0, catches="every-ignored every-late every-multiples"),
    _case("RFShampoo", "zero-gradients", (3, 2), "Zero gradients first and later", seed=26, zero=(0, 2)),
    _case("RFShampoo", "vector", (4,), "One axis: the full matrix (1 - beta2) S + beta2 (B g g^T + lambda I)",
          seed=27, catches="exponent-half"),
    _case("RFShampoo", "scalar", (), "A scalar has one factor, 1 x 1", seed=28, tier="should"),
    _case("RFShampoo", "row", (1, 4), "Axes of size 1 have no factor", seed=29, catches="unit-axes-kept"),
    _case("RFShampoo", "column", (4, 1), "The same for columns", seed=30, catches="unit-axes-kept"),
    _case("RFShampoo", "order-three", (2, 3, 2), "Three axes, three factors", seed=31, steps=4, scale=0.5,
          catches="share-missing trace-missing"),
    _case("RFShampoo", "stack", (2, 3, 2), "Stacked matrices do not see each other", seed=32, stack_ndim=1,
          tier="should"),
]  # fmt: skip


def _reject(method: str, argument: str, value: Any, why: str) -> Case:
    """A config with one field that must be refused."""
    return Case(
        method=method,
        name=f"reject-{argument.replace('_', '-')}-{str(value).strip('-').replace('.', '-')}",
        kind="reject",
        argument=argument,
        why=why,
        config={**DEFAULTS[method], argument: value},
        shape=(4, 3),
    )


CASES += [
    _reject("RFRMSProp", "beta2", 0.0, "The average would never move"),
    _reject("RFRMSProp", "beta2", 1.5, "A weight is at most 1"),
    _reject("RFRMSProp", "damping", -0.25, "Damping is not negative"),
    _reject("RFRMSProp", "momentum", 1.0, "A momentum is below 1"),
    _reject("RFRMSProp", "batch_size", 0.0, "A batch is not empty"),
    _reject("RFAdamW", "beta1", 1.0, "A decay is below 1"),
    _reject("RFAdamW", "beta2", 1.0, "A decay is below 1"),
    _reject("RFAdamW", "initial", -1.0, "s_0 is not negative"),
    _reject("RFShampoo", "beta2", 0.0, "The factors would never move"),
    _reject("RFShampoo", "damping", -0.25, "Damping is not negative"),
    _reject("RFShampoo", "weight_decay", -0.5, "A decay is not negative"),
    _reject("RFShampoo", "every", 0, "At least one update between renewals"),
]
