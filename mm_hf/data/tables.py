"""Tables of datasets: CSV, TSV, JSON, JSON lines, Parquet and Arrow files."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, load_dataset

# File extensions, with the reader in `datasets` and its arguments.
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
NOT_DATA = ("config", "dataset_dict", "dataset_info", "dataset_infos", "state", "metadata")  # names without extension


def is_table(path: Path) -> bool:
    """Return True if a path is a table, and not a description of a dataset or of the images beside it."""
    return path.suffix.lower() in TABLES and path.stem not in NOT_DATA and path.is_file()


def read_tables(files: dict[str, list[Path]], **hub: Any) -> DatasetDict:
    """Read the tables of each split. File names may have any character.

    Args:
        files: Paths by split.
        hub: Keyword arguments of `datasets.load_dataset`, such as `cache_dir`.

    Raises:
        ValueError: The files have different formats.
    """
    suffixes = sorted({path.suffix.lower() for paths in files.values() for path in paths})
    reader, settings = TABLES[suffixes[0]]
    if any(TABLES[suffix] != (reader, settings) for suffix in suffixes):
        raise ValueError(f"the files have the formats {', '.join(suffixes)}: use the same format for all files.")
    patterns = {split: [glob.escape(str(path)) for path in paths] for split, paths in files.items()}
    with _without_load_counter():
        data = load_dataset(reader, data_files=patterns, **settings, **hub)
    assert isinstance(data, DatasetDict)
    return data


@contextlib.contextmanager
def _without_load_counter() -> Iterator[None]:
    """Disable the request by which `datasets` counts each loading of a dataset, also of local files."""
    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before


def read_metadata(folder: Path) -> Dataset | None:
    """Read the table `metadata` in a directory of images, such as `metadata.csv`; None if there is none."""
    found = [path for path in sorted(folder.iterdir()) if path.stem == "metadata" and path.suffix.lower() in TABLES]
    return read_tables({"train": found[:1]})["train"] if found else None
