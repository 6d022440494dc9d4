"""Runs ``precond-ref check`` on implementations from PyPI, and on official codes, and writes docs/audit.md.

python benchmarks/audit.py                        # all, each package in an environment of its own: some 10 GB
python benchmarks/audit.py --only torch_optimizer # prints what the page would say; writes nothing

Environments are made with venv and pip in ``--environments`` (default: build/audit) and kept for the next run, as are
earlier releases of the packages (wheels without their dependencies) and, in ``--sources``, clones of the repositories.
`audit_targets.py` has the list.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from audit_targets import BESIDE, SPREAD, TARGETS, TORCH, WHOLE, Spread, Target  # type: ignore[import-not-found]  # noqa: E402

from precond_ref.conformance.diagnose import Diagnosis, Match  # noqa: E402

PAGE = ROOT / "docs" / "audit.md"
HEADER = ("package", "version", "implementation", "checked as", "right", "of tier must", "skipped", "contract", "it is",
          "since")  # fmt: skip
NOT_HERE = "does not run here"
INTRO = """\
# Audit

This page has the results of `precond-ref check` for implementations from PyPI, and for official codes that are only in
a repository. `python benchmarks/audit.py` makes an environment for each package, runs every check and writes this page.
The command below a row repeats the row.

A row compares an implementation with the method *as this library writes it down* ([conventions](conventions.md)). It
does not judge the use of a package or the intention of its authors: many choices are free, and not every package claims
the form that it is checked as. *right* counts the cases that agree within the [tolerance](tolerance.md) among the cases
that ran, in float64 unless the command says otherwise. *skipped* counts the cases that need an option that the package
does not have, such as an average or decoupled weight decay. *contract* names the checks of
[the contract](check.md#reading-the-report) that fail. *it is* names the deviations from the definition, in the list of
[known mistakes](mistakes.md), that explain all cases that ran to their end, or the number given; the sections below
describe them in words.

*since* is the earliest release of the last three years with the same two last cells, found by bisection: not all
releases between were tried, the sections name those that were. Of a repository it is a commit with its day. "or
before": the release before does not run beside today's packages. "-": none was tried, or there is none. Of torch, the
files of `torch.optim` are those of the release, beside the rest of 2.13.0. Earlier releases of optax ran with JAX
0.8.1, of keras with h5py and dm-tree, which they import.

[Bugs](bugs.md) has the errors of packages, in these and in earlier releases.

Not in the table: precondition_opt 0.3.0 imports with JAX 0.4.25 and NumPy 1, but the command needs NumPy 2; the
authors' AdaMuon asks for CUDA; the authors' NorMuon has no argument that a case varies.
"""


@dataclass(frozen=True)
class Verdict:
    """The JSON of a report in the words of the page."""

    target: Target
    report: dict[str, Any]
    releases: tuple[tuple[str, str], ...] = ()
    """Other versions that were tried, the newest first, with what they are: contract and name as one text."""

    @property
    def summary(self) -> str:
        """Contract and name, by which releases are compared."""
        contract, name = self.cells[7:9]
        return name if contract == "kept" else f"{name}; contract: {contract}"

    @property
    def since(self) -> str:
        """The earliest release that is the same as this one and all tried in between."""
        since = self.target.version if self.releases or self.target.oldest == self.target.version else "-"
        for version, summary in self.releases:
            if summary != self.summary:
                return f"{since} or before" if summary == NOT_HERE else since
            since = version
        return since

    @property
    def cells(self) -> tuple[str, ...]:
        """Return the cells of the row, under `HEADER`."""
        t = self.target
        cases = [r for r in self.report["results"] if not r["id"].startswith("contract/") and "/reject-" not in r["id"]]
        ran = [r for r in cases if r["status"] != "skipped"]
        must = [r for r in ran if r["tier"] == "must"]
        right, must_right = (sum(r["status"] == "passed" for r in group) for group in (ran, must))
        broken = [r["id"].partition("/")[2] for r in self.report["results"]
                  if r["id"].startswith("contract/") and r["status"] in ("failed", "error")]  # fmt: skip
        return (
            t.package, t.version, f"`{t.name}`", t.method, f"{right} of {len(ran)}", f"{must_right} of {len(must)}",
            str(len(cases) - len(ran)), ", ".join(broken) or "kept", self.name(right, len(ran)),
        )  # fmt: skip

    @property
    def row(self) -> tuple[str, ...]:
        """The row and since when."""
        return (*self.cells, self.since)

    def name(self, right: int, ran: int) -> str:
        """Return the method or the names of known mistakes, and the number of cases if not all agree."""
        if right == ran:
            return "the method"
        found = self.diagnosis
        near = None if found is None else found.matches[0] if found.matches else found.nearest
        if found is None or near is None:
            return f"the method, in {right} of {ran} cases" if right else "not named"
        flags = ", ".join(f"`{flag}`" for flag in near.flags) or "the method"
        rough = any("single precision" in hint for hint in found.hints)
        return flags + (", to single precision" if rough else "") + (
            "" if found.matches else f", in {near.explained} of {found.cases} cases"
        )  # fmt: skip

    @property
    def diagnosis(self) -> Diagnosis | None:
        """Return the diagnosis of the report, from its JSON."""
        given = self.report["diagnosis"]
        if given is None:
            return None
        near = given["nearest"]
        return Diagnosis(
            given["method"], given["cases"], tuple(_match(m) for m in given["matches"]), near and _match(near),
            tuple(given["hints"]),
        )  # fmt: skip

    def section(self) -> str:
        """Return note, diagnosis and command."""
        t, lines = self.target, []
        lines.append(f"## {t.package} {t.version}: `{t.name}` as {t.method}\n")
        if t.note:
            lines.append(f"{t.note}\n")
        said = [] if self.diagnosis is None else self.diagnosis.lines()
        said += [f"{r['id']}: {r['message']}" for r in self.report["results"]
                 if r["status"] in ("failed", "error") and r["message"] and "/reject-" not in r["id"]]  # fmt: skip
        why = Counter(r["message"] for r in self.report["results"]
                      if r["status"] == "skipped" and "/reject-" not in r["id"])  # fmt: skip
        said += [f"skipped ({n}): {message.partition('=')[0] if 'no argument' in message else message}"
                 for message, n in _merged(why).items()]  # fmt: skip
        said += [f"note: {note}" for note in self.report["notes"]]
        if self.releases:
            lines.append("Other releases: " + "; ".join(f"{v}: {text}" for v, text in self.releases) + ".\n")
        if said:
            lines.append("```text\n" + "\n".join(said) + "\n```\n")
        lines.append(f"```shell\n{t.install}\ncd benchmarks && {t.command}\n```\n")
        return "\n".join(lines)


def _merged(messages: Counter[str]) -> Counter[str]:
    """Return the messages with those about one argument counted together, whatever its value."""
    merged: Counter[str] = Counter()
    for message, n in messages.items():
        merged[message.partition("=")[0] if "no argument" in message else message] += n
    return merged


def _match(given: dict[str, Any]) -> Match:
    return Match(**{**given, "flags": tuple(given["flags"]), "unexplained": tuple(given["unexplained"])})


def table(rows: list[tuple[str, ...]]) -> str:
    """Return the table in Markdown, with `HEADER`."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (HEADER, ("---",) * len(HEADER), *rows))


def page(verdicts: list[Verdict]) -> str:
    """Return the whole page."""
    made = f"Python {platform.python_version()}, {platform.system()}, {platform.machine()}:\n"
    return "\n".join([INTRO, made, table([v.row for v in verdicts]) + "\n", *(v.section() for v in verdicts)])


OPTIM = """\
import importlib.util
import sys
from pathlib import Path


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch.optim":
            folder = Path(__file__).with_name("torch_files") / "optim"
            return importlib.util.spec_from_file_location(
                name, folder / "__init__.py", submodule_search_locations=[str(folder)]
            )


sys.meta_path.insert(0, Finder)
"""
"""A module that Python imports at its start: it gives the files beside it as `torch.optim`."""
RANKS = """\
## On several ranks

What `precond-ref check TARGET --world 2,4` says: are the steps on two and four ranks of FSDP2 (gloo, on the CPU)
[those of one process](check.md#on-several-ranks)? *right* counts the runs that are; *noise* is how far one process goes
astray where gradients are changed by their rounding, below which nothing is seen. `python benchmarks/audit.py --ranks`
makes this section alone.

"""
RANKS_HEADER = ("implementation", "from", "right", "raises", "departs", "skipped", "noise", "what it says")


def ranks_section(reports: list[tuple[Spread, dict[str, Any]]]) -> str:
    """Return the section made of the reports of `SPREAD`."""
    rows: list[tuple[str, ...]] = [RANKS_HEADER, ("---",) * len(RANKS_HEADER)]
    for spread, report in reports:
        numbers = Counter(r["status"] for r in report["results"])
        said = dict.fromkeys(r["message"] for r in report["results"] if r["message"])
        told = "; ".join([*said, report["ended"]][: len(said) + bool(report["ended"])]).replace("|", "\\|")
        narrow = sorted(set(report["narrow"].values()))
        counts = (str(numbers[status]) for status in ("passed", "error", "failed", "skipped"))
        noise = f"{report['noise']:.1e}" + (f" ({', '.join(narrow)})" if narrow else "")
        rows.append((f"`{spread.name}`", f"`{spread.requires[0]}`", *counts, noise, told))
    commands = "\n".join(f'precond-ref check "{spread.place}" --world 2,4' for spread, _ in reports)
    rows_text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"{RANKS}{rows_text}\n\n```shell\ncd benchmarks\n{commands}\n```\n"


def replaced(page: str, section: str) -> str:
    """Return the page with this section of it made anew, at its end if it has none."""
    start = page.find("## On several ranks")
    if start < 0:
        return f"{page.rstrip()}\n\n{section}"
    after = page.find("\n## ", start + 1)
    return page[:start] + section + (page[after:] if after >= 0 else "")


def environment(target: Target | Spread, folder: Path) -> Path:
    """Return ``bin`` of the environment with the target's packages and this checkout; make it if it is missing."""
    requires = target.requires[1:] if isinstance(target, Target) and target.repository else target.requires
    names = sorted(re.sub(r"[^\w.]+", "-", r) for r in requires if r != TORCH) or [TORCH.replace("==", "-")]
    home = folder / "_".join(names)
    first, others = requires[0], requires[1:]
    here = ["-e", f"{ROOT}[cli]"]
    installs = [[*sorted(requires), *here]]
    if target.without_dependencies:
        installs = [[*others, *here], ["--no-deps", first]]
    record, wanted = home / "installed.json", json.dumps(installs)
    bin_folder = home / ("Scripts" if os.name == "nt" else "bin")
    if record.is_file() and record.read_text() == wanted:
        return bin_folder
    shutil.rmtree(home, ignore_errors=True)
    venv.create(home, with_pip=True)
    for install in installs:
        _run(bin_folder / "python", "-m", "pip", "install", "--quiet", *install)
    record.write_text(wanted)
    return bin_folder


def _run(*command: str | Path) -> str:
    """Return the output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
    return done.stdout


def source(target: Target, version: str, folder: Path) -> Path:
    """Return the folder with the modules of the target's repository at a commit; make it, and the clone, if missing."""
    clone, home = folder / target.repository, folder / f"{target.repository}-{version}"
    if not clone.is_dir():
        _run("git", "clone", "--quiet", f"https://github.com/{target.package}", clone)
    if not home.is_dir():
        _run("git", "-C", clone, "worktree", "add", "--quiet", "--detach", home, version)
        for file in home.rglob("registry.py"):  # a type parameter is a name of the module before Python 3.12
            text = file.read_text(encoding="utf-8")
            file.write_text(
                re.sub(r"(?m)^def (\w+)\[(\w+): ([\w.]+)\]", r"\2 = \3\n\n\ndef \1", text), encoding="utf-8"
            )
    return home / target.folder


def release(target: Target, version: str, bin_folder: Path, folder: Path, sources: Path) -> Path | None:
    """Return a folder with another version of the target's package, with few dependencies; None without a wheel."""
    if target.repository:
        return source(target, version.partition(" ")[0], sources)
    home = folder / "releases" / f"{target.package}-{version}"
    if not home.is_dir():
        pip, quiet = (bin_folder / "python", "-m", "pip"), ["--quiet", "--only-binary", ":all:"]
        if target.package not in WHOLE:
            quiet.append("--no-deps")
        wanted = (f"{target.package}=={version}", *BESIDE.get(target.package, ()))
        with tempfile.TemporaryDirectory() as temporary:
            command = [*pip, "install", *quiet, "--target", home, *wanted]
            if target.package == "torch":  # a wheel of another system has the same Python and is a tenth of the size
                command = [*pip, "download", *quiet, "--platform", "macosx_11_0_arm64", "--dest", temporary, *wanted]
            if subprocess.run(command, capture_output=True).returncode:
                return None
            for wheel in Path(temporary).glob("*.whl"):
                with zipfile.ZipFile(wheel) as files:
                    files.extractall(home, [name for name in files.namelist() if name.startswith("torch/optim/")])
                (home / "torch").rename(home / "torch_files")
                (home / "sitecustomize.py").write_text(OPTIM, encoding="utf-8")
    return home


def versions(target: Target, bin_folder: Path, sources: Path) -> list[str]:
    """Return the releases, or commits and days, older than the target's, the newest first, back to its ``oldest``."""
    if not target.oldest:
        return []
    if target.repository:
        source(target, target.version, sources)
        log = ("git", "-C", sources / target.repository, "log", "--format=%h of %cs", "--abbrev=7")
        return _run(*log, f"--since={target.oldest}", target.version, "--", "*.py").splitlines()[1:]
    said = _run(bin_folder / "python", "-m", "pip", "index", "versions", target.package)
    found = re.search(r"Available versions: (.*)", said)
    listed = found[1].split(", ") if found else []
    return listed[listed.index(target.version) + 1 : listed.index(target.oldest) + 1]


def spread_report(spread: Spread, folder: Path) -> dict[str, Any]:
    """Return the report on two and four ranks."""
    report = ask(["precond-ref", "check", spread.place, "--world", "2,4"], environment(spread, folder))
    if report is None:
        raise SystemExit(f"{spread.place} failed")
    return report


def checked(target: Target, bin_folder: Path, path: Path | None) -> dict[str, Any] | None:
    """Return the report of the target's command, with ``path`` before all other modules; None if it cannot run."""
    return ask(target.command[target.command.index("precond-ref") :].split(), bin_folder, path)


def ask(command: list[str], bin_folder: Path, path: Path | None = None) -> dict[str, Any] | None:
    """Return the report of a command of an environment; None if it cannot run."""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    if path is not None:
        variables["PYTHONPATH"] = str(path)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "report.json"
        program, *arguments = command
        done = subprocess.run(
            [bin_folder / program, *arguments, "--json", file], cwd=ROOT / "benchmarks", env=variables,
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode in (0, 1, 3, 4) and file.is_file():
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return found
        print(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}", file=sys.stderr)
    return None


def on_ranks(environments: Path) -> str:
    """Return the section on several ranks; print a line for each of `SPREAD`."""
    reports = []
    for spread in SPREAD:
        print(f"{spread.name} on 2 and 4 ranks", end=": ", flush=True)
        reports.append((spread, spread_report(spread, environments.absolute())))
        print(dict(Counter(r["status"] for r in reports[-1][1]["results"])), flush=True)
    return ranks_section(reports)


def audit(target: Target, folder: Path, sources: Path) -> Verdict:
    """Run the target's command in its environment, then with the oldest release and those that bisection asks for."""
    bin_folder = environment(target, folder)
    report = checked(target, bin_folder, source(target, target.version, sources) if target.repository else None)
    if report is None:
        raise SystemExit(f"{target.command} failed")
    newest, older, tried = Verdict(target, report), versions(target, bin_folder, sources), dict[int, str]()

    def same(index: int) -> bool:
        path = release(target, older[index], bin_folder, folder, sources)
        found = None if path is None else checked(target, bin_folder, path)
        ran = found is not None and any(
            r["status"] in ("passed", "failed") and not r["id"].startswith("contract/") and "/reject-" not in r["id"]
            for r in found["results"]
        )
        tried[index] = Verdict(target, found).summary if found is not None and ran else NOT_HERE
        for text, meaning in (("unexpected keyword", "takes other arguments"), ("has no attribute", "has none")):
            if found is not None and any(text in r["message"] for r in found["results"]):
                tried[index] = meaning
        return tried[index] == newest.summary

    low, high = -1, len(older)  # the last that is the same, the first that is not
    if older and same(len(older) - 1):
        low = len(older) - 1
    elif older:
        high = len(older) - 1
    while high - low > 1 and high < len(older):
        middle = (low + high) // 2
        low, high = (middle, high) if same(middle) else (low, middle)
    return Verdict(target, report, tuple((older[i], tried[i]) for i in sorted(tried)))


def main() -> None:
    """Run the targets, with one line for each; write the page, or print the sections of the chosen targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", help="targets whose package, version, name or method contain this")
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "audit", help="folder to make them in")
    parser.add_argument("--ranks", action="store_true", help="make the section on several ranks anew, and nothing else")
    parser.add_argument("--sources", type=Path, default=ROOT / "build" / "audit" / "sources", help="clones of codes")
    arguments = parser.parse_args()
    if arguments.ranks:
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), on_ranks(arguments.environments)), encoding="utf-8")
        return
    names = [f"{t.requires[0]} {t.name} {t.make.__name__} {t.method}".lower() for t in TARGETS]
    chosen = [t for t, name in zip(TARGETS, names, strict=True) if (arguments.only or "").lower() in name]
    if not chosen:
        parser.error(f"--only: no target has {arguments.only!r} in its package, version, name or method")
    verdicts = []
    for number, target in enumerate(chosen, start=1):
        print(f"[{number}/{len(chosen)}] {target.requires[0]} {target.name} as {target.method}", end=": ", flush=True)
        verdicts.append(audit(target, arguments.environments.absolute(), arguments.sources.absolute()))
        print("{4} ({5} must), {6} skipped, contract {7}: {8}; since {9}".format(*verdicts[-1].row), flush=True)
    if arguments.only is None:
        PAGE.write_text(replaced(page(verdicts), on_ranks(arguments.environments)), encoding="utf-8")
        print(f"wrote {PAGE}")
    else:
        print("", *(v.section() for v in verdicts), sep="\n")


if __name__ == "__main__":
    main()
