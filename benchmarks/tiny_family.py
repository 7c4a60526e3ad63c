"""The tiny zoo as a problem for benchmarks/search.py: real merges, scored by lm-eval, through `shoal.run.evolve`.

A seed is a search seed and, of the same three tasks, items of its own: what one draw of items says of all runs alike
would otherwise look like a bias. The models stay the same. The truth is the metric on test items that no claim uses, 600
of each task; measuring it costs the search nothing.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal.journal import Journal
from shoal.lock import load_lock
from shoal.preflight import Prepared, prepare, restore
from shoal.recipe import Recipe
from shoal.run import evolve
from shoal.stages.search import new_optimizer
from shoal.types import Failed, Job, MergePlan, Role
from shoal.worker import LocalWorker
from shoal.zoo.tiny_tasks import write_tasks

TASKS = ("tiny_reverse", "tiny_sort", "tiny_choice")
METRICS = {"tiny_reverse": "exact_match", "tiny_sort": "acc", "tiny_choice": "acc"}
SIZES = {"search": 200, "select": 100, "test": 150}  # items of each role, per task
HELD_OUT = 600  # items per task that the truth is measured on
# items of each split: test holds the claim's and those of the truth
SPLITS = {"train": 300, "validation": 800, "test": SIZES["test"] + HELD_OUT}
FIRST = 10_000  # added to a seed, the seed of its items; the zoo's own items have another
CHECKPOINTS = 6  # at which it is looked up what a run would have returned


def recipe_of(setting: Any, seed: int, full: int, tasks: Path) -> Recipe:
    """`setting` (of benchmarks/search.py) as a recipe that spends `full` item-evaluations, or a little less.

    tasks: folder of the task files.
    """
    options = dict(setting.options)
    bounds = {"weight": (options.pop("low", -0.2), options.pop("high", 1.5))}
    sizes = SIZES if setting.fresh else {**SIZES, "search": setting.items}  # the whole pool, every generation
    # at most: anchors and the winner on their sample, the best anchor on what is drawn, select, test
    sample = min(setting.anchor_items, sizes["search"])
    fixed = len(TASKS) * (5 * sample + (sizes["search"] - sample) + 6 * sizes["select"] + 5 * sizes["test"])
    left = full - (fixed if setting.claim else 0)
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "base_model": "zoo:tiny/base",
            "models": ["zoo:tiny/reverse", "zoo:tiny/sort"],
            "space": {"shape": setting.shape, "bounds": bounds, **options},
            "tasks": [
                {"task": t, "metric": METRICS[t], **{role: {"size": size} for role, size in sizes.items()}}
                for t in TASKS
            ],
            "evaluation": {"include_path": str(tasks), "batch_size": 128},
            "search": {
                "budget": max(4, left // (len(TASKS) * setting.items)),
                "items": setting.items,
                "anchor_items": setting.anchor_items,
                "seed": seed,
                "sigma0": setting.sigma0,
                "popsize": setting.popsize,
                "objective": setting.objective,
                "optimizer": setting.algorithm,
                "item_choice": "disagreement" if setting.weighted else "uniform",
                "racing": "on" if setting.racing else "off",
                "grow_items": setting.more_items,
            },
            "claim": {"resamples": 1000},
        }
    )


class Truth:
    """The items of a seed, and the scores of merges on those that no run is charged for. tasks: folder of its task files."""

    def __init__(self, setting: Any, seed: int) -> None:
        self.tasks = Path(tempfile.mkdtemp(prefix="shoal-tiny-"))
        atexit.register(shutil.rmtree, self.tasks, ignore_errors=True)
        write_tasks(self.tasks, seed=FIRST + seed, splits=SPLITS)
        recipe = recipe_of(setting, 0, 10**6, self.tasks)
        tasks = tuple(
            t.model_copy(update={"test": t.test.model_copy(update={"size": SPLITS["test"]})})
            for t in recipe.tasks
        )
        self.prepared = prepare(recipe.model_copy(update={"tasks": tasks}), Path())
        self._worker = LocalWorker(self.prepared.recipe, self.prepared.lock, "cpu")
        self._known: dict[tuple[str, str], float] = {}

    def held_out(self, prepared: Prepared) -> dict[str, list[int]]:
        """Task -> test items that are not in the run's own test role."""
        return {
            task.task: sorted(
                set(task.roles["test"].items) - set(prepared.lock.task(task.task).roles["test"].items)
            )[:HELD_OUT]
            for task in self.prepared.lock.tasks
        }

    def score(self, plan: MergePlan, role: Role, items: Mapping[str, Sequence[int]]) -> float:
        """Mean over tasks of the metric."""
        key = (plan.digest(), json.dumps([role, {t: list(i) for t, i in items.items()}]))
        if key not in self._known:
            self._worker.submit(
                Job("x", plan, {(t, role): list(i) for t, i in items.items()}, canonical=True)
            )
            outcome = self._worker.poll()
            if isinstance(outcome, Failed):
                raise RuntimeError(outcome.error)
            metric = {task.task: task.metric for task in self.prepared.lock.tasks}
            self._known[key] = float(
                np.mean(
                    [np.mean([s.metrics[metric[t]] for s in outcome.scores if s.task == t]) for t in TASKS]
                )
            )
        return self._known[key]


def run_tiny(setting: Any, seed: int, full: int, truth: Truth) -> dict[str, Any]:
    """One run; the same row as `run_simulated`."""
    recipe = recipe_of(setting, seed, full, truth.tasks)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        result = evolve(recipe, run, device="cpu")
        prepared = restore(recipe, load_lock(run / "lock.yaml"))
        journal = Journal(run / "journal.sqlite")
        try:
            steps = list(_steps(journal, prepared))
            total = sum(row.items for row in journal.evaluations())
            selected = {row.candidate for row in journal.evaluations() if row.role == "select"}
        finally:
            journal.close()
    searched = steps[-1][0] if steps else 0
    outside = truth.held_out(prepared)
    select = {task.task: task.roles["select"].items for task in prepared.lock.tasks}
    baselines = {name: plan for name, (_, plan) in prepared.baselines().items()}
    best_truth = max(truth.score(plan, "test", outside) for plan in baselines.values())
    path = []
    chosen, name = None, ""
    wanted = {round(x) for x in np.geomspace(1, len(steps), CHECKPOINTS)} if steps else set()
    for number, (cost, mean, best) in enumerate(steps, start=1):
        if number not in wanted:
            continue
        finalists = {"best": prepared.space.decode(best)}
        if setting.return_mean:
            finalists = {"mean": prepared.space.decode(mean), **finalists}
        if setting.claim:
            candidates = finalists | {n: plan for n, plan in baselines.items() if n in selected}
            found = {n: truth.score(plan, "select", select) for n, plan in candidates.items()}
            name = max(found, key=lambda n: found[n])
            chosen = candidates[name]
            cost += total - searched
        else:
            name, chosen = "best", finalists["best"]
        path.append((cost, 100 * (truth.score(chosen, "test", outside) - best_truth)))
    assert chosen is not None
    true_score = truth.score(chosen, "test", outside)
    own = {task.task: task.roles["test"].items for task in prepared.lock.tasks}
    pool = {task.task: task.roles["search"].items for task in prepared.lock.tasks}
    reported = truth.score(chosen, "test", own) if setting.claim else truth.score(chosen, "search", pool)
    return {
        "setting": setting.name,
        "seed": seed,
        "problem": 0,
        "gain": path[-1][1],
        "gain_of_mean": 100
        * (truth.score(prepared.space.decode(steps[-1][1]), "test", outside) - best_truth),
        "overstatement": 100 * (reported - true_score),
        "search_overstatement": 100 * (truth.score(chosen, "search", pool) - true_score),
        "returned": name,
        "verdict": result["verdict"],
        "generations": len(steps),
        "item_evaluations": path[-1][0],
        "path": path,
    }


def _steps(journal: Journal, prepared: Prepared) -> Any:
    """After each generation: item-evaluations of the search so far, the optimizer's mean, the best sample."""
    optimizer = new_optimizer(prepared)
    items: dict[str, int] = {}
    for row in journal.evaluations():
        if row.role == "search":
            items[row.candidate] = items.get(row.candidate, 0) + row.items
    cost, best, genome = 0, -np.inf, np.array(prepared.lock.search.x0)
    for number, fitness in journal.tells().items():
        genomes = optimizer.ask()
        asked = [row.genome for row in journal.candidates("search", number)]
        assert asked == [tuple(g) for g in genomes.tolist()], (
            "the journal's ranks are not its fitness (racing?)"
        )
        values = np.array([np.nan if v is None else v for v in fitness.values()])
        optimizer.tell(genomes, values)
        cost += sum(items[name] for name in fitness)
        top = int(np.nanargmax(values))
        if values[top] > best:
            best, genome = float(values[top]), genomes[top]
        yield cost, optimizer.mean, genome
