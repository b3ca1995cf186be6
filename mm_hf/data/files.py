"""Datasets in local files and directories: tables, Arrow datasets, and directories of images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_from_disk
from pyarrow import ArrowException

from .folders import image_extensions, load_image_folders
from .table_checks import check_arrow
from .tables import TABLES, files_below, is_table, read_tables

SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip


def load_local(path: str | Path, **hub: Any) -> DatasetDict | None:
    """Load a dataset from a file or a directory.

    Splits are recognized by the names of files and of directories, such as `train.csv`, `data/reviews-test.jsonl` or
    `test/`; other files belong to the training split. Names may have any character. Hidden files are ignored.

    Args:
        path: A file with an extension of `TABLES`, a directory of such files, a directory that
            `Dataset.save_to_disk` or `DatasetDict.save_to_disk` has written, or a directory with one subdirectory of
            images per split (see [`load_image_folders`]).
        hub: Keyword arguments of `datasets.load_dataset`, such as `cache_dir`.

    Returns:
        The splits, or None for a path that is none of these or has a dataset card with configurations.

    Raises:
        ValueError: The file has another extension, or a file cannot be read.

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
    if tables:
        return read_tables(tables, **hub)
    folders = {SPLITS[child.name.lower()]: child for child in sorted(path.iterdir()) if _is_split_of_images(child)}
    return load_image_folders(folders) if "train" in folders else None


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
            parts = path.relative_to(root).parts
            words = [word for part in parts for word in re.split(r"[^a-z]+", part.lower())]
            found.setdefault(next((SPLITS[word] for word in words if word in SPLITS), "train"), []).append(path)
    return found


def _is_split_of_images(path: Path) -> bool:
    extensions = image_extensions()
    return (
        path.is_dir() and path.name.lower() in SPLITS and any(p.suffix.lower() in extensions for p in files_below(path))
    )
