"""What a forward pass costs in arithmetic, and how fast this machine does it: the terms of a cost estimate."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

_SECONDS = 0.4
_SIZES = (256, 512, 1024, 2048, 4096, 8192)


def matmul_rate(dtype: torch.dtype, device: torch.device | str) -> float:
    """FLOP/s of torch.mm with square matrices: the best of a few, of sizes that are done within half a second together.

    Memory: three matrices, at most 0.8 GB (a GPU, float32). On a machine that is busy it is the share that is left.
    """
    device = torch.device(device)
    best = 0.0
    _seconds(*(torch.ones((16, 16), dtype=dtype, device=device) for _ in range(3)))  # wakes the library
    end = time.perf_counter() + _SECONDS
    for size in _SIZES:
        work = 2.0 * size**3
        if best and time.perf_counter() + work / best > end:
            break
        one, other = (torch.ones((size, size), dtype=dtype, device=device) for _ in range(2))
        out = torch.empty_like(one)
        enough = time.perf_counter() + _SECONDS / 8
        # the first of a size also chooses kernels and wakes threads
        best = max(best, work / _seconds(one, other, out))
        for _ in range(3):
            if time.perf_counter() > enough:
                break
            best = max(best, work / _seconds(one, other, out))
    return best


def _seconds(one: torch.Tensor, other: torch.Tensor, out: torch.Tensor) -> float:
    _wait(one.device)
    start = time.perf_counter()
    torch.mm(one, other, out=out)
    _wait(one.device)
    return max(time.perf_counter() - start, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forward_flops(model: Any, tokens: int, context: float, targets: int) -> float:
    """FLOP of the matrix products of a forward pass of a causal LM; a multiply and an add are two.

    model: the module, or its config (built on torch's meta device then, which takes no memory). tokens: that pass
    through the layers. context: keys that a token's attention computes with, on the average: the length of the row for
    kernels that compute what the mask hides, half of it for causal ones. targets: positions whose logits are computed.
    Of experts the active share is counted. Not counted: convolutions, recurrences, norms.
    """
    network = model if isinstance(model, nn.Module) else _on_meta(model)
    config: Any = network.config
    config = config.get_text_config()
    head: nn.Module | None = network.get_output_embeddings()  # type: ignore[operator]
    share = _active_share(config)
    per_token = 0.0
    for name, module in network.named_modules():
        if module is not head:
            per_token += _weights(name, module) * (share if "experts" in name.split(".") else 1.0)
    per_target = 0 if head is None else sum(p.numel() for p in head.parameters() if p.dim() == 2)
    return 2.0 * (tokens * per_token + targets * per_target) + tokens * _attention(config, context)


def _on_meta(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        built: nn.Module = AutoModelForCausalLM.from_config(config)
    return built


def _active_share(config: Any) -> float:
    """Experts per token of all experts, as configs call them; 1 where they do not say."""
    active = _first(config, "num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_topk")
    experts = _first(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return min(1.0, active / experts) if active and experts else 1.0


def _first(config: Any, *names: str) -> int | None:
    return next((found for name in names if isinstance(found := getattr(config, name, None), int)), None)


def _weights(name: str, module: nn.Module) -> int:
    """Elements of the module's own weights that tokens are multiplied with: of linear layers, experts and routers."""
    from transformers.pytorch_utils import Conv1D

    kind = type(module).__name__.lower()
    experts = "experts" in name.split(".")
    if (
        not experts
        and not isinstance(module, (nn.Linear, Conv1D))
        and "router" not in kind
        and "gate" not in kind
    ):
        return 0
    own = module.named_parameters(recurse=False)
    return sum(p.numel() for label, p in own if p.dim() >= 2 and "bias" not in label)


def _attention(config: Any, context: float) -> float:
    """FLOP per token of scores and of their products with values, in all layers."""
    layers, heads = int(config.num_hidden_layers), int(config.num_attention_heads)
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    query = getattr(config, "qk_head_dim", None) or head
    value = getattr(config, "v_head_dim", None) or head
    window = getattr(config, "sliding_window", None) or context
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    keys = 0.0
    for kind in kinds[:layers]:
        if kind == "sliding_attention":
            keys += min(context, window)
        elif kind.endswith("attention") and not kind.startswith("linear"):
            keys += context
    return float(2.0 * keys * heads * (query + value))
