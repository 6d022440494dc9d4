"""What a method is: the base class of all of them, its argument checks, and the registry."""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

from array_api_compat import array_namespace, is_jax_array
from array_api_compat import device as device_of

Array = Any
Namespace = Any
Scalar = Any  # a Python float, a 0-D array, or a tracer

_REGISTRY: dict[str, type[Method]] = {}


def list_methods() -> Mapping[str, type[Method]]:
    """All methods by name, in the order of definition (read-only)."""
    return MappingProxyType(_REGISTRY)


def constructors() -> dict[str, Callable[..., Method]]:
    """Every method of the registry, and after it its presets, such as ``ASGO.theory``."""
    found: dict[str, Callable[..., Method]] = {}
    for name, method in _REGISTRY.items():
        found[name] = method
        found.update({f"{name}.{preset}": getattr(method, preset) for preset in method.presets})
    return found


class Method:
    """Base of every method: a frozen, keyword-only dataclass of hyperparameters with pure functions on ONE parameter.

    ``init(param, stack_ndim=k)`` makes the state; ``update(grad, state, param)`` returns ``(direction, state)`` and
    the caller makes ``param - lr * direction``; ``diagnose(state)`` computes what one would compare or plot.
    The first ``k`` axes of ``param`` stack independent parameters of one shape. A real field may be a 0-D array or a
    tracer; it is not cast, so it should have the parameter's dtype.

    Subclasses give the class attributes below, ``init``, ``scalars``, ``update`` and ``diagnose``.
    """

    paper: ClassVar[str] = ""
    """Authors, title and arXiv id."""
    symbols: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Meaning of each field, with the paper's symbol; `precond-ref list` prints it."""
    presets: ClassVar[tuple[str, ...]] = ()
    """Names of static methods that return a ready-made variant."""
    state_type: ClassVar[Any] = tuple
    """The NamedTuple that ``init`` and ``update`` return."""
    elementwise: ClassVar[bool] = False
    """True if every entry of the parameter is updated independently of the others."""
    joins_bias: ClassVar[bool] = False
    """True if the paper's method takes a layer's weight (O, I) and bias (O,) as one parameter (O, I + 1)."""
    ndims: ClassVar[tuple[int, int]] = (0, 64)
    """Smallest and largest number of axes of one parameter, stack axes not counted."""

    def __init_subclass__(cls, register: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if register:
            _REGISTRY[cls.__name__] = cls

    # ---- to be given by each method --------------------------------------------------------------------------------

    def init(self, param: Array, *, stack_ndim: int = 0) -> Any:
        """State for ``param`` before the first update."""
        raise NotImplementedError

    def scalars(self, step: Any, *, like: Array = None) -> Any:
        """What depends on the update's number ``step`` (1, 2, ...) and the hyperparameters alone.

        Exact Python floats for an int ``step``; for a traced one, 0-D arrays in the dtype of ``like``.
        """
        return ()

    def update(
        self,
        grad: Array,
        state: Any,
        param: Array,
        *,
        scalars: Any = None,
        refresh: bool | None = None,
        xp: Namespace = None,
    ) -> tuple[Array, Any]:
        """One update: ``(direction, new state)``; nothing given is changed.

        ``scalars`` and ``xp`` (what `scalars` returned, the namespace) may be given by a caller that has them;
        ``refresh`` overrules when roots are renewed, and is ignored by methods that have none.
        """
        raise NotImplementedError

    def diagnose(self, state: Any) -> Any:
        """What a validator compares or a student plots; computed only on request."""
        raise NotImplementedError

    # ---- shared -----------------------------------------------------------------------------------------------------

    def check_statistic(self, statistic: Any, param: Array) -> None:
        """ValueError or TypeError for what ``update`` of ``param`` cannot take as ``statistic``; reads no values."""
        if "statistic" not in inspect.signature(self.update).parameters:
            raise ValueError(f"statistic must not be given for {type(self).__name__}, which takes none")

    def takes(self, shape: tuple[int, ...], path: str = "") -> bool:
        """Whether the default routing gives this method a parameter of this shape and path (else: Adam)."""
        low, high = self.ndims
        return self.elementwise or max(low, 2) <= len(shape) <= high

    def for_shape(self, shape: tuple[int, ...], path: str = "") -> Method | None:
        """The method that the default routing gives a parameter of this shape and path; None: Adam."""
        return self if self.takes(shape, path) else None

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def _check_param(self, param: Array, stack_ndim: int, *, factorizes: bool = False) -> Namespace:
        """The namespace of ``param``, once its dtype and number of axes are known to fit."""
        xp = _namespace("param", param)
        _check_dtype(xp, "param", param.dtype, factorizes, type(self).__name__)
        if not (isinstance(stack_ndim, int) and 0 <= stack_ndim <= param.ndim):
            raise ValueError(f"stack_ndim must be an int between 0 and param.ndim = {param.ndim}, got {stack_ndim!r}")
        low, high = self.ndims
        if not low <= param.ndim - stack_ndim <= high:
            rule = f"exactly {low}" if low == high else f"{low} to {high}"
            raise ValueError(
                f"{type(self).__name__} takes a parameter with {rule} axes (stack axes not counted), got shape "
                f"{tuple(param.shape)} with stack_ndim={stack_ndim}"
            )
        return xp

    def _check_state(self, state: Any) -> None:
        """TypeError for what is no state of this method."""
        if not isinstance(state, self.state_type):
            raise TypeError(f"state must be a {self.state_type.__name__}, got {type(state).__name__}")

    def _enter(
        self,
        grad: Array,
        state: Any,
        param: Array,
        scalars: Any,
        xp: Namespace,
        *,
        unused: Mapping[str, bool] = MappingProxyType({}),
        **shapes: tuple[int, ...],
    ) -> tuple[Namespace, Any]:
        """Checks of every update; returns the namespace and the step's scalars.

        ``shapes`` gives what a state field's shape must be (fields not named must have ``param``'s shape), ``unused``
        whether these hyperparameters can do without it: only then it may be None.
        """
        if xp is None:  # a caller that binds xp (an adapter inside a compiled graph) has made sure of these two
            xp = _namespace("grad and param", grad, param)
            if not is_jax_array(grad) and device_of(grad) != device_of(param):
                raise ValueError(f"grad must be on param's device, got {device_of(grad)} and {device_of(param)}")
        if grad.shape != param.shape:
            raise ValueError(
                f"grad must have param's shape, got grad {tuple(grad.shape)} and param {tuple(param.shape)}"
            )
        if grad.dtype != param.dtype:
            raise TypeError(f"grad must have param's dtype, got grad {grad.dtype} and param {param.dtype}")
        _check_dtype(xp, "grad", grad.dtype, False, type(self).__name__)
        self._check_state(state)
        for field, value in state._asdict().items():
            if field == "step" or (value is None and unused.get(field)):
                continue
            if value is None:
                raise ValueError(f"state.{field} must not be None: the state was made with other fields than {self!r}")
            if hasattr(value, "shape"):
                expected = shapes.get(field, tuple(param.shape))
                if tuple(value.shape) != tuple(expected):
                    raise ValueError(
                        f"state.{field} must have shape {tuple(expected)} for param of shape {tuple(param.shape)}, "
                        f"got {tuple(value.shape)}"
                    )
            elif not isinstance(value, tuple):
                raise TypeError(f"state.{field} must be an array or a tuple of arrays, got {type(value).__name__}")
            _check_state_dtype(xp, f"state.{field}", value, param.dtype)
        if scalars is None:
            scalars = self.scalars(state.step + 1, like=param)
        return xp, scalars


def is_python_number(value: Any) -> bool:
    """True for a Python int or float (value checks apply), False for arrays and tracers (shape checks only)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_zero(value: Any) -> bool:
    """True only for a Python number equal to zero: an array-valued hyperparameter is never branched on."""
    return is_python_number(value) and value == 0


def check_real(
    method: Any,
    field: str,
    *,
    ge: float = -math.inf,
    gt: float = -math.inf,
    le: float = math.inf,
    lt: float = math.inf,
    optional: bool = False,
) -> None:
    """Refuse a field that is not a finite real number within the bounds; an array must be 0-D."""
    value: Any = getattr(method, field)
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # NumPy's scalars are numbers.Real
        shape = getattr(value, "shape", None)
        if shape is None or isinstance(value, str):
            raise TypeError(f"{field} must be a real number or a 0-D array, got {value!r}")
        if tuple(shape) != ():
            raise ValueError(f"{field} must be a real number or a 0-D array, got an array of shape {tuple(shape)}")
        return
    number: Any = value
    if not (math.isfinite(number) and ge <= number <= le and (number > gt or gt == -math.inf)
            and (number < lt or lt == math.inf)):  # fmt: skip
        bounds = [f">= {ge:g}"] * math.isfinite(ge) + [f"> {gt:g}"] * math.isfinite(gt)
        bounds += [f"<= {le:g}"] * math.isfinite(le) + [f"< {lt:g}"] * math.isfinite(lt)
        rule = " and ".join(["finite", *bounds])
        raise ValueError(f"{field} must be {rule}{' or None' if optional else ''}, got {value!r}")


def warn_if_decay(method: Any) -> None:
    """Warn when ``beta2``, here the weight of the *new* term, looks like a decay, the weight of the old one."""
    if is_python_number(method.beta2) and method.beta2 > 0.5:
        warnings.warn(
            f"beta2 of {type(method).__name__} is the weight of the new term (about 0.01), not a decay (about 0.99): "
            f"beta2={method.beta2!r} forgets the past at once; for that decay give beta2={1 - method.beta2:.3g}",
            UserWarning,
            stacklevel=4,  # the caller of the constructor
        )


def check_int(method: Any, field: str, *, ge: int, optional: bool = False) -> None:
    """Refuse a field that is not a Python int of at least ``ge``."""
    value = getattr(method, field)
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{field} must be a Python int{' or None' if optional else ''}, got {value!r}")
    if value < ge:
        raise ValueError(f"{field} must be >= {ge}{' or None' if optional else ''}, got {value!r}")


def check_bool(method: Any, field: str) -> None:
    """Refuse a field that is not True or False."""
    value = getattr(method, field)
    if not isinstance(value, bool):
        raise TypeError(f"{field} must be True or False, got {value!r}")


def check_choice(method: Any, field: str, choices: tuple[str, ...]) -> None:
    """Refuse a field that is not one of the strings."""
    value = getattr(method, field)
    if not isinstance(value, str):
        raise TypeError(f"{field} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    if value not in choices:
        raise ValueError(f"{field} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _namespace(what: str, *arrays: Array) -> Namespace:
    try:
        if any(array is None or not hasattr(array, "shape") for array in arrays):  # which array_namespace passes over
            raise TypeError("None and numbers are no arrays")
        if any(type(array).__name__ == "matrix" for array in arrays):  # NumPy's: its * is the matrix product
            raise TypeError("a matrix is no array")
        return array_namespace(*arrays)
    except TypeError as error:
        kinds = ", ".join(f"{type(a).__module__}.{type(a).__name__}" for a in arrays)
        raise TypeError(f"{what} must be array(s) of one array-API namespace, got {kinds}") from error


def _check_state_dtype(xp: Namespace, what: str, value: Any, dtype: Any) -> None:
    """A state may be wider than its parameter only where that has fewer than 32 bits."""
    if isinstance(value, tuple):
        for part in value:
            _check_state_dtype(xp, what, part, dtype)
    elif hasattr(value, "dtype") and value.dtype != dtype and xp.finfo(dtype).bits >= 32:
        raise TypeError(f"{what} must have param's dtype {dtype}, got {value.dtype}")


def _check_dtype(xp: Namespace, what: str, dtype: Any, factorizes: bool, method: str) -> None:
    try:
        real = xp.isdtype(dtype, "real floating")
    except (TypeError, ValueError, AttributeError):
        real = False  # NumPy with ml_dtypes.bfloat16 is refused here
    if not real:
        raise TypeError(
            f"{what} must have a real floating dtype of its namespace, got {dtype} "
            f"(cast it, for example to float32, before calling)"
        )
    if factorizes and xp.finfo(dtype).bits < 32:
        raise TypeError(
            f"{method} factorises matrices, which needs float32 or float64, got {what} of dtype {dtype} "
            f"(cast param and grad to float32 and the direction back)"
        )
