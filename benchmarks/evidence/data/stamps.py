"""Photographs of objects and animals from the Debian package tuxpaint-stamps-default."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from benchmarks.evidence.data.examples import require_debian_package

STAMPS = Path("/usr/share/tuxpaint/stamps")
CATEGORIES = {
    "bird": ("animals/birds",),
    "mammal": ("animals/mammals",),
    "insect": ("animals/insects",),
    "sea animal": ("animals/fish", "animals/shellfish"),
    "fruit": ("food/fruit",),
    "vegetable": ("food/vegetables",),
    "flower": ("plants/flowers",),
    "household object": ("household",),
    "vehicle": ("vehicles",),
    "musical instrument": ("hobbies/music",),
    "coin": ("symbols/money/canadian/coins", "symbols/money/euro/coins", "symbols/money/us/coins"),
}
EXCLUDED = ("cartoon", "toys", "plastic")  # folders of drawings and models
SIDE, INNER = 112, 100  # pixels: of an image, and of the photograph in it
GRAY = 128  # background


def files() -> list[tuple[Path, int]]:
    """Return the files of all photographs of `CATEGORIES` and their class indices, without mirrored copies.

    Raises:
        FileNotFoundError: The Debian package is not installed.
    """
    require_debian_package("tuxpaint-stamps-default", STAMPS)
    return [
        (path, label)
        for label, folders in enumerate(CATEGORIES.values())
        for path in sorted(path for folder in folders for path in (STAMPS / folder).rglob("*.png"))
        if not set(EXCLUDED) & set(path.relative_to(STAMPS).parts) and not path.stem.endswith("_mirror")
    ]


def load(paths: Sequence[Path]) -> Tensor:
    """Return pixels (n, 3, 112, 112) in [0, 1].

    Each photograph is cropped to its visible pixels, scaled and pasted on a gray background.
    """
    return torch.stack([_paste(path) for path in paths])


def _paste(path: Path) -> Tensor:
    photograph = Image.open(path).convert("RGBA")
    photograph = photograph.crop(photograph.getchannel("A").getbbox())
    scale = INNER / max(photograph.size)
    width, height = (max(1, round(scale * size)) for size in photograph.size)
    photograph = photograph.resize((width, height), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (SIDE, SIDE), (GRAY, GRAY, GRAY))
    corner = ((SIDE - width) // 2, (SIDE - height) // 2)
    canvas.paste(photograph, corner, mask=photograph)
    return torch.tensor(np.array(canvas)).permute(2, 0, 1).float() / 255


def split_fold(labels: Tensor, fold: int, folds: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of training and test examples of a fold of stratified cross-validation."""
    splitter = StratifiedKFold(folds, shuffle=True, random_state=0)
    return list(splitter.split(np.zeros(len(labels)), labels.numpy()))[fold]
