"""The dense MultiMix loss and its gradient in one walk, without ever making a mixed feature.

The classifier is linear and the columns of the mixing matrix sum to 1, so mixing its inputs equals mixing its outputs:
only the per-location logits are needed. Targets are mixed by the same matrix as the logits, so that with many classes
the target's part of all mixed examples collapses into a b x b Gram matrix. What is kept for the backward pass is the
gradient alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Mixed logits that are alive at a time: small enough for a CPU's cache and a GPU's spare memory, large enough that the
# matrix products dominate.
CHUNK_ELEMENTS = 1 << 19


class DenseMixingLoss(torch.autograd.Function):
    """Mean over occupied locations of the weighted soft cross-entropy of all mixed examples there.

    Inputs (all floating ones of one type, float32 or float64): `logits` (r, b, c), `targets` (b, c) whose rows sum to
    1, `confidence` (r, b) >= 0, `factors` (r or 1, b, n), and, for one matrix of factors in an order of examples of
    its own at each location, `orders` (r, b) or None. With M = confidence * factors and s its column sums, mixed example
    k of a location has logits and target mixed by M / s, and weighs s if `weighted`, else 1 if s > 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        confidence: Tensor,
        factors: Tensor,
        orders: Tensor | None,
        weighted: bool,
    ) -> Tensor:
        need_logits, _, need_confidence, *_ = ctx.needs_input_grad
        num_locations, num_examples, num_classes = logits.shape
        num_mixed = factors.shape[-1]
        logits_grad = torch.zeros_like(logits) if need_logits else None
        confidence_grad = torch.zeros_like(confidence) if need_confidence else None
        loss = logits.new_zeros(())
        occupied = logits.new_zeros(())

        # Per location, targets cost n c b in products against n b b for the Gram matrix.
        by_gram = num_classes > num_examples
        locations_at_once = max(1, CHUNK_ELEMENTS // (num_mixed * max(num_classes, num_examples)))
        mixed_at_once = max(1, CHUNK_ELEMENTS // num_classes)
        for first in range(0, num_locations, locations_at_once):
            here = slice(first, first + locations_at_once)
            if orders is not None:
                local = factors[0][orders[here]]
            else:
                local = factors if len(factors) == 1 else factors[here]
            mixing = confidence[here, :, None] * local
            mass = mixing.sum(dim=1, keepdim=True)
            mixing = mixing.div_(mass.masked_fill(mass == 0, 1))
            weight = mass if weighted else (mass > 0).to(mass.dtype)
            total = weight.sum(dim=-1, keepdim=True)
            weight = weight / total.masked_fill(total == 0, 1)
            occupied += (total > 0).sum()

            location_loss = logits.new_zeros(len(mixing))
            if by_gram:  # sum_k w_k <target_k, logits_k> and its gradient, for all mixed examples at once
                gram = (mixing * weight) @ mixing.mT
                location_loss -= (gram * (logits[here] @ targets.mT)).sum(dim=(1, 2))
                if logits_grad is not None:
                    logits_grad[here] = -(gram @ targets)
            for start in range(0, num_mixed, mixed_at_once):
                part = slice(start, start + mixed_at_once)
                mixed = mixing[:, :, part].mT @ logits[here]
                normaliser = mixed.logsumexp(dim=-1, keepdim=True)
                part_weight = weight[:, :, part].mT
                location_loss += (part_weight * normaliser).sum(dim=(1, 2))
                if not by_gram:
                    mixed_targets = mixing[:, :, part].mT @ targets
                    location_loss -= (part_weight[..., 0, None] * (mixed_targets * mixed)).sum(dim=(1, 2))
                if logits_grad is not None:
                    residual = mixed.sub_(normaliser).exp_()
                    if not by_gram:
                        residual = residual.sub_(mixed_targets)
                    logits_grad[here] += mixing[:, :, part] @ residual.mul_(part_weight)
            loss += location_loss.sum()
            if confidence_grad is not None:
                scale = (1 / total) if weighted else weight / mass
                confidence_grad[here] = _confidence_gradient(
                    logits[here],
                    targets,
                    mixing,
                    local,
                    scale.masked_fill(mass == 0, 0),
                    location_loss if weighted else None,
                )

        occupied.clamp_(min=1)
        ctx.gradients = [None if g is None else g.div_(occupied) for g in (logits_grad, confidence_grad)]
        return loss / occupied

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "MultiMix losses keep their gradient and nothing to differentiate it by: call backward() or "
                "torch.autograd.grad() without create_graph=True."
            )
        logits_grad, confidence_grad = (None if g is None else g * grad for g in ctx.gradients)
        return logits_grad, None, confidence_grad, None, None, None


def _confidence_gradient(
    logits: Tensor, targets: Tensor, mixing: Tensor, factors: Tensor, scale: Tensor, mean_loss: Tensor | None
) -> Tensor:
    """Gradient of each location's loss with respect to its confidence (q, b): only for attention that is not detached."""
    mixed = mixing.mT @ logits
    mixed_targets = mixing.mT @ targets
    normaliser = mixed.logsumexp(dim=-1, keepdim=True)
    residual = (mixed - normaliser).exp() - mixed_targets
    per_factor = logits @ residual.mT - targets @ mixed.mT
    # The columns are normalised, and so only what deviates from the column's mean has a gradient; with confidence
    # weights, more mass also draws the location's mean towards this mixed example.
    column = -(mixing * per_factor).sum(dim=1, keepdim=True)
    if mean_loss is not None:
        losses = (normaliser - (mixed_targets * mixed).sum(dim=-1, keepdim=True)).mT
        column = column + losses - mean_loss[:, None, None]
    return (factors * scale * (per_factor + column)).sum(dim=-1)
