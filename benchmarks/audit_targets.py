"""Optimizers of other packages as targets of ``precond-ref check``: each function maps our fields to their arguments.

`benchmarks/audit.py` runs all of `TARGETS`; one of them, in an environment that has its package::

    cd benchmarks && precond-ref check audit_targets:torch_optimizer_shampoo --method Shampoo

A function takes the fields that the package offers under our names; a case that needs another one is skipped and
counted, as is one for which the function raises NotImplementedError.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Target:
    """One row of the audit."""

    make: Callable[..., Any]
    method: str
    """What it is checked as."""
    requires: tuple[str, ...]
    """What pip installs; the first is the package that is audited."""
    name: str
    """Of the class or function in the package."""
    without_dependencies: bool = False
    """Whether the first of ``requires`` is installed with ``--no-deps``."""
    dtype: str = "float64"
    """Precision of the check."""
    note: str = ""
    """What a reader must know about the row."""

    @property
    def package(self) -> str:
        """Name of the package."""
        return self.requires[0].partition("==")[0]

    @property
    def version(self) -> str:
        """Version of the package."""
        return self.requires[0].partition("==")[2]

    @property
    def command(self) -> str:
        """What repeats the check, from the folder of this file."""
        precision = "" if self.dtype == "float64" else f" --dtype {self.dtype}"
        return f"precond-ref check audit_targets:{self.make.__name__} --method {self.method}{precision}"

    @property
    def install(self) -> str:
        """What makes its environment."""
        kit, (first, *others) = '-e ".[cli]"', self.requires
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
    """Refuse a value, the first of each, that is none of those that follow."""
    for name, (value, *offered) in fields.items():
        if value not in offered:
            raise NotImplementedError(f"{name}={value!r}")


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
    """`optax.adam`, or `optax.adamw` where there is weight decay."""
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


# ---- all ------------------------------------------------------------------------------------------------------------

TORCH = "torch==2.13.0"
OPTAX = ("optax==0.2.8", "jax==0.10.2")
NARROW = "Its products are in bfloat16, whatever the parameter's precision; the tolerance is that of these."

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
        atorch_agd, "AGD", ("atorch==0.2.5", TORCH), "atorch.optimizers.AGD", without_dependencies=True,
        note="Loaded from its file, without the package's dependencies.",
    ),
    Target(sirfshampoo, "IFShampoo", ("sirfshampoo==0.0.1", "singd==0.0.5", TORCH), "sirfshampoo.SIRFShampoo"),
    Target(
        singd, "IFShampoo", ("singd==0.0.5", "sirfshampoo==0.0.1", TORCH), "singd.structures",
        dtype="float32",
        note="sirfshampoo.SIRFShampoo with the structures of singd, which it does not offer itself; singd calls its "
        "block-diagonal matrices symmetric. In float32: some structures do not take float64.",
    ),
)  # fmt: skip
