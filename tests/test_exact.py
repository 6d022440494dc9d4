"""The library's source with 50 digits is the second implementation with 50 digits; both against planted bugs."""

import inspect
import math
import operator
import re
import sys
from pathlib import Path

import mpmath as mp
import numpy as np
import pytest
from mutation import mutated

import precond_ref
from precond_ref.conformance import arithmetic, variants
from precond_ref.conformance.variants import asgo, elementwise, production, sketchy

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import exact
import exact_core

CORE = exact_core.load()
CONSTRUCTORS = exact.METHODS


def differ(core, constructor, count):
    """Whether one of some configurations of a constructor does."""
    configurations = (exact.numbered(core, 1, i, [constructor]) for i in range(count))
    return any(exact.difference(core, c)[0] > exact.TOLERANCE for c in configurations)


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_library_is_the_second_implementation(constructor):
    assert not differ(CORE, constructor, 2)


def test_all_methods_and_presets_and_fields_are_drawn():
    presets = {f"{name}.{p}" for name, method in precond_ref.list_methods().items() for p in method.presets}
    assert {*precond_ref.list_methods(), *presets} == set(CONSTRUCTORS)
    for constructor in CONSTRUCTORS:
        kinds = exact.parameters(CORE, constructor)
        assert list(kinds) == list(inspect.signature(operator.attrgetter(constructor)(precond_ref)).parameters)
        drawn = [exact.numbered(CORE, 2, i, [constructor]).config for i in range(12)]
        assert [name for name in kinds if len({str(config[name]) for config in drawn}) == 1] == [], constructor


A, N = "precond_ref.methods.", "precond_ref.numerics."
ADAM_EPS = (
    A + "baselines",
    'if self.eps_form == "uncorrected" else self.eps)',
    'if self.eps_form == "uncorrected" else 1.000000000001 * self.eps)',
)
BUGS = {
    "eps 1e-12 too large": ("Adam", *ADAM_EPS),
    "exponent off by 1e-12": (
        "Shampoo", A + "shampoo", "-0.5 / len(state.grams), self.eps)\n        grams",
        "-0.5000000000005 / len(state.grams), self.eps)\n        grams",
    ),
    "constant off by 1e-12": ("MBF", A + "mbf", "= 0.9, 0.999, 1e-8", "= 0.9, 0.999, 1.000000000001e-8"),
    "coefficient off by 1e-12": ("ASGO", N + "roots", "SAFETY = 1.01 ", "SAFETY = 1.01000000000101 "),
    "eps outside the root": ("ASGO", N + "roots", "+ self.ridge) ** self.exponent", ") ** self.exponent + self.ridge"),
    "eps inside the root": ("ASGO.theory", N + "roots", "(xp.sqrt(w) if self.root else w) + self.ridge",
                            "xp.sqrt(w + self.ridge) if self.root else w + self.ridge"),
    "float32's rounding": ("AGD", N + "ema", "-math.expm1(step * math.log(beta))",
                           "-math.expm1(step * math.log(beta)) * (1 + 2**-24)"),
    "float64's rounding": ("RFAdamW", N + "ema", "-math.expm1(step * math.log(beta))",
                           "-math.expm1(step * math.log(beta)) * (1 + 2**-52)"),
    "mass of one cut in a million lost": ("SAdaGrad", N + "sketch", "+ (cut * cut)[..., 0]",
                                          "+ 0.999999 * (cut * cut)[..., 0]"),
    "other order of the root's axes": ("IFShampoo", A + "inverse_free", "(k @ unit)", "(unit @ k)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_in_the_library_is_found(name):
    constructor, module, old, new = BUGS[name]
    assert differ(exact_core.load({module: (old, new)}), constructor, 16)


@pytest.mark.parametrize(
    ("family", "constructor", "old", "new"),
    [
        (elementwise, "Adam", "c1, c2 = 1 - beta1**k, 1 - beta2**k", "c1, c2 = 1 - beta1**k, float(1 - beta2**k)"),
        (asgo, "DASGO", "return sqrt(square + eps) if", "return sqrt(square + 1.000000000001 * eps) if"),
        (asgo, "ASGO", "ema(v, new, beta2)", "ema(v, new, beta2 * (1 - 1e-12))"),
        (sketchy, "SShampoo", "Fraction(-1, 2 * max(order, 1))", "-0.5 / max(order, 1)"),  # 1/6 of float64
    ],
)
def test_a_bug_in_the_second_implementation_is_found(family, constructor, old, new, monkeypatch):
    planted = variants.registry() | mutated(family, (old, new)).VARIANTS
    monkeypatch.setattr(variants, "registry", lambda: planted)
    assert differ(CORE, constructor, 16)


def test_a_trace_of_zero_divides_nothing_in_both(monkeypatch):
    c = exact.numbered(CORE, 0, 155, ["Shampoo.production"])
    assert (c.config["eps"], bool(c.config["trace_scaling"]), c.grads.any()) == (0.0, True, False)
    assert exact.difference(CORE, c)[0] == 0
    planted = variants.registry() | mutated(production, (" if trace > 0 or eps else a", "")).VARIANTS
    monkeypatch.setattr(variants, "registry", lambda: planted)
    with pytest.raises(RuntimeError, match="no convergence"):
        exact.difference(CORE, c)


def test_a_variance_of_one_gradient_is_zero_in_both():
    c = exact.numbered(CORE, 0, 384, ["RMSProp"])
    assert (c.config["centered"], c.config["bias_correction"]) == (True, True)
    assert exact.difference(CORE, c)[0] <= exact.TOLERANCE
    rounding = (
        "self._variance(grad, state, now.k, xp)",
        "clamp(v * now.k.correction - (mean * now.k.correction) * (mean * now.k.correction), 0.0, xp=xp)",
    )
    assert exact.difference(exact_core.load({A + "baselines": rounding}), c)[0] > exact.TOLERANCE


def test_the_copy_has_all_digits_and_the_library_keeps_its_own():
    assert sys.modules["precond_ref"] is precond_ref
    assert precond_ref.numerics.roots.math is math
    assert CORE.AGD is not precond_ref.AGD
    with mp.workdps(50):
        third = CORE.methods.baselines.roots.power(exact_core.Array(arithmetic.exact(np.eye(1) * 8)), mp.mpf(-1) / 3)
        assert abs(third.data[0, 0] - 0.5) <= mp.mpf(10) ** -48
    with pytest.raises(LookupError, match="occurs 0 times"):
        exact_core.load({A + "agd": ("no such text", "")})
    with pytest.raises(LookupError, match="not loaded: precond_ref.no_such_module"):
        exact_core.load({"precond_ref.no_such_module": ("", "")})


def test_command(capsys, monkeypatch):
    assert exact.main(["--configurations", "2", "--method", "Adam"]) == 0
    assert "2 configurations, 0 differ" in capsys.readouterr().out
    planted = exact_core.load({ADAM_EPS[0]: ADAM_EPS[1:]})
    monkeypatch.setattr(exact, "load", lambda: planted)
    assert exact.main(["--configurations", "8", "--method", "Adam"]) == 1
    found = re.search(
        r"direction after update 1 differs by \S+; repeat it with (.*)\n  Adam\((.*)\)", capsys.readouterr().out
    )
    assert found is not None
    assert found[2].startswith("beta1=0.5, beta2=0.5, eps=0.5, eps_root=0.5, eps_form='corrected'")  # simple
    assert exact.main(found[1].split()) == 1
