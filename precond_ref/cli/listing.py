"""``precond-ref list``: the methods."""

from __future__ import annotations

import dataclasses
import inspect
import json as json_module
from collections.abc import Callable
from typing import Annotated, Any

import typer

from precond_ref.protocol import Method
from precond_ref.registry import constructors, list_methods, required

EXAMPLES = """\b
Examples:
  precond-ref list | less
  precond-ref list --json | python -m json.tool
"""


def list_command(
    json: Annotated[bool, typer.Option("--json", help="Machine-readable, on standard output.")] = False,
) -> None:
    """Show all methods: papers, fields, defaults, meaning."""
    entries = [described(name, make) for name, make in constructors().items()]
    if json:
        typer.echo(json_module.dumps(entries, indent=2))
        return
    for entry in entries:
        typer.echo(f"{entry['name']}\n  {entry['about']}\n  {entry['paper']}")
        for field in entry["fields"]:
            head = field["name"] if field["required"] else f"{field['name']} = {field['default']!r}"
            typer.echo(f"    {head:<22} {field['meaning']}")
        typer.echo()


def described(name: str, make: Callable[..., Method]) -> dict[str, Any]:
    """What ``precond-ref list --json`` says of a method or a preset."""
    method = list_methods()[name.partition(".")[0]]
    missing = required(make)
    if missing:  # cannot be made: what it asks for
        fields = {p.name: None if p.name in missing else p.default for p in inspect.signature(make).parameters.values()}
        symbols = method.symbols
    else:
        made: Any = make()
        fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
        symbols = made.symbols
    first_line = " ".join(inspect.cleandoc(make.__doc__ or "").partition("\n\n")[0].split())
    return {
        "name": name,
        "about": first_line.replace("::", ".").replace("``", ""),
        "paper": method.paper,
        "elementwise": method.elementwise,
        "fields": [
            {"name": field, "required": field in missing, "default": value, "meaning": symbols.get(field, "")}
            for field, value in fields.items()
        ],
    }
