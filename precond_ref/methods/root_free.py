r"""Root-free adaptive methods: RF-RMSProp, RF-AdamW, RF-Shampoo.

W. Lin, F. Dangel, R. Eschenhagen, J. Bae, R. E. Turner, A. Makhzani, "Can We Remove the Square-Root in Adaptive
Gradient Methods? A Second-Order Perspective", ICML 2024, arXiv 2402.03496.

=============  ================  =================  ==================================================================
paper          here              shape              meaning
=============  ================  =================  ==================================================================
g, G           ``grad``          as the parameter   gradient of the mini-batch mean loss
B              ``batch_size``                       number of independent terms whose mean the loss is
s, S           ``s``             as the parameter   averaged curvature, elementwise
S_C, S_K, S_n  ``factors``       (d_n, d_n)         averaged curvature, one factor per axis of size d_n > 1
beta_2         ``beta2``                            weight of the *new* term (step size of S), except in RF-AdamW
lambda         ``damping``                          added to S (elementwise) or to the curvature inside (factors)
alpha_1        ``momentum``                         heavy ball on the preconditioned gradient
kappa          ``weight_decay``                     added to the preconditioned gradient, inside the momentum
T              ``every``                            updates between two renewals of S_n
=============  ================  =================  ==================================================================

`RFRMSProp`, elementwise, s_0 = ``initial``::

    s_t = (1 - beta2) s_{t-1} + beta2 B g^2                                  (1)
    u_t = g / (s_t + lambda) + kappa w                                       (2)
    direction = b_t = alpha1 b_{t-1} + u_t                                   (3)

`RFAdamW`, elementwise, with decays beta1, beta2::

    m_t = beta1 m_{t-1} + (1 - beta1) g                                      (4)
    s_t = beta2 s_{t-1} + (1 - beta2) B g^2                                  (5)
    direction = m_t / (s_t + lambda)                                         (6)

`RFShampoo`, S_n = I at the start, D = d_1 ... d_N, at updates 1, 1 + T, ..., the old factors on every right side::

    H_n = (d_n / D) [B G_(n) (kron_{j != n} S_j^-1) G_(n)^T + lambda prod_{j != n} tr(S_j^-1) I]   (7)
    S_n <- (1 - beta2) S_n + beta2 H_n                                       (8)
    u = G x_1 S_1^-1 ... x_N S_N^-1 + kappa W, then (3)                      (9)

There is no square root, so the learning rate has the scale of Newton's method: u(c g) = u(g) / c once the start is
forgotten, and if S is the Hessian, the step at rate 1 is Newton's step.

Conventions
    S is renewed with the current gradient before it is used (the authors' code; KL-Shampoo uses first).
    S starts at 1 or I, not at 0: with s_0 = 0 the first direction is g / (beta2 B g^2 + lambda).
    lambda is outside the average in (2), inside the curvature in (7): the limits agree, the transients do not.
    ``bias_correction`` (off in the authors' code) divides the gradients' part of s_t by 1 - beta2^t and leaves out
    s_0; the correction of the code divides all of s_t and so inflates s_0.
    Factors are inverted by Cholesky. If rounding has made S_n indefinite, the result of its stack member is NaN. A
    non-finite S_n is never factorised and gives NaN.
    Axes of size 1 have no factor; a parameter of one entry, also a scalar, has one factor, 1 x 1.
    Below float32 the averages are kept in float32: see ``narrow_state``. RF-Shampoo takes float32 and float64 only.
    ``update(..., statistic=)`` takes q pseudo-gradients (q, ...), whose mean outer product replaces that of ``grad``
    as the curvature.

Coincides with (each a test)
    RF-Shampoo on one axis: the full-matrix method S = (1 - beta2) S + beta2 (B g g^T + lambda I); on a scalar with
    lambda = 0: RF-RMSProp. RF-AdamW with beta1 = 0: RF-RMSProp with beta2 -> 1 - beta2. `IFShampoo` to first order
    in beta2, with the same fixed points.

Hazards
    With ``damping=0`` and gradients that vanish together, S goes to zero with them and the iterate need not converge.
    In bfloat16 the average (1) stalls: below beta2 = 2^-9 it cannot decay from a power of two at all.

Not here
    The AdaGrad-like sum (gamma = 0 in the paper), which has no fixed point.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

from precond_ref.fields import flag, integer, is_python_number, is_zero, real
from precond_ref.numerics import roots
from precond_ref.numerics.arrays import bad_as_nan, eye_like, largest_entry, t
from precond_ref.numerics.axes import multiply, samples, squeezed, unfold
from precond_ref.numerics.ema import ema, heavy_ball, one_minus_power, quotient, reciprocal
from precond_ref.numerics.lapack import attempt
from precond_ref.numerics.refresh import renew
from precond_ref.numerics.template import eye, full, zeros
from precond_ref.protocol import Method, Now, warn_if_decay
from precond_ref.typing import Array, Arrays, Namespace, Scalar

PAPER = "Lin, Dangel, Eschenhagen, Bae, Turner, Makhzani: root-free adaptive methods, ICML 2024, arXiv 2402.03496"


class RFReport(NamedTuple):
    """The report of ``diagnose`` of `RFRMSProp` and `RFAdamW`."""

    denominator: Array
    """S + lambda, the divisor of the gradient; the parameter's shape."""
    finite: Array
    """True if the whole state is finite, 0-D."""


class RFRMSPropState(NamedTuple):
    """State of `RFRMSProp`; arrays have the parameter's shape, and float32 at least (see ``narrow_state``)."""

    step: Any
    """t, number of updates done."""
    s: Array
    """s_t, averaged curvature."""
    buffer: Array | None
    """b_t, heavy-ball average; None with ``momentum=0``."""


class RFRMSProp(Method):
    """RF-RMSProp, elementwise; ``beta2`` is the weight of the *new* term, about 0.01 (Lin et al., 2024, (1)-(3)).

    It takes any shape. ``batch_size`` is the number of independent terms whose mean is the loss.
    Errors: ValueError or TypeError for a field out of range, and for arrays that do not fit together.
    Warns: UserWarning for ``beta2 > 0.5``, which looks like a decay.
    """

    beta2: float = real("beta_2, weight of the NEW term in s_t (1 - decay)", default=0.01, gt=0, le=1)
    damping: float = real("lambda, added to the averaged curvature", default=1e-4, ge=0)
    momentum: float = real("alpha_1, heavy-ball momentum on the preconditioned gradient", default=0.0, ge=0, lt=1)
    weight_decay: float = real("kappa, times the parameter inside the momentum", default=0.0, ge=0)
    batch_size: float = real("B, independent terms whose mean is the loss", default=1.0, gt=0)
    initial: float = real("s_0", default=1.0, ge=0)
    narrow_state: bool = flag("keep the state in the parameter's dtype also below float32", default=False)

    paper: ClassVar[str] = PAPER
    elementwise: ClassVar[bool] = True
    takes_statistic: ClassVar[bool] = True

    def rules(self) -> None:
        warn_if_decay(self)

    def state_of(self, shape: tuple[int, ...]) -> RFRMSPropState:
        buffer = None if is_zero(self.momentum) else zeros(*shape)
        return RFRMSPropState(step=0, s=full(self.initial, *shape), buffer=buffer)

    def step(self, grad: Array, state: RFRMSPropState, param: Array, now: Now) -> tuple[Array, RFRMSPropState]:
        """Make (1) to (3); in (1) the mean of the q squares of ``statistic`` (q, ...) replaces g^2."""
        xp, statistic, dtype = now.xp, now.statistic, state.s.dtype
        g = xp.astype(grad, dtype, copy=False)
        square = g * g if statistic is None else xp.mean(xp.astype(statistic, dtype, copy=False) ** 2, axis=0)
        s = (1 - self.beta2) * state.s + self.beta2 * (self.batch_size * square)  # (1)
        u = quotient(g, s + self.damping, xp, bound=self.damping)  # (2)
        if self.reads_param:
            u = u + self.weight_decay * xp.astype(param, dtype, copy=False)
        buffer, direction = heavy_ball(state.buffer, u, self.momentum)  # (3)
        return xp.astype(direction, grad.dtype, copy=False), RFRMSPropState(step=now.step, s=s, buffer=buffer)

    def report(self, state: RFRMSPropState, finite: Array, xp: Namespace) -> RFReport:
        """Return the denominator."""
        return RFReport(denominator=state.s + self.damping, finite=finite)


class RFAdamWState(NamedTuple):
    """State of `RFAdamW`; arrays have the parameter's shape, and float32 at least (see ``narrow_state``)."""

    step: Any
    """t, number of updates done."""
    m: Array
    """m_t, average of gradients."""
    s: Array
    """s_t, averaged curvature; with ``bias_correction`` its part from gradients, s_t - beta2^t s_0."""


class RFAdamWScalars(NamedTuple):
    """Values of `RFAdamW.scalars`, which depend on the update's number alone; both 1 without ``bias_correction``."""

    inverse_c1: Scalar
    """1 / (1 - beta1^t)."""
    inverse_c2: Scalar
    """1 / (1 - beta2^t)."""


class RFAdamW(Method):
    """RF-AdamW, elementwise; ``beta1``, ``beta2`` are *decays*, weights of the old term (Lin et al., code of 2024).

    It takes any shape. ``bias_correction`` divides m_t by 1 - beta1^t and s_t - beta2^t s_0 by 1 - beta2^t: then
    ``initial`` has no effect. Decoupled weight decay belongs to the optimizer.
    Errors: ValueError or TypeError for a field out of range, and for arrays that do not fit together.
    """

    beta1: float = real("decay of the averaged gradient", default=0.9, ge=0, lt=1)
    beta2: float = real("DECAY of the averaged curvature", default=0.999, ge=0, lt=1)
    damping: float = real("lambda, added to the averaged curvature", default=1e-4, ge=0)
    batch_size: float = real("B, independent terms whose mean is the loss", default=1.0, gt=0)
    initial: float = real("s_0; without effect under bias_correction", default=1.0, ge=0)
    bias_correction: bool = flag("divide both averages of gradients by 1 - decay^t", default=False)
    narrow_state: bool = flag("keep the state in the parameter's dtype also below float32", default=False)

    paper: ClassVar[str] = PAPER
    elementwise: ClassVar[bool] = True

    def state_of(self, shape: tuple[int, ...]) -> RFAdamWState:
        # The correction takes s_0 out exactly, so it is not put in: s_t - beta2^t s_0 would cancel.
        initial = 0.0 if self.bias_correction else self.initial
        return RFAdamWState(step=0, m=zeros(*shape), s=full(initial, *shape))

    def scalars(self, step: Any, *, like: Array = None) -> RFAdamWScalars:
        if not self.bias_correction:
            return RFAdamWScalars(inverse_c1=1.0, inverse_c2=1.0)
        c1, c2 = (one_minus_power(beta, step, like=like) for beta in (self.beta1, self.beta2))
        return RFAdamWScalars(inverse_c1=reciprocal(c1), inverse_c2=reciprocal(c2))

    def step(self, grad: Array, state: RFAdamWState, param: Array, now: Now) -> tuple[Array, RFAdamWState]:
        xp, k = now.xp, now.k
        g = xp.astype(grad, state.s.dtype, copy=False)
        m = ema(state.m, g, self.beta1)  # (4)
        s = ema(state.s, self.batch_size * (g * g), self.beta2)  # (5)
        direction = quotient(m * k.inverse_c1, s * k.inverse_c2 + self.damping, xp, bound=self.damping)  # (6)
        return xp.astype(direction, grad.dtype, copy=False), RFAdamWState(step=now.step, m=m, s=s)

    def report(self, state: RFAdamWState, finite: Array, xp: Namespace) -> RFReport:
        """Return the denominator."""
        k = self.scalars(state.step, like=state.s)
        return RFReport(denominator=state.s * k.inverse_c2 + self.damping, finite=finite)


class RFShampooState(NamedTuple):
    """State of `RFShampoo`; d_n runs over the parameter's axes of size other than 1 (all 1: one axis, d_1 = 1)."""

    step: Any
    """t, number of updates done."""
    factors: Arrays
    """S_n, (..., d_n, d_n)."""
    inverses: Arrays
    """S_n^-1, (..., d_n, d_n)."""
    buffer: Array | None
    """b_t, heavy-ball average, the parameter's shape; None with ``momentum=0``."""


class RFShampooReport(NamedTuple):
    """The report of `RFShampoo.diagnose`."""

    eigenvalues: Arrays
    """Eigenvalues of each S_n, ascending, clipped at zero, (..., d_n). A small quotient of smallest and largest means
    that Cholesky may soon fail."""
    finite: Array
    """True if the state of the stack member is finite, (...)."""


class RFShampoo(Method):
    """RF-Shampoo, any tensor order; ``beta2`` is the weight of the *new* term, about 0.01 (Lin et al., 2024, (7)-(9)).

    Each axis of size other than 1 has a factor. ``batch_size`` is the number of independent terms whose mean is the
    loss. The overall scale is stable only for N beta2 < 2.
    Errors: ValueError or TypeError for a field out of range, for arrays that do not fit together, and for dtypes
    below float32.
    Warns: UserWarning for ``beta2 > 0.5``, which looks like a decay.
    """

    beta2: float = real("beta_2, weight of the NEW term in the factors (1 - decay)", default=0.01, gt=0, le=1)
    damping: float = real("lambda, added to the curvature", default=1e-3, ge=0)
    momentum: float = real("alpha_1, heavy-ball momentum on the preconditioned gradient", default=0.9, ge=0, lt=1)
    weight_decay: float = real("kappa, times the parameter inside the momentum", default=0.0, ge=0)
    batch_size: float = real("B, independent terms whose mean is the loss", default=1.0, gt=0)
    every: int = integer("T, updates between two renewals of the factors", default=1, ge=1)

    paper: ClassVar[str] = PAPER
    factorizes = True
    takes_statistic: ClassVar[bool] = True

    def rules(self) -> None:
        if is_zero(self.damping) and is_python_number(self.beta2) and self.beta2 == 1:
            raise ValueError("damping must be > 0 for beta2=1, which keeps nothing of the positive start, got 0")
        warn_if_decay(self)

    def state_of(self, shape: tuple[int, ...]) -> RFShampooState:
        factors = tuple(eye(d, d) for d in squeezed(shape))
        buffer = None if is_zero(self.momentum) else zeros(*shape)
        return RFShampooState(step=0, factors=factors, inverses=factors, buffer=buffer)

    def stack_ndim(self, state: RFShampooState) -> int:
        return state.factors[0].ndim - 2

    def step(self, grad: Array, state: RFShampooState, param: Array, now: Now) -> tuple[Array, RFShampooState]:
        """Make (7) to (9), (3); in (7) the mean over the q gradients ``statistic`` (q, ...) replaces ``grad``."""
        xp, stack, statistic = now.xp, now.stack, now.statistic
        if 0 in grad.shape:
            return xp.zeros_like(grad), state._replace(step=now.step)
        dims = squeezed(grad.shape[stack:])
        curvature = samples(grad, statistic, stack, dims, xp)
        old = state.factors, state.inverses
        factors, inverses = renew(now.due, lambda: self._renewed(curvature, *old, xp), old)
        if self.every > 1 or statistic is not None:  # the factors may be without this gradient
            bad = bad_as_nan(grad, grad.ndim - stack, xp)[..., None, None]
            factors, inverses = ((first + bad, *others) for first, *others in (factors, inverses))
        u = xp.reshape(grad, (*grad.shape[:stack], *dims))
        for n, inverse in enumerate(inverses):
            u = multiply(u, inverse, n, xp)
        u = xp.reshape(u, grad.shape)
        if self.reads_param:
            u = u + self.weight_decay * param  # (9)
        buffer, direction = heavy_ball(state.buffer, u, self.momentum)  # (3)
        return direction, RFShampooState(now.step, factors, inverses, buffer)

    def _renewed(self, g: Array, factors: Arrays, inverses: Arrays, xp: Namespace) -> tuple[Arrays, Arrays]:
        """Return S_n and S_n^-1 after (7) and (8), from pseudo-gradients (..., d_1, ..., d_N, q)."""
        stack = factors[0].ndim - 2
        traces = [xp.linalg.trace(inverse)[..., None, None] for inverse in inverses]
        dims = g.shape[stack:-1]
        new = []
        for n, factor in enumerate(factors):
            whitened, damping = g, self.damping * eye_like(xp, factor)
            for j, inverse in enumerate(inverses):
                if j != n:
                    whitened, damping = multiply(whitened, inverse, j, xp), traces[j] * damping
            outer = unfold(whitened, stack, n, xp) @ t(unfold(g, stack, n, xp), xp)
            h = (self.batch_size / g.shape[-1] * outer + damping) * (dims[n] / math.prod(dims))  # (7)
            new.append((1 - self.beta2) * factor + self.beta2 * (0.5 * (h + t(h, xp))))  # (8)
        return tuple(new), tuple(_inverse(s, xp) for s in new)

    def report(self, state: RFShampooState, finite: Array, xp: Namespace) -> RFShampooReport:
        """Return the spectra of the factors."""
        return RFShampooReport(eigenvalues=tuple(roots.eigenvalues(s, xp=xp) for s in state.factors), finite=finite)


def _inverse(matrix: Array, xp: Namespace) -> Array:
    """Return the inverse of a symmetric ``matrix`` (..., d, d) by Cholesky; NaN if it is not definite or not finite."""
    finite = xp.isfinite(largest_entry(matrix, (-2, -1), xp))
    identity = eye_like(xp, matrix)
    (half,) = attempt(
        lambda s: (xp.linalg.solve(xp.linalg.cholesky(s), eye_like(xp, s)),), xp.where(finite, matrix, identity), xp=xp
    )
    return xp.where(finite, t(half, xp) @ half, math.nan)
