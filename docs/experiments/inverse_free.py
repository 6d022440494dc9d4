"""IF-Shampoo: its factors reach the Fisher matrix, and stay useful in bfloat16 where a stored statistic does not.

    python docs/experiments/inverse_free.py    # under a minute; needs PyTorch for bfloat16

The first part is a regression y = e on inputs of covariance A, 3 x 4 weights at the optimum, residuals N(0, I), batches
of 8, beta2 = 0.005: the Fisher matrix is I x A. The second part has gradients of covariance H in 8 dimensions, with
beta2 = 0.05.
"""

from __future__ import annotations

from typing import Any

import common
import numpy as np
import torch

import precond_ref as pr

SAMPLES, BATCH = 12_000, 8
CONDITIONS = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)


def fisher() -> dict[str, list[tuple[int, float]]]:
    """Return by step the relative distance of the mean of S_C x S_K, over the later half, to the Fisher matrix."""
    out = {}
    fields: dict[str, Any] = {"beta2": 0.005, "damping": 0.0, "momentum": 0.0, "batch_size": BATCH}
    for name, method in {
        "IF-Shampoo, not clipped": pr.IFShampoo(**fields, riemannian_momentum=0.0, clip=False),
        "IF-Shampoo": pr.IFShampoo(**fields, riemannian_momentum=0.0),
        "RF-Shampoo": pr.RFShampoo(**fields),
    }.items():
        rng = np.random.default_rng(0)
        root = np.linalg.cholesky(np.diag([4.0, 1.0, 0.5, 0.25]) + 0.125)
        truth = np.kron(np.eye(3), root @ root.T)
        w, curve, sums = np.zeros((3, 4)), [], [np.zeros((12, 12))]
        state = method.init(w)
        for t in range(SAMPLES):
            inputs, errors = rng.standard_normal((BATCH, 4)) @ root.T, rng.standard_normal((BATCH, 3))
            _, state = method.update(errors.T @ inputs / BATCH, state, w)
            factors = state.factors
            if isinstance(method, pr.IFShampoo):
                factors = [np.linalg.inv(k @ k.T) for k in factors]
            sums.append(sums[-1] + np.kron(*factors))
            if (t + 1) % 100 == 0:
                half = (t + 1) // 2
                mean = (sums[t + 1] - sums[half]) / (t + 1 - half)
                curve.append((t + 1, float(np.linalg.norm(mean - truth) / np.linalg.norm(truth))))
        out[name] = curve
    return out


def rounded(x: np.ndarray) -> np.ndarray:
    """Round to bfloat16, ties to even."""
    return torch.as_tensor(x, dtype=torch.float64).to(torch.bfloat16).double().numpy()


def stability(condition: float, steps: int = 1500) -> dict[str, float]:
    """Return how often an S in bfloat16 is not positive definite, and the eigenvalues of mean(K K^T) H of factors."""
    rng = np.random.default_rng(0)
    h = np.logspace(0, -np.log10(condition), 8)
    q = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    grads, truth = rng.standard_normal((steps, 8)) * np.sqrt(h) @ q.T, q * h @ q.T
    s, indefinite = np.eye(8), 0
    for g in grads:
        s = rounded(0.95 * s + 0.05 * np.outer(g, g))
        indefinite += int(np.linalg.eigvalsh(s)[0] <= 0)
    result: dict[str, float] = {"indefinite": indefinite / steps}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        method = pr.IFShampoo(beta2=0.05, damping=0.0, momentum=0.0, riemannian_momentum=0.5, narrow_state=True)
        param = torch.zeros(8, dtype=dtype)
        state, total = method.init(param), np.zeros((8, 8))
        for t, g in enumerate(torch.as_tensor(grads).to(dtype)):
            _, state = method.update(g, state, param)
            if t >= steps // 3:
                k = state.factors[0].double().numpy()
                total += k @ k.T / (steps - steps // 3)
        root = np.linalg.cholesky(truth)
        spectrum = np.linalg.eigvalsh(root.T @ total @ root)
        result[f"{name} low"], result[f"{name} high"] = float(spectrum[0]), float(spectrum[-1])
    return result


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    curves = fisher()
    stable = {f"{condition:g}": stability(condition) for condition in CONDITIONS}
    figure, (left, middle, right) = common.axes(13, 4, 3)
    for colour, (name, curve) in zip(common.COLOURS, curves.items(), strict=False):
        left.plot(*zip(*curve, strict=True), color=colour, linewidth=2)
        height = 0.9 - 0.08 * list(curves).index(name)
        left.text(0.97, height, f"{name} {curve[-1][1]:.3f}", ha="right", color=colour, transform=left.transAxes)
    left.set(xlabel="steps", ylim=(0, 0.5), ylabel="relative distance to the Fisher matrix")
    left.set_title("mean of S over the later half of the steps", loc="left")
    middle.plot(CONDITIONS, [100 * stable[f"{c:g}"]["indefinite"] for c in CONDITIONS], "o-", color=common.COLOURS[1])
    middle.set(xscale="log", xlabel="condition number", ylabel="% of steps", ylim=(-3, 103))
    middle.set_title("S kept in bfloat16 is not positive definite", loc="left")
    for colour, name in zip(common.COLOURS, ("float32", "bfloat16"), strict=False):
        low, high = ([stable[f"{c:g}"][f"{name} {end}"] for c in CONDITIONS] for end in ("low", "high"))
        right.fill_between(CONDITIONS, low, high, color=colour, alpha=0.25)
        right.plot(CONDITIONS, low, color=colour)
        right.plot(CONDITIONS, high, color=colour)
        right.text(0.04, 0.9 - 0.08 * (name == "bfloat16"), name, color=colour, transform=right.transAxes)
    right.axhline(1, color="black", linewidth=0.8)
    right.set(xscale="log", yscale="log", xlabel="condition number")
    right.set_yticks([0.2, 0.3, 0.5, 1, 2, 3], ["0.2", "0.3", "0.5", "1", "2", "3"])
    right.minorticks_off()
    right.set_title("IF-Shampoo: eigenvalues of mean(K K^T) H", loc="left")
    text = common.table(
        ("", *(f"{curve[k][0]} steps" for k in (9, 29, 59, 119))) if (curve := curves["IF-Shampoo"]) else (),
        ((name, *(f"{c[k][1]:.3f}" for k in (9, 29, 59, 119))) for name, c in curves.items()),
    )
    text += "\n" + common.table(
        ("condition number", "S in bfloat16 indefinite", "IF in bfloat16", "IF in float32"),
        (
            (
                c,
                f"{r['indefinite']:.0%}",
                *(f"{r[f'{n} low']:.2f} .. {r[f'{n} high']:.2f}" for n in ("bfloat16", "float32")),
            )
            for c, r in stable.items()
        ),
    )
    common.save(
        options.output, "inverse_free", tables=text, data={"fisher": curves, "stability": stable}, figure=figure
    )


if __name__ == "__main__":
    main()
