"""The smooth objective: bounded, and level in length."""

from __future__ import annotations

import math

import pytest

from shoal.evals.objective import answer_objective, choice_objective


def test_equal_options_share_the_probability() -> None:
    assert choice_objective([-3.0, -3.0, -3.0, -3.0], [1, 1, 1, 1], [2]) == pytest.approx(1 / 4)


def test_options_are_compared_per_token() -> None:
    assert choice_objective([-2.0, -4.0], [1, 2], [0]) == pytest.approx(1 / 2)


def test_options_of_one_length_keep_their_own_log_likelihoods() -> None:
    odds = math.exp(-2.0) / (math.exp(-2.0) + math.exp(-5.0))
    assert choice_objective([-2.0, -5.0], [3, 3], [0]) == pytest.approx(odds)


def test_several_right_options_add_up() -> None:
    assert choice_objective([-1.0, -1.0, -1.0], [1, 1, 1], [0, 2]) == pytest.approx(2 / 3)


def test_the_objective_is_bounded() -> None:
    assert choice_objective([-1e4, 0.0], [1, 1], [0]) == 0.0
    assert answer_objective(-1e4, 1) == 0.0
    assert answer_objective(0.0, 3) == 1.0


def test_no_right_option_has_no_objective() -> None:
    assert choice_objective([-1.0, -2.0], [1, 1], [-100]) is None


def test_an_answer_is_scored_per_token() -> None:
    assert answer_objective(-3.0, 4) == pytest.approx(math.exp(-0.75))
