"""How sure a comparison is: intervals over seeds, and of paired differences over seeds and test examples.

Functions of NumPy arrays. Methods are compared on the same seeds and the same test examples, and both are resampled
together: what makes a seed or an example hard for all methods cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
REPLICATES = 2000
CHUNK = 2**23  # resampled counts at a time, 64 MB

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Interval:
    """A figure and how far it is known.

    Attributes:
        value: The figure itself.
        low: Lower end of the interval, in the unit of the figure; not a number where there is none (one seed).
        high: Upper end, likewise.
    """

    value: float
    low: float = float("nan")
    high: float = float("nan")

    @property
    def excludes_zero(self) -> bool:
        """Whether zero is outside of the interval; False without an interval."""
        return bool(self.low > 0 or self.high < 0)


def confidence_half_width(values: Any, level: float = LEVEL) -> np.ndarray | None:
    """Half the width of Student's confidence interval of the mean over the first dimension; None of one seed.

    Args:
        values: (seeds, ...), in any unit.
        level: Of confidence, in (0, 1).

    Example:
        >>> confidence_half_width(np.array([[1.0], [2.0], [3.0]])).round(4).tolist()  # 4.3027 / sqrt(3)
        [2.4841]
    """
    from scipy.stats import t

    values = np.asarray(values, dtype=float)
    n = len(values)
    return None if n < 2 else t.ppf((1 + level) / 2, n - 1) * values.std(axis=0, ddof=1) / np.sqrt(n)


def mean_interval(values: Any, level: float = LEVEL) -> Interval:
    """Mean over seeds and Student's interval of it, which says how other seeds would come out on the same test examples.

    Args:
        values: (seeds,), one figure a seed.
        level: Of confidence, in (0, 1).

    Raises:
        ValueError: There is no value, or more than one dimension.

    Example:
        >>> interval = mean_interval([1.0, 2.0, 3.0])
        >>> interval.value, round(interval.low, 4), round(interval.high, 4)
        (2.0, -0.4841, 4.4841)
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be one figure for each of one or more seeds, got the shape {values.shape}.")
    half = confidence_half_width(values, level)
    mean = float(values.mean())
    return Interval(mean) if half is None else Interval(mean, mean - float(half), mean + float(half))


def example_scores(logits: Any, labels: Any) -> dict[str, np.ndarray]:
    """What each test example adds to the figures of a classifier, to be resampled.

    Args:
        logits: (n, c).
        labels: (n,) class indices; -100 is left out.

    Returns:
        `accuracy`, `nll` (nats) and `brier`, (n,) each, whose means are the figures of [`~mm_hf.evaluation.metrics`] by these names,
        and `calibration_error`, (n, 2): confidence and whether the prediction is right, for [`binned_gap`].

    Raises:
        ValueError: Logits and labels do not fit each other.

    Example:
        >>> scores = example_scores([[2.0, 1.0], [0.0, 1.0]], [0, 0])
        >>> scores["accuracy"].tolist(), scores["calibration_error"].shape
        ([1.0, 0.0], (2, 2))
    """
    from .metrics.base import vectors_and_labels

    x, y = vectors_and_labels(logits, labels)
    if int(y.max()) >= x.shape[-1]:
        raise ValueError(f"labels must be below the number of classes, {x.shape[-1]}, got {int(y.max())}.")
    log_probabilities, targets = x.log_softmax(dim=-1).numpy(), y.numpy()
    probabilities = np.exp(log_probabilities)
    right = (log_probabilities.argmax(axis=1) == targets).astype(float)
    right[np.isnan(log_probabilities).any(axis=1)] = np.nan  # a training that has diverged has no accuracy
    one_hot = np.eye(probabilities.shape[1])[targets]
    return {
        "accuracy": right,
        "nll": -log_probabilities[np.arange(len(targets)), targets],
        "brier": np.square(probabilities - one_hot).sum(axis=1),
        "calibration_error": np.stack([probabilities.max(axis=1), right], axis=1),
    }


def weighted_mean(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of the scores (n,) under each row of counts (replicates, n), each of which sums to n: (replicates,)."""
    return counts @ scores / scores.shape[0]


def binned_gap(scores: np.ndarray, counts: np.ndarray, num_bins: int = 15) -> np.ndarray:
    """Calibration error, in [0, 1], of confidence and rightness (n, 2) under each row of counts (replicates, n).

    The bins are those of [`~mm_hf.evaluation.metrics.calibration_error`], of equal width and closed on the left.

    Example:
        >>> binned_gap(np.array([[0.9, 1.0], [0.9, 0.0]]), np.array([[1.0, 1.0], [2.0, 0.0]])).round(6).tolist()
        [0.4, 0.1]
    """
    confidence, right = scores.T
    edges = np.linspace(0, 1, num_bins + 1)
    where = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, num_bins - 1)
    gaps = np.zeros((len(scores), num_bins))
    gaps[np.arange(len(scores)), where] = right - confidence
    return np.abs(counts @ gaps).sum(axis=1) / len(scores)


STATISTICS: dict[str, Statistic] = {
    "accuracy": weighted_mean,
    "nll": weighted_mean,
    "brier": weighted_mean,
    "calibration_error": binned_gap,
}


def paired_bootstrap(
    scores: Any,
    baseline: Any,
    *,
    statistic: Statistic = weighted_mean,
    replicates: int = REPLICATES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Difference of two methods over seeds, `scores` less `baseline`, and its percentile bootstrap interval.

    Each replicate draws seeds with replacement and test examples with replacement, the same ones for both methods; within
    a replicate all seeds see the same draw of examples, since they were tested on the same ones. The statistic is taken
    for each seed, and the mean over the drawn seeds is what the methods differ in. With one seed only examples are drawn,
    and the interval says nothing of other seeds.

    Drawn from few seeds, the spread between seeds is underestimated, by (seeds - 1) / seeds in its variance: it is widened
    here by that factor about the observed difference, so that two or three seeds do not look surer than they are.

    Args:
        scores: (seeds, n) or (seeds, n, 2), as [`example_scores`] gives them for each seed.
        baseline: Of the same shape, of the method that it is compared with.
        statistic: Of the scores of one seed, given how often each example was drawn: [`weighted_mean`] or
            [`binned_gap`].
        replicates: How often seeds and examples are drawn.
        level: Of confidence, in (0, 1).
        seed: Of the draws; two calls with one seed draw the same.

    Returns:
        The observed difference and the ends of the interval. Equal scores give exactly 0 and [0, 0]. Where a score is
        not a number, neither are they.

    Raises:
        ValueError: The shapes differ or are empty, or `replicates` or `level` makes no sense.

    Source:
        Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics, 1979; for two ways of drawing at
        once Owen, "The pigeonhole bootstrap", Annals of Applied Statistics, 2007.

    Example:
        >>> right = np.array([[1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
        >>> paired_bootstrap(right, right)
        Interval(value=0.0, low=0.0, high=0.0)
    """
    a, b = np.asarray(scores, dtype=float), np.asarray(baseline, dtype=float)
    if a.shape != b.shape or a.ndim < 2 or not a.size:
        raise ValueError(
            f"scores and baseline must both be (seeds, examples, ...), on the same seeds and examples, got {a.shape} and "
            f"{b.shape}."
        )
    if replicates < 1 or not 0 < level < 1:
        raise ValueError(f"replicates must be at least 1 and level in (0, 1), got {replicates} and {level}.")
    seeds, n = a.shape[:2]
    ones = np.ones((1, n))
    by_seed = np.array([statistic(x, ones)[0] - statistic(y, ones)[0] for x, y in zip(a, b, strict=True)])
    observed = float(by_seed.mean())
    if not np.isfinite(observed):
        return Interval(float("nan"))
    widening = np.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0
    generator = np.random.default_rng(seed)
    found = []
    for examples in _counts(generator, replicates, n):
        chosen = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=len(examples)) / seeds
        differences = np.stack(
            [statistic(x, examples) - statistic(y, examples) for x, y in zip(a, b, strict=True)], axis=1
        )
        # The part of a replicate that comes of the seeds drawn is what is widened; that of the examples is kept.
        even = differences.mean(axis=1)
        found.append(even + widening * ((chosen * differences).sum(axis=1) - even))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return Interval(observed, float(low), float(high))


def _counts(generator: np.random.Generator, replicates: int, n: int) -> Iterator[np.ndarray]:
    """How often each of n examples is drawn in n draws, some replicates at a time: (replicates, n), floating."""
    step = max(CHUNK // n, 1)
    for start in range(0, replicates, step):
        rows = min(step, replicates - start)
        drawn = generator.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(float)
