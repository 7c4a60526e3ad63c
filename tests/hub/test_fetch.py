"""`fetch` and `list_published` through a local Hub: bounded, checked, only harmless files, nothing half there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hub.client import OTHER, TOKEN, Client
from hub.local_hub import LocalHub

from shoal.errors import PublishError
from shoal.hub import Limits, fetch, list_published
from shoal.hub.fetch import harmless
from shoal.hub.files import unsafe

CARD = (
    b"---\nlicense: mit\ntags: [shoal-recipe, merge]\nbase_model: [org/a, org/b]\nlibrary_name: shoal\n---\n"
)
FILES = {
    "README.md": CARD,
    "lock.yaml": b"schema: 1\n",
    "plots/weights.png": b"\x89PNG\0",
    "model-1.safetensors": b"\1" * 300_000,
    "model-2.safetensors": b"\2" * 300_000,
}


def fetched(tmp_path: Path, repo: str = "anna/m", **more: Any) -> Any:
    return fetch(repo, more.pop("revision", None), tmp_path / "out", **more)


def failed(tmp_path: Path, repo: str = "anna/m", **more: Any) -> str:
    with pytest.raises(PublishError) as caught:
        fetched(tmp_path, repo, **more)
    text = str(caught.value)
    assert "\n" not in text and TOKEN not in text and OTHER not in text
    assert not (tmp_path / "out").exists()
    return text


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_with_every_file(hub: LocalHub, tmp_path: Path) -> None:
    repo = hub.add_repo("anna/m", FILES)
    found = fetched(tmp_path)
    assert found.commit == repo.commit().oid and found.folder == tmp_path / "out"
    assert contents(found.folder) == FILES
    assert sorted(found.files) == sorted(FILES) and found.skipped == ()
    assert not list(tmp_path.glob(".out*"))


def test_a_revision_is_resolved_once(hub: LocalHub, tmp_path: Path) -> None:
    """Somebody commits while the files travel: all are of the commit that the call began with."""
    repo = hub.add_repo("anna/m", FILES)
    first = repo.commit().oid
    hub.fault("first", "GET .*/lock.yaml", action=lambda: hub.foreign_commit("anna/m", "model-1.safetensors"))
    found = fetched(tmp_path, revision="main")
    assert found.commit == first and contents(found.folder) == FILES
    assert repo.commit().oid != first
    assert "no such revision" in failed(tmp_path / "other", revision="v9")


def test_only_what_is_asked_for_and_harmless(hub: LocalHub, tmp_path: Path) -> None:
    nasty = {
        "pytorch_model.bin": b"\x80\x04pickle",
        "adapter_model.pt": b"\0",
        "modeling.py": b"import os",
        "journal.sqlite": b"SQLite format 3\0",
        "report.html": b"<script>",
        "weights.npy": b"\x93NUMPY",
        ".git/config.json": b"{}",
        ".cache/huggingface/x.json": b"{}",
        "MODEL.SAFETENSORS.bin": b"\0",
    }
    hub.add_repo("anna/m", FILES | nasty)
    found = fetched(tmp_path, allow=("*.yaml", "*.md", "*"))
    assert contents(found.folder) == FILES and set(found.skipped) == set(nasty)
    some = fetch("anna/m", None, tmp_path / "some", allow=("lock.yaml", "*.bin"))
    assert contents(some.folder) == {"lock.yaml": FILES["lock.yaml"]}
    assert hub.count("GET", "pytorch_model.bin") == hub.count("HEAD", "pytorch_model.bin") == 0
    assert "none of the files that are expected" in failed(tmp_path / "none", allow=("recipe.yaml",))


@pytest.mark.parametrize(
    "path",
    [
        "../evil.json",
        "a/../../evil.json",
        "/etc/evil.json",
        "C:\\evil.json",
        "\\\\host\\share\\evil.json",
        "a\\..\\..\\evil.json",
        "a//b.json",
        "./a.json",
        "nul\0.json",
        "line\nbreak.json",
        "dots..../x.json",
        "stream.json:hidden",
    ],
)
def test_paths_that_leave_the_folder(hub: LocalHub, tmp_path: Path, path: str) -> None:
    assert unsafe(path)
    hub.add_repo("anna/m", FILES | {path: b"{}"})
    assert "nothing of it is fetched" in failed(tmp_path)
    assert hub.count("GET", "/resolve/") == 0
    assert sorted(p.name for p in tmp_path.parent.glob("*evil*")) == []


def test_names_that_are_one_on_other_systems(hub: LocalHub, tmp_path: Path) -> None:
    hub.add_repo("anna/m", {"lock.yaml": b"a: 1", "LOCK.yaml": b"a: 2"})
    assert "take for one file" in failed(tmp_path)


def test_sizes_are_bounded_before_anything_is_fetched(hub: LocalHub, tmp_path: Path) -> None:
    hub.add_repo("anna/m", FILES)
    assert "lock.yaml has 10 bytes, expected at most 9" in failed(
        tmp_path, limits=Limits(small=9), allow=("lock.yaml",)
    )
    assert "weights have 600,000 bytes" in failed(tmp_path, limits=Limits(weights=599_999))
    assert "more than 4 files" in failed(tmp_path, limits=Limits(files=4))
    assert hub.count("GET", "/resolve/") == 0


def test_a_full_disk_is_told_before(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    hub.add_repo("anna/m", FILES)
    assert "only 1,000 are free" in failed(tmp_path)
    assert hub.count("GET", "/resolve/") == 0


def test_a_target_that_exists_is_left_alone(hub: LocalHub, tmp_path: Path) -> None:
    hub.add_repo("anna/m", FILES)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("link", "full"):
        with pytest.raises(PublishError, match="exists"):
            fetch("anna/m", None, tmp_path / name)
    assert contents(tmp_path / "full") == {"mine": b"mine"} and not contents(tmp_path / "elsewhere")
    assert contents(fetch("anna/m", None, tmp_path / "empty").folder) == FILES


def test_links_that_wait_in_the_way(hub: LocalHub, tmp_path: Path) -> None:
    """Somebody put links where the files are collected: nothing is written through them."""
    repo = hub.add_repo("anna/m", FILES)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    staging = tmp_path / f".out.{repo.commit().oid[:12]}.partial"
    staging.mkdir()
    (staging / "lock.yaml").symlink_to(victim)
    (staging / "left.json").symlink_to(victim)
    assert contents(fetched(tmp_path).folder) == FILES
    assert victim.read_text() == "mine"
    again = tmp_path / staging.name.replace(".out.", ".again.")
    again.symlink_to(tmp_path / "out")
    with pytest.raises(PublishError, match="symbolic link"):
        fetch("anna/m", None, tmp_path / "again")
    assert contents(tmp_path / "out") == FILES


def test_a_connection_that_is_cut_goes_on(hub: LocalHub, tmp_path: Path, sleeps: list[float]) -> None:
    hub.add_repo("anna/m", FILES)
    hub.fault("cut-response", "GET /object/", times=3)
    hub.fault("cut-response", "GET .*/lock.yaml", times=1)
    assert contents(fetched(tmp_path).folder) == FILES
    assert len(hub.faults.happened) == 4


def test_interrupted_it_goes_on_at_the_next_file(hub: LocalHub, tmp_path: Path, sleeps: list[float]) -> None:
    hub.add_repo("anna/m", FILES)
    hub.fault("cut-response", "GET /object/", times=None, after=2)
    assert "failed or broke off" in failed(tmp_path)
    hub.faults.clear()
    before = hub.count("GET", "/object/")
    assert contents(fetched(tmp_path).folder) == FILES
    assert hub.count("GET", "/object/") == before + 1


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize(
    "request_", ["GET /api/models/anna/m/", "HEAD .*/lock.yaml", "GET .*/lock.yaml", "GET /object/"]
)
def test_a_busy_hub_is_asked_again(
    hub: LocalHub, tmp_path: Path, sleeps: list[float], status: int, request_: str
) -> None:
    hub.add_repo("anna/m", FILES)
    hub.fault("status", request_, status=status, headers={"Retry-After": "2"}, times=2)
    assert contents(fetched(tmp_path).folder) == FILES
    assert sleeps


def test_wrong_bytes_once(hub: LocalHub, tmp_path: Path) -> None:
    hub.add_repo("anna/m", FILES)
    hub.fault("corrupt", "GET /object/")
    hub.fault("corrupt", "GET .*/lock.yaml")
    said: list[str] = []
    assert contents(fetched(tmp_path, say=said.append).folder) == FILES
    assert sum("another hash" in line for line in said) == 2


def test_wrong_bytes_always(hub: LocalHub, tmp_path: Path) -> None:
    hub.add_repo("anna/m", FILES)
    hub.fault("corrupt", "GET /object/", times=None)
    assert "another hash than the Hub lists, 3 times" in failed(tmp_path)
    hub.faults.clear()
    assert contents(fetched(tmp_path).folder) == FILES


def test_who_may_not(hub: LocalHub, tmp_path: Path, client: Client) -> None:
    hub.add_repo("bert/g", FILES, gated="auto")
    hub.add_repo("bert/p", FILES, private=True)
    assert f"gated; ask for access at {hub.endpoint}/bert/g with this account" in failed(tmp_path, "bert/g")
    assert "your account may not see it" in failed(tmp_path, "bert/p")
    client.token(None)
    assert "and log in with `hf auth login`" in failed(tmp_path, "bert/g")
    assert "you are not logged in" in failed(tmp_path, "bert/p")
    client.token("hf_unknownTokenOfTests")
    assert "does not accept your token" in failed(tmp_path, "bert/g")
    client.offline()
    assert "HF_HUB_OFFLINE is set" in failed(tmp_path, "bert/g")


@pytest.mark.parametrize(
    ("path", "good"),
    [
        ("model.safetensors", True),
        ("a/b/config.json", True),
        ("LICENSE", True),
        (".eval_results/x.yaml", True),
        ("model.bin", False),
        ("model.safetensors.bin", False),
        ("Makefile", False),
        (".git/hooks/x.json", False),
        ("x.PY", False),
    ],
)
def test_kinds(path: str, good: bool) -> None:
    assert harmless(path) is good and unsafe(path) is None


def test_published_recipes_are_found_by_tag(hub: LocalHub, client: Client) -> None:
    hub.page = 1
    hub.add_repo("anna/recipe", {"README.md": CARD})
    hub.add_repo("bert/weights", {"README.md": b"---\ntags: [shoal, merge]\nbase_model: org/a\n---\n"})
    hub.add_repo("bert/hidden", {"README.md": CARD}, private=True)
    hub.add_repo("bert/other", {"README.md": b"---\ntags: [merge]\n---\n"})
    found = {one.repo: one for one in list_published()}
    assert set(found) == {"anna/recipe", "bert/weights"}
    recipe, weights = found["anna/recipe"], found["bert/weights"]
    assert (recipe.kind, recipe.base_models, recipe.license) == ("recipe", ("org/a", "org/b"), "mit")
    assert (weights.kind, weights.base_models, weights.license) == ("weights", ("org/a",), None)
    assert [one.repo for one in list_published(author="bert")] == ["bert/weights"]
    assert len(list_published(limit=1)) == 1
    client.token(OTHER)
    assert "bert/hidden" in {one.repo for one in list_published()}
    client.offline()
    with pytest.raises(PublishError, match="cannot be listed: HF_HUB_OFFLINE"):
        list_published()
