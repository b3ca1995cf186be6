"""CutMix: a rectangle of another image pasted into each image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..distributed import rank_generator
from ..functional import Criterion
from .pairs import PairMixing, check_beta, draw_factor, draw_partners, targets_of


@dataclass
class CutMix(PairMixing):
    """A random rectangle of every image is replaced by that of another one, and the labels are mixed by the area.

    For images (b, channels, height, width) and videos (b, frames, channels, height, width), whose frames are cut alike.
    One rectangle is drawn for each mini-batch, its centre anywhere, so that the border may clip it; an image's own label
    keeps the exact share of pixels that are left of it.

    Args:
        alpha: Parameter of the symmetric Beta distribution of the share that is kept (before clipping).

    Raises:
        ValueError: `alpha` is not positive; or, at the first mini-batch, the inputs are not images alone.

    Source:
        Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019.

    Example:
        >>> CutMix().to_dict()
        {'method': 'cutmix', 'alpha': 1.0}
    """

    name: ClassVar[str] = "cutmix"

    alpha: float = field(
        default=1.0, metadata={"help": "Parameter of the Beta distribution of the share that is kept."}
    )

    def __post_init__(self) -> None:
        check_beta(self.alpha)

    def check_inputs(self, inputs: Mapping[str, Any], model: nn.Module) -> None:
        image_of(inputs, type(self).__name__)

    def mix_inputs(
        self, inputs: dict[str, Any], labels: Tensor, model: nn.Module, criterion: Criterion = "cross_entropy"
    ) -> tuple[dict[str, Any], Tensor]:
        """Paste the rectangle, and mix the labels by the area."""
        pasted, partner, box = self.paste(inputs)
        height, width = pasted[image_of(pasted, type(self).__name__)].shape[-2:]
        targets = targets_of(labels, model, criterion)
        return pasted, targets.lerp(targets[partner], area(box) / (height * width))

    def paste(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor, Box]:
        """Inputs with the rectangle pasted, whose it is (b,), and where."""
        name = image_of(inputs, type(self).__name__)
        images: Tensor = inputs[name]
        generator = rank_generator("cpu")
        box = draw_box(images.shape[-2], images.shape[-1], draw_factor(self.alpha, generator), generator)
        partner = draw_partners(len(images), generator, images.device)
        top, bottom, left, right = box
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = images[..., top:bottom, left:right][partner]
        return {**inputs, name: mixed}, partner, box


Box = tuple[int, int, int, int]


def draw_box(height: int, width: int, kept: float, generator: torch.Generator) -> Box:
    """A rectangle (top, bottom, left, right) of the image's proportions and 1 - `kept` of its area, then clipped.

    Example:
        >>> import torch
        >>> top, bottom, left, right = draw_box(32, 48, 0.75, torch.Generator().manual_seed(0))
        >>> bottom - top <= 16 and right - left <= 24
        True
    """
    sides = []
    for size in (height, width):
        half = int(size * (1 - kept) ** 0.5) // 2
        centre = int(torch.randint(size, (), generator=generator))
        sides += [max(centre - half, 0), min(centre + half, size)]
    return sides[0], sides[1], sides[2], sides[3]


def area(box: Box) -> int:
    """Pixels of a rectangle."""
    top, bottom, left, right = box
    return (bottom - top) * (right - left)


def image_of(inputs: Mapping[str, Any], method: str, dimensions: tuple[int, ...] = (4, 5)) -> str:
    """The name of the one input that is images or videos; a ValueError if there are other tensors or none."""
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    images = [k for k, v in tensors.items() if v.is_floating_point() and v.ndim in dimensions]
    if len(images) == len(tensors) == 1:
        return images[0]
    kinds = {4: "images (batch, channels, height, width)", 5: "videos (batch, frames, channels, height, width)"}
    has = ", ".join(f"{k} {tuple(v.shape)}" for k, v in tensors.items()) or "no tensor"
    raise ValueError(
        f"{method} cuts and pastes {' or '.join(kinds[n] for n in dimensions)} and nothing else, and this batch has {has}: "
        "use Mixup, ManifoldMixup, MultiMix or DenseMultiMix."
    )
