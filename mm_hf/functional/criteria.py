"""Losses of mixed logits against mixed targets, and their gradients, computed in place where possible.

Mixed logits have the shape (o, c, i). Mixed examples and locations are the outer dimension o and the inner dimension i,
in the order that the mixer chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Criterion = Literal["cross_entropy", "binary_cross_entropy", "mse"]
# Losses (o, i), and their gradients with respect to the logits, which may overwrite the logits, and to the targets. The
# gradient of the targets is None unless asked for.
LossAndGrads = tuple[Tensor, Tensor, Tensor | None]


def masked_logit(dtype: torch.dtype) -> float:
    """Return the number that replaces smaller logits, such as -inf of masked classes.

    A weighted mean of infinite numbers is not a number; this one is far enough from 0 to have a probability of 0 when
    it is mixed with a weight of 1e-34 (float32), and small enough that sums of it do not overflow.
    """
    return -(2.0**400) if dtype == torch.float64 else -(2.0**120)


def mask_infinite(logits: Tensor) -> Tensor:
    """Clamp logits to finite numbers."""
    limit = masked_logit(logits.dtype)
    return logits.clamp(limit, -limit)


@dataclass(frozen=True)
class ClassTargets:
    """Mixed labels of examples that have one class each, as the share of each example in each mixed example.

    Attributes:
        index: (o, x) or (x,), the position of each example's class in the logits flattened to (o, c i) or (o c, i).
        shares: (o, x) or (x, i), the share of each example; the shares in a mixed example sum to 1.
        examples: Number of examples in a mixed example, adjacent along the outermost dimension of x.
        smoothing: Share of the target that is spread over the classes.
    """

    index: Tensor
    shares: Tensor
    examples: int
    smoothing: float

    def dot(self, x: Tensor) -> Tensor:
        """Sum targets times `x` (o, c, i) over the classes: (o, i)."""
        o, _, i = x.shape
        if self.index.ndim == 1:
            picked = x.view(-1, i).index_select(0, self.index)
        else:
            picked = x.view(o, -1).gather(1, self.index)
        total = picked.mul_(self.shares).view(o, self.examples, i).sum(dim=1)
        return total.lerp(x.mean(dim=1), self.smoothing) if self.smoothing else total

    def subtract_from(self, x: Tensor) -> Tensor:
        """Subtract the targets from `x` (o, c, i) in place."""
        o, c, i = x.shape
        if self.index.ndim == 1:
            x.view(-1, i).index_add_(0, self.index, self.shares, alpha=self.smoothing - 1)
        else:
            x.view(o, -1).scatter_add_(1, self.index, self.shares * (self.smoothing - 1))
        return x.sub_(self.smoothing / c) if self.smoothing else x


def cross_entropy(logits: Tensor, targets: Tensor | ClassTargets, targets_need_grad: bool) -> LossAndGrads:
    """Compute the cross-entropy with soft targets."""
    targets_grad = None
    if targets_need_grad:  # the targets of masked classes are 0: their gradient is not used, and would overflow
        targets_grad = logits.neg().masked_fill_(logits < -1e15, 0)
    log_probs = _log_softmax(logits)
    if isinstance(targets, ClassTargets):
        loss = targets.dot(log_probs).neg_()
        return loss, targets.subtract_from(log_probs.exp_()), targets_grad
    loss = (targets * log_probs).sum(dim=1).neg_()
    return loss, log_probs.exp_().sub_(targets), targets_grad


def _log_softmax(logits: Tensor) -> Tensor:
    """Compute the logarithm of the softmax over the classes, the second of three dimensions, in the memory's order."""
    o, c, i = logits.shape
    if i == 1:
        return logits.reshape(o, c).log_softmax(dim=1).view(o, c, 1)
    # The softmax copies its input unless it is contiguous, and a GPU takes a multiple of the time for inner dimensions.
    return logits.mT.log_softmax(dim=2).mT if logits.stride(1) == 1 else logits.log_softmax(dim=1)


def binary_cross_entropy(logits: Tensor, targets: Tensor | ClassTargets, targets_need_grad: bool) -> LossAndGrads:
    """Compute the binary cross-entropy of each output, averaged over the outputs."""
    assert isinstance(targets, Tensor)
    num_outputs = logits.shape[1]
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
    targets_grad = -logits / num_outputs if targets_need_grad else None
    return loss, logits.sigmoid_().sub_(targets).div_(num_outputs), targets_grad


def mse(logits: Tensor, targets: Tensor | ClassTargets, targets_need_grad: bool) -> LossAndGrads:
    """Compute the squared error, averaged over the outputs."""
    assert isinstance(targets, Tensor)
    difference = logits.sub_(targets)
    grad = difference * (2 / logits.shape[1])
    return difference.square().mean(dim=1), grad, -grad if targets_need_grad else None


CRITERIA: dict[Criterion, Callable[[Tensor, Tensor | ClassTargets, bool], LossAndGrads]] = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "mse": mse,
}
