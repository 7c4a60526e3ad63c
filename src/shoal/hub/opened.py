"""A publication that was fetched, or a folder like one: read as what it is, somebody else's text.

Only plain data is read: recipe.yaml, lock.yaml, result.json. They must belong together, and name nothing of this
machine. Nothing else of the folder is opened here, a database or a task's YAML never.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import PublishError, RecipeError, ShoalError
from shoal.hub.generation import check_generation
from shoal.hub.published import PublishedLock, parse_published
from shoal.hub.safe_yaml import MAX_BYTES, read_yaml
from shoal.lock import ModelLock
from shoal.merge.methods import check_plan, method
from shoal.preflight import check_model_args
from shoal.recipe import MAX_RECIPE_BYTES, Recipe, parse_model, parse_recipe
from shoal.types import HubModel, LocalModel, MergeModel, MergePlan, PlainModel, ZooModel, parts_of

RECIPE, LOCK, RESULT = "recipe.yaml", "lock.yaml", "result.json"
MAX_RESULT_BYTES = 16 << 20
TASKS = "./tasks"  # how a published recipe names an include path that was not published
_NOWHERE = Path("/nowhere")  # relative folders are relative to it, so that none of this machine is meant


@dataclass(frozen=True)
class Opened:
    """where: how the publication is named in messages: a folder, or repo@commit."""

    folder: Path
    where: str
    recipe: Recipe
    lock: PublishedLock
    result: dict[str, Any]

    def local_parents(self) -> tuple[str, ...]:
        """Parents that are folders of the publisher, or made of some: nobody else can have them."""
        return tuple(model.name for model in self.lock.run.models if _local(model))


def open_publication(folder: Path, where: str) -> Opened:
    """Recipe, lock and result of a publication.

    Raises:
        PublishError: one of them is missing, too large, not safe YAML or JSON, of another schema, names folders of a
            machine or does not belong to the others; or the merge plan is none.
    """
    lock = parse_published(_read(folder / LOCK, MAX_BYTES, where), f"{where}: {LOCK}")
    recipe = _recipe(folder / RECIPE, where)
    result = _result(folder / RESULT, where)
    try:
        _check_models(lock)
        _check_recipe(recipe, lock)
        _check_winner(lock)
    except RecipeError as error:
        raise PublishError(f"{where}: {error}") from None
    told = {
        "weights_sha256": (result.get("weights_sha256"), lock.winner.weights_sha256),
        "verdict": (result.get("verdict"), lock.verdict),
        "winner.id": (_winner(result), lock.winner.id),
    }
    for key, (found, expected) in told.items():
        if found != expected:
            raise PublishError(
                f"{where}: {RESULT} says {key} {str(found)[:64]!r}, {LOCK} says {str(expected)[:64]!r};"
                " they do not belong together"
            )
    return Opened(folder, where, recipe, lock, result)


def _winner(result: dict[str, Any]) -> Any:
    winner = result.get("winner")
    return winner.get("id") if isinstance(winner, dict) else None


def _read(path: Path, limit: int, where: str) -> str:
    name = f"{where}: {path.name}"
    if path.is_symlink() or not path.is_file():
        raise PublishError(f"{name}: not there; is this a publication of shoal?")
    if path.stat().st_size > limit:
        raise PublishError(f"{name}: {path.stat().st_size:,} bytes, expected at most {limit:,}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PublishError(f"{name}: not UTF-8 text: {error}") from None


def _recipe(path: Path, where: str) -> Recipe:
    text, name = _read(path, MAX_RECIPE_BYTES, where), f"{where}: {path.name}"
    read_yaml(text, name, MAX_RECIPE_BYTES)  # no tags, no aliases, not too deep
    try:
        return parse_recipe(text, name)
    except RecipeError as error:
        raise PublishError(str(error)) from None


def _result(path: Path, where: str) -> dict[str, Any]:
    text, name = _read(path, MAX_RESULT_BYTES, where), f"{where}: {path.name}"
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PublishError(f"{name}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise PublishError(f"{name}: expected a mapping, found {type(data).__name__}")
    return data


def _parts(text: str) -> tuple[PlainModel, ...]:
    return parts_of(parse_model(text, _NOWHERE))


def _local(model: ModelLock) -> bool:
    """A merge is where its roots are: the lock holds all else that it is made of."""
    if model.merge is not None:
        return any(isinstance(part, LocalModel) for part in _parts(model.ref)[1:]) or any(
            _local(root) for root in model.merge.roots
        )
    return any(isinstance(part, LocalModel) for part in _parts(model.ref))


def _check_models(lock: PublishedLock) -> None:
    """Hub models at a full commit, members of a zoo, or folders by their name alone (`./left`); merges likewise."""
    names = [model.name for model in lock.run.models]
    if len(set(names)) != len(names) or not names:
        raise RecipeError(f"lock.yaml: expected models of different names, found {names}")
    indices = [*lock.run.sources, lock.run.tokenizer, *([] if lock.run.base is None else [lock.run.base])]
    if not all(0 <= index < len(names) for index in indices):
        raise RecipeError(f"lock.yaml: names a model that is none of the {len(names)}")
    for model in lock.run.models:
        _check_model(model)


def _check_model(model: ModelLock) -> None:
    parts = _parts(model.ref)
    commits = (model.commit, model.adapter_commit) if len(parts) > 1 else (model.commit,)
    if (len(parts) > 1) != (model.adapter is not None):
        raise RecipeError(f"lock.yaml: model {model.name}: {model.ref!r} and its adapter do not agree")
    if isinstance(parts[0], MergeModel) != (model.merge is not None):
        raise RecipeError(f"lock.yaml: model {model.name}: {model.ref!r} and how it was merged do not agree")
    for part, commit in zip(parts, commits, strict=True):
        source = part.source if isinstance(part, MergeModel) else part
        if isinstance(source, HubModel) and (source.revision != commit or not is_sha(commit)):
            raise RecipeError(
                f"lock.yaml: model {model.name}: expected {source.repo} at a commit (40 hexadecimal digits),"
                f" found {source.revision!r}"
            )
        if isinstance(source, LocalModel) and source.path.parent != _NOWHERE:
            raise RecipeError(
                f"lock.yaml: model {model.name}: a published lock names no local paths, found one"
            )
        if isinstance(source, ZooModel) and "/" in source.member:
            raise RecipeError(f"lock.yaml: model {model.name}: {model.ref!r} is no model of a zoo")
    if model.merge is not None:
        _check_plan(model.merge.merge_plan(), f"lock.yaml: model {model.name}: its plan")
        for root in model.merge.roots:
            _check_model(root)


def is_sha(commit: str | None) -> bool:
    return commit is not None and len(commit) == 40 and set(commit) <= set("0123456789abcdef")


def _check_recipe(recipe: Recipe, lock: PublishedLock) -> None:
    if recipe.digest() != lock.run.recipe_digest:
        raise RecipeError(
            f"recipe.yaml is not the recipe that lock.yaml names (digest {recipe.digest()[:12]}, expected"
            f" {lock.run.recipe_digest[:12]}); shoal {lock.run.shoal} wrote it: use that version, or look at what was"
            " changed"
        )
    texts = ([recipe.base_model] if recipe.base_model else []) + list(recipe.models)
    if [_name(text) for text in texts] != [_name(model.ref) for model in lock.run.models]:
        raise RecipeError("recipe.yaml names other models than lock.yaml")
    include = recipe.evaluation.include_path
    if include is not None and include != TASKS and not _is_zoo(include):
        raise RecipeError(
            f"recipe.yaml: evaluation.include_path is {include!r}; a publication names no folders"
        )
    if recipe.search.warm_start is not None:
        raise RecipeError(
            f"recipe.yaml: search.warm_start is {recipe.search.warm_start!r}; a publication names no folders"
        )
    if recipe.output.tokenizer_source not in ("base", "union", *texts):
        raise RecipeError("recipe.yaml: output.tokenizer_source is none of its models")
    check_model_args(recipe)
    try:
        check_generation(recipe.evaluation.gen_kwargs)
    except ValueError as error:
        raise RecipeError(f"recipe.yaml: evaluation.gen_kwargs: {error}") from None


def _is_zoo(include: str) -> bool:
    zoo, slash, member = include.removeprefix("zoo:").partition("/")
    return include.startswith("zoo:") and bool(slash) and member == "tasks" and zoo.isidentifier()


def _name(text: str) -> tuple[str, ...]:
    """A model without its revision, which the recipe need not name."""
    return tuple(_unpinned(part) for part in _parts(text))


def _unpinned(part: PlainModel) -> str:
    if isinstance(part, MergeModel):
        return f"merge:{_unpinned(part.source)}"
    return part.repo if isinstance(part, HubModel) else str(part)


def _check_winner(lock: PublishedLock) -> None:
    """A plan of the lock's models, by methods that are known, with parameters that these take."""
    plan = lock.winner.merge_plan()
    if list(plan.models) != [model.name for model in lock.run.models]:
        raise RecipeError("winner.plan: merges other models than the lock names")
    if plan.dtype != lock.run.dtype:
        raise RecipeError(f"winner.plan: dtype {plan.dtype!r}, the lock says {lock.run.dtype!r}")
    try:
        method(lock.run.operator)
    except ShoalError as error:
        raise RecipeError(f"winner.plan: {error}") from None
    _check_plan(plan, "winner.plan")


def _check_plan(plan: MergePlan, where: str) -> None:
    try:
        if plan.base is not None and not 0 <= plan.base < len(plan.models):
            raise RecipeError(f"base {plan.base} is none of its models")
        check_plan(plan)
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise RecipeError(f"{where}: not a merge plan: {error}") from None
    except ShoalError as error:
        raise RecipeError(f"{where}: {error}") from None
