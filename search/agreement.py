"""Whether two ways of ranking agree: the search's objective with the metric, and two halves of a generation's items.

Both decide how a run goes on (another objective, more items), so both are functions of journalled scores alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from shoal.search.fitness import Scores, task_difference

WINDOW = 3  # generations that count as recent
POINTS = 20  # anchors and candidates below which tau says nothing: by chance its deviation is 0.16
AGAINST = 0.1  # level of the one-sided test that tau is negative
RESOLVED = 2.0  # standard errors by which two anchors must differ to be told apart
GROW_BELOW = 0.3  # rank correlation of two halves of a generation's items
GROWTH = 1.5


@dataclass(frozen=True)
class Point:
    """A candidate on one task: gain over one anchor, on the same items, by the objective and by the metric."""

    objective: float
    metric: float


@dataclass(frozen=True)
class Agreement:
    """How a task's objective ranks candidates, compared with its metric.

    tau: Kendall's tau-b over anchors and recent generations, nan below three points or where all are equal.
    p: of the one-sided test that it is negative, ties allowed for. points: how many. anchors: concordant less
    discordant pairs of anchors that both tell apart, of `pairs`.
    """

    tau: float
    p: float
    points: int
    anchors: int
    pairs: int

    @property
    def lost(self) -> bool:
        """Whether the objective is to be given up: it orders the anchors, or generations, against the metric.

        tau counts from POINTS candidates on, where it is negative at level AGAINST. A tau around zero is not enough: it
        is what late generations, which differ by little more than noise, and a metric at its floor give, and there the
        metric would be the worse guide.
        """
        return self.anchors < 0 or (self.points >= POINTS and self.p <= AGAINST)


def agreement(
    objective: Mapping[str, Scores],
    metric: Mapping[str, Scores],
    task: str,
    anchor: str,
    recent: Sequence[Point] = (),
) -> Agreement:
    """Agreement on one task.

    objective, metric: anchor -> scores, both on the same items. anchor: which of them gains are measured against.
    recent: candidates of the last generations, gains over the same anchor.
    """
    names = list(objective)
    points = [*recent]
    balance = pairs = 0
    for name in names:
        points.append(
            Point(
                task_difference(objective[name], objective[anchor], task).mean,
                task_difference(metric[name], metric[anchor], task).mean,
            )
        )
    for a, b in combinations(names, 2):
        ours = task_difference(objective[a], objective[b], task)
        theirs = task_difference(metric[a], metric[b], task)
        if min(_resolution(ours.mean, ours.error), _resolution(theirs.mean, theirs.error)) >= RESOLVED:
            pairs += 1
            balance += 1 if (ours.mean > 0) == (theirs.mean > 0) else -1
    return Agreement(*kendall(points), len(points), balance, pairs)


def _resolution(mean: float, error: float) -> float:
    """Standard errors between two anchors; an exact difference is resolved, no difference is not."""
    if mean == 0:
        return 0.0
    return abs(mean) / error if error > 0 else math.inf


def kendall(points: Sequence[Point]) -> tuple[float, float]:
    """Kendall's tau-b (Kendall 1945, Biometrika 33:239), which allows for ties, and p of the test that it is negative.

    Both nan where tau is undefined.
    """
    x, y = [p.objective for p in points], [p.metric for p in points]
    if len(points) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan, math.nan
    found = stats.kendalltau(x, y, alternative="less")
    return float(found.statistic), float(found.pvalue)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; nan below three candidates or where a half ranks all alike."""
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return math.nan
    return float(stats.spearmanr(first, second).statistic)


def at_length(correlation: float, factor: float) -> float:
    """What the correlation of two halves would be on `factor` times as many items (Spearman 1910; Brown 1910).

    Halves of a racing generation are halves of its first rung; this compares them with halves of all items.
    """
    r = max(0.0, correlation)
    return factor * r / (1 + (factor - 1) * r)


def more_items(correlations: Sequence[float], items: int, pool: int) -> int:
    """Items per task of the next generation: GROWTH times more, where halves of the last two do not agree.

    correlations: of the generations since the last growth, oldest first; one generation alone is mostly luck. nan
    says nothing.
    """
    known = [c for c in correlations[-2:] if not math.isnan(c)]
    if len(known) < 2 or float(np.mean(known)) >= GROW_BELOW:
        return items
    return min(pool, math.ceil(items * GROWTH))
