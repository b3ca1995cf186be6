"""Inputs of the loss at all locations, and the tensors of a chunk of locations."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from . import devices
from .criteria import Criterion, mask_infinite, masked_logit
from .factors import SparseFactors
from .kernels import Kernel
from .mixers import Mixer, make_mixer
from .targets import one_hot

# Up to this many classes, a matrix product with one-hot targets is faster than adding up the shares of each class.
FEW_CLASSES = 64
# In float64 the largest confidence of a location is 2^512: products with the smallest factors do not underflow, and
# products with the largest logits do not overflow.
CONFIDENCE_SCALE = 2.0**512


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


@dataclass(frozen=True)
class Chunk:
    """Tensors of the examples at q locations, in the order of the factors' rows.

    Attributes:
        inputs: The inputs that the chunk is taken from.
        locations: The locations.
        logits: (q, b, c).
        confidence: (q, b), in float64 multiplied by `CONFIDENCE_SCALE`.
        classes: (q, b), class indices whose shares are added up; or None.
        targets: (q or 1, b, c), for other labels; or None.
        mass: (q, n), the mass of each mixed example; 0 if it is too small to divide by.
        packed_logits: Confidence times logits in the mixer's layout.
        packed_targets: Confidence times targets in the mixer's layout; or None.
    """

    inputs: Inputs
    locations: slice
    logits: Tensor
    confidence: Tensor
    classes: Tensor | None
    targets: Tensor | None
    mass: Tensor
    packed_logits: Tensor
    packed_targets: Tensor | None


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


def smallest_mass(dtype: torch.dtype) -> float:
    """Return the smallest mass whose largest products with factors have all their digits."""
    return torch.finfo(dtype).tiny * 2**26


def _smallest_positive(x: Tensor) -> float:
    """Return the smallest positive number of `x`; infinity if there is none."""
    smallest = float(x.amin())
    if smallest <= 0:  # one location at a time, to save memory
        smallest = min(float(torch.where(part > 0, part, torch.inf).amin()) for part in (x if x.ndim == 3 else x[None]))
    return smallest


def _slices(length: int, at_once: int, columns: slice | None = None) -> list[slice]:
    """Cut a range into slices; none crosses an end of `columns`."""
    ends = [0, length] if columns is None else sorted({0, columns.start, columns.stop, length})
    return [
        slice(start, min(start + at_once, end)) for first, end in pairwise(ends) for start in range(first, end, at_once)
    ]
