"""The sample of search items on which every anchor and, at the end, the winner are scored."""

from __future__ import annotations

from shoal.lock import Lock
from shoal.search.items import draw


def search_sample(lock: Lock) -> dict[str, list[int]]:
    """Task -> search items, a pure function of the lock: all of them where they are few, or chosen by disagreement."""
    return {
        task.task: draw(task.roles["search"].items, lock.search.anchor_items, lock.seeds.items, -1, task.task)
        for task in lock.tasks
    }
