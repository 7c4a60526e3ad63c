"""`reproduce`, and the way of a merge from one user to another: publish, download, reproduce through a local Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
from hub.client import Client, point_client
from hub.local_hub import LocalHub
from hub.publications import REPO, Made
from typer.testing import CliRunner

from shoal.cli import app
from shoal.errors import PublishError, ShoalError
from shoal.hub import weights
from shoal.hub.compare import compare
from shoal.hub.publish import dry_run
from shoal.hub.published import load_published
from shoal.hub.reproduce import Reproduction, reproduce
from shoal.hub.score_file import read_scores
from shoal.run import evolve
from shoal.types import ItemScore


def shoal(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def scored(made: Made, source: str | Path = REPO) -> Reproduction:
    return reproduce(source, score=True, include_path=made.pico.tasks, device="cpu")


def check(found: Reproduction, what: str) -> Any:
    return next(one for one in found.checks if one.what == what)


@pytest.mark.parametrize("kind", ["--recipe-only", "--weights"])
def test_from_run_to_reproduced(
    hub: LocalHub, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Published by one command, downloaded into an empty cache, rebuilt and scored: the same bytes, nothing flipped."""
    made.add_parents(hub)
    done = shoal("publish", str(made.run), REPO, kind, "--yes")
    assert done.exit_code == 0, done.output
    repo = hub.store.repos[REPO]
    assert [c.title.split()[0] for c in repo.history()] == ["Publish", "initial"]
    lock = load_published(made.recipe / "lock.yaml")
    # somebody else: nothing in the cache, no token
    point_client(hub, tmp_path / "fresh", monkeypatch)
    monkeypatch.delenv("HF_TOKEN")
    done = shoal("download", REPO, "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert weights.sha256(tmp_path / "out") == lock.winner.weights_sha256
    point_client(hub, tmp_path / "fresher", monkeypatch)
    done = shoal("reproduce", REPO, "--score", "--include-path", str(made.pico.tasks), "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "reproduced: weights and scores agree" in done.stdout and "NO" not in done.stdout
    found = scored(made)
    assert found.agrees and check(found, "weights_sha256").agrees
    assert {(row.task, row.role) for row in found.scores} == {
        (task, role) for task in ("pico_choice", "pico_next") for role in ("select", "test")
    }
    for row in found.scores:
        assert row.items > 0 and row.flips == 0 and row.largest is not None and row.largest < 1e-4
    assert any(c.what == "published weights" for c in found.checks) is (kind == "--weights")


def test_a_downloaded_folder_and_its_lock(hub: LocalHub, made: Made) -> None:
    made.add_parents(hub)
    for source in (made.recipe, made.recipe / "lock.yaml"):
        found = reproduce(source)
        assert found.agrees and found.device is None and not found.scores
    assert "its scores: --score" in shoal("reproduce", str(made.weights)).stdout


def test_scores_that_differ_are_told(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    """One item claimed otherwise, one log-likelihood moved: exit code 1, and the table says which."""
    import pyarrow
    import pyarrow.parquet

    made.add_parents(hub)
    folder = tmp_path / "publication"
    shutil.copytree(made.recipe, folder)
    path = folder / "journal" / "scores.parquet"
    table = pyarrow.parquet.read_table(path)
    rows = table.to_pylist()
    winner = load_published(folder / "lock.yaml").winner.id
    mine = [row for row in rows if row["candidate"] == winner and row["role"] == "test"]
    flipped = next(row for row in mine if row["task"] == "pico_choice")
    flipped["metrics"] = json.dumps({k: 1.0 - v for k, v in json.loads(flipped["metrics"]).items()})
    moved = next(row for row in mine if row["task"] == "pico_next")
    moved["logliks"] = [moved["logliks"][0] - 0.5]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, table.schema), path)
    found = scored(made, folder)
    wrong = {c.what for c in found.checks if not c.agrees}
    assert wrong == {"flips pico_choice test", "log-likelihood pico_next test"}
    assert check(found, "flips pico_choice test").found.startswith("1 of")
    done = shoal(
        "reproduce", str(folder), "--score", "--include-path", str(made.pico.tasks), "--device", "cpu"
    )
    assert done.exit_code == 1 and "not reproduced: flips pico_choice test" in done.stdout


def test_what_may_flip_on_another_kind_of_device(made: Made) -> None:
    lock = load_published(made.recipe / "lock.yaml")
    published = read_scores(made.recipe, lock)
    metrics = {task.task: task.metric for task in lock.run.tasks}
    measured = [
        ItemScore(task, role, item, {metrics[task]: one.value}, logliks=one.logliks)
        for (task, role), items in published.items()
        for item, one in items.items()
    ]
    assert all(row.flips == 0 and row.agrees for row in compare(published, measured, lock, same_device=True))
    first = next(i for i, one in enumerate(measured) if one.role == "test")
    key = metrics[measured[first].task]
    measured[first] = ItemScore(
        measured[first].task,
        "test",
        measured[first].item,
        {key: 1 - measured[first].metrics[key]},
        logliks=measured[first].logliks,
    )
    wide = lock.model_copy(
        update={"tolerance": lock.tolerance.model_copy(update={"other_kind": 0.5, "same_kind": 0.5})}
    )
    (row,) = [r for r in compare(published, measured, wide, same_device=True) if r.flips]
    assert not row.agrees  # whatever the lock says
    (row,) = [r for r in compare(published, measured, wide, same_device=False) if r.flips]
    assert row.agrees and row.flips == 1


def test_custom_tasks_must_be_supplied(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    made.add(hub)
    done = shoal("reproduce", REPO, "--score", "--device", "cpu")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 + _said(done)
    assert "--include-path, or ask the author to publish with --include-item-text" in done.stderr
    other = tmp_path / "tasks"
    shutil.copytree(made.pico.tasks, other)
    for path in other.glob("*.yaml"):
        path.write_text(path.read_text().replace(str(made.pico.tasks), str(other)))
    text = (other / "test.jsonl").read_text()
    (other / "test.jsonl").write_text(text.replace('"word": "a', '"word": "b'))
    with pytest.raises(ShoalError, match="the data set has changed"):
        reproduce(REPO, score=True, include_path=other, device="cpu")
    with pytest.raises(PublishError, match="no such folder"):
        reproduce(REPO, score=True, include_path=tmp_path / "none")


def _said(done: Any) -> int:
    """Lines of progress before the error."""
    return sum(1 for line in done.stderr.splitlines() if not line.startswith("error: "))


def test_other_prompts_are_told(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    """The same items, asked otherwise: the requests' hashes differ."""
    made.add_parents(hub)
    tasks = tmp_path / "tasks"
    shutil.copytree(made.pico.tasks, tasks)
    path = tasks / "pico_choice.yaml"
    path.write_text(path.read_text().replace("{{word}}:", "{{word}}="))
    found = reproduce(made.recipe, score=True, include_path=tasks, device="cpu")
    assert not check(found, "requests pico_choice test").agrees and not found.agrees
    assert check(found, "requests pico_next test").agrees


def test_another_merge_is_told(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    """A lock whose hash is of something else: exit code 1; parents that are folders: an error."""
    made.add_parents(hub)
    folder = tmp_path / "publication"
    shutil.copytree(made.recipe, folder)
    lock = load_published(folder / "lock.yaml")
    for name in ("lock.yaml", "result.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace(lock.winner.weights_sha256, "f" * 64))
    assert not check(reproduce(folder), "weights_sha256").agrees
    assert shoal("reproduce", str(folder)).exit_code == 1


def test_weights_whose_parents_nobody_has(pico: Any, tmp_path: Path) -> None:
    """They are compared with their hash and scored as they are, and it is said that they were not rebuilt."""
    evolve(runs.recipe(pico, name="own", search={"budget": 4, "popsize": 4}), tmp_path / "run", device="cpu")
    folder = tmp_path / "publication"
    dry_run(tmp_path / "run", REPO, folder, weights=True, license="mit")
    command = ["reproduce", str(folder), "--include-path", str(pico.tasks), "--device", "cpu"]
    done = shoal(*command, "--score")
    assert done.exit_code == 0, done.output
    assert "scores agree; they were not rebuilt" in done.stdout and "weights_sha256" not in done.stdout
    assert "note: not rebuilt: its parents base, left, right are folders" in done.stdout
    found = reproduce(folder, score=True, include_path=pico.tasks, device="cpu")
    assert found.agrees and not found.rebuilt and {row.flips for row in found.scores} == {0}
    assert len(found.scores) == 4 and all(row.items > 0 for row in found.scores)
    assert "they were not rebuilt" in shoal(*command).stdout
    # its requests are rendered with the published tokenizer, its items scored with the published weights
    other = (pico.model("left") / "model.safetensors").read_bytes()
    kept = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(other)
    done = shoal(*command, "--score")
    assert done.exit_code == 1 and "not reproduced: published weights" in done.stdout
    (folder / "model.safetensors").write_bytes(kept)
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter_config.json" in shoal(*command, "--score").stderr


def test_offline_with_a_full_cache(hub: LocalHub, made: Made, client: Client) -> None:
    made.add_parents(hub)
    assert reproduce(made.recipe).agrees
    client.offline()
    assert reproduce(made.recipe).agrees
