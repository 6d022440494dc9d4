"""An exception in a step of the PyTorch adapter: every parameter is stepped with state and counter, or as it was."""

from __future__ import annotations

import copy
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from configs import CONFIGS, Decayed
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch_adapter_cases import ONE_EACH, distance, feed, forced, parameters, recorded

import precond_ref as pr
import precond_ref_torch as pt
from precond_ref_torch import buckets, interrupts, optimizer, passes

torch.set_num_threads(1)
OWN = str(pt.__path__[0])


class Injected(BaseException):
    """No Exception, as KeyboardInterrupt is none."""


class RaiseAt(TorchFunctionMode):
    """Raises at the ``at``-th call of PyTorch, before it or after it."""

    def __init__(self, at: int, after: bool) -> None:
        super().__init__()
        self.left, self.after = at, after

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__get__":  # attributes, such as .grad: no calls
            return func(*args, **(kwargs or {}))
        self.left -= 1
        if self.left == 0 and not self.after:
            raise Injected
        result = func(*args, **(kwargs or {}))
        if self.left == 0 and self.after:
            raise Injected
        return result


@contextmanager
def raise_at_opcode(at: int) -> Iterator[list[int]]:
    """Raises before the ``at``-th bytecode instruction of the adapter; gives how many are left."""
    left = [at]

    def local(frame: Any, event: str, arg: Any) -> Any:
        if event == "opcode":
            left[0] -= 1
            if left[0] == 0:
                raise Injected
        return local

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(OWN):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return local

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield left
    finally:
        sys.settrace(before)


# ---- subjects -------------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """Shapes, and an optimizer on parameters that have them."""

    shapes: list[tuple[int, ...]]
    make: Callable[[list[Any]], Any]
    dtype: torch.dtype = torch.float64


def _alone(name: str, count: int = 3, **options: Any) -> Subject:
    config = CONFIGS[name]
    return Subject([config.shape] * count, lambda params: pt.Optimizer(params, **forced(config.method, **options)))


def _joined(params: list[Any]) -> Any:
    named = [(f"{i // 2}.{'bias' if i % 2 else 'weight'}", p) for i, p in enumerate(params)]
    pairs = [(f"{i}.weight", f"{i}.bias") for i in range(len(params) // 2)]
    return pt.Optimizer(named, ONE_EACH["MBF"].method, join=pairs, lr=0.125)


def _groups(params: list[Any]) -> Any:
    return pt.ASGO([{"params": params[:2]}, {"params": params[2:], "method": pr.Adam()}], lr=0.125, weight_decay=0.5)


SUBJECTS = {
    "Adam": Subject([(3, 2), (40,), (4,), (5, 3)], lambda params: pt.Adam(params, lr=0.125)),  # (40,): in three parts
    "SGD": Subject([(40,), (4, 2)], lambda params: pt.SGD(params, lr=0.125)),
    "AGD, bfloat16": Subject([(40,), (4, 2)], lambda params: pt.AGD(params, lr=0.125), torch.bfloat16),
    "decay": Subject([(40,), (3,)], lambda params: pt.Optimizer(params, Decayed(weight_decay=0.25), lr=0.125)),
    "ASGO": _alone("ASGO-every", lr=0.125, weight_decay=0.5),
    "Shampoo": _alone("Shampoo-every", lr=0.125),
    "RFShampoo": _alone("RFShampoo-default", lr=0.125),
    "SShampoo": _alone("SShampoo-average", 2, lr=0.125),
    "MBF, joined": Subject([(4, 3), (4,), (4, 3), (4,), (2, 4), (2,)], _joined),
    "groups": Subject([(4, 3), (3,), (20,), (4, 4)], _groups),
}


class Prepared(NamedTuple):
    """A run before a step, and what the step makes of it."""

    opt: Any
    params: list[Any]
    after: list[Any]


def _seen(opt: Any, params: list[Any]) -> list[Any]:
    """Value and state of each parameter (or unit of them), copied."""
    return [[p.detach().clone(), *(v.clone() for v in opt.state.get(p, {}).values())] for p in params]


def _prepare(subject: Subject, steps: int) -> Prepared:
    start, grads = recorded(subject.shapes, steps + 1, subject.dtype)
    params = parameters(start)
    opt = subject.make(params)
    feed(opt, params, grads[:steps])
    for p, g in zip(params, grads[steps], strict=True):
        p.grad = g.clone()
    twin, twins = _copied(opt, params)
    twin.step()
    return Prepared(opt, params, _seen(twin, twins))


def _copied(opt: Any, params: list[Any]) -> tuple[Any, list[Any]]:
    again, values = copy.deepcopy((opt, params))
    for p, x in zip(params, values, strict=True):
        x.grad = p.grad.clone()
    if again.state:
        again._checked({})  # buckets are made, as in every step but the first
    return again, values


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _stepped(note: str) -> set[tuple[int, int]]:
    """(group, position) of what a note calls stepped."""
    found = re.search(r"stepped: ((?:[\d, -]+ of group \d+(?:, )?)+)", note)
    result = set()
    for ranges, group in re.findall(r"([\d, -]+) of group (\d+)", found[1] if found else ""):
        for part in ranges.strip(", ").split(", "):
            first, _, last = part.partition("-")
            result |= {(int(group), i) for i in range(int(first), int(last or first) + 1)}
    return result


def check_whole(prepared: Prepared, raising: Any) -> bool:
    """Whether ``raising`` raised in a step; if so every parameter is as before or as after it, as the note says."""
    opt, params = _copied(prepared.opt, prepared.params)
    before = _seen(opt, params)
    notes: list[str] = []
    with raising:
        try:
            opt.step()
            return False
        except Injected as error:
            notes = getattr(error, "__notes__", [])
    torch.set_grad_enabled(True)  # torch.no_grad, interrupted in its own first line, leaves it off
    for mode in reversed(_get_current_dispatch_mode_stack()):  # a recorder, interrupted before its own end, stays on
        mode.__exit__(None, None, None)
    now = _seen(opt, params)
    outcome = []
    for old, new, got in zip(before, prepared.after, now, strict=True):
        fresh = len(old) == 1 < len(got)  # a state before the first step
        untouched = torch.equal(got[0], old[0]) and ((fresh and int(got[1]) == 0) or _same(got, old))
        assert _same(got, new) or untouched
        outcome.append(not untouched)
    assert len(notes) == 1 or (not notes and len(set(outcome)) == 1)
    if notes:
        places = [(g, i) for g, group in enumerate(opt.param_groups) for i in range(len(group["params"]))]
        assert _stepped(notes[0]) == {place for place, moved in zip(places, outcome, strict=True) if moved}
    if any(outcome) and not all(outcome):  # and training goes on
        opt.step()
        twin, twins = _copied(prepared.opt, prepared.params)
        twin.step()
        twin.step()
        again = [t if moved else a[0] for t, a, moved in zip(twins, prepared.after, outcome, strict=True)]
        tolerance = 1e-12 if params[0].dtype == torch.float64 else 2**-7
        assert distance(params, again) <= tolerance
    return True


def check_calls(subject: Subject, steps: int, most: int | None = None) -> None:
    """At every call, or at ``most`` of them."""
    prepared = _prepare(subject, steps)
    none = RaiseAt(10**9, False)
    assert not check_whole(prepared, none)
    calls = 10**9 - none.left
    assert calls > 20
    for number, at in enumerate(_spread(calls, most)):
        for after in (False, True) if most is None else (number % 2 == 1,):
            assert check_whole(prepared, RaiseAt(at, after))


def check_opcodes(subject: Subject, steps: int, most: int) -> None:
    prepared = _prepare(subject, steps)
    with raise_at_opcode(10**9) as left:
        _copied(prepared.opt, prepared.params)[0].step()
    for at in _spread(10**9 - left[0], most):
        check_whole(prepared, raise_at_opcode(at))  # planning before the step counts too: the last ones are not reached


def _spread(count: int, most: int | None) -> list[int]:
    return [1 + i * count // (most or count) for i in range(most or count)]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "PIECE_BYTES", 16 * 8)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_call_may_raise(name: str) -> None:
    check_calls(SUBJECTS[name], 2, 12)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", SUBJECTS)
def test_an_interrupt_may_come_anywhere(name: str) -> None:
    check_opcodes(SUBJECTS[name], 1, 12)


@pytest.mark.usefixtures("small_pieces")
def test_an_interrupt_may_come_at_the_end_of_the_first_step() -> None:
    """When all is written, and the optimizer forgets what it would take back."""
    prepared = _prepare(SUBJECTS["AGD, bfloat16"], 0)
    with raise_at_opcode(10**9) as left:
        _copied(prepared.opt, prepared.params)[0].step()
    for back in range(0, 360, 3):
        check_whole(prepared, raise_at_opcode(10**9 - left[0] - back))


@pytest.mark.deep
@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("name", SUBJECTS)
def test_everywhere(name: str, steps: int) -> None:
    check_calls(SUBJECTS[name], steps)
    check_opcodes(SUBJECTS[name], steps, 300)


def _counted_first(original: Any) -> Any:
    def commit(self: Any, *given: Any) -> None:
        self.bucket.steps.fill_(self.step + 1)
        original(self, *given)

    return commit


def _parameters_first(self: Any, piece: Any, directions: Any, pairs: Any) -> None:
    """No record of what is being written."""
    params = [*self.bucket.values(piece), self.bucket.zero()]
    optimizer._apply(self.group, self.bucket, params, [*directions, self.bucket.one])
    buckets.write(pairs)
    self.done = self.done[0] + 1, None


def _rest_left(original: Any) -> Any:
    return lambda self, pieces: None if self.done[0] else original(self, pieces)


def _witness_left(original: Any) -> Any:
    return lambda group, bucket, params, directions: original(group, bucket, params[:-1], directions[:-1])


def _moved_twice(original: Any) -> Any:
    return lambda self, marks, piece: original(self, marks, piece) and False


def _written_early(old: Any, new: Any) -> Any:
    pairs = list(zip(old, new, strict=True))
    buckets.write(pairs)
    return pairs


PLANTED: dict[str, tuple[Any, str, Any, str]] = {
    "counted before it is written": (optimizer.BucketStep, "_commit", _counted_first(optimizer.BucketStep._commit),
        "ASGO"),
    "no record of what is being written": (optimizer.BucketStep, "_commit", _parameters_first, "Adam"),
    "written as it is computed": (buckets, "_changed", _written_early, "decay"),
    "moved twice": (optimizer, "_apply", _witness_left(optimizer._apply), "decay"),
    "the rest of a large parameter left": (optimizer.BucketStep, "_write", _rest_left(optimizer.BucketStep._write),
        "SGD"),
    "averages moved, and the rest left": (passes.Marks, "begun", lambda self, piece: False, "Adam"),
    "averages moved twice": (passes.Tape, "start", _moved_twice(passes.Tape.start), "Adam"),
}  # fmt: skip


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("what", PLANTED)
def test_check_catches(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, wrong, subject = PLANTED[what]
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError):
        check_calls(SUBJECTS[subject], 1)


# ---- what no call of PyTorch raises ---------------------------------------------------------------------------------


class Picky(Decayed):
    """Refuses a gradient by its values."""

    def update(self, grad: Any, *given: Any, **options: Any) -> Any:
        if not bool(torch.isfinite(grad).all()):
            raise ValueError("no finite gradient")
        return super().update(grad, *given, **options)


@pytest.mark.usefixtures("small_pieces")
def test_a_method_may_refuse_the_last_entry_of_a_large_parameter() -> None:
    start, _ = recorded([(3,), (40,)], 1)
    params = parameters(start)
    opt = pt.Optimizer(params, Picky(), lr=0.125)
    for p in params:
        p.grad = torch.ones_like(p)
    params[1].grad[-1] = torch.inf  # type: ignore[index]
    with pytest.raises(ValueError, match="no finite gradient") as caught:
        opt.step()
    assert _stepped(caught.value.__notes__[0]) == {(0, 0)}
    assert "as before the step: 1 of group 0" in caught.value.__notes__[0]
    assert not opt.state.get(params[1])
    assert torch.equal(params[1], start[1])


@pytest.mark.usefixtures("small_pieces")
def test_what_cannot_be_completed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that comes again when the rest of a large parameter is completed."""
    prepared = _prepare(SUBJECTS["SGD"], 1)
    calls = iter(range(10**9))
    original = pr.SGD.update

    def update(*given: Any, **options: Any) -> Any:
        if next(calls) >= 1:
            raise MemoryError
        return original(*given, **options)

    monkeypatch.setattr(pr.SGD, "update", update)
    opt, _ = _copied(prepared.opt, prepared.params)
    with pytest.raises(MemoryError) as caught:
        opt.step()
    (note,) = caught.value.__notes__
    assert "half stepped, as MemoryError came again (load a checkpoint): 0 of group 0" in note
    assert "as before the step: 1 of group 0" in note


def test_batch_size_of_a_step_that_did_nothing_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters([torch.ones(3, 2)])
    opt = pt.RFShampoo(params)
    params[0].grad = torch.ones(3, 2)
    monkeypatch.setattr(pr.RFShampoo, "update", lambda *given, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opt.step(batch_size=7)
    assert opt.param_groups[0]["batch_size"] == 1.0


# ---- Ctrl-C ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupting() -> Iterator[list[str]]:
    """SIGINT raises KeyboardInterrupt, as Python has it by default; a list to note in."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield []
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("times", "end"), [(1, ["end"]), (2, [])])
def test_interrupts_wait_for_the_end_of_the_block(interrupting: list[str], times: int, end: list[str]) -> None:
    def block() -> None:
        with interrupts.interrupts_deferred():
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            interrupting.append("end")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert interrupting == end
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_leave_the_signals_alone() -> None:
    seen = []

    def look() -> None:
        with interrupts.interrupts_deferred():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def _interrupted(original: Any) -> Any:
    """The maker of what computes, interrupted at the end of what it made."""

    def make(*given: Any) -> Any:
        made = original(*given)

        def call(*given: Any) -> Any:
            result = made(*given)
            signal.raise_signal(signal.SIGINT)
            return result

        return call

    return make


def check_ctrl_c(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ONE_EACH[name]
    start, grads = recorded([config.shape, config.shape], 1)
    params = parameters(start)
    expected = parameters(start)
    feed(pt.Optimizer(expected, **forced(config.method, lr=0.125)), expected, grads)
    opt = pt.Optimizer(params, **forced(config.method, lr=0.125, compile="eager"))
    monkeypatch.setattr(buckets, "_kernel", _interrupted(buckets._kernel))
    monkeypatch.setattr(passes, "lookup", lambda backend: _interrupted(lambda module, inputs: module))
    with pytest.raises(KeyboardInterrupt) as caught:
        feed(opt, params, grads)
    counts = {int(opt.state[p].get("step", 0)) for p in params}
    if config.method.elementwise:  # its graph writes the states by itself
        assert distance(params, expected) <= 1e-13
        assert counts == {1}
        assert "stepped: 0-1 of group 0" in caught.value.__notes__[0]
    else:
        assert all(torch.equal(p, x) for p, x in zip(params, start, strict=True))
        assert counts == {0}
        assert "as before the step: 0-1 of group 0" in caught.value.__notes__[0]


@pytest.mark.parametrize("name", ["AGD", "ASGO"])
@pytest.mark.usefixtures("interrupting")
def test_ctrl_c_in_a_compiled_update(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_ctrl_c(name, monkeypatch)


@pytest.mark.usefixtures("interrupting")
def test_check_catches_an_interrupt_that_is_not_deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "interrupts_deferred", nullcontext)
    with pytest.raises(AssertionError):
        check_ctrl_c("AGD", monkeypatch)


def check_recorder_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ctrl-C while the recording of an update ends: the recorder is off, and nothing has changed."""
    ends = passes._Recorder.__exit__

    def interrupted(recorder: Any, *error: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        ends(recorder, *error)

    monkeypatch.setattr(passes._Recorder, "__exit__", interrupted)
    param = torch.nn.Parameter(torch.ones(4))
    opt = pt.AGD([param], lr=0.1)
    param.grad = torch.ones(4)
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    left = _get_current_dispatch_mode_stack()
    for mode in reversed(left):
        ends(mode, None, None, None)
    assert not left
    assert torch.equal(param, torch.ones(4))


@pytest.mark.usefixtures("interrupting")
def test_the_recorder_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    check_recorder_ends(monkeypatch)


@pytest.mark.usefixtures("interrupting")
def test_check_catches_a_recorder_that_stays_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "interrupts_deferred", nullcontext)
    with pytest.raises(AssertionError):
        check_recorder_ends(monkeypatch)
