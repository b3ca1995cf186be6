"""What the tasks of the evidence study have in common: the methods, what the command decides, the registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from mm_hf import ERM, Mixing, get_method
from mm_hf.comparison import Task
from mm_hf.methods.base import MixingLoss


@dataclass
class LabelSmoothing(Mixing):
    """Plain training with smoothed labels: what label_smoothing_factor does, as a method beside the others."""

    name: ClassVar[str] = "label_smoothing"

    factor: float = 0.1

    def loss(self, output: Any, labels: Tensor, *, label_smoothing: float = 0.0, **how: Any) -> MixingLoss:
        """Cross-entropy of the clean examples with smoothed labels."""
        return ERM().loss(output, labels, label_smoothing=self.factor, **how)


METHODS: dict[str, Callable[[], Mixing]] = {
    "erm": ERM,
    "label_smoothing": LabelSmoothing,
    **{
        name: get_method(name)
        for name in ("mixup", "cutmix", "manifold_mixup", "transmix", "multimix", "dense_multimix")
    },
    "dense_multimix_alone": lambda: get_method("dense_multimix").from_dict({"input_mixing": "none"}),
    "dense_multimix_and_mixup": lambda: get_method("dense_multimix").from_dict(
        {"input_mixing": "mixup", "input_mixing_start": 0.0}
    ),
    "dense_multimix_paper": lambda: get_method("dense_multimix").from_dict({"preset": "paper"}),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command decides of all tasks.

    Attributes:
        quick: A tenth of the epochs, to see that everything runs; its figures say nothing.
        full_test: Test Fashion-MNIST on all of its 10,000 test images in place of 2,000.
        search: Measure on other examples of the training part in place of the test's: what a default is chosen by.
        epochs: In place of a task's own.
        cache: Where outputs of frozen blocks are kept.
    """

    quick: bool = False
    full_test: bool = False
    search: bool = False
    epochs: int | None = None
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
        epochs = self.epochs or epochs
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

    def fine_tuning(self, epochs: int, **more: Any) -> dict[str, Any]:
        """Of pretrained weights; validation examples, which take a third of such a run, are left to its user."""
        return self.training(epochs, 1e-4, batch_size=32, eval_strategy="no", **more)


@dataclass(frozen=True)
class Study:
    """A task and the methods that make sense on it."""

    build: Callable[[Options], Task]
    methods: tuple[str, ...]
    robustness_samples: int

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


def task(
    without: Sequence[str] = (), robustness_samples: int = 200
) -> Callable[[Callable[[Options], Task]], Callable[[Options], Task]]:
    """Adds a function to the tasks of the study, with all methods but some."""

    def add(build: Callable[[Options], Task]) -> Callable[[Options], Task]:
        methods = tuple(name for name in METHODS if name not in without)
        TASKS[build.__name__] = Study(build, methods, robustness_samples)
        return build

    return add
