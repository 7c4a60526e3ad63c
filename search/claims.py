"""What a run may claim: paired differences on held-out items, their intervals, and one of four verdicts.

DESIGN, "search/": Claims. "Beats" is an intersection-union test, every baseline must be beaten, so no
correction for their number is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shoal.errors import EvaluationError, nearest
from shoal.search.bootstrap import Aggregate, Stratum, aggregate_stratum, interval, mean_stratum

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
    method: see `shoal.search.bootstrap.interval`. wins, losses: clusters that the winner or the other side
    wins (0 where counting them would cost too much, for metrics with an aggregate); clusters: in all.
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


def compare(
    tasks: Sequence[TaskSamples],
    against: str,
    resamples: int = 10_000,
    seed: int = 0,
    *,
    task: str | None = None,
    level: float = 0.95,
) -> Comparison:
    """Winner against one baseline, overall (task None: weighted mean of task differences) or on one task.

    The interval is a bootstrap of item-paired differences, stratified by task and clustered, BCa where it can
    be. Metrics with an `aggregate` are recomputed on each resample; so that this takes seconds their
    resamples are at most 2,000,000 / n, and at least 200. seed: of the resampling; the same call gives the
    same interval.

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
    if resamples < 200 or not 0 < level < 1:
        raise EvaluationError(
            f"compare: expected resamples >= 200, 0 < level < 1; found {resamples}, {level}"
        )
    strata = [_stratum(t, against) for t in chosen]
    total = math.fsum(t.weight for t in chosen)
    weights = [1.0] if task is not None else [t.weight / total for t in chosen]
    low, high, method = interval(strata, weights, resamples, seed, level)
    return Comparison(
        against=against,
        difference=math.fsum(w * s.point for s, w in zip(strata, weights, strict=True)),
        low=low,
        high=high,
        n=sum(len(t.winner) for t in chosen),
        task=task,
        method=method,
        wins=sum(int((s.swaps > 0).sum()) for s in strata),
        losses=sum(int((s.swaps < 0).sum()) for s in strata),
        clusters=sum(s.clusters for s in strata),
        level=level,
    )


def verdict(winner_is_baseline: bool, comparisons: Sequence[Comparison], margin: float = 0.01) -> Verdict:
    """The verdict on the overall comparisons with every parent and the uniform merge: the first rule to hold.

    The winner is itself a baseline: `ties`. Every lower end > 0: `beats`. Any upper end < 0: `worse`. Every
    interval within +-margin: `ties`. Else `underpowered`. EvaluationError without comparisons, which nothing
    follows from.
    """
    if winner_is_baseline:
        return "ties"
    if not comparisons:
        raise EvaluationError("verdict: expected comparisons with every baseline, found none")
    if all(c.low > 0 for c in comparisons):
        return "beats"
    if any(c.high < 0 for c in comparisons):
        return "worse"
    if all(c.low >= -margin and c.high <= margin for c in comparisons):
        return "ties"
    return "underpowered"


def non_inferior(comparison: Comparison, margin: float) -> bool:
    """Whether a guard task holds: the winner loses less than `margin` there, by the interval's lower end.

    For the usual one-sided 95 % test, compare with level=0.9.
    """
    return comparison.low > -margin


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
    return mean_stratum(differences, members)
