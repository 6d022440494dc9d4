"""Reports of ``precond-ref cost``: a table and notes, a figure, and JSON."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from precond_ref.cost import Device, Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

SIZE = 256
"""Value of a field ``size`` that has no default."""


def quantity(value: float, unit: str) -> str:
    """Return three digits with a decimal prefix: ``1.5e9, "B"`` -> ``1.50 GB``."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 999.5 or prefix == "P":
            break
        value /= 1000
    digits = max(0, 2 - math.floor(math.log10(value))) if value >= 1 else 2
    return f"{value:.{0 if prefix == '' and value == int(value) else digits}f} {prefix}{unit}"


def duration(seconds: float) -> str:
    """Return three digits with a unit."""
    if seconds >= 600:
        return f"{seconds / 60:.3g} min" if seconds < 36000 else f"{seconds / 3600:,.3g} h"
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1 or unit == "us":
            break
    return f"{seconds * factor:.3g} {unit}"


def table(estimates: list[Estimate]) -> Table:
    """Return a table with a row for each method."""
    result = _table("method", "state", "B/param", "flops/step", "moved/step", "floor", "calls", "own")
    for e in estimates:
        result.add_row(
            e.name,
            quantity(e.state_bytes, "B"),
            f"{e.state_bytes / max(e.entries, 1):.2f}",
            quantity(e.flops, "") if e.flops else "-",
            quantity(e.moved, "B"),
            duration(e.seconds),
            f"{e.calls[1]}/{e.calls[0]}",
            f"{e.own:.1%}".replace("100.0%", "100%"),
        )
    return result


def mesh_table(estimates: list[Estimate]) -> Table:
    """A row for each method and way to share out its matrices."""
    result = _table("method", "", "state", "sent", "sent by one", "idle", "balance", "floor")
    for e in estimates:
        for split in e.mesh or ():
            result.add_row(
                e.name if split.name == "owner" else "",
                split.name,
                quantity(split.state_bytes, "B"),
                quantity(split.sent, "B"),
                quantity(split.most_sent, "B"),
                str(split.idle),
                f"{split.balance:.2f}",
                duration(split.seconds),
            )
    return result


def _table(*titles: str) -> Table:
    from rich.table import Table

    result = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        result.add_column(title, no_wrap=True, justify="left" if title in ("method", "") else "right")
    return result


def heading(source: str, estimates: list[Estimate]) -> str:
    """Return a line that describes the model."""
    first = estimates[0]
    return f"{source}: {first.entries:,} parameters in {len(first.loads)} arrays, {first.dtype}"


def notes(estimates: list[Estimate]) -> list[str]:
    """Return notes on the columns of the table."""
    device = estimates[0].device
    lines = [
        "state: bytes of the optimizer's arrays, exact. B/param: the same per parameter.",
        "flops: matrix products and factorizations; work done every k steps counts 1/k. '-': none, elementwise only.",
        "moved: bytes that must be read or written at least once: gradient, parameter, state.",
        f"floor: no step can be faster on average at {quantity(device.bandwidth, 'B/s')} and "
        f"{quantity(device.matmul_rate, 'flop/s')}; real steps are slower, factorizations most.",
        "calls: updates per step with equal shapes stacked, of updates one by one.",
        "own: entries in parameters that the method takes. The others go to Adam().",
    ]
    return lines


def mesh_notes(estimates: list[Estimate]) -> list[str]:
    """What one must know to read the second table."""
    names = {split.name.split()[0] for e in estimates for split in e.mesh}
    lines = ["owner: one device updates each matrix, the costliest first, each on the device with the least to do."]
    if "replica" in names:
        lines.append("replica: one device in each replica does; nothing goes from replica to replica.")
    if "cut" in names:
        lines += [
            "cut k: k devices share each matrix, if one matrix is more than a device's share. Sums along the cut are",
            "sent, factorizations are repeated by each. Shown for comparison: the adapter does not cut.",
        ]
    return [
        *lines,
        "state: of the device with the most. Parameters of elementwise methods are cut evenly.",
        "sent: bytes that leave all devices a step beyond what data parallelism sends anyway: gradients to the owners,",
        "directions back in the dtype of the arithmetic. sent by one: by the device that sends most.",
        "idle: devices without a matrix. floor: that of the slowest device.",
        "balance: flops of the busiest device over an equal share of the flops of one device, 1 is even.",
    ]


def figure(source: str, estimates: list[Estimate]) -> Figure:
    """Draw the state per parameter, and the time floor with its two parts, for each method."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    names, device = [estimate.name for estimate in estimates], estimates[0].device
    rows = range(len(names))
    result = Figure(figsize=(11, 1.6 + 0.36 * len(names)), layout="constrained")
    left, right = result.subplots(1, 2, sharey=True)
    state = [e.state_bytes / max(e.entries, 1) for e in estimates]
    left.barh(rows, state, color="#0072B2")
    left.set_yticks(rows, names)
    left.invert_yaxis()
    left.set_xlabel("bytes of state per parameter")
    left.margins(x=0.12)
    moved = [e.moved / device.bandwidth for e in estimates]
    computed = [e.flops / device.matmul_rate for e in estimates]
    right.barh([r - 0.2 for r in rows], moved, height=0.4, color="#56B4E9", label="moving bytes")
    right.barh([r + 0.2 for r in rows], computed, height=0.4, color="#D55E00", label="products and factorizations")
    right.set_xscale("log")
    times = [t for t in (*moved, *computed) if t > 0]
    if times:
        right.set_xlim(min(times) / 3, max(times) * 8)
    right.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} s" if x >= 1 else duration(x)))
    right.xaxis.set_minor_formatter(NullFormatter())
    right.set_xlabel("time floor of a step: the longer of the two bars")
    for row, bytes_each, times_of in zip(rows, state, zip(moved, computed, strict=True), strict=True):
        left.annotate(f"{bytes_each:.2f}", (bytes_each, row), **BESIDE)
        longer = max(times_of)
        right.annotate(duration(longer), (longer, row + (0.2 if times_of[1] == longer else -0.2)), **BESIDE)
    right.legend(frameon=False, fontsize="small", loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    speed = f"{quantity(device.bandwidth, 'B/s')} and {quantity(device.matmul_rate, 'flop/s')}"
    left.set_title(f"{heading(source, estimates)}; {speed}", loc="left", fontsize=10, pad=24)
    return result


BESIDE: dict[str, Any] = {
    "xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": "small",
}  # fmt: skip
"""Arguments of the text at the end of a bar."""


def as_json(source: str, estimates: list[Estimate]) -> dict[str, Any]:
    """Return the estimates, with the parameters one by one."""
    device: Device = estimates[0].device
    return {
        "source": source,
        "dtype": estimates[0].dtype,
        "entries": estimates[0].entries,
        "device": device._asdict(),
        "methods": [
            {
                "name": e.name,
                "method": repr(e.method),
                "state_bytes": e.state_bytes,
                "flops_per_step": e.flops,
                "bytes_moved_per_step": e.moved,
                "floor_seconds": e.seconds,
                "calls": dict(zip(("one_by_one", "stacked"), e.calls, strict=True)),
                "own_share": e.own,
                "mesh": [split._asdict() for split in e.mesh or ()],
                "parameters": {
                    load.name: {
                        "shape": load.shape,
                        "method": load.method.name,
                        "state_bytes": load.state_bytes,
                        "flops": load.flops,
                        "bytes_moved": load.moved,
                    }
                    for load in e.loads
                },
            }
            for e in estimates
        ],
    }
