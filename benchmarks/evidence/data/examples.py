"""Examples as tensors, stratified subsets, and the directories of installed packages."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset


class Examples(Dataset):
    """Data set of tensors of the same length: labels and the model's inputs by name."""

    def __init__(self, labels: Tensor, **inputs: Tensor):
        self.labels, self.inputs = labels.long(), inputs

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**{name: values[index] for name, values in self.inputs.items()}, "labels": self.labels[index]}

    def select(self, indices: Any) -> Examples:
        """Return the examples with the given indices, in their order."""
        indices = torch.as_tensor(indices)
        return Examples(self.labels[indices], **{name: values[indices] for name, values in self.inputs.items()})


class AugmentedExamples(Examples):
    """Examples whose `pixel_values` are augmented at random, depending on the seed, the epoch and the index only."""

    def __init__(self, examples: Examples, augment: Callable[[Tensor, torch.Generator], Tensor]):
        super().__init__(examples.labels, **examples.inputs)
        self.augment = augment
        self.seed = self.epoch = 0

    def seed_augmentation(self, seed: int, epoch: int) -> None:
        """Set the seed and the epoch of the augmentation; a comparison calls this before each epoch."""
        self.seed, self.epoch = seed, epoch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        example = super().__getitem__(index)
        state = np.random.SeedSequence([self.seed, self.epoch, int(index)]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
        return {**example, "pixel_values": self.augment(example["pixel_values"], generator)}


def random_crop(image: Tensor, generator: torch.Generator, padding: int) -> Tensor:
    """Shift an image by up to `padding` pixels in each direction; the border is repeated."""
    height, width = image.shape[-2:]
    padded = F.pad(image[None], (padding,) * 4, mode="replicate")[0]
    top, left = torch.randint(2 * padding + 1, (2,), generator=generator).tolist()
    return padded[..., top : top + height, left : left + width]


def random_flip(image: Tensor, generator: torch.Generator) -> Tensor:
    """Flip an image horizontally with probability 0.5."""
    return image.flip(-1) if torch.rand((), generator=generator) < 0.5 else image


def random_crop_and_flip(image: Tensor, generator: torch.Generator, padding: int) -> Tensor:
    """Crop and flip an image at random, the usual augmentation of photographs."""
    return random_flip(random_crop(image, generator, padding), generator)


def require_package(name: str, module: str) -> Path:
    """Return the path of an installed package or module without importing it, which may need further packages.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    found = find_spec(module)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            f"This task needs the package {name}, which is not installed: pip install {name}, or run `make evidence`."
        )
    return Path(found.origin).parent if found.submodule_search_locations else Path(found.origin)


def require_debian_package(name: str, path: Path) -> Path:
    """Return a path that a Debian package installs.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"This task needs the Debian package {name}, whose {path} does not exist: apt-get install {name}."
        )
    return path


def stratified_subsets(labels: Any, sizes: list[int], seed: int = 0) -> list[np.ndarray]:
    """Draw disjoint random subsets of data with about equally many examples per class, stratified by class.

    Classes take turns: a subset has the same number of examples of every class until a class is used up. With the same
    seed, a larger first subset contains a smaller one.

    Args:
        labels: Class per example.
        sizes: Number of examples per subset.
        seed: Seed of the shuffling within each class.

    Returns:
        Indices of the examples per subset.

    Raises:
        ValueError: The sizes add up to more than the number of examples.
    """
    labels = np.asarray(labels)
    random = np.random.default_rng(seed)
    # Rank of an example within its shuffled class, plus noise that orders examples of equal rank.
    ranks = np.empty(len(labels))
    for label in np.unique(labels):
        (where,) = np.nonzero(labels == label)
        ranks[random.permutation(where)] = np.arange(len(where)) + random.random(len(where))
    order = np.argsort(ranks, kind="stable")
    ends = np.cumsum([0, *sizes])
    if ends[-1] > len(labels):
        raise ValueError(f"sizes must add up to at most {len(labels)}, the number of examples, got {sizes}.")
    return [order[start:end] for start, end in pairwise(ends)]


def cached_tensor(path: Path, compute: Callable[[], Tensor]) -> Tensor:
    """Return the tensor saved at a path; compute and save it first if necessary.

    The file is replaced atomically, so that processes that run side by side never read an incomplete one.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        torch.save(compute(), partial)
        os.replace(partial, path)
    return torch.load(path)
