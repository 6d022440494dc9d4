"""The races of each suite."""

from __future__ import annotations

import math
import statistics

from precond_ref.bench.contenders import ELEMENTWISE
from precond_ref.bench.harness import Race, Result, Sweep
from precond_ref.bench.workloads import matrices

ROOTS_OF = (
    "eigh alone",
    "power -1/2",
    "power -1/2 in float64",
    "Newton-Schulz, 10 steps",
    "Polar Express, 10 steps",
    "coupled Newton, 10 steps",
)

STEPS = (
    Race("AGD, torch", "matrices",
        ("torch AdamW foreach", "torch Adam fused", "AGD", "AGD, by hand", "AGD, compile", "atorch AGD")),
    Race("AGD, torch", "transformer",
        ("torch AdamW foreach", "torch Adam fused", "AGD", "AGD, by hand", "AGD, compile", "atorch AGD")),
    Race("AGD, torch", "large",
        ("torch AdamW foreach", "torch Adam fused", "AGD", "AGD, by hand", "AGD, compile", "atorch AGD")),
    Race("AGD, torch", "tiny", ("torch AdamW foreach", "torch Adam fused", "AGD", "AGD, compile", "atorch AGD")),
    *(Race("elementwise, compiled", workload,
        ("torch Adam fused", "AGD, compile", *(f"{name}, compile" for name in ELEMENTWISE)))
        for workload in ("matrices", "transformer", "large")),
    *(Race("elementwise, JAX", workload, ("optax.adam", "agd", *ELEMENTWISE.values()))
        for workload in ("matrices", "transformer", "large")),
    Race("matrix methods in JAX", "matrices", ("optax.adam", "asgo", "shampoo", "if_shampoo", "mbf")),
    Race("matrix methods in JAX", "convolutions", ("optax.adam", "mbf")),
    Race("ASGO, torch", "transformer",
        ("ASGO", "ASGO, by hand", "ASGO, bare", "pytorch_optimizer ScalableShampoo, one side")),
    Race("ASGO, torch", "matrices",
        ("ASGO", "ASGO, by hand", "ASGO, bare", "pytorch_optimizer ScalableShampoo, one side")),
    Race("ASGO, torch", "large", ("ASGO", "ASGO, by hand", "ASGO, bare")),
    *(Race("Shampoo, torch", workload, ("Shampoo", "Shampoo, by hand", "Shampoo, bare", "pytorch_optimizer Shampoo"))
        for workload in ("matrices", "transformer")),
    *(Race("SOAP, torch", workload, ("SOAP", "SOAP, by hand", "SOAP, bare", "pytorch_optimizer SOAP", "heavyball SOAP"),
        dict.fromkeys(("SOAP", "SOAP, by hand", "SOAP, bare", "pytorch_optimizer SOAP", "heavyball SOAP"),
        10)) for workload in ("matrices", "transformer")),
    Race("SOAP, torch, every step", "matrices",
        ("SOAP, every step", "SOAP, bare, every step", "pytorch_optimizer SOAP, every step")),
    *(Race("KL-Shampoo, torch", workload, ("KLShampoo", "heavyball KLShampoo"),
        dict.fromkeys(("KLShampoo", "heavyball KLShampoo"), 10)) for workload in ("matrices", "transformer")),
    *(Race("Muon, torch", workload, ("torch Muon", "Muon.torch", "Muon")) for workload in ("matrices", "transformer")),
    *(Race("Adafactor, torch", workload, ("torch Adafactor", "Adafactor.torch")) for workload in ("matrices",
        "transformer")),
    Race("IF-Shampoo, torch", "matrices", ("IFShampoo", "IFShampoo, by hand", "IFShampoo, bare", "sirfshampoo")),
    Race("IF-Shampoo, torch", "transformer", ("IFShampoo", "IFShampoo, by hand", "IFShampoo, bare", "sirfshampoo")),
    Race("S-Shampoo", "few", ("SShampoo", "SShampoo, gram64", "s_shampoo", "precondition_opt FD")),
    Race("S-Shampoo", "squares", ("SShampoo", "SShampoo, gram64", "s_shampoo", "precondition_opt FD")),
    *(Race(f"certified S-Shampoo of size {size}", workload, (f"SShampoo{part}", f"SShampoo{part}, nystrom",
        f"s_shampoo{part}", f"s_shampoo{part}, nystrom", f"SShampoo, NumPy{part}", f"SShampoo, NumPy{part}, nystrom",
        f"precondition_opt FD{part}")) for size, part in ((32, ""), (128, ", size 128")) for workload in ("squares",
        "square")),
    Race("S-Shampoo", "contraction", ("SShampoo", "SShampoo, gram64", "s_shampoo", "precondition_opt FD")),
    Race("S-Shampoo", "matrices", ("SShampoo", "SShampoo, gram64", "s_shampoo", "precondition_opt FD")),
    Race("training a ResNet-20", "convolutions",
        ("training with Adam", "training with MBF, authors_code('cnn')", "training with MBF"),
        {"training with MBF, authors_code('cnn')": 100}),
)  # fmt: skip

ROOTS = tuple(Race("roots", workload, ROOTS_OF) for workload in ("matrices", "transformer"))
SKETCH = (
    *(
        Race("sketch of rank 31", workload, ("svd alone", "sketch, svd", "sketch, gram64"))
        for workload in ("matrices", "large")
    ),
    *(
        Race(
            f"certified sketch of size {size}",
            workload,
            (f"sketch{part}, svd", f"sketch{part}, nystrom", f"sketch{part}, nystrom, bare"),
        )
        for size, part in ((32, ""), (128, ", size 128"))
        for workload in ("squares", "square")
    ),
)
RACES = {"steps": STEPS, "roots": ROOTS, "sketch": SKETCH}


def races_of(method: str, period: int) -> tuple[Race, ...]:
    """Return the races beside AdamW of any method, such as "mine:Fast(beta2=0.5)", with work due every ``period``."""
    return tuple(
        Race(method, workload, ("torch AdamW foreach", method), {method: period})
        for workload in ("matrices", "transformer")
    )


def sweeps(smoke: bool) -> list[Sweep]:
    """Return the sweeps of step times; the exponent of theory is that of the leading term in `precond_ref.cost`."""

    def sizes(full: tuple[int, ...], small: tuple[int, ...]) -> tuple[int, ...]:
        return small if smoke else full

    counts, of = sizes((1, 10, 100, 1000, 10000), (1, 2, 4)), 4 if smoke else 100
    tiny = sizes((50, 500, 5000), (2, 4, 8))
    sides = sizes((64, 128, 256, 512), (4, 6, 8))
    ranks = sizes((16, 32, 64, 128), (2, 3, 4))
    blocks = sizes((2**8, 2**10, 2**12), (2, 4, 8))
    periods = sizes((1, 2, 4, 8, 16), (1, 2, 4))
    d = 64 if smoke else 16384
    side = 8 if smoke else 256
    return [
        *(
            Sweep(
                f"{method}, {GROWTH}{of} x {of}",
                "parameters",
                1.0,
                {count * of**2: (method, matrices(count, of)) for count in counts},
            )
            for method in ("AGD", "ASGO", "SShampoo(size=16)", "MBF")
        ),
        Sweep("AGD, vectors of 16", "vectors", 1.0, {n: ("AGD", {f"w{i}": (16,) for i in range(n)}) for n in tiny}),
        Sweep("ASGO", "side of one square matrix", 3.0, {n: ("ASGO", {"w": (n, n)}) for n in sides}),
        Sweep(f"SAdaGrad on {d} entries", "sketch size", 2.0, {k: (f"SAdaGrad(size={k})", {"w": (d,)}) for k in ranks}),
        Sweep("MBF on 3 x 3 convolutions", "blocks", 1.0, {b: ("MBF", {"w": (b, 1, 3, 3)}) for b in blocks}),
        Sweep(
            f"Shampoo on {side} x {side}, above never",
            "refresh period",
            -1.0,
            {t: (f"Shampoo(every={t})", {"w": (side, side)}) for t in (*periods, NEVER)},
            base=NEVER,
        ),
    ]


GROWTH = "matrices of "
"""In the title of a sweep by parameters, from ten thousand to a hundred million: the first four."""
NEVER = 10**9
"""A refresh period that ends only after the measurement."""


def exponent(sweep: Sweep, results: dict[int, Result]) -> float | None:
    """Return the slope of log time over log x by least squares, after subtracting the time of ``sweep.base``.

    Points that take no longer than the base are left out; None if fewer than two are left.
    """
    off = statistics.median(results[sweep.base].seconds) if sweep.base is not None else 0.0
    points = [
        (math.log(x), math.log(seconds))
        for x, result in results.items()
        if x != sweep.base and (seconds := statistics.median(result.seconds) - off) > 0
    ]
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else None
