"""Structured results are written for a complete official split that the search did not meet, and for nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal.folder import RunFolder
from shoal.hub.published import PublishedTask
from shoal.hub.structured import benchmark_task, complete, eval_results
from shoal.lock import Lock, TaskLock
from shoal.recipe import Recipe

EVAL_YAML = """
name: Pico
evaluation_framework: lm-eval
tasks:
  - {id: pico_validation, config: default, split: validation}
  - {id: pico, config: default, split: test}
  - {id: pico_de, config: de, split: test}
"""


@pytest.fixture
def run(hub_run: Path) -> tuple[Recipe, Lock]:
    return RunFolder(hub_run).open()


def changed(lock: Lock, **update: Any) -> TaskLock:
    return lock.tasks[0].model_copy(update=update)


def test_a_complete_official_split_counts(run: tuple[Recipe, Lock]) -> None:
    recipe, lock = run
    assert len(lock.tasks[0].roles["test"].items) == 120
    assert complete(lock, lock.tasks[0], recipe, 120) is None


def test_what_does_not_count(run: tuple[Recipe, Lock]) -> None:
    recipe, lock = run
    task = lock.tasks[0]
    assert "120 of 121 items" in str(complete(lock, task, recipe, 121))
    searched = changed(lock, search_on_eval_split=True)
    assert "used in the search" in str(complete(lock, searched, recipe, 120))
    elsewhere = {**task.roles, "test": task.roles["test"].model_copy(update={"split": "validation"})}
    assert "officially scored is" in str(complete(lock, changed(lock, roles=elsewhere), recipe, 120))
    first = task.roles["test"].hashes[0]
    assert "few-shot" in str(complete(lock, changed(lock, fewshot_hashes=(first,)), recipe, 120))
    # the same question in another task's search items
    other = lock.tasks[1]
    search = other.roles["search"].model_copy(update={"hashes": (first, *other.roles["search"].hashes[1:])})
    met = other.model_copy(update={"roles": {**other.roles, "search": search}})
    both = lock.model_copy(update={"tasks": (task, met)})
    assert "used in the search" in str(complete(both, task, recipe, 120))
    told = recipe.evaluation.model_copy(update={"system_instruction": "Be right."})
    assert "changes the task's prompts" in str(
        complete(lock, task, recipe.model_copy(update={"evaluation": told}), 120)
    )


def test_the_benchmarks_own_name_of_the_task_is_used() -> None:
    assert benchmark_task(EVAL_YAML, None, "test", "x") == "pico"
    assert benchmark_task(EVAL_YAML, "de", "test", "x") == "pico_de"
    assert benchmark_task(EVAL_YAML, "fr", "test", "x") is None
    for hostile in ("a: &x [1]\nb: *x", "tasks: 3", "- 1", "tasks: [1, {id: 2}]", "{"):
        assert benchmark_task(hostile, None, "test", "x") is None


def results(run: tuple[Recipe, Lock], **task: Any) -> tuple[dict[str, str], list[str]]:
    recipe, lock = run
    found = {t.task: PublishedTask(task=t.task, custom=True) for t in lock.tasks}
    found["pico_choice"] = PublishedTask(
        **{"task": "pico_choice", "custom": False, "dataset": "ann/pico"} | task
    )
    scores, sizes = {"pico_choice": 0.625, "pico_next": 0.5}, {"pico_choice": 120, "pico_next": 120}
    return eval_results(
        recipe, lock, found, scores, sizes, "ann/fish", lambda name: EVAL_YAML if name == "ann/pico" else None
    )


def test_a_result_is_in_the_hubs_form(run: tuple[Recipe, Lock]) -> None:
    from huggingface_hub import parse_eval_result_entries

    files, without = results(run)
    assert list(files) == [".eval_results/pico_choice.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/pico_choice.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("ann/pico", "pico", 62.5)
    assert entry.source_url == "https://huggingface.co/ann/fish" and entry.verify_token is None
    assert entry.notes is not None and "0-shot, acc,none" in entry.notes
    assert without == ["pico_next: not a data set of the Hub"]


def test_no_result_without_a_benchmark(run: tuple[Recipe, Lock]) -> None:
    for change in ({"dataset": "ann/other"}, {"dataset_name": "fr"}, {"custom": True}, {"dataset": None}):
        files, without = results(run, **change)
        assert files == {} and len(without) == 2
