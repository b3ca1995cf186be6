"""What the metrics here share: vectors and labels as tensors, and the `evaluate.Metric` that they are thin classes of."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100


def as_tensor(values: Any, name: str) -> Tensor:
    """Numbers of any origin on the CPU, in the precision they come in; a ValueError where they are no full array."""
    if isinstance(values, Tensor):
        return values.detach().cpu()
    try:
        array = np.asarray(values)
        return torch.from_numpy(array) if array.ndim else torch.as_tensor(values)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be an array of numbers, the same number of them for each example: those given cannot be put into one."
        ) from None


def vectors_and_labels(vectors: Any, labels: Any, name: str = "logits") -> tuple[Tensor, Tensor]:
    """Vectors (n, d) in float64 and class indices (n,) of the examples that are not labelled -100.

    Args:
        vectors: (n, d), or (..., d) where each of several places of an example has a vector and a label.
        labels: (n,) or (...), integers.
        name: What the vectors are called in messages.

    Raises:
        ValueError: The shapes do not belong together, labels are no integers or negative, or none is left.
    """
    x, y = as_tensor(vectors, name), as_tensor(labels, "labels")
    if x.ndim < 2 or x.shape[-1] < 1:
        raise ValueError(
            f"{name} must have the shape (examples, {'classes' if name == 'logits' else 'features'}), got "
            f"{tuple(x.shape)}: one vector for each example, not its class."
        )
    if y.shape != x.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of {name} without the last dimension, {tuple(x.shape[:-1])}, got "
            f"{tuple(y.shape)}: one class index for each vector."
        )
    if y.is_floating_point() or y.is_complex():
        raise ValueError(
            f"labels must be class indices, integers, got {y.dtype}: take the argmax of class probabilities."
        )
    kept = y != IGNORE_INDEX
    x, y = x[kept].double(), y[kept].long()
    if not len(y):
        raise ValueError(f"There is no labelled example among the {kept.numel()} given: nothing to measure.")
    if y.min() < 0:
        raise ValueError(f"labels must be class indices from 0 on (or {IGNORE_INDEX}, left out), got {int(y.min())}.")
    return x, y


class VectorMetric(evaluate.Metric):
    """Base of the metrics here: predictions are vectors (logits, features), references class indices.

    They need no network, and `evaluate.combine` takes them: it hands the same predictions and references to each and
    merges what comes back, which has a name of its own in each.
    """

    description = ""
    predictions = "logits of each example"
    references = "its class index, -100 to leave it out"

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
            inputs_description=f"predictions: {self.predictions}; references: {self.references}.",
            features=features,
        )
