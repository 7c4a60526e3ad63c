"""Racing drops clear losers only, keeps mu, and leaves a rank to everyone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ShoalError
from shoal.search.racing import rung_ends, survivors, told_values

ONE = {"t": 1.0}


def scores(
    means: dict[str, float], items: int = 20, noise: float = 0.1
) -> dict[str, dict[str, dict[int, float]]]:
    rng = np.random.default_rng(0)
    return {n: {"t": {i: m + noise * rng.normal() for i in range(items)}} for n, m in means.items()}


def counts(items: int) -> dict[str, dict[int, float]]:
    return {"t": dict.fromkeys(range(items), 1 / items)}


def test_clear_losers_leave_and_close_ones_stay() -> None:
    found = scores({"a": 0.9, "b": 0.8, "close": 0.79, "far": 0.2})
    assert survivors(found, ["a", "b", "close", "far"], 2, ONE, ONE, counts(20)) == ["a", "b", "close"]


def test_equal_scores_are_no_reason_to_drop_anybody() -> None:
    found = scores(dict.fromkeys("abcd", 0.5), noise=0.0)
    assert survivors(found, list("abcd"), 2, ONE, ONE, counts(20)) == list("abcd")


def test_one_item_tells_nothing() -> None:
    found = scores({"a": 1.0, "b": 1.0, "c": 0.0}, items=1, noise=0.0)
    assert survivors(found, list("abc"), 2, ONE, ONE, counts(1)) == list("abc")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(1, 12), st.integers(1, 30))
def test_at_least_mu_go_on_and_nobody_overtakes(means: list[float], mu: int, items: int) -> None:
    found = scores({str(k): m for k, m in enumerate(means)}, items=items)
    ranked = sorted(found, key=lambda name: -sum(found[name]["t"].values()))
    kept = survivors(found, ranked, mu, ONE, ONE, counts(items))
    assert kept[:mu] == ranked[:mu] and len(kept) >= min(mu, len(ranked))
    assert kept == [name for name in ranked if name in kept]


def test_a_loser_by_luck_is_dropped_rarely() -> None:
    """Equally good candidates: the second is dropped at most as often as the level of the test says."""
    rng = np.random.default_rng(1)
    dropped = 0
    for _ in range(600):
        found = {n: {"t": dict(enumerate(rng.normal(size=12)))} for n in "ab"}
        dropped += len(survivors(found, ["a", "b"], 1, ONE, ONE, counts(12), level=0.2)) == 1
    assert 0.14 < dropped / 600 < 0.26


def test_rungs_are_equal_parts_and_end_with_all_items() -> None:
    assert rung_ends(64) == (22, 43, 64)
    assert rung_ends(3) == (1, 2, 3) and rung_ends(2) == (1, 2) and rung_ends(1) == (1,)
    with pytest.raises(ShoalError, match="at least one item"):
        rung_ends(0)
    with pytest.raises(ShoalError, match="mu >= 1"):
        survivors({}, [], 0, ONE, ONE, counts(1))


@given(st.lists(st.lists(st.floats(-1, 1), max_size=5), min_size=1, max_size=5))
def test_told_values_keep_tiers_apart_and_order_within_them(tiers: list[list[float]]) -> None:
    named = [{f"{t}.{k}": value for k, value in enumerate(tier)} for t, tier in enumerate(tiers)]
    told = told_values(named)
    assert set(told) == {name for tier in named for name in tier}
    floor = float("inf")
    for tier in named:
        if tier:
            assert max(told[name] for name in tier) < floor
            floor = min(told[name] for name in tier)
        for a in tier:
            for b in tier:
                if tier[a] > tier[b] + 1e-12:
                    assert told[a] > told[b]
    assert all(told[name] == value for name, value in named[0].items())
