"""Training, validation and test examples of a data set, its classes, and whether it is of images or text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset

from ..methods.base import nearest
from .offline import OFFLINE, load_offline


@dataclass
class DataOptions:
    """Which examples."""

    dataset_name: str | None = field(
        default=None, metadata={"help": f"Hub name, directory, or offline: {', '.join(OFFLINE)}."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_dir: str | None = field(default=None, metadata={"help": "In its place: a folder with a folder a class."})
    validation_dir: str | None = field(default=None, metadata={"help": "Likewise, to validate on."})
    test_dir: str | None = field(default=None, metadata={"help": "Likewise, to test on."})
    test_split: str = field(default="test", metadata={"help": "The split that is tested on, once, at the end."})
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of the training set to validate on, without a split for it."}
    )
    image_column_name: str | None = field(default=None, metadata={"help": "Default: the one with images."})
    text_column_names: list[str] | None = field(
        default=None, metadata={"help": "One or two. Default: those with text."}
    )
    label_column_name: str | None = field(default=None, metadata={"help": "Default: label, labels, or the classes."})
    augmentation: str = field(
        default="none", metadata={"help": "Of training images: none, crop, crop_flip, randaugment."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Cut texts to so many tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "So many only."})
    max_validation_samples: int | None = field(default=None, metadata={"help": "So many only."})
    max_test_samples: int | None = field(default=None, metadata={"help": "So many only."})
    ood_dataset_name: str | None = field(
        default=None, metadata={"help": "Another data set: is it told from this one as unknown?"}
    )
    ood_classes: list[str] | None = field(
        default=None, metadata={"help": "Classes to leave out of the training, and to recognise as unknown."}
    )


@dataclass
class Splits:
    """A data set that is ready to be prepared for a model.

    Attributes:
        kind: "image" or "text".
        train: Rows with `inputs` and `label`.
        validation: Likewise.
        test: Likewise.
        ood: Rows with `inputs` of unknown classes, or None.
        inputs: The columns with the image or the texts.
        label: The column with class indices.
        class_names: Of all classes.
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
    """The examples that the options name, always divided the same way.

    Raises:
        ValueError: The data set has no test split, no such column, or labels that do not make classes; the message says
            which option helps.
    """
    data = _load(options.dataset_name, options.dataset_config_name, options, **hub)
    if options.test_split not in data or options.test_split == "train":
        others = [split for split in data if split != "train"]
        hint = f"--test_split {others[0]}" if others else "another data set, or --test_dir with a folder of test images"
        raise ValueError(
            f"There is no split {options.test_split!r} to test on: the data set has {', '.join(data)}. Examples that are "
            f"trained on or chosen by say nothing: give {hint}"
            + (" (a share of the training set is then validated on, --train_val_split)." if others else ".")
        )
    if "train" not in data:
        raise ValueError(f"There is no split 'train' to train on: the data set has {', '.join(data)}.")
    label = _label_column(data["train"], options.label_column_name)
    data = as_classes(data, label)
    kind, inputs = input_columns(data["train"], options, label)
    names = data["train"].features[label].names
    parts = _divide(data, options)
    for split, most in (
        ("train", options.max_train_samples), ("validation", options.max_validation_samples),
        ("test", options.max_test_samples),
    ):  # fmt: skip
        if most is not None and most < len(parts[split]):
            parts[split] = parts[split].shuffle(seed=0).select(range(most))
    for split, rows in parts.items():
        labels = np.asarray(rows[label])
        if len(labels) and (labels < 0).all():
            raise ValueError(
                f"The labels of the split {options.test_split if split == 'test' else split!r} are not given away (all are "
                f"{labels[0]}): choose another one to test on, such as --test_split validation."
            )
    ood = None
    if options.ood_classes:
        parts, ood, names = _leave_out(parts, label, names, options.ood_classes)
    if options.ood_dataset_name is not None:
        other = _load(options.ood_dataset_name, None, None, **hub)
        rows = other["test"] if "test" in other else other[next(iter(other))]
        other_kind, other_inputs = input_columns(rows, DataOptions(), None)
        if (other_kind, len(other_inputs)) != (kind, len(inputs)):
            raise ValueError(
                f"--ood_dataset_name {options.ood_dataset_name} is of {other_kind}s and the data of {kind}s."
            )
        renamed = rows.select_columns(other_inputs).rename_columns(dict(zip(other_inputs, inputs, strict=True)))
        ood = renamed.add_column(label, [-100] * len(rows))
        if options.max_test_samples is not None and options.max_test_samples < len(ood):
            ood = ood.shuffle(seed=0).select(range(options.max_test_samples))
    return Splits(kind, parts["train"], parts["validation"], parts["test"], ood, inputs, label, list(names))


def _load(name: str | None, config: str | None, options: DataOptions | None, **hub: Any) -> DatasetDict:
    if name in OFFLINE:
        return load_offline(str(name))
    if name is not None:
        try:
            data = load_dataset(name, config, **hub)
        except OSError as error:
            if Path(name).exists():
                raise
            raise ValueError(
                f"There is no data set {name!r}{nearest(name, OFFLINE)}: it is no directory here, not one of the offline ones "
                f"({', '.join(OFFLINE)}), and the Hub did not give it: {' '.join(str(error).split())}"
            ) from error
        return data if isinstance(data, DatasetDict) else DatasetDict(train=data)
    folders = {} if options is None else {
        "train": options.train_dir, "validation": options.validation_dir, "test": options.test_dir
    }  # fmt: skip
    files = {split: str(Path(folder) / "**") for split, folder in folders.items() if folder is not None}
    if "train" not in files:
        raise ValueError(f"Say what to train on: --dataset_name (offline: {', '.join(OFFLINE)}) or --train_dir.")
    return load_dataset("imagefolder", data_files=files)


def _divide(data: DatasetDict, options: DataOptions) -> dict[str, Dataset]:
    validation = next((s for s in ("validation", "valid", "dev") if s in data and s != options.test_split), None)
    if validation is not None:
        return {"train": data["train"], "validation": data[validation], "test": data[options.test_split]}
    if not 0 < options.train_val_split < 1:
        raise ValueError(f"--train_val_split must lie between 0 and 1, but is {options.train_val_split}.")
    parts = data["train"].train_test_split(options.train_val_split, seed=0)
    return {"train": parts["train"], "validation": parts["test"], "test": data[options.test_split]}


def _label_column(rows: Dataset, given: str | None) -> str:
    found = [given] if given is not None else [name for name in ("label", "labels") if name in rows.column_names]
    found += [name for name, feature in rows.features.items() if isinstance(feature, ClassLabel)]
    if not found or found[0] not in rows.column_names:
        wrong = "" if given is None else f"--label_column_name is {given!r}, and "
        raise ValueError(
            f"{wrong}the data set has the columns {', '.join(rows.column_names)}: give --label_column_name."
        )
    return found[0]


def input_columns(rows: Dataset, options: DataOptions, label: str | None) -> tuple[str, list[str]]:
    """Whether the inputs are images or text, and the columns with them.

    Raises:
        ValueError: The options name columns that are not there, or none shows itself.
    """
    columns = rows.column_names
    named = [options.image_column_name] if options.image_column_name else options.text_column_names
    if named:
        missing = [name for name in named if name not in columns]
        if missing:
            raise ValueError(
                f"The data set has no column {missing[0]!r}, only {', '.join(columns)}: choose one of them."
            )
        return "image" if options.image_column_name else "text", list(named)
    images = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    if images:
        return "image", images[:1]
    texts = [n for n, f in rows.features.items() if isinstance(f, Value) and "string" in f.dtype and n != label]
    usual = [name for name in ("text", "sentence") if name in texts]
    if usual or len(texts) in (1, 2):
        return "text", usual[:1] or texts
    raise ValueError(
        f"It is not clear which columns of {', '.join(columns)} to classify: give --image_column_name or "
        "--text_column_names (one, or two for pairs)."
    )


def as_classes(data: DatasetDict, label: str) -> DatasetDict:
    """The same classes in all splits, where the labels are words or numbers: those of the training set, sorted.

    Raises:
        ValueError: The labels are no classes, or a split has some that the training set has not.
    """
    feature = data["train"].features[label]
    if isinstance(feature, ClassLabel):
        return data
    if not (
        isinstance(feature, Value) and ("string" in feature.dtype or "int" in feature.dtype or feature.dtype == "bool")
    ):
        raise ValueError(f"The labels in the column {label!r} are {feature}: a comparison needs one class an example.")
    found = sorted(set(data["train"][label]))
    known, names = set(found), [str(value) for value in found]
    for split, rows in data.items():
        other = sorted({str(value) for value in set(rows[label]) - known if value != -1})
        if other:
            raise ValueError(f"The split {split!r} has classes that the training set does not: {', '.join(other[:5])}.")
    where = {value: i for i, value in enumerate(found)}
    return DatasetDict(
        {s: _relabelled(rows, label, [where.get(v, -1) for v in rows[label]], names) for s, rows in data.items()}
    )


def _relabelled(rows: Dataset, label: str, labels: Sequence[int], names: Sequence[str]) -> Dataset:
    return rows.remove_columns(label).add_column(label, list(labels)).cast_column(label, ClassLabel(names=list(names)))


def _leave_out(
    parts: dict[str, Dataset], label: str, names: list[str], unknown: Sequence[str]
) -> tuple[dict[str, Dataset], Dataset, list[str]]:
    """Splits without some classes, the test examples of these, and the names of the rest."""
    wrong = [name for name in unknown if name not in names]
    if wrong:
        raise ValueError(f"--ood_classes has {wrong[0]!r}, and the classes are {', '.join(names[:20])}.")
    kept = [i for i, name in enumerate(names) if name not in unknown]
    if len(kept) < 2:
        raise ValueError(f"--ood_classes leaves {len(kept)} of {len(names)} classes to train on: leave two at least.")
    where = {old: new for new, old in enumerate(kept)}
    known: dict[str, Dataset] = {}
    rest = [names[i] for i in kept]
    ood = None
    for split, rows in parts.items():
        labels = np.asarray(rows[label])
        inside = np.flatnonzero(np.isin(labels, kept))
        known[split] = _relabelled(rows.select(inside), label, [where[int(y)] for y in labels[inside]], rest)
        if split == "test":
            outside = np.flatnonzero(~np.isin(labels, kept))
            ood = rows.select(outside).remove_columns(label).add_column(label, [-100] * len(outside))
    assert ood is not None
    return known, ood, rest


def align(splits: Splits, label2id: dict[str, int]) -> Splits:
    """The same examples, classes counted as a trained model counts them.

    Raises:
        ValueError: The model and the data set do not have the same number of classes.
    """
    if len(label2id) != len(splits.class_names):
        raise ValueError(
            f"The model tells {len(label2id)} classes apart and the data set has {len(splits.class_names)}: they do not "
            "belong together (with --ood_classes, give the same classes as in training)."
        )
    if set(label2id) != set(splits.class_names):
        return splits
    names = sorted(label2id, key=lambda name: label2id[name])
    if names == splits.class_names:
        return splits
    for split in ("train", "validation", "test"):
        rows = getattr(splits, split)
        labels = [label2id[splits.class_names[y]] for y in rows[splits.label]]
        setattr(splits, split, _relabelled(rows, splits.label, labels, names))
    splits.class_names = names
    return splits
