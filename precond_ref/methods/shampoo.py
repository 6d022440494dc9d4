r"""Shampoo, as published and as run in production, and Shampoo with corrected eigenvalues.

V. Gupta, T. Koren, Y. Singer, ICML 2018, arXiv 1802.09568; R. Anil, V. Gupta, T. Koren, K. Regan, Y. Singer, arXiv
2002.09018; H.-J. M. Shi et al., arXiv 2309.06497, and their code, `facebookresearch/optimizers`.

============  ==================  =================  =================================================================
paper         here                shape              meaning
============  ==================  =================  =================================================================
G_t, W_t      ``grad``, param     (d_1, ..., d_k)    gradient and parameter; G_(i): unfolding of axis i; X x_i A
L_i           ``grams``           (d_i, d_i)         sum or average of G_(i) G_(i)^T
R_i           ``roots``           (d_i, d_i)         inverse root of L_i at the last refresh, not formed; I at the start
Q_i           ``bases``           (d_i, d_i)         `EShampoo`: basis of L_i at the last refresh; I at the start
D             ``d``               (d_1, ..., d_k)    `EShampoo`: sum or average of squares, in the bases' coordinates
beta_1,3      ``beta1,3``                            decay of the filtered gradient, and of its look-ahead
beta_2        ``beta2``                              decay of L and D; 1 is the sum
epsilon       ``eps``                                ridge
p_i           ``exponents``                          R_i = (.)^{-p_i}
t_0, f        ``start``, every                       first refresh, updates between two
N             ``norms``           ()                 grafted step; its norm is kept
============  ==================  =================  =================================================================

`Shampoo`, as published, for tensors of any order k >= 1::

    L_i = beta2 L_i + w G_(i) G_(i)^T,  w = 1 if beta2 = 1 else 1 - beta2     for each axis i          (1)
    direction = G x_1 (L_1 + eps I)^{-1/(2k)} ... x_k (L_k + eps I)^{-1/(2k)}                         (2)

`Shampoo.production`, of a block (below), with alpha = ``weight_decay``::

    G = G + alpha W                                                 only with ``decay_form="l2"``          (l2)
    L_i = beta2 L_i + w G_(i) G_(i)^T                  w as above; 1 with ``drop_weight``              (L)
    A_i = L_i / (1 - beta2^t),  A_i = A_i max(tr A_i, eps)^(-tau),  R_i = (A_i + eps I)^{-p_i}
                                                                    at t = t_0, then at multiples of f (R)
    v = v + G o G  or  v = gb v + (1 - gb) G o G                    gb = ``graft_beta2``              (g)
    F = beta3 m + (1 - beta3) G,  F = F / (1 - beta3 beta1^(t-1));  m = beta1 m + (1 - beta1) G        (F)
    N = F,  F / (sqrt(v) + ge)  or  F / (sqrt(v / (1 - gb^t)) + ge)    "sgd", "adagrad" or "rmsprop", "adam" (N)
    P = F x_1 R_1 ... x_k R_k                                                                         (P)
    P = P ||N||_F / ||P||_F;  N before t_0                          only with a graft                 (P2)
    P = P + alpha W                                                 only with ``decay_form="decoupled"``   (wd)
    B = mu B + (1 - dampening) P;  direction = B,  or (1 - dampening) P + mu B with ``nesterov``          (B)

`EShampoo`: (R) and (P) replaced by::

    Q_i = basis of A_i + eps I                                      when due                          (E1)
    G' = G x_i Q_i^T,  D = beta2 D + w G' o G'                      at every update                   (E2)
    P = [ (F x_i Q_i^T) / ((D / (1 - beta2^t))^p + eps) ] x_i Q_i   p = ``exponent``                  (E3)

Conventions
    ``beta2`` is a decay; 1 is the sum. Every axis counts in the exponent, also an axis of size 1; merged axes count as
    one.
    eps is added to the eigenvalues under the root, after the bias correction and ``trace_scaling`` (tau); in (E3) it is
    added outside the power. ``eps=0``: pseudo-inverse with a relative rank decision.
    Statistics and v are made of the gradient, not of F; the graft scales F. ``bias_correction`` switches the
    corrections of L, D and F. The graft "adam" is always corrected, the other grafts never.
    ``beta1=0``: F = G, whatever ``beta3``. ``beta3=None``: beta1.
    ``start=None``: f. A ``start`` below f is refused. Before t_0, without a graft, R = I: the update is F itself.
    ``exponents=(p_1, ..., p_k)``: None, or a missing entry, is 1/(2k), k counted after merging; 0: no L_i, no R_i.
    Axes are merged from the right while there are more than ``target`` and the product is at most ``max_dim``; axes of
    size 1 are dropped (``target=None``: no merging). Then each axis is cut into pieces of ``max_dim``, the last one
    shorter; each block has statistics and a graft norm of its own.
    The divisor in (P2) is the norm itself (the code: plus 1e-16); P = 0 stays 0.
    ``weight_decay`` is a factor of W in the direction. The "independent" decay of the code is ``weight_decay / lr_0``
    here; its "corrected" decay follows a schedule, which only the caller knows.
    ``root="coupled_newton"`` (1/p_i whole) and ``"higher_order"`` run ``root_steps`` times (the code: until a
    tolerance is met), both with eps as ridge (the code's higher order: a ridge of its own).
    ``basis="eigh"``: eigenvectors by ascending eigenvalues; "qr": ``iterations`` rounds of orthogonal iteration of
    columns in descending order, with which D is permuted; "qr_meta": rounds of ``Q <- Gram-Schmidt of (A + eps I) Q``
    while the part outside the diagonal of Q^T (A + eps I) Q is above ``tolerance``, then the columns in ascending
    order, D as it is (the code; its next round starts from the smallest eigenvector and loses the order found).
    With "eigh" and "qr" an axis whose Q^T (A + eps I) Q has at most ``tolerance`` outside its diagonal, relatively to
    all of it, keeps its Q and its slots of D.

Coincides with (each a test)
    `Shampoo` is ``Shampoo.production(beta1=0, target=None, bias_correction=False)``; with ``eps=0`` its first direction
    is the polar factor. One axis: full-matrix AdaGrad with eps under the root.
    All p_i = 0: SGD with momentum. `EShampoo` with all axes in ``ignored_axes`` (or before t_0): `Adam`.
    `EShampoo` at t = 1, f = 1, beta1 = 0: U diag(s / (s + eps)) V^T.

What is determined
    Roots are functions of L: a multiple eigenvalue does no harm. In `EShampoo`, as in `SOAP`, the run depends within
    its eigenspace on the eigensolver.

Not here
    The code's ``kl``; the fallback of a failed root to the last root (here NaN); a state in another dtype.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

from array_api_compat import array_namespace

from precond_ref.fields import choice, declared, flag, integer, is_python_number, is_zero, real
from precond_ref.numerics import bases as orthogonal
from precond_ref.numerics import roots
from precond_ref.numerics.arrays import identity, whole
from precond_ref.numerics.axes import gram_of, multiply, squeezed, unfold
from precond_ref.numerics.ema import accumulate, ema, heavy_ball, number, one_minus_power, quotient, reciprocal, sqrt
from precond_ref.numerics.grafting import grafted
from precond_ref.numerics.refresh import check_refresh, renew
from precond_ref.numerics.roots import GramReport, Root
from precond_ref.numerics.template import eye, leaves, zeros
from precond_ref.protocol import Method, Now
from precond_ref.typing import Array, Namespace, Scalar


class ShampooState(NamedTuple):
    """State of `Shampoo` for a parameter (..., d_1, ..., d_k)."""

    step: Any
    """t, number of updates done."""
    grams: tuple[Array, ...]
    """One per axis, (..., d_i, d_i)."""
    roots: tuple[Root, ...] | None
    """Roots of the last refresh, one per axis, not formed: (..., d_i, d_i), (..., d_i); None if ``every=1``."""


class ShampooScalars(NamedTuple):
    """Values of `Shampoo.scalars`, which depend on the update's number alone."""

    correction: Scalar
    """1 / (1 - beta2^t) with ``bias_correction``, else 1."""


class Shampoo(Method):
    """Shampoo (Gupta, Koren, Singer, arXiv 1802.09568) for tensors of any order k >= 1::

        L_i = beta2 L_i + w G_(i) G_(i)^T,  w = 1 if beta2 = 1 else 1 - beta2     for each axis i
        direction = G x_1 (L_1 + eps I)^{-1/(2k)} ... x_k (L_k + eps I)^{-1/(2k)}

    ``beta2`` is a decay; 1 is the sum. Every axis counts in the exponent, also an axis of size 1. ``bias_correction``
    divides an average by 1 - beta2^t. With one axis this is full-matrix AdaGrad with eps under the root.
    Errors: ValueError or TypeError for a field out of range, and for arrays that do not fit together.
    """

    beta2: float = real("decay of the statistics; 1 is the sum", default=1.0, ge=0, le=1)
    eps: float = real("epsilon, added to the eigenvalues under the root (0: pseudo-inverse)", default=1e-6, ge=0)
    every: int = integer("updates between two roots", default=1, ge=1)
    bias_correction: bool = flag("divide the average by 1 - beta2^t; needs beta2 < 1", default=False)

    paper: ClassVar[str] = "Gupta, Koren, Singer: Shampoo, ICML 2018, arXiv 1802.09568"
    ndims: ClassVar[tuple[int, int]] = (1, 64)
    factorizes = True

    def rules(self) -> None:
        if self.bias_correction and _is_one(self.beta2):
            raise ValueError("bias_correction=True needs an average, beta2 < 1, got beta2=1")

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
            gram = accumulate(old, gram_of(unfolded, xp), self.beta2)  # L_i
            corrected = gram * k.correction if self.bias_correction else gram
            kept = None if state.roots is None else state.roots[i]
            root, w = roots.renewed(due, corrected, law, kept, xp=xp)  # (L_i + eps I)^{-1/(2k)}
            if i == 0 and self.every > 1:  # a kept root is without this gradient
                root = root._replace(eigenvalues=root.eigenvalues + 0.0 * xp.linalg.trace(gram)[..., None])  # NaN
            known[i] = root, w
            grams.append(gram)
        weight = k.correction * accumulate(0.0, 1.0, self.beta2)  # of the new term
        weight = weight * due if self.every > 1 else weight  # a kept root is without the new term
        direction = roots.apply(grad, known, law, weight, xp=xp)  # x_i
        new = None if state.roots is None else tuple(root for root, _ in known.values())
        return direction, ShampooState(now.step, tuple(grams), new)

    def report(self, state: ShampooState, finite: Array, xp: Namespace) -> GramReport:
        """Spectra of the statistics."""
        law = roots.Law(-0.5 / len(state.grams), self.eps)
        return roots.report(state.grams, finite, [law] * len(state.grams), xp)


Blocks = tuple[tuple[slice, ...], ...]
FLAT: Blocks = ((),)


class _ProductionScalars(NamedTuple):
    """Values of ``scalars`` of the production forms, which depend on the update's number t alone."""

    preconditioned: Scalar
    """1 from update t_0 on, and without a graft; else 0."""
    correction: Scalar
    """1 / (1 - beta2^t), or 1."""
    inverse_filter: Scalar
    """1 / (1 - beta3 beta1^(t-1)), or 1."""
    inverse_root_graft: Scalar
    """1 / sqrt(1 - graft_beta2^t), or 1."""


class _Production(Method):
    """Base of `Shampoo.production` and `EShampoo`: everything but the preconditioning of one block."""

    beta1: float = real("beta_1, decay of the filtered gradient; 0: none", default=0.9, ge=0, lt=1)
    beta3: float | None = real("beta_3, decay of its look-ahead; None: beta_1", default=None, ge=0, lt=1, optional=True)
    beta2: float = real("beta_2, decay of the statistics; 1 is the sum", default=1.0, ge=0, le=1)
    eps: float = real("epsilon", default=1e-12, ge=0)
    every: int = integer("f, updates between two refreshes", default=1, ge=1)
    start: int | None = integer("t_0, update of the first refresh; None: f", default=None, ge=1, optional=True)
    bias_correction: bool = flag("divide L, D and F by what their weights sum to", default=True)
    drop_weight: bool = flag("the new term has weight 1 also with beta_2 < 1; L and D are not corrected", default=False)
    graft: str | None = choice(
        "where the norm comes from: 'sgd', 'adagrad', 'rmsprop', 'adam' or None",
        default=None, of=("sgd", "adagrad", "rmsprop", "adam"), optional=True,
    )  # fmt: skip
    graft_beta2: float = real("gb, decay of the graft's averaged square", default=0.999, ge=0, lt=1)
    graft_eps: float = real("ge, added to the root of the graft's square", default=1e-10, ge=0)
    momentum: float = real("mu, decay of the momentum", default=0.0, ge=0, lt=1)
    dampening: float = real("the step enters the momentum multiplied by 1 - dampening", default=0.0, ge=0, lt=1)
    nesterov: bool = flag("direction (1 - dampening) P + mu B; needs momentum", default=False)
    weight_decay: float = real("alpha, factor of the parameter in the direction", default=0.0, ge=0)
    decay_form: str = choice(
        "'decoupled' (joins the step, before the momentum) or 'l2' (joins the gradient)",
        default="decoupled", of=("decoupled", "l2"),
    )  # fmt: skip
    max_dim: int = integer("largest product of merged axes, and size of blocks", default=1024, ge=1)
    target: int | None = integer("axes at which merging ends; None: no merging", default=1, ge=1, optional=True)

    factorizes = True

    def rules(self) -> None:
        if self.start is not None and self.start < self.every:
            raise ValueError(f"start must be at least every, got start={self.start} and every={self.every}")
        if self.nesterov and is_zero(self.momentum):
            raise ValueError("nesterov=True needs momentum > 0, got momentum=0")

    def takes(self, shape: tuple[int, ...], path: str = "") -> bool:
        """Return True: the method takes every parameter."""
        return True

    @property
    def _ahead(self) -> Scalar:
        """beta3; F is G with beta1 = 0."""
        return self.beta1 if self.beta3 is None else _unless_zero(self.beta1, self.beta3)

    @property
    def _first(self) -> int:
        """t_0."""
        return self.every if self.start is None else self.start

    @property
    def _keeps(self) -> bool:
        """Return True if roots or bases are kept between updates."""
        return self._first > 1

    def due(self, step: Any) -> Any:
        """Return whether the update after ``step`` completed updates refreshes: t_0, then multiples of ``every``."""
        if not self._keeps:
            return True
        t = step + 1
        return (t == self._first) | ((t > self._first) & (t % self.every == 0))

    def overruled(self, refresh: Any) -> Any:
        """Return ``refresh``, any bool; ValueError for False if no root or basis is kept."""
        return check_refresh(refresh, None if self._keeps else 1)

    def axes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return d_1, ..., d_k of a parameter of ``shape``, before it is cut into blocks."""
        return self._layout(shape)[0]

    def _layout(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Blocks]:
        """Return the axes after merging, and the blocks; one block of the whole shape if no axis is preconditioned."""
        if 0 in shape or not shape:
            return shape, FLAT
        dims = shape if self.target is None else _merged_from_the_right(shape, self.max_dim, self.target)
        if not any(self._sides(dims)) and self.graft is None:
            return shape, FLAT
        pieces = [[slice(at, min(at + self.max_dim, d)) for at in range(0, d, self.max_dim)] for d in dims]
        return dims, tuple(itertools.product(*pieces))

    def _sides(self, dims: tuple[int, ...]) -> tuple[bool, ...]:
        """Return which of the axes ``dims`` have a statistic."""
        raise NotImplementedError

    def _of_blocks(self, shape: tuple[int, ...], make: Any) -> tuple[Any, ...]:
        """Return for each block ``make(d)`` for each axis with a statistic, and None for the others."""
        dims, blocks = self._layout(shape)
        if blocks is FLAT:
            return ()
        sizes = [[piece.stop - piece.start for piece in block] for block in blocks]
        sides = self._sides(dims)
        return tuple(tuple(make(d) if has else None for d, has in zip(block, sides, strict=True)) for block in sizes)

    def _shared(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Return the fields of the state that both forms have."""
        blocks = self._layout(shape)[1]
        return {
            "step": 0,
            "grams": self._of_blocks(shape, lambda d: zeros(d, d)),
            "m": None if is_zero(self.beta1) else zeros(*shape),
            "v": None if self.graft in (None, "sgd") else zeros(*shape),
            "buffer": None if is_zero(self.momentum) else zeros(*shape),
            "norms": None if self.graft is None or blocks is FLAT else tuple(zeros() for _ in blocks),
        }

    @property
    def idle(self) -> frozenset[str]:
        return frozenset(
            (*(() if self.graft else ("graft_beta2", "graft_eps")), *(() if self.momentum else ("dampening",)),
             *(("root_steps",) if getattr(self, "root", "") == "eigh" else ()))
        )  # fmt: skip

    def stack_ndim(self, state: Any) -> int | None:
        if state.norms:
            return state.norms[0].ndim
        return next((gram.ndim - 2 for block in state.grams for gram in block if gram is not None), None)

    def scalars(self, step: Any, *, like: Array = None) -> _ProductionScalars:
        correction: Scalar = 1.0
        if self.bias_correction and not self.drop_weight and not _is_one(self.beta2):
            correction = reciprocal(one_minus_power(self.beta2, step, like=like))
            if not is_python_number(self.beta2):
                correction = array_namespace(self.beta2).where(self.beta2 == 1, 1.0, correction)
        inverse_filter: Scalar = 1.0
        if self.bias_correction and not is_zero(self.beta1):
            before = one_minus_power(self.beta1, step - 1, like=like)
            inverse_filter = reciprocal(before + (1.0 - before) * (1.0 - self._ahead))  # of 1 - beta3 beta1^(t-1)
        graft = 1.0
        if self.graft == "adam":
            graft = reciprocal(sqrt(one_minus_power(self.graft_beta2, step, like=like)))
        begun: Scalar = 1.0
        if self.graft is not None:
            begun = number(step >= self._first, like)
        return _ProductionScalars(begun, correction, inverse_filter, graft)

    def step(self, grad: Array, state: Any, param: Array, now: Now) -> tuple[Array, Any]:
        xp, k, stack = now.xp, now.k, now.stack
        dims, blocks = self._layout(tuple(grad.shape[stack:]))
        if blocks is not FLAT:
            grad = self._marked(whole(grad, grad.ndim - stack, xp), state, xp)
        if self.reads_param and self.decay_form == "l2":
            grad = grad + self.weight_decay * param  # (l2)
        f, m = grad, None
        if state.m is not None:
            f = k.inverse_filter * ema(state.m, grad, self._ahead)  # (F)
            m = ema(state.m, grad, self.beta1)
        n, v = self._grafts(grad, f, state.v, k, xp)  # (g), (N)
        if blocks is FLAT:
            p, new, norms = self._flat(grad, f, n, state, now)
        else:
            p, new, norms = self._cut(grad, f, n, state, now, dims, blocks)
        if self.reads_param and self.decay_form == "decoupled":
            p = p + self.weight_decay * param  # (wd)
        if state.buffer is not None and not is_zero(self.dampening):
            p = (1.0 - _unless_zero(self.momentum, self.dampening)) * p
        buffer, p = heavy_ball(state.buffer, p, self.momentum, self.nesterov)  # (B)
        return p, self.state_type(step=now.step, m=m, v=v, buffer=buffer, norms=norms, **new)

    def _marked(self, grad: Array, state: Any, xp: Namespace) -> Array:
        """Return ``grad``, NaN for a member with a statistic that is not finite, which a kept root does not show."""
        firsts = [next((gram for gram in block if gram is not None), None) for block in state.grams]
        for gram in firsts if self._keeps else ():
            if gram is not None:
                mark = 0.0 * xp.linalg.trace(gram)
                grad = grad + mark[(..., *(None for _ in range(grad.ndim - mark.ndim)))]
        return grad

    def _grafts(self, grad: Array, f: Array, v: Array | None, k: Any, xp: Namespace) -> tuple[Array, Array | None]:
        """Return N, and the new v."""
        if v is None:
            return f, None
        square = grad * grad
        v = v + square if self.graft == "adagrad" else ema(v, square, self.graft_beta2)
        root = xp.sqrt(v) * k.inverse_root_graft
        return quotient(f, root + self.graft_eps, xp, bound=self.graft_eps), v

    def _flat(self, grad: Array, f: Array, n: Array, state: Any, now: Now) -> tuple[Array, dict[str, Any], Any]:
        """Return the step of a parameter without a preconditioned axis, and its fields of the state."""
        raise NotImplementedError

    def _block(self, g: Array, f: Array, kept: dict[str, Any], now: Now) -> tuple[Array, dict[str, Any]]:
        """Return P of a block, and its fields of the state."""
        raise NotImplementedError

    def _cut(
        self, grad: Array, f: Array, n: Array, state: Any, now: Now, dims: tuple[int, ...], blocks: Blocks
    ) -> tuple[Array, dict[str, Any], tuple[Array, ...] | None]:
        """Return the step, joined from the steps of its blocks, its fields of the state, and the graft norms."""
        xp, stack = now.xp, tuple(grad.shape[: now.stack])
        shaped = [x if dims == x.shape[now.stack :] else xp.reshape(x, (*stack, *dims)) for x in (grad, f, n)]
        names = [name for name in state._fields if name in ("grams", "roots", "bases", "d")]
        made, new, norms, axes = [], [], [], tuple(range(now.stack, now.stack + len(dims)))
        for i, block in enumerate(blocks):
            parts = shaped if len(blocks) == 1 else [x[(..., *block)] for x in shaped]
            kept = {name: None if getattr(state, name) is None else getattr(state, name)[i] for name in names}
            p, kept = self._block(parts[0], parts[1], kept, now)
            if self.graft is not None:
                p, norm = grafted(p, parts[2], axes, xp)  # (P2)
                norms.append(norm)
                p = _mixed(now.k.preconditioned, p, parts[2])
            made.append(p)
            new.append(kept)
        p = _joined(made, [len({block[axis].start for block in blocks}) for axis in range(len(dims))], now.stack, xp)
        collected: dict[str, Any] = {name: tuple(kept[name] for kept in new) for name in names}
        collected |= {name: None for name in names if getattr(state, name) is None}
        p = p if dims == grad.shape[now.stack :] else xp.reshape(p, grad.shape)
        return p, collected, tuple(norms) if self.graft is not None else None

    def _statistic(self, gram: Array, g: Array, axis: int, now: Now) -> Array:
        unfolded = unfold(g, now.stack, axis, now.xp)
        return self._accumulated(gram, gram_of(unfolded, now.xp))  # (L)

    def _accumulated(self, old: Array, new: Array) -> Array:
        return self.beta2 * old + new if self.drop_weight else accumulate(old, new, self.beta2)


class ShampooProductionState(NamedTuple):
    """State of `Shampoo.production`; grams, roots and norms have an entry for each block."""

    step: Any
    """t, number of updates done."""
    grams: tuple[tuple[Array | None, ...], ...]
    """L_i, one per axis, (..., d_i, d_i); None if p_i = 0; () if no axis has a statistic and there is no graft."""
    roots: tuple[tuple[Root | Array | None, ...], ...] | None
    """R_i of the last refresh, not formed; by an iteration R_i itself; None if every update refreshes."""
    m: Array | None
    """Filtered gradient, the parameter's shape; None with ``beta1=0``."""
    v: Array | None
    """The graft's squares, the parameter's shape; None without or with "sgd"."""
    buffer: Array | None
    """B, the parameter's shape; None with ``momentum=0``."""
    norms: tuple[Array, ...] | None
    """||N||_F of the last update, (...); None without a graft."""


class ShampooProductionReport(NamedTuple):
    """The report of `Shampoo.production.diagnose`; one entry for each axis of each block."""

    eigenvalues: tuple[Array, ...]
    """Eigenvalues of A_i, ascending, clipped at zero, (..., d_i); NaN if A_i is not finite."""
    finite: Array
    """True if the state of the stack member is finite and its statistics could be decomposed, (...)."""
    accuracy: tuple[Array, ...]
    """Relative error of a direction that each statistic allows, see `precond_ref.numerics.roots.accuracy`, (...)."""
    norms: tuple[Array, ...] | None
    """||N||_F of the last update, one per block, (...)."""


class ShampooProduction(_Production, preset="Shampoo.production"):
    """Shampoo as run in production (Shi et al., 2023, arXiv 2309.06497, and their code), for parameters of any shape.

    ``beta1``, ``beta2``, ``beta3`` are decays (weights of the *old* term). The defaults, those of the code, merge a
    matrix of at most 1024 entries to a vector.
    """

    exponents: tuple[float | None, ...] = declared(
        "p_i, one per axis after merging; None, and what is left out: 1/(2k); 0: the axis is not preconditioned",
        default=(),
    )
    trace_scaling: float = real("tau, A_i is divided by max(tr A_i, eps)^tau", default=0.0, ge=0, le=1)
    root: str = choice(
        "'eigh' (the definition), 'coupled_newton' or 'higher_order'",
        default="eigh", of=("eigh", "coupled_newton", "higher_order"),
    )  # fmt: skip
    root_steps: int = integer("iterations of the roots other than 'eigh'", default=20, ge=1)

    paper: ClassVar[str] = "Shi et al.: Distributed Shampoo, arXiv 2309.06497"

    def rules(self) -> None:
        super().rules()
        if not isinstance(self.exponents, tuple):
            raise TypeError(f"exponents must be a tuple of numbers and None, got {self.exponents!r}")
        for p in self.exponents:
            if not (p is None or is_python_number(p)):
                raise TypeError(f"exponents must be a tuple of numbers and None, got {self.exponents!r}")
            if p is not None and not 0 <= p < math.inf:
                raise ValueError(f"exponents must be >= 0 and finite, got {self.exponents!r}")
            if p and self.root == "coupled_newton" and _fraction(p).numerator != 1:
                raise ValueError(f"root='coupled_newton' needs 1 over a whole number as exponents, got {p!r}")
        if self.root != "eigh" and is_zero(self.eps):
            raise ValueError(f"root={self.root!r} needs eps > 0: an iteration makes no decision on rank, got eps=0")

    def _exponents(self, order: int) -> tuple[Fraction, ...]:
        """Return p_i of each of ``order`` axes."""
        given = (*self.exponents[:order], *(None for _ in range(order - len(self.exponents))))
        return tuple(Fraction(1, 2 * order) if p is None else _fraction(p) for p in given)

    def _sides(self, dims: tuple[int, ...]) -> tuple[bool, ...]:
        return tuple(p > 0 for p in self._exponents(len(dims)))

    def state_of(self, shape: tuple[int, ...]) -> ShampooProductionState:
        kept = roots.identity_root if self.root == "eigh" else eye
        made = self._of_blocks(shape, lambda d: kept(d, d)) if self._keeps else None
        return ShampooProductionState(roots=made, **self._shared(shape))

    def _flat(self, grad: Array, f: Array, n: Array, state: Any, now: Now) -> tuple[Array, dict[str, Any], Any]:
        return 1.0 * n, {"grams": (), "roots": state.roots}, None

    def _block(self, g: Array, f: Array, kept: dict[str, Any], now: Now) -> tuple[Array, dict[str, Any]]:
        xp, k, powers = now.xp, now.k, self._exponents(len(kept["grams"]))
        grams, made, known = [], [], {}
        for i, (gram, p) in enumerate(zip(kept["grams"], powers, strict=True)):
            old = None if kept["roots"] is None else kept["roots"][i]
            if gram is not None:
                gram = self._statistic(gram, g, i, now)
                a = self._scaled(gram * k.correction, xp)
                if self.root == "eigh":
                    known[i] = roots.renewed(now.due, a, _law(p, self.eps), old, xp=xp)  # (R)
                    old = known[i][0]
                else:
                    known[i] = old = renew(now.due, lambda a=a, p=p: self._iterated(a, p, xp), old)  # type: ignore[misc]
            grams.append(gram)
            made.append(old)
        if self.root != "eigh":
            for i, root in known.items():
                f = multiply(f, root, i, xp)  # (P)
        else:
            f = self._applied(f, known, powers, now)
        return f, {"grams": tuple(grams), "roots": None if kept["roots"] is None else tuple(made)}

    def _applied(self, f: Array, known: dict[int, Any], powers: tuple[Fraction, ...], now: Now) -> Array:
        """Return F x_i R_i; axes of the same exponent are applied together."""
        weight: Scalar = 0.0  # weight of G in A_i, if F is G
        if is_zero(self.beta1) and is_zero(self.trace_scaling):
            weight = now.k.correction * (1.0 if self.drop_weight else accumulate(0.0, 1.0, self.beta2))
            weight = weight * now.due if self._keeps else weight
        while known:
            p = powers[min(known)]
            some = {i: root for i, root in known.items() if powers[i] == p}
            known = {i: root for i, root in known.items() if i not in some}
            f, weight = roots.apply(f, some, _law(p, self.eps), weight, xp=now.xp), 0.0  # (P)
        return f

    def _scaled(self, a: Array, xp: Namespace) -> Array:
        if is_zero(self.trace_scaling):
            return a
        trace = xp.linalg.trace(a)[..., None, None]
        trace = xp.where(trace > self.eps, trace, self.eps)
        return a / xp.where(trace == 0, 1.0, trace) ** self.trace_scaling

    def _iterated(self, a: Array, p: Fraction, xp: Namespace) -> Array:
        if self.root == "coupled_newton":
            return roots.inverse_root_coupled_newton(a, p.denominator, self.eps, self.root_steps, xp=xp)
        return roots.inverse_root_higher_order(a, p, self.eps, self.root_steps, xp=xp)

    def report(self, state: ShampooProductionState, finite: Array, xp: Namespace) -> ShampooProductionReport:
        """Return the spectra of the A_i, and the norms of the grafts."""
        k = self.scalars(state.step + (state.step == 0), like=next((a for _, a in leaves(state[1:])), None))
        a, laws = [], []
        for block in state.grams:
            for gram, p in zip(block, self._exponents(len(block)), strict=True):
                if gram is not None:
                    a.append(self._scaled(gram * k.correction, xp))
                    laws.append(_law(p, self.eps))
        found = roots.report(tuple(a), finite, laws, xp)
        return ShampooProductionReport(found.eigenvalues, found.finite, found.accuracy, state.norms)


class EShampooState(NamedTuple):
    """State of `EShampoo`; grams, bases, d and norms have an entry for each block."""

    step: Any
    """t, number of updates done."""
    grams: tuple[tuple[Array | None, ...], ...]
    """L_i, one per axis, (..., d_i, d_i); None for ignored axes; () if all axes are ignored and there is no graft."""
    bases: tuple[tuple[Array | None, ...], ...]
    """Q_i, the same shapes."""
    d: tuple[Array, ...] | Array
    """D, (..., d_1, ..., d_k), of each block; the parameter's shape if there are no blocks."""
    m: Array | None
    """Filtered gradient, the parameter's shape; None with ``beta1=0``."""
    v: Array | None
    """The graft's squares, the parameter's shape; None without or with "sgd"."""
    buffer: Array | None
    """B, the parameter's shape; None with ``momentum=0``."""
    norms: tuple[Array, ...] | None
    """||N||_F of the last update, (...); None without a graft."""


class EShampooReport(NamedTuple):
    """The report of `EShampoo.diagnose`; ``off_diagonal`` has an entry for each axis of each block."""

    off_diagonal: tuple[Array, ...]
    """Frobenius norm of Q^T L Q outside its diagonal over the norm of L, (...): 0 for the eigenbasis."""
    denominators: tuple[Array, ...]
    """(D / (1 - beta2^t))^p + eps, one per block."""
    finite: Array
    """True if the state of the stack member is finite, (...); 0-D if there are no blocks."""
    norms: tuple[Array, ...] | None
    """||N||_F of the last update, one per block, (...)."""


class EShampoo(_Production):
    """Eigenvalue-corrected Shampoo (the code of arXiv 2309.06497), for parameters of any shape.

    ``beta1``, ``beta2``, ``beta3`` are decays (weights of the *old* term). The defaults, those of the code, merge a
    matrix of at most 1024 entries to a vector.
    """

    eps: float = real("epsilon, added to A and to the power of D", default=1e-12, gt=0)
    exponent: float = real("p, power of D", default=0.5, gt=0)
    basis: str = choice(
        "'eigh', 'qr' (descending, D permuted) or 'qr_meta' (ascending, D kept)",
        default="eigh", of=("eigh", "qr", "qr_meta"),
    )  # fmt: skip
    tolerance: float = real("relative part outside the diagonal up to which a basis is kept", default=0.0, ge=0, le=1)
    iterations: int = integer("rounds of 'qr' and 'qr_meta' in a refresh", default=1, ge=1)
    ignored_axes: tuple[int, ...] = declared("axes after merging, from 0, that have no basis", default=())

    paper: ClassVar[str] = "Shi et al.: Distributed Shampoo, arXiv 2309.06497; Eschenhagen et al., arXiv 2506.03595"
    presets: ClassVar[tuple[str, ...]] = ("meta_soap",)

    @staticmethod
    def meta_soap() -> EShampoo:
        """The default SOAP of the code: one round of QR in a refresh."""
        return EShampoo(basis="qr_meta")

    def rules(self) -> None:
        super().rules()
        axes = self.ignored_axes
        if not (isinstance(axes, tuple) and all(isinstance(i, int) and not isinstance(i, bool) for i in axes)):
            raise TypeError(f"ignored_axes must be a tuple of ints, got {axes!r}")
        if any(i < 0 for i in axes):
            raise ValueError(f"ignored_axes must be >= 0, got {axes!r}")

    @property
    def _keeps(self) -> bool:
        return True

    @property
    def free_basis(self) -> str:
        return "kept" if self.basis == "eigh" and self.tolerance > 0 else "renewed"

    def due(self, step: Any) -> Any:
        """Return whether the update after ``step`` completed updates refreshes: t_0, then multiples of ``every``."""
        return True if self._first == 1 else super().due(step)

    def _sides(self, dims: tuple[int, ...]) -> tuple[bool, ...]:
        return tuple(i not in self.ignored_axes for i in range(len(dims)))

    def state_of(self, shape: tuple[int, ...]) -> EShampooState:
        _, blocks = self._layout(shape)
        sizes = [tuple(piece.stop - piece.start for piece in block) for block in blocks]
        return EShampooState(
            bases=self._of_blocks(shape, lambda d: eye(d, d)),
            d=zeros(*shape) if blocks is FLAT else tuple(zeros(*size) for size in sizes),
            **self._shared(shape),
        )

    def _flat(self, grad: Array, f: Array, n: Array, state: Any, now: Now) -> tuple[Array, dict[str, Any], Any]:
        d = self._accumulated(state.d, grad * grad)  # (E2)
        p = quotient(f, self._denominator(d, now.k), now.xp, bound=self.eps)
        return p if self.graft is None else 1.0 * n, {"grams": (), "bases": (), "d": d}, None

    def _denominator(self, d: Array, k: Any) -> Array:
        return (d * k.correction) ** self.exponent + self.eps

    def _block(self, g: Array, f: Array, kept: dict[str, Any], now: Now) -> tuple[Array, dict[str, Any]]:
        xp, grams, d = now.xp, [], kept["d"]
        for i, gram in enumerate(kept["grams"]):
            grams.append(None if gram is None else self._statistic(gram, g, i, now))

        def refreshed() -> tuple[Any, Array]:
            new, moved = [], d
            for i, (gram, old) in enumerate(zip(grams, kept["bases"], strict=True)):
                q = old
                if gram is not None:
                    q, moved = self._refreshed(gram, old, moved, i, now)  # (E1)
                new.append(q)
            return tuple(new), moved

        bases, d = renew(now.due, refreshed, (kept["bases"], d))
        rotated, average = orthogonal.onto(g, bases, xp), orthogonal.onto(f, bases, xp)
        d = self._accumulated(d, rotated * rotated)  # (E2)
        p = quotient(average, self._denominator(d, now.k), xp, bound=self.eps)
        return orthogonal.back(p, bases, xp), {"grams": tuple(grams), "bases": bases, "d": d}  # (E3)

    def _refreshed(self, gram: Array, old: Array, d: Array, axis: int, now: Now) -> tuple[Array, Array]:
        """Return the new basis of an axis, and D in the order of its columns."""
        xp = now.xp
        a = gram * now.k.correction
        a = a + self.eps * identity(xp, a)
        q = old
        if self.basis == "qr_meta":
            for _ in range(self.iterations):
                near = orthogonal.outside(a, q, xp) <= self.tolerance
                q = xp.where(near[..., None, None], q, orthogonal.followed(a, q, 1, xp=xp))
            return orthogonal.in_order(a, q, xp, ascending=True)[1], d
        near = (orthogonal.outside(a, old, xp) <= self.tolerance)[..., None, None]
        if self.basis == "eigh":
            return xp.where(near, old, orthogonal.eigenbasis(a, ascending=True, xp=xp)), d
        order, start, product = orthogonal.in_order(a, old, xp)
        q = xp.where(near, old, orthogonal.followed(a, start, self.iterations, product=product, xp=xp))
        kept = xp.reshape(near, (*near.shape[:-2], *(1 for _ in d.shape[near.ndim - 2 :])))
        return q, xp.where(kept, d, orthogonal.taken(d, order, axis, xp))

    def report(self, state: EShampooState, finite: Array, xp: Namespace) -> EShampooReport:
        """Return how near the bases are to eigenvectors, the denominators, and the norms of the grafts."""
        pairs = zip(itertools.chain(*state.grams), itertools.chain(*state.bases), strict=True)
        outside = tuple(orthogonal.outside(gram, q, xp) for gram, q in pairs if gram is not None)
        parts = state.d if isinstance(state.d, tuple) else (state.d,)
        k = self.scalars(state.step + (state.step == 0), like=parts[0])
        return EShampooReport(outside, tuple(self._denominator(d, k) for d in parts), finite, state.norms)


def _is_one(value: Scalar) -> bool:
    return is_python_number(value) and value == 1


def _unless_zero(switch: Scalar, value: Scalar) -> Scalar:
    """Return ``value``, and 0 if ``switch`` is 0."""
    if is_python_number(switch):
        return value if switch else 0.0
    return value * array_namespace(switch).astype(switch != 0, switch.dtype)


def _law(p: Fraction, eps: Scalar) -> roots.Law:
    return roots.Law(-p.numerator / p.denominator, eps)


def _fraction(p: float) -> Fraction:
    """Return the fraction that a float stands for: 1/6 for 0.16666666666666666."""
    return Fraction(p).limit_denominator(1000)


def _merged_from_the_right(shape: tuple[int, ...], bound: int, target: int) -> tuple[int, ...]:
    """Return the axes other than 1, merged while there are more than ``target`` and the product is within ``bound``."""
    *left, product = squeezed(shape)
    count, found = len(left) + 1, []
    for d in reversed(left):
        if count > target and product * d <= bound:
            product, count = product * d, count - 1
        else:
            found.append(product)
            product = d
    return tuple(reversed([*found, product]))


def _mixed(share: Scalar, x: Array, y: Array) -> Array:
    """Return ``share x + (1 - share) y``, without arithmetic for 0 and 1."""
    if is_python_number(share):
        return x if share else 1.0 * y
    return share * x + (1.0 - share) * y


def _joined(parts: list[Array], counts: list[int], axis: int, xp: Namespace) -> Array:
    """Return blocks in row-major order, ``counts`` along each axis from ``axis`` on, as one array."""
    if not counts:
        return parts[0]
    size = len(parts) // counts[0]
    rows = [_joined(parts[i : i + size], counts[1:], axis + 1, xp) for i in range(0, len(parts), size)]
    return rows[0] if len(rows) == 1 else xp.concat(rows, axis=axis)
