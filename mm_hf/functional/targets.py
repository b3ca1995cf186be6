"""Labels as targets (..., c): of class indices or probabilities, weighted by class, and the number of valid ones."""

from __future__ import annotations

import torch
from torch import Tensor

from . import arguments
from .arguments import IGNORE_INDEX
from .criteria import Criterion


def one_hot(classes: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Convert class indices (...) to one-hot targets (..., c), in two kernels and without int64 tensors of this size.

    Example:
        >>> one_hot(torch.tensor([1, 0]), num_classes=3, dtype=torch.float32)
        tensor([[0., 1., 0.],
                [1., 0., 0.]])
    """
    targets = torch.zeros(*classes.shape, num_classes, dtype=dtype, device=classes.device)
    return targets.scatter_(-1, classes[..., None], 1.0)


def count_valid(labels: Tensor, logits: Tensor, criterion: Criterion = "cross_entropy") -> Tensor:
    """Count the valid examples (or locations), over which [`clean_loss`] is a mean.

    Args:
        labels: As for [`clean_loss`].
        logits: As for [`clean_loss`].
        criterion: As for [`clean_loss`].

    Returns:
        The number of labels that are not ignored, or the sum of class probabilities: a scalar in float32 (float64 for
        float64 logits).

    Example:
        >>> import torch
        >>> count_valid(torch.tensor([3, -100, 1]), torch.randn(3, 5))
        tensor(2.)
    """
    arguments.check_settings(criterion, 0.0)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if criterion != "cross_entropy":
        return torch.tensor(float(len(labels)), dtype=dtype, device=logits.device)
    if labels.shape == logits.shape:
        return labels.sum(dtype=dtype)
    return (labels.long() != IGNORE_INDEX).sum(dtype=dtype)


def soft_targets(
    labels: Tensor,
    num_classes: int,
    dtype: torch.dtype = torch.float32,
    criterion: Criterion = "cross_entropy",
) -> tuple[Tensor, Tensor]:
    """Convert labels to targets.

    Args:
        labels: Class indices (...) if they are integers and the criterion is "cross_entropy"; otherwise of the shape of
            the targets, or (b,) with one output.
        num_classes: c.
        dtype: Floating type of the targets.
        criterion: As for [`clean_loss`].

    Returns:
        Targets (..., c), and a mask (...) of the same type that is 0 where a label is ignored.

    Example:
        >>> import torch
        >>> soft_targets(torch.tensor([1, -100]), num_classes=2)
        (tensor([[0., 1.],
                [1., 0.]]), tensor([1., 0.]))
    """
    arguments.check_settings(criterion, 0.0)
    if criterion == "cross_entropy" and not labels.is_floating_point():
        labels = labels.long()
        arguments.check_class_indices(labels, num_classes)
        is_valid = (labels != IGNORE_INDEX).to(dtype)
        targets = one_hot(labels.masked_fill(labels == IGNORE_INDEX, 0), num_classes, dtype)
    else:
        targets = labels.to(dtype)
        targets = targets[:, None] if targets.ndim == 1 else targets
        is_valid = targets.new_ones(targets.shape[:-1])
        if criterion == "cross_entropy":
            is_valid = (targets.sum(dim=-1) > 0).to(dtype)
    return targets, is_valid


def weight_targets(labels: Tensor, class_weights: Tensor) -> Tensor:
    """Convert labels to targets that are multiplied by the weights of their classes.

    [`clean_loss`] of them is the cross-entropy with class weights: a mean over the examples that is weighted by the
    weights of their classes.

    Args:
        labels: Class indices (...), where -100 is ignored, or class probabilities (..., c).
        class_weights: (c,), not negative. Only their ratios matter.

    Returns:
        (..., c), in the type of the class probabilities, else in that of the weights. The largest weight counts as 1.

    Example:
        >>> import torch
        >>> from mm_hf.functional import clean_loss
        >>> weights, logits, labels = torch.tensor([1.0, 4.0]), torch.randn(8, 2), torch.randint(2, (8,))
        >>> expected = torch.nn.functional.cross_entropy(logits, labels, weight=weights)
        >>> torch.testing.assert_close(clean_loss(logits, weight_targets(labels, weights)), expected)
    """
    dtype = labels.dtype if labels.is_floating_point() else class_weights.dtype
    targets, is_valid = soft_targets(labels, len(class_weights), dtype)
    return targets * is_valid[..., None] * (class_weights / class_weights.max()).to(dtype)
