"""What a run would do, before it does it: for `shoal validate`; and the smallest gain that its test items can show."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from shoal.availability import rows as availability_rows
from shoal.availability import size_words
from shoal.lock import Lock
from shoal.models import open_parents
from shoal.preflight import Prepared
from shoal.rebuilt import copies_folder, free_here, is_rebuilt, weight_bytes
from shoal.recipe import Recipe
from shoal.sample import search_sample
from shoal.search.ascent import MOST
from shoal.search.power import CORRELATION, detectable_difference, effective_items
from shoal.search.space import Space
from shoal.spaces import space_words
from shoal.types import ROLES

DISCORDANT = 0.2  # share of test items on which two merges differ, assumed for the power statement


def describe(
    prepared: Prepared, device: str = "cpu", memory: str = "auto", memory_limit: int | None = None
) -> list[tuple[str, str]]:
    """What the run would do, as (topic, sentence) rows for `shoal validate`."""
    recipe, lock, space = prepared.recipe, prepared.lock, prepared.space
    rows = []
    for index, model in enumerate(lock.models):
        kind = "base" if index == lock.base else "source"
        rows.append((kind, f"{model.name} ({model.ref})" if model.name != model.ref else model.name))
    rows += availability_rows(prepared.available)
    rows += _rebuilt(lock)
    rows.append(
        (
            "method",
            f"{lock.operator}, weights written as {lock.dtype}, scored as {_compute_dtype(recipe, lock)}",
        )
    )
    rows.append(("memory", _memory(prepared, device, memory, memory_limit)))
    rows.append(("space", space_words(space)))
    rows += _ranges(space)
    for finer, stage in zip(prepared.finer, lock.stages, strict=True):
        rows.append(
            (
                "then",
                f"{space_words(finer)}, generations of {stage.popsize}, once {recipe.space.patience} generations"
                + " bring nothing beyond noise",
            )
        )
        rows += _ranges(finer)
    for task in lock.tasks:
        places = {
            role: f"{len(task.roles[role].items)} {role} ({task.roles[role].task} {task.roles[role].split})"
            for role in ROLES
        }
        rows.append(
            (
                "task",
                f"{task.task}: {task.metric}, weight {task.weight:g}, {task.num_fewshot}-shot; {', '.join(places.values())}",
            )
        )
        if task.search_on_eval_split:
            rows.append(
                (
                    "",
                    f"the recipe allows a search on the split that lm-eval scores ({task.eval_split}); the claim will say so",
                )
            )
    count = prepared.generations * lock.popsize
    rows.append(
        (
            "search",
            f"{count} candidates: {'up to ' if lock.stages else ''}{prepared.generations} generations of"
            + f" {lock.popsize}, {lock.search.items} items per task and generation, by {lock.search.optimizer}{_extras(lock)}",
        )
    )
    anchors = len(lock.models) + 1
    pools = {task.task: len(task.roles["search"].items) for task in lock.tasks}
    sample = {task: len(items) for task, items in search_sample(lock).items()}
    every, some = sum(pools.values()), sum(sample.values())
    rows.append(
        (
            "anchors",
            f"{len(lock.models)} parents and the uniform merge on {some if some < every else 'all'}"
            f"{' of' if some < every else ''} {every} search items"
            + ("; the best of them on what generations draw" if some < every else ""),
        )
    )
    drawn = {task: min(lock.search.items, pool) for task, pool in pools.items()}
    # the best anchor meets new items of every generation, until it has met all
    later = sum(min(prepared.generations * drawn[task], pools[task] - sample[task]) for task in pools)
    spent = count * sum(drawn.values()) + anchors * some + later
    if lock.search.start == "gradient":
        tried = sum(min(lock.search.start_items, items) for items in sample.values())
        rows.append(
            (
                "start",
                f"along the gradient on {tried} of these items, at most {MOST * tried} item evaluations",
            )
        )
        later += MOST * tried
        spent += MOST * tried
    bound = "at least " if lock.search.grow_items else "at most " if lock.search.racing or later else ""
    rows.append(("cost", f"{bound}{spent} item evaluations before selection and test"))
    n, gain = test_power(lock)
    single = all(len(set(t.roles["test"].clusters)) == len(t.roles["test"].clusters) for t in lock.tasks)
    clustered = "" if single else f", correlation {CORRELATION:g} within clusters"
    rows.append(
        (
            "claim",
            f"{n} test items can show a gain of {100 * gain:.1f} points or more (80% power, 95% confidence, {DISCORDANT:.0%} discordant items{clustered})",
        )
    )
    rows += [("note", note) for note in prepared.notes]
    return rows


def _rebuilt(lock: Lock) -> list[tuple[str, str]]:
    """What is made before the run begins: float32 copies of merges of ours."""
    rows = []
    for model in lock.models:
        if model.merge is None:
            continue
        folder = Path(model.folder)
        size, roots = size_words(weight_bytes(folder)), ", ".join(root.ref for root in model.merge.roots)
        if is_rebuilt(folder):
            where = f"the copy of {size} is in {copies_folder()}"
        else:
            where = f"{size} into {copies_folder()}, where {size_words(free_here())} are free"
        commit = f" at commit {model.commit[:12]}" if model.commit else ""
        rows.append(("rebuilt", f"{model.name}{commit} in float32 from its roots {roots}: {where}"))
    return rows


def _ranges(space: Space) -> list[tuple[str, str]]:
    """What the bounds of genes imply, a row per parameter and model."""
    return [
        ("", f"{parameter}{f' of {name}' if name else ''}: {low:.3g} to {high:.3g} per layer")
        for parameter, name, low, high in space.ranges()
    ]


def _extras(lock: Lock) -> str:
    words = {
        "chosen where parents disagree": lock.search.item_choice == "disagreement",
        "more where halves disagree": lock.search.grow_items,
        "clear losers leave early": lock.search.racing,
    }
    return "".join(f", {word}" for word, wanted in words.items() if wanted)


def _memory(prepared: Prepared, device: str, memory: str, limit: int | None) -> str:
    from shoal.merge.memory import plan_memory
    from shoal.merge.methods import method
    from shoal.merge.runtime import torch_dtype

    lock = prepared.lock
    runtime = torch_dtype(_compute_dtype(prepared.recipe, lock))
    sparse = method(lock.operator).drops
    return plan_memory(open_parents(lock.models), device, runtime, sparse, memory, limit).words()


def test_power(lock: Lock) -> tuple[int, float]:
    """Number of test items and the smallest gain in the overall score that they can show, over one baseline."""
    clusters = [tuple(Counter(task.roles["test"].clusters).values()) for task in lock.tasks]
    items = effective_items([task.weight for task in lock.tasks], clusters)
    return sum(map(sum, clusters)), detectable_difference(max(1.0, items), discordant=DISCORDANT)


def _compute_dtype(recipe: Recipe, lock: Lock) -> str:
    wanted = recipe.evaluation.model_args.get("dtype", "auto")
    return lock.dtype if wanted == "auto" else str(wanted)
