"""The course of a search: what each generation maximises and how many items it meets.

Decided before a generation from what was scored until then, journalled, and read back when a run is resumed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.claim import Scoreboard
from shoal.search.agreement import WINDOW, Agreement, Point, agreement, more_items
from shoal.stages.anchors import Anchors
from shoal.stages.evaluator import Evaluator
from shoal.stages.values import Objective, Objectives


@dataclass(frozen=True)
class Course:
    """How one generation is searched. items: per task."""

    objectives: Objectives
    items: int


class Courses:
    """One course after the other, and what was learnt from the generations so far.

    _points: per generation, task -> candidates by objective and by metric. _halves: how well two halves of a
    generation's items agreed, since the number of items last grew.
    """

    def __init__(self, evaluator: Evaluator, anchors: Anchors) -> None:
        self._evaluator, self._anchors, self._lock = evaluator, anchors, evaluator.lock
        self._points: list[Mapping[str, Sequence[Point]]] = []
        self._halves: list[float] = []
        first: Objective = self._lock.search.objective
        self._now = Course({task.task: first for task in self._lock.tasks}, self._lock.search.items)
        self._known = {event["generation"]: event for event in evaluator.journal.events("course")}
        aggregates = Scoreboard(self._lock, evaluator.journal).aggregates
        # whose metric is a mean over items: only these can be searched by it
        self._comparable = [task for task, aggregate in aggregates.items() if aggregate is None]

    def of(self, generation: int) -> Course:
        """The course of the next generation; journalled if it is new."""
        event = self._known.get(generation) or self._decided(generation)
        course = Course(dict(event["objectives"]), event["items"])
        if course.items != self._now.items:
            self._halves = []
        self._now = course
        return course

    def learn(self, points: Mapping[str, Sequence[Point]], halves: float) -> None:
        """Take in a generation that was told."""
        self._points.append(points)
        self._halves.append(halves)

    def _decided(self, generation: int) -> dict[str, Any]:
        found = {
            task: self._agreement(task)
            for task, objective in self._now.objectives.items()
            if objective != "metric" and task in self._comparable
        }
        lost = [task for task, agreed in found.items() if agreed is not None and agreed.lost]
        objectives = {**self._now.objectives, **dict.fromkeys(lost, "metric")}
        items = self._now.items
        if self._lock.search.grow_items:
            pool = max(len(task.roles["search"].items) for task in self._lock.tasks)
            items = more_items(self._halves, items, pool)
        event = {
            "generation": generation,
            "objectives": objectives,
            "items": items,
            "agreement": {task: _numbers(agreed) for task, agreed in found.items() if agreed is not None},
            "halves": _number(self._halves[-1]) if self._halves else None,
        }
        self._evaluator.journal.event("course", **event)
        for task in lost:
            self._evaluator.seen.say(
                f"note: {task}: its objective no longer ranks as its metric does; searching by the metric from generation"
                f" {generation} on"
            )
        if items != self._now.items:
            self._evaluator.seen.say(
                f"note: two halves of a generation's items rank its candidates differently; {items} items per task"
                f" instead of {self._now.items} from generation {generation} on"
            )
        return event

    def _agreement(self, task: str) -> Agreement | None:
        both = self._anchors.both(task, self._now.objectives)
        if both is None:
            return None
        best = self._anchors.reference(self._now.objectives).best
        recent = [point for points in self._points[-WINDOW:] for point in points.get(task, ())]
        return agreement(*both, task, best, recent)


def _numbers(agreed: Agreement) -> dict[str, float | int | None]:
    return {
        "tau": _number(agreed.tau),
        "p": _number(agreed.p),
        "points": agreed.points,
        "anchors": agreed.anchors,
        "pairs": agreed.pairs,
    }


def _number(value: float) -> float | None:
    """nan has no place in JSON."""
    return None if math.isnan(value) else value
