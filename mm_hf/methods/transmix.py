"""TransMix: CutMix whose labels are weighted by the attention that the pasted patches get."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import Criterion
from ..locations import LocationError, LocationOutput
from .base import MixingLoss, Requirements
from .cutmix import Box, CutMix, area, image_of
from .pairs import targets_of


@dataclass
class TransMix(CutMix):
    """CutMix, with the pasted label weighted by how much the CLS token looks at what was pasted.

    The weight is a mean of the rectangle's share of the pixels and of its share of the CLS token's attention in the last
    block (heads averaged, dropout left out, a constant), read in the mixed image's own forward. For images, and models
    whose head reads a single token (ViT, DeiT, ...).

    Args:
        alpha: Parameter of the symmetric Beta distribution of the share that is kept (before clipping).
        attention_share: Weight in that mean of what the attention says, in [0, 1]: 0.5 as in the authors' code, 1 for
            the attention alone as in the paper's formula; 0 is CutMix.

    Raises:
        ValueError: A setting makes no sense; or, at the first mini-batch, the inputs are not images alone.
        LocationError: (at the first mini-batch) the model's head reads no single token, its attention cannot be read, or
            its locations are no grid of patches.

    Source:
        Chen et al., "TransMix: Attend to Mix for Vision Transformers", CVPR 2022, and
        https://github.com/Beckschen/TransMix (`transmix.py`). There, the partner is the mini-batch reversed, and one
        mini-batch in five gets Mixup; here it is a random permutation, always cut.

    Example:
        >>> TransMix(attention_share=1.0).to_dict()
        {'method': 'transmix', 'alpha': 1.0, 'attention_share': 1.0}
    """

    name: ClassVar[str] = "transmix"

    attention_share: float = field(
        default=0.5, metadata={"help": "Share of the label's weight that attention tells; the area tells the rest."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.attention_share <= 1:
            raise ValueError(f"attention_share must lie in [0, 1], but is {self.attention_share}.")
        self.pasted: tuple[Tensor, Box, tuple[int, int]] | None = None

    @property
    def requirements(self) -> Requirements:
        return Requirements(attention="cls")

    def check_inputs(self, inputs: Mapping[str, Any], model: nn.Module) -> None:
        image_of(inputs, type(self).__name__, (4,))

    def for_batch(self, inputs: Mapping[str, Any], labels: Tensor, **context: Any) -> TransMix:
        """Return a copy, which keeps what was pasted into this mini-batch until its loss."""
        return copy.copy(self)

    def mix_inputs(
        self, inputs: dict[str, Any], labels: Tensor, model: nn.Module, criterion: Criterion = "cross_entropy"
    ) -> tuple[dict[str, Any], Tensor]:
        """Paste the rectangle; the labels are mixed once the attention is known."""
        inputs, partner, box = self.paste(inputs)
        height, width = inputs[image_of(inputs, type(self).__name__, (4,))].shape[-2:]
        self.pasted = partner, box, (height, width)
        return inputs, targets_of(labels, model, criterion)

    def loss(
        self,
        output: LocationOutput,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        criterion: Criterion = "cross_entropy",
    ) -> MixingLoss:
        """The loss against labels mixed by area and attention."""
        assert self.pasted is not None and output.attention is not None
        partner, box, size = self.pasted
        by_area = area(box) / (size[0] * size[1])
        attention = output.attention
        by_attention = (attention * patches_of(box, size, attention.shape[1], attention.device)).sum(dim=1)
        weight = (1 - self.attention_share) * by_area + self.attention_share * by_attention
        mixed = labels.lerp(labels[partner], weight[:, None].to(labels.dtype))
        result = super().loss(output, mixed, label_smoothing=label_smoothing, criterion=criterion)
        result.logs["pasted_area"] = by_area
        result.logs["pasted_attention"] = by_attention.detach().mean()
        return result


def patches_of(box: Box, size: tuple[int, int], num_patches: int, device: torch.device | None = None) -> Tensor:
    """Which patches (r,) of an image of some size lie in a rectangle, row by row: those with their first pixel in it."""
    top, bottom, left, right = box
    pixels = torch.zeros(1, 1, *size)
    pixels[..., top:bottom, left:right] = 1
    return F.interpolate(pixels, grid_of(size, num_patches), mode="nearest").flatten().to(device)


def grid_of(size: tuple[int, int], num_patches: int) -> tuple[int, int]:
    """Rows and columns of that many square patches in an image (height, width), whose last pixels may be left over.

    Example:
        >>> grid_of((224, 224), 196), grid_of((32, 48), 24), grid_of((35, 49), 24)
        ((14, 14), (4, 6), (4, 6))
    """
    height, width = size
    for rows in range(1, num_patches + 1):
        columns = num_patches // rows
        # The patch's side p has rows = floor(height / p) and columns = floor(width / p).
        smallest, largest = max(height / (rows + 1), width / (columns + 1)), min(height / rows, width / columns)
        if rows * columns == num_patches and smallest < largest:
            return rows, columns
    raise LocationError(
        f"The model's {num_patches} locations are no grid of square patches of images of {height} x {width} pixels, so that "
        "their places in the image are unknown: use CutMix."
    )
