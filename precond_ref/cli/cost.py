"""``precond-ref cost``: what the methods need. The command imports heavy libraries only when it runs."""

from __future__ import annotations

import json as json_module
import math
from pathlib import Path
from typing import Annotated

import typer

from precond_ref.cli.terminal import EXTRA, check_files, fail, standard_output
from precond_ref.cost.shapes import PRESETS

EXAMPLES = """\b
Examples:
  precond-ref cost --preset gpt2
  precond-ref cost --preset llama-70b --method ASGO --method "SShampoo(size=256, every=10)" --mesh 64 --dtype bfloat16
  precond-ref cost --shapes model.safetensors --output cost.svg
  precond-ref cost --shapes shapes.json --json | python -m json.tool

\b
How to read the table:
  A method with 8 bytes of state per parameter needs as much memory as Adam in float32.
  The floor is the least time of the memory bus and the matrix units. If the floor of a method is far above the floor of
  Adam, renew its roots less often (every=10) or give it smaller matrices.
  `sent` is the communication that --mesh adds to data parallelism: one device must hold each whole matrix.
"""
DEFAULT = ("Adam", "AGD", "ASGO", "DASGO", "SShampoo", "RFRMSProp", "RFShampoo", "IFShampoo", "MBF", "Shampoo", "Muon")


def cost_command(
    preset: Annotated[
        str | None, typer.Option(metavar="|".join(PRESETS), help="The parameters of a well-known model.")
    ] = None,
    shapes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='JSON {"name": [sizes], ...}, or .safetensors (only names and shapes are read).',
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name of `precond-ref list`, or your own method; fields may follow in brackets: "
            '"SShampoo(size=64, every=10)", "my_module:Mine(beta2=0.9)"; repeatable.  '
            "[default: most of them, size=256]",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Dtype of the parameters: float64, float32, bfloat16, float16; states are float32 at least.",
        ),
    ] = "float32",
    mesh: Annotated[
        str, typer.Option(metavar="N|RxN", help="Share the work among N devices, or R replicas of N devices each.")
    ] = "1",
    bandwidth: Annotated[float, typer.Option(metavar="GB/S", help="Memory bandwidth of a device.")] = 2039.0,
    matmul_rate: Annotated[
        float, typer.Option(metavar="TFLOP/S", help="Rate of matrix products, in the dtype of the arithmetic.")
    ] = 19.5,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable, on standard output; no table.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the figure; .png, .svg, .pdf, ...")] = None,
) -> None:
    """Count what each method needs on a model; nothing is run.

    The command counts memory, arithmetic and communication. Bytes of state are exact. Flops are those of matrix
    products and factorizations, bytes moved are the least possible, and work done every k steps counts 1/k. The floor
    is the shortest possible time of a step on a device of the given bandwidth and rate. Their defaults are those of an
    A100 (80 GB) in float32.
    """
    from precond_ref.cost import Device, estimate
    from precond_ref.cost.shapes import read
    from precond_ref.registry import parse

    if (preset is None) == (shapes is None):
        fail("give one of --preset and --shapes")
    if preset is not None and preset not in PRESETS:
        fail(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    for option, rate in (("--bandwidth", bandwidth), ("--matmul-rate", matmul_rate)):
        if not 0 < rate < math.inf:
            fail(f"{option} must be finite and > 0, got {rate}")
    check_files(output)
    try:
        from precond_ref.compare.report import check_output
        from precond_ref.cost import report

        console = standard_output()
        if output is not None:
            check_output(output)

        found = read(shapes) if shapes is not None else PRESETS[preset or ""]()
        sides = tuple(int(side) if side.isdecimal() else 0 for side in mesh.split("x"))
        device = Device(bandwidth * 1e9, matmul_rate * 1e12)
        estimates = [
            estimate(name, parse(name).made(size=report.SIZE), found, dtype=dtype, mesh=sides, device=device)
            for name in method or DEFAULT
        ]
        source = preset or str(shapes)
        if output is not None:
            report.figure(source, estimates).savefig(output, dpi=120)
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed: {EXTRA}")
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    if json:
        typer.echo(json_module.dumps(report.as_json(source, estimates), indent=1))
        return
    console.print(report.heading(source, estimates))
    console.print()
    console.print(report.table(estimates))
    console.print()
    for line in report.notes(estimates):
        console.print(line)
    if estimates[0].mesh:
        console.print(f"\nOn {mesh.replace('x', ' x ')} devices:\n")
        console.print(report.mesh_table(estimates))
        console.print()
        for line in report.mesh_notes(estimates):
            console.print(line)
    if output is not None:
        console.print(f"figure: {output}")
