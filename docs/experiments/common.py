"""Code that the experiments share: the folder of the results, Markdown tables, the style of the figures, progress."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from matplotlib import rcParams
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The colours of Okabe and Ito, without the yellow."""
rcParams.update({"svg.hashsalt": "precond-ref", "svg.fonttype": "path", "font.size": 10})


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option ``--output``, the folder of the results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the results")
    return parser


def progress() -> Progress:
    """Return a progress bar on the error stream."""
    return Progress(console=Console(stderr=True), transient=True)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def axes(width: float = 9.0, height: float = 3.8, columns: int = 1, **kwargs: Any) -> tuple[Figure, Any]:
    """Return a figure and its axes, without the upper and right side of the frame."""
    figure = Figure(figsize=(width, height), layout="constrained")
    result = figure.subplots(1, columns, **kwargs)
    for one in [result] if columns == 1 else result:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    return figure, result


def save(folder: Path, name: str, *, tables: str = "", data: Any = None, figure: Figure | None = None) -> None:
    """Write ``name.svg``, ``name.json`` and the tables ``name-table.txt``, and print these."""
    folder.mkdir(parents=True, exist_ok=True)
    if figure is not None:
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    if data is not None:
        (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if tables:
        (folder / f"{name}-table.txt").write_text(tables, encoding="utf-8")
        print(tables)
