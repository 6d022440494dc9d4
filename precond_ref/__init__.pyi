# python tools/names.py writes this file
# ruff: noqa: I001
from precond_ref.methods.adafactor import Adafactor as Adafactor
from precond_ref.methods.agd import AGD as AGD
from precond_ref.methods.asgo import ASGO as ASGO
from precond_ref.methods.asgo import DASGO as DASGO
from precond_ref.methods.baselines import AdaGrad as AdaGrad
from precond_ref.methods.baselines import Adam as Adam
from precond_ref.methods.baselines import FullAdaGrad as FullAdaGrad
from precond_ref.methods.baselines import RMSProp as RMSProp
from precond_ref.methods.baselines import SGD as SGD
from precond_ref.methods.inverse_free import IFShampoo as IFShampoo
from precond_ref.methods.klshampoo import KLShampoo as KLShampoo
from precond_ref.methods.mbf import MBF as MBF
from precond_ref.methods.muon import AdaMuon as AdaMuon
from precond_ref.methods.muon import Muon as Muon
from precond_ref.methods.muon import NorMuon as NorMuon
from precond_ref.methods.online_sketches import AdaFD as AdaFD
from precond_ref.methods.online_sketches import FDSON as FDSON
from precond_ref.methods.online_sketches import RFDSON as RFDSON
from precond_ref.methods.root_free import RFAdamW as RFAdamW
from precond_ref.methods.root_free import RFRMSProp as RFRMSProp
from precond_ref.methods.root_free import RFShampoo as RFShampoo
from precond_ref.methods.shampoo import EShampoo as EShampoo
from precond_ref.methods.shampoo import Shampoo as Shampoo
from precond_ref.methods.sketchy import SAdaGrad as SAdaGrad
from precond_ref.methods.sketchy import SShampoo as SShampoo
from precond_ref.methods.soap import SOAP as SOAP
from precond_ref.optimizer import Optimizer as Optimizer
from precond_ref.protocol import Method as Method
from precond_ref.registry import list_methods as list_methods

__version__: str
