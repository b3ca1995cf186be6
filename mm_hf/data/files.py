"""Datasets in local files and directories: tables, Arrow datasets, and directories of images."""

from __future__ import annotations

import itertools
import logging
import re
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_from_disk
from pyarrow import ArrowException

from .folders import image_extensions, load_image_folders
from .table_checks import check_arrow
from .tables import TABLES, files_below, find_metadata, is_table, read_tables

logger = logging.getLogger(__name__)

SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip


def load_local(path: str | Path, **hub: Any) -> DatasetDict | None:
    """Load a dataset from a file or a directory.

    Splits are recognized by the names of files and of directories, such as `train.csv`, `data/reviews-test.jsonl` or
    `test/`; other files belong to the training split. Names may have any character. Hidden files are ignored, and so
    are tables beside one directory of images per split, with a warning.

    Args:
        path: A file with an extension of `TABLES`, a directory of such files, a directory that
            `Dataset.save_to_disk` or `DatasetDict.save_to_disk` has written, or a directory with one subdirectory of
            images per split (see [`load_image_folders`]).
        hub: Keyword arguments of `datasets.load_dataset`, such as `cache_dir`.

    Returns:
        The splits, or None for a path that is none of these or has a dataset card with configurations.

    Raises:
        ValueError: The file has another extension, a file cannot be read, or a split is a directory of images and
            another one a table.

    Example:
        >>> import tempfile
        >>> directory = Path(tempfile.mkdtemp()) / "reviews [2020]"
        >>> directory.mkdir()
        >>> for split in ("train", "test"):
        ...     size = (directory / f"reviews-{split}.tsv").write_text("text\\tlabel\\nfine\\tgood\\npoor\\tbad\\n")
        >>> load_local(directory)["test"]["label"][1]
        'bad'
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() not in TABLES:
            raise ValueError(f"{path} has none of the extensions {', '.join(TABLES)}: convert it to one of them.")
        return read_tables({"train": [path]}, **hub)
    card = path / "README.md"
    if not path.is_dir() or (card.is_file() and "\nconfigs:" in card.read_text("utf-8")):
        return None
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _load_saved(path)
    tables = _by_split(path)
    folders = {SPLITS[child.name.lower()]: child for child in sorted(path.iterdir()) if _is_split_of_images(child)}
    if tables and not _are_described_by_folders(path, tables, folders):
        return read_tables(tables, **hub)
    return load_image_folders(folders) if "train" in folders else None


def _are_described_by_folders(root: Path, tables: dict[str, list[Path]], folders: dict[str, Path]) -> bool:
    """Return True if the directories of images are the dataset, and the tables beside them are not, with a warning.

    Tables are the dataset if the directories have no subdirectories of classes, or if a table is named after each of
    the splits.

    Raises:
        ValueError: A split is a directory, and another one a table.
    """
    if "train" not in folders or not _has_classes(folders["train"]):
        return False
    named = {split: [path for path in paths if _split_of(path.stem)] for split, paths in tables.items()}
    named = {split: paths for split, paths in named.items() if paths}
    if set(folders) <= set(named):
        return False
    other = next((split for split in named if split not in folders), None)
    if other is not None:
        raise ValueError(
            f"{root} has the directory {folders['train'].name} of images and the table {named[other][0].name}: use one "
            "form for all splits."
        )
    names = ", ".join(str(path.relative_to(root)) for paths in tables.values() for path in paths[:3])
    logger.warning("%s has directories of images: the tables beside them are ignored (%s).", root, names)
    return True


def _has_classes(folder: Path) -> bool:
    """Return True if a directory has a table of metadata, or images in several subdirectories."""
    extensions, inside = image_extensions(), (child for child in folder.iterdir() if not child.name.startswith("."))
    classes = (c for c in inside if c.is_dir() and any(p.suffix.lower() in extensions for p in files_below(c)))
    return find_metadata(folder) != [] or len(list(itertools.islice(classes, 2))) == 2


def _load_saved(path: Path) -> DatasetDict:
    for file in sorted(set(path.rglob("*.arrow")) - set(path.rglob("cache-*"))):
        check_arrow(file)
    try:
        saved = load_from_disk(str(path))
    except (ArrowException, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        cause = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(f"{path} cannot be read ({cause}): save it again with save_to_disk.") from error
    return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)


def _by_split(root: Path) -> dict[str, list[Path]]:
    """Return the tables below a directory by their split."""
    found: dict[str, list[Path]] = {}
    for path in files_below(root):
        if is_table(path):
            found.setdefault(_split_of(str(path.relative_to(root))) or "train", []).append(path)
    return found


def _split_of(name: str) -> str | None:
    """Return the split that the first of the words in a name denotes; None if there is no such word."""
    return next((SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS), None)


def _is_split_of_images(path: Path) -> bool:
    extensions = image_extensions()
    return (
        path.is_dir() and path.name.lower() in SPLITS and any(p.suffix.lower() in extensions for p in files_below(path))
    )
