# /// script
# dependencies = [
#     "mm-hf[examples]",
#     "transformers>=5.20",
#     "datasets>=4.0",
#     "accelerate>=1.10",
#     "torch>=2.6",
# ]
# ///
"""Fine-tune any image classifier of Transformers with MultiMix or Dense MultiMix.

From the Hub:

    python examples/run_image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name beans --image_column_name image --label_column_name labels --mixing dense_multimix \
        --do_train --do_eval --output_dir outputs/beans

Offline, a small ViT from scratch (data sets: digits, fashion_mnist; or your folders by --train_dir):

    python examples/run_image_classification.py examples/recipes/fashion_mnist.yaml

The options are Transformers' own, and the fields of the chosen mixing method (--num_mixed, --alpha, --attention, ...);
--help shows those of --mixing. One argument that ends in .yaml or .json is a file with options.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
import yaml
from datasets import ClassLabel, DatasetDict, load_dataset
from kornia import augmentation
from offline_data import OFFLINE, load_offline
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    TrainingArguments,
    ViTImageProcessorPil,
    set_seed,
)

from mm_hf import Mixing, MultiMixTrainer, get_method
from mm_hf.metrics import classification_metrics

logger = logging.getLogger("run_image_classification")


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A pretrained model: a Hub name or a directory. Without it: from scratch."}
    )
    model_type: str = field(default="vit", metadata={"help": "Architecture of a model from scratch."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "Settings of a model from scratch: hidden_size=192,num_hidden_layers=6"}
    )
    image_processor_name: str | None = field(default=None, metadata={"help": "If not that of the model."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    token: str | None = field(default=None, metadata={"help": "Token for the Hub, if not the one of `hf auth login`."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Load a checkpoint whose head has another number of classes."}
    )


@dataclass
class DataTrainingArguments:
    """Which images it is trained on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": f"A data set of the Hub, or offline: {', '.join(OFFLINE)}."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_dir: str | None = field(default=None, metadata={"help": "A folder with one folder of images a class."})
    validation_dir: str | None = field(default=None, metadata={"help": "Likewise, for validation."})
    image_column_name: str = field(default="image", metadata={"help": "The column with the images."})
    label_column_name: str = field(default="label", metadata={"help": "The column with the classes."})
    train_val_split: float | None = field(
        default=None,
        metadata={"help": "Share of the training set to validate on. Default: the validation or test split, or 0.15."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Validate on so many images only."})
    augmentation: Literal["none", "crop", "crop_flip", "randaugment"] = field(
        default="crop_flip", metadata={"help": "Augmentation of training images, by kornia."}
    )

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_dir is None:
            raise ValueError(f"Give --dataset_name (offline: {', '.join(OFFLINE)}) or --train_dir.")


@dataclass
class MixingArguments:
    """Which method mixes."""

    mixing: str = field(
        default="dense_multimix", metadata={"help": "dense_multimix, multimix, mixup, or erm for plain training."}
    )


class ImageTransform:
    """Images of a batch of rows to `pixel_values`: resized, augmented in training, normalised."""

    def __init__(self, processor: Any, data_args: DataTrainingArguments, num_channels: int, train: bool):
        self.processor, self.columns = processor, (data_args.image_column_name, data_args.label_column_name)
        self.mode = "RGB" if num_channels == 3 else "L"
        size = dict(processor.size)
        side: int = size.get("shortest_edge", 224)
        self.height, self.width = size.get("height", side), size.get("width", side)
        crop = getattr(processor, "crop_size", None)
        if getattr(processor, "do_center_crop", False) and crop is not None:
            self.height, self.width = dict(crop)["height"], dict(crop)["width"]
        self.augment = self._augmentation(data_args.augmentation) if train else None

    def _augmentation(self, name: str) -> torch.nn.Module:
        steps: list[Any] = []
        if name == "randaugment":
            steps.append(augmentation.auto.RandAugment(n=2, m=9))
        if name != "none":
            steps.append(augmentation.RandomResizedCrop((self.height, self.width), scale=(0.6, 1.0)))
        if name in ("crop_flip", "randaugment"):
            steps.append(augmentation.RandomHorizontalFlip())
        steps.append(augmentation.Normalize(self.processor.image_mean, self.processor.image_std))
        return augmentation.container.ImageSequential(*steps)

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        """A batch of rows as the data set gives them."""
        images = [image.convert(self.mode) for image in rows[self.columns[0]]]
        if self.augment is None:
            pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        else:
            # Crops are cut from images an eighth larger than what the model sees.
            size = {"height": round(self.height * 8 / 7), "width": round(self.width * 8 / 7)}
            plain = self.processor(
                images, size=size, do_center_crop=False, do_normalize=False, return_tensors="pt", do_resize=True
            )["pixel_values"]
            pixels = self.augment(torch.as_tensor(np.asarray(plain), dtype=torch.float32))
            if pixels.shape[-2:] != (self.height, self.width):
                pixels = torch.nn.functional.interpolate(pixels, (self.height, self.width), mode="bilinear")
        return {"pixel_values": list(pixels), "labels": rows[self.columns[1]]}


def parse_arguments(
    arguments: list[str],
) -> tuple[ModelArguments, DataTrainingArguments, TrainingArguments, Mixing]:
    """Options or a file of options; the fields of the chosen mixing method are among them."""
    file = Path(arguments[0]) if len(arguments) == 1 and arguments[0].endswith((".yaml", ".yml", ".json")) else None
    if file is not None:
        options = json.loads(file.read_text()) if file.suffix == ".json" else yaml.safe_load(file.read_text())
        method = get_method(options.get("mixing", MixingArguments.mixing))
    else:
        first = HfArgumentParser([MixingArguments], add_help=False)  # type: ignore[list-item]
        chosen, _ = first.parse_known_args(arguments)
        method = get_method(chosen.mixing)
    classes: Any = (ModelArguments, DataTrainingArguments, TrainingArguments, MixingArguments, method)
    parser = HfArgumentParser(classes)
    parsed = parser.parse_dict(options) if file is not None else parser.parse_args_into_dataclasses(arguments)
    model_args, data_args, training_args, _, mixing = parsed
    return model_args, data_args, training_args, mixing


def load_data(data_args: DataTrainingArguments, model_args: ModelArguments, seed: int) -> DatasetDict:
    """Splits `train` and `validation`, cut to size."""
    if data_args.dataset_name in OFFLINE:
        data = load_offline(data_args.dataset_name)
    elif data_args.dataset_name is not None:
        data = load_dataset(
            data_args.dataset_name,
            data_args.dataset_config_name,
            cache_dir=model_args.cache_dir,
            token=model_args.token,
        )
    else:
        folders = {"train": data_args.train_dir, "validation": data_args.validation_dir}
        files = {split: str(Path(folder) / "**") for split, folder in folders.items() if folder is not None}
        data = load_dataset("imagefolder", data_files=files, cache_dir=model_args.cache_dir)
    for column in (data_args.image_column_name, data_args.label_column_name):
        if column not in data["train"].column_names:
            raise ValueError(
                f"The data set has no column {column!r}, only {', '.join(data['train'].column_names)}: choose with "
                "--image_column_name and --label_column_name."
            )
    if not isinstance(data["train"].features[data_args.label_column_name], ClassLabel):
        data = data.class_encode_column(data_args.label_column_name)
    held_out = next((split for split in ("validation", "test") if split in data), None)
    if held_out is not None and data_args.train_val_split is None:
        data = DatasetDict(train=data["train"], validation=data[held_out])
    else:
        parts = data["train"].train_test_split(data_args.train_val_split or 0.15, seed=seed)
        data = DatasetDict(train=parts["train"], validation=parts["test"])
    for split, most in [("train", data_args.max_train_samples), ("validation", data_args.max_eval_samples)]:
        if most is not None and most < len(data[split]):
            data[split] = data[split].shuffle(seed=seed).select(range(most))
    return data


def load_model(model_args: ModelArguments, names: list[str]) -> tuple[Any, Any]:
    """Model and image processor, pretrained or from scratch."""
    labels: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    hub: dict[str, Any] = {
        "revision": model_args.model_revision,
        "cache_dir": model_args.cache_dir,
        "token": model_args.token,
    }
    hub["trust_remote_code"] = model_args.trust_remote_code
    if model_args.model_name_or_path is None:
        config = CONFIG_MAPPING[model_args.model_type](**labels)
        if model_args.config_overrides:
            config.update_from_string(model_args.config_overrides)
        config.architectures = None
        model = AutoModelForImageClassification.from_config(config)
    else:
        config = AutoConfig.from_pretrained(
            model_args.model_name_or_path, **labels, finetuning_task="image-classification", **hub
        )
        model = AutoModelForImageClassification.from_pretrained(
            model_args.model_name_or_path,
            config=config,
            ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
            **hub,
        )
    source = model_args.image_processor_name or model_args.model_name_or_path
    if source is not None:
        return model, AutoImageProcessor.from_pretrained(source, **hub)
    channels, side = config.num_channels, config.image_size
    processor = ViTImageProcessorPil(
        size={"height": side, "width": side},
        image_mean=[0.5] * channels,
        image_std=[0.5] * channels,
        do_convert_rgb=channels == 3,
    )
    return model, processor


def main() -> None:
    """Train, save, evaluate, and write a model card or push to the Hub."""
    model_args, data_args, training_args, mixing = parse_arguments(sys.argv[1:])
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    logger.info("mixing: %s", mixing)
    set_seed(training_args.seed)

    data = load_data(data_args, model_args, training_args.seed)
    names = data["train"].features[data_args.label_column_name].names
    model, processor = load_model(model_args, names)
    channels = getattr(model.config, "num_channels", 3)
    # The images are read and changed as batches are made, and the transform needs the columns that the model does not.
    training_args = copy.copy(training_args)
    training_args.remove_unused_columns = False
    data["train"].set_transform(ImageTransform(processor, data_args, channels, train=True))
    data["validation"].set_transform(ImageTransform(processor, data_args, channels, train=False))

    trainer = MultiMixTrainer(
        model=model,
        args=training_args,
        mixing=mixing,
        train_dataset=data["train"] if training_args.do_train else None,
        eval_dataset=data["validation"] if training_args.do_eval else None,
        compute_metrics=classification_metrics,
        processing_class=processor,
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    card: dict[str, Any] = {
        "finetuned_from": model_args.model_name_or_path,
        "tasks": "image-classification",
        "dataset": data_args.dataset_name or data_args.train_dir,
        "tags": ["image-classification", "vision"],
    }
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
