"""Runs become folders that others can use, and that hold nothing private."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import yaml
from hub_publication.places import COMMITS, HOST, PLAIN_TOKEN, SECRET_TOKEN, USER, HubCache

from shoal.errors import CheckpointError, PublishError, RunError
from shoal.evals.scorer import restored
from shoal.hub.items import private_data
from shoal.hub.lineage import lineage
from shoal.hub.privacy import leaks
from shoal.hub.publication import Publication, build, describe
from shoal.hub.published import Ancestor, PublishedTask, load_published
from shoal.hub.tolerance import tolerance
from shoal.journal import Journal
from shoal.lock import load_lock
from shoal.recipe import load_recipe
from shoal.report import write_plots
from shoal.run import evolve
from shoal.types import ROLES


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    import pyarrow.parquet

    found: list[dict[str, Any]] = pyarrow.parquet.read_table(
        folder / "journal" / f"{name}.parquet"
    ).to_pylist()
    return found


def content(folder: Path) -> dict[str, str]:
    """Every file as text, parquet decoded."""
    import pyarrow.parquet

    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.suffix == ".parquet":
            table = pyarrow.parquet.read_table(path)
            found[path.name] = f"{table.schema.metadata}\n{table.to_pylist()}"
        else:
            found[path.name] = path.read_bytes().decode("utf-8", "replace")
    return found


# --- recipe only


def test_a_recipe_is_published_with_everything_but_weights(recipe_only: Publication) -> None:
    names = {file.path for file in recipe_only.files}
    assert names >= {
        *("README.md", "recipe.yaml", "lock.yaml", "mergekit_config.yml", "result.json", "NOTICE"),
        *(
            "report.html",
            "convergence.png",
            "journal/scores.parquet",
            "journal/events.parquet",
            "licences/ann--left/NOTICE.txt",
        ),
    }
    assert not any(name.endswith((".safetensors", ".sqlite")) for name in names)
    assert {
        p.relative_to(recipe_only.folder).as_posix() for p in recipe_only.folder.rglob("*") if p.is_file()
    } == names
    assert sum((recipe_only.folder / f.path).stat().st_size for f in recipe_only.files) == recipe_only.size


def test_the_recipe_is_the_runs_own(hub_run: Path, recipe_only: Publication) -> None:
    own, published = load_recipe(hub_run / "recipe.yaml"), load_recipe(recipe_only.folder / "recipe.yaml")
    assert published.models == own.models == ("ann/left", "ann/right")
    # the tasks' folder is of this machine
    assert published.evaluation.include_path == "./tasks"
    assert published.model_copy(update={"evaluation": own.evaluation}) == own


def test_the_lock_is_complete(hub_run: Path, recipe_only: Publication) -> None:
    lock, run = load_published(recipe_only.folder / "lock.yaml"), load_lock(hub_run / "lock.yaml")
    result = json.loads((hub_run / "result.json").read_text())
    assert [m.ref for m in lock.run.models] == [f"ann/{n}@{COMMITS[n]}" for n in ("base", "left", "right")]
    assert [m.files for m in lock.run.models] == [m.files for m in run.models]
    assert lock.run.tasks == run.tasks and lock.run.seeds == run.seeds and lock.run.libraries == run.libraries
    assert lock.winner.weights_sha256 == result["weights_sha256"] and lock.winner.id == result["winner"]["id"]
    assert (lock.device.kind, lock.device.dtype, lock.weights_published) == ("cpu", "float32", False)
    assert [(o.run, o.winner) for o in lock.openings] == [("fish", result["winner"]["id"])]
    assert lock.tolerance.same_kind == 0 and 0.005 <= lock.tolerance.other_kind <= 1
    for task in lock.tasks:
        assert task.custom and task.source is None and task.dataset is None
        assert task.requests is not None and set(task.requests) == set(ROLES)


def test_mergekit_finds_the_parents_by_their_commits(recipe_only: Publication) -> None:
    text = (recipe_only.folder / "mergekit_config.yml").read_text()
    config = yaml.safe_load(text)
    assert [m["model"] for m in config["models"]] == [f"ann/{n}@{COMMITS[n]}" for n in ("left", "right")]
    assert config["base_model"] == f"ann/base@{COMMITS['base']}"
    assert text.startswith("# Written by shoal for plain mergekit")
    assert "Gives the weights that shoal made, within" in text


def test_every_score_of_the_journal_is_published(hub_run: Path, recipe_only: Publication) -> None:
    journal, lock = Journal(hub_run / "journal.sqlite"), load_lock(hub_run / "lock.yaml")
    published = {
        (r["candidate"], r["role"], r["task"], r["item"], r["rung"]): r
        for r in rows(recipe_only.folder, "scores")
    }
    try:
        evaluations = journal.evaluations()
        assert len(published) == sum(e.items for e in evaluations)
        for evaluation in evaluations:
            rung = evaluation.rung
            for score in journal.scores(evaluation.candidate, evaluation.role, rung, rung):
                row = published[evaluation.candidate, evaluation.role, score.task, score.item, rung]
                assert row["logliks"] == list(score.logliks) and row["objective"] == score.objective
                task = lock.task(score.task)
                if task.metric in score.metrics:
                    assert row["value"] == restored(score.metrics[task.metric])
                    assert row["correct"] == bool(row["value"])
                role = task.roles[evaluation.role]
                assert row["doc_hash"] == role.hashes[role.items.index(score.item)]
        told = {
            (r["generation"], r["candidate"]): r["fitness"] for r in rows(recipe_only.folder, "generations")
        }
        assert told == {(g, c): f for g, fitness in journal.tells().items() for c, f in fitness.items()}
        assert [r["candidate"] for r in rows(recipe_only.folder, "candidates")] == [
            c.id for c in journal.candidates()
        ]
    finally:
        journal.close()


def test_texts_of_items_stay_here(pico: Any, recipe_only: Publication) -> None:
    words = {
        json.loads(line)["word"] for p in pico.tasks.glob("*.jsonl") for line in p.read_text().splitlines()
    }
    everything = content(recipe_only.folder)
    for name, text in everything.items():
        if name.endswith((".png", ".html")):
            continue
        # `abcde:` is a prompt, `'abcde'` a target in a decoded table
        assert not any(f"{word}:" in text or f"'{word}'" in text for word in words), name
    html = everything.get("report.html", "")
    assert not any(f"{word}:" in html for word in words)


def test_the_same_run_gives_the_same_files(hub_run: Path, recipe_only: Publication, tmp_path: Path) -> None:
    again = build(hub_run, "ann/fish", out=tmp_path / "again")
    first = {f.path: f.sha256 for f in recipe_only.files if not f.path.endswith((".png", ".html"))}
    assert {f.path: f.sha256 for f in again.files if not f.path.endswith((".png", ".html"))} == first


def test_what_will_be_published_is_told_exactly(recipe_only: Publication) -> None:
    text = describe(recipe_only)
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0].startswith(f"ann/fish (recipe only, no weights), {len(recipe_only.files)} files")
    for file in recipe_only.files:
        assert any(line.startswith(file.path) for line in lines)
    assert "licence: apache-2.0" in lines
    assert any("prompts and targets of pico_choice, pico_next are not published" in line for line in lines)
    assert str(recipe_only.folder) not in text


# --- weights


@pytest.fixture(scope="module")
def with_weights(hub_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Publication:
    out = tmp_path_factory.mktemp("published") / "weights"
    return build(hub_run, "ann/fish", weights=True, include_item_text=True, out=out)


def test_weights_load_and_are_the_winners(hub_run: Path, with_weights: Publication) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    from shoal.merge.checkpoint import Checkpoint
    from shoal.merge.hashing import weights_sha256

    result = json.loads((hub_run / "result.json").read_text())
    checkpoint = Checkpoint.open(with_weights.folder)
    found = weights_sha256((name, checkpoint.tensor(name)) for name in checkpoint.names)
    assert found == result["weights_sha256"] == with_weights.lock.winner.weights_sha256
    assert AutoTokenizer.from_pretrained(with_weights.folder)("abc").input_ids
    assert GenerationConfig.from_pretrained(with_weights.folder).eos_token_id == 2
    assert with_weights.lock.weights_published
    assert max(f.size for f in with_weights.files) < 10**9


def test_with_item_text_the_requests_of_custom_tasks_are_data(pico: Any, with_weights: Publication) -> None:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(with_weights.folder / "items.parquet").to_pylist()
    lock = with_weights.lock.run
    for task in lock.tasks:
        for role in ROLES:
            mine = [r for r in table if r["task"] == task.task and r["role"] == role]
            assert tuple(dict.fromkeys(r["item"] for r in mine)) == task.roles[role].items
            assert tuple(dict.fromkeys(r["doc_hash"] for r in mine)) == task.roles[role].hashes
    docs = [json.loads(line) for line in (pico.tasks / "test.jsonl").read_text().splitlines()]
    for row in table:
        if row["task"] == "pico_choice" and row["role"] == "test":
            doc = docs[row["item"]]
            assert row["context"] == f"{doc['word']}:" and json.loads(row["target"]) == doc["gold"]
            assert row["continuation"] == doc["options"][row["request"]] and row["kind"] == "loglikelihood"
    assert any("items.parquet publishes prompts" in note for note in with_weights.notes)


def test_settings_of_a_parent_that_name_a_folder_are_cleaned(
    hub: HubCache, hub_run: Path, tmp_path: Path, pico: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(hub_run, run)
    base = tmp_path / "base"
    shutil.copytree(pico.model("base"), base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["name_or_path"] = str(tmp_path / "trained" / "here")
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    import hashlib

    lock = load_lock(run / "lock.yaml")
    files = lock.models[0].files | {
        "tokenizer_config.json": hashlib.sha256((base / "tokenizer_config.json").read_bytes()).hexdigest()
    }
    model = lock.models[0].model_copy(update={"folder": str(base), "files": files})
    (run / "lock.yaml").write_text(lock.model_copy(update={"models": (model, *lock.models[1:])}).to_yaml())
    found = build(run, "ann/fish", weights=True, out=tmp_path / "out")
    written = json.loads((found.folder / "tokenizer_config.json").read_text())
    assert "name_or_path" not in written and written["pad_token"] == "<pad>"
    assert "tokenizer_config.json: paths of this machine were removed" in found.left_out


# --- what is refused


def test_local_parents_block_a_recipe_and_leave_nothing(secret_run: Path, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=r"local folders: base, left, right.*--weights"):
        build(secret_run, "ann/fish", license="mit", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_parents_without_a_licence_are_refused(secret_run: Path, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=r"licence of base \(and 2 more\).*--license"):
        build(secret_run, "ann/fish", weights=True, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "repo", ["fish", "a/b/c", "ann/a fish", "ann/..", "../x", "ann/fish--x", "ann/x" + 100 * "y"]
)
def test_repos_must_have_names(hub_run: Path, tmp_path: Path, repo: str) -> None:
    with pytest.raises(PublishError, match="expected a repository as user/name"):
        build(hub_run, repo, out=tmp_path / "out")


def test_a_run_must_be_finished_and_the_folder_new(hub_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(hub_run, run)
    (run / "DONE").unlink()
    with pytest.raises(RunError, match="no finished run"):
        build(run, "ann/fish", out=tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        build(hub_run, "ann/fish", out=tmp_path / "full")
    assert (tmp_path / "full" / "x").read_text() == "x"


def test_events_of_ours_are_published_whole(hub_run: Path, recipe_only: Publication) -> None:
    found = {row["kind"]: json.loads(row["data"]) for row in rows(recipe_only.folder, "events")}
    (ended,) = Journal(hub_run / "journal.sqlite").events("search ended")
    assert found["search ended"] == ended and ended["reason"] == "search.budget (12 candidates)"


# --- privacy


def test_nothing_private_is_published(secret_run: Path, own_machine: Path, tmp_path: Path) -> None:
    """Paths, names, tokens and tracebacks stand in the journal, and in no published file."""
    from shoal.hub.privacy import Secrets

    in_journal = (secret_run / "journal.sqlite").read_bytes() + (secret_run / "lock.yaml").read_bytes()
    for secret in (SECRET_TOKEN, PLAIN_TOKEN, USER, HOST, "Traceback"):
        assert secret.encode() in in_journal
    found = build(secret_run, "ann/fish", weights=True, license="mit", out=tmp_path / "out")
    everything = content(found.folder)
    assert len(everything) > 12 and "scores.parquet" in everything
    for name, text in everything.items():
        for secret in (SECRET_TOKEN, PLAIN_TOKEN, str(own_machine), USER, str(secret_run), "Traceback"):
            assert secret not in text, (name, secret)
        assert HOST not in text and "heart-of-gold" not in text, name
        assert str(tmp_path.parent) not in text and "kernel.cu" not in text, name
    assert leaks(found.folder, Secrets.of_machine([secret_run])) == []
    errors = [r["error"] for r in rows(found.folder, "evaluations") if r["status"] == "failed"]
    assert errors and all(
        e.startswith("no space left in <path> of <name> for <name>: token <token>") for e in errors
    )
    whats = [json.loads(r["data"])["what"] for r in rows(found.folder, "events") if r["kind"] == "disturbed"]
    assert whats and set(whats) == {"memory ran out in <path>"}
    models = [m.ref for m in found.lock.run.models]
    assert models == ["./base", "./left", "./right"]
    assert load_recipe(found.folder / "recipe.yaml").base_model == "./base"


def test_users_may_be_called_as_words_of_every_recipe(
    hub_run: Path, recipe_only: Publication, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "mergekit")
    for number, name in enumerate(("models", "uniform", "max")):
        monkeypatch.setenv("LOGNAME", name)
        found = build(hub_run, "ann/fish", out=tmp_path / str(number))
        same = [f for f in found.files if f.path in ("recipe.yaml", "result.json", "lock.yaml")]
        assert {f.sha256 for f in same} <= {f.sha256 for f in recipe_only.files} and len(same) == 3


def test_what_scrubbing_missed_stops_the_publication(
    hub_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(hub_run, run)
    write_plots(run)
    monkeypatch.setenv("HF_TOKEN", "fish-and-chips-0001")
    picture = (run / "convergence.png").read_bytes()
    (run / "convergence.png").write_bytes(picture + b"\0\0\0\x13tEXtfish-and-chips-0001\0\0\0\0")
    with pytest.raises(PublishError, match=r"convergence\.png holds a token") as error:
        build(run, "ann/fish", out=tmp_path / "out")
    assert "fish-and-chips" not in str(error.value)
    assert not (tmp_path / "out").exists()


# --- descendants


def test_a_descendant_inherits_what_its_ancestors_opened(
    hub: HubCache, with_weights: Publication, pico: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A published merge as a parent, and a finished run as the start of a search."""
    card = (with_weights.folder / "README.md").read_text()
    hub.add("first", with_weights.folder, card)
    recipe = runs.recipe(
        pico,
        name="second",
        base_model="ann/base",
        models=["ann/first", "ann/right"],
        search={"budget": 4, "popsize": 4, "items": 16},
    )
    run = tmp_path / "second"
    evolve(recipe, run, device="cpu")
    lock = build(run, "ann/second", out=tmp_path / "out").lock
    (ancestor,) = lock.lineage
    assert ancestor.relation == "parent" and ancestor.reference == f"ann/first@{COMMITS['first']}"
    assert ancestor.weights_sha256 == with_weights.lock.winner.weights_sha256
    assert ancestor.openings == with_weights.lock.openings
    assert [o.run for o in lock.openings] == ["second", "fish"]
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"- parent: `ann/first@{COMMITS['first']}` (fish" in text
    assert "The test items were opened 2 times, ancestors' runs included." in text


def test_the_start_of_a_search_is_an_ancestor(
    hub_run: Path, with_weights: Publication, tmp_path: Path
) -> None:
    """A finished run, a published one, and one that is not to be found any more."""
    recipe = load_recipe(hub_run / "recipe.yaml")

    def ancestor(source: str) -> Ancestor:
        search = recipe.search.model_copy(update={"warm_start": source})
        (found,) = lineage(recipe.model_copy(update={"search": search}), tmp_path / "run", [], {})
        assert found.relation == "warm start" and found.reference == Path(source).name
        return found

    for place in (hub_run, with_weights.folder):
        found = ancestor(str(place))
        assert found.weights_sha256 == with_weights.lock.winner.weights_sha256 and found.name == "fish"
        assert found.openings == with_weights.lock.openings and len(found.openings) == 1
        assert found.parents == tuple(m.ref for m in with_weights.lock.run.models)
    lost = ancestor(str(tmp_path / "gone" / "best.yaml"))
    assert (lost.name, lost.weights_sha256, lost.openings) == ("best.yaml", None, ())


def test_a_data_set_that_cannot_be_looked_up_counts_as_gated(hub: HubCache) -> None:
    own = PublishedTask(task="own", custom=True)
    theirs = PublishedTask(task="theirs", custom=True, dataset="ann/secret")
    assert private_data([own, theirs]) == {
        "theirs": "theirs: its data set ann/secret is not to be looked up on the Hub, so perhaps gated"
    }


def test_another_device_may_flip_what_is_close(hub_run: Path) -> None:
    lock = load_lock(hub_run / "lock.yaml")
    winner = json.loads((hub_run / "result.json").read_text())["winner"]["id"]
    exact, short = (tolerance(hub_run, lock, winner, dtype) for dtype in ("float32", "bfloat16"))
    assert exact.same_kind == short.same_kind == 0
    assert 0.005 <= exact.other_kind <= short.other_kind <= 1 and exact.loglik < short.loglik
    journal = Journal(hub_run / "journal.sqlite")
    try:
        scores = journal.scores(winner, "test")
    finally:
        journal.close()
    best = [sorted(score.logliks, reverse=True) for score in scores if score.task == "pico_choice"]
    assert short.other_kind == round(sum(a - b < 1.0 for a, b, *_ in best) / len(scores), 6)
