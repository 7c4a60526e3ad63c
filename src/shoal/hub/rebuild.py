"""The parents of a published lock on this machine, every file by its hash; and what is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shoal.endpoint import Say
from shoal.errors import CheckpointError, PublishError, RecipeError
from shoal.hub.opened import Opened
from shoal.hub.roots import confirm
from shoal.lock import Lock, ModelLock, library_versions
from shoal.models import merges_among, resolve_models, zoo_words
from shoal.output import winner_sha256
from shoal.preflight import groups_of
from shoal.recipe import parse_model


def parents_here(opened: Opened, include_path: Path | None, say: Say) -> Lock:
    """The run's lock with folders of this machine: Hub parents at their commits, downloaded where they are missing.

    Raises:
        PublishError: a parent that others cannot have, or one whose files are not those that the lock names.
        CheckpointError: a parent cannot be fetched or built.
    """
    local = opened.local_parents()
    if local:
        raise PublishError(
            f"{opened.where}: its parents {', '.join(local)} are folders that were not published, so nobody can rebuild it"
        )
    models = opened.lock.run.models
    confirm(models, opened.where, say)
    refs = [parse_model(model.ref, Path()) for model in models]
    resolved = resolve_models(refs, say, merges=merges_among(models))
    say("checking the hashes of the parents")
    folders: dict[str, tuple[Path, Path | None]] = {}
    for expected, found in zip(models, resolved, strict=True):
        here = found.lock()
        _check_files(expected, here.files)
        if expected.merge is not None and expected.merge != here.merge:
            raise PublishError(
                f"parent {expected.ref}: rebuilt from its roots it has another hash in float32 than lock.yaml says"
            )
        folders[expected.name] = found.folder, found.adapter
    lock = opened.lock.lock_here(folders, include_path)
    _check_groups(opened, lock)
    return lock


def _check_files(expected: ModelLock, found: Mapping[str, str]) -> None:
    for name in sorted(expected.files.keys() | found.keys()):
        wanted, here = expected.files.get(name), found.get(name)
        if wanted == here:
            continue
        raise PublishError(
            f"parent {expected.ref}: {name} has sha256 {here[:12] if here else 'none, it is missing'}, lock.yaml says"
            f" {wanted[:12] if wanted else 'that there is no such file'}{zoo_words(expected)}"
        )


def _check_groups(opened: Opened, lock: Lock) -> None:
    """A plan from elsewhere merges tensors that are there, and all of them."""
    theirs = {group.name: group.tensors for group in opened.lock.winner.merge_plan().groups}
    ours = {group.name: group.tensors for group in groups_of(lock.models)}
    if theirs != ours:
        other = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        raise PublishError(
            f"{opened.where}: winner.plan: its tensors are not those of the parents (group {other[0]!r}); either the lock"
            " was changed, or another version of shoal is needed"
        )


def rebuilt_sha256(opened: Opened, lock: Lock) -> str:
    """weights_sha256 of the canonical merge, without writing it.

    Raises:
        PublishError: the plan cannot be merged.
    """
    try:
        return winner_sha256(lock, opened.lock.winner.merge_plan())
    except (CheckpointError, RecipeError):
        raise
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise PublishError(f"{opened.where}: winner.plan cannot be merged: {error!r}") from None


def other_versions(lock: Lock) -> list[str]:
    """Libraries whose version here is not the lock's, in words."""
    here = library_versions()
    return [
        f"{name} {here[name]} (the lock: {version})"
        for name, version in lock.libraries.items()
        if name in here and here[name] != version
    ]


def versions_hint(lock: Lock) -> str:
    found = other_versions(lock)
    return f"; libraries differ: {', '.join(found)}" if found else "; library versions are the lock's"
