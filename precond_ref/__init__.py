"""Reference implementations of structured and second-order preconditioners, on any array-API backend."""

from typing import Any

from precond_ref.methods import MODULES

_PLACES = {"Method": "protocol", "Optimizer": "optimizer", "list_methods": "registry"} | {
    name: f"methods.{module}" for name, module in MODULES.items()
}
__all__ = [*sorted(_PLACES)]


def __getattr__(name: str) -> Any:
    """Return a public name or ``__version__``: all of them take three times as long to import as one method does."""
    import importlib

    if name in _PLACES:
        value: Any = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("precond_ref")
    except PackageNotFoundError:  # a source tree that was never installed
        return "unknown"
