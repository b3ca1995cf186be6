# /// script
# dependencies = [
#     "mm-hf[examples]",
#     "transformers>=5.20",
#     "datasets>=4.0",
#     "accelerate>=1.10",
#     "torch>=2.7",
# ]
# ///
"""Fine-tune an image classification model of Transformers with MultiMix or Dense MultiMix.

With a dataset from the Hub:

    python examples/run_image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name beans --image_column_name image --label_column_name labels --mixing dense_multimix \
        --do_train --do_eval --output_dir outputs/beans

Offline, train a small ViT from scratch on digits or fashion_mnist (for your own images, use --train_dir):

    python examples/run_image_classification.py examples/recipes/fashion_mnist.yaml

The options are those of Transformers' script and the settings of the mixing method (--num_mixed, --alpha, --attention,
...); --mixing METHOD --help shows them.
Options override those of a first argument that ends in .yaml or .json, an option file.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import common
from datasets import DatasetDict
from transformers import AutoModelForImageClassification, EvalPrediction, TrainingArguments

from mm_hf import Mixing, MultiMixTrainer
from mm_hf.data.folders import load_image_folders
from mm_hf.data.images import ImageTransform
from mm_hf.data.models import image_processor, num_channels
from mm_hf.data.offline import OFFLINE_IMAGES
from mm_hf.data.splits import as_classes
from mm_hf.evaluation.metrics import load_metric


@dataclass
class ModelArguments(common.ModelArguments):
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
class DataTrainingArguments(common.DataArguments):
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
        default="crop_flip", metadata={"help": "Augmentation of training images with kornia."}
    )

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_dir is None:
            raise ValueError(f"Give --dataset_name (offline: {', '.join(OFFLINE_IMAGES)}) or --train_dir.")


def parse_arguments(
    arguments: list[str],
) -> tuple[ModelArguments, DataTrainingArguments, TrainingArguments, Mixing]:
    """Parse options or an option file, including the fields of the selected mixing method."""
    return common.parse_arguments(arguments, ModelArguments, DataTrainingArguments)


def load_data(data_args: DataTrainingArguments, model_args: ModelArguments, seed: int) -> DatasetDict:
    """Load the splits `train` and `validation`."""
    if data_args.dataset_name in OFFLINE_IMAGES:
        data = OFFLINE_IMAGES[data_args.dataset_name]()
    elif data_args.dataset_name is not None:
        data = common.load_from_hub(data_args, model_args)
    else:
        folders = {"train": data_args.train_dir, "validation": data_args.validation_dir}
        data = load_image_folders({split: folder for split, folder in folders.items() if folder is not None})
    common.check_columns(data, data_args, "image_column_name", "label_column_name")
    return common.train_and_validation(as_classes(data, data_args.label_column_name), data_args, seed)


def load_model(model_args: ModelArguments, names: list[str]) -> tuple[Any, Any]:
    """Load or create the model and its image processor."""
    model = common.load_model(AutoModelForImageClassification, model_args, names, "image-classification")
    source = model_args.image_processor_name or model_args.model_name_or_path
    return model, image_processor(model.config, source, size=model_args.image_size, **model_args.hub)


@common.reports_errors
def main() -> None:
    """Train and save the model, evaluate it, and write a model card or push to the Hub."""
    model_args, data_args, training_args, mixing = parse_arguments(sys.argv[1:])
    common.set_up(training_args, mixing)

    data = load_data(data_args, model_args, training_args.seed)
    names = data["train"].features[data_args.label_column_name].names
    model, processor = load_model(model_args, names)
    channels = num_channels(model.config)
    # The transform reads the images of each batch and needs columns that the model does not accept.
    training_args = copy.copy(training_args)
    training_args.remove_unused_columns = False
    columns = (data_args.image_column_name, data_args.label_column_name)
    for split, rows in data.items():
        transform = ImageTransform(
            processor,
            *columns,
            augmentation=data_args.augmentation,
            num_channels=channels,
            train=split == "train",
        )
        rows.set_transform(transform)

    metric = load_metric("classification", cache_dir=model_args.cache_dir)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        """Compute accuracy, calibration and the other classification metrics."""
        return metric.compute(predictions=prediction.predictions, references=prediction.label_ids)

    trainer = MultiMixTrainer(
        model=model,
        args=training_args,
        mixing=mixing,
        train_dataset=data["train"] if training_args.do_train else None,
        eval_dataset=data["validation"] if training_args.do_eval else None,
        compute_metrics=compute_metrics,
        processing_class=processor,
    )
    card = common.card_arguments(
        "image-classification",
        model_args.model_name_or_path,
        data_args.dataset_name or data_args.train_dir,
        data_args.dataset_name,
        OFFLINE_IMAGES,
        "vision",
    )
    common.train_and_evaluate(trainer, card)


if __name__ == "__main__":
    main()
