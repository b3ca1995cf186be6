"""Images, models trained from scratch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import ViTForImageClassification

from benchmarks.evidence.data import images as data
from benchmarks.evidence.data.examples import (
    AugmentedExamples,
    Examples,
    random_crop,
    random_crop_and_flip,
    stratified_subsets,
)
from benchmarks.evidence.registry import TaskOptions, benchmark_task
from benchmarks.evidence.tasks.models import small_vit
from mm_hf.comparison import Task
from mm_hf.data.offline import FASHION_CLASSES
from mm_hf.evaluation.metrics import Normalization

CENTERED = Normalization(0.5, 0.5)  # pixels in [0, 1] to values in [-1, 1]
DIGITS = [str(digit) for digit in range(10)]


@benchmark_task(
    "8x8 digits, a small ViT",
    """scikit-learn's 8x8 digits and the demo's ViT (0.14 million parameters, 4x4 patches of 2x2 pixels) from scratch:
    400 training images, 200 for validation, 450 for the test. Random crops (one pixel), 80 epochs. Unknown class: 500
    patches of scikit-learn's two photographs.""",
)
def digits_vit(options: TaskOptions) -> Task:
    """Build the task of digits and a ViT."""
    rest, test = data.digits()
    train, validation, other = stratified_subsets(rest.labels, [400, 200, 700])
    if options.search:
        test = rest.select(other)
    config = small_vit(8, 2, DIGITS)
    return Task(
        "digits_vit",
        lambda: ViTForImageClassification(config),
        train_dataset=AugmentedExamples(rest.select(train), partial(random_crop, padding=1)),
        validation_dataset=rest.select(validation),
        test_dataset=test,
        ood_dataset=data.photograph_patches(),
        normalization=CENTERED,
        class_names=DIGITS,
        training_args=options.training(80, 2e-3),
        settings={"data": "digits", "augmentation": "crop, 1 pixel"},
    )


def fashion_from_scratch(
    options: TaskOptions, name: str, model: Callable[[], nn.Module], training_args: dict[str, Any]
) -> Task:
    """Build a task of Fashion-MNIST with 1,000 training images of 28x28 pixels and 500 for validation."""
    *parts, other = data.fashion("train", 0, 1000, 500, 2000)
    if not options.search:
        (other,) = data.fashion("test", 0, options.fashion_test)
    train, validation, test = (Examples(labels, pixel_values=2 * pixels - 1) for pixels, labels in [*parts, other])
    unknown = data.enlarged_digits()
    return Task(
        name,
        model,
        train_dataset=AugmentedExamples(train, partial(random_crop_and_flip, padding=2)),
        validation_dataset=validation,
        test_dataset=test,
        ood_dataset=Examples(torch.zeros(len(unknown)), pixel_values=2 * unknown - 1),
        normalization=CENTERED,
        class_names=FASHION_CLASSES,
        training_args=training_args,
        settings={"data": "fashion_mnist, stratified subsets by seed 0", "augmentation": "crop, 2 pixels; flip"},
    )


@benchmark_task(
    "clothing, a small ViT",
    """Fashion-MNIST, 1,000 training images, 500 for validation, 2,000 of the test split; the demo's ViT from scratch
    (7x7 patches of 4x4 pixels). Random crops and flips, 25 epochs. Unknown class: 450 digits.""",
)
def fashion_vit(options: TaskOptions) -> Task:
    """Build the task of Fashion-MNIST and a ViT."""
    config = small_vit(28, 4, FASHION_CLASSES)
    return fashion_from_scratch(
        options, "fashion_vit", lambda: ViTForImageClassification(config), options.training(25, 2e-3)
    )
