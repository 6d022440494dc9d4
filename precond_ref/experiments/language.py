"""The comparisons on a language model: claims of ASGO, Sketchy, root-free methods and AGD, by one experiment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from precond_ref.compare.rates import SEEDS
from precond_ref.compare.runs import array_bytes
from precond_ref.experiments import training
from precond_ref.experiments.base import NOT, Experiment, Tick, Verdict, claim, decided
from precond_ref.experiments.figures import COLOURS, panels, title
from precond_ref.experiments.numbers import Numbers, column, np, paired, spread
from precond_ref.experiments.training import Entry, Language
from precond_ref.methods.agd import AGD
from precond_ref.methods.asgo import ASGO
from precond_ref.methods.baselines import Adam, RMSProp
from precond_ref.methods.muon import Muon
from precond_ref.methods.root_free import RFAdamW, RFRMSProp
from precond_ref.methods.shampoo import Shampoo
from precond_ref.methods.sketchy import SShampoo
from precond_ref.methods.soap import SOAP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES, SIZE = (2, 8, 16), 8
PEERS = ("AdamW", "RMSProp")
"""The methods with a root beside the root-free ones."""
TERMS = 512.0
"""Characters in a batch, the terms whose mean the loss is."""
ENTRIES = {
    "ASGO": Entry(ASGO()),
    "Muon": Entry(Muon()),
    "SOAP": Entry(SOAP()),
    "Shampoo": Entry(Shampoo()),
    **{f"S-Shampoo {size}": Entry(SShampoo.practical(size=size, merge=1)) for size in SIZES},
    "AdamW": Entry(Adam(), weight_decay=0.01),
    "RMSProp": Entry(RMSProp()),
    "RF-RMSProp": Entry(RFRMSProp(batch_size=TERMS)),
    "RF-RMSProp, momentum": Entry(RFRMSProp(batch_size=TERMS, momentum=0.9)),
    "RF-AdamW": Entry(RFAdamW(batch_size=TERMS)),
    "AGD": Entry(AGD()),
}


def search(tick: Tick, steps: int = 150, **options: Any) -> Numbers:
    """Search the rates; all sizes of S-Shampoo have that of `SIZE`."""
    others = [f"S-Shampoo {size}" for size in SIZES if size != SIZE]
    entries = {name: entry for name, entry in ENTRIES.items() if name not in others}
    found = training.search([Language(seed, **options) for seed in SEEDS], entries, steps, tick)
    return {**found, **dict.fromkeys(others, found[f"S-Shampoo {SIZE}"])}


def one(seed: int, tick: Tick, found: Numbers, steps: int = 150, **options: Any) -> Numbers:
    """Train each method; the bytes are those of the sketches, or of the second moments, and of the whole state."""
    task = Language(seed, **options)
    result = training.compare(task, ENTRIES, steps, found, tick)
    own = {name: value for name, value in task.init().items() if name in task.own}
    for name, entry in ENTRIES.items():
        states = [entry.method.init(value) for value in own.values()]
        second = [getattr(state, "sketches", getattr(state, "grams", getattr(state, "v", ()))) for state in states]
        result[name]["bytes"] = [array_bytes(tuple(second)), array_bytes(tuple(states))]
    return result


def losses(runs: list[Numbers], name: str) -> list[Any]:
    """Return the validation losses of a method."""
    return column(runs, name, "validation")


def at(result: Numbers, seconds: float) -> float | None:
    """Return the validation loss after so much processor time, between the points of the curve; None if diverged."""
    if result["validation"] is None:
        return None
    steps, curve = zip(*result["curve"], strict=True)
    return float(np.interp(seconds * steps[-1] / result["seconds"], steps, curve))


def versus(runs: list[Numbers], name: str, *others: str) -> str:
    """Return the loss of a method and its differences to others, as a sentence."""
    gaps = "; ".join(f"minus {other} {paired(losses(runs, name), losses(runs, other))}" for other in others)
    return f"{name} {spread(losses(runs, name), 4)} nats; {gaps}"


def no_worse(runs: list[Numbers], name: str, other: str, margin: float) -> bool:
    """Return whether the loss of a method is at most a margin above another's, error included."""
    gap = paired(losses(runs, name), losses(runs, other))
    return gap.mean + gap.error <= margin


@claim("A7")
def asgo(runs: list[Numbers]) -> Verdict:
    """Its practical form is effective on language models.

    Holds here if: validation loss below AdamW's, and equal to Muon's within 0.01 nats or below, at fixed steps and at
    fixed processor time; learning rates searched alike, the matrices of the layers only.
    """
    others = ("AdamW", "Muon", "SOAP", "Shampoo")
    seconds = [min(run[name]["seconds"] for name in ("ASGO", *others)) for run in runs]
    timed = {name: [at(run[name], s) for run, s in zip(runs, seconds, strict=True)] for name in ("ASGO", *others)}
    sooner = {other: paired(timed["ASGO"], timed[other]) for other in others}
    gaps = {other: paired(losses(runs, "ASGO"), losses(runs, other)) for other in others}
    text = versus(runs, "ASGO", *others) + f". After {spread(seconds, 2)} s of processor time, where the fastest ends, "
    text += f"ASGO {spread(timed['ASGO'], 4)}; " + "; ".join(f"minus {name} {gap}" for name, gap in sooner.items())
    if not (gaps["AdamW"].below or sooner["AdamW"].below):
        return Verdict(NOT, text)
    good = {}
    for kind, found in {"steps": gaps, "time": sooner}.items():
        good[f"AdamW at fixed {kind}"] = found["AdamW"].below
        good[f"Muon at fixed {kind}"] = found["Muon"].within(0.01) or found["Muon"].below
    return decided(good, text)


@claim("S6")
def sketched(runs: list[Numbers]) -> Verdict:
    """S-Shampoo is competitive with Shampoo and Adam.

    Holds here if: S-Shampoo of size 8 at most 0.01 nats worse than each.
    """
    others = ("Shampoo", "AdamW")
    good = {other: no_worse(runs, "S-Shampoo 8", other, 0.01) for other in others}
    return decided(good, versus(runs, "S-Shampoo 8", *others))


@claim("S7")
def sublinear(runs: list[Numbers]) -> Verdict:
    """This at a memory for second moments that is sub-linear in the weights.

    Holds here if: at most 0.01 nats worse than AdamW at all sizes whose sketches are smaller than the weights.
    """
    adam = runs[0]["AdamW"]["bytes"]
    good, text = {}, []
    for size in SIZES:
        sketches, whole = runs[0][f"S-Shampoo {size}"]["bytes"]
        gap = paired(losses(runs, f"S-Shampoo {size}"), losses(runs, "AdamW"))
        text.append(
            f"size {size}: sketches {sketches / adam[0]:.2f} of Adam's second moments, whole state "
            f"{whole / adam[1]:.2f} of Adam's, loss minus AdamW's {gap}"
        )
        if sketches < adam[0]:
            good[f"size {size}"] = gap.mean + gap.error <= 0.01
    return decided(good, "; ".join(text))


@claim("R3")
def rootless(runs: list[Numbers]) -> Verdict:
    """Nothing is lost on transformers without the root.

    Holds here if: RF-RMSProp at most 0.02 nats worse than RMSProp, and RF-AdamW than AdamW; rates searched, other
    fields at their defaults (RF-RMSProp also with momentum 0.9, the better counts).
    """
    best = min(("RF-RMSProp", "RF-RMSProp, momentum"), key=lambda name: sum(x or 99.0 for x in losses(runs, name)))
    good = {name: no_worse(runs, ours, name, 0.02) for ours, name in ((best, "RMSProp"), ("RF-AdamW", "AdamW"))}
    return decided(good, f"{versus(runs, best, 'RMSProp')}. {versus(runs, 'RF-AdamW', 'AdamW')}")


@claim("G4")
def agd(runs: list[Numbers]) -> Verdict:
    """It generalizes better than Adam and its like on language.

    Holds here if: validation loss below those of AdamW and RMSProp.
    """
    others = ("AdamW", "RMSProp")
    good = {other: paired(losses(runs, "AGD"), losses(runs, other)).below for other in others}
    return decided(good, versus(runs, "AGD", *others))


def table(runs: list[Numbers]) -> str:
    """Return the methods, the best first."""
    weights = runs[0]["AdamW"]["bytes"][0] / 4
    columns = {
        "minus AdamW": lambda name: paired(losses(runs, name), losses(runs, "AdamW")),
        "bytes of state per weight": lambda name: f"{runs[0][name]['bytes'][1] / weights:.1f}",
        "processor seconds": lambda name: spread(column(runs, name, "seconds"), 2),
    }
    return training.table(runs, columns, ", nats")


def draw(runs: list[Numbers]) -> Figure:
    """Draw curves against steps and time, final losses, and losses against bytes."""
    names = training.ranked(runs)
    figure, (left, timed, middle, trained, roots, right) = panels(3, 4.8, 8.0, rows=2)
    shown = [name for name in names if name in ("ASGO", "Muon", "SOAP", "Shampoo", "S-Shampoo 8", "AdamW", "AGD")]
    training.descents(left, timed, runs, shown, first=1)
    left.legend(frameon=False, fontsize=8)
    title(left, "validation loss, median and band", xlabel="steps", ylabel="nats per character")
    title(timed, "the same against processor time", xlabel="seconds")
    few = [name for name in names if name.startswith("RF-") or name in PEERS]
    training.descents(trained, None, runs, few, first=1, key="training")
    training.descents(roots, None, runs, few, first=1)
    roots.legend(frameon=False, fontsize=8)
    title(trained, "loss of the batches, with the root and without", xlabel="steps", ylabel="nats per character")
    title(roots, "validation loss of the same", xlabel="steps")
    training.scored(middle, runs, names, "validation", "AdamW")
    title(middle, "last validation loss of each seed (blue: AdamW)", xlabel="nats per character")
    for rank, name in enumerate((*(f"S-Shampoo {size}" for size in SIZES), "Shampoo", "AdamW")):
        sketches, whole = runs[0][name]["bytes"]
        mid = sorted(losses(runs, name))[len(runs) // 2]
        right.plot([sketches, whole], [mid, mid], color=COLOURS[rank], linewidth=1)
        right.plot(sketches, mid, "o", color=COLOURS[rank], label=name)
        right.plot(whole, mid, "s", color=COLOURS[rank])
    right.legend(fontsize=7, loc="center left", framealpha=0.7)
    title(right, "loss against bytes of state", xlabel="bytes (circle: second moments, square: all)", xscale="log")
    return figure


EXPERIMENTS = (
    Experiment(
        name="language", minutes=5.2, needs=("tinyshakespeare", "torch"),
        claims=(asgo, sketched, sublinear, rootless, agd),
        title="A transformer of two layers, width 32, on tinyshakespeare, 150 steps of 512 characters, 13 methods.",
        search=search, one=one, table=table, draw=draw,
        small={"steps": 2, "width": 8, "context": 8, "batch": 2, "layers": 1},
    ),
)  # fmt: skip
