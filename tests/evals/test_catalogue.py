"""Groups and tags stand for the tasks that lm-eval would load, in its order; what cannot be loaded is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import EvaluationError, RecipeError
from shoal.evals.catalogue import Catalogue

GROUPS: dict[str, Any] = {
    "both": {
        "task": ["pico_write", {"task": "pico_choice", "task_alias": "choice"}],
        "group_alias": "both of them",
    },
    "nested": {
        "task": [{"group": "first", "task": ["spoken"]}, "both"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}],
    },
    "shots": {"task": ["pico_choice", {"task": "pico_next", "num_fewshot": 3}]},
    "everywhere": {"task": ["pico_next", "spoken"], "output_type": "loglikelihood"},
    "unnamed": {"task": [{"task": "written_here", "dataset_path": "json"}]},
    "far": {"task": ["pico_choice", "arc_easy"]},
    "half": {"task": ["pico_choice", "gone"]},
}


@pytest.fixture(scope="module")
def tasks(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico tasks, two more with the tag `spoken`, groups, and a task whose data set does not exist."""
    folder = tmp_path_factory.mktemp("grouped") / "tasks"
    shutil.copytree(pico.tasks, folder)
    for name in ("pico_b", "pico_a"):
        task = json.loads((folder / "pico_next.yaml").read_text()) | {"task": name, "tag": "spoken"}
        (folder / f"{name}.yaml").write_text(json.dumps(task))
    gone = json.loads((folder / "pico_next.yaml").read_text())
    gone |= {"task": "gone", "dataset_path": "nobody/nothing", "dataset_name": "part", "dataset_kwargs": {}}
    (folder / "gone.yaml").write_text(json.dumps(gone))
    for name, group in GROUPS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"group": name, **group}))
    return folder


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["pico_next"], ["pico_next"]),
        (["spoken"], ["pico_a", "pico_b"]),
        (["both"], ["pico_write", "pico_choice"]),
        (["nested"], ["pico_a", "pico_b", "pico_write", "pico_choice"]),
        (["pico_next", "both", "pico_choice"], ["pico_next", "pico_write", "pico_choice"]),
    ],
)
def test_names_stand_for_single_tasks_in_lm_evals_order(
    tasks: Path, names: list[str], expected: list[str]
) -> None:
    from lm_eval.tasks import TaskManager

    assert Catalogue(tasks).expand(names) == expected
    if len(names) == 1:
        loaded = TaskManager(include_path=str(tasks), include_defaults=False).load(names)
        assert list(loaded["tasks"]) == expected


def test_a_group_that_scores_its_tasks_otherwise_is_refused(tasks: Path) -> None:
    catalogue = Catalogue(tasks)
    with pytest.raises(
        RecipeError, match="task 'shots': this group of lm-eval sets num_fewshot of 'pico_next'"
    ):
        catalogue.expand(["shots"])
    with pytest.raises(RecipeError, match="sets output_type of 'pico_next'"):
        catalogue.expand(["everywhere"])
    with pytest.raises(RecipeError, match="holds, without a name of its own, 'written_here'"):
        catalogue.expand(["unnamed"])


def test_objects_are_lm_evals_with_its_groups(tasks: Path) -> None:
    objects = Catalogue(tasks).objects(["nested", "pico_next"])
    assert [type(item).__name__ for item in objects] == ["Group", "ConfigurableTask"]
    assert [task.task_name for task in objects[0].get_all_tasks()] == [
        "pico_a",
        "pico_b",
        "pico_write",
        "pico_choice",
    ]
    (changed,) = Catalogue(tasks).objects(["shots"])
    assert changed.get("pico_next").config.num_fewshot == 3


def test_a_single_task_is_wanted_where_one_is_named(tasks: Path) -> None:
    with pytest.raises(RecipeError, match=r"group or tag .* name a single task here: pico_a, pico_b"):
        Catalogue(tasks).load("spoken")


def test_lm_evals_own_tasks(tasks: Path) -> None:
    catalogue = Catalogue(tasks)
    assert catalogue.expand(["far"]) == [
        "pico_choice",
        "arc_easy",
    ]  # a group of one's own with a task of lm-eval's
    mmlu = catalogue.expand(["mmlu"])
    assert len(mmlu) == 57 and mmlu[0].startswith("mmlu_") and len(set(mmlu)) == 57
    assert catalogue.expand(["pico_[ab]"]) == ["pico_a", "pico_b"]
    with pytest.raises(RecipeError, match="'arc_eazy': lm-eval knows no such task; did you mean 'arc_easy'"):
        catalogue.expand(["arc_eazy"])
    with pytest.raises(RecipeError, match=r"'pico_\?\?\?\?\?\?\?\?\?': lm-eval knows no task that matches"):
        catalogue.expand(["pico_?????????"])


def test_a_data_set_that_cannot_be_loaded_is_named(tasks: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from shoal.errors import EvaluationError\n"
        "from shoal.evals.catalogue import Catalogue\n"
        "for call in ('load', 'objects'):\n"
        "    try:\n"
        "        getattr(Catalogue(Path(sys.argv[1])), call)(*{'load': ['gone'], 'objects': [['half']]}[call])\n"
        "    except EvaluationError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tasks)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "task 'gone': its data set nobody/nothing (part) cannot be loaded" in line
        assert "HF_HUB_OFFLINE=1" in line and "include path" in line


def test_local_data_that_is_missing(pico: Any, tmp_path: Path) -> None:
    task = json.loads((pico.tasks / "pico_next.yaml").read_text())
    task["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "missing.jsonl")
    (tmp_path / "pico_next.yaml").write_text(json.dumps(task))
    shutil.copy(pico.tasks / "pico_choice.yaml", tmp_path)
    (tmp_path / "all.yaml").write_text(json.dumps({"group": "all", "task": ["pico_choice", "pico_next"]}))
    with pytest.raises(
        EvaluationError, match=r"task 'pico_next': its data set json cannot be loaded .*missing\.jsonl"
    ):
        Catalogue(tmp_path).load("pico_next")
    with pytest.raises(EvaluationError, match="task 'pico_next': its data set json cannot be loaded"):
        Catalogue(tmp_path).objects(["all"])
