"""One task's paired differences as a stratum of clusters, and its resampling; internal to `shoal.search.claims`.

Clusters, not items, are resampled: items of one passage or template are no independent evidence. Efron &
Tibshirani 1993, chapter 6; Davison & Hinkley 1997, section 3.8 (ratio of sums over clusters).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Aggregate = Callable[[list[Any]], float]
Members = Sequence[NDArray[np.intp]]
Resample = Callable[[np.random.Generator, int], Floats]

CHUNK = 4_000_000  # numbers in memory at once
AGGREGATED = 2_000_000  # items that may pass through a metric's own aggregation, per comparison and task


@dataclass(frozen=True, eq=False)
class Stratum:
    """One task: its difference, and what is needed to resample it.

    point: the difference winner - other, positive where the winner is better. influence: [C], infinitesimal
    or finite jackknife, mean 0, per cluster; empty where it would cost too much. swaps: [C], by how much the
    difference falls, halved, when winner and other trade places in a cluster; 0 where they agree, empty as
    well. most: resamples that are affordable. linear: it is a mean over items. resample: (generator, number) ->
    resampled differences. smoothed: the same with one win and one loss of one item added, None for a metric that is
    not 0/1.
    """

    clusters: int
    point: float
    influence: Floats
    swaps: Floats
    most: float
    linear: bool
    resample: Resample
    smoothed: Resample | None = None

    @property
    def variance(self) -> float:
        """Of `point`, by linearisation, without correction for the number of clusters."""
        return float((self.influence**2).sum()) / self.clusters**2 if self.influence.size else math.nan


def mean_stratum(differences: Floats, members: Members, binary: bool) -> Stratum:
    """Stratum of a metric that is a mean over items.

    differences: [n]; members: the items of each cluster; binary: every item's score is 0 or 1.
    """
    sizes = np.array([float(len(m)) for m in members])
    starts = np.cumsum(sizes).astype(np.int64) - sizes.astype(np.int64)
    return summed_stratum(np.add.reduceat(differences[np.concatenate(members)], starts), sizes, binary)


def summed_stratum(sums: Floats, sizes: Floats, binary: bool) -> Stratum:
    """`mean_stratum` from the sum of the differences in each cluster, [C], and its items, [C]."""
    point = float(sums.sum() / sizes.sum())
    influence = (sums - point * sizes) * len(sums) / sizes.sum()
    smoothed = None
    if binary:
        smoothed = _drawn(np.append(sums, [1.0, -1.0]), np.append(sizes, [1.0, 1.0]))
    return Stratum(
        clusters=len(sums),
        point=point,
        influence=influence,
        swaps=sums / sizes.sum(),
        most=math.inf,
        linear=True,
        resample=_drawn(sums, sizes),
        smoothed=smoothed,
    )


def ratios(counts: Floats, sums: Floats, sizes: Floats) -> Floats:
    """Means of resamples, [R] or [R, B].

    counts: [R, C], how often each cluster was drawn. sums: [C] or [C, B], of the differences in each cluster;
    sizes: [C], its items.
    """
    items = counts @ sizes
    means: Floats = (counts @ sums) / (items[:, None] if sums.ndim == 2 else items)
    return means


def multiplicities(generator: np.random.Generator, number: int, total: int) -> Floats:
    """[number, total]: how often each of `total` clusters comes in a resample of as many, drawn alike."""
    index = generator.integers(0, total, size=(number, total), dtype=np.int64)
    index += np.arange(number, dtype=np.int64)[:, None] * total
    return np.bincount(index.ravel(), minlength=number * total).reshape(number, total).astype(np.float64)


def _drawn(sums: Floats, sizes: Floats) -> Resample:
    total = len(sums)

    def resample(generator: np.random.Generator, number: int) -> Floats:
        # many clusters are alike where items are 0/1: then it is enough to draw how often each kind comes
        kinds, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
        if len(kinds) * 16 <= total:
            drawn = generator.multinomial(total, counts / total, size=number).astype(np.float64)
            return ratios(drawn, kinds[:, 0], kinds[:, 1])
        means = np.empty(number)
        step = max(1, CHUNK // total)
        for start in range(0, number, step):
            stop = min(number, start + step)
            means[start:stop] = ratios(multiplicities(generator, stop - start, total), sums, sizes)
        return means

    return resample


def aggregate_stratum(
    winner: Sequence[Any], other: Sequence[Any], members: Members, aggregate: Aggregate, sign: float
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
        return Stratum(total, point, np.empty(0), swaps, most, False, resample)
    swaps, left_out = np.zeros(total), np.empty(total)
    for i, cluster in enumerate(items):
        rest = items[:i] + items[i + 1 :]
        left_out[i] = difference(rest)
        if any(a != b for a, b in cluster):
            swaps[i] = (point - difference([*rest, [(b, a) for a, b in cluster]])) / 2
    influence = (total - 1) * (left_out.mean() - left_out)
    return Stratum(total, point, influence, swaps, most, False, resample)
