"""The requests of a published run on this machine: from tasks that are here, else from the data that was published.

A task that is here must have the items of the lock, by their content's hashes; whether it asks them in the same words is a
line of the table. Data must be what the lock says to the last byte, or it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.errors import EvaluationError, PublishError, RecipeError
from shoal.export import Renderer
from shoal.hub.item_file import FILE, read_items, requests_digest
from shoal.hub.opened import Opened
from shoal.lock import Lock
from shoal.types import Role
from shoal.worker import plan_tasks

if TYPE_CHECKING:  # they are heavy
    from shoal.evals.scorer import PlannedTask

    Planned = Mapping[tuple[str, Role], PlannedTask]


@dataclass(frozen=True)
class Supply:
    """What a publication's tasks are taken from, settled before anything is fetched or merged.

    include: folder of custom tasks, None without one; named: how it is called. data: requests of the custom tasks that are
    not here.
    """

    include: Path | None
    named: str = ""
    data: Planned = field(default_factory=dict)


@dataclass(frozen=True)
class TasksHere:
    """planned: of every task, what is to be scored. origins: task -> where its items come from, in words. digests: sha256 of
    the requests of a task in a role. unjudged: task -> why its correctness cannot be compared. notes: why a task that is here
    is not used."""

    planned: Planned
    origins: Mapping[str, str]
    digests: Mapping[tuple[str, Role], str]
    unjudged: Mapping[str, str]
    notes: tuple[str, ...] = ()


def supply(opened: Opened, include: Path | None, named: str = "") -> Supply:
    """Settle where the tasks are taken from. include: folder of custom tasks that was given, or a zoo's.

    Raises:
        PublishError: custom tasks that are neither given nor published, or published items that are not the lock's; scores
            of a task that the lock does not list.
    """
    listed = {task.task: task for task in opened.lock.tasks}
    for task in opened.lock.run.tasks:
        if task.task not in listed:
            raise PublishError(
                f"{opened.where}: lock.yaml scores {task.task!r}, which it does not list under tasks"
            )
    custom = [listed[task.task] for task in opened.lock.run.tasks if listed[task.task].custom]
    if include is not None or not custom:
        return Supply(include, named)
    missing = [task.task for task in custom if task.scoring is None]
    if missing:
        raise PublishError(
            f"{opened.where}: the tasks {', '.join(missing)} are the publisher's own, their items were not published, and task"
            " YAML is never taken from a repository (it can run code); name the folder that you have them in by"
            " --include-path, or ask the author to publish with --include-item-text"
        )
    names = [task.task for task in custom]
    return Supply(None, data=read_items(opened.folder, opened.lock, names, opened.where))


def tasks_here(opened: Opened, lock: Lock, found: Supply) -> TasksHere:
    """Every task's requests. lock: the run's, with the folders of this machine.

    Raises:
        EvaluationError, RecipeError: a task whose items were not published cannot be loaded, or has other items.
        PublishError: published items that are not the lock's.
    """
    listed = {task.task: task for task in opened.lock.tasks}
    renderer = Renderer(opened.recipe, lock)
    planned: dict[tuple[str, Role], PlannedTask] = {}
    origins: dict[str, str] = {}
    digests: dict[tuple[str, Role], str] = {}
    unjudged: dict[str, str] = {}
    notes: list[str] = []
    for name in (task.task for task in lock.tasks):
        task = listed[name]
        data: Planned = {key: one for key, one in found.data.items() if key[0] == name}
        if not data:
            try:
                fresh = _from_task(opened, lock, name, renderer)
            except (EvaluationError, RecipeError) as error:
                if task.scoring is None:
                    raise
                notes.append(f"{name}: the published items are scored, not the task that is here: {error}")
                data = read_items(opened.folder, opened.lock, [name], opened.where)
            else:
                planned |= fresh
                digests |= {key: requests_digest(one) for key, one in fresh.items()}
                origins[name] = found.named if task.custom else "lm-eval's task"
                continue
        planned |= data
        # checked when they were read; of some only a part is scored
        digests |= {(name, role): text for role, text in (task.requests or {}).items()}
        origins[name] = FILE
        if task.scoring is not None and task.scoring.rule is None:
            unjudged[name] = task.scoring.why
    return TasksHere(planned, origins, digests, unjudged, tuple(notes))


def _from_task(opened: Opened, lock: Lock, name: str, renderer: Renderer) -> Planned:
    one = lock.model_copy(update={"tasks": (lock.task(name),)})
    found: Planned = plan_tasks(one, opened.recipe.evaluation, renderer)
    for planned in found.values():
        if getattr(planned.source.task, "UNSAFE_CODE", False):
            raise EvaluationError(
                f"task {planned.source.name!r} runs code that the model writes; shoal does not"
            )
    return found
