"""Losses of a model that mixing would replace: one that the user has set, or one of another kind."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..functional import clean_loss
from ..locations import LocationOutput
from ..locations.modes import evaluation_mode
from ..locations.recording import logits_of
from ..locations.sharded import is_sharded
from .labels import LabelKind, at_locations, convert_labels

logger = logging.get_logger(__name__)

# Relative differences of two losses: more than rounding, less than between two kinds of loss.
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_PRECISION_TOLERANCE = 0.02


def check_loss_function(model: nn.Module) -> None:
    """Raise a ValueError if `loss_function` was set on a model: it computes a loss of clean logits and labels."""
    set_on = next((m for m in model.modules() if "_loss_function" in m.__dict__), None)
    if set_on is not None:
        function = set_on.__dict__["_loss_function"]
        raise ValueError(
            f"{type(set_on).__name__}.loss_function was set to {getattr(function, '__name__', repr(function))}, which "
            "would be used in evaluation and not in training, where the method computes the loss. Leave it unset, or "
            "train without mixing (ERM() in MultiMixTrainer)."
        )


def warn_of_own_loss(
    model: nn.Module, original: Callable[..., Any], inputs: Mapping[str, Any], labels: Tensor, kind: LabelKind
) -> None:
    """Warn if the model's own loss of a mini-batch is another than that of its logits, because mixing replaces it."""
    losses = _losses(model, original, inputs, labels, kind)
    if losses is None:
        return
    own, expected, tolerance = losses
    if abs(own - expected) > tolerance * max(1.0, abs(expected)):
        logger.warning(
            f"The loss of {type(model).__name__} is {own:.4g} for the first mini-batch, and the loss of its logits "
            f"({kind.criterion}) is {expected:.4g}: the model computes another loss (class weights, focal loss, an "
            "auxiliary loss), and mixing replaces it by a loss of its logits."
        )


def _losses(
    model: nn.Module, original: Callable[..., Any], inputs: Mapping[str, Any], labels: Tensor, kind: LabelKind
) -> tuple[float, float, float] | None:
    """Return the model's own loss in evaluation mode, that of its logits, and a tolerance; None without a loss."""
    parameters = inspect.signature(original).parameters.values()
    accepts_labels = any(p.name == "labels" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    if kind.inferred_from == "values" or not accepts_labels or is_sharded(model):
        return None
    with evaluation_mode(model), torch.no_grad():
        try:
            outputs = original(model, **inputs, labels=labels)
        except Exception:  # a loss that does not support these labels, as class probabilities
            return None
        own = outputs.get("loss") if hasattr(outputs, "get") else None
        if not isinstance(own, Tensor) or own.numel() != 1:
            return None
        output = LocationOutput(logits_of(outputs))
        labels = convert_labels(labels, kind)
        if output.logits.ndim > 2:
            output, labels = at_locations(output, labels, kind.ignored)
        expected = clean_loss(output.logits, labels, criterion=kind.criterion)
    pair = float(own), float(expected)
    tolerance = TOLERANCES.get(output.logits.dtype, HALF_PRECISION_TOLERANCE)
    return (*pair, tolerance) if all(map(math.isfinite, pair)) else None
