"""The dense MultiMix loss and its gradient in one walk, without ever making a mixed feature.

The classifier is linear and the columns of the mixing matrix sum to 1, so mixing its inputs equals mixing its outputs:
only the per-location logits are needed. Confidence, order and normalisation are moved from the mixing matrix to what it
multiplies, so that locations which share factors are mixed together. Labels of many classes are not mixed as numbers: each
example's share goes to its class. What is kept for the backward pass is the gradient alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .criteria import CRITERIA, ClassTargets
from .factors import SparseFactors
from .mixers import Mixer, make_mixer

# So few classes are mixed as numbers by a product: it costs as much as adding up by class does at about this many,
# whatever the other sizes.
FEW_CLASSES = 64
MASKED = -1e30  # classes are masked out by logits down to the smallest number, a mean of which is minus infinity


class DenseMixingLoss(torch.autograd.Function):
    """Mean over occupied locations of the weighted loss of all mixed examples there.

    Inputs: `logits` (b, r, c) of any floating type, `targets` (b, c), or (b, r, c) for targets of each location's own, or
    class indices (b,) or (b, r), `confidence` (r, b) >= 0 of the type to compute in (float32 or float64), `factors`
    (r or 1, b, n) of that type, or sparse, and `orders` (r, b) or None, for one matrix of factors in an order of
    examples of its own at each location. With M = confidence * factors and s its column sums, mixed example k of a
    location has logits and target mixed by M / s, and weighs s if `weighted`, else 1 if s > 0. `criterion` is a name of
    `CRITERIA`; rows of targets sum to 1 for "cross_entropy", and `smoothing` spreads that share of them over the classes.
    With `columns`, what these mixed examples contribute to the mean over all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        confidence: Tensor,
        factors: Tensor | SparseFactors,
        permutations: Tensor | None,
        weighted: bool,
        criterion: str,
        smoothing: float,
        columns: slice | None = None,
    ) -> Tensor:
        need_logits, _, need_confidence, *_ = ctx.needs_input_grad
        b, r, c = logits.shape
        mixer = make_mixer(factors, logits.device)
        # On a GPU the rows of a class would be added up in an order that changes from run to run, and products are cheap.
        many = mixer.prefers_class_indices or c > FEW_CLASSES
        add_up = many and not targets.is_floating_point() and not need_confidence and logits.device.type == "cpu"
        inverse_permutation = None  # puts the examples of each location into the order of the factors' rows
        if permutations is not None:
            inverse_permutation = permutations.argsort(dim=1)
            confidence = confidence.gather(1, inverse_permutation)
        loss, occupied = confidence.new_zeros(()), confidence.new_zeros(())
        gradients = confidence.new_empty(b, r, c) if need_logits else None
        confidence_gradients = torch.empty_like(confidence) if need_confidence else None
        locations_at_once, mixed_at_once = mixer.chunk_sizes(r, c)
        for locations in _slices(r, locations_at_once):
            block = _Chunk.at(
                locations, inverse_permutation, logits, targets, confidence, criterion, smoothing, add_up, mixer
            )
            parts = _slices(mixer.num_mixed, mixed_at_once, columns)
            local = _loss_and_grads(mixer, block, parts, columns, weighted, criterion, need_logits, need_confidence)
            loss, occupied = loss + local.loss, occupied + local.occupied
            order = None if permutations is None else permutations[locations]
            if gradients is not None:
                gradients[:, locations] = _in_order(local.gradients, order).transpose(0, 1)
            if confidence_gradients is not None:
                confidence_gradients[locations] = _in_order(local.confidence_gradients, order)
        occupied = occupied.clamp_(min=1)
        ctx.gradients = [None if g is None else g.div_(occupied) for g in (gradients, confidence_gradients)]
        ctx.logits_dtype = logits.dtype
        return loss / occupied

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "MultiMix losses keep their gradient and nothing to differentiate it by: call backward() or "
                "torch.autograd.grad() without create_graph=True."
            )
        logits_grad, confidence_grad = (None if g is None else g * grad for g in ctx.gradients)
        if logits_grad is not None:
            logits_grad = logits_grad.to(ctx.logits_dtype)
        return logits_grad, None, confidence_grad, *[None] * 6


@dataclass
class _Chunk:
    """What the examples have at q locations that are walked together, in the order of the factors' rows.

    Attributes:
        here: Which locations.
        logits: (q, b, c).
        confidence: (q, b).
        classes: (q, b), for labels that are added up.
        targets: (q or 1, b, c), for others.
        laid_out: Confidence times logits, as the mixer wants them.
        laid_out_targets: Confidence times targets.
    """

    locations: slice
    logits: Tensor
    confidence: Tensor
    classes: Tensor | None
    targets: Tensor | None
    packed: Tensor
    packed_targets: Tensor | None
    smoothing: float

    @classmethod
    def at(
        cls,
        locations: slice,
        inverse_permutation: Tensor | None,
        logits: Tensor,
        targets: Tensor,
        confidence: Tensor,
        criterion: str,
        smoothing: float,
        add_up: bool,
        mixer: Mixer,
    ) -> _Chunk:
        local, confidence = _take(logits, locations, inverse_permutation).to(confidence.dtype), confidence[locations]
        if criterion == "cross_entropy":
            # A shift of all classes changes no loss, and a large common offset would cost digits.
            local = (local - local.amax(dim=-1, keepdim=True)).clamp_(min=MASKED)
        classes, soft, laid_out_soft = None, None, None
        if targets.is_floating_point():
            soft = _take(targets, locations, inverse_permutation, local=targets.ndim == 3)
        else:
            classes = _take(targets, locations, inverse_permutation, local=targets.ndim == 2)
            soft = None if add_up else F.one_hot(classes, logits.shape[-1]).to(local.dtype)
        if soft is not None:
            soft = (1 - smoothing) * soft + smoothing / logits.shape[-1] if smoothing else soft
            laid_out_soft = mixer.pack(confidence[..., None] * soft)
        packed = mixer.pack(confidence[..., None] * local)
        return cls(locations, local, confidence, classes, soft, packed, laid_out_soft, smoothing)


@dataclass
class _ChunkResult:
    """What a block contributes: sums over its locations, and gradients (q, b, c) and (q, b), not to be read unless asked for."""

    loss: Tensor
    occupied: Tensor
    gradients: Tensor
    confidence_gradients: Tensor


def _loss_and_grads(
    mixer: Mixer,
    block: _Chunk,
    parts: list[slice],
    columns: slice | None,
    weighted: bool,
    criterion: str,
    need_logits: bool,
    need_confidence: bool,
) -> _ChunkResult:
    """Loss and gradient of all mixed examples at a block of locations, a part of the mixed examples at a time."""
    locations = block.locations
    packed = mixer.pack(block.confidence[..., None])
    mass = torch.cat(
        [mixer.unpack_weights(mixer.mix(packed, locations, mixed_slice)[:, 0]) for mixed_slice in parts], dim=1
    )
    inverse = mass.masked_fill(mass == 0, torch.inf).reciprocal_()
    weight = mass if weighted else (mass > 0).to(mass.dtype)
    total = weight.sum(dim=1, keepdim=True)
    total.masked_fill_(total == 0, 1)
    weight = weight / total

    loss = mass.new_zeros(len(mass), 1)
    grads = torch.zeros_like(block.packed)
    target_slopes = torch.zeros_like(block.packed) if need_confidence else grads
    mass_slopes = []
    for mixed_slice in parts:
        if columns is not None and not columns.start <= mixed_slice.start < columns.stop:  # another process's
            mass_slopes.append(torch.zeros_like(mass[:, mixed_slice]))
            continue
        scale, share = (mixer.pack_weights(x[:, mixed_slice])[:, None] for x in (inverse, weight))
        losses, grad, target_slope, lost = _mixed_loss(mixer, block, mixed_slice, scale, criterion, need_confidence)
        loss += mixer.unpack_weights(losses * share[:, 0]).sum(dim=1, keepdim=True)
        share = share * scale
        if need_logits or need_confidence:
            grads += mixer.mix_transpose(grad.mul_(share), locations, mixed_slice)
        if target_slope is not None and lost is not None:
            target_slopes += mixer.mix_transpose(target_slope.mul_(share), locations, mixed_slice)
            mass_slope = mixer.unpack_weights(-share[:, 0] * lost)
            mass_slopes.append(mass_slope + mixer.unpack_weights(losses) / total if weighted else mass_slope)
        del grad, target_slope  # before the next ones are made
    by_mixed = mixer.unpack(grads)
    local = block.confidence
    if need_confidence:
        assert block.targets is not None
        local = (by_mixed * block.logits + mixer.unpack(target_slopes) * block.targets).sum(dim=-1)
        for mixed_slice, mass_slope in zip(parts, mass_slopes, strict=True):
            mass_slope = mass_slope - loss / total if weighted else mass_slope
            mass_slope = mass_slope.masked_fill(mass[:, mixed_slice] == 0, 0)
            local = (
                local
                + mixer.unpack(mixer.mix_transpose(mixer.pack_weights(mass_slope)[:, None], locations, mixed_slice))[
                    ..., 0
                ]
            )
    occupied = (mass > 0).any(dim=1).sum()
    return _ChunkResult(loss.sum(), occupied, by_mixed * block.confidence[..., None], local)


def _mixed_loss(
    mixer: Mixer, block: _Chunk, mixed_slice: slice, scale: Tensor, criterion: str, targets_need_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Losses (o, i) of a part of the mixed examples, slopes (o, c, i) by mixed logits and targets, and by the scale."""
    mixed = mixer.mix(block.packed, block.locations, mixed_slice).mul_(scale)
    targets: Tensor | ClassTargets
    if block.packed_targets is not None:
        targets = mixer.mix(block.packed_targets, block.locations, mixed_slice).mul_(scale)
    else:
        assert block.classes is not None
        c = block.logits.shape[-1]
        targets = mixer.labels(block.classes, block.confidence, scale, c, block.smoothing, block.locations, mixed_slice)
    unmixed = mixed.clone() if targets_need_grad else mixed  # the criteria work in place
    losses, grad, target_slope = CRITERIA[criterion](mixed, targets, targets_need_grad)
    if target_slope is None:
        return losses, grad, None, None
    assert isinstance(targets, Tensor)
    return losses, grad, target_slope, (grad * unmixed).sum(dim=1) + (target_slope * targets).sum(dim=1)


def _slices(length: int, at_once: int, columns: slice | None = None) -> list[slice]:
    """All of a length in slices; none reaches over the ends of `columns`."""
    ends = [0, length] if columns is None else sorted({0, columns.start, columns.stop, length})
    return [
        slice(start, min(start + at_once, end)) for first, end in pairwise(ends) for start in range(first, end, at_once)
    ]


def _take(x: Tensor, locations: slice, inverse_permutation: Tensor | None, local: bool = True) -> Tensor:
    """What the examples have at a block of locations, in the order `back` (r, b): (q, b) or (q, b, c).

    `x` is (b, r) or (b, r, c) if it is `local`, else (b,) or (b, c), and the same at all locations.
    """
    block = x[:, locations].transpose(0, 1) if local else x.expand(locations.stop - locations.start, *x.shape)
    return _in_order(block, None if inverse_permutation is None else inverse_permutation[locations])


def _in_order(x: Tensor, order: Tensor | None) -> Tensor:
    """The examples of each location of `x` (q, b, ...) in the order (q, b)."""
    return x if order is None else x[torch.arange(len(x), device=x.device)[:, None], order]
