"""The command line ``precond-ref``; `application` returns it with its commands."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def main() -> None:
    """Entry point of the command ``precond-ref``."""
    try:
        app = application()
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit('precond-ref needs typer on the command line: pip install "precond-ref[cli]"')
    app()


def application() -> typer.Typer:
    """Return the application with all commands."""
    from precond_ref.cli import app

    return app.application()
