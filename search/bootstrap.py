"""A clustered bootstrap of paired differences, stratified by task; internal to `shoal.search.claims`.

Efron & Tibshirani 1993, chapters 12-14 (studentised, percentile, BCa) and Davison & Hinkley 1997, sections 3.2,
5.3 (several strata). Which method serves which data was settled by `benchmarks/claims.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

from shoal.errors import EvaluationError
from shoal.search.exact import sign_flip
from shoal.search.strata import Stratum

Floats = NDArray[np.float64]

FEW = 10  # discordant clusters below which BCa's corrections are noise
ENOUGH = 100  # clusters from which on BCa is used: of fewer, its acceleration is mostly noise
SHOWN = 3.0  # standard errors from which on an acceleration is believed; correcting for noise costs coverage
SKEWED = 0.015  # acceleration from which on a continuous metric is studentised: BCa under-covers there


@dataclass(frozen=True)
class Interval:
    """Two ends, how they were made (see `Resampled.interval`) and, where not by plain BCa, why."""

    low: float
    high: float
    method: str
    why: str = ""


@dataclass(frozen=True, eq=False)
class Resampled:
    """Resamples of a weighted sum of strata, from which intervals of any level are read.

    point: sum of weight * difference. error: its standard error by linearisation, NaN where a metric gives none.
    draws: [R], sorted. pivots: [R], sorted, (draw - point) / its error; empty unless studentised. influences:
    weight * influence of each stratum, empty where one has none. swaps: of all clusters, times weight; None where
    one stratum has none. few: under 10 discordant clusters. method, why: of every interval, `none` and `constant`
    included.
    """

    point: float
    error: float
    draws: Floats
    pivots: Floats
    influences: tuple[Floats, ...]
    clusters: tuple[int, ...]
    swaps: Floats | None
    few: bool
    seed: int
    method: str
    why: str

    def interval(self, level: float) -> Interval:
        """Two-sided interval.

        `bca` where the differences are skewed; `studentized` where they are so skewed, of a continuous metric, that BCa
        under-covers; `percentile` where no skewness shows, with under 100 clusters, under 10 discordant ones (for 0/1
        metrics with one win and one loss added, as in Bonett & Price 2012, J. Educ. Behav. Stat. 37:479, without which a few equal answers
        would pass for equality) and where BCa is not defined; `constant`: no cluster differs from another, the
        interval has no width; `none`: a task has one cluster only, nothing is known, (-inf, inf). `+exact`: widened to
        include 0, because an exact sign-flip test of the clusters does not reject it (its mid-p version from 10
        discordant clusters on).
        """
        if self.method == "none":
            return Interval(-math.inf, math.inf, "none", self.why)
        tail = (1 - level) / 2
        found = self._plain(tail)
        if self.swaps is not None and (found.low > 0 or found.high < 0) and self._p_zero > 2 * tail:
            note = f"the exact test gives p = {self._p_zero:.3f}"
            return Interval(
                min(found.low, 0.0),
                max(found.high, 0.0),
                f"{found.method}+exact",
                f"{found.why}; {note}" if found.why else note,
            )
        return found

    def _plain(self, tail: float) -> Interval:
        if self.method == "constant":
            return Interval(self.point, self.point, "constant", self.why)
        if self.method == "studentized":
            top, bottom = np.quantile(self.pivots, [1 - tail, tail])
            return Interval(
                self.point - self.error * float(top),
                self.point - self.error * float(bottom),
                self.method,
                self.why,
            )
        z, method, why = self._expanded(tail), self.method, self.why
        levels: tuple[float, float] | None = (float(ndtr(-z)), float(ndtr(z)))
        if method == "bca":
            levels = _bca(self.draws, self.point, acceleration(self.influences, self.clusters), z)
            if levels is None:
                levels, method, why = (float(ndtr(-z)), float(ndtr(z))), "percentile", "BCa is not defined"
        assert levels is not None
        low, high = np.quantile(self.draws, levels)
        return Interval(float(low), float(high), method, why)

    def _expanded(self, tail: float) -> float:
        """Normal quantile that makes up for what resampling leaves out: a factor sqrt(C / (C - 1)) for C clusters, and
        Student's t for the normal (Hesterberg 2015, The American Statistician 69:371, "expanded" percentiles)."""
        inflation, freedom = self._inflation
        return math.sqrt(inflation) * -float(stdtrit(freedom, tail))

    @cached_property
    def _inflation(self) -> tuple[float, float]:
        """By what the variance of the draws is too small, and how many degrees of freedom it has.

        Degrees of freedom: 2 V^2 / var(V), Satterthwaite's, with the variance of V that the data's kurtosis k and
        skewness g give, (k - 1 - g^2) V^2 / (C - 1) per stratum (what g explains is BCa's part); with normal data,
        k = 3, they are C - 1. Few discordant items among many equal ones have a large k, so this is what keeps
        weighted 0/1 tasks with some ten discordant items each from under-covering.
        """
        parts = [(v, c) for v, c in zip(self.influences, self.clusters, strict=False) if c > 1 and v.any()]
        if not parts:
            c = max(2, min(self.clusters))
            return c / (c - 1), c - 1.0
        plain = full = normal = seen = 0.0
        for v, c in parts:
            second = float((v**2).mean())
            skewness, kurtosis = float((v**3).mean()) / second**1.5, float((v**4).mean()) / second**2
            variance = second / (c - 1)
            plain += second / c
            full += variance
            normal += variance**2 * 2 / (c - 1)
            seen += variance**2 * (kurtosis - 1 - skewness**2) / (c - 1)
        return full / plain, 2 * full**2 / max(normal, seen)

    @cached_property
    def _p_zero(self) -> float:
        assert self.swaps is not None
        discordant = self.swaps[self.swaps != 0]
        return sign_flip(discordant, [self.seed, 0x5169], mid=discordant.size >= FEW)


def resample(strata: Sequence[Stratum], weights: Sequence[float], resamples: int, seed: int) -> Resampled:
    """Draw `resamples` (fewer where a metric is expensive) of sum of weight * difference."""
    plan = planned(strata, weights, seed)
    number = int(min([resamples, *(s.most for s in strata)]))
    draws, variances = np.zeros(number), np.zeros(number)
    for index, (stratum, weight) in enumerate(zip(strata, weights, strict=True)):
        generator = np.random.default_rng([seed, index])
        smoothed = stratum.smoothed if plan.few else None
        values, spread = (smoothed or stratum.resample)(generator, number)
        draws += weight * values
        if plan.method == "studentized":
            variances += weight**2 * spread
    return with_draws(plan, draws, variances)


def planned(strata: Sequence[Stratum], weights: Sequence[float], seed: int) -> Resampled:
    """Everything but the draws: which method serves these data, and why."""
    influences: tuple[Floats, ...] = ()
    if all(s.influence.size for s in strata):
        influences = tuple(w * s.influence for s, w in zip(strata, weights, strict=True))
    swaps = None
    if all(s.swaps.size for s in strata):
        swaps = np.concatenate([w * s.swaps for s, w in zip(strata, weights, strict=True)])
    clusters = tuple(s.clusters for s in strata)
    error = math.sqrt(math.fsum(w**2 * s.variance for s, w in zip(strata, weights, strict=True)))
    method, why = _method(strata, influences, clusters, swaps)
    return Resampled(
        point=math.fsum(w * s.point for s, w in zip(strata, weights, strict=True)),
        error=error,
        draws=np.empty(0),
        pivots=np.empty(0),
        influences=influences,
        clusters=clusters,
        swaps=swaps,
        few=swaps is not None and int((swaps != 0).sum()) < FEW,
        seed=seed,
        method=method,
        why=why,
    )


def with_draws(plan: Resampled, draws: Floats, variances: Floats) -> Resampled:
    """The plan with its draws. variances: [R], of each draw, used where the plan is studentised.

    EvaluationError where a draw is not a finite number.
    """
    if plan.method == "none":
        return plan
    if not np.isfinite(draws).all():
        raise EvaluationError(
            "a resample's metric is not a finite number; its aggregation fails on repeated items"
        )
    if np.ptp(draws) <= 1e-12 * max(1.0, abs(plan.point)):
        return replace(plan, method="constant", why="no cluster differs from another")
    pivots = np.empty(0)
    if plan.method == "studentized":
        if (variances > 0).all():
            pivots = np.sort((draws - plan.point) / np.sqrt(variances))
        else:
            plan = replace(plan, method="bca", why="")
    return replace(plan, draws=np.sort(draws), pivots=pivots)


def acceleration(influences: Sequence[Floats], clusters: Sequence[int]) -> float:
    """Skewness correction over several strata, Davison & Hinkley 1997, section 5.3.2."""
    cubes = math.fsum(float((v**3).sum()) / c**3 for v, c in zip(influences, clusters, strict=True))
    squares = math.fsum(float((v**2).sum()) / c**2 for v, c in zip(influences, clusters, strict=True))
    return cubes / (6 * squares**1.5) if squares > 0 else 0.0


def acceleration_error(influences: Sequence[Floats], clusters: Sequence[int]) -> float:
    """Standard error of `acceleration`, by the delta method on the third and second moments of each stratum."""
    squares = math.fsum(float((v**2).mean()) / c for v, c in zip(influences, clusters, strict=True))
    cubes = math.fsum(float((v**3).mean()) / c**2 for v, c in zip(influences, clusters, strict=True))
    if not squares > 0:
        return 0.0
    variance = 0.0
    for v, c in zip(influences, clusters, strict=True):
        second, third = float((v**2).mean()), float((v**3).mean())
        # the mean is estimated too, which is the term -3 second v
        effect = (v**3 - third - 3 * second * v) / c**2 / (6 * squares**1.5)
        effect -= cubes / (4 * squares**2.5) * (v**2 - second) / c
        variance += float((effect**2).mean()) / c
    return math.sqrt(variance)


def _method(
    strata: Sequence[Stratum],
    influences: tuple[Floats, ...],
    clusters: tuple[int, ...],
    swaps: Floats | None,
) -> tuple[str, str]:
    lonely = [s for s in strata if s.clusters < 2 and s.swaps.any()]
    if lonely:
        return "none", "a task's items are one cluster"
    if swaps is None or not influences:
        return "percentile", "the metric's aggregation is too slow for a jackknife"
    discordant = int((swaps != 0).sum())
    if discordant < FEW:
        return "percentile", f"{discordant} discordant clusters, BCa needs {FEW}"
    skew, error = acceleration(influences, clusters), acceleration_error(influences, clusters)
    # what is no mean may be biased, which BCa corrects as well
    if not abs(skew) > SHOWN * error and all(s.linear for s in strata):
        return "percentile", "no skewness shows that BCa would correct"
    if abs(skew) >= SKEWED and all(s.continuous for s in strata):
        return "studentized", f"skewed differences (acceleration {skew:+.3f})"
    if sum(clusters) < ENOUGH:
        return "percentile", f"{sum(clusters)} clusters, BCa needs {ENOUGH}"
    return "bca", ""


def _bca(draws: Floats, point: float, accelerated: float, z: float) -> tuple[float, float] | None:
    """Bias-corrected and accelerated levels, Efron & Tibshirani 1993, eq. 14.10; None where not defined."""
    slack = 1e-12 * max(1.0, abs(point))
    # draws are sorted, and those that equal the point count half
    first, last = np.searchsorted(draws, [point - slack, point + slack], side="right")
    below = float(first + last) / (2 * len(draws))
    if not 0 < below < 1:
        return None
    z0 = float(ndtri(below))
    levels = []
    for end in (-z, z):
        room = 1 - accelerated * (z0 + end)
        if room <= 0:
            return None
        levels.append(float(ndtr(z0 + (z0 + end) / room)))
    return levels[0], levels[1]
