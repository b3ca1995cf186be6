"""Run a model over batches for its metrics, and leave no trace in it.

A batch is what a data loader gives: a mapping with the keyword arguments of the model's forward and `labels`. The device
is the model's; results are on the CPU.
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
    """The logits of a model's output, whether it is a `ModelOutput`, a tuple or the logits alone."""
    output = model(**inputs)
    if isinstance(output, (tuple, list)):
        output = output[0]
    logits = output if isinstance(output, Tensor) else logits_of(output)
    if not isinstance(logits, Tensor):
        raise ValueError(f"{type(model).__name__} returns no logits: metrics are for models that classify.")
    return logits


def split_batch(
    batch: Mapping[str, Any], device: torch.device, labelled: bool = True
) -> tuple[dict[str, Any], Tensor | None]:
    """Inputs and labels of a batch on a device. Labels are not handed to the model: metrics need no loss."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"A batch must be a mapping with the model's inputs and labels, as a data loader gives it, got "
            f"{type(batch).__name__}."
        )
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    labels = inputs.pop("labels", None)
    if labelled and labels is None:
        raise ValueError(f"A batch must have labels, and this one has only {', '.join(sorted(inputs)) or 'nothing'}.")
    return inputs, labels


def image_batch(batch: Mapping[str, Any], device: torch.device) -> tuple[Tensor, dict[str, Any], Tensor]:
    """Images, other inputs and labels of the labelled examples in a batch; those labelled -100 are left out."""
    inputs, labels = split_batch(batch, device)
    images = inputs.pop("pixel_values", None)
    if images is None:
        raise ValueError(
            f"A batch must have pixel_values, and this one has only {', '.join(sorted(inputs)) or 'labels'}."
        )
    assert labels is not None
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must be one class index for each of {len(images)} images, got the shape {tuple(labels.shape)}."
        )
    kept = labels != IGNORE_INDEX
    rest = {k: v[kept] if isinstance(v, Tensor) and v.shape[:1] == kept.shape else v for k, v in inputs.items()}
    return images[kept], rest, labels[kept]


def predictions(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """Logits and labels of all batches, for the functions of logits and labels here.

    Args:
        model: A Transformers classification model, wrapped or not; its own forward runs, in evaluation mode.
        batches: Mappings with the model's inputs and `labels`.

    Returns:
        Logits (n, c) and labels (n,) on the CPU.

    Raises:
        ValueError: There is no batch, or one without labels.

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
        raise ValueError("batches is empty: there is nothing to predict.")
    return torch.cat(logits), torch.cat(labels)
