r"""ASGO: adaptive structured gradient optimization, and its diagonal form DASGO.

K. An, Y. Liu, R. Pan, Y. Ren, S. Ma, D. Goldfarb, T. Zhang, NeurIPS 2025, arXiv 2503.20762. The same algorithm is
one-sided Shampoo (Xie et al., arXiv 2503.10537).

==========  ===============  ===========  =====================================================
paper       here             shape        meaning
==========  ===============  ===========  =====================================================
G_t         ``grad``         (m, n)       gradient
M_t         ``m``            (m, n)       average of gradients
V_t         ``gram``         (k, k)       sum or average of G G^T (left, k = m) or G^T G (right, k = n)
Lambda_t    ``root``         (k, k)       here: the *inverse* root of V_t
beta_1,2    ``beta1,2``                   decay of M and of V
epsilon     ``eps``                       regularisation, under or outside the root
tau         ``every``                     updates between two roots
==========  ===============  ===========  =====================================================

`ASGO`, practical (Algorithm 2 and the authors' code)::

    M_t = beta1 M_{t-1} + (1 - beta1) G_t                       (M)
    V_t = beta2 V_{t-1} + (1 - beta2) G_t G_t^T   or  G_t^T G_t   (V)
    P_t = (V_t + eps I)^{-1/2}, at t = 1, 1 + tau, 1 + 2 tau, ...  (P)
    U_t = P_t M_t   or   M_t P_t                                  (U)
    direction = rms sqrt(m n) U_t / ||U_t||_F                     (W)

`ASGO.theory`, Algorithm 1 (the form with theorems), V_0 = 0::

    V_t = V_{t-1} + G_t G_t^T                                     (1)
    Lambda_t = V_t^{1/2} + eps I                                  (2)
    direction = Lambda_t^{-1} G_t                                 (3)

`DASGO` keeps the diagonal of the right V_t, one number v_j per column, with eps under the root;
`DASGO.theory` keeps row sums and has eps outside the root.

Conventions
    ``side="smaller"``: left if m < n, else right (the authors' code; the theory is always left).
    eps under the root in `ASGO` and `DASGO`, outside in the theory forms. ``eps=0``: pseudo-inverse.
    No bias correction: under ``rms`` any scalar factor cancels. A zero update stays zero (the authors' code: error).
    V is built from the raw gradient, not from M.
    ``root="polar_express"`` is the authors' default solver, in which eps enters only the norm.
    ``heads=h``: the rows in h blocks, a left V for each (query and key matrices).

Coincides with (each a test)
    First step of `ASGO.theory(eps=0)`, and every step of ``ASGO(beta1=0, beta2=0, rms=None, eps=0)``: the polar factor,
    that is `Muon` without momentum. One column: full-matrix AdaGrad; one row: AdaGrad-Norm. Diagonal gradients: AdaGrad
    on the diagonal. `DASGO.theory` on one column: diagonal AdaGrad.

Not here
    The projected form; 1-D parameters, embeddings and convolutions (the routing gives them to Adam).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar, NamedTuple

from precond_ref.fields import choice, integer, real
from precond_ref.numerics import roots
from precond_ref.numerics.arrays import bad_as_nan, t, whole
from precond_ref.numerics.axes import gram_of
from precond_ref.numerics.ema import ema
from precond_ref.numerics.grafting import scale_to_rms
from precond_ref.numerics.refresh import renew
from precond_ref.numerics.roots import Root
from precond_ref.numerics.template import eye, zeros
from precond_ref.protocol import Method, Now
from precond_ref.typing import Array, Namespace

SIDES, SOLVERS = ("smaller", "left", "right"), ("eigh", *roots.ITERATIONS)
PAPER = "An, Liu, Pan, Ren, Ma, Goldfarb, Zhang: ASGO, NeurIPS 2025, arXiv 2503.20762"


class ASGOState(NamedTuple):
    """State of `ASGO` for a parameter (..., m, n); k is the preconditioned side."""

    step: Any
    """t, number of updates done."""
    m: Array
    """M_t, (..., m, n)."""
    gram: Array
    """V_t, (..., k, k); with ``heads=h`` (..., h, m/h, m/h)."""
    root: Root | Array | None
    """P of the last renewal, not formed: (..., k, k) and (..., k); with an iteration P itself; None if ``every=1``."""


class ASGOReport(NamedTuple):
    """The report of ``diagnose`` of `ASGO` and `ASGO.theory`."""

    eigenvalues: Array
    """Eigenvalues of V_t, ascending, clipped at zero, (..., k); NaN if V_t is not finite."""
    root_trace: Array
    """tr V_t^{1/2}, the S of the regret bound for the theory form, (...)."""
    rank: Array
    """Number of eigenvalues above k u max(w), (...)."""
    finite: Array
    """True if the state of the stack member is finite and V_t could be decomposed, (...)."""
    accuracy: Array
    """Relative error of a direction by "eigh" that V_t allows, see `precond_ref.numerics.roots.accuracy`, (...)."""


def _gram_report(gram: Array, finite: Array, law: roots.Law, xp: Namespace) -> ASGOReport:
    (w,), finite, (accuracy,) = roots.report((gram,), finite, [law], xp)
    rank = xp.sum(xp.astype(roots.live(w, xp), xp.int32), axis=-1, dtype=xp.int32)
    return ASGOReport(w, xp.sum(xp.sqrt(w), axis=-1), rank, finite, accuracy)


class _ASGO(Method):
    """Base of the four methods, which take matrices."""

    paper: ClassVar[str] = PAPER
    ndims: ClassVar[tuple[int, int]] = (2, 2)

    def takes(self, shape: tuple[int, ...], path: str = "") -> bool:
        """Return True for matrices that are not embeddings (by the authors' code: "emb" is in the name)."""
        return len(shape) == 2 and "emb" not in path.lower()


class ASGO(_ASGO):
    """ASGO for matrices (An et al., 2025, arXiv 2503.20762, Algorithm 2 and the authors' code).

    ``beta1``, ``beta2`` are decays (weights of the *old* term). Takes (..., m, n) with ``stack_ndim`` leading axes.
    Errors: ValueError or TypeError for a field out of range, for arrays that do not fit together, and for ``heads``
    that does not divide the rows.
    """

    beta1: float = real("beta_1, decay of the averaged gradient", default=0.9, ge=0, lt=1)
    beta2: float = real("beta_2, decay of V", default=0.8, ge=0, lt=1)
    eps: float = real("epsilon, added to the eigenvalues of V under the root (0: pseudo-inverse)", default=1e-10, ge=0)
    side: str = choice("'left', 'right' or 'smaller' (left if m < n, else right)", default="smaller", of=SIDES)
    rms: float | None = real("root mean square of the direction; None: the raw one", default=0.2, gt=0, optional=True)
    root: str = choice("'eigh' (the definition), or the iteration that makes P", default="eigh", of=SOLVERS)
    root_steps: int = integer("iterations of the roots other than 'eigh'", default=10, ge=1)
    every: int = integer("tau, updates between two roots", default=1, ge=1)
    heads: int | None = integer("blocks of rows with a left V each", default=None, ge=1, optional=True)

    theory: ClassVar[type[ASGOTheory]]

    @property
    def factorizes(self) -> bool:
        return self.root == "eigh"

    @property
    def idle(self) -> frozenset[str]:
        return frozenset({"root_steps"} if self.root == "eigh" else ())

    def rules(self) -> None:
        if self.heads is not None and self.side == "right":
            raise ValueError("heads needs side='left' or 'smaller': its statistics are left ones, got side='right'")

    def _left(self, m: int, n: int) -> bool:
        return self.heads is not None or self.side == "left" or (self.side == "smaller" and m < n)

    def _blocks(self, matrix: Array, xp: Namespace) -> Array:
        """Return the rows cut into heads: (..., m, n) -> (..., h, m/h, n)."""
        *stack, m, n = matrix.shape
        return matrix if self.heads is None else xp.reshape(matrix, (*stack, self.heads, m // self.heads, n))

    def state_of(self, shape: tuple[int, ...]) -> ASGOState:
        k = shape[0] // (self.heads or 1) if self._left(*shape) else shape[1]
        side = (k, k) if self.heads is None else (self.heads, k, k)
        if self.heads is not None and shape[0] % self.heads:
            raise ValueError(f"heads must divide the rows, got heads={self.heads} and shape {shape}")
        kept = roots.identity_root(*side) if self.root == "eigh" else eye(*side)
        return ASGOState(step=0, m=zeros(*shape), gram=zeros(*side), root=None if self.every == 1 else kept)

    def step(self, grad: Array, state: ASGOState, param: Array, now: Now) -> tuple[Array, ASGOState]:
        xp, due, left = now.xp, now.due, self._left(*grad.shape[-2:])
        g = self._blocks(grad, xp)
        m = ema(state.m, grad, self.beta1)  # (M)
        gram = ema(state.gram, gram_of(g if left else t(g, xp), xp), self.beta2)  # (V)
        u, law = self._blocks(m, xp), roots.Law(-0.5, self.eps)
        if self.root == "eigh":
            root, w = roots.renewed(due, gram, law, state.root, xp=xp)  # (P)
            weight = (1 - self.beta2) * due if self.every > 1 else 1 - self.beta2  # the V of a kept root is without G
            u = roots.apply(u, {0 if left else 1: (root, w)}, law, weight, xp=xp)  # (U)
        else:
            inverse = partial(roots.inverse_sqrt, gram, self.eps, self.root, self.root_steps, xp=xp)
            root = renew(due, inverse, state.root)  # (P)
            u = root @ u if left else u @ root  # (U)
        u = xp.reshape(u, grad.shape)
        if self.rms is not None:
            u = scale_to_rms(u, self.rms, (-2, -1), xp)  # (W)
        elif self.every > 1 or self.heads is not None:  # else a bad gradient has made all of P NaN
            u = whole(u, 2, xp)
        return u, ASGOState(step=now.step, m=m, gram=gram, root=None if self.every == 1 else root)

    def report(self, state: ASGOState, finite: Array, xp: Namespace) -> ASGOReport:
        """Return the spectrum of V_t (with ``heads``: of the V_t of each head)."""
        return _gram_report(state.gram, finite, roots.Law(-0.5, self.eps), xp)


class ASGOTheoryState(NamedTuple):
    """State of `ASGO.theory` for a parameter (..., m, n)."""

    step: Any
    """t, number of updates done."""
    gram: Array
    """V_t, (..., m, m) left or (..., n, n) right."""


class ASGOTheory(_ASGO, preset="ASGO.theory"):
    """ASGO as analysed, Algorithm 1 of the paper: plain sum, no momentum, eps outside the root, no rms.

    Takes (..., m, n) with ``stack_ndim`` leading axes. The directions are (1) to (3) of the module.
    Errors: ValueError or TypeError for a field out of range, and for arrays that do not fit together.
    """

    eps: float = real("epsilon, added to V^{1/2} (0: pseudo-inverse)", default=0.0, ge=0)
    side: str = choice("'left' (the paper) or 'right'", default="left", of=("left", "right"))

    factorizes = True
    refreshes: ClassVar[bool] = True

    def state_of(self, shape: tuple[int, ...]) -> ASGOTheoryState:
        k = shape[0] if self.side == "left" else shape[1]
        return ASGOTheoryState(step=0, gram=zeros(k, k))

    def step(self, grad: Array, state: ASGOTheoryState, param: Array, now: Now) -> tuple[Array, ASGOTheoryState]:
        xp, left = now.xp, self.side == "left"
        gram = state.gram + (grad @ t(grad, xp) if left else t(grad, xp) @ grad)  # (1)
        law = roots.Law(-1.0, self.eps, root=True)
        root = roots.decompose(gram, law, xp=xp)  # (2)
        direction = roots.apply(grad, {0 if left else 1: root}, law, 1.0, xp=xp)  # (3)
        return direction, ASGOTheoryState(step=now.step, gram=gram)

    def report(self, state: ASGOTheoryState, finite: Array, xp: Namespace) -> ASGOReport:
        """Return the spectrum of V_t."""
        return _gram_report(state.gram, finite, roots.Law(-1.0, self.eps, root=True), xp)


class DASGOState(NamedTuple):
    """State of `DASGO` for a parameter (..., m, n)."""

    step: Any
    """t, number of updates done."""
    m: Array
    """M_t, (..., m, n)."""
    v: Array
    """v_t, average squared norm of each column, (..., n)."""


class DASGOReport(NamedTuple):
    """The report of ``diagnose`` of `DASGO` and `DASGO.theory`."""

    scale: Array
    """sqrt(v_t) per column, (..., n); theory form: sqrt(d_t) per row, (..., m)."""
    finite: Array
    """True if the state of the stack member is finite, (...)."""


class DASGO(_ASGO):
    """DASGO for matrices (An et al., 2025, arXiv 2503.20762, Algorithm 4 and the authors' code): one scale per column.

    ``beta1``, ``beta2`` are decays (weights of the *old* term). Takes (..., m, n) with ``stack_ndim`` leading axes::

        M_t = beta1 M_{t-1} + (1 - beta1) G_t                          (M)
        v_t = beta2 v_{t-1} + (1 - beta2) sum_i G_ij^2                 (v)
        U_ij = M_ij (v_j + eps)^{-1/2}                                 (U)
        direction = rms sqrt(m n) U / ||U||_F                          (W)

    Errors: ValueError or TypeError for a field out of range, and for arrays that do not fit together.
    """

    beta1: float = real("beta_1, decay of the averaged gradient", default=0.9, ge=0, lt=1)
    beta2: float = real("beta_2, decay of the column sums", default=0.95, ge=0, lt=1)
    eps: float = real("epsilon, under the root (0: pseudo-inverse)", default=1e-8, ge=0)
    rms: float | None = real("root mean square of the direction; None: the raw one", default=0.2, gt=0, optional=True)

    theory: ClassVar[type[DASGOTheory]]

    def state_of(self, shape: tuple[int, ...]) -> DASGOState:
        return DASGOState(step=0, m=zeros(*shape), v=zeros(shape[1]))

    def step(self, grad: Array, state: DASGOState, param: Array, now: Now) -> tuple[Array, DASGOState]:
        xp = now.xp
        m = ema(state.m, grad, self.beta1)  # (M)
        v = ema(state.v, xp.sum(grad * grad, axis=-2), self.beta2)  # (v)
        u = m / _infinite_if_zero(xp.sqrt(v + self.eps), xp)[..., None, :]  # (U)
        if self.rms is not None:
            u = scale_to_rms(u, self.rms, (-2, -1), xp)  # (W)
        return u, DASGOState(step=now.step, m=m, v=v)

    def report(self, state: DASGOState, finite: Array, xp: Namespace) -> DASGOReport:
        """Return the scales of the columns."""
        return DASGOReport(scale=xp.sqrt(state.v), finite=finite)


class DASGOTheoryState(NamedTuple):
    """State of `DASGO.theory` for a parameter (..., m, n)."""

    step: Any
    """t, number of updates done."""
    d: Array
    """d_t, summed squared norm of each row, (..., m)."""


class DASGOTheory(_ASGO, preset="DASGO.theory"):
    """The diagonal of Algorithm 1: one scale per row, plain sum, no momentum, eps outside the root, no rms.

    ::

        d_i += sum_j G_ij^2                                            (1)
        direction_ij = G_ij / (sqrt(d_i) + eps)                        (2)
    """

    eps: float = real("epsilon, added to the root (0: pseudo-inverse)", default=0.0, ge=0)

    def state_of(self, shape: tuple[int, ...]) -> DASGOTheoryState:
        return DASGOTheoryState(step=0, d=zeros(shape[0]))

    def step(self, grad: Array, state: DASGOTheoryState, param: Array, now: Now) -> tuple[Array, DASGOTheoryState]:
        xp = now.xp
        d = state.d + xp.sum(grad * grad, axis=-1)  # (1)
        direction = grad / _infinite_if_zero(xp.sqrt(d) + self.eps, xp)[..., None]  # (2)
        return direction, DASGOTheoryState(step=now.step, d=d)

    def report(self, state: DASGOTheoryState, finite: Array, xp: Namespace) -> DASGOReport:
        """Return the scales of the rows."""
        return DASGOReport(scale=xp.sqrt(state.d), finite=finite)


def _infinite_if_zero(diagonal: Array, xp: Namespace) -> Array:
    """Return the divisor of the pseudo-inverse of a ``diagonal`` (..., n); all NaN if an entry is not finite."""
    return xp.where(diagonal == 0, math.inf, diagonal) + bad_as_nan(diagonal, 1, xp)[..., None]
