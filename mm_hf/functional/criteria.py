"""Losses of mixed logits against mixed targets, with their slopes, in place where they can be.

All take mixed logits (o, c, i): mixed examples and locations are the outer and the inner dimension, whichever way round
whoever mixed them has laid them out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

# Losses (o, i), their slopes by the logits, which may take the place of the logits, and by the targets if asked for.
Slopes = tuple[Tensor, Tensor, Tensor | None]


@dataclass
class ClassTargets:
    """Mixed labels of examples that have one class each, not yet added up by class.

    Attributes:
        index: Where in the logits, flattened to (o, c i) or (o c, i), each example's class is: (o, x) or (x,).
        shares: (o, x) or (x, i), of each example in each mixed one; over the examples of a mixed one they sum to 1.
        examples: How many of them, neighbours along x's outermost dimension, make a mixed one.
        smoothing: Share of the target that is spread over the classes.
    """

    index: Tensor
    shares: Tensor
    examples: int
    smoothing: float

    def agreement(self, x: Tensor) -> Tensor:
        """Sum over the classes of target times `x` (o, c, i): (o, i)."""
        o, _, i = x.shape
        if self.index.ndim == 1:
            picked = x.view(-1, i).index_select(0, self.index)
        else:
            picked = x.view(o, -1).gather(1, self.index)
        agreement = picked.mul_(self.shares).view(o, self.examples, i).sum(dim=1)
        return agreement.lerp(x.mean(dim=1), self.smoothing) if self.smoothing else agreement

    def subtract_from(self, x: Tensor) -> Tensor:
        """`x` (o, c, i) less the targets, in place."""
        o, c, i = x.shape
        if self.index.ndim == 1:
            x.view(-1, i).index_add_(0, self.index, self.shares, alpha=self.smoothing - 1)
        else:
            x.view(o, -1).scatter_add_(1, self.index, self.shares * (self.smoothing - 1))
        return x.sub_(self.smoothing / c) if self.smoothing else x


def cross_entropy(mixed: Tensor, targets: Tensor | ClassTargets, targets_need_grad: bool) -> Slopes:
    """Soft cross-entropy."""
    target_slope = mixed.neg() if targets_need_grad else None
    o, c, i = mixed.shape
    logarithms = (mixed.view(o, c) if i == 1 else mixed).log_softmax(dim=1).view(o, c, i)
    if isinstance(targets, ClassTargets):
        loss = targets.agreement(logarithms).neg_()
        return loss, targets.subtract_from(logarithms.exp_()), target_slope
    loss = (targets * logarithms).sum(dim=1).neg_()
    return loss, logarithms.exp_().sub_(targets), target_slope


def binary_cross_entropy(mixed: Tensor, targets: Tensor | ClassTargets, targets_need_grad: bool) -> Slopes:
    """Binary cross-entropy of each output, averaged over the outputs."""
    assert isinstance(targets, Tensor)
    num_classes = mixed.shape[1]
    loss = F.binary_cross_entropy_with_logits(mixed, targets, reduction="none").mean(dim=1)
    target_slope = -mixed / num_classes if targets_need_grad else None
    return loss, mixed.sigmoid_().sub_(targets).div_(num_classes), target_slope


def mse(mixed: Tensor, targets: Tensor | ClassTargets, targets_need_grad: bool) -> Slopes:
    """Squared error, averaged over the outputs."""
    assert isinstance(targets, Tensor)
    difference = mixed.sub_(targets)
    grad = difference * (2 / mixed.shape[1])
    return difference.square().mean(dim=1), grad, -grad if targets_need_grad else None


CRITERIA: dict[str, Callable[[Tensor, Tensor | ClassTargets, bool], Slopes]] = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "mse": mse,
}
