"""What a hostile repository may hold, each tried against download and reproduce: nothing runs, nothing leaves its folder.

Every attack would leave a mark: a file at `CANARY`, a request to the wrong place, or something outside of the target.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import shutil
import sqlite3
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub.local_hub import LocalHub
from hub.publications import REPO, Made
from typer.testing import CliRunner

from shoal.cli import app
from shoal.errors import ShoalError
from shoal.hub.download import download
from shoal.hub.fetch import fetch
from shoal.hub.reproduce import reproduce
from shoal.recipe import parse_recipe

Lock = dict[str, Any]

NEVER_READ = (
    "*.png",
    "report.html",
    "candidates.parquet",
    "evaluations.parquet",
    "events.parquet",
    "generations.parquet",
)


@pytest.fixture(scope="module")
def made(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Without what none of these tests is about: nearly all of them fetch every file twice."""
    place = tmp_path_factory.mktemp("lean")
    for folder in (made.recipe, made.weights):
        shutil.copytree(folder, place / folder.name, ignore=shutil.ignore_patterns(*NEVER_READ))
    return replace(made, recipe=place / made.recipe.name, weights=place / made.weights.name)


def refused(made: Made, tmp_path: Path, repo: str = REPO) -> str:
    """Download and reproduce, by their commands: one line and exit code 2, nothing left anywhere."""
    before = {path.name for path in tmp_path.iterdir()}
    texts = []
    for command in (
        ["download", repo, "-q", "-o", str(tmp_path / "out")],
        ["reproduce", repo, "-q", "--score", "--include-path", str(made.pico.tasks), "--device", "cpu"],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 2, done.output
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert "Traceback" not in done.output
        texts.append(done.stderr)
    assert {path.name for path in tmp_path.iterdir()} - before <= {"hf"}
    return texts[0]


@functools.cache
def parsed(text: bytes) -> Any:
    return yaml.safe_load(text)


def changed(made: Made, change: Callable[[Lock], None]) -> bytes:
    lock = copy.deepcopy(parsed(made.files()["lock.yaml"]))
    change(lock)
    return json.dumps(lock).encode()  # JSON is YAML


def recipe_changed(made: Made, change: Callable[[dict[str, Any]], None]) -> dict[str, bytes | None]:
    """A recipe and a lock that names it."""
    recipe = yaml.safe_load(made.files()["recipe.yaml"])
    change(recipe)
    text = yaml.safe_dump(recipe)
    digest = parse_recipe(text).digest()
    return {
        "recipe.yaml": text.encode(),
        "lock.yaml": changed(made, lambda lock: lock["run"].update(recipe_digest=digest)),
    }


# --- task YAML of the repository


def task_attacks(canary: Path) -> dict[str, dict[str, bytes]]:
    """Folders of tasks that do something when lm-eval loads them or asks them for a prompt."""
    escape = "{{ cycler.__init__.__globals__.os.popen('touch " + str(canary) + "').close() }}"
    common = {
        "task": "pico_choice",
        "dataset_path": "json",
        "test_split": "test",
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "gold",
        "doc_to_text": "{{word}}:",
    }
    files = {"data_files": {"test": "tasks/data.json", "validation": "tasks/data.json"}}
    data = json.dumps([{"word": "a", "options": ["a", "b"], "gold": 0}]).encode()
    module = f"import pathlib\npathlib.Path({str(canary)!r}).touch()\ndef f(doc): return ''\n".encode()

    def task(**changes: Any) -> bytes:
        return json.dumps({**common, "dataset_kwargs": files, **changes}).encode()

    return {
        "jinja": {"pico_choice.yaml": task(doc_to_text=escape), "data.json": data},
        "function": {
            "pico_choice.yaml": task().replace(b'"{{word}}:"', b"!function utils.f"),
            "utils.py": module,
            "data.json": data,
        },
        "include": {"pico_choice.yaml": b"include: /etc/hostname\ntask: pico_choice\n"},
        "data_files path": {"pico_choice.yaml": task(dataset_kwargs={"data_files": "/etc/passwd"})},
        "data_files url": {
            "pico_choice.yaml": task(
                dataset_kwargs={"data_files": {"test": "http://127.0.0.1:9/secret.json"}}
            )
        },
        "foreign metric": {
            "pico_choice.yaml": task(metric_list=[{"metric": "stranger/metric", "aggregation": "mean"}]),
            "data.json": data,
        },
    }


@pytest.mark.parametrize("attack", list(task_attacks(Path("x"))))
def test_tasks_of_the_repository_are_never_loaded(
    hub: LocalHub, made: Made, tmp_path: Path, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither fetched nor loaded: the user's own tasks of that name are scored, and agree; without them, an error."""
    canary = tmp_path / "canary"
    made.add(hub, {f"tasks/{name}": data for name, data in task_attacks(canary)[attack].items()})
    monkeypatch.chdir(tmp_path)
    found = download(REPO, tmp_path / "out")
    assert not (found.folder / "tasks").exists()
    with pytest.raises(ShoalError, match="never taken from a repository"):
        reproduce(REPO, score=True, device="cpu")
    assert reproduce(REPO, score=True, include_path=made.pico.tasks, device="cpu").agrees
    assert not canary.exists()
    assert hub.count("GET", "/tasks/") == hub.count("HEAD", "/tasks/") == 0


def test_the_tasks_would_do_harm(
    hub: LocalHub, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The escape works where it is let: what keeps it out above is that nothing of it is loaded."""
    from lm_eval.utils import apply_template

    canary = tmp_path / "canary"
    task = json.loads(task_attacks(canary)["jinja"]["pico_choice.yaml"])
    apply_template(task["doc_to_text"], {})
    assert canary.exists()


def test_trusted_tasks_are_used_without_python(hub: LocalHub, made: Made) -> None:
    """--trust-tasks: the repository's YAML is loaded, but Python beside it is never fetched."""
    tasks: dict[str, bytes | None] = {
        f"tasks/{path.name}": path.read_bytes() for path in made.pico.tasks.glob("*.yaml")
    }
    made.add(hub, tasks | {"tasks/utils.py": b"import os\n"})
    assert reproduce(REPO, score=True, trust_tasks=True, device="cpu").agrees
    assert hub.count("GET", "/tasks/pico_choice.yaml") and not hub.count("GET", "/tasks/utils.py")


# --- names and places


@pytest.mark.parametrize("path", ["../evil.json", "/tmp/evil.json", "a/../../evil.yaml", "C:\\evil.json"])
def test_file_names_that_leave_the_folder(hub: LocalHub, made: Made, tmp_path: Path, path: str) -> None:
    made.add(hub, {path: b"{}"})
    assert "nothing of it is fetched" in refused(made, tmp_path)


LOCAL = [
    lambda lock: lock["run"]["models"][1].update(ref="/etc"),
    lambda lock: lock["run"]["models"][1].update(ref="~/secret"),
    lambda lock: lock["run"]["models"][1].update(ref="file:///etc"),
    lambda lock: lock["run"]["models"][1].update(ref="./../../etc"),
    lambda lock: lock["run"]["models"][1].update(ref="./a/b"),
    lambda lock: lock["run"]["models"][1].update(ref="zoo:tiny/../../etc"),
    lambda lock: lock["run"]["models"][1].update(ref="zoo:tiny/base/x"),
    lambda lock: lock["run"]["models"][1].update(ref="C:\\models\\left"),
    lambda lock: lock["run"]["models"][1].update(folder="/etc"),
    lambda lock: lock["run"]["models"][1].update(adapter="/etc"),
    lambda lock: lock["run"]["models"][1]["files"].update({"../../../etc/passwd": "0" * 63 + "f"}),
    lambda lock: lock["run"].update(include_path="/etc"),
]


@pytest.mark.parametrize("number", range(len(LOCAL)))
def test_a_lock_that_names_local_paths(hub: LocalHub, made: Made, tmp_path: Path, number: int) -> None:
    made.add(hub, {"lock.yaml": changed(made, LOCAL[number])})
    refused(made, tmp_path)
    assert hub.count("GET", "/anna/left") == 0


OTHER = [
    lambda lock: lock["run"]["models"][1].update(ref="anna/left@main", commit="main"),
    lambda lock: lock["run"]["models"][1].update(commit="0" * 39 + "f"),
    lambda lock: lock["run"].update(tokenizer=7),
    lambda lock: lock["run"].update(operator="os.system@1"),
    lambda lock: lock["run"].update(dtype="float31"),
    lambda lock: lock["winner"].update(plan={}),
    lambda lock: lock["winner"]["plan"].update(seed="x"),
    lambda lock: lock.update(schema_version=99),
    lambda lock: lock.update(run=None),
    lambda lock: lock.update(surprise=1),
]


@pytest.mark.parametrize("number", range(len(OTHER)))
def test_a_lock_that_says_other_things(hub: LocalHub, made: Made, tmp_path: Path, number: int) -> None:
    made.add(hub, {"lock.yaml": changed(made, OTHER[number])})
    refused(made, tmp_path)


PLANS = [
    lambda plan: plan.update(models=["a", "b", "c"]),
    lambda plan: plan.update(dtype="__class__"),
    lambda plan: plan.update(base=9),
    lambda plan: plan["groups"][0].update(operator="exec"),
    lambda plan: plan["groups"][0].update(tensors=["../../evil"]),
    lambda plan: plan["groups"][0]["sources"][0].update(model=-1),
    lambda plan: plan["groups"][0]["sources"][0].update(group="nowhere"),
    lambda plan: plan["groups"][0]["sources"][0].update(parameters={"weight": "x"}),
    lambda plan: plan["groups"][0]["sources"].clear(),
    lambda plan: plan["groups"].pop(),
    lambda plan: plan["groups"].append(plan["groups"][0]),
]


@pytest.mark.parametrize("number", range(len(PLANS)))
def test_a_plan_that_is_none(hub: LocalHub, made: Made, tmp_path: Path, number: int) -> None:
    """With the digest that belongs to it, so that only the plan itself is wrong."""

    def change(lock: Lock) -> None:
        PLANS[number](lock["winner"]["plan"])
        text = json.dumps(lock["winner"]["plan"], sort_keys=True, separators=(",", ":"))
        lock["winner"]["plan_digest"] = hashlib.sha256(text.encode()).hexdigest()

    made.add(hub, {"lock.yaml": changed(made, change)})
    refused(made, tmp_path)


RECIPES = [
    lambda recipe: recipe.update(models=["/etc", "anna/right"]),
    lambda recipe: recipe.update(base_model="../../secret"),
    lambda recipe: recipe["evaluation"].update(include_path="/etc"),
    lambda recipe: recipe["evaluation"].update(include_path="../../tasks"),
    lambda recipe: recipe["evaluation"].update(include_path="zoo:tiny/../../tasks"),
    lambda recipe: recipe["evaluation"].update(model_args={"trust_remote_code": True}),
    lambda recipe: recipe["evaluation"].update(model_args={"pretrained": "/etc"}),
    lambda recipe: recipe["search"].update(warm_start="/etc"),
    lambda recipe: recipe["output"].update(tokenizer_source="/etc"),
    lambda recipe: recipe["output"].update(chat_template="../../../../etc/passwd"),
]


@pytest.mark.parametrize("number", range(len(RECIPES) - 1))
def test_a_recipe_that_names_places(hub: LocalHub, made: Made, tmp_path: Path, number: int) -> None:
    made.add(hub, recipe_changed(made, RECIPES[number]))
    refused(made, tmp_path)


def test_a_chat_template_that_is_a_path(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    made.add(hub, recipe_changed(made, RECIPES[-1]))
    with pytest.raises(ShoalError, match="chat_template"):
        download(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- YAML


def bomb() -> bytes:
    """A gigabyte in a few lines: ten lists of ten of the one before."""
    lines = ['a0: &a0 ["lol"]']
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return "\n".join(lines).encode()


YAMLS = {
    "aliases": bomb(),
    "python object": b"!!python/object/apply:os.system ['touch canary']\n",
    "own tag": b"name: !evil x\n",
    "function": b"name: !function utils.f\n",
    "deep": b"[" * 100_000,
    "binary": b"\xff\xfe\x00\x01",
    "not a mapping": b"- 1\n- 2\n",
    "merge keys": b"a: &a {b: 1}\nc:\n  <<: *a\n",
}


@pytest.mark.parametrize("name", ["lock.yaml", "recipe.yaml"])
@pytest.mark.parametrize("kind", list(YAMLS))
def test_yaml_that_is_not_plain(
    hub: LocalHub, made: Made, tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made.add(hub, {name: YAMLS[kind]})
    refused(made, tmp_path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["lock.yaml", "recipe.yaml", "result.json"])
def test_texts_that_are_too_large(hub: LocalHub, made: Made, tmp_path: Path, name: str) -> None:
    made.add(hub, {name: made.files()[name] + b"\n" * (65 << 20)})
    refused(made, tmp_path)


@pytest.mark.parametrize("text", [b"[]", b"{", b"[" * 100_000, b'{"winner": 1}', b"\xff"])
def test_results_that_are_none(hub: LocalHub, made: Made, tmp_path: Path, text: bytes) -> None:
    made.add(hub, {"result.json": text})
    refused(made, tmp_path)


# --- weights


def test_a_pickle_in_place_of_safetensors(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    pickle = b"cos\nsystem\n(S'touch canary'\ntR."
    made.add(hub, {"model.safetensors": None, "pytorch_model.bin": pickle}, weights=True)
    text = refused(made, tmp_path)
    assert "safetensors" in text and not hub.count("GET", "pytorch_model.bin")


def test_a_parent_that_is_a_pickle(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    made.add(hub)
    repo = hub.store.repos["anna/left"]
    old = repo.commit()
    files = {name: blob for name, blob in old.files.items() if not name.endswith(".safetensors")}
    files["pytorch_model.bin"] = files["config.json"]
    repo.commits[old.oid] = type(old)(old.oid, old.title, old.author, None, files)
    assert "model.safetensors" in refused(made, tmp_path)
    assert not hub.count("GET", "pytorch_model.bin")


def header(entries: dict[str, Any], body: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


LIES = {
    "past the end": header({"x": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}, b"\0" * 8),
    "overlapping": header(
        {
            "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
        b"\0" * 12,
    ),
    "shape": header({"x": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}}, b"\0" * 8),
    "length": struct.pack("<Q", 1 << 62) + b"{}",
    "other tensors": header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "empty": b"",
}


@pytest.mark.parametrize("lie", list(LIES))
def test_a_safetensors_header_that_lies(hub: LocalHub, made: Made, tmp_path: Path, lie: str) -> None:
    made.add(hub, {"model.safetensors": LIES[lie]}, weights=True)
    done = CliRunner().invoke(app, ["download", REPO, "-q", "-o", str(tmp_path / "out")])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, ["reproduce", REPO, "-q"])
    assert done.exit_code in (1, 2) and "Traceback" not in done.output


def test_an_index_that_leaves_the_folder(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../../secret.safetensors"}}
    changes = {"model.safetensors": None, "model.safetensors.index.json": json.dumps(index).encode()}
    made.add(hub, changes, weights=True)
    assert "outside the model's folder" in refused(made, tmp_path)


def test_an_adapter_beside_right_weights(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    """transformers would put it on by itself: the hash would be right, the model another one."""
    adapter = {
        "adapter_config.json": b'{"peft_type": "LORA"}',
        "adapter_model.safetensors": LIES["other tensors"],
    }
    made.add(hub, adapter | {"modeling.py": b"import os\n"}, weights=True)
    download(REPO, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"adapter_config.json", "adapter_model.safetensors", "modeling.py"}


# --- scores


def test_a_database_is_never_opened(
    hub: LocalHub, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "journal.sqlite"
    with sqlite3.connect(database) as journal:
        journal.execute("CREATE TABLE x (y)")
    data = database.read_bytes()
    made.add(hub, {"journal.sqlite": data, "journal/journal.sqlite": data})

    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("a database was opened")

    monkeypatch.setattr(sqlite3, "connect", opened)
    assert not list(download(REPO, tmp_path / "out").folder.rglob("*.sqlite"))
    assert reproduce(REPO, score=True, include_path=made.pico.tasks, device="cpu").agrees
    assert not hub.count("GET", ".sqlite")


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + b"\xff" * 1000 + b"PAR1", None])
def test_parquet_that_is_none(hub: LocalHub, made: Made, tmp_path: Path, data: bytes | None) -> None:
    made.add(hub, {"journal/scores.parquet": data})
    arguments = ["--score", "--include-path", str(made.pico.tasks), "--device", "cpu", "-q"]
    done = CliRunner().invoke(app, ["reproduce", REPO, *arguments])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1, done.output


def test_links_in_the_way(hub: LocalHub, made: Made, tmp_path: Path) -> None:
    """Somebody put links where the files are collected, or at the target: nothing is written through them."""
    made.add(hub)
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "out").symlink_to(victim)
    with pytest.raises(ShoalError, match="exists"):
        download(REPO, tmp_path / "out")
    (tmp_path / ".other.unchecked").symlink_to(victim)
    with pytest.raises(ShoalError, match="in the way"):
        download(REPO, tmp_path / "other")
    assert not list(victim.iterdir())
    assert fetch  # the folder of `fetch` itself is tested there
