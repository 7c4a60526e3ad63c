"""`shoal evolve --from REPO`: a published winner as the start of a search, laid out as the finished run that it was.

Kept in the cache, by commit, so that a run can be continued and its lineage be told; nothing is scored or merged here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from shoal.cache import cache_folder
from shoal.endpoint import Say
from shoal.hub.download import DATA, fetched, split_revision
from shoal.hub.fetch import DEFAULT_LIMITS
from shoal.hub.lineage import PUBLISHED
from shoal.hub.opened import LOCK, RESULT, Opened
from shoal.recipe import Recipe


def published_start(repo: str, recipe: Recipe | None, say: Say = lambda text: None) -> Recipe:
    """`recipe`, its search started from the winner of a published repository (`org/name` or `org/name@revision`).

    recipe: None for the published one, its models at the commits that the lock names; where its tasks are custom, they
    are expected in ./tasks.

    Raises:
        PublishError: it cannot be fetched, or is no publication.
    """
    name, revision = split_revision(repo)
    beside = cache_folder().absolute() / "starts" / name
    beside.parent.mkdir(parents=True, exist_ok=True)
    with fetched(name, revision, beside, DATA, DEFAULT_LIMITS, say) as (opened, commit):
        place = beside.with_name(f"{beside.name}@{commit}")
        if not place.is_dir():
            _lay_out(opened, place)
        chosen = _pinned(opened) if recipe is None else recipe
    search = chosen.search.model_copy(update={"warm_start": str(place)})
    return chosen.model_copy(update={"search": search})


def _lay_out(opened: Opened, place: Path) -> None:
    """As RUN/ is: what a warm start reads of a finished run, and beside it the lock as it was published."""
    folder, lock = opened.folder, opened.lock
    shutil.copyfile(folder / LOCK, folder / PUBLISHED)
    (folder / LOCK).write_text(lock.run.to_yaml(), encoding="utf-8")
    (folder / RESULT).write_text(json.dumps(opened.result) + "\n", encoding="utf-8")
    (folder / "best").mkdir()
    (folder / "best" / "plan.json").write_text(lock.winner.merge_plan().to_json() + "\n", encoding="utf-8")
    (folder / "DONE").write_text(f"{lock.verdict}\n", encoding="utf-8")
    folder.rename(place)


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
