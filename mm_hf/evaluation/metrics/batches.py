"""Run a model over batches to compute metrics, and leave the model unchanged.

A batch is a mapping with the keyword arguments of the model's forward and `labels`, as a data loader yields it. Batches
are moved to the model's device; results are on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...locations.modes import evaluation_mode
from ...locations.recording import logits_of
from .base import IGNORE_INDEX


def model_logits(model: nn.Module, **inputs: Any) -> Tensor:
    """Return the logits of a model's output, which may be a `ModelOutput`, a tuple, or the logits alone.

    Raises:
        ValueError: The output has no logits.
    """
    output = model(**inputs)
    if isinstance(output, (tuple, list)):
        output = output[0]
    logits = output if isinstance(output, Tensor) else logits_of(output)
    if not isinstance(logits, Tensor):
        raise ValueError(f"{type(model).__name__} returns no logits; metrics need a classification model.")
    return logits


def split_batch(
    batch: Mapping[str, Any], device: torch.device, labeled: bool = True
) -> tuple[dict[str, Any], Tensor | None]:
    """Split a batch into the model's inputs and its labels, both on a device.

    Args:
        batch: Mapping with the model's inputs and `labels`.
        device: Target device.
        labeled: Raise an error if the batch has no labels.

    Raises:
        ValueError: The batch is not a mapping, or has no labels although `labeled` is True.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"A batch must be a mapping with the model's inputs and labels, as a data loader yields it, got "
            f"{type(batch).__name__}."
        )
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    labels = inputs.pop("labels", None)
    if labeled and labels is None:
        raise ValueError(f"A batch must have labels, but this one has only {', '.join(sorted(inputs)) or 'no keys'}.")
    return inputs, labels


def image_batch(batch: Mapping[str, Any], device: torch.device) -> tuple[Tensor, dict[str, Any], Tensor]:
    """Split a batch into images, other inputs and labels, without the examples whose label is -100.

    Raises:
        ValueError: The batch has no `pixel_values`, no labels, or not one label per image.
    """
    inputs, labels = split_batch(batch, device)
    images = inputs.pop("pixel_values", None)
    if images is None:
        raise ValueError(
            f"A batch must have pixel_values, but this one has only {', '.join(sorted(inputs)) or 'labels'}."
        )
    assert labels is not None
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must be one class index per image, of shape ({len(images)},), got {tuple(labels.shape)}."
        )
    kept = labels != IGNORE_INDEX
    rest = {k: v[kept] if isinstance(v, Tensor) and v.shape[:1] == kept.shape else v for k, v in inputs.items()}
    return images[kept], rest, labels[kept]


def predictions(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """Return the logits and labels of all batches, the arguments of classification metrics.

    Args:
        model: A Transformers classification model, wrapped or not. Its own forward runs, in evaluation mode.
        batches: Mappings with the model's inputs and `labels`.

    Returns:
        Logits (n, c) and labels (n,) on the CPU.

    Raises:
        ValueError: `batches` is empty, or a batch has no labels.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from mm_hf.evaluation.metrics import accuracy, predictions
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                                             intermediate_size=16, image_size=8, patch_size=4, num_labels=3))
        >>> batch = {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
        >>> logits, labels = predictions(model, [batch, batch])
        >>> logits.shape, 0 <= accuracy(logits, labels) <= 1
        (torch.Size([8, 3]), True)
    """
    logits, labels = [], []
    with evaluation_mode(model) as device, torch.no_grad():
        for batch in batches:
            inputs, y = split_batch(batch, device)
            assert y is not None
            logits.append(model_logits(model, **inputs).cpu())
            labels.append(y.cpu())
    if not logits:
        raise ValueError("batches is empty; give at least one batch.")
    return torch.cat(logits), torch.cat(labels)
