"""Accuracy, negative log-likelihood, Brier score, calibration error, macro F1 and balanced accuracy from logits.

The functions take logits (n, c), or (..., c) for models that label every location, as an array, a tensor on any device
or nested lists, and labels (n,) or (...). Labels of -100 are ignored. They compute in float64. If a logit is NaN, for
example after a training run has diverged, the metric is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..statistics import NUM_BINS, ExampleStatistic, binned_gap, confidence_bins
from .base import vectors_and_labels


def _correct(log_probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return 1 for each correct prediction and 0 for the others; NaN if a logit of the example is NaN."""
    correct = (log_probabilities.argmax(axis=1) == labels).astype(float)
    correct[np.isnan(log_probabilities).any(axis=1)] = np.nan
    return correct


def _nll(log_probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -log_probabilities[np.arange(len(labels)), labels]


def _squared_distance(log_probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the squared distance between class probabilities and one-hot label, summed over classes."""
    difference = np.exp(log_probabilities)
    difference[np.arange(len(labels)), labels] -= 1
    return np.square(difference).sum(axis=1)


def _confidence_and_correct(log_probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the probability of the predicted class and 1 if it is the label, else 0: (n, 2)."""
    return np.stack([np.exp(log_probabilities.max(axis=1)), _correct(log_probabilities, labels)], axis=1)


ACCURACY = ExampleStatistic(_correct)
NLL = ExampleStatistic(_nll)
BRIER = ExampleStatistic(_squared_distance)
CALIBRATION = ExampleStatistic(_confidence_and_correct, binned_gap)


def accuracy(logits: Any, labels: Any) -> float:
    """Return the share of examples whose largest logit is that of the label, in [0, 1].

    Args:
        logits: (n, c).
        labels: (n,) class indices; -100 is ignored.

    Raises:
        ValueError: The shapes or values of logits and labels do not match.

    Example:
        >>> accuracy([[2.0, 1.0], [0.0, 1.0]], [0, 0])
        0.5
    """
    return ACCURACY.value(*log_probabilities_and_labels(logits, labels))


def balanced_accuracy(logits: Any, labels: Any) -> float:
    """Return the recall averaged over the classes among the labels, in [0, 1].

    Args:
        logits: (n, c); the class with the largest logit is predicted.
        labels: (n,) class indices; -100 is ignored.

    Raises:
        ValueError: The shapes or values of logits and labels do not match.

    Example:
        >>> balanced_accuracy([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0]], [0, 0, 1])  # recalls of 1 and 0
        0.5
    """
    from sklearn.metrics import recall_score

    log_probabilities, y = log_probabilities_and_labels(logits, labels)
    if np.isnan(log_probabilities).any():
        return float("nan")
    return float(recall_score(y, log_probabilities.argmax(axis=1), labels=np.unique(y), average="macro"))


def macro_f1(logits: Any, labels: Any) -> float:
    """Return the F1 score averaged over the classes among labels and predictions, in [0, 1].

    Args:
        logits: (n, c); the class with the largest logit is predicted.
        labels: (n,) class indices; -100 is ignored.

    Raises:
        ValueError: The shapes or values of logits and labels do not match.

    Example:
        >>> round(macro_f1([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0]], [0, 0, 1]), 4)  # both classes have 2/3
        0.6667
    """
    from sklearn.metrics import f1_score

    log_probabilities, y = log_probabilities_and_labels(logits, labels)
    if np.isnan(log_probabilities).any():
        return float("nan")
    return float(f1_score(y, log_probabilities.argmax(axis=1), average="macro", zero_division=0.0))


def negative_log_likelihood(logits: Any, labels: Any) -> float:
    """Return the mean negative logarithm of the probability of the label, in nats.

    Args:
        logits: (n, c).
        labels: (n,) class indices; -100 is ignored.

    Raises:
        ValueError: The shapes or values of logits and labels do not match.

    Example:
        >>> round(negative_log_likelihood([[0.0, 0.0]], [0]), 4)
        0.6931
    """
    return NLL.value(*log_probabilities_and_labels(logits, labels))


def brier_score(logits: Any, labels: Any) -> float:
    """Return the mean squared distance between class probabilities and one-hot label, summed over classes, in [0, 2].

    Args:
        logits: (n, c).
        labels: (n,) class indices; -100 is ignored.

    Raises:
        ValueError: The shapes or values of logits and labels do not match.

    Source:
        Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather Review, 1950, whose sum
        runs over all classes. Some libraries return half of it for two classes.

    Example:
        >>> brier_score([[0.0, 0.0]], [0])
        0.5
    """
    return BRIER.value(*log_probabilities_and_labels(logits, labels))


def calibration_error(logits: Any, labels: Any, num_bins: int = NUM_BINS) -> float:
    """Return the expected calibration error of the predicted class: l1, bins of equal width, in [0, 1].

    Args:
        logits: (n, c).
        labels: (n,) class indices; -100 is ignored.
        num_bins: Number of bins of the confidence, from 0 to 1.

    Raises:
        ValueError: The shapes or values of logits and labels do not match, or `num_bins` is less than 1.

    Source:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Example:
        >>> calibration_error([[0.0, 0.0], [0.0, 0.0]], [0, 1])
        0.0
    """
    _check_bins(num_bins)
    statistic = ExampleStatistic(CALIBRATION.scores, partial(binned_gap, num_bins=num_bins))
    return statistic.value(*log_probabilities_and_labels(logits, labels))


@dataclass(frozen=True)
class Reliability:
    """Accuracy and confidence of predictions, in bins of confidence: the content of a reliability diagram.

    Attributes:
        edges: (bins + 1,), from 0 to 1.
        confidence: (bins,) mean probability of the predicted class; NaN in empty bins.
        accuracy: (bins,) share of correct predictions; NaN in empty bins.
        share: (bins,) share of the examples in each bin.
        calibration_error: Calibration error with these bins: the mean gap between accuracy and confidence.
    """

    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    share: np.ndarray
    calibration_error: float


def reliability(logits: Any, labels: Any, num_bins: int = NUM_BINS) -> Reliability:
    """Return accuracy and confidence in bins of confidence, the bins of [`calibration_error`].

    Args:
        logits: (n, c).
        labels: (n,) class indices; -100 is ignored.
        num_bins: Number of bins of equal width, closed on the left.

    Raises:
        ValueError: The shapes or values of logits and labels do not match, a logit is NaN, or `num_bins` is less than
            1.

    Example:
        >>> bins = reliability([[0.0, 0.0], [9.0, 0.0]], [1, 0], num_bins=2)
        >>> bins.accuracy.tolist(), bins.share.tolist()
        ([nan, 0.5], [0.0, 1.0])
    """
    _check_bins(num_bins)
    log_probabilities, y = log_probabilities_and_labels(logits, labels)
    if np.isnan(log_probabilities).any():
        raise ValueError("logits contain NaN, and their confidence belongs to no bin.")
    scores = CALIBRATION.scores(log_probabilities, y)
    edges, bins = confidence_bins(scores[:, 0], num_bins)
    count = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        confidence, correct = (np.bincount(bins, weights=x, minlength=num_bins) / count for x in scores.T)
    error = float(binned_gap(scores, np.ones((1, len(y))), num_bins)[0])
    return Reliability(edges, confidence, correct, count / count.sum(), error)


def log_probabilities_and_labels(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probabilities (n, c) in float64, NaN where logits are NaN, and labels (n,).

    Args:
        logits: (n, c).
        labels: (n,) class indices; -100 is ignored.

    Raises:
        ValueError: The shapes or values of logits and labels do not match.

    Example:
        >>> log_probabilities_and_labels([[0.0, 0.0], [1.0, 0.0]], [1, -100])
        (array([[-0.69314718, -0.69314718]]), array([1]))
    """
    x, y = vectors_and_labels(logits, labels)
    if y.max() >= x.shape[-1]:
        raise ValueError(f"labels must be below the number of classes, {x.shape[-1]}, got {int(y.max())}.")
    return x.log_softmax(dim=-1).numpy(), y.numpy()


def _check_bins(num_bins: int) -> None:
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, but is {num_bins}.")
