"""Methods compared at several lengths of training."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from .compare import Comparison, run_comparison
from .record import Run
from .task import Task


def run_lengths(
    task: Task,
    methods: Mapping[str, Any] | Sequence[str],
    seeds: int | Sequence[int] = 3,
    output_dir: str | Path = "comparison",
    lengths: Sequence[int] = (1, 4, 16),
    *,
    report: bool = True,
    progress: Callable[[int, str, int, str], None] | None = None,
    on_run: Callable[[int, Run], None] | None = None,
    **options: Any,
) -> dict[int, Comparison]:
    """Compare methods at several lengths of training, and write a map of where each is best.

    Each length is a comparison of its own in the directory `length-N`, and resumes as one. Learning rate schedules span
    the complete training. Lengths can be added later.

    Args:
        task: Model, data and budget. Its number of epochs, or of steps if `max_steps` is given, is multiplied.
        methods: As for [`run_comparison`].
        seeds: As for [`run_comparison`].
        output_dir: Directory for `report.html`, `report.md`, `figures/`, `lengths.csv`, and a directory per length.
        lengths: Multiples of the number of epochs.
        report: Write the reports.
        progress: Function that is called with the length, the method, the seed and a short status.
        on_run: Function that is called with the length and each run, finished in this call or earlier.
        options: Other arguments of [`run_comparison`].

    Returns:
        The comparisons by length.

    Raises:
        ValueError: As [`run_comparison`], or `lengths` are not different integers of at least 1.

    Example:
        >>> import tempfile, torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        ...                    image_size=8, patch_size=4, num_channels=1, num_labels=2)
        >>> data = [{"pixel_values": torch.randn(1, 8, 8), "labels": i % 2} for i in range(16)]
        >>> task = Task("noise", lambda: ViTForImageClassification(config), data, data,
        ...             training_args={"max_steps": 1, "use_cpu": True})
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     found = run_lengths(task, ["erm", "mixup"], 1, directory, [1, 2], report=False)
        >>> found[2].settings["training_args"]["max_steps"]
        2
    """
    lengths = list(lengths)
    valid = all(isinstance(length, int) and not isinstance(length, bool) and length >= 1 for length in lengths)
    if not lengths or not valid or len(set(lengths)) < len(lengths):
        raise ValueError(f"lengths must be different integers of at least 1, multiples of the epochs, got {lengths}.")
    found: dict[int, Comparison] = {}
    for length in sorted(lengths):
        found[length] = run_comparison(
            lengthen(task, length),
            methods,
            seeds,
            Path(output_dir) / f"length-{length}",
            report=report,
            progress=None if progress is None else functools.partial(progress, length),
            on_run=None if on_run is None else functools.partial(on_run, length),
            **options,
        )
    if report:
        from .report.lengths import write_lengths_report

        write_lengths_report(found, output_dir)
    return found


def lengthen(task: Task, length: int) -> Task:
    """Return a task with a multiple of its epochs, or of its steps.

    Example:
        >>> task = Task("none", lambda: None, [1], [1], training_args={"num_train_epochs": 5})
        >>> lengthen(task, 4).training_args
        {'num_train_epochs': 20}
    """
    given = dict(task.training_args)
    name = "max_steps" if given.get("max_steps", -1) > 0 else "num_train_epochs"
    default = next(f.default for f in dataclasses.fields(TrainingArguments) if f.name == "num_train_epochs")
    given[name] = length * given.get(name, default)
    return dataclasses.replace(task, training_args=given)


def duration(comparison: Comparison) -> str:
    """Return the number of epochs or steps of a comparison, with its unit."""
    arguments = comparison.settings.get("training_args", {})
    if arguments.get("max_steps", -1) > 0:
        return f"{arguments['max_steps']:,} steps"
    epochs = arguments.get("num_train_epochs", 3)
    return f"{epochs:g} epoch{'s' * (epochs != 1)}"
