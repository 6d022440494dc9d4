r"""IF-Shampoo: inverse-free, root-free Shampoo with structured factors (SIRFShampoo).

W. Lin, F. Dangel, R. Eschenhagen, J. Bae, R. E. Turner, A. Makhzani, "Can We Remove the Square-Root in Adaptive
Gradient Methods? A Second-Order Perspective", ICML 2024, arXiv 2402.03496; the authors' code, `sirfshampoo`.

=================  =========================  ==================  ====================================================
paper              here                       shape               meaning
=================  =========================  ==================  ====================================================
G                  ``grad``                   (d_1, ..., d_N)     gradient of the mini-batch mean loss
B                  ``batch_size``                                 number of independent terms whose mean the loss is
C, K; K_n          ``factors``                (d_n, d_n)          a factor per axis of size d_n > 1; S_n^-1 = K_n K_n^T
m_C, m_K; m_n      ``momenta``                (d_n, d_n)          Riemannian momentum
beta_2             ``beta2``                                      weight of the *new* term (step size of K_n)
lambda             ``damping``                                    added to the curvature
alpha_1            ``momentum``                                   heavy ball on the preconditioned gradient
alpha_2            ``riemannian_momentum``                        decay of m_n
kappa              ``weight_decay``                               added to the preconditioned gradient
T                  ``every``                                      updates between two renewals of the factors
=================  =========================  ==================  ====================================================

K_n = I, m_n = 0 at the start, D = d_1 ... d_N; at updates 1, 1 + T, ..., with the old factors on every right side::

    P   = G x_1 K_1^T ... x_N K_N^T                                                           (1)
    H_n = (d_n / D) [B P_(n) P_(n)^T + lambda prod_{j != n} tr(K_j^T K_j) K_n^T K_n]          (2)
    m_n <- alpha2 m_n + (1 - alpha2) project(H_n - I)                                         (3)
    K_n <- K_n - beta2 / max(1, ||m_n||_F) K_n m_n                                            (4)

and at every update::

    u = G x_1 K_1 K_1^T ... x_N K_N K_N^T + kappa W                                           (5)
    direction = b_t = alpha1 b_{t-1} + u                                                      (6)

project(X) is the member m of the structure for which m + m^T is nearest to X (`precond_ref.numerics.structured`):
X / 2 for dense factors. (4) is the first-order truncation of K_n Expm(-beta2 m_n).

The order of evaluation is that of the authors' code, for half precision; in exact arithmetic it changes nothing. (1)
and (2) are computed from K_n / sqrt(d_n), sqrt(B) G and average traces. (5) is computed from K_n / r_n with r_n^2 =
max(1, max |K_n|), and multiplied by the product of all r_n^2 at the end.

Conventions
    K_n stands left of m_n, and K_n^T, not K_n, contracts the gradient: K_n is not symmetric, also when dense.
    m_n is an average, weight 1 - alpha2 on the new term (the code; an early version and SINGD: heavy ball).
    The clip in (4) bounds the norm of m_n (the code). Every singular value of K_n is then multiplied by at least
    1 - beta2, so K_n stays invertible for every gradient whose squares are finite. ``clip=False`` leaves the clip out.
    The factors are renewed with the current gradient before they are used.
    Below float32 the state is kept in float32: see ``narrow_state``. bfloat16 works, float16 can overflow.
    Factors are stored as full (d_n, d_n) arrays in every structure.
    ``update(..., statistic=)`` takes q pseudo-gradients (q, ...), whose mean outer product replaces that of ``grad``
    as the curvature.

Coincides with (each a test)
    RF-Shampoo with S_n = (K_n K_n^T)^-1 to first order in beta2 and in all fixed points, (alpha2 = 0, no clip). There
    H_n = I: S_1 x ... x S_N, as a Kronecker product, is nearest to the curvature + lambda I in the sense of
    Kullback-Leibler. ``hierarchical(a,b)`` with d <= a, ``block-diagonal(b)`` with d <= b: dense. d = 1: all equal.

Hazards
    The overall scale is stable for N beta2 < 2 only.
    The clip has a bias: if single noisy gradients give ||m_n|| > 1, the factors settle at too small an S.
    With ``damping=0`` and gradients that vanish together, K_n grows without bound.

Not here
    Joining weight and bias; flattening; detection of the batch size.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

from precond_ref.fields import declared, flag, integer, is_zero, real
from precond_ref.numerics import roots
from precond_ref.numerics.arrays import bad_as_nan, clamp, identity, largest_entry, normed, state_dtype, t
from precond_ref.numerics.axes import gram_of, multiply, samples, squeezed, unfold
from precond_ref.numerics.ema import ema, heavy_ball, sqrt
from precond_ref.numerics.refresh import renew
from precond_ref.numerics.structured import parse, project
from precond_ref.numerics.template import eye, zeros
from precond_ref.protocol import Method, Now, warn_if_decay
from precond_ref.typing import Array, Arrays, Namespace

PAPER = "Lin, Dangel, Eschenhagen, Bae, Turner, Makhzani: root-free adaptive methods, ICML 2024, arXiv 2402.03496"


class IFShampooState(NamedTuple):
    """State of `IFShampoo`, float32 at least (see ``narrow_state``).

    d_n runs over the parameter's axes of size other than 1 (all 1: one axis, d_1 = 1).
    """

    step: Any
    """t, number of updates done."""
    factors: Arrays
    """K_n, (..., d_n, d_n)."""
    momenta: Arrays | None
    """m_n, (..., d_n, d_n); None with ``riemannian_momentum=0``."""
    buffer: Array | None
    """b_t, heavy-ball average, the parameter's shape; None with ``momentum=0``."""


class IFShampooReport(NamedTuple):
    """The report of `IFShampoo.diagnose`, in float32 at least."""

    inverses: Arrays
    """K_n K_n^T = S_n^-1, (..., d_n, d_n)."""
    eigenvalues: Arrays
    """Eigenvalues of K_n K_n^T, ascending, clipped at zero, (..., d_n)."""
    finite: Array
    """True if the state of the stack member is finite, (...)."""


class IFShampoo(Method):
    """IF-Shampoo, any tensor order; ``beta2`` is the weight of the *new* term, about 0.01 (Lin et al., 2024, (1)-(6)).

    Each axis of size other than 1 has a factor. ``structure`` is one name for all axes, or a tuple with one name for
    each: ``"dense"``, ``"diagonal"``, ``"block-diagonal(30)"``, ``"tril"``, ``"triu"``, ``"tril-toeplitz"``,
    ``"triu-toeplitz"``, ``"hierarchical(15,15)"``. ``batch_size`` is the number of independent terms whose mean is
    the loss.
    Errors: ValueError or TypeError for a field out of range and for arrays that do not fit together.
    Warns: UserWarning for ``beta2 > 0.5``, which looks like a decay.
    """

    beta2: float = real("beta_2, step size of K_n, weight of the NEW term (1 - decay)", default=0.01, gt=0, lt=1)
    damping: float = real("lambda, added to the curvature", default=1e-3, ge=0)
    momentum: float = real("alpha_1, heavy-ball momentum on the preconditioned gradient", default=0.9, ge=0, lt=1)
    riemannian_momentum: float = real("alpha_2, decay of the factors' momentum", default=0.5, ge=0, lt=1)
    weight_decay: float = real("kappa, times the parameter inside the momentum", default=0.0, ge=0)
    batch_size: float = real("B, independent terms whose mean is the loss", default=1.0, gt=0)
    every: int = integer("T, updates between two renewals of the factors", default=1, ge=1)
    structure: str | tuple[str, ...] = declared("of all factors, or a tuple with one for each", default="dense")
    clip: bool = flag("divide m_n by its Frobenius norm where that is above 1", default=True)
    narrow_state: bool = flag("keep the state in the parameter's dtype also below float32", default=False)

    paper: ClassVar[str] = PAPER
    takes_statistic: ClassVar[bool] = True

    def rules(self) -> None:
        structures = self.structure if isinstance(self.structure, tuple) else (self.structure,)
        for structure in structures:
            if not isinstance(structure, str):
                raise TypeError(f"structure must be a string or a tuple of strings, got {self.structure!r}")
            parse(structure)
        warn_if_decay(self)

    def _structures(self, dims: tuple[int, ...]) -> tuple[str, ...]:
        if isinstance(self.structure, str):
            return (self.structure,) * len(dims)
        if len(self.structure) != len(dims):
            raise ValueError(
                f"structure must have one entry for each of the {len(dims)} axes of size other than 1 "
                f"(sizes {dims}), got {self.structure!r}"
            )
        return self.structure

    def state_of(self, shape: tuple[int, ...]) -> IFShampooState:
        dims = squeezed(shape)
        self._structures(dims)
        return IFShampooState(
            step=0,
            factors=tuple(eye(d, d) for d in dims),
            momenta=None if is_zero(self.riemannian_momentum) else tuple(zeros(d, d) for d in dims),
            buffer=None if is_zero(self.momentum) else zeros(*shape),
        )

    def stack_ndim(self, state: IFShampooState) -> int:
        return state.factors[0].ndim - 2

    def step(self, grad: Array, state: IFShampooState, param: Array, now: Now) -> tuple[Array, IFShampooState]:
        """Make (1) to (6). In (2) the mean over the q gradients ``statistic`` (q, ...) replaces ``grad``."""
        xp, stack, statistic, dtype = now.xp, now.stack, now.statistic, state.factors[0].dtype
        if 0 in grad.shape:
            return xp.zeros_like(grad), state._replace(step=now.step)
        dims = squeezed(grad.shape[stack:])
        structures = self._structures(dims)
        curvature = xp.astype(samples(grad, statistic, stack, dims, xp), dtype, copy=False)
        old = state.factors, state.momenta
        factors, momenta = renew(now.due, lambda: self._renewed(curvature, *old, structures, xp), old)
        if self.every > 1 or statistic is not None:  # the factors may be without this gradient
            bad = xp.astype(bad_as_nan(grad, grad.ndim - stack, xp), dtype, copy=False)
            factors = (factors[0] + bad[..., None, None], *factors[1:])
        u = self._precondition(xp.astype(grad, dtype, copy=False), factors, dims, xp)
        if self.reads_param:
            u = u + self.weight_decay * xp.astype(param, dtype, copy=False)  # (5)
        buffer, direction = heavy_ball(state.buffer, u, self.momentum)  # (6)
        return xp.astype(direction, grad.dtype, copy=False), IFShampooState(now.step, factors, momenta, buffer)

    def _renewed(
        self, g: Array, factors: Arrays, momenta: Arrays | None, structures: tuple[str, ...], xp: Namespace
    ) -> tuple[Arrays, Arrays | None]:
        """Return K_n and m_n after (2)-(4), from pseudo-gradients (..., d_1, ..., d_N, q)."""
        stack, dims = factors[0].ndim - 2, g.shape[factors[0].ndim - 2 : -1]
        scaled = [k * (1 / math.sqrt(d)) for k, d in zip(factors, dims, strict=True)]
        grams = [gram_of(t(k, xp), xp) for k in scaled]
        traces = [xp.linalg.trace(gram)[..., None, None] / d for gram, d in zip(grams, dims, strict=True)]
        p = g * sqrt(self.batch_size / g.shape[-1])
        for n, k in enumerate(scaled):
            p = multiply(p, t(k, xp), n, xp)  # (1)
        new_factors, new_momenta = [], []
        for n, (k, structure) in enumerate(zip(factors, structures, strict=True)):
            rows = unfold(p, stack, n, xp)
            damping = self.damping * math.prod(dims)
            for j, trace in enumerate(traces):
                if j != n:
                    damping = trace * damping
            h = dims[n] * gram_of(rows, xp) + damping * grams[n]  # (2)
            m = project(h - identity(xp, h), structure, xp)
            if momenta is not None:
                m = ema(momenta[n], m, self.riemannian_momentum)  # (3)
            size, unit, norm = normed(m, (-2, -1), xp)
            length = clamp(size * norm, 1.0, xp=xp) if self.clip else 1.0
            new_factors.append(k - (self.beta2 * size / length) * (k @ unit))  # (4)
            new_momenta.append(m)
        return tuple(new_factors), None if momenta is None else tuple(new_momenta)

    def _precondition(self, grad: Array, factors: Arrays, dims: tuple[int, ...], xp: Namespace) -> Array:
        """Return G x_1 K_1 K_1^T ... x_N K_N K_N^T, in the parameter's shape."""
        stack = tuple(factors[0].shape[:-2])
        u, scale = xp.reshape(grad, (*stack, *dims)), 1.0
        for n, k in enumerate(factors):
            peak = clamp(largest_entry(k, (-2, -1), xp), 1.0, xp=xp)  # r_n^2
            small = k / xp.sqrt(peak)
            u = multiply(multiply(u, t(small, xp), n, xp), small, n, xp)
            scale = scale * peak
        return xp.reshape(u * xp.reshape(scale, (*stack, *(1 for _ in dims))), grad.shape)

    def report(self, state: IFShampooState, finite: Array, xp: Namespace) -> IFShampooReport:
        """Return the inverses of the factors S_n, and the spectra of these inverses."""
        wide = [xp.astype(k, state_dtype(xp, k, False), copy=False) for k in state.factors]
        inverses = tuple(k @ t(k, xp) for k in wide)
        return IFShampooReport(
            inverses=inverses, eigenvalues=tuple(roots.eigenvalues(x, xp=xp) for x in inverses), finite=finite
        )
