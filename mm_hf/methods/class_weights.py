"""Weights of the classes in the loss, for training data in which some classes are rare."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

if TYPE_CHECKING:
    ClassWeights = Literal["balanced"] | tuple[float, ...]
else:  # HfArgumentParser takes one type for an argument; nargs="+" lets it read several

    class ClassWeights(float):
        """A number, or a word that `check_class_weights` accepts or rejects."""

        def __new__(cls, value):
            try:
                return float(value)
            except ValueError:
                return value


BALANCED = "balanced"


def check_class_weights(value: Any) -> ClassWeights | None:
    """Return class weights as a tuple, "balanced" or None.

    Raises:
        ValueError: They are something else.

    Example:
        >>> check_class_weights([1, 2.5]), check_class_weights(["balanced"])
        ((1.0, 2.5), 'balanced')
    """
    if value is None:
        return None
    if isinstance(value, (torch.Tensor, np.ndarray)):
        value = value.tolist()
    if value == BALANCED or (isinstance(value, (list, tuple)) and list(value) == [BALANCED]):
        return "balanced"
    if isinstance(value, (list, tuple)) and value and all(_is_weight(weight) for weight in value) and any(value):
        return tuple(float(weight) for weight in value)
    raise ValueError(
        'class_weights must be "balanced" or one number of at least 0 for each class, not all of them 0, got '
        f"{value!r}. Focal loss and other losses of single classes are not defined for mixed examples."
    )


def balanced_weights(labels: Iterable[Any], num_labels: int) -> tuple[float, ...]:
    """Return weights that give all classes among the labels the same total weight, as scikit-learn's "balanced".

    Args:
        labels: Class indices of the training examples, or lists of those of their locations; -100 is ignored.
        num_labels: Number of classes of the model. A class that is not among the labels gets the weight 0.

    Returns:
        For each class, the number of labels divided by that of its own and by the number of classes among the labels.

    Raises:
        ValueError: There is no label, or one is out of range.

    Example:
        >>> balanced_weights([0, 0, 0, 1], num_labels=2)
        (0.6666666666666666, 2.0)
    """
    counts = np.zeros(num_labels)
    for label in labels:
        indices = np.asarray(label).reshape(-1)
        indices = indices[indices != -100]
        if indices.dtype.kind not in "iub" or (len(indices) and not 0 <= indices.min() <= indices.max() < num_labels):
            raise ValueError(
                f'class_weights="balanced" needs class indices from 0 to {num_labels - 1}, and a label of the training '
                f"data is {label!r}: give one number for each class."
            )
        counts += np.bincount(indices.astype(int), minlength=num_labels)
    if not counts.any():
        raise ValueError('class_weights="balanced" needs labels, and the training data has none.')
    present = counts > 0
    weights = np.where(present, counts.sum() / (present.sum() * np.maximum(counts, 1)), 0.0)
    return tuple(weights.tolist())


def _is_weight(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
