"""Finds lm-eval tasks: by name among lm-eval's own or in an include path; their splits, metrics and items.

The only module that constructs lm-eval's task objects. `docs` and `hashes` are in data-set order, which is the order
of lm-eval's own doc ids.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shoal.errors import EvaluationError, RecipeError, nearest
from shoal.evals.index import kept_index
from shoal.evals.members import leaves
from shoal.evals.quiet import quiet_libraries

SPLIT_ROLES = ("test", "validation", "training")


@dataclass(frozen=True)
class Metric:
    """A metric of a task: lm-eval's name of it and of the filter, and which direction is better."""

    name: str
    filter: str
    higher_is_better: bool

    @property
    def key(self) -> str:
        return f"{self.name},{self.filter}"


class Catalogue:
    """The tasks that can be named: those under `include_path` first, then lm-eval's own.

    lm-eval's own index is large (see `shoal.evals.index`), so it is looked at only for a name that the include path does
    not have. metadata: what lm-eval hands to tasks that ask for it (its model arguments).
    """

    def __init__(self, include_path: Path | None = None, metadata: Mapping[str, Any] | None = None) -> None:
        if include_path is not None and not include_path.is_dir():
            raise RecipeError(f"evaluation.include_path: no such folder: {include_path}")
        self.include_path = include_path
        self._metadata = dict(metadata or {})

    @cached_property
    def _own(self) -> Any:
        from lm_eval.tasks import TaskManager

        return TaskManager(
            include_path=str(self.include_path), include_defaults=False, metadata=self._metadata
        )

    @cached_property
    def _all(self) -> Any:
        from lm_eval.tasks import TaskManager

        with kept_index():
            return TaskManager(
                include_path=str(self.include_path) if self.include_path else None, metadata=self._metadata
            )

    def load(self, name: str) -> TaskSource:
        """The task of this name, with its data set loaded.

        Raises:
            RecipeError: no such task, or a group or tag of tasks.
            EvaluationError: its data set cannot be loaded.
        """
        manager = self._manager(name)
        if name not in manager.all_subtasks:
            names = [leaf.name for leaf in leaves(manager.task_index, name)]
            listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise RecipeError(
                f"task {name!r} is a group or tag of lm-eval; name a single task here: {listed or 'it has none'}"
            )
        return TaskSource(name, self._loaded(manager, name)["tasks"][name])

    def expand(self, names: Iterable[str]) -> list[str]:
        """The single tasks that names of tasks, groups and tags (or patterns, `mmlu_*`) stand for, each once.

        In lm-eval's order. Nothing is loaded.

        Raises:
            RecipeError: no such task; or a group that scores a task otherwise than the task's name says.
        """
        found: dict[str, None] = {}
        for name in self._matching(names):
            members = list(leaves(self._manager(name).task_index, name))
            for leaf in members:
                if leaf.changed or not leaf.found:
                    what = (
                        f"sets {', '.join(leaf.changed)} of"
                        if leaf.found
                        else "holds, without a name of its own,"
                    )
                    raise RecipeError(
                        f"task {name!r}: this group of lm-eval {what} {leaf.name!r}; name single tasks instead, with"
                        " these settings"
                    )
            if not members:
                raise RecipeError(f"task {name!r}: this group of lm-eval has no tasks")
            found |= dict.fromkeys(leaf.name for leaf in members)
        return list(found)

    def objects(self, names: Iterable[str]) -> list[Any]:
        """lm-eval's own Task and Group objects of tasks, groups, tags and patterns, in this order, with their data.

        Raises:
            RecipeError: no such task.
            EvaluationError: a data set cannot be loaded.
        """
        found: list[Any] = []
        for name in self._matching(names):
            loaded = self._loaded(self._manager(name), name)
            group = loaded["groups"].get(name)
            found += [group] if group is not None else list(loaded["tasks"].values())
        return found

    def manager(self, names: Iterable[str]) -> Any:
        """lm-eval's TaskManager that knows all these names."""
        managers = [self._manager(name) for name in self._matching(names)]
        return next((m for m in managers if not self.include_path or m is not self._own), managers[0])

    def _manager(self, name: str) -> Any:
        # a group of one's own may have members among lm-eval's tasks
        if self.include_path and all(
            leaf.found or leaf.inline for leaf in leaves(self._own.task_index, name)
        ):
            return self._own
        if name not in self._all.task_index:
            raise RecipeError(
                f"task {name!r}: lm-eval knows no such task; {nearest(name, self._all.all_tasks)}"
            )
        return self._all

    def _matching(self, names: Iterable[str]) -> list[str]:
        found: dict[str, None] = {}
        for name in names:
            if set(name) & set("*?["):
                matches = sorted(fnmatch.filter(self._all.all_tasks, name))
                if not matches:
                    raise RecipeError(f"task {name!r}: lm-eval knows no task that matches")
                found |= dict.fromkeys(matches)
            else:
                found[name] = None
        return list(found)

    def _loaded(self, manager: Any, name: str) -> Any:
        """What `TaskManager.load` gives for one name.

        Raises:
            EvaluationError: a data set cannot be loaded; names it and the single task, also of a group.
        """
        try:
            with quiet_libraries():
                return manager.load([name])
        except Exception as error:
            index = manager.task_index
            members = [leaf.name for leaf in leaves(index, name) if leaf.found and leaf.name != name]
            # the Hub's message names the data set; elsewhere the member that fails by itself is the one
            paths = {member: _data_set(index[member].cfg) for member in members}
            named = [member for member, path in paths.items() if "/" in path and path in str(error)]
            if not named:
                for member in members:
                    self._loaded(manager, member)
            culprit = (named or [name])[0]
            raise EvaluationError(_unavailable(culprit, index[culprit].cfg, error)) from error


def _data_set(config: Mapping[str, Any] | None) -> str:
    path = (config or {}).get("dataset_path")
    return path if isinstance(path, str) else ""


def _unavailable(name: str, config: Mapping[str, Any] | None, error: Exception) -> str:
    text = str(error).strip()
    reason = f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
    path, part = _data_set(config), (config or {}).get("dataset_name")
    data = f"its data set {path}{f' ({part})' if part else ''}" if path else "its data set"
    return (
        f"task {name!r}: {data} cannot be loaded ({reason}); check the network, or load it once while online and set"
        " HF_HUB_OFFLINE=1, or name a local copy of the task by an include path"
    )


class TaskSource:
    """One lm-eval task object. `task` is lm-eval's own; everything else here only asks it."""

    def __init__(self, name: str, task: Any) -> None:
        self.name = name
        self.task = task

    @property
    def output_type(self) -> str:
        return str(self.task.OUTPUT_TYPE)

    @property
    def version(self) -> str:
        return str(self.task.VERSION)

    @cached_property
    def splits(self) -> dict[str, str]:
        """`training`, `validation`, `test` -> the data set's name of that split, as far as the task has them."""
        task = self.task
        present = {
            "training": task.has_training_docs(),
            "validation": task.has_validation_docs(),
            "test": task.has_test_docs(),
        }
        named = {role: getattr(task.config, f"{role}_split", None) or role for role in present}
        return {role: str(named[role]) for role in present if present[role]}

    @property
    def eval_split(self) -> str:
        """The split that lm-eval itself would score: test, or validation where there is no test."""
        return self.splits["test"] if "test" in self.splits else self.splits["validation"]

    @property
    def split_names(self) -> list[str]:
        """Every split that can be named: the task's own first, then others of its data set."""
        own = list(dict.fromkeys(self.splits.values()))
        data: Any = getattr(self.task, "dataset", None)
        others = list(data.keys()) if hasattr(data, "keys") else []
        return own + [name for name in others if name not in own]

    def metrics(self) -> list[Metric]:
        """All metrics of the task, its main one first."""
        better = self.task.higher_is_better()
        names = list(getattr(self.task, "_metric_fn_list", None) or better)
        filters = [ensemble.name for ensemble in self.task._filters]
        return [Metric(name, f, bool(better.get(name, True))) for name in names for f in filters]

    def metric(self, wanted: str | None) -> Metric:
        """The metric `name` or `name,filter`; None: the task's first.

        Raises:
            RecipeError: the task does not produce it.
        """
        known = self.metrics()
        for metric in known:
            if wanted is None or wanted in (metric.name, metric.key):
                return metric
        names = dict.fromkeys([m.name for m in known] + [m.key for m in known])
        raise RecipeError(
            f"task {self.name!r} does not produce metric {wanted!r}; {nearest(str(wanted), names)}"
        )

    def aggregation(self, metric: str) -> Any | None:
        """lm-eval's aggregation of the metric (`name,filter`), or None where it is the plain mean over items."""
        from lm_eval.api.metrics import mean

        function = self.task.aggregation().get(metric.partition(",")[0], mean)
        return None if function is mean else function

    def set_fewshot(self, wanted: int | None) -> int:
        """Set the number of few-shot examples as lm-eval would, and return the number in force.

        Raises:
            RecipeError: the task fixes 0 and the recipe wants another number.
        """
        default = self.task.get_config("num_fewshot")
        if default == 0 and wanted:
            raise RecipeError(
                f"task {self.name!r} fixes num_fewshot at 0 in its own configuration, found {wanted}"
            )
        number = int(default or 0) if wanted is None else wanted
        self.task.set_config(key="num_fewshot", value=number)
        return number

    @contextmanager
    def on_split(self, split: str) -> Iterator[None]:
        """Within this block lm-eval's own task evaluates this split.

        Raises:
            RecipeError: the task has no such split.
        """
        if split not in self.split_names:
            raise RecipeError(
                f"task {self.name!r} has no split {split!r}; {nearest(split, self.split_names)}"
            )
        config = self.task.config
        before = getattr(config, "test_split", None)
        if split == self.eval_split:
            yield  # exactly as lm-eval runs it
            return
        if not hasattr(config, "test_split") or not hasattr(self.task, "dataset"):
            raise RecipeError(
                f"task {self.name!r} is Python code that fixes its own split, {self.eval_split!r}"
            )
        config.test_split = split
        try:
            yield
        finally:
            config.test_split = before

    def docs(self, split: str) -> list[dict[str, Any]]:
        """The items of a split, processed by the task, in data-set order."""
        with self.on_split(split):
            return list(self.task.eval_docs)

    def fewshot_docs(self) -> list[dict[str, Any]]:
        """The pool that few-shot examples are drawn from."""
        sampler = getattr(self.task, "sampler", None)
        return list(sampler.df) if sampler is not None else []

    def replace_fewshot_docs(self, docs: Sequence[dict[str, Any]]) -> None:
        self.task.sampler.replace_df(list(docs))


def doc_hash(doc: Any) -> str:
    """lm-eval's own `doc_hash` of an item."""
    from lm_eval.utils import handle_non_serializable, hash_string

    return str(hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)))
