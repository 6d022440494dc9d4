r"""SOAP: Adam in the eigenbasis of Shampoo's statistics.

N. Vyas, D. Morwani, R. Zhao, M. Kwun, I. Shapira, D. Brandfonbrener, L. Janson, S. Kakade, arXiv 2409.11321.

=========  ==============  ==================  ======================================================================
symbol     here            shape               meaning
=========  ==============  ==================  ======================================================================
G_t        ``grad``        (d_1, ..., d_k)     gradient; G_(i) its unfolding of axis i, d_i x rest; X x_i A: A on axis i
L_i        ``grams``       (d_i, d_i)          average of G_(i) G_(i)^T
Q_i        ``bases``       (d_i, d_i)          orthogonal basis, columns; I for an axis without one
M_t        ``m``           (d_1, ..., d_k)     average of gradients, in the parameter's coordinates
M'_t       ``rotated_m``   (d_1, ..., d_k)     the same in the coordinates of the bases
V_t        ``v``           (d_1, ..., d_k)     average of squares, in the coordinates of the bases
beta_1,2   ``beta1,2``                         decays of M and V; ``shampoo_beta`` is that of L (None: beta2)
f          ``every``                           updates between two renewals of the bases
s          ``step - 1``                        updates of M and V, this one included
=========  ==============  ==================  ======================================================================

``order="use_first"``, the authors' code. At t = 1 only L_i and Q_i are made: direction = 0, M = V = 0. At t >= 2::

    G' = G x_i Q_i^T  for all i                                          (P)
    M = beta1 M + (1 - beta1) G,  M' = beta1 M' + (1 - beta1) G'         (M)
    V = beta2 V + (1 - beta2) G' o G'                                    (V)
    N = [M' / (sqrt(V) + eps)] x_i Q_i                                   (N)
    N = N / (sqrt(mean(N o N)) + normalize_eps)  with ``normalize``      (n)
    direction = N sqrt(1 - beta2^s) / (1 - beta1^s)                      (C)
    L_i = shampoo_beta L_i + (1 - shampoo_beta) G_(i) G_(i)^T            (L)
    Q_i, V = refresh(L_i, Q_i, V),  M' = M x_i Q_i^T                     (R)  at t = 1 + f, 1 + 2 f, ...

refresh, ``basis="qr"``: one round of orthogonal iteration, for each axis by itself, with q_j the columns of Q_i::

    a_j = q_j^T L q_j                                                    (R1)
    pi sorts a in descending order; equal entries keep their order       (R2)
    V[..., j, ...] = V[..., pi(j), ...] along axis i                     (R3)
    Z = L [q_pi(1), ..., q_pi(d)],  Q_i = Gram-Schmidt of Z              (R4), (R5)

At t = 1 the basis consists of eigenvectors, by eigenvalues in descending order. With ``basis="eigh"`` this is so at
every refresh, and V is sorted by (R1) to (R3) before.

Conventions
    eps is added to the root of V before its bias correction (``eps_position="uncorrected"``); "corrected": to
    sqrt(V / (1 - beta2^s)); "max": the larger of root and eps.
    M and M' are both kept: M' = M x_i Q_i^T holds at all times, and costs products only when Q changes. (The authors'
    code keeps M' alone and rotates it: the same for orthogonal Q.)
    V is permuted with the columns and not rotated. ``second_moment="rotate"`` rotates it; "keep" does not permute it.
    ``order="update_first"``: (L) and (R), then (P) to (C) in the same update; no update is skipped, and s = t.
    ``sort="after"``: the columns are sorted after the QR instead of before it.
    ``iterations=k``: (R4), (R5) k times; sorted once.
    ``nesterov``: beta1 M' / (1 - beta1^(s+1)) + (1 - beta1) G' / (1 - beta1^s) in the place of M' / (1 - beta1^s).
    A column of Z may depend on the columns before it, to 16 roundings of the longest. It is then replaced by the old
    column, made orthogonal after all others; L = 0 keeps Q and V. Such an a_j counts as 0. (LAPACK: any completion.)
    An axis longer than ``max_dim`` has no basis; a vector has a basis only with ``vectors=True``.
    ``merge``: axes are merged from left to right while their product is at most ``max_dim``, without axes of size 1.
    ``refresh=True`` renews the bases, by eigenvectors at the first update; ``refresh=False`` keeps them.

What is determined
    Signs and order of columns change no direction. Within an eigenspace of dimension above 1, however, another basis
    gives another run, because V is no tensor. The longer side of a matrix m x n with ``|m - n| >= 2`` has a null space
    of dimension ``|m - n|`` at t = 1, so its run depends on the eigensolver. Two such runs are both right.

Coincides with (each a test)
    No axis with a basis, or ``refresh=False`` from the first update on: `Adam` with the gradients G_2, G_3, ...
    ``update_first``, "corrected", t = 1: U diag(s / (s + eps)) V^T of G = U diag(s) V^T; `Muon`'s polar factor for eps
    to 0.
    Rotations of the axes with a basis rotate the directions.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

from precond_ref.fields import choice, flag, integer, is_python_number, real
from precond_ref.numerics import bases as orthogonal
from precond_ref.numerics.arrays import clamp, identity, whole
from precond_ref.numerics.axes import gram_of, multiply, unfold
from precond_ref.numerics.ema import ema, one_minus_power, quotient, reciprocal, sqrt
from precond_ref.numerics.refresh import check_refresh, either, renew
from precond_ref.numerics.template import eye, zeros
from precond_ref.protocol import Method, Now
from precond_ref.typing import Array, Namespace, Scalar

PAPER = "Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson, Kakade: SOAP, arXiv 2409.11321"
Bases = tuple[Array | None, ...]


class SOAPState(NamedTuple):
    """State of `SOAP`; d_1, ..., d_k are the parameter's axes after merging."""

    step: Any
    """t, number of updates done."""
    m: Array
    """M_t, the parameter's shape."""
    rotated_m: Array | None
    """M'_t, (..., d_1, ..., d_k); None if no axis has a basis."""
    v: Array
    """V_t, (..., d_1, ..., d_k)."""
    grams: Bases
    """L_i, (..., d_i, d_i), one per axis; None for an axis without a basis, () if no axis has a basis."""
    bases: Bases
    """Q_i, the same shapes."""
    rms: Array | None
    """sqrt(mean(N o N)) of the last update, (...); None without ``normalize``."""


class SOAPScalars(NamedTuple):
    """Values of `SOAP.scalars`, of the update's number t alone; s is t - 1, or t with ``order="update_first"``."""

    first: Scalar
    """1 at t = 1, else 0."""
    inverse_c1: Scalar
    """1 / (1 - beta1^s)."""
    inverse_next: Scalar
    """1 / (1 - beta1^(s+1))."""
    root_c2: Scalar
    """sqrt(1 - beta2^s)."""
    inverse_root_c2: Scalar
    """1 / sqrt(1 - beta2^s)."""


class SOAPReport(NamedTuple):
    """The report of `SOAP.diagnose`; the tuples have an entry for each axis with a basis."""

    rayleigh: tuple[Array, ...]
    """q_j^T L q_j, (..., d_i)."""
    off_diagonal: tuple[Array, ...]
    """Frobenius norm of Q^T L Q outside its diagonal over the norm of L, (...): 0 for the eigenbasis."""
    orthogonality: tuple[Array, ...]
    """Frobenius norm of Q^T Q - I, (...)."""
    denominator: Array
    """Divisor of M' at the last update, (..., d_1, ..., d_k)."""
    finite: Array
    """True if the state of the stack member is finite, (...); 0-D if no axis has a basis."""


class SOAP(Method):
    """SOAP (Vyas et al., 2024, arXiv 2409.11321, and the authors' code) for parameters of any shape.

    ``beta1``, ``beta2``, ``shampoo_beta`` are decays (weights of the *old* term). The authors apply weight decay after
    the step, `Optimizer` applies it before the step.
    Errors: ValueError or TypeError for a field out of range, and for arrays that do not fit together.
    """

    beta1: float = real("beta_1, decay of the averaged gradient", default=0.95, ge=0, lt=1)
    beta2: float = real("beta_2, decay of the averaged square", default=0.95, ge=0, lt=1)
    shampoo_beta: float | None = real("decay of L; None: beta2", default=None, ge=0, lt=1, optional=True)
    eps: float = real("epsilon of the denominator", default=1e-8, ge=0)
    eps_position: str = choice(
        "'uncorrected' (added to the root of V), 'corrected' (to that of the corrected V) or 'max' (of both)",
        default="uncorrected", of=("uncorrected", "corrected", "max"),
    )  # fmt: skip
    every: int = integer("f, updates between two renewals of the bases", default=10, ge=1)
    max_dim: int = integer("longest axis with a basis, and largest product of merged axes", default=10000, ge=1)
    merge: bool = flag("merge axes, from left to right, up to max_dim", default=False)
    channels_last: bool = flag("with merge: the four axes of a convolution in the order 0, 3, 1, 2", default=False)
    vectors: bool = flag("a vector has a basis too", default=False)
    normalize: bool = flag("divide the update by its root mean square", default=False)
    normalize_eps: float = real("added to that root mean square", default=1e-30, ge=0)
    bias_correction: bool = flag("sqrt(1 - beta2^s) / (1 - beta1^s)", default=True)
    basis: str = choice("'qr' (orthogonal iteration after the first) or 'eigh'", default="qr", of=("qr", "eigh"))
    order: str = choice(
        "'use_first' (the old bases, then renew) or 'update_first'",
        default="use_first", of=("use_first", "update_first"),
    )  # fmt: skip
    sort: str = choice("columns are sorted 'before' or 'after' the QR", default="before", of=("before", "after"))
    second_moment: str = choice(
        "V at a renewal: 'permute' with the columns, 'keep', or 'rotate' into the new bases",
        default="permute", of=("permute", "keep", "rotate"),
    )  # fmt: skip
    iterations: int = integer("rounds of 'qr' in a renewal", default=1, ge=1)
    nesterov: bool = flag("look ahead with the current gradient", default=False)

    paper: ClassVar[str] = PAPER
    factorizes = True
    free_basis = "first"
    presets: ClassVar[tuple[str, ...]] = ("nvidia",)

    @staticmethod
    def nvidia() -> SOAP:
        """The form of NVIDIA's Emerging-Optimizers (legacy ``SOAP``), which does not permute V with the columns."""
        return SOAP(
            beta1=0.9, eps_position="corrected", every=1, order="update_first", sort="after", second_moment="keep"
        )

    def rules(self) -> None:
        if self.channels_last and not self.merge:
            raise ValueError("channels_last=True needs merge=True: without merging the order of axes changes nothing")

    def takes(self, shape: tuple[int, ...], path: str = "") -> bool:
        """Return True for parameters of two axes or more; with ``vectors`` also for vectors."""
        return len(shape) >= (1 if self.vectors else 2)

    def overruled(self, refresh: Any) -> Any:
        """Return ``refresh``, any bool: the bases are always kept."""
        return check_refresh(refresh)

    def axes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return d_1, ..., d_k of a parameter of ``shape``."""
        return self._layout(shape)[1]

    def _layout(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
        """Return the shape with its axes in order, the merged shape, and for each axis whether it has a basis.

        If no axis has a basis, the shape does not change and the last value is ().
        """
        moved = dims = shape
        if self.merge:
            if self.channels_last and len(shape) == 4:
                moved = (shape[0], shape[3], *shape[1:3])
            dims = _merged(moved, self.max_dim)
        if 0 not in shape and len(shape) >= (1 if self.vectors else 2) and min(dims) <= self.max_dim:
            return moved, dims, tuple(d <= self.max_dim for d in dims)
        return shape, shape, ()

    def state_of(self, shape: tuple[int, ...]) -> SOAPState:
        _, dims, has = self._layout(shape)
        sides = [d if own else None for d, own in zip(dims, has, strict=bool(has))]
        return SOAPState(
            step=0,
            m=zeros(*shape),
            rotated_m=zeros(*dims) if has else None,
            v=zeros(*dims),
            grams=tuple(None if d is None else zeros(d, d) for d in sides),
            bases=tuple(None if d is None else eye(d, d) for d in sides),
            rms=zeros() if self.normalize else None,
        )

    @property
    def idle(self) -> frozenset[str]:
        return frozenset((*(() if self.normalize else ("normalize_eps",)),
                          *(("iterations",) if self.basis == "eigh" else ())))  # fmt: skip

    def stack_ndim(self, state: SOAPState) -> int | None:
        if state.rms is not None:
            return state.rms.ndim
        return next((gram.ndim - 2 for gram in state.grams if gram is not None), None)

    def scalars(self, step: Any, *, like: Array = None) -> SOAPScalars:
        if isinstance(step, int):
            first: Scalar = float(step == 1)
        else:
            first = 1.0 - one_minus_power(0.0, step - 1, like=like)
        if not self.bias_correction:
            return SOAPScalars(first, 1.0, 1.0, 1.0, 1.0)
        s = step - 1 if self.order == "use_first" else step
        root_c2 = sqrt(one_minus_power(self.beta2, s, like=like))
        return SOAPScalars(
            first=first,
            inverse_c1=reciprocal(one_minus_power(self.beta1, s, like=like)),
            inverse_next=reciprocal(one_minus_power(self.beta1, s + 1, like=like)),
            root_c2=root_c2,
            inverse_root_c2=reciprocal(root_c2),
        )

    def step(self, grad: Array, state: SOAPState, param: Array, now: Now) -> tuple[Array, SOAPState]:
        xp, k, stack = now.xp, now.k, now.stack
        grams, bases, v, average = state.grams, state.bases, state.v, state.rotated_m
        grad = whole(grad, grad.ndim - stack, xp) if grams else grad
        g = self._arranged(grad, stack, xp)
        used = 1.0 if self.order == "update_first" else 1.0 - k.first  # 0: this gradient makes the bases only
        if self.order == "update_first":
            grams, bases, v, average = self._renewed(g, state.m, grams, bases, v, average, now)  # (L), (R)
        rotated = orthogonal.onto(g, bases, xp)  # (P)
        m = _scaled(used, ema(state.m, grad, self.beta1))  # (M)
        average = m if average is None else _scaled(used, ema(average, rotated, self.beta1))
        v = _scaled(used, ema(v, rotated * rotated, self.beta2))  # (V)
        n = average
        if self.nesterov:
            ahead = (1 - self.beta1) * k.inverse_c1
            n = _scaled(used, self.beta1 * k.inverse_next * average + ahead * rotated)
        n = quotient(n, self._denominator(v, k, xp), xp, bound=self.eps)
        n, rms = orthogonal.back(n, bases, xp), None  # (N)
        if self.normalize:
            axes = tuple(range(stack, n.ndim))
            rms = xp.sqrt(xp.sum(n * n, axis=axes) / max(math.prod(n.shape[stack:]), 1)) if axes else xp.abs(n)
            size = xp.reshape(rms, (*n.shape[:stack], *(1 for _ in axes)))
            n = quotient(n, size + self.normalize_eps, xp)  # (n)
        factor = (k.root_c2 if self.eps_position == "uncorrected" else 1.0) * (1.0 if self.nesterov else k.inverse_c1)
        direction = self._restored(n * factor, grad, stack, xp)  # (C)
        if not grams:
            average = None
        elif self.order == "use_first":
            grams, bases, v, average = self._renewed(g, m, grams, bases, v, average, now)  # (L), (R)
        return direction, SOAPState(now.step, m, average, v, grams, bases, rms)

    def _denominator(self, v: Array, k: SOAPScalars, xp: Namespace) -> Array:
        root = xp.sqrt(v)
        if self.eps_position == "uncorrected":
            return root + self.eps
        corrected = root * k.inverse_root_c2
        if self.eps_position == "corrected":
            return corrected + self.eps
        return clamp(corrected, self.eps, xp=xp) if is_python_number(self.eps) else xp.maximum(corrected, self.eps)

    def _renewed(
        self, g: Array, m: Array, grams: Bases, bases: Bases, v: Array, average: Array | None, now: Now
    ) -> tuple[Bases, Bases, Array, Array | None]:
        """Return the new statistics, and the bases, V and M', which are new if a refresh is due."""
        xp, decay = now.xp, self.beta2 if self.shampoo_beta is None else self.shampoo_beta
        grams = tuple(gram if gram is None else self._statistic(gram, g, i, decay, now) for i, gram in enumerate(grams))

        def refreshed() -> tuple[Bases, Array, Array | None]:
            new, moved = list(bases), v
            for i, (gram, old) in enumerate(zip(grams, bases, strict=True)):
                if gram is not None and old is not None:
                    new[i], order = self._refreshed(gram, old, now)
                    moved = self._relabelled(moved, i, old, new[i], order, xp)
            return tuple(new), moved, orthogonal.onto(self._arranged(m, now.stack, xp), new, xp) if grams else None

        bases, v, average = renew(now.due, refreshed, (bases, v, average))
        return grams, bases, v, average

    def _statistic(self, gram: Array, g: Array, axis: int, decay: Scalar, now: Now) -> Array:
        unfolded = unfold(g, now.stack, axis, now.xp)
        return ema(gram, gram_of(unfolded, now.xp), decay)  # (L)

    def _refreshed(self, gram: Array, old: Array, now: Now) -> tuple[Array, Array | None]:
        """Return the new basis, and the order in which it has the columns; None if they keep their order."""
        xp, order, start, product = now.xp, None, old, None
        if self.sort == "before":
            order, start, product = orthogonal.in_order(gram, old, xp)  # (R1), (R2)
        if self.basis == "eigh":
            return orthogonal.eigenbasis(gram, xp=xp), order
        new = either(
            now.k.first > 0,
            lambda: orthogonal.eigenbasis(gram, xp=xp),
            lambda: orthogonal.followed(gram, start, self.iterations, product=product, xp=xp),  # (R4), (R5)
        )
        if self.sort == "after":
            order, new, _ = orthogonal.in_order(gram, new, xp)
        return new, order

    def _relabelled(self, v: Array, axis: int, old: Array, new: Array, order: Array | None, xp: Namespace) -> Array:
        """Return V in the order of the new columns, or rotated."""
        if self.second_moment == "rotate":
            turn = xp.matrix_transpose(new) @ old
            return multiply(v, turn * turn, axis, xp)
        if self.second_moment == "keep" or order is None:
            return v
        return orthogonal.taken(v, order, axis, xp)  # (R3)

    def _arranged(self, x: Array, stack: int, xp: Namespace) -> Array:
        """Return an array of the parameter's shape with the axes of V."""
        shape = tuple(x.shape[stack:])
        moved, dims, _ = self._layout(shape)
        if moved != shape:
            x = xp.moveaxis(x, stack + 3, stack + 1)
        return x if dims == moved else xp.reshape(x, (*x.shape[:stack], *dims))

    def _restored(self, x: Array, like: Array, stack: int, xp: Namespace) -> Array:
        """Return an array with the axes of V in the parameter's shape, the inverse of `_arranged`."""
        shape = tuple(like.shape[stack:])
        moved, dims, _ = self._layout(shape)
        if dims != moved:
            x = xp.reshape(x, (*x.shape[:stack], *moved))
        return x if moved == shape else xp.moveaxis(x, stack + 1, stack + 3)

    def report(self, state: SOAPState, finite: Array, xp: Namespace) -> SOAPReport:
        """Return how near the bases are to eigenvectors and to orthogonality, and the denominator."""
        pairs = [(gram, q) for gram, q in zip(state.grams, state.bases, strict=True) if gram is not None]
        rayleigh = tuple(xp.sum(q * (gram @ q), axis=-2) for gram, q in pairs)
        outside = tuple(orthogonal.outside(gram, q, xp) for gram, q in pairs)
        errors = [xp.matrix_transpose(q) @ q - identity(xp, q) for _, q in pairs]
        lost = tuple(xp.sqrt(xp.sum(error * error, axis=(-2, -1))) for error in errors)
        k = self.scalars(state.step + (state.step == 0), like=state.v)
        denominator = self._denominator(state.v, k, xp)
        return SOAPReport(rayleigh, outside, lost, denominator, finite)


def _merged(shape: tuple[int, ...], bound: int) -> tuple[int, ...]:
    """Return the axes, merged from left to right while their product is at most ``bound``."""
    found, product = [], 1
    for d in shape:
        if product * d <= bound:
            product *= d
        elif product > 1:
            found.append(product)
            product = d
        else:
            found.append(d)
    return tuple(found + [product] * (product > 1 or not found))


def _scaled(factor: Scalar, x: Array) -> Array:
    """Return ``factor x``, without a multiplication by 1."""
    return x if is_python_number(factor) and factor == 1 else factor * x
