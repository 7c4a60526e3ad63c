"""`shoal validate`: broken recipes end with one clear line and exit code 2, before any heavy work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from shoal.cli import app


def validate(recipe: Any, folder: Path) -> Any:
    path = folder / "recipe.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    return CliRunner().invoke(app, ["validate", str(path)])


def changed(pico: Any, **task: Any) -> Any:
    return pico.recipe(tasks=[{"task": "pico_choice", "metric": "acc"} | task])


@pytest.fixture
def deeper(pico: Any, tmp_path: Path) -> Path:
    """A copy of `left` whose configuration says one more layer."""
    shutil.copytree(pico.model("left"), tmp_path / "deeper")
    config = json.loads((tmp_path / "deeper" / "config.json").read_text())
    config["num_hidden_layers"] = 4
    (tmp_path / "deeper" / "config.json").write_text(json.dumps(config))
    return tmp_path / "deeper"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return tmp_path / "lora"


BROKEN = {
    "unknown key": lambda p, **_: (p.recipe(serch={}), "unknown key 'serch'"),
    "misspelt task": lambda p, **_: (
        changed(p, task="pico_choise"),
        "lm-eval knows no such task; did you mean 'pico_choice'",
    ),
    "metric not produced": lambda p, **_: (
        changed(p, metric="bleu"),
        "task 'pico_choice' does not produce metric 'bleu'",
    ),
    "layers do not match": lambda p, deeper, **_: (
        p.recipe(models=[str(deeper)]),
        "num_hidden_layers is 4, expected 3",
    ),
    "missing file": lambda p, **_: (p.recipe(models=["./missing"]), "no such folder"),
    "warm start that is not there": lambda p, **_: (
        p.recipe(search={"warm_start": "./nothing.yml"}),
        "nothing.yml",
    ),
    "bounds reversed": lambda p, **_: (p.recipe(space={"bounds": {"weight": [1, 0]}}), "low < high"),
    "misspelt optimizer": lambda p, **_: (
        p.recipe(search={"optimizer": "cma"}),
        "search.optimizer: unknown 'cma'",
    ),
    "finer space that is coarser": lambda p, **_: (
        p.recipe(
            space={
                "shape": "layers",
                "tensor_types": [],
                "grow": [{"tensor_types": ["attn", "mlp"]}, {"shape": "curve"}],
            }
        ),
        "space.grow.1: curve per attn and mlp, 12 genes: expected more genes than layers per attn and mlp, 12 genes",
    ),
    "finer space that does not nest": lambda p, **_: (
        p.recipe(
            space={
                "shape": "curve",
                "coefficients": 2,
                "tensor_types": [],
                "grow": [{"shape": "blocks", "blocks": 2, "tensor_types": ["attn", "mlp"]}],
            }
        ),
        "space.grow.0: blocks per attn and mlp, 8 genes: does not contain curve, 4 genes; a search goes on",
    ),
    "growth without a covariance": lambda p, **_: (
        p.recipe(space={"shape": "uniform", "grow": [{"shape": "layers"}]}, search={"optimizer": "random"}),
        "space.grow: 'random' has no covariance to carry into a finer space",
    ),
    "race without ranks": lambda p, **_: (
        p.recipe(search={"optimizer": "random", "racing": "on"}),
        "racing is for cma-es and sep-cma-es",
    ),
    "budget 0": lambda p, **_: (p.recipe(search={"budget": 0}), "search.budget"),
    "duplicate model": lambda p, **_: (p.recipe(models=[str(p.model("left"))] * 2), "is named 2 times"),
    "adapter without base": lambda p, adapter, **_: (
        p.recipe(models=[str(adapter)]),
        "this is a LoRA adapter, not a model",
    ),
    "YAML syntax error": lambda p, **_: ("name: [x\nmodels: y", "not valid YAML"),
    "wrong type": lambda p, **_: (p.recipe(search={"budget": "many"}), "found 'many' (str)"),
    "unknown method": lambda p, **_: (p.recipe(merge={"method": "lineer"}), "did you mean 'linear'"),
    "same folder twice": lambda p, **_: (
        p.recipe(models=[str(p.model("left")), str(p.model("left")) + "/."]),
        "the same folder is named twice",
    ),
    "budget below a generation": lambda p, **_: (p.recipe(search={"budget": 3}), "less than one generation"),
    "method without its base": lambda p, **_: (p.recipe(base_model=None), "needs base_model"),
    "unknown bound": lambda p, **_: (p.recipe(space={"bounds": {"wieght": [0, 1]}}), "did you mean 'weight'"),
    "unknown parameter": lambda p, **_: (
        p.recipe(merge={"method": "ties", "parameters": {"densty": 0.5}}),
        "did you mean 'density'",
    ),
    "no folder of tasks": lambda p, **_: (
        p.recipe(evaluation={"include_path": "./nowhere"}),
        "no such folder",
    ),
    "chat template that is not there": lambda p, **_: (
        p.recipe(evaluation={"include_path": str(p.tasks), "apply_chat_template": True}),
        "has no chat template",
    ),
    "infinite weight": lambda p, **_: (changed(p, weight=float("inf")), "finite number"),
    "unknown model argument": lambda p, **_: (
        p.recipe(evaluation={"include_path": str(p.tasks), "model_args": {"dtpye": "float32"}}),
        "did you mean 'dtype'",
    ),
    "tokenizer of a stranger": lambda p, **_: (
        p.recipe(output={"tokenizer_source": "org/x"}),
        "is no model of this recipe",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_recipe_is_one_clear_line(
    what: str, pico: Any, deeper: Path, adapter: Path, tmp_path: Path
) -> None:
    recipe, message = BROKEN[what](pico, deeper=deeper, adapter=adapter)
    result = validate(recipe, tmp_path)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    assert "Traceback" not in result.output


def test_tokenizers_whose_special_tokens_differ_are_refused(pico: Any, tmp_path: Path) -> None:
    shutil.copytree(pico.model("left"), tmp_path / "other")
    path = tmp_path / "other" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "="}))
    result = validate(pico.recipe(models=[str(tmp_path / "other"), str(pico.model("right"))]), tmp_path)
    assert result.exit_code == 2
    assert "eos" in result.stderr and "other" in result.stderr


def test_a_good_recipe_is_described(pico: Any, tmp_path: Path) -> None:
    result = validate(pico.recipe(), tmp_path)
    assert result.exit_code == 0, result.output
    for words in (
        "base (",
        "task_arithmetic@1, weights written as float32",
        "curve per attn and mlp, 8 genes",
        "weight of left: ",
        "per layer",
        "84 search (pico_choice validation), 34 select (pico_choice validation), 120 test",
        "12 candidates: 3 generations of 4",
        "240 test items can show a gain of 8.0 points or more",
    ):
        assert words in result.stdout


def test_the_stages_of_a_search_that_grows_are_described(pico: Any, tmp_path: Path) -> None:
    space = {
        "shape": "uniform",
        "tensor_types": [],
        "patience": 3,
        "grow": [{"shape": "curve", "coefficients": 2}, {"shape": "layers"}],
    }
    result = validate(pico.recipe(space=space, search={"budget": 60, "items": 16}), tmp_path)
    assert result.exit_code == 0, result.output
    for words in (
        "uniform, 2 genes",
        "curve, 4 genes, generations of 8, once 3 generations bring nothing beyond noise",
        "layers, 6 genes, generations of 9, once 3 generations bring nothing beyond noise",
        "60 candidates: up to 10 generations of 6",
    ):
        assert words in result.stdout
