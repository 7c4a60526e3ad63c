"""Several claims hold together: Holm decides, and the intervals agree with his decisions."""

from itertools import product

import numpy as np
import pytest

from shoal.errors import EvaluationError
from shoal.search import Contrast, TaskSamples, contrast, simultaneous
from shoal.search.simultaneous import holm_bounds


def by_hand(p: dict[str, float], level: float) -> set[str]:
    """Holm 1979: the smallest p first, at level / m, then level / (m - 1), until one is not significant."""
    found: set[str] = set()
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        if p[name] > level / (len(p) - rank):
            break
        found.add(name)
    return found


def z_bound(estimates: dict[str, float]):  # type: ignore[no-untyped-def]
    from scipy.stats import norm

    return lambda name, error: estimates[name] - float(norm.isf(error))


@pytest.mark.parametrize("estimates", list(product([0.5, 1.97, 2.2, 2.35, 2.5, 4.0], repeat=3)))
def test_what_is_shown_is_what_holm_shows(estimates: tuple[float, ...]) -> None:
    from scipy.stats import norm

    named = dict(zip("abc", estimates, strict=True))
    shown, bounds = holm_bounds("abc", z_bound(named), 0.025)
    assert shown == by_hand({name: float(norm.sf(e)) for name, e in named.items()}, 0.025)
    assert all((bounds[name] >= 0) == (name in shown) for name in "abc")


def test_bounds_agree_with_the_decisions() -> None:
    bound = z_bound({"a": 9.0, "b": 1.0, "c": 0.0})
    shown, bounds = holm_bounds("abc", bound, 0.025)
    assert shown == {"a"} and bounds["a"] == 0.0  # how far above is not said while others are open
    assert bounds["b"] == bound("b", 0.0125) < 0 and bounds["c"] == bound("c", 0.0125)
    bound = z_bound({"a": 9.0, "b": 2.3, "c": 2.0})
    shown, bounds = holm_bounds("abc", bound, 0.025)
    assert shown == {"a", "b", "c"}
    assert bounds["a"] == bound("a", 0.025 / 3) > 6 and bounds["b"] == bounds["c"] == 0.0


def test_bounds_hold_together() -> None:
    generator, runs, false = np.random.default_rng(0), 4000, 0
    truth = {"a": 0.0, "b": -0.3, "c": 2.0}
    for _ in range(runs):
        drawn = {name: t + generator.normal() for name, t in truth.items()}
        _, bounds = holm_bounds("abc", z_bound(drawn), 0.025)
        false += any(bounds[name] > truth[name] for name in truth)
    assert false / runs <= 0.025 + 2 * (0.025 * 0.975 / runs) ** 0.5


def task(wins: int, losses: int, against: str = "base", n: int = 500) -> Contrast:
    winner, other = np.zeros(n), np.zeros(n)
    winner[:wins], other[wins : wins + losses] = 1, 1
    one = TaskSamples("t", 1.0, True, winner, {against: other}, [str(i) for i in range(n)])
    return contrast([one], against, task="t")


def test_one_claim_is_its_own_interval() -> None:
    one = task(60, 20)
    found = simultaneous({"t": [one]})["t"]
    assert (found.low, found.high) == (one.interval().low, one.interval().high)
    assert found.better and not found.worse and found.difference == pytest.approx(0.08)


def test_a_claim_is_against_the_best_baseline_and_more_claims_make_wider_intervals() -> None:
    claims = {
        "gained": [task(90, 10), task(60, 20, "expert")],
        "even": [task(30, 30), task(80, 10, "expert")],
        "lost": [task(10, 70), task(40, 10, "expert")],
    }
    found = simultaneous(claims)
    assert [(c.better, c.worse) for c in found.values()] == [(True, False), (False, False), (False, True)]
    assert [c.against for c in found.values()] == ["expert", "base", "base"]
    assert found["gained"].low == 0.0 and found["lost"].high == 0.0
    assert found["even"].low < claims["even"][0].interval().low
    assert found["even"].high > claims["even"][0].interval().high
    assert simultaneous(claims) == found


def test_a_gain_that_one_claim_shows_may_be_lost_among_many() -> None:
    single = task(42, 24)
    assert single.interval().low > 0
    many = {"gain": [single]} | {f"even {i}": [task(30, 30)] for i in range(6)}
    assert not simultaneous(many)["gain"].better


def test_nothing_claimed_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="at least one baseline"):
        simultaneous({})
    with pytest.raises(EvaluationError, match="at least one baseline"):
        simultaneous({"t": []})
