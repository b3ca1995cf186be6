"""The classes of a dataset: labels of all splits as indices of the classes of the training split."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict

from .image_columns import kind_of

logger = logging.getLogger(__name__)


def as_classes(data: DatasetDict, label: str) -> DatasetDict:
    """Convert labels to the class indices of the training split.

    The classes of strings and numbers are the sorted labels of the training split, those of booleans "false" and
    "true". Splits with a `ClassLabel` are matched by the names of the classes, whose order may differ between files.

    Args:
        data: Splits of a dataset.
        label: Name of the column with labels.

    Raises:
        ValueError: The labels are not classes or of different types, a label is missing, or a split has labels that the
            training split does not have.
    """
    feature = data["train"].features[label]
    for split, rows in data.items():
        if label not in rows.column_names:
            raise ValueError(
                f"The split {split!r} has no column {label!r}; its columns are {', '.join(rows.column_names)}: use the "
                "same columns in all splits."
            )
        if kind_of(rows.features[label]) != kind_of(feature):
            raise ValueError(
                f"The column {label!r} is {feature} in the split 'train', and {rows.features[label]} in {split!r}: use "
                "one type of labels in all splits."
            )
        check_complete(split, label, rows[label], "labels")
    if isinstance(feature, ClassLabel):
        return DatasetDict({split: _as_classes_of(rows, split, label, feature) for split, rows in data.items()})
    if kind_of(feature) not in ("string", "number", "bool"):
        raise ValueError(
            f"The column {label!r} must have one class per example, but its feature is {feature}: convert it to "
            "strings or integers."
        )
    for split, rows in data.items():
        part = next((y for y in set(rows[label]) if isinstance(y, float) and not y.is_integer()), None)
        if part is not None:
            raise ValueError(
                f"The column {label!r} of the split {split!r} has the label {part}, which is no class: use integers or "
                "names."
            )
    values = {split: [int(y) if isinstance(y, float) else y for y in rows[label]] for split, rows in data.items()}
    found = sorted(set(values["train"]))
    known, names = set(found), [class_name(value) for value in found]
    for split in data:
        other = sorted({class_name(value) for value in set(values[split]) - known if value != -1})
        if other:
            raise ValueError(
                f"The split {split!r} has classes that the training split does not: {', '.join(other[:5])}."
            )
    index = {value: i for i, value in enumerate(found)}
    return DatasetDict(
        {s: relabel(rows, label, [index.get(v, -1) for v in values[s]], names) for s, rows in data.items()}
    )


def class_name(value: Any) -> str:
    """Return the name of the class of a label. Booleans are "true" and "false", as in JSON.

    Example:
        >>> class_name(True), class_name(3), class_name("True")
        ('true', '3', 'True')
    """
    return str(value).lower() if isinstance(value, bool) else str(value)


def _as_classes_of(rows: Dataset, split: str, label: str, feature: ClassLabel) -> Dataset:
    """Return rows whose `ClassLabel` has the classes of another one, matched by name."""
    names = rows.features[label].names
    if names == feature.names:
        return rows
    used = {names[y] for y in set(rows[label]) if y >= 0}
    other = sorted(used - set(feature.names))
    if other:
        raise ValueError(f"The split {split!r} has classes that the training split does not: {', '.join(other[:5])}.")
    index = {names.index(name): feature.names.index(name) for name in used}
    return relabel(rows, label, [index.get(y, -1) for y in rows[label]], feature.names)


def check_complete(split: str, column: str, values: Sequence[Any], what: str) -> None:
    """Raise a ValueError that names the first row without a value.

    Args:
        split: Name of the split, for the message.
        column: Name of the column, for the message.
        values: The values of the column.
        what: "labels", of which empty ones are missing, or "texts".
    """
    missing = [i for i, value in enumerate(values) if value is None or (what == "labels" and value == "")]
    if missing:
        raise ValueError(
            f"The column {column!r} of the split {split!r} is empty in {len(missing)} rows, the first of which is row "
            f"{missing[0]}: add the {what} or remove the rows."
        )


def relabel(rows: Dataset, label: str, labels: Sequence[int], names: Sequence[str]) -> Dataset:
    """Return rows with other class indices and class names in the column `label`."""
    return rows.remove_columns(label).add_column(label, list(labels)).cast_column(label, ClassLabel(names=list(names)))


def leave_out(
    parts: dict[str, Dataset], label: str, names: list[str], unknown: Sequence[str]
) -> tuple[dict[str, Dataset], Dataset, list[str]]:
    """Return the splits without the unknown classes, the test examples of these, and the names of the other classes."""
    wrong = [name for name in unknown if name not in names]
    if wrong:
        raise ValueError(f"--ood_classes has {wrong[0]!r}, but the classes are {', '.join(names[:20])}.")
    kept = [i for i, name in enumerate(names) if name not in unknown]
    if len(kept) < 2:
        raise ValueError(f"--ood_classes leaves {len(kept)} of {len(names)} classes: at least two must remain.")
    index = {old: new for new, old in enumerate(kept)}
    known_names = [names[i] for i in kept]
    known: dict[str, Dataset] = {}
    for split, rows in parts.items():
        labels = np.asarray(rows[label])
        inside = np.flatnonzero(np.isin(labels, kept))
        known[split] = relabel(rows.select(inside), label, [index[int(y)] for y in labels[inside]], known_names)
    outside = np.flatnonzero(~np.isin(np.asarray(parts["test"][label]), kept))
    ood = parts["test"].select(outside).remove_columns(label).add_column(label, [-100] * len(outside))
    return known, ood, known_names


def report_similar_classes(names: Sequence[str]) -> None:
    """Log a warning that names classes which differ only in spaces or in the encoding of accents."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(" ".join(unicodedata.normalize("NFC", name).split()), []).append(name)
    similar = next((same for same in found.values() if len(same) > 1), None)
    if similar is not None:
        logger.warning(
            "The classes %s differ only in spaces or the encoding of accents: use one spelling if they are the same.",
            " and ".join(map(ascii, similar)),
        )


def report_unknown_classes(parts: dict[str, Dataset], label: str, names: Sequence[str]) -> None:
    """Log a warning that names the classes without training examples."""
    known = set(parts["train"][label])
    for split in ("validation", "test"):
        unknown = sorted({y for y in parts[split][label] if y is not None and y >= 0} - known)
        if unknown:
            shown = ", ".join(names[y] for y in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            logger.warning(
                "The split %r has %d classes without training examples, which the model cannot learn: %s.",
                split, len(unknown), shown,
            )  # fmt: skip
