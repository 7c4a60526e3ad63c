"""`shoal export RUN --lm-eval`: the test scores of a finished run's parents and winner as lm-eval's own files.

Written from the journal: nothing is scored. Documents, prompts and targets are built again from the data sets, checked
against the hashes in the lock; metrics are the journalled ones, aggregated by lm-eval. What the journal does not hold is
left out: `resps` and `filtered_resps` are empty, and `logliks` (a field of our own) holds the log-likelihood of each
request, in nats.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shoal.errors import RunError
from shoal.folder import RunFolder
from shoal.journal import EvaluationRow, Journal
from shoal.lock import Lock, TaskLock
from shoal.recipe import Recipe
from shoal.report import load_result
from shoal.results import save, writable
from shoal.types import ItemScore
from shoal.worker import plan_tasks


def export_lm_eval(
    run: Path,
    out: Path | None = None,
    *,
    bootstrap_iters: int = 100_000,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, tuple[Path, ...]]:
    """Write one folder per model under `out` (default RUN/lm-eval), as lm-eval lays it out; model -> files.

    A parent's folder is named by how the recipe wrote it, the winner's by the run and the candidate. bootstrap_iters:
    as lm-eval's, for standard errors of metrics that are no means over items.

    Raises:
        RunError: no finished run. EvaluationError: a data set has changed or cannot be loaded; a file not written.
    """
    folder = RunFolder(run)
    recipe, lock = folder.open()
    winner = str(load_result(run)["winner"]["id"])
    names = {model.name: model.ref for model in lock.models}
    names.setdefault(winner, f"{recipe.name}/{winner}")
    out = out or run / "lm-eval"
    writable(out)
    lm = Renderer(recipe, lock)
    say("building prompts again")
    planned = plan_tasks(lock, recipe.evaluation, lm)
    journal = Journal(folder.journal)
    written: dict[str, tuple[Path, ...]] = {}
    try:
        device = journal.events("start")[-1]["device"]
        for candidate, name in names.items():
            evaluation = journal.evaluation(candidate, "test")
            if evaluation is None or evaluation.status != "done":
                raise RunError(f"{run}: the journal has no test scores of {candidate}")
            scores = defaultdict(list)
            for score in journal.scores(candidate, "test"):
                scores[score.task].append(score)
            results = _results(lock, planned, scores, bootstrap_iters)
            samples = results.pop("samples")
            results |= _described(recipe, lock, lm, name, device, bootstrap_iters)
            results["date"] = folder.done.stat().st_mtime
            tracker = _tracker(out, name, recipe, lm, evaluation)
            written[candidate] = save(tracker, results, samples)
            say(f"{candidate}: {written[candidate][0].parent}")
    finally:
        journal.close()
    return written


class Renderer:
    """What building prompts asks of an lm-eval model: the tokenizer's part of it, without weights."""

    def __init__(self, recipe: Recipe, lock: Lock) -> None:
        from shoal.tokenizer import load_tokenizer

        arguments = recipe.evaluation.model_args
        self.tokenizer = load_tokenizer(Path(lock.models[lock.tokenizer].folder), recipe.output.chat_template)
        self.tokenizer_name = str(self.tokenizer.name_or_path).replace("/", "__")
        self.chat_template_args = dict(arguments.get("chat_template_args") or {})
        if arguments.get("enable_thinking") is not None:
            self.chat_template_args["enable_thinking"] = arguments["enable_thinking"]

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        from lm_eval.models.huggingface import HFLM

        return str(HFLM.apply_chat_template(self, messages, add_generation_prompt))


def _results(
    lock: Lock, planned: Mapping[Any, Any], scores: Mapping[str, list[ItemScore]], bootstrap_iters: int
) -> dict[str, Any]:
    """lm-eval's own aggregation of journalled metrics, with one sample per item and filter."""
    from lm_eval.evaluator_utils import _process_results

    from shoal.evals.quiet import quiet_libraries
    from shoal.evals.scorer import restored

    gathered: dict[str, Any] = {}
    for task in lock.tasks:
        planned_task = planned[task.task, "test"]
        values: dict[tuple[str, str], list[Any]] = defaultdict(list)
        samples: list[dict[str, Any]] = []
        for score in sorted(scores[task.task], key=lambda score: score.item):
            for key, value in score.metrics.items():
                metric, _, filter_name = key.partition(",")
                values[metric, filter_name].append(restored(value))
            samples += _samples(planned_task, score)
        gathered[task.task] = {
            "task": planned_task.source.task,
            "raw_metrics": values,
            "logged_samples": samples,
        }
    with quiet_libraries(), contextlib.redirect_stdout(sys.stderr):  # its bootstrap announces itself
        found = _process_results(gathered, {}, bootstrap_iters)
        results = dict(found._to_eval_results(samples=found.samples))
    results["n-samples"] = {
        task.task: _counts(task, planned[task.task, "test"].source) for task in lock.tasks
    }
    return results


def _samples(planned_task: Any, score: ItemScore) -> list[dict[str, Any]]:
    """An item as lm-eval logs it, once per filter, without what the journal does not hold."""
    from lm_eval.utils import hash_string

    from shoal.evals.catalogue import doc_hash

    request = planned_task.requests[score.item]
    target = planned_task.source.task.doc_to_target(request.doc)
    by_filter: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in score.metrics.items():
        metric, _, filter_name = key.partition(",")
        by_filter[filter_name][metric] = value
    return [
        {
            "doc_id": score.item,
            "doc": request.doc,
            "target": target,
            "arguments": [instance.args for instance in request.instances],
            "resps": [],
            "filtered_resps": [],
            "filter": filter_name,
            "metrics": list(metrics),
            "doc_hash": doc_hash(request.doc),
            "prompt_hash": hash_string(request.instances[0].arguments[0]),
            "target_hash": hash_string(str(target)),
            "logliks": list(score.logliks),
            **metrics,
        }
        for filter_name, metrics in by_filter.items()
    ]


def _counts(task: TaskLock, source: Any) -> dict[str, int]:
    role = task.roles["test"]
    return {"original": len(source.docs(role.split)), "effective": len(role.items)}


def _described(
    recipe: Recipe, lock: Lock, lm: Renderer, name: str, device: str, bootstrap_iters: int
) -> dict[str, Any]:
    """The rest of a results file, as far as the lock and the journal know it."""
    from shoal.evals.registry import MODEL

    evaluation = recipe.evaluation
    dtype = evaluation.model_args.get("dtype", "auto")
    special = {
        f"tokenizer_{kind}_token": [
            getattr(lm.tokenizer, f"{kind}_token"),
            str(getattr(lm.tokenizer, f"{kind}_token_id")),
        ]
        for kind in ("pad", "eos", "bos")
    }
    return {
        "config": {
            "model": MODEL,
            "model_args": {
                **evaluation.model_args,
                "pretrained": name,
                "dtype": lock.dtype if dtype == "auto" else dtype,
            },
            "batch_size": evaluation.batch_size,
            "batch_sizes": [],
            "device": device,
            "use_cache": None,
            "limit": None,
            "bootstrap_iters": bootstrap_iters,
            "gen_kwargs": evaluation.gen_kwargs or None,
            "fewshot_seed": lock.seeds.fewshot,
        },
        "transformers_version": lock.libraries["transformers"],
        "lm_eval_version": lock.libraries["lm_eval"],
        **special,
        "eot_token_id": lm.tokenizer.eos_token_id,
    }


def _tracker(out: Path, name: str, recipe: Recipe, lm: Renderer, evaluation: EvaluationRow) -> Any:
    from lm_eval.loggers import EvaluationTracker

    from shoal.evals.registry import MODEL

    tracker = EvaluationTracker(output_path=str(out))
    general = tracker.general_config_tracker
    spec = recipe.evaluation
    general.log_experiment_args(
        model_source=MODEL,
        model_args={"pretrained": name},
        system_instruction=spec.system_instruction,
        chat_template=lm.tokenizer.chat_template if spec.apply_chat_template else None,
        fewshot_as_multiturn=spec.fewshot_as_multiturn,
    )
    general.start_time = time.perf_counter() - evaluation.seconds_score  # it writes the time since then
    return tracker
