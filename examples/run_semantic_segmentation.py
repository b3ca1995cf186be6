# /// script
# dependencies = [
#     "mm-hf[examples]",
#     "transformers>=5.23",
#     "datasets>=4.0",
#     "accelerate>=1.10",
#     "torch>=2.7",
# ]
# ///
r"""Fine-tune a semantic segmentation model of Transformers with Dense MultiMix at each location.

With a dataset from the Hub:

    python examples/run_semantic_segmentation.py --model_name_or_path nvidia/mit-b0 \
        --dataset_name segments/sidewalk-semantic --image_column_name pixel_values --augmentation crop_flip \
        --mixing dense_multimix --do_train --do_eval --output_dir outputs/sidewalk

Offline, train a small SegFormer from scratch on scenes of handwritten digits:

    python examples/run_semantic_segmentation.py examples/recipes/digit_scenes.yaml

The options are those of Transformers' script and the settings of the mixing method (--num_mixed, --alpha, --attention,
...); --mixing METHOD --help shows them.
Options override those of a first argument that ends in .yaml or .json, an option file.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import DatasetDict
from huggingface_hub import hf_hub_download
from torch.nn.functional import interpolate
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    EvalPrediction,
    SegformerImageProcessorPil,
    TrainingArguments,
)

from mm_hf import Mixing, MultiMixTrainer
from mm_hf.cli import scripts
from mm_hf.data.offline_scenes import CLASSES, IGNORED, OFFLINE


@dataclass
class ModelArguments(scripts.ModelArguments):
    """Model to train."""

    model_type: str = field(default="segformer", metadata={"help": "Architecture of a model trained from scratch."})
    image_size: int = field(default=128, metadata={"help": "Image size of a model trained from scratch."})
    image_processor_name: str | None = field(default=None, metadata={"help": "Image processor. Default: the model's."})


@dataclass
class DataTrainingArguments(scripts.DataArguments):
    """Images to train on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": f"Hub name, directory, or offline dataset: {', '.join(OFFLINE)}."}
    )
    image_column_name: str = field(default="image", metadata={"help": "Column with the images."})
    label_column_name: str = field(
        default="label", metadata={"help": "Column with images of class indices; pixels with 255 are ignored."}
    )
    id2label: str | None = field(
        default=None,
        metadata={"help": "JSON file with the names of the classes. Default: id2label.json of the dataset."},
    )
    do_reduce_labels: bool = field(
        default=False, metadata={"help": "Ignore class 0, the background, and subtract 1 from the other classes."}
    )
    augmentation: Literal["none", "crop", "crop_flip"] = field(
        default="none", metadata={"help": "Augmentation of training images. With kornia."}
    )

    def __post_init__(self) -> None:
        if self.dataset_name is None:
            raise ValueError(f"Give --dataset_name (offline: {', '.join(OFFLINE)}).")


class SegmentationTransform:
    """Transform of a batch of rows to `pixel_values` (b, 3, h, w) and `labels` (b, h, w)."""

    def __init__(self, processor: Any, data_args: DataTrainingArguments, ignored: int, train: bool):
        self.processor, self.columns = processor, (data_args.image_column_name, data_args.label_column_name)
        self.reduces, self.ignored = data_args.do_reduce_labels, ignored
        self.size = scripts.image_size(processor)
        self.augment = self._augmentation(data_args.augmentation) if train else None

    def _augmentation(self, name: str) -> Callable[[torch.Tensor, torch.Tensor], Any] | None:
        if name == "none":
            return None
        from kornia import augmentation

        steps: list[Any] = [augmentation.RandomResizedCrop(self.size, scale=(0.6, 1.0))]
        if name == "crop_flip":
            steps.append(augmentation.RandomHorizontalFlip())
        return augmentation.AugmentationSequential(*steps, data_keys=["input", "mask"])

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        """Transform a batch of rows."""
        images, classes = (rows[column] for column in self.columns)
        # Crops are taken from images resized to 8/7 of the model's input size.
        height, width = self.size if self.augment is None else [round(side * 8 / 7) for side in self.size]
        pixels = self.processor(
            [image.convert("RGB") for image in images],
            size={"height": height, "width": width},
            do_center_crop=False,
            return_tensors="pt",
        )["pixel_values"]
        labels = torch.stack([self._resize(np.array(image), (height, width)) for image in classes])
        if self.augment is not None:
            pixels, labels = self.augment(pixels, labels)
        labels = labels[:, 0].long()
        if self.reduces:
            labels = torch.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1)
        labels[labels == IGNORED] = self.ignored
        return {"pixel_values": list(pixels), "labels": list(labels)}

    def _resize(self, classes: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
        if classes.ndim != 2:
            raise ValueError(
                f"The images of --label_column_name {self.columns[1]!r} must have one channel of class indices, but "
                f"have the shape {classes.shape}."
            )
        as_float = torch.from_numpy(classes.astype(np.float32))
        return interpolate(as_float[None, None], size, mode="nearest-exact")[0]


def parse_arguments(
    arguments: list[str],
) -> tuple[ModelArguments, DataTrainingArguments, TrainingArguments, Mixing]:
    """Parse options or an option file, including the fields of the selected mixing method."""
    return scripts.parse_arguments(arguments, ModelArguments, DataTrainingArguments, description=__doc__)


def load_data(data_args: DataTrainingArguments, model_args: ModelArguments, seed: int) -> DatasetDict:
    """Load the splits `train` and `validation`."""
    if data_args.dataset_name in OFFLINE:
        data = OFFLINE[data_args.dataset_name]()
    else:
        data = scripts.load_from_hub(data_args, model_args)
    scripts.check_columns(data, data_args, "image_column_name", "label_column_name")
    return scripts.train_and_validation(data, data_args, seed)


def class_names(data_args: DataTrainingArguments, model_args: ModelArguments) -> list[str]:
    """Return the names of the classes of the model."""
    name = str(data_args.dataset_name)
    if name in OFFLINE:
        return CLASSES[1:] if data_args.do_reduce_labels else CLASSES
    if data_args.id2label is not None:
        path = Path(data_args.id2label)
    elif Path(name).is_dir():
        path = Path(name) / "id2label.json"
    else:
        path = Path(
            hf_hub_download(
                name, "id2label.json", repo_type="dataset", cache_dir=model_args.cache_dir, token=model_args.token
            )
        )
    id2label = json.loads(path.read_text())
    return [id2label[str(i)] for i in range(len(id2label))]


def load_model(model_args: ModelArguments, data_args: DataTrainingArguments, names: list[str]) -> tuple[Any, Any]:
    """Load or create the model and its image processor."""
    model = scripts.load_model(AutoModelForSemanticSegmentation, model_args, names, "semantic-segmentation")
    source = model_args.image_processor_name or model_args.model_name_or_path
    if source is not None:
        processor = AutoImageProcessor.from_pretrained(
            source, do_reduce_labels=data_args.do_reduce_labels, **model_args.hub
        )
    else:
        size = {"height": model_args.image_size, "width": model_args.image_size}
        processor = SegformerImageProcessorPil(size=size, do_reduce_labels=data_args.do_reduce_labels)
    return model, processor


def predicted_classes(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Convert logits to classes at the size of the labels, so that evaluation stores one number per pixel."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False).argmax(dim=1)


def segmentation_metrics(names: list[str], ignored: int) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a `compute_metrics` function: intersection over union, its mean over occurring classes, and accuracies."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        labels, predicted = np.asarray(prediction.label_ids), np.asarray(prediction.predictions)
        valid = labels != ignored
        pairs = labels[valid] * len(names) + predicted[valid]
        confusion = np.bincount(pairs, minlength=len(names) ** 2).reshape(len(names), len(names))
        hits, true = confusion.diagonal(), confusion.sum(axis=1)
        union = true + confusion.sum(axis=0) - hits
        iou = {name: float(hits[i] / union[i]) for i, name in enumerate(names) if union[i]}
        return {
            "mean_iou": float(np.mean(list(iou.values()))),
            "mean_accuracy": float(np.mean(hits[true > 0] / true[true > 0])),
            "overall_accuracy": float(hits.sum() / true.sum()),
            **{f"iou_{name}": value for name, value in iou.items()},
        }

    return compute


@scripts.reports_errors
def main() -> None:
    """Train and save the model, evaluate it, and write a model card or push to the Hub."""
    model_args, data_args, training_args, mixing = parse_arguments(sys.argv[1:])
    scripts.set_up(training_args, mixing)

    data = load_data(data_args, model_args, training_args.seed)
    names = class_names(data_args, model_args)
    model, processor = load_model(model_args, data_args, names)
    ignored = getattr(model.config, "semantic_loss_ignore_index", IGNORED)
    # The transform reads the images of each batch and needs columns that the model does not accept.
    training_args = copy.copy(training_args)
    training_args.remove_unused_columns = False
    data["train"].set_transform(SegmentationTransform(processor, data_args, ignored, train=True))
    data["validation"].set_transform(SegmentationTransform(processor, data_args, ignored, train=False))

    trainer = MultiMixTrainer(
        model=model,
        args=training_args,
        mixing=mixing,
        train_dataset=data["train"] if training_args.do_train else None,
        eval_dataset=data["validation"] if training_args.do_eval else None,
        compute_metrics=segmentation_metrics(names, ignored),
        preprocess_logits_for_metrics=predicted_classes,
        processing_class=processor,
    )
    card = scripts.card_arguments(
        "image-segmentation",
        model_args.model_name_or_path,
        data_args.dataset_name,
        data_args.dataset_name,
        OFFLINE,
        "vision",
    )
    scripts.train_and_evaluate(trainer, card)


if __name__ == "__main__":
    main()
