"""The largest ratio found of every inequality of `precond_ref.theory`, as a picture.

python docs/experiments/theory.py          # from tests/theory_worst.json
"""

from __future__ import annotations

import json
from pathlib import Path

import common

from precond_ref import theory

RECORD = Path(__file__).parents[2] / "tests" / "theory_worst.json"
GROUPS = {"asgo": "#0072B2", "sgd": "#000000", "agd": "#D55E00", "sketch": "#009E73", "nystrom": "#009E73",
          "sadagrad": "#CC79A7", "sshampoo": "#E69F00", "rf": "#56B4E9", "if": "#56B4E9", "mbf": "#7A5195"}  # fmt: skip


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    names = [name for name, statement in theory.list_statements().items() if not statement.identity and name in record]
    fewest = min(record[name]["instances"] for name in names)
    figure, panel = common.axes(9, 0.24 * len(names) + 0.8)
    for row, name in enumerate(reversed(names)):
        ratio, colour = record[name]["ratio"], GROUPS[name.partition(".")[0]]
        panel.barh(row, ratio, color=colour, height=0.62)
        panel.text(min(ratio, 1.0) + 0.008, row, f"{ratio:.3f}" if ratio < 0.9995 else "1", va="center", fontsize=8.5)
    panel.set_yticks(range(len(names)), reversed(names), fontsize=8.5)
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set(xlim=(0, 1.08), ylim=(-0.6, len(names) - 0.4))
    panel.set_title(f"left side / right side, the largest of at least {fewest} instances each", loc="left")
    panel.grid(axis="y", visible=False)
    common.save(options.output, "theory", figure=figure)


if __name__ == "__main__":
    main()
