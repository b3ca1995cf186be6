"""Images with a class per pixel that need no download: scenes of handwritten digits on textured noise."""

from __future__ import annotations

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage

from .offline import load_digits

CLASSES = ["background", *(str(digit) for digit in range(10))]
IGNORED = 255
SIDE, SIZES, MAX_DIGITS = 48, (18, 28), 3
# Coverage of a pixel: the maximum for the background and the minimum for a digit. Pixels between are ignored.
NO_INK, INK = 0.3, 0.6
SCENES = {"train": 4000, "test": 200}


def load_digit_scenes() -> DatasetDict:
    """Load scenes of 48x48 pixels with one to three of scikit-learn's handwritten digits.

    The columns are `image` (RGB) and `label` (one channel). The label of a pixel is 0 for the background, the digit + 1
    for ink, and 255 where it is ambiguous: at the border of a stroke, and where two digits overlap. Test scenes have
    digits, positions and noise that do not occur in training.
    """
    features = Features(image=Image(), label=Image())
    splits = {}
    for seed, (split, digits) in enumerate(load_digits().items()):
        rng = np.random.default_rng(seed)
        images = [np.asarray(image) for image in digits["image"]]
        classes = digits["label"]
        scenes = []
        for _ in range(SCENES[str(split)]):
            chosen = rng.integers(len(images), size=rng.integers(1, MAX_DIGITS + 1)).tolist()
            image, label = scene([images[i] for i in chosen], [classes[i] for i in chosen], rng)
            scenes.append({"image": PILImage.fromarray(image), "label": PILImage.fromarray(label)})
        splits[split] = Dataset.from_list(scenes, features=features)
    return DatasetDict(splits)


def scene(
    digits: list[np.ndarray], classes: list[int], rng: np.random.Generator, side: int = SIDE
) -> tuple[np.ndarray, np.ndarray]:
    """Draw digits at random positions in random sizes; return an image (side, side, 3) and its labels (side, side)."""
    image = texture(rng, side)
    label = np.zeros((side, side), np.uint8)
    covered = np.zeros((side, side), bool)
    for digit, name in zip(digits, classes):
        size = int(rng.integers(SIZES[0], SIZES[1] + 1))
        top, left = rng.integers(side - size + 1, size=2)
        region = (slice(top, top + size), slice(left, left + size))
        coverage = np.asarray(PILImage.fromarray(digit).resize((size, size), PILImage.Resampling.BICUBIC)) / 255
        color = rng.uniform(0.65, 1, size=3)
        image[region] += coverage[..., None] * (color - image[region])
        touched = coverage > NO_INK
        digit_label = np.where(coverage >= INK, name + 1, IGNORED)
        label[region] = np.where(touched, np.where(covered[region], IGNORED, digit_label), label[region])
        covered[region] |= touched
    if rng.random() < 0.5:  # dark ink on a bright background
        image = 1 - image
    return (image * 255).round().astype(np.uint8), label


def texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draw colored noise (side, side, 3) of two scales with values in [0, 0.5]."""
    coarse = rng.integers(256, size=(4, 4, 3), dtype=np.uint8)
    smooth = np.asarray(PILImage.fromarray(coarse).resize((side, side), PILImage.Resampling.BICUBIC)) / 255
    return 0.35 * smooth + rng.uniform(0, 0.15, size=(side, side, 3))


OFFLINE = {"digit_scenes": load_digit_scenes}
