"""Methods with one mistake each, as edits of their source, and the statements that they violate."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import theory_cases
from mutation import mutated

from precond_ref.theory import list_statements


class Mutant(NamedTuple):
    module: str
    """A name in `theory_cases.REAL`."""
    old: str
    new: str


V = "gram = state.gram + (grad @ t(grad, xp) if left"
LAM = "law = roots.Law(-1.0, self.eps, root=True)"
LAM_ROOT = "root = roots.decompose(gram, law, xp=xp)  # (2)"
LAM_U = "direction = roots.apply(grad, {0 if left else 1: root}, law, 1.0, xp=xp)"
D, D_U = "d = state.d + xp.sum(grad * grad, axis=-1)", "direction = grad / _infinite_if_zero(xp.sqrt(d) + self.eps, xp)"
P, P_KEPT = "roots.solve(f, columns, self.damping, own, xp=xp)", "law = roots.Law(-1.0, self.damping)"
MUTANTS: dict[str, Mutant] = {
    # ASGO
    "asgo: exponent -1/4": Mutant("asgo", LAM, "law = roots.Law(-0.25, self.eps)"),
    "asgo: exponent -1": Mutant("asgo", LAM, "law = roots.Law(-1.0, self.eps)"),
    "asgo: eps under the root": Mutant("asgo", LAM, "law = roots.Law(-0.5, self.eps)"),
    "asgo: average": Mutant("asgo", V, V.replace("state.gram + ", "0.5 * state.gram + 0.5 * ")),
    "asgo: no memory": Mutant("asgo", V, V.replace("state.gram", "0 * state.gram")),
    "asgo: V_{t-1}": Mutant("asgo", LAM_ROOT, LAM_ROOT.replace("gram,", "state.gram,")),
    "asgo: diagonal of V": Mutant("asgo", LAM_ROOT, LAM_ROOT.replace("gram,", "gram * roots.eye_like(xp, gram),")),
    "asgo: doubled": Mutant("asgo", LAM_U, LAM_U.replace("= ", "= 2 * ")),
    "asgo: ascent": Mutant("asgo", LAM_U, LAM_U.replace("= ", "= -")),
    "asgo: V fourfold": Mutant("asgo", V, V.replace("+ (", "+ 4 * (")),
    "dasgo: eps under the root": Mutant("asgo", D_U, D_U.replace("(d) + self.eps", "(d + self.eps)")),
    "dasgo: average": Mutant("asgo", D, D.replace("state.d + ", "0.5 * state.d + 0.5 * ")),
    "dasgo: no memory": Mutant("asgo", D, D.replace("state.d", "0 * state.d")),
    "dasgo: exponent -1": Mutant("asgo", D_U, D_U.replace("xp.sqrt(d)", "d")),
    # gradient descent
    "sgd: doubled": Mutant("baselines", "return 1.0 * grad, SGDState(", "return 2.0 * grad, SGDState("),
    "sgd: ascent": Mutant("baselines", "return 1.0 * grad, SGDState(", "return -1.0 * grad, SGDState("),
    # AGD
    "agd: no steps": Mutant("agd", "k.factor * u", "0 * u"),
    "agd: delta added": Mutant("agd", "clamp(root, k.floor, xp=xp)", "root + k.floor"),
    "agd: no threshold": Mutant("agd", "clamp(root, k.floor, xp=xp)", "root"),
    "agd: delta not corrected": Mutant("agd", "clamp(root, k.floor, xp=xp)",
        "clamp(root, self.delta, xp=xp)"),
    "agd: no first correction": Mutant("agd", "k.factor * u", "k.factor * one_minus_power(self.beta1, now.step) * u"),
    "agd: no second correction": Mutant("agd", "k.factor * u",
        "k.factor / sqrt(one_minus_power(self.beta2, now.step)) * u"),
    "agd: doubled": Mutant("agd", "k.factor * u", "2 * k.factor * u"),
    "agd: tenfold": Mutant("agd", "k.factor * u", "10 * k.factor * u"),
    "agd: a hundredth": Mutant("agd", "k.factor * u", "0.01 * k.factor * u"),
    "agd: ascent": Mutant("agd", "k.factor * u", "-k.factor * u"),
    "agd: heavy ball": Mutant("agd", "m = ema(state.m, grad, self.beta1)", "m = self.beta1 * state.m + grad"),
    "agd: sum of squares": Mutant("agd", "b = ema(state.b, s * s, self.beta2)", "b = state.b + 4 * s * s"),
    "agd: old momentum": Mutant("agd", "u = quotient(m, ", "u = quotient(state.m, "),
    "agd: no momentum kept": Mutant("agd", "m = ema(state.m, grad, self.beta1)",
        "m = ema(0 * state.m, grad, self.beta1)"),
    # sketches
    "sketch: tail not decayed": Mutant("fd", "else tail_decay) * sketch.escaped",
        "else tail_decay) ** 0 * sketch.escaped"),
    "sketch: tail decayed by sqrt(beta2)": Mutant("fd", "(beta2 if tail_decay", "(beta2**0.5 if tail_decay"),
    "sketch: cut one later": Mutant("fd", "s[..., size - 1 : size] if size <= d",
        "s[..., size : size + 1] if size < d"),
    "sketch: cut at the smallest": Mutant("fd", "s[..., size - 1 : size] if size <= d", "s[..., -1:] if size <= d"),
    "sketch: singular values deflated": Mutant("fd", "(s - cut) * (s + cut),", "(s - cut) * (s - cut),"),
    "sketch: not deflated": Mutant("fd", "(s - cut) * (s + cut),", "s * s,"),
    "sketch: mass is a singular value": Mutant("fd", "(cut * cut)[..., 0]", "cut[..., 0]"),
    "sketch: mass halved": Mutant("fd", "(cut * cut)[..., 0]", "0.5 * (cut * cut)[..., 0]"),
    "sketch: mass doubled": Mutant("fd", "(cut * cut)[..., 0]", "2 * (cut * cut)[..., 0]"),
    "sketch: decayed by beta2 in the root": Mutant("fd", "xp.sqrt(beta2 * sketch.eigenvalues)",
        "beta2 * xp.sqrt(sketch.eigenvalues)"),
    "sketch: new rows doubled": Mutant("fd", "xp.matrix_transpose(rows)]", "2 * xp.matrix_transpose(rows)]"),
    "sketch: eps onto the stored eigenvalues": Mutant("fd", "(s - cut) * (s + cut),", "(s - cut) * (s + cut) + 0.125,"),
    "sketch: a hundredth": Mutant("fd", "return beyond * outside + basis @",
        "return 0.01 * beyond * outside + 0.01 * basis @"),
    "sketch: mass not added back": Mutant("fd", "xp.concat([size + shift[..., None], shift[..., None]]",
        "xp.concat([size, 0.0 * shift[..., None]]"),
    "sketch: mass forgets": Mutant("fd", "else tail_decay) * sketch.escaped",
        "else tail_decay) * 0.5 * sketch.escaped"),
    "sketch: exponent halved": Mutant("fd", ") ** exponent)", ") ** (exponent / 2))"),
    "sketch: ascent": Mutant("fd", "return beyond * outside + basis @", "return -beyond * outside - basis @"),
    "sketch: doubled": Mutant("fd", "return beyond * outside + basis @", "return 2 * beyond * outside + 2 * basis @"),
    "sketch: fourfold": Mutant("fd", "return beyond * outside + basis @", "return 4 * beyond * outside + 4 * basis @"),
    "sketch: mass left out of sum": Mutant("fd",
        "escaped=(beta2 if tail_decay is None else tail_decay) * sketch.escaped + ", "escaped="),
    # certified sketches
    "nystrom: s_l^2 for the mass": Mutant("nystrom", "xp.sqrt(bound)[..., None], 0.0", "cut, 0.0"),
    "nystrom: mass forgets": Mutant("nystrom", "escaped=tail_decay * sketch.escaped", "escaped=0 * sketch.escaped"),
    "nystrom: W not orthonormal": Mutant("nystrom", "w = qr(bt @ qr(x))", "w = bt @ qr(x)"),
    "nystrom: old sketch not decayed": Mutant("nystrom", "fd.concatenated(sketch, rows, beta2, size",
        "fd.concatenated(sketch, rows, 1.0, size"),
    "nystrom: s_l^2 added back": Mutant("nystrom", "(h * unit) * (total * unit),",
        "(h * unit) * (total * unit) + (cut * unit) ** 2,"),
    "nystrom: cut one later": Mutant("nystrom", "s[..., size - 1 : size]\n    h", "s[..., size : size + 1]\n    h"),
    "nystrom: largest for the least": Mutant("nystrom", "for part in (cut, mass, lost)",
        "for part in (s[..., :1], mass, lost)"),
    "nystrom: lost trace doubled": Mutant("nystrom", "+ lost * lost", "+ 2 * lost * lost"),
    # root-free
    "rf: old s": Mutant("root_free", "u = quotient(g, s + self.damping, xp, bound=self.damping)",
        "u = quotient(g, state.s + self.damping, xp)",),
    "rf: square root": Mutant("root_free", "u = quotient(g, s + self.damping, xp, bound=self.damping)",
        "u = quotient(g, xp.sqrt(s) + self.damping, xp)",),
    "rf: batch left out": Mutant("root_free", "self.beta2 * (self.batch_size * square)", "self.beta2 * square"),
    "rf: sum": Mutant("root_free", "s = (1 - self.beta2) * state.s", "s = state.s"),
    "rf: S forgets twice": Mutant("root_free", "new.append((1 - self.beta2) * factor",
        "new.append((1 - self.beta2) ** 2 * factor"),
    "rf: batch left out of H": Mutant("root_free", "(self.batch_size / g.shape[-1] * outer", "(outer"),
    "if: no clip": Mutant("inverse_free", "if self.clip else 1.0", "if False else 1.0"),
    "if: K m on the wrong side": Mutant("inverse_free", "(k @ unit)", "(unit @ k)"),
    "if: twice the step": Mutant("inverse_free", "k - (self.beta2 * size", "k - (2 * self.beta2 * size"),
    "if: K without transpose": Mutant("inverse_free", "multiply(multiply(u, t(small, xp), n, xp), small, n, xp)",
        "multiply(multiply(u, small, n, xp), small, n, xp)",),
    "if: batch left out of H": Mutant("inverse_free", "g * sqrt(self.batch_size / g.shape[-1])", "g * 1.0"),
    "if: damping left out": Mutant("inverse_free", "damping = self.damping * math.prod(dims)", "damping = 0.0"),
    # MBF
    "mbf: square root": Mutant("mbf", P, "roots.power(f, -0.5, self.damping, xp=xp) @ columns"),
    "mbf: damping left out": Mutant("mbf", P, P.replace("self.damping", "0.0")),
    "mbf: square root kept": Mutant("mbf", P_KEPT, P_KEPT.replace("-1.0", "-0.5")),
    "mbf: damping left out of the inverse kept": Mutant("mbf", P_KEPT, P_KEPT.replace("self.damping", "0.0")),
    "mbf: damping of the inverse kept tenfold": Mutant("mbf", P_KEPT, P_KEPT.replace("self", "10 * self")),
    "mbf: samples summed": Mutant("mbf", "rows / max(rows.shape[-2], 1)",
        "rows / max(rows.shape[-2] if self._averaged else 1, 1)"),
    "mbf: damping tenfold": Mutant("mbf", P, P.replace("self.damping", "10 * self.damping")),
    "mbf: doubled": Mutant("mbf", "direction = self.from_blocks(", "direction = 2 * self.from_blocks("),
    "mbf: ascent": Mutant("mbf", "direction = self.from_blocks(", "direction = -1 * self.from_blocks("),
}  # fmt: skip


SUBJECTS = {
    "asgo": ("asgo",),
    "sgd": ("baselines",),
    "agd": ("agd",),
    "sketch": ("fd",),
    "nystrom": ("nystrom", "fd"),
    "sadagrad": ("fd",),
    "sshampoo": ("fd",),
    "rf": ("root_free", "inverse_free"),
    "if": ("inverse_free",),
    "mbf": ("mbf",),
}
"""Modules that the statements of a group are about."""


def library(module: str, *changes: tuple[str, str]) -> Any:
    """The modules, a copy of one of them with changes; `sketchy` is made anew on a copied sketch."""
    names = dict(vars(theory_cases.REAL))
    names[module] = mutated(names[module], *changes)
    if module in ("fd", "nystrom"):
        names["sketchy"] = mutated(names["sketchy"])
        vars(names["sketchy"])[module] = names[module]
    return SimpleNamespace(**names)


CAUGHT: dict[str, dict[str, int]] = {
    "agd.identity": {"agd: no momentum kept": 0, "agd: no first correction": 0, "agd: delta added": 0,
                     "agd: old momentum": 0},
    "agd.regret-measured": {"agd: doubled": 5, "agd: tenfold": 5, "agd: no second correction": 26, "agd: no steps": 40},
    "agd.regret-closed": {"agd: no steps": 605},
    "agd.root": {"agd: heavy ball": 6, "agd: sum of squares": 0},
    "agd.regret-closed-varying": {"agd: no steps": 605},
    "agd.gradients": {"agd: no steps": 0, "agd: delta not corrected": 0, "agd: no second correction": 0},
    "agd.least-gradient": {"agd: no steps": 0, "agd: a hundredth": 0, "agd: delta not corrected": 9, "agd: ascent": 17},
    "agd.gradients-noisy": {"agd: no steps": 3, "agd: no threshold": 3, "agd: tenfold": 3, "agd: a hundredth": 3},
    "asgo.energy": {"asgo: exponent -1/4": 0, "asgo: exponent -1": 0, "asgo: eps under the root": 0},
    "asgo.diagonal-energy": {"dasgo: eps under the root": 0, "dasgo: average": 0, "dasgo: no memory": 0},
    "asgo.drift": {"asgo: average": 0, "asgo: no memory": 0, "asgo: V_{t-1}": 0, "asgo: doubled": 0},
    "asgo.monotone": {"asgo: average": 0, "asgo: no memory": 0},
    "asgo.regret": {"asgo: exponent -1": 5, "asgo: average": 13, "asgo: no memory": 13, "asgo: exponent -1/4": 58},
    "asgo.regret-sharper": {"asgo: ascent": 0, "asgo: exponent -1": 5, "asgo: V fourfold": 5, "asgo: V_{t-1}": 6},
    "asgo.step": {"asgo: exponent -1": 0, "asgo: average": 0, "asgo: V_{t-1}": 0, "asgo: diagonal of V": 0},
    "asgo.nonsmooth": {"asgo: exponent -1": 2, "asgo: no memory": 13, "asgo: average": 52},
    "asgo.nonsmooth-rate": {"asgo: exponent -1": 11, "asgo: no memory": 37, "asgo: average": 52},
    "asgo.smooth": {"asgo: average": 0, "asgo: no memory": 0, "asgo: exponent -1": 7, "asgo: exponent -1/4": 14},
    "asgo.noisy": {"asgo: average": 2, "asgo: no memory": 2, "asgo: exponent -1": 5, "asgo: V fourfold": 15},
    "asgo.shampoo": {"asgo: V fourfold": 1},
    "asgo.rank": {"asgo: V fourfold": 0},
    "asgo.row-regret": {"dasgo: eps under the root": 0, "dasgo: exponent -1": 0, "dasgo: no memory": 12},
    "sgd.regret": {"sgd: doubled": 6, "sgd: ascent": 18},
    "mbf.residual": {"mbf: square root": 0, "mbf: damping left out": 0, "mbf: samples summed": 0, "mbf: doubled": 0},
    "mbf.contraction": {"mbf: ascent": 0, "mbf: samples summed": 1, "mbf: damping tenfold": 1, "mbf: square root": 3},
    "mbf.two-layer": {"mbf: square root": 0, "mbf: ascent": 0, "mbf: damping tenfold": 1, "mbf: samples summed": 57},
    "mbf.radius": {"mbf: damping left out": 1, "mbf: ascent": 4},
    "mbf.descent": {"mbf: damping left out of the inverse kept": 0, "mbf: ascent": 0, "mbf: doubled": 4},
    "mbf.descent-by-gradient": {"mbf: square root kept": 0, "mbf: damping of the inverse kept tenfold": 0},
    "mbf.linear-rate": {"mbf: square root kept": 0, "mbf: damping left out of the inverse kept": 0, "mbf: ascent": 0},
    "rf.step": {"rf: old s": 1, "rf: square root": 1, "rf: batch left out": 3},
    "rf.constant": {"rf: batch left out": 0, "rf: sum": 0},
    "rf.newton": {"rf: square root": 0},
    "rf.floor": {"rf: S forgets twice": 0},
    "if.clip": {"if: no clip": 2, "if: K m on the wrong side": 2, "if: twice the step": 2},
    "if.change": {"if: twice the step": 0, "if: no clip": 2, "if: K m on the wrong side": 2},
    "if.descent": {"if: K without transpose": 2},
    "rf.stationary": {"if: damping left out": 2, "rf: batch left out of H": 12, "if: batch left out of H": 7},
    "sketch.lower": {"sketch: new rows doubled": 1, "sketch: eps onto the stored eigenvalues": 1},
    "sketch.error": {"sketch: mass is a singular value": 0, "sketch: singular values deflated": 5},
    "sketch.mass": {"sketch: tail not decayed": 0, "sketch: not deflated": 0, "sketch: mass doubled": 0},
    "sketch.growth": {"sketch: cut at the smallest": 0, "sketch: mass is a singular value": 0},
    "sketch.trace": {"sketch: tail not decayed": 0, "sketch: tail decayed by sqrt(beta2)": 0, "sketch: mass halved": 0},
    "sketch.eigenvalues": {"sketch: new rows doubled": 1, "sketch: eps onto the stored eigenvalues": 1},
    "sketch.rank": {"sketch: cut one later": 0, "sketch: cut at the smallest": 0, "sketch: not deflated": 0},
    "sketch.exact": {"sketch: decayed by beta2 in the root": 1, "sketch: new rows doubled": 1},
    "sketch.low-rank": {"sketch: eps onto the stored eigenvalues": 36},
    "sketch.root-trace": {"sketch: new rows doubled": 1, "sketch: eps onto the stored eigenvalues": 1},
    "nystrom.lower": {"nystrom: W not orthonormal": 1, "nystrom: old sketch not decayed": 1},
    "nystrom.error": {"nystrom: s_l^2 for the mass": 0, "nystrom: mass forgets": 0},
    "nystrom.growth": {"nystrom: s_l^2 for the mass": 0, "nystrom: mass forgets": 0},
    "nystrom.least": {"nystrom: W not orthonormal": 0, "nystrom: largest for the least": 1},
    "nystrom.weyl": {"nystrom: s_l^2 for the mass": 0, "nystrom: cut one later": 0},
    "nystrom.trace": {"nystrom: s_l^2 added back": 0, "nystrom: lost trace doubled": 0},
    "nystrom.mass": {"nystrom: s_l^2 added back": 0, "nystrom: lost trace doubled": 0},
    "nystrom.root-trace": {"nystrom: old sketch not decayed": 1, "nystrom: lost trace doubled": 2},
    "nystrom.quadratic": {"sketch: mass not added back": 4, "nystrom: mass forgets": 30},
    "nystrom.regret": {"sketch: a hundredth": 446},
    "nystrom.theorem-5": {"sketch: a hundredth": 446},
    "sadagrad.quadratic": {"sketch: mass halved": 0, "sketch: mass forgets": 0, "sketch: mass left out of sum": 0},
    "sadagrad.regret-by-sketch": {"sketch: mass not added back": 0, "sketch: ascent": 5, "sketch: a hundredth": 11},
    "sadagrad.regret": {"sketch: ascent": 5, "sketch: a hundredth": 11, "sketch: fourfold": 13},
    "sadagrad.theorem-3": {"sketch: ascent": 5, "sketch: a hundredth": 29, "sketch: fourfold": 13},
    "sadagrad.corollary-4": {"sketch: ascent": 5, "sketch: a hundredth": 29, "sketch: fourfold": 13},
    "sshampoo.quadratic": {"sketch: mass forgets": 1, "sketch: exponent halved": 1, "sketch: doubled": 1},
    "sshampoo.root-trace": {"sketch: new rows doubled": 2, "sketch: eps onto the stored eigenvalues": 2},
    "sshampoo.regret": {"sketch: mass not added back": 1, "sketch: a hundredth": 11},
    "sshampoo.theorem-5": {"sketch: a hundredth": 11},
}  # fmt: skip
"""Mutants that violate a statement, with the seed of an instance (see `main`); not all that do."""

BLIND = {
    "asgo.norm": "a property of matrices: W_t, U and the gradients alone enter",
    "asgo.curvature": "a property of the gradients alone",
    "mbf.floor": "a property of the Jacobian alone",
}
"""Statements that no mistake in a method can violate."""


def violations(planted: str, seeds: Any) -> dict[str, int]:
    """The statements that a mutant violates, with the first seed of an instance."""
    mutant, found = MUTANTS[planted], {}
    lib = library(mutant.module, mutant[1:])
    for family, each in theory_cases.FAMILIES.items():
        if not any(mutant.module in SUBJECTS[name.partition(".")[0]] for name in each.statements):
            continue
        for seed in seeds:
            case = theory_cases.drawn(each.fields, seed)
            sound = theory_cases.play(family, case)
            try:
                checks = theory_cases.play(family, case, lib)
            except np.linalg.LinAlgError:
                continue
            for name, check in checks.items():
                if not check.holds and (name not in sound or sound[name].holds):
                    found.setdefault(name, seed)
    return found


def main() -> None:
    """Print the table `CAUGHT` anew."""
    table: dict[str, dict[str, int]] = {name: {} for name in list_statements()}
    for planted in MUTANTS:
        for name, seed in violations(planted, range(80)).items():
            table[name][planted] = seed
    for name, them in table.items():
        print(f"    {name!r}: {dict(sorted(them.items(), key=lambda item: item[1])[:3])},")


if __name__ == "__main__":
    main()
