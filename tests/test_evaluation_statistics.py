"""Intervals and tests against published values, worked examples and simulation."""

import numpy as np
import pytest

from phi3v.evaluation import statistics


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0.0, 16.11), (1, 29, 0.61, 17.18)],
)
def test_wilson_gives_newcombes_intervals(correct, n, low, high):
    assert statistics.wilson(correct, n) == pytest.approx((low, high), abs=0.005)


def test_wilson_of_nothing_is_refused():
    with pytest.raises(ValueError, match="got 0 of 0"):
        statistics.wilson(0, 0)


def test_500_examples_at_86_percent_are_plus_or_minus_three_points():
    low, high = statistics.wilson(430, 500)
    assert (high - low) / 2 == pytest.approx(3.0, abs=0.1)


def test_bootstrap_is_seeded_and_close_to_the_normal_interval():
    scores = np.random.default_rng(1).beta(2, 1, 400)
    low, high = statistics.bootstrap(scores, seed=3)
    assert (low, high) == statistics.bootstrap(scores, seed=3)
    half = 196 * scores.std(ddof=1) / 20
    assert (low, high) == pytest.approx((100 * scores.mean() - half, 100 * scores.mean() + half), abs=0.35)


def test_bootstrap_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(300):
        low, high = statistics.bootstrap(rng.random(80) ** 2, seed=trial, resamples=600)
        hits += low <= 100 / 3 <= high
    assert 0.91 <= hits / 300 <= 0.98


def test_mcnemar_counts_the_examples_on_which_the_two_differ():
    # Eight differ, seven of them in favour of the left: 2 x (1 + 8) / 2^8.
    left, right = [1.0] * 7 + [0.0] + [1.0] * 90, [0.0] * 7 + [1.0] + [1.0] * 90
    assert statistics.mcnemar(left, right) == statistics.mcnemar(right, left) == pytest.approx(18 / 256)
    assert statistics.mcnemar(left, left) == 1.0


def test_a_resample_on_which_a_statistic_is_undefined_is_left_out():
    def undefined_without_zero(left, right):
        if left.min() > 0:
            raise ValueError("no zero")
        return float((left * right).mean())

    low, high = statistics.bootstrap_paired(undefined_without_zero, [0, 1, 1, 1], [1, 1, 1, 1], seed=0)
    assert (low, high) == (0.25, 0.75)
    with pytest.raises(ValueError, match="undefined on every resample"):
        statistics.bootstrap_paired(undefined_without_zero, [1, 1], [1, 1])


def test_paired_comparison_is_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(3)
    left = (rng.random(400) < 0.7).astype(float)
    right = left.copy()
    right[:20] = 0
    pair = statistics.paired(left, right)
    assert pair.difference == pytest.approx(100 * (left.mean() - right.mean()))
    unpaired = 196 * np.sqrt(left.var() / 400 + right.var() / 400)
    assert (pair.interval[1] - pair.interval[0]) / 2 < unpaired / 2
    assert pair.p is not None and statistics.paired([0.5, 0.2], [0.1, 0.3]).p is None
    with pytest.raises(ValueError, match="3 and 2"):
        statistics.paired([1, 0, 1], [1, 0])


@pytest.mark.parametrize(
    ("score", "n", "published", "published_n", "verdict"),
    [
        (86.5, 20_000, 86.4, 20_000, "agrees"),
        (86.4, 500, 86.4, 500, "inconclusive"),  # equal figures, too few examples to tell
        (95.0, 500, 86.4, 500, "above"),
        (70.0, 500, 86.4, 500, "below"),
        (100.0, 5, 99.0, 5, "inconclusive"),  # a share of 100 % has a sampling error too
    ],
)
def test_verdicts(score, n, published, published_n, verdict):
    assert statistics.against_published(score, n, published, published_n).verdict == verdict


def test_an_interval_over_three_seeds_covers_the_truth():
    # Truth 80 %; a seed moves every example's chance by 3 points, and 400 examples are drawn.
    rng = np.random.default_rng(7)
    hits, plain = 0, 0
    for _ in range(400):
        answers = rng.random((3, 400)) < 0.8 + 0.03 * rng.standard_normal((3, 1))
        seeds = 100 * answers.mean(axis=1)
        low, high = statistics.interval_over_seeds(answers.mean(axis=0), seeds)
        hits += low <= 80 <= high
        low, high = statistics.wilson(int(answers[0].sum()), 400)
        plain += low <= 80 <= high
    assert hits / 400 >= 0.94 > plain / 400


def test_two_seeds_say_little():
    one = statistics.against_published(86, 500, 86.4, 500)
    two = statistics.against_published(86, 500, 86.4, 500, seed_scores=[84.5, 87.5])
    ten = statistics.against_published(86, 500, 86.4, 500, seed_scores=[84.5, 87.5] * 5)
    width = [high - low for low, high in (one.interval, two.interval, ten.interval)]
    assert width[0] < width[2] < width[1]


def test_seeds_widen_the_interval():
    one = statistics.against_published(86, 500, 86.4, 500)
    several = statistics.against_published(86, 500, 86.4, 500, seed_scores=[83, 86, 89])
    assert several.interval[1] - several.interval[0] > one.interval[1] - one.interval[0]
    assert statistics.spread([83, 86, 89]) == {"mean": 86, "sd": 3, "low": 83, "high": 89}
