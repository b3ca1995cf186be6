"""Labels of a batch: the criterion that they call for, and whether they fit the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import IGNORE_INDEX, Criterion
from ..locations import LocationOutput

CRITERION_BY_PROBLEM_TYPE: dict[str, Criterion] = {
    "single_label_classification": "cross_entropy",
    "multi_label_classification": "binary_cross_entropy",
    "regression": "mse",
}


def check_labels(model: nn.Module, labels: Any) -> Criterion:
    """Return the criterion that the labels call for.

    It follows the rule of Transformers: `config.problem_type`, or else regression for one label and classification for
    several. Class probabilities (b, c) are soft labels unless the model is configured for multi-label classification.

    Raises:
        ValueError: The labels are missing, of the wrong type or out of range.
    """
    name = type(model).__name__
    config: Any = model.config
    if labels is None:
        raise ValueError(f"The batch for {name} has no labels. Mixing needs a column named `labels` (or `label`).")
    num_labels = config.num_labels
    problem = getattr(config, "problem_type", None)
    dense = not labels.is_floating_point() and labels.ndim > 1 and problem is None
    if problem is None:
        problem = "regression" if num_labels == 1 and not dense else "single_label_classification"
    if problem not in CRITERION_BY_PROBLEM_TYPE:
        raise ValueError(
            f"{name} has problem_type={problem!r}; mixing supports {', '.join(CRITERION_BY_PROBLEM_TYPE)}."
        )
    shape = tuple(labels.shape)
    if problem == "single_label_classification":
        _check_classes(name, labels, num_labels, _ignored(model))
    elif shape not in ((len(labels), num_labels), *([(len(labels),)] if num_labels == 1 else [])):
        raise ValueError(
            f"{name} is configured for {problem} with {num_labels} labels, for which labels have the shape (batch, "
            f"{num_labels}); got {labels.dtype} of shape {shape}."
        )
    elif problem == "multi_label_classification" and bool(((labels < 0) | (labels > 1)).any()):
        raise ValueError(
            f"{name} is configured for {problem}, for which labels lie in [0, 1]; got {float(labels.min()):g} to "
            f"{float(labels.max()):g}."
        )
    if not dense and getattr(config, "problem_type", None) is None:
        config.problem_type = problem  # the model itself sets it at its first loss
    return CRITERION_BY_PROBLEM_TYPE[problem]


def _check_classes(name: str, labels: Tensor, num_labels: int, ignored: int) -> None:
    if labels.is_floating_point():
        if labels.ndim != 2 or labels.shape[1] != num_labels:
            raise ValueError(
                f"The labels are {labels.dtype} of shape {tuple(labels.shape)}. Give class indices as integers of "
                f"shape (batch,), or class probabilities of shape (batch, {num_labels}); the training step mixes them."
            )
        if not torch.allclose(labels.float().sum(dim=1), torch.ones(len(labels), device=labels.device), atol=1e-3):
            raise ValueError(
                f"The labels of shape {tuple(labels.shape)} are no class probabilities: their rows do not sum to 1. If "
                'an example may have several classes, set config.problem_type = "multi_label_classification".'
            )
        return
    valid = labels[(labels != IGNORE_INDEX) & (labels != ignored)]
    wrong = valid[(valid < 0) | (valid >= num_labels)]
    if len(wrong):
        raise ValueError(
            f"Label {int(wrong[0])} does not fit {name} with {num_labels} labels (0 to {num_labels - 1}, or {ignored} "
            "for an ignored example): build the model with num_labels set to your number of classes."
        )


def _ignored(model: nn.Module) -> int:
    """Return the ignored label: -100, or the one in the configuration of a segmentation model."""
    return getattr(model.config, "semantic_loss_ignore_index", IGNORE_INDEX)


def check_shapes(model: nn.Module, logits: Tensor, labels: Tensor, criterion: Criterion) -> None:
    """Raise a ValueError unless the labels fit the logits: one label per example, or one per location."""
    name, b = type(model).__name__, len(logits)
    numbers = labels.is_floating_point() or criterion != "cross_entropy"
    if logits.ndim == 2 and (labels.shape == (b,) or (numbers and labels.shape == logits.shape)):
        return
    if logits.ndim == 2 and labels.shape == logits.shape:
        raise ValueError(
            f"{name} has one class per example, and the labels are {labels.dtype} of shape {tuple(labels.shape)}. If "
            'an example may have several classes, set config.problem_type = "multi_label_classification"; class '
            "probabilities are floating-point numbers."
        )
    if logits.ndim == 3 and labels.shape == logits.shape[:2]:
        return
    if logits.ndim == 4 and labels.ndim == 3 and len(labels) == b:
        return
    wanted = {2: f"({b},)", 3: f"({b}, {logits.shape[1]})", 4: f"({b}, height, width)"}[logits.ndim]
    raise ValueError(
        f"{name} has logits of shape {tuple(logits.shape)}, for which integer labels have the shape {wanted}; got "
        f"{labels.dtype} of shape {tuple(labels.shape)}."
    )


def at_locations(model: nn.Module, output: LocationOutput, labels: Tensor) -> tuple[LocationOutput, Tensor]:
    """Return output and labels of a model that labels every location, with one label per row of logits.

    Logits (b, c, h, w) are compared with labels (b, H, W) at the size of the labels, interpolated as the models do. The
    locations to mix are those of the logits, each with the label of the pixel at its center.
    """
    if output.attention is not None and output.mask is not None:
        # Attention sums to 1 over the locations of an example, which share its one label. With one label per location,
        # the weight of a location must not depend on the length of the text.
        output.attention = output.attention * output.mask.sum(dim=1, keepdim=True)
    if output.logits.ndim == 3:
        output.labels = labels
        return output, labels
    ignored = _ignored(model)
    labels = labels.masked_fill(labels == ignored, IGNORE_INDEX)
    at_logits = F.interpolate(labels[:, None].double(), size=output.logits.shape[-2:], mode="nearest-exact")
    output.labels = at_logits.long().flatten(1)
    full = F.interpolate(output.logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    output.logits = full.flatten(2).mT
    return output, labels.flatten(1)
