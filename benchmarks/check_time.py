"""Processor time of ``check`` for right implementations of each method and preset: the quick tier, or ``--deep``.

python benchmarks/check_time.py                                   # NumPy functions and torch optimizers, the quick tier
python benchmarks/check_time.py --as torch --deep --methods SOAP  # one optimizer of the torch adapter, in depth

One thread, and no limit of time for made-up inputs. Each check is made in a process of its own, forked after the
imports. Ends with an error if a check fails or sees less than half of the cases: it also looks for false alarms.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conformance_subjects import _made, optax_target, torch_target  # type: ignore[import-not-found]  # noqa: E402

from precond_ref.conformance import check, contract, results, vectors, wrap  # noqa: E402


def function(constructor: str) -> Callable[..., Any]:
    """Return a function of one step on NumPy arrays."""

    def step(param: Any, grad: Any, state: Any, *, lr: float, weight_decay: float, **config: Any) -> Any:
        method = _made(constructor, config, weight_decay)
        if not method.takes(param.shape):
            raise NotImplementedError(f"parameters of shape {param.shape}")
        direction, state = method.update(grad, method.init(param) if state is None else state, param)
        decay = 0.0 if method.decays else weight_decay
        return (1 - lr * decay) * param - lr * direction, state

    return step


TARGETS = {"numpy": function, "torch": torch_target, "optax": optax_target}


def timed(constructor: str, kind: str, deep: bool, pipe: Any) -> None:
    """Send the seconds of processor time that the check takes, and what fails."""
    contract.SECONDS = dict.fromkeys(contract.SECONDS, math.inf)
    before = os.times()
    report = check(wrap(TARGETS[kind](constructor)), constructor, deep=deep)
    after = os.times()
    found = [f"{r.id}: {r.message}" for r in report.failures]
    if 2 * report.ran < len(results.listed(constructor, deep)):
        found.append(f"only {report.ran} cases ran")
    pipe.send((sum(after[:4]) - sum(before[:4]), report.ran, found))


def main() -> None:
    """Print the times of each check, and a table of the largest and the median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", help="constructors, separated by commas (default: all)")
    parser.add_argument("--as", dest="kinds", default="numpy,torch", help=f"some of {', '.join(TARGETS)}")
    parser.add_argument("--deep", action="store_true", help="as `precond-ref check --deep`")
    arguments = parser.parse_args()
    known = list(dict.fromkeys(case.constructor for case in vectors.cases(kind="trace")))
    chosen, kinds = arguments.methods.split(",") if arguments.methods else known, arguments.kinds.split(",")
    if "torch" in kinds:
        import torch

        torch.set_num_threads(1)
    fork, wrong, rows = get_context("fork"), [], ["| as | methods | median | largest |", "|---|---|---|---|"]
    for kind in kinds:
        seconds: dict[str, float] = {}
        for name in chosen:
            mine, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=timed, args=(name, kind, arguments.deep, theirs))
            process.start()
            theirs.close()
            seconds[name], ran, failures = mine.recv()
            process.join()
            wrong += [f"{kind} {name}: {failure}" for failure in failures]
            print(f"{kind:<6} {name:<20} {seconds[name]:6.1f} s, {ran:3} cases", *failures, flush=True)
        slowest = max(seconds, key=lambda name: seconds[name])
        median = statistics.median(seconds.values())
        rows.append(f"| {kind} | {len(seconds)} | {median:.1f} s | {seconds[slowest]:.1f} s ({slowest}) |")
    print("\n".join(rows))
    if wrong:
        raise SystemExit("\n".join(["false alarms:", *wrong]))


if __name__ == "__main__":
    main()
