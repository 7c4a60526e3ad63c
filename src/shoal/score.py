"""`shoal score`: one model on lm-eval tasks, over whole splits.

A thin layer over `lm_eval.simple_evaluate` with our own model object: prompts, metrics, standard errors, groups and
files are lm-eval's. Its `limit` is passed on as it is: few-shot examples are drawn in data-set order from one random
stream, so the first items have the prompts of a full run (a test holds that; it does not hold for lm-eval's `samples`).
"""

from __future__ import annotations

import contextlib
import functools
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.calling import make_callable
from shoal.errors import EvaluationError, nearest
from shoal.models import resolve_models
from shoal.recipe import parse_model
from shoal.results import TaskResult, save, table_rows, writable
from shoal.worker import resolve_device

__all__ = ["Scores", "Speed", "TaskResult", "score_model"]

make_callable(__name__)


@dataclass(frozen=True)
class Speed:
    """How fast a model was scored.

    tokens: of all requests, each with its whole context, and of generated text: what was asked for, however it was
    computed. seconds: within the model's calls, tokenising included. share: arithmetic that was done, of what this
    machine's matrix products would do in that time, 0 to 1; None where it was not counted. computed: tokens that went
    through the model, which are fewer where requests share them.
    """

    tokens: int
    seconds: float
    share: float | None = None
    computed: int = 0

    def words(self) -> str:
        text = f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s asked for"
        if self.share is None:
            return text
        return (
            f"{text}, {self.computed / max(self.seconds, 1e-9):,.0f} computed ({self.share:.0%} of the rate of this"
            " machine's matrix products)"
        )


@dataclass(frozen=True)
class Scores:
    """rows: of the table. results: lm-eval's own, without samples. files: what was written."""

    rows: tuple[TaskResult, ...]
    results: Mapping[str, Any]
    files: tuple[Path, ...] = ()
    speed: Speed | None = None


def score_model(
    model: str,
    tasks: Sequence[str],
    *,
    folder: Path = Path(),
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | str = 64,
    dtype: str = "auto",
    device: str = "auto",
    apply_chat_template: bool | str = False,
    fewshot_as_multiturn: bool | None = None,
    system_instruction: str | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
    output_path: Path | None = None,
    log_samples: bool = False,
    bootstrap_iters: int = 100_000,
    say: Callable[[str], None] = lambda text: None,
) -> Scores:
    """Score `model` (as a recipe names it) on tasks, groups and tags, on the splits that lm-eval itself scores.

    The arguments mean what they mean to lm-eval. limit: the first items of each task (a share of them below 1).
    batch_size: rows, halved when memory runs out; `auto` starts at 64. apply_chat_template: True, or a template's name.
    fewshot_as_multiturn: None for True where a chat template is applied. output_path: folder (or .json file) for
    lm-eval's results file, and with log_samples for its samples files. bootstrap_iters: for standard errors of metrics
    that are no means over items.

    Raises:
        RecipeError, CheckpointError, EvaluationError: one clear message each.
    """
    from shoal.evals.catalogue import Catalogue

    if not tasks:
        raise EvaluationError("no tasks; name them by --tasks a,b")
    if limit is not None and limit <= 0:
        raise EvaluationError(f"--limit: expected a number of items or a share below 1, found {limit:g}")
    if log_samples and output_path is None:
        raise EvaluationError("--log_samples writes files: say where, by --output_path")
    if fewshot_as_multiturn and not apply_chat_template:
        raise EvaluationError("--fewshot_as_multiturn needs --apply_chat_template")
    if output_path is not None:
        writable(output_path)
    (resolved,) = resolve_models([parse_model(model, folder)], say)
    arguments = {"pretrained": model, "dtype": dtype}
    catalogue = Catalogue(include_path, arguments | {"pretrained": str(resolved.folder)})
    objects = catalogue.objects(tasks)
    _check(objects, num_fewshot, say)
    lm = _load(resolved, dtype, resolve_device(device), batch_size)
    if apply_chat_template:
        _choose_template(lm.tokenizer, model, apply_chat_template)
    watch = _Stopwatch(lm)
    results, tracker = _evaluate(
        output_path,
        model=lm,
        model_args=arguments,
        tasks=objects,
        task_manager=catalogue.manager(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        device=str(lm.device),
        bootstrap_iters=bootstrap_iters,
        log_samples=log_samples,
        system_instruction=system_instruction,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=bool(apply_chat_template)
        if fewshot_as_multiturn is None
        else fewshot_as_multiturn,
        gen_kwargs=dict(gen_kwargs) if gen_kwargs else None,
    )
    for note in lm.told():
        say(f"note: {note}")
    rows, samples = table_rows(results), results.pop("samples", None)
    files = () if output_path is None else save(tracker, results, samples)
    return Scores(rows, results, files, watch.speed())


def _load(resolved: Any, dtype: str, device: str, batch_size: int | str) -> Any:
    """The model as lm-eval's model object; an adapter is merged into its base."""
    from shoal.evals.quiet import quiet_libraries
    from shoal.evals.resident import ResidentLM
    from shoal.merge.adapter import open_parent
    from shoal.merge.groups import tensor_groups
    from shoal.merge.resident import Merger
    from shoal.merge.runtime import load_runtime
    from shoal.search.plans import parent_plan
    from shoal.tokenizer import load_tokenizer

    parent = open_parent(resolved.folder, resolved.adapter)
    stored = str(parent.dtype(parent.names[0])).removeprefix("torch.")
    with quiet_libraries():
        runtime = load_runtime(resolved.folder, stored if dtype == "auto" else dtype, device)
        lm = ResidentLM(pretrained=runtime, tokenizer=load_tokenizer(resolved.folder), batch_size=batch_size)
    if resolved.adapter is not None:
        groups = tensor_groups(parent)
        Merger([parent], groups, runtime, device).materialize(
            parent_plan(groups, [resolved.name], 0, "float32")
        )
    return lm


def _check(objects: Sequence[Any], num_fewshot: int | None, say: Callable[[str], None]) -> None:
    for task in (
        task for item in objects for task in getattr(item, "get_all_tasks", lambda item=item: [item])()
    ):
        if getattr(task, "UNSAFE_CODE", False):
            raise EvaluationError(
                f"task {task.task_name!r} runs code that the model writes; shoal score does not. If this machine may:"
                " shoal lm-eval run --model shoal --confirm_run_unsafe_code ..."
            )
        if num_fewshot and task.get_config("num_fewshot") == 0:
            say(f"note: {task.task_name} fixes num_fewshot at 0 in its own configuration")


def _choose_template(tokenizer: Any, model: str, wanted: bool | str) -> None:
    """Check that there is a chat template, and keep the named one: lm-eval only logs the name."""
    templates = tokenizer.chat_template
    if not templates:
        raise EvaluationError(f"--apply_chat_template: the tokenizer of {model} has no chat template")
    if isinstance(wanted, str):
        names = templates if isinstance(templates, dict) else {}
        if wanted not in names:
            raise EvaluationError(
                f"--apply_chat_template: the tokenizer of {model} has no chat template {wanted!r};"
                f" {nearest(wanted, names) if names else 'it has one, without a name'}"
            )
        tokenizer.chat_template = names[wanted]


def _evaluate(output_path: Path | None, **arguments: Any) -> tuple[dict[str, Any], Any]:
    """`simple_evaluate` and the tracker that can write its results."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker

    from shoal.evals.quiet import quiet_libraries
    from shoal.evals.registry import MODEL

    tracker = EvaluationTracker(output_path=None if output_path is None else str(output_path))
    with quiet_libraries(), _calm(described=output_path is not None):
        try:
            results = lm_eval.simple_evaluate(evaluation_tracker=tracker, **arguments)
        except ValueError as error:  # how lm-eval says that its arguments do not fit the tasks
            raise EvaluationError(f"lm-eval: {str(error).strip().splitlines()[0]}") from error
    results["config"]["model"] = tracker.general_config_tracker.model_source = MODEL
    return results, tracker


@contextlib.contextmanager
def _calm(described: bool) -> Iterator[None]:
    """Nothing of lm-eval's on stdout or from git; without a file to write, no seconds spent on describing the machine."""
    from lm_eval import evaluator

    describe, commit = evaluator.add_env_info, evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = _commit
    if not described:
        evaluator.add_env_info = lambda results: None
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        evaluator.add_env_info, evaluator.get_git_commit_hash = describe, commit


def _commit() -> str | None:
    """As lm-eval's own, without git's complaint where the working directory is in no repository."""
    try:
        done = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


class _Stopwatch:
    """Times the calls of an lm-eval model, counts their tokens, and refuses log-likelihoods that are not finite."""

    def __init__(self, lm: Any) -> None:
        self.lm, self.tokens, self.seconds = lm, 0, 0.0
        for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, kind, functools.partial(self._timed, getattr(lm, kind), kind))

    def speed(self) -> Speed | None:
        """None where nothing was scored."""
        if not self.seconds:
            return None
        from shoal.evals.machine import forward_flops, matmul_rate

        work, model = self.lm.work, self.lm.model
        share = None
        if work.tokens:
            flops = forward_flops(model, work.tokens, work.pairs / work.tokens, work.logits)
            share = flops / self.seconds / matmul_rate(next(model.parameters()).dtype, self.lm.device)
        return Speed(self.tokens, self.seconds, share, work.tokens)

    def _timed(self, run: Callable[..., list[Any]], kind: str, requests: list[Any], **_: Any) -> list[Any]:
        start = time.perf_counter()
        answers = run(requests, disable_tqdm=True)
        self.seconds += time.perf_counter() - start
        for request, answer in zip(requests, answers, strict=True):
            if kind == "generate_until":
                self.tokens += self._length(request.args[0]) + self._length(answer)
                continue
            if not math.isfinite(answer[0] if kind == "loglikelihood" else answer):
                raise EvaluationError(
                    f"task {request.task_name!r}, item {request.doc_id}: log-likelihood is not finite; the model is broken"
                )
            if kind == "loglikelihood":
                self.tokens += sum(map(len, self.lm.encode(*request.args[:2])))
            else:
                self.tokens += self._length(request.args[0])
        return answers

    def _length(self, text: str) -> int:
        return len(self.lm.tok_encode(text))
