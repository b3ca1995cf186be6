"""TransMix: CutMix with labels weighted by the attention to the pasted patches."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import Criterion
from ..locations import LocationError, LocationOutput
from .base import MixingLoss, Requirements
from .cutmix import Box, CutMix, area, image_of
from .pairs import targets_of
from .settings import setting


@dataclass
class TransMix(CutMix):
    """TransMix: CutMix with the pasted label weighted by the CLS token's attention to the pasted region.

    The weight is a mean of two shares of the rectangle: that of the pixels, and that of the CLS token's attention in
    the last block (averaged over heads, before dropout, detached), read in the forward of the mixed image. It supports
    images, and models whose head reads a single token (ViT, DeiT).

    Args:
        alpha: Parameter of the symmetric Beta distribution of the share that an image keeps before clipping.
        attention_share: Weight of the attention's share in the mean, in [0, 1]: 0.5 as in the authors' code, 1 for the
            attention only as in the paper's formula; 0 is CutMix.

    Raises:
        ValueError: A setting does not lie in its range; or, at the first mini-batch, the inputs are not only images.
        LocationError: (at the first mini-batch) the model's head reads no single token, its attention cannot be read,
            or the locations are no grid of patches.

    Source:
        Chen et al., "TransMix: Attend to Mix for Vision Transformers", CVPR 2022, and
        https://github.com/Beckschen/TransMix (`transmix.py`). There, the partner is the mini-batch reversed, and one
        mini-batch in five gets Mixup; here the partner is a random permutation, and every mini-batch is cut.

    Example:
        >>> TransMix(attention_share=1.0).to_dict()
        {'method': 'transmix', 'alpha': 1.0, 'attention_share': 1.0}
    """

    name: ClassVar[str] = "transmix"

    attention_share: float = setting(
        0.5, "Weight of the attention in the weight of the label; the rest is the area's.", within="[0, 1]"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pasted: tuple[Tensor, Box, tuple[int, int]] | None = None

    @property
    def requirements(self) -> Requirements:
        return Requirements(attention="cls")

    def check_inputs(self, inputs: Mapping[str, Any], model: nn.Module) -> None:
        image_of(inputs, type(self).__name__)

    def for_batch(self, inputs: Mapping[str, Any], labels: Tensor, **context: Any) -> TransMix:
        """Return a copy, which keeps what was pasted into this mini-batch until its loss."""
        return copy.copy(self)

    def mix_inputs(
        self, inputs: dict[str, Any], labels: Tensor, model: nn.Module, criterion: Criterion = "cross_entropy"
    ) -> tuple[dict[str, Any], Tensor]:
        """Paste the rectangle. `loss` mixes the labels, once the attention is known."""
        pasted = self.paste(inputs, model)
        height, width = inputs[image_of(inputs, type(self).__name__)].shape[-2:]
        box = (*pasted.spans.get(-2, (0, height)), *pasted.spans.get(-1, (0, width)))
        self.pasted = pasted.partner, box, (height, width)
        return pasted.inputs, targets_of(labels, model, criterion)

    def loss(
        self,
        output: LocationOutput,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        criterion: Criterion = "cross_entropy",
    ) -> MixingLoss:
        """Return the loss against the labels mixed by area and attention."""
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
    """Return 1 for each patch (r,) whose first pixel lies in a rectangle of an image, else 0, row by row."""
    top, bottom, left, right = box
    pixels = torch.zeros(1, 1, *size)
    pixels[..., top:bottom, left:right] = 1
    return F.interpolate(pixels, grid_of(size, num_patches), mode="nearest").flatten().to(device)


def grid_of(size: tuple[int, int], num_patches: int) -> tuple[int, int]:
    """Return rows and columns of a number of square patches in an image (height, width). Last pixels may be left over.

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
        f"The model's {num_patches} locations are no grid of square patches of images of {height} x {width} pixels, so "
        "that their places in the image are unknown: use CutMix."
    )
