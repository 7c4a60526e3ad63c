"""The public API: every name is there, light to import, and does what the command does."""

from __future__ import annotations

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


def test_a_run_from_recipe_to_model(pico: Any, tmp_path: Path) -> None:
    result = shoal.evolve(runs.recipe(pico), tmp_path / "run", device="cpu")
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
