"""Merges of ours as parents: how each was made, read from its publication (or its run) with the checks of a download.

The weights are made elsewhere (`shoal.models`): here a reference becomes data that says from what.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from shoal.endpoint import Say
from shoal.errors import PublishError, RecipeError, RunError
from shoal.folder import RunFolder
from shoal.hub.kept import kept
from shoal.hub.opened import LOCK, Opened, open_publication
from shoal.hub.published import FORMAT
from shoal.lock import MergeLock, ModelLock
from shoal.models import Merge, merges_among, pinned
from shoal.preflight import model_refs
from shoal.recipe import Recipe
from shoal.report import load_result
from shoal.types import HubModel, LocalModel, MergeModel, MergePlan, ModelRef, parts_of


def merges_of(recipe: Recipe, folder: Path, say: Say = lambda text: None) -> dict[MergeModel, Merge]:
    """How the merges of ours that a recipe names were made; its relative paths are relative to `folder`.

    Raises:
        PublishError: a publication that cannot be fetched, or is not what it says. RunError: no finished run.
    """
    return merges_named(model_refs(recipe, folder), say)


def merges_named(refs: Iterable[ModelRef], say: Say = lambda text: None) -> dict[MergeModel, Merge]:
    found: dict[MergeModel, Merge] = {}
    for ref in refs:
        base = parts_of(ref)[0]
        if isinstance(base, MergeModel) and base not in found:
            found[base] = _merge(base, say)
    return found


def confirm(models: Sequence[ModelLock], where: str, say: Say) -> None:
    """Check that merges of ours among published models are what their own publications say that they are.

    What a lock says of them is enough to rebuild them; a publication that is gone is told, not refused.

    Raises:
        PublishError: the publication says something else.
    """
    for ref, merge in merges_among(models).items():
        confirm(merge.made.roots, where, say)
        if not isinstance(ref.source, HubModel):
            continue
        try:
            opened, _ = kept(ref.source.repo, ref.source.revision, say)
        except PublishError as error:
            say(f"note: {ref} is rebuilt from what lock.yaml says of it; its own publication: {error}")
            continue
        theirs = made_of(opened)
        if theirs != merge.made.model_copy(update={"float32_sha256": None}):
            raise PublishError(
                f"{where}: lock.yaml says that {ref} was made otherwise than the lock of that publication does; do not"
                " trust its lineage"
            )


def made_of(opened: Opened) -> MergeLock:
    """How a published merge is made again."""
    lock = opened.lock
    return MergeLock(
        name=lock.name,
        dtype=lock.run.dtype,
        weights_sha256=lock.winner.weights_sha256,
        tokenizer=lock.run.tokenizer,
        chat_template=opened.recipe.output.chat_template,
        roots=lock.run.models,
        plan_digest=lock.winner.plan_digest,
        plan=lock.winner.merge_plan().to_json(),
    )


def is_publication(folder: Path) -> bool:
    """Whether a folder's lock.yaml is a published one; a run's own is not."""
    try:
        with (folder / LOCK).open(encoding="utf-8") as file:
            return FORMAT in file.read(400)
    except (OSError, UnicodeDecodeError):
        return False


def _merge(ref: MergeModel, say: Say) -> Merge:
    if isinstance(ref.source, HubModel):
        say(f"looking up {ref} on the Hub")
        opened, commit = kept(ref.source.repo, ref.source.revision, say)
        _check_roots(opened)
        return Merge(made_of(opened), commit)
    folder = ref.source.path
    if is_publication(folder):
        opened = open_publication(folder, str(folder))
        _check_roots(opened)
        return Merge(made_of(opened))
    return Merge(_of_run(ref.source))


def _check_roots(opened: Opened) -> None:
    local = opened.local_parents()
    if local:
        raise PublishError(
            f"{opened.where}: cannot be rebuilt, its parents {', '.join(local)} are folders that were not published; use its"
            " weights, as a model without 'merge:', rounded as they are"
        )


def _of_run(source: LocalModel) -> MergeLock:
    """How the winner of a finished run of one's own is made again: its models where the run found them."""
    folder = source.path
    if not (folder / LOCK).is_file():
        raise RecipeError(
            f"model merge:{folder}: expected the folder of a publication (or its lock.yaml), or of a finished run, found"
            f" {'no ' + LOCK + ' in it' if folder.is_dir() else 'nothing'}"
        )
    run = RunFolder(folder)
    recipe, lock = run.open()
    result = load_result(folder)
    try:
        plan = MergePlan.from_json((run.best / "plan.json").read_text(encoding="utf-8"))
        return MergeLock(
            name=recipe.name,
            dtype=lock.dtype,
            weights_sha256=result["weights_sha256"],
            tokenizer=lock.tokenizer,
            chat_template=recipe.output.chat_template,
            roots=tuple(_root(model) for model in lock.models),
            plan_digest=plan.digest(),
            plan=plan.to_json(),
        )
    except (OSError, json.JSONDecodeError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder}: not a finished run that can be read: {error}") from None


def _root(model: ModelLock) -> ModelLock:
    adapter = None if model.adapter is None else ""
    return model.model_copy(update={"ref": str(pinned(model)), "folder": "", "adapter": adapter})
