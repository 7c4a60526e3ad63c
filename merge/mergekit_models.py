"""The models of a mergekit configuration: fetched or found, opened by our readers, shown to mergekit as its loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from shoal.errors import CheckpointError
from shoal.merge.adapter import open_parent
from shoal.merge.checkpoint import Checkpoint, Parent

HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class Complete:
    """A checkpoint with the stored copies of tied weights, which Checkpoint leaves out and mergekit merges too.

    copies: their names, and the files that hold them.
    """

    parent: Checkpoint
    copies: Mapping[str, Path]

    @property
    def path(self) -> Path:
        return self.parent.path

    @property
    def config(self) -> Mapping[str, Any]:
        return self.parent.config

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.parent.names, *self.copies)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensor(name).shape) if name in self.copies else self.parent.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensor(name).dtype if name in self.copies else self.parent.dtype(name)

    def tensor(self, name: str) -> Tensor:
        if name not in self.copies:
            return self.parent.tensor(name)
        with safe_open(self.copies[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


@dataclass(frozen=True)
class Renamed:
    """A parent whose tensors have the names of the outputs that they go into.

    stored: output name -> the parent's own name. So layers may come from anywhere, the base's too.
    """

    parent: Parent
    stored: Mapping[str, str]

    @property
    def path(self) -> Path:
        return self.parent.path

    @property
    def config(self) -> Mapping[str, Any]:
        return self.parent.config

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.parent.shape(self.stored[name])

    def dtype(self, name: str) -> torch.dtype:
        return self.parent.dtype(self.stored[name])

    def tensor(self, name: str) -> Tensor:
        return self.parent.tensor(self.stored[name])


@dataclass(frozen=True)
class _Index:
    tensor_paths: Mapping[str, str]


@dataclass(frozen=True)
class Loader:
    """What mergekit asks of a loader, answered by a Parent."""

    parent: Parent
    index: _Index

    @staticmethod
    def of(parent: Parent) -> Loader:
        return Loader(parent, _Index({n: n for n in parent.names}))

    def get_tensor(self, key: str, device: str = "cpu", aliases: Sequence[str] | None = None) -> Tensor:
        # some methods write into what they get; the memory-mapped original must stay as it is
        return self.parent.tensor(key).to(device, copy=True)

    def flush(self) -> None:
        return None


def local_reference(reference: Any) -> Any:
    """`reference` (mergekit's ModelReference) with folders instead of Hub ids: fetched, or found in the cache."""
    model = _folder(reference, reference.model)
    lora = None if reference.lora is None else _folder(reference, reference.lora)
    return reference.model_copy(update={"model": model, "lora": lora})


def _folder(reference: Any, part: Any) -> Any:
    found = fetched(part.path, part.revision, str(reference))
    return part.model_copy(update={"path": str(found), "revision": None})


def fetched(path: str, revision: str | None, name: str) -> Path:
    """The folder `path`, or that of the Hub's repository `path`, fetched or found in the cache. name: for errors."""
    if Path(path).exists():
        return Path(path)
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=list(HUB_FILES))
        )
    except errors.HFValidationError:
        raise CheckpointError(f"model {name}: no such folder: {path}") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"model {name}: {path} is no folder here, and cannot be fetched from the Hub or its cache "
            f"({reason})"
        ) from None


def open_reference(reference: Any) -> Parent:
    """The parent behind a local reference, with everything that mergekit would find in its files."""
    return open_folder(
        Path(reference.model.path), None if reference.lora is None else Path(reference.lora.path)
    )


def open_folder(folder: Path, lora: Path | None = None) -> Parent:
    """The model in a folder, stored copies of tied weights included, with a LoRA applied where there is one."""
    parent = open_parent(folder, lora)
    if not isinstance(parent, Checkpoint):
        return parent
    kept = set(parent.names)
    copies = {}
    for file in parent.files():
        with safe_open(file, framework="pt") as opened:
            copies.update({n: file for n in opened.keys() if n not in kept})  # noqa: SIM118
    return Complete(parent, copies) if copies else parent


def references_in(value: Any) -> Iterator[Any]:
    """All ModelReferences in a configuration, in the order in which they stand there."""
    from mergekit.common import ModelReference
    from pydantic import BaseModel

    if isinstance(value, ModelReference):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from references_in(getattr(value, name))
    elif isinstance(value, dict | list | tuple):
        for child in value.values() if isinstance(value, dict) else value:
            yield from references_in(child)


def with_references(value: Any, replace: Callable[[Any], Any]) -> Any:
    """A copy of a configuration with other ModelReferences."""
    from mergekit.common import ModelReference
    from pydantic import BaseModel

    if isinstance(value, ModelReference):
        return replace(value)
    if isinstance(value, BaseModel):
        fields = {n: with_references(getattr(value, n), replace) for n in type(value).model_fields}
        return value.model_copy(update=fields)
    if isinstance(value, dict):
        return {k: with_references(v, replace) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(with_references(v, replace) for v in value)
    return value
