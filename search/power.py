"""How small a gain the test items can show, and the exact test for paired 0/1 outcomes."""

from __future__ import annotations

import math

from scipy.special import bdtr, ndtri

from shoal.errors import ShoalError


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


def detectable_difference(n: int, discordant: float = 0.2, power: float = 0.8, alpha: float = 0.05) -> float:
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


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact p of b wins against c losses among discordant pairs (binomial, p = 1/2); 1 where b + c
    = 0.

    McNemar 1947, Psychometrika 12:153, with the exact binomial in place of chi-square.
    """
    if b < 0 or c < 0:
        raise ShoalError(f"mcnemar: expected counts, found {b} and {c}")
    return 1.0 if b == c else min(1.0, 2.0 * float(bdtr(min(b, c), b + c, 0.5)))


def _quantiles(power: float, alpha: float) -> tuple[float, float]:
    if not (0 < power < 1 and 0 < alpha < 1):
        raise ShoalError(f"power: expected power and alpha in (0, 1), found {power}, {alpha}")
    return float(ndtri(1 - alpha / 2)), float(ndtri(power))
