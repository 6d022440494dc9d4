r"""Yardsticks of the online experiments: other uses of a Frequent Directions sketch, for vectors.

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
    ``learning_rate`` scales the sketched gradient, and the published step has no other rate. The direction is divided
    by it, so that a caller with the same ``lr`` makes the published step.
    The inverse of zero counts as zero: with ``delta=0``, `AdaFD` and `FDSON` give zero on the complement of the sketch
    (the authors' code: a zero or undefined step).
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from precond_ref.fields import integer, real
from precond_ref.numerics import sketch as fd
from precond_ref.numerics.ema import number
from precond_ref.numerics.sketch import Sketch, SketchReport
from precond_ref.protocol import Method, Now
from precond_ref.typing import Array, Namespace, Scalar


class OnlineSketchState(NamedTuple):
    """State of `AdaFD`, `FDSON` and `RFDSON` for a parameter (..., d)."""

    step: Any
    """t, number of updates done."""
    sketch: Sketch
    """S_t and rho_{1:t}: (..., d, k), (..., k), (...)."""


class OnlineSketchScalars(NamedTuple):
    """Values of ``scalars`` of `FDSON` and `RFDSON`, which depend on the update's number alone."""

    weight: Scalar
    """Factor of the gradient in the sketch."""


class _OnlineSketch(Method):
    """Base of the three methods: vectors, and a sketch of ``size`` rows."""

    size: int = integer("sketch size; the sketch has rank size - 1", ge=1)

    ndims: ClassVar[tuple[int, int]] = (1, 1)
    factorizes = True
    refreshes: ClassVar[bool] = True

    def state_of(self, shape: tuple[int, ...]) -> OnlineSketchState:
        return OnlineSketchState(step=0, sketch=fd.empty(shape[0], self.size))

    def _sketch(self, grad: Array, state: OnlineSketchState, now: Now) -> tuple[Sketch, Scalar]:
        """Return the sketch after the weighted gradient, and the square of the weight."""
        weight = now.k.weight if now.k else 1.0
        return fd.update(state.sketch, grad[..., None, :] * weight, size=self.size, xp=now.xp), weight * weight

    def _apply(
        self, grad: Array, sketch: Sketch, shift: Array, weight: Scalar, xp: Namespace, root: bool = False
    ) -> Array:
        """Return ``(U diag(e) U^T + shift I)^{-1} grad``; with ``root`` e^{1/2} is in the place of e."""
        u, e, _ = sketch
        return fd.apply_power(u, e, shift, -1.0, grad[..., None], root=root, weight=weight, xp=xp)[..., 0]

    def report(self, state: OnlineSketchState, finite: Array, xp: Namespace) -> SketchReport:
        """Return spectrum and escaped mass of the sketch."""
        return fd.report(state.sketch, finite=finite, xp=xp)


class AdaFD(_OnlineSketch):
    """Ada-FD (Wan and Zhang, 2018): a fixed ``delta`` is added to the root of the sketch; vectors (..., d)."""

    delta: float = real("added to the root", ge=0)

    paper: ClassVar[str] = "Wan, Zhang: Efficient adaptive online learning via frequent directions, IJCAI 2018"

    def step(self, grad: Array, state: OnlineSketchState, param: Array, now: Now) -> tuple[Array, OnlineSketchState]:
        xp, (sketch, weight) = now.xp, self._sketch(grad, state, now)
        shift = xp.zeros_like(sketch.escaped) + self.delta
        direction = self._apply(grad, sketch, shift, weight, xp, root=True)  # (1)
        return direction, OnlineSketchState(step=now.step, sketch=sketch)


class FDSON(_OnlineSketch):
    """FD-SON (Luo et al., 2016), sketched online Newton: the sketch plus ``delta`` is inverted; vectors (..., d)."""

    delta: float = real("alpha, added to the eigenvalues", ge=0)
    learning_rate: float = real("scale of the sketched gradient; the caller's lr", gt=0)

    paper: ClassVar[str] = "Luo, Agarwal, Cesa-Bianchi, Langford: Sketched online Newton, arXiv 1602.02202"

    def scalars(self, step: Any, *, like: Array = None) -> OnlineSketchScalars:
        return OnlineSketchScalars(weight=(self.learning_rate * number(step, like) ** 0.5) ** -0.5)

    def step(self, grad: Array, state: OnlineSketchState, param: Array, now: Now) -> tuple[Array, OnlineSketchState]:
        xp, (sketch, weight) = now.xp, self._sketch(grad, state, now)
        shift = xp.zeros_like(sketch.escaped) + self.delta
        direction = self._apply(grad, sketch, shift, weight, xp)
        return direction / self.learning_rate, OnlineSketchState(step=now.step, sketch=sketch)  # (2)


class RFDSON(_OnlineSketch):
    """RFD-SON (Luo et al., 2019): as `FDSON`, and half the escaped mass is added to ``delta``; vectors (..., d)."""

    delta: float = real("alpha_0, added to the eigenvalues; 0 is RFD0", ge=0)
    learning_rate: float = real("scale of the sketched gradient; the caller's lr", gt=0)

    paper: ClassVar[str] = "Luo, Chen, Zhang, Li, Zhang: Robust frequent directions, JMLR 2019, arXiv 1705.05067"

    def scalars(self, step: Any, *, like: Array = None) -> OnlineSketchScalars:
        return OnlineSketchScalars(weight=(self.learning_rate * number(step, like)) ** -0.5)

    def step(self, grad: Array, state: OnlineSketchState, param: Array, now: Now) -> tuple[Array, OnlineSketchState]:
        xp, (sketch, weight) = now.xp, self._sketch(grad, state, now)
        shift = 0.5 * sketch.escaped + self.delta
        direction = self._apply(grad, sketch, shift, weight, xp)
        return direction / self.learning_rate, OnlineSketchState(step=now.step, sketch=sketch)  # (3)
