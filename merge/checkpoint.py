"""A checkpoint on disk: config.json and safetensors, read lazily (the files are memory-mapped, never copied whole)."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shoal.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# names under which transformers saves an output matrix and the input matrix it may be tied to
_HEADS = ("lm_head.weight", "embed_out.weight")
_INPUTS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


class Parent(Protocol):
    """What can be merged: a checkpoint, or an adapter applied to one. Tensors are on the CPU; do not write to them."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and safetensors. Make one with `Checkpoint.open`.

    A stored copy of a tied output matrix (equal bits, `tie_word_embeddings`) is left out of `names`: it is no weight
    of its own, and would have to be merged exactly like its twin.
    """

    path: Path
    config: Mapping[str, Any]
    names: tuple[str, ...]
    _entries: Mapping[str, _Entry] = field(repr=False)
    _handles: dict[Path, Any] = field(repr=False, compare=False, default_factory=dict)

    @staticmethod
    def open(path: Path) -> Checkpoint:
        """Read config and headers; CheckpointError names the file and what to do when they cannot be used."""
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(
                f"{path}: no such model folder; expected a folder with config.json and safetensors"
            )
        config = read_json(path / "config.json", "the model's configuration")
        entries: dict[str, _Entry] = {}
        for file, expected in _files(path).items():
            found = read_header(file)
            for name in expected - found.keys():
                raise CheckpointError(
                    f"{path / INDEX}: names tensor {name!r} in {file.name}, which does not hold it; "
                    "download the model again"
                )
            entries.update(found)
        checkpoint = Checkpoint(path, config, tuple(sorted(entries)), entries)
        copies = _tied_copies(checkpoint)
        kept = tuple(n for n in checkpoint.names if n not in copies)
        return Checkpoint(path, config, kept, {n: entries[n] for n in kept})

    def files(self) -> tuple[Path, ...]:
        """The safetensors files, sorted."""
        return tuple(sorted({e.file for e in self._entries.values()}))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def tensor(self, name: str) -> Tensor:
        """The stored tensor, memory-mapped, in its stored dtype."""
        file = self._entry(name).file
        if file not in self._handles:  # opening parses the whole header: once per file, not once per tensor
            self._handles[file] = safe_open(file, framework="pt")
        tensor: Tensor = self._handles[file].get_tensor(name)
        return tensor

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: no tensor {name!r} among its {len(self.names)}") from None


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a JSON file; CheckpointError when it is missing or is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no {path.name} ({what}); is this a model folder?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); download the model again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def read_header(file: Path) -> dict[str, _Entry]:
    """Shapes and dtypes of the tensors in one safetensors file."""
    if not file.is_file():
        raise CheckpointError(f"{file}: shard missing, but the index names it; download the model again")
    try:
        with safe_open(file, framework="pt"):  # checks offsets against the file's length
            pass
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{file}: not a readable safetensors file ({error}); download it again"
        ) from None
    header.pop("__metadata__", None)
    entries = {}
    for name, info in header.items():
        if info["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{file}: tensor {name!r} has dtype {info['dtype']}, which cannot be merged"
            )
        entries[name] = _Entry(file, tuple(info["shape"]), _DTYPES[info["dtype"]])
    return entries


def _files(path: Path) -> dict[Path, set[str]]:
    """Safetensors files of a folder, each with the tensor names that the index expects in it."""
    if (path / INDEX).is_file():
        weight_map = read_json(path / INDEX, "the index of the shards").get("weight_map", {})
        files: dict[Path, set[str]] = {}
        for name, shard in weight_map.items():
            if Path(shard).name != shard:
                raise CheckpointError(f"{path / INDEX}: shard {shard!r} lies outside the model's folder")
            files.setdefault(path / shard, set()).add(name)
        return dict(sorted(files.items()))
    if (path / SINGLE).is_file():
        return {path / SINGLE: set()}
    others = sorted(p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if others:
        raise CheckpointError(
            f"{path}: holds only {others[0]}; only safetensors are read (a pickle can run code): "
            "convert it with transformers' save_pretrained"
        )
    raise CheckpointError(f"{path}: neither {SINGLE} nor {INDEX}; is this a model folder?")


def _tied_copies(checkpoint: Checkpoint) -> set[str]:
    if not checkpoint.config.get("tie_word_embeddings", True):
        return set()
    inputs = [n for n in checkpoint.names if n.endswith(_INPUTS)]
    return {
        head
        for head in checkpoint.names
        if head.endswith(_HEADS)
        for twin in inputs
        if checkpoint.shape(head) == checkpoint.shape(twin)
        and checkpoint.dtype(head) == checkpoint.dtype(twin)
        and torch.equal(checkpoint.tensor(head), checkpoint.tensor(twin))
    }
