"""Write `precond_ref/__init__.pyi`, which tells type checkers the module of each public name."""

from pathlib import Path

import precond_ref

FILE = Path(precond_ref.__file__).with_suffix(".pyi")


def text() -> str:
    """Return what the file must contain."""
    places = sorted((place, name) for name, place in vars(precond_ref)["_PLACES"].items())
    imports = [f"from precond_ref.{place} import {name} as {name}\n" for place, name in places]
    return "".join(["# python tools/names.py writes this file\n# ruff: noqa: I001\n", *imports, "\n__version__: str\n"])


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8", newline="\n")
