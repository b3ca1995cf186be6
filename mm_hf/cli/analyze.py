"""Evaluate one trained model: accuracy, calibration, robustness, unknown classes, embedding space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.options import DataOptions, ModelOptions
from ._option_files import expand_arguments
from ._options import (
    FIXED_OPTIONS,
    RobustnessOptions,
    check_is_directory,
    check_trackers,
    make_parser,
    parse,
    quiet,
    take,
    training_values,
)

if TYPE_CHECKING:
    from ..methods import Mixing

USAGE = "mm-hf analyze MODEL [OPTIONS.yaml] --dataset_name NAME [--output_dir DIR] [options]"
DESCRIPTION = """\
Evaluates a trained image or text classifier on a test set and writes DIR/report.html with the metrics and plots
of mm-hf compare. MODEL is a directory or a Hub name. It need not be trained with mm_hf.

example:
  mm-hf analyze comparison/runs/dense_multimix/seed-0/model --dataset_name digits --output_dir analysis"""
EPILOG = (
    "batch size, device and precision: fields of TrainingArguments, such as --per_device_eval_batch_size 64 --use_cpu"
)


@dataclass
class AnalyzeOptions:
    """Output of the evaluation."""

    output_dir: str = field(default="analysis", metadata={"help": "Directory for the report."})


def main(arguments: Sequence[str]) -> int:
    """Evaluate a model from command-line arguments."""
    parser = make_parser(
        "mm-hf analyze", USAGE, DESCRIPTION, EPILOG,
        report=AnalyzeOptions, robustness=RobustnessOptions, data=DataOptions, model=ModelOptions,
    )  # fmt: skip
    kinds = (AnalyzeOptions, RobustnessOptions, DataOptions, ModelOptions)
    given = expand_arguments(arguments, "--model_name_or_path")
    values = parse(parser, given, "mm-hf analyze", FIXED_OPTIONS)
    options, robustness, data, model = (take(values, kind) for kind in kinds)
    if model.model_name_or_path is None:
        raise ValueError("MODEL is missing: mm-hf analyze MODEL requires a directory or a Hub name.")
    check_is_directory(options.output_dir)
    data.check()
    model.check()
    return _analyze(options, robustness, data, model, training_values(values, *kinds))


def _analyze(
    options: AnalyzeOptions,
    robustness: RobustnessOptions,
    data: DataOptions,
    model: ModelOptions,
    training: dict[str, Any],
) -> int:
    import transformers

    from ..comparison import Comparison, EvaluationOptions, Run, evaluate_model, write_report
    from ..comparison.compare import describe
    from ..comparison.run import weights_digest
    from ..data.build import build_task
    from ..evaluation.metrics import metrics_of

    check_trackers(training.get("report_to"))
    quiet()
    mixing = _mixing(str(model.model_name_or_path), model.hub)
    directory = Path(options.output_dir)
    evaluation = EvaluationOptions(robustness.robustness_samples, robustness.epsilon)
    task = build_task(data, model, training, trained=True)
    transformers.utils.logging.set_verbosity_error()
    trained: Any = task.model_init()
    trained.to(task.arguments(str(directory), 0).device)
    result = evaluate_model(trained, task, evaluation, str(directory))
    title = name_of(str(model.model_name_or_path))
    settings = describe(task, {}, evaluation)
    for unused in ("training_examples", "validation_examples"):
        settings["task"].pop(unused)
    directory.mkdir(parents=True, exist_ok=True)
    run = Run(title, 0, result.metrics, result.corruptions, [], result.notes, weights_digest(trained), directory)
    run.write(result.arrays)
    comparison = Comparison(
        task.name, {title: mixing}, {title: [run]}, None, settings, class_names=task.class_names,
        test_image=None if task.normalization is None else task.test_image,
    )  # fmt: skip
    comparison.write_csv(directory / "results.csv")
    path = write_report(comparison, directory)
    for info in metrics_of("classification"):
        print(f"{info.title}: {info.with_unit(run.metrics[info.name])}")
    print(f"\nWrote {path}, report.md, results.csv and figures/.")
    return 0


def name_of(model: str) -> str:
    """Return the name of a model in a report: the method and seed of a run of a comparison, or the last path component.

    Example:
        >>> name_of("comparison/runs/mixup/seed-0/model"), name_of("google/vit-base-patch16-224")
        ('mixup, seed 0', 'vit-base-patch16-224')
    """
    parts = [part for part in Path(model).parts if part not in ("/", ".", "..")]
    if len(parts) >= 3 and parts[-1] == "model" and parts[-2].startswith("seed-"):
        return f"{parts[-3]}, {parts[-2].replace('-', ' ')}"
    return parts[-1] if parts else model


def _mixing(model: str, hub: dict[str, Any]) -> Mixing | None:
    """Return the method that the model was trained with, or None if the model has no mixing.json."""
    from transformers.utils import cached_file

    from ..training.hub import MIXING_FILE, load_mixing

    found = cached_file(model, MIXING_FILE, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else load_mixing(Path(found).parent)
