"""The methods on a CUDA GPU: `python benchmarks/gpu.py`, in less than 8 minutes. Needs CuPy, PyTorch and JAX with CUDA.

The program writes ``benchmarks/results/<gpu>-<date>.json`` and the same as Markdown, after every measurement:

* bandwidth of a copy and rate of a float32 matrix product, measured;
* time of a step by device events (JAX, which has none: by the host's clock around many steps), with the share of it
  that the least possible bytes at that bandwidth and the flops at that rate account for (`precond_ref.cost`);
* kernels of a step without a refresh, for 100 and for 10 equal matrices, and the number of waits and reads of the host;
* residuals of batched eigendecompositions and inverses, by size;
* the constants c with which errors of float32 roots stay below c u kappa^(p + 1/2) and c u kappa.

``--dry-run`` runs all of it on the CPU with small sizes, NumPy in the place of CuPy, to show that the script runs.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or PyTorch's profiler announces itself
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # three libraries share the memory
RESULTS = Path(__file__).resolve().parent / "results"
METHODS = {
    "matrices": ("Adam", "AGD", "ASGO", "ASGO(every=10)", "Shampoo(every=10)", "IFShampoo", "RFShampoo", "MBF",
                 "SShampoo(size=33, solver='gram64')", "Muon"),
    "transformer": ("Adam", "AGD", "ASGO(every=10)", "IFShampoo", "SShampoo(size=33, every=10, solver='gram64')",
                    "Muon"),
    "convolutions": ("Adam", "AGD", "MBF", "IFShampoo"),
    "large": ("Adam", "AGD", "ASGO(every=10)", "SShampoo(size=257, every=10, solver='gram64')", "Muon"),
}  # fmt: skip
WAITS = re.compile(r"cuda(Device|Stream|Event)Synchronize|cudaMemcpy$")


def missing() -> list[str]:
    """Return the requirements that the machine lacks."""
    found = []
    for name, check in (
        ("torch", lambda m: m.cuda.is_available()),
        ("cupy", lambda m: m.is_available()),
        ("jax", lambda m: any(d.platform == "gpu" for d in m.devices())),
        ("optax", lambda m: True),
    ):
        try:
            if not check(importlib.import_module(name)):
                found.append(f"{name} is installed but finds no CUDA GPU")
        except (ImportError, OSError) as error:
            found.append(f"{name} cannot be imported: {error}")
        except RuntimeError as error:  # JAX without a driver for its plugin
            found.append(f"{name} finds no CUDA GPU: {error}")
    return found


# ---- libraries ------------------------------------------------------------------------------------------------------


class Library:
    """An array library on the device (dry: on the CPU), float32."""

    def __init__(self, name: str, dry: bool) -> None:
        self.name, self.dry = name, dry
        self.module = importlib.import_module({"cupy": "numpy"}.get(name, name) if dry else name)
        if name == "jax":
            self.module.config.update("jax_enable_x64", True)  # for gram64; all arrays are float32 by name
            self.module.config.update("jax_default_matmul_precision", "highest")  # else TF32, as for no other library
        self.xp = self._namespace()

    def _namespace(self) -> Any:
        from array_api_compat import array_namespace

        return array_namespace(self.array([0.0]))

    def array(self, values: Any, dtype: str = "float32") -> Any:
        """Return ``values`` on the device."""
        import numpy as np

        host = np.asarray(values, dtype)
        if self.name == "torch":
            return self.module.tensor(host, device="cpu" if self.dry else "cuda")
        return self.module.numpy.asarray(host) if self.name == "jax" else self.module.asarray(host)

    def host(self, array: Any) -> Any:
        """Return ``array`` as float64 NumPy."""
        import numpy as np

        if self.name == "torch":
            array = array.cpu()
        elif self.name == "cupy" and not self.dry:
            array = array.get()
        return np.asarray(array).astype("float64")

    def wait(self, result: Any) -> None:
        """Wait until ``result`` is computed and the device is idle."""
        if self.name == "jax":
            self.module.block_until_ready(result)
        elif self.name == "torch" and not self.dry:
            self.module.cuda.synchronize()
        elif not self.dry:
            self.module.cuda.Device().synchronize()

    def seconds(self, step: Callable[[], Any], rounds: int = 5, period: int = 1) -> float:
        """Return the median time of a step over whole periods, measured for about 0.2 s.

        Two steps and a period come before it. After eight seconds there is no new round.
        """
        begin = time.perf_counter()
        self._clock(step, 1)
        self._clock(step, 1)
        repeat = period * max(1, min(200, round(0.04 / max(period * self._clock(step, period), 1e-7))))
        values = [self._clock(step, repeat)]
        while len(values) < (rounds if repeat > period else 2) and time.perf_counter() - begin < 8:
            values.append(self._clock(step, repeat))
        return statistics.median(values)

    def _clock(self, step: Callable[[], Any], count: int) -> float:
        """Return the time of one of ``count`` steps."""
        start, stop, begin = self._event(), self._event(), time.perf_counter()
        if start is not None:
            start.record()
        for _ in range(count):
            result = step()
        if stop is not None:
            stop.record()
        self.wait(result)
        return (time.perf_counter() - begin if start is None else self._elapsed(start, stop)) / count

    def _event(self) -> Any:
        if self.dry or self.name == "jax":
            return None
        return self.module.cuda.Event(enable_timing=True) if self.name == "torch" else self.module.cuda.Event()

    def _elapsed(self, start: Any, stop: Any) -> float:
        if self.name == "torch":
            return float(start.elapsed_time(stop)) / 1e3
        return float(self.module.cuda.get_elapsed_time(start, stop)) / 1e3

    # ---- steps ------------------------------------------------------------------------------------------------------

    def step(self, method: str, shapes: dict[str, Any], variant: str = "") -> Any:
        """Return a function that does one step of ``method`` and returns an array to wait for; variants: PyTorch's."""
        import numpy as np

        from precond_ref import Optimizer
        from precond_ref.cost.report import SIZE
        from precond_ref.registry import parse

        made, rng = parse(method).made(size=SIZE), np.random.default_rng(0)

        def draw() -> dict[str, Any]:
            return {name: self.array(rng.standard_normal(shape)) for name, shape in shapes.items()}

        params, turn = draw(), itertools.cycle([draw(), draw()])
        if self.name == "torch":
            import precond_ref_torch

            own = {name: self.module.nn.Parameter(value) for name, value in params.items()}
            optimizer: Any
            if variant == "fused":
                optimizer = self.module.optim.Adam(own.values(), lr=1e-4, fused=True)
            else:
                options = {"compile": "eager" if self.dry else True} if variant == "compile" else {}
                options |= {"engine": variant} if variant == "cupy" else {}
                optimizer = precond_ref_torch.Optimizer(own.items(), made, lr=1e-4, **options)

            def torch_step() -> None:
                for name, grad in next(turn).items():
                    own[name].grad = grad
                optimizer.step()

            return torch_step
        if self.name == "jax":
            import optax

            import precond_ref_jax

            rule = optax.chain(precond_ref_jax.scale_by(made), optax.scale_by_learning_rate(1e-4))
            carried = [params, rule.init(params)]

            def update(params: Any, state: Any, grads: Any) -> Any:
                updates, state = rule.update(grads, state, params)
                return optax.apply_updates(params, updates), state

            jitted = self.module.jit(update, donate_argnums=(0, 1))

            def jax_step() -> Any:
                carried[:] = jitted(*carried, next(turn))
                return carried[0]

            return jax_step
        tree = Optimizer(made, lr=1e-4)
        held: list[Any] = [params, tree.init(params)]

        def step() -> None:
            held[:] = tree.step(held[0], next(turn), held[1])

        return step


# ---- what is measured -----------------------------------------------------------------------------------------------


def device_rates(torch: Library) -> dict[str, float]:
    """Return bytes per second of a copy, read and written, and flops per second of a float32 product (no TF32)."""
    n = 64 if torch.dry else 8192
    side = 64 if torch.dry else 8192
    source = torch.array([[1.0]]).expand(n, n).contiguous()
    target = source.clone()
    a, b = source[:side, :side].contiguous(), target[:side, :side].contiguous()
    copy = torch.seconds(lambda: target.copy_(source))
    product = torch.seconds(lambda: a @ b)
    return {"bandwidth": 8 * n * n / copy, "matmul_rate": 2 * side**3 / product}


def measured(row: dict[str, Any], over: Callable[[], bool], measure: Callable[..., Any], *of: Any) -> dict[str, Any]:
    """Return ``row`` with the result of ``measure(*of)``, or with the reason if there is none."""
    if over():
        return row | {"error": "left out: no time"}
    try:
        return row | measure(*of)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def steps(libraries: list[Library], rates: dict[str, float], dry: bool, over: Callable[[], bool]) -> Iterator[Any]:
    """Yield the time of a step of every method on every workload in every library, with its roofline.

    JAX is last, because its compilations take longer than all measurements.
    """
    from precond_ref.bench.workloads import shapes
    from precond_ref.cost import Device, estimate
    from precond_ref.cost.report import SIZE
    from precond_ref.registry import parse

    def measure(library: Library, method: str, found: Any, variant: str) -> dict[str, Any]:
        made = parse(method).made(size=SIZE)
        seconds = library.seconds(library.step(method, found, variant), period=made.every)
        cost = estimate(method, made, found, device=Device(**rates))
        return {
            "seconds": seconds,
            "bytes": cost.moved,
            "flops": cost.flops,
            "share_of_bandwidth": cost.moved / rates["bandwidth"] / seconds,
            "share_of_matmul_rate": cost.flops / rates["matmul_rate"] / seconds,
        }

    labels = {"": "", "cupy": " engine=cupy", "compile": " compile", "fused": ".optim.Adam fused"}
    for library, (workload, methods) in itertools.product(libraries, METHODS.items()):
        for method in methods:
            variants = [""]
            if library.name == "torch":
                variants += [] if dry else ["cupy"]
                variants += {"Adam": ["compile", "fused"], "AGD": ["compile"]}.get(method, [])
            for variant in variants:
                row = {"workload": workload, "method": method, "library": library.name + labels[variant]}
                yield measured(row, over, measure, library, method, shapes(workload, dry), variant)


def launches(libraries: list[Library], dry: bool, over: Callable[[], bool]) -> Iterator[Any]:
    """Yield the kernels of a step without a refresh, for 100 and 10 equal matrices, and waits and reads of the host."""
    from precond_ref.bench.workloads import matrices

    def measure(library: Library, method: str, count: int) -> dict[str, Any]:
        step = library.step(method, matrices(count, 4 if dry else 64))
        for _ in range(3):
            library.wait(step())
        _launched(library, tuple)  # the profiler's first run has calls of its own
        idle, busy = _launched(library, tuple), _launched(library, step)
        row = {name: busy[name] - idle[name] for name in busy}
        return row | {"synchronizations": max(row.pop("waits"), row.pop("reads"))}  # a read has both

    for library, method, count in itertools.product(libraries, ("AGD", "ASGO(every=1000)"), (100, 10)):
        row = {"library": library.name, "method": method, "matrices": count}
        yield measured(row, over, measure, library, method, count)


def _launched(library: Library, step: Callable[[], Any]) -> dict[str, int]:
    """Return the counts of PyTorch's profiler for a step and its end, with the kernels of all libraries."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([] if library.dry else [ProfilerActivity.CUDA])]
    with profile(activities=activities, acc_events=True) as recorded:
        library.wait(step())  # JAX launches from a thread of its own
    return census(recorded.events() or [])


def census(events: Iterable[Any]) -> dict[str, int]:
    """Return the numbers of kernels, copies, waits of the host and copies to it among the events of a profiler."""
    events = [e for e in events if not getattr(e, "is_user_annotation", False)]  # the step's name, on the device too
    on_device = [e.name for e in events if "CUDA" in str(e.device_type)]
    kernels = sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)
    return {
        "kernels": kernels,
        "copies": len(on_device) - kernels,
        "waits": sum(bool(WAITS.search(e.name)) for e in events),
        "reads": sum(name.startswith("Memcpy DtoH") for name in on_device),
    }


def residuals(libraries: list[Library], dry: bool, over: Callable[[], bool]) -> Iterator[Any]:
    """Yield the largest relative residual of a batch, and its time: eigh ||A Q - Q W||, inverse ||A X - I||."""
    import numpy as np

    def measure(library: Library, kind: str, a: Any) -> dict[str, Any]:
        array, function = library.array(a), getattr(library.xp.linalg, kind)
        seconds = library.seconds(partial(function, array), rounds=3)
        result, exact = function(array), a.astype("float64")
        scale = np.linalg.norm(exact, axis=(1, 2))
        if kind == "eigh":
            w, q = (library.host(x) for x in result)
            gap = exact @ q - q * w[:, None, :]
        else:
            x = library.host(result)
            gap, scale = exact @ x - np.eye(x.shape[-1]), scale * np.linalg.norm(x, axis=(1, 2))
        return {"seconds": seconds, "residual": float(np.max(np.linalg.norm(gap, axis=(1, 2)) / scale))}

    sizes = (
        ((16, 4), (4, 8)) if dry else ((1000, 9), (1000, 32), (500, 33), (500, 64), (500, 100), (24, 384), (4, 1024))
    )
    rng = np.random.default_rng(0)
    for count, n in sizes:
        factor = rng.standard_normal((count, n, n), dtype="float32")
        a = factor @ np.swapaxes(factor, 1, 2) / n + np.eye(n, dtype="float32")
        for library, kind in itertools.product(libraries, ("eigh", "inv")):
            row = {"library": library.name, "kind": kind, "count": count, "size": n}
            yield measured(row, over, measure, library, kind, a)


def constants(libraries: list[Library], dry: bool, over: Callable[[], bool]) -> Iterator[Any]:
    """Yield errors of float32 roots A^-p against float64 on the host, as multiples of u kappa^(p + 1/2) and of u kappa.

    A = Q diag(w) Q^T with w log-uniform from 1 / kappa to 1, rounded to float32 before the truth is taken; the
    condition numbers are those of A. The largest multiple over sizes, exponents and condition numbers is the constant.
    """
    import numpy as np

    from precond_ref.numerics import roots

    u = 2.0**-24
    sizes, count = ((3, 5), 2) if dry else ((4, 16, 64, 128), 8)

    def measure(library: Library, p: float) -> dict[str, Any]:
        rng, found = np.random.default_rng(1), []
        for n, kappa in itertools.product(sizes, (1e1, 1e2, 1e3)):
            q, _ = np.linalg.qr(rng.standard_normal((count, n, n)))
            w = kappa ** -np.linspace(0, 1, n)
            a = ((q * w) @ np.swapaxes(q, 1, 2)).astype("float32")
            a = (a + np.swapaxes(a, 1, 2)) / 2
            values, vectors = np.linalg.eigh(a.astype("float64"))
            truth = (vectors * values[:, None, :] ** -p) @ np.swapaxes(vectors, 1, 2)
            got = library.host(roots.power(library.array(a), -p, 0.0, xp=library.xp))
            error = np.linalg.norm(got - truth, axis=(1, 2)) / np.linalg.norm(truth, axis=(1, 2))
            true_kappa = values[:, -1] / values[:, 0]
            found.append((np.max(error / (u * true_kappa ** (p + 0.5))), np.max(error / (u * true_kappa))))
        fresh, stale = np.max(found, axis=0)  # NaN if one of them is NaN
        return {"u kappa^(p + 1/2)": float(fresh), "u kappa": float(stale)}

    for library, p in itertools.product(libraries, (0.25, 0.5, 1.0)):
        yield measured({"library": library.name, "p": p}, over, measure, library, p)


# ---- output ---------------------------------------------------------------------------------------------------------


def jsonable(value: Any) -> Any:
    """Return ``value`` with names in the place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: jsonable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [jsonable(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def markdown(content: dict[str, Any]) -> str:
    """Return the tables for the documentation."""

    def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> list[str]:
        lines = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
        for row in rows:
            cells = [row.get(key, "") for key in columns]
            texts = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
            if "error" in row:
                texts[-1] = row["error"]
            lines.append("| " + " | ".join(texts) + " |")
        return [*lines, ""]

    content = {name: [] for name in ("steps", "launches", "residuals", "constants")} | content
    rates, software = content["rates"], ", ".join(f"{k} {v}" for k, v in content["versions"].items())
    lines = ["Dry run: small sizes on a CPU, NumPy in the place of CuPy. The times say nothing.", ""] * content[
        "dry_run"
    ]
    lines += [
        f"{content['device']}, {content['date']}, {software}: copy {rates['bandwidth'] / 1e9:.0f} GB/s, "
        f"float32 product {rates['matmul_rate'] / 1e12:.2f} Tflop/s.",
        "",
    ]
    shown = [{**row, "ms": 1e3 * row["seconds"]} if "seconds" in row else row for row in content["steps"]]
    lines += table(shown, {"workload": "workload", "method": "method", "library": "library", "ms": "ms a step",
                           "share_of_bandwidth": "of bandwidth", "share_of_matmul_rate": "of matmul rate"})  # fmt: skip
    lines += table(content["launches"], {"library": "library", "method": "method", "matrices": "matrices",
                                         "kernels": "kernels", "copies": "copies",
                                         "synchronizations": "synchronizations"})  # fmt: skip
    shown = [{**row, "ms": 1e3 * row["seconds"]} if "seconds" in row else row for row in content["residuals"]]
    lines += table(shown, {"library": "library", "kind": "kind", "count": "batch", "size": "size", "ms": "ms",
                           "residual": "residual"})  # fmt: skip
    columns = {"library": "library", "p": "p", "u kappa^(p + 1/2)": "c, fresh", "u kappa": "c, stale or bare"}
    return "\n".join(lines + table(content["constants"], columns))


def main(given: list[str] | None = None) -> int:
    """Run everything; return 0, or 1 if a requirement is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in small")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=7.0, help="no new measurement after this long")
    arguments = parser.parse_args(given)
    begin, dry = time.monotonic(), arguments.dry_run
    if not dry and (lacks := missing()):
        print("this machine cannot run the GPU benchmarks:", *lacks, sep="\n  ", file=sys.stderr)
        print("`--dry-run` tries the script on the CPU", file=sys.stderr)
        return 1
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output must be a folder or a name for one: {error}")
    import torch

    import precond_ref

    torch.backends.cuda.matmul.allow_tf32 = False

    def over(share: float = 1.0) -> bool:
        return time.monotonic() - begin > 60 * arguments.minutes * share

    libraries = [Library(name, dry) for name in ("torch", "cupy", "jax")]
    device = "cpu" if dry else torch.cuda.get_device_name()
    content: dict[str, Any] = {
        "device": device,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {m.__name__: m.__version__ for m in (precond_ref, *(library.module for library in libraries))},
        "dry_run": dry,
    }

    stem = arguments.output / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{content['date']}"

    def save() -> None:
        content["seconds"] = time.monotonic() - begin
        text = json.dumps(jsonable(content), indent=1, allow_nan=False) + "\n"
        stem.with_name(f"{stem.name}.json").write_text(text, encoding="utf-8")
        stem.with_name(f"{stem.name}.md").write_text(markdown(content), encoding="utf-8")

    def section(name: str, rows: Iterator[Any]) -> None:
        start = time.monotonic()
        content[name] = []
        for row in rows:
            content[name].append(row)
            save()
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)

    content["rates"] = device_rates(libraries[0])
    section("constants", constants(libraries, dry, lambda: over(0.2)))
    section("residuals", residuals(libraries, dry, lambda: over(0.35)))
    section("launches", launches(libraries, dry, lambda: over(0.45)))
    section("steps", steps(libraries, content["rates"], dry, over))
    order = [(workload, method) for workload, methods in METHODS.items() for method in methods]
    content["steps"].sort(key=lambda row: order.index((row["workload"], row["method"])))
    save()
    print(f"{stem}.json and .md, {content['seconds']:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
