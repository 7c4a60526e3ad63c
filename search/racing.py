"""Racing in rungs: the candidates of a generation meet its items part by part, and clear losers stop early.

CMA-ES without negative weights uses the order of the best mu candidates only, so a candidate that is surely not among
them need not be scored to the end (Heidrich-Meisner and Igel 2009, "Hoeffding and Bernstein races for selecting policies
in evolutionary direct policy search", ICML). The test is a paired one, over the items that both have met.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from scipy.special import stdtrit

from shoal.errors import ShoalError
from shoal.search.fitness import ItemWeights, Scores, paired_estimate

RUNGS = 3
# of the one-sided test, per candidate and rung. On a simulated item model 0.2 saves a quarter of all item evaluations, 0.05
# a sixth; dropping one of the best mu by mistake costs one rank, no more
LEVEL = 0.2
GAP = 1e-9  # in units of fitness: what lies between two candidates that are told in a given order


def rung_ends(n: int, rungs: int = RUNGS) -> tuple[int, ...]:
    """How many of n items a candidate has met after each rung, in equal parts; fewer rungs where n is less."""
    if n < 1 or rungs < 1:
        raise ShoalError(f"rungs: expected at least one item and one rung, found {n} and {rungs}")
    return tuple(sorted({math.ceil(n * (k + 1) / rungs) for k in range(rungs)}))


def survivors(
    scores: Mapping[str, Scores],
    ranked: Sequence[str],
    mu: int,
    weights: Mapping[str, float],
    scales: Mapping[str, float],
    item_weights: ItemWeights,
    level: float = LEVEL,
) -> list[str]:
    """Who goes on to the next rung: the first mu of `ranked`, best first, and all that are not surely behind the mu-th.

    scores: of each candidate, on the same items. A candidate is dropped where a one-sided paired t-test of level
    `level` says that the mu-th best is better; equal scores on all items are never a reason. In ranked order.
    """
    if mu < 1:
        raise ShoalError(f"racing: expected mu >= 1, found {mu}")
    kept = list(ranked[:mu])
    for name in ranked[mu:]:
        lead = paired_estimate(scores[ranked[mu - 1]], scores[name], weights, scales, item_weights)
        freedom = lead.items - sum(1 for weight in weights.values() if weight > 0)
        if freedom < 1 or not lead.mean > float(stdtrit(freedom, 1 - level)) * lead.error:
            kept.append(name)
    return kept


def told_values(tiers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One value per candidate, in which every tier lies below all tiers before it and keeps its own differences.

    tiers: best first; name -> estimate. A tier that overlaps the one above it (it rests on fewer items, or breaks a
    constraint) is moved down as a whole.
    """
    told: dict[str, float] = {}
    floor = math.inf
    for tier in tiers:
        if not tier:
            continue
        top = max(tier.values())
        down = max(0.0, top - floor + GAP) if math.isfinite(floor) else 0.0
        told.update({name: value - down for name, value in tier.items()})
        floor = min(told[name] for name in tier)
    return told
