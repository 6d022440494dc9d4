"""Muon, NorMuon and AdaMuon: version 1, then version 2.

In version 2 hyperparameters of one configuration are all different and none is 1/2. The fields of a preset are written
here a second time, from the code of its name.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from precond_ref.conformance.declarations.base import DECAY, Case, integers, maker, with_zeros

case, reject = maker("Muon", {"momentum": 0.75, "nesterov": False, "rms": None, "root": "svd", "root_steps": 5}, (3, 2))
FIRST = [
    case("polar", "The polar factor of the averaged gradient.",
        "momentum-ignored nesterov-always newton-schulz momentum-of-orthogonal", seed=90),
    case("nesterov", "Averaged once more with the current gradient.", "nesterov-ignored nesterov-mixed", seed=91,
        change={"momentum": 0.5, "nesterov": True}),
    case("rms", "The factor is rms sqrt(max(m, n)).", "rms-min rms-jordan rms-ignored", seed=92, change={"rms": 0.25}),
    case("wide", "More columns than rows.", "rms-min rms-jordan", shape=(2, 4), seed=93, change={"rms": 0.25}),
    case("rank-one", "The polar factor of a singular matrix has its rank.", shape=(3, 2), seed=94,
        grads=integers(94, (5, 1, 1), 1, 2) * integers(95, (3, 1), -2, 2) @ integers(96, (1, 2), 1, 2), tier="should"),
    case("zero-first", "A zero gradient at the first step gives a zero direction.", seed=97,
        grads=with_zeros(97, (3, 2), 0), tier="should"),
    case("row", "One row: the direction is the unit vector.", shape=(1, 4), seed=103),
    case("column", "One column: the direction is the unit vector.", shape=(4, 1), seed=104),
    case("quintic", "Jordan's quintic, five times, instead of the polar factor.",
        "exact cubic one-step-fewer spectral-start", seed=98, change={"root": "newton_schulz"}),
    case("quintic-3", "The same three times.", "one-step-fewer", seed=102,
        change={"root": "newton_schulz", "root_steps": 3}),
    case("quintic-nesterov", "The same with the look-ahead and the factor, on a wide matrix.", shape=(2, 4), seed=99,
        change={"root": "newton_schulz", "nesterov": True, "rms": 0.25}),
    case("stack", "Two parameters at once.", shape=(2, 3, 2), stack_ndim=1, seed=100, tier="may"),
    case("decay", "Decoupled weight decay, before the step and times lr.", DECAY, seed=101, decay=0.25),
    reject("momentum", "A momentum of 1 never leaves zero.", "momentum", momentum=1.0),
    reject("root", "An unknown root.", "root", root="qr"),
    reject("rms", "A scale of zero.", "rms", rms=0.0),
    reject("vector", "A parameter with one axis.", "param", shape=(3,)),
]  # fmt: skip

# ---- version 2 ------------------------------------------------------------------------------------------------------

LR, KAPPA = 11 / 32, 13 / 32
RATES = tuple(LR * factor for factor in (1, 1 / 2, 2, 1 / 4))
TRIPLE, SECOND = (3.25, -4.0, 1.75), (1.875, -1.25, 0.375)
SHARED: dict[str, Any] = {
    "momentum": 23 / 32, "nesterov": True, "rms": 15 / 32, "root": "newton_schulz", "root_steps": 4,
    "momentum_form": "average", "nesterov_form": "weighted", "bias_correction": False, "coefficients": "jordan",
    "after_last": "repeat", "normalization": "frobenius", "normalization_factor": 1.0, "eps": 0.0, "eps_rule": "add",
    "compute_dtype": None, "scale": "max", "outputs": "rows", "layout": "matrix", "blocks": None,
}  # fmt: skip
MUON = {**SHARED, "dual_norm": False}
RESCALED = {**SHARED, "beta2": 29 / 32, "eps2": 3 / 64, "eps": 5 / 32, "rescale": "norm"}
NORMUON = {**RESCALED, "scale": "jordan", "statistic": "row", "eps2_rule": "add"}
ADAMUON = {**RESCALED, "rescale": "rms", "sign": True, "v_bias_correction": False}


SALTS = {
    "Muon/dion": 49, "Muon/cans": 10, "Muon/aol-square": 1, "Muon/bfloat16": 42, "NorMuon/last": 1,
    "NorMuon/bfloat16": 10, "AdaMuon/sign": 57, "AdaMuon/plain": 36, "AdaMuon/corrected-v": 53, "AdaMuon/raw": 47,
    "AdaMuon/raw-jordan": 27, "AdaMuon/raw-wide": 53, "AdaMuon/jordan-wide": 4, "AdaMuon/norm": 19, "AdaMuon/sum": 25,
    "AdaMuon/added": 46, "AdaMuon/heavy-ball": 28, "AdaMuon/corrected": 51, "AdaMuon/last": 23,
    "AdaMuon/schatten-eps": 41, "AdaMuon/eps-floor": 29, "AdaMuon/heads": 49, "AdaMuon/heads-raw": 52,
    "AdaMuon/columns": 12, "AdaMuon/flatten": 29, "AdaMuon/decay": 37, "AdaMuon/bfloat16": 59,
    "Muon/exact-nesterov": 1, "Muon/exact-plain": 3, "Muon/jordan-tall": 43, "Muon/jordan-wide": 4,
    "Muon/torch-tall": 33, "Muon/torch-wide": 29, "Muon/torch-plain": 28, "Muon/torch-eps": 5, "Muon/torch-decay": 45,
    "Muon/moonlight-tall": 23, "Muon/moonlight-plain": 20, "Muon/pytorch-optimizer-tall": 48,
    "Muon/pytorch-optimizer-plain": 52, "Muon/emerging-seven-steps": 56, "Muon/dion-tall": 52,
    "Muon/dion-nesterov": 41, "Muon/dion-float64": 6, "NorMuon/pytorch-optimizer-tall": 22, "NorMuon/dion-tall": 26,
    "NorMuon/dion-float64": 58, "AdaMuon/emerging-plain": 12, "AdaMuon/emerging-nesterov": 28,
    "NorMuon/dion-float64-decay": 1, "AdaMuon/pytorch-optimizer-float64-decay": 1,
    "AdaMuon/emerging-wide": 3,
}  # fmt: skip
"""Another salt for cases whose gradients of salt 0 are badly conditioned."""


def second(method: str, base: Mapping[str, Any]) -> Any:
    """A maker of version 2's traces."""
    trace, reject = maker(method, base, (4, 3))

    def made(name: str, why: str, catches: str = "", *, shape: tuple[int, ...] = (4, 3), steps: int = 4,
             given: Mapping[str, Any] | None = None, **change: Any) -> Case:  # fmt: skip
        """``given`` are arguments of `Case`, ``change`` fields."""
        seed = zlib.crc32(f"{method}/{name}/{SALTS.get(f'{method}/{name}', 0)}".encode())
        grads = integers(seed, (steps, *shape), -6, 6) + integers(seed + 1, (steps, *shape), 0, 3) / 4
        rest: dict[str, Any] = {"grads": grads, "lr": LR, "version": 2, **(given or {})}
        return trace(name, why, catches, shape=shape, steps=steps, seed=seed, change=change, **rest)

    def refused(*args: Any, **change: Any) -> Case:
        return replace(reject(*args, **change), version=2)

    return made, refused


ROW_OF_ZEROS = integers(98, (4, 4, 3)) * np.array([1, 0, 1, 1])[:, None]
muon, _ = second("Muon", MUON)
JORDAN: dict[str, Any] = {"scale": "jordan", "rms": 15 / 32}
OF_MUON = [
    muon("sum", "A sum as momentum, seen through eps", "average momentum-ignored eps-ignored eps-floor",
         momentum_form="sum", eps=5 / 32),
    muon("sum-plain", "A sum without Nesterov's form", "average nesterov-always eps-ignored", momentum_form="sum",
         nesterov=False, eps=5 / 32, root_steps=3),
    muon("average-eps", "An average, seen through eps", "sum eps-ignored eps-floor", eps=5 / 32),
    muon("added", "The gradient added to the average", "nesterov-weighted nesterov-ignored", nesterov_form="added"),
    muon("added-sum", "The gradient added to a sum", "nesterov-weighted", nesterov_form="added", momentum_form="sum"),
    muon("weighted", "Nesterov's form on an average", "nesterov-added nesterov-mixed nesterov-corrected"),
    muon("corrected", "Bias correction: t for the gradient, t + 1 for the average", "correction-ignored "
         "correction-same", bias_correction=True),
    muon("corrected-plain", "Bias correction without Nesterov's form, seen through eps", "correction-ignored",
         bias_correction=True, nesterov=False, eps=5 / 32),
    muon("quintic-five", "Five triples, one for each step", "first-triple coefficients-reversed jordan one-step-fewer "
         "one-step-more", coefficients="quintic5", root_steps=5),
    muon("quintic-three", "The first three of five triples", "last-triples coefficients-reversed first-triple",
         coefficients="quintic5", root_steps=3),
    muon("repeat", "Two triples, the last repeated", "after-last-cycled one-step-more", coefficients=(TRIPLE, SECOND),
         root_steps=3),
    muon("cycle", "Two triples in turn", "after-last-repeated", coefficients=(TRIPLE, SECOND), after_last="cycle"),
    muon("triple", "One triple at each step", "jordan cubic", coefficients=TRIPLE, root_steps=3),
    muon("polar-express", "Polar Express with a factor in the normalization", "factor-ignored jordan first-triple",
         coefficients="polar_express", root_steps=4, normalization_factor=33 / 32),
    muon("zero-quintic", "A gradient of zeros under the iteration, without eps: 0/0 is 0.",
         given={"grads": with_zeros(97, (4, 3), 0), "tier": "should"}),
    muon("dion", "Its five triples with a factor in the normalization", "factor-ignored jordan first-triple",
         coefficients="dion", root_steps=5, normalization_factor=35 / 32),
    muon("cans", "The triples of CANS", "jordan", coefficients="cans", root_steps=5),
    muon("classical", "(2, -1.5, 0.5), which converges", "jordan", coefficients="classical", root_steps=12),
    muon("deepseek", "Eight times Jordan's, then (2, -1.5, 0.5)", "jordan first-triple", coefficients="deepseekv4",
         root_steps=10),
    muon("cubic", "Cubic polynomials", "jordan first-triple", coefficients="cubic5", root_steps=5),
    muon("spectral", "Divided by the spectral norm", "frobenius-start", normalization="spectral"),
    muon("spectral-eps", "The spectral norm or eps, the larger one", "frobenius-start eps-added eps-ignored",
         normalization="spectral", eps=4.0, eps_rule="max"),
    muon("schatten", "Divided by the Schatten norm of order 4", "frobenius-start", normalization="schatten4"),
    muon("schatten-eps", "eps bounds the square of the norm", "eps-of-norm eps-ignored", normalization="schatten4",
         eps=100.0),
    muon("aol", "Rows of the wide matrix divided by their sums", "frobenius-start", normalization="aol"),
    muon("aol-wide", "The same of a wide matrix, with eps", "eps-of-norm eps-ignored", normalization="aol",
         shape=(3, 4), eps=100.0),
    muon("aol-square", "A square matrix is not transposed", normalization="aol", shape=(3, 3)),
    muon("aol-square-columns", "Nor is one whose columns are outputs", normalization="aol", shape=(3, 3),
         outputs="columns"),
    muon("eps-added", "eps added to the norm", "eps-floor eps-ignored", eps=9.0),
    muon("eps-floor", "eps as a floor of the norm", "eps-added eps-ignored", eps=9.0, eps_rule="max"),
    muon("scale-jordan-tall", "The factor sqrt(m / n) of a tall matrix", "scale-ignored scale-inverted scale-max",
         **JORDAN),
    muon("scale-jordan-wide", "No factor for a wide matrix", "floor-ignored scale-inverted scale-max",
         shape=(3, 5), **JORDAN),
    muon("scale-jordan-columns", "Columns are outputs: the factor of a wide matrix", "scale-ignored scale-inverted",
         shape=(3, 5), outputs="columns", **JORDAN),
    muon("ratio-tall", "The factor sqrt(m / n)", "scale-ignored scale-inverted", scale="ratio"),
    muon("ratio-wide", "The factor sqrt(m / n), below 1", "floor-always scale-inverted", shape=(3, 5), scale="ratio"),
    muon("heads", "Two blocks of rows", "blocks-ignored", blocks=2),
    muon("heads-jordan", "Each block has the factor of its own shape", "blocks-ignored blocks-whole-scale",
         shape=(6, 2), blocks=2, **JORDAN),
    muon("fused", "Blocks of other sizes, as of a fused query, key and value", "blocks-ignored blocks-whole-scale",
         shape=(6, 2), blocks=(3, 1, 2), **JORDAN),
    muon("heads-columns", "Blocks of columns", "blocks-ignored", shape=(3, 6), blocks=2, outputs="columns"),
    muon("flatten", "A kernel as outputs by inputs x height x width", "flatten-inputs flatten-ignored",
         shape=(4, 3, 1, 2), layout="flatten", **JORDAN),
    muon("flatten-heads", "The same in blocks", "blocks-ignored", shape=(4, 3, 2), layout="flatten", blocks=2),
    muon("batch", "Leading axes stack matrices", shape=(2, 4, 3), layout="batch"),
    muon("batch-columns", "The same with columns as outputs", "scale-inverted", shape=(2, 3, 4), layout="batch",
         outputs="columns", **JORDAN),
    muon("kernel-last", "A kernel of height x width x inputs x outputs", "scale-inverted", shape=(1, 2, 3, 4),
         layout=((0, 1, 2), (3,)), **JORDAN),
    muon("attention", "Embedding x heads x size, one matrix for each head", "scale-inverted", shape=(3, 2, 4),
         layout=((0,), (2,)), **JORDAN),
    muon("attention-fused", "Heads and size together as outputs", "scale-inverted", shape=(3, 2, 2),
         layout=((0,), (2, 1)), **JORDAN),
    muon("aol-axes", "A square matrix of axes, with outputs last", shape=(3, 3), layout=((0,), (1,)),
         normalization="aol"),
    muon("dual", "The factor <N, O>", "dual-ignored", dual_norm=True),
    muon("dual-exact", "The nuclear norm times the polar factor", "dual-ignored", dual_norm=True, root="svd", rms=None,
         nesterov=False),
    muon("no-dual", "No factor <N, O>", "dual-always"),
    muon("zero-later", "Zero gradients between others", given={"grads": with_zeros(260, (4, 3), 0, 3)}, eps=5 / 32),
    muon("rates", "Weight decay with the scheduled rate", DECAY, given={"lr": RATES, "decay": KAPPA}),
    muon("decay-jordan", "Weight decay without the factor", DECAY, given={"decay": KAPPA}, **JORDAN),
    muon("bfloat16", "Products in bfloat16", "nesterov-added one-step-more", shape=(6, 4), compute_dtype="bfloat16"),
]  # fmt: skip

OTHER: dict[str, Any] = {"momentum": 25 / 32, "beta2": 55 / 64, "eps2": 7 / 64, "rms": 13 / 32}
normuon, no_normuon = second("NorMuon", NORMUON)
OF_NORMUON = [
    normuon("row", "A second moment of each row",
            "statistic-column statistic-sum statistic-entry v-ignored v-not-rooted v-corrected v-of-gradient "
            "rescale-ignored rescale-rms eps2-ignored eps2-inside eps2-missing-in-norm v-weight-missing"),
    normuon("row-wide", "The same of a wide matrix", "statistic-column statistic-short", shape=(3, 5)),
    normuon("short-wide", "A second moment of each column of a wide matrix", "statistic-row", shape=(3, 5),
            statistic="short"),
    normuon("short-tall", "A second moment of each row of a tall matrix", "statistic-column", statistic="short"),
    normuon("rms", "The root mean square rms", "rescale-norm rms-one rescale-ignored", rescale="rms", nesterov=False),
    normuon("raw", "No norm restored", "rescale-always v-corrected statistic-sum", rescale="none"),
    normuon("raw-max", "No norm restored, times rms sqrt(max(m, n)); other decays",
            "rms-ignored rms-jordan rms-min rms-columns rms-one", rescale="none", scale="max", **OTHER),
    normuon("raw-max-wide", "The same of a wide matrix", "rms-min rms-rows", rescale="none", scale="max",
            shape=(3, 5), **OTHER),
    normuon("ratio", "The factor sqrt(m / n)", "floor-always scale-inverted scale-max", shape=(3, 5), scale="ratio"),
    normuon("jordan-wide", "No factor for a wide matrix", "floor-ignored", shape=(3, 5), eps_rule="max", eps=9.0),
    normuon("exact", "The polar factor itself", "newton-schulz", root="svd"),
    normuon("eps2-floor", "eps2 as the least of v and of the norm", "eps2-added eps2-ignored", eps2=5 / 128,
            eps2_rule="max"),
    normuon("sum", "A sum as momentum", "average", momentum_form="sum"),
    normuon("added", "The gradient added to the average", "nesterov-weighted", nesterov_form="added"),
    normuon("corrected", "Bias correction of the average", "correction-ignored correction-same", bias_correction=True),
    normuon("triples", "Two triples in turn, with a factor in the normalization", "factor-ignored after-last-repeated",
            coefficients=(TRIPLE, SECOND), after_last="cycle", normalization_factor=35 / 32),
    normuon("repeat", "Two triples, the last repeated", "after-last-cycled", coefficients=(TRIPLE, SECOND)),
    normuon("last", "The first three of five triples", "last-triples jordan", coefficients="quintic5", root_steps=3),
    normuon("spectral", "Divided by the spectral norm", "frobenius-start", normalization="spectral"),
    normuon("schatten-eps", "eps bounds the square of the norm", "eps-of-norm", normalization="schatten4", eps=100.0),
    normuon("heads", "Each block has statistic, norms and factor", "blocks-ignored blocks-whole-scale", shape=(6, 2),
            blocks=2),
    normuon("fused", "Blocks of other sizes", "blocks-ignored", shape=(6, 2), blocks=(4, 2)),
    normuon("columns", "Columns are outputs", "statistic-column scale-inverted", shape=(3, 4), outputs="columns"),
    normuon("flatten", "Rows of the flattened kernel", "flatten-inputs", shape=(4, 3, 2), layout="flatten"),
    normuon("decay", "Decoupled weight decay", DECAY, given={"decay": KAPPA}),
    normuon("zero-first", "Zero gradients give zero directions",
            given={"grads": with_zeros(261, (4, 3), 0), "tier": "should"}),
    normuon("bfloat16", "Products in bfloat16", "v-ignored", shape=(6, 4), compute_dtype="bfloat16"),
    no_normuon("beta2", "A decay of 1.", "beta2", beta2=1.0),
    no_normuon("rescale", "A root mean square without rms.", "rms", rescale="rms", rms=None),
    no_normuon("vector", "A parameter with one axis.", "param", shape=(3,)),
]  # fmt: skip

adamuon, no_adamuon = second("AdaMuon", ADAMUON)
OF_ADAMUON = [
    adamuon("sign", "The sign of N is orthogonalised",
            "sign-ignored sign-of-gradient v-ignored v-not-rooted rescale-ignored rescale-norm rms-one eps2-ignored "
            "eps2-inside eps2-missing-in-norm v-weight-missing v-corrected"),
    adamuon("sign-zero-row", "A row of zeros: the sign of 0 is 0", given={"grads": ROW_OF_ZEROS, "tier": "should"}),
    adamuon("plain", "N itself is orthogonalised", "sign-always v-of-gradient", sign=False),
    adamuon("corrected-v", "Bias correction of v", "v-correction-ignored", sign=False, v_bias_correction=True),
    adamuon("raw", "No norm restored; other decays", "rescale-always v-corrected rms-ignored rms-jordan rms-min",
            rescale="none", sign=False, **OTHER),
    adamuon("raw-max-wide", "The same of a wide matrix", "rms-min rms-rows", rescale="none", sign=False,
            shape=(2, 4), **OTHER),
    adamuon("raw-jordan", "No norm restored, times sqrt(m / n)", "scale-max scale-inverted scale-ignored",
            rescale="none", sign=False, scale="jordan"),
    adamuon("raw-wide", "No norm restored, times sqrt(m / n) below 1", "floor-always", rescale="none", sign=False,
            scale="ratio", shape=(3, 5)),
    adamuon("jordan-wide", "No factor for a wide matrix", "floor-ignored", rescale="none", sign=False, scale="jordan",
            shape=(3, 5)),
    adamuon("norm", "The norm of O restored", "rescale-rms", rescale="norm", sign=False),
    adamuon("exact", "The polar factor itself", "newton-schulz", root="svd", sign=False),
    adamuon("sum", "A sum as momentum", "average", momentum_form="sum", sign=False),
    adamuon("added", "The gradient added to the average", "nesterov-weighted", nesterov_form="added", sign=False),
    adamuon("heavy-ball", "No Nesterov's form", "nesterov-always", nesterov=False, sign=False),
    adamuon("corrected", "Bias correction of the average", "correction-ignored correction-same", bias_correction=True,
            sign=False),
    adamuon("triples", "Two triples in turn, with a factor in the normalization", "factor-ignored after-last-repeated",
            coefficients=(TRIPLE, SECOND), after_last="cycle", normalization_factor=35 / 32, sign=False),
    adamuon("repeat", "Two triples, the last repeated", "after-last-cycled", coefficients=(TRIPLE, SECOND), sign=False),
    adamuon("last", "The first three of five triples", "last-triples jordan", coefficients="quintic5", root_steps=3,
            sign=False),
    adamuon("schatten-eps", "eps bounds the square of the norm", "eps-of-norm frobenius-start",
            normalization="schatten4", eps=100.0, sign=False),
    adamuon("eps-floor", "eps as a floor of the norm", "eps-added", eps=9.0, eps_rule="max", sign=False),
    adamuon("heads", "Each block has norms of its own", "blocks-ignored", blocks=2, shape=(6, 3), sign=False),
    adamuon("heads-raw", "Each block has the factor of its own shape", "blocks-whole-scale", blocks=(4, 2),
            shape=(6, 2), sign=False, rescale="none", scale="jordan"),
    adamuon("columns", "Columns are outputs", shape=(3, 4), outputs="columns", rescale="none", scale="jordan",
            sign=False),
    adamuon("flatten", "A kernel as one matrix", "flatten-inputs", shape=(4, 3, 2), layout="flatten", sign=False),
    adamuon("decay", "Decoupled weight decay", DECAY, given={"decay": KAPPA}, sign=False),
    adamuon("zero-first", "Zero gradients give zero directions", sign=False,
            given={"grads": with_zeros(262, (4, 3), 0), "tier": "should"}),
    adamuon("bfloat16", "Products in bfloat16", "sign-always", shape=(4, 2), compute_dtype="bfloat16", sign=False),
    no_adamuon("beta2", "A decay of 1.", "beta2", beta2=1.0),
    no_adamuon("sign", "A sign that is no flag.", "sign", sign=1),
    no_adamuon("vector", "A parameter with one axis.", "param", shape=(3,)),
]  # fmt: skip

# ---- presets --------------------------------------------------------------------------------------------------------

NS: dict[str, Any] = {**MUON, "momentum": 0.95, "rms": 0.2, "root_steps": 5}
TORCH = {**NS, "eps": 1e-7, "eps_rule": "max"}
EMERGING = {**NS, "nesterov": False, "coefficients": "quintic5", "after_last": "cycle", "eps": 1e-15, "eps_rule": "max",
            "rms": 1.0}  # fmt: skip
DION = {**NS, "momentum_form": "sum", "nesterov": False, "coefficients": "dion", "normalization_factor": 1.02,
        "eps": 1e-8, "scale": "ratio"}  # fmt: skip
NOR = {**{k: v for k, v in NS.items() if k != "dual_norm"}, "beta2": 0.95, "eps2": 1e-10, "rescale": "norm",
       "eps": 1e-7, "scale": "jordan", "statistic": "row"}  # fmt: skip
ADA = {**{k: v for k, v in NOR.items() if k != "statistic"}, "scale": "max", "eps2": 1e-8, "rescale": "rms",
       "sign": True, "v_bias_correction": False}  # fmt: skip
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # the arguments besides momentum with their defaults, and the fields of the class without them
    "Muon.exact": ({"nesterov": True}, {**MUON, "root": "svd", "rms": None, "root_steps": 5}),
    "Muon.jordan": ({"compute_dtype": "bfloat16"}, {**NS, "eps": 1e-7, "scale": "jordan"}),
    "Muon.torch": (
        {"nesterov": True, "eps": 1e-7, "coefficients": "jordan", "root_steps": 5, "rms": None,
         "compute_dtype": "bfloat16"}, TORCH,
    ),
    "Muon.moonlight": (
        {"nesterov": True, "root_steps": 5, "compute_dtype": "bfloat16"}, {**NS, "momentum_form": "sum", "eps": 1e-7},
    ),
    "Muon.optax": (
        {"nesterov": True, "eps": 1e-8, "root_steps": 5, "rms": None, "normalization": "frobenius", "dual_norm": False},
        {**NS, "bias_correction": True, "outputs": "columns"},
    ),
    "Muon.pytorch_optimizer": (
        {"nesterov": True, "root_steps": 5, "rms": None, "compute_dtype": "bfloat16"}, {**TORCH, "layout": "flatten"},
    ),
    "Muon.heavyball": (
        {"heavyball_momentum": False},
        {**TORCH, "coefficients": "quintic5", "scale": "jordan", "layout": "flatten"},
    ),
    "Muon.emerging": ({"nesterov": False, "coefficients": "quintic5", "root_steps": 5, "rms": 1.0}, EMERGING),
    "Muon.dion": ({"nesterov": False, "eps": 1e-8, "compute_dtype": "bfloat16"}, DION),
    "NorMuon.article": ({"beta2": 0.95, "rms": 0.2}, {**NOR, "nesterov": False, "rescale": "rms"}),
    "NorMuon.pytorch_optimizer": (
        {"beta2": 0.95, "nesterov": True, "root_steps": 5, "compute_dtype": "bfloat16"}, {**NOR, "eps_rule": "max"},
    ),
    "NorMuon.emerging": (
        {"beta2": 0.95, "nesterov": False},
        {**NOR, "statistic": "short", "coefficients": "quintic5", "after_last": "cycle", "eps": 1e-15,
         "eps_rule": "max", "eps2": 1e-8, "eps2_rule": "max", "scale": "max", "rms": 1.0},
    ),
    "NorMuon.dion": (
        {"beta2": 0.95, "compute_dtype": "bfloat16"},
        {**NOR, "momentum_form": "sum", "nesterov": False, "coefficients": "dion", "normalization_factor": 1.02,
         "eps": 1e-8, "eps2": 1e-8, "scale": "ratio"},
    ),
    "AdaMuon.pytorch_optimizer": (
        {"beta2": 0.95, "nesterov": False, "root_steps": 5, "compute_dtype": "bfloat16"},
        {**ADA, "eps_rule": "max", "eps2": 1e-10, "sign": False, "v_bias_correction": True},
    ),
    "AdaMuon.emerging": (
        {"beta2": 0.95, "nesterov": False},
        {**ADA, "coefficients": "quintic5", "after_last": "cycle", "eps": 1e-15, "eps_rule": "max", "sign": False,
         "rescale": "none", "rms": 1.0},
    ),
}  # fmt: skip


def preset(constructor: str, name: str, why: str, catches: str = "", *, shape: tuple[int, ...] = (4, 3),
           given: Mapping[str, Any] | None = None, **change: Any) -> Case:  # fmt: skip
    """Return a trace of a preset, with the fields of the class that its configuration makes."""
    taken, base = PRESETS[constructor]
    config = {"momentum": 23 / 32, **taken, **{k: float(np.float32(v)) for k, v in taken.items() if type(v) is float},
              **change}  # fmt: skip
    fields = {**base, **{k: v for k, v in config.items() if k in base}}
    if constructor in ("Muon.torch", "Muon.optax", "Muon.pytorch_optimizer"):
        fields |= {"scale": "jordan", "rms": 0.2} if config["rms"] is None else {"scale": "max"}
    if config.get("heavyball_momentum") is not None:
        fields |= {"momentum_form": "sum"} if config["heavyball_momentum"] else {"nesterov_form": "added"}
    if config.get("normalization") in ("schatten4", "aol"):
        fields["eps"] = 1e-8
    method, _, short = constructor.partition(".")
    made, _ = second(method, base)
    case: Case = made(f"{short.replace('_', '-')}-{name}", why, catches, shape=shape, given=given)
    return replace(case, constructor=constructor, config=config, fields=fields)


TALL: dict[str, Any] = {"shape": (6, 4)}  # of larger matrices rounding is less by chance
WIDE: dict[str, Any] = {"shape": (4, 6)}
FAINT, FAINTER = ({"grads": integers(310, (4, 4, 3), -6, 6) * 2.0**-power} for power in (30, 33))
QUIET = integers(311, (4, 4, 3), -6, 6) * np.array([2.0**-22, 1, 1, 1])[:, None]
AVERAGED = "nesterov-ignored nesterov-added momentum-ignored"
OF_PRESETS = [
    preset("Muon.exact", "nesterov", "The polar factor, no factor", "nesterov-ignored newton-schulz"),
    preset("Muon.exact", "plain", "Without Nesterov's form", "nesterov-always", nesterov=False, momentum=25 / 32),
    preset("Muon.jordan", "tall", "As it runs, in bfloat16", AVERAGED, **TALL),
    preset("Muon.jordan", "wide", "The same of a wide matrix", "floor-ignored", **WIDE),
    preset("Muon.jordan", "float64", "Without bfloat16", "nesterov-added nesterov-mixed floor-ignored one-step-fewer",
           shape=(3, 4), compute_dtype=None, momentum=25 / 32),
    preset("Muon.torch", "tall", "As it runs, in bfloat16", AVERAGED, **TALL),
    preset("Muon.torch", "wide", "The same of a wide matrix", "floor-ignored", **WIDE),
    preset("Muon.torch", "plain", "Without Nesterov's form", "nesterov-always", nesterov=False, **TALL),
    preset("Muon.torch", "eps", "eps as a floor of the norm, not added", "eps-added eps-ignored", eps=16.0, **TALL),
    preset("Muon.torch", "decay", "Weight decay with the rate, without the factor", "decay-coupled decay-without-lr",
           given={"decay": KAPPA}, **TALL),
    preset("Muon.torch", "float64", "Without bfloat16, other coefficients", "nesterov-added one-step-fewer rms-min",
           compute_dtype=None, rms=3 / 16, coefficients=TRIPLE, root_steps=3, momentum=25 / 32),
    preset("Muon.torch", "float64-decay", "Weight decay without bfloat16", DECAY, compute_dtype=None,
           given={"decay": KAPPA}),
    preset("Muon.torch", "float64-wide", "The same of a wide matrix", "rms-min rms-rows", shape=(3, 4),
           compute_dtype=None, rms=3 / 16, coefficients=TRIPLE, root_steps=3, momentum=25 / 32),
    preset("Muon.moonlight", "tall", "As it runs, in bfloat16", "nesterov-ignored nesterov-added", **TALL),
    preset("Muon.moonlight", "plain", "Without Nesterov's form", "nesterov-always", nesterov=False, **WIDE),
    preset("Muon.moonlight", "float64", "Without bfloat16", "one-step-fewer rms-min nesterov-added",
           compute_dtype=None, root_steps=3, momentum=25 / 32),
    preset("Muon.optax", "nesterov", "Bias correction, columns as outputs",
           "correction-ignored correction-same scale-inverted", shape=(3, 4)),
    preset("Muon.optax", "plain", "Without Nesterov's form, eps added", "nesterov-always eps-ignored eps-floor",
           nesterov=False, eps=5 / 32),
    preset("Muon.optax", "consistent-rms", "A root mean square, three steps", "rms-min rms-rows one-step-fewer",
           rms=3 / 16, root_steps=3, momentum=25 / 32),
    preset("Muon.optax", "consistent-rms-wide", "The same of a wide matrix", "rms-min rms-columns", rms=3 / 16,
           root_steps=3, momentum=25 / 32, shape=(3, 4)),
    preset("Muon.optax", "schatten", "The Schatten norm", "frobenius-start", normalization="schatten4"),
    preset("Muon.optax", "aol", "Rows divided by their sums", "frobenius-start", normalization="aol", shape=(3, 3)),
    preset("Muon.optax", "adaptive", "The factor <N, O>", "dual-ignored", dual_norm=True, shape=(3, 4)),
    preset("Muon.optax", "decay", "Weight decay", DECAY, shape=(3, 4), given={"decay": KAPPA}),
    preset("Muon.pytorch_optimizer", "tall", "As it runs, in bfloat16", AVERAGED, **TALL),
    preset("Muon.pytorch_optimizer", "plain", "Without Nesterov's form", "nesterov-always", nesterov=False, **WIDE),
    preset("Muon.pytorch_optimizer", "float64", "Without bfloat16, a kernel", "flatten-inputs rms-min one-step-fewer",
           shape=(4, 3, 2), compute_dtype=None, rms=3 / 16, root_steps=3, momentum=25 / 32),
    preset("Muon.pytorch_optimizer", "float64-tall", "Without bfloat16, more outputs", "rms-min rms-columns",
           compute_dtype=None, rms=3 / 16, root_steps=3, momentum=25 / 32),
    preset("Muon.heavyball", "added", "The gradient added to the average", "nesterov-weighted scale-inverted"),
    preset("Muon.heavyball", "sum", "A sum", "nesterov-added", heavyball_momentum=True, momentum=25 / 32),
    preset("Muon.emerging", "plain", "Five triples in turn", "nesterov-always jordan rms-ignored"),
    preset("Muon.emerging", "simple", "Jordan's triple, Nesterov's form", "nesterov-ignored one-step-more",
           coefficients="jordan", nesterov=True, root_steps=3, rms=3 / 16, momentum=25 / 32),
    preset("Muon.emerging", "wide", "The same of a wide matrix", "rms-min rms-rows", shape=(3, 4),
           coefficients="jordan", nesterov=True, root_steps=3, rms=3 / 16, momentum=25 / 32),
    preset("Muon.emerging", "seven-steps", "Seven steps of five triples in turn", "after-last-repeated", root_steps=7),
    preset("Muon.dion", "tall", "As it runs, in bfloat16", "jordan nesterov-always", **TALL),
    preset("Muon.dion", "nesterov", "With Nesterov's form", "nesterov-ignored", nesterov=True, eps=5 / 32, **TALL),
    preset("Muon.dion", "float64", "Without bfloat16", "jordan floor-always factor-ignored", shape=(3, 4),
           compute_dtype=None, momentum=25 / 32),
    preset("Muon.dion", "float64-nesterov", "Nesterov's form without bfloat16", "nesterov-corrected nesterov-added",
           shape=(3, 4), compute_dtype=None, nesterov=True, momentum=25 / 32),
    preset("NorMuon.article", "plain", "Plain momentum, a root mean square", "rescale-norm nesterov-always"),
    preset("NorMuon.article", "wide", "Other decays", "statistic-short", shape=(3, 5), beta2=29 / 32, rms=3 / 16,
           momentum=25 / 32),
    preset("NorMuon.pytorch_optimizer", "tall", "As it runs, in bfloat16", "nesterov-ignored", **TALL),
    preset("NorMuon.pytorch_optimizer", "float64", "Without bfloat16", "statistic-column one-step-fewer",
           compute_dtype=None, beta2=29 / 32, nesterov=False, root_steps=3, momentum=25 / 32),
    preset("NorMuon.pytorch_optimizer", "float64-nesterov", "Nesterov's form without bfloat16", "nesterov-corrected",
           compute_dtype=None, beta2=29 / 32, momentum=25 / 32),
    preset("NorMuon.emerging", "wide", "The second moment of the longer side", "statistic-row nesterov-always",
           shape=(3, 5)),
    preset("NorMuon.emerging", "nesterov", "With Nesterov's form", "nesterov-ignored", beta2=29 / 32, nesterov=True,
           momentum=25 / 32),
    preset("NorMuon.emerging", "quiet-row", "A row far below the others",
           "eps2-ignored eps2-added v-weight-missing v-corrected", beta2=29 / 32,
           given={"grads": QUIET, "tier": "should"}),
    preset("NorMuon.dion", "quiet-row", "A row far below the others", "eps2-ignored eps2-floor eps2-inside",
           beta2=29 / 32, compute_dtype=None, given={"grads": QUIET, "tier": "should"}),
    preset("NorMuon.dion", "tall", "As it runs, in bfloat16", "jordan", **TALL),
    preset("NorMuon.dion", "float64", "Without bfloat16", "statistic-short floor-always", shape=(3, 5),
           compute_dtype=None, beta2=29 / 32, momentum=25 / 32),
    preset("AdaMuon.pytorch_optimizer", "tall", "As it runs, in bfloat16", "sign-always", shape=(4, 2)),
    preset("AdaMuon.pytorch_optimizer", "float64", "Without bfloat16", "nesterov-ignored one-step-fewer",
           compute_dtype=None, beta2=29 / 32, nesterov=True, root_steps=3, momentum=25 / 32),
    preset("AdaMuon.emerging", "plain", "No sign, no norm restored", "sign-always rescale-always"),
    preset("AdaMuon.emerging", "nesterov", "With Nesterov's form", "nesterov-ignored", beta2=29 / 32, nesterov=True,
           momentum=25 / 32),
    *(preset(f"Muon.{name}", "float64-decay", "Weight decay without bfloat16", DECAY, compute_dtype=None,
             given={"decay": KAPPA}) for name in ("jordan", "moonlight", "pytorch_optimizer", "dion")),
    *(preset(f"Muon.{name}", "faint", "Gradients below eps, without bfloat16", f"eps-ignored {momentum}",
             given=FAINT, compute_dtype=None)
      for name, momentum in (("jordan", "sum"), ("moonlight", "average"), ("torch", "sum"))),
    preset("Muon.dion", "faint", "Gradients below eps, without bfloat16", "eps-ignored average", given=FAINTER,
           compute_dtype=None),
    preset("Muon.optax", "faint", "Gradients below eps", "eps-ignored eps-floor", given=FAINTER),
    preset("NorMuon.article", "faint", "Gradients below eps", "eps-ignored eps-floor", given=FAINT, beta2=29 / 32),
    preset("NorMuon.dion", "faint", "Gradients below eps, without bfloat16", "eps-ignored eps-floor", given=FAINTER,
           beta2=29 / 32, compute_dtype=None),
    preset("Muon.heavyball", "wide", "No factor for a wide matrix", "scale-inverted floor-ignored", shape=(3, 4)),
    preset("NorMuon.pytorch_optimizer", "float64-wide", "No factor for a wide matrix", "scale-inverted floor-ignored",
           shape=(3, 4), compute_dtype=None, beta2=29 / 32),
    preset("AdaMuon.emerging", "wide", "A wide matrix", "rms-min rms-rows", shape=(2, 4), beta2=29 / 32),
    *(preset(f"Muon.{name}", "decay", "Weight decay", DECAY, given={"decay": KAPPA})
      for name in ("exact", "heavyball", "emerging")),
    *(preset(name, "decay", "Weight decay", DECAY, given={"decay": KAPPA}, beta2=29 / 32)
      for name in ("NorMuon.article", "NorMuon.emerging", "AdaMuon.emerging")),
    *(preset(name, "float64-decay", "Weight decay without bfloat16", DECAY, given={"decay": KAPPA}, beta2=29 / 32,
             compute_dtype=None)
      for name in ("NorMuon.pytorch_optimizer", "NorMuon.dion", "AdaMuon.pytorch_optimizer")),
]  # fmt: skip

CASES = [*FIRST, *OF_MUON, *OF_NORMUON, *OF_ADAMUON, *OF_PRESETS]
