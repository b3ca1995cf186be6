"""Preprocessing of images: conversion, augmentation of the image itself, and the model's own image processor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

AUGMENTATIONS = ("none", "crop", "crop_flip", "randaugment")
IN_MEMORY = 2**26  # datasets with up to this many values are preprocessed once and kept in memory (256 MB)
BATCH_PIXELS = 2**24  # decoded pixels in memory at a time, about 50 MB
CROP_SCALE, CROP_RATIO = (0.6, 1.0), (3 / 4, 4 / 3)  # share of the area, and width divided by height, of a random crop

Augmentation = Callable[[Image.Image], Any]


def convert_image(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to 8 bits per channel.

    Images with 16 bits per channel are scaled to 8 bits. All other modes are converted as PIL does.

    Args:
        image: Image in any mode of PIL.
        mode: "RGB" or "L" (grayscale).

    Raises:
        ValueError: The values have no defined range (32-bit floats or integers), or PIL cannot convert the mode.

    Example:
        >>> sixteen = Image.fromarray(np.full((2, 2), 257 * 100, dtype=np.uint16))
        >>> convert_image(sixteen, "RGB").getpixel((0, 0))
        (100, 100, 100)
    """
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"the image has 32-bit values from {values.min()} to {values.max()}, which have no defined range: "
                "convert it to 8 or 16 bits"
            )
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("the image has floating-point values, which have no defined range: convert it to 8 or 16 bits")
    elif image.mode == "P":  # through RGBA, since a palette may have transparent entries
        image = image.convert("RGBA")
    return image.convert(mode)


def as_image(image: Any) -> Image.Image:
    """Return the result of an augmentation as an image.

    Args:
        image: Image, array (height, width, channels) or tensor (channels, height, width) of 8-bit values.

    Raises:
        TypeError: It is something else.

    Example:
        >>> as_image(np.zeros((4, 6, 3), dtype=np.uint8)).size, as_image(torch.zeros(3, 4, 6, dtype=torch.uint8)).size
        ((6, 4), (6, 4))
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, torch.Tensor) and image.ndim == 3:
        image = image.cpu().permute(1, 2, 0).numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        raise TypeError(
            "augmentation must return a PIL image, or an array or a tensor of 8-bit values, got "
            f"{type(image).__name__}{f' of {image.dtype}' if hasattr(image, 'dtype') else ''}."
        )
    return Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)


def random_crop(image: Image.Image) -> Image.Image:
    """Resize a random rectangle of an image to the image's size, as torchvision's `RandomResizedCrop`.

    The size stays the same, so that the image processor treats the result like the image itself. Draws from PyTorch's
    global generator.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * float(torch.empty(()).uniform_(*CROP_SCALE))
        ratio = float(torch.empty(()).uniform_(*np.log(CROP_RATIO)).exp())
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(width - w + 1, ()))
            top = int(torch.randint(height - h + 1, ()))
            return image.resize(image.size, Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
    return image


def random_flip(image: Image.Image) -> Image.Image:
    """Flip an image horizontally with probability 0.5."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else image


def make_augmentation(name: str) -> Augmentation | None:
    """Return the augmentation of a name, from images to images of the same size and mode; None for "none".

    Args:
        name: "none", "crop" (random crops), "crop_flip" (and horizontal flips) or "randaugment" (RandAugment of kornia,
            then both).

    Raises:
        ValueError: The name is unknown.
        ImportError: kornia is not installed ("randaugment").
    """
    if name not in AUGMENTATIONS:
        raise ValueError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}, got {name!r}.")
    steps: list[Augmentation] = []
    if name == "randaugment":
        from kornia.augmentation.auto import RandAugment

        policy = RandAugment(n=2, m=9)

        def randaugment(image: Image.Image) -> Image.Image:
            # In color, since some of its operations require three channels.
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
            changed = (policy(pixels)[0].clamp(0, 1) * 255).round().to(torch.uint8)
            return Image.fromarray(changed.permute(1, 2, 0).numpy()).convert(image.mode)

        steps.append(randaugment)
    if name != "none":
        steps.append(random_crop)
    if name in ("crop_flip", "randaugment"):
        steps.append(random_flip)

    def augment(image: Image.Image) -> Image.Image:
        for step in steps:
            image = step(image)
        return image

    return augment if steps else None


class ImageTransform:
    """Transform of a batch of rows with images to `pixel_values` and `labels`.

    The augmentation changes the image. The model's image processor then preprocesses the result exactly as in
    evaluation. Masks and shapes that it returns for each image are kept, too.

    Args:
        processor: Image processor of the model.
        image_column: Name of the column with PIL images.
        label_column: Name of the column with class indices.
        augmentation: "none", "crop", "crop_flip", "randaugment" (kornia), or a function of a PIL image that returns an
            image, an array or a tensor of 8-bit values, such as a transform of `torchvision.transforms.v2`; applied if
            `train` is True.
        num_channels: 3, or 1 for grayscale images.
        train: Apply the augmentation.

    Raises:
        ValueError: The augmentation is unknown.
        ImportError: kornia is not installed.
    """

    def __init__(
        self,
        processor: Any,
        image_column: str = "image",
        label_column: str = "label",
        *,
        augmentation: str | Augmentation = "none",
        num_channels: int = 3,
        train: bool = False,
    ):
        self.processor, self.columns = processor, (image_column, label_column)
        self.mode = "RGB" if num_channels == 3 else "L"
        augment = augmentation if callable(augmentation) else make_augmentation(augmentation)
        self.augment = augment if train else None
        self.random = self.augment is not None

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Transform a batch of rows."""
        images = [self._convert(image, index) for index, image in enumerate(rows[self.columns[0]])]
        if self.augment is not None:
            images = [as_image(self.augment(image)) for image in images]
        inputs = self.processor(images, return_tensors="pt")
        if not isinstance(inputs, Mapping):
            raise ValueError(f"{type(self.processor).__name__} does not return inputs by name: use an image processor.")
        tensors = {
            name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.shape[:1] == (len(images),)
        }
        return {**{name: list(x) for name, x in tensors.items()}, "labels": rows[self.columns[1]]}

    def _convert(self, image: Image.Image, index: int) -> Image.Image:
        try:
            return convert_image(image, self.mode)
        except ValueError as error:
            name = getattr(image, "filename", "") or f"Image {index} of the batch"
            raise ValueError(f"{name} cannot be used: {error}.") from error


def read_image_row(rows: Any, index: int, column: str) -> dict[str, Any]:
    """Return a row of a dataset, or raise an error that names its image file.

    Args:
        rows: A `datasets.Dataset`.
        index: Number of the row.
        column: Name of the column with images.

    Raises:
        ValueError: The image is missing, truncated, not an image, or so large that it may be a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            row = rows[index]
        if row[column] is None:
            raise ValueError("there is none")
        return row
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        stored = rows.cast_column(column, datasets.Image(decode=False))[index][column]
        name = (stored or {}).get("path") or f"row {index}"
        raise ValueError(
            f"The image {name} cannot be read ({' '.join(str(error).split())}): replace it or remove it."
        ) from error


class ImageDataset(Dataset):
    """Image dataset whose augmentation depends only on the seed, the epoch and the indices of the batch.

    Methods draw different numbers from the global generator. If the augmentation used it, too, methods would be trained
    on different images. Without augmentation, images that fit into memory are preprocessed once.

    Args:
        rows: A `datasets.Dataset`.
        transform: Transform of a batch of rows.
    """

    def __init__(self, rows: Any, transform: ImageTransform):
        self.rows, self.transform = rows, transform
        self.seed = self.epoch = 0
        self.prepared: list[dict[str, Any]] | None = None
        if not transform.random and len(rows):
            values = sum(x.numel() for x in self._prepare([0])[0].values() if isinstance(x, torch.Tensor))
            if len(rows) * values <= IN_MEMORY:
                self.prepared = self._prepare(range(len(rows)))

    def seed_augmentation(self, seed: int, epoch: int) -> None:
        """Set the seed and the epoch that the augmentation of the next batches depends on.

        The name is not `set_epoch`, which Accelerate's data loaders call with the number of times they were iterated.
        """
        self.seed, self.epoch = seed, epoch

    @property
    def targets(self) -> list[int]:
        """The class indices of all examples, read without the images."""
        return self.rows.with_format(None)[self.transform.columns[1]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return the examples of a batch, preprocessed together."""
        if self.prepared is not None:
            return [self.prepared[i] for i in indices]
        if not self.transform.random:
            return self._prepare(indices)
        with torch.random.fork_rng(devices=[]):
            state = np.random.SeedSequence([self.seed, self.epoch, *indices]).generate_state(1, np.uint64)
            torch.manual_seed(int(state[0] >> 1))
            return self._prepare(indices)

    def _prepare(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Preprocess the rows in batches with a limited number of decoded pixels."""
        found: list[dict[str, Any]] = []
        batch: list[dict[str, Any]] = []
        pixels, column = 0, self.transform.columns[0]
        for count, index in enumerate(indices, start=1):
            batch.append(read_image_row(self.rows, int(index), column))
            pixels += batch[-1][column].width * batch[-1][column].height
            if pixels >= BATCH_PIXELS or count == len(indices):
                columns = {name: [row[name] for row in batch] for name in batch[0]}
                values = self.transform(columns)
                found += [dict(zip(values, row)) for row in zip(*values.values(), strict=True)]
                batch, pixels = [], 0
        return found
