"""`shoal import`: a YAML of mergekit-evolve becomes a recipe, and everything that changes in meaning is said.

The recipe is written as text, not dumped, so that every part carries the remarks on it as comments.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shoal.errors import RecipeError
from shoal.lock import ModelLock, write_text
from shoal.mergekit_evolve import load_evolve_config
from shoal.models import ResolvedModel
from shoal.preflight import open_catalogue, resolve_include_path, space_of
from shoal.recipe import Recipe, parse_model, parse_recipe
from shoal.translation import Change, Translation, translate
from shoal.types import AdapterModel, HubModel
from shoal.warm import find_model, rewritten, warm_genome

BUDGET = 100  # mergekit-evolve's --max-fevals


@dataclass(frozen=True)
class Imported:
    """A recipe as `text` (commented YAML) and as data; what changed in meaning; the content of the warm start's file."""

    recipe: Recipe
    text: str
    changes: tuple[Change, ...]
    warm_start: str | None = None
    notes: tuple[str, ...] = ()


def import_config(
    path: Path,
    *,
    best: Path | None = None,
    include_path: str | None = None,
    budget: int = BUDGET,
    layers: int | None = None,
    check_tasks: bool = False,
    recipe_path: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Imported:
    """The recipe that searches what the YAML of mergekit-evolve at `path` searches, as far as there is one.

    best: a mergekit YAML to start from (mergekit-evolve's best_config.yaml). include_path: as its --task-search-path.
    budget: as its --max-fevals. layers: of the models, for those whose config.json is not on this machine.
    check_tasks: load the tasks, to name the splits that the search may use. recipe_path: where the recipe will be
    written; the warm start lies beside it. Nothing is written here.

    Raises:
        RecipeError: the YAML is wrong, or says what no recipe can say.
        ShoalError: `best` has other models or another method; a task or data set cannot be loaded (check_tasks).
    """
    draft = translate(load_evolve_config(path), path, include_path, budget, layers)
    if check_tasks:
        _check_tasks(draft, include_path, say)
    if best is None:
        return _finished(draft, path)
    warm_start, notes = _warm_start(draft, best, recipe_path)
    return _finished(draft, path, warm_start, notes)


def _check_tasks(draft: Translation, include_path: str | None, say: Callable[[str], None]) -> None:
    """Load every task; name the split to search on, or allow by name what there is no other split for."""
    catalogue = open_catalogue(resolve_include_path(include_path, Path(), say))
    tasks: list[dict[str, Any]] = draft.data["tasks"]
    for entry in tasks:
        names = catalogue.expand([entry["task"]])
        if names != [entry["task"]]:
            draft.say(
                "tasks",
                "tasks",
                f"{entry['task']} is a group: its {len(names)} tasks share its weight equally",
            )
        for name in names:
            say(f"loading {name}")
            source = catalogue.load(name)
            source.metric(entry["metric"])
            kinds = ("validation", "training")
            others = [s for k in kinds if (s := source.splits.get(k)) is not None and s != source.eval_split]
            if others:
                draft.say(
                    "tasks",
                    "tasks",
                    f"{name}: searched on split {others[0]!r}, tested on {source.eval_split!r}",
                )
                continue
            entry["search_on_eval_split"] = True
            draft.say(
                "tasks",
                "tasks",
                f"{name}: has no split but {source.eval_split!r}, which lm-eval scores; search_on_eval_split divides its"
                " items into search, selection and test by their content, and the claim says so; better, name another"
                " task's split under search and select",
            )


# --- warm start


def _warm_start(draft: Translation, best: Path, recipe_path: Path | None) -> tuple[str, tuple[str, ...]]:
    """The YAML of `best` with this recipe's models, and how it fits into the space, where that can be known here."""
    from shoal.merge.mergekit_file import read_config

    _, config = read_config(best)
    spelled = draft.spelled
    names = list(dict.fromkeys(spelled.values()))
    texts = [(ours, *(t for t, o in spelled.items() if o == ours)) for ours in names]
    method = draft.data["merge"]["method"]
    if config.get("merge_method") != method:
        raise RecipeError(
            f"{best}: merges by {config.get('merge_method')}, the search is by {method}; start from a merge of one method"
        )
    try:
        kept = rewritten(config, lambda reference: names[find_model(reference, texts, str(best))])
    except ValueError as error:
        raise RecipeError(f"{best}: {error}") from None
    text = f"# {best.name}, with the models as the recipe writes them\n" + yaml.safe_dump(
        kept, sort_keys=False
    )
    if recipe_path is None:
        return text, ("without -o the start is not written; name a file for the recipe",)
    beside = f"./{warm_start_path(recipe_path).name}"
    draft.data["search"]["warm_start"] = beside
    draft.say("best_config.yaml", "search", f"the search starts from it: {beside}")
    return text, ()


def warm_start_path(recipe_path: Path) -> Path:
    """The file of the warm start that goes with a recipe."""
    return recipe_path.with_name(f"{recipe_path.stem}.warm_start.yml")


def write_import(
    imported: Imported, recipe_path: Path, say: Callable[[str], None] = lambda text: None
) -> tuple[str, ...]:
    """Write the recipe, and its warm start beside it; returns what a user should know of how the start fits.

    Models of the Hub are not fetched for that: then the run will tell.

    Raises:
        RecipeError: a file is there already. ShoalError: the start has no place in the space. Then nothing is written.
    """
    beside = warm_start_path(recipe_path)
    for path in (recipe_path, *([beside] if imported.warm_start is not None else [])):
        if path.exists():
            raise RecipeError(f"{path}: exists already; name another file by -o")
    notes: tuple[str, ...] = ()
    if imported.warm_start is not None:
        write_text(beside, imported.warm_start)
        try:
            notes = (_fit(imported.recipe, recipe_path, say),)
        except BaseException:
            beside.unlink()
            raise
    write_text(recipe_path, imported.text)
    return notes


def _fit(recipe: Recipe, recipe_path: Path, say: Callable[[str], None]) -> str:
    """How the start fits into the space of the recipe, where its models are here."""
    folder = recipe_path.parent
    texts = ([recipe.base_model] if recipe.base_model else []) + list(recipe.models)
    refs = [parse_model(text, folder) for text in texts]
    parts = [p for r in refs for p in ((r.base, r.adapter) if isinstance(r, AdapterModel) else (r,))]
    if any(isinstance(part, HubModel) for part in parts):
        return "how well the start fits into the space is said when the run begins: its models are on the Hub"
    space, models = space_of(recipe, folder, say)
    return warm_genome(warm_start_path(recipe_path), space, [_named(model) for model in models])[1]


def _named(model: ResolvedModel) -> ModelLock:
    """The model by name and place, without the hashes that a lock has."""
    adapter = None if model.adapter is None else str(model.adapter)
    return ModelLock(
        name=model.name, ref=str(model.ref), folder=str(model.folder), commit=model.commit, adapter=adapter,
        adapter_commit=model.adapter_commit, origin={}, files={},
    )  # fmt: skip


# --- writing


def _finished(
    draft: Translation, path: Path, warm_start: str | None = None, notes: Sequence[str] = ()
) -> Imported:
    text = _text(draft, path)
    return Imported(
        parse_recipe(text, "the imported recipe"), text, tuple(draft.changes), warm_start, tuple(notes)
    )


def _text(draft: Translation, path: Path) -> str:
    lines = [
        f"# From {path.name}, a search of mergekit-evolve. What means something else here is said above each part.",
        "# Check it: shoal validate; if that says that search items would come from what lm-eval scores, name another",
        "# split of the task (`search: {split: train}`, `select: {split: train}`), or allow it by search_on_eval_split: true.",
    ]
    for key, value in draft.data.items():
        for change in draft.changes:
            if change.section == key:
                lines += textwrap.wrap(
                    f"{change.key}: {change.text}",
                    width=110,
                    initial_indent="# ",
                    subsequent_indent="#   ",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
        if isinstance(value, dict):
            lines.append(f"{key}:")
            lines += [f"  {line}" for name, inner in value.items() for line in _lines(name, inner)]
        else:
            lines += _lines(key, value)
    return "\n".join(lines) + "\n"


def _lines(key: str, value: Any) -> list[str]:
    """One key as YAML, what is innermost on one line."""
    flow = None if isinstance(value, (dict, list)) else False
    text = yaml.safe_dump(
        {key: value}, sort_keys=False, allow_unicode=True, default_flow_style=flow, width=110
    )
    return text.rstrip("\n").split("\n")
