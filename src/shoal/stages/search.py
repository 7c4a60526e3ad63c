"""The search: generation after generation, until the budget or the time is used up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shoal.errors import RunError
from shoal.journal import CandidateRow, EvaluationRow
from shoal.preflight import Prepared
from shoal.search.baselines import common_directions
from shoal.search.optimizer import Optimizer, Start, make_optimizer
from shoal.stages.anchors import Anchors
from shoal.stages.course import Courses
from shoal.stages.evaluator import Evaluator
from shoal.stages.generation import Generation, Ranking
from shoal.stages.growth import Growth

Genomes = NDArray[np.float64]
FAILURES_IN_A_ROW = 10


def new_optimizer(prepared: Prepared) -> Optimizer:
    """The optimizer that the lock names, before its first generation: the same for every process of a run."""
    lock, space = prepared.lock, prepared.space
    return make_optimizer(
        lock.search.optimizer,
        Start(
            space.low,
            space.high,
            np.array(lock.search.x0),
            seed=lock.seeds.search,
            popsize=lock.popsize,
            sigma0=lock.sigma0,
            # negative weights use the order of the losers, which a race does not find out
            active=not lock.search.racing,
            directions=common_directions(space) if lock.search.optimizer == "grid" else (),
            objectives=len(lock.tasks),
        ),
    )


class Search:
    """All generations. After `run`, `mean` is the optimizer's answer and `best` the best sample (None: all failed)."""

    def __init__(self, evaluator: Evaluator, anchors: Anchors) -> None:
        self._evaluator, self._anchors = evaluator, anchors
        self._journal, self._seen = evaluator.journal, evaluator.seen
        self._prepared, self._lock = evaluator.prepared, evaluator.lock
        self._optimizer = new_optimizer(evaluator.prepared)
        self._growth = Growth(evaluator)
        self._best = -math.inf
        self.best: CandidateRow | None = None

    @property
    def mean(self) -> Genomes:
        return self._optimizer.mean

    def run(self) -> None:
        """Search, replaying what the journal holds.

        Raises:
            RunError: too many failures in a row, or the journal was written by another version.
        """
        budget = self._evaluator.recipe.search.budget
        growing = bool(self._lock.stages)
        self._seen.stage(
            "search", budget if growing else self._prepared.generations * self._optimizer.popsize
        )
        courses = Courses(self._evaluator, self._anchors)
        failures = _Failures(self._evaluator)
        told = self._journal.tells()
        objectives = None
        number = asked = 0
        reason = f"search.budget ({budget} candidates)"
        while asked + self._optimizer.popsize <= budget:
            begun = bool(self._journal.candidates("search", number))
            if not begun and self._out_of_time(number):
                reason = f"search.max_seconds ({self._evaluator.recipe.search.max_seconds:g} s)"
                break
            if self._growth.due():
                if asked + self._growth.popsize > budget:
                    reason += ": no room for a generation of the next, finer space"
                    break
                self._optimizer = self._growth.grown(number, self._optimizer)
            course = courses.of(number)
            if course.objectives != objectives:
                # fitness by another objective does not compare
                self._best, objectives = -math.inf, course.objectives
                self._growth.restart()
            genomes = self._optimizer.ask()
            rows = self._asked(number, genomes)
            plans = [self._prepared.decode(genome) for genome in genomes]
            generation = Generation(self._evaluator, self._anchors, course, number, failures)
            ranking = generation.run(list(zip(rows, plans, strict=True)))
            if number not in told:
                self._journal.tell(number, ranking.fitness)
            elif told[number] != ranking.fitness:
                raise RunError(
                    f"{self._evaluator.folder.path}: generation {number} replays to another fitness than was told"
                )
            self._optimizer.tell(genomes, self._values(ranking))
            self._keep_best(rows, ranking)
            courses.learn(ranking.points, ranking.halves)
            self._growth.learn(ranking)
            self._seen.told(number, ranking.fitness)
            number, asked = number + 1, asked + len(rows)
        ended = {"reason": reason, "generations": number, "candidates": asked}
        if self._journal.events("search ended")[-1:] != [ended]:  # it ends again when more is asked for
            self._journal.event("search ended", **ended)

    def _values(self, ranking: Ranking) -> Genomes:
        """What the optimizer is told: one value per candidate, or for NSGA-II one per candidate and task."""
        if self._lock.search.optimizer == "nsga2":
            tasks = [task.task for task in self._lock.tasks]
            return np.array(
                [[math.nan if g is None else g[task] for task in tasks] for g in ranking.gains.values()]
            )
        return np.array([math.nan if value is None else value for value in ranking.told.values()])

    def _keep_best(self, rows: Sequence[CandidateRow], ranking: Ranking) -> None:
        if ranking.best is None:
            return
        found = ranking.fitness[ranking.best]
        if found is not None and found > self._best:
            self._best = found
            self.best = next(row for row in rows if row.id == ranking.best)

    def _asked(self, number: int, genomes: Genomes) -> list[CandidateRow]:
        """The journal rows of a generation: written as a whole before its work starts, or compared when replayed."""
        rows = self._journal.candidates("search", number)
        if not rows:
            rows = [
                CandidateRow(
                    f"g{number:03d}c{position:02d}",
                    "search",
                    number,
                    position,
                    tuple(float(x) for x in genome),
                    self._prepared.decode(genome).digest(),
                )
                for position, genome in enumerate(genomes)
            ]
            self._journal.ask(rows)
        if [row.genome for row in rows] != [tuple(float(x) for x in genome) for genome in genomes]:
            raise RunError(
                f"{self._evaluator.folder.path}: generation {number} replays to other genomes than were asked; continue"
                " the run with the versions of shoal, cma and numpy that its lock names"
            )
        return rows

    def _out_of_time(self, number: int) -> bool:
        """Whether search.max_seconds is used up; what was decided once is replayed, for the same limit."""
        limit = self._evaluator.recipe.search.max_seconds
        if limit is None:
            return False
        if any(
            e["generation"] == number and e["max_seconds"] >= limit
            for e in self._journal.events("out of time")
        ):
            return True
        spent = sum(
            row.seconds_merge + row.seconds_score + row.seconds_rest for row in self._journal.evaluations()
        )
        if spent < limit:
            return False
        self._journal.event("out of time", generation=number, max_seconds=limit, spent=spent)
        self._seen.say(f"search.max_seconds ({limit:g} s) used up after {number} generations")
        return True


class _Failures:
    """Counts failures in a row; those of an earlier process may have had a reason that is gone."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._path, self._journal = evaluator.folder.path, evaluator.journal
        self._earlier = {(row.candidate, row.rung) for row in evaluator.journal.evaluations()}
        self._in_a_row = 0

    def count(self, row: EvaluationRow) -> None:
        if row.status == "done":
            self._in_a_row = 0
        elif (row.candidate, row.rung) not in self._earlier:
            self._in_a_row += 1
        if self._in_a_row >= FAILURES_IN_A_ROW:
            self._journal.event("stopped", reason=f"{self._in_a_row} candidates in a row failed")
            raise RunError(
                f"{self._in_a_row} candidates in a row failed, the last one with: {row.error}; the run is kept in"
                f" {self._path}"
            )
