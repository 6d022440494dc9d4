"""Optimizers of other packages as targets of ``precond-ref check``: each function maps our fields to their arguments.

`benchmarks/audit.py` runs all of `TARGETS`; one of them, in an environment that has its package::

    cd benchmarks && precond-ref check audit_targets:torch_optimizer_shampoo --method Shampoo

A function takes the fields that the package offers under our names; a case that needs another one is skipped and
counted, as is one for which the function raises NotImplementedError.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Target:
    """One row of the audit."""

    make: Callable[..., Any]
    method: str
    """Method with which the target is compared."""
    requires: tuple[str, ...]
    """Requirements for pip; the first is the audited package."""
    name: str
    """Name of the class or function in the package."""
    without_dependencies: bool = False
    """True if the first of ``requires`` is installed with ``--no-deps``."""
    dtype: str = "float64"
    """Precision of the check."""
    note: str = ""
    """A note for the reader about the row."""
    folder: str = ""
    """Of a repository, the first of ``requires``: where its modules are."""

    @property
    def package(self) -> str:
        """Name of the package."""
        return self.requires[0].partition("==")[0]

    @property
    def version(self) -> str:
        """Version of the package, commit of a repository."""
        return self.requires[0].partition("==")[2]

    @property
    def oldest(self) -> str:
        """The release from which on others are tried, of a repository the day; empty: none are."""
        return THREE_YEARS if self.repository else OLDEST.get(self.package, "")

    @property
    def repository(self) -> str:
        """Name of the repository, empty for a package of PyPI."""
        return self.package.partition("/")[2]

    @property
    def command(self) -> str:
        """The command that repeats the check, in the folder of this file."""
        precision = "" if self.dtype == "float64" else f" --dtype {self.dtype}"
        path = f"PYTHONPATH=../../{'/'.join(filter(None, (self.repository, self.folder)))} " if self.repository else ""
        return f"{path}precond-ref check audit_targets:{self.make.__name__} --method {self.method}{precision}"

    @property
    def install(self) -> str:
        """The command that makes its environment."""
        kit, (first, *others) = '-e ".[cli]"', self.requires
        if self.repository:
            source = f"git -C .. clone https://github.com/{self.package} && git -C ../{self.repository} checkout"
            return f"{source} {self.version} && pip install {' '.join([*others, kit])}"
        if self.without_dependencies:
            return f"pip install {' '.join([*others, kit])} && pip install --no-deps {first}"
        return f"pip install {' '.join([*self.requires, kit])}"


# ---- torch ----------------------------------------------------------------------------------------------------------


def torch_sgd(params: Any, lr: float, momentum: float, nesterov: bool) -> Any:
    """Its weight decay is added to the gradient: not the decoupled one of the cases."""
    import torch

    return torch.optim.SGD(params, lr=lr, momentum=momentum, nesterov=nesterov)


def torch_adam(params: Any, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> Any:
    """Adam with its option for decoupled weight decay."""
    import torch

    return torch.optim.Adam(
        params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, decoupled_weight_decay=True
    )


def torch_rmsprop(params: Any, lr: float, beta2: float, eps: float, momentum: float) -> Any:
    """Its weight decay is added to the gradient."""
    import torch

    return torch.optim.RMSprop(params, lr=lr, alpha=beta2, eps=eps, momentum=momentum)


def torch_adagrad(params: Any, lr: float, eps: float, initial: float) -> Any:
    """Its weight decay is added to the gradient."""
    import torch

    return torch.optim.Adagrad(params, lr=lr, eps=eps, initial_accumulator_value=initial)


def torch_adam_coupled(
    params: Any, lr: float, beta1: float, beta2: float, eps: float, amsgrad: str | None = None,
) -> Any:  # fmt: skip
    """Adam without weight decay, with its one form of AMSGrad."""
    import torch

    _only(amsgrad=(amsgrad, None, "uncorrected"))
    return torch.optim.Adam(params, lr=lr, betas=(beta1, beta2), eps=eps, amsgrad=amsgrad is not None)


def torch_adamw(params: Any, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> Any:
    """AdamW."""
    import torch

    return torch.optim.AdamW(params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)


def torch_nadam(
    params: Any, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, momentum_decay: float | None,
    nesterov: str | None = None,
) -> Any:  # fmt: skip
    """NAdam with its option for decoupled weight decay."""
    import torch

    _only(nesterov=(nesterov, "scheduled"))
    if momentum_decay is None:
        raise NotImplementedError("momentum_decay=None")
    return torch.optim.NAdam(
        params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, momentum_decay=momentum_decay,
        decoupled_weight_decay=True,
    )  # fmt: skip


def torch_radam(
    params: Any, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, rectify: bool = False,
    eps_form: str = "corrected",
) -> Any:  # fmt: skip
    """RAdam with its option for decoupled weight decay."""
    import torch

    _only(rectify=(rectify, True), eps_form=(eps_form, "uncorrected"))
    return torch.optim.RAdam(
        params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, decoupled_weight_decay=True
    )


def _only(**fields: tuple[Any, ...]) -> None:
    """Refuse a field whose value, the first of its tuple, is none of the other entries."""
    for name, (value, *offered) in fields.items():
        if value not in offered:
            raise NotImplementedError(f"{name}={value!r}")


def _digits(decay_rate: float) -> None:
    """Refuse a decay near zero: its 1 - t^-decay_rate is rounded before its use, and few digits are left."""
    if decay_rate < 2**-7:
        raise NotImplementedError(f"decay_rate={decay_rate}: few digits of 1 - t^-decay_rate are left")


def torch_adafactor(
    params: Any, lr: float, eps1: float | None, eps2: float, decay_rate: float, clip: float | None,
    eps_form: str = "square", parameter_scale: bool = True,
) -> Any:  # fmt: skip
    """Its rate is at most 1 / sqrt(t), and its clip must be 1 or more."""
    import torch

    _only(
        eps_form=(eps_form, "floor"),
        parameter_scale=(parameter_scale, True),
        clip=(clip is not None and clip >= 1, True),
    )
    return torch.optim.Adafactor(params, lr=lr, eps=(eps1, eps2), d=clip, beta2_decay=-decay_rate)  # type: ignore[arg-type]


def torch_muon(
    params: Any, lr: float, momentum: float, nesterov: bool, eps: float, root_steps: int, weight_decay: float,
) -> Any:  # fmt: skip
    """With its factor "original"."""
    import torch

    return torch.optim.Muon(
        params, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_steps=root_steps, eps=eps
    )


# ---- optax ----------------------------------------------------------------------------------------------------------


def optax_sgd(learning_rate: float, momentum: float, nesterov: bool) -> Any:
    """No weight decay."""
    import optax

    return optax.sgd(learning_rate, momentum=momentum or None, nesterov=nesterov)


def optax_adam(learning_rate: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> Any:
    """`optax.adam`, or `optax.adamw` with weight decay."""
    import optax

    if not weight_decay:
        return optax.adam(learning_rate, b1=beta1, b2=beta2, eps=eps)
    return optax.adamw(learning_rate, b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay)


def optax_rmsprop(learning_rate: float, beta2: float, eps: float, momentum: float) -> Any:
    """With its option to have eps outside the root, as here; no weight decay."""
    import optax

    return optax.rmsprop(learning_rate, decay=beta2, eps=eps, eps_in_sqrt=False, momentum=momentum or None)


def optax_adagrad(learning_rate: float, eps: float, initial: float) -> Any:
    """No weight decay."""
    import optax

    return optax.adagrad(learning_rate, initial_accumulator_value=initial, eps=eps)


def optax_nadam(
    learning_rate: float, beta1: float, beta2: float, eps: float, eps_root: float, nesterov: str | None = None
) -> Any:
    """No weight decay."""
    import optax

    _only(nesterov=(nesterov, "constant"))
    return optax.nadam(learning_rate, b1=beta1, b2=beta2, eps=eps, eps_root=eps_root)


def optax_amsgrad(
    learning_rate: float, beta1: float, beta2: float, eps: float, eps_root: float, amsgrad: str | None = None
) -> Any:
    """No weight decay."""
    import optax

    _only(amsgrad=(amsgrad, "corrected"))
    return optax.amsgrad(learning_rate, b1=beta1, b2=beta2, eps=eps, eps_root=eps_root)


def optax_radam(
    learning_rate: float, beta1: float, beta2: float, eps: float, eps_root: float, rectify: bool = False
) -> Any:
    """No weight decay."""
    import optax

    _only(rectify=(rectify, True))
    return optax.radam(learning_rate, b1=beta1, b2=beta2, eps=eps, eps_root=eps_root)


def optax_adafactor(
    learning_rate: float, eps1: float | None, eps2: float, decay_rate: float, clip: float | None, beta1: float,
    min_size: int, parameter_scale: bool = True, factored_axes: str | None = "last",
) -> Any:  # fmt: skip
    """What `optax.adafactor` is made of; the factored axes are the two largest, which of a matrix are the last two."""
    import optax

    _digits(decay_rate)

    def init(params: Any) -> Any:
        if factored_axes not in (None, "largest") and (factored_axes != "last" or any(p.ndim > 2 for p in params)):
            raise NotImplementedError(f"factored_axes={factored_axes!r}")
        return made.init(params)

    made = optax.chain(
        optax.scale_by_factored_rms(factored_axes is not None, decay_rate, 0, min_size, eps1),
        *(() if clip is None else (optax.clip_by_block_rms(clip),)),
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
        *((optax.scale_by_param_block_rms(eps2),) if parameter_scale else ()),
        *((optax.ema(beta1, debias=False),) if beta1 else ()),
        optax.scale(-1.0),
    )
    return optax.GradientTransformationExtraArgs(init, made.update)


def optax_muon(
    learning_rate: float, momentum: float, nesterov: bool, eps: float, root_steps: int, weight_decay: float,
    rms: float | None, normalization: str, dual_norm: bool,
) -> Any:  # fmt: skip
    """All fields have their like."""
    import optax

    return optax.contrib.muon(
        learning_rate, beta=momentum, nesterov=nesterov, eps=eps, ns_steps=root_steps, weight_decay=weight_decay,
        consistent_rms=rms, preconditioning="schatten" if normalization == "schatten4" else normalization,
        adaptive=dual_norm,
    )  # fmt: skip


# ---- torch_optimizer, pytorch_optimizer -----------------------------------------------------------------------------


def torch_optimizer_shampoo(params: Any, lr: float, eps: float, every: int) -> Any:
    """No average; its weight decay is added to the gradient."""
    import torch_optimizer

    return torch_optimizer.Shampoo(params, lr=lr, epsilon=eps, update_freq=every)


def pytorch_optimizer_shampoo(params: Any, lr: float, eps: float, every: int, weight_decay: float) -> Any:
    """No average."""
    import pytorch_optimizer

    return pytorch_optimizer.Shampoo(
        params, lr=lr, matrix_eps=eps, preconditioning_compute_steps=every, weight_decay=weight_decay,
        weight_decouple=True,
    )  # fmt: skip


def pytorch_optimizer_soap(
    params: Any, lr: float, beta1: float, beta2: float, shampoo_beta: float | None, eps: float, every: int,
    max_dim: int, merge: bool, channels_last: bool, vectors: bool, normalize: bool, normalize_eps: float,
    bias_correction: bool, weight_decay: float,
) -> Any:  # fmt: skip
    """Its normalize_eps is eps; weight decay comes after the step."""
    import pytorch_optimizer

    if normalize and normalize_eps != eps:
        raise NotImplementedError(f"normalize_eps={normalize_eps}")
    return pytorch_optimizer.SOAP(
        params, lr=lr, betas=(beta1, beta2), shampoo_beta=shampoo_beta, eps=eps,
        precondition_frequency=every, max_precondition_dim=max_dim, merge_dims=merge,
        data_format="channels_last" if channels_last else "channels_first", precondition_1d=vectors,
        normalize_gradient=normalize, correct_bias=bias_correction, weight_decay=weight_decay,
    )  # fmt: skip


def pytorch_optimizer_scalable_asgo(
    params: Any, lr: float, beta1: float, beta2: float, eps: float, every: int, weight_decay: float,
    side: str = "smaller", rms: float | None = None,
) -> Any:  # fmt: skip
    """ScalableShampoo on one side: exponent -1/2, the average of G G^T or G^T G, no grafting."""
    import pytorch_optimizer
    from pytorch_optimizer.optimizer.utils.partition import PreConditionerType

    if rms is not None:
        raise NotImplementedError(f"rms={rms}")
    if side == "smaller" and len({p.shape[0] < p.shape[1] for p in params}) > 1:
        raise NotImplementedError("one side for all parameters")
    left = side == "left" or (side == "smaller" and params[0].shape[0] < params[0].shape[1])
    return pytorch_optimizer.ScalableShampoo(
        params, lr=lr, betas=(beta1, beta2), matrix_eps=eps, preconditioning_compute_steps=every,
        weight_decay=weight_decay, decoupled_weight_decay=True, moving_average_for_momentum=True, nesterov=False,
        graft_type=0, shape_interpretation=False, use_svd=True, start_preconditioning_step=1,
        pre_conditioner_type=PreConditionerType.INPUT if left else PreConditionerType.OUTPUT,
    )  # fmt: skip


def pytorch_optimizer_muon(
    params: Any, lr: float, momentum: float, nesterov: bool, root_steps: int, weight_decay: float
) -> Any:
    """With its factor of Jordan."""
    import pytorch_optimizer

    return pytorch_optimizer.Muon(
        [{"params": params, "use_muon": True}], lr=lr, momentum=momentum, nesterov=nesterov, ns_steps=root_steps,
        weight_decay=weight_decay,
    )  # fmt: skip


def pytorch_optimizer_adamuon(
    params: Any, lr: float, momentum: float, beta2: float, root_steps: int, weight_decay: float
) -> Any:
    """Its factor is 0.2 sqrt(m n)."""
    import pytorch_optimizer

    return pytorch_optimizer.AdaMuon(
        [{"params": params, "use_muon": True}], lr=lr, betas=(momentum, beta2), ns_steps=root_steps,
        weight_decay=weight_decay,
    )  # fmt: skip


def pytorch_optimizer_normuon(
    params: Any, lr: float, momentum: float, beta2: float, nesterov: bool, root_steps: int, weight_decay: float
) -> Any:
    """With its factor of Jordan."""
    import pytorch_optimizer

    return pytorch_optimizer.NorMuon(
        [{"params": params, "use_muon": True}], lr=lr, momentum=momentum, beta2=beta2, nesterov=nesterov,
        ns_steps=root_steps, weight_decay=weight_decay,
    )  # fmt: skip


# ---- timm, transformers, optimi, muon-optimizer, heavyball, bitsandbytes ---------------------------------------------


def _tensors(params: Any) -> list[Any]:
    """Return the parameters, also those in groups."""
    return [p for entry in params for p in (entry["params"] if isinstance(entry, dict) else [entry])]


@cache
def _timm(module: str) -> Any:
    """Return a module of timm.optim from its file, because importing the package needs its dependencies."""
    package = importlib.util.find_spec("timm")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("timm is not installed", name="timm")
    bare = sys.modules.setdefault("timm_optim_files", types.ModuleType("timm_optim_files"))
    bare.__path__ = [str(Path(package.submodule_search_locations[0], "optim"))]
    return importlib.import_module(f"timm_optim_files.{module}")


def timm_adamw(
    params: Any, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, amsgrad: str | None = None,
) -> Any:  # fmt: skip
    """With its one form of AMSGrad."""
    _only(amsgrad=(amsgrad, None, "uncorrected"))
    return _timm("adamw").AdamWLegacy(
        params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, amsgrad=amsgrad is not None
    )


def timm_nadamw(
    params: Any, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, nesterov: str | None = None
) -> Any:
    """Its momentum is constant."""
    _only(nesterov=(nesterov, "constant"))
    return _timm("nadamw").NAdamW(params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)


def timm_nadam(
    params: Any, lr: float, beta1: float, beta2: float, eps: float, momentum_decay: float | None,
    nesterov: str | None = None,
) -> Any:  # fmt: skip
    """Its weight decay is added to the gradient."""
    _only(nesterov=(nesterov, "scheduled"))
    return _timm("nadam").NAdamLegacy(
        params, lr=lr, betas=(beta1, beta2), eps=eps, schedule_decay=0.004 if momentum_decay is None else momentum_decay
    )


def timm_radam(
    params: Any, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, rectify: bool = False,
    eps_form: str = "corrected",
) -> Any:  # fmt: skip
    """All fields have their like."""
    _only(rectify=(rectify, True), eps_form=(eps_form, "uncorrected"))
    return _timm("radam").RAdamLegacy(params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)


def timm_adafactor(
    params: Any, lr: float, eps1: float | None, decay_rate: float, clip: float | None, beta1: float, min_size: int,
    weight_decay: float, eps2: float, parameter_scale: bool = True, factored_axes: str | None = "last",
) -> Any:  # fmt: skip
    """With a given learning rate it has no scale; its factored axes are longer than its least size."""
    _only(parameter_scale=(parameter_scale, False))
    if factored_axes != "leading" and (factored_axes != "last" or any(p.ndim > 2 for p in _tensors(params))):
        raise NotImplementedError(f"factored_axes={factored_axes!r}")
    return _timm("adafactor").Adafactor(
        params, lr=lr, eps=eps1, eps_scale=eps2, clip_threshold=math.inf if clip is None else clip,
        decay_rate=-decay_rate, betas=(beta1, 0.0) if beta1 else None, min_dim_size_to_factor=min_size - 1,
        weight_decay=weight_decay,
    )  # fmt: skip


def timm_adafactor_big_vision(
    params: Any, lr: float, eps1: float | None, decay_rate: float, decay_offset: int, beta2_cap: float, beta1: float,
    clip: float | None, min_size: int, eps2: float, parameter_scale: bool = True,
    factored_axes: str | None = "last", momentum_of: str = "step",
) -> Any:  # fmt: skip
    """No scale; the factored axes are the two largest, which of a matrix are the last two."""
    import torch

    _only(parameter_scale=(parameter_scale, False), momentum_of=(momentum_of, "update", *(() if beta1 else ("step",))))
    if factored_axes != "largest" and (factored_axes != "last" or any(p.ndim > 2 for p in _tensors(params))):
        raise NotImplementedError(f"factored_axes={factored_axes!r}")
    return _timm("adafactor_bv").AdafactorBigVision(
        params, lr=lr, min_dim_size_to_factor=min_size, decay_rate=decay_rate, decay_offset=decay_offset,
        beta2_cap=beta2_cap, momentum=beta1 or None, momentum_dtype=torch.float64, eps=eps1, clipping_threshold=clip,
    )  # fmt: skip


def timm_muon(
    params: Any, lr: float, momentum: float, nesterov: bool, eps: float, root_steps: int, weight_decay: float,
) -> Any:  # fmt: skip
    """With its factor and its coefficients "original"; small and long parameters go to AdamW."""
    if unsuitable := [tuple(p.shape) for p in _tensors(params) if not _timm("muon")._is_suitable_for_muon(p)]:
        raise NotImplementedError(f"shape {unsuitable[0]}")
    return _timm("muon").Muon(
        params, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_steps=root_steps,
        ns_coefficients="original", eps=eps, adjust_lr_fn="original",
    )  # fmt: skip


def transformers_adafactor(
    params: Any, lr: float, eps1: float | None, eps2: float, decay_rate: float, clip: float | None, beta1: float,
    parameter_scale: bool, weight_decay: float,
) -> Any:  # fmt: skip
    """With a given learning rate; no clip is a clip at infinity."""
    from transformers import Adafactor

    _digits(decay_rate)
    return Adafactor(
        params, lr=lr, eps=(eps1, eps2), clip_threshold=math.inf if clip is None else clip, decay_rate=-decay_rate,
        beta1=beta1 or None, weight_decay=weight_decay, scale_parameter=parameter_scale, relative_step=False,
    )  # fmt: skip


def optimi_sgd(params: Any, lr: float, momentum: float, weight_decay: float) -> Any:
    """No Nesterov."""
    import optimi

    return optimi.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay, decouple_wd=True)


def optimi_adam(params: Any, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> Any:
    """With decoupled weight decay."""
    import optimi

    return optimi.Adam(params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, decouple_wd=True)


def optimi_radam(
    params: Any, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, rectify: bool = False
) -> Any:
    """With decoupled weight decay."""
    import optimi

    _only(rectify=(rectify, True))
    return optimi.RAdam(params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, decouple_wd=True)


def muon_optimizer_muon(params: Any, lr: float, momentum: float, weight_decay: float) -> Any:
    """Nesterov's form, five steps."""
    import muon

    return muon.SingleDeviceMuon(params, lr=lr, momentum=momentum, weight_decay=weight_decay)


def muon_optimizer_adam(params: Any, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> Any:
    """The class's part for other parameters."""
    import muon

    given = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay, "use_muon": False}
    groups = params if isinstance(params[0], dict) else [{"params": params}]
    return muon.SingleDeviceMuonWithAuxAdam([group | given for group in groups])


def _heavyball(name: str, params: Any, **options: Any) -> Any:
    """One of its optimizers: not compiled, the state in the parameters' precision, gradients kept."""
    import heavyball

    heavyball.utils.compile_mode = None
    precision = str(_tensors(params)[0].dtype).removeprefix("torch.")
    return getattr(heavyball, name)(params, storage_dtype=precision, consume_grad=False, **options)


def heavyball_muon(params: Any, lr: float, momentum: float, heavyball_momentum: bool, weight_decay: float) -> Any:
    """Five steps with its own coefficients."""
    return _heavyball(
        "Muon", params, lr=lr, betas=(momentum, 0.99), heavyball_momentum=heavyball_momentum,
        weight_decay=weight_decay,
    )  # fmt: skip


def heavyball_soap(
    params: Any, lr: float, beta1: float, beta2: float, shampoo_beta: float | None, eps: float, every: int,
    max_dim: int, merge: bool, vectors: bool, normalize: bool, normalize_eps: float, weight_decay: float,
    eps_position: str = "uncorrected",
) -> Any:  # fmt: skip
    """With a constant interval."""
    _only(eps_position=(eps_position, "max"), merge=(merge, False), normalize=(normalize, False))
    return _heavyball(
        "SOAP", params, lr=lr, betas=(beta1, beta2), shampoo_beta=beta2 if shampoo_beta is None else shampoo_beta,
        eps=eps, precondition_frequency=every, max_precond_dim=max_dim, merge_dims=merge, precondition_1d=vectors,
        weight_decay=weight_decay, use_precond_schedule=False,
    )  # fmt: skip


def bitsandbytes_adam(params: Any, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> Any:
    """Its state in 32 bits."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW(params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)


# ---- keras ----------------------------------------------------------------------------------------------------------


def _keras_step(param: Any, grad: Any, state: Any, name: str, **arguments: Any) -> Any:
    """One step of an optimizer of this name, made anew with the state of the one before."""
    import os

    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    keras.config.set_floatx(str(param.dtype))
    variable = keras.Variable(param, dtype=str(param.dtype))
    optimizer = getattr(keras.optimizers, name)(**arguments)
    optimizer.build([variable])
    rate, state = arguments["learning_rate"], state or [v.numpy() for v in optimizer.variables]
    for own, saved in zip(optimizer.variables, state, strict=True):
        own.assign(saved)
    optimizer.learning_rate = rate
    optimizer.apply([keras.ops.convert_to_tensor(grad, dtype=str(param.dtype))], [variable])
    return variable.numpy(), [v.numpy() for v in optimizer.variables]


def keras_sgd(
    param: Any, grad: Any, state: Any, *, lr: float, momentum: float, nesterov: bool, weight_decay: float
) -> Any:
    """All fields have their like."""
    return _keras_step(
        param, grad, state, "SGD", learning_rate=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay
    )


def keras_adam(
    param: Any, grad: Any, state: Any, *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    eps_form: str = "corrected", amsgrad: str | None = None,
) -> Any:  # fmt: skip
    """Its eps is beside the uncorrected root, and its AMSGrad of uncorrected squares."""
    _only(eps_form=(eps_form, "uncorrected"), amsgrad=(amsgrad, None, "uncorrected"))
    return _keras_step(
        param, grad, state, "Adam", learning_rate=lr, beta_1=beta1, beta_2=beta2, epsilon=eps,
        weight_decay=weight_decay, amsgrad=amsgrad is not None,
    )  # fmt: skip


def keras_nadam(
    param: Any, grad: Any, state: Any, *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    momentum_decay: float | None = None, nesterov: str | None = None,
) -> Any:  # fmt: skip
    """Its schedule has a decay of one."""
    _only(nesterov=(nesterov, "scheduled"), momentum_decay=(momentum_decay, 1.0))
    return _keras_step(
        param, grad, state, "Nadam", learning_rate=lr, beta_1=beta1, beta_2=beta2, epsilon=eps,
        weight_decay=weight_decay,
    )  # fmt: skip


def keras_rmsprop(
    param: Any, grad: Any, state: Any, *, lr: float, beta2: float, eps: float, momentum: float, centered: bool,
    weight_decay: float, eps_form: str = "outside",
) -> Any:  # fmt: skip
    """Its eps is under the root, and the learning rate in the momentum."""
    _only(eps_form=(eps_form, "inside"))
    return _keras_step(
        param, grad, state, "RMSprop", learning_rate=lr, rho=beta2, epsilon=eps, momentum=momentum, centered=centered,
        weight_decay=weight_decay,
    )  # fmt: skip


def keras_adagrad(
    param: Any, grad: Any, state: Any, *, lr: float, eps: float, initial: float, weight_decay: float,
    eps_form: str = "outside",
) -> Any:  # fmt: skip
    """Its eps is under the root."""
    _only(eps_form=(eps_form, "inside"))
    return _keras_step(
        param, grad, state, "Adagrad", learning_rate=lr, epsilon=eps, initial_accumulator_value=initial,
        weight_decay=weight_decay,
    )  # fmt: skip


def keras_adafactor(
    param: Any, grad: Any, state: Any, *, lr: float, eps1: float | None, eps2: float, decay_rate: float,
    clip: float | None,
) -> Any:  # fmt: skip
    """Without its relative step."""
    _digits(decay_rate)
    return _keras_step(
        param, grad, state, "Adafactor", learning_rate=lr, beta_2_decay=-decay_rate, epsilon_1=eps1, epsilon_2=eps2,
        clip_threshold=math.inf if clip is None else clip, relative_step=False,
    )  # fmt: skip


# ---- atorch ---------------------------------------------------------------------------------------------------------


@cache
def _atorch_agd() -> Any:
    """The class from its file: importing the package needs its dependencies."""
    package = importlib.util.find_spec("atorch")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("atorch is not installed", name="atorch")
    file = Path(package.submodule_search_locations[0], "optimizers", "agd.py")
    found = importlib.util.spec_from_file_location("atorch_agd_file", file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.AGD


def atorch_agd(
    params: Any, lr: float, beta1: float, beta2: float, delta: float, amsgrad: bool, clip: float | None,
    weight_decay: float,
) -> Any:  # fmt: skip
    """All fields have the same names."""
    return _atorch_agd()(
        params, lr=lr, betas=(beta1, beta2), delta=delta, amsgrad=amsgrad, clip=clip, weight_decay=weight_decay
    )


# ---- sirfshampoo, singd ---------------------------------------------------------------------------------------------


def sirfshampoo(
    params: Any, lr: float, beta2: float, damping: float, momentum: float, riemannian_momentum: float,
    weight_decay: float, batch_size: float, every: int, structure: Any = "dense", optimizer: Any = None,
) -> Any:  # fmt: skip
    """Its parameters belong to a module; the one structure that it offers is "dense"."""
    import torch
    from sirfshampoo import SIRFShampoo

    optimizer = optimizer or SIRFShampoo
    names = (structure,) if isinstance(structure, str) else structure
    if missing := [name for name in names if name not in optimizer.SUPPORTED_STRUCTURES]:
        raise NotImplementedError(f"structure={missing[0]!r}")
    order = sum(d != 1 for d in params[0].shape) or 1
    return optimizer(
        torch.nn.ParameterList(params), lr=lr, beta2=beta2, lam=damping, alpha1=momentum, alpha2=riemannian_momentum,
        kappa=weight_decay, batch_size=batch_size, T=every,
        structures=structure if isinstance(structure, str) else {order: tuple(structure)},
    )  # fmt: skip


def singd(
    params: Any, lr: float, beta2: float, damping: float, momentum: float, riemannian_momentum: float,
    weight_decay: float, batch_size: float, every: int, structure: Any = "dense",
) -> Any:  # fmt: skip
    """The same optimizer with singd's other structures in its table."""
    from singd.structures.diagonal import DiagonalMatrix
    from singd.structures.triltoeplitz import TrilToeplitzMatrix
    from singd.structures.triutoeplitz import TriuToeplitzMatrix
    from sirfshampoo import SIRFShampoo

    table = {"diagonal": DiagonalMatrix, "tril-toeplitz": TrilToeplitzMatrix, "triu-toeplitz": TriuToeplitzMatrix}
    sized = [name for name in ((structure,) if isinstance(structure, str) else structure) if "(" in name]

    class Structured(SIRFShampoo):  # type: ignore[misc, unused-ignore]
        SUPPORTED_STRUCTURES = SIRFShampoo.SUPPORTED_STRUCTURES | table | {name: _singd_class(name) for name in sized}

    return sirfshampoo(
        params, lr, beta2, damping, momentum, riemannian_momentum, weight_decay, batch_size, every, structure,
        Structured,
    )  # fmt: skip


@cache
def _singd_class(structure: str) -> Any:
    """singd's template for ``block-diagonal(b)`` or ``hierarchical(k1,k2)``, with these sizes."""
    from singd.structures.blockdiagonal import BlockDiagonalMatrixTemplate
    from singd.structures.hierarchical import HierarchicalMatrixTemplate

    kind, _, rest = structure.rstrip(")").partition("(")
    sizes = [int(size) for size in rest.split(",")]
    base: Any = BlockDiagonalMatrixTemplate if kind == "block-diagonal" else HierarchicalMatrixTemplate
    names = ["BLOCK_DIM"] if kind == "block-diagonal" else ["MAX_K1", "MAX_K2"]
    name = "_".join([kind.title().replace("-", ""), *map(str, sizes)])
    made = type(name, (base,), dict(zip(names, sizes, strict=True)) | {"__module__": __name__})
    globals()[name] = made  # where pickle looks for it
    return made


# ---- official codes that are on no index ----------------------------------------------------------------------------


def soap_authors(
    params: Any, lr: float, beta1: float, beta2: float, shampoo_beta: float | None, eps: float, every: int,
    max_dim: int, merge: bool, channels_last: bool, vectors: bool, normalize: bool, normalize_eps: float,
    bias_correction: bool, weight_decay: float,
) -> Any:  # fmt: skip
    """Weight decay comes after the step."""
    import soap

    if normalize and normalize_eps != 1e-30:
        raise NotImplementedError(f"normalize_eps={normalize_eps}")
    return soap.SOAP(
        params, lr=lr, betas=(beta1, beta2), shampoo_beta=-1 if shampoo_beta is None else shampoo_beta, eps=eps,
        weight_decay=weight_decay, precondition_frequency=every, max_precond_dim=max_dim, merge_dims=merge,
        precondition_1d=vectors, normalize_grads=normalize, correct_bias=bias_correction,
        data_format="channels_last" if channels_last else "channels_first",
    )  # fmt: skip


@cache
def _uncompiled() -> None:
    """What is decorated with torch.compile runs as it is."""
    import torch

    torch.compiler.set_stance("force_eager")


def kl_methods(
    params: Any, lr: float, beta1: float, beta2: float, shampoo_beta: float | None, eps: float, every: int,
    initial: float, clamp: int | None, damping: float, inner: str, normalize: bool, weight_decay: float,
) -> Any:  # fmt: skip
    """In the parameters' precision; its damping is 0 or eps; weight decay comes after the step."""
    _uncompiled()
    from optim.kl_opt import KLOpt

    _only(damping=(damping, 0.0, eps))
    if few := [tuple(p.shape) for p in _tensors(params) if not 2 <= sum(d > 1 for d in p.shape) <= 3]:
        raise NotImplementedError(f"shape {few[0]}")
    return KLOpt(
        params, lr=lr, betas=(beta1, beta2), shampoo_beta=-1 if shampoo_beta is None else shampoo_beta, eps=eps,
        weight_decay=weight_decay, precondition_frequency=every, using_klsoap=inner == "adam",
        normalize_grads=normalize, init_factor=initial, using_damping=damping > 0, using_clamping=clamp is not None,
        max_clamp_value=clamp or 0, cast_dtype=_tensors(params)[0].dtype,
    )  # fmt: skip


def _distributed_shampoo(
    params: Any, config: Any, lr: float, *, beta1: float, beta3: float | None, beta2: float, eps: float, every: int,
    start: int | None, bias_correction: bool, graft: str | None, graft_beta2: float, graft_eps: float,
    momentum: float, dampening: float, nesterov: bool, weight_decay: float, decay_form: str, max_dim: int,
    target: int | None,
) -> Any:  # fmt: skip
    """With a configuration of the preconditioner."""
    import distributed_shampoo as ds
    from distributed_shampoo.shampoo_types import ClassicMomentumConfig

    if eps == 0:
        raise NotImplementedError("eps=0")
    grafts = {
        "sgd": ds.SGDPreconditionerConfig, "adagrad": lambda: ds.AdaGradPreconditionerConfig(epsilon=graft_eps),
        "rmsprop": lambda: ds.RMSpropPreconditionerConfig(beta2=graft_beta2, epsilon=graft_eps),
        "adam": lambda: ds.AdamPreconditionerConfig(beta2=graft_beta2, epsilon=graft_eps),
    }  # fmt: skip
    average = ClassicMomentumConfig(momentum=momentum, dampening=dampening, use_nesterov=nesterov) if momentum else None
    return ds.DistributedShampoo(
        params, lr=lr, betas=(beta1, beta2), beta3=-1.0 if beta3 is None else beta3, epsilon=eps,
        weight_decay=weight_decay, weight_decay_type=ds.WeightDecayType(decay_form.upper()),
        max_preconditioner_dim=max_dim, precondition_frequency=every,
        start_preconditioning_step=-1 if start is None else start, use_bias_correction=bias_correction,
        iterate_averaging_config=average, grafting_config=None if graft is None else grafts[graft](),
        distributed_config=ds.SingleDeviceDistributedConfig(
            target_parameter_dimensionality=math.inf if target is None else target
        ),
        preconditioner_config=config,
    )  # fmt: skip


def _of_distributed_shampoo(config: Callable[..., Any]) -> Callable[..., Any]:
    """Return the target whose preconditioner ``config`` makes; it has the fields of both functions."""
    own = inspect.signature(config)
    shared = [p for p in inspect.signature(_distributed_shampoo).parameters.values() if p.name != "config"]

    @wraps(config)
    def target(params: Any, lr: float, **fields: Any) -> Any:
        made = config(**{name: fields.pop(name) for name in own.parameters if name in fields})
        return _distributed_shampoo(params, made, lr, **fields)

    more = [p.replace(kind=p.KEYWORD_ONLY) for p in own.parameters.values()]
    target.__signature__ = own.replace(parameters=shared + more)  # type: ignore[attr-defined]
    return target


@_of_distributed_shampoo
def distributed_shampoo(drop_weight: bool, exponents: Any, trace_scaling: float, root: str) -> Any:
    """With roots by eigendecomposition."""
    import distributed_shampoo as ds

    _only(root=(root, "eigh"))
    powers = {axis: power for axis, power in enumerate(exponents) if power is not None}
    scaled = {"use_trace_scaling": True, "trace_scaling_exponent": trace_scaling} if trace_scaling else {}
    return ds.RootInvShampooPreconditionerConfig(
        drop_weighting_factor_on_gsquare=drop_weight,
        inverse_exponent_override={
            order: {axis: power for axis, power in powers.items() if axis < order} for order in range(1, 5)
        },
        **scaled,
    )


@_of_distributed_shampoo
def distributed_eshampoo(
    drop_weight: bool, exponent: float, tolerance: float, iterations: int, ignored_axes: Any, basis: str = "eigh"
) -> Any:
    """Its QR, from columns in ascending order, is `basis="qr_meta"`."""
    import distributed_shampoo as ds

    _only(basis=(basis, "eigh", "qr_meta"))
    how = ds.EighEigendecompositionConfig(tolerance=tolerance)
    if basis == "qr_meta":
        how = ds.QREigendecompositionConfig(tolerance=tolerance, max_iterations=iterations)
    return ds.EigenvalueCorrectedShampooPreconditionerConfig(
        amortized_computation_config=how, drop_weighting_factor_on_gsquare=drop_weight,
        inverse_exponent_override=dict.fromkeys(range(5), exponent),
        ignored_basis_change_dims={n: [axis for axis in ignored_axes if axis < n] for n in range(1, 5)},
    )  # fmt: skip


def distributed_klshampoo(
    params: Any, lr: float, beta1: float, beta2: float, eps: float, every: int, initial: float,
    exponent: float | None, divide: bool, bias_correction: bool, weight_decay: float,
) -> Any:  # fmt: skip
    """Its statistics start at zero and are not divided; it renews at multiples of its interval."""
    import distributed_shampoo as ds

    _only(every=(every, 1), initial=(initial, 0.0), divide=(divide, False))
    override = {} if exponent is None else dict.fromkeys(range(5), exponent)
    return _distributed_shampoo(
        params, ds.RootInvKLShampooPreconditionerConfig(inverse_exponent_override=override), lr, beta1=beta1,
        beta3=None, beta2=beta2, eps=eps, every=every, start=None, bias_correction=bias_correction, graft=None,
        graft_beta2=0.0, graft_eps=0.0, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=weight_decay,
        decay_form="decoupled", max_dim=1024, target=None,
    )  # fmt: skip


def dion_muon_alone(params: Any, lr: float, momentum: float, nesterov: bool, eps: float, weight_decay: float) -> Any:
    """With its factor "spectral_norm" and its own coefficients."""
    _uncompiled()
    import dion

    return dion.Muon(params, lr=lr, mu=momentum, nesterov=nesterov, epsilon=eps, weight_decay=weight_decay)


def dion_normuon_alone(params: Any, lr: float, momentum: float, beta2: float, weight_decay: float) -> Any:
    """With its factor "spectral_norm" and its own coefficients."""
    _uncompiled()
    import dion

    return dion.NorMuon(params, lr=lr, mu=momentum, muon_beta2=beta2, weight_decay=weight_decay)


@cache
def _emerging(module: str) -> Any:
    """A module of it; Python 3.11 has no `typing.override`."""
    import typing

    if not hasattr(typing, "override"):
        typing.override = lambda function: function  # type: ignore[attr-defined, unused-ignore]
    return importlib.import_module(f"emerging_optimizers.{module}")


def emerging_muon(
    params: Any, lr: float, momentum: float, nesterov: bool, root_steps: int, rms: float | None, weight_decay: float,
    coefficients: Any = "quintic5",
) -> Any:  # fmt: skip
    """With its factor "spectral"; it has no form without a factor."""
    if rms is None:
        raise NotImplementedError("rms=None")
    names = {"quintic5": "quintic", "jordan": "simple", "cans": "cans", "deepseekv4": "deepseekv4", "cubic5": "cubic5"}
    if not isinstance(coefficients, str) or coefficients not in names:
        raise NotImplementedError(f"coefficients={coefficients!r}")
    return _emerging("orthogonalized_optimizers").Muon(
        params, lr=lr, momentum=momentum, nesterov=nesterov, num_ns_steps=root_steps, weight_decay=weight_decay,
        coefficient_type=names[coefficients], extra_scale_factor=rms,
        fp32_matmul_prec="highest",
    )  # fmt: skip


def emerging_normuon(params: Any, lr: float, momentum: float, beta2: float, nesterov: bool, weight_decay: float) -> Any:
    """The method "normuon" of its adaptive Muon."""
    return _emerging("orthogonalized_optimizers").AdaptiveMuon(
        params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, moment2_method="normuon",
        beta2=beta2, fp32_matmul_prec="highest",
    )  # fmt: skip


def emerging_adamuon(params: Any, lr: float, momentum: float, beta2: float, nesterov: bool, weight_decay: float) -> Any:
    """The method "adamuon" of its adaptive Muon."""
    return _emerging("orthogonalized_optimizers").AdaptiveMuon(
        params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, moment2_method="adamuon",
        beta2=beta2, fp32_matmul_prec="highest",
    )  # fmt: skip


# ---- all ------------------------------------------------------------------------------------------------------------

TORCH = "torch==2.13.0"
OPTAX = ("optax==0.2.8", "jax==0.10.2")
NARROW = "Its products are in bfloat16, whatever the parameter's precision; the tolerance is that of these."
FROM_FILE = "Loaded from its file, without the package's dependencies."
SHARED = "The parameters of a group share its number of steps: unfreezing shows it."
BACKEND = "With the torch backend."
TIMM, OPTIMI, KERAS = ("timm==1.0.31", TORCH), ("torch-optimi==0.3.3", TORCH), ("keras==3.15.1", TORCH)
HALF = "In float32: so are its steps, whatever the parameter's precision."
TWELVE = (
    "It takes float32 only. It needs Python 3.12; here it ran on 3.11, with the type parameter of register_optimizer "
    "taken out of registry.py."
)
EMERGING = ("NVIDIA-NeMo/Emerging-Optimizers==fd77292", TORCH)
META, DION = ("facebookresearch/optimizers==f606606", TORCH), ("microsoft/dion==0a059a4", TORCH)
THREE_YEARS = "2023-11-24"
"""The day from which on commits are tried."""
OLDEST = {
    "atorch": "0.1.0", "bitsandbytes": "0.41.3", "heavyball": "1.0.0", "keras": "3.0.0", "muon-optimizer": "0.1.0",
    "optax": "0.1.8", "pytorch_optimizer": "2.12.0", "singd": "0.0.1", "sirfshampoo": "0.0.1", "timm": "0.9.12",
    "torch": "2.1.2", "torch-optimi": "0.1.1", "transformers": "4.36.0",
}  # fmt: skip
"""The first release since that day; torch_optimizer has none."""
BESIDE = {"keras": ("h5py", "dm-tree", "attrs", "wrapt"), "optax": ("jax==0.8.1", "jaxlib==0.8.1", "chex", "toolz")}
"""Packages that earlier releases import, or import in another version."""
WHOLE = {"transformers"}
"""Packages whose earlier releases look for their dependencies' versions; torch is none of them."""

TARGETS = (
    Target(torch_sgd, "SGD", (TORCH,), "torch.optim.SGD"),
    Target(torch_adam, "Adam", (TORCH,), "torch.optim.Adam"),
    Target(torch_adam_coupled, "Adam", (TORCH,), "torch.optim.Adam(amsgrad=)"),
    Target(torch_adamw, "Adam", (TORCH,), "torch.optim.AdamW"),
    Target(
        torch_nadam, "Adam", (TORCH,), "torch.optim.NAdam",
        note="Its product of the momenta is a float32 tensor by default, whatever the parameter's precision.",
    ),
    Target(torch_radam, "Adam", (TORCH,), "torch.optim.RAdam"),
    Target(
        torch_adafactor, "Adafactor", (TORCH,), "torch.optim.Adafactor",
        note="Its rate is min(lr, 1 / sqrt(t)), as documented: long-run and values have larger ones.",
    ),
    Target(torch_rmsprop, "RMSProp", (TORCH,), "torch.optim.RMSprop"),
    Target(torch_adagrad, "AdaGrad", (TORCH,), "torch.optim.Adagrad"),
    Target(torch_muon, "Muon.torch", (TORCH,), "torch.optim.Muon", note=NARROW),
    Target(optax_sgd, "SGD", OPTAX, "optax.sgd"),
    Target(optax_adam, "Adam", OPTAX, "optax.adam"),
    Target(optax_amsgrad, "Adam", OPTAX, "optax.amsgrad"),
    Target(optax_nadam, "Adam", OPTAX, "optax.nadam"),
    Target(optax_radam, "Adam", OPTAX, "optax.radam"),
    Target(optax_rmsprop, "RMSProp", OPTAX, "optax.rmsprop"),
    Target(optax_adagrad, "AdaGrad", OPTAX, "optax.adagrad"),
    Target(
        optax_adafactor, "Adafactor", OPTAX, "optax.adafactor", dtype="float32",
        note="Made of its parts, for its own eps2 is always 1e-3. In float32: so are the weights of its averages, "
        "whatever the parameter's precision.",
    ),
    Target(optax_muon, "Muon.optax", OPTAX, "optax.contrib.muon"),
    Target(torch_optimizer_shampoo, "Shampoo", ("torch_optimizer==0.3.0", TORCH), "torch_optimizer.Shampoo"),
    Target(pytorch_optimizer_shampoo, "Shampoo", ("pytorch_optimizer==3.10.0", TORCH), "pytorch_optimizer.Shampoo"),
    Target(pytorch_optimizer_shampoo, "Shampoo", ("pytorch_optimizer==4.1.0", TORCH), "pytorch_optimizer.Shampoo"),
    Target(
        pytorch_optimizer_soap, "SOAP", ("pytorch_optimizer==4.1.0", TORCH), "pytorch_optimizer.SOAP", dtype="float32",
        note="In float32: its QR is always of float32.",
    ),
    Target(
        pytorch_optimizer_scalable_asgo, "ASGO", ("pytorch_optimizer==4.1.0", TORCH),
        "pytorch_optimizer.ScalableShampoo",
        note="Does not claim to be ASGO: it is Shampoo on blocks, here on one side only, which is the form of ASGO.",
    ),
    Target(
        pytorch_optimizer_muon, "Muon.pytorch_optimizer", ("pytorch_optimizer==4.1.0", TORCH), "pytorch_optimizer.Muon",
        note=NARROW,
    ),
    Target(
        pytorch_optimizer_normuon, "NorMuon.pytorch_optimizer", ("pytorch_optimizer==4.1.0", TORCH),
        "pytorch_optimizer.NorMuon", note=NARROW,
    ),
    Target(
        pytorch_optimizer_adamuon, "AdaMuon.pytorch_optimizer", ("pytorch_optimizer==4.1.0", TORCH),
        "pytorch_optimizer.AdaMuon", note=NARROW,
    ),
    Target(
        timm_adamw, "Adam", TIMM, "timm.optim.AdamWLegacy", without_dependencies=True, note=FROM_FILE,
    ),
    Target(
        timm_nadamw, "Adam", TIMM, "timm.optim.NAdamW", without_dependencies=True,
        note=f"{FROM_FILE} Its docstring refers to Table 1 of arXiv 1910.05446 for its NAdam, which is divided by "
        "1 - beta1^t.",
    ),
    Target(timm_nadam, "Adam", TIMM, "timm.optim.NAdamLegacy", without_dependencies=True, note=FROM_FILE),
    Target(
        timm_radam, "Adam", TIMM, "timm.optim.RAdamLegacy", without_dependencies=True, dtype="float32",
        note=f"{FROM_FILE} In float32: so are its steps, whatever the parameter's precision.",
    ),
    Target(
        timm_adafactor, "Adafactor", TIMM, "timm.optim.Adafactor", without_dependencies=True,
        note=f"{FROM_FILE} RMS, the state that comes back in bfloat16, is computed anew at each step.",
    ),
    Target(
        timm_adafactor_big_vision, "Adafactor", TIMM, "timm.optim.AdafactorBigVision", without_dependencies=True,
        note=FROM_FILE,
    ),
    Target(
        timm_muon, "Muon.torch", TIMM, "timm.optim.Muon", without_dependencies=True, note=f"{FROM_FILE} {NARROW}"
    ),
    Target(
        transformers_adafactor, "Adafactor", ("transformers==5.23.0", TORCH), "transformers.Adafactor",
        note="Its average is of steps with their learning rates: schedule, where the rate changes, shows it.",
    ),
    Target(optimi_sgd, "SGD", OPTIMI, "optimi.SGD"),
    Target(optimi_adam, "Adam", OPTIMI, "optimi.Adam", note=SHARED),
    Target(optimi_radam, "Adam", OPTIMI, "optimi.RAdam", note=SHARED),
    Target(muon_optimizer_muon, "Muon.jordan", ("muon-optimizer==0.1.0", TORCH), "muon.SingleDeviceMuon", note=NARROW),
    Target(
        muon_optimizer_adam, "Adam", ("muon-optimizer==0.1.0", TORCH), "muon.SingleDeviceMuonWithAuxAdam",
        note="Its Adam, for the parameters that are not Muon's.",
    ),
    Target(
        heavyball_muon, "Muon.heavyball", ("heavyball==3.2.1", TORCH), "heavyball.Muon",
        note="Not compiled, with its options to keep gradients and to have the state in the parameter's precision. Its "
        "learning rate is rounded to float32: long-run shows it, for the rates of the cases are exact in it.",
    ),
    Target(
        heavyball_soap, "SOAP", ("heavyball==3.2.1", TORCH), "heavyball.SOAP", dtype="float32",
        note="Not compiled, with its option to keep gradients. In float32: so is a part of its steps, whatever the "
        "parameter's precision.",
    ),
    Target(
        bitsandbytes_adam, "Adam", ("bitsandbytes==0.50.2", TORCH), "bitsandbytes.optim.AdamW", dtype="float32",
        note="Its code for a CPU. In float32: so are its steps, whatever the parameter's precision.",
    ),
    Target(
        keras_sgd, "SGD", KERAS, "keras.optimizers.SGD",
        note=f"{BACKEND} Its momentum is of steps with their learning rates, as documented: changing-rate shows it.",
    ),
    Target(keras_adam, "Adam", KERAS, "keras.optimizers.Adam", note=BACKEND),
    Target(keras_nadam, "Adam", KERAS, "keras.optimizers.Nadam", note=BACKEND),
    Target(keras_rmsprop, "RMSProp", KERAS, "keras.optimizers.RMSprop", note=BACKEND),
    Target(keras_adagrad, "AdaGrad", KERAS, "keras.optimizers.Adagrad", note=BACKEND),
    Target(
        keras_adafactor, "Adafactor", KERAS, "keras.optimizers.Adafactor", dtype="float32",
        note=f"{BACKEND} With relative_step=False; its rate is min(lr, 1 / sqrt(t)) all the same, which long-run and "
        "values show. In float32: so are some of its steps, whatever the parameter's precision.",
    ),
    Target(
        atorch_agd, "AGD", ("atorch==0.2.5", TORCH), "atorch.optimizers.AGD", without_dependencies=True,
        note=FROM_FILE,
    ),
    Target(sirfshampoo, "IFShampoo", ("sirfshampoo==0.0.1", "singd==0.0.5", TORCH), "sirfshampoo.SIRFShampoo"),
    Target(
        singd, "IFShampoo", ("singd==0.0.5", "sirfshampoo==0.0.1", TORCH), "singd.structures",
        dtype="float32",
        note="sirfshampoo.SIRFShampoo with the structures of singd, which it does not offer itself; singd calls its "
        "block-diagonal matrices symmetric. In float32: some structures do not take float64. Earlier releases of singd "
        "have no frobenius_norm, which sirfshampoo calls.",
    ),
    Target(
        soap_authors, "SOAP", ("nikhilvyas/SOAP==a1e5535", TORCH), "soap.SOAP", dtype="float32",
        note="In float32: so are its bases, whatever the parameter's precision.",
    ),
    Target(
        kl_methods, "KLShampoo", ("yorkerlin/KL-Methods==a02e622", TORCH), "optim.kl_opt.KLOpt", dtype="float32",
        note="Not compiled, in the parameter's precision (its default is bfloat16). In float32: so are its bases.",
    ),
    Target(distributed_shampoo, "Shampoo.production", META, "distributed_shampoo.DistributedShampoo", dtype="float32",
           note=HALF),
    Target(
        distributed_eshampoo, "EShampoo", META, "DistributedShampoo(EigenvalueCorrectedShampooPreconditionerConfig())",
        dtype="float32", note=HALF,
    ),
    Target(
        distributed_klshampoo, "KLShampoo.exact", META, "DistributedShampoo(RootInvKLShampooPreconditionerConfig())",
        dtype="float32", note=HALF,
    ),
    Target(dion_muon_alone, "Muon.dion", DION, "dion.Muon", note=f"Not compiled. {NARROW}"),
    Target(dion_normuon_alone, "NorMuon.dion", DION, "dion.NorMuon", note=f"Not compiled. {NARROW}"),
    Target(emerging_muon, "Muon.emerging", EMERGING, "orthogonalized_optimizers.Muon", dtype="float32", note=TWELVE),
    Target(
        emerging_normuon, "NorMuon.emerging", EMERGING, "orthogonalized_optimizers.AdaptiveMuon", dtype="float32",
        note=TWELVE,
    ),
    Target(
        emerging_adamuon, "AdaMuon.emerging", EMERGING, "orthogonalized_optimizers.AdaptiveMuon", dtype="float32",
        note=TWELVE,
    ),
)  # fmt: skip


# ---- on several ranks -----------------------------------------------------------------------------------------------


def _dion(name: str, model: Any, mesh: str, **options: Any) -> Any:
    """One of its optimizers on the model's mesh, AdamW for what is no matrix; not compiled."""
    import dion
    import torch

    torch.compiler.set_stance("force_eager")
    params = list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": [p for p in params if p.ndim == 2]}]
    if others := [p for p in params if p.ndim != 2]:
        groups.append({"params": others, "algorithm": "adamw"})
    return getattr(dion, name)(groups, **{mesh: getattr(params[0], "device_mesh", None)}, **options)


def dion_muon(model: Any, lr: float = 0.01, weight_decay: float = 0.01) -> Any:
    """Its Muon, with an owner for each matrix."""
    return _dion("Muon", model, "distributed_mesh", lr=lr, weight_decay=weight_decay)


def dion_normuon(model: Any, lr: float = 0.01, weight_decay: float = 0.01) -> Any:
    """Its NorMuon."""
    return _dion("NorMuon", model, "distributed_mesh", lr=lr, weight_decay=weight_decay)


def dion_dion(model: Any, lr: float = 0.01, weight_decay: float = 0.01) -> Any:
    """Dion, on shards of rows."""
    return _dion("Dion", model, "outer_shard_mesh", lr=lr, weight_decay=weight_decay)


@dataclass(frozen=True)
class Spread:
    """One row of the audit on several ranks."""

    place: str
    """The target of ``precond-ref check --world``."""
    requires: tuple[str, ...]
    """The packages for pip, as in `Target`."""
    name: str
    """Name of the class in the package."""
    without_dependencies: bool = False


_DION = ("git+https://github.com/microsoft/dion@0a059a4", TORCH, "numpy")
SPREAD = (
    Spread("torch.optim:AdamW", (TORCH,), "torch.optim.AdamW"),
    Spread("torch.optim:Muon", (TORCH,), "torch.optim.Muon"),
    Spread("pytorch_optimizer:Shampoo", ("pytorch_optimizer==4.1.0", TORCH), "pytorch_optimizer.Shampoo"),
    Spread("pytorch_optimizer:SOAP", ("pytorch_optimizer==4.1.0", TORCH), "pytorch_optimizer.SOAP"),
    Spread(
        "audit_targets:pytorch_optimizer_muon(momentum=0.9, nesterov=True, root_steps=5)",
        ("pytorch_optimizer==4.1.0", TORCH), "pytorch_optimizer.Muon",
    ),
    Spread(
        "audit_targets:heavyball_muon(momentum=0.9, heavyball_momentum=False)", ("heavyball==3.2.1", TORCH),
        "heavyball.Muon",
    ),
    Spread(
        "audit_targets:heavyball_soap(beta1=0.9, beta2=0.95, shampoo_beta=None, eps=1e-8, every=2, max_dim=2048, "
        "merge=False, vectors=False, normalize=False, normalize_eps=1e-8, eps_position='max')",
        ("heavyball==3.2.1", TORCH), "heavyball.SOAP",
    ),
    Spread("audit_targets:dion_muon", _DION, "dion.Muon", without_dependencies=True),
    Spread("audit_targets:dion_normuon", _DION, "dion.NorMuon", without_dependencies=True),
    Spread("audit_targets:dion_dion", _DION, "dion.Dion", without_dependencies=True),
)  # fmt: skip
"""The targets on two and on four ranks, under FSDP2."""
