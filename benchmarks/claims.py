"""Do the claims hold what they say? Coverage of the intervals, false claims, and power, simulated with known truth.

Run: python benchmarks/claims.py --json claims.json [--quick]
Every interval and verdict is made by `shoal.search`; only the resampling of clustered and continuous data shares its
multiplicities among the runs of a batch, so that a bootstrap is one matrix product.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.search.bootstrap import Resampled, planned, resample, with_draws
from shoal.search.claims import Contrast, guard, verdict
from shoal.search.power import detectable_difference, effective_items
from shoal.search.simultaneous import simultaneous
from shoal.search.strata import Stratum, mean_stratum, multiplicities, ratios

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, NDArray[np.int64], int], Floats]

RUNS, QUICK_RUNS, RESAMPLES, BATCH = 6000, 2000, 4000, 50
ITEMS = (200, 500, 2000)
TARGET = (0.94, 0.96)


@dataclass(frozen=True)
class Task:
    """Differences of one task: share of the n items, weight, cluster sizes (1: none), and the law of an item.

    draw: (generator, cluster sizes [C], B) -> differences [items, B], items in cluster order.
    """

    draw: Draw
    binary: bool
    share: float = 1.0
    weight: float = 1.0
    sizes: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Scenario:
    name: str
    truth: float
    tasks: tuple[Task, ...]


def binary(win: float, lose: float, same: float = 0.0) -> Draw:
    """Paired 0/1 differences; `same`: the chance that an item does as its whole cluster does."""

    def draw(generator: np.random.Generator, sizes: NDArray[np.int64], batch: int) -> Floats:
        u = generator.random((int(sizes.sum()), batch))
        if same:
            shared = np.repeat(generator.random((len(sizes), batch)), sizes, axis=0)
            u = np.where(generator.random(u.shape) < same, shared, u)
        return (u < win) * 1.0 - ((u >= win) & (u < win + lose))

    return draw


def exponential(mean: float) -> Draw:
    """Skewness 2."""
    return lambda generator, sizes, batch: generator.exponential(size=(int(sizes.sum()), batch)) - 1 + mean


def log_normal(mean: float) -> Draw:
    """Skewness 6.2: a per-item loss with a long tail."""
    shift = mean - math.exp(0.5)
    return lambda generator, sizes, batch: generator.lognormal(size=(int(sizes.sum()), batch)) + shift


COVERAGE = (
    Scenario("0/1, 10% discordant, no difference", 0.0, (Task(binary(0.05, 0.05), True),)),
    Scenario("0/1, 20% discordant, no difference", 0.0, (Task(binary(0.10, 0.10), True),)),
    Scenario("0/1, 20% discordant, 5 points", 0.05, (Task(binary(0.125, 0.075), True),)),
    Scenario("0/1, 10% discordant, 6 points", 0.06, (Task(binary(0.08, 0.02), True),)),
    Scenario(
        "two 0/1 tasks, weights 1 and 3",
        (0.05 + 3 * 0.02) / 4,
        (Task(binary(0.125, 0.075), True, 0.6), Task(binary(0.08, 0.06), True, 0.4, 3.0)),
    ),
    Scenario(
        "0/1 and skewed task, weights 3 and 1",
        (3 * 0.05 + 0.2) / 4,
        (Task(binary(0.125, 0.075), True, 0.5, 3.0), Task(exponential(0.2), False, 0.5)),
    ),
    Scenario("0/1 in clusters of 2 to 8", 0.05, (Task(binary(0.125, 0.075, 0.5), True, sizes=(2, 8)),)),
    Scenario("continuous, exponential (skewness 2)", 0.1, (Task(exponential(0.1), False),)),
    Scenario("continuous, log-normal (skewness 6)", 0.1, (Task(log_normal(0.1), False),)),
)

NULLS = (
    Scenario("one 0/1 task", 0.0, (Task(binary(0.10, 0.10), True),)),
    Scenario("one 0/1 task, few discordant", 0.0, (Task(binary(0.03, 0.03), True),)),
    Scenario(
        "two 0/1 tasks, weights 1 and 3",
        0.0,
        (Task(binary(0.12, 0.08), True, 0.6), Task(binary(0.06, 0.02 * 2 / 3 + 0.06), True, 0.4, 3.0)),
    ),
    Scenario("0/1 in clusters of 2 to 8", 0.0, (Task(binary(0.1, 0.1, 0.5), True, sizes=(2, 8)),)),
    Scenario("continuous, winner's gains skewed", 0.0, (Task(exponential(0.0), False),)),
    Scenario(
        "continuous, winner's losses skewed",
        0.0,
        (Task(lambda g, s, b: -exponential(0.0)(g, s, b), False),),
    ),
)


def contrasts(scenario: Scenario, n: int, runs: int, seed: int) -> Iterator[Contrast]:
    """Simulated comparisons with about n test items."""
    generator = np.random.default_rng(seed)
    total = sum(task.weight for task in scenario.tasks)
    weights = tuple(task.weight / total for task in scenario.tasks)
    for start in range(0, runs, BATCH):
        batch = min(BATCH, runs - start)
        strata: list[list[Stratum]] = [[] for _ in range(batch)]
        shared: list[tuple[Floats, Floats] | None] = []
        for task in scenario.tasks:
            sizes = cluster_sizes(generator, round(task.share * n), task.sizes)
            differences = task.draw(generator, sizes, batch)
            starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
            members = np.split(np.arange(int(sizes.sum())), starts[1:])
            for j in range(batch):
                strata[j].append(mean_stratum(differences[:, j], members, task.binary))
            if task.binary and sizes.max() == 1:
                shared.append(None)  # three kinds of items: quick as it is
            else:
                counts = multiplicities(generator, RESAMPLES, len(sizes))
                shared.append(ratios(counts, np.add.reduceat(differences, starts, axis=0), sizes * 1.0))
        for j in range(batch):
            one = bootstrapped(strata[j], weights, shared, j, start + j)
            items = sum(s.clusters for s in strata[j])
            yield Contrast("baseline", None, items, scenario.tasks[0].binary, tuple(strata[j]), weights, one)


def bootstrapped(
    strata: list[Stratum],
    weights: tuple[float, ...],
    shared: list[tuple[Floats, Floats] | None],
    j: int,
    seed: int,
) -> Resampled:
    plan = planned(strata, weights, seed)
    if plan.few or all(found is None for found in shared):
        return resample(strata, weights, RESAMPLES, seed)
    draws, variances = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for index, (stratum, weight, found) in enumerate(zip(strata, weights, shared, strict=True)):
        if found is None:
            values, spread = stratum.resample(np.random.default_rng([seed, index]), RESAMPLES)
        else:
            values, spread = found[0][:, j], found[1][:, j]
        draws += weight * values
        variances += weight**2 * spread
    return with_draws(plan, draws, variances)


def cluster_sizes(generator: np.random.Generator, items: int, sizes: tuple[int, int]) -> NDArray[np.int64]:
    low, high = sizes
    if high == 1:
        return np.ones(items, dtype=np.int64)
    return generator.integers(low, high + 1, size=round(2 * items / (low + high)))


def coverage(scenario: Scenario, n: int, runs: int, seed: int) -> dict[str, Any]:
    below = above = 0
    methods: dict[str, int] = {}
    for one in contrasts(scenario, n, runs, seed):
        found = one.interval(0.95)
        above += found.low > scenario.truth + 1e-12
        below += found.high < scenario.truth - 1e-12
        methods[found.method] = methods.get(found.method, 0) + 1
    share = 1 - (below + above) / runs
    spread = math.sqrt(share * (1 - share) / runs)
    return {
        "scenario": scenario.name,
        "n": n,
        "runs": runs,
        "coverage": share,
        "error": spread,
        "too_high": above / runs,
        "too_low": below / runs,
        "methods": methods,
        "met": TARGET[0] <= share <= TARGET[1],
        # a share simulated in so many runs differs from the true one
        "compatible": TARGET[0] - 2 * spread <= share <= TARGET[1] + 2 * spread,
    }


def false_beats(scenario: Scenario, n: int, runs: int, seed: int) -> dict[str, Any]:
    """The least favourable null: the winner equals one baseline and is 20 standard errors above two others."""
    beats = worse = 0
    for one in contrasts(scenario, n, runs, seed):
        equal = one.comparison()
        far = [_shifted(one, 20 * one.resampled.error).comparison() for _ in range(2)]
        found = verdict(False, [far[0], equal, far[1]])
        beats += found == "beats"
        worse += found == "worse"
    limit = 0.025 + 2 * math.sqrt(0.025 * 0.975 / runs)
    return {
        "scenario": scenario.name,
        "n": n,
        "runs": runs,
        "beats": beats / runs,
        "worse": worse / runs,
        "limit": limit,
        "met": beats / runs <= limit,
    }


def _shifted(one: Contrast, by: float) -> Contrast:
    draws = one.resampled
    moved = replace(draws, point=draws.point + by, draws=draws.draws + by, swaps=None)
    return replace(one, against="another", resampled=moved)


def together(n: int, runs: int, seed: int) -> dict[str, Any]:
    """Three tasks with two baselines each: do all simultaneous intervals hold, is no false "better" among them?"""
    tasks = {"none": (0.1, 0.1), "small": (0.11, 0.09), "large": (0.16, 0.06)}
    streams = {
        (name, k): contrasts(
            Scenario(name, win - lose, (Task(binary(win, lose), True),)), n, runs, seed + 17 * i + 1009 * k
        )
        for i, (name, (win, lose)) in enumerate(tasks.items())
        for k in range(2)
    }
    held = false = 0
    for _ in range(runs):
        found = simultaneous({name: [next(streams[name, k]) for k in range(2)] for name in tasks})
        truths = {name: win - lose for name, (win, lose) in tasks.items()}
        held += all(found[t].low <= truths[t] + 1e-12 and truths[t] <= found[t].high + 1e-12 for t in tasks)
        false += found["none"].better
    return {"n": n, "runs": runs, "coverage": held / runs, "false_better": false / runs}


def guards(n: int, runs: int, seed: int) -> dict[str, Any]:
    """A true drop of exactly max_drop to one parent: how often the guard is said to hold (at most 5%)."""
    drop = 0.03
    scenario = Scenario("guard", -drop, (Task(binary(0.085, 0.115), True),))
    held = sum(guard([one], drop).holds for one in contrasts(scenario, n, runs, seed))
    limit = 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)
    return {"n": n, "runs": runs, "false_holds": held / runs, "limit": limit, "met": held / runs <= limit}


def power(n: int, runs: int, seed: int) -> list[dict[str, Any]]:
    """At the difference that is said to be shown with 80% power, how often is it shown?"""
    rows = []
    correlation = 0.5**2  # two items that each follow their cluster half of the time
    for name, weights, shares, sizes in (
        ("one task", (1.0,), (1.0,), (1, 1)),
        ("two tasks, weights 1 and 3", (1.0, 3.0), (0.6, 0.4), (1, 1)),
        ("clusters of 5", (1.0,), (1.0,), (5, 5)),
    ):
        size = sizes[0]
        lists = [[size] * (round(share * n) // size) for share in shares]
        gain = detectable_difference(effective_items(weights, lists, correlation))
        law = Task(binary(0.1 + gain / 2, 0.1 - gain / 2, 0.5 if size > 1 else 0.0), True)
        tasks = tuple(
            Task(law.draw, True, share, weight, sizes) for share, weight in zip(shares, weights, strict=True)
        )
        shown = sum(
            one.interval(0.95).low > 0 for one in contrasts(Scenario(name, gain, tasks), n, runs, seed)
        )
        rows.append(
            {"scenario": name, "n": n, "runs": runs, "difference": gain, "shown": shown / runs, "said": 0.8}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_RUNS} instead of {RUNS} runs each")
    parser.add_argument("--seed", type=int, default=2026)
    options = parser.parse_args()
    runs, seed, started = QUICK_RUNS if options.quick else RUNS, options.seed, time.perf_counter()
    found: dict[str, Any] = {"runs": runs, "resamples": RESAMPLES, "seed": seed, "target": TARGET}
    found["coverage"] = []
    for scenario in COVERAGE:
        for n in ITEMS:
            row = coverage(scenario, n, runs, seed)
            found["coverage"].append(row)
            print(
                f"coverage {row['coverage']:.4f} (missed {row['too_high']:.4f} above, {row['too_low']:.4f} below)"
                f" n={n} {scenario.name} {row['methods']}{'' if row['met'] else '  (within two errors)' if row['compatible'] else '  MISSED'}",
                flush=True,
            )
    found["false_beats"] = []
    for scenario in NULLS:
        for n in ITEMS:
            row = false_beats(scenario, n, runs, seed + 1)
            found["false_beats"].append(row)
            print(
                f"false beats {row['beats']:.4f} (at most {row['limit']:.4f}), worse {row['worse']:.4f} n={n} {scenario.name}"
                f"{'' if row['met'] else '  MISSED'}",
                flush=True,
            )
    found["simultaneous"] = [together(n, QUICK_RUNS, seed + 2) for n in ITEMS]
    found["guards"] = [guards(n, runs, seed + 3) for n in ITEMS]
    found["power"] = [row for n in ITEMS for row in power(n, QUICK_RUNS, seed + 4)]
    for key in ("simultaneous", "guards", "power"):
        for row in found[key]:
            print(key, row, flush=True)
    found["seconds"] = time.perf_counter() - started
    options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{found['seconds']:.0f} s")


if __name__ == "__main__":
    main()
