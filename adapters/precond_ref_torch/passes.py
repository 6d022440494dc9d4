"""Elementwise updates with few passes over memory: one compiled graph that writes in place, or a recorded eager one.

Both are made from the method's own ``update``; neither knows its mathematics.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from array_api_compat import array_namespace
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from precond_ref import Method
from precond_ref_torch import states
from precond_ref_torch.interrupts import interrupts_deferred

XP = array_namespace(torch.empty(0))
LAYOUT = attrgetter("shape", "dtype", "device")


def lookup(backend: bool | str) -> Callable[..., Any]:
    """Return the compiler that an optimizer's ``compile`` names."""
    from torch._dynamo import lookup_backend

    return lookup_backend("inductor" if backend is True else str(backend))


# ---- compiled -------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One compiled update of flat arrays of n entries; all tensors are of shape (n,) unless noted."""

    grad: Tensor
    """The gradient. Without ``moves`` it is of the arithmetic's dtype, and the direction is written into it."""
    arrays: list[Tensor]
    """State arrays, written in place."""
    param: Tensor | None
    """The parameter: moved with ``moves``, else only read; None if neither."""
    moves: bool
    """True if the graph moves the parameter."""
    scalars: Any
    """The result of `Method.scalars`, as 0-D tensors."""
    rates: tuple[Tensor, ...]
    """Learning rate, and weight decay if there is one, as 0-D tensors."""
    maximize: bool
    """True to climb."""
    due: Any
    """The result of `Method.due`."""
    given: dict[str, Any]
    """``statistic``, or empty."""


class Graph:
    """A method's compiled update. ``x <- x - lr (direction + weight_decay x)`` is part of it.

    A new number of entries, or a new constant, goes through Dynamo with all its guards; the graph that they choose is
    called directly from then on, which takes a quarter of the time of a small call.
    """

    def __init__(self, method: Method, template: Any, dtype: torch.dtype, backend: bool | str) -> None:
        self.compiler = lookup(backend)
        self.seen: Any = None
        """The compiled graph and its arguments, of a call through Dynamo."""
        self.chosen: dict[Any, tuple[Callable[..., Any], list[int | None]]] = {}
        """The graph by entries and constants, and the index of each argument's tensor (None: the number of entries)."""

        def kernel(
            grad: Tensor,
            arrays: Any,
            param: Any,
            moves: Any,
            scalars: Any,
            rates: Any,
            maximize: Any,
            due: Any,
            given: Any,
        ) -> None:
            g = -grad.to(dtype) if maximize else grad.to(dtype)
            x = g if param is None else param.to(dtype)  # a method that does not read the parameter gets others
            state = states.fill(template, iter(arrays), 0)
            direction, new = method.update(g, state, x, scalars=scalars, refresh=due, xp=XP, **given)
            direction = direction.reshape(grad.shape)
            for old, fresh in zip(arrays, states.tensors(new), strict=True):
                old.copy_(fresh)
            if moves:
                param.copy_(x - rates[0] * (direction + rates[1] * x if len(rates) > 1 else direction))
            else:
                grad.copy_(direction)

        kernel.__code__ = kernel.__code__.replace()  # graphs are cached, and their number limited, per code object
        self.compiled = torch.compile(kernel, fullgraph=True, backend=self._backend)

    def _backend(self, module: Any, inputs: Any) -> Callable[..., Any]:
        compiled = self.compiler(module, inputs)

        def graph(*given: Any) -> Any:
            self.seen = compiled, given
            return compiled(*given)

        return graph

    def ready(self, task: Task) -> tuple[Callable[..., Any], Any]:
        """Return the callable for ``task``, and its arguments."""
        n = task.grad.shape[0]
        tensors = [task.grad, *task.arrays, *task.scalars, *task.rates]
        if task.param is not None:
            tensors.append(task.param)
        constants = (n, task.moves, task.param is None, len(task.rates), task.maximize, task.due)
        if not task.given and constants in self.chosen:
            graph, order = self.chosen[constants]
            return graph, [n if index is None else tensors[index] for index in order]
        return self._guarded, (task, constants, tensors)

    def _guarded(self, task: Task, constants: Any, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if tensor.ndim:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            self.compiled(*task)
            if not task.given and self.seen is not None:
                self._choose(constants, task.grad.shape[0], tensors)
        finally:
            self.seen = None

    def _choose(self, constants: Any, n: int, tensors: list[Tensor]) -> None:
        """Remember the graph that was called, if its arguments are these tensors and their entries alone."""
        graph, given = self.seen
        index = {id(tensor): i for i, tensor in enumerate(tensors)}
        entries = n if all(tensor.storage_offset() != n for tensor in tensors) else None
        order = [None if type(value) is int and value == entries else index.get(id(value), -1) for value in given]
        if -1 not in order:
            self.chosen[constants] = graph, order


# ---- eager ----------------------------------------------------------------------------------------------------------


POINTWISE = {
    "abs", "add", "addcdiv", "addcmul", "bitwise_and", "bitwise_not", "bitwise_or", "clamp", "div", "eq", "exp", "ge",
    "gt", "le", "lerp", "log", "logical_and", "logical_not", "logical_or", "lt", "maximum", "minimum", "mul", "ne",
    "neg", "pow", "reciprocal", "rsqrt", "sign", "sqrt", "square", "sub", "where",
}  # fmt: skip
"""Operations of a tape: entry i of the result depends on entry i of the arguments, and ``out`` may be one of them."""
ARITHMETIC: dict[Callable[..., Tensor], Callable[..., float]] = {
    torch.add: operator.add, torch.sub: operator.sub, torch.mul: operator.mul, torch.neg: operator.neg,
}  # fmt: skip
"""Operations on numbers that Python rounds like float64 tensors, without an error for any number."""
SAMPLE = 3
"""Entries of the arrays that a tape is recorded with."""


class _Recorder(TorchDispatchMode):
    """Record each operation with its arguments and result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Call(NamedTuple):
    """One call of a tape."""

    function: Callable[..., Tensor]
    slots: list[int]
    """The slots of its arguments."""
    options: dict[str, Any]
    slot: int
    """The slot of its result."""
    mark: int | None
    """For an average that is written into its state: the number of its mark."""


class Marks:
    """How far a tape has come: a state of ``piece`` is renewed if the tensor in its place is not zero."""

    def __init__(self) -> None:
        self.piece: Any = None
        self.tensors: list[Tensor] = []

    def begun(self, piece: Any) -> bool:
        """Return True if a state of ``piece`` is renewed."""
        return piece is self.piece and any(map(bool, self.tensors))


class Tape:
    """The operations of one eager update, recorded once and repeated without any of the Python between them.

    A state that is read by its own average alone is written in place, in one call with a mark: a tape that was
    interrupted and is called again leaves it out. Other results lie until the next call in kept memory, with as many
    arrays as are in use at a time. Numbers that depend on the step are Python's until a call needs them.
    """

    def __init__(self, method: Method, template: Any, dtype: torch.dtype, device: torch.device) -> None:
        def sample(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.full(shape, 0.5, dtype=dtype, device=device)  # a random one would move the user's generator

        self.dtype, self.device = dtype, device
        inputs = [sample((SAMPLE,), dtype) for _ in range(2 + len(states.tensors(template)))]
        made = method.scalars(2)
        numbers = [sample((), torch.float64) for _ in made]
        with interrupts_deferred(), _Recorder() as recorder:  # one that is interrupted as it ends stays on
            state = states.fill(template, iter(inputs[1:-1]), 1)
            scalars = type(made)(*numbers) if numbers else made
            direction, new = method.update(inputs[0], state, inputs[-1], scalars=scalars, xp=XP)
        self.scalars: Any = self  # no step's
        self.fixed: list[Any] = []
        """The values after the inputs: the step's numbers, results from these alone, and constants."""
        self.real: set[int] = set()
        """The places of numbers that stand for 0-D float64 tensors."""
        self.numbers: list[Any] = []
        """The same in the dtype of the arrays, so that no call converts them."""
        self.marks = 0
        """The number of states that are written in place."""
        self.unused: list[Tensor] = []
        self.one = torch.ones((), dtype=dtype, device=device)
        self.once: list[Call] = []
        """The calls whose arguments are the step's numbers alone."""
        self.each: list[Call] = []
        self.kinds: list[torch.dtype] = []
        """Dtypes of the kept arrays."""
        self.kept: dict[int, list[Tensor]] = {}
        """The kept arrays, by the number of their entries in use."""
        self._allocate(inputs, numbers, recorder.calls, [direction, *states.tensors(new)])

    def _allocate(self, inputs: list[Tensor], numbers: list[Tensor], calls: list[Any], results: list[Tensor]) -> None:
        """Give every argument and result a slot; ValueError for an operation that a tape cannot repeat."""
        places: dict[int, Any] = {id(tensor): ("input", i) for i, tensor in enumerate(inputs)}
        places |= {id(tensor): ("fixed", i) for i, tensor in enumerate(numbers)}
        self.fixed, self.real = list(numbers), set(range(len(numbers)))
        same: dict[int, int] = {}  # of a copy: nothing is written but what is kept, so that the original will do
        last: dict[int, int] = {}
        for at, (func, args, _, result) in enumerate(calls):
            last.update({same.get(id(value), id(value)): at for value in args if isinstance(value, Tensor)})
            if func.overloadpacket.__name__ == "_to_copy" and LAYOUT(args[0]) == LAYOUT(result):
                same[id(result)] = same.get(id(args[0]), id(args[0]))
        last.update({same.get(id(result), id(result)): len(calls) for result in results})
        own = self._averages(inputs, calls, results, same)
        free: list[int] = []

        def place(value: Any, function: str) -> Any:
            if isinstance(value, Tensor):
                if same.get(id(value), id(value)) not in places:
                    raise ValueError("a tensor from elsewhere")
                return places[same.get(id(value), id(value))]
            if function in ("add", "div", "mul", "sub") and isinstance(value, (int, float)):
                value = float(value)
                self.real.add(len(self.fixed))  # a tensor takes half the time of a number
            self.fixed.append(value)
            return "fixed", len(self.fixed) - 1

        found = []
        for at, (func, args, kwargs, result) in enumerate(calls):
            name = func.overloadpacket.__name__
            if not any(isinstance(value, Tensor) for value in args) and result.shape == ():  # a constant
                places[id(result)] = "fixed", len(self.fixed)
                self._fix(result)
                continue
            if id(result) in same:
                continue
            if func.namespace != "aten" or name not in POINTWISE or not isinstance(result, Tensor):
                raise ValueError(f"{func} is no operation on each entry")
            if any(isinstance(value, Tensor) for value in kwargs.values()):
                raise ValueError(f"{func} has a tensor by name")
            arguments = [place(value, name) for value in args]
            vector = result.shape == (SAMPLE,)
            mark = None
            if vector:
                for value in dict.fromkeys(same.get(id(v), id(v)) for v in args if isinstance(v, Tensor)):
                    if places[value][0] == "kept" and last[value] == at:
                        free.append(places[value][1])
                slot = next((i for i in free if self.kinds[i] == result.dtype), None)
                if at in own:
                    mark, self.marks = self.marks, self.marks + 1
                    places[id(result)] = places[id(args[0])]
                elif slot is None:
                    places[id(result)] = "kept", len(self.kinds)
                    self.kinds.append(result.dtype)
                else:
                    free.remove(slot)
                    places[id(result)] = "kept", slot
            else:
                self.fixed.append(None)
                places[id(result)] = "fixed", len(self.fixed) - 1
            found.append((getattr(torch, name), arguments, kwargs, places[id(result)], mark, vector))
        first = {"input": 0, "fixed": len(inputs), "kept": len(inputs) + len(self.fixed)}
        self.inputs = len(inputs)
        for function, arguments, kwargs, (kind, index), mark, vector in found:
            call = Call(function, [first[k] + i for k, i in arguments], kwargs, first[kind] + index, mark)
            (self.each if vector else self.once).append(call)
        self.results = [first[k] + i for k, i in (place(result, "") for result in results)]

    def _averages(self, inputs: list[Tensor], calls: list[Any], results: list[Tensor], same: Any) -> set[int]:
        """Return the calls ``old.lerp(new, weight)`` that make a state from the old one, which is read nowhere else."""
        made = {id(result): at for at, (*_, result) in enumerate(calls)}
        reads = [
            same.get(id(value), id(value)) for _, args, _, _ in calls for value in args if isinstance(value, Tensor)
        ]
        averages = set()
        for old, new in zip(inputs[1:-1], results[1:], strict=True):
            if id(new) in made:
                func, args, _, _ = calls[made[id(new)]]
                if func is torch.ops.aten.lerp.Scalar and args[0] is old and reads.count(id(old)) == 1:
                    averages.add(made[id(new)])
        return averages

    def start(self, marks: Marks, piece: Any) -> bool:
        """Say that the next call updates ``piece``. Return True if a call for it was interrupted."""
        again = marks.piece is piece
        if not again:
            if len(self.unused) < self.marks:
                self.unused = list(torch.zeros(64 * self.marks, dtype=self.dtype, device=self.device).unbind())
            marks.tensors = [self.unused.pop() for _ in range(self.marks)]
            marks.piece = piece
        return again

    def __call__(
        self, grad: Tensor, arrays: list[Tensor], param: Tensor, scalars: Any, marks: list[Tensor], again: bool = False
    ) -> list[Tensor]:
        """Return the direction and the tensors of the new state; ``again`` after an interrupted call."""
        if scalars is not self.scalars:
            self._renew(scalars)
        n = grad.shape[0]
        kept = self.kept.get(n)
        if kept is None:
            kept = self._room(n)
        values: list[Any] = [grad, *arrays, param, *self.numbers, *kept]
        for function, slots, options, slot, mark in self.each:
            given = [values[i] for i in slots]
            if mark is None:
                function(*given, out=values[slot], **options)
            elif not (again and marks[mark]):
                torch._foreach_lerp_([given[0], marks[mark]], [given[1], self.one], given[2])
        return [values[i] for i in self.results]

    def _renew(self, scalars: Any) -> None:
        """Take the numbers of another step."""
        first, self.scalars = not self.numbers, self
        self.fixed[: len(scalars)] = map(float, scalars)
        changed = list(range(len(self.fixed) if first else len(scalars)))
        for function, slots, options, slot, _ in self.once:
            places = [i - self.inputs for i in slots]
            if function in ARITHMETIC and not options and self.real.issuperset(places):
                self.fixed[slot - self.inputs] = ARITHMETIC[function](*[self.fixed[i] for i in places])
                self.real.add(slot - self.inputs)
            else:
                self._fix(function(*[self._tensor(i) for i in places], **options), slot - self.inputs)
            changed += [] if first else [slot - self.inputs]
        numbers = list(self.fixed) if first else self.numbers
        for i in changed:
            numbers[i] = self.fixed[i]
        real = [i for i in changed if i in self.real]
        if real:  # in one conversion
            narrow = torch.tensor([self.fixed[i] for i in real], dtype=torch.float64, device=self.device)
            for i, value in zip(real, narrow.to(self.dtype).unbind(), strict=True):
                numbers[i] = value
        self.numbers, self.scalars = numbers, scalars

    def _fix(self, value: Tensor, at: int | None = None) -> None:
        """Keep a 0-D tensor at a place, by default at a new one."""
        if at is None:
            self.fixed.append(None)
            at = len(self.fixed) - 1
        if value.dtype == torch.float64:
            self.real.add(at)
        self.fixed[at] = value.item() if value.dtype == torch.float64 else value

    def _tensor(self, at: int) -> Any:
        value = self.fixed[at]
        return torch.tensor(value, dtype=torch.float64, device=self.device) if at in self.real else value

    def _room(self, n: int) -> list[Tensor]:
        whole = self.kept.get(max(self.kept, default=0))
        if whole is None or max(self.kept) < n:
            self.kept = {n: [torch.empty(n, dtype=kind, device=self.device) for kind in self.kinds]}
        else:
            self.kept[n] = [array[:n] for array in whole]
        return self.kept[n]


def record(method: Method, template: Any, dtype: torch.dtype, device: torch.device) -> Tape | None:
    """Return the tape of ``method``; None if it does more than operations on each entry, or has another ``update``."""
    tensors = any(isinstance(value, Tensor) for value in vars(method).values())
    if tensors or type(method).update is not Method.update or dtype not in (torch.float32, torch.float64):
        return None
    try:
        return Tape(method, template, dtype, device)
    except (ValueError, TypeError):
        return None
