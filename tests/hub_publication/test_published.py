"""The published lock: its schema is the documented one, it reads back as itself, and attacks by it are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal.errors import PublishError
from shoal.hub.publication import Publication
from shoal.hub.published import (
    SCHEMA_FILE,
    Ancestor,
    PublishedLock,
    json_schema,
    load_published,
    parse_published,
)
from shoal.hub.safe_yaml import read_yaml
from shoal.preflight import restore
from shoal.recipe import load_recipe

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"


@pytest.fixture(scope="module")
def data(recipe_only: Publication) -> dict[str, Any]:
    return dict(yaml.safe_load((recipe_only.folder / "lock.yaml").read_text()))


def test_the_documented_schema_is_this_one() -> None:
    path = SCHEMAS / SCHEMA_FILE
    assert path.read_text() == json_schema(), (
        f"the lock changed: python -c 'from shoal.hub.published import *; print(json_schema(), end=\"\")' > {path.name}"
    )


def test_a_published_lock_is_valid_by_the_documented_schema(data: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((SCHEMAS / SCHEMA_FILE).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(data, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data | {"surprise": 1}, schema)


def test_it_reads_back_as_itself(recipe_only: Publication) -> None:
    read = load_published(recipe_only.folder / "lock.yaml")
    assert read == recipe_only.lock
    assert read.to_yaml() == (recipe_only.folder / "lock.yaml").read_text()
    assert read.winner.merge_plan().digest() == read.winner.plan_digest


def test_it_is_a_runs_lock_again_once_its_models_have_folders(recipe_only: Publication, pico: Any) -> None:
    read = load_published(recipe_only.folder / "lock.yaml")
    recipe = load_recipe(recipe_only.folder / "recipe.yaml")
    folders = {name: (pico.model(name), None) for name in ("base", "left", "right")}
    lock = read.lock_here(folders, pico.tasks)
    assert lock.recipe_digest == recipe.digest()
    restore(recipe, lock)  # the files have the hashes of the lock
    with pytest.raises(PublishError, match="model left: no folder"):
        read.lock_here({"base": folders["base"]})


def changed(data: dict[str, Any], *keys: str | int, value: Any) -> str:
    copy = json.loads(json.dumps(data))
    place = copy
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return yaml.safe_dump(copy)


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("run", "models", 0, "folder"), "/etc", "names no folders"),
        (("run", "models", 0, "adapter"), "../x", "names no folders"),
        (("run", "models", 0, "ref"), "/etc/passwd", "names no local paths"),
        (("run", "models", 0, "ref"), "./../../x", "names no local paths"),
        (("run", "models", 0, "ref"), "ann/base+~/x", "names no local paths"),
        (("run", "models", 0, "ref"), "C:\\x", "names no local paths"),
        (("run", "models", 0, "files"), {"../../.bashrc": "0" * 64}, "no name of a model's file"),
        (("run", "models", 0, "files"), {"a/b.json": "0" * 64}, "no name of a model's file"),
        (("run", "include_path"), "/home/x/tasks", "no include_path"),
        (("winner", "plan", "seed"), 5, "not the one that plan_digest names"),
        (("winner", "plan"), {"models": 3}, "winner.plan|merge plan"),
        (("winner", "weights_sha256"), "xyz", "weights_sha256"),
        (("schema_version",), 99, "schema 99"),
        (("format",), "lock", "not a published lock"),
        (("surprise",), 1, "surprise"),
        (("verdict",), "best ever", "verdict"),
    ],
)
def test_a_lock_that_lies_is_refused(
    data: dict[str, Any], keys: tuple[Any, ...], value: Any, words: str
) -> None:
    with pytest.raises(PublishError, match=words) as error:
        parse_published(changed(data, *keys, value=value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [x, x]\nb: [*a, *a]", "lock.yaml:2: aliases are not allowed"),
        ("a: !!python/object/apply:os.system [id]", "tag .*python/object.* is not allowed"),
        ("a: !include /etc/passwd", "tag '!include' is not allowed"),
        ("[" * 200 + "]" * 200, "nested deeper"),
        ("a: [1, ", "not valid YAML"),
        ("a: 2024-99-99", "not valid YAML"),
        ("- 1", "not a published lock"),
    ],
)
def test_yaml_that_attacks_is_refused(text: str, words: str) -> None:
    with pytest.raises(PublishError, match=words):
        parse_published(text)


def test_yaml_is_bounded() -> None:
    assert read_yaml("a: [1, 2.5, x]", "x") == {"a": [1, 2.5, "x"]}
    with pytest.raises(PublishError, match="expected at most 10"):
        read_yaml("a: 'some text'", "x", limit=10)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="no such lock"):
        load_published(tmp_path / "lock.yaml")
    (tmp_path / "lock.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(PublishError, match="not UTF-8"):
        load_published(tmp_path / "lock.yaml")


def test_lineage_nests(data: dict[str, Any]) -> None:
    old = {"relation": "parent", "reference": "ann/old@1", "name": "old"}
    line = {"relation": "parent", "reference": "ann/new@2", "name": "new", "lineage": [old]}
    read = parse_published(changed(data, "lineage", value=[line]))
    assert isinstance(read, PublishedLock)
    assert read.lineage[0].lineage[0] == Ancestor(relation="parent", reference="ann/old@1", name="old")
