"""`shoal evolve --from REPO`: a published winner as the start of a search, or as one more parent.

A start is laid out as the finished run that it was, in the cache, by commit; a parent is named as `merge:REPO`. Nothing
is scored or merged here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from shoal.cache import cache_folder
from shoal.endpoint import Say
from shoal.errors import RecipeError, RunError
from shoal.folder import RunFolder
from shoal.hub.kept import kept
from shoal.hub.lineage import PUBLISHED
from shoal.hub.opened import LOCK, RECIPE, RESULT, Opened
from shoal.hub.repository import split_revision
from shoal.recipe import Recipe, load_recipe

Follow = Callable[[str, Recipe | None, Say], Recipe]


def published_start(repo: str, recipe: Recipe | None, say: Say = lambda text: None) -> Recipe:
    """`recipe`, its search started from the winner of a published repository (`org/name` or `org/name@revision`).

    recipe: None for the published one, its models at the commits that the lock names; where its tasks are custom, they
    are expected in ./tasks.

    Raises:
        PublishError: it cannot be fetched, or is no publication.
    """
    name, revision = split_revision(repo)
    opened, commit = kept(name, revision, say)
    place = _starts(name).with_name(f"{_starts(name).name}@{commit}")
    if not place.is_dir():
        _lay_out(opened, place)
    chosen = _pinned(opened) if recipe is None else recipe
    search = chosen.search.model_copy(update={"warm_start": str(place)})
    return chosen.model_copy(update={"search": search})


def published_parent(repo: str, recipe: Recipe | None, say: Say = lambda text: None) -> Recipe:
    """`recipe` with the winner of a published repository as one more of its models, rebuilt from its roots in float32.

    recipe: None for the published one, as in `published_start`.

    Raises:
        PublishError: it cannot be fetched, or is no publication. RecipeError: the recipe names it already.
    """
    name, revision = split_revision(repo)
    chosen = _pinned(kept(name, revision, say)[0]) if recipe is None else recipe
    ref = f"merge:{name}@{revision}" if revision else f"merge:{name}"
    if ref in (chosen.base_model, *chosen.models):
        raise RecipeError(f"{ref} is a model of this recipe already")
    return chosen.model_copy(update={"models": (*chosen.models, ref)})


def followed(follow: Follow, repo: str, recipe: Recipe | None, run: Path | None, say: Say) -> Recipe:
    """The recipe of a run that follows a publication; one that goes on keeps to the commit that it began with.

    run: its folder, None where it has none yet.

    Raises:
        RunError: the run without a recipe of its own began from something else.
    """
    if run is None or not RunFolder(run).started:
        return follow(repo, recipe, say)
    begun = load_recipe(RunFolder(run).recipe)
    name, revision = split_revision(repo)
    if follow is published_parent:
        ref = f"merge:{name}@{revision}" if revision else f"merge:{name}"
        if ref in begun.models:
            return begun if recipe is None else recipe if ref in recipe.models else follow(repo, recipe, say)
    else:
        start = Path(begun.search.warm_start or "")
        if start.parent == _starts(name).parent and _same(start.name, _starts(name).name, revision):
            if recipe is None:
                return begun
            search = recipe.search.model_copy(update={"warm_start": str(start)})
            return recipe.model_copy(update={"search": search})
    if recipe is None:
        raise RunError(f"{run}: this run did not begin from {repo}; name another folder by --run")
    return follow(repo, recipe, say)


def _same(start: str, name: str, revision: str | None) -> bool:
    """Whether a start in the cache, NAME@COMMIT, is the one of a name, or of a name at a commit."""
    return start.rpartition("@")[0] == name and (revision is None or start == f"{name}@{revision}")


def _starts(name: str) -> Path:
    return cache_folder().absolute() / "starts" / name


def _lay_out(opened: Opened, place: Path) -> None:
    """As RUN/ is: what a warm start reads of a finished run, and beside it the lock as it was published."""
    source, lock = opened.folder, opened.lock
    folder = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        (folder / "best").mkdir(parents=True)
        shutil.copyfile(source / RECIPE, folder / RECIPE)
        shutil.copyfile(source / LOCK, folder / PUBLISHED)
        (folder / LOCK).write_text(lock.run.to_yaml(), encoding="utf-8")
        (folder / RESULT).write_text(json.dumps(opened.result) + "\n", encoding="utf-8")
        plan = lock.winner.merge_plan().to_json() + "\n"
        (folder / "best" / "plan.json").write_text(plan, encoding="utf-8")
        (folder / "DONE").write_text(f"{lock.verdict}\n", encoding="utf-8")
        with suppress(OSError):  # another process was faster
            folder.rename(place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pinned(opened: Opened) -> Recipe:
    recipe, refs = opened.recipe, [model.ref for model in opened.lock.run.models]
    base, models = (refs[0], refs[1:]) if recipe.base_model is not None else (None, refs)
    changes = {"base_model": base, "models": tuple(models)}
    texts = ([recipe.base_model] if recipe.base_model else []) + list(recipe.models)
    if recipe.output.tokenizer_source in texts:
        source = refs[texts.index(recipe.output.tokenizer_source)]
        return recipe.model_copy(
            update=changes | {"output": recipe.output.model_copy(update={"tokenizer_source": source})}
        )
    return recipe.model_copy(update=changes)
