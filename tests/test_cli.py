"""The shell: quick to answer, one line per error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

import shoal
from shoal.cli import app

HEAVY = ("torch", "transformers", "lm_eval", "mergekit", "cma", "matplotlib", "scipy")


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys, shoal.cli, shoal.merge; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version_and_help() -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).stdout.strip() == f"shoal {shoal.__version__}"
    text = runner.invoke(app, ["--help"]).stdout
    for command in (
        "quickstart",
        "evolve",
        "validate",
        "merge",
        "score",
        "lm-eval",
        "export",
        "import",
        "pareto",
        "zoo",
    ):
        assert command in text


def test_a_missing_recipe_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["evolve", str(tmp_path / "none.yaml")])
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path / 'none.yaml'}: no such recipe file\n"


def test_the_quickstart_recipe_is_found_in_the_package() -> None:
    assert (Path(shoal.__file__).parent / "recipes" / "quickstart.yaml").is_file()


def test_public_names_exist() -> None:
    assert all(hasattr(shoal, name) for name in shoal.__all__)
