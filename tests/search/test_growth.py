"""Growing a search: the lift is exact, what was learnt is kept, and stalls are told from noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import ShoalError
from shoal.search import CMAES, Space, default_sigma0, make_space
from shoal.search.growth import grow, level, lift_map, stalled
from shoal.types import ParameterSpec, TensorGroup

WEIGHT = ParameterSpec("weight", "source", -0.2, 1.5, default=None)
DENSITY = ParameterSpec("density", "source", 0.1, 1.0, 0.5, domain=(0.0, 1.0))
TYPES = ("attn", "mlp")


def space_of(layers: int, shape: Any, **options: Any) -> Space:
    groups = [
        TensorGroup(f"layers.{i}.{kind}", i, kind, (f"{i}.{kind}",))  # type: ignore[arg-type]
        for i in range(layers)
        for kind in TYPES
    ]
    groups += [TensorGroup("embed", None, "embed", ("embed",)), TensorGroup("norm", None, "norm", ("norm",))]
    return make_space(
        shape,
        groups,
        ("base", "a", "b"),
        0,
        (1, 2),
        "ties@1",
        (WEIGHT, DENSITY),
        dtype="float32",
        seed=3,
        **options,
    )


# (coarser, finer) that nest on every number of layers from 4 on
NESTED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"shape": "uniform"}, {"shape": "blocks", "blocks": 3}),
    ({"shape": "uniform"}, {"shape": "curve", "coefficients": 3}),
    ({"shape": "uniform"}, {"shape": "layers", "tensor_types": TYPES}),
    ({"shape": "uniform"}, {"shape": "uniform", "tensor_types": TYPES}),
    ({"shape": "blocks", "blocks": 2}, {"shape": "blocks", "blocks": 4}),
    ({"shape": "blocks", "blocks": 3}, {"shape": "layers"}),
    ({"shape": "curve", "coefficients": 2}, {"shape": "curve", "coefficients": 4}),
    ({"shape": "curve", "coefficients": 2}, {"shape": "curve", "coefficients": 2, "tensor_types": TYPES}),
    ({"shape": "curve", "coefficients": 3, "bounds": {"density": (0.1, 1.0)}}, {"shape": "layers"}),
]


@given(st.sampled_from(NESTED), st.integers(4, 12), st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None)
def test_the_lifted_genome_is_the_same_merge(
    pair: tuple[dict[str, Any], dict[str, Any]], layers: int, seed: int
) -> None:
    coarser, finer = (space_of(layers, **options) for options in pair)
    rng = np.random.default_rng(seed)
    genome = rng.uniform(coarser.low, coarser.high)
    before, after = coarser.decode(genome), finer.decode(lift_map(coarser, finer)(genome))
    assert [g.name for g in before.groups] == [g.name for g in after.groups]
    for a, b in zip(before.groups, after.groups, strict=True):
        for s, t in zip(a.sources, b.sources, strict=True):
            assert s.parameters.keys() == t.parameters.keys()
            assert max(abs(s.parameters[k] - t.parameters[k]) for k in s.parameters) <= 1e-12


@given(st.sampled_from(NESTED), st.integers(4, 9), st.integers(0, 1 << 30))
@settings(max_examples=40, deadline=None)
def test_what_was_learnt_is_kept_and_new_directions_start_afresh(
    pair: tuple[dict[str, Any], dict[str, Any]], layers: int, seed: int
) -> None:
    coarser, finer = (space_of(layers, **options) for options in pair)
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(coarser.size, coarser.size)) * 0.05
    learnt = root @ root.T + 1e-4 * np.eye(coarser.size)
    grown = grow(coarser, finer, coarser.x0, learnt)
    assert np.linalg.eigvalsh(grown.covariance)[0] > 0
    go, width = lift_map(coarser, finer), finer.high - finer.low
    old, unit = go.matrix / width[:, None], grown.covariance / np.outer(width, width)
    back = np.linalg.pinv(old)
    assert np.allclose(back @ unit @ back.T, learnt, rtol=1e-9, atol=1e-12)
    new = np.linalg.svd(old.T)[2][coarser.size :] if finer.size > coarser.size else np.empty((0, finer.size))
    assert np.allclose(new @ unit @ new.T, default_sigma0(finer.size) ** 2 * np.eye(len(new)), atol=1e-12)
    assert np.allclose(new @ unit @ old, 0, atol=1e-12)


def test_a_search_goes_on_from_where_it_was() -> None:
    coarser, finer = space_of(6, "uniform"), space_of(6, "curve", coefficients=3)
    small = CMAES(coarser.low, coarser.high, coarser.x0, seed=1)
    for _ in range(15):
        asked = small.ask()
        small.tell(
            asked,
            -((asked - coarser.low - 0.6) ** 2).sum(axis=1) - 2 * (asked[:, 0] + asked[:, 1] - 0.5) ** 2,
        )
    grown = grow(coarser, finer, small.mean, small.covariance)
    assert grown.moved == 0.0
    large = CMAES(finer.low, finer.high, grown.x0, seed=1, covariance=grown.covariance)
    assert np.allclose(large.mean, lift_map(coarser, finer)(small.mean), rtol=0, atol=1e-9)
    assert np.allclose(large.covariance, grown.covariance, rtol=1e-6, atol=1e-12)
    assert large.ask().shape == (large.popsize, finer.size)


def test_bounds_that_exclude_the_lifted_mean_are_reported() -> None:
    coarser, finer = space_of(6, "uniform"), space_of(6, "layers", bounds={"weight": (0.0, 0.6)})
    mean = np.where([n.startswith("weight") for n in coarser.names], 0.8, coarser.x0)
    grown = grow(coarser, finer, mean)
    assert grown.moved == pytest.approx(0.2) and (grown.x0 <= finer.high).all()


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        ([0.5], None, "a mean of 4 finite numbers"),
        ([math.nan] * 4, None, "a mean of 4 finite numbers"),
        ([0.5] * 4, np.eye(3), r"a covariance \[4, 4\], found \(3, 3\)"),
    ],
)
def test_what_does_not_fit_is_an_error(mean: Any, covariance: Any, message: str) -> None:
    with pytest.raises(ShoalError, match=message):
        grow(space_of(6, "uniform"), space_of(6, "curve"), mean, covariance)


def test_spaces_that_do_not_nest_are_refused() -> None:
    with pytest.raises(ShoalError, match="not in the image of this blocks space"):
        grow(space_of(6, "layers"), space_of(6, "blocks", blocks=2), [0.5] * 24)


def test_a_stall_is_no_gain_beyond_noise() -> None:
    noisy = [0.1, -0.1, 0.05, 0.0, 0.1, -0.05]
    assert stalled(noisy, 3) and not stalled(noisy[:5], 3)
    # a steady rise is no noise, and neither is one that noise of its size cannot hide
    assert not stalled([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], 3)
    assert not stalled([0.1 * i + x for i, x in enumerate(noisy)], 3)
    # rise 0.03; mean square of successive differences 0.019, so the error is sqrt(0.019 / 3) = 0.080
    assert stalled([0.01 * i + x for i, x in enumerate(noisy)], 3)
    # a fall is a stall, and only the last 2 * patience count
    assert stalled([0.5, 0.4, 0.3, 0.2], 2)
    assert stalled([0.0, 0.1, 0.2, 0.5, 0.5, 0.5, 0.5], 2)
    # one lucky generation long ago is not what later ones are held against
    assert not stalled([9.0, 0.0, 0.0, 0.5, 0.5], 2)
    # a generation that failed says nothing
    assert stalled([0.0, math.nan, 0.0, 0.0, 0.0], 2)
    assert not stalled([0.0, math.nan, 0.0, 0.0], 2)


def test_a_search_that_gains_seldom_seems_stalled_and_one_that_does_not_mostly_does() -> None:
    rng = np.random.default_rng(0)
    still = [stalled(rng.normal(size=10).tolist(), 5) for _ in range(2000)]
    rising = [stalled((0.5 * np.arange(10) + rng.normal(size=10)).tolist(), 5) for _ in range(2000)]
    # above one standard error of a difference of nothing: 16 % of the time
    assert 0.78 < np.mean(still) < 0.9
    assert np.mean(rising) < 0.02


def test_the_level_of_a_generation_is_not_that_of_its_best_or_of_broken_candidates() -> None:
    assert level([0.1, 0.3, 0.2]) == 0.2
    assert level([0.1, None, 0.3, -50.0, 0.2, math.nan]) == pytest.approx(0.15)
    assert math.isnan(level([None, None]))


def test_a_stall_rule_needs_patience() -> None:
    with pytest.raises(ShoalError, match="expected patience >= 2, found 1"):
        stalled([0.0], 1)
