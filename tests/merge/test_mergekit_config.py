"""What `shoal merge` makes of a mergekit YAML, against mergekit itself: every tensor, and every file beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from shoal.errors import CheckpointError
from shoal.merge import METHODS
from shoal.merge.mergekit_bridge import Written, write_config

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def theirs(data: Mapping[str, Any], out: Path, **options: Any) -> dict[str, Tensor]:
    """What mergekit-yaml writes."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    run_merge(MergeConfiguration.model_validate(data), str(out), MergeOptions(quiet=True, **options))
    return tensors_in(out)


def ours(data: Mapping[str, Any], out: Path, **options: Any) -> tuple[dict[str, Tensor], Written]:
    file = out.parent / f"{out.name}.yml"
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    written = write_config(file, out, **options)
    assert (out / "mergekit_config.yml").read_text() == file.read_text()
    assert (out / "README.md").is_file()
    return tensors_in(out), written


def tensors_in(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        tensors.update(load_file(shard))
    return tensors


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        other = found[name]
        assert (other.shape, other.dtype) == (tensor.shape, tensor.dtype), name
        error = float((other.double() - tensor.double()).abs().max()) if tensor.numel() else 0.0
        assert error <= tolerance * float(tensor.double().abs().max()), (name, error)


def compare(
    data: Mapping[str, Any], folder: Path, tolerance: float = 1e-6, **options: Any
) -> tuple[dict[str, Tensor], Written]:
    expected = theirs(data, folder / "theirs", **options)
    found, written = ours(data, folder / "ours")
    assert_close(found, expected, tolerance)
    assert read(folder / "ours" / "config.json") == read(folder / "theirs" / "config.json")
    for name in TOKENIZER:
        assert (folder / "ours" / name).is_file() == (folder / "theirs" / name).is_file(), name
        if (folder / "theirs" / name).is_file():
            assert read(folder / "ours" / name) == read(folder / "theirs" / name), name
    assert written.tensors == len(found)
    return found, written


def read(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else text


def model(path: Path, **parameters: Any) -> dict[str, Any]:
    return {"model": str(path), **({"parameters": parameters} if parameters else {})}


def layers(path: Path, low: int, high: int, **parameters: Any) -> dict[str, Any]:
    return {**model(path, **parameters), "layer_range": [low, high]}


GRADIENT = [0, 0.5, 0.3, 0.7, 1]
# b, m1, m2, m3 stand for the folders
CASES: dict[str, Any] = {
    "linear": lambda b, m1, m2, m3: {
        "merge_method": "linear",
        "models": [model(m1, weight=1.0), model(m2, weight=0.3), model(m3, weight=-0.2)],
        "dtype": "float32",
    },
    "linear with a base": lambda b, m1, m2, m3: {
        "merge_method": "linear",
        "models": [model(b, weight=0.5), model(m1, weight=0.8)],
        "base_model": str(b),
        "parameters": {"normalize": False},
    },
    "slerp with gradients and filters": lambda b, m1, m2, m3: {
        "merge_method": "slerp",
        "slices": [{"sources": [layers(b, 0, 2), layers(m1, 0, 2)]}],
        "base_model": str(b),
        "parameters": {
            "t": [
                {"filter": "self_attn", "value": GRADIENT},
                {"filter": "mlp", "value": GRADIENT[::-1]},
                {"value": 0.5},
            ]
        },
        "dtype": "float32",
    },
    "ties with gradients": lambda b, m1, m2, m3: {
        "merge_method": "ties",
        "models": [
            model(m1, density=[1, 0.7, 0.1], weight=1.0),
            model(m2, density=0.5, weight=[0, 0.3, 0.7, 1]),
            model(m3, density=0.33, weight=[{"filter": "mlp", "value": 0.5}, {"value": 0}]),
        ],
        "base_model": str(b),
        "parameters": {"normalize": True, "int8_mask": True},
        "dtype": "float32",
    },
    "ties, not normalised, with lambda": lambda b, m1, m2, m3: {
        "merge_method": "ties",
        "models": [model(m1, density=0.6, weight=0.5), model(m2, density=0.4, weight=-0.5)],
        "base_model": str(b),
        "parameters": {"normalize": False, "lambda": 1.3, "rescale": True},
        "dtype": "float32",
    },
    "task arithmetic, parameters at every level": lambda b, m1, m2, m3: {
        "merge_method": "task_arithmetic",
        "slices": [
            {
                "sources": [layers(b, 0, 1), layers(m1, 0, 1, weight=0.9), layers(m2, 0, 1)],
                "parameters": {"weight": 0.4},
            },
            {"sources": [layers(b, 1, 2), layers(m1, 1, 2), layers(m2, 1, 2, weight=-0.3)]},
        ],
        "base_model": str(b),
        "parameters": {"weight": 0.25, "lambda": 0.8, "density": 0.5},
        "dtype": "float32",
    },
    "dare_ties that keeps all": lambda b, m1, m2, m3: {
        "merge_method": "dare_ties",
        "models": [model(b), model(m1, weight=0.6, density=1.0), model(m2, weight=-0.4, density=1)],
        "base_model": str(b),
        "parameters": {"int8_mask": True},
        "dtype": "float32",
    },
    "dare_linear that keeps all": lambda b, m1, m2, m3: {
        "merge_method": "dare_linear",
        "models": [model(m1, weight=0.6), model(m2, weight=0.3)],
        "base_model": str(b),
        "parameters": {"normalize": True, "density": 1.0},
        "dtype": "float32",
    },
    "stacked layers": lambda b, m1, m2, m3: {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [layers(m1, 0, 2)]},
            {"sources": [layers(m2, 0, 2)]},
            {"sources": [layers(m1, 1, 2)]},
        ],
    },
    "stacked layers, scaled": lambda b, m1, m2, m3: {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [layers(b, 0, 2)]},
            {
                "sources": [
                    layers(
                        b,
                        1,
                        2,
                        scale=[
                            {"filter": "o_proj", "value": 0.0},
                            {"filter": "down_proj", "value": 0.5},
                            {"value": 1.0},
                        ],
                    )
                ]
            },
        ],
        "dtype": "float32",
    },
    "layers of several models, moved": lambda b, m1, m2, m3: {
        "merge_method": "task_arithmetic",
        "slices": [
            {"sources": [layers(b, 1, 2), layers(m1, 0, 1, weight=0.5), layers(m2, 1, 2, weight=0.2)]},
            {"sources": [layers(b, 0, 1), layers(m3, 1, 2, weight=1.0)]},
            {"sources": [layers(b, 0, 1), layers(m2, 0, 1, weight=0.4)]},
        ],
        "base_model": str(b),
        "dtype": "float32",
    },
    "a slice with another base": lambda b, m1, m2, m3: {
        "merge_method": "slerp",
        "slices": [
            {"sources": [layers(b, 0, 1), layers(m1, 0, 1)], "parameters": {"t": 0.3}},
            {
                "sources": [layers(m2, 1, 2), layers(m3, 1, 2)],
                "base_model": str(m2),
                "parameters": {"t": 0.6},
            },
        ],
        "base_model": str(b),
        "dtype": "float32",
    },
    "modules": lambda b, m1, m2, m3: {
        "merge_method": "linear",
        "modules": {
            "default": {
                "slices": [
                    {"sources": [layers(m1, 0, 2, weight=0.5), layers(m2, 0, 2, weight=1)]},
                    {"sources": [layers(b, 1, 2, weight=1.0)]},
                ]
            }
        },
        "dtype": "float32",
    },
    "model_stock": lambda b, m1, m2, m3: {
        "merge_method": "model_stock",
        "models": [model(m1), model(m2), model(m3)],
        "base_model": str(b),
        "dtype": "float32",
    },
    "model_stock, filter-wise": lambda b, m1, m2, m3: {
        "merge_method": "model_stock",
        "models": [model(m1), model(m2)],
        "base_model": str(b),
        "parameters": {"filter_wise": True},
        "dtype": "float32",
    },
    "nuslerp": lambda b, m1, m2, m3: {
        "merge_method": "nuslerp",
        "models": [model(m1, weight=0.7), model(m2, weight=0.4)],
        "dtype": "float32",
    },
    "nuslerp of task vectors, row-wise": lambda b, m1, m2, m3: {
        "merge_method": "nuslerp",
        "models": [model(m1, weight=0.7), model(m2, weight=0.4)],
        "base_model": str(b),
        "parameters": {"nuslerp_row_wise": True, "nuslerp_flatten": False},
        "dtype": "float32",
    },
    "multislerp": lambda b, m1, m2, m3: {
        "merge_method": "multislerp",
        "models": [model(m1, weight=0.7), model(m2, weight=0.4), model(m3, weight=0.1)],
        "base_model": str(b),
        "dtype": "float32",
    },
    "karcher": lambda b, m1, m2, m3: {
        "merge_method": "karcher",
        "models": [model(m1), model(m2), model(m3)],
        "parameters": {"max_iter": 6, "tol": 1e-4},
        "dtype": "float32",
    },
    "sce": lambda b, m1, m2, m3: {
        "merge_method": "sce",
        "models": [model(m1), model(m2)],
        "base_model": str(b),
        "parameters": {"select_topk": 0.4, "int8_mask": True},
        "dtype": "float32",
    },
    "breadcrumbs": lambda b, m1, m2, m3: {
        "merge_method": "breadcrumbs",
        "models": [model(m1, weight=0.6, density=0.7, gamma=0.05), model(m2, weight=0.4, density=0.9)],
        "base_model": str(b),
        "dtype": "float32",
    },
    "breadcrumbs_ties": lambda b, m1, m2, m3: {
        "merge_method": "breadcrumbs_ties",
        "models": [model(m1, weight=0.6, density=0.7), model(m2, weight=0.4, density=0.9)],
        "base_model": str(b),
        "parameters": {"gamma": 0.02, "normalize": True},
        "dtype": "float32",
    },
    "della that keeps all": lambda b, m1, m2, m3: {
        "merge_method": "della",
        "models": [model(m1, weight=0.6), model(m2, weight=0.4)],
        "base_model": str(b),
        "parameters": {"density": 1.0, "epsilon": 0.0, "lambda": 1.1},
        "dtype": "float32",
    },
    "nearswap": lambda b, m1, m2, m3: {
        "merge_method": "nearswap",
        "models": [model(m1)],
        "base_model": str(b),
        "parameters": {"t": 0.001},
        "dtype": "float32",
    },
    "arcee_fusion": lambda b, m1, m2, m3: {
        "merge_method": "arcee_fusion",
        "models": [model(m1)],
        "base_model": str(b),
        "dtype": "float32",
    },
    "a density above one": lambda b, m1, m2, m3: {
        "merge_method": "ties",
        "models": [model(m1, weight=0.6, density=1.5)],
        "base_model": str(b),
        "dtype": "float32",
    },
    "computed in float64": lambda b, m1, m2, m3: {
        "merge_method": "linear",
        "models": [model(m1, weight=0.6), model(m2, weight=0.2)],
        "dtype": "float64",
        "out_dtype": "float32",
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_config_gives_what_mergekit_gives(case, llamas, tmp_path):
    data = CASES[case](*llamas)
    _, written = compare(data, tmp_path)
    if METHODS[data["merge_method"]].native and case not in (
        "model_stock, filter-wise",
        "nuslerp of task vectors, row-wise",
        "a density above one",
        "computed in float64",
    ):
        assert written.by_mergekit == {}
    assert len({case for case in CASES}) > 25


def test_what_goes_through_mergekit_is_said(llamas, tmp_path):
    _, written = ours(CASES["a density above one"](*llamas), tmp_path / "out")
    assert written.by_mergekit == {"density outside [0.0, 1.0]": written.tensors}
    assert f"{written.tensors} by mergekit: density outside [0.0, 1.0] ({written.tensors})" in written.words()
    _, written = ours(CASES["computed in float64"](*llamas), tmp_path / "other")
    assert written.by_mergekit == {"dtype float64": written.tensors}


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("out_dtype", [None, "bfloat16", "float16", "float32"])
def test_dtypes(dtype, out_dtype, llamas, bf16_llamas, tmp_path):
    """Stored in float32 and bfloat16; mergekit rounds to `dtype` at each step, shoal once at the end."""
    data: dict[str, Any] = {
        "merge_method": "linear",
        "models": [model(llamas[0], weight=0.5), model(bf16_llamas[1], weight=0.5)],
        "base_model": str(llamas[0]),  # else mergekit takes the configuration of any
    }
    data |= {"dtype": dtype} if dtype else {}
    data |= {"out_dtype": out_dtype} if out_dtype else {}
    halves = {"bfloat16": 2**-7, "float16": 2**-10}
    found, _ = compare(data, tmp_path, max(halves.get(d, 1e-6) for d in (dtype, out_dtype)))
    wanted = out_dtype or dtype or "float32"
    assert {str(t.dtype) for t in found.values()} == {f"torch.{wanted}"}


def test_without_a_dtype_each_tensor_has_the_one_that_mergekit_writes(llamas, tmp_path):
    import shutil

    from safetensors.torch import save_file

    mixed = []
    for number in (0, 1):
        folder = tmp_path / f"mixed{number}"
        shutil.copytree(llamas[number], folder)
        tensors = load_file(folder / "model.safetensors")
        for name in tensors:
            if "mlp" in name:
                tensors[name] = tensors[name].to(torch.float16 if number else torch.bfloat16)
            elif "embed" in name or "q_proj" in name:
                tensors[name] = tensors[name].to(torch.bfloat16)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        mixed.append(folder)
    data = {
        "merge_method": "linear",
        "models": [model(p, weight=0.5) for p in mixed],
        "base_model": str(mixed[0]),
    }
    found, written = compare(data, tmp_path, 2**-8)
    assert {t.dtype for n, t in found.items() if "mlp" in n} == {torch.float32}  # what both fit in
    assert found["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert written.by_mergekit == {}


def test_a_method_that_widens_widens_here_too(bf16_llamas, tmp_path):
    data = {
        "merge_method": "arcee_fusion",
        "models": [model(bf16_llamas[1])],
        "base_model": str(bf16_llamas[0]),
    }
    expected = theirs(data, tmp_path / "theirs")
    found, _ = ours(data, tmp_path / "ours")
    assert {t.dtype for t in found.values()} == {torch.float32}
    assert_close(found, expected, 1e-6)


def test_tied_weights(tied_llamas, tmp_path):
    data = {
        "merge_method": "ties",
        "models": [model(tied_llamas[1], weight=0.5, density=0.5), model(tied_llamas[2], weight=0.3)],
        "base_model": str(tied_llamas[0]),
        "dtype": "float32",
    }
    found, _ = compare(data, tmp_path)
    assert "lm_head.weight" not in found


def test_a_stored_copy_of_a_tied_head_is_merged_too(tied_llamas, tmp_path):
    import shutil

    from safetensors.torch import save_file

    folder = tmp_path / "stored"
    shutil.copytree(tied_llamas[1], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    data = {
        "merge_method": "linear",
        "models": [model(folder, weight=0.5), model(tied_llamas[2], weight=0.3)],
        "dtype": "float32",
    }
    found, _ = compare(data, tmp_path)
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


def test_gpt2(gpt2s, tmp_path):
    """Names that the architecture knows under aliases."""
    data = {
        "merge_method": "task_arithmetic",
        "models": [model(gpt2s[1], weight=[0.2, 0.9]), model(gpt2s[2], weight=0.3)],
        "base_model": str(gpt2s[0]),
        "dtype": "float32",
    }
    _, written = compare(data, tmp_path)
    assert written.by_mergekit == {}


def test_experts_that_transformers_fuses(mixtrals, tmp_path):
    data = {
        "merge_method": "linear",
        "models": [model(mixtrals[0], weight=0.5), model(mixtrals[1], weight=0.3)],
        "dtype": "float32",
    }
    _, written = compare(data, tmp_path)
    assert set(written.by_mergekit) == {"tensors that transformers fuses"}
    assert 0 < written.by_mergekit["tensors that transformers fuses"] < written.tensors


def test_an_architecture_that_mergekit_infers(tmp_path, tokenizer):
    from transformers import OPTConfig, OPTForCausalLM

    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=64,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        )
        paths.append(tmp_path / f"opt{seed}")
        OPTForCausalLM(config).save_pretrained(paths[-1])
        tokenizer(paths[-1])
    data = {
        "merge_method": "linear",
        "models": [model(paths[0], weight=0.5), model(paths[1], weight=0.3)],
        "dtype": "float32",
    }
    compare(data, tmp_path)


# --- tokenizers ------------------------------------------------------------------------------------------------


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def vocabularies(tmp_path, small_llama, tokenizer, words):
    """Two models with other vocabularies: the second lacks two words, has three of its own, and other ids."""
    first, second = tmp_path / "first", tmp_path / "second"
    small_llama(vocabulary=64).save_pretrained(first)
    tokenizer(first, words, template=TEMPLATE)
    other = [*words[:4], *words[4:-2][::-1], "x1", "x2", "x3"]
    small_llama(vocabulary=len(other)).save_pretrained(second)
    tokenizer(second, other)
    return first, second


SOURCES: dict[str, Any] = {
    "base": lambda a, b: {"tokenizer_source": "base"},
    "union": lambda a, b: {"tokenizer_source": "union"},
    "model": lambda a, b: {"tokenizer_source": str(b)},
    "block": lambda a, b: {
        "tokenizer": {
            "source": "union",
            "pad_to_multiple_of": 16,
            "tokens": {
                "x1": {"source": str(b)},
                "w3": {"source": {"kind": "zero"}, "force": True},
                "x2": {"source": {"kind": "model_token", "model": str(a), "token": "w7"}, "force": True},
                "new": {"source": {"kind": "model_token", "model": str(a), "token_id": 5}},
            },
        }
    },
}


@pytest.mark.parametrize("source", SOURCES)
def test_tokenizers_are_built_by_mergekit(source, vocabularies, tmp_path, capfd):
    a, b = vocabularies
    data = {
        "merge_method": "linear",
        "models": [model(a, weight=0.5), model(b, weight=0.3)],
        "base_model": str(a),
        "dtype": "float32",
        "chat_template": TEMPLATE + " ",
        **SOURCES[source](a, b),
    }
    expected = theirs(data, tmp_path / "theirs")
    capfd.readouterr()
    found, written = ours(data, tmp_path / "ours")
    assert capfd.readouterr().err == ""
    # tokenizers numbers added tokens in another order every time, in mergekit alone too: compare token by token
    vocabulary, other = (vocabulary_of(tmp_path / side) for side in ("ours", "theirs"))
    assert vocabulary.keys() == other.keys()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows, there = list(range(len(found[name]))), list(range(len(found[name])))
        rows[: len(vocabulary)] = [vocabulary[token] for token in sorted(vocabulary)]
        there[: len(vocabulary)] = [other[token] for token in sorted(vocabulary)]
        found[name], expected[name] = found[name][rows], expected[name][there]
    assert_close(found, expected, 1e-6)
    for name in ("config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert read(tmp_path / "ours" / name) == read(tmp_path / "theirs" / name)
    assert written.by_mergekit == {"another vocabulary": 2}
    assert read(tmp_path / "ours" / "config.json")["vocab_size"] == len(found["lm_head.weight"])
    if source == "block":
        assert len(found["lm_head.weight"]) % 16 == 0


def vocabulary_of(folder: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    vocabulary: dict[str, int] = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    return vocabulary


def test_vocabularies_that_differ_need_a_tokenizer(vocabularies, tmp_path):
    a, b = vocabularies
    data = {"merge_method": "linear", "models": [model(a, weight=0.5), model(b, weight=0.3)]}
    with pytest.raises(
        CheckpointError, match=r"has shape \[64, 32\].* has \[65, 32\].*tokenizer: .source: base"
    ):
        ours(data, tmp_path / "out")


@pytest.mark.parametrize("template", [None, "chatml", "auto", TEMPLATE])
def test_chat_templates(template, llamas, tmp_path, tokenizer, words):
    import shutil

    paths = []
    for number, own in enumerate(["{{ 'one' }}", TEMPLATE, TEMPLATE]):
        paths.append(tmp_path / f"m{number}")
        shutil.copytree(llamas[number], paths[-1])
        tokenizer(paths[-1], words, template=own)
    data = {
        "merge_method": "linear",
        "models": [model(p, weight=0.5) for p in paths],
        "base_model": str(paths[0]),
        "chat_template": template,
    }
    compare(data, tmp_path)


def test_without_a_base_the_first_model_gives_configuration_and_tokenizer(llamas, tmp_path, tokenizer, words):
    import shutil

    paths = [tmp_path / n for n in ("z", "a", "k")]
    for path in paths:
        shutil.copytree(llamas[0], path)
        tokenizer(path, words, template=f"{{{{ '{path.name}' }}}}")
        settings = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(
            json.dumps(settings | {"eos_token_id": len(path.name) + ord(path.name)})
        )
    ours({"merge_method": "linear", "models": [model(p, weight=0.5) for p in paths]}, tmp_path / "out")
    assert read(tmp_path / "out" / "chat_template.jinja") == "{{ 'z' }}"
    assert read(tmp_path / "out" / "config.json")["eos_token_id"] == 1 + ord("z")
    assert (tmp_path / "out" / "generation_config.json").is_file()


# --- adapters, draws, shards ------------------------------------------------------------------------------------


@pytest.fixture
def adapters(llamas, tmp_path):
    """Two LoRA adapters on the base."""
    import peft
    from transformers import AutoModelForCausalLM

    paths = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runtime = AutoModelForCausalLM.from_pretrained(llamas[0])
        settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
        trained = peft.get_peft_model(runtime, settings)
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape) * 0.05)
        paths.append(tmp_path / f"adapter{seed}")
        trained.save_pretrained(paths[-1])
    return paths


def test_adapters(llamas, adapters, tmp_path):
    data = {
        "merge_method": "ties",
        "models": [
            {"model": f"{llamas[0]}+{adapters[0]}", "parameters": {"weight": 0.7, "density": 0.5}},
            {"model": f"{llamas[0]}+{adapters[1]}", "parameters": {"weight": 0.5, "density": 0.5}},
            model(llamas[1], weight=0.2, density=1.0),
        ],
        "base_model": str(llamas[0]),
        "dtype": "float32",
    }
    _, written = compare(data, tmp_path, lora_merge_cache=str(tmp_path / "cache"))
    assert written.by_mergekit == {}
    only = {"merge_method": "passthrough", "models": [{"model": f"{llamas[0]}+{adapters[0]}"}]}
    (tmp_path / "only").mkdir()
    expected = theirs(only, tmp_path / "only" / "theirs", lora_merge_cache=str(tmp_path / "cache"))
    found, _ = ours(only, tmp_path / "only" / "ours")
    assert_close(found, expected, 1e-6)
    # the base's tokenizer as it is; mergekit's comes out of the merged copy that transformers saved
    assert read(tmp_path / "only" / "ours" / "tokenizer.json") == read(llamas[0] / "tokenizer.json")


OPTIONS: dict[str, Any] = {
    "filter_wise: True": lambda b, first, second, m1, m2: {
        "merge_method": "model_stock",
        "models": [model(first), model(m1), model(m2)],
        "base_model": str(b),  # which is the adapter's base too: the two must not be taken for one
        "parameters": {"filter_wise": True},
    },
    "nuslerp_flatten: False": lambda b, first, second, m1, m2: {
        "merge_method": "nuslerp",
        "slices": [
            {"sources": [layers(first, 0, 2, weight=[0.1, 0.9]), layers(second, 0, 2, weight=0.5)]},
            {"sources": [layers(b, 0, 1, weight=0.3), layers(m1, 1, 2, weight=0.5)]},
        ],
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_our_kernels_lack_go_to_mergekit_adapters_and_moved_layers_too(
    option, llamas, adapters, tmp_path
):
    first, second = (f"{llamas[0]}+{a}" for a in adapters)
    data = OPTIONS[option](llamas[0], first, second, *llamas[1:3]) | {"dtype": "float32"}
    expected = theirs(data, tmp_path / "theirs", lora_merge_cache=str(tmp_path / "cache"))
    found, written = ours(data, tmp_path / "ours")
    assert_close(found, expected, 1e-6)
    assert sum(written.by_mergekit.values()) == written.tensors
    if METHODS[data["merge_method"]].native:
        assert set(written.by_mergekit) == {option}


def test_masks_are_another_draw_and_that_is_said(llamas, tmp_path):
    data = {
        "merge_method": "dare_ties",
        "models": [model(llamas[1], weight=0.5, density=0.5)],
        "base_model": str(llamas[0]),
    }
    first, written = ours(data, tmp_path / "a")
    assert "dare_ties draws masks of its own (seed 0): another draw than mergekit's" in written.words()
    again, _ = ours(data, tmp_path / "b")
    other, _ = ours(data, tmp_path / "c", seed=1)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_a_small_shard_size_gives_many_files_that_transformers_loads(llamas, tmp_path):
    from transformers import AutoModelForCausalLM

    data = CASES["ties with gradients"](*llamas)
    found, _ = ours(data, tmp_path / "out", max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in found.items())


# --- what is refused --------------------------------------------------------------------------------------------

LINEAR = "merge_method: linear\nmodels:\n- model: {0}\n  parameters: {{weight: 1}}\n"
REFUSED: dict[str, tuple[str, str]] = {
    "several": (LINEAR + "---\n" + LINEAR, "holds 2 YAML documents, which is a file for mergekit-multi"),
    "moe": ("base_model: {0}\nexperts:\n- source_model: {1}\n", "a mixture of experts for mergekit-moe"),
    "evolve": ("genome: {{models: [{0}]}}\ntasks: [a]\n", "an evolution for mergekit-evolve"),
    "recipe": ("name: x\nspace: {{shape: curve}}\ntasks: []\n", "a recipe of shoal.*shoal evolve"),
    "empty": ("", "expected a mapping with merge_method, found nothing"),
    "list": ("- a\n- b\n", "expected a mapping with merge_method, found a list"),
    "syntax": ("merge_method: [linear\n", "no valid YAML: .*line 2"),
    "itself": ("a: &a [*a]\n", "an alias in it contains itself"),
    "aliases": (
        "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + "".join(
            f"{y}: &{y} [{','.join([f'*{x}'] * 10)}]\n" for x, y in zip("abcdef", "bcdefg", strict=True)
        ),
        "more than 1000000 values",
    ),
    "no method": ("models: []\n", "merge_method: Field required"),
    "unknown method": ("merge_method: lineer\nmodels:\n- model: {0}\n", "Unimplemented merge method lineer"),
    "no models": ("merge_method: linear\n", "Exactly one of 'models', 'slices', or 'modules'"),
    "no folder": (
        "merge_method: linear\nmodels:\n- model: {0}/nowhere/at/all\n",
        "no such folder: .*nowhere",
    ),
    "no weight": ("merge_method: linear\nmodels:\n- model: {0}\n", "Missing required parameter weight"),
    "no base": (
        "merge_method: ties\nmodels:\n- model: {0}\n  parameters: {{weight: 1}}\n",
        "requires a base input",
    ),
    "layers": (
        "merge_method: passthrough\nslices:\n- sources:\n  - model: {0}\n    layer_range: [0, 1000000000]\n",
        "have 1000000000 layers, at most 10000",
    ),
    "a layer too many": (
        "merge_method: passthrough\nslices:\n- sources:\n  - model: {0}\n    layer_range: [0, 3]\n",
        r"'model\.layers\.2\..* is wanted from model .*, which has no such tensor; check its layer_range",
    ),
    "backwards": (
        "merge_method: passthrough\nslices:\n- sources:\n  - model: {0}\n    layer_range: [2, 0]\n",
        r"layer_range \[2, 0\]",
    ),
    "dtype": (LINEAR + "dtype: float8\n", 'Unimplemented dtype "float8"'),
    "template": (LINEAR + "chat_template: chatmll\n", "'chatmll' is neither a Jinja text nor a name"),
    "text": (LINEAR + "dtype: \x00\n", "no valid YAML"),
    "number as a key": (LINEAR + "1: 2\n", "expected names as keys, found 1"),
    "weights that cancel out": (
        LINEAR + "- model: {1}\n  parameters: {{weight: -1}}\n",
        r"weights \[1\.0, -1\.0\] sum to 0; set normalize: false",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_one_line_and_leaves_nothing(name, llamas, tmp_path):
    text, expected = REFUSED[name]
    file = tmp_path / "bad.yml"
    file.write_text(text.format(*llamas) if "{0}" in text or "{{" in text else text)
    with pytest.raises(CheckpointError, match=expected) as caught:
        write_config(file, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(file)) or name in ("no folder", "template")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yml"]


def test_files_that_are_no_text(tmp_path):
    file = tmp_path / "bad.yml"
    file.write_bytes(b"\xff\xfe\x00merge")
    with pytest.raises(CheckpointError, match="no text in UTF-8"):
        write_config(file, tmp_path / "out")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        write_config(tmp_path, tmp_path / "out")


def test_other_architectures_and_broken_shards_are_refused(llamas, gpt2s, tmp_path):
    import shutil

    data = {"merge_method": "linear", "models": [model(llamas[0], weight=1), model(gpt2s[0], weight=1)]}
    with pytest.raises(CheckpointError, match=r"mergekit refuses it: .*architectures"):
        ours(data, tmp_path / "out")
    broken = tmp_path / "broken"
    shutil.copytree(llamas[1], broken)
    shard = broken / "model.safetensors"
    for damage in (shard.read_bytes()[:-100], b"\x00" * 64, b""):
        shard.write_bytes(damage)
        data = {"merge_method": "linear", "models": [model(llamas[0], weight=1), model(broken, weight=1)]}
        with pytest.raises(
            CheckpointError, match=r"broken/model\.safetensors: not a readable safetensors file"
        ) as caught:
            ours(data, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_misspelt_keys_are_named(llamas, tmp_path):
    data = CASES["linear"](*llamas) | {"paramters": {"normalize": False}, "parameters": {"normalise": False}}
    _, written = ours(data, tmp_path / "out")
    assert "'paramters' is no key of mergekit's and was ignored; did you mean 'parameters'" in written.words()
    assert "parameter 'normalise' is unknown and was ignored; did you mean 'normalize'" in written.words()
