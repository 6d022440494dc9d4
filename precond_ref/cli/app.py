"""The command line ``precond-ref``. Each command has a module of its own beside this one."""

from __future__ import annotations

from typing import Annotated

import typer

import precond_ref
from precond_ref.cli import bench, check, compare, cost, experiments, listing, regret, vectors

EXPERIMENTS = "Test claims of the papers, each by a criterion that stands before the result."
CHECK = "Check an implementation, and say what it computes instead."


def application() -> typer.Typer:
    """Return the application with all commands."""
    app = typer.Typer(
        help="Reference implementations of preconditioned optimizers.",
        epilog="Begin with `precond-ref compare`. The help of each command has examples.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(version_option)
    app.command("list", epilog=listing.EXAMPLES)(listing.list_command)
    app.command("compare", epilog=compare.EXAMPLES)(compare.compare_command)
    app.command("regret", epilog=regret.EXAMPLES)(regret.regret_command)
    app.command("experiments", short_help=EXPERIMENTS, epilog=experiments.EXAMPLES)(experiments.experiments_command)
    app.command("check", short_help=CHECK, epilog=check.EXAMPLES)(check.check_command)
    app.add_typer(vectors.application(), name="vectors")
    app.command("bench", epilog=bench.EXAMPLES)(bench.bench_command)
    app.command("cost", epilog=cost.EXAMPLES)(cost.cost_command)
    return app


def print_version(wanted: bool) -> None:
    """Print the version and end the command, if ``wanted``."""
    if wanted:
        typer.echo(f"precond-ref {precond_ref.__version__}")
        raise typer.Exit


def version_option(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Reference implementations of preconditioned optimizers."""
