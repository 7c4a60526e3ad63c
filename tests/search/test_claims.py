"""Intervals cover what they say, at the null almost nothing is "better", and verdicts follow the ordered rules."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, binomtest, bootstrap, kurtosis, norm
from scipy.stats import t as student

from shoal.errors import EvaluationError
from shoal.search import (
    Comparison,
    Contrast,
    Guard,
    TaskSamples,
    compare,
    contrast,
    guard,
    mcnemar_exact,
    non_inferior,
    verdict,
)
from shoal.search.bootstrap import FEW, acceleration, acceleration_error, planned
from shoal.search.claims import same_model
from shoal.search.exact import sign_flip, sign_flip_bound
from shoal.search.strata import mean_stratum, multiplicities, ratios


def samples(
    winner: Any, other: Any, *, task: str = "arc", weight: float = 1.0, clusters: Any = None, **rest: Any
) -> TaskSamples:
    labels = [str(i) for i in range(len(winner))] if clusters is None else [str(c) for c in clusters]
    arguments = {"higher_is_better": True, **rest}
    return TaskSamples(task, weight, winner=winner, others={"base": other}, clusters=labels, **arguments)


def outcomes(wins: int, losses: int, same: int) -> tuple[np.ndarray, np.ndarray]:
    """0/1 scores of winner and other with that many discordant items."""
    winner = np.concatenate([np.ones(wins), np.zeros(losses), np.ones(same)])
    other = np.concatenate([np.zeros(wins), np.ones(losses), np.ones(same)])
    return winner, other


def binary(generator: np.random.Generator, n: int, win: float, lose: float, repeat: int = 1) -> TaskSamples:
    u = np.repeat(generator.random(n // repeat), repeat)
    winner, other = (u < win) * 1.0, ((u >= win) & (u < win + lose)) * 1.0
    return samples(winner, other, clusters=np.arange(n) // repeat)


SIMULATED: dict[str, tuple[float, Callable[[np.random.Generator], list[TaskSamples]]]] = {
    "0/1, gain of 5 points": (0.05, lambda g: [binary(g, 300, 0.15, 0.10)]),
    "0/1, gain of 6 points, 5 items a cluster": (0.06, lambda g: [binary(g, 500, 0.16, 0.10, repeat=5)]),
    "continuous": (0.1, lambda g: [samples(g.normal(0.1, 1, 80), np.zeros(80))]),
    "two tasks": (
        (0.05 + 3 * 0.02) / 4,
        lambda g: [
            binary(g, 200, 0.15, 0.10),
            samples(g.normal(0.02, 0.3, 100), np.zeros(100), task="gsm", weight=3.0),
        ],
    ),
}


@pytest.mark.parametrize("name", SIMULATED)
def test_intervals_cover_the_truth(name: str) -> None:
    truth, make = SIMULATED[name]
    generator, runs = np.random.default_rng(2026), 300
    covered = 0
    for run in range(runs):
        found = compare(make(generator), "base", resamples=1000, seed=run)
        covered += found.low <= truth <= found.high
    error = (0.95 * 0.05 / runs) ** 0.5
    assert covered / runs >= 0.95 - 3 * error


@pytest.mark.parametrize("items", [40, 100, 400])
def test_at_the_null_a_claim_to_beat_is_false_in_less_than_one_of_forty(items: int) -> None:
    # every outcome of items that either model wins with a chance of 10%: discordant ones, then wins among them
    false = 0.0
    for discordant in range(1, items + 1):
        if (chance := float(binom.pmf(discordant, items, 0.2))) < 1e-5:
            continue
        for wins in range(discordant // 2, discordant + 1):
            scores = outcomes(wins, discordant - wins, items - discordant)
            found = [compare([samples(*scores)], "base", resamples=1000)]
            if verdict(False, found) == "beats":
                break
        else:
            continue
        assert found[0].low > 0  # and so for more wins
        false += chance * float(binom.sf(wins - 1, discordant, 0.5))
    assert 0.01 < false <= 0.025


def test_a_real_gain_with_enough_items_is_found() -> None:
    generator = np.random.default_rng(0)
    found = [
        compare([binary(generator, 2000, 0.13, 0.07)], "base", resamples=1000, seed=i) for i in range(40)
    ]
    assert sum(c.low > 0 for c in found) >= 38


def test_the_difference_is_paired_weighted_and_flipped() -> None:
    tasks = [
        samples(np.array([1.0, 0.0, 1.0, 1.0]), np.array([0.0, 0.0, 1.0, 0.0]), weight=1.0),
        samples(np.array([2.0, 4.0]), np.array([2.5, 4.5]), task="ppl", weight=3.0, higher_is_better=False),
        samples(np.array([9.0, 9.0]), np.array([0.0, 0.0]), task="ignored", weight=0.0),
    ]
    overall = compare(tasks, "base")
    assert overall.difference == pytest.approx((0.5 + 3 * 0.5) / 4)
    assert (overall.n, overall.clusters, overall.task, overall.against) == (6, 6, None, "base")
    assert (overall.wins, overall.losses) == (4, 0)
    one = compare(tasks, "base", task="ppl")
    # two items that agree prove nothing: a fair coin does so half of the time
    assert (one.difference, one.low, one.high, one.n, one.task) == (0.5, 0.0, 0.5, 2, "ppl")
    assert one.method == "constant+exact" and "p = 0.500" in one.why
    assert compare(tasks, "base", task="ignored").difference == 9.0


def test_weights_decide_how_wide_the_interval_is() -> None:
    generator = np.random.default_rng(1)
    quiet, loud = generator.normal(0, 0.1, 200), generator.normal(0, 2.0, 200)
    widths = []
    for weight in (0.1, 10.0):
        tasks = [samples(quiet, np.zeros(200)), samples(loud, np.zeros(200), task="gsm", weight=weight)]
        found = compare(tasks, "base")
        widths.append(found.high - found.low)
    share = np.array([0.1 / 1.1, 10 / 11])
    expected = 2 * 1.96 * np.sqrt((((1 - share) * quiet.std()) ** 2 + (share * loud.std()) ** 2) / 200)
    assert widths == pytest.approx(expected, rel=0.1)


def test_a_model_against_itself_has_an_interval_without_width() -> None:
    scores = np.random.default_rng(0).random(50)
    found = compare([samples(scores, scores)], "base")
    assert (found.difference, found.low, found.high, found.method) == (0.0, 0.0, 0.0, "constant")
    assert verdict(False, [found]) == "ties"


def test_a_single_cluster_shows_nothing() -> None:
    winner, other = outcomes(30, 5, 15)
    found = compare([samples(winner, other, clusters=["passage"] * 50)], "base")
    assert (found.low, found.high, found.method) == (-np.inf, np.inf, "none")
    assert verdict(False, [found]) == "underpowered"


def test_the_same_call_gives_the_same_interval_and_another_seed_nearly() -> None:
    task = samples(np.random.default_rng(0).exponential(size=400), np.zeros(400))
    first, again, other = (compare([task], "base", seed=s) for s in (1, 1, 2))
    assert first == again != other
    assert (first.low, first.high) == pytest.approx((other.low, other.high), abs=0.01)


def test_bca_agrees_with_scipys_but_for_students_t() -> None:
    values = np.round(np.random.default_rng(8).exponential(size=160) ** 2, 0)
    found = compare([samples(values, np.zeros(160))], "base", resamples=50_000)
    # the expanded tail of Hesterberg 2015, with degrees of freedom from the kurtosis
    freedom = 2 * 159 / (kurtosis(values, fisher=False) - 1)
    tail = norm.cdf(-math.sqrt(160 / 159) * student.ppf(0.975, freedom))
    theirs, plain = (
        bootstrap(
            (values,),
            np.mean,
            n_resamples=50_000,
            method=method,
            confidence_level=level,
            rng=np.random.default_rng(0),
        ).confidence_interval
        for method, level in (("BCa", 1 - 2 * tail), ("percentile", 0.95))
    )
    assert found.method == "bca" and found.why == ""
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=0.02)
    assert found.low > 1.03 * plain.low and found.high > 1.04 * plain.high


def test_what_shows_no_skewness_gets_students_t() -> None:
    values = np.random.default_rng(8).normal(0.3, 1, 200)
    found = compare([samples(values, np.zeros(200))], "base")
    assert found.method == "t" and "no skewness" in found.why
    freedom = 2 * 199 / max(2, kurtosis(values, fisher=False) - 1)
    error = values.std(ddof=1) / 200**0.5
    assert found.error == pytest.approx(error, rel=0.003)
    ends = student.interval(0.95, freedom, values.mean(), error)
    assert (found.low, found.high) == pytest.approx(ends)
    other = compare([samples(values, np.zeros(200))], "base", seed=1)
    assert (other.low, other.high) == (found.low, found.high)  # nothing is drawn


def test_skewness_shows_beyond_three_of_its_jackknife_errors() -> None:
    generator = np.random.default_rng(4)
    skewed, even = generator.exponential(size=200), generator.normal(size=200)
    outlier = np.append(even, 60.0)  # one item is no evidence of a skewed law
    lopsided = [skewed, np.zeros(200)], [0.5, 0.5]
    for differences, weights, shown in (
        ([skewed], [1.0], True),
        ([even], [1.0], False),
        ([outlier], [1.0], False),
        ([skewed, even], [0.9, 0.1], True),
        (*lopsided, True),
    ):
        strata = [mean_stratum(d, [np.array([i]) for i in range(len(d))], False) for d in differences]
        plan = planned(strata, weights, 0)
        assert plan.method == ("bca" if shown else "t")
        # by hand: the acceleration of all but one cluster of a stratum, again and again
        variance = 0.0
        for k, d in enumerate(differences):
            left_out = []
            for i in range(len(d)):
                rest = [np.delete(d, i) if j == k else other for j, other in enumerate(differences)]
                left_out.append(
                    acceleration(
                        [w * (r - r.mean()) for w, r in zip(weights, rest, strict=True)],
                        [len(r) for r in rest],
                    )
                )
            variance += (len(d) - 1) / len(d) * float(((left_out - np.mean(left_out)) ** 2).sum())
        assert acceleration_error(plan.influences, plan.clusters) == pytest.approx(variance**0.5)


def test_few_clusters_get_the_width_of_students_t() -> None:
    values = np.random.default_rng(1).normal(0, 1, 12)
    found = compare([samples(values, np.zeros(12))], "base", resamples=50_000)
    normal = 2 * 1.96 * values.std() / 12**0.5
    assert found.high - found.low > 1.1 * normal


def test_degrees_of_freedom_follow_the_kurtosis() -> None:
    normal = np.random.default_rng(0).normal(size=400)
    wins = np.repeat([1.0, 0.0], [12, 388])
    mixed = np.repeat([1.0, -1.0, 0.0], [6, 6, 388])

    def inflation(differences: np.ndarray) -> tuple[float, float]:
        stratum = mean_stratum(differences, [np.array([i]) for i in range(400)], True)
        plan = planned([stratum], [1.0], 0)
        return plan.inflation, plan.freedom

    factors, freedoms = zip(*map(inflation, (normal, wins, mixed)), strict=True)
    assert factors == pytest.approx([400 / 399] * 3)
    # 12 wins, or 12 of both signs, tell little of their variance
    assert freedoms == pytest.approx((399, 2 * 399 / (400 / 12 - 3), 2 * 399 / (400 / 12 - 1)), rel=0.2)


def test_bca_needs_ten_discordant_clusters() -> None:
    assert FEW == 10
    few = compare([samples(*outcomes(9, 0, 91))], "base")
    assert few.method == "percentile" and few.why == "9 discordant clusters, BCa needs 10"
    assert compare([samples(*outcomes(10, 0, 90))], "base").method == "bca"


@pytest.mark.parametrize(
    ("wins", "losses"), [(5, 0), (6, 0), (8, 1), (7, 2), (8, 2), (9, 1), (14, 6), (15, 5), (0, 5), (0, 6)]
)
def test_no_interval_excludes_zero_where_the_exact_test_does_not(wins: int, losses: int) -> None:
    found = compare([samples(*outcomes(wins, losses, 80))], "base")
    p = mcnemar_exact(wins, losses, mid=wins + losses >= FEW)
    assert (found.low > 0 or found.high < 0) == (p <= 0.05)
    assert found.low <= found.difference <= found.high and found.low < found.high
    assert (found.p, found.test) == (binomtest(wins, wins + losses).pvalue, "mcnemar")
    assert ("+exact" in found.method) == ("exact test" in found.why)


@pytest.mark.parametrize("items", [50, 400])
def test_no_difference_seen_is_not_no_difference(items: int) -> None:
    winner, other = outcomes(0, 0, items)
    found = compare([samples(winner, other)], "base")
    assert (found.difference, found.method) == (0.0, "percentile") and "0 discordant" in found.why
    # as wide as Bonett & Price's interval: one win and one loss among two more items
    half = 1.96 * math.sqrt(2 / (items + 2)) / math.sqrt(items + 2)
    assert found.high == -found.low == pytest.approx(half, rel=0.15)
    assert verdict(False, [found]) == ("underpowered" if items == 50 else "ties")
    itself = same_model([samples(winner, other)], "base")
    assert (itself.difference, itself.low, itself.high) == (0.0, 0.0, 0.0) and itself.why == "the same model"


def test_mcnemar_is_for_single_items_of_one_metric() -> None:
    winner, other = outcomes(30, 10, 60)
    assert compare([samples(winner, other)], "base").test == "mcnemar"
    assert compare([samples(winner, other, clusters=np.arange(100) // 2)], "base").test == "sign flip"
    assert compare([samples(winner * 0.5, other)], "base").test == "sign flip"
    two = [samples(winner, other), samples(winner, other, task="gsm")]
    assert compare(two, "base").test == "sign flip" and compare(two, "base", task="gsm").test == "mcnemar"


def test_the_sign_flip_test_is_the_same_exact_and_drawn() -> None:
    sizes = np.array([0.3, -0.1, 0.5, 0.2, 0.4, -0.05, 0.25, 0.15, 0.6, 0.35, 0.1, 0.45])
    padded = np.concatenate([sizes, [1e-15]])  # a 13th of no weight: by draws
    for mid in (False, True):
        assert sign_flip(sizes, 0, mid=mid) == pytest.approx(sign_flip(padded, 0, mid=mid), abs=0.005)
    assert sign_flip(np.full(20, 0.1), 0) == mcnemar_exact(20, 0)
    # two sizes: p by summing over both binomials
    wins, total = (14, 5), (20, 8)
    weighed = np.repeat([0.1, -0.1, 0.7, -0.7], [wins[0], total[0] - wins[0], wins[1], total[1] - wins[1]])
    i, j = np.meshgrid(np.arange(21), np.arange(9), indexing="ij")
    sums = np.abs((2 * i - 20) * 0.1 + (2 * j - 8) * 0.7)
    chance = binom.pmf(i, 20, 0.5) * binom.pmf(j, 8, 0.5)
    above, equal = (float(chance[m].sum()) for m in (sums > 2.2 + 1e-9, np.abs(sums - 2.2) <= 1e-9))
    assert sign_flip(weighed, 0, draws=200_000) == pytest.approx(above + equal, abs=0.004)
    assert sign_flip(weighed, 0, draws=200_000, mid=True) == pytest.approx(above + equal / 2, abs=0.004)


def test_the_bound_of_the_sign_flip_test_is_one() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        contributions = generator.exponential(size=12) * generator.choice([-1, 1], size=12, p=[0.2, 0.8])
        assert sign_flip(contributions, 0) <= sign_flip_bound(contributions)
    assert sign_flip(np.ones(2), 0) == pytest.approx(0.5) == sign_flip_bound(np.ones(2))  # it is tight
    assert sign_flip_bound(np.ones(100)) < 1e-20 and sign_flip_bound(np.zeros(3)) == 1.0


def test_items_of_one_cluster_are_no_independent_evidence() -> None:
    generator = np.random.default_rng(3)
    base = generator.normal(0.1, 1, 100)
    repeated = np.repeat(base, 9)
    zero = np.zeros(900)
    alone = compare([samples(base, np.zeros(100))], "base")
    naive = compare([samples(repeated, zero)], "base")
    clustered = compare([samples(repeated, zero, clusters=np.arange(900) // 9)], "base")
    assert clustered.high - clustered.low == pytest.approx(3 * (naive.high - naive.low), rel=0.1)
    assert (clustered.low, clustered.high) == pytest.approx((alone.low, alone.high), abs=0.02)
    assert (clustered.n, clustered.clusters) == (900, 100)


def test_clusters_may_be_scattered_and_of_different_size() -> None:
    labels = [0, 1, 0, 2, 2, 2, 1, 3]
    winner = np.array([1.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.0, 0.0])
    found = compare([samples(winner, np.zeros(8), clusters=labels)], "base", resamples=50_000)
    # by hand: clusters have sums 2, 0, 1.5, 0 and sizes 2, 2, 3, 1; all 4^4 resamples
    sums, sizes = np.array([2, 0, 1.5, 0]), np.array([2.0, 2, 3, 1])
    every = np.stack(np.meshgrid(*[range(4)] * 4), axis=-1).reshape(-1, 4)
    ratios = np.sort(sums[every].sum(axis=1) / sizes[every].sum(axis=1))
    lower = [
        compare([samples(winner, np.zeros(8), clusters=labels)], "base", 50_000, level=v) for v in (0.5, 0.8)
    ]
    tails = [norm.cdf(math.sqrt(4 / 3) * student.ppf((1 + v) / 2, 3)) for v in (0.5, 0.8)]
    assert [c.high for c in lower] == pytest.approx([np.quantile(ratios, t) for t in tails], abs=0.003)
    assert found.method == "percentile" and found.high > np.quantile(ratios, 0.975)
    assert found.low == 0.0 and found.difference == pytest.approx(3.5 / 8)


def corpus_ratio(values: list[tuple[float, float]]) -> float:
    """A metric that is no mean over items, like a corpus-level perplexity or BLEU: a ratio of sums."""
    return sum(a for a, _ in values) / sum(b for _, b in values)


def test_a_metric_that_is_no_mean_is_recomputed_on_each_resample() -> None:
    generator = np.random.default_rng(5)
    size = generator.integers(1, 50, 300).astype(float)
    right = {name: generator.binomial(size.astype(int), p) for name, p in (("w", 0.7), ("o", 0.6))}
    winner, other = (list(zip(right[k].tolist(), size.tolist(), strict=True)) for k in ("w", "o"))
    found = compare([samples(winner, other, aggregate=corpus_ratio)], "base", resamples=2000)
    assert found.difference == pytest.approx((right["w"].sum() - right["o"].sum()) / size.sum())
    # the delta method's standard error of a difference of ratios with one denominator
    influence = (right["w"] - right["o"] - found.difference * size) / size.mean()
    expected = 2 * 1.96 * influence.std() / 300**0.5
    assert found.high - found.low == pytest.approx(expected, rel=0.1)
    assert found.low > 0 and found.method == "t"
    assert found.error == pytest.approx(influence.std() / 300**0.5, rel=0.05)  # of the draws
    lower = compare(
        [samples(winner, other, aggregate=corpus_ratio, higher_is_better=False)], "base", resamples=2000
    )
    assert lower.difference == -found.difference and lower.high < 0


def test_an_aggregate_that_is_a_mean_agrees_with_the_mean() -> None:
    winner, other = outcomes(30, 12, 100)
    mean = compare([samples(winner, other)], "base", resamples=4000)
    recomputed = compare(
        [samples(winner.tolist(), other.tolist(), aggregate=lambda v: sum(v) / len(v))],
        "base",
        resamples=4000,
    )
    assert recomputed.difference == pytest.approx(mean.difference)
    assert (recomputed.low, recomputed.high) == pytest.approx((mean.low, mean.high), abs=0.008)
    assert (recomputed.wins, recomputed.losses) == (30, 12)


def test_an_expensive_aggregate_gets_fewer_resamples() -> None:
    calls = 0

    def counting(values: list[float]) -> float:
        nonlocal calls
        calls += 1
        return sum(values) / len(values)

    values = np.random.default_rng(0).random((2, 4000))
    found = compare([samples(values[0].tolist(), values[1].tolist(), aggregate=counting)], "base")
    assert calls == 2 * (1 + 500) and found.method == "percentile"


def interval(low: float, high: float) -> Comparison:
    return Comparison("base", (low + high) / 2, low, high, 100, None, "bca")


VERDICTS: list[tuple[list[Comparison], str]] = [
    ([interval(0.001, 0.1)], "beats"),
    ([interval(0.001, 0.002), interval(0.001, 0.1)], "beats"),  # though all within the margin
    ([interval(0.0, 0.1)], "underpowered"),
    ([interval(0.01, 0.1), interval(-0.1, -0.001)], "worse"),
    ([interval(-0.005, -0.001)], "worse"),  # though within the margin
    ([interval(-0.01, 0.01), interval(0.001, 0.009)], "ties"),
    ([interval(-0.01, 0.01), interval(-0.001, 0.011)], "underpowered"),
    ([interval(-0.1, 0.0)], "underpowered"),
    ([interval(0.0, 0.0)], "ties"),
]


@pytest.mark.parametrize(("comparisons", "expected"), VERDICTS)
def test_verdicts_follow_the_rules_in_order(comparisons: list[Comparison], expected: str) -> None:
    assert verdict(False, comparisons, margin=0.01) == expected
    assert verdict(True, comparisons, margin=0.01) == "ties"


def test_the_margin_decides_what_ties() -> None:
    assert verdict(False, [interval(-0.02, 0.02)], margin=0.02) == "ties"
    assert verdict(False, [interval(-0.02, 0.02)], margin=0.019) == "underpowered"
    assert non_inferior(interval(-0.019, 0.0), 0.02) and not non_inferior(interval(-0.02, 0.5), 0.02)


def guarded(wins: int, losses: int, same: int = 300, against: str = "base") -> Contrast:
    winner, other = outcomes(wins, losses, same)
    task = TaskSamples("safety", 1.0, True, winner, {against: other}, [str(i) for i in range(len(winner))])
    return contrast([task], against, task="safety")


def test_a_guard_is_a_one_sided_test_against_every_parent() -> None:
    held = guard([guarded(20, 20), guarded(30, 10, against="expert")], 0.04)
    assert held.holds and not held.broken
    assert (held.task, held.against, held.difference) == ("safety", "base", 0.0)
    # 5% one-sided: 1.645 standard errors of 40 discordant items in 340
    assert held.low == pytest.approx(-1.645 * 40**0.5 / 340, rel=0.06)
    tight = guard([guarded(20, 20), guarded(30, 10, against="expert")], 0.02)
    assert not tight.holds and not tight.broken
    lost = guard([guarded(20, 20), guarded(5, 60, against="expert")], 0.05)
    assert not lost.holds and lost.broken and lost.against == "expert"
    with pytest.raises(EvaluationError, match="a contrast per parent"):
        guard([], 0.02)
    with pytest.raises(EvaluationError, match="max_drop > 0"):
        guard([guarded(20, 20)], 0.0)


def test_a_guard_that_fails_takes_beats_away_and_nothing_else() -> None:
    holds, open_, broken = (
        Guard("safety", 0.02, "base", d, low, h, b)
        for d, low, h, b in (
            (0.0, -0.01, True, False),
            (0.0, -0.03, False, False),
            (-0.09, -0.1, False, True),
        )
    )
    better = [interval(0.01, 0.1)]
    assert verdict(False, better, guards=[holds, holds]) == "beats"
    assert verdict(False, better, guards=[holds, open_]) == "underpowered"
    assert verdict(False, better, guards=[holds, open_, broken]) == "worse"
    for comparisons, expected in VERDICTS:
        if expected != "beats":
            assert verdict(False, comparisons, guards=[broken, open_]) == expected
    assert verdict(True, better, guards=[broken]) == "ties"


def test_both_ways_of_drawing_give_one_distribution() -> None:
    generator = np.random.default_rng(0)
    differences = generator.choice([-1.0, 0.0, 1.0], size=400, p=[0.1, 0.75, 0.15])
    stratum = mean_stratum(differences, [np.array([i]) for i in range(400)], True)
    by_kind = stratum.resample(np.random.default_rng(1), 20_000)
    counts = multiplicities(np.random.default_rng(2), 20_000, 400)
    assert (counts.sum(axis=1) == 400).all()
    by_item = ratios(counts, differences, np.ones(400))
    levels = [0.025, 0.25, 0.5, 0.75, 0.975]
    assert np.quantile(by_kind, levels) == pytest.approx(np.quantile(by_item, levels), abs=0.0026)
    assert stratum.variance == pytest.approx(differences.var() / 400)
    assert by_item.var() == pytest.approx(stratum.variance, rel=0.03)


def test_resampled_means_are_ratios_of_sums() -> None:
    sums, sizes = np.array([2.0, 0.0, -1.0, 3.0]), np.array([2.0, 1.0, 3.0, 4.0])
    counts = np.array([[1.0, 1, 1, 1], [0, 2, 1, 1]])
    means = ratios(counts, sums, sizes)
    assert means == pytest.approx([0.4, 2 / 9])
    wide = ratios(counts, np.stack([sums, 2 * sums], axis=1), sizes)
    assert wide == pytest.approx(np.stack([means, 2 * means], axis=1))


def test_nothing_follows_from_no_comparison() -> None:
    with pytest.raises(EvaluationError, match="found none"):
        verdict(False, [])


def test_a_lower_level_is_a_narrower_interval() -> None:
    task = binary(np.random.default_rng(0), 400, 0.2, 0.1)
    wide, narrow = (compare([task], "base", level=level) for level in (0.95, 0.9))
    ratio = (narrow.high - narrow.low) / (wide.high - wide.low)
    assert ratio == pytest.approx(1.645 / 1.96, rel=0.05)


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([samples([1.0], [0.0])], {"against": "bass"}, "did you mean 'base'"),
        ([samples([1.0], [0.0])], {"task": "ark"}, "did you mean 'arc'"),
        ([samples([1.0], [0.0], weight=0.0)], {}, "no task has a weight"),
        ([samples([1.0, 2.0], [0.0])], {}, "found 2, 1 and 2"),
        ([samples([], [])], {}, "found 0, 0 and 0"),
        ([samples([1.0, np.nan], [0.0, 1.0])], {}, "one finite number per item"),
        ([samples([[1.0], [2.0]], [[0.0], [1.0]])], {}, "one finite number per item"),
        ([samples([1.0, 2.0], [0.0, 1.0], aggregate=lambda v: np.nan)], {}, "not a finite number"),
        ([samples([1.0], [0.0])], {"resamples": 10}, "resamples >= 200"),
    ],
)
def test_samples_that_cannot_be_compared_are_errors(
    tasks: list[TaskSamples], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        compare(tasks, **{"against": "base", **options})
