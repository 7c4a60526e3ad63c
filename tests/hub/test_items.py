"""`reproduce --score` by a reader who has none of the publisher's tasks: from the published items, as data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub.client import point_client
from hub.local_hub import LocalHub
from hub.publications import REPO, Made, make
from typer.testing import CliRunner

from shoal.cli import app
from shoal.errors import PublishError
from shoal.hub import item_file
from shoal.hub.generation import check_generation
from shoal.hub.item_file import COLUMNS, FILE, read_items
from shoal.hub.published import load_published
from shoal.hub.reproduce import reproduce
from shoal.hub.score_file import COMPARED

Row = dict[str, Any]
DIGITS = {
    "name": "first",
    "filter": [{"function": "regex", "regex_pattern": "([a-z])"}, {"function": "take_first"}],
}


def shoal(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def score(source: str | Path, *more: str) -> Any:
    return shoal("reproduce", str(source), "--score", "--device", "cpu", "-q", *more)


def own_tasks(pico: Any, folder: Path) -> Path:
    """pico's tasks, and one whose answers are picked out of texts by a pattern."""
    shutil.copytree(pico.tasks, folder)
    for path in folder.glob("*.yaml"):
        path.write_text(path.read_text().replace(str(pico.tasks), str(folder)))
    picked = json.loads((folder / "pico_write.yaml").read_text()) | {
        "task": "pico_picked",
        "filter_list": [DIGITS],
    }
    (folder / "pico_picked.yaml").write_text(json.dumps(picked))
    return folder


@pytest.fixture(scope="module")
def told(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A publication with item text: of a choice, a continuation and two generation tasks."""
    place = tmp_path_factory.mktemp("told")
    folder = own_tasks(pico, place / "tasks")
    metrics = {
        "pico_choice": "acc",
        "pico_next": "acc",
        "pico_write": "exact_match",
        "pico_picked": "exact_match",
    }
    tasks = [{"task": task, "metric": metric} for task, metric in metrics.items()]
    evaluation = {"include_path": str(folder), "batch_size": 64}
    return make(pico, place, item_text=True, tasks=tasks, evaluation=evaluation)


def test_from_published_items_nothing_is_flipped(
    hub: LocalHub, told: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published with item text, reproduced in an empty cache without the tasks: the same numbers."""
    told.add(hub)
    point_client(hub, tmp_path / "fresh", monkeypatch)
    monkeypatch.delenv("HF_TOKEN")
    done = score(REPO)
    assert done.exit_code == 0, done.output
    assert "from items.parquet" in done.stdout and "NO" not in done.stdout
    assert "weights and log-likelihoods agree; correctness of pico_picked was not compared" in done.stdout
    assert "note: pico_picked: only log-likelihoods are compared; exact_match,first needs" in done.stdout
    found = reproduce(REPO, score=True, device="cpu")
    assert found.agrees and found.unjudged == ("pico_picked",)
    rows = {(row.task, row.role): row for row in found.scores}
    lock = load_published(told.recipe / "lock.yaml")
    for task in lock.run.tasks:
        for role in COMPARED:
            row = rows[task.task, role]
            assert row.items == len(task.roles[role].items) > 0 and row.flips == 0
            assert row.judged is (task.task != "pico_picked")
            assert row.largest is not None and row.largest < 1e-4
    assert not any(check.what.startswith("flips pico_picked") for check in found.checks)


def test_items_and_tasks_give_the_same_scores(hub: LocalHub, told: Made) -> None:
    told.add_parents(hub)
    data = reproduce(told.recipe, score=True, device="cpu")
    here = reproduce(told.recipe, score=True, device="cpu", include_path=told.run.parent / "tasks")
    assert here.agrees and not here.unjudged and all(row.judged for row in here.scores)
    origins = [c.found for c in here.checks if c.what.startswith("items ")]
    assert origins == ["from --include-path"] * 4
    for one, other in zip(data.scores, here.scores, strict=True):
        assert (one.task, one.role, one.items, one.flips) == (
            other.task,
            other.role,
            other.items,
            other.flips,
        )
        assert one.largest == pytest.approx(other.largest, abs=1e-5)


def test_scores_that_differ_are_told_from_items_too(hub: LocalHub, told: Made, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    told.add_parents(hub)
    folder = tmp_path / "publication"
    shutil.copytree(told.recipe, folder)
    path = folder / "journal" / "scores.parquet"
    table = pyarrow.parquet.read_table(path)
    rows = table.to_pylist()
    winner = load_published(folder / "lock.yaml").winner.id
    for task in ("pico_choice", "pico_next", "pico_write"):
        row = next(r for r in rows if (r["candidate"], r["role"], r["task"]) == (winner, "test", task))
        row["metrics"] = json.dumps({key: 1.0 - value for key, value in json.loads(row["metrics"]).items()})
    moved = next(
        r for r in rows if (r["candidate"], r["role"], r["task"]) == (winner, "select", "pico_picked")
    )
    moved["logliks"] = [moved["logliks"][0] - 0.5]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, table.schema), path)
    found = reproduce(folder, score=True, device="cpu")
    assert {check.what for check in found.checks if not check.agrees} == {
        "flips pico_choice test",
        "flips pico_next test",
        "flips pico_write test",
        "log-likelihood pico_picked select",
    }


def test_tasks_of_that_name_with_other_items_give_way_to_the_published_ones(
    hub: LocalHub, told: Made, tmp_path: Path
) -> None:
    told.add_parents(hub)
    other = tmp_path / "tasks"
    shutil.copytree(told.pico.tasks, other)  # without pico_picked
    for path in other.glob("*.yaml"):
        path.write_text(path.read_text().replace(str(told.pico.tasks), str(other)))
    text = (other / "test.jsonl").read_text()
    (other / "test.jsonl").write_text(text.replace('"word": "a', '"word": "b'))
    found = reproduce(told.recipe, score=True, include_path=other, device="cpu")
    assert found.agrees
    origins = {c.what: c.found for c in found.checks if c.what.startswith("items ")}
    assert set(origins.values()) == {"from items.parquet"}
    notes = {note.partition(":")[0]: note for note in found.notes if "the published items are scored" in note}
    assert {f"items {name}" for name in notes} == origins.keys() and len(notes) == 4
    assert "the data set has changed" in notes["pico_choice"] and "no such task" in notes["pico_picked"]


def test_without_item_text_the_error_says_what_to_do(hub: LocalHub, made: Made) -> None:
    made.add_parents(hub)
    done = score(made.recipe)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert "pico_choice, pico_next are the publisher's own, their items were not published" in done.stderr
    assert "by --include-path, or ask the author to publish with --include-item-text" in done.stderr


def test_a_metric_without_rule_and_log_likelihood_is_refused(
    hub: LocalHub, told: Made, tmp_path: Path
) -> None:
    """A generation task whose answers a pattern picks, and whose items have no gold answer."""

    def without_gold(rows: list[Row]) -> list[Row]:
        return [row for row in rows if row["task"] != "pico_picked" or row["kind"] == "generate_until"]

    folder = changed(told, tmp_path, without_gold)
    lock = yaml.safe_load((folder / "lock.yaml").read_text())
    task = next(task for task in lock["tasks"] if task["task"] == "pico_picked")
    task["requests"] = digests(folder, "pico_picked")
    (folder / "lock.yaml").write_text(yaml.safe_dump(lock))
    done = score(folder)
    assert (
        done.exit_code == 2
        and "exact_match,first cannot be computed without the task's own files" in done.stderr
    )
    assert "--include-path" in done.stderr


# --- what is changed is refused


def changed(told: Made, tmp_path: Path, change: Callable[[list[Row]], list[Row] | None]) -> Path:
    import pyarrow.parquet

    folder = tmp_path / "publication"
    shutil.copytree(told.recipe, folder)
    rows = pyarrow.parquet.read_table(folder / FILE).to_pylist()
    rows = change(rows) or rows
    item_file.write(folder / FILE, {name: [row[name] for row in rows] for name in COLUMNS})
    return folder


def digests(folder: Path, task: str) -> dict[str, str]:
    """Hashes of a task's requests as an honest publisher would write them."""
    import hashlib

    import pyarrow.parquet

    found = {}
    for role in ("search", "select", "test"):
        digest = hashlib.sha256()
        rows = [r for r in pyarrow.parquet.read_table(folder / FILE).to_pylist() if r["task"] == task]
        for row in (r for r in rows if r["role"] == role):
            more = json.loads(row["arguments"]) if row["arguments"] else row["continuation"]
            text = json.dumps(
                [row["item"], row["kind"], row["context"], more],
                sort_keys=True,
                ensure_ascii=False,
                separators=(",", ":"),
            )
            digest.update(text.encode() + b"\n")
        found[role] = digest.hexdigest()
    return found


def pick(rows: list[Row], task: str, role: str = "test", number: int = 0) -> list[Row]:
    """The rows of one item."""
    mine = [row for row in rows if row["task"] == task and row["role"] == role]
    item = sorted({row["item"] for row in mine})[number]
    return [row for row in mine if row["item"] == item]


def set_all(task: str, **values: Any) -> Callable[[list[Row]], None]:
    def change(rows: list[Row]) -> None:
        for row in pick(rows, task):
            row.update(values)

    return change


def set_first(task: str, **values: Any) -> Callable[[list[Row]], None]:
    def change(rows: list[Row]) -> None:
        pick(rows, task)[0].update(values)

    return change


def wrong_gold(rows: list[Row]) -> None:
    mine = pick(rows, "pico_choice")
    answer = json.loads(mine[0]["answer"])
    for row in mine:
        row["answer"] = json.dumps(answer | {"gold": [(answer["gold"][0] + 1) % 4]})


def without_last(rows: list[Row]) -> list[Row]:
    last = pick(rows, "pico_choice")[-1]
    return [row for row in rows if row is not last]


def twice(rows: list[Row]) -> list[Row]:
    return [*rows, pick(rows, "pico_next")[0]]


CHANGES: dict[str, tuple[Callable[[list[Row]], list[Row] | None], str]] = {
    "a prompt": (set_first("pico_choice", context="b:"), "its requests have the hash"),
    "an option": (set_first("pico_choice", continuation="b"), "its requests have the hash"),
    "a select item": (
        lambda rows: pick(rows, "pico_write", "select")[0].update(context="b:"),
        "its requests have the hash",
    ),
    "what counts as right": (wrong_gold, "its answers have the hash"),
    "a right text": (set_all("pico_write", answer='{"gold":["zz"]}'), "its answers have the hash"),
    "right options that are none": (
        set_all("pico_choice", answer='{"choices":["a","b","c","d"],"gold":[7]}'),
        "what counts as right is not what acc needs",
    ),
    "right options of a bool": (
        set_all("pico_choice", answer='{"choices":["a","b","c","d"],"gold":[true]}'),
        "what counts as right is not what acc needs",
    ),
    "no right text": (set_all("pico_write", answer='{"gold":[]}'), "is not what exact_match needs"),
    "answers that are none": (set_all("pico_choice", answer="["), "cannot read what counts as right"),
    "deep answers": (set_all("pico_choice", answer="[" * 100_000), "cannot read what counts as right"),
    "a content hash": (set_all("pico_next", doc_hash="0" * 64), "not the one that lock.yaml names"),
    "one of two hashes": (set_first("pico_choice", doc_hash="0" * 64), "not the one that lock.yaml names"),
    "no answer": (set_first("pico_choice", answer=None), "not the one that lock.yaml names"),
    "a foreign item": (set_first("pico_next", item=10**6), "is none of the lock's"),
    "no item": (set_first("pico_next", item=None), "is none of the lock's"),
    "a request that is gone": (without_last, "requests for 4 options"),
    "a request twice": (twice, "are not all there"),
    "a request of no number": (set_first("pico_next", request=None), "are not all there"),
    "an item that is gone": (
        lambda rows: [r for r in rows if r not in pick(rows, "pico_next")],
        "are not all there",
    ),
    "another kind": (set_first("pico_next", kind="loglikelihood_rolling"), "requests of other kinds"),
    "an unknown kind": (set_first("pico_next", kind="os.system"), "without what it needs"),
    "no prompt": (set_first("pico_next", context=None), "without what it needs"),
    "code as an argument": (
        set_first("pico_write", arguments='{"custom_generate": "eve/code", "trust_remote_code": true}'),
        "'custom_generate' is none of the arguments",
    ),
    "arguments that are none": (set_first("pico_write", arguments="[1]"), "arguments of generation"),
    "too many tokens": (set_first("pico_write", arguments='{"max_gen_toks": 1e300}'), "at most"),
}


@pytest.mark.parametrize("case", list(CHANGES))
def test_changed_items_are_refused(told: Made, tmp_path: Path, case: str) -> None:
    """Before any weights are asked for: there is no Hub here."""
    change, said = CHANGES[case]
    done = score(changed(told, tmp_path, change))
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
    assert FILE in done.stderr


def test_unchanged_items_are_read(told: Made, tmp_path: Path) -> None:
    folder = changed(told, tmp_path, lambda rows: list(reversed(rows)))
    lock = load_published(folder / "lock.yaml")
    found = read_items(folder, lock, ["pico_choice", "pico_picked"], "here")
    assert set(found) == {(task, role) for task in ("pico_choice", "pico_picked") for role in COMPARED}
    assert all(len(one.instances) == 4 for one in found["pico_choice", "test"].requests.values())
    picked = found["pico_picked", "test"].requests.values()  # nothing is generated that nobody can judge
    assert all(not one.instances and one.gold is not None for one in picked)


def test_a_file_that_is_none(told: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, a link, no parquet, other columns and types, too many rows, too long texts, few bytes named often."""
    import pyarrow
    import pyarrow.parquet

    lock = load_published(told.recipe / "lock.yaml")
    path = tmp_path / FILE

    def refusal() -> str:
        with pytest.raises(PublishError) as error:
            read_items(tmp_path, lock, ["pico_next"], "here")
        return str(error.value)

    assert "not there" in refusal()
    path.symlink_to(told.recipe / FILE)
    assert "not there" in refusal()
    path.unlink()
    path.write_bytes(b"PAR1 and more, but no parquet PAR1")
    assert "not parquet that can be read" in refusal()
    whole = pyarrow.parquet.read_table(told.recipe / FILE)
    pyarrow.parquet.write_table(whole.drop(["answer"]), path)
    assert "answer is missing" in refusal()
    item = whole.column("item").cast(pyarrow.float64())
    pyarrow.parquet.write_table(whole.set_column(2, "item", item), path)
    assert "column item is of type double" in refusal()
    nested = pyarrow.array([["x"]] * whole.num_rows)
    pyarrow.parquet.write_table(whole.set_column(6, "context", nested), path)
    assert "column context is of type" in refusal()
    shutil.copyfile(told.recipe / FILE, path)
    with monkeypatch.context() as patch:
        patch.setattr(item_file, "MAX_ROWS", 10)
        assert "more than any run has" in refusal()
    with monkeypatch.context() as patch:
        patch.setattr(item_file, "MAX_TEXTS", 1000)
        assert "in all; more than any run has" in refusal()
    long = pyarrow.array(["x" * 2000] * whole.num_rows)
    pyarrow.parquet.write_table(whole.set_column(6, "context", long), path)
    with monkeypatch.context() as patch:
        patch.setattr(item_file, "MAX_TEXT", 1000)
        assert "column context has 2,000 bytes in one text" in refusal()


def test_a_recipe_may_not_name_code_for_generation(hub: LocalHub, told: Made, tmp_path: Path) -> None:
    """transformers' generate loads and runs what custom_generate names; a recipe's gen_kwargs are handed to it."""
    from shoal.recipe import parse_recipe

    folder = tmp_path / "publication"
    shutil.copytree(told.recipe, folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["evaluation"]["gen_kwargs"] = {
        "custom_generate": str(tmp_path / "code"),
        "trust_remote_code": True,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lock = yaml.safe_load((folder / "lock.yaml").read_text())
    lock["run"]["recipe_digest"] = parse_recipe((folder / "recipe.yaml").read_text()).digest()
    (folder / "lock.yaml").write_text(yaml.safe_dump(lock))
    done = score(folder, "--include-path", str(told.run.parent / "tasks"))
    assert done.exit_code == 2 and "evaluation.gen_kwargs: 'custom_generate' is none of" in done.stderr


def test_arguments_of_generation_that_are_fine() -> None:
    check_generation({"until": ["\n", "Q:"], "max_gen_toks": 256, "do_sample": False, "temperature": 0.0})
    check_generation({"until": "\n", "seed": None})
    for wrong in ({"until": [1]}, {"until": ["x"] * 65}, {"temperature": float("nan")}, {"top_p": "1"}):
        with pytest.raises(ValueError, match="expected"):
            check_generation(wrong)
