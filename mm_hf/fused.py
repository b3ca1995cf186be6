"""The dense MultiMix loss and its gradient in one walk, without ever making a mixed feature.

The classifier is linear and the columns of the mixing matrix sum to 1, so mixing its inputs equals mixing its outputs:
only the per-location logits are needed. Confidence, order and normalisation are moved from the mixing matrix to what it
multiplies, so that locations which share factors are mixed by one matrix product. Labels of many classes are not mixed by a
product at all: a row of the mixing matrix goes to the row of its class. What is kept for the backward pass is the gradient
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Mixed logits that are alive at a time: small enough for a CPU's cache and a GPU's spare memory, large enough that the
# matrix products dominate.
CHUNK_ELEMENTS = 1 << 19
# So few classes are mixed as numbers: the product costs as much as adding up by class does at about this many, whatever the
# other sizes.
FEW_CLASSES = 64


class DenseMixingLoss(torch.autograd.Function):
    """Mean over occupied locations of the weighted loss of all mixed examples there.

    Inputs (floating ones of one type, float32 or float64): `logits` (r, b, c), `targets` (b, c), or (r, b, c) for targets
    of each location's own, or class indices (b,) or (r, b), `confidence` (r, b) >= 0, `factors` (r or 1, b, n), and
    `orders` (r, b) or None, for one matrix of factors in an order of examples of its own at each location. With
    M = confidence * factors and s its column sums, mixed example k of a location has logits and target mixed by M / s, and
    weighs s if `weighted`, else 1 if s > 0. `criterion` is a name of `CRITERIA`; rows of targets sum to 1 for
    "cross_entropy", and `smoothing` spreads that share of them over the classes.
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
        smoothing: float,
    ) -> Tensor:
        need_logits, _, need_confidence, *_ = ctx.needs_input_grad
        (num_locations, num_examples, num_classes), num_mixed = logits.shape, factors.shape[-1]
        classes, soft = _as_classes(targets, logits, need_confidence)
        if soft is not None and smoothing:
            soft = (1 - smoothing) * soft + smoothing / num_classes
        if orders is not None:  # put the examples of each location into the order of the factors' rows
            back = orders.argsort(dim=1)
            logits, confidence = _permute(logits, back), confidence.gather(1, back)
            soft = None if soft is None else _permute(soft.expand_as(logits), back)
            classes = None if classes is None else classes.gather(1, back)
        mass = _mix(factors, confidence[..., None])[:, 0]
        inverse = mass.masked_fill(mass == 0, torch.inf).reciprocal_()
        weight = mass if weighted else (mass > 0).to(mass.dtype)
        total = weight.sum(dim=1, keepdim=True)
        total = total.masked_fill(total == 0, 1)
        occupied = (mass > 0).any(dim=1).sum().clamp_(min=1)
        weight = weight / total

        loss_and_slopes = CRITERIA[criterion]
        weighted_logits = confidence[..., None] * logits
        weighted_targets = None if soft is None else confidence[..., None] * soft
        losses = logits.new_zeros(num_locations)
        logits_grad = torch.zeros_like(logits)
        targets_grad = torch.zeros_like(logits) if need_confidence else None
        mass_grad = torch.zeros_like(mass)
        widest = max(num_classes, num_examples)
        mixed_at_once = min(num_mixed, max(1, CHUNK_ELEMENTS // widest))
        locations_at_once = max(1, CHUNK_ELEMENTS // (mixed_at_once * widest))
        for first in range(0, num_locations, locations_at_once):
            here = slice(first, first + locations_at_once)
            for start in range(0, num_mixed, mixed_at_once):
                part = slice(start, start + mixed_at_once)
                local = (factors if len(factors) == 1 else factors[here])[..., part]
                scale = inverse[here, None, part]
                share = weight[here, None, part] * scale
                mixed = _mix(local, weighted_logits[here]).mul_(scale)
                mixed_targets: Tensor | ClassTargets
                if weighted_targets is not None:
                    mixed_targets = _mix(local, weighted_targets[here]).mul_(scale)
                else:
                    assert classes is not None
                    mixed_targets = ClassTargets(classes[here], confidence[here, :, None] * local * scale, smoothing)
                unmixed = mixed.clone() if need_confidence else mixed  # `loss_and_slopes` works in place
                loss, slope, target_slope = loss_and_slopes(mixed, mixed_targets, need_confidence)
                losses[here] += (weight[here, part] * loss).sum(dim=1)
                if targets_grad is not None:
                    assert isinstance(mixed_targets, Tensor) and target_slope is not None
                    lost = (slope * unmixed).sum(dim=1) + (target_slope * mixed_targets).sum(dim=1)
                    mass_grad[here, part] = -share[:, 0] * lost
                    if weighted:
                        mass_grad[here, part] += loss / total[here]
                    targets_grad[here] += _unmix(local, target_slope * share)
                if need_logits or need_confidence:
                    logits_grad[here] += _unmix(local, slope.mul_(share))
        if targets_grad is not None:
            assert soft is not None
            if weighted:
                mass_grad -= losses[:, None] / total
            confidence_grad = (logits_grad * logits + targets_grad * soft).sum(dim=-1)
            confidence_grad += _unmix(factors, mass_grad.masked_fill_(mass == 0, 0)[:, None])[..., 0]
        logits_grad *= confidence[..., None]
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
        return logits_grad, None, confidence_grad, None, None, None, None, None


@dataclass
class ClassTargets:
    """Mixed labels of examples that have one class each, not yet added up by class.

    Attributes:
        classes: (q, b) class indices.
        shares: (q, b, n), of each example in each mixed one; they sum to 1 over the examples.
        smoothing: Share of the target that is spread over the classes.
    """

    classes: Tensor
    shares: Tensor
    smoothing: float

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(q, c, n) as (q c, n), and which of its rows are those of the examples' classes."""
        offsets = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
        return x.view(-1, x.shape[-1]), (self.classes + offsets).flatten()

    def agreement(self, mixed: Tensor) -> Tensor:
        """Sum over the classes of target times mixed logits (q, c, n): (q, n)."""
        rows, index = self._rows(mixed)
        agreement = (rows[index].view_as(self.shares) * self.shares).sum(dim=1)
        return agreement.lerp(mixed.mean(dim=1), self.smoothing) if self.smoothing else agreement

    def subtract_from(self, x: Tensor) -> Tensor:
        """`x` (q, c, n) less the targets, in place."""
        rows, index = self._rows(x)
        rows.index_add_(0, index, self.shares.reshape(len(index), -1), alpha=self.smoothing - 1)
        return x.sub_(self.smoothing / x.shape[1]) if self.smoothing else x


def _as_classes(targets: Tensor, logits: Tensor, as_numbers: bool) -> tuple[Tensor | None, Tensor | None]:
    """Class indices (r, b), or targets (r or 1, b, c): one of the two.

    On a GPU the rows of a class would be added up in an order that changes from run to run, and products are cheap.
    """
    if targets.is_floating_point():
        return None, targets if targets.ndim == 3 else targets[None]
    classes = targets if targets.ndim == 2 else targets.expand(len(logits), -1)
    if not as_numbers and logits.shape[-1] > FEW_CLASSES and logits.device.type == "cpu":
        return classes, None
    return None, F.one_hot(classes, logits.shape[-1]).to(logits.dtype)


# Of mixed logits (q, c, n) and targets: the losses (q, n), their slopes by the logits, which may take the place of the
# logits, and by the targets if asked for.
Slopes = tuple[Tensor, Tensor, Tensor | None]


def _cross_entropy(mixed: Tensor, targets: Tensor | ClassTargets, by_targets: bool) -> Slopes:
    target_slope = mixed.neg() if by_targets else None
    largest = mixed.amax(dim=1, keepdim=True)
    mixed.sub_(largest)
    agreement = targets.agreement(mixed) if isinstance(targets, ClassTargets) else (targets * mixed).sum(dim=1)
    total = mixed.exp_().sum(dim=1, keepdim=True)
    loss = total.log()[:, 0] - agreement
    mixed.div_(total)
    return (
        loss,
        targets.subtract_from(mixed) if isinstance(targets, ClassTargets) else mixed.sub_(targets),
        target_slope,
    )


def _binary_cross_entropy(mixed: Tensor, targets: Tensor | ClassTargets, by_targets: bool) -> Slopes:
    assert isinstance(targets, Tensor)
    num_classes = mixed.shape[1]
    loss = F.binary_cross_entropy_with_logits(mixed, targets, reduction="none").mean(dim=1)
    target_slope = -mixed / num_classes if by_targets else None
    return loss, mixed.sigmoid_().sub_(targets).div_(num_classes), target_slope


def _mse(mixed: Tensor, targets: Tensor | ClassTargets, by_targets: bool) -> Slopes:
    assert isinstance(targets, Tensor)
    difference = mixed.sub_(targets)
    slope = difference * (2 / mixed.shape[1])
    return difference.square().mean(dim=1), slope, -slope if by_targets else None


CRITERIA = {"cross_entropy": _cross_entropy, "binary_cross_entropy": _binary_cross_entropy, "mse": _mse}


def _permute(x: Tensor, order: Tensor) -> Tensor:
    """Rows of each (b, c) of `x` (r, b, c) in the order (r, b)."""
    return x.gather(1, order[..., None].expand_as(x))


def _mix(factors: Tensor, x: Tensor) -> Tensor:
    """Mixtures (q, m, n) of `x` (q, b, m) by factors (q or 1, b, n), for shared factors in one product."""
    if len(factors) > 1 or len(x) == 1:
        return x.mT @ factors
    q, b, m = x.shape
    return (x.mT.reshape(q * m, b) @ factors[0]).view(q, m, -1)


def _unmix(factors: Tensor, x: Tensor) -> Tensor:
    """The transpose of `_mix`: (q, m, n) to (q, b, m)."""
    if len(factors) > 1 or len(x) == 1:
        return (x @ factors.mT).mT
    q, m, n = x.shape
    return (x.reshape(q * m, n) @ factors[0].mT).view(q, m, -1).mT
