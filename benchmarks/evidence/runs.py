"""Training runs of the evidence study: options of the commands, resumable runs, and finished runs read from disk."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import transformers

from benchmarks.evidence.methods import BASELINE, METHODS
from benchmarks.evidence.registry import TaskOptions
from benchmarks.evidence.tasks import TASKS
from benchmarks.harness import RESULTS
from mm_hf import Mixing
from mm_hf.comparison import Comparison, EvaluationOptions, Run, run_comparison
from mm_hf.evaluation.metrics.compute import compute_metrics

OUTPUTS, DOCS = Path("outputs/evidence"), Path(__file__).parents[2] / "docs"
PRINTED = ("accuracy", "nll", "calibration_error", "train_seconds")


@dataclass(frozen=True)
class Paths:
    """Directories of the study.

    Attributes:
        output: Training runs: a directory per command, in it a directory per task.
        results: CSV files.
        docs: Directory of evidence.md and images/.
    """

    output: Path
    results: Path
    docs: Path

    @property
    def cache(self) -> Path:
        """Directory for cached outputs of frozen layers."""
        return self.output / "cache"

    def image(self, name: str) -> Path:
        """Return the path of a plot of docs/evidence.md and create its directory."""
        (self.docs / "images").mkdir(parents=True, exist_ok=True)
        return self.docs / "images" / name

    @property
    def page(self) -> Path:
        """Path of evidence.md."""
        return self.docs / "evidence.md"

    @property
    def readme(self) -> Path:
        """Path of README.md."""
        return self.docs.parent / "README.md"


def add_common_arguments(
    parser: argparse.ArgumentParser, tasks: Sequence[str] | None = None, seeds: int | None = None
) -> None:
    """Add the options that all commands share; without `tasks`, those of a command that trains nothing."""
    if tasks is not None:
        parser.add_argument(
            "--tasks",
            nargs="+",
            choices=list(TASKS),
            default=list(tasks),
            metavar="TASK",
            help=f"of {', '.join(TASKS)}",
        )
        parser.add_argument(
            "--seeds", nargs="+", type=int, default=[seeds], help="one number: how many; several: which"
        )
    parser.add_argument("--output_dir", type=Path, default=OUTPUTS, help=f"directory of the runs; default: {OUTPUTS}")
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="directory of the CSV files")
    parser.add_argument("--docs_dir", type=Path, default=DOCS, help="directory of evidence.md and images/")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tenth of the epochs, to check that everything runs; writes all files to outputs/evidence_quick",
    )


def add_lengths(parser: argparse.ArgumentParser) -> None:
    """Add the option for the training lengths."""
    help = "multiples of the task's number of epochs; default: 1"
    parser.add_argument("--lengths", nargs="+", type=int, default=[1], metavar="LENGTH", help=help)


def paths_of(args: argparse.Namespace) -> Paths:
    """Return the directories of a command; --quick keeps its meaningless results away from the committed ones."""
    output, results, docs = args.output_dir, args.results_dir, args.docs_dir
    if args.quick:
        output = OUTPUTS.with_name("evidence_quick") if output == OUTPUTS else output
        results = output if results == RESULTS else results
        docs = output if docs == DOCS else docs
    return Paths(output, results, docs)


def chosen_seeds(given: Sequence[int]) -> list[int]:
    """Return the seeds that --seeds means: 3 is 0, 1, 2; several numbers are the seeds themselves."""
    return list(range(given[0])) if len(given) == 1 else list(given)


def silence_libraries() -> None:
    """Turn off the progress bars and messages of the libraries, so that a run prints one line."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def train_runs(
    task: str,
    methods: Mapping[str, Mixing],
    seeds: Sequence[int],
    directory: Path,
    options: TaskOptions,
    robustness_samples: int = 0,
    report: bool = False,
) -> None:
    """Train the baseline and the methods on all folds of a task; finished runs are kept. Print a line per run."""

    def print_run(run: Run) -> None:
        # All metrics come from the stored predictions. The models of all runs would take gigabytes.
        shutil.rmtree(run.directory / "model", ignore_errors=True)
        values = ", ".join(f"{name} {run.metrics[name]:.4g}" for name in PRINTED if name in run.metrics)
        print(f"{time.strftime('%H:%M:%S')} {task}, {run.method}, seed {run.seed}: {values}", flush=True)

    for fold, fold_directory in enumerate(fold_directories(directory / task)):
        comparison = run_comparison(
            TASKS[task].task(dataclasses.replace(options, fold=fold)),
            {BASELINE: METHODS[BASELINE](), **methods},
            seeds,
            fold_directory,
            baseline=BASELINE,
            evaluation=EvaluationOptions(robustness_samples=robustness_samples),
            keep_models="none",
            report=report,
            on_run=print_run,
        )
        for method, error in comparison.failed.items():
            print(f"{task}, {method}: cannot train this model: {error}", flush=True)


def length_directories(directory: Path) -> list[Path]:
    """Return the directories of all tasks at all lengths, `length-L/TASK`, in the order of the lengths and tasks."""
    found = [path for path in directory.glob("length-*/*") if path.name in TASKS]
    return sorted(found, key=lambda path: (length_of(path), list(TASKS).index(path.name)))


def length_of(directory: Path) -> int:
    """Return the multiple of a task's number of epochs that the runs in `length-L/TASK` are trained for."""
    return int(directory.parent.name.removeprefix("length-"))


def fold_directories(directory: Path) -> list[Path]:
    """Return the directories of the folds of a task; the task's own directory if it has no folds."""
    folds = TASKS[directory.name].folds if directory.name in TASKS else 1
    return [directory] if folds == 1 else [directory / f"fold-{fold}" for fold in range(folds)]


class PooledRun(Run):
    """Run whose predictions are those of the test examples of all folds."""

    parts: list[Run]

    @classmethod
    def pool(cls, runs: Sequence[Run]) -> PooledRun:
        """Pool the runs of all folds of a method and seed.

        Metrics of the predictions are computed on all test examples together. Training times are added up. Other
        metrics are means over the folds.
        """
        pooled = cls(**{**vars(runs[0]), "corruptions": {}, "history": []})
        pooled.parts = list(runs)
        names = set.intersection(*(set(run.metrics) for run in runs))
        pooled.metrics = {name: float(np.mean([run.metrics[name] for run in runs])) for name in names}
        pooled.metrics["train_seconds"] *= len(runs)
        arrays = pooled.arrays
        pooled.metrics |= compute_metrics("classification", arrays["logits"], arrays["labels"])
        return pooled

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Logits and labels of the test examples of all folds."""
        found = [run.arrays for run in self.parts]
        return {name: np.concatenate([arrays[name] for arrays in found]) for name in ("logits", "labels")}


def finished_runs(directory: Path, known: Sequence[str] | None = None) -> dict[str, dict[int, Run]]:
    """Return the finished runs of a directory by method and seed, the baseline first.

    Args:
        directory: Directory of a task.
        known: Methods to return, in this order. Default: all, in the order of their directories.
    """
    parts: dict[tuple[str, int], list[Run]] = {}
    folds = fold_directories(directory)
    for path in sorted(path for fold in folds for path in fold.glob("runs/*/seed-*")):
        run = Run.read(path)
        if run is not None:
            parts.setdefault((run.method, run.seed), []).append(run)
    found: dict[str, dict[int, Run]] = {}
    for (method, seed), runs in parts.items():
        if len(runs) == len(folds):
            found.setdefault(method, {})[seed] = runs[0] if len(folds) == 1 else PooledRun.pool(runs)
    order = dict.fromkeys([BASELINE, *found]) if known is None else known
    return {name: found[name] for name in order if name in found}


def pair_runs(
    directory: Path, runs: Mapping[str, Mapping[int, Run]], method: str, baseline: str = BASELINE
) -> Comparison:
    """Return the comparison of two methods on the seeds that both have finished."""
    seeds = sorted(runs[baseline].keys() & runs[method].keys())
    chosen = {name: [runs[name][seed] for seed in seeds] for name in dict.fromkeys((baseline, method))}
    return Comparison(directory.name, dict.fromkeys(chosen), chosen, baseline)
