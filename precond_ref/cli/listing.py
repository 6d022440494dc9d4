"""``precond-ref list``: all methods, presets and their fields."""

from __future__ import annotations

import dataclasses
import inspect
import json as json_module
from collections.abc import Callable
from typing import Annotated, Any

import typer

from precond_ref.protocol import Method
from precond_ref.registry import arguments, constructors, list_methods, required

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
        known = arguments(constructors()[entry["name"]])
        for number, field in enumerate(entry["fields"]):
            if number == len(known):
                typer.echo("    set by the preset:")
            head = field["name"] if field["required"] else f"{field['name']} = {field['default']!r}"
            typer.echo(f"    {head:<22} {field['meaning']}")
        typer.echo()


def described(name: str, make: Callable[..., Method]) -> dict[str, Any]:
    """Return the entry of ``precond-ref list --json`` for a method or a preset.

    Its fields are the arguments of ``make`` with their defaults, and after these, for a preset that can be made without
    arguments, the other fields with the values that the preset sets.
    """
    method = list_methods()[name.partition(".")[0]]
    missing = required(make)
    fields = {p.name: None if p.name in missing else p.default for p in inspect.signature(make).parameters.values()}
    if not missing:
        made: Any = make()
        fields |= {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.name not in fields}
    first_line = " ".join(inspect.cleandoc(make.__doc__ or "").partition("\n\n")[0].split())
    return {
        "name": name,
        "about": first_line.replace("::", ".").replace("``", ""),
        "paper": method.paper,
        "elementwise": method.elementwise,
        "fields": [
            {"name": field, "required": field in missing, "default": value,
             "meaning": method.symbols.get(field, "option of this preset alone")}
            for field, value in fields.items()
        ],
    }  # fmt: skip
