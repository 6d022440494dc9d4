"""A method of the core as an optax transformation: trees, routing, dtypes, stacking and sharding; no mathematics."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax._src.base import NO_PARAMS_MSG  # not exported, but the message that users of optax know

from precond_ref.methods.baselines import Adam
from precond_ref.protocol import Method, class_hint
from precond_ref.typing import Array
from precond_ref_jax import OPTIONS, STATIC_ARGS

Tree = Any


class ScaleByState(NamedTuple):
    """State of every transformation of this package."""

    count: Array
    """Number of updates done, int32 of shape ()."""
    statistics: Any
    """The method's own state, whose ``step`` is None (it is ``count``) and which has a tree like the parameters in the
    place of each array, with an ``optax.MaskedNode`` for each parameter that has no such array."""
    fallback: Any
    """State of the transformation of the other parameters; None without such a transformation."""


def scale_by(
    method: Method,
    *,
    takes: Callable[[str, Array], bool] | None = None,
    fallback: optax.GradientTransformation | None = None,
    dtype: Any = None,
    join: Any = None,
    join_axis: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Make the transformation that replaces gradients by directions of ``method``; chain a learning rate after it.

    Arguments:
        takes: ``(path, array) -> bool``, True for the parameters of ``method``; it replaces the rule ``method.takes``.
            Paths join keys by "/".
        fallback: transformation of the other parameters; the default is `precond_ref.Adam`.
        dtype: of statistics and arithmetic; the default is the parameter's, but float32 at least (unless the method
            has ``narrow_state=True``). Updates always come out in the parameter's dtype.
        join: pairs of paths (weight, bias), each one parameter to ``method``, called like the weight, whose place in
            the state holds the state of both.
        join_axis: 1 (the default): weights are (O, I) and the bias (O,) is the last column; 0: they are (I, O), as the
            kernels of flax, and it is the last row.

    ``update(..., statistics=)`` gives methods what the core's ``update`` takes as ``statistic``, by path (the weight's,
    for a pair); ``update(..., batch_size=)`` is the value of this field of every method that has it.
    ``update`` needs ``params`` if the method reads them, as for a weight decay of its own. Parameters of one shape are
    stacked for the update.
    Errors: ValueError or TypeError, with the path, for arrays that the method refuses or that do not fit together.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method must be a Method such as precond_ref.ASGO(), got {method!r}{class_hint(method)}")
    if not hasattr(method.state_type, "_fields"):
        method.check_class()  # which says what it lacks
    if takes is not None and not callable(takes):
        raise TypeError(f"takes must be a callable (path, array) -> bool or None, got {takes!r}")
    if fallback is not None and not isinstance(fallback, optax.GradientTransformation):
        raise TypeError(f"fallback must be an optax.GradientTransformation or None, got {fallback!r}")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a real floating dtype or None, got {dtype!r}")
    if join_axis is not None and (type(join_axis) is not int or join_axis not in (0, 1)):
        raise ValueError(f"join_axis must be 0 or 1, got {join_axis!r}")
    axis = 1 if join_axis is None else join_axis
    pairs = _pairs(join)
    fields = method.state_type._fields[1:]
    if fallback is None and not (method.elementwise and takes is None):
        fallback = scale_by(Adam(), dtype=dtype)

    def route(path: str, leaf: Any) -> Method | None:
        if leaf is None:
            return None
        default = method.for_shape(np.shape(leaf), path)
        if takes is None:
            return default
        return (default or method) if takes(path, leaf) else None

    def plan(tree: Tree) -> tuple[list[str], list[Any], Any, list[_Unit]]:
        """Return paths, leaves and structure of ``tree``, and the units that ``method`` takes."""
        names, leaves, treedef = _flatten(tree)
        at = {name: index for index, name in enumerate(names)}
        masked = _masked(tree)
        units, second = [], set()
        for weight, bias in pairs.items():
            missing = [name for name in (weight, bias) if name not in at and name not in masked]
            if leaves and (missing or (weight in at) != (bias in at)):
                raise ValueError(f"join names {' and '.join(missing) or bias}, which the tree does not have")
            if weight not in at or (leaves[at[weight]] is None and leaves[at[bias]] is None):
                continue
            with _named(weight):
                shape = _joined_shape(leaves[at[weight]], leaves[at[bias]], axis)
                chosen = route(weight, jax.ShapeDtypeStruct(shape, leaves[at[weight]].dtype))
            if chosen is not None:
                units.append(_Unit(chosen, weight, (at[weight], at[bias])))
                second |= {at[weight], at[bias]}
        for index, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
            chosen = None if index in second else route(name, leaf)
            if chosen is not None:
                units.append(_Unit(chosen, name, (index,)))
        return names, leaves, treedef, sorted(units, key=lambda unit: unit.at)

    def others_of(tree: Tree) -> Tree:
        _, leaves, treedef, units = plan(tree)
        taken = {index for unit in units for index in unit.at}
        return treedef.unflatten([index not in taken for index in range(len(leaves))])

    others = fallback and optax.masked(fallback, others_of)

    def init(params: Tree) -> ScaleByState:
        params = jax.tree.map(lambda x: jnp.zeros_like(x) if isinstance(x, jax.ShapeDtypeStruct) else x, params)
        _, leaves, treedef, units = plan(params)
        blank = [None if leaf is None else optax.MaskedNode() for leaf in leaves]
        states: list[dict[str, Any]] = [dict.fromkeys(fields, value) for value in blank]
        for chosen, name, at in units:
            with _named(name):
                parts = [_real(chosen, leaves[index]) for index in at]
                p = _joined([part.astype(_dtype(chosen, parts[0].dtype, dtype)) for part in parts], axis)
                states[at[0]] = chosen.init(p)._replace(step=None)._asdict()
        if leaves:
            trees = {field: _spread([state[field] for state in states], treedef) for field in fields}
        else:  # also what optax.tree.map_params asks, to learn where copies of the parameters are
            alike = _like_params(method)
            trees = {field: params if field in alike else jnp.zeros((), jnp.int32) for field in fields}
        statistics = method.state_type(step=None, **trees)
        state = ScaleByState(jnp.zeros((), jnp.int32), statistics, others and others.init(params))
        arrays = [jnp.asarray(leaf) for leaf in leaves if leaf is not None]
        return jax.tree.map(lambda x: _on_mesh(x, arrays[0]), state) if arrays else state

    def update(updates: Tree, state: ScaleByState, params: Tree = None, **extra_args: Any) -> tuple[Tree, ScaleByState]:
        if params is None and method.reads_param:
            raise ValueError(NO_PARAMS_MSG)
        if not isinstance(state, ScaleByState) or not isinstance(state.statistics, method.state_type):
            raise TypeError(f"state must be what init of {method.name} returned, got {type(state).__name__}")
        statistics = extra_args.get("statistics")
        statistics = {} if statistics is None else statistics
        if not isinstance(statistics, Mapping) or not all(isinstance(name, str) for name in statistics):
            raise TypeError(f"statistics must be a mapping from paths, such as 'layer/weight', got {statistics!r}")
        statistics = dict(statistics)
        names, grads, treedef, units = plan(updates)
        values = grads if params is None else _up_to("params", treedef, params)
        columns = [_gather(f"state.statistics.{f}", treedef, getattr(state.statistics, f)) for f in fields if units]
        groups: dict[Any, tuple[Method, list[_Member]]] = {}
        masked = _masked(updates)
        unknown = statistics.keys() - ({*names, *masked} - {names[i] for unit in units for i in unit.at[1:]})
        if unknown:
            raise ValueError(
                f"statistics names {', '.join(sorted(unknown))}: no parameter, or one joined to its weight"
            )
        sized: dict[Any, Method] = {}
        for chosen, name, at in units:
            if extra_args.get("batch_size") is not None and "batch_size" in chosen.symbols:
                key = _cache_key(chosen)
                sized[key] = sized.get(key) or chosen.replace(batch_size=extra_args["batch_size"])
                chosen = sized[key]
            old = method.state_type(None, *(column[at[0]] for column in columns))
            member = _member(
                chosen, at, name, [grads[i] for i in at], [values[i] for i in at], old, statistics.pop(name, None)
            )
            groups.setdefault(_label(chosen, member), (chosen, []))[1].append(member)
        if statistics.keys() - masked and not others:
            raise ValueError(f"statistics names {', '.join(sorted(statistics))}, which the method does not take")

        outputs, new_fallback = list(grads), None
        if others:
            rest = {**extra_args, "statistics": statistics} if "statistics" in extra_args else extra_args
            transformed, new_fallback = others.update(updates, state.fallback, params, **rest)
            outputs = treedef.flatten_up_to(transformed)
        scalars: dict[Any, Any] = {}  # computed once, whatever the number of parameters
        for chosen, members in groups.values():
            for member, directions, new in _run(chosen, members, state.count, dtype, axis, scalars):
                for index, direction in zip(member.at, directions, strict=True):
                    outputs[index] = direction
                for column, value in zip(columns, new[1:], strict=True):
                    column[member.at[0]] = value
        trees = [_spread(column, treedef) for column in columns]
        new_statistics = method.state_type(None, *trees) if units else state.statistics
        count = optax.safe_increment(state.count)
        return treedef.unflatten(outputs), ScaleByState(count, new_statistics, new_fallback)

    return optax.GradientTransformationExtraArgs(init, update)


# ---- groups of parameters -------------------------------------------------------------------------------------------


class _Unit(NamedTuple):
    """One parameter of a method: its path, and the places of its arrays (weight and bias of a pair)."""

    method: Method
    name: str
    at: tuple[int, ...]


class _Member(NamedTuple):
    """A unit of an update; ``grads`` and ``params`` have an array for each of ``at``."""

    at: tuple[int, ...]
    name: str
    grads: list[Array]
    params: list[Array]
    state: Any
    statistic: Any


def _member(
    method: Method, at: tuple[int, ...], name: str, grads: list[Any], params: list[Any], state: Any, statistic: Any
) -> _Member:
    with _named(name):
        gs, ps = [_real(method, grad) for grad in grads], [_real(method, param) for param in params]
        for g, p in zip(gs, ps, strict=True):
            if g.shape != p.shape:
                raise ValueError(f"the update must have its parameter's shape {p.shape}, got {g.shape}")
        if statistic is not None and not method.takes_statistic:
            raise ValueError(f"statistics must not be given for {method.name}, which takes none")
    return _Member(at, name, gs, ps, state, statistic)


def _label(method: Method, member: _Member) -> Any:
    """Return the label that members of one stack share; elementwise methods gain nothing from stacks under ``jit``."""
    if method.elementwise:
        return member.at
    shapes = tuple(jnp.shape(x) for x in jax.tree.leaves((member.state, member.statistic)))
    parts = tuple((g.shape, p.dtype) for g, p in zip(member.grads, member.params, strict=True))
    return _cache_key(method), parts, jax.tree.structure(member.statistic), shapes


def _run(
    method: Method, members: list[_Member], count: Array, wanted: Any, axis: int, scalars: dict[Any, Any]
) -> Iterator[tuple[_Member, list[Array], Any]]:
    """Yield each member with its directions, in its parameters' dtype, and its new state."""
    dtype = _dtype(method, members[0].params[0].dtype, wanted)
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    # In the arithmetic's dtype, so that they promote nothing.
    arrays = {name: jnp.asarray(value, dtype) for name, value in fields.items() if hasattr(value, "dtype")}

    def bound(arrays: dict[str, Array]) -> Method:
        return method.replace(**arrays) if arrays else method

    label = (_cache_key(method), dtype)
    if label not in scalars:
        scalars[label] = bound(arrays).scalars(count + 1, like=jnp.zeros((), dtype))

    # All arrays are arguments: with Explicit axes nothing may be closed over.
    def run(shared: Any, grads: Any, params: Any, states: Any, given: Any) -> tuple[list[list[Array]], list[Any]]:
        count, scalars, arrays = shared
        rows = [
            (*(_joined([x.astype(dtype) for x in parts], axis) for parts in (g, p)), s)
            for g, p, s in zip(grads, params, states, strict=True)
        ]
        stacked = len(rows) > 1
        g, p, state = jax.tree.map(lambda *xs: jnp.stack(xs), *rows) if stacked else rows[0]
        extra = {}
        if given[0] is not None:
            given = [jax.tree.map(lambda x: jnp.asarray(x, dtype), value) for value in given]
            along = 0 if isinstance(given[0], tuple) else 1  # samples come before the stack
            extra["statistic"] = jax.tree.map(lambda *xs: jnp.stack(xs, along), *given) if stacked else given[0]
        direction, new = bound(arrays).update(g, state._replace(step=count), p, scalars=scalars, xp=jnp, **extra)
        new = new._replace(step=None)
        news = [jax.tree.map(lambda x, i=i: x[i], new) for i in range(len(rows))] if stacked else [new]
        directions = []
        for whole, parts in zip(direction if stacked else [direction], params, strict=True):
            pieces = _apart(whole, len(parts), axis)
            directions.append([d.astype(p.dtype) for d, p in zip(pieces, parts, strict=True)])
        return directions, news

    _, _, grads, params, states, given = map(list, zip(*members, strict=True))
    mesh = jax.typeof(params[0][0]).sharding.mesh
    if AxisType.Explicit in mesh.axis_types:
        # The core's products and factorisations are not sharding-typed: here the compiler places them. What goes in as
        # a parameter or a state comes out placed alike, so that types do not change from step to step.
        def place(x: Array) -> NamedSharding:
            sharding = jax.typeof(x).sharding
            return sharding if sharding.mesh == mesh else NamedSharding(mesh, PartitionSpec())

        run = jax.sharding.auto_axes(run, out_sharding=jax.tree.map(place, (params, states)))
    with _named(*(member.name for member in members)), _full_products():
        directions, news = run((count, scalars[label], arrays), grads, params, states, given)
    yield from zip(members, directions, news, strict=True)


# ---- the public functions -------------------------------------------------------------------------------------------


def make_scale_by(name: str, factory: Callable[..., Method]) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Return ``scale_by_<name>(*, fields, takes, fallback, dtype, join, join_axis)``."""

    def make(**given: Any) -> optax.GradientTransformationExtraArgs:
        options = {option: given.pop(option) for option in OPTIONS if option in given}
        return scale_by(factory(**given), **options)

    make.__doc__ = f"Direction of `precond_ref.{factory.__qualname__}`, with the options of `scale_by`."
    return _public(make, name, list(_fields(factory).values()))


def make_optimizer(name: str, factory: Callable[..., Method]) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Return ``<name>(learning_rate, *, fields, weight_decay, mask, takes, fallback, dtype, join, join_axis)``."""
    scale = make_scale_by(f"scale_by_{name}", factory)
    fields = _fields(factory)
    decay = [] if "weight_decay" in fields else [_keyword("weight_decay", "float | None"), _keyword("mask", "Any")]

    def make(learning_rate: Any, **given: Any) -> optax.GradientTransformationExtraArgs:
        parts = []
        if decay:
            weight_decay, mask = given.pop("weight_decay", None), given.pop("mask", None)
            if weight_decay is not None:
                parts = [optax.add_decayed_weights(weight_decay, mask)]
            elif mask is not None:
                raise ValueError("mask says what weight_decay applies to: it needs weight_decay")
        if "learning_rate" in fields:
            given["learning_rate"] = learning_rate
        return optax.chain(scale(**given), *parts, optax.scale_by_learning_rate(learning_rate))

    make.__doc__ = f"Steps of `precond_ref.{factory.__qualname__}`: `scale_by_{name}`, weight decay, learning rate."
    rate = inspect.Parameter(
        "learning_rate", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=optax.ScalarOrSchedule
    )
    return _public(make, name, [rate, *(p for p in fields.values() if p.name != rate.name), *decay])


def _fields(factory: Callable[..., Method]) -> dict[str, inspect.Parameter]:
    return {p.name: p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(factory).parameters.values()}


def _keyword(name: str, annotation: str) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _public(make: Any, name: str, parameters: list[inspect.Parameter]) -> Any:
    """Return ``make`` under its public name, with these parameters and the options."""
    signature = inspect.Signature([*parameters, *(_keyword(option, "Any") for option in OPTIONS)])

    @functools.wraps(make)
    def function(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}() {error}") from None
        try:
            return make(**bound.arguments)
        except TypeError as error:
            if not any(isinstance(bound.arguments.get(argument), jax.Array) for argument in STATIC_ARGS.get(name, ())):
                raise
            hint = f"optax.inject_hyperparams needs static_args=precond_ref_jax.STATIC_ARGS[{name!r}]"
            raise TypeError(f"{str(error).partition(': optax.')[0]}: {hint}") from error

    function.__name__ = function.__qualname__ = name
    function.__module__ = "precond_ref_jax"
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


# ---- trees and leaves -----------------------------------------------------------------------------------------------


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _flatten(tree: Tree) -> tuple[list[str], list[Any], Any]:
    """Return paths, leaves (None counts as one) and structure."""
    found, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_none)
    return [_name(path) for path, _ in found], [leaf for _, leaf in found], treedef


def _masked(tree: Tree) -> set[str]:
    """Return the paths of the leaves that a mask left out of ``tree``."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    return {_name(path) for path, leaf in found if isinstance(leaf, optax.MaskedNode)}


def _pairs(join: Any) -> dict[str, str]:
    given = () if join is None else tuple(join) if isinstance(join, Iterable) else (join,)
    pairs = [tuple(pair) if isinstance(pair, (tuple, list)) else () for pair in given]
    names = [name for pair in pairs for name in pair if isinstance(name, str)]
    if len(names) != 2 * len(pairs) or any(len(pair) != 2 for pair in pairs) or len(set(names)) != len(names):
        raise ValueError(f"join must be pairs of paths (weight, bias), no path twice, got {join!r}")
    return dict(pairs)


def _joined_shape(weight: Any, bias: Any, axis: int) -> tuple[int, ...]:
    """Return the shape of a pair as one parameter; ValueError if weight and bias do not fit."""
    shapes = [() if x is None else np.shape(x) for x in (weight, bias)]
    if len(shapes[0]) != 2 or shapes[1] != (shapes[0][1 - axis],):
        kind = "(O, I)" if axis else "(I, O)"
        raise ValueError(f"join needs a weight {kind} and a bias (O,), got {shapes[0]} and {shapes[1]}")
    if weight.dtype != bias.dtype:
        raise TypeError(f"join needs one dtype, got {weight.dtype} and {bias.dtype}")
    return tuple(d + (i == axis) for i, d in enumerate(shapes[0]))


def _joined(parts: list[Array], axis: int) -> Array:
    """Return the arrays of a unit as one, with the bias last along ``axis``."""
    return parts[0] if len(parts) == 1 else jnp.concatenate([parts[0], jnp.expand_dims(parts[1], axis)], axis)


def _apart(array: Array, count: int, axis: int) -> list[Array]:
    """Return the arrays of a unit from a result of `_joined`."""
    if count == 1:
        return [array]
    return [array[:, :-1], array[:, -1]] if axis else [array[:-1], array[-1]]


def _spread(values: list[Any], treedef: Any) -> Tree:
    """Return one value for each leaf as trees: one tree for each array, in tuples like the arrays of a value.

    optax and flax take a tree with arrays only at its leaves for one like the parameters.
    """
    held = [value for value in values if _is_tuple(value)]
    if not held:
        return treedef.unflatten(values)
    longest = max(held, key=len)
    trees = []
    for i in range(len(longest)):
        blank = [None if value is None else optax.MaskedNode() for value in values]
        parts = [v[i] if _is_tuple(v) and i < len(v) else b for v, b in zip(values, blank, strict=True)]
        trees.append(_spread(parts, treedef))
    return type(longest)(*trees) if hasattr(longest, "_fields") else tuple(trees)


def _gather(what: str, treedef: Any, tree: Tree) -> list[Any]:
    """Return the values from a result of `_spread`; a leaf without arrays has a MaskedNode, None, or an empty tuple."""
    try:
        values = _up_to(what, treedef, tree)
    except ValueError:
        if not _is_tuple(tree):
            raise
    else:
        if not (_is_tuple(tree) and any(map(_is_tuple, values))):
            return values
    columns = [_gather(f"{what}[{i}]", treedef, part) for i, part in enumerate(tree)]
    rows = [[column[i] for column in columns] for i in range(treedef.num_leaves)]
    if hasattr(tree, "_fields"):
        absent = (type(None), optax.MaskedNode)
        return [row[0] if isinstance(row[0], absent) else type(tree)(*row) for row in rows]
    return [tuple(x for x in row if not isinstance(x, optax.MaskedNode)) for row in rows]


def _is_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and not isinstance(value, optax.MaskedNode)


def _up_to(what: str, treedef: Any, tree: Tree) -> list[Any]:
    try:
        return treedef.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{what} must have the structure of the updates: {error}") from error


@contextlib.contextmanager
def _named(name: str, *others: str) -> Iterator[None]:
    """Prefix errors with the parameters' paths."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if type(error) not in (ValueError, TypeError):  # JAX's own
            raise
        more = f" and {len(others)} more" if others else ""
        raise type(error)(f"{name or 'the parameter'}{more}: {error}") from error


def _full_products() -> contextlib.AbstractContextManager[Any]:
    """Compute products of float32 in float32, unless the user has chosen. By default GPUs take TF32, TPUs bfloat16."""
    chosen = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return jax.default_matmul_precision(chosen or "highest")


def _real(method: Method, leaf: Any) -> Array:
    """Return the leaf as an array; TypeError if it is not real."""
    if leaf is None or isinstance(leaf, optax.MaskedNode):
        raise ValueError(f"there is an update but no parameter, got {leaf}")
    array = jnp.asarray(leaf)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        rule = "does not support complex parameters" if jnp.iscomplexobj(array) else "takes real floating arrays"
        raise TypeError(f"{method.name} {rule}, got dtype {array.dtype} (optax.masked leaves it out)")
    return array


def _dtype(method: Method, dtype: Any, wanted: Any) -> Any:
    if wanted is not None:
        return jnp.dtype(wanted)
    narrow = method.narrow_state or jnp.finfo(dtype).bits >= 32
    return dtype if narrow else jnp.dtype(jnp.float32)


def _cache_key(method: Method) -> Any:
    try:
        hash(method)
    except TypeError:  # array-valued hyperparameters
        return id(method)
    return method


def _on_mesh(x: Array, like: Array) -> Array:
    """Return ``x`` on every device of the mesh of ``like``, if there is one; on one device ``jit`` compiles twice."""
    mesh = jax.typeof(like).sharding.mesh
    if mesh.empty or not jax.typeof(x).sharding.mesh.empty:
        return x
    if not isinstance(like, jax.core.Tracer):
        return jax.device_put(x, NamedSharding(like.sharding.mesh, PartitionSpec()))
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec())) if AxisType.Explicit in mesh.axis_types else x


def _like_params(method: Method) -> set[str]:
    """Return the state fields that are one array of the parameter's shape, seen on parameters with different axes."""
    integers = [value for value in vars(method).values() if isinstance(value, int) and value > 0]
    low, high = method.ndims
    found: list[set[str]] = []
    for ndim in range(max(low, 1), min(high, 8) + 1):
        for unit in (1, 7, 64 * math.lcm(*integers)):  # the last where sides must be multiples of something
            shape = tuple(unit * (2 + axis) for axis in range(ndim))
            with contextlib.suppress(ValueError):  # a structure for each axis, and another number of axes
                state = method.state_of(shape)._asdict()
                found.append({field for field, value in state.items() if getattr(value, "shape", None) == shape})
                if unit > 1:
                    break
    return set.intersection(*found) if found else set()
