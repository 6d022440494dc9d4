"""Parameters updated by one call of a method: stacked, or on one flat buffer; eager, compiled, or on CuPy."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from array_api_compat import array_namespace
from torch import Tensor

from precond_ref import Method
from precond_ref_torch import distributed as sharding
from precond_ref_torch import states
from precond_ref_torch.passes import XP, Graph, Marks, Tape, Task, record

PIECE_BYTES = 2**20
"""Stacks and flat buffers on a CPU go through the method in pieces of this size, for its cache; calls cost time too."""
Foreign = tuple[Any, Callable[[Tensor], Any], Callable[[Any], Tensor], Callable[[], Any]]
EVERY = slice(None)
DTYPE = attrgetter("dtype")
CPU = torch.device("cpu")
Pairs = list[tuple[Tensor, Tensor]]
"""State tensors, each with the tensor that is to be written into it."""
Unit = tuple[Any, ...]
"""The tensors that are one parameter to a method: ``(parameter,)``, or ``(weight, bias)`` for a joined pair."""


def shape_of(unit: Unit) -> tuple[int, ...]:
    """Return the shape of a unit; a weight (O, I) and its bias (O,) are (O, I + 1)."""
    shape = tuple(unit[0].shape)
    return shape if len(unit) == 1 else (shape[0], shape[1] + 1)


def joined(parts: list[Tensor]) -> Tensor:
    """Return the tensors of a unit as one tensor, with the bias as its last column."""
    return parts[0] if len(parts) == 1 else torch.cat([parts[0], parts[1][:, None]], 1)


def cupy_engine(device: torch.device) -> Foreign:
    """Return CuPy's namespace, the conversions to and from it, and a context with PyTorch's memory and stream."""
    import cupy

    def context() -> Any:
        current = torch.cuda.current_stream(device)
        shared = SimpleNamespace(__cuda_stream__=lambda: (0, current.cuda_stream))  # not every PyTorch's has it
        stack = contextlib.ExitStack()
        stack.enter_context(cupy.cuda.Device(device.index))
        stack.enter_context(cupy.cuda.Stream.from_external(shared))
        return stack

    namespace = array_namespace(cupy.ndarray((0,), memptr=cupy.cuda.MemoryPointer(_no_memory(cupy), 0)))
    return namespace, cupy.from_dlpack, torch.utils.dlpack.from_dlpack, context


def _no_memory(cupy: Any) -> Any:
    return cupy.cuda.UnownedMemory(0, 1, None, 0)


def check_engine(engine: Any, compiled: Any, device: torch.device) -> None:
    """Raise ValueError or RuntimeError for an engine that cannot run on ``device``."""
    if engine not in ("torch", "cupy"):
        raise ValueError(f"Invalid engine: {engine!r} (it must be 'torch' or 'cupy')")
    if engine == "cupy":
        if compiled:
            raise ValueError("`compile` needs engine='torch', got engine='cupy'")
        try:
            import cupy
        except ImportError as error:
            raise RuntimeError(
                "engine='cupy' needs CuPy: install precond-ref[cuda12] or precond-ref[cuda13]"
            ) from error
        if not cupy.is_available():
            raise RuntimeError("engine='cupy' needs a CUDA GPU, and CuPy finds none")
        if device.type != "cuda":
            raise ValueError(f"engine='cupy' needs parameters on a CUDA device, got one on {device}")


class Piece(NamedTuple):
    """The share of a bucket that one call of the method updates: several parameters, or a part of a large one."""

    members: slice = EVERY
    """The units of this piece."""
    span: slice = EVERY
    """Their place in the common arrays."""
    part: slice | None = None
    """The entries of a unit that takes several calls."""


WHOLE = Piece()


class Bucket:
    """Units of one method, dtype, device and step, with their states in common arrays.

    ``entries`` (the optimizer's state of each unit's first parameter) hold views of these arrays, which are written in
    place.
    ``flat``: an elementwise method on the concatenation of this rank's parts of the parameters; otherwise whole
    parameters of one shape, stacked if there are several, and with ``owner`` set updated by that rank alone (``mine``:
    by this one).
    ``lent``: code outside has the entries' tensors, so these must stay as they are.
    """

    def __init__(
        self,
        method: Method,
        units: list[Unit],
        entries: list[Any],
        flat: bool,
        owner: int | None,
        mine: bool = True,
        lent: bool = False,
    ) -> None:
        self.method, self.units, self.entries, self.flat, self.owner = method, units, entries, flat, owner
        self.params = params = [unit[0] for unit in units]
        self.all_params = [param for unit in units for param in unit]
        self.mine = mine
        self.move: sharding.Move | None = None
        """Brings its matrices to their owners; several buckets share it. None if nothing travels."""
        self.places: list[int] = []
        """Number of each of `all_params` among the parameters of its mesh; empty for unsharded ones."""
        parts = [sharding.local(p) if flat else p for p in params]
        self.shapes = [tuple(part.shape) for part in parts] if flat else [shape_of(unit) for unit in units]
        self.uniform = not flat or len(set(self.shapes)) == 1
        self.sharded = sharding.is_sharded(params[0])
        self.dtype = states.work_dtype(method, params[0].dtype)
        self.device = parts[0].device
        self.size = sum(map(math.prod, self.shapes))
        shape = (self.size,) if flat else self.shapes[0]
        self.template = states.template(method, shape, self.dtype)
        self.kernel_key = (method, None if flat else shape, self.dtype, self.device)

        self.steps = torch.stack([entry["step"] for entry in entries])
        self.counted = states.has_value(self.steps)
        self.now = int(self.steps[0]) if self.counted else 0
        """Number of updates done; for fake parameters, by this bucket."""
        self.arrays: list[Tensor] = []
        columns: list[Any] = [self.steps.unbind()]
        names = ["step", *(states.to_dict(self.template) if self.mine else ())]
        for name in names[1:]:
            whole = self._join([sharding.local(entry[name]).detach() for entry in entries])
            if lent and len(self) == 1:  # which is not copied by joining it
                whole = whole.clone()
            self.arrays.append(whole)
            columns.append(
                [sharding.wrap(v, p) if flat else v for v, p in zip(self._split(whole), params, strict=True)]
            )
        self.views: list[dict[str, Tensor]] = [
            dict(zip(names, views, strict=True)) for views in zip(*columns, strict=True)
        ]
        for entry, views in zip(entries, self.views, strict=True):
            entry.update(views)
        self.kept = list(chain.from_iterable(map(dict.values, entries)))
        self.pieces = list(self._pieces()) if self.device.type == "cpu" else []
        self.large = any(piece.part is not None for piece in self.pieces)
        self.one = torch.ones((), dtype=self.dtype, device=self.device)
        self.zeros: list[Tensor] = []
        self.spans: dict[Any, list[Tensor]] = {}
        """The states of each piece, by its place."""
        self.room: tuple[Any, ...] = (None,)
        """Memory of the optimizer for joined gradients; the needed part of it, as a stack, and cut into parts."""
        self.compiled: tuple[Any, ...] = (None,)
        """The name of a compiler, and its graph."""
        self.called: tuple[Any, ...] = (None,)
        """The memory of a lone parameter, the graph that moved it, its arguments, and the places of changing ones."""

    def _pieces(self) -> Iterator[Piece]:
        """Yield neighbours that fit in a CPU's cache together, and parts of this size of larger units."""
        size = max(PIECE_BYTES // self.dtype.itemsize, 1)
        first, start, end = 0, 0, 0
        for index, shape in enumerate([*self.shapes, (size + 1,)]):
            if end + math.prod(shape) > start + size and index > first:
                members = slice(first, index)
                if not self.flat:
                    yield Piece(members, members)
                elif end - start <= size or not states.is_own(self.method):
                    yield Piece(members, slice(start, end))
                else:
                    for at in range(start, end, size):
                        to = min(at + size, end)
                        yield Piece(members, slice(at, to), slice(at - start, to - start))
                first, start = index, end
            end += math.prod(shape)

    def __len__(self) -> int:
        return len(self.params)

    def zero(self) -> Tensor:
        """Return a new 0-D zero of the parameters' dtype."""
        if not self.zeros:
            self.zeros = list(torch.zeros(64, dtype=self.params[0].dtype, device=self.device).unbind())
        return self.zeros.pop()

    def holds(self, state: Mapping[Any, Any]) -> bool:
        """Return True if ``state`` (the optimizer's) still has the entries and views of this bucket."""
        if not all(map(is_, map(state.get, self.params), self.entries)):
            return False
        found = list(chain.from_iterable(map(dict.values, self.entries)))
        if len(found) != len(self.kept) or not all(map(is_, found, self.kept)):
            if any(e.get(k) is not v for e, own in zip(self.entries, self.views, strict=True) for k, v in own.items()):
                return False
            self.kept = found  # a wrapper changed what it keeps beside them
        return True

    def count(self, units: int, step: int) -> None:
        """Set the counters of the first ``units``."""
        (self.steps if units == len(self) else self.steps[:units]).fill_(step)
        self.now = step

    def in_step(self) -> bool:
        """Return True if all members' counters are ``now``; a user may have set them."""
        if self.counted:
            counts = self.steps.tolist()
            self.now = counts[0]
            return bool(counts.count(self.now) == len(counts))
        return True

    def release(self) -> None:
        """Give each entry tensors of its own."""
        if len(self) == 1:
            return
        for entry, views, param in zip(self.entries, self.views, self.params, strict=True):
            for name, view in views.items():
                if entry.get(name) is view:
                    copy = sharding.local(view).clone()
                    entry[name] = sharding.wrap(copy, param) if sharding.is_sharded(view) else copy

    def _join(self, parts: list[Tensor]) -> Tensor:
        if self.uniform:
            whole = parts[0].contiguous() if len(parts) == 1 else torch.stack(parts)
            if self.flat:
                return whole.reshape(-1)  # a stack of channels_last arrays is not contiguous
            return whole[None] if len(parts) == 1 < len(self) else whole
        return torch.cat([part.reshape(-1) for part in parts])

    def _split(self, whole: Tensor, members: slice = EVERY) -> list[Tensor]:
        shapes = self.shapes[members]
        if not self.flat:
            return [whole] if len(self) == 1 else list(whole.unbind())
        if self.uniform:
            return list(whole.view(len(shapes), *shapes[0]).unbind())
        pieces = torch.split(whole, [math.prod(shape) for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def values(self, piece: Piece = WHOLE) -> list[Tensor]:
        """Return the parameters of this piece as plain tensors: for a DTensor, this rank's part."""
        if len(self.all_params) == len(self):
            params = self.params[piece.members]
        else:
            params = [param for unit in self.units[piece.members] for param in unit]
        if self.sharded:
            params = [sharding.local(p) for p in params]
        return params if piece.part is None else [p.view(-1)[piece.part] for p in params]

    def parts(self, directions: list[Tensor], members: slice = EVERY) -> list[Tensor]:
        """Return the part of these units' ``directions`` that belongs to each of `values`."""
        if len(self.all_params) == len(self):
            return directions
        pairs = zip(self.units[members], directions, strict=True)
        return [part for unit, d in pairs for part in ([d] if len(unit) == 1 else [d[:, :-1], d[:, -1]])]

    # ---- the update -------------------------------------------------------------------------------------------------

    def gather(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return this rank's parts of the gradients, and of the parameters if the method reads them."""
        reads = self.method.reads_param
        if not self.sharded and len(self.all_params) == len(self):
            return [p.grad for p in self.params], self.params if reads else []
        grads = [joined([sharding.local(sharding.aligned_grad(p)) for p in unit]) for unit in self.units]
        params = [joined([sharding.local(p) for p in unit]) for unit in self.units] if reads else []
        return grads, params

    def cut(self, options: Mapping[str, Any], statistic: Any = None) -> list[Piece]:
        """Return the pieces of an update, in order."""
        eager = not options["compile"] and options["engine"] == "torch"
        if not eager or statistic is not None or len(self.pieces) < 2:
            return [WHOLE]
        return [WHOLE] if self.large and not all(map(Tensor.is_contiguous, self.values())) else self.pieces

    def directions(
        self,
        grads: list[Tensor],
        params: list[Tensor],
        step: int,
        scalars: Any,
        options: Mapping[str, Any],
        kernels: Any,
        statistic: Any,
        marks: Marks,
        pieces: Sequence[Piece] = (WHOLE,),
    ) -> Iterator[tuple[Piece, list[Tensor], Pairs]]:
        """Yield for each piece: itself, its directions in the dtype of the arithmetic, and its new states.

        Only states that ``marks`` tells of are changed yet. The next piece may overwrite directions and new states.
        """
        given = {} if statistic is None else {"statistic": statistic}
        members: slice | None = None
        for piece in pieces:
            if piece.members != members:
                members = piece.members
                whole, values = self._join(grads[members]), self._join(params[members]) if params else None
            grad = (whole if piece.part is None else whole[piece.part]).detach().to(self.dtype)
            if options["maximize"]:
                grad = -grad
            # a method that does not read the parameter's values gets others
            param = grad
            if values is not None:
                param = (values if piece.part is None else values[piece.part]).detach().to(self.dtype)
            if options["compile"]:
                found, pairs = self._compiled(grad, param, step, scalars, given, options["compile"], kernels)
            elif options["engine"] == "cupy":
                found, pairs = self._foreign(grad, param, step, scalars, given, cupy_engine(self.device))
            else:
                tape = None if given else self._tape(kernels)
                found, pairs = self._eager(grad, param, step, scalars, given, piece, tape, marks)
            if found.shape != grad.shape:
                raise ValueError(f"update returned a direction of shape {list(found.shape)} for {list(grad.shape)}")
            yield piece, self._split(found, members) if piece.part is None else [found], pairs

    def _tape(self, kernels: dict[Any, Any]) -> Tape | None:
        """Return the recorded update of pieces on a CPU, or None."""
        if not (self.flat and self.pieces and self.counted):
            return None
        key = "tape", self.method, self.dtype
        if key not in kernels:
            kernels[key] = record(self.method, self.template, self.dtype, self.device)
        found: Tape | None = kernels[key]
        return found

    def _eager(
        self,
        grad: Tensor,
        param: Tensor,
        step: int,
        scalars: Any,
        given: Any,
        piece: Piece,
        tape: Tape | None,
        marks: Marks,
    ) -> tuple[Tensor, Pairs]:
        arrays, span = self.arrays, piece.span
        if span is not EVERY:
            if span.start not in self.spans:
                self.spans[span.start] = [array[span] for array in self.arrays]
            arrays = self.spans[span.start]
        if tape is not None and grad.numel() <= PIECE_BYTES // self.dtype.itemsize:
            again = tape.start(marks, piece)
            direction, *new = tape(grad, arrays, param, scalars, marks.tensors, again)
            return direction, _changed(arrays, new)
        state = states.fill(self.template, iter(arrays), step)
        direction, made = self.method.update(grad, state, param, scalars=scalars, xp=XP, **given)
        return direction, _changed(arrays, states.tensors(made))

    def _foreign(
        self, grad: Tensor, param: Tensor, step: int, scalars: Any, given: Any, engine: Foreign
    ) -> tuple[Tensor, Pairs]:
        xp, enter, leave, context = engine
        with context():
            state = states.fill(self.template, (enter(array) for array in self.arrays), step)
            given = {name: _map(enter, value) for name, value in given.items()}
            direction, new = self.method.update(enter(grad), state, enter(param), scalars=scalars, xp=xp, **given)
            return leave(direction), _changed(self.arrays, [leave(array) for array in states.tensors(new)])

    def _compiled(
        self, grad: Tensor, param: Tensor, step: int, scalars: Any, given: Any, backend: Any, kernels: dict[Any, Any]
    ) -> tuple[Tensor, Pairs]:
        key = (*self.kernel_key, backend)
        if key not in kernels:
            kernels[key] = _kernel(self.method, backend)
        state = states.fill(self.template, iter(self.arrays), 0)
        scalars = in_tensors(scalars, self.dtype)
        direction, new = kernels[key](grad, state, param, scalars, self.method.due(step), given)
        return direction, _changed(self.arrays, new)

    def graph(self, backend: bool | str, kernels: dict[Any, Any]) -> Graph:
        """Return the compiled update of an elementwise method; it writes its states."""
        if self.compiled[0] != backend:
            key = (*self.kernel_key, backend)
            if key not in kernels:
                kernels[key] = Graph(self.method, self.template, self.dtype, backend)
            self.compiled = backend, kernels[key]
        made: Graph = self.compiled[1]
        return made

    def lone(self, grads: list[Tensor], common: Any) -> Any:
        """Return graph and arguments that move the only parameter, if its entries are dense in memory; else None.

        The result of the last step is used again while the parameter stays in the same memory.
        """
        if len(self.params) > 1:
            return None
        param = sharding.local(self.params[0]) if self.sharded else self.params[0]
        if not param.is_contiguous():
            return None
        grad = grads[0].detach().reshape(-1)
        _, scalars, rates, *constants = common
        place = (param.data_ptr(), len(rates), *constants) if self.counted else None
        if place is not None and place == self.called[0]:
            _, graph, arguments, changing = self.called
            for slot, value in zip(changing, (grad, *scalars, *rates), strict=True):
                if slot is not None:
                    arguments[slot] = value
            return graph, arguments
        graph, arguments = common[0].ready(Task(grad, self.arrays, param.detach().view(-1), True, *common[1:]))
        if isinstance(arguments, list):  # a list has none but tensors and sizes
            where = {id(value): slot for slot, value in enumerate(arguments)}
            self.called = place, graph, arguments, [where.get(id(value)) for value in (grad, *scalars, *rates)]
        return graph, arguments

    def gathered(
        self, grads: list[Tensor], params: list[Tensor], kernels: dict[Any, Any]
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Return flat gradients, flat ``params``, and the gradients in parts; the next bucket uses the same memory."""
        key, count = ("room", self.dtype, self.device), self.size
        if key not in kernels or kernels[key].numel() < count:
            kernels[key] = torch.empty(count, dtype=self.dtype, device=self.device)
        if self.room[0] is not kernels[key]:
            flat = kernels[key][:count]
            whole = flat.view(len(self), *self.shapes[0]) if self.uniform else None
            self.room = kernels[key], flat, whole, self._split(flat)
        _, flat, whole, parts = self.room
        if whole is not None and {*map(DTYPE, grads)} == {self.dtype}:
            torch.stack(grads, out=whole)
        else:
            torch._foreach_copy_(parts, grads)
        return flat, self._join(params).detach() if params else None, parts

    def statistic(self, given: Mapping[Any, Any]) -> Any:
        """Return the argument ``statistic`` of the method's ``update``, joined like the gradients, or None.

        ValueError or TypeError for statistics that do not fit.
        """
        pairs = [(given[p], shape) for p, shape in zip(self.params, self.shapes, strict=True) if p in given]
        if not pairs:
            return None
        if self.owner is not None or self.sharded:
            raise ValueError("statistics of sharded parameters (DTensor) are not supported")
        found = [self._fitting(value, shape) for value, shape in pairs]
        if len(found) < len(self) or len({type(value) for value in found}) > 1:
            raise ValueError(
                f"statistics must be of one type for all parameters of size {list(self.shapes[0])} that "
                f"{self.method.name} updates together, or none: a parameter group of its own separates one"
            )
        if len(found) == 1 and not self.flat:
            return found[0]
        counts = {
            str(_map(lambda a: a.shape[0], value)) if self.flat else str(_map(lambda a: list(a.shape), value))
            for value in found
        }
        if len(counts) > 1:
            raise ValueError(
                f"statistics of parameters that {self.method.name} updates together must have one number of "
                f"samples, got {' and '.join(map(str, sorted(counts)))}"
            )
        if isinstance(found[0], tuple):
            return type(found[0])(*(torch.stack(arrays) for arrays in zip(*found, strict=True)))
        return torch.cat([a.flatten(1) for a in found], 1) if self.flat else torch.stack(found, 1)

    def _fitting(self, value: Any, shape: tuple[int, ...]) -> Any:
        """Return the statistic of one unit in the arithmetic's dtype; ValueError or TypeError if it does not fit."""
        try:
            for part in value if isinstance(value, tuple) else (value,):
                if not isinstance(part, Tensor) or part.is_complex():
                    raise TypeError(f"it must be a real tensor or a NamedTuple of some, got {type(value).__name__}")
            value = _map(lambda a: a.detach().to(self.device, self.dtype), value)
            self.method.check_statistic(value, torch.empty(shape, dtype=self.dtype, device="meta"))
        except (TypeError, ValueError) as error:
            name = self.method.name
            raise type(error)(
                f"statistics: for a parameter of size {list(shape)}, updated by {name}: {error}"
            ) from None
        return value


def in_tensor(number: Any, dtype: torch.dtype) -> Tensor:
    """Return a number as a 0-D tensor on the CPU, which a graph does not take for a constant."""
    make = torch.scalar_tensor if type(number) is float else torch.as_tensor  # the first takes half the time
    return make(number, dtype=dtype, device=CPU)


def in_tensors(numbers: Any, dtype: torch.dtype) -> Any:
    """Return a NamedTuple of numbers as one of 0-D tensors."""
    return type(numbers)(*(in_tensor(n, dtype) for n in numbers)) if numbers else numbers


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Return ``function`` of an array, or of each array of a NamedTuple."""
    return type(value)(*map(function, value)) if isinstance(value, tuple) else function(value)


def _changed(old: list[Tensor], new: list[Tensor]) -> Pairs:
    pairs = [(o, n) for o, n in zip(old, new, strict=True) if o is not n]
    wrong = [(o, n) for o, n in pairs if o.shape != n.shape]
    if wrong:
        raise ValueError(f"update returned a state of shape {list(wrong[0][1].shape)} for {list(wrong[0][0].shape)}")
    return pairs


def write(pairs: Pairs) -> None:
    """Write the new states into the old ones; a second call changes nothing."""
    if pairs:
        torch._foreach_copy_([old for old, _ in pairs], [new for _, new in pairs])


def _kernel(method: Method, backend: bool | str) -> Callable[..., Any]:
    """Return the compiled update of a method that is not elementwise."""

    def kernel(grad: Tensor, state: Any, param: Tensor, scalars: Any, refresh: Any, given: Any) -> Any:
        direction, new = method.update(grad, state, param, scalars=scalars, refresh=refresh, xp=XP, **given)
        return direction, states.tensors(new)

    kernel.__code__ = kernel.__code__.replace()  # graphs are cached, and their number limited, per code object
    return torch.compile(kernel, fullgraph=True, backend="inductor" if backend is True else str(backend))


def partition(labels: Iterator[tuple[Any, int, Any]], limit: int, alone: int) -> list[list[Any]]:
    """Return the members with equal labels together, in order, cut where their sizes add up to more than ``limit``.

    A member larger than ``alone`` is alone.
    """
    groups: dict[Any, list[list[Any]]] = {}
    sizes: dict[Any, int] = {}
    large = []
    for label, size, member in labels:
        if size > alone:
            large.append([member])
            continue
        if label not in groups or sizes[label] + size > limit:
            groups.setdefault(label, []).append([])
            sizes[label] = 0
        groups[label][-1].append(member)
        sizes[label] += size
    return [members for parts in groups.values() for members in parts] + large
