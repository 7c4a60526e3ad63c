"""Which items a generation meets, drawn where the anchors disagree, and what each of them then counts.

An item that every parent and the uniform merge answer alike says little about merges of them. Items are drawn with
unequal inclusion probabilities pi_i, a share of them uniform, and counted 1/pi_i (Horvitz and Thompson 1952, JASA
47:663, eq. 5), so that the expectation of a weighted mean is the mean over the whole pool, whatever the candidates do.
Draws are a pure function of the anchors' scores, the seed and the generation, as in `items.draw`.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shoal.errors import ShoalError
from shoal.search.fitness import Scores
from shoal.search.items import fraction

UNIFORM_SHARE = 0.5


@dataclass(frozen=True)
class Drawn:
    """The items of one task in one generation. items: in the order in which rungs meet them, so that every prefix is
    a fair draw of its own; inclusion: pi of each, in the same order; pool: how many items there are to draw from.
    """

    items: tuple[int, ...]
    inclusion: tuple[float, ...]
    pool: int

    def weights(self, first: int | None = None) -> dict[int, float]:
        """Item -> weight w of the first `first` items (default: all): sum of w x y estimates the mean of y.

        A prefix of m of n items has inclusion pi x m / n, so w = n / (m x pool x pi); for pi = n / pool it is 1 / m.
        """
        m = len(self.items) if first is None else first
        if not 0 < m <= len(self.items):
            raise ShoalError(f"weights: expected 1 to {len(self.items)} items, found {m}")
        scale = len(self.items) / (m * self.pool)
        return {i: scale / pi for i, pi in zip(self.items[:m], self.inclusion[:m], strict=True)}


def disagreement(anchors: Mapping[str, Scores], task: str) -> dict[int, float]:
    """Item -> standard deviation of the anchors' scores: what a difference between merges scales with there.

    Inclusion in proportion to it is Neyman's allocation (1934, JRSS 97:558). ShoalError where the anchors do not
    share their items.
    """
    scores = [anchor[task] for anchor in anchors.values()]
    if not scores or any(set(s) != set(scores[0]) for s in scores):
        raise ShoalError(f"disagreement on task {task!r}: expected the same items of every anchor")
    found = {}
    for item in sorted(scores[0]):
        values = [s[item] for s in scores]
        mean = math.fsum(values) / len(values)
        found[item] = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    return found


def inclusion(
    pool: Sequence[int], n: int, disagree: Mapping[int, float] | None, uniform_share: float = UNIFORM_SHARE
) -> dict[int, float]:
    """Item -> inclusion probability, n in all; every item has at least uniform_share x n / len(pool).

    disagree: None for a uniform draw. uniform_share in (0, 1]: above 0, for an item of probability 0 is never seen,
    and the estimate would be biased by it. Items that would pass 1 are taken for certain and the rest is shared out
    again (Saerndal, Swensson and Wretman 1992, Model Assisted Survey Sampling, section 3.6.2).
    """
    if n < 1 or not pool:
        raise ShoalError(f"inclusion: expected at least one item, found n = {n} of a pool of {len(pool)}")
    if not 0 < uniform_share <= 1:
        raise ShoalError(f"uniform share: expected a number in (0, 1], found {uniform_share}")
    items, total = sorted(pool), len(pool)
    if n >= total:
        return dict.fromkeys(items, 1.0)
    every = 0.0 if disagree is None else math.fsum(disagree[i] for i in items)
    if disagree is None or not every > 0:
        return dict.fromkeys(items, n / total)
    sizes = {i: uniform_share / total + (1 - uniform_share) * disagree[i] / every for i in items}
    certain: set[int] = set()
    while True:
        left = n - len(certain)
        rest = math.fsum(s for i, s in sizes.items() if i not in certain)
        over = {i for i, s in sizes.items() if i not in certain and left * s >= rest}
        if not over:
            return {i: 1.0 if i in certain else left * s / rest for i, s in sizes.items()}
        certain |= over


def systematic(chances: Sequence[float], start: float) -> list[int]:
    """Indices that a grid of step 1 from `start` in [0, 1) falls on, the chances laid end to end.

    Index i is taken with probability chances[i] exactly where `start` is uniform (Madow 1949, Ann. Math. Stat. 20:333).
    ShoalError for a chance above 1 or a sum that is no whole number.
    """
    ends, total = [], 0.0
    for chance in chances:
        total += chance
        ends.append(total)
    n = round(total)
    if not math.isclose(total, n, abs_tol=1e-6) or n < 1 or max(chances) > 1 + 1e-12:
        raise ShoalError(
            f"draw: expected inclusion probabilities up to 1 with a whole sum, found a sum of {total}"
        )
    # the grid is stretched with the rounding of the sum, so that it never misses the last index
    found = (bisect.bisect_right(ends, (start + k) * (total / n)) for k in range(n))
    return sorted({min(k, len(ends) - 1) for k in found})


def draw_weighted(pi: Mapping[int, float], seed: int, generation: int, task: str) -> Drawn:
    """A fixed number of items without replacement, item i with probability pi_i.

    By systematic sampling in an order that is random in every generation (Hartley and Rao 1962, Ann. Math. Stat.
    33:350). The order of `Drawn.items` is random once more and independent of pi.
    """

    def shuffled(ids: Iterable[int], purpose: str) -> list[int]:
        return [i for _, i in sorted((fraction([seed, generation, task, i, purpose]), i) for i in ids)]

    items = shuffled(pi, "order")
    start = fraction([seed, generation, task, "start"])
    taken = shuffled((items[k] for k in systematic([pi[i] for i in items], start)), "rung")
    return Drawn(tuple(taken), tuple(pi[i] for i in taken), len(items))
