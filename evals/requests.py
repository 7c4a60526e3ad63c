"""Builds a task's requests once, over a whole split in data-set order, and keeps those that a run needs.

lm-eval draws few-shot examples from one random stream in data-set order, so building over the whole split is what
makes a subset's prompts equal to those of a full run (its `samples` and `limit` change draws and renumber items).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from shoal.errors import EvaluationError
from shoal.evals.catalogue import TaskSource, doc_hash
from shoal.evals.quiet import quiet_libraries
from shoal.evals.remember import compiled_once


@dataclass(frozen=True)
class PromptSpec:
    """How prompts are rendered: lm-eval's words. chat_template: renders messages to text, None without."""

    fewshot_seed: int = 1234
    system_instruction: str | None = None
    apply_chat_template: bool | str = False
    fewshot_as_multiturn: bool = False
    chat_template: Callable[..., str] | None = None
    tokenizer_name: str = ""


@dataclass(frozen=True)
class ItemRequests:
    """The requests of one item. gold: a log-likelihood request of the right answer, teacher-forced (generation)."""

    doc: dict[str, Any]
    instances: tuple[Any, ...]
    gold: Any | None


@compiled_once()
def build_requests(
    source: TaskSource,
    split: str,
    items: Iterable[int],
    prompts: PromptSpec,
    hashes: dict[int, str] | None = None,
) -> dict[int, ItemRequests]:
    """Requests of the given data-set indices of a split; built over the whole split, in order.

    hashes: expected doc_hash per item, as locked.

    Raises:
        EvaluationError: an item is not what the lock says, or is missing.
    """
    task = source.task
    task.set_fewshot_seed(seed=prompts.fewshot_seed)
    with source.on_split(split), quiet_libraries():
        task.build_all_requests(
            rank=0,
            world_size=1,
            cache_requests=False,
            system_instruction=prompts.system_instruction,
            apply_chat_template=bool(prompts.apply_chat_template),
            fewshot_as_multiturn=prompts.fewshot_as_multiturn,
            chat_template=prompts.chat_template if prompts.apply_chat_template else None,
            tokenizer_name=prompts.tokenizer_name if prompts.apply_chat_template else "",
        )
    by_item: dict[int, list[Any]] = defaultdict(list)
    for instance in task.instances:
        by_item[instance.doc_id].append(instance)
    task._instances = None
    built = {}
    for item in items:
        if item not in by_item:
            raise EvaluationError(
                f"task {source.name!r}, split {split!r}: item {item} does not exist; the split has {len(by_item)}"
                " items, fewer than when the run started: the data set has changed"
            )
        instances = sorted(by_item[item], key=lambda instance: int(instance.idx))
        doc = instances[0].doc
        if hashes is not None and doc_hash(doc) != hashes[item]:
            raise EvaluationError(
                f"task {source.name!r}, split {split!r}: item {item} is not the one that the lock names"
                f" (hash {doc_hash(doc)[:12]}, locked {hashes[item][:12]}): the data set has changed"
            )
        built[item] = ItemRequests(doc, tuple(instances), _gold_request(task, instances))
    return built


def fresh(instance: Any) -> Any:
    """A copy of a request without responses: lm-eval collects responses in the instance itself."""
    clone = copy.copy(instance)
    clone.resps, clone.filtered_resps = [], {}
    return clone


def _gold_request(task: Any, instances: list[Any]) -> Any | None:
    """For a generation item: the log-likelihood request of its (first) right answer, None where it has none."""
    instance = instances[0]
    if instance.request_type != "generate_until":
        return None
    target = task.doc_to_target(instance.doc)
    if isinstance(target, list):
        target = target[0] if target else None
    if isinstance(target, int) and task.config.doc_to_choice is not None:
        target = task.doc_to_choice(instance.doc)[target]
    if target is None or not str(target).strip():
        return None
    context = instance.args[0]
    delimiter = "" if context.endswith((" ", "\n")) else task.config.target_delimiter
    gold = fresh(instance)
    gold.request_type, gold.arguments, gold.repeats = "loglikelihood", (context, f"{delimiter}{target}"), 1
    return gold
