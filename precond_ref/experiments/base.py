"""Experiments and claims: a claim has a criterion that stands before the result, an experiment decides one or several.

An experiment computes the numbers of one seed, as JSON. Verdict, table and figure are functions of the numbers of all
seeds alone, so that they can be made again from the file that a run has written.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from precond_ref import files
from precond_ref.experiments.numbers import Numbers, markdown, np, plain, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Tick = Callable[[float], None]
"""Told the share of its work that a function has done."""

HOLDS, PART, NOT, UNTESTED = "holds", "holds in part", "does not hold here", "cannot be tested here"
PAPERS = {"A": "ASGO", "S": "Sketchy", "R": "Root-free", "M": "MBF", "G": "AGD"}
"""The papers by the first letters of their claims."""
QUICK = "(--quick: the verdict says nothing)"
"""Stands beside the verdict of a run with options."""


class Verdict(NamedTuple):
    """The outcome of a criterion."""

    word: str
    """`HOLDS`, `PART`, `NOT` or `UNTESTED`."""
    measured: str
    """The numbers on which it rests, with their spread; for `PART` where it holds, for `UNTESTED` the reason."""


def decided(parts: Mapping[str, bool], measured: str) -> Verdict:
    """Return that a claim holds if all its parts do, and in part, with their names, if some do."""
    yes, no = ([name for name, good in parts.items() if good == wanted] for wanted in (True, False))
    if yes and no:
        return Verdict(PART, f"Holds for: {'; '.join(yes)}. Not for: {'; '.join(no)}. {measured}")
    return Verdict(NOT if no else HOLDS, measured)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of a paper."""

    name: str
    """Letter and number, such as "A1"."""
    text: str
    """The claim in our words."""
    criterion: str
    """The claim holds here if ..."""
    judge: Callable[[list[Numbers]], Verdict]
    """The verdict from the numbers of all seeds."""

    @property
    def paper(self) -> str:
        """Name of the paper's method."""
        return PAPERS[self.name[0]]

    def __call__(self, runs: list[Numbers]) -> Verdict:
        return self.judge(runs)


def claim(name: str) -> Callable[[Callable[[list[Numbers]], Verdict]], Claim]:
    """Return a decorator of a judge, whose docstring has the claim in its first line, then "Holds here if: ..."."""

    def made(judge: Callable[[list[Numbers]], Verdict]) -> Claim:
        text, _, criterion = " ".join((judge.__doc__ or "").split()).partition(" Holds here if: ")
        return Claim(name=name, text=text, criterion=criterion.removesuffix("."), judge=judge)

    return made


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment that decides claims."""

    name: str
    title: str
    """The setting, in one sentence."""
    minutes: float
    """Processor time with ``seeds``, measured."""
    seeds: int = 5
    """Number of seeds unless the command names another."""
    claims: tuple[Claim, ...]
    one: Callable[..., Numbers]
    """``one(seed, tick, **options)``, and ``found=`` if there is a search: the numbers of one seed."""
    draw: Callable[[list[Numbers]], Figure]
    table: Callable[[list[Numbers]], str] | None = None
    """A Markdown table; None: that of all numbers."""
    search: Callable[..., Numbers] | None = None
    """``search(tick, **options)``: learning rates, searched before from other seeds."""
    needs: tuple[str, ...] = ()
    """Data files and libraries beyond NumPy."""
    small: Mapping[str, Any] = field(default_factory=dict)
    """Options of a run of seconds, which shows that the experiment runs and not what it finds."""

    def tabulated(self, runs: list[Numbers]) -> str:
        """Return the Markdown table."""
        return (self.table or table)(runs)

    def run(self, seeds: Sequence[int], tick: Tick = lambda share: None, **options: Any) -> Numbers:
        """Return the record of a run: its numbers for each seed, with settings and processor time."""
        start, parts = time.process_time(), len(seeds) + 2 * (self.search is not None)
        record: Numbers = {"experiment": self.name, "seeds": list(seeds), "options": options}
        if self.search is not None:
            record["search"] = self.search(lambda share: tick(2 * share / parts), **options)
            options = {**options, "found": record["search"]}
        done = parts - len(seeds)
        record["runs"] = []
        for i, seed in enumerate(seeds):

            def inside(share: float, before: int = done + i) -> None:
                tick((before + share) / parts)

            record["runs"].append(self.one(seed, inside, **options))
        record["seconds"] = round(time.process_time() - start, 1)
        record["versions"] = {"python": platform.python_version(), "numpy": np.__version__}
        record["threads"] = os.environ.get("OMP_NUM_THREADS")
        return plain(record)


# ---- files ----------------------------------------------------------------------------------------------------------


def write(experiment: Experiment, record: Numbers, folder: Path) -> None:
    """Write ``NAME.json``, and from it ``NAME.svg`` and ``NAME.txt``, the table."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{experiment.name}.json.part"  # whoever interrupts has the old record or the new one
    part.write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(folder / f"{experiment.name}.json")
    (folder / f"{experiment.name}.txt").write_text(experiment.tabulated(record["runs"]), encoding="utf-8")
    experiment.draw(record["runs"]).savefig(folder / f"{experiment.name}.svg", metadata={"Date": None})


def read(experiment: Experiment, folder: Path) -> Numbers | None:
    """Return the record that a run has written; None without one, ValueError for what no run has written."""
    file = folder / f"{experiment.name}.json"
    if not file.exists():
        return None
    record = files.read_json(file)
    try:
        if record["experiment"] != experiment.name:
            raise ValueError(f"it is one of {record['experiment']}")
        record["seeds"], record["options"], float(record["seconds"]), experiment.tabulated(record["runs"])
        for claim in experiment.claims:
            claim.judge(record["runs"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        why = f"{type(error).__name__}: {files.shown(error, 100)}"
        raise ValueError(f"{file} is no record of a run of {experiment.name} ({why}); move it away") from error
    return dict(record)


def verdicts(experiments: Iterable[Experiment], folder: Path) -> str:
    """Return Markdown tables of all claims, a row each, and the times, from the records in ``folder``."""
    papers: dict[str, list[tuple[Claim, Verdict, str]]] = {}
    times: dict[str, float] = {}
    for experiment in experiments:
        record = read(experiment, folder)
        if record:
            times[experiment.name] = record["seconds"]
        for claim in experiment.claims:
            verdict = claim.judge(record["runs"]) if record else Verdict("not run", "")
            quick = f" {QUICK}" if record and record["options"] else ""
            seeds = f", {len(record['seeds'])} seeds" if record else ""
            papers.setdefault(claim.paper, []).append(
                (claim, verdict, f"`precond-ref experiments {experiment.name}`{seeds}{quick}")
            )
    parts = []
    for paper, found in papers.items():
        rows = [
            (
                f"**{claim.name}** {claim.text} *Holds here if:* {claim.criterion}.",
                verdict.measured,
                f"**{verdict.word}** {command}",
            )
            for claim, verdict, command in sorted(found, key=lambda each: int(each[0].name[1:]))
        ]
        cells = [[cell.replace("|", "\\|").replace("~", "\\~") for cell in row] for row in rows]
        parts.append(f"## {paper}\n\n" + markdown(("claim", "measured", "verdict, command"), cells))
    each = ", ".join(f"{name} {seconds:.0f}" for name, seconds in times.items())
    parts.append(f"## Time\n\nSeconds of processor time: {each}; together {sum(times.values()) / 60:.1f} minutes.\n")
    return "\n".join(parts)
