"""Datasets of directories of images, one subdirectory per class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow
from PIL import ImageFile

from .tables import files_below, read_metadata


def image_extensions() -> set[str]:
    """Return the file extensions of images with pixels that PIL can read, such as ".png".

    PIL also registers formats that it only identifies (HDF5, GRIB, MPEG) or renders with another program (PostScript).
    """
    Pillow.init()
    return {extension for extension, name in Pillow.EXTENSION.items() if name in Pillow.OPEN and _has_pixels(name)}


def _has_pixels(name: str) -> bool:
    opener: object = Pillow.OPEN[name][0]
    is_stub = isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)
    return not is_stub and Pillow.MIME.get(name, "image/").startswith("image/")


def load_image_folders(folders: Mapping[str, str | Path]) -> DatasetDict:
    """Load one directory per split, each with one subdirectory per class.

    Images may lie at any depth below the directory of their class. Links to directories are followed. Hidden files and
    files that are not images are ignored. The class names of all splits are sorted.

    A directory with a table `metadata` (`metadata.csv`, `.jsonl`, `.parquet`, ...) needs no subdirectories: the column
    `file_name` has the paths of the images, and the other columns are those of the dataset.

    Args:
        folders: Directory of each split.

    Returns:
        Splits with the columns `image` and `label`, or `image` and those of the metadata.

    Raises:
        ValueError: A directory does not exist, has no images or no subdirectories with images, has several tables of
            metadata, or names an image in its metadata that does not exist.

    Example:
        >>> import tempfile
        >>> directory = Path(tempfile.mkdtemp())
        >>> for name in ("cat", "dog"):
        ...     (directory / name).mkdir()
        ...     Pillow.new("RGB", (4, 4)).save(directory / name / "1.png")
        >>> data = load_image_folders({"train": directory})
        >>> data["train"].features["label"].names, data["train"][1]["label"]
        (['cat', 'dog'], 1)
    """
    described = {split: _read_described(split, Path(folder)) for split, folder in folders.items()}
    if any(rows is not None for rows in described.values()):
        without = [f"--{split}_dir {folders[split]}" for split, rows in described.items() if rows is None]
        if without:
            raise ValueError(
                f"{without[0]} has no table metadata, which another split has: use one form for all splits."
            )
        return DatasetDict({split: rows for split, rows in described.items() if rows is not None})
    files = {split: _files(split, Path(folder)) for split, folder in folders.items()}
    names = sorted({name for found in files.values() for _, name in found})
    index = {name: i for i, name in enumerate(names)}
    features = Features({"image": Value("string"), "label": ClassLabel(names=names)})
    splits = {}
    for split, found in files.items():
        columns = {"image": [str(path) for path, _ in found], "label": [index[name] for _, name in found]}
        splits[split] = Dataset.from_dict(columns, features=features).cast_column("image", Image())
    return DatasetDict(splits)


def _read_described(split: str, folder: Path) -> Dataset | None:
    """Return the images that a directory's table `metadata` names, with its columns; None without such a table."""
    rows = read_metadata(folder) if folder.is_dir() else None
    if rows is None:
        return None
    option = f"--{split}_dir {folder}"
    if "file_name" not in rows.column_names:
        raise ValueError(f"{option} has metadata without the column file_name: {', '.join(rows.column_names)}.")
    empty = next((i for i, name in enumerate(rows["file_name"]) if name is None), None)
    if empty is not None:
        raise ValueError(f"{option} has metadata without a file_name in row {empty}: add it or remove the row.")
    paths = [folder / str(name) for name in rows["file_name"]]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise ValueError(f"{option} names {missing.name} in its metadata, which does not exist: remove the row.")
    described = rows.remove_columns("file_name").add_column("image", [str(path) for path in paths])
    return described.cast_column("image", Image())


def _files(split: str, folder: Path) -> list[tuple[Path, str]]:
    """Return the images below a directory and their classes."""
    option = f"--{split}_dir {folder}"
    if not folder.is_dir():
        raise ValueError(f"{option} is not a directory: give a directory with one subdirectory of images per class.")
    extensions = image_extensions()
    found, flat = [], 0
    for path in files_below(folder):
        parts = path.relative_to(folder).parts
        if path.suffix.lower() in extensions:
            if len(parts) > 1:
                found.append((path, parts[0]))
            else:
                flat += 1
    if flat:
        raise ValueError(
            f"{option} has {flat} images outside of the subdirectories of the classes: move each image into the "
            "subdirectory of its class, or add a metadata.csv with the columns file_name and label."
        )
    if not found:
        raise ValueError(f"{option} has no images: give a directory with one subdirectory of images per class.")
    return found
