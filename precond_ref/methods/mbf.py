r"""MBF: a mini-block Fisher method for deep neural networks.

A. Bahamou, D. Goldfarb, Y. Ren, AISTATS 2023 (PMLR 206), arXiv 2202.04124v4. The abstract was read and the authors'
code (``achrafba96/mbf`` at commit b0ace6e), which the equations below follow. The paper's full text was not read.

==========  ====================  =================  ==============================================================
symbol      here                  shape              meaning
==========  ====================  =================  ==============================================================
g           ``grad``              as the parameter   gradient of the mini-batch mean of the loss, true labels
g_b         ``to_blocks(grad)``   (s,) each          its mini-blocks, b = 1, ..., B
M           ``m``                 as the parameter   heavy-ball momentum
F_b         ``statistic``         (s, s) each        average of g_b g_b^T
P_b         ``inverse``           (s, s) each        (F_b + lambda I)^{-1} of the last renewal
mu          ``momentum``                             decay of M
rho         ``decay``                                decay of F, the weight of the *old* term
lambda      ``damping``                              added to F
T1          ``statistics_every``                     updates between two statistics
T2          ``inverse_every``                        updates between two inverses, once i > T2
==========  ====================  =================  ==============================================================

For updates i = 0, 1, 2, ... from M = 0, F_b = 0 (or a warm start)::

    M   <- mu M + g                                                                           (M)
    F_b <- rho F_b + (1 - rho) g_b g_b^T               if i % T1 == 0                         (F)
    P_b <- (F_b + lambda I)^{-1}                       if (i <= T2 and i % T1 == 0) or i % T2 == 0    (P)
    direction_b = P_b M_b                                                                     (p)

Averaged (``fc`` only): one F for all blocks, the mean of g_b g_b^T over b, and so one P.

The mini-blocks of each ``kind``, with O outputs, I inputs, and J = I + 1 where the bias is the last column:

============  =================  ====================================================================================
kind          parameter          mini-blocks
============  =================  ====================================================================================
``conv``      (O, I, kh, kw)     one per pair (o, i): the kh kw taps, row-major; never averaged
``fc``        (O, J)             ``per_output``: O rows of J; ``per_input``: J columns of O; ``contiguous``: J runs of O
                                 consecutive entries of the row-major matrix (what the authors ran, averaged)
``diagonal``  any                none: the rule below, for biases of convolutions and normalisation layers
============  =================  ====================================================================================

``diagonal``, with n = v = 0 before the first update and t = i + 1::

    n <- 0.9 n + 0.1 g                                                                        (n)
    v <- 0.999 v + 0.001 n^2                                                                  (v)
    direction = n / (1e-8 + sqrt(v / (1 - 0.999^t)))                                          (d)

Conventions
    F is made of the batch-mean gradient (rank one per update) and is not multiplied by the batch size, so lambda and
    the learning rate do not transfer between batch sizes. ``update(..., statistic=)`` replaces this gradient by
    per-sample gradients (`MBFSamples`), by inputs and back-signals of a linear layer (`MBFFactors`), or replaces
    g_b g_b^T itself (`MBFBlocks`).
    F has no bias correction, lambda is not scaled, and the momentum is before the inverse: the current P multiplies all
    of M.
    A kept P comes from the symmetric eigendecomposition, eigenvalues clipped at 0 (the authors' code: LU inverse), so
    that 0 < P <= I / lambda also under rounding; ``damping=0`` is the pseudo-inverse. With T2 = 1 no P is kept: P_b M_b
    is an LU solution, or made from such a P if rounding may hide lambda beside F_b.
    The default is ``per_output``, averaged, with T1 = T2 = 1; `MBF.authors_code` is ``contiguous`` with the authors'
    T1 and T2.
    Weight decay is decoupled, of every parameter, and belongs to the optimizer.

Coincides with (each a test)
    lambda -> infinity: heavy-ball SGD at rate lr / lambda. Averaged ``per_output`` and ``per_input``: Shampoo's right
    and left statistic over O and J, one-sided, with exponent -1. One block per layer: the layer's natural gradient.
    Blocks of one entry: g / (lambda + mean of g^2), without a root. O = J: ``contiguous`` is ``per_output``.

Not here
    The limited-memory variant, and blocks that do not divide a layer as above.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

from array_api_compat import array_namespace

from precond_ref.fields import choice, flag, integer, real
from precond_ref.numerics import roots
from precond_ref.numerics.arrays import whole
from precond_ref.numerics.ema import ema, one_minus_power, reciprocal, sqrt
from precond_ref.numerics.refresh import renew
from precond_ref.numerics.roots import Root
from precond_ref.numerics.template import zeros
from precond_ref.protocol import Method, Now
from precond_ref.typing import Array, Namespace, Scalar

LAYOUTS = ("per_output", "per_input", "contiguous")
NDIMS = {"fc": (2, 2), "conv": (4, 4), "diagonal": (0, 64)}
# Constants of the diagonal rule in the authors' code.
DIAGONAL_DECAY, DIAGONAL_SQUARE_DECAY, DIAGONAL_EPS = 0.9, 0.999, 1e-8


class MBFState(NamedTuple):
    """State of `MBF` for a parameter (..., O, J), (..., O, I, kh, kw), or, ``diagonal``, of any shape."""

    step: Any
    """i, number of updates done."""
    m: Array
    """M, shaped like the parameter; ``diagonal``: n."""
    statistic: Array
    """F: (..., s, s) averaged, (..., B, s, s) not averaged, (..., O, I, s, s) ``conv``; ``diagonal``: v."""
    inverse: Root | None
    """P of the last renewal, not formed, shaped like F and (..., s); I / lambda before the first renewal. None with
    ``inverse_every=1``."""


class MBFScalars(NamedTuple):
    """Values of `MBF.scalars` for the diagonal rule, which depend on the update's number alone."""

    inverse_sqrt_c: Scalar
    """1 / sqrt(1 - 0.999^t)."""


class MBFSamples(NamedTuple):
    """Per-sample gradients, for ``update(..., statistic=)``: the statistic is the mean over n of g_nb g_nb^T."""

    grads: Array
    """(..., n, O, J) or (..., n, O, I, kh, kw): stack axes, then samples, then the parameter's."""


class MBFFactors(NamedTuple):
    """Inputs and back-signals of a linear layer (``fc``), whose per-sample gradients are signals_n inputs_n^T."""

    inputs: Array
    """(..., n, J), the constant 1 of the bias included."""
    signals: Array
    """(..., n, O), d loss_n / d output of each sample's own loss, without the 1/n of the mean."""


class MBFBlocks(NamedTuple):
    """A ready-made statistic, which replaces g_b g_b^T in (F)."""

    statistic: Array
    """Shaped like ``state.statistic``, symmetric positive semidefinite."""


class MBFReport(NamedTuple):
    """The report of `MBF.diagnose`."""

    eigenvalues: Array | None
    """Eigenvalues of F, ascending, clipped at zero, (..., s), (..., B, s) or (..., O, I, s); None for ``diagonal``."""
    condition: Array | None
    """Condition number of F + lambda I, one per block, NaN if F is not finite; None for ``diagonal``."""
    denominator: Array | None
    """``diagonal``: 1e-8 + sqrt(v / (1 - 0.999^t)), else None."""
    finite: Array
    """True if the member's state is finite and F could be decomposed, (...); ``diagonal``: if the state is, 0-D."""
    accuracy: Array | None
    """Relative error of a direction that F allows, one per block, see `precond_ref.numerics.roots.accuracy`. If P_b M_b
    is an LU solution, it is 16 roundings times ``condition``. None for ``diagonal``."""


class MBF(Method):
    """MBF (Bahamou, Goldfarb, Ren, 2023, arXiv 2202.04124v4, as in the authors' code) for one layer.

    ``decay`` and ``momentum`` are decays (weights of the *old* term). ``fc`` takes (..., O, J), ``conv``
    (..., O, I, kh, kw) and uses neither ``layout`` nor ``average``, ``diagonal`` any shape and uses ``kind`` alone.
    ``refresh=`` of ``update`` is a pair of bools (statistics, inverse); one bool stands for both.
    Errors: ValueError or TypeError for a field out of range, and for arrays that do not fit together.
    """

    kind: str = choice("'fc' (O, J), 'conv' (O, I, kh, kw) or 'diagonal' (any shape)", default="fc", of=tuple(NDIMS))
    layout: str = choice("of 'fc': 'per_output', 'per_input' or 'contiguous'", default="per_output", of=LAYOUTS)
    average: bool = flag("'fc': one F, the mean over the blocks, instead of one per block", default=True)
    damping: float = real("lambda, added to F (0: pseudo-inverse)", default=3e-4, ge=0)
    decay: float = real("rho, decay of F", default=0.9, ge=0, lt=1)
    momentum: float = real("mu, heavy ball", default=0.9, ge=0, lt=1)
    statistics_every: int = integer("T1, updates between two statistics", default=1, ge=1)
    inverse_every: int = integer("T2, updates between two inverses (every T1 up to update T2)", default=1, ge=1)

    paper: ClassVar[str] = "Bahamou, Goldfarb, Ren: Mini-Block Fisher, AISTATS 2023, arXiv 2202.04124v4"
    joins_bias: ClassVar[bool] = True
    refreshes: ClassVar[bool] = True
    takes_statistic: ClassVar[bool] = True

    @property
    def factorizes(self) -> bool:
        return self.kind != "diagonal"

    presets: ClassVar[tuple[str, ...]] = ("authors_code",)
    Samples: ClassVar[Any] = MBFSamples
    Factors: ClassVar[Any] = MBFFactors
    Blocks: ClassVar[Any] = MBFBlocks

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ndims", NDIMS[self.kind])
        object.__setattr__(self, "elementwise", self.kind == "diagonal")

    @staticmethod
    def authors_code(network: str = "autoencoder") -> MBF:
        """The authors' settings: ``contiguous``, averaged, T1, T2 = 2, 25 ("autoencoder") or 10, 100 ("cnn").

        ``damping`` is that of their MNIST autoencoder (with lr 1e-5), or of their VGG16 on CIFAR-100 (lr 3e-5).
        ValueError for another ``network``.
        """
        if network not in ("autoencoder", "cnn"):
            raise ValueError(f"network must be 'autoencoder' or 'cnn', got {network!r}")
        damping, t1, t2 = (3e-4, 2, 25) if network == "autoencoder" else (3e-3, 10, 100)
        return MBF(layout="contiguous", damping=damping, statistics_every=t1, inverse_every=t2)

    def for_shape(self, shape: tuple[int, ...], path: str = "") -> MBF:
        """Return the method with the ``kind`` for ``shape``: ``conv`` for 4 axes, ``fc`` for 2, else ``diagonal``.

        A method of kind ``diagonal`` keeps this kind for every shape.
        """
        if self.kind == "diagonal":
            return self
        return self.replace(kind={4: "conv", 2: "fc"}.get(len(shape), "diagonal"))

    # ---- mini-blocks ------------------------------------------------------------------------------------------------

    def to_blocks(self, array: Array, *, xp: Namespace) -> Array:
        """Return the mini-blocks of parameters, (..., O, J) -> (..., B, s) or (..., O, I, kh, kw) -> (..., O, I, s)."""
        *lead, d1, d2 = array.shape
        if self.kind == "conv":
            return xp.reshape(array, (*lead, d1 * d2))
        if self.layout == "contiguous":
            return xp.reshape(array, (*lead, d2, d1))
        return array if self.layout == "per_output" else xp.matrix_transpose(array)

    def from_blocks(self, blocks: Array, shape: tuple[int, ...], *, xp: Namespace) -> Array:
        """Return parameters of ``shape`` from mini-blocks, the inverse of `to_blocks`."""
        if self.kind == "fc" and self.layout == "per_input":
            return xp.matrix_transpose(blocks)
        return xp.reshape(blocks, shape)

    @property
    def _averaged(self) -> bool:
        return self.kind == "fc" and self.average

    def _statistic_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.kind == "diagonal":
            return tuple(shape)
        core = self.ndims[0]
        stack, (o, i, *taps) = shape[:-core], shape[-core:]
        if self.kind == "conv":
            return (*stack, o, i, math.prod(taps), math.prod(taps))
        count, s = (o, i) if self.layout == "per_output" else (i, o)
        return (*stack, s, s) if self.average else (*stack, count, s, s)

    def _mean_outer(self, grads: Array, xp: Namespace) -> Array:
        """Return the mean of g_nb g_nb^T over samples (and blocks, if averaged) of ``grads`` (..., n, *parameter)."""
        blocks = self.to_blocks(grads, xp=xp)
        if self._averaged:
            *lead, n, count, s = blocks.shape
            rows = xp.reshape(blocks, (*lead, n * count, s))
        else:
            rows = xp.moveaxis(blocks, -2 - self.ndims[0] // 2, -2)  # samples beside the entries of a block
        if rows.shape[-2] == 1:
            return xp.matrix_transpose(rows) * rows
        return xp.matrix_transpose(rows) @ rows / max(rows.shape[-2], 1)

    def _mean_outer_of_factors(self, inputs: Array, signals: Array, xp: Namespace) -> Array:
        """Return `_mean_outer` of signals_n inputs_n^T; averaged by rows or columns, this product is not formed."""
        if not self.average or self.layout == "contiguous":
            return self._mean_outer(signals[..., :, None] * inputs[..., None, :], xp)
        kept, other = (inputs, signals) if self.layout == "per_output" else (signals, inputs)
        weight = xp.sum(other * other, axis=-1, keepdims=True)
        count = max(other.shape[-2] * other.shape[-1], 1)
        return xp.matrix_transpose(kept) @ (weight * kept) / count

    def blocks(self, statistic: MBFSamples | MBFFactors | MBFBlocks, *, xp: Namespace = None) -> MBFBlocks:
        """Return the ready-made ``statistic``, which replaces g_b g_b^T in (F); for ``fc`` and ``conv``.

        ValueError or TypeError for arrays that do not fit together.
        """
        if isinstance(statistic, MBFBlocks):
            return statistic
        xp = xp or array_namespace(*statistic)
        if isinstance(statistic, MBFFactors):
            return MBFBlocks(self._mean_outer_of_factors(*statistic, xp))
        return MBFBlocks(self._mean_outer(statistic.grads, xp))

    # ---- the method -------------------------------------------------------------------------------------------------

    def state_of(self, shape: tuple[int, ...]) -> MBFState:
        side = self._statistic_shape(shape)
        kept = self.kind != "diagonal" and self.inverse_every > 1
        inverse = roots.identity_root(*side, scale=reciprocal(self.damping)) if kept else None
        return MBFState(step=0, m=zeros(*shape), statistic=zeros(*side), inverse=inverse)

    def warm_start(self, state: MBFState, grads: Array) -> MBFState:
        """Return ``state`` of ``init`` with F = mean of g_b g_b^T over ``grads``, shaped ``(batches, *parameter)``.

        The authors compute these gradients at the initial parameters, in one pass through the training set, with labels
        drawn from the model's own predictions. A state of kind ``diagonal`` does not change. ValueError or TypeError
        for a state after an update, and for arrays that do not fit.
        """
        self._check_state_type(state)
        if isinstance(state.step, int) and state.step > 0:
            raise ValueError(f"warm_start must come before the first update, got a state after {state.step}")
        _check_array("grads", grads, (None, *state.m.shape), state.m)
        xp = array_namespace(grads)
        if self.kind == "diagonal":
            return state
        return state._replace(statistic=self._mean_outer(xp.moveaxis(grads, 0, -1 - self.ndims[0]), xp))

    def due(self, step: Any) -> tuple[Any, Any]:
        """Return whether the update after ``step`` completed updates renews (statistics, inverse)."""
        statistics, t2 = step % self.statistics_every == 0, self.inverse_every
        return statistics, ((step <= t2) & statistics) | (step % t2 == 0)

    @property
    def periods(self) -> tuple[int, int]:
        return self.statistics_every, self.inverse_every

    def scalars(self, step: Any, *, like: Array = None) -> Any:
        if self.kind != "diagonal":
            return ()
        return MBFScalars(reciprocal(sqrt(one_minus_power(DIAGONAL_SQUARE_DECAY, step, like=like))))

    def step(self, grad: Array, state: MBFState, param: Array, now: Now) -> tuple[Array, MBFState]:
        """Make (M) to (p), or (n) to (d); ``statistic`` replaces g_b g_b^T in (F) when (F) is due."""
        xp, k, statistic, (statistics_due, inverse_due) = now.xp, now.k, now.statistic, now.due
        if self.kind == "diagonal":
            n = ema(state.m, grad, DIAGONAL_DECAY)  # (n)
            v = ema(state.statistic, n * n, DIAGONAL_SQUARE_DECAY)  # (v)
            direction = n / (xp.sqrt(v) * k.inverse_sqrt_c + DIAGONAL_EPS)  # (d)
            return direction, MBFState(step=now.step, m=n, statistic=v, inverse=None)

        def new_statistic() -> Array:
            if statistic is None:
                return self._mean_outer(xp.expand_dims(grad, axis=-1 - self.ndims[0]), xp)
            return self.blocks(statistic, xp=xp).statistic

        m = self.momentum * state.m + grad  # (M)
        f = renew(statistics_due, lambda: ema(state.statistic, new_statistic(), self.decay), state.statistic)  # (F)
        blocks = self.to_blocks(m, xp=xp)
        columns = xp.matrix_transpose(blocks) if self._averaged else blocks[..., None]
        law = roots.Law(-1.0, self.damping)
        own = (1 - self.decay) * (1 - self.momentum) ** 2 / max(columns.shape[-1], 1)  # F >= own M M^T if g stays
        if statistic is not None:
            own = 0.0  # F is without g
        elif self.statistics_every > 1 or self.inverse_every > 1:
            own = own * (statistics_due & inverse_due)  # otherwise F or P is without g
        if state.inverse is None:
            inverse, columns = None, roots.solve(f, columns, self.damping, own, xp=xp)  # (P), (p)
        else:
            known = roots.renewed(inverse_due, f, law, state.inverse, xp=xp)  # (P)
            inverse, columns = known[0], roots.apply(columns, {0: known}, law, own, xp=xp)  # (p)
        blocks = xp.matrix_transpose(columns) if self._averaged else columns[..., 0]
        direction = self.from_blocks(blocks, grad.shape, xp=xp)
        fresh = self.statistics_every == self.inverse_every == 1 and statistic is None
        if not (self._averaged and fresh):  # otherwise a non-finite gradient has made all of P NaN
            direction = whole(direction, self.ndims[0], xp)
        return direction, MBFState(step=now.step, m=m, statistic=f, inverse=inverse)

    def overruled(self, refresh: Any) -> tuple[bool, bool]:
        pair = (refresh, refresh) if isinstance(refresh, bool) else refresh
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(r, bool) for r in pair)):
            raise TypeError(f"refresh must be a pair of bools (statistics, inverse), a bool or None, got {refresh!r}")
        if self.kind != "diagonal" and self.inverse_every == 1 and not pair[1]:
            raise ValueError("refresh without the inverse needs inverse_every > 1: with 1, none is kept")
        return pair

    def check_statistic(self, statistic: Any, param: Array) -> None:
        if not isinstance(statistic, (MBFSamples, MBFFactors, MBFBlocks)):
            got = type(statistic).__name__
            raise TypeError(f"statistic must be an MBF.Samples, MBF.Factors or MBF.Blocks, got {got}")
        if self.kind == "diagonal":
            raise ValueError("statistic must be None for kind='diagonal', which has no blocks")
        if isinstance(statistic, MBFBlocks):
            _check_array("statistic", statistic.statistic, self._statistic_shape(param.shape), param)
            return
        core = self.ndims[0]
        stack, shape = param.shape[:-core], param.shape[-core:]
        if isinstance(statistic, MBFSamples):
            _check_array("statistic.grads", statistic.grads, (*stack, None, *shape), param)
            return
        if self.kind != "fc":
            raise ValueError(f"statistic of inputs and signals needs kind='fc', got kind={self.kind!r}")
        _check_array("statistic.inputs", statistic.inputs, (*stack, None, shape[1]), param)
        _check_array("statistic.signals", statistic.signals, (*stack, statistic.inputs.shape[-2], shape[0]), param)

    def report(self, state: MBFState, finite: Array, xp: Namespace) -> MBFReport:
        """Return the spectrum of F and the condition number of F + lambda I; ``diagonal``: the denominator."""
        if self.kind == "diagonal":
            k = self.scalars(state.step, like=state.m)
            denominator = xp.sqrt(state.statistic) * k.inverse_sqrt_c + DIAGONAL_EPS
            return MBFReport(None, None, denominator, finite, None)
        (w,), finite, (accuracy,) = roots.report((state.statistic,), finite, [roots.Law(-1.0, self.damping)], xp)
        if w.shape[-1] == 0:  # blocks without entries
            condition = xp.sum(w, axis=-1) + 1.0
        else:
            condition = (w[..., -1] + self.damping) / (w[..., 0] + self.damping)
        if state.inverse is None:
            by_lu = roots.by_lu(state.statistic, self.damping, xp)[..., 0, 0]
            accuracy = xp.where(by_lu, 8 * xp.finfo(w.dtype).eps * condition, accuracy)
        return MBFReport(w, condition, None, finite, accuracy)


def _check_array(name: str, array: Array, shape: tuple[int | None, ...], like: Array) -> None:
    """Raise an error for an array without ``shape`` (None: any length of at least 1) or the dtype of ``like``."""
    if not hasattr(array, "shape"):
        raise TypeError(f"{name} must be an array, got {type(array).__name__}")
    got = tuple(array.shape)
    if len(got) != len(shape) or any(g != s if s is not None else g < 1 for g, s in zip(got, shape, strict=True)):
        rule = ", ".join("n >= 1" if s is None else str(s) for s in shape)
        raise ValueError(f"{name} must have shape ({rule}), got {got}")
    if array.dtype != like.dtype:
        raise TypeError(f"{name} must have dtype {like.dtype}, got {array.dtype}")
