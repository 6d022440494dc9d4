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
from typing import Any, ClassVar, NamedTuple

from precond_ref.fields import choice, flag, integer, is_zero, real
from precond_ref.numerics import roots
from precond_ref.numerics.arrays import finite_members
from precond_ref.numerics.axes import unfold
from precond_ref.numerics.ema import accumulate, ema, one_minus_power, quotient, reciprocal, sqrt
from precond_ref.numerics.lapack import attempt
from precond_ref.numerics.roots import Root
from precond_ref.numerics.template import full, zeros
from precond_ref.protocol import Method, Now
from precond_ref.typing import Array, Namespace, Scalar


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


class SGD(Method):
    """Gradient descent with heavy-ball momentum, elementwise; the direction is ``b_t``, or ``g + momentum b_t``."""

    momentum: float = real("mu", default=0.0, ge=0, lt=1)
    nesterov: bool = flag("direction g + mu b instead of b; needs momentum", default=False)

    paper: ClassVar[str] = "Polyak 1964; Sutskever et al., ICML 2013 (Nesterov)"
    state_type: ClassVar[Any] = SGDState
    elementwise: ClassVar[bool] = True

    def rules(self) -> None:
        if self.nesterov and is_zero(self.momentum):
            raise ValueError("nesterov=True needs momentum > 0, got momentum=0")

    def state_of(self, shape: tuple[int, ...]) -> SGDState:
        return SGDState(step=0, buffer=None if is_zero(self.momentum) else zeros(*shape))

    def step(self, grad: Array, state: SGDState, param: Array, now: Now) -> tuple[Array, SGDState]:
        if state.buffer is None:
            return 1.0 * grad, SGDState(step=now.step, buffer=None)  # a new array, never the caller's
        buffer = self.momentum * state.buffer + grad  # b_t
        direction = grad + self.momentum * buffer if self.nesterov else 1.0 * buffer
        return direction, SGDState(step=now.step, buffer=buffer)

    def report(self, state: SGDState, finite: Array, xp: Namespace) -> ElementwiseReport:
        """Whether the momentum is finite; None without momentum."""
        return ElementwiseReport(denominator=None, finite=finite)


class AdaGradState(NamedTuple):
    """State of `AdaGrad`."""

    step: Any
    """Updates done."""
    total: Array
    """Sum of squared gradients, the parameter's shape."""


class AdaGrad(Method):
    """Diagonal AdaGrad (Duchi et al., 2011): ``g / (sqrt(initial + sum g^2) + eps)``, elementwise."""

    eps: float = real("delta, added to the root", default=1e-10, ge=0)
    initial: float = real("start of the sum of squares", default=0.0, ge=0)

    paper: ClassVar[str] = "Duchi, Hazan, Singer: Adaptive subgradient methods, JMLR 2011"
    state_type: ClassVar[Any] = AdaGradState
    elementwise: ClassVar[bool] = True

    def state_of(self, shape: tuple[int, ...]) -> AdaGradState:
        return AdaGradState(step=0, total=full(self.initial, *shape))

    def step(self, grad: Array, state: AdaGradState, param: Array, now: Now) -> tuple[Array, AdaGradState]:
        xp = now.xp
        total = state.total + grad * grad
        direction = quotient(grad, xp.sqrt(total) + self.eps, xp, bound=self.eps)
        return direction, AdaGradState(step=now.step, total=total)

    def report(self, state: AdaGradState, finite: Array, xp: Namespace) -> ElementwiseReport:
        """The denominator."""
        return ElementwiseReport(xp.sqrt(state.total) + self.eps, finite)


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


class FullAdaGrad(Method):
    """Full-matrix AdaGrad (Duchi et al., 2011): ``((sum g g^T)^{1/2} + eps I)^{-1} g`` on the flattened parameter.

    ``eps=0`` is the pseudo-inverse. Costs d^2 memory and d^3 time for d entries.
    """

    eps: float = real("delta, added to the root (0: pseudo-inverse)", default=0.0, ge=0)

    paper: ClassVar[str] = "Duchi, Hazan, Singer: Adaptive subgradient methods, JMLR 2011"
    state_type: ClassVar[Any] = FullAdaGradState
    ndims: ClassVar[tuple[int, int]] = (1, 64)
    factorizes = True

    def takes(self, shape: tuple[int, ...], path: str = "") -> bool:
        """Anything of at most 1024 entries."""
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
        """Spectrum of the sum of outer products."""
        return _gram_report((state.gram,), finite, roots.Law(-1.0, self.eps, root=True), xp)


class RMSPropState(NamedTuple):
    """State of `RMSProp`; arrays have the parameter's shape."""

    step: Any
    """Updates done."""
    v: Array
    """Average of squared gradients."""
    buffer: Array | None
    """Heavy-ball average of preconditioned gradients; None with ``momentum=0``."""


class RMSProp(Method):
    """RMSProp (Tieleman and Hinton, 2012), elementwise, ``g / (sqrt(v) + eps)``; ``beta2`` is a decay."""

    beta2: float = real("decay of the averaged squares", default=0.99, ge=0, lt=1)
    eps: float = real("added to the root", default=1e-8, ge=0)
    momentum: float = real("heavy-ball momentum on the preconditioned gradient", default=0.0, ge=0, lt=1)

    paper: ClassVar[str] = "Tieleman, Hinton: Lecture 6.5, 2012"
    state_type: ClassVar[Any] = RMSPropState
    elementwise: ClassVar[bool] = True

    def state_of(self, shape: tuple[int, ...]) -> RMSPropState:
        return RMSPropState(step=0, v=zeros(*shape), buffer=None if is_zero(self.momentum) else zeros(*shape))

    def step(self, grad: Array, state: RMSPropState, param: Array, now: Now) -> tuple[Array, RMSPropState]:
        xp = now.xp
        v = ema(state.v, grad * grad, self.beta2)
        direction = quotient(grad, xp.sqrt(v) + self.eps, xp, bound=self.eps)
        if state.buffer is None:
            return direction, RMSPropState(step=now.step, v=v, buffer=None)
        buffer = self.momentum * state.buffer + direction
        return 1.0 * buffer, RMSPropState(step=now.step, v=v, buffer=buffer)

    def report(self, state: RMSPropState, finite: Array, xp: Namespace) -> ElementwiseReport:
        """The denominator."""
        return ElementwiseReport(xp.sqrt(state.v) + self.eps, finite)


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


class Adam(Method):
    """Adam (Kingma and Ba, arXiv 1412.6980, Algorithm 1), elementwise; ``beta1``, ``beta2`` are decays."""

    beta1: float = real("beta_1, decay of the averaged gradient", default=0.9, ge=0, lt=1)
    beta2: float = real("beta_2, decay of the averaged square", default=0.999, ge=0, lt=1)
    eps: float = real("epsilon, added to the root", default=1e-8, ge=0)

    paper: ClassVar[str] = "Kingma, Ba: Adam, ICLR 2015, arXiv 1412.6980"
    state_type: ClassVar[Any] = AdamState
    elementwise: ClassVar[bool] = True

    def state_of(self, shape: tuple[int, ...]) -> AdamState:
        return AdamState(step=0, m=zeros(*shape), v=zeros(*shape))

    def scalars(self, step: Any, *, like: Array = None) -> AdamScalars:
        return AdamScalars(
            inverse_c1=reciprocal(one_minus_power(self.beta1, step, like=like)),
            inverse_sqrt_c2=reciprocal(sqrt(one_minus_power(self.beta2, step, like=like))),
        )

    def step(self, grad: Array, state: AdamState, param: Array, now: Now) -> tuple[Array, AdamState]:
        xp, k = now.xp, now.k
        m = ema(state.m, grad, self.beta1)  # m_t
        v = ema(state.v, grad * grad, self.beta2)  # v_t
        direction = quotient(m * k.inverse_c1, xp.sqrt(v) * k.inverse_sqrt_c2 + self.eps, xp, bound=self.eps)
        return direction, AdamState(step=now.step, m=m, v=v)

    def report(self, state: AdamState, finite: Array, xp: Namespace) -> ElementwiseReport:
        """The denominator."""
        k = self.scalars(state.step, like=state.v)
        denominator = xp.sqrt(state.v) * k.inverse_sqrt_c2 + self.eps
        return ElementwiseReport(denominator, finite)


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


class Shampoo(Method):
    """Shampoo (Gupta, Koren, Singer, arXiv 1802.09568) for tensors of any order k >= 1::

        L_i = beta2 L_i + w G_(i) G_(i)^T,  w = 1 if beta2 = 1 else 1 - beta2     for each axis i
        direction = G x_1 (L_1 + eps I)^{-1/(2k)} ... x_k (L_k + eps I)^{-1/(2k)}

    ``beta2`` is a decay; 1 is the sum. Every axis counts in the exponent, also one of size 1. ``bias_correction``
    divides an average by 1 - beta2^t. One axis: full-matrix AdaGrad with eps under the root.
    """

    beta2: float = real("decay of the statistics; 1 is the sum", default=1.0, ge=0, le=1)
    eps: float = real("epsilon, added to the eigenvalues under the root (0: pseudo-inverse)", default=1e-6, ge=0)
    every: int = integer("updates between two roots", default=1, ge=1)
    bias_correction: bool = flag("divide the average by 1 - beta2^t; needs beta2 < 1", default=False)

    paper: ClassVar[str] = "Gupta, Koren, Singer: Shampoo, ICML 2018, arXiv 1802.09568"
    state_type: ClassVar[Any] = ShampooState
    ndims: ClassVar[tuple[int, int]] = (1, 64)
    factorizes = True

    def rules(self) -> None:
        if self.bias_correction and self._is_sum():
            raise ValueError("bias_correction=True needs an average, beta2 < 1, got beta2=1")

    def _is_sum(self) -> bool:
        return isinstance(self.beta2, (int, float)) and self.beta2 == 1

    def state_of(self, shape: tuple[int, ...]) -> ShampooState:
        kept = tuple(roots.identity_root(d, d) for d in shape) if self.every > 1 else None
        return ShampooState(step=0, grams=tuple(zeros(d, d) for d in shape), roots=kept)

    def stack_ndim(self, state: ShampooState) -> int:
        return state.grams[0].ndim - 2

    def scalars(self, step: Any, *, like: Array = None) -> ShampooScalars:
        if not self.bias_correction:
            return ShampooScalars(correction=1.0)
        return ShampooScalars(correction=reciprocal(one_minus_power(self.beta2, step, like=like)))

    def step(self, grad: Array, state: ShampooState, param: Array, now: Now) -> tuple[Array, ShampooState]:
        xp, k, due = now.xp, now.k, now.due
        law = roots.Law(-0.5 / len(state.grams), self.eps)
        grams, known = [], {}
        for i, old in enumerate(state.grams):
            unfolded = unfold(grad, now.stack, i, xp)  # G_(i), (..., d_i, rest)
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
        return direction, ShampooState(now.step, tuple(grams), new)

    def report(self, state: ShampooState, finite: Array, xp: Namespace) -> GramReport:
        """Spectra of the statistics."""
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


class Muon(Method):
    """Muon (Jordan et al., 2024) for matrices: the polar factor of an averaged gradient::

        M_t = momentum M_{t-1} + (1 - momentum) G_t
        N_t = momentum M_t + (1 - momentum) G_t if nesterov else M_t
        direction = rms sqrt(max(m, n)) polar(N_t)

    ``polar(U S V^T) = U V^T``. ``root="svd"`` is exact, singular values of at most max(m, n) u max(s) count as zero;
    ``root="newton_schulz"`` is Jordan's quintic (3.4445, -4.7750, 2.0315), ``root_steps`` times, which brings singular
    values into about [0.7, 1.2]. ``rms=None`` leaves out the factor.
    """

    momentum: float = real("decay of the averaged gradient", default=0.95, ge=0, lt=1)
    nesterov: bool = flag("average once more with the current gradient", default=True)
    rms: float | None = real("factor with sqrt(max(m, n))", default=0.2, gt=0, optional=True)
    root: str = choice(
        "'newton_schulz' (Jordan's quintic) or 'svd' (exact)", default="newton_schulz", of=("newton_schulz", "svd")
    )
    root_steps: int = integer("iterations of 'newton_schulz'", default=5, ge=1)

    paper: ClassVar[str] = "Jordan et al.: Muon, 2024"
    state_type: ClassVar[Any] = MuonState
    ndims: ClassVar[tuple[int, int]] = (2, 2)

    @property
    def factorizes(self) -> bool:
        return self.root == "svd"

    def takes(self, shape: tuple[int, ...], path: str = "") -> bool:
        """Matrices that are not embeddings."""
        return len(shape) == 2 and "emb" not in path.lower()

    def state_of(self, shape: tuple[int, ...]) -> MuonState:
        return MuonState(step=0, m=zeros(*shape))

    def step(self, grad: Array, state: MuonState, param: Array, now: Now) -> tuple[Array, MuonState]:
        xp = now.xp
        m = ema(state.m, grad, self.momentum)
        n = ema(grad, m, 1 - self.momentum) if self.nesterov else m
        direction = roots.polar(n, xp=xp) if self.root == "svd" else roots.polar_muon(n, self.root_steps, xp=xp)
        if self.rms is not None:
            direction = direction * (self.rms * math.sqrt(max(grad.shape[-2:])))
        return direction, MuonState(step=now.step, m=m)

    def report(self, state: MuonState, finite: Array, xp: Namespace) -> MuonReport:
        """Singular values of the average."""
        m = xp.where(finite[..., None, None], state.m, 0.0)
        (values,) = attempt(lambda x: (xp.linalg.svdvals(x),), m, wider=True, xp=xp)
        values = xp.where(finite[..., None], values, math.nan)
        return MuonReport(singular_values=values, finite=finite_members(xp, values, core_ndims=(1,)))
