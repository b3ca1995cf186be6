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


def package_directory(name: str, module: str) -> Path:
    """Return the directory of an installed package without importing it, since an import may need further packages.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            f"This task needs the package {name}, which is not installed: pip install {name}, or run `make evidence`."
        )
    return Path(found.submodule_search_locations[0])


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
    """Draw disjoint random subsets of examples, each with the same proportion of every class.

    With the same seed, a larger first subset contains a smaller one.

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
