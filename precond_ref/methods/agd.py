r"""AGD: an Auto-switchable Optimizer using Stepwise Gradient Difference for Preconditioning Matrix.

Y. Yue, Z. Ye, J. Jiang, Y. Liu, K. Zhang, NeurIPS 2023, arXiv 2312.01658v2, Algorithm 1. Everything is elementwise.

=========  ===========  ==============  =======================================================
paper      here         shape           meaning
=========  ===========  ==============  =======================================================
g_t        ``grad``     as the param.   gradient
m_t        ``m``        as the param.   average of gradients, not bias-corrected
s_t        ``s``        as the param.   difference of successive bias-corrected averages
b_t        ``b``        as the param.   average of s_t^2, not bias-corrected
beta_1,2   ``beta1,2``                  decay of m and of b
delta      ``delta``                    threshold of the switch, and lower bound of the denominator
=========  ===========  ==============  =======================================================

Algorithm 1, for t = 1, 2, ... with m_0 = b_0 = 0::

    m_t = beta1 m_{t-1} + (1 - beta1) g_t                                            (m)
    s_t = m_t / (1 - beta1^t) - m_{t-1} / (1 - beta1^{t-1}),   s_1 = m_1 / (1 - beta1)  (s)
    b_t = beta2 b_{t-1} + (1 - beta2) s_t^2                                          (b)
    direction = sqrt(1 - beta2^t) / (1 - beta1^t) * m_t / max(sqrt(b_t), delta sqrt(1 - beta2^t))  (x)

Coordinate i takes the adaptive step where sqrt(b_t / (1 - beta2^t)) > delta, and elsewhere the step of SGD with
bias-corrected averaged momentum at rate lr / delta: the switch.

Conventions
    There is no epsilon. ``delta = 0`` with a zero gradient history gives 0 (the authors' code: NaN), and any other
    m_t over b_t = 0 gives an infinity.
    ``amsgrad``: running maximum of the raw b_t, then the maximum with the threshold (the authors' code).
    ``clip`` bounds m_t / max(...) *before* the factor sqrt(1 - beta2^t) / (1 - beta1^t) (the authors' code).
    Step-dependent factors are exact (the authors' code since 2024: float32, off by up to 2e-5).
    Weight decay is decoupled and belongs to the optimizer: x <- (1 - lr weight_decay) x before the step.

Coincides with
    SGD with bias-corrected averaged momentum at rate lr / delta where delta >= 2 max|g| / (1 + beta1).

Hazard
    On a linear function the step grows without bound until ``delta`` caps it at lr |g| / delta.

Not here
    The "win" acceleration of the authors' code, which is not in the paper.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

from precond_ref.fields import flag, is_python_number, real
from precond_ref.numerics.arrays import clamp
from precond_ref.numerics.ema import ema, one_minus_power, quotient, reciprocal, sqrt
from precond_ref.numerics.template import zeros
from precond_ref.protocol import Method, Now
from precond_ref.typing import Array, Namespace, Scalar


class AGDState(NamedTuple):
    """State of `AGD`; every array has the parameter's shape."""

    step: Any
    """t, number of updates done."""
    m: Array
    """m_t, average of gradients."""
    b: Array
    """b_t, average of squared differences."""
    b_max: Array | None
    """max of b_1, ..., b_t; None without ``amsgrad``."""


class AGDScalars(NamedTuple):
    """Values of `AGD.scalars`, which depend on the update's number alone."""

    of_gradient: Scalar
    """Weight of g_t in s_t."""
    of_average: Scalar
    """Weight of -m_t in s_t; of -m_{t-1} unless `AGD.from_new`."""
    floor: Scalar
    """delta sqrt(1 - beta2^t)."""
    factor: Scalar
    """sqrt(1 - beta2^t) / (1 - beta1^t)."""


class AGDReport(NamedTuple):
    """The report of `AGD.diagnose`; arrays have the parameter's shape unless noted."""

    corrected_m: Array
    """m_t / (1 - beta1^t)."""
    corrected_b: Array
    """b_t / (1 - beta2^t); with ``amsgrad`` that of the running maximum."""
    is_sgd: Array
    """True where the coordinate takes the step of SGD, sqrt(b_t) <= delta sqrt(1 - beta2^t) with b_t as above."""
    sgd_share: Array
    """Share of such coordinates, 0-D; 0 of none."""
    finite: Array
    """True if the whole state is finite, 0-D."""


class AGD(Method):
    """AGD (Yue et al., 2023, arXiv 2312.01658v2, Algorithm 1); elementwise, any shape.

    ``beta1``, ``beta2`` are decays (weights of the *old* term), ``delta`` the threshold.
    Errors: ValueError or TypeError for a field out of range, and for arrays that do not fit together.
    """

    beta1: float = real("beta_1, decay of the averaged gradient", default=0.9, ge=0, lt=1)
    beta2: float = real("beta_2, decay of the averaged squared difference", default=0.999, ge=0, lt=1)
    delta: float = real("delta, threshold between SGD and the adaptive step", default=1e-5, ge=0)
    amsgrad: bool = flag("use the running maximum of b_t", default=False)
    clip: float | None = real("bound on |m_t / max(...)| in (x)", default=None, gt=0, optional=True)

    paper: ClassVar[str] = "Yue, Ye, Jiang, Liu, Zhang: AGD, NeurIPS 2023, arXiv 2312.01658v2"
    elementwise: ClassVar[bool] = True

    def state_of(self, shape: tuple[int, ...]) -> AGDState:
        return AGDState(step=0, m=zeros(*shape), b=zeros(*shape), b_max=zeros(*shape) if self.amsgrad else None)

    def scalars(self, step: Any, *, like: Array = None) -> AGDScalars:
        inverse_c1 = reciprocal(one_minus_power(self.beta1, step, like=like))
        before = reciprocal(one_minus_power(self.beta1, step - 1, like=like))  # 0 at t = 1, so that s_1 = m_1 / c1
        sqrt_c2 = sqrt(one_minus_power(self.beta2, step, like=like))
        return AGDScalars(*self._weights(inverse_c1, before), self.delta * sqrt_c2, sqrt_c2 * inverse_c1)

    def step(self, grad: Array, state: AGDState, param: Array, now: Now) -> tuple[Array, AGDState]:
        xp, k = now.xp, now.k
        m = ema(state.m, grad, self.beta1)  # (m)
        s = k.of_gradient * grad - k.of_average * (m if self.from_new else state.m)  # (s)
        b = ema(state.b, s * s, self.beta2)  # (b)
        b_max = xp.maximum(state.b_max, b) if self.amsgrad else None
        root = xp.sqrt(b_max if self.amsgrad else b)
        least = self.delta * sqrt(1 - self.beta2)  # the floor below at t = 1, where it is lowest
        u = quotient(m, clamp(root, k.floor, xp=xp), xp, bound=least)
        if self.clip is not None:
            u = clamp(u, -self.clip, self.clip, xp=xp)
        direction = k.factor * u  # (x)
        return direction, AGDState(step=now.step, m=m, b=b, b_max=b_max)

    @property
    def from_new(self) -> bool:
        """Whether s_t is made from m_t, not from m_{t-1}: the new average may then overwrite the old one."""
        return is_python_number(self.beta1) and self.beta1 >= 0.5

    def _weights(self, inverse_c1: Scalar, before: Scalar) -> tuple[Scalar, Scalar]:
        r"""(s), without the cancellation of large averages: with w = (1 - beta1) / (1 - beta1^t), c = 1 - beta1^{t-1},

            s_t = w (g_t - m_{t-1} / c) = w ((1 + (1 - beta1) / (beta1 c)) g_t - m_t / (beta1 c)).

        The second form, where m_{t-1} = (m_t - (1 - beta1) g_t) / beta1, does not read the old average, which the new
        one may then overwrite: XLA copies it otherwise. Let u be the unit of rounding. (m) is off by at most
        4u (|m_{t-1}| + (1 - beta1) |g_t|), each factor by 4u of itself, each product and the difference by u, and
        (1 - beta1) / c <= 1. To first order in u s_t is then off by at most ::

            (6 + 16 / beta1) u w (|g_t| + |m_{t-1}| / c)

        and by 11 in the place of 6 + 16 / beta1 in the first form. The second is taken where beta1 >= 1/2: at most 38.
        """
        w = (1 - self.beta1) * inverse_c1
        if not self.from_new:
            return w, w * before
        x = before * (1 / self.beta1)
        return w * (1 + (1 - self.beta1) * x), w * x

    def report(self, state: AGDState, finite: Array, xp: Namespace) -> AGDReport:
        """Bias-corrected averages and the switch; before the first update all averages are zero."""
        inverse_c1 = reciprocal(one_minus_power(self.beta1, state.step, like=state.m))
        c2 = one_minus_power(self.beta2, state.step, like=state.m)
        b = state.b_max if self.amsgrad else state.b
        is_sgd = xp.sqrt(b) <= self.delta * sqrt(c2)
        return AGDReport(
            corrected_m=state.m * inverse_c1,
            corrected_b=b * reciprocal(c2),
            is_sgd=is_sgd,
            sgd_share=xp.sum(xp.astype(is_sgd, state.m.dtype)) / max(math.prod(is_sgd.shape), 1),
            finite=finite,
        )
