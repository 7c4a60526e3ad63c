"""From a recipe to a lock: everything that can be wrong is found here, before any heavy work.

Order of checks, cheapest first: method and space, configurations and tokenizers of all models, tasks, metrics and
splits; only then weights are fetched and compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.availability import Availability, look_up
from shoal.errors import CheckpointError, RecipeError, nearest
from shoal.evals.catalogue import Catalogue
from shoal.lock import Lock, ModelLock, SearchLock, Seeds, TaskLock, new_lock
from shoal.merge.linearity import check_linear
from shoal.merge.methods import Method, method
from shoal.models import (
    NO_MERGES,
    Merges,
    ResolvedModel,
    check_files,
    open_parents,
    rebuilt_here,
    resolve_models,
    root_refs,
    zoo_progress,
)
from shoal.recipe import Recipe, parse_model
from shoal.roles import lock_tasks, single_tasks
from shoal.search.optimizer import OPTIMIZERS, default_popsize, default_sigma0
from shoal.search.plans import parent_plan, uniform_merge_plan
from shoal.search.space import Space
from shoal.spaces import check_growth, make_spaces, stage_locks
from shoal.types import MergePlan, ModelRef, TensorGroup

Say = Callable[[str], None]
STARTLESS = ("random", "grid")  # optimizers that do not begin at x0
RACED = ("cma-es", "sep-cma-es")  # optimizers that use nothing but the order of the best mu candidates
ITEMS, ITEMS_OF_ONE = 16, 32  # of each of several tasks that a generation meets, and of a single one
RACING_ITEMS = (
    48  # of all tasks in one generation, below which the first of three rungs tells hardly anything
)
# lm-eval's `hf` model arguments that mean something for a model that is already in memory
MODEL_ARGS = (
    "add_bos_token",
    "chat_template_args",
    "device",
    "dtype",
    "enable_thinking",
    "logits_cache",
    "max_length",
    "mixed_precision_dtype",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)


@dataclass(frozen=True)
class Prepared:
    """A recipe that can be run: its lock, its space, and the plans of its baselines by name.

    finer: the spaces that the search may grow into, in order. available: what the Hub said of the recipe's models.
    """

    recipe: Recipe
    lock: Lock
    space: Space
    groups: tuple[TensorGroup, ...]
    notes: tuple[str, ...] = ()
    finer: tuple[Space, ...] = ()
    available: tuple[Availability, ...] = ()

    @property
    def generations(self) -> int:
        """Of the space that the search starts in, at most: finer ones may have larger generations."""
        return self.recipe.search.budget // self.lock.popsize

    def space_of(self, genome: Sequence[float] | NDArray[np.float64]) -> Space:
        """The space that a genome belongs to: every stage has another number of genes."""
        return next((s for s in (self.space, *self.finer) if s.size == len(genome)), self.space)

    def decode(self, genome: Sequence[float] | NDArray[np.float64]) -> MergePlan:
        """The plan of a genome of any stage; ShoalError where there is none of its length."""
        return self.space_of(genome).decode(genome)

    def baselines(self) -> dict[str, tuple[str, MergePlan]]:
        """Name -> (kind, plan) of every parent and of the uniform merge, in table order."""
        names = [model.name for model in self.lock.models]
        plans: dict[str, tuple[str, MergePlan]] = {
            name: ("parent", parent_plan(self.groups, names, index, self.lock.dtype))
            for index, name in enumerate(names)
        }
        merged = list(self.lock.sources)
        if len(merged) == 1 and self.lock.base is not None:
            merged = [self.lock.base, *merged]  # slerp and its kind merge the base itself
        plans["uniform merge"] = ("uniform", uniform_merge_plan(self.groups, names, merged, self.lock.dtype))
        return plans


def prepare(
    recipe: Recipe,
    folder: Path,
    say: Say = lambda text: None,
    outlines: bool = False,
    merges: Merges = NO_MERGES,
) -> Prepared:
    """Resolve and check a recipe whose relative paths are relative to `folder`.

    outlines: weights on the Hub that are not in the cache are not fetched, only their headers; enough to say what a run
    would do and cost, not to run it: the lock lacks their hashes. merges: how the merges of ours among its models were
    made (`shoal.hub.roots`).

    Raises:
        RecipeError, CheckpointError, EvaluationError: one clear message each.
    """
    chosen = _check_method(recipe)
    check_model_args(recipe)
    _check_optimizer(recipe)
    check_growth(recipe.space, recipe.search.optimizer)
    _check_start(recipe)
    refs = model_refs(recipe, folder)
    _check_tokenizer_source(recipe, refs)
    available = look_up([*refs, *root_refs(refs, merges)], say)
    small = resolve_models(refs, say, weights=False, merges=merges)
    _check_configs(small)
    include = resolve_include_path(recipe.evaluation.include_path, folder, say)
    say("checking tasks")
    tasks = lock_tasks(recipe, open_catalogue(include))
    if recipe.search.objective == "metric":
        _check_metric_objective(recipe, open_catalogue(include))
    models = resolve_models(refs, say, outlines=outlines, merges=merges)
    say("checking models")
    _check_tokenizers(models)
    _check_chat_template(recipe, models[_tokenizer_index(recipe, refs)])
    notes: list[str] = []
    groups = _groups(models, notes)
    base = 0 if recipe.base_model is not None else None
    sources = tuple(range(0 if base is None else 1, len(models)))
    dtype = recipe.merge.dtype or _own_dtype(models[0])
    names = [model.name for model in models]
    space, *finer = make_spaces(recipe, chosen, groups, names, base, sources, dtype)
    popsize = recipe.search.popsize or default_popsize(space.size)
    if recipe.search.budget < popsize:
        raise RecipeError(
            f"search.budget: {recipe.search.budget} candidates are less than one generation of {popsize};"
            f" set search.budget to at least {popsize} or search.popsize to less"
        )
    seed = recipe.search.seed
    lock = new_lock(
        recipe,
        models=tuple(model.lock() for model in models),
        base=base,
        sources=sources,
        tokenizer=_tokenizer_index(recipe, refs),
        operator=f"{chosen.name}@{chosen.version}",
        dtype=dtype,
        genes=space.names,
        popsize=popsize,
        sigma0=recipe.search.sigma0 or default_sigma0(space.size),
        stages=stage_locks(recipe, finer),
        search=_search_lock(recipe, space, tasks),
        seeds=Seeds(
            search=seed, items=seed, masks=seed, fewshot=recipe.evaluation.fewshot_seed, bootstrap=seed
        ),
        include_path=None if include is None else str(include),
        tasks=tasks,
    )
    return Prepared(recipe, lock, space, groups, tuple(notes), tuple(finer), available)


def space_of(
    recipe: Recipe, folder: Path, say: Say = lambda text: None
) -> tuple[Space, tuple[ResolvedModel, ...]]:
    """The search space of a recipe and its models, base first; its tasks are not looked at, nothing is hashed.

    Raises:
        RecipeError, CheckpointError: as `prepare`.
    """
    chosen = _check_method(recipe)
    models = tuple(resolve_models(model_refs(recipe, folder), say))
    base = 0 if recipe.base_model is not None else None
    sources = tuple(range(0 if base is None else 1, len(models)))
    names = [model.name for model in models]
    dtype = recipe.merge.dtype or _own_dtype(models[0])
    return make_spaces(recipe, chosen, _groups(models, []), names, base, sources, dtype)[0], models


def restore(recipe: Recipe, lock: Lock, say: Say = lambda text: None) -> Prepared:
    """The same from an existing lock: nothing is looked up anew, files must be those that the lock names."""
    lock = rebuilt_here(lock, say)
    say("checking that models and tasks are those of the lock")
    for model in lock.models:
        check_files(model)
    groups = groups_of(lock.models)
    names = [model.name for model in lock.models]
    space, *finer = make_spaces(
        recipe, method(lock.operator), groups, names, lock.base, lock.sources, lock.dtype
    )
    if [s.names for s in (space, *finer)] != [lock.genes, *(stage.genes for stage in lock.stages)]:
        raise RecipeError(
            "the genes of this version of shoal differ from the lock's; use the version that the lock names"
        )
    return Prepared(recipe, lock, space, groups, finer=tuple(finer))


def groups_of(models: Sequence[ModelLock]) -> tuple[TensorGroup, ...]:
    """Tensor groups of locked models (of the first one: all have the same)."""
    from shoal.merge.groups import tensor_groups

    return tensor_groups(open_parents(models[:1])[0])


@lru_cache(maxsize=4)
def open_catalogue(include_path: Path | None) -> Catalogue:
    """One catalogue per include path and process: an index of lm-eval's tasks takes seconds."""
    return Catalogue(include_path)


def _check_method(recipe: Recipe) -> Method:
    chosen = method(recipe.merge.method)
    if chosen.base == "required" and recipe.base_model is None:
        raise RecipeError(f"merge.method {chosen.name!r} needs base_model, found none")
    if chosen.base == "none" and recipe.base_model is not None:
        raise RecipeError(
            f"merge.method {chosen.name!r} has no base; list {recipe.base_model!r} under models if it is to be merged,"
            " and remove base_model"
        )
    count = len(recipe.models)
    if count < chosen.min_sources or (chosen.max_sources is not None and count > chosen.max_sources):
        wanted = (
            f"{chosen.min_sources}"
            if chosen.max_sources == chosen.min_sources
            else (
                f"at least {chosen.min_sources}"
                if chosen.max_sources is None
                else f"{chosen.min_sources} to {chosen.max_sources}"
            )
        )
        raise RecipeError(
            f"merge.method {chosen.name!r} merges {wanted} models beside the base, found {count}"
        )
    if count < 2 and recipe.base_model is None:
        raise RecipeError("models: a merge needs at least two models, found 1")
    known = {spec.name for spec in chosen.parameters}
    for name in recipe.merge.parameters:
        if name not in known and name not in chosen.options:
            raise RecipeError(
                f"merge.parameters: {chosen.name!r} has no parameter {name!r}; {nearest(name, [*known, *chosen.options])}"
            )
    return chosen


def check_model_args(recipe: Recipe) -> None:
    """Only arguments that mean something here, none that runs code; RecipeError names the others."""
    for name in recipe.evaluation.model_args:
        if name == "trust_remote_code":
            raise RecipeError(
                "evaluation.model_args: shoal runs no code from models; remove trust_remote_code"
            )
        if name not in MODEL_ARGS:
            raise RecipeError(
                f"evaluation.model_args: {name!r} has no meaning here; {nearest(name, MODEL_ARGS)}"
            )
    dtype = recipe.evaluation.model_args.get("dtype", "auto")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise RecipeError(
            f"evaluation.model_args.dtype: expected auto, float32, bfloat16 or float16, found {dtype!r}"
        )


def _check_optimizer(recipe: Recipe) -> None:
    wanted = recipe.search.optimizer
    if wanted not in OPTIMIZERS:
        raise RecipeError(f"search.optimizer: unknown {wanted!r}; {nearest(wanted, OPTIMIZERS)}")
    if recipe.search.racing == "on" and wanted not in RACED:
        raise RecipeError(
            f"search.racing: {wanted!r} needs the score of every candidate; racing is for {' and '.join(RACED)}"
        )


def _check_start(recipe: Recipe) -> None:
    """A gradient start needs a merge that is linear in its weights, an optimizer that has a start, and the objective."""
    spec = recipe.search
    if spec.start != "gradient":
        return
    check_linear(recipe.merge.method, recipe.merge.parameters, "search.start: gradient")
    if spec.objective != "smooth":
        raise RecipeError(
            f"search.start: gradient is that of the smooth objective, found search.objective: {spec.objective}; use"
            " objective: smooth, or start: default"
        )
    if spec.optimizer in STARTLESS:
        raise RecipeError(
            f"search.start: {spec.optimizer!r} starts nowhere; a gradient start is for all optimizers but"
            f" {' and '.join(STARTLESS)}"
        )


def _search_lock(recipe: Recipe, space: Space, tasks: Sequence[TaskLock]) -> SearchLock:
    spec = recipe.search
    number = spec.items or (ITEMS_OF_ONE if len(tasks) == 1 else ITEMS)
    met = sum(min(number, len(task.roles["search"].items)) for task in tasks)
    return SearchLock(
        optimizer=spec.optimizer,
        x0=tuple(float(x) for x in space.x0),
        objective=spec.objective,
        scale=spec.scale,
        items=number,
        # disagreement is looked up for every item that may be drawn
        anchor_items=max(len(task.roles["search"].items) for task in tasks)
        if spec.item_choice == "disagreement"
        else spec.anchor_items,
        item_choice=spec.item_choice,
        uniform_share=spec.uniform_share,
        grow_items=spec.grow_items,
        racing=spec.racing == "on"
        or (spec.racing == "auto" and met >= RACING_ITEMS and spec.optimizer in RACED),
        start=spec.start,
        start_items=spec.start_items,
    )


def model_refs(recipe: Recipe, folder: Path) -> list[ModelRef]:
    """Base first, where there is one."""
    texts = ([recipe.base_model] if recipe.base_model else []) + list(recipe.models)
    return [parse_model(text, folder) for text in texts]


def resolve_include_path(text: str | None, folder: Path, say: Say) -> Path | None:
    """The folder of an include path, relative to `folder`; `zoo:tiny/tasks` is written where it is missing."""
    if text is None:
        return None
    if text.startswith("zoo:"):
        from shoal import zoo

        name, _, member = text.removeprefix("zoo:").partition("/")
        if member != "tasks":
            raise RecipeError(f"evaluation.include_path: {text!r}: the tasks of a zoo are 'zoo:{name}/tasks'")
        return zoo.tasks_path(name, progress=zoo_progress(name, say))
    return (folder / Path(text).expanduser()).resolve()


def _check_configs(models: Sequence[ResolvedModel]) -> None:
    """Compare what config.json says of the shapes, before any weights are fetched."""
    fields = (
        "architectures",
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "vocab_size",
    )
    configs = []
    for model in models:
        path = model.folder / "config.json"
        if not path.is_file():
            raise CheckpointError(f"model {model.ref}: expected config.json in {model.folder}, found none")
        try:
            configs.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise CheckpointError(f"model {model.ref}: {path} is not valid JSON: {error}") from None
    for model, config in zip(models[1:], configs[1:], strict=True):
        for field in fields:
            expected, found = configs[0].get(field), config.get(field)
            if expected != found:
                raise CheckpointError(
                    f"model {model.ref}: {field} is {found}, expected {expected} as in {models[0].ref};"
                    " only models of one architecture and size can be merged"
                )


def _check_tokenizers(models: Sequence[ResolvedModel]) -> None:
    from shoal.merge.compatible import check_tokenizers

    check_tokenizers([(model.name, model.folder) for model in models])


def _check_chat_template(recipe: Recipe, model: ResolvedModel) -> None:
    from shoal.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model.folder, recipe.output.chat_template)
    if recipe.evaluation.apply_chat_template and not tokenizer.chat_template:
        raise RecipeError(
            f"evaluation.apply_chat_template: the tokenizer of {model.ref} has no chat template; set"
            " output.chat_template (e.g. chatml), or apply_chat_template: false"
        )


def _groups(models: Sequence[ResolvedModel], notes: list[str]) -> tuple[TensorGroup, ...]:
    from shoal.merge.adapter import open_parent
    from shoal.merge.compatible import check_compatible
    from shoal.merge.groups import tensor_groups

    parents = [open_parent(model.folder, model.adapter) for model in models]
    check_compatible([(model.name, parent) for model, parent in zip(models, parents, strict=True)])
    return tensor_groups(parents[0], notes)


def _own_dtype(model: ResolvedModel) -> str:
    from shoal.merge.adapter import open_parent

    if model.merge is not None:  # its copy is float32 whatever it is
        return model.merge.dtype
    parent = open_parent(model.folder)
    counts: dict[str, int] = {}
    for name in parent.names:
        kind = str(parent.dtype(name)).removeprefix("torch.")
        counts[kind] = counts.get(kind, 0) + math.prod(parent.shape(name))
    commonest = max(counts, key=lambda kind: counts[kind])
    if commonest not in ("float32", "bfloat16", "float16"):
        raise CheckpointError(
            f"model {model.ref}: its weights are {commonest}; name the dtype to write by merge.dtype"
        )
    return commonest


def _check_tokenizer_source(recipe: Recipe, refs: Sequence[ModelRef]) -> None:
    _tokenizer_index(recipe, refs)


def _tokenizer_index(recipe: Recipe, refs: Sequence[ModelRef]) -> int:
    """Index of the model whose tokenizer is used and written out. `union` equals `base`: vocabularies must agree."""
    wanted = recipe.output.tokenizer_source
    if wanted in ("base", "union"):
        return 0
    texts = ([recipe.base_model] if recipe.base_model else []) + list(recipe.models)
    if wanted not in texts:
        raise RecipeError(
            f"output.tokenizer_source: {wanted!r} is no model of this recipe; {nearest(wanted, ['base', 'union', *texts])}"
        )
    return texts.index(wanted)


def _check_metric_objective(recipe: Recipe, catalogue: Catalogue) -> None:
    for spec in single_tasks(recipe, catalogue):
        source = catalogue.load(spec.task)
        metric = source.metric(spec.metric)
        if source.aggregation(metric.key) is not None:
            raise RecipeError(
                f"task {spec.task!r}: metric {metric.key!r} is no mean over items, so it cannot be a search objective;"
                " use search.objective: smooth"
            )
