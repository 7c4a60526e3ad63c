"""The first module that breaks is named, whatever breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from shoal.evals.finite import FINITE, decoder_layers, first_broken

IDS = list(range(1, 12))
NAN, INF = float("nan"), float("inf")


def llama(dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=5,
        num_attention_heads=2,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=5, n_head=2, vocab_size=32)).to(dtype).eval()


def mixtral(experts: int = 8) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=experts,
    )
    return MixtralForCausalLM(config).eval()


def put(model: nn.Module, name: str, value: float) -> None:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[:] = value


def scale(model: nn.Module, name: str, factor: float) -> None:
    with torch.no_grad():
        model.get_parameter(name).mul_(factor)


@pytest.mark.parametrize("make", [llama, gpt2, mixtral])
def test_a_sound_model_is_finite_and_keeps_no_hooks(make: Callable[[], Any]) -> None:
    model = make()
    assert first_broken(model, IDS) == FINITE
    put(model, "lm_head.weight", NAN)
    first_broken(model, IDS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_are_removed_when_the_forward_fails() -> None:
    model = llama()
    with pytest.raises(IndexError):
        first_broken(model, [99])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


OVERFLOWS = "output overflows from finite weights and finite input"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.embed_tokens.weight", "embeddings (model.embed_tokens: weights are not finite)"),
        ("model.layers.0.input_layernorm.weight", "layer 0 (input_layernorm: weights are not finite)"),
        ("model.layers.3.mlp.down_proj.weight", "layer 3 (mlp.down_proj: weights are not finite)"),
        ("model.layers.4.self_attn.v_proj.weight", "layer 4 (self_attn.v_proj: weights are not finite)"),
        ("model.norm.weight", "final norm (model.norm: weights are not finite)"),
        ("lm_head.weight", "head (lm_head: weights are not finite)"),
    ],
)
@pytest.mark.parametrize("value", [NAN, INF])
def test_weights_of_a_llama(name: str, told: str, value: float) -> None:
    model = llama()
    put(model, name, value)
    assert first_broken(model, IDS) == told


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("transformer.wpe.weight", "embeddings (transformer.wpe: weights are not finite)"),
        ("transformer.h.2.attn.c_attn.bias", "layer 2 (attn.c_attn: weights are not finite)"),
        ("transformer.h.4.mlp.c_proj.weight", "layer 4 (mlp.c_proj: weights are not finite)"),
        ("transformer.ln_f.bias", "final norm (transformer.ln_f: weights are not finite)"),
        # tied: the head is the embedding, which is used first
        ("lm_head.weight", "embeddings (transformer.wte: weights are not finite)"),
    ],
)
def test_weights_of_a_gpt2(name: str, told: str) -> None:
    model = gpt2()
    put(model, name, NAN)
    assert first_broken(model, IDS) == told


def test_one_element_is_enough() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[2].mlp.gate_proj.weight[3, 5] = NAN
    assert first_broken(model, IDS) == "layer 2 (mlp.gate_proj: weights are not finite)"


def test_the_first_of_several_is_named() -> None:
    model = llama()
    put(model, "model.layers.4.mlp.up_proj.weight", NAN)
    put(model, "model.layers.1.self_attn.o_proj.weight", NAN)
    assert first_broken(model, IDS) == "layer 1 (self_attn.o_proj: weights are not finite)"


def test_experts_are_no_layers() -> None:
    model = mixtral()
    assert decoder_layers(model) == list(model.model.layers)
    put(model, "model.layers.1.mlp.experts.down_proj", NAN)
    assert first_broken(model, IDS) == "layer 1 (mlp.experts: weights are not finite)"


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float16, 1e6), (torch.bfloat16, 1e38)])
def test_a_product_that_overflows(dtype: torch.dtype, factor: float) -> None:
    model = llama(dtype)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.fill_(min(factor, torch.finfo(dtype).max / 2))
        model.model.layers[2].self_attn.v_proj.weight.abs_().mul_(100)
    assert first_broken(model, IDS) == f"layer 2 (self_attn.o_proj: {OVERFLOWS})"


def test_an_overflow_between_modules_is_of_the_module_around_them() -> None:
    """gate * up overflows in the code of the MLP: down_proj only receives it."""
    model = llama(torch.float16)
    scale(model, "model.layers.1.mlp.gate_proj.weight", 3e4)
    scale(model, "model.layers.1.mlp.up_proj.weight", 3e4)
    assert first_broken(model, IDS) == f"layer 1 (mlp: {OVERFLOWS})"


def test_an_overflow_of_the_residual_stream_is_of_the_layer() -> None:
    model = llama(torch.float16)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(6e4)
        model.model.layers[0].self_attn.v_proj.weight.fill_(1.0)
        model.model.layers[0].self_attn.o_proj.weight.fill_(200.0)
    assert first_broken(model, IDS) == f"layer 0 ({OVERFLOWS})"


def test_attention_that_overflows() -> None:
    model = llama(torch.float16, "eager")
    for name in ("q_proj", "k_proj"):
        scale(model, f"model.layers.3.self_attn.{name}.weight", 1e5)
    assert first_broken(model, IDS) == f"layer 3 (self_attn: {OVERFLOWS})"


def test_huge_weights_of_a_gpt2() -> None:
    model = gpt2()
    scale(model, "transformer.h.1.mlp.c_fc.weight", 1e38)
    scale(model, "transformer.h.1.mlp.c_proj.weight", 1e30)
    assert first_broken(model, IDS).startswith("layer 1 (mlp")


def test_a_head_that_overflows() -> None:
    model = llama(torch.float16)
    with torch.no_grad():
        model.lm_head.weight.fill_(6e4)
        model.model.norm.weight.fill_(1e3)
        model.model.norm.weight[::2] = 2e3
    assert first_broken(model, IDS) == f"head (lm_head: {OVERFLOWS})"
