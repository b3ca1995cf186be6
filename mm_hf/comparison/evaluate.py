"""Evaluation of one trained model, and measurement of peak memory."""

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
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import Trainer

from ..evaluation.metrics import compute_metrics, corruption_accuracy, metrics_of, predictions, robust_accuracy
from ..evaluation.metrics.representation import features_and_logits
from ..locations import LocationError
from .task import Task

SEVERITIES = (0, 1, 2, 3, 4, 5)


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of metrics beyond those of the predictions.

    Args:
        robustness_samples: Number of test images that are attacked and corrupted, the same ones in each run; 0 skips
            these metrics. Eight corruptions in five severities need 41 predictions per image.
        epsilon: Largest change of a pixel by FGSM, in units of pixels in [0, 1].
        corruptions: Names from `mm_hf.evaluation.metrics.CORRUPTIONS`. Default: all.

    Raises:
        ValueError: An option is out of range.
    """

    robustness_samples: int = 500
    epsilon: float = 8 / 255
    corruptions: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.robustness_samples < 0:
            raise ValueError(f"robustness_samples must be at least 0, got {self.robustness_samples}.")
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"epsilon must be in (0, 1], in units of pixels in [0, 1], got {self.epsilon}.")


@dataclass
class EvaluationResult:
    """Metrics and predictions of one model.

    Attributes:
        metrics: Values by the names of the registry of metrics.
        corruptions: For each corruption the accuracy, in [0, 1], at severities 0 to 5.
        arrays: `logits` (n, c), `labels` (n,) and `features` (n, d) of the test examples, `ood_logits` (m, c).
        notes: Reasons for metrics that could not be computed.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    corruptions: dict[str, list[float]] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def evaluate_model(
    model: nn.Module, task: Task, options: EvaluationOptions, directory: str, seed: int = 0
) -> EvaluationResult:
    """Compute the metrics of a trained model on the test examples of a task.

    Args:
        model: The model, not wrapped; its own forward runs.
        task: Test examples, examples of unknown classes, collator and normalization.
        options: Options of metrics beyond those of the predictions.
        directory: Output directory of the `Trainer` that makes the batches.
        seed: Seed in the training arguments; the evaluation itself is deterministic.

    Raises:
        ValueError: The test examples do not have one class each.
    """
    args = task.arguments(
        directory, seed, eval_strategy="no", save_strategy="no", load_best_model_at_end=False, torch_compile=False
    )
    trainer = Trainer(model, args, data_collator=task.data_collator, processing_class=task.processing_class)
    result = EvaluationResult()
    features, logits, labels = _features_and_predictions(model, trainer, task, result)
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            "A comparison needs test examples with one class each, as integer labels of shape (examples,)."
        )
    result.metrics |= compute_metrics("classification", logits, labels)
    result.arrays |= {"logits": logits.float().numpy(), "labels": labels.numpy()}
    if features is not None:
        errors: list[ValueError] = []
        result.metrics |= compute_metrics("representation", features, labels, errors=errors)
        result.notes += dict.fromkeys(_missing_representation(error) for error in errors)
        if not errors:
            result.arrays["features"] = features.float().numpy()
    if task.ood_dataset is not None:
        ood_logits, _ = predictions(model, trainer.get_test_dataloader(task.ood_dataset))
        result.arrays["ood_logits"] = ood_logits.float().numpy()
        result.metrics |= _ood_metrics(logits, ood_logits)
    if task.normalization is not None and options.robustness_samples:
        _evaluate_robustness(model, trainer, task, options, result)
    return result


def check_packages(task: Task, options: EvaluationOptions) -> None:
    """Raise an ImportError if the options need a package that is not installed, before anything is trained.

    Args:
        task: The task; only tasks with a normalization are evaluated on corrupted images.
        options: Options of the evaluation.
    """
    if task.normalization is not None and options.robustness_samples:
        import kornia  # noqa: F401


def _features_and_predictions(
    model: nn.Module, trainer: Trainer, task: Task, result: EvaluationResult
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return features, logits and labels of the test examples; None and a note for a model without features."""
    try:
        features, logits, labels = features_and_logits(model, trainer.get_test_dataloader(task.test_dataset))
    except LocationError as error:
        result.notes.append(_missing_representation(error))
    else:
        if labels is not None:
            return features, logits, labels
    logits, labels = predictions(model, trainer.get_test_dataloader(task.test_dataset))
    return None, logits, labels


def _ood_metrics(logits: Tensor, ood_logits: Tensor) -> dict[str, float]:
    """Return the metrics of group "ood"; NaN after a training run has diverged."""
    if logits.isfinite().all() and ood_logits.isfinite().all():
        return compute_metrics("ood", logits, ood_logits)
    return {info.name: float("nan") for info in metrics_of("ood")}


def _evaluate_robustness(
    model: nn.Module, trainer: Trainer, task: Task, options: EvaluationOptions, result: EvaluationResult
) -> None:
    """Add the accuracies on attacked and corrupted test images to a result."""
    assert task.normalization is not None
    subset = _subset(task.test_dataset, options.robustness_samples)
    attacked = robust_accuracy(
        model, trainer.get_test_dataloader(subset), options.epsilon, attack="fgsm", normalization=task.normalization
    )
    result.metrics["fgsm_accuracy"] = attacked["robust_accuracy"]
    result.corruptions = corruption_accuracy(
        model,
        trainer.get_test_dataloader(subset),
        corruptions=options.corruptions,
        severities=SEVERITIES,
        normalization=task.normalization,
    )
    corrupted = [accuracy for curve in result.corruptions.values() for accuracy in curve[1:]]
    result.metrics["corruption_accuracy"] = float(np.mean(corrupted))


def _missing_representation(error: Exception) -> str:
    return f"The representation was not evaluated: {str(error).splitlines()[0]}"


def _subset(data: Any, size: int) -> Any:
    """Return up to `size` examples, spread over the dataset, the same ones in each call."""
    if len(data) <= size:
        return data
    chosen = sorted(np.random.default_rng(0).permutation(len(data))[:size].tolist())
    return data.select(chosen) if hasattr(data, "select") else Subset(data, chosen)


class PeakMemory:
    """The peak memory of a `with` statement in MiB: allocations of torch on a GPU, growth of the process on a CPU.

    On a CPU it is a lower bound that is useful for large models only, because a process reuses memory that it has
    freed. Freed memory is returned to the system on entry if the C library supports it.

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
