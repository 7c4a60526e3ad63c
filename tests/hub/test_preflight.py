"""`shoal validate` and a local Hub: what can be said of models before their weights are fetched, and what is wrong."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub.client import OTHER, TOKEN, Client
from hub.local_hub import LocalHub
from typer.testing import CliRunner

from shoal.cli import app
from shoal.errors import CheckpointError
from shoal.models import resolve_models
from shoal.preflight import prepare
from shoal.recipe import load_recipe
from shoal.types import HubModel

MODELS = {"org/base": "base", "org/left": "left", "org/right": "right"}


@pytest.fixture
def zoo(hub: LocalHub, pico: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """The tiny models as repositories of the Hub, and an empty cache of ours."""
    for repo, name in MODELS.items():
        hub.add_repo(repo, folder=pico.model(name))
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "shoal"))
    return hub


def written(pico: Any, folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    recipe = pico.recipe(base_model="org/base", models=["org/left", "org/right"]) | changes
    path.write_text(yaml.safe_dump(recipe))
    return path


def validated(recipe: Path, *more: str) -> list[str]:
    found = CliRunner().invoke(app, ["validate", str(recipe), *more], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output.splitlines()


def refused(recipe: Path) -> str:
    found = CliRunner().invoke(app, ["validate", str(recipe)], catch_exceptions=False)
    assert found.exit_code == 2
    lines = found.output.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert TOKEN not in found.output and OTHER not in found.output
    return lines[0].removeprefix("error: ")


def weights_fetched(hub: LocalHub) -> int:
    """Requests for weights that were not for a header only."""
    return sum(
        1
        for request in hub.seen
        if request.method == "GET"
        and request.path.startswith("/object/")
        and request.range != "bytes=0-100000"
    )


def topics(lines: list[str]) -> dict[str, str]:
    """Topic -> its row, without what is free on the machine at the moment."""
    return {line.split()[0]: line.strip().partition("; free on")[0] for line in lines if line.split()}


def test_everything_is_said_and_nothing_fetched(zoo: LocalHub, pico: Any, tmp_path: Path) -> None:
    recipe = written(pico, tmp_path / "r")
    lines = validated(recipe)
    commit = zoo.store.repos["org/base"].commit().oid[:12]
    assert any(f"Hub  org/base: commit {commit}" in line and "to fetch" in line for line in lines)
    assert any(line.strip().startswith("download") and "are free" in line for line in lines)
    assert weights_fetched(zoo) == 0
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    # what a run would do is said as if the models were here
    local = validated(written(pico, tmp_path / "l", **pico.recipe()), "--no-estimate")
    kinds = ("method", "memory", "space", "task", "search", "anchors", "cost", "claim")
    ours = {k: v for k, v in topics(lines).items() if k in kinds}
    assert ours == {k: v for k, v in topics(local).items() if k in kinds} and len(ours) == len(kinds)
    assert any("of scoring in all" in line for line in lines)


def test_a_run_fetches_and_locks_commits_and_hashes(zoo: LocalHub, pico: Any, tmp_path: Path) -> None:
    recipe = written(pico, tmp_path / "r")
    validated(recipe, "--no-estimate")
    found = prepare(load_recipe(recipe), recipe.parent)
    assert [model.commit for model in found.lock.models] == [
        zoo.store.repos[repo].commit().oid for repo in MODELS
    ]
    local = written(pico, tmp_path / "l", **pico.recipe())
    there = prepare(load_recipe(local), local.parent)
    assert [model.files for model in found.lock.models] == [model.files for model in there.lock.models]
    assert all("model.safetensors" in model.files for model in found.lock.models)
    assert weights_fetched(zoo) == len(MODELS)
    lines = validated(recipe, "--no-estimate")
    assert sum("all in the cache" in line for line in lines) == len(MODELS)
    assert not any(line.strip().startswith("download") for line in lines)


def test_a_revision(zoo: LocalHub, pico: Any, tmp_path: Path) -> None:
    repo = zoo.store.repos["org/left"]
    first = repo.commit().oid
    repo.tags["v1"] = first
    zoo.foreign_commit("org/left", "config.json")  # main is no model any more
    lines = validated(written(pico, tmp_path / "r", models=["org/left@v1", "org/right"]), "--no-estimate")
    assert any(f"org/left@v1: commit {first[:12]}" in line for line in lines)
    text = refused(written(pico, tmp_path / "r", models=["org/left@v2", "org/right"]))
    assert text == "model org/left@v2: the repository has no such revision"


def test_models_that_are_not_there_or_not_for_us(
    zoo: LocalHub, pico: Any, tmp_path: Path, client: Client
) -> None:
    recipe = written(pico, tmp_path / "r", models=["org/left", "bert/secret"])
    assert refused(recipe).startswith("model bert/secret: no such repository on the Hub, or it is private")
    zoo.add_repo("bert/secret", folder=pico.model("right"), private=True)
    assert "your account may not see it; a local folder starts with" in refused(recipe)
    client.token(None)
    assert "you are not logged in (`hf auth login`)" in refused(recipe)
    client.token(OTHER)
    assert any(
        "bert/secret: commit" in line and "private" in line for line in validated(recipe, "--no-estimate")
    )


def test_a_gated_model(zoo: LocalHub, pico: Any, tmp_path: Path, client: Client) -> None:
    zoo.store.repos["org/right"].gated = "manual"
    recipe = written(pico, tmp_path / "r")
    address = f"{zoo.endpoint}/org/right"
    assert refused(recipe) == f"model org/right: gated; ask for access at {address} with this account"
    client.token(None)
    assert refused(recipe).endswith(f"ask for access at {address} and log in with `hf auth login`")
    assert not list((tmp_path / "hf").rglob("*.json"))  # asked before anything is fetched
    client.token(TOKEN)
    zoo.store.repos["org/right"].granted.add("anna")
    lines = validated(recipe, "--no-estimate")
    assert any("org/right: commit" in line and "gated (you have access)" in line for line in lines)


def test_a_token_that_expired(zoo: LocalHub, pico: Any, tmp_path: Path, client: Client) -> None:
    zoo.add_user("anna", "hf_expiredTokenOfTests", expired=True)
    client.token("hf_expiredTokenOfTests")
    text = refused(written(pico, tmp_path / "r"))
    assert "the Hub does not accept your token" in text and "hf_expired" not in text


def test_a_pickle_in_place_of_safetensors(zoo: LocalHub, pico: Any, tmp_path: Path) -> None:
    config = (pico.model("base") / "config.json").read_bytes()
    zoo.add_repo("org/old", {"config.json": config, "pytorch_model.bin": b"\x80\x04."})
    text = refused(written(pico, tmp_path / "r", models=["org/old", "org/right"]))
    assert text.startswith("model org/old: expected safetensors, found pytorch_model.bin;")
    zoo.add_repo("org/none", {"config.json": config})
    assert "found no weights at all" in refused(written(pico, tmp_path / "r", models=["org/none"]))


@pytest.mark.parametrize("kind", ["too far", "no json", "too long"])
def test_a_header_that_lies(zoo: LocalHub, pico: Any, tmp_path: Path, kind: str) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    lies = {
        "too far": struct.pack("<Q", len(header)) + header + bytes(8),
        "no json": struct.pack("<Q", 8) + b"{{{{{{{{" + bytes(8),
        "too long": struct.pack("<Q", 2**60) + bytes(64),
    }
    files = {
        "config.json": (pico.model("base") / "config.json").read_bytes(),
        "model.safetensors": lies[kind],
    }
    files |= {p.name: p.read_bytes() for p in pico.model("base").glob("tokenizer*")}
    zoo.add_repo("org/liar", files)
    text = refused(written(pico, tmp_path / "r", models=["org/liar", "org/right"]))
    expected = (
        "its header speaks of" if kind == "too far" else "org/liar: model.safetensors is no safetensors file"
    )
    assert expected in text
    assert not list((tmp_path / "shoal").rglob("*liar*/*"))


def test_no_room(zoo: LocalHub, pico: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5000))
    text = refused(written(pico, tmp_path / "r"))
    assert f"to be fetched into {tmp_path / 'hf' / 'hub'}, but only 5 kB are free" in text
    assert "HF_HOME" in text


def test_without_the_hub(
    zoo: LocalHub, pico: Any, tmp_path: Path, client: Client, sleeps: list[float]
) -> None:
    recipe = written(pico, tmp_path / "r")
    zoo.fault("status", "/api/models/", status=503, times=None)
    assert (
        refused(recipe)
        == "model org/base: the Hub has a problem of its own (503), and the cache does not have it"
    )
    zoo.faults.clear()
    prepare(load_recipe(recipe), recipe.parent)
    zoo.fault("status", ".", status=503, times=None)
    assert any("(503); in the cache at commit" in line for line in validated(recipe, "--no-estimate"))
    client.offline()
    seen = len(zoo.seen)
    lines = validated(recipe, "--no-estimate")
    assert sum("HF_HUB_OFFLINE is set; in the cache at commit" in line for line in lines) == len(MODELS)
    assert len(zoo.seen) == seen
    other = written(pico, tmp_path / "r", models=["org/left", "org/more"])
    assert refused(other) == "model org/more: HF_HUB_OFFLINE is set, and the cache does not have it"


def test_an_adapter(zoo: LocalHub, pico: Any, tmp_path: Path) -> None:
    """Base and adapter are both asked for, and the base once."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(pico.model("base")),
        LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "lora")
    zoo.add_repo("org/lora", folder=tmp_path / "lora")
    lines = validated(written(pico, tmp_path / "r", models=["org/base+org/lora"]), "--no-estimate")
    asked = [line for line in lines if ": commit" in line]
    assert len(asked) == 2 and weights_fetched(zoo) == 0


def test_models_are_fetched_through_faults(
    zoo: LocalHub, pico: Any, sleeps: list[float], client: Client
) -> None:
    """What runs and `shoal score` call: cut and busy it goes on, and what cannot be is one line."""
    left, right, absent = HubModel("org/left"), HubModel("org/right"), HubModel("bert/secret")
    client.patch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 12)
    zoo.fault("cut-response", "GET /object/", times=3)
    zoo.fault("status", "GET /org/.*config.json", status=503, times=2)
    said: list[str] = []
    found = resolve_models([left, right], said.append)
    for model, name in zip(found, ("left", "right"), strict=True):
        weights = (pico.model(name) / "model.safetensors").read_bytes()
        assert (model.folder / "model.safetensors").read_bytes() == weights
    assert len(zoo.faults.happened) == 5 and sleeps
    with pytest.raises(CheckpointError) as caught:
        resolve_models([absent], said.append)
    text = str(caught.value)
    assert text.startswith(
        "model bert/secret: not in the cache, and not fetched from the Hub: no such repository"
    )
    assert "\n" not in text and not any(TOKEN in line or "/object/" in line for line in said)
