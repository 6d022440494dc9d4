"""Every Python example of the documentation runs, and prints what the page says it prints."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)


def run_page(text: str) -> int:
    """Run a page's blocks in one namespace; a block followed by a ``text`` block must print just that."""
    names: dict[str, object] = {"__name__": "page"}
    blocks = BLOCK.findall(text)
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "page", "exec"), names)
        if expected:
            assert printed.getvalue() == expected
    return len(blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page.read_text(encoding="utf-8"))


def test_readme_has_examples_with_output() -> None:
    blocks = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert sum(bool(expected) for _, expected in blocks) >= 2


def test_a_wrong_output_or_a_failing_example_is_seen() -> None:
    with pytest.raises(AssertionError):
        run_page("```python\nprint(1)\n```\n\n```text\n2\n```\n")
    with pytest.raises(ZeroDivisionError):
        run_page("```python\n1 / 0\n```\n")


def test_every_method_has_a_page() -> None:
    import precond_ref

    pages = "".join(p.read_text(encoding="utf-8") for p in ROOT.glob("docs/methods/*.md"))
    for name in precond_ref.list_methods():
        assert f"autoclass:: precond_ref.{name}\n" in pages, f"no page documents {name}"
