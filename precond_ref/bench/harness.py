"""Races: contenders timed in turn, each in the process of its environment, with pyperf's data model and statistics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import precond_ref
from precond_ref.bench import worker
from precond_ref.bench.peers import PEERS

ROUND_SECONDS = 0.05
"""Approximate duration of a measurement, which has at least one period of the contender."""


class Race(NamedTuple):
    """Contenders of one comparison on one workload; times are divided by the time of the first."""

    title: str
    workload: str
    contenders: tuple[str, ...]
    periods: dict[str, int] = {}  # noqa: RUF012
    """Number of steps timed together, by contender: k if work is due every k steps, so that each value has it once."""


class Sweep(NamedTuple):
    """One method through the PyTorch adapter at several values of x."""

    title: str
    x: str
    theory: float
    """Exponent of x in the leading term of the time."""
    points: dict[int, tuple[str, dict[str, tuple[int, ...]]]]
    """Method and parameters for each value of x."""
    base: int | None = None
    """The value of x whose time is subtracted from the others before the fit."""


@dataclass
class Result:
    """The times of a contender of a race."""

    name: str
    seconds: list[float] = field(default_factory=list)
    """Seconds per step, one value for each round."""
    first: float | None = None
    """Seconds of the very first step, compilation included."""
    error: str | None = None
    state_bytes: int | None = None
    """Bytes of the state of the method of a sweep."""


class Worker:
    """A process of one environment."""

    def __init__(self, python: Path | None, threads: int) -> None:
        package = Path(precond_ref.__file__).resolve().parents[1]
        folders = [str(package), str(package / "adapters"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "OPENBLAS_NUM_THREADS": "1",  # jaxlib's threads call it; if each started more, a step took 30 times as long
            "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'} "
            f"intra_op_parallelism_threads={threads}",
            "NPROC": "16",  # jaxlib's pool: several batched factorizations wait for ever for each other on two threads
        }
        if python is None:
            command = [sys.executable, "-m", worker.__name__]
            environment["PYTHONPATH"] = os.pathsep.join(folders)
        else:
            command = [str(python), str(Path(worker.__file__))]
            environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, **order: Any) -> dict[str, Any]:
        """Return the answer to one order; it has ``error`` if the process died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"error": f"the process ended with code {self.process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self.process.wait()


def interpreter(environment: str, peers: Path | None) -> Path | None:
    """Return the Python of an environment of peers; None if it is missing."""
    python = peers / environment / "bin" / "python" if peers is not None else None
    return python if python is not None and python.is_file() else None


@contextmanager
def _workers(threads: int, peers: Path | None) -> Iterator[Callable[[str], Worker | None]]:
    made: dict[str, Worker | None] = {}

    def get(contender: str) -> Worker | None:
        environment = PEERS[contender][0] if contender in PEERS else ""
        if environment not in made:
            python = interpreter(environment, peers) if environment else None
            made[environment] = Worker(python, threads) if python or not environment else None
        return made[environment]

    try:
        yield get
    finally:
        for process in made.values():
            if process is not None:
                process.close()


class Contender(NamedTuple):
    """A contender: the order that makes it in a worker, and the number of steps that belong together."""

    name: str
    order: dict[str, Any]
    period: int = 1


def run(
    race: Race,
    *,
    threads: int,
    rounds: int,
    smoke: bool,
    peers: Path | None,
    clock: str = "wall",
    on_progress: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Time all contenders of ``race`` in turn; peers are left out without their environments ``peers``."""
    contenders = [
        Contender(name, {"workload": race.workload, "smoke": smoke}, 1 if smoke else race.periods.get(name, 1))
        for name in race.contenders
        if (name not in PEERS or peers is not None) and not (smoke and "compile" in name)
    ]
    return timed(f"{race.title}, {race.workload}", contenders, threads, rounds, peers, clock, on_progress)


def sweep(
    what: Sweep,
    *,
    threads: int,
    rounds: int,
    clock: str = "wall",
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[int, Result]:
    """Time all points in turn."""
    contenders = [
        Contender(f"{what.title} {x}", {"method": method, "shapes": shapes}, x if what.base not in (None, x) else 1)
        for x, (method, shapes) in what.points.items()
    ]
    return dict(zip(what.points, timed(what.title, contenders, threads, rounds, None, clock, on_progress), strict=True))


def timed(
    title: str,
    contenders: list[Contender],
    threads: int,
    rounds: int,
    peers: Path | None,
    clock: str,
    on_progress: Callable[[str], None],
) -> list[Result]:
    """Time ``contenders`` in turn, ``rounds`` times."""
    results = [Result(contender.name) for contender in contenders]
    with _workers(threads, peers) as get:
        repeats: dict[str, int] = {}
        for result, contender in zip(results, contenders, strict=True):
            on_progress(f"{title}: {result.name}")
            process = get(result.name)
            if process is None:
                result.error = f"no environment {PEERS[result.name][0]!r} in {peers}: bash benchmarks/peers.sh {peers}"
                continue
            answer = process.ask(make=result.name, warmup=2, **contender.order)
            result.error, result.first = answer.get("error"), answer.get("seconds")
            result.state_bytes = answer.get("state_bytes")
            if result.error is None:
                once = process.ask(run=result.name, repeat=1, clock=clock).get("seconds", 1.0)
                steps = round(ROUND_SECONDS / max(once * contender.period, 1e-7))
                repeats[result.name] = contender.period * max(1, steps)
        for number in range(rounds):
            on_progress(f"{title}: round {number + 1} of {rounds}")
            for result in results:
                process = get(result.name) if result.error is None else None
                if process is not None:
                    answer = process.ask(run=result.name, repeat=repeats[result.name], clock=clock)
                    result.error = answer.get("error")
                    if result.error is None:
                        result.seconds.append(answer["seconds"] / repeats[result.name])
    return results


def ratios(result: Result, base: Result) -> list[float]:
    """Return for each round the time over that of ``base``."""
    return [a / b for a, b in zip(result.seconds, base.seconds, strict=False)]
