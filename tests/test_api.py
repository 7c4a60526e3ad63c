"""The public API: every name is there, light to import, and does what the command does."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runs

import shoal
from shoal.errors import RunError

NAMES = ("load_recipe", "evolve", "load_run", "merge", "score", "publish", "download", "reproduce")


@pytest.mark.parametrize("first", ["", "import shoal.merge.resident, shoal.score, shoal.hub.upload"])
def test_names_are_functions_whatever_was_imported_before(first: str) -> None:
    code = f"{first}\nimport shoal\nprint([n for n in {NAMES} if not callable(getattr(shoal, n))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert set(NAMES) <= set(shoal.__all__) and set(NAMES) <= set(dir(shoal))


def test_the_import_is_light() -> None:
    code = (
        "import sys, shoal; print([m for m in ('torch', 'pydantic', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_from_recipe_to_model(pico: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = shoal.evolve(runs.recipe(pico), tmp_path / "run", device="cpu")
    assert capsys.readouterr().out == ""  # bars are for notebooks
    run = shoal.load_run(tmp_path / "run")
    assert run.result == result and run.recipe.name == "pico" and run.lock.dtype == "float32"
    assert run.winner.models == ("base", "left", "right")
    assert (shoal.merge(tmp_path / "run", tmp_path / "model") / "config.json").is_file()
    scores = shoal.score(
        str(tmp_path / "model"),
        ["pico_next"],
        include_path=pico.tasks,
        limit=4,
        device="cpu",
        bootstrap_iters=0,
    )
    assert scores.rows
    with pytest.raises(RunError):
        shoal.load_run(tmp_path / "model")
    with pytest.raises(RunError, match="expected the folder of a run or a mergekit YAML"):
        shoal.merge(tmp_path / "none", tmp_path / "other")


@pytest.fixture(scope="module")
def looked(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run whose winner is a merge."""
    folder = tmp_path_factory.mktemp("looked") / "run"
    changes = {"search": {"budget": 12, "popsize": 4, "items": 16, "seed": 2}}
    space = {"shape": "uniform", "bounds": {"weight": [-1, 2]}}
    shoal.evolve(runs.recipe(pico, space=space, **changes), folder, device="cpu")
    run = shoal.load_run(folder)
    assert "@" in run.winner_id  # a merge, else another seed
    return run


def test_the_weights_of_a_run_are_those_of_its_plan(looked: Any) -> None:
    assert {(shown.parameter, shown.model) for shown in looked.weights} == {
        ("weight", "left"),
        ("weight", "right"),
    }
    for shown in looked.weights:
        source = next(
            s
            for group in looked.winner.groups
            if group.name == "layers.1.attn"
            for s in group.sources
            if looked.winner.models[s.model] == shown.model
        )
        assert shown.values[shown.types.index("attn")][1] == source.parameters["weight"]
    parent = {"id": looked.best_parent}
    itself = dataclasses.replace(looked, result=looked.result | {"winner": parent})
    assert itself.weights == ()


def test_the_scores_of_a_run_give_the_scores_of_its_result(looked: Any) -> None:
    for entry in [looked.result["winner"] | {"name": None}, *looked.result["baselines"]]:
        values: dict[str, list[float]] = {}
        for score in looked.scores(entry["name"]):
            values.setdefault(score.task, []).append(score.metrics[looked.lock.task(score.task).metric])
        means = {task: sum(found) / len(found) for task, found in values.items()}
        assert means == pytest.approx(entry["tasks"])
    with pytest.raises(RunError, match=r"no role 'tests'; did you mean 'test'\?"):
        looked.scores(role="tests")
    with pytest.raises(RunError, match="'lefd' was not scored on test items; did you mean 'left'"):
        looked.scores("lefd")
    bred = next(entry.id for entry in looked.front().entries if entry.kind == "search")
    with pytest.raises(RunError, match=f"'{bred}' was not scored on test items"):
        looked.scores(bred)
    assert looked.scores(bred, "search")


def test_the_changes_of_a_run_add_up_to_the_lead_of_its_winner(looked: Any) -> None:
    names = [entry["name"] for entry in looked.result["baselines"]]
    for name in names:
        leads = {
            c["task"]: c["difference"]
            for c in looked.result["comparisons"]
            if c["against"] == name and "task" in c
        }
        for change in looked.changes(name, texts=False):
            items = change.won + change.gone + change.same_right + change.same_wrong
            assert change.binary and items == len(looked.lock.task(change.task).roles["test"].items)
            assert (change.won - change.gone) / items == pytest.approx(leads[change.task])
            assert all(found.text is None for found in (*change.gained, *change.lost))
    assert looked.changes() == looked.changes(looked.best_parent)
    scores = {
        entry["name"]: entry["score"] for entry in looked.result["baselines"] if entry["kind"] == "parent"
    }
    assert scores[looked.best_parent] == max(scores.values())
    texts = [found.text for change in looked.changes() for found in (*change.gained, *change.lost)]
    assert texts and all(text.prompt.endswith(":") for text in texts)
    with pytest.raises(RunError, match="no parent 'upleft'; did you mean 'left'"):
        looked.changes("upleft")


def test_the_front_of_a_run_is_over_all_of_its_tasks_or_some(looked: Any) -> None:
    assert looked.front().tasks == ("pico_choice", "pico_next")
    assert looked.front("pico_next", "pico_choice").tasks == ("pico_next", "pico_choice")
    assert {entry.id for entry in looked.front(role="test").entries} >= {looked.winner_id, "left", "right"}
    with pytest.raises(RunError, match="at least two different tasks"):
        looked.front("pico_next")


def test_a_run_without_its_journal_says_so(looked: Any, tmp_path: Path) -> None:
    for path in looked.folder.iterdir():
        if path.is_file() and not path.name.startswith("journal"):
            shutil.copy(path, tmp_path)
    shutil.copytree(looked.folder / "best", tmp_path / "best")
    alone = shoal.load_run(tmp_path)
    assert alone.weights == looked.weights
    with pytest.raises(RunError, match=r"journal\.sqlite: not there"):
        alone.changes()
    assert not (tmp_path / "journal.sqlite").exists()
