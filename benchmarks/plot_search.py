"""Draws what benchmarks/search.py wrote: true gain of every setting, and what is found for how much.

python benchmarks/plot_search.py FILE.json OUT.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

LINES = ("ours", "random search", "uniform-weight grid", "mergekit-evolve's settings")
COLOURS = ("#0b6e99", "#999999", "#c98b2b", "#b3423a")


def draw(found: dict[str, Any], out: Path) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    table = found["table"]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.6 + 0.26 * len(table)), width_ratios=(3, 2), layout="constrained"
    )
    for place, row in enumerate(reversed(table)):
        name, less = row["setting"], row["ours_minus_this"]
        left.errorbar(
            -less["mean"],
            place,
            xerr=[[less["high"] - less["mean"]], [less["mean"] - less["low"]]],
            fmt="o",
            color=COLOURS[LINES.index(name)] if name in LINES else "#5b7f8c",
            capsize=2,
        )
    left.set_yticks(range(len(table)), [row["setting"] for row in reversed(table)])
    left.axvline(0, color="black", linewidth=0.6)
    left.set_xlabel("true gain less that of ours at full budget, points (paired 95% interval)")
    left.grid(axis="x", alpha=0.3)
    full = found["full_budget"]
    for name, colour in zip(LINES, COLOURS, strict=True):
        row = next((r for r in table if r["setting"] == name), None)
        if row is None:
            continue
        points = {int(b): g for b, g in row["gain_at"].items()} | {full: row["gain"]["mean"]}
        right.plot(list(points), list(points.values()), "o-", color=colour, label=name)
    right.set_xscale("log", base=2)
    ticks = [full // 8, full // 4, full // 2, full]
    right.set_xticks(ticks, [f"{t:,}" for t in ticks])
    right.set_xlabel("item-evaluations, everything counted")
    right.set_ylabel("mean true gain of what would be returned, points")
    right.grid(alpha=0.3)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
