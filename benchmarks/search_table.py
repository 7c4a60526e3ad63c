"""The table of benchmarks/search.py from its runs: gains, costs and bounds, with intervals over what is independent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from search_settings import MERGEKIT, OURS

Floats = NDArray[np.float64]


def summary(rows: Sequence[Mapping[str, Any]], full: int) -> dict[str, Any]:
    """The table: per setting means with intervals over problems (over seeds where there is one problem only)."""
    by: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by.setdefault(row["setting"], []).append(row)
    theirs = by[MERGEKIT.name]
    problems = [r["problem"] for r in theirs]
    # the family's one target, and one target per problem
    whole = float(np.median([r["gain"] for r in theirs]))
    targets = {p: float(np.median([r["gain"] for r in theirs if r["problem"] == p])) for p in problems}
    costs = {name: np.array([_cost_to(whole, r["path"], full) for r in found]) for name, found in by.items()}
    own = {
        name: np.array([_cost_to(targets[r["problem"]], r["path"], full) for r in found])
        for name, found in by.items()
    }
    gains = {name: np.array([r["gain"] for r in found]) for name, found in by.items()}
    table = []
    for name, found in by.items():
        behind = _units(gains[OURS.name] - gains[name], problems)
        table.append(
            {
                "setting": name,
                "seeds": len(found),
                "gain": _mean(_units(gains[name], problems)),
                "overstatement": _mean(_units(_column(found, "overstatement"), problems)),
                "search_overstatement": _mean(_units(_column(found, "search_overstatement"), problems)),
                "cost_to_target": float(np.median(costs[name])),
                "reached": float(np.mean([any(g >= whole for _, g in r["path"]) for r in found])),
                "cost_ratio": _ratio(costs[name] / costs[MERGEKIT.name], problems),
                "cost_ratio_own_target": _ratio(own[name] / own[MERGEKIT.name], problems),
                "ours_minus_this": _mean(behind),
                "lower_bound": _lower(behind),
                "gain_at": {
                    str(budget): float(np.mean([_gain_at(budget, r["path"]) for r in found]))
                    for budget in (full // 8, full // 4, full // 2)
                },
            }
        )
    return {"full_budget": full, "target_gain": whole, "targets": list(targets.values()), "table": table}


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> Floats:
    return np.array([row[key] for row in rows])


def _units(values: Floats, problems: Sequence[int]) -> Floats:
    """What is independent: the means of the problems; of one problem alone the values themselves."""
    kinds = sorted(set(problems))
    if len(kinds) == 1:
        return values
    return np.array([values[[p == k for p in problems]].mean() for k in kinds])


def _cost_to(target: float, path: Sequence[tuple[int, float]], full: int) -> float:
    return float(next((cost for cost, gain in path if gain >= target), full))


def _gain_at(budget: int, path: Sequence[tuple[int, float]]) -> float:
    """True gain of what would be returned for that budget; 0, the best anchor, where it pays for no generation."""
    return next((gain for cost, gain in reversed(path) if cost <= budget), 0.0)


def _mean(values: Floats) -> dict[str, float]:
    """Mean and its 95 % t interval."""
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return {
        "mean": float(values.mean()),
        "low": float(values.mean()) - half,
        "high": float(values.mean()) + half,
    }


def _lower(values: Floats) -> float | None:
    """One-sided 95 % lower bound of the mean of paired differences."""
    if not values.any():
        return None
    return float(
        values.mean() - stats.t.ppf(0.95, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    )


def _ratio(ratios: Floats, problems: Sequence[int]) -> dict[str, float]:
    """Median over seeds of the paired cost ratio, with a percentile bootstrap interval over problems (or seeds)."""
    kinds = sorted(set(problems))
    blocks = (
        [ratios[[p == k for p in problems]] for k in kinds]
        if len(kinds) > 1
        else [ratios[[i]] for i in range(len(ratios))]
    )
    rng = np.random.default_rng(0)
    medians = [
        float(np.median(np.concatenate([blocks[i] for i in rng.integers(0, len(blocks), len(blocks))])))
        for _ in range(5000)
    ]
    low, high = np.quantile(medians, [0.025, 0.975])
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def show(found: Mapping[str, Any]) -> None:
    """The table as text; both cost ratios, the family's target first."""
    print(
        f"full budget {found['full_budget']} item-evaluations, target gain {found['target_gain']:.2f} points"
    )
    print(
        f"{'setting':36s} {'true gain':>19s} {'at 1/8, 1/4, 1/2':>17s} {'overstatement':>21s} {'cost':>7s} "
        f"{'ratio':>18s} {'ratio, own target':>18s} {'bound':>6s}"
    )
    for row in found["table"]:
        gain, over = row["gain"], row["overstatement"]
        ratios = " ".join(
            f"{r['median']:4.2f} ({r['low']:4.2f} {r['high']:5.2f})"
            for r in (row["cost_ratio"], row["cost_ratio_own_target"])
        )
        at = " ".join(f"{x:5.1f}" for x in row["gain_at"].values())
        bound = "" if row["lower_bound"] is None else f"{row['lower_bound']:+.2f}"
        print(
            f"{row['setting']:36s} {gain['mean']:5.2f} ({gain['low']:5.2f} {gain['high']:5.2f}) {at:>17s} "
            f"{over['mean']:+6.2f} ({over['low']:+5.2f} {over['high']:+5.2f}) {row['cost_to_target']:7.0f} "
            f"{ratios} {bound:>6s}"
        )
