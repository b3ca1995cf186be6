"""Characters in fonts that training has not seen, models trained from scratch."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn
from transformers import ViTForImageClassification

from benchmarks.evidence.data import glyphs as data
from benchmarks.evidence.data.examples import AugmentedExamples, cached_tensor, random_crop
from benchmarks.evidence.registry import TaskOptions, benchmark_task
from benchmarks.evidence.tasks.images import CENTERED
from benchmarks.evidence.tasks.models import SmallResNetForImageClassification, small_resnet, small_vit
from mm_hf.comparison import Task

TEST_FONTS, SEARCH_FONTS, VALIDATION_FONTS = 35, 30, 10


def glyphs(
    options: TaskOptions, name: str, model: Callable[[], nn.Module], characters: str, fonts: int, **training: float
) -> Task:
    """Build a task of characters in the given number of training fonts; all other fonts are unseen."""
    data.font_files()  # raises if a package is missing, even with a cached tensor
    rendered = cached_tensor(options.cache / "glyphs.pt", data.render_fonts)
    test, search, validation, train = data.split_fonts(rendered, TEST_FONTS, SEARCH_FONTS, VALIDATION_FONTS, fonts)
    evaluated = search if options.search else test
    return Task(
        name,
        model,
        train_dataset=AugmentedExamples(data.to_examples(train, characters), functools.partial(random_crop, padding=2)),
        validation_dataset=data.to_examples(validation, characters),
        test_dataset=data.to_examples(evaluated, characters),
        ood_dataset=data.to_examples(evaluated, data.SYMBOLS),
        normalization=CENTERED,
        class_names=list(characters),
        training_args=options.training(**training),
        settings={"data": "Debian fonts, split by seed 0", "training_fonts": fonts, "augmentation": "crop, 2 pixels"},
    )


@benchmark_task(
    "capital letters, tested on unseen fonts, a small ViT",
    """Capital letters A to Z, rendered at 28x28 pixels from 15 text fonts of Debian; the 10 fonts for validation and
    the 35 test fonts are others. The demo's ViT (7x7 patches of 4x4 pixels) from scratch, random crops, 40 epochs.
    Unknown class: twelve symbols in the test fonts.""",
)
def glyphs_vit(options: TaskOptions) -> Task:
    """Build the task of capital letters and a ViT."""
    config = small_vit(data.SIDE, 4, data.CAPITALS)
    return glyphs(
        options,
        "glyphs_vit",
        lambda: ViTForImageClassification(config),
        data.CAPITALS,
        15,
        epochs=40,
        learning_rate=2e-3,
    )


@benchmark_task(
    "letters and digits, tested on unseen fonts, a small ResNet",
    """62 letters and digits, rendered at 28x28 pixels from 10 text fonts of Debian; the 10 fonts for validation and the
    35 test fonts are others. A ResNet of Transformers with three stages from scratch, random crops, 30 epochs. TransMix
    is left out, since it needs a CLS token. Unknown class: twelve symbols in the test fonts.""",
    without=["transmix"],
)
def glyphs_resnet(options: TaskOptions) -> Task:
    """Build the task of letters and digits and a ResNet."""
    config = small_resnet(data.CHARACTERS)
    return glyphs(
        options,
        "glyphs_resnet",
        lambda: SmallResNetForImageClassification(config),
        data.CHARACTERS,
        10,
        epochs=30,
        learning_rate=3e-3,
        weight_decay=0.01,
    )
