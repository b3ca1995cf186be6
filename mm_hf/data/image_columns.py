"""Columns of images: paths of image files, and the contents of image files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Image, Value
from PIL import Image as Pillow

from .folders import image_extensions
from .options import DataOptions

USUAL_TEXTS = ("text", "sentence")


def kind_of(feature: Any) -> str:
    """Return the kind of the values of a column: "string", "number", "bool", or the name of another feature."""
    if not isinstance(feature, Value):
        return type(feature).__name__
    number = any(word in feature.dtype for word in ("int", "float", "double"))
    return next((kind for kind in ("string", "binary") if kind in feature.dtype), "number" if number else feature.dtype)


def with_images(data: DatasetDict, options: DataOptions, label: str | None, *, check: bool = True) -> DatasetDict:
    """Return the splits with images in place of paths of images or of the contents of image files.

    The column is the one that the options name, or else the first whose values in the training split are contents of
    image files, or paths whose extensions are those of images. Paths are relative to the dataset's directory.

    Args:
        data: Splits of a dataset.
        options: Data options.
        label: Name of the column with labels, or None.
        check: Check that each path names a file.

    Raises:
        ValueError: A path names no file, an image is missing or on another machine, or a split has something else than
            images in the column.
    """
    column = options.image_column_name or _find_images(data["train"], options, label)
    if column is None:
        return data
    root = Path(options.dataset_name or ".")
    root = root if root.is_dir() else root.parent
    return DatasetDict(
        {
            split: _decode(rows, column, root, str(split), check) if column in rows.column_names else rows
            for split, rows in data.items()
        }
    )


def _find_images(rows: Dataset, options: DataOptions, label: str | None) -> str | None:
    """Return the first column with images, if the inputs are not texts."""
    columns = {name: feature for name, feature in rows.features.items() if name != label}
    images = [name for name, feature in columns.items() if isinstance(feature, Image)]
    if options.text_column_names or images:
        return None if options.text_column_names else images[0]
    contents = (name for name, feature in columns.items() if _is_content(feature) and _has_image(rows, name))
    found = next(contents, None)
    if found is not None or any(name in columns for name in USUAL_TEXTS):
        return found
    strings = (name for name, feature in columns.items() if kind_of(feature) == "string")
    return next((name for name in strings if _has_paths(rows, name)), None)


def _is_content(feature: Any) -> bool:
    """Return True for the bytes of files, or bytes and their path as `datasets` stores images."""
    return kind_of(feature) == "binary" or (
        isinstance(feature, dict) and {"bytes"} <= set(feature) <= {"bytes", "path"}
    )


def _has_image(rows: Dataset, column: str) -> bool:
    """Return True if the first content of a column is that of an image file."""
    for value in rows.with_format(None)[column]:
        content = value["bytes"] if isinstance(value, dict) else value
        if content is not None:
            try:
                Pillow.open(io.BytesIO(content)).close()
            except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError):
                return False
            return True
    return False


def _has_paths(rows: Dataset, column: str) -> bool:
    """Return True if all values of a column have the extension of an image."""
    extensions, found = image_extensions(), False
    for value in rows[column]:
        if value is not None:
            found = Path(value.strip()).suffix.lower() in extensions
            if not found:
                return False
    return found


def _decode(rows: Dataset, column: str, root: Path, split: str, check: bool) -> Dataset:
    feature = rows.features[column]
    if isinstance(feature, Image) or _is_content(feature):
        stored = rows if kind_of(feature) != "binary" else rows.cast_column(column, Value("binary"))
        images = stored.cast_column(column, Image(decode=False))
        _check_stored(images, column, split, check)
        return rows if isinstance(feature, Image) else images.cast_column(column, Image())
    if kind_of(feature) != "string":
        raise ValueError(
            f"The column {column!r} of the split {split!r} has no images, but {feature}: give --image_column_name, or "
            "use one type in all splits."
        )
    paths = [None if path is None else root / str(path) for path in rows[column]]
    missing = next((i for i, path in enumerate(paths) if path is None or not path.is_file()), None)
    if check and missing is not None:
        raise ValueError(
            f"The column {column!r} of the split {split!r} names no image file in row {missing} "
            f"({rows[column][missing]!r}): give paths relative to {root}, or --text_column_names to read texts."
        )
    files = rows.remove_columns(column).add_column(column, [path and str(path) for path in paths])
    return files.cast_column(column, Image())


def _check_stored(rows: Dataset, column: str, split: str, check: bool) -> None:
    """Check that images without contents have the path of a file: `datasets` downloads other ones when they are read.

    Args:
        rows: A split whose images are not decoded.
        column: Name of the column.
        split: Name of the split, for the message.
        check: Check that no image is missing.
    """
    first = 0
    for images in rows.data.column(column).chunks:
        paths = pc.struct_field(images, "path")
        for i in pc.indices_nonzero(pc.struct_field(images, "bytes").is_null()).to_pylist():
            _check_path(paths[i].as_py(), first + i, column, split, check)
        first += len(images)


def _check_path(path: str | None, row: int, column: str, split: str, check: bool) -> None:
    if path is None and check:
        raise ValueError(
            f"The column {column!r} of the split {split!r} has no image in row {row}: add it or remove the row."
        )
    # A file in an archive has a path such as "zip://0.png::images.zip".
    if path is not None and "://" in path.rpartition("::")[2] and not path.startswith("file://"):
        raise ValueError(
            f"The column {column!r} of the split {split!r} has {path!r} in row {row}, which is no file of this "
            "machine: download the images and give their paths."
        )
