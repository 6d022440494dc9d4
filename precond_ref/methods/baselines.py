r"""Yardsticks: known optimizers, for comparison and as limiting cases of the others.

Elementwise, eps outside the root, 0/0 = 0, and momentum is the heavy ball b_t = momentum b_{t-1} + (new term):

* `SGD`: Polyak 1964; Nesterov's form as in Sutskever et al. 2013.
* `AdaGrad`: Duchi, Hazan, Singer, JMLR 2011 (diagonal). `FullAdaGrad`: the same paper's full-matrix form.
* `RMSProp`: Tieleman and Hinton 2012, momentum on the preconditioned gradient.
* `Adam`: Kingma and Ba, arXiv 1412.6980, Algorithm 1.

Matrices and tensors:

* `Shampoo`: Gupta, Koren, Singer, arXiv 1802.09568; any order, exponent -1/(2 ndim).
* `Muon`: Jordan et al. 2024; the polar factor of the averaged gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from precond_ref.numerics import roots
from precond_ref.numerics.arrays import all_finite, finite_members, zeros
from precond_ref.numerics.axes import unfold
from precond_ref.numerics.ema import accumulate, ema, one_minus_power, quotient, reciprocal, sqrt
from precond_ref.numerics.lapack import attempt
from precond_ref.numerics.refresh import is_due
from precond_ref.numerics.roots import Root
from precond_ref.protocol import (
    Array,
    Method,
    Namespace,
    Scalar,
    check_bool,
    check_choice,
    check_int,
    check_real,
    is_zero,
)


class ElementwiseReport(NamedTuple):
    """What the elementwise yardsticks' ``diagnose`` returns."""

    denominator: Array | None
    """What the (averaged) gradient was divided by at the last update, the parameter's shape; None for `SGD`."""
    finite: Array
    """Whether the whole state is finite, 0-D."""


class SGDState(NamedTuple):
    """State of `SGD`."""

    step: Any
    """Updates done."""
    buffer: Array | None
    """b_t, the parameter's shape; None with ``momentum=0``."""


@dataclass(frozen=True, kw_only=True)
class SGD(Method):
    """Gradient descent with heavy-ball momentum, elementwise; the direction is ``b_t``, or ``g + momentum b_t``."""

    momentum: float = 0.0
    nesterov: bool = False

    paper: ClassVar[str] = "Polyak 1964; Sutskever et al., ICML 2013 (Nesterov)"
    state_type: ClassVar[Any] = SGDState
    symbols: ClassVar = MappingProxyType(
        {"momentum": "mu, in [0, 1)", "nesterov": "direction g + mu b instead of b; needs momentum"}
    )
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_real(self, "momentum", ge=0, lt=1)
        check_bool(self, "nesterov")
        if self.nesterov and is_zero(self.momentum):
            raise ValueError("nesterov=True needs momentum > 0, got momentum=0")

    def init(self, param: Array, *, stack_ndim: int = 0) -> SGDState:
        xp = self._check_param(param, stack_ndim)
        return SGDState(step=0, buffer=None if is_zero(self.momentum) else xp.zeros_like(param))

    def update(
        self,
        grad: Array,
        state: SGDState,
        param: Array,
        *,
        scalars: Any = None,
        refresh: bool | None = None,
        xp: Namespace = None,
    ) -> tuple[Array, SGDState]:
        xp, _ = self._enter(grad, state, param, scalars, xp, unused={"buffer": is_zero(self.momentum)})
        if state.buffer is None:
            return 1.0 * grad, SGDState(step=state.step + 1, buffer=None)  # a new array, never the caller's
        buffer = self.momentum * state.buffer + grad  # b_t
        direction = grad + self.momentum * buffer if self.nesterov else 1.0 * buffer
        return direction, SGDState(step=state.step + 1, buffer=buffer)

    def diagnose(self, state: SGDState) -> ElementwiseReport:
        """Whether the momentum is finite; None without momentum."""
        self._check_state(state)
        if state.buffer is None:
            return ElementwiseReport(denominator=None, finite=None)
        return ElementwiseReport(None, all_finite(self._check_param(state.buffer, 0), state.buffer))


class AdaGradState(NamedTuple):
    """State of `AdaGrad`."""

    step: Any
    """Updates done."""
    total: Array
    """Sum of squared gradients, the parameter's shape."""


@dataclass(frozen=True, kw_only=True)
class AdaGrad(Method):
    """Diagonal AdaGrad (Duchi et al., 2011): ``g / (sqrt(initial + sum g^2) + eps)``, elementwise."""

    eps: float = 1e-10
    initial: float = 0.0

    paper: ClassVar[str] = "Duchi, Hazan, Singer: Adaptive subgradient methods, JMLR 2011"
    state_type: ClassVar[Any] = AdaGradState
    symbols: ClassVar = MappingProxyType(
        {"eps": "delta, added to the root, >= 0", "initial": "start of the sum of squares, >= 0"}
    )
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_real(self, "eps", ge=0)
        check_real(self, "initial", ge=0)

    def init(self, param: Array, *, stack_ndim: int = 0) -> AdaGradState:
        xp = self._check_param(param, stack_ndim)
        return AdaGradState(step=0, total=xp.zeros_like(param) + self.initial)

    def update(
        self,
        grad: Array,
        state: AdaGradState,
        param: Array,
        *,
        scalars: Any = None,
        refresh: bool | None = None,
        xp: Namespace = None,
    ) -> tuple[Array, AdaGradState]:
        xp, _ = self._enter(grad, state, param, scalars, xp)
        total = state.total + grad * grad
        direction = quotient(grad, xp.sqrt(total) + self.eps, xp, bound=self.eps)
        return direction, AdaGradState(step=state.step + 1, total=total)

    def diagnose(self, state: AdaGradState) -> ElementwiseReport:
        """The denominator."""
        self._check_state(state)
        xp = self._check_param(state.total, 0)
        return ElementwiseReport(xp.sqrt(state.total) + self.eps, all_finite(xp, state.total))


class FullAdaGradState(NamedTuple):
    """State of `FullAdaGrad` for a parameter of d entries."""

    step: Any
    """Updates done."""
    gram: Array
    """Sum of g g^T, (..., d, d)."""


class GramReport(NamedTuple):
    """What ``diagnose`` of `FullAdaGrad` and `Shampoo` returns: one entry per statistic."""

    eigenvalues: tuple[Array, ...]
    """Of each statistic, ascending, clipped at zero, (..., d); NaN where it is not finite."""
    finite: Array
    """Whether the member's state is finite and its statistics could be decomposed, (...)."""
    accuracy: tuple[Array, ...]
    """Relative error that each statistic allows a direction, see `precond_ref.numerics.roots.accuracy`, (...)."""


def _gram_report(grams: tuple[Array, ...], finite: Array, law: roots.Law, xp: Namespace) -> GramReport:
    w = tuple(roots.eigenvalues(gram, xp=xp) for gram in grams)
    finite = finite & finite_members(xp, *w, core_ndims=(1,) * len(w))
    return GramReport(eigenvalues=w, finite=finite, accuracy=tuple(roots.accuracy(each, law, xp=xp) for each in w))


@dataclass(frozen=True, kw_only=True)
class FullAdaGrad(Method):
    """Full-matrix AdaGrad (Duchi et al., 2011): ``((sum g g^T)^{1/2} + eps I)^{-1} g`` on the flattened parameter.

    ``eps=0`` is the pseudo-inverse. Costs d^2 memory and d^3 time for d entries.
    """

    eps: float = 0.0

    paper: ClassVar[str] = "Duchi, Hazan, Singer: Adaptive subgradient methods, JMLR 2011"
    state_type: ClassVar[Any] = FullAdaGradState
    symbols: ClassVar = MappingProxyType({"eps": "delta, added to the root, >= 0 (0: pseudo-inverse)"})
    ndims: ClassVar[tuple[int, int]] = (1, 64)

    def __post_init__(self) -> None:
        check_real(self, "eps", ge=0)

    def takes(self, shape: tuple[int, ...], path: str = "") -> bool:
        """Anything of at most 1024 entries."""
        return len(shape) >= 1 and math.prod(shape) <= 1024

    def init(self, param: Array, *, stack_ndim: int = 0) -> FullAdaGradState:
        xp = self._check_param(param, stack_ndim, factorizes=True)
        d = math.prod(param.shape[stack_ndim:])
        return FullAdaGradState(step=0, gram=zeros(xp, (*param.shape[:stack_ndim], d, d), param))

    def update(
        self,
        grad: Array,
        state: FullAdaGradState,
        param: Array,
        *,
        scalars: Any = None,
        refresh: bool | None = None,
        xp: Namespace = None,
    ) -> tuple[Array, FullAdaGradState]:
        shape = tuple(getattr(param, "shape", ()))
        stack = shape[: state.gram.ndim - 2] if hasattr(getattr(state, "gram", None), "ndim") else ()
        d = math.prod(shape[len(stack) :])
        xp, _ = self._enter(grad, state, param, scalars, xp, gram=(*stack, d, d))
        g = xp.reshape(grad, (*stack, d, 1))
        gram = state.gram + g @ xp.matrix_transpose(g)
        law = roots.Law(-1.0, self.eps, root=True)
        direction = roots.apply(g, {0: roots.decompose(gram, law, xp=xp)}, law, 1.0, xp=xp)
        return xp.reshape(direction, param.shape), FullAdaGradState(step=state.step + 1, gram=gram)

    def diagnose(self, state: FullAdaGradState) -> GramReport:
        """Spectrum of the sum of outer products."""
        self._check_state(state)
        xp = self._check_param(state.gram, state.gram.ndim - 1)
        finite = finite_members(xp, state.gram, core_ndims=(2,))
        return _gram_report((state.gram,), finite, roots.Law(-1.0, self.eps, root=True), xp)


class RMSPropState(NamedTuple):
    """State of `RMSProp`; arrays have the parameter's shape."""

    step: Any
    """Updates done."""
    v: Array
    """Average of squared gradients."""
    buffer: Array | None
    """Heavy-ball average of preconditioned gradients; None with ``momentum=0``."""


@dataclass(frozen=True, kw_only=True)
class RMSProp(Method):
    """RMSProp (Tieleman and Hinton, 2012), elementwise, ``g / (sqrt(v) + eps)``; ``beta2`` is a decay."""

    beta2: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0

    paper: ClassVar[str] = "Tieleman, Hinton: Lecture 6.5, 2012"
    state_type: ClassVar[Any] = RMSPropState
    symbols: ClassVar = MappingProxyType(
        {
            "beta2": "decay of the averaged squares, in [0, 1)",
            "eps": "added to the root, >= 0",
            "momentum": "heavy-ball momentum on the preconditioned gradient, in [0, 1)",
        }
    )
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_real(self, "beta2", ge=0, lt=1)
        check_real(self, "eps", ge=0)
        check_real(self, "momentum", ge=0, lt=1)

    def init(self, param: Array, *, stack_ndim: int = 0) -> RMSPropState:
        xp = self._check_param(param, stack_ndim)
        buffer = None if is_zero(self.momentum) else xp.zeros_like(param)
        return RMSPropState(step=0, v=xp.zeros_like(param), buffer=buffer)

    def update(
        self,
        grad: Array,
        state: RMSPropState,
        param: Array,
        *,
        scalars: Any = None,
        refresh: bool | None = None,
        xp: Namespace = None,
    ) -> tuple[Array, RMSPropState]:
        xp, _ = self._enter(grad, state, param, scalars, xp, unused={"buffer": is_zero(self.momentum)})
        v = ema(state.v, grad * grad, self.beta2)
        direction = quotient(grad, xp.sqrt(v) + self.eps, xp, bound=self.eps)
        if state.buffer is None:
            return direction, RMSPropState(step=state.step + 1, v=v, buffer=None)
        buffer = self.momentum * state.buffer + direction
        return 1.0 * buffer, RMSPropState(step=state.step + 1, v=v, buffer=buffer)

    def diagnose(self, state: RMSPropState) -> ElementwiseReport:
        """The denominator."""
        self._check_state(state)
        xp = self._check_param(state.v, 0)
        arrays = (state.v,) if state.buffer is None else (state.v, state.buffer)
        return ElementwiseReport(xp.sqrt(state.v) + self.eps, all_finite(xp, *arrays))


class AdamState(NamedTuple):
    """State of `Adam`; arrays have the parameter's shape."""

    step: Any
    """t, updates done."""
    m: Array
    """m_t, average of gradients, not bias-corrected."""
    v: Array
    """v_t, average of squared gradients, not bias-corrected."""


class AdamScalars(NamedTuple):
    """What `Adam.update` needs of the step's number."""

    inverse_c1: Scalar
    """1 / (1 - beta1^t)."""
    inverse_sqrt_c2: Scalar
    """1 / sqrt(1 - beta2^t)."""


@dataclass(frozen=True, kw_only=True)
class Adam(Method):
    """Adam (Kingma and Ba, arXiv 1412.6980, Algorithm 1), elementwise; ``beta1``, ``beta2`` are decays."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    paper: ClassVar[str] = "Kingma, Ba: Adam, ICLR 2015, arXiv 1412.6980"
    state_type: ClassVar[Any] = AdamState
    symbols: ClassVar = MappingProxyType(
        {
            "beta1": "beta_1, decay of the averaged gradient, in [0, 1)",
            "beta2": "beta_2, decay of the averaged square, in [0, 1)",
            "eps": "epsilon, added to the root, >= 0",
        }
    )
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_real(self, "beta1", ge=0, lt=1)
        check_real(self, "beta2", ge=0, lt=1)
        check_real(self, "eps", ge=0)

    def init(self, param: Array, *, stack_ndim: int = 0) -> AdamState:
        xp = self._check_param(param, stack_ndim)
        return AdamState(step=0, m=xp.zeros_like(param), v=xp.zeros_like(param))

    def scalars(self, step: Any, *, like: Array = None) -> AdamScalars:
        return AdamScalars(
            inverse_c1=reciprocal(one_minus_power(self.beta1, step, like=like)),
            inverse_sqrt_c2=reciprocal(sqrt(one_minus_power(self.beta2, step, like=like))),
        )

    def update(
        self,
        grad: Array,
        state: AdamState,
        param: Array,
        *,
        scalars: AdamScalars | None = None,
        refresh: bool | None = None,
        xp: Namespace = None,
    ) -> tuple[Array, AdamState]:
        xp, k = self._enter(grad, state, param, scalars, xp)
        m = ema(state.m, grad, self.beta1)  # m_t
        v = ema(state.v, grad * grad, self.beta2)  # v_t
        direction = quotient(m * k.inverse_c1, xp.sqrt(v) * k.inverse_sqrt_c2 + self.eps, xp, bound=self.eps)
        return direction, AdamState(step=state.step + 1, m=m, v=v)

    def diagnose(self, state: AdamState) -> ElementwiseReport:
        """The denominator."""
        self._check_state(state)
        xp = self._check_param(state.v, 0)
        k = self.scalars(state.step, like=state.v)
        denominator = xp.sqrt(state.v) * k.inverse_sqrt_c2 + self.eps
        return ElementwiseReport(denominator, all_finite(xp, state.m, state.v))


class ShampooState(NamedTuple):
    """State of `Shampoo` for a parameter (..., d_1, ..., d_k)."""

    step: Any
    """t, updates done."""
    grams: tuple[Array, ...]
    """One per axis, (..., d_i, d_i)."""
    roots: tuple[Root, ...] | None
    """Of the last refresh, one per axis, not formed: (..., d_i, d_i), (..., d_i); None when ``every=1``."""


class ShampooScalars(NamedTuple):
    """What `Shampoo.update` needs of the step's number."""

    correction: Scalar
    """1 / (1 - beta2^t) with ``bias_correction``, else 1."""


@dataclass(frozen=True, kw_only=True)
class Shampoo(Method):
    """Shampoo (Gupta, Koren, Singer, arXiv 1802.09568) for tensors of any order k >= 1::

        L_i = beta2 L_i + w G_(i) G_(i)^T,  w = 1 if beta2 = 1 else 1 - beta2     for each axis i
        direction = G x_1 (L_1 + eps I)^{-1/(2k)} ... x_k (L_k + eps I)^{-1/(2k)}

    ``beta2`` is a decay; 1 is the sum. Every axis counts in the exponent, also one of size 1. ``bias_correction``
    divides an average by 1 - beta2^t. One axis: full-matrix AdaGrad with eps under the root.
    """

    beta2: float = 1.0
    eps: float = 1e-6
    every: int = 1
    bias_correction: bool = False

    paper: ClassVar[str] = "Gupta, Koren, Singer: Shampoo, ICML 2018, arXiv 1802.09568"
    state_type: ClassVar[Any] = ShampooState
    symbols: ClassVar = MappingProxyType(
        {
            "beta2": "decay of the statistics, in [0, 1]; 1 is the sum",
            "eps": "epsilon, added to the eigenvalues under the root, >= 0 (0: pseudo-inverse)",
            "every": "updates between two roots, >= 1",
            "bias_correction": "divide the average by 1 - beta2^t; needs beta2 < 1",
        }
    )
    ndims: ClassVar[tuple[int, int]] = (1, 64)

    def __post_init__(self) -> None:
        check_real(self, "beta2", ge=0, le=1)
        check_real(self, "eps", ge=0)
        check_int(self, "every", ge=1)
        check_bool(self, "bias_correction")
        if self.bias_correction and self._is_sum():
            raise ValueError("bias_correction=True needs an average, beta2 < 1, got beta2=1")

    def _is_sum(self) -> bool:
        return isinstance(self.beta2, (int, float)) and self.beta2 == 1

    def init(self, param: Array, *, stack_ndim: int = 0) -> ShampooState:
        xp = self._check_param(param, stack_ndim, factorizes=True)
        stack, dims = tuple(param.shape[:stack_ndim]), param.shape[stack_ndim:]
        grams = tuple(zeros(xp, (*stack, d, d), param) for d in dims)
        kept = tuple(roots.identity_root(gram, xp=xp) for gram in grams) if self.every > 1 else None
        return ShampooState(step=0, grams=grams, roots=kept)

    def scalars(self, step: Any, *, like: Array = None) -> ShampooScalars:
        if not self.bias_correction:
            return ShampooScalars(correction=1.0)
        return ShampooScalars(correction=reciprocal(one_minus_power(self.beta2, step, like=like)))

    def update(
        self,
        grad: Array,
        state: ShampooState,
        param: Array,
        *,
        scalars: ShampooScalars | None = None,
        refresh: bool | None = None,
        xp: Namespace = None,
    ) -> tuple[Array, ShampooState]:
        xp, k = self._enter(grad, state, param, scalars, xp, unused={"roots": self.every == 1})
        due = is_due(state.step, self.every, refresh)
        order = len(state.grams)
        stack = param.ndim - order
        if not 0 <= stack < param.ndim:
            raise ValueError(f"state.grams must be one per axis of param of shape {tuple(param.shape)}, got {order}")
        if state.roots is not None and len(state.roots) != order:
            raise ValueError(f"state.roots must be as many as state.grams, {order}, got {len(state.roots)}")
        law = roots.Law(-0.5 / order, self.eps)
        grams, known = [], {}
        for i, old in enumerate(state.grams):
            d = param.shape[stack + i]
            expected = (*param.shape[:stack], d, d)
            if tuple(old.shape) != expected:
                raise ValueError(f"state.grams[{i}] must have shape {expected}, got {tuple(old.shape)}")
            if state.roots is not None:
                roots.check_root(f"state.roots[{i}]", state.roots[i], expected)
            unfolded = unfold(grad, stack, i, xp)  # G_(i), (..., d_i, rest)
            gram = accumulate(old, unfolded @ xp.matrix_transpose(unfolded), self.beta2)  # L_i
            corrected = gram * k.correction if self.bias_correction else gram
            kept = None if state.roots is None else state.roots[i]
            root, w = roots.renewed(due, corrected, law, kept, xp=xp)  # (L_i + eps I)^{-1/(2k)}
            if i == 0 and self.every > 1:  # a kept root knows nothing of this gradient
                root = root._replace(eigenvalues=root.eigenvalues + 0.0 * xp.linalg.trace(gram)[..., None])  # NaN
            known[i] = root, w
            grams.append(gram)
        weight = k.correction * accumulate(0.0, 1.0, self.beta2)  # of the new term
        weight = weight * due if self.every > 1 else weight  # of which a kept root knows nothing
        direction = roots.apply(grad, known, law, weight, xp=xp)  # x_i
        new = None if state.roots is None else tuple(root for root, _ in known.values())
        return direction, ShampooState(state.step + 1, tuple(grams), new)

    def diagnose(self, state: ShampooState) -> GramReport:
        """Spectra of the statistics."""
        self._check_state(state)
        xp = self._check_param(state.grams[0], state.grams[0].ndim - 2)
        arrays = [*state.grams, *(array for root in state.roots or () for array in root)]
        finite = finite_members(xp, *arrays, core_ndims=tuple(a.ndim - state.grams[0].ndim + 2 for a in arrays))
        return _gram_report(state.grams, finite, roots.Law(-0.5 / len(state.grams), self.eps), xp)


class MuonState(NamedTuple):
    """State of `Muon` for a parameter (..., m, n)."""

    step: Any
    """t, updates done."""
    m: Array
    """M_t, average of gradients, (..., m, n)."""


class MuonReport(NamedTuple):
    """What `Muon.diagnose` returns."""

    singular_values: Array
    """Of M_t, descending, (..., min(m, n)); NaN where M_t is not finite."""
    finite: Array
    """Whether the member's state is finite and could be decomposed, (...)."""


@dataclass(frozen=True, kw_only=True)
class Muon(Method):
    """Muon (Jordan et al., 2024) for matrices: the polar factor of an averaged gradient::

        M_t = momentum M_{t-1} + (1 - momentum) G_t
        N_t = momentum M_t + (1 - momentum) G_t if nesterov else M_t
        direction = rms sqrt(max(m, n)) polar(N_t)

    ``polar(U S V^T) = U V^T``. ``root="svd"`` is exact, singular values of at most max(m, n) u max(s) count as zero;
    ``root="newton_schulz"`` is Jordan's quintic (3.4445, -4.7750, 2.0315), ``root_steps`` times, which brings singular
    values into about [0.7, 1.2]. ``rms=None`` leaves out the factor.
    """

    momentum: float = 0.95
    nesterov: bool = True
    rms: float | None = 0.2
    root: str = "newton_schulz"
    root_steps: int = 5

    paper: ClassVar[str] = "Jordan et al.: Muon, 2024"
    state_type: ClassVar[Any] = MuonState
    symbols: ClassVar = MappingProxyType(
        {
            "momentum": "decay of the averaged gradient, in [0, 1)",
            "nesterov": "average once more with the current gradient",
            "rms": "factor with sqrt(max(m, n)), > 0, or None",
            "root": "'newton_schulz' (Jordan's quintic) or 'svd' (exact)",
            "root_steps": "iterations of 'newton_schulz', >= 1",
        }
    )
    ndims: ClassVar[tuple[int, int]] = (2, 2)

    def __post_init__(self) -> None:
        check_real(self, "momentum", ge=0, lt=1)
        check_bool(self, "nesterov")
        check_real(self, "rms", gt=0, optional=True)
        check_choice(self, "root", ("newton_schulz", "svd"))
        check_int(self, "root_steps", ge=1)

    def takes(self, shape: tuple[int, ...], path: str = "") -> bool:
        """Matrices that are not embeddings."""
        return len(shape) == 2 and "emb" not in path.lower()

    def init(self, param: Array, *, stack_ndim: int = 0) -> MuonState:
        xp = self._check_param(param, stack_ndim, factorizes=self.root == "svd")
        return MuonState(step=0, m=xp.zeros_like(param))

    def update(
        self,
        grad: Array,
        state: MuonState,
        param: Array,
        *,
        scalars: Any = None,
        refresh: bool | None = None,
        xp: Namespace = None,
    ) -> tuple[Array, MuonState]:
        xp, _ = self._enter(grad, state, param, scalars, xp)
        m = ema(state.m, grad, self.momentum)
        n = ema(grad, m, 1 - self.momentum) if self.nesterov else m
        direction = roots.polar(n, xp=xp) if self.root == "svd" else roots.polar_muon(n, self.root_steps, xp=xp)
        if self.rms is not None:
            direction = direction * (self.rms * math.sqrt(max(param.shape[-2:])))
        return direction, MuonState(step=state.step + 1, m=m)

    def diagnose(self, state: MuonState) -> MuonReport:
        """Singular values of the average."""
        self._check_state(state)
        xp = self._check_param(state.m, state.m.ndim - 2)
        finite = finite_members(xp, state.m, core_ndims=(2,))
        m = xp.where(finite[..., None, None], state.m, 0.0)
        (values,) = attempt(lambda x: (xp.linalg.svdvals(x),), m, wider=True, xp=xp)
        values = xp.where(finite[..., None], values, math.nan)
        return MuonReport(singular_values=values, finite=finite_members(xp, values, core_ndims=(1,)))
