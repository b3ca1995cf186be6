"""Measure one trained model: accuracy, calibration, robustness, unknown classes, embedding space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers.utils import cached_file

from ..comparison import Comparison, EvaluationOptions, Run, evaluate_model, write_report
from ..comparison.compare import describe
from ..comparison.run import weights_digest
from ..data.build import ModelOptions, build_task
from ..data.splits import DataOptions
from ..methods import Mixing
from ..training.hub import MIXING_FILE, load_mixing
from ._options import ALIKE, make_parser, parse, with_name
from ._progress import quiet

USAGE = "mm-hf analyze MODEL [OPTIONS.yaml] --dataset_name NAME [--output_dir DIR] [options]"
DESCRIPTION = """Tests a trained classifier of images or texts and writes DIR/report.html, with the figures and pictures of
mm-hf compare. MODEL is a directory or a Hub name, trained with mm_hf or not.

example:
  mm-hf analyze comparison/runs/dense_multimix/seed-0/model --dataset_name digits --output_dir analysis"""
EPILOG = (
    "batches and precision: fields of TrainingArguments that tests heed, --per_device_eval_batch_size 64 --use_cpu ..."
)


@dataclass
class AnalyzeOptions:
    """What is written, and what is measured beside the figures of the predictions."""

    output_dir: str = field(default="analysis", metadata={"help": "For report and figures."})
    robustness_samples: int = field(
        default=500, metadata={"help": "Test images that are attacked and corrupted; 0: none."}
    )
    epsilon: float = field(
        default=8 / 255, metadata={"help": "Largest change by FGSM, of pixels in [0, 1]. Default: 8/255."}
    )


def main(arguments: Sequence[str]) -> int:
    """Analyze a model as the arguments say."""
    parser = make_parser(
        "analyze", USAGE, DESCRIPTION, EPILOG, report=AnalyzeOptions, data=DataOptions, model=ModelOptions
    )
    given = with_name(arguments, "--model_name_or_path")
    options, data, model, training = parse(parser, given, "mm-hf analyze", ALIKE)
    if model.model_name_or_path is None:
        raise ValueError("Say which model: mm-hf analyze MODEL, a directory or a Hub name.")
    quiet()
    directory = Path(options.output_dir)
    measures = EvaluationOptions(options.robustness_samples, options.epsilon)
    task = build_task(data, model, training, trained=True)
    transformers.utils.logging.set_verbosity_error()
    trained: Any = task.model_init()
    trained.to(task.arguments(str(directory), 0).device)
    measured = evaluate_model(trained, task, measures, str(directory))
    title = name_of(model.model_name_or_path)
    mixing = _mixing(model.model_name_or_path, model.hub)
    settings = describe(task, {}, measures)
    for unused in ("training_examples", "validation_examples"):
        settings["task"].pop(unused)
    directory.mkdir(parents=True, exist_ok=True)
    run = Run(title, 0, measured.metrics, measured.corruptions, [], measured.notes, weights_digest(trained), directory)
    run.write(measured.arrays)
    comparison = Comparison(task.name, {title: mixing}, {title: [run]}, None, settings, class_names=task.class_names)
    comparison.write_csv(directory / "results.csv")
    path = write_report(comparison, directory)
    for metric in ("accuracy", "nll", "brier", "calibration_error"):
        print(f"{metric}: {run.metrics[metric]:.4f}")
    print(f"\nWrote {path}, report.md, results.csv and pictures/.")
    return 0


def name_of(model: str) -> str:
    """What a report calls a model: the last part of its name that says something."""
    parts = [part for part in Path(model).parts if part not in ("/", ".", "..")]
    if len(parts) >= 3 and parts[-1] == "model" and parts[-2].startswith("seed-"):
        return f"{parts[-3]}, {parts[-2].replace('-', ' ')}"
    return parts[-1] if parts else model


def _mixing(model: str, hub: dict[str, Any]) -> Mixing | None:
    """The method that the model was trained with, if it says so."""
    found = cached_file(model, MIXING_FILE, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else load_mixing(Path(found).parent)
