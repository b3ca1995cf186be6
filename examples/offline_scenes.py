"""Images with a class for each pixel that need no download: scenes of real handwritten digits on textured noise."""

from __future__ import annotations

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage

from mm_hf.data.offline import load_digits

OFFLINE = ("digit_scenes",)
CLASSES = ["background", *(str(digit) for digit in range(10))]
IGNORED = 255
SIDE, SIZES, MOST_DIGITS = 48, (18, 28), 3
NO_INK, INK = 0.3, 0.6  # coverage of a pixel: at most for background, at least for a digit; between it is ambiguous
SCENES = {"train": 4000, "test": 200}


def load_offline(name: str) -> DatasetDict:
    """A data set of `OFFLINE` by name, with a `train` and a `test` split."""
    if name == "digit_scenes":
        return load_digit_scenes()
    raise ValueError(f"There is no offline data set {name!r}. There are {', '.join(OFFLINE)}.")


def load_digit_scenes() -> DatasetDict:
    """Scenes of 48x48 pixels with one to three of scikit-learn's digits: columns `image` (RGB) and `label` (one channel).

    A pixel's label is the digit + 1 where there is ink, 0 where there is none, and 255 where that is ambiguous: at the
    border of a stroke, and where two digits overlap. Test scenes have digits, places and noise that training has not.
    """
    features = Features(image=Image(), label=Image())
    splits = {}
    for seed, (split, digits) in enumerate(load_digits().items()):
        rng = np.random.default_rng(seed)
        images = [np.asarray(image) for image in digits["image"]]
        classes = digits["label"]
        scenes = []
        for _ in range(SCENES[str(split)]):
            chosen = rng.integers(len(images), size=rng.integers(1, MOST_DIGITS + 1)).tolist()
            image, label = scene([images[i] for i in chosen], [classes[i] for i in chosen], rng)
            scenes.append({"image": PILImage.fromarray(image), "label": PILImage.fromarray(label)})
        splits[split] = Dataset.from_list(scenes, features=features)
    return DatasetDict(splits)


def scene(
    digits: list[np.ndarray], classes: list[int], rng: np.random.Generator, side: int = SIDE
) -> tuple[np.ndarray, np.ndarray]:
    """An image (side, side, 3) of digits at random places in random sizes, and its labels (side, side), both uint8."""
    image = texture(rng, side)
    label = np.zeros((side, side), np.uint8)
    covered = np.zeros((side, side), bool)
    for digit, name in zip(digits, classes):
        size = int(rng.integers(SIZES[0], SIZES[1] + 1))
        top, left = rng.integers(side - size + 1, size=2)
        here = (slice(top, top + size), slice(left, left + size))
        coverage = np.asarray(PILImage.fromarray(digit).resize((size, size), PILImage.Resampling.BICUBIC)) / 255
        colour = rng.uniform(0.65, 1, size=3)
        image[here] += coverage[..., None] * (colour - image[here])
        touched = coverage > NO_INK
        classes_here = np.where(coverage >= INK, name + 1, IGNORED)
        label[here] = np.where(touched, np.where(covered[here], IGNORED, classes_here), label[here])
        covered[here] |= touched
    if rng.random() < 0.5:  # dark ink on bright ground
        image = 1 - image
    return (image * 255).round().astype(np.uint8), label


def texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Coloured noise of two scales, (side, side, 3) in [0, 0.5]."""
    coarse = rng.integers(256, size=(4, 4, 3), dtype=np.uint8)
    smooth = np.asarray(PILImage.fromarray(coarse).resize((side, side), PILImage.Resampling.BICUBIC)) / 255
    return 0.35 * smooth + rng.uniform(0, 0.15, size=(side, side, 3))
