"""Tables of datasets: CSV, TSV, JSON, JSON lines, Parquet and Arrow files."""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
from datasets import Dataset, DatasetDict, Features, load_dataset
from datasets.exceptions import DatasetsError
from pyarrow import ArrowException

from .table_checks import check_table, columns, json_schema, json_table, problem

# Only empty cells are missing values: words such as "NA" and "None" may be classes and texts.
CSV: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
# File extensions, with the reader in `datasets` and its arguments.
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", CSV),
    ".tsv": ("csv", {**CSV, "sep": "\t"}),
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


def files_below(root: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield the files below a directory, also those in linked directories, without hidden ones.

    Args:
        root: Directory.
        above: Directories that contain it: a link to one of them is not followed.
    """
    inside = above | {root.resolve()}
    for path in sorted(root.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if path.resolve() not in inside:
                yield from files_below(path, inside)
        elif path.is_file():
            yield path


def read_tables(files: dict[str, list[Path]], beside: Sequence[Path] = (), **hub: Any) -> DatasetDict:
    """Read the tables of each split. File names may have any character. Values are names as they are written.

    Args:
        files: Paths by split.
        beside: Other tables of the dataset, whose columns have the same types.
        hub: Keyword arguments of `datasets.load_dataset`, such as `cache_dir`.

    Raises:
        ValueError: The files have different formats, or a file cannot be read; the message names it, with the row where
            that is known.
    """
    suffixes = sorted({path.suffix.lower() for paths in files.values() for path in paths})
    reader, settings = TABLES[suffixes[0]]
    if any(TABLES[suffix] != (reader, settings) for suffix in suffixes):
        raise ValueError(f"the files have the formats {', '.join(suffixes)}: use the same format for all files.")
    every = [path for paths in files.values() for path in paths]
    separator = settings.get("sep", ",")
    names = sorted(set().union(*(check_table(path, separator) for path in (*every, *beside))))
    if names and reader == "csv":
        settings = {**settings, "converters": dict.fromkeys(names, _as_written)}
    patterns = {split: [glob.escape(str(path)) for path in paths] for split, paths in files.items()}
    try:
        with _quiet():
            if names and reader == "json":
                types = Features.from_arrow_schema(json_schema([*every, *beside]))
                data = DatasetDict({split: _read_json(paths, types, **hub) for split, paths in files.items()})
            else:
                data = load_dataset(reader, data_files=patterns, **settings, **hub)
    except (DatasetsError, ArrowException, ValueError, TypeError, OSError, StopIteration) as error:
        raise ValueError(_reason(files, separator, error)) from error
    assert isinstance(data, DatasetDict)
    for split, rows in data.items():
        if not len(rows):
            raise ValueError(_without_rows(files[str(split)]))
    return data


def _as_written(cell: str) -> str | None:
    return cell or None


def _read_json(paths: Sequence[Path], types: Features, **hub: Any) -> Dataset:
    """Read JSON files without the conversion of dates by Arrow. The files' times are part of the key of the cache."""
    files = tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths)
    given = {"files": files, "names": tuple(types)}
    return cast(Dataset, Dataset.from_generator(_json_rows, features=types, gen_kwargs=given, **hub))


def _json_rows(files: Sequence[tuple[str, int, int]], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    return json_table([Path(name) for name, _, _ in files], names)


def _without_rows(paths: list[Path]) -> str:
    return f"{', '.join(map(str, paths))} has no rows: add rows."


def _reason(files: dict[str, list[Path]], separator: str, error: Exception) -> str:
    """Return the reason why tables cannot be read, with the file that is the cause."""
    every = [path for paths in files.values() for path in paths]
    for path in every:
        found = problem(path, separator)
        if found is not None:
            return f"{path} cannot be read ({found}): correct or remove it."
    empty = re.search(r'Instruction "(.*)" corresponds to no data', str(error))
    if empty is not None:
        return _without_rows(files.get(empty[1], every))
    names = [columns(path, separator) for path in every]
    other = next((i for i, found in enumerate(names) if found != names[0]), None)
    if other is not None:
        return (
            f"{every[0]} has the columns {', '.join(names[0]) or 'none'}, and {every[other]} has "
            f"{', '.join(names[other]) or 'none'}: use the same columns in all files."
        )
    cause = " ".join(str(error.__cause__ or error).split())
    return f"{', '.join(map(str, every[:3]))} cannot be read as one table: {cause[:200]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Disable what `datasets` logs about errors, and the request that counts each loading, also of local files."""
    counts, verbosity = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, datasets.logging.get_verbosity()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        datasets.logging.set_verbosity(verbosity)


def find_metadata(folder: Path) -> list[Path]:
    """Return the tables `metadata` in a directory."""
    return [path for path in sorted(folder.iterdir()) if path.stem == "metadata" and path.suffix.lower() in TABLES]


def read_metadata(folder: Path) -> Dataset | None:
    """Read the table `metadata` in a directory of images, such as `metadata.csv`; None if there is none.

    Raises:
        ValueError: There are several, or the table cannot be read.
    """
    found = find_metadata(folder)
    if len(found) > 1:
        raise ValueError(f"{folder} has several tables {', '.join(path.name for path in found)}: keep one of them.")
    return read_tables({"train": found[:1]})["train"] if found else None
