"""Scores that were published beside scores that were measured again, item by item."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from shoal.hub.published import PublishedLock
from shoal.hub.score_file import Rows
from shoal.types import ItemScore, Role

SAME = 1e-9  # metrics are sums of few float64


@dataclass(frozen=True)
class Compared:
    """One task in one role. flips: items whose metric is another one; differences of log-likelihoods in nats, None
    where no request has one. allowed: share of items that may flip. judged: whether correctness was compared at all."""

    task: str
    role: Role
    items: int
    flips: int
    median: float | None
    largest: float | None
    allowed: float
    judged: bool = True

    @property
    def agrees(self) -> bool:
        return self.flips <= self.allowed * self.items


def compare(
    published: Rows,
    measured: Sequence[ItemScore],
    lock: PublishedLock,
    same_device: bool,
    unjudged: Collection[str] = (),
) -> list[Compared]:
    """Per task and role. same_device: of the same kind; then no item may flip, whatever the lock allows. unjudged: tasks of
    which only log-likelihoods are compared."""
    metrics = {task.task: task.metric for task in lock.run.tasks}
    found = {(s.task, s.role, s.item): s for s in measured}
    rows = []
    for (task, role), items in sorted(published.items()):
        flips, differences = 0, []
        for item, before in items.items():
            after = found[task, role, item]
            flips += task not in unjudged and not _same(before.value, after.metrics.get(metrics[task]))
            if len(before.logliks) != len(after.logliks):
                differences.append(math.inf)
            differences += [
                abs(a - b) if math.isfinite(a) else math.inf
                for a, b in zip(before.logliks, after.logliks, strict=False)
            ]
        middle, most = (median(differences), max(differences)) if differences else (None, None)
        allowed = 0.0 if same_device else lock.tolerance.other_kind
        judged = task not in unjudged
        rows.append(Compared(task, role, len(items), flips, middle, most, allowed, judged))
    return rows


def _same(before: Any, after: Any) -> bool:
    """Metrics that are the same answer; what is no number there (a log-likelihood's sum, texts) is compared elsewhere."""
    if before is None:
        return True
    if isinstance(before, list):
        return True
    if not isinstance(after, (int, float)):
        return False
    return math.isclose(float(before), float(after), rel_tol=SAME, abs_tol=SAME)
