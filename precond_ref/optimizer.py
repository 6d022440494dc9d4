"""`Optimizer`: methods on trees of parameters, with routing, learning rate, decay, stacking and bad gradients."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import numbers
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from array_api_compat import array_namespace, is_array_api_obj, is_jax_array
from array_api_compat import device as device_of

from precond_ref.fields import Flag, Integer, Real, is_zero
from precond_ref.methods.baselines import Adam
from precond_ref.numerics.arrays import all_finite
from precond_ref.numerics.refresh import is_traced
from precond_ref.protocol import Method, class_hint
from precond_ref.typing import Array, Namespace

Tree = Any
Slices = tuple[Any, ...]  # of slices


class OptimizerState(NamedTuple):
    """State of `Optimizer`: the state of a method for each group of parameters that are updated together."""

    step: Any
    """Number of steps done."""
    groups: tuple[Any, ...]
    """Method states, in the order of `Optimizer.describe`."""


class Group(NamedTuple):
    """Parameters (or blocks of them) that one call of ``update`` serves."""

    method: Method
    members: tuple[tuple[str, Slices | None], ...]
    """Path of each member, and the slices of its block (None: the whole parameter)."""
    shapes: tuple[tuple[int, ...], ...]
    """Shape of each member."""

    @property
    def name(self) -> str:
        """Path of the first member, and the number of the others."""
        more = f" and {len(self.members) - 1} more" if len(self.members) > 1 else ""
        return f"{self.members[0][0]}{more}"


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of a tree of parameters by methods: ``params, state = opt.step(params, grads, state)``.

    Each step makes ``x <- (1 - lr weight_decay) x - lr direction`` with the direction of the parameter's method.

    Arguments:
        method: the method of all parameters that it takes; the others get `Adam` with its defaults. `MBF` takes all,
            each with the ``kind`` for its number of axes.
        lr: the learning rate, or a callable that returns it for the number of steps done (0 at the first step).
        weight_decay: decoupled decay, a number, or a callable ``(path, array) -> number``. ValueError beside a method
            with a ``weight_decay`` of its own that is not zero.
        route: ``(path, array) -> Method``, instead of the rule of ``method``. A path joins keys by "/".
        on_nonfinite: the behaviour of a step in which some gradient or statistic is not finite. "propagate": the step
            gives NaN (no synchronisation); "skip": parameters, states and counters stay as they are (eager: one
            synchronisation); "raise": ValueError with the paths of these parameters, eager only.
        block_size: matrices and tensors are cut into blocks of at most this size on every axis. A method that is not
            elementwise treats each block as a parameter of its own. This changes the method.
        fuse: update parameters of one shape as one stack, and elementwise methods on one flat buffer. This changes
            only the speed.
        join: pairs of paths (weight, bias). Each weight (O, I) and bias (O,) become one parameter (O, I + 1), which has
            the path of the weight in route, decay, statistics and states.

    A tree is any nesting of dict, list, tuple and NamedTuple of arrays. No argument is ever changed.
    """

    method: Method
    lr: Any = field(default=1e-3, kw_only=True)
    weight_decay: Any = field(default=0.0, kw_only=True)
    route: Callable[[str, Array], Method] | None = field(default=None, kw_only=True)
    on_nonfinite: str = field(default="propagate", kw_only=True)
    block_size: int | None = field(default=None, kw_only=True)
    fuse: bool = field(default=True, kw_only=True)
    join: tuple[tuple[str, str], ...] = field(default=(), kw_only=True)
    _plans: dict[Any, tuple[Group, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise TypeError(
                f"method must be a Method such as precond_ref.ASGO(), got {self.method!r}{class_hint(self.method)}"
            )
        if not callable(self.lr):
            Real(ge=0).check("lr", self.lr)
        if not callable(self.weight_decay):
            Real(ge=0).check("weight_decay", self.weight_decay)
        if self.route is not None and not callable(self.route):
            raise TypeError(f"route must be a callable (path, array) -> Method or None, got {self.route!r}")
        if self.on_nonfinite not in ("propagate", "skip", "raise"):
            raise ValueError(f"on_nonfinite must be 'propagate', 'skip' or 'raise', got {self.on_nonfinite!r}")
        Integer(ge=1, optional=True).check("block_size", self.block_size)
        Flag().check("fuse", self.fuse)
        if not isinstance(self.join, (tuple, list)):
            raise TypeError(f"join must be a tuple of pairs of paths (weight, bias), got {self.join!r}")
        joined = [path for pair in self.join if isinstance(pair, (tuple, list)) and len(pair) == 2 for path in pair]
        if len(joined) != 2 * len(self.join) or len(set(joined)) != len(joined):
            raise ValueError(f"join must be pairs of paths (weight, bias), no path twice, got {self.join!r}")
        if self.route is None:
            self._check_decay(self.method)

    # ---- public -----------------------------------------------------------------------------------------------------

    def init(self, params: Tree) -> OptimizerState:
        """Return the state before the first step.

        ValueError or TypeError for leaves that are no arrays of one library, or that their method refuses.
        """
        leaves = _leaves(params, "params")
        xp = _check_fit(leaves, leaves)
        leaves = self._joined(leaves)
        states = []
        for group in self._plan(leaves):
            with _named(group):
                stacked = _gather(group, leaves, xp)
                states.append(group.method.init(stacked, stack_ndim=_stack_ndim(group)))
        return OptimizerState(step=0, groups=tuple(states))

    def step(
        self,
        params: Tree,
        grads: Tree,
        state: OptimizerState,
        *,
        refresh: Any = None,
        statistics: Mapping[str, Any] | None = None,
    ) -> tuple[Tree, OptimizerState]:
        """Return the new parameters and the new state; ``refresh`` overrules when the methods renew their roots.

        ``statistics`` has by path the argument ``statistic`` of the methods' ``update``. Of the parameters that are
        updated together, either all need a statistic, or none (``fuse=False`` separates them).
        ValueError or TypeError, with the path, for gradients that do not fit the parameters; no argument is changed.
        """
        _check_state(state)
        if not (statistics is None or isinstance(statistics, Mapping)):
            raise TypeError(f"statistics must be a mapping from paths or None, got {type(statistics).__name__}")
        leaves, gradients = _leaves(params, "params"), _leaves(grads, "grads")
        xp = _check_fit(leaves, gradients)
        joined, joined_gradients = self._joined(leaves), self._joined(gradients)
        groups = self._plan(joined)
        given = _statistics(groups, statistics or {}, xp)
        _check_state(state, len(groups))
        finite = True
        if self.on_nonfinite != "propagate" and gradients:
            arrays = [
                a for s in given for value in s.values() for a in (value if isinstance(value, tuple) else (value,))
            ]
            finite = all_finite(xp, *gradients.values(), *arrays)
            if not is_traced(finite):
                finite = bool(finite)
            elif self.on_nonfinite == "raise":
                raise ValueError("on_nonfinite='raise' needs eager execution; under jit use 'skip' or 'propagate'")
            if finite is False:
                if self.on_nonfinite == "skip":
                    return params, state
                bad = [path for path, g in gradients.items() if not bool(xp.all(xp.isfinite(g)))]
                where = ", ".join(bad) or "the statistics"
                raise ValueError(f"gradients and statistics must be finite (on_nonfinite='raise'), not so: {where}")

        lr = _rate("lr(step)", self.lr(state.step)) if callable(self.lr) else self.lr
        new_leaves: dict[str, Any] = {}
        new_states = []
        for group, group_state, statistic in zip(groups, state.groups, given, strict=True):
            with _named(group):
                param = _gather(group, joined, xp)
                direction, new_state = group.method.update(
                    _gather(group, joined_gradients, xp), group_state, param, refresh=refresh, xp=xp, **statistic
                )
            rate = _as_scalar(lr, param, xp)
            decay = self._decay(group, joined, param, xp)
            decayed = param if is_zero(decay) else param * (1 - rate * decay)
            new_param = decayed - rate * direction
            if finite is not True:
                new_param = xp.where(finite, new_param, param)
                new_state = _select(finite, new_state, group_state, xp)
            new_states.append(new_state)
            _scatter(group, new_param, new_leaves)
        step = state.step + 1 if finite is True else xp.where(finite, state.step + 1, state.step)
        merged = {path: _merge(value, xp) for path, value in new_leaves.items()}
        for weight, bias in self.join:
            merged[weight], merged[bias] = merged[weight][:, :-1], merged[weight][:, -1]
        return _rebuild(params, merged), OptimizerState(step=step, groups=tuple(new_states))

    def describe(self, params: Tree) -> list[Group]:
        """Return the groups of parameters that are updated together, each with its method."""
        return list(self._plan(self._joined(_leaves(params, "params"))))

    def unstack(self, params: Tree, state: OptimizerState) -> dict[str, Any]:
        """Return the method's state of each parameter by path (of each block by ``path[rows, columns]``)."""
        return {key: member for key, _, member in self._members(params, state)}

    def diagnose(self, params: Tree, state: OptimizerState) -> dict[str, Any]:
        """Return ``method.diagnose`` of each parameter by path."""
        return {key: method.diagnose(member) for key, method, member in self._members(params, state)}

    # ---- private ----------------------------------------------------------------------------------------------------

    def _members(self, params: Tree, state: OptimizerState) -> Iterator[tuple[str, Method, Any]]:
        groups = self.describe(params)
        _check_state(state, len(groups))
        for group, group_state in zip(groups, state.groups, strict=True):
            for i, (path, block) in enumerate(group.members):
                key = path if block is None else f"{path}[{', '.join(f'{s.start}:{s.stop}' for s in block)}]"
                yield key, group.method, _member(group, group_state, i)

    def _method_for(self, path: str, array: Array) -> Method:
        if self.route is None:
            return self.method.for_shape(tuple(array.shape), path) or Adam()
        method = self.route(path, array)
        if not isinstance(method, Method):
            raise TypeError(f"route must return a Method, got {method!r} for {path!r}{class_hint(method)}")
        self._check_decay(method)
        return method

    def _check_decay(self, method: Method) -> None:
        if not is_zero(method.weight_decay) and not is_zero(self.weight_decay):
            raise ValueError(
                f"weight_decay must be 0 beside a method with its own, got {self.weight_decay!r} and {method!r}"
            )

    def _joined(self, leaves: dict[str, Array]) -> dict[str, Array]:
        """Return ``leaves`` with each pair of ``join`` as one matrix, whose last column is the bias."""
        result = dict(leaves)
        for weight, bias in self.join:
            missing = [path for path in (weight, bias) if path not in leaves]
            if missing:
                raise ValueError(f"join names {', '.join(map(repr, missing))}, which the parameters do not have")
            w, b = leaves[weight], leaves[bias]
            if w.ndim != 2 or tuple(b.shape) != (w.shape[0],):
                raise ValueError(
                    f"join needs a weight (O, I) and a bias (O,), got {weight!r} {tuple(w.shape)} and {bias!r} "
                    f"{tuple(b.shape)}"
                )
            if w.dtype != b.dtype or _place(w) != _place(b):
                raise TypeError(
                    f"join needs one dtype and device, got {weight!r} {w.dtype} {_place(w)} and {bias!r} {b.dtype} "
                    f"{_place(b)}"
                )
            result[weight] = array_namespace(w, b).concat([w, b[:, None]], axis=1)
            del result[bias]
        return result

    def _plan(self, leaves: Mapping[str, Array]) -> tuple[Group, ...]:
        key = tuple((path, tuple(a.shape), str(a.dtype), _place(a)) for path, a in leaves.items())
        if key not in self._plans:
            grouped: dict[Any, list[tuple[Method, str, Slices | None, tuple[int, ...]]]] = {}
            for path, shape, dtype, place in key:
                method = self._method_for(path, leaves[path])
                for block, block_shape in self._blocks(method, shape):
                    label: Any = (_identity(method), dtype, place, None if method.elementwise else block_shape)
                    if not self.fuse:
                        label = (path, block_shape, block and tuple((s.start, s.stop) for s in block))
                    grouped.setdefault(label, []).append((method, path, block, block_shape))
            self._plans[key] = tuple(
                Group(g[0][0], tuple((path, block) for _, path, block, _ in g), tuple(shape for *_, shape in g))
                for g in grouped.values()
            )
        return self._plans[key]

    def _blocks(self, method: Method, shape: tuple[int, ...]) -> Iterator[tuple[Slices | None, tuple[int, ...]]]:
        size = self.block_size
        if size is None or method.elementwise or 0 in shape or all(d <= size for d in shape):
            yield None, shape
            return
        axes = [[slice(a, min(a + size, d)) for a in range(0, d, size)] for d in shape]
        for block in itertools.product(*axes):
            yield block, tuple(s.stop - s.start for s in block)

    def _decay(self, group: Group, leaves: Mapping[str, Array], param: Array, xp: Namespace) -> Any:
        if not callable(self.weight_decay):
            return _as_scalar(self.weight_decay, param, xp)
        name = "weight_decay(path, array)"
        rates = [_rate(name, self.weight_decay(path, leaves[path])) for path, _ in group.members]
        if all(isinstance(r, numbers.Real) and r == rates[0] for r in rates):
            return float(rates[0])
        whole = [
            xp.zeros_like(_block(leaves[p], b)) + _as_scalar(r, param, xp)
            for (p, b), r in zip(group.members, rates, strict=True)
        ]
        return _join(group, whole, xp)


# ---- trees ----------------------------------------------------------------------------------------------------------


def _leaves(tree: Tree, what: str) -> dict[str, Array]:
    """Return the arrays by path, sorted by path, so that the order of a dict's keys has no effect."""
    found: dict[str, Array] = {}
    for path, leaf in _walk(tree, ()):
        name = "/".join(path)
        if not is_array_api_obj(leaf):
            raise TypeError(f"{what} must be a nesting of dict, list and tuple of arrays, got {leaf!r} at {name!r}")
        if name in found:
            raise ValueError(f"{what} has two leaves with the path {name!r}")
        found[name] = leaf
    return dict(sorted(found.items()))


def _children(tree: Tree) -> list[tuple[str, Tree]] | None:
    if isinstance(tree, Mapping):
        return [(str(key), child) for key, child in tree.items()]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return list(zip(tree._fields, tree, strict=True))
    if isinstance(tree, (list, tuple)):
        return [(str(i), child) for i, child in enumerate(tree)]
    return None


def _walk(tree: Tree, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    children = _children(tree)
    if children is None:
        yield path, tree
        return
    for key, child in children:
        yield from _walk(child, (*path, key))


def _rebuild(tree: Tree, leaves: Mapping[str, Array], path: tuple[str, ...] = ()) -> Tree:
    """Return ``tree`` with each leaf replaced by the leaf of the same path in ``leaves``."""
    children = _children(tree)
    if children is None:
        return leaves["/".join(path)]
    new = [_rebuild(child, leaves, (*path, key)) for key, child in children]
    if isinstance(tree, Mapping):
        pairs = dict(zip(tree.keys(), new, strict=True))
        if type(tree) is dict:
            return pairs
        if isinstance(tree, dict):  # the constructor of a defaultdict takes other arguments
            copied = copy.copy(tree)
            copied.update(pairs)
            return copied
        return type(tree)(pairs)  # type: ignore[call-arg]
    return type(tree)(*new) if hasattr(tree, "_fields") else type(tree)(new)


def _check_fit(params: Mapping[str, Array], grads: Mapping[str, Array]) -> Namespace:
    if params.keys() != grads.keys():
        missing, extra = sorted(params.keys() - grads.keys()), sorted(grads.keys() - params.keys())
        raise ValueError(f"grads must have the structure of params; missing: {missing}, not in params: {extra}")
    for path, p in params.items():
        g = grads[path]
        if tuple(g.shape) != tuple(p.shape):
            raise ValueError(
                f"gradient at {path!r} must have its parameter's shape {tuple(p.shape)}, got {tuple(g.shape)}"
            )
        if g.dtype != p.dtype:
            raise TypeError(f"gradient at {path!r} must have its parameter's dtype {p.dtype}, got {g.dtype}")
        if _place(g) != _place(p):
            raise ValueError(f"gradient at {path!r} must be on its parameter's device {_place(p)}, got {_place(g)}")
    try:
        return array_namespace(*params.values(), *grads.values()) if params else None
    except TypeError as error:
        raise TypeError("params and grads must be arrays of one array-API namespace") from error


def _check_state(state: Any, groups: int | None = None) -> None:
    """Raise TypeError or ValueError unless ``state`` is a state of an `Optimizer` with this number of groups."""
    if not isinstance(state, OptimizerState):
        raise TypeError(f"state must be an OptimizerState, got {type(state).__name__}")
    if groups is not None and len(state.groups) != groups:
        raise ValueError(f"state has {len(state.groups)} groups, these parameters make {groups}: it is another tree's")


# ---- groups ---------------------------------------------------------------------------------------------------------


def _place(array: Array) -> str:
    return "" if is_jax_array(array) else str(device_of(array))


def _identity(method: Method) -> Any:
    """Return a key that equal methods share; a method with an array as hyperparameter shares it with itself only."""
    if not dataclasses.is_dataclass(method):
        return id(method)
    values = (getattr(method, f.name) for f in dataclasses.fields(method))
    return (type(method), *(v if isinstance(v, Hashable) else id(v) for v in values))


def _stack_ndim(group: Group) -> int:
    return int(len(group.members) > 1 and not group.method.elementwise)


def _block(array: Array, block: Slices | None) -> Array:
    return array if block is None else array[block]


def _join(group: Group, parts: list[Array], xp: Namespace) -> Array:
    """Return the members as one array: a flat buffer for elementwise methods, else a stack."""
    if len(parts) == 1:
        return parts[0]
    if group.method.elementwise:
        return xp.concat([xp.reshape(p, (-1,)) for p in parts])
    return xp.stack(parts)


def _gather(group: Group, leaves: Mapping[str, Array], xp: Namespace) -> Array:
    return _join(group, [_block(leaves[path], block) for path, block in group.members], xp)


def _statistics(groups: tuple[Group, ...], given: Mapping[str, Any], xp: Namespace) -> list[dict[str, Any]]:
    """Return for each group the keyword ``statistic`` of its update, or no keyword; a stack has stacked arrays."""
    result: list[dict[str, Any]] = []
    unknown = set(given)
    for group in groups:
        paths = [path for path, block in group.members if block is None]
        parts = [given[path] for path in paths if path in given]
        unknown -= set(paths)
        if parts and (len(parts) < len(paths) or len({type(p) for p in parts}) > 1):
            raise ValueError(
                f"statistics must be of one type for all of {', '.join(paths)} (updated together), or none"
            )
        shapes = {tuple(getattr(part[0] if isinstance(part, tuple) else part, "shape", ())) for part in parts}
        if len({shape[:1] if group.method.elementwise else shape for shape in shapes}) > 1:
            raise ValueError(
                f"statistics must be of one size for all of {', '.join(paths)} (updated together; fuse=False separates "
                f"them), got shapes {', '.join(map(str, sorted(shapes)))}"
            )
        if len(parts) > 1:
            if isinstance(parts[0], tuple):
                parts = [type(parts[0])(*(xp.stack(list(arrays)) for arrays in zip(*parts, strict=True)))]
            elif group.method.elementwise:  # (q, ...) each, joined like the flat buffer
                parts = [xp.concat([xp.reshape(part, (part.shape[0], -1)) for part in parts], axis=1)]
            else:
                parts = [xp.stack(parts, axis=1)]
        result.append({"statistic": parts[0]} if parts else {})
    if unknown:
        raise ValueError(
            f"statistics names {', '.join(sorted(map(str, unknown)))}: no parameter, or one joined or cut into blocks"
        )
    return result


def _split(group: Group, array: Array, index: int) -> Array:
    """Return member ``index`` of an array joined by `_join`."""
    if len(group.members) == 1:
        return array
    if not group.method.elementwise:
        return array[index, ...]
    sizes = [math.prod(shape) for shape in group.shapes]
    start = sum(sizes[:index])
    xp = array_namespace(array)
    return xp.reshape(array[start : start + sizes[index]], group.shapes[index])


def _scatter(group: Group, array: Array, leaves: dict[str, Any]) -> None:
    for index, (path, block) in enumerate(group.members):
        part = _split(group, array, index)
        if block is None:
            leaves[path] = part
        else:
            leaves.setdefault(path, {})[tuple(s.start for s in block)] = part


def _merge(value: Any, xp: Namespace) -> Array:
    """Return one array from its blocks, which are given by their first indices; joins axis by axis from the last."""
    while isinstance(value, dict):
        rows: dict[tuple[int, ...], list[Array]] = {}
        for start, part in sorted(value.items()):
            rows.setdefault(start[:-1], []).append(part)
        joined = {k: v[0] if len(v) == 1 else xp.concat(v, axis=len(k)) for k, v in rows.items()}
        value = joined.get((), joined)
    return value


def _member(group: Group, state: Any, index: int) -> Any:
    if state is None or isinstance(state, int):
        return state
    if isinstance(state, tuple):
        parts = [_member(group, s, index) for s in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state if state.ndim == 0 else _split(group, state, index)


def _select(finite: Array, new: Any, old: Any, xp: Namespace) -> Any:
    if old is None:
        return None
    if isinstance(old, tuple):
        parts = [_select(finite, n, o, xp) for n, o in zip(new, old, strict=True)]
        return type(old)(*parts) if hasattr(old, "_fields") else tuple(parts)
    return xp.where(finite, new, old)


def _rate(name: str, rate: Any) -> Any:
    """Return ``rate``, the value of a callable; ValueError or TypeError if it is no rate."""
    if isinstance(rate, numbers.Real) and not 0 <= float(rate) < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {rate!r}")
    if not isinstance(rate, numbers.Real) and getattr(rate, "shape", None) != ():
        raise TypeError(f"{name} must return a number or a 0-D array, got {rate!r}")
    return rate


def _as_scalar(value: Any, param: Array, xp: Namespace) -> Any:
    """Return ``value`` as a Python float, or as a 0-D array in the parameter's dtype."""
    return float(value) if isinstance(value, numbers.Real) else xp.astype(value, param.dtype)


class _named:
    """Context manager that puts the paths of a group before the errors of its method."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind in (ValueError, TypeError):
            raise kind(f"{self.group.name}: {error}") from error
