"""LoRA adapters as parents: base + scaling * B @ A, computed when a tensor is asked for.

The product is a sum of outer products over the rank, in order, by separate multiplies and adds in float32: a BLAS
matmul would make the bits depend on the machine and the thread count. Adapters that are more than plain LoRA
(DoRA, trained biases, saved modules, rank patterns, ...) are merged by peft itself, in float32 on the CPU.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shoal.errors import CheckpointError
from shoal.merge.checkpoint import Checkpoint, Parent, read_json
from shoal.merge.hashing import weights_sha256

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE_HASH = "shoal_base.json"
_PREFIX = "base_model.model."
_ROWS_OF = 1 << 20  # elements per block: stays in cache, and does not change the result
# settings of peft's LoraConfig that make an adapter more than W + scaling * B @ A, unless they have this value
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on a checkpoint; its target tensors are float32, the others are the base's own.

    _factors: checkpoint tensor name -> (A, B), shapes (rank, in) and (out, rank).
    """

    base: Checkpoint
    adapter: Path
    scaling: float
    transposed: bool
    _factors: Mapping[str, tuple[Tensor, Tensor]] = field(repr=False)
    _whole: Mapping[str, Tensor] = field(repr=False, default_factory=dict)

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def config(self) -> Mapping[str, Any]:
        return self.base.config

    @property
    def names(self) -> tuple[str, ...]:
        return self.base.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._factors or name in self._whole else self.base.dtype(name)

    def tensor(self, name: str) -> Tensor:
        if name in self._whole:
            return self._whole[name]
        stored = self.base.tensor(name)
        if name not in self._factors:
            return stored
        a, b = self._factors[name]
        delta = low_rank(a, b, self.scaling)
        return stored.to(torch.float32) + (delta.T if self.transposed else delta)


def low_rank(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling * (b @ a) in float32, bit for bit the same everywhere. a: (rank, in), b: (out, rank) -> (out, in)."""
    a, b = a.to(torch.float32), b.to(torch.float32)
    product = torch.zeros(b.shape[0], a.shape[1])
    rows = max(1, _ROWS_OF // max(1, a.shape[1]))
    for start in range(0, b.shape[0], rows):
        block = product[start : start + rows]
        for r in range(a.shape[0]):
            block.add_(b[start : start + rows, r : r + 1] * a[r : r + 1])
        block.mul_(scaling)
    return product


def open_parent(path: Path, adapter: Path | None = None) -> Parent:
    """A checkpoint, or `adapter` (a folder in peft's format) applied to it.

    CheckpointError when the adapter is unreadable, targets tensors that the base lacks, or (where the adapter says
    on which weights it was trained) belongs to another base.
    """
    base = Checkpoint.open(path)
    if adapter is None:
        return base
    adapter = Path(adapter)
    config = read_json(adapter / CONFIG, "the adapter's configuration")
    _check_base(base, adapter)
    if not (adapter / WEIGHTS).is_file():
        raise CheckpointError(
            f"{adapter}: no {WEIGHTS}; only safetensors are read, save the adapter with peft again"
        )
    try:
        weights = load_file(adapter / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{adapter / WEIGHTS}: not a readable safetensors file ({error})") from None
    plain = all(config.get(key, allowed[0]) in allowed for key, allowed in _PLAIN.items())
    pairs = _pairs(adapter, weights)
    if not plain or 2 * len(pairs) != len(weights):
        return Adapter(base, adapter, 0.0, False, {}, _merged_by_peft(base, adapter))
    factors = {_target(base, adapter, module): pair for module, pair in pairs.items()}
    rank = config["r"]
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    transposed = bool(config.get("fan_in_fan_out"))
    for name, (a, b) in factors.items():
        product = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
        if a.shape[0] != b.shape[1] or product != base.shape(name):
            raise CheckpointError(
                f"{adapter}: its factors for {name!r} make a {product} matrix, but {base.path} has "
                f"{base.shape(name)}; use the base that it was trained on"
            )
    return Adapter(base, adapter, scaling, transposed, factors)


def _check_base(base: Checkpoint, adapter: Path) -> None:
    note = adapter / BASE_HASH
    if not note.is_file():
        return
    expected = read_json(note, "the hash of the adapter's base").get("weights_sha256")
    found = weights_sha256((n, base.tensor(n)) for n in base.names)
    if expected != found:
        raise CheckpointError(
            f"{adapter}: trained on a base with weights_sha256 {expected}, but {base.path} has {found}; "
            "use the base that it was trained on, or train the adapter again on this one"
        )


def _pairs(adapter: Path, weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name -> (A, B), of the plain linear pairs in the file."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        for letter in ("A", "B"):
            module = key.removesuffix(f".lora_{letter}.weight")
            if module != key:
                halves.setdefault(module.removeprefix(_PREFIX), {})[letter] = tensor
    for module, found in halves.items():
        if len(found) != 2:
            raise CheckpointError(
                f"{adapter}: holds lora_{next(iter(found))} of module {module!r} without its other factor; "
                "save the adapter with peft again"
            )
    return {m: (f["A"], f["B"]) for m, f in halves.items() if f["A"].dim() == f["B"].dim() == 2}


def _target(base: Checkpoint, adapter: Path, module: str) -> str:
    """The checkpoint's name for a module's weight: old checkpoints lack the first part (`transformer.`)."""
    for name in (f"{module}.weight", f"{module.partition('.')[2]}.weight"):
        if name in base.names:
            return name
    raise CheckpointError(
        f"{adapter}: changes module {module!r}, but {base.path} has no tensor '{module}.weight'; "
        "use the base that it was trained on"
    )


def _merged_by_peft(base: Checkpoint, adapter: Path) -> dict[str, Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32, local_files_only=True)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except (ValueError, RuntimeError, KeyError, OSError, TypeError) as error:
        raise CheckpointError(f"{adapter}: peft cannot apply it to {base.path}: {error}") from error
    with tempfile.TemporaryDirectory(prefix="shoal-adapter-") as folder:
        # saving is what turns runtime names back into checkpoint names
        merged.save_pretrained(folder)
        saved = Checkpoint.open(Path(folder))
        tensors = {n: saved.tensor(n).clone() for n in saved.names}
    if missing := sorted(set(base.names) - tensors.keys()):
        raise CheckpointError(f"{adapter}: after peft's merge tensor {missing[0]!r} of {base.path} is gone")
    return tensors
