"""Which parameters of a module a matrix method is meant for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from precond_ref import Adam, Method

ROLES = ("matrix", "convolution", "embedding", "head", "norm", "bias", "other")
TO_ADAM = ("embedding", "head", "norm", "bias", "other")


def param_groups_for(
    model: nn.Module,
    *,
    adam: Method | None = None,
    heads: Iterable[str] | None = None,
    **options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Named parameter groups of ``model`` by role, for any of the optimizers of this package.

    Roles are ``matrix`` (other weights with two axes), ``convolution``, ``embedding``, ``head``, ``norm``, ``bias``
    (what has fewer than two axes) and ``other``. Matrices and convolutions stay with the optimizer's method, so far
    as it takes their shape; the others get ``adam`` (default: ``precond_ref.Adam()``). A role without parameters
    that require a gradient has no group.

    Arguments:
        model: the module.
        adam: method for the roles that do not suit a matrix method.
        heads: names of the modules whose weights are heads; default: the last `torch.nn.Linear`.
        options: by role, entries for its group, for example ``head={"lr": 1e-3}`` or
            ``convolution={"method": precond_ref.Adam()}``.

    A parameter that two modules share has the role of the first, or that of an embedding or head if one of them is.
    Raises ValueError for an unknown role or head.
    """
    unknown = sorted(options.keys() - set(ROLES))
    if unknown:
        raise ValueError(f"no role is called {', '.join(unknown)}; there are {', '.join(ROLES)}")
    modules = dict(model.named_modules())
    if heads is None:
        heads = [name for name, module in modules.items() if isinstance(module, nn.Linear)][-1:]
    heads = set(heads)
    if heads - modules.keys():
        raise ValueError(f"heads names {', '.join(sorted(heads - modules.keys()))}: the model has no such module")

    found: dict[Any, tuple[str, str]] = {}
    for module_name, module in modules.items():
        for name, param in module.named_parameters(recurse=False):
            role = _role(module, name, param.ndim, module_name in heads)
            if param.requires_grad and (param not in found or role in ("embedding", "head")):
                path = found[param][0] if param in found else f"{module_name}.{name}".lstrip(".")
                found[param] = path, role
    groups = []
    for role in ROLES:
        members = [(name, param) for param, (name, has) in found.items() if has == role]
        if members:
            method = {"method": adam or Adam()} if role in TO_ADAM else {}
            groups.append({"params": members, "role": role, **method, **options.get(role, {})})
    return groups


def _role(module: nn.Module, name: str, ndim: int, is_head: bool) -> str:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if "norm" in type(module).__name__.lower():
        return "norm"
    if ndim < 2:
        return "bias"
    if is_head:
        return "head"
    if isinstance(
        module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    ):
        return "convolution"
    return "matrix" if ndim == 2 else "other"
