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
    direction = G x_1 (Lbar^1_t + (rho^1_{1:t} + eps) I)^{-1/(2n)} x_2 ... x_n                          (X)

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
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from array_api_compat import array_namespace

from precond_ref.numerics import sketch as fd
from precond_ref.numerics.arrays import all_finite, bad_as_nan
from precond_ref.numerics.ema import accumulate, quotient
from precond_ref.numerics.grafting import scale_to_norm
from precond_ref.numerics.refresh import is_due, renew
from precond_ref.numerics.sketch import Sketch, SketchReport
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

PAPER = "Feinberg, Chen, Sun, Anil, Hazan: Sketchy, NeurIPS 2023, arXiv 2302.03764"
LARGEST_AXIS = 4096
"""A parameter with a longer axis gets the grafted update only (`SShampoo.practical`)."""


class SAdaGradState(NamedTuple):
    """State of `SAdaGrad` for a parameter (..., d)."""

    step: Any
    """t, updates done."""
    sketch: Sketch
    """Gbar_t and rho_{1:t}: (..., d, k), (..., k), (...)."""


@dataclass(frozen=True, kw_only=True)
class SAdaGrad(Method):
    """S-AdaGrad for vectors (Feinberg et al., 2023, arXiv 2302.03764, Algorithm 2; the EMA form of its section 4.3).

    ``beta2`` is a decay (weight of the *old* term); 1 is the sum. Takes (..., d) with ``stack_ndim`` leading axes.
    Errors: ValueError or TypeError for a field out of range, and for arrays that do not fit together.
    """

    size: int
    beta2: float = 1.0
    delta: float = 0.0
    solver: str = "svd"

    paper: ClassVar[str] = PAPER
    state_type: ClassVar[Any] = SAdaGradState
    symbols: ClassVar = MappingProxyType(
        {
            "size": "l, sketch size, >= 1; the sketch has rank l - 1",
            "beta2": "beta_2, decay of the sketch and of the escaped mass, in [0, 1]; 1 is the sum",
            "delta": "alpha_0, start of the escaped mass, >= 0",
            "solver": "'svd' (the definition) or 'gram64' (Gram matrix in float64)",
        }
    )
    ndims: ClassVar[tuple[int, int]] = (1, 1)

    def __post_init__(self) -> None:
        check_int(self, "size", ge=1)
        check_real(self, "beta2", ge=0, le=1)
        check_real(self, "delta", ge=0)
        check_choice(self, "solver", fd.SOLVERS)

    def takes(self, shape: tuple[int, ...], path: str = "") -> bool:
        """Vectors."""
        return len(shape) == 1

    def init(self, param: Array, *, stack_ndim: int = 0) -> SAdaGradState:
        xp = self._check_param(param, stack_ndim, factorizes=True)
        sketch = fd.empty(param.shape[-1], self.size, tuple(param.shape[:-1]), param, self.delta, xp=xp)
        return SAdaGradState(step=0, sketch=sketch)

    def update(
        self,
        grad: Array,
        state: SAdaGradState,
        param: Array,
        *,
        scalars: Any = None,
        refresh: bool | None = None,
        xp: Namespace = None,
    ) -> tuple[Array, SAdaGradState]:
        xp, _ = self._enter(grad, state, param, scalars, xp)
        is_due(state.step, 1, refresh)
        fd.check("state.sketch", state.sketch, param.shape[-1], self.size, tuple(param.shape[:-1]))
        rows = grad[..., None, :]
        sketch = fd.update(state.sketch, rows, self.beta2, size=self.size, solver=self.solver, xp=xp)  # (FD)
        u, e, rho = sketch
        direction = fd.apply_power(u, e, rho, -0.5, grad[..., None], weight=1.0, xp=xp)[..., 0]  # (x)
        return direction, SAdaGradState(step=state.step + 1, sketch=sketch)

    def diagnose(self, state: SAdaGradState) -> SketchReport:
        """Spectrum and escaped mass of the sketch."""
        self._check_state(state)
        eigenvalues = state.sketch.eigenvalues
        return fd.report(state.sketch, xp=self._check_param(eigenvalues, eigenvalues.ndim - 1))


class SShampooState(NamedTuple):
    """State of `SShampoo` for a parameter (..., d_1, ..., d_n)."""

    step: Any
    """t, updates done."""
    sketches: tuple[Sketch, ...]
    """One per axis: (..., d_i, k_i), (..., k_i), (...)."""


@dataclass(frozen=True, kw_only=True)
class SShampoo(Method):
    """S-Shampoo for tensors (Feinberg et al., 2023, arXiv 2302.03764, Algorithm 3; the EMA form of its section 4.3).

    ``beta2`` is a decay (weight of the *old* term); 1 is the sum. Takes (..., d_1, ..., d_n) with ``stack_ndim``
    leading axes.
    Errors: ValueError or TypeError for a field out of range, and for arrays that do not fit together.
    """

    size: int
    beta2: float = 1.0
    eps: float = 0.0
    relative_eps: bool = False
    every: int = 1
    tail_decay: float | None = None
    solver: str = "svd"

    paper: ClassVar[str] = PAPER
    state_type: ClassVar[Any] = SShampooState
    symbols: ClassVar = MappingProxyType(
        {
            "size": "l, sketch size of every axis, >= 1; the sketch has rank l - 1",
            "beta2": "beta_2, decay of the sketches, in [0, 1]; 1 is the sum",
            "eps": "epsilon, added to eigenvalues and escaped mass under the root, >= 0 (0: pseudo-inverse)",
            "relative_eps": "eps in units of the largest eigenvalue of the sketch with its mass",
            "every": "updates from one sketched gradient to the next, >= 1",
            "tail_decay": "decay of the escaped mass, in [0, 1]; None: beta_2",
            "solver": "'svd' (the definition) or 'gram64' (Gram matrix in float64)",
        }
    )
    presets: ClassVar[tuple[str, ...]] = ("practical",)
    ndims: ClassVar[tuple[int, int]] = (1, 64)

    def __post_init__(self) -> None:
        check_int(self, "size", ge=1)
        check_real(self, "beta2", ge=0, le=1)
        check_real(self, "eps", ge=0)
        check_bool(self, "relative_eps")
        check_int(self, "every", ge=1)
        check_real(self, "tail_decay", ge=0, le=1, optional=True)
        check_choice(self, "solver", fd.SOLVERS)

    @staticmethod
    def practical(
        size: int = 129,
        beta2: float = 0.999,
        eps: float = 1e-7,
        relative_eps: bool = True,
        every: int = 1,
        tail_decay: float | None = None,
        graft: str | None = "rmsprop",
        graft_beta2: float = 0.999,
        graft_eps: float = 1e-23,
        start: int = 0,
        momentum: float = 0.9,
        nesterov: bool = True,
        momentum_ema: bool = False,
        weight_decay: float = 0.0,
        decay_after_momentum: bool = True,
        merge: int = 1024,
        solver: str = "svd",
    ) -> SShampooPractical:
        """The deep-learning version: grafting, momentum, merged axes, exclusions, and weight decay inside."""
        return SShampooPractical(
            size=size, beta2=beta2, eps=eps, relative_eps=relative_eps, every=every, tail_decay=tail_decay,
            graft=graft, graft_beta2=graft_beta2, graft_eps=graft_eps, start=start,
            momentum=momentum, nesterov=nesterov, momentum_ema=momentum_ema,
            weight_decay=weight_decay, decay_after_momentum=decay_after_momentum, merge=merge, solver=solver,
        )  # fmt: skip

    def init(self, param: Array, *, stack_ndim: int = 0) -> SShampooState:
        xp = self._check_param(param, stack_ndim, factorizes=True)
        stack, dims = tuple(param.shape[:stack_ndim]), param.shape[stack_ndim:]
        return SShampooState(step=0, sketches=tuple(fd.empty(d, self.size, stack, param, xp=xp) for d in dims))

    def update(
        self,
        grad: Array,
        state: SShampooState,
        param: Array,
        *,
        scalars: Any = None,
        refresh: bool | None = None,
        xp: Namespace = None,
    ) -> tuple[Array, SShampooState]:
        xp, _ = self._enter(grad, state, param, scalars, xp)
        due = is_due(state.step, self.every, refresh)
        stack_ndim = param.ndim - len(state.sketches)
        if not 0 <= stack_ndim < param.ndim:
            raise ValueError(
                f"state.sketches must be one per axis of param of shape {tuple(param.shape)}, got {len(state.sketches)}"
            )
        dims = tuple(param.shape[stack_ndim:])
        direction, sketches = _precondition(self, grad, state.sketches, stack_ndim, dims, due, xp)
        return direction, SShampooState(step=state.step + 1, sketches=sketches)

    def diagnose(self, state: SShampooState) -> SketchReport:
        """Spectrum and escaped mass of each axis."""
        self._check_state(state)
        return fd.report(*state.sketches, xp=self._check_param(state.sketches[0].eigenvalues, 0))


def _precondition(
    method: SShampoo | SShampooPractical,
    grad: Array,
    sketches: tuple[Sketch, ...],
    stack_ndim: int,
    dims: tuple[int, ...],
    due: Any,
    xp: Namespace,
) -> tuple[Array, tuple[Sketch, ...]]:
    """Each member of ``grad``, read as a tensor with axes ``dims``, preconditioned along all; the new sketches."""
    stack = tuple(grad.shape[:stack_ndim])
    exponent = -0.5 / len(dims)
    known = 1.0 * due if method.every > 1 else 1.0  # a kept sketch knows nothing of this gradient
    g = p = grad
    new = []
    for i, (d, old) in enumerate(zip(dims, sketches, strict=True)):
        fd.check(f"state.sketches[{i}]", old, d, method.size, stack)
        shape = (*stack, d, math.prod(dims[:i] + dims[i + 1 :]))
        rows = xp.matrix_transpose(xp.reshape(g, shape))  # G_(i)^T; as a tensor: axes i+1, ..., n, 1, ..., i
        compute = partial(
            fd.update, old, rows, method.beta2, method.tail_decay, size=method.size, solver=method.solver, xp=xp
        )
        sketch = renew(due, compute, None if method.every == 1 else old)  # (FD)
        if i == 0 and method.every > 1:  # a kept sketch knows nothing of this gradient
            sketch = sketch._replace(escaped=sketch.escaped + bad_as_nan(grad, grad.ndim - stack_ndim, xp))
        u, e, rho = sketch
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
    """t, updates done."""
    sketches: tuple[Sketch, ...]
    """One per merged axis; () where only the graft applies."""
    v: Array | None
    """V_t, average (or sum) of squared gradients, the parameter's shape; None unless ``graft="rmsprop"``."""
    m: Array | None
    """M_t, momentum, the parameter's shape; None with ``momentum=0``."""


class SShampooPracticalScalars(NamedTuple):
    """What `SShampoo.practical` needs of the step's number."""

    preconditioned: Scalar
    """1 after the first ``start`` updates, else 0."""


@dataclass(frozen=True, kw_only=True)
class SShampooPractical(Method, register=False):
    """S-Shampoo as used for deep learning (Feinberg et al., 2023, and its authors' code), made by `SShampoo.practical`.

    With grafting, vectors, scalars and parameters with an axis above 4096 get N_t alone; without it all are
    preconditioned. Axes are merged from left to right while their product is at most ``merge``, and axes of size 1 are
    dropped: (3, 3, 64, 128) is treated as (576, 128), a matrix of at most ``merge`` entries as a vector.
    """

    size: int
    beta2: float
    eps: float
    relative_eps: bool
    every: int
    tail_decay: float | None
    graft: str | None
    graft_beta2: float
    graft_eps: float
    start: int
    momentum: float
    nesterov: bool
    momentum_ema: bool
    weight_decay: float
    decay_after_momentum: bool
    merge: int
    solver: str

    paper: ClassVar[str] = PAPER
    state_type: ClassVar[Any] = SShampooPracticalState
    symbols: ClassVar = MappingProxyType(
        {
            **SShampoo.symbols,
            "graft": "where the update's norm comes from: 'rmsprop', 'sgd' or None",
            "graft_beta2": "decay of the graft's averaged square, in [0, 1]; 1 is the sum",
            "graft_eps": "added to the average under the root, >= 0",
            "start": "updates that take the graft alone, >= 0; needs a graft",
            "momentum": "decay of the momentum, in [0, 1]",
            "nesterov": "direction U + momentum M instead of M",
            "momentum_ema": "U enters multiplied by 1 - momentum",
            "weight_decay": "decay inside the direction, >= 0",
            "decay_after_momentum": "added to the direction (decoupled) instead of to U before the momentum",
            "merge": "largest product of merged axes, >= 1",
        }
    )
    ndims: ClassVar[tuple[int, int]] = (0, 64)

    def __post_init__(self) -> None:
        SShampoo.__post_init__(self)  # type: ignore[arg-type]
        if self.graft is not None:
            check_choice(self, "graft", ("rmsprop", "sgd"))
        check_real(self, "graft_beta2", ge=0, le=1)
        check_real(self, "graft_eps", ge=0)
        check_int(self, "start", ge=0)
        if self.start and self.graft is None:
            raise ValueError(f"start > 0 needs a graft to start with, got start={self.start} and graft=None")
        check_real(self, "momentum", ge=0, le=1)
        check_bool(self, "nesterov")
        check_bool(self, "momentum_ema")
        check_real(self, "weight_decay", ge=0)
        check_bool(self, "decay_after_momentum")
        check_int(self, "merge", ge=1)

    def takes(self, shape: tuple[int, ...], path: str = "") -> bool:
        """Everything: what is not preconditioned is grafted."""
        return True

    def axes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The merged axes of a parameter of ``shape``; () where only the graft applies."""
        if 0 in shape or (self.graft is not None and (len(shape) <= 1 or max(shape) > LARGEST_AXIS)):
            return ()
        merged, product = [], 1
        for d in shape:
            if product * d > self.merge:
                merged.append(product)
                product = 1
            product *= d
        return tuple(d for d in (*merged, product) if d > 1)

    def init(self, param: Array, *, stack_ndim: int = 0) -> SShampooPracticalState:
        xp = self._check_param(param, stack_ndim, factorizes=True)
        stack, dims = tuple(param.shape[:stack_ndim]), self.axes(tuple(param.shape[stack_ndim:]))
        return SShampooPracticalState(
            step=0,
            sketches=tuple(fd.empty(d, self.size, stack, param, xp=xp) for d in dims),
            v=xp.zeros_like(param) if self.graft == "rmsprop" else None,
            m=None if is_zero(self.momentum) else xp.zeros_like(param),
        )

    def scalars(self, step: Any, *, like: Array = None) -> SShampooPracticalScalars:
        if isinstance(step, int):
            return SShampooPracticalScalars(preconditioned=float(step > self.start))
        return SShampooPracticalScalars(preconditioned=array_namespace(step).astype(step > self.start, like.dtype))

    def update(
        self,
        grad: Array,
        state: SShampooPracticalState,
        param: Array,
        *,
        scalars: SShampooPracticalScalars | None = None,
        refresh: bool | None = None,
        xp: Namespace = None,
    ) -> tuple[Array, SShampooPracticalState]:
        unused = {"v": self.graft != "rmsprop", "m": is_zero(self.momentum)}
        xp, k = self._enter(grad, state, param, scalars, xp, unused=unused)
        due = is_due(state.step, self.every, refresh)
        n, v, sketches = grad, None, state.sketches
        if self.graft == "rmsprop":
            v = accumulate(state.v, grad * grad, self.graft_beta2)
            n = quotient(grad, xp.sqrt(v + self.graft_eps), xp)  # (N)
        if sketches:
            stack_ndim = sketches[0].escaped.ndim
            dims = self.axes(tuple(param.shape[stack_ndim:]))
            if len(dims) != len(sketches):
                raise ValueError(f"state.sketches must be one per merged axis {dims}, got {len(sketches)}")
            u, sketches = _precondition(self, grad, sketches, stack_ndim, dims, due, xp)
            if self.graft is not None:
                u = scale_to_norm(u, n, tuple(range(stack_ndim, param.ndim)), xp)  # (U)
                if self.start:
                    u = k.preconditioned * u + (1.0 - k.preconditioned) * n
        else:
            u = 1.0 * n
        if not self.decay_after_momentum:
            u = u + self.weight_decay * param
        m = None
        if state.m is not None:
            u = (1.0 - self.momentum) * u if self.momentum_ema else u
            m = self.momentum * state.m + u  # (M)
            u = u + self.momentum * m if self.nesterov else 1.0 * m
        if self.decay_after_momentum:
            u = u + self.weight_decay * param  # (W)
        return u, SShampooPracticalState(step=state.step + 1, sketches=sketches, v=v, m=m)

    def diagnose(self, state: SShampooPracticalState) -> SketchReport:
        """Spectrum and escaped mass of each merged axis; empty where only the graft applies, which is elementwise."""
        self._check_state(state)
        others = tuple(array for array in (state.v, state.m) if array is not None)
        if not state.sketches:
            finite = all_finite(self._check_param(others[0], 0), *others) if others else None
            return SketchReport((), (), (), finite, ())
        return fd.report(*state.sketches, others=others, xp=self._check_param(state.sketches[0].eigenvalues, 0))
