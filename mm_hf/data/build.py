"""Build a task for training or a comparison from the names of a dataset and a model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import DataCollatorWithPadding

from ..comparison import Task
from ..evaluation.metrics import Normalization
from ..training.pretrained import CLASSES, from_pretrained
from .images import ImageDataset, ImageTransform
from .models import image_processor, model_factory, num_channels, tokenizer
from .options import DataOptions, ModelOptions
from .splits import Splits, align, load_splits
from .text import tokenize

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test", "ood")


def build_task(
    data: DataOptions, model: ModelOptions, training_args: dict[str, Any] | None = None, *, trained: bool = False
) -> Task:
    """Build a task of image or text classification; the columns of the dataset determine which.

    Args:
        data: Data options.
        model: Model options.
        training_args: Fields of `TrainingArguments`.
        trained: The model is trained and only evaluated: use its class indices, and prepare only the test examples.

    Raises:
        ValueError: Options are missing or contradict each other.

    Example:
        >>> from mm_hf.data.splits import DataOptions
        >>> overrides = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,image_size=8," \\
        ...             "patch_size=4,num_channels=1"
        >>> task = build_task(DataOptions("digits"), ModelOptions(model_type="vit", config_overrides=overrides))
        >>> len(task.train_dataset), len(task.validation_dataset), len(task.test_dataset)
        (1144, 203, 450)
    """
    if model.model_name_or_path is None and model.model_type is None:
        raise ValueError(
            "The model is missing: give --model_name_or_path for a pretrained model, or --model_type (vit, bert, ...) "
            "to train from scratch."
        )
    splits = load_splits(data, cache_dir=model.cache_dir, token=model.token)
    make = _task_of_images if splits.kind == "image" else _task_of_texts
    if trained:
        config = from_pretrained(CLASSES[splits.kind], str(model.model_name_or_path), **model.hub).config
        splits = align(splits, {name: i for i, name in config.id2label.items()})
    settings = {
        "data": data.dataset_name or str(data.train_dir),
        "inputs": splits.kind,
        **{k: v for k, v in vars(data).items() if v is not None and k not in ("dataset_name",)},
        "pretrained": model.model_name_or_path,
        "classes": len(splits.class_names),
    }
    if data.dataset_name is None and data.train_dir is not None:
        name = Path(data.train_dir).resolve().name
    else:
        name = str(data.dataset_name).rstrip("/").rpartition("/")[2]
    common = {
        "name": name,
        "training_args": training_args or {},
        "settings": settings,
        "default_settings": vars(DataOptions()),
        "class_names": splits.class_names,
    }
    task = make(splits, data, model, common, trained)
    # Validate the training arguments early. Without arguments, create none: the last TrainingArguments of a process
    # determine its devices.
    if training_args is not None:
        task.arguments("unused", 0)
    return task


def _task_of_images(
    splits: Splits, data: DataOptions, model: ModelOptions, common: dict[str, Any], trained: bool
) -> Task:
    make = model_factory(
        "image", splits.class_names, name_or_path=model.model_name_or_path, model_type=model.model_type,
        config_overrides=model.config_overrides, ignore_mismatched_sizes=model.ignore_mismatched_sizes, **model.hub,
    )  # fmt: skip
    config = make().config
    processor = image_processor(config, model.image_processor_name or model.model_name_or_path, **model.hub)
    channels = num_channels(config)

    def rows(split: str) -> ImageDataset | None:
        found = getattr(splits, split)
        if found is None or (trained and split in ("train", "validation")):
            return None
        transform = ImageTransform(
            processor, splits.inputs[0], splits.label, augmentation=data.augmentation, num_channels=channels,
            train=split == "train" and data.augmentation != "none",
        )  # fmt: skip
        return ImageDataset(found, transform)

    train, validation, test, ood = (rows(split) for split in SPLITS)
    return Task(
        model_init=make, train_dataset=test if trained else train, validation_dataset=validation, test_dataset=test,
        ood_dataset=ood, processing_class=processor, normalization=_normalization(processor), **common,
    )  # fmt: skip


def _normalization(processor: Any) -> Normalization | None:
    """Return the normalization of an image processor; None with a warning if attacks and corruptions cannot use it."""
    try:
        return Normalization.of(processor)
    except ValueError as error:
        logger.warning("Attacks and corruptions are not evaluated: %s", str(error).split(": ")[0])
        return None


def _task_of_texts(
    splits: Splits, data: DataOptions, model: ModelOptions, common: dict[str, Any], trained: bool
) -> Task:
    tokens = tokenizer(model.tokenizer_name or model.model_name_or_path, **model.hub)
    make = model_factory(
        "text", splits.class_names, name_or_path=model.model_name_or_path, model_type=model.model_type,
        config_overrides=model.config_overrides, ignore_mismatched_sizes=model.ignore_mismatched_sizes,
        settings={"vocab_size": len(tokens), "pad_token_id": tokens.pad_token_id}, **model.hub,
    )  # fmt: skip
    longest = getattr(make().config, "max_position_embeddings", None)
    lengths = [n for n in (data.max_length, longest, tokens.model_max_length) if n is not None and n < 10**6]

    def rows(split: str) -> Any:
        found = getattr(splits, split)
        if found is None or (trained and split in ("train", "validation")):
            return None
        return tokenize(found, splits.inputs, splits.label, tokens, min(lengths, default=None))

    train, validation, test, ood = (rows(split) for split in SPLITS)
    return Task(
        model_init=make, train_dataset=test if trained else train, validation_dataset=validation, test_dataset=test,
        ood_dataset=ood, processing_class=tokens, data_collator=DataCollatorWithPadding(tokens), **common,
    )  # fmt: skip
