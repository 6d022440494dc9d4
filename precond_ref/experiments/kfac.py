r"""KFAC, a yardstick of the experiments: the Fisher matrix of a layer as a Kronecker product.

J. Martens, R. Grosse, ICML 2015, arXiv 1503.05671; convolutions: R. Grosse, J. Martens, ICML 2016, arXiv 1602.01407.

==========  ====================  ==================  =================================================================
symbol      here                  shape               meaning
==========  ====================  ==================  =================================================================
G           ``grad``              (O, J)              gradient of the mean loss of the batch, true labels
a_nt        ``inputs``            (n, T, J)           input of sample n at position t (T = 1: fully connected)
d_nt        ``signals``           (n, T, O)           d loss_n / d output, of the sample's own loss, labels drawn
A, S        ``inner``, ``outer``  (J, J), (O, O)      averages of a a^T and of sum_t d d^T
U, a; V, s  ``roots``             (J, J), (J,); ...   eigenvectors and eigenvalues of A and of S at the last renewal
M           ``m``                 as the parameter    heavy-ball momentum
rho         ``decay``                                 decay of the averages, the weight of the *old* term
mu          ``momentum``                              decay of M
lambda      ``damping``                               added to the Fisher matrix
T1, T2      ``statistics_every``                      updates between two statistics, ``inverse_every``: two renewals
==========  ====================  ==================  =================================================================

For updates i = 0, 1, 2, ..., and w_k = (1 - rho) / (1 - rho^k), which makes an average of the first k statistics::

    A <- A + w_k (mean_nt a a^T - A);  S <- S + w_k (mean_n sum_t d d^T - S)     if i % T1 == 0, k = i / T1 + 1   (1)
    A = U diag(a) U^T;  S = V diag(s) V^T       if (i <= T2 and i % T1 == 0) or i % T2 == 0                       (2)
    pi = sqrt((tr A / J) / (tr S / O)), or 1                                                                      (3)
    D_oj = (s_o + sqrt(lambda) / pi) (a_j + pi sqrt(lambda)), or s_o a_j + lambda                                 (4)
    M <- mu M + G                                                                                                 (5)
    direction = V ((V^T M U) / D) U^T                                                                             (6)

A parameter (O, ...) is read as (O, J): a weight joined with its bias, a kernel, or the bias (J = 1) of a convolution,
which is a layer of its own with the input 1. The default is the factored damping of the paper; ``kind="equal"`` with
rho = 0.9 is the baseline in the code of MBF's authors, from which lambda, T1, T2 and the schedule of (2) are. Not here:
rules that adapt lambda or the length of the step.

This is no method of `precond_ref.methods`: these all step from a gradient alone, which each command, adapter and test
gives them. KFAC has no such step. Its signals are of labels drawn from the model, from a second backward pass that only
the problem can make, as `factors` does for those of `precond_ref.problems`.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from precond_ref.experiments.numbers import np
from precond_ref.fields import choice, integer, real
from precond_ref.numerics.ema import one_minus_power
from precond_ref.numerics.template import zeros
from precond_ref.problems.cnn import ConvClassifier
from precond_ref.problems.losses import sigmoid
from precond_ref.problems.mlp import Autoencoder, Network
from precond_ref.protocol import Method, Now
from precond_ref.typing import Array, Namespace, Scalar


class KFACState(NamedTuple):
    """State of `KFAC` for a parameter (..., O, ...), read as (..., O, J)."""

    step: Any
    m: Array
    inner: Array
    """A, (..., J, J)."""
    outer: Array
    """S, (..., O, O)."""
    roots: tuple[Array, Array, Array, Array]
    """a (..., J), U (..., J, J), s (..., O), V (..., O, O)."""


class KFACFactors(NamedTuple):
    """Inputs and signals of a layer, for ``update(..., statistic=)``."""

    inputs: Array
    """(..., n, T, J), the constant 1 of a joined bias included."""
    signals: Array
    """(..., n, T, O), of each sample's own loss, without the 1/n of the mean."""


class KFAC(Method):
    """KFAC (Martens, Grosse, 2015) for one layer; ``update`` needs ``statistic=KFAC.Factors(inputs, signals)``.

    Errors: ValueError or TypeError for a field out of range, for arrays that do not fit together, and for an update
    without ``statistic`` where (1) is due. With ``damping=0`` the factors must have full rank.
    """

    kind: str = choice(
        "damping (4): 'factored', 'equal' (pi = 1) or 'exact'", default="factored", of=("factored", "equal", "exact")
    )
    damping: float = real("lambda", default=0.3, ge=0)
    decay: float = real("rho", default=0.95, ge=0, lt=1)
    momentum: float = real("mu, heavy ball", default=0.9, ge=0, lt=1)
    statistics_every: int = integer("T1, updates between two statistics", default=1, ge=1)
    inverse_every: int = integer("T2, updates between two renewals of the eigenvectors", default=20, ge=1)

    paper: ClassVar[str] = "Martens, Grosse: Kronecker-factored Approximate Curvature, ICML 2015, arXiv 1503.05671"
    state_type: ClassVar[Any] = KFACState
    ndims: ClassVar[tuple[int, int]] = (1, 4)
    factorizes: ClassVar[bool] = True
    joins_bias: ClassVar[bool] = True
    takes_statistic: ClassVar[bool] = True
    Factors: ClassVar[Any] = KFACFactors

    def state_of(self, shape: tuple[int, ...]) -> KFACState:
        O, J = shape[0], int(np.prod(shape[1:]))  # noqa: E741
        roots = (zeros(J), zeros(J, J), zeros(O), zeros(O, O))
        return KFACState(step=0, m=zeros(*shape), inner=zeros(J, J), outer=zeros(O, O), roots=roots)

    def stack_ndim(self, state: KFACState) -> int:
        return int(state.inner.ndim) - 2

    def takes(self, shape: tuple[int, ...], path: str = "") -> bool:
        """Return True for every layer, biases of convolutions too."""
        return 1 <= len(shape) <= 4

    def scalars(self, step: Any, *, like: Array = None) -> Scalar:
        """Return w_k."""
        return (1 - self.decay) / one_minus_power(self.decay, (step - 1) // self.statistics_every + 1, like=like)

    def check_statistic(self, statistic: Any, param: Array) -> None:
        if not isinstance(statistic, KFACFactors):
            raise TypeError(f"statistic must be a KFAC.Factors, got {type(statistic).__name__}")
        inputs, signals = (tuple(each.shape) for each in statistic)
        if inputs[:-1] != signals[:-1] or inputs[-1] * signals[-1] * int(np.prod(inputs[:-3])) != param.size:
            rule = "(..., n, T, J) and (..., n, T, O) for a parameter of O J numbers"
            raise ValueError(f"inputs and signals must be {rule}, got {inputs} and {signals} for {tuple(param.shape)}")

    def step(self, grad: Array, state: KFACState, param: Array, now: Now) -> tuple[Array, KFACState]:
        """Make (1) to (6)."""
        xp, i, stack = now.xp, now.step - 1, tuple(grad.shape[: now.stack])
        t1, t2 = self.statistics_every, self.inverse_every
        inner, outer, (a, u, s, v) = state.inner, state.outer, state.roots
        if i % t1 == 0:
            if now.statistic is None:
                raise ValueError(f"statistic must be given in update {now.step}: KFAC has none of the gradient alone")
            n, positions = now.statistic.inputs.shape[-3:-1]
            x, d = (xp.reshape(each, (*stack, n * positions, each.shape[-1])) for each in now.statistic)
            inner = inner + now.k * (xp.matrix_transpose(x) @ x / (n * positions) - inner)  # (1)
            outer = outer + now.k * (xp.matrix_transpose(d) @ d / n - outer)
        if (i <= t2 and i % t1 == 0) or i % t2 == 0:
            (a, u), (s, v) = xp.linalg.eigh(inner), xp.linalg.eigh(outer)  # (2)
            a, s = xp.maximum(a, xp.zeros_like(a)), xp.maximum(s, xp.zeros_like(s))  # below 0 by rounding alone
        m = self.momentum * state.m + grad  # (5)
        turned = xp.matrix_transpose(v) @ xp.reshape(m, (*stack, v.shape[-1], -1)) @ u
        direction = v @ (turned / self.denominator(a, s, xp)) @ xp.matrix_transpose(u)  # (6)
        return xp.reshape(direction, grad.shape), KFACState(now.step, m, inner, outer, (a, u, s, v))

    def denominator(self, a: Array, s: Array, xp: Namespace) -> Array:
        """Return D, (..., O, J), from the eigenvalues (..., J) and (..., O)."""
        a, s = a[..., None, :], s[..., :, None]
        if self.kind == "exact":
            return s * a + self.damping  # (4)
        pi, root = xp.ones_like(a[..., :1]), self.damping**0.5
        if self.kind == "factored":
            mean_a, mean_s = xp.mean(a, axis=-1, keepdims=True), xp.mean(s, axis=-2, keepdims=True)
            some = (mean_a > 0) & (mean_s > 0)  # a factor that is 0 gets the damping alone
            pi = xp.sqrt(xp.where(some, mean_a, pi) / xp.where(some, mean_s, pi))  # (3)
        return (s + root / pi) * (a + pi * root)  # (4)

    def report(self, state: KFACState, finite: Array, xp: Namespace) -> dict[str, Array]:
        """Return the eigenvalues of the factors."""
        return {"inner": state.roots[0], "outer": state.roots[2], "finite": finite}


def factors(problem: Network, params: dict[str, Array], inputs: Array, rng: Any) -> dict[str, KFACFactors]:
    """Return the inputs of each layer, and the signals of labels that ``rng`` draws from the model, by parameter.

    ``inputs`` are those of a batch, (n, ...). The weights (O, I) have the constant 1 of their joined biases.
    """
    values, n = problem.activations(params, inputs), len(inputs)
    logits = values[-1]
    if isinstance(problem, Autoencoder):
        drawn: Any = ((rng.random(logits.shape) < sigmoid(np, logits)).astype(logits.dtype),)
    else:
        drawn = (inputs, np.argmax(logits + rng.gumbel(size=logits.shape), axis=1))
    signals = problem.signals(params, values, n * problem._head(logits, drawn)[1])
    if isinstance(problem, ConvClassifier):
        values = [*values[:-2:2], values[-2].reshape(n, -1), logits]
    found = {}
    for name, a, d in zip([name for name in params if name.endswith("weight")], values, signals, strict=False):
        if a.ndim == 2:
            found[name] = KFACFactors(np.concatenate([a, np.ones_like(a[:, :1])], axis=1)[:, None, :], d[:, None, :])
        else:
            x, each = np.swapaxes(a, 1, 2), np.swapaxes(d, 1, 2)
            found[name] = KFACFactors(x, each)
            found[name.replace("weight", "bias")] = KFACFactors(np.ones_like(x[..., :1]), each)
    return found
