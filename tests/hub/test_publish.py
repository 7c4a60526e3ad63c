"""`publish`: shown, asked, sent as one commit; and what is listed afterwards."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub.client import TOKEN
from hub.local_hub import LocalHub
from hub.publications import REPO, Made
from typer.testing import CliRunner

from shoal.cli import app
from shoal.errors import PublishError
from shoal.hub.publish import publish


def shoal(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def files(hub: LocalHub) -> dict[str, bytes]:
    found = hub.store.repos[REPO].commit().files
    return {path: blob.data for path, blob in found.items() if path != ".gitattributes"}


def left(made: Made) -> list[str]:
    folder = made.run / ".published"
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def test_a_dry_run_sends_nothing(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    done = shoal("publish", str(made.run), REPO, "--dry-run", str(tmp_path / "dry"))
    assert done.exit_code == 0, done.output
    assert "nothing was sent" in done.stdout and REPO not in hub.store.repos
    names = {p.relative_to(tmp_path / "dry").as_posix() for p in (tmp_path / "dry").rglob("*") if p.is_file()}
    assert names == set(made.files())
    assert all(name in done.stdout for name in names)
    assert "not published:" in done.stdout and "licence: mit" in done.stdout


def test_without_a_terminal_it_asks_nobody(hub: LocalHub, made: Made) -> None:
    done = shoal("publish", str(made.run), REPO)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and "--dry-run DIR" in done.stderr
    assert not hub.seen


@pytest.mark.parametrize(("answer", "status"), [(b"\n", 1), (b"y\n", 0)])
def test_on_a_terminal_it_asks(hub: LocalHub, made: Made, tmp_path: Path, answer: bytes, status: int) -> None:
    made.add_parents(hub)
    theirs, ours = pty.openpty()
    code = "from shoal.cli import main; main()"
    environment = {**os.environ, **hub.environment(tmp_path / "hf", TOKEN)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "publish", str(made.run), REPO, "--private"],
        stdin=ours,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    os.write(theirs, answer)
    out, error = process.communicate(timeout=120)
    os.close(theirs)
    os.close(ours)
    assert process.returncode == status, error
    text = out.decode()
    assert f"publish this as {REPO} (private)?" in text and "lock.yaml" in text
    assert ("nothing was published" in text) is bool(status)
    assert (REPO in hub.store.repos) is (status == 0)
    if status == 0:
        assert hub.store.repos[REPO].private and set(files(hub)) == set(made.files())
    assert left(made) == []


def test_an_upload_cut_five_times_is_one_commit(hub: LocalHub, made: Made, sleeps: list[float]) -> None:
    """With weights; every call is cut once, the next one goes on, and the last one commits."""
    made.add_parents(hub)
    for _ in range(5):
        hub.faults.clear()
        hub.fault("cut-request", "PUT /upload/", times=None, after=1)
        with pytest.raises(PublishError, match="the same command goes on"):
            publish(made.run, REPO, weights=True)
        assert [c.title for c in hub.store.repos[REPO].history()] == ["initial commit"]
        assert set(files(hub)) <= {"README.md"}
    hub.faults.clear()
    done = shoal("publish", str(made.run), REPO, "--weights", "--yes")
    assert done.exit_code == 0, done.output
    assert [c.title.split()[0] for c in hub.store.repos[REPO].history()] == ["Publish", "initial"]
    assert files(hub) == made.files(weights=True)
    assert left(made) == []


def test_a_lost_answer_is_looked_for(hub: LocalHub, made: Made, sleeps: list[float]) -> None:
    """The commit arrived, its answer did not, and the process ended: the repeated command finds it."""
    made.add_parents(hub)
    hub.fault("lose-response", "POST .*/commit/", times=None)
    hub.fault("status", "GET .*/commits/", status=503, times=None)
    with pytest.raises(PublishError):
        publish(made.run, REPO)
    hub.faults.clear()
    again = publish(made.run, REPO)
    repo = hub.store.repos[REPO]
    assert again is not None and again.commit == repo.commit().oid
    assert [c.title.split()[0] for c in repo.history()] == ["Publish", "initial"]


def test_published_again_it_is_the_same_commit(hub: LocalHub, made: Made) -> None:
    made.add_parents(hub)
    first, second = publish(made.run, REPO), publish(made.run, REPO)
    assert first is not None and second is not None and first.commit == second.commit


def test_no_run_no_repository(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    for run, repo in ((tmp_path, REPO), (made.run, "../up"), (made.run, "fish"), (made.run, "a/b/c")):
        done = shoal("publish", str(run), repo, "--yes", "-q")
        assert done.exit_code == 2 and done.stderr.count("\n") == 1, done.output
    assert not [s for s in hub.seen if s.method == "POST"]
    assert not (tmp_path / ".published").exists()


def test_the_list_shows_it(hub: LocalHub, made: Made) -> None:
    assert "none was found" in shoal("hub", "list").stdout
    made.add(hub)
    text = shoal("hub", "list").stdout
    assert REPO in text and "recipe" in text and "anna/left" in text
    assert "none was found" in shoal("hub", "list", "--author", "bert").stdout
