"""Online logistic regression on a9a: mean log-loss of one pass in file order, the best of a grid for every learner.

    PRECOND_REF_DATA=... python docs/experiments/a9a.py            # all, about eight minutes
    PRECOND_REF_DATA=... python docs/experiments/a9a.py --only sizes

The pass has an intercept, starts at zero, is not constrained, and runs in float64. Sketches have size 10. Grids: 49
learning rates from 1e-6 to 1 for the learners without an offset, 7 x 7 learning rates and offsets for the others.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import common
import numpy as np

import precond_ref as pr
from precond_ref.numerics import sketch as fd
from precond_ref.problems import online

SIZE = 10
FINE = 10.0 ** np.linspace(-6, 0, 49)
COARSE = 10.0 ** np.linspace(-6, 0, 7)
EXPECTED = {
    "AdaGrad": 0.33225,
    "S-AdaGrad": 0.33255,
    "RFD-SON": 0.33450,
    "OGD": 0.33458,
    "Ada-FD": 0.35410,
    "FD-SON": 0.53912,
}
"""Results of an independent implementation, without rates below 1e-3."""


@dataclass(frozen=True)
class Learner:
    """A method with its grid.

    A ``unit`` learner scales the gradient by 1 / sqrt(lr) and the step by sqrt(lr). This makes `FDSON` and `RFDSON` at
    any ``learning_rate`` from one method with ``learning_rate=1``, so that all rates of a grid run as one stack.
    """

    make: Callable[[float], Any]
    rates: np.ndarray
    deltas: tuple[float, ...] = (0.0,)
    unit: bool = False
    power: float = 0.0
    """The rate falls as t^-power."""


LEARNERS = {
    "AdaGrad": Learner(lambda delta: pr.AdaGrad(eps=0.0, initial=delta), FINE),
    "S-AdaGrad": Learner(lambda delta: pr.SAdaGrad(size=SIZE, delta=delta), FINE),
    "RFD-SON": Learner(lambda delta: pr.RFDSON(size=SIZE, delta=delta, learning_rate=1.0), FINE, unit=True),
    "OGD": Learner(lambda delta: pr.SGD(), FINE, power=0.5),
    "Ada-FD": Learner(lambda delta: pr.AdaFD(size=SIZE, delta=delta), COARSE, tuple(COARSE)),
    "FD-SON": Learner(
        lambda delta: pr.FDSON(size=SIZE, delta=delta, learning_rate=1.0), COARSE, tuple(COARSE), unit=True
    ),
}


def one_pass(
    method: Any,
    features: np.ndarray,
    signs: np.ndarray,
    rates: np.ndarray,
    unit: bool = False,
    power: float = 0.0,
    on_rows: Callable[[int], Any] = lambda n: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean log-loss and the share of errors, one per learning rate; inf if the pass diverged."""
    x = np.zeros((len(rates), features.shape[1]))
    state = method.init(x, stack_ndim=1)
    loss, errors = np.zeros(len(rates)), np.zeros(len(rates))
    into, out = (rates**-0.5, rates**0.5) if unit else (np.ones_like(rates), rates)
    with np.errstate(all="ignore"):
        for t, (a, y) in enumerate(zip(features, signs, strict=True)):
            margin = y * (x @ a)
            loss += np.logaddexp(0.0, -margin)
            errors += margin <= 0
            slope = -y * np.exp(-np.logaddexp(0.0, margin))
            direction, state = method.update((slope * into)[:, None] * a, state, x)
            x = x - (out * (t + 1.0) ** -power)[:, None] * direction
            if (t + 1) % 500 == 0:
                on_rows(500)
    return np.where(np.isfinite(loss), loss, np.inf) / len(signs), errors / len(signs)


def grids(features: np.ndarray, signs: np.ndarray) -> dict[str, Any]:
    """Return the best point of each learner's grid."""
    results = {}
    total = sum(len(each.deltas) for each in LEARNERS.values()) * len(signs)
    with common.progress() as bar:
        task = bar.add_task("grids", total=total)
        for name, learner in LEARNERS.items():
            bar.update(task, description=name)
            found = []
            for delta in learner.deltas:
                losses, errors = one_pass(
                    learner.make(delta), features, signs, learner.rates, learner.unit, learner.power,
                    lambda n: bar.advance(task, n),
                )  # fmt: skip
                found += [
                    (float(loss), float(error), float(lr), delta)
                    for loss, error, lr in zip(losses, errors, learner.rates, strict=True)
                ]
            loss, error, lr, delta = min(found)
            results[name] = {
                "loss": loss, "errors": error, "lr": lr, "delta": delta,
                "grid": [[None if not np.isfinite(v) else v for v in each] for each in found],
            }  # fmt: skip
    return results


@contextlib.contextmanager
def without_rank_decision() -> Iterator[None]:
    """Patch Frequent Directions so that rounding counts as mass: s_i > 0 and e + rho > 0 are the only tests."""
    source = inspect.getsource(fd)
    for old, new in (
        ("xp.where(kept, s, 0.0)", "s"),
        ("** 2 * largest", "** 2 * 0.0"),
        ("> roots.CERTAIN * u * top", "> -1.0"),
    ):
        if source.count(old) != 1:
            raise RuntimeError(f"{old!r} must occur once in {fd.__name__}")
        source = source.replace(old, new)
    loose = ModuleType("loose")
    exec(compile(source, "loose", "exec"), loose.__dict__)
    kept = fd.update, fd.apply_power

    def update(sketch: Any, *args: Any, **kwargs: Any) -> Any:
        return fd.Sketch(*loose.update(loose.Sketch(*sketch), *args, **kwargs))

    fd.update, fd.apply_power = update, loose.apply_power
    try:
        yield
    finally:
        fd.update, fd.apply_power = kept


def rank_decision(features: np.ndarray, signs: np.ndarray, best: dict[str, Any]) -> dict[str, Any]:
    """Run the learners with a pseudo-inverse at their best settings, with and without the rank decision."""
    results = {}
    for name in ("S-AdaGrad", "RFD-SON"):
        learner, lr = LEARNERS[name], np.array([best[name]["lr"]])
        with without_rank_decision():
            losses, _ = one_pass(learner.make(0.0), features, signs, lr, learner.unit)
        results[name] = {"with": best[name]["loss"], "without": float(losses[0])}
    return {**results, "S-AdaGrad, stream of rank 3 in 6 dimensions (error of the step)": low_rank_stream()}


def low_rank_stream() -> dict[str, float]:
    """Return the largest distance of S-AdaGrad of size 4 to the full-matrix direction: rank 3 in six dimensions."""
    rng = np.random.default_rng(0)
    span = np.linalg.qr(rng.standard_normal((6, 3)))[0]
    grads = rng.standard_normal((200, 3)) @ span.T

    def directions(method: Any) -> np.ndarray:
        state, out = method.init(grads[0]), []
        for g in grads:
            direction, state = method.update(g, state, g)
            out.append(direction)
        return np.array(out)

    exact = directions(pr.FullAdaGrad(eps=0.0))
    sketched = pr.SAdaGrad(size=4)
    kept = directions(sketched)
    with without_rank_decision():
        loose = directions(sketched)
    return {name: float(np.max(abs(each - exact))) for name, each in (("with", kept), ("without", loose))}


def sizes(features: np.ndarray, signs: np.ndarray) -> dict[str, Any]:
    """Run S-AdaGrad on the first 4000 rows by size, at the best of 25 rates from 1e-3 and at the rate 0.1."""
    features, signs, rates = features[:4000], signs[:4000], FINE[24:]
    methods: dict[str, Any] = {str(size): pr.SAdaGrad(size=size) for size in (1, 2, 3, 5, 10, 20, 40)}
    methods["diagonal AdaGrad"], methods["OGD"] = pr.AdaGrad(eps=0.0), pr.SGD()
    few = {"full matrix": (pr.FullAdaGrad(eps=0.0), np.array([10**-1.25, 10**-1.0, 10**-0.75, 10**-0.5]))}
    results = {}
    with common.progress() as bar:
        task = bar.add_task("sizes", total=4000 * (len(methods) + 1))
        for name, (method, grid) in ({k: (m, rates) for k, m in methods.items()} | few).items():
            bar.update(task, description=f"size {name}")
            losses, _ = one_pass(
                method, features, signs, grid, power=0.5 * (name == "OGD"), on_rows=lambda n: bar.advance(task, n)
            )
            k = int(np.argmin(losses))
            at_tenth = int(np.argmin(abs(grid - 0.1)))
            results[name] = {
                "loss": float(losses[k]), "lr": float(grid[k]), "at 0.1": float(losses[at_tenth]),
            }  # fmt: skip
    return results


def speed(features: np.ndarray, signs: np.ndarray, rounds: int = 4000, repeats: int = 5) -> dict[str, Any]:
    """Return the microseconds of a round with each method, through ``method.update``: the least of the repeats."""
    methods = {
        "AdaGrad": (pr.AdaGrad(eps=0.0), best_rate("AdaGrad")),
        "S-AdaGrad, svd": (pr.SAdaGrad(size=SIZE), best_rate("S-AdaGrad")),
        "S-AdaGrad, gram64": (pr.SAdaGrad(size=SIZE, solver="gram64"), best_rate("S-AdaGrad")),
    }
    features, signs = features[:rounds], signs[:rounds]
    results = {name: {"round": np.inf, "update": np.inf} for name in methods}
    for _ in range(repeats):
        for name, (method, lr) in methods.items():
            x = np.zeros(features.shape[1])
            state = method.init(x)
            inside, start = 0.0, time.perf_counter()
            for a, y in zip(features, signs, strict=True):
                margin = y * (a @ x)
                g = -y * np.exp(-np.logaddexp(0.0, margin)) * a
                before = time.perf_counter()
                direction, state = method.update(g, state, x)
                inside += time.perf_counter() - before
                x = x - lr * direction
            whole = time.perf_counter() - start
            results[name]["round"] = min(results[name]["round"], 1e6 * whole / rounds)
            results[name]["update"] = min(results[name]["update"], 1e6 * inside / rounds)
    return results


def best_rate(name: str) -> float:
    """Return the best rate that `grids` finds."""
    return {"AdaGrad": 10**-0.875, "S-AdaGrad": 10**-0.375}[name]


def figure(results: dict[str, Any], by_size: dict[str, Any]) -> Any:
    """Draw the loss against the learning rate, and against the sketch size."""
    drawing, (left, right) = common.axes(10, 4, 2, width_ratios=(1.3, 1))
    ends = []
    for colour, (name, each) in zip(common.COLOURS, results.items(), strict=False):
        rates = sorted({point[2] for point in each["grid"]})
        least = [min((p[0] for p in each["grid"] if p[2] == lr and p[0] is not None), default=np.inf) for lr in rates]
        left.plot(rates, least, color=colour, linewidth=1.8)
        left.plot(each["lr"], each["loss"], "o", color=colour, markersize=5)
        ends.append((each["loss"], name, colour))
    for rank, (loss, name, colour) in enumerate(sorted(ends)):
        left.text(
            0.02, 0.05 + 0.075 * (len(ends) - 1 - rank), f"{loss:.5f}  {name}", color=colour, transform=left.transAxes
        )
    left.set(
        xscale="log", xlabel="learning rate (best offset)", ylabel="mean log-loss", xlim=(1e-6, 1), ylim=(0.325, 0.75)
    )
    left.set_title("a9a, one pass (dot: best)", loc="left")
    numbers = [name for name in by_size if name.isdigit()]
    for colour, key, label in (("#0072B2", "loss", "best rate"), ("#D55E00", "at 0.1", "rate 0.1")):
        right.plot([int(n) for n in numbers], [by_size[n][key] for n in numbers], "o-", color=colour)
        right.text(1.2, by_size["1"][key] + 0.001, label, color=colour, va="bottom")
        right.axhline(by_size["full matrix"][key], color=colour, linestyle=":", linewidth=1.2)
    right.text(
        40, by_size["full matrix"]["loss"] - 0.003, "full matrix (dotted)", color="#444444", ha="right", va="top"
    )
    right.set(xscale="log", xlabel="sketch size", xticks=[int(n) for n in numbers], xticklabels=numbers)
    right.minorticks_off()
    right.set_title("S-AdaGrad, first 4000 rows", loc="left")
    low, high = right.get_ylim()
    right.set_ylim(low - 0.006, high + 0.004)
    return drawing


def report(folder: Path, data: dict[str, Any]) -> None:
    """Write tables and figure."""
    results, by_size = data["grids"], data["sizes"]

    def edge(r: dict[str, Any], grid: np.ndarray) -> str:
        return f"{r['lr']:.4g}{' (edge)' if np.isclose(r['lr'], grid[[0, -1]]).any() else ''}"

    def worse(r: dict[str, Any]) -> str:
        count = sum(point[0] is None or point[0] > np.log(2) for point in r["grid"])
        return f"{count} of {len(r['grid'])}"

    text = common.table(
        ("learner", "log-loss", "0-1 loss", "learning rate", "offset", "points worse than x = 0", "independent run"),
        (
            (
                name, f"{r['loss']:.5f}", f"{r['errors']:.4f}", edge(r, LEARNERS[name].rates),
                f"{r['delta']:.4g} (edge)" if r["delta"] else "-", worse(r), f"{EXPECTED[name]:.5f}",
            )
            for name, r in sorted(results.items(), key=lambda item: item[1]["loss"])
        ),
    )  # fmt: skip
    text += "\n" + common.table(
        ("best rate", "with the rank decision", "without"),
        (
            (name, *(f"{r[key]:.5f}" if 1e-3 < r[key] < 10 else f"{r[key]:.1e}" for key in ("with", "without")))
            for name, r in data["rank decision"].items()
        ),
    )
    text += "\n" + common.table(
        ("S-AdaGrad, first 4000 rows: size", "best log-loss", "its rate", "at rate 0.1"),
        ((name, f"{r['loss']:.4f}", edge(r, FINE), f"{r['at 0.1']:.4f}") for name, r in by_size.items()),
    )
    common.save(folder, "a9a", tables=text, data=data, figure=figure(results, by_size))
    worst = max(abs(results[name]["loss"] - value) for name, value in EXPECTED.items())
    print(f"largest distance to the independent run: {worst:.1e}")


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--only", choices=("grids", "sizes", "speed"), help="one part, printed and not written")
    parser.add_argument("--draw", action="store_true", help="tables and figure from a9a.json, without a run")
    options = parser.parse_args()
    if options.draw:
        report(options.output, json.loads((options.output / "a9a.json").read_text(encoding="utf-8")))
        return
    features, signs = online.libsvm("a9a")
    if options.only:
        part = {"grids": grids, "sizes": sizes, "speed": speed}[options.only](features, signs)
        print({name: {k: v for k, v in each.items() if k != "grid"} for name, each in part.items()})
        return
    found = grids(features, signs)
    off = rank_decision(features, signs, found)
    report(options.output, {"grids": found, "rank decision": off, "sizes": sizes(features, signs)})


if __name__ == "__main__":
    main()
