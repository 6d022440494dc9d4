"""Functions that all commands share: errors, output files, standard output, progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

EXTRA = 'pip install "precond-ref[cli]"'


def fail(message: object) -> NoReturn:
    """Print one line on the error stream and end with exit code 2."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


@contextmanager
def own_method(name: Callable[[], str]) -> Iterator[None]:
    """Turn an error of a method from outside this package into one line, which has the place, and exit code 2."""
    try:
        yield
    except Exception as error:
        if ":" not in name():
            raise
        from precond_ref.conformance.subjects import said

        first = error.__cause__ if type(error.__cause__) is type(error) else error  # the same, without a prefix
        fail(f"{name()} failed: {said(first)}")


def check_files(*files: Path | None) -> None:
    """Fail, before anything is computed, unless each of the files can be written."""
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            fail(f"there is no folder {file.parent} to write {file.name} to")
        if file is not None and file.is_dir():
            fail(f"{file} is a folder, no file can be written there")


def standard_output() -> Console:
    """Return a console on standard output, in which tables keep all columns and the terminal wraps long lines."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=1000)


def progress() -> Progress:
    """Return a progress line for the error stream: a name, a bar, a loss. It is empty if this is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
