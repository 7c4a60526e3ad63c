"""The tasks of a run as they are published: by name and hashes; the items themselves only where that was asked for.

A custom task is one of the recipe's include path. Its YAML is code and is never published; with item text its rendered
requests are, as data, with what counts as right: items.parquet, one row per request.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shoal.errors import EvaluationError, RecipeError
from shoal.export import Renderer
from shoal.hub import item_file
from shoal.hub.item_file import as_json, instances, requests_digest
from shoal.hub.published import PublishedTask
from shoal.hub.scoring import Ruled, Scoring, answers_digest
from shoal.lock import Lock, TaskLock
from shoal.preflight import open_catalogue
from shoal.recipe import Recipe
from shoal.types import ROLES, Role
from shoal.worker import plan_tasks

# what lm-eval reads from files that the task's YAML names
_LOCAL = ("json", "csv", "parquet", "text", "arrow", "xml", "webdataset", "pandas")


@dataclass(frozen=True)
class Rendered:
    """Tasks and, where they could be built, their requests: (task, role) -> item -> requests. why: where not."""

    tasks: tuple[PublishedTask, ...]
    planned: Mapping[tuple[str, Role], Any] | None
    why: str = ""

    def texts(self, without: Collection[str] = (), limit: int = 400) -> list[str]:
        """Prompts and answers of some items of every other task and role, to look for where they must not be."""
        if self.planned is None:
            return []
        each = max(1, limit // max(1, len(self.planned)))
        found: list[str] = []
        for planned in (p for (task, _), p in self.planned.items() if task not in without):
            for one in list(planned.requests.values())[:each]:
                found += [arg for i in one.instances for arg in i.args if isinstance(arg, str)]
                found += (
                    [v for v in one.doc.values() if isinstance(v, str)] if isinstance(one.doc, dict) else []
                )
        return found


def rendered(recipe: Recipe, lock: Lock) -> Rendered:
    """The run's tasks, with a hash over the requests of each role."""
    described = [_described(recipe, lock, task) for task in lock.tasks]
    try:
        planned = plan_tasks(lock, recipe.evaluation, Renderer(recipe, lock))
    except (EvaluationError, RecipeError) as error:
        return Rendered(tuple(described), None, str(error))
    return Rendered(
        tuple(
            task.model_copy(
                update={"requests": {role: requests_digest(planned[task.task, role]) for role in ROLES}}
            )
            for task in described
        ),
        planned,
    )


def _described(recipe: Recipe, lock: Lock, task: TaskLock) -> PublishedTask:
    include = None if lock.include_path is None else Path(lock.include_path)
    try:
        catalogue = open_catalogue(include)
        entry = catalogue.manager([task.task]).task_index[task.task]
        config = catalogue.load(task.task).task.config
    except (EvaluationError, RecipeError):
        return PublishedTask(task=task.task, custom=include is not None)
    path = getattr(entry, "yaml_path", None)
    custom = (
        include is not None and path is not None and Path(path).resolve().is_relative_to(include.resolve())
    )
    source = recipe.evaluation.include_path
    dataset = getattr(config, "dataset_path", None)
    on_hub = isinstance(dataset, str) and dataset not in _LOCAL and not dataset.startswith((".", "/", "~"))
    name = getattr(config, "dataset_name", None)
    return PublishedTask(
        task=task.task,
        custom=custom,
        source=source if custom and source is not None and source.startswith("zoo:") else None,
        dataset=dataset if on_hub else None,
        dataset_name=name if on_hub and isinstance(name, str) else None,
    )


def private_data(tasks: Sequence[PublishedTask]) -> dict[str, str]:
    """Tasks whose items must not be published, whatever was asked for, and why: gated or private data sets.

    A data set of the Hub that cannot be looked up counts as gated.
    """
    import huggingface_hub
    from huggingface_hub import errors

    found: dict[str, str] = {}
    known: dict[str, str] = {}
    for task in tasks:
        if task.dataset is None:
            continue
        if task.dataset not in known:
            try:
                info = huggingface_hub.HfApi().dataset_info(task.dataset)
                known[task.dataset] = "gated" if info.gated else "private" if info.private else ""
            except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, errors.HFValidationError, OSError):
                known[task.dataset] = "not to be looked up on the Hub, so perhaps gated"
        if known[task.dataset]:
            found[task.task] = f"{task.task}: its data set {task.dataset} is {known[task.dataset]}"
    return found


def write_items(
    out: Path, lock: Lock, found: Rendered, forbidden: Mapping[str, str]
) -> tuple[Rendered, dict[str, str]]:
    """Write items.parquet of the custom tasks that may be published; no file without any.

    Returns the tasks with how each one's claimed metric is computed from responses, and, of those that were written, why
    correctness cannot be compared without the task's own files (empty where it can).
    """
    names = [t.task for t in found.tasks if t.custom and t.task not in forbidden]
    if found.planned is None or not names:
        return found, {}
    columns: dict[str, list[Any]] = {column: [] for column in item_file.COLUMNS}
    scorings = {name: _write_task(columns, name, lock.task(name), found.planned) for name in names}
    item_file.write(out / item_file.FILE, columns)
    tasks = tuple(task.model_copy(update={"scoring": scorings.get(task.task)}) for task in found.tasks)
    return replace(found, tasks=tasks), {name: scoring.why for name, scoring in scorings.items()}


def _write_task(
    columns: dict[str, list[Any]], name: str, task: TaskLock, planned: Mapping[tuple[str, Role], Any]
) -> Scoring:
    """Append a task's rows to the columns; without answers where an item of it has none that a rule can be told by."""
    # each role may have a task of its own
    ruled = {role: Ruled(planned[name, role].source, task.metric) for role in ROLES}
    rules = {(one.rule, one.ignore, one.why) for one in ruled.values()}
    answers = {
        role: {i: ruled[role].answer(one.doc) for i, one in planned[name, role].requests.items()}
        for role in ROLES
    }
    rule, ignore, why = rules.pop()
    if rules:
        rule, why = None, "it is computed in another way for each role"
    elif rule is not None and any(answer is None for role in ROLES for answer in answers[role].values()):
        rule, why = None, "what counts as right is no option or text"
    digests: dict[Role, str] = {}
    for role in ROLES:
        hashes = dict(zip(task.roles[role].items, task.roles[role].hashes, strict=True))
        told: list[tuple[int, str, str]] = []
        for item, one in sorted(planned[name, role].requests.items()):
            target = as_json(planned[name, role].source.task.doc_to_target(one.doc))
            answer = as_json(answers[role][item]) if rule and answers[role][item] else ""
            told.append((item, hashes[item], answer))
            for number, instance in enumerate(instances(one)):
                row = (name, role, item, hashes[item], number, instance.request_type)
                cells = (*row, *_arguments(instance), target, answer)
                for column, value in zip(item_file.COLUMNS, cells, strict=True):
                    columns[column].append(value)
        digests[role] = answers_digest(told)
    return Scoring(rule=rule, ignore=ignore if rule else (), why=why, answers=digests)


def _arguments(instance: Any) -> tuple[str, str | None, str | None]:
    """(context, continuation, JSON of generation arguments)"""
    args = instance.args
    if instance.request_type == "generate_until":
        return args[0], None, as_json(args[1])
    return args[0], args[1] if len(args) > 1 else None, None
