"""The forms of Adam, RMSProp and AdaGrad that came after version 1."""

from __future__ import annotations

from typing import Any

import numpy as np

from precond_ref.conformance.declarations.base import Case, integers, maker, with_zeros

ADAM: dict[str, Any] = {
    "beta1": 0.75,
    "beta2": 0.875,
    "eps": 0.1875,
    "eps_root": 0.0,
    "eps_form": "corrected",
    "amsgrad": None,
    "nesterov": None,
    "momentum_decay": None,
    "rectify": False,
    "bias_correction": "both",
}
RMSPROP: dict[str, Any] = {
    "beta2": 0.75,
    "eps": 0.1875,
    "momentum": 0.0,
    "centered": False,
    "eps_form": "outside",
    "bias_correction": False,
    "initial": 0.0,
    "nesterov": False,
}
ADAGRAD: dict[str, Any] = {"eps": 0.1875, "initial": 0.375, "eps_form": "outside"}
GIVEN: dict[str, Any] = {"lr": 0.34375, "version": 2}
SHRINKING = np.array([4, 2, 1, 0.5, 0.25])[:, None, None]

_adam, _adam_reject = maker("Adam", ADAM, (2, 3))
_rmsprop, _rmsprop_reject = maker("RMSProp", RMSPROP, (2, 3))
_adagrad, _adagrad_reject = maker("AdaGrad", ADAGRAD, (2, 3))


def adam(name: str, why: str, catches: str, *, seed: int, **change: Any) -> Case:
    """A trace of Adam on gradients that become smaller."""
    grads = integers(seed, (5, 2, 3)) * SHRINKING
    return _adam(f"form-{name}", why, catches, seed=seed, grads=grads, change=change, **GIVEN)


def rmsprop(name: str, why: str, catches: str, *, seed: int, **change: Any) -> Case:
    """A trace of RMSProp."""
    return _rmsprop(f"form-{name}", why, catches, seed=seed, change=change, **GIVEN)


CASES = [
    adam("eps-root", "An epsilon under the root too, after the correction.", "eps-root-ignored "
         "eps-root-before-correction", seed=600, eps_root=0.3125),
    adam("eps-hat", "epsilon beside the uncorrected root.", "eps-form-ignored", seed=601, eps_form="uncorrected"),
    adam("eps-hat-root", "Both.", "eps-form-ignored eps-root-ignored", seed=602, eps_form="uncorrected",
         eps_root=0.3125),
    adam("amsgrad", "The largest uncorrected square.", "amsgrad-ignored amsgrad-exchanged", seed=603,
         amsgrad="uncorrected"),
    adam("amsgrad-corrected", "The largest corrected square.", "amsgrad-ignored amsgrad-exchanged", seed=604,
         amsgrad="corrected"),
    adam("amsgrad-hat", "The largest square, and epsilon beside the uncorrected root.", "eps-form-ignored", seed=605,
         amsgrad="uncorrected", eps_form="uncorrected"),
    adam("amsgrad-root", "The largest corrected square, and an epsilon under the root.", "eps-root-ignored", seed=606,
         amsgrad="corrected", eps_root=0.3125),
    adam("nadam-constant", "NAdam with a constant momentum.", "nadam-ignored nadam-next", seed=607,
         nesterov="constant"),
    adam("nadam-scheduled", "NAdam with the schedule.", "nadam-ignored nadam-constant nadam-next nadam-late", seed=608,
         nesterov="scheduled", momentum_decay=0.375),
    adam("nadam-keras", "NAdam with the schedule of Keras.", "nadam-constant nadam-late", seed=609,
         nesterov="scheduled", momentum_decay=1.0),
    adam("nadam-uncorrected", "NAdam without corrections.", "correction-always", seed=610, nesterov="constant",
         bias_correction="none"),
    adam("second", "The square alone is corrected.", "correction-always no-correction-2", seed=611,
         bias_correction="second"),
    adam("uncorrected", "No corrections.", "correction-always", seed=612, bias_correction="none"),
    _adam("form-radam", "RAdam begins to divide at update 6.", "rectify-ignored rectify-four rectify-divided "
          "eps-form-ignored", seed=613, steps=9, change={"rectify": True, "eps_form": "uncorrected"}, **GIVEN),
    _adam("form-radam-corrected", "RAdam with epsilon beside the corrected root.", "rectify-ignored rectify-divided",
          seed=614, steps=9, change={"rectify": True, "beta2": 0.9375, "beta1": 0.625}, **GIVEN),
    _adam("form-nadam-zero", "NAdam after zero gradients, without epsilon.", seed=615,
          grads=with_zeros(615, (2, 3), 0, 1), change={"nesterov": "scheduled", "eps": 0.0}, tier="should", **GIVEN),
    _adam_reject("form-amsgrad", "An unknown maximum.", "amsgrad", amsgrad="largest", version=2),
    _adam_reject("form-eps-root", "A negative epsilon.", "eps_root", eps_root=-0.25, version=2),
    rmsprop("inside", "epsilon under the root.", "eps-outside", seed=620, eps_form="inside"),
    rmsprop("centered", "The square of the averaged gradient is subtracted.", "centered-ignored", seed=621,
            centered=True),
    rmsprop("centered-inside", "The same with epsilon under the root.", "centered-ignored eps-outside", seed=622,
            centered=True, eps_form="inside"),
    rmsprop("corrected", "A corrected average.", "correction-ignored", seed=623, bias_correction=True),
    rmsprop("centered-corrected", "Both averages corrected.", "correction-ignored mean-uncorrected", seed=624,
            bias_correction=True, centered=True),
    rmsprop("initial", "A start above zero.", "initial-ignored", seed=625, initial=0.375),
    rmsprop("nesterov", "The look-ahead of the heavy ball.", "nesterov-ignored", seed=626, momentum=0.625,
            nesterov=True),
    rmsprop("momentum", "The heavy ball alone.", "nesterov-always", seed=627, momentum=0.625, beta2=0.8125, eps=0.25),
    _rmsprop_reject("form-nesterov", "A look-ahead of nothing.", "nesterov", nesterov=True, version=2),
    _adagrad("form-inside", "epsilon under the root.", "eps-outside", seed=630, change={"eps_form": "inside"},
             **GIVEN),
    _adagrad("form-inside-zero", "The same from zero, with zero gradients.", "eps-outside", seed=631,
             grads=with_zeros(631, (2, 3), 0), change={"eps_form": "inside", "initial": 0.0, "eps": 0.25}, **GIVEN),
    _adagrad_reject("form-eps", "An unknown form.", "eps_form", eps_form="beside", version=2),
]  # fmt: skip
