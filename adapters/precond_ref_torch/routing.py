"""Parameter groups of a module by role: the parameters that a matrix method is meant for, and the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from precond_ref import MBF, Adam, Method

ROLES = ("matrix", "convolution", "embedding", "head", "norm", "bias", "other")
TO_ADAM = ("embedding", "head", "norm", "bias", "other")


def param_groups_for(
    model: nn.Module,
    *,
    method: str | None = None,
    adam: Method | None = None,
    heads: Iterable[str] | None = None,
    join: bool | None = None,
    **options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return named parameter groups of ``model`` by role, for any of the optimizers of this package.

    Roles are ``matrix`` (other weights with two axes), ``convolution``, ``embedding``, ``head``, ``norm``, ``bias``
    (what has fewer than two axes) and ``other``. Matrices and convolutions stay with the optimizer's method, so far
    as it takes their shape; the others get ``adam`` (default: ``precond_ref.Adam()``). A role without parameters
    that require a gradient has no group.

    Arguments:
        model: the module.
        method: "MBF" for the groups of MBF's authors, to be given to `precond_ref_torch.MBF`: weights and biases are
            joined, no module is a head, and norms, other biases and the role ``other`` get ``MBF(kind="diagonal")``.
        adam: method for the roles that do not suit a matrix method.
        heads: names of the modules whose weights are heads; default: the last `torch.nn.Linear`.
        join: True if the weight (O, I) and bias (O,) of each `torch.nn.Linear` are one parameter (O, I + 1), in the
            weight's group. Default: only for ``method="MBF"``.
        options: by role, entries for its group, for example ``head={"lr": 1e-3}`` or
            ``convolution={"method": precond_ref.Adam()}``.

    A parameter that two modules share has the role of the first, or that of an embedding or head if one of them is.
    Raises ValueError for an unknown role, head or method.
    """
    if method not in (None, "MBF"):
        raise ValueError(f"method must be 'MBF' or None, which suits every other method, got {method!r}")
    unknown = sorted(options.keys() - set(ROLES))
    if unknown:
        raise ValueError(f"no role is called {', '.join(unknown)}; there are {', '.join(ROLES)}")
    modules = dict(model.named_modules())
    if heads is None and method == "MBF":
        heads = ()
    elif heads is None:
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
    pairs = _pairs(modules.values(), found) if (method == "MBF" if join is None else join) else {}
    for weight, bias in pairs.items():
        found[bias] = found[bias][0], found[weight][1]
    rest = {
        role: MBF(kind="diagonal") if method and role != "embedding" and role != "head" else Adam() for role in TO_ADAM
    }
    groups = []
    for role in ROLES:
        members = [(name, param) for param, (name, has) in found.items() if has == role]
        if members:
            own = {"method": adam or rest[role]} if role in TO_ADAM else {}
            joined = tuple((found[w][0], found[b][0]) for w, b in pairs.items() if found[w][1] == role)
            extra = {"join": joined} if joined else {}
            groups.append({"params": members, "role": role, **extra, **own, **options.get(role, {})})
    return groups


def _pairs(modules: Iterable[nn.Module], found: Mapping[Any, tuple[str, str]]) -> dict[Any, Any]:
    """Return weight and bias of each Linear that trains both and shares neither with a Linear before it."""
    pairs: dict[Any, Any] = {}
    for module in modules:
        if isinstance(module, nn.Linear) and module.bias is not None:
            weight, bias = module.weight, module.bias
            trained = weight in found and bias in found and found[weight][1] in ("matrix", "head")
            if trained and weight not in pairs and all(bias is not b for b in pairs.values()):
                pairs[weight] = bias
    return pairs


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
