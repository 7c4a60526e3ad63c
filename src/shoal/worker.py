"""The worker of this process: loads models and tasks from the lock, merges into one resident model and scores it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from shoal.errors import EvaluationError, ShoalError
from shoal.lock import Lock, RoleLock, TaskLock
from shoal.models import open_parents
from shoal.preflight import groups_of, open_catalogue
from shoal.recipe import EvaluationSpec, Recipe
from shoal.types import ROLES, Capabilities, Completed, Failed, Job, MergePlan, Role, Slope


class LocalWorker:
    """One resident model in this process. Jobs are done one after the other, when polled for.

    device: `cpu`, `cuda`, `cuda:1`, ... or `auto`. memory: tier of the parents, or `auto`; memory_limit: bytes of
    device memory to stay under (on a CPU: of the process). say: told what takes time. plan: file of the requests' tokens, used again or written.
    tasks: requests that were built already, instead of those of the lock's tasks.
    """

    def __init__(
        self,
        recipe: Recipe,
        lock: Lock,
        device: str = "auto",
        say: Callable[[str], None] = lambda text: None,
        memory: str = "auto",
        memory_limit: int | None = None,
        plan: Path | None = None,
        tasks: Mapping[tuple[str, Role], Any] | None = None,
    ) -> None:
        import torch

        from shoal.evals.backward import Backward
        from shoal.evals.plan import instances, prepare
        from shoal.evals.quiet import quiet_libraries
        from shoal.evals.resident import ResidentLM
        from shoal.evals.scorer import Scorer
        from shoal.evals.writing import Writer
        from shoal.merge.methods import method
        from shoal.merge.resident import Merger
        from shoal.merge.runtime import load_runtime
        from shoal.tokenizer import load_tokenizer

        self._recipe, self._lock = recipe, lock
        self.device = torch.device(resolve_device(device))
        arguments = dict(recipe.evaluation.model_args)
        dtype = arguments.pop("dtype", "auto")
        arguments.pop("device", None)  # the run's own device decides
        say("loading models")
        parents = open_parents(lock.models)
        with quiet_libraries():
            # on the CPU first: the merger moves it into its flat buffer on the device
            model = load_runtime(
                Path(lock.models[0].folder), lock.dtype if dtype == "auto" else str(dtype), "cpu"
            )
        self._merger = Merger(
            parents,
            groups_of(lock.models),
            model,
            str(self.device),
            memory,
            memory_limit,
            sparse=method(lock.operator).drops,
            say=say,
        )
        self.notes = tuple(self._merger.notes)
        tokenizer = load_tokenizer(Path(lock.models[lock.tokenizer].folder), recipe.output.chat_template)
        with quiet_libraries():
            self._lm = ResidentLM(
                model, tokenizer, recipe.evaluation.batch_size, memory_limit=memory_limit, **arguments
            )
        if tasks is None:
            say("building requests")
            tasks = plan_tasks(lock, recipe.evaluation, self._lm)
        prepare(self._lm, tasks, plan)
        self._lm.settle(list(instances(tasks)))
        self.notes += tuple(self._lm.told())
        self._scorer = Scorer(self._lm, tasks)
        self._backward = Backward(self._lm, tasks, memory_limit if self.device.type == "cpu" else None)
        prompting = recipe.evaluation
        self._writer = Writer(self._lm, prompting.apply_chat_template, prompting.system_instruction)
        self._jobs: list[Job] = []

    def submit(self, job: Job) -> str:
        self._jobs.append(job)
        return job.candidate

    def cancel(self, candidate: str) -> None:
        self._jobs = [job for job in self._jobs if job.candidate != candidate]

    def capabilities(self) -> Capabilities:
        import torch

        name = str(self.device)
        if self.device.type == "cuda":
            name = f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        return Capabilities(
            device=name, slots=1, writes=self._writer.able, differentiates=self._backward.able
        )

    def close(self) -> None:
        self._jobs = []

    def poll(self) -> Completed | Failed:
        """Do the oldest job. An exception of merging or scoring is a Failed; an interrupt is not caught."""
        job = self._jobs.pop(0)
        start = time.perf_counter()
        try:
            self._lm.forget()
            self._merger.materialize(job.plan, canonical=job.canonical)
            self._synchronize()
            merged = time.perf_counter()
            texts = self._writer.write(job.prompts, job.max_tokens)
            scores, events = self._scorer.score(job.items, job.generate)
            slopes = self._slopes(job, events)
            self._synchronize()
        except Exception as error:  # noqa: BLE001 (one broken candidate must not end a run)
            return Failed(job.candidate, describe_error(error), time.perf_counter() - start)
        return Completed(
            job.candidate,
            tuple(scores),
            merged - start,
            time.perf_counter() - merged,
            tuple(events),
            texts,
            slopes,
        )

    def _slopes(self, job: Job, events: list[str]) -> dict[str, tuple[Slope, ...]]:
        """Task -> derivatives of its objective with respect to the coefficients of the merge that was made.

        Where memory runs out a task begins anew with smaller batches, which is said in `events`.
        """
        from shoal.evals.limits import run_halving
        from shoal.merge.slopes import Slopes

        def differentiated(key: tuple[str, Role]) -> tuple[Slope, ...]:
            slopes = Slopes(self._merger, job.plan)
            self._backward.run(key, job.differentiate[key], slopes.take)
            return slopes.values()

        return {
            key[0]: run_halving(partial(differentiated, key), self._backward.shrink, events.append)
            for key in job.differentiate
        }

    def weights(self, plan: MergePlan) -> Iterable[tuple[str, Any]]:
        """The canonical weights of a plan as (checkpoint name, tensor)."""
        return self._merger.tensors(plan)

    def _synchronize(self) -> None:
        """Seconds are of finished work: a GPU works on while Python goes ahead."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def resolve_device(device: str) -> str:
    """`auto`: the first GPU where there is one.

    Raises:
        EvaluationError: a device that torch does not know or this machine does not have.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise EvaluationError(f"device {device!r}: expected auto, cpu, cuda or cuda:N") from None
    if wanted.type == "cuda" and (
        not torch.cuda.is_available() or (wanted.index or 0) >= torch.cuda.device_count()
    ):
        raise EvaluationError(
            f"device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    return device


def plan_tasks(lock: Lock, evaluation: EvaluationSpec, lm: Any) -> Mapping[tuple[str, Role], Any]:
    """Requests of all roles of all locked tasks; roles that share a split share one build."""
    from shoal.evals.requests import PromptSpec, build_requests
    from shoal.evals.scorer import PlannedTask

    prompts = PromptSpec(
        fewshot_seed=lock.seeds.fewshot,
        system_instruction=evaluation.system_instruction,
        apply_chat_template=evaluation.apply_chat_template,
        fewshot_as_multiturn=evaluation.fewshot_as_multiturn,
        chat_template=lm.apply_chat_template,
        tokenizer_name=lm.tokenizer_name,
    )
    planned: dict[tuple[str, Role], PlannedTask] = {}
    for task in lock.tasks:
        by_split: dict[tuple[str, str], list[Role]] = {}
        for role in ROLES:
            by_split.setdefault((task.roles[role].task, task.roles[role].split), []).append(role)
        for (name, split), roles in by_split.items():
            source = open_catalogue(None if lock.include_path is None else Path(lock.include_path)).load(name)
            source.set_fewshot(task.num_fewshot)
            if evaluation.gen_kwargs and source.output_type == "generate_until":
                source.task.set_config(
                    key="generation_kwargs", value=dict(evaluation.gen_kwargs), update=True
                )
            _restore_fewshot(source, task)
            hashes = {i: h for role in roles for i, h in _items(task.roles[role])}
            requests = build_requests(source, split, hashes, prompts, hashes)
            for role in roles:
                planned[task.task, role] = PlannedTask(
                    source, {i: requests[i] for i in task.roles[role].items}
                )
    return planned


def _items(role: RoleLock) -> Iterable[tuple[int, str]]:
    return zip(role.items, role.hashes, strict=True)


def _restore_fewshot(source: Any, task: TaskLock) -> None:
    """Few-shot examples only from the items that the lock sets aside, where it names some."""
    from shoal.evals.catalogue import doc_hash

    if task.fewshot_hashes is None:
        return
    wanted = set(task.fewshot_hashes)
    kept = [doc for doc in source.fewshot_docs() if doc_hash(doc) in wanted]
    if len(kept) <= task.num_fewshot:
        raise EvaluationError(
            f"task {source.name!r}: {len(kept)} of the few-shot examples that the lock sets aside are there,"
            f" {task.num_fewshot} are needed: the data set has changed"
        )
    source.replace_fewshot_docs(kept)


def describe_error(error: BaseException) -> str:
    """One line for the journal: our own errors as they are, others with their type."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    return text if isinstance(error, ShoalError) else f"{type(error).__name__}: {text}"
