"""What a run may claim: scores of winner and baselines on the test items, paired differences, verdict, words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoal.evals.scorer import restored
from shoal.journal import Journal
from shoal.lock import Lock, TaskLock
from shoal.outlook import test_power
from shoal.preflight import open_catalogue
from shoal.recipe import Recipe
from shoal.sample import search_sample
from shoal.sanity import Written, read_written
from shoal.search.claims import Comparison, Contrast, Guard, TaskSamples, contrast, guard, same_model, verdict
from shoal.search.power import detectable_at
from shoal.search.simultaneous import Claimed, simultaneous
from shoal.types import Role

Aggregate = Callable[[list[Any]], float]


class Scoreboard:
    """Scores from the journal: per candidate, role and task, and their weighted mean (higher is better)."""

    def __init__(self, lock: Lock, journal: Journal) -> None:
        self.lock, self.journal = lock, journal
        self.sample = search_sample(lock)
        catalogue = open_catalogue(None if lock.include_path is None else Path(lock.include_path))
        self.aggregates: dict[str, Aggregate | None] = {
            task.task: catalogue.load(task.task).aggregation(task.metric) for task in lock.tasks
        }

    def items(self, role: Role, task: TaskLock) -> Sequence[int]:
        """The items on which scores of a role are compared: all, of search items the sample that anchors share."""
        return self.sample[task.task] if role == "search" else task.roles[role].items

    def values(self, candidate: str, role: Role, task: TaskLock) -> list[Any]:
        """The claimed metric's value of every such item that was scored, in item order."""
        wanted = set(self.items(role, task))
        rows = [r for r in self.journal.scores(candidate, role) if r.task == task.task and r.item in wanted]
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

    def known(self, candidate: str, role: Role) -> float | None:
        """`overall`, or None where the candidate was not scored by the metric on all those items."""
        rows = self.journal.scores(candidate, role)
        for task in self.lock.tasks:
            scored = {row.item for row in rows if row.task == task.task and task.metric in row.metrics}
            if not scored.issuperset(self.items(role, task)):
                return None
        return self.overall(candidate, role)

    def samples(self, winner: str, baselines: Sequence[str]) -> list[TaskSamples]:
        """Winner and baselines on the test items."""
        return [
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


class Evidence:
    """Winner against every baseline, overall and per task, on the test items: what verdict and words are made of."""

    def __init__(self, board: Scoreboard, recipe: Recipe, winner: str, baselines: Mapping[str, str]) -> None:
        self.lock, self.winner, self.baselines = board.lock, winner, baselines
        samples = board.samples(winner, list(baselines))
        tasks = [None, *(sample.task for sample in samples)]
        seed = board.lock.seeds.bootstrap
        self.contrasts: dict[tuple[str, str | None], Contrast] = {
            (name, task): contrast(samples, name, recipe.claim.resamples, seed, task=task)
            for name in baselines
            if name != winner
            for task in tasks
        }
        self.compared: list[Comparison] = [
            self.contrasts[name, task].comparison()
            if name != winner
            else same_model(samples, name, task=task)
            for name in baselines
            for task in tasks
        ]
        self.overall = {c.against: c for c in self.compared if c.task is None}

    def guards(self) -> list[Guard]:
        """The guarded tasks against every parent; none where the winner is a parent, which nothing can be lost to."""
        parents = [name for name, kind in self.baselines.items() if kind == "parent"]
        if self.winner in parents:
            return []
        return [
            guard([self.contrasts[name, task.task] for name in parents], task.max_drop)
            for task in self.lock.tasks
            if task.max_drop is not None
        ]

    def claims(self) -> dict[str, Claimed]:
        """Per task the lead over the best baseline, together for all tasks; none for one task or a baseline."""
        if len(self.lock.tasks) < 2 or self.winner in self.baselines:
            return {}
        return simultaneous(
            {t.task: [self.contrasts[name, t.task] for name in self.baselines] for t in self.lock.tasks}
        )


def aggregated(values: Sequence[Any], aggregate: Aggregate | None) -> float:
    return float(sum(values) / len(values)) if aggregate is None else float(aggregate(list(values)))


def weighted(lock: Lock, scores: Mapping[str, float]) -> float:
    total = sum(task.weight for task in lock.tasks)
    return sum(
        task.weight / total * scores[task.task] * (1 if task.higher_is_better else -1) for task in lock.tasks
    )


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

    searched: the id under which the winner was scored on the sample of search items.
    """
    board = Scoreboard(lock, journal)
    evidence = Evidence(board, recipe, winner, baselines)
    guards, claims = evidence.guards(), evidence.claims()
    found = verdict(
        winner in baselines, list(evidence.overall.values()), margin=recipe.claim.margin, guards=guards
    )
    evaluations = journal.evaluations()
    texts = journal.events("written")
    unfit = {e["candidate"]: e["reason"] for e in journal.events("disqualified")}
    seconds = {
        "merge": sum(row.seconds_merge for row in evaluations) + sum(e["seconds_merge"] for e in texts),
        "score": sum(row.seconds_score for row in evaluations) + sum(e["seconds_score"] for e in texts),
        "rest": sum(row.seconds_rest for row in evaluations)
        + sum(e["seconds"] for e in journal.events("loaded")),
    }
    candidates = journal.candidates("search")
    n, detectable = test_power(lock)
    openings = len(journal.events("test opened"))
    search_score, test_score = board.overall(searched, "search"), board.overall(winner, "test")
    result: dict[str, Any] = {
        "name": recipe.name,
        "verdict": found,
        "claim": claim_words(
            found,
            winner,
            evidence.overall,
            recipe.claim.margin,
            n,
            guards,
            openings,
            lock,
            tuple(unfit),
            len(lock.inherited),
            lock.unknown_ancestors,
        ),
        "winner": {
            "id": winner,
            "score": test_score,
            "search_score": search_score,
            "select_score": board.overall(winner, "select"),
            "shrinkage": search_score - test_score,
            "tasks": board.scores(winner, "test"),
        },
        "baselines": [
            {
                "name": name,
                "kind": kind,
                "score": board.overall(name, "test"),
                "search_score": board.known(name, "search"),
                "select_score": board.known(name, "select"),
                "tasks": board.scores(name, "test"),
            }
            for name, kind in baselines.items()
        ],
        "comparisons": [_comparison(c) for c in evidence.compared],
        "task_claims": [_task_claim(c) for c in claims.values()],
        "guards": [_guard(g) for g in guards],
        "margin": recipe.claim.margin,
        "detectable_difference": detectable,
        "test_items": n,
        "test_openings": openings,
        "inherited_openings": len(lock.inherited),
        "unknown_ancestors": list(lock.unknown_ancestors),
        "searched_on_eval_split": [task.task for task in lock.tasks if task.search_on_eval_split],
        "finalists": [
            {"id": row.candidate, "select_score": board.overall(row.candidate, "select")}
            for row in evaluations
            if row.role == "select" and row.status == "done"
        ],
        "sanity": _sanity(read_written(texts), unfit, journal.events("unwritten")),
        "cost": {
            "candidates": len(candidates),
            "ended": journal.events("search ended")[-1]["reason"],
            "failed": sum(row.status == "failed" for row in evaluations),
            "item_evaluations": sum(row.items for row in evaluations),
            "seconds": {**seconds, "total": sum(seconds.values())},
        },
        "devices": list(dict.fromkeys(e["device"] for e in journal.events("start"))),
        "weights_sha256": weights_sha256,
    }
    return result


def _comparison(c: Comparison) -> dict[str, Any]:
    """low, high: 95% interval of this comparison alone; method, why: how it was made; p: two-sided, by `test`."""
    return {
        "against": c.against,
        "difference": c.difference,
        "low": _finite(c.low),
        "high": _finite(c.high),
        "n": c.n,
        **({"task": c.task} if c.task is not None else {}),
        "wins": c.wins,
        "losses": c.losses,
        "clusters": c.clusters,
        "method": c.method,
        **({"why": c.why} if c.why else {}),
        **({"p": c.p, "test": c.test} if c.p is not None else {}),
    }


def _task_claim(c: Claimed) -> dict[str, Any]:
    """low, high: simultaneous 95% interval, together with the other tasks', of the lead over the best baseline."""
    return {
        "task": c.name,
        "against": c.against,
        "difference": c.difference,
        "low": _finite(c.low),
        "high": _finite(c.high),
        "better": c.better,
        "worse": c.worse,
    }


def _guard(g: Guard) -> dict[str, Any]:
    """low: one-sided 95% lower bound of the difference to the parent that decides."""
    return {
        "task": g.task,
        "max_drop": g.max_drop,
        "against": g.against,
        "difference": g.difference,
        "low": _finite(g.low),
        "holds": g.holds,
        "broken": g.broken,
    }


def _sanity(
    written: Mapping[str, Written], unfit: Mapping[str, str], unwritten: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """written: what was measured over the texts of each finalist and parent, None where it could not write.

    disqualified: finalist -> why it was not to be chosen. unchecked: finalists and parents that were not asked to write
    -> why.
    """
    return {
        "written": {name: None if w.sanity is None else asdict(w.sanity) for name, w in written.items()},
        "disqualified": dict(unfit),
        "unchecked": {
            name: event["reason"]
            for event in unwritten
            for name in event["candidates"]
            if name not in written
        },
    }


def _finite(value: float) -> float | None:
    """An end at infinity, of a task with one cluster, is null in JSON, which has no infinity."""
    return value if math.isfinite(value) else None


def claim_words(
    found: str,
    winner: str,
    overall: Mapping[str, Comparison],
    margin: float,
    n: int,
    guards: Sequence[Guard],
    openings: int,
    lock: Lock,
    unfit: Sequence[str] = (),
    inherited: int = 0,
    unknown: Sequence[str] = (),
) -> str:
    """The verdict in words that say no more than the intervals do.

    unfit: finalists that were disqualified. openings: of the test items by this run; inherited: by its ancestors before;
    unknown: models and runs that could not be asked for theirs.
    """
    closest = min(overall.values(), key=lambda c: c.low)
    worst = min(overall.values(), key=lambda c: c.high)
    failed = [g for g in guards if not g.holds]
    lead = f"{_points(closest.difference)}, 95% interval {_interval(closest)}"
    if found == "beats":
        text = (
            f"better than every parent and the uniform merge on {n} held-out test items: at least {_points(closest.low)} over"
            f" {closest.against} ({lead})"
        )
        if guards:
            text += "; " + "; ".join(_guard_words(g) for g in guards)
    elif closest.low > 0 and failed and winner not in overall:
        text = (
            "; ".join(_guard_words(g) for g in sorted(failed, key=lambda g: not g.broken))
            + f"; so not a better model, though ahead of every parent and the uniform merge on {n} held-out test items"
            f" together (closest {closest.against}, {lead})"
        )
    elif found == "worse":
        text = (
            f"worse than {worst.against} on {n} held-out test items: {_points(worst.difference)}, 95% interval"
            f" {_interval(worst)}"
        )
    elif found == "ties" and winner in overall:
        text = (
            f"no improvement: the model chosen on the selection items is {winner} itself, no merge among the finalists"
            f"{' that could be chosen' if unfit else ''} did better there"
        )
        if unfit:
            text += f" (disqualified: {', '.join(unfit)})"
        if worst.high < 0:
            text += f"; on the test items {worst.against} is better by {_points(-worst.difference)}"
    elif found == "ties":
        text = f"no difference larger than {100 * margin:.1f} points to any parent or the uniform merge on {n} held-out test items"
    else:
        text = f"no improvement shown over {closest.against}: {lead}"
        if closest.error > 0:
            text += (
                f"; with 80% chance these {n} test items show {100 * detectable_at(closest.error):.1f} points"
            )
    split = [task.task for task in lock.tasks if task.search_on_eval_split]
    if split:
        text += f"; items of the evaluation split of {', '.join(split)} were used in the search (others than the tested ones)"
    if openings + inherited > 1:
        text += f"; the test items were opened {openings + inherited} times"
    if inherited:
        text += f", {inherited} of them by runs that this one descends from"
    if unknown:
        text += f"; whether ancestors opened them before is unknown for {', '.join(unknown)}"
    return text


def _guard_words(g: Guard) -> str:
    drop = f"guard {g.task}: {_points(g.difference)} to {g.against}"
    if g.holds:
        return f"{drop}, a loss above {100 * g.max_drop:.1f} points is excluded"
    if g.broken:
        return f"{drop}, more than the {100 * g.max_drop:.1f} points that it may lose"
    return f"{drop}, a loss above {100 * g.max_drop:.1f} points is not excluded (it may be {_loss(g.low)})"


def _loss(low: float) -> str:
    return f"{-100 * low:.1f} points" if math.isfinite(low) else "any"


def _points(value: float) -> str:
    return f"{100 * value:+.1f} points"


def _interval(c: Comparison) -> str:
    return f"{100 * c.low:+.1f} to {100 * c.high:+.1f}"
