"""The power table of the reference notes, and the exact test."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from shoal.errors import ShoalError
from shoal.search import (
    TaskSamples,
    compare,
    detectable_difference,
    effective_items,
    items_needed,
    mcnemar_exact,
)
from shoal.search.power import _quantiles, detectable_at

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


def test_mid_p_counts_the_observed_outcome_half() -> None:
    assert mcnemar_exact(5, 0, mid=True) == pytest.approx(1 / 32)
    assert mcnemar_exact(3, 3, mid=True) == 1.0
    # Fagerland, Lydersen & Laake 2013, BMC Med. Res. Methodol. 13:91, table 1 (airway hyper-responsiveness)
    assert mcnemar_exact(1, 7) == pytest.approx(0.0703, abs=5e-5)
    assert mcnemar_exact(1, 7, mid=True) == pytest.approx(0.0391, abs=5e-5)


def test_items_of_weighted_tasks_and_clusters_are_worth_fewer() -> None:
    singles = [1] * 300
    assert effective_items([2.0], [singles]) == pytest.approx(300)
    assert effective_items([1, 1], [singles, singles]) == pytest.approx(600)
    assert effective_items([1, 3], [singles, singles]) == pytest.approx(300 / (1 / 16 + 9 / 16))
    assert effective_items([1, 0], [singles, [1, 1]]) == pytest.approx(300)
    assert effective_items([1], [[5] * 60], correlation=1.0) == pytest.approx(60)
    assert effective_items([1], [[5] * 60], correlation=0.0) == pytest.approx(300)
    assert effective_items([1], [[5] * 60], correlation=0.25) == pytest.approx(150)
    # one large cluster weighs more than its share: sum m^2 / n = (100 + 100) / 110
    assert effective_items([1], [[10] + [1] * 100], 0.5) == pytest.approx(110 / (1 + (200 / 110 - 1) / 2))
    with pytest.raises(ShoalError, match="cluster sizes above 0"):
        effective_items([1.0], [[]])
    with pytest.raises(ShoalError, match="2 weights and 1 lists"):
        effective_items([1.0, 2.0], [[1]])


@pytest.mark.parametrize("case", ["one task", "two tasks", "clusters"])
def test_the_difference_that_can_be_shown_is_shown_in_four_of_five_runs(case: str) -> None:
    weights = (1.0, 3.0) if case == "two tasks" else (1.0,)
    size = 4 if case == "clusters" else 1
    sizes = [[size] * (600 // size), [size] * (300 // size)][: len(weights)]
    gain = detectable_difference(effective_items(weights, sizes, correlation=0.25))
    generator, runs, shown = np.random.default_rng(11), 400, 0
    for run in range(runs):
        tasks = []
        for number, (weight, clusters) in enumerate(zip(weights, sizes, strict=True)):
            n = sum(clusters)
            u, alone = np.repeat(generator.random(len(clusters)), clusters), generator.random(n)
            u = np.where(generator.random(n) < (0.5 if size > 1 else 0.0), u, alone)
            win, lose = 0.1 + gain / 2, 0.1 - gain / 2
            ours, theirs = (u < win) * 1.0, ((u >= win) & (u < win + lose)) * 1.0
            labels = [str(i // size) for i in range(n)]
            tasks.append(TaskSamples(str(number), weight, True, ours, {"base": theirs}, labels))
        shown += compare(tasks, "base", resamples=1000, seed=run).low > 0
    assert shown / runs == pytest.approx(0.8, abs=3 * 0.02)


def test_what_a_measured_error_can_show() -> None:
    assert detectable_at(0.01) == pytest.approx(0.02802, abs=1e-5)
    # for a small gain Connor's formula is this one, with the error of p discordant items in n
    assert detectable_at((0.2 / 5000) ** 0.5) == pytest.approx(detectable_difference(5000), rel=0.01)


def test_impossible_arguments_are_errors() -> None:
    with pytest.raises(ShoalError, match="n >= 1"):
        detectable_difference(0)
    with pytest.raises(ShoalError, match="expected counts"):
        mcnemar_exact(-1, 2)
    with pytest.raises(ShoalError, match="0 < difference <= discordant"):
        items_needed(0.3, 0.2)
    with pytest.raises(ShoalError, match="power and alpha"):
        _quantiles(1.0, 0.05)
