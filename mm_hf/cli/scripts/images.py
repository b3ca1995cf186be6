"""Options, data and models shared by the example scripts for image classification."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import DatasetDict
from transformers import AutoModelForImageClassification

from ...data.classes import as_classes
from ...data.folders import load_image_folders
from ...data.models import image_processor
from ...data.offline import OFFLINE_IMAGES
from . import DataArguments, check_columns, load_from_hub, train_and_validation
from . import ModelArguments as CommonModelArguments
from . import load_model as load_common_model


@dataclass
class ModelArguments(CommonModelArguments):
    """Model to train."""

    model_type: str = field(default="vit", metadata={"help": "Architecture of a model trained from scratch."})
    image_processor_name: str | None = field(default=None, metadata={"help": "Image processor. Default: the model's."})
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Image size of a model trained from scratch. Default: the size in its configuration, or else 224."
        },
    )


@dataclass
class DataTrainingArguments(DataArguments):
    """Images to train on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": f"Hub name, or offline dataset: {', '.join(OFFLINE_IMAGES)}."}
    )
    train_dir: str | None = field(
        default=None, metadata={"help": "Directory of training images with one subdirectory per class."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "Directory of validation images."})
    image_column_name: str = field(default="image", metadata={"help": "Column with the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the classes."})
    augmentation: Literal["none", "crop", "crop_flip", "randaugment"] = field(
        default="crop_flip", metadata={"help": "Augmentation of training images. With kornia."}
    )

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_dir is None:
            raise ValueError(f"Give --dataset_name (offline: {', '.join(OFFLINE_IMAGES)}) or --train_dir.")


def load_data(data_args: DataTrainingArguments, model_args: ModelArguments, seed: int) -> DatasetDict:
    """Load the splits `train` and `validation`."""
    if data_args.dataset_name in OFFLINE_IMAGES:
        data = OFFLINE_IMAGES[data_args.dataset_name]()
    elif data_args.dataset_name is not None:
        data = load_from_hub(data_args, model_args)
    else:
        folders = {"train": data_args.train_dir, "validation": data_args.validation_dir}
        data = load_image_folders({split: folder for split, folder in folders.items() if folder is not None})
    check_columns(data, data_args, "image_column_name", "label_column_name")
    return train_and_validation(as_classes(data, data_args.label_column_name), data_args, seed)


def load_model(model_args: ModelArguments, names: list[str]) -> tuple[Any, Any]:
    """Load or create the model and its image processor."""
    model = load_common_model(AutoModelForImageClassification, model_args, names, "image-classification")
    source = model_args.image_processor_name or model_args.model_name_or_path
    return model, image_processor(model.config, source, size=model_args.image_size, **model_args.hub)
