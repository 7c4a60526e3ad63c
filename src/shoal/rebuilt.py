"""The float32 copy of a merge that is a parent: made from its roots, kept in the cache, and known by its hash.

What is published is rounded; a parent is not. The copy is the canonical merge of the roots without the final rounding,
and it is believed only when, rounded, it has the hash that the merge's own lock names. Its folder is named by what it is
made of, so one copy serves all runs, and any other content is another folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from shoal.availability import SMALL_FILES, size_words
from shoal.cache import cache_folder
from shoal.errors import CheckpointError, RecipeError
from shoal.lock import MergeLock
from shoal.outline import MARK, is_outline
from shoal.types import MergePlan

RECORD = "rebuilt.yaml"  # in a copy's folder: no name that is hashed as a model's file
MAX_GENERATIONS = 8  # of merges of merges; a published lock would nest deeper than readers allow


@dataclass(frozen=True)
class Root:
    """A root on this machine: its folder and, for LoRA, its adapter's."""

    folder: Path
    adapter: Path | None = None


@dataclass(frozen=True)
class Record:
    """What a copy was when it was written. files: sha256 by name."""

    float32_sha256: str
    files: Mapping[str, str]


def copies_folder() -> Path:
    return cache_folder().absolute() / "merges"


def copy_folder(made: MergeLock) -> Path:
    """Where the float32 copy is, or will be: the same for the same roots, plan and tokenizer."""
    slug = re.sub(r"[^\w-]+", "-", made.name, flags=re.ASCII).strip("-")[:40] or "merge"
    return copies_folder() / f"{slug}-{_key(made)[:20]}"


def is_rebuilt(folder: Path) -> bool:
    return (folder / RECORD).is_file()


def read_record(folder: Path) -> Record:
    """
    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        data = yaml.safe_load((folder / RECORD).read_text(encoding="utf-8"))
        return Record(str(data["float32_sha256"]), dict(data["files"]))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        raise CheckpointError(
            f"{folder / RECORD}: cannot be read; remove {folder}, it is made again"
        ) from None


def rebuild(made: MergeLock, roots: Sequence[Root], where: str) -> Path:
    """Write the float32 copy, whole or not at all, and return its folder. where: names the merge in errors.

    Raises:
        CheckpointError: the roots do not fit the plan, or give other weights than the lock names; the disk is full.
    """
    from shoal.merge.writer import new_folder, write_model

    target = copy_folder(made)
    plan, merger = _merger(made, roots, where)
    try:
        outputs = merger.outputs(plan)
        check_room(sum(output.nbytes for output in outputs), where)
        shutil.rmtree(target, ignore_errors=True)  # what is there is no copy, or we would not be here
        with new_folder(target) as folder:
            part = folder / "weights"
            tokenizer = roots[made.tokenizer].folder
            write_model(part, plan, merger, roots[0].folder, tokenizer, made.chat_template)
            for path in part.iterdir():
                path.rename(folder / path.name)
            part.rmdir()
            exact = _checked(folder, made, where)
            record = {"float32_sha256": exact, "weights_sha256": made.weights_sha256, "files": _files(folder)}
            (folder / RECORD).write_text(yaml.safe_dump(record, sort_keys=False), encoding="utf-8")
    except CheckpointError:
        if is_rebuilt(target):  # another process was faster
            return target
        raise
    except (RecipeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{where}: its plan cannot be merged: {error}") from None
    return target


def outline_copy(made: MergeLock, roots: Sequence[Root], where: str) -> Path:
    """The copy's outline (`shoal.outline`): true headers, nothing behind them; roots may be outlines themselves.

    Raises:
        CheckpointError: the roots do not fit the plan, or the copy would not fit on the disk.
    """
    from shoal.merge.disk import shards_of
    from shoal.merge.writer import TOKENIZER_FILES, copy_files, new_folder, write_json

    target = cache_folder().absolute() / "outlines" / "merges" / copy_folder(made).name
    plan, merger = _merger(made, roots, where)
    try:
        outputs = merger.outputs(plan)
    except (RecipeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: its plan cannot be merged: {error}") from None
    check_room(sum(output.nbytes for output in outputs), where)
    if is_outline(target):
        return target
    with new_folder(target) as folder:
        copy_files(roots[0].folder, folder, ("generation_config.json",))
        copy_files(roots[made.tokenizer].folder, folder, TOKENIZER_FILES)
        config = json.loads((roots[0].folder / "config.json").read_text(encoding="utf-8"))
        write_json(folder / "config.json", config | {"dtype": "float32"})
        for shard in shards_of(outputs):
            with (folder / shard.file).open("wb") as file:
                file.write(shard.header)
                file.truncate(shard.size)
        (folder / MARK).write_text(f"{where}: headers of the float32 copy, no weights\n", encoding="utf-8")
    return target


def check_room(size: int, where: str) -> None:
    """Raises CheckpointError where `size` bytes do not fit beside the other copies."""
    free = free_here()
    if size > free:
        raise CheckpointError(
            f"{where}: its float32 copy has {size_words(size)}, but only {size_words(free)} are free in {copies_folder()};"
            " make room, or set SHOAL_CACHE to a folder on another disk"
        )


def free_here() -> int:
    """Bytes on the disk of the copies."""
    place = copies_folder()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def weight_bytes(folder: Path) -> int:
    """Of the copy, or of what it will be where this is its outline."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _key(made: MergeLock) -> str:
    """sha256 over everything that decides the copy's bytes, and the hash that it is checked by."""
    roots = [[root.name, sorted(root.files.items()), root.merge and _key(root.merge)] for root in made.roots]
    content = [made.plan_digest, made.weights_sha256, made.tokenizer, made.chat_template, roots]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _merger(made: MergeLock, roots: Sequence[Root], where: str) -> tuple[MergePlan, Any]:
    """The plan without its final rounding, and what merges it."""
    from shoal.merge.adapter import open_parent
    from shoal.merge.groups import tensor_groups
    from shoal.merge.methods import check_plan
    from shoal.merge.resident import Merger

    plan = made.merge_plan()
    parents = [open_parent(root.folder, root.adapter) for root in roots]
    groups = tensor_groups(parents[0])
    ours = {group.name: group.tensors for group in groups}
    theirs = {group.name: group.tensors for group in plan.groups}
    if ours != theirs:
        odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise CheckpointError(
            f"{where}: the tensors of its plan are not those of its roots (group {odd[0]!r}); either its lock was changed,"
            " or another version of shoal is needed"
        )
    try:
        check_plan(plan)
    except (RecipeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where}: its plan is none: {error}") from None
    return replace(plan, dtype="float32"), Merger(parents, groups)


def _checked(folder: Path, made: MergeLock, where: str) -> str:
    """weights_sha256 of the copy, once its rounded weights are known to be those of the lock."""
    import torch

    from shoal.merge.checkpoint import Checkpoint
    from shoal.merge.hashing import weights_sha256

    checkpoint = Checkpoint.open(folder)
    dtype = getattr(torch, made.dtype)

    def tensors(rounded: bool) -> Iterator[tuple[str, Any]]:
        for name in checkpoint.names:
            tensor = checkpoint.tensor(name)
            yield name, tensor.to(dtype) if rounded and tensor.is_floating_point() else tensor

    exact = weights_sha256(tensors(False))
    found = exact if made.dtype == "float32" else weights_sha256(tensors(True))
    if found != made.weights_sha256:
        raise CheckpointError(
            f"{where}: rebuilt from its roots it has weights_sha256 {found[:12]}, its lock says {made.weights_sha256[:12]};"
            " the lock was changed, or the libraries of its run are needed"
        )
    return exact


def _files(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(p for pattern in (*SMALL_FILES, "*.safetensors") for p in folder.glob(pattern)):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
