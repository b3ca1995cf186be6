"""The dense MultiMix loss and its gradient in one walk, without ever making a mixed feature.

The classifier is linear and the columns of the mixing matrix sum to 1, so mixing its inputs equals mixing its outputs:
only the per-location logits are needed. Targets are mixed by the same matrix as the logits, so the target's part of
all mixed examples collapses into a b x b Gram matrix. What is kept for the backward pass is the gradient alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Mixed logits that are alive at a time: small enough for a CPU's cache and a GPU's spare memory, large enough that the
# matrix products dominate.
CHUNK_ELEMENTS = 1 << 20


class DenseMixingLoss(torch.autograd.Function):
    """Mean over occupied locations of the weighted soft cross-entropy of all mixed examples there.

    Inputs (all of one floating type, float32 or float64): `logits` (r, b, c), `targets` (b, c) whose rows sum to 1,
    `confidence` (r, b) >= 0, `factors` (r or 1, b, n). With M = confidence * factors and s its column sums, mixed
    example k of a location has logits and target mixed by M / s, and weighs s if `weighted`, else 1 if s > 0.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, confidence: Tensor, factors: Tensor, weighted: bool
    ) -> Tensor:
        need_logits, _, need_confidence, _, _ = ctx.needs_input_grad
        num_locations, _, num_classes = logits.shape
        num_mixed = factors.shape[-1]
        logits_grad = torch.zeros_like(logits) if need_logits else None
        confidence_grad = torch.zeros_like(confidence) if need_confidence else None
        loss = logits.new_zeros(())
        occupied = logits.new_zeros(())

        locations_at_once = max(1, CHUNK_ELEMENTS // (num_mixed * num_classes))
        mixed_at_once = max(1, CHUNK_ELEMENTS // num_classes)
        for first in range(0, num_locations, locations_at_once):
            here = slice(first, first + locations_at_once)
            mixing = confidence[here, :, None] * (factors if len(factors) == 1 else factors[here])
            mass = mixing.sum(dim=1, keepdim=True)
            mixing = mixing / mass.masked_fill(mass == 0, 1)
            weight = mass if weighted else (mass > 0).to(mass.dtype)
            total = weight.sum(dim=-1, keepdim=True)
            weight = weight / total.masked_fill(total == 0, 1)
            occupied += (total > 0).sum()

            # sum_k w_k <target_k, logits_k> and its gradient, for all mixed examples at once
            gram = (mixing * weight) @ mixing.mT
            at_targets = logits[here] @ targets.mT
            location_loss = -(gram * at_targets).sum(dim=(1, 2))
            if logits_grad is not None:
                logits_grad[here] = -(gram @ targets)
            for start in range(0, num_mixed, mixed_at_once):
                part = slice(start, start + mixed_at_once)
                mixed = mixing[:, :, part].mT @ logits[here]
                normaliser = mixed.logsumexp(dim=-1, keepdim=True)
                part_weight = weight[:, :, part].mT
                location_loss += (part_weight * normaliser).sum(dim=(1, 2))
                if logits_grad is not None:
                    probabilities = mixed.sub_(normaliser).exp_().mul_(part_weight)
                    logits_grad[here] += mixing[:, :, part] @ probabilities
            loss += location_loss.sum()
            if confidence_grad is not None:
                scale = (1 / total) if weighted else weight / mass
                confidence_grad[here] = _confidence_gradient(
                    logits[here],
                    targets,
                    mixing,
                    factors if len(factors) == 1 else factors[here],
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
        return logits_grad, None, confidence_grad, None, None


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
