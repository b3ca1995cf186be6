"""Apply interpolation factors at a chunk of locations, by matrix products or by adding up the rows of a few examples.

A mixer packs numbers of the examples (q, b, v), at q locations, into its memory layout, mixes them into (o, v, i), and
applies the transpose. Each mixer chooses whether mixed examples or locations are the outer dimension o; the other one
is the inner dimension i. `pack_weights` converts numbers of each location and mixed example (q, m) to (o, i).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from . import devices
from .factors import SparseFactors

SMALL_CHUNK_ELEMENTS = 1 << 22  # computed at once on an accelerator: a query of its memory takes a millisecond
# `SparseMixer` reads one example's numbers at all locations of a chunk at once. This many stay in the cache.
ROW_ELEMENTS = 1 << 13
# Above this share of the examples in a mixed example, a matrix product is faster than adding up rows.
SPARSE_SHARE = 0.2


class Mixer(Protocol):
    """Interpolation factors in the form that the chunked loss applies them.

    Attributes:
        num_mixed: n, the number of mixed examples.
        prefers_class_indices: True if adding up the shares of each class is faster than mixing one-hot targets, for any
            number of classes.
    """

    num_mixed: int
    prefers_class_indices: bool

    def chunk_sizes(self, num_locations: int, num_classes: int) -> tuple[int, int]:
        """Return the numbers of locations and of mixed examples in a chunk."""

    def pack(self, x: Tensor) -> Tensor:
        """Convert numbers of the examples (q, b, v) to the mixer's layout."""

    def unpack(self, x: Tensor) -> Tensor:
        """Invert `pack`."""

    def mix(self, x: Tensor, locations: slice, mixed: slice) -> Tensor:
        """Mix packed numbers: (o, v, i)."""

    def mix_transpose(self, x: Tensor, locations: slice, mixed: slice) -> Tensor:
        """Apply the transpose of `mix` to (o, v, i). The result is packed."""

    def pack_weights(self, x: Tensor) -> Tensor:
        """Convert (q, m) to (o, i)."""

    def unpack_weights(self, x: Tensor) -> Tensor:
        """Convert (o, i) to (q, m)."""

    def class_shares(
        self, classes: Tensor, confidence: Tensor, scale: Tensor, num_classes: int, locations: slice, mixed: slice
    ) -> tuple[Tensor, Tensor, int]:
        """Return `index`, `shares` and `examples` of `ClassTargets`.

        Args:
            classes: (q, b), class indices.
            confidence: (q, b).
            scale: (o, 1, i), multiplies the column of each mixed example.
            num_classes: c.
            locations: The locations of the chunk.
            mixed: The mixed examples of the chunk.
        """


def make_mixer(factors: Tensor | SparseFactors, device: torch.device) -> Mixer:
    """Return the faster mixer for these factors."""
    if isinstance(factors, Tensor):
        return DenseMixer(factors if factors.ndim == 3 else factors[None])
    few = factors.index.shape[1] <= SPARSE_SHARE * factors.num_examples
    # On a GPU a matrix product costs little, and adding up rows by index is not deterministic.
    if few and not devices.is_accelerator(device):
        return SparseMixer(factors)
    return DenseMixer(factors.dense()[None])


class DenseMixer:
    """Matrix products with factors (r, b, n), or (1, b, n) for all locations. Locations are the outer dimension."""

    prefers_class_indices = False

    def __init__(self, factors: Tensor):
        self.factors = factors
        self.shared = len(factors) == 1
        self.num_mixed = factors.shape[-1]

    def chunk_sizes(self, num_locations: int, num_classes: int) -> tuple[int, int]:
        widest = max(num_classes, self.factors.shape[1])
        if num_locations * self.num_mixed * widest <= SMALL_CHUNK_ELEMENTS and devices.is_accelerator(
            self.factors.device
        ):
            return num_locations, self.num_mixed
        elements = devices.chunk_elements(self.factors.device)
        mixed = min(self.num_mixed, max(1, elements // widest))
        return min(num_locations, max(1, elements // (mixed * widest))), mixed

    def pack(self, x: Tensor) -> Tensor:
        return x.mT.contiguous()

    def unpack(self, x: Tensor) -> Tensor:
        return x.mT

    def mix(self, x: Tensor, locations: slice, mixed: slice) -> Tensor:
        q, v, b = x.shape
        if self.shared:
            return (x.view(q * v, b) @ self.factors[0, :, mixed]).view(q, v, -1)
        return x @ self.factors_at(locations, mixed)

    def mix_transpose(self, x: Tensor, locations: slice, mixed: slice) -> Tensor:
        q, v, m = x.shape
        if self.shared:
            return (x.reshape(q * v, m) @ self.factors[0, :, mixed].mT).view(q, v, -1)
        return x @ self.factors_at(locations, mixed).mT

    def pack_weights(self, x: Tensor) -> Tensor:
        return x

    def unpack_weights(self, x: Tensor) -> Tensor:
        return x

    def class_shares(
        self, classes: Tensor, confidence: Tensor, scale: Tensor, num_classes: int, locations: slice, mixed: slice
    ) -> tuple[Tensor, Tensor, int]:
        q, b = classes.shape
        shares = (confidence[..., None] * self.factors_at(locations, mixed)).mul_(scale)
        rows = classes + torch.arange(q, device=classes.device)[:, None] * num_classes
        return rows.flatten(), shares.reshape(q * b, -1), b

    def factors_at(self, locations: slice, mixed: slice) -> Tensor:
        """Return the factors (q, b, m), or (1, b, m) for all locations."""
        return (self.factors if self.shared else self.factors[locations])[..., mixed]


class SparseMixer:
    """Sums of the rows of the few examples in each mixed example. Mixed examples are the outer dimension."""

    prefers_class_indices = True

    def __init__(self, factors: SparseFactors):
        self.index, self.weight, self.num_examples = factors.index, factors.weight, factors.num_examples
        self.num_mixed, self.examples_per_mix = self.index.shape
        self._transposed: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def chunk_sizes(self, num_locations: int, num_classes: int) -> tuple[int, int]:
        elements = devices.chunk_elements(self.index.device)
        locations = min(ROW_ELEMENTS // num_classes, elements // self.num_mixed)
        locations = max(16, locations - locations % 16)  # complete vectors of the inner dimension
        locations = min(num_locations, locations)
        mixed = elements // (locations * max(num_classes, self.examples_per_mix))
        return locations, max(1, min(self.num_mixed, mixed))

    def pack(self, x: Tensor) -> Tensor:
        return x.permute(1, 2, 0).contiguous()

    def unpack(self, x: Tensor) -> Tensor:
        return x.permute(2, 0, 1)

    def mix(self, x: Tensor, locations: slice, mixed: slice) -> Tensor:
        b, v, q = x.shape
        weight = self.weight[mixed].to(x.dtype)
        rows = F.embedding_bag(self.index[mixed], x.view(b, v * q), per_sample_weights=weight, mode="sum")
        return rows.view(-1, v, q)

    def mix_transpose(self, x: Tensor, locations: slice, mixed: slice) -> Tensor:
        index, offsets, weight = self._transpose(mixed)
        m, v, q = x.shape
        rows = F.embedding_bag(index, x.reshape(m, v * q), offsets, per_sample_weights=weight.to(x.dtype), mode="sum")
        return rows.view(-1, v, q)

    def pack_weights(self, x: Tensor) -> Tensor:
        return x.mT.contiguous()

    def unpack_weights(self, x: Tensor) -> Tensor:
        return x.mT

    def class_shares(
        self, classes: Tensor, confidence: Tensor, scale: Tensor, num_classes: int, locations: slice, mixed: slice
    ) -> tuple[Tensor, Tensor, int]:
        index, (q, _) = self.index[mixed], classes.shape
        shares = F.embedding(index, confidence.T.contiguous()).mul_(self.weight[mixed, :, None]).mul_(scale)
        positions = F.embedding(index, classes.T.contiguous()).mul_(q).add_(torch.arange(q))
        return positions.flatten(1), shares.flatten(1), self.examples_per_mix

    def _transpose(self, mixed: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mixed examples that contain each example, the offset of each example's first, and the weights."""
        if mixed.start not in self._transposed:
            index = self.index[mixed].flatten()
            order = index.argsort(stable=True)
            counts = index.bincount(minlength=self.num_examples)
            rows = order.div(self.examples_per_mix, rounding_mode="floor")
            offsets = counts.cumsum(0) - counts
            self._transposed[mixed.start] = rows, offsets, self.weight[mixed].flatten()[order]
        return self._transposed[mixed.start]
