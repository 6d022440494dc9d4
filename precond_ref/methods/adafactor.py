r"""Adafactor: Adam's second moment in two vectors for a matrix, a clip, and steps relative to the parameter's size.

Shazeer, Stern: *Adafactor: Adaptive learning rates with sublinear memory cost*, ICML 2018, arXiv 1804.04235. The
authors' code is that of tensor2tensor; transformers, torch, optax, timm, Big Vision and Keras have forms of their own.

Symbols
    symbol                 here
    G_t, X                 ``grad``, ``param``; (m, n) are its two factored axes
    R_t, C_t               ``state.row``, ``state.col``: averages of the row means and column means of the squares
    V_t                    the estimated average of the squares; ``state.v`` if the parameter is not factored
    t                      ``state.step`` + 1, number of the update
    w_t = 1 - beta2_t      weight of the new square: ``decay_schedule``, ``decay_rate``, ``decay_offset``, ``beta2_cap``
    epsilon_1, epsilon_2   ``eps1``, ``eps2``
    d                      ``clip``
    beta_1                 ``beta1``, with ``momentum_of``
    rho_t                  the caller's learning rate, such as `Adafactor.relative_step`

Update (t = 1, 2, ...)
    w_t = max(t - decay_offset, 1)^(-decay_rate), at least 1 - beta2_cap                     (w)
    P   = G o G + eps1                                                                       (1)
    R_t = (1 - w_t) R_{t-1} + w_t (means of P over the columns)
    C_t = (1 - w_t) C_{t-1} + w_t (means of P over the rows)                                 (2)
    V_t = R_t C_t^T / mean(R_t),  for each matrix of a tensor                                (3)
    V_t = (1 - w_t) V_{t-1} + w_t P,  for a parameter that is not factored                   (4)
    U   = G / sqrt(V_t)                                                                      (5)
    U   = U / max(1, RMS(U) / clip),  RMS over the whole parameter                           (6)
    s_t = max(eps2, RMS(X)),  or 1 without ``parameter_scale``                               (7)
    direction = s_t U                                                                        (8)
    M_t = beta1 M_{t-1} + (1 - beta1) s_t U,  direction = M_t,   with ``momentum_of="step"``
    M_t = beta1 M_{t-1} + (1 - beta1) U,  direction = s_t M_t,   with ``momentum_of="update"``   (9)
    direction = direction + weight_decay s_t X                                               (10)

The caller makes X - rho_t direction. (3) has the row and column sums of the average of G o G.

Conventions
    R_t and C_t are means, as in all codes; with sums V_t is the same, except for the place of eps1.
    ``decay_schedule="adam"``: w_t = (1 - decay_rate) / (1 - decay_rate^t); V_t is then Adam's corrected average.
    ``eps_form="floor"`` is the form of torch: (1) without eps1, mean(R_t) at least eps1 in (3), V_t at least eps1^2 in
    (5); ``eps1=None`` is the spacing of the dtype at 1.
    The codes factor different axes, see ``factored_axes``: the last two (tensor2tensor, transformers, torch, Keras),
    the largest two (optax, Big Vision), the first two of kernels (timm). Of equal sizes the later axes count as larger.
    Vectors and scalars are not factored.
    (6) and (7) are over the whole parameter, also of more than two axes; X is the parameter before the update.
    (9) averages the factor of the learning rate. tensor2tensor, transformers and optax average rho_t s_t U, which is
    the same while rho_t is constant.
    (10) is the decay of transformers: outside the momentum, with s_t. A zero row of G with ``eps1=0`` gives 0.
    Below float32 the state and the arithmetic are in float32.

Coincides with (each a test)
    `RMSProp` with decay 1 - w_t if G_t o G_t = a b^T tau_t: V_t is then exact. `Adam` with beta1 = 0, eps = 0 for
    ``decay_schedule="adam"`` without factors, clip and scale, eps1 = 0. One row or one column: the form without
    factors, eps1 = 0.

Hazards
    A parameter at 0 moves by eps2 times the learning rate. If one library factors a matrix and another does not,
    because the matrix is too small, the two run different methods.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

from array_api_compat import array_namespace

from precond_ref.fields import choice, flag, integer, is_python_number, is_zero, real
from precond_ref.numerics.arrays import clamp, frobenius
from precond_ref.numerics.ema import ema, expm1, number, one_minus_power, quotient, reciprocal, sqrt
from precond_ref.numerics.refresh import surely
from precond_ref.numerics.template import zeros
from precond_ref.protocol import Method, Now
from precond_ref.typing import Array, Namespace, Scalar


class AdafactorState(NamedTuple):
    """State of `Adafactor` for a parameter (..., d_1, ..., d_k); float32 at least."""

    step: Any
    """t, number of updates done."""
    row: Array | None
    """R_t, the parameter's shape with size 1 in the place of the columns; None if the parameter is not factored."""
    col: Array | None
    """C_t, the parameter's shape with size 1 in the place of the rows; None if the parameter is not factored."""
    v: Array | None
    """V_t, the parameter's shape; None if the parameter is factored."""
    m: Array | None
    """M_t, the parameter's shape; None with ``beta1=0``."""
    rms: Array
    """RMS(U) of (5) at the last update, before the clip, (...)."""


class AdafactorScalars(NamedTuple):
    """Values of `Adafactor.scalars`, which depend on the update's number alone."""

    old: Scalar
    """1 - w_t."""
    new: Scalar
    """w_t."""


class AdafactorReport(NamedTuple):
    """The report of `Adafactor.diagnose`."""

    denominator: Array
    """sqrt(V_t), the parameter's shape."""
    rms: Array
    """RMS(U) at the last update, before the clip, (...)."""
    decay: Scalar
    """1 - w_t of the last update."""
    finite: Array
    """True if the state of the stack member is finite, (...)."""


class Adafactor(Method):
    """Adafactor (Shazeer and Stern, 2018) for parameters of any shape; the equations are the module's.

    The defaults are those of tensor2tensor, whose learning rate is ``lr=Adafactor.relative_step``.
    Errors: ValueError or TypeError for a field out of range, and for arrays that do not fit together.
    """

    eps1: float | None = real(
        "epsilon_1, added to the squares (None: the dtype's spacing at 1)", default=1e-30, ge=0, optional=True
    )
    eps2: float = real("epsilon_2, least scale of the step", default=1e-3, ge=0)
    clip: float | None = real("d, largest root mean square of U", default=1.0, ge=1e-30, optional=True)
    decay_schedule: str = choice(
        "w_t = 'power': t^-decay_rate, 'adam': (1 - decay_rate) / (1 - decay_rate^t)",
        default="power",
        of=("power", "adam"),
    )
    decay_rate: float = real("exponent c of 'power', or beta_2 of 'adam'", default=0.8, ge=0, le=1)
    decay_offset: int = integer("updates before t is counted", default=0, ge=0)
    beta2_cap: float = real("largest weight of the old average", default=1.0, ge=0, le=1)
    beta1: float = real("beta_1, decay of the averaged update; 0: no average", default=0.0, ge=0, lt=1)
    momentum_of: str = choice(
        "average of the 'step' s_t U, or of the 'update' U", default="step", of=("step", "update")
    )
    parameter_scale: bool = flag("steps relative to the parameter's root mean square", default=True)
    factored_axes: str | None = choice(
        "'last' two, 'largest' two, 'leading' (the first two of more than two, if large enough, else the last two), "
        "or None: no factors",
        default="last",
        of=("last", "largest", "leading"),
        optional=True,
    )
    min_size: int = integer("least size of each factored axis", default=0, ge=0)
    eps_form: str = choice(
        "eps1 is added to the 'square', or is torch's 'floor'", default="square", of=("square", "floor")
    )
    weight_decay: float = real("times s_t and the parameter, outside the average", default=0.0, ge=0)

    paper: ClassVar[str] = "Shazeer, Stern: Adafactor, ICML 2018, arXiv 1804.04235"
    presets: ClassVar[tuple[str, ...]] = ("torch", "optax", "timm", "big_vision")

    @staticmethod
    def torch(eps1: float | None = None, clip: float = 1.0, decay_rate: float = 0.8) -> Adafactor:
        """``torch.optim.Adafactor``; its learning rate is min(lr, 1 / sqrt(t)): ``relative_step`` with ``most=lr``."""
        return Adafactor(eps_form="floor", eps1=eps1, clip=clip, decay_rate=decay_rate)

    @staticmethod
    def optax(eps1: float = 1e-30, decay_rate: float = 0.8, min_size: int = 128) -> Adafactor:
        """``optax.adafactor``."""
        return Adafactor(eps1=eps1, decay_rate=decay_rate, factored_axes="largest", min_size=min_size)

    @staticmethod
    def timm(eps1: float = 1e-30, decay_rate: float = 0.8, min_size: int = 17) -> Adafactor:
        """timm's ``Adafactor`` with a given learning rate."""
        return Adafactor(
            eps1=eps1, decay_rate=decay_rate, factored_axes="leading", min_size=min_size, parameter_scale=False
        )

    @staticmethod
    def big_vision(eps1: float = 1e-30, beta1: float = 0.9, beta2_cap: float = 0.999, min_size: int = 16) -> Adafactor:
        """Big Vision's form, in float32: without clip and scale, with an average of the update."""
        return Adafactor(
            eps1=eps1,
            clip=None,
            beta2_cap=beta2_cap,
            beta1=beta1,
            momentum_of="update",
            parameter_scale=False,
            factored_axes="largest",
            min_size=min_size,
        )

    @staticmethod
    def relative_step(step: Any, *, warmup: bool = False, most: Scalar = 1e-2) -> Scalar:
        """Return the learning rate of tensor2tensor and transformers after ``step`` updates, t = ``step`` + 1.

        It is min(most, 1/sqrt(t)), and with ``warmup`` min(1e-6 t, 1/sqrt(t)).
        """
        if isinstance(step, int):
            return min(1e-6 * (step + 1) if warmup else most, 1 / math.sqrt(step + 1))
        xp = array_namespace(step)
        t = xp.astype(step + 1, xp.float32)
        return xp.minimum(1e-6 * t if warmup else most * xp.ones_like(t), 1 / xp.sqrt(t))

    def rules(self) -> None:
        if self.decay_schedule == "adam" and is_python_number(self.decay_rate) and self.decay_rate == 1:
            raise ValueError("decay_rate must be below 1 for decay_schedule='adam', which never sees a gradient, got 1")

    @property
    def reads_param(self) -> bool:
        return self.parameter_scale or not is_zero(self.weight_decay)

    def takes(self, shape: tuple[int, ...], path: str = "") -> bool:
        """Return True: the method takes every parameter."""
        return True

    def factored(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """Return the two factored axes of a parameter of ``shape``; None if it is not factored."""
        n = len(shape)
        pairs = [(n - 2, n - 1)]
        if self.factored_axes == "largest":
            first, second = sorted(sorted(range(n), key=lambda i: (shape[i], i))[-2:]) if n > 1 else (0, 0)
            pairs = [(first, second)]
        elif self.factored_axes == "leading" and n > 2:
            pairs = [(0, 1), *pairs]
        large = [pair for pair in pairs if n > 1 and min(shape[i] for i in pair) >= self.min_size]
        return large[0] if large and self.factored_axes is not None else None

    def state_of(self, shape: tuple[int, ...]) -> AdafactorState:
        axes, row, col, v = self.factored(shape), None, None, None
        if axes is None:
            v = zeros(*shape)
        else:
            col, row = (zeros(*(1 if i == axis else d for i, d in enumerate(shape))) for axis in axes)
        m = None if is_zero(self.beta1) else zeros(*shape)
        return AdafactorState(step=0, row=row, col=col, v=v, m=m, rms=zeros())

    @property
    def idle(self) -> frozenset[str]:
        return frozenset(
            (*(() if self.parameter_scale else ("eps2",)), *(("min_size",) if self.factored_axes is None else ()),
             *(("momentum_of",) if is_zero(self.beta1) else ()))
        )  # fmt: skip

    def stack_ndim(self, state: AdafactorState) -> int:
        return state.rms.ndim

    def scalars(self, step: Any, *, like: Array = None) -> AdafactorScalars:
        rate, cap = self.decay_rate, self.beta2_cap
        if self.decay_schedule == "adam":
            over = reciprocal(one_minus_power(rate, step, like=like))
            before = max(step - 1, 0) if isinstance(step, int) else clamp(step - 1, 0, xp=array_namespace(step))
            old, new = rate * one_minus_power(rate, before, like=like) * over, (1 - rate) * over
        else:
            t, log = _counted(step, self.decay_offset, like)
            power = -rate * log
            old = -expm1(power)
            new = t**-rate  # neither is the difference of the other from 1, which would lose digits
        if all(map(is_python_number, (old, cap))):
            return AdafactorScalars(min(old, cap), max(new, 1 - cap))
        xp = array_namespace(*(a for a in (old, cap) if not is_python_number(a)))
        return AdafactorScalars(xp.where(old > cap, cap, old), xp.where(old > cap, 1 - cap, new))

    def step(self, grad: Array, state: AdafactorState, param: Array, now: Now) -> tuple[Array, AdafactorState]:
        xp, k, dtype = now.xp, now.k, state.rms.dtype
        if 0 in grad.shape:
            return 1.0 * grad, state._replace(step=now.step)
        g = xp.astype(grad, dtype, copy=False)
        eps1 = self._eps1(dtype, xp)
        square = g * g if self.eps_form == "floor" else g * g + eps1  # (1)
        row = col = v = None
        if state.v is None:
            a, b = self._axes(state, now.stack)
            row = k.old * state.row + k.new * xp.mean(square, axis=b, keepdims=True)
            col = k.old * state.col + k.new * xp.mean(square, axis=a, keepdims=True)  # (2)
        else:
            bad = 0.0 * xp.reshape(state.rms, (*grad.shape[: now.stack], *(1,) * (grad.ndim - now.stack)))  # NaN, or 0
            v = k.old * state.v + k.new * square + bad  # (4)
        new = AdafactorState(step=now.step, row=row, col=col, v=v, m=None, rms=state.rms)
        u = self._divided(g, new, now.stack, xp)  # (5)
        rms = _rms(u, now.stack, xp)
        clipped = 1.0 + 0.0 * rms if self.clip is None else self.clip / clamp(rms, self.clip, xp=xp)  # NaN if one is
        x: Any = None if param is None else xp.astype(param, dtype, copy=False)
        scale = clamp(_rms(x, now.stack, xp), self.eps2, xp=xp) if self.parameter_scale else 1.0  # (7)
        late = state.m is not None and self.momentum_of == "update"
        u = u * (clipped if late else clipped * scale)  # (6), (8)
        m = None
        if state.m is not None:
            m = ema(state.m, u, self.beta1)  # (9)
            u = m * scale if late else 1.0 * m
        if not is_zero(self.weight_decay):
            u = u + self.weight_decay * scale * x  # (10)
        rms = xp.reshape(rms, state.rms.shape)
        return xp.astype(u, grad.dtype, copy=False), new._replace(m=m, rms=rms)

    def _eps1(self, dtype: Any, xp: Namespace) -> Scalar:
        return float(xp.finfo(dtype).eps) if self.eps1 is None else self.eps1

    def _axes(self, state: AdafactorState, stack: int) -> tuple[int, int]:
        """Return the factored axes of the arrays, rows and columns."""
        row, col = state.row.shape[stack:], state.col.shape[stack:]  # type: ignore[union-attr]
        axes: Any = self.factored(tuple(n if m == 1 else m for m, n in zip(row, col, strict=True)))
        return axes[0] + stack, axes[1] + stack

    def _divided(self, g: Array, state: AdafactorState, stack: int, xp: Namespace) -> Array:
        """Return ``g`` / sqrt(V_t)."""
        if state.v is None and self.eps_form == "square":
            over = xp.sqrt(xp.mean(state.row, axis=self._axes(state, stack)[0], keepdims=True))
            row, col = xp.sqrt(state.row), xp.sqrt(state.col)  # no product of squares underflows
            return g * quotient(over, xp.where(row == 0, math.inf, row), xp) * (1 / xp.where(col == 0, math.inf, col))
        return quotient(g, self._denominator(state, stack, xp), xp, bound=self._least(g.dtype, xp))

    def _least(self, dtype: Any, xp: Namespace) -> Scalar:
        """Return a lower bound of sqrt(V_t), for all parameters but factored ones with the form 'square'."""
        return self._eps1(dtype, xp) if self.eps_form == "floor" else sqrt(self._eps1(dtype, xp))

    def _denominator(self, state: AdafactorState, stack: int, xp: Namespace) -> Array:
        """Return sqrt(V_t)."""
        floor = self.eps_form == "floor"
        if state.v is not None:
            root = least = xp.sqrt(state.v)
        else:
            mean = xp.mean(state.row, axis=self._axes(state, stack)[0], keepdims=True)
            if floor:
                mean = clamp(mean, self._eps1(mean.dtype, xp), xp=xp)
            rows, columns = quotient(xp.sqrt(state.row), xp.sqrt(mean), xp), xp.sqrt(state.col)
            root, least = rows * columns, xp.min(rows) * xp.min(columns)  # (3)
        eps1 = self._eps1(root.dtype, xp)
        return clamp(root, eps1, xp=xp) if floor and not surely(least >= eps1) else root

    def report(self, state: AdafactorState, finite: Array, xp: Namespace) -> AdafactorReport:
        """Return the denominator, and the size of U."""
        denominator: Any = state.v if state.row is None else state.row * state.col
        if 0 not in denominator.shape:
            denominator = self._denominator(state, state.rms.ndim, xp)
        return AdafactorReport(denominator, state.rms, self.scalars(state.step, like=state.rms).old, finite)


def _counted(step: Any, offset: int, like: Array) -> tuple[Any, Any]:
    """Return max(step - offset, 1) and its logarithm: Python floats, or in the dtype of ``like``, float32 at least."""
    if isinstance(step, int):
        t = float(max(step - offset, 1))
        return t, math.log(t)
    xp = array_namespace(step)
    t = clamp(number(step, like) - offset, 1.0, xp=xp)
    return t, xp.log(t)


def _rms(array: Array, stack: int, xp: Namespace) -> Array:
    """Return the root mean square of each member, (..., 1, ..., 1)."""
    flat = xp.reshape(array, (*array.shape[:stack], -1))
    rms = frobenius(flat, (-1,), xp) / math.sqrt(flat.shape[-1])
    return xp.reshape(rms, (*array.shape[:stack], *(1,) * (array.ndim - stack)))
