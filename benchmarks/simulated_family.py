"""The simulated item model as a problem for benchmarks/search.py: a whole run, from anchors to test, in numbers only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from item_model import SIZES, TASKS, Problem, space_of, weights_matrix
from numpy.typing import NDArray
from search_settings import Setting

from shoal.search.agreement import at_length, more_items, spearman
from shoal.search.baselines import common_directions
from shoal.search.growth import grow, level, stalled
from shoal.search.optimizer import Start, make_optimizer
from shoal.search.racing import rung_ends, survivors, told_values
from shoal.search.weighting import Drawn, disagreement, draw_weighted, inclusion

Floats = NDArray[np.float64]

REPEATS = 4  # seeds per simulated problem: other items, another search
BEHIND = 2.33  # standard errors by which a parent is no finalist, see shoal.stages.anchors
WEIGHTS = SCALES = dict.fromkeys(map(str, range(TASKS)), 1.0)


def run_simulated(setting: Setting, seed: int, full: int) -> dict[str, Any]:
    """One run to the full budget; its true gain, reported score, and what it would have returned along the way."""
    problem = Problem(seed // REPEATS, seed, SIZES)
    space = space_of(setting.shape, **dict(setting.options))
    matrix = weights_matrix(space)
    truths = {name: problem.truth(w) for name, w in problem.anchors.items()}
    best_truth = max(truths.values())
    everything = np.array(list(problem.anchors.values()))
    spent, tail = 0, 0
    reference = [np.zeros(SIZES["search"])] * TASKS
    known = [set[int]() for _ in range(TASKS)]  # items on which the best anchor was scored
    sample = [np.arange(SIZES["search"])] * TASKS
    contenders = list(truths)
    weighing: list[dict[int, float] | None] = [None] * TASKS
    if setting.claim:
        anchors = [
            _scores(problem, setting, task, np.arange(SIZES["search"]), everything) for task in range(TASKS)
        ]
        if not setting.weighted:
            first = [_draw(setting.anchor_items, seed, -1, str(t), None) for t in range(TASKS)]
            sample = [np.array(sorted(d.items)) for d in first]
        best = int(
            np.argmax(np.mean([a[:, s].mean(axis=1) for a, s in zip(anchors, sample, strict=True)], axis=0))
        )
        reference = [a[best] for a in anchors]
        known = [set(s.tolist()) for s in sample]
        contenders = _contenders(problem, list(truths), sample)
        if setting.weighted:
            scores = {
                n: {str(t): dict(enumerate(a[k].tolist())) for t, a in enumerate(anchors)}
                for k, n in enumerate(truths)
            }
            weighing = [disagreement(scores, str(task)) for task in range(TASKS)]
        spent = len(truths) * sum(map(len, sample))
        # what a run that stops still has to pay: finalists on select, winner and baselines on test, winner on the sample
        tail = TASKS * ((len(contenders) + 2) * SIZES["select"] + (len(truths) + 1) * SIZES["test"]) + sum(
            map(len, sample)
        )
    selected = dict(zip(truths, _accuracy(problem, "select", everything), strict=True))
    selected = {name: selected[name] for name in contenders}
    optimizer = make_optimizer(
        setting.algorithm,
        Start(
            space.low, space.high, space.x0, seed,
            popsize=setting.popsize, sigma0=setting.sigma0, active=not setting.racing,
            directions=common_directions(space) if setting.algorithm == "grid" else (),
        ),
    )  # fmt: skip
    items, halves = setting.items, list[float]()
    best_sample: tuple[float, Floats] = (-math.inf, matrix @ space.x0)
    generations, levels, coarse = 0, list[float](), True
    path: list[tuple[int, float]] = []
    name, chosen = "", problem.anchors["uniform merge"]
    while spent + tail + optimizer.popsize * TASKS * items <= full:
        number = generations if setting.fresh else 0
        drawn = [_draw(items, seed, number, str(t), weighing[t]) for t in range(TASKS)]
        genomes = optimizer.ask()
        merges = genomes @ matrix.T
        if setting.separate:
            fitness, cost, half = (
                _separate(problem, setting, merges, items, seed, number, reference),
                merges.shape[0] * TASKS * items,
                math.nan,
            )
        else:
            fitness, cost, half = _generation(problem, setting, merges, drawn, reference)
        if setting.claim:
            met = [range(SIZES["search"]) if setting.separate else d.items for d in drawn]
            cost += sum(len(set(items) - seen) for items, seen in zip(met, known, strict=True))
            known = [seen | set(items) for items, seen in zip(met, known, strict=True)]
        spent += cost
        optimizer.tell(genomes, fitness)
        generations += 1
        if setting.more_items:
            halves.append(half)
            grown = more_items(halves, items, SIZES["search"])
            items, halves = grown, halves if grown == items else []
        top = int(np.argmax(fitness))
        if fitness[top] > best_sample[0]:
            best_sample = (float(fitness[top]), merges[top])
        if setting.claim:
            finalists = {"best": best_sample[1]}
            if setting.return_mean:
                finalists = {"mean": matrix @ optimizer.mean, **finalists}
            found = _accuracy(problem, "select", np.array(list(finalists.values())))
            scored = dict(zip(finalists, found, strict=True)) | selected
            name = max(scored, key=lambda n: scored[n])
            chosen = (finalists | problem.anchors)[name]
        else:
            name, chosen = "best", best_sample[1]
        path.append((spent + tail, problem.truth(chosen) - best_truth))
        levels.append(level(fitness.tolist()))
        if setting.grow and coarse and stalled(levels, setting.patience):
            finer, coarse = space_of(**setting.grow), False
            start = grow(space, finer, optimizer.mean, optimizer.covariance)
            optimizer = make_optimizer(
                setting.algorithm,
                Start(finer.low, finer.high, start.x0, seed + 1, covariance=start.covariance),
            )
            space, matrix = finer, weights_matrix(finer)
    truth = problem.truth(chosen)
    tested = _accuracy(problem, "test", chosen[None])[0]
    searched = float(
        np.mean([problem.answers("search", t, s, chosen[None])[0].mean() for t, s in enumerate(sample)])
    )
    return {
        "setting": setting.name,
        "seed": seed,
        "problem": seed // REPEATS,
        "gain": 100 * (truth - best_truth),
        "gain_of_mean": 100 * (problem.truth(matrix @ optimizer.mean) - best_truth),
        "overstatement": 100 * ((tested if setting.claim else best_sample[0]) - truth),
        "search_overstatement": 100 * ((searched if setting.claim else best_sample[0]) - truth),
        "returned": name,
        "generations": generations,
        "item_evaluations": spent + tail,
        "path": [(cost, round(100 * gain, 4)) for cost, gain in path],
    }


def _scores(problem: Problem, setting: Setting, task: int, items: Any, merges: Floats) -> Floats:
    right, smooth = problem.answers("search", task, np.asarray(items, dtype=np.intp), merges)
    return smooth if setting.objective == "smooth" else right


def _contenders(problem: Problem, names: Sequence[str], sample: Sequence[NDArray[np.intp]]) -> list[str]:
    """Anchors that are finalists: uniform merge, best parent, and parents that are not surely behind it."""
    everything = np.array([problem.anchors[name] for name in names])
    right = [problem.answers("search", t, items, everything)[0] for t, items in enumerate(sample)]
    parents = [i for i, name in enumerate(names) if name != "uniform merge"]
    best = max(parents, key=lambda i: float(np.mean([r[i].mean() for r in right])))
    kept = []
    for i, name in enumerate(names):
        leads = [r[best] - r[i] for r in right]
        error = math.sqrt(sum(d.var(ddof=1) / len(d) for d in leads)) / len(leads)
        if i not in parents or float(np.mean([d.mean() for d in leads])) <= BEHIND * error:
            kept.append(name)
    return kept


def _accuracy(problem: Problem, role: str, merges: Floats) -> list[float]:
    """Mean over tasks on all items of a role; the caller counts the cost."""
    found = [problem.answers(role, t, np.arange(SIZES[role]), merges)[0].mean(axis=1) for t in range(TASKS)]
    return [float(x) for x in np.mean(found, axis=0)]


@lru_cache(maxsize=20_000)
def _uniform_draw(items: int, seed: int, number: int, task: str) -> Drawn:
    return draw_weighted(inclusion(range(SIZES["search"]), items, None), seed, number, task)


def _draw(items: int, seed: int, number: int, task: str, weighing: Mapping[int, float] | None) -> Drawn:
    if weighing is None:
        return _uniform_draw(items, seed, number, task)
    return draw_weighted(inclusion(range(SIZES["search"]), items, weighing), seed, number, task)


def _separate(
    problem: Problem,
    setting: Setting,
    merges: Floats,
    items: int,
    seed: int,
    number: int,
    reference: Sequence[Floats],
) -> Floats:
    """Fitness where every candidate meets items of its own; still a paired difference to the best anchor."""
    rng = np.random.default_rng([seed, number])
    fitness = []
    for merge in merges:
        parts = []
        for task in range(TASKS):
            own = rng.choice(SIZES["search"], items, replace=False)
            parts.append((_scores(problem, setting, task, own, merge[None])[0] - reference[task][own]).mean())
        fitness.append(float(np.mean(parts)))
    return np.array(fitness)


def _generation(
    problem: Problem, setting: Setting, merges: Floats, drawn: Sequence[Drawn], reference: Sequence[Floats]
) -> tuple[Floats, int, float]:
    """Fitness of a generation, its cost, and how well two halves of its (first rung's) items rank it."""
    n = len(drawn[0].items)
    gains = [
        _scores(problem, setting, t, d.items, merges) - reference[t][list(d.items)]
        for t, d in enumerate(drawn)
    ]

    def estimate(rows: Sequence[int], end: int) -> Floats:
        parts = [gains[t][rows, :end] @ list(d.weights(end).values()) for t, d in enumerate(drawn)]
        return np.asarray(np.mean(parts, axis=0))

    everyone = range(len(merges))
    if not setting.racing:
        half = math.nan
        if setting.more_items:
            half = at_length(
                spearman(
                    *(np.mean([g[:, k::2].mean(axis=1) for g in gains], axis=0).tolist() for k in (0, 1))
                ),
                2,
            )
        return estimate(everyone, n), len(merges) * TASKS * n, half
    alive, tiers, cost, start = list(everyone), list[dict[str, float]](), 0, 0
    for end in rung_ends(n):
        cost += len(alive) * TASKS * (end - start)
        found = dict(zip(alive, estimate(alive, end).tolist(), strict=True))
        kept = sorted(alive, key=lambda i: (-found[i], i))
        if end < n:
            scores = {
                str(i): {
                    str(t): dict(zip(d.items[:end], gains[t][i].tolist(), strict=False))
                    for t, d in enumerate(drawn)
                }
                for i in alive
            }
            counts = {str(t): d.weights(end) for t, d in enumerate(drawn)}
            kept = [
                int(i)
                for i in survivors(scores, [str(i) for i in kept], len(merges) // 2, WEIGHTS, SCALES, counts)
            ]
        tiers.insert(0, {str(i): found[i] for i in alive if end == n or i not in kept})
        alive, start = kept, end
    told = told_values(tiers)
    return np.array([told[str(i)] for i in everyone]), cost, math.nan
