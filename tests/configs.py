"""Configurations of every method in the registry, with loud hyperparameters: what "over all methods" tests run on.

A new method adds one entry to `LOUD`; `test_contract.py` fails until it does.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import precond_ref as pr
from precond_ref.numerics.template import zeros
from precond_ref.protocol import Method


class Config(NamedTuple):
    """A method and the shape of one parameter to run it on."""

    method: Any
    shape: tuple[int, ...] = (5, 3)


class DecayedState(NamedTuple):
    """State of `Decayed`."""

    step: Any
    buffer: Any


class Decayed(Method):
    """Heavy ball with weight decay inside the momentum: a method that reads the parameter's values."""

    momentum: float = 0.5
    weight_decay: Any = 0.0
    narrow_state: bool = False

    state_type: ClassVar[Any] = DecayedState
    elementwise: ClassVar[bool] = True
    reads_param = True

    def state_of(self, shape: tuple[int, ...]) -> DecayedState:
        return DecayedState(0, zeros(*shape))

    def step(self, grad: Any, state: Any, param: Any, now: Any) -> Any:
        buffer = self.momentum * state.buffer + grad + self.weight_decay * param
        return 1.0 * buffer, DecayedState(now.step, buffer)


def _inverse_free(**changes: Any) -> pr.IFShampoo:
    loud = pr.IFShampoo(beta2=0.25, damping=0.25, momentum=0.5, riemannian_momentum=0.5, batch_size=2.0)
    return loud.replace(**changes)


LOUD: dict[str, dict[str, Config]] = {
    "AGD": {
        "default": Config(pr.AGD(beta1=0.75, beta2=0.875, delta=0.25)),
        "amsgrad": Config(pr.AGD(beta1=0.5, beta2=0.75, delta=0.125, amsgrad=True)),
        "clip": Config(pr.AGD(beta1=0.75, beta2=0.875, delta=0.125, clip=0.5), (7,)),
        "beta1=0": Config(pr.AGD(beta1=0.0, beta2=0.0, delta=0.125), ()),
    },
    "ASGO": {
        "right": Config(pr.ASGO(beta1=0.75, beta2=0.5, eps=0.25)),
        "left": Config(pr.ASGO(beta1=0.75, beta2=0.5, eps=0.25, rms=None), (3, 5)),
        "every": Config(pr.ASGO(beta1=0.75, beta2=0.5, eps=0.25, every=3, side="left"), (4, 4)),
        "heads": Config(pr.ASGO(beta1=0.75, beta2=0.5, eps=0.25, heads=2), (6, 4)),
        "polar_express": Config(pr.ASGO(beta1=0.75, beta2=0.5, eps=0.25, root="polar_express")),
        "newton_schulz": Config(pr.ASGO(beta1=0.75, beta2=0.5, eps=0.25, root="newton_schulz", root_steps=20)),
        "coupled_newton": Config(pr.ASGO(beta1=0.75, beta2=0.5, eps=0.25, root="coupled_newton", root_steps=20)),
        "theory": Config(pr.ASGO.theory(eps=0.25), (4, 6)),
        "theory-right": Config(pr.ASGO.theory(eps=0.25, side="right")),
    },
    "DASGO": {
        "default": Config(pr.DASGO(beta1=0.75, beta2=0.5, eps=0.25)),
        "raw": Config(pr.DASGO(beta1=0.75, beta2=0.5, eps=0.25, rms=None)),
        "theory": Config(pr.DASGO.theory(eps=0.25)),
    },
    "MBF": {
        "per_output": Config(pr.MBF(damping=0.5, decay=0.75, momentum=0.5)),
        "per_input": Config(pr.MBF(layout="per_input", damping=0.5, decay=0.5, momentum=0.5)),
        "contiguous": Config(pr.MBF(layout="contiguous", damping=0.5, decay=0.5, momentum=0.25), (3, 4)),
        "blocks": Config(pr.MBF(average=False, damping=0.5, decay=0.75, momentum=0.5)),
        "input blocks": Config(pr.MBF(layout="per_input", average=False, damping=0.5, decay=0.5, momentum=0.5)),
        "contiguous blocks": Config(pr.MBF(layout="contiguous", average=False, damping=0.5, momentum=0.5), (4, 3)),
        "schedule": Config(pr.MBF(damping=0.5, decay=0.75, momentum=0.5, statistics_every=2, inverse_every=3)),
        "conv": Config(pr.MBF(kind="conv", damping=0.5, decay=0.75, momentum=0.5), (2, 3, 3, 2)),
        "conv schedule": Config(
            pr.MBF(kind="conv", damping=0.5, decay=0.5, momentum=0.5, statistics_every=2, inverse_every=4),
            (3, 2, 2, 2),
        ),
        "diagonal": Config(pr.MBF(kind="diagonal"), (7,)),
    },
    "RFRMSProp": {
        "default": Config(pr.RFRMSProp(beta2=0.25, damping=0.125, batch_size=8.0, initial=0.5)),
        "momentum": Config(
            pr.RFRMSProp(beta2=0.5, damping=0.25, momentum=0.75, weight_decay=0.125, batch_size=2.0), ()
        ),
    },
    "RFAdamW": {
        "default": Config(pr.RFAdamW(beta1=0.75, beta2=0.875, damping=0.125, batch_size=4.0, initial=0.5)),
        "corrected": Config(pr.RFAdamW(beta1=0.75, beta2=0.875, damping=0.125, bias_correction=True), (7,)),
    },
    "RFShampoo": {
        "default": Config(pr.RFShampoo(beta2=0.25, damping=0.25, momentum=0.5, weight_decay=0.125, batch_size=2.0)),
        "every": Config(pr.RFShampoo(beta2=0.25, damping=0.25, momentum=0.0, every=3), (1, 4)),
        "order 1": Config(pr.RFShampoo(beta2=0.5, damping=0.5, momentum=0.5), (4,)),
        "order 3": Config(pr.RFShampoo(beta2=0.25, damping=0.25, momentum=0.5), (3, 1, 4, 2)),
    },
    "IFShampoo": {
        "default": Config(
            pr.IFShampoo(
                beta2=0.25, damping=0.25, momentum=0.5, riemannian_momentum=0.75, weight_decay=0.125, batch_size=2.0
            )
        ),
        "plain": Config(_inverse_free(momentum=0.0, riemannian_momentum=0.0, clip=False), ()),
        "every": Config(_inverse_free(every=3), (1, 4)),
        "order 3": Config(_inverse_free(), (3, 1, 4, 2)),
        "diagonal, tril": Config(_inverse_free(structure=("diagonal", "tril"))),
        "triu, block-diagonal": Config(_inverse_free(structure=("triu", "block-diagonal(2)"))),
        "toeplitz": Config(_inverse_free(structure=("tril-toeplitz", "triu-toeplitz"))),
        "hierarchical": Config(_inverse_free(structure="hierarchical(2,1)"), (6, 2)),
    },
    "SAdaGrad": {
        "sum": Config(pr.SAdaGrad(size=3), (6,)),
        "average": Config(pr.SAdaGrad(size=2, beta2=0.75, delta=0.5), (6,)),
        "exact": Config(pr.SAdaGrad(size=9, beta2=0.75), (4,)),
        "size 1": Config(pr.SAdaGrad(size=1), (4,)),
        "gram64": Config(pr.SAdaGrad(size=3, beta2=0.75, delta=0.25, solver="gram64"), (6,)),
    },
    "SShampoo": {
        "sum": Config(pr.SShampoo(size=3)),
        "average": Config(pr.SShampoo(size=2, beta2=0.75, eps=0.25, tail_decay=0.5)),
        "relative": Config(pr.SShampoo(size=3, beta2=0.75, eps=0.25, relative_eps=True)),
        "every": Config(pr.SShampoo(size=2, beta2=0.75, eps=0.25, every=3), (3, 5)),
        "exact": Config(pr.SShampoo(size=9, eps=0.25)),
        "gram64": Config(pr.SShampoo(size=3, eps=0.25, solver="gram64")),
        "order 1": Config(pr.SShampoo(size=3), (5,)),
        "order 3": Config(pr.SShampoo(size=2, eps=0.25), (3, 4, 2)),
        "practical": Config(
            pr.SShampoo.practical(size=3, beta2=0.75, eps=0.25, graft_beta2=0.5, graft_eps=0.25, merge=1)
        ),
        "practical-sgd": Config(
            pr.SShampoo.practical(
                size=3,
                beta2=0.75,
                eps=0.25,
                relative_eps=False,
                every=2,
                graft="sgd",
                start=2,
                momentum=0.75,
                nesterov=False,
                momentum_ema=True,
                weight_decay=0.25,
                decay_after_momentum=False,
                merge=6,
            ),
            (2, 1, 3, 4),
        ),
        "practical-vector": Config(pr.SShampoo.practical(size=3, graft_beta2=1.0, graft_eps=0.25), (5,)),
        "practical-ungrafted": Config(
            pr.SShampoo.practical(size=3, beta2=0.75, eps=0.25, graft=None, momentum=0.0), (2, 3)
        ),
    },
    "AdaFD": {"default": Config(pr.AdaFD(size=3, delta=0.25), (6,))},
    "FDSON": {"default": Config(pr.FDSON(size=3, delta=0.5, learning_rate=0.25), (6,))},
    "RFDSON": {
        "default": Config(pr.RFDSON(size=3, delta=0.5, learning_rate=0.25), (6,)),
        "delta=0": Config(pr.RFDSON(size=3, delta=0.0, learning_rate=0.25), (6,)),
    },
    "SGD": {
        "plain": Config(pr.SGD()),
        "momentum": Config(pr.SGD(momentum=0.75)),
        "nesterov": Config(pr.SGD(momentum=0.75, nesterov=True), ()),
    },
    "AdaGrad": {"default": Config(pr.AdaGrad(eps=0.25, initial=0.5))},
    "FullAdaGrad": {
        "default": Config(pr.FullAdaGrad(eps=0.5)),
        "vector": Config(pr.FullAdaGrad(eps=0.5), (6,)),
    },
    "RMSProp": {
        "default": Config(pr.RMSProp(beta2=0.75, eps=0.25)),
        "momentum": Config(pr.RMSProp(beta2=0.75, eps=0.25, momentum=0.5)),
    },
    "Adam": {"default": Config(pr.Adam(beta1=0.75, beta2=0.875, eps=0.25))},
    "Shampoo": {
        "sum": Config(pr.Shampoo(eps=0.25)),
        "average": Config(pr.Shampoo(beta2=0.75, eps=0.25, bias_correction=True)),
        "every": Config(pr.Shampoo(beta2=0.75, eps=0.25, every=3)),
        "order 1": Config(pr.Shampoo(eps=0.25), (4,)),
        "order 3": Config(pr.Shampoo(eps=0.25), (3, 4, 2)),
    },
    "Muon": {
        "svd": Config(pr.Muon(momentum=0.75, root="svd")),
        "newton_schulz": Config(pr.Muon(momentum=0.75, nesterov=False, rms=None), (3, 5)),
    },
}

CONFIGS: dict[str, Config] = {
    f"{name}-{variant}": config for name, variants in LOUD.items() for variant, config in variants.items()
}
FIRST: list[str] = [f"{name}-{next(iter(variants))}" for name, variants in LOUD.items()]
"""The first configuration of each method."""
