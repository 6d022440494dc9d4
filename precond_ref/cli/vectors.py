"""``precond-ref vectors build | verify | list``."""

from __future__ import annotations

import filecmp
import json as json_module
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from precond_ref.cli.terminal import EXTRA, fail, progress
from precond_ref.conformance import vectors

EXAMPLES = """\b
Examples:
  precond-ref vectors list --method ASGO
  precond-ref vectors list --json | python -m json.tool
  precond-ref vectors verify
  precond-ref vectors build --check
"""


def application() -> typer.Typer:
    """Return the application with the commands of ``vectors``."""
    app = typer.Typer(
        help="The conformance vectors: show, check and write them.", no_args_is_help=True, rich_markup_mode=None
    )
    app.command("list", epilog=EXAMPLES)(list_command)
    app.command("verify")(verify_command)
    app.command("build")(build_command)
    return app


def list_command(
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only the cases of a method, or of a preset such as ASGO.theory.")
    ] = None,
    tier: Annotated[str | None, typer.Option(metavar="must|should|may", help="Only the cases of this tier.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The manifest's entries, on standard output.")] = False,
) -> None:
    """Show the cases: id, tier, kind, purpose."""
    listed = vectors.cases()
    for option, value, keys in (("--method", method, ("method", "constructor")), ("--tier", tier, ("tier",))):
        known = dict.fromkeys(getattr(case, key) for key in keys for case in vectors.cases() if getattr(case, key))
        if value is not None and value not in known:
            fail(f"{option} must be one of {', '.join(known)}, got {value!r}")
        if value is not None:
            listed = [case for case in listed if value in [getattr(case, key) for key in keys]]
    if json:
        ids = {case.id for case in listed}
        entries = [{k: v for k, v in e.items() if k != "folder"} for e in vectors.entries() if e["id"] in ids]
        typer.echo(json_module.dumps(entries, indent=2))
        return
    width = max(len(case.id) for case in listed)
    for case in listed:
        typer.echo(f"{case.id:<{width}}  {case.tier:<6}  {case.kind:<9}  {case.why}")


def verify_command(
    folder: Annotated[
        Path | None, typer.Argument(help="A copy of one version.  [default: all that are installed]")
    ] = None,
) -> None:
    """Check the files and the manifest against the rules."""
    try:
        faults = vectors.verify(folder)
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed: {EXTRA}")
    for fault in faults:
        typer.echo(fault)
    if faults:
        raise typer.Exit(1)
    typer.echo(f"{len(vectors.cases(folder=folder))} cases: ok")


def build_command(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 if the files there are not these.")
    ] = False,
) -> None:
    """Compute all cases again and write them.

    The arithmetic has 50 digits and shares no code with the library.
    """
    try:
        from precond_ref.conformance import build as builder
    except ModuleNotFoundError as error:
        fail(f'{error.name} is not installed: pip install "precond-ref[vectors]"')
    with tempfile.TemporaryDirectory() as temporary:
        new = Path(temporary) / "vectors"
        with progress() as bar:
            task = bar.add_task("", loss="")
            try:
                builder.build(
                    new, lambda name, done, total: bar.update(task, description=name, completed=done, total=total)
                )
            except KeyboardInterrupt:
                typer.echo("interrupted: nothing was written", err=True)
                raise typer.Exit(130) from None
        faults = [fault for version in sorted(new.iterdir()) for fault in vectors.verify(version)]
        for fault in faults:
            typer.echo(fault, err=True)
        if faults:
            raise typer.Exit(1)
        differences = compared(vectors.FOLDER, new)
        for difference in differences:
            typer.echo(difference)
        if check:
            typer.echo(f"{len(differences)} files differ" if differences else "the files are what the build gives")
            raise typer.Exit(1 if differences else 0)
        if vectors.FOLDER.exists():
            shutil.rmtree(vectors.FOLDER)
        shutil.copytree(new, vectors.FOLDER)
    typer.echo(f"{len(vectors.cases())} cases in {vectors.FOLDER}")


def compared(old: Path, new: Path) -> list[str]:
    """Return a line for each file that is not in both folders with the same bytes."""
    files = [{p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} for folder in (old, new)]
    lines = [f"gone: {name}" for name in files[0] - files[1]] + [f"new: {name}" for name in files[1] - files[0]]
    both = files[0] & files[1]
    return sorted(lines + [f"changed: {n}" for n in both if not filecmp.cmp(old / n, new / n, shallow=False)])
