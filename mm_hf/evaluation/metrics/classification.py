"""Accuracy, macro F1, negative log-likelihood, Brier score and expected calibration error from logits.

The functions take logits (n, c), or (..., c) for models that label every location, as an array, a tensor on any device
or lists, and labels (n,) or (...); those labelled -100 are left out. They compute in float64, up to what
torchmetrics does in float32 (F1, calibration error: good to 1e-6). Where a logit is not a
number, because a training has diverged say, the figure is not a number either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from .base import VectorMetric, vectors_and_labels

NUM_BINS = 15
NAN = float("nan")


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """All of this module, ready for `Trainer(compute_metrics=...)`.

    Args:
        prediction: Logits (n, c), alone or first in a tuple, and labels (n,); those labelled -100 are left out.

    Returns:
        `accuracy`, `macro_f1` and `calibration_error` in [0, 1], `brier` in [0, 2], `nll` in nats.

    Raises:
        ValueError: Logits and labels do not fit each other.
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    labels = prediction.label_ids
    return {
        "accuracy": accuracy(logits, labels),
        "macro_f1": macro_f1(logits, labels),
        "nll": negative_log_likelihood(logits, labels),
        "brier": brier_score(logits, labels),
        "calibration_error": calibration_error(logits, labels),
    }


def accuracy(logits: Any, labels: Any) -> float:
    """Share of examples whose largest logit is the label's, in [0, 1].

    Args:
        logits: (n, c).
        labels: (n,) class indices; -100 is left out.

    Raises:
        ValueError: Logits and labels do not fit each other.

    Example:
        >>> accuracy([[2.0, 1.0], [0.0, 1.0]], [0, 0])
        0.5
    """
    log_probabilities, labels = _log_probabilities(logits, labels)
    if log_probabilities is None:
        return NAN
    return float((log_probabilities.argmax(dim=-1) == labels).double().mean())


def macro_f1(logits: Any, labels: Any) -> float:
    """F1 score of each class, averaged over the classes that occur among labels or predictions, in [0, 1] (torchmetrics).

    Args:
        logits: (n, c); the largest one is the predicted class.
        labels: (n,) class indices; -100 is left out.

    Raises:
        ValueError: Logits and labels do not fit each other.

    Example:
        >>> round(macro_f1([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0]], [0, 0, 1]), 4)  # both classes have 2/3
        0.6667
    """
    from torchmetrics.functional.classification import multiclass_f1_score

    log_probabilities, labels = _log_probabilities(logits, labels)
    if log_probabilities is None:
        return NAN
    classes = log_probabilities.shape[-1]
    return float(multiclass_f1_score(log_probabilities.argmax(dim=-1), labels, num_classes=classes, average="macro"))


def negative_log_likelihood(logits: Any, labels: Any) -> float:
    """Mean negative logarithm of the probability of the label, in nats.

    Args:
        logits: (n, c).
        labels: (n,) class indices; -100 is left out.

    Raises:
        ValueError: Logits and labels do not fit each other.

    Example:
        >>> round(negative_log_likelihood([[0.0, 0.0]], [0]), 4)
        0.6931
    """
    log_probabilities, labels = _log_probabilities(logits, labels)
    return NAN if log_probabilities is None else float(torch.nn.functional.nll_loss(log_probabilities, labels))


def brier_score(logits: Any, labels: Any) -> float:
    """Mean squared distance between the class probabilities and the one-hot label, summed over classes, in [0, 2].

    Args:
        logits: (n, c).
        labels: (n,) class indices; -100 is left out.

    Raises:
        ValueError: Logits and labels do not fit each other.

    Source:
        Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather Review, 1950: his original
        sum over all classes. What some libraries give for two classes is half of it.

    Example:
        >>> brier_score([[0.0, 0.0]], [0])
        0.5
    """
    log_probabilities, labels = _log_probabilities(logits, labels)
    if log_probabilities is None:
        return NAN
    probabilities = log_probabilities.exp()
    one_hot = torch.nn.functional.one_hot(labels, probabilities.shape[-1])
    return float((probabilities - one_hot).square().sum(dim=-1).mean())


def calibration_error(logits: Any, labels: Any, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error of the most probable class, l1, bins of equal width, in [0, 1] (torchmetrics).

    Args:
        logits: (n, c).
        labels: (n,) class indices; -100 is left out.
        num_bins: Bins of the confidence, from 0 to 1.

    Raises:
        ValueError: Logits and labels do not fit each other, or there is no bin.

    Example:
        >>> calibration_error([[0.0, 0.0], [0.0, 0.0]], [0, 1])
        0.0
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    _check_bins(num_bins)
    log_probabilities, labels = _log_probabilities(logits, labels)
    if log_probabilities is None:
        return NAN
    # A confidence of exactly 1, in the float32 that torchmetrics goes on in, would open a bin behind the last one.
    probabilities = log_probabilities.exp().clamp(max=1 - 2**-24)
    classes = probabilities.shape[-1]
    return float(multiclass_calibration_error(probabilities, labels, num_classes=classes, n_bins=num_bins))


@dataclass(frozen=True)
class Reliability:
    """How often predictions of some confidence are right: what a reliability diagram shows.

    Attributes:
        edges: (bins + 1,), from 0 to 1.
        confidence: (bins,) mean probability of the most probable class; not a number in empty bins.
        accuracy: (bins,) share of examples whose most probable class is the label; not a number in empty bins.
        share: (bins,) share of the examples that fall into each bin.
    """

    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    share: np.ndarray

    @property
    def calibration_error(self) -> float:
        """The mean gap between accuracy and confidence, which is that of [`calibration_error`]."""
        return float(np.nansum(self.share * np.abs(self.accuracy - self.confidence)))


def reliability(logits: Any, labels: Any, num_bins: int = NUM_BINS) -> Reliability:
    """Accuracy and confidence in bins of the confidence, the same bins as in [`calibration_error`].

    Args:
        logits: (n, c).
        labels: (n,) class indices; -100 is left out.
        num_bins: Bins of equal width, closed on the left.

    Raises:
        ValueError: Logits and labels do not fit each other, hold what is no number, or there is no bin.

    Example:
        >>> bins = reliability([[0.0, 0.0], [9.0, 0.0]], [1, 0], num_bins=2)
        >>> bins.accuracy.tolist(), bins.share.tolist()
        ([nan, 0.5], [0.0, 1.0])
    """
    _check_bins(num_bins)
    log_probabilities, y = _log_probabilities(logits, labels)
    if log_probabilities is None:
        raise ValueError("logits hold values that are no numbers: confidence has no bins for them.")
    best = log_probabilities.max(dim=-1)
    confidence, right = best.values.exp().numpy(), (best.indices == y).numpy()
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64).numpy()
    where = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, num_bins - 1)
    count = np.bincount(where, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(where, weights=x, minlength=num_bins) / count for x in (confidence, right)]
    return Reliability(edges, means[0], means[1], count / count.sum())


def _log_probabilities(logits: Any, labels: Any) -> tuple[Tensor | None, Any]:
    """Log-probabilities (n, c) in float64, None where they are no numbers, and labels (n,)."""
    x, y = vectors_and_labels(logits, labels)
    if y.max() >= x.shape[-1]:
        raise ValueError(f"labels must be below the number of classes, {x.shape[-1]}, got {int(y.max())}.")
    x = x.log_softmax(dim=-1)
    return (None if x.isnan().any() else x), y


def _check_bins(num_bins: int) -> None:
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, but is {num_bins}.")


class Accuracy(VectorMetric):
    """Share of examples whose largest logit is the label's: [`accuracy`].

    Example:
        >>> Accuracy().compute(predictions=[[2.0, 1.0], [0.0, 1.0]], references=[0, 0])
        {'accuracy': 0.5}
    """

    description = "Share of examples whose largest logit is the label's."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": accuracy(predictions, references)}


class MacroF1(VectorMetric):
    """F1 score averaged over the classes that occur: [`macro_f1`].

    Example:
        >>> MacroF1().compute(predictions=[[2.0, 1.0], [0.0, 1.0]], references=[0, 1])
        {'macro_f1': 1.0}
    """

    description = "F1 score averaged over the classes that occur among labels or predictions."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"macro_f1": macro_f1(predictions, references)}


class NegativeLogLikelihood(VectorMetric):
    """Mean negative logarithm of the probability of the label, in nats: [`negative_log_likelihood`].

    Example:
        >>> round(NegativeLogLikelihood().compute(predictions=[[0.0, 0.0]], references=[0])["nll"], 4)
        0.6931
    """

    description = "Mean negative logarithm of the probability of the label, in nats."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"nll": negative_log_likelihood(predictions, references)}


class BrierScore(VectorMetric):
    """Squared distance of the class probabilities from the one-hot label, in [0, 2]: [`brier_score`].

    Example:
        >>> BrierScore().compute(predictions=[[0.0, 0.0]], references=[0])
        {'brier': 0.5}
    """

    description = "Mean squared distance between class probabilities and one-hot label, summed over classes."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"brier": brier_score(predictions, references)}


class CalibrationError(VectorMetric):
    """Expected calibration error of the most probable class, l1, 15 bins of equal width: [`calibration_error`].

    Example:
        >>> CalibrationError().compute(predictions=[[0.0, 0.0], [0.0, 0.0]], references=[0, 1])
        {'calibration_error': 0.0}
    """

    description = "Expected calibration error of the most probable class, 15 bins of equal width."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"calibration_error": calibration_error(predictions, references)}
