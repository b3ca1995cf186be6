"""Labels of a dataset, checked before training where that is cheap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn

from ..locations.modes import restore_random_state
from ..locations.probe_inputs import num_labels_of
from ..wrapping.labels import convert_labels, label_kind

SCALAR_TYPES = ("int", "uint", "bool", "float", "string", "large_string")
STACKING = ("default_data_collator", "DefaultDataCollator", "DataCollatorWithPadding")  # these pad no labels
LABEL_NAMES = ("labels", "label", "label_ids")  # in the order of Transformers' collators


def check_dataset_labels(dataset: Any, model: nn.Module, collator: Callable[..., Any]) -> None:
    """Raise a ValueError for labels that do not fit the model, now and not only when their mini-batch is drawn.

    Datasets of `datasets` and lists are read, if they have one label per row and no transform; of others, the first row
    is. Strings, missing labels and examples without names are errors with Transformers' collators only; another
    collator may convert them. Class indices are errors if the collator keeps those of the first rows.
    """
    module = getattr(collator, "__module__", None) or type(collator).__module__  # None for functions of C
    is_plain = module.startswith("transformers.")
    if is_plain and getattr(collator, "__name__", type(collator).__name__) in STACKING:
        check_lengths(dataset)
    name, labels = read_labels(dataset)
    if name is None and is_plain:
        row = _first_item(dataset)
        if isinstance(row, (tuple, list, torch.Tensor)):
            raise ValueError(
                f"The training data have a {type(row).__name__} for each example: give a data_collator that makes a "
                "dictionary with the inputs of the model and `labels`, or let each example be such a dictionary."
            )
        name, labels = read_labels([row])
    if name is None or not labels:
        return
    error = find_label_error(name, labels) if is_plain else None
    if error is not None:
        raise ValueError(error)
    types = (int, float) if is_plain else (int,)
    if not all(isinstance(label, types) for label in labels):
        return
    try:
        _check_classes(dataset, name, labels, model)
    except ValueError:
        if is_plain or _keeps(collator, dataset, labels):  # a user's collator is called only to decide on an error
            raise


def _check_classes(dataset: Any, name: str, labels: list[Any], model: nn.Module) -> None:
    """Raise a ValueError for labels that are no classes of the model."""
    num_labels = num_labels_of(model)
    classes = getattr((getattr(dataset, "features", None) or {}).get(name), "names", None) or []
    if len(classes) == 1 and num_labels == 1:
        raise ValueError(
            f"The dataset has a single class in its column {name!r}, {classes[0]!r}, and {type(model).__name__} has "
            "one output, which is a regression: a classification needs at least 2 classes."
        )
    if len(classes) > num_labels and max(labels) >= num_labels:
        raise ValueError(
            f"The dataset has {len(classes)} classes in its column {name!r} and {type(model).__name__} has only "
            f"{num_labels} labels: build the model with num_labels={len(classes)}."
        )
    column = torch.tensor(labels)
    convert_labels(column, label_kind(model, column))


def _keeps(collator: Callable[..., Any], dataset: Any, labels: list[Any]) -> bool:
    """Return True if a collator returns the labels of the first rows as they are in the dataset."""
    try:
        with restore_random_state():
            rows = [dataset[i] for i in range(min(4, len(labels)))]
            return bool(torch.as_tensor(collator(rows)["labels"]).tolist() == labels[: len(rows)])
    except Exception:  # any error of the dataset or the collator, which the data loader reports
        return False


def check_lengths(dataset: Any) -> None:
    """Raise a ValueError for lists of labels of different lengths, which cannot be stacked to a mini-batch."""
    name, lengths = _label_lengths(dataset)
    if name is None or len(set(lengths)) < 2:
        return
    row = next(i for i, length in enumerate(lengths) if length != lengths[0])
    raise ValueError(
        find_label_error(name, lengths)
        or f"The labels in the column {name!r} of the training data have {lengths[0]} entries in row 0 and "
        f"{lengths[row]} in row {row}: give one entry for each class."
    )


def _label_lengths(dataset: Any) -> tuple[str | None, list[int | None]]:
    """Return the name of a column of lists and their lengths; None and [] if there is none that can be read cheaply."""
    name, labels = read_labels(dataset) if isinstance(dataset, (list, tuple)) else (None, [])
    if name is not None:
        lists = all(label is None or isinstance(label, (list, tuple)) for label in labels)
        return (name, [None if label is None else len(label) for label in labels]) if lists else (None, [])
    features = getattr(dataset, "features", None) or {}
    name = next((n for n in LABEL_NAMES if n in features), None)
    if name is None or (getattr(dataset, "format", None) or {}).get("type") == "custom":
        return None, []
    try:
        column = dataset.with_format("arrow", columns=[name])[:][name]
    except (TypeError, AttributeError):  # a stream cannot be read ahead
        return None, []
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return None, []
    return name, pc.list_value_length(column).to_pylist()


def read_labels(dataset: Any) -> tuple[str | None, list[Any]]:
    """Return the name and the values of a dataset's label column; None and [] if they cannot be read cheaply.

    Example:
        >>> read_labels([{"text": "yes", "label": 1}, {"text": "no", "label": None}])
        ('label', [1, None])
    """
    if isinstance(dataset, (list, tuple)) and dataset and all(isinstance(row, Mapping) for row in dataset):
        name = next((n for n in LABEL_NAMES if n in dataset[0]), None)
        return name, [] if name is None else [row.get(name) for row in dataset]
    features = getattr(dataset, "features", None) or {}
    name = next((n for n in LABEL_NAMES if n in features), None)
    is_transformed = (getattr(dataset, "format", None) or {}).get("type") == "custom"
    if name is None or is_transformed or not str(getattr(features[name], "dtype", "")).startswith(SCALAR_TYPES):
        return None, []
    try:
        return name, dataset.with_format("arrow", columns=[name])[:][name].to_pylist()
    except (TypeError, AttributeError):  # a stream cannot be read ahead
        return None, []


def iterate_labels(dataset: Any) -> Iterator[Any]:
    """Yield the labels of a training dataset; those of every row, read one by one, if there is no column of labels.

    A column is one that [`read_labels`] reads, or `targets` of torchvision's datasets.

    Raises:
        ValueError: The dataset is a stream, or a row has no labels.
    """
    column: Any = read_labels(dataset)[1] or getattr(dataset, "targets", None)
    if column is not None:
        yield from column
        return
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f'class_weights="balanced" needs a training dataset whose labels can be read ahead, and got '
            f"{type(dataset).__name__}: give one number for each class."
        )
    with restore_random_state():
        for i in range(len(dataset)):
            row = dataset[i]
            name = next((n for n in LABEL_NAMES if n in row), None)
            if name is None:
                raise ValueError(f'class_weights="balanced" needs labels, and row {i} has only {", ".join(row)}.')
            yield row[name]


def find_label_error(name: str, labels: list[Any]) -> str | None:
    """Return a sentence about the first missing label or string among labels, or None."""
    for row, label in enumerate(labels):
        if label is None:
            return (
                f"The label of row {row} is None in the column {name!r} of the training data: remove such rows, or set "
                "their label to -100 to ignore it."
            )
        if isinstance(label, str):
            return (
                f"The labels in the column {name!r} of the training data are strings, and that of row {row} is "
                f"{label!r}: convert them to integers from 0, for example with "
                f"dataset.class_encode_column({name!r})."
            )
    return None


def missing_labels_message(dataset: Any, model_name: str) -> str:
    """Return a sentence about why the mini-batches have no labels."""
    row = first_row(dataset)
    name = next((n for n in LABEL_NAMES if n in row), None)
    found = None if name is None else find_label_error(name, [row[name]])
    if found is not None:
        return found
    columns = f" The first row has {', '.join(map(repr, row))}." if row else ""
    return f"The batch for {model_name} has no labels. Mixing needs a column named `labels` (or `label`).{columns}"


def first_row(dataset: Any) -> Mapping[str, Any]:
    """Return the first row of a dataset, without a change of the random state; an empty one if there is none."""
    row = _first_item(dataset)
    return row if isinstance(row, Mapping) else {}


def _first_item(dataset: Any) -> Any:
    try:
        with restore_random_state():
            return dataset[0]
    except Exception:  # any error of the dataset, which the data loader reports
        return None
