"""Accuracy of image models on corrupted images: eight corruptions in five severities, with kornia.

The corruptions follow ImageNet-C, but code and strengths are our own, so accuracies are not comparable with published
ones. Severity k from 1 to 5 is the k-th number of each table below; severity 0 is the original image. Widths in pixels
refer to images whose shorter side has 224 pixels and scale with the square root of that side, a compromise between a
constant number of pixels and a constant share of the image.

Random numbers depend only on the seed and the index of an image in the data, not on the batch size or the device.
Global generators are not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...locations.modes import evaluation_mode
from .batches import image_batch, model_logits
from .normalization import TOLERANCE, Normalization

NOISE_DEVIATION = (0.08, 0.12, 0.18, 0.26, 0.38)  # of pixels in [0, 1]
PHOTONS = (60, 25, 12, 5, 3)  # mean count of a white pixel
BLUR_DEVIATION = (1.0, 2.0, 3.0, 4.0, 6.0)  # pixels at a side of 224
MOTION_LENGTH = (11, 17, 23, 31, 41)  # pixels at a side of 224, odd, at least 3, 5, 7, 9, 11
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # remaining share of the distance to the image's mean gray
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)  # added to pixels in [0, 1]
SQUARE = (2, 3, 4, 5, 6)  # side of a square of pixels that are averaged, at any image size
JPEG_QUALITY = (25, 18, 15, 10, 7)
SIDE = 224
SEVERITIES = (1, 2, 3, 4, 5)
Random = list[np.random.Generator]


def corrupt(images: Tensor, name: str, severity: int, *, seed: int = 0, start: int = 0) -> Tensor:
    """Apply a corruption to images.

    Args:
        images: (b, channels, h, w), floating point, in [0, 1], before normalization.
        name: One of `CORRUPTIONS`.
        severity: 1 to 5; 0 returns the images unchanged.
        seed: Seed of random corruptions.
        start: Index of the first image in the data, so that batches give the same result as all images at once.

    Returns:
        Images in [0, 1] of the same shape, dtype and device.

    Raises:
        ValueError: The corruption or severity is unknown, or images have another shape or range.
        ImportError: kornia is not installed.

    Source:
        Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR
        2019, for the kinds of corruption.

    Example:
        >>> import torch
        >>> images = torch.rand(2, 3, 32, 32)
        >>> corrupted = corrupt(images, "gaussian_noise", severity=3)
        >>> torch.equal(corrupted, corrupt(images, "gaussian_noise", severity=3))
        True
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"name must be one of {', '.join(CORRUPTIONS)}, got {name!r}.")
    if isinstance(severity, bool) or severity not in (0, *SEVERITIES):
        raise ValueError(f"severity must be an integer from 0 (unchanged) to 5, got {severity!r}.")
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            "images must be a floating point tensor of shape (images, channels, height, width), got "
            f"{tuple(images.shape)} of {images.dtype}."
        )
    if severity == 0 or not images.numel():
        return images
    low, high = (float(x) for x in images.aminmax())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise ValueError(
            f"images must be pixels in [0, 1], but these lie in [{low:.3g}, {high:.3g}]; invert the normalization with "
            "Normalization.to_pixels."
        )
    random = [np.random.default_rng([seed, start + i]) for i in range(len(images))]
    with torch.no_grad():
        return CORRUPTIONS[name](images.float(), severity - 1, random).clamp(0, 1).to(images.dtype)


def corruption_accuracy(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    normalization: Normalization | None = None,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Return the accuracy under each corruption and severity.

    Args:
        model: A Transformers image classification model, wrapped or not. Its own forward runs, in evaluation mode.
        batches: Mappings with `pixel_values`, `labels` (b,) and other inputs of the model; -100 is ignored. They are
            iterated over once.
        corruptions: Names from `CORRUPTIONS`. Default: all.
        severities: Integers from 0 (unchanged) to 5.
        normalization: Map from pixels to `pixel_values`, `Normalization.of(processor)`. Default: identity.
        seed: Seed of random corruptions.

    Returns:
        For each corruption the accuracy, in [0, 1], at each severity in the order given.

    Raises:
        ValueError: No image has a label, or an argument is invalid for [`corrupt`].
        ImportError: kornia is not installed.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from mm_hf.evaluation.metrics import corruption_accuracy
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...                                             intermediate_size=16, image_size=8, patch_size=4, num_labels=3))
        >>> batch = {"pixel_values": torch.rand(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
        >>> curves = corruption_accuracy(model, [batch], corruptions=["contrast"], severities=[0, 5])
        >>> len(curves["contrast"])
        2
    """
    names = tuple(CORRUPTIONS) if corruptions is None else tuple(corruptions)
    normalization = Normalization() if normalization is None else normalization
    correct = {name: [0] * len(severities) for name in names}
    count = 0
    with evaluation_mode(model) as device, torch.no_grad():
        for batch in batches:
            values, inputs, labels = image_batch(batch, device)
            pixels = normalization.to_pixels(values)
            for name in names:
                for k, severity in enumerate(severities):
                    changed = corrupt(pixels, name, severity, seed=seed, start=count)
                    fed = values if severity == 0 else normalization.to_values(changed).to(values.dtype)
                    logits = model_logits(model, pixel_values=fed, **inputs)
                    correct[name][k] += int((logits.argmax(dim=-1) == labels).sum())
            count += len(values)
    if not count:
        raise ValueError("batches must contain at least one image with a label.")
    return {name: [hits / count for hits in counts] for name, counts in correct.items()}


def _kornia() -> Any:
    try:
        import kornia
    except ImportError:
        raise ImportError(
            "This corruption needs kornia, which is not installed: pip install 'mm-hf[metrics]'."
        ) from None
    return kornia


def _root(images: Tensor) -> float:
    return math.sqrt(min(images.shape[-2:]) / SIDE)


def _gaussian_noise(images: Tensor, k: int, random: Random) -> Tensor:
    noise = np.stack([g.standard_normal(images.shape[1:], dtype=np.float32) for g in random])
    return images + NOISE_DEVIATION[k] * torch.from_numpy(noise).to(images.device)


def _shot_noise(images: Tensor, k: int, random: Random) -> Tensor:
    expected = (PHOTONS[k] * images.clamp(0, 1)).cpu().numpy()
    counted = np.stack([g.poisson(x).astype(np.float32) for g, x in zip(random, expected)])
    return torch.from_numpy(counted).to(images.device) / PHOTONS[k]


def _gaussian_blur(images: Tensor, k: int, random: Random) -> Tensor:
    deviation = BLUR_DEVIATION[k] * _root(images)
    size = 2 * math.ceil(3 * deviation) + 1
    return _kornia().filters.gaussian_blur2d(images, (size, size), (deviation, deviation), "replicate")


def _motion_blur(images: Tensor, k: int, random: Random) -> Tensor:
    length = max(2 * round((MOTION_LENGTH[k] * _root(images) - 1) / 2) + 1, 2 * k + 3)
    angle = torch.tensor([g.uniform(-45, 45) for g in random], dtype=images.dtype, device=images.device)
    # Direction 0 weights the path evenly. Old versions of kornia need both angle and direction as tensors.
    return _kornia().filters.motion_blur(images, length, angle, torch.zeros_like(angle), "replicate", "bilinear")


def _contrast(images: Tensor, k: int, random: Random) -> Tensor:
    return _kornia().enhance.adjust_contrast_with_mean_subtraction(images, CONTRAST[k])


def _brightness(images: Tensor, k: int, random: Random) -> Tensor:
    return _kornia().enhance.adjust_brightness(images, BRIGHTNESS[k])


def _pixelate(images: Tensor, k: int, random: Random) -> Tensor:
    h, w = images.shape[-2:]
    # Squares at the right and bottom edges may be smaller; their mean is over the pixels inside.
    small = F.avg_pool2d(images, SQUARE[k], ceil_mode=True)
    return small.repeat_interleave(SQUARE[k], dim=-2).repeat_interleave(SQUARE[k], dim=-1)[..., :h, :w]


def _jpeg(images: Tensor, k: int, random: Random) -> Tensor:
    b, channels, h, w = images.shape
    # Three channels are compressed as one color image, otherwise each channel as a gray image.
    gray = channels != 3
    colors = images.reshape(b * channels, 1, h, w).expand(-1, 3, -1, -1) if gray else images
    padded = F.pad(colors, (0, -w % 16, 0, -h % 16), mode="replicate")
    quality = torch.tensor([float(JPEG_QUALITY[k])], device=images.device)
    back = _kornia().enhance.jpeg_codec_differentiable(padded.clamp(0, 1), quality)[..., :h, :w]
    return back.mean(dim=1).view(b, channels, h, w) if gray else back


CORRUPTIONS: dict[str, Callable[[Tensor, int, Random], Tensor]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "gaussian_blur": _gaussian_blur,
    "motion_blur": _motion_blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}
