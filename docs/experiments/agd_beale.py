"""AGD on Beale's function from (-2.5, -2.5): its path, beside Adam's and momentum's, and how often it is SGD.

    python docs/experiments/agd_beale.py       # some seconds

Learning rate 1e-3, beta = (0.9, 0.999), 9250 steps, float64: the setting that reproduces the authors' animation.
"""

from __future__ import annotations

from typing import Any

import common
import numpy as np

import precond_ref as pr

STEPS, START, MINIMUM = 9250, np.array([-2.5, -2.5]), np.array([3.0, 0.5])
ADAPTIVE = {"beta1": 0.9, "beta2": 0.999}
METHODS: dict[str, tuple[Any, float]] = {
    "AGD, delta 1e-8": (pr.AGD(delta=1e-8, **ADAPTIVE), 1e-3),
    "AGD, delta 1": (pr.AGD(delta=1.0, **ADAPTIVE), 1e-3),
    "AGD, delta 10": (pr.AGD(delta=10.0, **ADAPTIVE), 1e-3),
    "AGD, delta 100": (pr.AGD(delta=100.0, **ADAPTIVE), 1e-3),
    "Adam": (pr.Adam(eps=1e-8, **ADAPTIVE), 1e-3),
    "SGD, momentum 0.9": (pr.SGD(momentum=0.9), 1e-7),
}


def loss(x: Any, y: Any) -> Any:
    """Beale's function, minimum 0 at (3, 1/2)."""
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def gradient(p: np.ndarray) -> np.ndarray:
    x, y = p
    a, b, c = 1.5 - x + x * y, 2.25 - x + x * y**2, 2.625 - x + x * y**3
    return np.array(
        [2 * (a * (y - 1) + b * (y**2 - 1) + c * (y**3 - 1)), 2 * x * (a + 2 * b * y + 3 * c * y**2)]
    )  # fmt: skip


def run(method: Any, lr: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the points (STEPS + 1, 2) and at each step the share of coordinates on SGD's branch (NaN: no branch)."""
    points, shares, state = [START], [], method.init(START)
    for _ in range(STEPS):
        direction, state = method.update(gradient(points[-1]), state, points[-1])
        points.append(points[-1] - lr * direction)
        shares.append(float(method.diagnose(state).sgd_share) if isinstance(method, pr.AGD) else np.nan)
    return np.array(points), np.array(shares)


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    figure, (path, share) = common.axes(12, 4.6, 2, width_ratios=(1, 1.15))
    x, y = np.meshgrid(np.linspace(-4, 4, 200), np.linspace(-4, 4, 200))
    path.contour(x, y, np.log10(loss(x, y) + 1e-3), levels=14, colors="#cccccc", linewidths=0.7)
    rows, data = [], {}
    for i, (name, (method, lr)) in enumerate(METHODS.items()):
        points, shares = run(method, lr)
        colour = common.COLOURS[i]
        path.plot(*points.T, color=colour, linewidth=2.4 if i == 0 else 1.6)
        path.plot(*points[-1], "o", color=colour, markersize=6)
        if isinstance(method, pr.AGD):
            smooth = np.convolve(shares, np.ones(250) / 250, mode="valid")
            share.plot(range(250, STEPS + 1), smooth, color=colour, linewidth=2)
        mean = float(np.mean(shares))
        rows.append(
            (name, f"{lr:g}", *(f"({points[k][0]:.3f}, {points[k][1]:.3f})" for k in (1000, STEPS)),
             f"{np.linalg.norm(points[-1] - MINIMUM):.3f}", "-" if np.isnan(mean) else f"{mean:.0%}")
        )  # fmt: skip
        data[name] = {
            "end": points[-1].tolist(),
            "at 1000": points[1000].tolist(),
            "share": None if np.isnan(mean) else mean,
        }
        text = name if np.isnan(mean) else f"{name}: {mean:.0%} SGD"
        share.text(
            1.02,
            0.95 - 0.09 * i,
            text,
            color=colour,
            transform=share.transAxes,
            fontweight="bold" if i == 0 else "normal",
        )
    path.plot(*MINIMUM, "*", color="black", markersize=13)
    path.annotate("minimum", MINIMUM, xytext=(-4, 12), textcoords="offset points", ha="center")
    path.plot(*START, "x", color="black", markersize=8)
    path.set(xlim=(-3, 4), ylim=(-3, 2), xlabel="x", ylabel="y")
    path.set_title("9250 steps from the cross", loc="left")
    share.set(
        xlabel="steps", xlim=(0, STEPS), ylim=(-0.03, 1.03), yticks=[0, 0.5, 1], yticklabels=["0", "50 %", "100 %"]
    )
    share.set_title("share of coordinates that take SGD's step (mean of 250)", loc="left")
    head = ("method", "learning rate", "after 1000 steps", "after 9250", "distance to (3, 0.5)", "SGD share")
    common.save(options.output, "agd_beale", tables=common.table(head, rows), data=data, figure=figure)


if __name__ == "__main__":
    main()
