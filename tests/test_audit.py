"""The audit's page is what its script finds, a planted bug would show in it, and so would the bugs it must know."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutation import mutated
from typer.testing import CliRunner

from precond_ref.cli import application
from precond_ref.conformance import check, wrap

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import audit  # noqa: E402
from audit_targets import TARGETS, Target  # noqa: E402

PAGE = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
BUGS = (ROOT / "docs" / "bugs.md").read_text(encoding="utf-8")
ROWS = [
    tuple(cell.strip() for cell in line.strip("| ").split(" | "))
    for line in PAGE.partition("\n## On several ranks")[0].splitlines()
    if line[:2] == "| "
]
QUICK = {"torch_sgd", "torch_adam", "torch_adagrad", "singd"}


def installed(target: Target) -> bool:
    """Whether what the target requires is here, in the versions it requires."""
    try:
        versions = [importlib.metadata.version(r.partition("==")[0]).partition("+")[0] for r in target.requires]
    except importlib.metadata.PackageNotFoundError:
        return False
    return versions == [r.partition("==")[2] for r in target.requires]


def found(target: Target, make: Callable[..., Any] | None = None) -> tuple[str, ...]:
    """The target's row, by a check in this process."""
    report = check(wrap(make or target.make, dtype=target.dtype), target.method, dtype=target.dtype)
    return audit.Verdict(target, report.as_json()).cells


def test_the_page_has_the_targets() -> None:
    assert ROWS[0] == audit.HEADER
    assert [row[:4] for row in ROWS[2:]] == [(t.package, t.version, f"`{t.name}`", t.method) for t in TARGETS]
    for target in TARGETS:
        assert f"\n{target.install}\n" in PAGE
        assert f"\ncd benchmarks && {target.command}\n" in PAGE
        assert target.note in PAGE
    assert PAGE.startswith(audit.INTRO)


def test_the_page_has_what_ran_on_ranks() -> None:
    section = PAGE.partition("\n## On several ranks")[2]
    for spread in audit.SPREAD:
        assert f"\n| `{spread.name}` | " in section
        assert f'\nprecond-ref check "{spread.place}" --world 2,4\n' in section
    assert (
        audit.replaced(PAGE, "## On several ranks\n")
        == PAGE.partition("\n## On several ranks")[0] + "\n## On several ranks\n"
    )


def test_the_page_names_what_is_known() -> None:
    said = {row[0] + " " + row[1] + " " + row[3]: row[8] for row in ROWS[2:]}
    assert said["torch_optimizer 0.3.0 Shampoo"] == "`exponent-inverse-order`, `statistic-of-preconditioned`"
    assert said["pytorch_optimizer 3.10.0 Shampoo"] == "not named"  # its zero updates before step f are in no variant
    # its bias corrections: which float32 a square root of them is rounded to is a machine's
    assert said["atorch 0.2.5 AGD"] == "`zero-nan`, to single precision"
    assert said["singd 0.0.5 IFShampoo"] == "`blocks-transposed`"


def test_the_bugs_are_of_targets() -> None:
    found = {match[1] for match in re.finditer(r"(precond-ref check audit_targets:\w+ --method [\w.]+)", BUGS)}
    assert found <= {target.command.partition(" --dtype")[0].partition("=../../")[2].partition(" ")[2]
                     or target.command.partition(" --dtype")[0] for target in TARGETS}  # fmt: skip
    assert len(found) > 10
    for package in {row[0] for row in ROWS[2:] if row[7] != "kept"}:
        assert {"facebookresearch/optimizers": "distributed_shampoo"}.get(package, package.split("/")[-1]).removeprefix(
            "torch-"
        ) in BUGS


@pytest.mark.filterwarnings("ignore:Calling naive implementation:UserWarning:singd.structures.base")
@pytest.mark.parametrize(
    "index",
    [pytest.param(i, id=f"{t.make.__name__}-{t.version}", marks=() if t.make.__name__ in QUICK else pytest.mark.deep)
     for i, t in enumerate(TARGETS)],
)  # fmt: skip
@pytest.mark.full
def test_a_row_is_what_the_check_finds(index: int) -> None:
    target = TARGETS[index]
    if not installed(target):
        pytest.skip(f"needs {', '.join(target.requires)}")
    assert found(target) == ROWS[2 + index][:9]


def test_a_planted_bug_gives_another_row() -> None:
    torch = pytest.importorskip("torch")
    (target,) = (t for t in TARGETS if t.make.__name__ == "torch_adagrad")

    def planted(params: Any, lr: float, eps: float, initial: float) -> Any:
        return torch.optim.Adagrad(params, lr=lr, eps=eps, initial_accumulator_value=initial**2)

    right, wrong = found(target), found(target, planted)
    assert right[-1] == "`zero-nan`"
    assert wrong[-1] == "`initial-squared`, `zero-nan`"
    assert int(wrong[4].split()[0]) < int(right[4].split()[0])
    assert right[:4] == wrong[:4]


@pytest.mark.full
def test_since_is_the_earliest_release_that_is_the_same() -> None:
    (target,) = (t for t in TARGETS if t.make.__name__ == "torch_sgd")
    report = check(wrap(target.make), "SGD").as_json()
    same = audit.Verdict(target, report).summary
    for releases, since in (
        ((), "-"),
        ((("2.12", same), ("2.11", same)), "2.11"),
        ((("2.12", same), ("2.11", "`decay-after`")), "2.12"),
        ((("2.12", "`decay-after`"),), target.version),
        ((("2.12", same), ("2.11", audit.NOT_HERE)), "2.12 or before"),
    ):
        assert audit.Verdict(target, report, releases).since == since


@pytest.mark.full
def test_releases_are_found_by_bisection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (target,) = (t for t in TARGETS if t.make.__name__ == "torch_sgd")
    report = check(wrap(target.make), "SGD").as_json()
    older = [f"1.{i}" for i in range(20, -1, -1)]
    for last in range(-1, 21):  # how many of the older ones are the same
        tried = []

        def checked(target: Target, bin_folder: Path, path: Path | None, last: int = last, tried: list = tried) -> Any:
            if path is None:
                return report
            tried.append(path.name)
            wrong = [{**r, "status": "failed"} if r["id"] == "SGD/plain" else r for r in report["results"]]
            return report if older.index(path.name) < last else {**report, "results": wrong}

        monkeypatch.setattr(audit, "environment", lambda target, folder: folder)
        monkeypatch.setattr(audit, "versions", lambda target, folder, sources: older)
        monkeypatch.setattr(audit, "release", lambda target, version, folder, home, sources: home / version)
        monkeypatch.setattr(audit, "checked", checked)
        found = audit.audit(target, tmp_path, tmp_path)
        assert found.since == (older[last - 1] if last > 0 else target.version)
        assert len(tried) <= 6


@pytest.mark.full
def test_a_check_that_saw_little_is_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of most cases skipped, the command's exit code is 4."""
    pytest.importorskip("torch")
    (target,) = (t for t in TARGETS if t.make.__name__ == "torch_radam")
    codes = []

    def in_this_process(command: list[Any], **_: Any) -> Any:
        done = CliRunner().invoke(application(), [str(part) for part in command[1:]])
        codes.append(done.exit_code)
        return subprocess.CompletedProcess(command, done.exit_code, done.output, "")

    monkeypatch.chdir(ROOT / "benchmarks")
    monkeypatch.setattr(subprocess, "run", in_this_process)
    report = audit.checked(target, Path(sys.executable).parent, None)
    assert report is not None
    assert audit.Verdict(target, report).cells[4:6] == ("1 of 1", "1 of 1")
    assert mutated(audit.ask, ("(0, 1, 3, 4)", "(0, 1, 3)"))(target.command.split(), Path()) is None
    assert codes == [4, 4]


def test_a_release_of_torch_is_its_optim_beside_the_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (target,) = (t for t in TARGETS if t.make.__name__ == "torch_sgd")
    run, files = subprocess.run, {"__init__": "", "optim/__init__": "FROM = '{}'", "other": "FROM = '{}'"}
    for name, text in files.items():
        file = tmp_path / "here" / "torch" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.format("here"), encoding="utf-8")

    def download(command: list[Any], **_: Any) -> Any:
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "torch-2.1.2-cp311-none-macosx_11_0_arm64.whl", "w") as wheel:
            for name, text in files.items():
                wheel.writestr(f"torch/{name}.py", text.format(command[-1]))
        return subprocess.CompletedProcess(command, 0)

    def said(release: Callable[..., Any], name: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "run", download)
            home = release(target, "2.1.2", tmp_path, tmp_path / name, tmp_path)
        assert not (home / "torch_files" / "other.py").exists()
        path = os.pathsep.join(map(str, (home, tmp_path / "here")))
        code = "import torch.optim, torch.other; print(torch.optim.FROM, torch.other.FROM)"
        return run([sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True).stdout

    assert said(audit.release, "right") == "torch==2.1.2 here\n"
    planted = mutated(audit.release, ("OPTIM,", "OPTIM.replace('\"torch.optim\"', '\"torch.optimizer\"'),"))
    assert said(planted, "planted") == "here here\n"


def test_commits_are_those_that_changed_code(tmp_path: Path) -> None:
    clone, commits = tmp_path / "SOAP", []

    def git(*arguments: str, day: str = "") -> str:
        dates = {"GIT_AUTHOR_DATE": f"{day}T12:00", "GIT_COMMITTER_DATE": f"{day}T12:00"} if day else {}
        names = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        command = ["git", "-C", str(clone), *arguments]
        return subprocess.run(command, env={**os.environ, **names, **dates}, capture_output=True, text=True).stdout

    clone.mkdir()
    git("init", "--quiet")
    for day, file in (("2022-01-01", "a.py"), ("2024-01-01", "a.py"), ("2024-02-01", "README"), ("2024-03-01", "a.py")):
        (clone / file).write_text(day, encoding="utf-8")
        (clone / "registry.py").write_text("def register[T: type](cls: T) -> T:\n    return cls\n", encoding="utf-8")
        git("add", ".")
        git("commit", "--quiet", "-m", day, day=day)
        commits.append(git("rev-parse", "--short=7", "HEAD").strip())
    (soap,) = (t for t in TARGETS if t.make.__name__ == "soap_authors")
    target = dataclasses.replace(soap, requires=(f"nikhilvyas/SOAP=={commits[-1]}", *soap.requires[1:]))
    wanted = [f"{commits[1]} of 2024-01-01"]
    assert audit.versions(target, tmp_path, tmp_path) == wanted
    assert mutated(audit.versions, (', "--", "*.py"', ""))(target, tmp_path, tmp_path) != wanted
    assert mutated(audit.versions, (".splitlines()[1:]", ".splitlines()"))(target, tmp_path, tmp_path) != wanted
    home = audit.release(target, wanted[0], tmp_path, tmp_path, tmp_path)
    assert home == tmp_path / f"SOAP-{commits[1]}"
    assert (home / "a.py").read_text(encoding="utf-8") == "2024-01-01"
    compile((home / "registry.py").read_text(encoding="utf-8"), "registry", "exec", dont_inherit=True)
    assert "T = type" in (home / "registry.py").read_text(encoding="utf-8")
    planted = mutated(audit.source, ('"--detach", home, version', '"--detach", home'), ("{version}", "{version}-"))
    assert (planted(target, commits[1], tmp_path) / "a.py").read_text(encoding="utf-8") == "2024-03-01"


def test_what_differs_is_in_the_section() -> None:
    torch = pytest.importorskip("torch")
    (target,) = (t for t in TARGETS if t.make.__name__ == "torch_sgd")

    def planted(params: Any, lr: float, momentum: float, nesterov: bool) -> Any:
        return torch.optim.SGD(params, lr=1.375 * lr, momentum=momentum, nesterov=nesterov)

    report = check(wrap(planted), "SGD")
    verdict = audit.Verdict(target, report.as_json())
    assert verdict.cells[4:] == ("0 of 14", "0 of 12", "2", "kept", "not named")
    assert verdict.diagnosis == report.diagnosis
    assert "Every step has the right direction and 1.375 times the right length." in verdict.section()
    assert re.search(r"skipped \(2\): \w+ has no argument for weight_decay$", verdict.section(), re.MULTILINE)


def test_a_sketch_whose_tail_decays_slower_is_named() -> None:
    """As in the authors' tearfree code: the escaped mass times sqrt(beta2), the sketch times beta2."""

    def sadagrad(decay: Callable[[float], float]) -> Callable[..., Any]:
        def step(param: Any, grad: Any, state: Any, *, lr: float, size: int, beta2: float, delta: float) -> Any:
            d = len(param)
            sketch, mass = (np.zeros((d, d)), delta) if state is None else state
            w, q = np.linalg.eigh(beta2 * sketch + np.outer(grad, grad))
            cut = max(w[-size], 0.0) if size <= d else 0.0
            cut = cut if cut > 1e-12 * w[-1] else 0.0
            sketch, mass = (q * np.maximum(w - cut, 0)) @ q.T, decay(beta2) * mass + cut
            w, q = np.linalg.eigh(sketch + mass * np.eye(d))
            root = np.where(w > 1e-12 * w[-1], np.maximum(w, 1e-300) ** -0.5, 0.0)
            return param - lr * (q * root) @ q.T @ grad, (sketch, mass)

        return step

    right, wrong = (check(wrap(sadagrad(decay)), "SAdaGrad") for decay in (lambda beta2: beta2, math.sqrt))
    assert right.failures == []
    assert right.ran > 5
    assert not wrong.ok
    assert wrong.diagnosis is not None
    assert wrong.diagnosis.matches[0].flags == ("tail-sqrt",)
    assert "with the escaped mass decayed by sqrt(beta2)" in wrong.diagnosis.lines()[0]
