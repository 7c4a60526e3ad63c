"""All that the page shows, gathered from RUN: lock, recipe, journal, result; nothing is scored.

While a run goes on only small tables of the journal are read, never its item scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shoal.errors import RunError, ShoalError
from shoal.folder import RunFolder
from shoal.journal import EvaluationRow, Journal
from shoal.lock import Lock
from shoal.output import read_plan
from shoal.page.course import Course, Spent, course_of, spent_by_stage
from shoal.page.items import TaskChanges, changes
from shoal.page.state import Failure, State, failures, state_of
from shoal.page.weights import WeightMap, weight_maps
from shoal.pareto import Front, pareto
from shoal.recipe import Recipe
from shoal.report import load_result
from shoal.sanity import Written, read_written
from shoal.types import MergePlan

MOST_PLACES = 2000  # candidates times tasks; each is a bootstrap

Decode = Callable[[Sequence[float]], MergePlan]


@dataclass(frozen=True)
class Page:
    """What is known of a run when its page is written.

    result: content of result.json, None before the end. merge: whose weights `weights` are. parent: whom `items` compare
    the winner with; front: of all tasks; texts: what finalists and parents wrote to the sanity guard's prompts. no_weights, no_front, no_items: why they are missing.
    """

    run: str
    written: datetime
    recipe: Recipe
    lock: Lock
    state: State
    result: Mapping[str, Any] | None
    course: Course
    spent: tuple[Spent, ...]
    loading: float
    failures: tuple[Failure, ...]
    notes: tuple[str, ...]
    devices: tuple[str, ...]
    openings: int
    texts: tuple[Written, ...]
    merge: str
    weights: tuple[WeightMap, ...]
    front: Front | None
    parent: str
    items: tuple[TaskChanges, ...]
    no_weights: str = ""
    no_front: str = ""
    no_items: str = ""


def gather(
    run: Path,
    *,
    item_text: bool = True,
    running: bool | None = None,
    reason: str = "",
    decode: Decode | None = None,
) -> Page:
    """item_text: look up the texts of items, which loads the run's tasks. running, reason: as in `state_of`.

    decode: genome -> plan, for the weights of a run that has no winner yet.

    Raises:
        RunError: no run, or a journal that cannot be read.
    """
    folder = RunFolder(run)
    recipe, lock = folder.open()
    journal = Journal(folder.journal) if folder.journal.is_file() else None
    try:
        return _gather(folder, recipe, lock, journal, item_text, running, reason, decode)
    finally:
        if journal is not None:
            journal.close()


def _gather(
    folder: RunFolder,
    recipe: Recipe,
    lock: Lock,
    journal: Journal | None,
    item_text: bool,
    running: bool | None,
    reason: str,
    decode: Decode | None,
) -> Page:
    def events(kind: str) -> list[dict[str, Any]]:
        return journal.events(kind) if journal else []

    evaluations = journal.evaluations() if journal else []
    candidates = journal.candidates() if journal else []
    tells = journal.tells() if journal else {}
    generations = len(tells), recipe.search.budget // lock.popsize
    searching = any(row.kind == "search" for row in candidates)
    state = state_of(folder, evaluations, searching, generations, running, reason)
    result = load_result(folder.path) if state.kind == "finished" else None
    course = course_of(evaluations, tells, events("course"), events("growth"))
    merge, weights, no_weights = _weights(folder, journal, result, course, decode)
    front, no_front = _front(folder.path, lock, result, evaluations)
    parent, items, no_items = _items(lock, journal, result, item_text)
    return Page(
        run=folder.path.resolve().name,
        written=datetime.now(UTC),
        recipe=recipe,
        lock=lock,
        state=state,
        result=result,
        course=course,
        spent=spent_by_stage(evaluations, candidates, events("written")),
        loading=sum(event["seconds"] for event in events("loaded")),
        failures=failures(evaluations),
        notes=_notes(journal) if journal else (),
        devices=tuple(dict.fromkeys(event["device"] for event in events("start"))),
        openings=len(events("test opened")),
        texts=tuple(read_written(events("written")).values()),
        merge=merge,
        weights=weights,
        front=front,
        parent=parent,
        items=items,
        no_weights=no_weights,
        no_front=no_front,
        no_items=no_items,
    )


def _notes(journal: Journal) -> tuple[str, ...]:
    """What the run said of itself, and what disturbed it; each once."""
    notes = [str(event["text"]) for event in journal.events("note")]
    notes += [f"{event['candidate']}: {event['what']}" for event in journal.events("disturbed")]
    for event in journal.events("search start"):
        if event["step"] > 0:
            notes.append(
                f"the search started along the gradient: genes moved by {100 * event['step']:.3g}% of their ranges"
            )
        else:
            notes.append(f"no start along the gradient: {event['reason']}")
    notes += [
        f"the time of search.max_seconds ({event['max_seconds']:g} s) was used up after {event['generation']} generations"
        for event in journal.events("out of time")
    ]
    notes += [f"the budget was raised from {e['before']} to {e['after']}" for e in journal.events("budget")]
    return tuple(dict.fromkeys(notes))


def _weights(
    folder: RunFolder,
    journal: Journal | None,
    result: Mapping[str, Any] | None,
    course: Course,
    decode: Decode | None,
) -> tuple[str, tuple[WeightMap, ...], str]:
    """Whose weights, the weights, or why there are none."""
    if result is not None:
        winner = str(result["winner"]["id"])
        if any(b["name"] == winner and b["kind"] == "parent" for b in result["baselines"]):
            return winner, (), f"the winner is {winner} itself: nothing was merged"
        return winner, weight_maps(read_plan(folder.best)), ""
    leader = course.leader
    row = journal.candidate(leader.candidate) if journal and leader else None
    if leader is None or row is None or row.genome is None:
        return "", (), "no candidate has been told yet"
    if decode is None:
        return "", (), "they are shown when the run goes on, and at its end"
    try:
        return leader.candidate, weight_maps(decode(row.genome)), ""
    except ShoalError as error:
        return "", (), str(error)


def _front(
    run: Path, lock: Lock, result: Mapping[str, Any] | None, evaluations: Sequence[EvaluationRow]
) -> tuple[Front | None, str]:
    tasks = [task.task for task in lock.tasks]
    if len(tasks) < 2:
        return None, "the run has one task: there is nothing to trade"
    if result is None:
        return None, "it is drawn at the end of the run"
    places = len({row.candidate for row in evaluations if row.role == "search"}) * len(tasks)
    if places > MOST_PLACES:
        return None, f"left out for its size; shoal pareto RUN --tasks {','.join(tasks[:2])} draws two tasks"
    try:
        return pareto(run, tasks), ""
    except RunError as error:
        return None, str(error)
    except ShoalError as error:
        return None, f"a task cannot be loaded here: {error}"


def _items(
    lock: Lock, journal: Journal | None, result: Mapping[str, Any] | None, item_text: bool
) -> tuple[str, tuple[TaskChanges, ...], str]:
    """The best parent by its score on the test items, the changes against it, or why there are none."""
    if result is None or journal is None:
        return "", (), "the test items are opened at the end of a run"
    parents = [b for b in result["baselines"] if b["kind"] == "parent"]
    parent = str(max(parents, key=lambda b: b["score"])["name"])
    winner = str(result["winner"]["id"])
    if winner == parent:
        return parent, (), f"the winner is the best parent, {parent}, itself"
    return parent, changes(lock, journal, winner, parent, item_text), ""
