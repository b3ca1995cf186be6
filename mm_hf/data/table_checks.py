"""Checks of the files of tables: what a reader rejects without naming it, and what it reads wrongly in silence."""

from __future__ import annotations

import codecs
import contextlib
import csv
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from pyarrow import parquet

CSV = (".csv", ".tsv")
TEXT = (*CSV, ".json", ".jsonl", ".ndjson")
# Numbers such as 007, +1, 1e5 and inf, integers of more than 64 bits, and booleans: pandas changes their spelling or
# rejects them.
CHANGED_BY_PANDAS = re.compile(
    r"\s*([+-]?0[0-9]+|\+[0-9.]+|-?[0-9]{20,}|[+-]?[0-9.]+e[+-]?[0-9]+|[+-]?inf(inity)?|true|false)\s*", re.IGNORECASE
)
CHANGED_BY_ARROW = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}([ T].{0,30})?")  # dates, which become timestamps
NO_WORDS = re.compile(rf"{CHANGED_BY_PANDAS.pattern}|{CHANGED_BY_ARROW.pattern}|[\s\d.,:+-]*", CHANGED_BY_PANDAS.flags)
JSON_TYPES = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
UNCLOSED = "a quote is never closed; double the quotes inside a field, and enclose the field in quotes"
TEXT_AFTER_QUOTE = (
    "text follows a closing quote; enclose the complete field in quotes, and double the quotes inside it, as in "
    '"He said ""yes"" again"'
)
ROWS_QUOTED = 'a quoted field contains other rows; write a field that is one quote as """"'
CHUNK = 10_000  # rows
END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream of Arrow
SEPARATORS = (",", ";", "\t", "|")
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # the first is also the beginning of UTF-32's


def check_table(path: Path, separator: str = ",") -> set[str]:
    """Check a file before it is read: that it has content, that text is UTF-8, and what its reader would misread.

    Args:
        path: A file.
        separator: Separator of the fields of a CSV file.

    Returns:
        The columns with values whose spelling the reader would change, such as 007 and True in a CSV file and dates in
        a JSON file. They are names of classes or files, and are read as text.

    Raises:
        ValueError: It is empty, has another encoding or NUL bytes. A CSV file has another separator, two columns with
            one name, a row with more fields than there are columns, or quotes that pandas would misread. The rows of a
            JSON file are no objects, or have a field of several types, which `datasets` would convert to JSON strings,
            or an integer of more than 64 bits. An Arrow stream has no end.
    """
    suffix = path.suffix.lower()
    if suffix in TEXT:
        check_text(path)
    elif not path.stat().st_size:
        raise ValueError(f"{path} is empty: add rows or remove it.")
    if suffix in CSV:
        return _check_csv(path, separator)
    if suffix in TEXT:
        return _check_json(path)
    if suffix == ".arrow":
        check_arrow(path)
    return set()


def check_text(path: Path) -> None:
    """Check that a file is UTF-8 text, with or without a byte order mark.

    Raises:
        ValueError: It is empty, has another encoding or NUL bytes. The message names the line.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line, is_blank = 1, True
    with path.open("rb") as file:
        if file.read(2) in UTF_16:
            raise ValueError(f"{path} is UTF-16 text: save it as UTF-8.")
        file.seek(0)
        while part := file.read(2**20):
            zero = part.find(0)
            if zero >= 0:
                line += part.count(b"\n", 0, zero)
                raise ValueError(
                    f"{path} has a NUL byte in line {line}, as damaged files and UTF-16 text have: save it as UTF-8 "
                    "text."
                )
            try:
                is_blank = not decoder.decode(part).strip() and is_blank
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise ValueError(
                    f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x} in line {line}): save it as "
                    "UTF-8, such as from Latin-1 with iconv -f latin1 -t utf-8."
                ) from error
            line += part.count(b"\n")
    if is_blank:
        raise ValueError(f"{path} is empty: add rows or remove it.")
    if decoder.getstate()[0]:
        raise ValueError(f"{path} ends in an incomplete character in line {line}: copy the complete file.")


def _check_csv(path: Path, separator: str) -> set[str]:
    """Check the rows of a CSV file; return the columns that pandas would change."""
    changed: set[str] = set()
    names: list[str] = []
    line, problem = 1, None
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter=separator, strict=True)
            for row in rows:
                if not names:
                    names = row
                    _check_names(path, names, separator)
                problem = _row_problem(row, len(names), separator)
                if problem is not None:
                    break
                changed.update(name for name, value in zip(names, row) if CHANGED_BY_PANDAS.fullmatch(value))
                line = rows.line_num + 1
    except csv.Error as error:
        problem = UNCLOSED if "end of data" in str(error) else TEXT_AFTER_QUOTE
    finally:
        csv.field_size_limit(limit)
    if problem is not None:
        raise ValueError(f"{path} has a damaged row in line {line}: {problem}.")
    return changed


def _check_names(path: Path, names: list[str], separator: str) -> None:
    """Raise a ValueError if the fields of the first line have another separator, or two columns have one name."""
    other = next((s for s in SEPARATORS if len(names) == 1 and s != separator and s in names[0]), None)
    if other is not None:
        raise ValueError(
            f"{path} has one column, {names[0][:100]!r}: separate the fields with {separator!r} in place of {other!r}"
            + (", or name the file .tsv." if other == "\t" else ".")
        )
    double = next((name for i, name in enumerate(names) if name and name in names[:i]), None)
    if double is not None:
        raise ValueError(f"{path} has several columns with the name {double!r}: rename or remove all but one.")


def _row_problem(row: list[str], columns: int, separator: str) -> str | None:
    if len(row) > columns:
        return (
            f"it has {len(row)} fields, but the table has {columns} columns; quote fields that contain {separator!r}, "
            "and name each column in the first line"
        )
    rows_inside = re.compile(rf"{separator}.*[{separator}\r\n]|[\r\n].*{separator}", re.DOTALL)
    return ROWS_QUOTED if any("\n" in value and rows_inside.fullmatch(value) for value in row) else None


def _check_json(path: Path) -> set[str]:
    """Check the rows of a JSON file; return the columns that Arrow would change."""
    changed: set[str] = set()
    found: dict[str, tuple[str, str]] = {}
    for place, row in _json_rows(path):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path} has no JSON object in {place}: write each row as an object, with names and values."
            )
        for name, value in row.items():
            kind = JSON_TYPES.get(type(value))
            first, where = found.setdefault(name, (kind, place)) if kind is not None else (None, place)
            if kind != first:
                raise ValueError(
                    f"{path} has {first} in {where} and {kind} in {place} as {name!r}: use one type for all rows."
                )
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ValueError(
                    f"{path} has an integer of more than 64 bits in {place} as {name!r}: write it as a string."
                )
            if isinstance(value, str) and CHANGED_BY_ARROW.fullmatch(value):
                changed.add(name)
    return changed


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of each row of JSON lines, or of one JSON array."""
    with path.open(encoding="utf-8-sig") as file:
        first = next(line for line in file if line.strip())
    if path.suffix.lower() == ".json" and not first.lstrip().startswith("{"):
        rows = _parse(path, path.read_text("utf-8-sig"))
        yield from ((f"row {i}", row) for i, row in enumerate(rows if isinstance(rows, list) else [rows]))
        return
    with path.open(encoding="utf-8-sig") as file:
        yield from ((f"line {i}", _parse(path, line, i)) for i, line in enumerate(file, start=1) if line.strip())


def _parse(path: Path, text: str, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place = "" if line is None else f"line {line}: "
        raise ValueError(f"{path} is not JSON ({place}{error}): correct it, or write one object per line.") from error


def has_words(values: Iterable[str | None]) -> bool:
    """Return True if a value is another text than a number, a boolean or a date."""
    return any(value is not None and not NO_WORDS.fullmatch(value) for value in values)


def json_schema(paths: Sequence[Path]) -> pa.Schema:
    """Return the names and types of all rows of JSON files, where dates are strings."""
    rows = (row for path in paths for _, row in _json_rows(path))
    schemas = [pa.schema([])]
    while chunk := list(itertools.islice(rows, CHUNK)):
        names = dict.fromkeys(name for row in chunk for name in row)
        columns = {name: pa.array([row.get(name) for row in chunk]) for name in names}
        schemas = [pa.unify_schemas([*schemas, pa.table(columns).schema], promote_options="permissive")]
    return schemas[0]


def json_table(paths: Sequence[Path], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of JSON files, each with all names."""
    for path in paths:
        for _, row in _json_rows(path):
            yield {name: row.get(name) for name in names}


def problem(path: Path, separator: str = ",") -> str | None:
    """Return the reason why a table that `check_table` accepts cannot be read; None if it can."""
    try:
        if path.suffix.lower() in CSV:
            pd.read_csv(path, sep=separator)
        elif path.suffix.lower() not in TEXT:
            _read_binary(path)
    except (pa.ArrowException, ValueError, OSError) as error:
        return " ".join(str(error).split()).rstrip(".")
    return None


def columns(path: Path, separator: str = ",") -> list[str]:
    """Return the names of the columns of a table, sorted."""
    if path.suffix.lower() in CSV:
        return sorted(pd.read_csv(path, sep=separator, nrows=0).columns)
    if path.suffix.lower() in TEXT:
        return sorted({name for _, row in _json_rows(path) for name in row})
    return sorted(_read_binary(path).column_names)


def check_arrow(path: Path) -> None:
    """Check that a stream of Arrow is complete. Its reader takes one that ends between two batches for complete.

    Raises:
        ValueError: The stream has no end, or something follows it.
    """
    with path.open("rb") as file:
        if file.read(6) == b"ARROW1":  # a file with a table of contents at its end
            return
        file.seek(-min(len(END), path.stat().st_size), os.SEEK_END)
        if file.read() != END:
            raise ValueError(f"{path} has no end, as files that were cut: copy the complete file.")
    with contextlib.suppress(pa.ArrowException, OSError), pa.memory_map(str(path)) as stream:
        for _ in pa.ipc.open_stream(stream):
            pass
        if stream.tell() < stream.size():
            raise ValueError(f"{path} contains several streams, of which only the first is read: write one file each.")


def _read_binary(path: Path) -> pa.Table:
    if path.suffix.lower() == ".parquet":
        return parquet.read_table(path)
    with path.open("rb") as file:
        try:
            return pa.ipc.open_stream(file).read_all()
        except (OSError, pa.ArrowInvalid):
            return pa.ipc.open_file(file).read_all()
