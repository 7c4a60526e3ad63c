"""What a run would do, before it does it: for `shoal validate`; and the smallest gain that its test items can show."""

from __future__ import annotations

from collections import Counter

from shoal.lock import Lock
from shoal.models import open_parents
from shoal.preflight import Prepared
from shoal.recipe import Recipe
from shoal.search.power import CORRELATION, detectable_difference, effective_items
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
    rows.append(
        (
            "method",
            f"{lock.operator}, weights written as {lock.dtype}, scored as {_compute_dtype(recipe, lock)}",
        )
    )
    rows.append(("memory", _memory(prepared, device, memory, memory_limit)))
    rows.append(("space", f"{space.shape}, {space.size} genes"))
    for parameter, name, low, high in space.ranges():
        rows.append(
            (
                "",
                f"{parameter} of {name}: {low:.3g} to {high:.3g} per layer"
                if name
                else f"{parameter}: {low:.3g} to {high:.3g} per layer",
            )
        )
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
            f"{count} candidates: {prepared.generations} generations of"
            + f" {lock.popsize}, {lock.search.items} items per task and generation, by {lock.search.optimizer}{_extras(lock)}",
        )
    )
    anchors = len(lock.models) + 1
    pool = sum(len(task.roles["search"].items) for task in lock.tasks)
    rows.append(("anchors", f"{len(lock.models)} parents and the uniform merge on all {pool} search items"))
    spent = (
        count * sum(min(recipe.search.items, len(task.roles["search"].items)) for task in lock.tasks)
        + anchors * pool
    )
    bound = "at least " if lock.search.grow_items else "at most " if lock.search.racing else ""
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
