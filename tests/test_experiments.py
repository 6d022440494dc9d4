"""The experiments' scripts compile, their pages include what they write, and what is recorded is what the pages say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "experiments"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("common", "theory"))


@pytest.mark.parametrize("name", NAMES)
def test_page_shows_command_figure_and_table(name: str) -> None:
    page = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    assert f"python docs/experiments/{name}.py" in page
    assert f"]({name}.svg)" in page
    assert f"{{include}} {name}-table.txt" in page
    assert f"\n{name}\n" in (FOLDER / "index.md").read_text(encoding="utf-8")
    for suffix in (".svg", "-table.txt", ".json"):
        assert (FOLDER / f"{name}{suffix}").stat().st_size > 0
    json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"), parse_constant=lambda c: pytest.fail(c))


def test_a9a_agrees_with_the_independent_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import a9a

    data = json.loads((FOLDER / "a9a.json").read_text(encoding="utf-8"))
    for name, expected in a9a.EXPECTED.items():
        assert abs(data["grids"][name]["loss"] - expected) <= 1e-4
    losses = [data["sizes"][size]["at 0.1"] for size in ("1", "2", "3", "5", "10", "20", "40", "full matrix")]
    assert np.all(np.diff(losses) < 0)


def test_a_stack_of_rates_is_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grids run all rates as one stack, and FD-SON and RFD-SON by scaling: the same as the method itself."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import a9a

    import precond_ref as pr

    rng = np.random.default_rng(0)
    features, signs = (rng.random((60, 14)) < 0.3) * 1.0, rng.choice((-1.0, 1.0), 60)
    rates = np.array([0.01, 0.1, 0.5])
    for learner, alone in (
        (a9a.LEARNERS["RFD-SON"], lambda lr: pr.RFDSON(size=10, delta=0.0, learning_rate=lr)),
        (a9a.LEARNERS["FD-SON"], lambda lr: pr.FDSON(size=10, delta=0.0, learning_rate=lr)),
        (a9a.LEARNERS["S-AdaGrad"], lambda lr: pr.SAdaGrad(size=10)),
        (a9a.LEARNERS["OGD"], lambda lr: pr.SGD()),
    ):
        stacked, _ = a9a.one_pass(learner.make(0.0), features, signs, rates, learner.unit, learner.power)
        for loss, lr in zip(stacked, rates, strict=True):
            x, total = np.zeros(14), 0.0
            method = alone(float(lr))
            state = method.init(x)
            for t, (a, y) in enumerate(zip(features, signs, strict=True)):
                total += np.logaddexp(0.0, -y * (a @ x))
                direction, state = method.update(-y * a * np.exp(-np.logaddexp(0.0, y * (a @ x))), state, x)
                x = x - lr * (t + 1) ** -learner.power * direction
            assert loss == pytest.approx(total / 60, rel=1e-9)


def test_rank_decision_is_switched_off_and_on_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import a9a

    from precond_ref.numerics import sketch as fd

    kept = fd.update, fd.apply_power
    results = a9a.low_rank_stream()
    assert (fd.update, fd.apply_power) == kept
    assert results["with"] < 1e-10
    assert results["without"] > 0.1
    assert "loose" not in sys.modules
