"""Loss and gradients of all mixed examples at a chunk of locations, by the mixing matrix of each location.

Used on accelerators. The matrix is confidence times factors, divided by the mass of each mixed example. One product
mixes the logits, one the targets, and one the gradient. Logits and mixed logits, which are larger than the matrix, are
neither permuted nor scaled: an accelerator takes longer to read them than to multiply them. The classes are the
innermost dimension in memory, where a softmax is fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunk import ChunkResult, add, location_weights
from .inputs import Inputs, smallest_mass
from .kernels import MixedTerms, run
from .mixers import DenseMixer


def loss_and_grads_by_matrix(inputs: Inputs, locations: slice) -> ChunkResult:
    """Compute the loss of all mixed examples at a chunk of locations and the gradient of the logits.

    Args:
        inputs: The inputs, with dense factors. The confidence needs no gradient.
        locations: The locations.

    Returns:
        The result in the order of the examples.
    """
    options, mixer = inputs.options, inputs.mixer
    assert isinstance(mixer, DenseMixer)
    confidence = inputs.confidence_at(locations)
    logits, _, targets = inputs.examples_at(locations, confidence)
    assert targets is not None
    factors = mixer.factors_at(locations, slice(None))
    if inputs.permutations is not None:
        factors = factors[0][inputs.permutations[locations]]
    matrix = confidence[..., None] * factors
    mass, smallest = matrix.sum(dim=1), smallest_mass(inputs.dtype)
    matrix.div_(F.threshold(mass, smallest, torch.inf)[:, None])
    weight, _, occupied = location_weights(F.threshold(mass, smallest, 0, inplace=True), options.confidence_weighted)
    problem = (inputs, matrix, weight, logits, targets.expand_as(logits))
    has_triton = options.criterion == "cross_entropy" and logits.dtype == torch.float32
    loss, grad = run(
        options.kernel, logits.device, options.criterion, partial(_by_products, *problem),
        partial(_by_triton, *problem) if has_triton else None,
    )  # fmt: skip
    return ChunkResult(loss, occupied, grad, confidence)


def _by_triton(
    inputs: Inputs, matrix: Tensor, weight: Tensor, logits: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the result of `_by_products` without mixed logits in memory."""
    from .triton_kernel import losses_and_gradient

    mixed = inputs.options.columns or slice(None)
    losses, grad = losses_and_gradient(logits, targets, matrix[..., mixed], weight[:, mixed].contiguous())
    return (losses * weight[:, mixed]).sum(), grad


def _by_products(
    inputs: Inputs,
    matrix: Tensor,
    weight: Tensor,
    logits: Tensor,
    targets: Tensor,
    terms_of: Callable[..., MixedTerms],
) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses and the gradient of the logits (q, b, c)."""
    loss = grad = None
    for mixed in inputs.own_mixed_slices:
        m = matrix[..., mixed]
        z, y = ((m.mT @ x).mT for x in (logits, targets))
        terms = terms_of(inputs.options.criterion, z, y, None, weight[:, None, mixed], False)
        loss = add(loss, (terms.losses * weight[:, mixed]).sum())
        if inputs.need_logits:
            grad = add(grad, m @ terms.logits_grad.mT)
        del z, y, terms  # frees memory for the next ones
    return (weight.new_zeros(()) if loss is None else loss), (torch.zeros_like(logits) if grad is None else grad)
