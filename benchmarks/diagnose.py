"""Plant every known mistake and every pair of them, and count how many are caught, by which cases, and named.

python benchmarks/diagnose.py                    # singles and, per method, 100 pairs
python benchmarks/diagnose.py --pairs all        # all pairs: half an hour
python benchmarks/diagnose.py --methods ASGO,AGD --write   # their singles into the table of docs/mistakes.md
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conformance_subjects import Variant  # type: ignore[import-not-found]  # noqa: E402

from precond_ref.conformance import check, tolerance, variants, vectors  # noqa: E402
from precond_ref.conformance import diagnose as search  # noqa: E402

PAGE = ROOT / "docs" / "mistakes.md"
replay, replayed = variants.run, dict[Any, Any]()


def remembered(method: Any, param: Any, grads: Any, **options: Any) -> Any:
    """Return `variants.run`, computed once, because all planted mistakes are compared with the same variants."""
    key = (method, param.tobytes(), grads.tobytes(), *options.values())
    if key not in replayed:
        replayed[key] = replay(method, param, grads, **options)
    return replayed[key]


def replayed_unless_far(run: Any, flags: frozenset[str], dtype: str, steps: int) -> tuple[float, float]:
    """Return `diagnose._replayed`, except if the first step is far beyond agreement."""
    if steps == 1 and flags:
        key = (run.case.id, flags)
        if key not in firsts:
            given = {"lr": run.case.lr, "decay": run.case.decay, "stack_ndim": run.case.stack_ndim, "flags": flags}
            trace = replay(run.method, run.tensors["param"], run.tensors["grads"][:1], **given)
            firsts[key] = trace.params.ravel()
        start, mine, theirs = run.params[0].ravel(), firsts[key], run.params[1].ravel()
        scale = tolerance.of_update(tolerance.of_case(run.case, dtype, 1), dtype, start, mine)
        gap = mine - theirs
        if gap @ gap > (10 * search.SLACK * scale) ** 2:
            return math.inf, math.inf
    return exact(run, flags, dtype, steps)


exact, firsts = search._replayed, dict[Any, Any]()
variants.run, search._replayed = remembered, replayed_unless_far


def planted(constructor: str, flags: frozenset[str]) -> dict[str, Any]:
    """Return the verdict of `check` on a method with these deviations."""
    report = check(Variant(flags), constructor)
    found = [] if report.diagnosis is None else [set(m.flags) for m in report.diagnosis.matches]
    caught = [r for r in report.failures if r.gap]
    return {
        "flags": flags,
        "must": [r.id for r in caught if r.tier == "must"],
        "should": [r.id for r in caught if r.tier == "should"],
        "ratio": max((r.gap.ratio for r in caught if r.gap), default=0.0),
        "named": set(flags) in found,
        "alone": found == [set(flags)],
        "said": found[:3],
    }


def main() -> None:
    """Print one line per method, the exceptions, and the totals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", help="constructors, separated by commas (default: all)")
    parser.add_argument("--pairs", default="100", help="number of pairs of each method, or 'all'")
    parser.add_argument("--write", action="store_true", help="put the table of singles into docs/mistakes.md")
    arguments = parser.parse_args()
    cases = vectors.cases(kind="trace")
    names = list(dict.fromkeys(case.constructor for case in cases))
    names = arguments.methods.split(",") if arguments.methods else names
    totals: dict[int, list[int]] = {1: [0] * 5, 2: [0] * 5}
    rows = ["| method | name | it is the method ... | cases that catch it | of tier must |", "|---|---|---|---|---|"]
    for name in names:
        own = [case for case in cases if case.constructor == name]
        replayed.clear()
        firsts.clear()
        known, effective = variants.of(own[0].make()), variants.effective(own)
        line, exceptions = [f"{name:<20}"], []
        for size in (1, 2):
            chosen = [flags for flags in variants.choices(known, size) if flags <= effective]
            if size == 2 and arguments.pairs != "all" and len(chosen) > int(arguments.pairs):
                chosen = random.Random(0).sample(chosen, int(arguments.pairs))
            results = [planted(name, flags) for flags in chosen]
            counts = [len(results), sum(bool(r["must"] or r["should"]) for r in results),
                      sum(bool(r["must"]) for r in results), sum(r["named"] for r in results),
                      sum(r["alone"] for r in results)]  # fmt: skip
            totals[size] = [a + b for a, b in zip(totals[size], counts, strict=True)]
            line.append("singles" if size == 1 else "pairs")
            line.append("{}, caught {} (must {}), named {}, alone {};".format(*counts))
            for r in results:
                if not (r["must"] and r["alone"]):
                    exceptions.append(f"    {sorted(r['flags'])}: must {r['must'][:3]}, should {r['should'][:3]}, "
                                      f"said {[sorted(f) for f in r['said']]}")  # fmt: skip
                if size == 1:
                    (flag,) = r["flags"]
                    by = [*r["must"], *r["should"]]
                    ids = ", ".join(i.partition("/")[2] for i in by[:3]) + (", ..." if len(by) > 3 else "")
                    text = variants.describe(known, r["flags"]).replace("|", "\\|")
                    rows.append(f"| {name} | `{flag}` | {text} | {len(by)}: {ids} | {len(r['must'])} |")
        print(*line, flush=True)
        print("\n".join(exceptions[:12]), flush=True)
    for size, (n, caught, must, named, alone) in totals.items():
        if not n:
            continue
        print(f"{'single mistakes' if size == 1 else 'pairs'}: {n}, caught {caught}, by a must-case {must}, "
              f"named {named} ({100 * named / n:.1f} %), named alone {alone} ({100 * alone / n:.1f} %)")  # fmt: skip
    if arguments.write:
        page = PAGE.read_text(encoding="utf-8")
        old = [row for row in re.findall(r"^\| \S+ \| `.*$", page, re.MULTILINE) if row.split()[1] not in names]
        order = list(dict.fromkeys(case.constructor for case in cases))
        table = "\n".join([*rows[:2], *sorted([*old, *rows[2:]], key=lambda row: order.index(row.split()[1]))])
        page = re.sub(r"(<!-- table -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{table}\n{m[2]}", page, flags=re.DOTALL)
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
