"""What the search maximises, item by item: the smooth objective, its log odds, or the claimed metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from shoal.lock import Lock
from shoal.search.fitness import Scores
from shoal.types import ItemScore

Objective = Literal["smooth", "metric", "margin"]
Objectives = Mapping[str, Objective]  # task -> what is maximised on it

LOWEST = 1e-9  # probability at which the margin is cut off: 20.7 nats


def item_values(rows: Sequence[ItemScore], lock: Lock, objectives: Objectives) -> Scores | None:
    """Task -> item -> value, higher is better; None where an item has no such value or it is not finite.

    metric: where lower is better, its negative. margin: log odds of the smooth objective, for multiple choice the
    length-normalised log-likelihood of the right option less that of all others together; an ablation, for it is
    unbounded in what matters least.
    """
    tasks = {task.task: task for task in lock.tasks if task.task in objectives}
    values: dict[str, dict[int, float]] = {name: {} for name in tasks}
    for row in rows:
        task = tasks.get(row.task)
        if task is None:
            continue
        kind = objectives[row.task]
        found = row.metrics.get(task.metric) if kind == "metric" else row.objective
        if not isinstance(found, int | float) or not math.isfinite(found):
            return None
        if kind == "metric":
            values[row.task][row.item] = float(found) * (1 if task.higher_is_better else -1)
        else:
            values[row.task][row.item] = found if kind == "smooth" else log_odds(found)
    return values


def log_odds(probability: float) -> float:
    """ln(p / (1 - p)) in nats, p kept LOWEST away from 0 and 1."""
    p = min(max(probability, LOWEST), 1 - LOWEST)
    return math.log(p / (1 - p))


def first_not_finite(scores: Sequence[ItemScore]) -> ItemScore | None:
    """The first score with a number that is none: nothing can be concluded from such a candidate."""
    for row in scores:
        numbers = [row.objective, *row.logliks, *row.metrics.values()]
        if any(isinstance(x, float) and not math.isfinite(x) for x in numbers):
            return row
    return None
