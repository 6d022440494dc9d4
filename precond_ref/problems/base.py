"""The base of all problems: library and device of the arrays, first parameters, batches, and common checks."""

from __future__ import annotations

import functools
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from array_api_compat import array_namespace

if TYPE_CHECKING:
    import numpy as np

Array = Any
Params = dict[str, Array]
Batch = tuple[Array, ...]

DTYPES = ("float32", "float64")


def import_numpy() -> ModuleType:
    """Return NumPy, which reads the data and draws the random numbers for every array library."""
    try:
        import numpy
    except ImportError as error:
        raise ImportError(
            'precond_ref.problems needs NumPy to read and draw data: pip install "precond-ref[cli]"'
        ) from error
    return numpy


def generator(*key: int | str) -> np.random.Generator:
    """Return a random generator for ``key``, such as (seed, "init"); each key has its own."""
    words = [int.from_bytes(k.encode(), "big") if isinstance(k, str) else k for k in key]
    random = import_numpy().random
    return random.Generator(random.PCG64(words))


@functools.lru_cache(maxsize=4)
def permutation(size: int, *key: int | str) -> np.ndarray:
    """Return a random order of 0, ..., size - 1, the same in every NumPy version (raw bits are fixed)."""
    order = import_numpy().argsort(generator(*key).bit_generator.random_raw(size), kind="stable")
    order.flags.writeable = False
    return order


def check_int(name: str, value: Any, *, ge: int) -> int:
    """Return ``value`` as an int of at least ``ge``; TypeError or ValueError for others."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if number < ge:
        raise ValueError(f"{name} must be >= {ge}, got {value!r}")
    return number


def check_real(name: str, value: Any, *, ge: float) -> float:
    """Return ``value`` as a finite float of at least ``ge``; TypeError or ValueError for others."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a real number, got {value!r}") from None
    if not (math.isfinite(number) and number >= ge):
        raise ValueError(f"{name} must be finite and >= {ge:g}, got {value!r}")
    return number


@dataclass(frozen=True)
class Space:
    """The place of a problem's arrays: namespace, name of the floating dtype, device (None: the default)."""

    xp: Any
    dtype: str = "float32"
    device: Any = None

    @classmethod
    def make(cls, xp: Any = None, dtype: str = "float32", device: Any = None) -> Space:
        """Return a checked space; ``xp`` may be a bare library (``torch``) and defaults to NumPy."""
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}")
        if xp is None:
            xp = import_numpy()
        try:
            xp = array_namespace(xp.zeros(1))
            known = xp.__array_namespace_info__().dtypes(device=device, kind="real floating")
        except (AttributeError, TypeError) as error:
            raise TypeError(
                f"xp must be an array-API namespace (numpy, torch, jax.numpy, cupy, ...), got {xp!r}"
            ) from error
        if dtype not in known:
            hint = " (JAX: set jax_enable_x64)" if "jax" in getattr(xp, "__name__", "") else ""
            raise ValueError(f"dtype {dtype!r} is not available in {xp.__name__} on device {device}{hint}")
        return cls(xp, dtype, device)

    @property
    def real_dtype(self) -> Any:
        """The dtype object of the namespace."""
        return getattr(self.xp, self.dtype)

    def real(self, host: Any) -> Array:
        """Return a copy of ``host`` (NumPy) in this space's floating dtype."""
        return self.xp.asarray(host.astype(self.dtype), device=self.device)

    def integer(self, host: Any) -> Array:
        """Return a copy of ``host`` (NumPy) as int32, with which every library can index."""
        return self.xp.asarray(host.astype("int32"), device=self.device)


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem(ABC):
    """Base of every problem: parameters, batches, loss, gradient and metric, all as arrays of ``space``.

    ``loss``, ``loss_and_grad`` and ``metric`` change no argument, depend only on their arguments, and may be compiled.
    Subclasses give ``_loss``, ``_loss_and_grad`` and ``_metric``.
    """

    name: str
    """Name by which the problem was loaded."""
    space: Space
    """Namespace, dtype and device of every array."""
    seed: int
    """Seed of the first parameters, the order of the batches, and drawn data."""
    batch_size: int | None
    """Samples per batch; None: every step sees the whole training set."""
    default_steps: int
    """Steps after which a reasonable optimizer has done most of its work."""
    initial: Mapping[str, np.ndarray] = field(repr=False)
    """First parameters, float64 on the host."""
    train: Batch = field(repr=False)
    """Training set, samples on the first axis; ``batch=None`` means this set. Empty if there is no data."""

    metric_name: ClassVar[str]
    """Name of the quantity that ``metric`` measures."""
    higher_is_better: ClassVar[bool]
    """True if a larger ``metric`` is better."""

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.train:
            samples = self.train[0].shape[0]
            if check_int("batch_size", self.batch_size, ge=1) > samples:
                raise ValueError(
                    f"batch_size must be at most the number of training samples, {samples}, or None, "
                    f"got {self.batch_size}"
                )

    # ---- to be given by each problem ----------------------------------------------------------------------

    @abstractmethod
    def _loss(self, params: Params, batch: Batch) -> Array: ...

    @abstractmethod
    def _loss_and_grad(self, params: Params, batch: Batch) -> tuple[Array, Params]: ...

    @abstractmethod
    def _metric(self, params: Params) -> Array: ...

    # ---- shared ------------------------------------------------------------------------------------------

    def init(self) -> Params:
        """Return the first parameters, new arrays at each call."""
        return {name: self.space.real(value) for name, value in self.initial.items()}

    def batch(self, step: int) -> Batch | None:
        """Return the arrays of step 0, 1, ..., (batch_size, ...) each; None if every step uses the whole training set.

        Each epoch goes once through the training set in an order of its own and drops the last, short batch.
        """
        step = check_int("step", step, ge=0)
        if self.batch_size is None:
            return None
        samples = self.train[0].shape[0]
        epoch, position = divmod(step, samples // self.batch_size)
        start = position * self.batch_size
        chosen = permutation(samples, self.seed, "batches", epoch)[start : start + self.batch_size]
        index = self.space.integer(chosen)
        return tuple(self.space.xp.take(array, index, axis=0) for array in self.train)

    def loss(self, params: Params, batch: Batch | None = None) -> Array:
        """Return the objective on ``batch`` (None: the whole training set), 0-D."""
        self._check(params)
        return self._loss(params, self.train if batch is None else batch)

    def loss_and_grad(self, params: Params, batch: Batch | None = None) -> tuple[Array, Params]:
        """Return the objective of `loss`, 0-D, and its gradient, with the keys and shapes of ``params``."""
        self._check(params)
        return self._loss_and_grad(params, self.train if batch is None else batch)

    def metric(self, params: Params) -> Array:
        """Return the quantity ``metric_name`` on the test set, 0-D."""
        self._check(params)
        return self._metric(params)

    def _check(self, params: Params) -> None:
        if params.keys() != self.initial.keys():
            raise ValueError(
                f"{self.name} has the parameters {', '.join(self.initial)}, got {', '.join(params) or 'none'}"
            )
        for name, value in params.items():
            shape = self.initial[name].shape
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
            if value.dtype != self.space.real_dtype:
                raise TypeError(f"{name} must have dtype {self.space.dtype}, got {value.dtype}")
