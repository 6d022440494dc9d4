r"""Muon, the polar factor of the averaged gradient, and NorMuon and AdaMuon, which rescale it by a second moment.

K. Jordan et al., 2024 (a blog post and code; no paper). The codes of this name differ in nine choices; each is a field.
NorMuon: Li et al., arXiv 2510.05491. AdaMuon: Si et al., arXiv 2507.11005.

==========  =======================  ============  =============================================================
symbol      here                     shape         meaning
==========  =======================  ============  =============================================================
G_t         ``grad``                 (m, n)        gradient, m outputs and n inputs
B_t         ``m``                    (m, n)        average or sum of gradients, B_0 = 0
mu          ``momentum``                           decay of B
N_t                                  (m, n)        B_t, or Nesterov's form of it
O_t                                  (m, n)        orthogonalised N_t
nu                                                 N_t is divided by it before the iteration
c           ``scale``, ``rms``                     factor from the matrix's shape
v, V        ``v``                    (m,), (m, n)  second moment of O, of each row or entry (NorMuon, AdaMuon)
==========  =======================  ============  =============================================================

The update; (3) and the later lines are for each block of outputs by itself::

    B_t = mu B_{t-1} + (1 - mu) G_t   or   mu B_{t-1} + G_t                        momentum_form average, sum  (1)
    N_t = B_t                                                                      nesterov=False              (2)
          (1 - mu) G_t + mu B_t   or   G_t + mu B_t                                average, sum
          G_t + B_t                                                                nesterov_form="added"
          B_t / (1 - mu^t)   or   (1 - mu) G_t / (1 - mu^t) + mu B_t / (1 - mu^{t+1})     bias_correction      (2')
    O_t = ortho(N_t)                                                                                           (3)
    direction = c O_t   or   c <N_t, O_t> O_t                                      dual_norm                   (4)

`NorMuon` replaces (4) by, for rows i (``statistic="short"``: for the longer side)::

    v_i = beta2 v_i + (1 - beta2) mean_j O_ij^2                                                                (5)
    U_ij = O_ij / (sqrt(v_i) + eps2)                                                                           (6)
    direction = c U ||O||_F / (||U||_F + eps2)                                     rescale="norm"              (7)
                rms sqrt(m n) U / (||U||_F + eps2)                                 rescale="rms"
                c U                                                                rescale="none"

`AdaMuon` orthogonalises sign(N_t), sign(0) = 0, and has one v for each entry in (5) and (6). (7) is the same.

Orthogonalisation (3)
    ``root="svd"``: the polar factor U V^T over the singular values that are not rounding. ``root="newton_schulz"``:
    ``root_steps`` odd quintics on N / nu, see `precond_ref.numerics.orthogonal`, which has the sets of ``coefficients``
    and nu for each ``normalization``. "jordan", (3.4445, -4.7750, 2.0315), does not converge: singular values stay in
    about [0.68, 1.14].

Factor c, for the orthogonalised matrix, with r outputs and k inputs
    ``scale="max"``: rms sqrt(max(r, k)), and 1 for ``rms=None``. "jordan": sqrt(max(1, r / k)). "ratio": sqrt(r / k).

Matrices
    ``outputs="columns"``: the last axis has the outputs (kernels of JAX); this changes only c, ``blocks`` and (5).
    ``layout="flatten"``: (d_0, d_1 d_2 ...), for kernels out x in x h x w. "batch": the last two axes are matrices.
    ``(inputs, outputs)``, two tuples of axes, each flattened in the order given; other axes stack matrices.
    ``blocks``: heads, or the outputs of each block, such as the blocks of a fused query-key-value matrix.

Conventions
    Zero has the direction zero, also with eps = 0. The whole parameter has one momentum; each block has its own nu, O,
    c, v and norms in (7). Weight decay belongs to the caller, before the step and without c. v has no bias correction
    unless ``v_bias_correction`` (AdaMuon): (7) cancels it but for eps2. ``compute_dtype`` is the dtype of the steps in
    (3).

Coincides with (each a test)
    ``Muon(momentum=0, nesterov=False, root="svd", rms=None)``: `ASGO` with beta1 = beta2 = 0, eps = 0, no rms.
    Sum and average: the same directions at eps = 0. NorMuon with rows of equal norm: c O. AdaMuon's first step: rms
    times the sign of O.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from precond_ref.fields import choice, declared, flag, integer, is_python_number, real
from precond_ref.numerics import orthogonal, roots
from precond_ref.numerics.arrays import clamp, finite_members, whole
from precond_ref.numerics.ema import ema, one_minus_power, quotient, reciprocal, sqrt
from precond_ref.numerics.lapack import attempt
from precond_ref.numerics.template import zeros
from precond_ref.protocol import Method, Now
from precond_ref.typing import Array, Namespace, Scalar


class MuonState(NamedTuple):
    """State of `Muon` for a parameter (..., m, n)."""

    step: Any
    """t, number of updates done."""
    m: Array
    """B_t, (..., m, n); with a layout, the matrices of the layout."""


class MuonReport(NamedTuple):
    """The report of ``diagnose`` of `Muon`, `NorMuon` and `AdaMuon`."""

    singular_values: Array
    """Singular values of B_t, descending, (..., min(m, n)); NaN if B_t is not finite."""
    finite: Array
    """True if the state of the stack member is finite and could be decomposed, (...)."""


class MuonScalars(NamedTuple):
    """Values of `Muon.scalars`, which depend on the update's number alone."""

    gradient: Scalar
    """1 / (1 - momentum^t)."""
    average: Scalar
    """1 / (1 - momentum^{t+1}) in Nesterov's form, else 1 / (1 - momentum^t)."""
    second: Scalar = 1.0
    """1 / sqrt(1 - beta2^t) in `AdaMuon` with ``v_bias_correction``."""


class _Orthogonalized(Method):
    """Base of `Muon`, `NorMuon` and `AdaMuon`: (1) to (3)."""

    momentum: float = real("mu, decay of the averaged gradient", default=0.95, ge=0, lt=1)
    nesterov: bool = flag("average once more with the current gradient", default=True)
    rms: float | None = real("factor with sqrt(max(m, n))", default=0.2, gt=0, optional=True)
    root: str = choice(
        "'newton_schulz' (odd polynomials) or 'svd' (exact)", default="newton_schulz", of=("newton_schulz", "svd")
    )
    root_steps: int = integer("iterations of 'newton_schulz'", default=5, ge=1)
    momentum_form: str = choice("'average' (weights 1 - mu) or 'sum'", default="average", of=("average", "sum"))
    nesterov_form: str = choice(
        "'weighted' (mu B + (1 - mu) G, or mu B + G for a sum) or 'added' (B + G)",
        default="weighted",
        of=("weighted", "added"),
    )
    bias_correction: bool = flag("divide an average by 1 - mu^t", default=False)
    coefficients: Any = declared(
        f"(a, b, c) of a step, a sequence of these, or one of {', '.join(orthogonal.SETS)}", default="jordan"
    )
    after_last: str = choice(
        "steps beyond the sequence: 'repeat' (the last) or 'cycle'", default="repeat", of=("repeat", "cycle")
    )
    normalization: str = choice(
        "nu: 'frobenius', 'spectral', 'schatten4' or 'aol'", default="frobenius", of=orthogonal.NORMALIZATIONS
    )
    normalization_factor: float = real("f, with the norm in nu", default=1.0, ge=1)
    eps: float = real("e, of nu", default=0.0, ge=0)
    eps_rule: str = choice("nu = f norm + e ('add') or max(f norm, e) ('max')", default="add", of=("add", "max"))
    compute_dtype: str | None = choice(
        "of the steps: None (the parameter's) or 'bfloat16'", default=None, of=("bfloat16",), optional=True
    )
    scale: str = choice(
        "c: 'max' (rms sqrt(max(r, k))), 'jordan' (sqrt(max(1, r / k))) or 'ratio' (sqrt(r / k))",
        default="max",
        of=("max", "jordan", "ratio"),
    )
    outputs: str = choice("axis of the outputs: 'rows' or 'columns'", default="rows", of=("rows", "columns"))
    layout: Any = declared(
        "matrices of a parameter: 'matrix', 'flatten', 'batch', or a pair of tuples of axes (inputs, outputs)",
        default="matrix",
    )
    blocks: int | tuple[int, ...] | None = declared(
        "None, a number of equal blocks of outputs, or the outputs of each", default=None
    )

    # ---- what the fields mean ---------------------------------------------------------------------------------------

    @property
    def factorizes(self) -> bool:
        return self.root == "svd" or self.normalization == "spectral"

    @property
    def idle(self) -> frozenset[str]:
        return frozenset(
            (*(("root_steps", "coefficients", "after_last", "eps", "eps_rule") if self.root == "svd" else ()),
             *(() if self.scale == "max" else ("rms",)), *(() if self.nesterov else ("nesterov_form",)))
        )  # fmt: skip

    @property
    def ndims(self) -> tuple[int, int]:  # type: ignore[override]
        """Two axes, or the number of axes of the layout."""
        if self._axes is not None:
            return max(2, 1 + max(sum(self._axes, ()))), 64
        return (2, 2) if self.layout == "matrix" else (2, 64)

    @property
    def _axes(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The axes of inputs and outputs, if ``layout`` has them, else None."""
        return None if isinstance(self.layout, str) else (tuple(self.layout[0]), tuple(self.layout[1]))

    @property
    def _core(self) -> int:
        """Number of axes of the momentum, without stack axes."""
        return 2 if self.layout in ("matrix", "flatten") else 3

    def rules(self) -> None:
        self._check_fields()

    def _check_fields(self) -> None:
        """Check the fields; each class calls this at the same depth, so that a warning names the caller's line."""
        _check_coefficients(self.coefficients)
        _check_layout(self.layout)
        _check_blocks(self.blocks)
        if self.bias_correction and (self.momentum_form == "sum" or (self.nesterov and self.nesterov_form == "added")):
            raise ValueError(
                "bias_correction=True needs momentum_form='average' and nesterov_form='weighted', got "
                f"{self.momentum_form!r} and {self.nesterov_form!r}"
            )
        if self.outputs == "columns" and self.layout not in ("matrix", "batch"):
            raise ValueError(f"outputs='columns' needs layout='matrix' or 'batch', got layout={self.layout!r}")
        if self.root == "newton_schulz" and is_python_number(self.normalization_factor):
            try:
                at_one = orthogonal.image(1 / self.normalization_factor, self._polynomials)
            except OverflowError:  # many steps, in which the numbers grow
                at_one = math.inf
            if at_one < 0:
                warnings.warn(
                    f"these coefficients send the singular value of a gradient of rank one to {at_one:.4g} < 0: near "
                    f"rank one the step goes uphill, got coefficients={self.coefficients!r}",
                    UserWarning,
                    stacklevel=6,  # the caller of the constructor
                )

    @property
    def _polynomials(self) -> tuple[orthogonal.Triple, ...]:
        return orthogonal.triples(self.coefficients, self.root_steps, self.after_last)

    def takes(self, shape: tuple[int, ...], path: str = "") -> bool:
        """Return True for matrices that are not embeddings; with a layout, for every shape of the layout."""
        low, high = self.ndims
        return low <= len(shape) <= high and "emb" not in path.lower()

    # ---- matrices of a parameter ------------------------------------------------------------------------------------

    def _stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the momentum of a parameter of ``shape``; ValueError if the fields do not fit it."""
        if self._axes is not None:
            stored = tuple(math.prod([shape[axis] for axis in group]) for group in self._groups(len(shape)))
        elif self.layout == "flatten":
            stored = (shape[0], math.prod(shape[1:]))
        elif self.layout == "batch":
            stored = (math.prod(shape[:-2]), *shape[-2:])
        else:
            stored = shape
        rows = stored[-1 if self.outputs == "columns" else -2]
        if isinstance(self.blocks, int) and rows % self.blocks:
            raise ValueError(f"blocks must divide the outputs, got blocks={self.blocks} and shape {shape}")
        if isinstance(self.blocks, Sequence) and rows != sum(self.blocks):
            raise ValueError(f"blocks must have the sum {rows} for shape {shape}, got blocks={self.blocks!r}")
        return stored

    def _groups(self, ndim: int) -> tuple[tuple[int, ...], ...]:
        """Return the axes that stack matrices, the axes of the outputs, and the axes of the inputs."""
        assert self._axes is not None
        inputs, outputs = self._axes
        return tuple(axis for axis in range(ndim) if axis not in inputs + outputs), outputs, inputs

    def _matrices(self, param: Array, stack: int, xp: Namespace) -> Array:
        """Return a parameter in the shape of the momentum."""
        if self.layout == "matrix":
            return param
        shape = tuple(param.shape[stack:])
        if self._axes is not None:
            order = [stack + axis for group in self._groups(len(shape)) for axis in group]
            param = xp.permute_dims(param, (*range(stack), *order))
        return xp.reshape(param, (*param.shape[:stack], *self._stored(shape)))

    def _parameter(self, matrices: Array, shape: tuple[int, ...], stack: int, xp: Namespace) -> Array:
        """Return the array in ``shape``, stack axes included; all NaN if one matrix or block is not finite."""
        if self._core == 3 or self.blocks is not None:
            matrices = whole(matrices, self._core, xp)
        if self._axes is None:
            return matrices if self.layout == "matrix" else xp.reshape(matrices, shape)
        order = [stack + axis for group in self._groups(len(shape) - stack) for axis in group]
        moved = xp.reshape(matrices, (*shape[:stack], *(shape[axis] for axis in order)))
        back = sorted(range(len(order)), key=lambda i: order[i])
        return xp.permute_dims(moved, (*range(stack), *(stack + i for i in back)))

    def _turned(self, matrices: Array, xp: Namespace) -> Array:
        """Return the matrices with the outputs as rows, or from such rows the matrices."""
        return xp.matrix_transpose(matrices) if self.outputs == "columns" else matrices

    def _pieces(self, rows: Array, xp: Namespace) -> list[Array]:
        """Return the blocks of (..., r, k): equal blocks as one array (..., h, r/h, k), others as one array each."""
        if self.blocks is None:
            return [rows]
        *lead, r, k = rows.shape
        if isinstance(self.blocks, int):
            return [xp.reshape(rows, (*lead, self.blocks, r // self.blocks, k))]
        return [rows[..., start : start + size, :] for start, size in _cuts(self.blocks)]

    def _joined(self, pieces: list[Array], shape: tuple[int, ...], xp: Namespace) -> Array:
        """Return the array (..., r, k) of ``shape`` from its blocks."""
        if self.blocks is None:
            return pieces[0]
        return xp.reshape(pieces[0], shape) if len(pieces) == 1 else xp.concat(pieces, axis=-2)

    # ---- (1) to (4) -------------------------------------------------------------------------------------------------

    def scalars(self, step: Any, *, like: Array = None) -> MuonScalars:
        if not self.bias_correction:
            return MuonScalars(1.0, 1.0)
        now = reciprocal(one_minus_power(self.momentum, step, like=like))
        later = reciprocal(one_minus_power(self.momentum, step + 1, like=like)) if self.nesterov else now
        return MuonScalars(now, later)

    def _averaged(self, grad: Array, old: Array, k: MuonScalars) -> tuple[Array, Array]:
        mu = self.momentum
        m = mu * old + grad if self.momentum_form == "sum" else ema(old, grad, mu)  # (1)
        if not self.nesterov:
            return m, m * k.average if self.bias_correction else m  # (2), (2')
        if self.nesterov_form == "added":
            return m, grad + m  # (2)
        if self.momentum_form == "sum":
            return m, grad + mu * m  # (2)
        if self.bias_correction:
            return m, ema(grad * k.gradient, m * k.average, 1 - mu)  # (2')
        return m, ema(grad, m, 1 - mu)  # (2)

    def _ortho(self, n: Array, xp: Namespace) -> Array:
        if self.root == "svd":
            return roots.polar(n, xp=xp)  # (3)
        r, k = n.shape[-2:]
        columns = self.outputs == "columns" or self._axes is not None  # the matrix is the transpose of n
        return orthogonal.orthogonalized(  # (3)
            n, self._polynomials, self.normalization, self.normalization_factor, self.eps, self.eps_rule,
            flipped=r > k or (r == k and columns), compute_dtype=self.compute_dtype, xp=xp,
        )  # fmt: skip

    def _factor(self, r: int, k: int) -> Scalar:
        """Return c of (4)."""
        if self.scale == "max":
            return 1.0 if self.rms is None else self.rms * math.sqrt(max(r, k))
        ratio = r / max(k, 1)
        return math.sqrt(max(1, ratio) if self.scale == "jordan" else ratio)

    def stack_ndim(self, state: Any) -> int:
        return state.m.ndim - self._core

    def report(self, state: Any, finite: Array, xp: Namespace) -> MuonReport:
        """Return the singular values of the average."""
        inside = (..., *[None] * self._core)
        m = xp.where(finite[inside], state.m, 0.0)
        (values,) = attempt(lambda x: (xp.linalg.svdvals(x),), m, wider=True, xp=xp)
        values = xp.where(finite[inside[:-1]], values, math.nan)
        return MuonReport(singular_values=values, finite=finite_members(xp, values, core_ndims=(self._core - 1,)))


def _cuts(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and size of each block."""
    start = 0
    for size in sizes:
        yield start, size
        start += size


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_row(value: Any, kind: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) > 0 and all(map(kind, value))


def _check_coefficients(value: Any) -> None:
    def triple(row: Any) -> bool:
        return _is_row(row, lambda x: is_python_number(x) and math.isfinite(x)) and len(row) == 3

    if not (value in orthogonal.SETS if isinstance(value, str) else triple(value) or _is_row(value, triple)):
        raise ValueError(
            f"coefficients must be three finite numbers, a sequence of such triples, or one of "
            f"{', '.join(map(repr, orthogonal.SETS))}, got {value!r}"
        )


def _check_layout(value: Any) -> None:
    def axes(row: Any) -> bool:
        return _is_row(row, lambda axis: _is_count(axis, 0))

    if value in ("matrix", "flatten", "batch"):
        return
    pair = not isinstance(value, str) and _is_row(value, axes) and len(value) == 2
    if not pair or len({*value[0], *value[1]}) < len(value[0]) + len(value[1]):
        raise ValueError(
            f"layout must be 'matrix', 'flatten', 'batch', or a pair of tuples of different axes, such as "
            f"((0, 1, 2), (3,)), got {value!r}"
        )


def _check_blocks(value: Any) -> None:
    if not (value is None or _is_count(value, 1) or _is_row(value, lambda size: _is_count(size, 1))):
        raise ValueError(f"blocks must be a whole number >= 1, a tuple of them, or None, got {value!r}")


class Muon(_Orthogonalized):
    """Muon for matrices (Jordan et al., 2024): the polar factor of an averaged gradient, exact or by polynomials.

    Takes (..., m, n) with ``stack_ndim`` leading axes, with a ``layout`` also parameters of more axes. Presets have the
    names of the codes whose numbers they give. Errors: ValueError or TypeError for a field out of range, for fields
    that do not go together, and for ``layout`` or ``blocks`` that do not fit a shape.
    """

    dual_norm: bool = flag("multiply by <N, O>", default=False)

    paper: ClassVar[str] = "Jordan et al.: Muon, 2024"
    presets: ClassVar[tuple[str, ...]] = (
        "exact", "jordan", "torch", "moonlight", "optax", "pytorch_optimizer", "heavyball", "emerging", "dion",
    )  # fmt: skip

    def state_of(self, shape: tuple[int, ...]) -> MuonState:
        return MuonState(step=0, m=zeros(*self._stored(shape)))

    def step(self, grad: Array, state: MuonState, param: Array, now: Now) -> tuple[Array, MuonState]:
        xp = now.xp
        m, n = self._averaged(self._matrices(grad, now.stack, xp), state.m, now.k)  # (1), (2)
        n, made = self._turned(n, xp), []
        for piece in self._pieces(n, xp):
            o = self._ortho(piece, xp)  # (3)
            c = self._factor(*piece.shape[-2:])
            if self.dual_norm:
                c = c * xp.sum(piece * o, axis=(-2, -1), keepdims=True)
            made.append(o if is_python_number(c) and c == 1 else c * o)  # (4)
        direction = self._turned(self._joined(made, n.shape, xp), xp)
        return self._parameter(direction, grad.shape, now.stack, xp), MuonState(step=now.step, m=m)

    @staticmethod
    def exact(momentum: float = 0.95, nesterov: bool = True) -> Muon:
        """The definition: the polar factor itself, without a factor c."""
        return Muon(momentum=momentum, nesterov=nesterov, root="svd", rms=None)

    @staticmethod
    def jordan(momentum: float = 0.95, compute_dtype: str | None = "bfloat16") -> Muon:
        """The code KellerJordan/Muon."""
        return Muon(momentum=momentum, scale="jordan", eps=1e-7, compute_dtype=compute_dtype)

    @staticmethod
    def torch(
        momentum: float = 0.95, nesterov: bool = True, eps: float = 1e-7, coefficients: Any = "jordan",
        root_steps: int = 5, rms: float | None = None, compute_dtype: str | None = "bfloat16",
    ) -> Muon:  # fmt: skip
        """``torch.optim.Muon``; ``rms=0.2`` is its ``adjust_lr_fn="match_rms_adamw"``."""
        return Muon(
            momentum=momentum, nesterov=nesterov, eps=eps, eps_rule="max", coefficients=coefficients,
            root_steps=root_steps, **_jordan_or(rms), compute_dtype=compute_dtype,
        )  # fmt: skip

    @staticmethod
    def moonlight(
        momentum: float = 0.95, nesterov: bool = True, root_steps: int = 5, compute_dtype: str | None = "bfloat16"
    ) -> Muon:
        """MoonshotAI/Moonlight: a sum, and the root mean square of AdamW."""
        return Muon(
            momentum=momentum, momentum_form="sum", nesterov=nesterov, root_steps=root_steps, eps=1e-7,
            compute_dtype=compute_dtype,
        )  # fmt: skip

    @staticmethod
    def optax(
        momentum: float = 0.95, nesterov: bool = True, eps: float = 1e-8, root_steps: int = 5, rms: float | None = None,
        normalization: str = "frobenius", dual_norm: bool = False,
    ) -> Muon:  # fmt: skip
        """``optax.contrib.muon``; ``rms`` is its ``consistent_rms``, ``dual_norm`` its ``adaptive``."""
        return Muon(
            momentum=momentum, nesterov=nesterov, bias_correction=True, root_steps=root_steps, **_jordan_or(rms),
            eps=1e-8 if normalization in ("schatten4", "aol") else eps, normalization=normalization,
            dual_norm=dual_norm, outputs="columns",
        )  # fmt: skip

    @staticmethod
    def pytorch_optimizer(
        momentum: float = 0.95, nesterov: bool = True, root_steps: int = 5, rms: float | None = None,
        compute_dtype: str | None = "bfloat16",
    ) -> Muon:  # fmt: skip
        """``pytorch_optimizer.Muon`` 4.1; ``rms=0.2`` is its ``use_adjusted_lr=True``."""
        return Muon(
            momentum=momentum, nesterov=nesterov, root_steps=root_steps, eps=1e-7, eps_rule="max", **_jordan_or(rms),
            layout="flatten", compute_dtype=compute_dtype,
        )  # fmt: skip

    @staticmethod
    def heavyball(momentum: float = 0.9, heavyball_momentum: bool = False) -> Muon:
        """``heavyball.Muon``: gradient plus average; with ``heavyball_momentum``, Nesterov's form of a sum."""
        form: dict[str, Any] = {"momentum_form": "sum"} if heavyball_momentum else {"nesterov_form": "added"}
        return Muon(
            momentum=momentum, **form, coefficients="quintic5", eps=1e-7, eps_rule="max", scale="jordan",
            layout="flatten",
        )  # fmt: skip

    @staticmethod
    def emerging(
        momentum: float = 0.95, nesterov: bool = False, coefficients: Any = "quintic5", root_steps: int = 5,
        rms: float | None = 1.0,
    ) -> Muon:  # fmt: skip
        """NVIDIA's Emerging-Optimizers: plain momentum, sqrt(max(m, n)); the triples follow in turn."""
        return Muon(
            momentum=momentum, nesterov=nesterov, coefficients=coefficients, after_last="cycle", root_steps=root_steps,
            eps=1e-15, eps_rule="max", rms=rms,
        )  # fmt: skip

    @staticmethod
    def dion(momentum: float = 0.95, nesterov: bool = False, eps: float = 1e-8,
             compute_dtype: str | None = "bfloat16") -> Muon:  # fmt: skip
        """microsoft/dion: a sum, Polar Express with a factor of 1.02, and sqrt(m / n) without a floor."""
        return Muon(
            momentum=momentum, momentum_form="sum", nesterov=nesterov, coefficients="dion", normalization_factor=1.02,
            eps=eps, scale="ratio", compute_dtype=compute_dtype,
        )  # fmt: skip


def _jordan_or(rms: float | None) -> dict[str, Any]:
    """Return the fields of Jordan's factor, or of the factor for a root mean square."""
    return {"scale": "jordan"} if rms is None else {"rms": rms}


class NorMuonState(NamedTuple):
    """State of `NorMuon` for a parameter (..., m, n)."""

    step: Any
    """t, number of updates done."""
    m: Array
    """B_t, (..., m, n)."""
    v: Array
    """v_t, (..., m), with "short" (..., max(m, n)); with ``blocks=h`` the blocks have an axis before the last."""


class _Rescaled(_Orthogonalized):
    """Base of `NorMuon` and `AdaMuon`: (6) and (7)."""

    beta2: float = real("beta_2, decay of v", default=0.95, ge=0, lt=1)
    eps2: float = real("added to sqrt(v) and to the norm of U", default=1e-10, ge=0)
    rescale: str = choice(
        "'norm' (that of O), 'rms' (rms sqrt(m n)) or 'none'", default="norm", of=("norm", "rms", "none")
    )

    @property
    def idle(self) -> frozenset[str]:
        return super().idle - {"rms"} | {"scale"} if self.rescale == "rms" else super().idle

    def rules(self) -> None:
        self._check_fields()
        if self.rescale == "rms" and self.rms is None:
            raise ValueError("rescale='rms' needs rms, got rms=None")

    def _at_least(self, x: Array, xp: Namespace) -> Array:
        """Return ``x`` as a denominator that is not small."""
        return x + self.eps2

    def _rescaled(self, o: Array, denominator: Array, xp: Namespace) -> Array:
        """Return (7) of a block (..., r, k)."""
        u = quotient(o, denominator, xp, bound=self.eps2)  # (6)
        r, k = o.shape[-2:]
        if self.rescale == "none":
            return self._factor(r, k) * u  # (7)
        norm, size = (xp.sqrt(xp.sum(x * x, axis=(-2, -1), keepdims=True)) for x in (u, o))
        rms: Any = self.rms
        target = self._factor(r, k) * size if self.rescale == "norm" else rms * math.sqrt(r * k)
        return target * quotient(u, self._at_least(norm, xp), xp, bound=self.eps2)  # (7)


class NorMuon(_Rescaled):
    """NorMuon for matrices (Li et al., arXiv 2510.05491): Muon whose rows are brought to equal size; the authors' code.

    ``beta2`` is a decay. Takes what `Muon` takes. Errors: as for `Muon`, and ValueError for ``rescale="rms"`` without
    ``rms``.
    """

    eps: float = 1e-7
    scale: str = "jordan"
    statistic: str = choice(
        "'row' (a number for each output) or 'short' (for each of the longer side)", default="row", of=("row", "short")
    )
    eps2_rule: str = choice(
        "'add', or 'max': max(v, eps2) under the root, max(norm, eps2)", default="add", of=("add", "max")
    )

    paper: ClassVar[str] = "Li et al.: NorMuon, 2025, arXiv 2510.05491"
    presets: ClassVar[tuple[str, ...]] = ("article", "pytorch_optimizer", "emerging", "dion")

    def _length(self, r: int, k: int) -> int:
        return max(r, k) if self.statistic == "short" else r

    def _at_least(self, x: Array, xp: Namespace) -> Array:
        if self.eps2_rule == "add":
            return super()._at_least(x, xp)
        return clamp(x, self.eps2, xp=xp) if is_python_number(self.eps2) else xp.maximum(x, self.eps2)

    def state_of(self, shape: tuple[int, ...]) -> NorMuonState:
        stored = self._stored(shape)
        r, k = stored[-2:] if self.outputs == "rows" else stored[:-3:-1]
        if isinstance(self.blocks, int):
            length: tuple[int, ...] = (self.blocks, self._length(r // self.blocks, k))
        else:
            length = (sum(self._length(size, k) for size in self.blocks or (r,)),)
        return NorMuonState(step=0, m=zeros(*stored), v=zeros(*stored[:-2], *length))

    def step(self, grad: Array, state: NorMuonState, param: Array, now: Now) -> tuple[Array, NorMuonState]:
        xp = now.xp
        m, n = self._averaged(self._matrices(grad, now.stack, xp), state.m, now.k)  # (1), (2)
        n, made, moments, start = self._turned(n, xp), [], [], 0
        for piece in self._pieces(n, xp):
            o = self._ortho(piece, xp)  # (3)
            r, k = o.shape[-2:]
            rows = self.statistic == "row" or r >= k
            old = state.v[..., start : start + self._length(r, k)]
            v = ema(old, xp.sum(o * o, axis=-1 if rows else -2) / max(k if rows else r, 1), self.beta2)  # (5)
            root = xp.sqrt(self._at_least(v, xp)) if self.eps2_rule == "max" else self._at_least(xp.sqrt(v), xp)
            made.append(self._rescaled(o, root[..., None] if rows else root[..., None, :], xp))  # (6), (7)
            moments.append(v)
            start += self._length(r, k)
        direction = self._turned(self._joined(made, n.shape, xp), xp)
        v = moments[0] if len(moments) == 1 else xp.concat(moments, axis=-1)
        return self._parameter(direction, grad.shape, now.stack, xp), NorMuonState(step=now.step, m=m, v=v)

    @staticmethod
    def article(momentum: float = 0.95, beta2: float = 0.95, rms: float = 0.2) -> NorMuon:
        """The form of the paper by secondary sources: plain momentum, and the root mean square ``rms``."""
        return NorMuon(momentum=momentum, beta2=beta2, nesterov=False, rms=rms, rescale="rms")

    @staticmethod
    def pytorch_optimizer(
        momentum: float = 0.95, beta2: float = 0.95, nesterov: bool = True, root_steps: int = 5,
        compute_dtype: str | None = "bfloat16",
    ) -> NorMuon:  # fmt: skip
        """``pytorch_optimizer.NorMuon`` 4.1."""
        return NorMuon(
            momentum=momentum, beta2=beta2, nesterov=nesterov, root_steps=root_steps, eps_rule="max",
            compute_dtype=compute_dtype,
        )  # fmt: skip

    @staticmethod
    def emerging(momentum: float = 0.95, beta2: float = 0.95, nesterov: bool = False) -> NorMuon:
        """NVIDIA's Emerging-Optimizers: the statistic of the longer side."""
        return NorMuon(
            momentum=momentum, beta2=beta2, nesterov=nesterov, statistic="short", coefficients="quintic5",
            after_last="cycle", eps=1e-15, eps_rule="max", eps2=1e-8, eps2_rule="max", scale="max", rms=1.0,
        )  # fmt: skip

    @staticmethod
    def dion(momentum: float = 0.95, beta2: float = 0.95, compute_dtype: str | None = "bfloat16") -> NorMuon:
        """The code microsoft/dion."""
        return NorMuon(
            momentum=momentum, beta2=beta2, momentum_form="sum", nesterov=False, coefficients="dion",
            normalization_factor=1.02, eps=1e-8, eps2=1e-8, scale="ratio", compute_dtype=compute_dtype,
        )  # fmt: skip


class AdaMuonState(NamedTuple):
    """State of `AdaMuon` for a parameter (..., m, n)."""

    step: Any
    """t, number of updates done."""
    m: Array
    """B_t, (..., m, n)."""
    v: Array
    """V_t, the shape of B_t."""


class AdaMuon(_Rescaled):
    """AdaMuon for matrices (Si et al., arXiv 2507.11005): Muon of the sign, then a second moment; the authors' code.

    ``beta2`` is a decay, in the authors' code that of the momentum. Takes what `Muon` takes. Errors: as for `NorMuon`.
    """

    eps: float = 1e-7
    eps2: float = 1e-8
    rescale: str = "rms"
    sign: bool = flag("orthogonalise sign(N)", default=True)
    v_bias_correction: bool = flag("divide v by 1 - beta2^t", default=False)

    paper: ClassVar[str] = "Si et al.: AdaMuon, 2025, arXiv 2507.11005"
    presets: ClassVar[tuple[str, ...]] = ("pytorch_optimizer", "emerging")

    def scalars(self, step: Any, *, like: Array = None) -> MuonScalars:
        k = super().scalars(step, like=like)
        if not self.v_bias_correction:
            return k
        return k._replace(second=reciprocal(sqrt(one_minus_power(self.beta2, step, like=like))))

    def state_of(self, shape: tuple[int, ...]) -> AdaMuonState:
        stored = self._stored(shape)
        return AdaMuonState(step=0, m=zeros(*stored), v=zeros(*stored))

    def step(self, grad: Array, state: AdaMuonState, param: Array, now: Now) -> tuple[Array, AdaMuonState]:
        xp = now.xp
        m, n = self._averaged(self._matrices(grad, now.stack, xp), state.m, now.k)  # (1), (2)
        n = self._turned(xp.sign(n) + 0.0 * n if self.sign else n, xp)  # what is not finite has no sign
        o = self._joined([self._ortho(piece, xp) for piece in self._pieces(n, xp)], n.shape, xp)  # (3)
        v = ema(state.v, self._turned(o * o, xp), self.beta2)  # (5)
        root = self._turned(xp.sqrt(v) * now.k.second if self.v_bias_correction else xp.sqrt(v), xp)
        pieces = zip(self._pieces(o, xp), self._pieces(root, xp), strict=True)
        made = [self._rescaled(o, self._at_least(root, xp), xp) for o, root in pieces]  # (6), (7)
        direction = self._turned(self._joined(made, n.shape, xp), xp)
        return self._parameter(direction, grad.shape, now.stack, xp), AdaMuonState(step=now.step, m=m, v=v)

    @staticmethod
    def pytorch_optimizer(
        momentum: float = 0.9, beta2: float = 0.95, nesterov: bool = False, root_steps: int = 5,
        compute_dtype: str | None = "bfloat16",
    ) -> AdaMuon:  # fmt: skip
        """``pytorch_optimizer.AdaMuon`` 4.1."""
        return AdaMuon(
            momentum=momentum, beta2=beta2, nesterov=nesterov, root_steps=root_steps, eps_rule="max", eps2=1e-10,
            sign=False, v_bias_correction=True, compute_dtype=compute_dtype,
        )  # fmt: skip

    @staticmethod
    def emerging(momentum: float = 0.95, beta2: float = 0.95, nesterov: bool = False) -> AdaMuon:
        """NVIDIA's Emerging-Optimizers: no sign, and no root mean square."""
        return AdaMuon(
            momentum=momentum, beta2=beta2, nesterov=nesterov, coefficients="quintic5", after_last="cycle", eps=1e-15,
            eps_rule="max", sign=False, rescale="none", rms=1.0,
        )  # fmt: skip
