"""Every Python example of the documentation runs, and prints what the page says it prints."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")


def run_page(text: str) -> int:
    """Run a page's blocks in one namespace; a block followed by a ``text`` block must print just that.

    A block that begins with ``# name.py`` is a file of that name in the current folder.
    """
    names: dict[str, object] = {"__name__": "page"}
    blocks = BLOCK.findall(text)
    for code, expected in blocks:
        if file := FILE.match(code):
            Path(file[1]).write_text(code, encoding="utf-8")
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "page", "exec"), names)
        if expected:
            assert printed.getvalue() == expected
    return len(blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in re.findall(r"^# (\w+)\.py$", page.read_text(encoding="utf-8"), re.MULTILINE):
        sys.modules.pop(name, None)  # of another test
    run_page(page.read_text(encoding="utf-8"))
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


def test_readme_has_examples_with_output() -> None:
    blocks = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert sum(bool(expected) for _, expected in blocks) >= 2


def test_a_wrong_output_or_a_failing_example_is_seen() -> None:
    with pytest.raises(AssertionError):
        run_page("```python\nprint(1)\n```\n\n```text\n2\n```\n")
    with pytest.raises(ZeroDivisionError):
        run_page("```python\n1 / 0\n```\n")


def console_faults(text: str, folder: Path) -> list[str]:
    """Commands of a page's ``console`` blocks that fail in ``folder``, and lines that they should print and do not."""
    faults = []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for part in block.split("$ precond-ref ")[1:]:
            command, *expected = part.splitlines()
            ran = subprocess.run(
                [sys.executable, "-P", "-m", "precond_ref.cli", *shlex.split(command)],
                cwd=folder, capture_output=True, text=True, check=False,
            )  # fmt: skip
            faults += [f"{command}: {ran.stderr}"] * (ran.returncode != 0)
            faults += [f"{command}: no {line!r}" for line in expected if line not in ran.stdout]
    return faults


@pytest.mark.full
def test_the_commands_of_ones_own_method_run(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "write_your_own.md").read_text(encoding="utf-8")
    files = {found[1]: code for code, _ in BLOCK.findall(text) if (found := FILE.match(code))}
    lines = {name: len(list(filter(None, code.splitlines()))) - 1 for name, code in files.items()}
    assert [*lines] == ["signs.py", "mine.py"]
    assert lines["signs.py"] <= 13
    assert lines["mine.py"] <= 40
    for name, code in files.items():
        (tmp_path / name).write_text(code)
    assert console_faults(text, tmp_path) == []
    wrong = "```console\n$ precond-ref cost --preset gpt2 --method mine:Row\n$ precond-ref list\nmine:Rows\n```\n"
    assert len(console_faults(wrong, tmp_path)) == 2


def test_every_method_has_a_page() -> None:
    import precond_ref

    pages = "".join(p.read_text(encoding="utf-8") for p in ROOT.glob("docs/methods/*.md"))
    for name in precond_ref.list_methods():
        assert f"autoclass:: precond_ref.{name}\n" in pages, f"no page documents {name}"


# ---- install lines --------------------------------------------------------------------------------------------------

EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"])
INSTALL = re.compile(r"pip install ((?:[^`\n])+?)(?= && |`|\s+#|$)", re.MULTILINE)
OURS = re.compile(r"(\.|precond-ref|\S*precond_ref-\S+-py3-none-any\.whl)(?:\[([\w,]+)\])?")
OTHERS = re.compile(r"hypothesis|flax|[\w.-]+==[\w.]+")


def install_faults(text: str) -> list[str]:
    """What would not work as written where the package is not installed."""
    found = []
    for line in INSTALL.findall(text):
        words = shlex.split(line)
        for before, word in zip(["", *words], words, strict=False):
            ours = OURS.fullmatch(word)
            if ours and ours[2] and not set(ours[2].split(",")) <= EXTRAS:
                found.append(f"{word}: no such extra")
            elif ours and ours[1] == "precond-ref":
                found.append(f"{word}: on no index")
            elif ours and ours[1] == "." and before != "-e":
                found.append(f"{word}: not editable")
            elif not ours and not word.startswith("-") and not OTHERS.fullmatch(word):
                found.append(f"{word}: neither ours nor pinned")
    return found


def test_install_lines_of_the_pages_work_as_written() -> None:
    paths = [*PAGES, ROOT / "CONTRIBUTING.md", *ROOT.glob("examples/*.py"), *ROOT.glob("docs/experiments/*.py")]
    for path in paths:
        assert install_faults(path.read_text(encoding="utf-8")) == [], path
    assert sum(len(INSTALL.findall(path.read_text(encoding="utf-8"))) for path in paths) > 20


def test_errors_name_extras_that_there_are() -> None:
    """They are said by the installed package, which pip then looks for on no index."""
    from precond_ref.compare.runs import BACKENDS

    for path in [*ROOT.glob("precond_ref/**/*.py"), *ROOT.glob("adapters/**/*.py")]:
        named = re.findall(r"(?:precond-ref|\.)\[([a-z][\w,]*)\]", path.read_text(encoding="utf-8"))
        assert {extra for names in named for extra in names.split(",")} <= EXTRAS, path
    assert set(BACKENDS.values()) <= EXTRAS


@pytest.mark.parametrize(
    "line",
    [
        'pip install "precond-ref[cli]"',
        'pip install -e ".[cli,nothing]"',
        'pip install ".[cli]"',
        "pip install precond_ref",
        "pip install torch",
        'With `python -m pip install "precond-ref[torch]"`:',
        'python -m pip install -e ".[cli]" flaxx && precond-ref compare',
    ],
)
def test_a_wrong_install_line_is_seen(line: str) -> None:
    assert len(install_faults(f"text\n{line}\ntext")) == 1


@pytest.mark.full
def test_pip_looks_for_the_package_on_no_index_once_it_is_installed() -> None:
    # Not `importorskip`: with pip in the process, setuptools leaves distutils to Python, and torch cannot import it.
    if "pip" not in {distribution.name for distribution in importlib.metadata.distributions()}:
        pytest.skip("pip is not in this environment")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "precond-ref[cli]"]
    environment = {name: value for name, value in os.environ.items() if name != "PIP_QUIET"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Requirement already satisfied: precond-ref[cli]" in done.stdout


# ---- the site -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_site", ROOT / "tools" / "check_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SITE_FAULTS = {
    "script": ('src="_static/mathjax-3.2.2/tex-svg.js"', 'src="https://cdn.example/mathjax.js"', "loads https://cdn"),
    "no scheme": ('href="_static/pages.css"', 'href="//cdn.example/pages.css"', "loads //cdn"),
    "image": ('src="a%20b.svg"', 'src="http://example.org/a.svg"', "loads http://example"),
    "missing": ('src="a%20b.svg"', 'src="b.svg"', "loads b.svg, which is not there"),
    "no mathjax": ('<script defer src="_static/mathjax-3.2.2/tex-svg.js"></script>', "", "nothing that sets them"),
    "no style": ('<link rel="stylesheet" href="_static/pages.css">', "", "lacks _static/pages.css"),
    "style": ("a{}", "@import 'https://fonts.example/css';", "pages.css loads https://fonts"),
    "font": ("a{}", 'a{src: url("https://fonts.example/a.woff")}', "pages.css loads https://fonts"),
}


@pytest.mark.parametrize("fault", [None, *SITE_FAULTS])
def test_a_site_that_needs_the_network_is_seen(fault: str | None, site_check: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "_static" / "mathjax-3.2.2").mkdir(parents=True)
    files = {
        "index.html": """<link rel="canonical" href="https://example.org/"><link rel="search" href="search.html">
            <link rel="stylesheet" href="_static/pages.css"><img src="a%20b.svg"><img src="data:image/png;base64,AA==">
            <script defer src="_static/mathjax-3.2.2/tex-svg.js"></script>
            <a href="https://arxiv.org/"><span class="math notranslate">x</span></a>""",
        "a b.svg": "",
        "_static/pages.css": "a{}",
        "_static/mathjax-3.2.2/tex-svg.js": "",
    }
    old, new, message = SITE_FAULTS[fault] if fault else ("", "", "")
    for name, text in files.items():
        (tmp_path / name).write_text(text.replace(old, new) if fault else text)
    found = site_check.faults(tmp_path)
    assert site_check.main([str(tmp_path)]) == bool(fault)
    assert found == [] if fault is None else any(message in line for line in found)


def test_mathjax_is_what_npm_has() -> None:
    digest = hashlib.sha256((ROOT / "docs/_static/mathjax-3.2.2/tex-svg.js").read_bytes()).hexdigest()
    assert digest == "d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882"
    assert "Apache License" in (ROOT / "docs/_static/mathjax-3.2.2/LICENSE").read_text(encoding="utf-8")


def test_the_first_page_shows_what_the_page_of_the_check_does() -> None:
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    shown = re.search(r"^\$ precond-ref check.*?^```", text, re.MULTILINE | re.DOTALL)[0].splitlines()[:-1]
    assert len(shown) == 5
    whole = (ROOT / "docs" / "check.md").read_text(encoding="utf-8").splitlines()
    assert set(shown) - {"..."} <= set(whole)
    assert 'python -m pip install -e ".[cli]" && precond-ref compare' in text.splitlines()


def test_the_page_of_the_data_has_the_right_files() -> None:
    from precond_ref.problems.datasets import find

    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    sums = dict(reversed(line.split("  ")) for line in re.findall(r"^[0-9a-f]{64}  \S+$", text, re.MULTILINE))
    assert len(sums) == 4
    for name, digest in sums.items():
        assert name.removesuffix(".txt").removesuffix(".gz") in text.partition(digest)[0]
        try:
            content = find(name, ("", ".gz")).read_bytes()
        except FileNotFoundError:
            pytest.skip("the folder PRECOND_REF_DATA does not have them")
        if name == "a9a" and content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        assert hashlib.sha256(content).hexdigest() == digest
        assert f"{len(content):,}".replace(",", " ") in text
