"""The run: anchors, generations, finalists, one opening of the test items, result. Every step is journalled first.

A resumed run rebuilds the optimizer by replaying the journal, so it asks the genomes that an uninterrupted run would
have asked. Work on candidates goes through the Worker protocol; this module knows no tensors and no lm-eval.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shoal.claim import Scoreboard, make_result, objective_values
from shoal.errors import EvaluationError, RunError
from shoal.folder import RunFolder
from shoal.journal import CandidateRow, EvaluationRow, Journal
from shoal.lock import write_text
from shoal.output import read_plan, winner_sha256, write_best
from shoal.preflight import Prepared, prepare, restore
from shoal.recipe import Recipe
from shoal.search.fitness import best_anchor, paired_fitness, task_scales
from shoal.search.items import draw
from shoal.search.optimizer import CMAES, Optimizer, RandomSearch
from shoal.types import Completed, Job, MergePlan, Role, Worker
from shoal.worker import LocalWorker

FAILURES_IN_A_ROW = 10
Values = Mapping[str, Mapping[int, float]]


class Observer(Protocol):
    """What a user interface hears of a run; it never changes one."""

    def say(self, text: str) -> None: ...

    def begin(self, prepared: Prepared, done: int) -> None: ...

    def stage(self, name: str, total: int) -> None: ...

    def evaluated(self, row: EvaluationRow, fitness: float | None) -> None: ...

    def told(self, generation: int, fitness: Mapping[str, float | None]) -> None: ...


class Silent:
    """An observer that says nothing."""

    def say(self, text: str) -> None: ...

    def begin(self, prepared: Prepared, done: int) -> None: ...

    def stage(self, name: str, total: int) -> None: ...

    def evaluated(self, row: EvaluationRow, fitness: float | None) -> None: ...

    def told(self, generation: int, fitness: Mapping[str, float | None]) -> None: ...


def evolve(
    recipe: Recipe,
    run: Path,
    *,
    base_folder: Path = Path(),
    device: str = "auto",
    memory: str = "auto",
    memory_limit: int | None = None,
    reopen_test: bool = False,
    save_weights: bool = False,
    observer: Observer | None = None,
    worker: Callable[[Prepared, str], Worker] | None = None,
) -> dict[str, Any]:
    """Start a run in folder `run`, or continue the one that is there; returns the content of result.json.

    base_folder: what relative paths in the recipe are relative to. memory: where the parents are kept (`auto`,
    `device`, `host`, `disk`); memory_limit: bytes of device memory to stay under. worker: makes the worker; the default loads the
    models into this process.

    Raises:
        ShoalError: one clear message; the run folder keeps everything that was finished.
        KeyboardInterrupt: after Ctrl-C; likewise.
    """
    seen = observer or Silent()
    folder = RunFolder(run)
    with folder.held():
        prepared = _open(folder, recipe, base_folder, reopen_test, seen)
        if folder.done.is_file():
            if save_weights:
                write_best(folder.best, prepared.lock, recipe, read_plan(folder.best), save_weights)
            return dict(json.loads(folder.result.read_text(encoding="utf-8")))
        journal = Journal(folder.journal)
        try:
            return _Run(folder, prepared, journal, device, (memory, memory_limit), seen, worker).go(
                save_weights or recipe.output.save_weights
            )
        finally:
            journal.close()


def _open(
    folder: RunFolder, recipe: Recipe, base_folder: Path, reopen_test: bool, seen: Observer
) -> Prepared:
    """A new run: prepare and write its lock. An existing one: check that this recipe may continue it."""
    if not folder.started:
        prepared = prepare(recipe, base_folder, seen.say)
        folder.start(recipe, prepared.lock)
        return prepared
    grown = folder.check_same(recipe)
    _, lock = folder.open()
    prepared = restore(recipe, lock, seen.say)
    if grown is not None:
        journal = Journal(folder.journal)
        try:
            opened = len(journal.events("test opened"))
            if opened and not reopen_test:
                raise RunError(
                    f"{folder.path}: the test items of this run were opened already; searching on and testing again"
                    " makes the claim weaker: allow it by --reopen-test (the claim will say how often they were opened)"
                )
            journal.event("budget", before=grown[0], after=grown[1], max_seconds=recipe.search.max_seconds)
        finally:
            journal.close()
        folder.done.unlink(missing_ok=True)
        write_text(folder.recipe, recipe.to_yaml())
    return prepared


class _Run:
    """One process's work on a run. `finished`: when the last evaluation was journalled, for the cost of the rest."""

    def __init__(
        self,
        folder: RunFolder,
        prepared: Prepared,
        journal: Journal,
        device: str,
        memory: tuple[str, int | None],
        seen: Observer,
        worker: Callable[[Prepared, str], Worker] | None,
    ) -> None:
        self.folder, self.prepared, self.journal, self.seen = folder, prepared, journal, seen
        self.recipe, self.lock = prepared.recipe, prepared.lock
        self.baselines = prepared.baselines()
        self.weights = {task.task: task.weight for task in self.lock.tasks}
        started = time.perf_counter()
        if worker is None:
            local = LocalWorker(self.recipe, self.lock, device, seen.say, *memory, folder.plan)
            for note in (*prepared.notes, *local.notes):
                journal.event("note", text=note)
                seen.say(f"note: {note}")
            self.worker: Worker = local
        else:
            self.worker = worker(prepared, device)
        where = self.worker.capabilities().device
        earlier = journal.events("start")
        if earlier and earlier[-1]["device"] != where:
            seen.say(
                f"note: continued on {where}, before on {earlier[-1]['device']}; results may differ in last digits"
            )
        journal.event("start", device=where)
        journal.event("loaded", seconds=time.perf_counter() - started)
        self.finished = time.perf_counter()

    def go(self, save_weights: bool) -> dict[str, Any]:
        try:
            self.seen.begin(self.prepared, len(self.journal.evaluations()))
            anchors = self._anchors()
            scales = task_scales(anchors)
            anchor = best_anchor(anchors, self.weights, scales)
            mean, best = self._search(anchors[anchor], scales)
            winner, plan = self._select(mean, best)
            searched = self._test(winner, plan)
            return self._finish(winner, plan, searched, save_weights)
        finally:
            self.worker.close()

    # --- one evaluation

    def _evaluate(
        self,
        row: CandidateRow,
        plan: MergePlan,
        role: Role,
        items: Mapping[str, Sequence[int]],
        **options: bool,
    ) -> EvaluationRow:
        """The journalled evaluation of a candidate on a role's items; done now if it was not before."""
        done = self.journal.evaluation(row.id, role)
        if done is not None:
            return done
        job = Job(row.id, plan, {(task, role): ids for task, ids in items.items()}, **options)
        self.worker.submit(job)
        outcome = self.worker.poll()
        for event in outcome.events:
            self.journal.event("disturbed", candidate=row.id, what=event)
            self.seen.say(f"note: {row.id}: {event}")
        now = time.perf_counter()
        if isinstance(outcome, Completed):
            rest = now - self.finished - outcome.seconds_merge - outcome.seconds_score
            done = EvaluationRow(
                row.id,
                role,
                "done",
                None,
                outcome.seconds_merge,
                outcome.seconds_score,
                rest,
                len(outcome.scores),
            )
            self.journal.complete(done, outcome.scores)
        else:
            if role == "test" or row.kind in ("parent", "uniform"):
                # nothing can be claimed without it, and what was in its way may be gone when the run is continued
                self.journal.event("disturbed", candidate=row.id, what=outcome.error)
                raise EvaluationError(
                    f"{row.id} cannot be scored on {role} items: {outcome.error}; the same command tries again"
                )
            rest = now - self.finished - outcome.seconds
            done = EvaluationRow(row.id, role, "failed", outcome.error, 0.0, outcome.seconds, rest, 0)
            self.journal.complete(done, ())
            self.seen.say(f"{row.id} failed: {outcome.error}")
        self.finished = time.perf_counter()
        return done

    def _asked(
        self, candidate: str, kind: Any, plan: MergePlan, genome: np.ndarray[Any, Any] | None = None
    ) -> CandidateRow:
        """The candidate's journal row, written if it is new."""
        row = self.journal.candidate(candidate)
        if row is None:
            values = None if genome is None else tuple(float(x) for x in genome)
            row = CandidateRow(candidate, kind, None, None, values, plan.digest())
            self.journal.ask([row])
        if row.plan_digest != plan.digest():
            raise RunError(
                f"{self.folder.path}: the journal's {candidate} is another merge than this version of shoal makes"
            )
        return row

    def _role_items(self, role: Role) -> dict[str, Sequence[int]]:
        return {task.task: task.roles[role].items for task in self.lock.tasks}

    def _values(self, candidate: str) -> Values | None:
        return objective_values(
            self.journal.scores(candidate, "search"), self.lock, self.recipe.search.objective
        )

    @property
    def _search_generates(self) -> bool:
        """The smooth objective of a generation task is teacher-forced: only the metric objective generates."""
        return self.recipe.search.objective == "metric"

    # --- stages

    def _anchors(self) -> dict[str, Values]:
        """Every parent and the uniform merge on all search items."""
        self.seen.stage("anchors", len(self.baselines))
        anchors: dict[str, Values] = {}
        for name, (kind, plan) in self.baselines.items():
            row = self._asked(name, kind, plan)
            done = self._evaluate(
                row, plan, "search", self._role_items("search"), generate=self._search_generates
            )
            values = self._values(name)
            if values is None:
                raise EvaluationError(
                    "a task has items without a gold answer to score; use search.objective: metric"
                )
            anchors[name] = values
            self.seen.evaluated(done, None)
        return anchors

    def _search(
        self, anchor: Values, scales: Mapping[str, float]
    ) -> tuple[np.ndarray[Any, Any], CandidateRow | None]:
        """All generations; the optimizer's mean and the best sample (None when all failed)."""
        space, spec = self.prepared.space, self.recipe.search
        optimizer: Optimizer
        if spec.algorithm == "random":
            optimizer = RandomSearch(
                space.low, space.high, space.x0, popsize=self.lock.popsize, seed=self.lock.seeds.search
            )
        else:
            optimizer = CMAES(
                space.low,
                space.high,
                space.x0,
                popsize=self.lock.popsize,
                sigma0=self.lock.sigma0,
                seed=self.lock.seeds.search,
            )
        self.seen.stage("search", self.prepared.generations * self.lock.popsize)
        best: tuple[float, CandidateRow | None] = (-math.inf, None)
        in_a_row = 0
        told = self.journal.tells()
        earlier = {row.candidate for row in self.journal.evaluations()}
        for generation in range(self.prepared.generations):
            begun = bool(self.journal.candidates("search", generation))
            if not begun and self._out_of_time(generation):
                break
            genomes = optimizer.ask()
            rows = self._generation(generation, genomes)
            items = {
                task.task: draw(
                    task.roles["search"].items, spec.items, self.lock.seeds.items, generation, task.task
                )
                for task in self.lock.tasks
            }
            fitness: dict[str, float | None] = {}
            for row, genome in zip(rows, genomes, strict=True):
                done = self._evaluate(
                    row, space.decode(genome), "search", items, generate=self._search_generates
                )
                values = self._values(row.id) if done.status == "done" else None
                fitness[row.id] = (
                    None if values is None else paired_fitness(values, anchor, self.weights, scales)
                )
                # failures of an earlier process may have had a reason that is gone
                in_a_row = 0 if values is not None else in_a_row + (row.id not in earlier)
                if in_a_row >= FAILURES_IN_A_ROW:
                    raise RunError(
                        f"{in_a_row} candidates in a row failed, the last one with: {done.error}; the run is kept in"
                        f" {self.folder.path}"
                    )
                found = fitness[row.id]
                self.seen.evaluated(done, found)
                if found is not None and found > best[0]:
                    best = (found, row)
            if generation not in told:
                self.journal.tell(generation, fitness)
            elif told[generation] != fitness:
                raise RunError(
                    f"{self.folder.path}: generation {generation} replays to another fitness than was told"
                )
            optimizer.tell(genomes, np.array([math.nan if f is None else f for f in fitness.values()]))
            self.seen.told(generation, fitness)
        return optimizer.mean, best[1]

    def _generation(self, generation: int, genomes: np.ndarray[Any, Any]) -> list[CandidateRow]:
        """The journal rows of a generation: written as a whole before its work starts, or compared when replayed."""
        rows = self.journal.candidates("search", generation)
        if not rows:
            rows = [
                CandidateRow(
                    f"g{generation:03d}c{position:02d}",
                    "search",
                    generation,
                    position,
                    tuple(float(x) for x in genome),
                    self.prepared.space.decode(genome).digest(),
                )
                for position, genome in enumerate(genomes)
            ]
            self.journal.ask(rows)
        if [row.genome for row in rows] != [tuple(float(x) for x in genome) for genome in genomes]:
            raise RunError(
                f"{self.folder.path}: generation {generation} replays to other genomes than were asked; continue the run"
                " with the versions of shoal, cma and numpy that its lock names"
            )
        return rows

    def _out_of_time(self, generation: int) -> bool:
        """Whether search.max_seconds is used up; what was decided once is replayed, for the same limit."""
        limit = self.recipe.search.max_seconds
        if limit is None:
            return False
        if any(
            e["generation"] == generation and e["max_seconds"] >= limit
            for e in self.journal.events("out of time")
        ):
            return True
        spent = sum(
            row.seconds_merge + row.seconds_score + row.seconds_rest for row in self.journal.evaluations()
        )
        if spent < limit:
            return False
        self.journal.event("out of time", generation=generation, max_seconds=limit, spent=spent)
        self.seen.say(f"search.max_seconds ({limit:g} s) used up after {generation} generations")
        return True

    def _select(self, mean: np.ndarray[Any, Any], best: CandidateRow | None) -> tuple[str, MergePlan]:
        """Compare finalists on the select items: the mean, the best sample, every parent, the uniform merge.

        Every parent, since the search's objective may rank them otherwise than the metric does.
        """
        count = len(self.journal.tells())
        space = self.prepared.space
        finalists: dict[str, tuple[CandidateRow, MergePlan]] = {}
        if count:
            finalists[f"mean@{count}"] = self._finalist(f"mean@{count}", space.decode(mean), mean)
        if best is not None and best.genome is not None:
            genome = np.array(best.genome)
            finalists[f"best@{count}"] = self._finalist(f"best@{count}", space.decode(genome), genome)
        for name, (kind, plan) in self.baselines.items():
            finalists[name] = (self._asked(name, kind, plan), plan)
        self.seen.stage("selection", len(finalists))
        board = Scoreboard(self.lock, self.journal)
        ranked: list[tuple[float, float, str]] = []
        for name, (row, plan) in finalists.items():
            done = self._evaluate(row, plan, "select", self._role_items("select"), canonical=True)
            self.seen.evaluated(done, None)
            if done.status == "done":
                ranked.append((board.overall(name, "select"), board.objective(name, "select"), name))
        if not ranked:
            raise EvaluationError("no finalist can be scored on the select items")
        # of equal metric the better smooth objective, then the order above: the mean before the best noisy sample
        winner = max(ranked, key=lambda entry: entry[:2])[2]
        return winner, finalists[winner][1]

    def _finalist(
        self, name: str, plan: MergePlan, genome: np.ndarray[Any, Any]
    ) -> tuple[CandidateRow, MergePlan]:
        return self._asked(name, "finalist", plan, genome), plan

    def _test(self, winner: str, plan: MergePlan) -> str:
        """Open the test items: the winner, every parent, the uniform merge; and the winner on all search items.

        Returns the id under which the winner's metric on the search items is journalled: what a search score loses
        against the test score is shrinkage, so both are reported.
        """
        contenders = {winner: plan} | {name: other for name, (_, other) in self.baselines.items()}
        self.seen.stage("test", len(contenders) + 1)
        opening = {"winner": winner, "generations": len(self.journal.tells())}
        if opening not in self.journal.events("test opened"):
            self.journal.event("test opened", **opening)
        for name, other in contenders.items():
            row = self.journal.candidate(name)
            assert row is not None  # finalists and baselines were asked above
            done = self._evaluate(row, other, "test", self._role_items("test"), canonical=True)
            self.seen.evaluated(done, None)
        # a baseline's search row may be without generation
        searched = f"{winner} (on search items)" if winner in self.baselines else winner
        row = self._asked(searched, "finalist", plan)
        done = self._evaluate(row, plan, "search", self._role_items("search"), canonical=True)
        if done.status != "done":
            raise EvaluationError(f"{winner} cannot be scored on the search items: {done.error}")
        self.seen.evaluated(done, None)
        return searched

    def _finish(self, winner: str, plan: MergePlan, searched: str, save_weights: bool) -> dict[str, Any]:
        self.seen.say("writing the winner")
        digest = winner_sha256(self.lock, plan)
        kinds = {name: kind for name, (kind, _) in self.baselines.items()}
        result = make_result(self.recipe, self.lock, self.journal, winner, searched, kinds, digest)
        write_best(self.folder.best, self.lock, self.recipe, plan, save_weights)
        write_text(self.folder.result, json.dumps(result, indent=2) + "\n")
        write_text(self.folder.done, f"{result['verdict']}\n")
        return result
