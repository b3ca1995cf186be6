"""The map from pixels in [0, 1] to the pixel values that a model takes, and its inverse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Rounding to bfloat16 moves values out of the range of pixels by less than this.
TOLERANCE = 0.01
DIRECTLY = "construct Normalization(image_mean, image_std, rescale_factor) directly."


@dataclass(frozen=True)
class Normalization:
    """The map `pixel_values = (255 * rescale_factor * pixels - image_mean) / image_std` for pixels in [0, 1].

    The names are those of image processors. The default is the identity, for a model that takes pixels in [0, 1].

    Args:
        image_mean: One number, or one per channel.
        image_std: One positive number, or one per channel.
        rescale_factor: Factor of the processor for 8-bit pixels; 1 for a processor that does not rescale.

    Raises:
        ValueError: `image_std` or `rescale_factor` is not positive.

    Example:
        >>> import torch
        >>> normalization = Normalization(image_mean=[0.5], image_std=[0.5])
        >>> normalization.to_values(torch.tensor([[[[0.0, 1.0]]]]))
        tensor([[[[-1.,  1.]]]])
    """

    image_mean: float | Sequence[float] = 0.0
    image_std: float | Sequence[float] = 1.0
    rescale_factor: float = 1 / 255

    def __post_init__(self) -> None:
        if not (np.all(np.asarray(self.image_std) > 0) and self.rescale_factor > 0):
            raise ValueError(
                "image_std and rescale_factor must be positive, got "
                f"image_std={self.image_std} and rescale_factor={self.rescale_factor}."
            )

    @classmethod
    def of(cls, processor: Any) -> Normalization:
        """Return the normalization of an image processor, measured on a black, a gray and a white image.

        The measurement does not depend on the options of the processor.

        Raises:
            ValueError: The processor does not map pixels linearly in each channel, pads images, or returns no images.

        Example:
            >>> from transformers import ViTImageProcessorPil
            >>> Normalization.of(ViTImageProcessorPil(image_mean=[0.25] * 3, image_std=[0.5] * 3)).image_mean
            (0.25, 0.25, 0.25)
        """
        from PIL import Image

        mean = getattr(processor, "image_mean", None)
        mode = "L" if isinstance(mean, (list, tuple)) and len(mean) == 1 else "RGB"
        shades = [Image.new(mode, (64, 64), shade if mode == "L" else (shade,) * 3) for shade in (0, 51, 255)]
        values = np.asarray(processor(shades, return_tensors="pt")["pixel_values"], dtype=np.float64)
        if values.ndim < 4:
            raise ValueError(f"{type(processor).__name__} returns no images but patches or colors: {DIRECTLY}")
        channels = np.moveaxis(values, -3, 1).reshape(3, values.shape[-3], -1)
        black, gray, white = channels.mean(axis=-1)
        line = black + (white - black) * 51 / 255
        if np.ptp(channels, axis=-1).max() > 1e-4 or np.abs(gray - line).max() > 1e-4 or not (white > black).all():
            raise ValueError(
                f"{type(processor).__name__} does not map pixels linearly in each channel, or pads images: {DIRECTLY}"
            )
        std = 1 / (white - black)
        mean, std = (tuple(float(f"{x:.6g}") for x in numbers) for numbers in (-black * std, std))  # of float32
        return cls(mean, std)

    def to_pixels(self, pixel_values: Tensor) -> Tensor:
        """Return the pixels in [0, 1], float32, of pixel values (..., channels, height, width).

        Raises:
            ValueError: The pixels are not in [0, 1], so the values have another normalization.
        """
        mean, std = self._channels(pixel_values)
        pixels = (pixel_values.float() * std + mean) / (255 * self.rescale_factor)
        low, high = (float(x) for x in pixels.aminmax()) if pixels.numel() else (0.0, 1.0)
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
            raise ValueError(
                f"pixel_values correspond to pixels from {low:.3g} to {high:.3g} under {self}, but pixels lie in "
                "[0, 1]: use the normalization of their processor, Normalization.of(processor)."
            )
        return pixels.clamp(0, 1)

    def to_values(self, pixels: Tensor) -> Tensor:
        """Return the pixel values that a model takes, from pixels in [0, 1] (..., channels, height, width)."""
        mean, std = self._channels(pixels)
        return (255 * self.rescale_factor * pixels - mean) / std

    def _channels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.ndim < 4 or not images.is_floating_point():
            raise ValueError(
                "Images must be a floating point tensor of shape (images, channels, height, width), got "
                f"{tuple(images.shape)} of {images.dtype}."
            )
        constants = []
        for name, value in (("image_mean", self.image_mean), ("image_std", self.image_std)):
            number = torch.as_tensor(value, dtype=torch.float32, device=images.device).reshape(-1, 1, 1)
            if len(number) not in (1, images.shape[-3]):
                raise ValueError(f"{name} has {len(number)} numbers, but the images have {images.shape[-3]} channels.")
            constants.append(number)
        return constants[0], constants[1]
