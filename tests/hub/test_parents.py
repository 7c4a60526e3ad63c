"""Merges of ours as parents: rebuilt from their roots in float32, the same everywhere, and never from what was rounded."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import runs
import yaml
from hub.client import TOKEN, Client, point_client
from hub.local_hub import LocalHub
from hub.publications import REPO, Made, hub_recipe, make
from typer.testing import CliRunner

import shoal
from shoal.cli import app
from shoal.errors import CheckpointError, PublishError, RecipeError, ShoalError
from shoal.hub import weights
from shoal.hub.download import download
from shoal.hub.lineage import drawn, inherited, openings_before
from shoal.hub.parents import Documents, Parent, documents, hub_ids, licences_of
from shoal.hub.portable import Names, is_local
from shoal.hub.publish import dry_run
from shoal.hub.published import Ancestor, load_published
from shoal.hub.reproduce import reproduce
from shoal.hub.roots import merges_named, merges_of
from shoal.lock import Lock, ModelLock, Opening, load_lock
from shoal.models import check_files, merges_among, open_parents, pinned, resolve_models
from shoal.preflight import prepare
from shoal.rebuilt import MAX_GENERATIONS
from shoal.recipe import parse_model
from shoal.types import HubModel, LocalModel, MergeModel, MergePlan

CHILD = "anna/shark"
SEARCH = {"budget": 4, "popsize": 4, "items": 16, "seed": 3}
LONGER = {"budget": 8, "popsize": 4, "items": 16, "seed": 2}  # whose winner is a merge


@dataclass(frozen=True)
class Family:
    """fish: a merge in bfloat16 of three Hub models. run: one that has it as a parent; published: what is published of it.

    said: what the run said before it began. copy: the float32 copy of fish.
    """

    fish: Made
    run: Path
    published: Path
    said: list[str]
    copy: Path

    def add(self, hub: LocalHub, **changes: Any) -> None:
        self.fish.add(hub, **changes)
        files = {
            p.relative_to(self.published).as_posix(): p for p in self.published.rglob("*") if p.is_file()
        }
        hub.add_repo(CHILD, {name: path.read_bytes() for name, path in files.items()})


class Listener:
    """What a run says."""

    def __init__(self) -> None:
        from shoal.stages.observer import Silent

        self.said: list[str] = []
        self.inner = Silent()

    def say(self, text: str) -> None:
        self.said.append(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def child_recipe(pico: Any, **changes: Any) -> Any:
    keys = hub_recipe() | {"name": "shark", "models": ["anna/left", f"merge:{REPO}"], "search": LONGER}
    return runs.recipe(pico, **(keys | changes))


@pytest.fixture(scope="module")
def fish(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A publication whose weights are rounded to bfloat16."""
    merge = {"method": "task_arithmetic", "dtype": "bfloat16"}
    search = {"budget": 12, "popsize": 4, "items": 16, "seed": 4}
    return make(pico, tmp_path_factory.mktemp("fish"), merge=merge, search=search)


@pytest.fixture(scope="module")
def family(fish: Made, tmp_path_factory: pytest.TempPathFactory) -> Family:
    place = tmp_path_factory.mktemp("family")
    with pytest.MonkeyPatch.context() as patch, LocalHub() as hub:
        hub.add_user("anna", TOKEN)
        point_client(hub, place / "hf", patch)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("SHOAL_CACHE", str(place / "cache"))
        fish.add(hub)
        heard: Any = Listener()
        result = shoal.evolve(child_recipe(fish.pico), place / "run", device="cpu", observer=heard)
        assert "@" in result["winner"]["id"]  # a merge, else another seed
        dry_run(place / "run", CHILD, place / "published")
        from huggingface_hub.utils import close_session

        close_session()
    (copy,) = (place / "cache" / "merges").iterdir()
    return Family(fish, place / "run", place / "published", heard.said, copy)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of ours."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def parent(lock: Lock) -> ModelLock:
    (found,) = [model for model in lock.models if model.merge is not None]
    return found


# --- what a run makes of it


def test_the_copy_is_the_merge_before_it_was_rounded(family: Family) -> None:
    """Bit for bit the canonical float32 merge of the roots; rounded it is what was published, and that it is not."""
    import torch

    from shoal.merge.checkpoint import Checkpoint
    from shoal.merge.groups import tensor_groups
    from shoal.merge.hashing import weights_sha256
    from shoal.merge.resident import Merger

    lock = load_published(family.fish.recipe / "lock.yaml")
    pico = family.fish.pico
    roots = [Checkpoint.open(pico.model(name)) for name in ("base", "left", "right")]
    data = json.loads(lock.winner.merge_plan().to_json()) | {"dtype": "float32"}
    exact = dict(Merger(roots, tensor_groups(roots[0])).tensors(MergePlan.from_json(json.dumps(data))))
    copy = Checkpoint.open(family.copy)
    assert {name: copy.dtype(name) for name in copy.names} == {name: torch.float32 for name in exact}
    assert all(torch.equal(copy.tensor(name), tensor) for name, tensor in exact.items())
    rounded = [(name, copy.tensor(name).to(torch.bfloat16)) for name in copy.names]
    assert weights_sha256(rounded) == lock.winner.weights_sha256
    published = Checkpoint.open(family.fish.weights)
    assert any(not torch.equal(published.tensor(n).float(), copy.tensor(n)) for n in copy.names)


def test_the_lock_holds_all_that_it_was_made_of(family: Family) -> None:
    lock, fish = load_lock(family.run / "lock.yaml"), load_published(family.fish.recipe / "lock.yaml")
    model = parent(lock)
    assert model.merge is not None and model.commit is not None
    assert (model.name, model.ref, model.folder) == ("fish", f"merge:{REPO}", str(family.copy))
    assert model.merge.roots == fish.run.models
    assert (model.merge.dtype, model.merge.weights_sha256) == ("bfloat16", fish.winner.weights_sha256)
    assert model.merge.float32_sha256 == weights.sha256(family.copy)
    assert "model.safetensors" in model.files and model.files.keys() >= {"config.json", "tokenizer.json"}


def test_openings_are_inherited_and_told(family: Family) -> None:
    """Before the run, in the claim, in the published lock and in the card."""
    fish = load_published(family.fish.recipe / "lock.yaml")
    lock = load_lock(family.run / "lock.yaml")
    assert lock.inherited == fish.openings and len(fish.openings) == 1
    (note,) = [text for text in family.said if "its test items were opened" in text]
    assert "opened once before, by runs that it descends from (fish)" in note
    result = json.loads((family.run / "result.json").read_text())
    assert (result["test_openings"], result["inherited_openings"]) == (1, 1)
    assert result["claim"].endswith("opened 2 times, 1 of them by runs that this one descends from")
    published = load_published(family.published / "lock.yaml")
    (ancestor,) = published.lineage
    commit = parent(lock).commit
    assert (ancestor.relation, ancestor.reference) == ("parent", f"{REPO}@{commit}")
    assert ancestor.shared == sum(len(task.roles["test"].items) for task in lock.tasks)
    assert [opening.run for opening in published.openings] == ["shark", "fish"]
    card = (family.published / "README.md").read_text()
    assert "The test items were opened 2 times, ancestors' runs included." in card
    assert f"- parent: `{REPO}@{commit}` (fish" in card
    assert "a merge, rebuilt in float32 from its roots base, left, right" in card


def test_roots_count_as_parents(family: Family) -> None:
    """Their licences stand in the card; base_model names what the run named."""
    from huggingface_hub import ModelCard

    card = ModelCard((family.published / "README.md").read_text())
    assert card.data.base_model == ["anna/base", "anna/left", REPO]
    for name in ("anna/base", "anna/left", "anna/right", REPO):
        assert f"| {name} | [MIT License]" in card.text
    config = (family.published / "mergekit_config.yml").read_text()
    commit = parent(load_lock(family.run / "lock.yaml")).commit
    assert (
        f"by `shoal download {REPO}@{commit} -o ./merges/fish`" in config and "rounded to bfloat16" in config
    )
    report = (family.published / "report.html").read_text()
    assert "rebuilt in float32 from <code>anna/base@" in report


# --- from one user to another


def test_from_a_published_parent_to_a_reproduced_child(
    hub: LocalHub, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """Downloaded and reproduced in empty caches: the parent is rebuilt from its roots, and all bytes are the same."""
    family.add(hub)
    monkeypatch.delenv("HF_TOKEN")
    lock = load_published(family.published / "lock.yaml")
    found = download(CHILD, tmp_path / "out")
    assert found.rebuilt and weights.sha256(tmp_path / "out") == lock.winner.weights_sha256
    (copy,) = (cache / "merges").iterdir()
    assert copy.name == family.copy.name
    for path in family.copy.iterdir():
        assert (copy / path.name).read_bytes() == path.read_bytes()
    point_client(hub, tmp_path / "fresh", monkeypatch)
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "fresher"))
    seen = reproduce(CHILD, score=True, include_path=family.fish.pico.tasks, device="cpu")
    assert seen.agrees and {row.flips for row in seen.scores} == {0}
    assert (tmp_path / "fresher" / "merges" / copy.name / "model.safetensors").is_file()


def test_what_is_in_the_cache_is_not_made_again(
    hub: LocalHub, family: Family, cache: Path, tmp_path: Path
) -> None:
    family.add(hub)
    said: list[str] = []
    assert reproduce(family.published, say=said.append).agrees
    made = [text for text in said if text.startswith("rebuilding merge:")]
    assert len(made) == 1 and "in float32 from base, left, right" in made[0]
    said.clear()
    assert reproduce(family.published, say=said.append).agrees
    assert not [text for text in said if text.startswith("rebuilding")]


def test_a_copy_that_was_changed_is_not_used(hub: LocalHub, family: Family, cache: Path) -> None:
    family.add(hub)
    assert reproduce(family.published).agrees
    (copy,) = (cache / "merges").iterdir()
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=f"its copy in {copy} was changed .*remove the folder"):
        reproduce(family.published)
    shutil.rmtree(copy)
    assert reproduce(family.published).agrees


def test_a_parent_that_is_gone_is_still_rebuilt(hub: LocalHub, family: Family, cache: Path) -> None:
    """The child's lock holds all that the parent was made of."""
    family.add(hub)
    del hub.store.repos[REPO]
    said: list[str] = []
    assert reproduce(family.published, say=said.append).agrees
    assert [
        text for text in said if text.startswith(f"note: merge:{REPO}@") and "what lock.yaml says" in text
    ]


# --- a run that goes on


def test_a_run_keeps_to_the_commit_that_it_began_with(
    hub: LocalHub, family: Family, tmp_path: Path, cache: Path
) -> None:
    """The publication moved on, and is gone; the copy is, too: it is made again from what the lock says."""
    family.add(hub)
    recipe = child_recipe(family.fish.pico)
    run = tmp_path / "run"
    before = shoal.evolve(recipe, run, device="cpu")
    first = load_lock(run / "lock.yaml")
    assert parent(first).commit == hub.store.repos[REPO].commit().oid
    hub.foreign_commit(REPO, "lock.yaml")
    shutil.rmtree(cache)
    (run / "DONE").unlink()
    asked = hub.count("GET", REPO)
    assert runs.stable(shoal.evolve(recipe, run, device="cpu")) == runs.stable(before)
    assert load_lock(run / "lock.yaml") == first and hub.count("GET", REPO) == asked
    assert Path(parent(first).folder, "model.safetensors").is_file()
    shutil.rmtree(cache)
    assert shoal.merge(run, tmp_path / "out") == tmp_path / "out"
    assert weights.sha256(tmp_path / "out") == before["weights_sha256"]


def test_from_as_parent(
    hub: LocalHub, family: Family, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--from REPO --as parent`, with a recipe and without, and again after the publication moved on."""
    family.add(hub)
    keys = hub_recipe() | {"name": "third", "models": ["anna/left"], "search": SEARCH}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(family.fish.pico.recipe(**keys)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").symlink_to(family.fish.pico.tasks)
    commit = hub.store.repos[REPO].commit().oid
    with_recipe = [
        "evolve",
        str(path),
        "--from",
        REPO,
        "--as",
        "parent",
        "--run",
        "a",
        "--device",
        "cpu",
        "-q",
    ]
    alone = ["evolve", "--from", REPO, "--as", "parent", "--run", "b", "--device", "cpu", "-q"]
    for command, names in ((with_recipe, ["left", "fish"]), (alone, ["left", "right", "fish"])):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        lock = load_lock(tmp_path / command[command.index("--run") + 1] / "lock.yaml")
        assert [model.name for model in lock.models] == ["base", *names]
        assert (parent(lock).commit, len(lock.inherited)) == (commit, 1)
    hub.foreign_commit(REPO)
    for command in (with_recipe, alone):
        again = CliRunner().invoke(app, command)
        assert again.exit_code == 0 and "shoal merge" in again.output, again.output
    other = CliRunner().invoke(app, [*alone[:2], CHILD, *alone[3:]])
    assert other.exit_code == 2 and f"did not begin from {CHILD}" in other.stderr
    twice = CliRunner().invoke(app, ["evolve", str(path), "--as", "parent"])
    assert twice.exit_code == 2 and "by --from" in twice.stderr
    wrong = CliRunner().invoke(app, ["evolve", str(path), "--from", REPO, "--as", "uncle"])
    assert wrong.exit_code == 2 and "expected start or parent" in wrong.stderr


# --- what else may be one


def test_runs_and_publications_here(hub: LocalHub, family: Family, tmp_path: Path, cache: Path) -> None:
    """A finished run and a publication's folder, or its lock.yaml, give the very copy that the Hub's gives."""
    family.fish.add(hub)
    for place in (family.fish.run, family.fish.recipe, family.fish.weights / "lock.yaml"):
        recipe = child_recipe(family.fish.pico, models=["anna/left", f"merge:{place}"])
        prepared = prepare(recipe, Path(), merges=merges_of(recipe, Path()))
        model = parent(prepared.lock)
        assert model.files == parent(load_lock(family.run / "lock.yaml")).files and model.commit is None
        before = openings_before(recipe, prepared.lock, tmp_path / "none")
        assert before.openings == load_published(family.fish.recipe / "lock.yaml").openings
    assert len(list((cache / "merges").iterdir())) == 1


def test_a_child_of_an_unpublished_run(
    hub: LocalHub, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """Its lock holds the plan and the roots are on the Hub, so others can rebuild it; no folder of ours is named."""
    family.fish.add(hub)
    own = tmp_path / "home" / "fish-run"
    shutil.copytree(family.fish.run, own)
    recipe = child_recipe(family.fish.pico, models=["anna/left", f"merge:{own}"])
    shoal.evolve(recipe, tmp_path / "run", device="cpu")
    published = dry_run(tmp_path / "run", "anna/ray", tmp_path / "published")
    model = parent(published.lock.run)
    assert model.ref == "merge:./fish-run" and model.commit is None and model.merge is not None
    assert [root.ref.partition("@")[0] for root in model.merge.roots] == [
        "anna/base",
        "anna/left",
        "anna/right",
    ]
    (ancestor,) = published.lock.lineage
    assert (ancestor.relation, ancestor.reference, ancestor.name) == ("parent", "fish-run", "fish")
    for path in tmp_path.joinpath("published").rglob("*"):
        if path.suffix in (".md", ".yaml", ".yml", ".json", ".html"):
            assert str(tmp_path) not in path.read_text(), path
    shutil.rmtree(own)
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "fresh"))
    assert reproduce(tmp_path / "published").agrees


def test_roots_in_folders_cannot_be_published_as_a_recipe(pico: Any, tmp_path: Path, cache: Path) -> None:
    shoal.evolve(runs.recipe(pico, name="own", search=SEARCH), tmp_path / "own", device="cpu")
    models = [str(pico.model("left")), f"merge:{tmp_path / 'own'}"]
    recipe = runs.recipe(pico, name="second", models=models, search=SEARCH)
    shoal.evolve(recipe, tmp_path / "second", device="cpu")
    with pytest.raises(PublishError, match="parents in local folders: base, left, own"):
        dry_run(tmp_path / "second", CHILD, tmp_path / "out", license="mit")
    published = dry_run(tmp_path / "second", CHILD, tmp_path / "out", weights=True, license="mit")
    assert parent(published.lock.run).ref == "merge:./own"
    assert [opening.run for opening in published.lock.openings] == ["second", "own"]
    found = reproduce(tmp_path / "out")
    assert found.agrees and not found.rebuilt


def test_a_merge_of_merges(
    hub: LocalHub, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """A grandchild, with a merge as its base, whose dtype is then the run's; rebuilt through all generations."""
    family.add(hub)
    keys = {
        "name": "whale",
        "base_model": f"merge:{REPO}",
        "models": ["anna/left", f"merge:{CHILD}"],
        "merge": {"method": "task_arithmetic"},
        "search": SEARCH,
    }
    shoal.evolve(runs.recipe(family.fish.pico, **(hub_recipe() | keys)), tmp_path / "run", device="cpu")
    lock = load_lock(tmp_path / "run" / "lock.yaml")
    assert lock.dtype == "bfloat16"
    shark = lock.models[2].merge
    assert shark is not None and shark.generations() == 2
    published = dry_run(tmp_path / "run", "anna/whale", tmp_path / "published").lock
    assert {(a.name, tuple(b.name for b in a.lineage)) for a in published.lineage} == {
        ("fish", ()),
        ("shark", ("fish",)),
    }
    assert sorted(opening.run for opening in published.openings) == ["fish", "shark", "whale"]
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "fresh"))
    point_client(hub, tmp_path / "fresh-hf", monkeypatch)
    assert reproduce(tmp_path / "published").agrees
    names = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "fresh" / "merges").iterdir())
    assert names == ["fish", "shark"]


def test_too_many_generations(family: Family, cache: Path) -> None:
    """A lock that nests without end is refused before anything is fetched."""
    model = parent(load_published(family.published / "lock.yaml").run)
    for _ in range(MAX_GENERATIONS):
        assert model.merge is not None
        made = model.merge.model_copy(update={"roots": (model, *model.merge.roots[1:])})
        model = model.model_copy(update={"merge": made})
    with pytest.raises(CheckpointError, match=f"{MAX_GENERATIONS + 1} deep, at most {MAX_GENERATIONS}"):
        resolve_models([pinned(model)], lambda text: None, merges=merges_among([model]))


def test_an_adapter_on_a_merge(hub: LocalHub, family: Family, tmp_path: Path, cache: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    family.fish.add(hub)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(family.copy, dtype=torch.float32),
        LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "lora")
    ref = parse_model(f"merge:{REPO}+{tmp_path / 'lora'}", Path())
    (found,) = resolve_models([ref], lambda text: None, merges=merges_named([ref]))
    lock = found.lock()
    check_files(lock)
    (opened,) = open_parents([lock])
    name = "model.layers.0.self_attn.q_proj.weight"
    from shoal.merge.checkpoint import Checkpoint

    assert not torch.equal(opened.tensor(name), Checkpoint.open(family.copy).tensor(name))
    published = Names([lock]).locked(lock)
    assert published.ref == f"merge:{REPO}@{hub.store.repos[REPO].commit().oid}+./lora"
    assert (published.adapter, published.folder) == ("", "") and is_local(lock)


def test_licences_that_hold_together_are_several() -> None:
    """What shoal wrote for several licences is read as those; a run of one's own has none but its roots'."""
    both = {"license": "other", "license_name": "apache-2.0-and-mit", "license_link": "LICENSE.md"}
    there = Parent("org/both", "hub", "c" * 40, None, merge=True)
    here = Parent("mine", "local", None, None, merge=True)
    root = Parent("org/root", "hub", "d" * 40, None, root=True)
    said = {
        there: Documents(both, (("NOTICE", "Made by Ann."),), None, "README.md of org/both"),
        here: Documents({}, (), None, "mine"),
        root: Documents({"license": "mit"}, (), None, "README.md of org/root"),
    }
    found = licences_of([there, here, root], said)
    assert [(one.parent, one.licence.id if one.licence else None) for one in found] == [
        ("org/both", "apache-2.0"),
        ("org/both", "mit"),
        ("org/root", "mit"),
    ]
    assert [len(one.files) for one in found] == [1, 0, 0]
    assert hub_ids([there, here, root]) == ["org/both"]


def test_a_publication_that_is_gone(hub: LocalHub, cache: Path) -> None:
    """As a parent its lineage would be lost; among the roots it is in the lineage of another."""
    gone = Parent("org/gone", "hub", "c" * 40, None, merge=True)
    with pytest.raises(PublishError, match="no such repository"):
        documents(gone)
    root = replace(gone, root=True)
    assert licences_of([root], {root: documents(root)}) == []


def test_other_test_items_are_not_opened_by_an_ancestor() -> None:
    """One that was tested on other items passes on no opening of its own, but what it inherited may be of ours."""
    one, two, three = (Opening(run=name, winner="w", generations=1) for name in ("one", "two", "three"))
    older = Ancestor(relation="parent", reference="z", name="z", openings=(two,), shared=0)
    other = Ancestor(
        relation="parent", reference="x", name="x", openings=(one, two), shared=0, lineage=(older,)
    )
    same = Ancestor(relation="parent", reference="y", name="y", openings=(three, two), shared=5)
    assert list(inherited([other, same])) == [two, three]
    assert "tested on other items" in drawn([other])[0] and "tested" not in drawn([same])[0]


def test_offline(hub: LocalHub, family: Family, cache: Path, client: Client) -> None:
    """By its commit, once it was seen online."""
    family.fish.add(hub)
    commit = hub.store.repos[REPO].commit().oid
    recipe = child_recipe(family.fish.pico, models=["anna/left", f"merge:{REPO}@{commit}"])
    prepare(recipe, Path(), merges=merges_of(recipe, Path()))
    client.offline()
    lock = prepare(recipe, Path(), merges=merges_of(recipe, Path())).lock
    assert parent(lock).commit == commit
    before = openings_before(recipe, lock, Path("none"))
    assert [o.run for o in before.openings] == ["fish"]
    # what could not be asked before is told; so it is not of REPO, which was
    left = next(model for model in lock.models if model.ref.startswith("anna/left"))
    assert before.unknown == ("anna/base@" + str(lock.models[0].commit), f"anna/left@{left.commit}")
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE"):
        merges_of(child_recipe(family.fish.pico), Path())


# --- before a run


def test_validate_says_what_is_rebuilt(
    hub: LocalHub, family: Family, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From metadata and headers: nothing is merged, no weights are fetched."""
    family.add(hub)
    keys = hub_recipe() | {"name": "x", "models": ["anna/left", f"merge:{REPO}"], "search": SEARCH}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(family.fish.pico.recipe(**keys)))
    done = CliRunner().invoke(app, ["validate", str(path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    lines = [line.strip() for line in done.output.splitlines()]
    commits = {
        name: hub.store.repos[f"anna/{name}"].commit().oid for name in ("base", "left", "right", "fish")
    }
    (row,) = [line for line in lines if line.startswith("rebuilt ")]
    assert (
        f"fish at commit {commits['fish'][:12]} in float32 from its roots anna/base@{commits['base']}" in row
    )
    size = family.copy.joinpath("model.safetensors").stat().st_size
    assert f": {size / 1e3:.3g} kB into {cache / 'merges'}, where " in row
    assert any(f"anna/right@{commits['right']}: commit" in line and "to fetch" in line for line in lines)
    assert any("its test items were opened once before" in line for line in lines)
    assert not (cache / "merges").exists() and not list(tmp_path.rglob("hf/**/*.safetensors"))
    # with a copy in the cache, the roots are not asked for
    shutil.copytree(family.copy, cache / "merges" / family.copy.name)
    done = CliRunner().invoke(app, ["validate", str(path), "--no-estimate"], catch_exceptions=False)
    assert "the copy of" in done.output and "anna/right@" not in done.output.replace("its roots", "")[:200]
    shutil.rmtree(cache / "merges")
    monkeypatch.setattr("shoal.rebuilt.free_here", lambda: 5000)
    done = CliRunner().invoke(app, ["validate", str(path), "--no-estimate"])
    assert (
        done.exit_code == 2 and "its float32 copy has" in done.stderr and "only 5 kB are free" in done.stderr
    )


# --- what is refused


@pytest.mark.parametrize("kind", ["weights", "plan", "root", "no roots"])
def test_a_lock_that_was_changed_is_refused(
    hub: LocalHub, family: Family, tmp_path: Path, cache: Path, kind: str
) -> None:
    """One line, before anything of the run is there, and no copy is kept."""
    files = family.fish.files()
    lock = yaml.safe_load(files["lock.yaml"])
    sha = lock["winner"]["weights_sha256"]
    changed = {"lock.yaml": files["lock.yaml"].replace(sha.encode(), b"f" * 64)}
    changed["result.json"] = files["result.json"].replace(sha.encode(), b"f" * 64)
    if kind == "plan":
        lock["winner"]["plan"]["groups"][0]["sources"][0]["parameters"]["weight"] = 0.5
        changed = {"lock.yaml": json.dumps(lock).encode()}
    elif kind == "root":
        lock["run"]["models"][1]["files"]["model.safetensors"] = "e" * 64
        changed = {"lock.yaml": json.dumps(lock).encode()}
    elif kind == "no roots":
        lock["run"]["models"][1] |= {"ref": "./left", "commit": None}
        recipe = files["recipe.yaml"].replace(b"anna/left", b"./left")
        from shoal.recipe import parse_recipe

        lock["run"]["recipe_digest"] = parse_recipe(recipe.decode()).digest()
        changed = {"lock.yaml": json.dumps(lock).encode(), "recipe.yaml": recipe}
    family.fish.add(hub, dict(changed))
    expected = {
        "weights": "rebuilt from its roots it has weights_sha256 .* its lock says ffffffffffff",
        "plan": "not the one that plan_digest names",
        "root": "its root anna/left@.*: model.safetensors has sha256 .* expected eeeeeeeeeeee",
        "no roots": "cannot be rebuilt, its parents left are folders that were not published",
    }[kind]
    with pytest.raises(ShoalError, match=expected) as error:
        shoal.evolve(child_recipe(family.fish.pico), tmp_path / "run", device="cpu")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "lock.yaml").exists()
    assert not (cache / "merges").exists() or not list((cache / "merges").iterdir())


def test_a_child_that_lies_about_its_parent_is_refused(
    hub: LocalHub, family: Family, tmp_path: Path, cache: Path
) -> None:
    """What its lock says of the parent is compared with the parent's own lock."""
    family.add(hub)
    folder = tmp_path / "publication"
    shutil.copytree(family.published, folder)
    lock = yaml.safe_load((folder / "lock.yaml").read_text())
    (model,) = [m for m in lock["run"]["models"] if m["merge"]]
    model["merge"]["weights_sha256"] = "d" * 64
    (folder / "lock.yaml").write_text(json.dumps(lock))
    with pytest.raises(PublishError, match="made otherwise than the lock of that publication"):
        reproduce(folder)
    plan = MergePlan.from_json(model["merge"]["plan"])
    model["merge"]["plan"] = json.dumps(json.loads(plan.to_json()) | {"seed": 99})
    (folder / "lock.yaml").write_text(json.dumps(lock))
    with pytest.raises(PublishError, match="the plan is not the one that plan_digest names"):
        reproduce(folder)
    for root, words in (("/etc/passwd", "no local paths"), ("anna/left", "expected anna/left at a commit")):
        model["merge"]["plan"] = plan.to_json()
        model["merge"]["roots"][1]["ref"] = root
        (folder / "lock.yaml").write_text(json.dumps(lock))
        with pytest.raises(PublishError, match=words):
            reproduce(folder)
    assert not (cache / "merges").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("merge:org/x", MergeModel(HubModel("org/x"))),
        ("merge:org/x@v1", MergeModel(HubModel("org/x", "v1"))),
        ("merge:./x", MergeModel(LocalModel(Path("/f/x")))),
        ("merge:./x/lock.yaml", MergeModel(LocalModel(Path("/f/x")))),
    ],
)
def test_how_a_merge_is_written(text: str, expected: MergeModel) -> None:
    assert parse_model(text, Path("/f")) == expected
    assert parse_model(str(expected), Path("/g")) == expected


@pytest.mark.parametrize(
    "text", ["merge:", "merge:x", "merge:zoo:tiny/base", "merge:merge:a/b", "merge:a/b/c", "a/b+merge:c/d"]
)
def test_what_is_no_merge(text: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"model {text!r}: ")):
        parse_model(text, Path("/f"))


def test_a_merge_is_no_model_to_score(hub: LocalHub, family: Family, cache: Path) -> None:
    with pytest.raises(CheckpointError, match=f"`shoal download {REPO}`"):
        shoal.score(f"merge:{REPO}", ["pico_choice"], include_path=family.fish.pico.tasks)  # type: ignore[operator]


def test_no_publication(hub: LocalHub, family: Family, tmp_path: Path, cache: Path) -> None:
    family.add(hub)
    for name, words in (
        ("merge:anna/base", "holds no lock.yaml|no publication"),
        ("merge:anna/none", "no such repository"),
        (f"merge:{tmp_path}/none", "expected the folder of a publication"),
    ):
        with pytest.raises(ShoalError, match=words):
            shoal.evolve(child_recipe(family.fish.pico, models=["anna/left", name]), tmp_path / "run")
        assert not (tmp_path / "run" / "lock.yaml").exists()
