"""Preprocessing of images: resizing, augmentation and normalization."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

AUGMENTATIONS = ("none", "crop", "crop_flip", "randaugment")
IN_MEMORY = 2**26  # datasets with up to this many values are preprocessed once and kept in memory (256 MB)


def image_size(processor: Any) -> tuple[int, int]:
    """Return the height and width that an image processor resizes to; a square if it has only a shortest edge."""
    size = dict(processor.size)
    side: int = size.get("shortest_edge", 224)
    return size.get("height", side), size.get("width", side)


class ImageTransform:
    """Transform of a batch of rows with images to `pixel_values` and `labels`.

    Args:
        processor: Image processor of the model.
        image_column: Name of the column with PIL images.
        label_column: Name of the column with class indices.
        augmentation: "none", "crop", "crop_flip" or "randaugment" (kornia); applied if `train` is True.
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
        augmentation: str = "none",
        num_channels: int = 3,
        train: bool = False,
    ):
        self.processor, self.columns = processor, (image_column, label_column)
        self.mode = "RGB" if num_channels == 3 else "L"
        self.channels = num_channels
        self.height, self.width = image_size(processor)
        crop = getattr(processor, "crop_size", None)
        if getattr(processor, "do_center_crop", False) and crop is not None:
            self.height, self.width = dict(crop)["height"], dict(crop)["width"]
        if augmentation not in AUGMENTATIONS:
            raise ValueError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}, got {augmentation!r}.")
        self.random = train and augmentation != "none"
        self.augment = self._augmentation(augmentation) if self.random else None

    def _augmentation(self, name: str) -> torch.nn.Module:
        from kornia import augmentation

        steps: list[Any] = []
        if name == "randaugment":
            steps.append(_InColor(augmentation.auto.RandAugment(n=2, m=9)))
        steps.append(augmentation.RandomResizedCrop((self.height, self.width), scale=(0.6, 1.0)))
        if name in ("crop_flip", "randaugment"):
            steps.append(augmentation.RandomHorizontalFlip())
        steps.append(augmentation.Normalize(self.processor.image_mean, self.processor.image_std))
        return augmentation.container.ImageSequential(*steps)

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        """Transform a batch of rows."""
        images = [image.convert(self.mode) for image in rows[self.columns[0]]]
        if self.augment is None:
            pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        else:
            # Crops are taken from images resized to 8/7 of the model's input size.
            size = {"height": round(self.height * 8 / 7), "width": round(self.width * 8 / 7)}
            plain = self.processor(
                images, size=size, do_center_crop=False, do_normalize=False, return_tensors="pt", do_resize=True
            )["pixel_values"]
            pixels = self.augment(torch.as_tensor(np.asarray(plain), dtype=torch.float32))
        return {"pixel_values": list(pixels), "labels": rows[self.columns[1]]}


class _InColor(torch.nn.Module):
    """Augmentation that also accepts grayscale images, since some color operations require three channels."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[1] != 1:
            return self.inner(images)
        return self.inner(images.expand(-1, 3, -1, -1)).mean(dim=1, keepdim=True)


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
        values = len(rows) * transform.channels * transform.height * transform.width
        self.prepared: list[dict[str, Any]] | None = None
        if not transform.random and values <= IN_MEMORY:
            self.prepared = self._prepare(range(len(rows)))

    def seed_augmentation(self, seed: int, epoch: int) -> None:
        """Set the seed and the epoch that the augmentation of the next batches depends on.

        The name is not `set_epoch`, which Accelerate's data loaders call with the number of times they were iterated.
        """
        self.seed, self.epoch = seed, epoch

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

    def _prepare(self, indices: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for start in range(0, len(indices), 256):
            batch = self.transform(self.rows[list(indices[start : start + 256])])
            found += [
                {"pixel_values": x, "labels": y} for x, y in zip(batch["pixel_values"], batch["labels"], strict=True)
            ]
        return found
