"""How the search went: fitness of its candidates against what had been spent when each was scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.journal import CandidateRow, EvaluationRow


@dataclass(frozen=True)
class Point:
    """A candidate that was told. cost: item evaluations spent when its last search item was scored.

    fitness: gain over the best anchor on its generation's items, in the search's unit.
    """

    candidate: str
    generation: int
    cost: int
    fitness: float


@dataclass(frozen=True)
class Change:
    """A generation from which on the search went on otherwise. anew: fitness before and after does not compare."""

    generation: int
    cost: int
    words: str
    anew: bool


@dataclass(frozen=True)
class Spent:
    """What one stage of the run took. evaluations: one candidate on some items of a role."""

    stage: str
    evaluations: int
    failed: int
    items: int
    merge: float
    score: float
    rest: float

    @property
    def seconds(self) -> float:
        return self.merge + self.score + self.rest


@dataclass(frozen=True)
class Course:
    """points: in the order of generations; means: (cost, mean fitness) per generation; best: (cost, best so far).

    best is of the generations since what is maximised last changed.
    """

    points: tuple[Point, ...]
    means: tuple[tuple[int, float], ...]
    best: tuple[tuple[int, float], ...]
    changes: tuple[Change, ...]

    @property
    def leader(self) -> Point | None:
        """The best sample since what is maximised last changed: a noisy one, on one generation's items."""
        since = max((change.generation for change in self.changes if change.anew), default=0)
        return max((p for p in self.points if p.generation >= since), key=lambda p: p.fitness, default=None)


def course_of(
    evaluations: Sequence[EvaluationRow],
    tells: Mapping[int, Mapping[str, float | None]],
    courses: Sequence[Mapping[str, Any]],
    growths: Sequence[Mapping[str, Any]] = (),
) -> Course:
    """courses, growths: the journal's events of these kinds."""
    spent, total = dict[str, int](), 0
    for row in evaluations:
        total += row.items
        if row.role == "search":
            spent[row.candidate] = total
    points: list[Point] = []
    means: list[tuple[int, float]] = []
    best: list[tuple[int, float]] = []
    changes: list[Change] = []
    objectives = {event["generation"]: dict(event["objectives"]) for event in courses}
    finer = {event["generation"]: str(event["to"]) for event in growths}
    before: dict[str, str] | None = None
    for generation, told in tells.items():
        now = objectives.get(generation, before)
        found = [
            Point(candidate, generation, spent.get(candidate, total), fitness)
            for candidate, fitness in told.items()
            if fitness is not None
        ]
        if before is not None and now is not None and now != before:
            words = ", ".join(
                f"{task} by its {kind}" for task, kind in now.items() if before.get(task) != kind
            )
            changes.append(Change(generation, min((p.cost for p in found), default=total), words, True))
            best = []
        if generation in finer:
            words = f"a finer space, {finer[generation]}"
            changes.append(Change(generation, min((p.cost for p in found), default=total), words, False))
        before = now
        points += found
        if found:
            at = max(p.cost for p in found)
            means.append((at, sum(p.fitness for p in found) / len(found)))
            top = max(p.fitness for p in found)
            best.append((at, max(top, best[-1][1]) if best else top))
    return Course(tuple(points), tuple(means), tuple(best), tuple(changes))


def spent_by_stage(
    evaluations: Sequence[EvaluationRow],
    candidates: Sequence[CandidateRow],
    texts: Sequence[Mapping[str, Any]] = (),
) -> tuple[Spent, ...]:
    """One row per stage that has begun. texts: the journal's events `written`, which are no evaluations on items."""
    kinds = {row.id: row.kind for row in candidates}
    stages: dict[str, list[EvaluationRow]] = {}
    for row in evaluations:
        stages.setdefault(_stage(row, kinds.get(row.candidate, "search")), []).append(row)
    spent = [
        Spent(
            stage=stage,
            evaluations=len(rows),
            failed=sum(row.status == "failed" for row in rows),
            items=sum(row.items for row in rows),
            merge=sum(row.seconds_merge for row in rows),
            score=sum(row.seconds_score for row in rows),
            rest=sum(row.seconds_rest for row in rows),
        )
        for stage, rows in stages.items()
    ]
    if texts:
        merge, score = (sum(event[f"seconds_{what}"] for event in texts) for what in ("merge", "score"))
        failed = sum(event["error"] is not None for event in texts)
        spent.append(Spent("texts of the sanity guard", len(texts), failed, 0, merge, score, 0.0))
    return tuple(spent)


def _stage(row: EvaluationRow, kind: str) -> str:
    if row.role == "select":
        return "selection"
    if row.role == "test" or kind == "finalist":
        return "test, and the winner on search items"
    if kind == "start":
        return "start along the gradient"
    return "anchors" if kind in ("parent", "uniform") else "search"
