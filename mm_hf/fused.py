"""The dense MultiMix loss and its gradient in one walk, without ever making a mixed feature.

The classifier is linear and the columns of the mixing matrix sum to 1, so mixing its inputs equals mixing its outputs:
only the per-location logits are needed. Confidence, order and normalisation are moved from the mixing matrix to what it
multiplies, so that locations which share factors are mixed by one matrix product. What is kept for the backward pass
is the gradient alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Mixed logits that are alive at a time: small enough for a CPU's cache and a GPU's spare memory, large enough that the
# matrix products dominate.
CHUNK_ELEMENTS = 1 << 19


class DenseMixingLoss(torch.autograd.Function):
    """Mean over occupied locations of the weighted loss of all mixed examples there.

    Inputs (all floating ones of one type, float32 or float64): `logits` (r, b, c), `targets` (b, c), or (r, b, c) for
    targets of each location's own, `confidence` (r, b) >= 0, `factors` (r or 1, b, n), and `orders` (r, b) or None, for
    one matrix of factors in an order of examples of its own at each location. With M = confidence * factors and s its
    column sums, mixed example k of a location has logits and target mixed by M / s, and weighs s if `weighted`, else 1
    if s > 0. `criterion` is a name of `CRITERIA`; the rows of targets sum to 1 for "cross_entropy".
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
        criterion: str,
    ) -> Tensor:
        need_logits, _, need_confidence, *_ = ctx.needs_input_grad
        (num_locations, num_examples, num_classes), num_mixed = logits.shape, factors.shape[-1]
        local_targets = targets.expand_as(logits)
        if orders is not None:  # put the examples of each location into the order of the factors' rows
            back = orders.argsort(dim=1)
            local_targets = targets[back] if targets.ndim == 2 else _permute(targets, back)
            logits, confidence = _permute(logits, back), confidence.gather(1, back)
        mass = _mix(factors, confidence[..., None])[..., 0]
        inverse = mass.masked_fill(mass == 0, torch.inf).reciprocal_()
        weight = mass if weighted else (mass > 0).to(mass.dtype)
        total = weight.sum(dim=1, keepdim=True)
        weight = weight / total.masked_fill(total == 0, 1)
        occupied = (total > 0).sum().clamp_(min=1)

        # Targets cost n b c in products a location. Their Gram matrix costs n b b and tells no mixed example apart.
        by_gram = criterion == "cross_entropy" and num_classes > num_examples and not need_confidence
        loss_and_slopes = CRITERIA[criterion]
        weighted_logits = confidence[..., None] * logits
        weighted_targets = confidence[..., None] * local_targets
        losses = logits.new_zeros(num_locations)
        logits_grad = torch.zeros_like(logits)
        targets_grad = torch.zeros_like(logits) if need_confidence else None
        mass_grad = torch.zeros_like(mass)
        mixed_at_once = min(num_mixed, max(1, CHUNK_ELEMENTS // num_classes))
        locations_at_once = max(1, CHUNK_ELEMENTS // (mixed_at_once * num_classes))
        for first in range(0, num_locations, locations_at_once):
            here = slice(first, first + locations_at_once)
            for start in range(0, num_mixed, mixed_at_once):
                part = slice(start, start + mixed_at_once)
                local = (factors if len(factors) == 1 else factors[here])[..., part]
                scale = inverse[here, part, None]
                share = weight[here, part, None] * scale
                mixed = _mix(local, weighted_logits[here]).mul_(scale)
                mixed_targets = None if by_gram else _mix(local, weighted_targets[here]).mul_(scale)
                unmixed = mixed.clone() if need_confidence else mixed  # `loss_and_slopes` works in place
                loss, slope, target_slope = loss_and_slopes(mixed, mixed_targets, need_confidence)
                losses[here] += (weight[here, part] * loss).sum(dim=1)
                if targets_grad is not None:
                    assert mixed_targets is not None and target_slope is not None
                    lost = (slope * unmixed).sum(dim=-1) + (target_slope * mixed_targets).sum(dim=-1)
                    mass_grad[here, part] = -share[..., 0] * lost
                    if weighted:
                        mass_grad[here, part] += loss / total[here].masked_fill(total[here] == 0, 1)
                    targets_grad[here] += _unmix(local, target_slope * share)
                if need_logits or need_confidence:
                    logits_grad[here] += _unmix(local, slope.mul_(share))
        if targets_grad is not None:
            if weighted:
                mass_grad -= losses[:, None] / total.masked_fill(total == 0, 1)
            confidence_grad = (logits_grad * logits + targets_grad * local_targets).sum(dim=-1)
            confidence_grad += _unmix(factors, mass_grad.masked_fill_(mass == 0, 0)[..., None])[..., 0]
        logits_grad *= confidence[..., None]
        if by_gram:  # sum_k w_k <target_k, logits_k> and its gradient, for all mixed examples at once
            for j in range(0, num_locations, max(1, CHUNK_ELEMENTS // (num_mixed * num_examples))):
                here = slice(j, j + max(1, CHUNK_ELEMENTS // (num_mixed * num_examples)))
                local = factors if len(factors) == 1 else factors[here]
                gram = (local * (weight * inverse.square())[here, None]) @ local.mT
                gram = gram * confidence[here, :, None] * confidence[here, None]
                toward = gram @ local_targets[here]
                losses[here] -= (toward * logits[here]).sum(dim=(1, 2))
                logits_grad[here] -= toward
        if orders is not None:
            logits_grad = _permute(logits_grad, orders)
        ctx.gradients = [logits_grad.div_(occupied) if need_logits else None, None]
        if need_confidence:
            ctx.gradients[1] = (confidence_grad if orders is None else confidence_grad.gather(1, orders)) / occupied
        return losses.sum() / occupied

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "MultiMix losses keep their gradient and nothing to differentiate it by: call backward() or "
                "torch.autograd.grad() without create_graph=True."
            )
        logits_grad, confidence_grad = (None if g is None else g * grad for g in ctx.gradients)
        return logits_grad, None, confidence_grad, None, None, None, None


# Of mixed logits (q, n, c) and targets: the losses (q, n), their slopes by the logits, which may take the place of the
# logits, and by the targets if asked for. Cross-entropy without targets leaves out what is linear in them.
Slopes = tuple[Tensor, Tensor, Tensor | None]


def _cross_entropy(mixed: Tensor, targets: Tensor | None, by_targets: bool) -> Slopes:
    normaliser = mixed.logsumexp(dim=-1, keepdim=True)
    loss = normaliser[..., 0]
    target_slope = mixed.neg() if by_targets else None
    if targets is None:
        return loss, mixed.sub_(normaliser).exp_(), None
    loss = loss - (targets * mixed).sum(dim=-1)
    return loss, mixed.sub_(normaliser).exp_().sub_(targets), target_slope


def _binary_cross_entropy(mixed: Tensor, targets: Tensor | None, by_targets: bool) -> Slopes:
    assert targets is not None
    num_classes = mixed.shape[-1]
    loss = F.binary_cross_entropy_with_logits(mixed, targets, reduction="none").mean(dim=-1)
    target_slope = -mixed / num_classes if by_targets else None
    return loss, mixed.sigmoid_().sub_(targets).div_(num_classes), target_slope


def _mse(mixed: Tensor, targets: Tensor | None, by_targets: bool) -> Slopes:
    assert targets is not None
    difference = mixed.sub_(targets)
    slope = difference * (2 / mixed.shape[-1])
    return difference.square().mean(dim=-1), slope, -slope if by_targets else None


CRITERIA = {"cross_entropy": _cross_entropy, "binary_cross_entropy": _binary_cross_entropy, "mse": _mse}


def _permute(x: Tensor, order: Tensor) -> Tensor:
    """Rows of each (b, c) of `x` (r, b, c) in the order (r, b)."""
    return x.gather(1, order[..., None].expand_as(x))


def _mix(factors: Tensor, x: Tensor) -> Tensor:
    """Mixtures (q, n, m) of `x` (q, b, m) by factors (q or 1, b, n), for shared factors in one product."""
    if len(factors) > 1 or len(x) == 1:
        return factors.mT @ x
    q, b, m = x.shape
    return (factors[0].mT @ x.transpose(0, 1).reshape(b, q * m)).view(-1, q, m).transpose(0, 1)


def _unmix(factors: Tensor, x: Tensor) -> Tensor:
    """The transpose of `_mix`: (q, n, m) to (q, b, m)."""
    if len(factors) > 1 or len(x) == 1:
        return factors @ x
    q, n, m = x.shape
    return (factors[0] @ x.transpose(0, 1).reshape(n, q * m)).view(-1, q, m).transpose(0, 1)
