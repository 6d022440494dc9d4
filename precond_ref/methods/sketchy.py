r"""Sketchy: S-AdaGrad and S-Shampoo, preconditioners from Frequent Directions sketches.

V. Feinberg, X. Chen, Y. J. Sun, R. Anil, E. Hazan, NeurIPS 2023, arXiv 2302.03764.

===============  ====================  ============  =========================================================
paper            here                  shape         meaning
===============  ====================  ============  =========================================================
g_t, G_t         ``grad``              (d), (d_1..)  gradient
l                ``size``                            sketch size; the sketch has rank l - 1
Gbar_t           ``sketch``            d x k         sketch of sum beta2^(t-s) g_s g_s^T, k = min(d, l)
rho_{1:t}        ``sketch.escaped``    ()            escaped mass, sum beta2^(t-s) rho_s
Gtil_t           ``sketch.dense``      (d, d)        Gbar_t + rho_{1:t} I
beta_2           ``beta2``                           decay of the sketch, 1 is the sum
eps              ``eps``                             added under the root
===============  ====================  ============  =========================================================

`SAdaGrad`, Algorithm 2 (vectors), with FD-update as in `precond_ref.numerics.sketch`::

    rho_t, Gbar_t = FD-update(beta2 Gbar_{t-1}, g_t g_t^T),  rho_{1:t} = beta2 rho_{1:t-1} + rho_t   (FD)
    direction = (Gbar_t + rho_{1:t} I)^{-1/2} g_t                                                      (x)

`SShampoo`, Algorithm 3, for tensors of any order n: one sketch per axis i, of the unfolding G_(i) (d_i x rest)::

    rho^i_t, Lbar^i_t = FD-update(beta2 Lbar^i_{t-1}, G_(i) G_(i)^T)                                   (FD)
    direction = G x_1 Pi^1_t (Lbar^1_t + (rho^1_{1:t} + eps) I)^{-1/(2n)} x_2 ... x_n                   (X)
    with Pi^i_t the projection onto the range of Lbar^i_t + rho^i_{1:t} I: zero where nothing was seen

`SShampoo.practical`, the deep-learning version (the authors' `tearfree` code), with P the direction above::

    V_t = c V_{t-1} + (1 - c) G_t^2 (c = graft_beta2),  N_t = G_t / sqrt(V_t + graft_eps)  or  N_t = G_t    (N)
    U_t = P_t ||N_t||_F / ||P_t||_F;  N_t at the first ``start`` updates;  P_t without grafting            (U)
    M_t = momentum M_{t-1} + U_t                                                                          (M)
    direction = U_t + momentum M_t (Nesterov) or M_t, + weight_decay X_t                                  (W)

Conventions
    The cut is at the l-th eigenvalue (the authors' DL code: "rank" r cuts at the (r+1)-th, so r = l - 1).
    The tail decays by ``beta2`` (the authors' `distributed_shampoo`: the same; their `tearfree`: sqrt(beta2), which is
    ``tail_decay=beta2**0.5``). No factor 1 - beta2 in the sketch.
    The current gradient enters the sketch before it is preconditioned.
    ``eps=0``: pseudo-inverse with a relative rank decision (the paper: exact; the authors' online code: x <= 0).
    ``eps`` is added to the eigenvalues and to the mass, at each use (Algorithm 3 as printed loses it after t = 0).
    While the mass is 0 the complement of the sketch gets 0 also with ``eps > 0``.
    ``every=k``: the sketch sees the gradients of updates 1, 1 + k, ... only, and preconditions all; one of the others
    that is not finite makes the mass NaN.
    Every axis counts in the exponent -1/(2n), also one of size 1; the practical version merges and drops axes first.
    ``solver="nystrom"`` (not the paper's): another Gbar and rho of the same bounds, see `precond_ref.numerics.nystrom`.
    For the vectors of `SAdaGrad` it would always be the definition, so it is not offered.

Coincides with (each a test)
    ``size >= d`` with ``beta2=1``: `FullAdaGrad`, and `Shampoo` when that holds on all axes. ``size=1``: AdaGrad-Norm;
    for a matrix G / sqrt(sum ||G_s||_2^2). One axis: `SShampoo` is `SAdaGrad`. A gradient span of rank below ``size``:
    full-matrix steps.

Not here
    The projected step; block-wise sketches (the optimizer's ``block_size``); per-axis sizes; EKFAC-like and linear
    tails of the authors' code.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar, NamedTuple

from precond_ref.fields import choice, flag, integer, is_zero, real
from precond_ref.numerics import nystrom
from precond_ref.numerics import sketch as fd
from precond_ref.numerics.arrays import bad_as_nan
from precond_ref.numerics.ema import accumulate, heavy_ball, number, quotient
from precond_ref.numerics.grafting import scale_to_norm
from precond_ref.numerics.nystrom import CertifiedSketch
from precond_ref.numerics.refresh import renew
from precond_ref.numerics.sketch import Sketch, SketchReport
from precond_ref.numerics.template import zeros
from precond_ref.protocol import Method, Now
from precond_ref.typing import Array, Namespace, Scalar

PAPER = "Feinberg, Chen, Sun, Anil, Hazan: Sketchy, NeurIPS 2023, arXiv 2302.03764"
GRAFTS = ("rmsprop", "sgd")
LARGEST_AXIS = 4096
"""A parameter with a longer axis gets the grafted update only (`SShampoo.practical`)."""


class SAdaGradState(NamedTuple):
    """State of `SAdaGrad` for a parameter (..., d)."""

    step: Any
    """t, number of updates done."""
    sketch: Sketch
    """Gbar_t and rho_{1:t}: (..., d, k), (..., k), (...)."""


class SAdaGrad(Method):
    """S-AdaGrad for vectors (Feinberg et al., 2023, arXiv 2302.03764, Algorithm 2; the EMA form of its section 4.3).

    ``beta2`` is a decay (weight of the *old* term); 1 is the sum. Takes (..., d) with ``stack_ndim`` leading axes.
    Errors: ValueError or TypeError for a field out of range, and for arrays that do not fit together.
    """

    size: int = integer("l, sketch size; the sketch has rank l - 1", ge=1)
    beta2: float = real("beta_2, decay of the sketch and of the escaped mass; 1 is the sum", default=1.0, ge=0, le=1)
    delta: float = real("alpha_0, start of the escaped mass", default=0.0, ge=0)
    solver: str = choice("'svd' (the definition) or 'gram64' (Gram matrix in float64)", default="svd", of=fd.SOLVERS)

    paper: ClassVar[str] = PAPER
    ndims: ClassVar[tuple[int, int]] = (1, 1)
    factorizes = True
    refreshes: ClassVar[bool] = True

    def state_of(self, shape: tuple[int, ...]) -> SAdaGradState:
        return SAdaGradState(step=0, sketch=fd.empty(shape[0], self.size, self.delta))

    def step(self, grad: Array, state: SAdaGradState, param: Array, now: Now) -> tuple[Array, SAdaGradState]:
        xp, rows = now.xp, grad[..., None, :]
        sketch = fd.update(state.sketch, rows, self.beta2, size=self.size, solver=self.solver, xp=xp)  # (FD)
        direction = fd.apply_power(*sketch, -0.5, grad[..., None], weight=1.0, xp=xp)[..., 0]  # (x)
        return direction, SAdaGradState(step=now.step, sketch=sketch)

    def report(self, state: SAdaGradState, finite: Array, xp: Namespace) -> SketchReport:
        """Return spectrum and escaped mass of the sketch."""
        return fd.report(state.sketch, finite=finite, xp=xp)


class SShampooState(NamedTuple):
    """State of `SShampoo` for a parameter (..., d_1, ..., d_n)."""

    step: Any
    """t, number of updates done."""
    sketches: tuple[Sketch | CertifiedSketch, ...]
    """One per axis: (..., d_i, k_i), (..., k_i), (...); two more (...) with ``solver="nystrom"``."""


class _Sketched(Method):
    """The common part of both S-Shampoos: a sketch of every axis."""

    size: int = integer("l, sketch size of every axis; the sketch has rank l - 1", ge=1)
    beta2: float = real("beta_2, decay of the sketches; 1 is the sum", default=1.0, ge=0, le=1)
    eps: float = real("epsilon, added to eigenvalues and mass under the root (0: pseudo-inverse)", default=0.0, ge=0)
    relative_eps: bool = flag("eps in units of the largest eigenvalue of the sketch with its mass", default=False)
    every: int = integer("updates from one sketched gradient to the next", default=1, ge=1)
    tail_decay: float | None = real("decay of the escaped mass; None: beta_2", default=None, ge=0, le=1, optional=True)
    solver: str = choice(
        "'svd' (the definition), 'gram64' (Gram matrix in float64) or 'nystrom' (products, QR and a certified mass)",
        default="svd", of=(*fd.SOLVERS, "nystrom"),
    )  # fmt: skip

    paper: ClassVar[str] = PAPER
    factorizes = True

    def empty(self, dims: tuple[int, ...]) -> tuple[Sketch | CertifiedSketch, ...]:
        """Return an empty sketch for each axis."""
        lib: Any = nystrom if self.solver == "nystrom" else fd
        return tuple(lib.empty(d, self.size) for d in dims)

    def renewed(self, sketch: Any, rows: Array, xp: Namespace) -> Any:
        """Return ``sketch`` with new rows (FD)."""
        lib: Any = nystrom.update if self.solver == "nystrom" else partial(fd.update, solver=self.solver)
        return lib(sketch, rows, self.beta2, self.tail_decay, size=self.size, xp=xp)

    def report(self, state: Any, finite: Array, xp: Namespace) -> SketchReport:
        """Return spectrum and escaped mass of each axis (merged, if it merges); empty where only a graft applies."""
        found = fd.report(*state.sketches, finite=finite, xp=xp)
        return nystrom.explained(found, state.sketches, xp) if self.solver == "nystrom" else found


class SShampoo(_Sketched):
    """S-Shampoo for tensors (Feinberg et al., 2023, arXiv 2302.03764, Algorithm 3; the EMA form of its section 4.3).

    ``beta2`` is a decay (weight of the *old* term); 1 is the sum. Takes (..., d_1, ..., d_n) with ``stack_ndim``
    leading axes.
    Errors: ValueError or TypeError for a field out of range, and for arrays that do not fit together.
    """

    ndims: ClassVar[tuple[int, int]] = (1, 64)
    practical: ClassVar[type[SShampooPractical]]

    def state_of(self, shape: tuple[int, ...]) -> SShampooState:
        return SShampooState(step=0, sketches=self.empty(shape))

    def stack_ndim(self, state: SShampooState) -> int:
        return state.sketches[0].escaped.ndim

    def step(self, grad: Array, state: SShampooState, param: Array, now: Now) -> tuple[Array, SShampooState]:
        direction, sketches = _precondition(self, grad, state.sketches, tuple(grad.shape[now.stack :]), now)
        return direction, SShampooState(step=now.step, sketches=sketches)


def _precondition(
    method: _Sketched, grad: Array, sketches: tuple[Any, ...], dims: tuple[int, ...], now: Now
) -> tuple[Array, tuple[Any, ...]]:
    """Return each member of ``grad``, preconditioned along all its axes ``dims``, and the new sketches."""
    xp, due, stack = now.xp, now.due, tuple(grad.shape[: now.stack])
    exponent = -0.5 / len(dims)
    known = 1.0 * due if method.every > 1 else 1.0  # a kept sketch knows nothing of this gradient
    g = p = grad
    new = []
    for i, (d, old) in enumerate(zip(dims, sketches, strict=True)):
        shape = (*stack, d, math.prod(dims[:i] + dims[i + 1 :]))
        rows = xp.matrix_transpose(xp.reshape(g, shape))  # G_(i)^T; as a tensor: axes i+1, ..., n, 1, ..., i
        sketch = renew(due, partial(method.renewed, old, rows, xp), None if method.every == 1 else old)  # (FD)
        if i == 0 and method.every > 1:  # a kept sketch knows nothing of this gradient
            sketch = sketch._replace(escaped=sketch.escaped + bad_as_nan(grad, grad.ndim - now.stack, xp))
        u, e, rho = sketch[:3]
        p = fd.apply_power(
            u, e, rho, exponent, xp.reshape(p, shape),
            ridge=method.eps, relative=method.relative_eps, weight=known if i == 0 else 0.0, xp=xp,
        )  # (X)  # fmt: skip
        g, p = rows, xp.matrix_transpose(p)
        new.append(sketch)
    return xp.reshape(p, grad.shape), tuple(new)


class SShampooPracticalState(NamedTuple):
    """State of `SShampoo.practical` for a parameter (..., any shape)."""

    step: Any
    """t, number of updates done."""
    sketches: tuple[Sketch | CertifiedSketch, ...]
    """One per merged axis; () where only the graft applies."""
    v: Array | None
    """V_t, average (or sum) of squared gradients, the parameter's shape; None unless ``graft="rmsprop"``."""
    m: Array | None
    """M_t, momentum, the parameter's shape; None with ``momentum=0``."""


class SShampooPracticalScalars(NamedTuple):
    """Values of `SShampoo.practical.scalars`, which depend on the update's number alone."""

    preconditioned: Scalar
    """1 after the first ``start`` updates, else 0."""


class SShampooPractical(_Sketched, preset="SShampoo.practical"):
    """S-Shampoo as used for deep learning (Feinberg et al., 2023): grafting, momentum, merged axes, decay inside.

    With grafting, vectors, scalars and parameters with an axis above 4096 get N_t alone; without it all are
    preconditioned. Axes are merged from left to right while their product is at most ``merge``, and axes of size 1 are
    dropped: (3, 3, 64, 128) is treated as (576, 128), a matrix of at most ``merge`` entries as a vector.
    """

    size: int = 129
    beta2: float = 0.999
    eps: float = 1e-7
    relative_eps: bool = True
    graft: str | None = choice("gives the norm: 'rmsprop', 'sgd' or None", default="rmsprop", of=GRAFTS, optional=True)
    graft_beta2: float = real("decay of the graft's averaged square; 1 is the sum", default=0.999, ge=0, le=1)
    graft_eps: float = real("added to the average under the root", default=1e-23, ge=0)
    start: int = integer("updates that take the graft alone; needs a graft", default=0, ge=0)
    momentum: float = real("decay of the momentum", default=0.9, ge=0, le=1)
    nesterov: bool = flag("direction U + momentum M instead of M", default=True)
    momentum_ema: bool = flag("U enters multiplied by 1 - momentum", default=False)
    weight_decay: float = real("decay inside the direction", default=0.0, ge=0)
    decay_after_momentum: bool = flag("added to the direction (decoupled), not to U before (M)", default=True)
    merge: int = integer("largest product of merged axes", default=1024, ge=1)

    ndims: ClassVar[tuple[int, int]] = (0, 64)

    def rules(self) -> None:
        if self.start and self.graft is None:
            raise ValueError(f"start > 0 needs a graft to start with, got start={self.start} and graft=None")

    def takes(self, shape: tuple[int, ...], path: str = "") -> bool:
        """Take every parameter: one that is not preconditioned is grafted."""
        return True

    def axes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the merged axes of a parameter of ``shape``; () where only the graft applies."""
        if 0 in shape or (self.graft is not None and (len(shape) <= 1 or max(shape) > LARGEST_AXIS)):
            return ()
        merged, product = [], 1
        for d in shape:
            if product * d > self.merge:
                merged.append(product)
                product = 1
            product *= d
        return tuple(d for d in (*merged, product) if d > 1)

    def state_of(self, shape: tuple[int, ...]) -> SShampooPracticalState:
        return SShampooPracticalState(
            step=0,
            sketches=self.empty(self.axes(shape)),
            v=zeros(*shape) if self.graft == "rmsprop" else None,
            m=None if is_zero(self.momentum) else zeros(*shape),
        )

    def stack_ndim(self, state: SShampooPracticalState) -> int | None:
        return state.sketches[0].escaped.ndim if state.sketches else None

    def scalars(self, step: Any, *, like: Array = None) -> SShampooPracticalScalars:
        return SShampooPracticalScalars(preconditioned=number(step > self.start, like))

    def step(
        self, grad: Array, state: SShampooPracticalState, param: Array, now: Now
    ) -> tuple[Array, SShampooPracticalState]:
        xp, k = now.xp, now.k
        n, v, sketches = grad, None, state.sketches
        if self.graft == "rmsprop":
            v = accumulate(state.v, grad * grad, self.graft_beta2)
            n = quotient(grad, xp.sqrt(v + self.graft_eps), xp)  # (N)
        if sketches:
            u, sketches = _precondition(self, grad, sketches, self.axes(tuple(grad.shape[now.stack :])), now)
            if self.graft is not None:
                u = scale_to_norm(u, n, tuple(range(now.stack, grad.ndim)), xp)  # (U)
                if self.start:
                    u = k.preconditioned * u + (1.0 - k.preconditioned) * n
        else:
            u = 1.0 * n
        if self.reads_param and not self.decay_after_momentum:
            u = u + self.weight_decay * param
        if state.m is not None and self.momentum_ema:
            u = (1.0 - self.momentum) * u
        m, u = heavy_ball(state.m, u, self.momentum, self.nesterov)  # (M)
        if self.reads_param and self.decay_after_momentum:
            u = u + self.weight_decay * param  # (W)
        return u, SShampooPracticalState(step=now.step, sketches=sketches, v=v, m=m)
