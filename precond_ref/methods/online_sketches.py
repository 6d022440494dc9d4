r"""Yardsticks of the online experiments: other uses of a Frequent Directions sketch (vectors).

With S_t the sketch and rho_{1:t} the escaped mass of `precond_ref.numerics.sketch`, both plain sums::

    AdaFD:   sketch g_t;                                 direction = (delta I + S_t^{1/2})^{-1} g_t             (1)
    FDSON:   sketch g_t / (learning_rate sqrt(t))^{1/2}; direction = (delta I + S_t)^{-1} g_t / learning_rate   (2)
    RFDSON:  sketch g_t / (learning_rate t)^{1/2};
             direction = ((delta + rho_{1:t} / 2) I + S_t)^{-1} g_t / learning_rate                             (3)

* `AdaFD`: Y. Wan, L. Zhang, IJCAI 2018. The fixed delta is added to the root.
* `FDSON`: H. Luo, A. Agarwal, N. Cesa-Bianchi, J. Langford, NeurIPS 2016, arXiv 1602.02202, sketched online Newton
  without the exp-concavity constant.
* `RFDSON`: L. Luo, C. Chen, Z. Zhang, W.-J. Li, T. Zhang, JMLR 2019, arXiv 1705.05067; with ``delta=0`` RFD0.

The updates are those of the authors' code of Sketchy (arXiv 2302.03764), whose online experiments compare them.

Conventions
    ``learning_rate`` scales what is sketched, and the published step has no other rate: the direction is divided by it,
    so that a caller with the same ``lr`` makes that step.
    Where an inverse would be that of zero, the result is zero: with ``delta=0``, `AdaFD` and `FDSON` give zero on the
    complement of the sketch (the authors' code: a zero or undefined step).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from array_api_compat import array_namespace

from precond_ref.numerics import sketch as fd
from precond_ref.numerics.refresh import is_due
from precond_ref.numerics.sketch import Sketch, SketchReport
from precond_ref.protocol import Array, Method, Namespace, Scalar, check_int, check_real


class OnlineSketchState(NamedTuple):
    """State of `AdaFD`, `FDSON` and `RFDSON` for a parameter (..., d)."""

    step: Any
    """t, updates done."""
    sketch: Sketch
    """S_t and rho_{1:t}: (..., d, k), (..., k), (...)."""


class OnlineSketchScalars(NamedTuple):
    """What `FDSON` and `RFDSON` need of the step's number."""

    weight: Scalar
    """Factor of the gradient in the sketch."""


class _OnlineSketch(Method, register=False):
    """What the three share: vectors, and a sketch of ``size`` rows."""

    size: int

    state_type: ClassVar[Any] = OnlineSketchState
    ndims: ClassVar[tuple[int, int]] = (1, 1)

    def takes(self, shape: tuple[int, ...], path: str = "") -> bool:
        """Vectors."""
        return len(shape) == 1

    def init(self, param: Array, *, stack_ndim: int = 0) -> OnlineSketchState:
        xp = self._check_param(param, stack_ndim, factorizes=True)
        sketch = fd.empty(param.shape[-1], self.size, tuple(param.shape[:-1]), param, xp=xp)
        return OnlineSketchState(step=0, sketch=sketch)

    def _sketch(
        self, grad: Array, state: OnlineSketchState, param: Array, scalars: Any, refresh: bool | None, xp: Namespace
    ) -> tuple[Namespace, Sketch, Scalar]:
        """Checks, the sketch after the weighted gradient, and the square of the weight."""
        xp, k = self._enter(grad, state, param, scalars, xp)
        is_due(state.step, 1, refresh)
        fd.check("state.sketch", state.sketch, param.shape[-1], self.size, tuple(param.shape[:-1]))
        weight = k.weight if k else 1.0
        sketch = fd.update(state.sketch, grad[..., None, :] * weight, size=self.size, xp=xp)
        return xp, sketch, weight * weight

    def _apply(
        self, grad: Array, sketch: Sketch, shift: Array, weight: Scalar, xp: Namespace, root: bool = False
    ) -> Array:
        """``(U diag(e) U^T + shift I)^{-1} grad``, or with ``root`` its e^{1/2}."""
        u, e, _ = sketch
        return fd.apply_power(u, e, shift, -1.0, grad[..., None], root=root, weight=weight, xp=xp)[..., 0]

    def diagnose(self, state: OnlineSketchState) -> SketchReport:
        """Spectrum and escaped mass of the sketch."""
        self._check_state(state)
        eigenvalues = state.sketch.eigenvalues
        return fd.report(state.sketch, xp=self._check_param(eigenvalues, eigenvalues.ndim - 1))


@dataclass(frozen=True, kw_only=True)
class AdaFD(_OnlineSketch):
    """Ada-FD (Wan and Zhang, 2018): a fixed ``delta`` is added to the root of the sketch; vectors (..., d)."""

    size: int
    delta: float

    paper: ClassVar[str] = "Wan, Zhang: Efficient adaptive online learning via frequent directions, IJCAI 2018"
    symbols: ClassVar = MappingProxyType(
        {"size": "sketch size, >= 1; the sketch has rank size - 1", "delta": "added to the root, >= 0"}
    )

    def __post_init__(self) -> None:
        check_int(self, "size", ge=1)
        check_real(self, "delta", ge=0)

    def update(
        self,
        grad: Array,
        state: OnlineSketchState,
        param: Array,
        *,
        scalars: Any = None,
        refresh: bool | None = None,
        xp: Namespace = None,
    ) -> tuple[Array, OnlineSketchState]:
        xp, sketch, weight = self._sketch(grad, state, param, scalars, refresh, xp)
        shift = xp.zeros_like(sketch.escaped) + self.delta
        direction = self._apply(grad, sketch, shift, weight, xp, root=True)  # (1)
        return direction, OnlineSketchState(step=state.step + 1, sketch=sketch)


@dataclass(frozen=True, kw_only=True)
class FDSON(_OnlineSketch):
    """FD-SON (Luo et al., 2016), sketched online Newton: the sketch plus ``delta`` is inverted; vectors (..., d)."""

    size: int
    delta: float
    learning_rate: float

    paper: ClassVar[str] = "Luo, Agarwal, Cesa-Bianchi, Langford: Sketched online Newton, arXiv 1602.02202"
    symbols: ClassVar = MappingProxyType(
        {
            "size": "sketch size, >= 1; the sketch has rank size - 1",
            "delta": "alpha, added to the eigenvalues, >= 0",
            "learning_rate": "scale of the sketched gradient, > 0; the caller's lr",
        }
    )

    def __post_init__(self) -> None:
        check_int(self, "size", ge=1)
        check_real(self, "delta", ge=0)
        check_real(self, "learning_rate", gt=0)

    def scalars(self, step: Any, *, like: Array = None) -> OnlineSketchScalars:
        return OnlineSketchScalars(weight=(self.learning_rate * _real(step, like) ** 0.5) ** -0.5)

    def update(
        self,
        grad: Array,
        state: OnlineSketchState,
        param: Array,
        *,
        scalars: OnlineSketchScalars | None = None,
        refresh: bool | None = None,
        xp: Namespace = None,
    ) -> tuple[Array, OnlineSketchState]:
        xp, sketch, weight = self._sketch(grad, state, param, scalars, refresh, xp)
        shift = xp.zeros_like(sketch.escaped) + self.delta
        direction = self._apply(grad, sketch, shift, weight, xp)
        return direction / self.learning_rate, OnlineSketchState(step=state.step + 1, sketch=sketch)  # (2)


@dataclass(frozen=True, kw_only=True)
class RFDSON(_OnlineSketch):
    """RFD-SON (Luo et al., 2019): as `FDSON`, and half the escaped mass is added to ``delta``; vectors (..., d)."""

    size: int
    delta: float
    learning_rate: float

    paper: ClassVar[str] = "Luo, Chen, Zhang, Li, Zhang: Robust frequent directions, JMLR 2019, arXiv 1705.05067"
    symbols: ClassVar = MappingProxyType(
        {
            "size": "sketch size, >= 1; the sketch has rank size - 1",
            "delta": "alpha_0, added to the eigenvalues, >= 0; 0 is RFD0",
            "learning_rate": "scale of the sketched gradient, > 0; the caller's lr",
        }
    )

    def __post_init__(self) -> None:
        check_int(self, "size", ge=1)
        check_real(self, "delta", ge=0)
        check_real(self, "learning_rate", gt=0)

    def scalars(self, step: Any, *, like: Array = None) -> OnlineSketchScalars:
        return OnlineSketchScalars(weight=(self.learning_rate * _real(step, like)) ** -0.5)

    def update(
        self,
        grad: Array,
        state: OnlineSketchState,
        param: Array,
        *,
        scalars: OnlineSketchScalars | None = None,
        refresh: bool | None = None,
        xp: Namespace = None,
    ) -> tuple[Array, OnlineSketchState]:
        xp, sketch, weight = self._sketch(grad, state, param, scalars, refresh, xp)
        shift = 0.5 * sketch.escaped + self.delta
        direction = self._apply(grad, sketch, shift, weight, xp)
        return direction / self.learning_rate, OnlineSketchState(step=state.step + 1, sketch=sketch)  # (3)


def _real(step: Any, like: Array) -> Scalar:
    """``step`` as a float, or a 0-D array in the dtype of ``like``."""
    return float(step) if isinstance(step, int) else array_namespace(step).astype(step, like.dtype)
