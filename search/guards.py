"""Guards as constraints of the search: a candidate that clearly loses too much on a guarded task ranks below all others.

Ranking feasible candidates first and the others by how far they are from it is Deb's rule (2000, Comput. Methods Appl.
Mech. Eng. 186:311), which needs no penalty factor. What a guard means at the end is a test of its own, in claims.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shoal.search.fitness import ItemWeights, Scores, task_difference


@dataclass(frozen=True)
class Limit:
    """On one task, at most max_drop (units of its score) below `parent`: the best parent's item scores."""

    task: str
    max_drop: float
    parent: Scores


def best_parent(parents: Mapping[str, Scores], task: str) -> str:
    """The parent with the highest mean on a task, over the items that it has; of equal ones the first."""
    return max(parents, key=lambda name: math.fsum(parents[name][task].values()) / len(parents[name][task]))


def violation(candidate: Scores, limits: Mapping[str, Limit], item_weights: ItemWeights | None) -> float:
    """By how much a candidate is below its limits, summed over tasks; 0 where no drop is shown.

    A drop beyond max_drop counts only if it is larger than its own standard error: on few items about half of the
    candidates at the limit would be below it by luck.
    """
    total = 0.0
    for task, limit in limits.items():
        counts = None if item_weights is None else item_weights[task]
        found = task_difference(candidate, limit.parent, task, counts)
        if found.mean + found.error < -limit.max_drop:
            total += -limit.max_drop - found.mean
    return total
