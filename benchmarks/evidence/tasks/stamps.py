"""A few photographs per class, and a pretrained backbone of which the last four blocks are trained."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from benchmarks.evidence.data import dinov2
from benchmarks.evidence.data import stamps as data
from benchmarks.evidence.data.examples import AugmentedExamples, Examples, cached_tensor, random_crop_and_flip
from benchmarks.evidence.registry import TaskOptions, benchmark_task
from benchmarks.evidence.tasks.pretrained import FROZEN_BLOCKS, partly_frozen_dinov2
from mm_hf.comparison import Task
from mm_hf.evaluation.metrics import Normalization

FOLDS = 5


@benchmark_task(
    "photographs, DINOv2-small fine-tuned",
    """Photographs of objects and animals in 11 classes, from the Debian package tuxpaint-stamps-default: about 270, 9
    to 63 per class, at 112 pixels on a gray background. Five-fold cross-validation: each photograph is a test example
    of one fold, in which the next fold is for validation; metrics are computed on all of them together. The backbone of
    fashion_300; its last four blocks and a new classifier are trained for 10 epochs with random crops and flips. No
    unknown classes.""",
    robustness_samples=20,
    folds=FOLDS,
)
def stamps_dinov2(options: TaskOptions) -> Task:
    """Build a fold of the task of photographs and a pretrained ViT."""
    paths, classes = zip(*data.files(), strict=True)
    pixels = cached_tensor(options.cache / "stamps.pt", lambda: data.load(paths))
    labels = torch.tensor(classes)
    # Of the folds that are not for the test, one is for validation; with `search`, another one replaces the test's.
    train, test = data.split_fold(labels, options.fold, FOLDS)
    _, validation = data.split_fold(labels, (options.fold + 1) % FOLDS, FOLDS)
    if options.search:
        _, test = data.split_fold(labels, (options.fold + 2) % FOLDS, FOLDS)
    train = np.setdiff1d(train, [*test, *validation])
    examples = Examples(labels, pixel_values=dinov2.to_dinov2_input(pixels, data.SIDE))
    names = list(data.CATEGORIES)
    return Task(
        "stamps_dinov2",
        partly_frozen_dinov2(names),
        train_dataset=AugmentedExamples(examples.select(train), partial(random_crop_and_flip, padding=8)),
        validation_dataset=examples.select(validation),
        test_dataset=examples.select(test),
        normalization=Normalization(dinov2.IMAGENET_MEAN, dinov2.IMAGENET_STD),
        class_names=names,
        training_args=options.fine_tuning(10),
        settings={
            "data": f"tuxpaint-stamps-default at {data.SIDE} pixels",
            "fold": options.fold,
            "frozen_blocks": FROZEN_BLOCKS,
        },
    )
