"""Whether a parent is a merge, and who opened the test items before: asked of the Hub, and said where it did not answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
from hub.client import Client
from hub.local_hub import LocalHub
from hub.publications import MODELS, REPO, Made, add_parents, hub_recipe
from typer.testing import CliRunner

import shoal
from shoal.cli import app
from shoal.hub.lineage import openings_before, unknown
from shoal.hub.publish import dry_run
from shoal.hub.published import load_published
from shoal.hub.safe_yaml import MAX_BYTES
from shoal.lock import Inheritance, Lock, load_lock
from shoal.preflight import prepare
from shoal.recipe import Recipe
from shoal.stages.observer import Silent

ASKED = r"HEAD /anna/base/resolve/.*/lock\.yaml"


class Listener(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def base(lock: Lock) -> str:
    return f"anna/base@{lock.models[0].commit}"


@pytest.fixture
def child(hub: LocalHub, pico: Any, tmp_path: Path) -> tuple[Recipe, Lock, Path]:
    """Recipe, lock and folder of a run that has not begun, of three parents without a published lock."""
    add_parents(hub, pico)
    recipe = runs.recipe(pico, **hub_recipe())
    return recipe, prepare(recipe, Path()).lock, tmp_path / "run"


def test_no_lock_is_no_ancestor(hub: LocalHub, child: tuple[Recipe, Lock, Path], client: Client) -> None:
    """404; and once that was the answer, it is known offline."""
    assert openings_before(*child) == Inheritance()
    client.offline()
    assert openings_before(*child) == Inheritance()


@pytest.mark.parametrize("status", [500, 503, 429, 401, 403])
def test_a_refusal_is_no_answer(
    hub: LocalHub, child: tuple[Recipe, Lock, Path], status: int, sleeps: list[float]
) -> None:
    hub.fault("status", ASKED, status=status, times=None)
    assert openings_before(*child) == Inheritance((), (base(child[1]),))
    hub.faults.clear()
    assert openings_before(*child) == Inheritance()


def test_one_bad_answer_is_asked_again(
    hub: LocalHub, child: tuple[Recipe, Lock, Path], sleeps: list[float]
) -> None:
    hub.fault("lose-response", ASKED)
    assert openings_before(*child) == Inheritance() and hub.faults.happened


def test_offline_nobody_was_asked(hub: LocalHub, child: tuple[Recipe, Lock, Path], client: Client) -> None:
    client.offline()
    commits = [model.commit for model in child[1].models]
    expected = tuple(f"anna/{name}@{commit}" for name, commit in zip(MODELS, commits, strict=True))
    assert openings_before(*child) == Inheritance((), expected)


def test_a_published_lock_that_cannot_be_read(hub: LocalHub, pico: Any, made: Made, tmp_path: Path) -> None:
    """Of a later shoal, and too large: not known; a lock.yaml of somebody else's is none of ours."""
    add_parents(hub, pico)
    recipe = runs.recipe(pico, **hub_recipe())
    text = made.files()["lock.yaml"].replace(b"schema_version: 1\n", b"schema_version: 9\n", 1)
    for content, known in ((text, False), (b"x" * (MAX_BYTES + 1), False), (b"packages: []\n", True)):
        files = {path.name: path.read_bytes() for path in pico.model("base").iterdir()}
        hub.add_repo("anna/base", files | {"lock.yaml": content})
        lock = prepare(recipe, Path()).lock
        assert openings_before(recipe, lock, tmp_path / "run").unknown == (() if known else (base(lock),))


def test_a_run_that_could_not_ask_says_so(
    hub: LocalHub, pico: Any, tmp_path: Path, sleeps: list[float]
) -> None:
    """Before it begins, in its lock and its claim, in what is published of it, and to those that descend from it."""
    add_parents(hub, pico)
    hub.fault("status", ASKED, status=503, times=None)
    recipe, heard = runs.recipe(pico, **hub_recipe()), Listener()
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    told = CliRunner().invoke(app, ["validate", str(path), "--no-estimate", "--device", "cpu"])
    result = shoal.evolve(recipe, tmp_path / "run", device="cpu", observer=heard)
    lock = load_lock(tmp_path / "run" / "lock.yaml")
    assert lock.unknown_ancestors == (base(lock),) and not lock.inherited
    (note,) = [text for text in heard.said if "could not be asked for" in text]
    assert note.startswith(
        f"note: whether ancestors opened its test items before is unknown for {base(lock)}"
    )
    assert told.exit_code == 0 and note.removeprefix("note: ") in told.stdout
    assert result["claim"].endswith(f"; whether ancestors opened them before is unknown for {base(lock)}")
    assert result["unknown_ancestors"] == [base(lock)]
    # published while the Hub still does not say
    found = dry_run(tmp_path / "run", REPO, tmp_path / "unknown")
    (ancestor,) = found.lock.lineage
    assert ancestor.unknown and ancestor.reference == base(lock)
    assert any("whether anna/base descends from other merges is not known" in note for note in found.notes)
    card = (tmp_path / "unknown" / "README.md").read_text()
    assert f"- parent: `{base(lock)}`" in card and "could not be asked for its own lineage" in card
    assert lock.unknown_ancestors[0] in card.replace("\\", "")  # in the claim
    # and when it does
    hub.faults.clear()
    known = dry_run(tmp_path / "run", REPO, tmp_path / "known")
    assert not known.lock.lineage and known.lock.run.unknown_ancestors == (base(lock),)
    # a descendant of what was published in between
    files = {p.name: p.read_bytes() for p in (tmp_path / "unknown").iterdir() if p.is_file()}
    weights = {p.name: p.read_bytes() for p in pico.model("left").iterdir()}
    hub.add_repo(REPO, weights | files)
    grandchild = runs.recipe(pico, **(hub_recipe() | {"models": ["anna/left", REPO]}))
    before = openings_before(grandchild, prepare(grandchild, Path()).lock, tmp_path / "none")
    assert before.unknown == (base(lock),) and [opening.run for opening in before.openings] == ["fish"]
    assert list(unknown(load_published(tmp_path / "unknown" / "lock.yaml").lineage)) == [base(lock)]


def test_what_was_known_at_the_start_stays_known(
    hub: LocalHub, pico: Any, made: Made, tmp_path: Path, sleeps: list[float]
) -> None:
    """A parent that is a published merge, and cannot be asked when the child is published: its opening is kept."""
    made.add(hub, weights=True)
    recipe = runs.recipe(pico, **(hub_recipe() | {"name": "shark", "models": ["anna/left", REPO]}))
    shoal.evolve(recipe, tmp_path / "run", device="cpu")
    lock = load_lock(tmp_path / "run" / "lock.yaml")
    assert [opening.run for opening in lock.inherited] == ["fish"] and not lock.unknown_ancestors
    first = dry_run(tmp_path / "run", "anna/shark", tmp_path / "first")
    assert [one.name for one in first.lock.lineage] == ["fish"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "is unknown for" not in result["claim"]
    client_home = Path(tmp_path / "hf" / "hub")
    for cached in client_home.rglob("lock.yaml"):
        cached.unlink()
    hub.fault("status", rf"HEAD /{REPO}/resolve/.*/lock\.yaml", status=503, times=None)
    second = dry_run(tmp_path / "run", "anna/shark", tmp_path / "second", license="mit")
    assert not second.lock.lineage
    assert [opening.run for opening in second.lock.openings] == ["shark", "fish"]
    assert any(f"whether {REPO} descends from other merges is not known" in note for note in second.notes)
