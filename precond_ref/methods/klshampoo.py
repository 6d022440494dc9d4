r"""KL-Shampoo and KL-SOAP: Shampoo's two factors as the best Kronecker product in the Kullback-Leibler divergence.

Lin, Lowe, Dangel, Eschenhagen, Xu, Grosse: *Understanding and improving Shampoo and SOAP via Kullback-Leibler
minimization*, ICLR 2026, arXiv 2509.03378. Authors' code: ``yorkerlin/KL-Methods`` (class KLOpt).

Symbols
    here                   meaning
    G, d_n, D              gradient; the sizes of its N axes other than 1, and their product
    G_(n), X x_n A         the unfolding d_n x D/d_n of axis n; A multiplied onto axis n
    S_n, Q_n               ``state.grams``; ``state.factors.basis``, orthogonal
    l_n, r_n               ``state.factors.eigenvalues``, averages of their own; r_n = l_n^(-1/2), 0 where l_n = 0
    M, V                   ``state.m``, average of gradients; ``state.v``, of squares in the bases (KL-SOAP)
    b1, b2, b3             ``beta1``, ``beta2`` (KL-SOAP), ``shampoo_beta``: weights of the old
    eps, delta, l0, f      ``eps``, ``damping``, ``initial``, ``every``
    c_n                    max(10, min(d_n, ``clamp``)): bound of r_n

Idea
    Choose S_1 (x) ... (x) S_N so that KL(N(0, E[g g^T]) || N(0, S_1 (x) ... (x) S_N)) is least. For a matrix:
    S_a = E[G S_b^-1 G^T] / d_b, S_b = E[G^T S_a^-1 G] / d_a. Both become averages over time, which use the old factors.
    Each axis has the exponent -1/2, for any N.

Update 1
    S_n = (1 - b3) (d_n/D) G_(n) G_(n)^T;  Q_n = its eigenvectors, the largest eigenvalue first                 (1)
    direction = 0; nothing else changes

Update t = 2, 3, ..., with the old Q_n and l_n on every right side
    M = b1 M + (1 - b1) G;  M' = M x_n Q_n^T (all n)                                                            (2)
    direction = [M' / (prod_n sqrt(l_n) + eps)] x_n Q_n                                                         (3)
    G' = G x_n Q_n^T (all n);  Y_n = G' times r_j on each axis j != n                                           (4)
    S_n = b3 S_n + (1 - b3) (d_n/D) (Q_n Y_n(n)) (Q_n Y_n(n))^T                                                 (5)
    a_n = means of Y_n o Y_n over the other axes + delta prod_{j != n} mean(r_j^2)                              (6)
    l_n = b3 l_n + (1 - b3) a_n;  at least c_n^-2 if it is positive                                             (7)
    Q_n = Q-factor of S_n Q_n, at updates 1 + f, 1 + 2f, ...                                                    (8)
    ``inner="adam"`` (KL-SOAP), instead of (3):
    V = b2 V + (1 - b2) G' o G';  direction = [M' / (sqrt(V) + eps)] x_n Q_n                                    (9)

`KLShampooExact`, the idealised form: S_n = l0 I, R_n = I, then at each update
    S_n = b3 S_n + (1 - b3) (d_n/D) X_(n) X_(n)^T,  X = G x_j R_j (j != n), of the old R_j                     (10)
    R_n = (S_n + eps I)^(-exponent)                                                                            (11)
    direction = M x_n R_n (all n)                                                                              (12)

Conventions
    l_n is not the spectrum of S_n: S_n only turns the basis. After (8) the l_n stay with their columns.
    (1) takes the other factors as I, though l_n = l0: the weight of the first gradient in S_n has another scale.
    There is no bias correction, as in the authors' code. ``normalize`` scales the direction to root mean square 1.
    Weight decay belongs to the caller: (1 - lr wd) X - lr direction. The authors decay after the step, and not at
    update 1.
    With three axes the authors' code takes some of the new r_n. Here all r_n are old, as in their code for two axes.
    (8): R has a positive diagonal. If only rounding is left of a column (at most d u times the longest column, after
    projection on the columns before it), the column of Q_n takes its place.
    ``start="identity"``: Q_n = I at update 1. If the S_n of the first gradient has a null space of two or more
    dimensions, the eigensolver chooses the basis there, and later steps depend on this choice.
    `KLShampooExact` renews before use and skips no update. ``divide=False`` has no d_n/D; ``bias_correction`` divides
    S_n in (11) by 1 - b3^t and M in (12) by 1 - b1^t. ``KLShampoo.meta`` is Meta's form. Its default exponent 1/(2N) is
    not the paper's, because the other factor then enters as its root.

Coincides with (each a test)
    KL-SOAP after a first gradient of zero, without renewals: `Adam` without bias corrections. KL-Shampoo in the same
    case, with squares of rank one: in the limit the second moment of `Adam` and of `Adafactor`. `KLShampooExact` with
    l0 = 1, eps = 0: its S_n are the factors of `RFShampoo` with beta2 -> 1 - b3 and damping 0.

Hazards
    Constant or rank-deficient gradients of a matrix that is not square: one factor grows, the other shrinks.
    If S_n has a low rank at a renewal (a vector of many entries, small b3), the columns beyond it are rounding.
    The size of the loss matters: gradients well below l0 have an effect only after 1/(1 - b3) updates.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

from array_api_compat import array_namespace

from precond_ref.fields import choice, flag, integer, is_python_number, is_zero, real
from precond_ref.numerics import roots
from precond_ref.numerics.arrays import bad_as_nan, clamp, eye_like, finite_members, largest_entry, own, whole
from precond_ref.numerics.axes import gram_of, multiply, squeezed, unfold
from precond_ref.numerics.bases import lengths, outside
from precond_ref.numerics.ema import ema, one_minus_power, quotient, reciprocal
from precond_ref.numerics.lapack import attempt
from precond_ref.numerics.refresh import renew
from precond_ref.numerics.roots import Root
from precond_ref.numerics.template import Spec, zeros
from precond_ref.protocol import Method, Now
from precond_ref.typing import Array, Namespace, Scalar

PAPER = "Lin, Lowe, Dangel, Eschenhagen, Xu, Grosse: KL-Shampoo, ICLR 2026, arXiv 2509.03378"


class KLShampooState(NamedTuple):
    """State of `KLShampoo`; d_n runs over the parameter's axes of size other than 1 (all 1: one axis, d_1 = 1)."""

    step: Any
    """t, number of updates done."""
    grams: tuple[Array, ...]
    """S_n, (..., d_n, d_n)."""
    factors: tuple[Root, ...]
    """Q_n, (..., d_n, d_n), and l_n, (..., d_n)."""
    m: Array
    """M, the parameter's shape."""
    v: Array | None
    """V, in the bases, the parameter's shape; None unless ``inner="adam"``."""


class KLShampooScalars(NamedTuple):
    """Values of `KLShampoo.scalars`, which depend on the update's number alone."""

    first: Scalar
    """1 at the first update, 0 later."""


class KLShampooReport(NamedTuple):
    """The report of `KLShampoo.diagnose`, one entry per axis."""

    eigenvalues: tuple[Array, ...]
    """l_n, (..., d_n), in the order of the columns."""
    diagonal: tuple[Array, ...]
    """Diagonal of Q_n^T S_n Q_n, (..., d_n), in the same order."""
    staleness: tuple[Array, ...]
    """Frobenius norm of Q_n^T S_n Q_n outside its diagonal over the norm of S_n, (...)."""
    floored: tuple[Array, ...]
    """Number of the l_n at the floor of (7), (...)."""
    finite: Array
    """True if the state of the stack member is finite, (...)."""


class KLShampoo(Method):
    """KL-Shampoo, and KL-SOAP with ``inner="adam"``, for tensors of any order (Lin et al., 2026, the authors' code).

    The first direction is zero. Axes of size 1 have no factor.
    Errors: ValueError or TypeError for a field out of range, for arrays that do not fit together, and for dtypes
    below float32.
    """

    beta1: float = real("decay of the averaged gradient", default=0.9, ge=0, lt=1)
    beta2: float = real("decay of the averaged squares in the bases", default=0.98, ge=0, lt=1)
    shampoo_beta: float | None = real(
        "decay of the statistics and eigenvalues (None: beta2)", default=None, ge=0, lt=1, optional=True
    )
    eps: float = real("added to the product of the roots, or to the root of V", default=1e-8, ge=0)
    every: int = integer("f, updates between two bases", default=10, ge=1)
    initial: float = real("l0, start of the eigenvalues", default=0.1, ge=0)
    clamp: int | None = integer("largest bound of l^(-1/2) (None: no bound)", default=4000, ge=1, optional=True)
    damping: float = real("delta, added to the squares in (6)", default=0.0, ge=0)
    inner: str = choice("'shampoo', or 'adam' for KL-SOAP", default="shampoo", of=("shampoo", "adam"))
    normalize: bool = flag("scale the direction to root mean square 1", default=False)
    start: str = choice("first bases: 'eigh' of the first gradient, or 'identity'", default="eigh",
                        of=("eigh", "identity"))  # fmt: skip

    paper: ClassVar[str] = PAPER
    presets: ClassVar[tuple[str, ...]] = ("soap", "meta")
    factorizes = True

    @staticmethod
    def soap(
        beta1: float = 0.9, beta2: float = 0.98, eps: float = 1e-8, every: int = 10, start: str = "eigh"
    ) -> KLShampoo:
        """KL-SOAP."""
        return KLShampoo(inner="adam", beta1=beta1, beta2=beta2, eps=eps, every=every, start=start)

    @staticmethod
    def meta(beta1: float = 0.9, beta2: float = 0.98, eps: float = 1e-8, every: int = 1) -> KLShampooExact:
        """The form of facebookresearch/optimizers, with its default exponent 1/(2N)."""
        return KLShampooExact(
            beta1=beta1, beta2=beta2, eps=eps, every=every, exponent=None, divide=False, initial=0.0,
            bias_correction=True,
        )  # fmt: skip

    @property
    def free_basis(self) -> str:
        return "first" if self.start == "eigh" else "renewed"

    def state_of(self, shape: tuple[int, ...]) -> KLShampooState:
        dims = squeezed(shape)
        return KLShampooState(
            step=0,
            grams=tuple(zeros(d, d) for d in dims),
            factors=tuple(roots.identity_root(d, d, scale=self.initial) for d in dims),
            m=zeros(*shape),
            v=zeros(*shape) if self.inner == "adam" else None,
        )

    def stack_ndim(self, state: KLShampooState) -> int:
        return state.grams[0].ndim - 2

    def scalars(self, step: Any, *, like: Array = None) -> KLShampooScalars:
        if isinstance(step, int):
            return KLShampooScalars(float(step == 1))
        return KLShampooScalars(array_namespace(step).astype(step == 1, like.dtype))

    def step(self, grad: Array, state: KLShampooState, param: Array, now: Now) -> tuple[Array, KLShampooState]:
        xp, stack, first = now.xp, now.stack, now.k.first
        if 0 in grad.shape:
            return 1.0 * grad, state._replace(step=now.step)
        b3 = self.beta2 if self.shampoo_beta is None else self.shampoo_beta
        bases, dims = [factor.basis for factor in state.factors], squeezed(grad.shape[stack:])
        shape = (*grad.shape[:stack], *dims)
        whole_grad = whole(grad, grad.ndim - stack, xp)
        g = xp.reshape(whole_grad, shape)
        r = [_choose(first, xp.ones_like(w), 1 / xp.sqrt(xp.where(w == 0, math.inf, w)), xp) for _, w in state.factors]
        gains = [_along(each, n, len(dims), xp) for n, each in enumerate(r)]
        m = _choose(first, state.m + 0.0 * whole_grad, ema(state.m, whole_grad, self.beta1), xp)  # (2); NaN stays
        rotated = _rotated(g, bases, xp)  # G' of (4)
        inner = _rotated(xp.reshape(m, shape), bases, xp)
        v = state.v
        if v is None:
            e = math.prod(gains[1:], start=gains[0])
            u = inner * (e / (1 + self.eps * e))  # (3)
        else:
            v = _choose(first, v, ema(v, xp.reshape(rotated * rotated, grad.shape), self.beta2), xp)
            u = quotient(inner, xp.sqrt(xp.reshape(v, shape)) + self.eps, xp, bound=self.eps)  # (9)
        for n, basis in enumerate(bases):
            u = multiply(u, basis, n, xp)
        if self.normalize:
            u = u / (1e-30 + xp.sqrt(xp.mean(u * u, axis=tuple(range(stack, u.ndim)), keepdims=True)))
        direction = xp.reshape(_choose(first, 0.0 * g, u, xp), grad.shape)
        grams, factors = [], []
        bad = bad_as_nan(whole_grad, grad.ndim - stack, xp)[..., None]
        for n, (gram, (basis, w)) in enumerate(zip(state.grams, state.factors, strict=True)):
            others = [j for j in range(len(dims)) if j != n]
            y = unfold(math.prod([gains[j] for j in others], start=1.0 * rotated), stack, n, xp)  # Y_n of (4)
            z = basis @ y
            gram = ema(gram, gram_of(z, xp) * (dims[n] / math.prod(dims)), b3)  # (5)
            a = xp.mean(y * y, axis=-1)
            if not is_zero(self.damping):
                a = a + self.damping * math.prod([xp.mean(r[j] * r[j], axis=-1)[..., None] for j in others])  # (6)
            new = ema(w, a, b3)
            if self.clamp is not None:
                new = xp.where(new > 0, clamp(new, 1 / max(10, min(dims[n], self.clamp)) ** 2, xp=xp), new)
            grams.append(gram)
            factors.append(Root(self._turned(now, gram, basis), _choose(first, w, new, xp) + bad))  # (8), (7)
        return direction, KLShampooState(now.step, tuple(grams), tuple(factors), m, v)

    def _turned(self, now: Now, gram: Array, basis: Array) -> Array:
        """Return Q_n for the next update: (1) or (8) if it is due."""
        xp = now.xp

        def begin() -> Array:
            if self.start == "identity":
                return 1.0 * basis
            _, q, finite = roots.eigh(gram, xp=xp)
            return own(xp.where(finite, xp.flip(q, axis=-1), math.nan), xp)

        def turn() -> Array:
            if is_python_number(now.k.first):
                return begin() if now.k.first else _orthogonal(gram @ basis, basis, xp)
            return renew(now.k.first > 0, begin, _orthogonal(gram @ basis, basis, xp))

        return renew(now.due, turn, basis)

    def report(self, state: KLShampooState, finite: Array, xp: Namespace) -> KLShampooReport:
        """Return the tracked eigenvalues beside the diagonals of the statistics in the bases."""
        diagonal, staleness, floored = [], [], []
        for gram, (basis, w) in zip(state.grams, state.factors, strict=True):
            diagonal.append(xp.sum(basis * (gram @ basis), axis=-2))
            staleness.append(outside(gram, basis, xp))
            floor = -1.0 if self.clamp is None else 1 / max(10, min(w.shape[-1], self.clamp)) ** 2
            floored.append(xp.sum(xp.astype(w <= floor, w.dtype), axis=-1))
        return KLShampooReport(
            tuple(w for _, w in state.factors), tuple(diagonal), tuple(staleness), tuple(floored), finite
        )


class KLShampooExactState(NamedTuple):
    """State of `KLShampooExact`; d_n runs over the parameter's axes of size other than 1."""

    step: Any
    """t, number of updates done."""
    grams: tuple[Array, ...]
    """S_n, (..., d_n, d_n)."""
    roots: tuple[Root, ...]
    """R_n, not formed: (..., d_n, d_n), (..., d_n)."""
    m: Array
    """M, the parameter's shape."""


class KLShampooExactScalars(NamedTuple):
    """Values of `KLShampooExact.scalars`, of the update's number alone; both are 1 without ``bias_correction``."""

    inverse_c1: Scalar
    """1 / (1 - b1^t)."""
    inverse_c2: Scalar
    """1 / (1 - b3^t)."""


class KLShampooExactReport(NamedTuple):
    """The report of `KLShampooExact.diagnose`."""

    eigenvalues: tuple[Array, ...]
    """Eigenvalues of each S_n, ascending, clipped at zero, (..., d_n); NaN if it is not finite."""
    finite: Array
    """True if the state of the stack member is finite and could be decomposed, (...)."""
    accuracy: tuple[Array, ...]
    """Relative error of a direction that each S_n allows, see `precond_ref.numerics.roots.accuracy`, (...)."""


class KLShampooExact(Method, preset="KLShampoo.exact"):
    """KL-Shampoo's idealised form (10)-(12), for tensors of any order; `KLShampoo.meta` is Meta's.

    Errors: as `KLShampoo`.
    """

    beta1: float = real("decay of the averaged gradient", default=0.9, ge=0, lt=1)
    beta2: float = real("b3, decay of the statistics", default=0.98, ge=0, lt=1)
    eps: float = real("added to the eigenvalues under the root (0: pseudo-inverse)", default=1e-8, ge=0)
    every: int = integer("updates between two roots", default=1, ge=1)
    initial: float = real("l0, the statistics start at l0 I", default=0.1, ge=0)
    exponent: float | None = real("of each axis (None: 1/(2N))", default=0.5, ge=0.001, le=4, optional=True)
    divide: bool = flag("divide the statistic of axis n by D/d_n", default=True)
    bias_correction: bool = flag("divide averages by 1 - beta^t", default=False)

    paper: ClassVar[str] = PAPER
    factorizes = True

    def state_of(self, shape: tuple[int, ...]) -> KLShampooExactState:
        dims = squeezed(shape)
        grams = tuple(Spec((d, d), self.initial, identity=True) for d in dims)
        return KLShampooExactState(
            step=0, grams=grams, roots=tuple(roots.identity_root(d, d) for d in dims), m=zeros(*shape)
        )

    def stack_ndim(self, state: KLShampooExactState) -> int:
        return state.grams[0].ndim - 2

    def scalars(self, step: Any, *, like: Array = None) -> KLShampooExactScalars:
        if not self.bias_correction:
            return KLShampooExactScalars(1.0, 1.0)
        return KLShampooExactScalars(
            *(reciprocal(one_minus_power(beta, step, like=like)) for beta in (self.beta1, self.beta2))
        )

    def _law(self, order: int) -> roots.Law:
        return roots.Law(-1 / (2 * order) if self.exponent is None else -self.exponent, self.eps)

    def step(
        self, grad: Array, state: KLShampooExactState, param: Array, now: Now
    ) -> tuple[Array, KLShampooExactState]:
        xp, stack, k = now.xp, now.stack, now.k
        if 0 in grad.shape:
            return 1.0 * grad, state._replace(step=now.step)
        dims = squeezed(grad.shape[stack:])
        shape, law = (*grad.shape[:stack], *dims), self._law(len(dims))
        whole_grad = whole(grad, grad.ndim - stack, xp)
        m = ema(state.m, whole_grad, self.beta1)
        old = [roots.form(root, xp=xp) for root in state.roots] if len(dims) > 1 else []
        grams, known = [], {}
        for n, gram in enumerate(state.grams):
            x = xp.reshape(whole_grad, shape)
            for j, root in enumerate(old):
                x = multiply(x, root, j, xp) if j != n else x
            x = unfold(x, stack, n, xp)
            weight = dims[n] / math.prod(dims) if self.divide else 1.0
            gram = ema(gram, gram_of(x, xp) * weight, self.beta2)  # (10)
            known[n] = roots.renewed(now.due, gram * k.inverse_c2, law, state.roots[n], xp=xp)  # (11)
            grams.append(gram)
        direction = roots.apply(xp.reshape(m * k.inverse_c1, shape), known, law, xp=xp)  # (12)
        new = tuple(root for root, _ in known.values())
        return xp.reshape(direction, grad.shape), KLShampooExactState(now.step, tuple(grams), new, m)

    def report(self, state: KLShampooExactState, finite: Array, xp: Namespace) -> KLShampooExactReport:
        """Return the spectra of the statistics."""
        w = tuple(roots.eigenvalues(gram, xp=xp) for gram in state.grams)
        finite = finite & finite_members(xp, *w, core_ndims=(1,) * len(w))
        law = self._law(len(w))
        return KLShampooExactReport(w, finite, tuple(roots.accuracy(each, law, xp=xp) for each in w))


def _choose(first: Scalar, one: Array, other: Array, xp: Namespace) -> Array:
    """Return ``one`` at the first update, ``other`` later."""
    if is_python_number(first):
        return one if first else other
    return xp.where(first * xp.ones_like(other) > 0, one, other)  # the number may be on another device


def _along(vector: Array, axis: int, order: int, xp: Namespace) -> Array:
    """Return ``vector`` (..., d) reshaped to ``order`` axes, all of size 1 but ``axis``."""
    return xp.reshape(vector, (*vector.shape[:-1], *(vector.shape[-1] if i == axis else 1 for i in range(order))))


def _rotated(tensor: Array, bases: list[Array], xp: Namespace) -> Array:
    """Return the coordinates of ``tensor`` in the bases."""
    for n, basis in enumerate(bases):
        tensor = multiply(tensor, xp.matrix_transpose(basis), n, xp)
    return tensor


def _orthogonal(columns: Array, basis: Array, xp: Namespace) -> Array:
    """Return the Q-factor of ``columns`` (..., d, d), with R's diagonal positive.

    A column that depends on the columns before it is replaced by the column of ``basis``.
    """
    finite = xp.isfinite(largest_entry(columns, (-2, -1), xp)) & xp.isfinite(largest_entry(basis, (-2, -1), xp))
    columns, basis = (xp.where(finite, x, eye_like(xp, x)) for x in (columns, basis))
    q, diagonal = _qr(columns, xp)
    longest = xp.max(lengths(columns, xp), axis=-1, keepdims=True)
    nothing = xp.abs(diagonal) <= columns.shape[-1] * xp.finfo(columns.dtype).eps * longest

    def completed() -> Array:
        return own(_qr(xp.where(nothing[..., None, :], basis, columns), xp)[0], xp)

    return xp.where(finite, renew(xp.any(nothing), completed, own(q, xp)), math.nan)


def _qr(matrix: Array, xp: Namespace) -> tuple[Array, Array]:
    """Return Q (..., d, d) for which R's diagonal (..., d) is positive, and this diagonal."""
    q, r = attempt(lambda x: tuple(xp.linalg.qr(x)), matrix, xp=xp)
    diagonal = xp.sum(r * eye_like(xp, r), axis=-1)
    return q * xp.where(diagonal < 0, -xp.ones_like(diagonal), 1.0)[..., None, :], diagonal
