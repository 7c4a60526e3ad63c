"""How small a gain the test items can show in one comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import ndtri

from shoal.errors import ShoalError

CORRELATION = 0.1  # of paired differences within a cluster, assumed before anything is scored


def items_needed(difference: float, discordant: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """Paired 0/1 items needed to show `difference` (a fraction) with `power` in a two-sided test at level
    `alpha`.

    n = (z_(1-alpha/2) sqrt(p) + z_power sqrt(p - d^2))^2 / d^2 with p the share of discordant items (Connor
    1987, Biometrics 43:207). The table in our reference notes is this formula with z rounded to 1.96 and
    0.84.
    """
    if not 0 < difference <= discordant <= 1:
        raise ShoalError(
            f"power: expected 0 < difference <= discordant <= 1, found {difference}, {discordant}"
        )
    za, zb = _quantiles(power, alpha)
    return (za * math.sqrt(discordant) + zb * math.sqrt(discordant - difference**2)) ** 2 / difference**2


def detectable_difference(
    n: float, discordant: float = 0.2, power: float = 0.8, alpha: float = 0.05
) -> float:
    """The smallest gain (a fraction: 0.05 is 5 points) that n paired 0/1 items show: `items_needed` solved
    for it.

    discordant: share of items on which winner and parent differ; a gain cannot exceed it, so for very few
    items it is raised to the gain itself. inf where not even a gain of 1 could be shown (n below 4 at the
    defaults).
    """
    if n < 1 or not 0 < discordant <= 1:
        raise ShoalError(f"power: expected n >= 1 and 0 < discordant <= 1, found {n}, {discordant}")
    za, zb = _quantiles(power, alpha)

    def solved(share: float) -> float:
        # with d = sqrt(p) u Connor's formula is quadratic in u: sqrt(n) u = za + zb sqrt(1 - u^2)
        inner = n - za**2 + zb**2
        if inner < 0:
            return math.inf
        return math.sqrt(share) * (za * math.sqrt(n) + zb * math.sqrt(inner)) / (n + zb**2)

    if solved(discordant) <= discordant:
        return solved(discordant)
    # here every discordant item is a win, d = p, so d = sqrt(d) u and d = u^2
    share = solved(1.0) ** 2
    return share if share <= 1 else math.inf


def effective_items(
    weights: Sequence[float], clusters: Sequence[Sequence[int]], correlation: float = CORRELATION
) -> float:
    """The number of equally weighted, independent items that show as much as the items of several tasks.

    n with 1 / n = sum over tasks of w^2 D / n_t (w: normalised weights; tasks of weight 0 count nothing), and Kish's
    design effect D = 1 + (sum of m^2 / n_t - 1) correlation for clusters of m items (Kish 1965, Survey Sampling, 5.4).
    Exact for one share of discordant items and one gain in all tasks. clusters: sizes per task. correlation: of the
    paired differences within a cluster; 1 where only clusters count.
    """
    total = math.fsum(weights)
    if (
        not total > 0
        or len(weights) != len(clusters)
        or not all(sizes and min(sizes) > 0 for sizes in clusters)
    ):
        raise ShoalError(
            f"power: expected a weight and cluster sizes above 0 for each task, found {len(weights)} weights and"
            f" {len(clusters)} lists of sizes"
        )
    parts = []
    for weight, sizes in zip(weights, clusters, strict=True):
        n = sum(sizes)
        effect = 1 + (sum(m * m for m in sizes) / n - 1) * correlation
        parts.append((weight / total) ** 2 * effect / n)
    return 1 / math.fsum(parts)


def detectable_at(error: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest gain that a comparison shows whose difference has this standard error, as found afterwards."""
    za, zb = _quantiles(power, alpha)
    return (za + zb) * error


def _quantiles(power: float, alpha: float) -> tuple[float, float]:
    if not (0 < power < 1 and 0 < alpha < 1):
        raise ShoalError(f"power: expected power and alpha in (0, 1), found {power}, {alpha}")
    return float(ndtri(1 - alpha / 2)), float(ndtri(power))
