"""`shoal score`: one model on lm-eval tasks, over whole splits, with lm-eval's metrics and standard errors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.claim import aggregated
from shoal.errors import EvaluationError
from shoal.evals.scorer import restored
from shoal.models import resolve_models
from shoal.preflight import open_catalogue
from shoal.recipe import parse_model
from shoal.worker import resolve_device


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task. stderr: of the mean, None where the metric is no mean over items."""

    task: str
    metric: str
    value: float
    stderr: float | None
    items: int
    higher_is_better: bool


def score_model(
    model: str,
    tasks: Sequence[str],
    *,
    folder: Path = Path(),
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    dtype: str = "auto",
    device: str = "auto",
    apply_chat_template: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[TaskResult]:
    """Score `model` (as a recipe names it) on the split that lm-eval itself scores.

    limit: only the first items, cut from requests that are built over the whole split, so that prompts do not change.

    Raises:
        RecipeError, CheckpointError, EvaluationError: one clear message each.
    """
    from shoal.evals.quiet import quiet_libraries
    from shoal.evals.requests import PromptSpec, build_requests
    from shoal.evals.resident import ResidentLM
    from shoal.evals.scorer import PlannedTask, Scorer
    from shoal.merge.adapter import open_parent
    from shoal.merge.groups import tensor_groups
    from shoal.merge.resident import Merger
    from shoal.merge.runtime import load_runtime
    from shoal.search.plans import parent_plan
    from shoal.tokenizer import load_tokenizer

    if not tasks:
        raise EvaluationError("no tasks; name them by --tasks a,b")
    catalogue = open_catalogue(include_path)
    sources = [catalogue.load(name) for name in tasks]
    (resolved,) = resolve_models([parse_model(model, folder)], say)
    where = resolve_device(device)
    parent = open_parent(resolved.folder, resolved.adapter)
    stored = str(parent.dtype(parent.names[0])).removeprefix("torch.")
    with quiet_libraries():
        runtime = load_runtime(resolved.folder, stored if dtype == "auto" else dtype, where)
        lm = ResidentLM(runtime, load_tokenizer(resolved.folder), batch_size)
    if resolved.adapter is not None:
        groups = tensor_groups(parent)
        Merger([parent], groups, runtime, where).materialize(
            parent_plan(groups, [resolved.name], 0, "float32")
        )
    prompts = PromptSpec(
        apply_chat_template=apply_chat_template,
        chat_template=lm.apply_chat_template,
        tokenizer_name=lm.tokenizer_name,
    )
    results: list[TaskResult] = []
    for source in sources:
        source.set_fewshot(num_fewshot)
        split = source.eval_split
        count = len(source.docs(split))
        items = range(min(count, limit) if limit is not None else count)
        say(f"scoring {source.name}: {len(items)} items of split {split}")
        planned = PlannedTask(source, build_requests(source, split, items, prompts))
        rows, _ = Scorer(lm, {(source.name, "test"): planned}).score({(source.name, "test"): items})
        for metric in source.metrics():
            values = [restored(row.metrics[metric.key]) for row in rows if metric.key in row.metrics]
            if not values:
                continue
            aggregate = source.aggregation(metric.key)
            error = None
            if aggregate is None and len(values) > 1:
                error = statistics.stdev(values) / math.sqrt(len(values))
            value = aggregated(values, aggregate)
            results.append(
                TaskResult(source.name, metric.key, value, error, len(values), metric.higher_is_better)
            )
    return results
