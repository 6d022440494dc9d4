"""RF-RMSProp with its state in bfloat16: up to beta2 = 2^-9 the state cannot leave its start.

    python docs/experiments/dead_zone.py       # some seconds; needs PyTorch for bfloat16

Gradients of one size, 2^-10: in exact arithmetic s decays from 1 to 2^-20. The tuned values of beta2 are those of the
authors' published sweeps.
"""

from __future__ import annotations

import math

import common
import torch

import precond_ref as pr

STEPS = 4000
TUNED = {
    1.2e-4: "ResNet50, MSE",
    5.6e-4: "DenseNet121",
    5.8e-4: "VGG16",
    1.18e-3: "ResNet34",
    1.5e-3: "ResNet50",
    2.0**-9: "",
    2.0**-8: "",
    0.0103: "SwinViT",
    0.0155: "GCViT",
    0.032: "FocalNet",
}


def run(beta2: float, narrow: bool) -> list[float]:
    """Return s after each step."""
    param = torch.ones(1, dtype=torch.bfloat16)
    method = pr.RFRMSProp(beta2=beta2, narrow_state=narrow)
    state, out = method.init(param), [1.0]
    for _ in range(STEPS):
        _, state = method.update(2.0**-10 * param, state, param)
        out.append(float(state.s[0]))
    return out


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    figure, panel = common.axes(9, 4.2)
    rows, data = [], {}
    drawn = (1.18e-3, 2.0**-9, 2.0**-8, 0.0103, 0.032)
    for beta2, network in TUNED.items():
        narrow, wide = run(beta2, True), run(beta2, False)
        exact = (1 - beta2) ** STEPS + (1 - (1 - beta2) ** STEPS) * 2.0**-20
        stall = next(t for t, s in enumerate(narrow) if s == narrow[-1])
        rows.append(
            (
                network or f"2^{round(math.log2(beta2))}",
                f"{beta2:.4g}",
                f"{narrow[-1]:.4g}",
                f"{wide[-1]:.4g}",
                f"{exact:.4g}",
                stall,
            )
        )
        data[f"{beta2:.6g}"] = {"bfloat16": narrow[-1], "float32": wide[-1], "exact": exact, "last change": stall}
        if beta2 in drawn:
            colour = common.COLOURS[drawn.index(beta2)]
            panel.plot(range(1, STEPS + 2), narrow, color=colour, linewidth=2.4)
            panel.plot(range(1, STEPS + 2), wide, color=colour, linewidth=1.2, linestyle="--")
            panel.text(
                1.02,
                0.95 - 0.09 * drawn.index(beta2),
                f"beta2 = {beta2:.4g}, {network or f'2^{round(math.log2(beta2))}'}"
                + ": stays at 1" * (narrow[-1] == 1),
                color=colour,
                transform=panel.transAxes,
            )
    panel.text(
        1.02, 0.4, "full line: state in bfloat16\ndashed: in float32", transform=panel.transAxes, color="#444444"
    )
    panel.set(xscale="log", yscale="log", xlabel="steps", ylabel="s")
    panel.set_title("decay of s when the gradients are small", loc="left")
    head = ("tuned for", "beta2", "s in bfloat16", "in float32", "exact", "last change at step")
    common.save(options.output, "dead_zone", tables=common.table(head, rows), data=data, figure=figure)


if __name__ == "__main__":
    main()
