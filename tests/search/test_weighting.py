"""Items are drawn where anchors disagree, and weighted so that nothing is biased by it."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shoal.errors import ShoalError
from shoal.search.fitness import paired_fitness, task_difference
from shoal.search.weighting import Drawn, disagreement, draw_weighted, inclusion, systematic

DISAGREE = {i: (i % 7) ** 2 / 50 for i in range(60)}


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=30),
    st.integers(1, 30),
    st.floats(0.01, 1),
    st.randoms(use_true_random=False),
)
def test_the_expectation_of_the_weighted_paired_difference_is_the_mean_over_the_pool(
    disagree: list[float], n: int, share: float, random: object
) -> None:
    """Exactly: over all starts of the grid, between which the draw changes at finitely many points."""
    pool = list(range(len(disagree)))
    pi = inclusion(pool, n, dict(enumerate(disagree)), share)
    candidate = {"t": {i: random.uniform(-1, 1) for i in pool}}  # type: ignore[attr-defined]
    anchor = {"t": {i: random.uniform(-1, 1) for i in pool}}  # type: ignore[attr-defined]
    ends = np.cumsum([pi[i] for i in pool])
    edges = np.unique(np.concatenate([[0.0, 1.0], ends % 1.0]))
    expected = 0.0
    for low, high in pairwise(edges):
        if high - low < 1e-9:
            continue
        items = systematic([pi[i] for i in pool], (low + high) / 2)
        drawn = Drawn(tuple(items), tuple(pi[i] for i in items), len(pool))
        met = {"t": {i: candidate["t"][i] for i in items}}
        expected += (high - low) * paired_fitness(met, anchor, {"t": 1.0}, {"t": 1.0}, {"t": drawn.weights()})
    full = paired_fitness(candidate, anchor, {"t": 1.0}, {"t": 1.0})
    assert expected == pytest.approx(full, abs=1e-6 / min(pi.values()))


def test_draws_and_their_rungs_are_unbiased_over_generations() -> None:
    pool = list(range(60))
    pi = inclusion(pool, 12, DISAGREE, 0.3)
    y = {i: math.sin(i) + DISAGREE[i] for i in pool}
    truth = sum(y.values()) / 60
    for first in (12, 4):
        found = []
        for generation in range(3000):
            drawn = draw_weighted(pi, 1, generation, "arc")
            found.append(sum(w * y[i] for i, w in drawn.weights(first).items()))
        assert abs(np.mean(found) - truth) < 4 * np.std(found) / math.sqrt(3000)
    seen = np.zeros(60)
    for generation in range(3000):
        seen[list(draw_weighted(pi, 1, generation, "arc").items)] += 1
    expected = np.array([pi[i] for i in pool])
    assert (np.abs(seen / 3000 - expected) < 4.5 * np.sqrt(expected * (1 - expected) / 3000)).all()


def test_where_anchors_disagree_the_estimate_is_more_precise() -> None:
    rng = np.random.default_rng(0)
    d = {i: rng.normal() * (2.0 if i < 12 else 0.05) for i in range(60)}
    size = {i: 2.0 if i < 12 else 0.05 for i in d}

    def spread(disagree: dict[int, float] | None) -> float:
        pi = inclusion(range(60), 12, disagree, 0.3)
        draws = [draw_weighted(pi, 0, g, "t") for g in range(400)]
        return float(np.std([sum(w * d[i] for i, w in drawn.weights().items()) for drawn in draws]))

    assert spread(size) < 0.7 * spread(None)


@given(st.integers(1, 80), st.floats(0.01, 1), st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_inclusion_sums_to_n_and_leaves_every_item_its_uniform_share(
    n: int, share: float, disagree: list[float]
) -> None:
    pool = range(len(disagree))
    pi = inclusion(pool, n, dict(enumerate(disagree)), share)
    assert math.fsum(pi.values()) == pytest.approx(min(n, len(pool)))
    assert all(
        share * min(n, len(pool)) / len(pool) <= p * (1 + 1e-9) and p <= 1 + 1e-12 for p in pi.values()
    )
    for i in pool:
        for j in pool:
            assert disagree[i] < disagree[j] or pi[i] >= pi[j] * (1 - 1e-9)


def test_without_disagreement_every_item_has_the_same_chance_and_weight() -> None:
    for disagree in (None, dict.fromkeys(range(10), 0.0)):
        pi = inclusion(range(10), 4, disagree)
        assert set(pi.values()) == {0.4}
        drawn = draw_weighted(pi, 0, 0, "t")
        assert len(drawn.items) == 4 and set(drawn.weights().values()) == {0.25}
    everything = draw_weighted(inclusion(range(10), 99, None), 0, 0, "t")
    assert sorted(everything.items) == list(range(10)) and set(everything.weights().values()) == {0.1}


def test_draws_are_equal_in_a_fresh_process_and_differ_between_generations_tasks_and_seeds() -> None:
    pi = inclusion(range(100), 5, None)
    code = (
        "from shoal.search.weighting import draw_weighted, inclusion\n"
        "print(draw_weighted(inclusion(range(100), 5, None), 1, 2, 'arc').items)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first = draw_weighted(pi, 1, 2, "arc").items
    assert done.stdout.strip() == str(first)
    others = [draw_weighted(pi, *key).items for key in ((1, 3, "arc"), (2, 2, "arc"), (1, 2, "boolq"))]
    assert all(set(other) != set(first) for other in others)
    assert draw_weighted(dict(reversed(list(pi.items()))), 1, 2, "arc").items == first


def test_disagreement_is_the_deviation_between_anchors() -> None:
    anchors = {"a": {"t": {0: 1.0, 1: 0.5}}, "b": {"t": {0: 0.0, 1: 0.5}}}
    assert disagreement(anchors, "t") == {0: 0.5, 1: 0.0}
    with pytest.raises(ShoalError, match="the same items"):
        disagreement({**anchors, "c": {"t": {0: 1.0}}}, "t")


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
def test_the_error_of_a_weighted_mean_is_that_of_a_draw_with_replacement(values: list[float]) -> None:
    assume(len(set(values)) > 1)
    ours = {"t": dict(enumerate(values))}
    zero = {"t": dict.fromkeys(range(len(values)), 0.0)}
    found = task_difference(ours, zero, "t")
    assert found.mean == pytest.approx(np.mean(values))
    assert found.error == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)))
    assert task_difference({"t": {0: 1.0}}, zero, "t").error == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inclusion([], 1, None), "at least one item"),
        (lambda: inclusion([1], 0, None), "at least one item"),
        (lambda: inclusion([1], 1, None, 0.0), r"in \(0, 1\], found 0"),
        (lambda: systematic([0.5, 0.2], 0.0), "whole sum, found a sum of 0.7"),
        (lambda: systematic([1.5, 0.5], 0.0), "up to 1"),
        (lambda: draw_weighted({1: 1.0}, 0, 0, "t").weights(2), "1 to 1 items, found 2"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(call: object, message: str) -> None:
    with pytest.raises(ShoalError, match=message):
        call()  # type: ignore[operator]
