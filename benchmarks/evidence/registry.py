"""Registry of the tasks of the evidence study, and the options that a command sets for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence.methods import METHODS
from mm_hf.comparison import Task

TWENTY_TIMES = {"logging_strategy": "steps", "logging_steps": 0.05, "eval_strategy": "steps", "eval_steps": 0.05}


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options of a command that apply to all tasks.

    Attributes:
        quick: Train for a tenth of the epochs, to check that everything runs. The results are meaningless.
        full_test: Evaluate Fashion-MNIST on all 10,000 test images instead of 2,000.
        search: Evaluate on held-out training examples instead of test examples. Defaults are chosen this way.
        length: Multiple of the task's number of epochs.
        fold: Fold of cross-validation, for tasks that have folds.
        cache: Directory for the cached outputs of frozen layers.
    """

    quick: bool = False
    full_test: bool = False
    search: bool = False
    length: int = 1
    fold: int = 0
    cache: Path = Path("outputs/evidence/cache")

    @property
    def measured_on(self) -> str:
        """Examples that the metrics are computed on."""
        return "held-out training examples" if self.search else "test examples"

    @property
    def fashion_test(self) -> int:
        """Number of test images of Fashion-MNIST."""
        return 10_000 if self.full_test else 2000

    def training(self, epochs: int, learning_rate: float, batch_size: int = 64, **arguments: Any) -> dict[str, Any]:
        """Return training arguments: AdamW, linear warm-up over a tenth of the steps, cosine decay to zero.

        A run of the study logs and validates 20 times, whatever its length.
        """
        epochs *= self.length
        return {
            "num_train_epochs": max(1, epochs // 10) if self.quick else epochs,
            "learning_rate": learning_rate,
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": 250,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "weight_decay": 0.05,
            "use_cpu": True,
            **({"eval_strategy": "no"} if self.search else TWENTY_TIMES),
            **arguments,
        }

    def fine_tuning(self, epochs: int, **arguments: Any) -> dict[str, Any]:
        """Return training arguments for pretrained weights."""
        return self.training(epochs, 1e-4, batch_size=32, **arguments)


@dataclass(frozen=True)
class BenchmarkTask:
    """A task and the methods that apply to it.

    Attributes:
        build: Function that builds the task.
        title: Data and model in a few words, for the table of README.md.
        description: Paragraph of docs/evidence.md.
        methods: Methods of the study that apply to the task.
        robustness_samples: Number of test examples for FGSM and corruptions.
        folds: Number of folds of cross-validation.
    """

    build: Callable[[TaskOptions], Task]
    title: str
    description: str
    methods: tuple[str, ...]
    robustness_samples: int
    folds: int = 1

    def task(self, options: TaskOptions) -> Task:
        """Build the task and record which examples it is evaluated on."""
        task = self.build(options)
        task.settings["measured_on"] = options.measured_on
        return task


TASKS: dict[str, BenchmarkTask] = {}


def benchmark_task(
    title: str, description: str, without: Sequence[str] = (), robustness_samples: int = 200, folds: int = 1
) -> Callable[[Callable[[TaskOptions], Task]], Callable[[TaskOptions], Task]]:
    """Register a function that builds a task, under the function's name.

    Args:
        title: Data and model in a few words, for the table of README.md.
        description: Paragraph of docs/evidence.md that describes the task.
        without: Methods of the study that do not apply to the task.
        robustness_samples: Number of test examples for FGSM and corruptions.
        folds: Number of folds of cross-validation. Each is trained and tested separately; metrics are computed on the
            test examples of all folds together.
    """

    def register(build: Callable[[TaskOptions], Task]) -> Callable[[TaskOptions], Task]:
        methods = tuple(name for name in METHODS if name not in without)
        text = " ".join(description.split())
        TASKS[build.__name__] = BenchmarkTask(build, title, text, methods, robustness_samples, folds)
        return build

    return register
