"""Compare the library with its second implementation, both with 50 digits: a difference is a formula, not rounding.

    python tools/exact.py                                        # 1000 configurations; about a minute
    python tools/exact.py --configurations 10000 --seed 1
    python tools/exact.py --method ASGO --configurations 200
    python tools/exact.py --first 1234 --configurations 1        # number 1234 of seed 0 again

Each configuration is a method or preset with random fields, shape, gradients, learning rate and decay, for a few
updates. The library's own source (`exact_core`) and `precond_ref.conformance.variants` must give the same directions,
parameters and states, to 1e-40 of their norms. If they differ, a configuration as simple as possible is printed, and
the exit code is 1. The command needs `pip install "precond-ref[vectors]"`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import operator
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import mpmath as mp
import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from exact_core import Array, load  # noqa: E402

from precond_ref.cli.terminal import progress  # noqa: E402
from precond_ref.conformance import arithmetic, variants  # noqa: E402
from precond_ref.conformance.arithmetic import DIGITS, exact, number  # noqa: E402
from precond_ref.registry import constructors  # noqa: E402

TOLERANCE = 1e-40
INFINITE = "an infinite result"
METHODS = list(constructors())
"""All methods and presets by name."""

# ---- configurations -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """The arguments of both implementations. Numbers are floats, of which both get the exact values."""

    constructor: str
    config: Mapping[str, Any]
    shape: tuple[int, ...]
    param: np.ndarray = field(repr=False)
    grads: np.ndarray = field(repr=False)
    lr: float = 0.5
    decay: float = 0.0
    stack_ndim: int = 0
    as_arrays: bool = False
    """True if the library gets its real fields as 0-D arrays."""

    def __str__(self) -> str:
        config = ", ".join(f"{name}={value!r}" for name, value in self.config.items())
        return (
            f"{self.constructor}({config})\n  stack_ndim={self.stack_ndim}, lr={self.lr!r}, decay={self.decay!r}"
            f"{', real fields as 0-D arrays' * self.as_arrays}\n"
            f"  param = {self.param.tolist()}\n  grads = {self.grads.tolist()}"
        )


def _decay(r: random.Random) -> float:
    return r.choice([0.0, r.random(), r.random(), 1 - 10 ** r.uniform(-3, -1)])


def _small(r: random.Random) -> float:
    return 0.0 if r.random() < 0.2 else 10 ** r.uniform(-3, 0)


def _one_of(*values: Any) -> Callable[[random.Random], Any]:
    return lambda r: r.choice(values)


def _up_to(high: int, low: int = 1) -> Callable[[random.Random], int]:
    return lambda r: r.randint(low, high)


def _structure(r: random.Random) -> str:
    a, b = r.randint(1, 3), r.randint(1, 3)
    return r.choice(["dense", "diagonal", f"block-diagonal({a})", "tril", "triu", "tril-toeplitz", "triu-toeplitz",
                     f"hierarchical({a},{b})"])  # fmt: skip


LAYOUTS = ("matrix", "matrix", "matrix", "flatten", "batch", ((0,), (1,)), ((2, 0), (1,)), ((0,), (2, 1)))
"""Layouts of Muon."""


def _coefficients(r: random.Random) -> Any:
    names = ["jordan", "quintic5", "polar_express", "dion", "cans", "classical", "deepseekv4", "cubic5", "aol4"]
    a, c = r.uniform(2, 4), r.uniform(0, 2)
    row = (a, r.uniform(0.3, 1.2) - a - c, c)  # the image of 1 is near 1: others grow beyond all digits
    return r.choice([*names, row, (row, (1.875, -1.25, 0.375))])


FIELDS: dict[str, Callable[[random.Random], Any]] = {
    **dict.fromkeys(("beta1", "momentum", "riemannian_momentum"), _decay),
    **dict.fromkeys(("decay_rate", "beta2_cap"), lambda r: r.choice([_decay(r), 1.0])),
    **dict.fromkeys(("eps1", "eps2"), lambda r: r.choice([_small(r), _small(r), _small(r), None])),
    "shampoo_beta": lambda r: r.choice([None, _decay(r)]),
    "clamp": _one_of(None, 1, 11, 4000),
    "inner": _one_of("shampoo", "adam"),
    "exponent": lambda r: r.choice([None, 0.5, 0.25, r.uniform(0.1, 1)]),
    "eps_root": _small,
    "momentum_decay": lambda r: r.choice([None, _small(r), _small(r)]),
    "amsgrad": lambda r: r.choice([None, "uncorrected", "corrected", True, False]),
    "nesterov": lambda r: r.choice([None, "constant", "scheduled", True, False]),
    "bias_correction": lambda r: r.choice(["both", "second", "none", True, False]),
    "decay_schedule": _one_of("power", "adam"),
    "decay_offset": _up_to(3, 0),
    "momentum_of": _one_of("step", "update"),
    "factored_axes": _one_of("last", "largest", "leading", None),
    "min_size": _up_to(4, 0),
    "eps_form": _one_of("square", "floor", "inside", "outside", "corrected", "uncorrected"),
    **dict.fromkeys(("beta2", "graft_beta2", "decay"), lambda r: r.choice([_decay(r), _decay(r), 1.0])),
    **dict.fromkeys(("eps", "delta", "damping", "graft_eps", "initial", "weight_decay"), _small),
    **dict.fromkeys(("every", "statistics_every", "inverse_every", "root_steps"), _up_to(4)),
    **dict.fromkeys(("learning_rate", "batch_size"), lambda r: r.uniform(0.1, 3)),
    "clip": lambda r: r.choice([None, r.uniform(0.1, 2)]),
    "rms": lambda r: r.choice([None, r.uniform(0.1, 2)]),
    "tail_decay": lambda r: r.choice([None, r.random(), 0.0, 1.0]),
    "size": _up_to(5),
    "start": lambda r: r.choice([None, r.randint(0, 4), "eigh", "identity"]),
    "heads": _one_of(None, None, 1, 2, 3),
    "merge": _one_of(1, 2, 4, 6, 12, 1024),
    "side": _one_of("smaller", "left", "right"),
    "root": _one_of("eigh", "svd", "polar_express", "newton_schulz", "coupled_newton", "higher_order"),
    "solver": _one_of(
        "svd", "gram64"
    ),  # what "nystrom" finds is not unique: tests/test_nystrom.py holds it to its bounds
    "graft": _one_of(None, "rmsprop", "sgd", "adagrad", "adam"),
    "exponents": lambda r: tuple(r.choice([None, 0.0, 0.25, 0.5, 1 / 6]) for _ in range(r.randint(0, 3))),
    "ignored_axes": lambda r: tuple(i for i in range(3) if r.random() < 0.2),
    "trace_scaling": lambda r: r.choice([0.0, r.random()]),
    "beta3": lambda r: r.choice([None, _decay(r)]),
    "decay_form": _one_of("decoupled", "l2"),
    "dampening": _decay,
    "target": _one_of(None, None, 1, 2, 3),
    "tolerance": lambda r: r.choice([0.0, r.random() / 2]),
    "normalize_eps": _small,
    "max_dim": _one_of(2, 3, 4, 6, 12, 1000),
    "iterations": _up_to(3),
    "eps_position": _one_of("uncorrected", "corrected", "max"),
    "basis": _one_of("qr", "eigh", "qr_meta"),
    "order": _one_of("use_first", "update_first"),
    "sort": _one_of("before", "after"),
    "second_moment": _one_of("permute", "keep", "rotate"),
    "kind": _one_of("fc", "conv", "diagonal"),
    "layout": _one_of("per_output", "per_input", "contiguous", *LAYOUTS),
    "network": _one_of("autoencoder", "cnn"),
    "nesterov_form": _one_of("weighted", "added"),
    "momentum_form": _one_of("average", "sum"),
    "coefficients": _coefficients,
    "after_last": _one_of("repeat", "cycle"),
    "normalization": _one_of("frobenius", "frobenius", "spectral", "schatten4", "aol"),
    "normalization_factor": lambda r: r.choice([1.0, r.uniform(1, 2)]),
    "eps_rule": _one_of("add", "max"),
    "eps2_rule": _one_of("add", "max"),
    "eps2": lambda r: 10 ** r.uniform(-3, 0),  # where an entry of O is zero, 0/0 is of what rounding has made of it
    "compute_dtype": _one_of(None, "bfloat16"),
    "scale": _one_of("max", "jordan", "ratio"),
    "outputs": _one_of("rows", "columns"),
    "blocks": _one_of(None, None, None, 1, 2, 3, (1, 1), (2, 1), (1, 3), (1, 2, 1)),
    "statistic": _one_of("row", "short"),
    "rescale": _one_of("norm", "rms", "none"),
    "structure": lambda r: r.choice([_structure(r), tuple(_structure(r) for _ in range(r.randint(1, 3)))]),
}
"""Functions that draw the value of each field; fields that are True or False are recognised by their annotation."""


def parameters(core: ModuleType, constructor: str) -> dict[str, str]:
    """Return names and annotations of a constructor's arguments."""
    make: Any = operator.attrgetter(constructor)(core)
    if dataclasses.is_dataclass(make):
        return {f.name: str(f.type) for f in dataclasses.fields(make)}
    return {name: str(kind) for name, kind in make.__annotations__.items() if name != "return"}


def drawn(core: ModuleType, constructor: str, r: random.Random) -> Configuration:
    """Return a random configuration that the constructor and ``init`` accept."""
    kinds = parameters(core, constructor)
    while True:
        config = {name: r.random() < 0.5 if kind == "bool" else FIELDS[name](r) for name, kind in kinds.items()}
        axes = r.choice([0, 1, 2, 2, 2, 2, 3, 4])
        shape = tuple(r.choice([1, 2, 2, 3, 3, 4, 5][: 7 if axes < 3 else 5]) for _ in range(axes))
        if math.prod(shape) > (12 if constructor == "FullAdaGrad" else 60):
            continue  # a matrix of all entries takes seconds
        stack = tuple(r.randint(1, 2) for _ in range(r.choice([0, 0, 0, 0, 1, 2])))
        seed = np.random.default_rng(r.getrandbits(32))
        chosen = Configuration(
            constructor=constructor,
            config=config,
            shape=(*stack, *shape),
            param=seed.standard_normal((*stack, *shape)),
            grads=_gradients(r, seed, (r.randint(1, 5), *stack, *shape), special=constructor not in BY_EIGENVECTORS),
            lr=config.get("learning_rate", r.uniform(0.05, 1)),
            decay=r.choice([0.0, r.random()]),
            stack_ndim=len(stack),
            as_arrays=r.random() < 0.2,
        )
        try:
            made(core, replace(chosen, as_arrays=False))  # a 0-D array's value is not checked
            made(core, chosen).init(Array(exact(chosen.param)), stack_ndim=chosen.stack_ndim)
        except (ValueError, TypeError):
            continue  # refused: fields or a shape that do not go together
        if constructor in ("KLShampoo", "KLShampoo.soap") and _undetermined(chosen):
            continue
        if constructor not in BY_EIGENVECTORS or determined(core, chosen, shape):
            return chosen


def _undetermined(c: Configuration) -> bool:
    """Return whether the first gradient leaves the eigensolver a choice: a null space of two or more dimensions."""
    if c.config.get("start") == "identity":
        return False
    for index in np.ndindex(*c.shape[: c.stack_ndim]):
        g = c.grads[(0, *index)]
        for axis, d in enumerate(g.shape):
            if g.any() and d - np.linalg.matrix_rank(np.moveaxis(g, axis, 0).reshape(d, -1)) > 1:
                return True
    return False


BY_EIGENVECTORS = ("SOAP", "SOAP.nvidia", "EShampoo", "EShampoo.meta_soap")
"""Methods whose results depend on the basis found within an eigenspace of dimension above 1."""


def determined(core: ModuleType, c: Configuration, shape: tuple[int, ...]) -> bool:
    """Return whether normal gradients leave no such eigenspace, and no 0 / 0 that is rounding over rounding."""
    method = made(core, replace(c, as_arrays=False))
    grams = method.state_of(shape).grams
    blocks = grams if grams and isinstance(grams[0], tuple) else (grams,)
    simple, spare = True, int(blocks is not grams or method.eps > 1e-6)  # a null space of one dimension
    for block in blocks:
        sides = [gram.shape[0] for gram in block if gram is not None]
        entries = math.prod(sides) if None not in block else math.prod(shape)
        simple &= all(d <= entries // d + spare for d in sides)
    return simple and not (method.eps == 0 and getattr(method, "order", "") == "update_first")


def _gradients(r: random.Random, seed: Any, shape: tuple[int, ...], special: bool = True) -> np.ndarray:
    """Return normal gradients; with ``special`` sometimes a zero gradient, sometimes one of rank one."""
    grads: np.ndarray = seed.standard_normal(shape) * 10 ** r.uniform(-1, 0.5)
    if not special:
        return grads
    if r.random() < 0.15:
        grads[r.randrange(len(grads))] = 0
    if len(shape) > 2 and r.random() < 0.15:
        grads = np.round(4 * grads[..., :1]) * np.round(4 * grads[..., :1, :]) / 4
    return grads


# ---- both implementations -------------------------------------------------------------------------------------------


def made(core: ModuleType, c: Configuration) -> Any:
    """Return the library's method; its real fields are mpmath numbers or 0-D arrays of them."""
    config = {name: number(value) if isinstance(value, float) else value for name, value in c.config.items()}
    if c.as_arrays:
        config = {name: Array(value) if isinstance(value, mp.mpf) else value for name, value in config.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a beta2 that looks like a decay
        return operator.attrgetter(c.constructor)(core)(**config)


def by_library(core: ModuleType, c: Configuration) -> Iterator[dict[str, Any]]:
    """Yield direction, parameter and state after each update, by the names of the vectors."""
    method, param = made(core, c), Array(exact(c.param))
    lr, decay = number(c.lr), number(c.decay)
    state = method.init(param, stack_ndim=c.stack_ndim)
    for grad in exact(c.grads):
        direction, state = method.update(Array(grad), state, param)
        param = (1 - lr * decay) * param - lr * direction
        yield {"direction": direction.data, "param": param.data, **_named(state, "state.")}


FREE_SIGNS = "state.bases.", "state.rotated_m"


def _named(state: Any, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in zip(getattr(state, "_fields", range(len(state))), state, strict=True):
        if hasattr(value, "basis"):  # unique in it are the product and what escaped
            basis = value.basis.data
            found[f"{prefix}{name}"] = (basis * value.eigenvalues.data[..., None, :]) @ np.swapaxes(basis, -1, -2)
            if hasattr(value, "escaped"):
                found[f"{prefix}{name}.escaped"] = value.escaped.data
        elif isinstance(value, tuple):
            found |= _named(value, f"{prefix}{name}.")
        elif value is not None and name != "step" and not f"{prefix}{name}".startswith(FREE_SIGNS):
            found[f"{prefix}{name}"] = value.data
    return found


def by_variant(core: ModuleType, c: Configuration) -> Iterator[dict[str, Any]]:
    """Yield the same as `by_library`, by the second implementation."""
    method = made(core, replace(c, as_arrays=False))
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    trace = variants.walk(method.name, fields, exact(c.param), exact(c.grads), lr=number(c.lr),
                          decay=number(c.decay), stack_ndim=c.stack_ndim)  # fmt: skip
    for direction, param, state in zip(trace.directions, trace.params, trace.states, strict=True):
        yield {"direction": direction, "param": param, **{f"state.{name}": value for name, value in state.items()}}


def _finite(updates: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the updates before the first division by zero, which mpmath refuses."""
    found = []
    with contextlib.suppress(ZeroDivisionError):
        for update in updates:
            found.append(update)
    return found


def difference(core: ModuleType, c: Configuration) -> tuple[float, str]:
    """Return the largest relative difference, and its place."""
    worst, where = 0.0, ""
    with mp.workdps(DIGITS):
        library = _finite(by_library(core, c))
        if (count := len(library)) < len(c.grads):
            if _finite(by_variant(core, replace(c, grads=c.grads[: count + 1]))):
                return float("inf"), f"a division by zero in update {count + 1} of the library alone"
            where = INFINITE
        variant = _finite(by_variant(core, replace(c, grads=c.grads[:count]))) if count else []
        if len(variant) < count:
            return float("inf"), f"a division by zero of the second implementation alone, in the first {count} updates"
        for t, (got, want) in enumerate(zip(library, variant, strict=True), start=1):
            # A momentum of 0 needs no buffer, but the value of an array is never read.
            if want.keys() - got.keys() or (got.keys() - want.keys() and not c.as_arrays):
                return float("inf"), f"the names {sorted(got.keys() ^ want.keys())}"
            for name in want:
                if np.shape(got[name]) != np.shape(want[name]):
                    return float("inf"), f"the shape of {name}: {np.shape(got[name])} and {np.shape(want[name])}"
                size = arithmetic.norm(exact(want[name]))
                distance = float(arithmetic.norm(exact(got[name]) - exact(want[name])) / (size or 1))
                if not distance <= worst:
                    worst, where = distance, f"{name} after update {t}"
    return worst, where


def simplest(core: ModuleType, c: Configuration) -> Configuration:
    """Return a simpler configuration that still differs: fewer updates, no stack, round numbers, other fields."""
    plain: dict[type, list[Any]] = {float: [0.5, 0.0, 1.0], int: [1, 2], tuple: ["dense"]}

    def simpler() -> Iterator[Configuration]:
        if len(c.grads) > 1:
            yield replace(c, grads=c.grads[:-1])
        if c.stack_ndim:
            yield replace(c, param=c.param[0], grads=c.grads[:, 0], shape=c.shape[1:], stack_ndim=c.stack_ndim - 1)
        for axis, d in enumerate(c.shape[c.stack_ndim :], start=c.stack_ndim):
            if d > 1:
                keep = [slice(None)] * axis + [slice(d - 1)]
                shape = (*c.shape[:axis], d - 1, *c.shape[axis + 1 :])
                yield replace(c, param=c.param[tuple(keep)], grads=c.grads[(slice(None), *keep)], shape=shape)
        if c.as_arrays:
            yield replace(c, as_arrays=False)
        if c.decay:
            yield replace(c, decay=0.0)
        for name, value in c.config.items():
            options = [False] if isinstance(value, bool) else plain.get(type(value), [])
            options = options[: options.index(value)] if value in options else options
            yield from (replace(c, config={**c.config, name: option}) for option in options)
        for name in ("param", "grads"):
            array = getattr(c, name)
            if not np.array_equal(array, np.round(array)):
                yield replace(c, **{name: np.round(array) + 0.0})

    def fails(other: Configuration) -> bool:
        try:
            return difference(core, other)[0] > TOLERANCE
        except (ValueError, TypeError):
            return False

    while (found := next(filter(fails, simpler()), None)) is not None:
        c = found
    return c


def numbered(core: ModuleType, seed: int, number: int, methods: list[str]) -> Configuration:
    """Return configuration ``number`` of a ``seed``."""
    r = random.Random(f"{seed}/{number}")
    return drawn(core, methods[number % len(methods)], r)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", type=int, default=1000, metavar="N", help="how many (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="other ones for each seed (default: 0)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first one (default: 0)")
    parser.add_argument("--method", choices=METHODS, metavar="NAME", help="only this method or preset")
    options = parser.parse_args(arguments)
    methods = [options.method] if options.method else METHODS
    core, worst, failed, infinite = load(), dict.fromkeys(methods, 0.0), 0, 0
    counts: Counter[str] = Counter()
    started = time.perf_counter()
    with progress() as bar:
        task = bar.add_task("", total=options.configurations, loss="")
        for i in range(options.first, options.first + options.configurations):
            c = numbered(core, options.seed, i, methods)
            bar.update(task, advance=1, description=c.constructor, loss=f"{failed} differ")
            error, where = difference(core, c)
            counts[c.constructor] += 1
            infinite += where == INFINITE
            if error <= TOLERANCE:
                worst[c.constructor] = max(worst[c.constructor], error)
                continue
            failed += 1
            small = simplest(core, c)
            error, where = difference(core, small)
            repeat = f"--seed {options.seed} --first {i} --configurations 1"
            repeat += f" --method {options.method}" if options.method else ""
            print(f"{where} differs by {error:.1e}; repeat it with {repeat}\n  {small}\n", flush=True)
    for name in methods:
        print(f"{name:<20} {counts[name]:>6} configurations, largest difference {worst[name]:.1e}")
    seconds = time.perf_counter() - started
    print(
        f"{options.configurations} configurations, {failed} differ, {infinite} with an infinite result, {seconds:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
