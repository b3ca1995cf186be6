"""The Dense MultiMix loss and its gradient, computed chunk by chunk without mixed features.

The classifier is linear and the factors of a mixed example sum to 1, so mixing its inputs equals mixing its outputs:
the loss needs only the logits at every location. With logits S (b, r, c), targets Y (b, c), confidence a (r, b) and
factors Λ (b, n), it computes, for locations j and mixed examples k::

    for j in range(r):                                # vectorized over a chunk of locations
        mass[k] = Σ_i a[j, i] Λ[i, k]
        weight[k] = mass[k] / Σ_k mass[k]             # or uniform over mass[k] > 0
        for k in range(n):                            # vectorized over a chunk of mixed examples
            m = a[j] * Λ[:, k] / mass[k]              # (b,), sums to 1
            z, y = m @ S[:, j], m @ Y                 # mixed logits and mixed targets (c,)
            loss[j] += weight[k] * criterion(z, y)
            S.grad[:, j] += weight[k] * outer(m, d criterion(z, y) / dz)
    loss = mean of loss[j] over the locations j that have any mass

On a CPU, confidence, permutations and normalization move from the mixing matrix to the tensors that it multiplies, so
one matrix product with Λ mixes many locations. On other devices, and with a constant confidence, the mixing matrix of
each location is computed, because passes over the logits take longer than products (mixing_matrix.py). The gradient is
computed in the forward pass, and it is all that is saved for the backward pass.

Only ratios within a location matter, so confidence times factors may be as small as the smallest floating-point
numbers. On a CPU, a chunk in which float32 products underflow is computed again in float64, with the confidence scaled
so that they do not. On other devices, where the choice would wait for the device, a mixed example with less than 2^-100
of the largest confidence at a location is left out.

Call tree::

    losses.dense_multimix_loss                  checks the arguments, computes targets and confidence
    └── DenseMixingLoss.forward                 loops over chunks of locations
        ├── Inputs.chunk (inputs.py)            takes a chunk's tensors, packs them for the mixer, computes the mass
        ├── loss_and_grads (chunk.py)           loops over chunks of mixed examples
        │   ├── Mixer.mix                       mixed logits and mixed targets (mixers.py)
        │   ├── mixed_terms                     losses and gradients of mixed logits (kernels.py, criteria.py)
        │   └── Mixer.mix_transpose             gradients of the logits
        └── loss_and_grads_by_matrix            the same on accelerators, with mixed_terms (mixing_matrix.py)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .chunk import ChunkResult, add, loss_and_grads
from .factors import SparseFactors
from .inputs import Chunk, Inputs, LossOptions, smallest_mass
from .mixing_matrix import loss_and_grads_by_matrix


class DenseMixingLoss(torch.autograd.Function):
    """Mean over occupied locations of the weighted loss of all mixed examples, and the number of these locations.

    Inputs of `apply`:
        logits: (b, r, c), of any floating type.
        confidence: (r, b) in [0, 1], of float32 or float64. The largest of a location is 1.
        targets: (b, c), or (b, r, c) if they differ between locations; or class indices (b,) or (b, r). Rows of targets
            sum to 1 for "cross_entropy".
        factors: (r, b, n), (b, n) or sparse, of the type to compute in (float32 or float64).
        permutations: (r, b) or None: example i has row `permutations[j, i]` of the factors at location j.
        options: The settings.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        confidence: Tensor,
        targets: Tensor,
        factors: Tensor | SparseFactors,
        permutations: Tensor | None,
        options: LossOptions,
    ) -> tuple[Tensor, Tensor]:
        need_logits, need_confidence, *_ = ctx.needs_input_grad
        dtype = torch.promote_types(logits.dtype, torch.float32)
        inputs = Inputs(
            logits, confidence, targets, factors, permutations, options, dtype, need_logits, need_confidence
        )
        logits_grads: list[Tensor] = []
        confidence_grad = torch.empty_like(confidence) if need_confidence else None
        loss = occupied = None
        for locations in inputs.location_slices:
            result = _loss_and_grads_at(inputs, locations)
            loss, occupied = add(loss, result.loss), add(occupied, result.occupied)
            if need_logits:
                logits_grads.append(result.logits_grad)
            if confidence_grad is not None:
                confidence_grad[locations] = result.confidence_grad.to(confidence.dtype)
        assert loss is not None and occupied is not None  # there is at least one location
        ctx.mark_non_differentiable(occupied)
        ctx.divisor = occupied.clamp(min=1)
        ctx.slices, ctx.logits_grads, ctx.confidence_grad = inputs.location_slices, logits_grads, confidence_grad
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return (loss / ctx.divisor).to(dtype), occupied

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "MultiMix losses have no second derivative: call backward() or torch.autograd.grad() without "
                "create_graph=True."
            )
        grad = grad / ctx.divisor
        logits_grad = confidence_grad = None
        if ctx.logits_grads:
            logits_grad = torch.empty(ctx.shape, dtype=ctx.dtype, device=grad.device)
            for locations, part in zip(ctx.slices, ctx.logits_grads, strict=True):
                # Scales, transposes and converts in one pass.
                torch.mul(part.transpose(0, 1), grad.to(part.dtype), out=logits_grad[:, locations])
        if ctx.confidence_grad is not None:
            confidence_grad = ctx.confidence_grad * grad
        return logits_grad, confidence_grad, None, None, None, None


def _loss_and_grads_at(inputs: Inputs, locations: slice) -> ChunkResult:
    """Compute the loss of all mixed examples at a chunk of locations, and its gradients in the examples' order."""
    if inputs.by_matrix:
        return loss_and_grads_by_matrix(inputs, locations)
    chunk = inputs.chunk(locations)
    if inputs.may_underflow and _underflows(chunk, inputs.options.confidence_weighted and not inputs.need_confidence):
        chunk = inputs.in_float64.chunk(locations)
    result = loss_and_grads(chunk)
    if inputs.need_logits:
        result = result._replace(logits_grad=inputs.permute(result.logits_grad, inputs.permutations, locations))
    if inputs.need_confidence:
        result = result._replace(confidence_grad=inputs.permute(result.confidence_grad, inputs.permutations, locations))
    return result


def _underflows(chunk: Chunk, only_total_matters: bool) -> bool:
    """Return True if a mass of 0 at an occupied location may be an underflow that changes the loss or a gradient.

    If mixed examples are weighted by their mass and the mass needs no gradient, a small mass matters only where the
    total mass of a location is small.
    """
    occupied = chunk.confidence.amax(dim=1) > 0
    if only_total_matters:
        threshold = smallest_mass(chunk.mass.dtype) * 2**30 * chunk.mass.shape[1]
        return bool((occupied & (chunk.mass.sum(dim=1) < threshold)).any())
    return bool((occupied & (chunk.mass == 0).any(dim=1)).any())
