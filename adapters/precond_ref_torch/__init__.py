"""The methods of `precond_ref` as PyTorch optimizers: ``precond_ref_torch.ASGO(model.parameters(), lr=1e-2)``.

One class for each name of ``precond_ref.list_methods()``, made from the method's dataclass on first access;
`Optimizer` runs any other method. PyTorch is imported on first access too.
"""

from typing import Any

from precond_ref import list_methods

__all__ = ["Optimizer", "PerSampleStatistics", "param_groups_for", *list_methods()]


def __getattr__(name: str) -> Any:
    if name == "param_groups_for":
        from precond_ref_torch.routing import param_groups_for

        return param_groups_for
    if name == "PerSampleStatistics":
        from precond_ref_torch.statistics import PerSampleStatistics

        return PerSampleStatistics
    if name == "Optimizer" or name in list_methods():
        from precond_ref_torch import optimizer

        return optimizer.Optimizer if name == "Optimizer" else optimizer.optimizer_of(list_methods()[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *list_methods()})
