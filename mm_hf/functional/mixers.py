"""How factors are applied to a block of locations and a part of the mixed examples: by products, or vertex by vertex.

A mixer lays out numbers of the examples (q, b, v), at q locations, so that it can mix them fast, mixes them into (o, v, i),
and does the transpose of it. Which of mixed examples and locations is the outer dimension o and which the inner one i is
the mixer's own affair; `grid` brings numbers (q, m), of each location and mixed example, into that order.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .criteria import ClassTargets
from .factors import SparseFactors

# Mixed numbers that are alive at a time: small enough for a CPU's cache and a GPU's spare memory, large enough that a
# pass over them costs more than starting it.
CHUNK_ELEMENTS = 1 << 20
# A row of an example's numbers at all locations of a block is read as a whole: so many rows should stay in the cache.
ROW_ELEMENTS = 1 << 13
# Vertex by vertex, unless the vertices are more than this share of the examples: then the product costs less.
SPARSE_SHARE = 0.2


class Mixer(Protocol):
    """What the walk over locations and mixed examples needs to be told about factors."""

    num_mixed: int
    prefers_class_indices: (
        bool  # whether class labels are better added up than mixed as numbers, however few the classes
    )

    def chunk_sizes(self, num_locations: int, num_classes: int) -> tuple[int, int]:
        """How many locations, and how many mixed examples, to take at a time."""

    def pack(self, x: Tensor) -> Tensor:
        """Numbers of the examples (q, b, v), ready to be mixed."""

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of `pack`."""

    def mix(self, x: Tensor, locations: slice, mixed_slice: slice) -> Tensor:
        """What is laid out, mixed: (o, v, i)."""

    def mix_transpose(self, x: Tensor, locations: slice, mixed_slice: slice) -> Tensor:
        """The transpose of `mix`, laid out."""

    def pack_weights(self, x: Tensor) -> Tensor:
        """(q, m) as (o, i)."""

    def unpack_weights(self, x: Tensor) -> Tensor:
        """(o, i) as (q, m)."""

    def labels(
        self,
        classes: Tensor,
        confidence: Tensor,
        scale: Tensor,
        c: int,
        smoothing: float,
        locations: slice,
        mixed_slice: slice,
    ) -> ClassTargets:
        """Mixed labels, of classes and confidence (q, b), each mixed example's column scaled by `scale` (o, 1, i)."""


def make_mixer(factors: Tensor | SparseFactors, device: torch.device) -> Mixer:
    """The faster way to apply these factors."""
    if isinstance(factors, Tensor):
        return DenseMixer(factors if factors.ndim == 3 else factors[None])
    few = factors.index.shape[1] <= SPARSE_SHARE * factors.num_examples
    # On a GPU a product costs next to nothing, and adding up rows by index gives other last digits in every run.
    if device.type == "cpu" and few:
        return SparseMixer(factors)
    return DenseMixer(factors.dense()[None])


class DenseMixer:
    """Factors (r, b, n) or, shared by all locations, (1, b, n): matrix products. Locations are the outer dimension."""

    prefers_class_indices = False

    def __init__(self, factors: Tensor):
        self.factors = factors
        self.shared = len(factors) == 1
        self.num_mixed = factors.shape[-1]

    def chunk_sizes(self, num_locations: int, num_classes: int) -> tuple[int, int]:
        widest = max(num_classes, self.factors.shape[1])
        mixed = min(self.num_mixed, max(1, CHUNK_ELEMENTS // widest))
        return min(num_locations, max(1, CHUNK_ELEMENTS // (mixed * widest))), mixed

    def pack(self, x: Tensor) -> Tensor:
        return x.mT.contiguous()

    def unpack(self, x: Tensor) -> Tensor:
        return x.mT

    def _local(self, locations: slice, mixed_slice: slice) -> Tensor:
        return (self.factors if self.shared else self.factors[locations])[..., mixed_slice]

    def mix(self, x: Tensor, locations: slice, mixed_slice: slice) -> Tensor:
        q, v, b = x.shape
        if self.shared:
            return (x.view(q * v, b) @ self.factors[0, :, mixed_slice]).view(q, v, -1)
        return x @ self._local(locations, mixed_slice)

    def mix_transpose(self, x: Tensor, locations: slice, mixed_slice: slice) -> Tensor:
        q, v, m = x.shape
        if self.shared:
            return (x.reshape(q * v, m) @ self.factors[0, :, mixed_slice].mT).view(q, v, -1)
        return x @ self._local(locations, mixed_slice).mT

    def pack_weights(self, x: Tensor) -> Tensor:
        return x

    def unpack_weights(self, x: Tensor) -> Tensor:
        return x

    def labels(
        self,
        classes: Tensor,
        confidence: Tensor,
        scale: Tensor,
        c: int,
        smoothing: float,
        locations: slice,
        mixed_slice: slice,
    ) -> ClassTargets:
        q, b = classes.shape
        shares = (confidence[..., None] * self._local(locations, mixed_slice)).mul_(scale)
        rows = classes + torch.arange(q, device=classes.device)[:, None] * c
        return ClassTargets(rows.flatten(), shares.reshape(q * b, -1), b, smoothing)


class SparseMixer:
    """A few vertices for each mixed example: their rows are added up. Mixed examples are the outer dimension."""

    prefers_class_indices = True

    def __init__(self, factors: SparseFactors):
        self.index, self.weight, self.num_examples = factors.index, factors.weight, factors.num_examples
        self.num_mixed, self.num_vertices = self.index.shape
        self._transposed: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def chunk_sizes(self, num_locations: int, num_classes: int) -> tuple[int, int]:
        locations = min(ROW_ELEMENTS // num_classes, CHUNK_ELEMENTS // self.num_mixed)
        locations = max(16, locations - locations % 16)  # whole vectors of the inner dimension
        locations = min(num_locations, locations)
        return locations, max(
            1, min(self.num_mixed, CHUNK_ELEMENTS // (locations * max(num_classes, self.num_vertices)))
        )

    def pack(self, x: Tensor) -> Tensor:
        return x.permute(1, 2, 0).contiguous()

    def unpack(self, x: Tensor) -> Tensor:
        return x.permute(2, 0, 1)

    def mix(self, x: Tensor, locations: slice, mixed_slice: slice) -> Tensor:
        b, v, q = x.shape
        weight = self.weight[mixed_slice].to(x.dtype)
        mixed = F.embedding_bag(self.index[mixed_slice], x.view(b, v * q), per_sample_weights=weight, mode="sum")
        return mixed.view(-1, v, q)

    def mix_transpose(self, x: Tensor, locations: slice, mixed_slice: slice) -> Tensor:
        rows, offsets, weight = self._transpose(mixed_slice)
        m, v, q = x.shape
        weight = weight.to(x.dtype)
        inverse_permutation = F.embedding_bag(rows, x.reshape(m, v * q), offsets, per_sample_weights=weight, mode="sum")
        return inverse_permutation.view(-1, v, q)

    def _transpose(self, mixed_slice: slice) -> tuple[Tensor, Tensor, Tensor]:
        """For each example, of which mixed ones it is a vertex: they follow each other, from the example's offset on."""
        if mixed_slice.start not in self._transposed:
            index = self.index[mixed_slice].flatten()
            order = index.argsort(stable=True)
            counts = index.bincount(minlength=self.num_examples)
            rows = order.div(self.num_vertices, rounding_mode="floor")
            self._transposed[mixed_slice.start] = (
                rows,
                counts.cumsum(0) - counts,
                self.weight[mixed_slice].flatten()[order],
            )
        return self._transposed[mixed_slice.start]

    def pack_weights(self, x: Tensor) -> Tensor:
        return x.mT.contiguous()

    def unpack_weights(self, x: Tensor) -> Tensor:
        return x.mT

    def labels(
        self,
        classes: Tensor,
        confidence: Tensor,
        scale: Tensor,
        c: int,
        smoothing: float,
        locations: slice,
        mixed_slice: slice,
    ) -> ClassTargets:
        index, (q, _) = self.index[mixed_slice], classes.shape
        shares = F.embedding(index, confidence.T.contiguous()).mul_(self.weight[mixed_slice, :, None]).mul_(scale)
        places = F.embedding(index, classes.T.contiguous()).mul_(q).add_(torch.arange(q))
        return ClassTargets(places.flatten(1), shares.flatten(1), self.num_vertices, smoothing)
