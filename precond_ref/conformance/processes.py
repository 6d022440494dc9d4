"""A program under test in a process of its own, which answers each line by a line, within limits of time and memory."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

LONGEST = 2**26
"""Largest size of a reply in bytes; a step of the largest case needs less than a thousandth of it."""
WATCH = 0.1
"""Seconds between two measurements of the memory."""
GRACE = 2.0
"""Seconds for a program to end by itself."""


class Limits(NamedTuple):
    """Limits of a subject."""

    seconds: float = 120.0
    """Seconds for one answer: the import, the beginning of a case, or one step."""
    gigabytes: float = 4.0
    """Memory of the program and its children together, in units of 2^30 bytes. Linux only."""


class Ended(BaseException):
    """Raised if the subject can answer no more.

    It is no `Exception`: an error that a step raises is a result, and the next case is tried. This one ends the check.
    """


class Exited(Ended):
    """Raised if the program ended by itself; another one may be started."""


class Program:
    """A running program that answers each line by a line."""

    def __init__(self, command: Sequence[str], name: str, limits: Limits):
        self.name, self.limits = name, limits
        errors: int | None = None  # the error stream of this process
        try:
            os.fstat(2)
        except OSError:  # nowhere
            errors = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0, start_new_session=True
        )
        self.requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.looked = 0.0
        self.waiting = self.closed = False
        self.thread = threading.Thread(target=self._talk, daemon=True)  # it may wait for ever, `ask` does not
        self.thread.start()

    def ask(self, line: bytes, what: str) -> bytes:
        """Return the reply to a line, without its line end; `Ended` if there is none within the limits."""
        self.requests.put(line + b"\n")
        self.waiting, deadline, reply = True, time.monotonic() + self.limits.seconds, None
        while reply is None:
            with contextlib.suppress(queue.Empty):
                reply = self.replies.get(timeout=WATCH)
                break
            self._look(what)
            if self.process.poll() is not None:
                with contextlib.suppress(queue.Empty):
                    reply = self.replies.get(timeout=WATCH)
                break
            if time.monotonic() > deadline:
                self._end(f"did not answer {what} within {self.limits.seconds:g} s")
        self.waiting = False
        self._look(what)
        if not reply:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
            self._end(f"{self._how()} instead of answering {what}", Ended if self.process.poll() is None else Exited)
        if len(reply) > LONGEST:
            self._end(f"answered {what} by a line of more than {LONGEST >> 20} MiB")
        return reply.removesuffix(b"\n")

    def close(self, patience: float = 0.0) -> None:
        """End it by closing its input, if it is idle and ``patience`` seconds are left to it; else by force."""
        if self.closed:
            return
        self.closed = True
        stdin = self.process.stdin
        assert stdin is not None
        if patience and not self.waiting:
            stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):  # also its children
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.wait()
        self.requests.put(b"")
        self.thread.join(WATCH)
        stdin.close()

    def _talk(self) -> None:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        rest = b""
        while request := self.requests.get():
            parts = [rest]
            with contextlib.suppress(OSError, ValueError):  # it ended, or was closed
                while request:
                    request = request[stdin.write(request) or 0 :]
                while b"\n" not in parts[-1] and sum(map(len, parts)) <= LONGEST and (part := stdout.read(2**16)):
                    parts.append(part)
            line, end, rest = b"".join(parts).partition(b"\n")
            self.replies.put(line + end)
        stdout.close()

    def _look(self, what: str) -> None:
        if time.monotonic() < self.looked + WATCH:
            return
        if memory(self.process.pid) > self.limits.gigabytes * 2**30:
            self._end(f"took more than {self.limits.gigabytes:g} GiB of memory to answer {what}")
        self.looked = time.monotonic()

    def _how(self) -> str:
        code = self.process.poll()
        if code is None:
            return "closed its output"
        if code >= 0:
            return f"ended with exit code {code}"
        with contextlib.suppress(ValueError):
            return f"was ended by signal {-code} ({signal.Signals(-code).name})"
        return f"was ended by signal {-code}"

    def _end(self, how: str, kind: type[Ended] = Ended) -> NoReturn:
        self.close()
        raise kind(f"{self.name} {how}")


def memory(group: int) -> int:
    """Return the bytes that the processes of a group do not share; 0 on systems other than Linux."""
    return sum(_own(group))


def worked(group: int) -> float:
    """Return the seconds of processor time of a group's processes and their former children; the clock if not Linux."""
    if sys.platform != "linux":
        return time.monotonic()
    return sum(sum(map(int, fields[11:15])) for _, fields in _members(group)) / os.sysconf("SC_CLK_TCK")


def _own(group: int) -> Iterator[int]:
    for process, _ in _members(group):
        with contextlib.suppress(OSError):
            yield unshared(process)


def unshared(process: Path = Path("/proc/self")) -> int:
    """Return the bytes that a process does not share; 0 on systems other than Linux."""
    if sys.platform != "linux":
        return 0
    _, resident, shared, *_ = map(int, (process / "statm").read_bytes().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _members(group: int) -> Iterator[tuple[Path, list[bytes]]]:
    """Yield the folder of each process of a group, and the fields of its ``stat`` from the state on; Linux only."""
    for process in Path("/proc").glob("[0-9]*") if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):  # gone since
            fields = (process / "stat").read_bytes().rpartition(b")")[2].split()
            if int(fields[2]) == group:
                yield process, fields
