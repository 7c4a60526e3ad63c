"""Do the claims hold what they say? Coverage of the intervals, false claims, and power, simulated with known truth.

Run: python benchmarks/claims.py --json claims.json [--only SECTION ...] [--quick] [--plot coverage.png]
Every interval and verdict is made by `shoal.search`; only the resampling shares its multiplicities among the runs of a
batch, so that a bootstrap is one matrix product. The JSON file is written after every row.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.search.bootstrap import Resampled, planned, resample, with_draws
from shoal.search.claims import Comparison, Contrast, guard, verdict
from shoal.search.power import detectable_difference, effective_items
from shoal.search.simultaneous import simultaneous
from shoal.search.strata import Stratum, multiplicities, ratios, summed_stratum

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, NDArray[np.int64], int], Floats]

RUNS = {200: 6000, 500: 4000, 2000: 2000}  # by items: fewer where each takes longer
ITEMS, QUICK_RUNS, RESAMPLES, BATCH = tuple(RUNS), 2000, 4000, 250
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


def symmetric(mean: float) -> Draw:
    """Student's t with 5 degrees of freedom: kurtosis 9."""
    return lambda generator, sizes, batch: generator.standard_t(5, size=(int(sizes.sum()), batch)) + mean


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
    Scenario(
        "three 0/1 tasks, weights 1, 2 and 4",
        (0.05 + 4 * 0.04) / 7,
        (
            Task(binary(0.15, 0.10), True, 0.4),
            Task(binary(0.05, 0.05), True, 0.3, 2.0),
            Task(binary(0.08, 0.04), True, 0.3, 4.0),
        ),
    ),
    Scenario("0/1 in clusters of 2 to 8", 0.05, (Task(binary(0.125, 0.075, 0.5), True, sizes=(2, 8)),)),
    Scenario("0/1 in clusters of 1 to 20", 0.05, (Task(binary(0.125, 0.075, 0.3), True, sizes=(1, 20)),)),
    Scenario("continuous, symmetric (t, 5 df)", 0.1, (Task(symmetric(0.1), False),)),
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
    Scenario(
        "continuous, winner's losses log-normal",
        0.0,
        (Task(lambda g, s, b: -log_normal(0.0)(g, s, b), False),),
    ),
)


def contrasts(scenario: Scenario, n: int, runs: int, seed: int, *, drawn: bool = False) -> Iterator[Contrast]:
    """Simulated comparisons with about n test items. drawn: with draws even where no interval of ours needs them."""
    generator = np.random.default_rng([seed, n])
    total = sum(task.weight for task in scenario.tasks)
    weights = tuple(task.weight / total for task in scenario.tasks)
    for start in range(0, runs, BATCH):
        batch = min(BATCH, runs - start)
        strata: list[list[Stratum]] = [[] for _ in range(batch)]
        shared: list[SharedDraws] = []
        for index, task in enumerate(scenario.tasks):
            sizes = cluster_sizes(generator, round(task.share * n), task.sizes)
            differences = task.draw(generator, sizes, batch)
            starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
            sums = np.add.reduceat(differences, starts, axis=0)
            for j in range(batch):
                strata[j].append(summed_stratum(np.ascontiguousarray(sums[:, j]), sizes * 1.0, task.binary))
            shared.append(SharedDraws([seed, n, start, index], sums, sizes))
        for j in range(batch):
            one = bootstrapped(strata[j], weights, shared, j, start + j, drawn)
            items = sum(s.clusters for s in strata[j])
            yield Contrast("baseline", None, items, scenario.tasks[0].binary, tuple(strata[j]), weights, one)


class SharedDraws:
    """Resampled means of all runs of a batch, [R, B], made when first asked for."""

    def __init__(self, seed: list[int], sums: Floats, sizes: NDArray[np.int64]) -> None:
        self.seed, self.sums, self.sizes = seed, sums, sizes
        self.means: Floats | None = None

    def of(self, run: int) -> Floats:
        if self.means is None:
            counts = multiplicities(np.random.default_rng(self.seed), RESAMPLES, len(self.sizes))
            self.means = ratios(counts, self.sums, self.sizes * 1.0)
        return self.means[:, run]


def bootstrapped(
    strata: list[Stratum],
    weights: tuple[float, ...],
    shared: list[SharedDraws],
    j: int,
    seed: int,
    drawn: bool,
) -> Resampled:
    plan = planned(strata, weights, seed)
    if plan.few or plan.method == "constant":
        return resample(strata, weights, RESAMPLES, seed)
    if plan.method == "t" and not drawn:
        return plan
    draws = np.zeros(RESAMPLES)
    for weight, found in zip(weights, shared, strict=True):
        draws += weight * found.of(j)
    return with_draws(plan, draws)


KINDS = np.array(list(product((0, 1), repeat=3)))  # label, winner's and other's answer


def f1(counts: Floats, model: int) -> Floats:
    """F1 of the winner (model 1) or the other (2). counts: [..., 8] of KINDS."""
    label, answer = KINDS[:, 0], KINDS[:, model]
    right, wrong = counts @ (label * answer * 1.0), counts @ ((label != answer) * 1.0)
    return 2 * right / np.maximum(2 * right + wrong, 1e-9)


def f1_contrasts(n: int, runs: int, seed: int) -> tuple[float, Iterator[Contrast]]:
    """The true difference of a metric that is no mean over items, and simulated comparisons: 30% positives."""
    law = np.array(
        [
            (0.3 if y else 0.7)
            * (0.8 if a == y else 0.2)
            * (0.6 * (b == a) + 0.4 * (0.72 if b == y else 0.28))
            for y, a, b in KINDS
        ]
    )
    return float(f1(law * 1e6, 1) - f1(law * 1e6, 2)), _f1_contrasts(law, n, runs, seed)


def _f1_contrasts(law: Floats, n: int, runs: int, seed: int) -> Iterator[Contrast]:
    generator = np.random.default_rng([seed, n])
    traded = np.eye(8)[[int(np.flatnonzero((KINDS == [y, b, a]).all(axis=1))[0]) for y, a, b in KINDS]]

    def difference(counts: Floats) -> Floats:
        return f1(counts, 1) - f1(counts, 2)

    for run in range(runs):
        counts = generator.multinomial(n, law).astype(np.float64)
        point = float(difference(counts))
        left_out = np.repeat(difference(np.maximum(counts - np.eye(8), 0)), counts.astype(np.int64))
        halved = (point - difference(np.maximum(counts - np.eye(8) + traded, 0))) / 2

        def again(drawer: np.random.Generator, number: int, shares: Floats = counts / n) -> Floats:
            return difference(drawer.multinomial(n, shares, size=number).astype(np.float64))

        stratum = Stratum(
            clusters=n,
            point=point,
            influence=(n - 1) * (left_out.mean() - left_out),
            swaps=np.repeat(np.where(KINDS[:, 1] == KINDS[:, 2], 0.0, halved), counts.astype(np.int64)),
            most=math.inf,
            linear=False,
            resample=again,
        )
        one = resample([stratum], [1.0], RESAMPLES, run)
        yield Contrast("baseline", None, n, False, (stratum,), (1.0,), one)


def cluster_sizes(generator: np.random.Generator, items: int, sizes: tuple[int, int]) -> NDArray[np.int64]:
    low, high = sizes
    if high == 1:
        return np.ones(items, dtype=np.int64)
    return generator.integers(low, high + 1, size=round(2 * items / (low + high)))


def coverage(scenario: Scenario, n: int, runs: int, seed: int) -> dict[str, Any]:
    return covered(scenario.name, scenario.truth, contrasts(scenario, n, runs, seed), n, runs)


def covered(name: str, truth: float, found: Iterator[Contrast], n: int, runs: int) -> dict[str, Any]:
    below = above = 0
    methods: dict[str, int] = {}
    for one in found:
        interval = one.interval(0.95)
        above += interval.low > truth + 1e-12
        below += interval.high < truth - 1e-12
        methods[interval.method] = methods.get(interval.method, 0) + 1
    share = 1 - (below + above) / runs
    spread = math.sqrt(share * (1 - share) / runs)
    return {
        "scenario": name,
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


NORMAL = 1e9  # degrees of freedom


def alternatives(scenario: Scenario, n: int, runs: int, seed: int) -> dict[str, Any]:
    """The same runs by other methods: what each part of ours is for."""
    missed: dict[str, list[int]] = {}
    for one in contrasts(scenario, n, runs, seed, drawn=True):
        ours = one.resampled
        textbook = {"inflation": 1.0, "freedom": NORMAL, "swaps": None}
        others: dict[str, dict[str, Any]] = {
            "ours": {},
            "percentile": {"method": "percentile", **textbook},
            "bca": {"method": "bca", **textbook},
            "percentile, expanded": {"method": "percentile"},
            "bca, expanded": {"method": "bca"},
            "t, n - 1": {"method": "t", "freedom": min(ours.clusters) - 1.0, "swaps": None},
            "t, by kurtosis": {"method": "t", "swaps": None},
        }
        for name, changes in others.items():
            interval = (ours if ours.few else replace(ours, **changes)).interval(0.95)
            counts = missed.setdefault(name, [0, 0])
            counts[0] += interval.low > scenario.truth + 1e-12
            counts[1] += interval.high < scenario.truth - 1e-12
    return {
        "scenario": scenario.name,
        "n": n,
        "runs": runs,
        "coverage": {name: 1 - sum(counts) / runs for name, counts in missed.items()},
        "too_high": {name: counts[0] / runs for name, counts in missed.items()},
    }


def false_beats(scenario: Scenario, n: int, runs: int, seed: int) -> dict[str, Any]:
    """The least favourable null: the winner equals one baseline and is 20 standard errors above two others."""
    beats = worse = 0
    for one in contrasts(scenario, n, runs, seed):
        far = _compared(_shifted(one, 20 * one.resampled.error))
        found = verdict(False, [far, _compared(one), far])
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


def _compared(one: Contrast) -> Comparison:
    """`one.comparison()` without the p-value, which no verdict uses."""
    found = one.interval()
    return Comparison(one.against, one.resampled.point, found.low, found.high, one.n, one.task, found.method)


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


def guards(n: int, runs: int, seed: int) -> list[dict[str, Any]]:
    """A true drop of exactly max_drop to one parent: how often the guard is said to hold (at most 5%)."""
    drop, rows = 0.03, []
    for name, win, lose in (("wins and losses", 0.085, 0.115), ("hardly any wins", 0.005, 0.035)):
        scenario = Scenario(name, -drop, (Task(binary(win, lose), True),))
        held = sum(guard([one], drop).holds for one in contrasts(scenario, n, runs, seed))
        limit = 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)
        rows.append(
            {
                "scenario": name,
                "n": n,
                "runs": runs,
                "false_holds": held / runs,
                "limit": limit,
                "met": held / runs <= limit,
            }
        )
    return rows


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


SECTIONS = ("coverage", "false_beats", "alternatives", "guards", "power", "simultaneous")


def rows(section: str, runs: dict[int, int], seed: int) -> Iterator[dict[str, Any]]:
    """The rows of a section, one after another; each has its own seeds."""
    if section == "coverage":
        for scenario, n in product(COVERAGE, ITEMS):
            yield coverage(scenario, n, runs[n], seed)
        for n in ITEMS:
            truth, found = f1_contrasts(n, QUICK_RUNS, seed)
            yield covered("F1, 30% positives (no mean)", truth, found, n, QUICK_RUNS)
    elif section == "false_beats":
        for scenario, n in product(NULLS, ITEMS):
            yield false_beats(scenario, n, runs[n], seed + 1)
    elif section == "alternatives":
        for scenario in COVERAGE:
            yield alternatives(scenario, ITEMS[0], QUICK_RUNS, seed + 5)
    elif section == "guards":
        for n in ITEMS:
            yield from guards(n, runs[n], seed + 3)
    elif section == "power":
        for n in ITEMS:
            yield from power(n, QUICK_RUNS, seed + 4)
    else:
        for n in ITEMS:
            yield together(n, QUICK_RUNS, seed + 2)


def plot(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Coverage by scenario and n, with two standard errors, before the band of the target."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["scenario"] for row in found))
    figure, axes = pyplot.subplots(figsize=(8, 0.42 * len(names) + 1.4), layout="constrained")
    axes.axvspan(100 * TARGET[0], 100 * TARGET[1], color="0.9", zorder=0)
    axes.axvline(95, color="0.6", linewidth=1, zorder=1)
    for k, (n, marker) in enumerate(zip(ITEMS, "os^", strict=True)):
        chosen = [row for row in found if row["n"] == n]
        axes.errorbar(
            [100 * row["coverage"] for row in chosen],
            [names.index(row["scenario"]) + 0.22 * (k - 1) for row in chosen],
            xerr=[200 * row["error"] for row in chosen],
            fmt=marker,
            markersize=4,
            linewidth=1.2,
            label=f"{n} items",
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("covered by the 95% interval, % (bars: 2 standard errors)")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, help="sections to (re)do, others are kept")
    parser.add_argument("--plot", type=Path, help="a picture of the coverage")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_RUNS} runs everywhere")
    parser.add_argument("--seed", type=int, default=31415)
    options = parser.parse_args()
    runs = {n: QUICK_RUNS if options.quick else RUNS[n] for n in ITEMS}
    found: dict[str, Any] = {"resamples": RESAMPLES, "seed": options.seed, "target": TARGET, "seconds": {}}
    if options.only is not None and options.json.exists():
        found = json.loads(options.json.read_text(encoding="utf-8"))
    for section in SECTIONS if options.only is None else options.only:
        started, found[section] = time.perf_counter(), []
        for row in rows(section, runs, options.seed):
            found[section].append(row)
            found["seconds"][section] = time.perf_counter() - started
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{found['seconds'][section]:5.0f} s", section, row, flush=True)
    if options.plot:
        plot(found["coverage"], options.plot)


if __name__ == "__main__":
    main()
