"""The power table of the reference notes, and the exact test."""

import math

import pytest
from scipy.stats import binomtest

from shoal.errors import ShoalError
from shoal.search import detectable_difference, items_needed, mcnemar_exact
from shoal.search.power import _quantiles

TABLE = {  # discordant rate -> items for +1, +2, +3, +5 points: algorithms.md, section 3
    0.1: (7838, 1958, 869, 312),
    0.2: (15678, 3918, 1740, 625),
    0.3: (23518, 5878, 2611, 939),
}
CELLS = [(p, d, n) for p, row in TABLE.items() for d, n in zip((0.01, 0.02, 0.03, 0.05), row, strict=True)]


@pytest.mark.parametrize(("discordant", "gain", "items"), CELLS)
def test_the_table_is_connors_formula_and_both_functions_agree_with_it(
    discordant: float, gain: float, items: int
) -> None:
    rounded = (1.96 * math.sqrt(discordant) + 0.84 * math.sqrt(discordant - gain**2)) ** 2 / gain**2
    assert math.ceil(rounded) == items
    assert items_needed(gain, discordant) == pytest.approx(items, rel=0.004)  # exact normal quantiles
    assert detectable_difference(items, discordant) == pytest.approx(gain, rel=0.002)


@pytest.mark.parametrize("n", [10, 60, 312, 5000])
@pytest.mark.parametrize("discordant", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("power", [0.3, 0.8, 0.95])
def test_one_function_is_the_inverse_of_the_other(n: int, discordant: float, power: float) -> None:
    gain = detectable_difference(n, discordant, power, alpha=0.1)
    share = max(discordant, gain)  # a gain needs at least as many discordant items
    assert items_needed(gain, share, power, alpha=0.1) == pytest.approx(n, rel=1e-9)


def test_fewer_items_show_less_and_some_show_nothing() -> None:
    gains = [detectable_difference(n) for n in (3, 4, 10, 50, 500, 5000)]
    assert gains[0] == math.inf and gains[1] < 1
    assert gains == sorted(gains, reverse=True)
    assert detectable_difference(500) == pytest.approx(0.056, abs=5e-4)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (5, 0), (0, 5), (6, 0), (15, 5), (3, 3), (120, 90)])
def test_mcnemar_is_the_exact_binomial_test(b: int, c: int) -> None:
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(expected, rel=1e-9)


def test_impossible_arguments_are_errors() -> None:
    with pytest.raises(ShoalError, match="n >= 1"):
        detectable_difference(0)
    with pytest.raises(ShoalError, match="expected counts"):
        mcnemar_exact(-1, 2)
    with pytest.raises(ShoalError, match="0 < difference <= discordant"):
        items_needed(0.3, 0.2)
    with pytest.raises(ShoalError, match="power and alpha"):
        _quantiles(1.0, 0.05)
