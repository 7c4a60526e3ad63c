"""Checkpoints to measure with: the shapes of known models, filled with seeded noise."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

# configurations of Llama-like models: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied, head size
_SHAPES: dict[str, tuple[int, int, int, int, int, int, bool, int]] = {
    "135M": (576, 1536, 30, 9, 3, 49152, True, 64),
    "1B": (2048, 8192, 16, 32, 8, 128256, True, 64),
    "7B": (4096, 11008, 32, 32, 32, 32000, False, 128),
    "8B": (4096, 14336, 32, 32, 8, 128256, False, 128),
    "12B": (5120, 14336, 40, 32, 8, 131072, False, 128),
}
SHAPES = tuple(_SHAPES)


def configuration(shape: str) -> Any:
    """transformers' configuration of a Llama of this shape."""
    from transformers import LlamaConfig

    hidden, intermediate, layers, heads, kv, vocabulary, tied, head = _SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=head,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def tensor_shapes(shape: str) -> dict[str, tuple[int, ...]]:
    """Checkpoint tensors and their shapes."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(configuration(shape))
    tied = _SHAPES[shape][6]
    return {
        name: tuple(p.shape)
        for name, p in model.named_parameters()
        if not (tied and name == "lm_head.weight")
    }


def noise(shape: tuple[int, ...], seed: int, scale: float) -> Tensor:
    """bfloat16 noise, cheap: a random stretch, repeated."""
    numel = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    stretch = torch.randn(min(numel, (1 << 20) + 7 * seed % 1000), generator=generator) * scale
    repeats = -(-numel // len(stretch))
    return stretch.repeat(repeats)[:numel].view(shape).to(torch.bfloat16)


@dataclass
class NoiseParent:
    """A parent in memory, made of noise: `base` at scale 0.02; model i a step from it, half of it common to all."""

    shape_name: str
    model: int
    path: Path = Path("noise")
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _cache: dict[str, Tensor] = field(default_factory=dict)
    keep: bool = True

    def __post_init__(self) -> None:
        self._shapes = tensor_shapes(self.shape_name)

    @property
    def config(self) -> dict[str, Any]:
        return dict(configuration(self.shape_name).to_dict())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._shapes))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def tensor(self, name: str) -> Tensor:
        if name in self._cache:
            return self._cache[name]
        place = self.names.index(name)
        made = noise(self._shapes[name], place, 0.02)
        if self.model:
            own = noise(self._shapes[name], 1000 * self.model + place, 0.002)
            common = noise(self._shapes[name], 900 + place, 0.002)
            made = (made.float() + own.float() + common.float()).to(torch.bfloat16)
        if self.keep:
            self._cache[name] = made
        return made


def write(shape: str, folder: Path, models: int) -> list[Path]:
    """base, m1, ... as model folders in `folder`; those that are there are kept."""
    paths = []
    for model in range(models):
        path = folder / shape / ("base" if model == 0 else f"m{model}")
        paths.append(path)
        if (path / "config.json").is_file():
            continue
        path.mkdir(parents=True, exist_ok=True)
        parent = NoiseParent(shape, model, keep=False)
        names = parent.names
        limit, shards, size = 2 << 30, [[]], 0
        for name in names:
            nbytes = 2 * torch.Size(parent.shape(name)).numel()
            if shards[-1] and size + nbytes > limit:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += nbytes
        files = (
            ["model.safetensors"]
            if len(shards) == 1
            else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        )
        for file, members in zip(files, shards, strict=True):
            save_file({n: parent.tensor(n) for n in members}, path / file, metadata={"format": "pt"})
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": 0},
                "weight_map": {n: f for f, ns in zip(files, shards, strict=True) for n in ns},
            }
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
        _tokenizer(path)
        (path / "config.json").write_text(json.dumps(configuration(shape).to_dict(), default=str))
    return paths


def _tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(64)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0").save_pretrained(path)


def runtime_model(parent: NoiseParent | Any, shape: str) -> nn.Module:
    """A bfloat16 runtime model on the CPU that holds the parent's weights, without a checkpoint on disk."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(configuration(shape)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        held = dict(model.named_parameters())
        for name in parent.names:
            held[name].copy_(parent.tensor(name))
    return model.eval().requires_grad_(False)
