"""What a method is, in one page: the base class of all of them.

A method gives its fields (`precond_ref.fields`), the shapes of its state (`Method.state_of`), its equations
(`Method.step`) and the values to compare or plot (`Method.report`). Everything else is here, once.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
import sys
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self, dataclass_transform, final

from array_api_compat import array_namespace, is_jax_array
from array_api_compat import device as device_of

from precond_ref.fields import choice, declared, flag, integer, is_python_number, is_zero, nearest, real
from precond_ref.numerics.arrays import all_finite, finite_members, state_dtype
from precond_ref.numerics.axes import check_samples
from precond_ref.numerics.refresh import check_refresh
from precond_ref.numerics.template import Spec, arrays_of, leaves, stacked
from precond_ref.typing import Array, Namespace

_CLASSES: dict[str, type[Method]] = {}
"""Every class of a method, by its ``name``; `precond_ref.registry` reads this dict."""


class Now(NamedTuple):
    """The arguments of one `Method.step` beside the gradient, the state and the parameter."""

    xp: Namespace
    """Namespace of the arrays."""
    step: Any
    """t, number of this update: 1, 2, ...; the new state has this number."""
    k: Any
    """The value of `Method.scalars` for t."""
    due: Any
    """True if this update renews the kept roots or bases: a bool, a 0-D array or a tracer; for MBF a pair of these."""
    stack: int
    """Number of stack axes, which are the first axes of every array; 0 for elementwise methods."""
    statistic: Any
    """The argument ``statistic`` of ``update``, which replaces the gradient's own statistic, or None."""


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(real, integer, flag, choice, declared)
)
class Method:
    """Base of every method: hyperparameters, with pure functions on ONE parameter.

    ``init(param, stack_ndim=k)`` makes the state. ``update(grad, state, param)`` returns ``(direction, state)``, and
    the caller makes ``param - lr * direction``. ``diagnose(state)`` computes the values to compare or plot.
    The first ``k`` axes of ``param`` stack independent parameters of one shape. A real field may be a 0-D array or a
    tracer; it is not cast, so it should have the parameter's dtype.

    A subclass becomes a frozen, keyword-only dataclass of its fields, and the registry finds it by its `name`. With
    ``preset="ASGO.theory"`` it is the attribute ``theory`` of the class `ASGO`. A class whose name begins with "_" is a
    base of others and has no entry in the registry. A subclass gives `state_of`, `step`, `report` and the class
    attributes below. If it needs them, it gives `rules`, `scalars`, `stack_ndim`, `takes`, and `due` with `periods`.
    """

    paper: ClassVar[str] = ""
    """Authors, title and arXiv id."""
    state_type: ClassVar[Any] = tuple
    """The NamedTuple that ``init`` and ``update`` return; its first field is ``step``. If a class does not give it, it
    is what the annotation of `state_of` says."""
    elementwise: ClassVar[bool] = False
    """True if every entry of the parameter is updated independently of the others."""
    ndims: ClassVar[tuple[int, int]] = (0, 64)
    """Smallest and largest number of axes of one parameter, stack axes not counted. A property where fields decide."""
    takes_statistic: ClassVar[bool] = False
    """True if ``update`` takes ``statistic``, which `check_statistic` checks."""
    joins_bias: ClassVar[bool] = False
    """True if the paper's method takes a layer's weight (O, I) and bias (O,) as one parameter (O, I + 1)."""
    every: Any = 1
    """Number of updates between two renewals of roots or bases. A field if the user may choose it."""
    refreshes: ClassVar[bool] = False
    """True if the method renews roots or bases, so that ``refresh`` has a meaning; made from ``every``."""
    narrow_state: Any = False
    """True if the state of a parameter below float32 has the parameter's dtype. If this is a field, `init` makes the
    state float32 at least unless the field is True. If it is no field, the adapters, which compute in float32, do."""
    weight_decay: Any = 0.0
    """Weight decay inside the direction. A field if the method has one."""
    decays: ClassVar[bool] = False
    """True if ``weight_decay`` is a field, so that the caller adds no decay of its own; made from the fields."""

    name: ClassVar[str] = ""
    """Name of the class, such as ``ASGO.theory``, or ``my_module:Mine`` outside this package; made from the class."""
    symbols: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Meaning of each field, with the paper's symbol and the rule; made from the fields, shown by ``list``."""
    presets: ClassVar[tuple[str, ...]] = ()
    """Names of attributes that make a variant: classes (with ``preset=``), or static methods that set fields."""

    def __init_subclass__(cls, preset: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        bases: Any = filter(dataclasses.is_dataclass, reversed(cls.__mro__[1:]))
        inherited = {field.name: field for base in bases for field in dataclasses.fields(base)}
        annotated = inspect.get_annotations(cls).keys()
        for name in cls.__dict__.keys() & inherited.keys() - annotated:
            raise TypeError(f"{cls.__name__}.{name} must have a type, as in `{name}: float = 0.5`, to be a default")
        for name in annotated & inherited.keys():
            if not isinstance(cls.__dict__.get(name), dataclasses.Field):  # another default for the same field
                default = getattr(cls, name, dataclasses.MISSING)
                setattr(cls, name, dataclasses.field(default=default, metadata=inherited[name].metadata))
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        cls.__init__ = _by_name(cls.__init__)  # type: ignore[method-assign]
        declared = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name in (cls.__dict__.keys() | annotated) - declared.keys():
            if not (name.startswith("_") or hasattr(super(cls, cls), name)):
                _refuse_slip(cls, name)
        if "state_type" not in cls.__dict__ and hasattr(state := _returned(cls.__dict__.get("state_of")), "_fields"):
            cls.state_type = state
        cls.symbols = MappingProxyType({name: _symbol(field) for name, field in declared.items()})
        cls.refreshes = cls.refreshes or "every" in declared
        cls.decays = cls.decays or "weight_decay" in declared
        cls.presets = cls.__dict__.get("presets", ())
        if not isinstance(cls.ndims, property) and not (isinstance(cls.ndims, tuple) and len(cls.ndims) == 2):
            raise TypeError(f"ndims of {cls.__qualname__} must be two numbers, as (2, 2), got {cls.ndims!r}")
        place = "" if cls.__module__.startswith("precond_ref.methods.") else f"{cls.__module__}:"
        if preset:
            cls.__qualname__ = preset  # the name by which it is printed and found
            owner, _, attribute = f"{place}{preset}".rpartition(".")
            if owner not in _CLASSES:
                raise ValueError(f"preset must be NAME.preset of a class that was defined before, got {preset!r}")
            setattr(_CLASSES[owner], attribute, cls)
            _CLASSES[owner].presets += (attribute,)
        cls.name = place + cls.__qualname__
        if not cls.__name__.startswith("_"):
            _CLASSES[cls.name] = cls

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.metadata.get("rule") is not None:
                field.metadata["rule"].check(field.name, value)
            if type(value).__module__ == "numpy" and isinstance(value, numbers.Real):
                # Beside arrays of other libraries, NumPy's scalars are arrays that have a dtype.
                number = int(value) if isinstance(value, numbers.Integral) else float(value)
                object.__setattr__(self, field.name, number)
        self.rules()

    # ---- to be given by each method --------------------------------------------------------------------------------

    def state_of(self, shape: tuple[int, ...]) -> Any:
        """Return the state of one parameter of ``shape``, with a `Spec` for each array.

        This is the only function that knows the shapes of the state.
        """
        raise NotImplementedError(f"{self.name} has no state_of(self, shape)")

    def step(self, grad: Array, state: Any, param: Array, now: Now) -> tuple[Array, Any]:
        """Return ``(direction, new state)`` by the equations. All arguments were checked; none may be changed."""
        raise NotImplementedError(f"{self.name} has no step(self, grad, state, param, now)")

    def report(self, state: Any, finite: Array, xp: Namespace) -> Any:
        """Return the value of `diagnose`.

        ``finite`` tells for each stack member whether its state is finite (0-D if elementwise, None without a state).
        """
        raise NotImplementedError(f"{self.name} has no report(self, state, finite, xp), which diagnose shows")

    # ---- to be given where a method needs it -----------------------------------------------------------------------

    @property
    def factorizes(self) -> bool:
        """Return True if the method factorises matrices (needs float32 or float64). It may be a class attribute."""
        return False

    @property
    def reads_param(self) -> bool:
        """Return True if `step` reads the parameter; otherwise it gets None. By default only weight decay reads it."""
        return not is_zero(self.weight_decay)

    @property
    def free_basis(self) -> str:
        """Return when the basis that a solver chooses for a multiple eigenvalue changes later steps; "" for never.

        "first": that of the first gradient. "renewed": that of each renewal. "kept": a basis may also be kept where the
        eigenvalues are no longer equal. `check` does not judge steps that depend on such a choice.
        """
        return ""

    def rules(self) -> None:
        """Raise ValueError or TypeError for fields that do not fit together; each field alone was checked before."""

    def scalars(self, step: Any, *, like: Array = None) -> Any:
        """Return the values that depend only on the update's number ``step`` (1, 2, ...) and the hyperparameters.

        They are exact Python floats for an int ``step``, and 0-D arrays in the dtype of ``like`` for a traced step.
        """
        return ()

    @property
    def idle(self) -> frozenset[str]:
        """Fields that have no effect at the present values of the others; `check` asks no implementation for them."""
        return frozenset()

    def stack_ndim(self, state: Any) -> int | None:
        """Return the number of stack axes of the arrays in ``state``; None for elementwise methods.

        A method whose parameters may have different numbers of axes must give this function.
        """
        if self.elementwise:
            return None
        array, spec = (next(leaves(tree[1:]))[1] for tree in (state, self.state_of((0,) * self.ndims[0])))
        return array.ndim - len(spec.shape)

    def due(self, step: Any) -> Any:
        """Return whether the update after ``step`` completed updates renews roots or bases.

        By default these are the updates 1, 1 + every, 1 + 2 every, ...
        """
        return True if self.every == 1 else step % self.every == 0

    @property
    def periods(self) -> Any:
        """Number of updates between two renewals: an int, or a tuple if `due` returns a tuple."""
        return self.every

    def overruled(self, refresh: Any) -> Any:
        """Return ``refresh``, an argument of ``update``, in the place of `due`; TypeError or ValueError if refused."""
        return check_refresh(refresh, self.every)

    def check_statistic(self, statistic: Any, param: Array) -> None:
        """Raise ValueError or TypeError if ``update`` of ``param`` cannot take ``statistic``; reads no values.

        Methods with ``takes_statistic`` take gradients of shape ``(q, *param.shape)`` unless they give another rule.
        """
        if not self.takes_statistic:
            raise ValueError(f"statistic must not be given for {self.name}, which takes none")
        check_samples(statistic, param)

    def takes(self, shape: tuple[int, ...], path: str = "") -> bool:
        """Return whether the default routing gives a parameter of this shape and path to this method (else to Adam)."""
        low, high = self.ndims
        return self.elementwise or min(max(low, 2), high) <= len(shape) <= high

    def for_shape(self, shape: tuple[int, ...], path: str = "") -> Method | None:
        """Return the method that the default routing gives to a parameter of this shape and path; None means Adam."""
        return self if self.takes(shape, path) else None

    # ---- the same for all -------------------------------------------------------------------------------------------

    @final
    def init(self, param: Array, *, stack_ndim: int = 0) -> Any:
        """Return the state for ``param`` before the first update.

        The first ``stack_ndim`` axes stack independent parameters. ValueError or TypeError for a shape or dtype that
        the method does not take.
        """
        xp = _namespace("param", param)
        _check_dtype(xp, "param", param.dtype, self.factorizes, self.name)
        if not (isinstance(stack_ndim, int) and 0 <= stack_ndim <= param.ndim):
            raise ValueError(f"stack_ndim must be an int between 0 and param.ndim = {param.ndim}, got {stack_ndim!r}")
        narrow = self.narrow_state or "narrow_state" not in self.symbols
        return arrays_of(self._template(param, stack_ndim), param, xp, state_dtype(xp, param, narrow))

    @final
    def update(
        self,
        grad: Array,
        state: Any,
        param: Array,
        *,
        scalars: Any = None,
        refresh: Any = None,
        xp: Namespace = None,
        statistic: Any = None,
    ) -> tuple[Array, Any]:
        """Return ``(direction, new state)`` of one update; no argument is changed.

        ``direction`` has the shape and dtype of ``grad``. A caller that has them may give ``scalars``, the value of
        `scalars`, and ``xp``, the namespace. ``refresh`` overrules when roots are renewed; methods without roots ignore
        it. ``statistic`` replaces the gradient in the statistic, in methods that take one. ValueError or TypeError for
        arguments that do not fit, before anything is computed.
        """
        if xp is None:  # a caller that binds xp (an adapter inside a compiled graph) has made sure of these two
            xp = _namespace("grad and param", grad, param)
            if not is_jax_array(grad) and device_of(grad) != device_of(param):
                raise ValueError(f"grad must be on param's device, got {device_of(grad)} and {device_of(param)}")
            step = getattr(state, "step", 0)
            if type(step) is not int or step < 0:
                _check_step(step, xp)
        if grad.shape != param.shape:
            raise ValueError(
                f"grad must have param's shape, got grad {tuple(grad.shape)} and param {tuple(param.shape)}"
            )
        if grad.dtype != param.dtype:
            raise TypeError(f"grad must have param's dtype, got grad {grad.dtype} and param {param.dtype}")
        _check_dtype(xp, "grad", grad.dtype, False, self.name)
        stack = self._check_state(state, param, xp)
        due = not self.refreshes or (self.due(state.step) if refresh is None else self.overruled(refresh))
        if statistic is not None:
            self.check_statistic(statistic, param)
        step = state.step + 1
        k = self.scalars(step, like=param) if scalars is None else scalars
        now = Now(xp, step, k, due, stack, statistic)
        made = self.step(grad, state, param if self.reads_param else None, now)
        self._check_made(made, grad, step)
        return made

    @final
    def diagnose(self, state: Any) -> Any:
        """Return the values to compare or plot, by `report`; they are computed only on request.

        ValueError or TypeError for a state of another structure.
        """
        self._check_state_type(state)
        entries = {name: array for name, array in leaves(state) if name != "step"}
        for name, array in entries.items():
            if not hasattr(array, "shape"):
                raise TypeError(f"state.{name} must be an array, got {type(array).__name__}")
        arrays, xp = [*entries.values()], None
        if arrays:
            xp = _namespace("the arrays of state", *arrays)
            _check_dtype(xp, "state", arrays[0].dtype, False, self.name)
        try:
            return self.report(state, self._finite(state, arrays, xp) if arrays else None, xp)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, NotImplementedError) or type(error).__name__.endswith("LinAlgError"):
                raise
            shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in entries.items())
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                f"diagnose of {self.name} failed for a state with the arrays {shapes or 'none'}: {error}"
            ) from error

    def _finite(self, state: Any, arrays: list[Array], xp: Namespace) -> Array:
        """Return whether the ``arrays`` of ``state`` are finite, for each stack member; 0-D for elementwise methods."""
        stack = self.stack_ndim(state)
        if stack is None:
            return all_finite(xp, *arrays)
        if stack < 0 or any(a.ndim < stack or a.shape[:stack] != arrays[0].shape[:stack] for a in arrays):
            raise ValueError("the stack axes, which are the first, must be the same for all")
        return finite_members(xp, *arrays, core_ndims=tuple(a.ndim - stack for a in arrays))

    @final
    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def _template(self, param: Array, stack_ndim: int) -> Any:
        """Return `state_of` one stack member of ``param``, stacked."""
        shape = tuple(param.shape)
        torch = sys.modules.get("torch")
        if torch is not None and (torch.compiler.is_compiling() or any(type(n) is not int for n in shape)):
            return self._new_template(shape, stack_ndim)
        known = self.__dict__.setdefault("_templates", {})
        if (shape, stack_ndim) not in known:
            self.check_class()
            template = self._new_template(shape, stack_ndim)
            self._check_template(template)
            known[shape, stack_ndim] = template
        return known[shape, stack_ndim]

    def _new_template(self, shape: tuple[int, ...], stack_ndim: int) -> Any:
        low, high = self.ndims
        if not low <= len(shape) - stack_ndim <= high:
            rule = f"exactly {low}" if low == high else f"{low} to {high}"
            raise ValueError(
                f"{self.name} takes a parameter with {rule} axes (stack axes not counted), got shape "
                f"{shape} with stack_ndim={stack_ndim}"
            )
        return stacked(self.state_of(shape[stack_ndim:]), shape[:stack_ndim])

    def check_class(self) -> None:
        """Raise TypeError for a class without a part that each method must give."""
        needs = {"state_of": "state_of(self, shape)", "step": "step(self, grad, state, param, now)"}
        for function, text in needs.items():
            if getattr(type(self), function) is getattr(Method, function):
                raise TypeError(f"{self.name} needs a function {text}")
        if getattr(self.state_type, "_fields", ())[:1] != ("step",):
            raise TypeError(
                f"{self.name} needs state_type, the NamedTuple class of its state, whose first field is step; "
                f"it has state_type = {getattr(self.state_type, '__name__', repr(self.state_type))}"
            )

    def _check_template(self, template: Any) -> None:
        """Raise TypeError if `state_of` returned anything but a ``state_type`` with a `Spec` for each array."""
        if not isinstance(template, self.state_type):
            raise TypeError(
                f"state_of of {self.name} must return a {self.state_type.__name__}, got {type(template).__name__}"
            )
        for name, leaf in leaves(template):
            if name != "step" and not isinstance(leaf, Spec):
                raise TypeError(
                    f"state_of of {self.name} must give zeros, full or eye of precond_ref.numerics.template for each "
                    f"array, got {type(leaf).__name__} in entry {name}"
                )

    def _check_made(self, made: Any, grad: Array, step: Any) -> None:
        """Raise TypeError or ValueError if ``made``, the result of `step`, is wrong; reads no values of arrays."""
        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], self.state_type)):
            kinds = f"({', '.join(type(m).__name__ for m in made)})" if isinstance(made, tuple) else type(made).__name__
            raise TypeError(
                f"step of {self.name} must return (direction, new state), the state a {self.state_type.__name__}, "
                f"got {kinds}"
            )
        shape = getattr(made[0], "shape", None)
        if shape != grad.shape:
            raise ValueError(
                f"step of {self.name} must return a direction of the gradient's shape {tuple(grad.shape)}, "
                f"got {type(made[0]).__name__ if shape is None else tuple(shape)}"
            )
        if made[0].dtype != grad.dtype:
            raise TypeError(
                f"step of {self.name} must return a direction of the gradient's dtype {grad.dtype}, got {made[0].dtype}"
            )
        new = made[1].step
        if isinstance(step, int) and new is not step and not (isinstance(new, int) and new == step):
            got = new if isinstance(new, int) else type(new).__name__
            raise ValueError(
                f"step of {self.name} must return a new state with now.step, here {step}, as its step, got {got}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_templates"}

    def _check_state_type(self, state: Any) -> None:
        if not isinstance(state, self.state_type):
            raise TypeError(f"state must be a {self.state_type.__name__}, got {type(state).__name__}")

    def _check_state(self, state: Any, param: Array, xp: Namespace) -> int:
        """Refuse a value that is no state of this method for ``param``; return the number of its stack axes."""
        self._check_state_type(state)
        low, high = self.ndims
        try:
            found = param.ndim - low if low == high else 0 if self.elementwise else self.stack_ndim(state)
        except (AttributeError, IndexError, TypeError):  # the value is no state
            found = 0
        stack = param.ndim if found is None else min(max(found, 0), param.ndim)
        template = self._template(param, stack)
        if not _fits(state[1:], template[1:], param.dtype):
            for name, value, part in zip(state._fields[1:], state[1:], template[1:], strict=True):
                self._refuse(f"state.{name}", value, part, param, xp)
        return stack

    def _refuse(self, what: str, value: Any, part: Any, param: Array, xp: Namespace) -> None:
        """Raise the error for a ``value`` that does not fit ``part`` of the template, if it does not."""
        if (value is None) != (part is None):
            rule = "be None" if part is None else "not be None"
            raise ValueError(f"{what} must {rule}: the state was made with other fields than {self!r}")
        if isinstance(part, tuple):
            if hasattr(part, "_fields") and not isinstance(value, type(part)):
                raise TypeError(f"{what} must be a {type(part).__name__}, got {type(value).__name__}")
            if not isinstance(value, tuple):
                raise TypeError(f"{what} must be a tuple of arrays, got {type(value).__name__}")
            if len(value) != len(part):
                raise ValueError(
                    f"{what} must have {len(part)} entries for param of shape {tuple(param.shape)}, got {len(value)}"
                )
            for i, each in enumerate(zip(value, part, strict=True)):
                name = f"{what}.{part._fields[i]}" if hasattr(part, "_fields") else f"{what}[{i}]"
                self._refuse(name, *each, param, xp)
        elif part is not None:
            if not hasattr(value, "shape"):
                raise TypeError(f"{what} must be an array, got {type(value).__name__}")
            if tuple(value.shape) != part.shape:
                raise ValueError(
                    f"{what} must have shape {part.shape} for param of shape {tuple(param.shape)}, "
                    f"got {tuple(value.shape)}"
                )
            if value.dtype != param.dtype and xp.finfo(param.dtype).bits >= 32:  # below, a state may be wider
                raise TypeError(f"{what} must have param's dtype {param.dtype}, got {value.dtype}")


def class_hint(value: Any) -> str:
    """Return a hint for the error about a ``value`` that is the class of a method instead of a method, else ""."""
    is_class = isinstance(value, type) and issubclass(value, Method)
    return f": that is the class, an instance is {value.name}(...)" if is_class else ""


def _returned(function: Any) -> Any:
    """Return the class that ``function`` returns by its annotation; None if it is not found or there is no function."""
    given = getattr(function, "__annotations__", {}).get("return")
    return function.__globals__.get(given) if isinstance(given, str) else given


def _by_name(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``init`` of a class so that fields without names raise an error, which shows how to give them."""

    @functools.wraps(init)
    def made(self: Method, *values: Any, **fields: Any) -> None:
        if values:
            names = ", ".join(f"{name}=..." for name in self.symbols)
            raise TypeError(f"fields of {self.name} are given by name, {self.name}({names}), got {values!r}")
        init(self, **fields)

    return made


def _refuse_slip(cls: type[Method], name: str) -> None:
    """Raise TypeError for an attribute that is no field and looks like a misspelled name that `Method` declares."""
    function = inspect.isfunction(cls.__dict__.get(name))
    declared = {n for n in vars(Method) if not n.startswith("_") and (inspect.isfunction(vars(Method)[n]) == function)}
    if found := nearest(name, declared):
        raise TypeError(
            f"{cls.__qualname__} has an attribute {name}, which no method has: is it {' or '.join(found)}? "
            "What is your own may begin with an underscore, or be a field, with a type"
        )


def _symbol(field: dataclasses.Field[Any]) -> str:
    """Return meaning and rule of a field."""
    rule = field.metadata.get("rule")
    return ", ".join(filter(None, [field.metadata.get("meaning", ""), rule.text if rule is not None else ""]))


def _fits(values: tuple[Any, ...], parts: tuple[Any, ...], dtype: Any) -> bool:
    """Return whether ``values`` have the structure and shapes of the template's ``parts``, and ``dtype``."""
    for value, part in zip(values, parts, strict=True):
        if type(part) is Spec:
            if not hasattr(value, "shape") or value.shape != part.shape or value.dtype != dtype:
                return False
        elif part is None or value is None:
            if part is not value:
                return False
        elif type(value) is not type(part) or len(value) != len(part) or not _fits(value, part, dtype):
            return False
    return True


def _check_step(step: Any, xp: Namespace) -> None:
    """Refuse a ``step`` that is no number of updates. The value of an array is not read, so it may be negative."""
    dtype = getattr(step, "dtype", None)
    number = isinstance(step, numbers.Number)  # also NumPy's scalars
    if isinstance(step, bool) or (not isinstance(step, numbers.Integral) if number else dtype is None or step.ndim):
        raise TypeError(f"state.step must be an int or an array without axes, the updates done, got {step!r}")
    if number and step < 0:
        raise ValueError(f"state.step must be >= 0, the updates done, got {step!r}")
    if not number and not xp.isdtype(dtype, "integral"):
        raise TypeError(f"state.step must have an integer dtype, got {dtype}")


def warn_if_decay(method: Any) -> None:
    """Warn when ``beta2``, here the weight of the *new* term, looks like a decay, the weight of the old one."""
    if is_python_number(method.beta2) and method.beta2 > 0.5:
        warnings.warn(
            f"beta2 of {method.name} is the weight of the new term (about 0.01), not a decay (about 0.99): "
            f"beta2={method.beta2!r} forgets the past at once; for that decay give beta2={1 - method.beta2:.3g}",
            UserWarning,
            stacklevel=6,  # the caller of the constructor
        )


def _namespace(what: str, *arrays: Array) -> Namespace:
    try:
        for array in arrays:
            if array is None or not hasattr(array, "shape"):  # which array_namespace passes over
                raise TypeError("None and numbers are no arrays")
            if type(array).__name__ == "matrix":  # NumPy's: its * is the matrix product
                raise TypeError("a matrix is no array")
        return array_namespace(*arrays)
    except TypeError as error:
        kinds = ", ".join(f"{type(a).__module__}.{type(a).__name__}" for a in arrays)
        raise TypeError(f"{what} must be array(s) of one array-API namespace, got {kinds}") from error


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
