"""``precond-ref experiments``: the claims of the papers, tested; it imports heavy libraries only when it runs."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from precond_ref.cli.terminal import EXTRA, fail, progress, standard_output

if TYPE_CHECKING:
    from precond_ref.experiments import Experiment

EXAMPLES = """\b
Examples:
  precond-ref experiments                             # the list, with times
  precond-ref experiments dials spectra --output out  # two of them
  precond-ref experiments --all                       # all of them
  precond-ref experiments dials --draw                # table, figure and verdicts again, from dials.json
  precond-ref experiments --all --quick               # some steps of each, to see that they run

\b
Each experiment writes into the folder of --output:
  NAME.json    the numbers of every seed, settings, processor time
  NAME.txt     the table, in Markdown
  NAME.svg     the figure
  verdicts.txt one row for each claim, of all experiments that the folder has
"""


def experiments_command(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Experiments of the list.")] = None,
    all_of_them: Annotated[bool, typer.Option("--all", help="Run all experiments.")] = False,
    seeds: Annotated[
        int | None,
        typer.Option(metavar="N", help="Seeds 0 to N - 1 [default: the experiment's]; the rates have others."),
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the results.")] = Path(
        "precond-ref-experiments"
    ),
    draw: Annotated[bool, typer.Option("--draw", help="Run nothing: make everything again from the JSON.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few steps of small networks; the verdicts say nothing.")
    ] = False,
) -> None:
    """Test claims of the papers, each by a criterion that stands before the result.

    Without a name: list the experiments with the claims that they decide, their processor time and the data they need.
    The data are looked for in the folder that PRECOND_REF_DATA names. A claim holds, holds in part, does not hold here,
    or cannot be tested here; the tables show the median over the seeds, with the least and the largest in brackets.

    Ctrl-C ends the command; the experiments that are done are written.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when NumPy or PyTorch is imported
    try:
        from precond_ref import experiments
        from precond_ref.experiments import base

        console = standard_output()
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed: {EXTRA}")
    if find_spec("matplotlib") is None:
        fail(f"matplotlib is not installed: {EXTRA}")
    known = experiments.list_experiments()
    if not names and not all_of_them:
        if draw or quick or seeds is not None:
            fail("--draw, --quick and --seeds need names of experiments, or --all, got neither")
        for experiment in known.values():
            claims = ", ".join(claim.name for claim in experiment.claims)
            needs = f", needs {', '.join(experiment.needs)}" if experiment.needs else ""
            console.print(
                f"{experiment.name}  (decides {claims}; {experiment.minutes:g} min, {experiment.seeds} seeds{needs})"
            )
            console.print(f"    {experiment.title}")
            for claim in experiment.claims:
                console.print(f"    {claim.name} {claim.paper}: {claim.text}")
        console.print(f"all: {sum(experiment.minutes for experiment in known.values()):.0f} minutes of processor time")
        return
    chosen = list(known) if all_of_them else list(dict.fromkeys(names or ()))
    if unknown := [name for name in chosen if name not in known]:
        fail(f"no experiment is called {', '.join(unknown)}; there are {', '.join(known)}")
    if seeds is not None and seeds < 1:
        fail(f"--seeds must be at least 1, got {seeds}")
    try:  # before anything runs: the verdicts take all records of the folder
        if not draw:
            output.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=output).close()
        records = {name: base.read(experiment, output) for name, experiment in known.items()}
    except ValueError as error:
        fail(error)
    except OSError as error:
        fail(f"--output must be a folder that can be written to, got {output} ({error.strerror})")
    if quick and not draw and (whole := [n for n in chosen if (old := records[n]) is not None and not old["options"]]):
        fail(f"--quick must not replace the record of a whole run, got one of {', '.join(whole)} in {output}")
    for name in chosen:
        try:
            record = records[name] if draw else _run(known[name], seeds or known[name].seeds, quick)
            if record is None:
                run = f"run `precond-ref experiments {name} --output {output}` first"
                raise FileNotFoundError(f"{output / name}.json is not there: {run}")
            base.write(known[name], record, output)
            text = base.verdicts(known.values(), output)
            (output / "verdicts.txt").write_text(text, encoding="utf-8")
        except (OSError, ModuleNotFoundError, ValueError) as error:
            why = str(error)
            if isinstance(error, ModuleNotFoundError):
                why = f"{error.name} is not installed: pip install {error.name}"
            if all_of_them:
                typer.echo(f"{name}: left out, {why}", err=True)
                continue
            fail(f"{name}: {why}")
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        table = known[name].tabulated(record["runs"])
        console.print(f"{name}: {record['seconds']:g} s of processor time\n\n{table}")
        for claim in known[name].claims:
            word, measured = claim.judge(record["runs"])
            console.print(
                f"{claim.name} {claim.text}\n   holds here if: {claim.criterion}\n   {measured}\n   -> {word}"
                f"{f' {base.QUICK}' * bool(record['options'])}\n"
            )
    console.print(f"written: {output}")


def _run(experiment: Experiment, seeds: int, quick: bool) -> dict[str, Any]:
    """Run with a progress bar."""
    with progress() as bar:
        task = bar.add_task(experiment.name, total=1.0, loss="")
        options = dict(experiment.small) if quick else {}
        return experiment.run(range(seeds), lambda share: bar.update(task, completed=share), **options)
