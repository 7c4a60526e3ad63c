"""Roles and draws are pure functions of content, the same in every process and for ever."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ShoalError
from shoal.search import assign, draw, role_fraction

ZONES = {"search": (0.0, 0.6), "select": (0.6, 0.8), "test": (0.8, 1.0)}
HASHES = [f"hash{i}" for i in range(2000)]


def test_fractions_never_change() -> None:
    # frozen: an item that was `test` once is `test` in every version of shoal
    # printf '["shoal-roles-1", "hash0"]' | sha256sum, its first 53 bits
    assert role_fraction("hash0") == (0x76A876299FE96E9B >> 11) / 2**53 != role_fraction("hash1")
    assert role_fraction("hash0", salt="other") != role_fraction("hash0")


def test_draws_never_change_and_are_equal_in_a_fresh_process() -> None:
    code = "from shoal.search import draw; print(draw(range(100), 5, seed=1, generation=2, task='arc'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(draw(range(100), 5, seed=1, generation=2, task="arc"))
    assert draw(range(100), 5, seed=1, generation=2, task="arc") == [0, 14, 84, 89, 95]


def test_fractions_are_uniform() -> None:
    counts = np.histogram([role_fraction(h) for h in HASHES], bins=10, range=(0, 1))[0]
    assert counts.sum() == 2000 and ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-square, 9 df, p = .001


def test_zones_partition_the_items_in_order_of_their_fraction() -> None:
    roles = assign(HASHES, ZONES)
    assert sorted(i for items in roles.values() for i in items) == list(range(2000))
    for name, (low, high) in ZONES.items():
        fractions = [role_fraction(HASHES[i]) for i in roles[name]]
        assert fractions == sorted(fractions) and low <= fractions[0] and fractions[-1] < high


@given(st.permutations(HASHES[:30]))
def test_an_items_role_does_not_depend_on_the_items_beside_it(hashes: list[str]) -> None:
    roles = assign(hashes, ZONES)
    whole = assign(HASHES, ZONES)
    for name, items in roles.items():
        mine = [hashes[i] for i in items]
        assert mine == [HASHES[i] for i in whole[name] if i < 30]


def test_items_of_one_cluster_share_a_role_in_order_of_index() -> None:
    roles = assign(["a", "b", "a", "a"], {"search": (0.0, 1.0)})
    assert [i for i in roles["search"] if i != 1] == [0, 2, 3]


@pytest.mark.parametrize(
    ("zones", "message"),
    [
        ({"search": (0.0, 0.5), "test": (0.4, 1.0)}, "'search' and 'test' overlap"),
        ({"search": (0.0, 1.5)}, "0 <= low <= high <= 1"),
    ],
)
def test_zones_that_would_give_two_roles_are_errors(
    zones: dict[str, tuple[float, float]], message: str
) -> None:
    with pytest.raises(ShoalError, match=message):
        assign(HASHES, zones)


@given(
    st.lists(st.integers(0, 10**6), unique=True, max_size=60),
    st.integers(0, 80),
    st.integers(0, 2**63),
    st.integers(0, 500),
    st.randoms(),
)
def test_a_draw_is_a_sorted_subset_that_ignores_the_order_of_the_pool(
    pool: list[int], n: int, seed: int, generation: int, random: object
) -> None:
    drawn = draw(pool, n, seed, generation, "arc")
    assert drawn == sorted(set(drawn)) and set(drawn) <= set(pool) and len(drawn) == min(n, len(pool))
    assert draw(pool[::-1], n, seed, generation, "arc") == drawn
    assert set(draw(pool, n + 1, seed, generation, "arc")) >= set(drawn)


def test_generations_seeds_and_tasks_draw_independently() -> None:
    pool = range(1000)
    first = set(draw(pool, 100, 0, 0, "arc"))
    for seed, generation, task in (
        (1, 0, "arc"),
        (0, 1, "arc"),
        (0, 0, "boolq"),
        (1, 10, "arc"),
        (11, 0, "arc"),
    ):
        assert 1 <= len(first & set(draw(pool, 100, seed, generation, task))) <= 25  # expected 10, sd 2.9


def test_every_item_is_drawn_about_equally_often() -> None:
    counts = np.bincount([i for g in range(400) for i in draw(range(50), 10, 3, g, "arc")], minlength=50)
    assert ((counts - 80) ** 2 / (400 * 0.2 * 0.8)).sum() < 85.4  # chi-square, 49 df, p = .001


def test_a_pool_with_repeats_or_a_negative_number_is_an_error() -> None:
    with pytest.raises(ShoalError, match="names an item twice"):
        draw([1, 1], 1, 0, 0, "arc")
    with pytest.raises(ShoalError, match="n >= 0"):
        draw([1], -1, 0, 0, "arc")
