"""When the objective stops ranking as the metric does, and when items are too few, it is found out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.search.agreement import (
    POINTS,
    Agreement,
    Point,
    agreement,
    at_length,
    kendall,
    more_items,
    spearman,
)


def anchors(
    means: dict[str, float], noise: float = 0.01, items: int = 50
) -> dict[str, dict[str, dict[int, float]]]:
    rng = np.random.default_rng(0)
    return {n: {"t": {i: m + noise * rng.normal() for i in range(items)}} for n, m in means.items()}


def points(slope: float, noise: float, n: int = 30) -> list[Point]:
    rng = np.random.default_rng(3)
    return [Point(x, slope * x + noise * rng.normal()) for x in rng.normal(size=n)]


def test_anchors_in_the_same_order_agree() -> None:
    found = agreement(
        anchors({"a": 0.1, "b": 0.2, "c": 0.3}), anchors({"a": 0.3, "b": 0.5, "c": 0.6}), "t", "c"
    )
    assert (found.tau, found.points, found.anchors, found.pairs) == (1.0, 3, 3, 3)
    assert not found.lost


def test_an_objective_that_prefers_the_worst_anchor_is_given_up_before_the_first_generation() -> None:
    found = agreement(
        anchors({"base": 0.5, "a": 0.3, "b": 0.2}), anchors({"base": 0.1, "a": 0.5, "b": 0.6}), "t", "base"
    )
    assert found.tau == -1.0 and found.anchors == -3 and found.lost


def test_anchors_that_cannot_be_told_apart_say_nothing() -> None:
    noisy = agreement(
        anchors({"a": 0.50, "b": 0.51}, noise=0.5), anchors({"a": 0.51, "b": 0.50}, noise=0.5), "t", "a"
    )
    assert noisy.pairs == 0 and not noisy.lost
    same = anchors({"a": 0.5, "b": 0.5}, noise=0.0)
    assert agreement(same, same, "t", "a").pairs == 0


def test_generations_count_once_there_are_enough() -> None:
    few = [Point(k, -k) for k in range(POINTS - 3)]
    one = anchors({"a": 0.5, "b": 0.5}, noise=0.0)
    assert agreement(one, one, "t", "a", few).tau < 0 and not agreement(one, one, "t", "a", few).lost
    many = [Point(k, -k) for k in range(POINTS)]
    assert agreement(one, one, "t", "a", many).lost


@pytest.mark.parametrize(("slope", "lost"), [(1.0, False), (0.5, False), (-1.0, True)])
def test_a_noisy_objective_that_still_helps_is_kept(slope: float, lost: bool) -> None:
    one = anchors({"a": 0.5}, noise=0.0)
    assert agreement(one, one, "t", "a", points(slope, 1.0)).lost is lost


def test_tau_allows_for_ties_and_is_nan_where_it_is_undefined() -> None:
    tau, p = kendall([Point(1, 1), Point(2, 1), Point(3, 2), Point(4, 3)])
    assert tau == pytest.approx(5 / math.sqrt(6 * 5)) and p > 0.9
    assert kendall(points(-1.0, 0.1))[1] < 0.001
    assert all(map(math.isnan, kendall([Point(1, 1), Point(2, 2)])))
    assert all(map(math.isnan, kendall([Point(1, 5), Point(2, 5), Point(3, 5)])))
    assert not Agreement(math.nan, math.nan, 99, 0, 0).lost


def test_a_metric_at_its_floor_is_no_reason_to_give_up_the_objective() -> None:
    """Nearly all candidates get nothing right: the metric says nothing, and the objective is all there is."""
    one = anchors({"a": 0.5}, noise=0.0)
    lost = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        floor = [Point(x, float(rng.random() < 0.1)) for x in rng.normal(size=30)]
        lost += agreement(one, one, "t", "a", floor).lost
    assert lost < 20  # the level of the test, where true agreement is none at all


def test_an_objective_that_agrees_weakly_is_kept_in_nearly_every_generation() -> None:
    one = anchors({"a": 0.5}, noise=0.0)
    lost = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        weak = [Point(x, 0.5 * x + rng.normal()) for x in rng.normal(size=30)]  # tau about 0.3
        lost += agreement(one, one, "t", "a", weak).lost
    assert lost <= 1


def test_items_grow_when_halves_of_two_generations_disagree() -> None:
    assert more_items([0.9, 0.8], 16, 512) == 16
    assert more_items([0.1, 0.2], 16, 512) == 24
    assert more_items([0.1], 16, 512) == 16  # one generation is luck
    assert more_items([0.1, math.nan, 0.9], 16, 512) == 16
    assert more_items([0.0, 0.1], 400, 512) == 512 and more_items([0.0, 0.1], 512, 512) == 512


def test_halves_rank_alike_or_not() -> None:
    assert spearman([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == pytest.approx(1.0)
    assert spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert math.isnan(spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])) and math.isnan(spearman([1.0], [1.0]))


@given(st.floats(-1, 1), st.floats(1, 10))
def test_longer_halves_correlate_more(r: float, factor: float) -> None:
    assert max(0.0, r) - 1e-12 <= at_length(r, factor) <= 1 + 1e-12
    assert at_length(r, 1.0) == pytest.approx(max(0.0, r))


def test_doubling_follows_spearman_and_brown() -> None:
    """Measured: the correlation of two sums of 20 noisy items, from that of two sums of 10."""
    rng = np.random.default_rng(0)
    ability = rng.normal(size=4000)
    items = ability[:, None] + 3 * rng.normal(size=(4000, 40))
    ten = np.corrcoef(items[:, :10].sum(1), items[:, 10:20].sum(1))[0, 1]
    twenty = np.corrcoef(items[:, :20].sum(1), items[:, 20:].sum(1))[0, 1]
    assert at_length(float(ten), 2.0) == pytest.approx(twenty, abs=0.03)
