"""Short noisy texts with 20 classes, and a pretrained text encoder."""

from __future__ import annotations

import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.evidence.data import packages as data
from benchmarks.evidence.data import texts
from benchmarks.evidence.data.examples import Examples
from benchmarks.evidence.registry import TaskOptions, benchmark_task
from benchmarks.evidence.tasks.texts import tokenize
from mm_hf.comparison import Task

MAX_LENGTH = 24  # tokens


@benchmark_task(
    "package descriptions, MiniLM fine-tuned",
    """Section of a Debian package (20 classes) from its short description without the package's name: 1,000
    descriptions for training, 300 for validation, 2,000 for the test, at most 24 tokens. All packages of a source are
    in one split. Labels are noisy, since many descriptions fit several sections. MiniLM is fine-tuned for 5 epochs.
    CutMix and TransMix are left out, since they are for images. No unknown classes, no robustness.""",
    without=["cutmix", "transmix"],
)
def packages_minilm(options: TaskOptions) -> Task:
    """Build the task of package descriptions and MiniLM."""
    descriptions, labels, sources = data.descriptions()
    parts = data.split_by_source(sources, [300, 2000, 2000, 1000])
    path = texts.minilm()
    validation, test, search, train = (
        Examples(torch.tensor(labels[part]), **tokenize([descriptions[i] for i in part], MAX_LENGTH)) for part in parts
    )
    return Task(
        "packages_minilm",
        lambda: AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(data.SECTIONS)),
        train_dataset=train,
        validation_dataset=validation,
        test_dataset=search if options.search else test,
        class_names=list(data.SECTIONS),
        training_args=options.fine_tuning(5, weight_decay=0.01),
        settings={"data": f"package index of Debian, {len(descriptions):,} descriptions", "max_length": MAX_LENGTH},
    )
