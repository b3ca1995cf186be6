"""Splits of a dataset, and its input columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, DatasetsError

from ..methods.settings import nearest
from .classes import (
    as_classes,
    check_complete,
    leave_out,
    relabel,
    report_similar_classes,
    report_unknown_classes,
)
from .files import SPLITS, load_local
from .folders import load_image_folders
from .image_columns import kind_of, with_images
from .offline import OFFLINE, load_offline
from .options import DataOptions
from .table_checks import has_words
from .tables import TABLES


@dataclass
class Splits:
    """Splits, columns and classes of a dataset.

    Attributes:
        kind: "image" or "text".
        train: Training rows with the columns `inputs` and `label`.
        validation: Validation rows.
        test: Test rows.
        ood: Rows of unknown classes, or None.
        inputs: Names of the column with images, or of the one or two columns with texts.
        label: Name of the column with class indices.
        class_names: Names of all classes.
    """

    kind: str
    train: Dataset
    validation: Dataset
    test: Dataset
    ood: Dataset | None
    inputs: list[str]
    label: str
    class_names: list[str]


def load_splits(options: DataOptions, **hub: Any) -> Splits:
    """Load the dataset of the options and divide it into reproducible splits.

    Args:
        options: Data options.
        hub: Keyword arguments of `datasets.load_dataset`, such as `cache_dir` and `token`.

    Raises:
        ValueError: The dataset has no test split or lacks a column, or its labels are not classes.
    """
    data = _with_usual_names(load(options.dataset_name, options.dataset_config_name, options, **hub), options)
    if options.test_fraction is not None:
        data = _split_off_test(data, options)
    _check_splits(data, options)
    label = label_column(data["train"], options.label_column_name)
    data = with_images(as_classes(data, label), options, label)
    kind, inputs = input_columns(data["train"], options, label)
    _check_inputs(data, kind, inputs)
    names = data["train"].features[label].names
    if len(names) < 2:
        where = "the directory with one subdirectory per class" if options.train_dir else "a dataset with two classes"
        raise ValueError(f"The labels have only one class, {', '.join(names)}: give {where}.")
    parts = _divide(data, options)
    report_similar_classes(names)
    report_unknown_classes(parts, label, names)
    most = {
        "train": options.max_train_samples, "validation": options.max_validation_samples,
        "test": options.max_test_samples,
    }  # fmt: skip
    parts = {split: _limit(rows, most[split]) for split, rows in parts.items()}
    _check_labels(parts, label, options.test_split)
    ood = None
    if options.ood_classes:
        parts, ood, names = leave_out(parts, label, names, options.ood_classes)
    if options.ood_dataset_name is not None:
        ood = _load_unknown(options.ood_dataset_name, kind, inputs, label, **hub)
        ood = _limit(ood, options.max_test_samples)
    return Splits(kind, parts["train"], parts["validation"], parts["test"], ood, inputs, label, list(names))


def _check_splits(data: DatasetDict, options: DataOptions) -> None:
    """Raise a ValueError if there is no training or no test split."""
    if "train" not in data:
        raise ValueError(f"There is no split 'train'; the splits are {', '.join(data)}: rename the one for training.")
    if options.test_split not in data or options.test_split == "train":
        others = [split for split in data if split != "train"]
        hint = (
            f"--test_split {others[0]}; --train_val_split of the training set is then used for validation"
            if others
            else "--test_fraction 0.2 for a part of the training examples, or --test_dir with test images"
        )
        raise ValueError(
            f"There is no test split {options.test_split!r}; the splits are {', '.join(data)}. Examples used for "
            f"training or model selection cannot be test examples. Give {hint}."
        )


def _check_inputs(data: DatasetDict, kind: str, inputs: list[str]) -> None:
    """Raise a ValueError if a split lacks an input column, or has something else than texts in a column of texts."""
    for split, rows in data.items():
        other = next((name for name in inputs if name not in rows.column_names), None)
        if other is not None:
            raise ValueError(
                f"The split {split!r} has no column {other!r}; its columns are {', '.join(rows.column_names)}: use the "
                "same columns in all splits."
            )
        for column in inputs if kind == "text" else ():
            if kind_of(rows.features[column]) != "string":
                raise ValueError(
                    f"The column {column!r} of the split {split!r} has no texts, but {rows.features[column]}: give "
                    "--text_column_names, or use one type in all splits."
                )
            if rows.data.column(column).null_count:
                check_complete(split, column, rows[column], "texts")


def _check_labels(parts: Mapping[str, Dataset], label: str, test_split: str) -> None:
    """Raise a ValueError if a split has no labels, as the test splits of public benchmarks."""
    for split, rows in parts.items():
        labels = np.asarray(rows[label])
        if len(labels) and (labels < 0).all():
            raise ValueError(
                f"The split {test_split if split == 'test' else split!r} has no labels (all are {labels[0]}): "
                "choose another test split, such as --test_split validation."
            )


def _limit(rows: Dataset, most: int | None) -> Dataset:
    """Return at most `most` rows, drawn at random with a fixed seed."""
    return rows if most is None or most >= len(rows) else rows.shuffle(seed=0).select(range(most))


def _load_unknown(name: str, kind: str, inputs: list[str], label: str, **hub: Any) -> Dataset:
    """Return the rows of another dataset as examples of unknown classes, with the label -100."""
    data = load(name, None, None, **hub)
    rows = data["test"] if "test" in data else data[next(iter(data))]
    rows = with_images(DatasetDict(train=rows), DataOptions(name), None)["train"]
    other_kind, other_inputs = input_columns(rows, DataOptions(), None)
    if (other_kind, len(other_inputs)) != (kind, len(inputs)):
        raise ValueError(
            f"--ood_dataset_name {name} has {other_kind} inputs ({len(other_inputs)} columns), but the dataset has "
            f"{kind} inputs ({len(inputs)} columns): they must be the same."
        )
    renamed = rows.select_columns(other_inputs).rename_columns(dict(zip(other_inputs, inputs, strict=True)))
    return renamed.add_column(label, [-100] * len(rows))


def load(name: str | None, config: str | None, options: DataOptions | None, **hub: Any) -> DatasetDict:
    """Load a dataset by its name or directory, or the directories of images of the options."""
    if name in OFFLINE:
        return load_offline(str(name))
    if name is not None:
        local = load_local(name, **hub) if config is None else None
        if local is not None:
            return local
        try:
            data = load_dataset(name, config, **hub)
        except (EmptyDatasetError, DataFilesNotFoundError) as error:
            raise ValueError(
                f"The directory {name} has no data: give a directory of tables ({', '.join(TABLES)}), or one with the "
                "subdirectories train and test of images."
            ) from error
        except OSError as error:
            if Path(name).exists():
                raise
            raise ValueError(
                f"There is no dataset {name!r}{nearest(name, OFFLINE)}: it is neither a directory nor an offline "
                f"dataset ({', '.join(OFFLINE)}), and loading it from the Hub failed: {' '.join(str(error).split())}"
            ) from error
        except (DatasetsError, ValueError, StopIteration) as error:  # an empty file is a StopIteration
            reason = error.__cause__ or error if isinstance(error, DatasetsError) else error
            cause = " ".join(str(reason).split()) or "a file is empty"
            raise ValueError(f"The dataset {name} cannot be read: {cause.rstrip('.')}.") from error
        return data if isinstance(data, DatasetDict) else DatasetDict(train=data)
    folders = {} if options is None else {
        "train": options.train_dir, "validation": options.validation_dir, "test": options.test_dir
    }  # fmt: skip
    given = {split: folder for split, folder in folders.items() if folder is not None}
    if "train" not in given:
        raise ValueError(f"The dataset is missing: give --dataset_name (offline: {', '.join(OFFLINE)}) or --train_dir.")
    return load_image_folders(given)


def _with_usual_names(data: DatasetDict, options: DataOptions) -> DatasetDict:
    """Return the splits, where a split such as "Train" or "testing" has the name "train" or "test" if there is none."""
    names = {str(split): str(split) for split in data}
    for usual in ("train", "test"):
        found = [split for split in names if SPLITS.get(split.lower()) == usual and split != options.test_split]
        if usual not in names and len(found) == 1:
            names[found[0]] = usual
    return DatasetDict({names[str(split)]: rows for split, rows in data.items()})


def _split_off_test(data: DatasetDict, options: DataOptions) -> DatasetDict:
    """Return the splits with a share of each class of the training examples as the test split."""
    if options.test_split in data:
        raise ValueError(
            f"--test_fraction {options.test_fraction} requires a dataset without the split {options.test_split!r}: "
            "remove the option."
        )
    label = label_column(data["train"], options.label_column_name)
    data = as_classes(data, label)
    try:
        parts = data["train"].train_test_split(options.test_fraction, seed=0, stratify_by_column=label)
    except ValueError as error:
        raise ValueError(
            f"--test_fraction {options.test_fraction} is not possible with {len(data['train'])} training examples: "
            f"{error}"
        ) from error
    return DatasetDict({**data, "train": parts["train"], options.test_split: parts["test"]})


def _divide(data: DatasetDict, options: DataOptions) -> dict[str, Dataset]:
    validation = next((s for s in ("validation", "valid", "dev") if s in data and s != options.test_split), None)
    if validation is not None:
        return {"train": data["train"], "validation": data[validation], "test": data[options.test_split]}
    if not 0 < options.train_val_split < 1:
        raise ValueError(f"--train_val_split must be between 0 and 1, but is {options.train_val_split}.")
    parts = data["train"].train_test_split(options.train_val_split, seed=0)
    return {"train": parts["train"], "validation": parts["test"], "test": data[options.test_split]}


def label_column(rows: Dataset, given: str | None) -> str:
    """Return the name of the column with labels."""
    found = [given] if given is not None else [name for name in ("label", "labels") if name in rows.column_names]
    found += [name for name, feature in rows.features.items() if isinstance(feature, ClassLabel)]
    if not found or found[0] not in rows.column_names:
        problem = "No column with labels was found" if given is None else f"There is no column {given!r}"
        raise ValueError(f"{problem}; the columns are {', '.join(rows.column_names)}: give --label_column_name.")
    return found[0]


def input_columns(rows: Dataset, options: DataOptions, label: str | None) -> tuple[str, list[str]]:
    """Return the kind of inputs, "image" or "text", and the names of their columns.

    Args:
        rows: A split.
        options: Options that may name the columns.
        label: Name of the column with labels, or None.

    Raises:
        ValueError: The options name a column that does not exist, or the columns cannot be determined.
    """
    columns = rows.column_names
    named = [options.image_column_name] if options.image_column_name else options.text_column_names
    if named:
        missing = [name for name in named if name not in columns]
        if missing:
            raise ValueError(
                f"The dataset has no column {missing[0]!r}: choose one of its columns {', '.join(columns)}."
            )
        return "image" if options.image_column_name else "text", list(named)
    images = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    if images:
        return "image", images[:1]
    texts = [n for n, f in rows.features.items() if isinstance(f, Value) and "string" in f.dtype and n != label]
    usual = [name for name in ("text", "sentence") if name in texts]
    if not usual and len(texts) > 1:
        texts = [name for name in texts if has_words(rows[name])]
    if usual or len(texts) in (1, 2):
        return "text", usual[:1] or texts
    raise ValueError(
        f"The input columns among {', '.join(columns)} cannot be determined: give --image_column_name or "
        "--text_column_names (one, or two for pairs of texts)."
    )


def align(splits: Splits, label2id: dict[str, int]) -> Splits:
    """Change the class indices of the splits to those of a trained model.

    Args:
        splits: Splits, modified in place.
        label2id: Class indices of the model by class name. If it has other names, the splits are not changed.

    Raises:
        ValueError: The model and the dataset have different numbers of classes.
    """
    if len(label2id) != len(splits.class_names):
        raise ValueError(
            f"The model has {len(label2id)} classes, but the dataset has {len(splits.class_names)}: choose a matching "
            "dataset, or give the same --ood_classes as in training."
        )
    if set(label2id) != set(splits.class_names):
        return splits
    names = sorted(label2id, key=lambda name: label2id[name])
    if names == splits.class_names:
        return splits
    for split in ("train", "validation", "test"):
        rows = getattr(splits, split)
        labels = [label2id[splits.class_names[y]] for y in rows[splits.label]]
        setattr(splits, split, relabel(rows, splits.label, labels, names))
    splits.class_names = names
    return splits
