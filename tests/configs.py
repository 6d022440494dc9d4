"""Configurations of every method in the registry, with loud hyperparameters: what "over all methods" tests run on.

A method without an entry in `LOUD` gets those of its vectors; `test_contract.py` fails until it has some.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import precond_ref as pr
from precond_ref.conformance import vectors
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


_ADAFACTOR = pr.Adafactor(eps1=0.0625, eps2=0.75, clip=0.75, decay_rate=0.875)
_KL = pr.KLShampoo(beta1=0.75, beta2=0.875, shampoo_beta=0.625, eps=0.25, every=3, initial=0.375)
_ADAM = pr.Adam(beta1=0.75, beta2=0.875, eps=0.25)
MILD = ((3.25, -4.0, 1.75), (1.875, -1.25, 0.375))

LOUD: dict[str, dict[str, Config]] = {
    "Adafactor": {
        "default": Config(_ADAFACTOR),
        "vector": Config(_ADAFACTOR, (7,)),
        "momentum": Config(_ADAFACTOR.replace(beta1=0.625, weight_decay=0.125), (2, 3, 4)),
        "largest": Config(_ADAFACTOR.replace(factored_axes="largest", min_size=2, beta1=0.625, momentum_of="update"),
            (4, 2, 3)),
        "floor": Config(pr.Adafactor.torch(eps1=0.0625, clip=0.75, decay_rate=0.875), (3, 5)),
        "adam": Config(_ADAFACTOR.replace(decay_schedule="adam", decay_rate=0.75, clip=None, factored_axes=None,
            parameter_scale=False)),
    },
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
        "conv schedule": Config(pr.MBF(kind="conv", damping=0.5, decay=0.5, momentum=0.5, statistics_every=2,
            inverse_every=4), (3, 2, 2, 2)),
        "diagonal": Config(pr.MBF(kind="diagonal"), (7,)),
    },
    "RFRMSProp": {
        "default": Config(pr.RFRMSProp(beta2=0.25, damping=0.125, batch_size=8.0, initial=0.5)),
        "momentum": Config(pr.RFRMSProp(beta2=0.5, damping=0.25, momentum=0.75, weight_decay=0.125, batch_size=2.0),
            ()),
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
        "default": Config(pr.IFShampoo(beta2=0.25, damping=0.25, momentum=0.5, riemannian_momentum=0.75,
            weight_decay=0.125, batch_size=2.0)),
        "plain": Config(_inverse_free(momentum=0.0, riemannian_momentum=0.0, clip=False), ()),
        "every": Config(_inverse_free(every=3), (1, 4)),
        "order 3": Config(_inverse_free(), (3, 1, 4, 2)),
        "diagonal, tril": Config(_inverse_free(structure=("diagonal", "tril"))),
        "triu, block-diagonal": Config(_inverse_free(structure=("triu", "block-diagonal(2)"))),
        "toeplitz": Config(_inverse_free(structure=("tril-toeplitz", "triu-toeplitz"))),
        "hierarchical": Config(_inverse_free(structure="hierarchical(2,1)"), (6, 2)),
    },
    "KLShampoo": {
        "default": Config(_KL.replace(start="identity")),
        "soap": Config(pr.KLShampoo.soap(beta1=0.75, beta2=0.875, eps=0.25, every=3, start="identity"), (3, 4)),
        "eigh": Config(_KL, (4, 3)),
        "soap-eigh": Config(_KL.replace(inner="adam"), (3, 4)),
        "identity": Config(_KL.replace(start="identity", damping=0.375, normalize=True, shampoo_beta=None, every=1), (5,
            2)),
        # of full rank when the basis turns, for columns beyond it are of rounding; the eigenvalues meet the clamp
        "vector": Config(_KL.replace(start="identity", shampoo_beta=0.75, clamp=11, every=13, initial=2**-10), (12,)),
        "order 3": Config(_KL.replace(every=1), (2, 1, 3, 2)),
        "exact": Config(pr.KLShampoo.exact(beta1=0.75, beta2=0.625, eps=0.25, initial=0.875)),
        "exact-every": Config(pr.KLShampoo.exact(beta1=0.75, beta2=0.625, eps=0.25, initial=0.875, every=3,
            exponent=0.375, bias_correction=True), (2, 3, 4)),
        "meta": Config(pr.KLShampoo.meta(beta1=0.75, beta2=0.625, eps=0.25, every=2), (3, 1)),
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
        "nystrom": Config(pr.SShampoo(size=3, beta2=0.75, eps=0.25, solver="nystrom"), (24, 23)),
        "order 1": Config(pr.SShampoo(size=3), (5,)),
        "order 3": Config(pr.SShampoo(size=2, eps=0.25), (3, 4, 2)),
        "practical": Config(pr.SShampoo.practical(size=3, beta2=0.75, eps=0.25, graft_beta2=0.5, graft_eps=0.25,
            merge=1)),
        "practical-sgd": Config(pr.SShampoo.practical(size=3, beta2=0.75, eps=0.25, relative_eps=False, every=2,
            graft="sgd", start=2, momentum=0.75, nesterov=False, momentum_ema=True, weight_decay=0.25,
            decay_after_momentum=False, merge=6), (2, 1, 3, 4)),
        "practical-vector": Config(pr.SShampoo.practical(size=3, graft_beta2=1.0, graft_eps=0.25), (5,)),
        "practical-ungrafted": Config(pr.SShampoo.practical(size=3, beta2=0.75, eps=0.25, graft=None, momentum=0.0), (2,
            3)),
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
    "AdaGrad": {
        "default": Config(pr.AdaGrad(eps=0.25, initial=0.5)),
        "inside": Config(pr.AdaGrad(eps=0.25, initial=0.375, eps_form="inside")),
    },
    "FullAdaGrad": {
        "default": Config(pr.FullAdaGrad(eps=0.5)),
        "vector": Config(pr.FullAdaGrad(eps=0.5), (6,)),
    },
    "RMSProp": {
        "default": Config(pr.RMSProp(beta2=0.75, eps=0.25)),
        "momentum": Config(pr.RMSProp(beta2=0.75, eps=0.25, momentum=0.5)),
        "centered": Config(pr.RMSProp(beta2=0.75, eps=0.25, momentum=0.625, centered=True, eps_form="inside",
            bias_correction=True, initial=0.375, nesterov=True)),
    },
    "Adam": {
        "default": Config(_ADAM),
        "amsgrad": Config(_ADAM.replace(amsgrad="uncorrected", eps_form="uncorrected")),
        "amsgrad-corrected": Config(_ADAM.replace(amsgrad="corrected", eps_root=0.0625)),
        "nadam": Config(_ADAM.replace(nesterov="constant", bias_correction="second")),
        "nadam-scheduled": Config(_ADAM.replace(nesterov="scheduled", momentum_decay=0.375)),
        "radam": Config(_ADAM.replace(rectify=True, eps_form="uncorrected", bias_correction="none"), (7,)),
    },
    "Shampoo": {
        "sum": Config(pr.Shampoo(eps=0.25)),
        "average": Config(pr.Shampoo(beta2=0.75, eps=0.25, bias_correction=True)),
        "every": Config(pr.Shampoo(beta2=0.75, eps=0.25, every=3)),
        "order 1": Config(pr.Shampoo(eps=0.25), (4,)),
        "order 3": Config(pr.Shampoo(eps=0.25), (3, 4, 2)),
        "production": Config(pr.Shampoo.production(beta1=0.75, beta3=0.625, beta2=0.875, eps=0.1875, every=2, start=3,
            graft="rmsprop", graft_beta2=0.6875, graft_eps=0.078125, momentum=0.5625, dampening=0.21875, nesterov=True,
            weight_decay=0.40625, target=None, exponents=(0.5, 0.25), trace_scaling=0.375)),
        "production-merged": Config(pr.Shampoo.production(beta1=0.75, beta2=0.875, eps=0.1875, target=2, max_dim=6,
            every=3), (2, 3, 1, 4)),
        "production-blocks": Config(pr.Shampoo.production(beta1=0.75, beta2=0.875, eps=0.1875, target=None, max_dim=3,
            graft="sgd", drop_weight=True, bias_correction=False)),
        "production-higher-order": Config(pr.Shampoo.production(beta1=0.75, beta2=0.875, eps=0.1875, target=None,
            root="higher_order", root_steps=3), (4, 3)),
    },
    "EShampoo": {
        "default": Config(pr.EShampoo(beta1=0.75, beta3=0.625, beta2=0.875, eps=0.1875, every=2, start=3,
            exponent=0.4375, graft="rmsprop", graft_beta2=0.6875, graft_eps=0.078125, momentum=0.5625,
            dampening=0.21875, nesterov=True, weight_decay=0.40625, target=None), (4, 3)),
        "qr": Config(pr.EShampoo(beta1=0.75, beta2=0.875, eps=0.1875, basis="qr", iterations=2, tolerance=0.25,
            target=2, max_dim=6, bias_correction=False), (2, 3, 1, 4)),
        "blocks": Config(pr.EShampoo(beta1=0.75, beta2=0.875, eps=0.1875, max_dim=3, target=None, graft="sgd",
            drop_weight=True), (5, 3)),
        "ignored": Config(pr.EShampoo(beta1=0.0, eps=0.1875, ignored_axes=(0, 1), target=None), (5, 2, 2)),
    },
    "SOAP": {
        "default": Config(pr.SOAP(beta1=0.75, beta2=0.875, eps=0.25, every=2), (4, 3)),
        "order 3": Config(pr.SOAP(beta1=0.75, beta2=0.875, shampoo_beta=0.625, eps=0.25, every=3,
            eps_position="corrected", normalize=True, normalize_eps=0.125, iterations=2, nesterov=True), (2, 3, 4)),
        "merged": Config(pr.SOAP(beta1=0.75, beta2=0.875, eps=0.25, every=2, eps_position="max", merge=True,
            channels_last=True, max_dim=6, sort="after", second_moment="rotate"), (3, 2, 2, 4)),
        "update first": Config(pr.SOAP(beta1=0.75, beta2=0.875, shampoo_beta=0.625, eps=0.25, every=1,
            order="update_first", basis="eigh", bias_correction=False), (4, 4)),
        "one side": Config(pr.SOAP(beta1=0.75, beta2=0.875, eps=0.25, every=2, max_dim=4), (5, 4)),
        "vector": Config(pr.SOAP(beta1=0.75, beta2=0.875, eps=0.25, every=2, vectors=True), (2,)),
    },
    "Muon": {
        "svd": Config(pr.Muon(momentum=0.75, root="svd")),
        "newton_schulz": Config(pr.Muon(momentum=0.75, nesterov=False, rms=None), (3, 5)),
        "sum": Config(pr.Muon(momentum=0.75, momentum_form="sum", coefficients=MILD, root_steps=3, after_last="cycle",
            normalization_factor=2.5, eps=0.375, eps_rule="max", scale="jordan", outputs="columns"), (3, 5)),
        "corrected": Config(pr.Muon(momentum=0.625, bias_correction=True, normalization="schatten4", eps=0.25,
            scale="ratio", blocks=2, dual_norm=True), (6, 4)),
        "flatten": Config(pr.Muon(momentum=0.875, nesterov_form="added", coefficients=(3.25, -4.0, 1.75),
            normalization="aol", layout="flatten", blocks=4), (4, 2, 3)),
        "batch": Config(pr.Muon(momentum=0.75, layout="batch", outputs="columns", rms=0.375), (2, 4, 3)),
        "axes": Config(pr.Muon(momentum=0.75, layout=((0, 1), (3,)), normalization="spectral", scale="jordan"),
            (2, 1, 3, 4)),
    },
    "NorMuon": {
        "row": Config(pr.NorMuon(momentum=0.75, beta2=0.875, eps=0.25, eps2=0.125, coefficients=MILD, root_steps=3)),
        "short": Config(pr.NorMuon(momentum=0.75, beta2=0.625, eps2=0.125, statistic="short", rescale="rms", blocks=3,
            rms=0.375, layout="flatten", normalization_factor=2.5), (6, 3, 2)),
        "blocks": Config(pr.NorMuon(momentum=0.625, beta2=0.875, eps2=0.25, rescale="none", blocks=2, outputs="columns",
            scale="max"), (3, 4)),
        "floor": Config(pr.NorMuon(momentum=0.75, beta2=0.625, eps2=0.125, eps2_rule="max"), (5, 3)),
    },
    "AdaMuon": {
        "sign": Config(pr.AdaMuon(momentum=0.75, beta2=0.875, eps=0.25, eps2=0.125, rms=0.375, coefficients=MILD,
            root_steps=3)),
        "plain": Config(pr.AdaMuon(momentum=0.75, beta2=0.625, eps2=0.125, sign=False, v_bias_correction=True,
            rescale="none", layout="flatten", blocks=2, normalization_factor=2.5), (4, 2, 3)),
        "norm": Config(pr.AdaMuon(momentum=0.75, beta2=0.625, eps2=0.125, rescale="norm", scale="jordan"), (5, 3)),
    },
}  # fmt: skip


def of_vectors(method: str) -> dict[str, Config]:
    """Return each configuration of the method's traces once, by the name of its first case."""
    short = [c for c in vectors.cases(method, kind="trace") if not (c.deep or c.generated or c.stack_ndim)]
    found = {Config(case.make(), case.shape): case.id.partition("/")[2] for case in reversed(short)}
    return {name: config for config, name in reversed(found.items())}


LOUD |= {name: found for name in pr.list_methods() if name not in LOUD and (found := of_vectors(name))}
CONFIGS: dict[str, Config] = {
    f"{name}-{variant}": config for name, variants in LOUD.items() for variant, config in variants.items()
}
FIRST: list[str] = [f"{name}-{next(iter(variants))}" for name, variants in LOUD.items()]
"""The first configuration of each method."""
