"""Sphinx configuration; the documentation builds without network and with warnings as errors."""

import dataclasses
import importlib.metadata
import json
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import precond_ref
from precond_ref import theory

project = "precond-ref"
author = "the precond-ref authors"
copyright = "2026, the precond-ref authors"
release = importlib.metadata.version("precond-ref")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"precond-ref {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
mathjax_path = (
    "mathjax-3.2.2/tex-svg.js"  # one file of npm's mathjax@3.2.2 with its fonts, so that pages need no network
)
mathjax3_config = {"options": {"enableMenu": False}}

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath", "substitution"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"


def methods_table() -> str:
    """All methods of the registry as a Markdown table."""
    lines = ["| class | one parameter is | fields and defaults | source |", "|---|---|---|---|"]
    for name, method in precond_ref.list_methods().items():
        low, high = method().ndims if isinstance(method.ndims, property) else method.ndims  # of its fields' defaults
        shape = "any array" if method.elementwise else f"{low} axes" if low == high else f"{low} axes or more"
        shape = {"1 axes": "a vector", "2 axes": "a matrix", "1 axes or more": "one axis or more"}.get(shape, shape)
        fields = ", ".join(
            f"`{field.name}`" if field.default is dataclasses.MISSING else f"`{field.name}={field.default!r}`"
            for field in dataclasses.fields(method)
        )
        lines.append(f"| {{py:class}}`~precond_ref.{name}` | {shape} | {fields} | {method.paper} |")
    return "\n".join(lines)


def routing_table() -> str:
    """Return a Markdown table with the method that `Optimizer` gives a parameter of each kind by default."""
    kinds = {
        "0-D": ((), "scale"),
        "vector": ((8,), "bias"),
        "matrix": ((8, 6), "fc/weight"),
        "embedding": ((8, 6), "embedding/weight"),
        "3-D": ((8, 6, 3), "conv1d/weight"),
        "4-D": ((8, 6, 3, 3), "conv/weight"),
    }
    lines = ["| | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for name, cls in precond_ref.list_methods().items():
        needed = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        method = cls(**{field: {"size": 4}.get(field, 0.5) for field in needed})
        cells = []
        for shape, path in kinds.values():
            given = method.for_shape(shape, path)
            cells.append("`Adam`" if given is None else f"`{given.kind}`" if name == "MBF" else "itself")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


SOURCES = {"PROVED": "proved here", "PAPER": "paper, in words", "FORM": "paper's form"}


def theory_table() -> str:
    """Every statement with its formula, source, proof, and the largest ratio found, as a Markdown table."""
    record = json.loads((Path(__file__).parents[1] / "tests" / "theory_worst.json").read_text(encoding="utf-8"))
    lines = ["| statement | | source | instances | largest ratio | seed of it |", "|---|---|---|---|---|---|"]
    for name, statement in theory.list_statements().items():
        worst = record[name]  # a statement without a record fails the build
        formula = "`" + statement.formula.replace("|", "\\|") + f"`<br>`{statement.call}`"
        lines.append(
            f"| [{name}]({statement.proof}) | {formula} | {SOURCES[statement.source.name]} | {worst['instances']} "
            f"| {worst['ratio']:.3g}{' (identity)' if statement.identity else ''} | {worst['case']['seed']} |"
        )
    return "\n".join(lines)


myst_substitutions = {
    "theory_table": theory_table(),
    "methods_table": methods_table(),
    "routing_table": routing_table(),
}


def check_public_names(app: Sphinx, env: BuildEnvironment) -> None:
    """A public name without an entry in the documentation is a warning, and so fails the build."""
    entries = {entry[0].rpartition(".")[2] for entry in env.get_domain("py").get_objects()}
    for name in precond_ref.__all__:
        if not name.startswith("__") and name not in entries:
            logging.getLogger(__name__).warning("precond_ref.%s has no entry in the documentation", name)


def setup(app: Sphinx) -> None:
    app.connect("env-check-consistency", check_public_names)
