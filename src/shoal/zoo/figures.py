"""Scores of zoo models on zoo tasks, as `shoal score` gives them."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.types import Role


def figures(
    model: Any, tokenizer: Any, tasks: Path, metrics: Mapping[str, str], limit: int
) -> dict[str, float]:
    """Score per task of a model in memory, on the first `limit` test items of each task.

    metrics: the metric per task; tasks: the folder with the tasks' YAMLs.
    """
    from shoal.evals.catalogue import Catalogue
    from shoal.evals.requests import PromptSpec, build_requests
    from shoal.evals.resident import ResidentLM
    from shoal.evals.scorer import PlannedTask, Scorer

    with quiet():
        lm = ResidentLM(model, tokenizer, 128, max_length=64)
    catalogue = Catalogue(tasks)
    found: dict[str, float] = {}
    for task, name in metrics.items():
        source = catalogue.load(task)
        source.set_fewshot(None)
        role: Role = "test"
        key, items = (task, role), range(limit)
        planned = PlannedTask(source, build_requests(source, source.eval_split, items, PromptSpec()))
        rows, _ = Scorer(lm, {key: planned}).score({key: items})
        values = [row.metrics[source.metric(name).key] for row in rows]
        found[task] = round(sum(values) / len(values), 4)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the notes and progress bars of other libraries; a build has its own progress."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
