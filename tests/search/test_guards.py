"""A candidate that clearly loses too much on a guarded task is infeasible; luck is not enough."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.search.guards import Limit, best_parent, violation


def scores(mean: float, noise: float = 0.0, items: int = 40) -> dict[str, dict[int, float]]:
    rng = np.random.default_rng(0)
    return {"safe": {i: mean + noise * rng.normal() for i in range(items)}, "other": {0: 1.0}}


LIMITS = {"safe": Limit("safe", 0.02, scores(0.5))}


def test_a_drop_within_the_limit_or_a_gain_is_feasible() -> None:
    for mean in (0.6, 0.5, 0.481):
        assert violation(scores(mean), LIMITS, None) == 0.0


def test_a_clear_drop_is_measured_by_how_far_it_is_beyond_the_limit() -> None:
    assert violation(scores(0.4), LIMITS, None) == pytest.approx(0.08)
    assert violation(scores(0.3), LIMITS, None) > violation(scores(0.4), LIMITS, None)


def test_a_drop_within_its_own_error_is_no_violation() -> None:
    noisy = scores(0.46, noise=0.6)
    mean = float(np.mean(list(noisy["safe"].values())))
    assert violation(scores(mean), LIMITS, None) > 0  # the same mean, without noise
    assert violation(noisy, LIMITS, None) == 0.0


def test_weights_of_items_count() -> None:
    ours = {"safe": {0: 0.0, 1: 0.5, 2: 0.0, 3: 0.5}}
    parent = {"safe": dict.fromkeys(range(4), 0.5)}
    limits = {"safe": Limit("safe", 0.02, parent)}
    light = {"safe": {0: 0.001, 1: 0.499, 2: 0.001, 3: 0.499}}
    assert violation(ours, limits, {"safe": dict.fromkeys(range(4), 0.25)}) > 0
    assert violation(ours, limits, light) == 0.0


def test_without_guards_everything_is_feasible_and_the_best_parent_is_found() -> None:
    assert violation(scores(0.0), {}, None) == 0.0
    assert best_parent({"a": scores(0.1), "b": scores(0.3), "c": scores(0.3)}, "safe") == "b"
