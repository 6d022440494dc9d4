"""The diagnosis: a mistake is named where it explains what fails, and nothing else is; edges; the checker itself."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conformance_subjects import Here, Variant
from mutation import mutated
from test_conformance import CONSTRUCTORS, FIRST, adam
from typer.testing import CliRunner

from precond_ref.cli import application
from precond_ref.conformance import check, diagnose, invariance, isolation, results, tolerance, variants, wrap
from precond_ref.conformance.subjects import Reference
from precond_ref.methods import agd, asgo, baselines, inverse_free, muon, sketchy
from precond_ref.numerics import sketch

U = 2.0**-53


def library(module: Any, *changes: tuple[str, str]) -> Callable[[str], Any]:
    """A subject for each class of a module with pieces of its source exchanged."""
    copy = mutated(module, *changes)
    return lambda name: Reference(target=getattr(copy, name))


def on_sketch(*changes: tuple[str, str]) -> Callable[[str], Any]:
    """The same for a change of what sketches do."""
    copy = mutated(sketchy)
    copy.fd = mutated(sketch, *changes)
    return lambda name: Reference(target=getattr(copy, name))


class Bent(Reference):
    """A right method whose gradients, fields or state are meddled with."""

    def __init__(
        self,
        fields: Any = lambda method: method,
        skips: str = "",
        second: float = 1.0,
    ):
        super().__init__()
        self.fields, self.skips, self.second = fields, skips, second

    def _method(self, config: Any) -> Any:
        return self.fields(super()._method(config))

    def init(self, config: Any, params: Any) -> None:
        super().init(config, params)
        self.last = [p.copy() for p in params]

    def step(self, grads: Any) -> Any:
        if self.skips == "all" and not any(g.any() for g in grads):
            return [p.copy() for p in self.last]
        before = list(self.states)
        self.last = super().step([g if i == 0 else self.second * g for i, g in enumerate(grads)])
        if self.skips == "state" and not any(g.any() for g in grads):
            self.states = before
        return self.last


def decayed_adam(param, grad, state, *, lr, beta1, beta2, eps, weight_decay):
    """Adam whose weight decay is divided by the root too, though no average sees it."""
    t, m, v = (0, 0 * grad, 0 * grad) if state is None else state
    m, v, t = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2, t + 1
    root = np.sqrt(v / (1 - beta2**t)) + eps
    moved = m / (1 - beta1**t) + weight_decay * param
    return param - lr * moved / np.where(root == 0, 1, root), (t, m, v)


def unclipped(exponent=-0.5, dtype=np.float64):
    """Powers of what `eigh` gives, though a zero comes out of it as a number of either sign."""

    def step(param, grad, state, *, lr, eps):
        state = [np.zeros((d, d)) for d in param.shape] if state is None else state
        u = grad
        for axis, d in enumerate(param.shape):
            rows = np.moveaxis(grad, axis, 0).reshape(d, -1)
            state[axis] = state[axis] + rows @ rows.T
            w, q = np.linalg.eigh(state[axis])
            w[0] = -abs(w[0]) if w[0] < 1e-12 else w[0]  # which sign it has differs between machines
            with np.errstate(all="ignore"):
                root = (q * (w + eps) ** (exponent / param.ndim)) @ q.T
            u = variants.multiply(u, root.astype(dtype).astype(np.float64), axis)
        return param - lr * u, state

    return step


unclipped_shampoo = unclipped()


@np.errstate(all="ignore")
def row_adafactor(param, grad, state, *, lr, eps1=1e-30, eps2=1e-3, clip=1.0, decay_rate=0.8, parameter_scale=True):
    """0/0 in a row of zeros alone: NaN is not larger than the clip, where `max` looks."""
    if param.ndim > 2:
        raise NotImplementedError("two axes")
    t, r, c = state or (0, 0.0, 0.0)
    t, w, square = t + 1, (t + 1) ** -decay_rate, grad * grad + eps1
    r = (1 - w) * r + w * (square.mean(axis=1, keepdims=True) if param.ndim == 2 else square)
    c = (1 - w) * c + w * (square.mean(axis=0, keepdims=True) if param.ndim == 2 else 0.0)
    u = grad / np.sqrt(r / r.mean() * c if param.ndim == 2 else r)
    u = u if clip is None else u / max(1.0, np.sqrt((u * u).mean()) / clip)
    scale = max(eps2, np.sqrt((param * param).mean())) if parameter_scale else 1.0
    return param - lr * scale * u, (t, r, c)


@functools.wraps(row_adafactor)
def longer_row_adafactor(param, grad, state, *, lr, **fields):
    """Beside a row of zeros, which becomes NaN, the other rows move too far."""
    after, state = row_adafactor(param, grad, state, lr=lr, **fields)
    return param + (1.5 if np.isnan(after).any() else 1.0) * (after - param), state


def literal_sshampoo(param, grad, state, *, lr, size, beta2, eps):
    """The escaped mass added to the complement of all of the sketch's columns, as if they were eigenvectors above 0."""

    def power(x):
        live = x > 0
        return np.where(live, (np.where(live, x, 1) + eps) ** (-0.5 / param.ndim), 0)

    state = [(np.zeros((d, 1)), np.zeros(1), 0.0) for d in param.shape] if state is None else state
    u = grad
    for axis, d in enumerate(param.shape):
        rows, (basis, e, mass) = np.moveaxis(grad, axis, 0).reshape(d, -1), state[axis]
        q, s, _ = np.linalg.svd(np.hstack([basis * np.sqrt(beta2 * e), rows]), full_matrices=False)
        s = np.where(s > 1e-13 * s[0], s, 0)
        cut = s[size - 1] if size <= len(s) else 0.0
        basis, e, mass = q[:, :size], (s**2 - cut**2).clip(min=0)[:size], beta2 * mass + cut**2
        state[axis] = basis, e, mass
        root = (basis * power(e)) @ basis.T + power(np.array(mass)) * (np.eye(d) - basis @ basis.T)
        u = variants.multiply(u, root, axis)
    return param - lr * u, state


def late_asgo(param, grad, state, *, lr, eps):
    """The root of the gradients before this one, but for the first."""
    old = 0 if state is None else state
    new = old + grad @ grad.T
    w, q = np.linalg.eigh(new if state is None else old)
    root = np.sqrt(np.where(w > 1e-13 * w[-1], w, 0)) + eps
    inverse = np.where(root == 0, 0, 1 / np.where(root == 0, 1, root))
    return param - lr * (q * inverse) @ q.T @ grad, new


GRAM = "gram = ema(state.gram, gram_of(g if left else t(g, xp), xp), self.beta2)  # (V)"
SPREAD = "        grams = [gram_of(t(k, xp), xp) for k in scaled]\n"
NAMED: dict[str, tuple[str, str, Callable[[], Any]]] = {
    # what it is: (method, name, subject)
    "threshold under the root": (
        "AGD",
        "delta-under-root",
        lambda: library(
            agd,
            ("clamp(root, k.floor, xp=xp)",
             "xp.sqrt(clamp(root * root, k.floor**2 / self.delta, xp=xp))"),
        )("AGD"),
    ),
    "clip stored in the momentum": (
        "IFShampoo",
        "clip-stored",
        lambda: library(inverse_free, ("new_momenta.append(m)", "new_momenta.append(m / length)"))("IFShampoo"),
    ),
    "rho = beta2 (rho + cut)": (
        "SAdaGrad",
        "mass-decayed-new",
        lambda: on_sketch(("* sketch.escaped + (cut * cut)[..., 0]", "* (sketch.escaped + (cut * cut)[..., 0])"))(
            "SAdaGrad"
        ),
    ),
    "the same in S-Shampoo": (
        "SShampoo",
        "mass-decayed-new",
        lambda: on_sketch(("* sketch.escaped + (cut * cut)[..., 0]", "* (sketch.escaped + (cut * cut)[..., 0])"))(
            "SShampoo"
        ),
    ),
    "escaped mass only in the complement": (
        "SShampoo",
        "mass-outside",
        lambda: wrap(literal_sshampoo),
    ),
    "a gradient of zeros skipped": ("Adam", "zero-skipped", partial(Bent, skips="all")),
    "state not updated at a zero gradient": ("ASGO", "zero-forgotten", partial(Bent, skips="state")),
    "second parameter treated differently": ("SShampoo", "later-parameters", partial(Bent, second=1.5)),
    "V started at G G^T": (
        "ASGO",
        "started-whole",
        lambda: library(
            asgo, (GRAM, f"{GRAM[: GRAM.index('self.beta2')]}self.beta2 if state.step else 0.0)")
        )("ASGO"),
    ),
    "rms with m": (
        "Muon",
        "rms-rows",
        lambda: library(muon, ("self.rms * math.sqrt(max(r, k))", "self.rms * math.sqrt(r)"))("Muon"),
    ),
    "rms with n": (
        "Muon",
        "rms-columns",
        lambda: library(muon, ("self.rms * math.sqrt(max(r, k))", "self.rms * math.sqrt(k)"))("Muon"),
    ),
    "rms sqrt(m)": (
        "ASGO",
        "rms-rows",
        lambda: library(
            asgo,
            ("return u, ASGOState(", "u /= grad.shape[-1] ** (0.5 * bool(self.rms))\n        return u, ASGOState("),
        )("ASGO"),
    ),
    "preconditioned weight decay": ("Adam", "decay-preconditioned", lambda: wrap(decayed_adam)),
    "eigenvalues not clipped at 0": ("Shampoo", "unclipped", lambda: wrap(unclipped_shampoo)),
    "0/0 of a row of zeros": ("Adafactor", "zero-nan", lambda: wrap(row_adafactor)),
    "the first root for ever": ("Shampoo", "every-once", lambda: Bent(lambda m: m.replace(every=10**6))),
    "decay in the gradient left out": (
        "EShampoo",
        "l2-ignored",
        lambda: Bent(lambda m: m.replace(weight_decay=0.0) if m.decay_form == "l2" else m),
    ),
    "merged up to the limit that the subject got": ("EShampoo", "target-ignored", lambda: Variant({"target-ignored"})),
    "weights of Nesterov's form exchanged": (
        "Muon", "nesterov-exchanged", lambda: wrap(nesterov_muon(lambda mu: (mu, 1 - mu))),
    ),
    "the average not weighted in Nesterov's form": (
        "Muon", "nesterov-whole", lambda: wrap(nesterov_muon(lambda mu: (1 - mu, 1))),
    ),
    "stale from the second step on": (
        "ASGO.theory",
        "statistic-late",
        lambda: wrap(late_asgo),
    ),
}  # fmt: skip


def nesterov_muon(weights):
    """Exact Muon with these weights of the gradient and the average in Nesterov's form."""

    def muon(param, grad, state, *, lr, momentum, nesterov, rms, weight_decay, root="newton_schulz"):
        if root != "svd":
            raise NotImplementedError(root)
        m = momentum * (0 if state is None else state) + (1 - momentum) * grad
        a, b = weights(momentum)
        u, s, vt = np.linalg.svd(a * grad + b * m if nesterov else m, full_matrices=False)
        o = (u * (s > 1e-13 * s.max())) @ vt
        return (1 - lr * weight_decay) * param - lr * o * (1 if rms is None else rms * max(o.shape) ** 0.5), m

    return muon


def names(report: results.Report) -> list[tuple[str, ...]]:
    assert report.diagnosis is not None
    return [match.flags for match in report.diagnosis.matches]


@pytest.mark.parametrize("what", NAMED)
@pytest.mark.full
@pytest.mark.usefixtures("vectors_alone")
def test_a_mistake_has_its_name(what: str) -> None:
    method, name, subject = NAMED[what]
    report = check(subject(), method)
    assert not report.ok
    assert names(report) == [(name,)]


@pytest.mark.parametrize("looked_at", [False, True])
@pytest.mark.usefixtures("vectors_alone")
def test_other_steps_beside_nan_are_not_called_nan_alone(looked_at: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not looked_at:
        monkeypatch.setattr(diagnose, "_right_before_nan", lambda run, dtype: True)
    assert names(check(wrap(longer_row_adafactor), "Adafactor")) == [("zero-nan",)] * (not looked_at)


def floored_rfadamw(param, grad, state, *, lr, beta1, beta2, damping, batch_size, initial, weight_decay):
    """The damping is the least denominator instead of added: the same as none, where the squares are larger."""
    m, v = state or (0.0, initial)
    m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * batch_size * grad**2
    return (1 - lr * weight_decay) * param - lr * m / np.maximum(v, damping), (m, v)


@pytest.mark.usefixtures("vectors_alone")
def test_a_damping_as_the_least_denominator_is_not_called_none() -> None:
    found = check(wrap(floored_rfadamw), "RFAdamW").diagnosis
    assert found is not None
    assert not found.matches
    assert found.nearest is not None
    assert found.nearest.unexplained == ("RFAdamW/much-damping", "RFAdamW/small-uncorrected")


LAST_FIRST = {"RFShampoo": "gauss-seidel-back", "IFShampoo": "gauss-seidel-back",
              "Shampoo": "statistic-of-preconditioned-back"}  # fmt: skip


@pytest.mark.parametrize(("constructor", "name"), LAST_FIRST.items())
@pytest.mark.full
@pytest.mark.usefixtures("vectors_alone")
def test_factors_renewed_one_after_the_other_from_the_last_are_named(constructor: str, name: str) -> None:
    assert names(check(Variant({name}), constructor)) == [(name,)]


def test_gauss_seidel_from_the_last_axis_by_hand() -> None:
    """One update of RF-Shampoo on a matrix: the row factor is renewed from the new column factor."""
    method = FIRST["RFShampoo"].make().replace(momentum=0.0, weight_decay=0.0, every=1, batch_size=1.0)
    b, damping, g = method.beta2, method.damping, np.array([[1.0, -2.0], [0.5, 3.0], [2.0, 0.25]])
    m, n = g.shape
    columns = (1 - b) * np.eye(n) + b * (g.T @ g + damping * m * np.eye(n)) * n / (m * n)
    inverse = np.linalg.inv(columns)
    rows = (1 - b) * np.eye(m) + b * (g @ inverse @ g.T + damping * np.trace(inverse) * np.eye(m)) * m / (m * n)
    want = np.linalg.inv(rows) @ g @ inverse
    trace = variants.run(method, 0 * g, g[None], lr=1.0, flags=frozenset({"gauss-seidel-back"}))
    assert np.allclose(trace.directions[0], want, rtol=1e-12)
    assert not np.allclose(variants.run(method, 0 * g, g[None], lr=1.0).directions[0], want, rtol=1e-3)


# ---- mistakes of every method ---------------------------------------------------------------------------------------

ALIKE = {"memoryless": "restarted", "zero-direction": "unmoved", "unpreconditioned-ball": "unpreconditioned",
         "zero-forgotten": "zero-skipped", "unpreconditioned-average": "unpreconditioned"}  # fmt: skip
"""Names of mistakes that are the same without a counter or momentum."""
FIRST_IS_ZERO = {"KLShampoo": ("restarted", "counter-stuck")}
"""The same as no direction at all where the first update has none."""


def own(constructor: str, flag: str) -> bool:
    """Whether a mistake of every method, or one the same as it, is the only name given."""
    report = check(Variant({flag}), constructor)
    if report.diagnosis is None:
        return True  # nothing departs: that mistake cannot be made
    found = names(report)
    flags = variants.of(FIRST[constructor].make()).flags
    if found == [("zero-direction",)]:
        return flag == found[0][0] or flag in FIRST_IS_ZERO.get(constructor, ())
    return found == [(flag,)] or found == [(ALIKE.get(flag, flag),)] or (len(found) == 1 and found[0][0] in flags)


@pytest.mark.parametrize("flag", ["unmoved", "unpreconditioned", "restarted", "counter-stuck", "zero-skipped"])
@pytest.mark.parametrize("constructor", ["Adam", "Shampoo"])
@pytest.mark.full
@pytest.mark.usefixtures("vectors_alone")
def test_no_steps_no_preconditioning_nothing_kept(constructor: str, flag: str) -> None:
    assert own(constructor, flag)


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
@pytest.mark.deep
@pytest.mark.usefixtures("vectors_alone")
def test_mistakes_of_every_method_are_named(constructor: str) -> None:
    known = variants.of(FIRST[constructor].make()).generic
    assert [flag for flag in known if not own(constructor, flag)] == []


@pytest.mark.usefixtures("vectors_alone")
def test_generic_mistakes_by_another_route() -> None:
    """Each is what a subject does that is written without the variants."""

    class Still(Reference):
        def step(self, grads: Any) -> Any:
            return [np.array(p) for p in self.first]

        def init(self, config: Any, params: Any) -> None:
            self.first = [p.copy() for p in params]

    class Shrinking(Reference):
        def step(self, grads: Any) -> Any:
            shrink = 1 - self.lr * self.decay
            self.params = [shrink * p for p in self.params]
            return [np.array(p) for p in self.params]

    class Fresh(Reference):
        def step(self, grads: Any) -> Any:
            self.states = [
                self.method.init(p, stack_ndim=int(len(s) > 1)) for p, s in zip(self.params, self.stacks, strict=True)
            ]
            return super().step(grads)

    class Stuck(Reference):
        def step(self, grads: Any) -> Any:
            self.states = [state._replace(step=0) for state in self.states]
            return super().step(grads)

    def plain(param, grad, state, *, lr, eps, initial, weight_decay):
        return (1 - lr * weight_decay) * param - lr * grad, 0

    def one_beta(method: Any) -> Any:
        return method.replace(beta1=method.beta2)

    def averaged(param, grad, state, *, lr, beta1, beta2, eps, weight_decay):
        m = (1 - beta1) * grad if state is None else beta1 * state + (1 - beta1) * grad
        return (1 - lr * weight_decay) * param - lr * m, m

    for subject, name in ((Still(), "unmoved"), (Shrinking(), "zero-direction"), (Fresh(), "restarted"),
                          (Stuck(), "counter-stuck"), (Bent(one_beta), "beta2-for-beta1")):  # fmt: skip
        assert names(check(subject, "Adam")) == [(name,)]
    assert names(check(wrap(averaged), "Adam")) == [("unpreconditioned-average",)]
    assert names(check(wrap(plain), "AdaGrad")) == [("unpreconditioned",)]


# ---- agreement is earned --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constructor", ["Adam", "ASGO"])
@pytest.mark.usefixtures("vectors_alone")
def test_nan_agrees_with_nothing(constructor: str) -> None:
    class Nan(Reference):
        def step(self, grads: Any) -> Any:
            return [np.nan * g for g in grads]

    report = check(Nan(), constructor)
    assert report.diagnosis is not None
    assert names(report) == []
    assert report.diagnosis.nearest is None
    said = "\n".join(report.diagnosis.lines())
    assert said.startswith(f"No known mistake in {constructor} explains it.")
    assert f"Not finite in {report.ran} of {report.ran} cases; NaN agrees with nothing." in said
    assert "agree, to" not in said


def bent(share: Callable[[int], bool]) -> Any:
    """Adam without bias corrections in some of the cases, and nonsense in the others."""

    class Mixed(Variant):
        count = 0

        def init(self, config, params):
            super().init(config, params)
            self.flags = frozenset({"no-correction-1"})
            Mixed.count += 1
            self.nonsense = not share(Mixed.count)

        def step(self, grads):
            self.grads.append([g.copy() for g in grads])
            if self.nonsense:
                return [p - (1 + p**2) * len(self.grads) for p in self.first]
            self.grads.pop()
            return super().step(grads)

    return Mixed()


@pytest.mark.full
@pytest.mark.usefixtures("vectors_alone", "first_version")
def test_the_nearest_explains_half_of_what_fails() -> None:
    near = check(bent(lambda i: i % 3 > 0), "Adam").diagnosis
    far = check(bent(lambda i: i % 3 == 0), "Adam").diagnosis
    assert near is not None
    assert far is not None
    assert near.nearest is not None
    assert near.nearest.flags == ("no-correction-1",)
    assert near.nearest.explained >= len(near.nearest.unexplained) > 0
    assert f"{near.nearest.explained} of the " in near.lines()[0]
    assert (far.matches, far.nearest) == ((), None)


def test_a_mistake_that_would_fail_what_passes_is_not_the_nearest() -> None:
    """Adam's counter is wrong where beta2 is small, and only there: no mistake in its formula explains that."""

    class Sometimes(Variant):
        def init(self, config, params):
            super().init(config, params)
            self.flags = frozenset({"heavy-ball"} if config["weight_decay"] else ())

    found = check(Sometimes(), "Adam").diagnosis
    assert found is not None
    assert (found.matches, found.nearest) == ((), None)


# ---- single precision -----------------------------------------------------------------------------------------------


class Single(Reference):
    """A right method in float32 between parameters in float64."""

    def __init__(self) -> None:
        super().__init__("numpy", "float32")

    def init(self, config: Any, params: Any) -> None:
        super().init(config, [p.astype(np.float32) for p in params])

    def step(self, grads: Any) -> Any:
        return [p.astype(np.float64) for p in super().step([g.astype(np.float32) for g in grads])]


@pytest.mark.parametrize("constructor", ["Adam", "Shampoo", "IFShampoo"])
@pytest.mark.usefixtures("vectors_alone")
def test_single_precision_is_told(constructor: str) -> None:
    found = check(Single(), constructor).diagnosis
    assert found is not None
    assert found.single
    assert found.lines()[0].startswith(f"It is {constructor} in single precision: all ")


@pytest.mark.full
@pytest.mark.usefixtures("vectors_alone")
def test_single_precision_in_some_cases_is_a_hint() -> None:
    """With one eps of several, and so in half of the cases, which is no verdict."""

    class Sometimes(Single):
        def init(self, config: Any, params: Any) -> None:
            self.narrow = config["eps"] == 0.1875
            if self.narrow:
                super().init(config, params)
            else:
                self.exact = Reference()
                self.exact.init(config, params)

        def step(self, grads: Any) -> Any:
            return super().step(grads) if self.narrow else self.exact.step(grads)

    found = diagnose.diagnose(check(Sometimes(), "Adam", diagnose=False), pairs=False)
    assert not found.matches
    assert found.nearest is None
    assert found.hints[-1].startswith("No case is further than ")
    assert "single precision would explain as much" in found.hints[-1]


def test_few_ids_are_named() -> None:
    match = diagnose.Match(("a",), "with a", 0.5, 7, ("1", "2", "3", "4", "5"), ("6", "7", "8", "9"))
    assert diagnose.Diagnosis("SGD", 14, (), match, ("A hint.",)).lines() == [
        "Nearest: SGD with a: 7 of the 12 cases that fail agree, to 0.5.",
        "Not explained: 1, 2, 3, 4, ....",
        "It does not explain why these pass: 6, 7, 8, 9.",
        "A hint.",
    ]
    several = tuple(diagnose.Match((str(i),), f"with {i}", 0.5, 7) for i in range(6))
    assert diagnose.Diagnosis("SGD", 1, several, edges="eps = 0").lines() == [
        "Right, except at eps = 0.",
        "It is SGD with 0: the case that ran agree, to 0.5.",
        *(f"  or with {i}, to 0.5: no case that ran tells them apart." for i in range(1, 5)),
        "  or one of 1 more.",
    ]


@pytest.mark.full
@pytest.mark.usefixtures("vectors_alone", "first_version")
def test_what_is_not_single_precision() -> None:
    def larger_eps(param, grad, state, *, lr, beta1, beta2, eps):
        return adam()(param, grad, state, lr=lr, beta1=beta1, beta2=beta2, eps=eps + 1e-8)

    class Longer(Reference):
        def step(self, grads: Any) -> Any:
            return super().step([(1 + 1e-8) * g for g in grads])

    turned = library(inverse_free, (SPREAD, "        grams = [k @ t(k, xp) for k in scaled]\n"))("IFShampoo")
    for subject, method in ((wrap(larger_eps), "Adam"), (Longer(), "RFShampoo"), (turned, "IFShampoo")):
        report = check(subject, method, diagnose=False)
        assert not report.ok
        found = diagnose.diagnose(report, pairs=False)
        assert not found.single, found.lines()
        assert not any("single precision" in hint for hint in found.hints)
        assert "as it should be" not in found.lines()[0]


# ---- edges ----------------------------------------------------------------------------------------------------------


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, method: str) -> Any:
    (tmp_path / "edge_subject.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(isolation, "Isolated", Here)
    monkeypatch.delitem(__import__("sys").modules, "edge_subject", raising=False)
    file = tmp_path / "report.json"
    result = CliRunner().invoke(
        application(), ["check", "edge_subject:step", "--method", method, "--json", str(file)]
    )  # fmt: skip
    return result, json.loads(file.read_text(encoding="utf-8"))


ADAGRAD = """
import numpy as np

def step(param, grad, state, *, lr, eps, initial, weight_decay):
    state = (initial + 0 * grad if state is None else state) + grad**2
    with np.errstate(all="ignore"):
        return (1 - lr * weight_decay) * param - lr * grad / (np.sqrt(state) + eps), state
"""


def test_only_an_edge_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, report = run(tmp_path, monkeypatch, ADAGRAD, "AdaGrad")
    assert result.exit_code == 3
    assert (report["ok"], report["edges"]) == (False, "eps = 0")
    assert report["failures"] == ["AdaGrad/no-eps"]
    last = result.output.strip().splitlines()[-1]
    assert last == "RIGHT, except at eps = 0: 1 unexpected failure"
    assert "Right, except at eps = 0." in result.output
    wrong = ADAGRAD.replace("lr * grad /", "lr * 1.25 * grad /")
    result, report = run(tmp_path, monkeypatch, wrong, "AdaGrad")
    assert (result.exit_code, report["edges"]) == (1, "")
    assert result.output.strip().splitlines()[-1].startswith("WRONG: ")
    help_text = " ".join(CliRunner().invoke(application(), ["check", "--help"]).output.split())
    assert "3 right except" in help_text


@pytest.mark.full
def test_what_is_an_edge() -> None:
    """The pseudo-inverse of a singular statistic is one; a wrong step beside it, or a wrong state, is none."""
    report = check(wrap(unclipped_shampoo), "Shampoo")
    assert report.edges == "eps = 0"
    assert check(Variant({"eps-outside"}), "Shampoo").edges == ""
    assert check(Variant({"zero-nan"}), "ASGO").edges == "a gradient of zeros"
    assert check(Bent(skips="state"), "ASGO").edges == ""
    assert check(Bent(lambda m: m.replace(merge=m.size)), "SShampoo.practical").edges == ""  # low rank, with a ridge
    assert check(Reference(), "Shampoo").edges == ""


@pytest.mark.usefixtures("vectors_alone")
class Routed(Bent):
    """A method that is wrong for parameters of fewer than two axes: all of them, or those that it does not take."""

    def __init__(self, most: bool = False, **given: Any):
        super().__init__(**given)
        self.most = most

    def step(self, grads: Any) -> Any:
        other = [g.ndim < 2 and (self.most or not self.method.takes(g.shape)) for g in grads]
        return super().step([-g if flag else g for g, flag in zip(grads, other, strict=True)])


@pytest.mark.full
def test_vectors_that_go_to_another_method_are_an_edge() -> None:
    """Unless the method is for vectors too: Adam, or SOAP(vectors=True)."""
    report = check(Routed(), "SOAP", diagnose=False)
    assert report.edges == diagnose.OTHERS
    assert {r.id for r in report.failures} == {"SOAP/scalar", "SOAP/vector", "SOAP/one-beta-vector"}
    assert check(Routed(most=True), "SOAP", diagnose=False).edges == ""
    assert check(Routed(most=True), "Adam", diagnose=False).edges == ""


@pytest.mark.full
def test_a_mistake_beside_such_vectors_is_named() -> None:
    report = check(Routed(fields=lambda m: m.replace(every=10**6)), "Shampoo")
    assert (report.edges, names(report)) == ("", [("every-once",)])
    last = report.diagnosis.lines()[-1]
    assert all(text in last for text in ("Left out of these: ", "Shampoo/vector", diagnose.OTHERS))


def test_a_mistake_beside_an_edge_is_named() -> None:
    """The cases that depart at the edge are left out, and named."""
    report = check(wrap(unclipped(exponent=-1.0)), "Shampoo")
    assert names(report) == [("exponent-inverse-order",)]
    assert report.edges == ""
    assert report.diagnosis.lines()[-1].startswith("Left out of these: Shampoo/")
    assert report.diagnosis.lines()[-1].endswith(", where it departs at eps = 0.")
    narrow = check(wrap(unclipped(dtype=np.float32)), "Shampoo").diagnosis
    assert narrow.single
    assert narrow.lines()[0].startswith(
        f"It is Shampoo in single precision: all {narrow.cases} cases that ran agree, to "
    )
    assert narrow.matches[0].error < 1e-5
    assert narrow.lines()[-1].endswith(", where it departs at eps = 0.")


class NarrowVariant(Variant):
    """A mistake, in float32."""

    def step(self, grads: Any) -> Any:
        return [p.astype(np.float32).astype(np.float64) for p in super().step(grads)]


@pytest.mark.usefixtures("vectors_alone")
def test_a_mistake_at_an_edge_in_single_precision_is_named() -> None:
    found = check(NarrowVariant({"zero-nan"}), "AGD").diagnosis
    assert found.single
    assert [m.flags for m in found.matches] == [("zero-nan",)]


@np.errstate(all="ignore")
def all_nan_adagrad(param, grad, state, *, lr, eps, initial, weight_decay):
    """A single entry without a gradient so far, and no ridge: NaN in all entries."""
    state = (initial + 0 * grad if state is None else state) + grad**2
    spoilt = 0 if eps else 0 / state.min()
    return (1 - lr * weight_decay) * param - lr * (grad / (np.sqrt(state) + eps) + spoilt), state


@pytest.mark.usefixtures("vectors_alone")
def test_an_elementwise_method_at_an_edge_has_no_eigenvalues() -> None:
    report = check(wrap(all_nan_adagrad), "AdaGrad")
    assert report.edges == "eps = 0"
    assert names(report) == []


def test_an_entry_far_below_the_others_is_no_edge() -> None:
    """Each entry of an elementwise step is moved by its own size: the sign of a small one does not jump."""
    case = SimpleNamespace(
        config={"eps": 1e-20},
        rates=[1.0],
        decay=0.0,
        stack_ndim=0,
        make=lambda: baselines.AdaGrad(eps=1e-20, initial=0.0),
    )
    for small, jumps in ((1e-8, False), (0.0, True)):
        run = SimpleNamespace(case=case, tensors={"param": np.zeros(2), "grads": np.array([[1.0, small]])})
        assert diagnose.at_edge(run, 1) == jumps


# ---- limits of the diagnosis ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("vectors_alone")
def test_rounding_beyond_the_tolerance_is_told() -> None:
    """The steps are those of float64, and a case fails: the hint says by how much, at worst, and not of a state."""
    report = check(Reference(), "SGD", diagnose=False)
    first, second, third = [i for i, r in enumerate(report.results) if r.status == "passed"][:3]

    def fails(i: int, quantity: str, ratio: float) -> None:
        gap = replace(results.gap(1, quantity, np.ones(2), np.ones(2), 1.0), ratio=ratio)
        report.results[i] = replace(report.results[i], status="failed", gap=gap)

    fails(third, "momentum", 7.0)
    assert not any("rounding" in hint for hint in diagnose.diagnose(report).hints)
    fails(first, "update", 1.5)
    fails(second, "update", 1.25)
    said = "What fails is rounding, 1.5 times the tolerance: float64 alone comes to as much."
    assert diagnose.diagnose(report).hints[-1] == said


@pytest.mark.usefixtures("vectors_alone")
def test_the_search_ends_in_time() -> None:
    """By a clock that goes on by a second at each look, no more than ten of a hundred variants are tried."""
    report, known = check(Reference(), "SGD", diagnose=False), variants.of(FIRST["SGD"].make())
    ticks, tried, ran, run = itertools.count(), [], [], variants.run

    def choices(_: Any, size: int) -> Any:
        for i in range(100 * (size == 1)):
            tried.append(i)
            yield frozenset({"sign"})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnose.time, "process_time", lambda: float(next(ticks)))
        patch.setattr(variants, "choices", choices)
        patch.setattr(variants, "run", lambda *a, **k: ran.append(a) or run(*a, **k))
        diagnose._search(report.runs, frozenset(), known, "float64", 1)
        assert len(tried) == 11
        ran.clear()
        assert diagnose._greedy(report.runs, frozenset(), known, "float64", True).flags == ()
        assert len(ran) <= 2 * len(report.runs) + 10


# ---- the checker ----------------------------------------------------------------------------------------------------


def test_a_gap_at_no_tolerance() -> None:
    zero, one = np.zeros(2), np.array([3.0, 4.0])
    assert results.gap(1, "update", one, zero, 0.0).ratio == math.inf
    assert results.gap(1, "update", one, zero, 0.0).error == math.inf
    assert results.gap(1, "update", 1e-300 * one, zero, 0.0).ratio == math.inf
    assert results.gap(1, "update", zero, zero, 0.0).ratio == 0
    assert results.gap(1, "update", np.nan * one, one, 1.0).ratio == math.inf
    assert results.gap(1, "update", one, one * np.inf, 1.0).ratio == math.inf
    found = results.gap(2, "update", 2 * one, one, 2.5)
    assert (found.step, found.error, found.tolerance, found.ratio, found.norm_ratio) == (2, 1.0, 0.5, 2.0, 2.0)
    assert found.cosine == 1
    assert results.gap(1, "update", -one, one, 1.0).cosine == -1
    assert math.isnan(results.gap(1, "update", one, zero, 1.0).cosine)


def test_what_an_update_may_be_off() -> None:
    before, after = np.array([3.0, 4.0]), np.array([0.0, 5.0])
    rounding = U * (5 + 5)
    assert tolerance.of_update(0.0, "float64", before, after) == pytest.approx(2 * rounding, rel=1e-15)
    both = 0.5 * math.hypot(3, 1) + 2 * rounding
    assert tolerance.of_update(0.5, "float64", before, after) == pytest.approx(both, rel=1e-15)
    assert tolerance.of_update(0.0, "float32", before, after) == pytest.approx(2 * 2.0**-24 * 10, rel=1e-15)
    assert tolerance.relative("float64", 100.0, 0.5) == 16 * U * 100
    assert tolerance.relative("float64", 100.0, 1.5) == 16 * U * 100**2
    assert tolerance.relative("float64", 100.0, 1.5, stale=True, decompositions=3) == 3 * 16 * U * 100
    assert tolerance.relative("float64", 0.5, 0.5) == 16 * U


def test_what_a_case_may_be_off() -> None:
    """Each step has a conditioning of its own; products in bfloat16, and primitives, have another law."""

    def about(**more: Any) -> Any:
        return SimpleNamespace(
            **{"conditioning": given, "kind": "trace", "narrow": False, "shape": (3, 2), "stack_ndim": 0} | more
        )

    given = {"kappa": [4.0, 9.0], "exponent": 0.25, "stale": False, "decompositions": [1, 3]}
    assert tolerance.of_case(about(), "float64", 1) == 16 * U * 4**0.75
    assert tolerance.of_case(about(), "float64", 2) == 16 * U * 3 * 9**0.75
    assert tolerance.of_case(about(kind="primitive"), "float64", 2) == 16 * U * 3 * 9
    assert tolerance.of_case(about(narrow=True), "float64", 2) == 0.25 * 2.0**-8 * 9
    assert tolerance.of_case(about(shape=(4, 32, 8)), "float64", 1) == 16 * U * 4**0.75 * 2**0.5  # sums of 256 terms
    assert tolerance.of_case(about(shape=(512, 9, 2), stack_ndim=1), "float64", 1) == 16 * U * 4**0.75


@pytest.mark.parametrize(("share", "ok"), [(0.5, True), (1.5, False)])
def test_a_check_fails_beyond_its_tolerance_and_no_sooner(share: float, ok: bool) -> None:
    """An update off by a share of what rounding may make it."""
    case = FIRST["SGD"]

    class Off(Reference):
        def step(self, grads: Any) -> Any:
            before = [np.array(p) for p in self.params]
            out = super().step(grads)
            self.count = getattr(self, "count", 0) + 1
            if self.count > 1:
                return out
            relative = tolerance.of_case(case, "float64", 1)
            limit = tolerance.of_update(relative, "float64", before[0], out[0])
            moved = out[0] - before[0]
            self.params[0] = out[0] + share * limit * moved / np.linalg.norm(moved)
            return [self.params[0]]

    result = next(r for r in check(Off(), "SGD", diagnose=False).results if r.id == case.id)
    assert (result.status == "passed") == ok, result.gap


CHECKER = [
    (results, "else 0.0 if a == 0 else math.inf", "else 0.0", test_a_gap_at_no_tolerance),
    (results, "if difference == 0:", "if False:", test_a_gap_at_no_tolerance),
    (results, "if not math.isfinite(difference):", "if False:", test_a_gap_at_no_tolerance),
    (tolerance, "+ 2 * UNIT", "+ UNIT", test_what_an_update_may_be_off),
    (tolerance, "+ 2 * UNIT", "+ 4 * UNIT", test_what_an_update_may_be_off),
    (tolerance, "max(kappa, 1.0)", "kappa", test_what_an_update_may_be_off),
    (tolerance, "* decompositions *", "*", test_what_an_update_may_be_off),
    (tolerance, "exponent + 0.5", "exponent + 1.0", test_what_an_update_may_be_off),
    (tolerance, "if case.narrow:", "if False:", test_what_a_case_may_be_off),
    (tolerance, "PRODUCTS * BFLOAT16 *", "PRODUCTS *", test_what_a_case_may_be_off),
    (tolerance, 'float(about["kappa"][step - 1])', 'float(about["kappa"][step - 2])', test_what_a_case_may_be_off),
    (tolerance, ' or case.kind == "primitive"', "", test_what_a_case_may_be_off),
    (tolerance, 'about["decompositions"][step - 1]', 'about["decompositions"][step - 2]', test_what_a_case_may_be_off),
]


@pytest.mark.parametrize(("module", "old", "new", "test"), CHECKER, ids=[f"{c[1]} -> {c[2]}" for c in CHECKER])
def test_a_planted_bug_in_the_checker_is_caught(
    module: Any, old: str, new: str, test: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = mutated(module, (old, new))
    for name in ("gap", "of_case", "of_update", "of_lengths", "relative"):
        if hasattr(copy, name) and hasattr(module, name):
            monkeypatch.setattr(module, name, getattr(copy, name))
    with pytest.raises(AssertionError):
        test()


DIAGNOSIS = [
    ([("and nearest.explained >= len(nearest.unexplained)", "")], test_the_nearest_explains_half_of_what_fails),
    ([("if len(runs) - len(rest) <= beat:", "if len(runs) - sum(id in failing for id in rest) <= beat:"),
      ("return len(match.unexplained) + len(match.contradicted)", "return len(match.unexplained)")],
     test_a_mistake_that_would_fail_what_passes_is_not_the_nearest),
    ([("if by_chance or 5 * fewer >= count else 0.0", "")], test_what_is_not_single_precision),
    ([("    if singular and (0 in ridges or not ridges):\n        return True\n", "")], test_what_is_an_edge),
    ([("if singular and (0 in ridges or not ridges):", "if singular:")], test_what_is_an_edge),
    ([(" and not run.case.make().takes(run.case.shape)", "")], test_vectors_that_go_to_another_method_are_an_edge),
    ([("if left_out and (matches", "if ids is firm and (matches")], test_a_mistake_beside_such_vectors_is_named),
    ([("        return [OTHERS]", "        return []")], test_vectors_that_go_to_another_method_are_an_edge),
    ([("if left_out and (matches", "if False and (matches")], test_a_mistake_beside_an_edge_is_named),
    ([("_single(rest, frozenset())", "_single(runs, frozenset())")], test_a_mistake_beside_an_edge_is_named),
    ([("if share >= MOST and left_out and (single := in_single()):\n        return single\n    ", "")],
     test_a_mistake_at_an_edge_in_single_precision_is_named),
    ([("for run in rest), len(failing)", "for run in runs), len(failing)")], test_a_mistake_beside_an_edge_is_named),
    ([("<= 0.01 * longest:\n            return True", "<= 0.01 * longest:\n            return False")],
     test_what_is_an_edge),
    ([("if case.make().elementwise else largest", "if False else largest")],
     test_an_entry_far_below_the_others_is_no_edge),
    ([(" and all(map(_leaves_out_zeros, wrong))", "")], test_an_elementwise_method_at_an_edge_has_no_eigenvalues),
    ([(' and r.gap.quantity == "update"]\n        if over', ']\n        if over')],
     test_rounding_beyond_the_tolerance_is_told),
    ([("{max(over):.2g}", "{over[-1]:.2g}")], test_rounding_beyond_the_tolerance_is_told),
    ([("if share and largest < 2**-12:", "if share or largest < 2**-12:")], test_what_is_not_single_precision),
    ([("if share and largest < 2**-12:", "if False:")], test_single_precision_in_some_cases_is_a_hint),
    ([("if share >= MOST:", "if share:")], test_single_precision_in_some_cases_is_a_hint),
    ([("if len(ids) > 4", "if len(ids) >= 4")], test_few_ids_are_named),
    ([("for m in others[:4]]", "for m in others[:3]]")], test_few_ids_are_named),
    ([("        if time.process_time() > end:\n            break\n        errors", "        errors")],
     test_the_search_ends_in_time),
    ([("            if time.process_time() > end:\n                break\n            best", "            best")],
     test_the_search_ends_in_time),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "test"), DIAGNOSIS, ids=[d[0][0][0].strip() for d in DIAGNOSIS])
@pytest.mark.full
@pytest.mark.usefixtures("vectors_alone")
def test_a_planted_bug_in_the_diagnosis_is_caught(
    changes: list[tuple[str, str]], test: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = mutated(diagnose, *changes)
    for name in ("diagnose", "edges", "_single", "_search", "_greedy", "at_edge", "Match", "Diagnosis"):
        monkeypatch.setattr(diagnose, name, getattr(copy, name))
    with pytest.raises(AssertionError):
        test()


# ---- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_nan_breaks_one_law() -> None:
    class Spoilt(Reference):
        def step(self, grads: Any) -> Any:
            return [p * np.nan if abs(g).max() > 1 else p for p, g in zip(super().step(grads), grads, strict=True)]

    class Nothing(Reference):
        def step(self, grads: Any) -> Any:
            return [p * np.nan for p in super().step(grads)]

    for subject in (Spoilt(), Nothing()):
        laws = list(invariance.try_laws(subject, "SGD", examples=8, laws=("sign", "rate", "zero")))
        failed = [r for r in laws if r.status == "failed"]
        assert [r.id for r in failed] == ["invariance/sign"]
        assert failed[0].message.startswith("its steps are not finite\n")
    assert {r.message for r in laws if r.status == "skipped"} == {"no step was finite, as invariance/sign says"}


@pytest.mark.full
def test_a_law_broken_beside_nan_is_still_found_and_caught() -> None:
    class Both(Reference):
        def step(self, grads: Any) -> Any:
            return [
                p * np.nan if abs(g).max() > 2 else p + 0.125 for p, g in zip(super().step(grads), grads, strict=True)
            ]

    failed = {r.id: r.message for r in invariance.try_laws(Both(), "SGD", examples=60) if r.status == "failed"}
    assert len(failed) > 1
    assert sum(message.startswith("its steps are not finite") for message in failed.values()) == 1
