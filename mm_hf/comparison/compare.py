"""All runs of a comparison, their statistics, and the settings that must not change between runs."""

from __future__ import annotations

import csv
import io
import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import TrainerCallback

from ..evaluation.files import write_text
from ..evaluation.metrics import compared_metrics, example_scores
from ..evaluation.statistics import REPLICATES, Interval, mean_and_spread, paired_bootstrap
from ..evaluation.templates import csv_cell
from ..locations import LocationError
from ..methods import ERM, Mixing
from .derived import derived_names, derived_runs
from .evaluate import EvaluationOptions, check_packages
from .record import DamagedFileError, Run
from .run import Progress, remove_checkpoints, train_run, warm_up
from .settings import check_settings, describe
from .task import Task, as_methods, baseline_of, slug

Keep = Literal["best", "none", "all"]


@dataclass
class Comparison:
    """Finished runs of a comparison, or of one model.

    Attributes:
        name: Name of the task.
        methods: Methods by name; None for a model whose method is unknown.
        runs: Runs of each method, in the order of the seeds.
        baseline: Name of the method that the others are compared with; None for a single model.
        settings: Settings that all runs share.
        failed: Reason for each method that cannot train this model.
        derived: Names of the runs that were derived from those of plain training: early stopping and temperature
            scaling. They only have the metrics of the predictions.
        class_names: Names of all classes.
        replicates: Number of replicates of the bootstrap.
        test_image: Function that returns the pixels of a test example by its index; None if they are no images.
    """

    name: str
    methods: dict[str, Mixing | None]
    runs: dict[str, list[Run]]
    baseline: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    derived: Sequence[str] = ()
    class_names: Sequence[str] | None = None
    replicates: int = REPLICATES
    test_image: Callable[[int], np.ndarray] | None = None

    @property
    def trained(self) -> dict[str, list[Run]]:
        """The runs that were trained, without those that were derived from them."""
        return {name: runs for name, runs in self.runs.items() if name not in self.derived}

    @property
    def seeds(self) -> list[int]:
        """The seeds of the runs."""
        return [run.seed for run in next(iter(self.runs.values()))]

    def values(self, metric: str) -> dict[str, np.ndarray]:
        """Return the values of a metric, (seeds,) for each method; methods without it for some seed are left out."""
        return {
            name: np.array([run.metrics[metric] for run in runs])
            for name, runs in self.runs.items()
            if all(metric in run.metrics for run in runs)
        }

    def mean(self, metric: str) -> dict[str, Interval]:
        """Return the mean over seeds and Student's 95 % interval of a metric, for each method that has it.

        With two seeds, the mean has a [`Range`] and no interval.
        """
        return {name: mean_and_spread(values) for name, values in self.values(metric).items()}

    @cached_property
    def differences(self) -> dict[str, dict[str, Interval]]:
        """Differences from the baseline with bootstrap intervals, by metric and method.

        They cover the metrics with a per-example statistic and are empty without a baseline.
        """
        if self.baseline is None or len(self.runs) < 2:
            return {}
        scores = {
            name: [example_scores(arrays["logits"], arrays["labels"]) for arrays in (run.arrays for run in runs)]
            for name, runs in self.runs.items()
        }
        return {
            info.name: {
                name: paired_bootstrap(
                    np.stack([s[info.name] for s in scores[name]]),
                    np.stack([s[info.name] for s in scores[self.baseline]]),
                    statistic=info.statistic.reduce,
                    replicates=self.replicates,
                )
                for name in self.runs
                if name != self.baseline
            }
            for info in compared_metrics()
            if info.statistic is not None
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each method, seed and metric: the content of `results.csv`."""
        return [
            {"method": name, "seed": run.seed, "metric": metric, "value": value}
            for name, runs in self.runs.items()
            for run in runs
            for metric, value in (*run.metrics.items(), *_flat(run.corruptions))
        ]

    def write_csv(self, path: str | Path) -> None:
        """Write [`rows`] as a table with the columns method, seed, metric and value."""
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, ["method", "seed", "metric", "value"])
        writer.writeheader()
        writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in self.rows())
        write_text(path, table.getvalue())


def _flat(corruptions: Mapping[str, Sequence[float]]) -> list[tuple[str, float]]:
    return [(f"{name}_{k}_accuracy", value) for name, curve in corruptions.items() for k, value in enumerate(curve)]


def run_comparison(
    task: Task,
    methods: Mapping[str, Any] | Sequence[str],
    seeds: int | Sequence[int] = 3,
    output_dir: str | Path = "comparison",
    *,
    baseline: str | None = None,
    evaluation: EvaluationOptions | None = None,
    keep_models: Keep = "best",
    replicates: int = REPLICATES,
    report: bool = True,
    progress: Progress | None = None,
    on_run: Callable[[Run], None] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Comparison:
    """Train methods on a task over seeds, evaluate them, and write a report.

    For each seed all methods start from the same weights and use the same batches in the same order. A run is written
    when it is finished. A second call with the same directory skips finished runs and resumes an interrupted one from
    its last checkpoint, if the training arguments save checkpoints (`save_strategy="epoch"`). Seeds and methods can be
    added later.

    With validation examples, two baselines without a training of their own are derived from plain training: the weights
    with the best validation accuracy (early stopping), and the logits divided by a number that is fitted on the
    validation examples (temperature scaling). Their names are that of plain training with `_early_stopping` and
    `_temperature_scaling`.

    Args:
        task: Model, data and budget.
        methods: Methods by name, or specifications such as "dense_multimix:num_mixed=500": see [`as_methods`].
        seeds: Number of seeds (0, 1, ...), or the seeds themselves.
        output_dir: Directory for `report.html`, `report.md`, `figures/`, `results.csv`, `settings.json` and `runs/`.
        baseline: Name of the method that the others are compared with. Default: plain training (ERM), else the first.
        evaluation: Metrics beyond those of the predictions. Default: `EvaluationOptions()`.
        keep_models: "best" keeps, for each method, the model of the seed with the best validation accuracy (of the
            first seed without validation data); "all" keeps all models and checkpoints; "none" keeps no model.
        replicates: Number of replicates of the bootstrap.
        report: Write report and plots.
        progress: Function that is called with the method, the seed and a short status.
        on_run: Function that is called with each run, finished in this call or earlier.
        callbacks: Trainer callbacks of all runs.

    Returns:
        The comparison. Methods that cannot train this model are listed in `Comparison.failed`.

    Raises:
        ValueError: `output_dir` contains another comparison or a damaged file, an argument is invalid, or the baseline
            cannot train this model.
        ImportError: The evaluation needs a package that is not installed.

    Example:
        >>> import tempfile, torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        ...                    image_size=8, patch_size=4, num_channels=1, num_labels=2)
        >>> data = [{"pixel_values": torch.randn(1, 8, 8), "labels": i % 2} for i in range(16)]
        >>> task = Task("noise", lambda: ViTForImageClassification(config), data, data,
        ...             training_args={"max_steps": 1, "use_cpu": True})
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     comparison = run_comparison(task, ["erm", "multimix:num_mixed=10"], 2, directory, report=False)
        >>> comparison.values("accuracy")["erm"].shape
        (2,)
    """
    chosen = as_methods(methods)
    reference = baseline_of(chosen, baseline)
    which = _check_arguments(chosen, seeds, keep_models)
    evaluation = evaluation or EvaluationOptions()
    check_packages(task, evaluation)
    directory = Path(output_dir)
    settings = describe(task, chosen, evaluation)
    check_settings(directory, settings, task)
    # The baseline comes first in every table and has the first color in every plot.
    chosen = {reference: chosen[reference], **chosen}
    runs: dict[str, list[Run]] = {name: [] for name in chosen}
    failed: dict[str, str] = {}
    is_warm = False
    for seed, name in itertools.product(which, chosen):
        if name in failed:
            continue
        where = directory / "runs" / slug(name) / f"seed-{seed}"
        run = Run.read(where)
        if run is None:
            if not is_warm:
                warm_up(task, directory / "runs")
                is_warm = True
            try:
                run = train_run(
                    task, name, chosen[name], seed, where,
                    evaluation=evaluation, progress=progress, callbacks=list(callbacks),
                )  # fmt: skip
            except (LocationError, ValueError) as error:
                if name == reference or isinstance(error, DamagedFileError):
                    raise
                failed[name] = str(error)
                if progress is not None:
                    progress(name, seed, f"not possible: {error}")
                continue
            if keep_models != "all":
                remove_checkpoints(where)
        _check_start(run, runs[reference])
        runs[name].append(run)
        if on_run is not None:
            on_run(run)
    finished = {name: runs[name] for name in chosen if name not in failed}
    _remove_models(finished, keep_models)
    derived: dict[str, list[Run]] = {}
    for name in finished:
        if type(chosen[name]) is ERM:
            derived |= derived_runs(directory, name, which)
    comparison = Comparison(
        name=task.name,
        methods={name: chosen[name] for name in finished},
        runs={**finished, **derived},
        baseline=reference,
        settings=settings,
        failed=failed,
        derived=list(derived),
        class_names=task.class_names,
        replicates=replicates,
        test_image=None if task.normalization is None else task.test_image,
    )
    comparison.write_csv(directory / "results.csv")
    if report:
        from .report.write import write_report

        write_report(comparison, directory)
    return comparison


def _check_arguments(methods: Mapping[str, Mixing], seeds: int | Sequence[int], keep_models: str) -> list[int]:
    """Check arguments of `run_comparison`, and return the seeds."""
    taken = {name for plain, method in methods.items() if type(method) is ERM for name in derived_names(plain).values()}
    if taken & methods.keys():
        raise ValueError(
            f"methods has {min(taken & methods.keys())!r}, the name of a baseline that is derived from plain training: "
            "choose another name."
        )
    which = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if not which or len(set(which)) < len(which) or min(which) < 0:
        raise ValueError(
            f"seeds must be the number of runs of each method (at least 1), or different seeds, got {seeds!r}. "
            "One run with seed 0 is seeds=1."
        )
    if keep_models not in ("best", "none", "all"):
        raise ValueError(f"keep_models must be best, none or all, got {keep_models!r}.")
    return which


def _check_start(run: Run, reference: Sequence[Run]) -> None:
    for other in reference:
        if other.seed == run.seed and other.initial_weights != run.initial_weights:
            raise ValueError(
                f"{run.method!r} and {other.method!r} did not start from the same weights with seed {run.seed}: "
                "model_init must return the same model each time it is called after the same seed."
            )


def _remove_models(runs: Mapping[str, Sequence[Run]], keep: Keep) -> None:
    """Remove the models that `keep_models` excludes."""
    for each in runs.values():
        best = max(each, key=_validation_accuracy)
        for run in each:
            if keep == "none" or (keep == "best" and run is not best):
                shutil.rmtree(run.directory / "model", ignore_errors=True)


def _validation_accuracy(run: Run) -> float:
    """Return the validation accuracy at the end of a run, 0 without validation data."""
    return next((entry["eval_accuracy"] for entry in reversed(run.history) if "eval_accuracy" in entry), 0.0)
