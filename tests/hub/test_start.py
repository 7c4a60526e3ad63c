"""`shoal evolve --from REPO`: a search that starts from a published winner, and keeps where it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hub.local_hub import LocalHub
from hub.publications import REPO, Made
from typer.testing import CliRunner

import shoal
from shoal.cli import app
from shoal.hub.publish import dry_run
from shoal.hub.published import load_published
from shoal.lock import load_lock


def test_a_descendant_starts_there_and_says_so(
    hub: LocalHub, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first genome is the published winner's, and its own publication names it, with its opening of the test items."""
    commit = made.add(hub).commit().oid
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work" / "tasks").symlink_to(made.pico.tasks)
    said: list[str] = []
    arguments: dict[str, Any] = {"start_from": f"{REPO}@{commit}", "device": "cpu"}
    result = shoal.evolve(None, tmp_path / "run", **arguments)
    lock = load_lock(tmp_path / "run" / "lock.yaml")
    winner = load_published(made.recipe / "lock.yaml").winner.merge_plan()
    weights = [source.parameters["weight"] for source in winner.groups[0].sources]
    assert list(lock.search.x0) == pytest.approx(weights, abs=1e-9)
    assert shoal.evolve(None, tmp_path / "run", **arguments) == result  # the same command goes on
    assert [opening.run for opening in lock.inherited] == ["fish"]
    assert "opened 2 times, 1 of them by runs that this one descends from" in result["claim"]
    published = dry_run(tmp_path / "run", "anna/grandchild", tmp_path / "dry", say=said.append)
    (ancestor,) = published.lock.lineage
    assert (ancestor.relation, ancestor.reference) == ("warm start", f"{REPO}@{commit}")
    assert [opening.run for opening in published.lock.openings] == ["fish", "fish"]
    assert f"{REPO}@{commit}" in (tmp_path / "dry" / "README.md").read_text()


def test_what_cannot_be_started_from(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    for arguments in ([], ["--from", REPO], ["--from", "none", "--run", "r"], ["--from", REPO, "--run", "r"]):
        done = CliRunner().invoke(app, ["evolve", *arguments, "-q"])
        assert done.exit_code == 2 and done.stderr.count("\n") == 1, done.output
