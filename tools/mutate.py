"""First-order mutants of the methods and their numerics, each judged by ``check``: which edits do the vectors miss?

A mutant is the library with one small edit in a line that updates run through: another operator, constant or
comparison, a term, call, argument or statement left out, arguments or operands exchanged, one field in the place of
another. It is imported beside the library, in a process of its own with limits of time and memory, and is the subject
of ``check`` (NumPy, float64, level 0) of the methods that run through that line (`SUBJECTS`): first on the vectors of
all of them, then in the contract, until a check fails. A mutant that passes all vectors is compared with the library on
other inputs, with drawn fields, shapes and gradients. Without a difference there, the contract is not tried.

  killed      a check failed: a case, the contract, an exception, or a limit
  edge        killed, but only at an edge: see `precond_ref.conformance.results.Report.edges`
  may         only cases of tier may fail, which an implementation need not have
  equivalent  no check failed, and the other inputs show no difference above 1e-6 of a step
  survivor    no check failed, but there is such a difference; by hand, each is equivalent inside the documented domain,
              or shows a hole of the vectors

python tools/mutate.py                               # 2000 mutants; the table, and the survivors
python tools/mutate.py --sample 0 --json all.jsonl   # every mutant; begun again, it goes on where it ended
python tools/mutate.py --sample 100 --diagnose       # what the diagnosis says about those that a case kills
python tools/mutate.py --sample 100 --tests          # the quick tests that run the line, in the place of the check
python tools/mutate.py --sample 100 --checker        # mutants of the checker itself, tried by its quick tests
python tools/mutate.py --only said.jsonl --checker --full    # those that its quick tests let pass, by all its tests
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import ast
import contextlib
import functools
import gc
import importlib
import importlib.machinery
import importlib.util
import itertools
import json
import math
import random
import resource
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from multiprocessing import connection, get_context
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from precond_ref.conformance import beside, check, results, runner, vectors
from precond_ref.conformance import diagnose as explain
from precond_ref.conformance.results import Report
from precond_ref.conformance.subjects import Config, Reference

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("methods", "numerics")
CHECKER = ("tolerance", "results", "runner", "diagnose", "contract", "beside")
"""Modules of ``precond_ref.conformance`` that judge."""
TESTS = {
    "online_sketches": "sketchy", "arrays": "numerics", "axes": "numerics", "bases": "soap", "ema": "numerics",
    "grafting": "shampoo sketchy", "lapack": "numerics", "orthogonal": "muon", "refresh": "shampoo asgo",
    "template": "numerics", "tolerance": "diagnose", "results": "checker diagnose", "runner": "checker diagnose",
    "diagnose": "checker diagnose", "contract": "wrong_optimizers", "beside": "beside wrong_optimizers",
}  # fmt: skip
"""Names of the test files of a module, if they are not its own name; `test_files` has those of all modules."""
SECONDS, TEST_SECONDS, GIGABYTES = 60.0, 300.0, 4
SAME = 1e-6
SUBJECTS = 5
"""Largest number of methods tried among those that run through a line of ``numerics``."""
INPUTS = 40
"""Number of inputs drawn per method for mutants that no check kills."""
FORK = get_context("fork")


# ---- mutants --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """An edit of one module: the characters from ``start`` to ``end`` become ``new``."""

    module: str
    line: int
    kind: str
    old: str
    new: str
    start: int
    end: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line} {self.kind}: {self.old} -> {self.new or '(nothing)'}"


OPERATORS: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
}
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
NAMES = {"max": "min", "min": "max", "maximum": "minimum", "minimum": "maximum", "sum": "max", "zeros": "ones",
         "triu": "tril", "tril": "triu"}  # fmt: skip
"""Functions that a mutant exchanges."""


def edits(node: ast.AST, fields: dict[str, list[str]]) -> Iterator[tuple[str, ast.AST]]:
    """Yield the edits of a node; ``fields`` are the numeric fields of the class by their type."""
    match node:
        case ast.BinOp(left, op, right):
            for other in OPERATORS.get(type(op), ()):
                yield "operator", ast.BinOp(left, other(), right)
            yield "dropped term", left
            yield "dropped term", right
            if not isinstance(op, (ast.Add, ast.Mult)):
                yield "swapped operands", ast.BinOp(right, op, left)
        case ast.UnaryOp(ast.USub() | ast.Not(), operand):
            yield "dropped sign", operand
        case ast.Compare(left, [op], [right]):
            for other_op in COMPARISONS.get(type(op), ()):
                yield "comparison", ast.Compare(left, [other_op()], [right])
        case ast.BoolOp(op, values):
            yield "operator", ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
            for i in range(len(values)):
                rest = values[:i] + values[i + 1 :]
                yield "dropped term", rest[0] if len(rest) == 1 else ast.BoolOp(op, rest)
        case ast.IfExp(test, body, other_body):
            yield "branch", body
            yield "branch", other_body
            yield "branch", ast.IfExp(test, other_body, body)
        case ast.Constant(bool() as value):
            yield "constant", ast.Constant(not value)
        case ast.Constant(int() as value):
            yield "constant", ast.Constant(value + 1)
            yield "constant", ast.Constant(value - 1)
        case ast.Constant(float() as value):
            yield "constant", ast.Constant(2 * value if value else 1.0)
            yield "constant", ast.Constant(-value if value else -1.0)
        case ast.Call(func, arguments, keywords):
            plain = [a for a in arguments if not isinstance(a, ast.Starred)]
            if len(plain) == len(arguments) > 1:
                yield "swapped arguments", ast.Call(func, [arguments[1], arguments[0], *arguments[2:]], keywords)
            for argument in plain[:2]:
                yield "removed call", argument
            if isinstance(func, ast.Attribute) and isinstance(func.value, (ast.Call, ast.BinOp)):
                yield "removed call", func.value
            for i in range(len(keywords)):
                yield "dropped argument", ast.Call(func, arguments, keywords[:i] + keywords[i + 1 :])
            match func:
                case ast.Name(id) if id in NAMES:
                    yield "function", ast.Call(ast.Name(NAMES[id]), arguments, keywords)
                case ast.Attribute(value, attr) if attr in NAMES:
                    yield "function", ast.Call(ast.Attribute(value, NAMES[attr]), arguments, keywords)
        case ast.Attribute(ast.Name("self"), attr):
            for alike in fields.values():
                for name in alike if attr in alike else ():
                    if name != attr:
                        yield "other field", ast.Attribute(ast.Name("self"), name)
        case ast.If(test, body, other_body):
            for value in (True, False):
                yield "condition", ast.If(ast.Constant(value), body, other_body)
        case ast.AugAssign() | ast.Expr(ast.Call()):
            yield "removed statement", ast.Pass()
        case ast.Assign([ast.Name(id)], value) if any(isinstance(n, ast.Name) and n.id == id for n in ast.walk(value)):
            yield "removed statement", ast.Pass()


SKIPPED = (ast.Raise, ast.Assert, ast.JoinedStr, ast.arguments, ast.AnnAssign, ast.Import, ast.ImportFrom)


def numeric(tree: ast.ClassDef) -> dict[str, list[str]]:
    """Return the fields of a method's class by annotation: floats, integers."""
    found: dict[str, list[str]] = {}
    for statement in tree.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            kind = ast.unparse(statement.annotation)
            if kind in ("float", "int"):
                found.setdefault(kind, []).append(statement.target.id)
    return found


def mutants(module: str) -> list[Mutant]:
    """Return all mutants of a module's functions."""
    source = path_of(module).read_text(encoding="utf-8")
    starts = [0]
    for row in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(row))
    lines, found = source.splitlines(keepends=True), dict[tuple[int, int, str], Mutant]()

    def place(line: int, column: int) -> int:
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    def visit(node: ast.AST, fields: dict[str, list[str]], inside: bool) -> None:
        if isinstance(node, SKIPPED) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            return
        if isinstance(node, ast.ClassDef):
            fields = numeric(node)
        if inside and isinstance(node, (ast.expr, ast.stmt)):
            first, last = place(node.lineno, node.col_offset), place(node.end_lineno or 0, node.end_col_offset or 0)
            if isinstance(node, ast.If):  # the test alone
                first, last = (
                    place(node.test.lineno, node.test.col_offset),
                    place(node.test.end_lineno or 0, node.test.end_col_offset or 0),
                )
            old = source[first:last]
            for kind, new in edits(node, fields):
                text = ast.unparse(ast.fix_missing_locations(new.test if isinstance(new, ast.If) else new))
                if isinstance(new, ast.expr) and not isinstance(new, (ast.Name, ast.Constant, ast.Call, ast.Attribute)):
                    text = f"({text})"
                if (first, last, text) not in found and not (isinstance(node, ast.If) and "TYPE_CHECKING" in old):
                    found[first, last, text] = Mutant(
                        module, node.lineno, kind, " ".join(old.split()), text, first, last
                    )
        for name, value in ast.iter_fields(node):
            if name in ("decorator_list", "returns", "annotation", "slice" if module.endswith("typing") else "returns"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child, fields, inside or isinstance(node, (ast.FunctionDef, ast.Lambda)))

    visit(ast.parse(source), {}, False)
    good = []
    for mutant in found.values():
        try:
            compile(applied(mutant, source), module, "exec")
        except SyntaxError:
            continue
        good.append(mutant)
    return good


def path_of(module: str) -> Path:
    """Return the file of a module."""
    return ROOT / (module.replace(".", "/") + ".py")


def applied(mutant: Mutant, source: str) -> str:
    """Return the module's text with the edit."""
    return source[: mutant.start] + mutant.new + source[mutant.end :]


def modules(checker: bool = False) -> list[str]:
    """Return the modules that are mutated: methods and their numerics, or the checker."""
    if checker:
        return [f"precond_ref.conformance.{name}" for name in CHECKER]
    return [f"precond_ref.{f}.{p.stem}" for f in FOLDERS for p in sorted((ROOT / "precond_ref" / f).glob("[a-z]*.py"))]


# ---- in a process of its own -----------------------------------------------------------------------------------------

WORLD: dict[str, Any] = {}
"""Modules of the library with the mutant in it; the checks are those of the library itself."""


def ours() -> dict[str, Any]:
    """Return the modules of the library that are imported now, by name."""
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "precond_ref"}


def exchange(modules: dict[str, Any]) -> dict[str, Any]:
    """Put these modules of the library in the place of the present ones, which are returned."""
    kept = ours()
    for name in kept:
        del sys.modules[name]
    sys.modules.update(modules)
    return kept


@contextlib.contextmanager
def other_world() -> Iterator[None]:
    """Context manager inside which the library is the mutant."""
    kept = exchange(WORLD or ours())
    try:
        yield
    finally:
        exchange(kept)


class Edited(importlib.machinery.SourceFileLoader):
    """The finder and loader of a module with a mutant in it."""

    def __init__(self, mutant: Mutant):
        super().__init__(mutant.module, str(path_of(mutant.module)))
        self.text = applied(mutant, path_of(mutant.module).read_text(encoding="utf-8"))

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return the spec of the module, and None for all others."""
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, name: str) -> Any:
        """Return the code of the mutant."""
        return compile(self.text, self.path, "exec")


@contextlib.contextmanager
def edited(mutant: Mutant | None) -> Iterator[None]:
    """Context manager inside which imports take the mutant in the place of its module."""
    finders = [] if mutant is None else [Edited(mutant)]
    sys.meta_path[:0] = finders
    try:
        yield
    finally:
        for finder in finders:
            sys.meta_path.remove(finder)


def plant(mutant: Mutant | None) -> None:
    """Import the library a second time, with the mutant in the place of its module."""
    kept = exchange({})
    try:
        with edited(mutant):
            importlib.import_module("precond_ref").list_methods()
            WORLD.update(ours())
    finally:
        exchange(kept)


class Mutated(Reference):
    """The mutant's methods."""

    def _method(self, config: Config) -> Any:
        with other_world():
            return super()._method(config)


def prepare() -> None:
    """Load once the vectors that all processes need."""
    loaded: dict[str, Any] = {}

    def load(case: Any, read: Callable[[Any], Any] = vectors.load) -> Any:
        if case.id not in loaded:
            loaded[case.id] = read(case)
        return dict(loaded[case.id])

    vectors.load = load
    listed = functools.cache(results.listed)
    for module in (results, runner):
        vars(module)["listed"] = listed
    vars(beside)["followed"] = functools.cache(beside.followed.__wrapped__)


def drawn(constructor: str) -> list[tuple[Any, Any, Any]]:
    """Return methods, parameters and gradients: fields of cases with other numbers, on other shapes, by fixed seeds."""
    found: list[tuple[Any, Any, Any]] = []
    cases = [case for case in results.cases(constructor) if not case.stack_ndim]
    for seed in range(INPUTS):
        draws = random.Random(f"{constructor} {seed}")
        case = cases[seed % len(cases)]
        with contextlib.suppress(ValueError, TypeError), other_world():
            method: Any = case.make()
            changes: dict[str, Any] = {}
            for field in fields(method):
                value = getattr(method, field.name)
                if isinstance(value, bool):
                    changes[field.name] = value ^ (draws.random() < 0.2)
                elif isinstance(value, int):
                    changes[field.name] = max(value + draws.choice((-1, 0, 0, 1)), 1)
                elif isinstance(value, float) and 0 < value < 1:
                    changes[field.name] = draws.uniform(0.02, 0.98)
                elif isinstance(value, float) and value > 0:
                    changes[field.name] = value * draws.uniform(0.5, 2)
            for name, value in changes.items():
                with contextlib.suppress(ValueError, TypeError):
                    method = method.replace(**{name: value})
            shape = tuple(d if draws.random() < 0.4 else draws.randint(1, 7) for d in case.shape)
            numbers = np.random.default_rng(seed)
            grads = numbers.normal(size=(6, *shape)) * draws.choice((1.0, 1.0, 0.1, 10.0))
            if draws.random() < 0.3:
                grads[draws.randrange(6)] = 0
            method.init(np.zeros(shape))
            found.append((method, numbers.normal(size=shape), grads))
    return found


def steps(constructor: str) -> list[Any]:
    """Return the directions on the drawn inputs; None if the method raises."""
    out: list[Any] = []
    for method, param, grads in drawn(constructor):
        try:
            state, directions = method.init(param), []
            for g in grads:
                direction, state = method.update(g, state, param)
                param = param - 0.1 * direction
                directions.append(np.array(direction))
            out.append(np.stack(directions))
        except Exception:
            out.append(None)
    return out


def apart(these: list[Any], those: list[Any]) -> float:
    """Return the largest difference of a step over the longer of the two steps."""
    if len(these) != len(those):
        return math.inf
    worst = 0.0
    for a, b in zip(these, those, strict=True):
        if a is None or b is None:
            worst = worst if a is b else math.inf
            continue
        for x, y in zip(a, b, strict=True):
            if not np.array_equal(np.isfinite(x), np.isfinite(y)):
                return math.inf
            x, y = np.nan_to_num(x), np.nan_to_num(y)
            size = max(float(np.linalg.norm(x)), float(np.linalg.norm(y)))
            worst = max(worst, float(np.linalg.norm(x - y)) / size if size else 0.0)
    return worst


class Enough(Exception):
    """Raised when a mutant is killed."""


def checked(constructor: str, part: str = "", diagnose: bool = False) -> Report:
    """Return the report of `check` up to the first failure that is not at an edge; ``part`` "vectors": no contract."""
    if diagnose:
        return check(Mutated(), constructor)
    report, edge = Report(constructor, "mutant", "float64", 0), set[str]()

    def at(id: str) -> None:
        runs = {run.case.id: run for run in report.runs}
        for result in report.failures:
            run, gap = runs.get(result.id), result.gap
            if result.id not in edge and run and gap and gap.quantity == "update" and explain.at_edge(run, gap.step):
                edge.add(result.id)
        if len(report.failures) > len(edge) or (part == "vectors" and id.startswith("contract/")):
            raise Enough

    with contextlib.suppress(Enough):
        runner.judge(Mutated(), report, at, False, False)
        at("the end")
    return report


def constructors() -> list[str]:
    """Return the constructors with vectors."""
    return list(dict.fromkeys(case.constructor for case in vectors.cases(kind="trace")))


def tracer(mutated: list[str], lines: set[tuple[str, int]]) -> Callable[..., Any]:
    """Return a function for `sys.settrace` that adds the lines (module, line) of these modules that run."""
    names = {str(path_of(m)): m for m in mutated}

    def trace(frame: Any, event: str, argument: Any) -> Any:
        module = names.get(frame.f_code.co_filename)
        if module is None:
            return None
        if event in ("line", "call"):
            lines.add((module, frame.f_lineno))
        return trace

    return trace


def reached(mutated: list[str]) -> dict[str, tuple[set[tuple[str, int]], list[Any]]]:
    """Return by constructor the lines (module, line) that its vectors and drawn inputs run, and its steps."""
    lines: set[tuple[str, int]] = set()
    trace, found = tracer(mutated, lines), {}
    for constructor in constructors():
        lines.clear()
        sys.settrace(trace)
        try:
            report, truth = checked(constructor, "vectors"), steps(constructor)
        finally:
            sys.settrace(None)
        if report.failures:
            raise SystemExit(f"{constructor} fails its own check: {report.failures[0]}")
        found[constructor] = (set(lines), truth)
    return found


def subjects(mutant: Mutant, reaching: list[str], quick: dict[str, int]) -> list[str]:
    """Return the methods that run through the line; of ``numerics`` some, classes before presets, short ones first."""
    some = SUBJECTS if ".numerics." in mutant.module else None
    return sorted(reaching, key=lambda c: ("." in c, quick[c]))[:some]


def judged(mutant: Mutant | None, subjects: list[str], truth: dict[str, list[Any]], diagnose: bool) -> dict[str, Any]:
    """Return the fate of a mutant."""
    plant(mutant)
    edge: dict[str, Any] = {}
    may: list[str] = []
    gaps: dict[str, float] = {}
    for part in ("",) if diagnose else ("vectors", "contract"):
        for constructor in subjects:
            if part == "contract" and not (gaps[constructor] or may):
                continue
            report = checked(constructor, part, diagnose)
            may += [r.id for r in report.results if r.tier == "may" and r.status in ("failed", "error") and r.gap]
            may += [r.id for r in report.results if r.tier == "may" and r.status == "error" and "/reject-" not in r.id]
            if report.failures:
                found: dict[str, Any] = {"fate": "killed", "by": report.failures[0].id}
                if diagnose:
                    found["report"] = [f"{r.id} {r.status} {r.gap or r.message}" for r in report.failures][:6]
                    found["failures"] = len(report.failures)
                    found["said"] = [] if report.diagnosis is None else report.diagnosis.lines()
                if not report.edges:
                    return found
                edge = edge or {**found, "fate": "edge"}
        gaps = gaps or {c: apart(steps(c), truth[c]) for c in subjects}
    if edge:
        return edge
    if may:
        return {"fate": "may", "by": may[0]}
    worst = max(gaps, key=lambda c: gaps[c], default="")
    if not worst or gaps[worst] <= SAME:
        return {"fate": "equivalent", "gap": gaps.get(worst, 0.0)}
    return {
        "fate": "survivor",
        "by": worst,
        "gap": min(gaps[worst], 1e300),
        "methods": [c for c in gaps if gaps[c] > SAME],
    }


def child(pipe: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Do the work and send its result."""
    gigabytes = GIGABYTES * (4 if work in (tested, watched) else 1)  # the tests import torch and JAX
    resource.setrlimit(resource.RLIMIT_AS, (gigabytes * 2**30,) * 2)
    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    try:
        pipe.send(work(*arguments))
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        pipe.send(
            {"fate": "killed", "by": f"{type(error).__name__}: {error} at {Path(last.filename).name}:{last.lineno}"}
        )
    finally:
        pipe.close()
        os._exit(0)


def in_processes(
    jobs: int, work: list[tuple[Any, Callable[..., Any], tuple[Any, ...]]], seconds: float
) -> Iterator[Any]:
    """Yield ``(key, result)`` of each, ``jobs`` at a time; killed after ``seconds``."""
    waiting, running = list(reversed(work)), dict[Any, tuple[Any, Any, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            key, function, arguments = waiting.pop()
            mine, theirs = FORK.Pipe(duplex=False)
            process = FORK.Process(target=child, args=(theirs, function, arguments), daemon=True)
            process.start()
            theirs.close()
            running[mine] = (key, process, time.monotonic() + seconds)
        for pipe in connection.wait(list(running), timeout=0.5):
            key, process, _ = running.pop(pipe)
            try:
                result = pipe.recv()  # type: ignore[union-attr,call-arg]
            except EOFError:
                result = {"fate": "killed", "by": "the process ended"}
            process.join()
            yield key, result
        for pipe, (key, process, end) in list(running.items()):
            if time.monotonic() > end:
                process.kill()
                process.join()
                del running[pipe]
                yield key, {"fate": "killed", "by": f"took more than {seconds:g} s"}


# ---- the tests ------------------------------------------------------------------------------------------------------


def test_files(module: str) -> list[str]:
    """Return the test files that are collected for a module: first its own, then those of its kind."""
    name, common = module.rpartition(".")[2], "conformance" if ".conformance." in module else "vectors"
    names = [*TESTS.get(name, name).split(), common]
    return [file for file in (f"tests/test_{n}.py" for n in dict.fromkeys(names)) if (ROOT / file).exists()]


class Tests:
    """A plugin of pytest that hands over the collected tests, in the place of running them."""

    def __init__(self, then: Callable[[Tests], None]):
        self.then, self.items, self.failed = then, dict[str, Any](), ""

    def pytest_runtestloop(self, session: Any) -> bool:
        """Call ``then`` with the tests; pytest runs none."""
        self.items = {item.nodeid: item for item in session.items}
        self.then(self)
        return True

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep the name of the first test that fails."""
        self.failed = self.failed or report.nodeid * report.failed

    def run(self, names: list[str]) -> Iterator[str]:
        """Run the tests of these names, and yield each name after its test; stops at the first failure."""
        for name, after in zip(names, [*names[1:], ""], strict=False):
            item = self.items[name]
            item.ihook.pytest_runtest_protocol(item=item, nextitem=self.items.get(after))
            yield name
            if self.failed:
                return


def with_tests(files: list[str], full: bool, then: Callable[[Tests], None]) -> None:
    """Collect the tests of these files and call ``then`` with them."""
    import pytest

    os.chdir(ROOT)
    options = ["-q", "-s", "-n", "0", "-p", "no:cacheprovider", "--assert=plain", *["--full"] * full]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        code = pytest.main([*options, *files], plugins=[Tests(then)])
    if code:
        raise SystemExit(f"pytest ends with exit code {int(code)}: {' '.join([*options, *files])}")


def watched(tests: Tests, mutated: list[str]) -> dict[str, Any]:
    """Run all tests and return their lines (module, line) of these modules; only in a process of its own."""
    seconds, lines, own = dict[str, float](), dict[str, set[tuple[str, int]]](), set[tuple[str, int]]()
    trace = tracer(mutated, own)
    threading.settrace(trace)
    sys.settrace(trace)
    start = time.process_time()
    for name in tests.run(list(tests.items)):
        seconds[name], lines[name] = time.process_time() - start, set(own)
        own.clear()
        start = time.process_time()
        sys.settrace(trace)  # a test may have ended it
    return {"failed": tests.failed, "seconds": seconds, "lines": lines}


def exchange_code(mutant: Mutant) -> None:
    """Give the functions of the module, imported as they are, the code of the mutant."""

    def codes(code: CodeType) -> Iterator[tuple[tuple[str, int], CodeType]]:
        """Yield each code with its name and the number of codes before it that have the same name."""
        found, waiting = Counter[str](), [code]
        while waiting:
            for inner in (c for c in waiting.pop().co_consts if isinstance(c, CodeType)):
                yield (inner.co_qualname, found[inner.co_qualname]), inner
                found[inner.co_qualname] += 1
                waiting.append(inner)

    source, path = path_of(mutant.module).read_text(encoding="utf-8"), str(path_of(mutant.module))
    names = {(code.co_qualname, code.co_firstlineno): key for key, code in codes(compile(source, path, "exec"))}
    new = dict(codes(compile(applied(mutant, source), path, "exec")))
    for function in gc.get_objects():
        if isinstance(function, FunctionType) and function.__code__.co_filename == path:
            code = function.__code__
            function.__code__ = new[names[code.co_qualname, code.co_firstlineno]]


def tested(mutant: Mutant, tests: Tests, names: list[str]) -> dict[str, Any]:
    """Run these tests with the mutant in the place of its module; only in a process of its own.

    Processes that a test starts have the module as it is.
    """
    try:
        exchange_code(mutant)
    except (KeyError, ValueError) as error:  # a variable of the enclosing function that is used no longer
        return {"fate": "not tried", "by": str(error)}
    ran = list(tests.run(names))
    if tests.failed:
        return {"fate": "killed", "by": tests.failed, "tests": len(ran)}
    return {"fate": "survivor", "by": f"{len(ran)} tests pass" if ran else "no test runs the line", "tests": len(ran)}


def running(mutant: Mutant, ran: dict[str, Any], most: float = math.inf) -> list[str]:
    """Return the tests that run a line of the mutant, quick ones first, ``most`` seconds of them."""
    rows = path_of(mutant.module).read_text(encoding="utf-8")[mutant.start : mutant.end].count("\n") + 1
    lines = {(mutant.module, mutant.line + i) for i in range(rows)}
    names = sorted((n for n, own in ran["lines"].items() if own & lines), key=lambda n: ran["seconds"][n])
    ends = itertools.accumulate(ran["seconds"][n] for n in names)
    return [n for n, end in zip(names, ends, strict=True) if end <= most]


# ---- the command ----------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=2000, help="number of mutants, 0 for all (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes at a time (default: 2)")
    parser.add_argument("--modules", default="", help="parts of module names, separated by commas (default: all)")
    parser.add_argument("--only", type=Path, metavar="FILE", help="the survivors of a report, again")
    parser.add_argument("--diagnose", action="store_true", help="keep the diagnosis of each mutant")
    parser.add_argument("--tests", action="store_true", help="run the quick tests of the module instead of check")
    parser.add_argument("--checker", action="store_true", help="mutate the checker; implies --tests")
    parser.add_argument("--full", action="store_true", help="with --tests: all tests but the deep ones")
    parser.add_argument("--most", type=float, default=math.inf, help="seconds of tests for a mutant (default: all)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=None,
        help=f"limit for one mutant (default: {SECONDS:g}; tests: {TEST_SECONDS:g})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the fate of each mutant")
    return parser.parse_args()


def written(file: Path) -> dict[Mutant, dict[str, Any]]:
    """Return the fate of each mutant in a report."""
    names, out = [f.name for f in fields(Mutant)], {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        out[Mutant(**{name: row.pop(name) for name in names})] = row
    return out


def main() -> None:
    """Print the table and the survivors."""
    given, console = arguments(), Console(stderr=True)
    every = [
        m for module in modules(given.checker) if any(part in module for part in given.modules.split(","))
        for m in mutants(module)
    ]  # fmt: skip
    by_tests = given.tests or given.checker
    run, lines = every, dict[tuple[str, int], list[str]]()
    if not by_tests:
        prepare()
        with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
            base = reached(modules())
        for constructor, (seen, _) in base.items():
            for line in seen:
                lines.setdefault(line, []).append(constructor)
        run = [m for m in every if (m.module, m.line) in lines]
    in_updates = len(run)
    if given.only:
        fates = {m: f["fate"] for m, f in written(given.only).items()}
        kept = {(m.module, m.kind, m.old, m.new) for m, f in fates.items() if f in ("survivor", "edge", "may")}
        run = [m for m in run if (m.module, m.kind, m.old, m.new) in kept]  # lines may have moved
    if given.sample and given.sample < len(run):
        run = sorted(random.Random(given.seed).sample(run, given.sample), key=lambda m: (m.module, m.start))
    said = "" if by_tests else f", {in_updates} of them in lines that updates run"
    console.print(f"{len(every)} mutants{said}; {len(run)} are tried")
    done = written(given.json) if given.json and given.json.exists() else {}
    left = [m for m in run if m not in done]

    def go(function: Callable[..., Any], arguments: Callable[[Mutant], tuple[Any, ...]]) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        seconds = given.seconds or (TEST_SECONDS if by_tests else SECONDS)
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("mutants", total=len(left))
            for mutant, fate in in_processes(given.jobs, [(m, function, (m, *arguments(m))) for m in left], seconds):
                done[mutant] = fate
                if given.json:
                    with given.json.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({**asdict(mutant), **fate}) + "\n")
                bar.advance(task)

    def go_with(tests: Tests) -> None:
        mutated = sorted({m.module for m in left})
        ((_, ran),) = in_processes(1, [(None, watched, (tests, mutated))], math.inf)
        if failed := ran.get("failed", ran.get("by")):
            raise SystemExit(f"the tests fail without an edit: {failed}")
        console.print(f"{len(tests.items)} tests, {sum(ran['seconds'].values()):.0f} s of processor time")
        go(tested, lambda m: (tests, running(m, ran, given.most)))

    if by_tests:
        with_tests(sorted({file for m in run for file in test_files(m.module)}), given.full, go_with)
    else:
        truth, quick = {c: t for c, (_, t) in base.items()}, {c: len(seen) for c, (seen, _) in base.items()}

        def its(m: Mutant) -> tuple[Any, ...]:
            own = subjects(m, lines[m.module, m.line], quick)
            return own, {c: truth[c] for c in own}, given.diagnose

        go(judged, its)
    ordered = {m: done[m] for m in run}
    for mutant, fate in ordered.items():
        if fate["fate"] == "survivor":
            print(f"{mutant}   [{fate['by']}, {fate.get('gap', math.nan):.1e}]")
    print(table(ordered))


def table(fates: dict[Mutant, dict[str, Any]]) -> str:
    """Return the table of fates by module."""
    kinds = [
        k
        for k in ("killed", "edge", "may", "equivalent", "survivor", "not tried")
        if any(f["fate"] == k for f in fates.values())
    ]
    out = [f"| module | mutants | {' | '.join(kinds)} |", "|---|---|" + "---|" * len(kinds)]
    for module in [*dict.fromkeys(m.module for m in fates), ""]:
        counts = Counter(f["fate"] for m, f in fates.items() if module in m.module)
        own = " | ".join(str(counts[k]) for k in kinds)
        out.append(f"| {module.removeprefix('precond_ref.') or 'all'} | {sum(counts.values())} | {own} |")
    return "\n".join(out)


if __name__ == "__main__":
    main()
