"""Settings that a resumed training run must share with the run that wrote its checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..methods import Mixing, with_defaults
from .hub import MIXING_FILE, read_mixing_file

LABELS = ("labels", "label", "label_ids")


def training_settings(trainer: Any) -> dict[str, Any]:
    """Return the settings, beside those of the method, on which the order of examples and random numbers depend.

    Args:
        trainer: A `Trainer`.
    """
    args, dataset = trainer.args, trainer.train_dataset
    settings = {
        "per_device_train_batch_size": None if args.auto_find_batch_size else trainer._train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "num_processes": args.world_size,
        "seed": args.seed,
        "data_seed": args.data_seed,
        "num_labels": getattr(getattr(trainer.model, "config", None), "num_labels", None),
        "train_examples": len(dataset) if hasattr(dataset, "__len__") else None,
        "train_labels": _cached_labels_digest(trainer),
    }
    return {name: value for name, value in settings.items() if value is not None}


def _cached_labels_digest(trainer: Any) -> str | None:
    """Return the digest for the dataset of a trainer, which is computed once for all checkpoints."""
    cached = vars(trainer).get("_labels_digest")
    if cached is None or cached[0] is not trainer.train_dataset:
        cached = (trainer.train_dataset, labels_digest(trainer.train_dataset))
        vars(trainer)["_labels_digest"] = cached
    return cached[1]


def labels_digest(dataset: Any) -> str | None:
    """Return a short digest of the labels of a dataset in their order; None if they are not a column of integers.

    Unlike the fingerprint of a dataset, it depends neither on the directory of the data nor on functions that are
    applied to the examples.

    Example:
        >>> from datasets import Dataset
        >>> labels_digest(Dataset.from_dict({"label": [0, 1]})) == labels_digest(Dataset.from_dict({"label": [1, 0]}))
        False
    """
    features = getattr(dataset, "features", None) or {}
    name = next((name for name in LABELS if name in features), None)
    if (
        name is None
        or not hasattr(dataset, "__len__")
        or not str(getattr(features[name], "dtype", "")).startswith(("int", "uint", "bool"))
    ):
        return None
    column = dataset.with_format("numpy", columns=[name])[:][name]
    return hashlib.sha256(column.astype("int64").tobytes()).hexdigest()[:16]


def find_changes(checkpoint: str | Path, mixing: Mixing, training: Mapping[str, Any]) -> list[str]:
    """Describe each setting of a checkpoint that differs from the current one.

    A setting of the method that the checkpoint does not contain, because an earlier version wrote it, had its default.
    Other settings that it does not contain are not compared: a checkpoint of `Trainer` contains none.

    Args:
        checkpoint: The checkpoint.
        mixing: The current method.
        training: The result of [`training_settings`] for the current training run.

    Raises:
        ValueError: The checkpoint's `mixing.json` is damaged.
    """
    path = Path(checkpoint) / MIXING_FILE
    if not path.exists():
        return []
    values = read_mixing_file(path)
    current: dict[str, Any] = mixing.to_dict()
    saved = with_defaults(values["mixing"])
    if saved.get("method") != current["method"]:
        changes = [_change("method", saved.get("method"), current["method"])]
    else:
        names = dict.fromkeys([*saved, *current])
        changes = [_change(n, saved.get(n), current.get(n)) for n in names if saved.get(n) != current.get(n)]
    earlier = values.get("training")
    earlier = earlier if isinstance(earlier, dict) else {}
    both = [name for name in earlier if name in training]
    return changes + [_change(name, earlier[name], training[name]) for name in both if earlier[name] != training[name]]


def _change(name: str, saved: Any, current: Any) -> str:
    if name == "train_labels":
        return "the labels of the training examples or their order"
    return f"{name}={saved!r}, which is now {current!r}"
