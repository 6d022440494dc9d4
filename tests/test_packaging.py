"""What is imported, installed and shipped: laziness, the three packages, the wheel, the README's commands."""

import ast
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import precond_ref
from precond_ref import methods
from precond_ref.methods import MODULES

ROOT = Path(__file__).resolve().parents[1]
BACKENDS_AND_TOOLS = {"numpy", "torch", "jax", "cupy", "scipy", "matplotlib", "typer"}


def run_python(code, cwd):
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def loaded_by(statement, cwd):
    """Which of the backends and tools a fresh interpreter has loaded after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*sorted({BACKENDS_AND_TOOLS!r} & set(sys.modules)))"
    return set(run_python(code, cwd).split())


def test_import_loads_no_backend(tmp_path):
    assert loaded_by("import precond_ref", tmp_path) == set()


def test_import_loads_no_method(tmp_path):
    """Each is imported when it is named: all of them take three times as long as one."""
    code = "import precond_ref, sys; {}print(*sorted(n for n in sys.modules if n.startswith('precond_ref.methods.')))"
    assert run_python(code.format(""), tmp_path) == ""
    assert run_python(code.format("precond_ref.AGD; "), tmp_path) == "precond_ref.methods.agd"
    assert run_python(code.format("import precond_ref.cli.app; "), tmp_path) == ""  # the help of the command
    assert run_python(code.format("import precond_ref.cli.app, precond_ref.methods.mbf; "), tmp_path) != ""


def test_every_method_has_its_place():
    found = {name: cls.__module__.rpartition(".")[2] for name, cls in precond_ref.list_methods().items()}
    assert list(found.items()) == list(MODULES.items())
    assert set(found) < set(precond_ref.__all__) < set(dir(precond_ref))
    folder = Path(precond_ref.__file__).parent / "methods"
    assert {file.stem for file in folder.glob("*.py")} == {"__init__", *MODULES.values()}


def test_methods_are_the_public_classes_of_a_module():
    source = b"class AState(NamedTuple):\nclass _A(Method):\nclass A(_A):\nclass B(A, preset='A.b'):\n    class C(A):\n"
    assert methods._CLASS.findall(source) == [b"A"]


def check_names():
    assert tool("names").FILE.read_text(encoding="utf-8") == tool("names").text(), "run python tools/names.py"


def test_type_checkers_find_every_public_name(monkeypatch):
    check_names()
    monkeypatch.setitem(precond_ref._PLACES, "Mine", "methods.mine")  # planted
    with pytest.raises(AssertionError):
        check_names()


def test_import_check_sees_a_backend(tmp_path):
    assert loaded_by("import numpy", tmp_path) == {"numpy"}


@pytest.mark.parametrize("name", ["precond_ref", "precond_ref_torch", "precond_ref_jax"])
def test_package_is_importable_and_typed(name):
    module = importlib.import_module(name)
    assert isinstance(module.__all__, list)
    assert all(hasattr(module, public) for public in module.__all__)
    assert (Path(module.__file__).parent / "py.typed").is_file()


def test_adapters_is_no_package():
    assert not (ROOT / "adapters" / "__init__.py").exists()


def test_version_has_one_source():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert importlib.import_module("precond_ref").__version__ == version
    assert importlib.metadata.version("precond-ref") == version
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text().splitlines()
    assert version in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    "command",
    [
        'python -m pip install -e ".[cli]" && precond-ref compare',
        'python -m pip install -e ".[test]" && python -m pytest',
    ],
)
def test_readme_has_command_on_one_line(command):
    assert command in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


# ---- the wheel ----


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def check_wheel():
    return tool("check_wheel")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason="building a wheel needs hatchling, which the test extra installs")
    folder = tmp_path_factory.mktemp("wheel")
    name = run_python(f"import hatchling.build\nprint(hatchling.build.build_wheel({str(folder)!r}))", ROOT)
    return folder / name


def rewritten(wheel, folder, change, extra):
    """A copy of ``wheel``: each content changed (None: left out), and one more file, ``extra``."""
    copy = folder / wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
        if extra:
            new.writestr(extra, b"")
    return copy


def same(name, content):
    return content


def without(pattern):
    return lambda name, content: None if pattern in name else content


def needs_numpy(name, content):
    return b"Requires-Dist: numpy\n" + content if name.endswith("/METADATA") else content


def test_wheel_content(wheel, check_wheel, capsys):
    assert check_wheel.faults(wheel) == []
    assert check_wheel.main([str(wheel)]) == 0
    assert "ok" in capsys.readouterr().out


def test_wheel_holds_every_file_of_the_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    for folder, package in (("", "precond_ref"), ("adapters", "precond_ref_torch"), ("adapters", "precond_ref_jax")):
        base = ROOT / folder
        files = {path.relative_to(base).as_posix() for path in (base / package).rglob("*") if path.is_file()}
        assert {name for name in files if "__pycache__" not in name} <= shipped


PLANTED = {
    "top-level adapters": (same, "adapters/x.py"),
    "missing package": (without("precond_ref_jax/"), None),
    "missing marker": (without("precond_ref_torch/py.typed"), None),
    "missing data": (without("digits.csv.gz"), None),
    "missing vectors": (without("v1/manifest.json"), None),
    "missing vector": (without("AGD/plain.safetensors"), None),
    "missing schema": (without("conformance/schema.json"), None),
    "missing licence of the data": (without("digits-licence.txt"), None),
    "missing licence": (without("LICENSE"), None),
    "missing command": (without("entry_points.txt"), None),
    "test in wheel": (same, "precond_ref/test_x.py"),
    "second core dependency": (needs_numpy, None),
    "second metadata": (same, "other-1.dist-info/METADATA"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_wheel_check_sees_planted_fault(fault, wheel, check_wheel, tmp_path, capsys):
    broken = rewritten(wheel, tmp_path, *PLANTED[fault])
    assert len(check_wheel.faults(broken)) == 1
    assert check_wheel.main([str(broken)]) == 1
    assert check_wheel.faults(broken)[0] in capsys.readouterr().out


def test_wheel_check_wants_a_wheel(check_wheel, capsys):
    assert check_wheel.main([]) == 1
    assert "usage" in capsys.readouterr().err


def shadowed(package: str) -> list[str]:
    """Public names of ``package`` that are one of its modules as well: the import of that would take their place."""
    module = importlib.import_module(package)
    return sorted(set(module.__all__) & {found.name for found in pkgutil.iter_modules(module.__path__)})


def test_no_module_takes_the_place_of_a_public_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shadowed("precond_ref") == shadowed("precond_ref.conformance") == []
    monkeypatch.setattr("precond_ref.conformance.__all__", ["cases", "runner"])  # planted
    assert shadowed("precond_ref.conformance") == ["runner"]


# ---- who imports whom -----------------------------------------------------------------------------------------------

STOREYS = (
    ("typing", "fields", "files"), ("numerics",), ("protocol",), ("registry",), ("methods",), ("optimizer",),
    ("precond_ref",), ("problems",), ("theory",), ("compare", "regret", "cost", "conformance"),
    ("bench", "experiments"), ("cli",),
)  # fmt: skip
"""Rooms of the package, "precond_ref" its front door, from the ground up: each imports from those below."""


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def imports(folder: Path) -> dict[str, set[str]]:
    """The package's modules that each of its modules imports, wherever in it; not those for types alone."""
    files = {".".join(f.relative_to(folder.parent).with_suffix("").parts): f for f in folder.rglob("*.py")}
    files = {name.removesuffix(".__init__"): file for name, file in files.items()}
    found: dict[str, set[str]] = {}
    for name, file in files.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        checks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
        ignored = {id(n) for check in checks for n in ast.walk(check)}
        used = set()
        for node in (n for n in ast.walk(tree) if id(n) not in ignored):
            if isinstance(node, ast.ImportFrom) and node.module:
                used |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
        found[name] = {  # `from room import module` is of the module alone
            each for each in used & files.keys() - {name} if not any(other.startswith(f"{each}.") for other in used)
        }
    return found


def wrong_arrows(graph: dict[str, set[str]]) -> list[str]:
    """Imports that go up, and modules that import each other."""
    height = {name: i for i, names in enumerate(STOREYS) for name in names}
    up = [f"{a} -> {b}" for a, bs in graph.items() for b in bs if height[room(a)] < height[room(b)]]
    left = {a: {b for b in bs if room(a) == room(b) or room(b) == "precond_ref"} for a, bs in graph.items()}
    while done := [a for a, bs in left.items() if not bs & left.keys()]:
        left = {a: bs for a, bs in left.items() if a not in done}
    return sorted(up) + ([f"circle of {', '.join(sorted(left))}"] if left else [])


def test_imports_go_down_and_in_no_circle() -> None:
    assert wrong_arrows(imports(Path(precond_ref.__file__).parent)) == []


@pytest.mark.parametrize(
    ("a", "b"),
    [("numerics.ema", "protocol"), ("cost.report", "cli.terminal"), ("conformance.results", "conformance.runner")],
)
def test_an_import_that_goes_up_or_round_is_seen(a: str, b: str) -> None:
    graph = imports(Path(precond_ref.__file__).parent)
    graph[f"precond_ref.{a}"] = graph[f"precond_ref.{a}"] | {f"precond_ref.{b}"}
    assert wrong_arrows(graph)
