"""A clustered bootstrap of paired differences, stratified by task; internal to `shoal.search.claims`.

Efron & Tibshirani 1993, chapters 6, 14 (percentile, BCa) and Davison & Hinkley 1997, sections 3.2, 5.3
(several strata). Clusters, not items, are resampled: items of one passage or template are no independent
evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from shoal.errors import EvaluationError
from shoal.search.power import mcnemar_exact

Floats = NDArray[np.float64]
Aggregate = Callable[[list[Any]], float]

CHUNK = 4_000_000  # numbers in memory at once
AGGREGATED = 2_000_000  # items that may pass through a metric's own aggregation, per comparison and task
FEW = 10  # discordant clusters below which BCa's corrections are noise


@dataclass(frozen=True, eq=False)
class Stratum:
    """One task: its difference, and what is needed to resample it.

    point: the difference winner - other, positive where the winner is better. influence: [C], infinitesimal
    or finite jackknife, mean 0, per cluster; empty where it would cost too much. swaps: [C], by how much the
    difference falls, halved, when winner and other trade places in a cluster; 0 where they agree, empty as
    well. most: resamples that are affordable. resample: (generator, number) -> resampled differences.
    """

    clusters: int
    point: float
    influence: Floats
    swaps: Floats
    most: float
    resample: Callable[[np.random.Generator, int], Floats]


def mean_stratum(differences: Floats, members: Sequence[NDArray[np.intp]]) -> Stratum:
    """Stratum of a metric that is a mean over items. differences: [n]; members: the items of each cluster."""
    sums = np.array([differences[m].sum() for m in members])
    sizes = np.array([float(len(m)) for m in members])
    point = float(sums.sum() / sizes.sum())
    # many clusters are alike where items are 0/1: then it is enough to draw how often each kind comes
    kinds, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    total = len(members)

    def resample(generator: np.random.Generator, number: int) -> Floats:
        if len(kinds) * 16 <= total:
            drawn = generator.multinomial(total, counts / total, size=number).astype(np.float64) @ kinds
            return np.asarray(drawn[:, 0] / drawn[:, 1])
        means = np.empty(number)
        step = max(1, CHUNK // total)
        for start in range(0, number, step):
            stop = min(number, start + step)
            index = generator.integers(0, total, size=(stop - start, total), dtype=np.int32)
            means[start:stop] = sums[index].sum(axis=1) / sizes[index].sum(axis=1)
        return means

    influence = (sums - point * sizes) * total / sizes.sum()
    return Stratum(total, point, influence, sums / sizes.sum(), math.inf, resample)


def aggregate_stratum(
    winner: Sequence[Any],
    other: Sequence[Any],
    members: Sequence[NDArray[np.intp]],
    aggregate: Aggregate,
    sign: float,
) -> Stratum:
    """Stratum of a metric that is no mean over items: its aggregate is recomputed on each resample."""
    items = [[(winner[i], other[i]) for i in m] for m in members]
    total, n = len(items), len(winner)

    def difference(clusters: Sequence[Sequence[tuple[Any, Any]]]) -> float:
        pairs = [pair for cluster in clusters for pair in cluster]
        return sign * (float(aggregate([a for a, _ in pairs])) - float(aggregate([b for _, b in pairs])))

    def resample(generator: np.random.Generator, number: int) -> Floats:
        drawn = generator.integers(0, total, size=(number, total), dtype=np.int32)
        return np.array([difference([items[i] for i in row]) for row in drawn.tolist()])

    point = difference(items)
    most = max(200, AGGREGATED // n)
    if total == 1 or total * n > AGGREGATED:
        swaps = np.array([point]) if total == 1 else np.empty(0)
        return Stratum(total, point, np.empty(0), swaps, most, resample)
    swaps, left_out = np.zeros(total), np.empty(total)
    for i, cluster in enumerate(items):
        rest = items[:i] + items[i + 1 :]
        left_out[i] = difference(rest)
        if any(a != b for a, b in cluster):
            swaps[i] = (point - difference([*rest, [(b, a) for a, b in cluster]])) / 2
    influence = (total - 1) * (left_out.mean() - left_out)
    return Stratum(total, point, influence, swaps, most, resample)


def interval(
    strata: Sequence[Stratum], weights: Sequence[float], resamples: int, seed: int, level: float
) -> tuple[float, float, str]:
    """Two-sided interval (low, high) of sum of weight * difference, and how it was made.

    `constant`: no cluster differs from another, the interval has no width. `bca`, or `percentile` under 10
    discordant clusters and where BCa is not defined. `+exact`: widened to include 0, because an exact
    sign-flip test of the clusters does not reject it. `none`: a task has one cluster only, so nothing is
    known, (-inf, inf).
    """
    point = math.fsum(w * s.point for s, w in zip(strata, weights, strict=True))
    swaps = np.concatenate([w * s.swaps for s, w in zip(strata, weights, strict=True)])
    discordant = swaps[swaps != 0]
    number = int(min([resamples, *(s.most for s in strata)]))
    draws = np.zeros(number)
    for index, (stratum, weight) in enumerate(zip(strata, weights, strict=True)):
        generator = np.random.default_rng([seed, index])
        draws += weight * stratum.resample(generator, number)
    if any(s.clusters < 2 and s.swaps.any() for s in strata):
        return -math.inf, math.inf, "none"
    if not np.isfinite(draws).all():
        raise EvaluationError(
            "a resample's metric is not a finite number; its aggregation fails on repeated items"
        )
    if np.ptp(draws) <= 1e-12 * max(1.0, abs(point)):
        return point, point, "constant"
    tail = (1 - level) / 2
    low_q, high_q, method = tail, 1 - tail, "percentile"
    if discordant.size >= FEW and all(s.influence.size for s in strata):
        corrected = _bca(draws, point, _acceleration(strata, weights), tail)
        if corrected is not None:
            (low_q, high_q), method = corrected, "bca"
    low, high = (float(q) for q in np.quantile(draws, [low_q, high_q]))
    exact = all(s.swaps.size for s in strata)
    if exact and (low > 0 or high < 0) and _sign_flip(discordant, seed) > 1 - level:
        low, high, method = min(low, 0.0), max(high, 0.0), f"{method}+exact"
    return low, high, method


def _bca(draws: Floats, point: float, acceleration: float, tail: float) -> tuple[float, float] | None:
    """Bias-corrected and accelerated levels, Efron & Tibshirani 1993, eq. 14.10; None where not defined."""
    slack = 1e-12 * max(1.0, abs(point))
    below = float((draws < point - slack).mean() + 0.5 * (np.abs(draws - point) <= slack).mean())
    if not 0 < below < 1:
        return None
    z0 = float(ndtri(below))
    levels = []
    for z in (float(ndtri(tail)), -float(ndtri(tail))):
        room = 1 - acceleration * (z0 + z)
        if room <= 0:
            return None
        levels.append(float(ndtr(z0 + (z0 + z) / room)))
    return levels[0], levels[1]


def _acceleration(strata: Sequence[Stratum], weights: Sequence[float]) -> float:
    """Skewness correction over several strata, Davison & Hinkley 1997, section 5.3.2."""
    cubes = math.fsum(
        float(((w * s.influence) ** 3).sum()) / s.clusters**3 for s, w in zip(strata, weights, strict=True)
    )
    squares = math.fsum(
        float(((w * s.influence) ** 2).sum()) / s.clusters**2 for s, w in zip(strata, weights, strict=True)
    )
    return cubes / (6 * squares**1.5) if squares > 0 else 0.0


def _sign_flip(contributions: Floats, seed: int, draws: int = 10_000) -> float:
    """Two-sided p of the sum under random signs: exact for equal sizes (McNemar) or few, else by draws."""
    sizes = np.abs(contributions)
    if sizes.size == 0 or np.ptp(sizes) <= 1e-12 * sizes.max():
        wins = int((contributions > 0).sum())
        return mcnemar_exact(wins, sizes.size - wins)
    reach = abs(float(contributions.sum())) * (1 - 1e-12)
    if sizes.size <= 12:
        signs = np.array(list(product((-1.0, 1.0), repeat=sizes.size)))
        return float((np.abs(signs @ sizes) >= reach).mean())
    generator, hits = np.random.default_rng([seed, 0x5169]), 0
    step = max(1, CHUNK // sizes.size)
    for start in range(0, draws, step):
        flips = generator.integers(0, 2, size=(min(step, draws - start), sizes.size), dtype=np.int8)
        hits += int((np.abs((2.0 * flips - 1.0) @ sizes) >= reach).sum())
    return (hits + 1) / (draws + 1)
