"""Hostile files: every reader refuses them by a clear error, soon, without much memory, and looks nowhere else."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mutation import mutated
from typer.testing import CliRunner

from precond_ref import cli, files, problems
from precond_ref.conformance import vectors
from precond_ref.cost import shapes
from precond_ref.problems import datasets

# ---- the readers ----------------------------------------------------------------------------------------------------


def check_bounds(module: Any, folder: Path) -> None:
    """Files as large as allowed are read, larger ones refused with little memory, packed or not."""
    plain, packed = folder / "plain", folder / "packed"
    for size in (1000, 1001):
        plain.write_bytes(bytes(size))
        packed.write_bytes(gzip.compress(bytes(size)))
        for read, path in ((module.read, plain), (module.unpacked, plain), (module.unpacked, packed)):
            if size == 1000:
                assert read(path, 1000) == bytes(1000)
            else:
                with pytest.raises(ValueError, match="more than 1000 bytes"):
                    read(path, 1000)
    packed.write_bytes(gzip.compress(bytes(2**20)) * 32)  # in 32 members
    with plain.open("wb") as file:
        file.truncate(2**25)
    for path in (plain, packed):
        tracemalloc.start()
        with pytest.raises(ValueError, match="more than 1000 bytes"):
            module.unpacked(path, 1000)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**22


def check_json(module: Any, folder: Path) -> None:
    """Depth, sizes of numbers, and what no JSON number is."""
    path = folder / "some.json"
    for text, value in (("[" * 32 + "1" + "]" * 32, None), ("[9223372036854775807, -1.5e300]", [2**63 - 1, -1.5e300])):
        path.write_text(text)
        assert value is None or module.read_json(path) == value
        module.read_json(path)
    for text, message in HOSTILE_JSON.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            module.read_json(path)


HOSTILE_JSON = {
    "[" * 33 + "1" + "]" * 33: "nested deeper than 32",
    '{"a":' * 33 + "1" + "}" * 33: "nested deeper than 32",
    '{"a":' * 5000 + "1" + "}" * 5000: "nested deeper than 32",
    "[" * 10**6: "nested deeper than 32",
    "[NaN]": "NaN is no finite number",
    "[-Infinity]": "-Infinity is no finite number",
    "[1e400]": "1e400 is no finite number",
    "[9223372036854775808]": "9223372036854775808 is no finite number",
    "[" + "9" * 5000 + "]": "9999[.][.][.] is no finite number",
    "[1": "some.json is no JSON",
}
FAULTS = {
    "packed alone bounded": (("file.read(most + 1)", "file.read()"), check_bounds),
    "not bounded unpacked": (('_bounded(file, most, f"{path} unpacks to")', "file.read()"), check_bounds),
    "one byte less": (("> most:", ">= most:"), check_bounds),
    "one byte more": (("> most:", "> most + 1:"), check_bounds),
    "any depth": (("if _deeper(value, DEEPEST):", "if False:"), check_json),
    "one level less": (("range(levels + 1)", "range(levels)"), check_json),
    "lists alone": (("isinstance(v, (dict, list))", "isinstance(v, list)"), check_json),
    "RecursionError": (("except RecursionError:", "except MemoryError:"), check_json),
    "NaN": ((", parse_constant=_refuse", ""), check_json),
    "infinity": ((", parse_float=_finite", ""), check_json),
    "any integer": (("parse_int=_integer, ", ""), check_json),
}


@pytest.mark.parametrize("check", [check_bounds, check_json])
def test_readers_are_bounded(check: Callable[[Any, Path], None], tmp_path: Path) -> None:
    check(files, tmp_path)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_bug_in_a_reader_is_caught(fault: str, tmp_path: Path) -> None:
    change, check = FAULTS[fault]
    with pytest.raises((AssertionError, RecursionError, ValueError, pytest.fail.Exception)):
        check(mutated(files, change), tmp_path)


def test_what_is_shown_is_short_and_prints() -> None:
    assert files.shown("a\x1b[2J\n\ud800é") == "a\\x1b[2J\\n\\ud800é"
    assert files.shown("x" * 600) == "x" * 500 + "..."


# ---- data -----------------------------------------------------------------------------------------------------------


def test_a_bomb_is_refused_at_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "unpacked", lambda path: files.unpacked(path, 2**20))
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz", "bomb.gz"):
        (tmp_path / name).write_bytes(gzip.compress(bytes(2**24)))
    monkeypatch.setenv("PRECOND_REF_DATA", str(tmp_path))
    for load in (problems.load_mnist, lambda: problems.load_libsvm("bomb"), lambda: problems.load_text("bomb")):
        with pytest.raises(ValueError, match="unpacks to more than 1048576 bytes"):
            load()
    assert files.unpacked.__defaults__ == (2**28,)


LIBSVM = {
    "index": "1 1:1\n-1 1000000000000:1\n",
    "index of 65 bits": "1 1:1\n-1 99999999999999999999:1\n",
    "long index": f"1 1:1\n-1 {'9' * 5000}:1\n",
    "long number": f"1 1:1\n-1 1:{'x' * 10**6}\n",
    "wide": "1 2:1\n" + "1 268435457:1\n",
    "wide later": "1 140000000:1\n1 1:1\n",
}


def check_libsvm(module: Any, folder: Path) -> None:
    for content in LIBSVM.values():
        (folder / "some").write_text(content)
        with pytest.raises(ValueError, match="some, line 2: ") as caught:
            module.load_libsvm(folder / "some")
        assert len(str(caught.value)) < 1000
    (folder / "some").write_text("1 1:1\n")
    with pytest.raises(ValueError, match="1 samples of 1000000000000 features are more than 268435456 entries"):
        module.load_libsvm(folder / "some", n_features=10**12)


def test_libsvm_of_any_size_is_refused_with_its_line(tmp_path: Path) -> None:
    check_libsvm(datasets, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        ("if len(labels) * width > MOST_ENTRIES:", "if width > 2**28:"),
        ("width = max(width, last)", "width = last"),
        ("shown(error, 200)", "error"),
    ],
)
def test_planted_bug_in_libsvm_is_caught(change: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises((AssertionError, IndexError, pytest.fail.Exception)):
        check_libsvm(mutated(datasets, change, ("np.zeros((len(labels), width))", "np.zeros((1, 1))")), tmp_path)


# ---- shapes ---------------------------------------------------------------------------------------------------------

SHAPES = {
    "[" * 10**5 + "]" * 10**5: "nested deeper than 32",
    f'{{"a": [{"9" * 4000}]}}': "is no finite number of 64 bits",
    f'{{"a": [{", ".join(["2"] * 70)}]}}': "at most 64 axes",
    '{"a": [4611686018427387904, 2]}': "less than 2\\^63 entries",
    f'{{"\\u001b[2J": ["{"x" * 9999}"]}}': r"x1b\[2J' must be a list of positive integers",
}


@pytest.mark.parametrize("text", SHAPES, ids=range(len(SHAPES)))
def test_shapes_that_no_model_has_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ValueError, match=SHAPES[text]) as caught:
        shapes.read(tmp_path / "model.json")
    assert len(str(caught.value)) < 1000
    result = CliRunner().invoke(cli.application(), ["cost", "--shapes", str(tmp_path / "model.json")])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


# ---- a copy of the vectors from somebody else -----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound copy of some of the vectors, with a file of somebody else's beside it."""
    copy = tmp_path / "copy" / "v1"
    shutil.copytree(vectors.FOLDER / "v1" / "SGD", copy / "SGD")
    shutil.copytree(vectors.FOLDER / "v1" / "SGD", tmp_path / "copy" / "SGD")
    manifest = json.loads((vectors.FOLDER / "v1" / "manifest.json").read_text(encoding="utf-8"))
    manifest["cases"] = [entry for entry in manifest["cases"] if entry["method"] == "SGD"]
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert vectors.verify(copy) == []
    return copy


def entry(**changes: Any) -> Callable[[Path], None]:
    """Changes the entry of SGD/plain."""

    def plant(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        next(e for e in manifest["cases"] if e["id"] == "SGD/plain").update(changes)
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")

    return plant


def raw(text: str) -> Callable[[Path], None]:
    """Replaces the manifest."""
    return lambda folder: (folder / "manifest.json").write_text(text) and None


def tensors(dtype: str, shape: list[int], size: int) -> Callable[[Path], None]:
    """Puts a safetensors file with one tensor in the place of SGD/plain's."""

    def plant(folder: Path) -> None:
        header = json.dumps({"param": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
        content = struct.pack("<Q", len(header)) + header + bytes(size)
        (folder / "SGD/plain.safetensors").write_bytes(content)
        entry(sha256=hashlib.sha256(content).hexdigest())(folder)

    return plant


def link(name: str, target: str) -> Callable[[Path], None]:
    """Puts a link in the place of a file or folder."""

    def plant(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(folder / target)

    return plant


def pipe(name: str) -> Callable[[Path], None]:
    """Puts a pipe in the place of a file."""
    return lambda folder: (folder / name).unlink() or os.mkfifo(folder / name)


def grown(folder: Path) -> None:
    with (folder / "SGD/plain.safetensors").open("r+b") as file:
        file.truncate(10**12)


PLAIN = hashlib.sha256((vectors.FOLDER / "v1" / "SGD/plain.safetensors").read_bytes()).hexdigest()
ABOUT = {"kappa": [10**400], "exponent": 0.5, "stale": False, "decompositions": [1]}
HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absolute path": (entry(file="/etc/passwd"), "file must be SGD/plain.safetensors, got /etc/passwd"),
    "upwards": (entry(file="../SGD/plain.safetensors", sha256=PLAIN), "file must be SGD/plain.safetensors, got ../SGD"),
    "upwards id": (entry(id="../plain", file="../plain.safetensors"), "manifest.json: .*does not match"),
    "id of two lines": (entry(id="SGD/plain\n", file="SGD/plain\n.safetensors"), "SGD/plain.n: file must be"),
    "linked file": (link("SGD/plain.safetensors", "../SGD/plain.safetensors"), "must not be behind a link"),
    "linked folder": (link("SGD", "../SGD"), "SGD/plain: SGD/plain.safetensors must not be behind a link"),
    "linked manifest": (link("manifest.json", "../../other.json"), "manifest.json must not be behind a link"),
    "pipe": (pipe("SGD/plain.safetensors"), "SGD/plain.safetensors must be a regular file"),
    "pipe for a manifest": (pipe("manifest.json"), "manifest.json must be a regular file"),
    "large file": (grown, "all files together have"),
    "large manifest": (raw(" " * 5_000_001), "manifest.json has more than 5000000 bytes"),
    "deep manifest": (raw("[" * 10**6), "nested deeper than 32"),
    "deep config": (raw('{"version": 1, "cases": [{"config": ' + "[" * 900 + "]" * 900 + "}]}"), "nested deeper"),
    "long manifest": (raw(json.dumps({"version": 1, "cases": ["x" * 99, 1] * 20_000})), "is not of type 'object'"),
    "large number": (entry(conditioning=ABOUT), "is no finite number of 64 bits"),
    "not a number": (entry(lr=float("nan")), "NaN is no finite number"),
    "terminal codes": (entry(**{"\x1b[2J\ud800": 1}), r"x1b\[2J.ud800"),
    "type without NumPy": (tensors("BF16", [2], 4), "SGD/plain.safetensors has a tensor of type 'BF16'"),
    "no memory has it": (tensors("F64", [2**40, 0, 2**40], 0), "SGD/plain: "),
    "lies": (tensors("F64", [2**60], 16), "SGD/plain: "),
}  # fmt: skip


@pytest.mark.parametrize("fault", HOSTILE)
def test_verify_refuses_and_looks_nowhere_else(fault: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, message = HOSTILE[fault]
    plant(folder)
    opened: list[Path] = []
    read = files.read
    monkeypatch.setattr(vectors, "read", lambda path, most: opened.append(path.resolve()) or read(path, most))
    result = CliRunner().invoke(cli.application(), ["vectors", "verify", str(folder)])
    assert result.exit_code == 1, result.output
    lines = result.output.splitlines()
    assert len(lines) <= 25
    assert all(len(line) <= 503 and line.isprintable() for line in lines)
    assert any(re.search(message, line) for line in lines), result.output
    assert all(path.is_relative_to(folder.resolve()) for path in opened)


BUGS = {
    "absolute path": ("if not ID.fullmatch(case.id) or case.file !=", "if False and case.file !="),
    "id of two lines": ("ID.fullmatch(case.id)", "ID.match(case.id)"),
    "linked file": ("path.resolve() != folder.resolve() / name", "path.is_symlink() and False"),
    "linked folder": ("path.resolve() != folder.resolve() / name", "path.is_symlink()"),
    "large file": ("        return\n    for case in {case.id", "        pass\n    for case in {case.id"),
    "type without NumPy": ("except KeyError as error:", "except ArithmeticError as error:"),
}


@pytest.mark.parametrize("fault", BUGS)
def test_planted_bug_in_verify_is_caught(fault: str, folder: Path) -> None:
    plant, message = HOSTILE[fault]
    plant(folder)
    planted = mutated(vectors, BUGS[fault])
    try:
        found = planted.verify(folder)
    except (KeyError, MemoryError):
        return
    assert not any(re.search(message, line) for line in found) or len(found) > 1


@pytest.mark.parametrize("constructor", ["conformance.results.read_xfails", "ASGO.update", "Nothing", "ASGO.theory.x"])
def test_a_manifest_makes_methods_alone(constructor: str, folder: Path) -> None:
    entry(constructor=constructor)(folder)
    (case,) = (case for case in vectors.cases(folder=folder) if case.id == "SGD/plain")
    with pytest.raises(ValueError, match="is no method or preset of this library"):
        case.make()


def test_our_own_files_may_be_links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link("SGD/plain.safetensors", "../SGD/plain.safetensors")(folder)
    monkeypatch.setattr(vectors, "FOLDER", folder.parent)
    monkeypatch.setattr(vectors, "VERSIONS", (folder.name,))
    assert vectors.verify() == []


def test_a_long_list_of_expected_failures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(bytes(2**24 + 1))
    result = CliRunner().invoke(
        cli.application(), ["check", "precond_ref:SGD", "--method", "SGD", "--xfails", str(tmp_path / "list")]
    )
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "more than 16777216 bytes" in result.stderr
