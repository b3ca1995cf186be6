"""The figures of one trained model, and what its training took."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from torch.utils.data import Subset
from transformers import EvalPrediction, Trainer

from ..evaluation.metrics import (
    alignment,
    class_spread,
    classification_metrics,
    corruption_accuracy,
    ood_metrics,
    predictions,
    robust_accuracy,
    uniformity,
)
from ..evaluation.metrics.base import vectors_and_labels
from ..evaluation.metrics.representation import features_and_logits
from ..locations import LocationError
from .task import Task

SEVERITIES = (0, 1, 2, 3, 4, 5)


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured beside the figures of the predictions.

    Args:
        robustness_samples: Test images, always the same ones, that are attacked and corrupted; 0 leaves this out. Eight
            corruptions in five severities are 41 times the predictions of one image.
        epsilon: Largest change of a pixel by FGSM, in units of pixels in [0, 1].
        corruptions: Names from `mm_hf.evaluation.metrics.CORRUPTIONS`. Default: all.

    Raises:
        ValueError: A setting makes no sense.
    """

    robustness_samples: int = 500
    epsilon: float = 8 / 255
    corruptions: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.robustness_samples < 0:
            raise ValueError(f"robustness_samples must not be negative, but is {self.robustness_samples}.")
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"epsilon must be in (0, 1], in units of pixels in [0, 1], but is {self.epsilon}.")


@dataclass
class EvaluationResult:
    """What was measured of one model.

    Attributes:
        metrics: Figures by name.
        corruptions: For each corruption the accuracy, in [0, 1], at severities 0 to 5.
        arrays: `logits` (n, c), `labels` (n,), `features` (n, d) of the test examples, `ood_logits` (m, c).
        notes: What could not be measured, and why.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    corruptions: dict[str, list[float]] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def evaluate_model(
    model: nn.Module, task: Task, measures: EvaluationOptions, directory: str, seed: int = 0
) -> EvaluationResult:
    """The figures of a trained model on the test examples of a task.

    Args:
        model: Not wrapped; its own forward runs.
        task: Its test and unknown examples, collator and normalisation.
        measures: What is measured beside the figures of the predictions.
        directory: Where Trainer, which makes the batches here, may write.
        seed: Of the training arguments; nothing here is random.

    Raises:
        ValueError: The test examples have no labels, or not one class each.
    """
    args = task.arguments(
        directory, seed, eval_strategy="no", save_strategy="no", load_best_model_at_end=False, torch_compile=False
    )
    trainer = Trainer(model, args, data_collator=task.data_collator, processing_class=task.processing_class)
    measured = EvaluationResult()
    try:
        vectors, logits, labels = features_and_logits(model, trainer.get_test_dataloader(task.test_dataset))
    except LocationError as error:
        measured.notes.append(_unmeasured(error))
        vectors, labels = None, None
    if labels is None:
        logits, labels = predictions(model, trainer.get_test_dataloader(task.test_dataset))
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError("Methods are compared on data with one class an example; these labels are something else.")
    vectors_and_labels(logits, labels)
    measured.arrays |= {"logits": logits.float().numpy(), "labels": labels.numpy()}
    measured.metrics |= classification_metrics(EvalPrediction(logits.numpy(), labels.numpy()))
    if vectors is not None:
        try:
            measured.metrics |= {"alignment": alignment(vectors, labels), "uniformity": uniformity(vectors)}
            measured.metrics |= class_spread(vectors, labels)
            measured.arrays["features"] = vectors.float().numpy()
        except ValueError as error:
            measured.notes.append(_unmeasured(error))
    if task.ood_dataset is not None:
        ood, _ = predictions(model, trainer.get_test_dataloader(task.ood_dataset))
        measured.arrays["ood_logits"] = ood.float().numpy()
        for score, prefix in (("max_softmax", "ood"), ("energy", "ood_energy")):
            measured.metrics |= {f"{prefix}_{k}": v for k, v in _ood(logits, ood, score).items()}
    if task.normalisation is not None and measures.robustness_samples:
        some = _some(task.test_dataset, measures.robustness_samples)
        attacked = robust_accuracy(
            model,
            trainer.get_test_dataloader(some),
            measures.epsilon,
            attack="fgsm",
            normalisation=task.normalisation,
        )
        measured.metrics["fgsm_accuracy"] = attacked["robust_accuracy"]
        measured.corruptions = corruption_accuracy(
            model,
            trainer.get_test_dataloader(some),
            corruptions=measures.corruptions,
            severities=SEVERITIES,
            normalisation=task.normalisation,
        )
        corrupted = [accuracy for curve in measured.corruptions.values() for accuracy in curve[1:]]
        measured.metrics["corruption_accuracy"] = float(np.mean(corrupted))
    return measured


def _ood(logits: Any, ood: Any, score: str) -> dict[str, float]:
    if not (logits.isfinite().all() and ood.isfinite().all()):  # a training that has diverged
        return {"auroc": float("nan"), "fpr95": float("nan")}
    return ood_metrics(logits, ood, score)


def _unmeasured(error: Exception) -> str:
    return f"The representation was not measured: {str(error).splitlines()[0]}"


def _some(data: Any, most: int) -> Any:
    """So many examples, the same ones every time, spread over the data set."""
    if len(data) <= most:
        return data
    chosen = sorted(np.random.default_rng(0).permutation(len(data))[:most].tolist())
    return data.select(chosen) if hasattr(data, "select") else Subset(data, chosen)


class PeakMemory:
    """The most memory that a block takes, in MiB: on a GPU what torch allocated, on a CPU by how much the process grew.

    What a process has freed stays with it in part, and what a block takes from there is not seen: on a CPU this is a lower
    bound, good for large models only. Freed memory is handed back to the system before, where the C library can.

    Example:
        >>> with PeakMemory() as memory:
        ...     x = torch.zeros(2**24)
        >>> memory.mib >= 0
        True
    """

    INTERVAL = 0.02  # seconds

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.mib = 0.0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        if sys.platform == "linux":
            with suppress(OSError, AttributeError):  # another C library
                ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._process, self._done = psutil.Process(), threading.Event()
        self._before = self._peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(self.INTERVAL):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *error: object) -> None:
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            self._done.set()
            self._thread.join()
            peak = max(self._peak, self._process.memory_info().rss)
        self.mib = (peak - self._before) / 2**20
