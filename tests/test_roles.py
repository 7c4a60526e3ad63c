"""Roles: disjoint, a function of content only, and a benchmark's items in the search only when allowed by name."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal.errors import EvaluationError, RecipeError
from shoal.evals.catalogue import Catalogue
from shoal.lock import TaskLock
from shoal.recipe import Recipe, parse_recipe
from shoal.roles import lock_tasks


def recipe(pico: Any, *tasks: dict[str, Any], **changes: Any) -> Recipe:
    return parse_recipe(yaml.safe_dump(pico.recipe(tasks=list(tasks), **changes)))


def locked(pico: Any, *tasks: dict[str, Any], **changes: Any) -> tuple[TaskLock, ...]:
    return lock_tasks(recipe(pico, *tasks, **changes), Catalogue(pico.tasks))


def test_search_and_select_come_from_validation_and_test_from_the_test_split(pico: Any) -> None:
    (task,) = locked(pico, {"task": "pico_choice"})
    assert {role: lock.split for role, lock in task.roles.items()} == {
        "search": "validation",
        "select": "validation",
        "test": "test",
    }
    assert len(task.roles["test"].items) == 120
    assert not set(task.roles["search"].items) & set(task.roles["select"].items)
    assert not task.search_on_eval_split


def test_roles_do_not_depend_on_the_seed_and_sizes_nest(pico: Any) -> None:
    (plain,) = locked(pico, {"task": "pico_choice"})
    (other,) = locked(pico, {"task": "pico_choice"}, search={"budget": 99, "seed": 7})
    assert plain == other
    (small,) = locked(pico, {"task": "pico_choice", "search": {"size": 10}, "test": {"size": 20}})
    assert set(small.roles["search"].items) < set(plain.roles["search"].items)
    assert set(small.roles["test"].items) < set(plain.roles["test"].items)
    assert small.roles["select"] == plain.roles["select"]


def test_a_split_that_lm_eval_scores_is_searched_only_when_allowed(pico: Any) -> None:
    wanted = {"task": "pico_choice", "search": {"split": "test"}, "select": {"split": "test"}}
    with pytest.raises(RecipeError, match="search_on_eval_split: true"):
        locked(pico, wanted)
    (task,) = locked(pico, wanted | {"search_on_eval_split": True})
    assert task.search_on_eval_split
    sets = [set(lock.items) for lock in task.roles.values()]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert all(sets)


def test_another_task_can_be_searched_on_than_tested(pico: Any) -> None:
    (task,) = locked(pico, {"task": "pico_choice", "search": {"task": "pico_next", "split": "train"}})
    assert (task.roles["search"].task, task.roles["search"].split) == ("pico_next", "train")
    assert (task.roles["test"].task, task.roles["test"].split) == ("pico_choice", "test")
    with pytest.raises(RecipeError, match="search items would come from 'pico_next' split 'test'"):
        locked(pico, {"task": "pico_choice", "search": {"task": "pico_next", "split": "test"}})


def test_few_shot_examples_are_disjoint_from_every_role(pico: Any) -> None:
    (own,) = locked(pico, {"task": "pico_choice", "num_fewshot": 2})
    assert own.fewshot_hashes is None  # lm-eval draws them from the training split, which no role uses
    (shared,) = locked(
        pico,
        {"task": "pico_choice", "num_fewshot": 2, "search": {"split": "train"}, "select": {"split": "train"}},
    )
    assert shared.fewshot_hashes
    used = {h for lock in shared.roles.values() for h in lock.hashes}
    assert not used & set(shared.fewshot_hashes)
    with pytest.raises(EvaluationError, match="num_fewshot 60 needs more"):
        locked(pico, {"task": "pico_choice", "num_fewshot": 60, "search": {"split": "train"}})


def test_items_of_a_cluster_have_one_role(pico: Any) -> None:
    (task,) = locked(
        pico,
        {
            "task": "pico_choice",
            "cluster": "kind",
            "search": {"split": "test"},
            "select": {"split": "test"},
            "search_on_eval_split": True,
        },
    )
    labels = [set(lock.clusters) for lock in task.roles.values()]
    assert not (labels[0] & labels[1] or labels[0] & labels[2] or labels[1] & labels[2])
    assert len(labels[2]) < len(task.roles["test"].items)
    with pytest.raises(RecipeError, match="cluster names the field 'author'; its items have word, answer"):
        locked(pico, {"task": "pico_choice", "cluster": "author"})


def test_an_item_that_is_tested_is_in_no_other_role_of_any_task(pico: Any, tmp_path: Path) -> None:
    rows = (pico.tasks / "test.jsonl").read_text().splitlines()
    own = [json.dumps(json.loads(row) | {"word": "h" + json.loads(row)["word"]}) for row in rows[:40]]
    (tmp_path / "both.jsonl").write_text("\n".join(rows[:60] + own) + "\n")
    task = json.loads((pico.tasks / "pico_next.yaml").read_text())
    task["task"] = "leaky"
    task["dataset_kwargs"]["data_files"]["validation"] = str(tmp_path / "both.jsonl")
    (tmp_path / "leaky.yaml").write_text(json.dumps(task))
    found = lock_tasks(recipe(pico, {"task": "leaky"}), Catalogue(tmp_path))
    tested = set(found[0].roles["test"].hashes)
    assert len(tested) == 120
    for role in ("search", "select"):
        assert found[0].roles[role].hashes  # type: ignore[index]
        assert not tested & set(found[0].roles[role].hashes)  # type: ignore[index]


def test_search_and_select_share_nothing_even_across_tasks(pico: Any) -> None:
    (task,) = locked(pico, {"task": "pico_choice", "search": {"task": "pico_next", "split": "validation"}})
    assert not set(task.roles["search"].hashes) & set(task.roles["select"].hashes)
    two = locked(pico, {"task": "pico_choice"}, {"task": "pico_next", "search": {"split": "train"}})
    searched = {h for t in two for h in t.roles["search"].hashes}
    assert not searched & {h for t in two for h in t.roles["select"].hashes}


def test_few_shot_examples_of_another_search_task_are_set_aside_too(pico: Any) -> None:
    (task,) = locked(
        pico, {"task": "pico_choice", "num_fewshot": 2, "search": {"task": "pico_next", "split": "train"}}
    )
    assert task.fewshot_hashes and not set(task.fewshot_hashes) & set(task.roles["search"].hashes)


def test_more_items_than_there_are_is_an_error(pico: Any) -> None:
    with pytest.raises(RecipeError, match=r"test\.size is 500, split 'test' of 'pico_choice' has 120 items"):
        locked(pico, {"task": "pico_choice", "test": {"size": 500}})


def test_a_group_stands_for_its_tasks_with_its_settings_and_its_weight(pico: Any, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    shutil.copytree(pico.tasks, folder)
    (folder / "both.yaml").write_text(json.dumps({"group": "both", "task": ["pico_next", "pico_choice"]}))

    def lock(*tasks: dict[str, Any]) -> tuple[TaskLock, ...]:
        return lock_tasks(recipe(pico, *(copy.deepcopy(task) for task in tasks)), Catalogue(folder))

    settings: dict[str, Any] = {"metric": "acc", "num_fewshot": 1, "test": {"size": 50}}
    grouped = lock({"task": "both", "weight": 3.0, **settings}, {"task": "pico_write"})
    assert [(task.task, task.weight) for task in grouped] == [
        ("pico_next", 1.5),
        ("pico_choice", 1.5),
        ("pico_write", 1.0),
    ]
    single = lock(
        {"task": "pico_next", "weight": 1.5, **settings},
        {"task": "pico_choice", "weight": 1.5, **settings},
        {"task": "pico_write"},
    )
    assert grouped == single
    with pytest.raises(RecipeError, match="task 'pico_choice' is named twice, here by 'both'"):
        lock({"task": "pico_choice"}, {"task": "both"})
    with pytest.raises(
        RecipeError, match="task 'both' is a group or tag of lm-eval; name a single task here"
    ):
        lock({"task": "pico_write", "search": {"task": "both"}})
