"""The gradient start: the search begins where a few scored steps along the gradient of the smooth objective lead.

For a merge that is linear in its weights one backward pass gives the derivatives with respect to all of them (merge/
slopes.py), and the space's linear decode those with respect to all genes, where N + 1 forward passes would be needed
otherwise. It is a start and no more: the search goes on from there, by the same budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.journal import EvaluationRow
from shoal.sample import search_sample
from shoal.search.ascent import FORWARDS, STEPS, genes_gradient, stepped
from shoal.search.items import draw
from shoal.search.optimizer import warm_sigma0
from shoal.stages.anchors import Anchors
from shoal.stages.course import Courses
from shoal.stages.evaluator import Evaluator
from shoal.stages.values import Objective, item_values
from shoal.types import Failed, ItemCounts, Job, Slope

Genome = NDArray[np.float64]
DRAW = -2  # in place of a generation's number: which items of the anchors' sample
BACKWARD = 1  # the rung under which the backward pass is counted


def move_start(evaluator: Evaluator, anchors: Anchors) -> None:
    """Move the start of the search along the gradient, where the recipe asks for that.

    What was found is journalled (event `search start`) and read back by a resumed run; where there is no gradient, or
    no step along it is better, the search starts where it would without, which is said.
    """
    if evaluator.lock.search.start != "gradient":
        return
    known = evaluator.journal.events("search start")
    event = known[0] if known else _Calibration(evaluator, anchors).found()
    if not known:
        evaluator.journal.event("search start", **event)
        evaluator.seen.say(_words(event))
    if event["step"] > 0:
        evaluator.start_from(event["genome"], event["sigma0"])


class _NoStart(Exception):
    """Why the start stays where it is."""


@dataclass
class _Tried:
    """A scored point of the line search."""

    genome: Genome
    step: float
    value: float


class _Calibration:
    """The smooth objective on a few items of the anchors' sample: its value and its gradient."""

    def __init__(self, evaluator: Evaluator, anchors: Anchors) -> None:
        self._evaluator, self._anchors = evaluator, anchors
        self._lock, self._space = evaluator.lock, evaluator.prepared.space
        search = self._lock.search
        self._items = {
            task: draw(sample, search.start_items, self._lock.seeds.items, DRAW, task)
            for task, sample in search_sample(self._lock).items()
        }
        smooth: Objective = "smooth"
        self._objectives = {task.task: smooth for task in self._lock.tasks}

    def found(self) -> dict[str, Any]:
        """The content of the event `search start`; its step is 0 where the start stays."""
        tried: list[_Tried] = []
        self._evaluator.seen.stage("gradient start", 1 + len(STEPS))
        try:
            self._check()
            start = np.array(self._lock.search.x0)
            tried.append(self._scored(0, start, 0.0))
            gradient = self._gradient(start)
            for number, step in enumerate(STEPS, start=1):
                tried.append(self._scored(number, stepped(self._space, start, gradient, step), step))
                if not tried[-1].value > tried[-2].value:
                    break
            reason = "no step along the gradient was better"
        except _NoStart as none:
            reason = str(none)
        best = max(tried, key=lambda one: one.value, default=None)
        spent = sum(
            row.items for row in self._evaluator.journal.evaluations() if row.candidate.startswith("start")
        )
        event = {
            "tried": [[one.step, one.value] for one in tried],
            "items": {task: len(ids) for task, ids in self._items.items()},
            "item_evaluations": spent,
        }
        if best is None or best.step == 0:
            return {**event, "step": 0.0, "reason": reason}
        sigma0 = self._evaluator.recipe.search.sigma0 or warm_sigma0(self._space.size)
        return {**event, "step": best.step, "genome": best.genome.tolist(), "sigma0": sigma0}

    def _check(self) -> None:
        if not self._evaluator.worker.capabilities().differentiates:
            raise _NoStart("this worker does not differentiate")
        first = Courses(self._evaluator, self._anchors).of(0)
        lost = [task for task, objective in first.objectives.items() if objective != "smooth"]
        if lost:
            raise _NoStart(f"{lost[0]} is not searched by its smooth objective")

    def _shares(self) -> dict[str, float]:
        """Task -> what its mean objective counts, as in the fitness of a candidate."""
        reference = self._anchors.reference(self._objectives)
        total = math.fsum(reference.weights.values())
        return {t: weight / reference.scales[t] / total for t, weight in reference.weights.items()}

    def _scored(self, number: int, genome: Genome, step: float) -> _Tried:
        """A candidate of the line search, on the calibration items; one that fails ends it."""
        evaluator, plan = self._evaluator, self._space.decode(genome)
        row = evaluator.asked(f"start{number}", "start", plan, genome)
        done = evaluator.evaluate(row, plan, "search", self._items, generate=False)
        scores = evaluator.journal.scores(row.id, "search", last_rung=0)
        values = item_values(scores, self._lock, self._objectives) if done.status == "done" else None
        if values is None:
            if number == 0:
                raise _NoStart(f"it cannot be scored: {done.error or 'an item has no smooth objective'}")
            return _Tried(genome, step, -math.inf)
        evaluator.seen.evaluated(done, None)
        means = {task: math.fsum(of.values()) / len(of) for task, of in values.items()}
        return _Tried(genome, step, math.fsum(self._shares()[task] * mean for task, mean in means.items()))

    def _gradient(self, start: Genome) -> Genome:
        """The gradient [genes] at the start, journalled before anything follows from it."""
        journal = self._evaluator.journal
        known = journal.events("gradient")
        event = known[0] if known else self._differentiated(start)
        if not known:
            journal.event("gradient", **event)
        if journal.evaluation("start0", "search", BACKWARD) is None:
            seconds = event["seconds_merge"], event["seconds_score"], 0.0
            journal.complete(
                EvaluationRow(
                    "start0", "search", "done", None, *seconds, event["item_evaluations"], BACKWARD
                ),
                (),
            )
        if event["error"] is not None:
            raise _NoStart(event["error"])
        slopes = {task: [Slope(*values) for values in found] for task, found in event["slopes"].items()}
        gradient = genes_gradient(self._space, slopes, self._shares())
        if not gradient.any():
            raise _NoStart("the objective does not depend on any gene there")
        return gradient

    def _differentiated(self, start: Genome) -> dict[str, Any]:
        """The content of the event `gradient`: one backward pass over all tasks, done by the worker."""
        counts: ItemCounts = {
            (task, "search"): dict.fromkeys(ids, 1 / len(ids)) for task, ids in self._items.items()
        }
        plan = self._space.decode(start)
        outcome = self._evaluator.work(Job("start0", plan, {}, generate=False, differentiate=counts))
        spent = FORWARDS * sum(map(len, self._items.values()))
        if isinstance(outcome, Failed):
            merge, score, slopes = 0.0, outcome.seconds, dict[str, Sequence[Slope]]()
            error: str | None = outcome.error
        else:
            merge, score, slopes = outcome.seconds_merge, outcome.seconds_score, dict(outcome.slopes)
            finite = all(math.isfinite(slope.value) for found in slopes.values() for slope in found)
            error = None if finite and set(slopes) == set(self._items) else "its gradient is not finite"
        self._evaluator.counted(merge + score)
        return {
            "error": error,
            "item_evaluations": spent,
            "seconds_merge": merge,
            "seconds_score": score,
            # nan and infinity have no place in JSON
            "slopes": {}
            if error is not None
            else {
                task: [[s.group, s.source, s.parameter, s.value] for s in found]
                for task, found in slopes.items()
            },
        }


def _words(event: Mapping[str, Any]) -> str:
    spent = f"{event['item_evaluations']} item evaluations"
    if event["step"] == 0:
        return f"note: no gradient start: {event['reason']}; the search starts as without it ({spent})"
    values = {step: value for step, value in event["tried"]}
    return (
        f"gradient start: the objective on {sum(event['items'].values())} calibration items went from {values[0.0]:.4f}"
        f" to {values[event['step']]:.4f}, genes moved by {100 * event['step']:.3g}% of their ranges ({spent})"
    )
