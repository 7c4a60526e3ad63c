"""What a run may claim: paired differences on held-out items, their intervals, guards, and one of four verdicts.

DESIGN, "search/": Claims. "Beats" is an intersection-union test (Berger 1982, Technometrics 24:295): every baseline
must be beaten, each at the same level, so no correction for their number is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shoal.errors import EvaluationError, nearest
from shoal.search.bootstrap import Interval, Resampled, resample
from shoal.search.exact import mcnemar_exact, sign_flip
from shoal.search.strata import Aggregate, Stratum, aggregate_stratum, mean_stratum

Verdict = Literal["ties", "beats", "worse", "underpowered"]
Values = NDArray[np.float64] | list[Any]


@dataclass(frozen=True, eq=False)
class TaskSamples:
    """Per-item values of one task's metric, winner and baselines on the same n items in the same order.

    weight: in the overall score, normalised over tasks. winner: [n] numbers, or what `aggregate` takes.
    others: baseline name -> the same. clusters: [n] labels; items with one label are resampled together.
    aggregate: of a metric that is no mean over items (values in item order -> number), None for the mean.
    """

    task: str
    weight: float
    higher_is_better: bool
    winner: Values
    others: Mapping[str, Values]
    clusters: Sequence[str]
    aggregate: Aggregate | None = None


@dataclass(frozen=True)
class Comparison:
    """Winner minus `against`, positive where the winner is better, in units of the metric.

    low, high: two-sided interval at `level`. n: items. task: None for the weighted mean over all tasks.
    method, why: how the interval was made, see `shoal.search.bootstrap.Resampled.interval`, and why so where it is
    not plain BCa. wins, losses: clusters that the winner or the other side wins (0 where counting them would cost too
    much, for metrics with an aggregate); clusters: in all. p: two-sided, of no difference, by `test`: `mcnemar`
    (exact, on items, for one task's 0/1 metric without clusters), else `sign flip` (of clusters), else None and "".
    error: standard error of the difference, NaN where unknown.
    """

    against: str
    difference: float
    low: float
    high: float
    n: int
    task: str | None
    method: str
    wins: int = 0
    losses: int = 0
    clusters: int = 0
    level: float = 0.95
    why: str = ""
    p: float | None = None
    test: str = ""
    error: float = math.nan


@dataclass(frozen=True, eq=False)
class Contrast:
    """Winner against one baseline, overall or on one task, resampled once; intervals of any level come cheap."""

    against: str
    task: str | None
    n: int
    binary: bool
    strata: tuple[Stratum, ...]
    weights: tuple[float, ...]
    resampled: Resampled

    def interval(self, level: float = 0.95) -> Interval:
        return self.resampled.interval(level)

    def comparison(self, level: float = 0.95) -> Comparison:
        found = self.interval(level)
        p, test = self._tested
        return Comparison(
            against=self.against,
            difference=self.resampled.point,
            low=found.low,
            high=found.high,
            n=self.n,
            task=self.task,
            method=found.method,
            wins=sum(int((s.swaps > 0).sum()) for s in self.strata),
            losses=sum(int((s.swaps < 0).sum()) for s in self.strata),
            clusters=sum(s.clusters for s in self.strata),
            level=level,
            why=found.why,
            p=p,
            test=test,
            error=self.resampled.error,
        )

    @cached_property
    def _tested(self) -> tuple[float | None, str]:
        swaps = self.resampled.swaps
        if swaps is None:
            return None, ""
        if self.binary:
            return mcnemar_exact(int((swaps > 0).sum()), int((swaps < 0).sum())), "mcnemar"
        return sign_flip(swaps[swaps != 0], [self.resampled.seed, 0x5169]), "sign flip"


@dataclass(frozen=True)
class Guard:
    """A task on which the winner must not lose more than `max_drop` (> 0, units of the metric) to any parent.

    against: the parent that decides. difference: winner minus it; low: one-sided 95% lower bound of that. holds: low
    is above -max_drop. broken: a drop beyond max_drop is shown, the two-sided 95% interval lies below -max_drop.
    """

    task: str
    max_drop: float
    against: str
    difference: float
    low: float
    holds: bool
    broken: bool


def contrast(
    tasks: Sequence[TaskSamples],
    against: str,
    resamples: int = 10_000,
    seed: int = 0,
    *,
    task: str | None = None,
) -> Contrast:
    """Resample winner minus one baseline, overall (task None: weighted mean of task differences) or on one task.

    The bootstrap is of item-paired differences, stratified by task and clustered. Metrics with an `aggregate` are
    recomputed on each resample; so that this takes seconds their resamples are at most 2,000,000 / n, and at least
    200. seed: of the resampling; the same call gives the same intervals.

    Raises EvaluationError for tasks, baselines or values that are missing, misaligned or not finite.
    """
    chosen = [t for t in tasks if (t.weight > 0 if task is None else t.task == task)]
    if not chosen:
        known = [t.task for t in tasks]
        raise EvaluationError(
            "compare: no task has a weight above 0"
            if task is None
            else f"no task {task!r}; {nearest(task, known)}"
        )
    if resamples < 200:
        raise EvaluationError(f"compare: expected resamples >= 200, found {resamples}")
    strata = [_stratum(t, against) for t in chosen]
    total = math.fsum(t.weight for t in chosen)
    weights = [1.0] if task is not None else [t.weight / total for t in chosen]
    n = sum(len(t.winner) for t in chosen)
    return Contrast(
        against=against,
        task=task,
        n=n,
        binary=len(chosen) == 1 and strata[0].smoothed is not None and strata[0].clusters == n,
        strata=tuple(strata),
        weights=tuple(weights),
        resampled=resample(strata, weights, resamples, seed),
    )


def compare(
    tasks: Sequence[TaskSamples],
    against: str,
    resamples: int = 10_000,
    seed: int = 0,
    *,
    task: str | None = None,
    level: float = 0.95,
) -> Comparison:
    """`contrast` at one level: winner against one baseline with its interval."""
    if not 0 < level < 1:
        raise EvaluationError(f"compare: expected 0 < level < 1, found {level}")
    return contrast(tasks, against, resamples, seed, task=task).comparison(level)


def same_model(tasks: Sequence[TaskSamples], against: str, *, task: str | None = None) -> Comparison:
    """The comparison of a winner with itself: no difference, and nothing that was estimated."""
    chosen = [t for t in tasks if (t.weight > 0 if task is None else t.task == task)]
    n, clusters = sum(len(t.winner) for t in chosen), sum(len(set(t.clusters)) for t in chosen)
    return Comparison(
        against, 0.0, 0.0, 0.0, n, task, "constant", clusters=clusters, why="the same model", error=0.0
    )


def verdict(
    winner_is_baseline: bool,
    comparisons: Sequence[Comparison],
    margin: float = 0.01,
    guards: Sequence[Guard] = (),
) -> Verdict:
    """The verdict on the overall comparisons with every parent and the uniform merge: the first rule to hold.

    The winner is itself a baseline: `ties`. Every lower end > 0: `beats`, unless a guard does not hold, which turns
    it into `worse` where a drop beyond its limit is shown and into `underpowered` where it is not excluded. Any upper
    end < 0: `worse`. Every interval within +-margin: `ties`. Else `underpowered`. EvaluationError without
    comparisons, which nothing follows from.
    """
    if winner_is_baseline:
        return "ties"
    if not comparisons:
        raise EvaluationError("verdict: expected comparisons with every baseline, found none")
    if all(c.low > 0 for c in comparisons):
        if any(g.broken for g in guards):
            return "worse"
        return "beats" if all(g.holds for g in guards) else "underpowered"
    if any(c.high < 0 for c in comparisons):
        return "worse"
    if all(c.low >= -margin and c.high <= margin for c in comparisons):
        return "ties"
    return "underpowered"


def non_inferior(comparison: Comparison, margin: float) -> bool:
    """Whether the winner loses less than `margin`, by the interval's lower end.

    For the usual one-sided 95 % test, compare with level=0.9.
    """
    return comparison.low > -margin


def guard(parents: Sequence[Contrast], max_drop: float) -> Guard:
    """The non-inferiority test of one guarded task against every parent, so also against the best one.

    parents: the task's contrast with each parent. One-sided at 5%, as an intersection-union test: no correction for
    their number, and none for choosing the best parent on the same items.

    Raises EvaluationError without contrasts, or for a max_drop that is not above 0.
    """
    if not parents or not max_drop > 0:
        raise EvaluationError(
            f"guard: expected max_drop > 0 and a contrast per parent, found {max_drop}, {len(parents)}"
        )
    lows = [c.interval(0.9).low for c in parents]
    worst = int(np.argmin(lows))
    return Guard(
        task=str(parents[worst].task),
        max_drop=max_drop,
        against=parents[worst].against,
        difference=parents[worst].resampled.point,
        low=lows[worst],
        holds=lows[worst] > -max_drop,
        broken=any(c.interval(0.95).high < -max_drop for c in parents),
    )


def _is_binary(values: Values) -> bool:
    return bool(np.isin(np.asarray(values, dtype=np.float64), (0.0, 1.0)).all())


def _stratum(samples: TaskSamples, against: str) -> Stratum:
    where = f"task {samples.task!r}"
    if against not in samples.others:
        raise EvaluationError(f"{where}: no baseline {against!r}; {nearest(against, samples.others)}")
    other = samples.others[against]
    n = len(samples.winner)
    if n == 0 or not n == len(other) == len(samples.clusters):
        raise EvaluationError(
            f"{where}: expected the same items for winner, {against!r} and clusters, "
            f"found {n}, {len(other)} and {len(samples.clusters)}"
        )
    sign = 1.0 if samples.higher_is_better else -1.0
    labels = np.unique(np.asarray(samples.clusters), return_inverse=True)[1]
    members = np.split(np.argsort(labels, kind="stable"), np.flatnonzero(np.diff(np.sort(labels))) + 1)
    if samples.aggregate is not None:
        found = aggregate_stratum(list(samples.winner), list(other), members, samples.aggregate, sign)
        if not math.isfinite(found.point):
            raise EvaluationError(f"{where}: the metric's aggregate is not a finite number")
        return found
    differences = sign * (np.asarray(samples.winner, dtype=np.float64) - np.asarray(other, dtype=np.float64))
    if differences.shape != (n,) or not np.isfinite(differences).all():
        raise EvaluationError(f"{where}: expected one finite number per item, against {against!r}")
    return mean_stratum(differences, members, _is_binary(samples.winner) and _is_binary(other))
