"""`shoal pareto RUN`: which candidates of a run no other one beats on every named task, from the journal, after the fact.

Candidates of different generations met different items, so each is placed by its paired difference to the run's best
anchor, which met all items (DESIGN, "Items"): score = the anchor's score + difference, interval = that of the difference.
A candidate is dominated with confidence when some other one's interval lies wholly above its own on every task; that is
stricter than a paired test of the two. The others could be on the front: their place is noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.claim import Aggregate, aggregated
from shoal.errors import RunError, nearest
from shoal.evals.scorer import restored
from shoal.folder import RunFolder
from shoal.journal import CandidateRow, Journal
from shoal.lock import Lock, TaskLock
from shoal.preflight import open_catalogue
from shoal.search.claims import TaskSamples, compare
from shoal.search.fitness import Scores, best_anchor, unit_scales
from shoal.search.weighting import disagreement, inclusion
from shoal.types import ROLES, ItemScore, Role

RESAMPLES = 2000
BASELINES = ("parent", "uniform")


@dataclass(frozen=True)
class Place:
    """Where a candidate stands on one task: score, difference to the anchor (above 0: better) and its 95% interval.

    low, high: of the difference. items: on how many.
    """

    score: float
    gain: float
    low: float
    high: float
    items: int


@dataclass(frozen=True)
class Entry:
    """One candidate. front: nobody dominates it by the scores; possible: nobody does with confidence.

    dominated_by: who does, with confidence. disqualified: why the run's sanity guard turned it away; it is not on the
    front then and dominates nobody.
    """

    id: str
    kind: str
    generation: int | None
    places: Mapping[str, Place]
    front: bool = False
    possible: bool = False
    dominated_by: str | None = None
    disqualified: str | None = None


@dataclass(frozen=True)
class Front:
    """All candidates that were scored on the tasks, best first by the first task.

    measures: what each task's score is. higher: whether more of it is better. anchor: what differences are from.
    """

    run: str
    role: Role
    tasks: tuple[str, ...]
    measures: Mapping[str, str]
    higher: Mapping[str, bool]
    anchor: str
    entries: tuple[Entry, ...]
    failed: int

    def members(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.front]

    def possible(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.possible]

    def to_json(self) -> dict[str, Any]:
        data = {key: value for key, value in asdict(self).items() if key != "entries"}
        return {
            **data,
            "front": [entry.id for entry in self.members()],
            "possible": [entry.id for entry in self.possible()],
            "candidates": [asdict(entry) for entry in self.entries],
        }


def pareto(run: Path, tasks: Sequence[str], role: str = "search") -> Front:
    """The front of a run over at least two of its tasks; the journal is read, nothing is scored.

    role: `search` (every candidate, on the items of its generation), `select` (finalists) or `test` (the winner);
    baselines always. Where candidates did not generate, a generation task is judged by the search's smooth objective.

    Raises:
        RunError: no run, unknown role or tasks, one task only, no candidates.
        EvaluationError: the task of a metric that is no mean over items cannot be loaded.
    """
    chosen = next((r for r in ROLES if r == role), None)
    if chosen is None:
        raise RunError(f"no role {role!r}; {nearest(role, ROLES)}")
    folder = RunFolder(run)
    _, lock = folder.open()
    known = [task.task for task in lock.tasks]
    for name in tasks:
        if name not in known:
            raise RunError(f"{run}: no task {name!r} in this run; {nearest(name, known)}")
    if len(set(tasks)) < 2 or len(set(tasks)) != len(tasks):
        raise RunError(
            f"a front needs at least two different tasks, found {', '.join(tasks) or 'none'}; this run has"
            f" {', '.join(known)}"
        )
    if not folder.journal.is_file():
        raise RunError(f"{run}: nothing was scored yet; continue it with `shoal evolve`")
    journal = Journal(folder.journal)
    try:
        return _front(run, lock, journal, tuple(tasks), chosen)
    finally:
        journal.close()


def _front(run: Path, lock: Lock, journal: Journal, tasks: tuple[str, ...], role: Role) -> Front:
    rows = _scored(journal, role)
    if all(row.kind in BASELINES for row in rows):
        end = "" if RunFolder(run).done.is_file() else "; continue it with `shoal evolve`"
        raise RunError(
            f"{run}: no candidate was scored on {role} items, only parents and the uniform merge{end}"
        )
    table = _Table(lock, journal, role, rows, tasks)
    reasons = {event["candidate"]: event["reason"] for event in journal.events("disqualified")}
    # the merge of a finalist may stand in the table under the name it was bred with
    unfit = {row.plan_digest: reasons[row.id] for row in journal.candidates() if row.id in reasons}
    entries = []
    for row in rows:
        places = {task: table.place(row, task) for task in tasks}
        entries.append(
            Entry(row.id, row.kind, row.generation, places, disqualified=unfit.get(row.plan_digest))
        )
    failed = {e.candidate for e in journal.evaluations() if e.role == role and e.status == "failed"}
    return Front(
        run=str(run),
        role=role,
        tasks=tasks,
        measures=table.measures,
        higher=table.higher,
        anchor=table.anchor,
        entries=tuple(sorted(_judged(entries, tasks), key=lambda e: [-e.places[t].gain for t in tasks])),
        failed=len(failed),
    )


def _scored(journal: Journal, role: Role) -> list[CandidateRow]:
    """Candidates that can be merged by their id and were scored on the role, in ask order; of equal merges one."""
    counts: dict[str, int] = {}
    failed = set()
    for done in journal.evaluations():
        if done.role == role:
            counts[done.candidate] = counts.get(done.candidate, 0) + done.items
            if done.status == "failed":
                failed.add(done.candidate)
    best: dict[str, CandidateRow] = {}
    for row in journal.candidates():
        if row.kind not in BASELINES and row.genome is None:
            continue  # a baseline once more, on other items
        if not counts.get(row.id) or row.id in failed:
            continue
        before = best.get(row.plan_digest)
        if before is None or counts[row.id] > counts[before.id]:
            best[row.plan_digest] = row
    return list(best.values())


class _Table:
    """Item scores of all candidates, and the anchor that they are compared with."""

    def __init__(
        self, lock: Lock, journal: Journal, role: Role, rows: Sequence[CandidateRow], tasks: Sequence[str]
    ) -> None:
        self._lock, self._role = lock, role
        self._scores = {row.id: self._of(journal, row.id, role) for row in rows}
        self._courses = {event["generation"]: event for event in journal.events("course")}
        self._baselines = [row.id for row in rows if row.kind in BASELINES]
        self._anchors = {name: self._of(journal, name, "search") for name in self._baselines}
        self._by_metric = {task: all(self._has_metric(row.id, task) for row in rows) for task in tasks}
        self.measures = {
            task: lock.task(task).metric if self._by_metric[task] else "smooth objective" for task in tasks
        }
        self.higher = {task: lock.task(task).higher_is_better or not self._by_metric[task] for task in tasks}
        self._aggregates = self._load_aggregates()
        self.anchor = self._best(tasks)

    def _of(self, journal: Journal, candidate: str, role: Role) -> dict[str, dict[int, ItemScore]]:
        """Task -> item -> score."""
        found: dict[str, dict[int, ItemScore]] = {task.task: {} for task in self._lock.tasks}
        for score in journal.scores(candidate, role):
            found[score.task][score.item] = score
        return found

    def _has_metric(self, candidate: str, task: str) -> bool:
        metric = self._lock.task(task).metric
        return all(metric in score.metrics for score in self._scores[candidate][task].values())

    def _load_aggregates(self) -> dict[str, Aggregate | None]:
        """How each task's metric is aggregated: None for the mean."""
        include = None if self._lock.include_path is None else Path(self._lock.include_path)
        return {
            task: open_catalogue(include).load(task).aggregation(self._lock.task(task).metric)
            if by_metric
            else None
            for task, by_metric in self._by_metric.items()
        }

    def _best(self, tasks: Sequence[str]) -> str:
        """The anchor: of parents and uniform merge the best by the weighted mean of these tasks, on search items.

        On search items only those that met as many as any: candidates may have met others than the anchors' sample.
        """
        names = self._baselines
        if self._role == "search":
            met = {name: sum(map(len, self._anchors[name].values())) for name in names}
            names = [name for name in names if met[name] == max(met.values())]
        anchors: dict[str, Scores] = {
            name: {task: self._numbers(name, task) for task in tasks} for name in names
        }
        weights = {task: self._lock.task(task).weight for task in tasks}
        return best_anchor(anchors, weights, unit_scales(anchors))

    def _numbers(self, baseline: str, task: str) -> dict[int, float]:
        """Search item -> a number, higher is better: the smooth objective where every item has one, else the metric."""
        spec, scores = self._lock.task(task), self._anchors[baseline][task]
        found = {item: score.objective for item, score in scores.items() if score.objective is not None}
        if len(found) == len(scores):
            return found
        sign = 1.0 if spec.higher_is_better else -1.0
        return {item: sign * float(score.metrics[spec.metric]) for item, score in scores.items()}

    def _value(self, score: ItemScore, task: TaskLock) -> Any:
        return restored(score.metrics[task.metric]) if self._by_metric[task.task] else score.objective

    def place(self, row: CandidateRow, name: str) -> Place:
        """The paired difference of a candidate to the anchor on the items that both met."""
        task, aggregate = self._lock.task(name), self._aggregates[name]
        ours, theirs = self._scores[row.id][name], self._scores[self.anchor][name]
        items = sorted(set(ours) & set(theirs))
        if not items:
            raise RunError(
                f"{row.id} and the anchor {self.anchor} have no {self._role} item of task {name!r} in common"
            )
        role = task.roles[self._role]
        clusters = dict(zip(role.items, role.clusters, strict=True))
        values = [self._value(ours[item], task) for item in items]
        others = [self._value(theirs[item], task) for item in items]
        if aggregate is None:
            values = self._counted(row, name, items, values, others)
        samples = TaskSamples(
            task=name,
            weight=1.0,
            higher_is_better=self.higher[name],
            winner=values,
            others={self.anchor: others},
            clusters=[clusters[item] for item in items],
            aggregate=aggregate,
        )
        found = compare([samples], self.anchor, RESAMPLES, self._lock.seeds.bootstrap, task=name)
        whole = aggregated([self._value(theirs[item], task) for item in sorted(theirs)], aggregate)
        score = whole + (found.difference if self.higher[name] else -found.difference)
        return Place(score, found.difference, found.low, found.high, len(items))

    def _counted(
        self, row: CandidateRow, name: str, items: Sequence[int], values: list[Any], others: list[Any]
    ) -> list[float]:
        """Values whose plain mean is the estimate, where items were drawn by how far the anchors disagree on them.

        A difference d of inclusion probability pi counts n / (pool x pi), see `search.weighting`.
        """
        spec, course = self._lock.search, self._courses.get(row.generation)
        if self._role != "search" or spec.item_choice != "disagreement" or course is None:
            return values
        anchors = {anchor: {name: self._numbers(anchor, name)} for anchor in self._baselines}
        pool = self._lock.task(name).roles["search"].items
        chances = inclusion(pool, course["items"], disagreement(anchors, name), spec.uniform_share)
        number = min(course["items"], len(pool))
        return [
            other + number / (len(pool) * chances[item]) * (value - other)
            for item, value, other in zip(items, values, others, strict=True)
        ]


def _judged(entries: Sequence[Entry], tasks: Sequence[str]) -> list[Entry]:
    """The entries with their standing."""
    fit = [entry for entry in entries if entry.disqualified is None]
    gains, lows, highs = (
        np.array([[getattr(entry.places[task], what) for task in tasks] for entry in fit])
        for what in ("gain", "low", "high")
    )
    on_front = non_dominated(gains)
    judged = [entry for entry in entries if entry.disqualified is not None]
    for index, entry in enumerate(fit):
        above = (lows > highs[index]).all(axis=1)
        # of those who dominate it with confidence, the one with the most room on its worst task
        by = (
            int(np.argmax(np.where(above, (lows - highs[index]).min(axis=1), -np.inf)))
            if above.any()
            else None
        )
        front = bool(on_front[index])
        judged.append(
            replace(
                entry,
                front=front,
                possible=front or by is None,
                dominated_by=None if front or by is None else fit[by].id,
            )
        )
    return judged


def non_dominated(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[n]: which rows of `points` [n, k], higher is better, no other row is as good as in all and better in one."""
    points = np.asarray(points, dtype=np.float64)
    return np.array(
        [not ((points >= p).all(axis=1) & (points > p).any(axis=1)).any() for p in points], dtype=np.bool_
    )
