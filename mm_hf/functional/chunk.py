"""Loss and gradients of all mixed examples at a chunk of locations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .criteria import ClassTargets
from .inputs import CONFIDENCE_SCALE, Chunk
from .kernels import MixedTerms, run


class ChunkResult(NamedTuple):
    """Sums over a chunk's locations, and gradients in the order of the factors' rows.

    Attributes:
        loss: Sum of the locations' losses.
        occupied: Number of locations that have any mass.
        logits_grad: (q, b, c), valid only if the logits or the confidence need a gradient.
        confidence_grad: (q, b), valid only if the confidence needs a gradient.
    """

    loss: Tensor
    occupied: Tensor
    logits_grad: Tensor
    confidence_grad: Tensor


def loss_and_grads(chunk: Chunk) -> ChunkResult:
    """Compute the loss of all mixed examples at a chunk of locations, and its gradients, with the options' kernel."""
    options = chunk.inputs.options
    return ChunkResult(*run(options.kernel, chunk.logits.device, options.criterion, partial(_loss_and_grads, chunk)))


def location_weights(mass: Tensor, confidence_weighted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights (q, n) of the losses of mixed examples at q locations, from their mass (q, n).

    Returns:
        The weights, which sum to 1 at each location that has any mass; their sums (q, 1) before this normalization; and
        the number of locations that have any mass.
    """
    weight = mass if confidence_weighted else (mass > 0).to(mass.dtype)
    total = weight.sum(dim=1, keepdim=True)
    occupied = (total > 0).sum()
    total.clamp_(min=torch.finfo(total.dtype).tiny)
    return weight / total, total, occupied


def _loss_and_grads(chunk: Chunk, terms_of: Callable[..., MixedTerms]) -> ChunkResult:
    inputs, locations, mass = chunk.inputs, chunk.locations, chunk.mass
    mixer, options, need_confidence = inputs.mixer, inputs.options, inputs.need_confidence
    weighted = options.confidence_weighted
    weight, total, occupied = location_weights(mass, weighted)
    inverse_mass = mass.reciprocal().masked_fill_(mass == 0, 0)

    loss: Tensor | None = None
    logits_grad: Tensor | None = None
    targets_grad: Tensor | None = None
    mass_grad = torch.zeros_like(mass) if need_confidence else mass
    for mixed in inputs.own_mixed_slices:
        scale, share = (mixer.pack_weights(x[:, mixed])[:, None] for x in (inverse_mass, weight))
        terms = terms_of(
            options.criterion, mixer.mix(chunk.packed_logits, locations, mixed), _mix_targets(chunk, mixed, scale),
            scale, share, need_confidence,
        )  # fmt: skip
        loss = add(loss, mixer.unpack_weights(terms.losses * share[:, 0]).sum(dim=1, keepdim=True))
        if terms.targets_grad is not None and terms.scale_grad is not None:
            targets_grad = add(targets_grad, mixer.mix_transpose(terms.targets_grad, locations, mixed))
            mass_grad[:, mixed] = mixer.unpack_weights(-(share * scale)[:, 0] * terms.scale_grad)
            if weighted:
                mass_grad[:, mixed] += mixer.unpack_weights(terms.losses) / total
        if inputs.need_logits or need_confidence:
            logits_grad = add(logits_grad, mixer.mix_transpose(terms.logits_grad, locations, mixed))
        del terms  # free its tensors before the next ones are allocated

    loss = mass.new_zeros(len(mass), 1) if loss is None else loss
    logits_grad = torch.zeros_like(chunk.packed_logits) if logits_grad is None else logits_grad
    targets_grad = torch.zeros_like(chunk.packed_logits) if targets_grad is None and need_confidence else targets_grad
    unpacked_grad, confidence_grad = mixer.unpack(logits_grad), chunk.confidence
    if need_confidence:
        assert targets_grad is not None
        if weighted:
            mass_grad -= loss / total
        confidence_grad = _confidence_grad(chunk, unpacked_grad, mixer.unpack(targets_grad), mass_grad)
    return ChunkResult(loss.sum(), occupied, unpacked_grad * chunk.confidence[..., None], confidence_grad)


def _confidence_grad(chunk: Chunk, logits_grad: Tensor, targets_grad: Tensor, mass_grad: Tensor) -> Tensor:
    """Return the gradient of the confidence (q, b).

    Args:
        chunk: The chunk.
        logits_grad: (q, b, c), the gradient of confidence times logits.
        targets_grad: (q, b, c), the gradient of confidence times targets.
        mass_grad: (q, n), the gradient of the mass. It is changed in place.
    """
    assert chunk.targets is not None
    inputs, mixer = chunk.inputs, chunk.inputs.mixer
    grad = (logits_grad * chunk.logits + targets_grad * chunk.targets).sum(dim=-1)
    mass_grad.masked_fill_(chunk.mass == 0, 0)
    for mixed in inputs.mixed_slices:
        packed = mixer.pack_weights(mass_grad[:, mixed].contiguous())[:, None]
        grad = grad + mixer.unpack(mixer.mix_transpose(packed, chunk.locations, mixed))[..., 0]
    if inputs.dtype == torch.float64:
        grad = grad * CONFIDENCE_SCALE
    # The gradient of padding in a mixed example of small mass may overflow, and infinity times 0 is not a number.
    limit = torch.finfo(grad.dtype).max
    return grad.clamp(-limit, limit)


def add(total: Tensor | None, x: Tensor) -> Tensor:
    """Add `x` in place to a sum; None is an empty sum, since filling a tensor with 0 is one more kernel on a GPU."""
    return x if total is None else total.add_(x)


def _mix_targets(chunk: Chunk, mixed: slice, scale: Tensor) -> Tensor | ClassTargets:
    """Mix the targets of a chunk. Shares of classes are scaled by `scale` (o, 1, i); other targets are not."""
    inputs = chunk.inputs
    if chunk.packed_targets is not None:
        return inputs.mixer.mix(chunk.packed_targets, chunk.locations, mixed)
    assert chunk.classes is not None
    index, shares, examples = inputs.mixer.class_shares(
        chunk.classes, chunk.confidence, scale, chunk.logits.shape[-1], chunk.locations, mixed
    )
    return ClassTargets(index, shares, examples, inputs.options.label_smoothing)
