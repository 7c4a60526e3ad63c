"""Model cards: metadata that the Hub accepts, and a body that says what was shown, no more."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

from shoal.folder import RunFolder
from shoal.hub.card import CardContent, card, metadata
from shoal.hub.licences import ParentLicence, lookup, terms
from shoal.hub.parents import Documents, Parent, front_matter, languages, licence_of, parents_of
from shoal.hub.publication import Publication
from shoal.report import load_result
from shoal.sanity import PROMPTS, Written

# what the Hub checks of a card's metadata, as far as a merge's card has it (huggingface.co/docs/hub/model-cards)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["license", "library_name", "tags"],
    "additionalProperties": False,
    "properties": {
        "license": {"type": "string", "pattern": r"^[a-z0-9.+-]+$"},
        "license_name": {"type": "string", "pattern": r"^[a-z0-9-.]+$"},
        "license_link": {"anyOf": [{"pattern": "^https?://"}, {"enum": ["LICENSE", "LICENSE.md"]}]},
        "language": {
            "type": "array",
            "items": {"type": "string", "pattern": "^([a-z]{2,3}(-[A-Za-z0-9]+)*|code)$"},
        },
        "library_name": {"enum": ["transformers", "shoal"]},
        "pipeline_tag": {"const": "text-generation"},
        "tags": {"type": "array", "uniqueItems": True, "items": {"type": "string"}},
        "base_model": {"type": "array", "minItems": 1, "items": {"pattern": r"^[\w.-]+/[\w.-]+$"}},
        "base_model_relation": {"const": "merge"},
    },
    "dependentRequired": {"base_model_relation": ["base_model"], "base_model": ["base_model_relation"]},
    "allOf": [
        {
            "if": {"properties": {"license": {"const": "other"}}},
            "then": {"required": ["license_name", "license_link"]},
            "else": {"not": {"anyOf": [{"required": ["license_name"]}, {"required": ["license_link"]}]}},
        },
        {
            "if": {"properties": {"library_name": {"const": "shoal"}}},
            "then": {
                "not": {"required": ["pipeline_tag"]},
                "properties": {"tags": {"contains": {"const": "shoal-recipe"}}},
            },
            "else": {
                "required": ["pipeline_tag"],
                "properties": {"tags": {"not": {"contains": {"const": "shoal-recipe"}}}},
            },
        },
    ],
}


def check(data: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(data, SCHEMA)


@pytest.fixture(scope="module")
def content(hub_run: Path, recipe_only: Publication) -> CardContent:
    """What the card of a recipe is made of, to make others of it."""
    folder = RunFolder(hub_run)
    recipe, lock = folder.open()
    return CardContent(
        repo="ann/fish",
        weights=False,
        recipe=recipe,
        lock=recipe_only.lock,
        result=load_result(hub_run),
        parents=parents_of(lock.models),
        terms=recipe_only.terms,
        languages=["de"],
        plots=["weights.png"],
        written={},
        mergekit_head=["Same bytes."],
        met={},
        left_out=[],
        included=[],
    )


def test_metadata_of_a_recipe(recipe_only: Publication) -> None:
    loaded = ModelCard.load(recipe_only.folder / "README.md")
    assert loaded.data.to_dict() == {
        "language": ["en", "de"],
        "license": "apache-2.0",
        "library_name": "shoal",
        "tags": ["merge", "mergekit", "shoal", "shoal-recipe"],
        "base_model": ["ann/base", "ann/left", "ann/right"],
        "base_model_relation": "merge",
    }
    check(loaded.data.to_dict())


def test_a_card_reads_back_as_itself(recipe_only: Publication) -> None:
    text = (recipe_only.folder / "README.md").read_text()
    loaded = ModelCard(text)
    assert str(loaded) == text
    again = ModelCardData(**loaded.data.to_dict())
    assert again.to_dict() == loaded.data.to_dict()
    assert str(ModelCard(f"---\n{again.to_yaml()}\n---\n{loaded.text}")) == text


def test_the_body_of_a_recipe_says_what_it_must(recipe_only: Publication, hub_run: Path) -> None:
    text = (recipe_only.folder / "README.md").read_text()
    body = text.split("---\n", 2)[2].strip()
    result = load_result(hub_run)
    assert body.splitlines()[0].startswith("No weights here: `shoal download ann/fish ")
    assert f"**Verdict: {result['verdict']}.**" in body
    assert result["claim"][1:] in body
    for baseline in result["baselines"]:
        assert re.search(
            rf"^\| {re.escape(baseline['name'])}( \(parent\))? \|.*to [+-]\d", body, re.MULTILINE
        )
    assert f"winner ({result['winner']['id']})" in body
    assert result["weights_sha256"] in body
    assert "![The winner's parameters by layer](weights.png)" in body
    assert "12 candidates (0 failed)" in body
    task = recipe_only.lock.run.tasks[0]
    number = len(task.roles["search"].items)
    assert re.search(
        rf"^\| {task.task} \| search \| {number} \| [1-9]\d* \| .*validation", body, re.MULTILINE
    )
    assert 'pip install "shoal==' in body and "shoal reproduce ann/fish --score" in body
    assert "| ann/right | [MIT License]" in body and "LICENSE of ann/right" in body
    assert "no legal advice" in body


def test_with_weights_the_card_is_a_models(content: CardContent) -> None:
    found = replace(content, weights=True)
    data = metadata(found).to_dict()
    check(data)
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert data["tags"] == ["merge", "mergekit", "shoal"]
    assert "No weights here" not in card(found)


def test_other_licences_are_named_and_quoted(content: CardContent) -> None:
    parents = [
        ParentLicence("ann/base", "llama3.1", "README.md of ann/base", lookup("llama3.1")),
        ParentLicence("ann/left", "", "ann/left (no README.md, no licence file)", None),
    ]
    found = replace(content, repo="ann/Llama-fish", terms=terms(parents, "ann/Llama-fish", "gemma"))
    data = metadata(found).to_dict()
    check(data)
    assert data["license"] == "other" and data["license_name"] == "gemma-and-llama3.1"
    text = card(found)
    assert "Built with Llama." in text
    assert 'stated by the publisher for ann/left: "gemma"' in text


def test_three_prompts_with_the_best_parents_and_the_winners_answers(content: CardContent) -> None:
    winner = content.result["winner"]["id"]
    parents = [b for b in content.result["baselines"] if b["kind"] == "parent"]
    best = max(parents, key=lambda b: b["score"])["name"]
    assert "## What it writes" not in card(content)  # a run that asked for none

    def wrote(name: str) -> Written:
        texts = [f"{name} says {n} ```ticks```" for n in range(len(PROMPTS))]
        texts[8] = "a VERIFIED fact"
        return Written(name, tuple(texts), (True,) * len(PROMPTS), None)

    text = card(replace(content, written={name: wrote(name) for name in (winner, best)}))
    section = text.partition("## What it writes")[2].partition("\n## ")[0]
    assert section.count("Prompt:") == 3
    assert section.count(f"````text\n{winner} says") == section.count(f"````text\n{best} says") == 3
    assert PROMPTS[8] not in section


def test_nobody_but_us_measured_it(recipe_only: Publication, content: CardContent) -> None:
    for text in ((recipe_only.folder / "README.md").read_text(), card(replace(content, weights=True))):
        assert "verif" not in text.lower()


def test_a_parent_that_won_is_called_one(content: CardContent) -> None:
    result = dict(content.result)
    parent = next(b for b in result["baselines"] if b["kind"] == "parent")
    result["winner"] = {**result["winner"], "id": parent["name"]}
    assert "prefer the parent" in card(replace(content, result=result))
    assert "prefer the parent" not in card(content)


def test_models_of_the_zoo_have_a_licence_and_no_place_on_the_hub(content: CardContent) -> None:
    tiny = Parent("zoo:tiny/base", "zoo", None, Path("/x"), zoo="tiny")
    copy = Parent("HuggingFaceTB/SmolLM2-135M-Instruct", "zoo", "a" * 40, Path("/y"), zoo="smollm2")
    nothing = Documents({}, (), None, "")
    for parent in (tiny, copy):
        found = licence_of(parent, nothing)
        assert found.licence is lookup("apache-2.0") and found.where == "shoal's zoo"
    data = metadata(replace(content, parents=[tiny])).to_dict()
    check(data)
    assert "base_model" not in data and "base_model_relation" not in data
    data = metadata(replace(content, parents=[tiny, copy])).to_dict()
    assert data["base_model"] == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert "trained on your own machine" in card(replace(content, parents=[tiny]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\n---\n# x", {"license": "mit"}),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("# no metadata", {}),
        ("---\n- a\n---\n", {}),
        ("---\na: &x 1\nb: *x\n---\n", {}),
        ("---\na: !!python/name:os.system\n---\n", {}),
    ],
)
def test_front_matter_of_strangers_is_read_safely(text: str, expected: dict[str, Any]) -> None:
    assert front_matter(text, "x") == expected


@pytest.mark.parametrize(
    ("front", "stated"),
    [
        ({"license": "MIT"}, "MIT"),
        ({"license": ["apache-2.0"]}, "apache-2.0"),
        ({"license": ["mit", "gpl-3.0"]}, "mit, gpl-3.0"),
        ({"license": "other", "license_name": "qwen"}, "qwen"),
        ({"license": "other"}, "other"),
        ({"license": "unknown"}, ""),
        ({}, ""),
    ],
)
def test_what_a_card_states(front: dict[str, Any], stated: str) -> None:
    found = licence_of(Parent("a/b", "hub", "c", Path("/x")), Documents(front, (), None, "README.md of a/b"))
    assert found.stated == stated
    assert found.licence == (lookup(stated) if stated else None)


def test_languages_of_all_parents_are_named() -> None:
    cards = ["en", ["de", "en"], ["x y", 3], None]
    found = [Documents({"language": value}, (), None, "") for value in cards]
    assert languages(found) == ["en", "de"]


def test_an_adapter_and_its_base_are_two_parents(hub_run: Path) -> None:
    _, lock = RunFolder(hub_run).open()
    model = lock.models[1].model_copy(
        update={"ref": "ann/base+ann/lora", "adapter": "/x/lora", "adapter_commit": "d" * 40}
    )
    found = parents_of([*lock.models[:1], model])
    assert {(p.reference, p.adapter) for p in found} == {("ann/base", False), ("ann/lora", True)}
