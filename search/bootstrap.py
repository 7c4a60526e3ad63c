"""A clustered bootstrap of paired differences, stratified by task; internal to `shoal.search.claims`.

Efron & Tibshirani 1993, chapters 12-14 (Student's t, percentile, BCa) and Davison & Hinkley 1997, sections 3.2,
5.3 (several strata). Why each method serves which data: docs/claims.md, measured by `benchmarks/claims.py`.
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
from shoal.search.exact import sign_flip, sign_flip_bound
from shoal.search.strata import Stratum

Floats = NDArray[np.float64]

FEW = 10  # discordant clusters below which moments are noise
SLACK = 1e-12  # relative, of rounding
SHOWN = 3.0  # standard errors from which on an acceleration is believed; correcting for noise costs coverage


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

    point: sum of weight * difference. error: its standard error, by linearisation for means over items, of the draws
    for what is no mean. draws: [R], sorted; empty where no interval needs them. influences: weight * influence of each
    stratum, empty where one has none. swaps: of all clusters, times weight; None where one stratum has none.
    inflation, freedom: see `spread`. few: under 10 discordant clusters. method, why: of every interval, `none` and
    `constant` included.
    """

    point: float
    error: float
    draws: Floats
    influences: tuple[Floats, ...]
    clusters: tuple[int, ...]
    swaps: Floats | None
    inflation: float
    freedom: float
    few: bool
    seed: int
    method: str
    why: str

    def interval(self, level: float) -> Interval:
        """Two-sided interval.

        `bca` where the differences are skewed beyond doubt; `t`, point +- t * error, where no skewness shows;
        `percentile` with under 10 discordant clusters (for 0/1 metrics with one win and one loss added, as in Bonett &
        Price 2012, J. Educ. Behav. Stat. 37:479, without which a few equal answers would pass for equality), where a
        jackknife costs too much and where BCa is not defined; `constant`: no cluster differs from another, the
        interval has no width; `none`: a task has one cluster only, nothing is known, (-inf, inf). `+exact`: widened to
        include 0, because an exact sign-flip test of the clusters does not reject it (its mid-p version from 10
        discordant clusters on). All but `constant` and `none` have Student's t in place of the normal.
        """
        if self.method == "none":
            return Interval(-math.inf, math.inf, "none", self.why)
        tail = (1 - level) / 2
        found = self._plain(tail)
        excluded = self.swaps is not None and (found.low > 0 or found.high < 0)
        if excluded and self._may_be_zero(2 * tail):
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
        if self.method == "t":
            half = self._expanded(tail) * self.error
            return Interval(self.point - half, self.point + half, self.method, self.why)
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
        return math.sqrt(self.inflation) * -float(stdtrit(self.freedom, tail))

    def _may_be_zero(self, level: float) -> bool:
        assert self.swaps is not None
        return sign_flip_bound(self.swaps) > level and self._p_zero > level

    @cached_property
    def _p_zero(self) -> float:
        assert self.swaps is not None
        discordant = self.swaps[self.swaps != 0]
        return sign_flip(discordant, [self.seed, 0x5169], mid=discordant.size >= FEW)


def resample(strata: Sequence[Stratum], weights: Sequence[float], resamples: int, seed: int) -> Resampled:
    """Draw `resamples` (fewer where a metric is expensive) of sum of weight * difference."""
    plan = planned(strata, weights, seed)
    if plan.method in ("none", "constant") or (plan.method == "t" and all(s.linear for s in strata)):
        return plan
    number = int(min([resamples, *(s.most for s in strata)]))
    draws = np.zeros(number)
    for index, (stratum, weight) in enumerate(zip(strata, weights, strict=True)):
        generator = np.random.default_rng([seed, index])
        smoothed = stratum.smoothed if plan.few else None
        draws += weight * (smoothed or stratum.resample)(generator, number)
    return with_draws(plan, draws)


def planned(strata: Sequence[Stratum], weights: Sequence[float], seed: int) -> Resampled:
    """Everything but the draws: which method serves these data, and why."""
    influences: tuple[Floats, ...] = ()
    if all(s.influence.size for s in strata):
        influences = tuple(w * s.influence for s, w in zip(strata, weights, strict=True))
    swaps = None
    if all(s.swaps.size for s in strata):
        swaps = np.concatenate([w * s.swaps for s, w in zip(strata, weights, strict=True)])
    clusters = tuple(s.clusters for s in strata)
    error = math.nan  # until drawn
    if all(s.linear for s in strata):
        error = math.sqrt(math.fsum(w**2 * s.variance for s, w in zip(strata, weights, strict=True)))
    method, why = _method(strata, influences, clusters, swaps)
    few = swaps is not None and int((swaps != 0).sum()) < FEW
    inflation, freedom = spread(influences, clusters, [few and s.smoothed is not None for s in strata])
    return Resampled(
        point=math.fsum(w * s.point for s, w in zip(strata, weights, strict=True)),
        error=error,
        draws=np.empty(0),
        influences=influences,
        clusters=clusters,
        swaps=swaps,
        inflation=inflation,
        freedom=freedom,
        few=few,
        seed=seed,
        method=method,
        why=why,
    )


def with_draws(plan: Resampled, draws: Floats) -> Resampled:
    """The plan with its draws, [R]. EvaluationError where a draw is not a finite number."""
    if not np.isfinite(draws).all():
        raise EvaluationError(
            "a resample's metric is not a finite number; its aggregation fails on repeated items"
        )
    error = float(draws.std()) if math.isnan(plan.error) else plan.error
    if np.ptp(draws) <= SLACK * max(1.0, abs(plan.point)):
        return replace(plan, error=error, method="constant", why="no cluster differs from another")
    return replace(plan, error=error, draws=np.sort(draws))


def spread(
    influences: Sequence[Floats], clusters: Sequence[int], smoothed: Sequence[bool]
) -> tuple[float, float]:
    """By what the variance of the draws is too small, and how many degrees of freedom it has.

    Degrees of freedom: 2 V^2 / var(V), Satterthwaite's (1946, Biometrics Bulletin 2:110), with the variance of V that
    the data's kurtosis k gives, (k - 1) V^2 / (C - 1) per stratum; with normal data, k = 3, they are C - 1. Few
    discordant items among many equal ones, or few clusters that differ much, have a large k: their variance is known
    from little. Where smoothing makes up for just that, k is 3.
    """
    parts = [(v, c, s) for v, c, s in zip(influences, clusters, smoothed, strict=False) if c > 1 and v.any()]
    if not parts:
        c = max(2, min(clusters))
        return c / (c - 1), c - 1.0
    plain = full = normal = seen = 0.0
    for v, c, s in parts:
        square = v * v  # numpy's powers above 2 are slow
        second = float(square.mean())
        kurtosis = 3.0 if s else float((square * square).mean()) / second**2
        variance = second / (c - 1)
        plain += second / c
        full += variance
        normal += variance**2 * 2 / (c - 1)
        seen += variance**2 * (kurtosis - 1) / (c - 1)
    return full / plain, 2 * full**2 / max(normal, seen)


def acceleration(influences: Sequence[Floats], clusters: Sequence[int]) -> float:
    """Skewness correction over several strata, Davison & Hinkley 1997, section 5.3.2."""
    cubes = math.fsum(float((v * v * v).sum()) / c**3 for v, c in zip(influences, clusters, strict=True))
    squares = math.fsum(float((v**2).sum()) / c**2 for v, c in zip(influences, clusters, strict=True))
    return cubes / (6 * squares**1.5) if squares > 0 else 0.0


def acceleration_error(influences: Sequence[Floats], clusters: Sequence[int]) -> float:
    """Standard error of `acceleration` by the jackknife (Efron & Tibshirani 1993, eq. 11.5), summed over strata.

    Where the skewness is one or two clusters', leaving them out shows it; the delta method does not see that.
    """
    seconds = [float((v**2).mean()) / c for v, c in zip(influences, clusters, strict=True)]
    thirds = [float((v * v * v).mean()) / c**2 for v, c in zip(influences, clusters, strict=True)]
    variance = 0.0
    for v, c, second, third in zip(influences, clusters, seconds, thirds, strict=True):
        if c < 3:
            continue
        # moments of the other clusters around their own mean; influences sum to 0
        square, cube = v * v, v * v * v
        mean, square, cube = -v / (c - 1), (square.sum() - square) / (c - 1), (cube.sum() - cube) / (c - 1)
        squares = math.fsum(seconds) - second + (square - mean**2) / (c - 1)
        cubes = math.fsum(thirds) - third + (cube - 3 * mean * square + 2 * mean * mean * mean) / (c - 1) ** 2
        left_out = np.divide(
            cubes, 6 * squares * np.sqrt(np.maximum(squares, 0)), out=np.zeros(c), where=squares > 0
        )
        variance += (c - 1) / c * float(((left_out - left_out.mean()) ** 2).sum())
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
    if all(s.linear and np.abs(s.influence).max() <= SLACK * max(1.0, abs(s.point)) for s in strata):
        return "constant", "no cluster differs from another"
    if abs(acceleration(influences, clusters)) > SHOWN * acceleration_error(influences, clusters):
        return "bca", ""
    return "t", "no skewness shows that BCa would correct"


def _bca(draws: Floats, point: float, accelerated: float, z: float) -> tuple[float, float] | None:
    """Bias-corrected and accelerated levels, Efron & Tibshirani 1993, eq. 14.10; None where not defined."""
    slack = SLACK * max(1.0, abs(point))
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
