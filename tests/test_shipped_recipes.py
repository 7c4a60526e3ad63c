"""The shipped recipes for models of the Hub, planned without it: `shoal validate` on outlines of the published shapes.

What stands in: headers of the shapes in each model's config.json in front of holes, one toy tokenizer for all, and question
sets of the published fields and sizes (but for HellaSwag's, which is shorter) with invented words. What is real: recipe,
lm-eval's own task files, the plan. So sizes, genes, items and cost are what a user sees; that ids exist and vocabularies
agree is not shown here.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from shoal.cli import app
from shoal.recipe import load_recipe, parse_model
from shoal.types import AdapterModel, HubModel

RECIPES = Path(__file__).parents[1] / "recipes"
MISTRAL = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
QWEN = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
CONFIGS = {
    "mistralai/Mistral-7B-v0.1": (MISTRAL, "BF16"),
    "augmxnt/shisa-gamma-7b-v1": (MISTRAL, "BF16"),
    "WizardLMTeam/WizardMath-7B-V1.1": (MISTRAL, "BF16"),
    "GAIR/Abel-7B-002": (MISTRAL, "F32"),
    "Qwen/Qwen2.5-1.5B": (QWEN, "BF16"),
    "Qwen/Qwen2.5-1.5B-Instruct": (QWEN, "BF16"),
    "Qwen/Qwen2.5-Coder-1.5B": (QWEN, "BF16"),
}
LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "bias": "none"}
ADAPTED = {"q_proj": 4096, "v_proj": 1024}  # of Predibase's adapters: module -> what it puts out
SIZES = {"F32": 4, "BF16": 2}
SHARD = 1_500_000_000


def write_hole(path: Path, tensors: dict[str, tuple[int, ...]], dtype: str) -> None:
    """A safetensors file of these shapes that holds its header only, and zeros that take no room."""
    header, end = {}, 0
    for name, shape in tensors.items():
        size = SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_model(folder: Path, config: dict[str, Any], dtype: str, tokenizer: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for path in tokenizer.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        shapes.pop("lm_head.weight")
    # in shards, as on the Hub: no single mapping is larger than the memory of a small machine
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(math.prod(s) for s in shards[-1].values()) * SIZES[dtype] > SHARD:
            shards.append({})
        shards[-1][name] = shape
    index = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_hole(folder / file, shard, dtype)
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "OUTLINE").touch()


def write_adapter(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(LORA | {"target_modules": list(ADAPTED)}))
    shapes = {}
    for layer in range(MISTRAL["num_hidden_layers"]):
        for module, width in ADAPTED.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            shapes[f"{name}.lora_A.weight"] = (8, MISTRAL["hidden_size"])
            shapes[f"{name}.lora_B.weight"] = (width, 8)
    write_hole(folder / "adapter_model.safetensors", shapes, "F32")


def questions(path: str, name: str | None) -> dict[str, list[dict[str, Any]]]:
    """Invented items with the fields and in the numbers of a public question set, split by split."""
    made = {
        "openai/gsm8k": (
            {"train": 7473, "test": 1319},
            lambda i: {"question": f"What is {i} and 1?", "answer": f"It is one more.\n#### {i + 1}"},
        ),
        "allenai/ai2_arc": (
            {"train": 1119, "validation": 299, "test": 1172},
            lambda i: {
                "id": str(i),
                "question": f"Which number is {i}?",
                "choices": {"text": [str(i), str(i + 1)], "label": ["A", "B"]},
                "answerKey": "A",
            },
        ),
        "Rowan/hellaswag": (
            # published: 39905 and 10042; a plan takes at most 768 and 1024 of them, and all take long to prepare
            {"train": 3990, "validation": 1500},
            lambda i: {
                "activity_label": "Counting",
                "ctx": f"Somebody counts to {i}.",
                "ctx_a": f"Somebody counts to {i}.",
                "ctx_b": "",
                "endings": ["On.", "Off.", "Up.", "Down."],
                "label": "2",
            },
        ),
        "juletxara/mgsm": (
            {"train": 8, "test": 250},
            lambda i: {
                "question": f"{i} + 1?",
                "answer": None,
                "answer_number": i + 1,
                "equation_solution": None,
            },
        ),
        "SakanaAI/gsm8k-ja-test_250-1319": (
            {"test": 1069},
            lambda i: {"question": f"{i} + 2?", "answer_number": i + 2},
        ),
    }
    splits, item = made[path]
    start, found = 0, {}
    for split, count in splits.items():
        found[split] = [item(start + i) for i in range(count)]
        start += count
    return found


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import datasets

    from shoal.preflight import open_catalogue

    @functools.cache
    def load(path: str, name: str | None = None) -> Any:
        splits = questions(path, name)
        return datasets.DatasetDict({k: datasets.Dataset.from_list(rows) for k, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", lambda path, name=None, **more: load(path, name))
    open_catalogue.cache_clear()
    yield
    open_catalogue.cache_clear()


def planned(name: str, folder: Path, tokenizer: Path) -> str:
    """What `shoal validate` prints of a shipped recipe whose models are outlines in a folder."""
    recipe = load_recipe(RECIPES / f"{name}.yaml")

    def place(ref: HubModel) -> str:
        where = folder / ref.repo.replace("/", "--")
        if not where.exists():
            if ref.repo in CONFIGS:
                write_model(where, *CONFIGS[ref.repo], tokenizer)
            else:
                write_adapter(where)
        return str(where)

    def local(text: str) -> str:
        ref = parse_model(text, RECIPES)
        if isinstance(ref, AdapterModel):
            assert isinstance(ref.base, HubModel) and isinstance(ref.adapter, HubModel)
            return f"{place(ref.base)}+{place(ref.adapter)}"
        assert isinstance(ref, HubModel)
        return place(ref)

    content = recipe.model_dump(mode="json")
    content["base_model"] = local(recipe.base_model or "")
    content["models"] = [local(text) for text in recipe.models]
    if recipe.output.tokenizer_source != "base":
        content["output"]["tokenizer_source"] = local(recipe.output.tokenizer_source)
    if recipe.evaluation.include_path is not None:
        content["evaluation"]["include_path"] = str(RECIPES / recipe.evaluation.include_path)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    found = CliRunner().invoke(app, ["validate", str(path), "--no-estimate", "--device", "cpu"])
    assert found.exit_code == 0, found.output
    return found.stdout


PLANS: dict[str, tuple[str, ...]] = {
    "evollm-jp": (
        "dare_ties@1, weights written as bfloat16",
        "model 13.5 GiB, parents 121.4 GiB",
        "curve per attn and mlp, 18 genes",
        "0-shot; 512 search (gsm8k_ja test), 256 select (gsm8k_ja test), 250 test (mgsm_direct_ja test)",
        "the claim will say so",
        "996 candidates: 83 generations of 12, 32 items per task and generation",
        "at most 32896 item evaluations",
        "250 test items can show a gain of 7.9 points",
    ),
    "qwen2.5-1.5b": (
        "model 2.9 GiB, parents 8.6 GiB",
        "curve per attn and mlp, 12 genes",
        "5-shot; 512 search (gsm8k train), 256 select (gsm8k train), 1024 test (gsm8k test)",
        "184 search (arc_challenge validation), 95 select (arc_challenge validation), 1024 test",
        "512 search (hellaswag train), 256 select (hellaswag train), 1024 test (hellaswag validation)",
        "198 candidates: 18 generations of 11",
        "at most 11672 item evaluations",
    ),
    "lora-mistral": (
        "model 13.5 GiB, parents 67.4 GiB",
        "curve per attn, 6 genes",
        "198 candidates: 22 generations of 9",
        "at most 7768 item evaluations",
    ),
}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", PLANS)
def test_a_shipped_recipe_is_planned_without_weights(name: str, pico: Any, tmp_path: Path) -> None:
    plan = planned(name, tmp_path, pico.model("base"))
    for words in PLANS[name]:
        assert words in plan, plan
    # the weights are holes: nothing was read of them, nothing written in their place
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*.safetensors")) < 4_000_000


@pytest.mark.parametrize("name", PLANS)
def test_a_recipe_that_we_did_not_run_says_so(name: str) -> None:
    head = (RECIPES / f"{name}.yaml").read_text().split("\nname:")[0]
    assert "Not run by us" in head and "GB" in head
    assert all(line.startswith("#") for line in head.splitlines())
