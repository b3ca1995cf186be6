"""Images: digits, Fashion-MNIST, and images of unknown classes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.evidence.data.examples import Examples, require_debian_package, stratified_subsets
from mm_hf.data.offline import FASHION_MNIST, load_digits, load_fashion_mnist


def gray_images(rows: Any) -> Tensor:
    """Return the images of a dataset as a tensor (n, 1, h, w) in [0, 1]."""
    return torch.tensor(np.stack([np.asarray(image) for image in rows["image"]]))[:, None].float() / 255


@cache
def digits() -> tuple[Examples, Examples]:
    """Return the training and test examples of scikit-learn's digits, with values in [-1, 1]."""
    data = load_digits()
    train, test = (
        Examples(torch.tensor(data[split]["label"]), pixel_values=2 * gray_images(data[split]) - 1)
        for split in ("train", "test")
    )
    return train, test


def photograph_patches(number: int = 500, side: int = 8) -> Examples:
    """Return gray patches of scikit-learn's two photographs, with values in [-1, 1]: images of an unknown class."""
    from sklearn.datasets import load_sample_images

    random, found = np.random.default_rng(0), []
    photographs = [photograph.mean(axis=-1) for photograph in load_sample_images().images]
    for i in range(number):
        photograph = photographs[i % 2]
        top, left = (random.integers(0, size - side) for size in photograph.shape)
        found.append(photograph[top : top + side, left : left + side])
    pixels = torch.tensor(np.stack(found))[:, None].float() / 255
    return Examples(torch.zeros(number), pixel_values=2 * pixels - 1)


@cache
def fashion(split: str, seed: int, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Return disjoint stratified subsets of a split of Fashion-MNIST: pixels (n, 1, 28, 28) in [0, 1] and labels.

    Raises:
        FileNotFoundError: The Debian package is not installed.
    """
    require_debian_package("dataset-fashion-mnist", FASHION_MNIST)
    data = load_fashion_mnist()[split]
    labels = np.array(data["label"])
    return [
        (gray_images(data.select(indices)), torch.tensor(labels[indices]))
        for indices in stratified_subsets(labels, list(sizes), seed)
    ]


def enlarged_digits() -> Tensor:
    """Return the 450 test images of `digits`, enlarged to 28x28 pixels in [0, 1]: images of an unknown class."""
    _, test = digits()
    return F.interpolate((test.inputs["pixel_values"] + 1) / 2, (28, 28), mode="bilinear").clamp(0, 1)
