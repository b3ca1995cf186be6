"""Conversion of arguments of metrics: vectors and labels of any origin as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100


def as_tensor(values: Any, name: str) -> Tensor:
    """Return numbers from an array, a tensor or nested lists as a tensor on the CPU, without changing their precision.

    Args:
        values: The numbers.
        name: Name of the argument in error messages.

    Raises:
        ValueError: The values have no rectangular shape, or are not numbers.
    """
    if isinstance(values, Tensor):
        return values.detach().cpu()
    try:
        array = np.asarray(values)
        return torch.from_numpy(array) if array.ndim else torch.as_tensor(values)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be an array of numbers, with the same number of values for each example."
        ) from None


def vectors_and_labels(vectors: Any, labels: Any, name: str = "logits") -> tuple[Tensor, Tensor]:
    """Return vectors (n, d) in float64 and class indices (n,) of the examples whose label is not -100.

    Args:
        vectors: (n, d), or (..., d) for examples with a vector and a label at each of several locations.
        labels: (n,) or (...), integers.
        name: Name of the vectors in error messages.

    Raises:
        ValueError: The shapes do not match, labels are not integers or negative, or all labels are -100.
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
            f"labels must be class indices, integers, got {y.dtype}; use the argmax of class probabilities."
        )
    kept = y != IGNORE_INDEX
    x, y = x[kept].double(), y[kept].long()
    if not len(y):
        raise ValueError(f"All {kept.numel()} labels are {IGNORE_INDEX}: at least one example must have a label.")
    if y.min() < 0:
        raise ValueError(
            f"labels must be class indices of at least 0, or {IGNORE_INDEX} to ignore an example, got {int(y.min())}."
        )
    return x, y
