"""Reference implementations of structured and second-order preconditioners, on any array-API backend."""

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """Return ``__version__``. The lookup takes a quarter of the time of the import, so it is done on request."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("precond_ref")
        except PackageNotFoundError:  # a source tree that was never installed
            return "unknown"


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
