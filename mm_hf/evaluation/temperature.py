"""Temperature scaling: the logits of a trained model, divided by one number that is fitted on validation examples."""

from __future__ import annotations

from typing import Any

import numpy as np

from .metrics.classification import log_probabilities_and_labels

LARGEST = 100.0


def fit_temperature(logits: Any, labels: Any) -> float:
    """Return the temperature that minimizes the negative log-likelihood of logits divided by it.

    Args:
        logits: (n, c), of validation examples.
        labels: (n,), class indices; -100 is ignored.

    Returns:
        A number in [0.01, 100]; 1 if a logit is not finite, because training has diverged.

    Source:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Example:
        >>> logits, labels = np.array([[8.0, 0.0], [8.0, 0.0], [8.0, 0.0], [8.0, 0.0]]), np.array([0, 0, 0, 1])
        >>> round(fit_temperature(logits, labels), 2)  # three of four are right: 8 / log(3)
        7.28
    """
    from scipy.optimize import minimize_scalar

    logits = np.asarray(logits, dtype=np.float64)
    if not np.isfinite(logits).all():
        return 1.0

    def loss(log_temperature: float) -> float:
        log_probabilities, classes = log_probabilities_and_labels(logits / np.exp(log_temperature), labels)
        return float(-log_probabilities[np.arange(len(classes)), classes].mean())

    limit = np.log(LARGEST)
    return float(np.exp(minimize_scalar(loss, bounds=(-limit, limit), method="bounded").x))
