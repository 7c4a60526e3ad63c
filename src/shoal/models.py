"""Where models come from: Hub, folder, zoo, adapter or a merge of ours, resolved to folders known by their files' hashes.

A merge of ours is rebuilt from its roots, which are models again. How it was made is handed in: to find that out is for
`shoal.hub`, which this module does not know.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shoal.availability import SMALL_FILES, WEIGHTS
from shoal.endpoint import client_errors, reason, retried, speaking, without_bars
from shoal.errors import CheckpointError
from shoal.lock import Lock, MergeLock, ModelLock
from shoal.outline import is_outline, outline
from shoal.rebuilt import (
    MAX_GENERATIONS,
    Root,
    copy_folder,
    is_rebuilt,
    outline_copy,
    read_record,
    rebuild,
)
from shoal.recipe import parse_model
from shoal.types import (
    AdapterModel,
    HubModel,
    LocalModel,
    MergeModel,
    ModelRef,
    PlainModel,
    ZooModel,
    parts_of,
)

HASHED_FILES = (*WEIGHTS, *SMALL_FILES)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Merge:
    """A merge of ours that a recipe or a lock names. commit: of its repository, None for a folder."""

    made: MergeLock
    commit: str | None = None


Merges = Mapping[MergeModel, Merge]
NO_MERGES: Merges = MappingProxyType({})


def open_parents(models: Sequence[ModelLock]) -> list[Any]:
    """Readers of locked models (`shoal.merge.Parent`), in the lock's order."""
    from shoal.merge.adapter import open_parent

    return [open_parent(Path(m.folder), None if m.adapter is None else Path(m.adapter)) for m in models]


@dataclass(frozen=True)
class ResolvedModel:
    """A model whose files lie in `folder` (and, for LoRA, `adapter`). merge: of a merge of ours, how it is made."""

    name: str
    ref: ModelRef
    folder: Path
    commit: str | None = None
    adapter: Path | None = None
    adapter_commit: str | None = None
    merge: MergeLock | None = None

    def lock(self) -> ModelLock:
        """With the sha256 of every file that the merge or the tokenizer depends on.

        Raises:
            CheckpointError: the copy of a merge of ours is not what it was when it was written.
        """
        files = {path.name: _sha256(path) for path in _hashed_files(self.folder)}
        merge = self.merge
        if merge is not None and is_rebuilt(self.folder):
            record = read_record(self.folder)
            if wrong := difference(record.files, files):
                raise CheckpointError(
                    f"model {self.ref}: its copy in {self.folder} was changed ({wrong}); remove the folder, it is made again"
                )
            merge = merge.model_copy(update={"float32_sha256": record.float32_sha256})
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
            merge=merge,
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
    refs: Sequence[ModelRef],
    say: Say,
    weights: bool = True,
    outlines: bool = False,
    merges: Merges = NO_MERGES,
) -> list[ResolvedModel]:
    """Find, fetch or rebuild every model; weights=False fetches only what a check of their configurations needs.

    outlines: weights that are not in the cache are not fetched or made, their headers stand for them (`shoal.outline`).
    merges: how the merges of ours among `refs` were made; one that is not there is refused.

    Raises:
        CheckpointError: a folder or repository that is missing, gated or no model; a merge of ours whose roots are not
            those of its lock, or give other weights.
    """
    names = _short_names(refs)
    resolved = []
    for name, ref in zip(names, refs, strict=True):
        base = parts_of(ref)[0]
        merge = merges.get(base) if isinstance(base, MergeModel) else None
        folder, commit = _folder(base, say, weights, outlines, merges)
        adapter, adapter_commit = None, None
        if isinstance(ref, AdapterModel):
            adapter, adapter_commit = _folder(ref.adapter, say, weights, outlines, merges)
            if not (adapter / "adapter_config.json").is_file():
                raise CheckpointError(
                    f"adapter {ref.adapter}: expected adapter_config.json in {adapter}, found none"
                )
        elif not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"model {ref}: this is a LoRA adapter, not a model; write it with its base, 'BASE+{ref}'"
            )
        made = None if merge is None else merge.made
        resolved.append(ResolvedModel(name, ref, folder, commit, adapter, adapter_commit, made))
    places = [(m.folder if m.merge is None else copy_folder(m.merge), m.adapter) for m in resolved]
    for model, place in zip(resolved, places, strict=True):
        if places.count(place) > 1:
            raise CheckpointError(
                f"model {model.ref}: the same folder is named twice ({model.folder}); name it once"
            )
    return resolved


def pinned(model: ModelLock) -> ModelRef:
    """A locked model as it is found again: Hub ids at their commits, folders where they were."""
    ref = parse_model(model.ref, Path())
    if isinstance(ref, AdapterModel):
        adapter = _at(ref.adapter, model.adapter_commit)
        assert isinstance(adapter, HubModel | LocalModel)
        return AdapterModel(_at(ref.base, model.commit), adapter)
    return _at(ref, model.commit)


def merges_among(models: Iterable[ModelLock]) -> dict[MergeModel, Merge]:
    """The merges of ours among locked models, by their pinned references."""
    found = {}
    for model in models:
        base = parts_of(pinned(model))[0]
        if isinstance(base, MergeModel) and model.merge is not None:
            found[base] = Merge(model.merge, model.commit)
    return found


def root_refs(refs: Sequence[ModelRef], merges: Merges) -> tuple[ModelRef, ...]:
    """What has to be there before the merges of ours among `refs` can be rebuilt; nothing for one that is in the cache."""
    found: list[ModelRef] = []
    for ref in refs:
        base = parts_of(ref)[0]
        merge = merges.get(base) if isinstance(base, MergeModel) else None
        if merge is None or is_rebuilt(copy_folder(merge.made)):
            continue
        roots = [pinned(root) for root in merge.made.roots]
        found += [root for root in roots if not isinstance(parts_of(root)[0], MergeModel)]
        found += root_refs(roots, merges_among(merge.made.roots))
    return tuple(dict.fromkeys(found))


def rebuilt_here(lock: Lock, say: Say = lambda text: None) -> Lock:
    """The same lock with every copy of a merge of ours in its place: made again where the cache was emptied.

    Raises:
        CheckpointError: its roots cannot be had any more.
    """
    models = list(lock.models)
    for index, model in enumerate(models):
        if model.merge is None or is_rebuilt(Path(model.folder)):
            continue
        (found,) = resolve_models([pinned(model)], say, merges=merges_among([model]))
        adapter = model.adapter if found.adapter is None else str(found.adapter)
        models[index] = model.model_copy(update={"folder": str(found.folder), "adapter": adapter})
    return lock if tuple(models) == lock.models else lock.model_copy(update={"models": tuple(models)})


def difference(expected: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """The first file whose sha256 is not the expected one, in words."""
    for name in sorted(expected.keys() | found.keys()):
        wanted, here = expected.get(name), found.get(name)
        if wanted != here:
            return (
                f"{name} has sha256 {here[:12] if here else 'none, it is missing'}, expected"
                f" {wanted[:12] if wanted else 'no such file'}"
            )
    return None


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
            copied = lock.merge is not None and not name.startswith("adapter/")
            what = "remove that folder, it is made again" if copied else "restore the file"
            raise CheckpointError(
                f"model {lock.ref}: {path} has sha256 {found[:12]}, the run started with {expected[:12]};"
                f" {what}, or start another run"
            )


def zoo_words(model: ModelLock) -> str:
    """Why a zoo's model may have other bytes here; empty for others."""
    if not model.ref.startswith("zoo:"):
        return ""
    return "; models of a zoo are trained on each machine, and their bytes depend on it and on the libraries"


def zoo_progress(name: str, say: Say) -> Callable[[str, float], None]:
    """Progress of building a zoo, said once per step."""
    said: list[str] = []

    def progress(step: str, share: float) -> None:
        if step not in said:
            said.append(step)
            say(f"zoo {name}: {step}")

    return progress


def _folder(
    ref: PlainModel, say: Say, weights: bool, outlines: bool, merges: Merges
) -> tuple[Path, str | None]:
    if isinstance(ref, MergeModel):
        return _merged(ref, say, weights, outlines, merges)
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


def _merged(
    ref: MergeModel, say: Say, weights: bool, outlines: bool, merges: Merges
) -> tuple[Path, str | None]:
    """The folder of the float32 copy: the one in the cache, or made from the roots; without weights its first root's."""
    merge = merges.get(ref)
    if merge is None:
        raise CheckpointError(
            f"model {ref}: a merge of shoal's is a parent in a recipe, and nothing else; to use it as a model:"
            f" `shoal download {ref.source}` or `shoal merge RUN`, and name that folder"
        )
    made = merge.made
    if made.generations() > MAX_GENERATIONS:
        raise CheckpointError(
            f"model {ref}: a merge of merges, {made.generations()} deep, at most {MAX_GENERATIONS} can be rebuilt; write one"
            " of them as weights, and use that"
        )
    target = copy_folder(made)
    if is_rebuilt(target):
        return target, merge.commit
    refs = [pinned(root) for root in made.roots]
    found = resolve_models(refs, say, weights, outlines, merges_among(made.roots))
    if not weights:
        return found[0].folder, merge.commit
    places = [Root(root.folder, root.adapter) for root in found]
    if outlines:
        return outline_copy(made, places, f"model {ref}"), merge.commit
    say(f"checking the hashes of the roots of {ref}")
    for expected, root in zip(made.roots, found, strict=True):
        if wrong := difference(expected.files, root.lock().files):
            raise CheckpointError(
                f"model {ref}: its root {expected.ref}: {wrong} by its lock{zoo_words(expected)}"
            )
    say(f"rebuilding {ref} in float32 from {', '.join(root.name for root in made.roots)}")
    return rebuild(made, places, f"model {ref}"), merge.commit


def _at(ref: PlainModel, commit: str | None) -> PlainModel:
    if isinstance(ref, HubModel) and commit is not None:
        return HubModel(ref.repo, commit)
    if isinstance(ref, MergeModel) and isinstance(ref.source, HubModel) and commit is not None:
        return MergeModel(HubModel(ref.source.repo, commit))
    return ref


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
    if isinstance(ref, MergeModel):
        return _short(ref.source)
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
