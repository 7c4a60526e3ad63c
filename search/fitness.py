"""Fitness of a candidate: how much better than an anchor it does on the items that both answered.

The paired difference to one fixed anchor takes out how hard a generation's items happened to be, so that
generations with different items compare. DESIGN, "search/": Items; reference: "Reference-difference fitness".
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from shoal.errors import EvaluationError, nearest

Scores = Mapping[str, Mapping[int, float]]  # task -> item -> score, higher is better

FLOOR = 0.01  # of a scale, in units of the score


def paired_fitness(
    candidate: Scores, anchor: Scores, weights: Mapping[str, float], scales: Mapping[str, float]
) -> float:
    """Weighted mean over tasks of mean(candidate - anchor) / scale, over the items of the candidate.

    weights: per task, >= 0, normalised here; a task of weight 0 may be absent. scales: per task, > 0, in
    units of the task's score. The anchor may have more items than the candidate, never fewer.

    Raises EvaluationError for a task or item without a score, or a score that is not finite.
    """
    total = math.fsum(weights.values())
    if not total > 0 or min(weights.values()) < 0:
        raise EvaluationError(f"task weights: expected >= 0 and one above, found {dict(weights)}")
    parts = []
    for task, weight in weights.items():
        if weight == 0:
            continue
        if not scales[task] > 0:
            raise EvaluationError(f"task {task!r}: expected a scale above 0, found {scales[task]}")
        parts.append(weight * _mean_difference(candidate, anchor, task) / scales[task])
    return math.fsum(parts) / total


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


def _mean_difference(candidate: Scores, anchor: Scores, task: str) -> float:
    ours, theirs = _scores(candidate, task), _scores(anchor, task)
    missing = sorted(set(ours) - set(theirs))
    if missing:
        raise EvaluationError(
            f"task {task!r}: the anchor has no score for items {missing[:5]} ({len(missing)} in all); "
            "score the anchor on all search items before the first generation"
        )
    return math.fsum(ours[i] - theirs[i] for i in sorted(ours)) / len(ours)


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
