"""Anchors: every parent and the uniform merge on all search items, before the first generation.

They are what gains are measured against, what items are chosen by, and the first evidence on whether the objective
ranks as the metric does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from shoal.errors import EvaluationError
from shoal.search.fitness import Scores, best_anchor, task_scales, unit_scales
from shoal.search.guards import Limit, best_parent
from shoal.search.items import draw
from shoal.search.weighting import disagreement
from shoal.stages.evaluator import Evaluator
from shoal.stages.values import Objectives, item_values
from shoal.types import ItemScore

GENERATED = 64  # search items of a generation task on which anchors generate where candidates do not
SAMPLE, WHOLE = (
    1,
    2,
)  # rungs of anchors: those items; all items of a task (one rung each) once its metric is searched


@dataclass(frozen=True)
class Reference:
    """The anchors' scores under given objectives, and what follows from them.

    best: the anchor that gains are measured against. scales: per task, what one unit of fitness is. limits: of guarded
    tasks.
    """

    scores: Mapping[str, Scores]
    weights: Mapping[str, float]
    scales: Mapping[str, float]
    best: str
    limits: Mapping[str, Limit]

    @property
    def anchor(self) -> Scores:
        """Item scores of the best anchor."""
        return self.scores[self.best]

    @cached_property
    def disagreement(self) -> Mapping[str, Mapping[int, float]]:
        """Task -> item -> how far the anchors are apart."""
        return {task: disagreement(self.scores, task) for task in self.weights}


class Anchors:
    """All anchors, scored. silent: generation tasks whose candidates do not generate.

    On a sample of their items the anchors do: the only place where the objective of such a task meets its metric before
    the selection.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator, self._lock = evaluator, evaluator.lock
        self._rows: dict[str, list[ItemScore]] = {}
        self._references: dict[tuple[tuple[str, str], ...], Reference] = {}
        self._generate = self._lock.search.objective == "metric"
        generating = [t.task for t in self._lock.tasks if t.output_type == "generate_until"]
        # whose candidates do not generate: the smooth objective is teacher-forced
        self.silent = () if self._generate else tuple(generating)

    def score(self) -> None:
        """Score all anchors.

        Raises:
            EvaluationError: one cannot be scored.
        """
        evaluator, seed = self._evaluator, self._lock.seeds.items
        everything = evaluator.role_items("search")
        sample = {task: draw(everything[task], GENERATED, seed, -1, task) for task in self.silent}
        evaluator.seen.stage("anchors", len(evaluator.baselines))
        for name, (kind, plan) in evaluator.baselines.items():
            row = evaluator.asked(name, kind, plan)
            done = evaluator.evaluate(row, plan, "search", everything, generate=self._generate)
            if sample:
                evaluator.evaluate(row, plan, "search", sample, rung=SAMPLE)
            self._rows[name] = evaluator.journal.scores(name, "search", last_rung=SAMPLE)
            evaluator.seen.evaluated(done, None)

    def both(self, task: str, objectives: Objectives) -> tuple[dict[str, Scores], dict[str, Scores]] | None:
        """Anchor -> scores of a task by its objective and by its metric, on the items where both are known.

        None where the metric is no number per item.
        """
        metric = self._lock.task(task).metric
        ours, theirs = {}, {}
        for name, rows in self._rows.items():
            known = [row for row in rows if row.task == task and metric in row.metrics]
            first = item_values(known, self._lock, {task: objectives[task]})
            second = item_values(known, self._lock, {task: "metric"})
            if first is None or second is None or not second[task]:
                return None
            ours[name], theirs[name] = first, second
        return ours, theirs

    def reference(self, objectives: Objectives) -> Reference:
        """What gains are measured against under these objectives.

        Raises:
            EvaluationError: an item has no value.
        """
        key = tuple(sorted(objectives.items()))
        if key not in self._references:
            self._references[key] = self._reference(objectives)
        return self._references[key]

    def _reference(self, objectives: Objectives) -> Reference:
        scores = {name: self._values(name, objectives) for name in self._rows}
        weights = {task.task: task.weight for task in self._lock.tasks}
        scales = task_scales(scores) if self._lock.search.scale == "anchors" else unit_scales(scores)
        parents = {n: s for n, s in scores.items() if self._evaluator.baselines[n][0] == "parent"}
        limits = {
            task.task: Limit(task.task, task.max_drop, parents[best_parent(parents, task.task)])
            for task in self._lock.tasks
            if task.max_drop is not None
        }
        return Reference(scores, weights, scales, best_anchor(scores, weights, scales), limits)

    def _values(self, name: str, objectives: Objectives) -> Scores:
        generated = [t for t in self.silent if objectives[t] == "metric"]
        rows = [row for row in self._rows[name] if row.task not in generated]
        for task in generated:
            rows += self._generated(name, task)
        values = item_values(rows, self._lock, objectives)
        if values is None:
            raise EvaluationError(
                "a task has items without a gold answer to score; use search.objective: metric"
            )
        return values

    def _generated(self, name: str, task: str) -> list[ItemScore]:
        """Scores of an anchor on all search items of a task, with generation; done now if they were not before."""
        evaluator = self._evaluator
        kind, plan = evaluator.baselines[name]
        rung = WHOLE + [t.task for t in self._lock.tasks].index(task)
        items = {task: self._lock.task(task).roles["search"].items}
        evaluator.evaluate(evaluator.asked(name, kind, plan), plan, "search", items, rung=rung)
        return evaluator.journal.scores(name, "search", first_rung=rung, last_rung=rung)
