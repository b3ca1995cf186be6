"""Find out which mixing method helps on your data, by how much, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import transformers

from ..comparison import EvaluationOptions, as_methods, run_comparison
from ..comparison.compare import Comparison
from ..data.build import ModelOptions, build_task
from ..data.splits import DataOptions
from ..methods import METHODS
from ._options import ALIKE, SMALL_VIT, TRAINING, make_parser, parse, with_file
from ._progress import ProgressTable, quiet

USAGE = """mm-hf compare [OPTIONS.yaml] --dataset_name NAME --model_name_or_path NAME
                     --methods erm mixup dense_multimix --seeds 5 --output_dir DIR [options]"""
DESCRIPTION = f"""Trains methods alike over several seeds, tests them, and writes DIR/report.html: accuracy, calibration,
robustness, unknown classes, embedding space and cost, with intervals for all differences. Started again with
the same options, it goes on where it was stopped. OPTIONS.yaml holds options as `name: value`.

example, which needs no download:
  mm-hf compare --dataset_name digits {SMALL_VIT} \\
    --methods erm mixup dense_multimix --seeds 3 --num_train_epochs 10 --learning_rate 2e-3"""
EPILOG = f"""methods: {", ".join(sorted(METHODS))}
  with settings, and a name of its own:  --methods erm 'few=dense_multimix:num_mixed=100,attention=gap'

{TRAINING}
  --save_strategy epoch  a stopped run goes on from its last epoch"""


@dataclass
class CompareOptions:
    """What is compared, and what is written."""

    methods: list[str] = field(
        default_factory=lambda: ["erm", "mixup", "multimix", "dense_multimix"], metadata={"help": "See below."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [3], metadata={"help": "How many runs of each method; or several numbers: which seeds."}
    )
    baseline: str | None = field(
        default=None, metadata={"help": "What the others are compared with. Default: erm, or else the first."}
    )
    output_dir: str = field(default="comparison", metadata={"help": "For report, figures and runs."})
    keep_models: Literal["best", "none", "all"] = field(
        default="best", metadata={"help": "best: one of each method, by validation accuracy."}
    )
    robustness_samples: int = field(
        default=500, metadata={"help": "Test images that are attacked and corrupted; 0: none."}
    )
    epsilon: float = field(
        default=8 / 255, metadata={"help": "Largest change by FGSM, of pixels in [0, 1]. Default: 8/255."}
    )


def main(arguments: Sequence[str]) -> int:
    """Compare methods as the arguments say."""
    parser = make_parser(
        "compare", USAGE, DESCRIPTION, EPILOG, comparison=CompareOptions, data=DataOptions, model=ModelOptions
    )
    options, data, model, training = parse(parser, with_file(arguments), "mm-hf compare", ALIKE)
    methods = as_methods(options.methods)
    measures = EvaluationOptions(options.robustness_samples, options.epsilon)
    seeds = list(range(options.seeds[0])) if len(options.seeds) == 1 else options.seeds
    quiet()
    task = build_task(data, model, training)
    if training.get("log_level") is None:
        transformers.utils.logging.set_verbosity_error()
    with ProgressTable(list(methods), seeds) as board:
        comparison = run_comparison(
            task,
            methods,
            seeds,
            options.output_dir,
            baseline=options.baseline,
            measures=measures,
            keep_models=options.keep_models,
            progress=board.update,
            on_run=board.finished,
        )
    _print_summary(comparison, Path(options.output_dir))
    return 0


def _print_summary(comparison: Comparison, directory: Path) -> None:
    from ..comparison.report.sections import FOUND, findings

    print(f"\n{FOUND}" if comparison.differences else "")
    for sentence in findings(comparison):
        print(sentence)
    print(f"\nWrote {directory / 'report.html'}, report.md, results.csv, pictures/ and runs/.")
