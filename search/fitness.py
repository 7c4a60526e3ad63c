"""Fitness of a candidate: how much better than an anchor it does on the items that both answered.

The paired difference to one fixed anchor takes out how hard a generation's items happened to be, so that
generations with different items compare. DESIGN, "search/": Items; reference: "Reference-difference fitness".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shoal.errors import EvaluationError, nearest

Scores = Mapping[str, Mapping[int, float]]  # task -> item -> score, higher is better
ItemWeights = Mapping[
    str, Mapping[int, float]
]  # task -> item -> what it counts, see `weighting.Drawn.weights`

FLOOR = 0.01  # of a scale, in units of the score


@dataclass(frozen=True)
class Estimate:
    """A mean difference and its standard error; items: how many it rests on."""

    mean: float
    error: float
    items: int


def paired_fitness(
    candidate: Scores,
    anchor: Scores,
    weights: Mapping[str, float],
    scales: Mapping[str, float],
    item_weights: ItemWeights | None = None,
) -> float:
    """Weighted mean over tasks of mean(candidate - anchor) / scale, over the items of the candidate.

    weights: per task, >= 0, normalised here; a task of weight 0 may be absent. scales: per task, > 0, in
    units of the task's score. item_weights: None where every item counts the same. The anchor may have more items
    than the candidate, never fewer.

    Raises EvaluationError for a task or item without a score, or a score that is not finite.
    """
    return paired_estimate(candidate, anchor, weights, scales, item_weights).mean


def paired_estimate(
    candidate: Scores,
    anchor: Scores,
    weights: Mapping[str, float],
    scales: Mapping[str, float],
    item_weights: ItemWeights | None = None,
) -> Estimate:
    """As `paired_fitness`, with the standard error: tasks are strata, so their variances add."""
    total = math.fsum(weights.values())
    if not total > 0 or min(weights.values()) < 0:
        raise EvaluationError(f"task weights: expected >= 0 and one above, found {dict(weights)}")
    means, variances, items = [], [], 0
    for task, weight in weights.items():
        if weight == 0:
            continue
        if not scales[task] > 0:
            raise EvaluationError(f"task {task!r}: expected a scale above 0, found {scales[task]}")
        found = task_difference(candidate, anchor, task, None if item_weights is None else item_weights[task])
        means.append(weight * found.mean / scales[task])
        variances.append((weight * found.error / scales[task]) ** 2)
        items += found.items
    return Estimate(math.fsum(means) / total, math.sqrt(math.fsum(variances)) / total, items)


def task_difference(
    candidate: Scores, anchor: Scores, task: str, item_weights: Mapping[int, float] | None = None
) -> Estimate:
    """mean(candidate - anchor) on one task, over the items of the candidate, in units of its score.

    With item weights w: sum of w d, and the variance as if the m items had been drawn with replacement, that of
    m w d over m (Hansen and Hurwitz 1943, Ann. Math. Stat. 14:333): too large rather than too small. The error of
    one item alone is infinite.
    """
    ours, theirs = _scores(candidate, task), _scores(anchor, task)
    missing = sorted(set(ours) - set(theirs))
    if missing:
        raise EvaluationError(
            f"task {task!r}: the anchor has no score for items {missing[:5]} ({len(missing)} in all); "
            "score the anchor on all search items before the first generation"
        )
    m = len(ours)
    counts = dict.fromkeys(ours, 1 / m) if item_weights is None else item_weights
    d = [m * counts[i] * (ours[i] - theirs[i]) for i in sorted(ours)]
    mean = math.fsum(d) / m
    error = math.inf if m < 2 else math.sqrt(math.fsum((x - mean) ** 2 for x in d) / (m - 1) / m)
    return Estimate(mean, error, m)


def unit_scales(anchors: Mapping[str, Scores]) -> dict[str, float]:
    """1 per task: fitness is then in units of the claim, the weighted mean of task scores.

    What a search maximises and what its winner is claimed by are then one function, and a task on which the anchors
    hardly differ counts no more than its weight. The default; see docs/design.md, "Scale".
    """
    return dict.fromkeys(next(iter(anchors.values())), 1.0)


def task_scales(anchors: Mapping[str, Scores], floor: float = FLOOR) -> dict[str, float]:
    """Per task, how far the best and the worst anchor lie apart: what one unit of fitness means there.

    Means are over the items that all anchors answered. A spread below its own standard error is mostly noise,
    and dividing by it would let that task rule the search, so the scale is the largest of spread, that error
    and `floor`.
    """
    if not anchors:
        raise EvaluationError("task scales: expected at least one anchor, found none")
    scales = {}
    for task in next(iter(anchors.values())):
        means = _common_means(anchors, task)
        best, worst = max(means, key=lambda a: means[a]), min(means, key=lambda a: means[a])
        items = set.intersection(*(set(_scores(a, task)) for a in anchors.values()))
        d = [anchors[best][task][i] - anchors[worst][task][i] for i in sorted(items)]
        mean = math.fsum(d) / len(d)
        error = math.sqrt(math.fsum((x - mean) ** 2 for x in d)) / len(d)
        scales[task] = max(mean, error, floor)
    return scales


def best_anchor(
    anchors: Mapping[str, Scores], weights: Mapping[str, float], scales: Mapping[str, float]
) -> str:
    """The anchor with the highest weighted mean of scaled task scores; of equal ones the first."""
    if not anchors:
        raise EvaluationError("best anchor: expected at least one, found none")
    tasks = [t for t, w in weights.items() if w > 0]
    means = {t: _common_means(anchors, t) for t in tasks}
    return max(anchors, key=lambda a: math.fsum(weights[t] * means[t][a] / scales[t] for t in tasks))


def _common_means(anchors: Mapping[str, Scores], task: str) -> dict[str, float]:
    """Mean score of each anchor over the items that all of them answered."""
    scores = {name: _scores(anchor, task) for name, anchor in anchors.items()}
    items = sorted(set.intersection(*map(set, scores.values())))
    if not items:
        raise EvaluationError(f"task {task!r}: the anchors have no item in common")
    return {name: math.fsum(s[i] for i in items) / len(items) for name, s in scores.items()}


def _scores(scores: Scores, task: str) -> Mapping[int, float]:
    found = scores.get(task)
    if not found:
        raise EvaluationError(f"task {task!r}: no scores; {nearest(task, scores)}")
    for item, value in found.items():
        if not math.isfinite(value):
            raise EvaluationError(f"task {task!r}, item {item}: expected a finite score, found {value}")
    return found
