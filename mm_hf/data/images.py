"""Rows with images to what an image model takes: resized, augmented in training, normalised."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

AUGMENTATIONS = ("none", "crop", "crop_flip", "randaugment")
IN_MEMORY = 2**26  # values of images that are prepared once and kept, 256 MB


def image_size(processor: Any) -> tuple[int, int]:
    """Height and width that an image processor resizes to, as a square if it tells the shortest edge only."""
    size = dict(processor.size)
    side: int = size.get("shortest_edge", 224)
    return size.get("height", side), size.get("width", side)


class ImageTransform:
    """Images of a batch of rows to `pixel_values`: resized, augmented in training, normalised.

    Args:
        processor: The model's image processor.
        image_column: Name of the column with PIL images.
        label_column: Name of the column with class indices.
        augmentation: "none", "crop", "crop_flip" or "randaugment", by kornia; used if `train`.
        num_channels: 3, or 1 for grey images.
        train: Whether to augment.

    Raises:
        ValueError: Another augmentation.
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
        """A batch of rows as the data set gives them."""
        images = [image.convert(self.mode) for image in rows[self.columns[0]]]
        if self.augment is None:
            pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        else:
            # Crops are cut from images an eighth larger than what the model sees.
            size = {"height": round(self.height * 8 / 7), "width": round(self.width * 8 / 7)}
            plain = self.processor(
                images, size=size, do_center_crop=False, do_normalize=False, return_tensors="pt", do_resize=True
            )["pixel_values"]
            pixels = self.augment(torch.as_tensor(np.asarray(plain), dtype=torch.float32))
        return {"pixel_values": list(pixels), "labels": rows[self.columns[1]]}


class _InColor(torch.nn.Module):
    """Augmentation of colors, for grey images, too: some of its operations take three channels only."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[1] != 1:
            return self.inner(images)
        return self.inner(images.expand(-1, 3, -1, -1)).mean(dim=1, keepdim=True)


class ImageDataset(Dataset):
    """A data set of images whose augmentation depends on the seed, the epoch and the images of the batch alone.

    Methods draw different numbers from the global generator: if augmentation drew from it, too, each method would be
    trained on other images. Images without augmentation are prepared once where they fit into memory.

    Args:
        rows: A `datasets.Dataset`.
        transform: What makes `pixel_values` and `labels` of a batch of rows.
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
        """The examples of a batch, prepared together."""
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
