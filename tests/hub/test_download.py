"""`download`: whole and checked, or not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hub.client import Client
from hub.local_hub import LocalHub
from hub.publications import REPO, Made

from shoal.errors import ShoalError
from shoal.hub import weights
from shoal.hub.download import download
from shoal.hub.published import load_published


def failed(repo: str, out: Path) -> str:
    with pytest.raises(ShoalError) as caught:
        download(repo, out)
    text = str(caught.value)
    assert "\n" not in text
    assert not out.exists() and not [p for p in out.parent.iterdir() if "unchecked" in p.name and p.is_dir()]
    return text


def test_a_recipe_becomes_the_publishers_model(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    repo = made.add(hub)
    found = download(REPO, tmp_path / "out")
    lock = load_published(made.recipe / "lock.yaml")
    assert found.rebuilt and found.commit == repo.commit().oid
    assert weights.sha256(tmp_path / "out") == lock.winner.weights_sha256 == found.weights_sha256
    theirs = {name: data for name, data in made.files(weights=True).items() if _model(name)}
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if _model(p.name)} == theirs
    assert (tmp_path / "out" / "lock.yaml").read_bytes() == made.files()["lock.yaml"]
    assert not list(tmp_path.glob(".out*"))


def _model(name: str) -> bool:
    return name.endswith(".safetensors") or name in (
        "config.json",
        "tokenizer.json",
        "generation_config.json",
    )


def test_weights_are_fetched_without_the_parents(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    made.add(hub, weights=True)
    found = download(REPO, tmp_path / "out")
    assert not found.rebuilt and hub.count("GET", "anna/base") == 0
    assert weights.sha256(tmp_path / "out") == found.weights_sha256
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0


def test_a_revision(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    first = made.add(hub).commit().oid
    hub.store.repos[REPO].add("later", "anna", {}, ("lock.yaml",))
    assert "no lock.yaml" in failed(REPO, tmp_path / "main")
    assert download(f"{REPO}@{first}", tmp_path / "out").commit == first


def test_other_weights_than_the_lock_names(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    other = (made.pico.model("left") / "model.safetensors").read_bytes()
    made.add(hub, {"model.safetensors": other}, weights=True)
    assert "do not use them" in failed(REPO, tmp_path / "out")


def test_another_tokenizer_than_the_lock_names(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    tokenizer = made.files(weights=True)["tokenizer.json"].replace(b'"a"', b'"z"', 1)
    made.add(hub, {"tokenizer.json": tokenizer}, weights=True)
    assert "tokenizer.json is not that of base" in failed(REPO, tmp_path / "out")


def test_a_parent_that_changed(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    """Its commit is there, but what it holds is another: the lock's hashes decide."""
    made.add(hub)
    repo = hub.store.repos["anna/left"]
    commit = repo.commit()
    other = hub.store.repos["anna/right"].commit().files["model.safetensors"]
    repo.commits[commit.oid] = type(commit)(
        commit.oid, commit.title, commit.author, None, {**commit.files, "model.safetensors": other}
    )
    assert (
        "parent anna/left@" in (text := failed(REPO, tmp_path / "out"))
        and "model.safetensors has sha256" in text
    )


def test_a_parent_that_is_gone(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    made.add(hub)
    del hub.store.repos["anna/right"]
    assert "model anna/right@" in failed(REPO, tmp_path / "out")


def test_files_that_do_not_belong_together(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    result = json.loads(made.files()["result.json"])
    made.add(hub, {"result.json": json.dumps(result | {"verdict": "beats" + "!"}).encode()})
    assert "do not belong together" in failed(REPO, tmp_path / "one")
    made.add(hub, {"recipe.yaml": made.files()["recipe.yaml"].replace(b"fish", b"shark")})
    assert "not the recipe that lock.yaml names" in failed(REPO, tmp_path / "two")
    made.add(hub, {"result.json": None})
    assert "result.json: not there" in failed(REPO, tmp_path / "three")


def test_a_cut_connection_goes_on(hub: LocalHub, made: Made, tmp_path: Path, sleeps: list[float]) -> None:
    made.add(hub, weights=True)
    hub.fault("cut-response", "GET /object/", times=3)
    assert not download(REPO, tmp_path / "out").rebuilt
    assert len(hub.faults.happened) == 3


def test_a_target_that_exists(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    made.add(hub)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ShoalError, match="exists"):
        download(REPO, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    assert download(REPO, tmp_path / "out").rebuilt


@pytest.mark.parametrize("name", ["fish", "../fish", "a/b/c", "/etc/passwd", "anna/fi sh", "anna/..", ""])
def test_names_that_are_none(hub: LocalHub, tmp_path: Path, name: str) -> None:
    assert "expected a repository" in failed(name, tmp_path / "out")
    assert not hub.seen


def test_offline(hub: LocalHub, made: Made, tmp_path: Path, client: Client) -> None:
    made.add(hub)
    client.offline()
    assert "HF_HUB_OFFLINE" in failed(REPO, tmp_path / "out")
