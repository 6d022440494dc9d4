"""The yardsticks against torch.optim, pytorch_optimizer, and closed forms, and planted bugs."""

from __future__ import annotations

import dataclasses
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from helpers import directions, distance, gradients
from mutation import mutated

import precond_ref as pr
from precond_ref.methods import baselines

SHAPE, STEPS, LR = (5, 4), 50, 0.125
EPS64 = float(np.finfo(np.float64).eps)


def trajectory(method: Any, grads: np.ndarray, lr: float = LR, weight_decay: float = 0.0) -> np.ndarray:
    """Iterates of a recorded gradient sequence through `Optimizer`, (steps, *shape)."""
    optimizer = pr.Optimizer(method, lr=lr, weight_decay=weight_decay, route=lambda path, array: method)
    params = {"w": start(grads.shape[1:])}
    state = optimizer.init(params)
    iterates = []
    for g in grads:
        params, state = optimizer.step(params, {"w": g}, state)
        iterates.append(params["w"])
    return np.stack(iterates)


def start(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(99).standard_normal(shape)


def torch_trajectory(make: Any, grads: np.ndarray) -> np.ndarray:
    """The same with a torch optimizer class."""
    p = torch.nn.Parameter(torch.tensor(start(grads.shape[1:])))
    optimizer = make([p])
    iterates = []
    for g in grads:
        p.grad = torch.tensor(g)
        optimizer.step()
        iterates.append(p.detach().numpy().copy())
    return np.stack(iterates)


PAIRS = {
    "SGD": (pr.SGD(), lambda p: torch.optim.SGD(p, lr=LR)),
    "SGD-momentum": (pr.SGD(momentum=0.75), lambda p: torch.optim.SGD(p, lr=LR, momentum=0.75)),
    "SGD-nesterov": (pr.SGD(momentum=0.75, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=LR, momentum=0.75, nesterov=True)),
    "AdaGrad": (pr.AdaGrad(eps=0.25, initial=0.5),
        lambda p: torch.optim.Adagrad(p, lr=LR, eps=0.25, initial_accumulator_value=0.5)),
    "AdaGrad-defaults": (pr.AdaGrad(), lambda p: torch.optim.Adagrad(p, lr=LR)),
    "RMSProp": (pr.RMSProp(beta2=0.75, eps=0.25, momentum=0.5),
        lambda p: torch.optim.RMSprop(p, lr=LR, alpha=0.75, eps=0.25, momentum=0.5)),
    "RMSProp-defaults": (pr.RMSProp(), lambda p: torch.optim.RMSprop(p, lr=LR)),
    "Adam": (pr.Adam(beta1=0.75, beta2=0.875, eps=0.25),
        lambda p: torch.optim.Adam(p, lr=LR, betas=(0.75, 0.875), eps=0.25)),
    "Adam-defaults": (pr.Adam(), lambda p: torch.optim.Adam(p, lr=LR)),
    "Adam-amsgrad": (pr.Adam(beta1=0.75, beta2=0.875, eps=0.25, amsgrad="uncorrected"),
        lambda p: torch.optim.Adam(p, lr=LR, betas=(0.75, 0.875), eps=0.25, amsgrad=True)),
    "RAdam": (pr.Adam.torch_radam(beta1=0.75, beta2=0.875, eps=0.25),
        lambda p: torch.optim.RAdam(p, lr=LR, betas=(0.75, 0.875), eps=0.25)),
    "RMSProp-centered": (pr.RMSProp(beta2=0.75, eps=0.25, momentum=0.625, centered=True),
        lambda p: torch.optim.RMSprop(p, lr=LR, alpha=0.75, eps=0.25, momentum=0.625, centered=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_equals_torch_optim(name: str) -> None:
    method, make = PAIRS[name]
    grads = gradients(SHAPE, STEPS)
    assert distance(trajectory(method, grads), torch_trajectory(make, grads)) <= 1e-13


def test_nadam_equals_torch_but_for_its_float32_product() -> None:
    grads = gradients(SHAPE, STEPS)
    theirs = torch_trajectory(
        lambda p: torch.optim.NAdam(p, lr=LR, betas=(0.75, 0.875), eps=0.25, momentum_decay=0.375), grads
    )
    ours = trajectory(pr.Adam.torch_nadam(beta1=0.75, beta2=0.875, eps=0.25, momentum_decay=0.375), grads)
    assert distance(ours, theirs) <= 1e-7
    late = trajectory(pr.Adam(beta1=0.75, beta2=0.875, eps=0.25, nesterov="constant"), grads)
    assert distance(late, theirs) > 1e-3


def test_products_of_the_scheduled_momentum() -> None:
    """The series is the product, from both sides of where one takes the place of the other."""
    for psi in (0.004, 0.375, 1.0):
        for step in (1, 64, 65, 300):
            truth = mpmath.fprod(0.75 * (1 - mpmath.mpf(0.96) ** (i * psi) / 2) for i in range(1, step + 1))
            for t in (step, np.asarray(step)):
                mu, product = baselines._scheduled(0.75, psi, t, np.zeros(()))
                assert np.isclose(mu, 0.75 * (1 - 0.96 ** (step * psi) / 2), rtol=1e-13, atol=0)
                assert abs(product - truth) <= 1e-15 + 1e-13 * truth


OPTAX = {
    "adam": (pr.Adam(beta1=0.75, beta2=0.875, eps=0.25, eps_root=0.0625),
             lambda o: o.adam(LR, b1=0.75, b2=0.875, eps=0.25, eps_root=0.0625)),
    "nadam": (pr.Adam.optax_nadam(beta1=0.75, beta2=0.875, eps=0.25, eps_root=0.0625),
              lambda o: o.nadam(LR, b1=0.75, b2=0.875, eps=0.25, eps_root=0.0625)),
    "amsgrad": (pr.Adam(beta1=0.75, beta2=0.875, eps=0.25, amsgrad="corrected"),
                lambda o: o.amsgrad(LR, b1=0.75, b2=0.875, eps=0.25)),
    "radam": (pr.Adam(beta1=0.75, beta2=0.875, eps=0.25, rectify=True),
              lambda o: o.radam(LR, b1=0.75, b2=0.875, eps=0.25)),
    "rmsprop": (pr.RMSProp(beta2=0.75, eps=0.25, momentum=0.625, eps_form="inside", initial=0.375),
                lambda o: o.rmsprop(LR, decay=0.75, eps=0.25, momentum=0.625, initial_scale=0.375)),
    "rmsprop-centered": (pr.RMSProp(beta2=0.75, eps=0.25, momentum=0.625, nesterov=True, centered=True,
                                    eps_form="inside"),
                         lambda o: o.rmsprop(LR, decay=0.75, eps=0.25, momentum=0.625, nesterov=True, centered=True)),
    "rmsprop-corrected": (pr.RMSProp(beta2=0.75, eps=0.25, bias_correction=True),
                          lambda o: o.rmsprop(LR, decay=0.75, eps=0.25, eps_in_sqrt=False, bias_correction=True)),
    "adagrad": (pr.AdaGrad(eps=0.25, initial=0.375, eps_form="inside"),
                lambda o: o.adagrad(LR, initial_accumulator_value=0.375, eps=0.25)),
}  # fmt: skip


def optax_trajectory(make: Any, grads: np.ndarray) -> np.ndarray:
    jax, optax = pytest.importorskip("jax", reason="no jax"), pytest.importorskip("optax", reason="no optax")
    with jax.enable_x64(True):
        x, opt, iterates = jax.numpy.asarray(start(grads.shape[1:])), make(optax), []
        state = opt.init(x)
        for g in grads:
            updates, state = opt.update(jax.numpy.asarray(g), state, x)
            x = x + updates
            iterates.append(np.asarray(x))
    return np.stack(iterates)


@pytest.mark.parametrize("name", OPTAX)
def test_equals_optax(name: str) -> None:
    method, make = OPTAX[name]
    grads = gradients(SHAPE, STEPS)
    assert distance(trajectory(method, grads), optax_trajectory(make, grads)) <= 1e-12


FORM_BUGS = [
    ("radam", "if rho <= 5", "if rho <= 4"),
    ("radam", "direction + step * k.plain", "direction"),
    ("nadam", "step + 1, like=like)) if first else beta1", "step, like=like)) if first else beta1"),
    ("nadam", "m * k.inverse_c1 + grad * k.gradient", "m * k.inverse_c1"),
    ("amsgrad", 'v * k.inverse_sqrt_c2**2 if self.amsgrad == "corrected" else v', "v"),
    ("amsgrad", "xp.maximum(state.v_max, v * k", "1.0 * (v * k"),
    ("adam", "square * k.inverse_sqrt_c2**2) + self.eps_root", "square + self.eps_root) * k.inverse_sqrt_c2**2"),
    ("rmsprop", "v=full(self.initial, *shape), buffer", "v=zeros(*shape), buffer"),
    ("rmsprop", 'xp.sqrt(square + eps) if form == "inside" else', 'xp.sqrt(square) + eps if form == "inside" else'),
    ("rmsprop-centered", "state.v - state.mean * mean", "state.v"),
    ("rmsprop-centered", "direction, self.momentum, self.nesterov)", "direction, self.momentum)"),
    ("rmsprop-corrected", "average * correction if self.bias_correction else average", "average"),
]


@pytest.mark.parametrize(("name", "old", "new"), FORM_BUGS, ids=lambda value: value[:40])
def test_optax_parity_catches_a_planted_bug(name: str, old: str, new: str) -> None:
    method, make = OPTAX[name]
    copy = getattr(mutated(baselines, (old, new)), type(method).__name__)
    planted = copy(**{field: getattr(method, field) for field in method.symbols})
    grads = gradients(SHAPE, STEPS)
    assert distance(directions(planted, grads), directions(method, grads)) > 1e-3
    assert distance(trajectory(method, grads), optax_trajectory(make, grads)) <= 1e-12


def test_limits_of_the_forms() -> None:
    """First steps, sign descent, and forms that meet."""
    grads = gradients(SHAPE, 12)
    b1, b2 = 0.75, 0.875
    first = {
        pr.Adam(beta1=b1, beta2=b2, eps=0.0): np.sign(grads[0]),
        pr.Adam(beta1=b1, beta2=b2, eps=0.0, nesterov="constant"): np.sign(grads[0]) * (b1 / (1 + b1) + 1),
        pr.Adam(beta1=b1, beta2=b2, eps=0.0, rectify=True): grads[0],
    }
    for method, want in first.items():
        assert np.allclose(directions(method, grads[:1])[0], want, rtol=1e-14, atol=0)
    assert np.allclose(directions(pr.Adam(beta1=0.0, beta2=0.0, eps=0.0), grads), np.sign(grads), rtol=1e-15, atol=0)
    rmsprop = pr.RMSProp(beta2=b2, eps=0.25, bias_correction=True)
    assert distance(directions(rmsprop, grads), directions(pr.Adam(beta1=0.0, beta2=b2, eps=0.25), grads)) <= 1e-14
    steep = pr.Adam(beta1=b1, beta2=b2, eps=0.25, nesterov="scheduled", momentum_decay=1e6)
    constant = steep.replace(nesterov="constant")
    assert distance(directions(steep, grads), directions(constant, grads)) <= 1e-13
    growing = np.abs(grads) * 2.0 ** np.arange(12)[:, None, None]
    adam = pr.Adam(beta1=b1, beta2=b2, eps=0.25)
    rising = np.maximum.accumulate(growing)
    assert distance(directions(adam.replace(amsgrad="uncorrected"), rising), directions(adam, rising)) <= 1e-14
    hat, t1 = adam.replace(eps_form="uncorrected"), adam.replace(eps=0.25 / np.sqrt(1 - b2))
    assert distance(directions(hat, grads[:1]), directions(t1, grads[:1])) <= 1e-14


def check_forms(lib: Any = baselines) -> None:
    """Slow and fast schedules of NAdam, where RAdam begins to divide, the largest direction, and scales."""
    grads, b1, b2 = gradients(SHAPE, 12), 0.75, 0.875
    mh = np.zeros(SHAPE)
    slow = lib.Adam(beta1=b1, beta2=0.0, eps=0.0, nesterov="scheduled", momentum_decay=0.0)
    for t, (g, got) in enumerate(zip(grads, directions(slow, grads), strict=True), start=1):
        mh = b1 * mh + (1 - b1) * g  # the average's decay is beta1, that of the products beta1 / 2
        mu = b1 / 2
        want = mu * mh / (1 - mu ** (t + 1)) + (1 - mu) * g / (1 - mu**t)
        assert np.allclose(got, want / np.abs(g), rtol=1e-13, atol=0)
    for beta2 in (0.9, 0.99, 0.999):
        radam = lib.Adam(beta1=b1, beta2=beta2, eps=0.25, rectify=True)
        plain = [
            np.allclose(d, m, rtol=1e-13) for d, m in zip(directions(radam, grads), averages(grads, b1), strict=True)
        ]
        assert plain == [t <= 5 for t in range(1, 13)]
    loud = lib.Adam(beta1=0.5, beta2=b2, eps=0.0)
    steepest = 1.75 ** np.arange(30)[:, None] * np.ones((30, 2))  # beta2 / beta1: the largest direction
    for stream, reached in ((gradients(SHAPE, 30), False), (steepest, True)):
        for t, d in enumerate(directions(loud, stream), start=1):
            most = 0.5 * np.sqrt(sum((0.25 / b2) ** k for k in range(t)) * (1 - b2**t) / (1 - b2)) / (1 - 0.5**t)
            assert np.max(np.abs(d)) <= most * (1 + 1e-13)
            assert not reached or np.min(d) >= most * (1 - 1e-13)
    fields = {"beta1": b1, "beta2": b2, "eps": 0.25, "eps_root": 0.0625}
    for form in ({}, {"amsgrad": "corrected"}, {"nesterov": "constant"}, {"eps_form": "uncorrected"}):
        scaled = {**fields, "eps": 2.0, "eps_root": 4.0}
        pair = directions(lib.Adam(**fields, **form), grads), directions(lib.Adam(**scaled, **form), 8 * grads)
        assert np.array_equal(*pair), form
    for centered in (False, True):
        inside = lib.RMSProp(beta2=b2, eps=0.25, eps_form="inside", centered=centered)
        assert np.array_equal(directions(inside, grads), directions(inside.replace(eps=16.0), 8 * grads))
    radam = lib.Adam(beta1=b1, beta2=b2, eps=0.25, rectify=True)
    first, last = (distance(a, b) for a, b in (
        (directions(radam.replace(eps=2.0), 8 * grads)[:4], 8 * directions(radam, grads)[:4]),
        (directions(radam.replace(eps=2.0), 8 * grads)[6:], directions(radam, grads)[6:]),
    ))  # fmt: skip
    assert max(first, last) <= 1e-15
    doubled = directions(lib.Adam(beta1=b1, beta2=b2, eps=0.25, amsgrad="corrected"), grads)
    assert distance(doubled, directions(lib.Adam(beta1=b1, beta2=b2, eps=0.25), grads)) > 1e-2


def check_no_variance(lib: Any = baselines) -> None:
    """A corrected centred average of one gradient is 0 without rounding: the direction is g / eps, or g / sqrt(eps)."""
    for dtype, beta2 in (("float64", 0.19557238875616212), ("float32", 0.875), ("float64", 0.99)):
        g = gradients((50,), 1)[0].astype(dtype)
        for form, root in (("outside", 2.0**-30), ("inside", 2.0**-15)):
            method = lib.RMSProp(beta2=beta2, eps=2.0**-30, eps_form=form, centered=True, bias_correction=True)
            assert np.array_equal(method.update(g, method.init(g), g)[0], g / g.dtype.type(root)), (dtype, form)
    grads, b = gradients((50,), 9), 0.75
    method = lib.RMSProp(beta2=b, eps=0.25, centered=True, bias_correction=True, initial=0.125)
    for t, d in enumerate(directions(method, grads), start=1):
        w = np.array([b ** (t - i) * (1 - b) for i in range(1, t + 1)])[:, None] / (1 - b**t)
        variance = np.sum(w * (grads[:t] - np.sum(w * grads[:t], axis=0)) ** 2, axis=0) + 0.125 * b**t / (1 - b**t)
        assert np.allclose(d, grads[t - 1] / (np.sqrt(variance) + 0.25), rtol=1e-12, atol=0), t


def averages(grads: np.ndarray, beta1: float) -> list[np.ndarray]:
    """Corrected averages of the gradients."""
    out, total = [], np.zeros(grads.shape[1:])
    for t, g in enumerate(grads, start=1):
        total = beta1 * total + (1 - beta1) * g
        out.append(total / (1 - beta1**t))
    return out


def test_forms() -> None:
    check_forms()


def test_no_variance() -> None:
    check_no_variance()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("if mean is None else self._variance(grad, state, now.k, xp)",
         "if mean is None else clamp(v * now.k.correction - (mean * now.k.correction) ** 2, 0.0, xp=xp)"),
        ("kept=self.beta2 * before * correction", "kept=1 - new"),
        ("return self.beta2 * k.correction * clamp(", "return k.kept * clamp("),
    ],
    ids=["difference", "rest of 1", "initial lost"],
)  # fmt: skip
def test_a_planted_bug_of_the_variance_is_caught(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_no_variance(mutated(baselines, (old, new)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mu = beta1 * (1 - 0.5 * 0.96 ** (t * psi))", "mu = beta1 * (1 - 0.25 * 0.96 ** (t * psi))"),
        ("if rho <= 5:", "if rho <= 4:"),
        ("if rho <= 5:", "if rho < 5.5:"),
        ("v = ema(state.v, grad * grad, self.beta2)  # v_t", "v = ema(state.v, grad * grad, self.beta2**2)"),
        ("square * k.inverse_sqrt_c2**2) + self.eps_root", "square * k.inverse_sqrt_c2**2) + self.eps_root**2"),
        ("xp.sqrt(square + eps) if form", "xp.sqrt(square + eps**2) if form"),
    ],
)
def test_a_planted_bug_in_a_form_is_caught(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_forms(mutated(baselines, (old, new)))


def test_decoupled_decay_equals_adamw() -> None:
    grads = gradients(SHAPE, STEPS)
    ours = trajectory(pr.Adam(beta1=0.75, beta2=0.875, eps=0.25), grads, weight_decay=0.25)
    theirs = torch_trajectory(
        lambda p: torch.optim.AdamW(p, lr=LR, betas=(0.75, 0.875), eps=0.25, weight_decay=0.25), grads
    )
    assert distance(ours, theirs) <= 1e-13


BUGS = {
    "eps under the root": ("Adam",
        'return root + (self.eps * k.inverse_sqrt_c2 if self.eps_form == "uncorrected" else self.eps)',
        "return xp.sqrt(root * root + self.eps)"),
    "no bias correction": ("Adam", "inverse_c1 = reciprocal(one_minus_power(beta1, step, like=like)) if first else 1.0",
        "inverse_c1 = 1.0"),
    "damped momentum": ("SGD-momentum", "heavy_ball(state.buffer, grad,",
        "heavy_ball(state.buffer, (1 - self.momentum) * grad,"),
    "momentum of the gradient": ("RMSProp", "heavy_ball(state.buffer, direction,", "heavy_ball(state.buffer, grad,"),
    "the sum before": ("AdaGrad", "self._denominator(total, xp)", "self._denominator(state.total, xp)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_torch_parity_catches(name: str) -> None:
    subject, old, new = BUGS[name]
    method, make = PAIRS[subject]
    planted = getattr(mutated(baselines, (old, new)), method.name)
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    grads = gradients(SHAPE, STEPS)
    assert distance(trajectory(planted(**fields), grads), torch_trajectory(make, grads)) > 1e-3


# ---- Shampoo --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (4, 4), (3, 4, 2), (6,)], ids=str)
def test_shampoo_equals_pytorch_optimizer(shape: tuple[int, ...]) -> None:
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    grads = gradients(shape, 12)
    theirs = torch_trajectory(lambda p: pytorch_optimizer.Shampoo(p, lr=LR, matrix_eps=0.25), grads)
    assert distance(trajectory(pr.Shampoo(eps=0.25), grads), theirs) <= 1e-12


def test_full_adagrad_first_step_is_the_unit_gradient() -> None:
    g = gradients((6,), 1)
    assert np.allclose(directions(pr.FullAdaGrad(), g)[0], g[0] / np.linalg.norm(g[0]), rtol=0, atol=16 * EPS64)


def test_shampoo_of_a_vector_is_full_adagrad_with_eps_under_the_root() -> None:
    grads = gradients((5,), 6)
    V = np.zeros((5, 5))
    for g, d in zip(grads, directions(pr.Shampoo(eps=0.25), grads), strict=True):
        V = V + np.outer(g, g)
        w, q = np.linalg.eigh(V + 0.25 * np.eye(5))
        assert np.linalg.norm(d - q @ ((q.T @ g) * w**-0.5)) <= 1e-13 * np.linalg.norm(d)


def test_reports_of_the_yardsticks() -> None:
    grads = gradients((4, 3), 3)
    average = np.sqrt(grads[0] ** 2 / 8 + grads[1] ** 2 / 4 + grads[2] ** 2 / 2)
    for method, denominator in (
        (pr.AdaGrad(eps=0.25), np.sqrt(np.sum(grads**2, axis=0)) + 0.25),
        (pr.RMSProp(beta2=0.5, eps=0.25, momentum=0.5), average + 0.25),
        (pr.Adam(beta2=0.5, eps=0.25), average / np.sqrt(0.875) + 0.25),
    ):
        state = method.init(grads[0])
        for g in grads:
            _, state = method.update(g, state, grads[0])
        report = method.diagnose(state)
        assert np.allclose(report.denominator, denominator, rtol=1e-14, atol=0)
        assert bool(report.finite)
    momentum = pr.SGD(momentum=0.5)
    assert bool(momentum.diagnose(momentum.init(grads[0])).finite)
    assert pr.SGD().diagnose(pr.SGD().init(grads[0])).finite is None
    shampoo = pr.Shampoo(eps=0.25)
    _, state = shampoo.update(grads[0], shampoo.init(grads[0]), grads[0])
    s2 = np.linalg.svd(grads[0], compute_uv=False)[::-1] ** 2
    assert np.allclose(shampoo.diagnose(state).eigenvalues[1], s2, rtol=1e-12)
    full = pr.FullAdaGrad()
    _, state = full.update(grads[0], full.init(grads[0]), grads[0])
    assert np.isclose(full.diagnose(state).eigenvalues[0][-1], np.sum(grads[0] ** 2), rtol=1e-13)


@pytest.mark.parametrize("method", [pr.FullAdaGrad(), pr.Shampoo(eps=0.25), pr.Muon(root="svd")], ids=repr)
def test_a_spectrum_that_is_not_finite_is_reported_as_nan(method: Any) -> None:
    grads = gradients((2, 3, 2), 1)[0]
    grads[1, 0, 0] = np.inf
    with np.errstate(invalid="ignore"):
        _, state = method.update(grads, method.init(grads, stack_ndim=1), grads)
    report = method.diagnose(state)
    spectra = report[0] if isinstance(report[0], tuple) else (report[0],)
    assert report.finite.tolist() == [True, False]
    for spectrum in spectra:
        assert np.all(np.isfinite(spectrum[0]))
        assert np.all(np.isnan(spectrum[1]))
