"""What the default is chosen by: candidates on the tasks of the study, measured on examples that its tests never see.

    python benchmarks/evidence_search.py --tasks mnist1d --methods erm k2=dense_multimix:effective_examples=2 --seeds 2
    python benchmarks/evidence_search.py --summary     # what was run here, in benchmarks/results/search.csv; what was before stays

A method is written as `mm-hf compare` takes it. Stopped, the same command goes on; more candidates can be added.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from evidence import chosen_seeds, command, quiet  # first: it forbids downloads
from evidence_study import METHODS, Options
from evidence_summary import BASELINE, finished_runs, keep_rows, paired
from evidence_tasks import TASKS
from harness import RESULTS

from mm_hf import Mixing
from mm_hf.comparison import EvaluationOptions, Run, run_comparison
from mm_hf.comparison.task import parse_method
from mm_hf.evaluation.statistics import mean_interval

OUTPUT = Path("outputs/evidence_search")
FIGURES = ("accuracy", "nll", "calibration_error", "ood_auroc", "class_spread", "train_seconds")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run candidates, and sum up."""
    parser = command(__doc__, 2, OUTPUT)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", default=["erm", "dense_multimix"], metavar="METHOD")
    args = parser.parse_args(arguments)
    if args.summary:
        rows = [row for name in TASKS for row in rows_of(args.output_dir / name)]
        if not rows:
            parser.error(
                f"--output_dir {args.output_dir} has no finished runs: run candidates first, without --summary."
            )
        keep_rows(RESULTS / "search.csv", rows)
        return 0
    quiet()
    chosen = {name: METHODS[name]() for name in args.methods if name in METHODS}
    chosen |= dict(parse_method(text) for text in args.methods if text not in METHODS)
    seeds = chosen_seeds(args.seeds)
    options = Options(search=True, cache=args.output_dir / "cache")
    for name in args.tasks:
        compare(name, chosen, seeds, args.output_dir, options)
    return 0


def compare(task: str, methods: Mapping[str, Mixing], seeds: Sequence[int], output_dir: Path, options: Options) -> None:
    """Plain training and methods on a task: all runs that are not there yet, one line each; no robustness, no report."""
    run_comparison(
        TASKS[task].task(options),
        {BASELINE: METHODS[BASELINE](), **methods},
        seeds,
        output_dir / task,
        baseline=BASELINE,
        measures=EvaluationOptions(robustness_samples=0),
        keep_models="none",
        report=False,
        on_run=lambda run: tell(task, run),
    )


def tell(task: str, run: Run) -> None:
    """One line a run."""
    shutil.rmtree(run.directory / "model", ignore_errors=True)
    found = ", ".join(f"{name} {run.metrics[name]:.4f}" for name in FIGURES if name in run.metrics)
    print(f"{time.strftime('%H:%M:%S')} {task}, {run.method}, seed {run.seed}: {found}", flush=True)


def rows_of(directory: Path) -> list[dict[str, object]]:
    """Means over seeds, and differences to plain training on the same seeds."""
    runs, rows = finished_runs(directory, known_only=False), []
    for method in runs:
        comparison = paired(directory, runs, method)
        for figure in FIGURES:
            values = comparison.values(figure)
            if method in values:
                difference = mean_interval(values[method] - values["erm"])
                row = {"task": directory.name, "method": method, "figure": figure, "seeds": len(comparison.seeds)}
                row |= {"mean": f"{values[method].mean():.5g}", "difference_to_erm": f"{difference.value:.5g}"}
                rows.append(row)
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
