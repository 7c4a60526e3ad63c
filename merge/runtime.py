"""The runtime model (transformers), and the map from checkpoint tensors to its parameters.

A map is believed only after a round trip: the model, as loaded, must hold the base's tensors at the mapped places.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import CheckpointError, RecipeError, nearest
from shoal.merge.checkpoint import Parent

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
    """The causal language model in `path`, in eval mode, without gradients, computing in `dtype` on `device`."""
    from transformers import AutoModelForCausalLM

    wanted = torch_dtype(dtype) if isinstance(dtype, str) else dtype
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            path, dtype=wanted, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: transformers cannot load it as a causal language model: {error}"
        ) from error
    return model.to(device).eval().requires_grad_(False)


def runtime_map(model: nn.Module, base: Parent) -> tuple[dict[str, Tensor], str | None]:
    """Where each tensor of `base` lives in `model`: checkpoint name -> parameter, and why not where there is no map.

    Tied weights appear once: the checkpoint's name for either twin leads to the one shared parameter.
    """
    held = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, Tensor] = {}
    for name in base.names:
        # checkpoints of a bare model lack the prefix, and the other way round
        candidates = (name, prefix + name, name.removeprefix(prefix))
        parameter = next((held[c] for c in candidates if c in held), None)
        if parameter is None:
            return {}, f"tensor {name!r} has no parameter of its own in {type(model).__name__}"
        if tuple(parameter.shape) != base.shape(name):
            return {}, f"tensor {name!r} has another shape in {type(model).__name__}"
        expected = base.tensor(name).to(device=parameter.device, dtype=parameter.dtype)
        if not torch.equal(parameter.detach(), expected):
            return {}, f"tensor {name!r} has other values in {type(model).__name__}"
        found[name] = parameter.detach()
    filled = {p.data_ptr() for p in found.values()}
    for name, parameter in model.named_parameters():
        if parameter.numel() and parameter.data_ptr() not in filled:
            return {}, f"parameter {name!r} of {type(model).__name__} is filled by no tensor"
    return found, None


def convert_into(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Let transformers convert checkpoint tensors as it does at load, and copy the result into `model`, in place."""
    state = dict(tensors)
    kind: Any = type(model)
    config: Any = model.config
    dtype = next(model.parameters()).dtype
    fresh: nn.Module = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    values: Mapping[str, Tensor] = dict(fresh.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
