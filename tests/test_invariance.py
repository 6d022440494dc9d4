"""The laws of the methods: the reference obeys them, and each is broken by some subject and then shown by a script."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conformance_subjects import Variant
from test_conformance import CONSTRUCTORS

from precond_ref.conformance.invariance import LAWS, try_laws
from precond_ref.conformance.results import FAILED, PASSED
from precond_ref.conformance.subjects import Reference

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
@pytest.mark.full
def test_the_reference_obeys_the_laws(constructor: str) -> None:
    results = list(try_laws(Reference("numpy"), constructor, examples=3))
    assert [f"{r.id}: {r.message}" for r in results if r.status != PASSED] == []
    assert len(results) >= 4


@pytest.mark.deep
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_the_reference_obeys_the_laws_on_many_inputs(constructor: str, dtype: str) -> None:
    results = try_laws(Reference("numpy", dtype), constructor, dtype=dtype, examples=300)
    assert [f"{r.id}: {r.message}" for r in results if r.status != PASSED] == []


class Lawless(Variant):
    """A method whose every step is changed by ``bend(step, param, grads so far, lr)``."""

    def __init__(self, bend: Any, flags: Any = ()):
        super().__init__(flags)
        self.bend = bend

    def init(self, config, params):
        super().init(config, params)
        self.plain = self.bent = [p.copy() for p in params]

    def step(self, grads):
        before, self.plain = self.plain, super().step(grads)
        steps = [a - b for a, b in zip(before, self.plain, strict=True)]
        self.bent = [
            x - self.bend(u, x, [g[i] for g, _ in self.grads], self.config["lr"])
            for i, (x, u) in enumerate(zip(self.bent, steps, strict=True))
        ]
        return [x.copy() for x in self.bent]


BENT = {
    "sign": ("AdaGrad", lambda u, x, g, lr: np.abs(u)),
    "rate": ("AdaGrad", lambda u, x, g, lr: lr * u),
    "translation": ("AdaGrad", lambda u, x, g, lr: u + 0.125 * x),
    "zero": ("AdaGrad", lambda u, x, g, lr: u + 0.125),
    "permutation": ("AdaGrad", lambda u, x, g, lr: u * np.arange(1, 1 + u.size).reshape(u.shape)),
    "rotation": ("ASGO.theory", lambda u, x, g, lr: lr * np.sign(u)),
    "scale": ("AdaGrad", lambda u, x, g, lr: u / (1 + np.linalg.norm(g[-1]))),
    "coordinates": ("AdaGrad", lambda u, x, g, lr: u / (1 + np.linalg.norm(u))),
    "order": ("AdaGrad", lambda u, x, g, lr: u + lr * g[0]),
    "first-step": ("SGD", lambda u, x, g, lr: 2 * u),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.full
def test_a_broken_law_is_found(law: str) -> None:
    constructor, bend = BENT[law]
    for subject, status in ((Lawless(lambda u, x, g, lr: u), PASSED), (Lawless(bend), FAILED)):
        (result,) = try_laws(subject, constructor, laws=[law], examples=10)
        assert result.status == status


@pytest.mark.parametrize(
    ("constructor", "flag", "law"),
    [
        ("ASGO", "diagonal", "rotation"),
        ("ASGO", "zero-nan", "zero"),
        ("DASGO", "eps-outside", "scale"),
        pytest.param("ASGO", "eps-outside", "first-step", marks=pytest.mark.deep),
        pytest.param("Shampoo", "exponent-inverse-order", "scale", marks=pytest.mark.deep),
        pytest.param("ASGO.theory", "no-accumulation", None, marks=pytest.mark.deep),
    ],
)
def test_which_mistakes_break_a_law(constructor: str, flag: str, law: str | None) -> None:
    results = try_laws(Variant({flag}), constructor, laws=[law] if law else LAWS, examples=40 if law == "zero" else 10)
    failed = [r.id for r in results if r.status == FAILED]
    assert failed == ([f"invariance/{law}"] if law else [])  # no law tells everything: the vectors do


@pytest.mark.full
def test_the_counterexample_is_small_and_its_script_runs(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
            import numpy as np

            def step(param, grad, state, *, lr, momentum=0.0, nesterov=False):
                if momentum:
                    raise NotImplementedError
                return param - lr * grad - lr * (np.abs(grad) > 2), state
        """),
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "precond_ref.cli", "check", "mine:step", "--method", "SGD", "--invariances"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "invariances: " in done.stdout
    first, _, rest = done.stdout.partition("invariance/sign: it does not hold that ")[2].partition("\n")
    assert first == LAWS["sign"].text
    program = rest[: rest.index('sep="\\n")') + len('sep="\\n")')]
    assert program.count("3") - program.count("-3") <= 3, "one entry of 3 is enough"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "times the tolerance apart" in done.stdout
    assert float(done.stdout.rpartition("\n")[0].splitlines()[-1].split()[0]) > 1e3
