"""Reference implementations of structured and second-order preconditioners, on any array-API backend."""

from typing import TYPE_CHECKING, Any

from precond_ref.methods import MODULES

if TYPE_CHECKING:
    from precond_ref.methods.adafactor import Adafactor
    from precond_ref.methods.agd import AGD
    from precond_ref.methods.asgo import ASGO, DASGO
    from precond_ref.methods.baselines import SGD, AdaGrad, Adam, FullAdaGrad, RMSProp
    from precond_ref.methods.inverse_free import IFShampoo
    from precond_ref.methods.klshampoo import KLShampoo
    from precond_ref.methods.mbf import MBF
    from precond_ref.methods.muon import AdaMuon, Muon, NorMuon
    from precond_ref.methods.online_sketches import FDSON, RFDSON, AdaFD
    from precond_ref.methods.root_free import RFAdamW, RFRMSProp, RFShampoo
    from precond_ref.methods.shampoo import EShampoo, Shampoo
    from precond_ref.methods.sketchy import SAdaGrad, SShampoo
    from precond_ref.methods.soap import SOAP
    from precond_ref.optimizer import Optimizer
    from precond_ref.protocol import Method
    from precond_ref.registry import list_methods

    __version__: str

__all__ = [
    "AGD",
    "ASGO",
    "DASGO",
    "FDSON",
    "MBF",
    "RFDSON",
    "SGD",
    "SOAP",
    "AdaFD",
    "AdaGrad",
    "AdaMuon",
    "Adafactor",
    "Adam",
    "EShampoo",
    "FullAdaGrad",
    "IFShampoo",
    "KLShampoo",
    "Method",
    "Muon",
    "NorMuon",
    "Optimizer",
    "RFAdamW",
    "RFRMSProp",
    "RFShampoo",
    "RMSProp",
    "SAdaGrad",
    "SShampoo",
    "Shampoo",
    "list_methods",
]

_PLACES = {"Method": "protocol", "Optimizer": "optimizer", "list_methods": "registry"} | {
    name: f"methods.{module}" for name, module in MODULES.items()
}


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
