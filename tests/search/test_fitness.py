"""Fitness is a paired difference to an anchor, scaled per task."""

import math

import pytest

from shoal.errors import EvaluationError
from shoal.search import best_anchor, paired_fitness, task_scales

ANCHOR = {"arc": {0: -1.0, 1: -2.0, 2: -3.0, 9: -9.0}, "gsm": {5: -0.5, 6: -0.7}}
CANDIDATE = {"arc": {0: -0.5, 1: -2.0, 2: -2.0}, "gsm": {5: -0.6, 6: -0.8}}


def test_fitness_is_the_weighted_mean_of_scaled_paired_differences() -> None:
    found = paired_fitness(CANDIDATE, ANCHOR, {"arc": 3.0, "gsm": 1.0}, {"arc": 0.5, "gsm": 0.1})
    assert found == pytest.approx((3 * (0.5 / 0.5) + 1 * (-0.1 / 0.1)) / 4)
    assert paired_fitness(ANCHOR, ANCHOR, {"arc": 1.0, "gsm": 1.0}, {"arc": 1.0, "gsm": 1.0}) == 0.0


def test_how_hard_the_items_are_does_not_matter() -> None:
    weights, scales = {"arc": 1.0}, {"arc": 1.0}
    easy = paired_fitness({"arc": {0: -0.9}}, ANCHOR, weights, scales)
    hard = paired_fitness({"arc": {9: -8.9}}, ANCHOR, weights, scales)
    assert easy == pytest.approx(hard) == pytest.approx(0.1)


def test_the_order_of_items_does_not_change_a_bit() -> None:
    values = {i: math.sin(i) * 10.0 ** (i % 7) for i in range(200)}
    zero = dict.fromkeys(values, 0.0)
    backwards = dict(reversed(list(values.items())))
    fitness = [paired_fitness({"t": v}, {"t": zero}, {"t": 1.0}, {"t": 0.3}) for v in (values, backwards)]
    assert fitness[0] == fitness[1]


def test_a_task_of_weight_zero_may_be_absent() -> None:
    assert paired_fitness(CANDIDATE, ANCHOR, {"gsm": 1.0, "mmlu": 0.0}, {"gsm": 1.0}) == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("candidate", "weights", "message"),
    [
        ({"arc": {7: 1.0}}, {"arc": 1.0}, r"no score for items \[7\]"),
        ({"arc": {}}, {"arc": 1.0}, "'arc': no scores"),
        ({"ark": {0: 1.0}}, {"arc": 1.0}, "did you mean 'ark'"),
        ({"arc": {0: math.nan}}, {"arc": 1.0}, "item 0: expected a finite score, found nan"),
        (CANDIDATE, {"arc": 0.0}, "one above"),
        (CANDIDATE, {"arc": 1.0, "gsm": -1.0}, "expected >= 0"),
    ],
)
def test_scores_that_cannot_be_compared_are_errors(
    candidate: dict[str, dict[int, float]], weights: dict[str, float], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        paired_fitness(candidate, ANCHOR, weights, {"arc": 1.0, "gsm": 1.0})


def test_a_scale_is_the_spread_of_the_anchors_over_their_common_items() -> None:
    anchors = {
        "base": {"arc": dict.fromkeys(range(10), -3.0)},
        "math": {"arc": dict.fromkeys(range(10), -1.0) | {99: 50.0}},
        "code": {"arc": dict.fromkeys(range(10), -2.0)},
    }
    assert task_scales(anchors) == {"arc": 2.0}
    assert task_scales({"base": anchors["base"]}) == {"arc": 0.01}
    assert task_scales({"base": anchors["base"]}, floor=0.2) == {"arc": 0.2}


def test_a_spread_within_its_own_error_does_not_let_a_task_rule_the_search() -> None:
    noisy = {"a": {"t": {0: 1.0, 1: -1.0, 2: 0.0, 3: 0.1}}, "b": {"t": dict.fromkeys(range(4), 0.0)}}
    spread, error = 0.025, math.sqrt(sum((x - 0.025) ** 2 for x in (1.0, -1.0, 0.0, 0.1))) / 4
    assert task_scales(noisy)["t"] == pytest.approx(error) and error > spread


def test_the_best_anchor_depends_on_weights_and_scales() -> None:
    anchors = {
        "math": {"gsm": {0: 0.9}, "arc": {0: 0.2}},
        "code": {"gsm": {0: 0.1}, "arc": {0: 0.6}},
    }
    ones = {"gsm": 1.0, "arc": 1.0}
    assert best_anchor(anchors, ones, ones) == "math"
    assert best_anchor(anchors, {"gsm": 1.0, "arc": 3.0}, ones) == "code"
    assert best_anchor(anchors, ones, {"gsm": 1.0, "arc": 0.1}) == "code"
    assert best_anchor({"x": anchors["math"], "y": anchors["math"]}, ones, ones) == "x"
    with pytest.raises(EvaluationError, match="at least one"):
        best_anchor({}, ones, ones)
