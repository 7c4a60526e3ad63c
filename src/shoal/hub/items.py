"""The tasks of a run as they are published: by name and hashes; the items themselves only where that was asked for.

A custom task is one of the recipe's include path. Its YAML is code and is never published; with item text its rendered
requests are, as data: items.parquet, one row per request.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import EvaluationError, RecipeError
from shoal.export import Renderer
from shoal.hub.published import PublishedTask
from shoal.lock import Lock, TaskLock
from shoal.preflight import open_catalogue
from shoal.recipe import Recipe
from shoal.types import ROLES, Role
from shoal.worker import plan_tasks

FILE = "items.parquet"
# what lm-eval reads from files that the task's YAML names
_LOCAL = ("json", "csv", "parquet", "text", "arrow", "xml", "webdataset", "pandas")
_COLUMNS = (
    "task",
    "role",
    "item",
    "doc_hash",
    "request",
    "kind",
    "context",
    "continuation",
    "arguments",
    "target",
)


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
            task.model_copy(update={"requests": {role: _digest(planned[task.task, role]) for role in ROLES}})
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


def _digest(planned: Any) -> str:
    """sha256 over [item, kind, arguments...] of every request in item order, as compact JSON lines."""
    digest = hashlib.sha256()
    for item, one in sorted(planned.requests.items()):
        for instance in _instances(one):
            digest.update(_json([item, instance.request_type, *instance.args]).encode() + b"\n")
    return digest.hexdigest()


def _instances(one: Any) -> Iterator[Any]:
    yield from one.instances
    if one.gold is not None:
        yield one.gold


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


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


def write_items(out: Path, lock: Lock, found: Rendered, forbidden: Mapping[str, str]) -> list[str]:
    """Write items.parquet of the custom tasks that may be published; returns their names, no file without any."""
    import pyarrow
    import pyarrow.parquet

    names = [t.task for t in found.tasks if t.custom and t.task not in forbidden]
    if found.planned is None or not names:
        return []
    columns: dict[str, list[Any]] = {column: [] for column in _COLUMNS}
    for name in names:
        for role in ROLES:
            task_role = lock.task(name).roles[role]
            hashes = dict(zip(task_role.items, task_role.hashes, strict=True))
            planned = found.planned[name, role]
            for item, one in sorted(planned.requests.items()):
                target = _json(planned.source.task.doc_to_target(one.doc))
                for number, instance in enumerate(_instances(one)):
                    row = (name, role, item, hashes[item], number, instance.request_type)
                    for column, value in zip(_COLUMNS, (*row, *_arguments(instance), target), strict=True):
                        columns[column].append(value)
    pyarrow.parquet.write_table(pyarrow.table(columns), out / FILE, compression="zstd")
    return names


def _arguments(instance: Any) -> tuple[str, str | None, str | None]:
    """(context, continuation, JSON of generation arguments)"""
    args = instance.args
    if instance.request_type == "generate_until":
        return args[0], None, _json(args[1])
    return args[0], args[1] if len(args) > 1 else None, None
