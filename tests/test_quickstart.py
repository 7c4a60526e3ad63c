"""The tiny zoo as users meet it: the quickstart recipe, killed and continued; the notebooks, executed."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of its own, unless the caller names one: the zoo is built once for this module."""
    import os

    with pytest.MonkeyPatch.context() as patch:
        if "SHOAL_CACHE" not in os.environ:
            patch.setenv("SHOAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_the_quickstart_survives_three_kills(tmp_path: Path) -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    recipe["search"] = {"budget": 22, "items": 16}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "resume.py"),
        str(tmp_path / "recipe.yaml"),
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert [kill["exit_code"] for kill in found["kills"]] == [-9, -9, -9]
    assert 0 < found["kills"][1]["after_evaluations"] < found["kills"][2]["after_evaluations"]
    assert all(row["identical"] and row["rows"] for row in found["rows"])
    lock = yaml.safe_load((tmp_path / "whole" / "lock.yaml").read_text())
    assert {model["origin"]["zoo"] for model in lock["models"]} == {"tiny"}
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    experts = {b["name"]: b["tasks"] for b in result["baselines"]}
    assert min(experts["reverse"]["tiny_reverse"], experts["sort"]["tiny_sort"]) > 0.9
    assert max(experts["sort"]["tiny_reverse"], experts["reverse"]["tiny_sort"]) < 0.3
    assert max(experts["base"]["tiny_reverse"], experts["base"]["tiny_sort"]) < 0.2


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.name)
def test_notebooks_run_and_are_committed_with_outputs(path: Path, tmp_path: Path) -> None:
    execute = runpy.run_path(str(ROOT / "notebooks" / "execute.py"))["execute"]
    committed = json.loads(path.read_text())
    code = [cell for cell in committed["cells"] if cell["cell_type"] == "code"]
    assert any(cell["outputs"] for cell in code), "run `make notebooks` and commit the result"
    notebook = execute(path, tmp_path)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
