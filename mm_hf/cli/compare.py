"""Compare mixing methods on your data over several seeds, with confidence intervals."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..data.options import DataOptions, ModelOptions
from ..methods.settings import check_required, nearest, parse_specification, parse_values, setting
from ._methods import METHOD_NAMES, check_method
from ._option_files import expand_option_file
from ._options import (
    FIXED_OPTIONS,
    SMALL_VIT,
    TRAINING,
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
    from ..comparison import Comparison, Run, Task
    from ..methods import Mixing

USAGE = """mm-hf compare [OPTIONS.yaml] --dataset_name NAME --model_name_or_path NAME
                     --methods erm mixup dense_multimix --seeds 5 --output_dir DIR [options]"""
DESCRIPTION = f"""\
Trains each method with several seeds, evaluates it on the test set, and writes DIR/report.html with
confidence intervals of all differences. The same command resumes an interrupted comparison.
OPTIONS.yaml contains options as lines `name: value`.

example without downloads:
  mm-hf compare --dataset_name digits {SMALL_VIT} \\
  --methods erm mixup dense_multimix --seeds 3 --num_train_epochs 10 --learning_rate 2e-3"""
EPILOG = f"""{textwrap.fill(METHOD_NAMES, 100)}
  with settings and a custom name:  --methods erm 'few=dense_multimix:num_mixed=100,attention=gap'
{TRAINING}"""
FIXED = {**FIXED_OPTIONS, "seed": "use --seeds", "data_seed": "use --seeds"}


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
    lengths: list[int] | None = setting(
        None,
        "Train at these multiples of the epochs, such as 1 4 16. Draws a map of the best methods.",
        within="[1, inf)",
    )
    output_dir: str = field(default="comparison", metadata={"help": "Directory for the report and the runs."})
    keep_models: Literal["best", "none", "all"] = field(
        default="best", metadata={"help": "Models to keep. best: one of each method, by validation accuracy."}
    )


def main(arguments: Sequence[str]) -> int:
    """Run a comparison from command-line arguments."""
    parser = make_parser(
        "mm-hf compare", USAGE, DESCRIPTION, EPILOG,
        comparison=CompareOptions, robustness=RobustnessOptions, data=DataOptions, model=ModelOptions,
    )  # fmt: skip
    kinds = (CompareOptions, RobustnessOptions, DataOptions, ModelOptions)
    values = parse(parser, expand_option_file(arguments), "mm-hf compare", FIXED)
    options, robustness, data, model = (take(values, kind) for kind in kinds)
    names = [check_specification(text) for text in options.methods]
    if options.baseline is not None and options.baseline not in names:
        raise ValueError(
            f"baseline must be one of the methods, {', '.join(names)}, got {options.baseline!r}"
            f"{nearest(options.baseline, names)}."
        )
    seeds = list(range(options.seeds[0])) if len(options.seeds) == 1 else options.seeds
    check_is_directory(options.output_dir)
    data.check()
    model.check()
    return _compare(options, seeds, robustness, data, model, training_values(values, *kinds))


def check_specification(text: str) -> str:
    """Return the name of a method of the comparison.

    Raises:
        ValueError: The method or a setting is unknown, or a value invalid.
    """
    name, method, texts = parse_specification(text)
    settings = check_method(method)
    check_required(method, settings, parse_values(settings, texts, method))
    return name


def _compare(
    options: CompareOptions,
    seeds: list[int],
    robustness: RobustnessOptions,
    data: DataOptions,
    model: ModelOptions,
    training: dict[str, Any],
) -> int:
    import transformers

    from ..comparison import EvaluationOptions, as_methods, run_comparison
    from ..data.build import build_task
    from ._progress import ProgressTable

    methods = as_methods(options.methods)
    evaluation = EvaluationOptions(robustness.robustness_samples, robustness.epsilon)
    check_trackers(training.get("report_to"))
    quiet()
    task = build_task(data, model, training)
    if training.get("log_level") is None:
        transformers.utils.logging.set_verbosity_error()
    common: dict[str, Any] = {
        "baseline": options.baseline,
        "evaluation": evaluation,
        "keep_models": options.keep_models,
    }
    if options.lengths is not None:
        _compare_lengths(task, methods, seeds, options, common)
        return 0
    with ProgressTable(list(methods), seeds) as table:
        comparison = run_comparison(
            task, methods, seeds, options.output_dir, progress=table.update, on_run=table.finish, **common
        )
    _print_summary(comparison, Path(options.output_dir))
    return 0


def _compare_lengths(
    task: Task, methods: Mapping[str, Mixing], seeds: list[int], options: CompareOptions, common: dict[str, Any]
) -> None:
    from ..comparison import run_lengths
    from ..comparison.report.lengths import sentence
    from ._progress import ProgressTable

    lengths = sorted(options.lengths or [])
    work = {_row(name, length): float(length) for length in lengths for name in methods}
    with ProgressTable(list(work), seeds, work=work) as table:

        def update(length: int, name: str, seed: int, status: str) -> None:
            table.update(_row(name, length), seed, status)

        def finish(length: int, run: Run) -> None:
            table.finish(run, _row(run.method, length))

        found = run_lengths(task, methods, seeds, options.output_dir, lengths, progress=update, on_run=finish, **common)
    print()
    for length, comparison in found.items():
        print(sentence(length, comparison))
    directory = Path(options.output_dir)
    print(f"\nWrote {directory / 'report.html'}, report.md, lengths.csv, figures/ and a directory for each length.")


def _row(name: str, length: int) -> str:
    return f"{name} {length}x"


def _print_summary(comparison: Comparison, directory: Path) -> None:
    from ..comparison.report.findings import FINDINGS_HEADING, findings

    print(f"\n{FINDINGS_HEADING}" if comparison.differences else "")
    for sentence in findings(comparison):
        print(sentence)
    print(f"\nWrote {directory / 'report.html'}, report.md, results.csv, figures/ and runs/.")
