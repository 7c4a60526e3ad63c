"""Tiny real checkpoints: a base and models a small step away from it, made by transformers, random but seeded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.types import MergePlan, OutputGroup, Source, TensorGroup

WORDS = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{i}" for i in range(60))]
MakePlan = Callable[..., MergePlan]


def save_tokenizer(
    folder: Path, words: Sequence[str] = WORDS, eos: str = "</s>", template: str | None = None
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token=eos, pad_token="<pad>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)


def llama(seed: int, tied: bool = False, layers: int = 2, vocabulary: int = 64, hidden: int = 32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def perturb(model: Any, seed: int, scale: float = 0.01) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def family(
    folder: Path, make: Callable[[], Any], count: int = 4, dtype: torch.dtype = torch.float32
) -> list[Path]:
    """base, m1, m2, ...: folders of a base and models near it, with one tokenizer."""
    paths = []
    for index in range(count):
        model = make()
        if index:
            perturb(model, seed=100 + index)
        path = folder / ("base" if index == 0 else f"m{index}")
        model.to(dtype).save_pretrained(path)
        save_tokenizer(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="session")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return family(tmp_path_factory.mktemp("llama"), lambda: llama(0))


@pytest.fixture(scope="session")
def tied_llamas(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return family(tmp_path_factory.mktemp("tied"), lambda: llama(1, tied=True), count=3)


@pytest.fixture(scope="session")
def bf16_llamas(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return family(tmp_path_factory.mktemp("bf16"), lambda: llama(2), count=3, dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def gpt2s(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from transformers import GPT2Config, GPT2LMHeadModel

    def make() -> Any:
        torch.manual_seed(3)
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32))

    return family(tmp_path_factory.mktemp("gpt2"), make, count=3)


@pytest.fixture(scope="session")
def mixtrals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Experts that transformers fuses at load: several checkpoint tensors lie in one parameter."""
    from transformers import MixtralConfig, MixtralForCausalLM

    def make() -> Any:
        torch.manual_seed(4)
        config = MixtralConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            num_local_experts=3,
            num_experts_per_tok=2,
            max_position_embeddings=64,
        )
        return MixtralForCausalLM(config)

    return family(tmp_path_factory.mktemp("mixtral"), make, count=3)


@pytest.fixture
def make_plan() -> MakePlan:
    """plan(groups, operator, models, ...): every group and source with other weights, so that mix-ups show."""

    def plan(
        groups: Sequence[TensorGroup],
        operator: str,
        models: int,
        base: int | None = 0,
        sources: Sequence[int] | None = None,
        source_parameters: Callable[[int, int], Mapping[str, float]] | None = None,
        group_parameters: Callable[[int], Mapping[str, float | bool]] | None = None,
        dtype: str = "float32",
        seed: int = 0,
    ) -> MergePlan:
        chosen = sources if sources is not None else [i for i in range(models) if i != base]

        def default(group: int, source: int) -> Mapping[str, float]:
            return {"weight": 0.2 + 0.1 * source + 0.03 * group}

        of_source = source_parameters or default
        outputs = tuple(
            OutputGroup(
                g.name,
                operator,
                tuple(Source(model, g.name, of_source(i, j)) for j, model in enumerate(chosen)),
                g.tensors,
                group_parameters(i) if group_parameters else {},
            )
            for i, g in enumerate(groups)
        )
        return MergePlan(("base", *(f"m{i}" for i in range(1, models))), base, outputs, dtype, seed)

    return plan


@pytest.fixture
def small_llama() -> Callable[..., Any]:
    return lambda **sizes: llama(5, **sizes)


@pytest.fixture
def tokenizer() -> Callable[..., None]:
    return save_tokenizer


@pytest.fixture
def words() -> list[str]:
    return list(WORDS)


@pytest.fixture(scope="session")
def save_family() -> Callable[..., list[Path]]:
    return family
