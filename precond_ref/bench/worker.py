"""A process that times steps for `harness`, one order per line of standard input, one answer per line of output.

``{"make": name, "workload": w, "smoke": b, "warmup": n}`` makes a contender and answers with the seconds of the first
step; n more steps follow. With ``"method": m, "shapes": {...}`` it is that method, through the PyTorch adapter, on
these parameters, and the answer has the bytes of its state. ``{"run": name, "repeat": n, "clock": c}`` answers with the
seconds of n steps by the clock "wall" or "cpu".

The process also runs in the environments of peers.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

try:
    from precond_ref.bench.peers import PEERS
    from precond_ref.bench.workloads import shapes
except ModuleNotFoundError:  # run as a script
    from peers import PEERS  # type: ignore[import-not-found, no-redef]
    from workloads import shapes  # type: ignore[import-not-found, no-redef]


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def make(order: dict[str, Any]) -> Callable[[], None]:
    """Return the step that an order names."""
    name = order["make"]
    if name in PEERS:
        return PEERS[name][1](shapes(order["workload"], order["smoke"]))
    from precond_ref.bench.contenders import OURS, adapter

    found = shapes(order["workload"], order["smoke"])
    return OURS[name](found) if name in OURS else adapter(name, found)[0]


def main() -> None:
    """Serve until standard input ends; an error of a contender is an answer and does not end the process."""
    answers = os.fdopen(os.dup(1), "w")  # the output of packages goes to the error stream
    os.dup2(2, 1)
    bytearray(31 * 2**20)  # once freed, glibc keeps memory up to this size, as in training; else page faults are timed
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    steps: dict[str, Callable[[], None]] = {}
    for line in sys.stdin:
        order = json.loads(line)
        try:
            start = time.perf_counter()
            if "make" in order:
                held: Callable[[], int | None] = lambda: None  # noqa: E731
                if "method" in order:
                    from precond_ref.bench.contenders import adapter

                    found = {key: tuple(shape) for key, shape in order["shapes"].items()}
                    made, held = adapter(order["method"], found)
                else:
                    made = make(order)
                steps[order["make"]] = made
                if "torch" in sys.modules:
                    sys.modules["torch"].set_num_threads(threads)
                start = time.perf_counter()
                made()
                first = time.perf_counter() - start
                for _ in range(order["warmup"]):
                    made()
                gc.collect()
                gc.freeze()  # a contender pays for the objects that its step makes, not for those of all contenders
                answer: dict[str, Any] = {"seconds": first, "state_bytes": held()}
            else:
                step, clock = steps[order["run"]], CLOCKS[order["clock"]]
                start = clock()
                for _ in range(order["repeat"]):
                    step()
                answer = {"seconds": clock() - start}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
