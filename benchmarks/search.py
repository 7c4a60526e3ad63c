"""Which search finds more for the same number of item-evaluations, and whether what it reports is true.

    python benchmarks/search.py --json FILE [--quick] [--family simulated|tiny] [--seeds N] [--first-seed S]

Family `simulated` is the item model of item_model.py, family `tiny` real merges of the tiny zoo through `shoal evolve`.
Compared at equal item-evaluations, with the same seeds (a seed is a new problem): ours; ours with each ingredient off;
random search; a grid over one common weight per parent; and mergekit-evolve's settings by configuration. Those are, from
mergekit 0.1.5: one weight per parent and block of layers, from 1/(number of parents), CMA-ES with sigma0 = 1/6 in units
of the weight and cma's default popsize, the first items of each task (`limit`), accuracy, and the best sample ever seen
is kept. (Weights fold at 0 there and are bounded here; two rules for the same half-space.)

Costs count everything that was scored: anchors, racing, finalists on select, winner and baselines on test. The
settings of mergekit-evolve have no anchors, no select and no test, and pay for none.

`gain` is true: the exact expected score of the returned merge less that of the best parent or uniform merge, in points.
`overstatement` is reported score less true score; reported is what each method reports: the test score of ours, random and
grid, the search score of mergekit-evolve's. `cost to target`: item-evaluations until the merge that would be returned
if the run stopped there (its select and test included) has the target gain for the first time; the target is the median
true gain of mergekit-evolve's settings at full budget, and a seed that never gets there counts as the full budget.

Settings were chosen on seeds from 1000 on (simulated) and 100 on (tiny). Reported are seeds from 0 on.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from item_model import TASKS, Problem, space_of, weights_matrix
from numpy.typing import NDArray

from shoal.search.agreement import at_length, more_items, spearman
from shoal.search.baselines import common_directions
from shoal.search.fitness import Scores, best_anchor, paired_fitness, unit_scales
from shoal.search.optimizer import Optimizer, Start, make_optimizer
from shoal.search.racing import rung_ends, survivors, told_values
from shoal.search.weighting import Drawn, disagreement, draw_weighted, inclusion

Floats = NDArray[np.float64]

FULL = (
    100_000  # item-evaluations: 500 candidates of mergekit-evolve's settings, 100 items on each of two tasks
)
SIZES = {"search": 300, "select": 150, "test": 300}  # items of each role, per task
NAMES = [str(task) for task in range(TASKS)]
WEIGHTS = dict.fromkeys(NAMES, 1.0)


@dataclass(frozen=True)
class Setting:
    """One way to search. items: per task and candidate. fresh: a new common subset each generation; else the first
    items for ever; separate: a subset of its own for each candidate. claim: anchors, select and test are scored (and
    paid for); else the best sample seen is returned with its search score.
    """

    name: str
    shape: str = "curve"
    options: Mapping[str, Any] = ()  # type: ignore[assignment]
    algorithm: str = "cma-es"
    sigma0: float | None = None
    popsize: int | None = None
    objective: str = "smooth"
    items: int = 32
    fresh: bool = True
    separate: bool = False
    weighted: bool = False
    racing: bool = False
    more_items: bool = False
    return_mean: bool = True
    claim: bool = True


OURS = Setting("ours", options={"coefficients": 3})
MERGEKIT = Setting(
    "mergekit-evolve's settings",
    shape="blocks",
    options={"blocks": 4, "low": 0.0, "high": 2.0},
    sigma0=(1 / 6) / 2.0,
    objective="metric",
    items=100,
    fresh=False,
    return_mean=False,
    claim=False,
)


def settings() -> list[Setting]:
    """Ours, its ablations, the baselines and mergekit-evolve's settings."""
    return [
        OURS,
        replace(OURS, name="ours, accuracy as objective", objective="metric"),
        replace(OURS, name="ours, accuracy on 100 items", objective="metric", items=100),
        replace(OURS, name="ours, first items for ever", fresh=False),
        replace(OURS, name="ours, separate items per candidate", separate=True),
        replace(OURS, name="ours, items where anchors disagree", weighted=True),
        replace(OURS, name="ours, racing", racing=True),
        replace(OURS, name="ours, growing number of items", more_items=True),
        replace(OURS, name="ours, best sample instead of mean", return_mean=False),
        replace(OURS, name="ours, sigma0 = 1/3", sigma0=1 / 3),
        replace(OURS, name="ours, separable CMA-ES", algorithm="sep-cma-es"),
        replace(OURS, name="ours, blocks", shape="blocks", options={"blocks": 4}),
        replace(OURS, name="ours, uniform", shape="uniform", options={}),
        replace(OURS, name="ours, layers", shape="layers", options={}),
        replace(OURS, name="random search", algorithm="random"),
        replace(OURS, name="uniform-weight grid", algorithm="grid"),
        MERGEKIT,
    ]


@dataclass
class _Meter:
    """Scores of the simulated merges, and how many item-evaluations they cost."""

    problem: Problem
    objective: str
    spent: int = 0

    def score(self, role: str, weights: Floats, items: Mapping[str, Sequence[int]]) -> Scores:
        found = {}
        for task, ids in items.items():
            right, smooth = self.problem.answers(role, int(task), np.array(ids, dtype=np.intp), weights)
            self.spent += len(ids)
            found[task] = dict(
                zip(ids, (smooth if self.objective == "smooth" else right).tolist(), strict=True)
            )
        return found

    def accuracy(self, role: str, weights: Floats) -> float:
        """Mean over tasks on all items of a role; the caller counts the cost."""
        sizes = [self.problem.pools[role, t].size for t in range(TASKS)]
        return float(
            np.mean(
                [self.problem.answers(role, t, np.arange(n), weights)[0].mean() for t, n in enumerate(sizes)]
            )
        )


def run_simulated(setting: Setting, seed: int, full: int) -> dict[str, Any]:
    """One run to the full budget; its true gain, reported score, and what it would have returned along the way."""
    problem = Problem(seed, SIZES)
    space = space_of(setting.shape, **dict(setting.options))
    matrix = weights_matrix(space)
    meter = _Meter(problem, setting.objective)
    pools = {task: range(SIZES["search"]) for task in NAMES}
    truths = {name: problem.truth(w) for name, w in problem.anchors.items()}
    best_truth = max(truths.values())
    select = {name: meter.accuracy("select", w) for name, w in problem.anchors.items()}
    contenders = len(problem.anchors)
    tail = 0  # what a run that stops now still has to pay: finalists on select, then winner and baselines on test
    anchors: dict[str, Scores] = {}
    if setting.claim:
        anchors = {name: meter.score("search", w, pools) for name, w in problem.anchors.items()}
        tail = TASKS * ((contenders + 2) * SIZES["select"] + (contenders + 1) * SIZES["test"])
    scales = unit_scales(anchors or {"": dict.fromkeys(NAMES)})  # type: ignore[dict-item]
    anchor = anchors[best_anchor(anchors, WEIGHTS, scales)] if anchors else _zero(pools)
    optimizer = make_optimizer(
        setting.algorithm,
        Start(
            space.low, space.high, space.x0, seed,
            popsize=setting.popsize, sigma0=setting.sigma0, active=not setting.racing,
            directions=common_directions(space) if setting.algorithm == "grid" else (),
        ),
    )  # fmt: skip
    weighing = {t: disagreement(anchors, t) if setting.weighted else None for t in NAMES}
    items, halves = setting.items, list[float]()
    best: tuple[float, Floats] = (-math.inf, space.x0)
    path: list[tuple[int, float]] = []
    name, chosen = "", problem.anchors["uniform merge"]
    while True:
        genomes = optimizer.ask()
        drawn = {
            t: draw_weighted(
                inclusion(pools[t], items, weighing[t]), seed, optimizer.generation if setting.fresh else 0, t
            )
            for t in NAMES
        }
        if meter.spent + tail + optimizer.popsize * TASKS * items > full:
            break
        fitness, half = _generation(setting, meter, matrix, genomes, drawn, anchor, scales, optimizer)
        optimizer.tell(genomes, fitness)
        if setting.more_items:
            halves.append(half)
            grown = more_items(halves, items, SIZES["search"])
            items, halves = grown, halves if grown == items else []
        top = int(np.argmax(fitness))
        if fitness[top] > best[0]:
            best = (float(fitness[top]), genomes[top])
        if setting.claim:
            finalists = {"best": matrix @ best[1]}
            if setting.return_mean:
                finalists = {"mean": matrix @ optimizer.mean, **finalists}
            scored = {n: meter.accuracy("select", w) for n, w in finalists.items()} | select
            name = max(scored, key=lambda n: scored[n])
            chosen = (finalists | problem.anchors)[name]
        else:
            name, chosen = "best", matrix @ best[1]
        path.append((meter.spent + tail, problem.truth(chosen) - best_truth))
    reported = meter.accuracy("test", chosen) if setting.claim else best[0]
    truth = problem.truth(chosen)
    return {
        "setting": setting.name,
        "seed": seed,
        "gain": 100 * (truth - best_truth),
        "gain_of_mean": 100 * (problem.truth(matrix @ optimizer.mean) - best_truth),
        "overstatement": 100 * (reported - truth),
        "search_overstatement": 100 * (meter.accuracy("search", chosen) - truth),
        "returned": name,
        "generations": optimizer.generation,
        "item_evaluations": meter.spent + tail,
        "path": [(cost, 100 * gain) for cost, gain in path],
    }


def _zero(pools: Mapping[str, Sequence[int]]) -> Scores:
    return {task: dict.fromkeys(pool, 0.0) for task, pool in pools.items()}


def _generation(
    setting: Setting,
    meter: _Meter,
    matrix: Floats,
    genomes: Floats,
    drawn: Mapping[str, Drawn],
    anchor: Scores,
    scales: Mapping[str, float],
    optimizer: Optimizer,
) -> tuple[Floats, float]:
    """Fitness of a generation, and how well two halves of its (first rung's) items rank it."""
    weights = {str(i): matrix @ genome for i, genome in enumerate(genomes)}
    n = len(drawn[NAMES[0]].items)
    ends = rung_ends(n) if setting.racing else (n,)
    scores: dict[str, dict[str, dict[int, float]]] = {c: {t: {} for t in NAMES} for c in weights}
    alive, tiers, start, half = list(weights), list[dict[str, float]](), 0, math.nan
    for end in ends:
        for candidate in alive:
            if setting.separate:
                generation = optimizer.generation * 1000 + int(candidate)
                own = {
                    t: draw_weighted(
                        dict.fromkeys(range(SIZES["search"]), n / SIZES["search"]), 1, generation, t
                    )
                    for t in NAMES
                }
                found = meter.score("search", weights[candidate], {t: own[t].items for t in NAMES})
            else:
                found = meter.score(
                    "search", weights[candidate], {t: drawn[t].items[start:end] for t in NAMES}
                )
            for task in NAMES:
                scores[candidate][task].update(found[task])
        counts = None if setting.separate else {t: drawn[t].weights(end) for t in NAMES}
        estimate = {c: paired_fitness(scores[c], anchor, WEIGHTS, scales, counts) for c in alive}
        if start == 0 and setting.more_items:
            half = at_length(_halves(scores, drawn, end, anchor, scales), 2 * n / end)
        ranked = sorted(alive, key=lambda c: (-estimate[c], int(c)))
        kept = ranked
        if end < n and counts is not None:
            kept = survivors(scores, ranked, max(1, optimizer.popsize // 2), WEIGHTS, scales, counts)
        dropped = [c for c in ranked if c not in kept]
        if end == n:
            tiers.insert(0, estimate)
        elif dropped:
            tiers.insert(0, {c: estimate[c] for c in dropped})
        alive, start = kept, end
    told = told_values(tiers)
    return np.array([told[c] for c in weights]), half


def _halves(
    scores: Mapping[str, Scores],
    drawn: Mapping[str, Drawn],
    end: int,
    anchor: Scores,
    scales: Mapping[str, float],
) -> float:
    ranks = []
    for first in (0, 1):
        part = {t: drawn[t].items[first:end:2] for t in NAMES}
        ranks.append(
            [
                paired_fitness({t: {i: s[t][i] for i in part[t]} for t in NAMES}, anchor, WEIGHTS, scales)
                for s in scores.values()
            ]
        )
    return spearman(*ranks)
