"""``precond-ref compare``: all methods on one problem. The command imports heavy libraries only when it runs."""

from __future__ import annotations

import json as json_module
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from precond_ref.cli.terminal import EXTRA, check_files, fail, own_method, progress, standard_output
from precond_ref.problems import list_problems

if TYPE_CHECKING:
    from precond_ref.compare import Comparison, Training

EXAMPLES = """\b
Examples:
  precond-ref compare
  precond-ref compare --methods ASGO,Shampoo,Adam --steps 500 --seeds 5
  precond-ref compare --problem digits-autoencoder --lr ASGO=0.02 --lr Adam=0.01
  precond-ref compare --backend jax --dtype float64 --json result.json --output curves.svg
  precond-ref compare --tune --problem digits-mlp --methods ASGO

\b
Problems:
""" + "\n".join(f"  {name:<20} {text}" for name, text in list_problems().items())


def compare_command(
    problem: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="One of the problems below.  [default: digits-mlp; with --tune: all]"),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help='Methods as `precond-ref list` names them, or your own: "ASGO(every=10),my_module:Mine(beta2=0.9)".  '
            "[default: all that fit]",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Steps of each run.  [default: the problem's]")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="First parameters and order of the batches.")] = 0,
    seeds: Annotated[
        int, typer.Option(metavar="N", help="Number of seeds, counted from --seed; the numbers are medians over them.")
    ] = 1,
    target: Annotated[
        float | None,
        typer.Option(metavar="LOSS", help="Train loss to which steps and time are counted.  [default: Adam's last]"),
    ] = None,
    backend: Annotated[str, typer.Option(metavar="numpy|cupy|torch|jax", help="Array library.")] = "numpy",
    dtype: Annotated[str, typer.Option(metavar="float32|float64", help="Precision.")] = "float32",
    lr: Annotated[
        list[str] | None,
        typer.Option("--lr", metavar="METHOD=VALUE", help="Learning rate instead of the recorded one; repeatable."),
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything, as JSON.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The figure; .png, .svg, .pdf, ...  [default: precond-ref-compare-PROBLEM.png]"
        ),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Repeat the grid search of the learning rates and record the best.")
    ] = False,
) -> None:
    """Train all methods that fit one problem and show who wins.

    The winner has the smallest loss on the whole training set after the last step; with --seeds the smallest median
    over the seeds, and the figure has a band from the least to the largest. All methods start from the same parameters
    and see the same batches. Each has its own learning rate: the best of a recorded grid search, which was
    the same for all. The parameters that a method does not take (mostly biases) go to Adam at the same rate.

    Linear algebra runs on one thread, because the matrices are small; OMP_NUM_THREADS sets another number.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when NumPy or PyTorch is imported
    try:
        from precond_ref.compare import UsageError, prepare, report

        console = standard_output()
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed: {EXTRA}")
    try:
        if tune:
            if lr or json or output or (seed, seeds, target, backend, dtype) != (0, 1, None, "numpy", "float32"):
                fail("--tune takes only --problem, --methods and --steps")
            tune_rates(problem, methods, steps)
            return
        comparison = prepare(
            problem or "digits-mlp",
            methods=methods,
            steps=steps,
            seed=seed,
            seeds=seeds,
            backend=backend,
            dtype=dtype,
            lr=lr or (),
            target=target,
        )
        figure = output or Path(f"precond-ref-compare-{comparison.problem.name}.png")
        report.check_output(figure)
        check_files(figure, json)
        console.print(report.heading(comparison), end="\n\n")
        interrupted = not train(comparison)
        if comparison.finished:
            console.print(report.table(comparison), end="\n\n")
            for line in report.notes(comparison):
                console.print(line)
            report.figure(comparison).savefig(figure, dpi=120)
            console.print(f"figure: {figure}")
            if json is not None:
                json.write_text(json_module.dumps(report.as_json(comparison), allow_nan=False) + "\n", encoding="utf-8")
                console.print(f"JSON: {json}")
        if interrupted:
            typer.echo(f"interrupted: {len(comparison.finished)} of {len(comparison.planned)} runs done", err=True)
            raise typer.Exit(130)
    except (UsageError, OSError) as error:
        fail(error)


def train(comparison: Comparison) -> bool:
    """Train all methods with live progress; return False if the user interrupted the run."""
    count = len(comparison.planned)
    with progress() as bar:
        task = bar.add_task("", total=count * comparison.steps, loss="")

        def on_run(run: Training) -> None:
            done = len(comparison.finished)
            name = f"{run.entrant.name} ({done + 1} of {count})"  # of the runs: each method once for each seed
            bar.update(task, description=name, completed=done * comparison.steps)

        try:
            with own_method(lambda: comparison.planned[len(comparison.finished)].entrant.name):
                comparison.train(on_run, lambda loss: bar.update(task, advance=1, loss=f"loss {loss:.4g}"))
        except KeyboardInterrupt:
            return False
    return True


def tune_rates(problem: str | None, methods: str | None, steps: int | None) -> None:
    """Search the learning rates on one problem, or on all problems with data here and methods that fit."""
    from precond_ref.compare import UsageError
    from precond_ref.registry import parse_list

    try:
        names = None if methods is None else [named.text for named in parse_list(methods)]
    except (ValueError, ImportError) as error:
        fail(error)
    if problem is not None:
        tune_problem(problem, names, steps)
        return
    for name in list_problems():
        try:
            tune_problem(name, names, steps)
        except UsageError as error:
            typer.echo(f"{name}: skipped, {error}")


def tune_problem(name: str, methods: list[str] | None, steps: int | None) -> None:
    """Search the learning rates on one problem with live progress."""
    from precond_ref.compare import tune

    with progress() as bar:
        task = bar.add_task(name, loss="")

        def on_method(method: str, number: int, count: int) -> None:
            text = f"{name}: {method} ({number} of {count})"
            bar.update(task, description=text, completed=number - 1, total=count)

        def on_rate(lr: float, loss: float) -> None:
            bar.update(task, loss=f"lr {lr:.4g}, loss {loss:.4g}")

        try:
            found = tune(name, methods, steps, on_method=on_method, on_rate=on_rate)
        except KeyboardInterrupt:
            typer.echo("interrupted: the rates found so far are recorded", err=True)
            raise typer.Exit(130) from None
    rates = ", ".join(f"{method} {entry['lr']}" for method, entry in found["methods"].items())
    typer.echo(f"{name}: {rates}")
