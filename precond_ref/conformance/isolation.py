"""A Python subject in a process of its own, so that its effects on the process are seen and do no harm.

The parent judges. The child imports the subject and makes its steps; each request and each reply is one pickled line.
Only arrays of numbers, numbers and text go to the parent. The output of the subject goes to the error stream.
"""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from precond_ref.conformance import processes, subjects
from precond_ref.conformance.processes import Ended, Limits, Program
from precond_ref.conformance.subjects import Arrays, Config, Raised, Refused, Unsupported

OPTIONAL = ("state", "save", "load", "primitive", "change", "options", "ran", "lost")


class Isolated:
    """``wrap(load_target(target), ...)`` in a process of its own; ``close`` ends the process.

    The process writes no bytecode: Python knows an old file by its second and size, and a changed source may have both.
    ValueError if there is no such target; `Ended` if its import fails in another way.
    """

    def __init__(
        self,
        target: str,
        *,
        backend: str | None = None,
        dtype: str = "float64",
        names: Mapping[str, str] | None = None,
        limits: Limits | None = None,
    ):
        self.names, self.steps = dict(names or {}), 0
        path = [entry for entry in sys.path if entry]
        start = f"import sys; sys.path[:] = {path!r}; from precond_ref.conformance import isolation; isolation.serve()"
        self.program = Program([sys.executable, "-P", "-B", "-c", start], target, limits or Limits())
        try:
            self.has, self.features = self._ask("begin", target, backend, dtype, self.names)
        except (Raised, Unsupported) as error:
            self.close()
            if isinstance(error, Raised) and error.usage:
                raise ValueError(error.message) from None
            if isinstance(error, Raised) and error.name == "ImportError":
                raise Ended(error.message) from None
            raise Ended(f"{target} cannot be made: {subjects.said(error)}") from None
        except BaseException:
            self.close()
            raise

    def init(self, config: Config, params: Arrays, **options: Any) -> None:
        """Call ``init`` of the subject."""
        self.steps = 0
        self._ask("init", config, params, **options)

    def step(self, grads: Sequence[np.ndarray | None]) -> Arrays:
        """Call ``step`` of the subject, and change ``grads`` as the subject did."""
        self.steps += 1
        params, changed = self._ask("step", grads)
        for i, after in changed.items():
            np.copyto(grads[i], after)
        return params

    def surroundings(self) -> dict[str, str]:
        """Return `subjects.surroundings` of the process."""
        return self._ask("surroundings")

    def worked(self) -> float:
        """Return the processor time of the process and its children, in seconds."""
        return processes.worked(self.program.process.pid)

    def close(self) -> None:
        """End the process."""
        self.program.close()

    def __getattr__(self, name: str) -> Any:
        if name in OPTIONAL and name in self.has:
            return partial(self._ask, name)
        raise AttributeError(name)

    def _ask(self, what: str, *arguments: Any, **options: Any) -> Any:
        line = base64.b64encode(pickle.dumps((what, arguments, options)))
        called = {"begin": "'import'", "step": f"'step' {self.steps}"}.get(what, repr(what))
        reply = self.program.ask(line, called)
        raised, value = pickle.loads(base64.b64decode(reply))
        if not raised:
            return value
        kind = value.pop("kind")
        if kind == "unsupported":
            raise Unsupported(value["message"])
        raise (Refused if kind == "refused" else Raised)(**value)


# ---- in the child ---------------------------------------------------------------------------------------------------


def serve() -> NoReturn:
    """Answer requests until the input ends."""
    _end_with_parent()
    requests, replies, own = os.fdopen(os.dup(0), "rb"), os.dup(1), os.getpid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with contextlib.suppress(BaseException):
        _answer(requests, replies, own)
    os._exit(0)


def _answer(requests: BinaryIO, replies: int, own: int) -> None:
    host = _Host()
    for line in requests:
        what, arguments, options = pickle.loads(base64.b64decode(line))
        try:
            reply = False, plain(getattr(host, what)(*arguments, **options))
        except BaseException as error:
            reply = True, _described(error)
        if os.getpid() != own:  # the subject forked, and this is the new process
            return
        left = base64.b64encode(pickle.dumps(reply)) + b"\n"
        while left:
            left = left[os.write(replies, left) :]


def _end_with_parent() -> None:
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class _Host:
    """The requests that the child answers."""

    def begin(self, target: str, backend: str | None, dtype: str, names: Mapping[str, str]) -> Any:
        found = subjects.load_target(target)
        self.subject: Any = subjects.wrap(found, backend=backend, dtype=dtype, names=names)
        self.saved: Any = None
        return [n for n in OPTIONAL if hasattr(self.subject, n)], [*getattr(self.subject, "features", ())]

    def init(self, *arguments: Any, **options: Any) -> None:
        self.subject.init(*arguments, **options)

    def step(self, grads: list[np.ndarray | None]) -> Any:
        kept = [None if g is None else g.copy() for g in grads]
        params = self.subject.step(grads)
        pairs = enumerate(zip(grads, kept, strict=True))
        return params, {i: g for i, (g, k) in pairs if k is not None and not np.array_equal(g, k, equal_nan=True)}  # type: ignore[arg-type]

    def save(self) -> None:
        self.saved = self.subject.save()

    def load(self, saved: None) -> None:
        self.subject.load(self.saved)

    def __getattr__(self, name: str) -> Any:
        return subjects.surroundings if name == "surroundings" else getattr(self.subject, name)


def plain(value: Any) -> Any:
    """Return ``value`` made only of types that any Python with NumPy can read; TypeError for others."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {key if type(key) is int else str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    array = np.asarray(value)
    if array.dtype.hasobject:
        raise TypeError(f"a NumPy array of numbers is needed, got {type(value).__name__}")
    return array


def _described(error: BaseException) -> dict[str, Any]:
    """Return the arguments of `Raised` for an error."""
    kind = "raised"
    if isinstance(error, NotImplementedError):
        kind = "unsupported"
    elif isinstance(error, (ValueError, TypeError)):
        kind = "refused"
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and frames[-1].filename.startswith(str(Path(__file__).parents[1]))
    return {
        "kind": kind,
        "name": type(error).__name__,
        "message": subjects.words(error),
        "text": subjects.said(error),
        "usage": ours and isinstance(error, (ValueError, TypeError, ModuleNotFoundError)),
    }
