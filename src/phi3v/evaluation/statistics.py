"""Intervals, paired comparisons and verdicts. Figures are 0-100, and intervals 95 % unless stated otherwise.

Bootstraps are seeded, so the same scores give the same interval.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

Interval = tuple[float, float]
Z95 = 1.959963984540054
"""97.5th percentile of the standard normal distribution."""
RESAMPLES = 2000
MARGIN = 2.0
"""Largest difference in points at which two scores count as equal."""

Verdict = Literal["agrees", "above", "below", "inconclusive"]


def wilson(correct: int, n: int) -> Interval:
    """Interval of a proportion, 0-100 (Wilson 1927). correct: successes out of n. Raises ValueError on n < 1."""
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"correct, n: got {correct} of {n}; expected 0 <= correct <= n and n >= 1")
    low, high = stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
    return 100 * float(low), 100 * float(high)


def bootstrap(scores: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Percentile bootstrap interval of the mean of 0-1 scores, or of their differences, times 100 (Efron 1979). Raises
    ValueError on none.

    Each resample is drawn as counts of the distinct values (a multinomial). This has the same distribution as drawing n
    values one by one, as in scipy.stats.bootstrap, in a thousandth of the time for 5,000 scores of 0 and 1.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        raise ValueError("scores: empty; expected at least one")
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(values.size, counts / values.size, size=resamples)
    means = drawn @ distinct / values.size  # [resamples, distinct] to [resamples]
    low, high = np.percentile(means, [2.5, 97.5])
    return 100 * float(low), 100 * float(high)


def bootstrap_paired(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    left: Sequence[float] | np.ndarray,
    right: Sequence[float] | np.ndarray,
    seed: int = 0,
    resamples: int = 500,
) -> Interval:
    """Percentile bootstrap interval of a statistic of two values per example.

    statistic: two arrays [n] to a figure; it may raise ValueError for a resample that it is not defined on (AUROC with
    one class), which is then left out. Raises ValueError if that is every resample.
    """
    first, second = np.asarray(left), np.asarray(right)
    rng = np.random.default_rng(seed)
    figures = []
    for _ in range(resamples):  # one at a time: all indices of a million examples would take 4 GB
        pick = rng.integers(0, first.size, first.size)
        with contextlib.suppress(ValueError):
            figures.append(statistic(first[pick], second[pick]))
    if not figures:
        raise ValueError("statistic: undefined on every resample; expected more varied examples")
    low, high = np.percentile(figures, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Comparison:
    """`left` minus `right` on the same examples, in points."""

    difference: float
    interval: Interval
    n: int
    p: float | None
    """McNemar's exact p-value where all scores are 0 or 1."""


def mcnemar(left: Sequence[float] | np.ndarray, right: Sequence[float] | np.ndarray) -> float:
    """Two-sided exact p-value that two raters of the same examples are equally often right (McNemar 1947; binomial
    form)."""
    a, b = np.asarray(left) > 0.5, np.asarray(right) > 0.5
    only_left, only_right = int((a & ~b).sum()), int((b & ~a).sum())
    discordant = only_left + only_right
    return float(stats.binomtest(only_left, discordant).pvalue) if discordant else 1.0


def paired(
    left: Sequence[float] | np.ndarray, right: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> Comparison:
    """Mean of left minus right over the same examples, with a paired bootstrap interval. Raises ValueError on unequal
    lengths."""
    a, b = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"scores: {a.size} and {b.size} of them; expected the same examples, at least one")
    differences = a - b
    binary = bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
    interval = bootstrap(differences, seed, resamples)
    return Comparison(100 * float(differences.mean()), interval, a.size, mcnemar(a, b) if binary else None)


def spread(scores: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Mean, standard deviation (n - 1) and range of one row over several seeds."""
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        raise ValueError("scores: empty; expected at least one")
    deviation = float(values.std(ddof=1)) if values.size > 1 else 0.0
    return {"mean": float(values.mean()), "sd": deviation, "low": float(values.min()), "high": float(values.max())}


def _half_width(sampling: float, seeds: float, count: int) -> float:
    """Half of a 95 % interval of a figure with a known sampling variance and another from `count` seeds (Welch and
    Satterthwaite)."""
    total = sampling + seeds
    if not seeds:
        return Z95 * math.sqrt(total)
    freedom = total**2 / (seeds**2 / (count - 1))
    return float(stats.t.ppf(0.975, freedom)) * math.sqrt(total)


def interval_over_seeds(scores: Sequence[float] | np.ndarray, seed_scores: Sequence[float] | np.ndarray) -> Interval:
    """Interval of a mean over seeds, in points, from the variation between examples and between seeds.

    scores: each example's 0-1 score, averaged over the seeds. seed_scores: each seed's 0-100 score. What differs
    between seeds by example counts in both, so the interval is slightly too wide.
    """
    values, seeds = np.asarray(scores, dtype=np.float64), np.asarray(seed_scores, dtype=np.float64)
    mean = 100 * float(values.mean())
    sampling = standard_error(mean, values.size, values) ** 2
    between = float(np.var(seeds, ddof=1)) / seeds.size if seeds.size > 1 else 0.0
    half = _half_width(sampling, between, seeds.size)
    return max(0.0, mean - half), min(100.0, mean + half)


@dataclass(frozen=True)
class AgainstPublished:
    """Our score minus the published score, in points."""

    difference: float
    interval: Interval
    verdict: Verdict


def standard_error(score: float, n: int, scores: Sequence[float] | np.ndarray | None = None) -> float:
    """Sampling error of a 0-100 score over n examples, in points.

    From the standard deviation of the scores if given, else of a proportion of this size, which is the largest for 0-1
    scores. A share of 0 or 100 % would give zero, so one success and one failure are added (Laplace).
    """
    if scores is not None and np.ptp(np.asarray(scores)) > 0:
        return 100 * float(np.std(np.asarray(scores), ddof=1)) / math.sqrt(n)
    share = (score / 100 * n + 1) / (n + 2)
    return 100 * math.sqrt(share * (1 - share) / n)


def against_published(
    score: float,
    n: int,
    published: float,
    published_n: int,
    scores: Sequence[float] | np.ndarray | None = None,
    seed_scores: Sequence[float] | np.ndarray = (),
    margin: float = MARGIN,
) -> AgainstPublished:
    """Verdict on a published figure from the interval of the difference, both sides' sampling errors and the seeds'
    spread in it.

    The published answers are unknown, so the two sides count as independent. This makes the interval wider than a
    paired one. agrees / above / below: the whole interval lies within / above / below plus or minus `margin`; otherwise
    inconclusive. With few examples, the interval is too wide for "agrees".
    """
    ours = standard_error(score, n, scores)
    # Without the published answers, their scatter is taken to be as ours, else that of a proportion. A mean over seeds
    # scatters less than the one seed that was published.
    alike = scores is not None and len(seed_scores) < 2
    theirs = ours * math.sqrt(n / published_n) if alike else standard_error(published, published_n)
    seeds = float(np.var(seed_scores, ddof=1)) if len(seed_scores) > 1 else 0.0
    # The published figure comes from one seed, ours is the mean over several.
    between = seeds / max(len(seed_scores), 1) + seeds
    half = _half_width(ours**2 + theirs**2, between, len(seed_scores))
    difference = score - published
    low, high = difference - half, difference + half
    verdict: Verdict = "inconclusive"
    if -margin <= low and high <= margin:
        verdict = "agrees"
    elif low > margin:
        verdict = "above"
    elif high < -margin:
        verdict = "below"
    return AgainstPublished(difference, (low, high), verdict)
