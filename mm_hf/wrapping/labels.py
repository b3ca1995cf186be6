"""Labels of a batch: the criterion that they call for, and their conversion to what the losses use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from ..functional import IGNORE_INDEX, Criterion
from ..functional.arguments import require, tolerance_of
from ..locations import LocationError, LocationOutput
from ..locations.probe_inputs import config_of, num_labels_of
from ..locations.recording import SUPPORTED

logger = logging.get_logger(__name__)

CRITERION_BY_PROBLEM_TYPE: dict[str, Criterion] = {
    "single_label_classification": "cross_entropy",
    "multi_label_classification": "binary_cross_entropy",
    "regression": "mse",
}
# Names of tasks, which Transformers takes from the name of a model's class (`PreTrainedModel.loss_type`). The losses of
# these shift their labels or align them with other tokens.
LANGUAGE_TASKS = ("ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "ForCTC", "ForRNNT", "ForTDT")
LOCATION_TASKS = ("ForTokenClassification", "ForSemanticSegmentation")  # their losses do not read `problem_type`
CLASSIFICATION = "Classification"


@dataclass(frozen=True)
class LabelKind:
    """Kind of the labels of a training.

    Attributes:
        model_class: Name of the model's class.
        num_labels: c.
        problem_type: A key of `CRITERION_BY_PROBLEM_TYPE`.
        inferred_from: "type" if the type and shape of the labels determine `problem_type`, by the rule of Transformers;
            "values" if the labels are class probabilities, which this rule does not know; None if the model does.
        ignored: Class index that is ignored, besides -100.
    """

    model_class: str
    num_labels: int
    problem_type: str = "single_label_classification"
    inferred_from: Literal["type", "values"] | None = None
    ignored: int = IGNORE_INDEX

    @property
    def criterion(self) -> Criterion:
        """Criterion that the labels call for."""
        return CRITERION_BY_PROBLEM_TYPE[self.problem_type]


def check_task(model: nn.Module) -> None:
    """Raise a LocationError for a language model, whose loss shifts its labels or aligns them with other tokens."""
    base = model.get_base_model() if hasattr(type(model), "get_base_model") else model  # type: ignore[operator]
    task = getattr(base, "loss_type", None) or ""
    find_embeddings = getattr(base, "get_output_embeddings", None)
    has_vocabulary = CLASSIFICATION not in task and find_embeddings is not None and find_embeddings() is not None
    if task.endswith(LANGUAGE_TASKS) or has_vocabulary:
        raise LocationError(f"{type(base).__name__} predicts tokens of a vocabulary. {SUPPORTED}.")


def label_kind(model: nn.Module, labels: Any) -> LabelKind:
    """Determine the kind of a model's labels from its configuration and its first mini-batch.

    It follows the rule of Transformers: `config.problem_type`, or else regression for one label, classification for
    integers, and multi-label classification for floating-point numbers (b, c). The exception are class probabilities:
    without `problem_type`, floating-point rows that sum to 1 and are not all one-hot call for cross-entropy.

    Raises:
        ValueError: The labels are missing, of the wrong type or shape, or out of range.
    """
    name = type(model).__name__
    config = config_of(model)
    labels = _checked_tensor(name, labels)
    c, problem = num_labels_of(model), getattr(config, "problem_type", None)
    inferred_from: Literal["type", "values"] | None = None
    may_be_multi_hot = labels.dtype == torch.bool and labels.shape == (len(labels), c)
    every_location = has_location_shape(labels) and not may_be_multi_hot
    if getattr(model, "loss_type", None) in LOCATION_TASKS or (problem is None and every_location):
        problem = "single_label_classification"
    elif problem is None:
        problem, inferred_from = _inferred_problem_type(labels, c)
    if problem not in CRITERION_BY_PROBLEM_TYPE:
        raise ValueError(
            f"{name} has problem_type={problem!r}; mixing supports {', '.join(CRITERION_BY_PROBLEM_TYPE)}."
        )
    kind = LabelKind(name, c, problem, inferred_from, getattr(config, "semantic_loss_ignore_index", IGNORE_INDEX))
    convert_labels(labels, kind)
    return kind


def has_location_shape(labels: Tensor) -> bool:
    """Return True for integers with more than one label per example."""
    return not labels.is_floating_point() and labels.ndim > 1 and labels.shape != (len(labels), 1)


def _inferred_problem_type(labels: Tensor, num_labels: int) -> tuple[str, Literal["type", "values"]]:
    if num_labels == 1:
        return "regression", "type"
    is_index = not labels.is_floating_point() and labels.dtype != torch.bool
    if is_index or labels.shape != (len(labels), num_labels):
        return "single_label_classification", "type"
    if labels.is_floating_point() and bool(_are_probabilities(labels) & _has_fractions(labels)):
        return "single_label_classification", "values"
    return "multi_label_classification", "type"


def configure(model: nn.Module, kind: LabelKind) -> None:
    """Set `config.problem_type` where the model itself sets it at its first loss, and warn where it would not agree."""
    if kind.inferred_from == "type" and hasattr(config_of(model), "problem_type"):
        model.config.problem_type = kind.problem_type  # type: ignore[union-attr]
    elif kind.inferred_from == "values":
        logger.warning(
            f"The labels of {kind.model_class} are class probabilities, and mixing trains it by cross-entropy. In "
            "evaluation, its own loss is binary cross-entropy for such labels; evaluate with class indices."
        )


def convert_labels(labels: Any, kind: LabelKind) -> Tensor:
    """Convert the labels of a mini-batch to what the losses use, and check them.

    Class indices of any integer or boolean type become int64; (b, 1) becomes (b,) for classes. Class probabilities and
    targets become floating-point numbers of at least 32 bits. Values are checked on the CPU; on other devices they are
    asserted without synchronization.

    Args:
        labels: The labels of the mini-batch.
        kind: Kind of the labels of the training.

    Returns:
        Class indices (b,), or those of every location; or floating-point numbers (b, c), or (b,) with one output.

    Raises:
        ValueError: The labels are missing, of the wrong type or shape, or out of range.

    Example:
        >>> kind = LabelKind("ViTForImageClassification", 3)
        >>> convert_labels(torch.tensor([[2], [0]], dtype=torch.uint8), kind)
        tensor([2, 0])
    """
    labels = _checked_tensor(kind.model_class, labels)
    if kind.criterion != "cross_entropy":
        return _converted_targets(labels, kind)
    if labels.is_floating_point():
        return _converted_probabilities(labels, kind)
    labels = labels.long()
    if labels.shape == (len(labels), 1):
        labels = labels[:, 0]
    largest = kind.num_labels - 1
    valid = (labels.clamp(0, largest) == labels) | (labels == IGNORE_INDEX)
    if kind.ignored != IGNORE_INDEX:
        valid |= labels == kind.ignored
    _require(
        valid.all(),
        lambda: (
            f"Label {int(labels[~valid][0])} does not fit {kind.model_class} with {kind.num_labels} labels (0 to "
            f"{largest}, or {kind.ignored} for an ignored example): build the model with num_labels set to your number "
            "of classes."
        ),
    )
    return labels


def _converted_probabilities(labels: Tensor, kind: LabelKind) -> Tensor:
    shape, c = tuple(labels.shape), kind.num_labels
    if labels.ndim != 2 or shape[1] != c:
        raise ValueError(
            f"The labels are {labels.dtype} of shape {shape}. Give class indices as integers of shape (batch,), or "
            f"class probabilities of shape (batch, {c}); the training step mixes them."
        )
    _require(
        _are_probabilities(labels),
        lambda: (
            f"The labels of shape {shape} are no class probabilities: their rows are not in [0, 1] with a sum of 1. If "
            'an example may have several classes, set config.problem_type = "multi_label_classification".'
        ),
    )
    return _at_least_float32(labels)


def _converted_targets(labels: Tensor, kind: LabelKind) -> Tensor:
    name, c, shape = kind.model_class, kind.num_labels, tuple(labels.shape)
    if shape not in ((len(labels), c), *([(len(labels),)] if c == 1 else [])):
        raise ValueError(
            f"{name} is configured for {kind.problem_type} with {c} labels, for which labels have the shape (batch, "
            f"{c}); got {labels.dtype} of shape {shape}."
        )
    given = labels if labels.is_floating_point() else labels.float()
    if kind.criterion == "mse":
        _require(
            given.isfinite().all(),
            lambda: f"{name} is configured for regression, and a label is {float(given[~given.isfinite()][0])}.",
        )
        return _at_least_float32(given)
    _require(
        ((given >= 0) & (given <= 1)).all(),
        lambda: (
            f"{name} is configured for {kind.problem_type}, for which labels lie in [0, 1]; got "
            f"{float(given.min()):g} to {float(given.max()):g}."
        ),
    )
    if kind.inferred_from == "type":
        _require(
            ~(_are_probabilities(given) & _has_fractions(given)),
            lambda: (
                "The first mini-batch had labels of 0 and 1, which call for multi-label classification, and this one "
                "has class probabilities: set config.problem_type before training, to "
                '"single_label_classification" for class probabilities.'
            ),
        )
    return _at_least_float32(given)


def _checked_tensor(name: str, labels: Any) -> Tensor:
    """Return the labels if they are a tensor with examples; raise a ValueError that names what they are if not."""
    if labels is None:
        raise ValueError(f"The batch for {name} has no labels. Mixing needs a column named `labels` (or `label`).")
    if isinstance(labels, Tensor) and labels.ndim and len(labels) and not labels.is_complex():
        return labels
    if isinstance(labels, Tensor):
        found = f"{labels.dtype} of shape {tuple(labels.shape)}"
    else:
        first = labels[0] if isinstance(labels, (list, tuple)) and labels else labels
        found = f"{type(labels).__name__}, and the first one is {first!r}"
    raise ValueError(
        f"The labels for {name} must be a tensor of class indices, class probabilities or numbers, one row per "
        f"example; got {found}. Convert names of classes to integers from 0."
    )


def _are_probabilities(labels: Tensor) -> Tensor:
    """Return True, as a tensor, if each row is in [0, 1] and sums to 1 up to rounding."""
    tolerance = tolerance_of(labels)
    sums = labels.sum(dim=-1, dtype=torch.promote_types(labels.dtype, torch.float32))
    return ((labels >= 0) & (labels <= 1 + tolerance)).all() & ((sums - 1).abs() <= tolerance).all()


def _has_fractions(labels: Tensor) -> Tensor:
    """Return True, as a tensor, if a label is neither 0 nor 1."""
    return ((labels > 0) & (labels < 1)).any()


def _at_least_float32(labels: Tensor) -> Tensor:
    return labels.to(torch.promote_types(labels.dtype, torch.float32))


def _require(condition: Tensor, message: Any) -> None:
    require(condition, message, "A mini-batch has an invalid label; the CPU reports which one.")


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


def at_locations(output: LocationOutput, labels: Tensor, ignored: int) -> tuple[LocationOutput, Tensor]:
    """Return output and labels of a model that labels every location, with one label per row of logits.

    Logits (b, c, h, w) are compared with labels (b, H, W) at the size of the labels, interpolated as the models do. The
    locations to mix are those of the logits, each with the label of the pixel at its center.

    Args:
        output: Output of the forward.
        labels: (b, n) or (b, H, W).
        ignored: Label that is ignored, besides -100.
    """
    if output.logits.ndim == 3:
        output.labels = labels
        return output, labels
    labels = labels.masked_fill(labels == ignored, IGNORE_INDEX)
    at_logits = F.interpolate(labels[:, None].double(), size=output.logits.shape[-2:], mode="nearest-exact")
    output.labels = at_logits.long().flatten(1)
    full = F.interpolate(output.logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    output.logits = full.flatten(2).mT
    return output, labels.flatten(1)
