"""Several claims at once: intervals that hold together, by Holm's step-down procedure.

Holm 1979, Scand. J. Statist. 6:65; the bounds that agree with its decisions: Strassburger & Bretz 2008, Stat. Med.
27:4914, and Guilbaud 2008, Biom. J. 50:678.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shoal.errors import EvaluationError
from shoal.search.claims import Contrast

Bound = Callable[[str, float], float]  # (claim, one-sided error) -> lower confidence bound


@dataclass(frozen=True)
class Claimed:
    """One claim of several: the winner's lead over the best of its baselines, with an interval that holds together
    with the other claims' at `level`.

    against, difference: the closest baseline and the lead over it. low: 0 where the lead is shown but another claim
    is not, for Holm then says no more than that. better, worse: low >= 0 was shown by its test; high <= 0 likewise.
    """

    name: str
    against: str
    difference: float
    low: float
    high: float
    better: bool
    worse: bool
    level: float


def simultaneous(claims: Mapping[str, Sequence[Contrast]], level: float = 0.95) -> dict[str, Claimed]:
    """Simultaneous intervals of the winner's lead over the best baseline, per claim (a task, or another winner).

    claims: name -> contrasts with all its baselines. Within a claim, "better" is an intersection-union test over the
    baselines; its upper end is corrected for their number (Bonferroni), as it may be any of them that is better.
    Lower and upper ends are two families, each at (1 - level) / 2.

    Raises EvaluationError without claims, or for a claim without baselines.
    """
    if not claims or not all(claims.values()):
        raise EvaluationError("simultaneous: expected claims, each with at least one baseline")
    tail = (1 - level) / 2

    def lower(name: str, error: float) -> float:
        return min(c.interval(1 - 2 * error).low for c in claims[name])

    def upper(name: str, error: float) -> float:
        share = error / len(claims[name])
        return -min(c.interval(1 - 2 * share).high for c in claims[name])

    better, lows = holm_bounds(list(claims), lower, tail)
    worse, highs = holm_bounds(list(claims), upper, tail)
    found = {}
    for name, contrasts in claims.items():
        closest = min(contrasts, key=lambda c: c.resampled.point)
        found[name] = Claimed(
            name=name,
            against=closest.against,
            difference=closest.resampled.point,
            low=lows[name],
            high=0.0 - highs[name],
            better=name in better,
            worse=name in worse,
            level=level,
        )
    return found


def holm_bounds(names: Sequence[str], bound: Bound, error: float) -> tuple[frozenset[str], dict[str, float]]:
    """The claims whose quantity is shown to be above 0 with familywise error `error`, and lower bounds of all.

    Some are not shown: 0 for the shown, the bound at error / (number not shown) for the others. All are shown: the
    bound at error / (number of claims), at least 0 (Strassburger & Bretz 2008, section 3).
    """
    left = list(names)
    while left:
        shown = [name for name in left if bound(name, error / len(left)) > 0]
        if not shown:
            break
        left = [name for name in left if name not in shown]
    if not left:
        return frozenset(names), {name: max(0.0, bound(name, error / len(names))) for name in names}
    bounds = {name: bound(name, error / len(left)) if name in left else 0.0 for name in names}
    assert not any(math.isnan(b) for b in bounds.values())
    return frozenset(names) - frozenset(left), bounds
