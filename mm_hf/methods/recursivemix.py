"""RecursiveMix: the previous mini-batch, resized and pasted into the current one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..distributed import rank_generator
from ..functional import Criterion, clean_loss
from ..locations import LocationOutput
from .base import MixingLoss, Requirements
from .cutmix import Box, area, draw_box, image_of
from .pairs import PairMixing, targets_of
from .settings import setting
from .transmix import grid_of

MEMORY = ("images", "targets", "logits")


@dataclass
class RecursiveMix(PairMixing):
    """RecursiveMix: each image gets an image of the previous mini-batch, resized into a random box.

    The previous image is pasted as it was trained with, and so contains parts of earlier ones itself. One box is drawn
    per mini-batch: its share of the image uniformly from [0, `max_area`], its center anywhere, clipped at the border.
    Labels are mixed by the exact share of pixels. Image i gets the previous image i modulo the size of the previous
    mini-batch, so that mini-batches may differ in size. The first mini-batch is trained as it is. Checkpoints contain
    the previous mini-batch.

    The consistency term is `consistency_weight` times the box's share of the image times KL(p || q), where

    - p is the prediction for the previous image when the model was trained with it, a constant;
    - q is the prediction for the box: the mean of the logits of the locations, weighted by the area of each that lies
      in the box.

    For a head that averages the locations, q is the classifier applied to RoI-pooled features. For a head that reads a
    CLS token, q applies the classifier to patch tokens, which no other term of this method trains.

    Args:
        max_area: Largest share of an image that the box covers, before clipping (the authors' alpha).
        consistency_weight: Weight of the consistency term (the authors' omega: 0.5 on ImageNet, 0.1 on CIFAR); 0 omits
            it, and then the method needs no locations.

    Raises:
        ValueError: A setting does not lie in its range; or, at the first mini-batch, the inputs are not only images.
        LocationError: (at the first mini-batch, with the consistency term) the model does not provide logits of
            locations, or the locations are no grid of patches.

    Source:
        Yang et al., "RecursiveMix: Mixed Learning with History", NeurIPS 2022 (arXiv:2203.06844), and
        https://github.com/implus/RecursiveMix-pytorch. There, the region has a linear layer of its own by default and
        RoIAlign samples the feature map; here it shares the model's head, the authors' option `share_fc`, and locations
        are weighted by area.

    Example:
        >>> RecursiveMix(consistency_weight=0.1).to_dict()
        {'method': 'recursivemix', 'max_area': 0.5, 'consistency_weight': 0.1}
    """

    name: ClassVar[str] = "recursivemix"

    max_area: float = setting(0.5, "Largest share of an image that is pasted over.", within="[0, 1]")
    consistency_weight: float = setting(
        0.5, "Weight of the consistency of the pasted region's prediction; 0 omits the term.", within="[0, inf)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._memory: dict[str, Tensor] = {}  # shared with the copies for mini-batches
        self._images = self._targets = torch.empty(0)
        self._box: Box | None = None

    @property
    def requirements(self) -> Requirements:
        return Requirements(token_logits=self.consistency_weight > 0, min_examples=1)

    def check_inputs(self, inputs: Mapping[str, Any], model: nn.Module) -> None:
        image_of(inputs, type(self).__name__)

    def for_batch(self, inputs: Mapping[str, Any], labels: Tensor, **context: Any) -> RecursiveMix:
        """Return a copy, which keeps the images and the box of this mini-batch until its loss."""
        return copy.copy(self)

    def mix_inputs(
        self, inputs: dict[str, Any], labels: Tensor, model: nn.Module, criterion: Criterion = "cross_entropy"
    ) -> tuple[dict[str, Any], Tensor]:
        """Paste the previous images into the box, and mix the labels by area."""
        name = image_of(inputs, type(self).__name__)
        images, targets = inputs[name], targets_of(labels, model, criterion)
        if self._memory:
            generator = rank_generator("cpu")
            share = self.max_area * float(torch.rand((), generator=generator))
            self._box = draw_box(images.shape[-2], images.shape[-1], 1 - share, generator)
            images = paste(images, self._previous("images", images), self._box)
            targets = targets.lerp(self._previous("targets", targets), _share(images, self._box))
        self._images, self._targets = images.detach(), targets.detach()
        return {**inputs, name: images}, targets

    def mixes(self, num_examples: int) -> bool:
        """Return True if a previous mini-batch was pasted."""
        return self._box is not None and bool(area(self._box))

    def loss(
        self,
        output: LocationOutput,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        criterion: Criterion = "cross_entropy",
    ) -> MixingLoss:
        """Return the loss against the mixed labels plus the consistency term, and remember the mini-batch."""
        result = super().loss(output, labels, label_smoothing=label_smoothing, criterion=criterion)
        if self.consistency_weight > 0:
            assert output.token_logits is not None
            size = self._images.shape[-2:]
            grid = grid_of((size[0], size[1]), output.token_logits.shape[1])
            if self._box is not None and area(self._box):
                weights = location_weights(self._box, (size[0], size[1]), grid).to(output.logits.device)
                region = torch.einsum("r,brc->bc", weights, output.token_logits.float())
                consistency = divergence(region, self._previous("logits", output.logits), criterion)
                result.loss = result.loss + self.consistency_weight * _share(self._images, self._box) * consistency
                result.logs["loss_consistency"] = consistency.detach()
        if self._box is not None:
            result.logs["pasted_area"] = _share(self._images, self._box)
        self._memory.update(images=self._images, targets=self._targets, logits=output.logits.detach())
        return result

    def _previous(self, name: str, like: Tensor) -> Tensor:
        """Return a part of the memory for each example of the current mini-batch."""
        remembered = self._memory[name].to(like.device)
        return remembered[torch.arange(len(like), device=like.device) % len(remembered)]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the previous mini-batch: its images, targets and logits; empty before the first one."""
        return dict(self._memory)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the previous mini-batch."""
        if state and set(state) != set(MEMORY):
            raise ValueError(f"The state of RecursiveMix has {', '.join(MEMORY)}, but got {', '.join(sorted(state))}.")
        self._memory.clear()
        self._memory.update(state)


def paste(images: Tensor, previous: Tensor, box: Box) -> Tensor:
    """Return images whose box shows the complete previous images, resized by nearest neighbors."""
    top, bottom, left, right = box
    if not area(box):
        return images
    pasted = images.clone()
    pasted[..., top:bottom, left:right] = F.interpolate(previous, size=(bottom - top, right - left), mode="nearest")
    return pasted


def location_weights(box: Box, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return the share (r,) of a box that lies in each location of a grid, row by row.

    Example:
        >>> location_weights((0, 8, 4, 12), (16, 16), (2, 2))
        tensor([0.5000, 0.5000, 0.0000, 0.0000])
    """
    top, bottom, left, right = box
    pixels = torch.zeros(1, 1, *size)
    pixels[..., top:bottom, left:right] = 1
    covered = F.adaptive_avg_pool2d(pixels, grid).flatten()
    return covered / covered.sum()


def divergence(logits: Tensor, previous: Tensor, criterion: Criterion) -> Tensor:
    """Return KL(previous || current) of the predictions, a mean over the examples; the squared error for "mse"."""
    previous = previous.float()
    if criterion == "mse":
        return clean_loss(logits, previous, criterion=criterion)
    predictions = previous.softmax(dim=-1) if criterion == "cross_entropy" else previous.sigmoid()
    # The loss against the previous predictions as targets, minus its least value, their entropy.
    return clean_loss(logits, predictions, criterion=criterion) - clean_loss(previous, predictions, criterion=criterion)


def _share(images: Tensor, box: Box) -> float:
    return area(box) / (images.shape[-2] * images.shape[-1])
