"""One generation: its candidates meet its items, at once or in rungs, and are ranked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from shoal.journal import CandidateRow, EvaluationRow
from shoal.search.agreement import Point, at_length, spearman
from shoal.search.fitness import ItemWeights, Scores, paired_fitness, task_difference
from shoal.search.guards import violation
from shoal.search.racing import rung_ends, survivors, told_values
from shoal.search.weighting import Drawn, draw_weighted, inclusion
from shoal.stages.anchors import Anchors, Reference
from shoal.stages.course import Course
from shoal.stages.evaluator import Evaluator, together
from shoal.stages.values import item_values
from shoal.types import MergePlan

Candidates = Sequence[tuple[CandidateRow, MergePlan]]


class Failures(Protocol):
    """Hears of every evaluation, and ends the run after too many failures in a row."""

    def count(self, row: EvaluationRow) -> None: ...


@dataclass(frozen=True)
class Ranking:
    """What a generation gave, by candidate in ask order; None where it failed.

    fitness: gain over the best anchor on the items that it met. told: what the optimizer ranks by: below all others are
    candidates that left a race early, and below those the ones that break a guard. gains: the fitness per task. halves:
    rank correlation between two halves of the items, at the length of half of all items. points: per task, those who
    met all items by objective and by metric. best: the candidate with the highest fitness of those who met all items
    and break no guard.
    """

    fitness: Mapping[str, float | None]
    told: Mapping[str, float | None]
    gains: Mapping[str, Mapping[str, float] | None]
    halves: float
    points: Mapping[str, Sequence[Point]]
    best: str | None


@dataclass
class _Race:
    """Where a generation stands. scores: of all who have not failed. left: who went in which rung, the latest first."""

    alive: list[str]
    scores: dict[str, Scores] = field(default_factory=dict)
    fitness: dict[str, float | None] = field(default_factory=dict)
    violations: dict[str, float] = field(default_factory=dict)
    gains: dict[str, Mapping[str, float] | None] = field(default_factory=dict)
    rows: dict[str, list[EvaluationRow]] = field(default_factory=dict)
    left: list[list[str]] = field(default_factory=list)
    halves: float = float("nan")


class Generation:
    """The candidates of one generation on the items drawn for it.

    Items are the same for all candidates, so that differences between them are of the candidates.
    """

    def __init__(
        self, evaluator: Evaluator, anchors: Anchors, course: Course, number: int, failures: Failures
    ) -> None:
        self._evaluator, self._anchors, self._course = evaluator, anchors, course
        self._lock, self._failures = evaluator.lock, failures
        self._reference: Reference = anchors.reference(course.objectives)
        self._drawn = {task.task: self._draw(task.task, number) for task in self._lock.tasks}
        self._met = anchors.meet(
            course.objectives, {task: drawn.items for task, drawn in self._drawn.items()}, number
        )

    def _draw(self, task: str, number: int) -> Drawn:
        pool, spec = self._lock.task(task).roles["search"].items, self._lock.search
        known = self._reference.disagreement[task] if spec.item_choice == "disagreement" else None
        chances = inclusion(pool, self._course.items, known, spec.uniform_share)
        return draw_weighted(chances, self._lock.seeds.items, number, task)

    def run(self, candidates: Candidates) -> Ranking:
        """Score and rank the candidates, in rungs where the lock says so."""
        race = _Race([row.id for row, _ in candidates])
        ends = {
            task: rung_ends(len(drawn.items)) if self._lock.search.racing else (len(drawn.items),)
            for task, drawn in self._drawn.items()
        }
        rungs = max(len(of_task) for of_task in ends.values())
        for rung in range(rungs):
            # a task with fewer items than rungs has met all of them early
            met = {task: of_task[min(rung, len(of_task) - 1)] for task, of_task in ends.items()}
            before = {
                task: of_task[rung - 1] if 0 < rung <= len(of_task) else 0 for task, of_task in ends.items()
            }
            items = {
                task: sorted(self._drawn[task].items[before[task] : met[task]])
                for task, of_task in ends.items()
                if rung < len(of_task)
            }
            counts = {task: drawn.weights(met[task]) for task, drawn in self._drawn.items()}
            for row, plan in candidates:
                if row.id in race.alive:
                    self._score(race, row, plan, rung, items, counts)
            race.alive = [name for name in race.alive if race.fitness[name] is not None]
            if rung == 0:
                race.halves = self._halves(race, met)
            if rung + 1 < rungs:
                self._drop(race, counts)
            self._report([row.id for row, _ in candidates], race, last=rung + 1 == rungs)
        return self._ranking([row.id for row, _ in candidates], race)

    def _score(
        self,
        race: _Race,
        row: CandidateRow,
        plan: MergePlan,
        rung: int,
        items: Mapping[str, Sequence[int]],
        counts: ItemWeights,
    ) -> None:
        spent = sum(done.seconds_merge + done.seconds_score for done in race.rows.get(row.id, ()))
        allowed = self._evaluator.recipe.search.max_candidate_seconds
        done = self._evaluator.evaluate(
            row,
            plan,
            "search",
            items,
            rung=rung,
            limit=None if allowed is None else allowed - spent,
            generate=any(
                self._lock.task(task).output_type == "generate_until" and objective == "metric"
                for task, objective in self._course.objectives.items()
            ),
        )
        race.rows.setdefault(row.id, []).append(done)
        self._failures.count(done)
        values = None
        if done.status == "done":
            rows = self._evaluator.journal.scores(row.id, "search", last_rung=rung)
            values = item_values(rows, self._lock, self._course.objectives)
        if values is None:
            race.fitness[row.id] = race.gains[row.id] = None
            return
        of, met = self._reference, self._met
        race.scores[row.id] = values
        race.fitness[row.id] = paired_fitness(values, met.anchor, of.weights, of.scales, counts)
        race.violations[row.id] = violation(values, met.limits, counts)
        race.gains[row.id] = {
            task: task_difference(values, met.anchor, task, counts[task]).mean for task in of.weights
        }

    def _drop(self, race: _Race, counts: ItemWeights) -> None:
        """End the race of clear losers; their values stay those of the items that they met."""
        told = self._told(race, [race.alive])
        ranked = sorted(race.alive, key=lambda name: -told[name])
        of = self._reference
        kept = set(survivors(race.scores, ranked, len(race.fitness) // 2, of.weights, of.scales, counts))
        race.left.insert(0, [name for name in race.alive if name not in kept])
        race.alive = [name for name in race.alive if name in kept]

    def _told(self, race: _Race, groups: Sequence[Sequence[str]]) -> dict[str, float]:
        """Values in the order of rank: by group, all of whom are feasible, then infeasible ones by their violation."""
        fitness = {name: value for name, value in race.fitness.items() if value is not None}
        tiers = [{name: fitness[name] for name in group if race.violations[name] == 0} for group in groups]
        broken = {n: -race.violations[n] for group in groups for n in group if race.violations[n] > 0}
        return told_values([*tiers, broken])

    def _ranking(self, names: Sequence[str], race: _Race) -> Ranking:
        told = self._told(race, [race.alive, *race.left])
        feasible = [name for name in race.alive if race.violations[name] == 0]
        return Ranking(
            fitness={name: race.fitness[name] for name in names},
            told={name: told.get(name) for name in names},
            gains={name: race.gains[name] for name in names},
            halves=race.halves,
            points=self._points(race),
            best=max(feasible, key=lambda name: told[name], default=None),
        )

    def _report(self, names: Sequence[str], race: _Race, last: bool) -> None:
        """Tell the observer of everyone whose evaluation ends with this rung, in ask order."""
        rung = max(len(rows) for rows in race.rows.values())
        for name in names:
            if len(race.rows[name]) == rung and (last or name not in race.alive):
                self._evaluator.seen.evaluated(together(race.rows[name]), race.fitness[name])

    def _halves(self, race: _Race, met: Mapping[str, int]) -> float:
        """How well two halves of the items that all have met rank alike, as on halves of all items of a generation."""
        fitness: list[list[float]] = []
        of = self._reference
        for half in (0, 1):
            chosen = {task: drawn.items[half : met[task] : 2] for task, drawn in self._drawn.items()}
            if not all(chosen.values()):
                return float("nan")
            counts = {}
            for task, drawn in self._drawn.items():
                every = drawn.weights(met[task])
                counts[task] = {i: every[i] * met[task] / len(chosen[task]) for i in chosen[task]}
            fitness.append(
                [
                    paired_fitness(
                        {task: {i: race.scores[name][task][i] for i in ids} for task, ids in chosen.items()},
                        self._met.anchor,
                        of.weights,
                        of.scales,
                        counts,
                    )
                    for name in race.alive
                ]
            )
        whole = sum(len(drawn.items) for drawn in self._drawn.values())
        return at_length(spearman(*fitness), whole / sum(met.values()))

    def _points(self, race: _Race) -> dict[str, list[Point]]:
        """Per task that is not searched by its metric: the gains of those who met all items, by both."""
        found: dict[str, list[Point]] = {}
        best = self._reference.best
        for task, objective in self._course.objectives.items():
            if objective == "metric" or task in self._anchors.silent:
                continue
            reference = self._anchors.metric(best, task)
            if reference is None:
                continue
            counts = self._drawn[task].weights()
            found[task] = []
            for name in race.alive:
                metric = item_values(
                    self._evaluator.journal.scores(name, "search"), self._lock, {task: "metric"}
                )
                if metric is not None:
                    gains = race.gains[name]
                    assert gains is not None  # nobody alive has failed
                    theirs = task_difference(metric, reference, task, counts).mean
                    found[task].append(Point(gains[task], theirs))
        return found
