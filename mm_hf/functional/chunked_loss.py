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
        ├── Inputs.chunk                        takes a chunk's tensors, packs them for the mixer, computes the mass
        ├── loss_and_grads (chunk.py)           loops over chunks of mixed examples
        │   ├── Mixer.mix                       mixed logits and mixed targets (mixers.py)
        │   ├── mixed_terms                     losses and gradients of mixed logits (kernels.py, criteria.py)
        │   └── Mixer.mix_transpose             gradients of the logits
        └── loss_and_grads_by_matrix            the same on accelerators, with mixed_terms (mixing_matrix.py)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import devices
from .chunk import CONFIDENCE_SCALE, Chunk, ChunkResult, add, loss_and_grads, smallest_mass
from .criteria import Criterion, mask_infinite, masked_logit
from .factors import SparseFactors
from .kernels import Kernel
from .mixers import Mixer, make_mixer
from .mixing_matrix import loss_and_grads_by_matrix
from .targets import one_hot

# Up to this many classes, a matrix product with one-hot targets is faster than adding up the shares of each class.
FEW_CLASSES = 64


@dataclass(frozen=True)
class LossOptions:
    """Settings of the loss.

    Attributes:
        criterion: A key of `CRITERIA`.
        label_smoothing: Share of each target that is spread over the classes, for "cross_entropy".
        confidence_weighted: Weigh the mixed examples of a location by their mass; otherwise all that have mass weigh
            the same.
        columns: The mixed examples to compute. The loss is then their contribution to the mean over all.
        kernel: One of `KERNELS`.
    """

    criterion: Criterion = "cross_entropy"
    label_smoothing: float = 0.0
    confidence_weighted: bool = True
    columns: slice | None = None
    kernel: Kernel = "eager"


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
            result = inputs.loss_and_grads(locations)
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


class Inputs:
    """Inputs of the loss at all locations, in the type to compute in, cut into chunks by `chunk`."""

    def __init__(
        self,
        logits: Tensor,
        confidence: Tensor,
        targets: Tensor,
        factors: Tensor | SparseFactors,
        permutations: Tensor | None,
        options: LossOptions,
        dtype: torch.dtype,
        need_logits: bool,
        need_confidence: bool,
    ):
        self.logits, self.targets, self.factors, self.options, self.dtype = logits, targets, factors, options, dtype
        self.need_logits, self.need_confidence, self.permutations = need_logits, need_confidence, permutations
        self.on_accelerator = devices.is_accelerator(logits.device)
        self.by_matrix = (self.on_accelerator or options.kernel == "triton") and not need_confidence
        # By the mixing matrix, the factors are permuted; otherwise the examples, so that one product with the factors
        # mixes many locations.
        self.inverse_permutations = None if permutations is None or self.by_matrix else permutations.argsort(dim=1)
        self.confidence = confidence
        if self.inverse_permutations is not None:
            self.confidence = confidence.gather(1, self.inverse_permutations)
        if self.by_matrix and isinstance(factors, SparseFactors):
            factors = factors.dense()
        self.mixer: Mixer = make_mixer(factors, logits.device)
        _, r, c = logits.shape
        locations_at_once, mixed_at_once = self.mixer.chunk_sizes(r, c)
        self.location_slices = _slices(r, locations_at_once)
        self.mixed_slices = _slices(self.mixer.num_mixed, mixed_at_once, options.columns)
        own = options.columns or slice(0, self.mixer.num_mixed)  # other ranks compute the others
        self.own_mixed_slices = [mixed for mixed in self.mixed_slices if own.start <= mixed.start < own.stop]
        # On a GPU (by_matrix), adding up by class is not deterministic, and a matrix product costs little.
        many_classes = self.mixer.prefers_class_indices or c > FEW_CLASSES
        with_shares = not self.by_matrix and not need_confidence
        self.add_up_classes = many_classes and with_shares and not targets.is_floating_point()
        self.may_underflow = self._may_underflow()
        if not targets.is_floating_point() and targets.ndim == 1 and not self.add_up_classes:
            self.targets = one_hot(targets, c, dtype)

    @cached_property
    def rows(self) -> Tensor:
        """The locations (r, 1), to index the examples of each by a permutation."""
        return torch.arange(self.logits.shape[1], device=self.logits.device)[:, None]

    def _may_underflow(self) -> bool:
        """Return True if a product of confidence and factors may be too small for the type; on a CPU only."""
        if self.on_accelerator or self.dtype == torch.float64:
            return False
        values = self.factors.weight if isinstance(self.factors, SparseFactors) else self.factors
        return _smallest_positive(self.confidence) * _smallest_positive(values) < smallest_mass(self.dtype)

    @cached_property
    def in_float64(self) -> Inputs:
        """The inputs to compute in float64, with the same chunks."""
        double = copy.copy(self)
        double.dtype, double.factors = torch.float64, self.factors.to(torch.float64)
        double.mixer = make_mixer(double.factors, self.logits.device)
        return double

    def loss_and_grads(self, locations: slice) -> ChunkResult:
        """Compute the loss of all mixed examples at a chunk of locations, and its gradients in the examples' order."""
        if self.by_matrix:
            return loss_and_grads_by_matrix(self, locations)
        chunk = self.chunk(locations)
        if self.may_underflow and _underflows(chunk, self.options.confidence_weighted and not self.need_confidence):
            chunk = self.in_float64.chunk(locations)
        result = loss_and_grads(chunk)
        if self.permutations is None:
            return result
        logits_grad = self.permute(result.logits_grad, self.permutations, locations) if self.need_logits else result[2]
        return result._replace(
            logits_grad=logits_grad,
            confidence_grad=self.permute(result.confidence_grad, self.permutations, locations),
        )

    def chunk(self, locations: slice) -> Chunk:
        """Take the tensors at some locations, pack them for the mixer and compute the mass of the mixed examples."""
        mixer = self.mixer
        confidence = self.confidence_at(locations)
        logits, classes, targets = self.examples_at(locations, confidence)
        packed_targets = None if targets is None else mixer.pack(confidence[..., None] * targets)
        packed_confidence = mixer.pack(confidence[..., None])
        masses = [
            mixer.unpack_weights(mixer.mix(packed_confidence, locations, mixed)[:, 0]) for mixed in self.mixed_slices
        ]
        mass = masses[0] if len(masses) == 1 else torch.cat(masses, dim=1)
        mass = F.threshold(mass, smallest_mass(self.dtype), 0, inplace=True)
        packed_logits = mixer.pack(confidence[..., None] * logits)
        return Chunk(self, locations, logits, confidence, classes, targets, mass, packed_logits, packed_targets)

    def confidence_at(self, locations: slice) -> Tensor:
        """Return the confidence (q, b) at some locations, in float64 multiplied by `CONFIDENCE_SCALE`."""
        confidence = self.confidence[locations].to(self.dtype)
        return confidence * CONFIDENCE_SCALE if self.dtype == torch.float64 else confidence

    def examples_at(self, locations: slice, confidence: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the logits (q, b, c) at some locations, finite where the confidence is 0, and class indices (q, b)
        whose shares are added up, or other targets (q or 1, b, c).
        """
        options, num_classes = self.options, self.logits.shape[-1]
        logits = self._take(self.logits, locations, per_location=True)
        absent = (confidence == 0)[..., None]
        # Logits at padding may be infinite or not a number. The gradient of the confidence depends on finite ones.
        if self.need_confidence:
            logits = logits.masked_fill(absent & ~logits.isfinite(), 0)
        if options.criterion == "cross_entropy":
            # The loss does not depend on a common shift of all classes, and a large one would cost precision.
            largest = logits.amax(dim=-1, keepdim=True).to(self.dtype)
            logits = (logits - largest).clamp_(min=masked_logit(self.dtype))
        elif options.criterion == "binary_cross_entropy":
            logits = mask_infinite(logits.to(self.dtype))
        else:
            logits = logits.to(self.dtype)
        if not self.need_confidence and (self.on_accelerator or bool(absent.any())):
            logits = logits.masked_fill(absent, 0)
        classes, targets = None, None
        if self.targets.is_floating_point():
            targets = self._take(self.targets, locations, per_location=self.targets.ndim == 3).to(self.dtype)
        else:
            classes = self._take(self.targets, locations, per_location=self.targets.ndim == 2)
            targets = None if self.add_up_classes else one_hot(classes, num_classes, self.dtype)
        if targets is not None and options.label_smoothing:
            targets = (1 - options.label_smoothing) * targets + options.label_smoothing / num_classes
        return logits, classes, targets

    def _take(self, x: Tensor, locations: slice, per_location: bool) -> Tensor:
        """Take (q, b, ...) of `x`, which is (b, r, ...) if it differs between locations and otherwise (b, ...)."""
        taken = (
            x[:, locations].transpose(0, 1) if per_location else x.expand(locations.stop - locations.start, *x.shape)
        )
        return self.permute(taken, self.inverse_permutations, locations)

    def permute(self, x: Tensor, permutations: Tensor | None, locations: slice) -> Tensor:
        """Permute the examples of some locations: `x` (q, b, ...) by `permutations` (r, b)."""
        return x if permutations is None else x[self.rows[: len(x)], permutations[locations]]


def _smallest_positive(x: Tensor) -> float:
    """Return the smallest positive number of `x`; infinity if there is none."""
    smallest = float(x.amin())
    if smallest <= 0:  # one location at a time, to save memory
        smallest = min(float(torch.where(part > 0, part, torch.inf).amin()) for part in (x if x.ndim == 3 else x[None]))
    return smallest


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


def _slices(length: int, at_once: int, columns: slice | None = None) -> list[slice]:
    """Cut a range into slices; none crosses an end of `columns`."""
    ends = [0, length] if columns is None else sorted({0, columns.start, columns.stop, length})
    return [
        slice(start, min(start + at_once, end)) for first, end in pairwise(ends) for start in range(first, end, at_once)
    ]
