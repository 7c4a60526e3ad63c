"""`upload` through a local Hub: one commit or none, whatever happens on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub.client import OTHER, TOKEN, Client
from hub.local_hub import LocalHub
from hub.store import Blob, Repo

from shoal.errors import PublishError
from shoal.hub import upload

CARD = "---\nlicense: mit\ntags: [shoal, merge]\nlibrary_name: transformers\n---\n# A merge\n"
SHARDS = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A publication with six large files and some small ones."""
    found = tmp_path / "publication"
    (found / "plots").mkdir(parents=True)
    (found / "README.md").write_text(CARD)
    (found / "lock.yaml").write_text("schema: 1\n")
    (found / "plots" / "weights.png").write_bytes(b"\x89PNG\0" + bytes(100))
    (found / "journal.parquet").write_bytes(b"PAR1\0" + bytes(50))
    for shard in range(SHARDS):
        (found / f"model-{shard}.safetensors").write_bytes(bytes([shard]) * 200_000)
    return found


def publish(folder: Path, repo: str = "anna/merge", private: bool = False) -> tuple[str, list[str]]:
    said: list[str] = []
    return upload(folder, repo, private=private, message="Publish a merge", say=said.append).commit, said


def failed(folder: Path, repo: str = "anna/merge", private: bool = False) -> str:
    with pytest.raises(PublishError) as caught:
        publish(folder, repo, private)
    text = str(caught.value)
    assert "\n" not in text and TOKEN not in text and OTHER not in text
    return text


def check_one_commit(repo: Repo, folder: Path, titles: tuple[str, ...] = ("initial commit",)) -> None:
    """Exactly one commit of ours on main, with exactly the folder's bytes."""
    assert [commit.title for commit in repo.history()] == ["Publish a merge", *titles]
    files = {path: blob.data for path, blob in repo.commit().files.items() if path != ".gitattributes"}
    ours = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    assert files == ours


def test_everything_in_one_commit(hub: LocalHub, folder: Path) -> None:
    hub.part_size = 60_000
    commit, said = publish(folder)
    repo = hub.store.repos["anna/merge"]
    check_one_commit(repo, folder)
    assert repo.commit().oid == commit and not repo.private
    assert hub.count("POST", "/commit/") == 1
    assert hub.count("POST", "/api/validate-yaml") == 2  # before anything is sent, and by the client itself
    assert any("model-0.safetensors (200 kB)" in line for line in said)
    assert not list(folder.parent.glob(".*"))


def test_the_same_again_changes_nothing(hub: LocalHub, folder: Path) -> None:
    first, _ = publish(folder)
    stored = len(hub.store.stored)
    assert publish(folder)[0] == first
    assert len(hub.store.stored) == stored
    check_one_commit(hub.store.repos["anna/merge"], folder)


def test_cut_five_times_it_goes_on_and_is_visible_once(
    hub: LocalHub, folder: Path, sleeps: list[float]
) -> None:
    for time in range(5):
        hub.fault("cut-request", "PUT /upload/", times=None, after=1 if time else 2)
        assert "the same command goes on where it stopped" in failed(folder)
        assert [commit.title for commit in hub.store.repos["anna/merge"].history()] == ["initial commit"]
        assert len(set(hub.store.stored)) == time + 2
        hub.faults.clear()
    publish(folder)
    check_one_commit(hub.store.repos["anna/merge"], folder)
    assert len(hub.store.stored) == len(set(hub.store.stored)) == SHARDS + 2
    assert len(sleeps) == 25  # the client tried each five times more
    assert not list(folder.parent.glob(".*"))


def test_killed_and_started_again(hub: LocalHub, folder: Path) -> None:
    """Another process with nothing but the environment, killed in the middle of its fourth large file."""
    command = (
        "import sys; from pathlib import Path; from shoal.hub import upload\n"
        "print(upload(Path(sys.argv[1]), 'anna/merge', private=True, message='Publish a merge', say=lambda text: None))"
    )
    arguments = [sys.executable, "-c", command, str(folder)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    hub.fault("first", "PUT /upload/", after=3, action=process.kill)
    assert process.wait() < 0
    process.stdout.close()  # type: ignore[union-attr]
    repo = hub.store.repos["anna/merge"]
    assert [commit.title for commit in repo.history()] == ["initial commit"]
    before = set(hub.store.stored)
    assert len(before) in (3, 4)
    subprocess.run(arguments, check=True, capture_output=True)
    check_one_commit(repo, folder)
    assert repo.private and sorted(hub.store.stored) == sorted(set(hub.store.stored))
    assert TOKEN in os.environ["HF_TOKEN"]


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ("GET /api/whoami", 429),
        ("POST .*/validate-yaml", 500),
        ("POST .*/create", 502),
        ("GET /api/models/", 429),
        ("POST .*/preupload/", 503),
        ("POST .*/batch", 504),
        ("PUT /upload/", 429),
        ("POST .*/verify/", 500),
        ("POST .*/commit/", 429),
        ("POST .*/commit/", 503),
    ],
)
def test_a_busy_hub_is_asked_again(
    hub: LocalHub, folder: Path, sleeps: list[float], request_: str, code: int
) -> None:
    hub.fault("status", request_, status=code, headers={"Retry-After": "3"}, times=2)
    said = publish(folder)[1]
    check_one_commit(hub.store.repos["anna/merge"], folder)
    assert len(sleeps) == 2 and all(3.0 <= seconds <= 4.0 for seconds in sleeps)
    assert any("trying again in" in line for line in said)
    assert not any("/upload/" in line for line in said)


def test_a_hub_that_stays_down(hub: LocalHub, folder: Path, sleeps: list[float]) -> None:
    hub.fault("status", "POST .*/commit/", status=503, times=None)
    text = failed(folder)
    assert "problem of its own (503)" in text and "nothing is visible yet" in text
    assert sleeps == [1.0, 2.0, 4.0, 8.0]


def test_a_commit_whose_answer_is_lost_is_not_made_twice(
    hub: LocalHub, folder: Path, sleeps: list[float]
) -> None:
    hub.fault("lose-response", "POST .*/commit/")
    commit, _ = publish(folder)
    assert hub.count("POST", "/commit/") == 1
    assert hub.store.repos["anna/merge"].commit().oid == commit
    check_one_commit(hub.store.repos["anna/merge"], folder)


def test_a_commit_whose_answer_is_lost_with_the_network(
    hub: LocalHub, folder: Path, sleeps: list[float]
) -> None:
    """Even looking for it fails; the next call finds it."""
    hub.fault("lose-response", "POST .*/commit/")
    hub.fault("status", "GET .*/commits/", status=503, times=None)
    text = failed(folder)
    assert "whether it arrived is not known" in text and "nothing is visible" not in text
    hub.faults.clear()
    publish(folder)
    assert hub.count("POST", "/commit/") == 1
    check_one_commit(hub.store.repos["anna/merge"], folder)


def test_a_commit_that_cannot_be_compared(hub: LocalHub, folder: Path, sleeps: list[float]) -> None:
    hub.fault("status", "GET .*/tree/", status=503, times=None, after=1)
    text = failed(folder)
    commit = hub.store.repos["anna/merge"].commit().oid
    assert f"published as commit {commit[:12]}, but" in text and "nothing is visible" not in text
    hub.faults.clear()
    assert publish(folder)[0] == commit
    check_one_commit(hub.store.repos["anna/merge"], folder)


def test_a_hub_that_keeps_other_bytes(hub: LocalHub, folder: Path) -> None:
    """What is listed after the commit is compared with what was sent."""

    def swap() -> None:
        repo = hub.store.repos["anna/merge"]
        files = repo.commits[repo.refs["main"]].files
        assert isinstance(files, dict)
        files["model-0.safetensors"] = Blob(b"other", True)

    hub.fault("first", "GET .*/tree/", after=1, action=swap)
    assert "other content than was sent for model-0.safetensors" in failed(folder)


def test_a_commit_by_somebody_else_in_between(hub: LocalHub, folder: Path) -> None:
    hub.fault("first", "POST .*/commit/", action=lambda: hub.foreign_commit("anna/merge"))
    assert "somebody else committed" in failed(folder)
    repo = hub.store.repos["anna/merge"]
    assert [commit.title for commit in repo.history()] == ["somebody else", "initial commit"]


def test_a_commit_by_somebody_else_between_two_calls(
    hub: LocalHub, folder: Path, sleeps: list[float]
) -> None:
    hub.fault("cut-request", "PUT /upload/", times=None, after=2)
    failed(folder)
    hub.faults.clear()
    hub.foreign_commit("anna/merge", "README.md")
    assert "then repeat the command to publish on top of that" in failed(folder)
    publish(folder)
    check_one_commit(hub.store.repos["anna/merge"], folder, ("somebody else", "initial commit"))


def test_an_expired_token(hub: LocalHub, folder: Path, client: Client) -> None:
    hub.add_user("anna", "hf_expiredTokenOfTests", expired=True)
    client.token("hf_expiredTokenOfTests")
    text = failed(folder)
    assert "does not accept your token" in text and "hf auth login" in text and "hf_expired" not in text


def test_a_token_that_expires_on_the_way(hub: LocalHub, folder: Path) -> None:
    def expire() -> None:
        hub.add_user("anna", TOKEN, expired=True)

    hub.fault("first", "POST .*/batch", after=3, action=expire)
    assert "does not accept your token" in failed(folder)
    assert len(hub.store.repos["anna/merge"].history()) == 1


def test_not_logged_in(hub: LocalHub, folder: Path, client: Client) -> None:
    client.token(None)
    assert "you are not logged in" in failed(folder)
    assert not hub.store.repos


def test_a_token_that_may_only_read(hub: LocalHub, folder: Path) -> None:
    hub.add_user("anna", TOKEN, role="read")
    assert "may only read" in failed(folder)


def test_no_permission(hub: LocalHub, folder: Path) -> None:
    assert "no permission" in failed(folder, "bert/merge")
    hub.add_repo("bert/there")
    assert "no permission" in failed(folder, "bert/there")
    assert len(hub.store.repos["bert/there"].history()) == 1


def test_a_public_repository_is_not_taken_for_a_private_one(hub: LocalHub, folder: Path) -> None:
    hub.store.create("anna/merge", False, hub.store.users[TOKEN])
    assert "is public" in failed(folder, private=True)
    assert not hub.store.stored
    publish(folder, "anna/secret", private=True)
    assert hub.store.repos["anna/secret"].private


def test_files_of_others_are_not_overwritten(hub: LocalHub, folder: Path) -> None:
    hub.add_repo("anna/merge", {"mine.safetensors": b"\0", "README.md": b"# mine"})
    assert "holds files that shoal did not publish (mine.safetensors)" in failed(folder)
    assert hub.store.repos["anna/merge"].commit().files["README.md"].data == b"# mine"
    assert not hub.store.stored


def test_a_new_publication_replaces_the_earlier_one(hub: LocalHub, folder: Path) -> None:
    publish(folder)
    (folder / f"model-{SHARDS - 1}.safetensors").unlink()
    (folder / "lock.yaml").write_text("schema: 2\n")
    said = publish(folder)[1]
    assert any(f"model-{SHARDS - 1}.safetensors" in line and "removes" in line for line in said)
    check_one_commit(hub.store.repos["anna/merge"], folder, ("Publish a merge", "initial commit"))


def test_metadata_that_the_hub_refuses(hub: LocalHub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: nonsense\n---\n")
    text = failed(folder)
    assert 'README.md: the Hub does not accept its metadata: "license" must be' in text
    assert not hub.store.repos and not hub.store.stored


def test_metadata_that_are_none(hub: LocalHub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert "README.md: its metadata are no YAML" in failed(folder)
    assert not hub.store.repos


def test_what_the_hub_remarks_is_said(hub: LocalHub, folder: Path) -> None:
    (folder / "README.md").write_text("# no metadata\n")
    said = publish(folder)[1]
    assert any("empty or missing yaml metadata" in line for line in said)


def test_bytes_that_change_on_the_way_are_never_visible(hub: LocalHub, folder: Path) -> None:
    """The storage keeps other bytes than were sent: the Hub's own check refuses the object."""
    hub.fault("first", "POST .*/verify/", action=lambda: _spoil(hub))
    assert "another hash" in failed(folder)
    assert len(hub.store.repos["anna/merge"].history()) == 1


def _spoil(hub: LocalHub) -> None:
    for found in hub.uploads.values():
        found.parts = {part: data[:-1] + b"?" for part, data in found.parts.items()}


@pytest.mark.parametrize("name", ["merge", "anna/a/b", "anna/a b", "anna/..", "anna/x--y"])
def test_names_that_are_none(hub: LocalHub, folder: Path, name: str) -> None:
    failed(folder, name)
    assert not hub.seen


def test_links_are_not_published(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "link.json").symlink_to(tmp_path / "secret")
    assert "symbolic link" in failed(folder)
    assert not hub.seen


def test_offline(hub: LocalHub, folder: Path, client: Client) -> None:
    client.offline()
    assert failed(folder) == "anna/merge: not published: HF_HUB_OFFLINE is set; unset it to reach the Hub"
