"""Results in the Hub's own form, `.eval_results/*.yaml` (https://huggingface.co/docs/hub/eval-results).

Written only where they are what a reader takes them for: a complete official split, scored as the task says, none of
whose items the search met; and where the data set is a benchmark of the Hub that has a task for that split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from shoal.errors import PublishError
from shoal.hub.published import PublishedTask
from shoal.hub.safe_yaml import read_yaml
from shoal.lock import Lock, TaskLock
from shoal.recipe import Recipe

FOLDER = ".eval_results"
# metrics whose values lie in [0, 1] and are given in percent on the Hub
_SHARES = ("acc", "acc_norm", "exact_match", "f1", "em", "mcc")


def complete(lock: Lock, task: TaskLock, recipe: Recipe, split_size: int) -> str | None:
    """Why a task's test score is no result on its official split; None where it is one.

    split_size: items of the split that lm-eval itself scores.
    """
    test = task.roles["test"]
    if test.task != task.task or test.split != task.eval_split:
        return f"tested on {test.task}:{test.split}, officially scored is {task.task}:{task.eval_split}"
    if task.search_on_eval_split:
        return "items of the official split were used in the search"
    if tuple(sorted(test.items)) != tuple(range(split_size)):
        return f"{len(test.items)} of {split_size} items of the official split were scored"
    met = {h for t in lock.tasks for role in ("search", "select") for h in t.roles[role].hashes}
    if met & set(test.hashes):
        return "items of the official split were used in the search"
    if set(task.fewshot_hashes or ()) & set(test.hashes):
        return "items of the official split served as few-shot examples"
    if recipe.evaluation.gen_kwargs or recipe.evaluation.system_instruction:
        return "the recipe changes the task's prompts or its generation"
    return None


def benchmark_task(eval_yaml: str, config: str | None, split: str, where: str) -> str | None:
    """The id of the task that a benchmark's eval.yaml (untrusted) has for a config and split; None without one."""
    try:
        data = read_yaml(eval_yaml, where, 1 << 20)
    except PublishError:
        return None
    tasks = data.get("tasks") if isinstance(data, dict) else None
    for task in tasks if isinstance(tasks, list) else ():
        if (
            isinstance(task, dict)
            and str(task.get("config", "default")) == (config or "default")
            and task.get("split", split) == split
            and isinstance(task.get("id"), str)
        ):
            return str(task["id"])
    return None


def eval_results(
    recipe: Recipe,
    lock: Lock,
    tasks: Mapping[str, PublishedTask],
    scores: Mapping[str, float],
    sizes: Mapping[str, int],
    repo: str,
    eval_yaml: Callable[[str], str | None] | None = None,
) -> tuple[dict[str, str], list[str]]:
    """Path -> text of the files to publish, and for every other task why it has none.

    scores: task -> test score of the winner. sizes: task -> items of its official split, where known. eval_yaml: gives
    the text of a data set's eval.yaml, None where it is no benchmark; by default from the Hub.
    """
    import huggingface_hub

    if not hasattr(huggingface_hub, "EvalResultEntry"):
        return {}, [f"all tasks: huggingface_hub {huggingface_hub.__version__} has no EvalResultEntry"]
    files: dict[str, str] = {}
    without: list[str] = []
    for task in lock.tasks:
        found = tasks[task.task]
        reason = _reason(recipe, lock, task, found, sizes)
        if reason is None:
            assert found.dataset is not None
            text = (eval_yaml or _fetched)(found.dataset)
            where = f"eval.yaml of {found.dataset}"
            benchmark = (
                None if text is None else benchmark_task(text, found.dataset_name, task.eval_split, where)
            )
            if benchmark is None:
                reason = f"{found.dataset} is no benchmark of the Hub for its split {task.eval_split}, or not to be reached"
            else:
                path = f"{FOLDER}/{task.task.replace('/', '_')}.yaml"
                files[path] = entry(found.dataset, benchmark, 100 * scores[task.task], task, lock, repo)
        if reason is not None:
            without.append(f"{task.task}: {reason}")
    return files, without


def _reason(
    recipe: Recipe, lock: Lock, task: TaskLock, found: PublishedTask, sizes: Mapping[str, int]
) -> str | None:
    if task.task not in sizes:
        return "the size of its official split is not known here"
    if (reason := complete(lock, task, recipe, sizes[task.task])) is not None:
        return reason
    if found.custom or found.dataset is None:
        return "not a data set of the Hub"
    if task.metric.partition(",")[0] not in _SHARES:
        return f"its metric {task.metric} is no share of items"
    return None


def entry(dataset: str, benchmark: str, value: float, task: TaskLock, lock: Lock, repo: str) -> str:
    """One file: dataset, task, value in percent, how it was measured. No `verifyToken`: nobody else measured it."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    found = EvalResultEntry(
        dataset_id=dataset,
        task_id=benchmark,
        value=round(value, 4),
        source_url=f"https://huggingface.co/{repo}",
        source_name="model card",
        notes=f"lm-eval {lock.libraries['lm_eval']}, {task.task} {task.version}, {task.num_fewshot}-shot, {task.metric}",
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([found]), sort_keys=False)


def _fetched(dataset: str) -> str | None:
    """eval.yaml of a data set of the Hub; None where there is none, or it cannot be reached."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        path = huggingface_hub.hf_hub_download(dataset, "eval.yaml", repo_type="dataset")
        return Path(path).read_text(encoding="utf-8")
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        return None
    except (errors.HFValidationError, OSError, UnicodeDecodeError):
        return None
