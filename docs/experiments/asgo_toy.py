"""ASGO beside its relatives on three convex matrix problems, 20 x 30, 200 steps: the mean iterate's loss, best rate.

    python docs/experiments/asgo_toy.py        # half a minute

Start at zero; 21 rates from 1e-3 to 1e2, the same for all; eps 1e-6; float64; seed 0.
"""

from __future__ import annotations

from typing import Any

import common
import numpy as np

import precond_ref as pr

M, N, STEPS = 20, 30, 200
RATES = 10.0 ** np.linspace(-3, 2, 21)
METHODS: dict[str, Any] = {
    "ASGO": pr.ASGO.theory(eps=1e-6),
    "Shampoo": pr.Shampoo(eps=1e-6),
    "AdaGrad": pr.AdaGrad(eps=1e-6),
    "DASGO, rows": pr.DASGO.theory(eps=1e-6),
    "AdaGrad-Norm": pr.SAdaGrad(size=1),
    "Muon, no momentum": pr.Muon(momentum=0.0, nesterov=False, rms=None, root="svd"),
    "SGD": pr.SGD(),
}


def problems() -> dict[str, tuple[Any, Any]]:
    """Return value and (sub)gradient of each problem by name, as functions of stacks (..., 20, 30)."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((M, M)))[0]
    A = q * np.geomspace(1, 1e-3, M) @ q.T
    orthogonal = np.linalg.qr(rng.standard_normal((N, M)))[0].T
    slim = np.outer(rng.standard_normal(M), rng.standard_normal(N))
    slim /= np.linalg.norm(slim, 2)
    B, dense = rng.standard_normal((4, M)), rng.standard_normal((M, N))

    def quadratic(target: np.ndarray) -> tuple[Any, Any]:
        return lambda W: np.sum((W - target) * (A @ (W - target)), axis=(-2, -1)) / 2, lambda W: A @ (W - target)

    return {
        "rotated quadratic, condition 1000, orthogonal target": quadratic(orthogonal),
        "the same, target of rank one": quadratic(slim),
        "L1 regression, gradients of rank four": (
            lambda W: np.sum(np.abs(B @ (W - dense)), axis=(-2, -1)),
            lambda W: B.T @ np.sign(B @ (W - dense)),
        ),
    }


def run(method: Any, value: Any, gradient: Any) -> np.ndarray:
    """Return the loss of the mean iterate after each step over the first loss, (STEPS, rates), all rates in a stack."""
    shape = (M, N) if method.ndims[1] > 1 else (M * N,)
    W, mean, out = np.zeros((len(RATES), M, N)), np.zeros((len(RATES), M, N)), []
    state = method.init(W.reshape(len(RATES), *shape), stack_ndim=1)
    first = value(W[0])
    with np.errstate(all="ignore"):
        for t in range(STEPS):
            mean = mean + (W - mean) / (t + 1)
            out.append(value(mean) / first)
            flat = [a.reshape(len(RATES), *shape) for a in (gradient(W), W)]
            direction, state = method.update(flat[0], state, flat[1])
            W = W - RATES[:, None, None] * direction.reshape(W.shape)
    return np.nan_to_num(np.array(out), nan=np.inf)


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    figure, panels = common.axes(12, 4, 3)
    rows, data = [], {}
    for panel, (name, (value, gradient)) in zip(panels, problems().items(), strict=True):
        best: dict[str, float] = {}
        data[name] = {}
        for colour, (title, method) in zip(common.COLOURS, METHODS.items(), strict=True):
            curves = run(method, value, gradient)
            k = int(np.argmin(curves[-1]))
            best[title] = float(curves[-1, k])
            data[name][title] = {"loss": best[title], "lr": float(RATES[k]), "edge": k in (0, len(RATES) - 1)}
            panel.plot(range(1, STEPS + 1), curves[:, k], color=colour, linewidth=2.6 if title == "ASGO" else 1.5)
        for rank, (title, loss) in enumerate(sorted(best.items(), key=lambda item: -item[1])):
            colour = common.COLOURS[list(METHODS).index(title)]
            weight = "bold" if title == "ASGO" else "normal"
            panel.text(
                0.03, 0.46 - 0.066 * rank, f"{loss:.1e}  {title}", color=colour, transform=panel.transAxes,
                fontsize=9, fontweight=weight,
            )  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel="steps", ylim=(min(best.values()) / 300, 1.5))
        panel.set_title(name.replace(", orthogonal", ",\northogonal"), loc="left", fontsize=9.5)
        rows.append([name, *(f"{best[title]:.1e}" for title in METHODS)])
    panels[0].set_ylabel("loss of the mean iterate / first loss")
    common.save(options.output, "asgo_toy", tables=common.table(("problem", *METHODS), rows), data=data, figure=figure)


if __name__ == "__main__":
    main()
