"""The runtime model: loaded by transformers, and filled by it where there is no map to its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import CheckpointError, RecipeError, nearest
from shoal.merge.runtime_map import runtime_map

__all__ = ["convert_into", "load_runtime", "runtime_map", "torch_dtype"]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype called `name` (`float32`, `bfloat16`, ...); RecipeError otherwise."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise RecipeError(f"unknown dtype {name!r}; {nearest(name, _DTYPES)}") from None


def load_runtime(path: Path, dtype: str | torch.dtype = "float32", device: str = "cpu") -> nn.Module:
    """The causal language model in `path`, in eval mode, without gradients, computing in `dtype` on `device`.

    CheckpointError where there is none: models without such a head (encoders, classifiers) are merged without a
    runtime model, by `Merger(parents, groups).tensors`.
    """
    from transformers import AutoModelForCausalLM

    wanted = torch_dtype(dtype) if isinstance(dtype, str) else dtype
    model: nn.Module
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=wanted, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: transformers cannot load it as a causal language model: {error}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{path}: holds no tensor for {missing[0]!r} ({len(missing)} in all), which {type(model).__name__} needs; "
            "transformers would fill it at random: only a causal language model can be run here"
        )
    return model.to(device).eval().requires_grad_(False)


def convert_into(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Let transformers convert checkpoint tensors as it does at load, and copy the result into `model`, in place."""
    state = dict(tensors)
    kind: Any = type(model)
    config: Any = model.config
    dtype = next(model.parameters()).dtype
    fresh: nn.Module = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    values: Mapping[str, Tensor] = fresh.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():  # stored buffers too: some routers have a bias in one
            tensor.copy_(values[name])
