"""Right optimizers pass; wrong ones, right in all cases of the vectors, are caught by the check that looks for them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conformance_subjects import Here, Variant, optax_target, torch_target
from typer.testing import CliRunner
from wrong_optimizers import RIGHT, WRONG, source, target

import precond_ref
from precond_ref.cli import application
from precond_ref.conformance import beside, check, contract, isolation, results, subjects, wrap
from precond_ref.conformance.isolation import Isolated
from precond_ref.conformance.subjects import Reference

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
pytest.importorskip("torch")
pytest.importorskip("optax")
NARROW = ("torch Shampoo", "numpy Adam", "optax Adam")
"""One of each library for single precision, the others in the deep tests."""
SEEN_TWICE = {"one count for all", "small eigenvalues dropped"}  # by other checks, too
BEFORE = {"gradient-untouched", "dtype", "repeatable", "independent", "groups", "no-gradient", "nonfinite", "resume",
          "options", "process-untouched"}  # fmt: skip


def report_on(name: str, **options: Any) -> results.Report:
    made, method = target(name)
    return check(wrap(made, dtype=options.get("dtype", "float64")), method, diagnose=False, **options)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] * ("optax" in n)) for n in RIGHT])
def test_a_right_optimizer_passes(name: str) -> None:
    report = report_on(name)
    assert [f"{r.id}: {r.message}" for r in report.failures] == []
    tried = {r.id for r in report.results if r.status == "passed"}
    assert {f"contract/{c}" for c in ("inputs", "long-run", "shapes", "sizes", "values", "many")} <= tried
    assert report.untried == []


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.full if n in NARROW else pytest.mark.deep) for n in RIGHT]
)
def test_a_right_optimizer_passes_in_single_precision(name: str) -> None:
    assert report_on(name, dtype="float32").failures == []


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.deep
def test_a_right_optimizer_passes_in_depth(name: str) -> None:
    assert report_on(name, deep=True).failures == []


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.deep
def test_a_wrong_optimizer_is_caught_by_all_that_there_is(name: str) -> None:
    assert not report_on(name).ok


@pytest.mark.usefixtures("first_version")
@pytest.mark.parametrize("name", WRONG)
@pytest.mark.full
def test_a_wrong_optimizer_is_caught(name: str) -> None:
    report, caught = report_on(name), f"contract/{WRONG[name].caught}"
    found = [r.id for r in report.failures]
    assert caught in found if name in SEEN_TWICE else found == [caught]
    assert all(r.message for r in report.failures if r.id == caught)
    assert not {r.id for r in report.failures if r.tier == "must" and "contract/" not in r.id}  # the vectors pass


def test_the_compiler_knows_the_options_of_a_check() -> None:
    optax = subjects.Optax(target("optax Adam")[0])
    assert optax.quick == subjects.QUICK  # else a check takes longer, or waits for ever where stacks are decomposed
    optax.__dict__.pop("quick")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(subjects.QUICK, "xla_cpu_of_an_earlier_time", True)
        assert "xla_cpu_of_an_earlier_time" not in optax.quick


@pytest.mark.full
@pytest.mark.usefixtures("first_version")
def test_a_right_update_that_is_compiled_by_itself_passes() -> None:
    found: dict[str, Any] = {}
    exec(source("optax Adam")[0].replace("(init, update)", "(init, jax.jit(update))"), found)
    assert check(wrap(found["Target"]), "Adam", diagnose=False).failures == []


@pytest.mark.full
@pytest.mark.usefixtures("first_version")
@pytest.mark.parametrize("name", ["clamped at 5 in JAX", "above 4096 entries in JAX"])
def test_what_cannot_be_compiled_is_looked_at_all_the_same(name: str) -> None:
    wrong, found = WRONG[name], {}
    text = source(wrong.base)[0].replace(wrong.old, wrong.new).replace('t = state["t"] + 1', 't = int(state["t"]) + 1')
    exec(text, found)
    report = check(wrap(found["Target"]), "Adam", diagnose=False)
    assert [r.id for r in report.failures] == [f"contract/{wrong.caught}"]
    assert any("under jax.jit: " in note for note in report.notes)


@pytest.mark.full
@pytest.mark.usefixtures("first_version")
def test_what_is_wrong_everywhere_and_cannot_be_compiled_is_accused_of_steps_not_of_errors() -> None:
    found: dict[str, Any] = {}
    text = source("optax Adam")[0].replace("return -rate * (u", "return -1.01 * rate * (u")
    exec(text.replace('t = state["t"] + 1', 't = int(state["t"]) + 1'), found)
    report = check(wrap(found["Target"]), "Adam", diagnose=False)
    assert {"Adam/plain", "Adam/decay"} <= {r.id for r in report.failures}
    assert [f"{r.id}: {r.message}" for r in report.results if r.status == "error"] == []


def test_each_check_has_a_mistake_that_it_alone_catches() -> None:
    assert {wrong.caught for name, wrong in WRONG.items() if name not in SEEN_TWICE} >= contract.CHECKS.keys() - BEFORE


@pytest.mark.usefixtures("first_version")
@pytest.mark.parametrize("name", ["lr of the constructor", "clamped at 5", "blocks above 16", "state starts again"])
def test_wrong_optimizers_are_caught_in_single_precision(name: str) -> None:
    assert [r.id for r in report_on(name, dtype="float32").failures] == [f"contract/{WRONG[name].caught}"]


@pytest.mark.full
def test_what_begins_after_a_thousand_steps_is_seen_by_a_deep_check() -> None:
    text = source("numpy Adam")[0].replace("return (1 - lr", "u = u * (1 if t <= 1000 else 0.99); return (1 - lr")
    found: dict[str, Any] = {}
    exec(text, found)
    assert check(wrap(found["Target"]), "Adam").ok
    report = check(wrap(found["Target"]), "Adam", deep=True)
    assert [r.id for r in report.failures] == ["contract/long-run"]
    assert ": step 1001 is off by " in report.failures[0].message


@pytest.mark.full
def test_a_ninth_parameter_that_is_lost_at_step_50_is_seen_by_a_deep_check(monkeypatch: pytest.MonkeyPatch) -> None:
    old = 't = int(state["step"])'
    text = source("torch Adam")[0]
    assert text.count(old) == 1
    found: dict[str, Any] = {}
    exec(text.replace(old, f"{old}; g = g * (number < 8 or t != 50)"), found)
    monkeypatch.setattr(contract, "CHECKS", {"many": contract.CHECKS["many"]._replace(after=())})
    assert check(wrap(found["Target"]), "Adam", diagnose=False).ok
    report = check(wrap(found["Target"]), "Adam", diagnose=False, deep=True)
    assert [r.id for r in report.failures] == ["contract/many"]


def test_a_step_that_widens_single_precision_is_noted() -> None:
    said = "a parameter of float32 comes back as float64"
    text = source("numpy Adam")[0]
    for old, noted in (("", False), ("np.zeros_like(param), np.zeros_like(param)", True)):
        found: dict[str, Any] = {}
        exec(text.replace(old, "np.zeros(param.shape), np.zeros(param.shape)") if old else text, found)
        report = check(wrap(found["Target"]), "Adam", diagnose=False)
        assert report.ok
        assert (said in report.notes) == noted


class Limited(Reference):
    """The method with a limit that its own fields rarely reach, on its direction or its state."""

    def __init__(self, limit: Any):
        super().__init__()
        self.limit = limit

    def init(self, config: Any, params: Any, **options: Any) -> None:
        super().init(config, params, **options)
        method, limit = self.method, self.limit

        class Method:
            def __getattr__(self, name: str) -> Any:
                return getattr(method, name)

            def update(self, *given: Any) -> Any:
                return limit(*method.update(*given))

        self.method: Any = Method()


def _up_to_10(direction: Any, state: Any) -> Any:
    return np.clip(direction, -10, 10), state


def _rms_up_to_3(direction: Any, state: Any) -> Any:
    axes = tuple(range(state.m.ndim - direction.ndim, direction.ndim))
    size = np.sqrt(np.mean(direction**2, axis=axes, keepdims=True))
    return direction / np.maximum(1, size / 3), state


def _eigenvalues_from_1e_12(direction: Any, state: Any) -> Any:
    def floored(root: Any) -> Any:
        least = 1e-12 * np.max(root.eigenvalues, axis=-1, keepdims=True)
        return root._replace(eigenvalues=np.maximum(root.eigenvalues, least))

    return direction, state._replace(factors=tuple(map(floored, state.factors)))


LIMITS = {"Adam": _up_to_10, "SOAP": _rms_up_to_3, "KLShampoo": _eigenvalues_from_1e_12}


@pytest.mark.parametrize("method", ["Adam", *(pytest.param(m, marks=pytest.mark.deep) for m in LIMITS if m != "Adam")])
@pytest.mark.full
def test_a_limit_that_few_steps_reach_is_seen_by_a_deep_check(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "CHECKS", {"bursts": contract.CHECKS["bursts"]._replace(after=())})
    assert check(Limited(lambda *out: out), method, deep=True, diagnose=False).failures == []
    report = check(Limited(LIMITS[method]), method, deep=True, diagnose=False)
    assert [r.id for r in report.failures] == ["contract/bursts"]


PRODUCTION = """
import numpy as np

def Target(param, grad, state, *, lr, beta1=0.9, beta2=1.0, beta3=None, eps=1e-12, every=1, max_dim=1024, target=1):
    if param.size > max_dim or (target != 1 and param.ndim != 1):
        raise NotImplementedError("more than one statistic")
    beta3 = beta1 if beta3 is None else beta3
    g = grad.reshape(-1)
    t, m, gram, root = state or (0, np.zeros_like(g), np.zeros((g.size, g.size)), np.eye(g.size))
    t, f = t + 1, (beta3 * m + (1 - beta3) * g) / (1 - beta3 * beta1**t)
    m = beta1 * m + (1 - beta1) * g
    gram = beta2 * gram + (1 if beta2 == 1 else 1 - beta2) * np.outer(g, g)
    if t % every == 0:
        w, q = np.linalg.eigh(gram / (1 - beta2**t if beta2 < 1 else 1))
        root = (q * (np.maximum(w, 0) + eps) ** -0.5) @ q.T
    return param - lr * (root @ f).reshape(param.shape), (t, m, gram, root)
"""


@pytest.mark.parametrize("floor", [0.0, 1e-7])
def test_rounding_that_a_tiny_ridge_enlarges_is_no_failure(floor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default eps = 1e-12 makes 1e-10 of the rounding in the null space of the first statistic."""
    found: dict[str, Any] = {}
    exec(PRODUCTION.replace("+ eps)", f"+ max(eps, {floor}))"), found)
    monkeypatch.setattr(contract, "CHECKS", {"long-run": contract.CHECKS["long-run"]._replace(after=())})
    report = check(wrap(found["Target"]), "Shampoo.production", diagnose=False)
    assert [r.id for r in report.failures] == ["contract/long-run"] * (floor > 0)
    assert report.ran > 0


class Reversed(Reference):
    """The method with the entries of all axes in reverse: right, with other eigenvectors of multiple eigenvalues."""

    def init(self, config: Any, params: Any, **options: Any) -> None:
        super().init(config, [np.flip(p) for p in params], **options)

    def step(self, grads: Any) -> Any:
        return [np.flip(p) for p in super().step([None if g is None else np.flip(g) for g in grads])]


class ReversedFromTheFirst(Reversed):
    """With bases from the first update on: EShampoo's D has no entries of other coordinates."""

    def init(self, config: Any, params: Any, **options: Any) -> None:
        if config["every"] > 1:
            raise subjects.Unsupported("every")
        super().init(config, params, **options)


@pytest.mark.parametrize("noticed", [True, False])
@pytest.mark.parametrize(
    ("constructor", "subject", "kind"),
    [("SOAP", Reversed, "sparse gradients"), ("EShampoo", ReversedFromTheFirst, "large gradients")],
)
@pytest.mark.full
def test_another_basis_of_a_multiple_eigenvalue_is_no_failure(
    constructor: str, subject: type[Reversed], kind: str, noticed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not noticed:
        monkeypatch.setattr(getattr(precond_ref, constructor), "free_basis", "renewed")
    monkeypatch.setattr(beside, "READINGS", {})  # other columns for dependent ones are another matter
    beside.agreed.cache_clear()
    monkeypatch.setattr(contract, "CHECKS", {"sizes": contract.CHECKS["sizes"]._replace(after=())})
    monkeypatch.setattr(beside, "KINDS", {kind: beside.KINDS[kind]})
    report = check(subject(), constructor, diagnose=False, deep=True)
    beside.agreed.cache_clear()
    assert [r.id for r in report.failures] == ["contract/sizes"] * (not noticed)


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.full
def test_a_row_of_zeros_is_tried_where_a_larger_null_space_has_no_basis(
    wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Longer(Reference):
        def step(self, grads: Any) -> Any:
            before, after = [np.array(p) for p in self.params], super().step(grads)
            asleep = wrong and any(g is not None and g.ndim and g.any() and not g[0].any() for g in grads)
            return [q + 0.01 * asleep * (q - p) for p, q in zip(before, after, strict=True)] if asleep else after

    monkeypatch.setattr(contract, "CHECKS", {"sizes": contract.CHECKS["sizes"]._replace(after=())})
    report = check(Longer(), "EShampoo", diagnose=False)
    assert [r.id for r in report.failures if r.id.startswith("contract/")] == ["contract/sizes"] * wrong


MUON = """
import numpy as np

def Target(param, grad, state, *, lr, momentum=0.95, nesterov=False, rms=None, weight_decay=0.0):
    m = momentum * (0 if state is None else state) + (1 - momentum) * grad
    u, s, vt = np.linalg.svd((1 - momentum) * grad + momentum * m if nesterov else m, full_matrices=False)
    o = (u * (s > CUT * s.max())) @ vt
    return (1 - lr * weight_decay) * param - lr * o * (1 if rms is None else rms * max(o.shape) ** 0.5), m
"""


def test_singular_values_far_below_the_largest_count() -> None:
    for cut in ("1e-13", "1e-4"):
        found: dict[str, Any] = {}
        exec(MUON.replace("CUT", cut), found)
        report = check(wrap(found["Target"]), "Muon.exact", diagnose=False)
        assert [r.id for r in report.failures] == ["contract/sizes"] * (cut == "1e-4")


def test_what_is_wrong_at_an_edge_is_looked_at_elsewhere() -> None:
    """A 0/0 in a case of tier must is no reason not to see a clamp."""
    text = source("numpy Adam")[0].replace("np.where(root == 0, 1, root)", "root")
    for clamp, failing in (("", []), ("grad = grad.clip(-1e6, 1e6); ", ["contract/sizes"])):
        found: dict[str, Any] = {}
        exec(text.replace("t, m, v = t + 1,", f"{clamp}t, m, v = t + 1,"), found)
        with np.errstate(all="ignore"):
            report = check(wrap(found["Target"]), "Adam", diagnose=False)
        assert [r.id for r in report.failures if r.id.startswith("contract/")] == failing
        assert any(not r.id.startswith("contract/") for r in report.failures)
        assert bool(report.edges) == (not failing)


@pytest.mark.parametrize(
    ("constructor", "reading"),
    [
        ("SShampoo", "eps-everywhere"),
        ("SShampoo.practical", "eps-everywhere"),
        ("SOAP", "other-completion"),  # LAPACK's QR replaces columns that depend on earlier ones by any others
    ],
)
@pytest.mark.full
def test_another_reading_of_the_source_is_not_accused(
    constructor: str, reading: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> set[str]:
        report = check(Variant({reading}), constructor, diagnose=False)
        return {r.id for r in report.results if r.status == "failed" and not r.id.startswith("SShampoo/")}

    assert failing() == set()
    beside.agreed.cache_clear()
    monkeypatch.setattr(beside, "READINGS", {})
    assert failing()
    beside.agreed.cache_clear()


def test_what_a_nan_does_is_noted() -> None:
    text, skip = source("numpy Adam")[0], "if not np.isfinite(grad).all(): return param, "
    for policy, noted in (
        ("", "comes out as NaN"),
        (f"{skip}state", "skips the step of its parameter"),
        (f"{skip}(t, m * np.nan, v)", "skips the step of its parameter, which is NaN in a later step"),
    ):
        found: dict[str, Any] = {}
        exec(text.replace("    t, m, v = t + 1,", f"    {policy}\n    t, m, v = t + 1,"), found)
        report = check(wrap(found["Target"]), "Adam", diagnose=False)
        assert report.ok
        assert [n for n in report.notes if "NaN" in n] == [f"a NaN in the gradient {noted}"]


@pytest.mark.parametrize("hidden", [False, True])
def test_a_nan_that_stops_its_parameter_for_ever_is_a_failure(hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    start = "u = np.nan_to_num(u); " * hidden
    exec(source("numpy Adam")[0].replace("return (1 - lr", f"{start}return (1 - lr"), found)
    monkeypatch.setattr(contract, "CHECKS", {"nonfinite": contract.CHECKS["nonfinite"]._replace(after=())})
    report = check(wrap(found["Target"]), "Adam", diagnose=False)
    assert [(r.id, "stops its parameter for ever" in r.message) for r in report.failures] == [
        ("contract/nonfinite", True)
    ] * hidden


@pytest.mark.parametrize("replaced", [False, True])
def test_a_nan_is_looked_for_where_the_second_update_moves(replaced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """KL-Shampoo's average begins at its second update: there 0 in the place of a NaN looks like a skipped step."""

    class Replacing(Reference):
        def step(self, grads: Any) -> Any:
            return super().step([np.nan_to_num(g, nan=0.0) if replaced else g for g in grads])

    monkeypatch.setattr(contract, "CHECKS", {"nonfinite": contract.CHECKS["nonfinite"]._replace(after=())})
    report = check(Replacing(), "KLShampoo", diagnose=False)
    assert [r.id for r in report.failures] == ["contract/nonfinite"] * replaced


def test_messages_say_where_and_what_to_look_for() -> None:
    said = {name: report_on(name).failures[0].message for name in ("lr of the first group", "foreach ignored", "break")}
    assert "another lr in group 1 of 2" in said["lr of the first group"]
    assert "parameter 2 of 2, step 1 is off by 7.5e-01 of its length" in said["lr of the first group"]
    assert "look for param_groups[0]" in said["lr of the first group"]
    assert said["foreach ignored"] == "foreach=True is ignored: no kernel ran whose name begins with _foreach_"


@pytest.mark.usefixtures("first_version")
@pytest.mark.full
def test_the_process_of_its_own_tells_as_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, caught in (
        ("torch Adam", ""),
        ("foreach ignored", "engines"),
        ("float32 state of bfloat16", "resume-dtypes"),
    ):
        module = f"isolated_{caught.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(source(name)[0], encoding="utf-8")
        subject = Isolated(f"{module}:Target")
        try:
            report = check(subject, "Adam", diagnose=False)
        finally:
            subject.close()
        assert [r.id for r in report.failures] == [f"contract/{caught}"] * bool(caught)


@pytest.mark.parametrize(
    "constructor", ["ASGO", "Adam", *(pytest.param(c, marks=pytest.mark.deep) for c in ("IFShampoo", "SAdaGrad"))]
)
@pytest.mark.full
def test_our_own_are_right(constructor: str) -> None:
    for subject in (Reference("numpy"), wrap(torch_target(constructor))):
        report = check(subject, constructor)
        assert report.failures == []
        assert {"contract/inputs", "contract/long-run"} <= {r.id for r in report.results if r.status == "passed"}


@pytest.mark.parametrize("constructor", ["SGD", "ASGO"])
@pytest.mark.deep
def test_our_transformations_are_right(constructor: str) -> None:
    assert check(wrap(optax_target(constructor)), constructor).failures == []


@pytest.mark.full
def test_optimizers_of_torch_and_optax_are_right() -> None:
    import audit_targets

    for name, method in (
        ("torch_sgd", "SGD"),
        ("torch_adam", "Adam"),
        ("torch_adagrad", "AdaGrad"),
        ("optax_sgd", "SGD"),
    ):
        found = [r.id for r in check(wrap(getattr(audit_targets, name)), method, diagnose=False).failures]
        assert found in ([], [f"{method}/no-eps"])  # 0/0


def test_an_option_that_changes_nothing_and_other_defaults_are_noted() -> None:
    text = source("torch Adam")[0].replace("maximize=False,", "maximize=False, adaptive=False,")
    found: dict[str, Any] = {}
    exec(text.replace("eps=1e-8", "eps=1e-6"), found)
    report = check(wrap(found["Target"]), "Adam")
    assert report.ok
    assert "changes no step: adaptive=True" in report.notes
    assert "defaults that differ: eps 1e-06 (here 1e-08)" in report.notes


@pytest.mark.full
def test_an_argument_that_a_group_has_in_another_form_is_not_set_there() -> None:
    import torch

    class Negative(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float, momentum: float) -> None:
            super().__init__(params, {"lr": lr, "momentum": momentum})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            loss = None if closure is None else torch.enable_grad()(closure)()
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        b = self.state[p].setdefault("b", torch.zeros_like(p))
                        b.mul_(-group["momentum"]).add_(p.grad)
                        p.sub_(group["lr"] * b)
            return loss

    def right(params: Any, lr: float, momentum: float) -> Any:
        return Negative(params, lr, -momentum)

    report = check(wrap(right), "SGD")
    assert report.failures == []
    (found,) = (r for r in report.results if r.id == "contract/group-values")
    assert found.status == "passed"  # of lr


def test_keywords_that_are_passed_on_are_found() -> None:
    import torch

    class Passed(torch.optim.AdamW):
        def __init__(self, params, lr, **kwargs):
            super().__init__(params, lr, **kwargs)

    class Taken(target("torch Adam")[0].__mro__[1]):  # type: ignore[misc]
        def __init__(self, params, **options):
            unknown = options.keys() - {"lr", "beta1", "beta2", "eps", "weight_decay"}
            if unknown:
                raise TypeError(f"got an unexpected keyword argument {unknown.pop()!r}")
            super().__init__(params, options | {"maximize": False, "foreach": False})

        step = target("torch Adam")[0].step

    assert [r.id for r in check(wrap(Passed), "Adam").failures] == ["Adam/no-eps"]
    assert check(wrap(Taken), "Adam").ok
    report = check(wrap(Taken), "AGD")
    assert {r.message for r in report.results if r.status == "skipped"} >= {
        "got an unexpected keyword argument 'delta'"
    } or report.ran == 0


@pytest.mark.parametrize("words", ["no argument {0}", "{0} is not one of lr, eps, beta1, beta2", "unknown: {1}"])
def test_only_the_refused_keyword_is_left_out(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Base(torch.optim.Optimizer):
        def __init__(self, params, defaults):
            super().__init__(params, defaults)

    class Strict(Base):
        def __init__(self, params, lr, weight_decay=0.0, maximize=False, **kw):
            if unknown := sorted(kw.keys() - {"beta1", "beta2", "eps"}):
                raise TypeError(words.format(unknown[0], unknown))
            super().__init__(params, kw | {"lr": lr, "weight_decay": weight_decay, "maximize": maximize,
                                           "foreach": False})  # fmt: skip

        step = target("torch Adam")[0].step

    monkeypatch.setattr(contract, "CHECKS", {"values": contract.CHECKS["values"]._replace(after=())})
    report = check(wrap(Strict), "Adam")
    assert report.ok
    assert report.notes == []  # no refused field is tried with other values
    skipped = {r.id: r.message for r in report.results if r.status == "skipped"}
    assert skipped["Adam/form-amsgrad"].startswith("the target refuses amsgrad: TypeError: ")
    assert all(message.startswith("the target refuses ") for message in skipped.values())
    assert report.ran == 18
    refused = subjects.taken(lambda **kw: Strict([torch.zeros(1, requires_grad=True)], 1.0, **kw), {"delta": 1.0},
                             {}, frozenset({"delta"}))  # fmt: skip
    assert refused == {}


def test_a_limit_that_a_case_does_not_reach_is_no_reason_to_skip_it() -> None:
    def soap(param, grad, state, *, lr, weight_decay, beta1, beta2, shampoo_beta, eps, every):
        raise AssertionError

    lacking = set()
    for case in results.cases("SOAP"):
        try:
            subjects.arguments(soap, results.config_of(case), {})
        except subjects.Unsupported as error:
            lacking |= {case.id} if "max_dim" in str(error) else set()
    assert lacking == {"SOAP/merged", "SOAP/merged-long", "SOAP/no-side", "SOAP/one-side"}
    for case in results.cases("SOAP"):  # the method of a config has its fields
        config = results.config_of(case)
        assert config.method.max_dim == config["max_dim"] == (
            case.config["max_dim"] if case.id in lacking else 10000
        ) or (case.id == "SOAP/channels-last")


class ShortBases(Reference):
    """Axes longer than 64 silently have no basis, or are cut into blocks."""

    def _method(self, config: Any) -> Any:
        method = super()._method(config)
        return method.replace(max_dim=min(method.max_dim, 64))


@pytest.mark.parametrize(
    "constructor", ["EShampoo", *(pytest.param(c, marks=pytest.mark.deep) for c in ("SOAP", "Shampoo.production"))]
)
@pytest.mark.full
def test_long_axes_without_a_basis_are_caught(constructor: str) -> None:
    assert [r.id for r in check(ShortBases(), constructor, diagnose=False).failures] == ["contract/shapes"]


@pytest.mark.usefixtures("first_version")
def test_a_method_with_long_cases_alone_has_a_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "CHECKS", {"inputs": contract.CHECKS["inputs"]._replace(after=())})
    report = check(Reference(), "MBF.authors_code", diagnose=False)
    assert [r.status for r in report.results if r.id == "contract/inputs"] == ["passed"]


# ---- the verdict ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs ``precond-ref check ...`` with a right optimizer as ``whole:Target``, and one without decay as ``part``."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(isolation, "Isolated", Here)
    text = source("numpy Adam")[0]
    (tmp_path / "whole.py").write_text(text, encoding="utf-8")
    (tmp_path / "part.py").write_text(text.replace(", weight_decay=0.0", "").replace("lr * weight_decay", "0"), "utf-8")
    refusing = "    if param.ndim > 1: raise NotImplementedError\n    root ="
    (tmp_path / "little.py").write_text(text.replace("    root =", refusing), "utf-8")
    for name in ("whole", "part", "little"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return lambda *arguments: CliRunner().invoke(application(), ["check", *arguments, "--method", "Adam"])


@pytest.mark.usefixtures("first_version")
def test_the_last_line_says_how_much_was_seen(run: Any) -> None:
    result = run("whole:Target")
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "OK: whole:Target is Adam in all 11 cases")
    result = run("part:Target")
    assert result.exit_code == 0
    last = "part:Target is Adam in 10 of 11 cases (6 of 7 of tier must)"
    assert result.output.splitlines()[-1] == f"OK IN PART: {last}"
    result = run("part:Target", "--require", "must")
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == f"NOT ENOUGH: {last}; --require must does not allow to skip Adam/decay"
    assert run("whole:Target", "--require", "should").exit_code == 0
    result = run("little:Target")
    assert result.exit_code == 4
    last = "little:Target is Adam in 4 of 11 cases (1 of 7 of tier must), which is less than half"
    assert result.output.splitlines()[-1] == f"OK IN PART: {last}"
    result = run("whole:Target", "--require", "may")
    assert result.exit_code == 2
    assert "require must be one of must, should, got 'may'" in result.output


@pytest.mark.usefixtures("first_version")
def test_a_slow_subject_is_told_what_was_not_tried(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"many", "unfreezing", "repeatable"}
    monkeypatch.setattr(contract, "CHECKS", {n: contract.CHECKS[n]._replace(after=(), needs="") for n in names})
    monkeypatch.setitem(contract.SECONDS, False, 0.0)
    file = tmp_path / "report.json"
    said = run("whole:Target", "--json", str(file)).output.splitlines()
    found = json.loads(file.read_text("utf-8"))
    late = [r["id"] for r in found["results"] if r["late"]]
    assert sorted(late) == sorted(found["untried"]) == ["contract/many", "contract/unfreezing"]
    assert said[-2:] == [
        f"not all inputs were tried within the time: {', '.join(late)}",
        "OK IN PART: whole:Target is Adam in all 11 cases",
    ]
    assert "skipped (2): not tried within the time" in said
    result = run("whole:Target", "--require", "must")
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == (
        "NOT ENOUGH: whole:Target is Adam in all 11 cases; --require must does not allow to skip " + ", ".join(late)
    )
    monkeypatch.setitem(contract.SECONDS, False, 60.0)
    result = run("whole:Target", "--require", "must")
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "OK: whole:Target is Adam in all 11 cases")


def test_a_subject_without_the_optional_methods_is_checked() -> None:
    class Bare:
        def init(self, config, params):
            self.lr, self.params = config["lr"], params
            if config["momentum"] or config["weight_decay"]:
                raise subjects.Unsupported("plain")

        def step(self, grads):
            self.params = [p - self.lr * g for p, g in zip(self.params, grads, strict=True)]
            return self.params

    report = check(wrap(Bare), "SGD")
    assert report.ok
    assert {f"contract/{c}" for c in ("inputs", "long-run", "shapes", "sizes", "many")} <= {
        r.id for r in report.results if r.status == "passed"
    }
