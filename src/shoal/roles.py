"""Which items a run searches on, selects on and tests on.

Within one split an item's role is a pure function of its content's hash (its cluster's, where the recipe names a
cluster field) and a fixed public salt, never of the run's seed: see docs/design.md, "Roles".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.errors import EvaluationError, RecipeError
from shoal.evals.catalogue import Catalogue, TaskSource, doc_hash
from shoal.lock import RoleLock, TaskLock
from shoal.recipe import Recipe, TaskSpec
from shoal.search.items import assign
from shoal.types import ROLES, Role

DEFAULT_SIZES: Mapping[Role, int] = {"search": 512, "select": 256, "test": 1024}

# shares of a split that no role tests on, and of one that a role tests on too; [0, 0.05) is for few-shot examples
FEWSHOT_ZONE = (0.0, 0.05)
SEPARATE: Mapping[str, tuple[float, float]] = {"search": (0.05, 0.70), "select": (0.70, 1.0)}
SHARED: Mapping[str, tuple[float, float]] = {
    "search": (0.05, 0.35),
    "select": (0.35, 0.50),
    "test": (0.50, 1.0),
}


@dataclass(frozen=True)
class _Split:
    """The items of one split of one lm-eval task. labels: what decides the role, and what is resampled together."""

    source: TaskSource
    name: str
    hashes: tuple[str, ...]
    labels: tuple[str, ...]


def lock_tasks(recipe: Recipe, catalogue: Catalogue) -> tuple[TaskLock, ...]:
    """Check every task, metric and split of a recipe and give each role its items.

    Raises:
        RecipeError: a task, metric, split or cluster field that does not exist; benchmark items in the search that the
            recipe does not allow by name.
        EvaluationError: a data set that cannot be loaded, or a role without items.
    """
    tasks = [_lock_task(spec, catalogue) for spec in single_tasks(recipe, catalogue)]
    tested = {h for task in tasks for h in task.roles["test"].hashes}
    selected = {h for task in tasks for h in task.roles["select"].hashes}
    taken: Mapping[Role, set[str]] = {"search": tested | selected, "select": tested, "test": set()}
    return tuple(_without_taken(task, taken) for task in tasks)


def single_tasks(recipe: Recipe, catalogue: Catalogue) -> tuple[TaskSpec, ...]:
    """The recipe's tasks; a group or tag of lm-eval stands for its single tasks, with the same settings.

    Its weight is divided equally among them.

    Raises:
        RecipeError: no such task, or a task that is named twice.
    """
    specs: dict[str, TaskSpec] = {}
    for spec in recipe.tasks:
        names = catalogue.expand([spec.task])
        for name in names:
            if name in specs:
                raise RecipeError(
                    f"task {name!r} is named twice, here by {spec.task!r}; name each task once, by itself or in a group"
                )
            specs[name] = (
                spec
                if names == [spec.task]
                else spec.model_copy(update={"task": name, "weight": spec.weight / len(names)})
            )
    return tuple(specs.values())


def _lock_task(spec: TaskSpec, catalogue: Catalogue) -> TaskLock:
    main = catalogue.load(spec.task)
    metric = main.metric(spec.metric)
    number = main.set_fewshot(spec.num_fewshot)
    splits: dict[tuple[str, str], _Split] = {}
    drawn: dict[tuple[str, str], list[Role]] = {}
    where: dict[Role, tuple[str, str]] = {}
    for role in ROLES:
        wanted = spec.source(role)
        source = main if wanted.task is None or wanted.task == spec.task else catalogue.load(wanted.task)
        if source is not main:
            source.metric(metric.key)
            source.set_fewshot(number)
        split = wanted.split or _default_split(source, role)
        if role != "test" and split == source.eval_split and not spec.search_on_eval_split:
            raise RecipeError(
                f"task {spec.task!r}: {role} items would come from {source.name!r} split {split!r}, which is what"
                f" lm-eval scores; name another source (splits: {', '.join(source.split_names)}) or allow it by"
                " search_on_eval_split: true (its items are then divided by content hash, and the claim says so)"
            )
        key = (source.name, split)
        if key not in splits:
            splits[key] = _read(source, split, spec)
        drawn.setdefault(key, []).append(role)
        where[role] = key
    sources = {split.source.name: split.source for split in splits.values()}
    pools = {
        name: [doc_hash(doc) for doc in source.fewshot_docs()] if number else []
        for name, source in sources.items()
    }
    pool = {h for hashes in pools.values() for h in hashes}
    roles: dict[Any, RoleLock] = {}
    for role, key in where.items():
        chosen = _choose(splits[key], drawn[key], pool)[role]
        size = spec.source(role).size
        if size is not None and size > len(chosen):
            raise RecipeError(
                f"task {spec.task!r}: {role}.size is {size}, split {key[1]!r} of {key[0]!r} has {len(chosen)} items for"
                " this role"
            )
        roles[role] = _role_lock(splits[key], chosen[: size or DEFAULT_SIZES[role]])
    return TaskLock(
        task=spec.task,
        metric=metric.key,
        higher_is_better=metric.higher_is_better,
        weight=spec.weight,
        output_type=main.output_type,
        num_fewshot=number,
        version=main.version,
        eval_split=main.eval_split,
        max_drop=spec.max_drop,
        search_on_eval_split=any(
            where[role][1] == splits[where[role]].source.eval_split for role in ROLES if role != "test"
        ),
        fewshot_hashes=_fewshot_pool(
            spec.task,
            number,
            pools,
            shared={h for split in splits.values() for h in split.hashes},
            taken={h for lock in roles.values() for h in lock.hashes},
        ),
        roles=roles,
    )


def _default_split(source: TaskSource, role: Role) -> str:
    """test: what lm-eval scores; search and select: validation, else training, else what lm-eval scores."""
    if role == "test":
        return source.eval_split
    for kind in ("validation", "training"):
        split = source.splits.get(kind)
        if split is not None and split != source.eval_split:
            return split
    return source.eval_split


def _read(source: TaskSource, split: str, spec: TaskSpec) -> _Split:
    docs = source.docs(split)
    if spec.cluster is not None and docs and spec.cluster not in docs[0]:
        raise RecipeError(
            f"task {spec.task!r}: cluster names the field {spec.cluster!r}; its items have {', '.join(map(str, docs[0]))}"
        )
    hashes = tuple(doc_hash(doc) for doc in docs)
    labels = hashes if spec.cluster is None else tuple(doc_hash(doc[spec.cluster]) for doc in docs)
    return _Split(source, split, hashes, labels)


def _choose(split: _Split, roles: Sequence[Role], pool: set[str]) -> dict[str, list[int]]:
    """Data-set indices per role, in the order in which a size takes them."""
    if list(roles) == ["test"]:
        zones: Mapping[str, tuple[float, float]] = {"test": (0.0, 1.0)}
        if pool & set(split.hashes):
            zones = {"test": (FEWSHOT_ZONE[1], 1.0)}
    else:
        zones = SHARED if "test" in roles else SEPARATE
    return assign(split.labels, zones)


def _role_lock(split: _Split, chosen: Sequence[int]) -> RoleLock:
    items = sorted(chosen)
    return RoleLock(
        task=split.source.name,
        split=split.name,
        items=tuple(items),
        hashes=tuple(split.hashes[i] for i in items),
        clusters=tuple(split.labels[i][:16] for i in items),
    )


def _fewshot_pool(
    task: str, number: int, pools: Mapping[str, list[str]], shared: set[str], taken: set[str]
) -> tuple[str, ...] | None:
    """None where lm-eval's own pools are disjoint from every role's split; else the parts that are set aside.

    pools: per lm-eval task that a role draws on. A pool that no role's split shares stays whole.
    """
    if not number or not any(shared & set(pool) for pool in pools.values()):
        return None
    aside: list[str] = []
    for pool in pools.values():
        if shared & set(pool):
            kept = [
                pool[i] for i in assign(pool, {"fewshot": FEWSHOT_ZONE})["fewshot"] if pool[i] not in taken
            ]
        else:
            kept = pool
        if len(kept) <= number:
            raise EvaluationError(
                f"task {task!r}: {len(kept)} items can be set aside for few-shot examples, num_fewshot {number} needs"
                " more"
            )
        aside += kept
    return tuple(sorted(set(aside)))


def _without_taken(task: TaskLock, taken: Mapping[Role, set[str]]) -> TaskLock:
    """Drop from search and select what any task tests on, and from search what any task selects on.

    The same question may stand in two splits, or in two tasks.
    """
    roles: dict[Any, RoleLock] = {}
    for role, lock in task.roles.items():
        keep = [i for i, h in enumerate(lock.hashes) if h not in taken[role]]
        if not keep:
            raise EvaluationError(
                f"task {task.task!r}: no items left for {role} in split {lock.split!r} of {lock.task!r}"
            )
        if role == "test" and len(set(lock.clusters)) < 2:
            raise EvaluationError(
                f"task {task.task!r}: its test items are one cluster; an interval needs at least two (split"
                f" {lock.split!r} of {lock.task!r})"
            )
        roles[role] = lock.model_copy(
            update={
                name: tuple(getattr(lock, name)[i] for i in keep) for name in ("items", "hashes", "clusters")
            }
        )
    return task.model_copy(update={"roles": roles})
