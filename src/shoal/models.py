"""Where models come from: Hub, folder, zoo or adapter, resolved to folders whose files are known by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.availability import SMALL_FILES, WEIGHTS
from shoal.endpoint import client_errors, reason, retried, speaking, without_bars
from shoal.errors import CheckpointError
from shoal.lock import ModelLock
from shoal.outline import is_outline, outline
from shoal.types import AdapterModel, HubModel, LocalModel, ModelRef, ZooModel

HASHED_FILES = (*WEIGHTS, *SMALL_FILES)

Say = Callable[[str], None]


def open_parents(models: Sequence[ModelLock]) -> list[Any]:
    """Readers of locked models (`shoal.merge.Parent`), in the lock's order."""
    from shoal.merge.adapter import open_parent

    return [open_parent(Path(m.folder), None if m.adapter is None else Path(m.adapter)) for m in models]


@dataclass(frozen=True)
class ResolvedModel:
    """A model whose files lie in `folder` (and, for LoRA, `adapter`)."""

    name: str
    ref: ModelRef
    folder: Path
    commit: str | None = None
    adapter: Path | None = None
    adapter_commit: str | None = None

    def lock(self) -> ModelLock:
        """With the sha256 of every file that the merge or the tokenizer depends on."""
        files = {path.name: _sha256(path) for path in _hashed_files(self.folder)}
        if self.adapter is not None:
            files |= {f"adapter/{path.name}": _sha256(path) for path in _hashed_files(self.adapter)}
        return ModelLock(
            name=self.name,
            ref=str(self.ref),
            folder=str(self.folder),
            commit=self.commit,
            adapter=None if self.adapter is None else str(self.adapter),
            adapter_commit=self.adapter_commit,
            origin=self._origin(),
            files=files,
        )

    def _origin(self) -> dict[str, str]:
        """Where a zoo's model came from: sources of one name have different weights."""
        base = self.ref.base if isinstance(self.ref, AdapterModel) else self.ref
        if not isinstance(base, ZooModel):
            return {}
        from shoal.zoo.folder import read_manifest

        manifest = read_manifest(self.folder.parent) or {}
        return {key: value for key, value in manifest.items() if isinstance(value, str)}


def resolve_models(
    refs: Sequence[ModelRef], say: Say, weights: bool = True, outlines: bool = False
) -> list[ResolvedModel]:
    """Find or fetch every model; weights=False fetches only what a check of their configurations needs.

    outlines: weights that are not in the cache are not fetched, their headers stand for them (`shoal.outline`).

    Raises:
        CheckpointError: a folder or repository that is missing, gated or no model.
    """
    names = _short_names(refs)
    resolved = []
    for name, ref in zip(names, refs, strict=True):
        if isinstance(ref, AdapterModel):
            folder, commit = _folder(ref.base, say, weights, outlines)
            adapter, adapter_commit = _folder(ref.adapter, say, weights, outlines)
            if not (adapter / "adapter_config.json").is_file():
                raise CheckpointError(
                    f"adapter {ref.adapter}: expected adapter_config.json in {adapter}, found none"
                )
            resolved.append(ResolvedModel(name, ref, folder, commit, adapter, adapter_commit))
            continue
        folder, commit = _folder(ref, say, weights, outlines)
        if not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"model {ref}: this is a LoRA adapter, not a model; write it with its base, 'BASE+{ref}'"
            )
        resolved.append(ResolvedModel(name, ref, folder, commit))
    places = [(model.folder, model.adapter) for model in resolved]
    for model, place in zip(resolved, places, strict=True):
        if places.count(place) > 1:
            raise CheckpointError(
                f"model {model.ref}: the same folder is named twice ({model.folder}); name it once"
            )
    return resolved


def check_files(lock: ModelLock) -> None:
    """Check that a locked model's files are still what the lock says.

    Raises:
        CheckpointError: a file is missing or has another hash.
    """
    for name, expected in lock.files.items():
        folder = Path(lock.adapter) if name.startswith("adapter/") and lock.adapter else Path(lock.folder)
        path = folder / name.removeprefix("adapter/")
        found = _sha256(path) if path.is_file() else "no file"
        if found != expected:
            raise CheckpointError(
                f"model {lock.ref}: {path} has sha256 {found[:12]}, the run started with {expected[:12]};"
                " restore the file, or start another run"
            )


def zoo_progress(name: str, say: Say) -> Callable[[str, float], None]:
    """Progress of building a zoo, said once per step."""
    said: list[str] = []

    def progress(step: str, share: float) -> None:
        if step not in said:
            said.append(step)
            say(f"zoo {name}: {step}")

    return progress


def _folder(
    ref: HubModel | LocalModel | ZooModel, say: Say, weights: bool, outlines: bool
) -> tuple[Path, str | None]:
    if isinstance(ref, ZooModel):
        from shoal import zoo

        return zoo.member_path(ref.zoo, ref.member, progress=zoo_progress(ref.zoo, say)), None
    if isinstance(ref, LocalModel):
        if not ref.path.is_dir():
            raise CheckpointError(f"model {ref}: no such folder")
        return ref.path, None
    if not weights or not outlines:
        return _download(ref, say, weights)
    small, commit = _download(ref, say, False)
    return (small if _is_complete(ref.repo, commit) else outline(ref.repo, commit, small, say)), commit


def _download(ref: HubModel, say: Say, weights: bool) -> tuple[Path, str]:
    import huggingface_hub

    say(f"looking up {ref} on the Hub")
    patterns = [*SMALL_FILES, *(WEIGHTS if weights else [])]
    try:
        with speaking(say), without_bars(not weights):  # a repeated call goes on at the next file
            path = retried(
                lambda: huggingface_hub.snapshot_download(
                    ref.repo, revision=ref.revision, allow_patterns=patterns
                ),
                say,
                attempts=3,
            )
    except client_errors() as error:
        raise CheckpointError(
            f"model {ref}: not in the cache, and not fetched from the Hub: {reason(error, ref.repo)}"
        ) from None
    return Path(path), Path(path).name


def _is_complete(repo: str, commit: str) -> bool:
    """Whether the cache has the weights of a commit, too."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=commit, allow_patterns=[*SMALL_FILES, *WEIGHTS], local_files_only=True
        )
    except (OSError, ValueError):
        return False
    return any(Path(folder).glob("*.safetensors"))


def _short_names(refs: Sequence[ModelRef]) -> list[str]:
    """The shortest name of each model that tells it from the others."""
    short, full = [_short(ref) for ref in refs], [str(ref) for ref in refs]
    return [s if short.count(s) == 1 else f for s, f in zip(short, full, strict=True)]


def _short(ref: ModelRef) -> str:
    if isinstance(ref, AdapterModel):
        return _short(ref.adapter)
    if isinstance(ref, LocalModel):
        return ref.path.name
    return ref.member if isinstance(ref, ZooModel) else ref.repo.split("/")[-1]


def _hashed_files(folder: Path) -> list[Path]:
    """Files that the merge or the tokenizer depends on; an outline's weights are holes and have no hash."""
    patterns = SMALL_FILES if is_outline(folder) else HASHED_FILES
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
