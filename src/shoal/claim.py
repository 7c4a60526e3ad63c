"""What a run may claim: scores of winner and baselines on the test items, paired differences, verdict, words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.evals.scorer import restored
from shoal.journal import Journal
from shoal.lock import Lock, TaskLock
from shoal.outlook import test_power
from shoal.preflight import open_catalogue
from shoal.recipe import Recipe
from shoal.search.claims import Comparison, TaskSamples, compare, verdict
from shoal.types import ItemScore, Role

Aggregate = Callable[[list[Any]], float]


class Scoreboard:
    """Scores from the journal: per candidate, role and task, and their weighted mean (higher is better)."""

    def __init__(self, lock: Lock, journal: Journal) -> None:
        self.lock, self.journal = lock, journal
        catalogue = open_catalogue(None if lock.include_path is None else Path(lock.include_path))
        self.aggregates: dict[str, Aggregate | None] = {
            task.task: catalogue.load(task.task).aggregation(task.metric) for task in lock.tasks
        }

    def values(self, candidate: str, role: Role, task: TaskLock) -> list[Any]:
        """The claimed metric's value of every item of the role that was scored, in item order."""
        rows = [row for row in self.journal.scores(candidate, role) if row.task == task.task]
        return [restored(row.metrics[task.metric]) for row in sorted(rows, key=lambda row: row.item)]

    def task_score(self, candidate: str, role: Role, task: TaskLock) -> float:
        return aggregated(self.values(candidate, role, task), self.aggregates[task.task])

    def scores(self, candidate: str, role: Role) -> dict[str, float]:
        """Task -> score, in lock order, as lm-eval would print it."""
        return {task.task: self.task_score(candidate, role, task) for task in self.lock.tasks}

    def overall(self, candidate: str, role: Role) -> float:
        """Weighted mean over tasks; a metric where lower is better counts negatively."""
        return weighted(self.lock, self.scores(candidate, role))

    def objective(self, candidate: str, role: Role) -> float:
        """Weighted mean of the smooth objective, for ties in the metric; items without one count nothing."""
        rows = self.journal.scores(candidate, role)
        total = sum(task.weight for task in self.lock.tasks)
        parts = []
        for task in self.lock.tasks:
            values = [row.objective for row in rows if row.task == task.task and row.objective is not None]
            parts.append(task.weight / total * (sum(values) / len(values)) if values else 0.0)
        return sum(parts)

    def comparisons(self, recipe: Recipe, winner: str, baselines: Sequence[str]) -> list[Comparison]:
        """Per baseline: all tasks together, then each task; on the test items."""
        samples = [
            TaskSamples(
                task=task.task,
                weight=task.weight,
                higher_is_better=task.higher_is_better,
                winner=self.values(winner, "test", task),
                others={name: self.values(name, "test", task) for name in baselines},
                clusters=task.roles["test"].clusters,
                aggregate=self.aggregates[task.task],
            )
            for task in self.lock.tasks
        ]
        resamples, seed = recipe.claim.resamples, self.lock.seeds.bootstrap
        return [
            compare(samples, name, resamples, seed, task=task)
            for name in baselines
            for task in (None, *(sample.task for sample in samples))
        ]


def aggregated(values: Sequence[Any], aggregate: Aggregate | None) -> float:
    return float(sum(values) / len(values)) if aggregate is None else float(aggregate(list(values)))


def weighted(lock: Lock, scores: Mapping[str, float]) -> float:
    total = sum(task.weight for task in lock.tasks)
    return sum(
        task.weight / total * scores[task.task] * (1 if task.higher_is_better else -1) for task in lock.tasks
    )


def objective_values(
    rows: Sequence[ItemScore], lock: Lock, objective: str
) -> dict[str, dict[int, float]] | None:
    """Task -> item -> what the search maximises; None where an item has no such value."""
    tasks = {task.task: task for task in lock.tasks}
    values: dict[str, dict[int, float]] = {name: {} for name in tasks}
    for row in rows:
        task = tasks[row.task]
        if objective == "smooth":
            if row.objective is None:
                return None
            values[row.task][row.item] = row.objective
        else:
            values[row.task][row.item] = float(row.metrics[task.metric]) * (
                1 if task.higher_is_better else -1
            )
    return values


def make_result(
    recipe: Recipe,
    lock: Lock,
    journal: Journal,
    winner: str,
    searched: str,
    baselines: Mapping[str, str],
    weights_sha256: str,
) -> dict[str, Any]:
    """The content of result.json. baselines: name -> kind, in table order. Scores are on test items.

    searched: the id under which the winner was scored on all search items.
    """
    board = Scoreboard(lock, journal)
    compared = board.comparisons(recipe, winner, list(baselines))
    overall = {c.against: c for c in compared if c.task is None}
    found = verdict(winner in baselines, list(overall.values()), margin=recipe.claim.margin)
    evaluations = journal.evaluations()
    seconds = {
        "merge": sum(row.seconds_merge for row in evaluations),
        "score": sum(row.seconds_score for row in evaluations),
        "rest": sum(row.seconds_rest for row in evaluations)
        + sum(e["seconds"] for e in journal.events("loaded")),
    }
    candidates = journal.candidates("search")
    n, detectable = test_power(lock)
    openings = len(journal.events("test opened"))
    result: dict[str, Any] = {
        "name": recipe.name,
        "verdict": found,
        "claim": claim_words(found, winner, overall, recipe.claim.margin, n, detectable, openings, lock),
        "winner": {
            "id": winner,
            "score": board.overall(winner, "test"),
            "search_score": board.overall(searched, "search"),
            "select_score": board.overall(winner, "select"),
            "tasks": board.scores(winner, "test"),
        },
        "baselines": [
            {
                "name": name,
                "kind": kind,
                "score": board.overall(name, "test"),
                "tasks": board.scores(name, "test"),
            }
            for name, kind in baselines.items()
        ],
        "comparisons": [
            {
                "against": c.against,
                "difference": c.difference,
                "low": c.low,
                "high": c.high,
                "n": c.n,
                **({"task": c.task} if c.task is not None else {}),
                "wins": c.wins,
                "losses": c.losses,
                "method": c.method,
            }
            for c in compared
        ],
        "margin": recipe.claim.margin,
        "detectable_difference": detectable,
        "test_items": n,
        "test_openings": openings,
        "searched_on_eval_split": [task.task for task in lock.tasks if task.search_on_eval_split],
        "finalists": [
            {"id": row.candidate, "select_score": board.overall(row.candidate, "select")}
            for row in evaluations
            if row.role == "select" and row.status == "done"
        ],
        "cost": {
            "candidates": len(candidates),
            "failed": sum(row.status == "failed" for row in evaluations),
            "item_evaluations": sum(row.items for row in evaluations),
            "seconds": {**seconds, "total": sum(seconds.values())},
        },
        "devices": list(dict.fromkeys(e["device"] for e in journal.events("start"))),
        "weights_sha256": weights_sha256,
    }
    return result


def claim_words(
    found: str,
    winner: str,
    overall: Mapping[str, Comparison],
    margin: float,
    n: int,
    detectable: float,
    openings: int,
    lock: Lock,
) -> str:
    """The verdict in words that say no more than the intervals do."""
    closest = min(overall.values(), key=lambda c: c.low)
    worst = min(overall.values(), key=lambda c: c.high)
    if found == "beats":
        text = (
            f"better than every parent and the uniform merge on {n} held-out test items: at least {_points(closest.low)} over"
            f" {closest.against} ({_points(closest.difference)}, 95% interval {_interval(closest)})"
        )
    elif found == "worse":
        text = (
            f"worse than {worst.against} on {n} held-out test items: {_points(worst.difference)}, 95% interval"
            f" {_interval(worst)}"
        )
    elif found == "ties" and winner in overall:
        text = (
            f"no improvement: the model chosen on the selection items is {winner} itself, no merge among the finalists did"
            " better there"
        )
        if worst.high < 0:
            text += f"; on the test items {worst.against} is better by {_points(-worst.difference)}"
    elif found == "ties":
        text = f"no difference larger than {100 * margin:.1f} points to any parent or the uniform merge on {n} held-out test items"
    else:
        text = (
            f"no improvement shown over {closest.against}: {_points(closest.difference)}, 95% interval"
            f" {_interval(closest)}; {n} test items can show {100 * detectable:.1f} points"
        )
    split = [task.task for task in lock.tasks if task.search_on_eval_split]
    if split:
        text += f"; items of the evaluation split of {', '.join(split)} were used in the search (others than the tested ones)"
    if openings > 1:
        text += f"; the test items were opened {openings} times"
    return text


def _points(value: float) -> str:
    return f"{100 * value:+.1f} points"


def _interval(c: Comparison) -> str:
    return f"{100 * c.low:+.1f} to {100 * c.high:+.1f}"
