"""``precond-ref bench``: times of the methods. The command imports heavy libraries only when it runs."""

from __future__ import annotations

import json as json_module
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from precond_ref.cli.terminal import check_files, fail, progress, standard_output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from precond_ref.bench.harness import Race

EXAMPLES = """\b
Examples:
  precond-ref bench
  precond-ref bench --method "my_module:Fast(beta2=0.5)"
  precond-ref bench --suite memory
  precond-ref bench --suite scaling --only "matrices of" --rounds 3 --figure growth.svg
  precond-ref bench --only S-Shampoo --rounds 40 --threads 2
  bash benchmarks/peers.sh ~/peers && precond-ref bench --against peers --peers ~/peers
  precond-ref bench --output steps.json && python -m pyperf stats steps.json

\b
Suites:
  steps    a step of the adapters beside the frameworks' optimizers, bare costs and, on request, peers
  roots    inverse square roots beside the bare eigendecomposition
  sketch   Frequent Directions beside the bare singular value decomposition
  memory   bytes of state beside the formulas, and the peak of a step
  scaling  growth with parameters, sizes, blocks and refresh periods, beside theory
"""
SUITES = ("steps", "roots", "sketch", "memory", "scaling")
EXTRA = 'pip install "precond-ref[bench,torch,jax]"'


def bench_command(
    suite: Annotated[str, typer.Option(metavar="NAME", help="One of the suites below.")] = "steps",
    method: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Time this method alone, also module:Class, beside AdamW; --suite steps."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="peers", help="Also time other packages, in environments of their own.")
    ] = None,
    peers: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", envvar="PRECOND_REF_PEERS", help="The folder that `benchmarks/peers.sh FOLDER` has made."
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Only titles that contain TEXT, such as `ASGO` or `large`.")
    ] = None,
    threads: Annotated[int, typer.Option(metavar="N", help="Threads of linear algebra.")] = 1,
    rounds: Annotated[int, typer.Option(metavar="N", help="Measurements of each contender, at least 2.")] = 15,
    clock: Annotated[
        str, typer.Option(metavar="wall|cpu", help="Time of the day, or of the processor: steadier on a busy machine.")
    ] = "wall",
    json: Annotated[bool, typer.Option("--json", help="Machine-readable, on standard output; no tables.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the times as a pyperf suite.")] = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the growth with parameters; with --suite scaling.")
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny sizes: whether it runs, not how fast.")] = False,
) -> None:
    """Time the methods beside their peers and their floors.

    The contenders take turns, so that a busy machine slows all of them: each round measures every contender for about
    50 ms. A ratio is the time divided by the time of the first row in the same round; the median over the rounds is
    shown. States are float32. Gradients are random, four sets in turn. The first steps, which compile, are not counted.
    """

    if suite not in SUITES:
        fail(f"there is no suite {suite!r}; there are {', '.join(SUITES)}")
    if against not in (None, "peers"):
        fail(f"--against takes only `peers`, got {against!r}")
    if against == "peers" and (peers is None or not peers.is_dir()):
        fail("--against peers needs --peers FOLDER with what `bash benchmarks/peers.sh FOLDER` makes")
    if against and suite != "steps":
        fail(f"--against peers goes with --suite steps, got {suite}")
    if method is not None and (suite != "steps" or against):
        fail("--method goes with --suite steps and without --against")
    if output is not None and suite == "memory":
        fail("--output is for times, and --suite memory has none; --json writes what it has")
    if figure is not None and suite != "scaling":
        fail(f"--figure draws the growth with parameters, --suite scaling; got {suite}")
    check_files(output, figure)
    if threads < 1 or rounds < 2:
        fail(f"--threads must be >= 1 and --rounds >= 2, got {threads} and {rounds}")
    if clock not in ("wall", "cpu"):
        fail(f"--clock must be wall or cpu, got {clock!r}")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        from precond_ref.bench import report, suites

        console = standard_output()
        folder = peers.absolute() if against and peers else None
        races = suites.RACES.get(suite, ()) if method is None else races_of(method)
        shown, data, entries, swept = measured(suite, races, only, threads, rounds, smoke, folder, clock)
        if figure is not None:
            growth = [(sweep, points) for sweep, points in swept if suites.GROWTH in sweep.title]
            if not growth or not all(result.seconds for _, points in growth for result in points.values()):
                fail("there is no complete growth with parameters to draw")
            report.growth_figure(growth).savefig(figure, dpi=120)
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed: {EXTRA}")
    except OSError as error:
        fail(error)
    if not shown:
        fail(f"nothing in suite {suite} has {only!r} in its title; there are {'; '.join(titles(suite, races))}")
    if output is not None:
        times = report.suite(entries, threads, clock)
        if times is None:
            fail("there are no times to write")
        times.dump(str(output), replace=True)
    if json:
        content = {
            "suite": suite,
            "threads": threads,
            "clock": clock,
            "smoke": smoke,
            "machine": report.machine(),
            "results": data,
        }
        typer.echo(json_module.dumps(content, indent=1))
        return
    console.print(report.heading(suite, threads, clock))
    for table in shown:
        console.print()
        console.print(table)
    if suite == "memory":
        console.print()
        for line in report.MEMORY_NOTES:
            console.print(line)


def races_of(method: str) -> Sequence[Race]:
    """Return the races of a method; a text that names none ends the command."""
    from precond_ref.bench import suites
    from precond_ref.cost.report import SIZE
    from precond_ref.registry import parse

    try:
        periods = parse(method).made(size=SIZE).periods
    except (ValueError, ImportError) as error:
        fail(error)
    return suites.races_of(method, periods if isinstance(periods, int) else max(periods))


def titles(suite: str, races: Sequence[Race]) -> list[str]:
    """Return the titles of a suite, which ``--only`` searches."""
    from precond_ref.bench import memory, suites

    if suite == "memory":
        return [f"{workload}: {method}" for workload, methods in memory.METHODS.items() for method in methods]
    if suite == "scaling":
        return [sweep.title for sweep in suites.sweeps(smoke=False)]
    return [f"{race.title}, {race.workload}" for race in races]


def measured(
    suite: str,
    races: Sequence[Race],
    only: str | None,
    threads: int,
    rounds: int,
    smoke: bool,
    peers: Path | None,
    clock: str,
) -> tuple[list[Table], list[dict[str, Any]], list[Any], list[Any]]:
    """Return the tables, the same as plain data, and all times with their titles."""
    from precond_ref.bench import harness, memory, report, suites

    tables, data, entries, swept = [], [], [], []

    def wanted(title: str) -> bool:
        return only is None or only.lower() in title.lower()

    with progress() as bar:
        task = bar.add_task(suite, total=None, loss="")

        def on_progress(text: str) -> None:
            bar.update(task, description=text)

        if suite == "memory":
            rows = []
            for workload, methods in memory.METHODS.items():
                for method in methods:
                    if wanted(f"{workload}: {method}"):
                        on_progress(f"{workload}: {method}")
                        rows.append(memory.measure(workload, method, smoke=smoke))
            tables, data = [report.memory_table(rows)] * bool(rows), [row._asdict() for row in rows]
        elif suite == "scaling":
            for sweep in suites.sweeps(smoke):
                if wanted(sweep.title):
                    points = harness.sweep(sweep, threads=threads, rounds=rounds, clock=clock, on_progress=on_progress)
                    tables.append(report.sweep_table(sweep, points))
                    data.append(report.sweep_json(sweep, points))
                    entries += [(sweep.title, result) for result in points.values()]
                    swept.append((sweep, points))
        else:
            for race in races:
                if wanted(f"{race.title}, {race.workload}"):
                    results = harness.run(
                        race,
                        threads=threads,
                        rounds=rounds,
                        smoke=smoke,
                        peers=peers,
                        clock=clock,
                        on_progress=on_progress,
                    )
                    tables.append(report.race_table(race, results))
                    data.append(report.race_json(race, results))
                    entries += [(f"{race.title}, {race.workload}", result) for result in results]
    return tables, data, entries, swept
