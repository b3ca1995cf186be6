"""Which method helps, by how much and how sure that is, on small real tasks: the study behind docs/evidence.md.

Run by `make evidence`. Each task is a comparison by `mm_hf.comparison`, in a directory of its own: all methods of a
seed start from the same weights and see the same batches. Stopped, the same command goes on; seeds and methods can be
added. Processes may run side by side on different tasks.

    python benchmarks/evidence.py [--tasks digits_vit ...] [--methods erm dense_multimix ...] [--seeds 5]
    python benchmarks/evidence.py --summary    # tables and pictures of what has been run, and nothing trained
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Weights and data come from packages; a typing error in a name must not become a download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import transformers
from evidence_study import METHODS, Options
from evidence_summary import summarise
from evidence_tasks import TASKS
from evidence_verdict import write_verdict
from harness import RESULTS

from mm_hf.comparison import EvaluationOptions, Run, run_comparison

OUTPUTS, QUICK = Path("outputs/evidence"), Path("outputs/evidence_quick")
DOCS = Path(__file__).parent.parent / "docs"


def run_task(name: str, methods: Sequence[str], seeds: Sequence[int], output_dir: Path, options: Options) -> None:
    """All runs of a task that are not there yet, and its report."""
    study = TASKS[name]
    chosen = {method: METHODS[method]() for method in METHODS if method in methods and method in study.methods}

    def finished(run: Run) -> None:
        # The predictions are kept, which all figures come from; models of all runs would be gigabytes.
        shutil.rmtree(run.directory / "model", ignore_errors=True)
        accuracy, seconds = 100 * run.metrics["accuracy"], run.metrics["train_seconds"]
        told = f"{name}, {run.method}, seed {run.seed}: accuracy {accuracy:.2f} %, trained in {seconds:.1f} s"
        print(f"{time.strftime('%H:%M:%S')} {told}", flush=True)

    comparison = run_comparison(
        study.task(options),
        chosen,
        seeds,
        output_dir / name,
        baseline="erm",
        measures=EvaluationOptions(robustness_samples=20 if options.quick else study.robustness_samples),
        keep_models="none",
        on_run=finished,
    )
    for method, why in comparison.failed.items():
        print(f"{name}, {method}: not possible: {why}", flush=True)


def quiet() -> None:
    """One line a run, and nothing else."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def chosen_seeds(given: Sequence[int]) -> list[int]:
    """What --seeds means: how many, or several numbers: which."""
    return list(range(given[0])) if len(given) == 1 else list(given)


def command(description: str | None, seeds: int, output_dir: Path) -> argparse.ArgumentParser:
    """The options that all commands of the study have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[seeds], help="how many; or several numbers: which")
    parser.add_argument("--output_dir", type=Path, default=output_dir, help="gets the runs, a directory a task")
    parser.add_argument("--summary", action="store_true", help="sum up what has been run; train nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and sum up."""
    parser = command(__doc__, 5, OUTPUTS)
    tasks, methods = f"of {', '.join(TASKS)}", f"of {', '.join(METHODS)}; a task leaves out what makes no sense on it"
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK", help=tasks)
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD", help=methods
    )
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="gets evidence.csv and verdict.csv")
    parser.add_argument("--docs_dir", type=Path, default=DOCS, help="gets tables in evidence.md, and images/")
    quick = "a tenth of the epochs, to see that everything runs; all is written to --output_dir, outputs/evidence_quick"
    parser.add_argument("--quick", action="store_true", help=quick)
    full = "Fashion-MNIST: all 10,000 test images in place of 2,000"
    parser.add_argument("--full_test", action="store_true", help=full)
    args = parser.parse_args(arguments)
    if args.quick:
        # Figures that say nothing have no place among those that do.
        args.output_dir = QUICK if args.output_dir == OUTPUTS else args.output_dir
        args.results_dir = args.output_dir if args.results_dir == RESULTS else args.results_dir
        args.docs_dir = args.output_dir if args.docs_dir == DOCS else args.docs_dir
    if not args.summary:
        if "erm" not in args.methods:
            parser.error("--methods must have erm, which the others are compared with; its finished runs are kept.")
        quiet()
        seeds = chosen_seeds(args.seeds)
        options = Options(quick=args.quick, full_test=args.full_test, cache=args.output_dir / "cache")
        for name in args.tasks:
            try:
                run_task(name, args.methods, seeds, args.output_dir, options)
            except (ModuleNotFoundError, FileNotFoundError) as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 1
    written = summarise(args.output_dir, list(TASKS), args.results_dir, args.docs_dir)
    write_verdict(args.output_dir, list(TASKS), args.results_dir, args.docs_dir)
    print(f"Wrote {', '.join(str(path) for path in written)}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
