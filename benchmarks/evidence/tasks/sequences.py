"""Sequences, and a model trained from scratch."""

from __future__ import annotations

import torch
from transformers import ViTForImageClassification

from benchmarks.evidence.data import sequences as data
from benchmarks.evidence.data.examples import Examples, stratified_subsets
from benchmarks.evidence.registry import TaskOptions, benchmark_task
from benchmarks.evidence.tasks.images import DIGITS
from benchmarks.evidence.tasks.models import small_vit
from mm_hf.comparison import Task


@benchmark_task(
    "sequences (mnist1d), a small transformer",
    """mnist1d: 1,000 training sequences of 40 values, 500 for validation, 2,000 for the test, as images of one row. A
    ViT with patches of four values is trained from scratch for 50 epochs. CutMix and TransMix replace a stretch of
    time. Unknown class: 500 sequences whose values are permuted, all in the same way.""",
)
def mnist1d(options: TaskOptions) -> Task:
    """Build the task of sequences and a ViT."""
    examples = data.mnist1d()
    train, validation, test, other, search = stratified_subsets(examples.labels, [1000, 500, 2000, 500, 2000])
    config = small_vit((1, 40), (1, 4), DIGITS)
    unknown = examples.select(other)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    return Task(
        "mnist1d",
        lambda: ViTForImageClassification(config),
        train_dataset=examples.select(train),
        validation_dataset=examples.select(validation),
        test_dataset=examples.select(search if options.search else test),
        ood_dataset=Examples(unknown.labels, pixel_values=unknown.inputs["pixel_values"][..., order]),
        class_names=DIGITS,
        training_args=options.training(50, 2e-3),
        settings={"data": "mnist1d's generator with its own seed"},
    )
