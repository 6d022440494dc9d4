"""Laws that a method obeys on any input, tried on a subject with gradients that Hypothesis generates and then shrinks.

A law is a function of ``run(param, grads, lr=..., **changed fields) -> updates`` (the subject's changes of the
parameter, one per gradient), of the method, and of inputs. It returns two arrays that must agree to half of the digits
of the precision: a broken law differs by far more, and generated gradients may be ill-conditioned. The truth is the
law itself, or a closed form by singular values, without values of the reference.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from precond_ref.conformance import results, tolerance
from precond_ref.conformance.subjects import RAISED, Command, Subject, said, words
from precond_ref.conformance.variants import multiply
from precond_ref.conformance.vectors import Case
from precond_ref.protocol import Method

Steps = Callable[..., np.ndarray]
STEPS = 3
LARGEST = 32
"""Largest number of entries of a parameter on which laws are tried."""


class Law(NamedTuple):
    """A property of some methods."""

    text: str
    """The law in words."""
    applies: Callable[[Any], bool]
    """Tells whether a method with its hyperparameters obeys the law."""
    sides: Callable[[Steps, Any, np.ndarray, np.ndarray, float, np.random.Generator], tuple[np.ndarray, np.ndarray]]
    """(run, method, param, grads (STEPS, *shape), lr, draws) -> the two arrays that must agree."""


class Broken(Exception):
    """Raised if a law does not hold; Hypothesis then looks for a smaller input that breaks it too."""


# ---- what the laws hold for -----------------------------------------------------------------------------------------

VECTORS = ("SAdaGrad", "AdaFD", "FDSON", "RFDSON")
MATRICES = ("ASGO.theory", "Shampoo", "SShampoo", "FullAdaGrad", "RFShampoo")
SCALES: Mapping[str, tuple[Mapping[str, int], int]] = {
    # by name, for gradients multiplied by c: the powers of c that multiply fields, and the power that multiplies steps
    "SGD": ({}, 1),
    "AdaGrad": ({"eps": 1, "initial": 2}, 0),
    "FullAdaGrad": ({"eps": 1}, 0),
    "RMSProp": ({"eps": 1}, 0),
    "Adam": ({"eps": 1}, 0),
    "AGD": ({"delta": 1}, 0),
    "ASGO": ({"eps": 2}, 0),
    "ASGO.theory": ({"eps": 1}, 0),
    "DASGO": ({"eps": 2}, 0),
    "DASGO.theory": ({"eps": 1}, 0),
    "Shampoo": ({"eps": 2}, 0),
    "Muon": ({"eps": 1}, 0),
    "SAdaGrad": ({"delta": 2}, 0),
    "AdaFD": ({"delta": 1}, 0),
    "RFRMSProp": ({"initial": 2, "damping": 2}, -1),
    "RFAdamW": ({"initial": 2, "damping": 2}, -1),
}


def decays(method: Any) -> bool:
    """Return whether steps depend on the parameter."""
    return bool(method.reads_param)


def regular(method: Any) -> bool:
    """Return whether a positive number is added to every eigenvalue, so that the method decides no rank."""
    if method.name == "Muon":  # its eps bounds a norm
        return method.root == "newton_schulz"
    return all(getattr(method, field, 1) > 0 for field in ("eps", "damping", "delta", "graft_eps"))


CLASSIC = {
    "Adam": ("beta1", "beta2", "eps"),
    "RMSProp": ("beta2", "eps", "momentum"),
    "AdaGrad": ("eps", "initial"),
}
"""Fields that may have any value in `SCALES` and `FIRST`; all other fields must have their defaults."""


def classic(method: Any) -> bool:
    """Return whether the method has the form of `SCALES` and `FIRST`."""
    fields = CLASSIC.get(method.name)
    return fields is None or method == type(method)(**{name: getattr(method, name) for name in fields})


def plain_muon(method: Any) -> bool:
    """Return whether the method has one matrix, one nu for the whole matrix, and the precision of the gradients."""
    return (
        method.normalization in ("frobenius", "spectral")
        and method.blocks is None
        and method.layout == "matrix"
        and method.compute_dtype is None
        and not method.dual_norm
    )


def per_axis(method: Any, name: str) -> bool:
    """Return whether the method treats each axis as a whole, without preferred directions."""
    if not regular(method):
        return False
    return (
        name in (*VECTORS, *MATRICES)
        or (name == "ASGO" and method.heads is None)
        or (name == "Muon" and plain_muon(method))
        or (name == "IFShampoo" and method.structure == "dense")
        or (name == "MBF" and method.kind == "fc" and method.layout != "contiguous" and method.average)
        or (name == "SShampoo.practical" and method.graft != "rmsprop")
    )


def permutable(method: Any) -> bool:
    """Return whether the order of the entries along an axis has no effect."""
    name = method.name
    if method.elementwise or name in ("Adafactor", "DASGO", "DASGO.theory"):
        return True
    return per_axis(method, name) or (regular(method) and name == "SShampoo.practical")


def adds_up(method: Any) -> bool:
    """Return whether the statistic is a plain sum, and the step depends on no other state."""
    name = method.name
    sums = ("ASGO.theory", "DASGO.theory", "AdaGrad", "FullAdaGrad")
    return (
        regular(method)
        and classic(method)
        and (name in sums or (name == "Shampoo" and method.beta2 == 1 and method.every == 1))
    )


# ---- laws -----------------------------------------------------------------------------------------------------------


def _sign(run: Steps, method: Any, x: np.ndarray, g: np.ndarray, lr: float, draws: Any) -> Any:
    return run(-x, -g), -run(x, g)


def _rate(run: Steps, method: Any, x: np.ndarray, g: np.ndarray, lr: float, draws: Any) -> Any:
    return run(x, g, lr=2 * lr), 2 * run(x, g)


def _translation(run: Steps, method: Any, x: np.ndarray, g: np.ndarray, lr: float, draws: Any) -> Any:
    return run(x + 1, g), run(x, g)


def _permutation(run: Steps, method: Any, x: np.ndarray, g: np.ndarray, lr: float, draws: Any) -> Any:
    if x.ndim == 0:
        return x, x
    orders = [draws.permutation(d) for d in x.shape]

    def permuted(a: np.ndarray) -> np.ndarray:
        return a[..., *np.ix_(*orders)]

    return run(permuted(x), permuted(g)), permuted(run(x, g))


def _rotation(run: Steps, method: Any, x: np.ndarray, g: np.ndarray, lr: float, draws: Any) -> Any:
    matrices = [np.linalg.qr(draws.integers(-3, 4, (d, d)) + 4 * np.eye(d))[0] for d in x.shape]

    def rotated(a: np.ndarray) -> np.ndarray:
        for axis, q in enumerate(matrices, start=a.ndim - x.ndim):
            a = multiply(a, q, axis)
        return a

    return run(rotated(x), rotated(g)), rotated(run(x, g))


def _scale(run: Steps, method: Any, x: np.ndarray, g: np.ndarray, lr: float, draws: Any) -> Any:
    fields, power = SCALES[method.name]
    changed = {field: getattr(method, field) * 4.0**e for field, e in fields.items()}
    return run(x, 4 * g, **changed), 4.0**power * run(x, g)


def _order(run: Steps, method: Any, x: np.ndarray, g: np.ndarray, lr: float, draws: Any) -> Any:
    return run(x, g[[1, 0, 2]])[2], run(x, g)[2]


def _zero(run: Steps, method: Any, x: np.ndarray, g: np.ndarray, lr: float, draws: Any) -> Any:
    return run(x, 0 * g), 0 * g


def _coordinates(run: Steps, method: Any, x: np.ndarray, g: np.ndarray, lr: float, draws: Any) -> Any:
    other = g.copy()
    other.reshape(STEPS, -1)[:, 0] += 1
    return tuple(u.reshape(STEPS, -1)[:, 1:] for u in (run(x, other), run(x, g)))


def _first(run: Steps, method: Any, x: np.ndarray, g: np.ndarray, lr: float, draws: Any) -> Any:
    return run(x, g[:1])[0], lr * FIRST[method.name](method, g[0])


def _spectral(g: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    return (u * function(s)) @ vt


def _asgo_first(method: Any, g: np.ndarray) -> np.ndarray:
    u = _spectral(g, lambda s: (1 - method.beta1) * s / np.sqrt((1 - method.beta2) * s**2 + method.eps))
    return u if method.rms is None else u * (method.rms * math.sqrt(g.size) / (np.linalg.norm(u) or 1))


def _shampoo_first(method: Any, g: np.ndarray) -> np.ndarray:
    weight = 1 if method.beta2 == 1 or method.bias_correction else 1 - method.beta2
    if g.ndim == 2:
        return _spectral(g, lambda s: s / np.sqrt(weight * s**2 + method.eps))
    u = g
    for axis in range(g.ndim):
        rows = np.moveaxis(g, axis, 0).reshape(g.shape[axis], -1)
        w, q = np.linalg.eigh(weight * rows @ rows.T + method.eps * np.eye(len(rows)))
        u = np.moveaxis(np.tensordot((q * w ** (-0.5 / g.ndim)) @ q.T, u, (1, axis)), 0, axis)
    return u


FIRST: Mapping[str, Callable[[Any, np.ndarray], np.ndarray]] = {
    "SGD": lambda m, g: g * (1 + m.momentum if m.nesterov else 1),
    "AdaGrad": lambda m, g: g / (np.sqrt(m.initial + g**2) + m.eps),
    "FullAdaGrad": lambda m, g: g / (np.linalg.norm(g) + m.eps),
    "RMSProp": lambda m, g: g / (np.sqrt(1 - m.beta2) * np.abs(g) + m.eps),
    "Adam": lambda m, g: g / (np.abs(g) + m.eps),
    "AGD": lambda m, g: g / np.maximum(np.abs(g), m.delta),
    "ASGO": _asgo_first,
    "ASGO.theory": lambda m, g: _spectral(g, lambda s: s / (s + m.eps)),
    "Shampoo": _shampoo_first,
}


def _first_applies(method: Any) -> bool:
    name = method.name
    if name == "ASGO" and (method.heads is not None or method.root == "polar_express"):
        return False
    return name in FIRST and classic(method) and regular(method) and getattr(method, "clip", None) is None


def _rotates(method: Any) -> bool:
    return per_axis(method, method.name)


LAWS: Mapping[str, Law] = {
    "sign": Law("gradients (and parameter) of the other sign give steps of the other sign", lambda m: True, _sign),
    "rate": Law("twice the learning rate gives twice the step", lambda m: not decays(m), _rate),
    "translation": Law("steps do not depend on where the parameter is", lambda m: not decays(m), _translation),
    "zero": Law("zero gradients from the start give no step", lambda m: not decays(m), _zero),
    "permutation": Law("exchanging entries of an axis exchanges them in the step", permutable, _permutation),
    "rotation": Law("rotating every axis rotates the step", _rotates, _rotation),
    "scale": Law("gradients times 4, with eps or its like in proportion, give the same step (or one in proportion)",
        lambda m: (m.name in SCALES and classic(m) and not decays(m) and getattr(m, "clip",
        None) is None and (m.name != "Muon" or plain_muon(m))), _scale),
    "coordinates": Law("an entry's steps depend on its own gradients only", lambda m: m.elementwise, _coordinates),
    "order": Law("a sum of statistics forgets the order of past gradients", adds_up, _order),
    "first-step": Law("the first step has its closed form", _first_applies, _first),
}  # fmt: skip


# ---- trying them ----------------------------------------------------------------------------------------------------


def _changed(case: Case, changed: Mapping[str, Any]) -> Method:
    return case.make().replace(**changed)


def updates(
    subject: Subject, case: Case, dtype: str, param: Any, grads: Any, lr: float = 0.5, **changed: Any
) -> np.ndarray:
    """Return the changes of one parameter, (steps, *shape), with the case's hyperparameters and no decoupled decay."""
    config = results.config_of(case)
    config |= {"lr": lr, **changed}
    if not case.make().decays:
        config["weight_decay"] = 0.0
        config.at_default |= {"weight_decay"}
    config.make = functools.partial(_changed, case, changed)
    param = np.array(param, dtype)
    subject.init(config, [param.copy()])
    seen = [param.astype(np.float64)]
    for g in grads:
        seen.append(np.asarray(subject.step([np.array(g, dtype)])[0], np.float64))
    return np.stack([a - b for a, b in itertools.pairwise(seen)])


def distance(
    subject: Subject, law: str, case: Case, dtype: str, param: Any, grads: Any, draws: int = 0
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the norm of the difference of the two sides of a law over the tolerance, and the two sides."""

    def run(x: Any, g: Any, lr: float = 0.5, **changed: Any) -> np.ndarray:
        return updates(subject, case, dtype, x, g, lr, **changed)

    param, grads = np.asarray(param, np.float64), np.asarray(grads, np.float64)
    with np.errstate(all="ignore"):
        got, want = LAWS[law].sides(run, case.make(), param, grads, 0.5, np.random.default_rng(draws))
        u = tolerance.UNIT_ROUNDOFF[dtype]
        limit = math.sqrt(u) * float(np.linalg.norm(want)) + 16 * u * (float(np.linalg.norm(param)) + 1)
        ratio = float(np.linalg.norm(got - want)) / limit
    return (ratio if math.isfinite(ratio) else math.inf), got, want


def try_laws(
    subject: Subject,
    method: str,
    *,
    dtype: str = "float64",
    target: str = "",
    examples: int = 40,
    laws: Iterable[str] = tuple(LAWS),
    on_case: Callable[[str], None] | None = None,
) -> Iterator[results.Result]:
    """Yield one result per law of ``method``; the message of a broken law is a script with the smallest input found.

    Steps that are not finite break every law. The first law reports them; the others are tried on finite steps only.
    """
    spoilt = ""
    candidates = [
        case
        for case in results.cases(method)
        if case.tier == "must"
        and not case.stack_ndim
        and math.prod(case.shape) <= LARGEST
        and results.of_about_one(case)
    ]
    for name in laws:
        law = LAWS[name]
        if on_case:
            on_case(f"invariance/{name}")
        usable, reasons = [], set()
        for case in candidates:
            if law.applies(case.make()):
                try:
                    zeros = np.zeros(case.shape)
                    updates(subject, case, dtype, zeros, [zeros])
                    usable.append(case)
                except NotImplementedError as error:
                    reasons.add(words(error))
                except RAISED as error:
                    usable.append(case)
                    reasons.add(words(error))
        if not usable:
            if reasons:
                yield results.Result(f"invariance/{name}", "must", results.SKIPPED, law.text, message=reasons.pop())
            continue
        try:
            found = _search(subject, name, usable, dtype, examples, bool(spoilt))
        except NotImplementedError as error:
            yield results.Result(f"invariance/{name}", "must", results.SKIPPED, law.text, message=words(error))
        except RAISED as error:
            yield results.Result(f"invariance/{name}", "must", results.ERROR, law.text, message=said(error))
        else:
            if not found:
                yield results.Result(f"invariance/{name}", "must", results.PASSED, law.text)
                continue
            if "ratio" not in found:
                message = f"no step was finite, as invariance/{spoilt} says"
                yield results.Result(f"invariance/{name}", "must", results.SKIPPED, law.text, message=message)
                continue
            reason = f"it does not hold that {law.text}"
            if not _both_finite(found["got"], found["want"]):
                spoilt, reason = name, "its steps are not finite"
            message = f"{reason}\n{script(subject, name, found, dtype, target)}"
            yield results.Result(f"invariance/{name}", "must", results.FAILED, law.text, message=message)


def _both_finite(got: Any, want: Any) -> bool:
    return bool(np.isfinite(got).all() and np.isfinite(want).all())


def _search(
    subject: Subject, law: str, usable: list[Case], dtype: str, examples: int, only_finite: bool
) -> dict[str, Any]:
    """Return the smallest input found that breaks the law; an empty dict if there is none.

    With ``only_finite``, inputs on which a side is not finite do not count; ``{"tried": 0}`` if there were no others.
    """
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    found: dict[str, Any] = {}
    tried = 0

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None, report_multiple_bugs=False,
              phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def attempt(data: Any) -> None:
        case = data.draw(st.sampled_from(usable))
        size = math.prod(case.shape)
        entries = data.draw(st.lists(st.integers(-3, 3), min_size=STEPS * size, max_size=STEPS * size))
        first = data.draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size))
        draws = data.draw(st.integers(0, 5))
        grads, param = np.reshape(entries, (STEPS, *case.shape)), np.reshape(first, case.shape)
        ratio, got, want = distance(subject, law, case, dtype, param, grads, draws)
        nonlocal tried
        if only_finite and not _both_finite(got, want):
            return
        tried += 1
        if not ratio <= 1:
            found.update(case=case, grads=grads, param=param, draws=draws, ratio=ratio, got=got, want=want)
            raise Broken

    with contextlib.suppress(Broken):
        attempt()
    return found if tried else {"tried": 0}


def script(subject: Subject, law: str, found: Mapping[str, Any], dtype: str, target: str) -> str:
    """Return a program that shows the two sides of a law."""
    case, names = found["case"], getattr(subject, "names", {})
    options = f'dtype="{dtype}"' + (f", names={names!r}" if names else "")
    if isinstance(subject, Command):
        made = f"subjects.Command({target!r}, {options})"
    else:
        made = f'subjects.wrap(subjects.load_target("{target or "your_module:YourOptimizer"}"), {options})'
    return f'''import numpy as np
from precond_ref.conformance import invariance, results, subjects

subject = {made}
case = next(case for case in results.cases("{case.constructor}") if case.id == "{case.id}")
print(dict(case.config))
param = {found["param"].tolist()}
grads = {found["grads"].tolist()}
ratio, got, want = invariance.distance(subject, "{law}", case, "{dtype}", param, grads, {found["draws"]})
print("{LAWS[law].text}")
print("one side", got, "other side", want, f"{{ratio:.3g}} times the tolerance apart", sep="\\n")
'''
