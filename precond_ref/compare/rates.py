"""Learning rates: one grid search for every method, recorded in a file with all its results.

The search is the same for all methods: each trains at each rate of `GRID` from each of `SEEDS`. The value of a rate is
the mean over the seeds of the *end loss*, the mean of the last tenth of the batch losses. If the best rate is the
smallest or largest rate tried, the grid goes on by half decades until it is not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from precond_ref import problems
from precond_ref.compare.runs import Entrant, Trainer, Training, UsageError, choose, load_problem
from precond_ref.registry import constructors

FILE = Path(problems.__file__).with_name("learning_rates.json")
"""The file that `record` reads and `tune` writes."""

FALLBACK = 0.01
"""Rate of a method without a recorded rate."""

GRID = range(-8, 2)
"""Half decades that every method tries: 1e-4 to 3.162."""
LIMITS = (-16, 10)
"""Ends of the wider grid: 1e-8 and 1e5."""
SEEDS = (101, 102)
"""Seeds of the search."""
MOST_STEPS = 300
"""Most steps of a search without a record; otherwise the problem's default number."""


def rate(half_decades: int) -> float:
    """Return 10^(half_decades / 2) with four digits."""
    return float(f"{10 ** (half_decades / 2):.4g}")


def record(file: Path | None = None) -> dict[str, Any]:
    """Return all searches by problem; an empty dict if there is no file."""
    file = FILE if file is None else file
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def parse_rates(texts: Sequence[str], entrants: Sequence[Entrant]) -> dict[str, float]:
    """Return learning rates from texts ``METHOD=VALUE``, by the entrant's name.

    A METHOD without brackets is for all entrants of this name. UsageError for a text that is wrong.
    """
    rates = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        try:
            lr = float(value)
        except ValueError:
            lr = math.nan
        if not 0 <= lr < math.inf:
            raise UsageError(f"--lr wants METHOD=VALUE with a finite value >= 0, such as Adam=0.01, got {text}")
        meant = [e.name for e in entrants if _key(name) in (_key(e.name), _key(e.plain))]
        if not meant:
            there = ", ".join(entrant.name for entrant in entrants)
            raise UsageError(f"--lr {text}: {name} does not take part; there are {there}")
        rates.update(dict.fromkeys(meant, lr))
    return rates


def _key(name: str) -> str:
    """Return the name for comparisons: without spaces, in lower case."""
    return "".join(name.lower().split())


def planned(
    problem: str, entrants: Sequence[Entrant], given: Mapping[str, float], seeds: Sequence[int] = (0,)
) -> list[Training]:
    """Return untrained runs, for each entrant one of each seed.

    The rate is the one given, or the one recorded for the entrant's name, or `FALLBACK`.
    """
    methods = record().get(problem, {}).get("methods", {})
    runs = []
    for entrant in entrants:
        recorded = methods.get(entrant.plain, {}).get("lr")
        if entrant.name in given:
            lr, source = given[entrant.name], "given"
        elif recorded is not None:
            lr, source = recorded, "recorded" if entrant.name == entrant.plain else "default fields"
        else:
            lr, source = FALLBACK, "fallback"
        runs += [Training(entrant=entrant, lr=lr, lr_source=source, seed=seed) for seed in seeds]
    return runs


def end_loss(losses: Sequence[float]) -> float:
    """Return the mean of the last tenth of the batch losses; infinite for a run that ended in a non-finite loss."""
    tail = losses[-max(1, len(losses) // 10) :]
    mean = sum(tail) / len(tail)
    return mean if math.isfinite(mean) else math.inf


def search(measure: Callable[[float], list[float]]) -> dict[str, Any]:
    """Return the best rate for ``measure``, which returns one end loss per seed, and all rates with their losses."""
    seen = {k: measure(rate(k)) for k in GRID}
    while True:
        best = min(seen, key=lambda k: sum(seen[k]))
        following = best - 1 if best == min(seen) else best + 1
        if following in seen or not LIMITS[0] <= following <= LIMITS[1]:
            break
        if not math.isfinite(sum(seen[best])):
            break
        seen[following] = measure(rate(following))
    rows = sorted(seen.items())
    return {
        "lr": rate(best) if math.isfinite(sum(seen[best])) else None,
        "rates": [rate(k) for k, _ in rows],
        "losses": [[float(f"{x:.5g}") if math.isfinite(x) else None for x in losses] for _, losses in rows],
    }


def tune(
    problem: str,
    names: Sequence[str] | None = None,
    steps: int | None = None,
    *,
    on_method: Callable[[str, int, int], Any] | None = None,
    on_rate: Callable[[float, float], Any] | None = None,
) -> dict[str, Any]:
    """Search the rates of the methods (default: all that fit) on ``problem`` and write each into `FILE` when found.

    The methods are those of this package, with their default fields: UsageError for others.

    The default of ``steps`` is the number of steps of the recorded search. ``on_method`` gets name, number and count at
    the start of each method, ``on_rate`` each rate and its mean end loss. Returns the problem's part of the record.
    """
    trainers = [Trainer(load_problem(problem, "numpy", "float32", seed), "numpy") for seed in SEEDS]
    first = trainers[0].problem
    if others := [name for name in names or () if name not in constructors()]:
        raise UsageError(f"--tune is for methods of `precond-ref list`, without fields, got {', '.join(others)}")
    entrants, left_out = choose(first, names)
    if not entrants:
        reasons = ", ".join(f"{name} {reason}" for name, reason in left_out.items())
        raise UsageError(f"nothing to tune on {problem}: {reasons}")
    old = record().get(problem, {})
    if steps is None:
        steps = old.get("steps", min(first.default_steps, MOST_STEPS))
    part: dict[str, Any] = {"steps": steps, "seeds": [*SEEDS], "batch_size": first.batch_size, "dtype": "float32"}
    same = all(old.get(key) == value for key, value in part.items())
    if old and names is not None and not same:
        was = ", ".join(f"{key} {value}" for key, value in old.items() if key != "methods")
        raise UsageError(f"{problem} was searched with {was}; to change that, search all methods, without --methods")
    part["methods"] = {name: entry for name, entry in old.get("methods", {}).items() if same and name in constructors()}
    for number, entrant in enumerate(entrants, start=1):
        if on_method is not None:
            on_method(entrant.name, number, len(entrants))

        def measure(lr: float, entrant: Entrant = entrant) -> list[float]:
            runs = [Training(entrant=entrant, lr=lr, lr_source="given") for _ in trainers]
            losses = [
                end_loss(trainer.train(run, steps, curves=False).batch_losses)
                for trainer, run in zip(trainers, runs, strict=True)
            ]
            if on_rate is not None:
                on_rate(lr, sum(losses) / len(losses))
            return losses

        part["methods"][entrant.name] = {"fields": repr(entrant.method), **search(measure)}
        write({**record(), problem: part})
    return part


def write(content: Mapping[str, Any]) -> None:
    """Write `FILE`, one line for each method."""
    parts = []
    for problem, part in sorted(content.items()):
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in part.items() if key != "methods"]
        methods = sorted(part["methods"].items())
        rows = ",\n".join(f"   {json.dumps(name)}: {json.dumps(entry, allow_nan=False)}" for name, entry in methods)
        lines.append(f'  "methods": {{\n{rows}\n  }}')
        parts.append(f" {json.dumps(problem)}: {{\n" + ",\n".join(lines) + "\n }")
    new = FILE.with_suffix(".new")
    new.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    new.replace(FILE)  # in one step: after an interruption there is the old file or the new one
