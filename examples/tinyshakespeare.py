"""A character-level transformer on tinyshakespeare, trained with several methods in PyTorch and in JAX side by side.

    export PRECOND_REF_DATA=folder/of/tinyshakespeare.txt OMP_NUM_THREADS=1
    python examples/tinyshakespeare.py --output curves.svg        # python -m pip install -e ".[cli,torch,jax]"
    python examples/tinyshakespeare.py --framework torch --methods ASGO,AdamW --steps 100
    python examples/tinyshakespeare.py --tune                     # repeat the search of the learning rates
    python examples/tinyshakespeare.py --forms --steps 100        # presets of Muon, SOAP, Shampoo, ... in PyTorch

All runs have the same architecture, first weights and batches, and advance together, step by step. The matrices of
the transformer's layers get the method; embeddings, head and norms get Adam at the rate found for AdamW.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from precond_ref.compare.rates import end_loss, search
from precond_ref.compare.report import BEST, COLOURS, GREY
from precond_ref.problems import load_text

# jaxlib 0.10 stops for ever when as many batched factorisations run at once as its CPU pool has threads (each waits in
# a thread for others to do the work), and that pool has as many threads as there are cores; this makes it larger.
os.environ.setdefault("NPROC", "16")

RATES = Path(__file__).with_name("tinyshakespeare_rates.json")
FORMS_RATES = RATES.with_name("tinyshakespeare_forms_rates.json")
TUNING_SEED = 101
ADAMW_DECAY = 0.01


class Shape(NamedTuple):
    """Sizes of the network and of a batch."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    context: int = 64
    batch: int = 16


# Attribute path in precond_ref_torch, function in precond_ref_jax; all other fields have their defaults. AdamW is the
# frameworks' own.
METHODS: dict[str, tuple[str, str]] = {
    "ASGO": ("ASGO", "asgo"),
    "SShampoo.practical": ("SShampoo.practical", "s_shampoo_practical"),
    "IFShampoo": ("IFShampoo", "if_shampoo"),
    "AGD": ("AGD", "agd"),
    "MBF": ("MBF", "mbf"),
    "Shampoo": ("Shampoo", "shampoo"),
    "SOAP": ("SOAP", "soap"),
    "KLShampoo": ("KLShampoo", "klshampoo"),
    "KLShampoo.soap": ("KLShampoo.soap", "klshampoo_soap"),
    "Muon": ("Muon", "muon"),
    "NorMuon": ("NorMuon", "normuon"),
    "AdaMuon": ("AdaMuon", "adamuon"),
    "Adafactor": ("Adafactor", "adafactor"),
    "AdamW": ("", ""),
}
FORMS = (
    "Muon", "Muon.exact", "Muon.jordan", "Muon.moonlight", "Muon.torch", "Muon.optax", "Muon.pytorch_optimizer",
    "Muon.heavyball", "Muon.emerging", "Muon.dion", "NorMuon", "NorMuon.article", "NorMuon.pytorch_optimizer",
    "NorMuon.emerging", "NorMuon.dion", "AdaMuon", "AdaMuon.pytorch_optimizer", "AdaMuon.emerging", "SOAP",
    "SOAP.nvidia", "Shampoo", "Shampoo.production", "EShampoo", "EShampoo.meta_soap", "KLShampoo", "KLShampoo.soap",
    "KLShampoo.meta", "KLShampoo.exact", "Adafactor", "Adafactor.torch", "Adafactor.optax", "Adafactor.timm",
    "Adafactor.big_vision", "Adam", "Adam.torch_nadam", "Adam.optax_nadam", "Adam.keras", "Adam.keras_nadam",
    "Adam.torch_radam", "RMSProp", "AdaGrad", "AdamW",
)  # fmt: skip
"""The forms of ``--forms``, of precond_ref_torch, and the yardstick."""


def options(method: str, shape: Shape) -> dict[str, float]:
    """Return fields that the problem decides: the number of terms whose mean is the loss."""
    return {"batch_size": float(shape.batch * shape.context)} if method == "IFShampoo" else {}


# ---- data and first weights -----------------------------------------------------------------------------------------


class Data(NamedTuple):
    """The text as numbers; its last tenth is for validation."""

    train: np.ndarray
    validation: np.ndarray
    characters: int

    @classmethod
    def of(cls, text: str) -> Data:
        """Return the data of a text, with characters numbered in the order of their code points."""
        alphabet, numbers = np.unique(np.frombuffer(text.encode("utf-32-le"), "<u4"), return_inverse=True)
        cut = len(numbers) * 9 // 10
        return cls(numbers[:cut], numbers[cut:], len(alphabet))

    def batches(self, shape: Shape, seed: int) -> Iterator[np.ndarray]:
        """Yield without end (batch, context + 1) tokens from random places of the training part."""
        random = np.random.default_rng([seed, 1])
        window = np.arange(shape.context + 1)
        while True:
            yield self.train[random.integers(len(self.train) - shape.context, size=(shape.batch, 1)) + window]

    def held_out(self, shape: Shape, count: int = 128) -> np.ndarray:
        """Return (at most ``count``, context + 1) tokens, from places spread evenly over the validation part."""
        places = np.arange(0, len(self.validation) - shape.context, shape.context)
        chosen = places[np.linspace(0, len(places) - 1, min(count, len(places))).astype(int)]
        return self.validation[chosen[:, None] + np.arange(shape.context + 1)]

    def unigram_entropy(self) -> float:
        """Return the cross entropy of the validation part under the frequencies of the training part, in nats."""
        counts = np.bincount(self.train, minlength=self.characters) + 1.0
        return float(-np.log(counts / counts.sum())[self.validation].mean())


def first_weights(characters: int, shape: Shape, seed: int) -> dict[str, np.ndarray]:
    """Return the first weights by the names of `torch_model`; matrices are (out, in)."""
    random = np.random.default_rng([seed, 0])
    w = shape.width
    sizes = {"token.weight": (characters, w), "position.weight": (shape.context, w)}
    for i in range(shape.layers):
        block = f"blocks.{i}."
        sizes |= {block + "norm1.weight": (w,), block + "norm1.bias": (w,)}
        sizes |= {block + f"{name}.weight": (w, w) for name in ("query", "key", "value", "out")}
        sizes |= {block + "norm2.weight": (w,), block + "norm2.bias": (w,)}
        sizes |= {block + "up.weight": (4 * w, w), block + "down.weight": (w, 4 * w)}
    sizes |= {"norm.weight": (w,), "norm.bias": (w,), "head.weight": (characters, w)}
    weights = {}
    for name, size in sizes.items():
        if len(size) == 1:
            weights[name] = np.full(size, float(name.endswith("weight")))
        else:
            scale = 0.1 if name.startswith(("token", "position")) else size[1] ** -0.5
            weights[name] = scale * random.standard_normal(size)
    return weights


# ---- PyTorch --------------------------------------------------------------------------------------------------------


def torch_model(characters: int, shape: Shape) -> Any:
    """Return the network as a `torch.nn.Module` from tokens (batch, time) to logits (batch, time, characters)."""
    import torch
    from torch import nn
    from torch.nn.functional import gelu, scaled_dot_product_attention

    width = shape.width

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
            self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm1(x)
            q, k, v = (
                f(y).unflatten(-1, (shape.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
            )
            seen = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
            x = x + self.out(seen)
            return x + self.down(gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.position = nn.Embedding(characters, width), nn.Embedding(shape.context, width)
            self.blocks = nn.Sequential(*(Block() for _ in range(shape.layers)))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters, bias=False)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.blocks(self.token(tokens) + self.position.weight)))

    return Transformer()


class TorchRun:
    """One method training the network in PyTorch."""

    def __init__(
        self, method: str, lr: float, adam_lr: float, weights: dict[str, np.ndarray], shape: Shape, dtype: str
    ) -> None:
        import torch

        import precond_ref_torch

        self.torch = torch
        self.model = torch_model(len(weights["head.weight"]), shape).to(getattr(torch, dtype))
        self.model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        if method == "AdamW":
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=ADAMW_DECAY)
            return
        adam = {"lr": adam_lr}
        groups = precond_ref_torch.param_groups_for(self.model, embedding=adam, head=adam, norm=adam)
        make: Any = precond_ref_torch
        for name in METHODS.get(method, (method,))[0].split("."):
            make = getattr(make, name)
        self.optimizer = make(groups, lr=lr, **options(method, shape))

    def _loss(self, tokens: np.ndarray) -> Any:
        tokens = self.torch.from_numpy(tokens)
        logits = self.model(tokens[:, :-1])
        return self.torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def step(self, tokens: np.ndarray) -> float:
        """One step; the loss before it."""
        self.optimizer.zero_grad()
        loss = self._loss(tokens)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def loss(self, tokens: np.ndarray) -> float:
        """Mean loss in nats per character."""
        with self.torch.no_grad():
            return self._loss(tokens).item()


# ---- JAX ------------------------------------------------------------------------------------------------------------


def jax_loss(params: dict[str, Any], tokens: Any, shape: Shape) -> Any:
    """Mean loss in nats per character of the same network in JAX."""
    import jax
    import jax.numpy as jnp
    import optax

    def norm(x: Any, name: str) -> Any:
        return jax.nn.standardize(x, epsilon=1e-5) * params[f"{name}.weight"] + params[f"{name}.bias"]

    def linear(x: Any, name: str) -> Any:
        return x @ params[f"{name}.weight"].T

    x = params["token.weight"][tokens[:, :-1]] + params["position.weight"]
    for block in (f"blocks.{i}" for i in range(shape.layers)):
        y = norm(x, f"{block}.norm1")
        q, k, v = (
            jnp.reshape(linear(y, f"{block}.{name}"), (*y.shape[:2], shape.heads, -1))
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(shape.width // shape.heads)
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[2:], bool)), scores, -jnp.inf)
        seen = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        x = x + linear(jnp.reshape(seen, y.shape), f"{block}.out")
        x = x + linear(jax.nn.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.up")), f"{block}.down")
    logits = linear(norm(x, "norm"), "head")
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


class JaxRun:
    """One method training the network in JAX."""

    def __init__(
        self, method: str, lr: float, adam_lr: float, weights: dict[str, np.ndarray], shape: Shape, dtype: str
    ) -> None:
        import jax
        import optax

        import precond_ref_jax

        if method == "AdamW":
            optimizer = optax.adamw(lr, weight_decay=ADAMW_DECAY)
        else:
            make = getattr(precond_ref_jax, METHODS[method][1])
            optimizer = optax.multi_transform(
                {"matrix": make(lr, **options(method, shape)), "rest": precond_ref_jax.adam(adam_lr)},
                lambda params: {
                    name: "matrix" if name.startswith("blocks") and p.ndim == 2 else "rest"
                    for name, p in params.items()
                },
            )
        self.params = {name: jax.numpy.asarray(value, dtype) for name, value in weights.items()}
        self.state = optimizer.init(self.params)

        def step(params: Any, state: Any, tokens: Any) -> Any:
            value, grads = jax.value_and_grad(jax_loss)(params, tokens, shape)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        self._step = jax.jit(step, donate_argnums=(0, 1))
        self._loss = jax.jit(jax_loss, static_argnums=2)
        self.shape, self.wait = shape, jax.block_until_ready

    def step(self, tokens: np.ndarray) -> float:
        """One step; the loss before it."""
        self.params, self.state, value = self.wait(self._step(self.params, self.state, tokens))
        return float(value)

    def loss(self, tokens: np.ndarray) -> float:
        """Mean loss in nats per character."""
        return float(self._loss(self.params, tokens, self.shape))


FRAMEWORKS: dict[str, Callable[..., Any]] = {"torch": TorchRun, "jax": JaxRun}


# ---- runs -----------------------------------------------------------------------------------------------------------


class Curves:
    """One run with its measurements."""

    def __init__(self, framework: str, method: str, lr: float, run: Any) -> None:
        self.framework, self.method, self.lr, self.run = framework, method, lr, run
        self.batch_losses: list[float] = []
        self.seconds: list[float] = []
        self.points: list[tuple[int, float]] = []

    def step(self, tokens: np.ndarray) -> None:
        """Make one timed step; `ms` drops the time of the first step, which may compile."""
        start = time.perf_counter()
        self.batch_losses.append(self.run.step(tokens))
        self.seconds.append(time.perf_counter() - start)

    def look(self, tokens: np.ndarray) -> None:
        """Record the present validation loss."""
        self.points.append((len(self.batch_losses), self.run.loss(tokens)))

    @property
    def train_loss(self) -> float:
        """Mean of the last tenth of the batch losses."""
        return end_loss(self.batch_losses)

    @property
    def validation_loss(self) -> float:
        """The last recorded validation loss; infinite if it is NaN."""
        return self.points[-1][1] if math.isfinite(self.points[-1][1]) else math.inf

    @property
    def ms(self) -> float:
        """Median time of a step: loss, gradient and update."""
        return 1e3 * statistics.median(self.seconds[1:] or self.seconds)


def prepare(
    frameworks: list[str], rates: dict[str, float], adam_lr: float, data: Data, shape: Shape, seed: int, dtype: str
) -> list[Curves]:
    """Return a run of each method, at its rate, in each framework, all from the same weights."""
    weights = first_weights(data.characters, shape, seed)
    return [
        Curves(name, method, lr, FRAMEWORKS[name](method, lr, adam_lr, weights, shape, dtype))
        for method, lr in rates.items()
        for name in frameworks
    ]


def train(runs: list[Curves], data: Data, shape: Shape, seed: int, steps: int) -> None:
    """Train all runs in turn, step by step, on the same batches, so that their times are measured side by side."""
    held_out = data.held_out(shape)
    every = max(1, steps // 16)
    progress = Console(stderr=True)
    batches = islice(data.batches(shape, seed), steps)
    for step, tokens in enumerate(
        track(batches, "training", total=steps, console=progress, disable=not progress.is_terminal)
    ):
        for run in runs:
            if step % every == 0:
                run.look(held_out)
            run.step(tokens)
    for run in runs:
        run.look(held_out)


def tune(methods: list[str], data: Data, shape: Shape, steps: int, record: Path) -> None:
    """Search the rates by the rule of `precond_ref.compare`, in PyTorch, for AdamW first, and record all results."""
    setting = {**shape._asdict(), "steps": steps, "seed": TUNING_SEED, "framework": "torch", "dtype": "float32"}
    old = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    found = old["methods"] if old.get("setting") == setting and "AdamW" not in methods else {}
    for method in sorted(methods, key=lambda m: m != "AdamW"):
        if method != "AdamW" and "AdamW" not in found:
            raise typer.BadParameter("the rate of AdamW is needed first, at the same setting: --methods AdamW,...")

        def measure(lr: float, method: str = method) -> list[float]:
            adam_lr = lr if method == "AdamW" else found["AdamW"]["lr"]
            (run,) = prepare(["torch"], {method: lr}, adam_lr, data, shape, TUNING_SEED, "float32")
            for tokens in islice(data.batches(shape, TUNING_SEED), steps):
                run.step(tokens)
                if not math.isfinite(run.batch_losses[-1]):
                    break
            print(f"{method:<18} {lr:<9g} {run.train_loss:.4f}", flush=True)
            return [run.train_loss]

        found[method] = search(measure)
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(found.items()))
        text = f'{{\n "setting": {json.dumps(setting)},\n "methods": {{\n{rows}\n }}\n}}\n'
        record.write_text(text, encoding="utf-8")


# ---- what is shown --------------------------------------------------------------------------------------------------


def ranking(runs: list[Curves]) -> list[dict[str, Curves]]:
    """Return each method's runs by framework, the smallest validation loss (mean over the frameworks) first."""
    by_method: dict[str, dict[str, Curves]] = {}
    for run in runs:
        by_method.setdefault(run.method, {})[run.framework] = run
    return sorted(by_method.values(), key=lambda found: sum(run.validation_loss for run in found.values()))


def apart(found: dict[str, Curves]) -> np.ndarray:
    """Return |torch - JAX| of the batch losses."""
    return np.abs(np.subtract(found["torch"].batch_losses, found["jax"].batch_losses))


def table(runs: list[Curves]) -> Table:
    """Return a table with a row for each method, the best first."""
    ranked = ranking(runs)
    frameworks = list(ranked[0])
    yardstick = next((found for found in ranked if found[frameworks[0]].method == "AdamW"), ranked[0])
    result = Table(box=None, pad_edge=False, header_style="bold")
    result.add_column("#", justify="right")
    result.add_column("method", no_wrap=True)
    titles = [f"{what}\n{name}" for what in ("validation", "train", "time") for name in frameworks]
    apart_titles = ["apart in\n10 steps", "apart\nin all"] if len(frameworks) == 2 else []
    for title in ("lr", *titles, *apart_titles):
        result.add_column(title, justify="right", no_wrap=True)
    for rank, found in enumerate(ranked, start=1):
        both = list(found.values())
        cells = [f"{run.validation_loss:.4f}" for run in both] + [f"{run.train_loss:.4f}" for run in both]
        cells += [f"{run.ms / yardstick[run.framework].ms:.2f}" for run in both]
        if apart_titles:
            cells += [f"{apart(found)[:10].max():.1e}", f"{apart(found).max():.1e}"]
        result.add_row(str(rank), both[0].method, f"{both[0].lr:.4g}", *cells)
    return result


def figure(runs: list[Curves], entropy: float, heading: str) -> Any:
    """Draw the validation losses, PyTorch's as lines and JAX's as circles on them, and the distance of the two.

    All of up to 14 methods have a colour and a name; of more the best five, and the others are grey.
    """
    from matplotlib.figure import Figure

    ranked = ranking(runs)
    frameworks = list(ranked[0])
    result = Figure(figsize=(12, 4.8) if len(frameworks) == 2 else (8, 4.8), layout="constrained")
    panels = result.subplots(1, len(frameworks), squeeze=False, width_ratios=(1.3, 1)[: len(frameworks)])[0]
    axes = panels[0]
    finite = [loss for run in runs for _, loss in run.points[1:] if math.isfinite(loss)]
    low, high = min(finite, default=0.0), min(max(finite, default=entropy), entropy)
    low, high = low - 0.03 * (high - low), high + 0.05 * (high - low)
    axes.set_ylim(low, high)
    axes.axhline(entropy, color="0.55", linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate(
        "frequencies of the characters alone", (0.99, entropy), xycoords=("axes fraction", "data"),
        xytext=(0, -3), textcoords="offset points", ha="right", va="top", fontsize=8.5, color="0.4",
    )  # fmt: skip
    named = len(ranked) if len(ranked) <= len(METHODS) else BEST
    gap = min(0.09, 0.94 / named)
    for rank, found in enumerate(ranked):
        colour, first = COLOURS[rank % len(COLOURS)] if rank < named else GREY, found[frameworks[0]]
        for name, run in found.items():
            circles = {"linestyle": "none", "marker": "o", "markersize": 4, "markerfacecolor": "none"}
            width = 2.4 if rank == 0 else 1.5 if rank < named else 0.8
            style = circles if name == "jax" and len(found) == 2 else {"linewidth": width}
            axes.plot(*zip(*run.points, strict=True), color=colour, zorder=3 - rank / 10, **style)
        if rank == named:
            axes.annotate(
                f"{len(ranked) - named} others in grey", xy=(1.06, 0.03 + gap * named), xycoords="axes fraction",
                va="center", fontsize=9.5, color="0.4", annotation_clip=False,
            )  # fmt: skip
        if rank >= named:
            continue
        axes.annotate(
            f"{rank + 1}  {first.method}  {first.validation_loss:.3f}",
            xy=(first.points[-1][0], min(max(first.validation_loss, low), high)),
            xytext=(1.06, 0.03 + gap * rank), textcoords="axes fraction", va="center",
            fontsize=9.5, color=colour,
            fontweight="bold" if rank == 0 else "normal", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "linewidth": 0.7, "relpos": (0, 0.5), "shrinkA": 1, "color": colour},
        )  # fmt: skip
        if len(panels) == 2:
            steps = range(1, len(first.batch_losses) + 1)
            panels[1].plot(steps, np.maximum.accumulate(np.maximum(apart(found), 1e-8)), color=colour, linewidth=1.1)
    axes.set_title(
        "validation loss, nats per character" + (" (line: PyTorch, circles: JAX)" if len(panels) == 2 else ""),
        loc="left", fontsize=10,
    )  # fmt: skip
    if len(panels) == 2:
        panels[1].set_title("|PyTorch - JAX| of the batch losses, largest so far", loc="left", fontsize=10)
        panels[1].set_yscale("log")
    for panel in panels:
        panel.set_xlabel("steps")
        panel.set_xlim(0, runs[0].points[-1][0])
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    result.suptitle(heading, x=0.01, ha="left", fontsize=10)
    return result


def main(
    framework: Annotated[str, typer.Option(metavar="torch|jax|both")] = "both",
    methods: Annotated[str, typer.Option(metavar="NAME,...")] = ",".join(METHODS),
    forms: Annotated[bool, typer.Option("--forms", help="Forms of 11 methods instead, in PyTorch.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="[default: 300; with --tune: 200]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="First weights and batches.")] = 0,
    dtype: Annotated[str, typer.Option(metavar="float32|float64")] = "float32",
    text: Annotated[str, typer.Option(help="A text in the folder PRECOND_REF_DATA, or a path.")] = "tinyshakespeare",
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="The figure; .svg, .png, .pdf, ...")] = None,
    tune_rates: Annotated[bool, typer.Option("--tune", help="Search the rates and record them.")] = False,
) -> None:
    """Train a small character-level transformer with each method, in PyTorch and in JAX."""
    names = list(FORMS) if forms else [name.strip() for name in methods.split(",")]
    framework, record = ("torch", FORMS_RATES) if forms else (framework, RATES)
    if unknown := [name for name in names if name not in METHODS and not forms]:
        raise typer.BadParameter(f"no method is called {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if framework not in ("both", *FRAMEWORKS) or dtype not in ("float32", "float64"):
        raise typer.BadParameter(f"--framework {framework} or --dtype {dtype} is not one of those there are")
    try:
        data, shape = Data.of(load_text(text)), Shape()
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    if tune_rates:
        tune(names, data, shape, steps or 200, record)
        return
    if dtype == "float64" and framework != "torch":
        import jax

        jax.config.update("jax_enable_x64", True)
    recorded = json.loads(record.read_text(encoding="utf-8"))
    rates = {name: recorded["methods"][name]["lr"] for name in names}
    frameworks = list(FRAMEWORKS) if framework == "both" else [framework]
    runs = prepare(frameworks, rates, recorded["methods"]["AdamW"]["lr"], data, shape, seed, dtype)
    train(runs, data, shape, seed, steps or 300)
    entries = sum(value.size for value in first_weights(data.characters, shape, seed).values())
    heading = (
        f"character-level transformer, {shape.layers} layers, width {shape.width}, {shape.heads} heads, context "
        f"{shape.context}, {entries:,} parameters\n"
        f"{text}, {steps or 300} steps, batches of {shape.batch}, seed {seed}, {dtype}"
    )
    print(heading, end="\n\n")
    Console(width=120, highlight=False).print(table(runs))
    print(f"\nfrequencies of the characters alone: {data.unigram_entropy():.4f}")
    if output is not None:
        figure(runs, data.unigram_entropy(), heading).savefig(output, dpi=120)


if __name__ == "__main__":
    typer.run(main)
