"""Anchors: every parent and the uniform merge on one sample of the search items, before the first generation.

They are what gains are measured against, what items are chosen by, and the first evidence on whether the objective
ranks as the metric does. Gains need the best anchor's scores on the items of a generation, and no other's: it is
scored on those items when they are drawn, so that a large pool of search items costs nothing by being large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal.errors import EvaluationError
from shoal.journal import EvaluationRow
from shoal.sample import search_sample
from shoal.search.fitness import Scores, best_anchor, paired_estimate, task_scales, unit_scales
from shoal.search.guards import Limit, best_parent
from shoal.search.items import draw
from shoal.search.weighting import disagreement
from shoal.stages.evaluator import Evaluator
from shoal.stages.values import Objective, Objectives, item_values
from shoal.types import ItemScore

GENERATED = 64  # sampled items of a generation task on which anchors generate where candidates do not
# rungs of anchors: those items; the whole sample of a task (one rung each) once its metric is searched; the items of
# each generation
SAMPLE, WHOLE, DRAWN = 1, 2, 1000
BEHIND = 2.33  # standard errors by which a parent is no finalist: level 0.01, one-sided


@dataclass(frozen=True)
class Reference:
    """What gains are measured against under given objectives, decided on the sample.

    best: the anchor. scales: per task, what one unit of fitness is. guardians: of guarded tasks, the best parent.
    disagreement: task -> item of the sample -> how far the anchors are apart.
    """

    best: str
    weights: Mapping[str, float]
    scales: Mapping[str, float]
    guardians: Mapping[str, str]
    disagreement: Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Met:
    """The reference on the items of one generation: the best anchor's scores, and the limits of guarded tasks."""

    anchor: Scores
    limits: Mapping[str, Limit]


class Anchors:
    """All anchors, scored. silent: generation tasks whose candidates do not generate.

    On a part of the sample the anchors do: the only place where the objective of such a task meets its metric before
    the selection.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator, self._lock = evaluator, evaluator.lock
        self._sample = search_sample(evaluator.lock)
        self._rows: dict[str, list[ItemScore]] = {}
        self._references: dict[tuple[tuple[str, str], ...], Reference] = {}
        self._generate = self._lock.search.objective == "metric"
        generating = [t.task for t in self._lock.tasks if t.output_type == "generate_until"]
        # whose candidates do not generate: the smooth objective is teacher-forced
        self.silent = () if self._generate else tuple(generating)

    def score(self) -> None:
        """Score all anchors on the sample.

        Raises:
            EvaluationError: one cannot be scored.
        """
        evaluator, seed = self._evaluator, self._lock.seeds.items
        some = {task: draw(self._sample[task], GENERATED, seed, -1, task) for task in self.silent}
        evaluator.seen.stage("anchors", len(evaluator.baselines))
        for name in evaluator.baselines:
            done = self._evaluate(name, self._sample, 0, generate=self._generate)
            if some:
                self._evaluate(name, some, SAMPLE)
            # what a killed process scored later is taken in at the same point again
            self._rows[name] = evaluator.journal.scores(name, "search", last_rung=SAMPLE)
            evaluator.seen.evaluated(done, None)

    def reference(self, objectives: Objectives) -> Reference:
        """What gains are measured against under these objectives.

        Raises:
            EvaluationError: an item has no value.
        """
        key = tuple(sorted(objectives.items()))
        if key not in self._references:
            self._references[key] = self._reference(objectives)
        return self._references[key]

    def meet(self, objectives: Objectives, items: Mapping[str, Sequence[int]], generation: int) -> Met:
        """Score the reference on the items of a generation where it was not, and say what it did there.

        Raises:
            EvaluationError: it cannot be scored, or an item has no value.
        """
        reference = self.reference(objectives)
        needed: dict[str, set[str]] = {reference.best: set(items)}
        for task, parent in reference.guardians.items():
            needed.setdefault(parent, set()).add(task)
        for name, tasks in needed.items():
            known = self._known(name, objectives)
            missing = {
                task: left
                for task in items
                if task in tasks and (left := sorted(set(items[task]) - set(known[task])))
            }
            if missing:
                generate = any(objectives[task] == "metric" for task in missing)
                self._evaluate(name, missing, DRAWN + generation, generate=generate)
                self._rows[name] = self._merged(name, DRAWN + generation)
        drops = {task.task: task.max_drop for task in self._lock.tasks if task.max_drop is not None}
        parents = {parent: self._known(parent, objectives) for parent in reference.guardians.values()}
        return Met(
            self._known(reference.best, objectives),
            {task: Limit(task, drops[task], parents[parent]) for task, parent in reference.guardians.items()},
        )

    def both(self, task: str, objectives: Objectives) -> tuple[dict[str, Scores], dict[str, Scores]] | None:
        """Anchor -> scores of a task by its objective and by its metric, on sampled items where both are known.

        None where the metric is no number per item.
        """
        metric, sampled = self._lock.task(task).metric, set(self._sample[task])
        ours, theirs = {}, {}
        for name, rows in self._rows.items():
            known = [r for r in rows if r.task == task and r.item in sampled and metric in r.metrics]
            first = item_values(known, self._lock, {task: objectives[task]})
            second = item_values(known, self._lock, {task: "metric"})
            if first is None or second is None or not second[task]:
                return None
            ours[name], theirs[name] = first, second
        return ours, theirs

    def metric(self, name: str, task: str) -> Scores | None:
        """An anchor's metric on all items of a task on which it is known; None where it is no number per item."""
        return item_values(self._metric_rows(name, task), self._lock, {task: "metric"})

    def contenders(self) -> list[str]:
        """The anchors that may be better than any merge: the uniform merge, the best parent, and every parent that is
        not surely behind it on the sample, by the metric where it is known there; in table order.
        """
        objectives: dict[str, Objective] = {
            task: "metric"
            if task not in self.silent and all(self.metric(name, task) is not None for name in self._rows)
            else self._lock.search.objective
            for task in self._sample
        }
        reference = self.reference(objectives)
        kinds = {name: kind for name, (kind, _) in self._evaluator.baselines.items()}
        scores = {name: self._sampled(name, objectives) for name in kinds}
        parents = {name: scores[name] for name, kind in kinds.items() if kind == "parent"}
        best = best_anchor(parents, reference.weights, reference.scales)
        kept = []
        for name, kind in kinds.items():
            if kind == "parent" and name != best:
                lead = paired_estimate(scores[best], scores[name], reference.weights, reference.scales)
                if lead.mean > BEHIND * lead.error:
                    continue
            kept.append(name)
        return kept

    def _evaluate(
        self, name: str, items: Mapping[str, Sequence[int]], rung: int, generate: bool = True
    ) -> EvaluationRow:
        evaluator = self._evaluator
        kind, plan = evaluator.baselines[name]
        row = evaluator.asked(name, kind, plan)
        return evaluator.evaluate(row, plan, "search", items, rung=rung, generate=generate)

    def _merged(self, name: str, rung: int) -> list[ItemScore]:
        """What is known of an anchor, with the scores of one more rung."""
        found = {(row.task, row.item): row for row in self._rows[name]}
        for row in self._evaluator.journal.scores(name, "search", first_rung=rung, last_rung=rung):
            found[row.task, row.item] = row
        return list(found.values())

    def _reference(self, objectives: Objectives) -> Reference:
        for place, task in enumerate(t.task for t in self._lock.tasks):
            if task in self.silent and objectives[task] == "metric":
                for name in self._rows:
                    self._evaluate(name, {task: self._sample[task]}, WHOLE + place)
                    self._rows[name] = self._merged(name, WHOLE + place)
        scores = {name: self._sampled(name, objectives) for name in self._rows}
        weights = {task.task: task.weight for task in self._lock.tasks}
        scales = task_scales(scores) if self._lock.search.scale == "anchors" else unit_scales(scores)
        parents = {n: s for n, s in scores.items() if self._evaluator.baselines[n][0] == "parent"}
        return Reference(
            best_anchor(scores, weights, scales),
            weights,
            scales,
            {t.task: best_parent(parents, t.task) for t in self._lock.tasks if t.max_drop is not None},
            {task: disagreement(scores, task) for task in weights},
        )

    def _sampled(self, name: str, objectives: Objectives) -> Scores:
        known = self._known(name, objectives)
        return {task: {item: known[task][item] for item in items} for task, items in self._sample.items()}

    def _known(self, name: str, objectives: Objectives) -> Scores:
        """All values of an anchor under these objectives; of a generated metric, where it generated."""
        rows = []
        for task, objective in objectives.items():
            if objective == "metric":
                rows += self._metric_rows(name, task)
            else:
                rows += [row for row in self._rows[name] if row.task == task]
        values = item_values(rows, self._lock, objectives)
        if values is None:
            raise EvaluationError(
                "a task has items without a gold answer to score; use search.objective: metric"
            )
        return values

    def _metric_rows(self, name: str, task: str) -> list[ItemScore]:
        metric = self._lock.task(task).metric
        return [row for row in self._rows[name] if row.task == task and metric in row.metrics]
