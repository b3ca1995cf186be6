"""Alignment of the features of two examples by optimal transport."""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 50


def assignment(
    features: Tensor, others: Tensor, *, mask: Tensor | None = None, other_mask: Tensor | None = None, eps: float = 0.1
) -> Tensor:
    """Compute a soft assignment of the locations of one example to those of another one.

    It is the plan of the optimal transport between uniform distributions over the valid locations of both, with each
    row scaled to sum to 1. The cost is the squared distance of the features, relative to its mean over the pairs of
    valid locations. The entropy-regularized problem is solved by Sinkhorn's algorithm in at least float32, without a
    gradient.

    Args:
        features: (b, r, d) features of the examples.
        others: (b, s, d) features of the examples that they are aligned with.
        mask: (b, r), not zero at the valid locations of `features`. Default: all are valid.
        other_mask: (b, s), the same for `others`.
        eps: Weight of the entropy. A larger one assigns less sharply.

    Returns:
        (b, r, s). The rows of valid locations sum to 1 over the valid other locations; the other rows are 0.

    Raises:
        ValueError: `eps` is not positive.

    Example:
        >>> features = torch.tensor([[[0.0], [5.0], [9.0]]])
        >>> assignment(features, features.flip(1), eps=0.01).argmax(dim=-1)
        tensor([[2, 1, 0]])
    """
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}.")
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        dtype = torch.promote_types(features.dtype, torch.float32)
        x, y = features.to(dtype), others.to(dtype)
        center = x.mean(dim=1, keepdim=True)  # so that the inner products do not round off the distances
        x, y = x - center, y - center
        squares = x.square().sum(dim=2)[:, :, None] + y.square().sum(dim=2)[:, None]
        cost = (squares - 2 * x @ y.mT).clamp(min=0)
        rows = _uniform(mask, cost.shape[:2], cost)
        columns = _uniform(other_mask, (cost.shape[0], cost.shape[2]), cost)
        tiny = torch.finfo(dtype).tiny
        mean = torch.einsum("br,brs,bs->b", rows, cost, columns)[:, None, None]
        scaled = -cost / (eps * mean.clamp(min=tiny))
        log_rows, log_columns = rows.log(), columns.log()  # -inf: not valid
        v = torch.zeros_like(columns)
        for _ in range(ITERATIONS):
            u = log_rows - (scaled + v[:, None]).logsumexp(dim=2)
            v = log_columns - (scaled + u[:, :, None]).logsumexp(dim=1)
        plan = (scaled + v[:, None]).softmax(dim=2)
        return (plan * (rows > 0)[:, :, None]).to(features.dtype)


def _uniform(mask: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return the uniform distribution over the valid locations of each example."""
    valid = like.new_ones(shape) if mask is None else (mask != 0).to(like.dtype)
    return valid / valid.sum(dim=1, keepdim=True).clamp(min=1)
