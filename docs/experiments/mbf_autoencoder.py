"""MBF's MNIST autoencoder at the authors' settings, beside SGD with momentum, Adam and Shampoo, and the authors' log.

    PRECOND_REF_DATA=... python docs/experiments/mbf_autoencoder.py               # all, 1200 iterations each: an hour
    PRECOND_REF_DATA=... python docs/experiments/mbf_autoencoder.py --epochs 2 --methods MBF --output try

784-1000-500-250-30-250-500-1000-784, ReLU except at code and output, cross-entropy summed over the pixels, batches of
1000, float32. An epoch is 60 iterations, as in the authors' log, where it is one pass over 60000 images; here the
10000 images of MNIST's test set are the training set, so that an epoch is six passes. A run is written as soon as it is
done, and a run that is already written is not repeated.
"""

from __future__ import annotations

import json
import math
from typing import Any

import common
import numpy as np
from matplotlib.ticker import LogLocator

import precond_ref as pr
from precond_ref import problems

WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
LINEAR, LAYERS, BATCH, EPOCH = (4, 8), range(1, 9), 1000, 60
JOIN = tuple((f"{layer}/weight", f"{layer}/bias") for layer in LAYERS)
METHODS: dict[str, tuple[Any, float, bool]] = {
    "MBF": (pr.MBF.authors_code(), 1e-5, True),
    "Shampoo": (pr.Shampoo(beta2=0.9, eps=3e-4, every=5), 3e-3, False),
    "Adam": (pr.Adam(eps=1e-4), 3e-4, False),
    "SGD, momentum": (pr.SGD(momentum=0.9), 3e-3, False),
}
"""Rates, damping and eps are those of the authors' demo. The rate of Shampoo is tenfold, because the authors' Shampoo
has a momentum of 0.9. Its roots are renewed every 5 iterations, not every 20: with the roots of the first gradient for
20 iterations it diverges."""
LOG = {
    0: (543.67, 543.67), 1: (172.8, 171.6), 2: (134.6, 133.9), 3: (113.7, 113.1), 4: (95.4, 94.6), 5: (86.5, 85.9),
    6: (80.1, 79.8), 8: (71.6, 71.7), 10: (67.5, 68.1), 20: (59.7, 61.4),
}  # fmt: skip
"""Training and test loss of MBF in the authors' log, by epoch."""


def gradient(params: dict[str, Any], images: np.ndarray) -> tuple[float, dict[str, Any]]:
    """Return loss and gradient."""
    values = [images]
    for layer in LAYERS:
        s = values[-1] @ params[f"{layer}/weight"].T + params[f"{layer}/bias"]
        values.append(s if layer in LINEAR else np.maximum(s, 0))
    z, n = values[-1], len(images)
    small = np.exp(-np.abs(z))
    loss = float(np.sum(np.maximum(z, 0) - z * images + np.log1p(small)) / n)
    delta, grads = (np.where(z >= 0, 1, small) / (1 + small) - images) / n, {}
    for layer in reversed(LAYERS):
        if layer not in LINEAR:
            delta = delta * (values[layer] > 0)
        grads[f"{layer}/weight"], grads[f"{layer}/bias"] = delta.T @ values[layer - 1], delta.sum(axis=0)
        delta = delta @ params[f"{layer}/weight"]
    return loss, grads


def first_parameters(seed: int) -> dict[str, np.ndarray]:
    """Return parameters by PyTorch's default: uniform within 1 / sqrt(inputs)."""
    rng, params = np.random.default_rng(seed), {}
    for layer in LAYERS:
        fan_in, fan_out = WIDTHS[layer - 1 : layer + 1]
        bound = fan_in**-0.5
        params[f"{layer}/weight"] = rng.uniform(-bound, bound, (fan_out, fan_in)).astype("float32")
        params[f"{layer}/bias"] = rng.uniform(-bound, bound, fan_out).astype("float32")
    return params


def train(name: str, images: np.ndarray, epochs: int, seed: int) -> dict[str, Any]:
    """Train and return the loss over all images after each epoch."""
    method, lr, joined = METHODS[name]
    opt = pr.Optimizer(method, lr=lr, **({"join": JOIN} if joined else {}))
    params, rng = first_parameters(seed), np.random.default_rng([seed, 1])
    state, losses = opt.init(params), [gradient(params, images)[0]]
    with common.progress() as bar, np.errstate(all="ignore"):
        task = bar.add_task(name, total=epochs * EPOCH)
        for step in range(epochs * EPOCH):
            if step % (len(images) // BATCH) == 0:
                order = rng.permutation(len(images))
            batch = images[order[step % (len(images) // BATCH) * BATCH :][:BATCH]]
            params, state = opt.step(params, gradient(params, batch)[1], state)
            bar.advance(task)
            if (step + 1) % EPOCH == 0:
                losses.append(gradient(params, images)[0])
                bar.update(task, description=f"{name}: {losses[-1]:.1f}")
                if not np.isfinite(losses[-1]):
                    break
    return {"losses": losses}


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--epochs", type=int, default=20, help="of 60 iterations")
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by ;")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draw", action="store_true", help="table and figure of the finished runs")
    options = parser.parse_args()
    images = (problems.load_mnist()[0].reshape(-1, 784) / 255).astype("float32") if not options.draw else None
    path = options.output / "mbf_autoencoder.json"
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in options.methods.split(";"):
        if options.draw or len(runs.get(name, {"losses": []})["losses"]) > options.epochs:
            continue
        runs[name] = train(name, images, options.epochs, options.seed)
        common.save(options.output, "mbf_autoencoder", data=runs)
    figure, panel = common.axes(9, 5.4)
    lowest = math.inf
    for name, run in sorted(runs.items(), key=lambda item: -item[1]["losses"][-1]):
        colour = common.COLOURS[list(runs).index(name)]
        lowest = min(lowest / 1.12, run["losses"][-1])  # labels do not touch
        panel.plot(range(len(run["losses"])), run["losses"], color=colour, linewidth=2.4 if name == "MBF" else 1.6)
        panel.annotate(
            f"{name} {run['losses'][-1]:.1f}", (len(run["losses"]) - 1, lowest), xytext=(8, 0),
            textcoords="offset points", va="center", color=colour, annotation_clip=False,
        )  # fmt: skip
    panel.plot(
        list(LOG),
        [training for training, _ in LOG.values()],
        "o",
        color="black",
        markersize=4,
        clip_on=False,
        label="authors' log of MBF (training, 60000 images)",
    )
    panel.set(
        yscale="log",
        xlabel="epochs of 60 iterations",
        ylabel="loss per image",
        xticks=range(0, 21, 5),
        xlim=(0, max(len(r["losses"]) - 1 for r in runs.values())),
    )
    panel.set_ylim(bottom=0.8 * min(min(run["losses"]) for run in runs.values()))
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.set_title("MNIST autoencoder, loss over the 10000 training images", loc="left")
    panel.legend(frameon=False)
    epochs = [e for e in (*range(9), 10, 12, 15, 20) if e < max(len(run["losses"]) for run in runs.values())]
    rows = [
        (name, *(f"{run['losses'][e]:.1f}" if e < len(run["losses"]) else "-" for e in epochs))
        for name, run in runs.items()
    ]
    for i, which in enumerate(("training", "test")):
        rows.append((f"authors' log of MBF, {which}", *(f"{LOG[e][i]:.1f}" if e in LOG else "" for e in epochs)))
    head = ("loss after epoch", *map(str, epochs))
    common.save(options.output, "mbf_autoencoder", tables=common.table(head, rows), data=runs, figure=figure)


if __name__ == "__main__":
    main()
