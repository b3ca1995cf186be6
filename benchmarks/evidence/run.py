"""Compare all methods on the test examples of each task, at several training lengths: evidence.csv, verdict.csv.

Each task is a comparison by `mm_hf.comparison`. For a seed, all methods start from the same weights and get the same
batches. Several processes can run side by side on different tasks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.evidence import readme, regimes, verdict
from benchmarks.evidence.methods import BASELINE, DERIVED, METHODS
from benchmarks.evidence.registry import TaskOptions
from benchmarks.evidence.results import (
    Row,
    difference_cell,
    difference_of,
    draw_differences,
    group_by,
    mean_cell,
    merge_rows,
    read_rows,
    round_number,
)  # fmt: skip
from benchmarks.evidence.runs import (
    Paths,
    add_lengths,
    chosen_seeds,
    finished_runs,
    fold_directories,
    length_directories,
    length_of,
    pair_runs,
    train_runs,
)  # fmt: skip
from benchmarks.evidence.tasks import STUDY, TASKS
from benchmarks.markdown import replace_section, table_lines, wrap_text
from mm_hf.evaluation.metrics.registry import METRICS, compared_metrics
from mm_hf.evaluation.plots import plot_alignment_uniformity
from mm_hf.evaluation.statistics import Range, mean_and_spread, mean_interval

DEFAULT_TASKS, DEFAULT_SEEDS = STUDY, 5
FIELDS = (
    "task", "length", "epochs", "train_examples", "method", "metric", "mean", "half_width", "difference_to_erm", "low",
    "high", "interval", "seeds", "test_examples", "measured_on",
)  # fmt: skip
MAIN = tuple(info.name for info in compared_metrics())
OTHERS = ("fgsm_accuracy", "corruption_accuracy", "ood_auroc", "ood_energy_auroc", "class_spread")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    help = f"of {', '.join(METHODS)}; methods that do not apply to a task are skipped"
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD", help=help
    )
    add_lengths(parser)
    parser.add_argument(
        "--full_test", action="store_true", help="evaluate Fashion-MNIST on all 10,000 test images instead of 2,000"
    )


def train(args: argparse.Namespace, paths: Paths) -> None:
    """Train and evaluate all runs that are missing; write a report per task."""
    if BASELINE not in args.methods:
        raise ValueError(f"--methods must include {BASELINE}, the baseline. Its finished runs are kept.")
    for length, name in itertools.product(args.lengths, args.tasks):
        task = TASKS[name]
        options = TaskOptions(length=length, quick=args.quick, full_test=args.full_test, cache=paths.cache)
        methods = {method: METHODS[method]() for method in METHODS if method in args.methods and method in task.methods}
        # Robustness is measured at the task's own length only.
        samples = 0 if length > 1 else 20 if args.quick else task.robustness_samples
        directory = paths.output / "run" / f"length-{length}"
        train_runs(name, methods, chosen_seeds(args.seeds), directory, options, samples, report=True)


def summarize(paths: Paths) -> list[Path]:
    """Update evidence.csv from finished runs; write the section and plots of each task in it."""
    table = paths.results / "evidence.csv"
    found = [row for directory in length_directories(paths.output / "run") for row in rows_of(directory)]
    merge_rows(table, found, {"task": list(TASKS), "length": (), "method": [*METHODS, *DERIVED]})
    rows = read_rows(table)
    if not rows:
        return []
    written = [table, paths.page]
    for task, own in group_by(rows, "task").items():
        shortest = group_by(own, "length")[min(row["length"] for row in own)]
        for name, draw in (("evidence", draw_forest), ("plane", draw_plane)):
            path = paths.image(f"{name}_{task}.png")
            if draw(shortest, path):
                written.append(path)
        replace_section(paths.page, task, section(task, own, paths.docs / "images"))
    written += [*verdict.summarize(paths), *regimes.summarize(paths, rows)]
    return [*written, *readme.summarize(paths, rows)]


def rows_of(directory: Path) -> Iterator[Row]:
    """Yield a row per method and metric from the finished runs of a task.

    `half_width` belongs to Student's 95 % interval over seeds, which two seeds do not have. Differences of accuracy,
    NLL, Brier score and calibration error have intervals of the paired bootstrap over seeds and test examples.
    Differences of other metrics have Student's interval of the differences per seed, which does not generalize to other
    test examples.
    """
    runs = finished_runs(directory, [*METHODS, *DERIVED])
    if BASELINE not in runs:
        return
    paths = [fold / "settings.json" for fold in fold_directories(directory)]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    settings, epochs = [values["task"] for values in found], found[0]["training_args"]["num_train_epochs"]
    for method in runs:
        comparison = pair_runs(directory, runs, method)
        if not comparison.runs[method]:
            continue
        for metric, info in METRICS.items():
            values = comparison.values(metric)
            if method not in values or info.group == "cost":
                continue
            mean = mean_and_spread(values[method])
            row: Row = dict.fromkeys(FIELDS, "")
            row |= {"task": directory.name, "length": length_of(directory), "method": method, "metric": metric}
            row |= {"epochs": epochs, "train_examples": settings[0]["training_examples"]}
            row["mean"] = round_number(mean.value)
            half = math.nan if isinstance(mean, Range) else (mean.high - mean.low) / 2
            row |= {"half_width": round_number(half), "seeds": len(comparison.seeds)}
            row["test_examples"] = sum(fold["test_examples"] for fold in settings)
            row["measured_on"] = settings[0].get("measured_on", "test examples")
            if method != BASELINE:
                if metric in MAIN:
                    interval, kind = comparison.differences[metric][method], "paired bootstrap"
                else:
                    interval, kind = mean_interval(values[method] - values[BASELINE]), "student"
                row |= {"difference_to_erm": round_number(interval.value), "interval": kind}
                row |= {"low": round_number(interval.low), "high": round_number(interval.high)}
            yield row


def draw_forest(rows: Sequence[Row], path: Path) -> bool:
    """Draw the differences of a task as a forest plot. Return False if a metric is missing or not finite."""
    by_metric = {
        metric: {
            row["method"]: difference_of(row) for row in rows if row["metric"] == metric and row["method"] != BASELINE
        }
        for metric in MAIN
    }
    finite = all(math.isfinite(d.value) for differences in by_metric.values() for d in differences.values())
    if not finite or not all(by_metric.values()):
        return False
    draw_differences(by_metric, path)
    return True


def draw_plane(rows: Sequence[Row], path: Path) -> bool:
    """Draw alignment and uniformity of a task's methods, means over seeds. Return False if there are none."""
    found = {(row["method"], row["metric"]): row["mean"] for row in rows}
    pairs = {
        method: [(found[method, "alignment"], found[method, "uniformity"])]
        for method in group_by(rows, "method")
        if (method, "alignment") in found
    }
    if len(pairs) > 1:
        plot_alignment_uniformity(pairs, path)
    return len(pairs) > 1


def section(task: str, rows: Sequence[Row], images: Path) -> list[str]:
    """Return the lines of a task's section: description, differences per length, other metrics, plots."""
    lengths = group_by(rows, "length")
    shortest = lengths[min(lengths)]
    seeds = sorted({int(row["seeds"]) for row in rows})
    number = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    caption = (
        f"{number} seed{'s' * (seeds[-1] > 1)} per method, {rows[0]['test_examples']:,.0f} {rows[0]['measured_on']}. "
        "The first row shows the mean ± half of its 95 % interval. The other rows show the difference from "
        f"{BASELINE} and its 95 % interval, in bold if the interval excludes zero."
    )
    description = TASKS[task].description if task in TASKS else ""
    lines = [f"## {task}", "", *wrap_text(description), "", *wrap_text(f"*{caption}*"), ""]
    for length, own in sorted(lengths.items()):
        lines += [f"**Length {length:.0f}: {own[0]['epochs']:.0f} epochs**", "", *difference_table(own), ""]
    lines += other_metrics(shortest)
    for name, title in (
        (f"evidence_{task}.png", f"Differences from {BASELINE} on {task}, with 95 % intervals"),
        (f"plane_{task}.png", f"Alignment and uniformity of the features on {task}"),
    ):
        if (images / name).exists():
            lines += ["", f"![{title}](images/{name})"]
    return [*lines, ""]


def difference_table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a table: the main metrics of the baseline, and the differences of the other methods."""
    found = {(row["method"], row["metric"]): row for row in rows}
    table = [["Method", *(METRICS[m].heading for m in MAIN)]]
    table += [[name, *(difference_cell(found.get((name, m))) for m in MAIN)] for name in group_by(rows, "method")]
    return table_lines(table)


def other_metrics(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a table with the means of the other metrics."""
    found = {(row["method"], row["metric"]): row for row in rows}
    methods = list(group_by(rows, "method"))
    names = [m for m in OTHERS if any((method, m) in found for method in methods)]
    table = [["Method", *(METRICS[m].heading for m in names)]]
    for method in methods:
        table.append([method, *(mean_cell(found.get((method, m))) for m in names)])
    return table_lines(table)
