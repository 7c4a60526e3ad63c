"""Counted products against torch's own counter, and the machine's rate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shoal.evals.machine import forward_flops, matmul_rate

ROWS, WIDTH, KEEP = 3, 20, 5


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": 200,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaConfig(**sizes | changes)


def gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(vocab_size=200, n_embd=64, n_layer=3, n_head=4, n_positions=64)


def qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=48,
        num_experts=6,
        num_experts_per_tok=2,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mlp_only_layers=[1],
        experts_implementation="eager",
    )


def gemma2() -> Any:
    from transformers import Gemma2Config

    return Gemma2Config(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )


def gpt_oss() -> Any:
    from transformers import GptOssConfig

    return GptOssConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=48,
        num_local_experts=6,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        experts_implementation="eager",
    )


def deepseek() -> Any:
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=48,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=24,
        experts_implementation="eager",
    )


def counted(model: Any) -> int:
    counter = FlopCounterMode(display=False)
    ids = torch.arange(ROWS * WIDTH).view(ROWS, WIDTH)
    with torch.no_grad(), counter:
        model(ids, logits_to_keep=KEEP, use_cache=False)
    return int(counter.get_total_flops())


CONFIGS = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "wide heads": lambda: llama(head_dim=48),
    "gpt2": gpt2,
    "qwen3_moe": qwen3_moe,
    "gemma2": gemma2,
    "gpt_oss": gpt_oss,
    "deepseek_v3": deepseek,
}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_count_is_torchs(name: str) -> None:
    from transformers import AutoModelForCausalLM

    config = CONFIGS[name]()
    # torch does not count the attention kernels of a CPU
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    expected = counted(model)
    # torch also counts the rotary angles, an outer product
    assert forward_flops(model, ROWS * WIDTH, WIDTH, ROWS * KEEP) == pytest.approx(expected, rel=3e-3)
    assert forward_flops(model, ROWS * WIDTH, WIDTH, ROWS * KEEP) <= expected
    assert forward_flops(config, ROWS * WIDTH, WIDTH, ROWS * KEEP) == forward_flops(
        model, ROWS * WIDTH, WIDTH, ROWS * KEEP
    )


def test_layers_with_a_window_or_without_attention_cost_less() -> None:
    from transformers import Gemma2Config

    config = Gemma2Config(num_hidden_layers=2, num_attention_heads=4, head_dim=16, sliding_window=100)
    config.vocab_size, config.hidden_size, config.intermediate_size = 200, 64, 96
    assert config.layer_types == ["sliding_attention", "full_attention"]
    more = forward_flops(config, 1, 1000, 0) - forward_flops(config, 1, 50, 0)
    assert more == 4 * 4 * 16 * ((100 - 50) + (1000 - 50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rate_is_a_rate(dtype: torch.dtype) -> None:
    rate = matmul_rate(dtype, "cpu")
    assert math.isfinite(rate) and rate > 0


@pytest.mark.gpu
def test_the_rate_of_a_gpu_is_above_that_of_its_host() -> None:
    assert matmul_rate(torch.bfloat16, "cuda") > 10 * matmul_rate(torch.float32, "cpu")
