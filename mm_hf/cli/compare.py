"""Compare mixing methods on your data over several seeds, with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import transformers

from ..comparison import EvaluationOptions, as_methods, run_comparison
from ..comparison.compare import Comparison
from ..comparison.task import FIXED_ARGUMENTS
from ..data.build import ModelOptions, build_task
from ..data.splits import DataOptions
from ..methods import METHODS
from ._options import SMALL_VIT, TRAINING, RobustnessOptions, expand_option_file, make_parser, parse
from ._progress import ProgressTable, quiet

USAGE = """mm-hf compare [OPTIONS.yaml] --dataset_name NAME --model_name_or_path NAME
                     --methods erm mixup dense_multimix --seeds 5 --output_dir DIR [options]"""
DESCRIPTION = f"""\
Trains each method with several seeds, evaluates it on the test set, and writes DIR/report.html: accuracy,
calibration, robustness, unknown classes, embedding space and cost, with confidence intervals of all differences.
The same command resumes an interrupted comparison. OPTIONS.yaml contains options as lines `name: value`.

example without downloads:
  mm-hf compare --dataset_name digits {SMALL_VIT} \\
    --methods erm mixup dense_multimix --seeds 3 --num_train_epochs 10 --learning_rate 2e-3"""
EPILOG = f"""methods: {", ".join(sorted(METHODS))}
  with settings and a custom name:  --methods erm 'few=dense_multimix:num_mixed=100,attention=gap'

{TRAINING}
  --save_strategy epoch  resume an interrupted run from its last epoch"""
FIXED = {**dict.fromkeys(FIXED_ARGUMENTS, "remove it"), "seed": "use --seeds", "data_seed": "use --seeds"}


@dataclass
class CompareOptions:
    """Methods, seeds and output of a comparison."""

    methods: list[str] = field(
        default_factory=lambda: ["erm", "mixup", "multimix", "dense_multimix"],
        metadata={"help": "Methods to compare, see below."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [3], metadata={"help": "Number of runs of each method, or a list of seeds."}
    )
    baseline: str | None = field(
        default=None, metadata={"help": "Method that the others are compared with. Default: erm, or else the first."}
    )
    output_dir: str = field(default="comparison", metadata={"help": "Directory for the report and the runs."})
    keep_models: Literal["best", "none", "all"] = field(
        default="best", metadata={"help": "best: keep one model of each method, chosen by validation accuracy."}
    )


def main(arguments: Sequence[str]) -> int:
    """Run a comparison from command-line arguments."""
    parser = make_parser(
        "compare", USAGE, DESCRIPTION, EPILOG,
        comparison=CompareOptions, robustness=RobustnessOptions, data=DataOptions, model=ModelOptions,
    )  # fmt: skip
    options, robustness, data, model, training = parse(parser, expand_option_file(arguments), "mm-hf compare", FIXED)
    methods = as_methods(options.methods)
    evaluation = EvaluationOptions(robustness.robustness_samples, robustness.epsilon)
    seeds = list(range(options.seeds[0])) if len(options.seeds) == 1 else options.seeds
    quiet()
    task = build_task(data, model, training)
    if training.get("log_level") is None:
        transformers.utils.logging.set_verbosity_error()
    with ProgressTable(list(methods), seeds) as table:
        comparison = run_comparison(
            task,
            methods,
            seeds,
            options.output_dir,
            baseline=options.baseline,
            evaluation=evaluation,
            keep_models=options.keep_models,
            progress=table.update,
            on_run=table.finish,
        )
    _print_summary(comparison, Path(options.output_dir))
    return 0


def _print_summary(comparison: Comparison, directory: Path) -> None:
    from ..comparison.report.findings import FINDINGS_HEADING, findings

    print(f"\n{FINDINGS_HEADING}" if comparison.differences else "")
    for sentence in findings(comparison):
        print(sentence)
    print(f"\nWrote {directory / 'report.html'}, report.md, results.csv, figures/ and runs/.")
