"""One evaluation: done by the worker and journalled, or read from the journal if it was done before."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shoal.errors import EvaluationError, RunError
from shoal.folder import RunFolder
from shoal.journal import CandidateRow, EvaluationRow, Journal
from shoal.preflight import Prepared
from shoal.stages.observer import Observer
from shoal.stages.values import first_not_finite
from shoal.types import Completed, Failed, Job, MergePlan, Role, Worker

Items = Mapping[str, Sequence[int]]  # task -> items


class Evaluator:
    """What all stages share: the run's folder, its journal, its worker, and who listens.

    `_finished`: when the last evaluation was journalled, so that the time of everything else counts as well.
    """

    def __init__(
        self, folder: RunFolder, prepared: Prepared, journal: Journal, worker: Worker, seen: Observer
    ) -> None:
        self.folder, self.prepared, self.journal = folder, prepared, journal
        self.worker, self.seen = worker, seen
        self.recipe, self.lock = prepared.recipe, prepared.lock
        self.baselines = prepared.baselines()
        self._finished = time.perf_counter()

    def evaluate(
        self,
        row: CandidateRow,
        plan: MergePlan,
        role: Role,
        items: Items,
        *,
        rung: int = 0,
        limit: float | None = None,
        generate: bool = True,
        canonical: bool = False,
    ) -> EvaluationRow:
        """The journalled evaluation of a candidate on items of a role; done now if it was not before.

        limit: seconds of merging and scoring above which it counts as failed.

        Raises:
            EvaluationError: a baseline, or any candidate on test items, cannot be scored.
        """
        done = self.journal.evaluation(row.id, role, rung)
        if done is not None:
            return done
        job = Job(
            row.id, plan, {(task, role): tuple(ids) for task, ids in items.items()}, generate, canonical
        )
        outcome = _judged(self.work(job), limit)
        now = time.perf_counter()
        if isinstance(outcome, Completed):
            merge, score = outcome.seconds_merge, outcome.seconds_score
            rest = now - self._finished - merge - score
            done = EvaluationRow(row.id, role, "done", None, merge, score, rest, len(outcome.scores), rung)
            self.journal.complete(done, outcome.scores)
        elif role == "test" or row.kind in ("parent", "uniform"):
            # nothing can be claimed without it, and what was in its way may be gone when the run is continued
            self.journal.event("disturbed", candidate=row.id, what=outcome.error)
            raise EvaluationError(
                f"{row.id} cannot be scored on {role} items: {outcome.error}; the same command tries again"
            )
        else:
            rest = now - self._finished - outcome.seconds
            done = EvaluationRow(row.id, role, "failed", outcome.error, 0.0, outcome.seconds, rest, 0, rung)
            self.journal.complete(done, ())
            self.seen.say(f"{row.id} failed: {outcome.error}")
        self._finished = now
        return done

    def work(self, job: Job) -> Completed | Failed:
        """One job done by the worker; what disturbed it is journalled and said."""
        self.worker.submit(job)
        outcome = self.worker.poll()
        for event in outcome.events:
            self.journal.event("disturbed", candidate=job.candidate, what=event)
            self.seen.say(f"note: {job.candidate}: {event}")
        return outcome

    def counted(self, seconds: float) -> None:
        """Seconds since the last evaluation that are journalled elsewhere, and so are no `seconds_rest` of the next."""
        self._finished += seconds

    def start_from(self, genome: Sequence[float], sigma0: float) -> None:
        """Let the search start from another genome than the lock's, natural units, with another first step."""
        search = self.lock.search.model_copy(update={"x0": tuple(genome)})
        self.lock = self.lock.model_copy(update={"search": search, "sigma0": sigma0})
        self.prepared = replace(self.prepared, lock=self.lock)

    def asked(
        self, candidate: str, kind: Any, plan: MergePlan, genome: np.ndarray[Any, Any] | None = None
    ) -> CandidateRow:
        """The journal row of a candidate outside the generations, written if it is new.

        Raises:
            RunError: the journal knows another merge under this name.
        """
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

    def role_items(self, role: Role) -> dict[str, Sequence[int]]:
        """Task -> all items of a role."""
        return {task.task: task.roles[role].items for task in self.lock.tasks}


def _judged(outcome: Completed | Failed, limit: float | None) -> Completed | Failed:
    """A Completed that is none: a score that is not a number, or more time than the recipe allows."""
    if isinstance(outcome, Failed):
        return outcome
    seconds = outcome.seconds_merge + outcome.seconds_score
    broken = first_not_finite(outcome.scores)
    if broken is not None:
        reason = f"task {broken.task!r}, item {broken.item}: its score is not finite"
    elif limit is not None and seconds > limit:
        reason = f"took {seconds:.3g} s, {limit:.3g} s were left of search.max_candidate_seconds"
    else:
        return outcome
    return Failed(outcome.candidate, reason, seconds, outcome.events)


def together(rows: Sequence[EvaluationRow]) -> EvaluationRow:
    """The rungs of one candidate as one row: seconds and items in all, the rest as in the last one."""
    return replace(
        rows[-1],
        seconds_merge=sum(row.seconds_merge for row in rows),
        seconds_score=sum(row.seconds_score for row in rows),
        seconds_rest=sum(row.seconds_rest for row in rows),
        items=sum(row.items for row in rows),
    )
