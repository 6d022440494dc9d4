r"""Yardsticks: known optimizers, for comparison and as limiting cases of the others.

All but `FullAdaGrad` are elementwise. eps is outside the root, 0/0 = 0, and momentum is the heavy ball
b_t = momentum b_{t-1} + (new term):

* `SGD`: Polyak 1964; Nesterov's form as in Sutskever et al. 2013.
* `AdaGrad`: Duchi, Hazan, Singer, JMLR 2011 (diagonal). `FullAdaGrad`: the same paper's full-matrix form.
* `RMSProp`: Tieleman and Hinton 2012, momentum on the preconditioned gradient.
* `Adam`: Kingma and Ba, arXiv 1412.6980, Algorithm 1.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

from array_api_compat import array_namespace

from precond_ref.fields import choice, flag, is_python_number, is_zero, real
from precond_ref.numerics import roots
from precond_ref.numerics.arrays import clamp
from precond_ref.numerics.ema import ema, exp, expm1, heavy_ball, number, one_minus_power, quotient, reciprocal, sqrt
from precond_ref.numerics.roots import GramReport
from precond_ref.numerics.template import full, zeros
from precond_ref.protocol import Method, Now
from precond_ref.typing import Array, Namespace, Scalar


class ElementwiseReport(NamedTuple):
    """The report of ``diagnose`` of the elementwise yardsticks."""

    denominator: Array | None
    """Divisor of the (averaged) gradient at the last update, the parameter's shape; None for `SGD`."""
    finite: Array
    """True if the whole state is finite, 0-D."""


class SGDState(NamedTuple):
    """State of `SGD`."""

    step: Any
    """Number of updates done."""
    buffer: Array | None
    """b_t, the parameter's shape; None with ``momentum=0``."""


class SGD(Method):
    """Gradient descent with heavy-ball momentum, elementwise; the direction is ``b_t``, or ``g + momentum b_t``.

    ``b_t = momentum b_{t-1} + g`` (Polyak, 1964); the second direction is Nesterov's form (Sutskever et al., 2013).
    """

    momentum: float = real("mu", default=0.0, ge=0, lt=1)
    nesterov: bool = flag("direction g + mu b instead of b; needs momentum", default=False)

    paper: ClassVar[str] = "Polyak 1964; Sutskever et al., ICML 2013 (Nesterov)"
    elementwise: ClassVar[bool] = True

    def rules(self) -> None:
        if self.nesterov and is_zero(self.momentum):
            raise ValueError("nesterov=True needs momentum > 0, got momentum=0")

    def state_of(self, shape: tuple[int, ...]) -> SGDState:
        return SGDState(step=0, buffer=None if is_zero(self.momentum) else zeros(*shape))

    def step(self, grad: Array, state: SGDState, param: Array, now: Now) -> tuple[Array, SGDState]:
        if state.buffer is None:
            return 1.0 * grad, SGDState(step=now.step, buffer=None)  # a new array, never the caller's
        buffer, direction = heavy_ball(state.buffer, grad, self.momentum, self.nesterov)  # b_t
        return direction, SGDState(step=now.step, buffer=buffer)

    def report(self, state: SGDState, finite: Array, xp: Namespace) -> ElementwiseReport:
        """Return whether the momentum is finite; None without momentum."""
        return ElementwiseReport(denominator=None, finite=finite)


def _root(square: Array, eps: Scalar, form: str, xp: Namespace) -> Array:
    """Return sqrt(square) + eps ('outside'), or sqrt(square + eps) ('inside')."""
    return xp.sqrt(square + eps) if form == "inside" else xp.sqrt(square) + eps


class AdaGradState(NamedTuple):
    """State of `AdaGrad`."""

    step: Any
    """Number of updates done."""
    total: Array
    """Sum of squared gradients, the parameter's shape."""


class AdaGrad(Method):
    """Diagonal AdaGrad (Duchi et al., 2011): ``g / (sqrt(initial + sum g^2) + eps)``, elementwise.

    ``eps_form="inside"`` is ``g / sqrt(sum + eps)``, the form of optax and Keras, with eps 1e-7 and initial 0.1.
    """

    eps: float = real("delta, added to the root", default=1e-10, ge=0)
    initial: float = real("start of the sum of squares", default=0.0, ge=0)
    eps_form: str = choice("eps 'outside' of the root, or 'inside'", default="outside", of=("outside", "inside"))

    paper: ClassVar[str] = "Duchi, Hazan, Singer: Adaptive subgradient methods, JMLR 2011"
    elementwise: ClassVar[bool] = True

    def state_of(self, shape: tuple[int, ...]) -> AdaGradState:
        return AdaGradState(step=0, total=full(self.initial, *shape))

    def step(self, grad: Array, state: AdaGradState, param: Array, now: Now) -> tuple[Array, AdaGradState]:
        xp = now.xp
        total = state.total + grad * grad
        direction = quotient(grad, self._denominator(total, xp), xp, bound=self.eps)
        return direction, AdaGradState(step=now.step, total=total)

    def report(self, state: AdaGradState, finite: Array, xp: Namespace) -> ElementwiseReport:
        """Return the denominator."""
        return ElementwiseReport(self._denominator(state.total, xp), finite)

    def _denominator(self, total: Array, xp: Namespace) -> Array:
        return _root(total, self.eps, self.eps_form, xp)


class FullAdaGradState(NamedTuple):
    """State of `FullAdaGrad` for a parameter of d entries."""

    step: Any
    """Number of updates done."""
    gram: Array
    """Sum of g g^T, (..., d, d)."""


class FullAdaGrad(Method):
    """Full-matrix AdaGrad (Duchi et al., 2011): ``((sum g g^T)^{1/2} + eps I)^{-1} g`` on the flattened parameter.

    ``eps=0`` is the pseudo-inverse. The method needs d^2 memory and d^3 time for d entries.
    """

    eps: float = real("delta, added to the root (0: pseudo-inverse)", default=0.0, ge=0)

    paper: ClassVar[str] = "Duchi, Hazan, Singer: Adaptive subgradient methods, JMLR 2011"
    ndims: ClassVar[tuple[int, int]] = (1, 64)
    factorizes = True

    def takes(self, shape: tuple[int, ...], path: str = "") -> bool:
        """Return True for parameters of one axis or more and at most 1024 entries."""
        return len(shape) >= 1 and math.prod(shape) <= 1024

    def state_of(self, shape: tuple[int, ...]) -> FullAdaGradState:
        d = math.prod(shape)
        return FullAdaGradState(step=0, gram=zeros(d, d))

    def stack_ndim(self, state: FullAdaGradState) -> int:
        return state.gram.ndim - 2

    def step(self, grad: Array, state: FullAdaGradState, param: Array, now: Now) -> tuple[Array, FullAdaGradState]:
        xp = now.xp
        g = xp.reshape(grad, (*state.gram.shape[:-1], 1))
        gram = state.gram + g @ xp.matrix_transpose(g)
        law = roots.Law(-1.0, self.eps, root=True)
        direction = roots.apply(g, {0: roots.decompose(gram, law, xp=xp)}, law, 1.0, xp=xp)
        return xp.reshape(direction, grad.shape), FullAdaGradState(step=now.step, gram=gram)

    def report(self, state: FullAdaGradState, finite: Array, xp: Namespace) -> GramReport:
        """Return the spectrum of the sum of outer products."""
        return roots.report((state.gram,), finite, [roots.Law(-1.0, self.eps, root=True)], xp)


class RMSPropState(NamedTuple):
    """State of `RMSProp`; arrays have the parameter's shape."""

    step: Any
    """Number of updates done."""
    v: Array
    """Average of squared gradients."""
    buffer: Array | None
    """Heavy-ball average of preconditioned gradients; None with ``momentum=0``."""
    mean: Array | None = None
    """Average of gradients; None unless ``centered``."""


class RMSPropScalars(NamedTuple):
    """Values of `RMSProp.scalars`, which depend on the update's number alone; c_t = 1 without ``bias_correction``."""

    correction: Scalar
    """1 / c_t, c_t = 1 - beta2^t."""
    earlier: Scalar
    """1 / c_{t-1}, and 0 at the first update."""
    kept: Scalar
    """beta2 c_{t-1} / c_t, the share of the gradients before in the corrected averages."""
    new: Scalar
    """(1 - beta2) / c_t, that of the last gradient."""


class RMSProp(Method):
    """RMSProp (Tieleman and Hinton, 2012), elementwise, ``g / (sqrt(v) + eps)``; ``beta2`` is a decay.

    ``eps_form="inside"`` is ``g / sqrt(v + eps)``. ``centered`` subtracts the square of the averaged gradient from v,
    at least 0. This difference is made of the averages before and of the gradient, so that it is exact where it is 0,
    as with ``bias_correction`` at the first update. ``bias_correction`` divides both averages by 1 - beta2^t. With
    ``nesterov`` the direction is the preconditioned gradient plus momentum times the new buffer. The learning rate is
    outside the momentum, as in torch. In optax and Keras it is inside; the steps are the same while the rate is
    constant.
    """

    beta2: float = real("decay of the averaged squares", default=0.99, ge=0, lt=1)
    eps: float = real("added to the root", default=1e-8, ge=0)
    momentum: float = real("heavy-ball momentum on the preconditioned gradient", default=0.0, ge=0, lt=1)
    centered: bool = flag("subtract the square of the averaged gradient", default=False)
    eps_form: str = choice("eps 'outside' of the root, or 'inside'", default="outside", of=("outside", "inside"))
    bias_correction: bool = flag("divide the averages by 1 - beta2^t", default=False)
    initial: float = real("start of the averaged squares", default=0.0, ge=0)
    nesterov: bool = flag("look ahead; needs momentum", default=False)

    paper: ClassVar[str] = "Tieleman, Hinton: Lecture 6.5, 2012"
    elementwise: ClassVar[bool] = True

    def rules(self) -> None:
        if self.nesterov and is_zero(self.momentum):
            raise ValueError("nesterov=True needs momentum > 0, got 0")

    def state_of(self, shape: tuple[int, ...]) -> RMSPropState:
        buffer = None if is_zero(self.momentum) else zeros(*shape)
        mean = zeros(*shape) if self.centered else None
        return RMSPropState(step=0, v=full(self.initial, *shape), buffer=buffer, mean=mean)

    def scalars(self, step: Any, *, like: Array = None) -> RMSPropScalars:
        if not self.bias_correction:
            return RMSPropScalars(correction=1.0, earlier=1.0, kept=self.beta2, new=1 - self.beta2)
        before = one_minus_power(self.beta2, step - 1, like=like)
        correction = reciprocal(one_minus_power(self.beta2, step, like=like))
        new = (1 - self.beta2) * correction
        return RMSPropScalars(correction, earlier=reciprocal(before), kept=self.beta2 * before * correction, new=new)

    def step(self, grad: Array, state: RMSPropState, param: Array, now: Now) -> tuple[Array, RMSPropState]:
        xp = now.xp
        v = ema(state.v, grad * grad, self.beta2)
        mean = None if state.mean is None else ema(state.mean, grad, self.beta2)
        square = self._corrected(v, now.k.correction) if mean is None else self._variance(grad, state, now.k, xp)
        direction = quotient(grad, _root(square, self.eps, self.eps_form, xp), xp, bound=self.eps)
        buffer, direction = heavy_ball(state.buffer, direction, self.momentum, self.nesterov)
        return direction, RMSPropState(step=now.step, v=v, buffer=buffer, mean=mean)

    def _variance(self, grad: Array, state: RMSPropState, k: RMSPropScalars, xp: Namespace) -> Array:
        """Return v_t / c_t - (mean_t / c_t)^2, from the averages before."""
        mean = state.mean * k.earlier
        rest = grad - mean
        return self.beta2 * k.correction * clamp(state.v - state.mean * mean, 0.0, xp=xp) + k.kept * k.new * rest * rest

    def _corrected(self, average: Array, correction: Scalar) -> Array:
        return average * correction if self.bias_correction else average

    def report(self, state: RMSPropState, finite: Array, xp: Namespace) -> ElementwiseReport:
        """Return the denominator."""
        correction = self.scalars(state.step, like=state.v).correction
        square = self._corrected(state.v, correction)
        if state.mean is not None:
            mean = self._corrected(state.mean, correction)
            square = clamp(square - mean * mean, 0.0, xp=xp)
        return ElementwiseReport(_root(square, self.eps, self.eps_form, xp), finite)


class AdamState(NamedTuple):
    """State of `Adam`; arrays have the parameter's shape."""

    step: Any
    """t, number of updates done."""
    m: Array
    """m_t, average of gradients, not bias-corrected."""
    v: Array
    """v_t, average of squared gradients, not bias-corrected."""
    v_max: Array | None = None
    """Largest v_t so far, or v_t / (1 - beta2^t); None without ``amsgrad``."""


class AdamScalars(NamedTuple):
    """Values of `Adam.scalars`, which depend on the update's number alone."""

    inverse_c1: Scalar
    """Factor of m_t: 1 / (1 - beta1^t), or the factor of NAdam."""
    inverse_sqrt_c2: Scalar
    """1 / sqrt(1 - beta2^t)."""
    gradient: Scalar = 0.0
    """Factor of g_t: 0, or the factor of NAdam."""
    rectified: Scalar = 1.0
    """Factor of the direction; 0 in updates in which RAdam does not divide."""
    plain: Scalar = 0.0
    """1 in updates in which RAdam does not divide, else 0."""


class Adam(Method):
    """Adam (Kingma and Ba, arXiv 1412.6980, Algorithm 1), elementwise; ``beta1``, ``beta2`` are decays::

        m_t = beta1 m_{t-1} + (1 - beta1) g_t,  v_t = beta2 v_{t-1} + (1 - beta2) g_t^2,  c_i = 1 - beta_i^t
        direction = m_t / c1 / (sqrt(v_t / c2 + eps_root) + eps)

    ``eps_form="uncorrected"``: eps / sqrt(c2) instead of eps, the paper's epsilon hat. ``amsgrad``: the largest v_t
    so far ("uncorrected", torch's) or the largest v_t / c2 ("corrected", optax's) instead of the last.
    ``nesterov``: NAdam, instead of m_t / c1 ::

        "constant":   beta1 m_t / (1 - beta1^(t+1)) + (1 - beta1) g_t / c1                               (optax)
        "scheduled":  mu_{t+1} m_t / (1 - P_t mu_{t+1}) + (1 - mu_t) g_t / (1 - P_t)                     (torch, Keras)
                      mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2),  P_t = mu_1 ... mu_t

    ``rectify``: RAdam, rho = rho_inf - 2 t beta2^t / c2, rho_inf = 2 / (1 - beta2) - 1; for rho > 5 the direction times
    sqrt((rho - 4)(rho - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho)), else m_t / c1 alone. ``bias_correction``:
    "second" has c1 = 1, "none" also c2 = 1 and no corrections of NAdam.
    """

    beta1: float = real("beta_1, decay of the averaged gradient", default=0.9, ge=0, lt=1)
    beta2: float = real("beta_2, decay of the averaged square", default=0.999, ge=0, lt=1)
    eps: float = real("epsilon, added to the root", default=1e-8, ge=0)
    eps_root: float = real("added to the corrected square under the root", default=0.0, ge=0)
    eps_form: str = choice("eps beside the 'corrected' root, or the 'uncorrected' one", default="corrected",
                           of=("corrected", "uncorrected"))  # fmt: skip
    amsgrad: str | None = choice("largest of 'uncorrected' or 'corrected' squares (None: the last)", default=None,
                                 of=("uncorrected", "corrected"), optional=True)  # fmt: skip
    nesterov: str | None = choice("NAdam with 'constant' or 'scheduled' momentum", default=None,
                                  of=("constant", "scheduled"), optional=True)  # fmt: skip
    momentum_decay: float | None = real("psi of 'scheduled' (None: 0.004)", default=None, ge=0, optional=True)
    rectify: bool = flag("RAdam's factor", default=False)
    bias_correction: str = choice("of 'both' averages, the 'second', or 'none'", default="both",
                                  of=("both", "second", "none"))  # fmt: skip

    paper: ClassVar[str] = "Kingma, Ba: Adam, ICLR 2015, arXiv 1412.6980"
    elementwise: ClassVar[bool] = True

    presets: ClassVar[tuple[str, ...]] = ("torch_nadam", "optax_nadam", "keras", "keras_nadam", "torch_radam")

    @staticmethod
    def torch_nadam(beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, momentum_decay: float = 4e-3) -> Adam:
        """``torch.optim.NAdam``."""
        return Adam(beta1=beta1, beta2=beta2, eps=eps, nesterov="scheduled", momentum_decay=momentum_decay)

    @staticmethod
    def optax_nadam(beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0) -> Adam:
        """``optax.nadam``."""
        return Adam(beta1=beta1, beta2=beta2, eps=eps, eps_root=eps_root, nesterov="constant")

    @staticmethod
    def keras(beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-7) -> Adam:
        """Adam of Keras and TensorFlow."""
        return Adam(beta1=beta1, beta2=beta2, eps=eps, eps_form="uncorrected")

    @staticmethod
    def keras_nadam(beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-7) -> Adam:
        """Nadam of Keras."""
        return Adam(beta1=beta1, beta2=beta2, eps=eps, nesterov="scheduled", momentum_decay=1.0)

    @staticmethod
    def torch_radam(beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Adam:
        """``torch.optim.RAdam``."""
        return Adam(beta1=beta1, beta2=beta2, eps=eps, eps_form="uncorrected", rectify=True)

    def state_of(self, shape: tuple[int, ...]) -> AdamState:
        v_max = None if self.amsgrad is None else zeros(*shape)
        return AdamState(step=0, m=zeros(*shape), v=zeros(*shape), v_max=v_max)

    def scalars(self, step: Any, *, like: Array = None) -> AdamScalars:
        beta1, first, second = self.beta1, self.bias_correction == "both", self.bias_correction != "none"
        inverse_c1 = reciprocal(one_minus_power(beta1, step, like=like)) if first else 1.0
        c2 = one_minus_power(self.beta2, step, like=like)
        inverse_sqrt_c2 = reciprocal(sqrt(c2)) if second else 1.0
        gradient, rectified, plain = 0.0, 1.0, 0.0
        if self.nesterov == "constant":
            gradient = (1 - beta1) * inverse_c1
            inverse_c1 = beta1 * reciprocal(one_minus_power(beta1, step + 1, like=like)) if first else beta1
        elif self.nesterov == "scheduled":
            psi = 4e-3 if self.momentum_decay is None else self.momentum_decay
            mu, product = _scheduled(beta1, psi, step, like)
            after, _ = _scheduled(beta1, psi, step + 1, like, product=False)
            gradient = (1 - mu) * (reciprocal(1 - product) if first else 1.0)
            inverse_c1 = after * (reciprocal(1 - product * after) if first else 1.0)
        if self.rectify:
            rectified, plain = _rectification(self.beta2, step, c2, like)
        return AdamScalars(inverse_c1, inverse_sqrt_c2, gradient, rectified, plain)

    def step(self, grad: Array, state: AdamState, param: Array, now: Now) -> tuple[Array, AdamState]:
        xp, k = now.xp, now.k
        m = ema(state.m, grad, self.beta1)  # m_t
        v = ema(state.v, grad * grad, self.beta2)  # v_t
        v_max = None
        if state.v_max is not None:
            v_max = xp.maximum(state.v_max, v * k.inverse_sqrt_c2**2 if self.amsgrad == "corrected" else v)
        step = m * k.inverse_c1 if self.nesterov is None else m * k.inverse_c1 + grad * k.gradient
        denominator = self._denominator(v, v_max, k, xp)
        direction = quotient(step * k.rectified if self.rectify else step, denominator, xp, bound=self.eps)
        if self.rectify:
            direction = direction + step * k.plain
        return direction, AdamState(step=now.step, m=m, v=v, v_max=v_max)

    def _denominator(self, v: Array, v_max: Array | None, k: AdamScalars, xp: Namespace) -> Array:
        corrected = v_max is not None and self.amsgrad == "corrected"
        square = v if v_max is None else v_max
        if is_zero(self.eps_root):
            root = xp.sqrt(square) if corrected else xp.sqrt(square) * k.inverse_sqrt_c2
        else:
            root = xp.sqrt((square if corrected else square * k.inverse_sqrt_c2**2) + self.eps_root)
        return root + (self.eps * k.inverse_sqrt_c2 if self.eps_form == "uncorrected" else self.eps)

    def report(self, state: AdamState, finite: Array, xp: Namespace) -> ElementwiseReport:
        """Return the denominator."""
        k = self.scalars(state.step, like=state.v)
        return ElementwiseReport(self._denominator(state.v, state.v_max, k, xp), finite)


def _scheduled(beta1: Scalar, psi: Scalar, step: Any, like: Array, product: bool = True) -> tuple[Scalar, Scalar]:
    """Return mu_t and P_t = mu_1 ... mu_t.

    log(P_t / beta1^t) is the sum of log(1 - q^i / 2), q = 0.96^psi. Each power of its series in 1/2 has a geometric sum
    in q; the terms after 60 powers are below the rounding of float64. Up to 64 factors are multiplied one by one.
    """
    t = number(step, like)
    mu = beta1 * (1 - 0.5 * 0.96 ** (t * psi))
    if not product:
        return mu, mu
    if isinstance(step, int) and step <= 64:
        return mu, math.prod(beta1 * (1 - 0.5 * 0.96 ** (i * psi)) for i in range(1, step + 1))
    log_q, total = math.log(0.96) * psi, 0.0
    for k in range(1, 61):
        ratio = expm1(t * (k * log_q)) / expm1(k * log_q) if not is_zero(psi) else t
        total = total + 0.5**k / k * exp(k * log_q) * ratio
    return mu, (1 - one_minus_power(beta1, step, like=like)) * exp(-total)


def _rectification(beta2: Scalar, step: Any, c2: Scalar, like: Array) -> tuple[Scalar, Scalar]:
    """Return the factor of RAdam (0 for rho <= 5), and the factor of the plain direction (1 there, else 0)."""
    limit = 2 / (1 - beta2) - 1
    rho = limit - 2 * number(step, like) * (1 - c2) * reciprocal(c2)
    if is_python_number(rho):
        if rho <= 5:
            return 0.0, 1.0
        return math.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)), 0.0
    xp = array_namespace(rho)
    safe = xp.where(rho > 5, rho, 6.0)
    apart = (limit - 4) * (limit - 2)
    factor = sqrt((safe - 4) * (safe - 2) * limit / (apart * safe))
    return xp.where(rho > 5, factor, 0.0), xp.where(rho > 5, 0.0 * rho, 1.0)
