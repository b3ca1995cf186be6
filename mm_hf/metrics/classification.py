"""Accuracy, negative log-likelihood and expected calibration error from logits."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from transformers import EvalPrediction

IGNORE_INDEX = -100


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, NLL and calibration error, ready for `Trainer(compute_metrics=...)`.

    Args:
        prediction: Logits (n, c), alone or first in a tuple, and labels (n,); those labelled -100 are left out.

    Returns:
        `accuracy` and `calibration_error` in [0, 1], `nll` in nats.
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    labels = np.asarray(prediction.label_ids)
    logits, labels = np.asarray(logits)[labels != IGNORE_INDEX], labels[labels != IGNORE_INDEX]
    results: dict[str, float] = {}
    for metric in (_accuracy, _nll, _calibration_error):
        results.update(metric(logits, labels))
    return results


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"accuracy": float((logits.argmax(axis=-1) == labels).mean())}


def _nll(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    loss = torch.nn.functional.cross_entropy(torch.as_tensor(logits).double(), torch.as_tensor(labels).long())
    return {"nll": float(loss)}


def _calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> dict[str, float]:
    from torchmetrics.functional.classification import multiclass_calibration_error

    probabilities = torch.as_tensor(logits).double().softmax(dim=-1)
    error = multiclass_calibration_error(
        probabilities, torch.as_tensor(labels).long(), num_classes=probabilities.shape[-1], n_bins=bins
    )
    return {"calibration_error": float(error)}


class _FromLogits(evaluate.Metric):
    """Base of the metrics here: predictions are logits, references class indices."""

    description = ""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {
                "predictions": datasets.Sequence(datasets.Value("float64")),
                "references": datasets.Value("int64"),
            }
        )
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="predictions: logits of each example; references: its class index.",
            features=features,
        )


class Accuracy(_FromLogits):
    """Share of examples whose largest logit is the label's.

    Example:
        >>> Accuracy().compute(predictions=[[2.0, 1.0], [0.0, 1.0]], references=[0, 0])
        {'accuracy': 0.5}
    """

    description = "Share of examples whose largest logit is the label's."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return _accuracy(np.asarray(predictions), np.asarray(references))


class NegativeLogLikelihood(_FromLogits):
    """Mean negative logarithm of the probability of the label, in nats.

    Example:
        >>> round(NegativeLogLikelihood().compute(predictions=[[0.0, 0.0]], references=[0])["nll"], 4)
        0.6931
    """

    description = "Mean negative logarithm of the probability of the label, in nats."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return _nll(np.asarray(predictions), np.asarray(references))


class CalibrationError(_FromLogits):
    """Expected calibration error of the most probable class, l1, 15 bins of equal width (torchmetrics).

    Example:
        >>> CalibrationError().compute(predictions=[[0.0, 0.0], [0.0, 0.0]], references=[0, 1])
        {'calibration_error': 0.0}
    """

    description = "Expected calibration error of the most probable class, 15 bins of equal width."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return _calibration_error(np.asarray(predictions), np.asarray(references))
