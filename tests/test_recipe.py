"""Recipes: what is read is what was written, and everything wrong is one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from shoal.errors import RecipeError
from shoal.recipe import load_recipe, parse_model, parse_recipe
from shoal.types import AdapterModel, HubModel, LocalModel, ZooModel

MINIMAL = "name: x\nmodels: [a/b, c/d]\ntasks: [{task: t}]\n"


def test_a_recipe_survives_being_written_and_read() -> None:
    recipe = parse_recipe(
        MINIMAL + "space: {shape: blocks, bounds: {weight: [-0.2, 1]}}\nsearch: {budget: 7}\n"
    )
    assert parse_recipe(recipe.to_yaml()) == recipe


def test_the_digest_ignores_the_budget_and_nothing_else() -> None:
    recipe = parse_recipe(MINIMAL)
    assert parse_recipe(MINIMAL + "search: {budget: 999, max_seconds: 5.0}").digest() == recipe.digest()
    assert parse_recipe(MINIMAL + "search: {seed: 1}").digest() != recipe.digest()
    assert parse_recipe(MINIMAL + "output: {save_weights: true}").digest() != recipe.digest()


def test_older_words_and_yaml_switches_are_understood() -> None:
    assert parse_recipe(MINIMAL + "search: {algorithm: random}").search.optimizer == "random"
    for text, meant in (("on", "on"), ("off", "off"), ("'on'", "on"), ("auto", "auto"), ("true", "on")):
        recipe = parse_recipe(MINIMAL + f"search: {{racing: {text}}}")
        assert recipe.search.racing == meant
        assert parse_recipe(recipe.to_yaml()) == recipe


def test_a_finer_space_says_what_is_finer_and_keeps_the_rest() -> None:
    space = parse_recipe(
        MINIMAL
        + "space: {shape: uniform, tensor_types: [mlp], bounds: {weight: [0, 1]}, grow: [{shape: curve}, {coefficients: 5}]}"
    ).space
    first, second, third = space.stages()
    assert (first.shape, second.shape, third.shape) == ("uniform", "curve", "curve")
    assert (second.coefficients, third.coefficients) == (None, 5)
    assert all(
        s.tensor_types == ("mlp",) and s.bounds == space.bounds and not s.grow for s in (first, second, third)
    )
    assert parse_recipe(MINIMAL).space.stages() == (parse_recipe(MINIMAL).space,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", r"recipe:1:8: not valid YAML"),
        ("- a\n- b\n", "expected a mapping of recipe keys, found list"),
        (MINIMAL + "serch: {}", "unknown key 'serch'.*did you mean 'search'"),
        (MINIMAL + "search: {bugdet: 3}", r"unknown key 'bugdet' at 'search.bugdet'; did you mean 'budget'"),
        ("name: x\nmodels: [a/b]\ntasks: [{task: t, metrc: acc}]", "did you mean 'metric'"),
        (MINIMAL + "search: {budget: many}", r"search\.budget: .*integer, found 'many' \(str\)"),
        (MINIMAL + "search: {budget: 0}", r"search\.budget: .*greater than 0, found 0"),
        (MINIMAL + "search: {budget: 3.5}", r"search\.budget: .*found 3\.5"),
        (MINIMAL + "search: {uniform_share: 0}", r"search\.uniform_share: .*greater than 0, found 0"),
        (MINIMAL + "search: {racing: maybe}", r"search\.racing: .*'on', 'off' or 'auto', found 'maybe'"),
        (MINIMAL + "search: {item_choice: best}", "search.item_choice: .*'disagreement', found 'best'"),
        (MINIMAL + "search: {max_candidate_seconds: 0}", "greater than 0, found 0"),
        (
            MINIMAL + "search: {algorithm: random, optimizer: grid}",
            "search: optimizer and algorithm are one key",
        ),
        ("name: x\nmodels: [a/b]\ntasks: [{task: t, max_drop: 0}]", r"max_drop: .*greater than 0, found 0"),
        (
            "name: x\nmodels: [a/b]\ntasks: [{task: t, max_drop: 0.1}]\nsearch: {objective: margin}",
            "max_drop of task 't' is in units of its score",
        ),
        (MINIMAL + "space: {bounds: {weight: [1, 0]}}", r"low < high, found \[1\.0, 0\.0\]"),
        (MINIMAL + "space: {grow: [{shap: layers}]}", r"unknown key 'shap' at .*; did you mean 'shape'"),
        (MINIMAL + "space: {grow: [{}]}", r"space\.grow\.0: a finer space must differ from the one before"),
        (MINIMAL + "space: {patience: 1}", "greater than or equal to 2, found 1"),
        (MINIMAL + "space: {shape: spiral}", "space.shape: .*'curve'.*found 'spiral'"),
        ("name: x\nmodels: [a/b, a/b]\ntasks: [{task: t}]", "model 'a/b' is named 2 times"),
        ("name: x\nmodels: [a/b]\ntasks: [{task: t}, {task: t}]", "task 't' is named 2 times"),
        ("name: x\nmodels: [a/b]\n", "key 'tasks' is missing"),
        ("name: x\nname: y\n", "key 'name' twice"),
        ("a: &x [1]\nb: *x\n", "aliases are not allowed"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML: could not determine a constructor"),
    ],
)
def test_a_broken_recipe_is_one_line_that_says_where_and_what(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe(text)
    assert "\n" not in str(caught.value)


def test_a_missing_or_huge_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "huge.yaml").write_text("#" * (1 << 21))
    with pytest.raises(RecipeError, match="a recipe has at most"):
        load_recipe(tmp_path / "huge.yaml")


def test_models_are_told_apart_by_how_they_are_written(tmp_path: Path) -> None:
    assert parse_model("org/name", tmp_path) == HubModel("org/name")
    assert parse_model("org/name@v1", tmp_path) == HubModel("org/name", "v1")
    assert parse_model("gpt2", tmp_path) == HubModel("gpt2")
    assert parse_model("./x", tmp_path) == LocalModel((tmp_path / "x").resolve())
    assert parse_model("/abs/x", tmp_path) == LocalModel(Path("/abs/x"))
    assert parse_model("zoo:tiny/base", tmp_path) == ZooModel("tiny", "base")
    assert parse_model("org/name+./lora", tmp_path) == AdapterModel(
        HubModel("org/name"), LocalModel((tmp_path / "lora").resolve())
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("+./lora", "an adapter is written 'base\\+adapter', found no base"),
        ("org/name+", "found no adapter"),
        ("a/b/c", "expected a Hub id"),
        ("org/na me", "expected a Hub id"),
        ("org/name@", "expected a Hub id"),
        ("zoo:tiny", "zoo model is written"),
    ],
)
def test_a_model_that_cannot_be_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_model(text, tmp_path)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml")), ids=lambda p: p.name
)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    if "tasks" in path.parts:
        assert yaml.safe_load(path.read_text().replace("!function ", "")), "a task, not a recipe"
        return
    recipe = load_recipe(path)
    for model in ([recipe.base_model] if recipe.base_model else []) + list(recipe.models):
        parse_model(model, path.parent)
