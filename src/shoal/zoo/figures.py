"""Scores of zoo models on zoo tasks, by lm-eval itself."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def figures(
    model: Any, tokenizer: Any, tasks: Path, metrics: Mapping[str, str], limit: int
) -> dict[str, float]:
    """Score per task of a model in memory, on the first `limit` test items of each task.

    metrics: the metric per task; tasks: the folder with the tasks' YAMLs.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager, get_task_dict

    with quiet():
        # not simple_evaluate: that looks for a git repository around it, and seeds the caller's random numbers
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        result = evaluate(
            lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=128, max_length=64),
            task_dict=get_task_dict(list(metrics), manager),
            limit=limit,
            bootstrap_iters=0,
        )
    found: dict[str, float] = {}
    for task, metric in metrics.items():
        values = [v for k, v in result["results"][task].items() if k.split(",")[0] == metric]
        found[task] = round(float(values[0]), 4)
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
