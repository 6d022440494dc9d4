"""``precond-ref regret``: a method on an online problem, its regret, and the bound of the theory."""

from __future__ import annotations

import json as json_module
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from precond_ref.cli.terminal import EXTRA, check_files, fail, own_method, progress, standard_output
from precond_ref.problems.online import ADVERSARIES

if TYPE_CHECKING:
    from precond_ref.protocol import Method

EXAMPLES = """\b
Examples:
  precond-ref regret
  precond-ref regret --adversary "least preconditioned" --dimension 8 --size 3 --rounds 2000
  precond-ref regret --data a9a --method SAdaGrad --lr 0.4217 --rounds 4000
  precond-ref regret --data a9a --method SGD --lr 1 --power 0.5 --radius 3
  precond-ref regret --method ASGO.theory --shape 4x3 --adversary polar --lr 1 --json game.json --output game.svg

\b
Adversaries:
""" + "\n".join(f"  {name:<21} {text}" for name, text in ADVERSARIES.items())


def regret_command(
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="A name of `precond-ref list`, or your own method; fields may follow in brackets: "
            '"AGD(delta=0.1)", "my_module:Mine(beta2=0.9)".',
        ),
    ] = "SAdaGrad",
    lr: Annotated[float, typer.Option("--lr", metavar="X", help="Learning rate.")] = 0.5,
    power: Annotated[float, typer.Option(metavar="P", help="The rate is lr t^-P.")] = 0.0,
    size: Annotated[int, typer.Option(metavar="N", help="Sketch size, for methods that have one.")] = 10,
    set: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Another field of the method; repeatable.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Logistic regression on a LIBSVM file, in file order, with an intercept. "
            "A name is searched in the folder PRECOND_REF_DATA, then in the current folder. "
            "There must be two labels; the larger counts as 1, the smaller as -1.",
        ),
    ] = None,
    adversary: Annotated[
        str | None, typer.Option(metavar="KIND", help="Linear losses: one adversary of those below.  [default: random]")
    ] = None,
    dimension: Annotated[
        int | None, typer.Option(metavar="N", help="Length of the adversary's vector.  [default: 20]")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="MxN", help="Shape of the adversary's matrix, instead of a vector.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(metavar="N", help="Number of rounds.  [default: 1000; with --data the whole file]")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of the adversary.  [default: 0]")] = None,
    radius: Annotated[
        float | None,
        typer.Option(
            metavar="R", help="Radius of the ball around 0 that has the comparator.  [default: 1; with --data no ball]"
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything, as JSON.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The figure; .png, .svg, .pdf, ...  [default: precond-ref-regret-METHOD.png]"
        ),
    ] = None,
) -> None:
    """Play a method against losses: its regret beside the bound.

    The comparator of the regret is the best fixed point. For the linear losses of an adversary it is the best point of
    a ball; for data it is the best point of the whole space (or of a ball), which SciPy finds. For SAdaGrad and
    SShampoo the escaped mass, its bound and the spectrum are shown too. Iterates are not projected; in the bounds D is
    the largest distance between an iterate and the comparator.
    """

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when NumPy is imported
    try:
        import numpy as np

        from precond_ref import regret
        from precond_ref.compare.report import check_output
        from precond_ref.problems import online
        from precond_ref.regret import report

        console = standard_output()
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed: {EXTRA}")
    try:
        made, name = _method(method, size, set or (), lr)
        output = output or Path(f"precond-ref-regret-{name.replace(':', '.')}.png")
        check_output(output)
        check_files(output, json)
        for option, value in (("--lr", lr), ("--radius", 1.0 if radius is None else radius)):
            if not 0 < value < math.inf:
                fail(f"{option} must be finite and > 0, got {value}")
        if not 0 <= power < math.inf:
            fail(f"--power must be finite and >= 0, got {power}")
        for option, number, least in (("--rounds", rounds, 1), ("--dimension", dimension, 1), ("--seed", seed, 0)):
            if number is not None and number < least:
                fail(f"{option} must be >= {least}, got {number}")
        if data is None:
            kind, seed = adversary or "random", seed or 0
            if kind not in ADVERSARIES:
                fail(f"--adversary must be one of {', '.join(ADVERSARIES)}, got {kind}")
            dims = (dimension or 20,) if shape is None else _shape(shape)
            stream = online.adversary(kind, dims, rounds=rounds or 1000, seed=seed)
            form = "a matrix of " + "x".join(map(str, dims)) if len(dims) > 1 else f"a vector of {dims[0]}"
            what = f"adversary {kind!r}, {form}, seed {seed}"
            comparator: Any = lambda run: regret.comparator_of_linear(run, 1.0 if radius is None else radius)  # noqa: E731
        else:
            given = {"--adversary": adversary, "--dimension": dimension, "--shape": shape, "--seed": seed}
            if ours := [option for option, value in given.items() if value is not None]:
                fail(f"{', '.join(ours)} would be of an adversary, and the losses are those of --data {data}")
            features, signs = online.libsvm(data)
            if rounds is not None and rounds > len(signs):
                fail(f"--rounds must be at most {len(signs)}, the lines of {data}, got {rounds}")
            features, signs = features[:rounds], signs[:rounds]
            stream = online.linear_model("logistic", features, signs)
            what = f"logistic regression on {data}, {features.shape[1]} coordinates"
            comparator = lambda run: regret.comparator_of_logistic(features, signs, radius)  # noqa: E731
        low, high = made.ndims
        if not (low <= len(stream.shape) <= high or made.elementwise):
            hint = "give --shape" if len(stream.shape) == 1 else "leave out --shape"
            fail(f"{name} does not take a parameter of shape {stream.shape}" + (f"; {hint}" if data is None else ""))
        rates = lr * np.arange(1.0, stream.rounds + 1) ** -power
        count = f"{stream.rounds} round{'s' * (stream.rounds > 1)}"
        title = f"{made} on {what}, {count}, rate {lr:g}" + (f" t^-{power:g}" if power else "")
        console.print(title, end="\n\n")
        with progress() as bar:
            task = bar.add_task(name, total=stream.rounds, loss="")

            def on_round(t: int) -> None:
                if t % 50 == 49 or t + 1 == stream.rounds:
                    bar.update(task, completed=t + 1, loss="" if t + 1 < stream.rounds else "comparator and bound")

            try:
                # a diverged run says so itself
                with np.errstate(over="ignore", invalid="ignore", divide="ignore"), own_method(lambda: name):
                    game = regret.play(made, stream, rates, comparator, on_round=on_round)
            except KeyboardInterrupt:
                typer.echo("interrupted", err=True)
                raise typer.Exit(130) from None
        sound = np.isfinite(game.run.points).reshape(len(game.run.points), -1).all(axis=1)
        if not sound.all():
            fail(f"the run diverged in round {int(np.argmin(sound))}; try a smaller --lr")
        console.print(report.table(game), end="\n\n")
        for line in report.notes(game):
            console.print(line)
        report.figure(game, title).savefig(output, dpi=120)
        console.print(f"figure: {output}")
        if json is not None:
            settings = {"method": repr(made), "problem": what, "lr": lr, "power": power, "seed": seed}
            json.write_text(json_module.dumps(report.as_json(game, settings), allow_nan=False) + "\n", encoding="utf-8")
            console.print(f"JSON: {json}")
    except (OSError, ValueError, TypeError, ImportError) as error:
        fail(error)


def _method(text: str, size: int, fields: Any, lr: float) -> tuple[Method, str]:
    """Return the method that the options describe, and its name."""
    from precond_ref.compare import UsageError
    from precond_ref.registry import arguments, parse

    if "," in text.partition("(")[0]:
        raise UsageError(f"--method takes one method, got {text}")
    named = parse(text)
    known = arguments(named.make)
    chosen = {name: value for name, value in (("size", size), ("learning_rate", lr)) if name in known}
    chosen |= named.fields
    for entry in fields:
        field, equals, value = entry.partition("=")
        if not equals or field not in known:
            raise UsageError(f"--set takes FIELD=VALUE with one of {', '.join(known)}, got {entry}")
        try:
            chosen[field] = json_module.loads(value)
        except ValueError:
            chosen[field] = value
    return named._replace(fields=chosen).made(), named.name


def _shape(text: str) -> tuple[int, ...]:
    """Return the two ints of ``"MxN"``."""
    from precond_ref.compare import UsageError

    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--shape takes MxN, such as 4x3, got {text}")
    return int(parts[0]), int(parts[1])
