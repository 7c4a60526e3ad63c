"""The tiny zoo as users meet it: the quickstart recipe on fewer items, killed and continued."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.usefixtures("small_zoo")


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
