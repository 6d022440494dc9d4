"""The inputs on which the method runs beside a subject, how far both may be apart, and what is said of a difference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mutation import mutated

from precond_ref.conformance import beside, results
from precond_ref.conformance.subjects import Reference, Unsupported
from precond_ref.methods.baselines import Adam
from precond_ref.methods.muon import Muon
from precond_ref.methods.shampoo import EShampoo, Shampoo
from precond_ref.methods.sketchy import SShampoo
from precond_ref.methods.soap import SOAP

RANDOM = np.random.default_rng(0).standard_normal


def case(constructor: str, **config: Any) -> Any:
    """A small case, with other fields."""
    own = [c for c in results.cases(constructor) if c.tier == "must" and not c.stack_ndim]
    first = next((c for c in own if not c.decay), own[0])
    return replace(first, config={**first.config, **config})


def trial(*cases: Any, **more: Any) -> Any:
    """What the inputs are chosen for."""
    about = {
        "right": [*cases], "deep": False, "slow": False, "seeds": 1, "dtype": "float64", "fields": {"lr"}, "engine": {},
    }  # fmt: skip
    return SimpleNamespace(**about | more)


def plans(tool: Any, check: str, given: Any) -> list[Any]:
    """The inputs of a check, which are not run."""
    kept, found = tool.first_fault, list[Any]()
    tool.first_fault = lambda _, plans: found.extend(plans) or ""
    try:
        getattr(tool, check)(given)
    finally:
        tool.first_fault = kept
    return found


def path_of(tool: Any, method: Any, grads: list[np.ndarray | None], lr: float = 1.0) -> Any:
    start = RANDOM((next(g for g in grads if g is not None)).shape)
    rates = ((lr, 0.0),) * len(grads)
    given = tuple(None if g is None else g.tobytes() for g in grads)
    return tool.Path(method, rates, "float64", (0.0,), start.shape, start.tobytes(), given)


def check_reverse(tool: Any) -> None:
    """An elementwise method does not see the order of the entries."""
    path = path_of(tool, Adam(), [RANDOM((3, 2)) for _ in range(3)])
    assert np.array_equal(tool.reversed_axes(path), tool.followed(path)[0])


def check_other_reading(tool: Any) -> None:
    """eps outside of what was seen shows where a root is stale: from the second update on, however small the step."""
    grads = [RANDOM((4, 3)) for _ in range(4)]
    stale, fresh = (SShampoo(size=4, every=every, eps=1.0) for every in (3, 1))
    assert tool.agreed(path_of(tool, stale, [*grads])) == 1
    assert tool.agreed(path_of(tool, stale, [1e-12 * g for g in grads])) == 1
    assert tool.agreed(path_of(tool, stale, [None, None, *grads])) == 3
    assert tool.agreed(path_of(tool, fresh, [*grads])) == 4
    assert tool.agreed(path_of(tool, Adam(), [*grads])) == 4


class _Soap(SOAP):
    """A stranger's, whose first basis is free as SOAP's is."""


class _Kept(EShampoo):
    """A stranger's that may keep a basis."""

    free_basis = "kept"


def check_strangers(tool: Any) -> None:
    """What a class declares counts, not its name."""
    asked: list[Any] = []
    kept, tool.reversed_axes = tool.reversed_axes, lambda path: asked.append(path.method) or kept(path)
    config, subject = results.config_of(case("SOAP")), Reference()
    fields = {field.name: getattr(config.method, field.name) for field in dataclasses.fields(config.method)}
    given = trial(subject=subject, step=lambda grads: subject.step(grads), astray=None)
    for free, called in (("first", True), ("renewed", False)):
        method = _Soap(**fields)
        object.__setattr__(method, "free_basis", free)
        config.make = lambda method=method: method
        assert tool.compare(given, tool.Plan("such", config, [RANDOM((4, 3))], [[*RANDOM((3, 4, 3))]])) == ""
        assert asked == [method] * called
        asked.clear()
    tool.reversed_axes = kept
    low = np.outer(np.arange(1.0, 5), [1.0, 2, 3])
    for own, steps in ((_Kept(), 2), (EShampoo(), 3), (EShampoo(tolerance=0.5), 2), (Adam(), 3)):
        assert tool._unchosen(path_of(tool, own, [None, low, low])) == steps


def check_refusals(tool: Any) -> None:
    """Where nothing could be tried, the first refusal is told; where nothing was to be tried, nothing is."""

    class Waning(SimpleNamespace):
        """Late after one input."""

        asked = 0

        @property
        def late(self) -> bool:
            self.asked += 1
            return self.asked > 1

    given: Any = SimpleNamespace(late=False, report=SimpleNamespace(notes=[]))

    def answers(*answers: Any) -> Callable[..., str]:
        left = iter(answers)

        def compare(*_: Any) -> str:
            if isinstance(answer := next(left), str):
                return answer
            raise answer

        return compare

    def said() -> str:
        try:
            return tool.first_fault(given, (SimpleNamespace(what=str(i)) for i in range(3)))
        except Unsupported as error:
            return f"refused: {error}"
        except tool.Nothing:
            return "nothing"
        except tool.Late as late:
            return str(late)

    kept = tool.compare
    try:
        tool.compare = answers(tool.Nothing(), NotImplementedError("three axes"), NotImplementedError("sides"))
        assert said() == "refused: three axes"
        tool.compare = answers(NotImplementedError("three axes"), "", tool.Nothing())
        assert said() == ""
        tool.compare = answers("", "wrong", "not asked")
        assert said() == "wrong"
        tool.compare = answers(*[tool.Nothing()] * 3)
        assert said() == "nothing"
        given.late = True
        assert said() == "not tried within the time"
        given = Waning()
        tool.compare = answers("", "not asked")
        assert said() == "not all inputs were tried within the time"
    finally:
        tool.compare = kept


def check_regular(tool: Any) -> None:
    """A corrected variance is zero at the first step; a ridge of zero, or of none, leaves 0/0."""
    for centered, corrected in ((False, False), (False, True), (True, False), (True, True)):
        given = case("RMSProp", centered=centered, bias_correction=corrected, eps=1e-3)
        assert tool._regular(given) == (not (centered and corrected))
    assert not tool._regular(case("RMSProp", centered=False, eps=0.0))
    assert tool._regular(case("SGD"))
    steep = case("Adam")
    for kappa in (tool.STEEP, 2 * tool.STEEP):
        about = {**steep.conditioning, "kappa": [kappa] * steep.steps}
        assert tool._regular(replace(steep, conditioning=about)) == (kappa == tool.STEEP)


def check_takes(tool: Any) -> None:
    """Neither sides that take long to decompose, nor states that do not fit, nor other numbers of axes."""
    assert tool._takes(Shampoo(), (600, 2))
    assert not tool._takes(Shampoo(), (601, 2))
    assert tool._takes(Adam(), (601, 2))
    assert not tool._takes(Adam(), (1000, 600))
    assert not tool._takes(Shampoo(), (600, 600, 600))
    assert not tool._takes(Muon(), (5,))
    assert tool._takes(Muon(), (5, 2))


def check_long_runs(tool: Any) -> None:
    """One run at the defaults; in depth also four others of 2000 steps, the rest of 150."""
    own = [c for c in results.cases("Adam") if c.tier == "must"]
    for deep in (False, True):
        lengths = [len(p.grads[0]) for p in plans(tool, "long_run", trial(*own, deep=deep))]
        assert lengths == ([2000] * 5 + [150] * (len(lengths) - 5) if deep else [150] * 6)
        assert len(lengths) > 5


def check_kinds(tool: Any) -> None:
    """The sizes of entries and of singular values are those in the words."""
    g = RANDOM((6, 4))
    sizes = np.linalg.svd(tool._spread(g), compute_uv=False)
    assert sizes == pytest.approx(10.0 ** -np.linspace(0, 5, 4), rel=1e-6)
    ones = np.ones(4)
    assert np.allclose(tool._spread(ones), 10.0 ** -np.linspace(0, 5, 4), rtol=1e-12)
    assert [*tool._mixed(np.ones(7))] == pytest.approx([1e-7, 10, 1e-3, 100, 1e-5, 1, 0.1])
    assert np.array_equal(tool._sparse(np.array([[3.0, 4.0], [0.5, -2.0]])), [[0, 0], [0, -2]])
    assert tool._sparse(np.array(2.0)) == 2
    found = {p.what.partition(",")[0]: p.grads[0] for p in plans(tool, "sizes", trial(case("Adam")))}
    largest = {what: max(abs(g).max() for g in grads) for what, grads in found.items()}
    assert largest["tiny gradients (1e-8)"] < 1e-7
    assert largest["minute gradients (1e-14)"] < 1e-13
    assert largest["large gradients"] > 1e7
    (matrix,) = {max(abs(g).max() for g in p.grads[0]) for p in plans(tool, "sizes", trial(case("Shampoo")))
                 if p.what.startswith("large") and p.params[0].shape == (6, 4)}  # fmt: skip
    assert 1e3 < matrix < 1e4


def check_chosen(tool: Any) -> None:
    """Cases of tier may only where there are no others; of equal ones the first; five, or twenty in depth."""
    first, again, other = case("Adam"), replace(case("Adam"), why="the same again"), case("Adam", beta1=0.3125)
    picked = tool.chosen(trial(first, again, other))
    assert sorted(map(id, picked)) == sorted(map(id, (first, other)))
    may = [replace(c, tier="may") for c in (first, other)]
    assert tool.chosen(trial(*may, again)) == [again]
    assert len(tool.chosen(trial(*may))) == 2
    some = [case("Adam", beta1=i / 32) for i in range(1, 31)]
    assert [len(tool.chosen(trial(*some, deep=deep))) for deep in (False, True)] == [5, 20]
    assert len(tool.chosen(trial(*some, slow=True))) == 2
    ridge = [case("Adam", eps=0.0), case("Adam", eps=0.5)]
    assert tool.chosen(trial(*ridge)) == ridge[1:]
    assert tool.chosen(trial(*ridge[:1])) == ridge[:1]


def check_other_values(tool: Any) -> None:
    """Each field that the subject takes gets another value alone, and all do together; no value is the case's own."""
    given = case("RMSProp", momentum=0.75, centered=False)
    names = {"beta2", "eps", "momentum", "centered", "lr"}
    tried = [fields for _, fields in tool._others(given, names)]
    own = {**{name: getattr(given.make(), name) for name in given.make().symbols}, "lr": given.rates[0]}
    assert tried[0].keys() == {"beta2", "eps", "momentum", "lr"}
    assert {name for fields in tried[1:] for name in fields} == names
    assert all(len(fields) == 1 for fields in tried[1:])
    assert not any(value == own[name] for fields in tried for name, value in fields.items())
    assert {"eps": tool.LARGE} in tried
    assert {"centered": True} in tried
    slower = replace(given, lr=0.25)
    assert [fields for _, fields in tool._others(slower, {"lr"})] == [{"lr": 0.1875}, {"lr": 0.40625}]


def check_rates(tool: Any) -> None:
    """A change of a group concerns its parameters, from its step on, and only values that the subject applies."""
    config = results.config_of(case("SGD"))
    grads = [[np.ones(2)] * 3] * 2
    changes = {1: [{"lr": 0.5, "group": 1}], 2: [{"lr": 0.25, "weight_decay": 3.0}]}
    plan = tool.Plan("", config, [np.ones(2)] * 2, grads, changes=changes, group=(0, 1))
    lr, decay = config["lr"], config.method.weight_decay if config.method.decays else config["weight_decay"]
    assert [r for r, _ in tool.path(plan, 0, "float64", ["lr"], 0.0).rates] == [lr, lr, lr / 4]
    assert [r for r, _ in tool.path(plan, 1, "float64", ["lr"], 0.0).rates] == [lr, lr / 2, lr / 8]
    assert [r for r, _ in tool.path(plan, 1, "float64", ["weight_decay"], 0.0).rates] == [lr] * 3
    assert [d for _, d in tool.path(plan, 0, "float64", ["weight_decay"], 0.0).rates] == [decay, decay, 3 * decay]


class Longer(Reference):
    """Plain SGD whose steps are too long by a share of their length, between two steps, in one parameter."""

    def __init__(self, share: float, since: int = 1, which: int = 0, last: int = 9, refused: int = 9):
        super().__init__()
        self.share, self.since, self.which, self.last, self.refused, self.count = share, since, which, last, refused, 0

    def step(self, grads: Any) -> Any:
        self.count += 1
        if self.count == self.refused:
            raise ValueError
        wrong = self.since <= self.count <= self.last
        factors = [1 + self.share * (wrong and i == self.which) for i in range(len(grads))]
        return super().step([f * g for f, g in zip(factors, grads, strict=True)])


def check_compare(tool: Any) -> None:
    """A step is off beyond the tolerance, 7 of 10 digits of float64; the words say where, `astray` how far at last."""

    def ran(subject: Any, parameters: int, **more: Any) -> tuple[str, float | None, Any]:
        given = trial(subject=subject, step=lambda grads: subject.step(grads), astray=None)
        config = results.config_of(case("SGD", momentum=0.0))
        grads = [[*RANDOM((4, 3))] for _ in range(parameters)]
        text = tool.compare(given, tool.Plan("such", config, [RANDOM(3) for _ in grads], grads, "look there", **more))
        return text, given.astray, np.array(grads)

    def said(subject: Any, parameters: int, **more: Any) -> str:
        return ran(subject, parameters, **more)[0]

    small = 2.0 ** (-53 * 0.7)
    assert said(Longer(0.0), 1) == said(Longer(small / 4), 1) == said(Longer(0.01, since=5), 1) == ""
    assert said(Longer(0.25, since=3), 1) == "such: step 3 is off by 2.5e-01 of its length; look there"
    text = "such: parameter 2 of 2, step 1 is off by 2.5e-01 of its length; look there"
    assert said(Longer(0.25, which=1), 2) == text
    assert ran(Longer(0.25, which=1), 2)[1] == pytest.approx(0.25)
    assert ran(Longer(0.0), 1)[1] is None
    _, astray, (steps,) = ran(Longer(0.25, since=2, last=3), 1)
    assert astray == pytest.approx(0.25 * np.linalg.norm(steps[1:3].sum(axis=0)) / np.linalg.norm(steps.sum(axis=0)))
    assert ran(Longer(0.25, refused=3), 1)[:2] == ("such: step 1 is off by 2.5e-01 of its length; look there", None)
    with pytest.raises(ValueError, match="^$"):
        said(Longer(0.25, since=3, refused=2), 1)
    assert said(Longer(4 * small), 1).startswith("such: step 1 is off by ")
    assert said(Longer(2.0 ** (-53 * 0.43) / 4), 1, digits=tool.FEW_DIGITS) == ""


CHECKS = {f.__name__: f for f in (
    check_reverse, check_other_reading, check_strangers, check_refusals, check_regular, check_takes, check_long_runs,
    check_kinds, check_chosen, check_other_values, check_rates, check_compare,
)}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_inputs(name: str) -> None:
    CHECKS[name](beside)


PLANTED = [
    (check_reverse, "np.flip(other, axis=tuple(range(1, other.ndim)))", "other"),
    (check_other_reading, 'b"".join(filter(None, path.grads))', 'b"".join(filter(None, path.grads[:1] * 9))'),
    (check_other_reading, "rtol=1e-9, atol=0", "rtol=1e-9"),
    (check_other_reading, "if g is not None]\n", "if g is None]\n"),
    (check_strangers, 'exact.method.free_basis == "first"', 'type(exact.method).__name__ == "SOAP"'),
    (check_strangers, 'exact.method.free_basis == "first"', "exact.method.free_basis"),
    (check_strangers, 'method.free_basis == "kept" and', 'type(method).__name__ == "EShampoo" and'),
    (check_strangers, 'method.free_basis == "kept" and', "method.free_basis and"),
    (check_refusals, "refused or words(error)", "refused"),
    (check_refusals, "refused or words(error)", "words(error)"),
    (check_refusals, 'raise Late(f"not', 'break  # (f"not'),
    (check_refusals, "* tried}", "* (not tried)}"),
    (check_regular, 'getattr(method, "centered", False) and', 'getattr(method, "centered", False) or'),
    (check_regular, 'getattr(method, "centered", False)', 'getattr(method, "centered", True)'),
    (check_regular, "case.kappa <= STEEP", "case.kappa < STEEP"),
    (check_takes, "<= high or (not method.elementwise and", "<= high or (method.elementwise and"),
    (check_takes, "<= MOST_STATE", "<= 2 * MOST_STATE"),
    (check_long_runs, "trial.deep and k < 4", "trial.deep and k < 3"),
    (check_kinds, "if g.ndim < 2:", "if g.ndim <= 2:"),
    (check_kinds, "return g * 10.0 ** -np.linspace(0, 5, g.size)", "return g / 10.0 ** -np.linspace(0, 5, g.size)"),
    (check_kinds, "grads *= 1e4 if case.make().elementwise", "grads *= 1e4 if True"),
    (check_chosen, "reversed(firm)", "firm"),
    (check_chosen, 'if c.tier != "may"] or', 'if c.tier == "may"] or'),
    (check_other_values, "1.625 * old or 0.34375", "old or 0.34375"),
    (check_rates, "(None, plan.group[i] if plan.group else None)", "(None, 0)"),
    (check_compare, '" * (len(after) > 1)', '" * (len(after) >= 1)'),
    (check_compare, "u[dtype] ** digits", "u[dtype] ** (digits / 2)"),
    (check_compare, "step {t + 1} is", "step {t} is"),
    (check_compare, "; {plan.likely}\", i\n", "; {plan.likely}\", 0\n"),
    (check_compare, "[] if fault else zip", "zip"),
    (check_compare, "if fault:\n                return fault\n            raise", "return fault"),
    (check_compare, "plan.params[where] - before", "before[where] - before"),
    (check_compare, "truths[where][:steps].sum", "truths[where][:1].sum"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "old", "new"), PLANTED, ids=[f"{old} -> {new}" for _, old, new in PLANTED])
def test_a_planted_bug_is_caught(check: Callable[[Any], None], old: str, new: str) -> None:
    with pytest.raises((AssertionError, ValueError, TypeError, Unsupported, pytest.fail.Exception)):
        check(mutated(beside, (old, new)))
