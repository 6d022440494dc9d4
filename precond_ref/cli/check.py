"""``precond-ref check``: the command line of the conformance kit."""

from __future__ import annotations

import contextlib
import io
import json as json_module
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from precond_ref.cli.terminal import EXTRA, check_files, fail
from precond_ref.conformance.processes import Ended, Limits

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from precond_ref.conformance.results import Report, Result

EXAMPLES = """\b
What TARGET can be (module:attribute; the current folder is searched first):
  a torch.optim.Optimizer class            my_package.optim:MyASGO
  a function that makes one                recipes:make     def make(params, lr, **config): ...
  a function that makes an optax one       recipes:my_asgo  def my_asgo(learning_rate, beta1, ...): ...
  a function of one step                   mine:asgo_step   def asgo_step(param, grad, state, *, lr, ...):
                                                                return new_param, new_state  (state None at first)
  a class with init(config, params) and step(grads) -> params, lists of NumPy arrays
  one of precond_ref's methods             precond_ref:ASGO --backend torch

\b
TARGET gets its hyperparameters by the names that `precond-ref list` prints, and lr and weight_decay. The arguments
learning_rate, betas, b1 and b2 are recognised; --map gives other names. An argument that TARGET does not have is left
out if the case has its default value; otherwise the case is skipped.

\b
Examples:
  precond-ref check my_package.optim:MyASGO --method ASGO
  precond-ref check my_package.optim:MyASGO --method ASGO --map eps=epsilon --map beta1=betas.0 --map beta2=betas.1
  precond-ref check my_package.optim:MyASGO --method ASGO --level 1 --map state.gram=precond --json report.json
  precond-ref check my_package.optim:MyASGO --method ASGO --invariances
  precond-ref check --command "./my_optimizer --json" --method ASGO.theory
  precond-ref check precond_ref:SShampoo --method SShampoo --backend jax --dtype float32
  precond-ref check my_module:Fast --against my_module:Reference
  precond-ref check my_module:fast_step --against "precond_ref:ASGO(every=3)"
  precond-ref check my_package.optim:MyASGO --world 2,4 --mesh hsdp
  precond-ref check "torch.optim:SGD(momentum=0.5)" --world 3
"""


def check_command(
    target: Annotated[str | None, typer.Argument(metavar="[TARGET]", help="The implementation, see below.")] = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="The method that it should be; `precond-ref list` prints the names.")
    ] = "",
    command: Annotated[
        str | None, typer.Option(metavar='"PROGRAM ..."', help="A program that speaks JSON lines, instead of TARGET.")
    ] = None,
    level: Annotated[
        int, typer.Option(metavar="0|1|2", help="0: parameters. 1: also the states it shows. 2: also primitives.")
    ] = 0,
    dtype: Annotated[str, typer.Option(metavar="float64|float32", help="Precision of the run.")] = "float64",
    backend: Annotated[
        str | None, typer.Option(metavar="NAME", help="Array library for functions and for our methods: numpy, ...")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Another implementation, instead of --method: both run on generated gradients; needs Hypothesis.",
        ),
    ] = None,
    examples: Annotated[int, typer.Option(metavar="N", help="With --against: number of inputs.")] = 100,
    seed: Annotated[int, typer.Option(metavar="N", help="With --against: seed of the inputs.")] = 0,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--map", metavar="OURS=THEIRS", help="The name that TARGET has for an argument or a state.NAME; repeatable."
        ),
    ] = None,
    invariances: Annotated[
        bool, typer.Option("--invariances", help="Also try the method's laws on generated gradients; needs Hypothesis.")
    ] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Generate more inputs, for minutes instead of seconds of processor time.")
    ] = False,
    world: Annotated[
        str,
        typer.Option(metavar="N,N", help="Instead of --method: on so many ranks it must step as in one process."),
    ] = "",
    mesh: Annotated[
        str, typer.Option(metavar="NAME", help="With --world: fsdp, hsdp, tp, fsdp-tp or ddp (JAX: the first three).")
    ] = "fsdp",
    require: Annotated[
        str, typer.Option(metavar="must|should", help="Fail if a case of this tier is skipped; `should` includes must.")
    ] = "",
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Limit of one answer: the import, the beginning of a case, a step.")
    ] = Limits().seconds,
    memory: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="Limit of the process and its children; on Linux only.  [default: 4]"),
    ] = None,
    xfails: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Ids expected to fail, one a line; # starts a comment.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the report, as JSON.")] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also show the cases that passed or were skipped.")
    ] = False,
) -> None:
    """Check an implementation of one of the methods, and say what it computes instead.

    The command runs TARGET on test vectors, whose results come from 50-digit arithmetic, and compares each step within
    a derived tolerance. It checks that TARGET leaves gradients alone, can be resumed, and keeps parameters apart. Then
    TARGET runs beside the method on generated inputs: long runs, large shapes, values that change. If TARGET is wrong,
    its steps are compared with the steps of known mistakes.

    With --against there are no vectors: two implementations run side by side, and a difference is shrunk to a small
    program. Both take fields in brackets; TARGET also gets the fields of the other.

    With --world there are none either: TARGET runs on processes that are spread over a mesh, and in one process, and
    must make the same steps. It is a torch optimizer, a function of (model, ...) or (params, ...) that makes one, or an
    optax transformation, with arguments in brackets. A difference is reported with the step, the parameter, the ranks
    and the name of the mistake.

    TARGET runs in a process of its own; its output goes to the error stream.

    Exit code: 0 right, 1 wrong or not finished, 2 the command cannot be run or its report cannot be written, 3 right
    except at an edge, such as eps = 0 with a singular statistic, 4 right as far as seen, but most cases of tier must
    were skipped.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        from precond_ref import registry
        from precond_ref.conformance import results, runner, subjects
        from precond_ref.conformance.isolation import Isolated

        if invariances or against:
            import hypothesis  # noqa: F401
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed: {'pip install hypothesis' if error.name == 'hypothesis' else EXTRA}")
    if against is not None:
        if target is None or method or command or level or invariances or xfails or deep or require:
            fail(
                "--against goes with TARGET, --map, --dtype, --backend, --examples, --seed, --json and the limits only"
            )
        check_files(json)
        side_by_side(target, against, dtype, backend, names or [], timeout, memory, seed, examples, json)
    if world:
        if target is None or method or command or level or names or invariances or xfails or deep or require or backend:
            fail("--world goes with TARGET, --mesh, --dtype, --json, -v and the limits only")
        check_files(json)
        on_ranks(target, world, mesh, dtype, timeout, memory, json, verbose)
    if mesh != "fsdp":
        fail("--mesh goes with --world")
    if not method:
        fail("--method NAME must say which method of `precond-ref list` it should be, or --against which other target")
    if (target is None) == (command is None):
        fail("give either TARGET (module:attribute) or --command")
    subject: Any = None
    try:
        mapping = subjects.parse_map(names or [])
        limits = limited(timeout, memory)
        expected = results.read_xfails(xfails) if xfails else ()
        check_files(json)
        runner.refuse_unknown(mapping, method)
        if command is not None:
            subject = subjects.Command(command, dtype, mapping, limits)
        else:
            subject = Isolated(target or "", backend=backend, dtype=dtype, names=mapping, limits=limits)
        label = command or target or ""
        report = with_progress(
            lambda step: runner.check(
                subject,
                method,
                level=level,
                dtype=dtype,
                xfails=expected,
                target=label,
                on_case=step,
                invariances=invariances,
                deep=deep,
                require=require,
            ),
            len(runner.ids(method, level)) + 10 * invariances,
        )
    except Ended as end:  # before the first case
        report = results.Report(registry.parse(method).name, target or "", dtype, level, ended=str(end))
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        fail(error)
    finally:
        if subject is not None:
            subject.close()
    if memory is not None and sys.platform != "linux":
        report.notes.append("memory was not limited: that is done on Linux only")
    missing = [f for f in (written(report, json), printed(report, verbose)) if f]
    if missing:
        fail(f"the report cannot be written to {', '.join(missing)}")
    raise typer.Exit((4 if report.scarce else 0) if report.ok else 3 if report.edges else 1)


def side_by_side(
    first: str,
    second: str,
    dtype: str,
    backend: str | None,
    names: list[str],
    timeout: float,
    memory: float | None,
    seed: int,
    examples: int,
    json: Path | None,
) -> NoReturn:
    """Compare the two implementations, print the verdict, and end the command with its exit code."""
    from functools import partial

    from precond_ref import registry
    from precond_ref.conformance import subjects
    from precond_ref.conformance.against import Pair
    from precond_ref.conformance.isolation import Isolated

    opened: list[Any] = []

    def start(place: str, own: dict[str, str]) -> Any:
        opened.append(Isolated(place, backend=backend, dtype=dtype, names=own, limits=limits))
        return opened[-1]

    found, program, ended = None, "", ""
    shapes: list[tuple[int, ...]] = []
    refused: dict[tuple[int, ...], str] = {}
    try:
        if examples < 1:
            raise ValueError(f"--examples must be >= 1, got {examples}")
        limits = limited(timeout, memory)
        mapping = subjects.parse_map(names)
        starts = partial(start, own=mapping), partial(start, own={})
        pair = Pair(first, second, dtype=dtype, backend=backend, names=mapping, starts=starts)
        shapes, refused = pair.shapes()
        found = pair.difference(shapes, seed=seed, examples=examples)
        program = pair.script(found) if found else ""
    except Ended as end:
        ended = str(end)
    except (ValueError, TypeError, OSError, ImportError) as error:
        fail(error)
    finally:
        for subject in opened:
            subject.close()
    ok = not (found or ended)
    if json is not None:
        report = {"target": first, "against": second, "dtype": dtype, "seed": seed, "examples": examples, "ok": ok,
                  "ended": ended, "shapes": shapes, "not_taken": [*refused], "program": program}  # fmt: skip
        json.write_text(json_module.dumps(report, indent=1) + "\n", encoding="utf-8")
    typer.echo(f"{first} against {second}: {dtype}, {examples} inputs, seed {seed}")
    (_, own), (_, fields) = registry.split(first), registry.split(second)
    if passed := ", ".join(f"{name}={value!r}" for name, value in fields.items() if name not in own):
        typer.echo(f"{first} is given what --against has in brackets: {passed}")
    typer.echo(f"shapes: {', '.join(map(str, shapes)) or 'none'}")
    for shape, reason in refused.items():
        typer.echo(f"not taken by {first}: {shape} ({reason})")
    if ended:
        typer.echo(f"\nWRONG: {ended}")
    elif found is None:
        typer.echo("\nOK: they agree on all of them")
    else:
        typer.echo(f"\n{program}\nWRONG: they differ by {found.ratio:.3g} times the tolerance")
    raise typer.Exit(0 if ok else 1)


def on_ranks(
    target: str, world: str, mesh: str, dtype: str, timeout: float, memory: float | None, json: Path | None,
    verbose: bool,
) -> NoReturn:  # fmt: skip
    """Compare ranks with one process, say what was found, and end."""
    from precond_ref.conformance import worlds

    try:
        if not re.fullmatch(r"\d+(,\d+)*", world):
            raise ValueError(f"--world takes numbers of ranks, such as 2,4, got {world!r}")
        numbers = tuple(map(int, world.split(",")))
        limits = limited(timeout, memory)
        report = with_progress(
            lambda step: worlds.check(target, numbers, mesh=mesh, dtype=dtype, limits=limits, on_run=step),
            2 + len(numbers),
        )
    except Ended as end:
        report = worlds.Report(target, dtype, mesh, numbers, ended=str(end))
    except (ValueError, TypeError, OSError, ImportError) as error:
        fail(error)
    missing = [f for f in (written(report, json), printed(report, verbose, show_ranks)) if f]
    if missing:
        fail(f"the report cannot be written to {', '.join(missing)}")
    raise typer.Exit(0 if report.ok else 1)


def show_ranks(report: Any, console: Console, verbose: bool = False) -> None:
    """Print a report of `worlds.check` for a person."""
    on = f"{' and '.join(map(str, report.worlds))} ranks ({report.mesh})"
    console.print(f"{report.target} on {on}: {report.dtype}", end="\n\n")
    rows = [r for r in report.results if verbose or r.status != "passed"]
    if rows:
        console.print(table(rows, report), end="\n\n")
    same: dict[str, list[str]] = {}
    for r in rows:
        if r.message:
            same.setdefault(r.message, []).append(r.id)
    for message, ids in same.items():
        console.print(f"{', '.join(ids)}: {message}", soft_wrap=True)
    console.print(f"runs: {count(report.results)}")
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True)
    types = sorted(set(report.narrow.values()))
    if types:
        told = f"it computes in {' and '.join(types)}, for gradients changed by less give the same bits"
        console.print(
            f"note: {told}; it is compared to its own noise, {report.noise:.1e} of the movement", soft_wrap=True
        )
    console.print()
    if report.ended:
        verdict = f"NOT CHECKED: {report.ended}"
    elif report.failures:
        verdict = f"WRONG: {len(report.failures)} of {len(report.results)} runs are not those of one process"
    elif report.refused:
        others = f"is right in {report.ran} other runs" if report.ran else "nothing else could be tried"
        verdict = f"REFUSES: it raises in {', '.join(r.id for r in report.refused)}, and {others}"
    elif not report.ran:
        verdict = "NOT CHECKED: nothing ran to its end"
    else:
        part = " IN PART" if any(r.status == "skipped" for r in report.results) else ""
        verdict = f"OK{part}: {report.target} makes the steps of one process on {on}"
        verdict += ", to the noise of its arithmetic" if types else ""
    console.print(verdict, soft_wrap=True)


def limited(timeout: float, memory: float | None) -> Limits:
    """Return the limits; ValueError if one is not positive and finite."""
    limits = Limits(timeout, Limits().gigabytes if memory is None else memory)
    for name, value in zip(("--timeout", "--memory"), limits, strict=True):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value:g}")
    return limits


def written(report: Any, file: Path | None) -> str:
    """Write the report as JSON to ``file``; return the file and the reason if this failed, else ""."""
    try:
        if file is not None:
            file.write_text(json_module.dumps(report.as_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        return f"{file}: {error.strerror}"
    return ""


def printed(report: Any, verbose: bool, show: Callable[..., None] | None = None) -> str:
    """Write the report to standard output in one piece, so that a reader may close it early; returns as `written`."""
    from rich.console import Console

    if sys.stdout is None:
        return "standard output: it is closed"
    real, text = Console(), io.StringIO()
    console = Console(
        file=text, force_terminal=real.is_terminal, width=real.width if real.is_terminal else 140, highlight=False,
        markup=False, emoji=False,
    )  # fmt: skip
    (show or show_report)(report, console, verbose)
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.getvalue().encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # the rest of the output is dropped
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return f"standard output: {error.strerror}"
    return ""


def with_progress(run: Any, total: int) -> Any:
    """Return ``run(step)``, with a progress bar if the error stream is a terminal; ``step`` takes the next id."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    console = Console(stderr=True)
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def step(name: str) -> None:
            bar.update(task, description=name, advance=1)

        return run(step)


def show_report(report: Report, console: Console, verbose: bool = False) -> None:
    """Print the report for a person."""
    console.print(f"{report.target} against {report.method}: {report.dtype}, level {report.level}", end="\n\n")
    unexpected = {r.id for r in report.failures}
    rows = [r for r in report.results if verbose or r.id in unexpected or r.id in report.unexpected_passes or may(r)]
    if rows:
        console.print(table(rows, report), end="\n\n")
    said = [r for r in rows if verbose or r.id in unexpected]
    few = 0 < len(said) <= 4  # then the purpose of each is printed, too
    messages = Counter(r.message for r in said)
    for r in said:
        if report.ended and r.id == report.results[-1].id:  # the verdict says it
            continue
        number = messages.pop(r.message, 0)  # a message is printed once
        text = r.message and r.message + f" (in {number} cases)" * (number > 1) if number else ""
        if few and not r.id.startswith("invariance/"):  # the message of a law has its purpose
            text = f"{r.why} {text[:1].upper()}{text[1:]}".strip()
        if text:
            console.print(f"{r.id}: {text}", soft_wrap=True)
    contract, laws = ([r for r in report.results if r.id.startswith(kind)] for kind in ("contract/", "invariance/"))
    cases = [r for r in report.results if "/reject-" not in r.id and r not in contract and r not in laws]
    console.print(f"cases: {count(cases)}")
    if contract:
        console.print(f"contract: {count(contract)}")
    if astray := sorted((r.astray, r.id) for r in rows if r.astray is not None):
        (middle, _), (most, id) = astray[len(astray) // 2], astray[-1]
        console.print(f"the runs end off by {middle:.1e} of the way in the middle, by {most:.1e} at most ({id})")
    if laws:
        console.print(f"invariances: {count(laws)}")
    ran = [*cases, *contract]
    skipped = Counter(re.sub(r"(no argument for \w+)=.*", r"\1", r.message) for r in ran if r.status == "skipped")
    for message, number in skipped.most_common(6):
        console.print(f"skipped ({number}): {message or 'NotImplementedError'}", soft_wrap=True)
    rejects = [r for r in report.results if "/reject-" in r.id and r.status != "skipped"]
    if rejects and report.ran:
        refused = sum(r.status == "passed" for r in rejects)
        console.print(f"invalid configurations refused: {refused} of {len(rejects)} (for information)")
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True)
    for name in report.unknown_xfails:
        console.print(f"expected to fail, but there is no such case or check: {name}", soft_wrap=True)
    for name in report.unexpected_passes:
        console.print(f"expected to fail, but passed: {name}", soft_wrap=True)
    if report.diagnosis:
        console.print()
        for line in report.diagnosis.lines():
            console.print(line, soft_wrap=True)
    console.print()
    if report.ended:
        verdict = f"WRONG: {report.ended}; nothing was tried after that"
    elif not report.ran:
        verdict = "NOT CHECKED: no case ran to its end"
        lacking = Counter(
            name for r in cases for name in re.findall(r"(?:has no argument for|refuses) (\w+)", r.message)
        )
        if lacking and all(r.status == "skipped" for r in cases):
            name = lacking.most_common(1)[0][0]
            verdict += (
                f"; if {name} has another name there: --map {name}=NAME; if it has one value there, check a function "
            )
            verdict += f"that takes {name} and raises NotImplementedError for all others"
    elif report.ok:
        verdict = f"OK: {report.target} is {report.method} in {seen(report, cases)}"
        if expected := sum(r.bad for r in report.results):
            verdict += f", but for {expected} expected failure{'s' * (expected > 1)}"
    elif report.missing and not (report.failures or report.unexpected_passes or report.unknown_xfails):
        verdict = f"NOT ENOUGH: {report.target} is {report.method} in {seen(report, cases)}; "
        verdict += f"--require {report.require} does not allow to skip {', '.join(report.missing)}"
    else:
        known = f"RIGHT, except at {report.edges}" if report.edges else "WRONG"
        verdict = f"{known}: {len(report.failures)} unexpected failure{'s' * (len(report.failures) != 1)}"
        others = len(report.unexpected_passes) + len(report.unknown_xfails)
        if others:
            verdict += f", {others} expected ones that did not fail"
    if report.untried:
        console.print(f"not all inputs were tried within the time: {', '.join(report.untried)}", soft_wrap=True)
    if verdict.startswith("OK") and (report.left_out("must") or report.untried):
        verdict = verdict.replace("OK", "OK IN PART", 1) + ", which is less than half" * report.scarce
    console.print(verdict, soft_wrap=True)


def seen(report: Report, cases: list[Result]) -> str:
    """Return in words how much of the method was seen."""
    must = [r for r in cases if r.tier == "must"]
    left = len(report.left_out("must"))
    if report.ran == len(cases):
        return f"all {len(cases)} cases"
    part = f"{report.ran} of {len(cases)} cases"
    return f"{part} ({len(must) - left} of {len(must)} of tier must)" if left else f"{part}, with all of tier must"


def may(result: Result) -> bool:
    """Return whether the result is a failure of tier "may", which is shown and not counted."""
    return result.tier == "may" and result.status in ("failed", "error") and "/reject-" not in result.id


def count(results: list[Result]) -> str:
    """Return the number of results of each status, in words; of failures also those that do not count."""
    numbers, free = Counter(r.status for r in results), Counter(r.status for r in results if may(r))
    words = [
        f"{numbers[s]} {s}" + f" ({free[s]} of tier may)" * bool(free[s])
        for s in ("passed", "failed", "error", "skipped")
        if numbers[s]
    ]
    return ", ".join(words) or "none"


def table(results: list[Result], report: Any) -> Table:
    """Return a table with one row per result."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "case or check", "step", "quantity", "error", "tolerance", "ratio", "cosine", "norm ratio"):
        made.add_column(name, justify="left" if name in ("", "case or check", "quantity") else "right", no_wrap=True)
    for r in results:
        status = r.status + (" (expected)" if r.id in report.xfails else "") + (" (may)" if r.tier == "may" else "")
        g = r.gap
        cells = () if g is None else (
            str(g.step), g.quantity, f"{g.error:.1e}", f"{g.tolerance:.1e}", f"{g.ratio:.1e}", f"{g.cosine:.6f}",
            f"{g.norm_ratio:.6f}",
        )  # fmt: skip
        made.add_row(status, r.id, *cells, style="red" if r.bad else None)
    return made
