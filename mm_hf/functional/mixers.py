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
    sums_labels: bool  # whether class labels are better added up than mixed as numbers, however few the classes

    def blocks(self, num_locations: int, num_classes: int) -> tuple[int, int]:
        """How many locations, and how many mixed examples, to take at a time."""

    def lay_out(self, x: Tensor) -> Tensor:
        """Numbers of the examples (q, b, v), ready to be mixed."""

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `lay_out`."""

    def mix(self, x: Tensor, here: slice, part: slice) -> Tensor:
        """What is laid out, mixed: (o, v, i)."""

    def unmix(self, x: Tensor, here: slice, part: slice) -> Tensor:
        """The transpose of `mix`, laid out."""

    def grid(self, x: Tensor) -> Tensor:
        """(q, m) as (o, i)."""

    def ungrid(self, x: Tensor) -> Tensor:
        """(o, i) as (q, m)."""

    def labels(
        self, classes: Tensor, confidence: Tensor, scale: Tensor, c: int, smoothing: float, here: slice, part: slice
    ) -> ClassTargets:
        """Mixed labels, of classes and confidence (q, b), each mixed example's column scaled by `scale` (o, 1, i)."""


def mixer_of(factors: Tensor | SparseFactors, device: torch.device) -> Mixer:
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

    sums_labels = False

    def __init__(self, factors: Tensor):
        self.factors = factors
        self.shared = len(factors) == 1
        self.num_mixed = factors.shape[-1]

    def blocks(self, num_locations: int, num_classes: int) -> tuple[int, int]:
        widest = max(num_classes, self.factors.shape[1])
        mixed = min(self.num_mixed, max(1, CHUNK_ELEMENTS // widest))
        return min(num_locations, max(1, CHUNK_ELEMENTS // (mixed * widest))), mixed

    def lay_out(self, x: Tensor) -> Tensor:
        return x.mT.contiguous()

    def restore(self, x: Tensor) -> Tensor:
        return x.mT

    def _local(self, here: slice, part: slice) -> Tensor:
        return (self.factors if self.shared else self.factors[here])[..., part]

    def mix(self, x: Tensor, here: slice, part: slice) -> Tensor:
        q, v, b = x.shape
        if self.shared:
            return (x.view(q * v, b) @ self.factors[0, :, part]).view(q, v, -1)
        return x @ self._local(here, part)

    def unmix(self, x: Tensor, here: slice, part: slice) -> Tensor:
        q, v, m = x.shape
        if self.shared:
            return (x.reshape(q * v, m) @ self.factors[0, :, part].mT).view(q, v, -1)
        return x @ self._local(here, part).mT

    def grid(self, x: Tensor) -> Tensor:
        return x

    def ungrid(self, x: Tensor) -> Tensor:
        return x

    def labels(
        self, classes: Tensor, confidence: Tensor, scale: Tensor, c: int, smoothing: float, here: slice, part: slice
    ) -> ClassTargets:
        q, b = classes.shape
        shares = (confidence[..., None] * self._local(here, part)).mul_(scale)
        rows = classes + torch.arange(q, device=classes.device)[:, None] * c
        return ClassTargets(rows.flatten(), shares.reshape(q * b, -1), b, smoothing)


class SparseMixer:
    """A few vertices for each mixed example: their rows are added up. Mixed examples are the outer dimension."""

    sums_labels = True

    def __init__(self, factors: SparseFactors):
        self.index, self.weight, self.num_examples = factors.index, factors.weight, factors.num_examples
        self.num_mixed, self.num_vertices = self.index.shape
        self._transposed: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def blocks(self, num_locations: int, num_classes: int) -> tuple[int, int]:
        locations = min(ROW_ELEMENTS // num_classes, CHUNK_ELEMENTS // self.num_mixed)
        locations = max(16, locations - locations % 16)  # whole vectors of the inner dimension
        locations = min(num_locations, locations)
        return locations, max(
            1, min(self.num_mixed, CHUNK_ELEMENTS // (locations * max(num_classes, self.num_vertices)))
        )

    def lay_out(self, x: Tensor) -> Tensor:
        return x.permute(1, 2, 0).contiguous()

    def restore(self, x: Tensor) -> Tensor:
        return x.permute(2, 0, 1)

    def mix(self, x: Tensor, here: slice, part: slice) -> Tensor:
        b, v, q = x.shape
        weight = self.weight[part].to(x.dtype)
        mixed = F.embedding_bag(self.index[part], x.view(b, v * q), per_sample_weights=weight, mode="sum")
        return mixed.view(-1, v, q)

    def unmix(self, x: Tensor, here: slice, part: slice) -> Tensor:
        rows, offsets, weight = self._transpose(part)
        m, v, q = x.shape
        weight = weight.to(x.dtype)
        back = F.embedding_bag(rows, x.reshape(m, v * q), offsets, per_sample_weights=weight, mode="sum")
        return back.view(-1, v, q)

    def _transpose(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """For each example, of which mixed ones it is a vertex: they follow each other, from the example's offset on."""
        if part.start not in self._transposed:
            index = self.index[part].flatten()
            order = index.argsort(stable=True)
            counts = index.bincount(minlength=self.num_examples)
            rows = order.div(self.num_vertices, rounding_mode="floor")
            self._transposed[part.start] = rows, counts.cumsum(0) - counts, self.weight[part].flatten()[order]
        return self._transposed[part.start]

    def grid(self, x: Tensor) -> Tensor:
        return x.mT.contiguous()

    def ungrid(self, x: Tensor) -> Tensor:
        return x.mT

    def labels(
        self, classes: Tensor, confidence: Tensor, scale: Tensor, c: int, smoothing: float, here: slice, part: slice
    ) -> ClassTargets:
        index, (q, _) = self.index[part], classes.shape
        shares = F.embedding(index, confidence.T.contiguous()).mul_(self.weight[part, :, None]).mul_(scale)
        places = F.embedding(index, classes.T.contiguous()).mul_(q).add_(torch.arange(q))
        return ClassTargets(places.flatten(1), shares.flatten(1), self.num_vertices, smoothing)
