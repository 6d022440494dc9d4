"""The parts of the checker by themselves: what a step may be off, what a hint says, how a failure counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mutation import mutated

from precond_ref.conformance import contract, diagnose, generated, results, runner, tolerance, vectors
from precond_ref.conformance.processes import Ended
from precond_ref.conformance.results import Gap, Report, Result
from precond_ref.conformance.subjects import Reference

U = 2.0**-53


def failed(
    id: str, *, step: int = 1, quantity: str = "update", cosine: float = 1.0, norm: float = 1.0, tier: str = "must"
) -> Result:
    gap = Gap(step, quantity, 0.5, 0.25, 2.0, cosine, norm)
    return Result(id, tier, results.FAILED, f"why {id}", gap)


def report(*found: Result, **more: Any) -> Report:
    return Report("SGD", "target", "float64", 0, results=[*found], **more)


def check_hints(tool: ModuleType) -> None:
    """The first quantity that departs, a state before the update that it makes; whether only lengths are wrong."""

    def said(*found: Result, runs: Any = ()) -> list[str]:
        return tool._hints(report(*found, runs=[*runs]))

    late, state = failed("a", step=3), failed("b", step=2, quantity="state.m")
    assert said(late, failed("c", step=2), state)[0] == "First to depart: state.m at step 2 of b (why b)."
    assert said(failed("a", tier="should"), failed("c"))[0].startswith("First to depart: update at step 1 of c ")
    finite, other = (SimpleNamespace(params=np.array([1.0, x])) for x in (2.0, math.nan))
    assert said(late, runs=[finite, other])[1:] == ["Not finite in 1 of 2 cases; NaN agrees with nothing."]
    equal = [failed("a", norm=1.375), failed("b", norm=1.375)]
    assert said(*equal)[1:] == ["Every step has the right direction and 1.375 times the right length."]
    (unequal,) = said(failed("a", norm=1.375), failed("b", norm=0.75, cosine=1 - 5e-7))[1:]
    assert unequal.startswith(
        "The first wrong steps have the right direction, and 0.75 to 1.375 times the right length"
    )
    assert len(said(*equal, failed("c", norm=1.375, cosine=1 - 2e-6))) == 1
    assert len(said(failed("a", norm=1 + 1e-7), failed("b", norm=1 + 1e-7))) == 1
    assert len(said(failed("a", norm=1.0005), failed("b", norm=1.375))) == 1
    assert said(state)[1:] == said()[1:] == []


def check_distance(tool: ModuleType) -> None:
    """No error is none; NaN agrees with NaN in the same place; what moves where nothing moves is infinitely off."""
    about = {"kappa": [1.0] * 2, "exponent": 0.5, "stale": False, "decompositions": [1] * 2}
    case = SimpleNamespace(conditioning=about, kind="trace", narrow=False, shape=(2,), stack_ndim=0)

    def distance(got: Any, want: Any) -> Any:
        run = SimpleNamespace(case=case, params=np.array(got, float)[:, None, :])
        return tool._distance(run, np.array(want, float)[1:, None, :], "float64")

    path = [[0.0, 0.0], [1.0, 2.0], [3.0, 2.0]]
    assert distance(path, path) == (0.0, 0.0)
    error, ratio = distance([*path[:2], [3.0, 3.0]], path)
    assert error == 0.5
    assert ratio == pytest.approx(1 / tolerance.of_update(16 * U, "float64", np.array(path[1]), np.array(path[2])))
    spoilt = [*path[:2], [math.nan, 2.0]]
    assert distance(spoilt, path) == distance(path, spoilt) == (math.inf, math.inf)
    assert distance(spoilt, spoilt) == (0.0, 0.0)
    assert distance([[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]])[0] == math.inf


def check_zeros(tool: ModuleType) -> None:
    """NaN where all gradients up to that step were zero, and nowhere else."""

    def of(grads: Any, *params: Any) -> bool:
        made = np.array(params, float)[:, None, :]
        return tool._nan_of_zeros(SimpleNamespace(tensors={"grads": np.array(grads, float)}, params=made))

    nan, grads = math.nan, [[0, 1], [0, 1], [1, 1]]
    assert of(grads, [0, 0], [nan, 1], [nan, 2], [nan, 3])
    assert of(grads, [0, 0], [0, 1], [nan, 2], [nan, nan])  # the first step that is not finite
    assert not of(grads, [0, 0], [nan, nan], [nan, nan], [nan, nan])
    assert not of(grads, [0, 0], [0, 1], [0, 2], [nan, 3])
    assert not of(grads, [0, 0], [0, 1], [0, 2], [1, 3])


def check_astray(tool: ModuleType) -> None:
    """Half as much again of every step is half of the way, whole or folded; the worst member counts."""

    def off(before: Any, after: Any, truth: Any, fold: int = 0) -> float:
        params = np.stack([np.array(before, float), np.array(before, float) + 9, np.array(after, float)])
        case = SimpleNamespace(steps=2, stack_ndim=1, fold=fold)
        true = [generated.folded(x, fold) for x in np.array(truth, float)]
        stored = np.stack([np.full_like(np.stack(true), 7), np.stack(true)])
        return tool._astray(SimpleNamespace(case=case, params=params, tensors={"params": stored}))

    ways = [[3.0, 4.0, 0.0, 1.0], [1.0, 0.0, 2.0, 2.0]]
    for fold in (0, 2):
        start, way = np.array([[5.0, 6.0, 7.0, 8.0], [1.0, 2.0, 4.0, 8.0]]), np.array(ways)
        assert off(start, start + 1.5 * way, start + way, fold) == pytest.approx(0.5)
        assert off(start, start + np.array([[1.0], [1.25]]) * way, start + way, fold) == pytest.approx(0.25)
        assert off(start, start + np.array([[1.25], [1.0]]) * way, start + way, fold) == pytest.approx(0.25)
        assert off(start, start + way, start + way, fold) == pytest.approx(0.0, abs=1e-15)
    assert off(start, start + math.nan * way, start + way) == math.inf


def check_ties(tool: ModuleType) -> None:
    """Beside the best name stand those that no case tells apart from it, up to ten times its error, or rounding."""
    errors = {"a": 0.0, "b": 5e-15, "c": 2e-14, "d": 0.2, "": 1.0}
    known = SimpleNamespace(generic={}, flags=dict.fromkeys("abcd", ""), exclusive=())
    run = SimpleNamespace(case=SimpleNamespace(narrow=False))
    tool._explain = lambda runs, flags, dtype, stop=False: [(errors["".join(flags)], 0.0 if flags else 9.0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool.variants, "choices", lambda known, size: [frozenset(f) for f in "cbad"])
        patch.setattr(tool.variants, "describe", lambda known, flags: "".join(flags))

        def names() -> list[str]:
            return [m.text for m in tool._search([run], frozenset(), known, "float64", 1)]

        assert names() == ["a", "b"]
        errors["a"] = 3e-15
        assert names() == ["a", "b", "c"]
        known.generic = {"b": ""}  # says no more than another
        assert names() == ["a", "c"]
        known.generic = dict.fromkeys("abc", "")
        assert len(names()) == 1


def check_extension(tool: ModuleType) -> None:
    """The nearest is extended by flags that can be on beside it, and from pairs only if pairs are asked for."""
    known = SimpleNamespace(
        generic={}, flags=dict.fromkeys("abc", ""), exclusive=(frozenset("ab"),), texts=dict.fromkeys("abc", "")
    )
    tried: list[str] = []

    def explained(runs: Any, failing: Any, known: Any, flags: Any, dtype: str, beat: int = -1) -> Any:
        tried.append("".join(sorted(flags)))
        wrong = {"": 3, "a": 2, "ac": 1}.get(tried[-1], 3)
        return None if 3 - wrong <= beat else tool.Match(tuple(sorted(flags)), "", 0.0, 3 - wrong, ("x",) * wrong)

    tool._explained = explained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool.variants, "COMMON", {})
        assert tool._greedy([None] * 3, frozenset(), known, "float64", False).flags == ("a", "c")
        assert tried == ["", "a", "b", "c", "ac"]
        tried.clear()
        tool._greedy([None] * 3, frozenset(), known, "float64", True)
        assert tried == ["", "a", "b", "c", "ac", "bc"]


def check_refusal(tool: ModuleType) -> None:
    """An invalid configuration is refused by ValueError or TypeError; the result does not count."""
    case = next(c for c in vectors.cases(kind="reject") if c.argument != "stack_ndim")
    for error, status, words in (
        (None, "failed", f"was accepted: {case.argument}"),
        (ValueError("no"), "passed", "no"), (TypeError("no"), "passed", "no"),
        (NotImplementedError("none"), "skipped", "none"), (ZeroDivisionError("0"), "error", "0"),
    ):  # fmt: skip

        def init(config: Any, params: Any, error: Any = error) -> None:
            assert params[0].shape == case.shape
            if error:
                raise error

        result = tool._reject(SimpleNamespace(init=init), case, "float64")
        assert (result.status, result.bad) == (status, False)
        assert words in result.message
    asked = tool._reject(None, replace(case, argument="stack_ndim"), "float64")
    assert asked.status == "skipped"


def check_primitive(tool: ModuleType) -> None:
    """A primitive passes up to its tolerance, its worst result counts, and without one it is skipped."""
    case = next(c for c in vectors.cases(kind="primitive") if len(vectors.load(c).keys() - {*c.inputs}) > 1)
    truth = vectors.load(case)
    made = [name for name in truth if name not in case.inputs]
    allowed = tolerance.of_case(case, "float64", 1)

    def given(share: float) -> Any:
        out = {name: truth[name] * (1 + share * allowed * (name == made[0])) for name in made}
        return tool._primitive(SimpleNamespace(primitive=lambda name, config, tensors: out), case, "float64")

    assert [given(share).status for share in (0.0, 0.5, 2.0)] == ["passed", "passed", "failed"]
    assert tool._primitive(SimpleNamespace(), case, "float64").status == "skipped"
    assert tool._primitive(SimpleNamespace(primitive=lambda *_: 1 / 0), case, "float64").status == "error"
    assert case.id in tool.ids("SGD", level=2)


def check_one_case(tool: ModuleType) -> None:
    """A case by itself passes or fails; a process that ended is an error of its."""
    case = next(c for c in results.cases("SGD") if c.tier == "must" and not c.config["momentum"])

    class Longer(Reference):
        def step(self, grads: Any) -> Any:
            return super().step([1.25 * g for g in grads])

    class Gone(Reference):
        def step(self, grads: Any) -> Any:
            raise Ended("it ended")

    found = [tool.run_case(subject(), case) for subject in (Reference, Longer, Gone)]
    assert [r.status for r in found] == ["passed", "failed", "error"]
    assert found[1].gap.norm_ratio == pytest.approx(1.25)
    assert found[2].message == "it ended"


def check_path(tool: ModuleType) -> None:
    """After three steps the errors of all three may have come together, each by its own length."""
    about = {"kappa": [1.0, 4.0, 9.0], "exponent": 0.5, "stale": False, "decompositions": [1] * 3}
    case = SimpleNamespace(conditioning=about, kind="trace", narrow=False, shape=(2,), stack_ndim=0, fold=0)
    params = np.array([[3.0, 4.0], [3.0, 5.0], [3.0, 8.0], [3.0, 10.0]])
    lengths, sizes = [1.0, 3.0, 2.0], [math.hypot(*p) for p in params]
    limit = sum(16 * U * k * n + 2 * U * (a + b)
                for k, n, a, b in zip([1, 4, 9], lengths, sizes, sizes[1:], strict=False))  # fmt: skip
    gap = tool._path(SimpleNamespace(case=case, params=params[:, None]), 3, 0, "float64", None, params[3] + [0, 1e-9])
    assert gap.tolerance == pytest.approx(limit / math.hypot(3, 10 + 1e-9), rel=1e-12, abs=0)


def check_count(tool: ModuleType) -> None:
    """Expected failures, cases that were left out, and how much was seen."""

    def of(*found: Result, **more: Any) -> Any:
        return tool.Report("SGD", "target", "float64", 0, results=[*found], **more)

    passed, left, should, may = (Result(*r) for r in (("a", "must", "passed"), ("b", "must", "skipped"),
                                                      ("c", "should", "skipped"), ("d", "may", "skipped")))  # fmt: skip
    wrong, contract = failed("e"), Result("contract/inputs", "must", "skipped")
    found = of(passed, left, should, may, wrong, contract, xfails=("a", "e", "z"))
    assert found.failures == []
    assert found.unexpected_passes == ["a"]
    assert found.unknown_xfails == ["z"]
    assert of(passed, wrong).failures == [wrong]
    for require, missing in (("", []), ("must", ["b"]), ("should", ["b", "c"])):
        assert of(passed, left, should, may, contract, require=require).missing == missing
    assert of(left, xfails=("b",), require="must").missing == []
    assert [of(*found).scarce for found in ((passed, left), (passed, left, replace(left, id="f")), (contract,))] == [
        False, True, False,
    ]  # fmt: skip


def check_contract(tool: ModuleType) -> None:
    """A changed gradient and another dtype are told apart; which parameter departs from its steps alone is told."""
    seen = ["dtype float32 came back", "the gradient is changed", "the gradient is changed again"]
    assert tool.purity(SimpleNamespace(touched=seen)) == "the gradient is changed"
    assert tool.purity(SimpleNamespace(touched=seen[:1])) == ""
    assert tool.precision(SimpleNamespace(touched=seen, longest=None, dtype="float64")) == seen[0]
    for dtypes, said in (("float32", ""), ("float64", "a parameter of float32 comes back as float64")):

        def step(grads: Any, dtype: str = dtypes) -> Any:
            return [np.array(g, dtype) for g in grads]

        subject = SimpleNamespace(features=("single",), step=step)
        trial = SimpleNamespace(subject=subject, begin=lambda parts, single: None)
        assert tool._single(trial, SimpleNamespace(grads=np.zeros((3, 2)))) == said
        subject.features = ()
        assert tool._single(trial, SimpleNamespace(grads=np.zeros((3, 2)))) == ""
    still, moved = np.zeros((3, 2)), np.cumsum(np.ones((3, 2)), axis=0)
    part = SimpleNamespace(alone=moved, gap=lambda seen, dtype: 0.0 if seen is moved else 7.0)
    for paths, said in (
        ([moved, moved], ""),
        ([moved, 2 * moved], "of 2 parameters, number 2 makes other steps than alone, by 7 times"),
        ([still, moved], "of 2 parameters, number 1 does not move"),
    ):  # fmt: skip
        played = SimpleNamespace(dtype="float64", engine={}, played=lambda parts, paths=paths: paths)
        found = tool.Trial.departs(played, [part, part])
        assert found.startswith(said)
        assert bool(found) == bool(said)


CHECKS: dict[Callable[[Any], None], ModuleType] = {
    check_hints: diagnose, check_distance: diagnose, check_zeros: diagnose, check_ties: diagnose,
    check_extension: diagnose, check_astray: runner, check_refusal: runner, check_one_case: runner,
    check_primitive: runner, check_path: runner, check_count: results, check_contract: contract,
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_checker(check: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_explain", "_explained"):
        monkeypatch.setattr(diagnose, name, getattr(diagnose, name))  # which two of the checks exchange
    check(CHECKS[check])


PLANTED = [
    (check_hints, "g.cosine > 1 - 1e-6", "g.cosine > 1"),
    (check_hints, 'r.gap.quantity == "update", r.tier', "0, r.tier"),
    (check_hints, "> 1e-3:", "> -1:"),
    (check_hints, "abs(factors[0] - 1) > 1e-6", "True"),
    (check_distance, "worst, worst_ratio = 0.0, 0.0", "worst, worst_ratio = -1.0, 0.0"),
    (check_distance, "return math.inf, math.inf\n            keep", "pass\n            keep"),
    (check_distance, "difference / size if size else math.inf", "difference / size if size else 0.0"),
    (check_zeros, '["grads"][: bad + 1]', '["grads"][: bad + 2]'),
    (check_zeros, '["grads"][: bad + 1]', '["grads"][:bad]'),
    (check_zeros, "if bad is None:\n        return False", "if bad is None:\n        return True"),
    (check_astray, "got - first, want - first", "got, want"),
    (check_astray, "run.params[-1]", "run.params[1]"),
    (check_astray, "case, 1)[-1]", "case, 1)[0]"),
    (check_astray, "return max(errors)", "return errors[0]"),
    (check_astray, "return max(errors)", "return errors[-1]"),
    (check_astray, "true[:-1] if generated.folds(end.shape, case.fold) else true", "true"),
    (check_ties, "max(10 * found[0].error, 1e-14)", "10 * found[0].error"),
    (check_ties, "max(10 * found[0].error, 1e-14)", "1e-14"),
    (check_ties, "<= known.generic.keys()] or found[:1]", "<= known.generic.keys()]"),
    (check_extension, "if variants.compatible(known, flags)]", "]"),
    (check_extension, "(1, 2) if pairs else (1,)", "(1,) if pairs else (1, 2)"),
    (check_refusal, ', message=f"was accepted: {case.argument}"', ""),
    (check_refusal, "except (ValueError, TypeError) as error:", "except ValueError as error:"),
    (check_primitive, "PASSED if worst.ratio <= 1 else FAILED", "PASSED"),
    (check_primitive, "worst = max(found", "worst = min(found"),
    (check_one_case, "return _trace(subject, case, dtype, level, [])[0]", "return case"),
    (check_one_case, "case.why, gap=failing[0]", "case.why, gap=None"),
    (check_path, "seen[1:] - seen[:-1]", "seen[1:]"),
    (check_path, "for s in range(1, t + 1)", "for s in range(t, t + 1)"),
    (check_contract, 'if not m.startswith("dtype")', 'if not "dtype"'),
    (check_contract, '(dtypes != {"float32"})', '(dtypes == {"float32"})'),
    (check_contract, "enumerate(zip(parts, played, strict=True), start=1)",
     "enumerate(zip(parts, played, strict=True))"),
    (check_count, "in self.xfails and r.status == PASSED", "in self.xfails and r.status != PASSED"),
    (check_count, "TIERS.index(self.require) + 1", "TIERS.index(self.require)"),
    (check_count, "2 * len(self.left_out", "len(self.left_out"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "old", "new"), PLANTED, ids=[f"{old} -> {new}" for _, old, new in PLANTED])
def test_a_planted_bug_is_caught(check: Callable[[Any], None], old: str, new: str) -> None:
    with pytest.raises((AssertionError, ValueError, IndexError, AttributeError)):
        check(mutated(CHECKS[check], (old, new)))
