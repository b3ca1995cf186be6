"""Confidence intervals over seeds, and intervals of paired differences over seeds and test examples.

Functions of NumPy arrays. Methods are compared on the same seeds and the same test examples, and both are resampled
together, so that the effect of a seed or an example that all methods share cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
INTERVAL_SEEDS = 3  # Student's interval of the mean of two seeds is 13 times as wide as their range
REPLICATES = 2000
NUM_BINS = 15
CHUNK = 2**23  # resampled counts per chunk, 64 MB

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Interval:
    """A value and its confidence interval.

    Attributes:
        value: The estimate.
        low: Lower end of the interval, in the unit of the value; NaN without an interval (one seed).
        high: Upper end of the interval, likewise.
    """

    value: float
    low: float = float("nan")
    high: float = float("nan")

    @property
    def excludes_zero(self) -> bool:
        """True if zero lies outside of the interval; False without an interval."""
        return bool(self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Range(Interval):
    """The mean of a few values, and the smallest and the largest of them, which are no confidence interval."""

    @property
    def excludes_zero(self) -> bool:
        """False: a range is not evidence of a difference."""
        return False


def confidence_half_width(values: Any, level: float = LEVEL) -> np.ndarray | None:
    """Return half the width of Student's confidence interval of the mean over the first dimension.

    Args:
        values: (seeds, ...), in any unit.
        level: Confidence level, in (0, 1).

    Returns:
        An array without the first dimension, or None for a single seed.

    Example:
        >>> confidence_half_width(np.array([[1.0], [2.0], [3.0]])).round(4).tolist()  # 4.3027 / sqrt(3)
        [2.4841]
    """
    from scipy.stats import t

    values = np.asarray(values, dtype=float)
    n = len(values)
    return None if n < 2 else t.ppf((1 + level) / 2, n - 1) * values.std(axis=0, ddof=1) / np.sqrt(n)


def mean_interval(values: Any, level: float = LEVEL) -> Interval:
    """Return the mean over seeds and its Student's interval, which covers other seeds on the same test examples.

    Args:
        values: (seeds,), one value per seed.
        level: Confidence level, in (0, 1).

    Raises:
        ValueError: `values` is empty or has more than one dimension.

    Example:
        >>> interval = mean_interval([1.0, 2.0, 3.0])
        >>> interval.value, round(interval.low, 4), round(interval.high, 4)
        (2.0, -0.4841, 4.4841)
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must have the shape (seeds,) with one or more seeds, got {values.shape}.")
    half = confidence_half_width(values, level)
    mean = float(values.mean())
    return Interval(mean) if half is None else Interval(mean, mean - float(half), mean + float(half))


def has_interval(seeds: int) -> bool:
    """Return True if the spread of this number of seeds is an interval, and not the range of their values."""
    return seeds >= INTERVAL_SEEDS


def seed_spread(values: Any, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the lower and upper ends of the spread to display with a mean over seeds, the first dimension.

    From three seeds on, the spread is Student's interval of [`confidence_half_width`]. With two seeds, it is the range
    of the two values, since that interval has one degree of freedom and states nothing.

    Args:
        values: (seeds, ...), in any unit.
        level: Confidence level of an interval, in (0, 1).

    Returns:
        Two arrays without the first dimension, or None for a single seed.

    Example:
        >>> seed_spread([[1.0], [2.0]])
        (array([1.]), array([2.]))
        >>> [end.round(4).tolist() for end in seed_spread([[1.0], [2.0], [3.0]])]
        [[-0.4841], [4.4841]]
    """
    values = np.asarray(values, dtype=float)
    half = confidence_half_width(values, level)
    if half is None:
        return None
    if not has_interval(len(values)):
        return values.min(axis=0), values.max(axis=0)
    return values.mean(axis=0) - half, values.mean(axis=0) + half


def mean_and_spread(values: Any, level: float = LEVEL) -> Interval:
    """Return the mean over seeds (seeds,) and its [`seed_spread`]: an Interval, or the Range of two seeds.

    Raises:
        ValueError: `values` is empty or has more than one dimension.

    Example:
        >>> mean_and_spread([1.0, 2.0])
        Range(value=1.5, low=1.0, high=2.0)
    """
    interval, ends = mean_interval(values, level), seed_spread(values, level)
    if ends is None:
        return interval
    kind = Interval if has_interval(len(values)) else Range
    return kind(interval.value, float(ends[0]), float(ends[1]))


def weighted_mean(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the mean of scores (n,) under each row of counts (replicates, n), each of which sums to n."""
    return counts @ scores / scores.shape[0]


def confidence_bins(confidence: np.ndarray, num_bins: int = NUM_BINS) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges of bins of equal width on [0, 1], and the bin of each confidence.

    Bins are closed on the left; a confidence of 1 falls into the last one.

    Example:
        >>> edges, bins = confidence_bins(np.array([0.2, 0.5, 1.0]), num_bins=2)
        >>> edges.tolist(), bins.tolist()
        ([0.0, 0.5, 1.0], [0, 1, 1])
    """
    edges = np.linspace(0, 1, num_bins + 1)
    return edges, np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, num_bins - 1)


def binned_gap(scores: np.ndarray, counts: np.ndarray, num_bins: int = NUM_BINS) -> np.ndarray:
    """Return the expected calibration error, in [0, 1], under each row of counts.

    Args:
        scores: (n, 2), the confidence of each prediction and 1 if it is correct, else 0.
        counts: (replicates, n), how often each example was drawn; each row sums to n.
        num_bins: Bins of [`confidence_bins`].

    Returns:
        (replicates,).

    Example:
        >>> binned_gap(np.array([[0.9, 1.0], [0.9, 0.0]]), np.array([[1.0, 1.0], [2.0, 0.0]])).round(6).tolist()
        [0.4, 0.1]
    """
    confidence, correct = scores.T
    _, bins = confidence_bins(confidence, num_bins)
    gaps = np.zeros((len(scores), num_bins))
    gaps[np.arange(len(scores)), bins] = correct - confidence
    return np.abs(counts @ gaps).sum(axis=1) / len(scores)


@dataclass(frozen=True)
class ExampleStatistic:
    """A metric as scores of single examples and a reduction of them, so that examples can be resampled.

    Args:
        scores: Function of log-probabilities (n, c) and class indices (n,) that returns scores (n,) or (n, k).
        reduce: Function of the scores and of counts (replicates, n), how often each example was drawn; it returns
            (replicates,).

    Example:
        >>> hits = ExampleStatistic(lambda log_probabilities, labels: log_probabilities.argmax(axis=1) == labels)
        >>> hits.value(np.log([[0.9, 0.1], [0.8, 0.2]]), np.array([0, 1]))
        0.5
    """

    scores: Callable[[np.ndarray, np.ndarray], np.ndarray]
    reduce: Statistic = weighted_mean

    def value(self, log_probabilities: np.ndarray, labels: np.ndarray) -> float:
        """Return the metric of the examples, each counted once."""
        return float(self.reduce(self.scores(log_probabilities, labels), np.ones((1, len(labels))))[0])


def paired_bootstrap(
    scores: Any,
    baseline: Any,
    *,
    statistic: Statistic = weighted_mean,
    replicates: int = REPLICATES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Return the difference of two methods, `scores` minus `baseline`, and its interval over examples and seeds.

    Each replicate draws test examples with replacement, the same ones for both methods and all seeds, which were tested
    on the same examples, and computes the difference for each seed. The variation between seeds is added to their mean
    as in Student's interval: the standard error over the seeds times a number from Student's distribution with
    seeds - 1 degrees of freedom. This is valid for two seeds, whose intervals are wide, while drawing two seeds with
    replacement would not be. The ends are percentiles over the replicates. With one seed only examples are drawn, and
    the interval does not cover other seeds.

    Args:
        scores: (seeds, n) or (seeds, n, k), per-example scores for each seed.
        baseline: Scores of the baseline, of the same shape.
        statistic: Function of the scores of one seed and of the counts of drawn examples: [`weighted_mean`],
            [`binned_gap`] or the `reduce` of an [`ExampleStatistic`].
        replicates: Number of draws.
        level: Confidence level, in (0, 1).
        seed: Seed of the draws.

    Returns:
        The observed difference and the ends of the interval. Equal scores give exactly 0 and [0, 0]. If a score is NaN,
        all three are NaN.

    Raises:
        ValueError: The shapes differ or are empty, or `replicates` or `level` is out of range.

    Source:
        Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics, 1979, for the examples;
        Student, "The Probable Error of a Mean", Biometrika, 1908, for the seeds. Their combination is our choice.

    Example:
        >>> correct = np.array([[1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
        >>> paired_bootstrap(correct, correct)
        Interval(value=0.0, low=0.0, high=0.0)
    """
    a, b = np.asarray(scores, dtype=float), np.asarray(baseline, dtype=float)
    if a.shape != b.shape or a.ndim < 2 or not a.size:
        raise ValueError(
            "scores and baseline must have the same shape (seeds, examples, ...), for the same seeds and examples, got "
            f"{a.shape} and {b.shape}."
        )
    if replicates < 1 or not 0 < level < 1:
        raise ValueError(f"replicates must be at least 1 and level in (0, 1), got {replicates} and {level}.")
    seeds, n = a.shape[:2]
    ones = np.ones((1, n))
    per_seed = np.array([statistic(x, ones)[0] - statistic(y, ones)[0] for x, y in zip(a, b, strict=True)])
    observed = float(per_seed.mean())
    if not np.isfinite(observed):
        return Interval(float("nan"))
    generator = np.random.default_rng(seed)
    deviations = _student_deviations(generator, replicates, seeds)
    found = []
    for counts in _example_counts(generator, replicates, n):
        differences = np.stack([statistic(x, counts) - statistic(y, counts) for x, y in zip(a, b, strict=True)], axis=1)
        of_seeds = np.zeros(len(counts))
        if seeds > 1:
            of_seeds, deviations = deviations[: len(counts)], deviations[len(counts) :]
            of_seeds = of_seeds * differences.std(axis=1, ddof=1) / np.sqrt(seeds)
        mean = differences.mean(axis=1)
        found += [mean + of_seeds, mean - of_seeds]  # both signs: swapping the methods negates the interval
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return Interval(observed, float(low), float(high))


def _student_deviations(generator: np.random.Generator, replicates: int, seeds: int) -> np.ndarray:
    """Return the quantiles of Student's distribution for equally spaced probabilities, in random order.

    Random numbers would give less accurate ends of the interval, because this distribution has heavy tails.
    """
    if seeds < 2:
        return np.zeros(replicates)
    from scipy.stats import t

    return t.ppf((generator.permutation(replicates) + 0.5) / replicates, seeds - 1)


def _example_counts(generator: np.random.Generator, replicates: int, n: int) -> Iterator[np.ndarray]:
    """Yield chunks (replicates, n) of how often each of n examples is drawn in n draws, as floats."""
    step = max(CHUNK // n, 1)
    for start in range(0, replicates, step):
        rows = min(step, replicates - start)
        drawn = generator.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(float)
